# SPDX-License-Identifier: AGPL-3.0-or-later
"""A live system installs onto disks of all kinds, with all kinds of choices; each then starts alone."""

from pathlib import Path
from typing import NamedTuple

import pytest

from installer.machine import DISK_HARDWARE, Machine
from tests.boot.checks import runs_snapshot, said
from tests.boot.conftest import Boot
from tests.boot.live import INIT, attached, empty_disk, installs, is_well, make_live, unlock, with_packages
from tests.support import Disk, program

pytestmark = [pytest.mark.boot, pytest.mark.budget(7200)]

PASSPHRASE = "correct horse 7!"
MBR = "parted --script /dev/vdb mklabel msdos mkpart primary 1MiB 100%"
GPT_EFI = (
    "parted --script /dev/vdb mklabel gpt mkpart efi fat32 1MiB 100MiB set 1 esp on mkpart root 100MiB 100%"
    " && mkfs.vfat -F 32 /dev/vdb1"
)


class Variant(NamedTuple):
    """An installation.

    Args:
        options: of the installer.
        uefi, secure: how the machine starts.
        hardware: what the other disk is, for QEMU.
        prepare: a command of the live system, before the installation.
        user: who logs in on the new system.
        check: a command of the new system.
        shows: what that prints.
    """

    options: str
    uefi: bool = False
    secure: bool = False
    hardware: str = DISK_HARDWARE
    prepare: str = "true"
    user: str = "root"
    check: str = "true"
    shows: str = ""

    @property
    def is_encrypted(self) -> bool:
        """Whether GRUB asks for a passphrase."""
        return "--luks" in self.options


LUKS = "--luks-passphrase-file /run/passphrase"
COMPRESSION = "btrfs property get / compression"
VARIANTS = {
    "BIOS, GPT": Variant("--disk /dev/vdb"),
    "BIOS, MBR": Variant("/dev/vdb1 /dev/vdb", prepare=MBR),
    "BIOS, GPT, LUKS": Variant(f"--disk /dev/vdb {LUKS}"),
    "BIOS, MBR, LUKS": Variant(f"/dev/vdb1 /dev/vdb {LUKS}", prepare=MBR),
    "UEFI": Variant("--disk /dev/vdb", uefi=True),
    "UEFI, an EFI partition that is kept": Variant("/dev/vdb2 /dev/vdb /dev/vdb1 --mode 2", uefi=True, prepare=GPT_EFI),
    "UEFI, LUKS, a swap file": Variant(
        f"--disk /dev/vdb {LUKS} --swap 64M --discard",
        uefi=True,
        check="swapon --show=NAME --noheadings",
        shows="/swap/swapfile",
    ),
    "Secure Boot": Variant("--disk /dev/vdb", secure=True, check="dmesg | grep -c 'locked down'", shows="1"),
    "a partition for /home": Variant(
        "--disk /dev/vdb --home-size 300M --user ada --password-file /run/passphrase",
        user="ada",
        check="findmnt --noheadings --output SOURCE /home; ls /home",
        shows="/dev/vda4\nada",
    ),
    "NVMe": Variant("--disk /dev/nvme0n1", uefi=True, hardware="nvme,serial=ash"),
    "4 KiB sectors": Variant(
        "--disk /dev/vdb",
        uefi=True,
        hardware=f"{DISK_HARDWARE},logical_block_size=4096,physical_block_size=4096",
        check="cat /sys/block/vda/queue/logical_block_size",
        shows="4096",
    ),
    "old LVM": Variant(
        "--disk /dev/vdb", prepare="pvcreate /dev/vdb && vgcreate old /dev/vdb && vgchange --activate n old"
    ),
    "old RAID": Variant(
        "--disk /dev/vdb",
        prepare="mdadm --create /dev/md7 --run --level=1 --raid-devices=2 /dev/vdb missing && mdadm --stop /dev/md7",
    ),
    "lzo": Variant("--disk /dev/vdb --compress lzo", uefi=True, check=COMPRESSION, shows="lzo"),
    "zlib": Variant("--disk /dev/vdb --compress zlib", check=COMPRESSION, shows="zlib"),
    "a profile, from the network": Variant(
        "--disk /dev/vdb --profile server", check="ash current; systemctl is-active ssh", shows="1\nactive"
    ),
}


