# SPDX-License-Identifier: AGPL-3.0-or-later
"""Damaged and hostile state files and command lines: parsed correctly or refused in one line, never a traceback."""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ash
from ash import (
    AccountIds,
    AshError,
    BootConfig,
    Configuration,
    Deployment,
    EtcMerge,
    GrubNotes,
    Layout,
    Menu,
    System,
    Tree,
    WorkDir,
    merge_accounts,
)
from distros.debian.ashpk import Debian, version_key

pytestmark = pytest.mark.budget(30)

Found = TypeVar("Found")

FUZZ = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=100
)

# Values that break programs that expect another type or range.
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**40,
    float("inf"),
    float("nan"),
    "",
    "0",
    "-1",
    "1_0",
    "\u0663",
    "9" * 5000,
]
ODD += ["../../x", "/etc/passwd", "a\nb", "\x00", "\x1b[2J", "\u202e", "\u2028", [], {}, [[]], [None], {"": 0}]
ODD.append("\ud800")
DOCUMENTS: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LITERALS = DOCUMENTS.map(repr) | st.tuples(DOCUMENTS, DOCUMENTS).map(lambda pair: f"{{{pair[0]!r}: {pair[1]!r}}}")
PIECES = ["", "[" * 5000, "{", "}", '"', "'", ":", ",", "9" * 5000, "\x00", "NaN"]


def places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a document."""
    yield here
    items: Any = ()
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield from places(value, (*here, key))


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with another value at a path."""
    if not place:
        return value
    copy = document.copy()
    copy[place[0]] = changed(document[place[0]], place[1:], value)
    return copy


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> str:
    """A document as JSON with some of its values changed, and some of its text."""
    for _ in range(draw(st.integers(0, 2))):
        document = changed(document, draw(st.sampled_from(list(places(document)))), draw(DOCUMENTS))
    text = json.dumps(document)
    if draw(st.booleans()):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 4))
        text = text[:start] + draw(st.sampled_from(PIECES)) + text[end:]
    return text


def texts_like(document: Any) -> st.SearchStrategy[str]:
    """Mutations of a document, and any text."""
    return st.one_of(mutated(document), mutated(document), st.text(max_size=50), LITERALS)


def either(function: Callable[[], Found]) -> Found | None:
    """The result of a function, or None if it raises AshError; other exceptions are failures."""
    try:
        return function()
    except AshError:
        return None


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


# The tree


@given(texts_like({"name": "root", "children": [{"name": 0}, {"name": 3, "children": [{"name": "4"}]}]}))
@FUZZ
def test_a_tree_file(text: str) -> None:
    tree = either(lambda: Tree.parse(text))
    if tree is None:
        return
    numbers = tree.numbers()
    assert all(type(number) is int and number >= 0 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    again = Tree.parse(tree.dump())
    assert [(n, again.parent(n)) for n in again.numbers()] == [(n, tree.parent(n)) for n in numbers]
    tree.draw(str)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "text",
    [
        '{"name": "root", "children": [{"name": 1.5}]}',
        '{"name": "root", "children": [{"name": true}]}',
        '{"name": "root", "children": [{"name": "1_0"}]}',
        '{"name": "root", "children": [{"name": 0, "parent": 3}]}',
        '{"name": "root", "children": [{"name": 0, "height": 3}]}',
        '{"name": "root", "children": [{"name": Infinity}]}',
        '{"name": "root", "children": [{"name": ' + "9" * 400 + "}]}",
        '{"name": "root", "children": "0123"}',
        '{"name": "root", "children": {"name": 0}}',
        "[" * 50000,
        "(" * 50000,
        "0is None",
        "__import__('os').system('touch /tmp/x')",
        "{[]: 1}",
        "{{}: 1}",
        "{'name': 'root', [0]: 1}",
    ],
)
def test_an_invalid_tree_file_is_refused(text: str) -> None:
    with pytest.raises(AshError, match="the tree file cannot be read"):
        Tree.parse(text)


# Small files of the state


@pytest.mark.parametrize("line", ["auto_upgrade::\u017ftage", "auto_upgrade_window::0\u0662:00-05:00"])
def test_values_of_a_configuration_are_ascii(line: str) -> None:
    with pytest.raises(AshError, match=r"line 1 of ash\.conf is wrong"):
        Configuration.parse(line)


