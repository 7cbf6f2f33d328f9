# SPDX-License-Identifier: AGPL-3.0-or-later
"""The disk image: a file that appears complete or not at all, its partitions and file systems.

Partitions are accessed by offset, because not every host scans the partitions of loop devices, and the EFI partition
by mtools, because not every kernel has vfat.
"""

import fcntl
import os
import re
import secrets
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ash import LOCKED, USAGE, AshError, open_new_loop, run
from installer import host

MIB = 2**20
SECTOR = 512
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# GPT's partition types: BIOS boot (for GRUB's core image), EFI system, Linux file system.
BIOS_BOOT_TYPE = "21686148-6449-6E6F-744E-656564454649"
EFI_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def parse_size(text: str) -> int:
    """Parse a size such as 8G, 8GiB, 8192M or 8589934592 into bytes.

    Raises:
        AshError: it is not a size (USAGE).
    """
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:iB|B)?", text, re.IGNORECASE)
    if found is None:
        raise AshError(f"{text} is not a size", hint="use one such as 8G or 8192M", status=USAGE)
    return int(found[1]) * UNITS[found[2].upper()]


@dataclass(frozen=True)
class Partition:
    """The offset and size of a partition in the image, in bytes."""

    start: int
    size: int


@dataclass(frozen=True)
class Disk:
    """A disk image of `size` bytes with three partitions, and the uuids of its file systems."""

    image: Path
    size: int
    root_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    efi_serial: str = field(default_factory=lambda: secrets.token_hex(4).upper())

    BIOS = Partition(MIB, MIB)
    EFI = Partition(2 * MIB, 256 * MIB)

    @property
    def root(self) -> Partition:
        """The rest of the disk; the last MiB is for the backup of the partition table."""
        start = self.EFI.start + self.EFI.size
        return Partition(start, self.size // MIB * MIB - MIB - start)

    @property
    def efi_uuid(self) -> str:
        """The serial number of the EFI file system as fstab's UUID= spells it."""
        return f"{self.efi_serial[:4]}-{self.efi_serial[4:]}"

    def format(self) -> None:
        """Write the partition table and empty file systems."""
        self._partition()
        self._format_efi()
        with loop_device(self.image, self.root) as device:
            run(["mkfs.btrfs", "--quiet", "--label", "ash", "--uuid", self.root_uuid, device])

    def _partition(self) -> None:
        partitions = ((self.BIOS, BIOS_BOOT_TYPE), (self.EFI, EFI_TYPE), (self.root, LINUX_TYPE))
        lines = [f"start={p.start // SECTOR}, size={p.size // SECTOR}, type={kind}" for p, kind in partitions]
        script = "\n".join(["label: gpt", *lines, ""])
        run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", self.image], input=script)

    def _format_efi(self) -> None:
        sectors, kibibytes = self.EFI.start // SECTOR, self.EFI.size // 1024
        # With one sector per cluster there are enough clusters that every driver takes it for FAT32.
        options = ["-F", "32", "-s", "1", "-n", "EFI", "-i", self.efi_serial]
        run(["mkfs.vfat", *options, "--offset", str(sectors), "-h", str(sectors), self.image, str(kibibytes)])

    def fill_efi(self, files: Mapping[str, Path]) -> None:
        """Copy files onto the EFI partition.

        Args:
            files: {path on the partition: the file to copy}; directories are created as needed.
        """
        drive = f"{self.image}@@{self.EFI.start}"
        directories = {str(directory) for name in files for directory in Path(name).parents if directory != Path()}
        for directory in sorted(directories):
            run(["mmd", "-i", drive, f"::{directory}"])
        for name, source in files.items():
            run(["mcopy", "-i", drive, source, f"::{name}"])


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


@contextmanager
def loop_device(image: Path, partition: Partition | None = None) -> Iterator[Path]:
    """A loop device of an image or of one of its partitions; the kernel detaches it when this process dies."""
    place = (partition.start, partition.size) if partition else (0, 0)
    with image.open("rb+") as disk:
        loop = open_new_loop(disk.fileno(), image, *place)
    try:
        yield Path(os.readlink(f"/proc/self/fd/{loop}"))
    finally:
        os.close(loop)
