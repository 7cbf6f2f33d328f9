# SPDX-License-Identifier: AGPL-3.0-or-later
"""The history, `log`, `sub` and `status`."""

import json
from pathlib import Path
from typing import Any

import pytest

from ash import Lock
from tests.support import FAILED, make_deb
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(70)]


INTERRUPTED = 130
FAILS_HERE = "[ ! -e /etc/fail-here ] || exit 3"


def entries_of(system: System, command: str, snapshot: int) -> list[dict[str, Any]]:
    history = system.ash("--json", "log", snapshot).json["history"]
    return [entry for entry in history if entry["command"] == command]


def test_a_change_succeeds_even_if_the_history_cannot_be_written(system: System, snapshot: int) -> None:
    with Lock(system.files.state / "work/state/lock", "the test"):
        assert "not yet in the history" in system.ash("run", snapshot, "touch", "/etc/mark").stderr
    assert (system.root(snapshot) / "etc/mark").exists()
    assert not entries_of(system, "run", snapshot)
    system.ash("run", snapshot, "touch", "/etc/later")  # recovers first
    assert [entry["arguments"][-1] for entry in entries_of(system, "run", snapshot)] == ["/etc/mark", "/etc/later"]
    system.is_sound()


def test_every_change_of_every_command_is_in_the_history(system: System, snapshot: int, tmp_path: Path) -> None:
    deb = make_deb(tmp_path, "ash-test-log", "1")
    newer = make_deb(tmp_path, "ash-test-log", "2")
    done: list[list[Any]] = [
        ["clone", snapshot], ["branch", snapshot], ["cbranch", snapshot], ["ubranch", 0, snapshot], ["clone-tree", snapshot],
        ["new"], ["desc", snapshot, "some", "text"], ["run", snapshot, "touch", "/etc/x"], ["tree-run", snapshot, "touch", "/etc/y"],
        ["undo", snapshot], ["mutable", snapshot], ["immutable", snapshot], ["immen", snapshot], ["install", snapshot, deb],
        ["install", snapshot, newer], ["remove", snapshot, "ash-test-log"], ["deploy", snapshot], ["boot", snapshot], ["deploy", 0],
    ]  # fmt: skip
    for words in done:
        before = len(system.ash("--json", "log").json["history"])
        system.ash(*words)
        new = system.ash("--json", "log").json["history"][before:]
        assert len(new) == (2 if words[0] in ("clone-tree", "tree-run") else 1), "a line for each snapshot"
        for entry in new:
            assert (entry["command"], entry["result"], entry["user"]) == (words[0], "done", 0)
            assert entry["arguments"][-len(words) :] == [str(word) for word in words]
    of_packages = [
        e["packages"]
        for e in system.ash("--json", "log", snapshot).json["history"]
        if e["command"] in ("install", "remove")
    ]
    nothing: dict[str, Any] = {"added": {}, "removed": {}, "upgraded": {}}
    assert of_packages == [
        {**nothing, "added": {"ash-test-log": "1"}},
        {**nothing, "upgraded": {"ash-test-log": ["1", "2"]}},
        {**nothing, "removed": {"ash-test-log": "2"}},
    ]
    assert "^ash-test-log" in system.ash("log", snapshot).stdout


def test_the_history_records_the_origin_of_each_snapshot(system: System, snapshot: int) -> None:
    child = system.branch(snapshot)
    for words in (["cbranch", child], ["ubranch", child, 0], ["clone-tree", child], ["clone-tree", snapshot], ["new"]):
        system.ash(*words)
    system.ash("-y", "del", child)
    parents: dict[int, int | None] = {0: None}
    for entry in system.ash("--json", "log").json["history"]:
        if entry["result"] != "done":
            continue
        if entry["command"] == "del":
            for number in entry["snapshots"]:
                del parents[number]
        copies = {int(old): new for old, new in entry.get("copies", {}).items()}
        for old, new in copies.items():
            parents[new] = entry["parent"] if old == entry["from"] else copies.get(parents[old] or 0, parents[old])
        if "from" in entry and not copies:
            assert entry["from"] in parents
            parents[entry["snapshot"]] = entry.get("parent")
    tree = system.ash("--json", "tree").json["tree"]
    assert parents == {row["snapshot"]: row["parent"] for row in tree}


