# SPDX-License-Identifier: AGPL-3.0-or-later
"""The disk image: a file that appears whole or not at all, its partitions and file systems.

Partitions are reached by their offsets, since not every machine scans the partitions of a loop device, and the EFI
partition is filled by mtools, since not every kernel has vfat.
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

# What GPT calls them: the BIOS boot partition (where GRUB's core goes), the EFI partition, a Linux file system.
BIOS_BOOT_TYPE = "21686148-6449-6E6F-744E-656564454649"
EFI_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def parse_size(text: str) -> int:
    """Bytes of a size such as 8G, 8GiB, 8192M or 8589934592; AshError (usage) where it is none."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:iB|B)?", text, re.IGNORECASE)
    if found is None:
        raise AshError(f"{text} is not a size", hint="such as 8G or 8192M", status=USAGE)
    return int(found[1]) * UNITS[found[2].upper()]


@dataclass(frozen=True)
class Partition:
    """A partition, by its place in the image, in bytes."""

    start: int
    size: int


@dataclass(frozen=True)
class Disk:
    """A disk image of `size` bytes with three partitions, and the identities that its file systems get."""

    image: Path
    size: int
    root_uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    efi_serial: str = field(default_factory=lambda: secrets.token_hex(4).upper())

    BIOS = Partition(MIB, MIB)
    EFI = Partition(2 * MIB, 256 * MIB)

    @property
    def root(self) -> Partition:
        """What is left for the root; the last MiB belongs to the second copy of the partition table."""
        start = self.EFI.start + self.EFI.size
        return Partition(start, self.size // MIB * MIB - MIB - start)

    @property
    def efi_uuid(self) -> str:
        """The EFI file system's serial number, as UUID= in fstab has it."""
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
        # With one sector a cluster it has enough of them to be FAT32 for every reader.
        options = ["-F", "32", "-s", "1", "-n", "EFI", "-i", self.efi_serial]
        run(["mkfs.vfat", *options, "--offset", str(sectors), "-h", str(sectors), self.image, str(kibibytes)])

    def fill_efi(self, files: Mapping[str, Path]) -> None:
        """Copy files onto the EFI partition.

        Args:
            files: {path on the partition: the file to copy}; directories are made as needed.
        """
        drive = f"{self.image}@@{self.EFI.start}"
        directories = {str(directory) for name in files for directory in Path(name).parents if directory != Path()}
        for directory in sorted(directories):
            run(["mmd", "-i", drive, f"::{directory}"])
        for name, source in files.items():
            run(["mcopy", "-i", drive, source, f"::{name}"])


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file that gets its name once it is whole: as `FILE.part` while it is made, gone where that fails.

    An older file of that name is replaced only then. The file is empty at first, and for its owner alone to read.

    Raises (on entering):
        AshError: another process is making it (status LOCKED).
    """
    part = path.with_name(f"{path.name}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AshError(f"{path} is being made by another process", status=LOCKED) from None
        os.ftruncate(descriptor, 0)  # the remains of a process that was killed
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
    """A loop device of a whole image, or of one partition of it; it goes with this process at the latest."""
    place = (partition.start, partition.size) if partition else (0, 0)
    with image.open("rb+") as disk:
        loop = open_new_loop(disk.fileno(), image, *place)
    try:
        yield Path(os.readlink(f"/proc/self/fd/{loop}"))
    finally:
        os.close(loop)
