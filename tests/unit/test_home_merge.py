# SPDX-License-Identifier: AGPL-3.0-or-later
"""The merge into /home and /root, where the live directory itself was below the overlay: times decide."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

import ash
from ash import Clock, HomeMerge, Overlay, VarMerge
from distros.debian.ashpk import Debian

pytestmark = pytest.mark.budget(5)


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """A live directory with a file."""
    (tmp_path / "live").mkdir()
    (tmp_path / "live/file").write_text("old\n")
    return tmp_path / "live"


def merged(live: Path, since: int, new: str = "ours\n") -> HomeMerge:
    """Merge a changed file and a new one into the live directory, where that is `new` then."""
    upper = live.parent / "upper"
    upper.mkdir()
    (upper / "file").write_text("ours\n")
    (upper / "new").write_text("ours\n")
    var = live.parent / "var"
    conflicts = var / "lib/ash/conflicts/1"
    (var / "lib").mkdir(parents=True)
    into_var = VarMerge(upper, var, var, Debian.package_manager, conflicts, delete=())
    merge = HomeMerge("home", Overlay(live, upper, live.parent / "work"), live, since, into_var)
    merge.merge()
    assert (live / "new").read_text() == new
    assert sorted(os.listdir(live)) == ["file", "new"]
    return merge


def test_a_file_that_is_older_than_the_transaction_is_replaced(live: Path) -> None:
    later = (live / "file").stat().st_ctime_ns + 1
    assert not merged(live, later).in_conflict
    assert (live / "file").read_text() == "ours\n"


@pytest.mark.parametrize("known", [False, True], ids=["the clock was set back", "changed meanwhile"])
def test_a_file_that_may_be_newer_stays(live: Path, known: bool) -> None:
    merge = merged(live, (live / "file").stat().st_ctime_ns if known else 0)
    assert merge.in_conflict == ["file"]
    assert (live / "file").read_text() == "old\n"
    assert (merge.var.conflicts / "home/file").read_text() == "ours\n"


@pytest.mark.parametrize(("seconds", "back"), [(0, False), (3600, False), (-3600, True)])
def test_a_clock_that_was_set_back_is_noticed(monkeypatch: pytest.MonkeyPatch, seconds: int, back: bool) -> None:
    began, real = Clock.read(), time.clock_gettime_ns
    step = seconds * 10**9

    def shifted(clock: int) -> int:
        return real(clock) + (step if clock == ash.CLOCK_REALTIME_COARSE else 0)

    monkeypatch.setattr(time, "clock_gettime_ns", shifted)
    assert began.was_set_back() == back


@pytest.mark.parametrize(
    ("one", "other", "size"),
    [("", "", 0), ("a\nb\n", "a\nb\n", 4), ("a\nb\nc\n", "a\nd\n", 2), ("abc\n", "abd\n", 0), ("a\n", "a\nb\n", 2)],
)
def test_the_lines_that_two_histories_share(one: str, other: str, size: int, tmp_path: Path) -> None:
    (tmp_path / "one").write_text(one)
    (tmp_path / "other").write_text(other)
    assert ash.common_lines(tmp_path / "one", tmp_path / "other") == size


@pytest.mark.parametrize("name", ["file", "new"])
def test_a_path_that_changes_while_its_replacement_is_copied_stays(
    live: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_meanwhile(source: Path, target: Path, **options: Any) -> None:
        copy_file(source, target, **options)
        if source == live.parent / "upper" / name and not target.is_relative_to(live.parent / "var"):
            with (live / name).open("a") as file:
                file.write("theirs\n")

    later = (live / "file").stat().st_ctime_ns + 1
    copy_file = ash.copy_file
    monkeypatch.setattr(ash, "copy_file", write_meanwhile)
    merge = merged(live, later, new="theirs\n" if name == "new" else "ours\n")
    assert (live / name).read_text().endswith("theirs\n")
    assert (merge.in_conflict, merge.failed) == ([name], {})
    assert (merge.var.conflicts / "home" / name).read_text() == "ours\n"


def test_a_path_that_cannot_be_read_stays(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(file: Path | int) -> dict[str, bytes]:
        if file == live / "file":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return {}

    monkeypatch.setattr(ash, "extended_attributes", read)
    (live / "file").write_text("mine\n")  # of the transaction's size, so that more is compared
    assert merged(live, time.time_ns()).in_conflict == ["file"]


def test_what_an_interrupted_merge_left_is_deleted_also_if_it_is_decided_otherwise_now(live: Path) -> None:
    var = live.parent / "var"
    upper = live.parent / "upper"
    upper.mkdir()
    (var / "lib").mkdir(parents=True)
    (upper / "file").write_text("ours\n")
    into_var = VarMerge(upper, var, var, Debian.package_manager, var / "lib/ash/conflicts/1", delete=())
    torn = ash.temporary_name(live / "file", into_var.token)
    torn.write_text("ou")
    merge = HomeMerge("home", Overlay(live, upper, live.parent / "work"), live, 0, into_var)
    merge.merge()
    assert (merge.in_conflict, os.listdir(live)) == (["file"], ["file"])