def test_failed_changes_are_in_the_history(system: System, snapshot: int, tmp_path: Path) -> None:
    broken = make_deb(tmp_path, "ash-test-broken", postinst="exit 3")
    for words, status in (
        (["run", snapshot, "false"], 1),
        (["install", snapshot, broken], FAILED),
        (["tree-run", snapshot, "false"], FAILED),
    ):
        before = len(system.ash("--json", "log", snapshot).json["history"])
        system.ash(*map(str, words), status=status)
        entries = system.ash("--json", "log", snapshot).json["history"]
        assert len(entries) == before + 1, words
        assert entries[-1]["command"] == words[0]
        assert entries[-1]["result"] != "done"


def test_packages_of_several_snapshots_are_in_the_history(system: System, snapshot: int, tmp_path: Path) -> None:
    other = system.clone()
    system.ash("install", "--snapshots", snapshot, other, "-p", make_deb(tmp_path, "ash-test-two"))
    entries = system.ash("--json", "log").json["history"][-2:]
    assert [entry["snapshots"] for entry in entries] == [[snapshot], [other]]
    assert [entry["packages"]["added"] for entry in entries] == [{"ash-test-two": "1"}] * 2
    assert "+ash-test-two" in system.ash("log", other).stdout


def test_changes_before_a_failure_are_in_the_history(system: System, snapshot: int, tmp_path: Path) -> None:
    broken = system.clone()
    deb = make_deb(tmp_path, "ash-test-part", preinst=FAILS_HERE)
    system.shell(broken, "touch /etc/fail-here")
    ended = system.ash("install", "--snapshots", snapshot, broken, "-p", deb, status=FAILED)
    assert f"snapshot {snapshot} changed" in ended.stderr
    done, failed = system.ash("--json", "log", snapshot).json["history"][-2:]
    assert (done["snapshots"], done["result"]) == ([snapshot], "done")
    assert done["packages"]["added"] == {"ash-test-part": "1"}
    assert failed["snapshots"] == [snapshot, broken]
    assert failed["result"] != "done"


def test_changes_before_ctrl_c_are_in_the_history(system: System, snapshot: int, tmp_path: Path) -> None:
    deb = make_deb(tmp_path, "ash-test-late")
    ended = system.with_hooks({"interrupt": "remove merged"}, "install", snapshot, str(deb))
    assert ended.returncode == INTERRUPTED, ended
    assert f"snapshot {snapshot} changed" in ended.stderr
    done, interrupted = system.ash("--json", "log", snapshot).json["history"][-2:]
    assert (done["result"], interrupted["result"]) == ("done", "interrupted")
    assert done["packages"]["added"] == {"ash-test-late": "1"}


def test_changes_finished_by_recovery_are_in_the_history(system: System, snapshot: int, tmp_path: Path) -> None:
    deb = make_deb(tmp_path, "ash-test-killed")
    system.killed_before("exchange", "install", snapshot, str(deb))
    system.ash("recover")
    assert not entries_of(system, "install", snapshot), "it was dropped"
    system.killed_before(f"rename snapshot-chr{snapshot} to", "install", snapshot, str(deb))
    system.ash("recover")
    (entry,) = entries_of(system, "install", snapshot)
    assert (entry["result"], entry["user"], entry["arguments"][-1]) == ("done", 0, str(deb))
    assert entry["packages"]["added"] == {"ash-test-killed": "1"}


def test_the_birth_of_a_snapshot_may_be_recorded_by_recovery(system: System, snapshot: int) -> None:
    system.killed_before("remove intent", "branch", snapshot)
    system.ash("recover")
    (entry,) = entries_of(system, "branch", snapshot + 1)
    assert (entry["snapshot"], entry["from"], entry["parent"]) == (snapshot + 1, snapshot, snapshot)
    system.killed_before("write fstree", "del", snapshot + 1, "-y")
    system.ash("recover")
    assert not entries_of(system, "del", snapshot + 1), "it was not deleted"


