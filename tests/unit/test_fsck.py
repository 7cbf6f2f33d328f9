# SPDX-License-Identifier: AGPL-3.0-or-later
"""fsck where others change a snapshot all the time: it is looked at under its lock, or fsck says that it was not."""

import itertools
from pathlib import Path

import pytest

from ash import Fsck, Layout, Problem, System, is_held
from distros.debian.ashpk import Debian

pytestmark = pytest.mark.budget(5)


@pytest.fixture
def fsck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fsck:
    """fsck of a system with a snapshot 5 that is another one at each look, and has a problem."""
    layout = Layout.at(tmp_path, "debian")
    layout.work(5).mkdir(parents=True)
    layout.tree.write_text('{"name": "root", "children": [{"name": 0}, {"name": 5}]}\n')
    versions = itertools.count()
    monkeypatch.setattr(Fsck, "_version", lambda *_: next(versions))
    monkeypatch.setattr(Fsck, "_look_at", lambda *_: [Problem(f"locked: {is_held(layout.work(5) / 'lock')}", 5)])
    monkeypatch.setattr(Fsck, "PATIENCE", 0)
    return Fsck(System(layout, Debian()))


def test_a_snapshot_that_never_keeps_still_is_looked_at_under_its_lock(fsck: Fsck) -> None:
    assert [one.what for one in fsck._snapshot(5)] == ["locked: True"]


def test_a_snapshot_that_could_not_be_looked_at_is_a_problem(fsck: Fsck) -> None:
    with fsck.system.lock(5):
        (found,) = fsck._snapshot(5)
    assert found.what.startswith("it was not checked")
    assert not found.repair
