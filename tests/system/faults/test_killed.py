# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every command that changes something is killed at its steps: all or nothing, and the next command works.

At every other step of a transaction's and a deployment's, at two of the others'; the campaign takes all.
"""

from collections.abc import Callable

import pytest

from ash import COMMANDS as TABLE
from tests.system.faults.crash_scene import COMMANDS, ELSEWHERE, LIKE_RUN, Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(300)]

WHOLE = {"run", "deploy"}


def test_every_command_that_changes_something_is_killed() -> None:
    changing = {command.name for command in TABLE if command.changes or command.changes_with}
    assert changing == {name.split()[0] for name in COMMANDS} | LIKE_RUN | ELSEWHERE


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_has_done_all_or_nothing(
    scene: Scene, name: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("cuts", scene.check_kills(name, by=2 if name in WHOLE else None))
