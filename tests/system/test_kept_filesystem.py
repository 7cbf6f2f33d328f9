# SPDX-License-Identifier: AGPL-3.0-or-later
"""A btrfs that was made with options of its own gets a system, and stays as it was made; one with files is refused.

The partitions are loop devices, which the installer takes for those of a disk.
"""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from installer.disk import Sizes, Target, target_in
from tests.support import CHECKOUT, DONE, REFUSED, USAGE, Disk, Outcome, program

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]

SIZE = 4 << 30
LABEL, UUID = "mine", "0f6f1f3f-2a11-4c9b-9a5e-b0a7a1de1b0c"

# The installer, which finds these devices in the place of those of this machine.
START = """\
import sys
from pathlib import Path
from installer import cli, disk, drives, install

log, root, drive = map(Path, sys.argv[1:4])
install.DISK_LOG = log

def device(path, kind, filesystem="", uuid="", inside=()):
    rest = dict.fromkeys(["model", "label", "version", "table", "purpose", "partition_id"], "")
    size = disk.size_of_device(path)
    return drives.Device(path, kind, size, filesystem=filesystem, uuid=uuid, inside=inside, mounted=(), readonly=False, **rest)

def devices():
    filesystem = disk.run(["blkid", "--probe", "--match-tag", "TYPE", "--output", "value", root], check=False).stdout.strip()
    uuid = disk.filesystem_uuid(root) if filesystem else ""
    return [device(drive, "disk", inside=(device(root, "part", filesystem, uuid),))]

drives.devices = devices
drives.require_room_for_grub = lambda _: None
sys.exit(cli.main(sys.argv[2:]))
"""


class Parts(Disk):
    """An empty disk with partitions."""

    def __init__(self, image: Path, target: Target, rootfs: Path) -> None:
        super().__init__(image)
        self.target, self.rootfs = target, rootfs

    def make_btrfs(self) -> None:
        """With options that the installer's has not."""
        options = ["--csum", "xxhash", "--metadata", "dup", "--label", LABEL, "--uuid", UUID]
        program("mkfs.btrfs", "--quiet", "--force", *options, self.target.root)

    def install(self, *options: str, status: int = DONE) -> Outcome:
        """Run the installer on the partition of the root, for the BIOS, and assert its exit status."""
        devices = [self.target.root, self.target.drive]
        argv: list[str | Path] = [sys.executable, "-c", START, self.image.with_name("install.log"), *devices]
        argv += ["--rootfs", self.rootfs, *options]
        ended = subprocess.run(
            argv, cwd=CHECKOUT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert ended.returncode == status, ended
        return Outcome(ended.returncode, ended.stdout, ended.stderr)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """The root's file system, mounted from the same device as the installer has it."""
        top = self.image.with_name("top")
        top.mkdir(exist_ok=True)
        program("mount", self.target.root, top)
        try:
            yield top
        finally:
            program("umount", top)

    def superblock(self) -> dict[str, str]:
        said = program("btrfs", "inspect-internal", "dump-super", self.target.root)
        return dict(re.findall(r"^(fsid|label|csum_type)\s+(\S+)", said, re.MULTILINE))


@pytest.fixture
def parts(tmp_path: Path, rootfs: Path) -> Iterator[Parts]:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    with ExitStack() as stack:
        target = stack.enter_context(target_in(image, Sizes()))
        node = Path(f"/dev/ash-test-{os.getpid()}")  # GRUB's scripts would follow the name of a loop device to its file
        os.mknod(node, 0o600 | stat.S_IFBLK, target.root.stat().st_rdev)
        stack.callback(node.unlink)
        yield Parts(image, replace(target, root=node), rootfs)


def test_an_empty_btrfs_is_used_as_it_is(parts: Parts) -> None:
    parts.make_btrfs()
    before = parts.superblock()
    shown = parts.install("--keep-filesystem", "--dry-run").stdout
    assert "its empty btrfs file system is used as it is" in shown
    assert "mkfs.btrfs" not in shown
    parts.install("--keep-filesystem", "--yes")
    assert parts.superblock() == before == {"fsid": UUID, "label": LABEL, "csum_type": "1"}
    with parts.mounted() as top:
        assert (top / "@.snapshots_debian/ash/part").read_text() == f"{UUID}\n"
        assert UUID in (top / "@boot_debian/grub/grub.cfg").read_text()
        assert not (top / "@.snapshots_debian/unfinished").exists()
    assert "--mode 3 adds a system to those there" in parts.install("--keep-filesystem", status=REFUSED).stderr


def test_a_btrfs_with_something_on_it_is_refused(parts: Parts) -> None:
    keep = ["--keep-filesystem", "--yes"]
    assert "has no btrfs file system, but none" in parts.install(*keep, status=REFUSED).stderr
    parts.make_btrfs()
    with parts.mounted() as top:
        program("btrfs", "subvolume", "create", top / "data")
    error = parts.install(*keep, status=REFUSED).stderr
    assert "is not empty: it has data; without --keep-filesystem it is replaced" in error
    with parts.mounted() as top:
        (top / "data").rename(top / "@.snapshots_debian")
        (top / "@.snapshots_debian/rootfs").mkdir()
    assert "--mode 3 adds a system" in parts.install(*keep, status=REFUSED).stderr
    with parts.mounted() as top:
        (top / "@.snapshots_debian/unfinished").touch()
        (top / "file").touch()
    assert "it has file; without" in parts.install(*keep, status=REFUSED).stderr
    with parts.mounted() as top:
        (top / "file").unlink()
    assert "is used as it is" in parts.install(*keep, "--dry-run").stdout, (
        "what a killed installation left is no matter"
    )
    assert "--mode 3 keeps the file system anyway" in parts.install(*keep, "--mode", "3", status=USAGE).stderr
