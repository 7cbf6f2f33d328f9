# SPDX-License-Identifier: AGPL-3.0-or-later
"""Two systems on one file system: each is started from the other's menu, and by the firmware as `ash dist` says."""

import subprocess
import sys
from pathlib import Path

import pytest

from installer.machine import Machine
from tests.boot.checks import is_immutable, refused, said
from tests.boot.conftest import Boot
from tests.support import CHECKOUT, Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(600)]

SECOND = "debian_2"


@pytest.fixture
def pair(disk: Disk, rootfs: Path) -> Disk:
    """A disk with two systems."""
    words: list[str | Path] = [
        "--image",
        disk.image,
        "--mode",
        "3",
        "--id",
        SECOND,
        "--hostname",
        "second",
        "--rootfs",
        rootfs,
    ]
    subprocess.run([sys.executable, CHECKOUT / "init.py", *words], check=True, stdin=subprocess.DEVNULL)
    return disk


def runs(machine: Machine, ident: str) -> None:
    """Assert that a system runs, and that nothing is wrong with it."""
    machine.login()
    assert said(machine, "cat /.snapshots/ash/distro") == f"{ident} debian"
    assert said(machine, "systemctl is-system-running --wait || true") == "running"
    assert said(machine, "ash fsck") == "no problems found"
    is_immutable(machine)


@pytest.mark.parametrize(("uefi", "first"), [(False, SECOND), (True, "debian")], ids=["BIOS", "UEFI"])
def test_each_menu_starts_the_other_system(pair: Disk, boot: Boot, uefi: bool, first: str) -> None:
    other = "debian" if first == SECOND else SECOND
    with boot(pair, uefi=uefi) as machine:
        runs(machine, first)
        machine.reboot()
        machine.choose(f"Another system: {other}$")
        machine.choose("snapshot 0: ")
        runs(machine, other)
        machine.poweroff()


def test_the_firmware_starts_what_dist_says(pair: Disk, boot: Boot) -> None:
    with boot(pair, uefi=True) as machine:
        runs(machine, "debian")
        for ident in (SECOND, "debian"):
            said(machine, f"ash dist {ident}")
            machine.reboot()
            runs(machine, ident)
            assert said(machine, "ash dist").splitlines() == [
                f"{one}  running" if one == ident else one for one in ("debian", SECOND)
            ]
        refused(machine, "ash hide", "has no Windows")
        machine.poweroff()
