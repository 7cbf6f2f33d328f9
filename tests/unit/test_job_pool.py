# SPDX-License-Identifier: AGPL-3.0-or-later
"""JobPool: a process for each snapshot of a tree, so many at a time, and what becomes of their results."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import ash
from ash import AshError, Change, JobPool, System, Tree

pytestmark = pytest.mark.budget(10)

#   1
#  / \
# 2   3
# |
# 4
TREE = json.dumps({
    "name": "root",
    "children": [{"name": 1, "children": [{"name": 2, "children": [{"name": 4}]}, {"name": 3}]}],
})  # fmt: skip
NUMBERS = [1, 2, 3, 4]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """What a pool needs of a system: a place for the changes that were made."""
    monkeypatch.setattr(ash, "PRIVATE", tmp_path)
    return cast("System", SimpleNamespace(done=[]))


def pool(system: System, work: Callable[[int], Change], limit: int, **options: Any) -> JobPool:
    """A pool that has done some work in all snapshots of TREE."""
    pool = JobPool(system, "testing", limit, **options)
    pool.run(Tree.parse(TREE), NUMBERS, work)
    return pool


def logged(log: Path, line: str) -> None:
    """Append a line to a log that all jobs share."""
    with log.open("a") as file:
        file.write(f"{line}\n")


def reports(log: Path, seconds: float = 0.05) -> Callable[[int], Change]:
    """Work that takes a moment, and logs when it starts and ends."""

    def work(number: int) -> Change:
        logged(log, f"start {number}")
        time.sleep(seconds)
        logged(log, f"end {number}")
        return Change(number, changed=True)

    return work


def at_once(log: Path) -> int:
    """The largest number of jobs that were running at the same time."""
    running = most = 0
    for line in log.read_text().splitlines():
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_every_job_runs_once_and_never_more_than_the_limit(system: System, tmp_path: Path, limit: int) -> None:
    done = pool(system, reports(tmp_path / "log"), limit)
    assert [change.snapshot for change in done.changes] == NUMBERS
    assert done.failed == []
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{what} {n}" for what in ("start", "end") for n in NUMBERS)
    assert at_once(tmp_path / "log") <= limit


def test_two_jobs_run_side_by_side(system: System, tmp_path: Path) -> None:
    pool(system, reports(tmp_path / "log", seconds=0.5), 2)
    assert at_once(tmp_path / "log") == 2


def test_a_job_waits_for_its_parent_only_if_it_needs_the_parents_result(system: System, tmp_path: Path) -> None:
    pool(system, reports(tmp_path / "log"), 4, after_parents=True)
    lines = (tmp_path / "log").read_text().splitlines()
    for parent, child in ((1, 2), (1, 3), (2, 4)):
        assert lines.index(f"end {parent}") < lines.index(f"start {child}")


def test_the_parents_job_may_fail_before_the_childs_starts(system: System) -> None:
    def work(number: int) -> Change:
        if number == 1:
            raise AshError("not this one")
        return Change(number)

    done = pool(system, work, 2, after_parents=True)
    assert [job.number for job in done.failed] == [1]
    assert [change.snapshot for change in done.changes] == [2, 3, 4]


def test_results_come_back_whole_and_only_changes_are_noted_in_the_system(system: System) -> None:
    def work(number: int) -> Change:
        return Change(number, changed=number == 2, added={"hello": "1"}, upgraded={"less": ("1", "2")})

    done = pool(system, work, 2)
    assert [change.snapshot for change in system.done] == [2]
    assert done.changes[1].added == {"hello": "1"}
    assert list(done.changes[1].upgraded["less"]) == ["1", "2"]


@pytest.mark.parametrize(
    ("raised", "error", "hint"),
    [
        (AshError("it is mutable ", "ash immutable 1"), "it is mutable", "ash immutable 1"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), os.strerror(errno.ENOSPC), ""),
        (ValueError("x"), "an error in ash itself: ValueError('x')", ""),
        (KeyboardInterrupt(), "it was interrupted", ""),
    ],
    ids=["AshError", "OSError", "bug", "interrupt"],
)
def test_a_job_that_fails_says_why(system: System, raised: BaseException, error: str, hint: str) -> None:
    def work(number: int) -> Change:
        raise raised

    done = pool(system, work, 2)
    assert done.changes == []
    assert [job.error for job in done.failed] == [error] * 4
    assert {job.hint for job in done.failed} == {hint}


def test_a_job_that_is_killed_has_failed_and_the_others_go_on(system: System) -> None:
    def work(number: int) -> Change:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return Change(number)

    done = pool(system, work, 2)
    assert [(job.number, job.error) for job in done.failed] == [(2, "it was killed")]
    assert [change.snapshot for change in done.changes] == [1, 3, 4]


def test_an_error_in_the_pool_itself_ends_all_jobs(system: System, tmp_path: Path) -> None:
    class Broken(JobPool):
        def _draw(self) -> None:
            raise KeyboardInterrupt

    broken = Broken(system, "testing", 2)
    with pytest.raises(KeyboardInterrupt):
        broken.run(Tree.parse(TREE), NUMBERS, reports(tmp_path / "log", seconds=60))
    for job in broken.jobs:
        assert job.process == 0 or not Path(f"/proc/{job.process}").exists()


def test_the_output_of_parallel_jobs_is_not_mixed(
    system: System, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def work(number: int) -> Change:
        for _ in range(3):
            os.write(1, f"of {number}\n".encode())
            time.sleep(0.01)
        return Change(number)

    pool(system, work, 4, shown=True)
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert sorted(lines) == sorted(f"of {n}" for n in NUMBERS for _ in range(3))
    assert all(len(set(lines[start : start + 3])) == 1 for start in range(0, 12, 3))


def test_a_job_says_how_far_it_is(system: System) -> None:
    job = ash.Job(1, None)
    assert (job.state(), job.is_done) == ("waiting", False)
    job.process, job.started = 1, time.monotonic()
    assert (job.state(), job.is_done) == ("0 s", False)
    job.change = Change(1)
    assert (job.state(), job.is_done) == ("nothing to change", True)
    job.change = Change(1, changed=True)
    assert job.state() == "changed"
    job.error = "two\nlines"
    assert job.state().startswith("failed: two")
    assert "\n" not in job.state()
