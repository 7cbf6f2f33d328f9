# SPDX-License-Identifier: AGPL-3.0-or-later
"""Systems of AshOS on a disk: ours is added beside them, they are shown, and one of them is removed.

Their files are those that its installer and its first commands leave. Nothing in them can be run.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from ash import AshError
from installer.bootloader import require_no_neighbour
from installer.disk import EfiFiles, Sizes, loop_device, target_in
from tests.support import MISSING, REFUSED, program
from tests.system.test_neighbours import Pair, others_in_menu

pytestmark = [pytest.mark.system, pytest.mark.budget(120)]

SIZE = 5 << 30
TREE = "{'name': 'root', 'children': [{'name': '0', 'children': [{'name': '1'}]}, {'name': '12'}]}\n"
SHOWN = ["0 - base snapshot", "  1 - first try", "12 - "]
MAP = "DISTRO,BootOrder\narch,0002\n0005\nfedora,0003\n"


def make_ashos(top: Path, ident: str, suffix: str, uuids: tuple[str, str]) -> None:
    """Make the subvolumes and state files of a system of AshOS; uuids: of the file system, and of the EFI partition."""
    subvolume = ["btrfs", "subvolume"]
    for name in (".snapshots", "boot", "etc", "home", "var"):
        program(*subvolume, "create", top / f"@{name}{suffix}")
    snapshots, boot = top / f"@.snapshots{suffix}", top / f"@boot{suffix}"
    for name in ("ash/root", "ash/tmp", "ash/snapshots", "boot", "etc", "root", "rootfs", "tmp"):
        (snapshots / name).mkdir(parents=True)
    files = {
        "ash/ash": "#!/usr/bin/python3\n",
        "ash/detect_os.py": "",
        "ash/fstree": TREE,
        "ash/part": f"{uuids[0]}\n",
        "ash/snapshots/1-desc": "first try\n",
        "ash/upstate": "0 2023-12-19",
    }
    for name, text in files.items():
        (snapshots / name).write_text(text)
    for kind in ("boot", "etc"):
        program(*subvolume, "create", snapshots / f"{kind}/{kind}-deploy")
    root, etc = snapshots / "rootfs/snapshot-deploy", snapshots / "etc/etc-deploy"
    program(*subvolume, "create", root)
    for name in ("etc", "usr/share/ash", "var", "home"):
        (root / name).mkdir(parents=True)
    for number in ("0", "1", "12"):  # whose /etc is empty: it was another subvolume
        program(*subvolume, "snapshot", "-r", root, root.with_name(f"snapshot-{number}"))
        for kind in ("boot", "etc"):
            at = snapshots / kind / kind
            program(*subvolume, "snapshot", "-r", f"{at}-deploy", f"{at}-{number}")
    fstab = (
        f'UUID="{uuids[0]}" / btrfs subvol=@.snapshots{suffix}/rootfs/snapshot-deploy,compress=zstd,noatime,ro 0 0\n'
    )
    fstab += f'UUID="{uuids[1]}" /boot/efi vfat umask=0077 0 2\n/.snapshots/ash/root /root none bind 0 0\n'
    release = f'NAME="{ident.title()} Linux"\nPRETTY_NAME="{ident.title()} Linux"\nID={ident}_ashos\n'
    for directory in (etc, root / "etc"):
        (directory / "fstab").write_text(fstab)
        (directory / "os-release").write_text(release)
    (root / "usr/share/ash/snap").write_text("0\n")
    grub = boot / ("grub2" if ident == "fedora" else "grub")
    (grub / "i386-pc").mkdir(parents=True)
    (grub / "i386-pc/core.img").write_bytes(b"core")
    (grub / "grub.cfg").write_text(f"# the menu of {ident}\n")
    program(*subvolume, "set-default", root)


class AshosDisk(Pair):
    """A disk with systems of AshOS, and with those that the installer adds."""

    def __init__(self, image: Path, rootfs: Path) -> None:
        super().__init__(image, rootfs)
        with image.open("wb") as file:
            file.truncate(SIZE)
        with target_in(image, Sizes()) as target:
            target.format()
            self.uuids = (target.root_uuid, target.efi_uuid)
        self.efi("mmd", "::EFI")

    def add_ashos(self, ident: str, suffix: str) -> None:
        with self.files() as files:
            make_ashos(files.top, ident, suffix, self.uuids)
        self.efi("mmd", f"::EFI/{ident}")
        self.write_efi(f"EFI/{ident}/grubx64.efi", f"GRUB of {ident}")
        self.write_efi("EFI/map.txt", MAP)

    def write_efi(self, path: str, text: str) -> None:
        file = self.image.with_name("file")
        file.write_text(text)
        program("mcopy", "-o", "-i", self.drive, file, f"::{path}")

    def generations(self, suffix: str) -> Mapping[str, str]:
        """The subvolumes of a system with the generation in which each was changed last."""
        with self.files() as files:
            found = program("btrfs", "subvolume", "list", files.top)
        listed = re.findall(r"^ID \d+ gen (\d+) .* path (.*)$", found, re.MULTILINE)
        return {path: generation for generation, path in listed if re.match(rf"@\.?[a-z]*{suffix}(/|$)", path)}

    @contextmanager
    def unchanged(self, *suffixes: str) -> Iterator[None]:
        """Assert that the block changes nothing in the subvolumes of some systems."""
        before = [self.generations(suffix) for suffix in suffixes]
        assert all(before)
        yield
        assert [self.generations(suffix) for suffix in suffixes] == before


@pytest.fixture
def ashos(tmp_path: Path, rootfs: Path) -> AshosDisk:
    return AshosDisk(tmp_path / "disk.img", rootfs)


def test_ours_is_added_beside_several_systems(ashos: AshosDisk, tmp_path: Path) -> None:
    for ident in ("arch", "debian", "fedora"):
        ashos.add_ashos(ident, f"_{ident}")
    with ashos.unchanged("_arch", "_debian", "_fedora"):
        assert "there is a system debian on this file system" in ashos.add("debian", status=REFUSED).stderr
        ashos.add("debian_2")
    assert ashos.ash("fsck").stdout.strip() == "no problems found", "it is the only one that ash manages"
    assert ashos.ash("dist").stdout.split() == ["arch", "debian", "debian_2", "fedora"]
    assert sorted(others_in_menu(ashos, "debian_2", tmp_path)) == ["arch", "debian", "fedora"]
    assert "GRUB of debian" in ashos.efi("mtype", "::EFI/debian/grubx64.efi")

    shown = ashos.init("rescue", ashos.image).stdout
    assert "debian_2: Debian GNU/Linux" in shown
    assert "arch: Arch Linux, of AshOS: `ash` cannot work on it\n" + "\n".join(SHOWN) in shown
    said = ashos.init("rescue", ashos.image, "--boot-loader", "arch", status=REFUSED).stderr
    assert "only itself can install its boot loader" in said

    before = ashos.loaders()[0]
    with ashos.image.open("rb+") as image:
        image.seek(1 << 20)
        image.write(bytes(1 << 20))  # GRUB's core image, as if that of arch were there
    with ashos.files() as files:
        (files.top / "@boot_arch/grub/i386-pc/core.img").touch()
    with ashos.unchanged("_debian", "_fedora"):
        ashos.remove("arch")
        assert ashos.generations("_arch") == {}
    assert ashos.loaders()[0] == before, "the BIOS starts ours then"
    assert "arch" not in ashos.efi("mdir", "-b", "-/", "::")
    assert ashos.efi("mtype", "::EFI/map.txt") == "DISTRO,BootOrder\nfedora,0003\n"
    with ashos.unchanged("_fedora"):
        ashos.remove("debian")
    assert [file for file in ashos.efi_files() if "/debian/" in file] == ["::/EFI/debian/", "::/EFI/debian/grub.cfg"]
    assert ashos.ash("fsck").stdout.strip() == "no problems found"
    said = ashos.remove("debian_2", status=REFUSED).stderr
    assert "the BIOS starts debian_2, and only AshOS itself can install the boot loader of fedora" in said
    with ashos.unchanged("_fedora"):
        ashos.remove("debian_2", "--last")
    assert [*ashos.efi_files()] == ["::/EFI/", "::/EFI/fedora/", "::/EFI/fedora/grubx64.efi", "::/EFI/map.txt"]
    ashos.remove("fedora", "--last")
    assert ashos.volumes() == {}


def test_ours_is_added_beside_a_system_that_was_installed_alone(ashos: AshosDisk, tmp_path: Path) -> None:
    ashos.add_ashos("debian", "")
    with ashos.unchanged(""):
        assert "there is a system debian" in ashos.add("debian", status=REFUSED).stderr
        ashos.add("debian_2")
        shown = ashos.init("rescue", ashos.image).stdout
    assert "debian: Debian Linux, of AshOS" in shown
    assert SHOWN[1] in shown
    assert others_in_menu(ashos, "debian_2", tmp_path) == ["AshOS"]
    with ashos.files() as files:
        program("btrfs", "subvolume", "create", files.top / "@")  # which another system may have
    ashos.remove("debian")
    assert [path for path in ashos.volumes() if "debian_2" not in path] == ["@"]
    assert ashos.ash("fsck").stdout.strip() == "no problems found"


def test_a_damaged_tree_file_does_not_matter(ashos: AshosDisk) -> None:
    ashos.add_ashos("arch", "_arch")
    with ashos.files() as files:
        (files.top / "@.snapshots_arch/ash/fstree").write_text("{'name': 'root', 'children': [{'name': '../../x'}]}")
    assert "its tree file cannot be read" in ashos.init("rescue", ashos.image).stdout
    assert "there is no system" in ashos.ash("tree", status=MISSING).error
    assert "no complete system of ash" in ashos.init("rescue", ashos.image, "--shell", status=MISSING).stderr
    ashos.remove("arch", "--last")
    assert ashos.volumes() == {}


def test_snapshots_of_others_are_no_system(ashos: AshosDisk) -> None:
    with ashos.files() as files:
        program("btrfs", "subvolume", "create", files.top / "@.snapshots")  # as snapper has them on many systems
    assert "no system of ash" in ashos.init("rescue", ashos.image, status=MISSING).stderr
    assert "has no system of ash" in ashos.add("debian", status=REFUSED).stderr


def test_the_program_of_ashos_on_the_efi_partition_is_not_replaced(tmp_path: Path) -> None:
    partition = tmp_path / "efi"
    with partition.open("wb") as file:
        file.truncate(64 << 20)
    program("mkfs.vfat", "-F", "32", "-s", "1", partition)
    with loop_device(partition) as node:
        efi = EfiFiles(node)
        efi.write({"ash/debian/grubenv": b""})
        require_no_neighbour(efi, "debian", [])
        efi.delete("ash")
        efi.write({"ash": b"MZ"})
        with pytest.raises(AshError, match="has a file ash"):
            require_no_neighbour(efi, "debian", [])
