# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures for tests on a real file system: a system for each module, a fresh snapshot for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ash import CLONE_NEWNS, MS_REC, MS_SLAVE, libc, mount
from tests.archive import Archive
from tests.support import program
from tests.system.disk_system import Machine, System, open_system


@pytest.fixture(scope="session", autouse=True)
def _own_mounts() -> None:
    """A private mount namespace: no other program on this machine keeps our disks mounted."""
    libc("unshare", CLONE_NEWNS)
    mount("none", Path("/"), flags=MS_REC | MS_SLAVE)


@pytest.fixture(scope="session")
def reflinks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a btrfs of its own, where reflink copies of disk images cost nothing; shared by all modules."""
    directory = tmp_path_factory.mktemp("reflinks")
    disk, top = directory / "disk", directory / "top"
    top.mkdir()
    with disk.open("wb") as file:
        file.truncate(1 << 36)
    program("mkfs.btrfs", "--quiet", disk)
    program("mount", "-o", "loop,nobarrier", disk, top)  # it need not survive a power cut
    try:
        yield top
    finally:
        program("umount", top)
        disk.unlink()


@pytest.fixture(scope="module")
def system(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system that all tests of a module share."""
    with open_system(image, tmp_path_factory.mktemp("system")) as system:
        yield system


@pytest.fixture
def snapshot(system: System) -> int:
    """The number of a fresh clone of the base."""
    return system.clone()


@pytest.fixture
def machine(system: System, snapshot: int) -> Machine:
    """A system whose booted deployment is of the test's snapshot."""
    system.ash("deploy", snapshot, "--fresh-etc")
    machine = Machine(system)
    machine.boot()
    machine.forget_people()
    return machine


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """An empty package repository that all tests of a module share."""
    return Archive(tmp_path_factory.mktemp("archive") / "files")


@pytest.fixture(scope="module")
def url(archive: Archive) -> Iterator[str]:
    """The URL of that repository."""
    with archive.served() as url:
        yield url
