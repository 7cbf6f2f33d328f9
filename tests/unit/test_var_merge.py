# SPDX-License-Identifier: AGPL-3.0-or-later
"""The merge into /var: which downloaded packages are kept when a transaction fails."""

from pathlib import Path

import pytest

from ash import VarMerge
from distros.debian.ashpk import Debian

pytestmark = pytest.mark.budget(5)


@pytest.fixture
def merge(tmp_path: Path) -> VarMerge:
    """A merge from `upper` into `live`, with downloads of apt and of dnf."""
    upper, live = tmp_path / "upper", tmp_path / "live"
    for name in ("apt/archives/new.deb", "apt/archives/partial/x.deb", "libdnf5/fedora-01ab/packages/new.rpm"):
        (upper / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (upper / "cache" / name).write_text("new")
    (live / "cache/apt/archives").mkdir(parents=True)
    (live / "cache/apt/archives/old.deb").write_text("old")
    (upper / "cache/apt/archives/old.deb").write_text("new")
    return VarMerge(upper, tmp_path / "origin", live, Debian.package_manager, tmp_path / "conflicts", delete=())


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory / "cache").as_posix() for path in directory.rglob("*") if path.is_file()}


def test_new_downloads_are_added_and_others_are_not_replaced(merge: VarMerge) -> None:
    merge.add_files("cache/apt/archives/*.deb")
    assert files(merge.live) == {"apt/archives/new.deb", "apt/archives/old.deb"}
    assert (merge.live / "cache/apt/archives/old.deb").read_text() == "old"


def test_a_cache_may_be_nested(merge: VarMerge) -> None:
    merge.add_files("cache/libdnf5/*/packages/*.rpm")
    assert files(merge.live) == {"apt/archives/old.deb", "libdnf5/fedora-01ab/packages/new.rpm"}


@pytest.mark.parametrize("side", ["upper", "live"])
def test_symlinks_are_not_followed(merge: VarMerge, tmp_path: Path, side: str) -> None:
    cache = getattr(merge, side) / "cache"
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    before = {path.name for path in (tmp_path / "elsewhere").rglob("*")}
    merge.add_files("cache/apt/archives/*.deb")
    merge.add_files("cache/libdnf5/*/packages/*.rpm")
    assert {path.name for path in (tmp_path / "elsewhere").rglob("*")} == before
    assert not (tmp_path / "live/cache/apt/archives/new.deb").exists()
