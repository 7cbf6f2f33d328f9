# SPDX-License-Identifier: AGPL-3.0-or-later
"""Paths inside a root, escaped text, replacing and comparing files, locks, mountinfo, send streams."""

import errno
import fcntl
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ash
from ash import AshError, Layout, Lock, Mount, changes_in_stream, last_words, path_inside, printable, write_file

pytestmark = pytest.mark.budget(10)


# path_inside


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with directories and symlinks of every kind, and a file outside that nothing inside may reach."""
    top = tmp_path_factory.mktemp("paths")
    (top / "secret").write_text("outside")
    root = top / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "run").mkdir()
    links = {
        "absolute": "/a/b",
        "up": "../../../secret",
        "far-up": "/../../../../secret",
        "a/b/up": "../../..",
        "a/relative": "b",
        "circle": "circle",
        "one": "two",
        "two": "one",
        "chain": "absolute/up",
        "dangling": "/nowhere/at/all",
        "resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    return root


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("a/b", "a/b"),
        ("/a//b/./c", "a/b/c"),
        ("absolute/c", "a/b/c"),
        ("up", "secret"),
        ("far-up", "secret"),
        ("a/relative/x", "a/b/x"),
        ("chain/a", "a"),
        ("a/b/up/a", "a"),
        ("../../..", ""),
        ("dangling/x", "nowhere/at/all/x"),
        ("resolv.conf", "run/systemd/resolve/stub-resolv.conf"),
        ("", ""),
    ],
)
def test_symlinks_resolve_as_for_a_chrooted_program(root: Path, path: str, inside: str) -> None:
    assert path_inside(root, path) == root / inside


@pytest.mark.parametrize("path", ["circle", "one/x", "two"])
def test_a_symlink_loop_is_an_error(root: Path, path: str) -> None:
    with pytest.raises(AshError, match="too many levels of symlinks"):
        path_inside(root, path)


parts = [
    "a",
    "b",
    "..",
    ".",
    "",
    "absolute",
    "up",
    "far-up",
    "relative",
    "chain",
    "dangling",
    "run",
    "new",
    "resolv.conf",
]


@given(st.lists(st.sampled_from(parts), max_size=9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_leads_out_of_the_root(root: Path, path: list[str]) -> None:
    found = path_inside(root, "/".join(path))
    assert found == root or root in found.parents
    assert ".." not in found.parts
    assert not found.is_symlink()


# Text


@given(st.text())
def test_printed_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)


def test_terminal_escapes_are_printed_escaped() -> None:
    assert printable("\x1b]0;title\x07\u202e x\r\n\tä") == "\\x1b]0;title\\x07\\u202e x\\r\n\tä"


def test_a_file_name_that_is_not_utf_8_is_printable() -> None:
    printable(os.fsdecode(b"\xff\xfe")).encode()


def test_last_words_are_the_last_non_blank_lines() -> None:
    assert last_words("a\n\nb\n  c  \n\nd\n\n") == "b; c; d"
    assert last_words("") == ""


# Programs


def test_a_failing_program_is_an_error_with_its_output() -> None:
    with pytest.raises(AshError, match=r"failed \(3\): no such luck"):
        ash.run(["/bin/sh", "-c", "echo a try; echo no such luck >&2; exit 3"])


def test_a_missing_program_is_named() -> None:
    with pytest.raises(AshError, match="no-such-program is not installed"):
        ash.run(["no-such-program"])


def test_programs_inherit_little_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "PYTHONPATH", "EDITOR", "APT_CONFIG", "BASH_ENV", "HOME"):
        monkeypatch.setenv(name, "/evil")
    for name in ("TERM", "LANG", "LC_TIME", "NO_COLOR", "https_proxy", "HTTP_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "kept")
    environment = ash.clean_environment()
    assert "/evil" not in environment.values()
    assert {"TERM", "LANG", "LC_TIME", "NO_COLOR", "https_proxy", "HTTP_PROXY", "no_proxy"} <= environment.keys()
    assert environment["PATH"].split(":")[0].startswith("/usr")


# Small files


def test_a_file_deleted_before_it_is_opened_reads_as_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: True)  # as it did a moment ago
    assert ash.read_text(tmp_path / "gone") == ""


def test_a_file_is_replaced_atomically_and_a_reader_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "fstree"
    write_file(path, "old\n")
    with path.open() as reader:
        write_file(path, "new\n", mode=0o600)
        assert reader.read() == "old\n"
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["fstree"]


def test_a_leftover_of_a_crash_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / ".ash-new-fstree").symlink_to("elsewhere")
    write_file(tmp_path / "fstree", "new\n")
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_leftover_of_an_interrupted_replacement_is_deleted(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old\n")
    with pytest.raises(FileNotFoundError), ash.replace(target, token="x") as new:
        shutil.copytree(tmp_path / "nowhere", new)
    (tmp_path / ".ash-new-x").mkdir()
    assert target.read_text() == "old\n"
    with ash.replace(target, token="x") as new:
        new.write_text("new\n")
    assert (target.read_text(), os.listdir(tmp_path)) == ("new\n", ["file"])


@pytest.mark.parametrize(("old", "new"), [("file", "directory"), ("directory", "file"), ("directory", "directory")])
def test_a_directory_is_only_replaced_on_request(tmp_path: Path, old: str, new: str) -> None:
    def make(path: Path, kind: str) -> None:
        if kind == "file":
            path.touch()
        else:
            path.mkdir()
            (path / kind).touch()

    make(tmp_path / "x", old)
    with pytest.raises(OSError), ash.replace(tmp_path / "x") as beside:  # noqa: PT011
        make(beside, new)
    with ash.replace(tmp_path / "x", directories=True) as beside:
        make(beside, new)
        (beside if new == "file" else beside / "new").write_text("new")
    assert ((tmp_path / "x").is_dir(), os.listdir(tmp_path)) == (new == "directory", ["x"])
    assert (tmp_path / "x" if new == "file" else tmp_path / "x/new").read_text() == "new"


# Comparing, walking


def test_extended_attributes_are_part_of_a_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_text("x")
    assert ash.is_same(one, other)
    os.setxattr(other, "user.note", b"n")
    assert not ash.is_same(one, other)
    ash.replace_by_copy(other, one)
    assert os.getxattr(one, "user.note") == b"n"


def test_a_copied_directory_loses_the_attributes_that_the_original_lacks(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    os.setxattr(other, "user.note", b"n")
    ash.replace_by_copy(one, other)
    assert os.listxattr(other) == []


def test_an_equal_size_and_mtime_do_not_stand_for_equal_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path, text in ((one, "1"), (other, "2")):
        path.write_text(text)
        os.utime(path, (1, 1))
    assert not ash.is_same(one, other)
    other.write_text("1")
    assert ash.is_same(one, other)


def test_holes_are_not_read_to_compare_files(tmp_path: Path) -> None:
    for name, inside, end in (("one", b"x", 1 << 42), ("same", b"x", 1 << 42), ("other", b"y", 1 << 42)):
        with (tmp_path / name).open("wb") as file:
            os.pwrite(file.fileno(), inside, 1 << 41)
            file.truncate(end)
    with (tmp_path / "zeros").open("wb") as file:  # where the others have a hole
        os.pwrite(file.fileno(), b"\0" * 9999, 1 << 30)
        os.pwrite(file.fileno(), b"x", 1 << 41)
        file.truncate(1 << 42)
    same = [ash.is_same(tmp_path / "one", tmp_path / name) for name in ("one", "same", "other", "zeros")]
    assert same == [True, True, False, True]


def test_a_copy_of_a_sparse_file_has_the_same_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ash, "FICLONE", 0)  # as between file systems
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("wb") as file:
        for position in (1 << 20, 5 << 20):
            file.seek(position)
            file.write(b"data")
        file.truncate(1 << 33)
    ash.copy_file(source, copy)
    assert (copy.stat().st_size, copy.stat().st_blocks < 1000) == (1 << 33, True)
    with source.open("rb") as old, copy.open("rb") as new:
        assert new.read(6 << 20) == old.read(6 << 20)


def test_a_copy_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ash, "copy_content", fail)
    (tmp_path / "source").write_text("x")
    with pytest.raises(OSError, match="full"):
        ash.replace_by_copy(tmp_path / "source", tmp_path / "copy")
    assert os.listdir(tmp_path) == ["source"]


def test_directories_are_walked_in_parallel_and_symlinks_are_not_followed(tmp_path: Path) -> None:
    for path in ("a/skip/deep", "a/sub/deep", "b"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "a/link").symlink_to("sub")
    seen = []
    for (one, other), names in ash.walk(tmp_path / "a", tmp_path / "b"):
        assert one.relative_to(tmp_path / "a") == other.relative_to(tmp_path / "b")
        seen.append(str(one.relative_to(tmp_path)))
        names[:] = [name for name in names if name != "skip"]
    assert sorted(seen) == ["a", "a/link", "a/sub", "a/sub/deep"]


# Locks


def test_a_held_lock_names_its_holder(tmp_path: Path) -> None:
    with (
        Lock(tmp_path / "7/lock", "snapshot 7"),
        pytest.raises(AshError) as caught,
        Lock(tmp_path / "7/lock", "snapshot 7"),
    ):
        pass
    assert caught.value.status == ash.LOCKED
    assert f"pid {os.getpid()}" in caught.value.message
    assert caught.value.message.startswith("snapshot 7 is locked by ")


def test_a_lock_is_released_when_its_holder_dies(tmp_path: Path) -> None:
    code = (
        "import ash, os, sys, pathlib; ash.Lock(pathlib.Path(sys.argv[1]), 'it').__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], cwd=Path(ash.__file__).parent, check=False)
    assert "pid " in (tmp_path / "lock").read_text()
    with Lock(tmp_path / "lock", "it"):
        pass


def test_only_root_can_take_a_lock(tmp_path: Path) -> None:
    """Read permission is enough to lock a file."""
    with Lock(tmp_path / "lock", "it"):
        assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
    layout = ash.Layout.at(tmp_path, "debian")
    ash.delete_stale_views(layout)
    assert stat.S_IMODE((layout.work("views") / "lock").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_other_users_see_that_a_lock_is_held() -> None:
    code = "import ash, pathlib; lock = pathlib.Path('lock'); print(ash.is_held(lock), ash.holder_of(lock))"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        shutil.copy(ash.__file__, directory)
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", code]

        def seen() -> str:
            return subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=True).stdout

        with Lock(directory / "lock", "it"):
            command = Path("/proc/self/cmdline").read_text().rstrip("\0").replace("\0", " ")
            assert seen() == f"True pid {os.getpid()} ({command})\n"
        assert seen().startswith("False ")


def test_a_lock_whose_file_was_deleted_is_not_held_twice(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path, "it"):
        path.unlink()
        with Lock(path, "it"), pytest.raises(AshError), Lock(path, "it"):
            pass


def test_a_previous_holder_of_a_lock_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path, "it"):
        pass
    assert_held_by_nobody_in_particular(path)
    path.write_text(f"pid {dead_process()} (ash run 1 true)\n")
    assert_held_by_nobody_in_particular(path)


def assert_held_by_nobody_in_particular(path: Path) -> None:
    with path.open() as unsigned:
        fcntl.flock(unsigned, fcntl.LOCK_EX)
        with pytest.raises(AshError, match="locked by another ash"):
            Lock(path, "it").__enter__()


def test_a_lock_that_is_only_being_tested_can_be_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        end = threading.Timer(0.02, fcntl.flock, (looks, fcntl.LOCK_UN))
        end.start()
        try:
            with Lock(path, "it"):
                pass
        finally:
            end.join()


def dead_process() -> int:
    """The process id of a program that ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


