# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random sequences of transactions beside live writers: /var loses nothing that either of them wrote.

The writers are those that real services have: a SQLite database in WAL mode, a log, a queue directory, a file that is
replaced; and in some sequences a PostgreSQL server. What a service wrote stays. What a transaction wrote is in place, or
in the conflicts folder and named.

ASH_TEST_STEPS says how many steps a sequence has, ASH_TEST_SEQUENCES how many sequences there are; then PostgreSQL runs
in all of them.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support import program, wait_until
from tests.system.disk_system import System
from tests.system.models import run_sequences

pytestmark = [pytest.mark.system, pytest.mark.budget(75)]

STEPS = int(os.environ.get("ASH_TEST_STEPS", "8"))
SEQUENCES = int(os.environ.get("ASH_TEST_SEQUENCES", "30"))
DATABASE, LOG, QUEUE, SINGLE = "lib/app-db/live.db", "log/app.log", "spool/app-queue", "lib/app-single/data"
ENTRIES = {DATABASE: "lib/app-db", LOG: "log/app.log", QUEUE: "spool/app-queue", SINGLE: "lib/app-single"}
POSTGRES = "lib/postgresql"
KINDS = sorted([*ENTRIES, POSTGRES])
# Whether a sequence has a server, which makes it a third longer.
WITH_POSTGRES = [True] if "ASH_TEST_SEQUENCES" in os.environ else [False] * 5 + [True]
# What a transaction does to its own copy of the cluster: the live one would not survive this.
DAMAGE = "find /var/lib/postgresql/data/base -name '1259*' -delete; echo {token} > /var/lib/postgresql/{token}"

# Writes one piece of data as each kind of service would. Both sides use it: on the live /var and in a transaction.
WRITE = """\
import os, sqlite3, sys
place, kind, token = sys.argv[1:]
path = os.path.join(place, kind)
if kind.endswith(".db"):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with sqlite3.connect(path, isolation_level=None, timeout=60) as db:
        db.execute("pragma journal_mode = wal")
        db.execute("create table if not exists t (x text)")
        db.execute("insert into t values (?)", (token,))
    db.close()
elif kind.endswith(".log"):
    with open(path, "a") as log:
        log.write(token + "\\n")
elif kind.endswith("-queue"):
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, token), "w") as item:
        item.write(token)
else:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w") as new:
        new.write(token)
    os.rename(path + ".new", path)
"""


def tokens_in(var: Path, kind: str) -> list[str]:
    """What a /var, or a conflicts folder, has of a kind; raises sqlite3.DatabaseError if a database is damaged."""
    path = var / kind
    if not path.exists():
        return []
    if kind == DATABASE:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as db:
            assert db.execute("pragma integrity_check").fetchone() == ("ok",)
            return [row[0] for row in db.execute("select x from t")]
    if kind == QUEUE:
        return sorted(item.name for item in path.iterdir())
    return path.read_text().split()


class Postgres:
    """A PostgreSQL server of this machine, whose cluster is in the /var of a system.

    Args:
        var: the live /var.
        place: a directory that all may enter, as the server does not run as root.
    """

    def __init__(self, var: Path, place: Path) -> None:
        self.programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self.place, self.data = place, place / "cluster/data"
        (var / POSTGRES).mkdir()
        shutil.chown(var / POSTGRES, "postgres", "postgres")
        (place / "cluster").mkdir()
        (place / "socket").mkdir(mode=0o777)
        (place / "socket").chmod(0o777)
        program("mount", "--bind", var / POSTGRES, place / "cluster")
        options = ["--username=postgres", "--auth=trust", "--no-locale", "--encoding=UTF8", "--wal-segsize=1"]
        assert self._started("initdb", "--pgdata", self.data, "--no-sync", *options).wait(timeout=60) == 0
        self.start()

    def _started(self, name: str, *options: str | Path) -> subprocess.Popen[bytes]:
        """A program of the server, as its user."""
        argv = [str(self.programs / name), *map(str, options)]
        no = subprocess.DEVNULL
        return subprocess.Popen(argv, user="postgres", group="postgres", extra_groups=[], cwd="/", stdout=no, stderr=no)

    def start(self) -> None:
        self.server = self._started(
            "postgres", "-D", self.data, "-k", self.place / "socket", "-h", "", "-c", "fsync=on"
        )
        wait_until(lambda: subprocess.run([*self._psql, "select"], capture_output=True, check=False).returncode == 0)

    def stop(self, how: signal.Signals) -> None:
        """Stop the server; with SIGQUIT as a crash would."""
        self.server.send_signal(how)
        self.server.wait(timeout=60)

    def query(self, statement: str) -> list[str]:
        """The first column of what a statement returns, in a session of its own."""
        return program(*self._psql, statement).splitlines()

    @property
    def _psql(self) -> list[str]:
        return ["psql", "-qAtX", "-h", str(self.place / "socket"), "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-c"]


