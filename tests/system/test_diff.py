# SPDX-License-Identifier: AGPL-3.0-or-later
"""diff: the differences between snapshots."""

import os
import random
import shutil
from pathlib import Path

import pytest

from ash import changed_paths
from tests.support import MISSING, make_deb, program
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]


def test_diff_names_packages_and_configuration_files(system: System, snapshot: int, tmp_path: Path) -> None:
    files = {"etc/ash-test-conf": "1\n", "DEBIAN/conffiles": "/etc/ash-test-conf\n", "usr/share/ash-test-d/x": "x"}
    system.ash(
        "install", snapshot, make_deb(tmp_path, "ash-test-d", "1", files=files), make_deb(tmp_path, "ash-test-gone")
    )
    other = system.clone(snapshot)
    newer = make_deb(tmp_path, "ash-test-d", "2", files={**files, "etc/ash-test-conf": "2\n"})
    system.ash("install", other, newer, make_deb(tmp_path, "ash-test-new"), "--remove", "ash-test-gone")
    system.shell(other, "echo by hand > /etc/own; rm /etc/motd; chmod 600 /etc/issue")
    answer = system.ash("--json", "diff", snapshot, other).json
    assert (answer["from"], answer["to"]) == (snapshot, other)
    assert answer["packages"] == {
        "added": {"ash-test-new": "1"},
        "removed": {"ash-test-gone": "1"},
        "upgraded": {"ash-test-d": ["1", "2"]},
    }
    config = answer["config"]
    assert (config["etc/ash-test-conf"], config["etc/own"], config["etc/motd"], config["etc/issue"]) == (
        "changed",
        "added",
        "removed",
        "changed",
    )
    assert answer["files"] == {}
    assert not [path for path in config if path.startswith("usr/")]
    back = system.ash("--json", "diff", other, snapshot).json
    assert (back["config"]["etc/own"], back["packages"]["removed"]) == ("removed", {"ash-test-new": "1"})
    everything = system.ash("--json", "diff", snapshot, other, "--files").json["files"]
    assert everything["usr/share/ash/db/dpkg/status"] == "changed"
    patch = system.ash("diff", snapshot, other, "--patch").stdout
    assert "+by hand" in patch
    assert "-1\n+2\n" in patch
    assert "^ ash-test-d 1 -> 2" in patch
    assert system.ash("diff", snapshot, snapshot).stdout == "no difference\n"
    system.ash("diff", snapshot, 999999, status=MISSING)


Look = dict[str, tuple[object, ...]]


def look(top: Path) -> Look:
    """The compared properties of everything below a directory."""
    found: Look = {}
    for path in top.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(top))] = (status.st_mode, content, status.st_ino)
    return found


def differences(before: Look, after: Look) -> dict[str, str]:
    """The differences, found by comparing everything."""
    changed = {path: "changed" for path in before.keys() & after.keys() if before[path][:2] != after[path][:2]}
    return (
        changed
        | dict.fromkeys(after.keys() - before.keys(), "added")
        | dict.fromkeys(before.keys() - after.keys(), "removed")
    )


def shuffle(top: Path, chance: random.Random) -> None:
    """Make a random change below a directory."""
    there = sorted(top.rglob("*"))
    files, directories = [p for p in there if p.is_file() and not p.is_symlink()], [p for p in there if p.is_dir()]
    new = chance.choice([top, *directories]) / f"f{chance.randrange(12)}"
    match chance.randrange(8):
        case 0 if files:
            chance.choice(files).write_text(str(chance.random()))
        case 1 if files:
            chance.choice(files).unlink()
        case 2 if files:
            chance.choice(files).chmod(chance.choice([0o600, 0o644, 0o755]))
        case 3 if files and not new.exists():
            chance.choice(files).rename(new)
        case 4 if not new.exists():
            new.mkdir()
        case 5 if directories:
            shutil.rmtree(chance.choice(directories))
        case 6 if files and not new.exists():
            os.link(chance.choice(files), new)
        case _ if not new.is_dir():
            beside = new.with_name("beside")
            beside.write_text(str(chance.random()))
            beside.rename(new)


@pytest.mark.parametrize("seed", range(12))
def test_btrfs_and_a_full_comparison_find_the_same_changes(system: System, seed: int) -> None:
    chance = random.Random(seed)
    work = system.files.top / f"random-{seed}"
    program("btrfs", "subvolume", "create", work)
    for _ in range(25):
        shuffle(work, chance)
    old, new = work.with_name(f"{work.name}-old"), work.with_name(f"{work.name}-new")
    program("btrfs", "subvolume", "snapshot", "-r", work, old)
    for _ in range(chance.choice([1, 3, 10, 30])):
        shuffle(work, chance)
    program("btrfs", "subvolume", "snapshot", "-r", work, new)
    said, before, after = changed_paths(old, new), look(old), look(new)
    true = differences(before, after)
    for path, kind in true.items():
        # Of a moved directory only the directory is reported, and of hard links only one.
        above = {said.get(str(parent)) for parent in Path(path).parents}
        same = [other for other in said if other in after and path in after and after[other][2] == after[path][2]]
        assert path in said or same or above & {"added", "removed", "changed"}, f"{path} was {kind}: {said}"
    for path, kind in said.items():
        assert true.get(path, "changed") == kind or kind == "changed", f"{path} was {true.get(path)}, not {kind}"
    for made in (work, old, new):
        program("btrfs", "subvolume", "delete", made)
