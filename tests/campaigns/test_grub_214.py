# SPDX-License-Identifier: AGPL-3.0-or-later
"""A BIOS disk without an EFI partition: GRUB 2.14 counts in the header of btrfs, and the machine goes back by itself.

Real here: the disk with an MBR and one partition, GRUB in its boot sector, and what it writes. GRUB's modules come from
the directory `ASH_TEST_GRUB214` (i386-pc); the grub-install of the system under test installs them.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from ash import ENVIRONMENT_AT, GRUB_FEATURE, SECTOR, Countdown, btrfs_partition
from installer.disk import loop_device
from installer.machine import Machine
from tests.boot.checks import new_snapshot, runs_snapshot, said, starts_next
from tests.boot.conftest import Boot
from tests.support import DISTRIBUTION, Disk, program

pytestmark = [pytest.mark.boot, pytest.mark.budget(1800)]

MODULES = os.environ.get("ASH_TEST_GRUB214", "")
NEEDS_GRUB_214 = pytest.mark.skipif(not MODULES, reason="ASH_TEST_GRUB214 names no directory with GRUB 2.14's modules")
INSTALL = """\
mount --bind "$1" "$1"
for directory in dev proc sys; do mount --rbind /$directory "$1/$directory"; done
mount -t tmpfs tmp "$1/tmp"
mkdir "$1/tmp/modules"
mount --bind "$2" "$1/tmp/modules"
mount --bind "$3" "$1/mnt"
chroot "$1" grub-install --target=i386-pc --directory=/tmp/modules --boot-directory=/mnt \\
    --modules="part_msdos btrfs search_fs_uuid" "$4"
"""
NOT_AUTOMATIC = "not automatic"


def without_efi_partition(disk: Disk, modules: Path | None) -> int:
    """Give a disk an MBR with one partition, that of the root, and GRUB; returns where the partition starts.

    Args:
        disk: the disk.
        modules: of the GRUB to install; None for that of the system.
    """
    start, size = btrfs_partition(disk.image)
    with disk.files() as files, loop_device(disk.image) as whole:
        with disk.image.open("rb+") as image:
            image.write(bytes(2 << 20))
        table = f"label: dos\nstart={start // SECTOR}, size={size // SECTOR}, type=83, bootable\n"
        program("sh", "-ec", 'printf "$1" | sfdisk --quiet "$2"', "sh", table, disk.image)
        root, boot = files.root("deploy"), files.grub_cfg.parent.parent
        shutil.rmtree(boot / "grub/i386-pc")
        source = modules or root / "usr/lib/grub/i386-pc"
        program("unshare", "--mount", "sh", "-ec", INSTALL, "sh", root, source, boot, whole)
        fstab = root / "etc/fstab"
        lines = fstab.read_text().splitlines(keepends=True)
        fstab.write_text("".join(line for line in lines if "/boot/efi" not in line))
        (files.state / "efi").unlink()
    return start


def notes(disk: Disk, start: int) -> Countdown | None:
    """GRUB's notes in the header of btrfs; None if there are none."""
    with disk.image.open("rb") as image:
        image.seek(start + ENVIRONMENT_AT)
        return Countdown.of_block(image.read(SECTOR), SECTOR)


def restarts(machine: Machine) -> None:
    machine.reboot()
    machine.login()


def blessed(machine: Machine) -> None:
    """Wait until what GRUB has counted is noted."""
    said(machine, "until systemctl is-active ash-bless; do sleep 1; done")


@NEEDS_GRUB_214
def test_grub_counts_in_btrfs_once_it_has_shown_that_it_can(disk: Disk, boot: Boot) -> None:
    start = without_efi_partition(disk, Path(MODULES))
    with boot(disk) as machine:
        machine.login()
        assert NOT_AUTOMATIC in said(machine, "ash status")
        first = new_snapshot(machine, "clone 0")
        said(machine, f"ash deploy {first}")
        assert NOT_AUTOMATIC in said(machine, "ash status")
        restarts(machine)
        runs_snapshot(machine, first)
        assert NOT_AUTOMATIC not in said(machine, "ash status")
        said(machine, "echo boot_tries::2 > /etc/ash.conf")
        bad = new_snapshot(machine, "clone 0")
        said(machine, f"ash run {bad} ln -sf /bin/false /usr/sbin/init && ash deploy {bad}")
        assert "GRUB goes back" in said(machine, "setpriv --reuid 65534 --clear-groups ash status")
        machine.reboot()
        machine.login(patient=True, hasten=False, timeout=1800)
        runs_snapshot(machine, first)
        blessed(machine)
        assert f"snapshot {bad} did not start" in said(machine, "ash status")
        starts_next(machine, first)
        good = new_snapshot(machine, "clone 0")
        said(machine, f"ash deploy {good}")
        restarts(machine)
        blessed(machine)
        runs_snapshot(machine, good)
        said(machine, "ash deploy --once 0")
        restarts(machine)
        runs_snapshot(machine, 0)
        restarts(machine)
        runs_snapshot(machine, good)
        assert said(machine, "ash fsck") == "no problems found"
        machine.poweroff()
    console = (disk.image.parent / "console.log").read_text(errors="replace")
    assert len(re.findall(r"Command line: .*ash\.trial=", console)) == 3, "twice the bad one, and the good one"
    left = notes(disk, start)
    assert left
    assert (left.ash, left.try_id, left.once, left.seen == left.ask != "") == (DISTRIBUTION, "", "", True)
    assert "sparse file" not in console


def test_an_older_grub_is_left_alone(disk: Disk, boot: Boot) -> None:
    start = without_efi_partition(disk, None)
    with boot(disk) as machine:
        machine.login()
        if GRUB_FEATURE in said(machine, f"grep -ao {GRUB_FEATURE} /usr/lib/grub/i386-pc/normal.mod || true"):
            pytest.skip("the GRUB of the system under test is not older than 2.14")
        said(machine, "ash deploy $(ash -q clone 0)")
        restarts(machine)
        runs_snapshot(machine, 1)
        assert NOT_AUTOMATIC in said(machine, "ash status")
        assert said(machine, "ash fsck") == "no problems found"
        machine.poweroff()
    assert notes(disk, start) is None
