# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random sequences of edits and commands lose no edit of /etc and no account, whatever comes between.

An edit of the running /etc is in effect after each reboot, or it is named and its content is kept: in the conflicts
folder, or in the snapshot into which etc-update saved it. An edit in a snapshot is in effect once that is deployed and
booted. Accounts follow the machine.

ASH_TEST_STEPS says how many steps a sequence has, ASH_TEST_SEQUENCES how many sequences there are.
"""

import itertools
import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.support import make_deb
from tests.system.disk_system import Machine, System
from tests.system.models import run_sequences

pytestmark = [pytest.mark.system, pytest.mark.budget(150)]

STEPS = int(os.environ.get("ASH_TEST_STEPS", "10"))
SEQUENCES = int(os.environ.get("ASH_TEST_SEQUENCES", "30"))
PACKAGE = "ash-test-conf"
CONFFILE = f"{PACKAGE}.conf"
PATHS = ("own", "dir/own", "motd", CONFFILE)
ACL = "system.posix_acl_access"

GONE = None


def access_list(uid: int) -> bytes:
    """An ACL with which a user may read a file, as <linux/posix_acl_xattr.h> has it."""
    unnamed = 2**32 - 1
    rows = [(0x01, 6, unnamed), (0x02, 4, uid), (0x04, 4, unnamed), (0x10, 4, unnamed), (0x20, 4, unnamed)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


@dataclass(frozen=True)
class Entry:
    """What counts of a file in /etc."""

    content: str
    mode: int
    acl: bytes

    @classmethod
    def of(cls, path: Path) -> "Entry | None":
        """The state of a path; GONE if it is missing."""
        if not path.exists():
            return GONE
        acl = os.getxattr(path, ACL) if ACL in os.listxattr(path) else b""
        return cls(path.read_text(), stat.S_IMODE(path.stat().st_mode), acl)


@dataclass
class Running:
    """What the administrator did to the running system, and must find again."""

    edits: dict[str, Entry | None] = field(default_factory=dict)
    people: dict[str, tuple[int, str]] = field(default_factory=dict)  # uid and password by name
    deleted: set[str] = field(default_factory=set)


class EtcModel(RuleBasedStateMachine):
    """Edits, changes, deploys and boots a real system, and keeps account of what must not be lost."""

    system: System
    start: int  # a snapshot with the first version of the package
    upgrade: Path
    numbers = itertools.count(1)

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(self.system)
        self.snapshots = [self.system.clone(self.start) for _ in range(2)]
        self.system.ash("deploy", self.snapshots[0], "--fresh-etc")
        self.machine.boot()
        self.running = Running()
        self.purposes: dict[int, dict[str, Entry | None]] = {number: {} for number in self.snapshots}
        self.named = ""  # what ash has said since the last boot

    @property
    def etc(self) -> Path:
        return self.machine.etc

    def say(self, *words: str | int) -> None:
        """Run ash as on the running system, and keep what it says."""
        done = self.machine.run(*words)
        note(f"ash {' '.join(map(str, words))}: {done.stdout} {done.stderr}")
        self.named += done.stdout + done.stderr

    def token(self) -> str:
        """A new content; all have the same size."""
        return f"{next(self.numbers):08}\n"

    # Edits of the running system

    @rule(path=st.sampled_from(PATHS), trick=st.booleans())
    def write(self, path: str, trick: bool) -> None:
        """Write a file. With `trick` its size and mtime stay as they were."""
        file = self.etc / path
        file.parent.mkdir(exist_ok=True)
        before = file.stat() if file.exists() else None
        file.write_text(self.token())
        if before and trick:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.running.edits[path] = Entry.of(file)

    @rule(path=st.sampled_from(PATHS), mode=st.sampled_from([0o600, 0o640, 0o644]), acl=st.booleans())
    def change_attributes(self, path: str, mode: int, acl: bool) -> None:
        file = self.etc / path
        if file.exists():
            if acl:
                os.setxattr(file, ACL, access_list(next(self.numbers)))
            else:
                file.chmod(mode)
            self.running.edits[path] = Entry.of(file)

    @rule(path=st.sampled_from(PATHS))
    def delete(self, path: str) -> None:
        file = self.etc / path
        if file.exists():
            file.unlink()
            self.running.edits[path] = GONE

    @rule(old=st.sampled_from(PATHS), new=st.sampled_from(PATHS))
    def rename(self, old: str, new: str) -> None:
        if old != new and (self.etc / old).exists():
            (self.etc / new).parent.mkdir(exist_ok=True)
            (self.etc / old).rename(self.etc / new)
            self.running.edits |= {old: GONE, new: Entry.of(self.etc / new)}

    @rule(locked=st.booleans())
    def add_person(self, locked: bool) -> None:
        number = next(self.numbers)
        name, password = f"p{number}", f"{'!' if locked else ''}$y${number}"
        taken = [int(row[2]) for row in self.rows("passwd") if 1000 <= int(row[2]) < 60000]
        uid = max(taken, default=999) + 1
        for file, line in {
            "passwd": f"{name}:x:{uid}:{uid}::/home/{name}:/bin/sh",
            "shadow": f"{name}:{password}:{20000 + number}:0:99999:7:::",
            "group": f"{name}:x:{uid}:",
            "gshadow": f"{name}:!::",
        }.items():
            with (self.etc / file).open("a") as accounts:
                accounts.write(f"{line}\n")
        self.running.people[name] = (uid, password)

    @rule(data=st.data())
    @precondition(lambda self: self.running.people)
    def set_password(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running.people)))
        number = next(self.numbers)
        rows = self.rows("shadow")
        for row in rows:
            if row[0] == name:
                row[1:3] = f"$y${number}", str(20000 + number)
        (self.etc / "shadow").write_text("".join(f"{':'.join(row)}\n" for row in rows))
        self.running.people[name] = (self.running.people[name][0], f"$y${number}")

    @rule(data=st.data())
    @precondition(lambda self: self.running.people)
    def delete_person(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running.people)))
        for file in ("passwd", "shadow", "group", "gshadow"):
            kept = [row for row in self.rows(file) if row[0] != name]
            (self.etc / file).write_text("".join(f"{':'.join(row)}\n" for row in kept))
        del self.running.people[name]
        self.running.deleted.add(name)

    def rows(self, file: str) -> list[list[str]]:
        return [line.split(":") for line in (self.etc / file).read_text().splitlines()]

    # Changes of snapshots

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.snapshots))

    @rule(data=st.data(), path=st.sampled_from(PATHS))
    def edit_in_snapshot(self, data: st.DataObject, path: str) -> None:
        number, token = self.pick(data), self.token()
        self.system.shell(number, f"mkdir -p /etc/dir; echo {token.strip()} > /etc/{path}")
        self.purposes[number][path] = Entry.of(self.system.root(number) / "etc" / path)

    @rule(data=st.data())
    def upgrade_package(self, data: st.DataObject) -> None:
        number = self.pick(data)
        self.system.ash("install", number, self.upgrade)

    # Commands

    @rule()
    def etc_update(self) -> None:
        self.say("etc-update")

    @rule(data=st.data())
    def deploy(self, data: st.DataObject) -> None:
        self.say("deploy", self.pick(data))

    @rule()
    def rollback(self) -> None:
        self.snapshots.append(self.machine.running("rollback")["snapshot"])
        self.purposes[self.snapshots[-1]] = {}

    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        of = self.pick(data)
        self.snapshots.append(self.system.clone(of))
        self.purposes[self.snapshots[-1]] = dict(self.purposes[of])

    @rule()
    def reboot(self) -> None:
        self.say("carry")
        self.machine.boot()
        self.say("status")
        self.check_edits()
        self.check_people()
        self.named = ""

    # What must hold after a reboot

    def check_edits(self) -> None:
        for path, wanted in list(self.running.edits.items()):
            found = Entry.of(self.etc / path)
            if found != wanted:
                assert path in self.named, f"{path} is {found}, not {wanted}, and it was not named"
                assert wanted is GONE or self.is_kept(path, wanted), f"{wanted} of {path} is nowhere"
                del self.running.edits[path]

    def check_people(self) -> None:
        passwords = {row[0]: row[1] for row in self.rows("shadow")}
        uids = {row[0]: int(row[2]) for row in self.rows("passwd")}
        for name, (uid, password) in self.running.people.items():
            assert (uids.get(name), passwords.get(name)) == (uid, password), f"{name} is not as it was"
        assert not self.running.deleted & uids.keys(), "who was deleted is back"
        assert len(set(uids.values())) == len(uids), "two accounts share a uid"

    def is_kept(self, path: str, wanted: Entry) -> bool:
        """Whether the content of an edit is in a conflicts folder, or saved in a snapshot."""
        aside = (self.system.files.var / "lib/ash/conflicts").glob(f"*/etc/{path}")
        saved = (self.system.root(number) / "etc" / path for number in self.system.files.tree())
        return any(file.exists() and file.read_text() == wanted.content for file in (*aside, *saved))


def test_no_sequence_of_edits_and_commands_loses_an_edit_of_etc(system: System, tmp_path: Path) -> None:
    first, second = (
        make_deb(
            tmp_path,
            PACKAGE,
            version,
            files={f"etc/{CONFFILE}": f"default{version}\n", "DEBIAN/conffiles": f"/etc/{CONFFILE}\n"},
        )
        for version in "12"
    )
    EtcModel.system, EtcModel.upgrade = system, second
    EtcModel.start = system.clone()
    system.ash("install", EtcModel.start, first)
    run_sequences(EtcModel, SEQUENCES, STEPS, shrink=False)
