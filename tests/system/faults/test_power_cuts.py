# SPDX-License-Identifier: AGPL-3.0-or-later
"""Power cuts during commands: the file system is sound, GRUB finds its files, a command did everything or nothing.

At every other step of a transaction and a deploy, and at every step of a transaction that only changes /var; steps at
which nothing new has reached the disk are left out.
The campaign tries every step of every command.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import Disk, Terminal, processes_with, program, wait_until
from tests.system.faults.crash_scene import Scene

pytestmark = [pytest.mark.system, pytest.mark.budget(150)]


@pytest.mark.parametrize(("name", "by"), [("run", 2), ("deploy", 2), ("refresh", 1)])
def test_after_a_power_cut_a_command_did_everything_or_nothing(
    scene: Scene, name: str, by: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("cuts", scene.check_power_cuts(name, by))


def test_an_entry_of_var_is_on_the_disk_before_the_note_that_it_is_merged(scene: Scene) -> None:
    words = ["recover"]
    tried = scene.tried(words)
    noted = tried.steps.index("note that lib/mark is merged")
    # The decision on the next entry has been synced, which must not sync that note, as nothing else was.
    step = next(at for at, name in enumerate(tried.steps, 1) if at > noted + 1 and name.startswith("copy "))
    for _, view in scene.cut(words, [step]):
        tried.allows(view, f"at step {step}, {tried.steps[step - 1]}")


def test_after_a_power_cut_work_kept_by_a_hang_up_can_be_resumed(scene: Scene) -> None:
    words = ["chroot", "1"]
    with scene.copy(words) as copy, tempfile.TemporaryDirectory(dir=scene.directory) as copies:
        with Terminal(scene.argv(copy, words, copies=copies)) as terminal:
            terminal.expect("exit")
            terminal.type("seq 9999 > /usr/mark; sleep 4733\n")
            wait_until(lambda: processes_with("4733"))
        last = max(Path(copies).iterdir(), key=lambda path: int(path.stem))  # when the session had been kept
        resumed = Disk(last).ash(*words, "--resume", input="tail -n 1 /usr/mark\n")
        assert "9999\n" in resumed.stdout


def test_after_a_power_cut_the_history_is_complete(scene: Scene) -> None:
    with scene.copy(["clone"]) as copy, Disk(copy).files():
        number = Disk(copy).clone(1)
        program("cp", "--reflink=always", copy, copy.with_name("cut.img"))
        last = Disk(copy.with_name("cut.img")).ash("--json", "log").json["history"][-1]
    assert (last["command"], last["snapshots"]) == ("clone", [1, number])