def test_a_key_of_a_later_ash_is_a_warning_unless_somebody_edits(capsys: pytest.CaptureFixture[str]) -> None:
    text = "of_tomorrow::1\naur::True\n"
    assert Configuration.parse(text).values == Configuration.parse(text).values == {"aur": "True"}
    assert capsys.readouterr().err == "warning: line 1 of ash.conf has no effect: this ash knows no key of_tomorrow\n"
    with pytest.raises(AshError, match=r"line 1 of ash\.conf is wrong"):
        Configuration.parse(text, strict=True)


@given(
    st.text()
    | st.lists(
        st.sampled_from(["mutable_dirs::", "aur::", "a/b", "..", ".", "/", ",", "\n", " ", "\u2028", "\x0c", "#"])
    ).map("".join)
)
def test_a_configuration(text: str) -> None:
    conf = either(lambda: Configuration.parse(text))
    for path in conf.paths("mutable_dirs") if conf else ():
        assert not {"", ".", ".."} & set(path.split("/"))
        assert path.isprintable()


NUMBERS = {"passwd": {"root": 0, "ada": 1000}, "group": {"root": 0}, "subuid": {"ada": 100000}, "subgid": {}}


PROFILE_LINES = [
    "[packages]",
    "[commands]",
    "[services::systemd]",
    "[notes]",
    "[other]",
    "[",
    "]",
    "name",
    "# x",
    " a b ",
    "",
]


@given(text=st.lists(st.sampled_from(PROFILE_LINES) | st.text(max_size=20), max_size=12).map("\n".join))
def test_a_profile(text: str) -> None:
    profile = either(lambda: ash.Profile.parse("fuzz", text))
    if profile is not None:
        assert set(profile.sections) <= ash.Profile.SECTIONS
        assert all(line == line.strip() and line for lines in profile.sections.values() for line in lines)
        assert all(" " not in name for name in profile.everything)


@given(text=texts_like(NUMBERS))
@FUZZ
def test_a_file_of_account_ids(text: str, tmp_path: Path) -> None:
    numbers = either(lambda: AccountIds.load(written(tmp_path / "ids", text)))
    if numbers is not None:
        assert all(0 <= number < 2**32 for given in numbers.given.values() for number in given.values())
        numbers.learn(tmp_path)
        json.loads(numbers.dump())


CALLER = {"user": 0, "command": "run", "arguments": ["run", "5", "true"]}
INTENTS: list[dict[str, object]] = [
    ash.Open(CALLER, [5, 6])._asdict(),
    ash.Kept(CALLER)._asdict(),
    ash.LiveChange("deploy", 5, ["lib/x"])._asdict(),
    ash.Commit(5, 6, ["lib/x"], ["lib/x"], ["etc"], {"packages": {"added": {"x": "1"}}}, CALLER, "c0ffee")._asdict(),
    ash.Merge(["lib/x"], ["lib/x"])._asdict(),
    ash.Birth(5, 0, "a branch", CALLER, "c0ffee")._asdict(),
    ash.Deletion([5, 6], CALLER, "c0ffee")._asdict(),
]


@given(text=st.one_of(list(map(texts_like, INTENTS))))
@FUZZ
def test_an_intent_file(text: str, tmp_path: Path) -> None:
    written(tmp_path / "intent", text)
    intent = either(lambda: ash.load_intent(tmp_path))
    if isinstance(intent, ash.Commit | ash.Merge):
        assert not any(part in ("", ".", "..") for entry in intent.entries for part in entry.split("/"))
        assert all(os.fsencode(entry) for entry in (*intent.entries, *intent.delete))
    if isinstance(intent, ash.Commit):
        assert set(intent.copies) <= {"etc", "boot"}
        assert type(intent.old) is type(intent.new) is int
    if intent is not None:
        ash.save_intent(tmp_path, intent)
        assert type(ash.load_intent(tmp_path)) is type(intent)


DECISIONS = {"aside": "5-2026-01-01T000000", "token": "c0ffee"}


