# SPDX-License-Identifier: AGPL-3.0-or-later
"""Debian versions sort as in dpkg."""

import itertools
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distros.debian.ashpk import Debian, version_key

pytestmark = pytest.mark.budget(20)

# In ascending order, from deb-version(7) and from packages of Debian.
ASCENDING = [
    "0~", "0", "1.0~~", "1.0~~a", "1.0~", "1.0~a", "1.0~rc1-1", "1.0", "1.0-1~bpo12+1", "1.0-1", "1.0-1+b1",
    "1.0-1+deb12u1", "1.0-1.1", "1.0-2", "1.0-10", "1.0a", "1.0b1", "1.0+", "1.0+dfsg", "1.0.1", "1.00001a", "1.2",
    "1.10", "1a", "2.0-1-1", "6.12.117+deb13-1", "20240118", "1:0", "1:0.1-2", "1:1:2", "2:0~",
]  # fmt: skip

PARTS = st.lists(
    st.sampled_from(["0", "1", "9", "10", "01", "a", "z", "A", ".", "+", "~", "-", "rc", "deb"]), max_size=6
)
VERSIONS = st.builds(
    lambda epoch, first, parts: f"{epoch}{first}{''.join(parts)}".rstrip("-"),
    st.sampled_from(["", "", "0:", "1:"]),
    st.sampled_from(["0", "1", "2"]),
    PARTS,
)


def dpkg_says_older(one: str, other: str) -> bool:
    argv = ["dpkg", "--compare-versions", one, "lt", other]
    return subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode == 0


def test_known_versions_are_in_order() -> None:
    assert sorted(ASCENDING, key=version_key) == sorted(ASCENDING, key=version_key)
    for older, newer in itertools.pairwise(ASCENDING):
        assert dpkg_says_older(older, newer) == (version_key(older) < version_key(newer)), (older, newer)


@settings(max_examples=300)
@given(VERSIONS, VERSIONS)
@example("1.0", "1.0-0")
@example("1:1:2", "1:1:10")
@example("1.0-0~", "1.0")
@example("1.0", "1.00")
def test_versions_compare_as_in_dpkg(one: str, other: str) -> None:
    assert Debian.package_manager.is_older(one, other) == dpkg_says_older(one, other)
    assert Debian.package_manager.is_older(other, one) == dpkg_says_older(other, one)
