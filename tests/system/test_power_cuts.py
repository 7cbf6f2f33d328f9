# SPDX-License-Identifier: AGPL-3.0-or-later
"""The power goes at steps of commands: the file system is whole, GRUB finds what it boots, all is done or nothing.

At every other step of a transaction and of a deployment, at each of a transaction that changes /var alone; the
campaign takes all of every command.
"""

from collections.abc import Callable

import pytest

from tests.system.cuts import Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(150)]


@pytest.mark.parametrize(("name", "by"), [("run", 2), ("deploy", 2), ("refresh", 1)])
def test_after_a_power_cut_a_command_has_done_all_or_nothing(
    scene: Scene, name: str, by: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("cuts", scene.check_power_cuts(name, by))
