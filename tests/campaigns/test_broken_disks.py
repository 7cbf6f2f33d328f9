# SPDX-License-Identifier: AGPL-3.0-or-later
"""The disk fails or fills up in the middle of each command: a clear error, and the change is done or not.

ASH_TEST_CUTS=all tests every step of every command, instead of a few.
"""

import os

import pytest

from tests.system.faults.crash_scene import COMMANDS, Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(2400)]

STEPS = 1000 if os.environ.get("ASH_TEST_CUTS") == "all" else 6


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_loses_nothing(scene: Scene, name: str) -> None:
    scene.fails(name, STEPS, broken=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fails_loses_nothing(scene: Scene, name: str) -> None:
    assert scene.fails(name, STEPS, broken=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_without_a_free_block_loses_nothing(scene: Scene, name: str) -> None:
    scene.fails_without_any_room(name)


def test_commands_that_free_space_work_without_any_space(scene: Scene) -> None:
    scene.works_without_room("del", "undo", "tmp", "unlock", "recover")
