# SPDX-License-Identifier: AGPL-3.0-or-later
"""A system on a mounted disk image: tests inspect its state while ash works on it."""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from ash import ACCOUNT_FILES, RECOVER_UNIT, btrfs_partition, load_distro
from installer import executable
from tests.support import (
    CHECKOUT,
    DISTRIBUTION,
    DONE,
    PYTHON,
    RUN_AND_KILL,
    RUN_WITH_HOOKS,
    SNAPSHOTS,
    Disk,
    Files,
    Outcome,
    program,
    wait_until,
)

# A fingerprint of a file: mode, owner, size, inode and ctime. Any write changes it.
Facts = tuple[int, int, int, int, int, int]


def facts(status: os.stat_result) -> Facts:
    """The fingerprint of a file."""
    return (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_ino, status.st_ctime_ns)


def statuses_below(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The files and directories below a directory: their paths from it and what lstat() returns."""
    # Without Path objects: is_sound() looks at a hundred thousand files.
    waiting, start = [str(directory)], len(str(directory)) + 1
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                yield entry.path[start:], status
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(entry.path)


def everything_below(directory: Path) -> dict[str, Facts]:
    """The fingerprints of a directory and of everything below it."""
    return {".": facts(directory.lstat())} | {path: facts(status) for path, status in statuses_below(directory)}


@dataclass(frozen=True)
class State:
    """What a command that changes nothing must leave untouched."""

    subvolumes: dict[str, int]  # ids by path
    readonly: set[str]
    var: dict[str, Facts]
    home: dict[str, Facts]
    boot: dict[str, Facts]
    small_files: dict[str, str]  # of ash, except locks and the history
    mounts: list[str]
    loops: str
    processes: list[int]


class System(Disk):
    """A disk whose file system is mounted, so that tests can inspect it.

    Args:
        image: the disk image.
        files: its file system, mounted.
    """

    files: Files  # type: ignore[assignment]

    def __init__(self, image: Path, files: Files) -> None:
        super().__init__(image)
        self.files = files
        self.home = files.home

    # What is there

    def root(self, which: int | str) -> Path:
        return self.files.root(which)

    def subvolumes(self) -> dict[str, int]:
        """The subvolume ids by path from the top level."""
        listing = program("btrfs", "subvolume", "list", self.files.top)
        return {line.split(" path ", 1)[1]: int(line.split()[1]) for line in listing.splitlines()}

    def id_of(self, which: int | str) -> int:
        """The subvolume id of a snapshot or slot."""
        return self.subvolumes()[f"{SNAPSHOTS}/rootfs/snapshot-{which}"]

    def mounts(self) -> list[str]:
        """The mounts of this file system in this process's mount namespace, without the name of the device.

        Btrfs has one name for a device, that by which any process mounted or scanned it last.
        """
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        ours = [line for line in lines if line[2] == self._device()]
        return sorted(" ".join(line[2:-2] + line[-1:]) for line in ours)

    def _device(self) -> str:
        """The device number of this file system in mountinfo."""
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return next(line[2] for line in lines if line[4] == str(self.files.top))

    def processes(self) -> list[int]:
        """The processes in other mount namespaces that have this file system mounted."""
        found, ours, device = [], os.readlink("/proc/self/ns/mnt"), self._device()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                # While the process mounts or unmounts something, a line may be cut short.
                lines = (process / "mountinfo").read_text(errors="replace").splitlines()
                mounted = {words[2] for words in map(str.split, lines) if len(words) > 2}
                if os.readlink(process / "ns/mnt") != ours and device in mounted:
                    found.append(int(process.name))
        return sorted(found)

    def small_files(self) -> dict[str, str]:
        """The contents of ash's own files, except locks and the history."""
        state = self.files.state
        paths = [p for p in state.rglob("*") if p.is_file() and p.name not in ("lock", "history", "ash")]
        paths = [p for p in paths if p.relative_to(state).parts[0] not in ("lib", "root")]
        return {str(p.relative_to(state)): p.read_text(errors="replace") for p in paths}

    def state(self) -> State:
        """The state to compare before and after."""
        subvolumes = self.subvolumes()
        return State(
            subvolumes=subvolumes,
            readonly=set(subvolumes) - self.files.writable(),
            var=everything_below(self.files.var),
            home={name: known for name, known in everything_below(self.home).items() if name != "."},
            boot=everything_below(self.files.grub_cfg.parent),
            small_files=self.small_files(),
            mounts=self.mounts(),
            loops=self.attached(),
            processes=self.processes(),
        )

    @contextlib.contextmanager
    def nothing_changes(self, but: str = "/") -> Iterator[None]:
        """Assert that the block leaves no change, except below the path `but` in /var or /home."""
        before = self.state()
        yield
        wait_until(lambda: set(self.processes()) <= set(before.processes))
        after = self.state()
        for name in State.__dataclass_fields__:
            was, now = getattr(before, name), getattr(after, name)
            if isinstance(was, dict):
                was, now = (
                    {(path, what) for path, what in of.items() if not path.startswith(but)} for of in (was, now)
                )
            difference = (was ^ now) if isinstance(was, set) else (was, now)
            assert was == now, f"{name}: {sorted(map(str, difference))[:20]}"

    def remains(self) -> set[str]:
        """What an unfinished change has left behind: working copies, half-made deployments, intents, overlays."""
        listed = {path.rpartition("/")[2]: path for path in self.subvolumes() if "/lost+found/" not in path}
        odd = {path for name, path in listed.items() if re.search(r"-chr\d+$|-new-|/work/|/deleted-", f"{path}/{name}")}
        files = {str(p.relative_to(self.files.state)) for p in (self.files.state / "work").glob("*/*")}
        # The temporary file of a killed ash is overwritten by the next one.
        return odd | {name for name in files if not name.endswith(("/lock", "/.ash-new-intent"))}

    def is_sound(self) -> None:
        """Assert that all snapshots of the tree are complete and nothing else is there. No ash may be running."""
        tree, manager = self.files.tree(), load_distro(DISTRIBUTION).package_manager
        subvolumes, writable = set(self.subvolumes()), self.files.writable()
        of_tree = set()
        for number in tree:
            parts = {f"rootfs/snapshot-{number}", f"etc/etc-{number}", f"boot/boot-{number}"}
            of_tree |= {f"{SNAPSHOTS}/{part}" for part in parts}
            assert (self.files.state / f"snapshots/{number}-desc").is_file(), f"{number} has no description"
            recorded = json.loads((self.files.state / f"packages/{number}").read_text())
            installed = manager.installed(self.root(number))
            assert recorded == installed, f"the list of packages of {number} is not that of its database"
        assert of_tree <= subvolumes, f"missing: {of_tree - subvolumes}"
        assert not of_tree & writable, f"writable: {of_tree & writable}"
        numbered = {p for p in subvolumes if re.search(r"-\d+$", p) and "/lost+found/" not in p}
        undo = {f"{SNAPSHOTS}/rootfs/undo-{n}" for n in tree}
        assert numbered <= of_tree | undo, f"of no snapshot: {numbered - of_tree - undo}"
        left, seen = self.remains(), self.wants_recovery()
        assert bool(left) == bool(seen), f"left is {left}, and ash recover would run at the next start for {seen}"
        last = int((self.files.state / "last").read_text())
        assert last >= max(tree), "a number could be given twice"
        for number in tree:
            root = self.root(number)
            for directory, copy in (("etc", self.files.etc(number)), ("boot", self.files.boot(number))):
                assert names_below(root / directory) == names_below(copy), f"{copy.name} is not {directory} of {number}"

    def wants_recovery(self) -> list[str]:
        """The paths because of which ash-recover.service would run at the next boot."""
        patterns = re.findall(r"^ConditionPathExistsGlob=\|/.snapshots/(.*)", RECOVER_UNIT, re.MULTILINE)
        # Like glob(3), and unlike Path.glob(), this skips hidden files.
        return [path for pattern in patterns for path in glob(pattern, root_dir=self.files.snapshots)]  # noqa: PTH207

    def boots(self) -> str:
        """Assert that every menu entry can boot; returns the slot that GRUB starts by itself."""
        slots = re.findall(r"linux (/\S+) root=UUID=\S+ rootflags=subvol=(\S+)", self.files.grub_cfg.read_text())
        assert slots, "the menu is empty"
        for kernel, subvolume in slots:
            root = self.files.top / subvolume
            slot = root.name.removeprefix("snapshot-")
            assert (self.files.top / kernel.lstrip("/")).stat().st_size > 1 << 20, kernel
            fstab = (root / "etc/fstab").read_text()
            assert f"subvol={SNAPSHOTS}/rootfs/snapshot-{slot}," in fstab
            assert f"/.snapshots/rootfs/snapshot-{slot}/etc /etc none bind" in fstab
            assert f"{SNAPSHOTS}/etc/etc-{slot}" in self.subvolumes()
            assert (root / "usr/share/ash/snap").read_text().strip().isdecimal()
        for initrd in re.findall(r"^ *initrd (\S+)$", self.files.grub_cfg.read_text(), re.MULTILINE):
            assert (self.files.top / initrd.lstrip("/")).stat().st_size > 1 << 20, initrd
        titles = re.findall(r"^menuentry '[^\n]*?, snapshot (\d+):", self.files.grub_cfg.read_text(), re.MULTILINE)
        holds = [(self.files.top / subvolume / "usr/share/ash/snap").read_text().strip() for _, subvolume in slots]
        assert titles == holds, "the menu names other snapshots than its slots hold"
        return self.starts(self.files.grub_cfg.read_text())

    # What is done to it

    @contextlib.contextmanager
    def at_work(self, snapshot: int, script: str, status: int = DONE, after: str = "") -> Iterator["AtWork"]:
        """A transaction that runs a script and then waits for the end of the block.

        Args:
            snapshot: its number.
            script: what it runs before the block.
            status: the exit status that ash must have.
            after: what it runs after the block.
        """
        mark = uuid.uuid4().hex
        started, go = f"started-{mark}", f"go-{mark}"  # in the working copy, which the test sees, too
        wait = f"touch /{started}; while [ ! -e /{go} ]; do sleep 0.02; done; rm /{started} /{go}"
        working_copy = self.root(f"chr{snapshot}")
        argv = self._argv(["run", snapshot, "sh", "-ec", f"{script}\n{wait}\n{after}"])
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        work = AtWork(process, mark)
        try:
            wait_until(lambda: (working_copy / started).exists() or process.poll() is not None)
            assert process.poll() is None, process.communicate()
            yield work
            (working_copy / go).touch()
            out, err = process.communicate(timeout=120)
            work.outcome = Outcome(process.returncode, out, err)
            assert process.returncode == status, work.outcome
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def killed_before(self, step: str, *words: str | int) -> None:
        """Kill a command before its first step whose name starts like this."""
        killed = self.with_hooks({"kill": step}, *words)
        assert killed.returncode == -signal.SIGKILL, killed.stderr

    def killed_at(self, step: int, *words: str | int) -> subprocess.CompletedProcess[str]:
        """Run ash and kill it with SIGKILL before its N-th change on the disk (the first is 1).

        It exits by itself if it makes fewer changes.
        """
        argv = [*RUN_AND_KILL, str(step)]
        words = ("--image", str(self.image), *words)
        return subprocess.run(
            [*argv, *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def with_hooks(self, options: dict[str, Any], *words: str | int) -> subprocess.CompletedProcess[str]:
        """Run ash by run_with_hooks.py with these options."""
        argv = [*RUN_WITH_HOOKS, json.dumps(options)]
        argv += ["--image", str(self.image), *map(str, words)]
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)

    def each_step_of(self, *words: str | int, by: int = 1) -> Iterator[int]:
        """Run a command again and again, killed at its first step, then at the next, until it runs to its end."""
        for step in range(1, 300, by):
            ended = self.killed_at(step, *words)
            if ended.returncode != -signal.SIGKILL:
                assert ended.returncode == DONE, ended.stderr
                return
            wait_until(lambda: not self.processes())
            yield step
        raise AssertionError("it never runs to its end")


@dataclass
class AtWork:
    """A running transaction; `outcome` is set when it has ended."""

    process: subprocess.Popen[str]
    mark: str
    outcome: Outcome | None = None

    @property
    def ended(self) -> Outcome:
        assert self.outcome is not None
        return self.outcome


def names_below(directory: Path) -> dict[str, tuple[int, int, int, int]]:
    """The files below a directory, with mode, owner and size."""
    found = {}
    for path, status in statuses_below(directory):
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[path] = (status.st_mode, status.st_uid, status.st_gid, size)
    return found


def installed_ash(files: Files, directory: Path) -> Path:
    """Install ash into a directory: the executable, and a system's libraries beside it."""
    own = directory / "ash"
    own.write_text(executable.build(DISTRIBUTION))
    own.chmod(0o755)
    shutil.copytree(files.state / "lib", directory / "lib", symlinks=True)
    return own


@contextlib.contextmanager
def open_system(image: Path, directory: Path) -> Iterator[System]:
    """A system on a copy of a disk image. The copy is deleted afterwards, and must not stay mounted."""
    copy, top = directory / "disk.img", directory / "top"
    program("cp", "--sparse=always", "--reflink=auto", image, copy)
    top.mkdir()
    start, size = btrfs_partition(copy)
    program("mount", "-t", "btrfs", "-o", f"loop,offset={start},sizelimit={size},subvolid=5,compress=zstd", copy, top)
    try:
        yield System(copy, Files(top))
    finally:
        program("umount", top)
    wait_until(lambda: not Disk(copy).attached())
    copy.unlink()


# Run ash as if the slot in the first argument were booted on this machine.
AS_BOOTED = """\
import sys
sys.path.insert(0, sys.argv[1])
import ash
slot = sys.argv[2]
ash.System.booted_slot = property(lambda self: slot)
sys.argv[1:] = sys.argv[3:]
sys.exit(ash.main())
"""


def known_to_boot(menu: dict[str, Any], slot: str) -> dict[str, Any]:
    """The menu file after `ash bless` in a slot, whose deployment may have been on trial."""
    deployment = menu["deployments"][slot]
    if not deployment["tries"]:
        return menu
    return {**menu, "good": slot, "deployments": {**menu["deployments"], slot: {**deployment, "tries": 0}}}


class Machine:
    """A system with a booted deployment, as far as ash's own state says so."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.files = system.files
        self._menu = system.files.state / "menu"

    def boot(self) -> str:
        """Record that the deployment for the next boot was booted; returns its slot."""
        menu = json.loads(self._menu.read_text())
        self._menu.write_text(json.dumps(known_to_boot(menu, menu["default"]) | {"last_booted": menu["default"]}))
        self.system.ash("recover")
        return self.slot

    @property
    def slot(self) -> str:
        last: str = json.loads(self._menu.read_text())["last_booted"]
        return last

    @property
    def etc(self) -> Path:
        """The running /etc."""
        return self.system.root(self.slot) / "etc"

    def forget_people(self) -> None:
        """Delete the people of other tests from the running system."""
        for name in ACCOUNT_FILES:
            if (base := self.files.etc(self.slot) / name).exists():
                shutil.copyfile(base, self.etc / name)

    def deploy(self, snapshot: int, *options: str) -> dict[str, Any]:
        """Deploy; returns ash's answer."""
        return self.system.ash("--json", "deploy", snapshot, *options).json

    @property
    def next_etc(self) -> Path:
        """The /etc of the deployment for the next boot."""
        return self.system.root(self.system.files.default_slot()) / "etc"

    def running(self, *words: str | int | Path, status: int = DONE) -> dict[str, Any]:
        """Run ash as on the running system; returns its JSON answer."""
        return self.run("--json", *words, status=status).json

    def run(self, *words: str | int | Path, status: int = DONE, patch: str = "") -> Outcome:
        """Run ash as on the running system, and assert its exit status. `patch` is Python code to execute first."""
        script = AS_BOOTED.replace("sys.exit", f"{patch}\nsys.exit")
        words = ("-c", script, CHECKOUT, self.slot, "--image", self.system.image, *words)
        argv = [*PYTHON, *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == status, done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    def aside(self, answer: dict[str, Any]) -> Path:
        """The directory with the running versions of files in conflict."""
        directory: Path = self.files.var / answer["conflicts_folder"].removeprefix("/var/")
        assert directory.parent.stat().st_mode & 0o777 == 0o700
        return directory / "etc"
