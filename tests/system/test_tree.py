# SPDX-License-Identifier: AGPL-3.0-or-later
"""The tree: commands that create, describe, show and delete snapshots, and their errors."""

import json
from pathlib import Path

import pytest

from tests.support import ASH, DISTRIBUTION, FAILED, MISSING, REFUSED, SNAPSHOTS, USAGE, Disk, program

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]

VOLUMES = {f"@{name}_{DISTRIBUTION}" for name in (".snapshots", "boot", "etc", "home", "var")}


def snapshots_on(disk: Disk) -> set[int]:
    """The snapshots that ash lists; assert that exactly these are on the disk, complete and read-only."""
    rows = disk.ash("--json", "tree").json["tree"]
    numbers = {row["snapshot"] for row in rows}
    with disk.files() as files:
        assert files.tree() == numbers
        expected = {f"{SNAPSHOTS}/rootfs/snapshot-{n}" for n in numbers}
        expected |= {f"{SNAPSHOTS}/{part}/{part}-{n}" for n in numbers for part in ("etc", "boot")}
        slots = {path for path in files.subvolumes() if path.rsplit("-", 1)[-1] in ("deploy", "aux", "spare")}
        undone = {path for path in files.subvolumes() if "/undo-" in path}
        assert files.subvolumes() - slots - undone == expected | VOLUMES
        assert not expected & files.writable()
        described = {int(path.name.removesuffix("-desc")) for path in (files.state / "snapshots").iterdir()}
        assert described == numbers
    return numbers


def test_a_new_system_has_only_the_base_and_it_is_deployed(disk: Disk) -> None:
    assert snapshots_on(disk) == {0}
    (base,) = disk.ash("--json", "tree").json["tree"]
    assert base["deployed"]
    assert base["parent"] is None
    shown = disk.ash("tree").stdout.splitlines()
    assert [line for line in shown if "0*" in line] == [line for line in shown if "base" in line]


def test_new_snapshots_have_the_right_parent(disk: Disk) -> None:
    clone = disk.clone()
    branch = disk.branch(clone)
    new = int(disk.ash("-q", "new", "-d", "from", "the", "base").stdout)
    assert (clone, branch, new) == (1, 2, 3)
    rows = {row["snapshot"]: row for row in disk.ash("--json", "tree").json["tree"]}
    assert {number: row["parent"] for number, row in rows.items()} == {0: None, 1: None, 2: 1, 3: None}
    assert rows[3]["description"] == "from the base"
    assert rows[1]["description"] == "clone of 0"
    assert snapshots_on(disk) == {0, 1, 2, 3}
    drawn = disk.ash("tree").stdout.splitlines()
    (branch_line,) = [line for line in drawn if "branch of 1" in line]
    (clone_line,) = [line for line in drawn if "clone of 0" in line]
    assert branch_line.index("2") > clone_line.index("1")


@pytest.mark.parametrize("words", [["clone", "0"], ["cl", "--snap", "0"], ["tree-clone", "-s", "0"]])
def test_every_way_to_name_a_snapshot_works(disk: Disk, words: list[str]) -> None:
    assert disk.ash("-q", *words).stdout == "1\n"
    assert disk.ash("--json", *words).json["snapshot"] == 2


def test_a_number_is_never_reused(disk: Disk) -> None:
    disk.clone()
    disk.ash("-y", "del", 1)
    assert disk.clone() == 2
    with disk.files() as files:
        (files.state / "last").unlink()
    assert disk.clone() == 3


def test_descriptions_are_data(disk: Disk) -> None:
    hostile = 'it\'s "50 %" of $(reboot) } { \\n `id` ä ✓'
    disk.clone()
    changed = disk.ash("--json", "desc", 1, *hostile.split(" ")).json
    assert changed["changed"]
    assert changed["description"] == hostile
    assert not disk.ash("--json", "desc", 1, hostile).json["changed"]
    rows = {row["snapshot"]: row for row in disk.ash("--json", "tree").json["tree"]}
    assert rows[1]["description"] == hostile
    assert hostile in disk.ash("tree").stdout
    disk.ash("deploy", 1)
    with disk.files() as files:
        program("grub-script-check", files.grub_cfg)
        assert "reboot" in files.grub_cfg.read_text()


def test_terminal_escapes_in_a_description_are_shown_not_sent(disk: Disk) -> None:
    disk.clone()
    disk.ash("desc", 1, "red \x1b[31m text")
    assert "\x1b" not in disk.ash("tree").stdout


def test_del_deletes_a_snapshot_with_its_branches_and_leaves_nothing(disk: Disk) -> None:
    disk.clone()
    disk.branch(1)
    disk.branch(2)
    disk.clone()
    disk.shell(3, "echo changed > /usr/share/changed")
    error = disk.ash("del", 1, status=USAGE).error
    assert "-y" in error
    assert snapshots_on(disk) == {0, 1, 2, 3, 4}
    assert disk.ash("--json", "-y", "del", 1).json["snapshots"] == [1, 2, 3]
    assert snapshots_on(disk) == {0, 4}
    with disk.files() as files:
        left = {path for path in files.subvolumes() if path.endswith(("-1", "-2", "-3"))}
        assert not left
        assert {path.name for path in (files.state / "work").iterdir()} & {"1", "2", "3"} == set()


