# SPDX-License-Identifier: AGPL-3.0-or-later
"""The grammar of the command line, including the forms that the old ash took."""

import contextlib
import errno
import inspect
import io
import json
import os
import struct
import sys
from pathlib import Path

import pytest

import ash
from ash import FAILED, MISSING, REFUSED, USAGE, AshError

pytestmark = pytest.mark.budget(5)


def parsed(line: str) -> ash.Request:
    """The request that a command line is parsed into."""
    return ash.parse(line.split())[1]


def refused(line: str) -> AshError:
    """The usage error that a command line raises."""
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


# All names and aliases; the commands in TO_COME do not exist yet.
ALIASES = """
tree t; current c; status; desc description; clone cl tree-clone; clone-tree ct; branch add-branch
cbranch clone-branch cb; ubranch clone-under cu; new new-tree; log history; del delete rm rem rm-snapshot
mutable immdis immdisable disimm disableimm; immutable immenable enimm enableimm; sub subs subvol subvols subvolumes
deploy dep d; undo; rollback; boot boot-update update-boot; whichtmp whichdep which; dist distro; hide; bless
chroot chr ch cr; run; tree-run trun; live-chroot lchroot lc; hollow; edit-conf edit; etc-update etc etc-up up-etc
unlock ul; tmp tmpclear; install in; install-profile; profiles; remove uninstall unin un uninst unins; tree-rmpkg tremove; upgrade up
hold; unhold; tree-upgrade tupgrade tup tree-update; auto-upgrade autoup au; check; base-update bu ub; refresh ref
fixdb fix; list ls; diff dif; whichsnap ws; sync tree-sync tsync; force-sync fsync; upself upme ash-update ast-sync
version; fsck; help; immen
"""
TO_COME = {"dist", "hide", "bless"}
WORDS = [line.split() for line in ALIASES.replace("\n", ";").split(";") if line.strip()]
EXISTING = {words[0] for words in WORDS} - TO_COME


@pytest.mark.parametrize(
    ("name", "word"), [(words[0], word) for words in WORDS if words[0] in EXISTING for word in words]
)
def test_every_alias_calls_its_command(name: str, word: str) -> None:
    assert ash.find_command(word).name == name


def test_no_word_calls_two_commands() -> None:
    words = [word for command in ash.COMMANDS for word in (command.name, *command.aliases)]
    assert len(words) == len(set(words))


def test_an_unknown_command_gets_a_suggestion() -> None:
    assert "deploy" in refused("deplyo 1").hint
    assert "install" in refused("instal 1 hello").hint


def test_without_a_similar_command_the_hint_is_the_help() -> None:
    assert refused("qqqqqq").hint == "ash help"


@pytest.mark.parametrize(
    "line", ["clone 7", "clone -s 7", "clone --snap 7", "clone --snapshot 7", "--json clone 7", "-q clone 7 --json"]
)
def test_the_snapshot_is_a_number_or_an_option(line: str) -> None:
    assert parsed(line).snapshots == [7]


@pytest.mark.parametrize("line", ["install firefox", "clone", "chroot", "deploy", "desc -d some text", "list"])
def test_the_snapshot_can_be_left_out(line: str) -> None:
    assert parsed(line).snapshots == []


def test_a_leading_integer_is_the_snapshot_later_ones_are_packages() -> None:
    args = parsed("install 1 2048 hello")
    assert (args.snapshots, args.packages) == ([1], ["2048", "hello"])


def test_a_package_whose_name_is_a_number_needs_the_option() -> None:
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
def test_packages_are_arguments_or_an_option(line: str) -> None:
    args = parsed(line)
    assert (args.snapshots, args.packages) == ([3], ["hello"])


@pytest.mark.parametrize("option", ["--snapshots", "--snaps"])
@pytest.mark.parametrize("command", ["install", "remove"])
def test_one_option_names_several_snapshots(command: str, option: str) -> None:
    args = parsed(f"{command} {option} 1 2 3 -p hello")
    assert (args.snapshots, args.packages) == ([1, 2, 3], ["hello"])


