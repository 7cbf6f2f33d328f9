# SPDX-License-Identifier: AGPL-3.0-or-later
"""Transactions are atomic: commits, failures and kills."""

import random
import signal
import subprocess
import time

import pytest

from tests.support import DISTRIBUTION, FAILED, SNAPSHOTS, kill_hard, processes_with, program, wait_until
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(100)]

# Writes wherever a program may write.
WRITES_EVERYWHERE = """
echo x > /etc/mark; echo x > /usr/mark; echo x > /boot/mark
echo x > /var/lib/mark; mkdir -p /var/cache/mark; echo x > /var/log/mark; echo x > /var/mark
echo 'nameserver 192.0.2.1' > /etc/resolv.conf; rm -f /etc/issue; rm -rf /var/lib/misc /var/mail
echo x > /tmp/mark; echo x > /run/mark
"""


def mark_in(system: System, snapshot: int, name: str) -> str:
    """A file of a snapshot and its counterpart in /var, for comparison."""
    path = system.root(snapshot) / name
    return path.read_text() if path.exists() else ""


# Commits


def test_exit_status_0_commits_everything(system: System, snapshot: int) -> None:
    before = system.id_of(snapshot)
    system.shell(snapshot, "echo x > /etc/mark; echo y > /usr/mark; echo z > /boot/mark; echo v > /var/lib/committed")
    assert [mark_in(system, snapshot, name) for name in ("etc/mark", "usr/mark", "boot/mark")] == ["x\n", "y\n", "z\n"]
    assert (system.files.etc(snapshot) / "mark").read_text() == "x\n"
    assert (system.files.boot(snapshot) / "mark").read_text() == "z\n"
    assert (system.files.var / "lib/committed").read_text() == "v\n"
    assert system.id_of(snapshot) != before
    assert not system.remains()
    system.is_sound()


def test_inode_flags_alone_are_a_change_and_stop_no_later_one(system: System, snapshot: int) -> None:
    before, immutable = system.id_of(snapshot), "$flags = pack(q(L), 0x10); ioctl(F, 0x40086602, $flags) || die"
    system.shell(
        snapshot, f"for p in / /etc /etc/fstab /usr/bin; do perl -e 'open F, qq(<$ARGV[0]); {immutable}' $p; done"
    )
    assert system.id_of(snapshot) != before
    assert [program("lsattr", "-d", system.root(snapshot) / name)[4] for name in ("etc", "etc/fstab", "usr/bin")] == [
        "i"
    ] * 3
    system.shell(snapshot, "echo x > /etc/issue")
    system.ash("deploy", snapshot)
    system.is_sound()
    system.ash("deploy", 0)
    system.ash("del", system.clone(snapshot), "-y")
    system.ash("undo", snapshot)
    system.is_sound()


def test_the_previous_state_is_kept_for_undo(system: System, snapshot: int) -> None:
    before = system.id_of(snapshot)
    system.shell(snapshot, "echo one > /etc/mark")
    between = system.id_of(snapshot)
    assert system.subvolumes()[f"{SNAPSHOTS}/rootfs/undo-{snapshot}"] == before
    system.shell(snapshot, "echo two > /etc/mark")
    assert system.subvolumes()[f"{SNAPSHOTS}/rootfs/undo-{snapshot}"] == between
    assert (system.files.undo(snapshot) / "etc/mark").read_text() == "one\n"
    assert before not in system.subvolumes().values()


@pytest.mark.parametrize(
    "script", ["true", "cat /etc/os-release", "echo x > /tmp/x; echo x > /run/x; touch /dev/shm/x"]
)
def test_without_a_change_nothing_is_exchanged(system: System, snapshot: int, script: str) -> None:
    system.shell(snapshot, "echo one > /etc/mark")
    with system.nothing_changes():
        system.shell(snapshot, script)
        assert system.ash("--json", "run", snapshot, "sh", "-c", script).json["changed"] is False


