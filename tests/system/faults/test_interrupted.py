# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ctrl-C right after the decisive step of a command: all or nothing, as at any other time."""

import pytest

from ash import SLOTS
from tests.support import SNAPSHOTS
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]

INTERRUPTED = 130


def interrupt(system: System, step: str, *words: str | int, **options: str) -> None:
    """Run ash, and send SIGINT right after the step of that name."""
    ended = system.with_hooks({**options, "interrupt": step}, *words)
    assert ended.returncode == INTERRUPTED, ended


@pytest.mark.parametrize("words", ["clone", "branch", "clone-tree", "cbranch", "ubranch 0", "new"])
def test_after_ctrl_c_every_snapshot_of_the_tree_exists(system: System, snapshot: int, words: str) -> None:
    system.branch(snapshot)
    before = system.files.tree()
    interrupt(system, "rename .ash-new-fstree to fstree", *words.split(), *([snapshot] if words != "new" else []))
    assert system.files.tree() > before
    assert not system.remains()
    system.is_sound()


def test_after_ctrl_c_the_snapshot_of_a_rollback_exists(machine: Machine) -> None:
    before = machine.files.tree()
    interrupt(machine.system, "rename .ash-new-fstree to fstree", "rollback", booted=machine.slot)
    assert machine.files.tree() > before
    assert not machine.system.remains()
    machine.system.is_sound()


def test_after_ctrl_c_the_deployment_of_a_rollback_exists(machine: Machine, snapshot: int) -> None:
    machine.deploy(snapshot)
    before = machine.files.tree()
    slot = next(one for one in SLOTS if one != machine.slot)
    interrupt(machine.system, f"delete snapshot-new-{slot}", "rollback", booted=machine.slot)
    assert len(machine.files.tree() - before) == 1
    machine.system.ash("recover")
    assert machine.system.boots() == slot
    machine.system.is_sound()


def test_after_ctrl_c_a_deleted_snapshot_is_gone(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        before = (system.files.state / "last").read_text()
        interrupt(system, f"rename .ash-new-{snapshot + 1}-desc to {snapshot + 1}-desc", "clone", snapshot)
        (system.files.state / "last").write_text(before)


@pytest.mark.parametrize("words", [["run", "N", "true"], ["tree-run", "N", "true"]])
def test_ctrl_c_as_a_program_ends_is_an_interruption(system: System, snapshot: int, words: list[str]) -> None:
    ended = system.with_hooks({"interrupt at an end": True}, *(snapshot if word == "N" else word for word in words))
    assert (ended.returncode, "No such process" in ended.stderr) == (INTERRUPTED, False), ended
    assert not system.remains()
    system.is_sound()


@pytest.mark.parametrize("words", ["mutable", "undo"])
def test_after_ctrl_c_an_exchanged_snapshot_keeps_its_undo(system: System, snapshot: int, words: str) -> None:
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
