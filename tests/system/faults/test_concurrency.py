# SPDX-License-Identifier: AGPL-3.0-or-later
"""Eight commands at the same time, on the same and on different snapshots, some of them killed: nothing is lost or stuck.

ASH_TEST_SECONDS says how long, a minute if nothing does.
"""

import json
import os
import random
import re
import shlex
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ash import IN_ROOT_MUTABLE, Subvolume
from tests.support import ASH, DISTRIBUTION, DONE, FAILED, LOCKED, MISSING, OURS_IN_RUN, REFUSED, make_deb, wait_until
from tests.system.disk_system import System

SECONDS = int(os.environ.get("ASH_TEST_SECONDS", "60"))
PROCESSES = 8
SHARED = 4  # the snapshots that all users work on
ONE_IN = 12  # commands is killed
FEW = 3  # snapshots created by each user
COUNT = 'echo $(($(cat /etc/count 2>/dev/null || echo 0) + 1)) > /etc/count; echo x >> "/var/lib/count-$0"'
OTHERS = [
    "desc",
    "tree",
    "status",
    "deploy",
    "deploy 2",
    "mutable",
    "immutable",
    "install",
    "remove",
    "fsck",
    "recover",
]
KINDS = ["run"] * 6 + ["clone", "branch", "del", "del shared", "undo"] * 2 + OTHERS

pytestmark = [pytest.mark.system, pytest.mark.budget(SECONDS + 40)]


@dataclass
class Run:
    """A command with its start and end time."""

    words: list[str]
    began: float
    ended: float = 0  # 0 while it runs


@dataclass
class Seen:
    """What all users together have seen."""

    runs: dict[int, Run] = field(default_factory=dict)  # by pid
    counted: Counter[int] = field(default_factory=Counter)  # successful changes of each snapshot
    cut: Counter[int] = field(
        default_factory=Counter
    )  # killed changes of each snapshot, which may have been successful
    made: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)  # deleted snapshots, or ones whose deletion was killed
    odd: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    locked: int = 0
    nameless: int = 0  # held locks without the name of a holder