@pytest.fixture(scope="module")
def live(image: Path, rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """The disk of the live system."""
    directory = tmp_path_factory.mktemp("live")
    root, made = directory / "root.tar", directory / "live.img"
    with_packages(rootfs, root, "cryptsetup-initramfs")
    program("cp", "--sparse=always", "--reflink=auto", image, made)
    make_live(Disk(made), root)
    root.unlink()
    return Disk(made)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_installed_starts_alone(live: Disk, boot: Boot, tmp_path: Path, name: str) -> None:
    variant, other = VARIANTS[name], empty_disk(tmp_path, "other")
    drive = ["-drive", f"file={other.image},format=raw,if=none,id=other,cache=unsafe"]
    devices = [*drive, "-device", f"{variant.hardware},drive=other"]
    how = {"uefi": variant.uefi, "secure": variant.secure}
    with boot(live, snapshot=True, devices=devices, **how) as machine:
        machine.login()
        said(machine, f"echo '{PASSPHRASE}' > /run/passphrase")
        said(machine, variant.prepare)
        installs(machine, f"{variant.options} --yes --hostname installed")
        machine.poweroff()
    with boot(other, hardware=variant.hardware, **how) as machine:
        if variant.is_encrypted:
            unlock(machine, PASSPHRASE)
        machine.login(variant.user, PASSPHRASE)
        assert said(machine, "hostname") == "installed"
        assert variant.shows in said(machine, variant.check)
        if variant.user == "root":
            is_well(machine, "debian")
        if variant.is_encrypted:
            new_initramfs_opens_too(machine)
        machine.cut_power()


def new_initramfs_opens_too(machine: Machine) -> None:
    """An initramfs that is made in a transaction, where no device can be seen, has the key as well, and is as secret."""
    said(machine, "ash clone 0")
    machine.command("ash run 1 update-initramfs -u", timeout=900)
    assert said(machine, "stat -c %a /.snapshots/rootfs/snapshot-1/boot/initrd*") == "600"
    said(machine, "ash deploy 1")
    machine.reboot()
    unlock(machine, PASSPHRASE)
    machine.login()
    runs_snapshot(machine, 1)


def test_an_installation_from_the_network(live: Disk, boot: Boot, tmp_path: Path) -> None:
    other = empty_disk(tmp_path, "other")
    with boot(live, snapshot=True, devices=attached(other)) as machine:
        machine.login()
        machine.command(f"{INIT} --disk /dev/vdb --yes", timeout=5400)
        machine.poweroff()
    with boot(other) as machine:
        machine.login()
        is_well(machine, "debian")
        machine.cut_power()


PHASES = (
    "Making file systems",
    "Unpacking",
    "Configuring the system",
    "Installing ash",
    "Making snapshot 0",
    "Installing the boot loaders",
    "Syncing the disk",
)
LOG = "/var/log/ash-install.log"
INSTALL = f"{INIT} --disk /dev/vdb --yes --rootfs /home/root.tar"


@pytest.mark.parametrize("signal", ["INT", "KILL", "power cut"])
def test_an_interrupted_installation_is_begun_again(live: Disk, boot: Boot, tmp_path: Path, signal: str) -> None:
    """In each phase; after all of them the same command succeeds."""
    other = empty_disk(tmp_path, "other")
    for phases in [[one] for one in PHASES] if signal == "power cut" else [PHASES]:
        with boot(live, snapshot=True, devices=attached(other)) as machine:
            machine.login()
            for phase in phases:
                said(
                    machine,
                    f"rm -f {LOG}; touch {LOG}; {INSTALL} > /run/said 2>&1 < /dev/null & echo $! > /run/pid",
                )
                machine.command(f"until grep -q '== {phase}' {LOG}; do sleep 0.1; done", timeout=900)
                if signal == "power cut":
                    machine.cut_power()
                    continue
                said(
                    machine,
                    f"sleep 0.5; kill -{signal} $(cat /run/pid); while kill -0 $(cat /run/pid); do sleep 0.1; done",
                )
                if signal == "INT":
                    assert "interrupted by SIGINT; /dev/vdb has no complete system" in said(machine, "cat /run/said")
                assert said(machine, "lsblk --noheadings --output MOUNTPOINTS /dev/vdb").strip() == ""
    with boot(live, snapshot=True, devices=attached(other)) as machine:
        machine.login()
        machine.command(INSTALL, timeout=1800)
        machine.poweroff()
    with boot(other) as machine:
        machine.login()
        is_well(machine, "debian")
        machine.cut_power()
