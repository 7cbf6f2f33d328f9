# SPDX-License-Identifier: AGPL-3.0-or-later
"""Prepares this machine, a live system, for an installation onto one of its disks: clock, memory, room and keyring.

Package lists are only refreshed when a download fails, and the keyring is only renewed when a signature fails: that
takes long.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Self

from ash import REFUSED, AshError, run, step
from installer import host
from installer.distribution import Identity, Settings, Source
from installer.install import Installation

MIB = 2**20
OLDEST = datetime(2026, 8, 1, tzinfo=UTC)  # this installer is newer
TOLERANCE = timedelta(hours=1)  # repositories are signed several times a day; a clock of local time is wrong by more
SYNCHRONISING = 20  # seconds; a reachable server answers within a few

# A bootstrap takes 300 MiB, measured, and compressing the initramfs takes as much again. A live system keeps what is
# written in memory, too.
LEAST_MEMORY, ENOUGH_MEMORY = 512 * MIB, 1024 * MIB
# Packages of the tools, unpacked; these packages, and package lists with what apt makes of them; the lists of the new
# system, which are 57 MiB for a stable release.
TOOLS_ROOM, LISTS_ROOM, SCRATCH_ROOM = 64 * MIB, 192 * MIB, 128 * MIB


class PreparedInstallation(Installation):
    """An installation that prepares this machine before it needs anything of it.

    Args:
        source, settings, identity: as of Installation.
        changes: whether the clock and the keyring may be changed.
    """

    def __init__(self, source: Source, settings: Settings, identity: Identity, *, changes: bool) -> None:
        super().__init__(source, settings, identity)
        self._changes = changes
        self._is_prepared = False

    def require(self, tools: host.Tools) -> None:
        """Prepare this machine, then install missing tools; see Installation.require()."""
        self._prepare(tools)
        self._with_keyring(lambda: super(PreparedInstallation, self).require(tools))

    def check(self, tools: host.Tools) -> None:
        """Prepare this machine, then check all but the place; see Installation.check()."""
        self._prepare(self.needed(tools))
        self._with_keyring(lambda: super(PreparedInstallation, self).check(tools))

    def _prepare(self, tools: host.Tools) -> None:
        """Check this machine, once. AshError if an installation would fail there."""
        if self._is_prepared:
            return
        missing, bootstraps = host.missing_packages(tools), self.source.rootfs is None
        _require_memory()
        _require_room(_needed_room(tools=bool(missing), bootstraps=bootstraps))
        needs_repository = bool(missing) or bootstraps
        ask = self._repository_time if needs_repository else _nobody
        _check_clock(ask, may_set=self._changes, signatures=needs_repository)
        self._is_prepared = True

    def _repository_time(self) -> datetime | None:
        return self.installer.repository_time(self.source)

    def _with_keyring(self, work: Callable[[], None]) -> None:
        """Do some work; if a signature fails, renew this machine's keyring, and do it again."""
        try:
            work()
        except host.SignatureError as error:
            if not self._changes:
                raise
            print(f"init.py: {error}", file=sys.stderr)
            with step(f"Renewing {host.KEYRING_PACKAGE} on this machine"):
                host.renew_keyring()
            work()


def report() -> str:
    """What there is now, for people."""
    memory = available_memory(Path("/proc/meminfo").read_text())
    return f"this machine is ready: it has the tools, and {host.gibibytes(memory)} of memory for an installation"


def _nobody() -> None:
    """The time that nobody says."""


def available_memory(meminfo: str) -> int:
    """The bytes that programs can use, swap included, from /proc/meminfo."""
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in meminfo.splitlines())}
    return (kilobytes["MemAvailable"] + kilobytes["SwapFree"]) * 1024


def _require_memory() -> None:
    memory = available_memory(Path("/proc/meminfo").read_text())
    if problem := memory_problem(memory):
        print(f"init.py: {problem}", file=sys.stderr)


