# SPDX-License-Identifier: AGPL-3.0-or-later
"""A live system with UEFI installs onto other disks of the machine, which then start alone."""

from pathlib import Path

import pytest

from tests.boot.checks import is_immutable, refused, runs_snapshot, said
from tests.boot.conftest import Boot
from tests.boot.live import INIT, ROOT, attached, empty_disk, installs, is_well, make_live, small_root, unlock
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(500)]

PASSPHRASE = "correct horse 7!"


def test_with_uefi_onto_whole_disks(disk: Disk, boot: Boot, rootfs: Path, tmp_path: Path) -> None:
    """One with two systems, one that is encrypted."""
    root = tmp_path / "root.tar"
    small_root(rootfs, root, "cryptsetup-initramfs")
    make_live(disk, root)
    root.unlink()
    pair, encrypted = empty_disk(tmp_path, "pair"), empty_disk(tmp_path, "encrypted")
    with boot(disk, uefi=True, devices=attached(pair, encrypted)) as machine:
        machine.login()
        installs(machine, "--disk /dev/vdb --yes")
        assert "Debian GNU/Linux (ash)" in said(machine, "efibootmgr")
        refused(
            machine, f"{INIT} /dev/vdb3 /dev/vdb /dev/vdb2 --mode 3 --yes --rootfs {ROOT}", "there is a system debian"
        )
        second = '/dev/vdb3 /dev/vdb /dev/vdb2 debian_2 "Work" --mode 3 --yes --hostname second --swap 64M --mutable'
        assert "Work is added to debian" in installs(machine, second)
        said(machine, f"echo '{PASSPHRASE}' > /run/passphrase")
        installs(machine, "--disk /dev/vdc --yes --luks-passphrase-file /run/passphrase")
        assert PASSPHRASE not in said(machine, "cat /var/log/ash-install.log")
        assert said(machine, "lsblk --noheadings --output TYPE /dev/vdc").split() == ["disk", "part", "part", "part"]
        machine.poweroff()
    start_the_pair(pair, boot)
    start_the_encrypted(encrypted, boot)


def start_the_pair(pair: Disk, boot: Boot) -> None:
    """Each system starts, and has the other one start."""
    with boot(pair, uefi=True) as machine:
        machine.login()
        runs_snapshot(machine, 0)
        is_well(machine, "debian")
        is_immutable(machine)
        said(machine, "ash dist debian_2")
        machine.reboot()
        machine.login()
        runs_snapshot(machine, 1)
        is_well(machine, "debian_2")
        assert said(machine, "hostname") == "second"
        assert (
            said(machine, "touch /usr/written && rm /usr/written; swapon --show=NAME --noheadings") == "/swap/swapfile"
        )
        assert said(machine, "ash dist").splitlines() == ["debian", "debian_2  running"]
        machine.poweroff()


def start_the_encrypted(disk: Disk, boot: Boot) -> None:
    """GRUB asks until the passphrase is right; nobody else asks."""
    assert b"Debian" not in disk.image.read_bytes()[1 << 29 : 1 << 30]
    with boot(disk, uefi=True) as machine:
        unlock(machine, "wrong", PASSPHRASE)
        machine.login()
        is_well(machine, "debian")
        assert said(machine, "stat -c %a /etc/cryptsetup-keys.d/* /boot/initrd*").split() == ["0", "600"]
        machine.poweroff()
