# SPDX-License-Identifier: AGPL-3.0-or-later
"""Systems that are on a disk already: shows them, repairs their boot loaders, removes one of several."""

import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ash import (
    BASE,
    FIRMWARE,
    MISSING,
    REFUSED,
    USAGE,
    AshError,
    Firmware,
    Layout,
    bind,
    load_distro,
    mount_boot_partition,
    os_release,
    partition_id,
    private_mounts,
    read_distro,
    remove_tree,
    run,
    step,
    sync_filesystem,
)
from installer import ashos, bootloader, disk, drives, host, luks, neighbours
from installer.install import Agree, Loss


class Place(NamedTuple):
    """Where systems are.

    Args:
        path: of the root's partition, or of a disk image.
        passphrase: opens the partition if it is encrypted.
    """

    path: Path
    passphrase: str | None = None


def rescue(place: Place) -> None:
    """Show the systems on a disk, their trees, and what can be done.

    Args:
        place: where they are.

    Raises:
        AshError: there is none, or it cannot be read.
    """
    host.require_root("look at a disk")
    host.require_btrfs()
    with _target(place) as target, disk.mounted_readonly(target.root) as top:
        there = ashos.all_on(top)
        if not there:
            hint = "lsblk --fs shows which partitions have btrfs"
            raise AshError(f"there is no system of ash on {place.path}", hint, MISSING)
        for layout in there:
            marks = [] if layout.is_complete else ["not complete"]
            if layout.is_of_ashos:
                print(", ".join([f"{layout.distro}: {ashos.name(layout)}, of AshOS: `ash` cannot work on it", *marks]))
                print(ashos.draw(layout))
                continue
            name = os_release(layout.rootfs(BASE), "PRETTY_NAME") or "without a name"
            print(", ".join([f"{layout.distro}: {name}", *marks]))
            if layout.is_complete:
                print(_ash(layout, top, "tree"))
    words = f"init.py rescue {shlex.quote(str(place.path))}{' --luks' if place.passphrase else ''}"
    print(f"{words} --boot-loader ID  installs its boot loader anew")
    print(f"{words} --shell           opens a shell, in which `ash` works on it")


def _ash(layout: Layout, top: Path, *words: str) -> str:
    """The output of a system's own ash; what is wrong with it, if it fails."""
    done = run(["sh", layout.executable, "--root", top, "--distro", layout.distro, *words], check=False)
    return (done.stdout if done.returncode == 0 else done.stderr).rstrip()


def repair_boot_loader(place: Place, ident: str) -> None:
    """Install the boot loader of a system anew, from its snapshot 0: for the BIOS or for UEFI, as this machine runs.

    Args:
        place: where it is; an image gets both.
        ident: of the system.

    Raises:
        AshError: there is no such system, its EFI partition is missing, or the installation failed.
    """
    host.require_root("install a boot loader")
    host.require_btrfs()
    host.require(host.disk_tools())
    with _target(place, ident) as target, ExitStack() as stack:
        if FIRMWARE.is_dir() and not target.image and not target.efi:
            what = f"this machine was started with UEFI, and the EFI partition of {ident} is missing"
            raise AshError(what, "attach its disk, or start the live medium with BIOS", MISSING)
        private_mounts()
        top, device = target.attach(stack)
        layout = _require(ashos.all_on(top), ident, place.path)
        if layout.is_of_ashos:
            what = f"{ident} is a system of AshOS: only itself can install its boot loader"
            raise AshError(what, "start it, and run grub-install there", REFUSED)
        if not (layout.is_complete or neighbours.lacks_loader(layout)):
            hint = "install it again with the same command, or remove it: init.py remove"
            raise AshError(f"{ident} is not complete: it could not be started", hint, REFUSED)
        mount_boot_partition(layout, target.image)
        tools = load_distro(read_distro(layout.distro_file)[1]).boot_tools
        name = os_release(layout.rootfs(BASE), "NAME") or ident
        with neighbours.nobody_deploys(Layout.all_on(top)), step(f"Installing the boot loader of {ident}"):
            with neighbours.writable_copy(layout) as root:
                bootloader.install(layout, root, target, device, tools, name=name)
            if neighbours.lacks_loader(layout):
                neighbours.finish(layout)
        if FIRMWARE.is_dir() and not target.image:
            bootloader.add_boot_entry(target, f"{name} (ash)", ident)
        sync_filesystem(top)
        sync_filesystem(layout.boot_volume)
        run(["umount", "--recursive", top])