def test_words_after_the_numbers_of_several_snapshots_are_packages() -> None:
    args = parsed("install --snapshots 1 2 hello sl")
    assert (args.snapshots, args.packages) == ([1, 2], ["hello", "sl"])


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
    assert (args.snapshots, args.description) == ([3], "two words")


@pytest.mark.parametrize("command", ["clone 3", "branch 3", "new"])
@pytest.mark.parametrize("option", ["-d", "--desc", "--description"])
def test_commands_that_make_a_snapshot_take_a_description(command: str, option: str) -> None:
    assert parsed(f"{command} {option} two words").description == "two words"


@pytest.mark.parametrize("option", ["-2", "--sec", "--secondary"])
def test_a_secondary_deployment_has_three_spellings(option: str) -> None:
    assert parsed(f"deploy 3 {option}").secondary


@pytest.mark.parametrize("option", ["-l", "--live"])
def test_live_has_two_spellings(option: str) -> None:
    assert parsed(f"install 3 {option} -p hello").live


@pytest.mark.parametrize("option", ["-nl", "--not-live"])
@pytest.mark.parametrize("command", ["install", "remove"])
def test_package_commands_take_not_live(command: str, option: str) -> None:
    assert parsed(f"{command} 3 {option} -p hello").snapshots == [3]


@pytest.mark.parametrize("option", ["-c", "--cmd", "--command"])
def test_the_command_to_run_can_be_an_option_as_in_the_old_ash(option: str) -> None:
    args = parsed(f"run -s 3 {option} ls -l --all")
    assert (args.snapshots, args.command) == ([3], ["ls", "-l", "--all"])


@pytest.mark.parametrize("option", ["-s", "--snap", "--snapshot"])
@pytest.mark.parametrize("command", ["run", "trun"])
def test_the_number_can_follow_the_command_to_run_as_in_the_old_ash(command: str, option: str) -> None:
    _, args = ash.parse([command, "-c", "ls -s 4", option, "3"])
    assert (args.snapshots, args.command) == ([3], ["/bin/sh", "-c", "ls -s 4"])
    args = parsed(f"--image a.img {command} -c ls -l {option} 3")
    assert (args.snapshots, args.command) == ([3], ["ls", "-l"])
    args = parsed(f"{command} -s 5 -c ls {option} 3")
    assert (args.snapshots, args.command) == ([5], ["ls", option, "3"])
    assert "snapshot number" in refused(f"{command} -c ls {option} x").message


def test_everything_after_the_number_belongs_to_the_command_to_run() -> None:
    args = parsed("run 3 ls --json -q -s 4 --help")
    assert (args.snapshots, args.command) == ([3], ["ls", "--json", "-q", "-s", "4", "--help"])
    assert not args.json


@pytest.mark.parametrize("line", ["--json run 3 true", "run --json 3 true", "run --json -s 3 true"])
def test_options_before_the_number_belong_to_ash(line: str) -> None:
    args = parsed(line)
    assert args.json
    assert (args.snapshots, args.command) == ([3], ["true"])


@pytest.mark.parametrize("place", ["{0} clone 3", "clone {0} 3", "clone 3 {0}"])
@pytest.mark.parametrize(
    "option", ["--json", "--dry-run", "-v", "-q", "-y", "--yes", "--chroot", "--wait 5", "--distro debian"]
)
def test_global_options_can_stand_anywhere(place: str, option: str) -> None:
    assert parsed(place.format(option)).snapshots == [3]
    args = parsed(f"install 3 {option} hello")
    assert (args.snapshots, args.packages) == ([3], ["hello"])


