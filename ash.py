#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""ash: keeps a Linux system as a tree of read-only btrfs snapshots.

A change is made in a private copy of a snapshot, with the distribution's own package manager, and takes effect
whole or not at all. `ash deploy` makes a snapshot bootable; what ran before stays in the boot menu.

This file is the core. It knows btrfs, transactions and booting, and nothing about packages: that is in
`distros/<id>/ashpk.py`, which the installer appends to it, so that one text file is the whole program.

Reading order: helpers, files and the layout on disk; records, locks, the tree; btrfs; package managers, the init
system, kernels and boot tools; the chroot, accounts, the merges of /var and /etc, transactions; the boot menu,
deployments, the system; then the command frame and the commands. docs/development.md maps concepts to sections.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import json
import operator
import os
import re
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import UnionType

# typing and its NamedTuple, which generates and compiles code for each class, would take a fifth of a short command.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any, BinaryIO, ClassVar, NamedTuple, NoReturn, Protocol, Self, TypeVar

    from anytree import AnyNode

    CommandFunction = TypeVar("CommandFunction", bound=Callable[..., "Reply | Plan"])
    Result = TypeVar("Result")
else:
    Protocol = object

    class NamedTuple(tuple):
        """typing.NamedTuple at run time: the same, without the code that is generated and compiled for each class."""

        def __init_subclass__(cls):
            if NamedTuple in cls.__bases__:
                names = vars(cls).get("__annotations__", ())
                cls._fields = cls.__match_args__ = tuple(names)
                cls._field_defaults = {name: vars(cls)[name] for name in names if name in vars(cls)}
                for index, name in enumerate(names):
                    setattr(cls, name, property(operator.itemgetter(index)))

        def __new__(cls, *values, **named):
            missing = cls._fields[len(values) :]
            given = {**cls._field_defaults, **named}
            if len(values) > len(cls._fields) or not named.keys() <= {*missing} <= given.keys():
                raise TypeError(f"{cls.__name__} takes {', '.join(cls._fields)}")
            return super().__new__(cls, (*values, *(given[name] for name in missing)))

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **named):
            return type(self)(**{**self._asdict(), **named})


# Distro modules say `from ash import ...`, both imported from a checkout and concatenated with this file.
sys.modules["ash"] = sys.modules[__name__]

ASH_VERSION = "0.1.0"
HERE = Path(__file__).resolve().parent

# anytree and tabulate as they were installed with ash: a snapshot without them must not stop it.
if (HERE / "lib").is_dir():
    sys.path.insert(0, str(HERE / "lib"))


# --- Errors, console, external programs ------------------------------------------------------------------------

JSON_VERSION = 1
FAILED, USAGE, MISSING, LOCKED, REFUSED = 1, 2, 3, 4, 5
OUR_FAILURE_IN_RUN = 125  # as in chroot(1) and env(1): all other statuses are the command's own
SLOTS = ("deploy", "deploy-aux", "deploy-spare")
SECONDARY_SLOTS = ("deploy-secondary", "deploy-aux-secondary")
BASE = 0
# No transaction starts with less free space. 256 MiB covers btrfs's own global reserve (up to 512 MiB on large
# disks) and a kernel with its initramfs.
SPACE_FLOOR = 256 << 20
FREES_SPACE = "ash del N frees what a snapshot holds"
# The emergency reserve, released to delete on a full disk: room for a few small files, and metadata, of which btrfs
# reserves a megabyte or two per operation. Extended attributes occupy metadata; each fits a node of 16 KiB.
RESERVE, RESERVE_OF_TREES, ATTRIBUTE = 4 << 20, 16 << 20, 16000


class AshError(Exception):
    """An error for the user: what is wrong, what to do about it unless that is obvious, and ash's exit status."""

    errno = 0  # the kernel's reason, unless the error that this one was raised from has it

    def __init__(self, message: str, hint: str = "", status: int = FAILED) -> None:
        super().__init__(message)
        self.message, self.hint, self.status = message, hint, status


OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ProgramError(AshError):
    """A program failed. The kernel's reason is known from its output, or else from the message, if a disk was full."""

    def __init__(self, message: str, hint: str = "", output: str = "") -> None:
        super().__init__(message, hint)
        self.errno = next((number for number in OUT_OF_SPACE if os.strerror(number) in (output or message)), 0)


def reason(error: BaseException) -> str:
    """An error's message without errno or class name."""
    if isinstance(error, AshError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error was caused by a full disk or a quota, in ash or in a child process."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AshError | OSError) and cause.errno in OUT_OF_SPACE:
            return True
        cause = cause.__cause__
    return False


class HangUp(Exception):
    """The terminal went away (SIGHUP)."""


def lines_of(text: str) -> list[str]:
    """Split text at line feeds only: splitlines() also splits at characters that are legal in file names."""
    return text.removesuffix("\n").split("\n") if text else []


def printable(text: str) -> str:
    """Escape control characters, except for tabs and line breaks."""
    if text.replace("\n", "").replace("\t", "").isprintable():  # the common case, and cheap to test
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Escape control characters, tabs and line breaks included."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class Console:
    """How much ash prints, and in which format."""

    def __init__(self) -> None:
        self.verbose = False
        self.quiet = False
        self.json = False
        self.quiet_progress = False  # progress is reported in another way
        self.warned: set[str] = set()
        self.started = time.monotonic()

    @property
    def silent(self) -> bool:
        """Whether to print nothing but the result and errors."""
        return self.quiet or self.json

    def say(self, text: str) -> None:
        """Print a message that is not part of the command's result to stderr."""
        if not self.silent:
            print(printable(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """say() a warning, once."""
        if text not in self.warned:
            self.warned.add(text)
            self.say(f"warning: {text}")


console = Console()


def about_to(what: str) -> None:
    """Announce the next change to the disk: audit hooks of tests kill ash or cut the power here."""
    sys.audit("ash.step", what)


def listed(names: Iterable[object]) -> str:
    """Join names with commas, escaped for one line."""
    return one_line(", ".join(map(str, names)))


def counted(names: Sequence[object], most: int = 10) -> str:
    """The same, of which only the first ones are named, and the others are counted."""
    more = len(names) - most
    return f"{listed(names[:most])} and {more} more" if more > 0 else listed(names)


def as_json(data: Mapping[str, Any]) -> str:
    """Serialize to one line of JSON that any encoding can represent and no terminal interprets."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    text = json.dumps(data, ensure_ascii=ascii_only)
    return "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else json.dumps(c)[1:-1] for c in text
    )


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Suppress progress messages inside the block (unless -v)."""
    before, console.quiet_progress = console.quiet_progress, not console.verbose
    try:
        yield
    finally:
        console.quiet_progress = before


@contextmanager
def step(text: str) -> Iterator[None]:
    """Report the start of a step, with the seconds since ash started."""
    if not console.quiet_progress:
        console.say(f"[{time.monotonic() - console.started:5.1f}s] {text}")
    yield


# Environment variables passed on to programs. This pattern, like all others, is compiled on first use: compiling
# those that a command never uses would cost it milliseconds.
HANDED_ON = r"(?i:TERM|LANG|LC_\w+|NO_COLOR|(https?|ftp|all|no)_proxy|SUDO_USER)"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def clean_environment() -> dict[str, str]:
    """The environment for child processes: few variables of the caller, our own PATH and HOME."""
    handed_on = {name: value for name, value in os.environ.items() if re.fullmatch(HANDED_ON, name)}
    return {**handed_on, "PATH": SYSTEM_PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root"}


def last_words(text: str, lines: int = 3) -> str:
    """The last non-blank lines of a program's output, joined into one."""
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])


def run(
    argv: Sequence[str | Path],
    *,
    check: bool = True,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    ok: Container[int] = (0,),
) -> subprocess.CompletedProcess[str]:
    """Run a program and capture its output.

    Args:
        check: raise AshError if the exit status is not in `ok`; the message ends with the last lines of the output.
        input: text for stdin, which is /dev/null if None.
        env: the complete environment; if None, clean_environment() in the C locale.
    """
    import subprocess

    words = [str(word) for word in argv]
    if console.verbose:
        print(one_line(" ".join(["+", *words])), file=sys.stderr)
    try:
        done = subprocess.run(
            words,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            env=dict(env) if env is not None else {**clean_environment(), "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except FileNotFoundError:
        raise AshError(f"{words[0]} is not installed", f"install the package that contains {words[0]}") from None
    if check and done.returncode not in ok:
        output = done.stderr or done.stdout
        raise ProgramError(f"{' '.join(words[:3])} failed ({done.returncode}): {last_words(output)}", output=output)
    return done


# --- Kernel calls that Python 3.11 has no function for ---------------------------------------------------------

# From <linux/sched.h>, <linux/mount.h>, <linux/fs.h>, <linux/prctl.h>.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x04000000, 0x08000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOSYMFOLLOW, MS_NOATIME, MS_BIND, MS_MOVE, MS_REC, MS_SLAVE = 256, 1024, 4096, 8192, 16384, 1 << 19
MNT_DETACH = 2
RENAME_EXCHANGE = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 22, 24, 36
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442  # the same on all architectures
MOUNT_ATTR_NODEV = 4


def libc(function: str, *arguments: int | bytes | None) -> None:
    """Call a function of the C library that returns -1 and sets errno on failure, which raises OSError."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    converted = [ctypes.c_ulong(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    if getattr(library, function)(*converted) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: str | Path, target: Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises AshError that names source and target."""
    try:
        libc("mount", os.fsencode(source), os.fsencode(target), kind.encode(), flags, os.fsencode(data))
    except OSError as error:
        raise AshError(f"cannot mount {kind or source} on {target}: {error.strerror}") from error


def bind(source: Path, target: Path, readonly: bool = False) -> None:
    mount(source, target, flags=MS_BIND)
    if readonly:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


@contextmanager
def nosymfollow(directory: Path, source: Path | None = None) -> Iterator[None]:
    """Mount a directory `nosymfollow` for the block; checking components one by one would be a race.

    What is mounted below it is hidden. With `source`, that directory is mounted there.
    """
    mount(source or directory, directory, flags=MS_BIND)
    try:
        mount("none", directory, flags=MS_BIND | MS_REMOUNT | MS_NOATIME | MS_NOSYMFOLLOW)
        yield
    finally:
        libc("umount2", os.fsencode(directory), MNT_DETACH)


def exchange(one: Path, other: Path) -> None:
    """Swap two paths of one file system atomically."""
    about_to(f"exchange {one.name} and {other.name}")
    libc("renameat2", AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit at once if process `parent` has already ended."""
    libc("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(OUR_FAILURE_IN_RUN)


def await_end(child: int) -> None:
    """Wait until a child has ended. Its id stays valid until waitpid(), even if Ctrl-C comes between the two."""
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


PRIVATE = Path("/run/ash")  # a tmpfs that only this process sees, once it has called private_mounts()


def private_mounts() -> None:
    """Enter a new mount namespace, with an empty tmpfs on PRIVATE. Mounts vanish with this process, even if killed."""
    try:
        libc("unshare", CLONE_NEWNS)
    except OSError as error:
        raise AshError(f"cannot create a mount namespace: {error.strerror}", "run ash as root", REFUSED) from None
    mount("none", Path("/"), flags=MS_REC | MS_SLAVE)
    PRIVATE.mkdir(mode=0o700, exist_ok=True)
    mount("ash", PRIVATE, "tmpfs", MS_NOSUID, "mode=0700")


@contextmanager
def signals_held() -> Iterator[None]:
    """Block SIGHUP, SIGINT and SIGTERM while something short runs that must not be interrupted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signals_heard() -> Iterator[None]:
    """Unblock SIGINT and SIGTERM inside a signals_held() block, for something that may take long."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_hung_up(descriptor: int) -> bool:
    """Whether the other end of a pipe was closed."""
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLHUP)
    return bool(poll.poll(0))


# --- Files: kinds, paths inside a root, walking ----------------------------------------------------------------

EMPTY_SUBVOLUME_INODE = 2  # BTRFS_EMPTY_SUBVOL_DIR_OBJECTID: the empty directory a snapshot has for a nested subvolume


def status_of(path: Path) -> os.stat_result | None:
    """lstat(2); None if the path is missing or unreachable."""
    try:
        return path.lstat()
    except OSError:
        return None


def inode_of(path: Path, follow: bool = False) -> tuple[int, int] | None:
    """Device and inode number of a path (with `follow`: of a symlink's target); None if it is missing."""
    try:
        status = path.stat(follow_symlinks=follow)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def size_of(path: Path) -> int:
    """The size of a regular file in bytes; -1 if it is missing or of another type."""
    status = status_of(path)
    return status.st_size if status and stat.S_ISREG(status.st_mode) else -1


def is_directory(path: Path) -> bool:
    """Whether a path is a directory, not a symlink to one."""
    return path.is_dir() and not path.is_symlink()


def is_special(path: Path) -> bool:
    """Whether a path is a socket or a device: programs create these at run time, ash does not copy them."""
    kind = path.lstat().st_mode if os.path.lexists(path) else 0
    return stat.S_ISSOCK(kind) or stat.S_ISBLK(kind) or stat.S_ISCHR(kind)


def is_readonly(path: Path) -> bool:
    """Whether a path is on a read-only mount or file system."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def free_space(path: Path) -> int:
    """The bytes available on the file system of a path."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def has_real_parents(directory: Path, path: str) -> bool:
    """Whether every parent of `path` below a directory is a directory and not a symlink."""
    parents = [directory / parent for parent in Path(path).parents]
    return all(parent.is_dir() and (parent == directory or not parent.is_symlink()) for parent in parents)


def path_inside(root: Path, path: str) -> Path:
    """Resolve a path as a program chrooted to `root` would: symlinks are followed, but never out of the root."""
    done, links = root, 0
    todo = path.split("/")[::-1]
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        here = done / part
        if part == "..":
            done = done.parent if done != root else root
        elif not here.is_symlink():
            done = here
        elif links == 40:  # the kernel's own limit (MAXSYMLINKS)
            raise AshError(f"too many levels of symlinks in {path}")
        else:
            links += 1
            target = os.readlink(here)
            done = root if target.startswith("/") else done
            todo += target.split("/")[::-1]
    return done


def place_inside(root: Path, path: str) -> Path:
    """Like path_inside(), but do not resolve a symlink in the last component."""
    parent, _, name = path.rpartition("/")
    return path_inside(root, parent) / name


def require_directories(root: Path) -> None:
    """Raise AshError unless /etc and /boot of a root are directories and no symlinks: ash writes below them."""
    for name in ("etc", "boot"):
        if not is_directory(root / name):
            raise AshError(f"/{name} of {root.name} is not a directory", "replace it by a real directory", REFUSED)


def paths_below(directory: Path) -> set[str]:
    """All paths below a directory, relative to it; those that cannot be read are left out."""
    found: set[str] = set()
    todo = [""]
    while todo:
        inside = todo.pop()  # a string: creating a Path for each entry would take ten times as long
        with contextlib.suppress(OSError), os.scandir(f"{directory}/{inside}") as entries:
            for entry in entries:
                found.add(inside + entry.name)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(f"{inside}{entry.name}/")
    return found


def walk(*roots: Path) -> Iterator[tuple[tuple[Path, ...], list[str]]]:
    """Walk several directories in parallel, top down, by the names in the first; follow no symlinks.

    Yields the corresponding paths, one below each root, and the names to visit below them; the caller may remove some.
    Not recursive: users can nest directories deeper than Python's stack.
    """
    todo = [roots]
    while todo:
        paths = todo.pop()
        names = os.listdir(paths[0]) if is_directory(paths[0]) else []
        yield paths, names
        todo += [tuple(path / name for path in paths) for name in names]


class Seen(NamedTuple):
    """A path that look_through() came to."""

    path: str
    status: os.stat_result | None  # of lstat(2); None if it is nested too deeply to be looked at
    is_neighbour: bool


def look_through(path: Path) -> Iterator[Seen]:
    """A path and everything below it, top down and in a fixed order; nothing if it is missing.

    Nested subvolumes and mounts are neighbours: they are not looked through. A snapshot has an empty directory in the
    place of a nested subvolume.
    """
    above = status_of(path.parent)
    todo = [(os.fspath(path), above.st_dev if above else 0)]
    while todo:
        inside, device = todo.pop()
        try:
            status = os.lstat(inside)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                yield Seen(inside, None, is_neighbour=False)
            continue
        is_directory_too = stat.S_ISDIR(status.st_mode)
        is_neighbour = is_directory_too and (status.st_ino == EMPTY_SUBVOLUME_INODE or status.st_dev != device)
        yield Seen(inside, status, is_neighbour)
        if is_directory_too and not is_neighbour:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # it was deleted meanwhile
                todo += [(f"{inside}/{below}", device) for below in sorted(os.listdir(inside), reverse=True)]


def change_token(path: Path) -> list[tuple[str, int, float]]:
    """A value that changes with anything below a path: names, inodes and ctimes, which btrfs snapshots keep.

    It is never equal if something is nested too deeply to be looked at. Neighbours do not count, but for their names.
    """
    found: list[tuple[str, int, float]] = []
    for seen in look_through(path):
        name, status = seen.path.rpartition("/")[2], seen.status
        if status is None:
            found.append((name, 0, float("nan")))
        elif seen.is_neighbour:
            found.append((name, EMPTY_SUBVOLUME_INODE, 0))
        else:
            found.append((name, status.st_ino, status.st_ctime_ns))
    return found


# --- Files: open, read, compare, copy, delete ------------------------------------------------------------------


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file; never follow a symlink or block on a FIFO. Raises AshError if it is of another type."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a symlink, a FIFO or socket, a directory
            raise
    raise AshError(f"{path} is not a regular file")


@contextmanager
def open_descriptor(
    path: Path, flags: int = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, mode: int = 0o666
) -> Iterator[int]:
    """Open a file or directory, by default for reading, with an OSError if it is a symlink (by now)."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(path: Path) -> bytes:
    """Read a small regular file; empty if it is missing. Three times as fast as Python's file objects."""
    try:
        if not path.is_file():
            return b""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # deleted since is_file()
        return b""
    content = b""
    try:
        while piece := os.read(descriptor, 1 << 16):
            content += piece
    finally:
        os.close(descriptor)
    return content


def read_text(path: Path) -> str:
    """Read a file's text, in any encoding (write_text() restores the bytes); empty if it is missing."""
    return read_bytes(path).decode("utf-8", "surrogateescape")


def extended_attributes(file: Path | int) -> dict[str, bytes]:
    """Extended attributes of a path (not followed) or descriptor: ACLs and file capabilities; not overlayfs's own."""
    follow = isinstance(file, int)
    try:
        names = os.listxattr(file, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return {}
    own = [name for name in names if not name.startswith("trusted.overlay.")]
    return {name: os.getxattr(file, name, follow_symlinks=follow) for name in own}


# From <linux/fs.h>. On btrfs the flags for compression only repeat the extended attribute btrfs.compression.
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
NOCOW, IMMUTABLE, APPEND_ONLY = 0x800000, 0x10, 0x20
PROTECTING = IMMUTABLE | APPEND_ONLY
KEPT_FLAGS = (
    PROTECTING | NOCOW | 0x8 | 0x40 | 0x80 | 0x10000
)  # and synchronous, no dump, no atime, synchronous directory


def inode_flags(descriptor: int, from_overlay: bool = False) -> int:
    """The flags that chattr(1) sets on an open file or directory, as far as copies have them too.

    With `from_overlay` it is in an overlay's upper directory, where overlayfs keeps two of them in an attribute.
    """
    try:
        flags = int.from_bytes(fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8))[:4], sys.byteorder)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise
        return 0  # the file system has none
    if from_overlay:
        with contextlib.suppress(OSError):
            kept = os.getxattr(descriptor, "trusted.overlay.protattr")
            flags |= IMMUTABLE * (b"i" in kept) | APPEND_ONLY * (b"a" in kept)
    return flags & KEPT_FLAGS


def flags_of(path: Path, from_overlay: bool = False) -> int:
    """inode_flags() of a path; 0 if it is missing, or neither a regular file nor a directory."""
    status = status_of(path)
    if status is None or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return 0
    with open_descriptor(path) as descriptor:
        return inode_flags(descriptor, from_overlay)


def set_inode_flags(descriptor: int, flags: int, among: int) -> None:
    """Set these flags of an open file or directory, and clear the others of `among`."""
    if inode_flags(descriptor) & among == flags & among:
        return  # setting none would also reset the file's kind of compression
    all_flags = int.from_bytes(fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8))[:4], sys.byteorder)
    changed = (all_flags & ~among) | (flags & among)
    fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, changed.to_bytes(4, sys.byteorder) + bytes(4))


def next_data(file: int, start: int) -> int:
    """Where the first data of an open file are, from a position on, which may be in a hole; at its end if none are."""
    try:
        return os.lseek(file, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return max(start, os.fstat(file).st_size)


def same_bytes(one: int, other: int) -> bool:
    """Whether two open regular files have the same content; what is a hole in both is not read."""
    start = 0
    while True:
        start = min(next_data(one, start), next_data(other, start))
        piece = os.pread(one, 1 << 16, start)
        if piece != os.pread(other, 1 << 16, start):
            return False
        if not piece:
            return os.fstat(one).st_size == os.fstat(other).st_size
        start += len(piece)


def same_files(one: Path, other: Path, *, content: bool, from_overlay: bool) -> bool:
    """Whether two files or directories have the same flags, and with `content` the same content."""
    try:
        with open_descriptor(one) as a, open_descriptor(other) as b:
            ours, theirs = inode_flags(a, from_overlay), inode_flags(b)
            same_flags = ours | (theirs & NOCOW if from_overlay else 0) == theirs
            return same_flags and (not content or same_bytes(a, b))
    except OSError as error:  # one was deleted or replaced meanwhile
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ESPIPE):
            raise
        return False


def is_same(one: Path, other: Path, *, from_overlay: bool = False) -> bool:
    """Compare two paths, not what is below them: type, owner, mode, content or target, attributes and inode flags.

    Extended attributes are ACLs and file capabilities too. Two missing paths are the same. Times do not count: programs
    restore an mtime after an edit. Only an equal inode and ctime prove that a path and its btrfs snapshot are the same.

    Args:
        from_overlay: `one` is in an overlay's upper directory, where files lack the flag NOCOW of the lower ones.
    """
    a, b = status_of(one), status_of(other)
    if a is None or b is None:
        return a is b
    if (a.st_mode, a.st_uid, a.st_gid, a.st_rdev) != (b.st_mode, b.st_uid, b.st_gid, b.st_rdev):
        return False
    is_file, is_link = stat.S_ISREG(a.st_mode), stat.S_ISLNK(a.st_mode)
    if (is_file or is_link) and a.st_size != b.st_size:
        return False
    if (a.st_ino, a.st_ctime_ns, a.st_mtime_ns) == (b.st_ino, b.st_ctime_ns, b.st_mtime_ns):
        return True
    if is_link and os.readlink(one) != os.readlink(other):
        return False
    if extended_attributes(one) != extended_attributes(other):
        return False
    if is_file or stat.S_ISDIR(a.st_mode):
        return same_files(one, other, content=is_file, from_overlay=from_overlay)
    return True


def same_attributes(one: Path, other: Path) -> bool:
    """Whether two regular files or directories have the same owner, mode, extended attributes and inode flags."""
    a, b = one.lstat(), other.lstat()
    owned = (a.st_mode, a.st_uid, a.st_gid) == (b.st_mode, b.st_uid, b.st_gid)
    return owned and extended_attributes(one) == extended_attributes(other) and flags_of(one) == flags_of(other)


def same_content(one: Path, other: Path) -> bool:
    """Whether two regular files have the same content."""
    with open_descriptor(one) as a, open_descriptor(other) as b:
        return same_bytes(a, b)


def is_untouched(path: str, one: Path, other: Path) -> bool:
    """Whether `path` is the same inode, unchanged since (ctime), below a subvolume and below its snapshot."""
    a, b = (status_of(root / path) if has_real_parents(root, path) else None for root in (one, other))
    return a is not None and b is not None and (a.st_ino, a.st_ctime_ns) == (b.st_ino, b.st_ctime_ns)


def is_as_it_was(now: os.stat_result | None, before: os.stat_result | None) -> bool:
    """Whether two lstat(2) are of the same inode, unchanged; another name of it may have been replaced since."""
    if now is None or before is None or now.st_ino != before.st_ino:
        return False
    if now.st_ctime_ns == before.st_ctime_ns:
        return True
    same = all(getattr(now, name) == getattr(before, name) for name in ("st_mtime_ns", "st_size", "st_mode", "st_uid"))
    return same and now.st_nlink != before.st_nlink


def first_difference(one: Path, other: Path) -> str:
    """The first relative path at which two directories differ; empty if they do not."""
    return next((p for p in sorted(paths_below(one) | paths_below(other)) if not is_same(one / p, other / p)), "")


FICLONE = 0x40049409  # <linux/fs.h>: _IOW(0x94, 9, int)


def copy_content(old: int, new: int) -> None:
    """Copy an open file into a new one, by reflink if possible; otherwise its data, without the holes, and sync it."""
    try:
        fcntl.ioctl(new, FICLONE, old)
    except OSError:  # for example if one of them is NOCOW
        end = 0
        os.ftruncate(new, os.fstat(old).st_size)
        while (start := next_data(old, end)) < os.fstat(old).st_size:
            end = os.lseek(old, start, os.SEEK_HOLE)
            os.lseek(new, start, os.SEEK_SET)
            while start < end and (sent := os.sendfile(new, old, start, min(end - start, 1 << 24))):
                start += sent
        os.fsync(new)


def copy_attributes(source: int, target: int, *, from_overlay: bool = False) -> None:
    """Copy owner, inode flags, extended attributes (not overlayfs's own), mode and times between open files.

    They may be directories. Immutable and append-only are not copied, since they forbid all that comes after: see
    protect(). With `from_overlay` the target remains NOCOW.
    """
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    flags = inode_flags(source, from_overlay) | (inode_flags(target) & NOCOW if from_overlay else 0)
    set_inode_flags(target, flags, KEPT_FLAGS & ~PROTECTING)
    # ACLs come before the mode: chmod would widen the group's access before the mask is set.
    ours, theirs = extended_attributes(source), extended_attributes(target)
    for name in theirs.keys() - ours.keys():  # such as an ACL inherited from the directory
        os.removexattr(target, name)
    for name, value in ours.items():
        os.setxattr(target, name, value)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_directory_attributes(source: Path, target: Path, *, from_overlay: bool = False) -> None:
    """copy_attributes() for directories; OSError if either was replaced by a symlink meanwhile."""
    with open_descriptor(source) as old, open_descriptor(target) as new:
        copy_attributes(old, new, from_overlay=from_overlay)


def copy_file(source: Path, target: Path, *, from_overlay: bool = False, nocow: bool = False) -> None:
    """Copy a regular file, symlink or FIFO to a new name; only root can read it until owner and mode are set.

    Safe in directories of other users: neither end is followed if it is replaced by a symlink meanwhile. Raises
    AshError if the source is of another type.

    Args:
        from_overlay: the source is in an overlay's upper directory.
        nocow: make the copy NOCOW also if the source is not.
    """
    about_to(f"copy {target.name}")
    status = source.lstat()
    if not stat.S_ISLNK(status.st_mode) and not stat.S_ISFIFO(status.st_mode):
        with ExitStack() as stack:
            old = open_regular(source)
            stack.callback(os.close, old)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            new = stack.enter_context(open_descriptor(target, flags | os.O_NOFOLLOW, mode=0o600))
            # Only an empty file can become NOCOW or stop to be, and a reflink needs the same of both.
            set_inode_flags(new, NOCOW if nocow else inode_flags(old, from_overlay), NOCOW)
            copy_content(old, new)
            copy_attributes(old, new, from_overlay=from_overlay)
        return
    if stat.S_ISLNK(status.st_mode):
        target.symlink_to(os.readlink(source))
    else:
        os.mkfifo(target, stat.S_IMODE(status.st_mode))  # no chmod, which would follow a symlink put in its place
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    for name, value in extended_attributes(source).items():
        os.setxattr(target, name, value, follow_symlinks=False)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def protect(path: Path, flags: int) -> None:
    """Make a file or directory immutable, append-only or neither, as these flags say."""
    about_to(f"{'protect' if flags & PROTECTING else 'unprotect'} {path.name}")
    with open_descriptor(path) as descriptor:
        set_inode_flags(descriptor, flags, PROTECTING)


def unprotect(path: Path) -> None:
    """Make a path of one of our own copies neither immutable nor append-only, so that it can be replaced."""
    if flags_of(path) & PROTECTING:
        protect(path, 0)


@contextmanager
def unprotected(*paths: Path) -> Iterator[None]:
    """Make paths neither immutable nor append-only for the block. What has their names after it is as they were."""
    flags = {path: flags_of(path) & PROTECTING for path in paths}
    for path in filter(flags.get, paths):
        protect(path, 0)
    try:
        yield
    finally:
        for path in filter(flags.get, paths):
            if flags_of(path) & PROTECTING != flags[path] and not path.is_symlink() and path.exists():
                protect(path, flags[path])


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory with all below it and all attributes. `target` may exist, and is not protected itself."""
    about_to(f"fill {target.name}")
    target.mkdir(exist_ok=True)
    run(["cp", "-a", "--reflink=auto", f"{source}/.", target])
    for path in ("", *sorted(paths_below(source), reverse=True)):  # what is in a directory comes before it
        if flags := flags_of(source / path):
            if flags & NOCOW and not is_directory(source / path):  # only an empty file can become that
                (target / path).unlink()
                copy_file(source / path, target / path)
            with open_descriptor(target / path) as descriptor:
                set_inode_flags(descriptor, flags if path else flags & ~PROTECTING, KEPT_FLAGS)


def remove_tree(path: Path, *, protected: bool = False) -> None:
    """Delete a file, or a directory with its contents; do nothing if it is missing.

    Args:
        protected: what is immutable or append-only too, as there may be in our own copies.
    """
    about_to(f"remove {path.name}")
    import shutil

    try:
        if is_directory(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except (RecursionError, OSError) as error:
        if protected and isinstance(error, OSError) and error.errno == errno.EPERM:
            for inside in ("", *paths_below(path)):
                unprotect(path / inside)
            with unprotected(path.parent):
                remove_tree(path)
            return
        if isinstance(error, OSError) and error.errno != errno.EMFILE:
            raise
        run(["rm", "-rf", "--", path])  # which has no limit of depth


# --- Files: write, replace -------------------------------------------------------------------------------------

DEEPEST = 3800  # bytes of a path that is copied: PATH_MAX is 4096, and the prefix of the copy may be longer


def rename(old: Path, new: Path) -> None:
    """Rename, replacing the target."""
    about_to(f"rename {old.name} to {new.name}")
    old.rename(new)


def sync_directory(directory: Path) -> None:
    """fsync(2) a directory, so that renames in it are on disk."""
    with open_descriptor(directory, os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def temporary_name(path: Path, token: str = "") -> Path:
    """The name under which `path` is written before it is renamed; hidden, so that no *.d directory reads it."""
    return path.with_name(f".ash-new-{token}" if token else ".ash-new")


@contextmanager
def replace(path: Path, *, token: str = "", durable: bool = False, directories: bool = False) -> Iterator[Path]:
    """Replace a path atomically: yield a free temporary name next to it, then rename what the block made there.

    What an interrupted call left under that name is deleted first.

    Args:
        path: may be missing.
        token: makes the temporary name unique where another process may write to the directory at the same time,
            or unguessable where another user may.
        durable: a file: sync it before the rename, and the directory after it. Otherwise the caller syncs.
        directories: replace a directory too, or replace by one, which takes an exchange; else that is an OSError.
    """
    temporary = temporary_name(path, token)
    if os.path.lexists(temporary):
        remove_tree(temporary, protected=True)
    try:
        yield temporary
        if durable:
            with open_descriptor(temporary) as descriptor:
                os.fsync(descriptor)
        if directories and os.path.lexists(path) and (is_directory(path) or is_directory(temporary)):
            exchange(temporary, path)
            remove_tree(temporary, protected=True)
        else:
            rename(temporary, path)
    except (AshError, OSError):  # such as a full disk
        with contextlib.suppress(OSError):
            remove_tree(temporary, protected=True)
        raise
    if durable:
        sync_directory(path.parent)


def replace_by_copy(
    source: Path,
    target: Path,
    token: str = "",
    *,
    from_overlay: bool = False,
    protected: bool = False,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Replace a path atomically by a copy of a file, or of a directory without its contents. `token`: see replace().

    Args:
        check: called once the copy is made; what it raises keeps the target.
        from_overlay: the source is in an overlay's upper directory; the target is NOCOW if it, or its directory, was.
        protected: replace the target even if it, or its directory, is immutable or append-only.
    """
    if protected:
        unprotect(target)
        with unprotected(target.parent):
            replace_by_copy(source, target, token, from_overlay=from_overlay)
        return
    protection = flags_of(source, from_overlay) & PROTECTING
    if is_directory(source) and is_directory(target):
        remove_tree(temporary_name(target, token), protected=True)  # of an interrupted call
        copy_directory_attributes(source, target, from_overlay=from_overlay)
    else:
        nocow = from_overlay and bool((flags_of(target) | flags_of(target.parent)) & NOCOW)
        with replace(target, token=token, directories=True) as new:
            if is_directory(source):
                new.mkdir(mode=0o700)
                copy_directory_attributes(source, new, from_overlay=from_overlay)
            else:
                copy_file(source, new, from_overlay=from_overlay, nocow=nocow)
            check()
    if protection:
        protect(target, protection)


def link_like(source: Path, target: Path, paths: Iterable[str]) -> None:
    """Give files below `target` the hard links that equal files have below `source`. `paths`: those to look at."""
    linked: dict[int, list[str]] = {}
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            status = os.lstat(f"{source}/{path}")
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                linked.setdefault(status.st_ino, []).append(path)
    for names in linked.values():
        there = [path for path in names if has_real_parents(target, path)]
        equal = [target / path for path in there if is_same(source / path, target / path)]
        for place in equal[1:]:
            if not place.samefile(equal[0]):
                with unprotected(equal[0], place, place.parent), replace(place) as new:
                    new.hardlink_to(equal[0])


def write_text(path: Path, text: str) -> None:
    """Write text from read_text() in place, even if the path is immutable; AshError if it is not a regular file."""
    about_to(f"write {path.name}")
    with unprotected(path, path.parent):
        descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)


def write_inside(root: Path, path: str, text: str) -> None:
    """Write a file of a root; a symlink in its place is deleted, not followed."""
    place = place_inside(root, path)
    if place.is_symlink():
        remove_tree(place, protected=True)
    write_text(place, text)


def write_file(path: Path, text: str, mode: int = 0o644, durable: bool = True) -> None:
    """Replace one of ash's own files; after a crash it has the old content or the new, once this returned the new.

    Unless it is `durable`, the caller syncs.
    """
    about_to(f"write {path.name}")
    with replace(path, token=path.name, durable=durable) as new:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            os.fchmod(descriptor, mode)
            file.write(text)


def rewrite(path: Path, text: str) -> None:
    """Replace the text of a file atomically and keep its attributes and flags; create the file if it is missing."""
    if path.is_symlink() or not path.exists():
        write_text(path, text)
        return
    with unprotected(path, path.parent), replace(path, durable=True) as new:
        copy_file(path, new)
        write_text(new, text)


def make_private_directory(directory: Path) -> None:
    """Create a directory below `/var/lib/ash`, both for root alone, since conflicts kept there may be secret.

    Symlinks in their place are deleted: they would lead root elsewhere, or let others read. If /var/lib itself is one,
    that is an AshError.
    """
    conflicts, ash, lib = list(directory.parents)[:3]
    if lib.is_symlink():
        raise AshError(f"{lib} is a symlink", "replace it by a real directory", REFUSED)
    lib.mkdir(parents=True, exist_ok=True)
    for parent, mode in ((ash, 0o755), (conflicts, 0o700)):
        if not is_directory(parent):
            remove_tree(parent)
        parent.mkdir(mode=0o700, exist_ok=True)
        os.chown(parent, 0, 0)
        parent.chmod(mode)
    directory.mkdir(mode=0o700, exist_ok=True)


# --- Mounts ----------------------------------------------------------------------------------------------------


class Mount(NamedTuple):
    """A line of mountinfo."""

    target: str
    kind: str
    source: str
    options: str
    device: str = ""  # of the file system, major:minor; on btrfs it is not that of stat(2)
    id: str = ""  # unique among all mount namespaces

    @property
    def subvolume(self) -> int | None:
        """The id of the mounted btrfs subvolume, also for a bind mount of a directory in it."""
        found = re.search(r"subvolid=(\d+)", self.options) if self.kind == "btrfs" else None
        return int(found[1]) if found else None


def mounts(process: str = "self") -> list[Mount]:
    """All mounts of a process's namespace, oldest first."""
    found = []
    for line in lines_of(read_text(Path("/proc", process, "mountinfo"))):
        before, _, after = line.partition(" - ")
        kind, source, options = after.split(" ", 2)
        ident, _, device, _, shown, *_ = before.split(" ")
        target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), shown)
        found.append(Mount(target, kind, source, options, device, ident))
    return found


def mounts_in_var(running: bool) -> list[str]:
    """The directories of the running system's /var that something is mounted on, oldest first."""
    targets = [mount.target for mount in mounts() if mount.target.startswith("/var/")] if running else []
    return [str(Path(target).relative_to("/var")) for target in dict.fromkeys(targets)]


def mount_of(path: Path) -> Mount:
    where = str(path.resolve())
    above = [m for m in mounts() if m.target in ("/", where) or where.startswith(m.target + "/")]
    return max(reversed(above), key=lambda mount: len(mount.target))  # of several on one directory, the newest


def forbid_devices(directory: Path) -> None:
    """Make all mounts at and below a directory `nodev`, without changing their other options."""
    attributes = struct.pack("4Q", MOUNT_ATTR_NODEV, 0, 0, 0)
    path = os.fsencode(directory)
    libc("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes, len(attributes))


def pivot(directory: Path) -> None:
    """Make a mount the root of this mount namespace, and take all mounts outside of it away."""
    os.chdir(directory)
    libc("pivot_root", b".", b".")
    libc("umount2", b".", MNT_DETACH)  # the former root, which is now mounted on top
    os.chdir("/")


def enter_namespace_root() -> None:
    """If this process is in a chroot, make that the root of its mount namespace; others' roots do not change."""

    def mount_id(descriptor: int) -> str:
        lines = lines_of(read_text(Path(f"/proc/self/fdinfo/{descriptor}")))
        return next(line for line in lines if line.startswith("mnt_id:"))

    with ExitStack() as stack:
        kept = [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in ("/", "/proc/self/ns/mnt")]
        libc("setns", kept[1], CLONE_NEWNS)
        kept.append(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
        for descriptor in kept:
            stack.callback(os.close, descriptor)
        if mount_id(kept[0]) != mount_id(kept[2]) or not os.path.samestat(os.fstat(kept[0]), os.fstat(kept[2])):
            os.fchdir(kept[0])
            mount(".", Path("/sys"), flags=MS_BIND | MS_REC)
            pivot(Path("/sys"))


# --- Layout: every path on disk is spelled here and nowhere else -----------------------------------------------


SNAPSHOTS_CFG, OLD_GRUB_CFG = "snapshots.cfg", "grub.cfg.{}"  # beside grub.cfg; the latter with how old it is


class Layout:
    """The paths of one distribution on a btrfs file system.

    Args:
        snapshots: where its subvolume `@.snapshots_D` is (`/.snapshots` on the running system).
        distro: the distribution's id, D.
        top: where the top level of the file system is mounted; None if ash only reads the running system.
    """

    SUBVOLUMES = ("@.snapshots", "@boot", "@etc", "@home", "@var")
    SWAP = "@swap"  # if the installer made a swap file: a subvolume with an active one allows no snapshots
    POSSIBLE_SUBVOLUMES = (*SUBVOLUMES, SWAP)

    def __init__(self, snapshots: Path, distro: str, top: Path | None = None) -> None:
        self.snapshots, self.distro, self.top = snapshots, distro, top
        self.lost_found = snapshots / "lost+found"  # what fsck removed: on the same file system, so a rename is enough
        self.ash = ash = snapshots / "ash"
        self.executable, self.new_executable, self.old_executable = ash / "ash", ash / "ash.new", ash / "ash.old"
        self.lib, self.distro_file = ash / "lib", ash / "distro"
        self.keyring = ash / "keyring.gpg"  # the keys that sign releases of ash, in gpgv's format
        self.tree, self.last, self.part = ash / "fstree", ash / "last", ash / "part"
        self.history, self.ids = ash / "history", ash / "ids"
        self.menu = ash / "menu"  # the boot menu: all users can read it; grub.cfg is on a volume that is not mounted
        self.efi = ash / "efi"  # the UUID of the EFI partition, where GRUB counts; missing or empty if there is none
        self.boot_part = ash / "bootpart"  # the UUID of the partition for /boot; missing if there is none
        self.envblock = ash / "envblock"  # which GRUB has shown that it can count in btrfs; missing if none has
        self.bad = ash / "bad"  # the snapshots whose deployments did not start
        self.booted = ash / "booted"  # what runs, or ran last: a boot service copies it from the deployment
        self.upstate = ash / "upstate"  # the last automatic upgrade: 0 or 1, when, what there is to say
        self.help = ash / "help"  # man page, completions and command table, rendered by the installer
        self.reserve, self.profiles, self.home_root = ash / "reserve", ash / "profiles", ash / "root"
        self.unfinished = snapshots / "unfinished"  # the system's installation, or its removal, has not ended

    @classmethod
    def at(cls, top: Path, distro: str) -> Layout:
        return cls(top / f"@.snapshots_{distro}", distro, top)

    @classmethod
    def all_on(cls, top: Path) -> list[Layout]:
        """Those of all systems on a file system whose top level is mounted, by id."""
        prefix = cls.SUBVOLUMES[0]
        return [cls.at(top, path.name.removeprefix(f"{prefix}_")) for path in sorted(top.glob(f"{prefix}_*"))]

    def volume_name(self, prefix: str) -> str:
        """A top-level subvolume's name, such as `@var_debian`."""
        return f"{prefix}_{self.distro}"

    def volume(self, prefix: str) -> Path:
        """A top-level subvolume; AshError if the top level is not mounted."""
        if self.top is None:
            raise AshError(f"{self.volume_name(prefix)} is not mounted")
        return self.top / self.volume_name(prefix)

    @property
    def is_complete(self) -> bool:
        """Whether the system was installed, and its removal has not begun."""
        return not self.unfinished.exists() and any(self.snapshots.iterdir())

    @property
    def is_of_ashos(self) -> bool:
        """Whether the system is one of AshOS, which ash does not manage: that has no such files beside its tree."""
        return self.tree.is_file() and not self.lib.exists() and not self.distro_file.exists()

    @property
    def var(self) -> Path:
        return self.volume("@var")

    @property
    def home(self) -> Path:
        return self.volume("@home")

    @property
    def boot_volume(self) -> Path:
        return self.volume("@boot")

    @property
    def boot_uuid(self) -> str:
        """The UUID of the partition that is mounted over the boot volume; empty if there is none."""
        return read_text(self.boot_part).strip()

    @property
    def kernels(self) -> Path:
        """Copies of the deployments' kernels, if the boot volume is a partition of its own."""
        return self.boot_volume / "kernels"

    @property
    def grub_cfg(self) -> Path:
        return self.boot_volume / "grub" / "grub.cfg"

    @property
    def snapshots_cfg(self) -> Path:
        """The submenu with all snapshots, which grub.cfg reads when it is opened."""
        return self.grub_cfg.with_name(SNAPSHOTS_CFG)

    def grub_file(self, name: str) -> str:
        """A file beside grub.cfg, as GRUB names it."""
        return f"/{self.volume_name('@boot')}/grub/{name}"

    @property
    def grub_kernels(self) -> str:
        """The directory with the copies of kernels, as GRUB names it."""
        return f"/{self.volume_name('@boot')}/kernels"

    def rootfs_name(self, which: int | str) -> str:
        """The root of a snapshot or slot, relative to the top level, as boot loader and fstab name it."""
        return f"{self.volume_name('@.snapshots')}/rootfs/snapshot-{which}"

    def rootfs(self, which: int | str) -> Path:
        return self.snapshots / f"rootfs/snapshot-{which}"

    def etc(self, which: int | str) -> Path:
        return self.snapshots / f"etc/etc-{which}"

    @property
    def private(self) -> list[Path]:
        """The directories of root alone: they keep files with the modes that they had, which were tightened since."""
        return [self.snapshots / name for name in ("rootfs", "etc", "boot")]

    def carried(self, slot: str) -> Path:
        """The /etc whose changes a slot's deployment has: the base for what is carried into it later."""
        return self.etc(f"carried-{slot}")

    def boot(self, which: int | str) -> Path:
        return self.snapshots / f"boot/boot-{which}"

    def copy(self, directory: str, which: int | str) -> Path:
        """The copy of a snapshot's /etc or /boot."""
        return self.etc(which) if directory == "etc" else self.boot(which)

    def undo(self, snapshot: int) -> Path:
        return self.snapshots / f"rootfs/undo-{snapshot}"

    def working_copy(self, name: int | str) -> Path:
        return self.rootfs(f"chr{name}")

    def work(self, name: int | str) -> Path:
        return self.ash / "work" / str(name)

    def description(self, snapshot: int) -> Path:
        return self.ash / f"snapshots/{snapshot}-desc"

    def packages(self, snapshot: int) -> Path:
        """The record of a snapshot's packages."""
        return self.ash / f"packages/{snapshot}"

    @property
    def unmerged(self) -> Path:
        """Has a directory for each merge that could not even put something into its conflicts directory."""
        return self.ash / "unmerged"

    def conflicts(self, snapshot: int) -> Path:
        """A new name for the directory that keeps what a merge did not apply."""
        directory = self.var / "lib/ash/conflicts" / f"{snapshot}-{time.strftime('%Y-%m-%dT%H%M%S')}"
        names = itertools.chain([directory.name], (f"{directory.name}-{number}" for number in itertools.count(2)))
        return next(new for name in names if not os.path.lexists(new := directory.with_name(name)))


# Relative to a root file system.
IN_ROOT_DB, IN_ROOT_SNAP, IN_ROOT_MUTABLE = "usr/share/ash/db", "usr/share/ash/snap", "usr/share/ash/mutable"
IN_ROOT_ID = "usr/share/ash/deployment"  # in a deployment: its slot and id
IN_ROOT_MENU = "usr/share/ash/menu"  # in a deployment: what is around its entries in grub.cfg
IN_ROOT_BOOT = "usr/share/ash/boot"  # how the kernel of a snapshot is started, for the menu with all snapshots
IN_ROOT_INIT = "usr/share/ash/init"  # what that kernel starts
IN_ROOT_SAVED = "usr/share/ash/saved"  # names what `etc-update` or `rollback` saved from a running /etc
IN_ROOT_LIVE = "usr/share/ash/live"  # exists in a deployment that was changed live and so differs from its snapshot


def in_database(name: str) -> str:
    """Where a root keeps a part of the package database: `lib/X` of /var is `X` there."""
    return f"{IN_ROOT_DB}/{name.removeprefix('lib/')}"


def is_mutable(root: Path) -> bool:
    return os.path.lexists(place_inside(root, IN_ROOT_MUTABLE))


def os_release(root: Path, key: str) -> str:
    """A value from a root's os-release; empty if it is not set."""
    path = path_inside(root, "etc/os-release")
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = re.search(rf"^{key}=(.*)$", text, re.MULTILINE)
    return found[1].strip("\"'") if found else ""


def mark_variant(root: Path) -> None:
    """Set VARIANT_ID=ashos in os-release, and keep the distribution's other lines."""
    path = path_inside(root, "etc/os-release")
    lines = lines_of(read_text(path))
    if os.path.lexists(path) and not path.is_file():
        raise AshError(f"/etc/os-release of {root.name} is not a regular file", "", REFUSED)
    if "VARIANT_ID=ashos" not in lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [line for line in lines if not line.startswith("VARIANT_ID=")]
        write_text(path, "\n".join([*others, "VARIANT_ID=ashos", ""]))


# --- Records and locks: small files with a known shape ---------------------------------------------------------


def has_shape(value: Any, shape: Any) -> bool:
    """Whether a value has a shape: type, `object` (any value), union of types, predicate, list or dict of shapes.

    A tuple has alternatives, None among them.
    The key "*" stands for any key. A key that ends in "?" may be missing; keys that are not in the shape are ignored.
    """
    if isinstance(shape, tuple):
        return any(value is None if one is None else has_shape(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(one, shape[0]) for one in value)
    if isinstance(shape, dict) and "*" in shape:
        return isinstance(value, dict) and all(has_shape(one, shape["*"]) for one in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            has_shape(value[name], of) if (name := key.rstrip("?")) in value else name != key
            for key, of in shape.items()
        )
    if isinstance(shape, UnionType):
        return type(value) in shape.__args__
    return shape in (type(value), object) if isinstance(shape, type) else bool(shape(value))


def from_json(text: str, shape: Any) -> Any:
    """Parse JSON. Raises ValueError if the text is not JSON or has another shape."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not has_shape(value, shape):
        raise ValueError("it has unexpected content")
    return value


U32_MAX = 2**32 - 1  # the limit of uids and gids; the numbers of subvolumes and snapshots stay far below


def is_u32(value: Any) -> bool:
    """Whether a value can be the number of a snapshot or subvolume, or a uid or gid."""
    return type(value) is int and 0 <= value <= U32_MAX


def is_text(value: Any) -> bool:
    """Whether a value is text that can be encoded; JSON may contain lone surrogates, which cannot."""
    try:
        return isinstance(value, str) and value.encode("utf-8", "surrogateescape") is not None
    except UnicodeEncodeError:
        return False


def is_line(value: Any) -> bool:
    """Whether a value is text on a single line."""
    return is_text(value) and "\n" not in value


def is_inner_path(value: Any) -> bool:
    """Whether a value is a relative path that stays below its start: no empty, "." or ".." components."""
    return is_text(value) and not {"", ".", ".."} & set(value.split("/")) and "\0" not in value


def is_name(value: Any) -> bool:
    """Whether a value is a name of letters, digits and a few characters without a special meaning."""
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", value))


def to_number(text: str) -> int | None:
    """The number that a text contains; None if it is not a number, or out of range."""
    text = text.strip()
    number = int(text) if re.fullmatch("[0-9]{1,10}", text) else -1
    return number if is_u32(number) else None


def fields_of(kind: type[NamedTuple], data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that the data has. Keys that another version of ash added are ignored."""
    return {name: data[name] for name in kind._fields if name in data}


def numbered(directory: Path, prefix: str, suffix: str = "") -> dict[int, Path]:
    """The paths in a directory whose names are a prefix, a number and a suffix, by number."""
    found = {path.name.removeprefix(prefix).removesuffix(suffix): path for path in directory.glob(f"{prefix}*{suffix}")}
    numbers = {name: to_number(name) for name in sorted(found) if name.isdecimal()}
    return {number: found[name] for name, number in numbers.items() if number is not None}


def read_distro(path: Path) -> tuple[str, str]:
    """Read ash's `distro` file: the id of the distribution, and that of its module."""
    words = read_text(path).split()
    if not words or not all(is_name(word) for word in words):
        raise AshError(f"{path} is missing or damaged", "--distro ID")
    return words[0], words[-1]


def open_lock(path: Path) -> int:
    """Open a lock file, and create it if it is missing. Only root may read it: read access is enough to lock a file."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


class Lock:
    """An flock on a small file that names its holder. It lasts until every process that inherited it has ended.

    Entering it raises AshError (LOCKED) if another process still holds it after `wait` seconds. `what` is for the
    message: what is locked.
    """

    UNSIGNED: ClassVar = 0.2  # seconds in which a new holder writes its name, and a process that only tests it lets go

    def __init__(self, path: Path, what: str, wait: float = 0) -> None:
        self.path, self.what, self.wait = path, what, wait
        self.descriptor = -1

    def __enter__(self) -> Self:
        give_up = time.monotonic() + self.wait
        while not self._take():
            late, holder = time.monotonic() - give_up, self._holder()
            if late >= (0 if holder else self.UNSIGNED):
                message = f"{self.what} is locked by {holder or 'another ash'}"
                raise AshError(message, "--wait SECONDS waits for it", LOCKED)
            time.sleep(0.05)
        command = one_line(" ".join(["ash", *sys.argv[1:]]))
        with contextlib.suppress(OSError):  # the lock does not depend on its text: the disk may be full
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, os.fsencode(f"pid {os.getpid()} ({command})\n"), 0)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)

    def _holder(self) -> str:
        """The holder that the file names; empty if that process has ended: the present one has not written yet."""
        with contextlib.suppress(OSError):  # deleted together with its snapshot
            signed = self.path.read_text(errors="replace").strip()
            named = re.match(r"pid (\d+) ", signed)
            return signed if named and Path("/proc", named[1]).exists() else ""
        return ""

    def _take(self) -> bool:
        """Open the lock file and try to lock it; False if another process holds it or the file was just deleted."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = open_lock(self.path)
        except FileNotFoundError:
            return False  # its directory was just deleted, together with its snapshot
        except OSError as error:
            if error.errno != errno.EROFS or not self.path.exists():
                raise
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)  # for a command that only reads
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self.descriptor).st_ino == self.path.stat().st_ino:
                return True
        except (BlockingIOError, FileNotFoundError):
            pass  # held by another process, or deleted with its snapshot between open and flock
        os.close(self.descriptor)
        return False


def locker_of(lock: Path) -> int | None:
    """The pid that took the flock on a file; children may have inherited it. None if nobody holds it."""
    inode, (major, minor) = lock.stat().st_ino, map(int, mount_of(lock).device.split(":"))
    # Example: "1: FLOCK  ADVISORY  WRITE 71 00:1f:257 0 EOF".
    wanted = rf"\d+: FLOCK +\w+ +\w+ +(-?\d+) {major:02x}:{minor:02x}:{inode} "
    lines = lines_of(read_text(Path("/proc/locks")))
    return next((int(found[1]) for line in lines if (found := re.match(wanted, line))), None)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    try:
        with contextlib.suppress(FileNotFoundError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:
        return locker_of(lock) is not None
    return False


def holder_of(lock: Path) -> str:
    """The holder of a lock: from the lock file or, without permission to read it, from /proc/locks."""
    with contextlib.suppress(PermissionError):
        return lock.read_text(errors="replace").strip()
    pid = locker_of(lock)
    command = read_text(Path(f"/proc/{pid}/cmdline")).rstrip("\0").replace("\0", " ")
    return f"pid {pid} ({command})" if pid else ""


def state_lock(layout: Layout, wait: float = 0) -> Lock:
    """The lock of the tree, the numbers and the history; it is held for milliseconds."""
    return Lock(layout.work("state") / "lock", f"state of {layout.distro}", max(wait, 10))


# --- The tree --------------------------------------------------------------------------------------------------


class Tree:
    """The parent/child relation of all snapshots: an anytree whose nodes are named by snapshot numbers."""

    def __init__(self) -> None:
        from anytree import AnyNode

        self.root = AnyNode(name="root")
        self.nodes: dict[int, AnyNode] = {}

    @classmethod
    def parse(cls, text: str) -> Tree:
        """Parse the tree file: one line, either ours (JSON) or AshOS's (a Python literal with numbers as strings)."""
        tree = cls()
        try:
            data = cls._literal(text)
            if not has_shape(data, {"name": str, "children?": list}) or data["name"] != "root":
                raise ValueError("it has no root")
            tree._add_children(None, data)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:  # TypeError: a list as key
            what = str(error) or "it is nested too deeply"
            raise AshError(f"the tree file cannot be read: {what}", "ash fsck --repair rebuilds it") from None
        return tree

    def _add_children(self, parent: int | None, data: Mapping[str, Any]) -> None:
        for child in data.get("children", []):
            name = child.get("name") if isinstance(child, dict) and child.keys() <= {"name", "children"} else None
            number = to_number(name) if isinstance(name, str) else name if is_u32(name) else None
            if number is None or not isinstance(child.get("children", []), list):
                raise ValueError("it is not a tree of numbers")
            if number in self.nodes:
                raise ValueError("a number is there twice")
            self.add(number, parent)
            self._add_children(number, child)

    @staticmethod
    def _literal(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            import ast
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # hide SyntaxWarnings caused by its content
                return ast.literal_eval(text.strip())

    def dump(self) -> str:
        """The content of the tree file."""
        return json.dumps(self._as_data(self.root)) + "\n"

    @classmethod
    def _as_data(cls, node: AnyNode) -> dict[str, Any]:
        """A node and its descendants in the form of anytree's DictExporter, whose import costs more than this."""
        children = [cls._as_data(child) for child in node.children]
        return {"name": node.name, **({"children": children} if children else {})}

    def numbers(self) -> list[int]:
        """All snapshots, parents first."""
        return [node.name for node in self.root.descendants]

    def __contains__(self, snapshot: int) -> bool:
        return snapshot in self.nodes

    def _node(self, snapshot: int) -> AnyNode:
        if snapshot not in self.nodes:
            raise AshError(f"snapshot {snapshot} does not exist", "ash tree lists the snapshots", MISSING)
        return self.nodes[snapshot]

    def branch(self, snapshot: int) -> list[int]:
        """A snapshot and all its descendants, parents first."""
        return [snapshot, *(descendant.name for descendant in self._node(snapshot).descendants)]

    def parent(self, snapshot: int) -> int | None:
        """The parent's number; None for a top-level snapshot."""
        name = self._node(snapshot).parent.name
        return None if name == "root" else int(name)

    def add(self, snapshot: int, parent: int | None = None) -> None:
        """Add a new snapshot as the last child of its parent, or at the top level."""
        from anytree import AnyNode

        above = self.root if parent is None else self._node(parent)
        self.nodes[snapshot] = AnyNode(name=snapshot, parent=above)

    def remove(self, snapshot: int) -> None:
        """Remove a snapshot and all its descendants."""
        for number in self.branch(snapshot):
            self.nodes.pop(number).parent = None

    def take_out(self, snapshot: int) -> None:
        """Remove one snapshot only; its children move up to its parent."""
        node = self._node(snapshot)
        for child in node.children:
            child.parent = node.parent
        self.nodes.pop(snapshot).parent = None

    def walk(self) -> Iterator[tuple[int, int]]:
        """All snapshots, parents first, with their depth; 0 is the top level."""
        waiting = [(node, 0) for node in reversed(self.root.children)]
        while waiting:
            node, depth = waiting.pop()
            yield node.name, depth
            waiting += [(child, depth + 1) for child in reversed(node.children)]

    def draw(self, label: Callable[[int], str], ascii_only: bool = False) -> str:
        """The tree as text, one line for each snapshot."""
        from anytree import AsciiStyle, ContStyle, RenderTree

        rows = RenderTree(self.root, style=AsciiStyle() if ascii_only else ContStyle())
        lines = [f"{row.pre}{label(row.node.name)}" for row in rows if row.node is not self.root]
        return "\n".join(["root - root", *lines])


# --- Configuration ---------------------------------------------------------------------------------------------

CONF_EXAMPLE = """\
# ash's configuration: key::value lines, lists by comma.
# Of this snapshot:
# mutable_dirs::opt/games
# mutable_dirs_shared::usr/local
# Of the machine, read from the running system's /etc. What `ash auto-upgrade` does, every night if ash-upgrade.timer
# is enabled: none, check, stage (upgrade but do not deploy), deploy, reboot (in the window).
# auto_upgrade::deploy
# auto_upgrade_window::02:00-05:00
# auto_upgrade_base::True
# How often GRUB tries to start a new deployment before it goes back to the last good one, and how many minutes it has
# for that:
# boot_tries::3
# boot_timeout::10
"""


class Configuration:
    """The content of /etc/ash.conf."""

    # No mutable directories: ash, the boot or every program needs what a root itself has there, or mounts there.
    NEVER_MUTABLE = (
        r"(\.snapshots|bin|boot|dev|etc|lib\w*|proc|run|sbin|sys|tmp|usr/share/ash)(/.*)?"
        r"|usr|usr/(bin|lib\w*|sbin|share)|home|root|var|var/lib"
    )
    # The pattern of a value, and its description for the user.
    SWITCH = ("True|False", "True or False")
    ANYTHING = (".*", "")
    KEYS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "aur": SWITCH,
        "auto_upgrade": ("none|check|stage|deploy|reboot", "none, check, stage, deploy or reboot"),
        "auto_upgrade_base": SWITCH,
        "boot_timeout": (r"[1-9]\d{0,3}", "a number of minutes, at most 9999"),
        "boot_tries": (r"\d", "a number from 0, which means no automatic fallback, to 9"),
        "auto_upgrade_window": (r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", "times such as 02:00-05:00"),
        "mutable_dirs": ANYTHING, "mutable_dirs_shared": ANYTHING, "upself": ANYTHING,
    }  # fmt: skip

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    @classmethod
    def parse(cls, text: str, strict: bool = False) -> Configuration:
        """Parse `key::value` lines; empty lines and comments are skipped. Raises AshError (USAGE) for other lines.

        A key that ash does not know may be for a later version: it is an error with `strict`, else a warning.
        """
        values = {}
        for number, line in enumerate(lines_of(text), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key, separator, value = line.partition("::")
            if separator and re.fullmatch(r"\w+", key.strip()) and key.strip() not in cls.KEYS and not strict:
                console.warn(f"line {number} of ash.conf has no effect: this ash knows no key {key.strip()}")
                continue
            if not separator or key.strip() not in cls.KEYS:
                hint = f"a line is KEY::VALUE; keys are {', '.join(sorted(cls.KEYS))}"
                raise AshError(f"line {number} of ash.conf is wrong: {line.strip()!r}", hint, USAGE)
            pattern, wanted = cls.KEYS[key.strip()]
            if not re.fullmatch(pattern, value.strip(), re.IGNORECASE | re.ASCII):
                raise AshError(f"line {number} of ash.conf is wrong: {line.strip()!r}", f"it must be {wanted}", USAGE)
            values[key.strip()] = value.strip()
        found = cls(values)
        for key in ("mutable_dirs", "mutable_dirs_shared"):
            found.require_possible(key, strict)
        return found

    def require_possible(self, key: str, strict: bool) -> None:
        """Raise AshError (USAGE) if a list has a directory that cannot be mutable; name those that have no effect."""
        if wrong := [path for path in self.paths(key) if re.fullmatch(self.NEVER_MUTABLE, path)]:
            what = f"ash.conf, {key}: /{wrong[0]} cannot be a mutable directory: the system itself is there"
            raise AshError(what, "name one inside /opt, /srv, /usr/local and the like", USAGE)
        written = [part.strip() for part in self.values.get(key, "").split(",") if part.strip()]
        if len(self.paths(key)) < len(written):
            what = f"ash.conf, {key}: {one_line(', '.join(written))} has a path that leads out of the root, or none"
            if strict:
                raise AshError(what, "write such as opt/games,usr/local/share", USAGE)
            console.warn(f"{what}: it has no effect")

    def is_on(self, key: str) -> bool:
        return self.values.get(key, "").lower() == "true"

    def paths(self, key: str) -> list[str]:
        """The directories in a list, relative to the root. Paths that lead out of the root are ignored."""
        written = [part.strip().split("/") for part in self.values.get(key, "").split(",")]
        listed = ["/".join(name for name in names if name not in ("", ".")) for names in written]
        return [path for path in listed if is_inner_path(path) and path.isprintable()]


def mutable_place(snapshot: int) -> str:
    """Where a snapshot's own mutable directories are stored below @.snapshots_D."""
    return f"mutable_dirs/snapshot-{snapshot}"


def mutable_directories(root: Path, snapshot: int) -> list[tuple[str, str]]:
    """A root's mutable directories: where each is stored below @.snapshots_D (AshOS's paths), its path in the root."""
    path = path_inside(root, "etc/ash.conf")
    conf = Configuration.parse(path.read_text(errors="replace")) if path.is_file() else Configuration({})
    own = [(f"{mutable_place(snapshot)}/{name}", name) for name in conf.paths("mutable_dirs")]
    return own + [(f"mutable_dirs/{name}", name) for name in conf.paths("mutable_dirs_shared")]


# Directories of a root that are mounted from /var, by lines that are written once: writable, shared by all snapshots.
SHARED_DIRECTORIES = ("mnt", "srv")


def shared_directories(root: Path) -> list[str]:
    """Those of the SHARED_DIRECTORIES that a root's fstab mounts from /var."""
    lines = lines_of(read_text(path_inside(root, "etc/fstab")))
    return [
        name for name in SHARED_DIRECTORIES if any(line.split()[:2] == [f"/var/{name}", f"/{name}"] for line in lines)
    ]


def make_mutable_directory(layout: Layout, kept: str) -> Path:
    """Create the directory in which a mutable one is stored. Raises AshError (REFUSED) if its path has a symlink."""
    directory = layout.snapshots / kept
    if path_inside(layout.snapshots, kept) != directory:
        raise AshError(f"the path of {kept} contains a symlink", "name its target with ash edit-conf N", REFUSED)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


# --- History ---------------------------------------------------------------------------------------------------


class History:
    """The log of all changes: a line of JSON for each commit, each failed command, and each change without a commit.

    The process that finishes a commit records it, be it the command itself or recovery: see WorkDir.record().
    """

    TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
    PACKAGE_KEYS: ClassVar[Mapping[str, Any]] = {f"{kind}?": dict for kind in ("added", "removed", "upgraded")}
    # The keys that `ash log` shows; a line may lack any of them, and has others.
    SHAPE: ClassVar[Mapping[str, Any]] = {
        "time?": str, "user?": is_u32, "command?": str, "arguments?": list, "snapshots?": [is_u32], "result?": str,
        "packages?": PACKAGE_KEYS,
        "changes?": [{"packages?": PACKAGE_KEYS}],  # of several snapshots: an older ash wrote one line for all
    }  # fmt: skip

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def append(self, entry: Mapping[str, Any], again: bool = False) -> bool:
        """Append a line and sync it. False if the lock is held for too long; on a full disk the line is lost.

        With `again`, skip the line if one with its "id" exists: an interrupted process may have written it.
        """
        try:
            self._append(entry, again)
        except (AshError, OSError) as error:
            is_locked = isinstance(error, AshError) and error.status == LOCKED
            console.say(f"warning: this is {'not yet' if is_locked else 'not'} in the history: {reason(error)}")
            return not is_locked
        return True

    def _append(self, entry: Mapping[str, Any], again: bool) -> None:
        line = json.dumps({"time": time.strftime(self.TIME_FORMAT), **entry}).encode() + b"\n"
        with state_lock(self.layout), self.layout.history.open("ab+") as file:
            if again and entry["id"] and any(known.get("id") == entry["id"] for known in self.read()):
                return
            self.make_private()
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a crash has torn the last one
            about_to("write the history")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @property
    def is_private(self) -> bool:
        """Whether only root and the group adm may read it: what was typed may contain passwords."""
        with contextlib.suppress(FileNotFoundError):
            return not self.layout.history.stat().st_mode & 0o027
        return True

    def make_private(self) -> None:
        """Give it to the group adm of the base, if that has it, and to nobody else."""
        if not self.is_private:
            groups = read_text(path_inside(self.layout.rootfs(BASE), "etc/group"))
            found = re.search(r"^adm:[^:]*:(\d{1,9}):", groups, re.MULTILINE)
            about_to("make the history private")
            os.chown(self.layout.history, 0, int(found[1]) if found else 0)
            self.layout.history.chmod(0o640)

    def read(self) -> list[dict[str, Any]]:
        """All lines, oldest first, without those that a crash has torn; PermissionError if we may not read it."""
        entries = []
        for line in lines_of(read_text(self.layout.history)):
            with contextlib.suppress(ValueError):
                entries.append(from_json(line, self.SHAPE))
        return entries


def timestamp_of(entry: Mapping[str, Any]) -> float:
    """When a line of the history was written, in seconds since 1970; 0 if the line does not say."""
    from datetime import datetime

    with contextlib.suppress(ValueError, OverflowError):  # a year out of range, for one
        return datetime.strptime(entry.get("time", ""), History.TIME_FORMAT).astimezone().timestamp()
    return 0


def births(history: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Each snapshot's creation that the history records: its number, the original's, the line.

    An older ash wrote a single line when it copied a branch, with all copies in it.
    """
    for entry in history:
        if entry.get("result") == "done" and is_u32(entry.get("from")):
            copies = entry.get("copies", {str(entry["from"]): entry.get("snapshot")})
            for old, new in copies.items() if isinstance(copies, dict) else ():
                original = to_number(old)
                if original is not None and is_u32(new):
                    yield new, original, entry


def recorded_parents(history: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """The parent that each snapshot was created below, deleted snapshots included; top-level ones are left out."""
    parents: dict[int, int] = {}
    for number, original, entry in births(history):
        above = entry.get("parent")
        if original != entry["from"]:  # copied together with its branch
            above, copies = parents.get(original), entry["copies"]
            while above is not None and str(above) not in copies:  # that one was taken out meanwhile
                above = parents.get(above)
            above = copies.get(str(above))
        if isinstance(above, int) and 0 <= above < number:  # parents are older: anything else is not from ash
            parents[number] = above
    return parents


def tree_from_history(numbers: Iterable[int], history: Iterable[Mapping[str, Any]]) -> Tree:
    """The tree of these snapshots, each below its nearest recorded ancestor that is among them."""
    tree, parents = Tree(), recorded_parents(history)
    for number in sorted(numbers):
        above = parents.get(number)
        while above is not None and above not in tree:
            above = parents.get(above)
        tree.add(number, above)
    return tree


def recorded_description(number: int, history: Sequence[Mapping[str, Any]]) -> str:
    """The last description of a snapshot that the history has; empty if the history does not know the snapshot."""
    own = [entry for entry in history if entry.get("result") == "done" and entry.get("snapshot") == number]
    if given := [entry["description"] for entry in own if is_line(entry.get("description"))]:
        return str(given[-1])
    # An older ash recorded the descriptions that `desc` gave, but not those that snapshots were created with.
    return next((f"copy of {original}" for new, original, _ in births(history) if new == number), "")


def origins(number: int, history: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """A snapshot and its originals, nearest first: the snapshot, what it was copied from, what that was copied from...

    The values say up to which line of the history each counts: the copying of it; for the snapshot itself, the end.
    """
    born = {new: (line, old) for line, entry in enumerate(history) for new, old, _ in births([entry])}
    found = {number: len(history)}
    while number in born and born[number][1] < number:  # originals are older: anything else is not from ash
        line, number = born[number]
        found[number] = line
    return found


# --- btrfs: a subvolume is known by its id, never by its name --------------------------------------------------

# From <linux/btrfs.h>. We call these ioctls ourselves: each run of the program `btrfs` takes 3 ms.
BTRFS_IOC_SNAP_CREATE_V2, BTRFS_IOC_SUBVOL_CREATE_V2, BTRFS_IOC_SNAP_DESTROY = 0x50009417, 0x50009418, 0x5000940F
BTRFS_IOC_SYNC, BTRFS_IOC_SUBVOL_SETFLAGS = 0x9408, 0x4008941A
BTRFS_IOC_FS_INFO, BTRFS_IOC_DEV_INFO = 0x8400941F, 0xD000941E
BTRFS_IOC_GET_SUBVOL_INFO, BTRFS_IOC_GET_SUBVOL_ROOTREF, BTRFS_IOC_INO_LOOKUP_USER = 0x81F8943C, 0xD000943D, 0xD000943E
BTRFS_SUBVOL_RDONLY, BTRFS_ROOT_SUBVOL_RDONLY = 2, 1  # the flag in a request, and in a root item (<linux/btrfs_tree.h>)
VOLUME_ARGUMENTS = struct.Struct("=q8xQ32x4040s")  # btrfs_ioctl_vol_args_v2: fd, -, flags, -, name
SUBVOLUME_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the inode number of every subvolume's root


def ask_btrfs(directory: Path, request: int, argument: bytes = b"") -> bytes:
    """Call a btrfs ioctl on a directory. Returns the argument as the kernel filled it in."""
    answer = bytearray(argument)
    with open_descriptor(directory, os.O_DIRECTORY) as descriptor:
        fcntl.ioctl(descriptor, request, answer)
    return bytes(answer)


class Subvolume(NamedTuple):
    """A subvolume's root item, as the kernel reports it."""

    id: int
    readonly: bool
    made: int  # creation time, seconds since 1970
    uuid: bytes
    parent_uuid: bytes  # of the subvolume it is a snapshot of; zeros if it is not a snapshot
    otransid: int  # btrfs transaction that created it
    ctransid: int  # btrfs transaction that last changed it

    @classmethod
    def at(cls, path: Path) -> Subvolume:
        """The subvolume that contains a path. Needs no privileges. Raises OSError if there is none."""
        answer = ask_btrfs(path, BTRFS_IOC_GET_SUBVOL_INFO, bytes(504))
        # struct btrfs_ioctl_get_subvol_info_args: treeid at 0; flags, uuid, parent_uuid at 288; ctransid, otransid at
        # 344; otime at 392.
        flags, uuid, parent_uuid = struct.unpack_from("=Q16s16s", answer, 288)
        ctransid, otransid = struct.unpack_from("=QQ", answer, 344)
        ident, made = (struct.unpack_from("=Q", answer, at)[0] for at in (0, 392))
        return cls(ident, bool(flags & BTRFS_ROOT_SUBVOL_RDONLY), made, uuid, parent_uuid, otransid, ctransid)


class Contents:
    """Tells which subvolumes have identical contents, from their root items, without reading any file.

    A snapshot that was never written to is identical to its source as of the source's last change.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], int] = {}  # by uuid and ctransid

    def of(self, path: Path) -> int:
        """An id for a subvolume's contents: equal for subvolumes that are certainly identical."""
        sub = Subvolume.at(path)
        states = [(sub.uuid, sub.ctransid)]
        if any(sub.parent_uuid) and sub.ctransid <= sub.otransid:
            states.append((sub.parent_uuid, sub.ctransid))
        content = next((self._known[state] for state in states if state in self._known), sub.id)
        self._known |= dict.fromkeys(states, content)
        return content


def is_subvolume(path: Path) -> bool:
    """Whether a path is the root of a subvolume, not a symlink to one."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_ino == SUBVOLUME_INODE


def is_subvolume_or_its_place(path: Path) -> bool:
    """Whether a path is a subvolume, or the empty directory that a snapshot has in the place of a nested one."""
    status = status_of(path)
    is_one = status is not None and status.st_ino in (SUBVOLUME_INODE, EMPTY_SUBVOLUME_INODE)
    return is_one and is_directory(path)


def subvolume_at(path: Path) -> Subvolume | None:
    """The subvolume whose root is at a path; None if there is none, or it was deleted meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return Subvolume.at(path) if is_subvolume(path) else None
    return None


def subvolume_id(path: Path) -> int:
    """The id of the subvolume that contains a path."""
    return Subvolume.at(path).id


def is_writable(path: Path) -> bool:
    """Whether a subvolume exists and does not have the read-only flag."""
    try:
        return not Subvolume.at(path).readonly
    except OSError:
        return False


def create_subvolume(path: Path) -> None:
    about_to(f"create {path.name}")
    try:
        ask_btrfs(path.parent, BTRFS_IOC_SUBVOL_CREATE_V2, VOLUME_ARGUMENTS.pack(0, 0, os.fsencode(path.name)))
    except OSError as error:
        raise AshError(f"cannot create the subvolume {path.name}: {error.strerror}") from error


def snapshot_subvolume(source: Path, target: Path, readonly: bool = False) -> None:
    """Create a btrfs snapshot of a subvolume."""
    about_to(f"snapshot {source.name} as {target.name}")
    with open_descriptor(source, os.O_DIRECTORY) as descriptor:
        flags = BTRFS_SUBVOL_RDONLY if readonly else 0
        arguments = VOLUME_ARGUMENTS.pack(descriptor, flags, os.fsencode(target.name))
        try:
            ask_btrfs(target.parent, BTRFS_IOC_SNAP_CREATE_V2, arguments)
        except OSError as error:
            raise AshError(f"cannot snapshot {source.name} as {target.name}: {error.strerror}") from error


def set_readonly(path: Path, readonly: bool = True) -> None:
    about_to(f"make {path.name} {'read-only' if readonly else 'writable'}")
    ask_btrfs(path, BTRFS_IOC_SUBVOL_SETFLAGS, struct.pack("=Q", BTRFS_SUBVOL_RDONLY if readonly else 0))


def sync_filesystem(path: Path) -> None:
    """Commit the current btrfs transaction to disk. Unlike fsync's log tree, GRUB can read this."""
    about_to("sync")
    ask_btrfs(path, BTRFS_IOC_SYNC)


def sync_any_filesystem(directory: Path) -> None:
    """syncfs(2): write everything of the file system of a directory to disk, which need not be btrfs."""
    with open_descriptor(directory, os.O_DIRECTORY) as descriptor:
        libc("syncfs", descriptor)


def is_mounted(path: Path) -> bool:
    """Whether the subvolume that contains a path is mounted. (Mounts of other btrfs file systems have ids as well.)"""
    ident, device = subvolume_id(path), mount_of(path).device
    return any(m.subvolume == ident and m.device == device for m in mounts())


def nested_subvolumes(path: Path) -> list[Path]:
    """The subvolumes nested directly in one, found by scanning all its directories."""
    found: list[Path] = []
    todo = [path]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for directory in [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]:
                (found if is_subvolume(directory) else todo).append(directory)
    return found


def is_default_subvolume(path: Path) -> bool:
    """Whether a subvolume is the one that is mounted if none is named."""
    said = run(["btrfs", "subvolume", "get-default", path.parent]).stdout  # such as "ID 258 gen 7 top level 5 path x"
    return said.split()[1:2] == [str(subvolume_id(path))]


DEFERRED = "deleted-"  # the beginning of the name of a subvolume that is yet to be deleted
DEFERRED_IN = ("rootfs", "etc", "boot")  # the directories of @.snapshots_D with such


def defer_deletion(path: Path) -> None:
    """Set a subvolume aside that cannot be deleted now; delete_deferred() does it later. OSError if that fails."""
    rename(path, path.with_name(f"{DEFERRED}{path.name}.{os.urandom(4).hex()}"))
    console.say(f"{path.name} is in use, such as by btrfs send: its space is freed later")


def destroy_subvolume(path: Path) -> bool:
    """Delete a subvolume and all nested ones. False if btrfs does not permit it now: it is being sent."""
    about_to(f"delete {path.name}")
    arguments = struct.pack("=q4088s", 0, os.fsencode(path.name))  # struct btrfs_ioctl_vol_args
    destroy = partial(ask_btrfs, path.parent, BTRFS_IOC_SNAP_DESTROY, arguments)
    try:
        try:
            destroy()
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                set_readonly(path, False)
                if not all(destroy_subvolume(nested) for nested in nested_subvolumes(path)):
                    return False
            elif error.errno == errno.EPERM and flags_of(path) & PROTECTING:
                set_readonly(path, False)
                unprotect(path)
            elif error.errno == errno.EPERM and is_default_subvolume(path):
                # The old ash made a slot the default subvolume, which cannot be deleted. 5 is the id of the top level.
                run(["btrfs", "subvolume", "set-default", "5", path.parent])
            else:
                raise
            destroy()
    except OSError as error:
        if error.errno == errno.EPERM:
            return False
        raise AshError(f"cannot delete {path.name}: {error.strerror}") from error
    return True


def delete_subvolume(path: Path, even_mounted: bool = False) -> None:
    """Delete a subvolume and all nested ones. It may be missing.

    One that is being sent (`btrfs send`) cannot be deleted before that ends: it gets another name until then. One that
    is mounted is not deleted, though the kernel would not refuse: with `even_mounted` it gets another name, else that
    is an AshError.
    """
    if not os.path.lexists(path):
        return
    mounted = is_mounted(path)
    if mounted and not even_mounted:
        raise AshError(f"{path.name} is mounted: not deleted", "", REFUSED)
    if not mounted and destroy_subvolume(path):
        return
    if path.parent.name not in DEFERRED_IN:
        raise AshError(f"cannot delete {path.name}: it is in use, such as by btrfs send", "", REFUSED)
    try:
        defer_deletion(path)
    except OSError as error:
        raise AshError(f"cannot delete {path.name}: {error.strerror}") from error


def subvolumes_inside(path: Path) -> list[Path]:
    """nested_subvolumes() from btrfs's root refs, without scanning. Empty if the subvolume was deleted meanwhile."""
    found: list[Path] = []
    try:
        # struct btrfs_ioctl_get_subvol_rootref_args: minimal id; 255 pairs of id and directory inode; their number.
        answer = ask_btrfs(path, BTRFS_IOC_GET_SUBVOL_ROOTREF, bytes(4096))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return []
        if error.errno != errno.EOVERFLOW:
            raise
        return nested_subvolumes(path)  # more than 255
    for at in range(8, 8 + answer[4088] * 16, 16):
        ident, directory = struct.unpack_from("=QQ", answer, at)
        with contextlib.suppress(FileNotFoundError):
            # struct btrfs_ioctl_ino_lookup_user_args: directory inode, id, name, path of the directory.
            named = ask_btrfs(path, BTRFS_IOC_INO_LOOKUP_USER, struct.pack("=QQ4080x", directory, ident))
            name, inside = named[16:272].split(b"\0")[0], named[272:].split(b"\0")[0]
            found.append(path / os.fsdecode(inside) / os.fsdecode(name))
    return sorted(found)


def copy_as_subvolume(directory: Path, new: Path) -> None:
    """Copy a directory's contents into a new read-only subvolume, replacing an unfinished one."""
    delete_subvolume(new)
    create_subvolume(new)
    copy_tree(directory, new)
    set_readonly(new)


def replace_subvolume(new: Path, target: Path) -> None:
    """Rename a subvolume over another one, which is then deleted, or to a free name."""
    if target.exists():
        exchange(new, target)
        delete_subvolume(new, even_mounted=True)
    else:
        rename(new, target)


def wait_for_space(path: Path, seconds: float) -> int:
    """The bytes available on a file system. If they are too few, wait for those of subvolumes that were just deleted.

    btrfs deletes them in the background and, without a sync, gives their space free up to 30 seconds later.
    """
    end = time.monotonic() + seconds
    while (free := free_space(path)) < SPACE_FLOOR and time.monotonic() < end:
        ask_btrfs(path, BTRFS_IOC_SYNC)
        time.sleep(0.1)
    return free


def delete_deferred(layout: Layout) -> None:
    """Delete the subvolumes whose deletion had to be deferred, unless they are still in use."""
    for directory in DEFERRED_IN:
        for path in (layout.snapshots / directory).glob(f"{DEFERRED}*"):
            with contextlib.suppress(AshError, OSError):  # another ash deletes it, or the next one does
                if not is_mounted(path):
                    destroy_subvolume(path)


def renew_copy(layout: Layout, snapshot: int, directory: str) -> None:
    """Copy a snapshot's /etc or /boot to `etc-N` or `boot-N` again, replacing the old copy atomically."""
    require_directories(layout.rootfs(snapshot))
    target, new = layout.copy(directory, snapshot), layout.copy(directory, f"new-{snapshot}")
    copy_as_subvolume(layout.rootfs(snapshot) / directory, new)
    replace_subvolume(new, target)


# From <linux/btrfs.h>: _IOW(0x94, 38, struct btrfs_ioctl_send_args): fd, number of clone sources, their address, the
# parent's id, flags, version. The program `btrfs send` would take as long to start as most comparisons take.
BTRFS_IOC_SEND = 0x40489426
SEND_ARGUMENTS = struct.Struct("=qQQQQI28x")
BTRFS_SEND_FLAG_NO_FILE_DATA, BTRFS_SEND_FLAG_VERSION = 1, 8
# From the kernel's fs/btrfs/send.h: commands, what they do to the path that they name, and attributes.
SEND_EFFECTS = {
    **dict.fromkeys((3, 4, 5, 6, 7, 8, 10), "added"),  # MKFILE, MKDIR, MKNOD, MKFIFO, MKSOCK, SYMLINK, LINK
    **dict.fromkeys((11, 12), "removed"),  # UNLINK, RMDIR
    # Attributes, WRITE, CLONE, TRUNCATE, CHMOD, CHOWN, UPDATE_EXTENT; in version 2 also FALLOCATE and FILEATTR (flags).
    **dict.fromkeys((13, 14, 15, 16, 17, 18, 19, 22, 23, 24), "changed"),
}
SEND_RENAME, SEND_UTIMES = 9, 20
SEND_PATH, SEND_PATH_TO = 15, 16
ORPHAN = r"o\d+-\d+-\d+"  # the temporary name of something that is yet to be renamed


def commands_in_stream(stream: bytes) -> Iterator[tuple[int, str, str]]:
    """Parse a btrfs send stream. Yields each command but changes of times, with its path and, if any, target path."""
    end = len(b"btrfs-stream\0") + 4
    while end < len(stream):
        length, command = struct.unpack_from("<IH", stream, end)
        at, end = end + 10, end + 10 + length  # a header, then attributes: type, length, value
        if command == SEND_UTIMES:
            continue
        paths = {SEND_PATH: "", SEND_PATH_TO: ""}
        while at < end:
            kind, size = struct.unpack_from("<HH", stream, at)
            if kind in paths:
                paths[kind] = os.fsdecode(stream[at + 4 : at + 4 + size])
            at += 4 + size
        yield command, paths[SEND_PATH], paths[SEND_PATH_TO]


def changes_in_stream(stream: bytes) -> dict[str, str]:
    """The paths a btrfs send stream adds, removes or changes. One that is removed and added again has changed."""
    changes: dict[str, str] = {}

    def note(path: str, kind: str) -> None:
        before = changes.get(path)
        if path.startswith("o") and re.fullmatch(ORPHAN, path.partition("/")[0]):
            return
        if {before, kind} == {"added", "removed"}:
            changes[path] = "changed"
        elif before is None or kind != "changed":
            changes[path] = kind

    for command, path, target in commands_in_stream(stream):
        if command == SEND_RENAME:
            note(path, "removed")
            note(target, "added")
        elif command in SEND_EFFECTS:
            note(path, SEND_EFFECTS[command])
    return changes


def changed_paths(old: Path, new: Path) -> dict[str, str]:
    """The paths at which two read-only snapshots differ: "added", "removed" or "changed", not in its times alone.

    Kernels before 6.0 know version 1 of the stream only, which says nothing about inode flags.
    """
    ident, flags = subvolume_id(old), BTRFS_SEND_FLAG_NO_FILE_DATA
    with os.fdopen(os.memfd_create("send"), "rb") as stream:
        send = partial(SEND_ARGUMENTS.pack, stream.fileno(), 0, 0, ident)
        try:
            try:
                ask_btrfs(new, BTRFS_IOC_SEND, send(flags | BTRFS_SEND_FLAG_VERSION, 2))
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                ask_btrfs(new, BTRFS_IOC_SEND, send(flags, 0))
        except OSError as error:
            raise AshError(f"cannot compare {old.name} with {new.name}: {error.strerror}") from error
        return changes_in_stream(stream.read())


# From <linux/btrfs.h>: _IOWR(0x94, 17, struct btrfs_ioctl_search_args_v2): a key (a tree, 0 for that of the directory;
# ranges of object ids, offsets, transactions and types; a number of items), the size of the buffer, the buffer.
BTRFS_IOC_TREE_SEARCH_V2 = 0xC0709411
SEARCH_KEY, SEARCH_BUFFER = struct.Struct("=QQQQQQQIIII32xQ"), 1 << 20
SEARCH_HEADER = struct.Struct("=QQQII")  # of each item: transaction, object id, offset, type, length
BTRFS_INODE_ITEM = 1
U64_MAX = 2**64 - 1


def changed_inodes(subvolume: Path, since: int) -> set[int]:
    """The inodes of a subvolume that were changed in btrfs transactions later than a number."""
    if not Subvolume.at(subvolume).readonly:
        sync_filesystem(subvolume)  # the search does not see what is only in memory
    found: set[int] = set()
    first = SUBVOLUME_INODE
    while first < U64_MAX:
        key = (0, first, U64_MAX, 0, U64_MAX, since + 1, U64_MAX, BTRFS_INODE_ITEM, BTRFS_INODE_ITEM, U32_MAX, 0)
        answer = ask_btrfs(
            subvolume, BTRFS_IOC_TREE_SEARCH_V2, SEARCH_KEY.pack(*key, SEARCH_BUFFER).ljust(SEARCH_BUFFER + 112, b"\0")
        )
        (items,) = struct.unpack_from("=I", answer, 64)
        at, first = 112, first if items else U64_MAX
        for _ in range(items):
            _, inode, _, kind, length = SEARCH_HEADER.unpack_from(answer, at)
            at += SEARCH_HEADER.size
            # struct btrfs_inode_item begins with the transactions of its creation and of its last change.
            if kind == BTRFS_INODE_ITEM and struct.unpack_from("=Q", answer, at + 8)[0] > since:
                found.add(inode)
            at, first = at + length, inode + 1
    return found


def delete_stale_views(layout: Layout) -> None:
    """Delete the views of killed processes, unless some process is using a view now."""
    directory = layout.work("views")
    directory.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_lock(directory / "lock"), "r+b") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for view in directory.glob("view-*"):
            delete_subvolume(view)


@contextmanager
def readonly_view(layout: Layout, path: Path) -> Iterator[Path]:
    """The subvolume itself if it is read-only, otherwise a read-only snapshot of it for the duration of the block."""
    if Subvolume.at(path).readonly:
        yield path
        return
    delete_stale_views(layout)
    with os.fdopen(open_lock(layout.work("views") / "lock"), "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        view = layout.work("views") / f"view-{os.urandom(8).hex()}"
        snapshot_subvolume(path, view, readonly=True)
        try:
            yield view
        finally:
            delete_subvolume(view)


# From <linux/fs.h>: struct file_dedupe_range (offset, length, count) and one file_dedupe_range_info (descriptor,
# offset, bytes, status). btrfs takes at most 16 MiB at a time.
FIDEDUPERANGE = 0xC0189436
DEDUPE = struct.Struct("=QQHHIqQQiI")
DEDUPE_AT_ONCE = 16 << 20
SMALLEST_SHARED = 2049  # btrfs stores files of up to 2048 bytes in its metadata (max_inline): they have no blocks


def share_file(source: Path, target: Path, size: int) -> int:
    """Make a file share the blocks of another where their contents are equal. Returns the bytes shared."""
    done = 0
    with contextlib.suppress(OSError), source.open("rb") as old, target.open("rb") as new:
        while done < size:
            length = min(DEDUPE_AT_ONCE, size - done)
            request = bytearray(DEDUPE.pack(done, length, 1, 0, 0, new.fileno(), done, 0, 0, 0))
            fcntl.ioctl(old, FIDEDUPERANGE, request)
            *_, shared, status, _ = DEDUPE.unpack(request)
            if status or not shared:
                break
            done += shared
    return done


def share_written(layout: Layout, number: int, written: Iterable[str], known: dict[tuple[str, int], list[Path]]) -> int:
    """Make the files that were written in a snapshot share blocks with equal files of others. Returns the bytes saved.

    `known` has the files of others by path and size; those of this one are added.
    """
    saved = 0
    for path in written:
        directory, _, inside = path.partition("/")
        copies = [layout.copy(directory, number) / inside] if directory in ("etc", "boot") else []
        for file in (layout.rootfs(number) / path, *copies):
            size = size_of(file)
            if size >= SMALLEST_SHARED:
                others = known.setdefault((path, size), [])
                shared = next((n for other in others if (n := share_file(other, file, size))), 0)
                others += [] if shared else [file]
                saved += shared
    return saved


# --- Disk images -----------------------------------------------------------------------------------------------


SUPERBLOCK_AT, BTRFS_MAGIC = 0x10000, b"_BHRfS_M"  # bytes from the start of the device


def uuid_text(uuid: bytes) -> str:
    digits = uuid.hex()
    return "-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]])


def file_system_id(path: Path) -> str:
    """The UUID of the btrfs file system that contains a directory. Raises OSError if it is another file system."""
    answer = ask_btrfs(path, BTRFS_IOC_FS_INFO, bytes(1024))
    return uuid_text(answer[16:32])


class Superblock(NamedTuple):
    """Which file system a btrfs device belongs to; a copy of the device has both UUIDs too."""

    uuid: str
    device_uuid: str

    @classmethod
    def on(cls, device: Path) -> Superblock | None:
        """The superblock on a device; None if there is none, or the device cannot be read."""
        with contextlib.suppress(OSError), device.open("rb") as disk:
            return cls.at(disk, 0)
        return None

    @classmethod
    def at(cls, disk: BinaryIO, start: int) -> Superblock | None:
        """The superblock of a partition of an open disk, which begins at a byte of it; None if there is none."""
        disk.seek(start + SUPERBLOCK_AT)
        block = disk.read(4096)
        if block[0x40:0x48] == BTRFS_MAGIC:
            return cls(uuid_text(block[0x20:0x30]), uuid_text(block[0x10B:0x11B]))
        return None


def mounted_devices() -> Iterator[tuple[str, int, Path]]:
    """The devices of mounted btrfs file systems: the UUID of the mount, the device's number, its usual node.

    If a copy of a mounted file system is mounted as well, the kernel gives that mount a temporary UUID.
    """
    for entry in sorted(Path("/sys/fs/btrfs").glob("*/devices/*")):
        with contextlib.suppress(OSError, ValueError):  # unmounted meanwhile
            major, minor = map(int, read_text(entry / "dev").split(":"))
            yield entry.parent.parent.name, os.makedev(major, minor), Path("/dev", entry.name)


def is_node(path: Path, number: int) -> bool:
    """Whether a path is the node of a block device."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return stat.S_ISBLK(status.st_mode) and status.st_rdev == number
    return False


def device_nodes(path: Path) -> list[Path]:
    """Nodes of mounted devices that may be that of the btrfs that contains a path, the likely ones first.

    None of them is certain: mountinfo names the node that was last used to mount it, perhaps in another namespace; and
    the kernel forgets the temporary UUID of a copy when that is mounted again.
    """
    uuid, named = file_system_id(path), Path(mount_of(path).source)
    mounted = sorted(mounted_devices(), key=lambda device: device[0] != uuid)
    nodes = [named for _, number, _ in mounted if is_node(named, number)]
    nodes += [node for _, number, node in mounted if is_node(node, number)]
    return list(dict.fromkeys(nodes))


UDEV_RECORDS = Path("/run/udev/data")


def superblock_of(device: int) -> Superblock | None:
    """The superblock on a block device, by number: as udev has recorded it, which wakes no disk and needs no root.

    Without udev it is read from the device; None if it has none.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    if UDEV_RECORDS.is_dir():
        record = read_text(UDEV_RECORDS / f"b{number}")
        known = dict(re.findall(r"^E:ID_FS_(TYPE|UUID|UUID_SUB)=(.*)$", record, re.MULTILINE))
        is_btrfs = known.get("TYPE") == "btrfs" and known.keys() >= {"UUID", "UUID_SUB"}
        return Superblock(known["UUID"], known["UUID_SUB"]) if is_btrfs else None
    node = Path("/dev", Path(f"/sys/dev/block/{number}").resolve().name)
    return Superblock.on(node) if is_node(node, device) else None


def uuid_on_disk(path: Path) -> str | None:
    """The UUID of the btrfs that contains a path, as it is on its disk; None if no node of the device is known."""
    return next((there.uuid for node in device_nodes(path) if (there := Superblock.on(node))), None)


def _devices_twice(ours: Superblock, own: int) -> list[str]:
    """The devices of the file system of a superblock that are there twice, except the device `own`, which has it."""
    found = {ours: [""]}
    for entry in sorted(Path("/sys/class/block").glob("*")):
        if any((entry / "holders").glob("*")):
            continue  # another device, such as a RAID, shows what is on it
        with contextlib.suppress(OSError, ValueError):  # it was detached meanwhile
            major, minor = map(int, read_text(entry / "dev").split(":"))
            number = os.makedev(major, minor)
            there = superblock_of(number) if number != own else None
            if there is not None and there.uuid == ours.uuid:
                found.setdefault(there, []).append(f"/dev/{entry.name}")
    return [name for names in found.values() if len(names) > 1 for name in names if name]


def copies_of_disk(device: Path) -> list[str]:
    """The other block devices that have the file system of a device, with the same UUIDs."""
    with contextlib.suppress(OSError):  # another namespace's name of the device
        own = device.stat().st_rdev
        if (ours := superblock_of(own) or Superblock.on(device)) is not None:
            return _devices_twice(ours, own)
    return []


def device_of(path: Path) -> Path | None:
    """The node by which the kernel knows a device of the btrfs that contains a path; None if it knows none."""
    (highest,) = struct.unpack_from("=Q", ask_btrfs(path, BTRFS_IOC_FS_INFO, bytes(1024)))
    for ident in range(1, highest + 1):
        with contextlib.suppress(OSError):  # a device with this id was removed
            # struct btrfs_ioctl_dev_info_args: id at 0, the path of the device at 3072.
            answer = ask_btrfs(path, BTRFS_IOC_DEV_INFO, struct.pack("=Q4088x", ident))
            return Path(os.fsdecode(answer[3072:].split(b"\0")[0]))
    return None


def mount_btrfs(device: Path, place: Path, options: str, readonly: bool = False) -> None:
    """Mount a btrfs device, visible to this process only.

    A copy of a file system has the same UUID. Since 6.7 Linux can mount both at once, but while one of them is being
    mounted or unmounted it may refuse the other (EEXIST, seen with 6.18): we retry for two seconds.
    """
    flags = MS_NOATIME | (MS_RDONLY if readonly else 0)
    give_up = time.monotonic() + 2
    while True:
        try:
            mount(device, place, "btrfs", flags, options)
            return
        except AshError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            if time.monotonic() > give_up:
                raise AshError(error.message, "unmount the mounted copy of this file system") from error
        time.sleep(0.05)


def mount_top(device: Path, readonly: bool = False) -> Path:
    """Mount the top level of a btrfs device, visible to this process only."""
    top = PRIVATE / "top"
    top.mkdir(exist_ok=True)
    mount_btrfs(device, top, "subvolid=5,compress=zstd", readonly)
    return top


def mount_top_of(path: Path, readonly: bool = False) -> Path:
    """Mount the top level of the btrfs that contains a path, visible to this process only.

    AshError (REFUSED) if it cannot be found: a copy of a file system has the same UUID, so what was mounted is compared
    with what is at the path by the kernel's number of the file system.
    """
    wanted, others = mount_of(path).device, []
    for device in device_nodes(path):
        top = mount_top(device, readonly=True)
        if mount_of(top).device == wanted:
            if not readonly:
                mount("none", top, flags=MS_BIND | MS_REMOUNT | MS_NOATIME)
            return top
        others.append(device)
        libc("umount2", os.fsencode(top), 0)
    what = f"cannot find the device of {path}" + (f", which is not {listed(others)}" if others else "")
    raise AshError(what, "detach other disks with the same UUID", REFUSED)


GPT_ENTRY, GPT_LIMIT = 128, 1 << 20  # bytes: minimal size of an entry, and more than any table has
BTRFS_DEVICES_AT = 0x48  # in the superblock, from the magic number: of how many devices the file system consists
QCOW_MAGIC = b"QFI\xfb"


def require_raw(image: Path) -> None:
    """Raise AshError if a disk image has QEMU's own format."""
    with image.open("rb") as disk:
        if disk.read(len(QCOW_MAGIC)) == QCOW_MAGIC:
            hint = f"qemu-img convert -O raw {image} {image.with_suffix('.img')}"
            raise AshError(f"{image} has the format qcow2, not raw", hint, USAGE)


def partitions_of(disk: BinaryIO) -> Iterator[tuple[int, int]]:
    """Offset and size in bytes of each partition on a disk image (GPT, sectors of 512 bytes)."""
    disk.seek(512)
    header = disk.read(92).ljust(92, b"\0")
    table, count, size = struct.unpack_from("<QII", header, 72)
    sectors = os.fstat(disk.fileno()).st_size // 512  # a corrupt table may point beyond the end
    if header[:8] == b"EFI PART" and table < sectors and size >= GPT_ENTRY and count * size <= GPT_LIMIT:
        disk.seek(table * 512)
        entries = disk.read(count * size)
        for at in range(0, len(entries) - GPT_ENTRY + 1, size):
            first, last = struct.unpack_from("<QQ", entries, at + 32)
            if 0 < first <= last < sectors:
                yield first * 512, (last - first + 1) * 512


def btrfs_partition(image: Path) -> tuple[int, int]:
    """Offset and size in bytes of the btrfs partition on a disk image."""
    require_raw(image)
    with image.open("rb") as disk:
        for start, size in partitions_of(disk):
            disk.seek(start + SUPERBLOCK_AT + 0x40)
            superblock = disk.read(BTRFS_DEVICES_AT + 8)
            if superblock.startswith(BTRFS_MAGIC):
                devices = int.from_bytes(superblock[BTRFS_DEVICES_AT:], "little")
                if devices > 1:
                    hint = "attach all of them, mount the file system, and use --root DIR"
                    raise AshError(f"{image} has one of {devices} devices of its file system", hint, REFUSED)
                return start, size
    raise AshError(f"{image} is not a disk image with a btrfs partition", "init.py --image creates one")


# From <linux/loop.h>: requests; struct loop_info64 (device, inode, -, offset, sizelimit, -, flags, names and keys).
# We call the ioctls ourselves: mount(8) or losetup(8), with the import of subprocess, add 5 ms to every command.
LOOP_GET_STATUS64, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C05, 0x4C0A, 0x4C82
LOOP_INFO = struct.Struct("=5Q12xI160x16x")
LO_FLAGS_AUTOCLEAR = 4


def opened_loop(disk: int, image: Path, place: tuple[int, int]) -> int:
    """Open the loop device that a part of an open file is attached to; -1 if there is none.

    AshError (LOCKED) if only another part is that overlaps. The EFI partition is while an ash has GRUB count, and the
    whole disk is during an installation.
    """
    file, (start, size), other = os.fstat(disk), place, ""
    for entry in Path("/sys/block").glob("loop*/loop"):  # exists while the device is attached
        device = Path("/dev", entry.parent.name)
        with contextlib.suppress(OSError), open_descriptor(device, os.O_RDONLY) as loop:  # it was detached meanwhile
            info = LOOP_INFO.unpack(fcntl.ioctl(loop, LOOP_GET_STATUS64, bytes(LOOP_INFO.size)))
            if info[:2] == (file.st_dev, file.st_ino):
                there, limit = info[3:5]
                if (there, limit) == place:
                    return os.dup(loop)
                if there >= start + size or (limit and there + limit <= start):
                    continue
                other = str(device)
    if other:
        raise AshError(f"{image} is attached as {other}", f"losetup --detach {other}", LOCKED)
    return -1


def open_new_loop(disk: int, image: Path, offset: int = 0, size: int = 0) -> int:
    """Attach a part of an open file (size 0: to its end) to a new loop device, and open that."""
    give_up = time.monotonic() + 10
    while True:
        try:
            with Path("/dev/loop-control").open("rb") as control:
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            with open_descriptor(Path(f"/dev/loop{number}"), os.O_RDWR) as loop:
                # Autoclear is set in the same step (Linux 5.8), so that not even SIGKILL leaves a device behind.
                info = LOOP_INFO.pack(0, 0, 0, offset, size, LO_FLAGS_AUTOCLEAR)
                fcntl.ioctl(loop, LOOP_CONFIGURE, struct.pack("=II", disk, 0) + info + bytes(64))
                return os.dup(loop)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > give_up:  # EBUSY: another process took the device
                raise AshError(f"cannot attach {image}: {error.strerror}", "modprobe loop") from error


def lock_first_byte(descriptor: int, image: Path) -> None:
    """Wait until no other ash is attaching the image: normally milliseconds, at most ten seconds."""
    for _ in range(1000):
        with contextlib.suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            return
        time.sleep(0.01)
    raise AshError(f"{image} is locked by another program", "", LOCKED)


def refuse_if_in_a_machine(descriptor: int, image: Path) -> None:
    """Raise AshError if QEMU has the image open: it then holds locks on bytes 100 to 299 (its file-posix.c)."""
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query)
    if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
        raise AshError(f"{image} is in use by a virtual machine", "shut it down first", LOCKED)


@contextmanager
def node_of_part(disk: BinaryIO, image: Path, place: tuple[int, int]) -> Iterator[tuple[Path, int]]:
    """A device node for a part of an open image, and its number. The kernel detaches it once nobody uses it any more.

    Until the file is closed no other ash attaches a part of the image.
    """
    refuse_if_in_a_machine(disk.fileno(), image)
    # Two loop devices on one file would be two writers to one file system. So only one ash at a time looks for an
    # attached device, and it is not detached while we have it open.
    lock_first_byte(disk.fileno(), image)
    loop = opened_loop(disk.fileno(), image, place)
    if loop < 0:
        loop = open_new_loop(disk.fileno(), image, *place)
    try:
        # A node with another name: GRUB's scripts resolve a loop device to its backing file, which is not a disk. With
        # the number in it, it cannot be the name by which another ash has mounted a copy of this disk.
        number = os.fstat(loop).st_rdev
        node = PRIVATE / f"disk-{os.major(number)}-{os.minor(number)}"
        os.mknod(node, 0o600 | stat.S_IFBLK, number)
        yield node, number
    finally:
        os.close(loop)


def attach_disk(stack: ExitStack, image: Path) -> tuple[Path, Path]:
    """Mount the top level of a disk image's file system. Returns the mount point and the device node.

    Nothing needs cleaning up: the kernel detaches the loop device with the last mount, and drops the mounts, which are
    private, when this process ends. Until the stack is closed no other ash attaches the image.
    """
    place = btrfs_partition(image)
    disk = stack.enter_context(image.open("rb+"))
    with node_of_part(disk, image, place) as (node, number):
        for _ in range(3):  # another process that mounts it too may have given it another name right now
            top = mount_top(node)
            there = device_of(top)
            if there and is_node(there, number):
                return top, node
            libc("umount2", os.fsencode(top), 0)
        raise AshError(f"{image} was to be mounted, but Linux mounted {there}", "unmount other copies of it", REFUSED)


# --- Package managers ------------------------------------------------------------------------------------------


class TransientFile(NamedTuple):
    """A file that exists in a root only while a program runs there in a transaction."""

    text: str
    mode: int = 0o644


class PackageManager(Protocol):
    """What ash asks of a package manager, which knows nothing about btrfs, snapshots or booting.

    Queries take a root, which may be read-only. They should read files, so that `ash list` needs no privileges and
    little time; where a database can only be read by its own tools, a query may run a tool of the root or of the
    host, and raises AshError if it lacks the privileges for that.

    Changes take a transaction: `work.run()` runs a program in the working copy of the snapshot, `work.root` is that
    copy and `work.var` the /var that it started with. If the transaction only simulates (`work.simulate`), they put
    what they would do into `work.change`.
    """

    # Directories below /var that describe what is in /usr and /etc: they belong to the snapshot.
    database: ClassVar[tuple[str, ...]] = ()
    database_files: ClassVar[tuple[str, ...]] = ()  # single files of that kind, whose tools would replace a symlink
    caches: ClassVar[tuple[str, ...]] = ()  # entries of /var that are caches or lists: the newest file wins
    logs: ClassVar[tuple[str, ...]] = ()  # entries of /var that are logs: what was appended is appended
    # Downloaded packages, as glob patterns below /var: complete files that the package manager verifies again.
    downloads: ClassVar[tuple[str, ...]] = ()
    transient: ClassVar[Mapping[str, TransientFile]] = {}  # by their paths from the root
    environment: ClassVar[Mapping[str, str]] = {}  # added to that of programs in a transaction
    audit: ClassVar[str] = ""  # the command that reports in full what problems() finds

    def prepare_base(self, root: Path) -> None:
        """Configure the package manager in a new base; `root` is writable."""

    def installed(self, root: Path) -> dict[str, str]:
        """The installed packages of a root and their versions."""

    def canonical_name(self, root: Path, name: str) -> str:  # noqa: ARG002
        """The name by which installed() lists a package that the user may also name otherwise."""
        return name

    def has_installed(self, root: Path, packages: Sequence[str]) -> bool:
        """Whether installing these packages would certainly change nothing."""

    def is_older(self, version: str, other: str) -> bool:
        """Whether a version sorts before another in the package manager's own order."""

    def has_state(self, root: Path, package: str) -> bool:
        """Whether an installed package owns something in /var/lib."""

    def claims(self, root: Path, entry: str) -> set[str]:
        """The installed packages that own an entry of /var, by their file lists or their names."""

    def config_files(self, root: Path) -> set[str]:
        """The configuration files of all packages, as paths from the root."""

    def is_default(self, root: Path, path: str, content: bytes) -> bool:  # noqa: ARG002
        """Whether a configuration file of a package in this root has the content that the package delivers."""
        return False

    def files(self, root: Path, directory: str) -> set[str]:
        """The paths below a directory that packages own, relative to it; files made by scripts are unknown."""

    def problems(self, root: Path) -> list[str]:
        """What is wrong with the package database of a root, a line for each problem."""

    def automatic(self, root: Path) -> set[str]:
        """The installed packages that were installed only as dependencies."""

    def held(self, root: Path) -> set[str]:
        """The packages of a root that are held at their versions."""

    def repositories(self, root: Path) -> str:
        """Identifies the repositories of a root: roots with the same answer can share package lists."""

    def install(self, work: Transaction, packages: Sequence[str], remove: Sequence[str] = ()) -> None:
        """Install packages (names, or paths in the root) and remove others, in one run of the package manager."""

    def remove(self, work: Transaction, packages: Sequence[str], purge: bool) -> None:
        """Remove packages, and dependencies that nothing needs any more."""

    def refresh(self, work: Transaction) -> list[str]:
        """Fetch the package lists. Returns the errors of repositories that failed; RepositoryError if all did."""

    def upgrade(self, work: Transaction, download_only: bool = False) -> None:
        """Upgrade all packages to the versions in the present package lists."""

    def repair(self, work: Transaction) -> None:
        """Finish half-installed packages, reinstall damaged ones, renew keyring and lists, as far as possible."""

    def hold(self, work: Transaction, packages: Sequence[str], held: bool) -> None:
        """Hold packages at their versions, or release them."""

    def available(self, work: Transaction, packages: Sequence[str]) -> set[str]:
        """Those of the packages that the repositories have."""

    def reconcile(self, work: Transaction, missing: Mapping[str, bool], unwanted: Sequence[str]) -> None:
        """Install missing packages, {name: whether it is only a dependency}, and remove unwanted ones.

        Unwanted packages that others depend on stay, as dependencies.
        """

    def download(self, work: Transaction, packages: Sequence[str]) -> None:
        """Download packages and their dependencies without installing them."""


class PackageError(ProgramError):
    """The package manager failed; the message is its output."""


class RepositoryError(PackageError):
    """The repositories cannot be reached or used, from whichever snapshot."""


# --- Shared libraries ------------------------------------------------------------------------------------------

PROGRAM_DIRECTORIES = ("usr/bin", "usr/sbin", "usr/games", "usr/lib", "usr/libexec", "usr/local", "opt")
LDD_BATCH = 1000  # programs for one run of ldd


def programs_below(root: Path, directory: str) -> Iterator[str]:
    """The executable ELF files below a directory of a root, as paths from the root."""
    for path in paths_below(root / directory):
        file = root / directory / path
        status = file.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_mode & 0o111:
            with file.open("rb") as program:
                if program.read(4) == b"\x7fELF":
                    yield f"{directory}/{path}"


LINKER_SETTINGS = r"ld\.so\.conf(\.d/.*)?"  # the files in /etc that name directories with libraries


def update_library_cache(chroot: Chroot, changed: Iterable[str]) -> None:
    """Have the programs of a root find its libraries where these paths in its /etc say, if they are LINKER_SETTINGS."""
    is_concerned = any(re.fullmatch(LINKER_SETTINGS, path) for path in changed)
    if is_concerned and any(path_inside(chroot.root, f"{path}/ldconfig").exists() for path in SYSTEM_PATH.split(":")):
        status = chroot.run(["ldconfig", "-X"])  # -X: /usr stays as it is
        if status:
            raise AshError(f"ldconfig failed ({status})")


def unresolved_libraries(chroot: Chroot, programs: Sequence[str]) -> set[str]:
    """The libraries that programs need and the root's own dynamic linker does not find."""
    said: list[bytes] = []
    for start in range(0, len(programs), LDD_BATCH):
        batch = programs[start : start + LDD_BATCH]
        chroot.run(["ldd", "/bin/sh", *(f"/{path}" for path in batch)], hear=said.append)
    program, missing, resolved = "", set(), 0
    for line in lines_of(b"".join(said).decode(errors="replace")):
        if line.startswith("/") and line.endswith(":"):
            program = line[:-1]
        elif "not found" in line:
            missing.add(f"{program} lacks {line.split()[0]}")
        resolved += program == "/bin/sh" and " => /" in line
    return missing if resolved or not programs else {"ldd does not say which libraries programs need"}


def missing_libraries(work: Transaction) -> set[str]:
    """The libraries that programs of a transaction's root miss, and did not miss before."""
    programs = [path for directory in PROGRAM_DIRECTORIES for path in programs_below(work.root, directory)]
    missing = unresolved_libraries(work.chroot(), sorted(programs))
    if not missing:  # nearly always: the state before need not be examined
        return missing
    before = work.place.before
    snapshot_subvolume(work.original, before)
    old_programs = [path for path in programs if (before / path).is_file()]
    known = unresolved_libraries(work.chroot()._replace(root=before), sorted(old_programs))
    delete_subvolume(before)
    return missing - known


# --- The init system: ash's own units --------------------------------------------------------------------------


def unit_lines(key: str, values: Iterable[str]) -> str:
    """The lines of a unit that give a key these values."""
    return "".join(f"{key}={value}\n" for value in values)


# What recovery has to do. A work directory of a finished transaction contains a lock and nothing else.
UNFINISHED = (
    "/.snapshots/ash/work/*/[!l]*",
    "/.snapshots/[ber]*/deleted-*",
    "/.snapshots/rootfs/snapshot-chr*",
    "/.snapshots/rootfs/snapshot-new-*",
)
# Recovers before anything uses /var.
RECOVER_UNIT = f"""\
[Unit]
Description=Finish or undo interrupted changes of snapshots
DefaultDependencies=no
RequiresMountsFor=/.snapshots /var /run
Before=local-fs.target systemd-random-seed.service systemd-journal-flush.service systemd-tmpfiles-setup.service
Conflicts=shutdown.target
Before=shutdown.target
ConditionKernelCommandLine=|ash.fellback
{unit_lines("ConditionPathExistsGlob", (f"|{path}" for path in UNFINISHED))}
[Service]
Type=oneshot
ExecStart={{ash}} recover
"""
# Notes what runs before anything can be changed in it: commands on the disk of a machine that is off go by this note.
# No Python: every boot waits for it.
NOTE_BOOTED = (
    f"cp -T /{IN_ROOT_ID} /.snapshots/ash/booted.new",
    "sync /.snapshots/ash/booted.new",
    "mv -T /.snapshots/ash/booted.new /.snapshots/ash/booted",
)
BOOTED_UNIT = f"""\
[Unit]
Description=Note which deployment runs
DefaultDependencies=no
RequiresMountsFor=/.snapshots
Before=local-fs.target ash-recover.service
Conflicts=shutdown.target
Before=shutdown.target
ConditionPathExists=/{IN_ROOT_ID}

[Service]
Type=oneshot
{unit_lines("ExecStart", NOTE_BOOTED)}"""
# For an empty /etc/machine-id, as in an image that is copied to many machines, or a missing one. The root is read-only
# when systemd looks at it: it puts an id from /run over the file, and the writable /etc then hides that from
# systemd-machine-id-commit.service. An id that is there stays: a soft reboot may leave another one in /run.
HAS_MACHINE_ID = 'grep -qx "[0-9a-f][0-9a-f]*" /etc/machine-id'
MACHINE_ID_UNIT = f"""\
[Unit]
Description=Keep the machine id that was chosen at the first boot
DefaultDependencies=no
RequiresMountsFor=/etc /run
Before=local-fs.target
Conflicts=shutdown.target
Before=shutdown.target
ConditionFileNotEmpty=|!/etc/machine-id
ConditionFileNotEmpty=|/run/machine-id

[Service]
Type=oneshot
ExecStart=sh -c '{HAS_MACHINE_ID} || cp -T /run/machine-id /etc/machine-id || \
    systemd-machine-id-setup'
ExecStart=sync /etc/machine-id
"""
# Keeps root from writing to a deployment through /.snapshots by mistake. In fstab it would form a cycle with /etc.
PROTECT, UNPROTECT = "mount -o bind,ro /.snapshots/rootfs /.snapshots/rootfs", "umount /.snapshots/rootfs"
PROTECT_UNIT = f"""\
[Unit]
Description=Protect snapshots and deployments from being written to
DefaultDependencies=no
After=local-fs.target ash-recover.service
Before=sysinit.target
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={PROTECT}
ExecStop={UNPROTECT}
"""
# Stopped after all other services, with everything still mounted, so that their last writes to /etc are carried too.
CARRY_UNIT = """\
[Unit]
Description=Carry changes of /etc over to the deployment for the next boot
DefaultDependencies=no
After=local-fs.target ash-protect.service
Before=sysinit.target
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
ExecStop={ash} carry
# It may have to make an initramfs.
TimeoutStopSec=10min
"""
# While a deployment is on trial nothing waits for a human: it counts as not started, and the machine starts again. Once
# it is known to be good, it keeps its shells.
ON_TRIAL_ONLY = """\
ConditionKernelCommandLine=ash.trial
ConditionPathExists=!/run/ash-good
"""
# If what is asked for does not help, the kernel itself restarts.
RESTART_AT_LAST = "sleep 60; echo b > /proc/sysrq-trigger"
TRIAL_MINUTES = 'grep -Eo "ash[.]trial=[0-9]+" /proc/cmdline | tr -dc 0-9'
TRIAL_COMMAND = f"sleep $({TRIAL_MINUTES})m || exit; systemctl --force reboot & {RESTART_AT_LAST}"
TRIAL_UNIT = f"""\
[Unit]
Description=Restart a new deployment that does not come up in time
DefaultDependencies=no
{ON_TRIAL_ONLY}IgnoreOnIsolate=yes
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStart=sh -c '{TRIAL_COMMAND.replace("$", "$$")}'
"""
# A shutdown stops the check of a deployment, and systemd calls that a failure: the conflict keeps it from restarting a
# machine that is to be powered off.
RESTART_UNIT = f"""\
[Unit]
Description=Restart a new deployment that failed, instead of waiting for a human
DefaultDependencies=no
{ON_TRIAL_ONLY}Before=emergency.service rescue.service
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
ExecStart=systemctl --force reboot
"""
# The directories with programs that say whether a system is healthy: ash's own, and those of greenboot. If a required
# one fails, a deployment on trial counts as not started.
REQUIRED_CHECKS = ("etc/ash/health.d", "usr/lib/greenboot/check/required.d", "etc/greenboot/check/required.d")
WANTED_CHECKS = ("usr/lib/greenboot/check/wanted.d", "etc/greenboot/check/wanted.d")
# After everything that a boot starts; other checks may come before boot-complete.target too.
HEALTH_UNIT = f"""\
[Unit]
Description=Run the health checks of a new deployment
Documentation=man:ash(8)
DefaultDependencies=no
After=multi-user.target
Before=boot-complete.target
Conflicts=shutdown.target
Before=shutdown.target
{unit_lines("ConditionDirectoryNotEmpty", (f"|/{path}" for path in (*REQUIRED_CHECKS, *WANTED_CHECKS)))}
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={{ash}} health
"""
BLESS_UNIT = """\
[Unit]
Description=Note that the running deployment is good
Documentation=man:ash(8)
DefaultDependencies=no
Requires=boot-complete.target
After=boot-complete.target multi-user.target
OnFailure=ash-restart.service
OnFailureJobMode=fail
Conflicts=shutdown.target
Before=shutdown.target
ConditionKernelCommandLine=|ash.trial
ConditionKernelCommandLine=|ash.fellback

[Service]
Type=oneshot
RemainAfterExit=yes
# The system is up; if that cannot be noted, a restart does not help.
ExecStart=-{ash} bless
ExecStart=touch /run/ash-good
ExecStart=systemctl stop --no-block ash-trial.service
"""
# Started by the timer, which the administrator enables; /etc/ash.conf says what to do.
UPGRADE_UNIT = """\
[Unit]
Description=Upgrade the booted snapshot, check it, deploy it
Documentation=man:ash(8)
Wants=network-online.target
After=network-online.target time-sync.target

[Service]
Type=oneshot
ExecStart={ash} auto-upgrade
Nice=19
IOSchedulingClass=idle
"""
UPGRADE_TIMER = """\
[Unit]
Description=Upgrade the booted snapshot every night
Documentation=man:ash(8)

[Timer]
OnCalendar=02:00
RandomizedDelaySec=3h
Persistent=true

[Install]
WantedBy=timers.target
"""


# --- The init system: ash's own scripts for OpenRC -------------------------------------------------------------

# They do what the units of the same names do. What they are ordered by are scripts of Debian; all of these that use a
# local file system come after mountall-bootclean. Nobody else makes a machine id here.
RECOVER_SCRIPT = f"""\
#!/sbin/openrc-run
description="Note which deployment runs, and finish or undo interrupted changes of snapshots"

depend() {{
	use mountall
	before mountall-bootclean bootmisc
}}

start() {{
	[ ! -e /{IN_ROOT_ID} ] || {{ {" && ".join(NOTE_BOOTED)}; }}
	{HAS_MACHINE_ID} || tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id
	! grep -q "ash[.]fellback=" /proc/cmdline || {{ @ASH@ recover; return; }}
	for path in {" ".join(UNFINISHED)}; do
		[ ! -e "$path" ] || {{ @ASH@ recover; return; }}
	done
}}
"""
PROTECT_SCRIPT = f"""\
#!/sbin/openrc-run
description="Protect snapshots and deployments from being written to"

depend() {{
	use mountall
	after ash-recover
	before mountall-bootclean bootmisc
}}

start() {{
	{PROTECT}
}}

stop() {{
	! mountpoint -q /.snapshots/rootfs || {UNPROTECT}
}}
"""
# In the runlevel "default", which is stopped while everything is still mounted; what is started first is stopped last.
CARRY_SCRIPT = """\
#!/sbin/openrc-run
description="Carry changes of /etc over to the deployment for the next boot"

depend() {
	before *
}

start() {
	return 0
}

stop() {
	@ASH@ carry
}
"""
# For init too, see TRIAL_TAB: it must not need OpenRC. Debian's scripts start sulogin where systemd would enter
# emergency.target, and so does init where it would enter rescue.target.
TRIAL_SCRIPT = f"""\
#!/bin/sh
### BEGIN INIT INFO
# Provides:          ash-trial
# Required-Start:
# Required-Stop:
# X-Start-Before:    mountdevsubfs checkroot
# Default-Start:     S
# Default-Stop:
# Short-Description: Restart a new deployment that does not come up in time, or waits for a human
### END INIT INFO
PATH=/usr/sbin:/usr/bin:/sbin:/bin
minutes=$({TRIAL_MINUTES})

case $1 in
start)
	[ -z "$minutes" ] || setsid --fork "$0" watch < /dev/null > /dev/null 2>&1
	;;
watch)
	seconds=$((minutes * 60))
	while [ ! -e /run/ash-good ]; do
		if [ "$seconds" -le 0 ] || pidof sulogin; then
			reboot -f &
			{RESTART_AT_LAST}
		fi
		sleep 1
		seconds=$((seconds - 1))
	done
	;;
esac
"""
# Has init itself start that script, once it is done with what starts OpenRC: that may be broken.
TRIAL_TAB = "ash:12345:once:/etc/init.d/ash-trial start\n"
# Debian's scripts go on if a file system of fstab cannot be mounted.
BLESS_SCRIPT = f"""\
#!/sbin/openrc-run
description="Run the health checks, and note that the running deployment is good"

depend() {{
	after *
}}

is_mounted() {{
	findmnt --fstab --noheadings --output TARGET --options nonoauto,nonofail,no_netdev \\
		--types nonfs,nfs4,smbfs,cifs,ceph | while read -r place; do
		case $place in
		/*) mountpoint -q "$place" || {{ eerror "$place is not mounted"; return 1; }} ;;
		esac
	done
}}

is_healthy() {{
	for check in {" ".join(f"/{path}/*" for path in (*REQUIRED_CHECKS, *WANTED_CHECKS))}; do
		[ ! -e "$check" ] || {{ @ASH@ health; return; }}
	done
}}

start() {{
	if is_mounted && is_healthy; then
		# The system is up; if that cannot be noted, a restart does not help.
		! grep -Eq "ash[.](trial|fellback)=" /proc/cmdline || @ASH@ bless
		touch /run/ash-good
	elif runlevel 2> /dev/null | grep -q " [06]$"; then
		return 1 # a shutdown has stopped a check
	elif grep -q "ash[.]trial=" /proc/cmdline && [ ! -e /run/ash-good ]; then
		reboot -f
	else
		return 1
	fi
}}
"""


# --- The init system: units and services -----------------------------------------------------------------------

# In a chroot: makes tools of the init system change files only, instead of failing to reach it.
INIT_OFFLINE = {"SYSTEMD_OFFLINE": "1"}
START_TIMEOUT = 300  # seconds that a service may take to start
TIMED_OUT = 124  # the exit status of timeout(1)


def link_inside(root: Path, path: str, target: str) -> None:
    """Make a symlink at a path of a root; what is there is deleted."""
    path_inside(root, path).parent.mkdir(parents=True, exist_ok=True)
    place = place_inside(root, path)
    remove_tree(place, protected=True)
    with unprotected(place.parent):
        place.symlink_to(target)


class Init:
    """An init system, as far as ash depends on it; this class stands for one that ash does not know."""

    name: ClassVar[str] = ""
    program: ClassVar[str] = ""  # a root boots with it if this is there
    enable: ClassVar[Sequence[str]] = ()  # the command that enables a service in a root; the service's name follows
    marker: ClassVar[str] = ""  # the directory, from the root, by which programs know that it is running
    suffix: ClassVar[str] = ""  # of the names of services, where scripts leave it out
    reboot: ClassVar[Sequence[str]] = ("shutdown", "-r", "+1")  # in a minute; a message to users follows

    def is_running(self) -> bool:
        """Whether it is the init system of the running machine."""
        return False

    def install_units(self, root: Path, executable: str) -> None:
        """Install the units that run ash (`executable`: its path from the root); every boot starts those it needs."""

    def removed_services(self, paths: Mapping[str, str]) -> list[str]:  # noqa: ARG002
        """The services whose definitions were removed, by what changed: {path: kind of change}."""
        return []

    def due_services(self, added: Iterable[str]) -> list[str]:  # noqa: ARG002
        """The services that the new paths of a running root would have started at boot, in the order to start them."""
        return []

    def changed_services(self, paths: Mapping[str, str]) -> list[str]:  # noqa: ARG002
        """The services whose definitions were changed."""
        return []

    def apply_settings(self, paths: Mapping[str, str]) -> None:
        """Apply new and changed settings of the running root that are otherwise applied at boot."""

    def last_words(self, kernel_option: str) -> tuple[list[str], list[str]]:  # noqa: ARG002
        """What the last boot left in its log, if it had that option: the units that failed, the last lines."""
        return [], []

    def log(self, message: str, ident: str) -> None:
        """Write a warning to the log of the running system; `ident` is the id of such messages."""

    def reload(self, check: bool = True) -> None:
        """Have the running init system read its files again."""

    def is_active(self, service: str) -> bool:  # noqa: ARG002
        return False

    def start(self, service: str, check: bool = True) -> None:
        """Start a service; unless `check`, failure is ignored."""

    def restartable(self, services: Iterable[str]) -> list[str]:
        """Those of running services that can be restarted together."""
        return list(services)

    def restart(self, services: Sequence[str], how: str = "restart", check: bool = True) -> None:
        """Restart services, or ("reload") have them read their configuration; unless `check`, failure is ignored."""

    def stop(self, service: str, check: bool = True) -> None:
        """Stop a service; unless `check`, failure is ignored, and forgotten by the init system too."""


class Systemd(Init):
    """systemd: units in the root, services by its own tool."""

    name = "systemd"
    program = "usr/bin/systemctl"
    enable = ("systemctl", "enable")
    marker = "run/systemd/system"
    suffix = ".service"

    UNITS: ClassVar[str] = "usr/lib/systemd/system"
    # The text of each of ash's units, and the directories with the symlinks that start it.
    OWN_UNITS: ClassVar[Mapping[str, tuple[str, Sequence[str]]]] = {
        "ash-upgrade.service": (UPGRADE_UNIT, ()),
        "ash-upgrade.timer": (UPGRADE_TIMER, ()),
        "ash-carry.service": (CARRY_UNIT, ("sysinit.target.wants",)),
        "ash-booted.service": (BOOTED_UNIT, ("local-fs.target.wants",)),
        "ash-machine-id.service": (MACHINE_ID_UNIT, ("local-fs.target.wants",)),
        "ash-recover.service": (RECOVER_UNIT, ("local-fs.target.wants",)),
        "ash-protect.service": (PROTECT_UNIT, ("sysinit.target.wants",)),
        "ash-trial.service": (TRIAL_UNIT, ("sysinit.target.wants",)),
        "ash-restart.service": (RESTART_UNIT, ("emergency.target.wants", "rescue.target.wants")),
        "ash-health.service": (HEALTH_UNIT, ("boot-complete.target.requires",)),
        "ash-bless.service": (BLESS_UNIT, ("multi-user.target.wants",)),
    }
    # In the journal: that a unit failed, and that its start job did (systemd's sd-messages.h).
    UNIT_FAILED: ClassVar[Sequence[str]] = ("d9b373ed55a64feb8242e02dbe79a49c", "be02cf6855d2428ba40df7e9d022f03d")
    # A symlink in a directory of another unit makes a unit start with that one.
    WANTED: ClassVar[str] = r"(?:etc|usr/lib)/systemd/system/([^/]+)\.(?:wants|requires)/([^/]+)"
    UNIT_FILE: ClassVar[str] = r"(?:etc|usr/lib)/systemd/system/([^/]+\.(?:service|socket|timer|path))"
    SETTINGS: ClassVar[str] = r"(?:etc|usr/lib)/({})\.d/([^/]+\.{})"
    SYSCTL_KEY: ClassVar[str] = r"^\s*-?([\w./-]*\w)"  # up to a pattern

    def is_running(self) -> bool:
        return Path("/", self.marker).is_dir()  # as sd_booted(3) does

    def install_units(self, root: Path, executable: str) -> None:
        """Write the units and link those with a wants directory; a root without systemd's unit directory gets none."""
        if not path_inside(root, self.UNITS).is_dir():
            return
        for name, (text, directories) in self.OWN_UNITS.items():
            write_inside(root, f"{self.UNITS}/{name}", text.format(ash=f"/{executable}"))
            for directory in directories:
                link_inside(root, f"{self.UNITS}/{directory}/{name}", f"../{name}")

    def removed_services(self, paths: Mapping[str, str]) -> list[str]:
        found = (re.fullmatch(self.UNIT_FILE, path) for path, kind in paths.items() if kind == "removed")
        return sorted({unit[1] for unit in found if unit})

    def due_services(self, added: Iterable[str]) -> list[str]:
        wanted = [found.groups() for path in added if (found := re.fullmatch(self.WANTED, path))]
        due = {unit for wanting, unit in wanted if self.is_active(wanting) and not self.is_active(unit)}
        # systemd refuses a socket whose service has started before it.
        return sorted(due, key=lambda unit: (not unit.endswith(".socket"), unit))

    def changed_services(self, paths: Mapping[str, str]) -> list[str]:
        found = (re.fullmatch(self.UNIT_FILE, path) for path, kind in paths.items() if kind == "changed")
        return sorted({unit[1] for unit in found if unit})

    def apply_settings(self, paths: Mapping[str, str]) -> None:
        """Apply users, temporary files, kernel parameters, and rules for devices."""
        new = sorted(path for path, kind in paths.items() if kind != "removed")

        def files(directory: str, suffix: str = "conf") -> list[re.Match[str]]:
            pattern = self.SETTINGS.format(directory, suffix)
            return [found for path in new if (found := re.fullmatch(pattern, path))]

        commands = [["systemd-sysusers", *(file[2] for file in files("sysusers"))]]
        commands.append(["systemd-tmpfiles", "--create", *(file[2] for file in files("tmpfiles"))])
        texts = [read_text(path_inside(Path("/"), file[0])) for file in files("sysctl")]
        keys = {key for text in texts for key in re.findall(self.SYSCTL_KEY, text, re.MULTILINE)}
        # All files, of which later ones may set these keys too, but no other keys: they may have been set by hand.
        commands.append(["/usr/lib/systemd/systemd-sysctl", *(f"--prefix={key}" for key in sorted(keys))])
        for command in [one for one in commands if len(one) > (2 if "--create" in one else 1)]:
            run(command, check=False)  # its errors do not stop a boot either
        if files("udev/rules", "rules"):
            run(["udevadm", "control", "--reload"], check=False)

    def last_words(self, kernel_option: str) -> tuple[list[str], list[str]]:
        """The same from the journal, which is kept in /var."""
        read = ["journalctl", "--boot=-1", "--quiet", "--no-pager"]
        kernel = run([*read, "--dmesg", "--output=cat", f"--grep=ommand line:.* {kernel_option}( |$)"], check=False)
        if not kernel.stdout.strip():
            return [], []
        failed = [f"MESSAGE_ID={ident}" for ident in self.UNIT_FAILED]
        told = run([*read, "--output=json", "--output-fields=UNIT", *failed], check=False).stdout
        units = [json.loads(line).get("UNIT") for line in lines_of(told)]
        last = run([*read, "--output=short", "--lines=15"], check=False).stdout
        return list(dict.fromkeys(filter(None, units))), [one_line(line) for line in lines_of(last)]

    def log(self, message: str, ident: str) -> None:
        fields = {"MESSAGE_ID": ident, "MESSAGE": message, "PRIORITY": "4", "SYSLOG_IDENTIFIER": "ash"}
        run(["logger", "--journald"], input="".join(f"{key}={value}\n" for key, value in fields.items()), check=False)

    def reload(self, check: bool = True) -> None:
        run(["systemctl", "daemon-reload"], check=check)

    def is_active(self, service: str) -> bool:
        return run(["systemctl", "is-active", service], check=False).stdout.strip() == "active"

    def start(self, service: str, check: bool = True) -> None:
        """Start a unit, with a timeout: systemd lets a oneshot unit start forever."""
        self.restart([service], "start", check)

    def restartable(self, services: Iterable[str]) -> list[str]:
        """Without the sockets whose service runs, and is not to be restarted."""
        units = list(services)
        service_of = {unit: f"{unit.removesuffix('.socket')}.service" for unit in units if unit.endswith(".socket")}
        return [one for one in units if (of := service_of.get(one)) is None or of in units or not self.is_active(of)]

    def restart(self, services: Sequence[str], how: str = "restart", check: bool = True) -> None:
        """Restart, start or reload units, with the same timeout."""
        if how == "restart" and any(one.endswith(".socket") for one in services):
            # systemctl asks for one unit after the other, and a socket cannot start while its service runs.
            run(["timeout", str(START_TIMEOUT), "systemctl", "stop", *services], check=False)
            services, how = sorted(services, key=lambda unit: not unit.endswith(".socket")), "start"
        if not check:
            run(["systemctl", how, *services], check=False)
            return
        with signals_heard():
            done = run(["timeout", str(START_TIMEOUT), "systemctl", how, *services], check=False)
        if done.returncode:
            names = " ".join([one for one in services if not self.is_active(one)] or services)
            late = done.returncode == TIMED_OUT
            why = f"has not started within {START_TIMEOUT} s" if late else f"failed: {last_words(done.stderr)}"
            raise AshError(f"{how} of {names} {why}", f"systemctl status {names}")

    def stop(self, service: str, check: bool = True) -> None:
        run(["systemctl", "stop", service], check=check)
        if not check:
            run(["systemctl", "reset-failed", service], check=False)


class OpenRc(Init):
    """OpenRC with Debian's scripts, started by sysvinit: scripts in /etc/init.d, linked into runlevels."""

    name = "openrc"
    program = "usr/sbin/openrc"
    enable = ("rc-update", "add")
    marker = "run/openrc"
    # In the background: sysvinit's shutdown waits until then.
    reboot = ("start-stop-daemon", "--start", "--background", "--exec", "/sbin/shutdown", "--", *Init.reboot[1:])
    # The text of each of ash's scripts, and its runlevel. The services of sysinit stop after /var is unmounted.
    OWN_SCRIPTS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "ash-recover": (RECOVER_SCRIPT, "sysinit"),
        "ash-protect": (PROTECT_SCRIPT, "sysinit"),
        "ash-trial": (TRIAL_SCRIPT, "sysinit"),
        "ash-carry": (CARRY_SCRIPT, "default"),
        "ash-bless": (BLESS_SCRIPT, "default"),
    }
    LINKED: ClassVar[str] = r"etc/runlevels/(?:sysinit|default)/([^/]+)"
    SCRIPT: ClassVar[str] = r"etc/init\.d/([^/]+)"

    def is_running(self) -> bool:
        return Path("/", self.marker, "softlevel").is_file()

    def install_units(self, root: Path, executable: str) -> None:
        """Write the scripts; a root without OpenRC gets none.

        New ones are linked into their runlevels, as packages do it: who takes one out again keeps that.
        """
        if not path_inside(root, self.program).exists() or not path_inside(root, "etc/init.d").is_dir():
            return
        for name, (text, level) in self.OWN_SCRIPTS.items():
            script = place_inside(root, f"etc/init.d/{name}")
            if not os.path.lexists(script):
                link_inside(root, f"etc/runlevels/{level}/{name}", f"/etc/init.d/{name}")
            write_inside(root, f"etc/init.d/{name}", text.replace("@ASH@", f"/{executable}"))
            script.chmod(0o755)
        if path_inside(root, "etc/inittab").is_file():
            path_inside(root, "etc/inittab.d").mkdir(exist_ok=True)
            write_inside(root, "etc/inittab.d/ash.tab", TRIAL_TAB)

    def removed_services(self, paths: Mapping[str, str]) -> list[str]:
        return self._services(self.SCRIPT, paths, "removed")

    def due_services(self, added: Iterable[str]) -> list[str]:
        """The new services of runlevels, by name: OpenRC itself starts first what a service needs."""
        new = self._services(self.LINKED, dict.fromkeys(added, "added"), "added")
        return [service for service in new if not self.is_active(service)]

    def changed_services(self, paths: Mapping[str, str]) -> list[str]:
        return self._services(self.SCRIPT, paths, "changed")

    @staticmethod
    def _services(pattern: str, paths: Mapping[str, str], kind: str) -> list[str]:
        found = (re.fullmatch(pattern, path) for path, its in paths.items() if its == kind)
        return sorted(service[1] for service in found if service)

    def log(self, message: str, ident: str) -> None:  # noqa: ARG002
        run(["logger", "--tag", "ash", "--priority", "daemon.warning", message], check=False)

    def is_active(self, service: str) -> bool:
        """Whether OpenRC has started it; not every script of Debian can say how it is."""
        return Path("/", self.marker, "started", service).is_symlink()

    def start(self, service: str, check: bool = True) -> None:
        self.restart([service], "start", check)

    def restart(self, services: Sequence[str], how: str = "restart", check: bool = True) -> None:
        """Restart, start or reload services one after the other, each with the timeout of systemd's."""
        for service in services:
            with signals_heard() if check else contextlib.nullcontext():
                done = run(["timeout", str(START_TIMEOUT), "rc-service", service, how], check=False)
            if done.returncode and check:
                late = done.returncode == TIMED_OUT
                why = f"has not ended within {START_TIMEOUT} s" if late else f"failed: {last_words(done.stderr)}"
                raise AshError(f"{how} of {service} {why}", f"rc-service {service} status")

    def stop(self, service: str, check: bool = True) -> None:
        run(["rc-service", service, "stop"], check=check)
        if not check:
            run(["rc-service", service, "zap"], check=False)


INIT_SYSTEMS: Sequence[Init] = (OpenRc(), Systemd())  # a root with OpenRC may have tools of systemd


def init_of(root: Path) -> Init:
    """The init system that a root boots with; one distribution may offer several."""
    return next((init for init in INIT_SYSTEMS if path_inside(root, init.program).exists()), Init())


def running_init() -> Init:
    """The init system of the running machine."""
    return next((init for init in INIT_SYSTEMS if init.is_running()), Init())


def mount_option_after(mount_point: str) -> str:
    """The option that mounts a line of fstab after another mount point: only systemd needs it, the others ignore it."""
    return f"x-systemd.requires-mounts-for={mount_point}"


def mount_option_to_wait() -> str:
    """The option of a line of fstab for the root's own disk: systemd would stop at an emergency shell after 90 s."""
    return "x-systemd.device-timeout=0"


def schedule_reboot(message: str) -> str:
    """Reboot the machine in a minute, with a message to its users. Returns the command that cancels it."""
    run([*running_init().reboot, message])
    return "shutdown -c"


# Where scripts of packages, while they run for the running system, leave what they would do with services: a line
# `ACTION SERVICE` each.
ASKED_OF_SERVICES = "run/ash/services"
RELOADS = ("reload", "reload-or-restart", "try-reload-or-restart", "reload-or-try-restart")


def asked_services(text: str, suffix: str = "") -> dict[str, str]:
    """What scripts asked to be done with services that run, by the lines of ASKED_OF_SERVICES: restart, or reload.

    Names without a dot get the suffix.
    """
    asked: dict[str, str] = {}
    for line in lines_of(text):
        action, _, service = line.partition(" ")
        service += "" if "." in service else suffix
        if service != suffix and action != "stop":
            how = "reload" if action in RELOADS and asked.get(service, "reload") == "reload" else "restart"
            asked[service] = how
    return asked


def outdated_programs(paths: Container[str]) -> list[str]:
    """The running programs that use a file of these paths (from the root) as it was before: "NAME (PID PID)" each."""
    found: dict[str, list[str]] = {}
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):  # it has ended
            maps = re.findall(r" /(\S.*) \(deleted\)$", (process / "maps").read_text(errors="replace"), re.MULTILINE)
            if any(path in paths for path in maps) and int(process.name) != os.getpid():
                found.setdefault((process / "comm").read_text(errors="replace").strip(), []).append(process.name)
    return [f"{name} ({' '.join(pids)})" for name, pids in found.items()]


class Services:
    """Stops, starts and restarts services when files of the running system change, and names them in `live`."""

    def __init__(self, live: LiveResult, running: bool) -> None:
        self.live = live
        self.running = running  # on this machine; else nothing is done
        self.init = running_init() if running else Init()

    def stop(self, paths: Mapping[str, str]) -> None:
        """Stop the services whose files are about to be removed."""
        for service in self.init.removed_services(paths):
            if self.init.is_active(service):
                self.init.stop(service)
                self.live.stopped.append(service)

    def start(self, paths: Mapping[str, str], asked: str = "") -> None:
        """Make changed files effective, and start the new services that a boot would start.

        Args:
            paths: what changed, {path: kind of change}.
            asked: what the scripts of packages asked to be done with services; those that run are restarted.
        """
        if self.running:
            run(["ldconfig"])  # so that programs find new libraries
        self.init.apply_settings(paths)
        self.init.reload()
        wanted = asked_services(asked, self.init.suffix)
        active = {service: how for service, how in wanted.items() if self.init.is_active(service)}
        restartable = self.init.restartable(active)
        self.live.restarted += restartable
        for how in sorted({active[service] for service in restartable}, reverse=True):  # restart, then reload
            self.init.restart([service for service in restartable if active[service] == how], how)
        for service in self.init.due_services([path for path, kind in paths.items() if kind == "added"]):
            self.live.started.append(service)
            self.init.start(service)
        if self.running:
            changed = [one for one in self.init.changed_services(paths) if self.init.is_active(one)]
            self.live.outdated = [one for one in dict.fromkeys([*active, *changed]) if one not in self.live.restarted]
            self.live.outdated += outdated_programs({path for path, kind in paths.items() if kind != "added"})

    def stop_started(self) -> None:
        """Stop what start() started; failures are ignored."""
        for service in self.live.started:
            self.init.stop(service, check=False)

    def put_back(self) -> None:
        """Undo stop() and start() once the old files are back; failures are ignored."""
        if self.running:
            run(["ldconfig"], check=False)
        self.init.reload(check=False)
        if self.live.restarted:
            self.init.restart(self.live.restarted, check=False)
        for service in self.live.stopped:
            self.init.start(service, check=False)


# --- Kernels: image, version, modules, initramfs ---------------------------------------------------------------

# arm64 calls the image `Image`, some architectures boot an uncompressed vmlinux; `vmlinux-X.gz` is for debuggers.
KERNEL_IMAGE = r"(?:vmlinu[xz]|Image)-(?!.*\.(?:gz|xz|zst)$)(.+)"
MODULE_DIRECTORIES = ("usr/lib/modules", "lib/modules")  # the second where /lib is not a symlink


def version_parts(text: str) -> list[tuple[int, int, str]]:
    """A sort key for kernel versions and the like: numbers by value, after letters; `~` before everything."""
    parts = re.findall(r"[0-9]+|[^\W\d_]+|~", text)
    keys = [(2, int(part), "") if part.isdecimal() else (-1 if part == "~" else 1, 0, part) for part in parts]
    return [*keys, (0, 0, "")]


class Kernel(NamedTuple):
    """A kernel of a root; paths are from the root, and empty if there is none."""

    name: str  # in messages: a version, or a package such as `linux` or `lts` if /boot has that instead
    images: Sequence[str]
    modules: str = ""  # a directory
    initramfs: str = ""

    @property
    def version(self) -> str:
        """As the tool that makes an initramfs takes it."""
        return Path(self.modules).name or self.name

    @property
    def needs_modules(self) -> bool:
        return not self.name.startswith("0-rescue-")  # Fedora's: its initramfs contains them


def modules_of(directory: Path, name: str) -> str:
    """The version below a directory of modules that belongs to a kernel image `vmlinuz-NAME`; empty if none does.

    Most distributions name the image after the version. Arch names it after the package, which `pkgbase` beside the
    modules tells; Alpine after the flavour with which the version ends.
    """
    if (directory / name).is_dir():
        return name
    versions = sorted((path.name for path in directory.glob("*") if path.is_dir()), key=version_parts)
    of_package = [v for v in versions if read_text(directory / v / "pkgbase").strip() == name]
    return max(of_package or [v for v in versions if v.endswith(f"-{name}")], key=version_parts, default="")


def kernels_of(root: Path) -> list[Kernel]:
    """The kernels of a root: those with an image in /boot, and those with an image only beside their modules."""
    boot = path_inside(root, "boot")
    files = sorted(path.name for path in boot.glob("*"))
    below = next((name for name in MODULE_DIRECTORIES if path_inside(root, name).is_dir()), MODULE_DIRECTORIES[0])
    directory = path_inside(root, below)
    images: dict[str, list[str]] = {}
    for file in files:
        if match := re.fullmatch(KERNEL_IMAGE, file):
            images.setdefault(match[1], []).append(f"boot/{file}")
    versions = {name: modules_of(directory, name) for name in images}
    for path in sorted(directory.glob("*/vmlinuz")):
        version = path.parent.name
        owners = [name for name, of in versions.items() if of == version]
        for name in owners or [version]:
            images.setdefault(name, []).append(f"{below}/{version}/vmlinuz")
            versions[name] = version
    kernels = []
    for name, of in images.items():
        pattern = rf"initr\w*(?:\.img)?-{re.escape(name)}(?:\.img)?"
        ready = [file for file in files if re.fullmatch(pattern, file) and size_of(boot / file) > 0]
        modules = f"{below}/{versions[name]}" if versions[name] else ""
        kernels.append(Kernel(name, of, modules, f"boot/{ready[0]}" if ready else ""))
    return kernels


def kernel_faults(root: Path) -> list[str]:
    """What the kernels of a root lack to boot, a line for each problem."""
    kernels = kernels_of(root)
    faults = [f"kernel {one.name} has no modules" for one in kernels if one.needs_modules and not one.modules]
    faults += [f"kernel {one.name} has no initramfs" for one in kernels if not one.initramfs]
    return faults if kernels else ["there is no kernel"]


def initramfs_inputs(root: Path, settings: str, own: Path) -> str:
    """A digest of what an initramfs is made from: the files in a root's /etc that match the pattern `settings`.

    The snapshot's own initramfs stands for all other inputs: it is made again whenever its packages change.
    """
    import hashlib

    etc = root / "etc"
    digest = hashlib.sha256(f"{own.name} {own.stat().st_size} {own.stat().st_mtime_ns}\n".encode(errors="replace"))
    for name in sorted(name for name in paths_below(etc) if re.fullmatch(settings, name)):
        path = path_inside(root, f"etc/{name}")
        digest.update(f"{name} {path.stat().st_mode if path.exists() else 0}\n".encode(errors="replace"))
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def modules_of_changed_kernels(changed: Container[str], before: Path, after: Path) -> set[str]:
    """The module directories of kernels whose image changed: the running one needs its own until the reboot."""
    kernels = [*kernels_of(before), *kernels_of(after)]
    return {one.modules for one in kernels if one.modules and any(image in changed for image in one.images)}


# --- BootTools: what GRUB's own tools make of a root -----------------------------------------------------------


class BootTools:
    """GRUB's tools, as a distribution names them; with the prefix `grub2` on Fedora and openSUSE.

    Args:
        prefix: of their names.
        bios_setup: the one that writes the first sectors of a disk, if it is not in PATH.
    """

    def __init__(self, prefix: str = "grub", bios_setup: str = "") -> None:
        self.mkconfig = f"{prefix}-mkconfig"
        self.script_check = f"{prefix}-script-check"
        self.install = f"{prefix}-install"
        self.mkimage = f"{prefix}-mkimage"
        self.bios_setup = bios_setup or f"{prefix}-bios-setup"
        self.directory = f"boot/{prefix}"  # which the tools expect, from the root


BOOT_CONFIG_SHAPE = {
    "kernel": is_inner_path, "initrds": [is_inner_path], "options": is_line,
    "rootflags?": is_line, "classes?": is_line, "header?": [is_line], "foreign?": is_text,
}  # fmt: skip
MENU_HEADER = r"(?m:^\s*(serial .*|terminal_(?:in|out)put .*|set (?:timeout|timeout_style|gfxmode)=.*)$)"
MENU_TEXT_SHAPE = {"header": [is_line], "foreign": is_text}
# Sections (by the name of their script) with Linux entries, which ash's own replace.
LINUX_SECTION = r"\d+_linux\w*$"
LINUX_ENTRY = r"(?m:^\s*menuentry ('[^'\n]*'|\"[^\"\n]*\")(.*)\{$)"
MENU_ENTRY = r"(?m:^\s*(?:menuentry|submenu) )"
UNUSED_SECTION = r"41_custom$"  # includes a file that is not there
# Options of a Linux entry that the others of the menu get too: who may start it, and how a theme shows it.
ENTRY_OPTION = r"--(?:class|users)[ =](?:'[^'\n]*'|\"[^\"\n]*\"|[\w,.+-]+)|--unrestricted"
MADE_IN = "/snapshot-@SLOT@/"  # in a text from mkconfig: the root that it ran in, which any slot may be
OWN_OPTION = r"root=.*|ro|rw|rootflags=.*"  # options of the kernel that ash sets
# The files in /boot that decide what the tools find there: images, initramfs and microcode.
BOOT_FILE = r"(?s:vmlinu.*|Image-.*|initr.*|.*\.img|.*-ucode.*)"
# The settings of the tools in /etc.
BOOT_SETTINGS = r"default/grub(\.d/.*)?|grub\.d/.*"
# In the messages of mkconfig: another system, as in "Found Windows Boot Manager on ..."; not "Found linux image: ...".
FOUND_ELSEWHERE = r"Found .* on "


class BootEntry(NamedTuple):
    """How one kernel is booted, as the boot tools say."""

    kernel: str  # paths as GRUB sees them
    initrds: Sequence[str]
    options: str

    @property
    def is_usable(self) -> bool:
        """Whether the paths are complete: mkconfig does not quote file names with blanks."""
        return bool(re.fullmatch(r"(?a)/?[\w.+~@:-]+(/[\w.+~@:-]+)*", self.kernel))

    @classmethod
    def in_script(cls, text: str) -> Iterator[BootEntry]:
        """The entries in a grub.cfg."""
        for linux in re.finditer(r"^\s*linux\s+(\S+)[ \t]*(.*)$", text, re.MULTILINE):
            rest = text[linux.end() : text.find("}", linux.end())]
            initrd = re.search(r"^\s*initrd\s+(.*)$", rest, re.MULTILINE)
            entry = cls(linux[1], initrd[1].split() if initrd else [], linux[2])
            if entry.is_usable and entry.options.startswith("root="):  # else the path had a blank in it
                yield entry

    @classmethod
    def of_specification(cls, text: str, variables: Mapping[str, str]) -> BootEntry:
        """The entry in a file of loader/entries; keys may repeat. Unknown variables are empty, as in GRUB."""
        expanded = re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name[1], ""), text)
        fields: dict[str, list[str]] = {}
        for key, value in re.findall(r"^(\w[\w-]*)[ \t]+(\S.*?)[ \t]*$", expanded, re.MULTILINE):
            fields.setdefault(key, []).append(value)
        initrds = [path for line in fields.get("initrd", []) for path in line.split()]
        return cls(" ".join(fields.get("linux", [])), initrds, " ".join(fields.get("options", [])))


def no_kernel() -> AshError:
    return AshError("there is no kernel that GRUB can boot", "install a kernel package")


class BootConfig(NamedTuple):
    """What ash takes from the output of a snapshot's own mkconfig."""

    kernel: str  # names in /boot
    initrds: Sequence[str]
    options: str
    rootflags: str = ""  # besides the subvolume
    classes: str = ""  # options of the menu's Linux entries
    # Around the entries for Linux: settings, users with passwords, a theme; other systems and the user's own entries.
    header: Sequence[str] = ()
    foreign: str = ""

    @classmethod
    def parse(cls, text: str, specified: Sequence[str] = ()) -> BootConfig:
        """Parse a grub.cfg that mkconfig printed; AshError if it has no kernel.

        With the command `blscfg` it boots `specified`, the texts of loader/entries, the default first, and has no
        entries for Linux itself, as on Fedora.
        """
        entry = next(BootEntry.in_script(text), None)
        if entry is None and re.search(r"^\s*blscfg\b", text, re.MULTILINE):
            variables = dict(re.findall(r"^\s*set (\w+)=\"(.*)\"$", text, re.MULTILINE))
            entries = (BootEntry.of_specification(one, variables) for one in specified)
            entry = next((one for one in entries if one.is_usable), None)
        if entry is None:
            raise no_kernel()
        sections = re.findall(r"^### BEGIN (\S+) ###\n(.*?)^### END \1 ###$", text, re.MULTILINE | re.DOTALL)
        linux = next((n for n, (name, _) in enumerate(sections) if re.search(LINUX_SECTION, name)), 0)
        first = re.search(LINUX_ENTRY, sections[linux][1]) if sections else None
        kept = [
            (place < linux, body.strip("\n"))
            for place, (name, body) in enumerate(sections)
            if not re.search(f"{LINUX_SECTION}|{UNUSED_SECTION}", name)
        ]
        words = entry.options.split()
        flags = [f for word in words if word.startswith("rootflags=") for f in word.partition("=")[2].split(",")]
        kernel, *initrds = (path.rpartition("/boot/")[2].lstrip("/") for path in (entry.kernel, *entry.initrds))
        return cls(
            kernel,
            initrds,
            options=" ".join(word for word in words if not re.fullmatch(OWN_OPTION, word)),
            rootflags=",".join(flag for flag in flags if not flag.startswith("subvol")),
            classes=" ".join(re.findall(ENTRY_OPTION, first[2])) if first else "",
            header=[line for is_before, body in kept if is_before for line in lines_of(body)],
            foreign="\n".join(body for is_before, body in kept if not is_before and body),
        )

    def without_text(self) -> BootConfig:
        """The same without what only root may read: of the text around the entries, terminals and timeout are left."""
        lines = re.findall(MENU_HEADER, "\n".join(self.header))
        return self._replace(header=list(dict.fromkeys(line.strip() for line in lines)), foreign="")


def unusable_boot_files(root: Path, config: BootConfig) -> list[str]:
    """Those of the kernel and its initrds, by their names in /boot, that GRUB cannot load from a root.

    They are missing, empty, or symlinks that lead out of the root.
    """

    def is_usable(path: Path) -> bool:
        target = path.resolve()
        return target.is_relative_to(root.resolve()) and size_of(target) > 0

    return [name for name in (config.kernel, *config.initrds) if not is_usable(root / "boot" / name)]


def require_usable(root: Path, config: BootConfig) -> None:
    """Raise AshError if GRUB cannot load what a boot configuration names."""
    if unusable := unusable_boot_files(root, config):
        what = "missing, empty, or a symlink that leads out of the snapshot"
        raise AshError(f"GRUB cannot load {listed(unusable)}: {what}")


def specified_entries(root: Path) -> list[Path]:
    """The files of a root's loader/entries in the order of GRUB's menu: the newest version first."""
    entries = path_inside(root, "boot/loader/entries").glob("*.conf")  # of the Boot Loader Specification
    return sorted(entries, key=lambda path: version_parts(path.stem), reverse=True)


def boot_inputs(root: Path) -> str:
    """A digest of everything in a root that the output of mkconfig depends on."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(path for path in path_inside(root, "boot").glob("*") if re.fullmatch(BOOT_FILE, path.name)):
        status = path.lstat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="replace"))
    default, scripts = path_inside(root, "etc/default"), path_inside(root, "etc/grub.d")
    settings = [default / "grub", *path_inside(default, "grub.d").glob("*"), *scripts.glob("*")]
    settings += specified_entries(root)
    for path in sorted(path_inside(root, str(path.relative_to(root))) for path in settings):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_mode}\n".encode(errors="replace") + path.read_bytes())
    return digest.hexdigest()


def grub_search(uuid: str) -> str:
    return f"search --no-floppy --fs-uuid --set=root {uuid}"


class KernelPlace(NamedTuple):
    """Where GRUB loads a kernel from, and under which names, if that is not the root itself."""

    uuid: str  # of the file system
    directory: str
    kernel: str
    initrds: Sequence[str]


def grub_start(
    name: str, uuid: str, config: BootConfig, own: str, last: str = "", *, place: KernelPlace | None = None
) -> list[str]:
    """GRUB's commands to start the kernel of a root.

    Args:
        name: the root's subvolume, from the top level.
        uuid: of the file system.
        config: how its kernel is started.
        own, last: options of ash before and after those of `config`.
        place: of the kernel; None for the root's own.
    """
    place = place or KernelPlace(uuid, f"/{name}/boot", config.kernel, config.initrds)
    flags = ",".join(filter(None, [f"subvol={name}", config.rootflags]))
    options = " ".join(filter(None, [f"root=UUID={uuid}", f"rootflags={flags}", own, config.options, last]))
    initrds = " ".join(f"{place.directory}/{initrd}" for initrd in place.initrds)
    return [
        f"    {grub_search(place.uuid)}",
        f"    linux {place.directory}/{place.kernel} {options}",
        *([f"    initrd {initrds}"] if initrds else []),
    ]


def grub_preamble(uuid: str) -> list[str]:
    return ["insmod part_gpt", "insmod btrfs", grub_search(uuid)]


TITLE = 100  # characters; GRUB gives up on the whole file if it has a word of 8 KiB


def grub_title(text: str) -> str:
    """Quote text as one word of GRUB's script language, and shorten it; control characters become question marks."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    shown = plain if len(plain) <= TITLE else f"{plain[: TITLE - 3]}..."
    return "'" + shown.replace("'", "'\\''") + "'"


def usable_in_header(line: str) -> str:
    """A line of MENU_HEADER as ash writes it: the graphical terminal needs its font and drivers first."""
    if line.startswith("terminal_output") and "gfxterm" in line:
        return f"if loadfont unicode ; then insmod all_video ; insmod gfxterm ; {line} ; fi"
    return line


# On the kernel's command line: the deployment's id; the minutes that a start on trial may take; the id of the one that
# did not start.
DEPLOYMENT, ON_TRIAL, FELL_BACK = "ash.deployment", "ash.trial", "ash.fellback"
# For a start on trial: whatever fails, the machine starts again by itself. For the kernel and the initramfs of Debian,
# that of dracut, and systemd, whose watchdog the hardware may have; seconds.
RESTARTS = "panic=10 rd.shell=0 rd.emergency=reboot systemd.crash_reboot=1 systemd.watchdog_sec={}"
IN_RESCUE = "ash_rescue"  # a variable of GRUB: an earlier grub.cfg is open


def kernel_options() -> dict[str, str]:
    """The options on the running kernel's command line."""
    return dict(word.partition("=")[::2] for word in read_text(Path("/proc/cmdline")).split())


def trial_options(minutes: int) -> str:
    """The kernel's options for a start that may fail, and then waits for nobody; `minutes` is how long it may take."""
    return f"{ON_TRIAL}={minutes} {RESTARTS.format(minutes * 60)}"


# A feature of GRUB that 2.14 has, and 2.12 has not: only since then can save_env write to a list of blocks.
GRUB_FEATURE = "feature_gcry_hw_accel"


def grub_proof(block: str) -> list[str]:
    """GRUB's commands to show that it can write to a block: it copies there what it is asked to."""
    return [
        "unset ask",
        "unset seen",
        f'if [ "${GRUB_FEATURE}" = "y" ]; then',
        f"    load_env --file {block} ask seen",
        '    if [ "$seen" != "$ask" ]; then',
        '        set seen="$ask"',
        f"        if save_env --file {block} seen; then unset ask; fi",
        "    fi",
        "fi",
    ]


def grub_countdown(
    notes: EfiPartition | EnvironmentBlock, entry: str, ident: str, tries: int, minutes: int
) -> list[str]:
    """GRUB's commands to spend a try for an entry: the default if there was one, else the fallback.

    Whatever goes wrong with the notes, GRUB starts the fallback: it is known to boot.
    """
    block = notes.for_grub
    count = [f'        if [ "$try_n" = "{left}" ]; then set ash_left="{left - 1}"; fi' for left in range(1, tries + 1)]
    return [
        'set default="$fallback_id"',
        f'set ash_fellback="{FELL_BACK}={ident}"',
        *(f"unset {name}" for name in ("ash_trial", "ash_left", "try_id", "try_n")),
        *notes.if_there,
        f"    load_env --file {block} try_id try_n",
        f'    if [ "$try_id" = "{entry}" ]; then',
        *count,
        "    fi",
        '    if [ -n "$ash_left" ]; then',
        '        set try_n="$ash_left"',
        f"        if save_env --file {block} try_id try_n; then",
        '            set default="$default_id"',
        "            unset ash_fellback",
        f'            set ash_trial="{trial_options(minutes)}"',
        "        fi",
        "    fi",
        "fi",
    ]


def grub_once(notes: EfiPartition | EnvironmentBlock, entry: str, minutes: int) -> list[str]:
    """GRUB's commands to start an entry if its notes say so, and to take that note away."""
    block = notes.for_grub
    return [
        "unset ash_once",
        "unset once",
        *notes.if_there,
        f"    load_env --file {block} once",
        f'    if [ "$once" = "{entry}" ]; then',
        "        set once=",
        f"        if save_env --file {block} once; then",
        f'            set default="{entry}"',
        f'            set ash_once="{trial_options(minutes)}"',
        "        fi",
        "    fi",
        "fi",
    ]


def grub_choice(once: Sequence[str], countdown: Sequence[str]) -> list[str]:
    """GRUB's commands to choose what it starts by itself: a start of grub_once() spends no try.

    A menu that somebody opened in the submenu of earlier ones is theirs to choose from.
    """
    if once and countdown:
        countdown = ['if [ -z "$ash_once" ]; then', *countdown, "fi"]
    return [f'if [ -z "${IN_RESCUE}" ]; then', *once, *countdown, "fi"] if once or countdown else []


def without_titles(grub_cfg: str) -> str:
    return re.sub(r"^menuentry .* --id", "menuentry --id", grub_cfg, flags=re.MULTILINE)


# --- GRUB's notes: on the EFI partition, or in the header of btrfs ---------------------------------------------

# GRUB cannot write to files on btrfs, only on FAT. The block fits the first sector, which a disk writes as a whole.
BLOCK_SIZE, SECTOR = 1024, 512  # bytes: of a block of GRUB's environment, as grub-editenv makes it; of a disk's sector
BLOCK_HEADER = "# GRUB Environment Block\n"


class Countdown(NamedTuple):
    """GRUB's notes between two starts, in a block of its environment."""

    try_id: str = ""  # the entry of the menu that is on trial
    try_n: str = ""  # how often GRUB may still start it
    once: str = ""  # the entry that is started next, and once
    # In btrfs alone: whose notes these are; the GRUB that is asked to show that it can write; the one that did.
    ash: str = ""
    ask: str = ""
    seen: str = ""

    def tries_left(self, entry: str, tries: int) -> int | None:
        """How often GRUB still starts an entry, which has a number of tries; None if it does not count that."""
        is_counted = self.try_id == entry and re.fullmatch("[0-9]", self.try_n) and int(self.try_n) <= tries
        return int(self.try_n) if is_counted else None

    @property
    def block(self) -> bytes:
        """The block on the disk."""
        lines = [f"{name}={value}\n" for name, value in self._asdict().items() if value]
        return "".join([BLOCK_HEADER, *lines]).encode().ljust(BLOCK_SIZE, b"#")

    @classmethod
    def of_block(cls, block: bytes, size: int = BLOCK_SIZE) -> Countdown | None:
        """The notes in a block; None if GRUB could not read it."""
        if len(block) != size or not block.startswith(BLOCK_HEADER.encode()):
            return None
        values = dict(re.findall(r"^(\w+)=(.*)$", block.decode(errors="replace"), re.MULTILINE))
        return cls(*(values.get(name, "") for name in cls._fields))


def fat_uuid(boot_sector: bytes) -> str:
    """The UUID of a FAT file system as fstab spells it; empty if the sector does not begin one."""
    # The serial number's place depends on the size of the tables: FAT32, or FAT12 and FAT16.
    at = 67 if boot_sector[82:87] == b"FAT32" else 39 if boot_sector[54:57] == b"FAT" else None
    serial = boot_sector[at : at + 4][::-1].hex().upper() if at else ""
    return f"{serial[:4]}-{serial[4:]}" if serial else ""


def fat_cluster_at(boot_sector: bytes, cluster: int) -> int:
    """Where a cluster of a FAT file system begins, in bytes from its start."""
    # Of the BIOS parameter block: bytes per sector, sectors per cluster, reserved sectors, tables, entries of the root
    # directory, media, sectors of a table (0 if it is FAT32, which has them at 36).
    size, per_cluster, reserved, tables, entries, _, _, table = struct.unpack_from("<HBHBHHBH", boot_sector, 11)
    table = table or struct.unpack_from("<I", boot_sector, 36)[0]
    root = -(-entries * 32 // size)
    return int((reserved + tables * table + root + (cluster - 2) * per_cluster) * size)


def first_sector(device: Path) -> bytes:
    """The first sector of a device; empty if it cannot be read."""
    with contextlib.suppress(OSError), device.open("rb", buffering=0) as disk:
        return disk.read(SECTOR)
    return b""


def disk_of(number: str) -> Path:
    """The directory in sysfs of the disk that a block device, MAJOR:MINOR, is on, or is; also if that is encrypted."""
    device = Path(f"/sys/dev/block/{number}").resolve()
    while len(below := [*(device / "slaves").glob("*")]) == 1:
        device = below[0].resolve()
    return device.parent if (device / "partition").exists() else device


def find_partitions(
    layout: Layout, image: Path | None, is_wanted: Callable[[BinaryIO, int], bool]
) -> list[tuple[Path, int]]:
    """The partitions of a kind, as a node and 0 or the image and the offset; only those on the system's disk if any is.

    Args:
        layout, image: of the system; see EfiPartition.
        is_wanted: tells the kind from an open disk, and the byte of it at which a partition begins.
    """
    if image:
        with image.open("rb") as disk:
            return [(image, start) for start, _ in partitions_of(disk) if is_wanted(disk, start)]
    device = device_of(layout.snapshots)
    number = device.stat().st_rdev if device else 0
    own = disk_of(f"{os.major(number)}:{os.minor(number)}") if device else None
    found: dict[bool, list[tuple[Path, int]]] = {True: [], False: []}
    for entry in sorted(Path("/sys/class/block").glob("*/partition")):
        node = Path("/dev", entry.parent.name)
        with contextlib.suppress(OSError), node.open("rb") as disk:
            if is_wanted(disk, 0):
                found[disk_of(read_text(entry.with_name("dev")).strip()) == own].append((node, 0))
    return found[True] or found[False]


def only_one(found: Sequence[tuple[Path, int]], uuid: str, missing: AshError) -> tuple[Path, int]:
    """The only one of the partitions that find_partitions() found by a UUID; raises `missing` if there is none."""
    if len(found) == 1:
        return found[0]
    if found:
        names = listed(str(node) for node, _ in found)
        raise AshError(f"several partitions have the UUID {uuid}: {names}", "detach the copies", REFUSED)
    raise missing


def mount_boot_partition(layout: Layout, image: Path | None = None) -> None:
    """Mount the partition for GRUB's files and kernels, if there is one, over the boot volume for this process only.

    AshError (REFUSED) if it is missing, or there are several.

    Args:
        layout, image: of the system; see EfiPartition.
    """
    uuid = layout.boot_uuid
    if not uuid:
        return

    def has_it(disk: BinaryIO, start: int) -> bool:
        there = Superblock.at(disk, start)
        return there is not None and there.uuid == uuid

    missing = AshError(f"the partition {uuid}, for /boot, is missing", "attach its disk", REFUSED)
    path, start = only_one(find_partitions(layout, image, has_it), uuid, missing)
    options, readonly = f"subvol={layout.volume_name('@boot')}", is_readonly(layout.snapshots)
    if not image:
        mount_btrfs(path, layout.boot_volume, options, readonly)
        return
    with image.open("rb+") as disk, node_of_part(disk, image, (start, dict(partitions_of(disk))[start])) as (node, _):
        mount_btrfs(node, layout.boot_volume, options, readonly)


class EfiPartition:
    """The FAT partition with GRUB's notes. It is mounted for each use; if Linux has no FAT, mtools read and write it.

    Args:
        layout: of the distribution whose notes they are.
        image: the disk image that the file system is on; else it is on a disk of this machine.
    """

    where = "on the EFI partition"

    def __init__(self, layout: Layout, image: Path | None = None) -> None:
        self.layout = layout
        self.image = image
        self.uuid = read_text(layout.efi).strip()

    @property
    def name(self) -> str:
        """The path of the block on the partition."""
        return f"ash/{self.layout.distro}/grubenv"

    @property
    def for_grub(self) -> str:
        """The block, as GRUB names it."""
        return f"($ash_efi)/{self.name}"

    @property
    def if_there(self) -> list[str]:
        """GRUB's commands before those that read the block: the last one begins an `if`."""
        return ["insmod fat", f"if search --no-floppy --fs-uuid --set=ash_efi {self.uuid}; then"]

    def read(self) -> Countdown | None:
        """GRUB's notes; None if they are missing or damaged. AshError if the partition cannot be read."""
        with self._opened() as directory:
            block = read_bytes(directory / self.name) if isinstance(directory, Path) else self._mtools(directory)
        return Countdown.of_block(block)

    def write(self, notes: Countdown) -> None:
        """Replace GRUB's notes, on the disk."""
        with self._opened() as directory:
            if isinstance(directory, Path):
                self._write_to(directory / self.name, notes.block)
            elif not self._write_in_place(directory, notes.block):
                self._mtools(directory, notes.block)

    def find(self, uuid: str) -> list[tuple[Path, int]]:
        """The partitions with a UUID, as find_partitions() returns them."""

        def has_it(disk: BinaryIO, start: int) -> bool:
            disk.seek(start)
            return fat_uuid(disk.read(SECTOR)) == uuid

        return find_partitions(self.layout, self.image, has_it)

    def place(self) -> tuple[Path, int]:
        """The partition, as find() returns it; AshError if it is missing, or there are several."""
        missing = f"the EFI partition {self.uuid}, where GRUB counts, is missing"
        return only_one(self.find(self.uuid), self.uuid, AshError(missing, "ash fsck --repair", REFUSED))

    @contextmanager
    def _opened(self) -> Iterator[Path | str]:
        """The partition's directory, or if Linux has no FAT, its name for mtools."""
        device, start = self.place()
        if mounted := self._mounted_at(device):
            yield Path(mounted)
            return
        with ExitStack() as stack:
            node = device
            if self.image:
                disk = stack.enter_context(device.open("rb+"))
                size = dict(partitions_of(disk))[start]
                loop = open_new_loop(disk.fileno(), device, start, size)
                stack.callback(os.close, loop)
                node = Path(os.readlink(f"/proc/self/fd/{loop}"))
            directory = PRIVATE / "efi"
            directory.mkdir(exist_ok=True)
            try:
                mount(node, directory, "vfat", MS_NOSUID | MS_NODEV | MS_NOEXEC, "umask=0077")
            except AshError as error:
                if getattr(error.__cause__, "errno", 0) != errno.ENODEV:
                    raise
            else:
                stack.callback(libc, "umount2", os.fsencode(directory), 0)
                yield directory
                return
        yield f"{device}@@{start}"

    def readonly_at(self) -> str:
        """Where the partition is mounted read-only, as Linux does after an error on it; empty if it is not."""
        mounted = self._mounted_at(self.place()[0])
        return mounted if mounted and os.statvfs(mounted).f_flag & os.ST_RDONLY else ""

    def _mounted_at(self, device: Path) -> str:
        """Where a partition is mounted, by the newest mount; empty if it is not."""
        targets = [one.target for one in mounts() if one.kind == "vfat" and self._is_node_of(one, device)]
        return targets[-1] if targets else ""

    @staticmethod
    def _is_node_of(one: Mount, device: Path) -> bool:
        major, _, minor = one.device.partition(":")
        return is_node(device, os.makedev(int(major), int(minor)))

    @staticmethod
    def _write_to(path: Path, block: bytes) -> None:
        """Write the block in place: on FAT a rename is not atomic, a sector is."""
        if size_of(path) == BLOCK_SIZE and read_bytes(path)[SECTOR:] == block[SECTOR:]:
            with path.open("rb+", buffering=0) as file:
                file.write(block[:SECTOR])
                os.fsync(file.fileno())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            remove_tree(path)
        with path.open("wb", buffering=0) as file:
            file.write(block)
            os.fsync(file.fileno())
        sync_any_filesystem(path.parent)

    def _write_in_place(self, drive: str, block: bytes) -> bool:
        """Write the block as _write_to() does: mtools would write a new file. Returns whether that was possible."""
        old, (name, _, start) = self._mtools(drive), drive.rpartition("@@")
        if len(old) != BLOCK_SIZE or old[SECTOR:] != block[SECTOR:]:
            return False
        clusters = re.search(r"<(\d+)", run(["mshowfat", "-i", drive, f"::{self.name}"], check=False).stdout)
        if clusters is None:
            return False
        with Path(name).open("rb+", buffering=0) as disk:
            disk.seek(int(start))
            place = int(start) + fat_cluster_at(disk.read(SECTOR), int(clusters[1]))
            disk.seek(place)
            if disk.read(SECTOR) != old[:SECTOR]:
                return False
            disk.seek(place)
            disk.write(block[:SECTOR])
            os.fsync(disk.fileno())
        return True

    def _mtools(self, drive: str, block: bytes | None = None) -> bytes:
        """Read the block (empty if it is missing), or write it."""
        import shutil

        if shutil.which("mtype", path=SYSTEM_PATH) is None:
            what = "this Linux cannot mount the EFI partition, where GRUB counts: it has no FAT"
            raise AshError(what, "install mtools", REFUSED)
        target = f"::{self.name}"
        if block is None:
            return os.fsencode(run(["mtype", "-i", drive, target], check=False).stdout)
        above = [str(path) for path in reversed(Path(self.name).parents) if path.name]
        made = run(["mmd", "-D", "s", "-i", drive, *(f"::{path}" for path in above)], check=False)  # they may exist
        if run(["mdir", "-b", "-i", drive, f"{target}/"], check=False).returncode == 0:  # a directory in its place
            run(["mdeltree", "-i", drive, target])
        copied = run(["mcopy", "-o", "-i", drive, "-", target], check=False, input=block.decode())
        if copied.returncode or self._mtools(drive) != block:  # on a full partition mcopy 4.0.32 ends with 0
            said = last_words(copied.stderr or made.stderr, 1)
            raise OSError(said or f"is there a file in the place of {Path(self.name).parent}?")
        return block


# In the first MiB of a device, which btrfs leaves to boot loaders, GRUB 2.14 has a sector for its environment.
ENVIRONMENT_AT, RESERVED = 256 << 10, 1 << 20  # bytes from the start of the device
BTRFS_DEV_TREE, BTRFS_DEV_EXTENT = 4, 204
# In the boot sector, as grub-install writes it: the code ends here; the place of the sector where core.img starts. That
# sector ends with a list of the others, backwards: where, and how many.
BOOT_CODE, CORE_AT, BLOCK_LIST = 440, 0x5C, struct.Struct("<QHH")


def boot_code(disk: BinaryIO) -> bytes:
    """The GRUB that the BIOS starts from a disk: the boot sector's code and core.img; empty if it is not GRUB."""
    sector = disk.read(SECTOR)[:BOOT_CODE]
    disk.seek(int.from_bytes(sector[CORE_AT : CORE_AT + 8], "little") * SECTOR)
    first = disk.read(SECTOR)
    if b"GRUB" not in sector or len(first) < SECTOR:
        return b""
    parts = [sector, first]
    for at in range(len(first) - BLOCK_LIST.size, 0, -BLOCK_LIST.size):
        start, count, _ = BLOCK_LIST.unpack_from(first, at)
        if not count:
            break
        disk.seek(start * SECTOR)
        parts.append(disk.read(count * SECTOR))
    return b"".join(parts)


def is_first_reserved(path: Path) -> bool:
    """Whether the only device of a btrfs has nothing in its first MiB; mkfs.btrfs before 4.1 did not see to that."""
    (devices,) = struct.unpack_from("=Q", ask_btrfs(path, BTRFS_IOC_FS_INFO, bytes(1024)), 8)
    key = (BTRFS_DEV_TREE, 1, U64_MAX, 0, U64_MAX, 0, U64_MAX, BTRFS_DEV_EXTENT, BTRFS_DEV_EXTENT, 1, 0)
    request = SEARCH_KEY.pack(*key, SECTOR).ljust(SECTOR + 112, b"\0")
    answer = ask_btrfs(path, BTRFS_IOC_TREE_SEARCH_V2, request)
    (items,) = struct.unpack_from("=I", answer, 64)
    return bool(devices == 1 and items and SEARCH_HEADER.unpack_from(answer, 112)[2] >= RESERVED)


class EnvironmentBlock:
    """The sector in the header of btrfs with GRUB's notes, on a disk that has no EFI partition.

    GRUB itself must show that it can write there: ash asks for that with a name for the GRUB in the boot sector, and
    GRUB repeats it. Any doubt means that GRUB does not count: no other system's notes are there, nor anything unknown;
    the file system has one device, a partition of a disk.

    Args:
        layout: of the distribution whose notes they are.
        image: the disk image that the file system is on; else it is on a disk of this machine.
    """

    name, where = "the environment block", "in the header of btrfs"
    for_grub = f"($root){ENVIRONMENT_AT // SECTOR}+1"
    if_there = (f'if [ "${GRUB_FEATURE}" = "y" ]; then',)

    def __init__(self, layout: Layout, image: Path | None = None) -> None:
        self.layout = layout
        self.image = image

    @property
    def counts(self) -> bool:
        """Whether the GRUB that is installed has shown that it can write here; for others than root, as root noted."""
        if os.geteuid():
            return bool(read_text(self.layout.envblock))
        with contextlib.suppress(AshError, OSError):
            return (notes := self.read()) is not None and notes.seen == self._installed() != ""
        return False

    @property
    def is_asked_for(self) -> bool:
        """Whether ash has asked GRUB to show that it can write."""
        with contextlib.suppress(AshError, OSError):
            return (notes := self.read()) is not None and notes.ask != ""
        return False

    def learn(self) -> None:
        """Ask the GRUB that is installed to show that it can write here, and note if it has."""
        with contextlib.suppress(AshError, OSError):
            before, installed = self.read(), self._installed()
            if installed and (before or self._is_free()):
                notes = before or Countdown()
                asking = notes._replace(ask=installed, seen=installed if notes.seen == installed else "")
                if asking != before:
                    about_to("ask what GRUB can write to")
                    self.write(asking)
        shown = f"{self._installed()}\n" if self.counts else ""
        if shown != read_text(self.layout.envblock):
            write_file(self.layout.envblock, shown)

    def read(self) -> Countdown | None:
        """GRUB's notes; None if they are missing, damaged, or those of another system."""
        notes = Countdown.of_block(self._sector(), SECTOR)
        return notes if notes and notes.ash == self.layout.distro else None

    def write(self, notes: Countdown) -> None:
        """Replace GRUB's notes, on the disk: a sector is written as a whole."""
        node, at, _ = self._place()
        with node.open("rb+", buffering=0) as disk:
            disk.seek(at)
            disk.write(notes._replace(ash=self.layout.distro).block[:SECTOR])
            os.fsync(disk.fileno())

    def _is_free(self) -> bool:
        """Whether nobody uses the sector: it is empty, or an empty block; and GRUB's modules are of 2.14."""
        sector, module = self._sector(), self.layout.grub_cfg.with_name("i386-pc") / "normal.mod"
        is_empty = sector in (bytes(SECTOR), Countdown().block[:SECTOR])
        return is_empty and GRUB_FEATURE.encode() in read_bytes(module) and is_first_reserved(self.layout.snapshots)

    def _sector(self) -> bytes:
        node, at, _ = self._place()
        with node.open("rb", buffering=0) as disk:
            # GRUB may have written since Linux has read it: the machine was hibernated.
            os.posix_fadvise(disk.fileno(), at, os.sysconf("SC_PAGE_SIZE"), os.POSIX_FADV_DONTNEED)
            disk.seek(at)
            return disk.read(SECTOR)

    def _installed(self) -> str:
        """A name for the GRUB in the boot sector of the disk; empty if there is none."""
        import hashlib

        with self._place()[2].open("rb") as disk, contextlib.suppress(OverflowError):
            code = boot_code(disk)
            return hashlib.sha256(code).hexdigest()[:16] if code else ""
        return ""

    def _place(self) -> tuple[Path, int, Path]:
        """The device or image with the block, its offset there, and the disk that the BIOS starts."""
        if self.image:
            return self.image, btrfs_partition(self.image)[0] + ENVIRONMENT_AT, self.image
        device = device_of(self.layout.snapshots)
        number = device.stat().st_rdev if device else 0
        entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
        if not (entry / "partition").exists() or any((entry.parent / "slaves").glob("*")):
            raise AshError("the file system is not on a partition of a disk")
        return Path("/dev", entry.name), ENVIRONMENT_AT, Path("/dev", entry.parent.name)


class GrubNotes:
    """Where GRUB keeps its notes between two starts.

    Args:
        layout: of the distribution whose notes they are.
        image: the disk image that the file system is on; else it is on a disk of this machine.
    """

    def __init__(self, layout: Layout, image: Path | None = None) -> None:
        self.efi = EfiPartition(layout, image)
        self.block = EnvironmentBlock(layout, image)

    @property
    def place(self) -> EfiPartition | EnvironmentBlock:
        return self.efi if self.efi.uuid else self.block

    @property
    def counts(self) -> bool:
        """Whether there is a place that GRUB can write to."""
        return bool(self.efi.uuid) or self.block.counts

    def learn(self) -> None:
        """Find out what GRUB can do without an EFI partition. The caller holds the lock "deploy"."""
        if not self.efi.uuid:
            self.block.learn()

    def read(self) -> Countdown | None:
        """GRUB's notes; None if they are missing or damaged. AshError if the place cannot be read."""
        return self.place.read()

    def write(self, notes: Countdown) -> None:
        """Replace GRUB's notes, on the disk. A power cut leaves the old or the new ones."""
        about_to("write GRUB's notes")
        try:
            self.place.write(notes)
        except OSError as error:
            what = f"cannot write GRUB's notes {self.place.where}: {reason(error)}"
            raise AshError(what, f"have it writable, with room for {self.place.name}") from error


# --- Distributions ---------------------------------------------------------------------------------------------


class Distro:
    """A distribution: its package manager, and short answers to what differs between distributions.

    A class of `distros/<id>/ashpk.py`; a derivative inherits from its parent distribution and changes a few lines.
    Which init system a root boots with is not asked here, since one distribution may offer several: see init_of().
    """

    id: ClassVar[str] = ""
    registry: ClassVar[dict[str, type[Distro]]] = {}

    package_manager: ClassVar[PackageManager]
    boot_tools: ClassVar[BootTools] = BootTools()
    make_initramfs: ClassVar[Sequence[str]] = ()  # the command that makes one; the version of the kernel follows
    initramfs_settings: ClassVar[str] = "(?!)"  # matches the paths in /etc that an initramfs is made from
    executable: ClassVar[str] = "usr/bin/ash"  # from the root; elsewhere if another program has that name
    admin_group: ClassVar[str] = "wheel"  # its members may use sudo
    not_live: ClassVar[str] = "(?!)"  # matches packages that a running system cannot replace: libc, init, dbus
    prompt_variables: ClassVar[Sequence[str]] = ()  # what shells show of these in their prompt tells where they run
    has_aur: ClassVar[bool] = False  # whether the key `aur` of ash.conf has an effect
    # Programs, or patterns of files, that ash and the boot need in a root: {name: its package}.
    needs: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        Distro.registry[cls.id] = cls


def load_distro(ident: str) -> Distro:
    """The module for a distribution id: part of this file if ash is installed, else from the checkout."""
    module = HERE / "distros" / ident / "ashpk.py"
    if ident not in Distro.registry and re.fullmatch(r"[\w.-]+", ident) and module.is_file():
        import importlib

        if str(HERE) not in sys.path:
            sys.path.insert(0, str(HERE))
        importlib.import_module(f"distros.{ident}.ashpk")
    if ident not in Distro.registry:
        raise AshError(f"this ash does not know the distribution {ident}", "--distro ID names another", USAGE)
    return Distro.registry[ident]()


def has_needed(root: Path, name: str) -> bool:
    """Whether a root has a program, or a file that matches a pattern with slashes."""
    if "/" in name:
        return any(root.glob(name))
    return any(os.path.lexists(path_inside(root, directory) / name) for directory in ("usr/bin", "usr/sbin"))


def lost_needs(distro: Distro, before: Path, after: Path) -> list[str]:
    """What ash and the boot need that a root had before and does not have now: packages, and "every kernel"."""
    lost = [name for name in distro.needs if has_needed(before, name) and not has_needed(after, name)]
    kernels = ["every kernel"] if kernels_of(before) and not kernels_of(after) else []
    return [*dict.fromkeys(distro.needs[name] for name in lost), *kernels]


# --- The chroot: programs of a snapshot run in their own namespaces, and end with ash --------------------------

# The device nodes that programs need. No block devices: a package's script must not write to a disk.
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
DEVICE_LINKS = {
    "ptmx": "pts/ptmx", "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
}  # fmt: skip
RESOLV_CONF = Path("/etc/resolv.conf")
# PID 1 of the namespace: `cat`, which ends with the supervisor, since the supervisor has the other end of the pipe that
# it reads. The kernel reaps its children, because it ignores SIGCHLD.
FIRST_PROCESS = Path("/bin/cat")
STOP = signal.SIGUSR1  # tells the supervisor of a chroot to kill what runs there, and to clean up
FATAL_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPIPE)
# Files of /proc that root may write to without any capability, and that change the machine.
PROC_READONLY = ("acpi", "asound", "bus", "fs", "irq", "scsi", "sys", "sysrq-trigger")
# The capabilities that package scripts need, from <linux/capability.h>. All others would reach further than the root.
CAPABILITIES = {
    "chown": 0, "dac_override": 1, "fowner": 3, "fsetid": 4, "kill": 5, "setgid": 6, "setuid": 7, "setpcap": 8,
    "linux_immutable": 9, "net_bind_service": 10, "net_raw": 13, "ipc_owner": 15, "sys_chroot": 18, "sys_nice": 23,
    "sys_resource": 24, "mknod": 27, "lease": 28, "audit_write": 29, "setfcap": 31,
}  # fmt: skip
CAPABILITY_VERSION_3 = 0x20080522
# System calls that are refused, since no capability guards them: add_key, request_key, keyctl, which reach root's keys,
# and two requests of ioctl, which type into the terminal that ash runs on. By AUDIT_ARCH of <linux/audit.h>.
REFUSED_CALLS = {
    0xC000003E: (248, 249, 250, 16),  # x86_64
    0x40000003: (286, 287, 288, 54),  # i386
    0xC00000B7: (217, 218, 219, 29),  # aarch64
    0x40000028: (309, 310, 311, 54),  # arm
    0xC00000F3: (217, 218, 219, 29),  # riscv64
}
TIOCSTI, TIOCLINUX = 0x5412, 0x541C


def drop_capabilities() -> None:
    """Keep only CAPABILITIES, in all sets of this thread; what it executes cannot get others back."""
    kept = sum(1 << number for number in CAPABILITIES.values())
    for number in range(64):
        if not kept >> number & 1:
            try:
                libc("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)
            except OSError as error:
                if error.errno != errno.EINVAL:  # EINVAL: this kernel has fewer capabilities
                    raise
    now = re.search(r"^CapPrm:\s*(\w+)", read_text(Path("/proc/self/status")), re.MULTILINE)
    kept &= int(now[1], 16) if now else 0
    low, high = kept & 0xFFFFFFFF, kept >> 32
    libc("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), struct.pack("6I", low, low, 0, high, high, 0))


def refuse_calls() -> None:
    """Let REFUSED_CALLS fail with EPERM from now on, by a seccomp filter, here and in all that is executed."""
    import ctypes

    load, equal, leave = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = []
    for architecture, (*calls, ioctl) in REFUSED_CALLS.items():
        program += [(load, 0, 0, 4), (equal, 0, 10, architecture), (load, 0, 0, 0)]  # of struct seccomp_data
        program += [(equal, 7 - index, 0, call) for index, call in enumerate(calls)]
        program += [(equal, 0, 3, ioctl), (load, 0, 0, 24)]  # the low half of its second argument
        program += [(equal, 2, 0, TIOCSTI), (equal, 1, 0, TIOCLINUX), (leave, 0, 0, allow), (leave, 0, 0, refuse)]
    program.append((leave, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    libc("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0)


def close_directories() -> None:
    """Close open directories, which the caller may have left to ash: programs inside could leave the root by them."""
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        with contextlib.suppress(OSError):  # the one that listed them
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                os.close(descriptor)


def become(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Execute a program, found as a shell finds it. Returns the exit status of a shell if that fails, and says why."""
    directories = environment["PATH"].split(":")
    failure, status = os.strerror(errno.ENOENT), 127
    for name in [argv[0]] if "/" in argv[0] else [f"{directory}/{argv[0]}" for directory in directories]:
        try:
            os.execve(name, [*argv], environment)
        except OSError as error:
            if error.errno == errno.ENOEXEC:  # a script without #!
                os.execve("/bin/sh", ["sh", "-c", 'exec "$@"', "sh", name, *argv[1:]], environment)
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure, status = str(error.strerror), 126
    os.write(2, f"ash: cannot run {one_line(argv[0])}: {failure}\n".encode(errors="replace"))
    return status


class Overlay(NamedTuple):
    """A writable view of a directory: writes go to `upper`, and `lower` does not change."""

    lower: Path
    upper: Path
    work: Path

    def mount_on(self, target: Path) -> None:
        """Mount it without redirects and metadata copies, so that `upper` alone shows what was changed."""
        lower, options = self.lower, "redirect_dir=off,metacopy=off,index=off"
        if self._has_equal_inodes():
            empty = self.work.with_name(f"{self.work.name}-empty")
            empty.mkdir(exist_ok=True)
            mount("overlay", target, "overlay", data=f"lowerdir={lower}:{empty},{options}")
            lower, options = target, f"{options},xino=on"
        dirs = f"lowerdir={lower},upperdir={self.upper},workdir={self.work}"
        mount("overlay", target, "overlay", data=f"{dirs},{options}")

    def _has_equal_inodes(self) -> bool:
        """Whether a file in `upper` may have the inode number of one in `lower`, in another subvolume of one btrfs.

        overlayfs takes them for one file system, and shows both numbers as they are; programs that copy files with
        several links would take them for one file. An overlay below, even an empty one, is a file system of its own.
        """
        with contextlib.suppress(OSError):  # another file system
            is_one = file_system_id(self.lower) == file_system_id(self.upper)
            return is_one and self.lower.stat().st_dev != self.upper.stat().st_dev
        return False


class Chroot(NamedTuple):
    """A root in which programs run with their own mount, PID, IPC and UTS namespaces; they may write to it."""

    root: Path
    environment: Mapping[str, str] = {}  # added to the cleaned environment
    overlays: Mapping[str, Overlay] = {}  # by path from the root; mounted in this order
    binds: Sequence[tuple[Path, str]] = ()  # files and directories to bind-mount: (source, path from the root)
    transient: Mapping[str, TransientFile] = {}  # files that exist only while a program runs, by path from the root
    privileged: bool = False  # with all capabilities and the machine's /dev, as GRUB's tools need
    resolver: bool = True  # replace resolv.conf with the running system's while a program runs

    def run(
        self, argv: Sequence[str], *, hear: Callable[[bytes], None] | None = None, output: Sequence[int] = ()
    ) -> int:
        """Run a program and wait for it; none of its children and no mount outlives it.

        With `hear`, which receives the output in pieces, the program has no input. `output` has descriptors for stdout
        and stderr, instead of ash's own. Returns the exit status; 128 + the signal number if it was killed.

        Raises:
            AshError: the namespaces or mounts could not be created.
        """
        if console.verbose:
            print(one_line(" ".join(["+", f"[{self.root.name}]", *argv])), file=sys.stderr)
        about_to(f"run {argv[0]} in {self.root.name}")
        sys.stdout.flush()
        sys.stderr.flush()
        problem, problem_in = os.pipe()
        heard, heard_in = os.pipe() if hear else (-1, -1)
        output = (heard_in, heard_in) if hear else output
        parent = os.getpid()
        supervisor = os.fork()
        if supervisor == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, {STOP, signal.SIGCHLD})  # for sigwait() in _start()
            self._supervise(argv, parent, problem_in, output, has_input=not hear)
        os.close(problem_in)
        try:
            if hear:
                os.close(heard_in)
                while piece := os.read(heard, 65536):
                    hear(piece)
            await_end(supervisor)
        except BaseException:
            try:
                os.kill(supervisor, STOP)
                await_end(supervisor)
            except BaseException:  # a second Ctrl-C
                os.kill(supervisor, signal.SIGKILL)
                raise
            raise
        finally:
            _, status = os.waitpid(supervisor, 0)
            if hear:
                os.close(heard)
            said = os.read(problem, 65536).decode(errors="replace")
            os.close(problem)
        if said:
            raise AshError(said)
        return os.waitstatus_to_exitcode(status)

    def _supervise(
        self, argv: Sequence[str], parent: int, problem: int, output: Sequence[int], has_input: bool
    ) -> NoReturn:
        """The child's side of run(): create the namespaces, run the program, clean up."""
        status = OUR_FAILURE_IN_RUN
        try:
            die_with_parent(parent)
            for number in FATAL_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            os.umask(0o022)
            for standard, descriptor in enumerate(output, start=1):
                os.dup2(descriptor, standard)
            if not has_input:
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            libc("unshare", CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS)
            mount("none", Path("/"), flags=MS_REC | MS_SLAVE)
            self._mount()
            with self._transient_files(), self._resolver() if self.resolver else contextlib.nullcontext():
                status = self._start(argv)
        except AshError as error:
            os.write(problem, error.message.encode(errors="replace"))
        except BaseException as error:  # this is a fork of ash, which must not return into ash's code
            os.write(problem, f"cannot run {argv[0]} in {self.root.name}: {reason(error)}".encode(errors="replace"))
        os._exit(status)

    def _mount(self) -> None:
        """Mount what programs need inside the root: /dev, /run, /sys, /tmp, the overlays and the binds."""
        root = self.root
        bind(root, root)
        mount("none", root, flags=MS_BIND | MS_REMOUNT | MS_NOATIME)
        # Any of these may be a symlink in the root, which must not lead out of it.
        dev, run_folder = path_inside(root, "dev"), path_inside(root, "run")
        mount("ash", run_folder, "tmpfs", MS_NOSUID, "mode=0755")
        mount("sysfs", path_inside(root, "sys"), "sysfs", MS_RDONLY | MS_NOSUID | MS_NOEXEC)
        mount("ash", path_inside(root, "tmp"), "tmpfs", MS_NOSUID, "mode=1777")
        (run_folder / "lock").mkdir(mode=0o1777)
        (run_folder / "systemd").mkdir()
        (run_folder / "systemd/container").write_text("ash\n")  # for systemd-detect-virt
        for inside, overlay in self.overlays.items():
            target = path_inside(root, inside)
            target.mkdir(parents=True, exist_ok=True)
            overlay.mount_on(target)
        for source, inside in self.binds:
            target = path_inside(root, inside)
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            bind(source, target)
        forbid_devices(root)  # device nodes made inside do not work
        if self.privileged:
            mount("/dev", dev, flags=MS_BIND | MS_REC)
            private = path_inside(root, str(PRIVATE))
            private.mkdir(exist_ok=True)
            bind(PRIVATE, private)  # contains the device node of an image's disk
        else:
            mount("ash", dev, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=1m")
            self._make_devices(dev)
            mount("none", dev, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NOEXEC)

    @staticmethod
    def _make_devices(directory: Path) -> None:
        os.umask(0)
        for name, (major, minor) in DEVICES.items():
            os.mknod(directory / name, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        for name, target in DEVICE_LINKS.items():
            (directory / name).symlink_to(target)
        for name in ("pts", "shm"):
            (directory / name).mkdir()
        os.umask(0o022)
        # gid 5 is tty on all known distributions; systemd assumes it too.
        mount("devpts", directory / "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
        mount("ash", directory / "shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")

    @contextmanager
    def _transient_files(self) -> Iterator[None]:
        written = []
        for name, file in self.transient.items():
            path = path_inside(self.root, name)
            if os.path.lexists(path):
                continue  # the snapshot has its own
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text)
            path.chmod(file.mode)
            written.append((name, file.text))
        yield
        for name, text in written:
            path = place_inside(self.root, name)
            if not path.is_symlink() and read_text(path) == text:  # else it was replaced, and stays
                path.unlink()

    @contextmanager
    def _resolver(self) -> Iterator[None]:
        """Make host names resolve inside. Restore the root's resolv.conf afterwards, unless a program edited it."""
        path = path_inside(self.root, "etc/resolv.conf")
        if os.path.lexists(path) and not path.is_file():  # do not write to a FIFO or device
            yield
            return
        before = path.read_bytes() if path.is_file() else None
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns) if before is not None else None
        shown = RESOLV_CONF.read_bytes() if RESOLV_CONF.is_file() else before
        if shown != before or self._is_of_running(path):
            path.parent.mkdir(parents=True, exist_ok=True)  # so that programs can create it
        if shown is not None and shown != before:
            self._write_resolver(path, shown)
        yield
        after = path_inside(self.root, "etc/resolv.conf")
        content = after.read_bytes() if after.is_file() else None
        if content != shown:
            if content is not None and self._is_of_running(after):
                link = place_inside(self.root, "etc/resolv.conf")
                link.unlink()
                link.write_bytes(content)
        elif before is None and content is not None:
            after.unlink()
        elif before is not None and content != before:
            self._write_resolver(after, before, times)

    @staticmethod
    def _write_resolver(path: Path, content: bytes, times: tuple[int, int] | None = None) -> None:
        with unprotected(path, path.parent):  # users make it immutable, to keep programs from it
            path.write_bytes(content)
            if times:
                os.utime(path, ns=times)

    def _is_of_running(self, path: Path) -> bool:
        """Whether a path is in /run, which is not part of a snapshot."""
        return path_inside(self.root, "run") in path.parents

    def _start(self, argv: Sequence[str]) -> int:
        """Start the program, with process 1 of its PID namespace beside it, and wait for it.

        Both are in a mount namespace of their own, which has nothing but the root and `init`. Process 1 has the top of
        that as its root, so that `ischroot` says yes, and /proc/1/root leads no further.
        """
        environment = {**clean_environment(), "container": "ash", **INIT_OFFLINE, **self.environment}
        outside, directory = os.open("/proc/self/ns/mnt", os.O_RDONLY), os.open("/", os.O_PATH)
        libc("unshare", CLONE_NEWNS)
        enter_namespace_root()
        top = Path("/sys")  # any directory that is always there, and holds nothing that is needed from here on
        os.chdir(self.root)
        mount("ash", top, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
        (top / "root").mkdir()
        (top / "init").touch()
        bind(FIRST_PROCESS.resolve(), top / "init", readonly=True)
        mount("none", top, flags=MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
        mount(".", top / "root", flags=MS_MOVE)
        first, hold = self._start_first(top / "init", environment)
        pivot(top)
        program = os.fork()
        if program == 0:
            os._exit(self._execute(argv, environment))
        libc("setns", outside, CLONE_NEWNS)
        os.fchdir(directory)
        os.chroot(".")
        ended = 0
        while not ended:
            if signal.sigwait({STOP, signal.SIGCHLD}) == STOP:
                os.kill(first, signal.SIGKILL)  # the kernel kills all others with it
            ended, status = os.waitpid(program, os.WNOHANG)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        for descriptor in (hold, outside, directory):
            os.close(descriptor)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code

    def _start_first(self, init: Path, environment: Mapping[str, str]) -> tuple[int, int]:
        """Start process 1, and wait until it runs: its libraries are in what pivot() takes away.

        Returns its id, and the descriptor at whose closing it ends.
        """
        (source, hold), (answer, answer_in) = os.pipe(), os.pipe()
        os.write(hold, b"\n")
        first = os.fork()
        if first == 0:
            libc("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            for number in (*FATAL_SIGNALS, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)
            os.chdir("/")
            os.dup2(source, 0)
            os.dup2(answer_in, 1)
            if not self.privileged:
                drop_capabilities()
            os.execve(init, [FIRST_PROCESS.name], environment)
        os.close(source)
        os.close(answer_in)
        if not os.read(answer, 1):
            raise AshError(f"{FIRST_PROCESS} of this system cannot be run")
        os.close(answer)
        return first, hold

    def _execute(self, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Become the program, with its root as `/` and with no more rights than it needs; returns if that fails."""
        os.chroot("/root")
        os.chdir("/")  # a shell exports PWD: not the caller's directory
        mount("proc", Path("/proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        for name in PROC_READONLY:
            path = Path("/proc", name)
            if path.exists():
                bind(path, path, readonly=True)
        close_directories()
        if not self.privileged:
            refuse_calls()
            drop_capabilities()
        for number in FATAL_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP, signal.SIGCHLD})
        return become(argv, environment)


def private_directory() -> Path | None:
    """Where temporary files go: not into the caller's TMPDIR, which is not to be trusted."""
    return PRIVATE if PRIVATE.is_mount() else None


def machine_chroot(
    root: Path,
    argv: Sequence[str],
    *,
    binds: Mapping[Path, str] = {},
    overlays: Mapping[str, Overlay] = {},
    tell: str = "(?!)",
) -> str:
    """Run one of GRUB's tools, or the like, chrooted in a writable root and with access to the machine's disks.

    Lines on stderr that begin with a match of `tell` are shown to the user. Returns the standard output.

    Raises:
        AshError: it failed; the message has its last lines.
    """
    import tempfile

    chroot = Chroot(root, {"LC_ALL": "C.UTF-8"}, overlays, [*binds.items()], privileged=True, resolver=False)
    directory = private_directory()
    with tempfile.TemporaryFile(dir=directory) as stdout, tempfile.TemporaryFile(dir=directory) as stderr:
        status = chroot.run(argv, output=[stdout.fileno(), stderr.fileno()])
        stdout.seek(0)
        stderr.seek(0)
        output, errors = (stream.read().decode(errors="replace") for stream in (stdout, stderr))
    if status:
        raise ProgramError(f"{argv[0]} failed ({status}): {last_words(errors or output)}", output=errors)
    for line in lines_of(errors):
        if re.match(tell, line):
            console.say(one_line(line))
    return output


# --- Starting a snapshot as it is, from the boot menu ------------------------------------------------------------

# Started in place of init, as the kernel's option `init=`. It needs no particular init system.
INIT_SCRIPT = """\
#!/bin/sh
# Starts a snapshot as it is: read-only, and changes of /etc are kept in memory.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 022
[ -e /proc/mounts ] || mount -t proc proc /proc
grep -q '^[^ ]* /run ' /proc/mounts || mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /run
mkdir -p /run/ash/etc/upper /run/ash/etc/work
if mount -t overlay -o lowerdir=/etc,upperdir=/run/ash/etc/upper,workdir=/run/ash/etc/work overlay /etc; then
    # Without the lines of a deployment: a root that may be writable, and an /etc that is.
    sed -e '\\#^UUID=[^ ]* / btrfs #d' -e '\\#^[^ ]* /etc none bind#d' /etc/fstab > /run/ash/etc/fstab &&
        cp /run/ash/etc/fstab /etc/fstab
fi
exec /sbin/init "$@"
"""
BOOT_RECORD_SHAPE = {"inputs": is_text, "config": (BOOT_CONFIG_SHAPE, None)}


def require_readable(root: Path, config: BootConfig, tools: BootTools) -> None:
    """Raise AshError if GRUB could not read a menu with this configuration, by the check that a root has for that.

    mkconfig only runs it for what it writes to a file, and there it would find mistakes that ash leaves out.
    """
    import tempfile

    entry = ["menuentry x {", *grub_start("x", "x", config, "ro"), "}"]
    with tempfile.NamedTemporaryFile("w", errors="surrogateescape", dir=private_directory()) as file:
        file.write("\n".join([*config.header, *entry, config.foreign, ""]))
        file.flush()
        machine_chroot(root, [tools.script_check, "/run/grub.cfg"], binds={Path(file.name): "run/grub.cfg"})


def made_by_mkconfig(root: Path, *, layout: Layout, tools: BootTools) -> BootConfig:
    """The boot configuration of a writable root.

    Raises:
        AshError: it has no kernel, mkconfig fails, or GRUB could not read or load what ash takes from it.
    """
    layout.grub_cfg.parent.mkdir(exist_ok=True)
    binds = {layout.grub_cfg.parent: tools.directory}
    with signals_heard():  # scripts of the administrator may take long
        made = machine_chroot(root, [tools.mkconfig], binds=binds, tell=FOUND_ELSEWHERE)
    made = made.replace(f"/{root.name}/", MADE_IN)
    config = BootConfig.parse(made, [read_text(path) for path in specified_entries(root)])
    require_readable(root, config, tools)
    require_usable(root, config)
    return config


def boot_record(root: Path) -> tuple[str, BootConfig | None]:
    """The boot_inputs() of a snapshot, and how its kernel is started: None if it has none, or an older ash made it."""
    with contextlib.suppress(ValueError):
        record = from_json(read_text(place_inside(root, IN_ROOT_BOOT)), BOOT_RECORD_SHAPE)
        config = record["config"]
        return record["inputs"], BootConfig(**fields_of(BootConfig, config)) if config else None
    return "", None


def write_boot_record(root: Path, inputs: str, made: BootConfig | None) -> None:
    config = made._replace(header=(), foreign="", classes="")._asdict() if made else None
    text = json.dumps({"inputs": inputs, "config": config}) + "\n"
    if read_text(place_inside(root, IN_ROOT_BOOT)) != text:  # a transaction that changes nothing stays one
        write_inside(root, IN_ROOT_BOOT, text)


def make_startable(root: Path, *, layout: Layout, tools: BootTools) -> None:
    """Have a writable root contain what it needs to be started as it is.

    How its kernel is started is only found out again if what that depends on has changed, or if it failed.

    Raises:
        AshError: it has a kernel, but how that is started is not known.
    """
    script = place_inside(root, IN_ROOT_INIT)
    if script.is_symlink() or read_text(script) != INIT_SCRIPT:
        write_inside(root, IN_ROOT_INIT, INIT_SCRIPT)
        script.chmod(0o755)
    inputs = boot_inputs(root)
    if boot_record(root)[0] == inputs:
        return
    try:
        made = made_by_mkconfig(root, layout=layout, tools=tools) if kernels_of(root) else None
    except AshError:
        write_boot_record(root, "", None)
        raise
    write_boot_record(root, inputs, made)


def startable_entries(layout: Layout, uuid: str, tree: Tree, describe: Callable[[int], str], classes: str) -> str:
    """The text of the submenu that starts each snapshot as it is; those that have no kernel are left out.

    Args:
        layout, uuid: of the file system.
        tree: the snapshots.
        describe: returns a snapshot's description.
        classes: options of all entries.
    """
    entries = ["# Made by ash, from its tree of snapshots."]
    for number, depth in tree.walk():
        config = boot_record(layout.rootfs(number))[1]
        if config is None:
            continue
        title = grub_title(f"{'  ' * depth}{number} - {describe(number)}")
        entries += [
            " ".join(["menuentry", title, "--id", f"ash-snapshot-{number}", *filter(None, [classes]), "{"]),
            *grub_start(layout.rootfs_name(number), uuid, config, "ro", f"init=/{IN_ROOT_INIT}"),
            "}",
        ]
    return "\n".join([*entries, ""])


KEPT_MENUS = 5  # older grub.cfg files
AGES = ("the last change", *(f"the last {number} changes" for number in range(2, KEPT_MENUS + 1)))


GRUB_CFG_OF = "/@boot_{}/grub/grub.cfg"
GRUB_CFGS = "/@boot*/grub*/grub.cfg"  # also those of AshOS: without an id, or in Fedora's directory grub2


def grub_neighbours(layout: Layout, uuid: str) -> list[str]:
    """GRUB's commands for an entry for each other system on this file system, whichever there are then: its menu."""
    own = GRUB_CFG_OF.format(layout.distro)
    return [
        "insmod regexp",
        f"for ash_menu in {GRUB_CFGS}; do",  # the pattern itself, if nothing matches
        f'    if [ "$ash_menu" != "{own}" -a -f "$ash_menu" ]; then',
        "        set ash_system=AshOS",
        "        regexp --set=1:ash_system '/@boot_(.*)/grub2?/grub.cfg' \"$ash_menu\"",
        '        menuentry "Another system: $ash_system" "$ash_menu" --id "ash-system-$ash_system" {',
        f"            {grub_search(uuid)}",
        '            configfile "$2"',
        "        }",
        "    fi",
        "done",
    ]


def grub_submenus(layout: Layout, uuid: str) -> list[str]:
    """GRUB's commands for the submenus with all snapshots, and with the menus before this one."""
    earlier, menus = [], layout.boot_uuid or uuid
    for age, what in enumerate(AGES, 1):
        file = layout.grub_file(OLD_GRUB_CFG.format(age))
        earlier += [
            f"    if [ -f {file} ]; then",
            f"        menuentry 'The boot menu before {what}' --id ash-menu-{age} {{",
            f"            {grub_search(menus)}",
            f"            set {IN_RESCUE}=1",
            f"            export {IN_RESCUE}",
            f"            configfile {file}",
            "        }",
            "    fi",
        ]
    return [
        "submenu 'All snapshots, as they are' --id ash-snapshots {",
        f"    {grub_search(menus)}",
        f"    source {layout.grub_file(SNAPSHOTS_CFG)}",
        "}",
        "submenu 'Rescue' --id ash-rescue {",
        f"    {grub_search(menus)}",
        *earlier,
        "}",
        *grub_neighbours(layout, uuid),
    ]


# --- Accounts: the same name has the same uid or gid in all snapshots ------------------------------------------

ID_FILES = ("passwd", "group", "subuid", "subgid")
FIRST_HUMAN, LAST_HUMAN, LAST_SYSTEM = 1000, 60000, 999  # login.defs of Debian, Arch and Fedora
SUBORDINATES = 65536  # the size of the range that useradd gives a user
NO_HOMES = frozenset({"", "/", "/nonexistent", "/dev/null", "/home", "/root", "/var", "/var/empty", "/var/lib"})


def is_of_people(number: int) -> bool:
    """Whether a uid or gid is of the login range, which neither the system nor "nobody" has."""
    return FIRST_HUMAN <= number <= LAST_HUMAN


class AccountFile:
    """A passwd, group, shadow, gshadow, subuid or subgid file, as rows of fields.

    Lines that are not accounts, such as comments and NIS entries, are rows too, so that str() restores the text.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.rows = [line.split(":") for line in lines_of(text)]
        self.has_ranges = name in ("subuid", "subgid")
        self.id_column = 1 if self.has_ranges else 2

    @classmethod
    def read(cls, path: Path) -> AccountFile:
        """Read a file; a symlink counts as empty, as an absolute one leads to the file of the running system."""
        return cls(path.name, "" if path.is_symlink() else read_text(path))

    def __str__(self) -> str:
        return "".join(f"{':'.join(row)}\n" for row in self.rows)

    def id_of(self, row: Sequence[str]) -> int | None:
        """The uid, gid or start of the range in a row; None if it has no valid one."""
        return to_number(row[self.id_column]) if len(row) > self.id_column else None

    @property
    def ids(self) -> dict[str, int]:
        """The id of each account, by name; an account's first row counts."""
        found: dict[str, int] = {}
        for row in self.rows:
            if (number := self.id_of(row)) is not None:
                found.setdefault(row[0], number)
        return found

    @property
    def people(self) -> dict[str, int]:
        """The ids of the login range, by name: those of people and of their groups."""
        return {name: number for name, number in self.ids.items() if is_of_people(number) and name[:1] not in "+-"}

    @property
    def passwords(self) -> dict[str, str]:
        """The field of the password of each account of a shadow file, by name."""
        return {row[0]: row[1] for row in reversed(self.rows) if len(row) > 1}

    def row(self, account: str) -> list[str] | None:
        """An account's first row, which is the one that counts."""
        return next((row for row in self.rows if row[0] == account), None)

    def put(self, account: str, *rows: list[str]) -> None:
        """Replace the rows of an account in their place; new ones come before the entries of NIS."""
        end = next((index for index, row in enumerate(self.rows) if row[0][:1] in ("+", "-")), len(self.rows))
        where = next((index for index, row in enumerate(self.rows) if row[0] == account), end)
        others = [[row for row in part if row[0] != account] for part in (self.rows[:where], self.rows[where:])]
        self.rows = [*others[0], *rows, *others[1]]


# The numbers of fields of a row, and the fields that are numbers. An old shadow file has five fields.
ROW_FIELDS = {
    "passwd": ({7}, (2, 3)), "group": ({4}, (2,)), "shadow": ({5, 9}, ()), "gshadow": ({4}, ()),
    "subuid": ({3}, (1, 2)), "subgid": ({3}, (1, 2)),
}  # fmt: skip


def is_row(name: str, row: Sequence[str]) -> bool:
    """Whether a line of an account file, split into fields, is an account, a comment, an NIS entry or blank."""
    if row[0][:1] in ("#", "+", "-") or not ":".join(row).strip():
        return True
    sizes, numbers = ROW_FIELDS[name]
    return bool(row[0]) and len(row) in sizes and all(to_number(row[column]) is not None for column in numbers)


def root_shell(root: Path) -> str:
    """The login shell of a root's root user; /bin/sh if that is not installed."""
    rows = AccountFile.read(path_inside(root, "etc/passwd")).rows
    shell = next((row[-1] for row in rows if row[0] == "root"), "")
    return shell if shell and path_inside(root, shell).is_file() else "/bin/sh"


def free_id(name: str, like: int, taken: Container[int]) -> int:
    """Find an id that is not taken, of the same kind as `like`: system or human, or the start of a range."""
    if name in ("subuid", "subgid"):
        candidates = range(like, 1 << 31, SUBORDINATES)
    else:
        candidates = range(LAST_SYSTEM, 0, -1) if like < FIRST_HUMAN else range(FIRST_HUMAN, LAST_HUMAN + 1)
    number = next((n for n in candidates if n not in taken), None)
    if number is None:
        raise AshError(f"no free id is left for {name}", "delete accounts that are no longer used")
    return number


def has_password(field: str) -> bool:
    """Whether a field of shadow has a password, locked or not."""
    return field.lstrip("!") not in ("", "*", "x")


def home_of(row: Sequence[str]) -> str:
    """The home directory in a row of passwd; empty if it has none that is an account's own."""
    home = os.path.normpath(row[5]) if len(row) > 5 and row[5].startswith("/") else ""
    return "" if home in NO_HOMES else home


def is_renamed(old: Sequence[str], new: Sequence[str], password: str, other: str) -> bool:
    """Whether two rows of passwd, with the fields of their passwords, are one account that was renamed.

    It has the same number, and the same home or password: a hash has a salt, so no two accounts have the same.
    """
    same_password = has_password(password) and password.lstrip("!") == other.lstrip("!")
    return old[2:3] == new[2:3] != [] and (same_password or home_of(old) == home_of(new) != "")


def is_misnumbered(account: str, there: Mapping[str, int], known: Mapping[str, int]) -> bool:
    """Whether an account of an /etc should have the id that is known of it instead.

    Accounts that share an id in one /etc do so on purpose: no tool gives an id twice by itself. So does a second name
    of root: nobody gets or loses the id 0.
    """
    number, wanted = there[account], known.get(account, there[account])
    return number != wanted and 0 not in (number, wanted) and list(there.values()).count(number) == 1


def new_ids(
    kind: str,
    own: Mapping[str, int],
    machine: Mapping[str, int],
    known: Mapping[str, int],
    newcomers: Container[str] = (),
) -> dict[str, int]:
    """The new ids of accounts of a snapshot that differ from, or clash with, those of the people of the machine.

    Args:
        kind: the name of the file, for free_id().
        own: the ids in the snapshot.
        machine: all ids in the running system.
        known: the ids in the registry.
        newcomers: accounts of the machine that the snapshot is to get; they keep their ids as people do.

    An account that shares the id of one of those people on purpose, in the snapshot, follows it.
    """
    found: dict[str, int] = {}
    people = {name: number for name, number in machine.items() if is_of_people(number) or name in newcomers}
    for number in dict.fromkeys(own.values()):
        names = [name for name, its in own.items() if its == number]
        there, others = ([n for n in names if (n in people) is of_machine] for of_machine in (True, False))
        found |= {name: people[name] for name in there if people[name] != number}
        if not is_of_people(number):  # the machine's others have their ids everywhere
            others = [name for name in others if number in people.values() and machine.get(name) != number]
        if not others:
            continue
        new = people[there[0]] if there else known.get(others[0], number)
        rest = {found.get(name, its) for name, its in own.items() if name not in names}
        if not there and (new in machine.values() or new in rest or is_of_people(new) is not is_of_people(number)):
            new = free_id(kind, number, {*known.values(), *own.values(), *machine.values(), *found.values()})
        found |= {name: new for name in others if new != number}
    return found


def chown_by_map(path: Path, original: Path | None, users: Mapping[int, int], groups: Mapping[int, int]) -> None:
    """Map a file's uid and gid to new ones, except for those that `original` has too; keep its mode."""
    was = status_of(original) if original else None

    def new_owner(now: os.stat_result) -> tuple[int, int]:
        user = users.get(now.st_uid, -1) if was is None or was.st_uid != now.st_uid else -1
        return user, groups.get(now.st_gid, -1) if was is None or was.st_gid != now.st_gid else -1

    now = path.lstat()
    if new_owner(now) == (-1, -1):
        return
    if not (stat.S_ISREG(now.st_mode) or stat.S_ISDIR(now.st_mode)):
        os.chown(path, *new_owner(now), follow_symlinks=False)
        return
    with open_descriptor(path) as file:  # after fchown its new owner may put a symlink in its place
        now = os.fstat(file)  # its owner may have put another file in its place
        user, group = new_owner(now)
        capabilities = None
        with contextlib.suppress(OSError):
            capabilities = os.getxattr(file, "security.capability")
        flags = inode_flags(file)
        set_inode_flags(file, 0, PROTECTING)
        os.fchown(file, user, group)
        os.fchmod(file, stat.S_IMODE(now.st_mode))  # chown clears setuid bits, and capabilities
        if capabilities is not None:
            os.setxattr(file, "security.capability", capabilities)
        set_inode_flags(file, flags, PROTECTING)


def re_own(directories: Mapping[Path, Path | None], users: Mapping[int, int], groups: Mapping[int, int]) -> None:
    """Map the owners of directories, or files, with all below them; unless the original has the same owner.

    A directory comes after what is below it: as long as this is not finished, its owner is the old one.
    """
    done = set()
    for directory, original in directories.items() if users or groups else ():
        about_to(f"re-own {directory.name}")
        for inside in (*paths_below(directory), ""):
            inode = inode_of(directory / inside)
            if inode is not None and inode not in done:  # not deleted meanwhile, nor another link to the same file
                done.add(inode)
                with contextlib.suppress(FileNotFoundError):
                    chown_by_map(directory / inside, original / inside if original else None, users, groups)


class Renumbering(NamedTuple):
    """New ids for accounts of a root."""

    accounts: Mapping[str, Mapping[str, int]]  # for each of ID_FILES, the new ids by account
    moves: Mapping[str, Mapping[int, int]]  # for each of ID_FILES, the new ids by old one: files follow
    unchanged: Container[str] = ()  # the users who keep their primary group

    def apply(self, root: Path, directories: Mapping[Path, Path | None]) -> None:
        """Rewrite a root's account files. Re-own the files of directories, unless the original has the same owner."""
        users, groups = self.moves.get("passwd", {}), self.moves.get("group", {})
        for name in ID_FILES:
            file, wanted = AccountFile.read(root / "etc" / name), self.accounts.get(name, {})
            before, ids = str(file), file.ids
            for row in file.rows:
                number = file.id_of(row)
                if row[0] in wanted and number is not None and number == ids[row[0]]:
                    row[file.id_column] = str(wanted[row[0]])
                group = to_number(row[3]) if name == "passwd" and len(row) > 3 else None
                if group is not None and group in groups and row[0] not in self.unchanged:
                    row[3] = str(groups[group])
            if str(file) != before:
                write_text(root / "etc" / name, str(file))
        re_own(directories, users, groups)


class AccountIds:
    """The registry of ids ever given to an account, by name, for each of ID_FILES.

    It also has the new names of users that were renamed, and the people and groups that were deleted in the running
    system, until one of that name is made again. Two names may have one id, until the account of a snapshot that
    clashes with one of the running system gets another one, with its files.
    """

    def __init__(
        self,
        given: Mapping[str, dict[str, int]] = {},
        renamed: Mapping[str, str] = {},
        deleted: Mapping[str, Iterable[str]] = {},
    ) -> None:
        self.given = {name: given.get(name, {}) for name in ID_FILES}
        self.renamed = dict(renamed)
        self.deleted = {name: {*deleted.get(name, ())} for name in ("passwd", "group")}

    @classmethod
    def load(cls, path: Path) -> AccountIds:
        """Load the registry.

        AshError if it is missing, too: ids that other snapshots have would be given again.
        """
        rebuild = "ash fsck --repair rebuilds it"
        if not path.exists():
            raise AshError(f"the registry of uids and gids {path} is missing", rebuild)
        try:
            shape: dict[str, Any] = {f"{name}?": {"*": is_u32} for name in ID_FILES} | {"renamed?": {"*": is_text}}
            found = from_json(read_text(path), {**shape, "deleted?": {"passwd": [is_text], "group": [is_text]}})
            return cls(found, found.get("renamed", {}), found.get("deleted", {}))
        except ValueError:
            raise AshError(f"the registry of uids and gids {path} is damaged", rebuild) from None

    def dump(self) -> str:
        deleted = {name: sorted(accounts) for name, accounts in self.deleted.items()}
        return json.dumps({**self.given, "renamed": self.renamed, "deleted": deleted}) + "\n"

    def copy(self) -> AccountIds:
        return AccountIds({name: dict(ids) for name, ids in self.given.items()}, self.renamed, self.deleted)

    def learn(self, etc: Path) -> None:
        """Record the accounts of an /etc that are not known yet."""
        for name in ID_FILES:
            for account, number in AccountFile.read(etc / name).ids.items():
                self.given[name].setdefault(account, number)

    def learn_machine(self, etc: Path, *former: Path) -> None:
        """Record the accounts of the running /etc: its people have the numbers that count, whatever was recorded.

        People of its `former` states who are not there were deleted.
        """
        self.learn(etc)
        for name, deleted in self.deleted.items():
            deleted.update(*(AccountFile.read(was / name).people for was in former))
            deleted.difference_update(AccountFile.read(etc / name).ids)
        people = {name: AccountFile.read(etc / name).people for name in ("passwd", "group")}
        for name in ID_FILES:
            known = people["group" if name == "group" else "passwd"]
            ids = AccountFile.read(etc / name).ids
            self.given[name].update({account: number for account, number in ids.items() if account in known})

    def reconcile(self, etc: Path) -> Renumbering:
        """Find and record ids for accounts of an /etc that have another one elsewhere; see is_misnumbered()."""
        wanted: dict[str, dict[str, int]] = {}
        moves: dict[str, dict[int, int]] = {}
        for name in ID_FILES:
            there, given = AccountFile.read(etc / name).ids, self.given[name]
            for account, number in [one for one in there.items() if is_misnumbered(one[0], there, given)]:
                new = given[account]
                if new in there.values():
                    new = free_id(name, number, {*given.values(), *there.values()})
                there[account] = given[account] = wanted.setdefault(name, {})[account] = new
                moves.setdefault(name, {})[number] = new
        return Renumbering(wanted, moves)

    def settle(self, before: Path, after: Path) -> Renumbering:
        """Find and record ids for accounts that a transaction created or changed between two states of /etc."""
        wanted: dict[str, dict[str, int]] = {}
        moves: dict[str, dict[int, int]] = {}
        unchanged = set()
        renamed = self._learn_renames(before, after)
        for name in ID_FILES:
            old, new = AccountFile.read(before / name).ids, AccountFile.read(after / name).ids
            given = self.given[name]
            if name in self.deleted:
                self.deleted[name] -= new.keys() - old.keys()
            for was, now in renamed["group" if name == "group" else "passwd"].items():
                if was in old and now in new:
                    old[now] = old.pop(was)
                    given[now] = given.pop(was, old[now])
            unchanged |= {user for user, uid in new.items() if old.get(user) == uid} if name == "passwd" else set()
            for account, number in new.items():
                shared = list(new.values()).count(number) > 1  # on purpose: no tool gives an id twice by itself
                if old.get(account) == number or shared:
                    given.setdefault(account, number)
                    continue
                others = {other: n for other, n in new.items() if other != account}
                if account not in given or any(old.get(other) == n == given[account] for other, n in others.items()):
                    taken = {*given.values(), *others.values()}
                    given[account] = number if number not in given.values() else free_id(name, number, taken)
                if given[account] != number:
                    wanted.setdefault(name, {})[account] = moves.setdefault(name, {})[number] = given[account]
        return Renumbering(wanted, moves, unchanged)

    def _learn_renames(self, before: Path, after: Path) -> dict[str, dict[str, str]]:
        """The new names of users and groups that were renamed between two states of /etc, by the old ones.

        A group was renamed if it has the same number, and still is the primary group of a user.
        """
        old, new = (AccountFile.read(etc / "passwd") for etc in (before, after))
        shadows = [
            {row[0]: row[1] for row in AccountFile.read(etc / "shadow").rows if len(row) > 1} for etc in (before, after)
        ]
        users: dict[str, str] = {}
        for was, now in itertools.product(old.rows, new.rows):
            is_gone, is_new = was[0] in old.ids.keys() - new.ids.keys(), now[0] in new.ids.keys() - old.ids.keys()
            if is_gone and is_new and is_renamed(was, now, shadows[0].get(was[0], ""), shadows[1].get(now[0], "")):
                users[was[0]] = now[0]
        primary = {
            row[3] for row in old.rows if len(row) > 3 and (new.row(users.get(row[0], row[0])) or [])[3:4] == row[3:4]
        }
        gids, later = (AccountFile.read(etc / "group").ids for etc in (before, after))
        groups = {
            was: now
            for (was, gid), (now, its) in itertools.product(gids.items(), later.items())
            if gid == its and str(gid) in primary and was not in later and now not in gids
        }
        self.renamed.update(users)
        self.renamed = {was: now for was, now in self.renamed.items() if was not in users.values()}
        return {"passwd": users, "group": groups}


# --- Files that processes have open or mapped ------------------------------------------------------------------


def mapped_files(process: Path, device: str, known: set[str]) -> list[Path]:
    """Symlinks to the files of a file system that a process has mapped, except those that are in `known`."""
    links, wanted = [], ":".join(f"{int(number):02x}" for number in device.split(":"))
    for line in lines_of(read_text(process / "maps")):
        addresses, _, _, on, file = line.split(maxsplit=4)
        if on == wanted and file not in known:
            known.add(file)
            start, end = (int(address, 16) for address in addresses.split("-"))
            links.append(process / "map_files" / f"{start:x}-{end:x}")
    return links


class OpenFiles:
    """Device and inode number of every file of a file system that a process has open or mapped.

    Files elsewhere are not touched, not even by stat(2): on a network file system that does not answer, that would
    never end. Which file system a descriptor is on is read from its mount, in /proc.
    """

    UNKNOWN = 0  # the device of a file on a mount that no process has any more, as after `umount --lazy`

    def __init__(self, directory: Path) -> None:
        self.device = mount_of(directory).device
        self._inodes: set[tuple[int, int]] = set()
        self._usable_until = 0.0

    def __contains__(self, file: object) -> bool:
        """Whether a file (device, inode number) is open; this looks again if the last look is too long ago."""
        began = time.monotonic()
        if began >= self._usable_until:
            self._inodes = self._look()
            ended = time.monotonic()
            self._usable_until = ended + 4 * (ended - began)  # so that most of the time is spent on merging
        return file in self._inodes or (isinstance(file, tuple) and (self.UNKNOWN, file[1]) in self._inodes)

    def _look(self) -> set[tuple[int, int]]:
        found: set[tuple[int, int]] = set()
        mapped: dict[str, set[str]] = {}  # by mount namespace: inode numbers and paths
        devices: dict[str, str] = {}  # by id of the mount
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # the process ended
                namespace = os.readlink(process / "ns/mnt")
                if namespace not in mapped:
                    devices |= {mount.id: mount.device for mount in mounts(process.name)}
                links = mapped_files(process, self.device, mapped.setdefault(namespace, set()))
                found |= {inode for link in links if (inode := inode_of(link, follow=True))}
                for name in os.listdir(process / "fdinfo"):
                    with contextlib.suppress(OSError):  # it was closed
                        found |= self._described(process, name, devices)
        return found

    def _described(self, process: Path, name: str, devices: Mapping[str, str]) -> set[tuple[int, int]]:
        """The file of a descriptor, if it is on this file system."""
        words = read_text(Path(f"{process}/fdinfo/{name}")).split()
        known = dict(zip(words[::2], words[1::2], strict=False))
        device, link = devices.get(known.get("mnt_id:", "")), Path(f"{process}/fd/{name}")
        if device == self.device:
            inode = inode_of(link, follow=True)
            return {inode} if inode else set()
        shown = os.readlink(link) if device is None else ""
        if shown.startswith("/") and not shown.endswith(" (deleted)") and "ino:" in known:  # Linux 5.14
            return {(self.UNKNOWN, int(known["ino:"]))}
        return set()


def is_open(path: Path, opened: Container[tuple[int, int]]) -> bool:
    """Whether a file is open, or any file below a directory."""
    found = (seen.status for seen in look_through(path))
    return any((file.st_dev, file.st_ino) in opened for file in found if file and not stat.S_ISDIR(file.st_mode))


# --- The merge into /var: entry by entry; if in doubt, the live one stays --------------------------------------

# Directories whose entries are merged one by one; everything else directly in /var is one entry.
ENTRY_DIRECTORIES = ("lib", "spool", "www", "cache", "log")


def is_whiteout(path: Path) -> bool:
    """Whether a path in an overlay's upper directory marks a deletion."""
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: Path) -> bool:
    """Whether a directory in an overlay's upper directory hides everything in the lower one."""
    with contextlib.suppress(OSError):
        return os.getxattr(path, "trusted.overlay.opaque", follow_symlinks=False) == b"y"
    return False


def is_newer(one: Path, other: Path) -> bool:
    """Whether a path exists and was modified after another one."""
    status = status_of(one)
    return status is not None and status.st_mtime_ns > other.lstat().st_mtime_ns


def is_placed(upper: Path, live: Path) -> bool:
    """Whether a live path is the same as one in an overlay's upper directory, without what is below it."""
    return is_same(upper, live, from_overlay=True)


def is_merged(upper: Path, live: Path) -> bool:
    """Whether a live path is what the overlay's upper directory says; times do not count."""
    for (ours, theirs), names in walk(upper, live):
        same = not os.path.lexists(theirs) if is_whiteout(ours) else is_placed(ours, theirs)
        if not same or (is_directory(ours) and is_opaque(ours) and set(os.listdir(theirs)) - set(names)):
            return False
    return True


def remove_beside_neighbours(path: Path) -> list[Path]:
    """remove_tree(), but for nested subvolumes and mounts, and the directories that lead to them. Returns these."""
    neighbours = [Path(seen.path) for seen in look_through(path) if seen.is_neighbour]
    if not neighbours:
        remove_tree(path)
    elif path not in neighbours:
        for below in path.iterdir():
            remove_beside_neighbours(below)
    return neighbours


def is_remainder(live: Path, origin: Path) -> bool:
    """Whether a live path has nothing but what it had, as while it is being deleted. Neighbours do not count."""
    for seen in look_through(live):
        is_file = seen.status is None or not stat.S_ISDIR(seen.status.st_mode)
        if is_file and not is_as_it_was(seen.status, status_of(origin / Path(seen.path).relative_to(live))):
            return False
    return True


def database_links(manager: PackageManager, root: Path) -> dict[str, str]:
    """The symlinks in /var to a root's package database, and their targets; not those that it has no directory for."""
    database = path_inside(root, IN_ROOT_DB)
    owned = {name: in_database(name) for name in manager.database}
    return {name: f"/{path}" for name, path in owned.items() if (database / path[len(IN_ROOT_DB) + 1 :]).is_dir()}


def is_link_to(path: Path, target: str) -> bool:
    return path.is_symlink() and os.readlink(path) == target


def restore_links(var: Path, links: Mapping[str, str]) -> None:
    """Make missing symlinks to the package database again; what is in the place of one stays."""
    for name, target in links.items():
        if not os.path.lexists(var / name):
            about_to(f"link {name}")
            with contextlib.suppress(FileExistsError, NotADirectoryError):  # something is in the place of its parent
                (var / name).parent.mkdir(parents=True, exist_ok=True)
                (var / name).symlink_to(target)


SEPARATE = ("log", "cache", "tmp")  # may be file systems of their own, with everything below them


def may_be_separate(manager: PackageManager, directory: str) -> bool:
    """Whether a directory of /var may be a file system or subvolume of its own.

    Logs and caches may: a transaction does not see what is there, and what it writes is merged by the rules for these.
    """
    separate = (*SEPARATE, *manager.logs, *manager.caches)
    return any(directory == name or directory.startswith(f"{name}/") for name in separate)


@contextmanager
def live_var(var: Path, separate: Iterable[str]) -> Iterator[None]:
    """Mount the live /var `nosymfollow` for the block, and in it what the running system has mounted on `separate`."""
    with ExitStack() as stack:
        stack.enter_context(nosymfollow(var))
        for directory in separate:
            if is_directory(var / directory):
                stack.enter_context(nosymfollow(var / directory, Path("/var", directory)))
        yield


class ChangedMeanwhile(AshError):
    """Another process has changed what was about to be replaced."""


class VarMerge:
    """Merges what a transaction wrote to /var into the live /var.

    An entry is merged as a whole or not at all: if a part of it cannot be put in place, what was before is put back.
    """

    def __init__(
        self, upper: Path, origin: Path, live: Path, manager: PackageManager, conflicts: Path, *, delete: Iterable[str]
    ) -> None:
        self.upper = upper  # the overlay's upper directory: the transaction's changes
        self.origin = origin  # /var as it was at the start of the transaction
        self.live = live
        self.manager = manager
        self.conflicts = conflicts  # receives the entries that cannot be merged
        self.delete = delete  # the entries in which deletions are applied; a removed package's data is kept
        self.token = os.urandom(8).hex()  # of temporary names, which owners of directories in /var must not guess
        self.in_conflict: list[str] = []
        self.failed: dict[str, str] = {}  # why entries could not be put in place, though nobody else changed them
        self.unmerged: list[str] = []  # those of them that could not be set aside either: the caller keeps them
        self.make_room: Callable[[], object] = lambda: None  # called once for each entry for which the disk is full
        self.kept: list[str] = []
        self._placed: list[tuple[Path, tuple[int, int] | None]] = []  # paths of the entry, and their inodes since then
        self._deleted: list[Path] = []

    def names(self) -> list[str]:
        """The entries that the transaction touched, relative to /var."""
        found = []
        for name in sorted(os.listdir(self.upper)):
            if name in ENTRY_DIRECTORIES and is_directory(self.upper / name) and not (self.origin / name).is_symlink():
                found += [f"{name}/{entry}" for entry in sorted(os.listdir(self.upper / name))]
            else:
                found.append(name)
        return found

    def entries(self) -> list[str]:
        """The entries that the transaction changed."""
        return [entry for entry in self.names() if not is_merged(self.upper / entry, self.origin / entry)]

    def decide(self, entry: str) -> str:
        """Decide what to do with an entry: "nothing", "newest", "append", "aside" or "place"."""
        changed, live = self.upper / entry, self.live / entry
        if live.parent.is_symlink():  # it was replaced meanwhile
            return "aside"
        if is_merged(changed, live):
            return "nothing"
        if entry in self.manager.caches:
            return "newest"
        if entry in self.manager.logs and (os.path.lexists(live) or self._is_separate(live.parent)):
            return "append"
        deletes = is_directory(live) and not is_directory(changed) and not is_whiteout(changed)
        if (deletes and entry not in self.delete) or change_token(live) != change_token(self.origin / entry):
            return "aside"
        return "aside" if is_open(live, self._opened) else "place"

    def _is_separate(self, directory: Path) -> bool:
        """Whether a directory is not in the subvolume of /var."""
        status = status_of(directory)
        return status is not None and status.st_dev != self.live.stat().st_dev

    def redecide(self, entry: str) -> str:
        """Decide again on an entry that was decided "place" when the merge was interrupted: it may be half applied."""
        changed, origin, live = (directory / entry for directory in (self.upper, self.origin, self.live))
        if change_token(live) == change_token(origin):
            return self.decide(entry)
        return "place" if self._is_half_applied(changed, origin, live) else "aside"

    def _is_half_applied(self, changed: Path, origin: Path, live: Path, restored: bool = False) -> bool:
        """Whether everything in a live entry is either as it was or as it will be, so that nobody else changed it.

        With `restored`, a part may have been made again as it was.
        """
        beside = temporary_name(live, self.token).name
        for (now, new, old), names in walk(live, changed, origin):
            if not os.path.lexists(now) or change_token(now) == change_token(old):
                names.clear()
            elif (restored and is_same(now, old)) or (is_directory(new) and is_directory(now)):
                names[:] = [name for name in names if name != beside]
            elif is_directory(now):  # it is being deleted
                if not is_remainder(now, old):
                    return False
                names.clear()
            elif not os.path.lexists(new) or not is_merged(new, now):
                return False
        return True

    def merge(self, entry: str, decision: str) -> None:
        """Apply a decision to an entry; repeating an interrupted call is safe.

        What cannot be put in place is set aside like a conflict, or is left for the caller in `unmerged`: the disk may
        be full or failing, a quota used up, a file immutable, or another process changes the entry in this instant.
        """
        changed, origin, live = (directory / entry for directory in (self.upper, self.origin, self.live))
        self._placed, self._deleted = [], []
        if decision in ("append", "newest", "place"):
            try:
                if live.parent.is_symlink():
                    raise ChangedMeanwhile(f"{live.parent} is a symlink")
                if decision == "append":
                    self.with_room(self._append, changed, live, origin)
                else:
                    self.with_room(self._place, changed, live, origin, newest=decision == "newest")
            except (AshError, OSError) as error:
                if not isinstance(error, ChangedMeanwhile):
                    self.failed[entry] = self.why(error)
                if decision == "place":
                    self._put_back()
                decision = "aside"
        if decision == "aside":
            decision = "aside" if self._set_aside(entry) else "keep"
        if decision == "keep":
            self.unmerged.append(entry)
        if decision in ("aside", "keep"):
            self.in_conflict.append(entry)

    @staticmethod
    def why(error: Exception) -> str:
        """The reason without the path, which is that of ash's own mount."""
        return error.strerror if isinstance(error, OSError) and error.strerror else reason(error)

    def with_room(self, work: Callable[..., None], *paths: Path | None, **options: bool) -> None:
        """Call a function that can be repeated; if the disk is full, make room and repeat it."""
        try:
            work(*paths, **options)
        except (AshError, OSError) as error:
            if not is_out_of_space(error):
                raise
            self.make_room()
            work(*paths, **options)

    def _set_aside(self, entry: str) -> bool:
        """Copy an entry to the conflicts directory; whether that was possible."""
        aside = self.conflicts / entry
        try:
            make_private_directory(self.conflicts)
            self.with_room(self.copy, self.upper / entry, aside)
        except (AshError, OSError) as error:
            self.failed.setdefault(entry, self.why(error))
            with contextlib.suppress(AshError, OSError):
                remove_tree(aside, protected=True)
            return False
        return True

    def copy(self, changed: Path, target: Path) -> None:
        """Copy a path of the upper directory to one that is not merged; what is in the target stays."""
        self._place(changed, target, None)

    def _put_back(self) -> None:
        """Restore an entry that could not be put in place whole, except where another process changed it since."""
        replaced = [live for live, _ in self._placed if is_directory(self._original(live)) and not is_directory(live)]
        self._make_again(self._deleted)
        for live, inode in reversed(self._placed):
            self._restore(self._original(live), live, inode)
        self._make_again(replaced)  # what was in these directories

    def _make_again(self, paths: Iterable[Path]) -> None:
        """Copy what is missing of live paths, with all below them, from what they were."""
        for live in paths:
            for old, now in (both for both, _ in walk(self._original(live), live)):
                self._restore(old, now, inode_of(now) if is_directory(old) and is_directory(now) else None)

    def _original(self, live: Path) -> Path:
        return self.origin / live.relative_to(self.live)

    def _restore(self, origin: Path, live: Path, inode: tuple[int, int] | None) -> None:
        """Make a live path what it was, without what is below it, if it still is this inode."""
        with contextlib.suppress(AshError, OSError):  # as far as there is room
            if inode_of(live) != inode:
                return
            if os.path.lexists(origin):
                if not is_special(origin):
                    replace_by_copy(origin, live, self.token)
            elif is_directory(live):
                live.rmdir()
            else:
                live.unlink()

    def take_back(self, entry: str) -> bool:
        """Make an entry that was placed, or partly so, what it was before. Safe to interrupt and to repeat.

        Returns whether it is; it stays if somebody else has changed it since, or has a file of it open.
        """
        changed, origin, live = (directory / entry for directory in (self.upper, self.origin, self.live))
        is_ours = not live.parent.is_symlink() and self._is_half_applied(changed, origin, live, restored=True)
        if not is_ours or is_open(live, self._opened):
            return False
        self._placed, self._deleted = [], []
        for (ours, now, old), names in walk(changed, live, origin):
            if is_directory(old) and not is_directory(ours):
                self._deleted.append(now)  # with what was in it, even if the directory itself is there again
            elif is_whiteout(ours):
                self._deleted.append(now)
            if not is_special(ours) and not is_same(now, old):
                self._placed.append((now, inode_of(now)))
            if is_directory(ours) and is_opaque(ours) and is_directory(old):
                self._deleted += [now / name for name in os.listdir(old) if name not in names]
        self._put_back()
        paths = [*(path for path, _ in self._placed), *self._deleted]
        return all(is_same(old, now) for path in paths for (old, now), _ in walk(self._original(path), path))

    def delete_torn(self, entry: str) -> None:
        """Delete the temporary files that an interrupted merge of an entry left."""
        live = self.live / entry
        beside = temporary_name(live, self.token)
        below = paths_below(live) if is_directory(live) else ()
        for path in (beside, *(live / inside for inside in below if inside.endswith(beside.name))):
            if os.path.lexists(path):
                remove_tree(path, protected=True)

    def add_files(self, pattern: str) -> None:
        """Add new regular files that match a glob pattern, and nothing else; no symlink is followed."""
        for changed in sorted(self.upper.glob(pattern)):
            path = changed.relative_to(self.upper)
            live = self.live / path
            if not stat.S_ISREG(changed.lstat().st_mode) or os.path.lexists(live):
                continue
            above = [self.live / parent for parent in path.parents[:-1]]
            is_safe = all(is_directory(parent) or not os.path.lexists(parent) for parent in above)
            if is_safe and has_real_parents(self.upper, str(path)):
                self._place(changed, live, self.origin / path)

    @cached_property
    def _opened(self) -> OpenFiles:
        return OpenFiles(self.live)

    def _place(self, changed: Path, target: Path, origin: Path | None, *, newest: bool = False) -> None:
        """Apply a path of the upper directory, and all below it, to `target`; each file is replaced atomically.

        Args:
            changed: the path in the upper directory.
            target: where it goes.
            origin: what `target` was at the start of the transaction; None if it is not in the live /var.
            newest: leave files that are newer than the transaction's.

        Raises:
            ChangedMeanwhile: another process has changed a file of it since the origin.
        """
        directories, deleted = [], []
        links: dict[tuple[int, int], Path] = {}  # where files with several names are, by inode in the upper directory
        for (ours, theirs), names in walk(changed, target):
            before = origin / theirs.relative_to(target) if origin else None
            if is_whiteout(ours):
                deleted.append(theirs)
            elif is_special(ours) or (newest and not is_directory(ours) and is_newer(theirs, ours)):
                continue
            elif is_directory(ours):
                if before and not newest:
                    self._require_unchanged(theirs, before, ours)
                directories.append((ours, theirs))
                self._place_directory(ours, theirs)
                known = os.listdir(before) if before and is_opaque(ours) and is_directory(before) else []
                deleted += [theirs / name for name in known if name not in names]
            elif before and not newest and is_directory(theirs) and not is_remainder(theirs, before):
                raise ChangedMeanwhile(f"{theirs} was changed meanwhile")
            elif before and not newest:
                self.place_file(ours, theirs, links, partial(self._require_unchanged, theirs, before, ours))
            else:
                self.place_file(ours, theirs, links)
        for theirs in deleted if origin else ():
            self._delete(theirs, newest)
        for ours, theirs in reversed(directories):  # the modes of new ones, and mtimes, which filling them changed
            copy_directory_attributes(ours, theirs, from_overlay=True)

    @staticmethod
    def _require_unchanged(live: Path, origin: Path, ours: Path) -> None:
        """Raise ChangedMeanwhile if a live file is neither as it was nor as the transaction has it."""
        now = status_of(live)
        if now is None or stat.S_ISDIR(now.st_mode):
            return
        if not is_as_it_was(now, status_of(origin)) and not is_placed(ours, live):
            raise ChangedMeanwhile(f"{live} was changed meanwhile")

    def _place_directory(self, changed: Path, target: Path) -> None:
        """Restrict a directory, or create one for root alone, before anything new is in it."""
        if not is_directory(target):
            self._deleted += [target] if os.path.lexists(target) else []
            target.unlink(missing_ok=True)
            target.mkdir(mode=0o700, parents=True)
        self._placed.append((target, inode_of(target)))
        copy_directory_attributes(changed, target, from_overlay=True)

    def place_file(
        self,
        changed: Path,
        target: Path,
        links: dict[tuple[int, int], Path],
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Replace a file; names of one file in the upper directory, which are in `links`, become names of one again.

        `check` is called right before the target is replaced; what it raises keeps it.
        """
        if is_directory(target) and any(seen.is_neighbour for seen in look_through(target)):
            raise AshError("there is a subvolume or a mount in it")
        target.parent.mkdir(parents=True, exist_ok=True)
        status = changed.lstat()
        inode = status.st_dev, status.st_ino
        first = links.setdefault(inode, target)
        if first != target and is_placed(changed, first):
            with replace(target, token=self.token, directories=True) as new:
                about_to(f"link {new.name}")
                os.link(first, new, follow_symlinks=False)
                check()
        else:
            replace_by_copy(changed, target, self.token, from_overlay=True, check=check)
        self._placed.append((target, inode_of(target)))

    def _delete(self, live: Path, newest: bool) -> None:
        """Delete what the transaction deleted, if that applies to this entry; else it is kept, and reported."""
        if not os.path.lexists(live):
            return
        path = live.relative_to(self.live)
        if {str(path), *map(str, path.parents)} & {*self.delete}:
            if not newest and not is_remainder(live, self._original(live)):
                raise ChangedMeanwhile(f"{live} was changed meanwhile")
            self._deleted.append(live)
            self.kept += [f"/var/{neighbour.relative_to(self.live)}" for neighbour in remove_beside_neighbours(live)]
        else:
            self.kept.append(f"/var/{path}")

    def _append(self, changed: Path, live: Path, origin: Path) -> None:
        """Append to a live log, or to each log of a directory, what the transaction appended to its copy."""
        for (ours, theirs, before), names in walk(changed, live, origin):
            if is_whiteout(ours):
                continue
            if not os.path.lexists(theirs) and is_directory(ours):
                self._place_directory(ours, theirs)
            elif not os.path.lexists(theirs) and size_of(ours) >= 0 and size_of(before) > 0:
                with replace(theirs, token=self.token) as new:  # the rest is elsewhere, or was rotated away
                    copy_file(ours, new, from_overlay=True)
                    new.write_bytes(read_bytes(ours)[size_of(before) :])
            elif not os.path.lexists(theirs):
                self._place(ours, theirs, before)
            elif is_directory(ours):
                names[:] = names if is_directory(theirs) else ()
            elif stat.S_ISREG(theirs.lstat().st_mode) and stat.S_ISREG(ours.lstat().st_mode):
                self.append_to_file(ours, theirs, max(0, size_of(before)))

    @staticmethod
    def append_to_file(changed: Path, live: Path, known: int) -> None:
        """Append to a live file what is in the transaction's after `known` bytes."""
        ours = os.fdopen(open_regular(changed), "rb")
        with ours, os.fdopen(open_regular(live, os.O_RDWR | os.O_APPEND), "r+b") as log:
            ours.seek(known)
            log.seek(known if os.fstat(log.fileno()).st_size >= known else 0)  # 0: it was rotated
            added = ours.read()
            if added not in log.read():  # else this was interrupted before the entry was recorded as merged
                about_to(f"append to {live.name}")
                log.write(added)


# --- The merge into /home and /root: path by path; nothing is deleted ------------------------------------------

HOMES = ("home", "root")  # the shared directories that are merged by path, as a root names them
# The histories of shells and the like. Each session writes to one: that alone is no change of a snapshot.
HISTORY_FILE = re.compile(r"\.\w+_history|\.histfile")
# Kinds of file systems on which the ctimes are set by the clock of this machine.
LOCAL_KINDS = ("btrfs", "ext2", "ext3", "ext4", "xfs", "f2fs", "bcachefs", "tmpfs")
NEVER_LOWER = ("autofs", "cifs", "smb3", "vfat", "exfat")  # cannot be the lower directory of an overlay
COPIED_UP = "trusted.overlay.origin"  # overlayfs sets it on directories that the lower one has, too
CLOCK_REALTIME_COARSE = 5  # <linux/time.h>
BEGUN = "trusted.overlay.ash.begun"  # on a path whose attributes are being put in place
SHOWN = "trusted.overlay.ash.shown"  # on an upper directory: the live directory, if it is none of ash's own


class Clock(NamedTuple):
    """The time, in nanoseconds since 1970, by the clock that the kernel takes for ctimes."""

    now: int
    booted: int  # when the machine was started, by the same clock

    @classmethod
    def read(cls) -> Clock:
        now = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
        return cls(now, now - time.clock_gettime_ns(time.CLOCK_BOOTTIME))

    def was_set_back(self) -> bool:
        """Whether the clock was set back since: what is changed after that has a ctime that may be too old."""
        return self.read().booted < self.booted - 10**9


def has_attribute(path: Path, name: str) -> bool:
    """Whether a path, which is not followed, has an extended attribute."""
    with contextlib.suppress(OSError):
        return os.getxattr(path, name, follow_symlinks=False) is not None
    return False


def common_lines(one: Path, other: Path) -> int:
    """The size in bytes of the lines with which two files begin."""
    pairs = zip(read_bytes(one).splitlines(True), read_bytes(other).splitlines(True), strict=False)
    return sum(len(a) for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def live_of(upper: Path) -> Path | None:
    """The live directory that an upper directory is about; None if it is one of ash's own."""
    with contextlib.suppress(OSError):
        return Path(os.fsdecode(os.getxattr(upper, SHOWN)))
    return None


class HomeMerge:
    """Merges what a transaction wrote to /home or /root into the live directory.

    Each path is decided right before it is put in place: new ones are, and changed ones where nobody has changed the
    live one. Otherwise the live one stays, and the transaction's goes to the conflicts directory. Nothing is deleted.
    What is in place already is passed over, so an interrupted merge is repeated.

    Args:
        name: one of HOMES.
        overlay: what the transaction saw: below, a snapshot of the live directory, or that directory itself.
        live: the live directory.
        since: when the transaction began, in nanoseconds since 1970; 0 if the ctimes in `live` say nothing.
        var: the merge into /var. It has the conflicts directory, and the token of temporary names.
        before: a directory that is as the live directory itself was when the transaction began, if there is one.
        is_missing: the file system of the live directory is not mounted, as early at boot; all is set aside.
    """

    def __init__(
        self,
        name: str,
        overlay: Overlay,
        live: Path,
        since: int,
        var: VarMerge,
        *,
        before: Path | None = None,
        is_missing: bool = False,
    ) -> None:
        self.name = name
        self.upper = overlay.upper
        self.live = live
        self.since = since
        self.var = var
        self.origin = overlay.lower
        self.has_snapshot = self.origin != live
        self.top = before if before and is_directory(before) else None
        self.is_missing = is_missing
        # As in VarMerge, but paths in /home or /root.
        self.in_conflict: list[str] = []
        self.failed: dict[str, str] = {}
        self.unmerged: list[str] = []
        self.kept: list[str] = []  # what the transaction deleted
        self._links: dict[tuple[int, int], Path] = {}  # see VarMerge.place_file()

    def is_changed(self) -> bool:
        """Whether the transaction changed anything but the histories of shells. Deletions do not count."""
        for (ours, before), names in walk(self.upper, self.origin):
            known = self._before(ours, before) or before
            if not is_whiteout(ours) and not self._is_in_place(ours, known):
                return True
            names[:] = [name for name in names if not HISTORY_FILE.fullmatch(name)]
        return False

    def merge(self) -> None:
        """Merge all that was changed. Safe to interrupt and to repeat."""
        if self.is_missing:
            self._set_all_aside()
            return
        filled = []
        for (ours, theirs, before), names in walk(self.upper, self.live, self.origin):
            if is_whiteout(ours):
                self.kept += [self._inside(ours)] if os.path.lexists(theirs) else []
                continue
            now, decision = status_of(theirs), "aside"
            with contextlib.suppress(OSError):  # it is deleted in this instant, or cannot be read: it stays
                self.kept += [self._inside(ours / name) for name in self._deleted(ours, theirs, names)]
                decision = self._decide(ours, theirs, self._before(ours, before))
            torn = temporary_name(theirs, self.var.token)
            if decision != "place" and os.path.lexists(torn):  # an interrupted merge had decided otherwise
                remove_tree(torn, protected=True)
            if decision == "nothing" and not is_directory(ours) and (inode := inode_of(ours)):
                self._links.setdefault(inode, theirs)
            if decision == "aside" or (decision != "nothing" and not self._apply(decision, ours, theirs, now)):
                whole = not (is_directory(ours) and is_directory(theirs))
                self._set_aside(ours, whole)
                if whole:
                    names.clear()
            elif decision == "place" and is_directory(ours):
                filled.append((ours, theirs))
        for ours, theirs in reversed(filled):
            with contextlib.suppress(AshError, OSError):  # it is only about mtimes, which filling them changed
                copy_directory_attributes(ours, theirs, from_overlay=True)

    def placed(self) -> list[str]:
        """The paths that are in place, and were not before the transaction; not what is below one of them."""
        found = []
        for (ours, theirs, before), names in walk(self.upper, self.live, self.origin):
            now = status_of(theirs)
            if now is None or is_whiteout(ours) or HISTORY_FILE.fullmatch(ours.name):
                continue
            is_new = not self._is_in_place(ours, before) if self.has_snapshot else now.st_ctime_ns >= self.since
            if is_new and self._is_in_place(ours, theirs) and not (is_directory(ours) and is_directory(before)):
                found.append(self._inside(ours))
                names.clear()
        return found

    def _before(self, ours: Path, origin: Path) -> Path | None:
        """What a path was when the transaction began; None if that is not known, since the origin is the live one."""
        return self.top if self.top and ours == self.upper else origin if self.has_snapshot else None

    def _decide(self, ours: Path, theirs: Path, before: Path | None) -> str:
        """Decide what to do with a path that is not a deletion: "nothing", "place", "append" or "aside"."""
        if self._is_in_place(ours, theirs):
            return "nothing"
        if has_attribute(ours, BEGUN) and is_directory(ours) == is_directory(theirs):  # this was interrupted
            return "place"
        if before and self._is_in_place(ours, before) and (is_directory(theirs) or not is_directory(ours)):
            return "nothing"  # it was only opened for writing, or it is above something that was changed
        if not os.path.lexists(theirs):
            return "aside" if self._was_there(ours, before) else "place"
        is_file = HISTORY_FILE.fullmatch(ours.name) and size_of(ours) >= 0 and size_of(theirs) >= 0
        if self._is_unchanged(theirs, before):
            return "place"
        return "append" if is_file else "aside"

    @cached_property
    def _opened(self) -> OpenFiles:
        return OpenFiles(self.live)

    @staticmethod
    def _is_in_place(ours: Path, theirs: Path) -> bool:
        return is_special(ours) or is_placed(ours, theirs)

    def _was_there(self, ours: Path, before: Path | None) -> bool:
        """Whether a path existed when the transaction began; without a snapshot this is known of directories only."""
        if before:
            return os.path.lexists(before)
        return is_directory(ours) and has_attribute(ours, COPIED_UP)

    def _is_unchanged(self, theirs: Path, before: Path | None) -> bool:
        """Whether nobody changed a live path since the transaction began, so that it may be replaced."""
        now = status_of(theirs)
        if now is None:
            return False
        if is_directory(theirs):
            is_old = not self.has_snapshot and now.st_ctime_ns < self.since
            return is_old or (before is not None and is_directory(before) and is_same(theirs, before))
        if is_open(theirs, self._opened):
            return False
        return is_as_it_was(now, status_of(before)) if before else now.st_ctime_ns < self.since

    def _deleted(self, ours: Path, there: Path, names: Sequence[str]) -> list[str]:
        """What the transaction deleted along with a directory that it then made again."""
        if not is_directory(ours) or not is_opaque(ours) or not is_directory(there):
            return []
        return sorted({*os.listdir(there)} - {*names, temporary_name(there / "x", self.var.token).name})

    def _apply(self, decision: str, ours: Path, theirs: Path, now: os.stat_result | None) -> bool:
        """Apply "place" or "append" to a path, without what is below it; returns whether that was possible.

        It is not if the live path is no longer as it was `now`, when it was decided on.
        """
        if is_directory(theirs) and not is_directory(ours):
            return False  # what is in there would be deleted
        about_to(f"put {theirs.name} in place")
        try:
            if decision == "append":
                VarMerge.append_to_file(ours, theirs, common_lines(ours, theirs))
                return True
            if (is_directory(ours) and is_directory(theirs)) or flags_of(ours, from_overlay=True) & PROTECTING:
                os.setxattr(ours, BEGUN, b"y")  # what follows takes several steps
            self.var.with_room(partial(self._replace, now), ours, theirs)
        except ChangedMeanwhile:
            return False
        except (AshError, OSError) as error:
            self.failed[self._inside(ours)] = self.var.why(error)
            return False
        return True

    def _replace(self, now: os.stat_result | None, ours: Path, theirs: Path) -> None:
        def check() -> None:
            there = status_of(theirs)
            if there and not is_as_it_was(there, now):
                raise ChangedMeanwhile(f"{theirs} was changed meanwhile")

        if is_directory(ours):
            replace_by_copy(ours, theirs, self.var.token, from_overlay=True, check=check)
        else:
            self.var.place_file(ours, theirs, self._links, check)

    def _set_all_aside(self) -> None:
        for ours in [path for path in sorted(self.upper.iterdir()) if not is_special(path)]:
            self.failed[self._inside(ours)] = f"{self.live} is not mounted"
            self._set_aside(ours, whole=True)

    def _set_aside(self, ours: Path, whole: bool) -> None:
        """Copy a path to the conflicts directory; a directory without what is below it, unless the `whole`."""
        inside = self._inside(ours)
        aside = self.var.conflicts / self.name / inside
        self.in_conflict.append(inside)
        try:
            make_private_directory(self.var.conflicts)
            if whole:
                self.var.with_room(self.var.copy, ours, aside)
            else:
                aside.mkdir(mode=0o700, parents=True, exist_ok=True)
                copy_directory_attributes(ours, aside, from_overlay=True)
        except (AshError, OSError) as error:
            self.failed.setdefault(inside, self.var.why(error))
            with contextlib.suppress(AshError, OSError):
                remove_tree(aside, protected=True)
            if whole:
                self.unmerged.append(inside)

    def _inside(self, ours: Path) -> str:
        return str(ours.relative_to(self.upper))

    def shown(self, path: str) -> str:
        """A path in the live directory, as users know it."""
        return str(Path("/", self.name, path))


# --- Changes ---------------------------------------------------------------------------------------------------

MAILBOXES = ("mail", "spool/mail")  # people's, as their homes are: nothing is deleted there


def is_deletable(path: str) -> bool:
    """Whether ash deletes in /var, /home or /root what a transaction has deleted; `path` begins with "/"."""
    return path.startswith("/var/") and not any(f"{path}/".startswith(f"/var/{one}/") for one in MAILBOXES)


class Change(NamedTuple):
    """What a command did to a snapshot, for the user, for `--json` and for the history."""

    snapshot: int
    changed: bool = False
    added: Mapping[str, str] = {}
    removed: Mapping[str, str] = {}
    upgraded: Mapping[str, tuple[str, str]] = {}
    conflicts: Sequence[str] = ()
    conflicts_folder: str = ""
    failed: Mapping[str, str] = {}  # those of the conflicts that nobody changed, and why they are not in place
    kept: Sequence[str] = ()
    download: int = 0  # bytes that a simulated change would fetch
    written: Sequence[str] = ()  # paths in the root that were added or changed; not printed
    brought: Sequence[str] = ()  # paths in /etc that `sync` brought from the parent

    @classmethod
    def between(cls, snapshot: int, before: Mapping[str, str], after: Mapping[str, str]) -> Change:
        """The change from one set of packages (names and versions) to another."""
        return cls(
            snapshot,
            changed=True,
            added={name: after[name] for name in sorted(after.keys() - before.keys())},
            removed={name: before[name] for name in sorted(before.keys() - after.keys())},
            upgraded={n: (old, after[n]) for n, old in sorted(before.items()) if n in after and after[n] != old},
        )

    def then(self, later: Change) -> Change:
        """The sum of two changes. Where both concern a package, the later one wins."""
        names = later.packages_changed()

        def both(before: Mapping[str, Any], after: Mapping[str, Any]) -> Mapping[str, Any]:
            return {**{name: value for name, value in before.items() if name not in names}, **after}

        return later._replace(
            changed=self.changed or later.changed,
            added=both(self.added, later.added),
            removed=both(self.removed, later.removed),
            upgraded=both(self.upgraded, later.upgraded),
            download=self.download + later.download,
        )

    def packages_changed(self) -> set[str]:
        return {*self.added, *self.removed, *self.upgraded}

    def packages(self) -> dict[str, Any]:
        return {"added": dict(self.added), "removed": dict(self.removed), "upgraded": dict(self.upgraded)}

    def summary(self, verb: str = "changed") -> str:
        """The text for the user."""
        lines = [f"snapshot {self.snapshot} {verb}" if self.changed else f"snapshot {self.snapshot}: nothing to change"]
        lines += [one_line(f"  + {name} {version}") for name, version in self.added.items()]
        lines += [one_line(f"  - {name} {version}") for name, version in self.removed.items()]
        lines += [one_line(f"  ^ {name} {old} -> {new}") for name, (old, new) in self.upgraded.items()]
        for path in self.kept:
            can_be = self.removed and is_deletable(path)  # by the command that removed the packages
            hint = "--delete-data deletes it" if can_be else "ash deletes nothing there"
            lines.append(f"  left in place: {one_line(path)} ({hint})")
        lines += [f"  brought into /etc: {listed(self.brought)}"] if self.brought else []
        lines += [f"  {self.download / 1e6:.1f} MB to fetch"] if self.download else []
        return "\n".join([*lines, *self.conflict_lines()])

    def conflict_lines(self) -> list[str]:
        """What the text says of the entries of /var that are not in place."""
        changed = [path for path in self.conflicts if path not in self.failed]
        lines = [f"  changed by others meanwhile, and left as they changed it: {listed(changed)}"] if changed else []
        lines += [one_line(f"  could not be put in place: {path}: {why}") for path, why in self.failed.items()]
        return [*lines, f"  the transaction's version is in {self.conflicts_folder}"] if self.conflicts else lines


def write_packages(layout: Layout, snapshot: int, packages: Mapping[str, str], durable: bool = False) -> None:
    """Record the packages of a snapshot (names and versions), readable by all.

    Unless it is `durable`, the caller syncs. Readers take a record that a power cut has torn for missing.
    """
    record = layout.packages(snapshot)
    about_to(f"write packages of {snapshot}")
    record.parent.mkdir(exist_ok=True)
    with replace(record, token=str(snapshot), durable=durable) as temporary:
        temporary.write_text(json.dumps(packages))
        temporary.chmod(0o644)


def read_packages(layout: Layout, snapshot: int) -> dict[str, str] | None:
    """The recorded packages of a snapshot; None if there is no record (an older ash wrote none), or it is torn."""
    try:
        return dict(from_json(read_text(layout.packages(snapshot)), {"*": str}))
    except (AshError, ValueError):
        return None


# --- Intents: work under way, and what recovery does with it ---------------------------------------------------


class Open(NamedTuple):
    """A transaction runs."""

    caller: Mapping[str, Any] | None = None
    clock: Sequence[int] = ()  # a Clock of when it began
    state: str = "open"

    def recover(self, place: WorkDir, tree: Tree) -> None:  # noqa: ARG002
        place.drop()


class Kept(NamedTuple):
    """A transaction whose terminal hung up; its working copy waits for `chroot --resume` or `unlock`."""

    caller: Mapping[str, Any] | None = None
    clock: Sequence[int] = ()
    state: str = "kept"

    def recover(self, place: WorkDir, tree: Tree) -> None:  # noqa: ARG002
        """Refuse: this is the user's to decide."""
        n = place.snapshot
        hint = f"ash chroot {n} --resume continues it, ash unlock {n} drops it"
        raise AshError(f"snapshot {n} has unfinished work from a session that hung up", hint, REFUSED)


class LiveChange(NamedTuple):
    """A transaction's result is being put into the running deployment."""

    slot: str = ""
    old: int = 0  # the subvolume id of the slot: another deployment in it has nothing of this change
    entries: Sequence[str] = ()  # the entries of /var that are being merged
    clock: Sequence[int] = ()  # a Clock of when the transaction began
    state: str = "live"

    def recover(self, place: WorkDir, tree: Tree) -> None:  # noqa: ARG002
        """Drop it; LiveWorkDir first puts back what was replaced."""
        place.drop()


class Commit(NamedTuple):
    """A snapshot is exchanged for a new state, then /var, /home and /root are merged."""

    old: int = 0  # subvolume ids before and after
    new: int = 0
    entries: Sequence[str] = ()  # the entries of /var to merge
    delete: Sequence[str] = ()  # those of them in which deletions are applied
    copies: Sequence[str] = ()  # which of "etc" and "boot" to copy again
    facts: Mapping[str, Any] = {}  # what the history says of it: "packages", as Change.packages() gives them
    caller: Mapping[str, Any] | None = None  # user and command, for the history; None keeps it out
    id: str = ""  # of its line in the history
    clock: Sequence[int] = ()  # a Clock of when the transaction began
    state: str = "commit"

    def recover(self, place: WorkDir, tree: Tree) -> None:  # noqa: ARG002
        """Finish it if the exchange has happened, else drop it."""
        if subvolume_id(place.layout.rootfs(place.snapshot)) == self.new:
            with place.merge_lock(self.entries):
                place.finish(self, again=True)
        else:
            place.drop()


class Merge(NamedTuple):
    """A transaction that changed nothing but /var, /home and /root is being merged; fields as in Commit."""

    entries: Sequence[str] = ()
    delete: Sequence[str] = ()
    facts: Mapping[str, Any] = {}
    caller: Mapping[str, Any] | None = None
    id: str = ""
    clock: Sequence[int] = ()
    state: str = "merge"

    def recover(self, place: WorkDir, tree: Tree) -> None:  # noqa: ARG002
        with place.merge_lock(self.entries):
            place.finish(self, again=True)


class Birth(NamedTuple):
    """A snapshot is being created. Adding it to the tree is the commit."""

    source: int  # the snapshot that it is a copy of
    parent: int | None = None
    description: str = ""
    caller: Mapping[str, Any] | None = None
    id: str = ""
    state: str = "number"

    def recover(self, place: WorkDir, tree: Tree) -> None:
        """Finish it if the snapshot is in the tree, else delete its parts."""
        n = place.snapshot
        if n in tree:
            description = self.description or place.system.describe(n)
            if not self._replace(parent=tree.parent(n), description=description).record(place, again=True):
                raise AshError(f"the creation of snapshot {n} is not in the history yet", "ash recover", LOCKED)
        else:
            place.delete_snapshot()
            sync_filesystem(place.layout.snapshots)
        place.drop()

    def record(self, place: WorkDir, again: bool = False) -> bool:
        """Write the history's line, with the btrfs transaction of the last change that the snapshot was born with."""
        facts = {"from": self.source, "parent": self.parent, "description": self.description}
        concerned = {self.source, place.snapshot, *([] if self.parent is None else [self.parent])}
        born = subvolume_at(place.layout.rootfs(place.snapshot))
        since = {"ctransid": born.ctransid} if born else {}
        return place.record(self.caller, {"id": self.id, **facts, **since}, concerned, again)


class Deletion(NamedTuple):
    """A snapshot is being deleted, perhaps along with others. Removing it from the tree is the commit."""

    snapshots: Sequence[int] = ()  # all that are deleted with it
    caller: Mapping[str, Any] | None = None
    id: str = ""
    state: str = "number"

    def recover(self, place: WorkDir, tree: Tree) -> None:
        """Finish it if the snapshot has left the tree, else drop the intent."""
        if place.snapshot not in tree:
            place.delete_snapshot()
            sync_filesystem(place.layout.snapshots)
            if not self.record(place, again=True):
                raise AshError(f"the deletion of {place.snapshot} is not in the history yet", "ash recover", LOCKED)
        place.drop()

    def record(self, place: WorkDir, again: bool = False) -> bool:
        """Write the history's line: one for all the snapshots."""
        return place.record(self.caller, {"id": self.id, "deleted": list(self.snapshots)}, self.snapshots, again)


Intent = Open | Kept | LiveChange | Commit | Merge | Birth | Deletion
INTENTS: Mapping[str, type[Intent]] = {
    "open": Open, "kept": Kept, "live": LiveChange, "commit": Commit, "merge": Merge,
    "number": Deletion,  # or Birth: that one has a source
}  # fmt: skip
CALLER_SHAPE = {"user": is_u32, "command": str, "arguments": [str]}
INTENT_SHAPE = {
    "state": lambda state: state in tuple(INTENTS),
    "id?": str, "old?": is_u32, "new?": is_u32, "source?": is_u32, "snapshots?": [is_u32], "description?": str,
    "entries?": [is_inner_path], "delete?": [is_inner_path],
    "copies?": [lambda directory: directory in ("etc", "boot")],
    "caller?": lambda caller: caller is None or has_shape(caller, CALLER_SHAPE),
    "slot?": lambda slot: slot in ("", *SLOTS, *SECONDARY_SLOTS),
    "parent?": lambda parent: parent is None or is_u32(parent),
    "clock?": lambda clock: has_shape(clock, [int]) and len(clock) in (0, len(Clock._fields)),
    "facts?": lambda facts: has_shape(facts, {"packages?": History.PACKAGE_KEYS}),
}  # fmt: skip


def load_intent(directory: Path) -> Intent | None:
    """The intent in a work directory, None if no work is under way; AshError if its file is damaged."""
    if not os.path.lexists(directory / "intent"):
        return None
    try:
        data = from_json(read_text(directory / "intent"), INTENT_SHAPE)
        kind = Birth if "source" in data else INTENTS[data["state"]]
        return kind(**fields_of(kind, data))
    except ValueError:
        about = f"snapshot {directory.name}" if directory.name.isdecimal() else directory.name
        hint = f"ash unlock {directory.name} drops it" if directory.name.isdecimal() else "ash tmp drops it"
        raise AshError(f"the intent file of {about} is damaged", hint) from None


def save_intent(directory: Path, intent: Intent, durable: bool = True) -> None:
    text = json.dumps(intent._asdict())
    write_file(directory / "intent", text, mode=0o600, durable=durable)  # it has what was typed


def new_id() -> str:
    return os.urandom(8).hex()


def state_of_work(directory: Path) -> str:
    """The state of the intent in a work directory; empty if there is none, or a damaged one."""
    with contextlib.suppress(AshError):
        intent = load_intent(directory)
        return intent.state if intent else ""
    return ""


def is_coming_or_going(directory: Path) -> bool:
    """Whether a work directory is that of a snapshot that is being created or deleted."""
    return state_of_work(directory) == "number"


# --- Work directories: what a transaction keeps, and the second half of a commit -------------------------------


def remove_work_directory(directory: Path) -> None:
    """Delete the work directory of a snapshot that no longer exists, if nothing but its lock is in it."""
    if os.listdir(directory) == ["lock"]:
        remove_tree(directory)


def unmerged_directories(layout: Layout) -> list[str]:
    """The directories, as paths of the running system, with what could not be put into /var."""
    names = sorted(os.listdir(layout.unmerged)) if layout.unmerged.is_dir() else []
    return [f"/.snapshots/{layout.unmerged.relative_to(layout.snapshots)}/{name}" for name in names]


class MergeLock(Lock):
    """The lock for merging. Taking it deletes the file `live-only` beside it, which a live change creates."""

    def __enter__(self) -> Self:
        super().__enter__()
        with contextlib.suppress(OSError):  # a read-only file system
            self.path.with_name("live-only").unlink()
        return self


def merge_lock(layout: Layout, wait: float = 0) -> MergeLock:
    return MergeLock(layout.work("merge") / "lock", "merging into /var", wait)


MERGED, SET_ASIDE = "merged", "set aside"  # noted of an entry of /var when it is done


class Merged(NamedTuple):
    """What a merge into /var, /home and /root did not put in place, or delete."""

    conflicts: list[str]
    kept: list[str]
    failed: dict[str, str]  # why some of the conflicts could not be put in place, though nobody else changed them
    unmerged: list[str]  # those of the conflicts that could not be set aside either
    directory: Path  # with the transaction's version of the other conflicts

    @classmethod
    def of(cls, merge: VarMerge, homes: Sequence[HomeMerge]) -> Merged:
        """The sum of several merges."""
        var = cls(
            [f"/var/{entry}" for entry in merge.in_conflict],
            [*merge.kept],
            {f"/var/{entry}": why for entry, why in merge.failed.items()},
            [f"/var/{entry}" for entry in merge.unmerged],
            merge.conflicts,
        )
        for home in homes:
            var.conflicts.extend(map(home.shown, home.in_conflict))
            var.kept.extend(map(home.shown, home.kept))
            var.failed.update({home.shown(path): why for path, why in home.failed.items()})
            var.unmerged.extend(map(home.shown, home.unmerged))
        return var


class CommittedButUnfinished(AshError):
    """The commit succeeded; a follow-up step failed and recovery will finish it."""


def append_note(file: Path, entry: str, what: str, durable: bool = False) -> None:
    """Append a note about an entry of /var, /home or /root to a file."""
    with file.open("a") as notes:
        notes.write(f"\n{json.dumps([entry, what])}\n")  # a power cut may have torn the line before
        notes.flush()
        if durable:
            os.fsync(notes.fileno())


class WorkDir:
    """What a transaction keeps in the work directory of its snapshot; the snapshot's lock protects it."""

    # An older ash decided on all entries before the first was merged, and noted only that one was.
    DECISIONS: ClassVar[Mapping[str, Any]] = {"aside": is_name, "token": is_name, "decided?": {"*": is_text}}
    NOTED: ClassVar[Sequence[str]] = ("nothing", "newest", "append", "aside", "place", "keep", MERGED, SET_ASIDE)

    def __init__(self, system: System, snapshot: int, name: str = "") -> None:
        self.system = system
        self.layout = system.layout
        self.package_manager = system.package_manager
        self.snapshot = snapshot
        self.name = name or snapshot  # of its lock
        self.directory = self.layout.work(self.name)
        self.root = self.layout.working_copy(self.name)
        self.before = self.directory / "before"  # a copy of the old state, where one is needed
        self.origin = self.directory / "var"
        self.home_origin = self.directory / "home"
        # Some directories of /var are writable by everybody: their copies here must not be reachable.
        self.private = self.directory / "private"
        self.upper = self.private / "upper"
        self.overlay_work = self.private / "overlay"
        self.decisions = self.directory / "decisions"
        self.merged = self.directory / "merged"
        self.outcomes = self.directory / "outcomes"
        self.strict = True  # see recover()

    def recover(self, tree: Tree, drop_kept: bool = False, *, strict: bool = False) -> None:
        """Finish or undo interrupted work. `drop_kept` also drops what waits for its user, or is damaged.

        A commit stands: what fails again is passed over, if fsck can repair it later, unless it is `strict`.

        Raises:
            AshError: there is such work (REFUSED, if it waits), and `drop_kept` is not given.
        """
        intent, self.strict = self.intent(drop_kept), strict
        if intent is not None and not (drop_kept and isinstance(intent, Kept)):
            intent.recover(self, tree)
        elif self.leftovers():  # without an intent file: a power cut brought back what was deleted
            self.drop()

    def intent(self, drop_damaged: bool) -> Intent | None:
        """The intent, if work is under way; a damaged one is an error, or none if it is to be dropped."""
        with contextlib.suppress(AshError) if drop_damaged else contextlib.nullcontext():
            return load_intent(self.directory)
        return None

    def record(
        self, caller: Mapping[str, Any] | None, facts: Mapping[str, Any], snapshots: Iterable[int], again: bool
    ) -> bool:
        """Write a commit's line to the history, unless it has no caller; with `again` it may be there already.

        False if the history is locked: then the intent has to stay, so that recovery writes the line.
        """
        if caller is None:
            return True
        self.system.recorded |= caller is self.system.caller
        done = {"snapshot": self.snapshot, "changed": True, **facts, **caller}
        return self.system.history.append({**done, "snapshots": sorted(snapshots), "result": "done"}, again)

    def drop(self) -> None:
        """Delete everything that a transaction left. The intent file goes last, so that this can be interrupted too."""
        delete_subvolume(self.root)
        self._clear()

    def _clear(self, but_intent: bool = False) -> None:
        for subvolume in self.subvolumes:
            delete_subvolume(subvolume)
        for directory in ("etc", "boot"):
            delete_subvolume(self.layout.copy(directory, f"new-{self.name}"))  # nobody else's: we hold the lock NAME
        for leftover in self.files[:-1] if but_intent else self.files:
            remove_tree(leftover)

    @property
    def subvolumes(self) -> tuple[Path, ...]:
        """The subvolumes in the work directory."""
        return self.before, self.origin, self.home_origin

    @property
    def files(self) -> tuple[Path, ...]:
        """What a transaction has in the work directory besides the subvolumes, the intent file last."""
        torn = temporary_name(self.decisions, self.decisions.name)
        return self.private, self.decisions, torn, self.merged, self.outcomes, self.directory / "intent"

    def leftovers(self) -> list[Path]:
        """Everything that a transaction left, the intent file last."""
        return [path for path in (self.root, *self.subvolumes, *self.files) if os.path.lexists(path)]

    def remains(self) -> list[Path]:
        """The parts of the snapshot itself that exist."""
        layout, n = self.layout, self.snapshot
        parts = (layout.rootfs(n), layout.undo(n), layout.etc(n), layout.boot(n), layout.description(n))
        return [part for part in (*parts, layout.packages(n)) if os.path.lexists(part)]

    def delete_snapshot(self) -> None:
        for part in self.remains():
            if is_subvolume(part):
                delete_subvolume(part)
            else:
                remove_tree(part)

    def swap(self, new: Path, intent: Commit) -> Commit:
        """Exchange the snapshot for another subvolume: this is the commit. Returns the intent for finish()."""
        rootfs = self.layout.rootfs(self.snapshot)
        intent = intent._replace(old=subvolume_id(rootfs), new=subvolume_id(new), id=new_id())
        save_intent(self.directory, intent)
        sync_filesystem(self.layout.snapshots)
        exchange(rootfs, new)
        return intent

    def finish(self, intent: Commit | Merge, again: bool = False) -> Merged:
        """Everything after the exchange, `again` if it was interrupted. Safe to interrupt: recovery resumes here.

        The caller holds merge_lock().

        Raises:
            CommittedButUnfinished: a step failed.
        """
        try:
            tries = itertools.chain([again], itertools.repeat(True))
            merged = self.system.with_reserve(lambda: self._finish(intent, next(tries)))
        except Exception as error:
            what = f"snapshot {self.snapshot} is changed, but this is not finished: {reason(error)}"
            raise CommittedButUnfinished(what, "ash recover finishes it") from error
        if again and merged.conflicts:  # nobody else will say so
            told = self.with_outcome(Change(self.snapshot), merged).conflict_lines()
            console.say("\n".join([f"snapshot {self.snapshot}: an interrupted change is finished", *told]))
        return merged

    def _finish(self, intent: Commit | Merge, again: bool) -> Merged:
        """Merge /var, /home and /root, renew the copies of /etc and /boot, record packages and history, keep undo-N."""
        layout, n = self.layout, self.snapshot
        merged = self.merge(intent.entries, intent.delete, intent.clock)
        for directory in intent.copies if isinstance(intent, Commit) else ():
            with self._passing_over(again):
                renew_copy(layout, n, directory)
        changed = intent.facts.get("packages")
        if changed is None or any(changed.values()) or read_packages(layout, n) is None:
            with self._passing_over(again):
                write_packages(layout, n, self.package_manager.installed(layout.rootfs(n)))
        set_readonly(layout.rootfs(n), not is_mutable(layout.rootfs(n)))
        if isinstance(intent, Commit):  # its kernel may be another one
            self.system.renew_snapshot_menu()
        sync_filesystem(layout.snapshots)
        outcome = {"conflicts": merged.conflicts, "kept": merged.kept}
        # A change of /var alone is none that an undo takes back.
        facts = {"in_root": isinstance(intent, Commit), **outcome, **intent.facts}
        recorded = self.record(intent.caller, {"id": intent.id, **facts}, [n], again)
        if isinstance(intent, Commit) and self.root.exists():
            delete_subvolume(layout.undo(n), even_mounted=True)
            rename(self.root, layout.undo(n))
        if is_writable(layout.undo(n)):  # that of a mutable snapshot
            set_readonly(layout.undo(n))
        delete_subvolume(self.root)  # a power cut may have brought it back, if it was not exchanged
        if not recorded:  # nothing else is left to do, even after a power cut
            sync_filesystem(layout.snapshots)
            save_intent(self.directory, Merge(facts=facts, caller=intent.caller, id=intent.id))
        self._clear(but_intent=not recorded)
        return merged

    @contextmanager
    def _passing_over(self, again: bool) -> Iterator[None]:
        """Pass over an error if this step failed before and another change waits: fsck finds what is left.

        Not over a full disk while there is the reserve: with_reserve() releases it, and tries once more.
        """
        try:
            yield
        except (AshError, OSError) as error:
            if not again or self.strict or (is_out_of_space(error) and self.layout.reserve.exists()):
                raise
            console.say(one_line(f"ash: snapshot {self.snapshot}: {reason(error)} (ash fsck --repair repairs it)"))

    @contextmanager
    def merge_lock(self, entries: Sequence[str]) -> Iterator[None]:
        """Hold the lock for merging these entries of /var, and /home and /root, if there is anything to merge.

        A wait for it can be interrupted.
        """
        with ExitStack() as stack:
            if entries or self.changed_homes():
                with signals_heard():
                    stack.enter_context(merge_lock(self.layout, wait=600))
            yield

    def merge(self, entries: Sequence[str], delete: Sequence[str], clock: Sequence[int]) -> Merged:
        """Merge into /var, /home and /root, unless that has been done. The caller holds merge_lock().

        Args:
            entries: those of /var to merge.
            delete: those in which deletions are applied.
            clock: a Clock of when the transaction began; empty if that is not known.
        """
        merge, homes = self.var_merge(delete), self.changed_homes()
        restore_links(self.layout.var, database_links(self.package_manager, self.layout.rootfs(self.snapshot)))
        merged: list[HomeMerge] = []
        if self.upper.exists() and (entries or homes):  # it is the first to go when all is done
            # A process of the transaction may still have a directory here open: it must not plant symlinks.
            with self.live_var(), nosymfollow(self.private):
                self._merge(merge, entries)
                noted = self._noted()
                for home in [self.home_merge(name, merge, clock) for name in homes if noted.get(f"/{name}") != MERGED]:
                    with nosymfollow(home.live) if home.live.is_dir() else contextlib.nullcontext():
                        home.merge()
                    merged.append(home)
            for entry in merge.unmerged:
                self._keep_unmerged(merge.conflicts.name, self.upper, entry)
                self._note_outcome(entry, SET_ASIDE, merge.live)
            for home in merged:
                for path in home.unmerged:
                    self._keep_unmerged(merge.conflicts.name, self.private, f"{home.name}/{path}")
                about_to(f"note that /{home.name} is merged")
                self._note_outcome(f"/{home.name}", MERGED, home.live)
        return Merged.of(merge, merged)

    def live_var(self) -> contextlib.AbstractContextManager[None]:
        """Mount the live /var for a merge."""
        separate = [path for path in mounts_in_var(self.system.running) if may_be_separate(self.package_manager, path)]
        return live_var(self.layout.var, separate)

    def home_overlays(self) -> dict[str, Overlay]:
        """What a transaction sees of HOMES: below, a snapshot of the live directory if it has one, or the live one."""
        lower = {name: self.live_home(name) for name in HOMES}
        if os.path.lexists(self.home_origin):
            lower["home"] = self.home_origin
        return {name: Overlay(lower[name], self.private / name, self.private / f"overlay-{name}") for name in HOMES}

    def live_home(self, name: str) -> Path:
        """The live directory of one of HOMES, as it was when the transaction began."""
        upper = self.private / name
        own = self.layout.home if name == "home" else self.layout.home_root
        return live_of(upper) or own if upper.exists() else self.system.homes[name]

    def lacks(self, name: str) -> bool:
        """Whether the live directory of one of HOMES is on a file system of its own that is not mounted now."""
        return live_of(self.private / name) not in (None, self.system.homes.get(name))

    def changed_homes(self) -> list[str]:
        """Those HOMES to which the transaction wrote."""
        there = {name: overlay for name, overlay in self.home_overlays().items() if is_directory(overlay.upper)}
        top = {name: before if is_directory(before := self.home_before(name)) else there[name].lower for name in there}
        return [name for name, one in there.items() if os.listdir(one.upper) or not is_placed(one.upper, top[name])]

    def home_before(self, name: str) -> Path:
        """An empty directory that is as one of HOMES was when the transaction began; an older ash made none."""
        return self.private / f"before-{name}"

    def home_merge(self, name: str, var: VarMerge, clock: Sequence[int] = ()) -> HomeMerge:
        """The merge of one of HOMES. `clock` is a Clock of when the transaction began; empty if that is not known."""
        live, began = self.live_home(name), Clock(*clock) if clock else None
        known = began is not None and not began.was_set_back() and mount_of(live).kind in LOCAL_KINDS
        since = began.now if began and known else 0
        overlay, before = self.home_overlays()[name], self.home_before(name)
        return HomeMerge(name, overlay, live, since, var, before=before, is_missing=self.lacks(name))

    def with_outcome(self, change: Change, merged: Merged) -> Change:
        """A change, with what became of it in the shared directories."""
        name, is_aside = merged.directory.name, bool({*merged.conflicts} - {*merged.unmerged})
        folders = [f"/var/{merged.directory.relative_to(self.layout.var)}"] if is_aside else []
        if merged.unmerged:
            folders.append(f"/.snapshots/{(self.layout.unmerged / name).relative_to(self.layout.snapshots)}")
        return change._replace(
            conflicts=merged.conflicts, conflicts_folder=listed(folders), failed=merged.failed, kept=merged.kept
        )

    def _keep_unmerged(self, name: str, upper: Path, path: str) -> None:
        """Keep, in a directory of this name, what could not be put anywhere: to rename it takes no room."""
        directory = self.layout.unmerged / name
        if os.path.lexists(upper / path):
            self.layout.unmerged.mkdir(exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            rename(upper / path, directory / path)

    def var_merge(self, delete: Sequence[str] = ()) -> VarMerge:
        layout = self.layout
        conflicts = layout.conflicts(self.snapshot)
        merge = VarMerge(self.upper, self.origin, layout.var, self.package_manager, conflicts, delete=delete)
        merge.make_room = self.system.free_reserve
        return merge

    def _merge(self, merge: VarMerge, entries: Sequence[str]) -> None:
        """Merge the entries. What to do with each is decided right before, and on the disk before it is touched.

        So an interrupted merge can be resumed, and its own traces are not taken for somebody else's changes.
        """
        try:
            known = from_json(read_text(self.decisions), self.DECISIONS)
        except ValueError:  # none yet; or damaged, and what was merged is found to be in place
            known = {"aside": merge.conflicts.name, "token": merge.token}
            write_file(self.decisions, json.dumps(known), mode=0o600)  # the token is a secret
        merge.token = known["token"]
        merge.conflicts = merge.conflicts.with_name(known["aside"])
        decided = {entry: what for entry, what in known.get("decided", {}).items() if what in self.NOTED}
        noted = {**decided, **self._noted()}
        for entry in entries:
            before = noted.get(entry, "")
            if before == SET_ASIDE:
                merge.in_conflict.append(entry)
            elif before != MERGED:
                # The decision "place" may be old, and others may have changed the entry since.
                try:
                    decision = merge.redecide(entry) if before == "place" else before or merge.decide(entry)
                except OSError:  # somebody changes it right now
                    decision = "aside"
                self._note(entry, decision)
                merge.merge(entry, decision)
                if before:
                    merge.delete_torn(entry)
                about_to(f"note that {entry} is merged")
                kept = "keep" if entry in merge.unmerged else SET_ASIDE if entry in merge.in_conflict else MERGED
                self._note_outcome(entry, kept, (merge.live / entry).parent)

    def _noted(self) -> dict[str, str]:
        """What was noted last of each entry: a decision, or MERGED."""
        return {entry: notes[-1] for entry, notes in self.notes().items()}

    def notes(self) -> dict[str, list[str]]:
        """All that was noted of each entry, in order: decisions, then what became of it."""
        found: dict[str, list[str]] = {}
        for line in (*lines_of(read_text(self.merged)), *lines_of(read_text(self.outcomes))):
            with contextlib.suppress(ValueError):  # torn, and so the entry was not touched yet
                noted = from_json(line, lambda value: isinstance(value, str) or has_shape(value, [str]))
                entry, what = [noted, MERGED] if isinstance(noted, str) else noted
                found.setdefault(entry, []).append(what if what in self.NOTED else "")
        return found

    def _note(self, entry: str, what: str) -> None:
        """Note a decision before it is carried out, on the disk if that is to place the entry."""
        append_note(self.merged, entry, what, durable=what == "place")

    def _note_outcome(self, entry: str, what: str, live: Path) -> None:
        """Note what became of an entry, whose live path is given.

        The note must not reach the disk before its entry does. So it is never synced: btrfs then writes it with the
        transaction of the renames before it, or a later one. With fsync only the log of the file's own subvolume would
        be written, and not what was renamed in that of /var. Another file system is synced before the note.
        """
        if live.is_dir() and mount_of(live).device != mount_of(self.directory).device:
            sync_any_filesystem(live)
        append_note(self.outcomes, entry, what)


# --- Transactions ----------------------------------------------------------------------------------------------


class Delta(NamedTuple):
    """What a transaction changed."""

    paths: Mapping[str, str]  # "added", "removed" or "changed"
    before: Mapping[str, str]  # packages
    after: Mapping[str, str]
    entries: Sequence[str]  # of /var
    delete: Sequence[str]  # those of them in which deletions are applied
    homes: bool  # whether /home or /root was changed

    @property
    def directories(self) -> set[str]:
        """The top-level directories of the root with changes in them."""
        return {path.partition("/")[0] for path in self.paths}


class Transaction:
    """A change of one snapshot: committed as a whole when its block ends, dropped as a whole when it raises.

    Nothing outside ever sees it half done: not after an error, not after `kill -9`, not after a power cut. When the
    block has ended, the change is on the disk, and `change` describes it.

    Args:
        resume: continue the work of a session that hung up.
        simulate: drop the transaction in the end.
        base: allow the base.

    Raises (on entering):
        AshError: there is no such snapshot, it is the base, in use or locked, or there is too little space.
    """

    def __init__(
        self, system: System, snapshot: int, *, resume: bool = False, simulate: bool = False, base: bool = False
    ) -> None:
        self.system = system
        self.layout = system.layout
        self.package_manager = system.package_manager
        self.snapshot = snapshot
        self.resume = resume
        self.simulate = simulate
        self.base = base
        self.place = system.workdir(snapshot)
        self.original = self.layout.rootfs(snapshot)
        self.root = self.place.root
        self.var = self.place.origin
        self.intent = Open()
        self.change = Change(snapshot)
        self.binds: list[tuple[Path, str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.system.require_changeable(self.snapshot, self.base)
        with ExitStack() as stack:
            lock = stack.enter_context(self.system.lock(self.place.name))
            os.set_inheritable(lock.descriptor, True)
            self.system.require_changeable(self.snapshot, self.base)
            self._require_database()
            if self.resume:
                self._resume()
            else:
                self.place.recover(self.system.tree())
                delete_deferred(self.layout)
                self._require_space()
                stack.callback(self.place.drop)
                self._begin()
            stack.pop_all()
            self._stack.push(lock)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._stack:
            if isinstance(error, HangUp):
                sync_filesystem(self.layout.snapshots)  # the programs inside have synced nothing
                save_intent(self.place.directory, Kept(self.intent.caller, self.intent.clock))
            elif error is not None or self.simulate:
                try:
                    self._keep_downloads()
                finally:
                    self.place.drop()
                    wait_for_space(self.layout.snapshots, seconds=5)
            else:
                with signals_held():
                    self._commit()

    def _resume(self) -> None:
        kept = load_intent(self.place.directory)
        if not isinstance(kept, Kept):
            raise AshError(f"no unfinished work waits in snapshot {self.snapshot}", "leave out --resume", REFUSED)
        self.intent = Open(kept.caller, kept.clock)
        self._make_upper_directories()  # an older ash had none for /home and /root
        save_intent(self.place.directory, self.intent)

    def _require_database(self) -> None:
        """Refuse file systems of their own on which the symlinks to the package database would have to be."""
        for here in mounts_in_var(self.system.running):
            hidden = [name for name in self.package_manager.database if name.startswith(f"{here}/") or name == here]
            if hidden and not may_be_separate(self.package_manager, here):
                what = f"/var/{here} is a file system of its own: /var/{hidden[0]} must be on the one of /var"
                raise AshError(what, "mount file systems deeper in it", REFUSED)

    def _require_space(self) -> None:
        self.system.keep_reserve()
        free = wait_for_space(self.layout.snapshots, seconds=1)
        if free < SPACE_FLOOR:
            what = f"too little free space: {free >> 20} MiB, at least {SPACE_FLOOR >> 20} MiB are needed"
            raise AshError(what, FREES_SPACE, REFUSED)

    def _begin(self) -> None:
        """Create the intent, the snapshots and the upper directories."""
        self.place.directory.mkdir(parents=True, exist_ok=True)
        self.intent = Open(self.system.caller, Clock.read())
        save_intent(self.place.directory, self.intent)
        self.place.private.mkdir(mode=0o700)
        try:
            snapshot_subvolume(self.layout.var, self.var, readonly=True)
        except AshError as error:
            if "Text file busy" in error.message:
                raise AshError("a swap file in /var is in use", "move it to a subvolume of its own", REFUSED) from None
            raise
        if self.system.homes["home"] == self.layout.home:
            try:
                snapshot_subvolume(self.layout.home, self.place.home_origin, readonly=True)
            except AshError as error:
                if "Text file busy" not in error.message:  # with a swap file in use, the live one is below
                    raise
        snapshot_subvolume(self.original, self.root)
        self._make_upper_directories()
        self._lay_out_database()

    def _overlays(self) -> dict[str, Overlay]:
        """What programs see of the shared directories, by path from the root."""
        var = Overlay(self.var, self.place.upper, self.place.overlay_work)
        return {"var": var, **self.place.home_overlays()}

    def _make_upper_directories(self) -> None:
        own = (self.var, self.place.home_origin, self.layout.home, self.layout.home_root)
        for name, overlay in self._overlays().items():
            if self.place.lacks(name):
                hint = f"mount it, or drop the session: ash unlock {self.snapshot}"
                raise AshError(f"/{name} was on another file system when the session began", hint, REFUSED)
            overlay.work.mkdir(exist_ok=True)
            if not overlay.upper.exists():
                overlay.upper.mkdir()
                copy_directory_attributes(overlay.lower, overlay.upper)
                if name in HOMES:
                    self.place.home_before(name).mkdir()
                    copy_directory_attributes(overlay.upper, self.place.home_before(name))
                if overlay.lower not in own:
                    os.setxattr(overlay.upper, SHOWN, os.fsencode(overlay.lower))

    def show(self, path: Path) -> str:
        """Make a file of the outside visible to the programs in the transaction; returns its path there."""
        # The name is one that no program mistakes for an option or a pattern, and that no other file has.
        inside = f"/run/ash/files/{len(self.binds)}/{re.sub(r'[^A-Za-z0-9._+~-]', '_', path.name)}"
        self.binds.append((path.resolve(), inside))
        return inside

    def chroot(self) -> Chroot:
        """The environment in which programs run on the working copy."""
        mutable = [
            (path_inside(self.root, f"var/{one}"), one)
            for one in shared_directories(self.root)
            if is_directory(self.var / one)
        ]
        for kept, seen in mutable_directories(self.root, self.snapshot):
            mutable.append((make_mutable_directory(self.layout, kept), seen))
        return Chroot(
            self.root,
            {**self.package_manager.environment},
            self._overlays(),
            [*mutable, *self.binds],
            self.package_manager.transient,
        )

    def run(self, argv: Sequence[str]) -> str:
        """Run a program of the distribution without input; shows and returns its output. PackageError if it fails."""
        said: list[bytes] = []

        def hear(piece: bytes) -> None:
            said.append(piece)
            if not (console.silent or console.quiet_progress):
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()

        chroot = self.chroot()
        ours = {**chroot.environment, "LC_ALL": "C.UTF-8"}  # the output is parsed, not only shown
        status = chroot._replace(environment=ours).run(argv, hear=hear)
        output = b"".join(said).decode(errors="replace")
        if status:
            raise PackageError(output)
        return output

    def _name_direct_changes(self) -> None:
        """Say what was written to the snapshot itself since it was cloned, which a mutable one allows."""
        if not is_mutable(self.original) or not (clock := self.intent.clock):
            return
        inodes = changed_inodes(self.original, Subvolume.at(self.root).otransid)
        found = {path: status_of(self.original / path) for path in (paths_below(self.original) if inodes else ())}
        # A file that was only read has a new atime, and so a new state of its inode.
        late = [path for path, now in found.items() if now and now.st_ino in inodes and now.st_ctime_ns > clock[0]]
        if late:
            what = f"snapshot {self.snapshot} was changed directly in the meantime: {listed(sorted(late))}"
            console.say(f"ash: {what}; only its earlier state has that now (ash undo {self.snapshot})")

    def _commit(self) -> None:
        """Conclude the working copy, then exchange it for the snapshot.

        The exchange is the commit: what is interrupted before it is dropped, what is interrupted after it is finished
        by recovery. If only /var, /home or /root was changed there is no exchange; the intent file is the commit then.
        """
        with ExitStack() as stack:
            self._commit_to(self.place, stack)

    def _commit_to(self, place: WorkDir, stack: ExitStack) -> None:
        """The commit; the stack holds the lock for merging, since a wait for it can only be interrupted before."""
        intent: Commit | Merge
        try:
            found = self._conclude()
            stack.enter_context(place.merge_lock(found.entries))
            changed = bool(found.paths) or bool(found.entries) or found.homes
            change = Change.between(self.snapshot, found.before, found.after)._replace(changed=changed)
            facts = {"packages": change.packages()}
            caller = self.system.caller if change.changed else None
            if found.paths:
                self._name_direct_changes()
                copies = sorted(found.directories & {"etc", "boot"})
                commit = Commit(entries=found.entries, delete=found.delete, copies=copies, facts=facts, caller=caller)
                intent = place.swap(self.root, commit._replace(clock=self.intent.clock))
            else:
                delete_subvolume(self.root)
                intent = Merge(found.entries, found.delete, facts, caller, new_id(), self.intent.clock)
                save_intent(place.directory, intent)
                sync_filesystem(self.layout.snapshots)
        except BaseException:
            with contextlib.suppress(AshError, OSError):
                save_intent(place.directory, self.intent)  # if dropping is interrupted, recovery must not finish it
            place.drop()
            raise
        merged = place.finish(intent)
        self.change = place.with_outcome(change, merged)._replace(
            written=[path for path, kind in found.paths.items() if kind != "removed"],
        )
        self.system.done += [self.change] if self.change.changed else []
        if merged.failed:
            what = f"snapshot {self.snapshot} is changed, but not all shared files could be put in place"
            raise CommittedButUnfinished(
                what, f"make room or mend the cause, then look in {self.change.conflicts_folder}"
            )

    def _keep_downloads(self) -> None:
        """Move the downloaded packages into the live /var, if there is room: the next attempt has them then."""
        if free_space(self.layout.snapshots) >= SPACE_FLOOR:
            with (
                contextlib.suppress(AshError, OSError),  # not worth a second error
                merge_lock(self.layout),
                self.place.live_var(),
                nosymfollow(self.place.upper),
            ):
                merge = self.place.var_merge()
                for pattern in self.package_manager.downloads:
                    merge.add_files(pattern)

    def _conclude(self) -> Delta:
        """Give the working copy its final state, and find out what was changed."""
        require_directories(self.root)
        self._require_entry_directories()
        mark_variant(self.root)
        self._serve_new_init()
        self._take_database_directories()
        self._refuse_foreign_writes()
        self._refuse_unseen_homes()
        self._settle_accounts()
        self._take_database_files()
        try:
            make_startable(self.root, layout=self.layout, tools=self.system.distro.boot_tools)
        except AshError as error:
            if is_out_of_space(error):
                raise
            what = "is left out of the boot menu with all snapshots"
            console.warn(f"snapshot {self.snapshot} {what}: {reason(error)}")
        unprotect(self.root)  # an immutable root could not be exchanged
        set_readonly(self.root)
        paths = self._changed_paths()
        merge = self.place.var_merge()
        entries = merge.entries()
        homes = any(self.place.home_merge(name, merge).is_changed() for name in self.place.changed_homes())
        touched = any(path.startswith(IN_ROOT_DB) for path in paths)
        before, after = (self.package_manager.installed(root) if touched else {} for root in (self.original, self.root))
        delete = self._entries_to_delete_in(entries, before.keys() - after.keys())
        delete = [one for one in delete if is_deletable(f"/var/{one}") and not self._was_moved(one, paths)]
        return Delta(paths, before, after, entries, delete, homes)

    def _require_entry_directories(self) -> None:
        """Refuse a symlink in the place of /var/lib and the like: what others have there would be elsewhere."""
        for name in ENTRY_DIRECTORIES:
            there = self.place.upper / name
            if os.path.lexists(there) and not is_directory(there):
                hint = "put symlinks in it, or mount a file system there outside of ash"
                raise AshError(f"/var/{name} must stay a directory", hint, REFUSED)

    def _serve_new_init(self) -> None:
        """Install ash's units if the snapshot boots with another init system now: it may be started as it is."""
        init = init_of(self.root)
        if init.name != init_of(self.original).name:
            init.install_units(self.root, self.system.distro.executable)

    def _settle_accounts(self) -> None:
        """Give new accounts their system-wide uid and gid, and re-own their files."""
        before = self.original / "etc"
        if all(is_same(before / name, self.root / "etc" / name) for name in ID_FILES):
            return
        with self.system.lock("state"):
            numbers = AccountIds.load(self.layout.ids)
            with contextlib.suppress(AshError):  # the menu is damaged
                if slot := self.system.last_good_slot():
                    numbers.learn_machine(self.layout.rootfs(slot) / "etc")
            renumbering = numbers.settle(before, self.root / "etc")
            write_file(self.layout.ids, numbers.dump())
        if renumbering.accounts:
            directories: dict[Path, Path | None] = {self.root: self.original, self.place.upper: self.var}
            renumbering.apply(self.root, directories | self._new_homes(before))

    def _new_homes(self, before: Path) -> dict[Path, Path | None]:
        """The home directories that the transaction wrote to for its new accounts, and what they were before."""
        known = AccountFile.read(before / "passwd").ids
        rows = AccountFile.read(self.root / "etc/passwd").rows
        paths = {row[5].strip("/") for row in rows if len(row) > 5 and row[0] not in known}
        found: dict[Path, Path | None] = {}
        for name, overlay in self.place.home_overlays().items():
            for path in sorted(path.removeprefix(f"{name}/") for path in paths if path.startswith(f"{name}/")):
                home = overlay.upper / path
                if is_inner_path(path) and has_real_parents(overlay.upper, path) and is_directory(home):
                    found[home] = overlay.lower / path
        return found

    def _lay_out_database(self) -> None:
        """Put into /var the symlinks to the package database that it lacks, and the database's single files."""
        manager = self.package_manager
        links = database_links(manager, self.root)
        for name in (*links, *manager.database_files):
            own, shown = place_inside(self.root, in_database(name)), self.place.upper / name
            is_missing = name in links and not is_link_to(self.var / name, links[name])
            is_file = name not in links and own.is_file() and not own.is_symlink()
            if (is_missing or is_file) and has_real_parents(self.var, name):
                for directory in reversed(Path(name).parents[:-1]):
                    (self.place.upper / directory).mkdir(exist_ok=True)
                    copy_directory_attributes(self.var / directory, self.place.upper / directory)
                if is_file:
                    copy_file(own, shown)
                else:
                    shown.symlink_to(links[name])

    def _take_database_directories(self) -> None:
        """Take what was written in the place of symlinks to the package database into the snapshot.

        All snapshots have these symlinks in common: what deletes or replaces one changes only the own database. If a
        package is purged and installed again, nothing of what it had stays; if it is purged, nothing at all.
        """
        for name, target in database_links(self.package_manager, self.original).items():
            shown, own = self.place.upper / name, path_inside(self.root, target)
            is_hidden = self._reopen_parents(name)
            if not os.path.lexists(shown) and not is_hidden:
                continue
            is_anew = is_directory(shown) and bool(os.listdir(shown))
            if not is_hidden and (is_anew or (is_whiteout(shown) and self._is_given_up(name))):
                for old in own.iterdir() if is_directory(own) else ():
                    remove_tree(old, protected=True)
            if is_directory(shown):
                self.place.var_merge().copy(shown, own)
            elif os.path.lexists(shown) and not is_whiteout(shown) and not is_link_to(shown, target):
                raise AshError(
                    f"/var/{name} must stay a symlink to {target}", "keep the package database there", REFUSED
                )
            remove_tree(shown)
            if is_hidden:
                shown.symlink_to(target)

    def _is_given_up(self, entry: str) -> bool:
        """Whether an entry of /var was that of packages that are installed no longer."""
        claims = self.package_manager.claims
        return bool(claims(self.original, entry)) and not claims(self.root, entry)

    def _reopen_parents(self, name: str) -> bool:
        """Make the parents of a path of /var directories again where a transaction deleted one.

        Returns whether one of them hides what /var had in it.
        """
        is_hidden = False
        for parent in reversed(Path(name).parents[:-1]):
            here = self.place.upper / parent
            if not os.path.lexists(here) and not is_hidden:
                return False
            if not os.path.lexists(here) or is_whiteout(here):
                here.unlink(missing_ok=True)
                here.mkdir()
                os.setxattr(here, "trusted.overlay.opaque", b"y")
                copy_directory_attributes(self.var / parent, here)
            elif not is_directory(here):
                raise AshError(f"/var/{parent} must stay a directory", "the package database is in it", REFUSED)
            is_hidden |= is_opaque(here)
        return is_hidden

    def _take_database_files(self) -> None:
        """Take the single files of the package database from /var back into the snapshot."""
        for name in self.package_manager.database_files:
            own, shown = place_inside(self.root, in_database(name)), self.place.upper / name
            if not os.path.lexists(shown):
                continue
            if is_whiteout(shown):
                own.unlink(missing_ok=True)
            elif not is_same(own, shown):
                remove_tree(own)
                copy_file(shown, own)
            shown.unlink()

    def _changed_paths(self) -> dict[str, str]:
        with readonly_view(self.layout, self.original) as before:
            paths = changed_paths(before, self.root)
        resolver = "etc/resolv.conf"  # was replaced for the time of the transaction
        if paths.keys() == {resolver} and is_same(self.original / resolver, self.root / resolver):
            return {}
        return paths

    def _entries_to_delete_in(self, entries: Sequence[str], removed: Container[str]) -> list[str]:
        """The entries in which an upgrade or the user deleted something. The data of removed packages stays."""
        if not removed:
            return list(entries)
        before, after = self.original, self.root
        return [
            entry
            for entry in entries
            if self.package_manager.claims(after, entry)
            and not self.package_manager.claims(before, entry) - self.package_manager.claims(after, entry)
        ]

    def _was_moved(self, entry: str, paths: Mapping[str, str]) -> bool:
        """Whether a deleted or replaced entry has a copy in the transaction: it was moved. The live one stays then.

        A copy has a file of the same size and mtime, which mv(1) keeps.
        """
        there = self.place.upper / entry
        if is_directory(there) and not is_opaque(there):
            return False
        before = self._sizes_and_times(self.var / entry)
        others = [self.place.upper / name for name in self.place.var_merge().names() if name != entry]
        others += [self.root / path for path, kind in paths.items() if kind == "added"]
        return bool(before) and any(not before.isdisjoint(self._sizes_and_times(other)) for other in others)

    @staticmethod
    def _sizes_and_times(path: Path) -> set[tuple[int, int]]:
        """The size and mtime of each file below a path that is not empty."""
        found = (seen.status for seen in look_through(path))
        return {(s.st_size, s.st_mtime_ns) for s in found if s and stat.S_ISREG(s.st_mode) and s.st_size}

    def _refuse_foreign_writes(self) -> None:
        """Refuse changes below other mounts and nested subvolumes of shared directories: overlays do not show them."""
        foreign = {m.target for m in mounts()} if self.system.running else set()
        for name, overlay in self._overlays().items():
            paths = paths_below(overlay.upper)
            self._refuse_too_deep(name, paths)
            is_snapshot = overlay.lower in (self.var, self.place.home_origin)
            for here in sorted({path.rpartition("/")[0] for path in paths} - {""}):
                origin, shown = overlay.lower / here, f"/{name}/{here}"
                nested = is_snapshot and is_directory(origin) and origin.lstat().st_ino == EMPTY_SUBVOLUME_INODE
                is_log_or_cache = name == "var" and may_be_separate(self.package_manager, here)
                if (nested or shown in foreign) and not is_log_or_cache:
                    what = f"{shown} is a file system or subvolume of its own: a transaction cannot change it"
                    raise AshError(what, "make that change outside of ash", REFUSED)

    def _refuse_unseen_homes(self) -> None:
        """Refuse changes of a /home that cannot be below an overlay: the transaction saw, and wrote, another one."""
        for name, kind in self.system.unseen_homes.items():
            home = self.place.home_merge(name, self.place.var_merge())
            if home.is_changed():
                files = [path for path in paths_below(home.upper) if not is_directory(home.upper / path)]
                what = f"/{name} is on {kind}, which a transaction cannot see or change"
                if files:
                    what += f": it wrote to {home.shown(min(files))}"
                raise AshError(what, "make that change outside of ash", REFUSED)
            for left in home.upper.iterdir():  # the histories of shells
                remove_tree(left)

    @staticmethod
    def _refuse_too_deep(name: str, paths: Iterable[str]) -> None:
        """Refuse paths below a shared directory that are too long to be merged."""
        for path in paths:
            if len(path) * 4 > DEEPEST and len(os.fsencode(path)) > DEEPEST:  # the first test is the cheap one
                entry = "/".join(path.split("/")[:2])
                raise AshError(f"the directories below /{name}/{entry} are nested too deeply to be merged", "", REFUSED)


# --- fstab: ash's own mounts, and the user's lines -------------------------------------------------------------

MUTABLE_DIRECTORIES = "/.snapshots/mutable_dirs/"
OWN_MOUNT_POINTS = (
    "/",
    "/.snapshots",
    "/etc",
    "/boot",
)  # /boot is a directory of the root: a line for it hides kernels
# Services with PrivateTmp= that start before /var is mounted need /var/tmp.
MOUNT_POINTS = (".snapshots", "var/tmp", "home", "root", "tmp", "boot/efi", "dev", "proc", "sys", "run")
# Directories of a root that something else is mounted on, so that a mount point below them is not in the root.
MOUNTED_OVER = (".snapshots", "var", "home", "root", "tmp", "dev", "proc", "sys", "run", "etc")


def fstab_word(path: str) -> str:
    """Escape a path for fstab(5), which writes blanks and the like as octal numbers."""
    return re.sub(r"[\s\\#]", lambda blank: f"\\{ord(blank[0]):03o}", path)


def fstab_mount_point(line: str) -> str:
    """The mount point of a line of fstab; empty for comments and blank lines."""
    words = line.split()
    return words[1] if len(words) > 1 and not words[0].startswith("#") else ""


def fstab_directory(line: str) -> str:
    """The mount point of a line of fstab as a path from the root; empty if it is none, or outside of the root."""
    path = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fstab_mount_point(line))
    inside = path.strip("/")
    return inside if path.startswith("/") and is_inner_path(inside) else ""


def fstab_of_user(text: str) -> list[str]:
    """The lines of an fstab that are the user's, once they are written: all but those of ash's own mount points."""
    others = [line for line in lines_of(text) if fstab_mount_point(line) not in OWN_MOUNT_POINTS]
    return [line for line in others if not line.startswith(MUTABLE_DIRECTORIES)]


def fstab_of_ash(text: str) -> list[str]:
    """The lines of an fstab for ash's own mount points, in order of these; what the user writes there has no effect."""
    return sorted(line for line in lines_of(text) if fstab_mount_point(line) in OWN_MOUNT_POINTS)


def uuid_in_fstab(root: Path) -> str:
    """The UUID by which a root's fstab names the file system of "/"; empty if it does not."""
    text = read_text(path_inside(root, "etc/fstab")) if is_directory(root) else ""
    found = re.search(r"^UUID=(\S+)\s+/\s", text, re.MULTILINE)
    return found[1] if found else ""


def shared_line(name: str) -> str:
    """The line of fstab that mounts one of the SHARED_DIRECTORIES."""
    return f"/var/{name} /{name} none bind,nofail,{mount_option_after('/var')} 0 0"


def render_fstab(layout: Layout, uuid: str, which: int | str, old: str, mutable: bool = False) -> str:
    """The fstab of a snapshot or slot: ash's lines for its own mount points, then the user's lines of the old text.

    Unless the old text is already an fstab of ash, the user's lines begin with those for the shared volumes and /tmp.
    """
    options = f"compress=zstd,noatime,{mount_option_to_wait()}"
    bound = f"bind,{mount_option_after('/.snapshots')}"

    def volume(prefix: str) -> str:
        return f"subvol={layout.volume_name(prefix)},{options}"

    def line(*fields: str) -> str:
        return f"{' '.join(fields)} 0 0"

    disk, kept = f"UUID={uuid}", fstab_of_user(old)
    old_disk = next((text.split()[0] for text in fstab_of_ash(old) if fstab_mount_point(text) == "/"), "")
    if old_disk.startswith("UUID="):  # the user's lines for volumes on the same file system follow it
        kept = [f"{disk}{text[len(old_disk) :]}" if text.split()[:1] == [old_disk] else text for text in kept]
    own = [
        line(disk, "/", "btrfs", f"subvol={layout.rootfs_name(which)},{options},{'rw' if mutable else 'ro'}"),
        # Contains old versions of setuid programs, which must not be run.
        line(disk, "/.snapshots", "btrfs", f"{volume('@.snapshots')},nosuid,nodev"),
        line(f"/.snapshots/rootfs/snapshot-{which}/etc", "/etc", "none", bound),
    ]
    first = [
        line(disk, "/var", "btrfs", volume("@var")),
        line(disk, "/home", "btrfs", volume("@home")),
        line("/.snapshots/ash/root", "/root", "none", bound),
        line("tmpfs", "/tmp", "tmpfs", "mode=1777,nosuid,nodev"),
        line("tmpfs", "/media", "tmpfs", "mode=0755,nosuid,nodev"),
        # A boot does not wait for these, so that it goes on if somebody deletes the directories in /var.
        *(shared_line(name) for name in SHARED_DIRECTORIES),
    ]
    there = {fstab_mount_point(text) for text in lines_of(old)}
    missing = [] if "/.snapshots" in there else [text for text in first if fstab_mount_point(text) not in there]
    return "\n".join([*own, *missing, *kept, ""])


def fstab_entries(lines: Iterable[str]) -> dict[tuple[str, int], str]:
    """Lines of an fstab by a key: the mount point, for swap the device, else the line; then how often it occurred."""
    found: dict[tuple[str, int], str] = {}
    for line in lines:
        place = fstab_mount_point(line)
        about = place if place.startswith("/") else line.split()[0] if place else line
        found[about, sum(one == about for one, _ in found)] = line
    return found


def merge_fstab(base: Iterable[str], running: Iterable[str], own: Iterable[str]) -> tuple[list[str], list[str]]:
    """Merge the user's lines of three fstabs, those of the running one over those of the target.

    Returns the merged lines, and the target's lines that were changed too: they lose, unless the running fstab has no
    such line any more.
    """
    was, live, theirs = map(fstab_entries, (base, running, own))
    merged, clashes, order = dict(theirs), [], list(theirs)
    for before, entry in itertools.pairwise([None, *live]):
        if entry is None or live[entry] == was.get(entry):
            continue
        if entry not in merged:
            order.insert(order.index(before) + 1 if before in merged else len(order), entry)
        elif merged[entry] not in (was.get(entry), live[entry]):
            clashes.append(merged[entry])
        merged[entry] = live[entry]
    for entry in [one for one in was if one not in live and one in merged]:
        if merged[entry] == was[entry]:
            del merged[entry]
        else:
            clashes.append(merged[entry])
    return [merged[entry] for entry in order if entry in merged], clashes


def make_mount_points(root: Path) -> None:
    """Make the directories in a root that its fstab mounts something on."""
    for line in fstab_of_user(read_text(path_inside(root, "etc/fstab"))):
        inside = fstab_directory(line)
        if inside and inside.partition("/")[0] not in MOUNTED_OVER:
            with contextlib.suppress(FileExistsError, NotADirectoryError):  # a file may be mounted on a file
                path_inside(root, inside).mkdir(parents=True, exist_ok=True)


# --- The merge of /etc: three-way ------------------------------------------------------------------------------

# Files that programs regenerate, or keep as backups of what they edit.
NOT_DRIFT = r"\.updated|\.pwd\.lock|ld\.so\.cache|mtab|(passwd|group|shadow|gshadow|subuid|subgid)-"
# Files that belong to the machine, whichever snapshot it runs.
IDENTITY = r"machine-id|ssh/ssh_host_[^/]*_key(\.pub)?"
# These are merged by account and field, and fields that list members by member.
ACCOUNT_FILES = frozenset({"passwd", "group", "shadow", "gshadow", "subuid", "subgid"})
MEMBER_COLUMNS = {"group": {3}, "gshadow": {2, 3}}
ROOT_IN = ("passwd", "shadow", "group", "gshadow")  # of these, the files in which root has a row
MOST_PARENTS = 100  # of a path in /etc that is carried over: more than any program creates


def etc_state(etc: Path) -> str:
    """A digest of an /etc that changes with anything in it."""
    import hashlib

    return hashlib.sha256(repr(change_token(etc)).encode(errors="replace")).hexdigest()


def etc_drift(base: Path, running: Path) -> dict[str, str]:
    """The changes made to a running /etc: "added", "removed" or "changed" by path, parents first.

    A subvolume in it is a neighbour, as in /var: what is in it is not in snapshots of the /etc.
    """
    drift = dict[str, str]()
    before, now = paths_below(base), paths_below(running)  # a path that leads through a symlink is none
    neighbours: list[str] = []
    for path in sorted(before | now):
        if re.fullmatch(NOT_DRIFT, path) or path.startswith((*neighbours,)):
            continue
        one, other = base / path, running / path
        is_there = path in now and os.path.lexists(other)
        try:
            if (path in before) == is_there and is_same(one, other):
                continue
        except PermissionError:  # for an account that may not read it, an equal mtime must do
            if one.lstat().st_mtime_ns == other.lstat().st_mtime_ns:
                continue
        if is_there and is_subvolume_or_its_place(other):
            neighbours.append(f"{path}/")
        elif not (is_there and is_special(other)):
            drift[path] = "removed" if not is_there else "changed" if path in before else "added"
    return drift


def is_damaged(path: str, base: Path, running: Path) -> bool:
    """Whether a running /etc has lost what no machine is without: root's account, or every mount of its fstab.

    That is what is left of a file after a crash or on a full disk, not an edit.
    """
    if (running / path).is_symlink() or path not in {*ROOT_IN, "fstab"}:
        return False
    if path == "fstab":
        was, now = (any(map(fstab_mount_point, lines_of(read_text(etc / path)))) for etc in (base, running))
    else:
        was, now = (AccountFile.read(etc / path).row("root") is not None for etc in (base, running))
    return was and not now


def link_target(etc: Path, path: str, link: Path) -> Path | None:
    """Where a symlink would lead from a path in the /etc of a root; None if to another mount, or in a circle."""
    target = os.readlink(link)
    inside = target if target.startswith("/") else f"{etc.name}/{path.rpartition('/')[0]}/{target}"
    with contextlib.suppress(AshError):
        found = path_inside(etc.parent, inside)
        if found.relative_to(etc.parent).parts[:1] not in {(name,) for name in MOUNTED_OVER}:
            return found
    return None


def missing_modules(root: Path, file: Path) -> set[str]:
    """The modules that a file of /etc/pam.d names and a root lacks, but for those that may be missing ("-auth")."""
    named = re.findall(
        r"^(?:auth|account|password|session)\s+(?:\[.*?\]|\S+)\s+(\S+\.so)\b", read_text(file), re.MULTILINE
    )
    roots = [path_inside(root, name) for name in ("lib", "lib64", "usr/lib", "usr/lib64")]
    places = [place for one in roots for place in (*one.glob("security"), *one.glob("*/security"))]
    return {name for name in named if not any((place / name.rpartition("/")[2]).exists() for place in places)}


def is_free(path: Path, below: Path) -> bool:
    """Whether a path can be created in a directory: nothing is there, and no file in the place of a parent."""
    parents = itertools.takewhile(lambda parent: parent != below, path.parents)
    return not os.path.lexists(path) and all(is_directory(one) or not os.path.lexists(one) for one in parents)


def is_too_deep(path: str) -> bool:
    """Whether a path in /etc is too deep to carry: the owner of a directory could keep root busy without end."""
    return path.count("/") >= MOST_PARENTS or len(os.fsencode(path)) > DEEPEST


def is_locked(password: str) -> bool:
    """Whether a password field of shadow or gshadow matches no password; "!" before a hash keeps that for later."""
    return password.startswith(("!", "*"))


def merge_password(was: str, now: str, theirs: str) -> str | None:
    """Merge a password field that both sides changed: hash and lock apart, and a new lock wins over a new hash.

    None if both changed the hash, or one changed it and the other unlocked it.
    """
    (a, before), (b, live), (c, own) = ((field.lstrip("!"), is_locked(field)) for field in (was, now, theirs))
    if (b != a and c not in (a, b)) or (before and not (live and own)):
        return None
    hashed = b if b != a else c
    return f"!{hashed}" if (live or own) and not hashed.startswith("*") else hashed


def merge_row(
    was: Sequence[str],
    now: Sequence[str],
    theirs: Sequence[str],
    members: Container[int],
    passwords: Container[int] = (),
) -> list[str] | None:
    """Merge an account's three rows field by field, `members` by name; None if both sides changed the same field."""
    if len({len(row) for row in (was, now, theirs)}) != 1:
        return None
    merged: list[str] = []
    for column, (a, b, c) in enumerate(zip(was, now, theirs, strict=True)):
        if column in members:
            before, live, own = (dict.fromkeys(filter(None, text.split(","))) for text in (a, b, c))
            kept = [name for name in own if name not in before or name in live]
            merged.append(",".join(dict.fromkeys([*kept, *(name for name in live if name not in before)])))
        elif b == a or c in (a, b):
            merged.append(b if b != a else c)
        elif column in passwords and (password := merge_password(a, b, c)) is not None:
            merged.append(password)
        else:
            return None
    return merged


def account_rows(file: AccountFile) -> dict[str, list[str]]:
    """The rows of an account file by name; comments, ranges and what has the same name again by the whole line."""
    rows: dict[str, list[str]] = {}
    for row in file.rows:
        line = ":".join(row)
        known_by = line if file.has_ranges or len(row) == 1 or row[0].startswith("#") or row[0] in rows else row[0]
        while known_by in rows:
            known_by += "\n"  # the same line again
        rows[known_by] = row
    return rows


def takes_foreign_id(file: AccountFile, account: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Whether an account of a file has the id of one in `rows` with which it does not share it in that file too."""
    number = file.id_of(account)
    owners = {row[0] for row in rows if number is not None and file.id_of(row) == number}
    return not owners <= {row[0] for row in file.rows if file.id_of(row) == number}


def merge_accounts(name: str, base: str, running: str, own: str, settled: Container[str] = ()) -> tuple[str, list[str]]:
    """Merge one of ACCOUNT_FILES account by account: its texts in the base, in the running /etc, and in the target.

    New lines come before the target's NIS entries ("+..."). Returns the merged text, and the accounts in conflict,
    which stay as in the target, unless they were locked in the running /etc: a lock wins. `settled` accounts stay, too.
    """
    result, live_file = AccountFile(name, own), AccountFile(name, running)
    old, live, new = account_rows(AccountFile(name, base)), account_rows(live_file), account_rows(result)
    passwords = {1} if name in ("shadow", "gshadow") else set()
    conflicts = []
    added: list[list[str]] = []
    for account in dict.fromkeys([*old, *live]):
        was, now, theirs = old.get(account), live.get(account), new.get(account)
        if now in (was, theirs) or account.partition(":")[0] in settled:
            continue
        if theirs == was:
            if now is None:
                del new[account]
            elif was is not None:
                new[account] = now
            elif name in ("passwd", "group") and takes_foreign_id(live_file, now, new.values()):
                conflicts.append(account.rstrip("\n"))
            else:
                added.append(now)
            continue
        rows = was and now and theirs and merge_row(was, now, theirs, MEMBER_COLUMNS.get(name, ()), passwords)
        if rows:
            new[account] = rows
        else:
            conflicts.append(account.rstrip("\n"))
            was_locked, locked, still_open = (row and is_locked("".join(row[1:2])) for row in (was, now, theirs))
            if passwords and theirs and locked and not was_locked and still_open is False:
                new[account] = [theirs[0], f"!{theirs[1]}", *theirs[2:]]
    kept = list(new.values())
    at_end = next((place for place, row in enumerate(kept) if row[0][:1] in ("+", "-")), len(kept))
    nis = [row for row in added if row[0][:1] in ("+", "-")]
    result.rows = [*kept[:at_end], *(row for row in added if row not in nis), *kept[at_end:], *nis]
    return str(result), conflicts


def replace_by_parts(content: Path, attributes: Path, target: Path) -> None:
    """Replace a regular file by one with the content of a file, and owner, mode and other attributes of another."""
    flags = flags_of(attributes)
    unprotect(target)
    with unprotected(target.parent), replace(target) as new:
        copy_file(content, new)
        with open_descriptor(attributes) as source, open_descriptor(new) as copy:
            copy_attributes(source, copy)
    if flags & PROTECTING:
        protect(target, flags)


class EtcMerge:
    """Carries the changes made to a running /etc, which was once as in `base`, over into another one.

    Args:
        conflicts: the directory for the version that loses, of files that both sides changed.
        is_default: whether a path of the target, with this content, is as its package delivers it: it loses.
        own_fstab: renders the target's fstab with the user's lines of the given text.
    """

    identity = True  # whether to carry the machine id and the host keys too
    brought: Sequence[Path] = ()  # the /etc that was carried into the running deployment
    keep_conflicts = True  # whether to write anything to `conflicts`

    def __init__(
        self,
        base: Path,
        running: Path,
        target: Path,
        conflicts: Path,
        own_fstab: Callable[[str], str],
        *,
        is_default: Callable[[str, bytes], bool] = lambda *_: False,
    ) -> None:
        self.base = base
        self.running = running
        self.target = target
        self.conflicts = conflicts
        self.own_fstab = own_fstab
        self.is_default = is_default
        self.drift: Mapping[str, str] = {}  # as merge() found it
        self.carried: list[str] = []
        self.in_conflict: list[str] = []
        self.without_effect: list[str] = []  # changes that were not carried since ash decides these
        self.settled: Mapping[str, Container[str]] = {}  # the accounts whose rows the target has as they are to be
        self.unusable: Container[str] = ()  # paths of the running /etc that are damaged: the target's stay

    def merge(self, fresh: bool = False) -> None:
        """Carry all changes; with `fresh` only the machine's identity, and set all else aside."""
        self.drift = etc_drift(self.base, self.running)
        drift = self._without_damaged_files(self._without_deep_paths(self.drift))
        for path in [p for p, kind in drift.items() if kind != "removed"]:
            if re.fullmatch(IDENTITY, path):
                self._carry_identity(path)
            elif fresh:
                self.set_aside(path)
            else:
                self._carry(path)
        for path in reversed([] if fresh else [p for p, kind in drift.items() if kind == "removed"]):
            self._carry_removal(path)
        paths = paths_below(self.running)
        for path in [p for p in paths if re.fullmatch(IDENTITY, p) and p not in drift]:
            self._carry_identity(path)
        link_like(self.running, self.target, paths)

    def _without_deep_paths(self, drift: Mapping[str, str]) -> dict[str, str]:
        """Leave out paths that are too deep, and record the topmost ones as conflicts."""
        deep = set(filter(is_too_deep, drift))
        self.in_conflict += [path for path in drift if path in deep and path.rpartition("/")[0] not in deep]
        return {path: kind for path, kind in drift.items() if path not in deep}

    def _without_damaged_files(self, drift: Mapping[str, str]) -> dict[str, str]:
        """Leave out files that are damaged, and record them as conflicts."""
        damaged = {path for path in drift if path in self.unusable or is_damaged(path, self.base, self.running)}
        for path in sorted(damaged):
            self.set_aside(path)
        self.without_effect += [f"{path}, which is damaged in the running system" for path in sorted(damaged)]
        return {path: kind for path, kind in drift.items() if path not in damaged}

    def _is_unchanged(self, path: str) -> bool:
        """Whether the target has what the base has; a symlink, if it leads there by another name (/lib, /usr/lib)."""
        own, was = self.target / path, self.base / path
        if is_same(own, was):
            return True
        if not (own.is_symlink() and was.is_symlink()):
            return False
        led = link_target(self.target, path, own)
        return led is not None and led == link_target(self.target, path, was)

    def _leads_nowhere(self, path: str) -> bool:
        """Whether a symlink would lead to a program, say, that the target's root lacks, unlike that of the target."""
        own, now = self.target / path, self.running / path
        if not (own.is_symlink() and now.is_symlink()):
            return False
        places = (self.running, now), (self.target, own), (self.target, now)
        leads = [(place := link_target(etc, path, link)) is not None and place.exists() for etc, link in places]
        return leads == [True, True, False] and link_target(self.target, path, now) is not None

    def _locks_out(self, path: str) -> bool:
        """Whether nobody could log in with a file of pam.d, since it names a module that the target does not have."""
        own, now = self.target / path, self.running / path
        if not (path.startswith("pam.d/") and size_of(own) >= 0 and size_of(now) >= 0):
            return False
        lacking = missing_modules(self.target.parent, now) - missing_modules(self.running.parent, now)
        self.without_effect += [f"{path}: the snapshot has no {module}" for module in sorted(lacking)]
        return bool(lacking)

    def _carry(self, path: str) -> None:
        """Carry a path that was added or changed, or record that it is in conflict."""
        own, now, was = self.target / path, self.running / path, self.base / path
        reachable = has_real_parents(self.target, path)
        if path == "fstab" and not any(one.is_symlink() for one in (own, now, was)):
            self._carry_fstab(own, now, was)
            self._carry_attributes(path)
        elif reachable and is_same(own, now):
            pass
        elif reachable and (self._leads_nowhere(path) or self._locks_out(path)):
            self.set_aside(path)
        elif reachable and self._is_unchanged(path) and not self._would_hide_changes(path):
            replace_by_copy(now, own, protected=True)
            self.carried.append(path)
        elif path in ACCOUNT_FILES and all(one.is_file() and not one.is_symlink() for one in (own, now, was)):
            self._carry_accounts(path)
            self._carry_attributes(path)
        elif reachable and all(size_of(one) >= 0 for one in (own, now, was)) and self._carry_facet(own, now, was):
            self.carried.append(path)
        elif reachable and size_of(now) >= 0 and self._is_default(path):
            self.set_aside(path, self.target)
            replace_by_copy(now, own, protected=True)
            self.carried.append(path)
        elif not (is_directory(now) and is_directory(own)) or (is_directory(was) and not same_attributes(own, was)):
            self.set_aside(path)

    @staticmethod
    def _carry_facet(own: Path, now: Path, was: Path) -> bool:
        """Merge a file of which one side changed the content and the other owner, mode or other attributes.

        Returns whether that was so.
        """
        if same_content(now, was) and same_attributes(own, was):
            content, attributes = own, now
        elif same_attributes(now, was) and same_content(own, was):
            content, attributes = now, own
        else:
            return False
        replace_by_parts(content, attributes, own)
        return True

    def _carry_attributes(self, path: str) -> None:
        """Carry owner, mode and other attributes of a file whose content is merged line by line."""
        own, now, was = self.target / path, self.running / path, self.base / path
        if any(size_of(one) < 0 for one in (own, now, was)) or same_attributes(now, was) or same_attributes(now, own):
            return
        if same_attributes(own, was):
            replace_by_parts(own, now, own)
            self.carried += [path] if path not in self.carried else []
        elif path not in self.in_conflict:
            self.in_conflict.append(path)

    def _is_default(self, path: str) -> bool:
        own = self.target / path
        return size_of(own) >= 0 and self.is_default(f"etc/{path}", read_bytes(own))

    def _would_hide_changes(self, path: str) -> bool:
        """Whether a directory that the running /etc replaced by something else has changes of the target in it."""
        own, now = self.target / path, self.running / path
        return is_directory(own) and not is_directory(now) and bool(first_difference(own, self.base / path))

    def lacks(self, path: str) -> bool:
        """Whether the target lacks what the running /etc has at a path, or has what that has not."""
        own, now = self.target / path, self.running / path
        if path == "fstab":
            theirs = fstab_of_user(read_text(own))
            return any(line not in theirs for line in fstab_of_user(read_text(now)))
        return not is_same(own, now)

    def bring(self, path: str) -> None:
        """Carry a path, whatever the target has there, since the user asked for it."""
        own, now = self.target / path, self.running / path
        if not has_real_parents(self.target, path):
            self.set_aside(path)
        elif path == "fstab":
            self._carry_fstab(own, now, None)
        elif os.path.lexists(now):
            replace_by_copy(now, own, protected=True)
            self.carried.append(path)
        elif not is_directory(own) or not any(own.iterdir()):
            remove_tree(own, protected=True)
            self.carried.append(path)

    def _carry_fstab(self, own: Path, now: Path, was: Path | None) -> None:
        """Carry the user's lines, which win over the target's; a target that had others is set aside."""
        texts = [read_text(path) if path else "" for path in (own, now, was)]
        ours, live, before = map(fstab_of_user, texts)
        if was and (changed := fstab_of_ash(texts[1])) != fstab_of_ash(texts[2]):
            places = dict.fromkeys(fstab_mount_point(line) for line in changed if line not in lines_of(texts[2]))
            self.without_effect.append(f"fstab, the lines of {listed(places or OWN_MOUNT_POINTS)}: they are ash's own")
        if live in (before, ours):
            return
        merged, clashes = merge_fstab(before, live, ours)
        if clashes:
            self.set_aside("fstab", self.target)
        if merged != ours:
            mutable = [line for line in lines_of(texts[0]) if line.startswith(MUTABLE_DIRECTORIES)]
            text = self.own_fstab("\n".join([*fstab_of_ash(texts[0]), *merged, ""]))
            rewrite(own, text + "".join(f"{line}\n" for line in mutable))
            self.carried.append("fstab")

    def _carry_accounts(self, path: str) -> None:
        was, now, own = (read_text(directory / path) for directory in (self.base, self.running, self.target))
        merged, conflicts = merge_accounts(path, was, now, own, self.settled.get(path, ()))
        if merged != own:
            rewrite(self.target / path, merged)
            self.carried.append(path)
        if conflicts:
            self.set_aside(path)

    def _carry_removal(self, path: str) -> None:
        """Carry the removal of a path, or record that it is in conflict."""
        own = self.target / path
        if not has_real_parents(self.target, path) or not os.path.lexists(own):
            return
        if is_directory(own) and any(own.iterdir()):
            self.in_conflict.append(path)
            return
        if not self._is_unchanged(path):
            if not self._is_default(path):
                self.in_conflict.append(path)
                return
            self.set_aside(path, self.target)
        remove_tree(own, protected=True)
        self.carried.append(path)

    def _carry_identity(self, path: str) -> None:
        own = self.target / path
        if self.identity and not is_same(own, self.running / path):
            if not os.path.lexists(own.parent):
                own.parent.mkdir()
            if has_real_parents(self.target, path):
                replace_by_copy(self.running / path, own, protected=True)

    def set_aside(self, path: str, loser: Path | None = None) -> None:
        """Record a conflict, and copy the loser's version, by default the running one, to the conflicts directory.

        There the default of a package has the name NAME.dist.
        """
        version = (loser or self.running) / path
        path += ".dist" if loser and path != "fstab" else ""
        self.in_conflict.append(path)
        if self.keep_conflicts and os.path.lexists(version):
            make_private_directory(self.conflicts)
            # A symlink that was set aside is no directory for what the other side has below its name.
            tops = ("etc" if number == 1 else f"etc.{number}" for number in itertools.count(1))
            places, is_a_directory = (self.conflicts / top / path for top in tops), is_directory(version)
            # What is in a directory may be there already.
            aside = next(p for p in places if is_free(p, self.conflicts) or (is_a_directory and is_directory(p)))
            (aside if is_a_directory else aside.parent).mkdir(parents=True, exist_ok=True)
            (copy_directory_attributes if is_a_directory else copy_file)(version, aside)


def copy_moved_base(merge: EtcMerge, new: Path, but: Sequence[str] = ()) -> None:
    """Copy the base of a merge to a new subvolume, with the changes of the running /etc, except for these paths."""
    delete_subvolume(new)
    snapshot_subvolume(merge.base, new)
    with nosymfollow(new):
        for path, kind in merge.drift.items():
            if path in but or is_too_deep(path) or not has_real_parents(new, path):
                continue
            if kind != "removed":
                replace_by_copy(merge.running / path, new / path, protected=True)
            else:
                remove_tree(new / path, protected=True)
    set_readonly(new)


def saved_paths(root: Path) -> list[str]:
    """The paths in /etc that were saved from a running system into a snapshot, or into a deployment's."""
    try:
        paths: list[str] = from_json(read_text(place_inside(root, IN_ROOT_SAVED)), {"etc": [is_inner_path]})["etc"]
    except ValueError:  # none were
        return []
    return paths


def note_saved(root: Path, paths: Iterable[str]) -> None:
    """Note in a root that changes of these paths in /etc were saved. Accounts and identity are the machine's."""
    known = set(saved_paths(root))
    saved = {path for path in paths if path not in ACCOUNT_FILES and not re.fullmatch(IDENTITY, path)}
    if saved - known:
        write_inside(root, IN_ROOT_SAVED, json.dumps({"etc": sorted(saved | known)}) + "\n")


def apply_paths(paths: Iterable[str], source: Path, target: Path) -> None:
    """Make paths of a root what they are in another, each file atomically; safe to repeat after an interruption."""
    exists = {path: has_real_parents(source, path) and os.path.lexists(source / path) for path in paths}
    for path in sorted(path for path in exists if exists[path]):
        if has_real_parents(target, path) and not is_special(source / path):
            replace_by_copy(source / path, target / path, protected=True)
    for path in sorted((path for path in exists if not exists[path]), reverse=True):
        if not has_real_parents(target, path):
            continue
        remove_tree(temporary_name(target / path), protected=True)
        if not is_directory(target / path) or not any((target / path).iterdir()):
            remove_tree(target / path, protected=True)


# --- Belongings: files that get another owner with an account's new id ------------------------------------------

# Mailboxes and crontabs, by the name of their user, and jobs of at, below /var.
SPOOLS = ("mail", "spool/mail", "spool/cron", "spool/cron/crontabs", "spool/cron/tabs")
AT_SPOOLS = ("spool/cron/atjobs", "spool/at", "spool/atd", "spool/atjobs")


def range_of_ids(starts: Mapping[int, int]) -> dict[int, int]:
    """The new ids by old ones of ranges that moved, by their starts."""
    return {old + offset: new + offset for old, new in starts.items() for offset in range(SUBORDINATES)}


class Belongings(NamedTuple):
    """What is a user's own on the shared volumes, and the ids that it gets with him."""

    user: str
    home: str  # empty if he has none of his own
    users: Mapping[int, int]  # new ids by old ones
    groups: Mapping[int, int]
    user_ranges: Mapping[int, int] = {}  # new starts of his ranges of ids by old ones
    group_ranges: Mapping[int, int] = {}

    def re_own(self, var: Path, homes: Mapping[str, Path]) -> None:
        """Re-own his home, mail, crontab and at jobs; repeating it is harmless. What is his goes by its name alone.

        Args:
            var: the live /var.
            homes: the live /home and /root, see System.homes.
        """
        users = {**self.users, **range_of_ids(self.user_ranges)}
        groups = {**self.groups, **range_of_ids(self.group_ranges)}
        first, _, rest = self.home.lstrip("/").partition("/")
        volumes = {**homes, "var": var}
        places = [(volumes[first], rest)] if first in volumes and rest else []
        places += [(var, f"{spool}/{self.user}") for spool in SPOOLS]
        with ExitStack() as stack:
            for volume in volumes.values():
                stack.enter_context(nosymfollow(volume))
            for volume, path in places:
                if has_real_parents(volume, path) and os.path.lexists(volume / path):
                    re_own({volume / path: None}, users, groups)
            for spool in AT_SPOOLS:
                if has_real_parents(var, f"{spool}/job") and is_directory(var / spool):
                    self._re_own_at_jobs(var / spool)

    def _re_own_at_jobs(self, spool: Path) -> None:
        """Re-own at jobs, which contain the name, uid and gid of their user."""
        for job in sorted(spool.iterdir()):
            status = status_of(job)
            if status is None or not stat.S_ISREG(status.st_mode) or status.st_uid not in self.users:
                continue
            text = read_text(job)
            if re.search(rf"^# mail\s+{re.escape(self.user)}\s", text, re.MULTILINE):
                uid = self.users[status.st_uid]
                gid = self.groups.get(status.st_gid, status.st_gid)
                header = f"# atrun uid={uid} gid={gid}"
                rewrite(job, re.sub(r"^# atrun uid=\d+ gid=\d+", header, text, count=1, flags=re.MULTILINE))
                re_own({job: None}, self.users, self.groups)


def is_move(pair: Any) -> bool:
    """Whether a value is an old and a new id."""
    return isinstance(pair, list) and len(pair) == 2 and all(map(is_u32, pair))


class Moved(NamedTuple):
    """A file of a root that gets another owner."""

    path: str
    users: Mapping[int, int]  # its new owner by its old one
    groups: Mapping[int, int]


def files_of(root: Path, users: Mapping[int, int], groups: Mapping[int, int], but: Container[str]) -> list[Moved]:
    """The files of a root whose owners have new ids, except below the directories `but`."""
    found = []
    for path in sorted(paths_below(root)):
        status = status_of(root / path) if path.partition("/")[0] not in but else None
        if status and (status.st_uid in users or status.st_gid in groups):
            uid, gid = status.st_uid, status.st_gid
            found.append(Moved(path, {uid: users.get(uid, uid)}, {gid: groups.get(gid, gid)}))
    return found


NEW_OWNERS_SHAPE = {
    "where": is_text, "root": is_u32, "etc": int, "foreign": [is_text],
    "files": [{"path": str, "users": [is_move], "groups": [is_move]}],
    "belongings": [{
        "user": is_text, "home": is_text, "users": [is_move], "groups": [is_move], "user_ranges": [is_move],
        "group_ranges": [is_move],
    }],
}  # fmt: skip


class NewOwners(NamedTuple):
    """What is re-owned once an /etc with new ids of accounts is in place: not before, and by recovery if need be.

    It is written to the disk before that /etc, or the root with it, is exchanged for the former one. The lock "deploy"
    protects it. Each file has its own old and new owner, since ids may be swapped: repeating it is harmless.
    """

    where: str  # a slot, or the number of a snapshot
    root: int  # the id of the subvolume that is there then
    etc: int  # the inode number of its /etc
    files: Sequence[Moved]  # of that root
    belongings: Sequence[Belongings]
    foreign: Sequence[str]  # those HOMES that are on file systems of their own

    @staticmethod
    def place(layout: Layout) -> Path:
        return layout.work("deploy") / "owners"

    def save(self, layout: Layout) -> None:
        """Write it to the disk."""

        def dump(one: Moved | Belongings) -> dict[str, Any]:
            fields = one._asdict()
            return {key: sorted(its.items()) if isinstance(its, Mapping) else its for key, its in fields.items()}

        files, belongings = [*map(dump, self.files)], [*map(dump, self.belongings)]
        data = {**self._asdict(), "files": files, "belongings": belongings}
        write_file(self.place(layout), json.dumps(data) + "\n", mode=0o600)

    @classmethod
    def load(cls, layout: Layout) -> NewOwners | None:
        """What save() wrote; None if nothing waits, or the file is damaged: the next deploy re-owns by name again."""
        try:
            data = from_json(read_text(cls.place(layout)), NEW_OWNERS_SHAPE)
        except ValueError:
            return None

        def fields(one: Mapping[str, Any]) -> dict[str, Any]:
            return {key: dict(its) if isinstance(its, list) else its for key, its in one.items()}

        files = [Moved(**fields_of(Moved, fields(one))) for one in data["files"]]
        belongings = [Belongings(**fields_of(Belongings, fields(one))) for one in data["belongings"]]
        return cls(**{**fields_of(cls, data), "files": files, "belongings": belongings})

    def is_due(self, layout: Layout) -> bool:
        """Whether the /etc with the new ids is in place."""
        root = layout.rootfs(self.where)
        etc = status_of(root / "etc") if is_subvolume(root) and subvolume_id(root) == self.root else None
        return etc is not None and etc.st_ino == self.etc

    def apply(self, layout: Layout, homes: Mapping[str, Path]) -> None:
        """Re-own everything; safe to repeat."""
        root = layout.rootfs(self.where)
        with nosymfollow(root) if self.files else contextlib.nullcontext():
            for one in self.files:
                about_to(f"re-own {one.path}")
                if has_real_parents(root, one.path):
                    with contextlib.suppress(FileNotFoundError):
                        chown_by_map(root / one.path, None, one.users, one.groups)
        with merge_lock(layout, wait=600) if self.belongings else contextlib.nullcontext():
            for mine in self.belongings:
                mine.re_own(layout.var, homes)
        for name in self.foreign if self.belongings else ():
            sync_any_filesystem(homes[name])
        sync_filesystem(layout.snapshots)


def save_new_owners(
    layout: Layout,
    where: int | str,
    etc: Path,
    *,
    files: Sequence[Moved] = (),
    belongings: Sequence[Belongings],
    homes: Mapping[str, Path],
) -> None:
    """Record NewOwners, if there are any, for the time when `etc` or its root has been put in place.

    AshError (REFUSED) if others still wait for a /home that is not mounted.
    """
    if files or belongings:
        if os.path.lexists(NewOwners.place(layout)):
            what = "/home is not mounted, and files there are yet to get the new owners of a former deploy"
            hint = f"mount it, or rm /.snapshots/{NewOwners.place(layout).relative_to(layout.snapshots)} to leave them"
            raise AshError(what, hint, REFUSED)
        foreign = [name for name, path in homes.items() if path == Path("/", name)]
        root, inode = subvolume_id(etc.parent), etc.lstat().st_ino
        NewOwners(str(where), root, inode, files, belongings, foreign).save(layout)


def finish_owners(layout: Layout, homes: Mapping[str, Path]) -> str:
    """Re-own what an /etc that is in place by now has new ids for; drop what is not. Holds the lock "deploy".

    Returns why it has to wait; empty if it has not. CommittedButUnfinished if it fails: then it is still to be done.
    """
    place = NewOwners.place(layout)
    todo = NewOwners.load(layout) if os.path.lexists(place) else None
    if todo is not None and todo.is_due(layout):
        users = listed(sorted(mine.user for mine in todo.belongings))
        for name in todo.foreign if users else ():
            if homes[name] != Path("/", name):
                return f"/{name} is not mounted, and files of {users} there are yet to get their new owner"
        try:
            todo.apply(layout, homes)
        except (AshError, OSError) as error:
            what = f"accounts have new ids, but not all their files could be re-owned: {reason(error)}"
            raise CommittedButUnfinished(what, "ash recover finishes it") from error
    if os.path.lexists(place):
        remove_tree(place)
    return ""


@contextmanager
def new_owners(layout: Layout, homes: Mapping[str, Path]) -> Iterator[None]:
    """Re-own what the block records as NewOwners, after it, if the /etc with the new ids is in place then."""
    finish_owners(layout, homes)
    try:
        yield
    finally:
        finish_owners(layout, homes)


# --- People: their accounts follow the machine into each deployment --------------------------------------------


def later_password(was: Sequence[str] | None, now: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """The password and the day of its change, of an account's three rows of shadow.

    What only the running system changed counts. Else a lock wins, a password over none, and of two passwords the one
    that was set later; of one day, or if the running system's must be changed at the next login, that one.
    """
    if now[1] == theirs[1] or (was is not None and was[1:3] == theirs[1:3]):
        return [*now[1:3]]
    ours = has_password(now[1])
    if ours != has_password(theirs[1]):
        return [*(now if ours else theirs)[1:3]]
    if not ours:  # "" lets everybody in
        return [*(now if now[1] else theirs)[1:3]]
    day, other = to_number(now[2]), to_number(theirs[2])
    field, date = (theirs if day and other and other > day else now)[1:3]
    return ["!" * (is_locked(now[1]) or is_locked(theirs[1])) + field.lstrip("!"), date]


def merge_person(
    was: Sequence[str] | None, now: Sequence[str], theirs: Sequence[str] | None, columns: Container[int]
) -> list[str]:
    """Merge a person's three rows: as in the running system, but `columns` as in the target if only that changed them.

    `was` and `theirs` are None if there is no row.
    """
    if theirs is None or was is None or len({len(row) for row in (was, now, theirs)}) != 1:
        return [*now]
    return [
        c if column in columns and a == b else b for column, (a, b, c) in enumerate(zip(was, now, theirs, strict=True))
    ]


def merge_shadow(was: Sequence[str] | None, now: Sequence[str], theirs: Sequence[str] | None) -> list[str]:
    """Merge a person's three rows of shadow; `was` and `theirs` are None if there is no row."""
    if theirs is None or len(now) < 9 or len(theirs) < 9:
        return [*now]
    row = merge_person(was, now, theirs, {3, 4, 5, 6, 8})
    row[1:3] = later_password(was, now, theirs)
    if was is None or was[7:8] != theirs[7:8]:  # the day on which the account expires: the first
        row[7] = min(filter(None, [now[7], theirs[7]]), key=lambda day: to_number(day) or 0, default="")
    return row


class Accounts:
    """The account files of an /etc."""

    def __init__(self, etc: Path) -> None:
        self.etc = etc
        self.files = {name: AccountFile.read(etc / name) for name in sorted(ACCOUNT_FILES)}
        self.before = {name: str(file) for name, file in self.files.items()}
        self._is_link = {name: (etc / name).is_symlink() for name in self.files}
        self._is_cut = {
            name: not is_link and read_text(etc / name)[-1:] not in ("", "\n")
            for name, is_link in self._is_link.items()
        }

    def __getitem__(self, name: str) -> AccountFile:
        return self.files[name]

    def is_usable(self) -> bool:
        """Whether people can be looked up and changed there: a damaged file must not look as if all were deleted."""
        return "root" in self["passwd"].ids and not any(self._is_link.values())

    def damage(self, base: Accounts) -> str:
        """What is wrong with these files, which came from those of `base`, that would look as if accounts were deleted.

        Empty if nothing is.
        """
        for name, file in [(name, file) for name, file in self.files.items() if not self._is_link[name]]:
            place, known = f"the running /etc/{name}", {tuple(row) for row in base[name].rows}
            for number, row in enumerate(file.rows, 1):
                if tuple(row) not in known and not is_row(name, row):
                    return f"line {number} of {place} is not an account"
            lost = {row[0] for row in base[name].rows} - {row[0] for row in file.rows}
            if lost and self._is_cut[name]:
                return f"{place} ends in the middle of line {len(file.rows)}"
            if "root" in lost and name in ROOT_IN:
                return f"{place} has no line of root"
            if name == "shadow":
                shadowed = {row[0] for row in self["passwd"].rows if row[1:2] == ["x"]}
                if lacking := sorted(lost & shadowed):
                    return f"{place} has no line of {lacking[0]}"
        return ""

    def members(self) -> Iterator[tuple[list[str], int]]:
        """The rows and columns that list members."""
        for name, columns in MEMBER_COLUMNS.items():
            for row in self[name].rows:
                yield from ((row, column) for column in sorted(columns) if column < len(row))

    def delete_users(self, names: Container[str]) -> None:
        for name in ("passwd", "shadow", "subuid", "subgid"):
            self[name].rows = [row for row in self[name].rows if row[0] not in names]
        for row, column in self.members():
            if any(member in names for member in row[column].split(",")):
                row[column] = ",".join(member for member in row[column].split(",") if member not in names)

    def orphans(self) -> dict[str, set[str]]:
        """The names in shadow and gshadow that passwd and group do not have."""
        return {
            name: {row[0] for row in self[name].rows if len(row) > 1 and row[0][:1] not in ("+", "-", "#")}
            - self[of].ids.keys()
            for name, of in (("shadow", "passwd"), ("gshadow", "group"))
        }

    def delete_groups(self, names: Container[str]) -> None:
        for name in ("group", "gshadow"):
            self[name].rows = [row for row in self[name].rows if row[0] not in names]

    def rename_user(self, old: str, new: str) -> None:
        for name in ("passwd", "shadow", "subuid", "subgid"):
            for row in self[name].rows:
                row[0] = new if row[0] == old else row[0]
        for row, column in self.members():
            row[column] = ",".join(new if member == old else member for member in row[column].split(","))

    def rename_group(self, old: str, new: str) -> None:
        for name in ("group", "gshadow"):
            for row in self[name].rows:
                row[0] = new if row[0] == old else row[0]

    def write(self, like: Path | None = None) -> list[str]:
        """Write what was changed; returns the names of those files. New ones have owner and mode of those in `like`."""
        changed = [name for name, file in self.files.items() if str(file) != self.before[name]]
        for name in changed:
            if like and not os.path.lexists(self.etc / name) and size_of(like / name) >= 0:
                copy_file(like / name, self.etc / name)
            rewrite(self.etc / name, str(self.files[name]))
        return changed


class PeopleMerge:
    """Brings the people of the running system into the /etc of a snapshot or deployment.

    These are the accounts of the login range with their groups, passwords and ranges of ids, and root's password. The
    running system decides who there is, and with which ids; an account that exists only in the target stays, if need be
    with other ids. The constructor decides everything, and records ids in `ids`; write() changes the target.

    Args:
        base: the /etc from which the running one comes: who is missing since then was deleted.
        strict: raise AshError (REFUSED) if it is unknown whose files are in a home; otherwise they keep their owner.
        brought: the /etc that was carried into the running deployment: its people are not in the base.

    If the account files of the running system are damaged, it does nothing, and `damage` says why.
    """

    def __init__(
        self,
        base: Path,
        running: Path,
        target: Path,
        ids: AccountIds,
        *,
        strict: bool = True,
        brought: Iterable[Path] = (),
    ) -> None:
        self.base, self.running, self.own = Accounts(base), Accounts(running), Accounts(target)
        self.ids = ids
        self.strict = strict
        self.names: list[str] = []  # of people who are not in the target as they were
        self.notes: list[str] = []
        self.people: dict[str, int] = {}
        self.users: dict[int, int] = {}  # of the target: new ids by old ones
        self.groups: dict[int, int] = {}
        self.renumbered: dict[
            str, dict[str, int]
        ] = {}  # for each of ID_FILES, the new ids of the target's own accounts
        self.belongings: list[Belongings] = []
        self.missing: dict[str, list[str]] = {}  # groups that the target had not before the merge, and people in them
        self.settled: dict[str, set[str]] = {name: set() for name in ACCOUNT_FILES}  # not to be merged again
        self._former = {*self.own["passwd"].ids}  # users whom the target had
        self._users = self.own["passwd"].ids.keys() | self.base["passwd"].ids.keys() | self.running["passwd"].ids.keys()
        self._groups = self.own["group"].ids.keys() | self.base["group"].ids.keys() | self.running["group"].ids.keys()
        self.damage = self.running.damage(self.base)
        if self.damage:
            self.notes.append(f"no accounts were brought: {self.damage}")
            return
        for which, accounts in (("running system", self.running), ("snapshot", self.own)):
            if not accounts.is_usable():
                self.notes.append(f"no accounts were brought: those of the {which} are damaged, or in symlinks")
                return
        ids.learn_machine(running, base, *brought)
        self.people = self.running["passwd"].people
        before = {user: self._facts(user) for user in self.own["passwd"].people}
        self._rename()
        self._former = {*self.own["passwd"].ids}
        self._delete()
        self._renumber()
        self._bring_groups()
        self._bring_users()
        self._bring_members()
        self._settle(self.people, self.running["group"].people)
        every = sorted({*before, *self.people})
        self.names = [user for user in every if before.get(user, self._facts("")) != self._facts(user)]

    def write(self) -> list[str]:
        """Write the account files of the target; returns the names of those that are not as they were."""
        return self.own.write(like=self.running.etc)

    def prune(self, merge: EtcMerge) -> None:
        """Delete rows and memberships of accounts that the merge of /etc has left out from its target.

        So are accounts that it brought, but whose group it left out, if the target has another one with that id. Notes
        the groups that are still missing.
        """
        accounts = Accounts(merge.target)
        if accounts.is_usable():
            strangers = {row[0] for row in accounts["passwd"].rows if self._is_in_foreign_group(row, accounts["group"])}
            accounts.delete_users((self._users - accounts["passwd"].ids.keys()) | strangers)
            accounts.delete_groups(self._groups - accounts["group"].ids.keys())
            accounts.write()
            for group in [name for name, users in self.missing.items() if users and not accounts["group"].row(name)]:
                what = f"the snapshot has no group {group}, so {listed(self.missing[group])} cannot be in it"
                self.notes.append(what)
            if strangers and "passwd" not in merge.in_conflict:
                merge.set_aside("passwd")

    def _is_in_foreign_group(self, row: Sequence[str], groups: AccountFile) -> bool:
        """Whether a row of passwd that only the running system had names a group that is another one there."""
        if row[0] not in self.running["passwd"].ids or row[0] in self._former or row[0] in self.people:
            return False
        gid = to_number("".join(row[3:4]))
        there, here = (
            {name for name, its in file.ids.items() if its == gid} for file in (self.running["group"], groups)
        )
        return bool(here) and bool(there) and there.isdisjoint(here)

    def _facts(self, user: str) -> list[list[str]]:
        """What is known of a user, to compare: rows, and the groups that list him."""
        rows = [self.own[name].row(user) or [] for name in ("passwd", "shadow", "subuid", "subgid")]
        return [*map(list, rows), [row[0] for row in self.own["group"].rows if user in ",".join(row[3:4]).split(",")]]

    def _settle(self, users: Iterable[str] = (), groups: Iterable[str] = ()) -> None:
        for name, settled in self.settled.items():
            settled.update(groups if name in MEMBER_COLUMNS else users)

    def _rename(self) -> None:
        """Give users who were renamed on one side the same name on both: the one that was given later."""
        now, own, later = self.running["passwd"], self.own["passwd"], dict[str, str]()
        ours, theirs = self.running["shadow"].passwords, self.own["shadow"].passwords
        for theirs_name, ours_name in itertools.product(own.people.keys() - now.ids.keys(), [*self.people]):
            passwords = theirs.get(theirs_name, ""), ours.get(ours_name, "")
            if ours_name in own.ids:
                continue
            if is_renamed(own.row(theirs_name) or [], now.row(ours_name) or [], *passwords):
                self._settle([theirs_name, ours_name])
                if self.ids.renamed.get(ours_name) == theirs_name and theirs_name not in self.base["passwd"].ids:
                    self.running.rename_user(ours_name, theirs_name)
                    self.base.rename_user(ours_name, theirs_name)
                    self.people[theirs_name] = self.people.pop(ours_name)
                    later[ours_name] = theirs_name
                else:
                    self.own.rename_user(theirs_name, ours_name)
        primary = {row[3] for row in own.rows if len(row) > 3 and row[0] in self.people}
        for group, gid in self.running["group"].people.items():
            olds = [old for old, its in self.own["group"].ids.items() if its == gid and str(gid) in primary]
            if group not in self.own["group"].ids and olds and olds[0] not in self.running["group"].ids:
                self._settle(groups=[group, olds[0]])
                if later.get(group) == olds[0]:
                    self.running.rename_group(group, olds[0])
                    self.base.rename_group(group, olds[0])
                else:
                    self.own.rename_group(olds[0], group)

    def _delete(self) -> None:
        """Delete from the target who was deleted in the running system, now or before an earlier boot."""
        users, groups = (
            ((self.ids.deleted[name] & self.own[name].people.keys()) | self.base[name].people.keys())
            - self.running[name].ids.keys()
            for name in ("passwd", "group")
        )
        self.own.delete_users(users)
        used = {to_number(row[3]) for row in self.own["passwd"].rows if len(row) > 3}
        groups -= {group for group, gid in self.own["group"].ids.items() if gid in used}
        self.own.delete_groups(groups)
        self._settle(users, groups)

    def _renumber(self) -> None:
        """Give accounts of the target the ids that they have in the running system, or others than people there."""
        gone = {name: self.base[name].ids.keys() - self.running[name].ids.keys() for name in ID_FILES}
        own = {name: {a: i for a, i in self.own[name].ids.items() if a not in gone[name]} for name in ID_FILES}
        known = {name: dict(self.ids.given[name]) for name in ID_FILES}
        new = {
            name: new_ids(name, own[name], self.running[name].ids, known[name], self._newcomers(name))
            for name in ("passwd", "group")
        }
        self.users, self.groups = (
            {own[name][account]: number for account, number in new[name].items()} for name in ("passwd", "group")
        )
        for name, numbers in new.items():
            for account, number in numbers.items():
                if row := self.own[name].row(account):
                    row[2] = str(number)
        for row in self.own["passwd"].rows:
            row[3:4] = [str(self.groups.get(to_number(gid) or 0, gid)) for gid in row[3:4]]
        new |= {name: self._new_ranges(name) for name in ("subuid", "subgid")}
        self.renumbered = new
        moves = dict[str, dict[str, dict[int, int]]]()  # on the shared volumes, for accounts of the target alone
        for name, numbers in new.items():
            here = numbers.keys() - self.running["group" if name == "group" else "passwd"].ids.keys()
            olds = {a: {own[name][a], known[name].get(a, own[name][a])} - {numbers[a]} for a in here}
            moves[name] = {account: dict.fromkeys(olds[account], numbers[account]) for account in here}
            self.ids.given[name].update({account: numbers[account] for account in here})
            self._settle(*([(), here] if name == "group" else [here]))
        groups = {old: number for move in moves["group"].values() for old, number in move.items()}
        for user in sorted({*moves["passwd"], *moves["subuid"], *moves["subgid"]}):
            uids, row = moves["passwd"].get(user, {}), self.own["passwd"].row(user) or []
            home = self._home_apart(user, row, uids)
            for old, number in uids.items():
                if old == own["passwd"][user]:
                    self.notes.append(f"{user} of the snapshot has the uid {number}, since {old} is taken")
            ranges = (moves[name].get(user, {}) for name in ("subuid", "subgid"))
            self.belongings.append(Belongings(user, home, uids, groups, *ranges))

    def _newcomers(self, name: str) -> set[str]:
        """The accounts made in the running system that get their ids in the target even if others have them there.

        A group alone does not: what it owns on the shared volumes is not known, as that of users is by their homes.
        """
        found, own = {file: self.running[file].ids.keys() - self.base[file].ids.keys() for file in ID_FILES}, self.own
        users = found["passwd"] - own["passwd"].ids.keys()
        if name == "passwd":
            return users
        pairs = {(row[2], row[3]) for row in own["passwd"].rows if len(row) > 3}
        ids, gids = self.running["passwd"].ids, self.running["group"].ids
        both = (users & found["group"]) - own["group"].ids.keys()
        return {account for account in both if (str(ids[account]), str(gids[account])) in pairs}

    def _new_ranges(self, name: str) -> dict[str, int]:
        """Move the ranges of ids of the target's own users away from those of people of the running system."""
        found: dict[str, int] = {}
        taken = [start for user, start in self.running[name].ids.items() if user in self.people]
        for user in self.own["passwd"].people.keys() - self.running["passwd"].ids.keys():
            row = self.own[name].row(user) or []
            start = self.own[name].id_of(row)
            if start is None:
                continue
            new = self.ids.given[name].get(user, start)
            if any(abs(new - other) < SUBORDINATES for other in taken):
                every = [*self.ids.given[name].values(), *self.own[name].ids.values(), *taken]
                places = itertools.count(start, SUBORDINATES)
                new = next(place for place in places if all(abs(place - other) >= SUBORDINATES for other in every))
            if new != start:
                row[1], found[user] = str(new), new
        return found

    def _home_apart(self, user: str, row: Sequence[str], olds: Container[int]) -> str:
        """The home of a user who gets another uid; empty if somebody with the old one may have files in it."""
        home = home_of(row)
        new = {user: self.running["passwd"].ids[user] for user in self._newcomers("passwd")}
        for other, uid in {**self.people, **new}.items():
            its = home_of(self.running["passwd"].row(other) or [])
            if uid in olds and home and its and (f"{home}/".startswith(f"{its}/") or f"{its}/".startswith(f"{home}/")):
                what = f"{user} of the snapshot and {other} of the running system have the same uid {uid}"
                if self.strict:
                    hint = "ash cannot tell whose files are whose: usermod --uid for one of them"
                    raise AshError(f"{what}, and homes that are not apart: {home}, {its}", hint, REFUSED)
                self.notes.append(f"{what}: files in {home} keep their owner")
                return ""
        return home

    def _bring_groups(self) -> None:
        """Bring the groups of the login range, and others that are the primary group of somebody, without members."""
        primary = {row[3] for row in self.running["passwd"].rows if len(row) > 3 and row[0] in self.people}
        people, own, there = self.running["group"].people, self.own["group"].ids, self.running["group"].ids
        for group, gid in there.items():
            if group in people or (str(gid) in primary and group not in own):
                new = gid
                if group not in people and gid in own.values():
                    new = free_id("group", gid, {*own.values(), *there.values(), *self.ids.given["group"].values()})
                    own[group] = new
                    self._settle(groups=[group])
                    self.notes.append(f"the group {group} has the gid {new} in the snapshot, since {gid} is taken")
                for name, columns in MEMBER_COLUMNS.items():
                    was, now, theirs = (side[name].row(group) for side in (self.base, self.running, self.own))
                    if now is not None:
                        row = merge_person(was, now, theirs, {1})
                        row[2:3] = [str(new)] if name == "group" else row[2:3]
                        for column in [c for c in columns if c < len(row)]:
                            row[column] = theirs[column] if theirs and column < len(theirs) else ""
                        self.own[name].put(group, row)

    def _bring_users(self) -> None:
        """Bring rows of people, whose primary group may have another gid in the target, and root's password."""
        names = {gid: group for group, gid in reversed(self.running["group"].ids.items())}
        for user in ("root", *self.people):
            was, now, theirs = (side["shadow"].row(user) for side in (self.base, self.running, self.own))
            if now is not None:
                self.own["shadow"].put(user, merge_shadow(was, now, theirs))
        self.settled["shadow"].add("root")
        for user in self.people:
            was, now, theirs = (side["passwd"].row(user) for side in (self.base, self.running, self.own))
            if now is None:
                continue
            row = merge_person(was, now, theirs, {4, 6})
            if len(row) > 3:
                gid = to_number(row[3])
                row[3] = str(self.own["group"].ids.get(names.get(gid, ""), gid)) if gid is not None else row[3]
            self.own["passwd"].put(user, row)
            for name in ("subuid", "subgid"):
                rows = [[*r] for r in self.running[name].rows if r[0] == user]
                if rows or self.base[name].row(user):
                    self.own[name].put(user, *rows)

    def _bring_members(self) -> None:
        """Merge the members of groups: people are in those of the running system, if they exist."""
        for name, columns in MEMBER_COLUMNS.items():
            for now in self.running[name].rows:
                was, theirs = (side[name].row(now[0]) for side in (self.base, self.own))
                if theirs is None and name == "group":
                    self.missing[now[0]] = [user for user in ",".join(now[3:4]).split(",") if user in self.people]
                for column in [c for c in sorted(columns) if theirs and c < len(theirs) and c < len(now)]:
                    for user in self._merge_members(was, now, theirs or [], column):
                        if name == "group":
                            self.notes.append(f"{user} is still in the group {now[0]}, as in the snapshot")

    def _merge_members(
        self, was: Sequence[str] | None, now: Sequence[str], theirs: list[str], column: int
    ) -> list[str]:
        """Merge a field of members, in the target's row; returns the people who are members in the target alone."""
        before, live, own = (row[column].split(",") if row and column < len(row) else [] for row in (was, now, theirs))
        kept = [
            user
            for user in own
            if user in live or not (user in before or (user in self.people and user not in self._former))
        ]
        added = [user for user in live if user not in own and (user in self.people or user not in before)]
        theirs[column] = ",".join(dict.fromkeys(filter(None, [*kept, *added])))
        return [user for user in kept if user in self.people and user not in live]

    def renumbering(self) -> Renumbering:
        """The new ids alone, for a target that is to have only those of its own accounts."""
        return Renumbering(self.renumbered, {"passwd": self.users, "group": self.groups})

    def clashes(self) -> list[str]:
        """Sentences about accounts of the target with an id that somebody else has in the running system."""
        found = []
        for name, numbers in self.renumbered.items():
            old, now = AccountFile.read(self.own.etc / name).ids, self.running[name].ids
            owners = {number: account for account, number in reversed(now.items())}
            found += [
                f"{account} has the id {old[account]} in {name}, as {owners[old[account]]} in the running system"
                for account in numbers.keys() - now.keys()
                if old.get(account) in owners
            ]
        return sorted(found)

    def lacking_shells(self, root: Path) -> list[str]:
        """Sentences about people whose shell a root does not have."""
        rows = [self.own["passwd"].row(user) or [] for user in (self.people if self.names else ())]
        lacking = [row for row in rows if len(row) > 6 and row[6] and not path_inside(root, row[6]).exists()]
        return [f"the snapshot has no {row[6]}, the shell of {row[0]}" for row in lacking]


def bring_people(
    layout: Layout,
    merge: EtcMerge,
    where: int | str,
    homes: Mapping[str, Path],
    *,
    wait: float,
    strict: bool = True,
    fresh: bool = False,
) -> PeopleMerge:
    """Bring the people of the running system into the target of a merge of /etc, before that takes place.

    What has to be re-owned outside of the target is recorded as NewOwners; `where` is the slot or snapshot that gets
    the target's root or, unless that is called etc, the target. If such a root is new it is re-owned at once.

    With `strict`, AshError (REFUSED) if an account has to get another uid, and it is unknown which files are its own;
    and, unless nothing is merged (`fresh`), if the running system's account files are damaged. Otherwise the merge
    leaves these alone.
    """
    with state_lock(layout, wait):
        ids = AccountIds.load(layout.ids)
        people = PeopleMerge(merge.base, merge.running, merge.target, ids, strict=strict, brought=merge.brought)
        write_file(layout.ids, ids.dump())
    if people.damage and strict and not fresh:
        hint = "accounts would be lost: correct it, or restore it from the backup beside it, whose name ends in -"
        raise AshError(people.damage, hint, REFUSED)
    merge.unusable = ACCOUNT_FILES if people.damage else ()
    merge.carried += people.write()
    merge.settled = people.settled
    etc, root, files = merge.target, merge.target.parent, list[Moved]()
    if people.users or people.groups:
        with nosymfollow(root):
            if etc.name == "etc":
                re_own({root: None}, people.users, people.groups)
            else:
                files = files_of(root, people.users, people.groups, but={"etc", etc.name})
                re_own({etc: None}, people.users, people.groups)
    save_new_owners(layout, where, etc, files=files, belongings=people.belongings, homes=homes)
    return people


# --- The boot menu: deployments, and the grub.cfg that boots them ----------------------------------------------


def make_bootable(layout: Layout, distro: Distro, root: Path, which: int | str, uuid: str) -> None:
    """Put into a writable root what it needs to boot, and to contain ash, as the snapshot or slot `which`."""
    require_directories(root)
    for name in MOUNT_POINTS:
        path_inside(root, name).mkdir(parents=True, exist_ok=True)
    old = read_text(path_inside(root, "etc/fstab"))
    write_inside(root, "etc/fstab", render_fstab(layout, uuid, which, old, is_mutable(root)))
    link = place_inside(root, distro.executable)
    remove_tree(link, protected=True)
    with unprotected(link.parent):
        link.symlink_to("/.snapshots/ash/ash")
    old_name = link.with_name("ast")  # astOS's command
    if not os.path.lexists(old_name):
        old_name.symlink_to(link.name)
    for init in INIT_SYSTEMS:
        init.install_units(root, distro.executable)
    mark_variant(root)


DEPLOYMENT_SHAPE = {
    "slot": is_text, "id": is_name, "snapshot": is_u32, "source": is_u32, "name": is_text, "inputs": is_text,
    "config": BOOT_CONFIG_SHAPE, "mutable?": bool, "initramfs?": is_text, "own_etc?": is_text,
    "only_saved?": [is_text],
    "etc_from?": is_text, "etc_state?": is_text, "fresh_etc?": bool,
    "carried?": [is_text], "conflicts?": [is_text], "conflicts_folder?": is_text, "without_effect?": [is_text],
    "people?": [is_text], "notes?": [is_text], "unmade?": [is_text], "tries?": is_u32, "minutes?": is_u32,
}  # fmt: skip


class Deployment(NamedTuple):
    """A bootable writable clone of a snapshot, in a slot."""

    slot: str
    id: str
    snapshot: int
    source: int  # subvolume id of the snapshot when it was deployed
    name: str  # the distribution's, for the menu
    inputs: str  # boot_inputs() when `config` was made
    config: BootConfig
    mutable: bool = False
    etc_from: str = ""  # the slot whose changes to /etc were carried over
    etc_state: str = ""  # etc_state() of that /etc when they were
    fresh_etc: bool = False  # they were not, but set aside
    carried: Sequence[str] = ()
    conflicts: Sequence[str] = ()
    conflicts_folder: str = ""
    without_effect: Sequence[str] = ()  # changes of the running /etc that a deployment cannot have
    initramfs: str = ""  # initramfs_inputs() of its initramfs; empty if that is the snapshot's own
    only_saved: Sequence[str] = ()  # what other snapshots have from the running /etc, and this deployment has not
    own_etc: str = ""  # etc_state() of its own /etc when it was made, or carried to
    people: Sequence[str] = ()  # whose accounts are as in the running system, and were not in the snapshot
    notes: Sequence[str] = ()  # on accounts
    unmade: Sequence[str] = ()  # paths that were carried; what is made from them is not made yet
    tries: int = 0  # how often GRUB may start it before it is known to be good; 0 if it is, or GRUB does not count
    minutes: int = 0  # how long each of these starts may take
    boots: bool = False  # it has shown that it does, as `ash bless` noted

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Deployment:
        """A deployment from what dump() made of it."""
        config = BootConfig(**fields_of(BootConfig, data["config"]))
        return cls(**{**fields_of(cls, data), "config": config})

    def dump(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**self._asdict(), "config": self.config._asdict()}

    @property
    def entry(self) -> str:
        """The id of its menu entry. Not just the hexadecimal id: GRUB reads "1d2e" as a number, the second entry."""
        return f"ash-{self.id}"

    @property
    def note(self) -> str:
        """The text of the file in its root that says which one it is; a boot copies it to `ash/booted`."""
        return json.dumps({"slot": self.slot, "id": self.id}) + "\n"

    def has_changes_of(self, slot: str, state: str) -> bool:
        """Whether the changes to the /etc of a slot, of which `state` is the etc_state(), were carried over."""
        return (self.etc_from, self.etc_state, self.fresh_etc) == (slot, state, False)


def write_menu_text(root: Path, config: BootConfig) -> None:
    """Keep what a deployment's mkconfig printed around the entries in the deployment; only root can read it there."""
    text = json.dumps({"header": list(config.header), "foreign": config.foreign})
    with replace(place_inside(root, IN_ROOT_MENU), durable=True) as new:
        new.touch(mode=0o600)
        write_text(new, text)


def menu_text(root: Path) -> BootConfig | None:
    """What write_menu_text() kept in a deployment; None if an older ash made it."""
    try:
        text = from_json(read_text(place_inside(root, IN_ROOT_MENU)), MENU_TEXT_SHAPE)
    except ValueError:
        return None
    return BootConfig("", (), "", header=text["header"], foreign=text["foreign"])


def lacks_menu_text(layout: Layout, deployment: Deployment) -> bool:
    """Whether the menu_text() of a deployment is lost; an older ash did not write one, nor `own_etc`."""
    root = layout.rootfs(deployment.slot)
    return bool(deployment.own_etc) and is_subvolume(root) and menu_text(root) is None


BOOT_ROOM = 4 << 20  # bytes that stay free on the partition for /boot, for grub.cfg


class BootPartition:
    """The partition for GRUB's files, with copies of the deployments' kernels: GRUB need not read the root's disk.

    Without one, GRUB loads each kernel from its deployment, and all this does nothing. A copy has a name of its own for
    each version of a file, so that none is ever replaced while a menu names it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.uuid = layout.boot_uuid

    def _name(self, deployment: Deployment, root: Path, name: str) -> str:
        status = status_of(path_inside(root, f"boot/{name}"))
        return f"{deployment.id}-{status.st_mtime_ns if status else 0:x}-{name}"

    def place(self, deployment: Deployment) -> KernelPlace | None:
        """Where GRUB finds a deployment's kernel; None if that is in the deployment."""
        if not self.uuid:
            return None
        root, config = self.layout.rootfs(deployment.slot), deployment.config
        kernel, *initrds = (self._name(deployment, root, name) for name in (config.kernel, *config.initrds))
        return KernelPlace(self.uuid, self.layout.grub_kernels, kernel, initrds)

    def copies(self, deployment: Deployment, root: Path | None = None) -> dict[Path, Path]:
        """The files that GRUB needs for a deployment, by their copies; empty if there is no partition.

        Args:
            root: of the deployment, if it is not in its slot yet.
        """
        root, config = root or self.layout.rootfs(deployment.slot), deployment.config
        names = (config.kernel, *config.initrds) if self.uuid and is_directory(root) else ()
        own = {self._name(deployment, root, name): path_inside(root, f"boot/{name}") for name in names}
        return {self.layout.kernels / name: path for name, path in own.items() if path.is_file()}

    def lacks(self, deployments: Iterable[Deployment]) -> bool:
        """Whether a file that these deployments start with has no copy."""
        return not all(copy.exists() for one in deployments for copy in self.copies(one))

    def damaged(self, deployment: Deployment) -> list[Path]:
        """The copies for a deployment that are missing, or not what the deployment has."""
        copies = self.copies(deployment)
        return [copy for copy, path in copies.items() if size_of(copy) < 0 or not same_content(copy, path)]

    def renew(self, deployment: Deployment) -> None:
        """Make the damaged() copies again."""
        for copy in self.damaged(deployment):
            remove_tree(copy)
        self.add(deployment)

    def add(self, deployment: Deployment, root: Path | None = None) -> None:
        """Copy what is missing of a deployment, durably. AshError (REFUSED) if there is no room."""
        missing = {copy: path for copy, path in self.copies(deployment, root).items() if not copy.exists()}
        if not missing:
            return
        self.layout.kernels.mkdir(mode=0o700, exist_ok=True)
        needed, free = sum(path.stat().st_size for path in missing.values()), free_space(self.layout.kernels)
        if needed + BOOT_ROOM > free:
            room = f"{needed / 2**20:.0f} MiB are needed, and {free / 2**20:.0f} are free"
            what = f"the partition for /boot has no room for the kernel of snapshot {deployment.snapshot}: {room}"
            raise AshError(what, "take a deployment out of the menu: ash deploy N --no-secondary", REFUSED)
        for copy, path in missing.items():
            about_to(f"copy {path.name} for GRUB")
            with replace(copy, token=copy.name, durable=True) as new:
                copy_file(path, new)
        sync_filesystem(self.layout.kernels)

    def remove_others(self, deployments: Iterable[Deployment]) -> None:
        """Delete the copies that none of these deployments starts with."""
        if self.uuid and self.layout.kernels.is_dir():
            wanted = {copy for one in deployments for copy in self.copies(one)}
            for copy in sorted({*self.layout.kernels.iterdir()} - wanted):
                remove_tree(copy)


class Menu:
    """The deployments in the boot menu; grub.cfg is rendered from this and nothing else."""

    SHAPE: ClassVar = {
        "default": is_text, "last_booted": is_text, "good?": is_text, "once?": is_text,
        "deployments": {"*": DEPLOYMENT_SHAPE},
    }  # fmt: skip

    def __init__(
        self,
        default: str = "",
        last_booted: str = "",
        deployments: Mapping[str, Deployment] | None = None,
        *,
        good: str = "",
        once: str = "",
    ) -> None:
        self.default = default  # slots
        self.last_booted = last_booted
        self.good = good  # the newest one that is known to boot
        self.once = once  # that the next start is for, if GRUB's notes say so too
        self.deployments = dict(deployments or {})

    @property
    def last_good(self) -> str:
        """The slot that counts as running on a disk that is not: the last booted, or the default if none was yet."""
        return self.last_booted or self.default

    @property
    def fallback(self) -> Deployment | None:
        """The newest deployment that is known to boot, or may be: the last booted one."""
        return self.deployments.get(self.good) or self.deployments.get(self.last_booted)

    @property
    def on_trial(self) -> Deployment | None:
        """The default, if GRUB counts its starts: it is not known to boot yet, and there is another one."""
        default, fallback = self.deployments.get(self.default), self.fallback
        return default if default and default.tries and fallback and fallback is not default else None

    @classmethod
    def load(cls, path: Path) -> Menu:
        """Load the menu file, a missing one as an empty menu; AshError if it is damaged."""
        if not path.exists():
            return cls()
        try:
            data = from_json(read_text(path), cls.SHAPE)
            deployments = {slot: Deployment.load(entry) for slot, entry in data["deployments"].items()}
            slots = {*SLOTS, *SECONDARY_SLOTS}
            misplaced = [slot for slot, there in deployments.items() if slot != there.slot or slot not in slots]
            if misplaced or data["last_booted"] not in ("", *slots):
                raise ValueError("it names slots that do not exist")
            keys = ("default", "last_booted", "good", "once")
            default, last, good, once = (data[key] if data.get(key) in deployments else "" for key in keys)
            return cls(default, last, deployments, good=good, once=once)
        except ValueError:
            raise AshError(f"the menu file {path} is damaged", "ash fsck --repair rebuilds it") from None

    def dump(self) -> str:
        """The text of the menu file."""
        entries = {slot: deployment.dump() for slot, deployment in self.deployments.items()}
        slots = {"default": self.default, "last_booted": self.last_booted, "good": self.good, "once": self.once}
        return json.dumps({**slots, "deployments": entries}) + "\n"

    def slots_of(self, snapshot: int) -> list[str]:
        """The slots with deployments of a snapshot; AshError (REFUSED) if there are none."""
        slots = [slot for slot, deployment in self.deployments.items() if deployment.snapshot == snapshot]
        if not slots:
            raise AshError(f"snapshot {snapshot} is not deployed", f"ash deploy {snapshot}", REFUSED)
        return slots

    def take_out(self, slot: str) -> bool:
        """Remove the deployment in a slot, if there is one; nothing more is carried from this slot into the others."""
        is_there = slot in self.deployments
        for one in [one for one in self.deployments.values() if one.etc_from == slot]:
            self.deployments[one.slot] = one._replace(etc_from="")
        self.deployments.pop(slot, None)
        self.good, self.once = ("" if one == slot else one for one in (self.good, self.once))
        return is_there

    def render(self, layout: Layout, uuid: str, describe: Callable[[int], str], notes: GrubNotes) -> str:
        """The text of grub.cfg."""
        default, partition = self.deployments[self.default], BootPartition(layout)
        last = self.deployments.get(self.last_booted)
        others = [d for slot, d in self.deployments.items() if slot in SECONDARY_SLOTS]
        # It is in the deployment, since all can read the menu file. If it is missing, an older ash made that.
        text = menu_text(layout.rootfs(self.default)) or default.config
        made_in, here = MADE_IN, f"/snapshot-{self.default}/"
        header, foreign = "\n".join(text.header).replace(made_in, here), text.foreign.replace(made_in, here)
        counts, proof = notes.counts, grub_proof(notes.block.for_grub)
        trial, once = (self.on_trial, self.deployments.get(self.once)) if counts else (None, None)
        good = self.fallback or default
        marks = [(default, "")]
        marks += [(last, " (last booted deployment)")] if last and last is not default else []
        marks += [(good, " (last good deployment)")] if good not in (default, last) else []
        marks += [(other, " (secondary)") for other in others if other not in [one for one, _ in marks]]
        # What was changed as it ran is nowhere else.
        changed = [one for one in self.deployments.values() if one.mutable and one not in [other for other, _ in marks]]
        marks += [(one, " (earlier deployment)") for one in changed]
        entries = []
        for one, mark in marks:
            title = f"{one.name}, snapshot {one.snapshot}: {describe(one.snapshot)}{mark}"
            # The default's settings say which users there are, so its options say who may start an entry. What starts
            # by itself asks for no password.
            classes = default.config.classes
            is_free = one in (default, good, once) and "--unrestricted" not in classes.split()
            options = filter(None, [classes, "--unrestricted" if is_free else ""])
            start = ["menuentry", grub_title(title), "--id", one.entry, *options, "{"]
            commands = self._commands(one, partition, uuid, trial, once)
            entries.append("\n".join([" ".join(start), *commands, "}"]))
        other = good if good is not default else last or default
        # For this GRUB takes no id, but only positions in the menu.
        place = len(re.findall(MENU_ENTRY, header)) + [one for one, _ in marks].index(other)
        lines = [
            "# Made by ash at every deploy. To change it: ash chroot N, edit /etc/default/grub, ash deploy N.",
            *(map(usable_in_header, lines_of(header)) if text is default.config else [header]),
            f'set default_id="{default.entry}"',
            f'set fallback_id="{other.entry}"',
            'set default="$default_id"',
            f'set fallback="{place}"',
            *grub_preamble(uuid),
            *(proof if not notes.efi.uuid and notes.block.is_asked_for else []),
            *grub_choice(
                grub_once(notes.place, once.entry, once.minutes) if once else [],
                grub_countdown(notes.place, trial.entry, trial.id, trial.tries, trial.minutes) if trial else [],
            ),
            "set gfxpayload=keep",
        ]
        return "\n".join([*lines, *entries, *grub_submenus(layout, uuid), foreign, ""])

    @staticmethod
    def _commands(
        deployment: Deployment, partition: BootPartition, uuid: str, trial: Deployment | None, once: Deployment | None
    ) -> list[str]:
        """What GRUB does to start a deployment, while one is on trial, or one is to be started once."""
        name = partition.layout.rootfs_name(deployment.slot)
        own = f"{'rw' if deployment.mutable else 'ro'} {DEPLOYMENT}={deployment.id}"
        chosen = [("$ash_trial" if deployment is trial else "$ash_fellback") if trial else ""]
        chosen += ["$ash_once" if deployment is once else ""]
        last = " ".join(filter(None, chosen))
        return [
            # If it cannot be loaded, GRUB goes on with the fallback.
            *([f'    set ash_fellback="{FELL_BACK}={trial.id}"'] if trial and deployment is trial else []),
            *grub_start(name, uuid, deployment.config, own, last, place=partition.place(deployment)),
        ]


# --- Slots: which deployment is where --------------------------------------------------------------------------


def root_uuid(layout: Layout) -> str:
    uuid = read_text(layout.part).strip()
    if not re.fullmatch("[0-9A-Fa-f-]+", uuid):
        raise AshError(f"{layout.part} must contain the UUID of the root file system", "blkid")
    return uuid


def snapshot_of_slot(layout: Layout, slot: str) -> int:
    """The number of the snapshot that a slot's deployment was made from; AshError if it does not say."""
    number = to_number(read_text(path_inside(layout.rootfs(slot), IN_ROOT_SNAP)))
    if number is None:
        raise AshError(f"slot {slot} does not say which snapshot it was made from", "ash deploy N, then reboot")
    return number


BOOTED_SHAPE = {"slot": lambda slot: slot in (*SLOTS, *SECONDARY_SLOTS), "id": is_name}


def slot_and_id(path: Path) -> tuple[str, str]:
    """The slot and the id of a deployment, from its own file or the note of a boot; empty if the file is not valid."""
    with contextlib.suppress(AshError, ValueError):
        note = from_json(read_text(path), BOOTED_SHAPE)
        return note["slot"], note["id"]
    return "", ""


def own_slot_and_id(layout: Layout, slot: str) -> tuple[str, str]:
    """What the deployment in a slot says of itself; empty if there is none, or an older ash made it."""
    root = layout.rootfs(slot)
    return slot_and_id(place_inside(root, IN_ROOT_ID)) if is_subvolume(root) else ("", "")


def noted_slot(layout: Layout) -> str:
    """The slot that was booted last, as the boot noted; empty if it did not, or another deployment is there now."""
    slot, ident = slot_and_id(layout.booted)
    return slot if slot and own_slot_and_id(layout, slot) == (slot, ident) else ""


def unconfigured(layout: Layout, root: Path, slot: str, ident: str, snapshot: int) -> Deployment:
    """A deployment of which it is not known yet how it boots, nor of which state of the snapshot it is."""
    name = os_release(root, "NAME") or layout.distro
    return Deployment(slot, ident, snapshot, 0, name, "", BootConfig("", [], ""), is_mutable(root))


def require_known_deployments(layout: Layout, menu: Menu) -> None:
    """Raise AshError (REFUSED) if the menu file is empty, and there are deployments: none would be in the boot menu."""
    if not menu.deployments and any(is_subvolume(layout.rootfs(slot)) for slot in SLOTS):
        raise AshError("the menu file has none of the deployments that exist", "ash fsck --repair adds them", REFUSED)


def unfinished_deployments(layout: Layout) -> list[Path]:
    """Unfinished deployments, and merged /etcs that were not put in place."""
    kinds = (layout.rootfs, layout.etc, layout.carried)
    slots = (*SLOTS, *SECONDARY_SLOTS)
    new = [directory(f"new-{slot}") for slot in slots for directory in kinds]
    merged = [temporary_name(layout.rootfs(slot) / "etc") for slot in slots]
    private = layout.work("deploy") / "private"  # /var, where an initramfs was made
    return [path for path in (*new, *merged, private) if os.path.lexists(path)]


# --- What only one deployment has ------------------------------------------------------------------------------


def is_elsewhere(path: str, base: Path, etc: Path, other: Path) -> bool:
    """Whether a change of a path in an /etc, since its base, is in another /etc too."""
    if is_same(etc / path, other / path):
        return True
    if path == "fstab":
        was, now, theirs = (set(fstab_of_user(read_text(one / path))) for one in (base, etc, other))
    elif path in ACCOUNT_FILES:
        was, now, theirs = (set(lines_of(read_text(one / path))) for one in (base, etc, other))
    else:
        return False
    return now - was <= theirs and not (was - now) & theirs


def has_saved(path: str, etc: Path, other: Path) -> bool:
    """Whether another /etc has a path as one has it; of fstab, whether it has the user's lines."""
    if path == "fstab":
        now, theirs = (set(fstab_of_user(read_text(one / path))) for one in (etc, other))
        return now <= theirs
    return is_same(etc / path, other / path)


def lost_saves(layout: Layout, slot: str, others: Iterable[Path]) -> list[str]:
    """The paths that were saved from the /etc of a slot, and that no snapshot has any more, nor one of the other /etcs.

    An undo takes them out of a snapshot, and a deletion goes with them.
    """
    etc, snapshots = layout.rootfs(slot) / "etc", numbered(layout.snapshots / "rootfs", "snapshot-").values()
    saved, places = saved_paths(layout.rootfs(slot)), [*others, *(root / "etc" for root in snapshots)]
    return [path for path in saved if not any(has_saved(path, etc, place) for place in places)]


def unsaved_drift(layout: Layout, menu: Menu, slot: str, running: str) -> list[str]:
    """The changed paths in the /etc of a slot that runs no longer, as far as nothing else has the changes."""
    base, etc = layout.etc(slot), layout.rootfs(slot) / "etc"
    deployment = menu.deployments.get(slot)
    if not is_subvolume(base) or not is_directory(etc):
        return []
    state = etc_state(etc)
    # What it got from another deployment that is still there, nothing else.
    if deployment and deployment.own_etc == state and deployment.etc_from:
        return []
    others = [layout.rootfs(one) / "etc" for one in dict.fromkeys([running, *menu.deployments]) if one != slot]
    lost = lost_saves(layout, slot, others)
    if carried := [one for one in menu.deployments.values() if one.has_changes_of(slot, state)]:
        return [path for path in lost if all(path in one.only_saved for one in carried)]
    drift = [path for path in etc_drift(base, etc) if not re.fullmatch(IDENTITY, path)]
    only_there = [path for path in drift if not any(is_elsewhere(path, base, etc, other) for other in others)]
    return list(dict.fromkeys([*only_there, *lost]))


def undone_saves(layout: Layout, slot: str) -> list[str]:
    """The paths that were saved from the /etc of a slot into snapshots, of which none is known to have them now."""
    saved = saved_paths(layout.rootfs(slot)) if slot else []
    snapshots = numbered(layout.snapshots / "rootfs", "snapshot-").values() if saved else ()
    known = {path for root in snapshots for path in saved_paths(root)}
    return [path for path in saved if path not in known]


def only_in_deployments(layout: Layout, menu: Menu, running: str) -> list[dict[str, Any]]:
    """The changes of /etc that only one deployment has: of the running one, those that are not its drift."""
    rows = []
    for slot, one in sorted(menu.deployments.items()):
        is_running = slot == running
        if paths := undone_saves(layout, slot) if is_running else unsaved_drift(layout, menu, slot, running):
            rows.append({"slot": slot, "snapshot": one.snapshot, "paths": paths})
    return rows


def set_all_aside(merge: EtcMerge, more: Iterable[str]) -> None:
    """Set all changes of a merge aside but the machine's identity, and the running versions of these paths."""
    merge.identity = False
    merge.merge(fresh=True)
    for path in more:
        if path not in merge.drift and os.path.lexists(merge.running / path):
            merge.set_aside(path)


def changes_while_running(layout: Layout, deployment: Deployment) -> Iterator[str]:
    """The paths that were changed in a mutable deployment as it ran, and that its snapshot does not have."""
    root, own = layout.rootfs(deployment.slot), layout.rootfs(deployment.snapshot)
    made = status_of(place_inside(root, IN_ROOT_ID))  # the last thing that was written in it
    if not deployment.mutable or made is None:
        return
    versions = [own, layout.undo(deployment.snapshot)]
    source = next((one for one in versions if is_subvolume(one) and subvolume_id(one) == deployment.source), None)
    todo = [name for name in os.listdir(root) if name not in MOUNTED_OVER]
    while todo:
        path = todo.pop()
        status = status_of(root / path)
        own_files = (IN_ROOT_LIVE, IN_ROOT_SAVED, IN_ROOT_MENU)
        if status is None or path in own_files or path.endswith("/__pycache__"):
            continue
        if status.st_ctime_ns > made.st_ctime_ns and not is_same(root / path, own / path):
            yield path
            if not is_directory(own / path):
                continue
        if stat.S_ISDIR(status.st_mode):
            names = set(os.listdir(root / path))
            if status.st_ctime_ns > made.st_ctime_ns and is_directory(own / path):
                for removed in sorted(set(os.listdir(own / path)) - names):
                    # What only the snapshot has got since was never here; if that cannot be told, it may have been.
                    if source is None or os.path.lexists(source / path / removed):
                        yield f"{path}/{removed}"
            todo += [f"{path}/{name}" for name in names]


def subvolumes_with_data(etc: Path) -> list[str]:
    """The subvolumes in an /etc that are not empty, as paths in it: no copy and no snapshot has what is in them."""
    return sorted(str(path.relative_to(etc)) for path in nested_subvolumes(etc) if any(path.iterdir()))


def etc_to_replace(root: Path) -> Path:
    """The /etc of a root, to be replaced by a copy. Raises AshError (REFUSED) if it has subvolumes with data in it."""
    for path in subvolumes_with_data(root / "etc"):
        what = f"/etc/{one_line(path)} of {root.name} is a subvolume: nothing is carried over into that deployment"
        raise AshError(what, "start it, and move what is in there", REFUSED)
    return root / "etc"


def left_in_place(running: Path, root: Path) -> list[str]:
    """Sentences about what a new deployment does not have of the running one, though its /etc needs it."""
    said = [
        f"/etc/{one_line(path)} is a subvolume: it is not carried over, and stays in the running deployment"
        for path in subvolumes_with_data(running / "etc")
    ]
    lines = [line.split() for line in fstab_of_user(read_text(place_inside(root, "etc/fstab")))]
    for kind in dict.fromkeys(line[2] for line in lines if len(line) > 2 and is_name(line[2])):
        helpers = [f"{directory}/mount.{kind}" for directory in SYSTEM_PATH.split(":")]
        runs, is_there = (any(path_inside(one, path).exists() for path in helpers) for one in (running, root))
        said += [f"the snapshot has no mount.{kind}, for a line of fstab"] if runs and not is_there else []
    return said


def changes_in_slot(layout: Layout, menu: Menu, slot: str) -> Iterator[str]:
    """The paths in a slot, which is to be replaced, that would be lost, and are not drift."""
    deployment, etc = menu.deployments.get(slot), layout.rootfs(slot) / "etc"
    if deployment and is_directory(etc):
        yield from (f"etc/{inside}" for inside in subvolumes_with_data(etc))
        yield from changes_while_running(layout, deployment)


def loss_in_slot(layout: Layout, menu: Menu, slot: str) -> str:
    """A sentence about what is lost if a slot is replaced; empty if nothing is."""
    if not (paths := [f"/{path}" for path in changes_in_slot(layout, menu, slot)]):
        return ""
    snapshot = menu.deployments[slot].snapshot
    return f"the deployment of snapshot {snapshot} in {slot}, which was changed as it ran, is deleted: {counted(paths)}"


def require_unchanged(layout: Layout, menu: Menu, slot: str) -> None:
    """Raise AshError (REFUSED) if the deployment in a slot, which is to be deleted, was changed as it ran."""
    if paths := [*changes_in_slot(layout, menu, slot)]:
        path = paths[0]
        deployment = f"the deployment of snapshot {menu.deployments[slot].snapshot} in {slot}"
        if is_subvolume(layout.rootfs(slot) / path):
            what = f"{deployment} has a subvolume that no other one has: /{one_line(path)}"
            raise AshError(what, "start it, and move what is in there; --fresh deletes it", REFUSED)
        what = f"{deployment} is mutable, and was changed: /{counted(paths, 1)}"
        raise AshError(what, "start it: ash rollback keeps it as a snapshot; --fresh deletes it", REFUSED)


def require_running_unchanged(layout: Layout, menu: Menu, slot: str, snapshot: int) -> None:
    """Raise AshError (REFUSED) if the deployment in a slot is one of this snapshot, and was changed as it ran."""
    deployment = menu.deployments.get(slot)
    changes = changes_while_running(layout, deployment) if deployment and deployment.snapshot == snapshot else ()
    if paths := [*changes]:
        what = f"the running deployment of snapshot {snapshot} is mutable, and was changed: /{counted(paths, 1)}"
        hint = "ash rollback keeps it as a snapshot; ash deploy --fresh starts again from the snapshot"
        raise AshError(what, hint, REFUSED)


# --- What is made from a deployment's /etc -----------------------------------------------------------------------


def mount_mutable_directories(layout: Layout, root: Path, snapshot: int) -> None:
    """Have a root's fstab mount the mutable directories that its ash.conf names, also in place of shared ones."""
    old, mutable = read_text(path_inside(root, "etc/fstab")), mutable_directories(root, snapshot)
    shared = [shared_line(seen) for _, seen in mutable if seen in SHARED_DIRECTORIES]  # systemd takes the first line
    lines = [line for line in lines_of(old) if not line.startswith(MUTABLE_DIRECTORIES) and line not in shared]
    for kept, seen in mutable:
        make_mutable_directory(layout, kept)
        try:
            path_inside(root, seen).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            what = f"/{seen} cannot be a mutable directory, as ash.conf of snapshot {snapshot} says: a file is there"
            raise AshError(what, f"ash edit-conf {snapshot}", USAGE) from None
        where = f"{fstab_word(f'/.snapshots/{kept}')} {fstab_word(f'/{seen}')}"
        lines.append(f"{where} none bind,{mount_option_after('/.snapshots')} 0 0")
    if (text := "\n".join([*lines, ""])) != old:
        rewrite(path_inside(root, "etc/fstab"), text)


def unlisted_below(top: Path, known: Sequence[str], start: str = "") -> list[str]:
    """What is below a directory, from `start` in it, and is neither empty nor in, or on the way to, a known path."""
    found: list[str] = []
    for name in sorted(os.listdir(top / start)) if is_directory(top / start) else ():
        path = f"{start}/{name}".lstrip("/")
        if path in known:
            continue
        if any(one.startswith(f"{path}/") for one in known):
            found += unlisted_below(top, known, path)
        elif not is_directory(top / path) or any(not is_directory(top / path / one) for one in paths_below(top / path)):
            found.append(path)
    return found


def hidden_by_mutable_directories(layout: Layout, root: Path, snapshot: int) -> list[str]:
    """What nobody sees, for the user: of a root, since its mutable directories, which lack it, are mounted over it.

    And of its mutable directories, since ash.conf names them no longer.
    """
    notes, listed_there = [], mutable_directories(root, snapshot)
    top = mutable_place(snapshot)
    if unseen := unlisted_below(layout.snapshots / top, [kept.removeprefix(f"{top}/") for kept, _ in listed_there]):
        notes.append(f"nobody sees what is in /.snapshots/{top}, since ash.conf does not name it: {counted(unseen)}")
    for kept, seen in listed_there:
        own = path_inside(layout.var, seen[4:]) if seen.startswith("var/") else path_inside(root, seen)
        place = layout.snapshots / kept
        if hidden := sorted({*os.listdir(own)} - {*os.listdir(place)}) if is_directory(own) else []:
            what = f"hides what snapshot {snapshot} has there: {counted(hidden)}"
            notes.append(f"/.snapshots/{kept} is mounted over /{seen}, and {what}")
    return notes


def make_from_etc(layout: Layout, root: Path, snapshot: int, changed: Sequence[str]) -> None:
    """Make the quick part of what is made from the /etc of a deployment, where these paths in it have changed."""
    if "ash.conf" in changed:
        mount_mutable_directories(layout, root, snapshot)
    make_mount_points(root)
    update_library_cache(Chroot(root, {"LC_ALL": "C.UTF-8"}), changed)


def make_initramfs(layout: Layout, distro: Distro, root: Path, kernel: Kernel) -> None:
    """Run the tool that makes an initramfs in a deployment, with a copy of /var, which is not mounted there.

    It works on a copy of /boot too: it does not sync what it makes, and the machine may boot from this deployment.
    """
    private, boot = layout.work("deploy") / "private", path_inside(root, "boot")
    remove_tree(private)
    private.mkdir(mode=0o700)
    for name in ("var", "boot"):
        for directory in (private / name, private / f"{name}-work"):
            directory.mkdir(mode=0o755)
    made = private / kernel.initramfs
    try:
        with readonly_view(layout, layout.var) as var:
            lower = {"var": var, "boot": boot}
            overlays = {name: Overlay(lower[name], private / name, private / f"{name}-work") for name in lower}
            machine_chroot(root, [*distro.make_initramfs, kernel.version], overlays=overlays)
        if not size_of(made) > 0:
            raise AshError(f"{distro.make_initramfs[0]} made no {kernel.initramfs}")
        with replace(path_inside(root, kernel.initramfs), durable=True) as new:
            copy_file(made, new, from_overlay=True)
    finally:
        remove_tree(private)


def boot_config(root: Path, known: Iterable[Deployment], *, layout: Layout, tools: BootTools) -> tuple[str, BootConfig]:
    """The digest of a root's boot inputs, and its boot configuration.

    mkconfig only runs if no known deployment has the same inputs, or if it may find other systems.
    """
    inputs = boot_inputs(root)
    default = read_text(path_inside(root, "etc/default/grub"))
    probes = re.search(r"^\s*GRUB_DISABLE_OS_PROBER=.?false", default, re.MULTILINE)
    for deployment in known:
        text = menu_text(layout.rootfs(deployment.slot))
        if deployment.inputs == inputs and text and not probes:
            write_menu_text(root, text)
            return inputs, deployment.config.without_text()
    config = made_by_mkconfig(root, layout=layout, tools=tools)
    write_menu_text(root, config)
    return inputs, config.without_text()


def renew_initramfs(
    root: Path, deployment: Deployment, settings: Sequence[str], *, layout: Layout, distro: Distro, menu: Menu
) -> Deployment:
    """Make a deployment's initramfs again, since these of its settings changed; or copy that of another one."""
    names = [f"boot/{name}" for name in deployment.config.initrds]
    image = f"boot/{deployment.config.kernel}"
    kernel = next((one for one in kernels_of(root) if image in one.images and one.initramfs in names), None)
    tool = distro.make_initramfs[0]
    if not names:  # it boots without one
        return deployment
    if kernel is None or not any(path_inside(root, f"{path}/{tool}").exists() for path in SYSTEM_PATH.split(":")):
        what = f"{listed(settings)}, in the initramfs: this snapshot has no {tool} that makes it"
        return deployment._replace(without_effect=[*deployment.without_effect, what])
    own = layout.rootfs(deployment.snapshot)
    inputs = ""
    if subvolume_id(own) == deployment.source and path_inside(own, kernel.initramfs).is_file():
        inputs = initramfs_inputs(root, distro.initramfs_settings, path_inside(own, kernel.initramfs))
    target = path_inside(root, kernel.initramfs)
    for known in menu.deployments.values():
        made = path_inside(layout.rootfs(known.slot), kernel.initramfs)
        if inputs and known.initramfs == inputs and made.is_file():
            with replace(target, durable=True) as new:
                run(["cp", "-a", "--reflink=auto", made, new])
            return deployment._replace(initramfs=inputs)
    with step(f"making the initramfs again, for {listed(settings)}"):
        make_initramfs(layout, distro, root, kernel)
    return deployment._replace(initramfs=inputs)


# What an initramfs and the kernel start, but for a shell, which would wait for a human.
INIT_PROGRAMS = ("sbin/init", "etc/init", "bin/init")


def require_init(root: Path, options: str) -> None:
    """Raise AshError if a root has none of the programs that start all others; the user may have named another one."""
    found = [path for path in (path_inside(root, name) for name in INIT_PROGRAMS) if path.is_file()]
    if not any(path.stat().st_mode & 0o111 for path in found) and not re.search(r"(^| )init=", options):
        raise AshError("it has no /sbin/init", "install an init system")


def require_startable(root: Path) -> None:
    """Raise AshError if a snapshot lacks what every deployment needs, as far as that is known without mkconfig."""
    if not kernels_of(root):
        raise no_kernel()
    config = boot_record(root)[1]
    if config:
        require_usable(root, config)
    require_init(root, config.options if config else "")


def configure(
    root: Path, deployment: Deployment, changed: Sequence[str], *, layout: Layout, distro: Distro, menu: Menu
) -> Deployment:
    """Make what is made from a deployment's /etc, where these paths in it have changed: its own mount points, boot
    configuration and initramfs. Returns it with the result.
    """
    make_from_etc(layout, root, deployment.snapshot, changed)
    if not deployment.config.kernel or any(re.fullmatch(BOOT_SETTINGS, path) for path in changed):
        inputs, config = boot_config(root, menu.deployments.values(), layout=layout, tools=distro.boot_tools)
        deployment = deployment._replace(inputs=inputs, config=config)
    require_init(root, deployment.config.options)
    settings = [path for path in changed if re.fullmatch(distro.initramfs_settings, path)]
    if not settings:
        return deployment
    return renew_initramfs(root, deployment, settings, layout=layout, distro=distro, menu=menu)


def sources_of_boot(distro: Distro, paths: Iterable[str]) -> list[str]:
    """Those paths in /etc of which configure() makes something."""
    settings = rf"ash\.conf|fstab|{LINKER_SETTINGS}|{BOOT_SETTINGS}|{distro.initramfs_settings}"
    return [path for path in paths if re.fullmatch(settings, path)]


def hint_about(distro: Distro, snapshot: int, paths: Iterable[str]) -> str:
    """What to do if a deployment cannot be made: what it got from the running /etc may be wrong. Empty if not."""
    names = [f"/etc/{path}" for path in sources_of_boot(distro, paths)]
    return f"correct {listed(names)} of the running system, or ash deploy {snapshot} --fresh-etc" if names else ""


def cannot_be_booted(snapshot: int, error: AshError, hint: str = "") -> AshError:
    return AshError(f"snapshot {snapshot} cannot be booted: {error.message}", hint or error.hint, error.status)


class Carry(NamedTuple):
    """The intent of a carry into a slot."""

    slot: str
    inode: int  # of the merged /etc: whether it is in place
    deployment: Deployment | None = None  # as the menu has it then; an older ash did not note it

    def save(self, path: Path) -> None:
        noted = self.deployment.dump() if self.deployment else None
        write_file(path, f"carry {self.slot} {self.inode}\n{json.dumps(noted)}\n")

    @classmethod
    def load(cls, path: Path) -> Carry | None:
        """The intent in a file; None if it is not that of a carry."""
        first, _, rest = read_text(path).partition("\n")
        found = re.fullmatch("carry ([a-z-]+) ([0-9]+)", first)
        if not found or found[1] not in (*SLOTS, *SECONDARY_SLOTS):
            return None
        intent = cls(found[1], int(found[2]))
        with contextlib.suppress(ValueError):
            return intent._replace(deployment=Deployment.load(from_json(rest, DEPLOYMENT_SHAPE)))
        return intent


# --- Trials: a new deployment must show that it boots -----------------------------------------------------------

TRIES, MINUTES = 3, 10  # the defaults of boot_tries and boot_timeout


def restore_trial(menu: Menu, grub_cfg: str, named: Mapping[str, str | None]) -> None:
    """Put back into a menu, as far as a grub.cfg tells: the last good slot, and the tries of the default.

    Args:
        named: the slots of "default" and "fallback" in grub.cfg.
    """
    menu.good = named.get("fallback") or ""
    tries, minutes = re.findall(r'"\$try_n" = "(\d)"', grub_cfg), re.findall(rf"{ON_TRIAL}=(\d+) ", grub_cfg)
    if tries and minutes and menu.default == named.get("default"):
        default = menu.deployments[menu.default]
        menu.deployments[menu.default] = default._replace(tries=max(map(int, tries)), minutes=int(minutes[0]))


def good_slot(menu: Menu, ran: str | None) -> str:
    """The slot of the newest deployment that is known to boot: what runs or ran last, if it is.

    As long as none is known, it is what runs without being on trial.
    """
    there = menu.deployments.get(ran or menu.last_booted)
    if there and (there.boots or not (there.tries or menu.good in menu.deployments)):
        return there.slot
    return menu.good


class Trials:
    """Has GRUB count the starts of a new deployment, in its notes.

    Args:
        notes: where GRUB keeps them.
        configuration: reads the running system's ash.conf.
    """

    def __init__(self, notes: GrubNotes, configuration: Callable[[], Configuration]) -> None:
        self.notes = notes
        self.configuration = configuration

    def planned(self, deployment: Deployment, menu: Menu, ran: str | None) -> Deployment:
        """A deployment that becomes the default with its tries, if there is a good one to go back to."""
        self.notes.learn()
        if not self.notes.counts or not good_slot(menu, ran):
            return deployment
        tries, minutes = self._limits()
        return deployment._replace(tries=tries, minutes=minutes)

    def _limits(self) -> tuple[int, int]:
        """How often GRUB tries to start a deployment, and how many minutes a start may take."""
        try:
            values = self.configuration().values
        except AshError as error:  # a mistake in there must not prevent a deploy
            console.warn(f"{error.message}; boot_tries and boot_timeout count as not set")
            values = {}
        return int(values.get("boot_tries", TRIES)), int(values.get("boot_timeout", MINUTES))

    def begin(self, deployment: Deployment) -> None:
        """Write the tries of a deployment to GRUB's notes, before grub.cfg names it. AshError if they cannot be."""
        if deployment.tries:
            notes = self.notes.read() or Countdown()
            self.notes.write(notes._replace(try_id=deployment.entry, try_n=str(deployment.tries)))

    def end(self, deployment: Deployment) -> None:
        """Delete GRUB's notes on a deployment that is good. It does not matter if that fails: grub.cfg does not ask."""
        with contextlib.suppress(AshError):
            if (notes := self.notes.read()) and notes.try_id == deployment.entry:
                self.notes.write(notes._replace(try_id="", try_n=""))

    def forget(self, menu: Menu) -> None:
        """Delete GRUB's notes on deployments that the menu does not have any more, or that were started once."""
        with contextlib.suppress(AshError):
            notes = self.notes.read() or Countdown()
            entries = {one.entry for one in menu.deployments.values()}
            kept = notes if notes.try_id in entries else notes._replace(try_id="", try_n="")
            kept = kept if kept.once in entries else kept._replace(once="")
            if kept != notes:
                self.notes.write(kept)

    def left(self, deployment: Deployment) -> int | None:
        """How often GRUB still starts a deployment that is on trial; None if it does not count, or nobody can tell."""
        with contextlib.suppress(AshError, OSError):
            return (self.notes.read() or Countdown()).tries_left(deployment.entry, deployment.tries)
        return None

    def planned_once(self, deployment: Deployment) -> Deployment:
        """A deployment that is started once, with the time that this may take."""
        return deployment if deployment.minutes else deployment._replace(minutes=self._limits()[1])

    def start_once(self, deployment: Deployment) -> None:
        """Have GRUB start a deployment next, and only then."""
        self.notes.write((self.notes.read() or Countdown())._replace(once=deployment.entry))

    def next_once(self, menu: Menu) -> Deployment | None:
        """What GRUB starts next, and only then. Who may not read its notes goes by the menu."""
        once = menu.deployments.get(menu.once)
        if once and os.geteuid() == 0:
            with contextlib.suppress(AshError):
                notes = self.notes.read()
                return once if notes and notes.once == once.entry else None
        return once

    def next_default(self, menu: Menu) -> Deployment | None:
        """What GRUB starts by itself if nothing is started once.

        Without a try left, or with damaged notes, that is the last good deployment. Who may not read these goes by the
        menu.
        """
        if (trial := menu.on_trial) and self.notes.counts and os.geteuid() == 0:
            with contextlib.suppress(AshError, OSError):
                if not (self.notes.read() or Countdown()).tries_left(trial.entry, trial.tries):
                    return menu.fallback
        return menu.deployments.get(menu.default)

    def problem(self, menu: Menu) -> str:
        """What is wrong with GRUB's notes; empty if nothing is. AshError if the place cannot be read."""
        if not self.notes.counts:
            return ""
        name = f"{self.notes.place.name} {self.notes.place.where}"
        notes, entries = self.notes.read(), {one.entry for one in menu.deployments.values()}
        if notes is None:
            return f"{name} is missing or damaged"
        if (trial := menu.on_trial) and notes.tries_left(trial.entry, trial.tries) is None:
            return f"{name} does not count the starts of the new deployment"
        if unknown := {notes.try_id, notes.once} - {*entries, ""}:
            return f"{name} is of another disk, or older: {listed(sorted(unknown))}"
        return ""

    def renew(self, menu: Menu) -> None:
        """Write GRUB's notes again if something is wrong with them; a deployment on trial has all its tries then."""
        if self.problem(menu):
            trial, once, notes = menu.on_trial, self.next_once(menu), self.notes.read() or Countdown()
            entry, tries = (trial.entry, str(trial.tries)) if trial else ("", "")
            self.notes.write(notes._replace(try_id=entry, try_n=tries, once=once.entry if once else ""))

    def recover(self, menu: Menu) -> None:
        """The same after an interrupted deploy: if it fails, GRUB starts the last good deployment."""
        try:
            self.renew(menu)
        except AshError as error:
            console.say(one_line(f"ash: {error.message} ({error.hint})"))


FAILURE_SHAPE = {
    "deployment": is_name, "snapshot": is_u32, "source": is_u32, "since": is_line, "back_to": is_name,
    "units?": [is_line], "journal?": [is_line], "told?": bool,
}  # fmt: skip


class Failure(NamedTuple):
    """A deployment that did not start: the machine went back to another one."""

    deployment: str  # its id
    snapshot: int
    source: int  # subvolume id of the snapshot when it was deployed
    since: str  # when that was noticed
    back_to: str  # the id of the deployment that runs since
    units: Sequence[str] = ()  # of its last start, as far as its journal reached the disk: what failed
    journal: Sequence[str] = ()  # the last lines
    told: bool = False  # in the journal and at the login

    def text(self) -> str:
        """What happened, on one line."""
        why = f"; failed: {listed(self.units)}" if self.units else ""
        return f"snapshot {self.snapshot} did not start ({self.since}), so this deployment runs again{why}"


FELL_BACK_SHAPE = {
    "deployment": str, "snapshot": int, "since": str, "units": [str], "journal": [str],
}  # fmt: skip


def fell_back_data(failure: Failure | None) -> dict[str, Any] | None:
    """What JSON answers say of a deployment that did not start."""
    return {key: getattr(failure, key) for key in FELL_BACK_SHAPE} if failure else None


def is_failures_file(path: Path) -> bool:
    try:
        from_json(read_text(path), [FAILURE_SHAPE])
    except (ValueError, IsADirectoryError):
        return False
    return not path.is_symlink()


def failures(layout: Layout) -> list[Failure]:
    """The deployments that did not start, one for each snapshot at most, the newest last; none if that is damaged."""
    with contextlib.suppress(ValueError, IsADirectoryError):
        found = from_json(read_text(layout.bad) or "[]", [FAILURE_SHAPE])
        return [Failure(**fields_of(Failure, one)) for one in found]
    return []


def failure_of(layout: Layout, snapshot: int) -> Failure | None:
    """How a snapshot's deployment failed to start; None if it did not, or the snapshot was changed since."""
    for one in failures(layout):
        if one.snapshot == snapshot:
            with contextlib.suppress(PermissionError):  # only root sees snapshots
                return one if subvolume_id(layout.rootfs(snapshot)) == one.source else None
            return one
    return None


def note_failure(layout: Layout, failure: Failure) -> None:
    """Remember that a deployment did not start, until its snapshot is changed."""
    others = [one for one in failures(layout) if one.snapshot != failure.snapshot]
    still = [one for one in others if is_subvolume(layout.rootfs(one.snapshot)) and failure_of(layout, one.snapshot)]
    write_file(layout.bad, json.dumps([one._asdict() for one in (*still, failure)]) + "\n")


def forget_failure(layout: Layout, running: Deployment) -> bool:
    """Forget that this deployment, or an earlier one of the same state of its snapshot, did not start.

    What the machine went back from to this deployment is not forgotten. Returns whether there was something to forget.
    """

    def is_disproved(one: Failure) -> bool:
        same_state = (one.snapshot, one.source) == (running.snapshot, running.source)
        return one.deployment == running.id or (same_state and one.back_to != running.id)

    known = failures(layout)
    others = [one._asdict() for one in known if not is_disproved(one)]
    if len(others) < len(known):
        write_file(layout.bad, json.dumps(others) + "\n")
    return len(others) < len(known)


# --- The boot menu on disk: the menu file and grub.cfg ----------------------------------------------------------


class BootMenu:
    """The menu file and the grub.cfg that is made from it; methods that change them need the lock "deploy".

    Args:
        layout: of the distribution whose menu it is.
        distro: the distribution.
        notes: where GRUB counts.
        describe: returns the description of a snapshot.
    """

    def __init__(self, layout: Layout, distro: Distro, notes: GrubNotes, describe: Callable[[int], str]) -> None:
        self.layout = layout
        self.notes = notes
        self.describe = describe
        self.menu = Menu.load(layout.menu)
        self.uuid = root_uuid(layout)
        self.partition = BootPartition(layout)
        self.boot_config = partial(boot_config, layout=layout, tools=distro.boot_tools)

    def write(self) -> None:
        """Replace the menu file, then grub.cfg; each atomically and with a full commit: GRUB does not replay the log.

        Raises:
            CommittedButUnfinished: the menu file was replaced, grub.cfg was not.
        """
        default = self.menu.deployments[self.menu.default]
        if lacks_menu_text(self.layout, default):  # without it, anybody at the console could change the entries
            inputs, config = self.boot_config(self.layout.rootfs(default.slot), ())
            self.menu.deployments[default.slot] = default._replace(inputs=inputs, config=config)
        write_file(self.layout.menu, self.menu.dump())
        try:
            self._write_grub_cfg()
        except (AshError, OSError) as error:
            what = f"the boot menu is changed, but grub.cfg is not finished: {reason(error)}"
            raise CommittedButUnfinished(what, "ash recover finishes it") from error

    def _write_grub_cfg(self) -> None:
        grub_cfg, deployments = self.layout.grub_cfg, [*self.menu.deployments.values()]
        for deployment in deployments:
            self.partition.add(deployment)
        old = [grub_cfg, *(grub_cfg.with_name(OLD_GRUB_CFG.format(age)) for age in range(1, KEPT_MENUS + 1))]
        for newer, older in reversed(list(itertools.pairwise(old))):
            if newer.exists():
                about_to(f"keep {older.name}")
                older.unlink(missing_ok=True)
                os.link(newer, older)
        write_file(grub_cfg, self.rendered(), mode=0o600)
        sync_filesystem(self.layout.snapshots)
        if self.partition.uuid:
            sync_filesystem(grub_cfg.parent)
            self.partition.remove_others(deployments)

    def startable(self, tree: Tree) -> str:
        """The text that the submenu with all snapshots should have."""
        default = self.menu.deployments.get(self.menu.default)
        classes = default.config.classes if default else ""
        return startable_entries(self.layout, self.uuid, tree, self.describe, classes)

    def write_startable(self, tree: Tree) -> None:
        """Replace the submenu with all snapshots, if it has changed; the caller holds the lock "state"."""
        text, path = self.startable(tree), self.layout.snapshots_cfg
        if path.parent.is_dir() and read_text(path) != text:
            write_file(path, text, mode=0o600, durable=False)

    def renew(self, snapshot: int) -> list[str]:
        """Run mkconfig again for all deployments of a snapshot; AshError if there are none. Returns their slots."""
        slots = self.menu.slots_of(snapshot)
        for slot in slots:
            inputs, config = self.boot_config(self.layout.rootfs(slot), ())
            self.menu.deployments[slot] = self.menu.deployments[slot]._replace(inputs=inputs, config=config)
        self.write()
        return slots

    def rebuild(self, ran: str | None) -> None:
        """Add to the menu what is missing, from the slots and from grub.cfg; AshError if nothing can be booted.

        Args:
            ran: the slot that is known to run, or to have run last.
        """
        grub_cfg = self.grub_cfg()
        entry = r" rootflags=subvol=\S*/snapshot-([a-z-]+)\S* .*\bash\.deployment=(\w+)"
        of_id = {ident: slot for slot, ident in re.findall(entry, grub_cfg)}
        ids = {slot: ident for ident, slot in of_id.items()}
        named = {key: of_id.get(ident) for key, ident in re.findall(r'set (\w+)_id="(?:ash-)?(\w+)"', grub_cfg)}
        for slot in (*SLOTS, *SECONDARY_SLOTS):
            root, own = self.layout.rootfs(slot), own_slot_and_id(self.layout, slot)[1]
            ident = ids.get(slot) or own or os.urandom(8).hex()
            if slot not in self.menu.deployments and (root / IN_ROOT_SNAP).is_file():
                with contextlib.suppress(AshError):  # it cannot be booted
                    self.menu.deployments[slot] = self._deployment_in(slot, ident)
        before = (ran, self.menu.last_booted, named.get("fallback"))
        wanted = (named.get("default"), *before, *SLOTS, *SECONDARY_SLOTS)
        there = [slot for slot in wanted if slot and slot in self.menu.deployments]
        if not there:
            raise AshError("nothing is deployed", "ash deploy N")
        self.menu.default = there[0]
        restore_trial(self.menu, grub_cfg, named)
        self.menu.last_booted = next((slot for slot in before if slot and slot in there), there[0])
        self.write()

    def _deployment_in(self, slot: str, ident: str) -> Deployment:
        """The deployment in a slot; the id of the snapshot's subvolume at its deploy is lost."""
        root, snapshot = self.layout.rootfs(slot), snapshot_of_slot(self.layout, slot)
        inputs, config = self.boot_config(root, self.menu.deployments.values())
        found = unconfigured(self.layout, root, slot, ident, snapshot)
        return found._replace(inputs=inputs, config=config)

    def is_current(self) -> bool:
        """Whether grub.cfg matches the menu file but for titles, or the root with its passwords is gone."""
        is_gone = not is_subvolume(self.layout.rootfs(self.menu.default))
        is_same_text = without_titles(self.grub_cfg()) == without_titles(self.rendered())
        return is_gone or (is_same_text and not self.partition.lacks(self.menu.deployments.values()))

    def rendered(self) -> str:
        """The text that grub.cfg should have."""
        return self.menu.render(self.layout, self.uuid, self.describe, self.notes)

    def grub_cfg(self) -> str:
        """The text that it has."""
        return read_text(self.layout.grub_cfg)


# --- Deployments: slots that the menu boots --------------------------------------------------------------------


class Deployments:
    """The deployments on disk, which the menu boots; methods that change them need the lock "deploy"."""

    def __init__(
        self, layout: Layout, distro: Distro, trials: Trials, boot_menu: BootMenu, *, booted: str | None
    ) -> None:
        self.layout = layout
        self.distro = distro
        self.trials = trials
        self.boot_menu = boot_menu
        self.menu = boot_menu.menu
        self.homes: Mapping[str, Path] = {"home": layout.home, "root": layout.home_root}
        self.booted = booted
        self.ran = booted or noted_slot(layout) or None  # what is known to run, or to have run last
        self.wait = 0.0  # for locks

    @property
    def running(self) -> str:
        """The slot whose /etc counts as the running one; empty if nothing is deployed."""
        return self.ran or self.menu.last_good

    def recover(self) -> None:
        """Clean up after an interrupted deploy: the menu file decides, grub.cfg follows it."""
        carry = self._finish_carry()
        late, waits = None, ""
        try:
            waits = finish_owners(self.layout, self.homes)
        except AshError as error:  # the rest does not depend on it
            late = error
        if waits:
            console.say(f"ash: {waits} (ash recover)")
        self._finish_withdrawal()
        self._delete_unfinished()
        self.note_fallback()
        if carry and self.menu.default:
            self._make_rest(carry)
        default = self.menu.default
        if (self.layout.work("deploy") / "intent").exists():
            self.trials.recover(self.menu)
        if default and is_subvolume(self.layout.rootfs(default)):
            deployments = [*self.menu.deployments.values()]
            if self.boot_menu.grub_cfg() != self.boot_menu.rendered() or self.boot_menu.partition.lacks(deployments):
                self.boot_menu.write()
            self.boot_menu.partition.remove_others(deployments)
        remove_tree(self.layout.work("deploy") / "intent")
        if late:
            raise late

    def _finish_carry(self) -> Carry | None:
        """If a carry has put the merged /etc in place, move its base forward, and note the result in the menu file.

        Returns the intent of the carry if the menu has the result.
        """
        layout, carry = self.layout, Carry.load(self.layout.work("deploy") / "intent")
        merged = status_of(layout.rootfs(carry.slot) / "etc") if carry else None
        if carry is None or merged is None or merged.st_ino != carry.inode:
            return None
        new, before = layout.carried(f"new-{carry.slot}"), self.menu.deployments.get(carry.slot)
        if is_subvolume(new):
            replace_subvolume(new, layout.carried(carry.slot))
        if not carry.deployment or not before or before.id != carry.deployment.id:
            return None
        self.menu.deployments[carry.slot] = carry.deployment
        write_file(layout.menu, self.menu.dump())
        sync_filesystem(layout.snapshots)
        return carry

    def _make_rest(self, carry: Carry) -> None:
        """Make what an interrupted carry has not; what cannot be made is named, and fsck finds it."""
        try:
            self.make_from_carried(carry.slot)
        except AshError as error:
            if is_out_of_space(error) or isinstance(error, CommittedButUnfinished):
                raise
            console.say(one_line(f"ash: {reason(error)}"))
            return
        console.say(f"ash: an interrupted carry of /etc into {carry.slot} is finished")

    def make_from_carried(self, slot: str) -> Deployment:
        """Make in a deployment what is made from the paths that were carried into it. Returns it.

        AshError if it cannot be made; then the menu file keeps the names of the paths.
        """
        deployment, root = self.menu.deployments[slot], self.layout.rootfs(slot)
        paths, was_changed = deployment.unmade, any(changes_while_running(self.layout, deployment))
        try:
            made = configure(root, deployment, paths, layout=self.layout, distro=self.distro, menu=self.menu)._replace(
                unmade=[]
            )
        except AshError as error:
            what = f"{listed(paths)}: carried over, but what is made from it is not: {error.message}"
            raise AshError(what, hint_about(self.distro, deployment.snapshot, paths) or error.hint) from error
        if not was_changed:
            write_file(place_inside(root, IN_ROOT_ID), made.note)  # what is newer was changed as it ran
        if made != deployment:
            self.menu.deployments[slot] = made
            self.boot_menu.write()
        return made

    def note_fallback(self) -> None:
        """Note that the deployment on trial did not start, if GRUB said so: the last good one is the default again.

        That runs now, unless somebody chose another one in the menu. If GRUB's notes are damaged or of another
        deployment, GRUB has not tried it: it stays on trial.
        """
        menu, failed, good, slot = self.menu, self.menu.on_trial, self.menu.fallback, self.booted
        if slot not in menu.deployments or not failed or not good or failed.slot == slot:
            return
        if failed.id == kernel_options().get(FELL_BACK):
            left = self.trials.left(failed)
            if left is None or left == failed.tries:
                why = "GRUB's notes were damaged, or of another deployment"
                console.say(f"ash: snapshot {failed.snapshot} was not tried: {why}")
                self.trials.recover(menu)
                return
            since, back_to = time.strftime("%Y-%m-%d %H:%M"), menu.deployments[slot].id
            try:
                note_failure(self.layout, Failure(failed.id, failed.snapshot, failed.source, since, back_to))
            except OSError as error:  # that what runs becomes the default is more important
                console.warn(f"it is not noted that snapshot {failed.snapshot} did not start: {reason(error)}")
            menu.default = menu.good = good.slot
            menu.last_booted = slot
            self.boot_menu.write()

    def _delete_unfinished(self) -> None:
        """Delete unfinished_deployments(). What cannot be deleted stays, with a warning: it must not stop the rest."""
        for left in unfinished_deployments(self.layout):
            try:
                if is_subvolume(left):
                    delete_subvolume(left)
                else:
                    remove_tree(left, protected=True)
            except (AshError, OSError) as error:
                if is_out_of_space(error):
                    raise
                console.say(f"ash: {left.name} cannot be deleted: {reason(error)}")

    def deploy(
        self,
        snapshot: int,
        *,
        secondary: bool = False,
        fresh_etc: bool = False,
        fresh: bool = False,
        with_saved: bool = False,
    ) -> tuple[Deployment, bool]:
        """Deploy a snapshot into a free slot; see deploy_snapshot(). Killed or cut anywhere, the machine boots."""
        require_known_deployments(self.layout, self.menu)
        # Before /etc is copied: an edit in between is carried, but counts as one that was not: another deploy at worst.
        state = etc_state(self.layout.rootfs(self.running) / "etc") if self.running else ""
        found = None if fresh_etc else self._up_to_date(snapshot, state, secondary)
        if found and not (with_saved and found.only_saved):
            if is_used_up := found is self.menu.on_trial and self.trials.left(found) == 0:
                self.trials.begin(found)
            return found, is_used_up
        slot, has_unique_changes = self.choose_slot(snapshot, secondary=secondary, fresh=fresh)
        with new_owners(self.layout, self.homes):
            try:
                deployment = self._build(snapshot, slot, state, fresh_etc, with_saved)
                if has_unique_changes and slot in self.menu.deployments:
                    self._keep_drift(slot)
                deployment = deployment if secondary else self.trials.planned(deployment, self.menu, self.ran)
            except BaseException:
                self._delete_unfinished()
                raise
            if has_unique_changes and (loss := loss_in_slot(self.layout, self.menu, slot)):  # else it was refused
                deployment = deployment._replace(notes=[*deployment.notes, loss])
            if (once := self.menu.deployments.get(self.menu.once)) and once.slot == slot:
                note = f"snapshot {once.snapshot}, which it replaces, is not started once any more"
                deployment = deployment._replace(notes=[*deployment.notes, note])
            if secondary and (replaced := self.menu.deployments.get(slot)) and replaced.snapshot != snapshot:
                note = f"snapshot {replaced.snapshot}, which it replaces, has no secondary entry any more"
                deployment = deployment._replace(notes=[*deployment.notes, note])
            self._swap_in(deployment, secondary)
        return deployment, True

    def _up_to_date(self, snapshot: int, state: str, secondary: bool) -> Deployment | None:
        """The deployment of this state of the snapshot and the running /etc, unless it was changed while it ran."""
        source = subvolume_id(self.layout.rootfs(snapshot))
        for slot in SECONDARY_SLOTS if secondary else (self.menu.default,):
            found = self.menu.deployments.get(slot)
            if found is None or found.mutable or (found.snapshot, found.source) != (snapshot, source) or found.unmade:
                continue
            was_changed = os.path.lexists(place_inside(self.layout.rootfs(slot), IN_ROOT_LIVE))
            has_changes = found.has_changes_of(self.running, state)
            if not was_changed and (slot == self.running or has_changes):
                return found
        return None

    def check(self, snapshot: int, *, secondary: bool, fresh_etc: bool, fresh: bool) -> None:
        """Raise AshError if deploy() would refuse a snapshot that can be booted."""
        require_known_deployments(self.layout, self.menu)
        state = etc_state(self.layout.rootfs(self.running) / "etc") if self.running else ""
        if fresh_etc or not self._up_to_date(snapshot, state, secondary):
            self.choose_slot(snapshot, secondary=secondary, fresh=fresh)

    def choose_slot(self, snapshot: int, *, secondary: bool = False, fresh: bool = False) -> tuple[str, bool]:
        """The slot for a new deployment of a snapshot, and whether it has changes that no other deployment has.

        AshError (REFUSED) if changes in mutable deployments would be left behind or deleted, unless `fresh`.
        """
        if not fresh:
            require_running_unchanged(self.layout, self.menu, self.running, snapshot)
        slot, has_unique_changes = self._free_slot(secondary)
        if has_unique_changes and not fresh:
            require_unchanged(self.layout, self.menu, slot)
        return slot, has_unique_changes

    def _free_slot(self, secondary: bool) -> tuple[str, bool]:
        """The first slot that is neither booted, or was last, nor the newest one known to boot.

        One with changes that no other deployment has is only taken if there is no other. Returns whether it has.
        """
        slots = SECONDARY_SLOTS if secondary else SLOTS
        last = self.ran if self.ran in slots else self.menu.last_good
        used = (self.ran, last, good_slot(self.menu, self.ran), self.menu.once)
        free = [slot for slot in slots if slot not in used] or [slot for slot in slots if slot not in used[:3]]
        if secondary:  # one without a deployment first: nobody's entry vanishes
            free.sort(key=self.menu.deployments.__contains__)
        # Its changes of /etc are kept, others are not.
        unchanged = [slot for slot in free if not any(changes_in_slot(self.layout, self.menu, slot))]
        expendable = next((slot for slot in unchanged if not self._unsaved_drift(slot)), None)
        return expendable or [*unchanged, *free][0], expendable is None

    def _unsaved_drift(self, slot: str) -> list[str]:
        return unsaved_drift(self.layout, self.menu, slot, self.running) if self.running else []

    def _keep_drift(self, slot: str) -> None:
        """Copy the changes of /etc that only a slot has, which is to be replaced, to a conflicts directory."""
        layout = self.layout
        if not (paths := self._unsaved_drift(slot)):
            return
        with readonly_view(layout, layout.rootfs(slot)) as root:
            merge = self.etc_merge(layout.etc(slot), root, root / "etc", self.menu.deployments[slot].snapshot, slot)
            set_all_aside(merge, paths)
        place = f"/var/{merge.conflicts.relative_to(layout.var)}"
        console.say(f"only the deployment that is replaced had these changes of /etc: {listed(paths)}; see {place}")

    def _build(self, snapshot: int, slot: str, state: str, fresh_etc: bool, with_saved: bool) -> Deployment:
        """Create the new deployment beside its slot, merge /etc into it, and determine how it boots."""
        layout, new = self.layout, self.layout.rootfs(f"new-{slot}")
        source = subvolume_id(layout.rootfs(snapshot))
        snapshot_subvolume(layout.rootfs(snapshot), new)
        make_bootable(layout, self.distro, new, slot, self.boot_menu.uuid)
        write_inside(new, IN_ROOT_SNAP, f"{snapshot}\n")
        mount_mutable_directories(self.layout, new, snapshot)
        deployment = unconfigured(layout, new, slot, os.urandom(8).hex(), snapshot)._replace(source=source)
        copy_as_subvolume(new / "etc", layout.etc(f"new-{slot}"))  # the base for drift
        if self.running:
            deployment = self._carry_etc(deployment, new / "etc", layout.etc(self.running), state, fresh=fresh_etc)
        if self.running and not fresh_etc:
            deployment = self._bring_saved(deployment, new, with_saved)
        try:
            paths = deployment.carried
            deployment = configure(new, deployment, paths, layout=layout, distro=self.distro, menu=self.menu)
        except AshError as error:
            self._forget_conflicts(deployment)
            hint = hint_about(self.distro, snapshot, deployment.carried)
            if error.status == USAGE:  # a wrong value: which ones are right
                hint = "; ".join(filter(None, [error.hint, hint]))
            raise cannot_be_booted(snapshot, error, hint) from None
        self.boot_menu.partition.remove_others(self.menu.deployments.values())  # what an interrupted deploy left
        self.boot_menu.partition.add(deployment, new)
        hidden = hidden_by_mutable_directories(layout, new, snapshot)
        write_inside(new, IN_ROOT_ID, deployment.note)  # last of all: what is newer was changed as it ran
        return deployment._replace(own_etc=etc_state(new / "etc"), notes=[*deployment.notes, *hidden])

    def _bring_saved(self, deployment: Deployment, root: Path, wanted: bool) -> Deployment:
        """Name what was saved from the running /etc into other snapshots only, or, if `wanted`, carry it too.

        What the waiting deployment of the same snapshot has of it is carried in any case: it was drift at that deploy.
        """
        layout, before = self.layout, self.menu.deployments.get(self.menu.default)
        # What was edited again is in conflict with a snapshot that never had it.
        settled = {*saved_paths(root), *deployment.carried}
        saved = [path for path in saved_paths(layout.rootfs(self.running)) if path not in settled]
        if not saved:
            return deployment
        again = before and (before.snapshot, before.etc_from) == (deployment.snapshot, self.running)
        carried = before.carried if before and again else ()
        with readonly_view(layout, layout.rootfs(self.running)) as running, nosymfollow(root / "etc"):
            base = layout.etc(self.running)
            merge = self.etc_merge(base, running, root / "etc", deployment.snapshot, deployment.slot)
            lacking = [path for path in saved if merge.lacks(path)]
            for path in lacking:
                if wanted or path in carried:
                    merge.bring(path)
        directory = f"/var/{merge.conflicts.relative_to(layout.var)}" if merge.conflicts.is_dir() else ""
        return deployment._replace(
            carried=[*deployment.carried, *merge.carried],
            conflicts=[*(one for one in deployment.conflicts if one not in merge.carried), *merge.in_conflict],
            conflicts_folder=deployment.conflicts_folder or directory,
            only_saved=[path for path in lacking if path not in (*merge.carried, *merge.in_conflict)],
        )

    def _swap_in(self, deployment: Deployment, secondary: bool) -> None:
        """Swap a new deployment into its slot; the machine boots whenever this is interrupted."""
        layout, menu, slot = self.layout, self.menu, deployment.slot
        target, new = layout.rootfs(slot), layout.rootfs(f"new-{slot}")
        intent = layout.work("deploy") / "intent"
        write_file(intent, f"{slot}\n")  # has the boot service check that menu and grub.cfg agree
        sync_filesystem(layout.snapshots)
        self._begin_trial(deployment)
        if self.ran in menu.deployments:
            menu.last_booted = self.ran
        menu.good = good_slot(menu, self.ran)
        if menu.take_out(slot) and menu.default:
            if menu.default == slot:
                menu.default = menu.fallback.slot if menu.fallback else next(iter(menu.deployments), "")
            if menu.default:
                self.boot_menu.write()
        replace_subvolume(layout.etc(f"new-{slot}"), layout.etc(slot))
        if layout.carried(f"new-{slot}").exists():
            replace_subvolume(layout.carried(f"new-{slot}"), layout.carried(slot))
        else:
            delete_subvolume(layout.carried(slot))
        if target.exists():
            exchange(new, target)
        else:
            rename(new, target)
        sync_filesystem(layout.snapshots)
        if not secondary:
            if not menu.last_booted:
                menu.last_booted = menu.default
            menu.default = slot
        menu.deployments[slot] = deployment
        self.boot_menu.write()
        delete_subvolume(new, even_mounted=True)
        self.trials.forget(menu)
        remove_tree(intent)

    def _begin_trial(self, deployment: Deployment) -> None:
        """Have GRUB count; if it cannot, delete the deployment. Cut off from here on, recovery looks at the notes."""
        try:
            self.trials.begin(deployment)
        except AshError:
            self._delete_unfinished()
            self._forget_conflicts(deployment)
            with contextlib.suppress(AshError):  # that is the error already
                self.trials.renew(self.menu)
            remove_tree(self.layout.work("deploy") / "intent")
            raise

    def _forget_conflicts(self, deployment: Deployment) -> None:
        """Delete the conflicts directory of a deployment that did not come about."""
        if deployment.conflicts_folder:
            remove_tree(self.layout.var / deployment.conflicts_folder.removeprefix("/var/"))

    def secondary_of(self, snapshot: int) -> list[Deployment]:
        """The deployments of a snapshot that withdraw() takes."""
        menu = self.menu
        shown = {self.running, menu.default, menu.last_booted, menu.good} - {*SECONDARY_SLOTS}
        return [one for slot, one in menu.deployments.items() if slot not in shown and one.snapshot == snapshot]

    def withdraw(self, snapshot: int, fresh: bool = False) -> list[Deployment]:
        """Take a snapshot's secondary deployments out of the menu, and delete them. Returns them.

        So are others that the menu does not show any more, which were kept for the changes that only they have.

        AshError (REFUSED) if one of them runs, is all that can be booted, or (unless `fresh`) was changed as it ran.
        """
        menu, found = self.menu, self.secondary_of(snapshot)
        if any(one.slot in (self.running, menu.default, menu.good) for one in found):
            is_running = any(one.slot == self.running for one in found)
            state = "is running" if is_running else "is what the machine goes back to"
            hint = "start another deployment, try again" if is_running else "let another deployment start first"
            raise AshError(f"the secondary deployment of snapshot {snapshot} {state}", hint, REFUSED)
        for slot in [one.slot for one in found]:
            if not fresh:
                require_unchanged(self.layout, self.menu, slot)
            elif loss := loss_in_slot(self.layout, self.menu, slot):
                console.say(f"ash: {loss}")
        for slot in [one.slot for one in found]:
            self._keep_drift(slot)
            write_file(self.layout.work("deploy") / "intent", f"withdraw {slot}\n")
            menu.take_out(slot)
            self.boot_menu.write()
            self._finish_withdrawal()
            self.trials.forget(menu)
            remove_tree(self.layout.work("deploy") / "intent")
        return found

    def _finish_withdrawal(self) -> None:
        """Delete a deployment that was taken out of the menu, also if that was interrupted."""
        intent = re.fullmatch(r"withdraw ([a-z-]+)\n", read_text(self.layout.work("deploy") / "intent"))
        if intent and intent[1] in (*SLOTS, *SECONDARY_SLOTS) and intent[1] not in self.menu.deployments:
            for part in (self.layout.rootfs(intent[1]), self.layout.etc(intent[1]), self.layout.carried(intent[1])):
                delete_subvolume(part, even_mounted=True)

    # The running /etc

    def etc_merge(self, base: Path, root: Path, target: Path, snapshot: int, which: int | str) -> EtcMerge:
        """The merge of the changes since `base` to the /etc of a root, a read-only view, into the /etc of `which`."""
        layout = self.layout
        own_fstab = partial(render_fstab, layout, self.boot_menu.uuid, which, mutable=is_mutable(target.parent))
        require_directories(root)
        is_default = partial(self.distro.package_manager.is_default, target.parent)
        merge = EtcMerge(base, root / "etc", target, layout.conflicts(snapshot), own_fstab, is_default=is_default)
        merge.brought = [etc for etc in (layout.carried(self.running),) if is_subvolume(etc)]
        return merge

    def _carry_etc(
        self, deployment: Deployment, target: Path, base: Path, state: str, *, fresh: bool = False, strict: bool = True
    ) -> Deployment:
        """Carry the running /etc's changes since `base` into `target`, and keep it as the base of the next carry.

        Returns the deployment with the result recorded.
        """
        layout, running = self.layout, self.running
        if not is_subvolume(base):
            what = f"cannot tell what was changed in the running /etc: {base.name} is missing"
            raise AshError(what, "ash fsck --repair", REFUSED)
        # Copy from a read-only snapshot: no symlink races with users who own directories in there.
        with readonly_view(layout, layout.rootfs(running)) as root, nosymfollow(target):
            merge = self.etc_merge(base, root, target, deployment.snapshot, deployment.slot)
            people = bring_people(
                layout, merge, deployment.slot, self.homes, wait=self.wait, strict=strict, fresh=fresh
            )
            merge.merge(fresh)
            people.prune(merge)
            copy_moved_base(merge, layout.carried(f"new-{deployment.slot}"))
            notes = [
                *people.notes,
                *people.lacking_shells(target.parent),
                *left_in_place(layout.rootfs(running), target.parent),
            ]
        directory = f"/var/{merge.conflicts.relative_to(layout.var)}" if merge.conflicts.is_dir() else ""
        return deployment._replace(
            etc_from=running,
            etc_state=state,
            fresh_etc=fresh,
            carried=list(dict.fromkeys([*deployment.carried, *merge.carried])),
            conflicts=list(dict.fromkeys([*deployment.conflicts, *merge.in_conflict])),
            conflicts_folder=directory or deployment.conflicts_folder,
            without_effect=list(dict.fromkeys([*deployment.without_effect, *merge.without_effect])),
            people=list(dict.fromkeys([*deployment.people, *people.names])),
            notes=list(dict.fromkeys([*deployment.notes, *notes])),
        )

    def carry(self, slot: str) -> Deployment | None:
        """Carry what was changed in the running /etc since that of a slot was made over into it; None if nothing was.

        If that was made with a fresh /etc, the changes go to the conflicts directory. Returns the deployment with the
        paths `carried` now, and those in conflict now.
        """
        deployment, layout = self.menu.deployments.get(slot), self.layout
        if deployment is None or deployment.etc_from != self.booted:
            return None
        state = etc_state(layout.rootfs(deployment.etc_from) / "etc")
        if state == deployment.etc_state:
            return None
        etc, before = etc_to_replace(layout.rootfs(slot)), layout.carried(slot)
        # Not what the running deployment started with: what was carried by the deploy may have been saved since.
        base = before if is_subvolume(before) else layout.etc(deployment.etc_from)  # of an older ash
        intent = layout.work("deploy") / "intent"
        is_as_made = deployment.own_etc == etc_state(etc)  # else, it has run: what was changed stays a change of it
        write_file(intent, f"{slot}\n")  # has the boot service clean up
        with new_owners(layout, self.homes), unprotected(etc), replace(etc, directories=True) as new:
            copy_tree(etc, new)
            only_new = deployment._replace(carried=(), conflicts=())
            found = self._carry_etc(only_new, new, base, state, fresh=deployment.fresh_etc, strict=False)
            paths, conflicts = list(found.carried), list(found.conflicts)
            merged = found._replace(
                carried=list(dict.fromkeys([*deployment.carried, *paths])),
                conflicts=list(dict.fromkeys([*deployment.conflicts, *conflicts])),
                unmade=list(dict.fromkeys([*deployment.unmade, *sources_of_boot(self.distro, paths)])),
            )
            Carry(slot, new.stat().st_ino, merged).save(intent)
            sync_filesystem(layout.snapshots)
        self._finish_carry()
        try:
            made = self.make_from_carried(slot)
        except AshError as error:
            if not (is_out_of_space(error) or isinstance(error, CommittedButUnfinished)):  # these, recovery finishes
                remove_tree(intent)
            raise
        finally:
            if is_as_made:
                self.menu.deployments[slot] = self.menu.deployments[slot]._replace(own_etc=etc_state(etc))
                write_file(layout.menu, self.menu.dump())
        sync_filesystem(layout.snapshots)
        remove_tree(intent)
        return made._replace(carried=paths, conflicts=conflicts)

    def rebase_drift(self, slot: str, merge: EtcMerge) -> None:
        """Move the slot's drift base forward to the /etc that was merged, except for conflicts."""
        new = self.layout.etc(f"new-{slot}")
        copy_moved_base(merge, new, merge.in_conflict)
        replace_subvolume(new, self.layout.etc(slot))


# --- The system: one distribution on one file system -----------------------------------------------------------


def require_root(doing: str) -> None:
    if os.geteuid() != 0:
        raise AshError(f"{doing} needs root", "sudo ash ...", REFUSED)


def is_in_chroot() -> bool:
    """Whether this process's root directory is not that of process 1."""
    try:
        ours, first = os.stat("/"), os.stat("/proc/1/root/")
    except PermissionError:  # not root. In a chroot into a plain directory, nothing is mounted on "/".
        if not any(m.target == "/" for m in mounts()):
            return True
        return os.environ.get("container") == "ash"  # noqa: SIM112 (systemd spells it in lower case)
    except OSError:
        return True  # no /proc: not a system that was booted
    return (ours.st_dev, ours.st_ino) != (first.st_dev, first.st_ino)


def require_one_disk(root: Mount) -> None:
    """Raise AshError (REFUSED) if a part of the running system is mounted from a copy of its disk."""
    for one in mounts():
        if one.kind != "btrfs" or one.device == root.device or one.target not in OWN_MOUNT_POINTS:
            continue
        ours, theirs = (Superblock.on(Path(source)) for source in (root.source, one.source))
        if one.target == "/.snapshots" or (ours is not None and ours == theirs):
            what = f"{one.target} is mounted from {one.source}, but / from {root.source}"
            raise AshError(what, "detach the disk that is a copy, and reboot", REFUSED)


class System:
    """A distribution that ash manages: the running one, or one on a mounted disk or a disk image."""

    def __init__(
        self, layout: Layout, distro: Distro, *, running: bool = False, wait: float = 0, image: Path | None = None
    ) -> None:
        self.layout = layout
        self.distro = distro
        self.image = image  # that it is on
        self.running = running
        self.wait = wait
        self.history = History(layout)
        self.caller: Mapping[str, Any] | None = None  # recorded in the history
        self.done: list[Change] = []  # committed changes
        self.recorded = False  # whether a commit of this command is in the history

    @property
    def package_manager(self) -> PackageManager:
        return self.distro.package_manager

    @classmethod
    def open(cls, request: Request, changes: bool, *, any_system: bool = False) -> System:
        """The system that the command line selects; AshError if there is none (MISSING) or it needs root (REFUSED).

        Args:
            changes: it will be changed.
            any_system: of several on the disk, of which none is selected, take the first.
        """
        if request.root is None and request.image is None:
            return cls._running(request, changes)
        require_root("working on another system's disk")
        private_mounts()
        if request.image is not None:
            if not request.image.is_file():
                raise AshError(f"{request.image} is not a regular file", "", MISSING)
            with ExitStack() as stack:
                top, _ = attach_disk(stack, request.image)
        elif request.root is not None:
            if not request.root.is_dir():
                raise AshError(f"{request.root} is not a directory", "mount the root partition there", MISSING)
            found = mount_of(request.root)
            if found.kind != "btrfs":
                raise AshError(f"{request.root} is not on btrfs", "mount the root partition there", MISSING)
            # A second, writable mount would also make the user's read-only mount writable.
            top = mount_top_of(request.root, is_readonly(request.root))
        return cls._at(top, request, changes, any_system=any_system)

    @classmethod
    def _running(cls, request: Request, changes: bool) -> System:
        cls._require_no_chroot(request)
        snapshots = Path("/.snapshots")
        root = next((m for m in reversed(mounts()) if m.target == "/"), None)
        if root is None or root.kind != "btrfs" or not (snapshots / "ash/fstree").exists():
            raise AshError("this system is not managed by ash", "select one with --root DIR or --image FILE", MISSING)
        ident = read_distro(snapshots / "ash/distro")
        if not changes:
            return cls(Layout(snapshots, ident[0]), load_distro(ident[1]), running=True)
        require_root("changing the system")
        private_mounts()
        require_one_disk(root)
        layout = Layout.at(mount_top_of(Path(root.target), is_readonly(snapshots)), ident[0])
        mount_boot_partition(layout)
        return cls(layout, load_distro(ident[1]), running=True, wait=request.wait)

    @classmethod
    def _at(cls, top: Path, request: Request, changes: bool, *, any_system: bool) -> System:
        there = [one.distro for one in Layout.all_on(top) if one.is_complete and not one.is_of_ashos]
        if request.distro is None and len(there) > 1 and not any_system:
            raise AshError(f"there are several distributions: {', '.join(there)}", "select one with --distro ID", USAGE)
        if not there or (request.distro or there[0]) not in there:
            raise AshError(f"there is no {request.distro or 'system'} managed by ash", "", MISSING)
        layout = Layout.at(top, request.distro or there[0])
        with contextlib.nullcontext() if changes else contextlib.suppress(AshError):
            mount_boot_partition(layout, request.image)
        distro = load_distro(read_distro(layout.distro_file)[1])
        system = cls(layout, distro, wait=request.wait, image=request.image)
        if system._runs_here():
            cls._require_no_chroot(request)
            system.running = True
        return system

    def _runs_here(self) -> bool:
        """Whether "/" is a slot or snapshot of this system: so it is the running one, though it was named by --root."""
        root = mount_of(Path("/"))
        if root.kind != "btrfs" or root.device != mount_of(self.layout.snapshots).device:
            return False
        every: list[int | str] = [*SLOTS, *SECONDARY_SLOTS, *numbered(self.layout.snapshots / "rootfs", "snapshot-")]
        return any(self._has_id(which, root.subvolume) for which in every)

    @staticmethod
    def _require_no_chroot(request: Request) -> None:
        if is_in_chroot() and not request.chroot:
            raise AshError("ash must not be run inside a chroot", "--chroot overrides this", REFUSED)

    # Reading

    def configuration(self) -> Configuration:
        """The running system's /etc/ash.conf; for a disk that is not running, that of the slot that counts as such."""
        path = Path("/etc/ash.conf")
        if not self.running:
            path = path_inside(self.layout.rootfs(self.last_good_slot() or BASE), "etc/ash.conf")
        return Configuration.parse(read_text(path))

    def tree(self) -> Tree:
        return Tree.parse(read_text(self.layout.tree))

    def menu(self) -> Menu:
        return Menu.load(self.layout.menu)

    def deployments(self) -> Deployments:
        """The deployments, with the menu as it is now."""
        notes = GrubNotes(self.layout, self.image)
        boot_menu = BootMenu(self.layout, self.distro, notes, self.describe)
        trials = Trials(notes, self.configuration)
        found = Deployments(self.layout, self.distro, trials, boot_menu, booted=self.booted_slot)
        found.wait = self.wait
        found.homes = self.homes
        return found

    def describe(self, snapshot: int) -> str:
        """A snapshot's description, on one line."""
        return " ".join(read_bytes(self.layout.description(snapshot)).decode("utf-8", "replace").split())

    @property
    def booted_slot(self) -> str | None:
        """The slot of the running deployment; None if none runs."""
        if not self.running:
            return None
        if not self.sees_snapshots:
            name = self._root_name()
            return name if name in (*SLOTS, *SECONDARY_SLOTS) else None
        root = self._root_id()
        return next((slot for slot in (*SLOTS, *SECONDARY_SLOTS) if self._has_id(slot, root)), None)

    @property
    def booted(self) -> int | str | None:
        """What runs: a slot, the number of a snapshot that was booted directly, or None."""
        slot = self.booted_slot
        if slot or not self.running:
            return slot
        if not self.sees_snapshots:
            return next((number for number in self.tree().numbers() if str(number) == self._root_name()), None)
        root = self._root_id()
        return next((number for number in self.tree().numbers() if self._has_id(number, root)), None)

    @property
    def sees_snapshots(self) -> bool:
        """Whether this process may look into snapshots and deployments; only root may."""
        return os.access(self.layout.private[0], os.X_OK)

    @staticmethod
    def _root_name() -> str:
        """What is mounted as "/", by the name that the kernel has for it; only for those who may not see its id.

        It is right as long as ash never exchanges what runs.
        """
        options = next(m.options for m in reversed(mounts()) if m.target == "/")
        found = re.search(r"/rootfs/snapshot-([\w-]+)", options)
        return found[1] if found else ""

    @staticmethod
    def _root_id() -> int | None:
        """The id of the subvolume that is mounted as "/"."""
        return next(m.subvolume for m in reversed(mounts()) if m.target == "/")

    def _has_id(self, which: int | str, ident: int | None) -> bool:
        try:
            return subvolume_id(self.layout.rootfs(which)) == ident
        except OSError:
            return False

    def last_booted_slot(self) -> str:
        """The booted slot; on a disk that is not running, the last one booted. Empty if there is none."""
        return self.booted_slot or ("" if self.running else noted_slot(self.layout) or self.menu().last_booted)

    def last_good_slot(self) -> str:
        """The slot whose /etc counts as the running one: the last that was booted, or if none was yet, the default."""
        return self.booted_slot or noted_slot(self.layout) or self.menu().last_good

    def copies_of_disk(self) -> list[str]:
        """The attached devices that are copies of the running system's disk."""
        return copies_of_disk(Path(mount_of(Path("/")).source)) if self.running else []

    def note_boot(self) -> None:
        """Note which deployment runs, unless the boot has: not every init system does, nor did deployments before."""
        with contextlib.suppress(AshError, OSError):  # the menu may be damaged, the disk full or read-only
            slot = self.booted_slot if self.running else None
            deployment = self.menu().deployments.get(slot) if slot else None
            if slot and deployment and noted_slot(self.layout) != slot:
                if own_slot_and_id(self.layout, slot) != (slot, deployment.id):  # its time tells what was changed since
                    write_inside(self.layout.rootfs(slot), IN_ROOT_ID, deployment.note)
                write_file(self.layout.booted, deployment.note)

    def running_slot(self) -> str:
        """The booted slot, for --live; raises AshError (REFUSED) if no deployment runs."""
        slot = self.booted_slot
        if slot is None:
            raise AshError("no deployment of this system is running", "leave out --live", REFUSED)
        return slot

    def snapshot_of(self, which: int | str) -> int:
        """The number of a snapshot, or of the one that a slot's deployment was made from."""
        return which if isinstance(which, int) else snapshot_of_slot(self.layout, which)

    @property
    def current(self) -> int | None:
        """The number of the booted snapshot; None if this system is not running."""
        booted = self.booted
        if isinstance(booted, str) and not self.sees_snapshots:
            return to_number(read_text(Path("/", IN_ROOT_SNAP)))
        return None if booted is None else self.snapshot_of(booted)

    def make_private(self) -> None:
        """Close the directories of all snapshots to all but root, as an older ash did not."""
        with contextlib.suppress(OSError):  # fsck reports what is wrong with them
            for directory in self.layout.private:
                if directory.stat().st_mode & 0o077:
                    about_to(f"make {directory.name} private")
                    directory.chmod(0o700)

    # Checks

    def require(self, snapshot: int) -> None:
        """Raise AshError (MISSING) unless a snapshot exists."""
        if snapshot not in self.tree():
            raise AshError(f"snapshot {snapshot} does not exist", "ash tree lists the snapshots", MISSING)

    def require_changeable(self, snapshot: int, base: bool = False) -> None:
        """Raise AshError unless a snapshot exists and may be changed: not a mounted one, the base only with `base`."""
        self.require(snapshot)
        if snapshot == BASE and not base:
            then = ", ash deploy of the copy, then reboot" if self.current == BASE else ""
            raise AshError("snapshot 0 is the base: it cannot be changed", f"change a copy: ash clone 0{then}", REFUSED)
        if is_mounted(self.layout.rootfs(snapshot)):
            hint = f"change a copy: ash clone {snapshot}"
            raise AshError(f"snapshot {snapshot} is mounted: it cannot be changed", hint, REFUSED)

    # Changing

    def lock(self, name: int | str) -> Lock:
        """The lock of a snapshot (by number), or a global one: "deploy", "live", "state", "auto-upgrade"."""
        if name == "state":
            return state_lock(self.layout, self.wait)
        what = f"snapshot {name}" if isinstance(name, int) else f"{name} of {self.layout.distro}"
        return Lock(self.layout.work(name) / "lock", what, self.wait)

    @cached_property
    def homes(self) -> Mapping[str, Path]:
        """The live directories of HOMES: ash's own, or on the running system what is mounted in their place."""
        own = {"home": self.layout.home, "root": self.layout.home_root}
        return own | {name: Path("/", name) for name, kind in self._foreign_homes.items() if kind not in NEVER_LOWER}

    @cached_property
    def unseen_homes(self) -> Mapping[str, str]:
        """Those HOMES that no transaction can see, with the kind of their file system. It sees what that hides."""
        return {name: kind for name, kind in self._foreign_homes.items() if kind in NEVER_LOWER}

    @cached_property
    def _foreign_homes(self) -> Mapping[str, str]:
        """The kinds of the file systems that are mounted on HOMES in place of ash's own directories."""
        found = {}
        for name, own in {"home": self.layout.home, "root": self.layout.home_root}.items() if self.running else ():
            path, mount = Path("/", name), mount_of(Path("/", name))
            if mount.target == str(path) and inode_of(path) not in (None, inode_of(own)):
                found[name] = mount.kind
        return found

    def workdir(self, snapshot: int) -> WorkDir:
        return WorkDir(self, snapshot)

    @contextmanager
    def deploying(self) -> Iterator[Deployments]:
        with self.lock("deploy"):
            yield self.deployments()
            self.renew_snapshot_menu()  # its entries have the options of the default's

    @contextmanager
    def editing_tree(self) -> Iterator[Tree]:
        """The tree, with the lock "state" held; written to disk when the block ends without an error.

        Then GRUB's submenu with all snapshots is, too.
        """
        with self.lock("state"):
            tree = self.tree()
            yield tree
            write_file(self.layout.tree, tree.dump())
            self.write_snapshot_menu()

    def write_snapshot_menu(self, lock: Lock | None = None) -> None:
        """Have GRUB's submenu with all snapshots show the tree; a `lock` is taken, else the caller holds "state".

        A failure is only said: the submenu is old then, and fsck finds that.
        """
        try:
            with lock or contextlib.nullcontext():
                self.deployments().boot_menu.write_startable(self.tree())
        except (AshError, OSError) as error:
            console.warn(f"the boot menu with all snapshots is not renewed: {reason(error)}")

    def renew_snapshot_menu(self) -> None:
        """The same for a caller without the lock."""
        self.write_snapshot_menu(self.lock("state"))

    def new_number(self) -> int:
        """A snapshot number that was never used before; recorded on disk before it is returned."""
        with self.lock("state"):
            last = to_number(read_text(self.layout.last)) if self.layout.last.exists() else 0
            if last is None:
                raise AshError(f"{self.layout.last} does not contain a number", "ash fsck --repair")
            names = [path.name.removeprefix("snapshot-") for path in (self.layout.snapshots / "rootfs").iterdir()]
            number = max(last, *self.tree().numbers(), *(to_number(name) or 0 for name in names)) + 1
            if not is_u32(number):
                raise AshError("no snapshot numbers are left", f"the last one used is in {self.layout.last}")
            write_file(self.layout.last, f"{number}\n")
        return number

    def free_reserve(self) -> None:
        self.layout.reserve.unlink(missing_ok=True)
        sync_filesystem(self.layout.snapshots)

    def with_reserve(self, work: Callable[[], Result], *, once: bool = False) -> Result:
        """Run `work`; on ENOSPC release the emergency reserve and retry, with `once` not after a commit."""
        try:
            return work()
        except (AshError, OSError) as error:
            if not is_out_of_space(error) or (once and isinstance(error, CommittedButUnfinished)):
                raise
        self.free_reserve()
        return work()

    def keep_reserve(self) -> None:
        """Create the emergency reserve, for commands that free space on a full disk, if there is enough space now."""
        reserve, attributes = self.layout.reserve, RESERVE_OF_TREES // ATTRIBUTE
        is_complete = size_of(reserve) == RESERVE and len(os.listxattr(reserve)) == attributes
        if free_space(self.layout.snapshots) > SPACE_FLOOR and not is_complete:
            with contextlib.suppress(OSError):
                reserve.write_bytes(os.urandom(RESERVE))  # incompressible
                for number in range(attributes):
                    os.setxattr(reserve, f"user.{number}", bytes(ATTRIBUTE))


# --- Snapshots: copy, undo, delete -----------------------------------------------------------------------------


def packages_of(system: System, snapshot: int) -> dict[str, str]:
    """The packages of a snapshot, with their versions: those recorded, else (an older ash's) from its database."""
    recorded = read_packages(system.layout, snapshot)
    return system.package_manager.installed(system.layout.rootfs(snapshot)) if recorded is None else recorded


def require_replaceable(system: System, snapshots: Sequence[int], outcome: str) -> None:
    """Raise AshError (REFUSED) if any of the snapshots is the base, booted or deployed, and so `outcome`."""
    menu = system.menu()
    deployed = {one.snapshot for one in menu.deployments.values()}
    slots = (menu.default, menu.last_booted, menu.good, system.last_good_slot())
    shown = {menu.deployments[slot].snapshot for slot in slots if slot in menu.deployments}
    for number in snapshots:
        if number == BASE:
            raise AshError(f"snapshot 0 is the base: it is {outcome}", "", REFUSED)
        root = system.layout.rootfs(number)
        if number == system.current or (is_subvolume(root) and is_mounted(root)):
            raise AshError(f"snapshot {number} is booted: it is {outcome}", "", REFUSED)
        if number in deployed:
            hint = "deploy another one, reboot, try again" if number in shown else f"ash deploy {number} --no-secondary"
            raise AshError(f"snapshot {number} is deployed: it is {outcome}", hint, REFUSED)


@contextmanager
def new_snapshot(
    system: System, source: Path, description: str, of: int, parent: int | None, *, copies_of: int | None = None
) -> Iterator[int]:
    """Create a snapshot, which the block must add to the tree; otherwise it is deleted when the block ends.

    Args:
        source: the root to copy.
        of: the snapshot of which `source` is the present, an earlier, or the running state.
        parent: the snapshot below which the block adds it; None for the top level.
        copies_of: the snapshot whose `etc-N`, `boot-N` and list of packages fit `source`; None if there is none.
    """
    number = system.new_number()
    system.keep_reserve()
    layout, place = system.layout, system.workdir(number)
    birth = Birth(of, parent, description, system.caller, new_id())
    with system.lock(number), ExitStack() as undo:
        undo.callback(lambda: place.recover(system.tree()))  # an error may have come after the tree was written
        save_intent(place.directory, birth)
        root = layout.rootfs(number)
        snapshot_subvolume(source, root, readonly=True)
        if is_mutable(root):  # asked here, since another ash may exchange the source at any time
            set_readonly(root, False)
        for directory in ("etc", "boot"):
            if copies_of is not None and layout.copy(directory, copies_of).exists():
                snapshot_subvolume(layout.copy(directory, copies_of), layout.copy(directory, number), readonly=True)
            else:
                renew_copy(layout, number, directory)
        packages = None if copies_of is None else read_packages(layout, copies_of)
        if packages is None:
            packages = system.package_manager.installed(root)
        write_packages(layout, number, packages, durable=True)  # a failing disk is noticed before the tree is written
        write_file(layout.description(number), f"{description}\n")
        yield number
        recorded = birth.record(place)
        undo.pop_all()
        if recorded:
            remove_tree(place.directory / "intent")


@contextmanager
def new_copy(system: System, snapshot: int, description: str, parent: int | None) -> Iterator[int]:
    """new_snapshot() of another snapshot; one that is being changed is copied as it was before."""
    system.require(snapshot)
    copy = partial(new_snapshot, system, system.layout.rootfs(snapshot), description, snapshot, parent)
    with ExitStack() as stack:
        try:
            with system.lock(snapshot):
                system.workdir(snapshot).recover(system.tree())
                number = stack.enter_context(copy(copies_of=snapshot))
        except AshError as error:
            if error.status not in (LOCKED, REFUSED):
                raise
            number = stack.enter_context(copy())
        yield number


def copy_snapshot(system: System, snapshot: int, parent: int | None, description: str) -> int:
    """Copy a snapshot, below another or (None) to the top level. Returns the new number."""
    with new_copy(system, snapshot, description, parent) as number, system.editing_tree() as tree:
        tree.add(number, parent)
    return number


def copy_branch(system: System, snapshot: int, description: str) -> dict[int, int]:
    """Copy a snapshot with all its descendants, next to it. Returns the copies by the originals' numbers."""
    tree, copies = system.tree(), dict[int, int]()
    parents: dict[int, int | None] = {}  # of the copies
    with ExitStack() as stack:
        for number in tree.branch(snapshot):
            above = tree.parent(number)
            parent = above if above is None else copies.get(above, above)
            text = description if number == snapshot else system.describe(number)
            copies[number] = stack.enter_context(new_copy(system, number, text, parent))
            parents[copies[number]] = parent
        with system.editing_tree() as tree:
            for copy, parent in parents.items():
                tree.add(copy, parent)
    return copies


def require_predecessor(system: System, snapshot: int) -> None:
    """Raise AshError (REFUSED) if a snapshot has no state before its last change."""
    if not system.layout.undo(snapshot).exists():
        raise AshError(f"snapshot {snapshot} has no earlier state that could be restored", "", REFUSED)


def undo_change(system: System, snapshot: int, just_changed: bool = False) -> Change:
    """Exchange a snapshot and its predecessor. Doing it twice is a redo. Its deployments stay as they are.

    With `just_changed` it is this command's own change, which then counts as never made.
    AshError (REFUSED) if there is no predecessor, or the snapshot is the base or booted directly.
    """
    system.require_changeable(snapshot)
    layout, place = system.layout, system.workdir(snapshot)
    now, before = layout.rootfs(snapshot), layout.undo(snapshot)
    with system.lock(snapshot), system.lock("deploy"), signals_held():
        place.recover(system.tree())
        require_predecessor(system, snapshot)
        change = Change.between(snapshot, *map(system.package_manager.installed, (now, before)))
        facts = {"packages": change.packages()}
        intent = place.swap(before, Commit(copies=["boot", "etc"], facts=facts, caller=system.caller))
        system.with_reserve(partial(place.finish, intent, again=True))  # a retry must not repeat the history's line
        system.done = [c for c in system.done if c.snapshot != snapshot] if just_changed else [*system.done, change]
    return change


def make_mutable(system: System, snapshot: int, mutable: bool) -> bool:
    """Make a snapshot mutable, or read-only again with all changes made to it. Returns False if it was so already."""
    system.require_changeable(snapshot)
    root = system.layout.rootfs(snapshot)
    with system.lock(snapshot), signals_held():
        place = system.workdir(snapshot)
        place.recover(system.tree())
        if is_mutable(root) == mutable:
            return False
        require_directories(root)
        save_intent(place.directory, Open())
        try:
            snapshot_subvolume(root, place.root)
            mark = place_inside(place.root, IN_ROOT_MUTABLE)
            if mutable:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
            else:
                mark.unlink()
                set_readonly(place.root)
            commit = Commit(copies=["boot", "etc"], facts={"mutable": mutable}, caller=system.caller)
            intent = place.swap(place.root, commit)
        except BaseException:
            place.drop()
            raise
        place.finish(intent)
    return True


def delete_data(system: System, change: Change) -> Change:
    """Delete what removed packages left in /var; what other snapshots' packages claim is `kept` in the result."""
    others = [system.layout.rootfs(n) for n in system.tree().numbers() if n != change.snapshot]
    with merge_lock(system.layout, wait=600), nosymfollow(system.layout.var):
        kept = [path for path in change.kept if not is_deletable(path)]
        for path in sorted({*change.kept} - {*kept}):
            inside = Path(path).relative_to("/var")
            entry = str(Path(*inside.parts[:2])) if inside.parts[0] in ENTRY_DIRECTORIES else inside.parts[0]
            if any(system.package_manager.claims(root, entry) for root in others):
                kept.append(path)
            elif has_real_parents(system.layout.var, str(inside)):
                left = remove_beside_neighbours(system.layout.var / inside)
                kept += [f"/var/{neighbour.relative_to(system.layout.var)}" for neighbour in left]
        sync_filesystem(system.layout.snapshots)
    return change._replace(kept=kept)


def newer_state(system: System, change: Change) -> list[str]:
    """The packages that an undo downgraded or removed and whose state in /var/lib stays that of the newer version."""
    older = [name for name, (old, new) in change.upgraded.items() if system.package_manager.is_older(new, old)]
    root = system.layout.undo(change.snapshot)
    return [name for name in (*older, *change.removed) if system.package_manager.has_state(root, name)]


def numbers_to_delete(system: System, snapshots: Sequence[int], remains: bool = False) -> list[int]:
    """Snapshots and their descendants, in order; `remains` allows lost ones, of which parts are on the disk."""
    tree = system.tree()
    lost = [n for n in snapshots if remains and n not in tree and system.workdir(n).remains()]
    known = {number for snapshot in snapshots if snapshot not in lost for number in tree.branch(snapshot)}
    return sorted({*known, *lost})


def delete_parts(system: System, snapshots: Sequence[int]) -> None:
    """Delete all parts of snapshots that have been removed from the tree."""
    for number in snapshots:
        system.workdir(number).delete_snapshot()
    # Otherwise a power cut could keep the small files deleted (btrfs logs those) but not the subvolumes.
    sync_filesystem(system.layout.snapshots)


def delete_work_directories(system: System, snapshots: Sequence[int]) -> None:
    """Delete the work directories of snapshots, the intents with them."""
    for work in filter(Path.exists, map(system.layout.work, snapshots)):
        for left in sorted(work.iterdir()):
            remove_tree(left)
        try:
            work.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # a process that waits for the lock has created it again
                raise


def recover_each(system: System, snapshots: Sequence[int]) -> None:
    """Finish or undo the interrupted work on snapshots whose locks are held."""
    tree = system.tree()
    for number in snapshots:
        system.workdir(number).recover(tree)


def delete_snapshots(system: System, snapshots: Sequence[int], remains: bool = False) -> list[int]:
    """Delete snapshots with their descendants, all or none: AshError if one is in use or locked. Returns them."""
    tree, numbers = system.tree(), numbers_to_delete(system, snapshots, remains)
    deletion = Deletion(numbers, system.caller, new_id())
    delete_deferred(system.layout)
    with ExitStack() as stack:
        for number in numbers:
            stack.enter_context(system.lock(number))
            system.workdir(number).recover(tree)
        stack.enter_context(system.lock("deploy"))
        require_replaceable(system, numbers, "not deleted")
        undo = stack.enter_context(ExitStack())  # if the tree cannot be changed, or after a power cut
        undo.callback(recover_each, system, numbers)
        for number in numbers:
            save_intent(system.layout.work(number), deletion, durable=False)
        sync_filesystem(system.layout.snapshots)  # once for all, and before the lock "state" is taken
        with system.editing_tree() as tree:
            if late := sorted({n for one in snapshots if one in tree for n in tree.branch(one)} - {*numbers}):
                what = f"{listed(late)} was created below it meanwhile: nothing is deleted"
                raise AshError(what, "repeat the command to delete that too", LOCKED)
            for snapshot in snapshots:
                if snapshot in tree:
                    tree.remove(snapshot)
        undo.pop_all()
        system.with_reserve(partial(delete_parts, system, numbers))
        if deletion.record(system.workdir(numbers[0])):
            system.with_reserve(partial(delete_work_directories, system, numbers))
    return numbers


# --- Live changes: changes to the running deployment -----------------------------------------------------------


class LiveResult:
    """What a change did to the running deployment; `--json` prints it."""

    def __init__(self) -> None:
        self.changed = False
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.restarted: list[str] = []  # or made to read their configuration again
        self.outdated: list[str] = []  # services and programs that still run as they were before
        self.waiting: list[str] = []  # what needs a reboot
        self.conflicts: list[str] = []  # of /etc, /var, /home and /root
        self.conflicts_folders: list[str] = []
        self.kept: list[str] = []  # of what failed: what is in place in /var, /home and /root
        self.error = ""

    def text(self) -> str:
        """The result for people."""
        if self.error:
            but = f", except for {listed(self.kept)}" if self.kept else ""
            return f"the running system is unchanged{but}: {one_line(self.error)}"
        lines = [f"the running system is {'changed too' if self.changed else 'unchanged'}"]
        lines += [f"  started: {listed(self.started)}"] if self.started else []
        lines += [f"  stopped: {listed(self.stopped)}"] if self.stopped else []
        lines += [f"  restarted: {listed(self.restarted)}"] if self.restarted else []
        if self.conflicts:
            lines.append(f"  changed meanwhile, left as it is: {listed(self.conflicts)}")
            lines += [f"  the new version is in {directory}" for directory in self.conflicts_folders]
        lines += [f"  needs a deploy and a reboot: {listed(self.waiting)}"] if self.waiting else []
        lines += [f"  runs as before until it is restarted: {listed(self.outdated)}"] if self.outdated else []
        return "\n".join(lines)


class LiveWorkDir(WorkDir):
    """The work directory of a live change, with a snapshot of the running deployment as it was before.

    The number of the snapshot that the running deployment was made from only names conflicts directories.
    """

    def __init__(self, system: System, snapshot: int = BASE) -> None:
        super().__init__(system, snapshot, "live")
        self.alone = self.layout.work("merge") / "live-only"  # exists until somebody else merges, see MergeLock
        self.base = self.directory / "etc"  # a copy of the base for drift as it was
        self.like: Path | None = None  # the snapshot in which the same was done

    def recover(self, tree: Tree, drop_kept: bool = False, *, strict: bool = False) -> None:  # noqa: ARG002
        with self.deploy_lock() if state_of_work(self.directory) == "live" else contextlib.nullcontext():
            if kept := self.roll_back(drop_kept):
                console.say(
                    one_line(f"ash: an interrupted change of the running system is undone, except for {listed(kept)}")
                )

    def roll_back(self, drop_kept: bool = False) -> list[str]:
        """recover() for callers that hold the lock "deploy", or have applied nothing.

        Returns what stays in place in /var, /home and /root.
        """
        intent, kept = self.intent(drop_kept), []
        if isinstance(intent, LiveChange):
            slot = self.layout.rootfs(intent.slot)
            if is_subvolume(slot) and subvolume_id(slot) == intent.old:
                self.apply(intent.slot, self.root, self.before)
                self._put_base_back(intent.slot)
            kept = self._take_back(intent.entries, intent.clock)
            self.mark_done()
        self.drop()
        return kept

    def _take_back(self, entries: Iterable[str], clock: Sequence[int]) -> list[str]:
        """Undo a merge, as far as nobody else has changed the entries since. Returns what stays.

        What was added to logs and caches is not counted.
        """
        try:
            token = from_json(read_text(self.decisions), self.DECISIONS)["token"]
        except ValueError:  # the merge had not begun
            return []
        merge, notes = self.var_merge(), self.notes()
        merge.token = token
        placed = [entry for entry in entries if "place" in notes.get(entry, ())]
        placed = [entry for entry in placed if notes[entry][-1] not in (SET_ASIDE, "keep")]
        with self.live_var():
            for entry in entries:
                merge.delete_torn(entry)
            left = placed and self._take_back_entries(merge, placed)
        kept = [f"/var/{entry}" for entry in left]
        for home in [self.home_merge(name, merge, clock) for name in self.changed_homes()]:
            if not home.is_missing:
                with nosymfollow(home.live):
                    with contextlib.suppress(OSError):  # somebody deletes there right now
                        kept += map(home.shown, home.placed())
                    for inside in {path.rpartition("/")[0] for path in paths_below(home.upper)}:
                        if is_directory(home.live / inside):
                            remove_tree(temporary_name(home.live / inside / "x", token))
        sync_filesystem(self.layout.snapshots)
        return kept

    def _take_back_entries(self, merge: VarMerge, placed: Sequence[str]) -> list[str]:
        """Take entries of /var back, unless another change was merged since, which may have needed them.

        Returns those that stay.
        """

        def is_back(entry: str) -> bool:
            try:
                return merge.take_back(entry)
            except OSError:  # somebody changes it right now
                return False

        try:
            with Lock(self.layout.work("merge") / "lock", "merging into /var", wait=600):
                if not self.alone.exists():
                    return [*placed]
                return [entry for entry in placed if not is_back(entry)]
        except AshError:  # others merge all the time
            return [*placed]

    def _put_base_back(self, slot: str) -> None:
        """Make the base for drift what it was."""
        if is_subvolume(self.base):
            beside, base = self.layout.etc(f"new-{slot}"), self.layout.etc(slot)
            delete_subvolume(beside)
            snapshot_subvolume(self.base, beside, readonly=True)
            replace_subvolume(beside, base)
            sync_filesystem(self.layout.snapshots)

    @property
    def subvolumes(self) -> tuple[Path, ...]:
        return (*super().subvolumes, self.base)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.alone, *super().files)

    def deploy_lock(self) -> Lock:
        """The lock "deploy"; a live change waits for it."""
        return Lock(self.layout.work("deploy") / "lock", "deploying", wait=600)

    def mark_done(self) -> None:
        """Record that the slot is consistent: from now on an interruption only drops the leftovers."""
        save_intent(self.directory, Open())

    def paths(self) -> set[str]:
        """The changed paths that are applied: not /etc, which is merged, and no kernels with their modules."""
        changed = changed_paths(self.before, self.root)
        modules = modules_of_changed_kernels(changed, self.before, self.root)
        elsewhere = ("etc/", "boot/", *(f"{directory}/" for directory in modules))
        paths = {path for path in changed if not path.startswith(elsewhere)}
        below = self._others_below(paths, self.before) | self._others_below(paths, self.root)
        return paths | {path for path in below if not path.startswith(elsewhere)}

    def _others_below(self, paths: Iterable[str], root: Path) -> set[str]:
        """The other changed paths in directories: btrfs reports only the directory if it is new, deleted or moved."""
        inside = {
            f"{path}/{name}"
            for path in paths
            if has_real_parents(root, path) and is_directory(root / path)
            for name in paths_below(root / path)
        }
        return {path for path in inside if not is_untouched(path, self.before, self.root)}

    def apply(self, slot: str, old: Path, new: Path) -> EtcMerge:
        """Apply old to new in a slot. Returns the /etc merge; files changed meanwhile are kept."""
        layout, root = self.layout, self.layout.rootfs(slot)
        others = [one.slot for one in self.system.menu().deployments.values() if one.etc_from == slot]
        waiting = [one for one in others if is_subvolume(layout.carried(one))]
        bases = [(layout.etc(f"new-{slot}"), layout.etc(slot))]
        bases += [(layout.carried(f"new-{one}"), layout.carried(one)) for one in waiting]
        with nosymfollow(root):
            apply_paths(self.paths(), new, root)
            for beside, base in bases:  # so that this change is not drift
                delete_subvolume(beside)
                snapshot_subvolume(base, beside)
                merge = self._etc_merge(old, new, beside)
                merge.keep_conflicts = False
                with nosymfollow(beside):
                    merge.merge()
                    if self.like and base == layout.etc(slot):
                        self._leave_edits(merge, self.like / "etc")
            running = self._etc_merge(old, new, root / "etc")
            running.merge()
        for beside, base in bases:
            set_readonly(beside)
            replace_subvolume(beside, base)
        sync_filesystem(layout.snapshots)
        return running

    @staticmethod
    def _leave_edits(merge: EtcMerge, theirs: Path) -> None:
        """Have the base contain, of what was merged into it, what the snapshot has, whose /etc is `theirs`.

        Scripts may rename, copy or convert files that were edited in the running system: what they make is an edit too.
        """
        for path in sorted({*merge.carried, *merge.in_conflict}, reverse=True):
            own, there = merge.target / path, theirs / path
            if path in (*ACCOUNT_FILES, "fstab") or not has_real_parents(merge.target, path) or is_same(own, there):
                continue
            if not os.path.lexists(there):
                if not is_directory(own) or not any(own.iterdir()):
                    remove_tree(own, protected=True)
            elif not is_directory(own) and not is_directory(there):
                replace_by_copy(there, own, protected=True)

    def _etc_merge(self, old: Path, new: Path, etc: Path) -> EtcMerge:
        merge = EtcMerge(old / "etc", new / "etc", etc, self.layout.conflicts(self.snapshot), str)
        merge.identity = False
        return merge


class LiveTransaction(Transaction):
    """A change to the running deployment: made in a snapshot of it, then applied live; rolled back on failure.

    Entering it raises AshError too if no deployment is running, or another live change is in progress.
    """

    place: LiveWorkDir

    def __init__(self, system: System) -> None:
        slot = system.running_slot()
        super().__init__(system, system.snapshot_of(slot), base=True)
        self.slot = slot
        self.place = LiveWorkDir(system, self.snapshot)
        self.original, self.root, self.var = self.place.before, self.place.root, self.place.origin
        self.live = LiveResult()
        self.services = Services(self.live, system.running)

    @property
    def asked(self) -> Path:
        """What scripts of packages ask to be done with services."""
        return self.place.private / "services"

    def chroot(self) -> Chroot:
        """Where scripts of packages find the init system running, so that they tell what they would restart."""
        chroot, marker = super().chroot(), self.services.init.marker
        if not marker:
            return chroot
        directory = self.place.private / "marker"
        directory.mkdir(exist_ok=True)
        self.asked.touch()
        return chroot._replace(binds=[*chroot.binds, (directory, marker), (self.asked, ASKED_OF_SERVICES)])

    def _begin(self) -> None:
        self.place.directory.mkdir(parents=True, exist_ok=True)
        save_intent(self.place.directory, self.intent)
        snapshot_subvolume(self.layout.rootfs(self.slot), self.place.before, readonly=True)
        super()._begin()

    def _commit(self) -> None:
        with ExitStack() as stack:
            self._apply_live(stack)

    def _apply_live(self, stack: ExitStack) -> None:
        """Apply the change, or roll it back. The stack holds the lock "deploy" until either is done."""
        place, services = self.place, self.services
        try:
            found = self._conclude()
            replaced = {name for name, old in found.before.items() if found.after.get(name) != old}
            self.live.waiting = sorted(name for name in replaced if re.fullmatch(self.system.distro.not_live, name))
            if self.live.waiting:
                place.drop()
                return
            self.live.waiting = sorted(path for path in found.paths if path.startswith("boot/"))
            with signals_heard():
                stack.enter_context(place.deploy_lock())
            slot = self.layout.rootfs(self.slot)
            save_intent(place.directory, LiveChange(self.slot, subvolume_id(slot), found.entries, self.intent.clock))
            sync_filesystem(self.layout.snapshots)
            services.stop(found.paths)
            snapshot_subvolume(self.layout.etc(self.slot), place.base, readonly=True)
            # Not while services start: that may take minutes, and some of them may run ash.
            with place.merge_lock(found.entries):
                etc = place.apply(self.slot, place.before, self.root)
                if found.entries:
                    about_to("note that nobody else has merged")
                    place.alone.touch()
                merged = place.merge(found.entries, found.delete, self.intent.clock)
            if merged.failed:
                remove_tree(self.layout.unmerged / merged.directory.name)
                raise AshError("; ".join(f"{path} cannot be changed: {why}" for path, why in merged.failed.items()))
            services.start(found.paths, read_text(self.asked))
            if found.directories - {"boot"}:
                write_inside(slot, IN_ROOT_LIVE, "")
            sync_filesystem(self.layout.snapshots)
            place.mark_done()
        except BaseException as error:
            services.stop_started()  # they may have files open that are taken back
            self.live.kept = place.roll_back()
            services.put_back()
            done = f"the effects of starting {listed(self.live.started)} are not undone" if self.live.started else ""
            if self.live.kept and not isinstance(error, AshError | OSError):
                console.say(one_line(f"ash: the running system is unchanged, except for {listed(self.live.kept)}"))
            if done and isinstance(error, AshError):
                raise AshError(f"{error.message}; {done}", error.hint, error.status) from error
            if done:  # such as KeyboardInterrupt, which has no message
                console.say(f"ash: {done}")
            raise
        self.live.changed = bool(found.directories - {"boot"})
        self.live.conflicts = [*(f"/etc/{path}" for path in etc.in_conflict), *merged.conflicts]
        directories = [path for path in dict.fromkeys((etc.conflicts, merged.directory)) if path.is_dir()]
        self.live.conflicts_folders = [f"/var/{directory.relative_to(self.layout.var)}" for directory in directories]
        place.drop()


Work = Callable[[Transaction], object]


def bring_generated(work: Transaction, newer: Path, older: Path) -> None:
    """Bring files that scripts made in /etc in the last change of a snapshot, such as keys, before they run again.

    They would make others in the running system, which do not fit what was written to the shared /var the first time.
    """
    theirs, ours = newer / "etc", work.root / "etc"
    made = paths_below(theirs) - paths_below(older / "etc") - paths_below(ours)
    for path in sorted(made - work.package_manager.files(newer, "etc")):
        if size_of(theirs / path) < 0 or re.fullmatch(NOT_DRIFT, path):
            continue
        for parent in [str(one) for one in reversed(Path(path).parents) if one.name]:
            if has_real_parents(ours, parent) and not os.path.lexists(ours / parent):
                replace_by_copy(theirs / parent, ours / parent)
        if has_real_parents(ours, path):
            replace_by_copy(theirs / path, ours / path)


def change_live(
    system: System, doing: str, work: Work, done: Sequence[Change] = (), elsewhere: Sequence[Change] = ()
) -> LiveResult:
    """Apply a change to the running deployment; on failure it is rolled back, and `error` of the result says why.

    Args:
        doing: what it does, for messages.
        work: the change.
        done: what the same work has done to snapshots before.
        elsewhere: what other work with the same aim has done to them.
    """
    transaction = LiveTransaction(system)
    number = transaction.snapshot
    numbers = [change.snapshot for change in (*done, *elsewhere)] or [number]
    transaction.place.like = system.layout.rootfs(number if number in numbers else numbers[0])
    try:
        with step(f"{doing} the running system"), transaction:
            if any(change.snapshot == number and change.packages_changed() for change in done):
                bring_generated(transaction, system.layout.rootfs(number), system.layout.undo(number))
            work(transaction)
    except (AshError, OSError) as error:
        console.say(one_line(f"ash: {reason(error)}"))
        transaction.live.changed, transaction.live.error = False, reason(error)
    return transaction.live


def goes_live(system: System, request: Request, snapshots: Sequence[int], by_default: bool = True) -> bool:
    """Whether to change the running system too: if the user says so, by default if its own snapshot is changed.

    Raises AshError (REFUSED) if the user says so and no deployment runs.
    """
    if request.live:
        system.running_slot()
        return not request.dry_run
    runs = isinstance(system.booted, str) and system.current in snapshots
    return by_default and request.live is None and runs and not request.dry_run


def is_live(system: System, newer: Path, older: Path) -> bool:
    """Whether the last change of the booted snapshot, from `older` to `newer`, was put into the running deployment.

    Otherwise the deployment was made with that change, or does not have it.
    """
    deployment = system.menu().deployments.get(system.booted_slot or "")
    if not deployment or deployment.source == subvolume_id(newer):
        return False
    before, after, here = map(system.package_manager.installed, (older, newer, system.layout.rootfs(deployment.slot)))
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    return bool(changed) and all(here.get(name) == after.get(name) for name in changed)


def take_back(work: Transaction, newer: Path, older: Path) -> None:
    """Take the change of a snapshot from `older` to `newer` out of a clone of the running deployment."""
    if work.package_manager.installed(work.root) != work.package_manager.installed(newer):
        what = "the running system has other packages than its snapshot had before the undo"
        raise AshError(what, f"ash deploy {work.snapshot}, then reboot", REFUSED)
    with readonly_view(work.layout, newer) as new, readonly_view(work.layout, older) as old:
        paths = set(changed_paths(new, old))
        below = {
            f"{path}/{name}"
            for root in (new, old)
            for path in paths
            if has_real_parents(root, path) and is_directory(root / path)
            for name in paths_below(root / path)
        }
        apply_paths({path for path in paths | below if not f"{path}/".startswith("etc/")}, old, work.root)
        merge = EtcMerge(new / "etc", old / "etc", work.root / "etc", work.layout.conflicts(work.snapshot), str)
        merge.identity = merge.keep_conflicts = False
        merge.merge()


# --- Deploying, recovering -------------------------------------------------------------------------------------


def roll_back_live(system: System) -> None:
    """Roll back an interrupted live change, so that it is not mistaken for drift."""
    place = LiveWorkDir(system)
    if state_of_work(place.directory) == "live" and not is_held(place.directory / "lock"):
        with system.lock("live"):
            place.recover(system.tree())


def recover_all(system: System, drop_kept: bool) -> list[int | str]:
    """Finish or undo everything that was interrupted, except where an ash is still at work.

    Returns the recovered snapshots, and "live" if a live change was rolled back; AshError if some could not be, after
    the rest was.
    """
    recovered: list[int | str] = []
    errors: list[Exception] = []
    places = [system.workdir(number) for number in numbered(system.layout.work(""), "")]
    for place in (LiveWorkDir(system), *places):
        if not place.leftovers() or (not drop_kept and state_of_work(place.directory) == "kept"):
            continue
        try:
            with system.lock(place.name):
                place.recover(system.tree(), drop_kept, strict=True)
            recovered.append(place.name)
        except Exception as error:  # of any kind: the other snapshots must be recovered all the same
            if not isinstance(error, AshError) or error.status != LOCKED:  # locked: an ash is at work
                errors.append(error)
    delete_stale_views(system.layout)
    delete_deferred(system.layout)
    with system.deploying() as deployments:
        deployments.recover()
    if errors:
        for other in errors[1:]:
            console.say(one_line(f"ash: {reason(other)}"))
        raise errors[0]
    return recovered


def fallback_of(system: System) -> Failure | None:
    """The deployment that did not start, if the one that runs, or ran last, is what the machine went back to."""
    menu = system.menu()
    there = menu.deployments.get(system.last_good_slot())
    return next((one for one in reversed(failures(system.layout)) if there and one.back_to == there.id), None)


def require_not_bad(system: System, snapshot: int) -> None:
    """Raise AshError (REFUSED) if the last deployment of a snapshot did not start, and it is unchanged."""
    if (failure := failure_of(system.layout, snapshot)) is not None:
        change = "ash base-update" if snapshot == BASE else "change it first"
        hint = f"{change}; or --force; or ash deploy --once {snapshot}"
        raise AshError(f"snapshot {snapshot} did not start when it was deployed ({failure.since})", hint, REFUSED)


def deploy_snapshot(
    system: System, snapshot: int, *, secondary: bool = False, force: bool = False, **options: bool
) -> tuple[Deployment, bool]:
    """Make a snapshot the default for the next boot, or (`secondary`) add a menu entry for it.

    With `fresh_etc`, changes of the running /etc are not carried over; with `with_saved`, those that were saved into
    other snapshots are too. `fresh` leaves changes of a mutable deployment of this snapshot behind, which is REFUSED
    without it; so is a snapshot that did not start, without `force`. Returns the deployment, and whether it is new: an
    up-to-date one is reused.
    """
    system.require(snapshot)
    roll_back_live(system)
    system.keep_reserve()
    with system.deploying() as deployments:
        system.require(snapshot)
        deployments.recover()
        if not (secondary or force):
            require_not_bad(system, snapshot)
        return deployments.deploy(snapshot, secondary=secondary, **options)


def make_again(system: System, work: Transaction, changed: Sequence[str]) -> None:
    """Make what is made from these paths in /etc, which were brought into a transaction: library cache, initramfs."""
    update_library_cache(work.chroot(), changed)
    settings = [path for path in changed if re.fullmatch(system.distro.initramfs_settings, path)]
    for kernel in [one for one in kernels_of(work.root) if one.initramfs and settings]:
        with step(f"making the initramfs of {kernel.name} again, for {listed(settings)}"):
            work.run([*system.distro.make_initramfs, kernel.version])


def save_drift(system: System) -> tuple[Change, EtcMerge]:
    """Save the running /etc's changes into the booted snapshot, except ash's fstab lines and the machine's identity.

    AshError (REFUSED) if no deployment is booted, or it is the base's.
    """
    slot, booted = system.last_booted_slot(), system.booted
    if isinstance(booted, int):
        what = f"snapshot {booted} runs as it is: the changes of its /etc are in memory, and cannot be saved"
        raise AshError(what, f"ash deploy {booted}, reboot, change it there", REFUSED)
    if not slot:
        raise AshError("no deployment is booted: its /etc cannot be saved", "ash deploy N, reboot", REFUSED)
    number = system.snapshot_of(slot)
    roll_back_live(system)
    with ExitStack() as stack:
        with Transaction(system, number) as work:  # before the lock "deploy", like all that take both
            deployments = stack.enter_context(system.deploying())
            # Later edits are neither saved nor dropped from the drift.
            running = stack.enter_context(readonly_view(system.layout, system.layout.rootfs(slot)))
            base = system.layout.etc(slot)
            merge = deployments.etc_merge(base, running, work.root / "etc", number, number)
            merge.identity = False
            stack.enter_context(new_owners(system.layout, system.homes))
            people = bring_people(system.layout, merge, number, system.homes, wait=system.wait)
            merge.merge()
            people.prune(merge)
            merge.carried = list(dict.fromkeys(merge.carried))
            for root in (work.root, system.layout.rootfs(slot)):  # the snapshot may be undone, or another be deployed
                note_saved(root, merge.carried)
            make_again(system, work, merge.carried)
        deployments.rebase_drift(slot, merge)
    return work.change, merge


class RunningEtc(NamedTuple):
    """What was changed in the running /etc."""

    slot: str  # the deployment whose /etc that is, or which ran last
    base: Path  # what it was before
    etc: Path
    drift: Mapping[str, str]  # "added", "removed" or "changed" by path
    in_memory: bool = False  # a snapshot runs as it is


OWN_ETC = Path("/etc")


def running_etc(system: System) -> RunningEtc:
    """What was changed in the /etc that runs, or ran last.

    AshError (REFUSED) if nothing is deployed, or it is unknown what the /etc was before.
    """
    slot, booted = system.last_good_slot(), system.booted
    if isinstance(booted, int):
        base = system.layout.rootfs(booted) / "etc"
        drift = {path: kind for path, kind in etc_drift(base, OWN_ETC).items() if path != "fstab"}  # see INIT_SCRIPT
        return RunningEtc(slot, base, OWN_ETC, drift, in_memory=True)
    base, etc = system.layout.etc(slot), system.layout.rootfs(slot) / "etc"
    if not slot or not base.exists():
        raise AshError("no deployment is booted: there is nothing to compare", "ash diff A B", REFUSED)
    require_directories(system.layout.rootfs(slot))
    return RunningEtc(slot, base, etc, etc_drift(base, etc))


# --- The command frame -----------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A parsed command line. An option that was not given, or that the command does not have, has its default."""

    # Options of all commands
    root: Path | None = None
    image: Path | None = None
    distro: str | None = None
    chroot: bool = False
    dry_run: bool = False
    json: bool = False
    wait: float = 0.0
    yes: bool = False
    verbose: bool = False
    quiet: bool = False
    # What the command is about
    snapshots: Sequence[int] = ()
    packages: Sequence[str] = ()
    remove: Sequence[str] = ()
    profile: str = ""
    command: Sequence[str] = ()
    description: str = ""
    words: Sequence[str] = ()
    # Options of some commands
    delete_data: bool = False
    download_only: bool = False
    files: bool = False
    force: bool = False
    format: str = "text"
    fresh: bool = False
    fresh_etc: bool = False
    jobs: int = 1
    keep: bool = False
    live: bool | None = None
    long: bool = False
    no_secondary: bool = False
    no_upgrade: bool = False
    nuke: bool = False
    once: bool = False
    patch: bool = False
    privileged: bool = False
    purge: bool = False
    repair: bool = False
    resume: bool = False
    running: bool = False
    secondary: bool = False
    shell: bool = False
    strict: bool = False
    with_saved: bool = False

    @property
    def snapshot(self) -> int:
        """The first snapshot, for commands that take one."""
        return self.snapshots[0]


class Reply(NamedTuple):
    """The answer of a command: `data` for --json, `text` for people, `brief` (such as a new number) for -q."""

    data: Mapping[str, Any] = {}
    text: str = ""
    brief: str = ""
    status: int = 0


# The function of a command that changes something is a generator: it makes its checks, then yields what it would do.
# With --dry-run that is the answer; otherwise the function is resumed, makes the change, and returns the answer.
Plan = Generator[Reply, None, Reply]


def would(text: str, **data: Any) -> Reply:
    return Reply({"changed": False, "dry_run": True, "would": text, **data}, f"would {text}")


# The shapes of JSON answers, as has_shape() takes them; `ash help --format json` prints them.
PACKAGES_SHAPE = {"added": {"*": str}, "removed": {"*": str}, "upgraded": {"*": [str]}}
CHANGE_SHAPE = {"snapshot": int, "changed": bool, "packages": PACKAGES_SHAPE, "conflicts": [str], "kept": [str]}
LIVE_SHAPE = {
    "changed": bool, "started": [str], "stopped": [str], "restarted": [str], "outdated": [str], "waiting": [str],
    "conflicts": [str], "conflicts_folders": [str], "kept": [str], "error": str,
}  # fmt: skip
ERROR_SHAPE = {"message": str, "hint": str, "status": int}
DRY_RUN_SHAPE = {"changed": bool, "dry_run": bool, "would": str | list, "*?": object}


def change_data(change: Change) -> dict[str, Any]:
    return {
        "snapshot": change.snapshot, "changed": change.changed, "packages": change.packages(),
        "conflicts": list(change.conflicts), "kept": list(change.kept),
        **({"brought": list(change.brought)} if change.brought else {}),
    }  # fmt: skip


def text_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Format rows as a table without lines; each cell is made one line of printable text."""
    import tabulate

    # Leading spaces draw the tree. tabulate keeps them by an attribute of the module, from 0.10 on by a parameter.
    tabulate.PRESERVE_WHITESPACE = True
    name = "preserve_whitespace"
    spaces = {name: True} if name in tabulate.tabulate.__code__.co_varnames else {}
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    text = tabulate.tabulate(cells, headers=headers, tablefmt="plain", disable_numparse=True, **spaces)
    return "\n".join(line.rstrip() for line in text.split("\n"))


def ask(question: str) -> str:
    """Ask the user, on stderr: a program may read stdout. EOFError at the end of the input."""
    with contextlib.suppress(OSError):  # the terminal has hung up
        print(question, end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower()
    except EOFError:
        with contextlib.suppress(OSError):
            print(file=sys.stderr)
        raise


def require_confirmation(request: Request, question: str) -> None:
    """Ask the user unless -y was given; AshError if the answer is not yes or there is no terminal."""
    if request.yes:
        return
    if not sys.stdin.isatty():
        raise AshError(f"{question}? There is no terminal to ask on", "-y answers yes", USAGE)
    with contextlib.suppress(EOFError):
        if ask(f"{question}? [y/N] ") in ("y", "yes"):
            return
    raise AshError("nothing was changed", "", FAILED)


class CommandFailed(AshError):
    """A program that the user ran in a snapshot failed; ash exits with the same status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message, "", status)


class Option(NamedTuple):
    """An option of a command."""

    flags: Sequence[str]  # its spellings
    help: str  # one line for people
    value: str = ""  # in the help; empty if it takes none, "WORD..." if it takes all words up to the next option
    name: str = ""  # of its value, if that is not its long spelling
    read: Callable[[str], Any] = str  # turns the text of a value into the value; raises ValueError
    repeats: bool = False  # may be given several times, once for each value

    @property
    def dest(self) -> str:
        long = next((flag for flag in self.flags if flag.startswith("--")), "")
        return self.name or long.removeprefix("--").replace("-", "_")

    @property
    def takes_several(self) -> bool:
        return self.value.endswith("...")

    def usage(self) -> str:
        return f"{', '.join(self.flags)} {self.value}".rstrip()


def flag(*flags: str, help: str) -> Option:
    return Option(flags, help)


def snapshot_number(text: str) -> int:
    """Read a snapshot number; ValueError if it is not a number, AshError (MISSING) if it is too large."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError
    number = to_number(text)
    if number is None:
        raise AshError("there is no snapshot with such a large number", "ash tree lists the snapshots", MISSING)
    return number


SNAPSHOT_OPTION = Option(
    ("-s", "--snap", "--snapshot"), "the snapshot", "N", "snapshots", snapshot_number, repeats=True
)
SEVERAL_OPTION = Option(("--snapshots", "--snaps"), "several snapshots", "N...", "several")


class Command(NamedTuple):
    """A row of the command table."""

    name: str
    aliases: Sequence[str]
    group: str
    usage: str
    help: str
    function: Callable[..., Any]  # called with the system and the request
    options: Sequence[Option] = ()  # those that not all commands have
    numbers: int = 0  # how many snapshots it takes at most
    required: int = 0  # how many must be given; if 0, the default is the booted snapshot
    snapshot_optional: bool = False  # without a snapshot it is about none, not about the booted one
    several: bool = False  # --snapshots takes any number of snapshots, which it works on one after the other
    require: Callable[[System, int], None] | None = None  # checks each of the snapshots before anything is done
    words: str = ""  # the field of the request that takes its words beside snapshots; empty if it takes none
    hint: str = ""  # how to call it when words are missing, if the usage is not enough
    rest: bool = False  # everything after the snapshot belongs to another program, options included
    changes: bool = False  # it changes the system, and so needs root
    changes_with: str = ""  # the option with which a command that only reads changes the system
    wants_disk: bool = False  # it reports more when root lets it see the whole file system
    frees_space: bool = False  # it may use the emergency reserve on a full disk
    retries: bool = True  # it may run again after it committed but did not finish
    own_status: bool = False  # it exits with the status of the program that it ran; ash's own failure is 125
    needs_system: bool = True  # if not, the function takes the request only
    of_all_systems: bool = False  # if there are several on the disk, it need not be told of which one
    answer: Mapping[str, Any] | None = None  # the shape of its JSON answer; None for what has none

    def is_change(self, request: Request) -> bool:
        return self.changes or (self.changes_with != "" and getattr(request, self.changes_with))

    def all_options(self) -> list[Option]:
        about = ([SNAPSHOT_OPTION] if self.numbers else []) + ([SEVERAL_OPTION] if self.several else [])
        return [*self.options, *about]


COMMANDS: list[Command] = []  # as registered, which is their order within a group
GROUPS = ("Tree", "Boot", "Inside a snapshot", "Packages", "ash itself")
TREE, BOOT, INSIDE, PACKAGES, ITSELF = GROUPS
MANY = 1000
# Fields of the rows of commands that change one snapshot.
CHANGES_ONE: Mapping[str, Any] = {"changes": True, "numbers": 1, "require": System.require_changeable}


def command(name: str, *aliases: str, **row: Any) -> Callable[[CommandFunction], CommandFunction]:
    """Register the function below as a command; see Command for the fields of its row."""

    def register(function: CommandFunction) -> CommandFunction:
        COMMANDS.append(Command(name, aliases, function=function, **row))
        return function

    return register


def commands_of(group: str) -> list[Command]:
    return [command for command in COMMANDS if command.group == group]


def find_command(word: str) -> Command:
    """The command that a word calls; AshError, with the nearest word, if there is none."""
    for command in COMMANDS:
        if word == command.name or word in command.aliases:
            return command
    import difflib

    near = difflib.get_close_matches(word, [name for c in COMMANDS for name in (c.name, *c.aliases)], 1, 0.5)
    raise AshError(f"there is no command {word!r}", f"did you mean {near[0]}?" if near else "ash help", USAGE)


# --- The command line ------------------------------------------------------------------------------------------
# Not argparse: its import and a parser take 2 to 3 ms, a tenth of a short command, and most of the grammar (an optional
# number, options between words, `-c` that takes the rest of the line) would have to be worked around it.


def seconds(text: str) -> float:
    """Read the time to wait; ValueError if it is negative or NaN."""
    number = float(text)
    if not number >= 0:
        raise ValueError
    return number


def count(text: str) -> int:
    """Read a number of jobs; ValueError if it is negative."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


GLOBAL_OPTIONS = (
    Option(("--root",), "work on a mounted system", "DIR", read=Path),
    Option(("--image",), "work on a disk image", "FILE", read=Path),
    Option(("--distro",), "which distribution, if the disk has several", "ID"),
    flag("--chroot", help="run even inside a chroot"),
    flag("--dry-run", help="print what would be done, change nothing"),
    flag("--json", help="answer in JSON"),
    Option(("--wait",), "how long to wait for a lock", "SECONDS", read=seconds),
    flag("-y", "--yes", help="answer yes to all questions"),
    flag("-v", "--verbose", help="print each program that ash runs, and the traceback of a bug"),
    flag("-q", "--quiet", help="print only errors and new snapshot numbers"),
    flag("-h", "--help", help="explain the command"),
)
PARALLEL = flag("-j", "--parallel", help="work on as many snapshots at a time as there are processors")
JOBS = (PARALLEL, Option(("--jobs",), "number of snapshots to work on at a time", "COUNT", read=count))
STRICT = flag("--strict", help="fail if a repository cannot be reached")
DOWNLOAD_ONLY = flag("--download-only", help="only fetch the packages, for a later upgrade")
PROFILE = Option(("-P", "--profile", "--prof"), "use the packages of a profile", "NAME")
NO_UPGRADE = flag("--no-upgrade", help="do not upgrade before installing a profile")
RESUME = flag("--resume", help="resume a session that a hangup interrupted")
DESCRIPTION = Option(("-d", "--desc", "--description"), "its description, several words", "WORD...", "description")
COMMAND = Option(("-c", "--cmd", "--command"), "the command", "WORD...", "command")
LIVE = (
    flag("--live", "-l", help="also change the running system"),
    flag("--not-live", "-nl", help="only change the snapshot"),
)
PURGE = (
    flag("--purge", help="also delete their configuration"),
    flag("--delete-data", help="also delete their data in /var, unless another snapshot's package claims it"),
)
FORCE_REMOVAL = flag("-f", "--force", help="even if that removes what ash needs")
SYNC = (flag("--keep", help="keep packages that the parent no longer has"), STRICT, *JOBS, *LIVE)
PACKAGE = Option(("-p", "--pkg", "--package"), "packages (needed if the name of one is a number)", "PKG...", "packages")


class Arguments:
    """What follows a command on the command line: the values of options, by name, and the other words.

    Raises:
        AshError: an option is unknown, or its value is missing or wrong (USAGE).
    """

    def __init__(self, command: Command, given: Iterable[str]) -> None:
        self.command = command
        self.options = {flag: option for option in (*command.all_options(), *GLOBAL_OPTIONS) for flag in option.flags}
        self.values: dict[str, Any] = {}
        self.words: list[str] = []
        self._rest = list(given)
        while self._rest:
            word = self._rest.pop(0)
            if self._is_option(word):
                self._read_option(word)
                continue
            self.words += [] if word == "--" else [word]
            if word == "--" or command.rest:
                self.words += self._rest
                break

    def _is_option(self, word: str) -> bool:
        """Whether a word is an option: dashes alone, a negative number, and a phrase without a known one are none."""
        if word in self.options:
            return True
        dashed = word.startswith("-") and word not in ("-", "--") and not word[1:].isdecimal()
        glued = self.options.get(word[:2])
        return dashed and (" " not in word or word.partition("=")[0] in self.options or bool(glued and glued.value))

    def _read_option(self, word: str) -> None:
        """Take an option off the command line, with its value: `--wait 3`, `--wait=3`, `-s3`, or flags as in `-vq`."""
        spelled, equals, value = word.partition("=")
        if spelled not in self.options and word[:2] in self.options:  # -s3, -vq
            spelled, value = word[:2], word[2:]
            equals = self.options[spelled].value
            if not equals:
                if f"-{value[0]}" not in self.options:
                    raise self._wrong(f"there is no option -{value[0]}")
                self._rest.insert(0, f"-{value}")
        option = self.options.get(spelled)
        if option is None:
            raise self._wrong(f"there is no option {spelled}")
        if option.value:
            self._store(option, spelled, [value] if equals else self._take_words(option))
        elif equals:
            raise self._wrong(f"{spelled} takes no value")
        else:
            self.values[option.dest] = True

    def _take_words(self, option: Option) -> list[str]:
        """Take the words that are the value of an option, if it has any, off the rest."""
        taken = self._rest[: None if option.takes_several else 1]
        if not (option.takes_several and self.command.rest):
            taken = list(itertools.takewhile(lambda word: not self._is_option(word), taken))
        del self._rest[: len(taken)]
        return taken

    def _store(self, option: Option, spelled: str, texts: Sequence[str]) -> None:
        if not texts:
            raise self._wrong(f"{spelled} needs a value: {option.value}")
        try:
            values = [option.read(text) for text in texts]
        except ValueError:
            raise self._wrong(f"{spelled} does not take {' '.join(map(repr, texts))}") from None
        if option.takes_several or option.repeats:
            self.values.setdefault(option.dest, []).extend(values)
        else:
            self.values[option.dest] = values[0]

    def _wrong(self, message: str) -> AshError:
        return AshError(message, f"ash {self.command.name} -h", USAGE)


def split_command_line(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Split the command line into the options before the command, the command, and what follows it."""
    with_value = {flag for option in GLOBAL_OPTIONS if option.value for flag in option.flags}
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        at += 2 if argv[at] in with_value else 1
    return list(argv[:at]), argv[at] if at < len(argv) else "", list(argv[at + 1 :])


def leading_numbers(words: Sequence[str]) -> list[int]:
    return [snapshot_number(word) for word in itertools.takewhile(lambda w: w.isascii() and w.isdecimal(), words)]


def require_no_count(given: Sequence[str]) -> None:
    """Raise AshError if a number follows -j: a user of make means jobs, and it would be taken for a snapshot."""
    for words in (*given, *map(" ".join, itertools.pairwise(given))):
        if found := re.fullmatch(r"(-j|--parallel)[ =]?([0-9]+)", words):
            option, number = found.groups()
            hint = f"use --jobs {number}; a snapshot number goes before {option}"
            raise AshError(f"{option} takes no number", hint, USAGE)


def split_last_number(program: Sequence[str]) -> tuple[list[int], Sequence[str]]:
    """Split off the snapshot behind a command that is run, if it has one: the old ash took `-c 'COMMAND' -s N`."""
    named = len(program) > 2 and program[-2] in SNAPSHOT_OPTION.flags
    numbers = leading_numbers(program[-1:]) if named else []
    return numbers, program[:-2] if numbers else program


def split_numbers(
    command: Command, values: dict[str, Any], words: Sequence[str]
) -> tuple[list[int], Sequence[str], str]:
    """The snapshots on a command line, the words that are left, and the profile."""
    snapshots, several = values.pop("snapshots", []), values.pop("several", [])
    profile = values.pop("profile", "")
    numbers = leading_numbers(several)
    snapshots, words = [*snapshots, *numbers], [*several[len(numbers) :], *words]
    if to_number(profile) is not None and words:  # --profile N NAME
        snapshots, profile, words = [*snapshots, *leading_numbers([profile])], words[0], words[1:]
    more = leading_numbers(words)[: max(0, command.numbers - len(snapshots))]
    snapshots, words = [*snapshots, *more], words[len(more) :]
    if command.words == "profile" and words:  # install-profile NAME N
        profile, numbers = words[0], leading_numbers(words[1:])
        snapshots, words = [*snapshots, *numbers], words[1 + len(numbers) :]
    if len(snapshots) > command.numbers and not command.several:
        raise AshError(f"too many snapshots: {listed(snapshots)}", f"ash {command.usage}", USAGE)
    return snapshots, words, profile


def program_to_run(words: Sequence[str]) -> list[str]:
    """The program and its arguments that follow the snapshot on the command line of run."""
    program = [*words[1:]] if words and words[0] in (*COMMAND.flags, "--") else [*words]
    if len(program) == 1 and " " in program[0]:
        return ["/bin/sh", "-c", program[0]]  # a whole command line in one word, as the old ash took it
    return program


def described(words: Iterable[str]) -> str:
    """Make a description of words: one line of valid text."""
    text = " ".join(" ".join(words).split())
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# What a command needs, by the field of the request that takes its words.
NEEDED_WORDS = {"packages": "a package", "profile": "a profile", "command": "a command", "description": "a description"}


# Options of which a command line may have only one.
CONTRADICTIONS = (
    ("live", "not_live"),
    ("secondary", "no_secondary"),
    ("fresh_etc", "with_saved"),
    ("once", "no_secondary"),
    ("once", "secondary"),
)


def request_of(command: Command, values: dict[str, Any], words: Sequence[str]) -> Request:
    """Make a request of the options and words of a command line; AshError (USAGE) if it does not fit the command."""
    program: Sequence[str] = values.pop("command", [])
    if command.rest and "snapshots" not in values:
        values["snapshots"], program = split_last_number(program)
    snapshots, words, profile = split_numbers(command, values, words) if command.numbers else ([], words, "")
    taken: dict[str, Any] = {
        "packages": [*words, *values.pop("packages", [])] if command.words == "packages" else [],
        "command": program_to_run([*words, *program]) if command.words == "command" else [],
        "description": described([*values.pop("description", []), *(words if command.words == "description" else [])]),
        "profile": profile,
        "words": words if command.words == "words" else [],
    }
    if words and command.words in ("", "profile"):
        raise AshError(f"unexpected argument {words[0]!r}", f"ash {command.usage}", USAGE)
    if len(snapshots) < command.required:
        wanted = "a snapshot number" if command.required == 1 else f"{command.required} snapshot numbers"
        raise AshError(f"{command.name} needs {wanted}", f"ash {command.usage}", USAGE)
    instead = profile or values.get("remove")
    if command.words in NEEDED_WORDS and not taken[command.words] and not instead:
        missing = f"{command.name} needs {NEEDED_WORDS[command.words]}"
        raise AshError(missing, command.hint or f"ash {command.usage}", USAGE)
    for one, other in CONTRADICTIONS:
        if values.get(one) and values.get(other):
            both = " and ".join(f"--{name.replace('_', '-')}" for name in (one, other))
            raise AshError(f"{both} contradict each other", "leave out one of them", USAGE)
    live = False if values.pop("not_live", False) else values.pop("live", None)
    every = len(os.sched_getaffinity(0)) if values.pop("parallel", False) else 1
    jobs = values.pop("jobs", 0) or every
    request = Request(**values, **taken, snapshots=snapshots, live=live, jobs=jobs)
    if request.root and request.image:
        raise AshError("--root and --image select different systems", "leave out one of them", USAGE)
    if (request.root or request.image) and command.numbers and not (snapshots or command.snapshot_optional):
        raise AshError("with --root or --image, name the snapshot", f"ash {command.usage}", USAGE)
    return request


def parse(argv: Sequence[str]) -> tuple[Command, Request]:
    """Read the command line; AshError (USAGE) if it is wrong."""
    before, word, after = split_command_line(argv)
    if not word:
        word = "version" if "--version" in before else "help"
        before = [option for option in before if option not in ("-h", "--help", "--version")]
    command = find_command(word)
    if PARALLEL in command.options and not command.rest:
        require_no_count(after)
    given = Arguments(command, [*before, *after])
    if given.values.pop("help", False):
        return find_command("help"), Request(words=[command.name])
    return command, request_of(command, given.values, given.words)


def failure_for_history(error: BaseException) -> str:
    """What the history says of a change that failed; empty if the change was refused before it began."""
    if isinstance(error, AshError):
        begun = error.status == FAILED or isinstance(error, CommandFailed)
        return error.message if begun else ""
    if isinstance(error, HangUp):
        return "the terminal hung up; the work is kept"
    return f"failed: {reason(error)}" if isinstance(error, Exception) else "interrupted"


def caller_of(command: Command) -> dict[str, Any]:
    """Who calls which command, for the history."""
    try:
        user = Path("/proc/self/loginuid").read_text().strip()
    except OSError:
        user = ""
    unset = str(2**32 - 1)
    user = os.environ.get("SUDO_UID", "0") if user in ("", unset) else user
    return {"user": to_number(user) or 0, "command": command.name, "arguments": sys.argv[1:]}


def history_of(caller: Mapping[str, Any], request: Request, data: Mapping[str, Any]) -> dict[str, Any]:
    """The history entry of a command, with its JSON answer but for what was committed: that has an entry of its own."""
    concerned = [data, *data.get("snapshots", []), *data.get("damage", [])]
    numbers = {one.get("snapshot") if isinstance(one, Mapping) else one for one in concerned} - {None}
    committed = ("packages", "conflicts", "kept") if "packages" in data else ()
    answer = {key: data[key] for key in data if key not in committed}
    return {**answer, **caller, "snapshots": sorted({*request.snapshots, *numbers})}


def refuse_kept(system: System, request: Request, snapshots: Iterable[int]) -> None:
    """With --dry-run, refuse what the change would refuse as it begins: a snapshot with a session that hung up."""
    for place in map(system.workdir, snapshots if request.dry_run else ()):
        intent = place.intent(drop_damaged=True)
        if isinstance(intent, Kept):
            intent.recover(place, system.tree())


def with_snapshots(command: Command, system: System, request: Request) -> Request:
    """Fill in the booted snapshot if the request names none, and check each snapshot as the command requires."""
    if command.numbers and not request.snapshots and not command.snapshot_optional:
        current = system.current
        if current is None:
            why = f"{command.name} needs a snapshot number: no snapshot of this system is running"
            raise AshError(why, f"ash {command.usage}", USAGE)
        request = request._replace(snapshots=[current])
    if command.require is not None:
        for number in request.snapshots:
            command.require(system, number)
    if command.require is System.require_changeable:
        refuse_kept(system, request, request.snapshots)
    return request


def carry_out(command: Command, system: System, request: Request) -> Reply:
    """Call a command's function; with --dry-run only up to its plan."""
    plan: Reply | Plan = command.function(system, request)
    if isinstance(plan, Reply):
        return plan
    try:
        planned = next(plan)
        if request.dry_run:
            return planned
        system.make_private()
        return next(plan)
    except StopIteration as end:
        reply: Reply = end.value
        return reply


def change_system(command: Command, system: System, request: Request) -> Reply:
    """Carry out a command that changes the system, and note it in the history."""
    system.caller = caller_of(command)
    system.note_boot()
    work = partial(carry_out, command, system, request)
    try:
        reply = system.with_reserve(work, once=not command.retries) if command.frees_space else work()
    except BaseException as error:
        for change in system.done:  # committed before the failure
            console.say(change.summary())
        done = {"snapshots": [change.snapshot for change in system.done]}
        failure = failure_for_history(error) or (reason(error) if system.done else "")
        if failure:
            system.history.append({**history_of(system.caller, request, done), "result": failure})
        raise
    # A commit does not record what fsck found, or the deployment that was made after it.
    is_recorded = (system.recorded or system.done) and not reply.data.keys() & {"damage", "slot"}
    if reply.status or (reply.data.get("changed") and not is_recorded):
        result = reply.text if reply.status else "done"
        system.history.append({**history_of(system.caller, request, reply.data), "result": result})
    return reply


def execute(command: Command, request: Request) -> Reply:
    """Carry out a command on the system that the request names."""
    if not command.needs_system:
        reply: Reply = command.function(request)
        return reply
    changes = command.is_change(request)
    sees_disk = changes or (command.wants_disk and os.geteuid() == 0)
    system = System.open(request, sees_disk, any_system=command.of_all_systems)
    if changes and is_readonly(system.layout.snapshots):
        where = request.root or request.image or "/"
        raise AshError(f"{where} is mounted read-only", f"mount -o remount,rw {where}", REFUSED)
    request = with_snapshots(command, system, request)
    run = change_system if changes and not request.dry_run else carry_out
    return run(command, system, request)


def print_reply(command: Command, reply: Reply) -> None:
    """Print a command's answer: JSON, brief, or text."""
    if console.json:
        print(as_json({"version": JSON_VERSION, "command": command.name, **reply.data}))
    elif console.quiet and reply.brief:
        print(printable(reply.brief))
    elif reply.text and not (console.quiet and command.changes):
        print(printable(reply.text))


def report(error: AshError, command: Command | None) -> int:
    """Print an error; returns ash's exit status."""
    if is_out_of_space(error):
        error.hint = error.hint or FREES_SPACE
    hint = f" ({error.hint})" if error.hint else ""
    print(one_line(f"ash: {error.message.strip()}{hint}"), file=sys.stderr)
    if console.json:
        problem = {"message": error.message, "hint": error.hint, "status": error.status}
        print(as_json({"version": JSON_VERSION, "command": command.name if command else "", "error": problem}))
    own_status = command is not None and command.own_status
    return OUR_FAILURE_IN_RUN if own_status and not isinstance(error, CommandFailed) else error.status


def as_ash_error(error: Exception) -> AshError:
    """Turn an exception that nothing caught into an error for the user; with -v, raise one of ash's own bugs again."""
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return AshError(reason(error), "sudo ash ...", REFUSED)
    if isinstance(error, OSError):  # such as a full or broken disk
        found = AshError(reason(error))
        found.errno = error.errno or 0
        return found
    if isinstance(error, ModuleNotFoundError):  # an installed ash has its libraries beside it
        hint = f"install python3-{error.name}, or use the ash that is on the disk"
        return AshError(f"Python has no module {error.name}", hint)
    if console.verbose:
        raise error
    return AshError(f"an error in ash itself: {error!r}", "-v prints the traceback; please report it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ash with the arguments of a command line; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    console.json, console.quiet = "--json" in given, "-q" in given
    command = None
    with contextlib.suppress(AshError):
        command = find_command(split_command_line(given)[1])  # for errors in the rest of the line
    reply = None
    os.umask(0o022)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding lacks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        command, request = parse(given)
        console.verbose, console.quiet, console.json = request.verbose, request.quiet, request.json
        reply = execute(command, request)
        print_reply(command, reply)
        sys.stdout.flush()
        return reply.status
    except AshError as error:
        return report(error, command)
    except HangUp:
        return 128 + signal.SIGHUP
    except KeyboardInterrupt:
        print("ash: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if reply is not None:  # the reader closed the pipe after the answer: no error can be shown
            return reply.status
        try:
            return report(AshError("output closed early (broken pipe)"), command)
        except BrokenPipeError:
            os.dup2(null, 2)
            return FAILED
    except Exception as error:
        return report(as_ash_error(error), command)


# --- Commands on the tree --------------------------------------------------------------------------------------


def minute_of(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def trials_of(system: System) -> Trials:
    """What GRUB counts, for who only asks."""
    return Trials(GrubNotes(system.layout, system.image), system.configuration)


@command(
    "tree", "t", group=TREE, usage="tree [-l]", help="show all snapshots; * is the one for the next boot",
    options=[flag("-l", "--long", help="with date and number of packages")],
    answer={
        "tree": [{
            "snapshot": int, "parent": int | None, "description": str, "booted": bool, "deployed": bool,
            "secondary": bool, "mutable": bool | None, "bad": bool, "date?": str, "packages?": int,
        }]
    },
)  # fmt: skip
def cmd_tree(system: System, request: Request) -> Reply:
    tree, menu, current, sees = system.tree(), system.menu(), system.current, system.sees_snapshots
    trials = trials_of(system)
    starts = trials.next_once(menu) or trials.next_default(menu)
    next_boot = starts.snapshot if starts else None
    secondary = {one.snapshot for slot, one in menu.deployments.items() if slot in SECONDARY_SLOTS}
    roots = {number: system.layout.rootfs(number) for number in tree.numbers()}
    failed = {one.snapshot for one in failures(system.layout)}
    by_number: dict[int, dict[str, Any]] = {
        n: {
            "snapshot": n, "parent": tree.parent(n), "description": system.describe(n), "booted": n == current,
            "deployed": n == next_boot, "secondary": n in secondary,
            "mutable": is_writable(root) and is_mutable(root) if sees else None,
            "bad": n in failed and failure_of(system.layout, n) is not None,
        }
        for n, root in roots.items()
    }  # fmt: skip

    def label(number: int) -> str:
        row = by_number[number]
        notes = "".join(f" [{mark}]" for mark in ("booted", "secondary", "mutable", "bad") if row[mark])
        return f"{number}{'*' if row['deployed'] else ' '}- {row['description']}{notes}"

    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    text, rows = tree.draw(label, ascii_only), list(by_number.values())
    if request.long:
        for number, row in by_number.items():
            if sees:
                row["date"] = minute_of(Subvolume.at(roots[number]).made)
            row["packages"] = len(packages_of(system, number))
        drawn = text.splitlines()[1:]
        table = [[line, row.get("date", ""), row["packages"]] for line, row in zip(drawn, rows, strict=True)]
        text = text_table(table, ["snapshot", "date", "packages"])
    return Reply({"tree": rows}, text)


@command(
    "current", "c", group=TREE, usage="current", help="print the booted snapshot's number", answer={"snapshot": int}
)
def cmd_current(system: System, request: Request) -> Reply:
    current = system.current
    if current is None:
        raise AshError("no snapshot of this system is running", "", FAILED)
    return Reply({"snapshot": current}, str(current), str(current))


@command(
    "desc", "description", group=TREE, usage="desc N TEXT...", help="describe a snapshot",
    changes=True, numbers=1, require=System.require, words="description", options=[DESCRIPTION],
    answer={"snapshot": int, "changed": bool, "description": str},
)  # fmt: skip
def cmd_desc(system: System, request: Request) -> Plan:
    number, text = request.snapshot, request.description
    yield would(f"describe snapshot {number} as: {text}")
    with system.lock("state"):
        system.require(number)
        changed = text != system.describe(number)
        if changed:
            write_file(system.layout.description(number), f"{text}\n")
            system.write_snapshot_menu()
    return Reply({"snapshot": number, "changed": changed, "description": text}, f"snapshot {number}: {text}")


COPY_SHAPE = {"snapshot": int, "changed": bool, "from": int, "parent": int | None, "without": [str]}
COPIES: Mapping[str, Any] = {"group": TREE, "changes": True, "options": [DESCRIPTION], "answer": COPY_SHAPE}
COPIES_ONE = {**COPIES, "numbers": 1, "require": System.require}


def without_mutable(system: System, source: int) -> list[str]:
    """The mutable directories of a snapshot, and of nobody else, that are not empty: copies begin without that."""
    top, root = system.layout.snapshots / mutable_place(source), system.layout.rootfs(source)
    listed_there = mutable_directories(root, source) if is_directory(top) else []
    own = [name for kept, name in listed_there if kept == f"{mutable_place(source)}/{name}"]
    return [name for name in own if any(paths_below(top / name))]


def without_line(source: int, copy: int, names: Sequence[str]) -> str:
    """What is said of a copy that begins without some mutable directories; empty if there are none."""
    return f"\n  {copy} begins without what {source} has in its mutable directories: {listed(names)}" if names else ""


def copy_below(system: System, request: Request, source: int, parent: int | None, what: str) -> Reply:
    """Copy a snapshot below another, or (None) to the top of the tree, and reply `what` the copy is: "a clone of 5"."""
    number = copy_snapshot(system, source, parent, request.description or what.removeprefix("a "))
    without = without_mutable(system, source)
    data = {"snapshot": number, "changed": True, "from": source, "parent": parent, "without": without}
    return Reply(data, f"snapshot {number} is {what}{without_line(source, number, without)}", str(number))


@command("clone", "cl", "tree-clone", usage="clone [N] [-d TEXT]", help="copy N as a new top-level tree", **COPIES_ONE)
def cmd_clone(system: System, request: Request) -> Plan:
    number = request.snapshot
    yield would(f"clone snapshot {number}")
    return copy_below(system, request, number, None, f"a clone of {number}")


@command(
    "clone-tree", "ct", group=TREE, usage="clone-tree [N] [-d TEXT]", help="copy N with all its branches, next to N",
    changes=True, numbers=1, require=System.require, options=[DESCRIPTION], answer={**COPY_SHAPE, "copies": {"*": int}},
)  # fmt: skip
def cmd_clone_tree(system: System, request: Request) -> Plan:
    number, tree = request.snapshot, system.tree()
    yield would(f"copy {', '.join(map(str, tree.branch(number)))}")
    copies = copy_branch(system, number, request.description or f"clone of {number}")
    copy = copies[number]
    data: dict[str, Any] = {"snapshot": copy, "changed": True, "from": number, "parent": tree.parent(number)}
    data["copies"] = {str(old): new for old, new in copies.items()}
    without = {old: without_mutable(system, old) for old in copies}
    data["without"] = sorted({name for names in without.values() for name in names})
    below = [new for old, new in copies.items() if old != number]
    text = f"snapshot {copy} is a clone of {number}" + (f", with {listed(below)} below it" if below else "")
    return Reply(data, text + "".join(without_line(old, copies[old], without[old]) for old in copies), str(copy))


@command("branch", "add-branch", usage="branch [N] [-d TEXT]", help="make a new child of N", **COPIES_ONE)
def cmd_branch(system: System, request: Request) -> Plan:
    number = request.snapshot
    yield would(f"branch from snapshot {number}")
    return copy_below(system, request, number, number, f"a branch of {number}")


@command("cbranch", "clone-branch", "cb", usage="cbranch [N] [-d TEXT]", help="copy N under N's parent", **COPIES_ONE)
def cmd_cbranch(system: System, request: Request) -> Plan:
    number = request.snapshot
    parent = system.tree().parent(number)
    yield would(f"copy snapshot {number} beside it")
    return copy_below(system, request, number, parent, f"a clone of {number}")


@command(
    "ubranch", "clone-under", "cu", usage="ubranch P N [-d TEXT]", help="copy N under P",
    numbers=2, required=2, require=System.require, **COPIES,
)  # fmt: skip
def cmd_ubranch(system: System, request: Request) -> Plan:
    parent, number = request.snapshots
    yield would(f"copy snapshot {number} below {parent}")
    return copy_below(system, request, number, parent, f"a clone of {number}")


@command("new", "new-tree", usage="new [-d TEXT]", help="make a new top-level snapshot from the base", **COPIES)
def cmd_new(system: System, request: Request) -> Plan:
    yield would("make a new snapshot from the base")
    return copy_below(system, request, BASE, None, f"a clone of {BASE}")


def user_name(uid: int) -> str:
    """The name of a user, or the uid if this system has no name for it."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def packages_summary(packages: Mapping[str, Mapping[str, Any]]) -> str:
    """Summarize changed packages: `+added -removed ^upgraded`."""
    signs = {"added": "+", "removed": "-", "upgraded": "^"}
    return " ".join(f"{sign}{name}" for kind, sign in signs.items() for name in packages.get(kind, {}))


def what_was_done(entry: Mapping[str, Any]) -> str:
    """The command of a line of the history, its result, and the packages that it changed."""
    command = " ".join(["ash", *map(str, entry.get("arguments", []))])
    packages = " ".join(packages_summary(change.get("packages", {})) for change in entry.get("changes", [entry]))
    return f"{command}: {entry.get('result', '')}" + (f", {packages}" if packages.strip() else "")


@command(
    "log", "history", group=TREE, usage="log [N]",
    help="show the history: what was done, when, by whom, with what result", numbers=1, snapshot_optional=True,
    answer={
        "history": [{
            "time": str, "user": int, "command": str, "arguments": [str], "snapshots": [int], "result": str,
            "*?": object,
        }]
    },
)  # fmt: skip
def cmd_log(system: System, request: Request) -> Reply:
    if not os.access(system.layout.history, os.R_OK) and system.layout.history.exists():
        hint = "sudo ash log, or become a member of the group adm"
        raise AshError("the history may be read by root and the group adm only", hint, REFUSED)
    entries = [e for e in system.history.read() if {*request.snapshots} <= {*e.get("snapshots", [])}]
    rows = [
        [
            entry.get("time", ""),
            user_name(entry.get("user", 0)),
            " ".join(map(str, entry.get("snapshots", []))),
            what_was_done(entry),
        ]
        for entry in entries
    ]
    return Reply({"history": entries}, text_table(rows, ["time", "user", "snapshots", "command: result, packages"]))


@command(
    "del", "delete", "rm", "rem", "rm-snapshot", group=TREE, usage="del N...",
    help="delete N and its branches, after asking", changes=True, numbers=MANY, required=1, several=True,
    frees_space=True, options=[flag("--nuke", help="also the remains of a damaged snapshot that is not in the tree")],
    answer={"snapshots": [int], "changed": bool, "kept": [str]},
)  # fmt: skip
def cmd_del(system: System, request: Request) -> Plan:
    doomed = numbers_to_delete(system, request.snapshots, request.nuke)
    require_replaceable(system, doomed, "not deleted")
    refuse_kept(system, request, doomed)
    names = ", ".join(map(str, doomed))
    yield would(f"delete {names}", snapshots=doomed)
    require_confirmation(request, f"delete {'snapshot' if len(doomed) == 1 else 'snapshots'} {names}")
    deleted = delete_snapshots(system, request.snapshots, request.nuke)
    places = [mutable_place(number) for number in deleted]
    kept = [f"/.snapshots/{place}" for place in places if paths_below(system.layout.snapshots / place)]
    text = f"deleted {names}" + (f"\n  kept, and deleted by nobody: {listed(kept)}" if kept else "")
    return Reply({"snapshots": deleted, "changed": True, "kept": kept}, text)


CHANGES_MUTABLE = {
    **CHANGES_ONE, "group": TREE, "required": 1, "answer": {"snapshot": int, "changed": bool, "mutable": bool},
}  # fmt: skip


def set_mutable(system: System, request: Request, mutable: bool | None = None) -> Plan:
    """Make a snapshot mutable or read-only; without `mutable`, what it is not."""
    number = request.snapshot
    mutable = not is_mutable(system.layout.rootfs(number)) if mutable is None else mutable
    now = "mutable" if mutable else "read-only"
    yield would(f"make snapshot {number} {now}")
    changed = make_mutable(system, number, mutable)
    text = f"snapshot {number} is {now}" + (f"; ash deploy {number} puts that into effect" if changed else " already")
    return Reply({"snapshot": number, "changed": changed, "mutable": mutable}, text)


command(
    "mutable", "immdis", "immdisable", "disimm", "disableimm", usage="mutable N",
    help="make N, and children made later, writable", **CHANGES_MUTABLE,
)(partial(set_mutable, mutable=True))  # fmt: skip
command(
    "immutable", "immenable", "enimm", "enableimm", usage="immutable N", help="make N read-only again",
    **CHANGES_MUTABLE,
)(partial(set_mutable, mutable=False))  # fmt: skip
command("immen", usage="immen N", help="make N mutable, or read-only again if it is", **CHANGES_MUTABLE)(set_mutable)


@command(
    "sub", "subs", "subvol", "subvols", "subvolumes", group=TREE, usage="sub",
    help="list the distribution's subvolumes",
    answer={"subvolumes": [{"id": int, "path": str, "readonly": bool, "made": str}]},
)  # fmt: skip
def cmd_sub(system: System, request: Request) -> Reply:
    layout = system.layout
    top = [layout.volume(prefix) for prefix in Layout.POSSIBLE_SUBVOLUMES] if layout.top else [layout.snapshots]
    inside = [path for name in ("rootfs", "etc", "boot") for path in sorted((layout.snapshots / name).iterdir())]
    rows = []
    for path in [*top, *inside, *sorted(layout.work("").glob("*/var"))]:
        if there := subvolume_at(path):  # not deleted meanwhile
            name, made = str(path.relative_to(layout.snapshots.parent)), minute_of(there.made)
            rows.append({"id": there.id, "path": name, "readonly": there.readonly, "made": made})
    table = [[row["id"], row["path"], "ro" if row["readonly"] else "rw", row["made"]] for row in rows]
    return Reply({"subvolumes": rows}, text_table(table, ["id", "path", "mode", "made"]))


# --- Commands for booting --------------------------------------------------------------------------------------

DEPLOYED_SHAPE = {
    "snapshot": int, "changed": bool, "slot": str, "id": str, "carried": [str], "conflicts": [str],
    "conflicts_folder": str, "without_effect": [str], "only_saved": [str], "people": [str], "notes": [str],
    "once?": bool,
}  # fmt: skip


MOST_NAMED = 40  # paths in a line; --json has all of them


def place_of_copies(deployment: Deployment) -> str:
    """Where copies of what was left behind are; there are none of what was only deleted, or is damaged."""
    return f" (copies are in {deployment.conflicts_folder})" if deployment.conflicts_folder else ""


def deployed_reply(
    system: System, deployment: Deployment, changed: bool, in_memory: Sequence[str] | None = None
) -> Reply:
    """The answer of a command that deploys; `in_memory` is the drift of a snapshot that runs as it is."""
    number = deployment.snapshot
    where = "has an entry in the boot menu" if deployment.slot in SECONDARY_SLOTS else "starts at the next boot: reboot"
    is_default = changed and deployment.slot not in SECONDARY_SLOTS
    if is_default and (once := trials_of(system).next_once(system.menu())):
        where = f"starts at the boot after the next one: before, snapshot {once.snapshot} is started once"
    text = f"snapshot {number} {where}" if changed else f"snapshot {number} is already deployed"
    if changed and deployment.carried:
        source = "the running /etc" if in_memory is None else "the /etc of the deployment that ran last"
        text += f"\n  carried over from {source}: {counted(deployment.carried, MOST_NAMED)}"
    if in_memory:
        text += f"\n  not carried over, since the running /etc is in memory: {counted(in_memory, MOST_NAMED)}"
    if changed and deployment.people:
        text += f"\n  accounts as in the running system: {counted(deployment.people, MOST_NAMED)}"
    if changed:
        text += "".join(f"\n  {one_line(note)}" for note in deployment.notes)
    if changed and deployment.conflicts:
        text += f"\n  left behind because of conflicts{place_of_copies(deployment)}: "
        text += counted(deployment.conflicts, MOST_NAMED)
    if changed and deployment.only_saved:
        text += f"\n  saved from the running /etc, but not in {number} (--with-saved brings it): "
        text += counted(deployment.only_saved, MOST_NAMED)
    if changed:
        text += "".join(f"\n  without effect: {one_line(what)}" for what in deployment.without_effect)
    data = {
        "snapshot": number, "changed": changed, "slot": deployment.slot, "id": deployment.id,
        "carried": list(deployment.carried), "conflicts": list(deployment.conflicts),
        "conflicts_folder": deployment.conflicts_folder, "without_effect": list(deployment.without_effect),
        "only_saved": list(deployment.only_saved),
        "people": list(deployment.people), "notes": list(deployment.notes),
    }  # fmt: skip
    return Reply(data, text, str(number))


def withdrawn_reply(system: System, number: int, fresh: bool) -> Reply:
    """Withdraw a snapshot's secondary deployments and the like; the answer is about the last of them."""
    with system.deploying() as deployments:
        deployments.recover()
        withdrawn = deployments.withdraw(number, fresh)
    slots = listed(one.slot for one in withdrawn)
    text = f"is no longer deployed in {slots}" if withdrawn else "has no secondary entry in the boot menu"
    last = withdrawn[-1] if withdrawn else None
    data = {
        "snapshot": number, "changed": bool(withdrawn), "slot": last.slot if last else "",
        "id": last.id if last else "", "carried": [], "conflicts": [], "conflicts_folder": "", "without_effect": [],
        "only_saved": [], "people": [], "notes": [],
    }  # fmt: skip
    return Reply(data, f"snapshot {number} {text}", str(number))


def require_countdown(system: System) -> None:
    """Raise AshError (REFUSED) if GRUB cannot write to this disk."""
    if not GrubNotes(system.layout, system.image).counts:
        what = "this disk has no EFI partition that GRUB can write to"
        raise AshError(what, "ash deploy N --secondary, and choose it in the boot menu", REFUSED)


def start_once(system: System, deployment: Deployment) -> None:
    """Have GRUB start a deployment at the next boot, and only then."""
    with system.deploying() as deployments:
        there = deployments.menu.deployments.get(deployment.slot)
        if there is None or there.id != deployment.id:
            raise AshError(f"another ash has replaced the deployment in {deployment.slot}", "", LOCKED)
        before = deployments.trials.next_once(deployments.menu)
        if before and before.snapshot != deployment.snapshot:
            console.say(f"ash: snapshot {before.snapshot} is not started once any more")
        deployments.menu.once = deployment.slot
        deployments.menu.deployments[deployment.slot] = deployments.trials.planned_once(there)
        deployments.boot_menu.write()
        deployments.trials.start_once(deployment)


@command(
    "deploy", "dep", "d", group=BOOT, usage="deploy [N] [--secondary]", help="boot N from the next start on",
    changes=True, numbers=1, require=System.require,
    options=[
        flag("--secondary", "--sec", "-2", help="one more entry in the boot menu, not the default"),
        flag("--no-secondary", help="delete N's deployments but the default, the running and the last booted one"),
        flag("--fresh-etc", help="leave the running /etc's changes behind"),
        flag("--with-saved", help="bring along what was saved from the running /etc into another snapshot"),
        flag("--fresh", help="leave behind what was changed in a mutable deployment as it ran"),
        flag("--force", help="also if N did not start when it was deployed last"),
        flag("--once", help="start N at the next boot only; then the default again"),
    ],
    answer=DEPLOYED_SHAPE,
)  # fmt: skip
def cmd_deploy(system: System, request: Request) -> Plan:
    number = request.snapshot
    if request.no_secondary:
        if request.dry_run and not system.deployments().secondary_of(number):
            yield would(f"change nothing: snapshot {number} has no secondary entry in the boot menu")
        yield would(f"take the secondary entry of snapshot {number} out of the boot menu")
        return withdrawn_reply(system, number, request.fresh)
    if request.once:
        require_countdown(system)
    elif not (request.secondary or request.force):
        require_not_bad(system, number)
    if request.dry_run:
        try:
            require_startable(system.layout.rootfs(number))
        except AshError as error:
            raise cannot_be_booted(number, error) from None
        secondary = request.secondary or request.once
        system.deployments().check(number, secondary=secondary, fresh_etc=request.fresh_etc, fresh=request.fresh)
    yield would(f"{'start snapshot' if request.once else 'deploy snapshot'} {number}{' once' if request.once else ''}")
    with step(f"deploying snapshot {number}"):
        options = {"secondary": request.secondary or request.once, "force": request.force}
        options |= {"fresh_etc": request.fresh_etc, "fresh": request.fresh, "with_saved": request.with_saved}
        deployment, changed = deploy_snapshot(system, number, **options)
    in_memory = [*running_etc(system).drift] if isinstance(system.booted, int) else None
    reply = deployed_reply(system, deployment, changed, in_memory)
    if not request.once:
        return reply
    start_once(system, deployment)
    _, *rest = lines_of(reply.text)
    text = "\n".join([f"snapshot {number} starts at the next boot, and only then: reboot", *rest])
    return reply._replace(text=text, data={**reply.data, "changed": True, "once": True})


def undo_live(system: System, number: int) -> LiveResult:
    """Take the change that was just undone in a snapshot out of the running system too."""
    newer, older = system.layout.undo(number), system.layout.rootfs(number)
    with system.lock(number):  # so that both stay as they are
        return change_live(system, "undoing the change in", partial(take_back, newer=newer, older=older))


def in_no_snapshot_line(paths: Sequence[str]) -> list[str]:
    """What is said of changes of the running /etc that were saved, and then taken out of their snapshot; or nothing."""
    what = "the running /etc has them, and no snapshot; a new deployment only with --with-saved"
    return [f"  {what}: {counted(paths, MOST_NAMED)}"] if paths else []


def last_change(history: History, number: int) -> str:
    """The change of a snapshot that an undo takes back: its command, and when it ended."""
    for entry in reversed(history.read()):
        if entry.get("snapshot") == number and entry.get("result") == "done" and entry.get("in_root"):
            command = " ".join(["ash", *map(str, entry.get("arguments", []))])
            return one_line(f"{command}, of {str(entry.get('time', ''))[:16].replace('T', ' ')}")
    return "its last change"


@command(
    "undo", group=BOOT, usage="undo N", help="put N back to what it was before its last change; twice is redo",
    **CHANGES_ONE, required=1, frees_space=True, retries=False,  # a second undo would be a redo
    options=LIVE,
    answer={**CHANGE_SHAPE, "newer_state": [str], "undone": str, "in_no_snapshot": [str], "live?": LIVE_SHAPE},
)  # fmt: skip
def cmd_undo(system: System, request: Request) -> Plan:
    number = request.snapshot
    if request.dry_run:
        require_predecessor(system, number)
    yield would(f"put snapshot {number} back to what it was before {last_change(system.history, number)}")
    before, now = system.layout.undo(number), system.layout.rootfs(number)
    was_live = number == system.current and before.exists() and is_live(system, now, before)
    live = goes_live(system, request, [number], by_default=was_live)
    undone, slot = last_change(system.history, number), system.last_booted_slot()
    in_none = undone_saves(system.layout, slot)
    change = undo_change(system, number)
    newer = newer_state(system, change)
    lines = [change.summary(f"is as it was before {undone}")]
    lines += [f"  /var still has the state of the newer {name}" for name in newer]
    in_none = [path for path in undone_saves(system.layout, slot) if path not in in_none]
    lines += in_no_snapshot_line(in_none)
    data = {**change_data(change), "newer_state": newer, "undone": undone, "in_no_snapshot": in_none}
    reply = Reply(data, "\n".join(lines))
    if live:
        result = undo_live(system, number)
        data, text = {**reply.data, "live": vars(result)}, f"{reply.text}\n{result.text()}"
        return Reply(data, text, status=FAILED if result.error else 0)
    deployed = {one.source for one in system.menu().deployments.values() if one.snapshot == number}
    if deployed - {subvolume_id(now)}:
        text = f"{reply.text}\nits deployment stays as it is: ash deploy {number}, then reboot"
        return reply._replace(text=text)
    return reply


def deploy_or_undo(system: System, number: int, undo: ExitStack) -> tuple[Deployment, bool]:
    """Deploy a snapshot; once it is the default in the boot menu, cancel `undo`, even if a later step fails."""
    try:
        return deploy_snapshot(system, number)
    finally:  # also after Ctrl-C
        menu = system.menu()
        there = menu.deployments.get(menu.default)
        if there and (there.snapshot, there.source) == (number, subvolume_id(system.layout.rootfs(number))):
            undo.pop_all()


def keep_deployment(system: System, slot: str, description: str) -> int:
    """Copy a deployment in its current state to a new top-level snapshot. Returns the snapshot's number."""
    layout = system.layout
    roll_back_live(system)
    with system.lock("deploy"), ExitStack() as stack:
        copy = layout.rootfs(f"new-{slot}")
        delete_subvolume(copy)
        snapshot_subvolume(layout.rootfs(slot), copy)
        stack.callback(delete_subvolume, copy)
        for mark in (IN_ROOT_SNAP, IN_ROOT_ID, IN_ROOT_LIVE, IN_ROOT_MENU):
            place_inside(copy, mark).unlink(missing_ok=True)
        if is_subvolume(layout.etc(slot)):
            note_saved(copy, etc_drift(layout.etc(slot), copy / "etc"))
        of = system.snapshot_of(slot)
        with new_snapshot(system, copy, description, of, None) as number, system.editing_tree() as tree:
            tree.add(number, None)
        return number


@command(
    "rollback", group=BOOT, usage="rollback",
    help="make the booted deployment permanent: keep it as a snapshot, deploy that", changes=True,
    answer={**DEPLOYED_SHAPE, "from": int, "without": [str]},
)  # fmt: skip
def cmd_rollback(system: System, request: Request) -> Plan:
    slot = system.last_booted_slot()
    if not slot:
        why = "no deployment is booted: there is nothing to make permanent"
        raise AshError(why, "ash deploy N deploys a snapshot", REFUSED)
    of = system.snapshot_of(slot)
    yield would(f"keep the booted deployment (of snapshot {of}) as a new snapshot, and deploy that")
    with step(f"keeping the booted deployment, of snapshot {of}"), ExitStack() as undo:
        number = keep_deployment(system, slot, f"rollback to {of}")
        undo.callback(system.with_reserve, partial(delete_snapshots, system, [number]))
        deployment, changed = deploy_or_undo(system, number, undo)
    reply, without = deployed_reply(system, deployment, changed), without_mutable(system, of)
    text = reply.text + without_line(of, number, without)
    return reply._replace(data={**reply.data, "from": of, "without": without}, text=text)


@command(
    "boot", "boot-update", "update-boot", group=BOOT, usage="boot [N]", help="renew N's boot configuration",
    changes=True, numbers=1, require=System.require, answer={"snapshot": int, "changed": bool, "slots": [str]},
)  # fmt: skip
def cmd_boot(system: System, request: Request) -> Plan:
    number = request.snapshot
    if request.dry_run:
        system.menu().slots_of(number)
    yield would(f"renew the boot configuration of snapshot {number}")
    with step(f"renewing the boot configuration of snapshot {number}"), system.deploying() as deployments:
        deployments.recover()
        renewed = deployments.boot_menu.renew(number)
    return Reply({"snapshot": number, "changed": True, "slots": renewed}, f"renewed: {', '.join(renewed)}")


@command(
    "carry", group=BOOT, usage="carry",
    help="carry changes of /etc over to the deployment for the next boot (done at shutdown)", changes=True,
    answer={"changed": bool, "carried": [str], "conflicts": [str]},
)  # fmt: skip
def cmd_carry(system: System, request: Request) -> Plan:
    yield would("carry changes of the running /etc over to the deployment for the next boot")
    roll_back_live(system)
    with system.deploying() as deployments:
        deployments.recover()
        menu = deployments.menu
        found = [one for slot in dict.fromkeys([menu.default, menu.once]) if (one := deployments.carry(slot))]
    carried = list(dict.fromkeys(path for one in found for path in one.carried))
    conflicts = list(dict.fromkeys(path for one in found for path in one.conflicts))
    text = f"carried over: {listed(carried)}" if carried else "nothing to carry over"
    text += "".join(f"\n  left behind{place_of_copies(one)}: {listed(one.conflicts)}" for one in found if one.conflicts)
    changed = bool(carried or conflicts)
    return Reply({"changed": changed, "carried": carried, "conflicts": conflicts}, text)


@command(
    "whichtmp", "whichdep", "which", group=BOOT, usage="whichtmp", help="print the booted slot",
    answer={"slot": str | int},
)  # fmt: skip
def cmd_whichtmp(system: System, request: Request) -> Reply:
    booted = system.booted
    if booted is None:
        raise AshError("no snapshot of this system is running", "", FAILED)
    return Reply({"slot": booted}, str(booted), str(booted))


# --- Commands on the other systems of the machine --------------------------------------------------------------

FIRMWARE = Path("/sys/firmware/efi/efivars")  # is there if the machine was started with UEFI
WINDOWS = "Microsoft/Boot/bootmgfw.efi"  # below EFI/


class FirmwareEntry(NamedTuple):
    """An entry in the boot menu of UEFI firmware."""

    number: str  # four hexadecimal digits
    label: str
    where: str  # the device path: a partition and a file, or something else

    def starts(self, path: str, partition: str = "") -> bool:
        """Whether it starts a file below EFI/, on a partition with that id in its table if one is given."""
        return f"/EFI/{path}".replace("/", "\\").lower() in self.where.lower() and self.is_on(partition)

    def is_on(self, partition: str) -> bool:
        """Whether it starts from the partition with an id; in an MBR that is made of the disk's id and the number."""
        if found := re.fullmatch(r"([0-9a-f]{8})-([0-9a-f]{2})", partition, re.IGNORECASE):
            partition = f"HD({int(found[2], 16)},MBR,0x{found[1]}"
        return partition.lower() in self.where.lower()


class Firmware:
    """The boot menu of UEFI firmware, which the program efibootmgr lists and changes.

    Raises:
        AshError (REFUSED): the machine was not started with UEFI, or the program is missing.
    """

    def __init__(self) -> None:
        import shutil

        if not FIRMWARE.is_dir():
            raise AshError("this machine was not started with UEFI", "choose it in the boot menu", REFUSED)
        if shutil.which("efibootmgr", path=SYSTEM_PATH) is None:
            raise AshError("efibootmgr is not installed", "ash install N efibootmgr, deploy that", REFUSED)
        self.read(run(["efibootmgr", "--verbose"]).stdout)

    def read(self, text: str) -> None:
        """Parse the output of efibootmgr."""
        found = re.findall(r"^Boot([0-9A-F]{4})[* ] (.*?)\t(.*)$", text, re.MULTILINE)
        self.entries = [FirmwareEntry(*fields) for fields in found]
        order = re.search(r"^BootOrder: ([0-9A-F,]+)$", text, re.MULTILINE)
        self.order = order[1].split(",") if order else []

    def find(self, path: str, partition: str = "") -> FirmwareEntry | None:
        """The first entry that starts a file below EFI/; see FirmwareEntry.starts()."""
        ranks = {number: rank for rank, number in enumerate(self.order)}
        found = [entry for entry in self.entries if entry.starts(path, partition)]
        return min(found, key=lambda entry: ranks.get(entry.number, len(ranks)), default=None)

    def delete(self, entry: FirmwareEntry) -> None:
        self.entries.remove(entry)
        run(["efibootmgr", "--quiet", "--bootnum", entry.number, "--delete-bootnum"])

    def put_first(self, entry: FirmwareEntry) -> None:
        """Have the firmware start an entry from now on, and the others if it fails."""
        order = [entry.number, *(number for number in self.order if number != entry.number)]
        run(["efibootmgr", "--quiet", "--bootorder", ",".join(order)])


def require_own_firmware(system: System) -> None:
    """Raise AshError (REFUSED) unless the system runs: the firmware of another machine cannot be reached."""
    if not system.running:
        raise AshError("this is not the running system: its machine's firmware cannot be reached", "", REFUSED)


def loader_of(ident: str) -> str:
    """The boot loader of a system, below EFI/."""
    return f"{ident}/shimx64.efi"


def partition_id(node: Path) -> str:
    """The id that a partition has in the partition table of its disk; firmware names it by that."""
    return run(["blkid", "--probe", "--match-tag", "PART_ENTRY_UUID", "--output", "value", node]).stdout.strip()


def add_firmware_entry(node: Path, ident: str, label: str) -> None:
    """Add an entry for the boot loader of a system on an EFI partition, as the first one."""
    directory = Path("/sys/class/block", node.name)
    drive = Path("/dev", directory.resolve().parent.name)
    number = read_text(directory / "partition").strip()
    loader = f"/EFI/{loader_of(ident)}".replace("/", "\\")
    where = ["--disk", str(drive), "--part", number, "--loader", loader]
    run(["efibootmgr", "--quiet", "--create", *where, "--label", label])


@command(
    "dist", "distro", group=BOOT, usage="dist [NAME]", help="list the systems on this disk, or have another one start",
    changes=True, words="words", of_all_systems=True,
    answer={"systems?": [{"id": str, "running": bool, "complete": bool}], "first?": str, "changed?": bool},
)  # fmt: skip
def cmd_dist(system: System, request: Request) -> Plan:
    layout = system.layout
    there = Layout.all_on(layout.top) if layout.top else [layout]
    if not request.words:
        running = layout.distro if system.running else ""
        rows = [{"id": one.distro, "running": one.distro == running, "complete": one.is_complete} for one in there]
        marks = {one.distro: "" if one.is_complete else "  not complete" for one in there}
        lines = [f"{ident}{'  running' if ident == running else mark}" for ident, mark in marks.items()]
        return Reply({"systems": rows}, "\n".join(lines))
    name, complete = " ".join(request.words), [one.distro for one in there if one.is_complete]
    if name not in complete:
        hint = f"there are: {listed(complete)}"
        raise AshError(f"there is no complete system {one_line(name)} on this disk", hint, MISSING)
    require_own_firmware(system)
    firmware = Firmware()
    node, _ = EfiPartition(layout).place()
    is_of_ashos = next(one.is_of_ashos for one in there if one.distro == name)
    entry = firmware.find(f"{name}/" if is_of_ashos else loader_of(name), partition_id(node))
    if entry is None and is_of_ashos:
        what = f"the firmware's boot menu has no {one_line(name)}, a system of AshOS"
        raise AshError(what, "start it from the boot menu of this system", MISSING)
    yield would(f"have the firmware start {name}")
    if entry:
        firmware.put_first(entry)
    else:
        add_firmware_entry(node, name, f"{name} (ash)")
    return Reply({"first": name, "changed": True}, f"{name} starts from the next boot on: reboot", name)


@command(
    "hide", group=BOOT, usage="hide", help="have Windows start at the next boot, and only then", changes=True,
    answer={"changed": bool, "entry": str},
)  # fmt: skip
def cmd_hide(system: System, request: Request) -> Plan:
    require_own_firmware(system)
    entry = Firmware().find(WINDOWS)
    if entry is None:
        raise AshError("the firmware's boot menu has no Windows", "efibootmgr lists it", MISSING)
    yield would(f"have the firmware start {one_line(entry.label)} once")
    run(["efibootmgr", "--quiet", "--bootnext", entry.number])
    label = one_line(entry.label)
    return Reply({"changed": True, "entry": label}, f"{label} starts at the next boot, and only then: reboot")


# --- Commands on trials ----------------------------------------------------------------------------------------

# Programs to run once a deployment has proved good, and once the machine went back to the last good one.
AFTER_SUCCESS = ("usr/lib/greenboot/green.d", "etc/greenboot/green.d")
AFTER_FALLBACK = ("usr/lib/greenboot/red.d", "etc/greenboot/red.d")
CHECK_SECONDS = 300  # that each may take
# The id of the message in the journal that says that the machine went back.
FELL_BACK_MESSAGE = "0f730bd3b7a74c3ab71b2797db2fb8c3"
BLESS_WAIT = 300.0  # seconds to wait for a lock: nobody waits for the result
LOGIN_MESSAGE = Path("/run/motd.d/ash")  # shown at login by pam_motd


def programs_in(root: Path, directories: Sequence[str]) -> Iterator[Path]:
    """The programs in some directories of a root, by name: executable files, greenboot's *.sh, links to nothing."""
    for directory in directories:
        for path in sorted((root / directory).glob("*")):
            is_program = path.is_file() and (os.access(path, os.X_OK) or path.suffix == ".sh")
            if is_program or (path.is_symlink() and not path.exists()):
                yield path


def not_programs_in(root: Path, directories: Sequence[str]) -> list[Path]:
    """The other files there."""
    programs = {*programs_in(root, directories)}
    files = (path for directory in directories for path in sorted((root / directory).glob("*")) if path.is_file())
    return [path for path in files if path not in programs]


def passes(program: Path) -> bool:
    """Run a program of these directories; its output is ash's own. Returns whether it succeeded in time."""
    import subprocess

    argv = [str(program)] if os.access(program, os.X_OK) else ["sh", str(program)]
    limit = ["timeout", "--kill-after=10", str(CHECK_SECONDS)]
    done = subprocess.run([*limit, *argv], stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    return done.returncode == 0


@command(
    "health", group=BOOT, usage="health", help="run the health checks (done at boot)", needs_system=False,
    answer={"passed": [str], "failed": [str], "wanted": [str]},
)  # fmt: skip
def cmd_health(request: Request) -> Reply:
    if request.root or request.image:
        raise AshError("health checks are for the running system", "leave out --root and --image", USAGE)
    require_root("running the health checks")
    root = Path("/")
    results = {path: passes(path) for path in programs_in(root, REQUIRED_CHECKS)}
    wanted = [str(path) for path in programs_in(root, WANTED_CHECKS) if not passes(path)]
    for path in not_programs_in(root, (*REQUIRED_CHECKS, *WANTED_CHECKS)):
        console.warn(f"{path} is not run: it is not executable")
    failed = [str(path) for path, passed in results.items() if not passed]
    passed = [str(path) for path, passed in results.items() if passed]
    lines = [f"failed: {listed(failed)}"] if failed else [f"{len(passed)} required checks passed"]
    lines += [f"failed, but not required: {listed(wanted)}"] if wanted else []
    data = {"passed": passed, "failed": failed, "wanted": wanted}
    return Reply(data, "\n".join(lines), status=FAILED if failed else 0)


def announce(text: str) -> None:
    """Say in the journal and at the next login that a deployment did not start."""
    text = one_line(f"ash: {text} (ash status)")
    running_init().log(text, FELL_BACK_MESSAGE)
    with contextlib.suppress(OSError):
        LOGIN_MESSAGE.parent.mkdir(exist_ok=True)
        LOGIN_MESSAGE.write_text(f"{text}\n")


def note_good(deployments: Deployments, slot: str) -> bool:
    """Note that the deployment in a slot boots: GRUB no longer counts its starts. Returns whether that is new.

    A start once, which is over, is forgotten.
    """
    menu, trials = deployments.menu, deployments.trials
    one, once = menu.deployments[slot], trials.next_once(menu)
    is_new, is_over = not one.boots, bool(menu.once and once is None)
    if is_new:
        menu.deployments[slot] = one._replace(tries=0, minutes=0, boots=True)
        if (
            slot == menu.default or slot not in SECONDARY_SLOTS
        ):  # what was only started once is not what one goes back to
            menu.good = slot
    if is_over:
        menu.once = ""
    if is_new or is_over:
        deployments.boot_menu.write()
    if is_new:
        trials.end(one)
    return is_new


def failure_to_tell(system: System, back_to: Deployment) -> Failure | None:
    """The deployment that GRUB says did not start, complete with why, if that was not told yet."""
    ident = kernel_options().get(FELL_BACK, "")
    noted = [one for one in failures(system.layout) if (one.deployment, one.back_to) == (ident, back_to.id)]
    if not noted or noted[0].told:
        return None
    units, journal = running_init().last_words(f"{DEPLOYMENT}={ident}")
    failure = noted[0]._replace(units=units, journal=journal, told=True)
    note_failure(system.layout, failure)
    return failure


class EndedOnce(NamedTuple):
    """A start once that is over; the deployment is not known to boot."""

    snapshot: int
    units: Sequence[str]  # what failed in it, as far as its journal reached the disk

    def text(self) -> str:
        """What happened, on one line."""
        why = f"; failed: {listed(self.units)}" if self.units else ""
        return f"snapshot {self.snapshot} was started once, and that ended before it was known to boot{why}"


def once_to_tell(deployments: Deployments, slot: str) -> EndedOnce | None:
    """The start once that is over, if another slot runs now."""
    menu = deployments.menu
    one = menu.deployments.get(menu.once)
    if not one or one.slot == slot or one.boots or deployments.trials.next_once(menu):
        return None
    return EndedOnce(one.snapshot, running_init().last_words(f"{DEPLOYMENT}={one.id}")[0])


@command(
    "bless", group=BOOT, usage="bless", help="note that the running deployment is good (done at boot)", changes=True,
    frees_space=True,
    answer={
        "changed": bool, "slot": str, "snapshot": int, "fell_back_from": (FELL_BACK_SHAPE, None),
        "ended_once": ({"snapshot": int, "units": [str]}, None),
    },
)  # fmt: skip
def cmd_bless(system: System, request: Request) -> Plan:
    slot = system.booted_slot
    if slot is None or slot not in system.menu().deployments:
        raise AshError("no deployment of this system is running", "ash deploy N, reboot", REFUSED)
    yield would(f"note that the deployment in {slot} is good")
    system.wait = request.wait or BLESS_WAIT
    with system.deploying() as deployments:
        deployments.note_fallback()
        running = deployments.menu.deployments[slot]
        failure = failure_to_tell(system, running)
        was_bad, ended = forget_failure(system.layout, running), once_to_tell(deployments, slot)
        is_new = note_good(deployments, slot) or was_bad
    lines = [one.text() for one in (failure, ended) if one]
    if lines and system.running:
        announce("; ".join(lines))
    after = AFTER_FALLBACK if failure else AFTER_SUCCESS if is_new else ()
    for program in programs_in(Path("/"), after) if system.running else ():
        if not passes(program):
            console.warn(f"{program} failed")
    number = system.snapshot_of(slot)
    if not failure:
        known = "is known to boot now" if is_new else "was known to boot already"
        lines = [f"snapshot {number} ({slot}) {known}", *lines]
    data = {
        "changed": bool(is_new or failure), "slot": slot, "snapshot": number,
        "fell_back_from": fell_back_data(failure), "ended_once": ended and ended._asdict(),
    }  # fmt: skip
    return Reply(data, "\n".join(lines))


# --- Shells and programs in a snapshot -------------------------------------------------------------------------

RUNNING_INSIDE = "run/ash/running"


def refuse_json() -> None:
    if console.json:
        raise AshError("a shell has no answer in JSON", "ash --json run N COMMAND...", USAGE)


@contextmanager
def raise_on_hangup() -> Iterator[None]:
    """Raise HangUp on SIGHUP inside the block. It comes twice: the second must not interrupt the saving of the work."""

    def raise_hang_up(*_: object) -> NoReturn:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise HangUp

    before = signal.signal(signal.SIGHUP, raise_hang_up)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def reclaim_terminal() -> None:
    """Make ash the terminal's foreground process group again: an interactive shell leaves its own there."""
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.tcsetpgrp(sys.stdin.fileno(), os.getpgrp())
    signal.signal(signal.SIGTTOU, before)


def ask_whether_to_keep(status: int) -> str:
    """Ask what to do after a shell that failed, or whose last command did: "y", "n" or "back".

    Raises HangUp at the end of the input, as when the terminal goes away: the work is kept.
    """
    question = f"the shell exited with status {status}: keep the changes? [Y/n/back] "
    answers = {"": "y", "y": "y", "yes": "y", "n": "n", "no": "n", "b": "back", "back": "back"}
    while True:
        try:
            answer = answers.get(ask(question))
        except EOFError:
            raise HangUp from None
        if answer:
            return answer
        question = "y keeps them, n drops them, back returns to the shell: keep the changes? [Y/n/back] "


def executable_inside(work: Transaction) -> list[tuple[Path, str]]:
    """A bind mount with a copy of ash for a shell in a snapshot, where it says that it must not be run in there."""
    directory = work.place.private / "snapshots"
    if not work.layout.executable.is_file() or not is_directory(work.root / ".snapshots"):
        return []
    (directory / "ash").mkdir(parents=True, exist_ok=True)
    copy = directory / "ash/ash"
    copy.unlink(missing_ok=True)
    copy_file(work.layout.executable, copy)
    return [(directory, ".snapshots")]


def warn_of_lost_needs(work: Transaction) -> None:
    """Say what ash and the boot need that a program run by the user has removed."""
    if lost := lost_needs(work.system.distro, work.original, work.root):
        console.say(f"ash: snapshot {work.snapshot} no longer has {listed(lost)}, which ash needs")


def hidden_files(work: Transaction) -> dict[str, list[str]]:
    """The files that a transaction wrote where a deployment has something else mounted, by mount point.

    Transactions see the shared directories, and no other mounts of the user.
    """
    roots = [work.root]
    with contextlib.suppress(AshError):  # the menu is damaged
        roots += [work.layout.rootfs(slot) for slot in [work.system.last_good_slot()] if slot]
    lines = [line for root in roots for line in fstab_of_user(read_text(place_inside(root, "etc/fstab")))]
    at_boot = [line for line in lines if "noauto" not in "".join(line.split()[3:4]).split(",")]
    found = dict[str, list[str]]()
    for inside in sorted({fstab_directory(line) for line in at_boot} - {"", *shared_directories(work.root)}):
        if inside.partition("/")[0] not in MOUNTED_OVER and has_real_parents(work.root, f"{inside}/x"):
            paths = [f"{inside}/{name}" for name in sorted(paths_below(work.root / inside))]
            found[inside] = [
                path
                for path in paths
                if not is_directory(work.root / path) and not is_untouched(path, work.original, work.root)
            ]
    return {inside: paths for inside, paths in found.items() if paths}


def warn_of_hidden_files(work: Transaction) -> None:
    """Say which files of a transaction nobody will see."""
    for inside, paths in hidden_files(work).items():
        console.say(f"ash: /{inside} is a mount point in fstab, and hides what the snapshot has there: {listed(paths)}")


def shell_in(system: System, number: int, *, resume: bool = False, binds: Sequence[tuple[Path, str]] = ()) -> Reply:
    """Open a root shell in a snapshot or the base; commit its changes if it exits with 0, or if the user says so.

    `binds` are its bind mounts: source, and path inside the snapshot. Raises CommandFailed if the changes were dropped.
    """
    refuse_json()
    with raise_on_hangup(), Transaction(system, number, resume=resume, base=number == BASE) as work:
        work.binds += [*binds, *executable_inside(work)]
        shell = root_shell(work.root)
        terminal = sys.stdin.isatty()
        fails = "it asks if the last command failed" if terminal else "another status than 0 drops them"
        console.say(f"ash: a shell in snapshot {number}; `exit` keeps the changes, {fails}")
        while True:
            status = work.chroot().run([shell])
            if terminal:
                reclaim_terminal()
            try:
                answer = "y" if status == 0 else ask_whether_to_keep(status) if terminal else "n"
            except HangUp:
                console.say(f"ash: the changes wait: ash chroot {number} --resume, or ash unlock {number}")
                raise
            if answer == "y":
                warn_of_lost_needs(work)
                warn_of_hidden_files(work)
                break
            if answer == "n":
                raise CommandFailed(status, f"snapshot {number} is unchanged: the shell exited with status {status}")
    return Reply(change_data(work.change), work.change.summary())


@command(
    "chroot", "chr", "ch", "cr", group=INSIDE, usage="chroot [N]",
    help="open a root shell in N; `exit` keeps the changes", changes=True, numbers=1, own_status=True, options=[RESUME],
)  # fmt: skip
def cmd_chroot(system: System, request: Request) -> Plan:
    number = request.snapshot
    system.require_changeable(number, base=request.resume)  # base-update opens shells in the base
    refuse_kept(system, request, [] if request.resume else [number])
    yield would(f"open a shell in snapshot {number}")
    return shell_in(system, number, resume=request.resume)


def run_in(system: System, number: int, argv: Sequence[str], privileged: bool = False) -> Change:
    """Run a command in a snapshot; nothing in it has changed if it fails (CommandFailed)."""
    with Transaction(system, number) as work:
        chroot = work.chroot()._replace(privileged=privileged)
        status = chroot.run(argv, output=[2] if console.json else [])
        if status:
            raise CommandFailed(status, f"snapshot {number} is unchanged: the command exited with status {status}")
        warn_of_lost_needs(work)
        warn_of_hidden_files(work)
    return work.change


@command(
    "run", group=INSIDE, usage="run N COMMAND...", help="run one command in N; its exit status decides", **CHANGES_ONE,
    required=1, words="command", rest=True, own_status=True, answer={**CHANGE_SHAPE, "status": int},
    options=[COMMAND, flag("--privileged", help="with all capabilities and devices: it may change the running system")],
)  # fmt: skip
def cmd_run(system: System, request: Request) -> Plan:
    yield would(f"run in snapshot {request.snapshot}: {one_line(' '.join(request.command))}")
    change = run_in(system, request.snapshot, request.command, request.privileged)
    if request.privileged and not change.changed:  # what it did outside of the snapshot, nothing else tells
        system.history.append({**(system.caller or {}), "snapshots": [request.snapshot], "result": "done"})
    return Reply({**change_data(change), "status": 0}, change.summary() if change.conflicts or change.kept else "")


def kill_children() -> None:
    """Kill this process's children, including adopted orphans, until none is left."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it has exited
                    _, parent = (process / "stat").read_bytes().rpartition(b")")[2].split()[:2]
                    if int(parent) == os.getpid():
                        os.kill(int(process.name), signal.SIGKILL)
            os.waitpid(-1, 0)


def run_unlocked(root: Path, argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program in the running system with its root (given on a writable mount) writable; return its exit status.

    Processes that it leaves behind are killed: they would keep the writable root.
    """
    unlocked = PRIVATE / "unlocked"
    unlocked.mkdir()
    parent = os.getpid()
    libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        status = OUR_FAILURE_IN_RUN
        try:
            die_with_parent(parent)
            libc("unshare", CLONE_NEWNS)
            bind(root, unlocked)
            bound: list[str] = ["/run/"]
            bind(Path("/run"), unlocked / "run")  # without ash's private mounts in there
            for one in sorted({m.target for m in mounts()} - {"/"}, key=len):
                if not f"{one}/".startswith(tuple(bound)):  # its parent's recursive bind mount has it already
                    mount(one, unlocked / one.lstrip("/"), flags=MS_BIND | MS_REC)
                    bound.append(f"{one}/")
            os.chroot(unlocked)
            os.chdir("/root")
            os.execve(argv[0], list(argv), {**clean_environment(), **environment})
        except (AshError, OSError) as error:
            print(one_line(f"ash: {reason(error)}"), file=sys.stderr)
        os._exit(status)
    _, status = os.waitpid(child, 0)
    kill_children()
    if sys.stdin.isatty():
        reclaim_terminal()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


@command(
    "live-chroot", "lchroot", "lc", group=INSIDE, usage="live-chroot",
    help="open a writable root shell in the running system; the next deployment does not have its changes",
    changes=True, own_status=True,
)  # fmt: skip
def cmd_live_chroot(system: System, request: Request) -> Plan:
    slot = system.booted
    if not isinstance(slot, str):
        raise AshError("no deployment of this system is running", "ash chroot N opens a shell in a snapshot", REFUSED)
    refuse_json()
    yield would("open a writable shell in the running system")
    with system.lock("live"):
        LiveWorkDir(system).recover(system.tree())
        write_inside(system.layout.rootfs(slot), IN_ROOT_LIVE, "")
        console.say("ash: a writable shell in the running system; the next deployment will not have its changes")
        prompt = dict.fromkeys(system.distro.prompt_variables, "live")
        status = run_unlocked(system.layout.rootfs(slot), [root_shell(Path("/"))], prompt)
    sync_filesystem(system.layout.snapshots)
    if status:
        raise CommandFailed(status, f"the shell exited with status {status}; its changes stay")
    return Reply({"changed": True}, "")


@command(
    "hollow", group=INSIDE, usage="hollow [N]",
    help="open a root shell in N that shows the running system as well, then deploy N",
    **CHANGES_ONE, own_status=True, options=[RESUME],
)  # fmt: skip
def cmd_hollow(system: System, request: Request) -> Plan:
    number = request.snapshot
    if not system.running:
        why = "no snapshot of this system is running: there is nothing to show inside"
        raise AshError(why, "ash chroot N", REFUSED)
    yield would(f"open a shell in snapshot {number} with the running system in /{RUNNING_INSIDE}, then deploy it")
    console.say(f"ash: the running system is in /{RUNNING_INSIDE}")
    reply = shell_in(system, number, resume=request.resume, binds=[(Path("/"), RUNNING_INSIDE)])
    deployed = deployed_reply(system, *deploy_snapshot(system, number))
    text = f"{reply.text}\n{deployed.text}"
    return reply._replace(text=text, data={**reply.data, "slot": deployed.data["slot"]})


def edit_text(text: str) -> str:
    """Let the user edit a text, and return it. The editor is all that ash takes from the caller's environment."""
    import shlex
    import shutil
    import subprocess
    import tempfile

    wanted = [os.environ.get(name, "") for name in ("SUDO_EDITOR", "VISUAL", "EDITOR")]
    nano = shutil.which("nano", path=SYSTEM_PATH)
    editor = next((shlex.split(words) for words in wanted if words), None) or [nano or "vi"]
    with tempfile.NamedTemporaryFile("w+", suffix=".conf", dir=PRIVATE) as file:
        write_text(Path(file.name), text)
        try:
            status = subprocess.run([*editor, file.name], env=clean_environment(), check=False).returncode
        except OSError as error:
            raise AshError(f"the editor {editor[0]} cannot be started: {error.strerror}") from error
        if status:
            raise AshError(f"the editor exited with status {status}: nothing was changed")
        return read_text(Path(file.name))


def edit_configuration(system: System, text: str) -> str:
    """Let the user edit the text of an ash.conf until it is valid; AshError (USAGE) if he gives up."""
    while True:
        text = edit_text(text)
        try:
            configuration = Configuration.parse(text, strict=True)
            if configuration.is_on("aur") and not system.distro.has_aur:
                raise AshError("aur::True has no effect: this distribution has no AUR", "", USAGE)
            return text
        except AshError as error:
            hint = f" ({error.hint})" if error.hint else ""
            print(one_line(f"ash: {error.message}{hint}"), file=sys.stderr)
            try:
                again = ask("edit it again? [Y/n] ")
            except EOFError:
                again = "n"
            if again not in ("", "y", "yes"):
                raise


def regular_file(root: Path, path: str, whose: str) -> Path:
    """A path in a root; AshError if something else than a regular file is there."""
    there = path_inside(root, path)
    if os.path.lexists(there) and not there.is_file():
        raise AshError(f"/{path} of {whose} is not a regular file")
    return there


def edit_running(system: System, number: int) -> Reply:
    """Edit the /etc/ash.conf of the running system, whose snapshot has the number."""
    path = regular_file(Path("/"), "etc/ash.conf", "the running system")
    before = read_text(path)
    text = edit_configuration(system, before or CONF_EXAMPLE)
    if text != before:
        about_to("write ash.conf")
        rewrite(path, text)
    said = "nothing to change" if text == before else "the running /etc/ash.conf is changed; deploy carries it over"
    return Reply(change_data(Change(number, changed=text != before)), said)


@command(
    "edit-conf", "edit", group=INSIDE, usage="edit-conf [N] [--running]",
    help="edit /etc/ash.conf of N, or of the running system", changes=True, numbers=1,
    options=[flag("--running", help="that of the running system, where the keys of the machine are read from")],
    answer=CHANGE_SHAPE,
)  # fmt: skip
def cmd_edit_conf(system: System, request: Request) -> Plan:
    number = request.snapshot
    if request.running and number != system.current:
        raise AshError(
            f"snapshot {number} is not running", f"ash edit-conf {number}, or ash edit-conf --running", USAGE
        )
    if not request.running:
        if number == BASE == system.current:
            raise AshError("snapshot 0 is the base: it cannot be changed", "ash edit-conf --running", REFUSED)
        system.require_changeable(number)
    yield would(f"edit /etc/ash.conf of {'the running system' if request.running else f'snapshot {number}'}")
    if not sys.stdin.isatty():
        hint = "without one, ash run N COMMAND can change the file"
        raise AshError("there is no terminal for the editor", hint, USAGE)
    if request.running:
        return edit_running(system, number)
    with Transaction(system, number) as work:
        path = regular_file(work.root, "etc/ash.conf", f"snapshot {number}")
        path.parent.mkdir(exist_ok=True)
        before = read_text(path)
        text = edit_configuration(system, before or CONF_EXAMPLE)
        if text != before:
            write_text(path, text)
    return Reply(change_data(work.change), work.change.summary())


@command(
    "etc-update", "etc", "etc-up", "up-etc", group=INSIDE, usage="etc-update",
    help="save the running /etc into the booted snapshot", changes=True,
    answer={**CHANGE_SHAPE, "carried": [str], "in_no_snapshot": [str]},
)  # fmt: skip
def cmd_etc_update(system: System, request: Request) -> Plan:
    yield would("save into the booted snapshot: " + listed(running_etc(system).drift or ["nothing"]))
    change, merge = save_drift(system)
    in_none = undone_saves(system.layout, system.last_booted_slot())
    data = {**change_data(change), "carried": merge.carried, "conflicts": merge.in_conflict, "in_no_snapshot": in_none}
    lines = [f"saved into snapshot {change.snapshot}: {listed(merge.carried)}" if merge.carried else "nothing to save"]
    if merge.in_conflict:
        lines.append(f"  not saved, since the snapshot changed them too: {listed(merge.in_conflict)}")
    if identity := [path for path in merge.drift if re.fullmatch(IDENTITY, path)]:
        lines.append(f"  not saved, since every snapshot runs with those of the machine: {listed(identity)}")
    lines += [f"  without effect: {one_line(what)}" for what in merge.without_effect]
    lines += in_no_snapshot_line(in_none)
    return Reply(data, "\n".join(lines))


@command(
    "unlock", "ul", group=INSIDE, usage="unlock [N]", help="discard what an interrupted transaction left on N",
    changes=True, numbers=1, require=System.require, frees_space=True, answer={"snapshot": int, "changed": bool},
)  # fmt: skip
def cmd_unlock(system: System, request: Request) -> Plan:
    number = request.snapshot
    yield would(f"discard what an interrupted transaction left on snapshot {number}")
    directory = system.layout.work(number)
    with system.lock(number):
        changed = (directory / "intent").exists() or system.layout.working_copy(number).exists()
        system.workdir(number).recover(system.tree(), drop_kept=True)
    text = f"snapshot {number} is unlocked" if changed else f"snapshot {number} has nothing to unlock"
    return Reply({"snapshot": number, "changed": changed}, text)


RECOVERS: Mapping[str, Any] = {
    "group": INSIDE, "changes": True, "frees_space": True, "answer": {"snapshots": [int], "changed": bool},
}  # fmt: skip


def recovered_reply(found: Sequence[int | str]) -> Reply:
    snapshots = [one for one in found if isinstance(one, int)]
    lines = [f"tidied up: {listed(snapshots)}"] if snapshots else []
    lines += ["rolled back an interrupted change of the running system"] if "live" in found else []
    return Reply({"snapshots": snapshots, "changed": bool(found)}, "\n".join(lines) or "nothing was interrupted")


@command("tmp", "tmpclear", usage="tmp", help="discard what interrupted transactions left on all snapshots", **RECOVERS)
def cmd_tmp(system: System, request: Request) -> Plan:
    yield would("discard what interrupted transactions left")
    return recovered_reply(recover_all(system, drop_kept=True))


@command("recover", usage="recover", help="finish or undo what was interrupted (done at every boot)", **RECOVERS)
def cmd_recover(system: System, request: Request) -> Plan:
    yield would("finish or undo what was interrupted")
    return recovered_reply(recover_all(system, drop_kept=False))


# --- Packages --------------------------------------------------------------------------------------------------

CHANGES_SHAPE: dict[str, Any] = {f"{key}?": shape for key, shape in CHANGE_SHAPE.items()}
CHANGES_SHAPE |= {"snapshots?": [CHANGE_SHAPE], "live?": LIVE_SHAPE}


def changes_reply(changes: Sequence[Change], live: LiveResult | None = None) -> Reply:
    """The answer of a command that changes one or several snapshots, and possibly the running system."""
    lines = [done.summary() for done in changes]
    waiting = [str(done.snapshot) for done in changes if done.changed]
    if live:
        lines.append(live.text())
    elif waiting:
        lines.append(f"to run it: ash deploy {waiting[0]}, then reboot")
    data: dict[str, Any] = {"changed": any(c.changed for c in changes), "snapshots": [change_data(c) for c in changes]}
    if len(changes) == 1:
        data = change_data(changes[0])
    if live:
        data = {**data, "changed": data["changed"] or live.changed, "live": vars(live)}
    return Reply(data, "\n".join(lines), status=FAILED if live and live.error else 0)


def would_change(changes: Sequence[Change]) -> Reply:
    planned = [{**change_data(change), "download": change.download} for change in changes]
    data = {"changed": False, "dry_run": True, "would": planned}
    return Reply(data, "\n".join(change.summary("would change") for change in changes))


def package_reply(request: Request, changes: Sequence[Change], live: LiveResult | None = None) -> Reply:
    return would_change(changes) if request.dry_run else changes_reply(changes, live)


def repositories_hint(system: System, number: int) -> str:
    """What to do if the running /etc has other repositories than a snapshot; empty if it has the same."""
    slot = system.booted_slot
    if not slot:
        return ""
    roots = (Path("/") if system.running else system.layout.rootfs(slot), system.layout.rootfs(number))
    running, own = map(system.package_manager.repositories, roots)
    if running == own:
        return ""
    differ = "the repositories in the running /etc are not those of"
    if number == system.current != BASE:
        return f"{differ} snapshot {number}: ash etc-update saves them into it"
    return f"{differ} snapshot {number}: ash deploy {number}, reboot, ash etc-update"


def refusal_of_removal(snapshot: int, needed: Sequence[str]) -> AshError:
    what = f"this would remove {listed(needed)}, which ash needs: snapshot {snapshot} is unchanged"
    return AshError(what, "--force removes it all the same", REFUSED)


def require_needs(work: Transaction) -> None:
    """Raise AshError (REFUSED) if a transaction removed, or would remove, what ash and the boot need."""
    distro = work.system.distro
    planned = [name for name in {*distro.needs.values()} if work.simulate and name in work.change.removed]
    if lost := planned or lost_needs(distro, work.original, work.root):
        raise refusal_of_removal(work.snapshot, sorted(lost))


def change_snapshot(
    system: System,
    number: int,
    doing: str,
    work: Work,
    *,
    simulate: bool = False,
    base: bool = False,
    force: bool = False,
) -> Change:
    """Change a snapshot in a transaction. `doing` tells the user what happens: "installing into".

    Raises AshError (REFUSED) if the change removes what ash needs, unless `force`.
    """
    with step(f"{doing} snapshot {number}"), Transaction(system, number, simulate=simulate, base=base) as transaction:
        try:
            work(transaction)
        except AshError as error:
            if error.status == MISSING and (hint := repositories_hint(system, number)):
                error.hint = hint
            raise
        if not force:
            require_needs(transaction)
        warn_of_hidden_files(transaction)
    return transaction.change


def installed_of(system: System, which: int | str, packages: Iterable[str]) -> list[str]:
    root = system.layout.rootfs(which)
    there = system.package_manager.installed(root)
    return [name for name in packages if system.package_manager.canonical_name(root, name) in there]


def remove_packages(system: System, number: int, packages: Sequence[str], request: Request) -> Change:
    """Remove packages from a snapshot, all or none; AshError (MISSING) if none of them is installed."""
    if not installed_of(system, number, packages) and not (request.purge and packages):
        raise AshError(f"snapshot {number} does not have {' '.join(packages)}", f"ash list {number}", MISSING)
    needs = {*system.distro.needs.values()}
    if not request.force and (named := [name for name in packages if name in needs]):
        raise refusal_of_removal(number, named)
    work = partial(system.package_manager.remove, packages=packages, purge=request.purge)
    done = change_snapshot(system, number, "removing from", work, simulate=request.dry_run, force=request.force)
    return delete_data(system, done) if request.delete_data and done.kept else done


def refresh(work: Transaction, strict: bool = False) -> Sequence[str]:
    """Fetch the package lists. Returns the unusable repositories: warns about them, or (`strict`) RepositoryError."""
    missing = work.package_manager.refresh(work)
    if missing and strict:
        hint = "leave out --strict to continue without them"
        raise RepositoryError(f"some repositories cannot be reached: {'; '.join(missing)}", hint)
    for one in missing:
        console.say(f"ash: {one_line(one).rstrip('.')}; continuing without it")
    return missing


def upgrade(work: Transaction, fetch: bool = True, strict: bool = False, download_only: bool = False) -> None:
    """Upgrade all packages, or only fetch them; unless `strict`, with the present lists if none can be fetched."""
    try:
        if fetch:
            refresh(work, strict)
    except PackageError as error:
        if strict:
            raise
        hint = f" ({error.hint})" if error.hint else ""
        console.say(one_line(f"ash: {error.message}{hint}; continuing with the present package lists"))
    work.package_manager.upgrade(work, download_only)


@contextmanager
def unrecorded(system: System) -> Iterator[None]:
    """Commits in this block only prefetch; keep them out of the history."""
    caller, done = system.caller, [*system.done]
    system.caller = None
    try:
        yield
    finally:
        system.caller, system.done = caller, done


def refresh_once(system: System, snapshots: Sequence[int], strict: bool) -> dict[int, AshError | OSError]:
    """Fetch the package lists of snapshots, once for equal repositories; returns which cannot be upgraded, and why."""
    failed: dict[int, AshError | OSError] = {}
    fetched: dict[str, RepositoryError | None] = {}  # by the repositories; None if that went well
    for number in snapshots:
        try:
            repositories = system.package_manager.repositories(system.layout.rootfs(number))
            if repositories not in fetched:
                with unrecorded(system):
                    work = partial(refresh, strict=strict)
                    change_snapshot(system, number, "fetching the package lists of", work, base=True)
                fetched[repositories] = None
            elif strict and (error := fetched[repositories]):
                failed[number] = error
        except PackageError as error:
            if isinstance(error, RepositoryError):
                fetched[repositories] = error
            if strict:
                failed[number] = error
            else:
                console.say(one_line(f"ash: {error.message}"))
        except (AshError, OSError) as error:
            failed[number] = error
    return failed


# --- Profiles --------------------------------------------------------------------------------------------------


class Profile:
    """A profile: packages, services and commands to install together. Each of its sections is a list of lines."""

    # The sections with packages: those that are required, and those that are installed if the repositories have them.
    WANTED = ("packages", "generic", "init", "greeter")
    OPTIONAL = "packages::optional"
    SERVICES: ClassVar[Sequence[str]] = [f"services::{init.name}" for init in INIT_SYSTEMS]
    SECTIONS = frozenset({*WANTED, OPTIONAL, *SERVICES, "commands", "presets", "notes"})

    def __init__(self, name: str, sections: Mapping[str, Sequence[str]]) -> None:
        self.name = name
        self.sections = sections

    @classmethod
    def parse(cls, name: str, text: str) -> Profile:
        """Parse a profile: section names in brackets, one entry a line, `#` begins a comment; AshError (USAGE)."""
        sections: dict[str, list[str]] = {}
        section = ""
        for number, line in enumerate(map(str.strip, lines_of(text)), start=1):
            if not line or line.startswith("#"):
                continue
            heading = re.fullmatch(r"\[(.*)\]", line)
            section = heading[1] if heading else section
            if section in cls.SECTIONS:
                sections.setdefault(section, []).extend([] if heading else [line])
            else:
                hint = f"the sections are {', '.join(sorted(cls.SECTIONS))}"
                raise AshError(f"line {number} of profile {name} is wrong: {line!r}", hint, USAGE)
        return cls(name, sections)

    def lines(self, section: str) -> Sequence[str]:
        return self.sections.get(section, ())

    @property
    def packages(self) -> list[str]:
        """The required packages; a line may have several."""
        return [name for section in self.WANTED for line in self.lines(section) for name in line.split()]

    @property
    def optional(self) -> list[str]:
        return [name for line in self.lines(self.OPTIONAL) for name in line.split()]

    @property
    def everything(self) -> list[str]:
        return [*self.packages, *self.optional]

    def install(self, work: Transaction, user: str) -> None:
        """Install packages, enable services, then run the commands, with $USER set to the user who called ash."""
        self._require_presets(work)
        there = work.package_manager.available(work, self.optional) if self.optional else set()
        work.package_manager.install(work, [*self.packages, *(name for name in self.optional if name in there)])
        if work.simulate:
            return
        init = init_of(work.root)
        for line in self.lines(f"services::{init.name}"):
            self._run(work, [*init.enable, *line.split()])
        for line in self.lines("commands"):
            self._run(work, ["env", f"USER={user}", "sh", "-ec", line])

    def _require_presets(self, work: Transaction) -> None:
        for preset in self.lines("presets"):
            if preset != "enable_aur":
                raise AshError(f"profile {self.name} has an unknown preset: {preset}", "", USAGE)
            if not Configuration.parse(read_text(path_inside(work.root, "etc/ash.conf"))).is_on("aur"):
                hint = f"ash edit-conf {work.snapshot}: a line aur::True"
                raise AshError(f"profile {self.name} needs packages from the AUR", hint, REFUSED)

    def _run(self, work: Transaction, argv: Sequence[str]) -> None:
        try:
            work.run(argv)
        except PackageError as error:
            said = last_words(error.message)
            raise AshError(f"profile {self.name}: {' '.join(argv[-2:])} failed: {said}") from None


def profile_files(system: System) -> dict[str, Path]:
    """The profile files for a system's distribution, by name. Those beside this ash override those on the system."""
    found: dict[str, Path] = {}
    family = [kind.id for kind in reversed(type(system.distro).mro()) if issubclass(kind, Distro)]
    for directory in (system.layout.profiles, HERE / "profiles"):
        for ident in (*family, system.layout.distro):  # a derivative's own profile overrides its parent's
            found |= {path.parent.name: path for path in sorted(directory.glob(f"*/{ident}.conf"))}
    return dict(sorted(found.items()))


def find_profile(system: System, name: str) -> Profile:
    """Find a profile by its name or by the path of its file (with a slash); AshError (MISSING) if it does not exist."""
    path = Path(name) if "/" in name else profile_files(system).get(name)
    if path is None:
        raise AshError(f"there is no profile {name} for {system.layout.distro}", "ash profiles lists them", MISSING)
    if not path.is_file():
        raise AshError(f"there is no profile {name}", "", MISSING)
    return Profile.parse(name, read_text(path))


def packages_named(system: System, request: Request) -> tuple[list[str], list[str]]:
    """The packages that a request names, and those of its profile; AshError (USAGE) if there are none."""
    of_profile = find_profile(system, request.profile).everything if request.profile else []
    if not request.packages and not of_profile:
        raise AshError(f"profile {request.profile} has no packages", "", USAGE)
    return [*request.packages], of_profile


# --- Commands on packages --------------------------------------------------------------------------------------


def install_profile(system: System, request: Request) -> Reply:
    """Upgrade (as the old ash did), then install a profile's packages and services and run its commands."""
    profile = find_profile(system, request.profile)
    if beside := [*request.packages, *request.remove]:
        raise AshError(f"unexpected argument {beside[0]!r}", "ash install N --profile NAME", USAGE)
    live = goes_live(system, request, request.snapshots, by_default=False)
    user = os.environ.get("SUDO_USER", "root")

    def install(work: Transaction) -> None:
        if not request.no_upgrade:
            upgrade(work, strict=request.strict)
        profile.install(work, user)

    doing = f"installing {profile.name} into"
    force, simulate = request.force, request.dry_run
    changes = [change_snapshot(system, n, doing, install, simulate=simulate, force=force) for n in request.snapshots]
    reply = package_reply(request, changes, change_live(system, doing, install, changes) if live else None)
    notes = [] if request.dry_run else profile.lines("notes")
    return reply._replace(text="\n".join([reply.text, *notes]))


@command(
    "install", "in", group=PACKAGES, usage="install [N] PKG... [--remove PKG...]",
    help="install packages, package files, or a profile; into the booted snapshot and the running system at once",
    **CHANGES_ONE, several=True, words="packages",
    options=[
        PACKAGE, Option(("--remove",), "remove these in the same transaction", "PKG..."),
        PROFILE, NO_UPGRADE, STRICT, *LIVE,
        FORCE_REMOVAL,
    ],
    answer=CHANGES_SHAPE,
)  # fmt: skip
def cmd_install(system: System, request: Request) -> Reply:
    if request.profile:
        return install_profile(system, request)
    packages = request.packages
    for file in [name for name in packages if "/" in name]:
        if not Path(file).is_file():
            raise AshError(f"there is no package file {file}", "", MISSING)
    live = goes_live(system, request, request.snapshots)

    def is_there(root: Path) -> bool:
        return not (request.remove or request.dry_run) and system.package_manager.has_installed(root, packages)

    def install(work: Transaction) -> None:
        named = [work.show(Path(name)) if "/" in name else name for name in packages]
        system.package_manager.install(work, named, request.remove)

    changes = [
        Change(number)
        if is_there(system.layout.rootfs(number))
        else change_snapshot(system, number, "installing into", install, simulate=request.dry_run, force=request.force)
        for number in request.snapshots
    ]
    live = live and not is_there(system.layout.rootfs(str(system.booted)))
    done = change_live(system, "installing into", install, changes) if live else None
    return package_reply(request, changes, done)


command(
    "install-profile", group=PACKAGES, usage="install-profile NAME [N]",
    help="upgrade N, then install a profile's packages and run its commands",
    **CHANGES_ONE, several=True, words="profile", options=[NO_UPGRADE, STRICT, *LIVE], answer=CHANGES_SHAPE,
)(install_profile)  # fmt: skip


@command(
    "profiles", group=PACKAGES, usage="profiles", help="list the profiles for this distribution",
    answer={"profiles": {"*": {"packages": [str], "notes": [str]}}},
)  # fmt: skip
def cmd_profiles(system: System, request: Request) -> Reply:
    profiles = {name: Profile.parse(name, read_text(path)) for name, path in profile_files(system).items()}
    data = {name: {"packages": one.everything, "notes": list(one.lines("notes"))} for name, one in profiles.items()}
    rows = [[name, " ".join(one.packages), " ".join(one.lines("notes")[:1])] for name, one in profiles.items()]
    text = text_table(rows, ["profile", "packages", "notes"]) if rows else "there are no profiles"
    return Reply({"profiles": data}, text, "\n".join(profiles))


@command(
    "remove", "uninstall", "uninst", "unins", "unin", "un", group=PACKAGES, usage="remove [N] PKG...",
    help="remove packages, and dependencies that are no longer needed", **CHANGES_ONE, several=True, words="packages",
    hint="ash remove N PKG removes a package, ash del N deletes a snapshot",
    options=[PACKAGE, PROFILE, *LIVE, *PURGE, FORCE_REMOVAL],
    answer=CHANGES_SHAPE,
)  # fmt: skip
def cmd_remove(system: System, request: Request) -> Reply:
    packages, of_profile = packages_named(system, request)
    live = goes_live(system, request, request.snapshots)
    changes = [
        remove_packages(system, number, [*packages, *installed_of(system, number, of_profile)], request)
        for number in request.snapshots
    ]
    here = installed_of(system, str(system.booted), [*packages, *of_profile]) if live else []
    work = partial(system.package_manager.remove, packages=here, purge=request.purge)
    return package_reply(
        request, changes, change_live(system, "removing from", work, elsewhere=changes) if here else None
    )


@command(
    "upgrade", "up", group=PACKAGES, usage="upgrade [N...]", help="upgrade all packages", changes=True, numbers=MANY,
    several=True, require=System.require_changeable, options=[DOWNLOAD_ONLY, STRICT, *LIVE], answer=CHANGES_SHAPE,
)  # fmt: skip
def cmd_upgrade(system: System, request: Request) -> Reply:
    snapshots = request.snapshots
    live = goes_live(system, request, snapshots, by_default=False)
    once = len(snapshots) > 1 and not request.dry_run
    if once:
        for error in refresh_once(system, snapshots, request.strict).values():
            raise error
    work = partial(upgrade, fetch=not once, strict=request.strict, download_only=request.download_only)
    changes = [change_snapshot(system, number, "upgrading", work, simulate=request.dry_run) for number in snapshots]
    if request.download_only and not request.dry_run:
        return changes_reply(changes)._replace(text="fetched the packages for the next upgrade")
    again = partial(upgrade, fetch=False)
    return package_reply(request, changes, change_live(system, "upgrading", again, changes) if live else None)


HOLDS: Mapping[str, Any] = {
    **CHANGES_ONE, "group": PACKAGES, "words": "packages", "options": [PACKAGE], "answer": CHANGES_SHAPE,
}  # fmt: skip


def hold(system: System, request: Request, held: bool) -> Plan:
    """Hold packages of a snapshot at their versions, or unhold them."""
    number, packages = request.snapshot, request.packages
    if lacking := sorted({*packages} - {*installed_of(system, number, packages)}):
        raise AshError(f"snapshot {number} does not have {listed(lacking)}", f"ash list {number}", MISSING)
    yield would(f"{'hold' if held else 'unhold'} in snapshot {number}: {listed(packages)}")
    work = partial(system.package_manager.hold, packages=packages, held=held)
    done = change_snapshot(system, number, f"{'' if held else 'un'}holding packages of", work)
    text = f"{listed(packages)} {'held' if held else 'no longer held'}" if done.changed else "nothing to change"
    return changes_reply([done])._replace(text=f"snapshot {number}: {text}")


command("hold", usage="hold N PKG...", help="hold packages at their versions", **HOLDS)(partial(hold, held=True))
command("unhold", usage="unhold N PKG...", help="no longer hold packages", **HOLDS)(partial(hold, held=False))


@command(
    "base-update", "bu", "ub", group=PACKAGES, usage="base-update", help="upgrade the base", changes=True,
    options=[flag("--shell", help="open a root shell in it instead"), RESUME, STRICT], answer=CHANGES_SHAPE,
)  # fmt: skip
def cmd_base_update(system: System, request: Request) -> Plan:
    if request.shell or request.resume:
        yield would("open a shell in the base")
        return shell_in(system, BASE, resume=request.resume)
    work = partial(upgrade, strict=request.strict)
    done = change_snapshot(system, BASE, "upgrading", work, simulate=request.dry_run, base=True)
    return would_change([done]) if request.dry_run else changes_reply([done])._replace(text=done.summary())


@command(
    "refresh", "ref", group=PACKAGES, usage="refresh [N...]", help="update the package lists",
    changes=True, numbers=MANY, several=True, require=partial(System.require_changeable, base=True), options=[STRICT],
    answer=CHANGES_SHAPE,
)  # fmt: skip
def cmd_refresh(system: System, request: Request) -> Plan:
    snapshots = request.snapshots
    yield would(f"update the package lists of {listed(snapshots)}")
    work = partial(refresh, strict=request.strict)
    changes = [change_snapshot(system, n, "fetching the package lists of", work, base=True) for n in snapshots]
    is_new = any(change.changed for change in changes)
    text = f"updated the package lists of {listed(snapshots)}" if is_new else "no new package lists"
    hints = [hint for number in snapshots if (hint := repositories_hint(system, number))]
    return changes_reply(changes)._replace(text="\n".join([text, *(f"  {hint}" for hint in hints)]))


@command(
    "fixdb", "fix", group=PACKAGES, usage="fixdb [N...]",
    help="repair the package database, renew the package manager's keyring",
    changes=True, numbers=MANY, several=True, require=System.require_changeable, answer=CHANGES_SHAPE,
)  # fmt: skip
def cmd_fixdb(system: System, request: Request) -> Plan:
    snapshots = request.snapshots
    yield would(f"repair the package database of {listed(snapshots)}")
    changes = [change_snapshot(system, number, "repairing", system.package_manager.repair) for number in snapshots]
    roots = [system.layout.rootfs(number) for number in snapshots]
    left = [problem for root in roots for problem in system.package_manager.problems(root)]
    reply = changes_reply(changes)
    if not left:
        return reply
    return reply._replace(text=f"{reply.text}\nstill wrong: {'; '.join(map(one_line, left))}", status=FAILED)


@command(
    "whichsnap", "ws", group=PACKAGES, usage="whichsnap PKG...",
    help="list the snapshots that have all of these packages",
    words="packages", options=[PACKAGE], answer={"snapshots": {"*": {"*": str}}},
)  # fmt: skip
def cmd_whichsnap(system: System, request: Request) -> Reply:
    wanted = request.packages
    having = {
        number: {name: packages[name] for name in wanted}
        for number in system.tree().numbers()
        if {*wanted} <= (packages := packages_of(system, number)).keys()
    }
    if not having:
        what = "" if len(wanted) == 1 else "all of "
        raise AshError(f"no snapshot has {what}{listed(wanted)}", "", MISSING)
    rows = [[number, system.describe(number), " ".join(there.values())] for number, there in having.items()]
    numbers = "\n".join(map(str, having))
    text = numbers if console.quiet else text_table(rows, ["snapshot", "description", "version"])
    return Reply({"snapshots": {str(number): there for number, there in having.items()}}, text, numbers)


@command(
    "list", "ls", group=PACKAGES, usage="list [N]", help="list packages and versions",
    numbers=1, require=System.require, answer={"snapshot": int, "packages": {"*": str}},
)  # fmt: skip
def cmd_list(system: System, request: Request) -> Reply:
    number = request.snapshot
    packages = packages_of(system, number)
    names = "\n".join(packages)
    text = names if console.quiet else text_table(list(packages.items()), ["package", "version"])
    return Reply({"snapshot": number, "packages": packages}, text, names)


# --- Whole trees: a process for each snapshot ------------------------------------------------------------------


class Job:
    """The work on one snapshot of a tree: its process, and then its result."""

    def __init__(self, number: int, parent: int | None) -> None:
        self.number = number
        self.parent = parent
        self.process = 0
        self.result_pipe = -1
        self.said = b""  # by its process: the result, in JSON
        self.output: BinaryIO | None = None  # of the process, if it is kept until its end
        self.started = 0.0
        self.change: Change | None = None
        self.error = ""
        self.hint = ""

    @property
    def is_done(self) -> bool:
        return self.change is not None or bool(self.error)

    def state(self) -> str:
        """The progress, for people."""
        if self.error:
            return f"failed: {one_line(self.error)}"
        if self.change is not None:
            return "changed" if self.change.changed else "nothing to change"
        return f"{time.monotonic() - self.started:.0f} s" if self.process else "waiting"


class JobPool:
    """Works on several snapshots, each in a process of its own. A job that fails does not stop the others."""

    REDRAW = 0.5  # seconds

    def __init__(
        self, system: System, doing: str, limit: int, *, shown: bool = False, after_parents: bool = False
    ) -> None:
        self.system = system
        self.doing = doing  # for people: "upgrading"
        self.limit = limit  # how many jobs run at the same time
        self.shown = shown  # whether the user wants to see the output of the jobs; otherwise only their errors
        self.after_parents = after_parents  # whether a job needs its parent's result, and starts when that has ended
        self.jobs: list[Job] = []
        self.drawn = 0  # lines

    def run(self, tree: Tree, numbers: Sequence[int], work: Callable[[int], Change]) -> None:
        """Do the work in each snapshot, given with parents first, and keep the results in `jobs`."""
        import select

        self.jobs = [Job(number, tree.parent(number)) for number in numbers]
        try:
            while awaited := {job.number for job in self.jobs if not job.is_done}:
                blocked = awaited if self.after_parents else set()
                ready = [job for job in self.jobs if not job.process and job.parent not in blocked]
                for job in ready[: self.limit - len(self._running())]:
                    self._start(job, work)
                running = {job.result_pipe: job for job in self._running()}
                for pipe in select.select([*running], [], [], self.REDRAW)[0]:
                    self._end(running[pipe])
                self._draw()
        except BaseException:
            for job in self._running():
                os.kill(job.process, signal.SIGTERM)
                self._end(job)
            raise

    @property
    def changes(self) -> list[Change]:
        """The results of the jobs that did not fail."""
        return [job.change for job in self.jobs if job.change is not None]

    @property
    def failed(self) -> list[Job]:
        return [job for job in self.jobs if job.error]

    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.process and not job.is_done]

    def _start(self, job: Job, work: Callable[[int], Change]) -> None:
        import tempfile

        job.started = time.monotonic()
        if self.limit > 1:
            job.output = tempfile.TemporaryFile(dir=PRIVATE)  # noqa: SIM115 (closed when it is printed)
        job.result_pipe, write_end = os.pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        job.process = os.fork()
        if job.process == 0:
            self._work(job, work, parent, write_end)
        os.close(write_end)

    def _work(self, job: Job, work: Callable[[int], Change], parent: int, pipe: int) -> NoReturn:
        """The process of a job: do the work, write the result to the pipe, exit."""
        result: dict[str, Any] = {"error": "it was interrupted"}
        try:
            die_with_parent(parent)
            if job.output:
                os.dup2(job.output.fileno(), 1)
                os.dup2(job.output.fileno(), 2)
            with contextlib.nullcontext() if self.shown else quiet_progress():
                result = {"change": work(job.number)._asdict()}
        except AshError as error:
            result = {"error": error.message.strip(), "hint": error.hint}
        except OSError as error:
            result = {"error": reason(error)}
        except Exception as error:
            result = {"error": f"an error in ash itself: {error!r}"}
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            with os.fdopen(pipe, "w") as file:
                json.dump(result, file)
            os._exit(0)

    def _end(self, job: Job) -> None:
        """Wait for the result of a job. If Ctrl-C comes meanwhile, this can be called again."""
        import select

        while not job.is_done:
            select.select([job.result_pipe], [], [])  # signals are only heard here
            with signals_held():
                piece = os.read(job.result_pipe, 65536)
                job.said += piece
                if not piece:
                    self._take_result(job)
        self._show_output(job)

    def _take_result(self, job: Job) -> None:
        os.close(job.result_pipe)
        os.waitpid(job.process, 0)
        said = job.said.decode(errors="surrogateescape")
        result: dict[str, Any] = json.loads(said) if said else {"error": "it was killed"}
        job.error, job.hint = result.get("error", ""), result.get("hint", "")
        job.change = Change(**result["change"]) if "change" in result else None
        self.system.done += [job.change] if job.change and job.change.changed else []

    def _show_output(self, job: Job) -> None:
        if job.output:
            job.output.seek(0)
            if self.shown or console.verbose:
                stream = sys.stderr if console.json or not self.shown else sys.stdout
                stream.buffer.write(job.output.read())
                stream.flush()
            job.output.close()

    def _draw(self) -> None:
        """On a terminal, draw one line for each job over the lines drawn last.

        If the terminal has too few rows, running jobs come first, then waiting ones.
        """
        if console.silent or self.shown or console.verbose or not sys.stderr.isatty():
            return
        import shutil

        width, height = shutil.get_terminal_size()
        rows, jobs = max(1, height - 1), self.jobs  # lines that have scrolled away cannot be drawn over
        if len(jobs) > rows:
            jobs = sorted(jobs, key=lambda job: (job.is_done, not job.process))[: rows - 1]
        lines = [f"{self.doing} snapshot {job.number}: {job.state()}" for job in jobs]
        lines += [f"... {more} more"] if (more := len(self.jobs) - len(jobs)) else []
        up = f"\x1b[{min(self.drawn, rows)}A" if self.drawn else ""
        sys.stderr.write(up + "".join(f"\x1b[2K{line[: width - 1]}\n" for line in lines) + "\x1b[J")
        sys.stderr.flush()
        self.drawn = len(lines)


def ask_each(numbers: Iterable[int], ask: Callable[[int], Result]) -> dict[int, Result]:
    """Map snapshots to answers, skipping those that fail: the command itself will report them."""
    answers = {}
    for number in numbers:
        with contextlib.suppress(AshError, OSError):
            answers[number] = ask(number)
    return answers


def fetch_packages(system: System, works: Mapping[int, Work], about: Callable[[int], object] = lambda _: None) -> None:
    """Fetch packages for several snapshots by their works, one after the other: parallel jobs would fetch the same.

    Of snapshots that have the same repositories and packages, and `about` in common, only the first fetches.
    """

    def state(number: int) -> tuple[str, str]:
        root, manager = system.layout.rootfs(number), system.package_manager
        packages = json.dumps([manager.installed(root), sorted(manager.held(root)), about(number)])
        return manager.repositories(root), packages

    done = set()
    for number, known in ask_each(works if len(works) > 1 else (), state).items():
        if known not in done:
            done.add(known)
            # If it fails, so will the command, which reports it.
            with quiet_progress(), unrecorded(system), contextlib.suppress(AshError, OSError):
                change_snapshot(system, number, "fetching for", works[number])


def fetch_once(system: System, numbers: Sequence[int], strict: bool) -> dict[int, AshError | OSError]:
    """Fetch the package lists of a tree, and the packages that it upgrades. Returns the same as refresh_once()."""
    with quiet_progress():
        failed = refresh_once(system, numbers, strict)
    works = {number: partial(upgrade, fetch=False, download_only=True) for number in numbers if number not in failed}
    fetch_packages(system, works)
    return failed


TREE_SHAPE = {
    "changed": bool, "snapshots": [{**CHANGE_SHAPE, "brought?": [str]}], "failed": {"*": str}, "skipped?": [int],
    "live?": LIVE_SHAPE,
}  # fmt: skip


def changeable_branch(tree: Tree, snapshot: int) -> list[int]:
    """A snapshot and its branches, without the base, which has commands of its own, if it has branches."""
    numbers = tree.branch(snapshot)
    return [number for number in numbers if number != BASE] or numbers


def tree_reply(system: System, request: Request, pool: JobPool, live: LiveResult | None = None) -> Reply:
    """What the jobs did in each snapshot, and what failed where; equal new files then share their blocks."""
    errors = {str(job.number): job.error for job in pool.failed}
    if request.dry_run:
        reply = would_change(pool.changes)
        lines = [reply.text, *(one_line(f"snapshot {number}: {error}") for number, error in errors.items())]
        return reply._replace(text="\n".join(lines), status=FAILED if errors else 0)
    known: dict[tuple[str, int], list[Path]] = {}
    for change in pool.changes:
        with contextlib.suppress(AshError, OSError):  # such as a full disk: they only take more space
            share_written(system.layout, change.snapshot, change.written, known)
    changed = [change for change in pool.changes if change.changed]
    counts = {"changed": len(changed), "unchanged": len(pool.changes) - len(changed), "failed": len(errors)}
    lines = [f"{pool.doing} {len(pool.jobs)} snapshots: {', '.join(f'{n} {what}' for what, n in counts.items() if n)}"]
    lines += [change.summary() for change in changed]
    for job in pool.failed:
        lines.append(one_line(f"snapshot {job.number} failed: {job.error}{f' ({job.hint})' if job.hint else ''}"))
    lines += [live.text()] if live else []
    snapshots = [change_data(change) for change in pool.changes]
    data: dict[str, Any] = {"changed": bool(changed), "snapshots": snapshots, "failed": errors}
    if request.snapshot == BASE and BASE not in {job.number for job in pool.jobs}:
        lines.append("snapshot 0 is the base: it was passed over (ash base-update upgrades it)")
        data["skipped"] = [BASE]
    data |= {"live": vars(live)} if live else {}
    return Reply(data, "\n".join(lines), status=FAILED if errors or (live and live.error) else 0)


@command(
    "tree-run", "trun", group=INSIDE, usage="tree-run [-j] N COMMAND...",
    help="run one command in N and every branch below it",
    changes=True, numbers=1, required=1, words="command", rest=True, options=[*JOBS, COMMAND], answer=TREE_SHAPE,
)  # fmt: skip
def cmd_tree_run(system: System, request: Request) -> Plan:
    tree, pool = system.tree(), JobPool(system, "ran in", request.jobs, shown=True)
    numbers = changeable_branch(tree, request.snapshot)
    if request.dry_run:
        for number in numbers:
            system.require_changeable(number)
    refuse_kept(system, request, numbers)
    yield would(f"run in {', '.join(map(str, numbers))}: {one_line(' '.join(request.command))}")
    pool.run(tree, numbers, lambda number: run_in(system, number, request.command))
    return tree_reply(system, request, pool)


@command(
    "tree-upgrade", "tupgrade", "tup", "tree-update", group=PACKAGES, usage="tree-upgrade [N] [-j]",
    help="upgrade N and every branch below it",
    changes=True, numbers=1, options=[DOWNLOAD_ONLY, STRICT, *JOBS], answer=TREE_SHAPE,
)  # fmt: skip
def cmd_tree_upgrade(system: System, request: Request) -> Reply:
    tree, pool = system.tree(), JobPool(system, "upgrading", request.jobs)
    numbers = changeable_branch(tree, request.snapshot)
    failed = {} if request.dry_run else fetch_once(system, numbers, request.strict)
    work = partial(upgrade, fetch=request.dry_run, strict=request.strict, download_only=request.download_only)

    def upgrade_there(number: int) -> Change:
        if number in failed:
            raise failed[number]
        return change_snapshot(system, number, "upgrading", work, simulate=request.dry_run)

    pool.run(tree, numbers, upgrade_there)
    reply = tree_reply(system, request, pool)
    if request.download_only and not request.dry_run and not reply.status:
        return reply._replace(text="fetched the packages for the next upgrade")
    return reply


@command(
    "tree-rmpkg", "tremove", group=PACKAGES, usage="tree-rmpkg N PKG...",
    help="remove packages from N and every branch below it",
    changes=True, numbers=1, words="packages", options=[PACKAGE, PROFILE, *JOBS, *PURGE, FORCE_REMOVAL],
    answer=TREE_SHAPE,
)  # fmt: skip
def cmd_tree_rmpkg(system: System, request: Request) -> Reply:
    packages = [name for names in packages_named(system, request) for name in names]
    tree, pool = system.tree(), JobPool(system, "removing from", request.jobs)
    numbers = changeable_branch(tree, request.snapshot)

    having = ask_each(numbers, lambda number: installed_of(system, number, packages))
    if len(having) == len(numbers) and not any(having.values()):
        raise AshError(f"{listed(packages)}: not installed in any of {listed(numbers)}", "ash whichsnap PKG", MISSING)

    def remove_there(number: int) -> Change:
        there = installed_of(system, number, packages)
        return remove_packages(system, number, there, request) if there else Change(number)

    pool.run(tree, numbers, remove_there)
    return tree_reply(system, request, pool)


# --- A branch follows its parent -------------------------------------------------------------------------------


# Package changes by these commands say nothing about what the user wants on this snapshot.
FOLLOWS = frozenset({"upgrade", "tree-upgrade", "auto-upgrade", "sync", "force-sync"})


class PackageIntents(NamedTuple):
    """The packages that were added to and removed from a snapshot since some time, by name."""

    added: set[str]
    removed: set[str]

    @classmethod
    def of(
        cls, origins: Mapping[int, int], history: Sequence[Mapping[str, Any]], since: int, without: Container[str] = ()
    ) -> PackageIntents:
        """Read them from a snapshot's origins() and the history, from a line on, without the lines of some commands."""
        added: set[str] = set()
        removed: set[str] = set()
        for line, entry in enumerate(history):
            numbers = [number for number, end in origins.items() if since <= line < end]
            for done in entry.get("changes", [entry]):
                if done.get("snapshot") in numbers and entry.get("command") not in without:
                    new, gone = ({*done.get("packages", {}).get(kind, {})} for kind in ("added", "removed"))
                    added, removed = (added | new) - gone, (removed - new) | gone  # what was done last counts
        return cls(added, removed)


class ParentSync:
    """What a branch takes over from its parent, to be applied in a transaction on the branch.

    Only changes since the two parted count: since the branch was created or, if it is a copy of another branch or was
    put below another parent, since the state that both come from.
    """

    def __init__(self, system: System, parent: int, number: int, keep: bool) -> None:
        self.system = system
        self.parent = parent
        self.number = number
        self.keep = keep  # in the branch what the parent removed
        self.root = system.layout.rootfs(parent)
        self.brought: Sequence[str] = ()  # paths in /etc

    def __call__(self, work: Transaction) -> None:
        """Apply the parent's packages and new configuration to a transaction on the branch."""
        self._follow_packages(work)
        self._follow_configuration(work)

    def fetch(self, work: Transaction) -> None:
        """Download the packages that the branch is to get."""
        self.system.package_manager.download(work, self.missing(work.root))

    def missing(self, root: Path) -> list[str]:
        """The parent's packages that a root of the branch lacks, except those removed from the branch itself."""
        own, manager = self._intents[0], self.system.package_manager
        known = {*manager.installed(root), *own.removed}
        return [name for name in manager.installed(self.root) if name not in known]

    @cached_property
    def _history(self) -> list[dict[str, Any]]:
        return self.system.history.read()

    @cached_property
    def _origins(self) -> tuple[dict[int, int], dict[int, int]]:
        return origins(self.number, self._history), origins(self.parent, self._history)

    @cached_property
    def _since(self) -> int:
        """The first line of the history after the two parted; 0 if they never were one."""
        ours, theirs = self._origins
        return next((min(ours[one], theirs[one]) + 1 for one in ours if one in theirs), 0)

    @cached_property
    def _intents(self) -> tuple[PackageIntents, PackageIntents]:
        """What was done to the packages of the branch and of the parent since then."""
        history, (ours, theirs) = self._history, self._origins
        own = PackageIntents.of(ours, history, self._since, FOLLOWS)
        return own, PackageIntents.of(theirs, history, self._since)

    def _follow_packages(self, work: Transaction) -> None:
        manager, (own, dropped) = self.system.package_manager, self._intents
        theirs, ours = manager.installed(self.root), manager.installed(work.root)
        automatic = manager.automatic(self.root)
        missing = {name: name in automatic for name in self.missing(work.root)}
        unwanted = [name for name in dropped.removed if name in ours and name not in theirs and name not in own.added]
        asked_for = (own.added & ours.keys()) - manager.automatic(work.root)
        manager.reconcile(work, missing, [] if self.keep else sorted(unwanted))
        there = manager.installed(work.root).keys() - work.change.removed.keys()  # the latter if it only simulates
        if pushed_out := sorted(asked_for - there):
            hint = f"ash remove {self.number} {' '.join(pushed_out)} allows it"
            raise AshError(f"the parent's packages conflict with {listed(pushed_out)}", hint)

    def _newer_than_parting(self) -> Callable[[Path], bool]:
        """Tells which files of the parent were changed since the two parted: by btrfs's transactions, not by clocks.

        Where an older ash created the branch, times decide.
        """
        if not self._since:
            return lambda _: True
        parting = self._history[self._since - 1]
        if is_u32(parting.get("ctransid")):
            inodes = changed_inodes(self.root, parting["ctransid"])
            return lambda path: path.lstat().st_ino in inodes
        # The history's times are in seconds: a file of that very second may be older than the branch.
        parted = timestamp_of(parting) + 1
        return lambda path: path.lstat().st_ctime >= parted

    def _follow_configuration(self, work: Transaction) -> None:
        """Copy the files of the parent's /etc that are newer than the parting of the two and that the branch lacks.

        Files of packages come with their packages only, and so do symlinks to them. A file of no package that was
        deleted in the branch comes back if the parent has changed it since: it cannot be told from a new one.
        """
        theirs, ours, is_newer = self.root / "etc", work.root / "etc", self._newer_than_parting()
        of_packages, brought = self.system.package_manager.files(self.root, "etc"), list[str]()
        for path in sorted(paths_below(theirs) - of_packages, key=lambda path: ((theirs / path).is_symlink(), path)):
            excluded = re.fullmatch(f"{NOT_DRIFT}|{IDENTITY}", path) or is_special(theirs / path)
            is_new = is_newer(theirs / path) and not os.path.lexists(ours / path)
            if is_new and not excluded and has_real_parents(ours, path) and not self._dangles(work.root, path):
                replace_by_copy(theirs / path, ours / path, protected=True)
                brought.append(path)
        self.brought = brought
        make_again(self.system, work, brought)

    def _dangles(self, root: Path, path: str) -> bool:
        """Whether a path of the parent's /etc is a symlink that would dangle in another root, and does not here."""
        with contextlib.suppress(AshError):  # a loop dangles in both
            target = path_inside(self.root, f"etc/{path}")
            here = path_inside(root, str(target.relative_to(self.root)))
            return (self.root / "etc" / path).is_symlink() and target.exists() and not here.exists()
        return False


def finish_interrupted(system: System, numbers: Sequence[int]) -> None:
    """Finish or undo interrupted changes of snapshots first, since the history, which has them then, is to decide."""

    def recover(number: int) -> None:
        with system.lock(number):
            system.workdir(number).recover(system.tree())

    ask_each([number for number in numbers if system.workdir(number).leftovers()], recover)


def sync_tree(system: System, request: Request, upgrades: bool) -> Reply:
    """Give each branch of a tree the packages and the new configuration of its parent, after upgrading all."""
    tree, pool = system.tree(), JobPool(system, "synchronizing", request.jobs, after_parents=True)
    every, numbers = tree.branch(request.snapshot), changeable_branch(tree, request.snapshot)
    live = goes_live(system, request, numbers)
    if not request.dry_run:
        finish_interrupted(system, every)
    above = {number: parent for number in numbers if (parent := tree.parent(number)) in every and parent is not None}
    following = {number: ParentSync(system, parent, number, request.keep) for number, parent in above.items()}
    failed = fetch_once(system, numbers, request.strict) if upgrades and not request.dry_run else {}
    if not request.dry_run:
        missing = ask_each(following, lambda number: following[number].missing(system.layout.rootfs(number)))
        fetch_packages(system, {number: following[number].fetch for number in missing if missing[number]}, missing.get)

    def sync(number: int) -> Change:
        def work(transaction: Transaction) -> None:
            if upgrades:
                upgrade(transaction, fetch=request.dry_run, strict=request.strict)
            if number in following:
                following[number](transaction)

        if number in failed:
            raise failed[number]
        if not upgrades and number not in following:
            return Change(number)
        change = change_snapshot(system, number, "synchronizing", work, simulate=request.dry_run)
        brought = following[number].brought if number in following else ()
        return change._replace(changed=change.changed or bool(brought), brought=brought)

    pool.run(tree, numbers, sync)
    worked = {change.snapshot for change in pool.changes}
    done = None
    if live and system.current in worked and system.current in following:
        done = change_live(system, "synchronizing", following[system.current])
    return tree_reply(system, request, pool, done)


@command(
    "sync", "tree-sync", "tsync", group=PACKAGES, usage="sync [N] [-j] [--keep]",
    help="upgrade the tree, then give each branch the packages and new configuration of its parent",
    changes=True, numbers=1, options=[flag("-f", "--force", "--force-offline", help="without upgrading"), *SYNC],
    answer=TREE_SHAPE,
)  # fmt: skip
def cmd_sync(system: System, request: Request) -> Reply:
    return sync_tree(system, request, upgrades=not request.force)


@command(
    "force-sync", "fsync", group=PACKAGES, usage="force-sync [N] [-j] [--keep]",
    help="give each branch the packages and new configuration of its parent, without upgrading",
    changes=True, numbers=1, options=SYNC, answer=TREE_SHAPE,
)  # fmt: skip
def cmd_force_sync(system: System, request: Request) -> Reply:
    return sync_tree(system, request, upgrades=False)


# --- Problems and lost+found -----------------------------------------------------------------------------------

FOUND = "found by fsck"  # the description of a snapshot that the history does not know


class Problem:
    """A problem that fsck found. Two are equal if they say the same of the same snapshot."""

    def __init__(
        self,
        what: str,
        snapshot: int | None = None,
        remedy: str = "",
        repair: Callable[[], object] | None = None,
        lock: int | str | None = None,
    ) -> None:
        self.what = what
        self.snapshot = snapshot
        self.remedy = remedy  # what `repair` does or, if that is None, what the user can do
        self.repair = repair  # may be interrupted and repeated
        self.lock = lock  # to be held for the repair; None if that takes its own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Problem) and (self.what, self.snapshot) == (other.what, other.snapshot)

    def __hash__(self) -> int:
        return hash((self.what, self.snapshot))

    def text(self) -> str:
        what = one_line(self.what)
        return f"snapshot {self.snapshot}: {what}" if self.snapshot is not None else what

    def advice(self) -> str:
        """What is wrong, and the remedy."""
        return f"{self.text()} ({self.remedy})" if self.remedy else self.text()

    def data(self, repaired: bool = False) -> dict[str, Any]:
        return {"what": self.what, "snapshot": self.snapshot, "mended": repaired}

    def attempt_repair(self, system: System) -> str | None:
        """Repair it. Returns None if that succeeded, else the reason or, if there is no repair, an empty string."""
        if self.repair is None:
            return ""
        try:
            with contextlib.nullcontext() if self.lock is None else system.lock(self.lock):
                self.repair()
        except AshError as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        except OSError as error:
            return error.strerror or str(error)
        return None


class LostFound:
    """The directory in lost+found for what one repair removes. Nothing is deleted: it may be the last copy."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.directory = layout.lost_found / time.strftime("%Y-%m-%dT%H%M%S")

    @property
    def shown(self) -> str:
        """The directory's path in the running system; empty if nothing was removed."""
        return f"/.snapshots/{self.directory.relative_to(self.layout.snapshots)}" if self.directory.exists() else ""

    def take(self, *paths: Path) -> None:
        """Move subvolumes, files or directories here, keeping their paths; AshError (REFUSED) if one is mounted."""
        for path in paths:
            is_sub = is_subvolume(path)
            if is_sub and is_mounted(path):
                raise AshError(f"{path.name} is mounted: not moved", "", REFUSED)
            target = self._place_for(path)
            readonly = is_sub and Subvolume.at(path).readonly
            if readonly:
                set_readonly(path, False)  # the kernel refuses to move a read-only subvolume to another directory
            try:
                rename(path, target)
            finally:
                if readonly:
                    set_readonly(target if target.exists() else path)

    def keep(self, path: Path) -> None:
        """Keep a copy of a small file or subvolume that is about to be replaced, on disk before its replacement."""
        if is_subvolume(path):
            snapshot_subvolume(path, self._place_for(path), readonly=True)
            sync_filesystem(self.layout.snapshots)
        elif path.is_file() and not path.is_symlink():
            kept = self._place_for(path)
            os.link(path, kept)
            with kept.open("rb") as file:
                os.fsync(file.fileno())
            sync_directory(kept.parent)
        elif os.path.lexists(path):
            self.take(path)

    def _place_for(self, path: Path) -> Path:
        wanted = self.directory / path.relative_to(self.layout.snapshots)
        self.layout.lost_found.mkdir(mode=0o700, exist_ok=True)
        wanted.parent.mkdir(parents=True, exist_ok=True)
        names = itertools.chain([wanted.name], (f"{wanted.name}.{again}" for again in itertools.count(1)))
        return next(wanted.with_name(name) for name in names if not os.path.lexists(wanted.with_name(name)))


def is_whole(root: Path) -> bool:
    """Whether a root is a subvolume with /etc, /usr and a package database."""
    return is_subvolume(root) and all((root / directory).is_dir() for directory in ("etc", "usr", IN_ROOT_DB))


def is_description(path: Path) -> bool:
    """Whether a path is a regular file that is not empty."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size > 0


def restore_link(layout: Layout, name: str, target: str) -> None:
    """Make a symlink to the package database again; what is in its place moves to a conflicts directory."""
    link = layout.var / name
    if os.path.lexists(link) and not is_link_to(link, target):
        aside = layout.conflicts(BASE)
        make_private_directory(aside)
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        rename(link, aside / name)
    restore_links(layout.var, {name: target})


def problems_of_var(system: System) -> Iterator[Problem]:
    """Look at what merges could not put into /var, and at the symlinks to the package database, which all share."""
    for path in unmerged_directories(system.layout):
        yield Problem(f"{path} has what could not be put into /var", None, "move it where it belongs, or delete it")
    base = system.layout.rootfs(BASE)
    for name, target in database_links(system.package_manager, base).items() if is_whole(base) else ():
        link, repair = system.layout.var / name, partial(restore_link, system.layout, name, target)
        what = f"/var/{name}, a symlink to the package database,"
        if not os.path.lexists(link):
            yield Problem(f"{what} is missing", None, "make it again", repair, "merge")
        elif not is_link_to(link, target):
            remedy = "move what is there to /var/lib/ash/conflicts, make the symlink again"
            yield Problem(f"{what} was replaced", None, remedy, repair, "merge")


# --- Problems with disks and mounts ------------------------------------------------------------------------------


def copy_problems(system: System) -> Iterator[Problem]:
    """Warn of attached copies of the running system's disk."""
    for device in system.copies_of_disk():
        what = f"{device} is a copy of this system's disk, with the same UUID: the next boot may use either"
        yield Problem(what, None, f"detach it, or give it another UUID: btrfstune -u {device}")


def record_uuid(layout: Layout, lost: LostFound) -> None:
    if uuid := uuid_on_disk(layout.snapshots):
        lost.keep(layout.part)
        write_file(layout.part, f"{uuid}\n")


def renew_uuid_in_fstab(layout: Layout, slot: str, old: str) -> None:
    """Replace a UUID in the fstab of a slot, in the user's lines too."""
    path, uuid = path_inside(layout.rootfs(slot), "etc/fstab"), uuid_on_disk(layout.snapshots)
    if uuid and uuid_in_fstab(layout.rootfs(slot)) == old:
        rewrite(path, read_text(path).replace(old, uuid))


def uuid_problems(layout: Layout, lost: LostFound) -> Iterator[Problem]:
    """Check what names the UUID of the file system; btrfstune can give it another one."""
    uuid = uuid_on_disk(layout.snapshots)
    if uuid is None:
        return
    recorded = read_text(layout.part).strip()
    if recorded != uuid:
        what = f"ash/part names the UUID {recorded or 'of nothing'}, but the file system has {uuid}"
        yield Problem(what, None, "write it again", partial(record_uuid, layout, lost), "deploy")
    for slot in (*SLOTS, *SECONDARY_SLOTS):
        old = uuid_in_fstab(layout.rootfs(slot))
        if old not in ("", uuid):
            what = f"the fstab of snapshot-{slot} names the UUID {old}, but the file system has {uuid}"
            yield Problem(what, None, "replace it", partial(renew_uuid_in_fstab, layout, slot, old), "deploy")
    wanted = layout.boot_uuid or uuid
    for found in sorted(layout.grub_cfg.parent.glob("*/load.cfg")):
        old = next(iter(re.findall(r"search\.fs_uuid (\S+)", read_text(found))), wanted)
        if old != wanted:
            what = f"GRUB is installed to search for the UUID {old}, but the file system has {wanted}"
            remedy = "run grub-install and correct EFI/*/grub.cfg on the EFI partition, or put the UUID back: "
            yield Problem(what, None, f"{remedy}btrfstune -U {old}, while it is not mounted")


def unmount_everywhere(target: str) -> None:
    run(["nsenter", "--mount", "--target", "1", "umount", target])  # ash has a mount namespace of its own
    run(["umount", target], check=False)  # fails if mounts are shared, as they usually are: already unmounted here


def subvolume_below(one: Mount, mounted: Sequence[Mount], device: str) -> int | None:
    """The id of the subvolume that contains a mount point, if that is on the file system of a device."""
    above = [m for m in reversed(mounted) if one.target.startswith(f"{m.target.rstrip('/')}/") and m is not one]
    if above and max(above, key=lambda m: len(m.target)).kind == "btrfs":
        with contextlib.suppress(OSError):
            directory = Path(one.target).parent
            if mount_of(directory).device == device:
                return subvolume_id(directory)
    return None


def reader_problems(system: System) -> Iterator[Problem]:
    """What others than root may read, and should not."""
    for directory in system.layout.private:
        if directory.is_dir() and directory.stat().st_mode & 0o077:
            what = f"{directory.name} can be entered by others: it keeps files that were readable once"
            yield Problem(what, None, "make it root's alone", system.make_private)
    if not system.history.is_private:
        what = "the history can be read by others: it keeps what was typed, passwords too"
        yield Problem(what, None, "leave it to root and the group adm", system.history.make_private, "state")


def mount_problems(system: System, numbers: Sequence[int]) -> Iterator[Problem]:
    """Check for mounts inside of snapshots."""
    layout, mounted, device = system.layout, mounts(), mount_of(system.layout.snapshots).device
    parts = [(n, part) for n in numbers for part in (layout.rootfs(n), layout.etc(n), layout.boot(n))]
    of_subvolume = {found.id: number for number, part in parts if (found := subvolume_at(part))}
    root = next((m.subvolume for m in reversed(mounted) if m.target == "/"), None)  # a snapshot may be booted
    for one in mounted:
        inside = subvolume_below(one, mounted, device)
        if inside in of_subvolume and inside != root:
            own = system.running and one.target.startswith("/.snapshots/")
            repair = partial(unmount_everywhere, one.target) if own else None
            what = f"{one.target} is mounted inside it"
            yield Problem(what, of_subvolume[inside], f"umount {one.target}", repair)


def copy_boot_file(source: Path, target: Path) -> None:
    """Copy a file of /boot to a deployment that lacks it."""
    if size_of(target) <= 0:
        with replace(target, durable=True) as new:
            run(["cp", "-a", "--reflink=auto", source, new])


def stop_counting(deployments: Deployments) -> None:
    """Do without the EFI partition: GRUB starts the default without counting."""
    try:
        deployments.trials.problem(deployments.menu)
    except AshError:
        deployments.layout.efi.unlink(missing_ok=True)
        deployments.trials.notes.efi.uuid = ""
        deployments.boot_menu.write()


def start_counting(deployments: Deployments, uuid: str) -> None:
    """Have GRUB write its notes to a partition."""
    if is_directory(deployments.layout.efi):
        remove_tree(deployments.layout.efi)
    write_file(deployments.layout.efi, f"{uuid}\n")
    deployments.trials.notes.efi.uuid = uuid
    deployments.trials.renew(deployments.menu)
    deployments.boot_menu.write()


def stop_counting_in_btrfs(deployments: Deployments) -> None:
    """Go on without the environment block, until GRUB has shown again that it can write there."""
    deployments.trials.notes.learn()
    deployments.boot_menu.write()


def notes_problems(deployments: Deployments) -> Iterator[Problem]:
    """Check the places where GRUB counts, its notes there, and ash's own on what did not start."""
    menu, trials, bad = deployments.menu, deployments.trials, deployments.layout.bad
    efi = trials.notes.efi
    if os.path.lexists(bad) and not is_failures_file(bad):
        what = f"{bad.name}, which says what did not start, is damaged"
        yield Problem(what, None, "delete it", partial(remove_tree, bad), "deploy")
    fstab = read_text(path_inside(deployments.layout.rootfs(menu.default), "etc/fstab"))
    there = re.search(r"^UUID=([0-9A-F]{4}-[0-9A-F]{4})\s+/boot/efi\s+vfat\s", fstab, re.MULTILINE)
    if size_of(deployments.layout.efi) < 0 and there and len(efi.find(there[1])) == 1:
        why = f"{deployments.layout.efi.name} is damaged" if os.path.lexists(deployments.layout.efi) else ""
        why = why or "an older ash installed this system"
        what = f"GRUB does not count the starts of new deployments: {why}"
        repair = partial(start_counting, deployments, there[1])
        yield Problem(what, None, "have it count on the EFI partition", repair, "deploy")
    try:
        what = trials.problem(menu)
        if efi.uuid and (directory := efi.readonly_at()):
            readonly = f"{directory} is mounted read-only, so GRUB cannot be told of new deployments"
            yield Problem(f"{readonly} (mount -o remount,rw {directory}, or check its file system)", None)
    except AshError as error:
        if deployments.booted or efi.image:  # else the user may have attached the root's partition alone
            remedy = "go on without automatic fallback"
            yield Problem(error.message, None, remedy, partial(stop_counting, deployments), "deploy")
        return
    if what:
        yield Problem(what, None, "write it again", partial(trials.renew, menu), "deploy")
    if not trials.notes.counts and read_text(deployments.layout.envblock):
        what = "GRUB's environment block in the header of btrfs is missing or damaged, or another GRUB is installed now"
        remedy = "go on without automatic fallback until GRUB has shown that it can write there"
        yield Problem(what, None, remedy, partial(stop_counting_in_btrfs, deployments), "deploy")


# --- Problems of accounts --------------------------------------------------------------------------------------


class AccountCheck:
    """The part of fsck that is about accounts: their ids in the registry, the snapshots and the running system.

    Args:
        changing: opens a transaction on a snapshot.
    """

    def __init__(
        self, system: System, lost: LostFound, changing: Callable[[int], contextlib.AbstractContextManager[Transaction]]
    ) -> None:
        self.system = system
        self.layout = system.layout
        self.lost = lost
        self._changing = changing

    def problems(self, numbers: Sequence[int]) -> Iterator[Problem]:
        """Check the registry of ids, and the accounts of the snapshots against it."""
        try:
            registry = AccountIds.load(self.layout.ids)
        except AshError as error:
            yield Problem(error.message, None, "rebuild it from the snapshots", self._rebuild_ids, "state")
            return
        running = self._running_etc()
        if running is not None:
            registry.learn_machine(running)
        known = registry.given
        remedy = "assign the id that it has elsewhere, or a new one, also to its files"
        for number, name in itertools.product(numbers, ID_FILES):
            ids = AccountFile.read(self.layout.rootfs(number) / "etc" / name).ids
            for what in self._id_clashes(name, ids, known[name]):
                yield Problem(what, number, remedy, partial(self._reassign_ids, number))
        for number in numbers:
            files = {name: AccountFile.read(self.layout.rootfs(number) / "etc" / name).ids for name in ID_FILES}
            # Those that share an id do so on purpose, and need not be recorded.
            alone = {(name, one) for name, ids in files.items() for one in ids if [*ids.values()].count(ids[one]) == 1}
            if lacking := sorted({one for name, one in alone if one not in known[name]}):
                what = f"the registry of uids and gids lacks {listed(lacking)}"
                yield Problem(what, number, "record their ids", partial(self._learn_ids, number), "state")
            yield from self._accounts(number, running, registry)

    def _accounts(self, number: int, running: Path | None, registry: AccountIds) -> Iterator[Problem]:
        """Check the accounts of a snapshot against those of the running /etc, and each other."""
        etc = self.layout.rootfs(number) / "etc"
        people = PeopleMerge(running, running, etc, registry.copy(), strict=False) if running else None
        for what in people.clashes() if people else ():
            yield Problem(what, number, "assign a new one, also to its files", partial(self._reassign_ids, number))
        for name, orphans in Accounts(etc).orphans().items():
            if orphans:
                what = f"{name} has rows of accounts that do not exist: {listed(sorted(orphans))}"
                yield Problem(what, number, "delete these rows", partial(self._delete_orphans, number))

    def _running_etc(self) -> Path | None:
        """The running /etc; None if nothing is deployed, or the menu is damaged."""
        with contextlib.suppress(AshError):
            if slot := self.system.last_good_slot():
                return self.layout.rootfs(slot) / "etc"
        return None

    @staticmethod
    def _id_clashes(name: str, accounts: Mapping[str, int], known: Mapping[str, int]) -> Iterator[str]:
        for account, ident in accounts.items():
            if is_misnumbered(account, accounts, known):
                yield f"{account} has the id {ident} in {name}, but {known[account]} elsewhere"

    def _rebuild_ids(self) -> None:
        self.lost.keep(self.layout.ids)
        ids = AccountIds()
        every: list[int | str] = [*sorted(self.system.tree().numbers()), *SLOTS, *SECONDARY_SLOTS]
        for which in every:
            ids.learn(self.layout.rootfs(which) / "etc")
        write_file(self.layout.ids, ids.dump())

    def _learn_ids(self, number: int) -> None:
        """Record the accounts of a snapshot that the registry lacks: one that was restored, or it is a restored one."""
        ids = AccountIds.load(self.layout.ids)
        ids.learn(self.layout.rootfs(number) / "etc")
        write_file(self.layout.ids, ids.dump())

    def _reassign_ids(self, number: int) -> None:
        """Give accounts of a snapshot the ids that they should have, and re-own their files."""
        layout, homes = self.layout, self.system.homes
        with ExitStack() as stack, self._changing(number) as work:
            stack.enter_context(self.system.lock("deploy"))
            stack.enter_context(new_owners(layout, homes))
            with self.system.lock("state"):
                ids, running, etc = AccountIds.load(self.layout.ids), self._running_etc(), work.root / "etc"
                people = PeopleMerge(running, running, etc, ids) if running else None
                write_file(self.layout.ids, ids.dump())
            if people is not None:
                people.renumbering().apply(work.root, {work.root: None})
                save_new_owners(layout, number, etc, belongings=people.belongings, homes=homes)
            with self.system.lock("state"):
                ids = AccountIds.load(self.layout.ids)
                renumbering = ids.reconcile(etc)
                write_file(self.layout.ids, ids.dump())
            renumbering.apply(work.root, {work.root: None})

    def _delete_orphans(self, number: int) -> None:
        with self._changing(number) as work:
            accounts = Accounts(work.root / "etc")
            for name, orphans in accounts.orphans().items():
                accounts[name].rows = [row for row in accounts[name].rows if row[0] not in orphans]
            accounts.write()


# --- Finding and repairing problems ----------------------------------------------------------------------------


class Fsck:
    """Checks tree, subvolumes, deployments, boot files and package databases against each other, and repairs them.

    Each check, which changes nothing, is followed by the repairs of its problems. These check again, since another ash
    may have been at work, and may raise AshError; anything they remove moves to lost+found.
    """

    LOOKS = 10  # at a snapshot that other processes keep changing
    PATIENCE = 60.0  # seconds to wait for its lock then

    def __init__(self, system: System) -> None:
        self.system = system
        self.layout = system.layout
        self.lost = LostFound(system.layout)
        # Answers by contents: many snapshots are identical, and a repair runs the checks several times.
        self._contents = Contents()
        self._answers: dict[tuple[object, ...], Any] = {}
        self._reinstalled: set[int] = set()  # snapshots
        self._original_kept: dict[int, bool] = {}  # for each changed snapshot: whether it is in lost+found

    def run(self, only: int | None = None) -> Iterator[Problem]:
        """All problems; interrupted work comes first, since finishing it may solve others.

        Args:
            only: the snapshot that is looked into; the others are left out.
        """
        try:
            numbers = self.system.tree().numbers()
        except AshError as error:
            remedy = "rebuild it from the history and the existing snapshots"
            yield Problem(error.message, None, remedy, self._rebuild_tree, "state")
            return
        yield from self._interrupted()
        for number in numbers if only is None else {only}.intersection(numbers):
            yield from self._snapshot(number)
        yield from self._strays(numbers)
        yield from self._last_number(numbers)
        yield from AccountCheck(self.system, self.lost, self._changing).problems(numbers)
        yield from self._nested()
        yield from problems_of_var(self.system)
        yield from reader_problems(self.system)
        yield from mount_problems(self.system, numbers)
        yield from self._confirmed(self.system.lock("deploy"), partial(uuid_problems, self.layout, self.lost))
        yield from self._confirmed(self.system.lock("deploy"), self._menu)
        yield from copy_problems(self.system)

    def _confirmed(self, lock: Lock, look: Callable[[], Iterable[Problem]]) -> list[Problem]:
        """The problems that are found again with a lock held: the work of another ash is not a problem."""
        if not list(look()):
            return []
        # On a read-only file system nobody can create a lock.
        can_lock = lock.path.exists() or not is_readonly(self.layout.snapshots)
        with contextlib.suppress(AshError), lock if can_lock else contextlib.nullcontext():
            return list(look())
        return []

    def _answer(self, ask: Callable[..., Result], *paths: Path) -> Result:
        """What a function says of directories; asked once for all whose subvolumes have the same contents."""
        key = (ask.__name__, *map(self._contents.of, paths))
        if key not in self._answers:
            self._answers[key] = ask(*paths)
        answer: Result = self._answers[key]
        return answer

    def _rebuild_tree(self) -> None:
        with contextlib.suppress(AshError):
            self.system.tree()
            return
        self.lost.keep(self.layout.tree)
        there = numbered(self.layout.snapshots / "rootfs", "snapshot-")
        works = {number: self.layout.work(number) for number in there}
        # An ash that is creating or deleting a snapshot edits the tree itself.
        busy = {n for n, work in works.items() if is_coming_or_going(work) and is_held(work / "lock")}
        numbers = [number for number, path in there.items() if is_whole(path) and number not in busy]
        write_file(self.layout.tree, tree_from_history(numbers, self.system.history.read()).dump())

    # Interrupted work

    def _interrupted(self) -> Iterator[Problem]:
        looks: dict[int | str, Callable[[], Iterable[Problem]]] = {"deploy": self._deploy, "live": self._live}
        looks |= {number: partial(self._change, number) for number in numbered(self.layout.work(""), "")}
        for name, look in looks.items():
            yield from self._confirmed(Lock(self.layout.work(name) / "lock", ""), look)

    def _deploy(self) -> Iterator[Problem]:
        if (self.layout.work("deploy") / "intent").exists() or NewOwners.place(self.layout).exists():
            yield Problem("a deploy was interrupted", None, "clean up after it", self._recover_deploy, "deploy")
        elif left := unfinished_deployments(self.layout):
            what = f"{left[0].relative_to(self.layout.snapshots)} is left over from a deploy"
            yield Problem(what, None, "delete it", self._recover_deploy, "deploy")

    def _recover_deploy(self) -> None:
        self.system.deployments().recover()

    def _live(self) -> Iterator[Problem]:
        place = LiveWorkDir(self.system)
        if (place.directory / "intent").exists():
            yield Problem("a live change was interrupted", None, "roll it back", self._roll_back_live, "live")
        elif left := place.leftovers():
            what = f"{left[0].relative_to(self.layout.snapshots)} is left over from a live change"
            yield Problem(what, None, "move it to lost+found", self._roll_back_live, "live")

    def _roll_back_live(self) -> None:
        place = LiveWorkDir(self.system)
        if state_of_work(place.directory):
            place.recover(self.system.tree())
        else:
            self.lost.take(*place.leftovers())

    def _change(self, number: int) -> Iterator[Problem]:
        place, repair = self.system.workdir(number), partial(self._recover, number)
        try:
            intent = load_intent(place.directory)
        except AshError as error:
            yield Problem(error.message, number, "move what it left to lost+found", repair, number)
            return
        if intent is not None and not isinstance(intent, Kept):
            yield Problem("a change was interrupted", number, "finish or undo it", repair, number)
        elif intent is None and (left := place.leftovers()):
            what = f"{left[0].relative_to(self.layout.snapshots)} is left over from a transaction"
            yield Problem(what, number, "move it to lost+found", repair, number)

    def _recover(self, number: int) -> None:
        place, tree, intent = self.system.workdir(number), self.system.tree(), None
        with contextlib.suppress(AshError):
            intent = load_intent(place.directory)
        if isinstance(intent, Birth | Deletion) and number not in tree:
            self.lost.take(*place.remains(), *place.leftovers())
            remove_work_directory(place.directory)
        elif intent is None or not is_subvolume(self.layout.rootfs(number)):
            self.lost.take(*place.leftovers())
        else:
            place.recover(tree, strict=True)

    # Snapshots

    def _snapshot(self, number: int) -> list[Problem]:
        """The problems of a snapshot; checked again if another ash changes or deletes it meanwhile."""
        for _ in range(self.LOOKS):
            before = self._version(number)
            try:
                found = list(self._look_at(number))
            except OSError:
                if self._version(number) == before:
                    raise
                continue
            if not found or self._version(number) == before:
                return found
        return self._locked_look_at(number)

    def _locked_look_at(self, number: int) -> list[Problem]:
        """The problems of a snapshot while nobody else can change it."""
        directory = self.layout.work(number)
        lock = Lock(directory / "lock", f"snapshot {number}", max(self.system.wait, self.PATIENCE))
        try:
            lock.__enter__()
        except AshError as error:
            return [Problem(f"it was not checked, since others change it all the time: {error.message}", number)]
        with ExitStack() as stack:
            stack.push(lock)
            if number not in self.system.tree():  # deleted, and its work directory made again by the lock
                remove_work_directory(directory)
            return list(self._look_at(number))

    def _version(self, number: int) -> tuple[object, ...]:
        """A token that changes when the snapshot is changed."""
        layout = self.layout
        parts = map(subvolume_at, (layout.rootfs(number), layout.etc(number), layout.boot(number)))
        ids = [part and part.id for part in parts]
        return number in self.system.tree(), state_of_work(layout.work(number)), *ids

    def _look_at(self, number: int) -> Iterator[Problem]:
        """Check the parts of one snapshot: root, predecessor, copies, description, package database."""
        layout, manager = self.layout, self.system.package_manager
        root, undo, description = layout.rootfs(number), layout.undo(number), layout.description(number)
        if number not in self.system.tree() or state_of_work(layout.work(number)) in ("commit", "merge"):
            return  # it was deleted, or recovery will copy its /etc and /boot again
        if not is_subvolume(root):
            without_undo = "remove it from the tree; its children move up"
            remedy = f"replace it with {undo.name}" if is_subvolume(undo) else without_undo
            yield Problem(f"{root.name} is missing", number, remedy, partial(self._restore_root, number), number)
            return
        if not Subvolume.at(root).readonly and not is_mutable(root):
            yield self._writable(root, number)
        if is_writable(undo):
            yield self._writable(undo, number)
        if not is_description(description):
            what = "empty or not a regular file" if os.path.lexists(description) else "missing"
            restore = partial(self._restore_description, number)
            yield Problem(f"its description is {what}", number, "restore it from the history", restore, number)
        for directory in ("etc", "boot"):
            yield from self._copy(number, directory)
        try:
            mutable_directories(root, number)
        except AshError as error:
            yield Problem(
                f"it cannot be changed or deployed: {error}", number, f"ash edit-conf {number}, or ash undo {number}"
            )
        remedy = "reinstall it from the repositories"
        remedy += f" (ash run {number} {manager.audit} tells more)" if manager.audit else ""
        problems = self._package_problems(root)
        for what in problems:
            yield Problem(what, number, remedy, partial(self._repair_packages, number))
        if not problems and read_packages(layout, number) != self._answer(manager.installed, root):
            what = "its list of packages is missing or differs from the package database"
            yield Problem(what, number, "write it again", partial(self._record_packages, number), number)

    def _package_problems(self, root: Path) -> list[str]:
        return self._answer(self.system.package_manager.problems, root)

    def _writable(self, path: Path, number: int, lock: int | str | None = None) -> Problem:
        remedy, repair = "make it read-only as it is", partial(set_readonly, path)
        return Problem(f"{path.name} is writable", number, remedy, repair, number if lock is None else lock)

    def _copy(self, number: int, directory: str) -> Iterator[Problem]:
        copy, original = self.layout.copy(directory, number), self.layout.rootfs(number) / directory
        again = "copy it again", partial(self._renew_copy, number, directory), number
        if not is_directory(original):
            yield Problem(f"its /{directory} is not a directory", number)
        elif not is_subvolume(copy):
            yield Problem(f"{copy.name} is missing", number, *again)
        elif different := self._answer(first_difference, copy, original):
            yield Problem(f"{copy.name} differs from its /{directory}: {different}", number, *again)
        elif not Subvolume.at(copy).readonly:
            yield self._writable(copy, number)

    def _renew_copy(self, number: int, directory: str) -> None:
        """Copy a snapshot's /etc or /boot again; the old copy is kept, since it may have the only edit of a file."""
        copy, original = self.layout.copy(directory, number), self.layout.rootfs(number) / directory
        if not is_subvolume(copy) or first_difference(copy, original):
            if os.path.lexists(copy):
                self.lost.take(copy)
            renew_copy(self.layout, number, directory)

    def _restore_root(self, number: int) -> None:
        """Replace a missing snapshot with `undo-N`; without one, remove it from the tree."""
        layout, place = self.layout, self.system.workdir(number)
        root, undo, copies = layout.rootfs(number), layout.undo(number), (layout.etc(number), layout.boot(number))
        if is_subvolume(root):
            return
        if is_subvolume(undo):
            self.lost.take(*(part for part in (root, *copies) if os.path.lexists(part)))  # copies of the lost state
            rename(undo, root)
            for directory in ("etc", "boot"):
                renew_copy(layout, number, directory)
            self._record_packages(number)
            return
        with self.system.editing_tree() as tree:
            if number in tree:
                tree.take_out(number)
        self.lost.take(*place.remains(), *place.leftovers())
        remove_work_directory(place.directory)

    def _restore_description(self, number: int) -> None:
        path = self.layout.description(number)
        if not is_description(path):
            self.lost.keep(path)
            path.parent.mkdir(exist_ok=True)
            known = recorded_description(number, self.system.history.read()).encode("utf-8", "replace").decode()
            write_file(path, f"{known if known.strip() else FOUND}\n")

    def _record_packages(self, number: int) -> None:
        write_packages(self.layout, number, self.system.package_manager.installed(self.layout.rootfs(number)))

    def _repair_packages(self, number: int) -> None:
        """Have the package manager repair its database and files; once for each snapshot."""
        if number not in self._reinstalled:
            self._reinstalled.add(number)
            if not self.system.package_manager.installed(self.layout.rootfs(number)):
                # A repair would replace what was installed with a minimal system.
                raise AshError("the list of installed packages is lost", f"ash undo {number} restores the former state")
            with self._changing(number) as work:
                self.system.package_manager.repair(work)

    @contextmanager
    def _changing(self, number: int) -> Iterator[Transaction]:
        """A transaction. `undo` only reverts the last one: the state before the first is kept in lost+found."""
        if self._original_kept.get(number) is False:
            with self.system.lock(number):
                self.lost.keep(self.layout.undo(number))
            self._original_kept[number] = True
        with quiet_progress(), Transaction(self.system, number, base=True) as work:
            yield work
        if work.change.changed:
            self._original_kept.setdefault(number, False)

    # What belongs to no snapshot

    def _strays(self, numbers: Sequence[int]) -> Iterator[Problem]:
        directories = [("rootfs", "snapshot-", ""), ("rootfs", "undo-", ""), ("etc", "etc-", ""), ("boot", "boot-", "")]
        for directory, *affixes in (*directories, ("ash/snapshots", "", "-desc"), ("ash/packages", "", "")):
            for number, path in numbered(self.layout.snapshots / directory, *affixes).items():
                if number in numbers or is_coming_or_going(self.layout.work(number)):
                    continue
                if number in self.system.tree() or not os.path.lexists(path):  # created or deleted meanwhile
                    continue
                name = f"packages/{number}" if path == self.layout.packages(number) else path.name
                what = f"{name} belongs to no snapshot in the tree"
                if is_whole(self.layout.rootfs(number)):
                    remedy = f"add snapshot {number} to the tree at the top level"
                    yield Problem(what, None, remedy, partial(self._adopt, number), number)
                else:
                    yield Problem(what, None, "move it to lost+found", partial(self._take_stray, number, path), number)

    def _adopt(self, number: int) -> None:
        if number not in self.system.tree() and is_whole(self.layout.rootfs(number)):
            self._restore_description(number)
            with self.system.editing_tree() as tree:
                tree.add(number)

    def _take_stray(self, number: int, path: Path) -> None:
        if number not in self.system.tree() and os.path.lexists(path):
            self.lost.take(path)
            remove_work_directory(self.layout.work(number))

    def _nested(self) -> Iterator[Problem]:
        rootfs = self.layout.snapshots / "rootfs"
        todo = sorted((path for path in rootfs.iterdir() if is_subvolume(path)), reverse=True)
        while todo:
            for path in subvolumes_inside(todo.pop()):
                inside = path.relative_to(rootfs)
                of_snapshot = re.fullmatch(r"(?:snapshot-(?:chr)?|undo-)(\d+)", inside.parts[0])
                if not of_snapshot and inside.parts[1] == "etc" and any(path.iterdir()):
                    continue  # a user's, which its deployment is kept for
                lock = int(of_snapshot[1]) if of_snapshot else "deploy"
                repair = partial(self._take_nested, path, rootfs / inside.parts[0])
                yield Problem(f"{inside} is a nested subvolume", None, "move it to lost+found", repair, lock)
                todo.append(path)

    def _take_nested(self, path: Path, holder: Path) -> None:
        if not is_subvolume(path):
            return  # moved with the subvolume that it was nested in
        readonly = Subvolume.at(holder).readonly
        set_readonly(holder, False)
        try:
            self.lost.take(path)
        finally:
            set_readonly(holder, readonly)

    # Numbers

    def _last_number(self, numbers: Sequence[int]) -> Iterator[Problem]:
        last, highest = to_number(read_text(self.layout.last)), max(numbers, default=0)
        if last is None or last < highest:
            recorded = "not recorded" if last is None else f"recorded as {last}"
            what = f"the last snapshot number used is {recorded}, the tree has {highest}"
            yield Problem(what, None, "raise it", self._raise_last_number, "state")

    def _raise_last_number(self) -> None:
        self.lost.keep(self.layout.last)
        known = to_number(read_text(self.layout.last)) or 0
        there = numbered(self.layout.snapshots / "rootfs", "snapshot-")
        given = [entry[0] for entry in births(self.system.history.read())]
        write_file(self.layout.last, f"{max(known, *there, *given, *self.system.tree().numbers(), 0)}\n")

    # Deployments and the boot menu

    def _menu(self) -> Iterator[Problem]:
        """Check the menu file, the deployments that it names, and grub.cfg."""
        rebuild = "rebuild it from the existing deployments", self._rebuild_menu, "deploy"
        try:
            deployments = self.system.deployments()
        except AshError as error:
            yield Problem(error.message, None, *rebuild)
            return
        menu = deployments.menu
        if menu.default not in menu.deployments:
            there = any((self.layout.rootfs(slot) / IN_ROOT_SNAP).is_file() for slot in (*SLOTS, *SECONDARY_SLOTS))
            what = "the boot menu has no default deployment"
            yield Problem(what, None, *rebuild) if there else Problem(what, None, "ash deploy N")
            return
        for deployment in menu.deployments.values():
            yield from self._boot_files(deployment)
            if lacks_menu_text(self.layout, deployment):
                what = f"{IN_ROOT_MENU} of snapshot-{deployment.slot}, which has the boot menu's passwords, is missing"
                restore = partial(self._restore_menu_text, deployment)
                yield Problem(what, deployment.snapshot, "renew the boot configuration", restore, "deploy")
            partition = deployments.boot_menu.partition
            if names := [path.name for path in partition.damaged(deployment)]:
                what = f"the partition for /boot lacks a copy of files of snapshot-{deployment.slot}: {listed(names)}"
                renew = partial(partition.renew, deployment)
                yield Problem(what, deployment.snapshot, "copy them again", renew, "deploy")
            if paths := deployment.unmade:
                what = (
                    f"boot menu and initramfs of snapshot-{deployment.slot} are not made from {listed(paths)} in /etc"
                )
                make = partial(self._make_from_carried, deployment.slot)
                yield Problem(what, deployment.snapshot, "make them", make, "deploy")
            yield from self._drift_base(deployment)
        if not deployments.boot_menu.is_current():
            what = "grub.cfg differs from what ash wrote last"
            yield Problem(what, None, "write it again", self._write_menu, "deploy")
        yield from self._confirmed(self.system.lock("state"), self._snapshot_menu)
        yield from notes_problems(deployments)

    def _snapshot_menu(self) -> Iterator[Problem]:
        with contextlib.suppress(AshError):  # a damaged tree or menu file is another problem
            wanted = self.system.deployments().boot_menu.startable(self.system.tree())
            if wanted != read_text(self.layout.snapshots_cfg):
                what = "the boot menu with all snapshots is not that of the tree"
                yield Problem(what, None, "write it again", self.system.renew_snapshot_menu)

    def _rebuild_menu(self) -> None:
        try:
            deployments = self.system.deployments()
        except AshError:
            self.lost.take(self.layout.menu)
            deployments = self.system.deployments()
        if deployments.menu.default not in deployments.menu.deployments:
            deployments.boot_menu.rebuild(deployments.ran)

    def _write_menu(self) -> None:
        deployments = self.system.deployments()
        if not deployments.boot_menu.is_current():
            deployments.boot_menu.write()

    def _make_from_carried(self, slot: str) -> None:
        deployments = self.system.deployments()
        if slot in deployments.menu.deployments:
            deployments.make_from_carried(slot)

    def _restore_menu_text(self, deployment: Deployment) -> None:
        if lacks_menu_text(self.layout, deployment):
            self.system.deployments().boot_menu.renew(deployment.snapshot)

    def _boot_files(self, deployment: Deployment) -> Iterator[Problem]:
        layout, root, number = self.layout, self.layout.rootfs(deployment.slot), deployment.snapshot
        boots = layout.rootfs(number) / "boot", layout.undo(number) / "boot", layout.boot(number)
        for name in unusable_boot_files(root, deployment.config):
            target = root / "boot" / name
            what = f"{root.name} lacks {name}, which the boot menu uses"
            sources = [boot / name for boot in boots if size_of(boot / name) > 0]
            if sources and is_subvolume(root):
                copy = partial(copy_boot_file, sources[0], target)
                yield Problem(what, number, "copy it from the snapshot", copy, "deploy")
            else:
                yield Problem(what, number, "ash deploy N, of a snapshot that has a kernel")

    def _drift_base(self, deployment: Deployment) -> Iterator[Problem]:
        """Check what changes to /etc are compared with: in the deployment, and what is carried into it."""
        number, base = deployment.snapshot, self.layout.etc(deployment.slot)
        if not is_subvolume(base):
            what = f"{base.name} is missing: changes to the deployment's /etc are unknown"
            restore = partial(self._restore_drift_base, base, deployment)
            yield Problem(what, number, "copy the snapshot's /etc", restore, "deploy")
        elif not Subvolume.at(base).readonly:
            yield self._writable(base, number, "deploy")
        carried, source = self.layout.carried(deployment.slot), self.layout.etc(deployment.etc_from)
        if is_subvolume(carried):
            if not Subvolume.at(carried).readonly:
                yield self._writable(carried, number, "deploy")
        elif deployment.own_etc and deployment.etc_from:  # else an older ash made it, or nothing is carried into it
            what = f"{carried.name} is missing: what was carried into the deployment is unknown"
            if is_subvolume(source):
                restore = partial(self._restore_carried, carried, deployment)
                yield Problem(what, number, f"copy {source.name}", restore, "deploy")
            else:
                yield Problem(what, number, "ash deploy N")

    def _restore_carried(self, carried: Path, deployment: Deployment) -> None:
        """Copy the drift base of the slot that was carried: of what is carried again, nothing is lost or taken back."""
        new = self.layout.carried(f"new-{deployment.slot}")
        if is_subvolume(carried):
            return
        if os.path.lexists(carried):
            self.lost.take(carried)
        delete_subvolume(new)
        snapshot_subvolume(self.layout.etc(deployment.etc_from), new, readonly=True)
        rename(new, carried)

    def _restore_drift_base(self, base: Path, deployment: Deployment) -> None:
        """Copy a snapshot's /etc to a slot's missing drift base; more counts as drift than was changed."""
        if is_subvolume(base):
            return
        if os.path.lexists(base):
            self.lost.take(base)
        new, source = self.layout.etc(f"new-{deployment.slot}"), self.layout.rootfs(deployment.snapshot)
        copy_as_subvolume((source if is_subvolume(source) else self.layout.rootfs(BASE)) / "etc", new)
        rename(new, base)


# --- The command fsck ------------------------------------------------------------------------------------------


def repair(system: System) -> Reply:
    """Repair all problems that can be repaired. What a last check still finds does not count as repaired."""
    fsck = Fsck(system)
    tried: dict[Problem, str | None] = {}  # why each was not repaired
    found = list(fsck.run())
    while new := [problem for problem in found if problem not in tried]:  # a repair may reveal more
        tried |= {problem: problem.attempt_repair(system) for problem in new}
        sync_filesystem(system.layout.snapshots)
        found = list(fsck.run())
    repaired = [problem for problem, why in tried.items() if why is None and problem not in found]
    left = {problem: tried[problem] for problem in found}
    damage = [*(one.data(repaired=True) for one in repaired), *(one.data() for one in left)]
    lines = [f"repaired: {one.text()}" for one in repaired] or ([] if left else ["no problems found"])
    lines += [f"not repaired: {f'{one.text()}: {why}' if why else one.advice()}" for one, why in left.items()]
    lines += [f"anything removed is in {fsck.lost.shown}"] if fsck.lost.shown else []
    data = {"damage": damage, "changed": bool(repaired), "lost_found": fsck.lost.shown}
    return Reply(data, "\n".join(lines), status=FAILED if left else 0)


@command(
    "fsck", group=ITSELF, usage="fsck [--repair]", help="find problems; exit status 1 if any is left",
    wants_disk=True, changes_with="repair",
    options=[flag("--repair", help="repair them; anything removed is kept in /.snapshots/lost+found")],
    answer={"damage": [{"what": str, "snapshot": int | None, "mended": bool}], "changed": bool, "lost_found": str},
)  # fmt: skip
def cmd_fsck(system: System, request: Request) -> Reply:
    require_root("checking the file system")
    if request.repair and not request.dry_run:
        return repair(system)
    problems = list(Fsck(system).run())
    repairable = [one.advice() for one in problems if one.repair]
    status = FAILED if len(problems) > (len(repairable) if request.repair else 0) else 0
    data = {"damage": [one.data() for one in problems]}
    if request.repair:
        reply = would("repair:\n" + "\n".join(repairable) if repairable else "repair nothing", **data)
        return reply._replace(data={**reply.data, "would": repairable}, status=status)
    lines = [one.text() if one.repair else one.advice() for one in problems] or ["no problems found"]
    lines += [f"ash fsck --repair can repair {len(repairable)} of {len(problems)}"] if repairable else []
    return Reply({**data, "changed": False, "lost_found": ""}, "\n".join(lines), status=status)


# --- The automatic upgrade -------------------------------------------------------------------------------------


def require_sound(work: Transaction) -> None:
    """Raise AshError if a transaction's root has problems that it did not have before."""

    def problems(root: Path) -> set[str]:
        return {*work.package_manager.problems(root), *kernel_faults(root)}

    now = problems(work.root)
    new = sorted(now and now - problems(work.original)) or sorted(missing_libraries(work))
    if new:
        raise AshError(f"the upgraded snapshot is not sound: {listed(new[:3])}{' ...' if len(new) > 3 else ''}")


NIGHTLY_WAIT = 3600.0  # seconds to wait for a lock when nobody waits for the result
CLOCK_SLACK = 60  # seconds that a clock may have been set back


def doubt_about_clock(system: System) -> str:
    """A warning if the clock is behind ash's newest state file: it is wrong, or was wrong then. Else empty.

    If it is wrong, signatures may seem to be from the future, which the package manager reports. If it was, nothing
    must come of it, so the files get the present time, and the warning is given once.
    """
    layout = system.layout
    times = {path: path.stat().st_mtime for path in (layout.tree, layout.history, layout.upstate) if path.exists()}
    now, last = time.time(), max(times.values())
    if now >= last - CLOCK_SLACK:
        return ""
    for path in (path for path, when in times.items() if when > now):
        with contextlib.suppress(OSError):
            os.utime(path)
    here, there = (time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) for when in (now, last))
    return f"the clock is or was wrong: it says {here}, but ash last changed something on {there}"


def is_in_window(window: str) -> bool:
    """Whether the local time is within a window such as 02:00-05:00, which may span midnight."""
    begin, _, end = window.partition("-")
    now = time.strftime("%H:%M")
    return begin <= now < end if begin <= end else now >= begin or now < end


def record_upgrade(system: System, status: int, text: str) -> None:
    """Record the result of an automatic upgrade, 0 for success. The old ash reads the first two lines of this file."""
    lines = [str(status), time.strftime("%Y-%m-%dT%H:%M:%S%z"), one_line(text)]
    write_file(system.layout.upstate, "".join(f"{line}\n" for line in lines))


RESULTS = {True: "failed", False: "succeeded"}


def last_upgrade(system: System) -> dict[str, Any] | None:
    """The result of the last automatic upgrade; None if there was none."""
    lines = lines_of(read_text(system.layout.upstate))
    if len(lines) < 2:
        return None
    return {"failed": lines[0].strip() != "0", "time": one_line(lines[1]), "message": one_line(" ".join(lines[2:3]))}


class AutoUpgrade:
    """One automatic upgrade: upgrades a snapshot, keeps its former state as a sibling, checks it, and deploys it.

    If anything fails, the snapshot is as it was. An interruption needs no cleanup: the next run deploys what the last
    one did not. Raises AshError (USAGE) if the configuration is invalid.
    """

    def __init__(self, system: System, number: int, strict: bool = False) -> None:
        self.system = system
        self.number = number
        self.strict = strict
        configuration = system.configuration()
        self.policy = configuration.values.get("auto_upgrade", "deploy").lower()
        self.window = configuration.values.get("auto_upgrade_window", "")
        if self.policy == "reboot" and not self.window:
            hint = "auto_upgrade_window::02:00-05:00 in /etc/ash.conf"
            raise AshError("auto_upgrade::reboot needs a time window", hint, USAGE)
        self.with_base = configuration.is_on("auto_upgrade_base")
        self.original = self._root_id()
        self.kept: int | None = None  # the sibling with the former state
        self.parent: int | None = None  # of both
        self.doubt = ""  # about the clock
        self.upgraded = ""  # what was done to the snapshot, while the base is being upgraded
        self.missing: list[str] = []  # what repositories that could not be used said

    def _root_id(self) -> int | None:
        found = subvolume_at(self.system.layout.rootfs(self.number))
        return found.id if found else None

    def state(self) -> str:
        """What state a failure leaves things in, for the user."""
        if self.upgraded:
            return f"{self.upgraded}; the base is as it was"
        is_original = self._root_id() == self.original
        return f"snapshot {self.number} is {'as it was' if is_original else 'upgraded, but not deployed'}"

    def run(self) -> Reply:
        """Do everything except the reboot."""
        self.doubt = doubt_about_clock(self.system)
        if self.doubt:
            console.warn(self.doubt)
        self.system.require_changeable(self.number)
        if self.policy in ("deploy", "reboot"):
            self.system.deployments().choose_slot(self.number)  # raises before anything is done
        if self.policy == "check":
            planned = self._change(self.number)
            reply = Reply({**change_data(planned), "changed": False}, self._summary(planned))
        else:
            reply = self._upgrade()
        return self._with_base(reply) if self.with_base else reply

    def _with_base(self, reply: Reply) -> Reply:
        """Upgrade the base too. Returns the reply for both."""
        self.upgraded = lines_of(reply.text)[0]
        base = self._change(BASE, base=True)
        changed = base.changed and self.policy != "check"
        of_base = {**change_data(base), "changed": changed}
        both = [{key: reply.data[key] for key in of_base}, of_base]
        rest = {key: value for key, value in reply.data.items() if key not in of_base}
        data = {**rest, "changed": changed or reply.data["changed"], "snapshots": both}
        return reply._replace(data=data, text=f"{reply.text}\n{self._summary(base)}")

    def reboot(self, reply: Reply) -> Reply:
        """Reboot if a deployment of the snapshot, even of an earlier night, is waiting, and the time is right."""
        menu, booted = self.system.menu(), self.system.booted_slot
        waiting = menu.deployments.get(menu.default)
        waits = booted and waiting and waiting.snapshot == self.number and waiting.slot != booted
        if self.policy != "reboot" or not waits:
            return reply
        if not is_in_window(self.window):
            return reply._replace(text=f"{reply.text}\nthe reboot waits for {self.window}")
        cancel = schedule_reboot("ash has upgraded the system")
        return reply._replace(text=f"{reply.text}\nrebooting in one minute: {cancel} cancels it")

    def _change(self, number: int, base: bool = False) -> Change:
        if self.policy == "check":
            work = self._fetch_and_upgrade
            return change_snapshot(self.system, number, "looking for upgrades of", work, simulate=True, base=base)
        return change_snapshot(self.system, number, "upgrading", self._work, base=base)

    def _fetch_and_upgrade(self, transaction: Transaction) -> None:
        self.missing += [one for one in refresh(transaction, self.strict) if one not in self.missing]
        upgrade(transaction, fetch=False)

    def _work(self, transaction: Transaction) -> None:
        packages = self.system.package_manager.installed(transaction.root)
        self._fetch_and_upgrade(transaction)
        if self.system.package_manager.installed(transaction.root) != packages:
            require_sound(transaction)
            if transaction.snapshot == self.number:
                self._keep(transaction.original)

    def _keep(self, original: Path) -> None:
        """Copy the snapshot to a sibling. Right before the commit: until then nobody needs a copy."""
        system, number, parent = self.system, self.number, self.system.tree().parent(self.number)
        description = f"{number} before {time.strftime('%Y-%m-%d')}"
        sibling = new_snapshot(system, original, description, number, parent, copies_of=number)
        with sibling as kept, system.editing_tree() as tree:
            tree.add(kept, parent)
        self.kept, self.parent = kept, parent

    def _summary(self, done: Change) -> str:
        if self.policy == "check":
            return f"snapshot {done.snapshot}: {len(done.upgraded)} packages could be upgraded"
        return done.summary()

    def _upgrade(self) -> Reply:
        """Upgrade the snapshot, and finish what an interrupted run did not deploy."""
        system, number, last = self.system, self.number, last_upgrade(self.system)
        problems = self._problems()
        interrupted = f"the upgrade of snapshot {number} was interrupted"
        record_upgrade(system, FAILED, interrupted)  # overwritten at the end
        try:
            done = self._change(number)
            if self.kept is not None:
                return self._finish(done, done.summary(), problems)
            done = done._replace(changed=False)  # only package lists were fetched
            up_to_date = f"snapshot {number} is up to date"
            if failure_of(system.layout, number):
                text = f"{up_to_date}; it did not start, so it is not deployed again until it changes"
                return changes_reply([done])._replace(text=text)
            if last and last["message"] == interrupted and not self._is_deployed():
                return self._finish(done, up_to_date, problems)
            return changes_reply([done])._replace(text=up_to_date)
        finally:
            if self.kept is not None and self._root_id() == self.original:  # nobody needs the copy
                system.with_reserve(partial(delete_snapshots, system, [self.kept]))

    def _is_deployed(self) -> bool:
        """Whether a deployment was made of the snapshot as it is now, be it the default or not."""
        deployed = {(one.snapshot, one.source) for one in self.system.menu().deployments.values()}
        return (self.number, self._root_id()) in deployed

    def _finish(self, done: Change, text: str, problems: set[str]) -> Reply:
        """Check and deploy the snapshot; undo the upgrade if either fails. `problems` were there before it."""
        system, number = self.system, self.number
        reply = changes_reply([done])
        data = dict(reply.data)
        with ExitStack() as undo:
            if self.kept is not None:
                undo.callback(system.with_reserve, partial(undo_change, system, number, just_changed=True), once=True)
                text += f"\n  its former state is snapshot {self.kept}"
                data |= {"from": number, "parent": self.parent, "copies": {str(number): self.kept}}
            if new := sorted(self._problems() - problems):
                raise AshError(f"fsck finds new problems: {'; '.join(new)}")
            if self.policy != "stage":
                deployment, is_new = deploy_or_undo(system, number, undo)
                text += f"\n{deployed_reply(system, deployment, is_new).text}"
                data["changed"] = data["changed"] or is_new
            undo.pop_all()
        return reply._replace(data=data, text=text)

    def _problems(self) -> set[str]:
        """The problems of the snapshot, and those that concern no particular one."""
        found = Fsck(self.system).run(only=self.number)
        return {one.text() for one in found if one.snapshot in (self.number, None)}


UPGRADE_SHAPE = {"failed": bool, "time": str, "message": str}


@command(
    "auto-upgrade", "autoup", "au", group=PACKAGES, usage="auto-upgrade [N]",
    help="upgrade, verify and deploy N, keeping the old state as a sibling; on failure nothing changes",
    changes=True, numbers=1, options=[STRICT],
    answer={**CHANGES_SHAPE, "from?": int, "parent?": int | None, "copies?": {"*": int}},
)  # fmt: skip
def cmd_auto_upgrade(system: System, request: Request) -> Plan:
    number = request.snapshot
    if request.dry_run:
        policy = AutoUpgrade(system, number).policy
        if policy != "none":
            system.require_changeable(number)
        yield would("do nothing" if policy == "none" else f"upgrade snapshot {number}, by the policy {policy}")
    system.wait = request.wait or NIGHTLY_WAIT
    with system.lock("auto-upgrade"):
        upgrading = None
        try:
            upgrading = AutoUpgrade(system, number, request.strict)
            if upgrading.policy == "none":
                text = "nothing to do: /etc/ash.conf has auto_upgrade::none"
                return Reply({"snapshot": number, "changed": False}, text)
            reply = upgrading.run()
        except (AshError, OSError) as error:
            unfinished = isinstance(error, CommittedButUnfinished)  # its message says what was done
            state = f"{upgrading.state()}: " if upgrading and not unfinished else ""
            with contextlib.suppress(OSError):  # nothing can be written: then it stays recorded as interrupted
                record_upgrade(system, FAILED, f"{state}{reason(error)}")
            raise
        without = f"; without some repositories: {listed(upgrading.missing)}" if upgrading.missing else ""
        doubt = f"; {upgrading.doubt}" if upgrading.doubt else ""
        record_upgrade(system, 0, f"{lines_of(reply.text)[0]}{without}{doubt}")
        return upgrading.reboot(reply)


@command(
    "check", group=PACKAGES, usage="check", help="show the result of the last automatic upgrade",
    answer={**UPGRADE_SHAPE, "fell_back_from": (FELL_BACK_SHAPE, None)},
)  # fmt: skip
def cmd_check(system: System, request: Request) -> Reply:
    last, failure = last_upgrade(system), fallback_of(system)
    back = f"\n{failure.text()}" if failure else ""
    data: dict[str, Any] = {"fell_back_from": fell_back_data(failure)}
    if last is None:
        text = "no automatic upgrade has run yet (ash auto-upgrade)"
        return Reply({"failed": False, "time": "", "message": text, **data}, text + back, status=FAILED if back else 0)
    text = f"the automatic upgrade of {last['time']} {RESULTS[last['failed']]}"
    text += f": {last['message']}" if last["message"] else ""
    return Reply({**last, **data}, text + back, status=FAILED if last["failed"] or back else 0)


# --- Comparing snapshots ---------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How two snapshots differ: in packages, and in paths that are "added", "removed" or "changed"."""

    packages: Change
    config: Mapping[str, str]  # paths of configuration files
    files: Mapping[str, str]  # paths of all files, if these were compared

    def data(self) -> dict[str, Any]:
        return {"packages": self.packages.packages(), "config": dict(self.config), "files": dict(self.files)}

    def text(self) -> str:
        """The difference for people."""
        signs = {"added": "+", "removed": "-", "changed": "^"}
        lines = lines_of(self.packages.summary())[1:]
        lines += [f"  {signs[kind]} /{one_line(path)}" for path, kind in sorted({**self.config, **self.files}.items())]
        return "\n".join(lines) or "no difference"


def compare(system: System, old: int, new: int, all_files: bool) -> Difference:
    """Compare two snapshots: versions of packages, configuration files and, with `all_files`, every path.

    Without root's privileges only the packages are compared, which is said.
    """
    roots = system.layout.rootfs(old), system.layout.rootfs(new)
    packages = Change.between(new, packages_of(system, old), packages_of(system, new))
    if not system.sees_snapshots:
        console.say("ash: only packages are compared: files of snapshots can be read by root alone")
        return Difference(packages, {}, {})
    listed = set().union(*map(system.package_manager.config_files, roots))
    with ExitStack() as stack:
        views = [stack.enter_context(readonly_view(system.layout, root)) for root in roots]
        paths = changed_paths(*views)
    config = {path: kind for path, kind in paths.items() if path in listed or path.startswith("etc/")}
    return Difference(packages, config, paths if all_files else {})


def patch(old: Path, new: Path, path: str) -> str:
    """The differences of a text file as `diff -u` prints them; a single line for a binary file."""
    import difflib

    texts = []
    for root in (old, new):
        file = root / path
        if not has_real_parents(root, path) or not os.path.lexists(file):
            texts.append("")
        elif file.is_symlink():  # the target is outside the snapshot, or is compared under its own path
            texts.append(f"symlink to {os.readlink(file)}\n")
        else:
            texts.append(read_text(file))
    path = one_line(path)
    if not "".join(texts).isascii() and any("\udc80" <= c <= "\udcff" or c == "\0" for c in "".join(texts)):
        return f"binary file /{path} differs\n"
    before, after = ([f"{line}\n" for line in lines_of(text)] for text in texts)
    return "".join(difflib.unified_diff(before, after, f"a/{path}", f"b/{path}"))


def drift_reply(system: System, request: Request) -> Reply:
    """The reply to `diff` without snapshots: what was changed in the running /etc."""
    found = running_etc(system)
    text = Difference(Change(0), {f"etc/{path}": kind for path, kind in found.drift.items()}, {}).text()
    if request.patch:
        text += "\n" + "".join(patch(found.base, found.etc, path) for path in found.drift)
    return Reply({"slot": "" if found.in_memory else found.slot, "drift": found.drift}, text)


@command(
    "diff", "dif", group=PACKAGES, usage="diff [A [B]] [--files] [--patch]",
    help="compare the packages and configuration of snapshots; without any, show what was changed in the running /etc",
    numbers=2, snapshot_optional=True, require=System.require, wants_disk=True,
    options=[
        flag("--files", help="list all files that differ"),
        flag("--patch", help="show the differences of text files"),
    ],
    answer={
        "from?": int, "to?": int, "packages?": PACKAGES_SHAPE, "config?": {"*": str}, "files?": {"*": str},
        "slot?": str, "drift?": {"*": str},
    },
)  # fmt: skip
def cmd_diff(system: System, request: Request) -> Reply:
    if not request.snapshots:
        return drift_reply(system, request)
    old, new = request.snapshots if len(request.snapshots) == 2 else (system.current, request.snapshot)
    if old is None:
        raise AshError("diff needs two snapshots: this system is not running", "ash diff A B", USAGE)
    system.require(old)
    system.require(new)
    if request.files or request.patch:
        require_root("comparing files")
    difference = compare(system, old, new, request.files)
    text = difference.text()
    if request.patch:
        roots = system.layout.rootfs(old), system.layout.rootfs(new)
        text += "\n" + "".join(patch(*roots, path) for path in sorted({**difference.config, **difference.files}))
    return Reply({"from": old, "to": new, **difference.data()}, text)


# --- A newer ash -----------------------------------------------------------------------------------------------

EXECUTABLE_LIMIT = 16 << 20  # bytes; ash has a fortieth of that
SIGNATURE_LIMIT = 64 << 10
ANSWER_SECONDS = 30  # timeout for the connection and for each part of the answer
FETCH_SECONDS = 600  # timeout for the whole download
RELEASE_SHAPE = {"ash": str, "distro": str}


def upself_url(system: System) -> str:
    """The URL of the newest ash, from the running /etc/ash.conf; on another system, from the last booted slot's."""
    url = system.configuration().values.get("upself", "")
    if not url:
        hint = "add a line upself::https://SERVER/ash; ash edit-conf N adds it to a snapshot's"
        raise AshError("/etc/ash.conf has no URL to fetch ash from", hint, USAGE)
    if not re.match(r"(https?|file)://", url):
        raise AshError(f"cannot fetch ash from {url}", "upself::URL takes https, http and file", USAGE)
    return url


def read_response(response: Any, limit: int) -> bytes:
    """Read a server's answer; OSError if it is cut off or too slow, AshError if it is larger than `limit` bytes."""
    give_up = time.monotonic() + FETCH_SECONDS
    content = bytearray()
    while part := response.read1(1 << 16):
        content += part
        if len(content) > limit:
            raise AshError(f"{response.url} is too large for ash: more than {limit >> 10} KiB", "nothing was changed")
        if time.monotonic() > give_up:
            raise TimeoutError("the download takes too long")
    whole = response.headers.get("Content-Length", str(len(content)))
    if whole != str(len(content)):
        raise OSError(f"the connection was cut off after {len(content)} of {whole} bytes")
    return bytes(content)


def download(url: str, limit: int) -> bytes:
    """Fetch a URL; AshError if it cannot be fetched, was cut off, or is larger than the limit in bytes."""
    import http.client
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response:  # noqa: S310 (see upself_url)
            return read_response(response, limit)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()).removeprefix("<urlopen error ").removesuffix(">")
        raise AshError(f"cannot fetch {url}: {reason or type(error).__name__}", "nothing was changed") from None


def fetch_signed(url: str, keyring: Path, directory: Path) -> Path:
    """Fetch a file and its signature (URL.sig) into a directory; AshError unless a key of the keyring signed it."""
    new, signature = directory / "ash", directory / "ash.sig"
    new.write_bytes(download(url, EXECUTABLE_LIMIT))
    signature.write_bytes(download(f"{url}.sig", SIGNATURE_LIMIT))
    strict = ["--status-fd", "1", "--weak-digest", "SHA1"]
    done = run(["gpgv", *strict, "--keyring", keyring, signature, new], check=False)
    # gpgv also accepts signatures by expired or revoked keys, but reports another word than GOODSIG.
    if done.returncode or not re.search(r"^\[GNUPG:\] GOODSIG ", done.stdout, re.MULTILINE):
        why = last_words(done.stderr.replace("gpgv: ", ""), 1)
        raise AshError(f"{url} is not signed by a key that this system trusts: {why}", "nothing was changed")
    return new


LAST_LINE = "    sys.exit(main())\n"  # of each executable


def run_executable(executable: Path, request: Request, *words: str) -> subprocess.CompletedProcess[str]:
    """Run another ash on the system of a request."""
    options = {"--root": request.root, "--image": request.image, "--distro": request.distro}
    where = [word for name, value in options.items() if value for word in (name, str(value))]
    return run(["sh", executable, *words, *where], check=False)


def check_starts(system: System, new: Path, request: Request) -> str:
    """Start a new executable, in a directory of its own, with the libraries that it would have. Returns its version.

    Raises:
        AshError: it does not start, or serves another distribution.
    """
    if not read_text(new).endswith(LAST_LINE):  # if it is cut off after a function, it starts all the same
        raise AshError("the new ash does not start: its end is missing", "nothing was changed")
    lib = new.with_name("lib")
    lib.mkdir()
    for library in [path for path in system.layout.lib.glob("[!_]*") if path.name != "ash.py"]:
        (lib / library.name).symlink_to(library)
    (lib / "ash.py").symlink_to("../ash")
    done = run_executable(new, request, "--json", "version", "--chroot")
    try:
        answer = from_json(done.stdout, RELEASE_SHAPE) if done.returncode == 0 else None
    except ValueError:
        answer = None
    if answer is None:
        words = last_words(done.stderr or done.stdout, 1) or f"it exited with status {done.returncode}"
        raise AshError(f"the new ash does not start: {words}", "nothing was changed")
    if answer["distro"] != system.layout.distro:
        hint = f"upself::URL must be that of an ash for {system.layout.distro}"
        raise AshError(f"the new ash is for {answer['distro']}", hint, REFUSED)
    return str(answer["ash"])


def version_in(text: str) -> str:
    """The version in the text of an executable; empty if it has none."""
    found = re.search(r'^ASH_VERSION = "([^"]*)"$', text, re.MULTILINE)
    return found[1] if found else ""


def version_order(version: str) -> list[int]:
    """The sort key of a version; an invalid one sorts first."""
    return [int(part) for part in version.split(".")] if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})*", version) else []


def swap_executable(layout: Layout) -> None:
    """Replace the executable, keeping a copy of the old one; at any time a complete executable is in place."""
    if layout.executable.is_file():
        write_file(layout.old_executable, read_text(layout.executable), mode=0o755)
        old, new = layout.executable.stat().st_mtime, layout.new_executable.stat().st_mtime
        # For who renames it back: Python tells stale bytecode by size and mtime, in seconds.
        os.utime(layout.old_executable, (old, old if int(old) != int(new) else old - 1))
    rename(layout.new_executable, layout.executable)
    sync_directory(layout.ash)
    # Python tells stale bytecode by mtime (in seconds) and size: it could take the old executable's for the new one's.
    compile_it = [sys.executable, "-I", "-m", "compileall", "-q", "-f", "-p", "/.snapshots/ash", "-s"]
    run([*compile_it, layout.ash, layout.lib / "ash.py"], check=False)


@command(
    "upself", "upme", "ash-update", "ast-sync", group=ITSELF, usage="upself [--download-only] [--force]",
    help="fetch the newest ash from the URL in /etc/ash.conf, verify its signature, and install it", changes=True,
    options=[
        flag("--download-only", "-d", "-t", help="do not install it, leave it as ash.new"),
        flag("-f", "--force", help="also install the same version again, or an older one"),
    ],
    answer={"changed": bool, "from": str, "to": str},
)  # fmt: skip
def cmd_upself(system: System, request: Request) -> Plan:
    import tempfile

    layout, url = system.layout, upself_url(system)
    if not layout.keyring.is_file():
        shown = f"/.snapshots/ash/{layout.keyring.name}"
        hint = f"gpg --export KEY > {shown}"
        raise AshError(f"there is no keyring to verify a newer ash with: {shown}", hint, REFUSED)
    what = "leave it as /.snapshots/ash/ash.new" if request.download_only else "replace /.snapshots/ash/ash"
    yield would(f"fetch {url} and {url}.sig, verify the signature and {what}")
    with system.lock("upself"), tempfile.TemporaryDirectory(dir=PRIVATE) as directory:
        with step(f"Fetching {url}"):
            new = fetch_signed(url, layout.keyring, Path(directory))
        with step("Testing whether it starts"):
            version = check_starts(system, new, request)
        was, text = read_text(layout.executable), read_text(new)
        here = version_in(was)
        if text == was or (version == here and not request.force):
            return Reply({"changed": False, "from": here, "to": version}, f"ash is up to date ({version})")
        if version_order(version) < version_order(here) and not request.force:
            hint = "--force installs it anyway"
            raise AshError(f"ash {version} at {url} is older than the installed {here}", hint, REFUSED)
        write_file(layout.new_executable, text, mode=0o755)
        changed = {"changed": True, "from": here, "to": version}
        if request.download_only:
            return Reply(changed, f"ash {version} is in /.snapshots/ash/ash.new")
        swap_executable(layout)
    renewed = run_executable(layout.executable, request, "recover")  # it may write another boot menu
    if renewed.returncode:
        console.warn(f"ash recover, which renews the boot menu, failed: {last_words(renewed.stderr)}")
    kept = "; the old one is /.snapshots/ash/ash.old" if was else ""
    return Reply(changed, f"ash is now {version}, was {here or 'damaged'}{kept}")


# --- Status, version, help -------------------------------------------------------------------------------------


def interrupted_sessions(system: System) -> list[int]:
    """The snapshots with a session that a hangup interrupted; PermissionError unless called by root."""
    found = []
    for number, directory in numbered(system.layout.work(""), "").items():
        with contextlib.suppress(AshError):  # damaged: fsck reports it
            if isinstance(load_intent(directory), Kept):
                found.append(number)
    return found


def fallback_text(menu: Menu, left: int | None, *, is_damaged: bool = False) -> str:
    """What happens if the deployment on trial does not start.

    Args:
        menu: the boot menu.
        left: how often GRUB still starts it, if known.
        is_damaged: GRUB's notes do not count its starts.
    """
    default, good = menu.deployments[menu.default], menu.fallback
    back = f"snapshot {good.snapshot} ({good.slot})" if good else "nothing"
    if left == 0:
        return f"GRUB goes back to {back} at the next boot: it has no try left"
    if is_damaged:
        return f"GRUB goes back to {back}, and does so at the next boot: its notes are damaged (ash fsck --repair)"
    number = default.tries if left is None else left
    tries = "1 try" if number == 1 else f"{number} tries"
    more = "" if number == default.tries else " more"
    minutes = "1 minute" if default.minutes == 1 else f"{default.minutes} minutes"
    return f"GRUB goes back to {back} after {tries.replace(' ', f'{more} ')} of {minutes}"


def next_text(default: Deployment | None, once: Deployment | None) -> str:
    """What boots next, for a reader."""
    then = f"snapshot {default.snapshot} ({default.slot})" if default else "nothing is deployed"
    return f"snapshot {once.snapshot} ({once.slot}), once; then {then}" if once else then


def booted_text(booted: int | str | None, snapshot: int | None) -> str:
    """What runs, for a reader: a deployment, or a snapshot as it is."""
    if isinstance(booted, int):
        return f"snapshot {booted}, as it is: changes of /etc are lost at the next boot (ash deploy {booted} keeps it)"
    return "nothing of this system" if snapshot is None else f"snapshot {snapshot} ({booted})"


@command(
    "status", group=BOOT, usage="status", help="show what is booted, what boots next, and what is running",
    answer={
        "booted": {"snapshot": int | None, "slot": str | int | None},
        "next": {"snapshot": int | None, "slot": str | None, "id": str | None}, "once": bool,
        "secondary": [{"snapshot": int, "slot": str}],
        "last_booted": str, "running": {"*": str}, "waiting": ([int], None), "unmerged": [str],
        "fell_back_from": (FELL_BACK_SHAPE, None), "on_trial": bool, "tries_left": int | None, "fallback": bool,
        "drift": ({"*": str}, None), "only_there": ([{"slot": str, "snapshot": int, "paths": [str]}], None),
        "upgrade?": UPGRADE_SHAPE, "free_bytes": int, "size_bytes": int, "copies": ([str], None),
    },
)  # fmt: skip
def cmd_status(system: System, request: Request) -> Reply:
    menu, current, booted = system.menu(), system.current, system.booted
    trials = trials_of(system)
    default, once = menu.deployments.get(menu.default), trials.next_once(menu)
    secondary = [one for slot, one in menu.deployments.items() if slot in SECONDARY_SLOTS]
    work = [path for path in sorted(system.layout.work("").iterdir()) if (path / "intent").exists()]
    running = {path.name: holder_of(path / "lock") for path in work if is_held(path / "lock")}
    unmerged, upgraded = unmerged_directories(system.layout), last_upgrade(system)
    failure, has_fallback, is_root = fallback_of(system), trials.notes.counts, system.sees_snapshots
    trial = menu.on_trial if has_fallback else None
    left = trials.left(trial) if trial and is_root else None
    then = trials.next_default(menu)
    back = fallback_text(menu, left, is_damaged=left is None and then is not default) if trial else ""
    disk = os.statvfs(system.layout.snapshots)
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    # None: unknown, since only root may see it.
    waiting = interrupted_sessions(system) if is_root else None
    copies = system.copies_of_disk() if is_root or UDEV_RECORDS.is_dir() else None
    drift: Mapping[str, str] | None = None
    only_there: list[dict[str, Any]] | None = None
    with contextlib.suppress(AshError):
        if is_root:
            found = running_etc(system)
            drift = found.drift
            only_there = only_in_deployments(system.layout, menu, found.slot)
    data = {
        "booted": {"snapshot": current, "slot": booted},
        "next": {key: getattr(once or then, key, None) for key in ("snapshot", "slot", "id")}, "once": bool(once),
        "secondary": [{"snapshot": one.snapshot, "slot": one.slot} for one in secondary],
        "last_booted": menu.last_booted, "running": running, "waiting": waiting, "unmerged": unmerged,
        "fell_back_from": fell_back_data(failure), "on_trial": bool(trial), "tries_left": left,
        "fallback": has_fallback, "drift": drift, "only_there": only_there,
        **({"upgrade": upgraded} if upgraded else {}), "free_bytes": free, "size_bytes": size, "copies": copies,
    }  # fmt: skip
    unknown = "nothing to compare with" if is_root else "only root can see it"
    shown = unknown if drift is None else f"{len(drift)} path{'s' * (len(drift) > 1)} (ash diff)" if drift else "none"
    lines = [
        f"booted:       {booted_text(booted, current)}",
        f"next boot:    {next_text(then, once)}",
        *([f"on trial:     if snapshot {trial.snapshot} does not start, {back}"] if trial else []),
        *([f"went back:    {failure.text()}"] if failure else []),
        *([] if has_fallback else ["fallback:     not automatic: GRUB has no partition that it can write to"]),
        *(f"secondary:    snapshot {one.snapshot} ({one.slot})" for one in secondary),
        *(
            f"running:      {'snapshot ' if number.isdecimal() else ''}{number}: {one_line(holder)}"
            for number, holder in running.items()
        ),
        *(f"interrupted:  snapshot {number}: ash chroot {number} --resume" for number in waiting or ()),
        *(f"not in /var:  what is in {path}" for path in unmerged),
        *([f"last upgrade: {upgraded['time']}: {RESULTS[upgraded['failed']]} (ash check)"] if upgraded else []),
        f"free space:   {free / 2**30:.1f} of {size / 2**30:.1f} GiB",
        f"/etc drift:   {shown}",
        *(
            f"only there:   changes of /etc in {one['slot']} (snapshot {one['snapshot']}): "
            + counted(one["paths"], MOST_NAMED)
            for one in only_there or ()
        ),
        *(f"warning:      {device} is a copy of this disk, with the same UUID (ash fsck)" for device in copies or ()),
    ]
    return Reply(data, "\n".join(lines))


@command(
    "version", group=ITSELF, usage="version", help="print the version and the distribution", needs_system=False,
    answer=RELEASE_SHAPE,
)  # fmt: skip
def cmd_version(request: Request) -> Reply:
    try:
        distro = System.open(request, changes=False).layout.distro
    except AshError:  # no system runs here, as when the executable is built
        if request.root or request.image:
            raise
        distro = list(Distro.registry)[-1] if Distro.registry else "no distribution"
    return Reply({"ash": ASH_VERSION, "distro": distro}, f"ash {ASH_VERSION} ({distro})", ASH_VERSION)


HELP_WIDTH, HELP_INDENT = 80, 28  # of a console


def help_table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a console's width: a term, and beside it, or below a long one, its explanation."""
    import textwrap

    lines = []
    for term, explanation in rows:
        first, *more = textwrap.wrap(explanation, HELP_WIDTH - HELP_INDENT, break_on_hyphens=False)
        fits = len(term) + 4 <= HELP_INDENT
        lines += [f"  {term:{HELP_INDENT - 2}}{first}"] if fits else [f"  {term}", f"{'':{HELP_INDENT}}{first}"]
        lines += [f"{'':{HELP_INDENT}}{line}" for line in more]
    return lines


def overview() -> str:
    """The help without a command."""
    lines = ["ash keeps the system as a tree of read-only snapshots.", ""]
    lines += ["usage: ash [OPTIONS] COMMAND [SNAPSHOT] ..."]
    for group in GROUPS:
        lines += ["", f"{group}:", *help_table((c.usage, c.help) for c in commands_of(group))]
    lines += ["", "Options of every command:", *help_table((o.usage(), o.help) for o in GLOBAL_OPTIONS)]
    lines += ["", "Without SNAPSHOT, a command works on the booted one.", "`ash help COMMAND` explains a command."]
    return "\n".join(lines)


def explain(command: Command) -> str:
    """The help of one command."""
    import textwrap

    also = [f"also: {', '.join(command.aliases)}"] if command.aliases else []
    options = [(option.usage(), option.help) for option in (*command.all_options(), *GLOBAL_OPTIONS)]
    text = textwrap.fill(command.help, HELP_WIDTH)
    lines = [f"usage: ash {command.usage}", *also, "", text, "", "options:", *help_table(options)]
    return "\n".join(lines)


def shape_for_people(shape: Any) -> Any:
    """A shape in words, for JSON: the names of the types that a value may have."""
    if isinstance(shape, Mapping):
        return {key: shape_for_people(one) for key, one in shape.items()}
    if isinstance(shape, tuple):
        return {"one of": [shape_for_people(one) for one in shape]}
    if isinstance(shape, list):
        return [shape_for_people(one) for one in shape]
    names = {None: "null", type(None): "null", object: "any"}
    kinds = shape.__args__ if isinstance(shape, UnionType) else (shape,)
    return " ".join(names.get(kind, kind.__name__) for kind in kinds)


HELP_FORMATS = ("text", "markdown", "json", "man", "bash", "zsh", "fish")


def rendered_help(kind: str) -> str:
    """The man page, completions or README table: as they were installed, or made by a checkout's installer."""
    import importlib

    path = HERE / "help" / kind
    if path.is_file():
        return read_text(path).rstrip("\n")
    sys.path.insert(0, str(HERE))
    try:
        text: str = importlib.import_module("installer.help").FORMATS[kind]()
    except ModuleNotFoundError:
        raise AshError(f"this ash has no help in the format {kind}", "a checkout of ash has it", MISSING) from None
    return text


def help_format(text: str) -> str:
    """Read the name of a help format; ValueError if it is none."""
    return HELP_FORMATS[HELP_FORMATS.index(text)]


@command(
    "help", group=ITSELF, usage="help [COMMAND]", help="print this help, or explain a command",
    needs_system=False, words="words",
    options=[
        Option(
            ("--format",), "print the whole reference: README table, JSON shapes, man page, or completions of a shell",
            "|".join(HELP_FORMATS), read=help_format,
        )
    ],
)  # fmt: skip
def cmd_help(request: Request) -> Reply:
    if request.format == "json":
        answers = {command.name: command.answer for command in COMMANDS if command.answer is not None}
        shapes = {"answers": answers, "error": ERROR_SHAPE, "dry_run": DRY_RUN_SHAPE}
        return Reply({}, json.dumps(shape_for_people(shapes), indent=2))
    if request.format != "text":
        return Reply({}, rendered_help(request.format))
    return Reply({}, explain(find_command(request.words[0])) if request.words else overview())


if __name__ == "__main__":
    sys.exit(main())
