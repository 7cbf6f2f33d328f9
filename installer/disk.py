# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a system is installed: a disk of this machine or an image of one, its partitions and file systems.

The partitions of an image are loop devices, because not every host scans those of a loop device, and the EFI partition
is filled by mtools, because not every kernel has vfat.
"""

import contextlib
import fcntl
import filecmp
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ash import (
    LOCKED,
    MS_RDONLY,
    PRIVATE,
    USAGE,
    AshError,
    Layout,
    attach_disk,
    btrfs_partition,
    create_subvolume,
    mount,
    mount_btrfs,
    mount_top,
    open_new_loop,
    private_mounts,
    refuse_if_in_a_machine,
    run,
)
from installer import host
from installer.luks import Luks, unlocked

MIB = 2**20
SECTOR = 512
BLKRRPART, BLKFLSBUF, BLKSSZGET = 0x125F, 0x1261, 0x1268  # <linux/fs.h>
NODE_SECONDS = 30
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# GPT's partition types: BIOS boot (for GRUB's core image), EFI system, Linux file system.
BIOS_BOOT_TYPE = "21686148-6449-6E6F-744E-656564454649"
EFI_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
EFI_SIZE = 256 * MIB


def parse_size(text: str) -> int:
    """Parse a size such as 8G, 8GiB, 8192M or 8589934592 into bytes.

    Raises:
        AshError: it is not a size (USAGE).
    """
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:iB|B)?", text, re.IGNORECASE)
    if found is None:
        raise AshError(f"{text} is not a size", hint="use one such as 8G or 8192M", status=USAGE)
    size = int(found[1]) * UNITS[found[2].upper()]
    if size >= 1 << 63:  # what the kernel counts in
        raise AshError(f"{text} are too many", hint="use one such as 8G or 8192M", status=USAGE)
    return size


class Partition(NamedTuple):
    """The offset and size of a partition, in bytes, and its type in a GPT."""

    start: int
    size: int
    kind: str


class Sizes(NamedTuple):
    """The bytes of partitions besides that of the root; 0 for those that there are not."""

    boot: int = 0
    home: int = 0


NO_MORE = Sizes()


def partitions_for(size: int, sizes: Sizes = NO_MORE) -> list[Partition]:
    """The partitions of a whole disk of some bytes: for GRUB's core image, EFI, the root, then those with `sizes`."""
    bios = Partition(MIB, MIB, BIOS_BOOT_TYPE)
    efi = Partition(bios.start + bios.size, EFI_SIZE, EFI_TYPE)
    start = efi.start + efi.size
    # The last MiB is for the backup of the partition table.
    end = size // MIB * MIB - MIB - sum(sizes)
    parts = [bios, efi, Partition(start, end - start, LINUX_TYPE)]
    for one in filter(None, sizes):
        parts.append(Partition(end, one, LINUX_TYPE))
        end += one
    return parts


def partition_command(disk: Path, parts: Iterable[Partition]) -> tuple[list[str | Path], str]:
    """The command that writes a new partition table, and its input."""
    sector = sector_size(disk)
    lines = [f"start={p.start // sector}, size={p.size // sector}, type={p.kind}" for p in parts]
    wipe = ["--wipe", "always", "--wipe-partitions", "always"]
    argv: list[str | Path] = ["sfdisk", "--quiet", *wipe, "--no-reread", "--no-tell-kernel", disk]
    return argv, "\n".join(["label: gpt", *lines, ""])


def partition(disk: Path, parts: Iterable[Partition]) -> None:
    """Write a new partition table; what the disk had before is not found any more."""
    argv, script = partition_command(disk, parts)
    run(argv, input=script)


def sector_size(disk: Path) -> int:
    """The size of a disk's logical sectors in bytes; that of an image is 512."""
    size = bytearray(4)
    with contextlib.suppress(OSError), disk.open("rb") as device:
        fcntl.ioctl(device, BLKSSZGET, size)
    return int.from_bytes(size, sys.byteorder) or SECTOR


def new_serial() -> str:
    """A random serial number of a FAT file system, as fstab's UUID= spells it."""
    return f"{secrets.token_hex(2)}-{secrets.token_hex(2)}".upper()


def flush(node: Path) -> None:
    """Write what was written to a device node, and read it anew next time.

    ash itself reads and writes the image behind a loop device.
    """
    with node.open("rb") as device:
        os.fsync(device.fileno())
        fcntl.ioctl(device, BLKFLSBUF)