@pytest.mark.parametrize(
    ("line", "numbers", "words"),
    [
        ("install 3 --live hello", [3], ["hello"]),
        ("remove 3 --purge hello", [3], ["hello"]),
        ("diff 1 --files 2", [1, 2], []),
        ("del 1 -y 2", [1, 2], []),
        ("install hello -s 3 sl", [3], ["hello", "sl"]),
        ("install 3 --remove gimp --live hello", [3], ["hello"]),
    ],
)
def test_options_can_stand_between_arguments(line: str, numbers: list[int], words: list[str]) -> None:
    args = parsed(line)
    assert (args.snapshots, args.packages) == (numbers, words)


def test_words_after_two_dashes_are_not_options() -> None:
    assert parsed("desc 3 -q -- -dash").description == "-dash"
    assert parsed("desc 3 - -5 -- --json").description == "- -5 --json"


@pytest.mark.parametrize(("option", "dest"), [("-p", "packages"), ("--remove", "remove"), ("--snapshots", "snapshots")])
def test_an_option_with_several_words_can_be_repeated(option: str, dest: str) -> None:
    for _ in range(2):  # what one line gave is not there with the next
        assert list(map(str, getattr(parsed(f"install {option} 3 {option} 4 5 -p x"), dest)))[:3] == ["3", "4", "5"]
    assert parsed("install -s 3 -s 4 hello").snapshots == [3, 4]
    assert parsed("ubranch -s 1 -s 2").snapshots == [1, 2]
    assert parsed("new -d one -d two").description == "one two"


@pytest.mark.parametrize(
    "line", ["clone -s 3 -s 4", "run -s 3 -s 4 true", "diff -s 1 -s 2 -s 3", "tree-run -s 3 -s 4 a"]
)
def test_too_many_snapshots_are_refused(line: str) -> None:
    assert "snapshots" in refused(line).message


# Commands on packages and trees, and shells: the documented forms and the old ones


@pytest.mark.parametrize(
    ("line", "numbers", "profile"),
    [
        ("install 3 --profile gnome", [3], "gnome"),
        ("install 3 -P gnome", [3], "gnome"),
        ("install -s 3 --prof gnome", [3], "gnome"),
        ("install --profile gnome", [], "gnome"),
        ("install --profile 3 gnome", [3], "gnome"),
        ("remove 3 --profile gnome", [3], "gnome"),
        ("uninst -s 3 -P gnome", [3], "gnome"),
        ("install 3 --profile ./a.conf", [3], "./a.conf"),
        ("install-profile gnome 1", [1], "gnome"),
        ("install-profile gnome", [], "gnome"),
        ("install-profile gnome --no-upgrade 1", [1], "gnome"),
        ("install-profile gnome --snap 1", [1], "gnome"),
        ("install-profile 1 gnome", [1], "gnome"),
        ("install-profile gnome --snapshots 1 2", [1, 2], "gnome"),
    ],
)
def test_a_profile_and_snapshots_are_told_apart(line: str, numbers: list[int], profile: str) -> None:
    args = parsed(line)
    assert (args.snapshots, args.profile, args.packages) == (numbers, profile, [])


@pytest.mark.parametrize(
    ("line", "profile", "numbers"),
    [
        ("install-profile ./x 1", "./x", [1]),
        ("install-profile ./x 1 2", "./x", [1, 2]),
        ("install-profile 1 ./x", "./x", [1]),
        ("install --profile 1 ./x", "./x", [1]),
        ("install --profile ./x 1", "./x", [1]),
        ("install --force -P ./x -s 1", "./x", [1]),
        ("remove --profile 1 ./x", "./x", [1]),
        ("remove 1 --profile ./x", "./x", [1]),
        ("tree-rmpkg 1 --profile ./x", "./x", [1]),
        ("tree-rmpkg --profile 1 ./x", "./x", [1]),
        ("tremove -P ./x -s 1", "./x", [1]),
        ("install -s 1 --prof ./x", "./x", [1]),
    ],
)
def test_every_form_names_the_same_profile_and_snapshot(line: str, profile: str, numbers: list[int]) -> None:
    command, args = ash.parse(line.split())
    system = ash.System(ash.Layout(Path("/nowhere"), "none"), ash.Distro())
    with pytest.raises(AshError, match=f"there is no profile {profile}"):
        command.function(system, args)
    assert (args.snapshots, args.profile) == (numbers, profile)


