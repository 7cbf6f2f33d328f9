# SPDX-License-Identifier: AGPL-3.0-or-later
"""GRUB for BIOS and for UEFI, both from the new system's own packages; both read the grub.cfg that ash writes.

For UEFI these are the distribution's signed shim and GRUB, so that they start under Secure Boot. The signed GRUB looks
for `grub.cfg` in its distribution's directory on the EFI partition: that is a stub which goes on to the btrfs volume.
"""

import shutil
import tempfile
from pathlib import Path

from ash import AshError, Layout, machine_chroot
from installer.disk import Disk, loop_device

# Named, since GRUB sees the partition as a disk of its own, and would leave out what finds it on a whole one.
BIOS_MODULES = "part_gpt btrfs fat search_fs_uuid search_label"
BOOT_FOLDER = "mnt"  # where the boot volume is while GRUB installs itself

STUB = """\
search.fs_uuid {uuid} root
set prefix=($root)'/{volume}/grub'
configfile $prefix/grub.cfg
"""

SHIM = "usr/lib/shim/shimx64.efi.signed"
MOK_MANAGER = "usr/lib/shim/mmx64.efi.signed"
BOOT_ENTRY = "usr/lib/shim/BOOTX64.CSV"  # names the boot entry that shim's fallback makes
GRUB = "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"


def install(layout: Layout, root: Path, disk: Disk, device: Path) -> None:
    """Make an image bootable by BIOS and by UEFI.

    Args:
        layout: of the new system; its boot volume takes GRUB's modules.
        root: a writable root with GRUB's and shim's packages.
        disk: the image.
        device: the node of the root partition, as it is mounted.
    """
    _install_bios(layout, root, disk, device)
    _install_uefi(layout, root, disk)


def _install_bios(layout: Layout, root: Path, disk: Disk, device: Path) -> None:
    with loop_device(disk.image) as whole:
        machine_chroot(
            root,
            [
                "grub-install",
                "--target=i386-pc",
                f"--boot-directory=/{BOOT_FOLDER}",
                f"--modules={BIOS_MODULES}",
                str(whole),
            ],
            binds={layout.boot_volume: BOOT_FOLDER, device: str(device)},
        )


def _install_uefi(layout: Layout, root: Path, disk: Disk) -> None:
    shutil.copytree(root / "usr/lib/grub/x86_64-efi", layout.boot_volume / "grub/x86_64-efi")
    for name in (SHIM, MOK_MANAGER, BOOT_ENTRY, GRUB):
        if not (root / name).is_file():
            raise AshError(f"the new system has no /{name}", hint="its signed GRUB and shim are needed")
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as stub:
        stub.write(STUB.format(uuid=disk.root_uuid, volume=layout.volume_name("@boot")))
        stub.flush()
        disk.fill_efi(_efi_files(layout.distro, root, Path(stub.name)))


def _efi_files(distro: str, root: Path, stub: Path) -> dict[str, Path]:
    """What goes onto the EFI partition: the distribution's directory, and the one that firmware looks for by itself."""
    programs = {"grubx64.efi": root / GRUB, "mmx64.efi": root / MOK_MANAGER}
    distribution = {**programs, "shimx64.efi": root / SHIM, "BOOTX64.CSV": root / BOOT_ENTRY, "grub.cfg": stub}
    removable = {**programs, "BOOTX64.EFI": root / SHIM}
    return {
        **{f"EFI/{distro}/{name}": path for name, path in distribution.items()},
        **{f"EFI/BOOT/{name}": path for name, path in removable.items()},
    }
