# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where the new system swaps to: compressed memory, a file in a subvolume of its own, partitions that exist."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ash import USAGE, AshError, Layout, create_subvolume, mount_option_to_wait, path_inside, read_text
from installer import host
from installer.disk import MIB, filesystem_uuid, parse_size

ZRAM = "zram"
ZRAM_CONFIGURATION = "etc/systemd/zram-generator.conf"
ZRAM_SETTINGS = """\
# Read by zram-generator at boot; sizes are in MiB.
[zram0]
zram-size = min(ram / 2, 4096)
compression-algorithm = zstd
"""
SMALLEST = 16 * MIB
MOUNT_POINT, FILE = "/swap", "swapfile"


@dataclass(frozen=True)
class Swap:
    """What the new system swaps to.

    Args:
        zram: a compressed device in memory.
        size: of the swap file, in bytes; 0 if there is none.
        devices: swap partitions.
    """

    zram: bool = False
    size: int = 0
    devices: tuple[Path, ...] = ()

    @classmethod
    def of(cls, words: Sequence[str]) -> Self:
        """Parse the words of --swap.

        Raises:
            AshError: one is neither zram nor a size nor a device, or there are two sizes (USAGE).
        """
        devices = dict.fromkeys(Path(word) for word in words if "/" in word)
        sizes = [_size(word) for word in words if word != ZRAM and "/" not in word]
        if len(sizes) > 1:
            raise AshError("--swap names two sizes", "one swap file is made: name its size", USAGE)
        return cls(ZRAM in words, sum(sizes), tuple(devices))

    def configure(self, root: Path, layout: Layout, uuid: str) -> None:
        """Have a new root use it.

        Args:
            root: the root, writable; its fstab has the lines of the user so far.
            layout: of the system.
            uuid: of the file system with the swap file.
        """
        if self.zram:
            host.put(root, ZRAM_CONFIGURATION, ZRAM_SETTINGS)
        lines = [f"UUID={filesystem_uuid(device)} none swap nofail 0 0" for device in self.devices]
        if self.size:
            options = f"subvol={layout.volume_name(Layout.SWAP)},noatime,nofail,{mount_option_to_wait()}"
            lines.append(f"UUID={uuid} {MOUNT_POINT} btrfs {options} 0 0")
            lines.append(f"{MOUNT_POINT}/{FILE} none swap nofail 0 0")
        host.put(root, "etc/fstab", read_text(path_inside(root, "etc/fstab")) + "".join(f"{line}\n" for line in lines))

    def make_file(self, layout: Layout, log: host.Log) -> None:
        """Make the swap file, with all its space, in a new subvolume; nothing if there is to be none."""
        if self.size:
            create_subvolume(layout.volume(Layout.SWAP))
            log.run(self.file_command(layout))

    def file_command(self, layout: Layout) -> list[str | Path]:
        """The command that makes the swap file."""
        file = layout.volume(Layout.SWAP) / FILE
        return ["btrfs", "filesystem", "mkswapfile", "--size", str(self.size), file]


def _size(word: str) -> int:
    """A size in bytes, of whole MiB."""
    try:
        size = parse_size(word) // MIB * MIB
    except AshError as error:
        hint = "such as --swap zram, --swap 2G, or a swap partition such as /dev/sdb2"
        raise AshError(f"{word} is neither zram, a size, nor a device", hint, USAGE) from error
    if size < SMALLEST:
        raise AshError(f"a swap file of {word} is too small", f"at least {SMALLEST // MIB}M", USAGE)
    return size
