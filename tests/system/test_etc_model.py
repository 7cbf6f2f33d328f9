# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random sequences of edits and commands lose no edit of /etc and no account, whatever comes between.

After each step every edit of a running /etc is in effect, or it is named and kept in the conflicts folder, or a snapshot
or two other deployments have it, or `status` names it as a change that only one deployment has. A boot of what was
deployed last needs more: each edit is in effect, or it was named as in conflict or as only saved. Accounts follow the
machine. Deployed is what the snapshot has or what the running system has, nothing else.

ASH_TEST_STEPS says how many steps a sequence has, ASH_TEST_SEQUENCES how many sequences there are.
"""

import itertools
import json
import os
import re
import shutil
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ash import SECONDARY_SLOTS, SLOTS
from tests.support import make_deb
from tests.system.disk_system import Machine, System, known_to_boot
from tests.system.models import run_sequences

pytestmark = [pytest.mark.system, pytest.mark.budget(150)]

STEPS = int(os.environ.get("ASH_TEST_STEPS", "10"))
SEQUENCES = int(os.environ.get("ASH_TEST_SEQUENCES", "30"))
PACKAGE = "ash-test-conf"
CONFFILE = f"{PACKAGE}.conf"
PATHS = ("own", "dir/own", "motd", CONFFILE)
MODES = (0o600, 0o640, 0o644)
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


class Edit(NamedTuple):
    """What the administrator made of a path in a running /etc."""

    path: str
    wanted: Entry | None
    has_content: bool  # else only its attributes were changed; a merge may bring other content

    def is_in(self, found: Entry | None) -> bool:
        """Whether it is in effect in a state of the path."""
        if found is None or self.wanted is None:
            return found == self.wanted
        if self.has_content:
            return found.content == self.wanted.content
        return (found.mode, found.acl) == (self.wanted.mode, self.wanted.acl)


class Person(NamedTuple):
    """An account of the login range with the password that somebody gave it; the later, the higher its number."""

    name: str
    password: str

    @property
    def age(self) -> int:
        return int(self.password.rpartition("$")[2])


class Booted(Machine):
    """A machine that is started into any deployment: `ash/booted` says which, as ash-booted.service writes it."""

    def boot(self, slot: str = "") -> str:
        """Start the deployment in a slot, by default that for the next boot."""
        slot = slot or self.menu["default"]
        note = self.system.root(slot) / "usr/share/ash/deployment"
        (self.files.state / "booted").write_text(note.read_text())
        (self.files.state / "menu").write_text(json.dumps(known_to_boot(self.menu, slot)))
        self.system.ash("recover")
        return self.slot

    @property
    def menu(self) -> dict[str, Any]:
        menu: dict[str, Any] = json.loads((self.files.state / "menu").read_text())
        return menu

    @property
    def slot(self) -> str:
        booted: str = json.loads((self.files.state / "booted").read_text())["slot"]
        return booted


class EtcModel(RuleBasedStateMachine):
    """Edits, changes, deploys and boots a real system, and keeps account of what must not be lost."""

    system: System
    start: int  # a snapshot with the first version of the package
    upgrade: Path
    numbers = itertools.count(1)

    def __init__(self) -> None:
        super().__init__()
        self.machine = Booted(self.system)
        shutil.rmtree(self.system.files.var / "lib/ash/conflicts", ignore_errors=True)
        self.snapshots = [self.system.clone(self.start) for _ in range(2)]
        self.saved_into: set[int] = set()  # what runs may be of a snapshot of an earlier sequence
        self.system.ash("deploy", self.snapshots[0], "--fresh-etc")
        self.machine.boot()
        self.machine.forget_people()
        self.edits: set[Edit] = set()
        self.reverts: set[Edit] = set()  # to the state before the drift, after that was carried
        self.aside: set[Edit] = set()  # named, and kept in the conflicts folder
        self.overwritten: set[tuple[str, Entry | None]] = set()  # by the administrator, in a snapshot that had it
        self.only_saved: set[str] = set()  # named by a deploy since the last boot
        self.people: dict[str, tuple[int, str]] = {}  # of the running system, with uid and password
        self.deleted: set[str] = set()
        self.passwords: set[Person] = set()  # of all deployments

    @property
    def etc(self) -> Path:
        return self.machine.etc

    def other_slots(self) -> list[str]:
        return [slot for slot in self.machine.menu["deployments"] if slot != self.machine.slot]

    def say(self, *words: str | int) -> dict[str, Any]:
        """Run ash as on the running system, and account for what it names."""
        done = self.machine.run("--json", *words)
        note(f"ash {' '.join(map(str, words))}: {done.stdout} {done.stderr}")
        answer = done.json
        named = {*answer.get("conflicts", ())}
        for paths in re.findall(r"had these changes of /etc: (.*); see ", done.stderr):
            named |= {*paths.split(", ")}
        self.aside |= {edit for edit in self.edits | self.reverts if edit.path in named and self.is_set_aside(edit)}
        self.only_saved |= {*answer.get("only_saved", ())}
        return answer

    def token(self) -> str:
        """A new content; all have the same size."""
        return f"{next(self.numbers):08}\n"

    def edited(self, path: str, before: Entry | None) -> None:
        """Account for an edit of a path in the running /etc."""
        base, now = Entry.of(self.system.files.etc(self.machine.slot) / path), Entry.of(self.etc / path)
        known = [edit for edit in self.edits if edit.path == path]
        self.edits -= {edit for edit in known if edit.is_in(before)}
        self.reverts = {revert for revert in self.reverts if revert.path != path}
        has_content = not base or not now or base.content != now.content
        (self.edits if now != base else self.reverts).add(Edit(path, now, has_content or now == base))

    # Edits of the running system

    @rule(
        path=st.sampled_from(PATHS),
        how=st.sampled_from(["write", "write", "trick", "delete", "rename", "acl", *MODES]),
        to=st.sampled_from(PATHS),
    )
    def edit(self, path: str, how: str | int, to: str) -> None:
        before = Entry.of(self.etc / path)
        if how in ("write", "trick"):
            self.write(path, how == "trick")
        elif before and how == "delete":
            (self.etc / path).unlink()
            self.edited(path, before)
        elif before and how == "rename":
            self.rename(path, to)
        elif before:
            self.change_attributes(path, how)

    def write(self, path: str, trick: bool) -> None:
        """Write a file. With `trick` its size and mtime stay as they were."""
        file, before = self.etc / path, Entry.of(self.etc / path)
        file.parent.mkdir(exist_ok=True)
        status = file.stat() if before else None
        file.write_text(self.token())
        if status and trick:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.edited(path, before)

    def change_attributes(self, path: str, how: str | int) -> None:
        before = Entry.of(self.etc / path)
        if isinstance(how, int):
            (self.etc / path).chmod(how)
        else:
            os.setxattr(self.etc / path, ACL, access_list(next(self.numbers)))
        self.edited(path, before)

    def rename(self, old: str, new: str) -> None:
        moved, replaced = Entry.of(self.etc / old), Entry.of(self.etc / new)
        if old != new and moved:
            (self.etc / new).parent.mkdir(exist_ok=True)
            (self.etc / old).rename(self.etc / new)
            self.edited(old, moved)
            self.edited(new, replaced)

    @rule(how=st.sampled_from(["add", "add", "lock", "set", "delete"]), which=st.integers(0, 9))
    def change_people(self, how: str, which: int) -> None:
        if how in ("add", "lock") or not self.people:
            self.add_person(how == "lock")
            return
        name = sorted(self.people)[which % len(self.people)]
        if how == "set":
            self.set_password(name)
        else:
            self.delete_person(name)

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
        self.people[name] = (uid, password)
        self.passwords.add(Person(name, password))

    def set_password(self, name: str) -> None:
        number = next(self.numbers)
        rows = self.rows("shadow")
        for row in rows:
            if row[0] == name:
                row[1:3] = f"$y${number}", str(20000 + number)
        (self.etc / "shadow").write_text("".join(f"{':'.join(row)}\n" for row in rows))
        self.passwords.discard(Person(name, self.people[name][1]))
        self.people[name] = (self.people[name][0], f"$y${number}")
        self.passwords.add(Person(name, f"$y${number}"))

    def delete_person(self, name: str) -> None:
        for file in ("passwd", "shadow", "group", "gshadow"):
            kept = [row for row in self.rows(file) if row[0] != name]
            (self.etc / file).write_text("".join(f"{':'.join(row)}\n" for row in kept))
        del self.people[name]
        self.deleted.add(name)
        self.passwords = {person for person in self.passwords if person.name != name}

    def rows(self, file: str) -> list[list[str]]:
        return [line.split(":") for line in (self.etc / file).read_text().splitlines()]

    # Changes of snapshots

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.snapshots))

    @rule(data=st.data(), path=st.sampled_from(PATHS))
    def edit_in_snapshot(self, data: st.DataObject, path: str) -> None:
        number = self.pick(data)
        self.overwritten.add((path, Entry.of(self.system.root(number) / "etc" / path)))
        self.system.shell(number, f"mkdir -p /etc/dir; echo {self.token().strip()} > /etc/{path}")

    @rule(data=st.data())
    def upgrade_package(self, data: st.DataObject) -> None:
        self.system.ash("install", self.pick(data), self.upgrade)

    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        """An edit that only this state of the snapshot has is given up with it."""
        number = self.pick(data)
        if self.system.files.undo(number).exists():
            given_up = {edit for edit in self.edits if self.keepers(edit) == [number]}
            lost_with_it = {person for person in self.passwords if self.keepers(person) == [number]}
            self.say("undo", number)
            self.edits -= {edit for edit in given_up if not self.keepers(edit)}
            self.passwords -= {person for person in lost_with_it if not self.keepers(person)}

    # Commands

    @rule()
    def etc_update(self) -> None:
        self.saved_into.add(self.say("etc-update")["snapshot"])

    @rule(data=st.data(), options=st.sampled_from([(), (), (), ("--secondary",)]))
    def deploy(self, data: st.DataObject, options: Sequence[str]) -> None:
        number = self.pick(data)
        answer = self.say("deploy", number, *options)
        if answer["changed"]:
            for path in PATHS:
                places = (self.system.root(answer["slot"]) / "etc", self.system.root(number) / "etc", self.etc)
                found, *sides = (Entry.of(etc / path) for etc in places)
                there = [side for side in sides if side]
                # Of a file, the content may be of one side, and the attributes of the other.
                assert found in sides or found in [
                    Entry(content.content, rest.mode, rest.acl) for content in there for rest in there
                ], f"{path} is neither that of the snapshot nor the running one"
        self.reverts.clear()

    @rule()
    def rollback(self) -> None:
        self.snapshots.append(self.say("rollback")["snapshot"])
        self.reverts.clear()

    @rule(data=st.data())
    def clone(self, data: st.DataObject) -> None:
        self.snapshots.append(self.system.clone(self.pick(data)))

    @rule()
    def reboot(self) -> None:
        """Into what was deployed last."""
        before, slot = self.machine.menu, self.machine.slot
        self.say("carry")
        default = before["deployments"][before["default"]]
        follows = default["etc_from"] == slot and not default["fresh_etc"]  # with --fresh-etc only what changed since
        self.boot(before["default"], follows=before["default"] == slot or follows)

    @rule(which=st.integers(0, 9))
    def boot_other(self, which: int) -> None:
        """Into a deployment that is chosen in the menu, also of an earlier sequence."""
        if slots := sorted(self.other_slots()):
            self.say("carry")
            self.boot(slots[which % len(slots)], follows=False)

    def boot(self, slot: str, *, follows: bool) -> None:
        """Start the deployment in a slot; `follows` says whether it has what was changed in the running one."""
        in_effect = {edit for edit in self.edits | self.reverts if self.is_in(self.etc, edit)}
        self.machine.boot(slot)
        if follows:
            self.check_edits(in_effect)
            self.check_people()
        # What the snapshot has by itself is no edit any more.
        base = self.system.files.etc(slot)
        self.edits = {edit for edit in self.edits if not self.is_in(base, edit)}
        self.reverts.clear()
        self.only_saved.clear()
        passwords = {row[0]: row[1] for row in self.rows("shadow")}
        here = {row[0]: int(row[2]) for row in self.rows("passwd") if re.fullmatch(r"p\d+", row[0])}
        self.people = {name: (uid, passwords[name]) for name, uid in here.items()}
        self.deleted = self.deleted if follows else set()

    # What must hold after a reboot

    def check_edits(self, edits: set[Edit]) -> None:
        for edit in edits - self.aside:
            if not self.is_in(self.etc, edit) and not self.is_overwritten(edit):
                assert edit.path in self.only_saved, f"{edit} is not in effect, and it was not named"

    def check_people(self) -> None:
        passwords = {row[0]: row[1] for row in self.rows("shadow")}
        uids = {row[0]: int(row[2]) for row in self.rows("passwd")}
        for name, (uid, password) in self.people.items():
            assert uids.get(name) == uid, f"{name} is not as it was"
            assert passwords[name].lstrip("!") == password.lstrip("!") or self.is_later(name, password), name
        assert not self.deleted & uids.keys(), "who was deleted is back"
        assert len(set(uids.values())) == len(uids), "two accounts share a uid"

    def is_later(self, name: str, password: str) -> bool:
        """Whether the running system has another password of an account, which was set later."""
        found = next(row[1] for row in self.rows("shadow") if row[0] == name)
        return Person(name, found).age > Person(name, password).age

    # What must hold after each step

    @invariant()
    def nothing_is_lost(self) -> None:
        self.edits -= self.aside
        lost: list[Edit | Person] = [*self.edits, *self.passwords]
        lost = [thing for thing in lost if not self.is_in(self.etc, thing) and not self.is_kept(thing)]
        given_up = {thing for thing in lost if self.is_overwritten(thing) or self.is_superseded(thing)}
        assert given_up == {*lost}, [(thing, self.keepers(thing)) for thing in lost if thing not in given_up]
        self.edits -= given_up
        self.passwords -= given_up

    def is_kept(self, thing: Edit | Person) -> bool:
        """Whether it is more than once on the disk, or where nothing replaces it, or named by `status`."""
        found = self.keepers(thing)
        return len(found) > 1 or any(
            one not in (*SLOTS, *SECONDARY_SLOTS) or self.is_named(str(one), thing) for one in found
        )

    def is_named(self, slot: str, thing: Edit | Person) -> bool:
        """Whether status names it as a change that only a deployment has."""
        only_there = {one["slot"]: one["paths"] for one in self.machine.running("status")["only_there"]}
        return (thing.path if isinstance(thing, Edit) else "shadow") in only_there.get(slot, [])

    def is_overwritten(self, thing: Edit | Person) -> bool:
        """Whether the administrator has replaced it in a snapshot."""
        return isinstance(thing, Edit) and any(
            thing.path == path and thing.is_in(was) for path, was in self.overwritten
        )

    def is_superseded(self, thing: Edit | Person) -> bool:
        """Whether an account has a password in the running system that was set later."""
        names = {row[0] for row in self.rows("shadow")} if isinstance(thing, Person) else set()
        return isinstance(thing, Person) and thing.name in names and self.is_later(*thing)

    def keepers(self, thing: Edit | Person) -> list[int | str]:
        """The snapshots and the deployments that do not run which have it, and for a person the conflicts folder."""
        found: list[int | str] = [
            n for n in {*self.snapshots} | self.saved_into if self.is_in(self.system.root(n) / "etc", thing)
        ]
        found += [slot for slot in self.other_slots() if self.is_in(self.system.root(slot) / "etc", thing)]
        return found + ["conflicts"] * (isinstance(thing, Person) and self.is_set_aside(thing))

    @staticmethod
    def is_in(etc: Path, thing: Edit | Person) -> bool:
        if isinstance(thing, Edit):
            return thing.is_in(Entry.of(etc / thing.path))
        shadow = [line.split(":") for line in (etc / "shadow").read_text().splitlines()]
        return [thing.name, thing.password.lstrip("!")] in [[row[0], row[1].lstrip("!")] for row in shadow]

    def is_set_aside(self, thing: Edit | Person) -> bool:
        """Whether it is in the conflicts folder; a deletion needs no room there."""
        for etc in (self.system.files.var / "lib/ash/conflicts").glob("*/etc"):
            if isinstance(thing, Person):
                if (etc / "shadow").exists() and self.is_in(etc, thing):
                    return True
            elif (
                thing.wanted and (etc / thing.path).exists() and (etc / thing.path).read_text() == thing.wanted.content
            ):
                return True
        return isinstance(thing, Edit) and thing.wanted is GONE


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