@pytest.mark.parametrize("option", ["-f", "--force"])
@pytest.mark.parametrize("name", ["install", "remove", "tree-rmpkg"])
def test_force_removes_what_ash_needs(option: str, name: str) -> None:
    args = parsed(f"{name} {option} 3 hello")
    assert (args.snapshots, args.packages, args.force) == ([3], ["hello"], True)
    assert "removes what ash needs" in outcome("help", name)[1]


@pytest.mark.parametrize("line", ["1 -P {0} -p sl", "1 -P {0} --remove sl", "1 -P {0} sl"])
def test_install_takes_no_packages_beside_a_profile(line: str, tmp_path: Path) -> None:
    profile = tmp_path / "x.conf"
    profile.write_text("[packages]\nhello\n")
    system = ash.System(ash.Layout(Path("/nowhere"), "none"), ash.Distro())
    with pytest.raises(AshError, match="unexpected argument 'sl'") as caught:
        ash.cmd_install(system, parsed(f"install {line.format(profile)}"))
    assert caught.value.status == USAGE


ON_A_TREE = ["tree-upgrade", "tupgrade", "tup", "tree-update", "sync", "tree-sync", "tsync", "force-sync", "fsync"]


@pytest.mark.parametrize("command", [*ON_A_TREE, "tree-rmpkg", "tremove", "tree-run", "trun"])
def test_tree_commands_take_a_number_and_jobs(command: str) -> None:
    words = {"tree-rmpkg": " hello", "tremove": " hello", "tree-run": " true", "trun": " true"}.get(command, "")
    every = len(os.sched_getaffinity(0))
    first = f"{command} -j 3{words}" if command in ("tree-run", "trun") else f"{command} 3{words} -j"
    for line in (first, f"{command} --parallel --snap 3{words}"):
        args = parsed(line)
        assert (args.snapshots, [*args.packages, *args.command], args.jobs) == ([3], words.split(), every)
    args = parsed(f"{command} --jobs 4 3{words}")
    assert (args.snapshots, args.jobs) == ([3], 4)


@pytest.mark.parametrize("command", [*ON_A_TREE, "tree-rmpkg", "tremove"])
@pytest.mark.parametrize("option", ["-j 4", "-j4", "--parallel 4", "--parallel=4"])
def test_a_number_after_j_is_not_taken_for_a_snapshot(command: str, option: str) -> None:
    for line in (f"{command} {option}", f"{command} 3 {option}", f"{command} {option} 3"):
        error = refused(line)
        assert "takes no number" in error.message
        assert "--jobs 4" in error.hint


@pytest.mark.parametrize(
    "line", ["tree-rmpkg 3 firefox paru", "tremove -s 3 -p firefox paru", "tremove 3 --pkg firefox paru"]
)
def test_packages_of_a_tree_are_arguments_or_an_option(line: str) -> None:
    args = parsed(line)
    assert (args.snapshots, args.packages) == ([3], ["firefox", "paru"])


@pytest.mark.parametrize("command", ["hold", "unhold"])
@pytest.mark.parametrize("how", ["3 hello", "-s 3 hello", "-s 3 -p hello", "3 --package hello"])
def test_hold_takes_packages_as_install_does(command: str, how: str) -> None:
    args = parsed(f"{command} {how}")
    assert (args.snapshots, args.packages) == ([3], ["hello"])


