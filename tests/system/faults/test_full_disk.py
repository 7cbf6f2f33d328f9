# SPDX-License-Identifier: AGPL-3.0-or-later
"""A full disk: a change is refused or dropped as a whole; reading and deleting always work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import FAILED, OURS_IN_RUN, REFUSED
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]

MIB = 1 << 20


@contextmanager
def room(system: System, mib: int) -> Iterator[None]:
    """Fill the disk except for some MiB in the block."""
    filler = system.files.top / "filler"  # a transaction takes a snapshot of /home, which would keep the space
    with filler.open("wb") as file:
        taken, piece = 0, 1 << 36
        while (more := free(system) - mib * MIB) > 4 * MIB and piece > MIB:
            piece = min(piece, more)
            try:
                os.posix_fallocate(file.fileno(), taken, piece)
                taken += piece
            except OSError:  # btrfs reports space as free that it cannot give to files, as it keeps metadata twice
                piece //= 2
            os.sync()
    try:
        yield
    finally:
        filler.unlink()
        os.sync()


def free(system: System) -> int:
    disk = os.statvfs(system.files.top)
    return disk.f_bavail * disk.f_frsize


def test_too_little_space_is_refused_with_figures(system: System, snapshot: int) -> None:
    with room(system, 200), system.nothing_changes():
        error = system.ash("install", snapshot, "hello", status=REFUSED).error
        assert "too little free space" in error
        assert "MiB" in error
        assert "ash del N" in error
        assert "too little" in system.ash("run", snapshot, "true", status=OURS_IN_RUN).error
    system.shell(snapshot, "touch /etc/mark")


def test_a_transaction_that_fills_the_disk_changes_nothing(system: System, snapshot: int) -> None:
    with room(system, 400):
        with system.nothing_changes():
            system.shell(snapshot, "head -c 2G /dev/urandom > /usr/filler", status=FAILED)
        assert free(system) > 256 * MIB, "programs that run have no room"
        system.shell(snapshot, "true")
    assert not system.remains()
    system.shell(snapshot, "touch /etc/mark")


def test_a_transaction_that_fills_var_changes_nothing(system: System, snapshot: int) -> None:
    with room(system, 400), system.nothing_changes():
        system.shell(snapshot, "head -c 2G /dev/urandom > /var/lib/filler", status=FAILED)
    assert not system.remains()


def test_a_package_that_does_not_fit_changes_nothing(system: System, snapshot: int) -> None:
    system.ash("install", system.clone(), "hello")  # fetches the package lists
    with room(system, 300):
        before = system.id_of(snapshot)
        assert "too little space" in system.ash("install", snapshot, "gcc", status=REFUSED).error
        assert system.id_of(snapshot) == before
    assert not system.remains()


def test_a_machine_that_had_no_transaction_has_the_reserve_too(system: System, snapshot: int) -> None:
    reserve = system.files.state / "reserve"
    for words in (("clone", 0), ("deploy", snapshot)):
        reserve.unlink(missing_ok=True)
        system.ash(*words)
        assert reserve.exists(), words


def test_reading_and_deleting_work_on_a_full_disk_and_it_boots(system: System, snapshot: int) -> None:
    with room(system, 0):
        system.ash("tree")
        system.ash("--json", "list", 0)
        system.boots()
        system.ash("-y", "del", snapshot)
        assert snapshot not in system.files.tree()
    system.boots()
    system.is_sound()
    number = system.clone()
    system.ash("deploy", number)
    system.boots()
