# SPDX-License-Identifier: AGPL-3.0-or-later
"""fsck --repair: each kind of problem is repaired or reported, nothing is lost, nothing else changes."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ash import AccountFile
from tests.support import FAILED, OURS_IN_RUN, make_deb, program
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(130)]


@pytest.fixture(scope="module")
def snapshot(system: System) -> int:
    """One snapshot for most tests, with an edit and an undo; each test leaves it sound."""
    number = system.clone()
    system.shell(number, "echo kept > /etc/mark")
    system.shell(number, "echo newest > /etc/mark")
    return number


@contextlib.contextmanager
def opened(path: Path) -> Iterator[None]:
    """Make a read-only subvolume writable in the block."""
    program("btrfs", "property", "set", "-ts", path, "ro", "false")
    yield
    program("btrfs", "property", "set", "-ts", path, "ro", "true")


def found(system: System) -> list[dict[str, Any]]:
    """The problems that fsck finds."""
    ended = system.ash("--json", "fsck", status=FAILED)
    damage: list[dict[str, Any]] = ended.json["damage"]
    return damage


def finds_nothing(system: System) -> None:
    assert system.ash("--json", "fsck").json["damage"] == []


@contextlib.contextmanager
def same_tree_afterwards(system: System) -> Iterator[None]:
    """Assert that the tree is the same before and after the block."""
    before = system.ash("--json", "tree").json["tree"]
    yield
    assert sorted(map(str, before)) == sorted(map(str, system.ash("--json", "tree").json["tree"]))


def repairs(system: System, words: str, snapshot: int | None = None) -> Path:
    """Assert that fsck --repair repairs a problem and leaves none. Returns its directory in lost+found."""
    answer = system.ash("--json", "fsck", "--repair").json
    assert [one for one in answer["damage"] if words in one["what"] and one["snapshot"] == snapshot], answer
    assert all(one["mended"] for one in answer["damage"])
    assert answer["changed"] is True
    finds_nothing(system)
    assert not answer["lost_found"] or answer["lost_found"].startswith("/.snapshots/lost+found/")
    directory = system.files.snapshots / answer["lost_found"].removeprefix("/.snapshots/")
    return directory if answer["lost_found"] else Path("/nonexistent")


def reports(system: System, words: str, advice: str, snapshot: int | None = None) -> None:
    """Assert that fsck --repair does not repair a problem, and says what to do."""
    answer = system.ash("--json", "fsck", "--repair", status=FAILED).json
    left = [one for one in answer["damage"] if words in one["what"] and one["snapshot"] == snapshot]
    assert [one["mended"] for one in left] == [False], answer
    line = next(line for line in system.ash("fsck", "--repair", status=FAILED).stdout.splitlines() if words in line)
    assert line.startswith("not repaired: ")
    assert advice in line


def test_without_problems_nothing_changes(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        answer = system.ash("--json", "fsck", "--repair").json
        assert system.ash("fsck", "--repair").stdout == "no problems found\n"
    assert (answer["damage"], answer["changed"], answer["lost_found"]) == ([], False, "")


def break_much(system: System) -> set[str]:
    """Cause many kinds of problems. Returns texts, each of which must be in some file `mark` afterwards."""
    files = system.files
    numbers = written, lost, copied, orphan = [system.clone() for _ in range(4)]
    child = system.branch(lost)
    for number in (*numbers, child):
        system.shell(number, f"echo {number} > /etc/mark")
    with opened(files.etc(copied)):
        (files.etc(copied) / "mark").write_text("edited in the copy\n")
    program("btrfs", "property", "set", "-ts", system.root(written), "ro", "false")
    for path in (system.root(lost), files.undo(lost)):
        program("btrfs", "subvolume", "delete", path)
    forget(system, orphan)
    (files.state / "last").write_text("0\n")
    (files.state / f"snapshots/{child}-desc").unlink()
    strays = {"rootfs/undo-4711", "etc/etc-4711", "rootfs/snapshot-4712"}
    for stray in strays:
        program("btrfs", "subvolume", "create", files.snapshots / stray)
        (files.snapshots / stray / "mark").write_text(f"{stray}\n")
    nest(system, copied)
    tear_intent(system, child)
    (files.state / "ids").write_text("{")
    (files.state / "menu").write_text("torn")
    return {*strays, *map(str, (*numbers, child)), "edited in the copy", "nested", "not committed"}


def delete_broken(system: System) -> None:
    """Delete what break_much() created."""
    for row in system.ash("--json", "tree").json["tree"]:
        mark = system.root(row["snapshot"]) / "etc/mark"
        if mark.is_file() and mark.read_text() == f"{row['snapshot']}\n":
            system.ash("-y", "del", row["snapshot"])


def forget(system: System, snapshot: int) -> None:
    """Remove a snapshot from the tree file."""
    tree = system.files.state / "fstree"
    entry = rf'{{"name": {snapshot}}}'
    tree.write_text(re.sub(f"{entry}, |, {entry}", "", tree.read_text()))
    assert snapshot not in system.files.tree()


def nest(system: System, snapshot: int) -> None:
    """Create a subvolume inside a snapshot."""
    with opened(system.root(snapshot)):
        program("btrfs", "subvolume", "create", system.root(snapshot) / "usr/nested")
        (system.root(snapshot) / "usr/nested/mark").write_text("nested\n")


def tear_intent(system: System, snapshot: int) -> None:
    """Make a snapshot look like one with an interrupted transaction and a damaged intent file."""
    (system.files.state / f"work/{snapshot}/intent").write_bytes(b"torn \xff")
    copy = system.root(f"chr{snapshot}")
    program("btrfs", "subvolume", "snapshot", system.root(snapshot), copy)
    (copy / "etc/mark").write_text("not committed\n")


def marks(system: System) -> set[str]:
    """The texts of all files `mark` in snapshots, copies and lost+found."""
    below = ("etc/mark", "mark", "usr/nested/mark")
    places = [f"{place}/{mark}" for place in ("rootfs/*", "etc/*", "lost+found/*/*/*") for mark in below]
    return {path.read_text().strip() for place in places for path in system.files.snapshots.glob(place)}


def test_without_repair_nothing_changes(system: System) -> None:
    kept = break_much(system)
    history = (system.files.state / "history").read_text()
    with system.nothing_changes():
        damage = found(system)
        dry = system.ash("--json", "--dry-run", "fsck", "--repair").json
    assert len(damage) > 12
    assert not any(one["mended"] for one in damage)
    assert (dry["changed"], len(dry["would"])) == (False, len(damage))
    assert (system.files.state / "history").read_text() == history
    system.ash("fsck", "--repair")
    finds_nothing(system)
    assert kept <= marks(system)
    delete_broken(system)


def test_an_interrupted_repair_can_be_repeated(system: System) -> None:
    kept = break_much(system)
    for _ in system.each_step_of("fsck", "--repair", by=5):
        assert kept <= marks(system)
    finds_nothing(system)
    assert kept <= marks(system)
    system.is_sound()
    system.boots()
    delete_broken(system)


def test_a_missing_snapshot_is_restored_from_its_undo(system: System, snapshot: int) -> None:
    program("btrfs", "subvolume", "delete", system.root(snapshot))
    lost = repairs(system, f"snapshot-{snapshot} is missing", snapshot)
    assert (system.root(snapshot) / "etc/mark").read_text() == "kept\n"
    assert (system.files.etc(snapshot) / "mark").read_text() == "kept\n"
    assert (lost / f"etc/etc-{snapshot}/mark").read_text() == "newest\n"
    system.is_sound()
    system.shell(snapshot, "echo newest > /etc/mark")


def test_without_an_undo_it_is_removed_from_the_tree_and_its_children_move_up(system: System) -> None:
    top = system.clone()
    middle = system.branch(top)
    child = system.branch(middle)
    below = system.branch(child)
    system.root(middle).rename(system.root(middle).with_name("aside"))
    system.root(middle).mkdir()
    lost = repairs(system, f"snapshot-{middle} is missing", middle)
    parents = {row["snapshot"]: row["parent"] for row in system.ash("--json", "tree").json["tree"]}
    assert middle not in parents
    assert (parents[child], parents[below]) == (top, child)
    assert (lost / f"ash/snapshots/{middle}-desc").read_text() == f"branch of {top}\n"
    assert {path.name for path in lost.glob("*/*")} >= {f"etc-{middle}", f"boot-{middle}", f"snapshot-{middle}"}
    program("btrfs", "subvolume", "delete", system.root(middle).with_name("aside"))
    copied = system.ash("--json", "clone-tree", top).json["copies"]
    with same_tree_afterwards(system):
        (system.files.state / "fstree").unlink()
        repairs(system, "tree file")
    for number in (top, copied[str(top)]):
        system.ash("-y", "del", number)
    system.is_sound()


def test_a_writable_snapshot_is_made_read_only_as_it_is(system: System, snapshot: int) -> None:
    program("btrfs", "property", "set", "-ts", system.root(snapshot), "ro", "false")
    (system.root(snapshot) / "usr/written").write_text("x")
    repairs(system, "is writable", snapshot)
    assert (system.root(snapshot) / "usr/written").read_text() == "x"
    assert str(system.root(snapshot).relative_to(system.files.top)) not in system.files.writable()


@pytest.mark.parametrize("directory", ["etc", "boot"])
def test_copies_are_made_again(system: System, snapshot: int, directory: str) -> None:
    copy = system.files.etc(snapshot) if directory == "etc" else system.files.boot(snapshot)
    with opened(copy):
        (copy / "extra").write_text("x")
    lost = repairs(system, f"{copy.name} differs from its /{directory}: extra", snapshot)
    assert (lost / directory / copy.name / "extra").read_text() == "x"
    program("btrfs", "subvolume", "delete", copy)
    repairs(system, f"{copy.name} is missing", snapshot)
    program("btrfs", "property", "set", "-ts", copy, "ro", "false")
    repairs(system, f"{copy.name} is writable", snapshot)
    system.is_sound()


@pytest.mark.parametrize("name", ["rootfs/snapshot-4711", "rootfs/undo-4711", "etc/etc-4711", "boot/boot-4711"])
def test_strays_move_to_lost_and_found(system: System, name: str) -> None:
    path = system.files.snapshots / name
    program("btrfs", "subvolume", "create", path)
    (path / "mark").write_text(name)
    program("btrfs", "property", "set", "-ts", path, "ro", "true")
    lost = repairs(system, f"{path.name} belongs to no snapshot")
    assert not path.exists()
    assert (lost / name / "mark").read_text() == name
    assert str((lost / name).relative_to(system.files.top)) not in system.files.writable()
    assert not (system.files.state / "work/4711").exists()


def test_a_sound_snapshot_missing_from_the_tree_is_added(system: System, snapshot: int) -> None:
    system.ash("desc", snapshot, "precious")
    forget(system, snapshot)
    repairs(system, f"snapshot-{snapshot} belongs to no snapshot")
    row = next(row for row in system.ash("--json", "tree").json["tree"] if row["snapshot"] == snapshot)
    assert (row["parent"], row["description"]) == (None, "precious")
    unknown = int((system.files.state / "last").read_text()) + 10
    program("btrfs", "subvolume", "snapshot", "-r", system.root(snapshot), system.root(unknown))
    repairs(system, f"snapshot-{unknown} belongs to no snapshot")
    assert f"{unknown} - found by fsck" in system.ash("tree").stdout
    assert system.clone() == unknown + 1
    system.is_sound()
    for number in (unknown, unknown + 1):
        system.ash("-y", "del", number)


@pytest.mark.parametrize("text", ["", '{"name": "root", "children": [{"na'])
def test_the_tree_is_rebuilt_as_it_was(system: System, text: str) -> None:
    top = system.clone()
    branch = system.branch(top)
    made = [system.ash(*words) for words in (["cbranch", branch], ["ubranch", top, 0], ["clone-tree", top], ["new"])]
    system.ash("-y", "del", branch)
    tree = system.files.state / "fstree"
    with same_tree_afterwards(system):
        tree.write_text(text)
        lost = repairs(system, "tree file")
    assert (lost / "ash/fstree").read_text() == text
    for number in (top, *(int(re.findall(r"snapshot (\d+)", outcome.stdout)[0]) for outcome in made[2:])):
        system.ash("-y", "del", number)


def test_descriptions_are_restored_from_the_history(system: System, snapshot: int) -> None:
    made = [
        int(system.ash("-q", *words).stdout)
        for words in (["clone", 0, "-d", "two", "words"], ["branch", 0], ["new"], ["clone-tree", snapshot])
    ]
    system.ash("desc", made[1], "said", "later")
    descriptions = {number: system.files.state / f"snapshots/{number}-desc" for number in (*made, 0)}
    before = {number: path.read_text() for number, path in descriptions.items()}
    for path in descriptions.values():
        path.unlink()
    repairs(system, "its description is missing", made[0])
    assert {number: path.read_text() for number, path in descriptions.items()} == before | {0: "found by fsck\n"}
    descriptions[0].write_text(before[0])
    for number in made:
        system.ash("-y", "del", number)


@pytest.mark.parametrize("odd", ["empty", "link", "directory"])
def test_an_invalid_description_is_replaced(system: System, snapshot: int, odd: str) -> None:
    path = system.files.state / f"snapshots/{snapshot}-desc"
    path.unlink()
    make: dict[str, Callable[[], None]] = {"empty": path.touch, "directory": path.mkdir}
    make.get(odd, lambda: path.symlink_to("0-desc"))()
    lost = repairs(system, "its description is empty or not a regular file", snapshot)
    assert path.is_file()
    assert path.read_text().strip()
    assert not path.is_symlink()
    assert os.path.lexists(lost / f"ash/snapshots/{path.name}")


@pytest.mark.parametrize("text", [None, "", '{"libc6": "1"}'])
def test_a_list_of_packages_is_written_again(system: System, snapshot: int, text: str | None) -> None:
    path = system.files.state / f"packages/{snapshot}"
    before = path.read_text()
    path.unlink() if text is None else path.write_text(text)
    assert system.ash("--json", "list", snapshot).json["packages"] or text
    repairs(system, "its list of packages is missing or differs", snapshot)
    assert path.read_text() == before


def test_a_stray_description_moves_to_lost_and_found(system: System) -> None:
    path = system.files.state / "snapshots/4711-desc"
    path.write_text("precious\n")
    lost = repairs(system, "4711-desc belongs to no snapshot")
    assert (lost / "ash/snapshots/4711-desc").read_text() == "precious\n"
    assert not path.exists()


def test_leftovers_of_a_live_change_with_a_damaged_intent_are_kept(system: System, snapshot: int) -> None:
    """They include the only copy of the running deployment as it was before."""
    live = system.files.state / "work/live"
    (live / "private/upper").mkdir(parents=True)
    for name in (live / "before", system.root("chrlive")):
        program("btrfs", "subvolume", "snapshot", system.root(snapshot), name)
        with (name / "etc/mark").open("w") as mark:
            mark.write(name.name)
    program("btrfs", "property", "set", "-ts", live / "before", "ro", "true")
    (live / "private/upper/new").write_text("x")
    (live / "intent").write_text("torn")
    lost = repairs(system, "a live change was interrupted")
    assert (lost / "ash/work/live/before/etc/mark").read_text() == "before"
    assert (lost / "rootfs/snapshot-chrlive/etc/mark").read_text() == "snapshot-chrlive"
    assert (lost / "ash/work/live/private/upper/new").read_text() == "x"
    assert not system.remains()


def test_leftovers_of_a_live_change_without_an_intent_are_kept(system: System, snapshot: int) -> None:
    """Without the intent file it is unknown whether the change was applied."""
    before = system.files.state / "work/live/before"
    before.parent.mkdir(exist_ok=True)
    program("btrfs", "subvolume", "snapshot", "-r", system.root(snapshot), before)
    lost = repairs(system, "is left over from a live change")
    assert (lost / "ash/work/live/before/etc/mark").is_file()
    assert not system.remains()


def test_interrupted_changes_are_recovered_or_move_to_lost_and_found(system: System, snapshot: int) -> None:
    work = system.files.state / f"work/{snapshot}"
    (work / "intent").write_text(json.dumps({"state": "open"}))
    repairs(system, "a change was interrupted", snapshot)
    tear_intent(system, snapshot)
    (work / "private/upper/lib").mkdir(parents=True)
    (work / "private/upper/lib/new").write_text("x")
    lost = repairs(system, "intent", snapshot)
    assert (lost / f"rootfs/snapshot-chr{snapshot}/etc/mark").read_text() == "not committed\n"
    assert (lost / f"ash/work/{snapshot}/private/upper/lib/new").read_text() == "x"
    tear_intent(system, snapshot)
    (work / "intent").unlink()
    lost = repairs(system, "is left over from a transaction", snapshot)
    assert (lost / f"rootfs/snapshot-chr{snapshot}").is_dir()
    assert not system.remains()
    system.shell(snapshot, "test $(cat /etc/mark) = newest")


def test_leftovers_of_a_deletion_are_kept(system: System) -> None:
    number = system.clone()
    system.shell(number, "echo kept > /etc/mark")
    forget(system, number)
    (system.files.state / f"work/{number}/intent").write_text(json.dumps({"state": "number"}))
    lost = repairs(system, "a change was interrupted", number)
    assert (lost / f"rootfs/snapshot-{number}/etc/mark").read_text() == "kept\n"
    assert not (system.files.state / f"work/{number}").exists()
    system.is_sound()


@pytest.mark.parametrize("text", ["0\n", "many\n", "\udcff", "9" * 5000, "99999999999\n", None])
def test_the_last_number_is_raised(system: System, snapshot: int, text: str | None) -> None:
    last = system.files.state / "last"
    good = int(last.read_text())
    last.unlink()
    if text is not None:
        last.write_text(text, errors="surrogateescape")
    if text not in ("0\n", None):
        assert "ash fsck --repair" in system.ash("clone", 0, status=FAILED).error
    repairs(system, "the last snapshot number used")
    assert int(last.read_text()) == good  # also where that one was deleted: the history knows it


@pytest.mark.parametrize("text", ["{", None])
def test_the_account_ids_are_rebuilt(system: System, snapshot: int, text: str | None) -> None:
    system.shell(snapshot, "grep -q ^one: /etc/passwd || echo one:x:850:850::/: >> /etc/passwd")
    ids = system.files.state / "ids"
    before = json.loads(ids.read_text())
    ids.unlink()
    if text is not None:
        ids.write_text(text)
    refused = system.shell(snapshot, "echo two:x:850:850::/: >> /etc/passwd", status=OURS_IN_RUN)
    assert "ash fsck --repair" in refused.error, "two accounts of siblings could get one id"
    repairs(system, "the registry of uids and gids")
    after = json.loads(ids.read_text())
    assert after["passwd"]["one"] == 850
    assert after == before


def test_accounts_of_a_restored_snapshot_are_recorded(system: System) -> None:
    number = system.clone()
    system.shell(number, "echo seven:x:890:890::/: >> /etc/passwd; echo eight:x:890: >> /etc/group")
    ids = system.files.state / "ids"
    known = json.loads(ids.read_text())
    before = json.dumps(known)
    del known["passwd"]["seven"], known["group"]["eight"]
    ids.write_text(json.dumps(known))
    repairs(system, "the registry of uids and gids lacks eight, seven", number)
    assert json.loads(ids.read_text()) == json.loads(before)
    system.ash("-y", "del", number)


def test_a_user_with_a_different_uid_elsewhere_gets_that_and_its_files_too(system: System) -> None:
    number = system.clone()
    system.shell(number, "echo five:x:870:870::/: >> /etc/passwd; touch /usr/of-five; chown 870 /usr/of-five")
    ids = system.files.state / "ids"
    known = json.loads(ids.read_text())
    known["passwd"]["five"] = 871
    ids.write_text(json.dumps(known))
    repairs(system, "five has the id 870 in passwd, but 871 elsewhere", number)
    assert AccountFile.read(system.root(number) / "etc/passwd").ids["five"] == 871
    assert (system.root(number) / "usr/of-five").stat().st_uid == 871
    system.ash("undo", number)
    assert (system.root(number) / "usr/of-five").stat().st_uid == 870
    system.ash("-y", "del", number)


def test_the_state_before_several_changes_to_a_snapshot_is_kept(system: System) -> None:
    number = system.clone()
    copyright_file = "usr/share/doc/less/copyright"
    system.shell(number, "echo six:x:880:880::/: >> /etc/passwd")
    for directory in (system.root(number) / "etc", system.files.etc(number)):
        with (
            opened(system.root(number) if directory.name == "etc" else directory),
            (directory / "passwd").open("r+") as passwd,
        ):
            text = passwd.read().replace("six:x:880:", "six:x:881:")
            passwd.seek(0)
            passwd.write(text)
    with opened(system.root(number)):
        (system.root(number) / copyright_file).unlink()
    lost = repairs(system, "six has the id 881 in passwd, but 880 elsewhere", number)
    assert (system.root(number) / copyright_file).exists()
    states = [system.files.undo(number), *lost.glob(f"rootfs/undo-{number}")]
    before = [root for root in states if not (root / copyright_file).exists()]
    assert any("six:x:881:" in (root / "etc/passwd").read_text() for root in before), states
    system.ash("-y", "del", number)


@pytest.mark.parametrize("path", ["usr/share/doc/less/copyright", "usr/share/ash/db/dpkg/info/less.list"])
def test_a_package_with_missing_files_is_reinstalled(system: System, path: str) -> None:
    number = system.clone()
    lost = system.root(number) / path
    with opened(system.root(number)):
        lost.unlink()
    repairs(system, "package less lacks", number)
    assert lost.exists()


def test_a_missing_package_database_is_reported(system: System) -> None:
    number = system.clone()
    with opened(system.root(number)):
        (system.root(number) / "usr/share/ash/db/dpkg/status").write_text("")
    reports(system, "the package database knows no package", f"ash undo {number}", number)
    system.ash("-y", "del", number)
    finds_nothing(system)


def test_a_package_that_cannot_be_reinstalled_is_reported(system: System, tmp_path: Path) -> None:
    number = system.clone()
    system.ash("install", number, make_deb(tmp_path, "ash-test-lies", files={"usr/share/ash-test-lies": "x"}))
    with opened(system.root(number)):
        (system.root(number) / "usr/share/ash-test-lies").unlink()
    reports(system, "package ash-test-lies lacks", f"ash run {number} dpkg --audit", number)
    assert [e["result"] for e in system.ash("--json", "log", number).json["history"]][-1].startswith("not repaired: ")
    system.ash("-y", "del", number)
    finds_nothing(system)


def test_a_foreign_mount_is_reported(system: System, snapshot: int) -> None:
    where = system.root(snapshot) / "mnt"
    program("mount", "-t", "tmpfs", "foreign", where)
    try:
        reports(system, f"{where} is mounted inside it", f"umount {where}", snapshot)
        program("mountpoint", "-q", where)
    finally:
        program("umount", where)
    finds_nothing(system)


@pytest.mark.parametrize(
    ("holder", "name"), [("snapshot", "nested"), ("snapshot", "two\nlines"), ("deployment", "nested")]
)
def test_nested_subvolumes_move_to_lost_and_found(system: System, snapshot: int, holder: str, name: str) -> None:
    root = system.root(snapshot if holder == "snapshot" else system.files.default_slot())
    readonly = holder == "snapshot"
    with opened(root) if readonly else contextlib.nullcontext():
        program("btrfs", "subvolume", "create", root / "usr" / name)
        program("btrfs", "subvolume", "create", root / "usr" / name / "deeper")
        (root / "usr" / name / "deeper/mark").write_text("deep")
    lost = repairs(system, f"{root.name}/usr/{name} is a nested subvolume")
    nested = lost / f"rootfs/{root.name}/usr/{name}"
    assert (nested / "deeper/mark").read_text() == "deep"
    program("btrfs", "subvolume", "delete", nested / "deeper", nested)  # its name may be one that tests cannot read
    assert (str(root.relative_to(system.files.top)) in system.files.writable()) != readonly


def lose_kernel(system: System) -> str:
    kernel = next((system.root(system.files.default_slot()) / "boot").glob("vmlinuz*"))
    kernel.unlink()
    return f"lacks {kernel.name}"


def lose_menu(system: System) -> str:
    (system.files.state / "menu").unlink()
    return "the boot menu has no default deployment"


def tear_menu(system: System) -> str:
    (system.files.state / "menu").write_bytes(b"{\xff")
    return "menu file"


def choose_nothing(system: System) -> str:
    menu = system.files.state / "menu"
    menu.write_text(json.dumps({**json.loads(menu.read_text()), "default": "deploy-nowhere"}))
    return "the boot menu has no default deployment"


def test_a_menu_whose_last_booted_slot_is_empty(system: System, snapshot: int) -> None:
    """The default deployment stays until there is another one."""
    system.ash("deploy", snapshot, "--fresh-etc")
    menu = system.files.state / "menu"
    data = json.loads(menu.read_text())
    slot = data["default"]
    data |= {"last_booted": "deploy-spare" if slot != "deploy-spare" else "deploy-aux"}
    menu.write_text(json.dumps({**data, "deployments": {slot: data["deployments"][slot]}}))
    system.ash("deploy", 0)
    assert set(json.loads(menu.read_text())["deployments"]) > {slot}
    system.boots()
    finds_nothing(system)


def lose_grub_cfg(system: System) -> str:
    system.files.grub_cfg.unlink()
    return "grub.cfg differs"


def break_grub_cfg(system: System) -> str:
    system.files.grub_cfg.write_bytes(b"linux /nowhere \xff")
    return "grub.cfg differs"


BOOT = [lose_kernel, lose_menu, tear_menu, choose_nothing, lose_grub_cfg, break_grub_cfg]


@pytest.mark.parametrize("damage", BOOT, ids=lambda damage: damage.__name__)
def test_the_boot_menu_is_restored(system: System, snapshot: int, damage: Callable[[System], str]) -> None:
    system.ash("deploy", snapshot)
    before = system.files.grub_cfg.read_text()
    of_kernel = snapshot if damage is lose_kernel else None
    repairs(system, damage(system), of_kernel)
    assert system.files.grub_cfg.read_text() == before
    assert system.root(system.boots()).is_dir()
    assert system.ash("--json", "status").json["next"]["snapshot"] == snapshot


def test_without_menu_and_grub_cfg_the_deployments_are_found(system: System, snapshot: int) -> None:
    tear_menu(system)
    lose_grub_cfg(system)
    repairs(system, "menu file")
    system.boots()


def test_a_missing_slot_is_reported(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    slot = system.root(system.boots())
    slot.rename(slot.with_name("aside"))
    reports(system, f"{slot.name} lacks vmlinuz", "ash deploy", snapshot)
    slot.with_name("aside").rename(slot)
    finds_nothing(system)


def test_the_work_of_another_ash_is_left_alone(system: System, snapshot: int) -> None:
    copy = system.files.boot(snapshot)
    with system.at_work(snapshot, "true"):
        program("btrfs", "subvolume", "delete", copy)
        reports(system, f"{copy.name} is missing", f"snapshot {snapshot} is locked by", snapshot)
        assert not copy.exists()
    repairs(system, f"{copy.name} is missing", snapshot)


def test_the_history_records_repairs(system: System, snapshot: int) -> None:
    program("btrfs", "subvolume", "delete", system.files.boot(snapshot))
    system.ash("fsck", "--repair")
    entry = system.ash("--json", "log", snapshot).json["history"][-1]
    assert (entry["command"], entry["result"], entry["changed"]) == ("fsck", "done", True)
    assert [one["snapshot"] for one in entry["damage"]] == [snapshot]
    before = len(system.ash("--json", "log").json["history"])
    system.ash("fsck")
    assert len(system.ash("--json", "log").json["history"]) == before
