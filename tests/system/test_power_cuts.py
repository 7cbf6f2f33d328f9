# SPDX-License-Identifier: AGPL-3.0-or-later
"""The power goes at steps of commands: the file system is whole, GRUB finds what it boots, all is done or nothing.

With ASH_TEST_CUTS=all at every step of every command, else at those of a transaction and of a deployment.
"""

import os
from pathlib import Path

import pytest

from tests.system.cuts import COMMANDS, Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(300)]

NAMES = list(COMMANDS) if os.environ.get("ASH_TEST_CUTS") == "all" else ["run", "deploy"]
DURABLE = {"run", "install", "remove", "tree-run", "deploy", "deploy 2", "rollback", "undo", "mutable", "etc-update"}


@pytest.fixture(scope="module")
def scene(reflinks: Path, image: Path) -> Scene:
    return Scene(reflinks, image)


@pytest.mark.parametrize("name", NAMES)
def test_after_a_power_cut_a_command_has_done_all_or_nothing(scene: Scene, name: str) -> None:
    words = COMMANDS[name]
    steps = ["after it", *scene.steps(words)]
    before, after = scene.outcomes(words)
    possible = {before.boots, after.boots, scene.last_booted}
    for step, view in scene.cut(words, range(len(steps))):
        assert view in (before, after), f"at step {step}, {steps[step]}"
        assert view.boots in possible, f"at step {step}, {steps[step]}"
        if step == 0 and name in DURABLE:
            assert (view, view.boots) == (after, after.boots), "what was done is not on the disk"
