# SPDX-License-Identifier: AGPL-3.0-or-later
"""Installs GRUB for BIOS and UEFI from the new system's own packages; both read the grub.cfg that ash writes.

For UEFI these are the distribution's signed shim and GRUB, which boot with Secure Boot too. The signed GRUB reads
`grub.cfg` from its distribution's directory on the EFI partition: a stub that loads ash's from the btrfs volume.
"""

import shutil
import tempfile
from pathlib import Path

from ash import AshError, BootTools, Layout, machine_chroot
from installer.disk import Disk, loop_device

# Named explicitly: grub-install takes the partition's loop device for a whole disk and would omit part_gpt.
BIOS_MODULES = "part_gpt btrfs fat search_fs_uuid search_label"
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


def install(layout: Layout, root: Path, disk: Disk, device: Path, tools: BootTools) -> None:
    """Make an image bootable with BIOS and UEFI.

    Args:
        layout: of the new system; GRUB's modules go to its boot volume.
        root: a writable root with the packages of GRUB and shim.
        disk: the image.
        device: the mounted device node of the root partition.
        tools: the boot tools of the distribution.
    """
    _install_bios(layout, root, disk, device, tools)
    _install_uefi(layout, root, disk)


def _install_bios(layout: Layout, root: Path, disk: Disk, device: Path, tools: BootTools) -> None:
    with loop_device(disk.image) as whole:
        machine_chroot(
            root,
            [
                tools.install,
                "--target=i386-pc",
                f"--boot-directory=/{BOOT_DIRECTORY}",
                f"--modules={BIOS_MODULES}",
                str(whole),
            ],
            binds={layout.boot_volume: BOOT_DIRECTORY, device: str(device)},
        )


def _install_uefi(layout: Layout, root: Path, disk: Disk) -> None:
    shutil.copytree(root / "usr/lib/grub/x86_64-efi", layout.boot_volume / "grub/x86_64-efi")
    for name in (SHIM, MOK_MANAGER, BOOT_ENTRY, GRUB):
        if not (root / name).is_file():
            raise AshError(f"the new system has no /{name}", hint="install the packages of the signed GRUB and of shim")
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as stub:
        stub.write(STUB.format(uuid=disk.root_uuid, volume=layout.volume_name("@boot")))
        stub.flush()
        disk.fill_efi(_efi_files(layout.distro, root, Path(stub.name)))


def _efi_files(distro: str, root: Path, stub: Path) -> dict[str, Path]:
    """The files of the EFI partition: the distribution's directory, and EFI/BOOT, which firmware boots by default."""
    programs = {"grubx64.efi": root / GRUB, "mmx64.efi": root / MOK_MANAGER}
    distribution = {**programs, "shimx64.efi": root / SHIM, "BOOTX64.CSV": root / BOOT_ENTRY, "grub.cfg": stub}
    removable = {**programs, "BOOTX64.EFI": root / SHIM}
    return {
        **{f"EFI/{distro}/{name}": path for name, path in distribution.items()},
        **{f"EFI/BOOT/{name}": path for name, path in removable.items()},
    }
