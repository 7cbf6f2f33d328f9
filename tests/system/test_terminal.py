# SPDX-License-Identifier: AGPL-3.0-or-later
"""`ash chroot` on a terminal, and when the terminal hangs up."""

import os
import signal
import time

import pytest

from tests.support import OURS_IN_RUN, REFUSED, Terminal, processes_with, wait_until
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]


def prompt(terminal: Terminal) -> None:
    """Wait for the shell's prompt."""
    terminal.type("echo ready-$((6 * 7))\n")
    terminal.expect("ready-42")


def test_exit_keeps_the_changes(system: System, snapshot: int) -> None:
    with system.terminal("chroot", snapshot) as terminal:
        prompt(terminal)
        terminal.type("echo kept > /etc/mark; test -t 0 && ischroot && exit\n")
        assert terminal.wait() == 0
    assert (system.root(snapshot) / "etc/mark").read_text() == "kept\n"


def test_editing_resolv_conf_in_the_example_of_lwn(system: System, snapshot: int) -> None:
    with system.terminal("chroot", snapshot) as terminal:
        prompt(terminal)
        terminal.type("echo nameserver 192.0.2.1 > /etc/resolv.conf\nexit\n")
        assert terminal.wait() == 0
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    assert (system.root(slot) / "etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"
    system.ash("deploy", 0)


@pytest.mark.parametrize(("answer", "kept"), [("y", True), ("n", False), ("", True), ("No", False)])
def test_a_failed_shell_asks_whether_to_keep_the_changes(
    system: System, snapshot: int, answer: str, kept: bool
) -> None:
    before = system.id_of(snapshot)
    with system.terminal("chroot", snapshot) as terminal:
        prompt(terminal)
        terminal.type("echo kept > /etc/mark; exit 7\n")
        terminal.expect(r"status 7: keep the changes\? \[Y/n/back\] ")
        terminal.type(f"{answer}\n")
        assert terminal.wait() == (0 if kept else 7)
    assert (system.id_of(snapshot) != before) == kept
    assert (system.root(snapshot) / "etc/mark").exists() == kept
    assert not system.remains()


def test_the_question_is_asked_until_it_is_answered(system: System, snapshot: int) -> None:
    with system.terminal("chroot", snapshot) as terminal:
        prompt(terminal)
        terminal.type("echo kept > /etc/mark; exit 7\n")
        terminal.expect(r"\[Y/n/back\] ")
        terminal.type("perhaps\n")
        terminal.expect(r"n drops them.*\[Y/n/back\] ")
        terminal.type("\x04")
        terminal.expect(f"--resume, or ash unlock {snapshot}")
        assert terminal.wait() == 128 + signal.SIGHUP
    assert not (system.root(snapshot) / "etc/mark").exists()
    system.ash("chroot", snapshot, "--resume", input="test -e /etc/mark\n")
    assert (system.root(snapshot) / "etc/mark").exists()


def test_ash_says_inside_that_it_must_not_be_run_there(system: System, snapshot: int) -> None:
    said = system.ash("chroot", snapshot, input="ash tree; echo status $?; echo x > /.snapshots/ash/ash; exit 0\n")
    assert "must not be run inside a chroot" in said.stderr
    assert f"status {REFUSED}" in said.stdout
    assert (system.files.state / "ash").stat().st_size > 2
    assert not list((system.root(snapshot) / ".snapshots").iterdir())


def test_back_reopens_the_shell_with_its_changes(system: System, snapshot: int) -> None:
    with system.terminal("chroot", snapshot) as terminal:
        prompt(terminal)
        terminal.type("echo one > /etc/one; exit 1\n")
        terminal.expect(r"\[Y/n/back\] ")
        terminal.type("back\n")
        prompt(terminal)
        terminal.type("cat /etc/one > /etc/two; exit\n")
        assert terminal.wait() == 0
    assert (system.root(snapshot) / "etc/two").read_text() == "one\n"


def test_control_c_interrupts_the_program_not_the_transaction(system: System, snapshot: int) -> None:
    with system.terminal("chroot", snapshot) as terminal:
        prompt(terminal)
        terminal.type("sleep 4730\n")
        wait_until(lambda: processes_with("4730"))
        terminal.type("\x03")
        prompt(terminal)
        terminal.type("echo kept > /etc/mark; exit 0\n")
        assert terminal.wait() == 0
    assert (system.root(snapshot) / "etc/mark").exists()
    assert not processes_with("4730")


def test_control_c_ends_run_without_changes(system: System, snapshot: int) -> None:
    with (
        system.nothing_changes(),
        system.terminal("run", snapshot, "sh", "-c", "touch /etc/mark; echo begun; sleep 4731") as terminal,
    ):
        terminal.expect("begun")
        terminal.type("\x03")
        assert terminal.wait() in (130, -2)
    assert not processes_with("4731")
    system.shell(snapshot, "true")


def test_without_a_terminal_a_failed_shell_drops_the_changes(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        system.ash("chroot", snapshot, input="touch /etc/mark\nfalse\n", status=1)
    system.ash("chroot", snapshot, input="touch /etc/mark\n")
    assert (system.root(snapshot) / "etc/mark").exists()


def hung_up(system: System, snapshot: int, signals: int = 0) -> None:
    """Write something in a shell, then close its terminal; ash gets additional signals at the same time."""
    terminal = system.terminal("chroot", snapshot)
    with terminal:
        prompt(terminal)
        terminal.type("echo kept > /etc/mark; echo kept > /var/lib/kept; sleep 4732\n")
        wait_until(lambda: processes_with("4732"))
        for _ in range(signals):
            terminal.process.send_signal(signal.SIGHUP)
            time.sleep(0.001)
    wait_until(lambda: not processes_with("4732") and not system.processes())


def test_after_a_hangup_the_session_can_be_resumed(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo nameserver 192.0.2.7 > /etc/resolv.conf")
    before = system.id_of(snapshot)
    hung_up(system, snapshot)
    assert system.id_of(snapshot) == before
    error = system.ash("run", snapshot, "true", status=OURS_IN_RUN).error
    assert f"ash chroot {snapshot} --resume" in error
    assert f"ash unlock {snapshot}" in error
    system.ash("install", snapshot, "hello", status=REFUSED)
    system.ash("recover")
    assert (system.files.snapshots / f"rootfs/snapshot-chr{snapshot}").exists(), "a boot does not drop it"
    copy = system.clone(snapshot)
    assert not (system.root(copy) / "etc/mark").exists()
    with system.terminal("chroot", snapshot, "--resume") as terminal:
        prompt(terminal)
        terminal.type("cat /etc/mark /var/lib/kept; exit\n")
        terminal.expect("kept\r\nkept")
        assert terminal.wait() == 0
    assert (system.root(snapshot) / "etc/mark").read_text() == "kept\n"
    assert (system.files.var / "lib/kept").read_text() == "kept\n"
    assert (system.root(snapshot) / "etc/resolv.conf").read_text() == "nameserver 192.0.2.7\n"
    assert not (system.root(snapshot) / "usr/sbin/policy-rc.d").exists(), "no service would ever be started there"
    assert not system.remains()
    (system.files.var / "lib/kept").unlink()


def test_repeated_hangups_keep_the_session(system: System, snapshot: int) -> None:
    hung_up(system, snapshot, signals=200)
    system.ash("chroot", snapshot, "--resume", input="test -e /etc/mark\n")
    assert (system.root(snapshot) / "etc/mark").read_text() == "kept\n"


@pytest.mark.parametrize("words", [["unlock"], ["tmp"]])
def test_after_a_hangup_the_session_can_be_dropped(system: System, snapshot: int, words: list[str]) -> None:
    before = system.id_of(snapshot)
    hung_up(system, snapshot)
    named = [*words, snapshot] if words == ["unlock"] else words
    assert system.ash("--json", *named).json["changed"] is True
    assert system.id_of(snapshot) == before
    assert not system.remains()
    system.shell(snapshot, "test ! -e /etc/mark")


def test_resume_without_a_session_is_refused(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        system.ash("chroot", snapshot, "--resume", status=OURS_IN_RUN)


def test_unlock_refuses_while_the_process_is_alive(system: System, snapshot: int) -> None:
    with system.at_work(snapshot, "touch /etc/mark") as work:
        assert f"pid {work.process.pid}" in system.ash("unlock", snapshot, status=4).error
        assert system.ash("--json", "tmp").json["snapshots"] == []
    assert (system.root(snapshot) / "etc/mark").exists()


def test_the_shell_is_the_root_shell_of_the_snapshot(system: System, snapshot: int) -> None:
    system.shell(snapshot, "sed -i 's|^\\(root:.*\\):/bin/bash$|\\1:/bin/sh|' /etc/passwd")
    assert "shell-/bin/sh\n" in system.ash("chroot", snapshot, input="echo shell-$0\n").stdout
    system.shell(snapshot, "sed -i 's|^\\(root:.*\\):/bin/sh$|\\1:/no/such/shell|' /etc/passwd")
    system.ash("chroot", snapshot, input="exit 0\n")
    assert os.path.lexists(system.root(snapshot) / "bin/sh")
