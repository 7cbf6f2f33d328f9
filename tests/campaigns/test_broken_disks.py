# SPDX-License-Identifier: AGPL-3.0-or-later
"""The disk fails or fills up in the middle of each command: a clear error, and the change is done or not.

ASH_TEST_CUTS=all tests every step of every command, instead of a few.
"""

import os
from collections.abc import Callable

import pytest

from tests.system.faults.crash_scene import COMMANDS, Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(2400)]

Record = Callable[[str, object], None]
STEPS = 1000 if os.environ.get("ASH_TEST_CUTS") == "all" else 6


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fails_loses_nothing(scene: Scene, name: str, record_property: Record) -> None:
    tried, failed = scene.fails(name, STEPS, broken=True)
    record_property("cuts", tried)
    assert failed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_without_a_free_block_loses_nothing(scene: Scene, name: str, record_property: Record) -> None:
    scene.fails_without_any_room(name)
    record_property("cuts", 1)


def test_commands_that_free_space_work_without_any_space(scene: Scene) -> None:
    scene.works_without_room("del", "undo", "tmp", "unlock", "recover")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_loses_nothing(scene: Scene, name: str, record_property: Record) -> None:
    tried, _ = scene.fails(name, STEPS, broken=False)
    record_property("cuts", tried)
