# SPDX-License-Identifier: AGPL-3.0-or-later
"""The history: what is read from it, also from lines of an older ash, and the record of each snapshot's packages."""

from pathlib import Path
from typing import Any

import pytest

import ash
from ash import History, Layout, recorded_description

pytestmark = pytest.mark.budget(5)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout.at(tmp_path, "debian")
    layout.ash.mkdir(parents=True)
    return layout


def test_a_line_may_be_written_again_and_is_there_once(layout: Layout) -> None:
    history = History(layout)
    history.append({"id": "1", "result": "done"})
    for _ in range(2):
        history.append({"id": "2", "result": "done"}, again=True)
        history.append({"id": "", "result": "done"}, again=True)
    assert [entry["id"] for entry in history.read()] == ["1", "2", "", ""]


def test_a_torn_line_is_closed_by_the_next(layout: Layout) -> None:
    layout.history.write_text('{"time": "2026-01-0')
    History(layout).append({"result": "done"})
    assert [entry["result"] for entry in History(layout).read()] == ["done"]


def test_the_last_description_counts() -> None:
    history: list[dict[str, Any]] = [
        {"result": "done", "snapshot": 5, "from": 3, "description": "first"},
        {"result": "done", "snapshot": 6, "from": 3, "description": "another's"},
        {"result": "failed", "snapshot": 5, "description": "not said"},
    ]
    assert recorded_description(5, history) == "first"
    history.append({"result": "done", "command": "desc", "snapshot": 5, "description": "second"})
    assert recorded_description(5, history) == "second"


def test_older_lines_know_what_a_snapshot_was_copied_from() -> None:
    history: list[dict[str, Any]] = [
        {"result": "done", "command": "branch", "arguments": ["branch", "3", "-d", "x"], "snapshot": 5, "from": 3},
        {"result": "done", "snapshot": 7, "from": 5, "parent": None, "copies": {"5": 7, "6": 8}},
    ]
    assert [recorded_description(number, history) for number in (5, 7, 8, 9)] == [
        "copy of 3",
        "copy of 5",
        "copy of 6",
        "",
    ]


def test_a_record_of_packages_is_read_back(layout: Layout) -> None:
    ash.write_packages(layout, 5, {"hello": "2.10", "libc6": "2:41"})
    assert ash.read_packages(layout, 5) == {"hello": "2.10", "libc6": "2:41"}
    assert layout.packages(5).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("text", ["", '{"hello": "2.', "[]", '{"hello": 5}', "\0" * 20])
def test_a_torn_record_of_packages_is_none(text: str, layout: Layout) -> None:
    assert ash.read_packages(layout, 5) is None
    ash.write_packages(layout, 5, {})
    layout.packages(5).write_text(text)
    assert ash.read_packages(layout, 5) is None
