# SPDX-License-Identifier: AGPL-3.0-or-later
"""Eight at once, on the same and on different snapshots, one of them killed now and then: nothing is lost or stuck.

ASH_TEST_SECONDS says how long, a minute if nothing does.
"""

import os
import random
import re
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import ASH, DONE, LOCKED, MISSING, OURS_IN_RUN, REFUSED, make_deb
from tests.system.lab import System

pytestmark = [pytest.mark.system, pytest.mark.budget(180)]

PROCESSES = 8
SECONDS = int(os.environ.get("ASH_TEST_SECONDS", "60"))
SHARED = 4  # snapshots that all work on
ONE_IN = 12  # is killed
COUNT = 'echo $(($(cat /etc/count 2>/dev/null || echo 0) + 1)) > /etc/count; echo x >> "/var/lib/count-$0"'


@dataclass
class Seen:
    """What the processes were told, all together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counted: Counter[int] = field(default_factory=Counter)  # changes of a snapshot that ended well
    cut: Counter[int] = field(default_factory=Counter)  # changes that were killed: they may have ended well
    made: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)  # deleted, or perhaps
    odd: list[str] = field(default_factory=list)
    done: int = 0


class Worker(threading.Thread):
    """One of the users: does what comes to its mind until the time is over."""

    def __init__(self, system: System, seen: Seen, seed: int, end: float) -> None:
        super().__init__()
        self.system, self.seen, self.end = system, seen, end
        self.chance = random.Random(seed)
        self.own: list[int] = []

    def run(self) -> None:
        """Threads are not what is tested: each command is a process."""
        while time.monotonic() < self.end:
            self.one()

    def one(self) -> None:
        """One command, and what it says."""
        number = self.chance.randint(1, SHARED)
        kind = self.chance.choice(["run", "run", "run", "clone", "branch", "desc", "tree", "del", "deploy"])
        words = {
            "run": ["run", str(number), "sh", "-c", COUNT, str(number)],
            "clone": ["-q", "clone", str(number)],
            "branch": ["-q", "branch", str(number)],
            "desc": ["desc", str(number), "by", self.name],
            "tree": ["tree"],
            "del": ["-y", "del", str(self.own[-1] if self.own else number + 10**6)],
            "deploy": ["deploy", str(number)],
        }[kind]
        process = subprocess.Popen(
            [*ASH, "--image", self.system.image, *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        killed = self.chance.randrange(ONE_IN) == 0
        if killed:
            time.sleep(self.chance.random() * 0.6)
            process.kill()
        try:
            out, error = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.note(f"{words} hangs")
            return
        self.learn(kind, number, process.returncode, out, error)

    def learn(self, kind: str, number: int, status: int, out: str, error: str) -> None:
        """Take note of what a command said, if it may say so."""
        with self.seen.lock:
            self.seen.done += status == DONE
            if kind == "run":
                self.seen.counted[number] += status == DONE
                self.seen.cut[number] += status < 0
            elif kind in ("clone", "branch") and status == DONE:
                self.own.append(int(out))
                self.seen.made.add(int(out))
            elif kind == "del" and self.own and status in (DONE, -9):
                self.seen.gone.add(self.own.pop())
        locked = status == LOCKED or (status == OURS_IN_RUN and "locked by" in error)
        if locked and not re.search(r"locked by (pid \d+ \(ash |another)", error):
            self.note(f"{kind}: {error}")
        if "Traceback" in error or not (locked or status in (DONE, -9, MISSING, REFUSED)):
            self.note(f"{kind} {number} ended with {status}: {error}")

    def note(self, what: str) -> None:
        with self.seen.lock:
            self.seen.odd.append(what)


def test_eight_at_once_lose_nothing(system: System) -> None:
    for _ in range(SHARED):
        system.clone()
    seen, end = Seen(), time.monotonic() + SECONDS
    workers = [Worker(system, seen, seed, end) for seed in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not seen.odd, "\n".join(seen.odd)
    assert seen.done > SECONDS
    system.ash("recover")
    assert system.ash("--json", "fsck").json["damage"] == []
    assert not system.remains()
    tree = system.files.tree()
    assert seen.made - seen.gone <= tree
    for number in range(1, SHARED + 1):
        count = system.root(number) / "etc/count"
        counted = int(count.read_text()) if count.exists() else 0
        assert seen.counted[number] <= counted <= seen.counted[number] + seen.cut[number]
    assert system.boots()


def test_two_installs_run_at_the_same_time(system: System, tmp_path: Path) -> None:
    packages = [make_deb(tmp_path, f"ash-test-slow-{n}", postinst="sleep 6") for n in (1, 2)]
    numbers = [system.clone(), system.clone()]
    began = time.monotonic()
    installs = [system.start("install", number, deb) for number, deb in zip(numbers, packages, strict=True)]
    assert [install.wait(timeout=120) for install in installs] == [DONE, DONE]
    assert time.monotonic() - began < 11
