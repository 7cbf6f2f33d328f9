# SPDX-License-Identifier: AGPL-3.0-or-later
"""The disks of this machine: what is on them, and whether a system may be installed there."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ash import MISSING, REFUSED, USAGE, AshError, copies_of_disk, one_line, run
from installer import host
from installer.disk import BIOS_BOOT_TYPE, EFI_SIZE, EFI_TYPE, MIB, SECTOR

# Without NAME, lsblk lists partitions beside their disks, not in them.
COLUMNS = "NAME,PATH,TYPE,SIZE,MODEL,FSTYPE,FSVER,LABEL,UUID,MOUNTPOINTS,RO,PTTYPE,PARTTYPE,PARTUUID"
EFI_TYPES = (EFI_TYPE.lower(), "0xef")  # in a GPT, and in an MBR
# What lsblk calls a device that is made of others.
MADE_OF_OTHERS = {"lvm": "a logical volume", "crypt": "an opened LUKS device", "mpath": "a multipath device"}


@dataclass(frozen=True)
class Device:
    """A block device, as lsblk describes it, with the devices that are on it."""

    path: Path
    kind: str  # "disk", "part", "loop", "lvm", "crypt", "raid1" and others
    size: int  # bytes
    model: str
    filesystem: str
    label: str
    mounted: tuple[str, ...]  # mount points, or "[SWAP]"
    readonly: bool
    uuid: str  # of the file system
    version: str  # of the file system: "FAT32"
    table: str  # of a disk with partitions: "gpt" or "dos"
    purpose: str  # of a partition: its type in the table
    partition_id: str  # of a partition: its id in the table
    inside: tuple["Device", ...]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Self:
        """Parse an object of `lsblk --json`."""
        return cls(
            Path(found["path"]),
            found["type"],
            found["size"],
            (found["model"] or "").strip(),
            found["fstype"] or "",
            found["label"] or "",
            tuple(one for one in found["mountpoints"] if one),
            found["ro"],
            found["uuid"] or "",
            found["fsver"] or "",
            found["pttype"] or "",
            found["parttype"] or "",
            found["partuuid"] or "",
            tuple(cls.of(one) for one in found.get("children", [])),
        )

    def __iter__(self) -> Iterator["Device"]:
        """The device, and all on it."""
        yield self
        for one in self.inside:
            yield from one

    def __str__(self) -> str:
        """The device in a few words, on one line."""
        words = [self.model, self.filesystem, f'"{self.label}"' if self.label else ""]
        return one_line(f"{self.path} ({', '.join([host.gibibytes(self.size), *filter(None, words)])})")

    def use(self) -> str:
        """What this machine uses the device for; empty if it does not."""
        if "[SWAP]" in self.mounted:
            return "used for swapping"
        if self.mounted:
            return f"mounted at {self.mounted[0]}"
        others = [one for one in self.inside if one.kind != "part"]
        return f"a part of {others[0].path}" if others else ""


def devices() -> list[Device]:
    """The disks of this machine, but those of memory."""
    found = run(["lsblk", "--json", "--bytes", "--output", COLUMNS]).stdout
    return [Device.of(one) for one in json.loads(found)["blockdevices"]]


def disks() -> list[Device]:
    """The disks on which a system could be."""
    return [device for device in devices() if device.kind == "disk" and device.size > EFI_SIZE]


def require_disk(path: Path) -> Device:
    """The disk with a path; AshError if it is something else."""
    disk, device = _find(path)
    if device.kind == "part":
        raise AshError(f"{path} is a partition, not a disk", f"its disk is {disk.path}", USAGE)
    return device


def require_free_disk(path: Path, minimum: int) -> Device:
    """The disk with a path, on which nothing is in use.

    Args:
        path: of its node, or of a link to it.
        minimum: how many bytes it must have.

    Raises:
        AshError: there is none, it is not a whole disk, too small, read-only or in use.
    """
    device = require_disk(path)
    require_free(path, device, minimum)
    return device


def require_free_partition(path: Path, minimum: int) -> tuple[Device, Device]:
    """The disk of a partition with a path, and the partition, which is not in use; see require_free_disk()."""
    disk, device = _find(path)
    if device.kind != "part":
        parts = " ".join(str(one.path) for one in disk.inside) or "none"
        raise AshError(f"{path} is a disk, not a partition", f"its partitions: {parts}", USAGE)
    require_free(path, device, minimum)
    return disk, device


def require_efi_partition(path: Path, minimum: int, *, as_it_is: bool) -> Device:
    """An EFI partition with a path, which is not in use; see require_free_disk().

    Args:
        path: of its node.
        minimum: how many bytes it must have.
        as_it_is: its file system is kept.
    """
    _, device = require_free_partition(path, minimum)
    if device.purpose not in EFI_TYPES:
        hint = "set its type to EFI system (GPT) or ef (MBR) with cfdisk"
        raise AshError(f"{path} is not an EFI partition: its type is another one", hint, REFUSED)
    if as_it_is and device.version != "FAT32":
        found = device.version or device.filesystem or "no file system"
        hint = f"mkfs.fat -F 32 {path} makes one, or --mode 1"
        raise AshError(f"{path} has no FAT32 file system, but {found}", hint, REFUSED)
    return device


def require_swap(path: Path, wiped: Iterable[Path]) -> Device:
    """The swap partition with a path, which this machine may be using.

    Args:
        path: of its node.
        wiped: the nodes of the devices that lose what is on them.

    Raises:
        AshError: there is none, it is something else, or it would be wiped.
    """
    _, device = _find(path)
    if device.path in wiped:
        raise AshError(f"{path} cannot be used for swapping: it is wiped", "name another one, or a size", REFUSED)
    if device.filesystem != "swap":
        found = device.filesystem or "no file system"
        hint = "lsblk --fs shows which partitions are"
        raise AshError(f"{path} is not a swap partition: it has {found}", hint, REFUSED)
    require_unique(device)
    return device


def require_unique(device: Device) -> None:
    """Raise AshError (REFUSED) if another device has a file system with the same UUID, as a copied disk has.

    The devices of one btrfs have the same UUID too, but each has one of its own besides.
    """
    if device.filesystem == "btrfs":
        twins = copies_of_disk(device.path)
    else:
        others = [one for disk in devices() for one in disk if one.path != device.path]
        twins = [str(one.path) for one in others if device.uuid and one.uuid == device.uuid]
    if twins:
        what = f"{device.path} and {twins[0]} have file systems with the same UUID: one is a copy"
        raise AshError(what, "detach the copy, or give it another UUID", REFUSED)


def require_room_for_grub(drive: Device) -> None:
    """Raise AshError unless GRUB for the BIOS has a place on a disk besides the boot sector."""
    if drive.table == "gpt" and not any(one.purpose == BIOS_BOOT_TYPE.lower() for one in drive.inside):
        what = f"GRUB for the BIOS has no place on {drive.path}: its partition table is GPT"
        raise AshError(what, "make a BIOS boot partition of 1 MiB with cfdisk", REFUSED)
    if drive.table not in ("gpt", "dos"):
        raise AshError(f"{drive.path} has no partition table", "--disk makes one", REFUSED)
    starts = (int(Path("/sys/class/block", one.path.name, "start").read_text()) * SECTOR for one in drive.inside)
    if drive.table == "dos" and min(starts, default=MIB) < MIB:
        what = f"GRUB for the BIOS has no place on {drive.path}: its first partition begins in the first MiB"
        raise AshError(what, "move it, or use --disk", REFUSED)


def require_free(path: Path, device: Device, minimum: int) -> None:
    """Raise AshError if a disk or partition is too small, read-only or in use; see require_free_disk()."""
    if device.readonly:
        raise AshError(f"{path} is read-only", "has it a switch?", REFUSED)
    if device.size < minimum:
        what = f"{path} has {host.gibibytes(device.size)}, and {host.gibibytes(minimum)} are needed"
        raise AshError(what, "use a larger one", REFUSED)
    if any("/" in one.mounted for one in device):
        raise AshError(f"the running system is on {path}", "use another disk", REFUSED)
    for one in device:
        if use := one.use():
            opened = next((inner.path for inner in one.inside if inner.kind == "crypt" and not inner.use()), None)
            stop = f"cryptsetup close {opened.name} stops that" if opened else "stop that first, or use another disk"
            raise AshError(f"{path} is in use: {one.path} is {use}", stop, REFUSED)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        hint = "lsblk may show by what; or use another disk"
        raise AshError(f"{path} is in use: {error.strerror}", hint, REFUSED) from error


def _find(path: Path) -> tuple[Device, Device]:
    """The disk or partition with a path, after its disk; AshError if it is something else."""
    names = " ".join(str(disk.path) for disk in disks()) or "none"
    if not path.exists():
        raise AshError(f"{path} does not exist", f"disks: {names}", MISSING)
    if not path.is_block_device():
        raise AshError(f"{path} is not a disk", f"disks: {names}; --image makes a file", USAGE)
    node = path.resolve()
    for disk in devices():
        for one in disk:
            if one.path == node and one.kind not in ("disk", "part"):
                what = MADE_OF_OTHERS.get(one.kind, f"a device of the kind {one.kind}")
                raise AshError(f"{path} is {what}, not a disk", f"disks: {names}", USAGE)
            if one.path == node:
                return disk, one
    raise AshError(f"{path} is not a disk", f"disks: {names}", USAGE)