# mountinfo


@pytest.mark.parametrize(
    ("options", "subvolume"), [("rw,space_cache=v2,subvolid=268,subvol=/x", 268), ("rw,subvol=/subvolid", None)]
)
def test_a_btrfs_mount_has_a_subvolume(options: str, subvolume: int | None) -> None:
    assert Mount("/", "btrfs", "/dev/vda", options).subvolume == subvolume


def test_other_file_systems_have_no_subvolume() -> None:
    assert Mount("/", "ext4", "/dev/vda", "rw,subvolid=5").subvolume is None


def test_the_mounts_of_this_process_are_listed() -> None:
    found = {mount.target: mount for mount in ash.mounts()}
    assert found["/proc"].kind == "proc"
    assert ash.mount_of(Path("/proc/self/status")).target.startswith("/proc")


# btrfs send streams: a magic and version, then commands (length, number, checksum) of attributes (type, length)


def command(number: int, *attributes: tuple[int, bytes]) -> bytes:
    body = b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in attributes)
    return struct.pack("<IHI", len(body), number, 0) + body


def stream(*commands: bytes) -> bytes:
    return b"btrfs-stream\0" + struct.pack("<I", 1) + b"".join(commands)


PATH, PATH_TO, UID, OWN_UUID, CTIME = 15, 16, 6, 1, 10
SNAPSHOT, MKFILE, RENAME, UNLINK, CHMOD, UTIMES, END = 2, 3, 9, 11, 18, 20, 21


