# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random sequences of commands on the tree have the same result as a simple model, and fsck finds nothing.

ASH_TEST_STEPS says how many commands a sequence has, ASH_TEST_SEQUENCES how many sequences there are.
"""

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support import REFUSED
from tests.system.disk_system import open_system
from tests.system.models import run_sequences

pytestmark = [pytest.mark.system, pytest.mark.budget(120)]

STEPS = int(os.environ.get("ASH_TEST_STEPS", "30"))
SEQUENCES = int(os.environ.get("ASH_TEST_SEQUENCES", "2"))
BASE = 0


@dataclass(frozen=True)
class Content:
    """The content of a snapshot."""

    mark: str = ""
    mutable: bool = False


@dataclass(frozen=True)
class Snapshot:
    """The model of a snapshot; `undo` is its content before the last change."""

    parent: int | None
    description: str
    content: Content = Content()
    undo: Content | None = None


class Model(RuleBasedStateMachine):
    """Applies each command to a real system and to a dictionary."""

    image: Path
    directory: Path

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=self.directory)))
        self.system = self.stack.enter_context(open_system(self.image, directory))
        self.last = 0
        self.known = {BASE: Snapshot(None, "base snapshot")}
        self.changes = 0

    def teardown(self) -> None:
        self.stack.close()

    # The model

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.known)))

    def below(self, number: int) -> set[int]:
        children = {n for n, snapshot in self.known.items() if snapshot.parent == number}
        return {number}.union(*map(self.below, children))

    def deployed(self) -> set[int]:
        menu = json.loads((self.system.files.state / "menu").read_text())
        return {deployment["snapshot"] for deployment in menu["deployments"].values()}

    def add(self, number: int, source: int, parent: int | None, description: str) -> None:
        """A new snapshot has the number after the last one."""
        self.last += 1
        assert number == self.last
        self.known[number] = Snapshot(parent, description, self.known[source].content)

    def change(self, number: int, content: Content) -> None:
        before = self.known[number]
        self.known[number] = replace(before, content=content, undo=before.content)

    # The commands

    @rule(data=st.data(), command=st.sampled_from(["clone", "branch", "cbranch"]))
    def copy(self, data: st.DataObject, command: str) -> None:
        source = self.pick(data)
        parent = {"clone": None, "branch": source, "cbranch": self.known[source].parent}[command]
        word = "branch" if command == "branch" else "clone"
        self.add(int(self.system.ash("-q", command, source).stdout), source, parent, f"{word} of {source}")

    @rule(data=st.data())
    def ubranch(self, data: st.DataObject) -> None:
        parent, source = self.pick(data), self.pick(data)
        self.add(int(self.system.ash("-q", "ubranch", parent, source).stdout), source, parent, f"clone of {source}")

    @rule(data=st.data())
    def clone_tree(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(n for n in self.known if len(self.below(n)) < 4)))
        branch = self.below(source)
        copies = {int(k): v for k, v in self.system.ash("--json", "clone-tree", source).json["copies"].items()}
        assert copies.keys() == branch
        for old, new in sorted(copies.items(), key=lambda pair: pair[1]):
            above = self.known[old].parent
            text = f"clone of {source}" if old == source else self.known[old].description
            self.add(new, old, above if old == source or above is None else copies[above], text)

    @rule()
    def new(self) -> None:
        self.add(int(self.system.ash("-q", "new").stdout), BASE, None, "clone of 0")

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        number = self.pick(data)
        doomed = self.below(number)
        if BASE in doomed or doomed & self.deployed():
            self.system.ash("-y", "del", number, status=REFUSED)
            return
        self.system.ash("-y", "del", number)
        for gone in doomed:
            del self.known[gone]

    @rule(data=st.data(), text=st.text("ab \N{SNOWMAN}'$\"", min_size=1, max_size=9).filter(str.strip))
    def describe(self, data: st.DataObject, text: str) -> None:
        number = self.pick(data)
        self.system.ash("desc", "--", number, text)
        self.known[number] = replace(self.known[number], description=" ".join(text.split()))

    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        number = self.pick(data)
        self.changes += 1
        mark = f"change {self.changes}"
        if number == BASE:
            self.system.ash("run", number, "true", status=125)
            return
        self.system.shell(number, f"echo {mark} > /etc/mark")
        self.change(number, replace(self.known[number].content, mark=mark))

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        number = self.pick(data)
        if number != BASE:
            self.system.shell(number, "echo no > /etc/mark; exit 9", status=9)

    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        number = self.pick(data)
        before = self.known[number].undo
        if before is None:
            self.system.ash("undo", number, status=REFUSED)
            return
        self.system.ash("undo", number)
        self.change(number, before)

    @rule(data=st.data(), mutable=st.booleans())
    def mutable(self, data: st.DataObject, mutable: bool) -> None:
        number = self.pick(data)
        command = "mutable" if mutable else "immutable"
        if number == BASE:
            self.system.ash(command, number, status=REFUSED)
            return
        changed = self.system.ash("--json", command, number).json["changed"]
        assert changed == (self.known[number].content.mutable != mutable)
        if changed:
            self.change(number, replace(self.known[number].content, mutable=mutable))

    @rule(data=st.data())
    def deploy(self, data: st.DataObject) -> None:
        number = self.pick(data)
        self.system.ash("deploy", number)
        slot = self.system.files.default_slot()
        assert (self.system.root(slot) / "usr/share/ash/snap").read_text() == f"{number}\n"

    # Invariants after each command

    @invariant()
    def agrees(self) -> None:
        rows = {row["snapshot"]: row for row in self.system.ash("--json", "tree").json["tree"]}
        assert {n: (row["parent"], row["description"], row["mutable"]) for n, row in rows.items()} == {
            n: (one.parent, one.description, one.content.mutable) for n, one in self.known.items()
        }
        for number, one in self.known.items():
            for place in (self.system.root(number) / "etc/mark", self.system.files.etc(number) / "mark"):
                assert (place.read_text().strip() if place.exists() else "") == one.content.mark
        assert self.system.ash("--json", "fsck").json["damage"] == []


def test_any_sequence_of_commands_matches_the_model(image: Path, tmp_path: Path) -> None:
    Model.image, Model.directory = image, tmp_path
    run_sequences(Model, SEQUENCES, STEPS, shrink=True)