def open_shell(place: Place) -> int:
    """Open a shell in which `ash` works on the system of a disk. Returns its exit status."""
    host.require_root("change a disk")
    host.require_btrfs()
    with _target(place) as target, ExitStack() as stack:
        private_mounts()
        top, _ = target.attach(stack)
        layouts = [one for one in Layout.all_on(top) if one.is_complete and not one.is_of_ashos]
        if not layouts:
            raise AshError(f"there is no complete system of ash on {place.path}", "", MISSING)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ash-rescue-")))
        mounted, start = directory / "disk", directory / "start"
        mounted.mkdir()
        start.write_text(_shell_start(mounted, [one.distro for one in layouts]))
        bind(top, mounted)  # each ash has a PRIVATE for itself
        try:
            return subprocess.run(["bash", "--rcfile", start, "-i"], check=False).returncode
        finally:
            run(["umount", mounted, top])


def _shell_start(place: Path, idents: Sequence[str]) -> str:
    """Commands of bash that define `ash`, and say what it does."""
    several = "; --distro ID selects one of them" if len(idents) > 1 else ""
    words = f"The disk is mounted at {place}. `ash` works on {' and '.join(idents)} there{several}. `exit` leaves."
    ash = [str(Layout.at(place, idents[0]).executable), "--root", str(place)]
    return f'ash() {{ sh {shlex.join(ash)} "$@"; }}\necho {shlex.quote(words)}\n'


def remove(place: Place, ident: str, agree: Agree, *, even_last: bool = False) -> None:
    """Remove a system. If that is interrupted, the same command goes on.

    Args:
        place: where it is.
        ident: of the system.
        agree: is asked after all checks, with the id as the name; see Agree.
        even_last: also if it is the only one there.

    Raises:
        AshError: a check failed, before anything was written; or the removal failed.
    """
    host.require_root("remove a system")
    host.require_btrfs()
    host.require(host.disk_tools())
    with _target(place, ident) as target:
        with disk.mounted_readonly(target.root) as top:
            there = _with_boot_partitions(top, target)
            losses = _check(place.path, ident, there, target, even_last=even_last)
        agree(ident, losses, [])
        private_mounts()
        with ExitStack() as stack:
            top, device = target.attach(stack)
            layouts = _with_boot_partitions(top, target)
            gone = _require(layouts, ident, place.path)
            others = [one for one in layouts if one is not gone and one.is_complete]
            with neighbours.nobody_deploys(layouts):
                with step("Removing the boot loader"), neighbours.begun_to_remove(gone):
                    bootloader.remove(gone, others, target, device)
                with step(f"Deleting the files of {ident}"):
                    if gone.boot_uuid:  # the partition itself stays
                        for path in gone.boot_volume.iterdir():
                            remove_tree(path)
                        run(["umount", gone.boot_volume])
                    neighbours.delete(gone)
            run(["umount", "--recursive", top])


def _with_boot_partitions(top: Path, target: disk.Target) -> list[Layout]:
    """The systems on a target whose top level is mounted; their partitions for /boot are mounted too."""
    there = ashos.all_on(top)
    for layout in there:
        mount_boot_partition(layout, target.image)
    return there