def test_a_change_of_var_alone_keeps_the_snapshot_and_its_undo(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo one > /etc/mark")
    before = {p: i for p, i in system.subvolumes().items() if p.endswith(f"-{snapshot}")}
    assert system.ash("--json", "run", snapshot, "sh", "-c", "echo only > /var/lib/only").json["changed"] is True
    assert (system.files.var / "lib/only").read_text() == "only\n"
    assert {p: i for p, i in system.subvolumes().items() if p.endswith(f"-{snapshot}")} == before


def test_copies_of_etc_and_boot_are_only_renewed_if_changed(system: System, snapshot: int) -> None:
    before = system.subvolumes()
    system.shell(snapshot, "echo x > /usr/mark")
    after = system.subvolumes()
    for copy in (f"{SNAPSHOTS}/etc/etc-{snapshot}", f"{SNAPSHOTS}/boot/boot-{snapshot}"):
        assert after[copy] == before[copy]


def test_os_release_is_marked_again_after_a_change(system: System, snapshot: int) -> None:
    system.shell(
        snapshot, "sed -i /VARIANT_ID/d /usr/lib/os-release; rm -f /etc/os-release; cp /usr/lib/os-release /etc"
    )
    text = (system.root(snapshot) / "etc/os-release").read_text()
    assert "VARIANT_ID=ashos" in text
    assert f"ID={DISTRIBUTION}" in text.splitlines()


def test_files_keep_owner_mode_links_and_attributes(system: System, snapshot: int) -> None:
    system.shell(
        snapshot,
        "echo x > /usr/a; ln /usr/a /usr/b; ln -s a /usr/c; chown 7:8 /usr/a; chmod 4750 /usr/a; mkfifo /usr/p; "
        "python3 -c \"import os; os.setxattr('/usr/a', 'user.note', b'n')\"; echo x > \"$(printf '/usr/\\377')\"",
    )
    root = system.root(snapshot) / "usr"
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino
    assert (root / "c").readlink().name == "a"
    assert ((root / "a").stat().st_uid, (root / "a").stat().st_gid, (root / "a").stat().st_mode & 0o7777) == (
        7,
        8,
        0o4750,
    )


# Failures


def test_a_command_that_fails_changes_nothing(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        outcome = system.shell(snapshot, f"{WRITES_EVERYWHERE} exit 7", status=7)
    assert outcome.error == f"ash: snapshot {snapshot} is unchanged: the command exited with status 7"
    assert not system.remains()
    system.shell(snapshot, "echo works > /etc/mark")


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["no-such-program"], 127),
        (["/etc/passwd"], 126),
        (["false"], 1),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -15 $$"], 143),
        (["sh", "-c", "exit 125"], 125),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_exit_status_is_that_of_the_command(system: System, snapshot: int, argv: list[str], status: int) -> None:
    with system.nothing_changes():
        system.ash("run", snapshot, *argv, status=status)


def test_a_command_line_in_one_argument_is_run_by_the_shell(system: System, snapshot: int) -> None:
    assert system.ash("run", snapshot, "echo $((6 * 7)) | tr 4 5").stdout == "52\n"
    system.ash("run", "-s", snapshot, "-c", "exit 6", status=6)


def test_the_command_gets_the_callers_streams(system: System, snapshot: int) -> None:
    outcome = system.ash("run", snapshot, "sh", "-c", "cat; echo err >&2", input="typed\n")
    assert (outcome.stdout, outcome.stderr) == ("typed\n", "err\n")


# Kills


def start_and_wait(system: System, snapshot: int, script: str) -> subprocess.Popen[bytes]:
    """A transaction that has written something and now sleeps."""
    process = system.start("run", snapshot, "sh", "-ec", f"{script}\ntouch /begun; sleep 4711")
    wait_until((system.root(f"chr{snapshot}") / "begun").exists)
    return process


def test_sigkill_changes_nothing_and_the_next_command_works(system: System, snapshot: int) -> None:
    before = system.state()
    process = start_and_wait(system, snapshot, WRITES_EVERYWHERE)
    assert processes_with("4711")
    kill_hard(process)
    wait_until(lambda: not processes_with("4711"), 5)
    wait_until(lambda: not system.processes(), 5)
    assert (system.mounts(), system.attached()) == (before.mounts, before.loops)
    assert system.id_of(snapshot) == before.subvolumes[f"{SNAPSHOTS}/rootfs/snapshot-{snapshot}"]
    system.shell(snapshot, "test ! -e /etc/mark; test ! -e /var/mark")
    after = system.state()
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_changes_nothing(system: System, snapshot: int, number: signal.Signals) -> None:
    with system.nothing_changes():
        process = start_and_wait(system, snapshot, WRITES_EVERYWHERE)
        process.send_signal(number)
        assert process.wait(20) in (128 + number, -number)
        system.shell(snapshot, "true")
    assert not processes_with("4711")


def test_daemons_die_with_the_transaction(system: System, snapshot: int) -> None:
    system.shell(snapshot, "setsid -f sleep 4712 >/dev/null 2>&1; nohup sleep 4712 >/dev/null 2>&1 & touch /etc/mark")
    wait_until(lambda: not processes_with("4712"), 5)
    assert mark_in(system, snapshot, "etc/mark") == ""
    assert not system.processes()


def test_a_daemon_that_ignores_signals_dies_with_a_killed_ash(system: System, snapshot: int) -> None:
    process = start_and_wait(system, snapshot, "trap '' TERM INT HUP; (setsid sleep 4713 &)")
    kill_hard(process)
    wait_until(lambda: not processes_with("4713") and not system.processes(), 5)
    system.shell(snapshot, "true")


def test_sigkill_at_a_random_moment_is_all_or_nothing(system: System, snapshot: int) -> None:
    began = time.monotonic()
    system.shell(snapshot, "true")
    usual = time.monotonic() - began
    for attempt in range(8):
        value = f"value {attempt}"
        before = mark_in(system, snapshot, "etc/value")
        script = f"echo {value} > /etc/value; echo {value} > /usr/value; echo {value} > /var/lib/value-{snapshot}"
        process = system.start("run", snapshot, "sh", "-ec", script)
        time.sleep(random.uniform(0.1, usual * 1.3))
        kill_hard(process)
        system.ash("tmp")
        found = mark_in(system, snapshot, "etc/value")
        in_var = system.files.var / f"lib/value-{snapshot}"
        assert found in (before, f"{value}\n")
        assert found == mark_in(system, snapshot, "usr/value") == (in_var.read_text() if in_var.exists() else "")
        assert not system.remains()
        system.is_sound()


# /etc/resolv.conf


def test_names_are_resolved_as_outside(system: System, snapshot: int) -> None:
    with open("/etc/resolv.conf", encoding="utf-8") as ours:  # noqa: PTH123 - the host's own
        assert system.ash("run", snapshot, "cat", "/etc/resolv.conf").stdout == ours.read()


@pytest.mark.parametrize("given", ["the link of the base", "a file", "nothing", "a link to nowhere"])
def test_an_unedited_resolv_conf_does_not_change(system: System, snapshot: int, given: str) -> None:
    make = {
        "the link of the base": "true",
        "a file": "rm /etc/resolv.conf; echo nameserver 192.0.2.7 > /etc/resolv.conf",
        "nothing": "rm /etc/resolv.conf",
        "a link to nowhere": "ln -sf /run/nowhere/resolv.conf /etc/resolv.conf",
    }[given]
    system.shell(snapshot, make)
    path = system.root(snapshot) / "etc/resolv.conf"
    before = (path.is_symlink(), path.exists(), path.read_text() if path.exists() else "")
    with system.nothing_changes():
        system.shell(snapshot, "true")
    system.shell(snapshot, "touch /etc/mark")
    assert (path.is_symlink(), path.exists(), path.read_text() if path.exists() else "") == before


def test_an_edit_of_resolv_conf_is_committed(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo 'nameserver 192.0.2.1' >> /etc/resolv.conf")
    path = system.root(snapshot) / "etc/resolv.conf"
    assert not path.is_symlink()
    assert path.read_text().endswith("nameserver 192.0.2.1\n")
    assert (system.files.etc(snapshot) / "resolv.conf").read_text() == path.read_text()
    system.shell(snapshot, "touch /etc/mark")
    assert path.read_text().endswith("nameserver 192.0.2.1\n")


def test_an_edit_of_resolv_conf_in_a_failed_transaction_is_dropped(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        system.shell(snapshot, "echo x > /etc/resolv.conf; exit 1", status=FAILED)


def test_a_symlink_as_resolv_conf_does_not_lead_out_of_the_root(system: System, snapshot: int) -> None:
    system.shell(snapshot, "ln -sf ../../../../../../../../../../etc/hostname-of-the-host /etc/resolv.conf")
    system.shell(snapshot, "cat /etc/resolv.conf > /dev/null")
    assert program("ls", "/etc/hostname-of-the-host", status=2) == ""
