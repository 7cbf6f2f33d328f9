# SPDX-License-Identifier: AGPL-3.0-or-later
"""The tests themselves: what tests/run prepares and cleans up, and whether their README is complete."""

import re
import signal
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from installer.machine import is_fault_of_emulator

pytestmark = pytest.mark.budget(5)

TESTS = Path(__file__).resolve().parent.parent
PROMISES = (TESTS.parent / "README.md").read_text().partition("## What you can rely on")[2].partition("\n## ")[0]
NAMED = set(re.findall(r"`((?:\w+/)*\w+\.py)`", (TESTS / "README.md").read_text()))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tests/run as a module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which it sets itself
    spec = spec_from_loader("tests_run", SourceFileLoader("tests_run", str(TESTS / "run")))
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_is_in_the_readme() -> None:
    modules = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    assert modules - NAMED == set()


def test_the_readme_names_only_files_that_exist() -> None:
    known = {path.name for directory in (TESTS.parent.glob("*.py"), TESTS.rglob("*.py")) for path in directory}
    assert {name for name in NAMED if not (TESTS / name).is_file() and name not in known} == set()


def test_the_table_of_behaviours_has_one_row_for_each_module() -> None:
    table = (TESTS / "README.md").read_text().partition("## Which module tests what")[2].partition("\n## ")[0]
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", table)
    assert sorted(named) == sorted(set(named))


def test_each_promise_of_the_project_has_tests() -> None:
    promised = re.findall(r"^\* \*\*(.+?)\.\*\*", PROMISES, re.MULTILINE)
    assert len(promised) > 5
    rows = dict(re.findall(r"^\| ([^|*`]+) \| (`.*`) \|$", (TESTS / "README.md").read_text(), re.MULTILINE))
    for promise in promised:
        for module, _, test in (name.strip("`").partition("::") for name in rows[promise].split(", ")):
            assert f"def {test or 'test_'}" in (TESTS / module).read_text(), f"{promise}: {module}::{test}"


@pytest.mark.parametrize(
    ("line", "image"),
    [
        ("", True),
        ("-x -k purge", True),
        ("tests/unit", False),
        ("-v tests/unit/test_tree.py::test_any_text_is_a_tree_or_an_error -x", False),
        ("tests/unit tests/system/test_undo.py", True),
        ("tests/unit/../system", True),
        ("tests", True),
        ("tests/boot", True),
        ("tests/campaigns", True),
    ],
)
def test_only_unit_tests_need_no_image(run: Any, line: str, image: bool) -> None:
    assert run.needs_image(line.split()) is image


def test_a_program_beside_a_block_is_stopped_if_an_exception_leaves_the_block(run: Any) -> None:
    with pytest.raises(KeyError), run.started("sleep", "600") as process:
        raise KeyError
    assert process.returncode == -signal.SIGTERM


def test_only_impossible_flags_are_a_fault_of_the_emulator() -> None:
    oops = "RIP: 0010:mas_find+0x9/0x160\nRSP: 0018:ff2d327f40013a98 EFLAGS: {}\nKernel panic - not syncing: ...\n"
    assert is_fault_of_emulator(oops.format("b56cc646"))
    assert not is_fault_of_emulator(oops.format("00010246"))
    assert not is_fault_of_emulator("Kernel panic - not syncing: VFS: Unable to mount root fs\n")