def test_changed_paths_are_read_from_a_stream() -> None:
    text = stream(
        command(SNAPSHOT, (PATH, b"snapshot-7"), (OWN_UUID, bytes(16))),
        command(MKFILE, (PATH, b"o257-9-0")),
        command(RENAME, (PATH, b"o257-9-0"), (PATH_TO, b"etc/new")),
        command(CHMOD, (PATH, "usr/ä".encode()), (UID, bytes(8))),
        command(UNLINK, (PATH, b"etc/\xff")),
        command(END),
    )
    kinds = {"etc/new": "added", "usr/ä": "changed", os.fsdecode(b"etc/\xff"): "removed"}
    assert changes_in_stream(text) == kinds


def test_new_timestamps_alone_are_not_a_change() -> None:
    text = stream(command(SNAPSHOT, (PATH, b"s")), command(UTIMES, (PATH, b"etc"), (CTIME, bytes(12))), command(END))
    assert changes_in_stream(text) == {}


def test_an_empty_stream_changes_nothing() -> None:
    assert changes_in_stream(stream()) == {}


# The layout


def test_the_layout_is_that_of_ashos() -> None:
    layout = Layout.at(Path("/top"), "debian")
    snapshots = Path("/top/@.snapshots_debian")
    assert layout.rootfs(7) == snapshots / "rootfs/snapshot-7"
    assert layout.rootfs("deploy-aux") == snapshots / "rootfs/snapshot-deploy-aux"
    assert layout.working_copy(7) == snapshots / "rootfs/snapshot-chr7"
    assert layout.undo(7) == snapshots / "rootfs/undo-7"
    assert (layout.etc(7), layout.boot(7)) == (snapshots / "etc/etc-7", snapshots / "boot/boot-7")
    assert (layout.executable, layout.tree) == (snapshots / "ash/ash", snapshots / "ash/fstree")
    assert layout.description(7) == snapshots / "ash/snapshots/7-desc"
    assert layout.home_root == snapshots / "ash/root"
    assert (layout.var, layout.home) == (Path("/top/@var_debian"), Path("/top/@home_debian"))
    assert layout.grub_cfg == Path("/top/@boot_debian/grub/grub.cfg")


def test_a_read_only_layout_has_no_top_level() -> None:
    with pytest.raises(AshError, match="@var_debian is not mounted"):
        _ = Layout(Path("/.snapshots"), "debian").var
