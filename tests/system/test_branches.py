# SPDX-License-Identifier: AGPL-3.0-or-later
"""Commands on a snapshot with its branches, and on the remains of a snapshot."""

import pytest

from tests.support import FAILED, MISSING, USAGE, program
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]


def tree_of(system: System) -> dict[int, int | None]:
    """The parent of each snapshot."""
    return {row["snapshot"]: row["parent"] for row in system.ash("--json", "tree").json["tree"]}


def number(system: System, *words: str | int) -> int:
    """Run a command that prints a new snapshot number."""
    return int(system.ash("-q", *words).stdout)


def mark(system: System, snapshot: int) -> str:
    """The mark that the tests wrote into a snapshot."""
    path = system.root(snapshot) / "etc/mark"
    return path.read_text().strip() if path.exists() else ""


def test_clone_tree_copies_all_branches_with_their_descriptions(system: System, snapshot: int) -> None:
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


def test_clone_tree_of_the_base_copies_its_branches_too(system: System) -> None:
    branch = system.branch(0)
    copies = system.ash("--json", "clone-tree", 0).json["copies"]
    tree = tree_of(system)
    assert tree[copies["0"]] is None
    assert tree[copies[str(branch)]] == copies["0"]


def test_cbranch_and_ubranch_put_the_copy_below_the_right_parent(system: System, snapshot: int) -> None:
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


def test_tree_run_runs_in_every_branch_and_reports_failures(system: System, snapshot: int) -> None:
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


def test_nuke_deletes_what_is_left_of_a_damaged_snapshot(system: System, snapshot: int) -> None:
    program("btrfs", "subvolume", "delete", system.root(snapshot))
    system.root(snapshot).mkdir()  # as a copy tool would leave it
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
