# SPDX-License-Identifier: AGPL-3.0-or-later
"""One ash at a time on a snapshot, several at the same time on a system or image."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ash import Lock, btrfs_partition, create_subvolume, delete_subvolume, is_subvolume, locker_of, subvolume_at
from tests.support import ASH, DONE, LOCKED, OURS_IN_RUN, REFUSED, RUN_AND_KILL, Disk, kill_hard, program, wait_until
from tests.system.disk_system import Machine, System, installed_ash

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]


def test_a_second_ash_on_the_same_snapshot_reports_the_holder(system: System, snapshot: int) -> None:
    with system.at_work(snapshot, "touch /etc/mark") as work:
        for words in (f"install {snapshot} hello", f"unlock {snapshot}", f"-y del {snapshot}"):
            error = system.ash(*words.split(), status=LOCKED).error
            assert f"snapshot {snapshot} is locked by pid {work.process.pid} (ash " in error
            assert f"run {snapshot}" in error
            assert "--wait SECONDS" in error
        assert "is locked" in system.ash("run", snapshot, "true", status=OURS_IN_RUN).error
        answer = system.ash("--json", "run", snapshot, "true", status=OURS_IN_RUN).json
        assert answer["error"]["status"] == LOCKED
    assert (system.root(snapshot) / "etc/mark").exists()


def test_a_second_ash_waits_as_long_as_wait_says(system: System, snapshot: int) -> None:
    began = time.monotonic()
    with system.at_work(snapshot, "touch /etc/one"):
        system.ash("--wait", "1", "run", snapshot, "true", status=OURS_IN_RUN)
        assert time.monotonic() - began > 1
        waiting = system.start("--wait", "30", "run", snapshot, "touch", "/etc/two")
        time.sleep(0.5)
        assert waiting.poll() is None
    assert waiting.wait(30) == 0
    assert (system.root(snapshot) / "etc/one").exists()
    assert (system.root(snapshot) / "etc/two").exists()


def test_two_snapshots_can_be_changed_at_the_same_time(system: System, snapshot: int) -> None:
    other = system.clone()
    with system.at_work(snapshot, "touch /etc/mark"), system.at_work(other, "touch /etc/mark"):
        third = system.clone()
        system.shell(third, "touch /etc/mark")
    assert all((system.root(number) / "etc/mark").exists() for number in (snapshot, other, third))
    system.is_sound()


def test_a_copy_of_a_snapshot_being_changed_has_its_old_state(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo before > /etc/mark")
    with system.at_work(snapshot, "echo after > /etc/mark"):
        copy = system.clone(snapshot)
        branch = system.branch(snapshot)
        system.ash("deploy", snapshot)
        assert (system.root("deploy-aux") / "etc/mark").read_text() == "before\n"
    for number in (copy, branch):
        assert (system.root(number) / "etc/mark").read_text() == "before\n"
    assert (system.root(snapshot) / "etc/mark").read_text() == "after\n"
    system.ash("deploy", 0)


def test_reading_needs_no_lock(system: System, snapshot: int) -> None:
    with system.at_work(snapshot, "touch /etc/mark"):
        assert str(snapshot) in system.ash("tree").stdout
        assert system.ash("--json", "list", snapshot).json["packages"]
        system.ash("desc", snapshot, "is being changed")


def test_users_can_read_lock_holders_but_not_take_locks(system: System, snapshot: int) -> None:
    lock = system.files.state / f"work/{snapshot}/lock"
    with system.at_work(snapshot, "touch /etc/mark") as work:
        assert lock.stat().st_mode & 0o777 == 0o600
        assert locker_of(lock) == work.process.pid
    assert locker_of(lock) is None


def test_a_subvolume_deleted_during_the_lookup_does_not_exist(system: System) -> None:
    coming_and_going, over = system.files.top / "looked-at", threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            create_subvolume(coming_and_going)
            delete_subvolume(coming_and_going)

    other = threading.Thread(target=come_and_go)
    other.start()
    seen = set()
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            is_subvolume(coming_and_going)
            seen.add(subvolume_at(coming_and_going) is None)
    finally:
        over.set()
        other.join()
    assert seen == {True, False}


def test_the_lock_is_free_as_soon_as_its_holder_is_dead(system: System, snapshot: int) -> None:
    process = system.start("run", snapshot, "sh", "-c", "touch /begun; sleep 4720")
    wait_until((system.root(f"chr{snapshot}") / "begun").exists)
    kill_hard(process)
    began = time.monotonic()
    system.ash("--wait", "10", "run", snapshot, "true")
    assert time.monotonic() - began < 5


def test_locks_of_snapshots_and_deployments_do_not_deadlock(machine: Machine, snapshot: int) -> None:
    work = machine.files.state / "work"
    (machine.etc / "own").write_text("own\n")
    with Lock(work / "deploy/lock", "the test"):
        undo = machine.system.start("--wait", "30", "undo", snapshot)
        wait_until((work / f"{snapshot}/lock").read_text)
        undo.send_signal(signal.SIGSTOP)
    update = machine.system.start("--wait", "30", "etc-update")
    time.sleep(1)
    began = time.monotonic()
    undo.send_signal(signal.SIGCONT)
    assert (undo.wait(60), update.wait(60)) == (REFUSED, DONE)
    assert time.monotonic() - began < 15
    assert (machine.files.etc(snapshot) / "own").read_text() == "own\n"


def test_concurrent_copies_get_different_numbers(system: System) -> None:
    processes = [
        subprocess.Popen([*ASH, "--image", system.image, "-q", "clone", "0"], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    numbers = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert len(set(numbers)) == 4
    assert set(numbers) <= system.files.tree()
    system.is_sound()


def test_a_branch_created_during_the_deletion_of_its_parent_stops_the_deletion(system: System, snapshot: int) -> None:
    with system.at_work(snapshot, "true"):
        deleted = system.start("--wait", "30", "-y", "del", snapshot)
        time.sleep(1.5)  # nothing shows that it waits
        below = system.branch(snapshot)
    assert deleted.wait(60) == LOCKED
    assert {snapshot, below} <= system.files.tree()
    assert not system.remains()
    system.ash("fsck")
    assert f"deleted {snapshot}, {below}" in system.ash("-y", "del", snapshot).stdout
    system.ash("fsck")


def test_waiting_for_a_snapshot_does_not_stop_its_deletion(system: System, snapshot: int) -> None:
    lock = system.files.state / f"work/{snapshot}/lock"
    anew = f"mkdir -p {lock.parent}; touch {lock}"
    deleted = system.with_hooks({"do": ["rmdir", "sh", "-c", anew]}, "-y", "del", snapshot)
    assert deleted.returncode == DONE, deleted
    assert (
        system.ash("run", snapshot, "true", status=OURS_IN_RUN).error
        == f"ash: snapshot {snapshot} does not exist (ash tree lists the snapshots)"
    )


def test_of_two_concurrent_descriptions_one_wins(system: System, snapshot: int) -> None:
    ash = ["timeout", "20", *ASH, "--image", str(system.image)]
    other = ["sh", "-c", '"$@" & sleep 1', "sh", *ash, "desc", str(snapshot), "theirs"]
    ended = system.with_hooks({"do": ["rename", *other]}, "desc", snapshot, "ours")
    assert ended.returncode == DONE, ended
    path = system.files.state / f"snapshots/{snapshot}-desc"
    wait_until(lambda: path.read_text() == "theirs\n")
    system.ash("fsck")


# The image


def test_concurrent_calls_on_an_image_share_one_loop_device_and_leave_none(disk: Disk) -> None:
    processes = [subprocess.Popen([*ASH, "--image", disk.image, "tree"], stdout=subprocess.DEVNULL) for _ in range(8)]
    seen = set()
    while any(process.poll() is None for process in processes):
        seen.add(disk.attached())
    assert [process.wait() for process in processes] == [0] * 8
    assert all(len(devices.split()) <= 1 for devices in seen), seen
    wait_until(lambda: not disk.attached())


def test_a_loop_device_attached_by_the_user_stays_attached(disk: Disk) -> None:
    start, size = btrfs_partition(disk.image)
    where = ["--offset", str(start), "--sizelimit", str(size)]
    loop = program("losetup", "--find", "--show", *where, disk.image).strip()
    try:
        disk.ash("run", disk.clone(), "true")
        assert disk.attached() == loop
    finally:
        subprocess.run(["losetup", "--detach", loop], check=False, capture_output=True)


def test_a_loop_device_of_the_whole_image_is_reported(disk: Disk) -> None:
    loop = program("losetup", "--find", "--show", disk.image).strip()
    try:
        assert loop in disk.ash("tree", status=LOCKED).error
    finally:
        program("losetup", "--detach", loop)
    disk.ash("tree")


def test_the_partition_is_found_among_devices_of_the_whole_image(disk: Disk) -> None:
    start, size = btrfs_partition(disk.image)
    place = [f"--offset={start}", f"--sizelimit={size}"]
    with contextlib.ExitStack() as stack:
        for where in ([], place, [], []):  # Linux lists them in any order
            loop = program("losetup", "--find", "--show", *where, disk.image).strip()
            stack.callback(program, "losetup", "--detach", loop)
        disk.ash("clone", 0)


def test_another_partition_of_the_image_may_be_attached(disk: Disk) -> None:
    start = int(disk.drive.rpartition("@@")[2])
    for limit, status in ((1 << 20, DONE), (0, LOCKED)):  # 0: to the end of the image
        where = ["--offset", str(start), "--sizelimit", str(limit)]
        loop = program("losetup", "--find", "--show", *where, disk.image).strip()
        try:
            disk.ash("clone", 0, status=status)
        finally:
            program("losetup", "--detach", loop)


def test_a_killed_ash_leaves_no_loop_device(disk: Disk) -> None:
    number = disk.clone()
    process = disk.start("run", number, "sleep", "4721")
    wait_until(disk.attached)
    time.sleep(0.3)
    kill_hard(process)
    wait_until(lambda: not disk.attached(), 10)
    disk.ash("run", number, "true")


@pytest.mark.parametrize("attached", [False, True])
def test_ash_killed_while_attaching_leaves_no_loop_device(disk: Disk, attached: bool) -> None:
    with disk.files() if attached else contextlib.nullcontext():
        for step in range(1, 20):
            subprocess.run(
                [*RUN_AND_KILL, str(step), "--image", str(disk.image), "tree"], check=False, capture_output=True
            )
            if not attached:
                wait_until(lambda: not disk.attached(), 5)
    wait_until(lambda: not disk.attached(), 5)


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")
def test_an_image_used_by_a_virtual_machine_is_refused(disk: Disk) -> None:
    argv = [
        "qemu-system-x86_64",
        "-S",
        "-accel",
        "tcg",
        "-m",
        "64",
        "-display",
        "none",
        "-monitor",
        "none",
        "-serial",
        "none",
    ]
    machine = subprocess.Popen([*argv, "-drive", f"file={disk.image},format=raw,if=virtio"], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: disk.image.name in open_files(machine.pid), 20)
        time.sleep(0.5)
        error = disk.ash("tree", status=LOCKED).error
        assert "in use by a virtual machine" in error
        assert not disk.attached()
    finally:
        machine.send_signal(signal.SIGKILL)
        machine.wait()
    disk.ash("tree")


def open_files(process: int) -> set[str]:
    """The names of the open files of a process."""
    return {Path(os.readlink(entry)).name for entry in Path(f"/proc/{process}/fd").iterdir()}


def test_ash_runs_with_the_distributions_python(disk: Disk, tmp_path: Path) -> None:
    assert sys.version_info >= (3, 11)
    with disk.files() as files:
        own = installed_ash(files, tmp_path)
    program("/usr/bin/python3", "-I", own, "--image", disk.image, "clone", "0")
