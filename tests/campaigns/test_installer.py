# SPDX-License-Identifier: AGPL-3.0-or-later
"""A live system installs onto another disk of the machine, which then starts alone."""

import os
import shutil
from pathlib import Path

import pytest

from installer.machine import Machine
from tests.boot.checks import is_immutable, runs_snapshot, said
from tests.boot.conftest import Boot
from tests.support import CHECKOUT, Disk, program

pytestmark = [pytest.mark.boot, pytest.mark.budget(400)]

INSTALLER = ("ash.py", "init.py", "distros", "installer", "profiles")
TOOLS = ("fdisk", "mtools", "efibootmgr")
INIT = "python3 /home/checkout/init.py"


def make_live(disk: Disk, rootfs: Path) -> None:
    """Make a disk the live system, with the installer in /home, and the tools that it would install."""
    number = disk.clone()
    disk.ash("install", number, *TOOLS)
    disk.ash("deploy", number)
    with disk.files() as files:
        for name in INSTALLER:
            copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copyfile
            (files.home / "checkout").mkdir(exist_ok=True)
            copy(CHECKOUT / name, files.home / "checkout" / name)
        shutil.copyfile(rootfs, files.home / "root.tar")


def empty_disk(directory: Path, size: int = 4 << 30) -> Disk:
    """A disk of zeros."""
    image = directory / "other.img"
    with image.open("wb") as file:
        os.truncate(file.fileno(), size)
    return Disk(image)


def attached(*disks: Disk) -> list[str]:
    """The options of QEMU for more disks, from /dev/vdb on."""
    drives = [f"file={disk.image},format=raw,if=virtio,cache=unsafe" for disk in disks]
    return [word for drive in drives for word in ("-drive", drive)]


def test_a_live_system_installs_onto_a_whole_disk(disk: Disk, boot: Boot, rootfs: Path, tmp_path: Path) -> None:
    make_live(disk, rootfs)
    other = empty_disk(tmp_path)
    with boot(disk, uefi=True, devices=attached(other)) as machine:
        machine.login()
        installs(machine, "--disk /dev/vdb --yes")
        assert "Debian GNU/Linux (ash)" in said(machine, "efibootmgr")
        machine.poweroff()
    starts_alone(other, boot, uefi=True)


WRONG = [
    ("", "name what to make"),
    ("/dev/vdb1", "name the partition of the root, its drive"),
    ("--disk /dev/vdb1 --yes", "/dev/vdb1 is a partition, not a disk; its disk is /dev/vdb"),
    ("--disk /dev/vda --yes", "the running system is on /dev/vda"),
    ("--disk /dev/vdz --yes", "/dev/vdz does not exist; disks: /dev/vda /dev/vdb"),
    ("--disk /etc/fstab --yes", "/etc/fstab is not a disk"),
    ("/dev/vdb /dev/vdb1 --yes", "/dev/vdb is a disk, not a partition; its partitions: /dev/vdb1"),
    ("/dev/vdb1 /dev/vdb1 --yes", "/dev/vdb1 is a partition, not a disk; its disk is /dev/vdb"),
    ("/dev/vdb1 /dev/vdb /dev/vdb2 --yes", "it is not clear what happens to the EFI partition"),
    ("/dev/vdb1 /dev/vdb /dev/vdb2 --yes --mode 2", "/dev/vdb2 is not an EFI partition"),
    ("/dev/vdb2 /dev/vdb --yes", "/dev/vdb2 has 0.1 GiB, and 3.0 GiB are needed"),
    ("/dev/vdb1 /dev/vdb --hostname a_b --yes", "'a_b' is not a valid host name"),
    ("/dev/vdb1 /dev/vdb < /dev/null", "there is no terminal to ask on"),
]


def test_a_live_system_installs_onto_a_partition(disk: Disk, boot: Boot, rootfs: Path, tmp_path: Path) -> None:
    make_live(disk, rootfs)
    other = empty_disk(tmp_path)
    program("parted", "--script", other.image, "mklabel", "msdos", "mkpart", "primary", "1MiB", "3900MiB")
    program("parted", "--script", other.image, "mkpart", "primary", "3900MiB", "4000MiB")
    before = other.image.read_bytes()[: 1 << 20]
    with boot(disk, devices=attached(other)) as machine:
        machine.login()
        said_wrong = {}
        for options, words in WRONG:
            result = machine.command(f"{INIT} --rootfs /home/root.tar {options}", ok=None, timeout=300)
            if not result.status or words not in result.output:
                said_wrong[options] = result.output
        assert not said_wrong
        shown = installs(machine, "/dev/vdb1 /dev/vdb --dry-run")
        assert "mkfs.btrfs" in shown
        assert "grub-install" in shown
        assert "sfdisk" in installs(machine, "--disk /dev/vdb --dry-run")
        assert other.image.read_bytes()[: 1 << 20] == before
        assert "on another disk" not in installs(machine, "/dev/vdb1 /dev/vdb --yes")
        machine.poweroff()
    starts_alone(other, boot)


def starts_alone(disk: Disk, boot: Boot, *, uefi: bool = False) -> None:
    """Assert that a machine with this disk alone runs the new system."""
    with boot(disk, uefi=uefi) as machine:
        machine.login()
        runs_snapshot(machine, 0)
        is_immutable(machine)
        assert said(machine, "ash fsck") == "no problems found"
        machine.poweroff()


def installs(machine: Machine, options: str) -> str:
    """Run the installer; returns what it says."""
    return machine.command(f"{INIT} {options} --rootfs /home/root.tar", timeout=1200).output