@given(text=st.one_of(texts_like(DECISIONS), texts_like(["lib/x", "place"])), noted=st.booleans())
@example(text='["lib/x", "elsewhere"]', noted=True)
@example(text='["lib/x", "place"', noted=True)
@FUZZ
def test_the_files_of_a_merge(text: str, noted: bool, tmp_path: Path) -> None:
    """If they cannot be read, the merge decides again: entries already merged equal those of the transaction."""
    layout = Layout.at(tmp_path, "debian")
    place = WorkDir(System(layout, Debian()), 5)
    for directory in (place.upper / "lib/x", place.origin / "lib", layout.var / "lib"):
        directory.mkdir(parents=True, exist_ok=True)
    for file in (place.merged, place.decisions):
        file.unlink(missing_ok=True)
    written(place.merged if noted else place.decisions, text)
    merge = ash.VarMerge(place.upper, place.origin, layout.var, Debian.package_manager, layout.conflicts(5), delete=())
    either(lambda: place._merge(merge, ["lib/x"]))
    assert {path.name for path in tmp_path.iterdir()} <= {"@.snapshots_debian", "@var_debian"}
    assert {path.name for path in layout.var.iterdir()} == {"lib"}


CONFIG = BootConfig(
    "vmlinuz-1", ["initrd.img-1"], "quiet", "", "--unrestricted", ["set timeout=5"], "menuentry 'x' {\n}"
)
DEPLOYED = Deployment("deploy", "c0ffee", 3, 261, "Debian", "digest", CONFIG, carried=["motd"])
MENU = json.loads(Menu("deploy", "", {"deploy": DEPLOYED, "deploy-aux": DEPLOYED._replace(slot="deploy-aux")}).dump())


def menu_with(**config: Any) -> str:
    """A menu file with other values in a deployment's boot configuration."""
    return json.dumps(changed(MENU, ("deployments", "deploy", "config"), {**CONFIG._asdict(), **config}))


@given(text=texts_like(MENU))
@example(text=json.dumps({**MENU, "last_booted": "deploy-spare"}))
@example(text=menu_with(options="\ud800"))
@example(text=menu_with(options="quiet\nmenuentry 'x' {"))
@example(text=menu_with(rootflags="x\nmenuentry 'x' {"))
@example(text=menu_with(header=["\ud800"]))
@example(text=menu_with(foreign="\ud800"))
@FUZZ
def test_a_menu_file(text: str, tmp_path: Path) -> None:
    menu = either(lambda: Menu.load(written(tmp_path / "menu", text)))
    if menu is None:
        return
    assert set(menu.deployments) <= {*ash.SLOTS, *ash.SECONDARY_SLOTS}
    assert json.loads(menu.dump())
    assert {menu.default, menu.last_booted} <= {"", *menu.deployments}
    if menu.default:
        layout = Layout.at(tmp_path, "debian")
        grub_cfg = menu.render(layout, "0-0", str, GrubNotes(layout))
        ash.write_file(tmp_path / "grub.cfg", grub_cfg)
        lines = re.findall(r"^    linux .*", grub_cfg, re.MULTILINE)
        assert lines[0].endswith(menu.deployments[menu.default].config.options.rstrip())
        names = {deployment.id for deployment in menu.deployments.values()}
        assert all(name.isalnum() for name in names)
        assert f'set default_id="ash-{menu.deployments[menu.default].id}"' in grub_cfg


ENTRY = {
    "time": "2026-01-01T00:00:00+0000", "user": 0, "command": "install", "arguments": ["install", "5", "x"],
    "snapshots": [5], "result": "done", "packages": {"added": {"x": "1"}, "removed": {}, "upgraded": {}},
    "changes": [{"packages": {"added": {"x": "1"}}}],
}  # fmt: skip


@given(lines=st.lists(texts_like(ENTRY), max_size=3), wanted=st.sampled_from([[], [5]]))
@FUZZ
def test_a_history(lines: list[str], wanted: list[int], tmp_path: Path) -> None:
    system = system_in(tmp_path)
    written(system.layout.history, "\n".join([*lines, json.dumps(ENTRY)]) + "\n")
    args = ash.parse(["log", *map(str, wanted)])[1]
    reply = ash.cmd_log(system, args)
    assert ENTRY in reply.data["history"], "a line that is whole is shown"
    assert len(reply.text.split("\n")) == len(reply.data["history"]) + 1, "a line each"


BIRTH = {
    "time": "2026-01-01T00:00:00+0000", "command": "clone-tree", "arguments": ["clone-tree", "5", "-d", "x"],
    "result": "done", "snapshot": 7, "snapshots": [5, 7], "from": 5, "parent": 0, "copies": {"5": 7, "6": 8},
}  # fmt: skip
SAID = {"command": "desc", "result": "done", "snapshot": 7, "snapshots": [7], "description": "x"}


