# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures for tests that boot virtual machines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from installer.machine import Machine
from tests.support import Disk

Boot = Callable[..., Machine]


@pytest.fixture
def boot(tmp_path: Path) -> Boot:
    """Boots a machine from a disk: `with boot(disk) as machine:`; it only flushes to the disk if it `flushes`."""

    def start(disk: Disk, *, flushes: bool = False, **hardware: Any) -> Machine:
        return Machine(disk.image, log=tmp_path / "console.log", expendable=not flushes, **hardware)

    return start
