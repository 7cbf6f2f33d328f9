# SPDX-License-Identifier: AGPL-3.0-or-later
"""Commands that are killed, or lose their power or disk, at their steps: on reflink copies of one prepared disk."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ash import PRIVATE, btrfs_partition, open_new_loop
from tests.archive import Archive, use_only
from tests.support import (
    BOOT,
    CHECKOUT,
    DONE,
    FAILED,
    HOME,
    PYTHON,
    RUN_WITH_HOOKS,
    Disk,
    Files,
    fill,
    make_deb,
    program,
)
from tests.system.disk_system import known_to_boot

SCRIPT = (
    "echo new | tee /etc/mark /usr/mark /boot/mark /var/lib/mark-new > /var/spool/mark-new; echo new >> /var/lib/mark/x; "
    "for home in /home /root; do echo new > $home/mark/x; mkdir -p $home/mark-new; echo new > $home/mark-new/x; done"
)
SHELL = ["sh", "-ec", SCRIPT]

OF_DEB = {"usr/mark": "new\n", "etc/mark-deb": "new\n", "var/lib/mark-deb/x": "new\n"}

IN_RUNNING = ("usr/mark", "etc/mark-deb", "usr/share/ash-test-gone")
IN_DEPLOYMENT = "[ ! -e /usr/share/ash/snap ] || echo new > /var/lib/mark-deb/live"

# The arguments of each command that changes something (DEB is a package file). A number in the name tells several variants
# of a command apart.
COMMANDS: dict[str, list[str]] = {
    "run": ["run", "1", *SHELL],
    "run 2": ["run", "3", *SHELL],  # a mutable snapshot
    "install": ["install", "1", "DEB"],
    "install 2": ["install", "1", "DEB", "--live"],
    "remove": ["remove", "2", "ash-test-there"],
    "remove 2": ["remove", "1", "ash-test-gone", "--live"],
    "tree-run": ["tree-run", "2", *SHELL],
    "tree-run 1": ["tree-run", "1", *SHELL],
    "desc": ["desc", "1", "new"],
    "clone": ["clone", "1"],
    "branch": ["branch", "1"],
    "cbranch": ["cbranch", "2"],
    "ubranch": ["ubranch", "0", "1"],
    "clone-tree": ["clone-tree", "1"],
    "new": ["new"],
    "del": ["-y", "del", "3"],
    "undo": ["undo", "2"],
    "mutable": ["mutable", "2"],
    "immutable": ["immutable", "3"],
    "immen": ["immen", "3"],
    "deploy": ["deploy", "2"],
    "deploy 2": ["deploy", "2", "--secondary"],
    "rollback": ["rollback"],
    "boot": ["boot", "1"],
    "bless": ["bless"],
    "etc-update": ["etc-update"],
    "carry": ["carry"],
    "unlock": ["unlock", "5"],
    "tmp": ["tmp"],
    "recover": ["recover"],
    "install-profile": ["install-profile", "PROFILE", "1", "--no-upgrade"],
    "tree-rmpkg": ["tree-rmpkg", "2", "ash-test-there"],
    "upgrade": ["upgrade", "2"],
    "tree-upgrade": ["tree-upgrade", "2"],
    "tree-upgrade 1": ["tree-upgrade", "1"],
    "auto-upgrade": ["auto-upgrade", "2"],
    "base-update": ["base-update"],
    "refresh": ["refresh", "2"],
    "fixdb": ["fixdb", "2"],
    "hold": ["hold", "2", "ash-test-there"],
    "unhold": ["unhold", "2", "less"],
    "sync": ["sync", "2"],
    "force-sync": ["force-sync", "1"],
    "fsck": ["fsck", "--repair"],
}
# What a user runs after a crash: the recovery, or the same command again.
RECOVER = ["recover"]
GOES_ON = {"fsck": ["fsck", "--repair"]}
# These make several changes, each of which is atomic.
SEVERAL = ("auto-upgrade", "tree-run 1", "tree-upgrade 1")
# Commands whose changes are on the disk when they end.
DURABLE = {
    *("run", "install", "install 2", "remove", "remove 2", "tree-run", "carry", "deploy", "deploy 2", "rollback"),
    *("undo", "mutable", "etc-update", "fsck", "upgrade", "tree-upgrade", "auto-upgrade", "base-update"),
}
# Shells and an editor are transactions like `run`, but need a terminal; `hollow` ends in a `deploy`.
LIKE_RUN = {"chroot", "edit-conf", "hollow", "live-chroot"}
NO_SPACE = (os.strerror(errno.ENOSPC), "too little free space")
# They change the executable alone (test_upself.py kills that), or a variable of the firmware.
ELSEWHERE = {"upself", "dist", "hide"}

# A path as ash has the disk image mounted; in /home, where the tests only compare their own files.
FILLER = PRIVATE / "top" / HOME / "filler"


@dataclass
class View:
    """What a user sees of a system. After a crash it is as before the command or as after it, never in between."""

    snapshots: dict[int, Any]
    undo: dict[str, str]
    var: dict[str, str]  # the files of the tests in the shared directories
    secondary: list[str]
    running: list[str]  # the files of the tests in the running deployment
    lost_found: set[str]  # the contents of what was moved there
    boots: str = field(compare=False)  # after a crash, this may be the deployment that was booted last


Ended = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Tried:
    """What a command does if nothing interrupts it.

    Args:
        steps: the names of its steps.
        before, after: the view without and with the command.
        boots: what may be booted next.
    """

    steps: list[str]
    before: View
    after: View
    boots: set[str]

    several: bool = False  # whether it makes several changes, each of which is atomic

    def allows(self, view: View, where: str) -> None:
        """Assert that a crash may leave this: all is done or nothing, and the next boot is possible."""
        if self.several:
            for number, snapshot in view.snapshots.items():
                assert snapshot in (self.before.snapshots.get(number), self.after.snapshots.get(number)), where
            for path in self.before.var.keys() | self.after.var.keys() | view.var.keys():
                assert view.var.get(path) in (self.before.var.get(path), self.after.var.get(path)), where
            assert view.running in (self.before.running, self.after.running), where
            assert view.running == self.before.running or view.var == self.after.var, (
                where
            )  # the running files have their data
        else:
            assert view in (self.before, self.after), where
        assert view.boots in self.boots, where

    def fails_well(self, ended: Ended, view: View, where: str, *, broken: bool = False) -> bool:
        """Assert that a command on a full or broken disk loses nothing and, if it fails, says why.

        Returns:
            whether the command failed.
        """
        said = [line for line in ended.stderr.splitlines() if line.startswith("ash: ")]
        self.allows(view, where)
        if ended.returncode == DONE:
            assert view == self.after, where
            return False
        # A command that makes several changes continues with the others, and reports why one failed.
        told = said or [
            line for line in ended.stdout.splitlines() if re.match(r"not repaired: |snapshot \d+ failed: ", line)
        ]
        assert told, (where, ended)
        assert not re.search("Traceback|an error in ash itself", ended.stderr), where
        assert not any("Errno" in line for line in told), (where, told)
        assert broken or any(reason in line for line in told for reason in NO_SPACE), (where, told)
        unfinished = self.several or any("is not finished" in line for line in told)
        assert broken or view == self.before or unfinished, (where, told)
        return True

    def is_done(self, view: View, where: str) -> None:
        """Assert that the command has done everything."""
        assert (view, view.boots) == (self.after, self.after.boots), where


class Scene:
    """A disk on which each of COMMANDS has something to do, and copies of it.

    `fsck --repair` has a disk of its own, with much damage.

    Args:
        directory: on a file system that supports reflinks.
        image: a newly installed system.
    """

    def __init__(self, directory: Path, image: Path) -> None:
        self.directory = directory
        self._tried: dict[tuple[str, ...], Tried] = {}
        self.image = directory / "scene.img"
        program("cp", "--sparse=always", image, self.image)
        self.deb = make_deb(directory, "ash-test-cut", files=OF_DEB, postinst=IN_DEPLOYMENT)
        self.profile = directory / "profile"
        self.profile.write_text("[packages]\nash-test-cut\n[commands]\necho new > /etc/mark\n")
        disk = Disk(self.image)
        there = make_deb(directory, "ash-test-there", files={"usr/share/ash-test-there": "x\n"})
        disk.ash("base-update", "--shell", input=use_only("file:/home/archive"))
        disk.ash(
            "run",
            disk.clone(),
            "sh",
            "-ec",
            "echo old > /etc/mark; "
            "for home in /var/lib /home /root; do mkdir $home/mark; echo old > $home/mark/x; done",
        )
        disk.ash("install", 1, make_deb(directory, "ash-test-gone", files={"usr/share/ash-test-gone": "x\n"}))
        disk.ash("install", disk.branch(1), there)
        disk.ash(
            "run", 1, "sh", "-c", "sleep 1.1; echo late > /etc/drifted"
        )  # after the branch was created, by the history's clock
        disk.ash("-q", "clone", 1, "-d", "third")
        disk.ash("mutable", 3)
        disk.ash("deploy", 1)
        self._boot(disk)
        disk.ash("deploy", disk.clone(2))  # 4
        self._offer(disk)
        with disk.files() as files:
            menu = json.loads((files.state / "menu").read_text())
            self.booted: str = menu["last_booted"]
            self.waiting: str = menu["default"]
            (files.root(self.booted) / "etc/drifted").write_text("drifted\n")
            self.last_booted = f"1 {text(files.root(self.booted) / 'etc/mark')}"
        self._interrupt(disk.clone(1))
        self.known = directory / "known"
        ask(self.known, disk, ["fsck"], status=FAILED)
        with self.copy(RECOVER) as copy:
            self._before = self.look(copy)
        self.damaged = directory / "damaged.img"
        program("cp", "--reflink=always", self.image, self.damaged)
        with Disk(self.damaged).files() as files:
            damage(files)

    def _offer(self, disk: Disk) -> None:
        """Put a repository on the disk, with a newer version of its package, and the package of the profile."""
        archive = Archive(self.directory / "archive")
        for version in ("2", "3"):
            archive.add("ash-test-there", version, files={"usr/share/ash-test-there": f"{version}\n"})
        archive.add("less", "9999", files={"usr/mark": "of the archive\n"})
        shutil.copy(self.deb, archive.directory)
        archive.index()
        with disk.files() as files:
            shutil.copytree(archive.directory, files.home / "archive")
        disk.ash("refresh", 1)

    @staticmethod
    def _boot(disk: Disk) -> None:
        """Record that the deployment for the next boot was booted."""
        with disk.files() as files:
            menu = json.loads((files.state / "menu").read_text())
            booted = known_to_boot(menu, menu["default"]) | {"last_booted": menu["default"]}
            (files.state / "menu").write_text(json.dumps(booted))
        disk.ash("recover")

    def _interrupt(self, number: int) -> None:
        """Leave a change half done: committed, but not merged into /var."""
        words = ["run", str(number), *SHELL]
        with self.copy(words) as copy:
            names = self._steps_on(copy, words)
        exchanged = next(i for i, name in enumerate(names, 1) if name.startswith("exchange snapshot-"))
        self.run_on(self.image, words, kill=exchanged + 2)

    @contextlib.contextmanager
    def copy(self, words: Sequence[str]) -> Iterator[Path]:
        """A temporary copy of the disk for a command."""
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            copy = Path(directory, "disk.img")
            program("cp", "--reflink=always", self.damaged if words[0] in GOES_ON else self.image, copy)
            yield copy

    def argv(self, image: Path, words: Sequence[str], **options: Any) -> list[str]:
        """The command line that runs a command on an image, by run_with_hooks.py with these options."""
        options["booted"] = self._booted(words)
        words = [{"DEB": str(self.deb), "PROFILE": str(self.profile)}.get(word, word) for word in words]
        return [*RUN_WITH_HOOKS, json.dumps(options), "--image", str(image), *words]

    def run_on(self, image: Path, words: Sequence[str], **options: Any) -> Ended:
        """Run a command on an image, by run_with_hooks.py with these options."""
        argv = self.argv(image, words, **options)
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)

    def _steps_on(self, image: Path, words: Sequence[str], **options: Any) -> list[str]:
        """Run a command to its end; returns the names of its steps."""
        names = image.with_name("names")
        done = self.run_on(image, words, names=str(names), **options)
        assert done.returncode == DONE, done.stderr
        return names.read_text().splitlines()

    def _booted(self, words: Sequence[str]) -> str | None:
        """The slot that counts as booted, for commands of a running system; otherwise None."""
        if "bless" in words:
            return self.waiting
        return self.booted if {"carry", "rollback", "etc-update", "--live"} & {*words} else None

    def look(self, image: Path, cut: Sequence[str] = ()) -> View:
        """Recover as a user would, after the command `cut` crashed if one is given; returns the view."""
        go_on = GOES_ON.get(cut[0], RECOVER) if cut else RECOVER
        return look(Disk(image), self.known, go_on)

    def tried(self, words: Sequence[str]) -> Tried:
        """Run a command without a crash, if that was not done before; returns what it does."""
        known = tuple(words)
        if known not in self._tried:
            self._tried[known] = self._try(words)
        return self._tried[known]

    def _try(self, words: Sequence[str]) -> Tried:
        with self.copy(words) as copy:
            names = self._steps_on(copy, words)
            after = self.look(copy)
        before = after if words[0] in GOES_ON else self._before
        boots = {before.boots, after.boots, self.last_booted}
        several = " ".join(words).startswith(SEVERAL) or "--live" in words
        return Tried(names, before, after, boots, several)

    def check_kills(self, name: str, by: int | None = 1) -> int:
        """Kill a command at every `by` steps, or (None) at its middle and end, and check the result.

        Returns the number of kills.
        """
        tried = self.tried(COMMANDS[name])
        by = by or max(1, len(tried.steps) // 2)
        steps = range(by, len(tried.steps) + 1, by)
        for step in steps:
            tried.allows(self.killed(COMMANDS[name], step), f"before step {step}, {tried.steps[step - 1]}")
        return len(steps)

    def check_power_cuts(self, name: str, by: int = 1) -> int:
        """Cut the power at every step of a command (or every `by` steps), and after it.

        Returns how many different states of the disk that left.
        """
        tried = self.tried(COMMANDS[name])
        steps = ["after it", *tried.steps]
        states = 0
        for step, view in self.cut(COMMANDS[name], range(0, len(steps), by)):
            tried.allows(view, f"at step {step}, {steps[step]}")
            if step == 0 and name in DURABLE:
                tried.is_done(view, "the change is not on the disk")
            states += 1
        return states

    def killed(self, words: Sequence[str], step: int) -> View:
        """The view after the command was killed before a step and the system was recovered."""
        with self.copy(words) as copy:
            ended = self.run_on(copy, words, kill=step)
            assert ended.returncode == -signal.SIGKILL, (step, ended)
            return self.look(copy, words)

    def fails(self, name: str, steps: int, *, broken: bool) -> tuple[int, int]:
        """Let the disk fail before some steps of a command, and check that it says so and loses nothing.

        Args:
            name: which of COMMANDS.
            steps: at how many of its steps.
            broken: whether no write succeeds any more; otherwise the disk is full of data.

        Returns:
            how many times the command was tried, and how many times it failed.
        """
        words, failed = COMMANDS[name], 0
        tried = self.tried(words)
        wanted = range(1, len(tried.steps) + 1, max(1, len(tried.steps) // steps))
        for step in wanted:
            where = f"{name} before step {step}, {tried.steps[step - 1]}"
            ended, view = self._without_room(words, step, broken)
            failed += tried.fails_well(ended, view, where, broken=broken)
        return len(wanted), failed

    def fails_without_any_room(self, name: str) -> bool:
        """Run a command on a disk without a free block, and check that nothing is lost; returns whether it failed."""
        words = COMMANDS[name]
        tried = self.tried(words)
        with self._full(words) as full:
            ended = self.run_on(full, words)
            self._make_room(full)
            return tried.fails_well(ended, self.look(full, words), f"{name} on a full disk")

    def works_without_room(self, *names: str) -> None:
        """Assert that commands work on a disk without a free block."""
        after = {name: self.tried(COMMANDS[name]).after for name in names}
        with self._full() as full:
            for name in names:
                copy = full.with_name(f"{name}.img")
                program("cp", "--reflink=always", full, copy)
                ended = self.run_on(copy, COMMANDS[name])
                assert ended.returncode == DONE, (name, ended.stderr)
                assert not ended.stderr, (name, ended.stderr)
                self._make_room(copy)
                assert self.look(copy) == after[name], name
            ended = self.run_on(full, COMMANDS["clone"])
            assert os.strerror(errno.ENOSPC) in ended.stderr, ended  # the disk was really full

    @contextlib.contextmanager
    def _full(self, words: Sequence[str] = RECOVER) -> Iterator[Path]:
        """A copy of the disk without free space, neither for data nor for metadata."""
        with self.copy(words) as copy:
            with Disk(copy).files() as files:
                filler = files.top / FILLER.relative_to(PRIVATE / "top")
                fill(filler)
                number, size = 0, 16000
                while size:
                    try:
                        os.setxattr(filler, f"user.{number}", bytes(size))
                        number += 1
                    except OSError:
                        size //= 2
            yield copy

    @staticmethod
    def _make_room(image: Path) -> None:
        """Delete the file that fills a disk."""
        with Disk(image).files() as files:
            (files.top / FILLER.relative_to(PRIVATE / "top")).unlink(missing_ok=True)

    def _without_room(self, words: Sequence[str], step: int, broken: bool) -> tuple[Ended, View]:
        """Run a command on a disk that fails from a step on; returns its end, and the view when the disk works again."""
        with self.copy(words) as copy:
            # If the file system below the image has no free block, writes to the image fail.
            filler = self.directory / "filler" if broken else FILLER
            ended = self.run_on(copy, words, fill=step, filler=str(filler))
            if broken:
                filler.unlink(missing_ok=True)
            else:
                self._make_room(copy)
            return ended, self.look(copy, words)

    def cut(self, words: Sequence[str], wanted: Sequence[int]) -> Iterator[tuple[int, View]]:
        """Yield the view after a power cut before each of these steps; step 0 is right after the command.

        Steps at which nothing new has reached the disk are left out.
        """
        seen = set[bytes]()
        with self.copy(words) as copy, tempfile.TemporaryDirectory(dir=self.directory) as copies:
            with Disk(copy).files():  # otherwise ash would unmount it at its end, which writes everything
                self._steps_on(copy, words, copies=copies)
                program("cp", "--reflink=always", copy, Path(copies, "0.img"))
            for step in wanted:
                image = Path(copies, f"{step}.img")
                state = state_of_disk(image)
                if state not in seen:
                    is_whole(image)
                    yield step, self.look(image, words if step else ())
                    seen |= {state} if step else set()  # of step 0 more is expected
                image.unlink()


def state_of_disk(image: Path) -> bytes:
    """A digest of all before the root's partition, and of its first MiB.

    That has all that changes in place: GRUB's notes, and btrfs's superblock. What that does not name does not count.
    """
    digest = hashlib.sha256()
    with image.open("rb") as disk:
        at, end = 0, btrfs_partition(image)[0] + (1 << 20)
        while (at := os.lseek(disk.fileno(), at, os.SEEK_DATA)) < end:
            hole = min(end, os.lseek(disk.fileno(), at, os.SEEK_HOLE))
            digest.update(f"{at} {hole} ".encode() + os.pread(disk.fileno(), hole - at, at))
            at = hole
    return digest.digest()


def damage(files: Files) -> None:
    """Damage much of what `fsck --repair` repairs."""
    for path in (files.root(2), files.etc(4), files.boot(1)):
        program("btrfs", "subvolume", "delete", path)
    for path in (files.root(4), files.root(3), files.etc(1)):
        program("btrfs", "property", "set", "-ts", path, "ro", "false")
    (files.root(4) / "usr/mark").write_text("written\n")
    (files.etc(1) / "mark").write_text("edited in the copy\n")
    program("btrfs", "subvolume", "create", files.root(3) / "usr/nested")
    (files.root(3) / "usr/nested/mark").write_text("nested\n")
    (files.state / "snapshots/3-desc").unlink()
    for stray in ("rootfs/undo-4711", "etc/etc-4711", "rootfs/snapshot-4712"):
        program("btrfs", "subvolume", "create", files.snapshots / stray)
        (files.snapshots / stray / "mark").write_text(f"{stray}\n")
    (files.state / "last").write_text("0\n")
    (files.state / "ids").write_text("{")
    (files.state / "menu").write_text("torn")


def ask(known: Path, disk: Disk, *commands: Sequence[str], status: int = DONE) -> list[str]:
    """Run commands in one process; returns their output. The last must have this exit status."""
    lines = [json.dumps(["--image", str(disk.image), *words]) for words in commands]
    printed = program(*PYTHON, CHECKOUT / "tests/system/faults/run_many.py", known, *lines, status=status)
    return [] if status else list(map(str, json.loads(printed)))


def look(disk: Disk, known: Path, go_on: Sequence[str]) -> View:
    """Recover a disk, assert that nothing is left behind or damaged, and return the view.

    Args:
        disk: the disk.
        known: the cache file of run_many.py.
        go_on: the command that recovers.
    """
    rows = json.loads(ask(known, disk, go_on, ["fsck"], ["--json", "tree"])[-1])["tree"]
    with disk.files() as files:
        forgotten = [path for path in files.subvolumes() if re.search(r"-chr\d|-new-|/work/", path)]
        assert not forgotten, f"{disk.image.name}: {forgotten}"
        assert not [*files.snapshots.glob("rootfs/*/.ash-new"), *files.snapshots.glob("rootfs/view*")]
        left = {p.name for p in (files.state / "work").glob("*/*")} - {"lock", ".ash-new-intent"}
        assert not left, left
        menu = json.loads((files.state / "menu").read_text())
        default = menu["deployments"][disk.starts(files.grub_cfg.read_text())]
        secondary = [
            d for slot, d in menu["deployments"].items() if "secondary" in slot or slot == "deploy-aux-secondary"
        ]
        return View(
            snapshots={row["snapshot"]: (row, marks(files, row["snapshot"])) for row in map(without_boot, rows)},
            undo={path.name: text(path / "etc/mark") for path in sorted((files.snapshots / "rootfs").glob("undo-*"))},
            var={
                str(path.relative_to(files.top)): text(path)
                for path in (
                    *files.var.glob("*/mark*"),
                    *files.var.glob("lib/mark*/*"),
                    *files.home.glob("mark*/*"),
                    *files.state.glob("root/mark*/*"),
                )
            },
            secondary=[f"{d['snapshot']}" for d in secondary],
            running=[text(files.root(menu["last_booted"]) / path) for path in IN_RUNNING],
            lost_found={text(path) for path in (files.snapshots / "lost+found").glob("*/*/**/mark")}
            | {text(path) for path in (files.snapshots / "lost+found").glob("*/ash/*")},
            boots=f"{default['snapshot']} {text(files.root(default['slot']) / 'etc/mark')}",
        )


def without_boot(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the tree without the marks for deployments, which View.boots covers."""
    return {key: value for key, value in row.items() if key not in ("deployed", "booted")}


