# SPDX-License-Identifier: AGPL-3.0-or-later
"""Disks that fail, are full or read-only: a clear error, and nothing is lost. See also tests/campaigns."""

import subprocess
from pathlib import Path

import pytest

from ash import MS_BIND, MS_RDONLY, MS_REMOUNT, mount
from tests.support import ASH, DONE, FAILED, REFUSED, Disk, program
from tests.system.faults.crash_scene import Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]


def test_a_disk_that_fills_up_loses_nothing(scene: Scene) -> None:
    _, failed = scene.fails("run", 2, broken=False)
    assert failed
    scene.fails("undo", 2, broken=False)  # its end takes space; the reserve has it


def test_a_disk_that_fails_loses_nothing(scene: Scene) -> None:
    _, failed = scene.fails("deploy", 2, broken=True)
    assert failed


def test_commands_that_free_space_work_without_any(scene: Scene) -> None:
    scene.works_without_room("del", "undo", "tmp")


def test_a_read_only_image_is_refused(disk: Disk) -> None:
    content = disk.image.stat()
    mount(disk.image, disk.image, flags=MS_BIND)
    try:
        mount("none", disk.image, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
        assert "Read-only file system" in disk.ash("clone", 0, status=FAILED).error
    finally:
        program("umount", disk.image)
    assert disk.image.stat().st_mtime_ns == content.st_mtime_ns
    disk.ash("clone", 0)


@pytest.mark.parametrize("how", [["-o", "remount,ro"], ["-o", "remount,bind,ro"]])
def test_a_read_only_mount_is_read_but_not_changed(disk: Disk, how: list[str]) -> None:
    with disk.files() as files:
        program("mount", *how, files.top)
        before = disk.image.stat().st_mtime_ns
        for words in (["tree"], ["--json", "list", "0"], ["status"], ["fsck"]):
            assert on(files.top, *words).returncode == DONE, words
        for words in (
            ["clone", "0"],
            ["-y", "del", "0"],
            ["deploy", "0"],
            ["recover"],
            ["desc", "0", "x"],
            ["--dry-run", "clone", "0"],
        ):
            ended = on(files.top, *words)
            assert ended.returncode == REFUSED, words
            assert ended.stderr == f"ash: {files.top} is mounted read-only (mount -o remount,rw {files.top})\n"
        assert program("findmnt", "--noheadings", "--output", "OPTIONS", files.top).startswith("ro")
        program("mount", "-o", "remount,rw", files.top)
        assert on(files.top, "desc", "0", "x").returncode == DONE
    assert disk.image.stat().st_mtime_ns != before


def test_fsck_works_on_a_read_only_file_system(disk: Disk) -> None:
    with disk.files() as files:
        for name in ("work/0/intent", "menu"):
            (files.state / name).parent.mkdir(exist_ok=True)
            (files.state / name).write_text("torn")
        program("mount", "-o", "remount,ro", files.top)
        ended = on(files.top, "fsck")
        assert ended.returncode == FAILED, ended
        assert "snapshot 0: the intent file of snapshot 0 is damaged" in ended.stdout
        assert "the menu file" in ended.stdout
        program("mount", "-o", "remount,rw", files.top)


def test_a_failed_recovery_says_so(disk: Disk) -> None:
    number, other = disk.clone(), disk.clone()
    with disk.files() as files:
        (files.state / f"work/{number}/intent").write_text("torn")
        (files.state / f"work/{other}/intent").write_text('{"state": "open"}')
    for options in ([], ["-q"], ["--json"]):
        ended = disk.ash(*options, "recover", status=FAILED)
        assert f"the intent file of snapshot {number} is damaged" in ended.stderr
    disk.ash("run", other, "true")
    disk.ash("unlock", number)
    disk.ash("recover")


def on(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ash on the file system mounted at a directory."""
    return subprocess.run([*ASH, "--root", directory, *words], capture_output=True, text=True, check=False)