class VarModel(RuleBasedStateMachine):
    """Transactions and live writers on a real system, with an account of what each of them wrote."""

    system: System
    postgres: Postgres
    numbers = itertools.count(1)

    def __init__(self) -> None:
        super().__init__()
        self.var = self.system.files.var
        for entry in ENTRIES.values():
            path = self.var / entry
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.var / "lib/ash/conflicts", ignore_errors=True)
        self.snapshots = [self.system.clone() for _ in range(2)]
        self.expected: dict[str, list[str]] = {kind: [] for kind in ENTRIES}
        self.connections = contextlib.ExitStack()

    @initialize(with_postgres=st.sampled_from(WITH_POSTGRES))
    def begin(self, with_postgres: bool) -> None:
        if with_postgres:
            self.expected[POSTGRES] = []
            self.postgres.query("drop table if exists t; create table t (x text)")

    def teardown(self) -> None:
        self.connections.close()
        assert self.system.ash("--json", "fsck").json["damage"] == []

    def token(self) -> str:
        return f"t{next(self.numbers):06}"

    def write_live(self, kind: str) -> None:
        """What a service writes beside everything else."""
        if kind not in self.expected:
            return
        token = self.token()
        if kind == POSTGRES:
            self.postgres.query(f"insert into t values ('{token}')")  # noqa: S608 (a number)
        else:
            script = compile(WRITE.replace("sys.argv[1:]", repr([str(self.var), kind, token])), "WRITE", "exec")
            exec(script, {})  # noqa: S102 (the text above)
        self.expect(kind, token)
        note(f"live {kind}: {token}")

    def expect(self, kind: str, token: str) -> None:
        self.expected[kind] = [token] if kind == SINGLE else [*self.expected[kind], token]

    @rule(kind=st.sampled_from(KINDS))
    def live_write(self, kind: str) -> None:
        self.write_live(kind)

    @rule(how=st.sampled_from([signal.SIGINT, signal.SIGQUIT]))
    @precondition(lambda self: POSTGRES in self.expected)
    def restart_postgres(self, how: signal.Signals) -> None:
        self.postgres.stop(how)
        self.postgres.start()

    @rule()
    def open_database(self) -> None:
        """A service keeps its database open from now on."""
        if (self.var / DATABASE).exists():
            db = self.connections.enter_context(contextlib.closing(sqlite3.connect(self.var / DATABASE, timeout=60)))
            db.execute("select count(*) from t").fetchone()

    @rule()
    def close_database(self) -> None:
        self.connections.close()

    @rule(
        which=st.integers(0, 1),
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
        meanwhile=st.lists(st.sampled_from(KINDS), max_size=2, unique=True),
        fails=st.booleans(),
    )
    def transaction(self, which: int, kinds: Sequence[str], meanwhile: Sequence[str], fails: bool) -> None:
        """A transaction writes some entries, while services write some."""
        written = {kind: self.token() for kind in kinds if kind in self.expected}
        script = "\n".join(
            DAMAGE.format(token=token) if kind == POSTGRES else f"python3 -c '{WRITE}' /var {kind} {token}"
            for kind, token in written.items()
        )
        with self.system.at_work(
            self.snapshots[which], script, status=9 if fails else 0, after="exit 9" if fails else ""
        ) as work:
            for kind in meanwhile:
                self.write_live(kind)
        note(f"transaction {written}, fails: {fails}: {work.ended.stdout}{work.ended.stderr}")
        if fails:
            return
        said = work.ended.stdout + work.ended.stderr
        if token := written.pop(POSTGRES, ""):
            assert f"/var/{POSTGRES}" in said, "the running server's cluster was replaced"
            assert [*(self.var / "lib/ash/conflicts").glob(f"*/{POSTGRES}/{token}")]
        for kind, token in written.items():
            if f"/var/{ENTRIES[kind]}" in said:
                aside = [token for folder in self.conflict_folders() for token in tokens_in(folder, kind)]
                assert token in aside, f"{token} of {kind} is neither in place nor in the conflicts folder"
            else:
                self.expect(kind, token)

    def conflict_folders(self) -> Iterator[Path]:
        yield from (self.var / "lib/ash/conflicts").glob("*")

    @rule(which=st.integers(0, 1))
    def undo(self, which: int) -> None:
        """Undo leaves /var alone."""
        self.system.ash("run", self.snapshots[which], "touch", f"/etc/{self.token()}")
        self.system.ash("undo", self.snapshots[which])

    @invariant()
    def nothing_is_lost(self) -> None:
        for kind, wanted in self.expected.items():
            found = self.postgres.query("select x from t") if kind == POSTGRES else tokens_in(self.var, kind)
            assert sorted(found) == sorted(wanted), kind


@pytest.fixture(scope="module")
def postgres(system: System) -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="ash-test-") as directory:
        Path(directory).chmod(0o755)
        postgres = Postgres(system.files.var, Path(directory))
        try:
            yield postgres
        finally:
            postgres.stop(signal.SIGQUIT)
            program("umount", postgres.place / "cluster")


def test_no_sequence_of_transactions_and_live_writes_loses_data_in_var(system: System, postgres: Postgres) -> None:
    VarModel.system, VarModel.postgres = system, postgres
    run_sequences(VarModel, SEQUENCES, STEPS, shrink=False)
