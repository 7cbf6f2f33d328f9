# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures for tests that boot virtual machines."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from installer.machine import Machine
from tests.support import Disk

Boot = Callable[..., Machine]


@pytest.fixture
def boot(tmp_path: Path) -> Boot:
    """Boots a machine from a disk: `with boot(disk) as machine:`; it only flushes to the disk if it `flushes`."""

    def start(
        disk: Disk, *, uefi: bool = False, secure: bool = False, devices: Sequence[str] = (), flushes: bool = False
    ) -> Machine:
        log = tmp_path / "console.log"
        return Machine(disk.image, uefi=uefi, secure=secure, log=log, expendable=not flushes, devices=devices)

    return start
