# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is written to a disk, and when it is told to have it all on the medium: recorded, and done again in part.

QEMU's storage daemon shows an image as a file (by FUSE), to which a loop device can be attached, and logs every write
and flush in the form of Linux's dm-log-writes: a superblock, then an entry of a sector for each, followed by its data.
"""

import contextlib
import hashlib
import os
import random
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import Disk, wait_until

SECTOR = 512
BLOCK = 4096  # what a disk writes whole
# From drivers/md/dm-log-writes.c: sector, number of sectors, flags, length of the data of a mark.
ENTRY = struct.Struct("<4Q")
FLUSH, FUA, DISCARD = 1, 2, 4
LOG_SIZE = 1 << 32


@dataclass(frozen=True)
class Write:
    """A write: where on the disk (in bytes), how much, and where its data is in the log; None where it is zeros."""

    offset: int
    size: int
    data: int | None

    def blocks(self) -> Iterator["Write"]:
        """What a disk may have of it or not."""
        for begin in range(0, self.size, BLOCK):
            data = None if self.data is None else self.data + begin
            yield Write(self.offset + begin, min(BLOCK, self.size - begin), data)


@dataclass(frozen=True)
class Log:
    """All that was written, as lists between flushes: what is in the first is on the medium with the first flush."""

    path: Path
    epochs: list[list[Write]]

    @classmethod
    def load(cls, path: Path) -> "Log":
        """Read a log, which may be written on meanwhile."""
        epochs: list[list[Write]] = [[]]
        place = SECTOR
        with path.open("rb") as log:
            while any(entry := ENTRY.unpack(os.pread(log.fileno(), ENTRY.size, place))):
                sector, sectors, flags, _ = entry
                place += SECTOR
                if flags & FLUSH:
                    epochs.append([])
                if sectors:
                    data = None if flags & DISCARD else place
                    epochs[-1].append(Write(sector * SECTOR, sectors * SECTOR, data))
                    place += 0 if flags & DISCARD else sectors * SECTOR
                if flags & FUA:
                    raise ValueError("a loop device knows no FUA")
        return cls(path, epochs)

    @property
    def writes(self) -> list[Write]:
        """All writes."""
        return [write for epoch in self.epochs for write in epoch]

    def content(self, image: Path) -> str:
        """What names the content of all that was written to, as it is on an image."""
        digest = hashlib.sha256()
        with image.open("rb") as disk:
            for place in sorted({(write.offset, write.size) for write in self.writes}):
                digest.update(os.pread(disk.fileno(), place[1], place[0]))
        return digest.hexdigest()

    def apply(self, writes: Iterable[Write], image: Path) -> None:
        """Do some writes once more, to another image."""
        with self.path.open("rb") as log, image.open("rb+") as disk:
            for write in writes:
                disk.seek(write.offset)
                if write.data is None:
                    disk.write(bytes(write.size))
                else:
                    log.seek(write.data)
                    disk.write(log.read(write.size))


def some_of(writes: Iterable[Write], chance: random.Random) -> list[Write]:
    """What a disk may have of writes that it was not told to keep yet: any blocks of them."""
    share = chance.random()
    return [block for write in writes for block in write.blocks() if chance.random() < share]


@contextlib.contextmanager
def recorded(image: Path, log: Path) -> Iterator[Path]:
    """An image as another file, whose writes go to the image and to the log, as long as the block lasts."""
    with log.open("wb") as file:
        file.truncate(LOG_SIZE)
    shown = image.with_name("shown.img")
    shown.touch()
    nodes = [
        f"driver=file,node-name=image,filename={image},discard=unmap",
        f"driver=file,node-name=log,filename={log}",
        f"driver=blklogwrites,node-name=recorded,file=image,log=log,log-sector-size={SECTOR}",
    ]
    export = f"type=fuse,id=shown,node-name=recorded,mountpoint={shown},writable=on"
    options = [word for node in nodes for word in ("--blockdev", node)]
    daemon = subprocess.Popen(["qemu-storage-daemon", *options, "--export", export])
    try:
        wait_until(lambda: shown.stat().st_size or daemon.poll() is not None)
        yield shown
        wait_until(lambda: not Disk(shown).attached())
    finally:
        daemon.terminate()
        daemon.wait(timeout=60)
