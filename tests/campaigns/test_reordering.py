# SPDX-License-Identifier: AGPL-3.0-or-later
"""Power cuts with a disk that reorders writes: it keeps all flushed writes and any subset of later ones.

ASH_TEST_PARTS is the number of random subsets that are tried after each flush of a command.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import DONE, Disk, program
from tests.system.faults.crash_scene import COMMANDS, DURABLE, Scene, is_whole, state_of_disk
from tests.write_log import Log, recorded, some_of

pytestmark = [pytest.mark.system, pytest.mark.budget(2700)]

PARTS = int(os.environ.get("ASH_TEST_PARTS", "1"))


def record(scene: Scene, name: str, directory: Path) -> tuple[Log, int]:
    """Record the writes of a command; returns the log, and the epoch in which the command ended.

    The disk stays mounted, as on a running system: otherwise ash would flush everything by unmounting it.
    """
    with scene.copy(COMMANDS[name]) as image:
        with recorded(image, directory / "log") as shown, Disk(shown).files():
            began = len(Log.load(directory / "log").epochs)
            ended = scene.run_on(shown, COMMANDS[name])
            assert ended.returncode == DONE, ended.stderr
            there = len(Log.load(directory / "log").epochs)
        log = Log.load(directory / "log")
        assert there > began, "nothing was flushed"
        with scene.copy(COMMANDS[name]) as again:
            log.apply(log.writes, again)
            assert log.content(image) == log.content(again), "not all was recorded"
    return log, there - 1


def disks(log: Log, disk: Path, there: int, chance: random.Random) -> Iterator[tuple[int, str, Path]]:
    """The disks that a power cut may leave, in the order of time, with the epoch of the cut; a command ends in `there`.

    For each flush: with nothing but flushed writes, and with random subsets of the writes before the next flush. What
    changed nothing that counts is left out.
    """
    copy, seen = disk.with_name("cut.img"), set[tuple[bool, bytes]]()
    for epoch, writes in enumerate(log.epochs):
        for part in range(PARTS + 1):
            program("cp", "--reflink=always", disk, copy)
            some = some_of(writes, chance) if part else []
            log.apply(some, copy)
            state = (epoch >= there, state_of_disk(copy))
            if state not in seen:
                yield epoch, f"after flush {epoch}, with {len(some)} blocks more (part {part})", copy
                seen.add(state)
        log.apply(writes, disk)


@pytest.mark.parametrize("name", COMMANDS)
def test_power_cuts_with_reordered_writes_lose_nothing(
    scene: Scene, name: str, record_property: Callable[[str, object], None]
) -> None:
    tried, cuts = scene.tried(COMMANDS[name]), 0
    log, there = record(scene, name, scene.directory)
    with scene.copy(COMMANDS[name]) as disk:
        for epoch, where, image in disks(log, disk, there, random.Random(name)):
            is_whole(image)
            is_done = name in DURABLE and epoch >= there
            view = scene.look(image, () if is_done else COMMANDS[name])
            tried.allows(view, where)
            if is_done:
                tried.is_done(view, where)
            cuts += 1
    record_property("cuts", cuts)