@dataclass(frozen=True)
class Target:
    """The device nodes of a new system, and the uuids of its file systems.

    Args:
        drive: the whole disk, which the boot loader is installed on.
        root: the partition of the root.
        efi: the EFI partition; None if there is none.
        image: the image that they are in.
        root_uuid: of the root's file system.
        efi_uuid: the serial number of the EFI file system.
        keeps_root: the root's partition has a btrfs file system, which is kept.
        alone: no other system is on it.
        keeps_efi: the EFI partition has a file system, which is kept.
        bios: whether GRUB is installed for the BIOS.
        luks: the encrypted partition that the root's is in.
        boot: a partition for GRUB's files and the kernels.
        boot_uuid: of its file system.
        home: a partition for /home.
        home_uuid: of its file system.
    """

    drive: Path
    root: Path
    efi: Path | None
    image: Path | None = None
    root_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    efi_uuid: str = field(default_factory=new_serial)
    keeps_root: bool = False
    alone: bool = False
    keeps_efi: bool = False
    bios: bool = True
    luks: Luks | None = None
    boot: Path | None = None
    boot_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    home: Path | None = None
    home_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def encrypted(self, passphrase: str) -> "Target":
        """The same target, with its root in an encrypted partition."""
        inside = Luks(self.root, passphrase)
        return replace(self, root=inside.node, luks=inside)

    def format_commands(self) -> list[list[str | Path]]:
        """The commands that write empty file systems, except where one is kept."""
        commands: list[list[str | Path]] = []
        if self.efi and not self.keeps_efi:
            # With one sector per cluster there are enough clusters that every driver takes it for FAT32.
            serial = self.efi_uuid.replace("-", "")
            commands.append(["mkfs.vfat", "-F", "32", "-s", "1", "-n", "EFI", "-i", serial, self.efi])
        if not self.keeps_root:
            commands += self.luks.format_commands() if self.luks else []
            label = ["--label", "ash", "--uuid", self.root_uuid]
            commands.append(["mkfs.btrfs", "--quiet", "--force", *label, self.root])
        for name, ident, node in (("boot", self.boot_uuid, self.boot), ("home", self.home_uuid, self.home)):
            if node:
                named = ["--label", name, "--uuid", ident]
                commands.append(["mkfs.btrfs", "--quiet", "--force", *named, node])
        return commands

    def format(self) -> None:
        """Write empty file systems, except where one is kept."""
        for command in self.format_commands():
            run(command, input=self.luks.passphrase if self.luks and command[0] == "cryptsetup" else None)
        if self.efi:
            flush(self.efi)

    @contextmanager
    def home_at(self, directory: Path) -> Iterator[None]:
        """Mount the partition for /home in the block, if there is one."""
        if self.home:
            mount(self.home, directory, "btrfs")
        try:
            yield
        finally:
            if self.home:
                run(["umount", directory])

    def mount_boot(self, layout: Layout) -> None:
        """Mount its partition for /boot over the boot volume of a new system, which is to be on it; if there is one."""
        if not self.boot:
            return
        node, top = self.boot, PRIVATE / "boot"
        if self.image:  # GRUB's scripts resolve a loop device to its backing file, which is not a disk
            node = PRIVATE / "boot-node"
            os.mknod(node, 0o600 | stat.S_IFBLK, self.boot.stat().st_rdev)
        top.mkdir()
        mount_btrfs(node, top, "subvolid=5")
        create_subvolume(top / layout.boot_volume.name)
        run(["umount", top])
        mount_btrfs(node, layout.boot_volume, f"subvol={layout.boot_volume.name}")

    def attach(self, stack: ExitStack) -> tuple[Path, Path]:
        """Mount the top level of the root's file system. Returns the mount point and the device node."""
        return attach_disk(stack, self.image) if self.image else (mount_top(self.root), self.root)


@contextmanager
def unlocked_target(target: Target, passphrase: str | None) -> Iterator[Target]:
    """Open the encrypted partition that a target's root is in; yields the target with what is in there.

    Raises:
        AshError: there is no passphrase (USAGE), or it is wrong (REFUSED).
    """
    with unlocked(target.root, passphrase) as inside:
        yield replace(target, root=inside.node, root_uuid=filesystem_uuid(inside.node), luks=inside)