@contextmanager
def _target(place: Place, ident: str = "") -> Iterator[disk.Target]:
    """The target in an image, or on the disk of a partition that is not in use, with the EFI partition of a system."""
    if place.path.is_file():
        with disk.target_of(place.path) as target:
            yield target
        return
    its_disk, root = drives.require_free_partition(place.path, 0)
    if root.filesystem not in ("btrfs", luks.FILE_SYSTEM):
        raise AshError(f"{place.path} has no btrfs file system", "lsblk --fs shows which partition has one", REFUSED)
    target = disk.Target(
        its_disk.path,
        root.path,
        None,
        root_uuid=root.uuid,
        keeps_root=True,
        keeps_efi=True,
        bios=not FIRMWARE.is_dir(),
    )
    with ExitStack() as stack:
        if place.passphrase and root.filesystem != luks.FILE_SYSTEM:
            raise AshError(f"{place.path} is not encrypted", "leave --luks out", USAGE)
        if root.filesystem == luks.FILE_SYSTEM:
            target = stack.enter_context(disk.unlocked_target(target, place.passphrase))
        with disk.mounted_readonly(target.root) as top:
            uuid = next((ashos.efi_uuid(one) for one in ashos.all_on(top) if one.distro == ident), "")
        if efi := next((one for device in drives.devices() for one in device if uuid and one.uuid == uuid), None):
            drives.require_unique(efi)
            efi = drives.require_efi_partition(efi.path, 0, as_it_is=True)
            target = replace(target, efi=efi.path, efi_uuid=uuid)
        yield target


def _require(there: Sequence[Layout], ident: str, path: Path) -> Layout:
    """The layout of a system; AshError if it is not there."""
    found = [one for one in there if one.distro == ident]
    if not found:
        names = ", ".join(one.distro for one in there) or "none"
        raise AshError(f"there is no system {ident} on {path}", f"there are: {names}", MISSING)
    if len(found) > 1:  # one with a suffix, one of AshOS without
        raise AshError(f"there are two systems {ident} on {path}", "delete one with btrfs subvolume delete", REFUSED)
    return found[0]


def _check(path: Path, ident: str, there: Sequence[Layout], target: disk.Target, *, even_last: bool) -> list[Loss]:
    """What is lost; AshError if there is no such system, or no other one could be started then."""
    gone = _require(there, ident, path)
    others = [one for one in there if one is not gone and one.is_complete]
    if not others and not even_last:
        raise AshError(f"{ident} is the last system on {path}", "--last removes it all the same", REFUSED)
    snapshots = len([*(gone.snapshots / "rootfs").glob("snapshot-[0-9]*")])
    number = "1 snapshot" if snapshots == 1 else f"{snapshots} snapshots"
    losses = [Loss(str(path), f"{ident} is deleted: {number}, /var, and all files of people in /home")]
    losses.append(Loss(str(path), f"what stays: {', '.join(one.distro for one in others) or 'no system'}"))
    if others and bootloader.bios_starts(there, target) == ident:
        losses.append(Loss(str(path), _heir_of_bios(ident, others, even_last=even_last)))
    if others and target.efi and FIRMWARE.is_dir() and not target.image:
        losses.append(Loss(str(path), bootloader.after_removal(Firmware(), ident, partition_id(target.efi))))
    if target.efi:
        where = f"the EFI partition of {path}" if target.image else str(target.efi)
        losses.append(Loss(where, f"EFI/{ident} and ash/{ident} are deleted"))
        if not others:
            losses.append(Loss(where, "so is EFI/BOOT, if it starts that system"))
    return losses


def _heir_of_bios(ident: str, others: Sequence[Layout], *, even_last: bool) -> str:
    """What the BIOS starts then; AshError if that is nothing, as AshOS's boot loaders cannot be installed."""
    if heir := bootloader.heir_among(others):
        return f"the BIOS starts {heir.distro} from then on"
    if not even_last:
        what = f"the BIOS starts {ident}, and only AshOS itself can install the boot loader of {others[0].distro}"
        raise AshError(what, f"start {others[0].distro} and run grub-install there first, or use --last", REFUSED)
    return "the BIOS starts nothing from then on"