def memory_problem(memory: int) -> str:
    """A warning if there are so few bytes of memory that an installation may fail; AshError if it would fail."""
    has = f"only {memory // MIB} MiB of memory are available"
    if memory < LEAST_MEMORY:
        what = f"{has}, and an installation needs {LEAST_MEMORY // MIB} MiB"
        raise AshError(what, "stop other programs, or add swap space with swapon", REFUSED)
    return f"{has}: the installation is slow, and may fail" if memory < ENOUGH_MEMORY else ""


def _needed_room(*, tools: bool, bootstraps: bool) -> dict[Path, int]:
    """The bytes that are needed below some directories.

    Args:
        tools: whether tools are installed.
        bootstraps: whether a root is bootstrapped.
    """
    needed = {Path("/usr"): TOOLS_ROOM, Path("/var"): LISTS_ROOM} if tools else {}
    return {**needed, **({Path(tempfile.gettempdir()): SCRATCH_ROOM} if bootstraps else {})}


class Room(NamedTuple):
    """The free bytes of the file system with a number."""

    device: int
    free: int

    @classmethod
    def of(cls, directory: Path) -> Self:
        """That of a directory."""
        return cls(directory.stat().st_dev, shutil.disk_usage(directory).free)


def _require_room(needed: Mapping[Path, int]) -> None:
    if problem := room_problem(needed, {directory: Room.of(directory) for directory in needed}):
        hint = "free some space there; a live system keeps it in memory, so a machine with more memory has more"
        raise AshError(problem, hint, REFUSED)


def room_problem(needed: Mapping[Path, int], rooms: Mapping[Path, Room]) -> str:
    """What is too small; empty if all is large enough. Directories on the same file system need their sum.

    Args:
        needed: bytes, by directory.
        rooms: those that there are.
    """
    for room in dict.fromkeys(rooms.values()):
        directories = [directory for directory in needed if rooms[directory].device == room.device]
        total = sum(needed[directory] for directory in directories)
        if room.free < total:
            where = " and ".join(map(str, directories))
            return f"{room.free // MIB} MiB are free in {where}, and tools and package lists need {total // MIB} MiB"
    return ""


def clock_problem(now: datetime, there: datetime | None) -> str:
    """What is wrong with a clock; empty if nothing is known to be.

    Args:
        now: what it says.
        there: what the repository says; None if that is not known.
    """
    says = f"this machine's clock says {_minute(now)} UTC"
    if there is not None:
        return f"{says}, and the repository's {_minute(there)} UTC" if abs(now - there) > TOLERANCE else ""
    return f"{says}, but this installer is newer" if now < OLDEST else ""


def _minute(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def _check_clock(ask: Callable[[], datetime | None], *, may_set: bool, signatures: bool) -> None:
    """Check the clock; one that is wrong is set by the machine's own synchronisation.

    Args:
        ask: what time it is for the repository.
        may_set: whether the clock may be changed.
        signatures: whether some will be checked: with a wrong clock they are not valid.

    Raises:
        AshError: it is wrong, and there are signatures to check.
    """
    there = ask()
    problem = clock_problem(datetime.now(UTC), there)
    if problem and may_set and _synchronise():
        there = ask()
        problem = clock_problem(datetime.now(UTC), there)
    if not problem:
        return
    right = _minute(there) if there else "YYYY-MM-DD hh:mm"
    hint = f"set it: date --utc --set '{right}'"
    if signatures:
        raise AshError(f"{problem}: signatures of packages are not valid then", hint, REFUSED)
    print(f"init.py: {problem}; {hint}", file=sys.stderr)


def _synchronise() -> bool:
    """Have the machine set its clock by the network. Returns whether it has done so."""
    if shutil.which("timedatectl") is None or run(["timedatectl", "set-ntp", "true"], check=False).returncode:
        return False
    with step("Waiting until this machine has set its clock by the network"):
        give_up = time.monotonic() + SYNCHRONISING
        while time.monotonic() < give_up:
            if run(["timedatectl", "show", "--property=NTPSynchronized", "--value"], check=False).stdout == "yes\n":
                return True
            time.sleep(1)
    return False