@contextmanager
def mounted_readonly(device: Path) -> Iterator[Path]:
    """Mount the top level of a btrfs file system, for the block. AshError if it cannot be.

    Nothing is written: after a power cut, not even the log is replayed.
    """
    private_mounts()
    with tempfile.TemporaryDirectory(prefix="ash-seen-") as top:  # not below PRIVATE, which each ash has for itself
        mount(device, Path(top), "btrfs", MS_RDONLY, "subvolid=5,rescue=nologreplay")
        try:
            yield Path(top)
        finally:
            run(["umount", "--recursive", top])


class EfiFiles:
    """The files of an EFI partition.

    Args:
        node: of the partition.
    """

    def __init__(self, node: Path) -> None:
        self.node = node
        flush(node)

    def has(self, path: str) -> bool:
        """Whether there is a file or directory."""
        return run(["mdir", "-b", "-i", self.node, f"::{path}"], check=False).returncode == 0

    def directories(self, path: str) -> list[str]:
        """The names of the directories in a directory; none if it is missing."""
        found = run(["mdir", "-b", "-i", self.node, f"::{path}"], check=False).stdout.splitlines()
        return sorted(line.rstrip("/").rpartition("/")[2] for line in found if line.endswith("/"))

    def read(self, name: str) -> str:
        """The text of a file; empty if it is missing."""
        found = run(["mtype", "-i", self.node, f"::{name}"], check=False)
        return "" if found.returncode else found.stdout

    def delete(self, path: str) -> None:
        """Delete a file, or a directory with all that is in it; it may be missing."""
        if self.has(path):
            run(["mdeltree", "-i", self.node, f"::{path}"])
            flush(self.node)

    def delete_empty(self, path: str) -> None:
        """Delete a directory if nothing is in it; it may be missing."""
        run(["mrd", "-i", self.node, f"::{path}"], check=False)
        flush(self.node)

    def are_same(self, *paths: str) -> bool:
        """Whether there are files with these paths, and all have the same content."""
        with tempfile.TemporaryDirectory() as scratch:
            copies = [Path(scratch, str(number)) for number in range(len(paths))]
            for path, copy in zip(paths, copies, strict=True):
                if run(["mcopy", "-n", "-i", self.node, f"::{path}", copy], check=False).returncode:
                    return False
            return all(filecmp.cmp(copies[0], copy, shallow=False) for copy in copies[1:])

    def write(self, texts: Mapping[str, bytes]) -> None:
        """Write files; see add()."""
        with tempfile.TemporaryDirectory() as scratch:
            files = {name: Path(scratch, str(number)) for number, name in enumerate(texts)}
            for name, file in files.items():
                file.write_bytes(texts[name])
            self.add(files)

    def add(self, files: Mapping[str, Path]) -> None:
        """Copy files to the partition.

        Args:
            files: {path on the partition: the file to copy}; directories are created as needed.

        Raises:
            AshError: there is no room.
        """
        directories = {str(directory) for name in files for directory in Path(name).parents if directory != Path()}
        for directory in sorted(directories):
            if not self.has(directory):
                run(["mmd", "-i", self.node, f"::{directory}"])
        for name, source in files.items():
            run(["mcopy", "-o", "-i", self.node, source, f"::{name}"])
            with tempfile.TemporaryDirectory() as copies:
                copy = Path(copies, "copy")
                run(["mcopy", "-n", "-i", self.node, f"::{name}", copy])
                if not filecmp.cmp(source, copy, shallow=False):  # on a full partition mcopy 4.0.32 ends with 0
                    raise AshError(f"the EFI partition {self.node} is full", "delete what nobody needs there")
        flush(self.node)


@contextmanager
def target_in(image: Path, sizes: Sizes) -> Iterator[Target]:
    """The target in an image, with new partitions."""
    parts = partitions_for(image.stat().st_size, sizes)
    partition(image, parts)
    with ExitStack() as stack:
        whole = stack.enter_context(loop_device(image))
        nodes = [stack.enter_context(loop_device(image, one.start, one.size)) for one in parts[1:]]
        yield _target_with(whole, nodes, sizes, image)


def _target_with(drive: Path, nodes: Iterable[Path], sizes: Sizes, image: Path | None = None) -> Target:
    """The target with the nodes of the partitions_for() a disk, but for the first."""
    efi, root, *rest = nodes
    more = iter(rest)
    boot, home = (next(more) if size else None for size in sizes)
    return Target(drive, root, efi, image, boot=boot, home=home)


