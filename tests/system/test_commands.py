# SPDX-License-Identifier: AGPL-3.0-or-later
"""Commands that need no package repository: effects, errors, exit statuses, --json, --dry-run, -q."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import DISTRIBUTION, FAILED, MISSING, OURS_IN_RUN, REFUSED, USAGE, Outcome, program
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(110)]

NOWHERE = 999_999
ASH = Path(__file__).resolve().parents[2] / "ash.py"


def number_in(outcome: Outcome) -> int:
    """Run a command that prints only a new number, and return the number."""
    assert outcome.stdout.strip().isdecimal(), outcome.stdout
    assert outcome.stdout.count("\n") == 1
    return int(outcome.stdout)


# Tree


@pytest.mark.parametrize(("command", "parent"), [("clone", None), ("branch", 0)])
def test_a_copy_gets_a_new_number_and_the_right_parent(system: System, command: str, parent: int | None) -> None:
    new = number_in(system.ash("-q", command, 0, "-d", "a", "web", "server"))
    rows = {row["snapshot"]: row for row in system.ash("--json", "tree").json["tree"]}
    assert (rows[new]["parent"], rows[new]["description"]) == (parent, "a web server")
    assert system.root(new).joinpath("etc/os-release").exists()
    system.is_sound()


def test_new_copies_the_base(system: System) -> None:
    new = number_in(system.ash("-q", "new", "-d", "fresh"))
    row = next(r for r in system.ash("--json", "tree").json["tree"] if r["snapshot"] == new)
    assert (row["parent"], row["description"]) == (None, "fresh")
    assert (system.root(new) / "etc/os-release").read_text() == (system.root(0) / "etc/os-release").read_text()


def test_the_default_description_names_the_original(system: System, snapshot: int) -> None:
    copy = system.clone(snapshot)
    assert (system.files.state / f"snapshots/{copy}-desc").read_text() == f"clone of {snapshot}\n"


def test_a_copy_has_the_content_of_the_original_and_is_independent(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mine")
    branch = system.branch(snapshot)
    system.shell(branch, "echo two > /etc/mine")
    assert (system.root(snapshot) / "etc/mine").read_text() == "one\n"
    assert (system.files.etc(branch) / "mine").read_text() == "two\n"


@pytest.mark.parametrize("command", ["clone", "branch", "new"])
def test_json_of_commands_that_make_a_snapshot(system: System, command: str) -> None:
    answer = system.ash("--json", command, *([] if command == "new" else [0])).json
    assert (answer["command"], answer["changed"]) == (command, True)
    assert answer["snapshot"] in system.files.tree()


def test_a_number_is_never_reused(system: System) -> None:
    first = system.clone()
    system.ash("-y", "del", first)
    assert system.clone() > first


def test_tree_shows_descriptions_and_marks_the_deployed_snapshot(system: System, snapshot: int) -> None:
    branch = system.branch(snapshot)
    system.ash("desc", branch, "it's $HOME")
    lines = system.ash("tree", environment={"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}).stdout.splitlines()
    assert lines[0] == "root - root"
    assert any(line.endswith("0*- base snapshot") for line in lines)
    below = next(line for line in lines if line.endswith(f"{branch} - it's $HOME"))
    assert below.index(str(branch)) > next(line for line in lines if f" {snapshot} - " in line).index(str(snapshot))


def test_the_long_tree_has_dates_and_package_counts(system: System) -> None:
    rows = system.ash("--json", "tree", "-l").json["tree"]
    packages = system.ash("--json", "list", 0).json["packages"]
    base = next(row for row in rows if row["snapshot"] == 0)
    assert base["packages"] == len(packages) > 100
    assert base["date"].startswith("20")
    assert str(len(packages)) in system.ash("tree", "-l").stdout


@pytest.mark.parametrize("text", ["a web server", 'it\'s "quoted" $HOME {x}', "Umlaut ä 日本", "7", "-dash"])
def test_a_description_is_stored_unchanged(system: System, snapshot: int, text: str) -> None:
    system.ash("desc", snapshot, *([] if not text.startswith("-") else ["--"]), text)
    row = next(r for r in system.ash("--json", "tree").json["tree"] if r["snapshot"] == snapshot)
    assert row["description"] == text


def test_the_same_description_again_is_no_change(system: System, snapshot: int) -> None:
    assert system.ash("--json", "desc", snapshot, "the same").json["changed"] is True
    assert system.ash("--json", "desc", snapshot, "the same").json["changed"] is False


def test_control_characters_in_a_description_do_not_reach_the_terminal(system: System, snapshot: int) -> None:
    system.ash("desc", snapshot, "red \x1b[31m\x07")
    assert "\x1b" not in system.ash("tree").stdout


def test_desc_without_a_text_is_refused(system: System, snapshot: int) -> None:
    assert "desc needs a description" in system.ash("desc", snapshot, status=USAGE).error


# Deleting


def test_del_deletes_a_snapshot_with_its_branches(system: System, snapshot: int) -> None:
    branch = system.branch(snapshot)
    below = system.branch(branch)
    system.shell(below, "echo x > /etc/x")  # so that there is an undo of it too
    answer = system.ash("--json", "-y", "del", snapshot).json
    assert (answer["snapshots"], answer["changed"]) == ([snapshot, branch, below], True)
    assert not {snapshot, branch, below} & system.files.tree()
    assert not system.files.undo(below).exists()
    assert not (system.files.state / f"work/{below}").exists()
    system.is_sound()


def test_del_takes_several_numbers(system: System) -> None:
    one, two = system.clone(), system.clone()
    system.ash("-y", "del", one, two)
    assert not {one, two} & system.files.tree()


def test_del_without_a_terminal_names_the_option(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        assert "-y answers yes" in system.ash("del", snapshot, status=USAGE).error
        assert "-y answers yes" in system.ash("-q", "del", snapshot, status=USAGE).error, "quiet is not yes"
    assert system.ash("-q", "-y", "del", snapshot).stdout == ""
    assert snapshot not in system.files.tree()


@pytest.mark.parametrize(("typed", "deleted"), [("y", True), ("n", False), ("", False)])
def test_del_asks_on_a_terminal(system: System, snapshot: int, typed: str, deleted: bool) -> None:
    with system.terminal("del", snapshot) as terminal:
        terminal.expect(rf"delete snapshot {snapshot}\? \[y/N\] ")
        terminal.type(f"{typed}\n")
        assert terminal.wait() == (0 if deleted else FAILED)
    assert (snapshot not in system.files.tree()) == deleted


def test_del_refuses_all_if_one_is_the_base_or_deployed(system: System, snapshot: int) -> None:
    deployed = system.clone()
    system.ash("deploy", deployed)
    with system.nothing_changes():
        assert "is the base" in system.ash("-y", "del", snapshot, 0, status=REFUSED).error
        assert f"snapshot {deployed} is deployed" in system.ash("-y", "del", snapshot, deployed, status=REFUSED).error
        assert f"{NOWHERE} does not exist" in system.ash("-y", "del", snapshot, NOWHERE, status=MISSING).error
    system.ash("deploy", 0)


def test_del_refuses_if_a_branch_is_deployed(system: System, snapshot: int) -> None:
    branch = system.branch(snapshot)
    system.ash("deploy", branch)
    with system.nothing_changes():
        assert f"snapshot {branch} is deployed" in system.ash("-y", "del", snapshot, status=REFUSED).error
    system.ash("deploy", 0)


def test_del_deletes_subvolumes_nested_in_a_snapshot(system: System, snapshot: int) -> None:
    system.shell(
        snapshot, "btrfs subvolume create /opt/nested; btrfs subvolume create /opt/nested/deep; touch /opt/nested/x"
    )
    system.ash("-y", "del", snapshot)
    assert not any("nested" in path for path in system.subvolumes())
    system.is_sound()


# Common to all commands


ON_ONE = ["clone", "branch", "desc", "deploy", "unlock", "list"]


@pytest.mark.parametrize("command", ON_ONE)
def test_a_snapshot_that_does_not_exist_is_status_3(system: System, command: str) -> None:
    words = ["text"] if command == "desc" else []
    error = system.ash(command, NOWHERE, *words, status=MISSING).error
    assert error == f"ash: snapshot {NOWHERE} does not exist (ash tree lists the snapshots)"


@pytest.mark.parametrize("words", [["run", NOWHERE, "true"], ["chroot", NOWHERE]])
def test_run_and_chroot_exit_with_125_if_ash_fails(system: System, words: list[str | int]) -> None:
    system.ash(*words, status=OURS_IN_RUN)


def test_json_has_the_specific_status_of_a_failed_run(system: System) -> None:
    error = system.ash("--json", "run", NOWHERE, "true", status=OURS_IN_RUN).json["error"]
    assert error["status"] == MISSING
    assert f"{NOWHERE} does not exist" in error["message"]


@pytest.mark.parametrize("words", [["install", 0, "hello"], ["remove", 0, "less"]])
def test_the_base_cannot_be_changed(system: System, words: list[str | int]) -> None:
    with system.nothing_changes():
        assert "ash clone 0" in system.ash(*words, status=REFUSED).error
        assert "ash clone 0" in system.ash("run", 0, "touch", "/x", status=OURS_IN_RUN).error
        assert "ash clone 0" in system.ash("chroot", 0, status=OURS_IN_RUN, input="touch /usr/x\n").error


def test_resuming_the_shell_in_the_base_does_not_upgrade_it(system: System) -> None:
    with system.nothing_changes():
        assert "no unfinished work" in system.ash("base-update", "--resume", status=REFUSED).error
        assert "no unfinished work" in system.ash("chroot", 0, "--resume", status=OURS_IN_RUN).error


WANT_A_NUMBER = ["clone", "branch", "desc", "del", "deploy", "chroot", "run", "unlock", "install", "remove", "list"]


@pytest.mark.parametrize("command", WANT_A_NUMBER)
def test_on_an_image_the_number_is_required(system: System, command: str) -> None:
    status = OURS_IN_RUN if command in ("run", "chroot") else USAGE
    system.ash(command, status=status)


@pytest.mark.parametrize("command", ["current", "whichtmp"])
def test_no_snapshot_of_an_image_is_booted(system: System, command: str) -> None:
    assert "no snapshot of this system is running" in system.ash(command, status=FAILED).error


@pytest.mark.parametrize(
    "words",
    [
        ["desc", "N", "other"],
        ["clone", "N"],
        ["branch", "N"],
        ["new"],
        ["del", "N"],
        ["deploy", "N"],
        ["chroot", "N"],
        ["run", "N", "touch", "/etc/x"],
        ["unlock", "N"],
        ["tmp"],
        ["recover"],
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_changes_nothing(system: System, snapshot: int, words: list[str]) -> None:
    named = [str(snapshot) if word == "N" else word for word in words]
    with system.nothing_changes():
        outcome = system.ash("--dry-run", *named)
    assert outcome.stdout.startswith("would ")
    if words[0] != "chroot":
        answer = system.ash("--dry-run", "--json", *named).json
        assert (answer["changed"], answer["dry_run"]) == (False, True)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["clone", NOWHERE], MISSING),
        (["deploy", NOWHERE], MISSING),
        (["del", "0"], REFUSED),
        (["unlock", NOWHERE], MISSING),
        (["chroot", NOWHERE], OURS_IN_RUN),
        (["chroot", "0"], OURS_IN_RUN),
        (["auto-upgrade", NOWHERE], MISSING),
        (["auto-upgrade", "0"], REFUSED),
        (["run", "0", "true"], OURS_IN_RUN),
        (["undo", "N"], REFUSED),
        (["boot", "N"], REFUSED),
    ],
)
def test_a_dry_run_fails_if_the_command_would(
    system: System, snapshot: int, words: list[str | int], status: int
) -> None:
    system.ash("--dry-run", *(snapshot if word == "N" else word for word in words), status=status)


def test_a_dry_run_refuses_a_snapshot_with_a_session_that_hung_up(system: System, snapshot: int) -> None:
    system.shell(snapshot, "touch /etc/changed")
    (system.files.state / f"work/{snapshot}/intent").write_text('{"state": "kept"}')
    for command in ("undo", "mutable", "immutable", "del", "fixdb", "run", "chroot", "tree-run"):
        words = [command, snapshot, *(["true"] if command in ("run", "tree-run") else [])]
        status = OURS_IN_RUN if command in ("run", "chroot") else REFUSED
        assert "ash unlock" in system.ash("--dry-run", *words, status=status).error, command
    assert "would" in system.ash("--dry-run", "chroot", snapshot, "--resume").stdout
    system.ash("unlock", snapshot)


READING = [["tree"], ["list", 0], ["version"], ["tree", "-l"], ["help"]]


@pytest.mark.parametrize("words", READING, ids=lambda words: " ".join(map(str, words)))
def test_commands_that_only_read_change_nothing(system: System, words: list[str | int]) -> None:
    with system.nothing_changes():
        answer = system.ash("--json", *words).json
        system.ash(*words)
    assert answer["command"] == words[0]


def test_json_is_one_object_and_nothing_else_on_both_streams(system: System, snapshot: int) -> None:
    for words in (
        ["tree"],
        ["clone", 0],
        ["deploy", snapshot],
        ["list", 0],
        ["desc", snapshot, "x"],
        ["unlock", snapshot],
    ):
        outcome = system.ash("--json", *words)
        assert json.loads(outcome.stdout)["version"] == 1
        assert outcome.stderr == ""
    system.ash("deploy", 0)


def test_run_with_json_puts_the_commands_output_on_stderr(system: System, snapshot: int) -> None:
    outcome = system.ash("--json", "run", snapshot, "sh", "-c", "echo said; touch /etc/x")
    assert (outcome.json["changed"], outcome.json["status"]) == (True, 0)
    assert outcome.stderr == "said\n"
    assert system.ash("--json", "run", snapshot, "true").json["changed"] is False


def test_chroot_has_no_json(system: System, snapshot: int) -> None:
    assert system.ash("--json", "chroot", snapshot, status=OURS_IN_RUN).json["error"]["status"] == USAGE


def test_list_names_packages_with_their_versions(system: System) -> None:
    packages = system.ash("--json", "list", 0).json["packages"]
    assert packages["btrfs-progs"]
    assert any(
        line.split() == ["btrfs-progs", packages["btrfs-progs"]] for line in system.ash("list", 0).stdout.splitlines()
    )
    assert "btrfs-progs" in system.ash("-q", "list", 0).stdout.splitlines()


def test_version_names_version_and_distribution(system: System) -> None:
    answer = system.ash("--json", "version").json
    assert answer["distro"] == DISTRIBUTION
    assert system.ash("version").stdout == f"ash {answer['ash']} ({DISTRIBUTION})\n"


def test_unlock_and_tmp_say_if_nothing_was_left(system: System, snapshot: int) -> None:
    assert system.ash("--json", "unlock", snapshot).json["changed"] is False
    assert system.ash("--json", "tmp").json == {"version": 1, "command": "tmp", "snapshots": [], "changed": False}


def test_the_history_records_changes_and_failures(system: System, snapshot: int) -> None:
    system.shell(snapshot, "touch /etc/x")
    system.shell(snapshot, "exit 7", status=7)
    lines = [json.loads(line) for line in (system.files.state / "history").read_text().splitlines()]
    done, failed = lines[-2:]
    assert (done["command"], done["result"], done["snapshots"]) == ("run", "done", [snapshot])
    assert (failed["command"], failed["snapshots"]) == ("run", [snapshot])
    assert "7" in failed["result"]


def test_snapshots_stay_read_only(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo x > /etc/x; echo y > /boot/y")
    branch = system.branch(snapshot)
    system.ash("deploy", branch)
    system.shell(branch, "exit 1", status=FAILED)
    program("touch", system.root(snapshot) / "usr/x", status=1)
    program("touch", system.files.etc(snapshot) / "x", status=1)
    system.ash("deploy", 0)
    system.is_sound()


# Selecting a system


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--root", "/proc", "tree"], MISSING),
        (["--root", "/nowhere", "tree"], MISSING),
        (["--image", "/nowhere", "tree"], MISSING),
        (["--image", "/etc/passwd", "tree"], FAILED),
        (["tree"], MISSING),
        (["--root", "/", "--image", "/x", "tree"], USAGE),
    ],
)
def test_a_missing_system_is_an_error_of_one_line(words: list[str], status: int) -> None:
    program("python3", "-I", ASH, *words, status=status)


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A directory that every user can read."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_a_missing_distribution_is_named_in_the_error(system: System) -> None:
    assert "arch" in system.ash("--distro", "arch", "tree", status=MISSING).error


def test_without_root_ash_says_so_in_one_line(system: System, for_all: Path) -> None:
    copy = shutil.copy(ASH, for_all)  # the checkout may be root's alone
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-I", copy]
    program(*argv, "--image", str(system.image), "tree", status=REFUSED)
    program(*argv, "--image", str(system.image), "clone", "0", status=REFUSED)
    program(*argv, "version", status=0)
    program(*argv, "help", status=0)


def test_a_damaged_tree_file_is_reported_in_one_line(system: System) -> None:
    fstree = system.files.state / "fstree"
    good = fstree.read_text()
    fstree.write_text("{'name': 'root', ")
    try:
        for words in (["tree"], ["clone", 0], ["deploy", 0]):
            assert "the tree file" in system.ash(*words, status=FAILED).error
    finally:
        fstree.write_text(good)


def test_the_tree_file_of_the_old_ash_is_read(system: System) -> None:
    fstree = system.files.state / "fstree"
    good = fstree.read_text()
    try:
        fstree.write_text(str(json.loads(good, parse_int=str)) + "\n")
        numbers = {row["snapshot"] for row in system.ash("--json", "tree").json["tree"]}
    finally:
        fstree.write_text(good)
    assert numbers == system.files.tree()