def marks(files: Files, number: int) -> list[str]:
    """The files of the tests in a snapshot and in its copies of /etc and /boot."""
    root = files.root(number)
    places = (
        root / "etc/mark",
        files.etc(number) / "mark",
        root / "boot/mark",
        files.boot(number) / "mark",
        root / "usr/mark",
    )
    packages = [text(root / f"usr/share/ash-test-{name}") for name in ("there", "gone")]
    return [*map(text, places), text(root / "etc/drifted"), *packages]


def text(path: Path) -> str:
    """A file's text; empty if it is missing."""
    return path.read_text() if path.is_file() else ""


def is_whole(image: Path) -> None:
    """The file system of a disk is sound, and GRUB itself can read the files that the boot menu uses."""
    start, size = next(p for p in partitions(image) if p[1] > 1 << 30)
    with image.open("rb+") as disk:
        loop = open_new_loop(disk.fileno(), image, start, size)  # it disappears with this process, however that ends
    try:
        program("btrfs", "check", "--readonly", os.readlink(f"/proc/self/fd/{loop}"))
    finally:
        os.close(loop)
    menu = grub(image, "cat", f"/{BOOT}/grub/grub.cfg")
    named = {word for line in re.findall(r"^ *(?:linux|initrd) (.*)$", menu, re.MULTILINE) for word in line.split()}
    files = [word for word in named if word.startswith("/")]
    assert len(files) >= 2
    for path in files:
        assert re.fullmatch(r"[0-9a-f]{8}", grub(image, "crc", path).strip()), path


def grub(image: Path, command: str, path: str) -> str:
    """Read a file from a disk with GRUB's own btrfs code."""
    return program("grub-fstest", image, "--root=loop0,gpt3", command, f"(loop0,gpt3){path}")


def partitions(image: Path) -> list[tuple[int, int]]:
    """The start and size of each partition of an image, in bytes."""
    table = json.loads(program("sfdisk", "--json", image))["partitiontable"]["partitions"]
    return [(p["start"] * 512, p["size"] * 512) for p in table]