@pytest.mark.parametrize("command", ["upgrade", "up", "refresh", "ref", "fixdb", "fix"])
def test_upgrade_refresh_and_fixdb_take_several_snapshots(command: str) -> None:
    assert parsed(command).snapshots == []
    for numbers in ("1 2 3", "--snapshots 1 2 3", "--snaps 1 2 3", "-s 1 2 3"):
        assert parsed(f"{command} {numbers}").snapshots == [1, 2, 3]
    refused(f"{command} 1 hello")


@pytest.mark.parametrize("line", ["whichsnap firefox paru", "ws -p firefox paru", "ws firefox --pkg paru"])
def test_whichsnap_takes_packages_only(line: str) -> None:
    args = parsed(line)
    assert args.packages == ["firefox", "paru"]


def test_a_number_is_a_package_to_whichsnap() -> None:
    assert parsed("ws 2048").packages == ["2048"]


@pytest.mark.parametrize("command", ["install", "remove", "install-profile", "upgrade", "sync", "force-sync"])
def test_live_commands_share_their_options(command: str) -> None:
    words = {"install": "hello", "remove": "hello", "install-profile": "gnome"}.get(command, "")
    live, not_live = ((f"{command} 3 {words} {option}" for option in pair) for pair in (LIVE, NOT_LIVE))
    assert all(parsed(line).live is True for line in live)
    assert all(parsed(line).live is False for line in not_live)
    assert parsed(f"{command} 3 {words}").live is None
    assert "--not-live" in refused(f"{command} 3 {words} --live --not-live").message


@pytest.mark.parametrize("options", ["--secondary --no-secondary", "--fresh-etc --with-saved"])
def test_options_of_deploy_that_contradict_each_other_are_refused(options: str) -> None:
    assert refused(f"deploy 3 {options}").message == f"{options.replace(' ', ' and ')} contradict each other"


LIVE, NOT_LIVE = ("-l", "--live"), ("-nl", "--not-live")


@pytest.mark.parametrize("line", ["install --live 3 hello", "install -l 3 hello", "install 3 hello --live"])
def test_live_stands_before_the_number_or_after_the_package(line: str) -> None:
    args = parsed(line)
    assert (args.snapshots, args.packages, args.live) == ([3], ["hello"], True)


@pytest.mark.parametrize("option", ["-f", "--force", "--force-offline"])
def test_sync_takes_force(option: str) -> None:
    for line in (f"sync {option} 3", f"tsync -s 3 {option}"):
        args = parsed(line)
        assert (args.snapshots, args.force) == ([3], True)
    assert not parsed("sync 3").force


@pytest.mark.parametrize("option", ["--download-only", "-d", "-t"])
@pytest.mark.parametrize("command", ["upself", "upme", "ash-update", "ast-sync"])
def test_upself_has_the_old_options_for_downloading(command: str, option: str) -> None:
    assert parsed(f"{command} {option}").download_only
    assert not parsed(command).download_only
    assert parsed(f"{command} --force").force


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("base-update --shell", "shell"),
        ("base-update --resume", "resume"),
        ("bu --strict", "strict"),
        ("chroot 3 --resume", "resume"),
        ("hollow 3 --resume", "resume"),
        ("upgrade 3 --download-only", "download_only"),
        ("upgrade 3 --strict", "strict"),
        ("tree-upgrade 3 --download-only", "download_only"),
        ("auto-upgrade 3 --strict", "strict"),
        ("refresh 3 --strict", "strict"),
        ("install 3 --profile gnome --no-upgrade", "no_upgrade"),
        ("install-profile gnome 3 --no-upgrade", "no_upgrade"),
        ("remove 3 hello --purge", "purge"),
        ("remove 3 hello --delete-data", "delete_data"),
        ("tree-rmpkg 3 hello --purge", "purge"),
        ("sync 3 --keep", "keep"),
        ("force-sync 3 --keep", "keep"),
        ("deploy 3 --fresh-etc", "fresh_etc"),
        ("deploy 3 --fresh", "fresh"),
        ("deploy 3 --with-saved", "with_saved"),
        ("deploy 3 --no-secondary", "no_secondary"),
        ("del 3 --nuke", "nuke"),
        ("tree -l", "long"),
        ("diff 3 4 --files", "files"),
        ("diff --patch", "patch"),
        ("fsck --repair", "repair"),
    ],
)
def test_each_command_has_its_options(line: str, option: str) -> None:
    assert getattr(parsed(line), option) is True
    others = " ".join(word for word in line.split() if word != f"--{option.replace('_', '-')}" and word != "-l")
    assert getattr(parsed(others), option) is False


