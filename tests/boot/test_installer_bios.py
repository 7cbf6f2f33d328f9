# SPDX-License-Identifier: AGPL-3.0-or-later
"""A live system with a BIOS installs onto a partition, which then starts alone; what is wrong is refused before."""

from pathlib import Path

import pytest

from tests.boot.checks import is_immutable, runs_snapshot, said
from tests.boot.conftest import Boot
from tests.boot.live import ROOT, attached, content, empty_disk, installs, is_well, make_live, run_several, small_root
from tests.support import Disk, program

pytestmark = [pytest.mark.boot, pytest.mark.budget(350)]

WRONG = [
    ("", "name what to make"),
    ("/dev/vdb1", "name the partition of the root, its drive"),
    ("--disk /dev/vdb1 --yes", "/dev/vdb1 is a partition, not a disk; its disk is /dev/vdb"),
    ("--disk /dev/vda --yes", "the running system is on /dev/vda"),
    ("--disk /dev/vdz --yes", "/dev/vdz does not exist; disks: /dev/vda /dev/vdb"),
    ("--disk /etc/fstab --yes", "/etc/fstab is not a disk"),
    ("--disk /dev/vdc --yes", "/dev/vdc is in use: /dev/vdc1 is used for swapping"),
    ("--disk /dev/vdd --yes", "/dev/vdd has 0.1 GiB, and 3.0 GiB are needed"),
    ("--disk /dev/vde --yes", "a part of"),
    ("/dev/vdb /dev/vdb1 --yes", "/dev/vdb is a disk, not a partition; its partitions: /dev/vdb1"),
    ("/dev/vdb1 /dev/vdb1 --yes", "/dev/vdb1 is a partition, not a disk; its disk is /dev/vdb"),
    ("/dev/vdb1 /dev/vdb /dev/vdb2 --yes", "it is not clear what happens to the EFI partition"),
    ("/dev/vdb1 /dev/vdb /dev/vdb2 --yes --mode 2", "/dev/vdb2 is not an EFI partition"),
    ("/dev/vdb1 /dev/vdb --mode 3 --yes", "/dev/vdb1 has no btrfs file system, but none; --mode 1 or 2 makes one"),
    ("/dev/vdb2 /dev/vdb --yes", "/dev/vdb2 has 0.1 GiB, and 3.0 GiB are needed"),
    ("/dev/vdb1 /dev/vdc --yes", "GRUB for the BIOS has no place on /dev/vdc"),
    ("/dev/vdb1 /dev/vdb arch --yes", "ash cannot install arch"),
    ("/dev/vdb1 /dev/vdb --hostname a_b --yes", "'a_b' is not a valid host name"),
    ("/dev/vdb1 /dev/vdb --user root --yes", "the user name root is reserved"),
    ("/dev/vdb1 /dev/vdb --swap /dev/vdd --yes", "/dev/vdd is not a swap partition"),
    ("/dev/vdb1 /dev/vdb --profile nothere --yes", "there is no profile nothere"),
    ("/dev/vdb1 /dev/vdb", "there is no terminal to ask on"),
]


def test_with_a_bios_onto_a_partition(disk: Disk, boot: Boot, rootfs: Path, tmp_path: Path) -> None:
    """In the documented form, on a partition that parted made; nothing of what is wrong changes a disk."""
    root = tmp_path / "root.tar"
    small_root(rootfs, root)
    make_live(disk, root, [f"--rootfs {ROOT} {options}" for options, _ in WRONG])
    root.unlink()
    other, swap, raid = (empty_disk(tmp_path, name) for name in ("other", "swap", "raid"))
    small = empty_disk(tmp_path, "small", 100 << 20)
    program("parted", "--script", other.image, "mklabel", "msdos", "mkpart", "primary", "1MiB", "3900MiB")
    program("parted", "--script", other.image, "mkpart", "primary", "3900MiB", "4000MiB")
    program("parted", "--script", swap.image, "mklabel", "gpt", "mkpart", "swap", "1MiB", "100%")
    with boot(disk, devices=attached(other, swap, small, raid)) as machine:
        machine.login()
        said(machine, "mkswap /dev/vdc1 && swapon /dev/vdc1 && pvcreate /dev/vde && vgcreate group /dev/vde")
        said(machine, "lvcreate --yes --size 64M group && sync")
        disks = (other, swap, small, raid)
        before = [content(one) for one in disks]
        ended = zip(WRONG, run_several(machine), strict=True)
        said_wrong = {
            options: output for (options, words), (status, output) in ended if not status or words not in output
        }
        assert not said_wrong
        shown = installs(machine, "/dev/vdb1 /dev/vdb --dry-run")
        assert "mkfs.btrfs" in shown
        assert "grub-install" in shown
        assert "sfdisk" in installs(machine, "--disk /dev/vdb --dry-run")
        assert [content(one) for one in disks] == before
        assert "on another disk" not in installs(machine, "/dev/vdb1 /dev/vdb --yes")
        machine.poweroff()
    with boot(other) as machine:
        machine.login()
        runs_snapshot(machine, 0)
        is_well(machine, "debian")
        is_immutable(machine)
        machine.poweroff()
