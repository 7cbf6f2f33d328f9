# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ctrl-C just when a command has done what counts: all or nothing, as with every other moment."""

import pytest

from ash import SLOTS
from tests.support import SNAPSHOTS
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]

INTERRUPTED = 130


def interrupt(system: System, step: str, *words: str | int, **options: str) -> None:
    """Run ash, and press Ctrl-C when it has done the step of that name."""
    ended = system.with_hooks({**options, "interrupt": step}, *words)
    assert ended.returncode == INTERRUPTED, ended


@pytest.mark.parametrize("words", ["clone", "branch", "clone-tree", "cbranch", "ubranch 0", "new"])
def test_what_the_tree_names_is_there(system: System, snapshot: int, words: str) -> None:
    system.branch(snapshot)
    before = system.files.tree()
    interrupt(system, "rename .ash-new-fstree to fstree", *words.split(), *([snapshot] if words != "new" else []))
    assert system.files.tree() > before
    assert not system.remains()
    system.is_sound()


def test_what_a_rollback_has_put_into_the_tree_is_there(machine: Machine) -> None:
    before = machine.files.tree()
    interrupt(machine.system, "rename .ash-new-fstree to fstree", "rollback", booted=machine.slot)
    assert machine.files.tree() > before
    assert not machine.system.remains()
    machine.system.is_sound()


def test_what_a_rollback_has_deployed_is_there(machine: Machine, snapshot: int) -> None:
    machine.deploy(snapshot)
    before = machine.files.tree()
    slot = next(one for one in SLOTS if one != machine.slot)
    interrupt(machine.system, f"delete snapshot-new-{slot}", "rollback", booted=machine.slot)
    assert len(machine.files.tree() - before) == 1
    machine.system.ash("recover")
    assert machine.system.boots() == slot
    machine.system.is_sound()


def test_what_the_tree_does_not_name_is_gone(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        before = (system.files.state / "last").read_text()
        interrupt(system, f"rename .ash-new-{snapshot + 1}-desc to {snapshot + 1}-desc", "clone", snapshot)
        (system.files.state / "last").write_text(before)


@pytest.mark.parametrize("words", ["mutable", "undo"])
def test_a_snapshot_that_was_exchanged_keeps_its_predecessor(system: System, snapshot: int, words: str) -> None:
    system.shell(snapshot, "echo new > /etc/mark")
    known = system.id_of(snapshot)
    other = f"undo-{snapshot}" if words == "undo" else f"snapshot-chr{snapshot}"
    interrupt(system, f"exchange snapshot-{snapshot} and {other}", words, snapshot)
    assert system.id_of(snapshot) != known
    assert not system.remains()
    assert system.subvolumes()[f"{SNAPSHOTS}/rootfs/undo-{snapshot}"] == known
    if words == "mutable":
        system.ash("immutable", snapshot)
    system.is_sound()