def test_install_takes_packages_to_remove() -> None:
    args = parsed("install 3 firefox --remove paru gimp")
    assert (args.snapshots, args.packages, args.remove) == ([3], ["firefox"], ["paru", "gimp"])


@pytest.mark.parametrize(
    "command",
    ["live-chroot", "lchroot", "lc", "check", "profiles", "base-update", "bu", "ub", "upself", "rollback", "current",
     "etc-update", "etc", "tmp", "tmpclear", "whichtmp", "new", "new-tree", "sub", "status", "recover"],
)  # fmt: skip
def test_commands_without_a_snapshot_take_no_number(command: str) -> None:
    parsed(command)
    refused(f"{command} 3")


@pytest.mark.parametrize(
    "command", ["hollow", "auto-upgrade", "autoup", "au", "edit-conf", "edit", "unlock", "ul", "boot", "chroot", "lc"]
)
def test_commands_for_one_snapshot_take_one_number(command: str) -> None:
    assert command == "lc" or parsed(f"{command} 3").snapshots == [3]
    assert command == "lc" or parsed(command).snapshots == []
    refused(f"{command} 3 4")


@pytest.mark.parametrize("line", ["ubranch 1 2", "cu -s 1 2", "clone-under --snap 1 2"])
def test_the_parent_comes_first(line: str) -> None:
    assert parsed(line).snapshots == [1, 2]


@pytest.mark.parametrize("command", ["immen", "immenable", "enimm", "immdis", "disableimm", "mutable", "immutable"])
def test_mutability_commands_take_a_number(command: str) -> None:
    for line in (f"{command} 9", f"{command} -s 9"):
        assert parsed(line).snapshots == [9]


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


def test_options_cannot_be_abbreviated() -> None:
    refused("clone 3 --desc-ription x")
    refused("deploy 3 --second")


def test_remove_with_only_a_number_hints_at_del() -> None:
    hint = refused("remove 5").hint
    assert "ash del N" in hint
    assert "ash remove N PKG" in hint


def test_no_argument_prints_the_help() -> None:
    status, out, _ = outcome()
    assert status == 0
    assert all(command.usage in out for command in ash.COMMANDS)


@pytest.mark.parametrize("line", ["help", "-h", "--help"])
def test_help_names_every_command(line: str) -> None:
    assert outcome(line) == outcome()


def test_version_is_also_an_option() -> None:
    assert outcome("--version") == outcome("version")


@pytest.mark.parametrize("name", [command.name for command in ash.COMMANDS])
def test_help_explains_every_command(name: str) -> None:
    status, out, _ = outcome("help", name)
    command = ash.find_command(name)
    assert status == 0
    assert command.usage in out
    assert command.help in " ".join(out.split())
    assert outcome(name, "-h") == outcome("-q", name, "--help") == (0, out, "")


def test_each_option_sets_a_field_of_the_request() -> None:
    combined = {"several": "snapshots", "parallel": "jobs", "not_live": "live", "help": "words"}
    options = [option for command in ash.COMMANDS for option in command.all_options()]
    names = {combined.get(option.dest, option.dest) for option in (*options, *ash.GLOBAL_OPTIONS)}
    assert names == set(ash.Request._fields)


