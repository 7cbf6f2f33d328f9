# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is changed is what was meant: of copies of a disk the one that was named; not what runs, or ran last."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash import btrfs_partition, subvolume_id
from tests.support import ASH, DONE, FAILED, Disk, Outcome, program
from tests.system.container import Container
from tests.system.disk_system import System, open_system

pytestmark = [pytest.mark.system, pytest.mark.budget(40)]


@pytest.fixture
def other(image: Path, system: System, tmp_path: Path) -> Iterator[System]:
    """A copy of the system's disk as it was first, mounted at the same time."""
    with open_system(image, tmp_path) as other:
        yield other


def at_root(system: System, *words: str | int, status: int = DONE) -> Outcome:
    """Run ash on a system by its mount point."""
    argv = [*ASH, "--root", str(system.files.top), *map(str, words)]
    ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status, ended.stderr
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def test_of_two_copies_of_a_disk_the_one_that_was_named_is_changed(system: System, other: System) -> None:
    def new(disk: System, by_mount_point: bool) -> None:
        """Make a snapshot on one of the disks, and assert that it is there."""
        before = system.files.tree(), other.files.tree()
        answer = at_root(disk, "-q", "clone", 0) if by_mount_point else disk.ash("-q", "clone", 0)
        added = {int(answer.stdout)}
        expected = [tree | added if disk is one else tree for one, tree in zip((system, other), before, strict=True)]
        assert [system.files.tree(), other.files.tree()] == expected

    for disk, by_mount_point in [(other, True), (other, False), (other, True), (system, True), (system, False)] * 2:
        new(disk, by_mount_point)
    last = max(other.files.tree())
    at_root(other, "desc", last, "of the other")
    assert "of the other" in at_root(other, "tree").stdout
    assert "of the other" not in at_root(system, "tree").stdout
    at_root(other, "-y", "del", last)
    assert last not in other.files.tree()
    other.is_sound()
    system.is_sound()


def test_status_and_fsck_of_the_running_system_warn_of_a_copy_of_its_disk(system: System, other: System) -> None:
    container = Container(system)
    device = other.attached()
    number = os.stat(device).st_rdev
    node = f"mknod {device} b {os.major(number)} {os.minor(number)}"
    assert "warning" not in container.type("ash status").stdout
    assert f"{device} is a copy of this disk" in container.type(f"{node}; ash status").stdout
    assert f"{device} is a copy of this system's disk" in container.type(f"{node}; ash fsck", status=FAILED).stdout


def test_the_running_system_named_by_root_is_the_running_one(system: System) -> None:
    number = system.clone()
    container = Container(system)
    slot, before = container.slot, system.id_of(container.slot)
    container.type("echo drift > /etc/drift")
    for words in (f"deploy {number}", "deploy 0", f"deploy {number} --fresh-etc"):
        container.type(f"ash --root /.snapshots {words}")
        assert system.id_of(slot) == before
    assert container.type("ash --root /.snapshots whichtmp").stdout.strip() == slot
    container.type("mkdir /tmp/top; mount -o subvolid=5 /dev/vda /tmp/top; ash --root /tmp/top deploy 0")
    assert system.id_of(slot) == before


def test_what_ran_last_is_kept_on_a_disk_that_is_off_though_no_deploy_has_seen_it_run(disk: Disk) -> None:
    snapshot = disk.clone()
    slot = disk.ash("--json", "deploy", snapshot).json["slot"]
    with disk.files() as files:
        booted, before = files.state / "booted", subvolume_id(files.root(slot))
        booted.write_text((files.root(slot) / "usr/share/ash/deployment").read_text())  # as ash-booted.service does
        (files.root(slot) / "etc/precious").write_text("of the machine\n")
        assert "etc/precious" in disk.ash("diff").stdout
        for number in (disk.clone(), disk.clone(), disk.clone()):
            answer = disk.ash("--json", "deploy", number).json
            assert (answer["slot"] != slot, answer["carried"]) == (True, ["precious"])
            assert subvolume_id(files.root(slot)) == before
        kept = disk.ash("--json", "rollback").json
        assert (kept["from"], (files.root(kept["snapshot"]) / "etc/precious").exists()) == (snapshot, True)
        assert not (files.root(kept["snapshot"]) / "usr/share/ash/deployment").exists()
        booted.write_text(json.dumps({"slot": slot, "id": "of-another"}))  # that deployment is gone
        disk.ash("deploy", number)


def test_another_uuid_of_the_file_system_is_found_and_put_where_ash_names_it(disk: Disk) -> None:
    start, size = btrfs_partition(disk.image)
    loop = program("losetup", "--find", "--show", f"--offset={start}", f"--sizelimit={size}", disk.image).strip()
    program("btrfstune", "-u", loop, input="y\n")
    program("losetup", "--detach", loop)
    found = disk.ash("fsck", status=FAILED).stdout
    assert all(place in found for place in ("ash/part", "the fstab of snapshot-deploy", "GRUB is installed"))
    left = [
        problem["what"]
        for problem in disk.ash("--json", "fsck", "--repair", status=FAILED).json["damage"]
        if not problem["mended"]
    ]
    assert [what.startswith("GRUB is installed") for what in left] == [True], "it is not ash that installs GRUB"
    with disk.files() as files:
        uuid = program("blkid", "-o", "value", "-s", "UUID", loop_of(files.top)).strip()
        for path in (files.state / "part", files.root("deploy") / "etc/fstab", files.grub_cfg):
            assert uuid in path.read_text(), path
        names = (files.root("deploy") / "etc/fstab").read_text().split()
        assert {word for word in names if word.startswith("UUID=") and len(word) > 20} == {f"UUID={uuid}"}


def loop_of(top: Path) -> str:
    """The device of a mounted file system."""
    return program("findmnt", "--noheadings", "--output", "SOURCE", top).strip().partition("[")[0]
