# SPDX-License-Identifier: AGPL-3.0-or-later
"""The intent file: what recovery makes of each state, also as ash 0.1.0 wrote it before each had a record of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

import ash
from ash import AshError, Layout, System
from distros.debian.ashpk import Debian

pytestmark = pytest.mark.budget(5)

CALLER = {"user": 1000, "command": "install", "arguments": ["install", "5", "hello"]}
RECORDS: list[ash.Intent] = [
    ash.Open(CALLER, [2, 1]),
    ash.Kept(CALLER, [2, 1]),
    ash.LiveChange("deploy", 260, ["lib/x"], [2, 1]),
    ash.Commit(
        261, 262, ["lib/x"], ["lib/x"], ["boot", "etc"], {"packages": {"added": {"x": "1"}}}, CALLER, "c0ffee", [2, 1]
    ),
    ash.Merge(["cache/x"], ["cache/x"], {}, CALLER, "c0ffee", [2, 1]),
    ash.Birth(3, 0, "a branch", CALLER, "c0ffee"),
    ash.Deletion([5, 6], CALLER, "c0ffee"),
]


def older(state: str, **more: Any) -> str:
    """An intent file as an older ash wrote it: all fields for all states."""
    fields = {"state": state, "old": 0, "new": 0, "entries": [], "copies": [], "delete": [], "homes": [], "slot": ""}
    return json.dumps({**fields, **more})


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A system of which only ash's own directory is there."""
    layout = Layout.at(tmp_path, "debian")
    for directory in (layout.work(5), layout.ash / "snapshots", layout.snapshots / "rootfs"):
        directory.mkdir(parents=True)
    layout.tree.write_text('{"name": "root", "children": [{"name": 0}]}\n')
    return System(layout, Debian())


@pytest.mark.parametrize("intent", RECORDS, ids=lambda intent: type(intent).__name__)
def test_what_is_written_is_read_back(intent: ash.Intent, tmp_path: Path) -> None:
    ash.save_intent(tmp_path, intent)
    loaded = ash.load_intent(tmp_path)
    assert (type(loaded), loaded) == (type(intent), intent)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (older("open", homes=["ada"], caller=CALLER), ash.Open(CALLER)),
        (older("kept", homes=["ada"], caller=CALLER), ash.Kept(CALLER)),
        (
            older("commit", old=261, new=262, entries=["lib/x"], copies=["boot", "etc"], delete=["lib/x"], caller=CALLER),
            ash.Commit(261, 262, ["lib/x"], ["lib/x"], ["boot", "etc"], {}, CALLER),
        ),
        (
            older("merge", entries=["cache/x"], delete=["cache/x"], homes=["ada"], caller=CALLER),
            ash.Merge(["cache/x"], ["cache/x"], {}, CALLER),
        ),
        (older("live", old=260, entries=["lib/x"], slot="deploy"), ash.LiveChange("deploy", 260, ["lib/x"])),
        (older("number", caller=CALLER, source=3), ash.Birth(3, caller=CALLER)),
        (older("number"), ash.Deletion()),
    ],
)  # fmt: skip
def test_what_an_older_ash_wrote_is_read(text: str, expected: ash.Intent, tmp_path: Path) -> None:
    (tmp_path / "intent").write_text(text)
    loaded = ash.load_intent(tmp_path)
    assert (type(loaded), loaded) == (type(expected), expected)


def test_a_live_change_does_not_delete_what_a_transaction_of_the_same_snapshot_has(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[Path] = []
    monkeypatch.setattr(ash, "delete_subvolume", deleted.append)
    ash.LiveWorkDir(system, 5).drop()
    theirs = {system.layout.copy(directory, "new-5") for directory in ("etc", "boot")}
    assert not theirs & {*deleted}
    ash.WorkDir(system, 5).drop()
    assert theirs <= {*deleted}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "x"}', '{"state": []}', older("commit", new="x")])
def test_a_damaged_file_has_a_hint_how_to_drop_it(text: str, tmp_path: Path) -> None:
    work = tmp_path / "5"
    work.mkdir()
    (work / "intent").write_text(text)
    with pytest.raises(AshError) as caught:
        ash.load_intent(work)
    assert caught.value.hint == "ash unlock 5 drops it"


def test_the_birth_of_a_snapshot_is_recorded_once(system: System) -> None:
    with system.editing_tree() as tree:
        tree.add(5, 0)
    for _ in range(2):
        ash.save_intent(system.layout.work(5), ash.Birth(3, 0, "a branch", CALLER, "c0ffee"))
        system.workdir(5).recover(system.tree())
    (line,) = system.history.read()
    assert (line["from"], line["parent"], line["description"], line["snapshots"]) == (3, 0, "a branch", [0, 3, 5])
    assert not system.workdir(5).leftovers()


def test_for_old_births_the_tree_has_the_parent(system: System) -> None:
    with system.editing_tree() as tree:
        tree.add(5, 0)
    system.layout.description(5).write_text("a branch\n")
    (system.layout.work(5) / "intent").write_text(older("number", caller=CALLER, source=3))
    system.workdir(5).recover(system.tree())
    (line,) = system.history.read()
    assert (line["from"], line["parent"], line["description"]) == (3, 0, "a branch")


def test_one_line_records_all_snapshots_deleted_together(system: System) -> None:
    for number in (5, 6):
        system.layout.work(number).mkdir(exist_ok=True)
        ash.save_intent(system.layout.work(number), ash.Deletion([5, 6], CALLER, "c0ffee"))
    deletion = ash.load_intent(system.layout.work(5))
    assert isinstance(deletion, ash.Deletion)
    for number in (5, 6):
        deletion.record(system.workdir(number), again=True)
    (line,) = system.history.read()
    assert (line["deleted"], line["snapshots"], line["command"]) == ([5, 6], [5, 6], "install")
    assert not system.recorded, "it was another process's command"


def test_a_kept_session_is_not_recovered(system: System) -> None:
    ash.save_intent(system.layout.work(5), ash.Kept())
    with pytest.raises(AshError, match="hung up") as caught:
        system.workdir(5).recover(system.tree())
    assert caught.value.status == ash.REFUSED
