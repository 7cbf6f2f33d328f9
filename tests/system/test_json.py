# SPDX-License-Identifier: AGPL-3.0-or-later
"""Each command's JSON answer has exactly the shape that the command declares."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ash import COMMANDS, DRY_RUN_SHAPE, ERROR_SHAPE, has_shape
from tests.archive import Archive, use_only
from tests.support import FAILED, make_deb
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]

ANSWERS = {command.name: command.answer for command in COMMANDS if command.answer is not None}
# Commands that need a running system, a terminal or a server (other modules test them), or never answer in JSON.
SHELLS = {"chroot", "live-chroot", "hollow"}
NOT_HERE = {"current", "whichtmp", "edit-conf", "health", "help", "hide", "upself", *SHELLS}
asked: set[str] = set()


def assert_shape(value: Any, shape: Any, at: str) -> None:
    """Assert that a value of an answer has the shape that its command declares, and no other keys."""
    assert has_shape(value, shape), f"{at}: {value!r} is no {shape}"
    if isinstance(shape, list):
        for number, one in enumerate(value):
            assert_shape(one, shape[0], f"{at}[{number}]")
    elif isinstance(shape, Mapping):
        known = {key.rstrip("?"): part for key, part in shape.items()}
        for key, one in value.items():
            assert key in known or "*" in known, f"{at}: {key} is not declared"
            assert_shape(one, known.get(key, known.get("*")), f"{at}.{key}")


def check(system: System, *words: str | int | Path, status: int = 0) -> dict[str, Any]:
    """Run a command with --json, check the shape of its answer, and return the answer."""
    answer = system.ash("--json", *words, status=status).json
    asked.add(answer["command"])
    assert_shape(
        {k: v for k, v in answer.items() if k not in ("version", "command")}, ANSWERS[answer["command"]], str(words[0])
    )
    return answer


def test_each_command_declares_the_shape_of_its_answer() -> None:
    assert set(ANSWERS) | {"help", *SHELLS} == {command.name for command in COMMANDS}


def test_the_tree(system: System, snapshot: int) -> None:
    branch = check(system, "branch", snapshot)["snapshot"]
    for words in (
        ["tree"], ["tree", "-l"], ["clone", snapshot], ["clone-tree", snapshot], ["cbranch", branch], ["ubranch", snapshot, branch],
        ["new"], ["desc", branch, "x"], ["mutable", branch], ["immutable", branch], ["immen", branch], ["immen", branch], ["sub"],
    ):  # fmt: skip
        check(system, *words)
    check(system, "-y", "del", branch)


def test_packages_of_trees(system: System, snapshot: int, tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive")
    archive.add("ash-test-json", files={"usr/share/json": "1"})
    profile = tmp_path / "json.conf"
    profile.write_text("[packages]\nash-test-json\n[notes]\nnone\n")
    with archive.served() as url:
        system.shell(snapshot, use_only(url))
        system.branch(snapshot)
        for words in (
            ["refresh", snapshot], ["profiles"], ["install-profile", profile, snapshot], ["whichsnap", "ash-test-json"],
            ["hold", snapshot, "ash-test-json"], ["unhold", snapshot, "ash-test-json"], ["upgrade", snapshot],
            ["tree-upgrade", snapshot], ["force-sync", snapshot], ["sync", snapshot], ["fixdb", snapshot],
            ["tree-rmpkg", snapshot, "ash-test-json"], ["auto-upgrade", snapshot], ["check"], ["status"], ["base-update"],
        ):  # fmt: skip
            check(system, *words)


def test_transactions(system: System, snapshot: int) -> None:
    system.branch(snapshot)
    check(system, "run", snapshot, "touch", "/etc/x")
    check(system, "run", snapshot, "true")
    check(system, "tree-run", snapshot, "touch", "/etc/y")
    check(system, "tree-run", snapshot, "false", status=FAILED)
    check(system, "undo", snapshot)
    check(system, "unlock", snapshot)
    check(system, "tmp")
    check(system, "recover")
    (system.files.var / "lib/shared").mkdir()
    with system.at_work(snapshot, "touch /var/lib/shared/x"):
        (system.files.var / "lib/shared/y").touch()
    check(system, "log")
    check(system, "log", snapshot)


def test_packages(system: System, snapshot: int, tmp_path: Path) -> None:
    other = system.clone()
    one, two = make_deb(tmp_path, "ash-test-json"), make_deb(tmp_path, "ash-test-json", "2")
    check(system, "install", snapshot, one)
    check(system, "install", snapshot, two)
    check(system, "install", snapshot, "ash-test-json")
    check(system, "install", "--snapshots", snapshot, other, "-p", two)
    check(system, "diff", 0, snapshot)
    check(system, "diff", 0, snapshot, "--files", "--patch")
    check(system, "list", snapshot)
    check(system, "remove", snapshot, "ash-test-json")
    check(system, "remove", other, "ash-test-json", "--purge", "--delete-data")
    check(system, "undo", other)
    check(system, "log")


def test_booting(system: System, snapshot: int) -> None:
    check(system, "status")
    check(system, "dist")
    check(system, "deploy", snapshot)
    check(system, "deploy", snapshot)
    slot = check(system, "deploy", snapshot, "--secondary")["slot"]
    assert "secondary" in slot
    check(system, "boot", snapshot)
    check(system, "deploy", snapshot, "--no-secondary")
    check(system, "carry")
    (system.root("deploy") / "etc/drifted").touch()
    check(system, "diff")
    check(system, "status")
    check(system, "rollback")
    machine = Machine(system)
    machine.boot()
    asked.add("bless")
    for _ in range(2):
        answer = machine.running("bless")
        assert_shape({k: v for k, v in answer.items() if k not in ("version", "command")}, ANSWERS["bless"], "bless")
    (system.root(system.files.default_slot()) / "etc/drifted-too").touch()
    check(system, "etc-update")
    check(system, "deploy", 0)


def test_fsck(system: System, snapshot: int) -> None:
    check(system, "version")
    check(system, "fsck")
    os.rename(system.files.state / f"snapshots/{snapshot}-desc", system.files.state / "aside")
    os.rename(system.files.state / "last", system.files.state / "last-aside")
    found = check(system, "fsck", status=FAILED)["damage"]
    assert {one["snapshot"] for one in found} == {None, snapshot}
    assert all(one["mended"] for one in check(system, "fsck", "--repair")["damage"])
    os.rename(system.files.state / "aside", system.files.state / f"snapshots/{snapshot}-desc")
    os.rename(system.files.state / "last-aside", system.files.state / "last")


DRY = [
    ["clone", 0], ["branch", 0], ["clone-tree", 0], ["cbranch", 0], ["ubranch", 0, 0], ["new"], ["desc", 0, "x"], ["deploy", 0],
    ["rollback"], ["recover"], ["tmp"], ["carry"], ["unlock", 0], ["del", "N"], ["undo", "N"], ["mutable", "N"], ["immutable", "N"],
    ["immen", "N"], ["run", "N", "true"], ["tree-run", "N", "true"], ["boot", 0], ["etc-update"], ["edit-conf", "N"],
    ["fsck", "--repair"],
]  # fmt: skip


@pytest.mark.parametrize("words", DRY, ids=lambda words: str(words[0]))
def test_a_dry_run(system: System, snapshot: int, words: list[str | int]) -> None:
    if words[0] == "undo":
        system.shell(snapshot, "touch /etc/changed")
    answer = system.ash("--json", "--dry-run", *(snapshot if word == "N" else word for word in words)).json
    assert_shape({k: v for k, v in answer.items() if k not in ("version", "command")}, DRY_RUN_SHAPE, str(words[0]))
    assert answer["changed"] is False


def test_an_error(system: System) -> None:
    for words, status in (
        (["clone", 999999], 3),
        (["frobnicate"], 2),
        (["undo", 0], 5),
        (["clone", "x"], 2),
        (["run", 0, "true"], 125),
    ):
        answer = system.ash("--json", *words, status=status).json
        assert answer.keys() == {"version", "command", "error"}
        assert_shape(answer["error"], ERROR_SHAPE, str(words[0]))


def test_every_command_was_tested() -> None:
    """Must be the last test of this module."""
    if len(asked) > 3:
        assert set(ANSWERS) - NOT_HERE == asked