@contextmanager
def target_of(image: Path) -> Iterator[Target]:
    """The target in an image that has a system: its file systems are kept.

    Raises:
        AshError: it is no image of a disk with a btrfs partition, or another ash works on it (LOCKED).
    """
    start, size = btrfs_partition(image)
    with image.open("rb+") as file:
        refuse_if_in_a_machine(file.fileno(), image)
    host.require_detached(image)
    table = json.loads(run(["sfdisk", "--json", image]).stdout)["partitiontable"]
    efi = next((one for one in table["partitions"] if one["type"].upper() == EFI_TYPE), None)
    with ExitStack() as stack:
        whole = stack.enter_context(loop_device(image))
        root = stack.enter_context(loop_device(image, start, size))
        for one in table["partitions"]:
            if one["type"].upper() == LINUX_TYPE and one["start"] * SECTOR != start:  # may be that for /boot
                stack.enter_context(loop_device(image, one["start"] * SECTOR, one["size"] * SECTOR))
        target = Target(whole, root, None, image, filesystem_uuid(root), keeps_root=True, keeps_efi=True)
        if efi:
            node = stack.enter_context(loop_device(image, efi["start"] * SECTOR, efi["size"] * SECTOR))
            target = replace(target, efi=node, efi_uuid=filesystem_uuid(node))
        yield target


def filesystem_uuid(node: Path) -> str:
    """The UUID of the file system on a device, as fstab spells it."""
    return run(["blkid", "--probe", "--match-tag", "UUID", "--output", "value", node]).stdout.strip()


def target_on(drive: Path, sizes: Sizes) -> Target:
    """The target on a whole disk of this machine, with new partitions.

    Args:
        drive: the node of the disk.
        sizes: of further partitions.

    Raises:
        AshError: the disk is in use, or Linux does not show its new partitions.
    """
    parts = partitions_for(size_of_device(drive), sizes)
    partition(drive, parts)
    with drive.open("rb") as device:
        fcntl.ioctl(device, BLKRRPART)
    return _target_with(drive, [_node_at(drive, part) for part in parts[1:]], sizes)


def future_target(drive: Path, sizes: Sizes) -> Target:
    """The target that target_on() will find, with the names that Linux gives to partitions; nothing is written."""
    prefix = f"{drive}p" if drive.name[-1].isdigit() else str(drive)
    last = 3 + sum(map(bool, sizes))
    return _target_with(drive, [Path(f"{prefix}{number}") for number in range(2, last + 1)], sizes)


def size_of_device(path: Path) -> int:
    """The size of a block device or a file, in bytes."""
    with path.open("rb") as device:
        return device.seek(0, os.SEEK_END)


def _node_at(drive: Path, part: Partition) -> Path:
    """The node of a partition of a disk; devtmpfs and udev may take a moment to make it."""
    give_up = time.monotonic() + NODE_SECONDS
    while time.monotonic() < give_up:
        for entry in Path("/sys/class/block", drive.resolve().name).glob("*/partition"):
            node = Path("/dev", entry.parent.name)
            start = int((entry.parent / "start").read_text()) * SECTOR  # in these units whatever the disk's sectors are
            if start == part.start and node.is_block_device():
                return node
        time.sleep(0.05)
    raise AshError(f"Linux does not show the new partitions of {drive}", "reboot the live system, and try again")


@contextmanager
def loop_device(image: Path, start: int = 0, size: int = 0) -> Iterator[Path]:
    """A loop device of an image or of a part of it; the kernel detaches it when this process dies."""
    with image.open("rb+") as disk:
        loop = open_new_loop(disk.fileno(), image, start, size)
    try:
        yield Path(os.readlink(f"/proc/self/fd/{loop}"))
    finally:
        os.close(loop)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Create a file as `FILE.part`, rename it when the block ends, delete it when the block fails.

    It is empty at first, and only its owner can read it.

    Raises (on entering):
        AshError: another process is creating it (LOCKED).
    """
    part = path.with_name(f"{path.name}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AshError(f"another process is creating {path}", status=LOCKED) from None
        os.ftruncate(descriptor, 0)  # left behind by a killed process
        os.fchmod(descriptor, 0o600)
        try:
            yield part
            os.fsync(descriptor)
            host.user_owned(part)
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)
