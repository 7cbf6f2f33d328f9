# SPDX-License-Identifier: AGPL-3.0-or-later
"""The merge into /var: downloads that are kept when a transaction fails, and which files are open."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ash import Change, VarMerge, is_deletable
from distros.debian.ashpk import Debian
from tests.support import CHECKOUT

pytestmark = pytest.mark.budget(5)


@pytest.fixture
def merge(tmp_path: Path) -> VarMerge:
    """A merge from `upper` into `live`, with downloads of apt and of dnf."""
    upper, live = tmp_path / "upper", tmp_path / "live"
    for name in ("apt/archives/new.deb", "apt/archives/partial/x.deb", "libdnf5/fedora-01ab/packages/new.rpm"):
        (upper / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (upper / "cache" / name).write_text("new")
    (live / "cache/apt/archives").mkdir(parents=True)
    (live / "cache/apt/archives/old.deb").write_text("old")
    (upper / "cache/apt/archives/old.deb").write_text("new")
    return VarMerge(upper, tmp_path / "origin", live, Debian.package_manager, tmp_path / "conflicts", delete=())


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory / "cache").as_posix() for path in directory.rglob("*") if path.is_file()}


def test_new_downloads_are_added_and_others_are_not_replaced(merge: VarMerge) -> None:
    merge.add_files("cache/apt/archives/*.deb")
    assert files(merge.live) == {"apt/archives/new.deb", "apt/archives/old.deb"}
    assert (merge.live / "cache/apt/archives/old.deb").read_text() == "old"


def test_a_cache_may_be_nested(merge: VarMerge) -> None:
    merge.add_files("cache/libdnf5/*/packages/*.rpm")
    assert files(merge.live) == {"apt/archives/old.deb", "libdnf5/fedora-01ab/packages/new.rpm"}


@pytest.mark.parametrize("side", ["upper", "live"])
def test_symlinks_are_not_followed(merge: VarMerge, tmp_path: Path, side: str) -> None:
    cache = getattr(merge, side) / "cache"
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    before = {path.name for path in (tmp_path / "elsewhere").rglob("*")}
    merge.add_files("cache/apt/archives/*.deb")
    merge.add_files("cache/libdnf5/*/packages/*.rpm")
    assert {path.name for path in (tmp_path / "elsewhere").rglob("*")} == before
    assert not (tmp_path / "live/cache/apt/archives/new.deb").exists()


@pytest.mark.parametrize(
    ("path", "deletable"),
    [
        ("/var/lib/mail", True),
        ("/var/mailman", True),
        ("/var/spool/mailbox/x", True),
        ("/var/mail", False),
        ("/var/mail/ada", False),
        ("/var/spool/mail", False),
        ("/home/ada", False),
        ("/root/x", False),
    ],
)
def test_mailboxes_are_kept_as_homes_are(path: str, deletable: bool) -> None:
    assert is_deletable(path) is deletable
    assert ("--delete-data" in Change(1, removed={"x": "1"}, kept=[path]).summary()) is deletable
    assert "--delete-data" not in Change(1, kept=[path]).summary(), "only remove has that"


def test_a_file_that_no_directory_can_replace_for_lack_of_room_is_put_back(
    merge: VarMerge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path == merge.live / "cache/x":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *arguments, **options)

    (merge.upper / "cache/x").mkdir()
    (merge.live / "cache/x").write_text("live")
    (merge.origin / "cache").mkdir(parents=True)
    (merge.origin / "cache/x").hardlink_to(merge.live / "cache/x")
    real = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", mkdir)
    merge.merge("cache/x", "place")
    assert (merge.live / "cache/x").read_text() == "live"
    assert merge.failed == {"cache/x": "No space left on device"}


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and FUSE")
def test_open_files_are_found_beside_a_file_system_that_does_not_answer(tmp_path: Path, mounted: bool) -> None:
    """A process has a file open on a file system whose server does not answer: stat(2) of it would never end."""
    dead = tmp_path / "dead"
    dead.mkdir()
    (tmp_path / "db").write_text("x")
    (tmp_path / "mapped").write_text("x")
    (tmp_path / "closed").write_text("x")
    program = f"""
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0 and libc.mount(b"none", b"/", None, 1 << 19 | 16384, None) == 0
server = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server
assert libc.mount(b"dead", {os.fsencode(dead)!r}, b"fuse", 0, options) == 0, ctypes.get_errno()
held = os.open({os.fspath(dead)!r}, os.O_PATH), os.open({os.fspath(tmp_path / "db")!r}, os.O_RDONLY)
with open({os.fspath(tmp_path / "mapped")!r}, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
assert {mounted} or libc.umount2({os.fsencode(dead)!r}, 2) == 0  # as `umount --lazy` does
print(flush=True)
sys.stdin.read()
"""
    holder = [sys.executable, "-c", program]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        look = f"""
import sys
sys.path.insert(0, {os.fspath(CHECKOUT)!r})
from pathlib import Path
import ash
opened = ash.OpenFiles(Path({os.fspath(tmp_path)!r}))
print([name for name in ("db", "mapped", "closed") if ash.is_open(Path({os.fspath(tmp_path)!r}, name), opened)])
"""
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout == "['db', 'mapped']\n"
        process.communicate()
