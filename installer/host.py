# SPDX-License-Identifier: AGPL-3.0-or-later
"""The machine that builds a system: its privileges, packages, disk space and kernel, and the log of a build."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ash import (
    FIRMWARE,
    LOCKED,
    REFUSED,
    USAGE,
    AshError,
    Chroot,
    clean_environment,
    last_words,
    path_inside,
    run,
    step,
    write_text,
)

# Required programs (by name) or files (by path), with the packages of Debian and Ubuntu that have them.
Tools = Mapping[str, str]

DISK: Tools = {
    "mount": "mount",
    "sfdisk": "fdisk",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
}
UEFI: Tools = {"efibootmgr": "efibootmgr"}
QEMU: Tools = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "/usr/share/OVMF/OVMF_CODE_4M.fd": "ovmf",
}

KEYRING_PACKAGE = "debian-archive-keyring"
APT_INSTALL = ("apt-get", "install", "--yes", "--no-install-recommends")

# In messages of apt.
UNREACHABLE = re.compile(r"Could not (?:resolve|connect)|Temporary failure|Connection|Unable to connect|unreachable")

NOTHING_LEFT = 32 * 2**20  # bytes; with less than this a disk is called full

# Prefix of a command: it is killed when this process dies, its children are killed with it, and its mounts vanish.
CONTAINED = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
)


def require_root(purpose: str) -> None:
    """Raise AshError unless run as root."""
    if os.geteuid() != 0:
        raise AshError(f"only root can {purpose}", hint="run this with sudo, or as root", status=REFUSED)


def require(tools: Tools) -> None:
    """Install missing tools with the host's package manager, and say which."""
    packages = missing_packages(tools)
    if not packages:
        return
    if shutil.which("apt-get") is None:
        missing = ", ".join(tool for tool in tools if not _have(tool))
        raise AshError(f"this machine lacks {missing}", hint="install that, then try again")
    require_root(f"install {' '.join(packages)} on this machine")
    with step(f"Installing on this machine: {' '.join(packages)}"):
        _apt_install(packages)


def missing_packages(tools: Tools) -> list[str]:
    """The packages of the tools that this machine lacks."""
    return sorted({package for tool, package in tools.items() if not _have(tool)})


def disk_tools() -> Tools:
    """The tools to work on disks of this machine; with UEFI, on the firmware's boot menu too."""
    return {**DISK, **(UEFI if FIRMWARE.is_dir() else {})}


def _have(tool: str) -> bool:
    return Path(tool).exists() if tool.startswith("/") else shutil.which(tool) is not None


class SignatureError(AshError):
    """The signature of a repository cannot be verified."""

    # In the output of apt: with gpgv, with sqv (since apt 3.0), and of all versions.
    PATTERN = re.compile(r"NO_PUBKEY|EXPKEYSIG|KEYEXPIRED|Missing key|signature verification failed|is not signed")

    @classmethod
    def of(cls, output: str) -> Self | None:
        """The error in an output of apt; None if it is not about signatures."""
        line = first_line(cls.PATTERN, output)
        hint = f"install a newer {KEYRING_PACKAGE}, or set the clock if it is wrong"
        return cls(f"a repository's signature cannot be verified: {line}", hint) if line else None


def _apt_install(packages: Sequence[str]) -> None:
    """Install packages on the host; the package lists are refreshed only if the download fails."""
    download = [*APT_INSTALL, "--download-only", *packages]
    try:
        if _apt(download, check=False).returncode:
            update = _apt(["apt-get", "update"], check=False)
            again = _apt(download, check=False)
            if again.returncode:
                raise _download_error(update.stderr, again.stderr)
        with _undisturbed():
            _apt([*APT_INSTALL, "--no-download", *packages])
    except SignatureError:
        raise
    except AshError as error:
        hint = error.hint or f"try `apt-get install {' '.join(packages)}` on this machine"
        raise AshError(f"cannot install packages on this machine: {error}", hint) from error


def _download_error(update: str, download: str) -> AshError:
    """Why a download failed, from the messages of apt on it and on the refresh of the package lists before it."""
    if error := SignatureError.of(update):
        return error
    if line := first_line(UNREACHABLE, update):  # apt goes on then, as if it had succeeded
        return AshError(f"its repository cannot be reached: {line}", "check the network connection")
    return AshError(last_words(download or update))


def first_line(pattern: re.Pattern[str], output: str) -> str:
    """The first line of a program's output that matches; empty if none does."""
    return next((line.strip() for line in output.splitlines() if pattern.search(line)), "")


def _apt(argv: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run apt without questions, in a language that can be parsed."""
    environment = {**clean_environment(), "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    return run(argv, env=environment, check=check)


def renew_keyring() -> None:
    """Install the newest keys of Debian, from repositories of this machine that apt can verify.

    Raises:
        AshError: it failed, such as because no repository can be verified.
    """
    _apt(["apt-get", "update"], check=False)  # those that can be verified
    _apt_install([KEYRING_PACKAGE])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Block termination signals: an interrupted package manager leaves half-installed packages."""
    waiting = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)


