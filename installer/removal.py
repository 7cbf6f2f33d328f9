# SPDX-License-Identifier: AGPL-3.0-or-later
"""Removes one of the systems on a file system: its subvolumes, its files on the EFI partition, its boot entries."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ash import FIRMWARE, MISSING, REFUSED, AshError, Layout, private_mounts, read_text, run, step
from installer import bootloader, disk, drives, host, neighbours
from installer.install import Agree, Loss


def remove(path: Path, ident: str, agree: Agree, *, even_last: bool = False) -> None:
    """Remove a system. If that is interrupted, the same command goes on.

    Args:
        path: of the root's partition, or of a disk image.
        ident: of the system.
        agree: is asked after all checks, with the id as the name; see Agree.
        even_last: also if it is the only one there.

    Raises:
        AshError: a check failed, before anything was written; or the removal failed.
    """
    host.require_root("remove a system")
    host.require_btrfs()
    host.require({**host.DISK, **(host.UEFI if FIRMWARE.is_dir() else {})})
    with _target(path, ident) as target:
        with disk.mounted_readonly(target.root) as top:
            losses = _check(path, ident, Layout.all_on(top), target, even_last=even_last)
        agree(ident, losses, [])
        private_mounts()
        with ExitStack() as stack:
            top, device = target.attach(stack)
            layouts = Layout.all_on(top)
            gone = next(one for one in layouts if one.distro == ident)
            others = [one for one in layouts if one is not gone and one.is_complete]
            with step("Removing the boot loader"):
                bootloader.remove(gone, others, target, device)
            with step(f"Deleting the files of {ident}"):
                neighbours.delete(gone)
                run(["umount", top])


@contextmanager
def _target(path: Path, ident: str) -> Iterator[disk.Target]:
    """The target in an image, or on the disk of a partition that is not in use."""
    if path.is_file():
        with disk.target_of(path) as target:
            yield target
        return
    its_disk, root = drives.require_free_partition(path, 0)
    if root.filesystem != "btrfs":
        raise AshError(f"{path} has no btrfs file system", "lsblk --fs shows which partition has one", REFUSED)
    target = disk.Target(its_disk.path, root.path, None, root_uuid=root.uuid, keeps_root=True, keeps_efi=True)
    with disk.mounted_readonly(target.root) as top:
        uuid = read_text(Layout.at(top, ident).efi).strip()
    efi = next((one for device in drives.devices() for one in device if uuid and one.uuid == uuid), None)
    if efi:
        efi = drives.require_efi_partition(efi.path, 0, as_it_is=True)
        target = replace(target, efi=efi.path, efi_uuid=uuid)
    yield target


def _check(path: Path, ident: str, there: Sequence[Layout], target: disk.Target, *, even_last: bool) -> list[Loss]:
    """What is lost; AshError if there is no such system, or it is the last one."""
    names = [one.distro for one in there]
    if ident not in names:
        raise AshError(f"there is no system {ident} on {path}", f"there are: {', '.join(names) or 'none'}", MISSING)
    others = [one.distro for one in there if one.distro != ident and one.is_complete]
    if not others and not even_last:
        raise AshError(f"{ident} is the last system on {path}", "--last removes it all the same", REFUSED)
    gone = next(one for one in there if one.distro == ident)
    snapshots = len([*(gone.snapshots / "rootfs").glob("snapshot-[0-9]*")])
    losses = [Loss(str(path), f"{ident} is deleted: {snapshots} snapshots, /var, and all files of people in /home")]
    losses.append(Loss(str(path), f"{', '.join(others)} stay as they are" if others else "no system is left"))
    if target.efi:
        losses.append(Loss(str(target.efi), f"EFI/{ident} and ash/{ident} are deleted"))
    return losses