# They pass --dry-run to the package manager, which simulates the change.
SIMULATING = {"install", "install-profile", "remove", "upgrade", "tree-upgrade", "tree-rmpkg", "sync", "force-sync"}


def test_a_command_that_changes_something_yields_a_plan_first() -> None:
    changing = {command.name: command.function for command in ash.COMMANDS if command.changes}
    plans = {name for name, done in changing.items() if inspect.signature(done).return_annotation == "Plan"}
    assert plans == changing.keys() - SIMULATING


def test_a_dry_run_ends_at_the_plan() -> None:
    done: list[str] = []

    def change(system: ash.System, request: ash.Request) -> ash.Plan:
        yield ash.would("do it")
        done.append("it")
        return ash.Reply(text="done")

    command = ash.find_command("new")._replace(function=change)
    system = ash.System(ash.Layout(Path("/nowhere"), "none"), ash.Distro())
    assert ash.carry_out(command, system, ash.Request(dry_run=True)) == ash.would("do it")
    assert done == []
    assert ash.carry_out(command, system, ash.Request()).text == "done"
    assert done == ["it"]


def test_an_error_is_one_line_on_stderr_with_a_hint() -> None:
    status, out, err = outcome("frobnicate")
    assert status == USAGE
    assert out == ""
    assert err.startswith("ash: there is no command 'frobnicate' (")
    assert err.count("\n") == 1


def test_an_error_in_json_has_its_status() -> None:
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


def test_run_exits_with_125_if_ash_fails_and_json_has_the_specific_status() -> None:
    status, out, _ = outcome("--json", "--image", "/nowhere/at.all", "run", "1", "true")
    assert status == ash.OUR_FAILURE_IN_RUN
    assert json.loads(out)["error"]["status"] in (MISSING, REFUSED)


def test_the_exit_statuses_are_those_of_the_command_reference() -> None:
    assert (FAILED, USAGE, MISSING, ash.LOCKED, REFUSED, ash.OUR_FAILURE_IN_RUN) == (1, 2, 3, 4, 5, 125)


def test_a_file_that_is_not_a_disk_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(bytes(2 << 20))
    with pytest.raises(AshError, match=r"not a disk image"):
        ash.btrfs_partition(tmp_path / "x.img")
    (tmp_path / "x.img").write_bytes(b"")
    with pytest.raises(AshError, match=r"not a disk image"):
        ash.btrfs_partition(tmp_path / "x.img")


def partition_table(table: int = 2, count: int = 4, size: int = 128, first: int = 2048, last: int = 4095) -> bytes:
    """The beginning of a disk with a GPT and one partition."""
    header = (b"EFI PART" + bytes(64) + struct.pack("<QII", table, count, size)).ljust(512, b"\0")
    return bytes(512) + header + (bytes(32) + struct.pack("<QQ", first, last)).ljust(512, b"\0")


@pytest.mark.parametrize(
    "content",
    [
        partition_table(),
        partition_table()[:600],
        partition_table()[:520],
        partition_table()[:1050],
        partition_table(table=2**63),
        partition_table(table=2**60),
        partition_table(count=2**32 - 1, size=2**32 - 1),
        partition_table(count=2**32 - 1, size=0),
        partition_table(count=2**32 - 1, size=1),
        partition_table(first=2**63),
        partition_table(first=2**54),
        partition_table(first=5, last=3),
        partition_table().ljust(2 << 20, b"\xff"),
    ],
)
def test_a_torn_or_odd_partition_table_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(content)
    with pytest.raises(AshError, match=r"not a disk image"):
        ash.btrfs_partition(tmp_path / "x.img")


# A full disk


FULL = OSError(errno.ENOSPC, "No space left on device")


