# SPDX-License-Identifier: AGPL-3.0-or-later
"""Installs GRUB for BIOS and UEFI from the new system's own packages; both read the grub.cfg that ash writes.

For UEFI these are the distribution's signed shim and GRUB, which boot with Secure Boot too. Wherever the signed GRUB is
on the EFI partition, it reads `grub.cfg` in one directory, fixed when it is built: a stub that loads ash's from the
btrfs volume. Systems with the same GRUB share that stub; it first looks for one in the directory of the GRUB that runs.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ash import (
    FIRMWARE,
    REFUSED,
    AshError,
    BootTools,
    Firmware,
    Layout,
    add_firmware_entry,
    first_sector,
    load_distro,
    loader_of,
    machine_chroot,
    mount_of,
    partition_id,
    read_distro,
    read_text,
)
from installer import ashos, drives, neighbours
from installer.disk import EfiFiles, Target

# Named explicitly: grub-install takes the partition's loop device for a whole disk and would omit part_gpt.
BIOS_MODULES = "part_gpt part_msdos btrfs fat search_fs_uuid search_label"
# For an encrypted partition GRUB's core image is not that of grub-install, in which one wrong passphrase is the end.
LUKS_MODULES = "biosdisk cryptodisk luks luks2 pbkdf2 gcry_rijndael gcry_sha256 gcry_sha512 normal serial terminal"
CORE = "grub/i386-pc/core.img"  # in the boot volume
CORES = "grub*/i386-pc/core.img"  # there in that of any system, also of one of AshOS
CORE_COMMANDS = "grub/i386-pc/ash.cfg"
REMOVABLE = "EFI/BOOT"  # the firmware starts BOOTX64.EFI in there if it knows no entry for the disk
BOOT_DIRECTORY = "mnt"  # where the boot volume is mounted for grub-install

SHARED_DIRECTORY = "EFI/debian"
SHARED = f"{SHARED_DIRECTORY}/grub.cfg"  # what the signed GRUB of Debian reads
OWN = "ash.cfg"  # beside the GRUB that runs, where that is not the directory of the shared one
# Where the GRUB that runs was loaded from: Debian's says so by another variable than GRUB's own.
FIND_OWN = f"""\
for ash_directory in "$fw_path" "$cmdpath"; do
    if [ -n "$ash_directory" -a -f "$ash_directory/{OWN}" ]; then
        configfile "$ash_directory/{OWN}"
    fi
