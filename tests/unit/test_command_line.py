# SPDX-License-Identifier: AGPL-3.0-or-later
"""The grammar of the command line, as the command reference has it, with all that the old ash took."""

import argparse
import contextlib
import io
import json
from pathlib import Path

import pytest

import ash
from ash import FAILED, MISSING, REFUSED, USAGE, AshError

pytestmark = pytest.mark.budget(5)


def parsed(line: str) -> argparse.Namespace:
    """What ash makes of a command line."""
    return ash.parse(line.split())[1]


def refused(line: str) -> AshError:
    """The error that a command line is answered with; it must be one of usage."""
    with pytest.raises(AshError) as caught:
        ash.parse(line.split())
    assert caught.value.status == USAGE
    return caught.value


def outcome(*argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ash."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = ash.main(argv)
    return status, out.getvalue(), err.getvalue()


# Every name and alias of the command reference, also of what is still to come.
ALIASES = """
tree t; current c; status; desc description; clone cl tree-clone; clone-tree ct; branch add-branch
cbranch clone-branch cb; ubranch clone-under cu; new new-tree; log history; del delete rm rem rm-snapshot
mutable immdis immdisable disimm disableimm; immutable immenable enimm enableimm; sub subs subvol subvols subvolumes
deploy dep d; undo; rollback; boot boot-update update-boot; whichtmp whichdep which; dist distro; hide; bless
chroot chr ch cr; run; tree-run trun; live-chroot lchroot lc; hollow; edit-conf edit; etc-update etc etc-up up-etc
unlock ul; tmp tmpclear; install in; profiles; remove uninstall unin un uninst unins; tree-rmpkg tremove; upgrade up
hold; unhold; tree-upgrade tupgrade tup tree-update; auto-upgrade autoup au; check; base-update bu ub; refresh ref
fixdb fix; list ls; diff dif; whichsnap ws; sync tree-sync tsync; force-sync fsync; upself upme ash-update ast-sync
version; fsck; help
"""
WORDS = [line.split() for line in ALIASES.replace("\n", ";").split(";") if line.strip()]
EXISTING = {command.name for command in ash.COMMANDS}


@pytest.mark.parametrize(
    ("name", "word"), [(words[0], word) for words in WORDS if words[0] in EXISTING for word in words]
)
def test_every_alias_calls_its_command(name: str, word: str) -> None:
    assert ash.find_command(word).name == name


def test_no_word_calls_two_commands() -> None:
    words = [word for command in ash.COMMANDS for word in (command.name, *command.aliases)]
    assert len(words) == len(set(words))


def test_an_unknown_word_is_answered_with_the_nearest_one() -> None:
    assert "deploy" in refused("deplyo 1").hint
    assert "install" in refused("instal 1 hello").hint


def test_a_word_that_is_like_no_command_is_pointed_to_the_help() -> None:
    assert refused("qqqqqq").hint == "ash help"


@pytest.mark.parametrize(
    "line", ["clone 7", "clone -s 7", "clone --snap 7", "clone --snapshot 7", "--json clone 7", "-q clone 7 --json"]
)
def test_the_snapshot_is_a_number_or_an_option(line: str) -> None:
    assert parsed(line).snapshots == [7]


@pytest.mark.parametrize("line", ["install firefox", "clone", "chroot", "deploy", "desc -d some text", "list"])
def test_the_snapshot_can_be_left_out(line: str) -> None:
    assert parsed(line).snapshots == []


def test_a_leading_integer_is_the_snapshot_and_later_ones_are_packages() -> None:
    args = parsed("install 1 2048 hello")
    assert (args.snapshots, args.words) == ([1], ["2048", "hello"])


def test_a_package_with_a_number_for_a_name_comes_with_its_option() -> None:
    args = parsed("install -p 2048")
    assert (args.snapshots, args.packages) == ([], ["2048"])
    args = parsed("install 3 -p 2048 hello")
    assert (args.snapshots, args.packages) == ([3], ["2048", "hello"])


@pytest.mark.parametrize(
    "line",
    [
        "install 3 hello",
        "in -s 3 -p hello",
        "install -s 3 --pkg hello",
        "install --snap 3 --package hello",
        "in -s 3 hello",
    ],
)
def test_packages_are_words_or_an_option(line: str) -> None:
    args = parsed(line)
    assert (args.snapshots, args.words + args.packages) == ([3], ["hello"])


@pytest.mark.parametrize("option", ["--snapshots", "--snaps"])
@pytest.mark.parametrize("command", ["install", "remove"])
def test_several_snapshots_are_named_with_one_option(command: str, option: str) -> None:
    args = parsed(f"{command} {option} 1 2 3 -p hello")
    assert (args.snapshots, args.packages) == ([1, 2, 3], ["hello"])


def test_what_follows_the_numbers_of_several_snapshots_are_packages() -> None:
    args = parsed("install --snapshots 1 2 hello sl")
    assert (args.snapshots, args.words) == ([1, 2], ["hello", "sl"])


@pytest.mark.parametrize("line", ["del 1 2 3", "rm 1 2 3", "del --snaps 1 2 3", "rem --snapshots 1 2 3"])
def test_several_snapshots_are_deleted_at_once(line: str) -> None:
    assert parsed(line).snapshots == [1, 2, 3]


def test_del_takes_numbers_only() -> None:
    refused("del 1 hello")


@pytest.mark.parametrize(
    "line",
    [
        "desc 3 two words",
        "desc -s 3 two words",
        "desc 3 -d two words",
        "desc 3 --desc two words",
        "desc -s 3 --description two words",
    ],
)
def test_a_description_is_several_words(line: str) -> None:
    args = parsed(line)
    assert (args.snapshots, args.desc + args.words) == ([3], ["two", "words"])


@pytest.mark.parametrize("command", ["clone 3", "branch 3", "new"])
@pytest.mark.parametrize("option", ["-d", "--desc", "--description"])
def test_what_makes_a_snapshot_takes_a_description(command: str, option: str) -> None:
    assert parsed(f"{command} {option} two words").desc == ["two", "words"]


@pytest.mark.parametrize("option", ["-2", "--sec", "--secondary"])
def test_a_secondary_deployment_has_three_spellings(option: str) -> None:
    assert parsed(f"deploy 3 {option}").secondary


@pytest.mark.parametrize("option", ["-l", "--live"])
def test_live_has_two_spellings(option: str) -> None:
    assert parsed(f"install 3 {option} -p hello").live


@pytest.mark.parametrize("option", ["-nl", "--not-live"])
@pytest.mark.parametrize("command", ["install", "remove"])
def test_not_live_is_taken_by_what_changes_packages(command: str, option: str) -> None:
    assert parsed(f"{command} 3 {option} -p hello").snapshots == [3]


@pytest.mark.parametrize("option", ["-c", "--cmd", "--command"])
def test_the_old_ash_named_a_command_by_an_option(option: str) -> None:
    args = parsed(f"run -s 3 {option} ls -l --all")
    words = [*args.words, *args.command_words]
    assert (args.snapshots, [word for word in words if word != option]) == ([3], ["ls", "-l", "--all"])


def test_all_words_after_the_number_belong_to_the_command_that_is_run() -> None:
    args = parsed("run 3 ls --json -q -s 4 --help")
    assert (args.snapshots, args.words) == ([3], ["ls", "--json", "-q", "-s", "4", "--help"])
    assert not args.json


@pytest.mark.parametrize("line", ["--json run 3 true", "run --json 3 true", "run --json -s 3 true"])
def test_options_before_the_number_are_those_of_ash(line: str) -> None:
    args = parsed(line)
    assert args.json
    assert (args.snapshots, args.words) == ([3], ["true"])


@pytest.mark.parametrize("place", ["{0} clone 3", "clone {0} 3", "clone 3 {0}"])
@pytest.mark.parametrize(
    "option", ["--json", "--dry-run", "-v", "-q", "-y", "--yes", "--chroot", "--wait 5", "--distro debian"]
)
def test_options_of_all_commands_stand_anywhere(place: str, option: str) -> None:
    assert parsed(place.format(option)).snapshots == [3]


@pytest.mark.parametrize(
    "line",
    [
        "--image a.img clone",
        "--root /mnt install hello",
        "--image a.img install -p 2048",
        "--image a.img deploy",
        "--image a.img list",
        "--root /mnt --image a.img tree",
        "clone 1 2",
        "deploy x",
        "tree 5",
        "version 3",
        "clone --frobnicate",
        "clone -s x",
        "--wait x tree",
        "clone 1.5",
        "clone -1",
    ],
)
def test_a_wrong_command_line_is_refused(line: str) -> None:
    refused(line)


def test_a_long_option_is_never_guessed() -> None:
    refused("clone 3 --desc-ription x")
    refused("deploy 3 --second")


def test_remove_of_a_number_alone_names_both_commands_that_it_could_mean() -> None:
    command, args = ash.parse(["remove", "5"])
    with pytest.raises(AshError) as caught:
        ash.cmd_remove(ash.System(ash.Layout(Path("/nowhere"), "none"), ash.Distro()), args)
    assert command.name == "remove"
    assert caught.value.status == USAGE
    assert "ash del 5" in caught.value.hint
    assert "ash remove 5 PKG" in caught.value.hint


def test_no_argument_prints_the_help() -> None:
    status, out, _ = outcome()
    assert status == 0
    assert all(command.usage in out for command in ash.COMMANDS)


@pytest.mark.parametrize("line", ["help", "-h", "--help"])
def test_help_names_every_command(line: str) -> None:
    assert outcome(line) == outcome()


@pytest.mark.parametrize("name", [command.name for command in ash.COMMANDS])
def test_every_command_explains_itself(name: str) -> None:
    status, out, _ = outcome("help", name)
    command = ash.find_command(name)
    assert status == 0
    assert command.usage in out
    assert command.help in " ".join(out.split())
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stdout(io.StringIO()) as by_option:
        ash.main([name, "-h"])
    assert (caught.value.code, by_option.getvalue().strip()) == (0, out.strip())


def test_an_error_is_one_line_on_stderr_with_what_to_do() -> None:
    status, out, err = outcome("frobnicate")
    assert status == USAGE
    assert out == ""
    assert err.startswith("ash: there is no command 'frobnicate' (")
    assert err.count("\n") == 1


def test_an_error_in_json_has_its_status_and_shape() -> None:
    status, out, _ = outcome("--json", "tree", "5")
    answer = json.loads(out)
    assert status == USAGE
    assert (answer["version"], answer["command"]) == (1, "tree")
    assert answer["error"]["status"] == USAGE
    assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("--image /nowhere/at.all tree", MISSING),
        ("--root /nowhere/at-all tree", MISSING),
        ("--root /proc tree", MISSING),
        ("run", USAGE),
        ("install", USAGE),
    ],
)
def test_exit_statuses(line: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ash, "private_mounts", lambda: None)
    monkeypatch.setattr(ash, "require_root", lambda _: None)
    expected = {125, status} if line == "run" else {status, MISSING, REFUSED}
    assert outcome(*line.split())[0] in expected


