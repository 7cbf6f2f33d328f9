# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the tests work with: a disk with a system that ash manages, packages, a terminal."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

CHECKOUT = Path(__file__).resolve().parent.parent
# Where Python caches the bytecode of what our programs import, instead of in the checkout. Compiling ash.py takes three
# times as long as running a short command.
COMPILED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ash-tests/compiled"
PYTHON = [sys.executable, "-I", "-X", f"pycache_prefix={COMPILED}"]
ASH = [*PYTHON, str(CHECKOUT / "tests/start_ash.py")]
RUN_WITH_HOOKS = [*PYTHON, str(CHECKOUT / "tests/system/faults/run_with_hooks.py")]
RUN_AND_KILL = [*PYTHON, str(CHECKOUT / "tests/system/faults/run_and_kill.py")]
# The distribution under test, and the subvolumes that it has on a disk.
DISTRIBUTION = os.environ.get("ASH_TEST_DISTRIBUTION", "debian")
SNAPSHOTS, BOOT, VAR, HOME = (f"@{name}_{DISTRIBUTION}" for name in (".snapshots", "boot", "var", "home"))
# Exit statuses, from the command reference.
DONE, FAILED, USAGE, MISSING, LOCKED, REFUSED, OURS_IN_RUN = 0, 1, 2, 3, 4, 5, 125
SECONDS = 300


