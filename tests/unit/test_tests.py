# SPDX-License-Identifier: AGPL-3.0-or-later
"""The tests' README: its table has every test module, and names no file that is missing."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.budget(5)

TESTS = Path(__file__).resolve().parent.parent
NAMED = set(re.findall(r"`((?:\w+/)*\w+\.py)`", (TESTS / "README.md").read_text()))


def test_every_module_is_in_the_readme() -> None:
    modules = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    assert modules - NAMED == set()


def test_the_readme_names_only_files_that_exist() -> None:
    known = {path.name for directory in (TESTS.parent.glob("*.py"), TESTS.rglob("*.py")) for path in directory}
    assert {name for name in NAMED if not (TESTS / name).is_file() and name not in known} == set()