def test_a_failure_of_ash_itself_in_run_is_125_and_json_has_the_particular_one() -> None:
    status, out, _ = outcome("--json", "--image", "/nowhere/at.all", "run", "1", "true")
    assert status == ash.OUR_FAILURE_IN_RUN
    assert json.loads(out)["error"]["status"] in (MISSING, REFUSED)


def test_the_exit_statuses_are_those_of_the_command_reference() -> None:
    assert (FAILED, USAGE, MISSING, ash.LOCKED, REFUSED, ash.OUR_FAILURE_IN_RUN) == (1, 2, 3, 4, 5, 125)


def test_a_file_that_is_no_disk_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(bytes(2 << 20))
    with pytest.raises(AshError, match=r"no disk image"):
        ash.btrfs_partition(tmp_path / "x.img")
    (tmp_path / "x.img").write_bytes(b"")
    with pytest.raises(AshError, match=r"no disk image"):
        ash.btrfs_partition(tmp_path / "x.img")


# A full disk


@pytest.mark.parametrize(
    ("name", "error", "calls"),
    [
        ("undo", AshError("No space left on device"), 2),
        ("undo", ash.Unfinished("No space left on device"), 1),  # a second undo would be a redo
        ("recover", ash.Unfinished("No space left on device"), 2),
        ("undo", AshError("another reason"), 1),
        ("clone", AshError("No space left on device"), 1),  # does not free any
    ],
)
def test_what_frees_space_is_tried_again_with_the_reserve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, error: AshError, calls: int
) -> None:
    called = []

    def fails(system: ash.System, args: argparse.Namespace) -> ash.Reply:
        called.append(name)
        raise error

    monkeypatch.setattr(ash, f"cmd_{name}", fails)
    monkeypatch.setattr(ash.System, "free_reserve", lambda _: None)
    command = ash.find_command(name)._replace(function=fails)
    system = ash.System(ash.Layout(tmp_path, "debian"), ash.Distro())
    with pytest.raises(AshError):
        ash.on_a_full_disk_too(command, system, argparse.Namespace())
    assert len(called) == calls
