# SPDX-License-Identifier: AGPL-3.0-or-later
"""Automatic upgrades: upgraded, checked and deployed, or nothing is changed."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.archive import Archive, use_only
from tests.support import DONE, FAILED, REFUSED, USAGE, program
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(130)]


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """A package repository for the tests."""
    return Archive(tmp_path / "archive")


@pytest.fixture
def snapshot(system: System, archive: Archive) -> int:
    """A snapshot with the first version of the test package."""
    for package in (system.files.var / "cache/apt/archives").glob("ash-test*"):
        package.unlink()  # another test's package with the same name and size
    archive.add("ash-test-tool", "1", files={"usr/share/tool": "one\n"})
    number = system.branch(system.clone())
    with archive.served() as url:
        system.shell(number, f"{use_only(url)}; apt-get update; apt-get -y install ash-test-tool")
    return number


def upgrade(system: System, number: int, archive: Archive, *options: str, status: int = DONE) -> None:
    """Run an automatic upgrade from the repository."""
    with archive.served() as url:
        system.shell(number, use_only(url))
        system.ash("auto-upgrade", number, *options, status=status)


def configure(system: System, *lines: str) -> None:
    """Write /etc/ash.conf of the deployment that counts as running."""
    menu = json.loads((system.files.state / "menu").read_text())
    root = system.root(menu["last_booted"] or menu["default"])
    (root / "etc/ash.conf").write_text("".join(f"{line}\n" for line in lines))


def tool(system: System, number: int | str) -> str:
    return (system.root(number) / "usr/share/tool").read_text()


def test_it_upgrades_checks_deploys_and_keeps_the_former_state(system: System, snapshot: int, archive: Archive) -> None:
    configure(system)
    before = {row["snapshot"]: row for row in system.ash("--json", "tree").json["tree"]}
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
    upgrade(system, snapshot, archive)
    assert tool(system, snapshot) == "two\n"
    assert tool(system, system.files.default_slot()) == "two\n"
    after = {row["snapshot"]: row for row in system.ash("--json", "tree").json["tree"]}
    (kept,) = after.keys() - before.keys()
    assert tool(system, kept) == "one\n"
    assert after[kept]["parent"] == after[snapshot]["parent"]
    assert after[kept]["description"].startswith(f"{snapshot} before 20")
    assert "succeeded" in system.ash("check").stdout
    assert (system.files.state / "upstate").read_text().startswith("0\n20")
    system.is_sound()
    upgrade(system, snapshot, archive)
    assert "is up to date" in system.ash("check").stdout
    assert len(system.ash("--json", "tree").json["tree"]) == len(after), "there was nothing to upgrade"


BREAKS = {
    "a script that fails": {"postinst": "exit 1"},
    "a library that goes": {"postinst": "rm /usr/lib/*/libz.so.1*"},
    "a library of a program in /usr/lib": {
        "postinst": "mkdir /usr/lib/tool; sed s/libc.so.6/libc.so.9/ /bin/true > /usr/lib/tool/a; chmod 755 /usr/lib/tool/a"
    },
    "a library of a game": {
        "postinst": "sed s/libc.so.6/libc.so.9/ /bin/true > /usr/games/a; chmod 755 /usr/games/a",
    },
    "nothing that tells of libraries": {"postinst": "printf '#!/bin/sh\\nexit 1\\n' > /usr/bin/ldd"},
    "a kernel without its initramfs": {"postinst": "rm /boot/initrd.img-*"},
    "a package that is lost": {"postinst": "rm -r /usr/share/doc/less"},
    "no kernel that GRUB can boot": {"postinst": "rm /boot/vmlinuz-*"},
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_bad_upgrade_changes_nothing(system: System, snapshot: int, archive: Archive, name: str) -> None:
    configure(system)
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"}, **BREAKS[name])
    tree = system.ash("--json", "tree").json["tree"]
    upgrade(system, snapshot, archive, status=FAILED)
    assert tool(system, snapshot) == "one\n"
    assert system.ash("--json", "tree").json["tree"] == tree
    outcome = system.ash("--json", "check", status=FAILED).json
    assert outcome["failed"] is True
    assert f"snapshot {snapshot} is as it was" in outcome["message"]
    assert not system.remains()


def test_a_failed_deploy_changes_nothing(system: System, snapshot: int, archive: Archive) -> None:
    system.ash("deploy", snapshot, "--fresh-etc")
    machine = Machine(system)
    slot = machine.boot()
    configure(system)
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"}, postinst="echo '\"' >> /etc/default/grub")
    tree = system.ash("--json", "tree").json["tree"]
    with archive.served() as url:
        system.shell(snapshot, use_only(url))
        root = system.id_of(snapshot)
        machine.running("auto-upgrade", snapshot, status=FAILED)
    assert system.id_of(snapshot) == root
    assert system.ash("--json", "tree").json["tree"] == tree
    said = system.ash("check", status=FAILED).stdout
    assert f"snapshot {snapshot} is as it was" in said
    assert "grub-mkconfig failed" in said
    assert system.files.default_slot() == slot
    system.is_sound()


def test_it_is_refused_at_once_if_the_deploy_would_be(system: System, snapshot: int, archive: Archive) -> None:
    system.ash("mutable", snapshot)
    system.ash("deploy", snapshot, "--fresh-etc")
    machine = Machine(system)
    (system.root(machine.boot()) / "opt/file").touch()
    configure(system)
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
    with archive.served() as url:
        system.shell(snapshot, use_only(url))
        before = system.subvolumes()
        assert "/opt/file" in machine.run("auto-upgrade", snapshot, status=REFUSED).error
    assert system.subvolumes() == before
    assert not list((system.files.var / "cache/apt/archives").glob("ash-test-tool_2*")), "nothing was downloaded"
    assert f"snapshot {snapshot} is as it was" in system.ash("check", status=FAILED).stdout
    system.ash("deploy", system.clone(), "--fresh-etc")
    machine.boot()
    system.ash("immutable", snapshot)


def test_problems_that_existed_before_do_not_count(system: System, snapshot: int, archive: Archive) -> None:
    configure(system)
    system.shell(snapshot, "rm -r /usr/share/doc/less")
    stray = system.root("4711")
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
    program("btrfs", "subvolume", "create", stray)
    try:
        upgrade(system, snapshot, archive)
    finally:
        program("btrfs", "subvolume", "delete", stray)
    assert tool(system, system.files.default_slot()) == "two\n"


def test_an_invalid_configuration_is_recorded(system: System, snapshot: int, archive: Archive) -> None:
    configure(system)
    upgrade(system, snapshot, archive)
    for line, said in (("auto_upgrade::sometimes", "line 1"), ("auto_upgrade::reboot", "needs a time window")):
        configure(system, line)
        assert said in system.ash("auto-upgrade", snapshot, status=USAGE).error
        assert said in system.ash("check", status=FAILED).stdout


def test_policies(system: System, snapshot: int, archive: Archive) -> None:
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
    slot = system.files.default_slot()
    configure(system, "auto_upgrade::none")
    upgrade(system, snapshot, archive)
    assert tool(system, snapshot) == "one\n"
    configure(system, "auto_upgrade::check")
    upgrade(system, snapshot, archive)
    assert tool(system, snapshot) == "one\n"
    assert "1 packages could be upgraded" in system.ash("check").stdout
    configure(system, "auto_upgrade::stage")
    upgrade(system, snapshot, archive)
    assert tool(system, snapshot) == "two\n"
    assert system.files.default_slot() == slot


@pytest.mark.parametrize("hours", [2, -1])
def test_it_reboots_only_within_the_window(
    system: System, snapshot: int, archive: Archive, tmp_path: Path, hours: int
) -> None:
    system.ash("deploy", snapshot, "--fresh-etc")
    machine = Machine(system)
    machine.boot()
    begin, end = (time.strftime("%H:%M", time.localtime(time.time() + 3600 * at)) for at in (hours, hours + 2))
    configure(system, "auto_upgrade::reboot", f"auto_upgrade_window::{begin}-{end}")
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
    called, programs = tmp_path / "called", tmp_path / "sbin"
    programs.mkdir()
    (programs / "shutdown").write_text(f'#!/bin/sh\necho "$@" > {called}\n')
    (programs / "shutdown").chmod(0o755)
    with archive.served() as url:
        system.shell(snapshot, use_only(url))
        program("mount", "--bind", programs, "/usr/local/sbin")  # first in ash's PATH
        try:
            said = machine.run("auto-upgrade", snapshot).stdout
        finally:
            program("umount", "/usr/local/sbin")
    configure(system)
    assert tool(system, system.files.default_slot()) == "two\n"
    assert ("rebooting in one minute" in said, called.exists()) == ((True, True) if hours < 0 else (False, False))
    assert (f"the reboot waits for {begin}-{end}\n" in said) is (hours > 0)


# Before which step a run is killed, the version that the snapshot then has, and the copies of its former state.
INTERRUPTIONS = {
    "before the copy": (r"snapshot snapshot-\d+ as snapshot-\d", "one", 1),
    "before the commit": ("exchange snapshot-", "one", 2),
    "after the commit": (r"rename snapshot-chr\d+ to undo-", "two", 1),
    "while it is deployed": ("write menu", "two", 1),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_the_run_after_an_interrupted_one_deploys(system: System, snapshot: int, archive: Archive, name: str) -> None:
    step, version, copies = INTERRUPTIONS[name]
    configure(system)
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
    numbers = {row["snapshot"] for row in system.ash("--json", "tree").json["tree"]}
    with archive.served() as url:
        system.shell(snapshot, use_only(url))
        system.killed_before(step, "auto-upgrade", snapshot)
        assert tool(system, snapshot) == f"{version}\n"
        assert "interrupted" in system.ash("check", status=FAILED).stdout
        system.ash("auto-upgrade", snapshot)
    assert tool(system, system.files.default_slot()) == "two\n"
    assert "succeeded" in system.ash("check").stdout
    kept = {row["snapshot"] for row in system.ash("--json", "tree").json["tree"]} - numbers
    assert [tool(system, number) for number in kept] == ["one\n"] * copies
    assert system.ash("--json", "status").json["next"]["snapshot"] == snapshot
    system.is_sound()


def test_a_failed_run_does_not_take_back_a_later_deploy(system: System, snapshot: int, archive: Archive) -> None:
    configure(system)
    upgrade(system, snapshot, archive)
    system.shell(snapshot, "echo 'deb http://localhost:9 none main' >/etc/apt/sources.list.d/gone.list")
    system.ash("auto-upgrade", snapshot, "--strict", status=FAILED)
    system.shell(snapshot, "rm /etc/apt/sources.list.d/gone.list")
    other = system.clone(snapshot)
    system.ash("deploy", other)
    upgrade(system, snapshot, archive)
    assert system.ash("--json", "status").json["next"]["snapshot"] == other


@pytest.mark.parametrize("name", ["fstree", "history"])
def test_a_clock_that_was_once_wrong_is_said_once_and_stops_nothing(
    system: System, snapshot: int, archive: Archive, name: str
) -> None:
    configure(system)
    file = system.files.state / name
    there = file.stat()
    os.utime(file, (there.st_atime + 10**6, there.st_mtime + 10**6))
    with archive.served() as url:
        system.shell(snapshot, use_only(url))
        os.utime(file, (there.st_atime + 10**6, there.st_mtime + 10**6))
        assert "the clock is or was wrong" in system.ash("auto-upgrade", snapshot).stderr
        assert "the clock is or was wrong" in system.ash("check").stdout
        assert "clock" not in system.ash("auto-upgrade", snapshot).stderr
        assert "clock" not in system.ash("check").stdout


def test_it_waits_for_a_lock(system: System, snapshot: int, archive: Archive) -> None:
    configure(system)
    with archive.served() as url:
        system.shell(snapshot, use_only(url))
        with system.at_work(snapshot, "true"):
            process = system.start("auto-upgrade", snapshot)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=4)
        assert process.wait(timeout=120) == DONE


def test_check_without_any_automatic_upgrade(system: System) -> None:
    (system.files.state / "upstate").unlink(missing_ok=True)
    answer = system.ash("--json", "check").json
    assert (answer["failed"], answer["time"]) == (False, "")


def test_the_timer_is_installed_but_not_enabled(system: System) -> None:
    units = system.root(0) / "usr/lib/systemd/system"
    assert "RandomizedDelaySec" in (units / "ash-upgrade.timer").read_text()
    assert not list(system.root(0).glob("etc/systemd/system/*.wants/ash-upgrade*"))
    assert not list(units.glob("*.wants/ash-upgrade*"))
    assert os.readlink(system.root(0) / "usr/bin/ast") == "ash"


def test_the_base_is_upgraded_if_configured(system: System, snapshot: int, archive: Archive) -> None:
    # Must be the last test: afterwards the base has the package.
    with archive.served() as url:
        with system.terminal("base-update", "--shell") as terminal:
            terminal.expect(r"# ")
            terminal.type(f"{use_only(url)}\n")
            terminal.type("apt-get update && apt-get -y install ash-test-tool && exit 0\n")
            assert terminal.wait() == DONE
        archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
        system.shell(snapshot, use_only(url))
        for policy, version in (("check", "one"), ("stage", "two")):
            configure(system, "auto_upgrade_base::True", f"auto_upgrade::{policy}")
            system.ash("auto-upgrade", snapshot)
            assert tool(system, 0) == tool(system, snapshot) == f"{version}\n"
    configure(system)
