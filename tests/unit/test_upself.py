# SPDX-License-Identifier: AGPL-3.0-or-later
"""Versions of ash: what `upself` takes for newer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ash

pytestmark = pytest.mark.budget(5)

PARTS = st.lists(st.integers(0, 999999999), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("older", "newer"), [("0.1.0", "0.1.1"), ("0.9", "0.10"), ("1", "1.0"), ("1.2", "2"), ("next", "0"), ("", "0.1")]
)
def test_a_version_is_newer_than_another(older: str, newer: str) -> None:
    assert ash.version_order(older) < ash.version_order(newer)


@pytest.mark.parametrize(
    "version", ["", "next", "1.", ".1", "1..2", "1.2-rc1", "-1", " 1", "1\n", "1" * 5000, "\u0661"]
)
def test_what_is_not_a_version_sorts_before_all_versions(version: str) -> None:
    assert ash.version_order(version) == []


@given(PARTS, PARTS)
def test_versions_are_ordered_by_their_numbers(one: list[int], other: list[int]) -> None:
    first, second = (".".join(map(str, parts)) for parts in (one, other))
    assert (ash.version_order(first) < ash.version_order(second)) == (one < other)