def raised_from(error: AshError, cause: Exception) -> AshError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("name", "error", "calls"),
    [
        ("undo", FULL, 2),
        ("undo", OSError(errno.EDQUOT, "Disk quota exceeded"), 2),
        ("undo", raised_from(AshError("not deleted"), FULL), 2),
        ("undo", ash.ProgramError("cp failed (1)", output="cp: error writing: No space left on device"), 2),
        ("undo", ash.PackageError("E: Write error - write (122: Disk quota exceeded)"), 2),
        ("undo", raised_from(ash.CommittedButUnfinished("unfinished"), FULL), 1),  # a second undo would be a redo
        ("recover", raised_from(ash.CommittedButUnfinished("unfinished"), FULL), 2),
        ("undo", AshError("another reason"), 1),
        ("undo", AshError("a file is named No space left on device"), 1),
        ("clone", FULL, 1),  # does not free any
    ],
)
def test_commands_that_free_space_retry_with_the_reserve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, error: Exception, calls: int
) -> None:
    called = []

    def fails(system: ash.System, request: ash.Request) -> ash.Reply:
        called.append(name)
        raise error

    monkeypatch.setattr(ash.System, "free_reserve", lambda _: None)
    monkeypatch.setattr(ash.History, "append", lambda *_: None)
    command = ash.find_command(name)._replace(function=fails)
    system = ash.System(ash.Layout(tmp_path, "debian"), ash.Distro())
    with pytest.raises(type(error)):
        ash.change_system(command, system, ash.Request())
    assert len(called) == calls


def test_a_bug_in_ash_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ash.console, "verbose", False)
    for error in (RecursionError("too deep"), ValueError("a\nb"), KeyError("x")):

        def fail(*_: object, error: Exception = error) -> ash.Reply:
            raise error

        monkeypatch.setattr(ash, "execute", fail)
        status, out, err = outcome("tree")
        assert (status, out) == (FAILED, "")
        assert err == f"ash: an error in ash itself: {error!r} (-v prints the traceback; please report it)\n"
        assert json.loads(outcome("--json", "tree")[1])["error"]["status"] == FAILED
        with pytest.raises(type(error)):
            outcome("-v", "tree")


@pytest.mark.parametrize("word", ["--desc=a b", "-d=a b", "-da b", "--description=a b"])
def test_a_value_with_spaces_can_be_part_of_the_option(word: str) -> None:
    assert ash.parse(["clone", "0", word])[1].description == "a b"


@pytest.mark.parametrize("word", ["--root=/tmp/a b", "--image=/tmp/a b.img"])
def test_a_path_with_spaces_can_be_part_of_the_option(word: str) -> None:
    request = ash.parse([word, "clone", "0"])[1]
    assert str(request.root or request.image) == word.partition("=")[2]


def test_a_command_may_be_part_of_the_option() -> None:
    assert list(ash.parse(["run", "-s", "1", "--cmd=echo hello"])[1].command) == ["/bin/sh", "-c", "echo hello"]


@pytest.mark.parametrize("words", [["desc", "1", "text", "-q1"], ["hold", "1", "bash", "-y5"], ["tree", "-vx"]])
def test_nothing_but_flags_can_follow_a_flag(words: list[str]) -> None:
    with pytest.raises(AshError, match="there is no option -") as error:
        ash.parse(words)
    assert error.value.status == USAGE


def test_a_table_keeps_the_spaces_that_indent_the_tree() -> None:
    assert (
        ash.text_table([["0", "base"], ["  1", "web"]], ["snapshot", "description"]).splitlines()[-1]
        == "  1         web"
    )


@pytest.mark.parametrize(
    ("typed", "goes_on"), [("y\n", True), (" YES\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_a_question_is_asked_on_stderr_and_the_end_of_the_input_is_no(
    typed: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with contextlib.nullcontext() if goes_on else pytest.raises(AshError, match="nothing was changed"):
        ash.require_confirmation(ash.Request(), "delete snapshot 3")
    said = capsys.readouterr()
    assert (said.out, said.err.strip()) == ("", "delete snapshot 3? [y/N]")