done
"""
FIND = """\
search.fs_uuid {uuid} root
set prefix=($root)'/{volume}/grub'
"""
START = "configfile $prefix/grub.cfg\n"

SHIM = "usr/lib/shim/shimx64.efi.signed"
MOK_MANAGER = "usr/lib/shim/mmx64.efi.signed"
GRUB = "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"
PROGRAMS = {"grubx64.efi": GRUB, "mmx64.efi": MOK_MANAGER}  # beside shim, whatever shim is called there


# Names the boot entry that shim's fallback.efi makes; UTF-16.
BOOT_ENTRY = "shimx64.efi,{name},,This is the boot entry for {name}\n"


def install(layout: Layout, root: Path, target: Target, device: Path, tools: BootTools, *, name: str) -> None:
    """Make a disk bootable with BIOS, UEFI, or both.

    Args:
        layout: of the new system; GRUB's modules go to its boot volume.
        root: a writable root with the packages of GRUB and shim.
        target: the disk.
        device: the mounted device node of the root partition.
        tools: the boot tools of the distribution.
        name: of the system, for people.
    """
    if target.bios:
        _install_bios(layout, root, target, device, tools)
    if target.efi:
        _install_uefi(layout, root, target, EfiFiles(target.efi), name)


def bios_commands(target: Target, tools: BootTools) -> list[list[str]]:
    """The commands that install GRUB for the BIOS, inside the new system."""
    where = [f"--boot-directory=/{BOOT_DIRECTORY}", f"--modules={BIOS_MODULES}"]
    install, drive = [tools.install, "--target=i386-pc", *where], str(target.drive)
    if not target.luks:
        return [[*install, drive]]
    core, commands = f"/{BOOT_DIRECTORY}/{CORE}", f"/{BOOT_DIRECTORY}/{CORE_COMMANDS}"
    modules = [*BIOS_MODULES.split(), *LUKS_MODULES.split()]
    make = [tools.mkimage, "--format=i386-pc", f"--output={core}", f"--config={commands}", "--prefix=/", *modules]
    setup = [tools.bios_setup, f"--directory=/{BOOT_DIRECTORY}/{Path(CORE).parent}", drive]
    return [[*install, "--no-bootsector", drive], make, setup]


def _install_bios(layout: Layout, root: Path, target: Target, device: Path, tools: BootTools) -> None:
    if target.luks:
        commands = layout.boot_volume / CORE_COMMANDS
        commands.parent.mkdir(parents=True, exist_ok=True)
        commands.write_text(_serial_console(root) + _find(layout, target))
    nodes = {device, Path(mount_of(layout.boot_volume).source)}
    binds = {layout.boot_volume: BOOT_DIRECTORY, **{node: str(node) for node in nodes}}
    for command in bios_commands(target, tools):
        machine_chroot(root, command, binds=binds)


def _serial_console(root: Path) -> str:
    """GRUB's commands for the serial console that a root's settings have; empty if they have none."""
    found = re.search(r'^GRUB_SERIAL_COMMAND="(serial [^"]*)"$', read_text(root / "etc/default/grub"), re.MULTILINE)
    return f"{found[1]}\nterminal_input console serial\nterminal_output console serial\n" if found else ""


def _install_uefi(layout: Layout, root: Path, target: Target, efi: EfiFiles, name: str) -> None:
    modules = layout.boot_volume / "grub/x86_64-efi"
    shutil.copytree(root / "usr/lib/grub/x86_64-efi", modules, dirs_exist_ok=True)
    for program in (SHIM, MOK_MANAGER, GRUB):
        if not (root / program).is_file():
            hint = "install the packages of the signed GRUB and of shim"
            raise AshError(f"the new system has no /{program}", hint)
    directory, start = f"EFI/{layout.distro}", stub(layout, target)
    programs = {name: root / program for name, program in PROGRAMS.items()}
    its_own = {**programs, "shimx64.efi": root / SHIM}
    texts = {f"{directory}/BOOTX64.CSV": BOOT_ENTRY.format(name=name.replace(",", " ")).encode("utf-16")}
    shared, is_shared = efi.read(SHARED), directory == SHARED_DIRECTORY
    if not is_shared:
        texts[f"{directory}/{OWN}"] = start.encode()
    if is_shared or not target.keeps_root or target.alone or not shared:
        texts[SHARED] = f"{FIND_OWN}{start}".encode()
    elif FIND_OWN not in shared:  # of an older ash
        texts[SHARED] = f"{FIND_OWN}{shared}".encode()
    efi.write(texts)  # first: without its own stub, GRUB would start what the shared one names
    efi.add({f"{directory}/{name}": path for name, path in its_own.items()})
    if not efi.has(REMOVABLE):  # that of a neighbour stays
        removable = {**programs, "BOOTX64.EFI": root / SHIM}
        efi.add({f"{REMOVABLE}/{name}": path for name, path in removable.items()})


def stub(layout: Layout, target: Target) -> str:
    """GRUB's commands to open the menu of a system."""
    return _find(layout, target) + START


def _find(layout: Layout, target: Target) -> str:
    """GRUB's commands to open the file system, and to find its own files there."""
    unlock = "".join(f"{command}\n" for command in target.luks.for_grub) if target.luks else ""
    return unlock + FIND.format(uuid=menu_uuid(layout, target), volume=layout.volume_name("@boot"))


def menu_uuid(layout: Layout, target: Target) -> str:
    """The UUID of the file system with a system's menu."""
    return layout.boot_uuid or target.root_uuid


def require_no_neighbour(efi: EfiFiles, ident: str, own: Sequence[str]) -> None:
    """Raise AshError (REFUSED) if a new boot loader would replace that of another system, or has no place beside it.

    Args:
        efi: the EFI partition, which is kept.
        ident: of the new system.
        own: the UUIDs of the file systems whose boot loaders it may replace.
    """
    if efi.has("ash") and not efi.has("ash/."):  # GRUB's notes are in a directory of that name
        hint = "it is the program of a system of AshOS: move it, and the link /usr/bin/ash of that system"
        raise AshError("the EFI partition has a file ash", hint, REFUSED)
    uuids = {one.uuid for disk in drives.devices() for one in disk if one.uuid} - {*own}
    there = {uuid.replace("-", "") for uuid in uuids}  # GRUB has no dashes in that of LUKS
    for path in dict.fromkeys([SHARED, f"EFI/{ident}/{OWN}"]):
        found = re.search(r"^(?:search\.fs_uuid|cryptomount -u) (\S+)", efi.read(path), re.MULTILINE)
        if found and found[1].replace("-", "") in there:
            what = f"{path} on the EFI partition starts another system of this machine, on the file system {found[1]}"
            raise AshError(what, "use an EFI partition of its own, or --mode 1, which wipes this one", REFUSED)


