# SPDX-License-Identifier: AGPL-3.0-or-later
"""Installs GRUB for BIOS and UEFI from the new system's own packages; both read the grub.cfg that ash writes.

For UEFI these are the distribution's signed shim and GRUB, which boot with Secure Boot too. The signed GRUB reads
`grub.cfg` from its distribution's directory on the EFI partition: a stub that loads ash's from the btrfs volume.
"""

import re
import shutil
import tempfile
from pathlib import Path

from ash import AshError, BootTools, Layout, machine_chroot, run
from installer.disk import EfiFiles, Target

# Named explicitly: grub-install takes the partition's loop device for a whole disk and would omit part_gpt.
BIOS_MODULES = "part_gpt part_msdos btrfs fat search_fs_uuid search_label"
REMOVABLE = "EFI/BOOT"  # the firmware starts BOOTX64.EFI in there if it knows no entry for the disk
BOOT_DIRECTORY = "mnt"  # where the boot volume is mounted for grub-install

STUB = """\
search.fs_uuid {uuid} root
set prefix=($root)'/{volume}/grub'
configfile $prefix/grub.cfg
"""

SHIM = "usr/lib/shim/shimx64.efi.signed"
MOK_MANAGER = "usr/lib/shim/mmx64.efi.signed"
BOOT_ENTRY = "usr/lib/shim/BOOTX64.CSV"  # names the boot entry that shim's fallback.efi creates
GRUB = "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"


def install(layout: Layout, root: Path, target: Target, device: Path, tools: BootTools) -> None:
    """Make a disk bootable with BIOS, UEFI, or both.

    Args:
        layout: of the new system; GRUB's modules go to its boot volume.
        root: a writable root with the packages of GRUB and shim.
        target: the disk.
        device: the mounted device node of the root partition.
        tools: the boot tools of the distribution.
    """
    if target.bios:
        _install_bios(layout, root, target, device, tools)
    if target.efi:
        _install_uefi(layout, root, target, EfiFiles(target.efi))


def _install_bios(layout: Layout, root: Path, target: Target, device: Path, tools: BootTools) -> None:
    argv = [tools.install, "--target=i386-pc", f"--boot-directory=/{BOOT_DIRECTORY}", f"--modules={BIOS_MODULES}"]
    machine_chroot(root, [*argv, str(target.drive)], binds={layout.boot_volume: BOOT_DIRECTORY, device: str(device)})


def _install_uefi(layout: Layout, root: Path, target: Target, efi: EfiFiles) -> None:
    shutil.copytree(root / "usr/lib/grub/x86_64-efi", layout.boot_volume / "grub/x86_64-efi")
    for name in (SHIM, MOK_MANAGER, BOOT_ENTRY, GRUB):
        if not (root / name).is_file():
            raise AshError(f"the new system has no /{name}", hint="install the packages of the signed GRUB and of shim")
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as stub:
        stub.write(STUB.format(uuid=target.root_uuid, volume=layout.volume_name("@boot")))
        stub.flush()
        programs = {"grubx64.efi": root / GRUB, "mmx64.efi": root / MOK_MANAGER}
        its_own = {"shimx64.efi": root / SHIM, "BOOTX64.CSV": root / BOOT_ENTRY, "grub.cfg": Path(stub.name)}
        efi.add({f"EFI/{layout.distro}/{name}": path for name, path in {**programs, **its_own}.items()})
    if not efi.has(REMOVABLE):  # that of a neighbour stays
        removable = {**programs, "BOOTX64.EFI": root / SHIM}
        efi.add({f"{REMOVABLE}/{name}": path for name, path in removable.items()})


def add_boot_entry(target: Target, label: str, distro: str) -> None:
    """Have this machine's UEFI firmware start the new system first; earlier entries with this label are deleted."""
    assert target.efi
    entry = re.compile(rf"^Boot([0-9A-F]{{4}})\*? {re.escape(label)}(?:\t|$)", re.MULTILINE)
    for number in entry.findall(run(["efibootmgr"]).stdout):
        run(["efibootmgr", "--quiet", "--bootnum", number, "--delete-bootnum"])
    directory = Path("/sys/class/block") / target.efi.resolve().name
    drive = f"/dev/{directory.resolve().parent.name}"  # the root's may be another one
    part = (directory / "partition").read_text().strip()
    where = ["--disk", drive, "--part", part, "--loader", f"\\EFI\\{distro}\\shimx64.efi"]
    run(["efibootmgr", "--quiet", "--create", *where, "--label", label])