def program(*argv: str | Path, status: int = 0, input: str | None = None) -> str:
    """Run a program of the host, assert its exit status, and return its output."""
    ended = subprocess.run(argv, input=input, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == status, f"{argv}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@dataclass(frozen=True)
class Outcome:
    """The exit status and output of a program."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The answer of --json, parsed."""
        answer: dict[str, Any] = json.loads(self.stdout)
        assert answer["version"] == 1
        return answer

    @property
    def error(self) -> str:
        """The error message, which must be exactly one line from ash."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("ash: ")]
        assert len(lines) == 1, self.stderr
        assert not re.search("Traceback|an error in ash itself", self.stderr), self.stderr
        return lines[0]


class Files:
    """The mounted file system of a disk: the paths of what ash keeps on it."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.snapshots = top / SNAPSHOTS
        self.var = top / VAR
        self.home = top / HOME
        self.state = self.snapshots / "ash"
        self.grub_cfg = top / BOOT / "grub/grub.cfg"

    def root(self, which: int | str) -> Path:
        return self.snapshots / "rootfs" / f"snapshot-{which}"

    def etc(self, which: int | str) -> Path:
        return self.snapshots / "etc" / f"etc-{which}"

    def boot(self, which: int | str) -> Path:
        return self.snapshots / "boot" / f"boot-{which}"

    def undo(self, snapshot: int) -> Path:
        return self.snapshots / "rootfs" / f"undo-{snapshot}"

    def subvolumes(self) -> set[str]:
        """The paths of all subvolumes, from the top level."""
        listing = program("btrfs", "subvolume", "list", self.top)
        return {line.split(" path ", 1)[1] for line in listing.splitlines()}

    def writable(self) -> set[str]:
        """The paths of the subvolumes that are not read-only."""
        readonly = program("btrfs", "subvolume", "list", "-r", self.top)
        return self.subvolumes() - {line.split(" path ", 1)[1] for line in readonly.splitlines()}

    def tree(self) -> set[int]:
        """The snapshot numbers in the tree file."""
        return set(map(int, re.findall(r'"name": (\d+)', (self.state / "fstree").read_text())))

    def default_slot(self) -> str:
        """The slot of the first menu entry, which is booted by default."""
        slot = re.search(r"^ *linux \S*/rootfs/snapshot-([a-z-]+)/boot/", self.grub_cfg.read_text(), re.MULTILINE)
        assert slot
        return slot[1]

    def in_root(self, which: int | str, *argv: str, status: int = 0) -> str:
        """Run a program chrooted into a read-only snapshot, with the shared /var mounted."""
        root = self.root(which)
        script = 'mount --bind "$1" "$1/var" -o ro 2>/dev/null; mount --bind "$2" "$1/var"; root=$1; shift 2; '
        script += 'mount -t proc proc "$root/proc"; mount -t tmpfs tmp "$root/tmp"; exec chroot "$root" "$@"'
        return program("unshare", "--mount", "sh", "-c", script, "sh", root, self.var, *argv, status=status)


def init(*words: str | Path, status: int = DONE) -> Outcome:
    """Run the installer, and assert its exit status."""
    argv = [sys.executable, CHECKOUT / "init.py", *words]
    ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ended.returncode == status, (words, ended)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


EFI_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
# An entry of grub.cfg: its id and its commands.
ENTRY = r"^menuentry [^\n]* --id (\S+) [^\n]*\{\n(.*?)^\}"
NOTES = f"::/ash/{DISTRIBUTION}/grubenv"


class Started(NamedTuple):
    """What GRUB starts: a slot, with the kernel's options."""

    slot: str
    options: Sequence[str]


class Disk:
    """A disk image with a system that ash manages; each call of ash is a process of its own."""

    def __init__(self, image: Path) -> None:
        self.image = image

    def _argv(self, words: Sequence[str | int | Path]) -> list[str]:
        return [*ASH, "--image", str(self.image), *map(str, words)]

    def ash(
        self,
        *words: str | int | Path,
        status: int = DONE,
        input: str = "",
        environment: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
    ) -> Outcome:
        """Run ash on the image and assert its exit status."""
        ended = subprocess.run(
            self._argv(words),
            input=input,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **(environment or {})},
            check=False,
        )
        outcome = Outcome(ended.returncode, ended.stdout, ended.stderr)
        assert outcome.status == status, f"ash {words} ended with {outcome.status}, not {status}:\n{outcome}"
        return outcome

    def start(self, *words: str | int | Path, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start ash on the image in the background; its output goes to the log."""
        with (log or Path(os.devnull)).open("wb") as output:
            return subprocess.Popen(
                self._argv(words), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def terminal(self, *words: str | int | Path) -> "Terminal":
        """Start ash on the image, on a new terminal."""
        return Terminal(self._argv(words))

    def clone(self, of: int = 0) -> int:
        """Clone a snapshot; returns the new number."""
        return int(self.ash("-q", "clone", of).stdout)

    def branch(self, of: int) -> int:
        """Branch from a snapshot; returns the new number."""
        return int(self.ash("-q", "branch", of).stdout)

    def shell(self, snapshot: int, script: str, **options: Any) -> Outcome:
        """Run a shell script in a transaction."""
        return self.ash("run", snapshot, "sh", "-ec", script, **options)

    def attached(self) -> str:
        """The loop devices of the image; empty if nothing on this machine has it mounted."""
        return program("losetup", "--noheadings", "--list", "--output", "NAME", "--associated", self.image).strip()

    @contextlib.contextmanager
    def files(self) -> Iterator[Files]:
        """Mount the image's file system for the block; ash may work on it at the same time."""
        start, size = _root_partition(self.image)
        where = ["--offset", str(start), "--sizelimit", str(size)]
        loop = program("losetup", "--nooverlap", "--find", "--show", *where, self.image).strip()
        with contextlib.ExitStack() as stack:
            # A loop device that is detached while in use disappears with its last mount.
            stack.callback(program, "losetup", "--detach", loop)
            top = stack.enter_context(tempfile.TemporaryDirectory(prefix="ash-test-"))
            program("mount", "-t", "btrfs", "-o", "subvolid=5", loop, top)
            stack.callback(program, "umount", top)
            yield Files(Path(top))

    @property
    def drive(self) -> str:
        """The name of the EFI partition for mtools."""
        return f"{self.image}@@{_partition(self.image, EFI_TYPE)[0]}"

    def notes(self) -> dict[str, str]:
        """GRUB's notes on the EFI partition, where GRUB itself finds them."""
        with tempfile.TemporaryDirectory() as directory:
            program("mcopy", "-i", self.drive, NOTES, f"{directory}/grubenv")
            listing = program("grub-editenv", f"{directory}/grubenv", "list")
        return dict(line.split("=", 1) for line in listing.splitlines())

    def write_notes(self, block: bytes | None) -> None:
        """Replace the block with GRUB's notes, or delete it."""
        if block is None:
            program("mdel", "-i", self.drive, NOTES)
            return
        with tempfile.NamedTemporaryFile() as file:
            file.write(block)
            file.flush()
            program("mcopy", "-o", "-i", self.drive, file.name, NOTES)

    def grub(self, grub_cfg: str, *, spend: bool = False, rescue: bool = False) -> Started:
        """What GRUB itself, as a program, starts from a menu by itself; with `spend` its notes stay as it leaves them.

        It runs on a copy of the EFI partition. With `rescue` the menu is opened as the submenu of that name does.
        """
        start, entries = grub_cfg.index("\nmenuentry "), re.findall(ENTRY, grub_cfg, re.MULTILINE | re.DOTALL)
        choices = [f'if [ "$default" = "{ident}" ]; then\n{commands}fi' for ident, commands in entries]
        show = 'function linux { for word in "$@"; do echo -n "<$word>"; done; }\nfunction initrd { true; }'
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            _copy_data(self.image, *_partition(self.image, EFI_TYPE), directory / "efi.img")
            (directory / "map").write_text(f"(hd0) {directory}/efi.img\n")
            text = [*(["set ash_rescue=1"] if rescue else []), grub_cfg[:start], show, *choices, "exit", ""]
            (directory / "grub.cfg").write_text("\n".join(text))
            output = program("grub-emu", "-d", directory, "-m", directory / "map", "-r", "host", input="")
            if spend:
                program("mcopy", "-n", "-i", directory / "efi.img", NOTES, directory / "grubenv")
                self.write_notes((directory / "grubenv").read_bytes())
        kernel, *options = re.findall("<(.*?)>", re.sub(r"\s", "", output))  # which has line breaks at 80 columns
        slot = re.search(r"/rootfs/snapshot-([a-z-]+)/boot/", kernel)
        assert slot, output
        return Started(slot[1], options)

    def starts(self, grub_cfg: str) -> str:
        """The slot that GRUB starts by itself."""
        return self.grub(grub_cfg).slot

    def outside_of_btrfs(self) -> bytes:
        """The bytes outside of the root partition: partition table, boot loader, EFI partition."""
        start, size = _root_partition(self.image)
        with self.image.open("rb") as image:
            before = image.read(start)
            image.seek(start + size)
            return before + image.read()


def _partition(image: Path, kind: str) -> tuple[int, int]:
    """The start and size of the partition of a type on a GPT image, in bytes."""
    table = json.loads(program("sfdisk", "--json", image))["partitiontable"]["partitions"]
    there = next(p for p in table if p["type"] == kind)
    return there["start"] * 512, there["size"] * 512


def _root_partition(image: Path) -> tuple[int, int]:
    return _partition(image, "0FC63DAF-8483-4772-8E79-3D69D8477DE4")


def _copy_data(image: Path, start: int, size: int, target: Path) -> None:
    """Copy a part of an image to a sparse file."""
    with image.open("rb") as disk, target.open("wb") as copy:
        copy.truncate(size)
        at = start
        with contextlib.suppress(OSError):  # no more data
            while (at := os.lseek(disk.fileno(), at, os.SEEK_DATA)) < start + size:
                end = min(os.lseek(disk.fileno(), at, os.SEEK_HOLE), start + size)
                os.pwrite(copy.fileno(), os.pread(disk.fileno(), end - at, at), at - start)
                at = end


class Terminal:
    """A program on a pseudo-terminal, typed into as a person would; a context manager.

    Args:
        argv: the program and its arguments.
        size: lines and columns; unknown by default, as on a serial line.
    """

    def __init__(self, argv: Sequence[str], size: tuple[int, int] = (0, 0)) -> None:
        self._argv = argv
        self._size = size
        self._text = ""

    def __enter__(self) -> Self:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, self._size)
        # setsid makes it the controlling terminal, so that closing it sends SIGHUP.
        argv = ["setsid", "--ctty", *self._argv]
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.wait()

    def type(self, text: str) -> None:
        """Type something; a newline is the Enter key."""
        self.type_bytes(text.encode())

    def type_bytes(self, keys: bytes) -> None:
        """Type something that need not be text."""
        os.write(self._master, keys)

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Wait for output that matches; returns the output up to the end of the match."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self._text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self._text!r}"
            if select.select([self._master], [], [], 0.5)[0]:
                try:
                    self._text += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # EIO: every process has closed the terminal
                    assert re.search(pattern, self._text), f"it ended without {pattern!r}: {self._text!r}"
        found = self._text[: match.end()]
        self._text = self._text[match.end() :]
        return found

    def hang_up(self) -> None:
        """Close the terminal, like a lost connection."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def wait(self, seconds: float = 60) -> int:
        """Wait for the program to exit; returns its exit status."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def make_deb(
    directory: Path,
    name: str,
    version: str = "1",
    *,
    architecture: str = "all",
    depends: str = "",
    conflicts: str = "",
    files: Mapping[str, str] | None = None,
    **scripts: str,
) -> Path:
    """Build a Debian package and return its file. Maintainer scripts, in sh, are passed as postinst=, prerm= and so on."""
    source = directory / f"{name}_{version}_{architecture}"
    control = source / "DEBIAN"
    control.mkdir(parents=True)
    fields = f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\n"
    fields += "Maintainer: Nobody <nobody@localhost>\n"
    fields += f"Depends: {depends}\n" if depends else ""
    fields += f"Conflicts: {conflicts}\n" if conflicts else ""
    (control / "control").write_text(f"{fields}Description: built by a test\n")
    for script, text in scripts.items():
        (control / script).write_text(f"#!/bin/sh\nset -e\n{text}\n")
        (control / script).chmod(0o755)
    for path, text in (files or {}).items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    package = directory / f"{source.name}.deb"
    program("dpkg-deb", "--build", "--root-owner-group", "-Znone", source, package)
    return package


def processes_with(marker: str) -> list[int]:
    """The processes whose command lines contain a text, by pid."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_until(holds: Any, seconds: float = 30) -> None:
    """Wait until a function returns a true value."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


def kill_hard(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a process, and wait for it to exit."""
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)


def fill(filler: Path) -> None:
    """Use up the free data space of a file system."""
    with filler.open("xb") as file:
        size, piece = 0, 1 << 36
        while piece >= 4096:
            try:
                os.posix_fallocate(file.fileno(), size, piece)
                size += piece
            except OSError:
                piece //= 2