@given(lines=st.lists(texts_like(BIRTH) | texts_like(SAID) | texts_like(ENTRY), max_size=4))
@example(lines=[json.dumps({**BIRTH, "time": "0001-01-01T00:00:00+0000"})])
@example(lines=[json.dumps({**BIRTH, "time": "9999-12-31T23:59:59-2359"})])
@example(lines=[json.dumps({**BIRTH, "arguments": ["clone-tree", "-yh"]})])
@example(lines=[json.dumps({**BIRTH, "command": []})])
@example(lines=[json.dumps({**BIRTH, "copies": {"5": 99999999999}})])
@example(lines=[json.dumps({**BIRTH, "copies": {"5": 1e999}})])
@example(lines=[json.dumps({**SAID, "description": "\ud800"})])
@FUZZ
def test_uses_of_a_history(lines: list[str], tmp_path: Path) -> None:
    system, said = system_in(tmp_path), io.StringIO()
    written(system.layout.history, "\n".join(lines) + "\n")
    system.layout.description(7).unlink(missing_ok=True)
    history = system.history.read()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert all(ash.timestamp_of(entry) <= 2**38 for entry in history)
        ash.PackageIntents.of(ash.origins(5, history), history, 0, ash.FOLLOWS)
        fsck = ash.Fsck(system)
        fsck._restore_description(7)
        fsck._raise_last_number()
    assert said.getvalue() == ""
    assert system.describe(7)
    assert ash.to_number(system.layout.last.read_text()) is not None
    assert sorted(Tree.parse(ash.tree_from_history([0, 5, 7, 8], history).dump()).numbers()) == [0, 5, 7, 8]


def system_in(directory: Path) -> System:
    """A system that has only ash's own directory."""
    layout = Layout.at(directory, "debian")
    for place in (layout.ash / "snapshots", layout.snapshots / "rootfs"):
        place.mkdir(parents=True, exist_ok=True)
    layout.tree.write_text('{"name": "root", "children": [{"name": 0}]}\n')
    return System(layout, Debian())


SMALL = (
    st.binary(max_size=20)
    | st.text(max_size=20).map(lambda text: text.encode(errors="replace"))
    | st.sampled_from(
        [
            b"9" * 5000,
            b"9" * 400,
            b"99999999999\n",
            b"-1\n",
            b"1.5",
            b"\xd9\xa3",
            b"debian ..",
            b"d/e x",
            b"0\x1b[2J",
            b"7\n",
        ]
    )
)


@given(content=SMALL)
@FUZZ
def test_the_highest_number(content: bytes, tmp_path: Path) -> None:
    system = system_in(tmp_path)
    system.layout.last.write_bytes(content)
    number = either(system.new_number)
    found = [problem.what for problem in ash.Fsck(system)._last_number([0])]
    if number is None:
        assert system.layout.last.read_bytes() == content, "what is damaged stays as it is"
        assert found, "fsck finds what nothing can be made with"
        ash.Fsck(system)._raise_last_number()
        assert not list(ash.Fsck(system)._last_number([0]))
    else:
        assert system.layout.last.read_text() == f"{number}\n"


def test_directories_with_impossible_numbers_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "snapshot-99999999999").mkdir()
    (tmp_path / f"snapshot-{'9' * 200}").mkdir()
    (tmp_path / "snapshot-7").mkdir()
    assert ash.numbered(tmp_path, "snapshot-") == {7: tmp_path / "snapshot-7"}


def test_work_directories_with_other_names_are_ignored(tmp_path: Path) -> None:
    system = system_in(tmp_path)
    for name in ("1.old", "2", "3x"):
        system.layout.work(name).mkdir(parents=True)
        ash.save_intent(system.layout.work(name), ash.Kept())
    assert ash.interrupted_sessions(system) == [2]


def test_the_highest_possible_number_is_the_last(tmp_path: Path) -> None:
    system = system_in(tmp_path)
    system.layout.last.write_text(f"{ash.U32_MAX}\n")
    with pytest.raises(AshError, match="no snapshot numbers are left"):
        system.new_number()
    assert not list(ash.Fsck(system)._last_number([0]))


@given(content=SMALL)
@FUZZ
def test_the_uuid_of_the_partition(content: bytes, tmp_path: Path) -> None:
    system = system_in(tmp_path)
    system.layout.part.write_bytes(content)
    uuid = either(lambda: ash.root_uuid(system.layout))
    assert uuid is None or set(uuid) <= set("0123456789abcdefABCDEF-")