class Worker(threading.Thread):
    """A user who runs random commands until the time is over."""

    lock = threading.Lock()

    def __init__(self, system: System, seen: Seen, package: Path, seed: int, end: float) -> None:
        super().__init__()
        self.system, self.seen, self.package, self.end = system, seen, package, end
        self.chance = random.Random(seed)
        self.own: list[int] = []

    def run(self) -> None:
        while time.monotonic() < self.end and not self.seen.odd:
            self.one()

    def words(self, kind: str, number: int) -> list[str]:
        """A command line for a kind of command."""
        own = str(next((n for n in reversed(self.own) if n not in self.seen.gone), 10**6))
        return {
            "run": ["run", str(number), "sh", "-c", COUNT, str(number)],
            "clone": ["-q", "clone", str(number)],
            "branch": ["-q", "branch", str(number)],
            "del": ["-y", "del", own],
            "del shared": ["-y", "del", str(self.chance.choice(sorted(self.seen.made - self.seen.gone) or [10**6]))],
            "undo": ["undo", own],
            "desc": ["desc", str(number), "by", self.name],
            "deploy": ["deploy", str(number)],
            "deploy 2": ["deploy", str(number), "--secondary"],
            "mutable": ["mutable", own],
            "immutable": ["immutable", own],
            "install": ["install", str(number), str(self.package)],
            "remove": ["remove", str(number), "ash-test-small"],
            "fsck": ["--json", "fsck"],
        }.get(kind, [kind])

    def one(self) -> None:
        """Run one command and check its output."""
        number = self.chance.randint(1, SHARED)
        # Few snapshots, so that commands meet on them and fsck takes only seconds.
        kind = self.chance.choice(KINDS) if len({*self.own} - self.seen.gone) < FEW else "del"
        with self.lock:
            words = self.words(kind, number)
            process = subprocess.Popen(
                [*ASH, "--image", self.system.image, *words],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            run = self.seen.runs[process.pid] = Run(words, time.monotonic())
        if self.chance.randrange(ONE_IN) == 0:
            time.sleep(self.chance.random() * 1.5)
            process.kill()
        try:
            out, error = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            error, out = "it hangs", ""
        run.ended = time.monotonic()
        with self.lock:
            self.learn(kind, run, process.returncode, out)
            for problem in self.problems(kind, run, process.returncode, out, error):
                self.seen.odd.append(
                    f"{' '.join(words)} ended with {process.returncode}: {problem}: {error}{out[:300]}"
                )

    def learn(self, kind: str, run: Run, status: int, out: str) -> None:
        """Record what a command has done, or may have done."""
        may_have, words = status in (DONE, -9), run.words
        self.seen.done[kind] += status == DONE
        if kind == "run":
            self.seen.counted[int(words[1])] += status == DONE
            self.seen.cut[int(words[1])] += status < 0
        elif kind in ("clone", "branch") and status == DONE:
            self.own.append(int(out))
            self.seen.made.add(int(out))
        elif kind.startswith("del") and may_have:
            self.seen.gone.add(int(words[2]))

    def problems(self, kind: str, run: Run, status: int, out: str, error: str) -> list[str]:
        """What is wrong with a command's output; empty if nothing."""
        if status in (DONE, -9):
            return []
        if kind == "fsck" and status == FAILED and not error:
            return [one["what"] for one in json.loads(out)["damage"] if not self.may_be_cut(one)]
        said = error.splitlines()[-1:]
        if not said or not said[0].startswith("ash: ") or re.search("Traceback|an error in ash itself", error):
            return ["no line that says why"]
        if status == LOCKED or (status == OURS_IN_RUN and "locked by" in error):
            return self.problems_of_lock(run, said[0])
        return [] if status in (MISSING, REFUSED) or "does not exist" in error else ["no such end"]

    @staticmethod
    def may_be_cut(damage: dict[str, object]) -> bool:
        """Whether a problem is a leftover of a killed command, which the next command removes."""
        leftovers = "interrupted|left over from a (transaction|deploy)|the boot menu with all snapshots"
        return bool(re.search(leftovers, str(damage["what"])))

    def problems_of_lock(self, run: Run, error: str) -> list[str]:
        """Whether the named holder of a lock really held it at that time."""
        self.seen.locked += 1
        self.seen.nameless += "locked by another ash" in error
        found = re.match(
            rf"ash: (snapshot (\d+)|(?:deploy|state) of {DISTRIBUTION}|merging into /var) is locked by (.*)", error
        )
        if not found:
            return ["locked, and by nobody"]
        holder = re.match(r"pid (\d+) \(ash --image \S+ (.*)\) \(--wait", found[3])
        if not holder:
            return [] if found[3].startswith("another ash") else ["locked by nobody"]
        other = self.seen.runs.get(int(holder[1]))
        if other is None or " ".join(other.words) != holder[2]:
            return ["the holder is none of us"]
        if other is run or (other.ended and other.ended < run.began):
            return ["the holder had ended before"]
        at_all = {"tree", "status", "desc", "fsck", "recover", *(["del", "undo"] if not found[2] else [])}
        only = {word for word in other.words if word.isdecimal()}
        return [] if not found[2] or found[2] in only or at_all & {*other.words} else ["the holder works elsewhere"]


def test_eight_concurrent_commands_lose_nothing(system: System, tmp_path: Path) -> None:
    for _ in range(SHARED):
        system.clone()
    package = make_deb(tmp_path, "ash-test-small", files={"usr/share/ash-test-small": "x\n"})
    seen, end = Seen(), time.monotonic() + SECONDS
    workers = [Worker(system, seen, package, seed, end) for seed in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"done: {dict(seen.done)}; locked: {seen.locked}, of these by nobody in particular: {seen.nameless}")
    assert not seen.odd, "\n".join(seen.odd)
    assert seen.done.total() > SECONDS / 4
    assert seen.locked
    assert seen.nameless <= seen.locked / 10
    wait_until(lambda: not system.processes())
    system.ash("recover")
    assert system.ash("--json", "fsck").json["damage"] == []
    assert not system.remains()
    assert seen.made - seen.gone <= system.files.tree()
    for number in range(1, SHARED + 1):
        count = system.root(number) / "etc/count"
        counted = int(count.read_text()) if count.exists() else 0
        assert seen.counted[number] <= counted <= seen.counted[number] + seen.cut[number]
        lines = system.files.var / f"lib/count-{number}"
        merged = len(lines.read_text().splitlines()) if lines.exists() else 0
        assert merged == counted
    system.boots()
    for number in system.files.tree():
        if (system.root(number) / "usr/share/ash/mutable").exists():
            system.ash("immutable", number)
    system.is_sound()


def test_two_installs_run_at_the_same_time(system: System, tmp_path: Path) -> None:
    meet = "touch /here; for n in $(seq 600); do [ -e /go ] && rm /here /go && exit 0; sleep 0.1; done; exit 1"
    packages = [make_deb(tmp_path, f"ash-test-{name}", postinst=meet) for name in ("one", "other")]
    numbers = [system.clone(), system.clone()]
    installs = [system.start("install", number, deb) for number, deb in zip(numbers, packages, strict=True)]
    working_copies = [system.root(f"chr{number}") for number in numbers]
    wait_until(lambda: all((root / "here").exists() for root in working_copies), 120)
    for root in working_copies:
        (root / "go").touch()
    assert [install.wait(timeout=180) for install in installs] == [DONE, DONE]


@pytest.mark.parametrize("step", ["snapshot snapshot-", "create etc-new-"])
def test_a_copy_of_a_snapshot_that_is_changed_meanwhile_is_whole(
    system: System, snapshot: int, tmp_path: Path, step: str
) -> None:
    waits = "touch /here; until [ -e /go ]; do sleep 0.1; done"
    install = system.start("install", snapshot, make_deb(tmp_path, "ash-test-meanwhile", postinst=waits))
    working_copy = system.root(f"chr{snapshot}")
    wait_until((working_copy / "here").exists, 120)
    makes_mutable = shlex.join([*ASH, "--image", str(system.image), "--wait", "60", "mutable", str(snapshot)])
    meanwhile = f"touch {working_copy}/go; {makes_mutable} >/dev/null"
    cloned = system.with_hooks({"do": [step, "sh", "-c", meanwhile]}, "-q", "clone", snapshot)
    assert cloned.returncode == DONE, cloned.stderr
    assert install.wait(timeout=180) == DONE
    for number in (snapshot, int(cloned.stdout)):
        root = system.root(number)
        assert (root / IN_ROOT_MUTABLE).exists() != Subvolume.at(root).readonly
        system.ash("immutable", number)
    system.is_sound()
