# SPDX-License-Identifier: AGPL-3.0-or-later
"""/var while real programs write to it: databases in use, growing logs, siblings, upgrades, purges."""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import make_deb, wait_until
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]

# Inserts rows into a database in WAL mode until it is killed.
WRITER = """\
import sqlite3, sys
with sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60) as db:
    db.execute("pragma journal_mode = wal")
    db.execute("create table if not exists t (x integer primary key, y)")
    for x in range(1000000):
        db.execute("insert into t (y) values (?)", ("row" * 50,))
        if x == 200:
            print("goes on", flush=True)
"""


@contextlib.contextmanager
def writing(script: str, *argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a Python script, from its first line of output to the end of the block."""
    process = subprocess.Popen([sys.executable, "-c", script, *argv], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline()
        yield process
        assert process.poll() is None, "it must run until it is killed"
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def rows(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as db:
        count: int = db.execute("select count(*) from t").fetchone()[0]
    return count


def conflicts(system: System, snapshot: int) -> list[Path]:
    """The conflicts directories of a snapshot."""
    return sorted((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*"))


@pytest.mark.parametrize("kind", ["rewrites it", "deletes it", "replaces its directory"])
def test_a_running_sqlite_keeps_committing(system: System, snapshot: int, kind: str) -> None:
    name = kind.split(maxsplit=1)[0]
    directory = system.files.var / f"lib/{name}"
    directory.mkdir()
    script = {
        "rewrites": "import sqlite3; db = sqlite3.connect('/var/lib/rewrites/live.db'); "
        "db.execute('insert into t (y) values (7)'); db.commit(); db.execute('vacuum'); db.close()",
        "deletes": "import glob, os; [os.unlink(p) for p in glob.glob('/var/lib/deletes/*')]",
        "replaces": "import shutil, os; shutil.rmtree('/var/lib/replaces'); os.mkdir('/var/lib/replaces'); "
        "open('/var/lib/replaces/live.db', 'w').write('new')",
    }[name]
    with writing(WRITER, directory / "live.db"):
        before = rows(directory / "live.db")
        system.ash("run", snapshot, "python3", "-c", script)
        merged = rows(directory / "live.db")
        wait_until(lambda: rows(directory / "live.db") > merged + 100)
    assert merged >= before
    with contextlib.closing(sqlite3.connect(directory / "live.db")) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert conflicts(system, snapshot) or name == "deletes"


def test_a_closed_sqlite_database_gets_the_transactions_version(system: System, snapshot: int) -> None:
    directory = system.files.var / "lib/closed"
    directory.mkdir()
    with writing(WRITER, directory / "live.db"):
        pass
    before = rows(directory / "live.db")
    insert = (
        "import sqlite3; db = sqlite3.connect('/var/lib/closed/live.db'); db.execute('insert into t (y) values (7)'); "
    )
    system.ash("run", snapshot, "python3", "-c", insert + "db.commit(); db.close()")
    assert rows(directory / "live.db") == before + 1
    assert not conflicts(system, snapshot)
    with contextlib.closing(sqlite3.connect(directory / "live.db")) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)


def postgresql() -> Path | None:
    """The directory of the host's PostgreSQL programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return (
        found[-1].parent
        if found
        else Path(shutil.which("initdb") or "/nowhere").parent
        if shutil.which("initdb")
        else None
    )


