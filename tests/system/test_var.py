# SPDX-License-Identifier: AGPL-3.0-or-later
"""/var is shared and in use: what a transaction changes there, and what it leaves alone."""

import contextlib
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash import load_distro
from tests.support import DISTRIBUTION, FAILED, OURS_IN_RUN, VAR, make_deb, program, wait_until
from tests.system.disk_system import Machine, System, facts

pytestmark = [pytest.mark.system, pytest.mark.budget(140)]


def conflicts(system: System, snapshot: int) -> Path:
    """The newest conflicts directory of a snapshot."""
    directories = sorted((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*"))
    assert directories, "there was no conflict"
    return directories[-1]


def no_conflicts(system: System, snapshot: int) -> bool:
    return not list((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*"))


@pytest.mark.parametrize("entry", ["lib/new", "spool/new", "www/new", "cache/new", "log/new", "new"])
def test_a_new_entry_is_added_with_its_metadata(system: System, snapshot: int, entry: str) -> None:
    system.shell(
        snapshot,
        f"mkdir -p /var/{entry}/deep; cd /var/{entry}; echo x > deep/file; chown 7:8 deep deep/file; chmod 2710 deep; "
        "chmod 640 deep/file; ln -s deep/file link; mkfifo pipe; touch -d 2001-02-03T04:05:06Z deep/file; "
        "python3 -c \"import os; os.setxattr('deep/file', 'user.note', b'n')\"; touch \"$(printf 'b\\377')\"",
    )
    directory = system.files.var / entry
    status = (directory / "deep/file").stat()
    assert (directory / "deep/file").read_text() == "x\n"
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777, int(status.st_mtime)) == (7, 8, 0o640, 981173106)
    assert (directory / "deep").stat().st_mode & 0o7777 == 0o2710
    assert os.readlink(directory / "link") == "deep/file"
    assert (directory / "pipe").is_fifo()
    assert os.getxattr(directory / "deep/file", "user.note") == b"n"
    assert b"b\xff" in os.listdir(os.fsencode(directory))
    assert not [name for name in os.listxattr(directory) if "overlay" in name]
    assert no_conflicts(system, snapshot)


def test_no_new_file_has_the_inode_number_of_another(system: System, snapshot: int) -> None:
    """/var and /home are subvolumes, and so is what a transaction writes to: each counts its inodes from 257 on."""
    for live in (system.files.var / "lib/ash-inodes", system.files.home / "ash-inodes"):
        live.mkdir()
        for number in range(2000):
            (live / f"old{number}").touch()
    new = "for n in $(seq 500); do : > /var/lib/ash-inodes/new$n; : > /home/ash-inodes/new$n; done"
    for directory in ("/var/lib/ash-inodes", "/home/ash-inodes"):
        found = f"{new}; stat -c %d:%i {directory}/* | sort | uniq -d | wc -l; stat -c %d {directory} {directory}/* | sort -u"
        said = system.ash("run", snapshot, "sh", "-c", found).stdout.split()
        assert said[0] == "0", "numbers that several files have"
        assert len(said) == 2, "find -xdev and tar --one-file-system see several file systems"


def test_an_entry_without_live_changes_gets_the_transactions_changes(system: System, snapshot: int) -> None:
    system.shell(
        snapshot, "mkdir /var/lib/app; echo one > /var/lib/app/a; echo one > /var/lib/app/b; echo c > /var/lib/app/c"
    )
    system.shell(snapshot, "echo two > /var/lib/app/a; rm /var/lib/app/b; chmod 700 /var/lib/app")
    app = system.files.var / "lib/app"
    assert (app / "a").read_text() == "two\n"
    assert not (app / "b").exists()
    assert (app / "c").read_text() == "c\n"
    assert app.stat().st_mode & 0o777 == 0o700
    assert no_conflicts(system, snapshot)


def test_an_entry_with_live_changes_is_kept_and_the_transactions_is_set_aside(system: System, snapshot: int) -> None:
    system.shell(snapshot, "mkdir -p /var/lib/shared; echo one > /var/lib/shared/a")
    with system.at_work(
        snapshot, "echo transaction > /var/lib/shared/a; echo new > /var/lib/shared/b; touch /etc/mark"
    ) as work:
        (system.files.var / "lib/shared/other").write_text("live\n")
        before = facts((system.files.var / "lib/shared/a").lstat())
    assert facts((system.files.var / "lib/shared/a").lstat()) == before
    assert sorted(os.listdir(system.files.var / "lib/shared")) == ["a", "other"]
    aside = conflicts(system, snapshot) / "lib/shared"
    assert (aside / "a").read_text() == "transaction\n"
    assert (aside / "b").read_text() == "new\n"
    assert (system.root(snapshot) / "etc/mark").exists(), "the snapshot must have changed all the same"
    assert "/var/lib/shared" in work.ended.stdout + work.ended.stderr
    assert f"/var/lib/ash/conflicts/{snapshot}-" in work.ended.stdout + work.ended.stderr


@pytest.mark.parametrize("change", ["mode", "deleted", "renamed", "new below"])
def test_every_kind_of_live_change_counts(system: System, snapshot: int, change: str) -> None:
    entry = f"kind-{change.replace(' ', '-')}"
    live = system.files.var / "lib" / entry
    (live / "deep").mkdir(parents=True)
    (live / "deep/file").write_text("one\n")
    with system.at_work(snapshot, f"echo two > /var/lib/{entry}/deep/file"):
        match change:
            case "mode":
                (live / "deep/file").chmod(0o600)
            case "deleted":
                (live / "deep/file").unlink()
            case "renamed":
                (live / "deep/file").rename(live / "deep/other")
            case _:
                (live / "deep/newer").touch()
    assert not (live / "deep/file").exists() or (live / "deep/file").read_text() == "one\n"
    assert (conflicts(system, snapshot) / "lib" / entry / "deep/file").read_text() == "two\n"


def test_an_entry_with_an_open_file_is_kept_and_the_transactions_is_set_aside(system: System, snapshot: int) -> None:
    system.shell(snapshot, "mkdir -p /var/lib/opened; echo one > /var/lib/opened/db")
    with (system.files.var / "lib/opened/db").open() as reader:
        system.shell(snapshot, "echo two > /var/lib/opened/db")
        assert reader.read() == "one\n"
    assert (system.files.var / "lib/opened/db").read_text() == "one\n"
    assert (conflicts(system, snapshot) / "lib/opened/db").read_text() == "two\n"


def test_a_database_in_use_is_never_torn(system: System, snapshot: int) -> None:
    directory = system.files.var / "lib/database"
    directory.mkdir()
    with contextlib.closing(sqlite3.connect(directory / "data.db")) as live:
        live.execute("pragma journal_mode = wal")
        live.execute("create table t (x)")
        live.commit()
        with system.at_work(snapshot, "echo broken > /var/lib/database/data.db; rm -f /var/lib/database/data.db-wal"):
            live.execute("insert into t values (7)")
            live.commit()
    with contextlib.closing(sqlite3.connect(directory / "data.db")) as live:
        assert live.execute("select x from t").fetchall() == [(7,)]


def test_a_conflict_in_one_entry_does_not_affect_another(system: System, snapshot: int) -> None:
    (system.files.var / "lib/held").mkdir()
    with system.at_work(snapshot, "echo x > /var/lib/held/x; echo x > /var/lib/free"):
        (system.files.var / "lib/held/live").touch()
    assert (system.files.var / "lib/free").exists()
    assert not (system.files.var / "lib/held/x").exists()


def test_the_same_change_by_a_sibling_is_not_a_conflict(system: System, snapshot: int) -> None:
    other = system.clone()
    script = "mkdir -p /var/lib/same; echo same > /var/lib/same/x; chown 7 /var/lib/same/x"
    with system.at_work(snapshot, script):
        system.shell(other, script)
    assert (system.files.var / "lib/same/x").read_text() == "same\n"
    assert no_conflicts(system, snapshot)


def test_in_a_cache_the_newest_file_wins(system: System, snapshot: int) -> None:
    cache = system.files.var / "cache/apt"
    with system.at_work(
        snapshot,
        "echo old > /var/cache/apt/both; touch -d 2001-01-01 /var/cache/apt/both; echo t > /var/cache/apt/new; "
        "echo n > /var/cache/apt/later; touch -d 2037-01-01 /var/cache/apt/later",
    ):
        (cache / "both").write_text("live\n")
        (cache / "later").write_text("live\n")
        (cache / "mine").write_text("live\n")
    assert [(cache / name).read_text() for name in ("both", "new", "later", "mine")] == [
        "live\n",
        "t\n",
        "n\n",
        "live\n",
    ]
    assert no_conflicts(system, snapshot)


def test_what_a_transaction_appended_to_a_log_is_appended(system: System, snapshot: int) -> None:
    log, directory = system.files.var / "log/dpkg.log", system.files.var / "log/apt"
    log.write_text("before\n")
    (directory / "history.log").write_text("before\n")
    with system.at_work(
        snapshot,
        "cd /var/log; echo transaction >> dpkg.log; echo transaction >> apt/history.log; echo n > apt/new.log",
    ):
        with log.open("a") as live:
            live.write("live\n")
        with (directory / "history.log").open("a") as live:
            live.write("live\n")
    assert log.read_text() == "before\nlive\ntransaction\n"
    assert (directory / "history.log").read_text() == "before\nlive\ntransaction\n"
    assert (directory / "new.log").read_text() == "n\n"
    assert no_conflicts(system, snapshot)


@pytest.mark.parametrize("end", ["exit 1", "kill -9 $$"])
def test_a_failed_transaction_leaves_nothing_in_var(system: System, snapshot: int, end: str) -> None:
    script = "cd /var; echo x > lib/failed; echo x >> log/dpkg.log; echo x > cache/apt/failed; rm -rf lib/misc backups"
    with system.nothing_changes():
        system.shell(snapshot, f"{script}; {end}", status=1 if "exit" in end else 137)


def test_live_changes_during_a_failed_transaction_are_kept(system: System, snapshot: int) -> None:
    with system.at_work(snapshot, "rm -rf /var/lib/misc; echo x > /var/lib/mine", status=FAILED, after="exit 1"):
        (system.files.var / "lib/mine").write_text("live\n")
    assert (system.files.var / "lib/mine").read_text() == "live\n"
    assert (system.files.var / "lib/misc").exists()


@pytest.mark.parametrize(
    ("script", "left"),
    [
        ("rm -r /var/lib/dir", None),
        ("rm -r /var/lib/dir; mkdir /var/lib/dir; echo n > /var/lib/dir/new", {"new"}),
        ("rm -r /var/lib/dir; echo file > /var/lib/dir", "file\n"),
        ("rm -r /var/lib/dir; ln -s /etc /var/lib/dir", "link"),
        ("mv /var/lib/dir/old /var/lib/dir/moved", {"moved", "keep"}),
        ("rm /var/lib/dir/old; mkdir /var/lib/dir/old", {"old", "keep"}),
    ],
)
def test_deletions_and_replacements_without_a_removed_package_are_applied(
    system: System, snapshot: int, script: str, left: set[str] | str | None
) -> None:
    live = system.files.var / "lib/dir"
    if live.is_symlink() or live.is_file():
        live.unlink()
    live.mkdir(exist_ok=True)
    for name in os.listdir(live):
        (live / name).rmdir() if (live / name).is_dir() else (live / name).unlink()
    for name in ("old", "keep"):
        (live / name).write_text(f"{name}\n")
    system.shell(snapshot, script)
    if left is None:
        assert not live.exists()
    elif left == "link":
        assert os.readlink(live) == "/etc"
    elif isinstance(left, str):
        assert live.read_text() == left
    else:
        assert set(os.listdir(live)) == left
    assert no_conflicts(system, snapshot)


def test_data_of_a_removed_package_are_kept(system: System, snapshot: int, tmp_path: Path) -> None:
    package = make_deb(
        tmp_path,
        "ash-test-data",
        postinst="mkdir -p /var/lib/ash-test-data; echo d > /var/lib/ash-test-data/d",
        postrm='[ "$1" != purge ] || rm -rf /var/lib/ash-test-data',
    )
    (system.files.state / "root/data.deb").write_bytes(package.read_bytes())
    system.shell(snapshot, "dpkg -i /root/data.deb")
    sibling = system.clone(snapshot)
    system.ash("run", snapshot, "dpkg", "--purge", "ash-test-data")
    assert (system.files.var / "lib/ash-test-data/d").read_text() == "d\n"
    assert "ash-test-data" not in system.ash("--json", "list", snapshot).json["packages"]
    assert "ash-test-data" in system.ash("--json", "list", sibling).json["packages"]


def test_sockets_of_a_transaction_are_dropped(system: System, snapshot: int) -> None:
    system.shell(
        snapshot,
        "mkdir /var/lib/sock; touch /var/lib/sock/file; "
        "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('/var/lib/sock/s')\"",
    )
    assert os.listdir(system.files.var / "lib/sock") == ["file"]


def test_writing_to_a_subvolume_in_var_is_an_error(system: System, snapshot: int) -> None:
    subprocess.run(["btrfs", "subvolume", "create", system.files.var / "lib/volume"], check=True, capture_output=True)
    (system.files.var / "lib/volume/live").touch()
    before = system.id_of(snapshot)
    error = system.shell(snapshot, "echo x > /var/lib/volume/mine; touch /etc/mark", status=OURS_IN_RUN).error
    assert "/var/lib/volume" in error
    assert system.id_of(snapshot) == before
    assert os.listdir(system.files.var / "lib/volume") == ["live"]
    system.shell(snapshot, "touch /etc/mark")


def test_a_transaction_sees_var_as_of_its_start(system: System, snapshot: int) -> None:
    (system.files.var / "lib/seen").write_text("before\n")
    with system.at_work(snapshot, "true", after="cat /var/lib/seen") as work:
        time.sleep(0.1)
        (system.files.var / "lib/seen").write_text("after\n")
    assert work.ended.stdout == "before\n"
    assert (system.files.var / "lib/seen").read_text() == "after\n"


def test_each_entry_is_decided_right_before_it_is_put_in_place(system: System, snapshot: int) -> None:
    """Another process changes an entry, or a file of the entry itself, while the first one is being put in place."""
    var = system.files.var
    for name in ("first", "second"):
        (var / f"lib/decide-{name}").mkdir()
        for file in ("a", "z"):
            (var / f"lib/decide-{name}" / file).write_text("old\n")
    writer = "echo live > lib/decide-second/a; echo live > lib/decide-first/z"
    hook = {"do": ["copy ", "sh", "-ec", f"cd /run/ash/top/{VAR}; {writer}"]}
    script = "cd /var/lib; for e in decide-first decide-second; do for f in a z new; do echo new > $e/$f; done; done"
    ended = system.with_hooks(hook, "--json", "run", snapshot, "sh", "-ec", f"{script}; touch /etc/mark")
    assert json.loads(ended.stdout)["conflicts"] == ["/var/lib/decide-first", "/var/lib/decide-second"]
    assert (var / "lib/decide-second/a").read_text() == "live\n"
    assert (var / "lib/decide-first/z").read_text() == "live\n"
    assert (var / "lib/decide-first/a").read_text() == "old\n", "an entry is merged as a whole or not at all"
    assert sorted(os.listdir(var / "lib/decide-first")) == ["a", "z"]
    aside = conflicts(system, snapshot) / "lib/decide-first"
    assert {path.name: path.read_text() for path in aside.iterdir()} == dict.fromkeys(["a", "z", "new"], "new\n")


def test_a_file_that_changes_while_its_replacement_is_copied_stays(system: System, snapshot: int) -> None:
    live = system.files.var / "lib/window"
    live.mkdir()
    (live / "db").write_text("old\n")
    hook = {"do": [r"copy \.ash-new", "sh", "-c", f"echo live > /run/ash/top/{VAR}/lib/window/db"]}
    ended = system.with_hooks(hook, "--json", "run", snapshot, "sh", "-c", "echo new > /var/lib/window/db")
    assert json.loads(ended.stdout)["conflicts"] == ["/var/lib/window"]
    assert (live / "db").read_text() == "live\n"
    assert os.listdir(live) == ["db"], "no torn copy is left"


def test_a_wait_for_other_merges_can_be_interrupted(system: System, snapshot: int, tmp_path: Path) -> None:
    before = system.id_of(snapshot)
    lock = system.files.state / "work/merge/lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as merging:
        fcntl.flock(merging, fcntl.LOCK_EX)
        ash = system.start("run", snapshot, "sh", "-c", "touch /var/lib/interrupted /etc/mark", log=tmp_path / "log")
        wait_until((system.root(f"chr{snapshot}") / "etc/mark").exists)
        time.sleep(0.3)
        assert ash.poll() is None
        ash.send_signal(signal.SIGINT)
        assert ash.wait(timeout=10) == 130, (tmp_path / "log").read_text()
    assert system.id_of(snapshot) == before
    assert not (system.files.var / "lib/interrupted").exists()
    assert not system.remains()


def test_hard_links_in_an_entry_stay_hard_links(system: System, snapshot: int) -> None:
    (system.files.var / "lib/hard").mkdir()
    for name in ("old", "same"):
        (system.files.var / "lib/hard" / name).write_text(f"{name}\n")
    system.shell(
        snapshot,
        "cd /var/lib/hard; mkdir deep; echo x > a; ln a b; ln a deep/c; ln old new; ln -s x link; ln link link2;"
        "mkdir /var/lib/hard-new; echo y > /var/lib/hard-new/a; ln /var/lib/hard-new/a /var/lib/hard-new/b",
    )
    lib = system.files.var / "lib"
    groups = [["a", "b", "deep/c"], ["old", "new"], ["link", "link2"], ["../hard-new/a", "../hard-new/b"]]
    for names in groups:
        assert len({(lib / "hard" / name).lstat().st_ino for name in names}) == 1, names
        assert (lib / "hard" / names[0]).lstat().st_nlink == len(names)
    assert (lib / "hard/deep/c").read_text() == "x\n"
    assert no_conflicts(system, snapshot)
    system.shell(snapshot, "cd /var/lib/hard; for name in a b; do echo y > $name; done; rm -r deep old")
    assert {path.name for path in (lib / "hard").iterdir()} == {"a", "b", "same", "new", "link", "link2"}
    assert [(lib / "hard" / name).read_text() for name in ("a", "b")] == ["y\n", "y\n"]
    assert no_conflicts(system, snapshot)


def test_what_cannot_be_put_in_place_is_set_aside_whole(system: System, snapshot: int) -> None:
    directory = system.files.var / "lib/fixed"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).write_text("old\n")
    hook = {"do": [r"copy \.ash-new", "chattr", "+i", f"/run/ash/top/{VAR}/lib/fixed"]}
    script = "cd /var/lib/fixed; echo new > a; echo new > b; echo new > c; echo new > /var/lib/unhindered"
    try:
        ended = system.with_hooks(hook, "run", snapshot, "sh", "-ec", f"{script}; touch /etc/mark")
    finally:
        program("chattr", "-i", directory)
    assert ended.returncode == OURS_IN_RUN, ended
    assert "/var/lib/fixed" in ended.stderr
    assert f"/var/lib/ash/conflicts/{snapshot}-" in ended.stderr
    assert (system.root(snapshot) / "etc/mark").exists()
    assert {path.name: path.read_text() for path in directory.iterdir()} == {"a": "old\n", "b": "old\n"}
    assert (system.files.var / "lib/unhindered").exists()
    aside = conflicts(system, snapshot) / "lib/fixed"
    assert sorted(os.listdir(aside)) == ["a", "b", "c"]
    assert not system.remains()
    system.shell(snapshot, "echo new > /var/lib/fixed/a")
    assert (directory / "a").read_text() == "new\n"


def test_what_has_no_room_in_var_is_kept_and_later_commands_work(system: System, snapshot: int) -> None:
    """A quota on /var leaves no room for the conflicts directory either."""
    top, state = system.files.top, system.files.state
    program("btrfs", "quota", "enable", top)
    try:
        program("btrfs", "quota", "rescan", "-w", top)
        program("btrfs", "qgroup", "limit", "1M", system.files.var)
        script = "mkdir /var/lib/large; head -c 40M /dev/urandom > /var/lib/large/data; echo x > /var/lib/small"
        error = system.shell(snapshot, f"{script}; touch /etc/mark", status=OURS_IN_RUN).stderr
        assert "/var/lib/large: Disk quota exceeded" in error
        (kept,) = (state / "unmerged").iterdir()
        assert f"/.snapshots/ash/unmerged/{kept.name}" in error
        assert (kept / "lib/large/data").stat().st_size == 40 << 20
        assert kept.stat().st_mode & 0o777 == 0o700
        assert (kept / "lib/small").read_text() == "x\n"
        assert not (system.files.var / "lib/large").exists(), "no torn copy is left"
        assert (system.root(snapshot) / "etc/mark").exists()
        assert not system.remains()
        system.shell(snapshot, "touch /etc/more")
        system.ash("recover")
        assert system.ash("--json", "status").json["unmerged"] == [f"/.snapshots/ash/unmerged/{kept.name}"]
        assert "unmerged" in system.ash("fsck", status=FAILED).stdout
        program("rm", "-r", kept)
        system.ash("fsck")
    finally:
        program("btrfs", "quota", "disable", top)


def test_holes_stay_holes_also_where_files_are_not_copied_on_write(system: System, snapshot: int) -> None:
    (system.files.var / "lib/images").mkdir()
    program("chattr", "+C", system.files.var / "lib/images")
    system.shell(snapshot, "cd /var/lib/images; truncate -s 20G disk; echo x | dd of=disk seek=1M conv=notrunc 2>&1")
    status = (system.files.var / "lib/images/disk").stat()
    assert (status.st_size, status.st_blocks < 1000) == (20 << 30, True)
    assert "C" in program("lsattr", system.files.var / "lib/images/disk").split()[0]
    assert no_conflicts(system, snapshot)


def test_changes_of_metadata_alone_are_put_in_place(system: System, snapshot: int) -> None:
    lib = system.files.var / "lib/meta"
    lib.mkdir()
    for name in ("xattr", "mode"):
        (lib / name).write_text("x\n")
    note = "python3 -c \"import os; os.setxattr('/var/lib/meta/xattr', 'user.note', b'n')\""
    system.shell(snapshot, f"{note}; chmod 600 /var/lib/meta/mode")
    assert os.getxattr(lib / "xattr", "user.note") == b"n"
    assert (lib / "mode").stat().st_mode & 0o777 == 0o600
    assert no_conflicts(system, snapshot)


def links(system: System) -> dict[str, str]:
    """The symlinks in /var to the package database, and their targets; only those that are there."""
    names = load_distro(DISTRIBUTION).package_manager.database
    return {name: os.readlink(system.files.var / name) for name in names if (system.files.var / name).is_symlink()}


def test_the_links_to_the_package_database_are_never_merged(system: System, snapshot: int) -> None:
    before, sibling = links(system), system.clone()
    assert len(before) > 20
    script = """
        mkdir /var/cache/ash-test; rm -rf /var/cache/*; rm -rf /var/lib/systemd /var/lib/dkms
        mkdir -p /var/lib/dkms/new /var/cache/debconf; echo x > /var/lib/dkms/new/file
    """
    system.shell(snapshot, script)
    assert links(system) == before
    assert (system.root(snapshot) / "usr/share/ash/db/dkms/new/file").read_text() == "x\n"
    assert os.listdir(system.root(snapshot) / "usr/share/ash/db/cache/debconf"), "deleting a link deletes nothing"
    assert not (system.root(sibling) / "usr/share/ash/db/dkms/new").exists()
    system.shell(
        snapshot, "test -e /var/lib/dkms/new/file; test -L /var/lib/dpkg; rm /var/lib/dpkg; mkdir /var/lib/dpkg"
    )
    assert links(system) == before
    assert "dpkg" in system.ash("--json", "list", snapshot).json["packages"]
    system.ash("undo", snapshot)
    system.ash("undo", snapshot)
    error = system.shell(snapshot, "ln -sfn /opt /var/lib/dkms", status=OURS_IN_RUN).error
    assert "/var/lib/dkms must stay a symlink" in error
    assert links(system) == before
    system.is_sound()


def test_a_package_that_is_purged_leaves_nothing_in_its_database(system: System, snapshot: int, tmp_path: Path) -> None:
    before, own = links(system), system.root(snapshot) / "usr/share/ash/db/dkms"
    purge = 'if [ "$1" = purge ]; then rm -rf /var/lib/dkms; fi'
    package = make_deb(tmp_path, "dkms", postinst="mkdir -p /var/lib/dkms; touch /var/lib/dkms/state", postrm=purge)
    system.ash("install", snapshot, package)
    system.shell(snapshot, "mkdir -p /var/lib/dkms/module/1; touch /var/lib/dkms/module/1/source")
    system.ash("run", snapshot, "sh", "-ec", "dpkg --purge dkms; mkdir /var/lib/dkms; echo new > /var/lib/dkms/state")
    assert {path.name: path.read_text() for path in own.iterdir()} == {"state": "new\n"}
    system.ash("install", snapshot, package)
    assert (own / "state").exists()
    system.ash("run", snapshot, "dpkg", "--purge", "dkms")
    assert list(own.iterdir()) == []
    assert links(system) == before
    system.is_sound()


def test_fsck_restores_the_links_to_the_package_database(system: System, snapshot: int) -> None:
    before, var = links(system), system.files.var
    (var / "lib/dkms").unlink()
    (var / "lib/dpkg").unlink()
    (var / "lib/dpkg").mkdir()
    (var / "lib/dpkg/status").write_text("of nobody\n")
    system.shell(snapshot, "test -L /var/lib/dkms; test -s /var/lib/dpkg/status; ! grep nobody /var/lib/dpkg/status")
    assert (var / "lib/dkms").is_symlink(), "a missing one is made again by any commit"
    found = [problem["what"] for problem in system.ash("--json", "fsck", status=FAILED).json["damage"]]
    assert found == ["/var/lib/dpkg, a symlink to the package database, was replaced"]
    system.ash("fsck", "--repair")
    assert links(system) == before
    assert (conflicts(system, 0) / "lib/dpkg/status").read_text() == "of nobody\n"


def test_a_nested_subvolume_in_an_entry_is_no_change_of_it(system: System, snapshot: int) -> None:
    entry = system.files.var / "lib/layers"
    entry.mkdir()
    for name in ("file", "gone"):
        (entry / name).write_text("old\n")
    program("btrfs", "subvolume", "create", entry / "layer")
    with (entry / "layer/db").open("w") as in_use:
        in_use.write("live\n")
        in_use.flush()
        system.shell(snapshot, "cd /var/lib/layers; echo new > file; rm gone; touch new")
    assert sorted(os.listdir(entry)) == ["file", "layer", "new"]
    assert (entry / "file").read_text() == "new\n"
    assert no_conflicts(system, snapshot)
    system.shell(snapshot, "rm -r /var/lib/layers")
    assert os.listdir(entry) == ["layer"]
    assert (entry / "layer/db").read_text() == "live\n"
    error = system.shell(snapshot, "rm -r /var/lib/layers; echo x > /var/lib/layers", status=OURS_IN_RUN).stderr
    assert "/var/lib/layers: there is a subvolume" in error
    assert (entry / "layer/db").read_text() == "live\n"


def test_data_beside_a_nested_subvolume_can_be_deleted(system: System, snapshot: int, tmp_path: Path) -> None:
    purged = '[ "$1" != purge ] || rm -rf /var/lib/ash-test-layers'
    made = "mkdir -p /var/lib/ash-test-layers; echo d > /var/lib/ash-test-layers/d"
    system.ash("install", snapshot, make_deb(tmp_path, "ash-test-layers", postinst=made, postrm=purged))
    data = system.files.var / "lib/ash-test-layers"
    program("btrfs", "subvolume", "create", data / "layer")
    (data / "layer/live").touch()
    done = system.ash("--json", "remove", snapshot, "ash-test-layers", "--purge", "--delete-data").json
    assert done["kept"] == ["/var/lib/ash-test-layers/layer"]
    assert os.listdir(data) == ["layer"]
    assert os.listdir(data / "layer") == ["live"]


@pytest.mark.parametrize(
    "script",
    [
        "mv /var/lib/moves /var/lib/moved",
        "mv /var/lib/moves /opt/moved",
        "mv /var/lib/moves /var/lib/moved; ln -s moved /var/lib/moves",
        "mv /var/lib/moves /var/lib/moved; mkdir /var/lib/moves; echo new > /var/lib/moves/new",
    ],
)
def test_what_a_transaction_moves_away_stays(system: System, snapshot: int, script: str) -> None:
    """The transaction's snapshot may never run, while the running system writes where it always did."""
    entry = system.files.var / "lib/moves"
    (entry / "deep").mkdir(parents=True, exist_ok=True)
    (entry / "deep/db").write_text("data\n")
    told = system.ash("--json", "run", snapshot, "sh", "-ec", script).json
    assert (entry / "deep/db").read_text() == "data\n"
    assert told["kept"] or told["conflicts"]
    copies = [system.files.var / "lib/moved", system.root(snapshot) / "opt/moved"]
    assert [copy / "deep/db" for copy in copies if (copy / "deep/db").exists()]
    program("rm", "-rf", system.files.var / "lib/moved")


def test_a_file_that_a_transaction_moves_away_stays(system: System, snapshot: int) -> None:
    (system.files.var / "lib/file-moves").write_text("data\n")
    system.shell(snapshot, "mv /var/lib/file-moves /var/lib/file-moved")
    for name in ("file-moves", "file-moved"):
        assert (system.files.var / "lib" / name).read_text() == "data\n"


RUNNING = """
init = ash.System.__init__
def as_running(self, *args, **options):
    init(self, *args, **options)
    self.running = True
ash.System.__init__ = as_running
"""


@contextlib.contextmanager
def file_systems(*places: str) -> Iterator[None]:
    """Mount empty file systems in this machine's /var, which no other process sees."""
    with contextlib.ExitStack() as stack:
        for place in places:
            Path(place).mkdir(parents=True, exist_ok=True)
            program("mount", "-t", "tmpfs", "ash-test", place)
            stack.callback(program, "umount", place)
        yield


def test_logs_and_caches_may_be_file_systems_of_their_own(machine: Machine, snapshot: int) -> None:
    var = machine.files.var
    script = """
        mkdir -p /var/log/apt /var/cache/apt/archives /var/log/daemon
        for log in dpkg.log apt/history.log unknown.log daemon/log; do echo transaction >> /var/log/$log; done
        for file in both new archives/a.deb; do echo transaction > /var/cache/apt/$file; done
        touch -d 2001-01-01 /var/cache/apt/both
    """
    (var / "cache/apt").mkdir(parents=True, exist_ok=True)
    with file_systems("/var/log", "/var/cache/apt"):
        Path("/var/log/dpkg.log").write_text("live\n")
        Path("/var/cache/apt/both").write_text("live\n")
        Path("/var/cache/apt/mine").write_text("live\n")
        Path("/var/log/unknown.log").write_text("live\n")
        done = machine.run("--json", "run", snapshot, "sh", "-ec", f"{script}touch /etc/mark", patch=RUNNING).json
        assert done["conflicts"] == ["/var/log/unknown.log"]
        assert Path("/var/log/dpkg.log").read_text() == "live\ntransaction\n"
        assert Path("/var/log/unknown.log").read_text() == "live\n"
        for path in ("log/apt/history.log", "log/daemon/log", "cache/apt/new", "cache/apt/archives/a.deb"):
            assert Path("/var", path).read_text() == "transaction\n", path
        assert [Path("/var/cache/apt", name).read_text() for name in ("both", "mine")] == ["live\n", "live\n"]
        machine.run("run", snapshot, "sh", "-c", "echo again >> /var/log/dpkg.log", patch=RUNNING)
        assert Path("/var/log/dpkg.log").read_text() == "live\ntransaction\nagain\n"
    assert (conflicts(machine.system, snapshot) / "log/unknown.log").read_text() == "transaction\n"
    assert not (var / "log/daemon").exists(), "nothing is hidden below the mount"
    assert (machine.system.root(snapshot) / "etc/mark").exists()


def test_data_on_file_systems_of_their_own_are_refused(machine: Machine, snapshot: int) -> None:
    with file_systems("/var/lib/misc"):
        script = "echo x > /var/lib/misc/data; touch /etc/mark"
        error = machine.run("run", snapshot, "sh", "-ec", script, patch=RUNNING, status=OURS_IN_RUN).error
        assert "/var/lib/misc is a file system" in error
        machine.run("run", snapshot, "touch", "/etc/other", patch=RUNNING)
    with file_systems("/var/lib"):
        script = "touch /home/it-ran"
        error = machine.run("run", snapshot, "sh", "-ec", script, patch=RUNNING, status=OURS_IN_RUN).error
        assert "/var/lib is a file system of its own" in error
    assert not (machine.system.home / "it-ran").exists(), "known before the work"


def test_srv_and_mnt_are_shared_by_all_snapshots(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo shared > /srv/mark")
    assert (system.files.var / "srv/mark").read_text() == "shared\n"
    assert not (system.root(snapshot) / "srv/mark").exists()
    assert system.shell(system.clone(), "cat /srv/mark; echo other > /srv/mark; exit 0").stdout == "shared\n"
    system.ash("run", snapshot, "sh", "-c", "echo lost > /mnt/lost; exit 1", status=1)
    assert not (system.files.var / "mnt/lost").exists()
