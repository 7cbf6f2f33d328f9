# SPDX-License-Identifier: AGPL-3.0-or-later
"""Undo, and undo of the undo."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import DONE, LOCKED, MISSING, REFUSED, USAGE, make_deb, program
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(30)]


def mark(system: System, snapshot: int) -> str:
    """The mark that the tests wrote into a snapshot."""
    path = system.root(snapshot) / "etc/mark"
    return path.read_text().strip() if path.exists() else ""


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
        assert "has no earlier state" in system.ash("undo", snapshot, status=REFUSED).error


def test_undo_refuses_the_base_and_what_does_not_exist(system: System) -> None:
    system.ash("undo", 0, status=REFUSED)
    system.ash("undo", 999999, status=MISSING)
    system.ash("undo", status=USAGE)


def test_undo_of_a_deployed_snapshot_leaves_its_deployment_as_it_is(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mark")
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    assert f"its deployment stays as it is: ash deploy {snapshot}" in system.ash("undo", snapshot).stdout
    assert mark(system, snapshot) == ""
    assert (system.root(slot) / "etc/mark").read_text() == "one\n"
    assert "already deployed" not in system.ash("deploy", snapshot).stdout
    assert not (system.root(system.files.default_slot()) / "etc/mark").exists()
    system.ash("deploy", 0)
    system.is_sound()


def test_undo_of_what_is_not_deployed_yet_asks_for_no_deploy(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    system.shell(snapshot, "echo one > /etc/mark")
    assert "ash deploy" not in system.ash("undo", snapshot).stdout
    assert "already deployed" in system.ash("deploy", snapshot).stdout
    system.ash("deploy", 0)


def test_undo_names_the_change_that_it_takes_back(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mark")
    system.shell(snapshot, "echo two > /var/mark")  # which has nothing to undo
    system.ash("desc", snapshot, "text")
    first = system.ash("undo", snapshot).stdout
    assert re.search(rf"as it was before ash .*run {snapshot} sh -ec echo one > /etc/mark, of 20\d\d-", first)
    again = system.ash("undo", snapshot).stdout
    assert re.search(rf"as it was before ash .*undo {snapshot}, of 20", again)


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


@contextlib.contextmanager
def being_sent(subvolume: Path) -> Iterator[None]:
    """A `btrfs send` that has begun, and does not end before the block."""
    reader, writer = os.pipe()
    process = subprocess.Popen(["btrfs", "send", subvolume], stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    try:
        os.read(reader, 1)
        yield
    finally:
        os.close(reader)
        process.kill()
        process.wait(timeout=30)


def deferred(system: System) -> list[str]:
    return [
        path.name for name in ("rootfs", "etc", "boot") for path in (system.files.snapshots / name).glob("deleted-*")
    ]


def test_a_snapshot_that_is_being_sent_can_be_changed_and_deleted(
    system: System, snapshot: int, tmp_path: Path
) -> None:
    other = system.clone()
    program("btrfs", "subvolume", "set-default", str(system.id_of(other)), system.files.top)
    with being_sent(system.root(snapshot)), being_sent(system.files.etc(snapshot)):
        for time in range(4):
            system.shell(snapshot, f"echo {time} > /etc/time")
        assert len(deferred(system)) == 2  # what was the snapshot before, and its /etc
        assert (system.files.undo(snapshot) / "etc/time").read_text() == "2\n"
        system.ash("undo", snapshot)
        assert (system.root(snapshot) / "etc/time").read_text() == "2\n"
    with being_sent(system.root(snapshot)):
        assert "freed later" in system.ash("-y", "del", snapshot).stderr
        assert snapshot not in system.files.tree()
        assert system.ash("--json", "log").json["history"][-1]["result"] == "done"
        assert len(deferred(system)) == 1
        assert f"ID {system.id_of(other)} " in program("btrfs", "subvolume", "get-default", system.files.top)
    system.ash("-y", "del", other)  # the default subvolume of the file system can be deleted too
    assert "ID 5 " in program("btrfs", "subvolume", "get-default", system.files.top)
    assert not deferred(system)
    system.is_sound()
    (directory := tmp_path / "mounted").mkdir()
    snapshot = system.clone()
    system.shell(snapshot, "echo 1 > /etc/time")
    program("mount", "--bind", system.files.undo(snapshot), directory)
    try:
        system.shell(snapshot, "echo 2 > /etc/time")
        assert len(deferred(system)) == 1
        assert not (directory / "etc/time").exists()
    finally:
        program("umount", directory)
    assert system.ash("recover").status == DONE
    assert not deferred(system)
