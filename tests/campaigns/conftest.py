# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures of the campaigns, which are longer than a run of all tests may be: `tests/run tests/campaigns`."""

from tests.boot.conftest import boot
from tests.system.conftest import _own_mounts, reflinks
from tests.system.faults.conftest import scene

__all__ = ["_own_mounts", "boot", "reflinks", "scene"]