def require_btrfs() -> None:
    """Raise AshError if the host's kernel cannot mount btrfs."""
    if "btrfs" in Path("/proc/filesystems").read_text().split():
        return
    if shutil.which("modprobe") is not None and run(["modprobe", "btrfs"], check=False).returncode == 0:
        return
    raise AshError("this machine's kernel has no btrfs", hint="use another kernel, or a virtual machine")


def has_serial_console() -> bool:
    """Whether the kernel of this machine has its console on a serial port."""
    return re.search(r"\bconsole=ttyS", Path("/proc/cmdline").read_text()) is not None


def require_new_file(path: Path, force: bool) -> None:
    """Raise AshError if a file cannot be created, or exists already and `force` is not given."""
    if Path("/dev") in path.resolve().parents or (path.exists() and not path.is_file()):
        raise AshError(f"{path} is not a regular file", hint="name a file to create", status=USAGE)
    if path.exists() and not force:
        raise AshError(f"{path} exists already", hint="--force replaces it", status=REFUSED)
    if not path.parent.is_dir():
        raise AshError(f"there is no directory {path.parent}", status=USAGE)
    if not _writable(path.parent):
        raise AshError(f"{path.parent} cannot be written to")


def _writable(directory: Path) -> bool:
    """Whether files can be created in a directory; root always has permission, but not on a read-only file system."""
    return os.access(directory, os.W_OK) and not os.statvfs(directory).f_flag & os.ST_RDONLY


def require_space(directory: Path, needed: int, name: str = "") -> None:
    """Raise AshError if fewer than `needed` bytes are free on a directory's file system; `name` is what to call it."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise AshError(
            f"{name or directory} has {gibibytes(free)} free, and {gibibytes(needed)} are needed",
            hint="free some space, or use another disk",
            status=REFUSED,
        )


def require_detached(image: Path) -> None:
    """Raise AshError (LOCKED) if a part of an image is a loop device: another ash, or an installer, works on it."""
    if run(["losetup", "--noheadings", "--list", "--output", "NAME", "--associated", image]).stdout.strip():
        raise AshError(f"another program works on {image}", "wait until it has ended", LOCKED)


def put(root: Path, path: str, text: str) -> None:
    """Write a file of a new root, and its directories; symlinks are followed as a program in that root would."""
    place = path_inside(root, path)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, text)


@contextmanager
def watched_space(directory: Path) -> Iterator[None]:
    """Report a full disk instead of the errors that it causes in the block."""
    try:
        yield
    except (AshError, OSError) as error:
        if shutil.disk_usage(directory).free > NOTHING_LEFT:
            raise
        raise AshError(f"the disk of {directory} is full", "free some space, or use another disk") from error


def gibibytes(size: int) -> str:
    """Format a number of bytes, such as "1.5 GiB"."""
    return f"{size / 2**30:.1f} GiB"


def user_owned(path: Path) -> None:
    """Make the user who called sudo the owner of a file."""
    if "SUDO_UID" in os.environ and "SUDO_GID" in os.environ:
        os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))


class Log:
    """The output of the programs of a build, in a file beside the result; it is kept when the build fails."""

    def __init__(self, path: Path) -> None:
        """Create or truncate the log; it is its owner's alone, as it has the command lines of all programs.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)  # an older ash made it readable by everyone
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        user_owned(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.write(f"failed: {error}")
        if isinstance(error, AshError) and not error.hint:
            error.hint = f"the full log is {self.path}"
        self._file.close()

    def write(self, text: str) -> None:
        """Add lines of text."""
        self._file.write(f"{text.rstrip()}\n".encode())

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Report a step of the build on the terminal and in the log."""
        self.write(f"== {text}")
        with step(text):
            yield

    def run(self, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        """Run a program of the host; its children and mounts do not outlive it or this process.

        Args:
            argv: the program and its arguments.
            env: added to the cleaned environment.

        Raises:
            AshError: it failed; the message has its last lines.
        """
        begin = self._command(argv)
        with subprocess.Popen(
            [*CONTAINED, *argv],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**clean_environment(), **(env or {})},
        ) as process:
            try:
                status = process.wait()
            except BaseException:
                process.kill()
                raise
        self._require_success(argv, status, begin)

    def run_inside(self, root: Path, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Like run(), but chrooted in the root of a new system."""
        begin = self._command(argv)
        status = Chroot(root, env or {}, resolver=False).run(argv, hear=self._hear)
        self._require_success(argv, status, begin)

    def _hear(self, output: bytes) -> None:
        self._file.write(output)

    def _command(self, argv: Sequence[str | Path]) -> int:
        """Log the command line. Returns the offset at which its output will begin."""
        self.write(f"$ {' '.join(map(str, argv))}")
        return self._file.tell()

    def _require_success(self, argv: Sequence[str | Path], status: int, begin: int) -> None:
        if status:
            with self.path.open("rb") as file:
                file.seek(begin)
                output = file.read().decode(errors="replace")
            raise AshError(f"{argv[0]} failed ({status}): {last_words(output)}")
