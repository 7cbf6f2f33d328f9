# SPDX-License-Identifier: AGPL-3.0-or-later
"""Names and texts that look like commands, lines or escape sequences are treated as data everywhere."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ASH, DONE, FAILED, MISSING, Outcome, make_deb, program
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]

TRACE = Path("/tmp/ash-hostile")
NAMES = [
    b'it\'s "quoted"',
    b"two\nlines",
    b"a\nmenuentry 'x' {",
    b"$(touch " + str(TRACE).replace("/", "\\57").encode() + b")",
    b"`touch ash-hostile`; touch ash-hostile #",
    b"\x1b[2J\x1b]0;title\x07",
    b"\x9b2J",
    b"-rf",
    b"--help",
    b"\xff\xfe",
    "\u202egnp.exe\u2066".encode(),
    "\u2028\x85".encode(),
    b" a  b ",
    b"tab\there",
    b"n" * 200,
]
TEXTS = [os.fsdecode(name) for name in NAMES]


@pytest.fixture(autouse=True)
def _nothing_is_run() -> Iterator[None]:
    """Assert that no text was executed as a command."""
    yield
    left = [place for place in (TRACE, Path.cwd() / TRACE.name) if place.exists()]
    for place in left:
        place.unlink()
    assert not left, "a text was run"


def shown(system: System, *words: str | int, status: int | None = DONE) -> Outcome:
    """Run ash; assert that its output is safe for any terminal."""
    argv = [*ASH, "--image", str(system.image), *map(str, words)]
    ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    out, err = ended.stdout.decode(), ended.stderr.decode()
    assert not re.search("Traceback|an error in ash itself", err), err
    assert all(c.isprintable() or c in "\n\t" for c in out + err), {c for c in out + err if not c.isprintable()}
    assert status in (None, ended.returncode), err
    if "--json" in words:
        json.loads(out)
    return Outcome(ended.returncode, out, err)


def menu_is_whole(system: System) -> None:
    """Assert that GRUB can parse its menu, which has exactly one entry for each deployment."""
    checked = subprocess.run(["grub-script-check", system.files.grub_cfg], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    entries = re.findall(r"^menuentry ", system.files.grub_cfg.read_text(), re.MULTILINE)
    menu = json.loads((system.files.state / "menu").read_text())
    assert len(entries) == len({menu["default"], menu["last_booted"] or menu["default"]})
    system.boots()


def history_is_whole(system: System) -> None:
    """Assert that each line of the history is JSON, and that `log` shows it on one line."""
    lines = (system.files.state / "history").read_bytes().decode("ascii").removesuffix("\n").split("\n")
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert len(shown(system, "log").stdout.rstrip("\n").split("\n")) == len(lines) + 1
    shown(system, "--json", "log")


def test_a_hostile_description_is_only_text(system: System) -> None:
    number = system.clone()
    lines = len(shown(system, "tree").stdout.split("\n"))
    for text in [*TEXTS[1::3], "x" * 10_000]:
        shown(system, "desc", number, "--", text)
        assert shown(system, "--json", "desc", number, f"--desc={text}.").json["changed"] is True
        assert shown(system, "--json", "desc", number, f"--desc={text}.").json["changed"] is False, "it has it"
        for words in (["tree"], ["tree", "-l"]):
            assert len(shown(system, *words).stdout.split("\n")) == lines
    everything = " ".join(TEXTS)
    shown(system, "desc", number, "--", everything)
    shown(system, "--json", "tree", "-l")
    shown(system, "deploy", number)
    menu_is_whole(system)
    shown(system, "clone", number, "-d", everything)
    shown(system, "sub")
    history_is_whole(system)


def test_a_system_may_have_any_name(system: System, snapshot: int) -> None:
    name = "it's} $(reboot)\x1b[2J`\u202e"
    quoted = shlex.quote(f"NAME=\"{name}\"\nPRETTY_NAME='{name}'")
    system.shell(snapshot, f"printf '%s\\n' {quoted} > /etc/os-release; echo {shlex.quote(name)} > /etc/hostname")
    shown(system, "deploy", snapshot)
    menu_is_whole(system)


def in_all_folders(system: System, snapshot: int) -> None:
    """Create files of all names in the directories of a snapshot and in the shared ones."""
    lines = []
    for directory in ("/etc", "/var/lib", "/var/cache/man", "/boot", "/home"):
        lines += [f"printf '%s\\n' {shlex.quote(text)} > {shlex.quote(f'{directory}/{text}')}" for text in TEXTS]
    system.shell(snapshot, "mkdir -p /var/cache/man\n" + "\n".join(lines))


def test_files_of_a_snapshot_may_have_any_name(system: System, snapshot: int) -> None:
    in_all_folders(system, snapshot)
    for directory in (
        system.files.var / "lib",
        system.files.var / "cache/man",
        system.files.etc(snapshot),
        system.home,
    ):
        assert set(TEXTS) <= set(os.listdir(directory)), directory
    answer = shown(system, "--json", "diff", 0, snapshot, "--files").json
    assert {f"etc/{text}" for text in TEXTS} | {f"boot/{text}" for text in TEXTS} <= set(answer["files"])
    for option in ("--files", "--patch"):
        text = shown(system, "diff", 0, snapshot, option).stdout
        listed = [line for line in text.split("\n") if re.match(r"  [+^-] /(etc|boot)/", line)]
        assert len(listed) >= len(TEXTS) * (2 if option == "--files" else 1)
    assert all(
        re.match(r"  [+^-] (/|\S+ )", line) for line in shown(system, "diff", 0, snapshot).stdout.split("\n")[:-1]
    )
    shown(system, "fsck")
    shown(system, "clone", snapshot)
    shown(system, "-v", "deploy", snapshot)
    menu_is_whole(system)
    shown(system, "undo", snapshot, status=None)
    history_is_whole(system)


def test_stray_subvolumes_may_have_any_name(system: System, snapshot: int) -> None:
    copy = system.files.etc(snapshot)
    program("btrfs", "property", "set", "-ts", copy, "ro", "false")
    for text in TEXTS[1:3]:
        (copy / text).touch()
        found, advice = shown(system, "fsck", status=FAILED).stdout.rstrip("\n").split("\n")
        assert found.startswith(f"snapshot {snapshot}: "), found
        assert "--repair" in advice, advice
        (copy / text).unlink()
    (copy / TEXTS[0]).touch()
    shown(system, "--json", "fsck", status=FAILED)
    (copy / TEXTS[0]).unlink()
    program("btrfs", "property", "set", "-ts", copy, "ro", "true")


def test_drifted_files_may_have_any_name(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot, "--fresh-etc")
    machine = Machine(system)
    machine.boot()
    both = TEXTS[::2]
    with_both = "\n".join(f"echo theirs > {shlex.quote(f'/etc/{text}')}" for text in both)
    other = system.clone()
    system.shell(other, with_both)
    for text in TEXTS:
        (machine.etc / text).write_text("mine\n")
    assert set(TEXTS) <= set(shown(system, "--json", "diff").json["drift"])
    listed = shown(system, "diff").stdout.rstrip("\n").split("\n")
    assert all(re.match(r"  [+^-] /etc/", line) for line in listed)
    assert len(listed) >= len(TEXTS)
    shown(system, "diff", "--patch")
    shown(system, "status")
    shown(system, "--json", "status")
    said = shown(system, "deploy", other).stdout
    assert len(said.rstrip("\n").split("\n")) == 3, said
    answer = machine.deploy(other, "--fresh-etc")
    assert set(both) <= set(answer["conflicts"])
    answer = machine.deploy(other, "--fresh-etc")
    assert all((machine.aside(answer) / text).read_text() == "mine\n" for text in TEXTS)
    machine.running("carry")
    said = shown(system, "etc-update").stdout
    assert len(said.rstrip("\n").split("\n")) <= 2, said
    menu_is_whole(system)
    for text in TEXTS:
        with contextlib.suppress(FileNotFoundError):
            (machine.etc / text).unlink()


def test_a_kernel_may_have_any_name(system: System, snapshot: int) -> None:
    names = ["vmlinuz-99 b", "vmlinuz-98\nmenuentry 'x' {", "vmlinuz-97'\"", "vmlinuz-96;reboot", "vmlinuz-95$(reboot)"]
    names += ["vmlinuz-94\u202e", "vmlinuz-93\x1b[2J", "initrd.img-99 b", "vmlinuz-92{", "vmlinuz-91}"]
    lines = [f"echo x > {shlex.quote(f'/boot/{name}')}" for name in names]
    system.shell(snapshot, "\n".join([*lines, "ln -s nowhere /boot/vmlinuz-90", "ln -s nowhere /boot/initrd.img.old"]))
    shown(system, "deploy", snapshot, status=None)  # grub-mkconfig itself fails if a name contains a blank
    menu_is_whole(system)
    system.shell(snapshot, "rm -f /boot/*' '* /boot/*menuentry*")
    shown(system, "deploy", snapshot)
    menu_is_whole(system)
    shown(system, "fsck")


def test_a_package_file_may_have_any_name(system: System, snapshot: int, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / "debs").mkdir(exist_ok=True)
        deb = make_deb(tmp_path / "debs", f"any-{number}")
        (tmp_path / str(number)).mkdir()
        shutil.move(deb, tmp_path / str(number) / f"{text}.deb")
    files = [str(next((tmp_path / str(number)).iterdir())) for number in range(len(TEXTS))]
    shown(system, "-q", "install", snapshot, *files)
    packages = system.ash("--json", "list", snapshot).json["packages"]
    assert {f"any-{number}" for number in range(len(TEXTS))} <= set(packages)
    for text in TEXTS[::5]:
        assert len(shown(system, "-q", "install", snapshot, f"/nowhere/{text}", status=MISSING).error.split("\n")) == 1
        shown(system, "-q", "remove", snapshot, "--", text, status=MISSING)
    history_is_whole(system)


def test_package_files_with_the_same_name_are_told_apart(system: System, snapshot: int, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(shutil.move(make_deb(tmp_path / name, f"is-{name}"), tmp_path / name / "package.deb"))
    answer = system.ash("--json", "install", snapshot, *files).json
    assert set(answer["packages"]["added"]) == {"is-one", "is-two"}


def test_the_package_database_may_have_any_text(system: System, snapshot: int) -> None:
    entries = "".join(f"\nPackage: {text}\nStatus: install ok installed\nVersion: {text}\n" for text in TEXTS)
    system.shell(snapshot, f"printf %s {shlex.quote(entries)} >> /usr/share/ash/db/dpkg/status")
    lines: list[list[str | int]] = []
    lines += (["list", snapshot], ["-q", "list", snapshot], ["--json", "list", snapshot], ["diff", 0, snapshot])
    for words in lines:
        shown(system, *words)


def test_arguments_are_passed_on_unchanged(system: System, snapshot: int) -> None:
    system.ash("run", snapshot, "sh", "-c", 'printf "%s|" "$@" > /etc/given', "sh", *TEXTS)
    given = os.fsdecode((system.root(snapshot) / "etc/given").read_bytes())
    assert given == "".join(f"{text}|" for text in TEXTS)
    shown(system, "-v", "run", snapshot, "true", *TEXTS)
    shown(system, "--json", "run", snapshot, "true", *TEXTS)
    assert "exited with status 3" in shown(system, "run", snapshot, "sh", "-c", "exit 3", *TEXTS, status=3).error
    for text in TEXTS[:3]:
        assert shown(system, text, status=2).error
    shown(system, "--dry-run", "run", snapshot, "true", *TEXTS)
    shown(system, "--dry-run", "--json", "run", snapshot, "x", *TEXTS)
    history_is_whole(system)


def test_status_shows_hostile_names_safely(system: System, snapshot: int) -> None:
    before = len(shown(system, "status").stdout.split("\n"))
    with system.at_work(snapshot, ": " + " ".join(map(shlex.quote, TEXTS))):
        assert len(shown(system, "status").stdout.split("\n")) == before + 1
        assert str(snapshot) in shown(system, "--json", "status").json["running"]
        assert "is locked by" in shown(system, "run", snapshot, "true", status=None).error