def remove(gone: Layout, others: Sequence[Layout], target: Target, device: Path) -> None:
    """Remove the boot loader of a system; the machine starts one of the others then, if ash manages one of them.

    Args:
        gone: the system's layout; its files are still there.
        others: those of the systems that stay.
        target: the disk.
        device: the mounted device node of the root partition.
    """
    heir = heir_among(others)
    if heir and bios_starts([gone, *others], target) == gone.distro:
        tools = load_distro(read_distro(heir.distro_file)[1]).boot_tools
        with neighbours.writable_copy(heir) as root:
            _install_bios(heir, root, target, device, tools)
    if target.efi:
        if FIRMWARE.is_dir() and not target.image:
            _delete_boot_entries(f"{gone.distro}/", partition_id(target.efi))
        _remove_uefi(gone, heir, target, EfiFiles(target.efi))


def heir_among(others: Sequence[Layout]) -> Layout | None:
    """The first system whose boot loader can be installed; None if there are none but those of AshOS."""
    return next((one for one in others if not one.is_of_ashos), None)


def bios_starts(layouts: Sequence[Layout], target: Target) -> str:
    """The id of the system whose GRUB was installed for the BIOS last: that is the one in the first sectors."""
    if b"GRUB" not in first_sector(target.drive):
        return ""
    images = {image: one.distro for one in layouts for image in one.boot_volume.glob(CORES)}
    return images[max(images, key=lambda image: image.stat().st_mtime)] if images else ""


def _remove_uefi(gone: Layout, heir: Layout | None, target: Target, efi: EfiFiles) -> None:
    directory, shared = f"EFI/{gone.distro}", efi.read(SHARED)
    starts_gone = menu_uuid(gone, target) in shared and f"/{gone.volume_name('@boot')}/" in shared
    if heir and starts_gone:
        efi.write({SHARED: f"{FIND_OWN}{stub(heir, target)}".encode()})
    elif starts_gone:
        _delete_fallback(efi, directory)
        efi.delete(SHARED)
        efi.delete_empty(SHARED_DIRECTORY)
    if directory != SHARED_DIRECTORY:
        efi.delete(directory)
    elif heir:
        for name in (*PROGRAMS, "shimx64.efi", "fbx64.efi", "BOOTX64.CSV"):
            efi.delete(f"{directory}/{name}")
    elif starts_gone or not shared:  # else another system has replaced it
        efi.delete(directory)
    efi.delete(f"ash/{gone.distro}")
    efi.delete_empty("ash")
    if f"\n{gone.distro}," in (boot_numbers := efi.read(ashos.MAP)):
        efi.write({ashos.MAP: ashos.without(boot_numbers, gone.distro).encode()})


def _delete_fallback(efi: EfiFiles, directory: str) -> None:
    """Delete what the firmware starts without an entry, if all of it is a copy of a system's own boot loader."""
    copies = {f"{REMOVABLE}/{name}": f"{directory}/{name}" for name in PROGRAMS}
    copies[f"{REMOVABLE}/BOOTX64.EFI"] = f"{directory}/shimx64.efi"
    there = [copy for copy in copies if efi.has(copy)]  # an interrupted removal has deleted some
    if all(efi.are_same(copy, copies[copy]) for copy in there):
        for copy in there:
            efi.delete(copy)
        efi.delete_empty(REMOVABLE)


def add_boot_entry(target: Target, label: str, distro: str) -> None:
    """Have this machine's UEFI firmware start the new system first; its earlier entries are deleted.

    So are those of systems with that id whose partition is not there any more.
    """
    assert target.efi
    there = [one.partition_id for disk in drives.devices() for one in disk if one.partition_id]
    _delete_boot_entries(loader_of(distro), partition_id(target.efi), there)
    add_firmware_entry(target.efi, distro, label)


def after_removal(firmware: Firmware, ident: str, partition: str) -> str:
    """What UEFI firmware starts when the entries of a system on an EFI partition with an id are deleted."""
    labels = {one.number: one.label for one in firmware.entries if not one.starts(f"{ident}/", partition)}
    first = next((labels[number] for number in firmware.order if number in labels), None)
    return f"the firmware starts {first} first from then on" if first else "the firmware has no entry then"


def _delete_boot_entries(path: str, partition: str, there: Sequence[str] = ()) -> None:
    """Delete the firmware's entries for a path below EFI/ on a partition, or if `there` is given, on none of these."""
    firmware = Firmware()
    for entry in list(firmware.entries):
        is_left_over = there and "HD(" in entry.where and not any(map(entry.is_on, there))
        if entry.starts(path, "" if is_left_over else partition):
            firmware.delete(entry)
