# SPDX-License-Identifier: AGPL-3.0-or-later
"""The fixtures of the system tests, for those that are run by hand: `tests/run tests/more`."""

from tests.system.conftest import _own_mounts, snapshot, system

__all__ = ["_own_mounts", "snapshot", "system"]
