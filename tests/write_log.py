# SPDX-License-Identifier: AGPL-3.0-or-later
"""Record the writes and flushes of a disk, and replay a part of them.

QEMU's storage daemon exports an image as a file (by FUSE), to which a loop device can be attached, and logs every write
and flush in the format of dm-log-writes: a superblock, then for each an entry of one sector, followed by its data.
"""

import contextlib
import hashlib
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import Disk, program, wait_until

SECTOR = 512
BLOCK = 4096  # what a disk writes atomically
# From drivers/md/dm-log-writes.c: sector, number of sectors, flags, length of a mark's data.
ENTRY = struct.Struct("<4Q")
FLUSH, FUA, DISCARD = 1, 2, 4
LOG_SIZE = 1 << 32


@dataclass(frozen=True)
class Write:
    """A write: its offset on the disk and size in bytes, and the offset of its data in the log (None for zeros)."""

    offset: int
    size: int
    data: int | None

    def blocks(self) -> Iterator["Write"]:
        """The blocks of which a disk may keep any subset."""
        for begin in range(0, self.size, BLOCK):
            data = None if self.data is None else self.data + begin
            yield Write(self.offset + begin, min(BLOCK, self.size - begin), data)


@dataclass(frozen=True)
class Log:
    """All writes in epochs: lists of the writes between two flushes."""

    path: Path
    epochs: list[list[Write]]

    @classmethod
    def load(cls, path: Path) -> "Log":
        """Read a log; it may be growing meanwhile."""
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
        """A hash of an image at all places that the log writes to."""
        digest = hashlib.sha256()
        with image.open("rb") as disk:
            for place in sorted({(write.offset, write.size) for write in self.writes}):
                digest.update(os.pread(disk.fileno(), place[1], place[0]))
        return digest.hexdigest()

    def apply(self, writes: Iterable[Write], image: Path) -> None:
        """Replay some writes on another image."""
        with self.path.open("rb") as log, image.open("rb+") as disk:
            for write in writes:
                disk.seek(write.offset)
                if write.data is None:
                    disk.write(bytes(write.size))
                else:
                    log.seek(write.data)
                    disk.write(log.read(write.size))


def some_of(writes: Iterable[Write], chance: random.Random) -> list[Write]:
    """A random subset of the blocks of some writes."""
    share = chance.random()
    return [block for write in writes for block in write.blocks() if chance.random() < share]


@contextlib.contextmanager
def recorded(image: Path, log: Path) -> Iterator[Path]:
    """Export an image as another file inside the block; writes to it go to the image and to the log."""
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


class VolatileCache:
    """A disk whose volatile write cache is lost in a power cut.

    Then it has what was flushed before, and of what was written since, what `chance` says.

    Args:
        disk: the disk; it is replaced.
        chance: decides about each block.
    """

    def __init__(self, disk: Disk, chance: random.Random) -> None:
        self.disk = disk
        self.chance = chance
        self.lost = 0  # blocks that it does not have
        self._log = disk.image.with_name("log")
        self._cut: Log | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[Disk]:
        """The disk for a machine, whose power is cut in the block."""
        before = self.disk.image.with_name("before.img")
        program("cp", "--sparse=always", "--reflink=auto", self.disk.image, before)
        with recorded(self.disk.image, self._log) as shown:
            yield Disk(shown)
        assert self._cut, "the power was not cut"
        *flushed, last = self._cut.epochs
        self._cut.apply((write for epoch in flushed for write in epoch), before)
        kept = some_of(last, self.chance)
        self._cut.apply(kept, before)
        self.lost = sum(1 for write in last for _ in write.blocks()) - len(kept)
        before.replace(self.disk.image)
        self._log.unlink()

    def wait_for_writes(self, seconds: float) -> None:
        """Wait until something is written and not flushed yet, which is seldom so for long, but no longer than this."""
        deadline = time.monotonic() + seconds
        while not Log.load(self._log).epochs[-1] and time.monotonic() < deadline:
            time.sleep(0.02)

    def power_is_cut(self) -> None:
        """Note what is on the disk. To be called before the machine is killed: when its files are closed, all is flushed."""
        self._cut = Log.load(self._log)
