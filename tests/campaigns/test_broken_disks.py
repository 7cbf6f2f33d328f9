# SPDX-License-Identifier: AGPL-3.0-or-later
"""The disk fails in the middle of a command: a clear error, and when the disk is well again, all is as it was or done."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import program
from tests.system.cuts import COMMANDS, Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(300)]

MIB = 1 << 20
ROOMS = (1, 3, 6, 12)  # MiB that can be written before the disk fails


@contextlib.contextmanager
def small_disk(folder: Path, image: Path, room: int) -> Iterator[Path]:
    """A copy of an image in a memory disk that is full after so many MiB: then writing to the image fails."""
    used = int(subprocess.run(["du", "--block-size=1", image], capture_output=True, check=True).stdout.split()[0])
    folder.mkdir()
    program("mount", "-t", "tmpfs", "-o", f"size={used + room * MIB}", "small", folder)
    try:
        copy = folder / "disk.img"
        program("cp", "--sparse=always", image, copy)
        yield copy
    finally:
        program("umount", "--lazy", folder)


@pytest.mark.parametrize("name", ["run", "install", "clone", "clone-tree", "del", "deploy", "undo", "desc", "mutable"])
def test_a_disk_that_fails_loses_nothing(scene: Scene, tmp_path: Path, name: str) -> None:
    words = COMMANDS[name]
    tried = scene.tried(words)
    failed = 0
    for room in ROOMS:
        with small_disk(tmp_path / str(room), scene.image, room) as image:
            ended = scene.run_on(image, words)
            failed += ended.returncode != 0
            assert "Traceback" not in ended.stderr, ended.stderr
            assert ended.returncode == 0 or ended.stderr.strip(), "it failed without a word"
            with scene.copy(words) as copy:
                program("cp", "--sparse=always", image, copy)
                view = scene.look(copy, words)
        tried.allows(view, f"{room} MiB")
    assert failed or name == "desc"
