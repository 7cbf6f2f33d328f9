# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures of the campaigns, which take too long for a normal run: `tests/run tests/campaigns`."""

from tests.boot.conftest import boot
from tests.system.conftest import _own_mounts, reflinks
from tests.system.faults.conftest import scene

__all__ = ["_own_mounts", "boot", "reflinks", "scene"]
