# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every command that changes something is killed at the steps of its way: all or nothing, and the next one works.

With ASH_TEST_CUTS=all at every step of every command, else at every one of a transaction's and a deployment's, and at
a few of the others'.
"""

import os
from pathlib import Path

import pytest

from ash import COMMANDS as TABLE
from tests.system.cuts import COMMANDS, ELSEWHERE, LIKE_RUN, Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(500)]

WHOLE = {"run", "deploy"}
FEW = 2


def chosen(name: str, steps: int) -> range:
    """The steps at which a command is cut."""
    every = name in WHOLE or os.environ.get("ASH_TEST_CUTS") == "all"
    return range(1, steps + 1, 1 if every else max(1, steps // FEW))


@pytest.fixture(scope="module")
def scene(reflinks: Path, image: Path) -> Scene:
    return Scene(reflinks, image)


def test_every_command_that_changes_something_is_cut() -> None:
    changing = {command.name for command in TABLE if command.changes}
    assert changing == {name.split()[0] for name in COMMANDS} | LIKE_RUN | ELSEWHERE


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_has_done_all_or_nothing(scene: Scene, name: str) -> None:
    words = COMMANDS[name]
    steps = scene.steps(words)
    before, after = scene.outcomes(words)
    possible = {before.boots, after.boots, scene.last_booted}
    for step in chosen(name, len(steps)):
        view = scene.killed(words, step)
        assert view in (before, after), f"before step {step}, {steps[step - 1]}"
        assert view.boots in possible, f"before step {step}, {steps[step - 1]}"