def test_the_history_of_one_snapshot_and_who_did_it(
    system: System, snapshot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = system.clone()
    monkeypatch.setenv("SUDO_UID", "1234")
    system.shell(other, "touch /etc/x")
    mine = system.ash("--json", "log", other).json["history"]
    assert [entry["command"] for entry in mine] == ["clone", "run"]
    assert mine[-1]["user"] in (1234, int(Path("/proc/self/loginuid").read_text().strip()))
    assert all(entry["command"] != "run" for entry in system.ash("--json", "log", snapshot).json["history"])


def test_a_torn_line_of_the_history_is_skipped(system: System, snapshot: int) -> None:
    with (system.files.state / "history").open("a") as history:
        history.write('{"time": "2026-01-0')
    before = len(system.ash("--json", "log").json["history"])
    system.ash("desc", snapshot, "after", "a", "crash")
    entries = system.ash("--json", "log").json["history"]
    assert len(entries) == before + 1
    assert entries[-1]["command"] == "desc"


def test_sub_lists_the_subvolumes_of_the_distribution(system: System, snapshot: int) -> None:
    system.shell(snapshot, "touch /etc/x")
    rows = {row["path"]: row for row in system.ash("--json", "sub").json["subvolumes"]}
    there = system.subvolumes()
    assert {path: row["id"] for path, row in rows.items()} == there
    assert {path for path, row in rows.items() if not row["readonly"]} == system.files.writable()
    assert f"rootfs/undo-{snapshot}" in system.ash("sub").stdout


def test_status_shows_the_next_boot_and_running_changes(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    status = system.ash("--json", "status").json
    assert (status["next"]["snapshot"], status["next"]["slot"]) == (snapshot, system.files.default_slot())
    assert status["booted"] == {"snapshot": None, "slot": None}
    assert 0 < status["free_bytes"] < status["size_bytes"]
    assert (status["running"], status["waiting"]) == ({}, [])
    other = system.clone()
    with system.at_work(other, "true"):
        running = system.ash("--json", "status").json["running"]
        assert list(running) == [str(other)]
        assert "pid" in running[str(other)]
        assert f"snapshot {other}" in system.ash("status").stdout
    system.ash("deploy", 0)


def test_status_shows_drift_and_unfinished_work(system: System, snapshot: int) -> None:
    with system.terminal("chroot", snapshot) as terminal:
        terminal.expect("#")
        terminal.type("touch /etc/x\n")
        terminal.expect("#")
    slot = json.loads((system.files.state / "menu").read_text())
    running = slot["last_booted"] or slot["default"]
    (system.root(running) / "etc/drifted").touch()
    status = system.ash("--json", "status").json
    assert status["waiting"] == [snapshot]
    assert status["drift"]["drifted"] == "added"
    assert f"ash chroot {snapshot} --resume" in system.ash("status").stdout
    system.ash("unlock", snapshot)
    (system.root(running) / "etc/drifted").unlink()


def test_what_a_deploy_leaves_behind_is_in_the_history(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot, "--fresh-etc")
    slot = system.files.default_slot()
    menu = json.loads((system.files.state / "menu").read_text())
    running = system.root(menu["last_booted"] or slot)
    (running / "etc/motd").write_text("of the running system\n")
    other = system.clone(snapshot)
    system.shell(other, "echo of the snapshot >/etc/motd")
    answer = system.ash("--json", "deploy", other).json
    assert "motd" in answer["conflicts"]
    (entry,) = entries_of(system, "deploy", other)
    assert entry["conflicts"] == answer["conflicts"]
    assert entry["slot"] == answer["slot"]


def test_the_deployment_of_a_rollback_is_in_the_history(system: System) -> None:
    answer = system.ash("--json", "rollback").json
    entries = entries_of(system, "rollback", answer["snapshot"])
    assert [entry["slot"] for entry in entries if "slot" in entry] == [answer["slot"]]
    assert {entry["from"] for entry in entries} == {answer["from"]}


def test_a_copy_is_in_the_history_of_its_new_parent(system: System, snapshot: int) -> None:
    parent = system.clone()
    system.ash("ubranch", parent, snapshot)
    assert len(entries_of(system, "ubranch", parent)) == 1
