# SPDX-License-Identifier: AGPL-3.0-or-later
"""A live system installs onto disks of all kinds, with all kinds of choices; each then starts alone."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from installer.machine import DISK_HARDWARE, Machine, MachineError
from tests.boot.checks import runs_snapshot, said
from tests.boot.conftest import Boot
from tests.boot.live import INIT, attached, empty_disk, installs, is_well, make_live, small_root, unlock
from tests.support import Disk, program

pytestmark = [pytest.mark.boot, pytest.mark.budget(7200)]

PASSPHRASE = "correct horse 7!"
MBR = "parted --script {disk} mklabel msdos mkpart primary 1MiB 100%"
GPT_EFI = (
    "parted --script {disk} mklabel gpt mkpart efi fat32 1MiB 100MiB set 1 esp on mkpart root 100MiB 100%"
    " && mkfs.vfat -F 32 {disk}1"
)


class Variant(NamedTuple):
    """An installation. In what is given to the live system, `{disk}` is the other disk.

    Args:
        options: of the installer.
        firmware: "BIOS", "UEFI" or "Secure Boot"; a live system of each installs all of its variants.
        hardware: what the other disk is, for QEMU.
        prepare: a command of the live system, before the installation.
        user: who logs in on the new system.
        check: a command of the new system.
        shows: what that prints.
    """

    options: str
    firmware: str = "BIOS"
    hardware: str = DISK_HARDWARE
    prepare: str = "true"
    user: str = "root"
    check: str = "true"
    shows: str = ""

    @property
    def is_encrypted(self) -> bool:
        """Whether GRUB asks for a passphrase."""
        return "--luks" in self.options


UEFI, WHOLE = "UEFI", "--disk {disk}"
LUKS = "--luks-passphrase-file /run/passphrase"
COMPRESSION = "btrfs property get / compression"
VARIANTS = {
    "BIOS, GPT": Variant(WHOLE),
    "BIOS, MBR": Variant("{disk}1 {disk}", prepare=MBR),
    "BIOS, GPT, LUKS": Variant(f"{WHOLE} {LUKS}"),
    "BIOS, MBR, LUKS": Variant(f"{{disk}}1 {{disk}} {LUKS}", prepare=MBR),
    "UEFI": Variant(WHOLE, UEFI),
    "UEFI, an EFI partition that is kept": Variant("{disk}2 {disk} {disk}1 --mode 2", UEFI, prepare=GPT_EFI),
    "UEFI, LUKS, a swap file": Variant(
        f"{WHOLE} {LUKS} --swap 64M --discard",
        UEFI,
        check="swapon --show=NAME --noheadings",
        shows="/swap/swapfile",
    ),
    "Secure Boot": Variant(WHOLE, "Secure Boot", check="dmesg | grep -c 'locked down'", shows="1"),
    "partitions for /boot and /home": Variant(
        f"{WHOLE} --boot-size 512M --home-size 300M --user ada --password-file /run/passphrase --compress none",
        user="ada",
        check="findmnt --noheadings --output SOURCE,OPTIONS /home | grep -v compress && ls /home",
        shows="ada",
    ),
    "UEFI, a partition for /boot": Variant(
        f"{WHOLE} --boot-size 512M", UEFI, check="ash clone 0 && ash deploy 1 && ash fsck", shows="no problems found"
    ),
    "NVMe": Variant(WHOLE, UEFI, hardware="nvme,serial=ash"),
    "4 KiB sectors": Variant(
        WHOLE,
        UEFI,
        hardware=f"{DISK_HARDWARE},logical_block_size=4096,physical_block_size=4096",
        check="cat /sys/block/vda/queue/logical_block_size",
        shows="4096",
    ),
    "old LVM": Variant(WHOLE, prepare="pvcreate {disk} && vgcreate old {disk} && vgchange --activate n old"),
    "old RAID": Variant(
        WHOLE,
        prepare="mdadm --create /dev/md7 --run --level=1 --raid-devices=2 {disk} missing && mdadm --stop /dev/md7",
    ),
    "lzo": Variant(f"{WHOLE} --compress lzo", UEFI, check=COMPRESSION, shows="lzo"),
    "zlib, zram": Variant(
        f"{WHOLE} --compress zlib --swap zram",
        check=f"{COMPRESSION} && swapon --show=NAME --noheadings",
        shows="zlib\n/dev/zram0",
    ),
    "a profile, from the network": Variant(
        f"{WHOLE} --profile server", check="ash current; systemctl is-active ssh", shows="1\nactive"
    ),
}


def modes(firmware: str) -> dict[str, Any]:
    """How a machine with this firmware is started."""
    return {"uefi": firmware == UEFI, "secure": firmware == "Secure Boot"}


@pytest.fixture(scope="module")
def live(image: Path, rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """The disk of the live system."""
    directory = tmp_path_factory.mktemp("live")
    root, made = directory / "root.tar", directory / "live.img"
    small_root(rootfs, root, "cryptsetup-initramfs", "systemd-zram-generator")
    program("cp", "--sparse=always", "--reflink=auto", image, made)
    make_live(Disk(made), root)
    root.unlink()
    return Disk(made)


@pytest.fixture(scope="module")
def installed(
    live: Disk, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Mapping[str, Disk]]:
    """Installs all selected variants of a firmware, each on its disk; returns those on which that succeeded."""
    items = (item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec"))
    selected = {item.callspec.params.get("name") for item in items}

    @functools.cache
    def install(firmware: str) -> Mapping[str, Disk]:
        directory, done, devices = tmp_path_factory.mktemp("installed"), dict[str, Disk](), []
        variants = {name: one for name, one in VARIANTS.items() if one.firmware == firmware and name in selected}
        disks = {name: empty_disk(directory, str(number)) for number, name in enumerate(variants)}
        for number, (name, variant) in enumerate(variants.items()):
            devices += ["-drive", f"file={disks[name].image},format=raw,if=none,id=other{number},cache=unsafe"]
            devices += ["-device", f"{variant.hardware},drive=other{number}"]
        letters = iter("bcdefghijklmnop")
        log = directory / "console.log"
        with Machine(live.image, log=log, snapshot=True, devices=devices, **modes(firmware)) as machine:
            machine.login()
            said(machine, f"echo '{PASSPHRASE}' > /run/passphrase")
            for name, variant in variants.items():
                disk = "/dev/nvme0n1" if variant.hardware.startswith("nvme") else f"/dev/vd{next(letters)}"
                try:
                    said(machine, variant.prepare.format(disk=disk))
                    print(installs(machine, f"{variant.options.format(disk=disk)} --yes --hostname installed"))
                    done[name] = disks[name]
                except MachineError as error:
                    print(f"{name}: {error}")
            machine.poweroff()
        return done

    return install


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_installed_starts_alone(installed: Callable[[str], Mapping[str, Disk]], boot: Boot, name: str) -> None:
    variant = VARIANTS[name]
    other = installed(variant.firmware)[name]
    with boot(other, hardware=variant.hardware, **modes(variant.firmware)) as machine:
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
    other.image.unlink()


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