def as_postgres(program: str, *argv: str | Path, **more: Any) -> str:
    """Run one of PostgreSQL's programs, as a user that is not root."""
    directory = postgresql()
    assert directory
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", directory / program, *argv]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, env=environment, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.skipif(postgresql() is None, reason="PostgreSQL is not installed on this machine")
def test_a_running_postgresql_is_never_torn(system: System, snapshot: int, tmp_path: Path) -> None:
    top = system.files.var / "lib/postgresql"
    top.mkdir()
    os.chown(top, 65534, 65534)
    directories = [system.files.top, *system.files.top.parents]
    modes = {directory: directory.stat().st_mode for directory in directories if not directory.stat().st_mode & 0o001}
    for directory, mode in modes.items():
        directory.chmod(0o711 | mode)
    data, sockets = top / "main", tmp_path
    os.chown(sockets, 65534, 65534)
    here: list[str | Path] = ["-h", sockets, "-d", "postgres"]
    ask = ["-Atqc"]
    try:
        as_postgres("initdb", "-D", data, "--no-sync", "-U", "postgres", "-A", "trust")
        options = f"-c listen_addresses= -c unix_socket_directories={sockets} -c shared_buffers=16MB"
        as_postgres("pg_ctl", "-D", data, "-w", "-l", top / "log", "-o", options, "start")
        try:
            user: list[str | Path] = [*here, "-U", "postgres"]
            as_postgres("psql", *user, "-c", "create table t (x int primary key, y text)")
            with system.at_work(
                snapshot,
                "cd /var/lib/postgresql/main; for f in base/*/*; do printf broken > $f; done; rm -rf pg_wal; echo 99 > PG_VERSION",
            ):
                as_postgres(
                    "psql", *user, "-c", "insert into t select i, repeat('y', 500) from generate_series(1, 20000) i"
                )
            as_postgres("psql", *user, "-c", "checkpoint")
            as_postgres("psql", *user, "-c", "insert into t values (0, 'after')")
        finally:
            as_postgres("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
        as_postgres("pg_ctl", "-D", data, "-w", "-l", top / "log", "-o", options, "start")  # it replays its log
        try:
            assert (
                as_postgres("psql", *user, *ask, "select count(*), max(y) from t where x <> 5").strip()
                == f"20000|{'y' * 500}"
            )
            as_postgres("psql", *user, "-c", "reindex table t")
        finally:
            as_postgres("pg_ctl", "-D", data, "-w", "stop")
    finally:
        for directory, mode in modes.items():
            directory.chmod(mode & 0o7777)
    assert (conflicts(system, snapshot)[-1] / "lib/postgresql/main/PG_VERSION").read_text() == "99\n"


LOGGER = """\
import sys, time
with open(sys.argv[1], "a", buffering=1) as log:
    for line in range(1000000):
        log.write(f"live {line}\\n")
        if line == 100:
            print("goes on", flush=True)
        time.sleep(0.0005)
"""


def test_a_growing_log_loses_no_line(system: System, snapshot: int) -> None:
    log = system.files.var / "log/dpkg.log"
    with writing(LOGGER, log):
        system.shell(snapshot, "for i in 1 2 3; do echo transaction $i >> /var/log/dpkg.log; done")
        size = log.stat().st_size
        wait_until(lambda: log.stat().st_size > size + 1000)
    lines = log.read_text().splitlines()
    assert [line for line in lines if "transaction" in line] == [f"transaction {i}" for i in (1, 2, 3)]
    live = [int(line.split()[1]) for line in lines if line.startswith("live ")]
    assert live == list(range(len(live)))
    assert not conflicts(system, snapshot)


def test_a_log_unknown_to_the_distribution_is_kept(system: System, snapshot: int) -> None:
    log = system.files.var / "log/own.log"
    with writing(LOGGER, log):
        system.shell(snapshot, "echo transaction >> /var/log/own.log")
    assert "transaction" not in log.read_text()
    assert "transaction" in (conflicts(system, snapshot)[-1] / "log/own.log").read_text()


class Package:
    """A package that creates data in /var, and deletes them on purge."""

    def __init__(self, system: System, directory: Path) -> None:
        self.name = f"ash-test-{directory.name.replace('_', '-').rstrip('-0123456789')}"
        self.data = system.files.var / f"lib/{self.name}"
        var = f"/var/lib/{self.name}"
        self.file = make_deb(
            directory,
            self.name,
            files={
                f"usr/share/{self.name}/x": "x",
                f"var/lib/{self.name}/shipped": "s\n",
                f"etc/{self.name}.conf": "c\n",
                "DEBIAN/conffiles": f"/etc/{self.name}.conf\n",
            },
            postinst=f"[ -e {var}/db ] || echo data > {var}/db",
            postrm=f'[ "$1" != purge ] || rm -rf {var}',
        )


@pytest.fixture
def package(system: System, tmp_path: Path) -> Package:
    return Package(system, tmp_path)


def test_two_siblings_that_install_the_same_package_do_not_conflict(
    system: System, snapshot: int, package: Package
) -> None:
    sibling = system.clone()
    started = [system.start("install", number, package.file) for number in (snapshot, sibling)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for number in (snapshot, sibling):
        assert package.name in system.ash("--json", "list", number).json["packages"]
        assert not conflicts(system, number)
    assert (package.data / "db").read_text() == "data\n"


def test_a_purge_keeps_data_that_a_sibling_uses(system: System, snapshot: int, package: Package) -> None:
    sibling = system.clone()
    for number in (snapshot, sibling):
        system.ash("install", number, package.file)
    (package.data / "db").write_text("precious\n")
    outcome = system.ash("--json", "remove", snapshot, package.name, "--purge")
    assert outcome.json["packages"]["removed"] == {package.name: "1"}
    assert outcome.json["kept"], "the report lists what was left"
    assert all(path.startswith(f"/var/lib/{package.name}") for path in outcome.json["kept"])
    assert (package.data / "db").read_text() == "precious\n"
    assert (package.data / "shipped").exists()
    assert not (system.root(snapshot) / f"etc/{package.name}.conf").exists()
    assert (system.root(sibling) / f"etc/{package.name}.conf").exists()


def test_delete_data_deletes_only_data_that_no_other_snapshot_claims(
    system: System, snapshot: int, package: Package
) -> None:
    sibling = system.clone()
    for number in (snapshot, sibling):
        system.ash("install", number, package.file)
    first = system.ash("--json", "remove", snapshot, package.name, "--purge", "--delete-data").json
    assert first["kept"]
    assert (package.data / "db").exists()
    second = system.ash("--json", "remove", sibling, package.name, "--purge", "--delete-data").json
    assert second["kept"] == []
    assert not package.data.exists()


def test_without_purge_data_and_configuration_are_kept(system: System, snapshot: int, package: Package) -> None:
    system.ash("install", snapshot, package.file)
    system.ash("remove", snapshot, package.name)
    assert (system.root(snapshot) / f"etc/{package.name}.conf").exists()
    assert (package.data / "db").exists()


def test_deletions_by_an_upgrade_are_applied(system: System, snapshot: int, tmp_path: Path) -> None:
    old = make_deb(
        tmp_path, "ash-test-up", "1", postinst="mkdir -p /var/lib/ash-test-up; echo 1 > /var/lib/ash-test-up/db.v1"
    )
    new = make_deb(tmp_path, "ash-test-up", "2", postinst="mv /var/lib/ash-test-up/db.v1 /var/lib/ash-test-up/db.v2")
    system.ash("install", snapshot, old)
    answer = system.ash("--json", "install", snapshot, new).json
    assert answer["packages"]["upgraded"] == {"ash-test-up": ["1", "2"]}
    assert answer["kept"] == []
    assert os.listdir(system.files.var / "lib/ash-test-up") == ["db.v2"]


def test_deletions_by_an_upgrade_are_applied_beside_a_removal(system: System, snapshot: int, tmp_path: Path) -> None:
    old = make_deb(
        tmp_path, "ash-test-one", "1", postinst="mkdir -p /var/lib/ash-test-one; echo 1 > /var/lib/ash-test-one/db.v1"
    )
    new = make_deb(tmp_path, "ash-test-one", "2", postinst="mv /var/lib/ash-test-one/db.v1 /var/lib/ash-test-one/db.v2")
    two = make_deb(
        tmp_path, "ash-test-two", postinst="mkdir -p /var/lib/ash-test-two; echo 2 > /var/lib/ash-test-two/db",
        postrm="rm -rf /var/lib/ash-test-two",
    )  # fmt: skip
    system.ash("install", snapshot, old, two)
    answer = system.ash("--json", "install", snapshot, new, "--remove", "ash-test-two").json
    assert os.listdir(system.files.var / "lib/ash-test-one") == ["db.v2"]
    assert (system.files.var / "lib/ash-test-two/db").exists()
    assert answer["kept"] == ["/var/lib/ash-test-two"]


def test_an_upgrade_reports_conflicts_with_its_running_daemon(system: System, snapshot: int, tmp_path: Path) -> None:
    directory = "/var/lib/ash-test-daemon"
    old = make_deb(tmp_path, "ash-test-daemon", "1", postinst=f"mkdir -p {directory}; echo 1 > {directory}/db.v1")
    new = make_deb(tmp_path, "ash-test-daemon", "2", postinst=f"mv {directory}/db.v1 {directory}/db.v2")
    system.ash("install", snapshot, old)
    with (system.files.var / "lib/ash-test-daemon/db.v1").open("a"):
        outcome = system.ash("install", snapshot, new)
    assert os.listdir(system.files.var / "lib/ash-test-daemon") == ["db.v1"]
    assert re.search(r"/var/lib/ash-test-daemon\b", outcome.stdout + outcome.stderr)
    assert (conflicts(system, snapshot)[-1] / "lib/ash-test-daemon/db.v2").exists()


# Maps a file into memory and closes it, as libraries are, and files of many programs. Constants of <sys/mman.h>.
MAPPER = """\
import ctypes, os, sys, time
library = ctypes.CDLL(None, use_errno=True)
library.mmap.restype = ctypes.c_void_p
descriptor = os.open(sys.argv[1], os.O_RDWR)
PROT_READ_WRITE, MAP_SHARED = 3, 1
assert library.mmap(None, ctypes.c_size_t(4096), PROT_READ_WRITE, MAP_SHARED, descriptor, ctypes.c_long(0)) != -1
os.close(descriptor)
print("goes on", flush=True)
time.sleep(600)
"""


def test_a_mapped_file_counts_as_open(system: System, snapshot: int) -> None:
    directory = system.files.var / "lib/mapped"
    directory.mkdir()
    (directory / "db").write_text("live\n" * 1000)
    with writing(MAPPER, directory / "db"):
        system.shell(snapshot, "echo transaction > /var/lib/mapped/db")
    assert (directory / "db").read_text().startswith("live\n")


def test_a_package_finds_its_existing_data(system: System, snapshot: int, package: Package) -> None:
    """The data were kept when the package was purged in another snapshot, or come from another system."""
    package.data.mkdir()
    (package.data / "db").write_text("old data\n")
    system.ash("install", snapshot, package.file)
    assert (package.data / "db").read_text() == "old data\n"
    assert not conflicts(system, snapshot)


def test_the_conflicts_directory_is_for_root_alone(system: System, snapshot: int) -> None:
    secret = system.files.var / "lib/secret"
    secret.mkdir(mode=0o700)
    with system.at_work(snapshot, "echo s > /var/lib/secret/key; chmod 600 /var/lib/secret/key"):
        (secret / "live").touch()
    directory = conflicts(system, snapshot)[-1]
    assert directory.parent.stat().st_mode & 0o777 == 0o700
    assert (directory / "lib/secret").stat().st_mode & 0o777 == 0o700
    assert (directory / "lib/secret/key").stat().st_mode & 0o777 == 0o600