@given(content=SMALL)
@FUZZ
def test_the_name_of_the_distribution(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "distro"
    path.write_bytes(content)
    words = either(lambda: ash.read_distro(path))
    if words is not None:
        assert not any("/" in word or not word.isprintable() for word in words)
        either(lambda: ash.load_distro(words[1]))


@given(content=SMALL)
@FUZZ
def test_the_number_of_a_deployment(content: bytes, tmp_path: Path) -> None:
    system = system_in(tmp_path)
    snap = system.layout.rootfs("deploy") / ash.IN_ROOT_SNAP
    snap.parent.mkdir(parents=True, exist_ok=True)
    snap.write_bytes(content)
    either(lambda: system.snapshot_of("deploy"))


# Files of a snapshot


ACCOUNTS = st.lists(
    st.sampled_from(
        ["ada", "bob", ":", ":x:1000:1000:", "0", "9" * 5000, "-1", "\n", "\udcff", "\u2028", "\x0c", "\x85", "\u0663"]
    ),
    max_size=12,
).map("".join)


@given(text=ACCOUNTS)
@FUZZ
def test_accounts(text: str, tmp_path: Path) -> None:
    for name in ash.ID_FILES:
        ash.write_text(tmp_path / name, text)
        assert all(0 <= number < 2**32 for number in ash.AccountFile.read(tmp_path / name).ids.values())
    numbers = AccountIds()
    either(lambda: numbers.settle(tmp_path / "none", tmp_path))


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\x1c", "\x0b", "\r"])
def test_only_a_line_feed_ends_a_line(separator: str, tmp_path: Path) -> None:
    """Users can put some of these into their name in passwd (chfn): it must not become a line of its own."""
    line = f"eve:x:1001:1001:{separator}root::0:0:/home/eve:/bin/sh"
    merged, conflicts = merge_accounts("passwd", "", f"{line}\n", "root:x:0:0::/root:/bin/sh\n")
    assert (merged.split("\n")[1:], conflicts) == ([line, ""], [])
    ash.write_text(tmp_path / "passwd", f"{line}\n")
    assert ash.AccountFile.read(tmp_path / "passwd").ids == {"eve": 1001}
    assert ash.fstab_of_user(f"# a{separator}/dev/sdz / ext4") == [f"# a{separator}/dev/sdz / ext4"]


@given(
    text=st.text(max_size=60)
    | st.lists(st.sampled_from(["linux ", "/boot/vmlinuz", "}", "{", "\n", "'", "\x1b", "initrd "])).map("".join)
)
def test_what_grub_mkconfig_prints(text: str) -> None:
    either(lambda: BootConfig.parse(text))


FIELDS = [
    "Package",
    "Version",
    "Status",
    ": ",
    "x",
    "install ok installed",
    "\n",
    "\n\n",
    "\x1b[2J",
    " ",
    "Conffiles:\n",
    "1:x-",
    "\udcff",
]


@given(text=st.lists(st.sampled_from(FIELDS), max_size=20).map("".join))
@FUZZ
def test_a_package_database(text: str, tmp_path: Path) -> None:
    dpkg = tmp_path / ash.IN_ROOT_DB / "dpkg"
    (dpkg / "info").mkdir(parents=True, exist_ok=True)
    for name in ("status", "diversions", "info/x.list"):
        ash.write_text(dpkg / name, text)
    apt = Debian.package_manager
    for question in (apt.installed, apt.problems, apt.config_files):
        either(lambda question=question: question(tmp_path))  # type: ignore[misc]
    apt.has_installed(tmp_path, ["x"])
    apt.claims(tmp_path, "lib/x")


@given(st.text(), st.text())
def test_invalid_versions_can_be_compared(one: str, other: str) -> None:
    assert (version_key(one) < version_key(other)) in (True, False)


# The command line


WORDS = [name for command in ash.COMMANDS for name in (command.name, *command.aliases)]
OPTIONS = [option for command in ash.COMMANDS for argument in command.options for option in argument.flags]
OPTIONS += [option for argument in ash.GLOBAL_OPTIONS for option in argument.flags]
OPTIONS += ["-s", "--snaps", "--", "-", "--wait=nan", "--json=1", "-h", "--image=/nowhere", "--root=", "--format"]
VALUES = [
    "0",
    "5",
    "-1",
    "9" * 5000,
    "\u0663",
    "",
    " ",
    "nan",
    "1e999",
    "\udcff",
    "\x1b[2J",
    "\u202e",
    "$(reboot)",
    "a\nb",
]
ARGUMENTS = st.lists(st.sampled_from(WORDS) | st.sampled_from(OPTIONS) | st.sampled_from(VALUES), max_size=6)


@st.composite
def likely_lines(draw: st.DrawFn) -> list[str]:
    """A command that only reads, with roughly valid arguments: most of these lines succeed."""
    command = draw(st.sampled_from([command for command in ash.COMMANDS if not command.changes]))
    own = [option for argument in (*command.options, *ash.GLOBAL_OPTIONS) for option in argument.flags]
    return [command.name, *draw(st.lists(st.sampled_from(["0", "0", "5", "x"]) | st.sampled_from(own), max_size=2))]


def ended(argv: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ash on a machine that it does not manage."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = ash.main(argv)
        except SystemExit as stop:  # argparse ends so after a help text
            status = int(stop.code or 0)
    for stream in (out, err):
        stream.seek(0)
    said = err.read()
    assert "an error in ash itself" not in said, said
    return status, out.read(), said


@pytest.fixture
def nothing_is_managed(monkeypatch: pytest.MonkeyPatch) -> None:
    """System.open() refuses, whatever machine this is."""

    def refuse(*_: object) -> System:
        raise AshError("this system is not managed by ash")

    monkeypatch.setattr(System, "open", refuse)
    monkeypatch.setattr(ash.console, "json", False)
    monkeypatch.setattr(ash.console, "verbose", False)
    monkeypatch.setattr(ash.console, "quiet", False)


@pytest.fixture
def only_looked_at(nothing_is_managed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory with a small system that System.open() returns to commands that change nothing."""
    system = system_in(tmp_path)
    system.layout.description(0).write_text("base\n")
    system.layout.last.write_text("0\n")
    system.layout.history.write_text(f"{json.dumps(ENTRY)}\n")

    def looked_at(_: ash.Request, changes: bool, **_options: object) -> System:
        if changes:
            raise AshError("this system is only looked at")
        return system

    monkeypatch.setattr(System, "open", looked_at)
    return tmp_path


def contents(directory: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@given(argv=likely_lines() | ARGUMENTS | st.lists(st.text(max_size=6), max_size=4))
@FUZZ
def test_a_command_line(argv: list[str], only_looked_at: Path) -> None:
    before = contents(only_looked_at)
    status, out, err = ended(argv)
    assert contents(only_looked_at) == before
    assert 0 <= status <= 255
    if status:
        assert len(err.rstrip("\n").split("\n")) == 1, err
        assert err.startswith("ash: ")
    if status and "--json" in argv and out:
        assert json.loads(out)["error"]["status"]
    assert all(c.isprintable() or c in "\n\t" for c in err + out)


@pytest.mark.parametrize("value", ["nan", "-1", "x"])
def test_an_invalid_time_to_wait_is_refused(value: str, nothing_is_managed: None) -> None:
    status, _, err = ended(["--wait", value, "tree"])
    assert (status, "wait" in err) == (ash.USAGE, True)


# Names of every kind, in the merge of /etc


NAMES = st.sampled_from([b"a", b"-rf", b"\xff\xfe", b"x\ny", "\u202e".encode(), b"\x1b[2J", b"$(reboot)", b"`'\""])


@given(running=st.dictionaries(NAMES, NAMES, max_size=4), own=st.dictionaries(NAMES, NAMES, max_size=4))
@FUZZ
def test_etc_may_contain_any_file_names(
    running: dict[bytes, bytes], own: dict[bytes, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("etc")
    sides: dict[str, dict[bytes, bytes]] = {"base": {}, "running": running, "target": own}
    for side, files in sides.items():
        (directory / side).mkdir()
        for name, content in files.items():
            (directory / side / os.fsdecode(name)).write_bytes(content)
    aside = directory / "var/lib/ash/conflicts/1"
    merge = EtcMerge(directory / "base", directory / "running", directory / "target", aside, str)
    merge.merge()
    differing = {name for name in running if own.get(name) != running[name]}
    assert {os.fsencode(path) for path in (*merge.carried, *merge.in_conflict)} == differing


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@given(
    text=st.text(alphabet=st.characters() | st.sampled_from("\udcff\x1b\x9b\u202e\u2066\u2028ö日\U0001f600\U000e0001"))
)
def test_an_answer_can_be_printed_in_any_encoding(encoding: str, text: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    with contextlib.redirect_stdout(out):
        line = ash.as_json({"text": text})
        print(line)
        out.seek(0)
    assert json.loads(out.read()) == {"text": text}
    assert line.isprintable()