def test_del_is_all_or_nothing(disk: Disk) -> None:
    for _ in range(3):
        disk.clone()
    disk.ash("deploy", 2)
    for doomed, reason in (([1, 0], "base"), ([1, 2], "deployed"), ([3, 77], "77")):
        status = MISSING if 77 in doomed else REFUSED
        error = disk.ash("-y", "del", *doomed, status=status).error
        assert reason in error
        assert snapshots_on(disk) == {0, 1, 2, 3}


def test_a_tree_that_contains_the_deployed_snapshot_is_not_deleted(disk: Disk) -> None:
    disk.clone()
    disk.branch(1)
    disk.ash("deploy", 2)
    disk.ash("-y", "del", 1, status=REFUSED)
    assert snapshots_on(disk) == {0, 1, 2}


def test_del_with_q_does_not_ask(disk: Disk) -> None:
    disk.clone()
    disk.ash("-y", "del", 1)
    assert snapshots_on(disk) == {0}


@pytest.mark.parametrize(
    "words", [["clone", 7], ["branch", 7], ["desc", 7, "x"], ["del", 7], ["deploy", 7], ["list", 7], ["unlock", 7]]
)
def test_a_missing_snapshot_has_its_own_status(disk: Disk, words: list[str | int]) -> None:
    outcome = disk.ash("-y", *words, status=MISSING)
    assert outcome.error.startswith("ash: snapshot 7 does not exist")
    assert disk.ash("-y", "--json", *words, status=MISSING).json["error"]["status"] == MISSING
    assert snapshots_on(disk) == {0}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cloen", "0"], "clone"),
        (["remove", "1"], "del N"),
        (["del"], "snapshot"),
        (["run"], "snapshot"),
        (["clone"], "name the snapshot"),
        (["tree", "--no-such-option"], "--no-such-option"),
        (["desc", "0"], "description"),
        (["list", "0", "extra"], "extra"),
    ],
)
def test_wrong_usage_says_what_is_wrong(disk: Disk, words: list[str], says: str) -> None:
    status = 125 if words[0] == "run" else USAGE
    assert says in disk.ash(*words, status=status).error


def test_reading_changes_nothing(disk: Disk) -> None:
    disk.clone()
    with disk.files() as files:
        before = (files.subvolumes(), (files.state / "fstree").read_text(), files.grub_cfg.read_text())
    for words in (["tree"], ["tree", "-l"], ["list", 1], ["version"], ["help"]):
        assert disk.ash(*words).stdout
    for words in (
        ["clone", 0],
        ["branch", 1],
        ["new"],
        ["desc", 1, "x"],
        ["del", 1],
        ["deploy", 1],
        ["run", 1, "false"],
    ):
        assert disk.ash("--json", "--dry-run", *words).json["changed"] is False
    with disk.files() as files:
        after = (files.subvolumes(), (files.state / "fstree").read_text(), files.grub_cfg.read_text())
    assert after == before


def test_no_snapshot_of_an_image_is_booted(disk: Disk) -> None:
    assert "no snapshot of this system is running" in disk.ash("current", status=1).error
    assert "no snapshot of this system is running" in disk.ash("whichtmp", status=1).error


def test_no_change_from_inside_a_chroot(disk: Disk) -> None:
    with disk.files() as files:
        root = files.root("deploy")
        inside: list[str | Path] = ["chroot", root, "/.snapshots/ash/ash"]
        mounts = 'mount --bind "$1" "$2/.snapshots"; mount -t proc proc "$2/proc"; shift 2; exec "$@"'
        argv: list[str | Path] = ["unshare", "--mount", "sh", "-c", mounts, "sh", files.snapshots, root, *inside]
        program(*argv, "clone", "0", status=REFUSED)
        assert "Tree" in program(*argv, "help")


def test_a_mounted_system_works_like_an_image(disk: Disk) -> None:
    with disk.files() as files:
        for directory in (files.top, files.snapshots):
            made = program(*ASH, "--json", "--root", directory, "clone", "0")
            assert json.loads(made)["changed"]
    assert snapshots_on(disk) == {0, 1, 2}


def test_the_installed_ash_is_the_same_program(disk: Disk) -> None:
    with disk.files() as files:
        script = files.state / "ash"
        assert script.read_text().startswith("#!/bin/sh\n")
        text = script.read_text()
        assert "(Distro):\n" in text
    program("python3", "-c", "import sys; compile(sys.stdin.read(), 'ash', 'exec')", input=text)
    assert disk.ash("version").stdout.startswith("ash ")


def test_errors_tell_apart_what_is_not_a_system(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.img"
    nothing.write_bytes(b"\0" * 4096)
    assert "btrfs" in Disk(nothing).ash("tree", status=FAILED).error
    Disk(tmp_path / "absent.img").ash("tree", status=MISSING)
    program(*ASH, "--root", tmp_path, "tree", status=MISSING)
