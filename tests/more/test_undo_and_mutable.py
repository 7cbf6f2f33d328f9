# SPDX-License-Identifier: AGPL-3.0-or-later
"""Undo, mutable snapshots and directories, the commands on the tree, the history, differences, and damage."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from ash import changed_paths
from tests.support import DONE, FAILED, LOCKED, MISSING, REFUSED, USAGE, make_deb, program
from tests.system.lab import System

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]


def tree_of(system: System) -> dict[int, int | None]:
    """The parent of each snapshot."""
    return {row["snapshot"]: row["parent"] for row in system.ash("--json", "tree").json["tree"]}


def number(system: System, *words: str | int) -> int:
    """Run a command that prints a new number."""
    return int(system.ash("-q", *words).stdout)


def mark(system: System, snapshot: int) -> str:
    """What the tests write into a snapshot to know it again."""
    path = system.root(snapshot) / "etc/mark"
    return path.read_text().strip() if path.exists() else ""


# Undo


def test_undo_is_the_state_before_and_a_second_one_is_redo(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mark; echo b > /boot/mark")
    system.shell(snapshot, "echo two > /etc/mark; rm /boot/mark")
    for expected, in_boot in (("one", True), ("two", False), ("one", True)):
        answer = system.ash("--json", "undo", snapshot).json
        assert (answer["changed"], answer["snapshot"]) == (True, snapshot)
        assert mark(system, snapshot) == expected
        assert (system.files.etc(snapshot) / "mark").read_text().strip() == expected
        assert (system.files.boot(snapshot) / "mark").exists() == in_boot
        system.is_sound()


def test_after_undo_a_change_begins_from_there(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mark")
    system.shell(snapshot, "echo two > /etc/mark")
    system.ash("undo", snapshot)
    system.shell(snapshot, "cat /etc/mark > /etc/seen; echo three > /etc/mark")
    assert (system.root(snapshot) / "etc/seen").read_text() == "one\n"
    system.ash("undo", snapshot)
    assert mark(system, snapshot) == "one"


def test_undo_of_a_snapshot_that_was_never_changed_is_refused(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        assert "has not been changed" in system.ash("undo", snapshot, status=REFUSED).error


def test_undo_refuses_the_base_what_is_deployed_and_what_does_not_exist(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mark")
    system.ash("undo", 0, status=REFUSED)
    system.ash("undo", 999999, status=MISSING)
    system.ash("undo", status=USAGE)
    system.ash("deploy", snapshot)
    assert "deployed" in system.ash("undo", snapshot, status=REFUSED).error
    assert mark(system, snapshot) == "one"
    system.ash("deploy", 0)


def test_undo_of_a_snapshot_that_is_being_changed_is_locked(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mark")
    with system.at_work(snapshot, "true"):
        system.ash("undo", snapshot, status=LOCKED)


def test_undo_leaves_var_and_names_packages_whose_state_is_newer(system: System, snapshot: int, tmp_path: Path) -> None:
    def package(name: str, version: str, files: dict[str, str]) -> Path:
        return make_deb(tmp_path, name, version, files=files, postinst=f"echo {version} > /var/lib/{name}.v || true")

    state = {"var/lib/ash-test-state/x": "x"}
    system.ash("install", snapshot, package("ash-test-state", "1", state), package("ash-test-plain", "1", {}))
    new = [
        package("ash-test-state", "2", state),
        package("ash-test-plain", "2", {}),
        package("ash-test-fresh", "1", {"var/lib/fresh/x": ""}),
    ]
    system.ash("install", snapshot, *new)
    answer = system.ash("--json", "undo", snapshot).json
    assert answer["packages"]["upgraded"] == {"ash-test-plain": ["2", "1"], "ash-test-state": ["2", "1"]}
    assert answer["packages"]["removed"] == {"ash-test-fresh": "1"}
    assert sorted(answer["newer_state"]) == ["ash-test-fresh", "ash-test-state"]
    assert (system.files.var / "lib/ash-test-state.v").read_text() == "2\n", "undo does not touch /var"
    redo = system.ash("undo", snapshot)
    assert "newer" not in redo.stdout


# Mutable


def test_a_mutable_snapshot_its_children_and_back(system: System, snapshot: int) -> None:
    assert system.ash("--json", "mutable", snapshot).json["mutable"] is True
    assert system.ash("--json", "mutable", snapshot).json["changed"] is False
    root = f"@.snapshots_debian/rootfs/snapshot-{snapshot}"
    assert root in system.files.writable()
    branch, clone = system.branch(snapshot), system.clone(snapshot)
    rows = {row["snapshot"]: row["mutable"] for row in system.ash("--json", "tree").json["tree"]}
    assert (rows[snapshot], rows[branch], rows[clone], rows[0]) == (True, True, True, False)
    assert "[mutable]" in system.ash("tree").stdout
    (system.root(snapshot) / "usr/written").write_text("by hand\n")
    (system.root(snapshot) / "etc/mark").write_text("by hand\n")
    system.shell(snapshot, "echo t > /usr/transaction")
    assert root in system.files.writable(), "a transaction leaves it mutable"
    system.ash("immutable", snapshot)
    assert root not in system.files.writable()
    assert (system.root(snapshot) / "usr/written").read_text() == "by hand\n"
    assert (system.files.etc(snapshot) / "mark").read_text() == "by hand\n"
    assert (system.root(snapshot) / "usr/transaction").exists()
    for other in (branch, clone):
        system.ash("immutable", other)
    system.is_sound()


def test_immen_toggles_and_says_which_way(system: System, snapshot: int) -> None:
    assert "mutable" in system.ash("immen", snapshot).stdout
    assert system.ash("--json", "immen", snapshot).json["mutable"] is False
    assert f"@.snapshots_debian/rootfs/snapshot-{snapshot}" not in system.files.writable()


@pytest.mark.parametrize("word", ["immdis", "immdisable", "disimm", "disableimm"])
def test_every_other_name_is_literal(system: System, word: str, snapshot: int) -> None:
    back = {"immdis": "immutable", "immdisable": "immenable", "disimm": "enimm", "disableimm": "enableimm"}[word]
    assert system.ash("--json", word, snapshot).json["mutable"] is True
    assert system.ash("--json", back, snapshot).json["mutable"] is False


def test_the_base_is_never_mutable_and_a_number_is_wanted(system: System) -> None:
    for word in ("mutable", "immutable", "immen"):
        system.ash(word, 0, status=REFUSED)
        system.ash(word, status=USAGE)
    assert system.files.writable() & {"@.snapshots_debian/rootfs/snapshot-0"} == set()


def test_a_mutable_snapshot_is_deployed_writable(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    system.ash("deploy", snapshot)
    slot = system.boots()
    fstab = (system.root(slot) / "etc/fstab").read_text().splitlines()
    assert next(line for line in fstab if line.split()[1] == "/").split()[3].endswith(",rw")
    assert f"snapshot-{slot} rw " in system.files.grub_cfg.read_text()
    system.ash("immutable", snapshot)
    system.ash("deploy", snapshot)
    slot = system.boots()
    fstab = (system.root(slot) / "etc/fstab").read_text().splitlines()
    assert next(line for line in fstab if line.split()[1] == "/").split()[3].endswith(",ro")
    system.ash("deploy", 0)


def test_a_mutable_snapshot_is_compared_and_nothing_is_left_of_that(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    (system.root(snapshot) / "usr/written").write_text("x")
    other = system.clone(snapshot)
    (system.root(other) / "usr/more").write_text("x")
    before = system.subvolumes()
    answer = system.ash("--json", "diff", 0, snapshot, "--files").json
    assert answer["files"]["usr/written"] == "added"
    assert system.ash("--json", "diff", snapshot, other, "--files").json["files"]["usr/more"] == "added"
    assert system.ash("diff", snapshot, snapshot).stdout == "no difference\n"
    assert system.subvolumes() == before
    for mutable in (snapshot, other):
        system.ash("immutable", mutable)


def test_undo_of_a_mutable_snapshot(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    system.shell(snapshot, "echo one > /etc/mark")
    system.ash("undo", snapshot)
    assert mark(system, snapshot) == ""
    assert f"@.snapshots_debian/rootfs/snapshot-{snapshot}" in system.files.writable()
    system.ash("immutable", snapshot)


def test_mutable_directories_are_outside_of_the_transaction_and_in_fstab(system: System, snapshot: int) -> None:
    system.shell(snapshot, "printf 'mutable_dirs::opt/games\\nmutable_dirs_shared::srv\\n' > /etc/ash.conf")
    sibling = system.clone(snapshot)
    system.shell(snapshot, "echo mine > /opt/games/x; echo ours > /srv/x")
    system.shell(snapshot, "echo kept > /opt/games/failed; exit 1", status=FAILED)
    kept = system.files.snapshots / "mutable_dirs"
    assert (kept / f"snapshot-{snapshot}/opt/games/x").read_text() == "mine\n"
    assert (kept / "srv/x").read_text() == "ours\n"
    assert not (system.root(snapshot) / "opt/games/x").exists()
    system.shell(sibling, "[ ! -e /opt/games/x ]; [ -e /srv/x ]")
    system.ash("deploy", snapshot)
    slot = system.boots()
    lines = [
        line.split()[:2]
        for line in (system.root(slot) / "etc/fstab").read_text().splitlines()
        if "mutable_dirs" in line
    ]
    assert lines == [
        [f"/.snapshots/mutable_dirs/snapshot-{snapshot}/opt/games", "/opt/games"],
        ["/.snapshots/mutable_dirs/srv", "/srv"],
    ]
    assert (system.root(slot) / "opt/games").is_dir()
    system.ash("deploy", 0)


def test_a_mutable_directory_cannot_lead_out(system: System, snapshot: int) -> None:
    system.shell(snapshot, "printf 'mutable_dirs::../../x,/opt//y/\\n' > /etc/ash.conf")
    system.shell(snapshot, "echo y > /opt/y/y")
    assert os.listdir(system.files.snapshots / "mutable_dirs" / f"snapshot-{snapshot}") == ["opt"]


def test_a_bad_ash_conf_is_told_in_one_line(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo nonsense > /etc/ash.conf")
    assert "line 1 of ash.conf" in system.ash("run", snapshot, "true", status=125).error
    assert "line 1 of ash.conf" in system.ash("deploy", snapshot, status=USAGE).error
    system.ash("undo", snapshot)
    system.ash("run", snapshot, "true")


def test_ash_conf_is_edited_and_a_bad_line_is_refused(
    system: System, snapshot: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "my editor"
    editor.write_text('#!/bin/sh\n[ "$1" = -x ] && cp "$NEW" "$2" 2>/dev/null || cp /tmp/ash-test-new "$2"\n')
    editor.write_text(f'#!/bin/sh\ncp {tmp_path}/new "$2"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv("SUDO_EDITOR", f"'{editor}' -x")
    for text, status in (("mutable_dirs::opt/a\n", DONE), ("what is this\n", USAGE), ("unknown::1\n", USAGE)):
        (tmp_path / "new").write_text(text)
        with system.terminal("edit-conf", snapshot) as terminal:
            assert terminal.wait() == status
    assert (system.root(snapshot) / "etc/ash.conf").read_text() == "mutable_dirs::opt/a\n"
    assert system.remains() == set()
    system.ash("edit-conf", snapshot, status=USAGE)


# The tree


def test_clone_tree_copies_all_below_with_their_descriptions(system: System, snapshot: int) -> None:
    one, two = system.branch(snapshot), system.branch(snapshot)
    deep = number(system, "branch", one, "-d", "deep one")
    system.shell(deep, "echo deep > /etc/mark")
    answer = system.ash("--json", "clone-tree", snapshot, "-d", "copy").json
    copies = {int(old): new for old, new in answer["copies"].items()}
    assert set(copies) == {snapshot, one, two, deep}
    tree = tree_of(system)
    assert {n: tree[copies[n]] for n in copies} == {
        snapshot: None,
        one: copies[snapshot],
        two: copies[snapshot],
        deep: copies[one],
    }
    assert mark(system, copies[deep]) == "deep"
    assert (system.files.state / f"snapshots/{copies[deep]}-desc").read_text() == "deep one\n"
    assert (system.files.state / f"snapshots/{copies[snapshot]}-desc").read_text() == "copy\n"
    system.is_sound()


def test_clone_tree_of_a_branch_stays_next_to_it(system: System, snapshot: int) -> None:
    branch = system.branch(snapshot)
    below = system.branch(branch)
    copies = system.ash("--json", "clone-tree", branch).json["copies"]
    tree = tree_of(system)
    assert tree[copies[str(branch)]] == snapshot
    assert tree[copies[str(below)]] == copies[str(branch)]


def test_clone_tree_of_the_base_gives_its_branches_too(system: System) -> None:
    branch = system.branch(0)
    copies = system.ash("--json", "clone-tree", 0).json["copies"]
    tree = tree_of(system)
    assert tree[copies["0"]] is None
    assert tree[copies[str(branch)]] == copies["0"]


def test_cbranch_and_ubranch_put_the_copy_where_they_say(system: System, snapshot: int) -> None:
    branch = system.branch(snapshot)
    system.shell(branch, "echo b > /etc/mark")
    other = system.clone()
    beside, under = number(system, "cbranch", branch), number(system, "ubranch", other, branch)
    tree = tree_of(system)
    assert (tree[beside], tree[under]) == (snapshot, other)
    assert (mark(system, beside), mark(system, under)) == ("b", "b")
    assert number(system, "cbranch", snapshot) in {n for n, parent in tree_of(system).items() if parent is None}
    by_option = number(system, "ubranch", "-s", other, branch)
    assert tree_of(system)[by_option] == other
    system.ash("ubranch", other, 999999, status=MISSING)
    system.ash("ubranch", 999999, other, status=MISSING)
    system.ash("ubranch", other, status=USAGE)


def test_tree_run_goes_through_all_and_names_what_failed(system: System, snapshot: int) -> None:
    good, bad = system.branch(snapshot), system.branch(snapshot)
    below = system.branch(bad)
    outside = system.clone()
    system.shell(bad, "touch /etc/bad")
    answer = system.ash(
        "--json", "tree-run", snapshot, "sh", "-c", "echo ran > /etc/mark; [ ! -e /etc/bad ]", status=FAILED
    ).json
    assert [change["snapshot"] for change in answer["snapshots"]] == [snapshot, good, below]
    assert list(answer["failed"]) == [str(bad)]
    assert [mark(system, n) for n in (snapshot, good, below, bad, outside)] == ["ran", "ran", "ran", "", ""]
    assert all(change["changed"] for change in answer["snapshots"])
    system.ash("tree-run", outside, "true")
    system.ash("tree-run", status=USAGE)
    system.ash("tree-run", outside, status=USAGE)


def test_nuke_deletes_the_remains_of_a_damaged_snapshot_too(system: System, snapshot: int) -> None:
    program("btrfs", "subvolume", "delete", system.root(snapshot))
    system.root(snapshot).mkdir()  # as a copy tool leaves it
    (system.root(snapshot) / "etc").mkdir()
    tree = system.files.state / "fstree"
    tree.write_text(tree.read_text().replace(f', {{"name": {snapshot}}}', ""))
    assert snapshot not in system.files.tree()
    system.ash("-y", "del", snapshot, status=MISSING)
    assert system.files.etc(snapshot).exists()
    system.ash("-y", "del", "--nuke", snapshot)
    assert not [path for path in system.subvolumes() if path.endswith(f"-{snapshot}")]
    assert not system.root(snapshot).exists()
    system.ash("-y", "del", "--nuke", snapshot, status=MISSING)
    system.is_sound()


# The history


def last_entry(system: System, *words: str | int) -> dict[str, Any]:
    entries = system.ash("--json", "log", *words).json["history"]
    assert isinstance(entries[-1], dict)
    return entries[-1]


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
        entries = system.ash("--json", "log").json["history"]
        assert len(entries) == before + 1, words
        assert (entries[-1]["command"], entries[-1]["result"], entries[-1]["user"]) == (words[0], "done", 0)
        assert entries[-1]["arguments"][-len(words) :] == [str(word) for word in words]
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


def test_the_history_tells_how_each_snapshot_came_to_be(system: System, snapshot: int) -> None:
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
    entry = last_entry(system)
    assert entry["snapshots"] == [snapshot, other]
    assert [change["packages"]["added"] for change in entry["changes"]] == [{"ash-test-two": "1"}] * 2
    assert "+ash-test-two +ash-test-two" in system.ash("log", other).stdout


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


def test_a_torn_line_of_the_history_is_passed_over(system: System, snapshot: int) -> None:
    with (system.files.state / "history").open("a") as history:
        history.write('{"time": "2026-01-0')
    before = len(system.ash("--json", "log").json["history"])
    system.ash("desc", snapshot, "after", "a", "crash")
    entries = system.ash("--json", "log").json["history"]
    assert len(entries) == before + 1
    assert entries[-1]["command"] == "desc"


# What there is


def test_sub_lists_the_subvolumes_of_the_distribution(system: System, snapshot: int) -> None:
    system.shell(snapshot, "touch /etc/x")
    rows = {row["path"]: row for row in system.ash("--json", "sub").json["subvolumes"]}
    there = system.subvolumes()
    assert {path: row["id"] for path, row in rows.items()} == there
    assert {path for path, row in rows.items() if not row["readonly"]} == system.files.writable()
    assert f"rootfs/undo-{snapshot}" in system.ash("sub").stdout


def test_status_tells_what_is_next_and_what_is_under_way(system: System, snapshot: int) -> None:
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


# Differences


def test_diff_names_packages_and_configuration_files(system: System, snapshot: int, tmp_path: Path) -> None:
    files = {"etc/ash-test-conf": "1\n", "DEBIAN/conffiles": "/etc/ash-test-conf\n", "usr/share/ash-test-d/x": "x"}
    system.ash(
        "install", snapshot, make_deb(tmp_path, "ash-test-d", "1", files=files), make_deb(tmp_path, "ash-test-gone")
    )
    other = system.clone(snapshot)
    newer = make_deb(tmp_path, "ash-test-d", "2", files={**files, "etc/ash-test-conf": "2\n"})
    system.ash("install", other, newer, make_deb(tmp_path, "ash-test-new"), "--remove", "ash-test-gone")
    system.shell(other, "echo by hand > /etc/own; rm /etc/motd; chmod 600 /etc/issue")
    answer = system.ash("--json", "diff", snapshot, other).json
    assert (answer["from"], answer["to"]) == (snapshot, other)
    assert answer["packages"] == {
        "added": {"ash-test-new": "1"},
        "removed": {"ash-test-gone": "1"},
        "upgraded": {"ash-test-d": ["1", "2"]},
    }
    config = answer["config"]
    assert (config["etc/ash-test-conf"], config["etc/own"], config["etc/motd"], config["etc/issue"]) == (
        "changed",
        "added",
        "removed",
        "changed",
    )
    assert answer["files"] == {}
    assert not [path for path in config if path.startswith("usr/")]
    back = system.ash("--json", "diff", other, snapshot).json
    assert (back["config"]["etc/own"], back["packages"]["removed"]) == ("removed", {"ash-test-new": "1"})
    everything = system.ash("--json", "diff", snapshot, other, "--files").json["files"]
    assert everything["usr/share/ash/db/dpkg/status"] == "changed"
    patch = system.ash("diff", snapshot, other, "--patch").stdout
    assert "+by hand" in patch
    assert "-1\n+2\n" in patch
    assert "^ ash-test-d 1 -> 2" in patch
    assert system.ash("diff", snapshot, snapshot).stdout == "no difference\n"
    system.ash("diff", snapshot, 999999, status=MISSING)


Look = dict[str, tuple[object, ...]]


def look(top: Path) -> Look:
    """All that counts of everything below a folder."""
    found: Look = {}
    for path in top.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(top))] = (status.st_mode, content, status.st_ino)
    return found


def differences(before: Look, after: Look) -> dict[str, str]:
    """What differs, found by looking at everything."""
    changed = {path: "changed" for path in before.keys() & after.keys() if before[path][:2] != after[path][:2]}
    return (
        changed
        | dict.fromkeys(after.keys() - before.keys(), "added")
        | dict.fromkeys(before.keys() - after.keys(), "removed")
    )


def shuffle(top: Path, chance: random.Random) -> None:
    """Do something at random to the files below a folder."""
    there = sorted(top.rglob("*"))
    files, folders = [p for p in there if p.is_file() and not p.is_symlink()], [p for p in there if p.is_dir()]
    new = chance.choice([top, *folders]) / f"f{chance.randrange(12)}"
    match chance.randrange(8):
        case 0 if files:
            chance.choice(files).write_text(str(chance.random()))
        case 1 if files:
            chance.choice(files).unlink()
        case 2 if files:
            chance.choice(files).chmod(chance.choice([0o600, 0o644, 0o755]))
        case 3 if files and not new.exists():
            chance.choice(files).rename(new)
        case 4 if not new.exists():
            new.mkdir()
        case 5 if folders:
            shutil.rmtree(chance.choice(folders))
        case 6 if files and not new.exists():
            os.link(chance.choice(files), new)
        case _ if not new.is_dir():
            beside = new.with_name("beside")
            beside.write_text(str(chance.random()))
            beside.rename(new)


@pytest.mark.parametrize("seed", range(12))
def test_what_btrfs_says_has_changed_is_what_has(system: System, seed: int) -> None:
    chance = random.Random(seed)
    work = system.files.top / f"random-{seed}"
    program("btrfs", "subvolume", "create", work)
    for _ in range(25):
        shuffle(work, chance)
    old, new = work.with_name(f"{work.name}-old"), work.with_name(f"{work.name}-new")
    program("btrfs", "subvolume", "snapshot", "-r", work, old)
    for _ in range(chance.choice([1, 3, 10, 30])):
        shuffle(work, chance)
    program("btrfs", "subvolume", "snapshot", "-r", work, new)
    said, before, after = changed_paths(old, new), look(old), look(new)
    true = differences(before, after)
    for path, kind in true.items():
        # Of a folder that moves only the folder is named, and of a file with several names one of them.
        above = {said.get(str(parent)) for parent in Path(path).parents}
        same = [other for other in said if other in after and path in after and after[other][2] == after[path][2]]
        assert path in said or same or above & {"added", "removed", "changed"}, f"{path} was {kind}: {said}"
    for path, kind in said.items():
        assert true.get(path, "changed") == kind or kind == "changed", f"{path} was {true.get(path)}, not {kind}"
    for made in (work, old, new):
        program("btrfs", "subvolume", "delete", made)
