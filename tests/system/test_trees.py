# SPDX-License-Identifier: AGPL-3.0-or-later
"""Commands on whole trees: a failure in one branch does not stop the others, and everything is fetched once."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from tests.archive import Archive, use_only
from tests.support import DONE, FAILED, MISSING, USAGE, kill_hard, make_deb, program, wait_until
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(270)]

LARGE = 32 << 20


@pytest.fixture(scope="module")
def old(system: System, archive: Archive, url: str) -> int:
    """A snapshot with the old version of a package; the repository has a new one, with a large file."""
    archive.add("ash-test-tool", "1", files={"usr/share/tool": "one\n"})
    archive.add("ash-test-other", "1", files={"usr/share/other": "one\n"})
    conf = {"etc/ash-conf/conf": "x\n", "usr/share/ash-conf": "x\n", "DEBIAN/conffiles": "/etc/ash-conf/conf\n"}
    archive.add("ash-test-conf", "1", files=conf)
    archive.add("ash-test-own", "1")
    archive.add("ash-test-rival", "1", conflicts="ash-test-own")
    archive.add("ash-test-needing", "1", depends="ash-test-needed")
    archive.add("ash-test-needed", "1")
    number = system.clone()
    system.shell(number, use_only(url))
    system.ash("refresh", number)
    system.ash("install", number, "ash-test-tool")
    archive.add("ash-test-tool", "2", files={"usr/share/tool": "two\n"})
    return number


@pytest.fixture
def tree(system: System, old: int) -> list[int]:
    """A tree of five: a root, two branches, and two more below the first. The second cannot reach the repository."""
    root = system.clone(old)
    one, two = system.branch(root), system.branch(root)
    return [root, one, two, system.branch(one), system.branch(one)]


def versions(system: System, numbers: list[int], name: str = "ash-test-tool") -> list[str | None]:
    return [system.ash("--json", "list", number).json["packages"].get(name) for number in numbers]


@pytest.mark.parametrize("options", [[], ["-j"], ["--jobs", "5"]])
def test_a_tree_is_upgraded_and_everything_is_fetched_once(
    system: System, archive: Archive, old: int, options: list[str]
) -> None:
    root = system.clone(old)
    one, two = system.branch(root), system.branch(root)
    numbers = [root, one, two, system.branch(one), system.branch(one)]
    program("sh", "-c", f"rm -f {system.files.var}/cache/apt/archives/ash-test*")
    archive.fetched("")
    answer = system.ash("--json", "tree-upgrade", root, *options).json
    assert versions(system, numbers) == ["2"] * 5
    assert sorted(done["snapshot"] for done in answer["snapshots"]) == sorted(numbers)
    assert answer["failed"] == {}
    asked = archive.fetched("")
    assert len([path for path in asked if path.endswith("InRelease")]) == 1
    assert len([path for path in asked if path.endswith(".deb")]) == 1
    system.is_sound()


def test_packages_of_a_tree_can_be_downloaded_in_advance(system: System, old: int, archive: Archive) -> None:
    root = system.clone(old)
    below = system.branch(root)
    program("sh", "-c", f"rm -f {system.files.var}/cache/apt/archives/ash-test*")
    archive.fetched("")
    outcome = system.ash("tree-upgrade", root, "--download-only")
    assert outcome.stdout == "fetched the packages for the next upgrade\n"
    assert len(archive.fetched("deb$")) == 1
    assert versions(system, [root, below]) == ["1", "1"]
    assert "upgraded" in system.ash("--json", "--dry-run", "tree-upgrade", root, "--download-only").stdout
    system.shell(below, use_only("http://127.0.0.2:9"))
    outcome = system.ash("tree-upgrade", root, "--download-only", "--strict", status=FAILED)
    assert "fetched the packages" not in outcome.stdout


def test_the_packages_of_a_profile_are_removed_from_a_tree(system: System, old: int, tmp_path: Path) -> None:
    profile = tmp_path / "tool.conf"
    profile.write_text("[packages]\nash-test-tool ash-test-nowhere\n")
    root = system.clone(old)
    below = system.branch(root)
    system.ash("tremove", "-P", profile, "-s", root)
    assert versions(system, [root, below]) == [None, None]
    assert "not installed in any of" in system.ash("tree-rmpkg", root, "--profile", profile, status=MISSING).error


def test_a_failing_branch_does_not_stop_the_others(system: System, tree: list[int]) -> None:
    system.shell(
        tree[1],
        "printf '#!/bin/sh\\nexit 1\\n' > /var/lib/dpkg/info/ash-test-tool.prerm; chmod +x /var/lib/dpkg/info/ash-test-tool.prerm",
    )
    outcome = system.ash("tree-upgrade", tree[0], "-j", status=FAILED)
    assert versions(system, tree) == ["2", "1", "2", "2", "2"]
    assert re.search(rf"^snapshot {tree[1]} failed: .*", outcome.stdout, re.MULTILINE)
    assert outcome.stdout.startswith("upgrading 5 snapshots: 4 changed, 1 failed\n")
    assert not system.remains()


@pytest.mark.parametrize("command", ["tree-upgrade", "sync"])
def test_a_branch_with_unreadable_sources_does_not_stop_the_others(
    system: System, tree: list[int], command: str
) -> None:
    system.shell(tree[1], "rm -r /etc/apt; ln -s apt /etc/apt")
    answer = system.ash("--json", command, tree[0], "-j", status=FAILED).json
    assert answer["failed"] == {str(tree[1]): "too many levels of symlinks in etc/apt"}
    assert versions(system, tree) == ["2", "1", "2", "2", "2"]
    assert not system.remains()


@pytest.mark.parametrize("words", [["tree-upgrade"], ["tree-rmpkg", "ash-test-tool"], ["sync"], ["force-sync"]])
def test_a_branch_with_an_unreadable_package_database_does_not_stop_the_others(
    system: System, tree: list[int], words: list[str]
) -> None:
    system.ash("install", tree[0], "ash-test-other")
    root = system.root(tree[1])
    program("btrfs", "property", "set", "-ts", root, "ro", "false")
    database = root / "usr/share/ash/db/dpkg"
    database.rename(database.with_name("elsewhere"))
    database.symlink_to("dpkg")
    program("btrfs", "property", "set", "-ts", root, "ro", "true")
    answer = system.ash("--json", words[0], tree[0], *words[1:], status=FAILED).json
    system.ash("-y", "del", tree[1])
    below = tree[3:] if "sync" in words[0] else []  # they cannot be synced with it
    assert answer["failed"].keys() == {str(number) for number in (tree[1], *below)}
    assert re.search("[Tt]oo many levels of sym", answer["failed"][str(tree[1])])
    assert {done["snapshot"] for done in answer["snapshots"] if done["changed"]} == {
        number for number in tree if number not in (tree[1], *below) and (number, words) != (tree[0], ["force-sync"])
    }


@pytest.mark.parametrize("command", ["tree-upgrade", "sync"])
def test_strict_fails_only_the_branches_with_an_unreachable_repository(
    system: System, tree: list[int], command: str
) -> None:
    for number in tree[1:4:2]:
        system.shell(number, use_only("http://127.0.0.1:9"))
    outcome = system.ash(command, tree[0], "--strict", status=FAILED)
    assert versions(system, tree) == ["2", "1", "2", "1", "2"]
    failed = re.findall(r"^snapshot (\d+) failed: (no repository can be reached: .*)$", outcome.stdout, re.MULTILINE)
    assert [int(number) for number, _ in failed] == [tree[1], tree[3]]
    assert outcome.stdout.startswith(f"{'upgrading' if command == 'tree-upgrade' else 'synchronizing'} 5 snapshots: 3 ")


def test_lists_fetched_before_a_failure_are_not_a_change(system: System, old: int) -> None:
    good, dead = system.clone(old), system.clone(old)
    system.shell(good, "echo '# another' >> /etc/apt/sources.list; rm -r /var/lib/apt/lists/*")
    system.shell(dead, use_only("http://127.0.0.1:9"))
    outcome = system.ash("upgrade", "--strict", "--snapshots", good, dead, status=FAILED)
    assert "no repository can be reached" in outcome.stderr
    assert "changed" not in outcome.stderr
    assert versions(system, [good, dead]) == ["1", "1"]


def test_a_package_that_fails_in_each_branch_is_fetched_once(
    system: System, archive: Archive, old: int, tmp_path: Path
) -> None:
    broken = Archive(tmp_path / "broken")
    broken.add("ash-test-tool", "3", postinst="exit 1")
    with broken.served() as url:
        root = system.clone(old)
        system.shell(root, use_only(url))
        one, two = system.branch(root), system.branch(root)
        answer = system.ash("--json", "tree-upgrade", root, status=FAILED).json
    assert answer["failed"].keys() == {str(number) for number in (root, one, two)}
    asked = broken.fetched("")
    assert len([path for path in asked if path.endswith("InRelease")]) == 1
    assert len([path for path in asked if path.endswith(".deb")]) == 1


@pytest.mark.parametrize("command", ["tree-upgrade", "sync"])
def test_an_unresponsive_repository_is_asked_once(system: System, archive: Archive, old: int, command: str) -> None:
    root = system.clone(old)
    system.shell(root, "sed -i 's|[.]/$|nothing/|' /etc/apt/sources.list")
    numbers = [root, system.branch(root), system.branch(root)]
    archive.fetched("")
    system.ash(command, root)
    assert versions(system, numbers) == ["1"] * 3
    assert len(archive.fetched("nothing/InRelease$")) == 1


def test_a_package_held_in_only_one_branch_is_fetched_once(system: System, archive: Archive, old: int) -> None:
    root = system.clone(old)
    branches = [system.branch(root) for _ in range(3)]
    system.ash("hold", root, "ash-test-tool")
    program("sh", "-c", f"rm -f {system.files.var}/cache/apt/archives/ash-test*")
    archive.fetched("")
    system.ash("tree-upgrade", root, "-j")
    assert versions(system, [root, *branches]) == ["1", "2", "2", "2"]
    assert len(archive.fetched("deb$")) == 1


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_packages_that_sync_installs_are_fetched_once(
    system: System, archive: Archive, old: int, force: list[str]
) -> None:
    root = system.clone(old)
    branches = [system.branch(root) for _ in range(3)]
    system.ash("install", root, "ash-test-other")
    program("sh", "-c", f"rm -f {system.files.var}/cache/apt/archives/ash-test*")
    archive.fetched("")
    system.ash("sync", root, "-j", *force)
    assert versions(system, branches, "ash-test-other") == ["1"] * 3
    assert len(archive.fetched("ash-test-other.*deb$")) == 1


def test_downloads_of_a_failed_change_are_reused(system: System, archive: Archive, old: int, tmp_path: Path) -> None:
    broken = Archive(tmp_path / "broken")
    broken.add("ash-test-broken", "1", postinst="exit 1")
    cache = system.files.var / "cache/apt/archives"
    with broken.served() as url:
        number = system.clone(old)
        system.shell(number, f"{use_only(url)}; apt-get update")
        for _ in range(2):
            system.ash("install", number, "ash-test-broken", status=FAILED)
    assert len(broken.fetched("deb$")) == 1
    assert [path.name for path in cache.glob("ash-test-broken*")] == ["ash-test-broken_1_all.deb"]
    assert not system.remains()


def test_a_failed_change_leaves_only_downloads(system: System, old: int) -> None:
    cache = system.files.var / "cache/apt/archives"
    (cache / "there.deb").write_text("live\n")
    number = system.clone(old)
    script = "cd /var/cache/apt/archives; echo x | tee there.deb partial/part.deb none > new.deb; ln -s /etc/shadow link.deb; mkdir directory.deb"
    before = {path.name for path in cache.iterdir()}
    system.shell(number, f"{script}; exit 1", status=FAILED)
    assert {path.name for path in cache.iterdir()} == before | {"new.deb"}
    assert (cache / "there.deb").read_text() == "live\n"
    system.shell(
        number, "cd /var/cache/apt; mv archives else; ln -s else archives; touch else/late.deb; exit 1", status=FAILED
    )
    assert not (cache / "late.deb").exists()


def test_without_a_terminal_there_is_only_a_summary(system: System, tree: list[int]) -> None:
    outcome = system.ash("tree-upgrade", tree[0])
    assert outcome.stderr == ""
    assert outcome.stdout.count("ash-test-tool 1 -> 2") == 5
    assert "\x1b" not in outcome.stdout
    assert system.ash("tree-upgrade", tree[0]).stdout == "upgrading 5 snapshots: 5 unchanged\n"


def test_on_a_terminal_each_branch_has_a_line(system: System, tree: list[int]) -> None:
    with system.terminal("tree-upgrade", tree[0], "--jobs", "2") as terminal:
        for number in tree:
            terminal.expect(rf"upgrading snapshot {number}: ")
        terminal.expect(rf"upgrading snapshot {tree[0]}: changed")
        terminal.expect(rf"upgrading snapshot {tree[-1]}: changed")
        terminal.expect(r"5 snapshots: 5 changed")
        assert terminal.wait() == DONE


def test_a_terminal_with_few_rows_has_no_more_lines(
    system: System, tree: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES", "4")
    with system.terminal("tree-upgrade", tree[0], "--jobs", "2") as terminal:
        drawn = terminal.expect(r"5 snapshots: 5 changed")
        assert terminal.wait() == DONE
    drawn = drawn.rpartition("\x1b")[0]
    assert {int(lines) for lines in re.findall(r"\x1b\[(\d+)A", drawn)} == {3}
    assert f"upgrading snapshot {tree[0]}: " in drawn
    assert f"upgrading snapshot {tree[4]}: " in drawn
    assert "... 3 more" in drawn


def test_a_dry_run_reports_each_snapshot_and_changes_nothing(system: System, tree: list[int]) -> None:
    with system.nothing_changes():
        answer = system.ash("--json", "--dry-run", "tree-upgrade", tree[0]).json
    assert len(answer["would"]) == 5
    assert answer["would"][4]["packages"]["upgraded"] == {"ash-test-tool": ["1", "2"]}


def test_a_dry_run_of_sync_reports_everything_it_would_do(system: System, old: int) -> None:
    parent = system.clone(old)
    system.ash("install", parent, "ash-test-conf")
    child = system.branch(parent)
    system.ash("install", parent, "ash-test-other")
    system.ash("remove", parent, "ash-test-conf")
    program("sh", "-c", f"rm -f {system.files.var}/cache/apt/archives/ash-test*")
    with system.nothing_changes():
        one, other = system.ash("--json", "--dry-run", "sync", parent).json["would"]
    assert one["packages"] == {"added": {}, "removed": {}, "upgraded": {"ash-test-tool": ["1", "2"]}}
    assert (other["snapshot"], other["changed"]) == (child, True)
    assert other["packages"]["upgraded"] == {"ash-test-tool": ["1", "2"]}
    assert other["packages"]["added"] == {"ash-test-other": "1"}
    assert other["packages"]["removed"] == {"ash-test-conf": "1"}
    assert other["download"] > one["download"] > 0


def test_sync_names_the_configuration_that_it_brings_or_would_bring(system: System, snapshot: int) -> None:
    child = system.branch(snapshot)
    system.shell(snapshot, "mkdir /etc/dir; echo own > /etc/dir/own")
    system.shell(child, "echo other > /etc/other")
    with system.nothing_changes():
        planned = system.ash("--json", "--dry-run", "force-sync", snapshot).json["would"]
    done = system.ash("--json", "force-sync", snapshot).json["snapshots"]
    for parent, branch in (planned, done):
        assert (parent["changed"], "brought" in parent) == (False, False)
        assert (branch["changed"], branch["brought"]) == (True, ["dir", "dir/own"])
    system.ash("undo", child)
    assert "brought into /etc: dir, dir/own" in system.ash("force-sync", snapshot).stdout


def test_a_killed_tree_command_leaves_nothing_and_can_be_repeated(system: System, tree: list[int]) -> None:
    process = system.start("tree-upgrade", tree[0], "--jobs", "3")
    wait_until(lambda: versions(system, tree[:1]) == ["2"] or process.poll() is not None)
    assert process.poll() is None, "it had ended before it was killed"
    kill_hard(process)
    wait_until(lambda: not system.processes())
    system.ash("recover")
    assert not system.remains()
    assert system.ash("--json", "fsck").json["damage"] == []
    system.ash("tree-upgrade", tree[0], "-j")
    assert versions(system, tree) == ["2"] * 5


def test_eight_siblings_cost_little_more_than_one(system: System, tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive")
    archive.add("ash-test-large", "1")
    with archive.served() as url:
        one = system.clone()
        system.shell(one, f"{use_only(url)}; apt-get update; apt-get -y install ash-test-large")
        root = system.clone(one)
        for _ in range(7):
            system.branch(root)
        archive.add(
            "ash-test-large", "2", files={"usr/share/large": os.urandom(LARGE // 2).hex(), "boot/large": "x" * 9999}
        )
        system.ash("upgrade", one, "--download-only")
        before = used(system)
        system.ash("upgrade", one)
        alone, before = used(system) - before, used(system)
        system.ash("tree-upgrade", root, "-j")
        assert used(system) - before < 1.3 * alone
    for number in range(root, root + 8):
        assert (system.root(number) / "usr/share/large").stat().st_size == LARGE


def test_files_that_a_command_creates_in_each_branch_share_their_blocks(system: System) -> None:
    root = system.clone()
    numbers = [root, *(system.branch(root) for _ in range(3))]
    script = "srand 1; print pack q(N*), map { rand 2**32 } 1..4e6"  # the same in each, and incompressible
    system.ash("tree-run", root, "true")  # creates ash's reserve
    before = used(system)
    system.ash("tree-run", "-j", root, "sh", "-c", f"perl -e '{script}' > /usr/share/large")
    assert {(system.root(number) / "usr/share/large").stat().st_size for number in numbers} == {16 * 10**6}
    assert used(system) - before < 1.3 * 16 * 10**6


def test_siblings_generate_identical_initramfs_files(system: System) -> None:
    root = system.clone()
    made = []
    for number in (root, system.branch(root)):
        system.ash("run", number, "sh", "-c", "rm /boot/initrd*; update-initramfs -c -k all")
        made.append(next(system.root(number).glob("boot/initrd.img-*")).read_bytes())
    assert made[0] == made[1]


def used(system: System) -> int:
    """The bytes that are allocated on the disk."""
    program("btrfs", "filesystem", "sync", system.files.top)
    status = os.statvfs(system.files.top)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_a_package_is_removed_from_every_snapshot_that_has_it(system: System, tree: list[int]) -> None:
    system.ash("remove", tree[2], "ash-test-tool")
    answer = system.ash("--json", "tree-rmpkg", tree[0], "ash-test-tool").json
    assert versions(system, tree) == [None] * 5
    changed = {done["snapshot"]: done["changed"] for done in answer["snapshots"]}
    assert changed == {number: number != tree[2] for number in tree}
    system.ash("tree-rmpkg", tree[0], "ash-test-tool", status=MISSING)
    system.ash("tremove", tree[0], status=USAGE)


def test_tree_commands_include_mutable_snapshots(system: System, tree: list[int]) -> None:
    system.ash("mutable", tree[1])
    answer = system.ash("--json", "tree-upgrade", tree[0]).json
    assert {done["snapshot"] for done in answer["snapshots"] if done["changed"]} == {*tree}
    assert versions(system, tree) == ["2"] * 5
    undo = system.files.undo(tree[1])
    assert "ro=true" in program("btrfs", "property", "get", "-ts", undo, "ro")
    system.ash("undo", tree[1])
    assert versions(system, tree) == ["2", "1", "2", "2", "2"]
    system.shell(tree[1], "touch /etc/written")
    system.ash("immutable", tree[1])
    system.is_sound()


def test_tree_run_runs_in_parallel_too(system: System, tree: list[int]) -> None:
    outcome = system.ash("tree-run", "-j", tree[0], "sh", "-c", "echo done > /etc/mark; echo here", status=DONE)
    assert all((system.root(number) / "etc/mark").exists() for number in tree)
    assert outcome.stdout.count("here\n") == 5


# sync: a branch gets the changes of its parent


def test_a_branch_gets_the_packages_its_parent_got(system: System, old: int) -> None:
    parent = system.clone(old)
    child = system.branch(parent)
    system.shell(child, "echo own > /etc/own")
    system.ash("install", parent, "ash-test-other")
    system.shell(
        parent, "apt-mark auto ash-test-other; mkdir /etc/new; echo new > /etc/new/file; echo theirs > /etc/own"
    )
    system.ash("force-sync", parent)
    assert versions(system, [child], "ash-test-other") == ["1"]
    assert versions(system, [child]) == ["1"], "it was upgraded"
    assert "ash-test-other" in system.ash("run", child, "apt-mark", "showauto").stdout
    assert (system.root(child) / "etc/new/file").read_text() == "new\n"
    assert (system.root(child) / "etc/own").read_text() == "own\n"
    system.ash("sync", parent)
    assert versions(system, [parent, child]) == ["2", "2"]
    assert system.ash("--json", "sync", parent).json["changed"] is False


def test_a_package_that_the_branch_removed_stays_removed(system: System, old: int) -> None:
    parent = system.clone(old)
    system.ash("install", parent, "ash-test-other")
    system.shell(parent, "echo x > /etc/old-file")
    child = system.branch(parent)
    system.ash("remove", child, "ash-test-other")
    system.shell(child, "rm /etc/old-file")
    system.ash("sync", parent, "--force")
    assert versions(system, [child], "ash-test-other") == [None]
    assert not (system.root(child) / "etc/old-file").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_a_package_removed_from_the_parent_is_removed_unless_the_branch_installed_it(
    system: System, old: int, keep: bool
) -> None:
    parent = system.clone(old)
    asked = system.branch(parent)
    system.ash("install", asked, "ash-test-other")
    system.ash("install", parent, "ash-test-other")
    child = system.branch(parent)
    system.ash("remove", parent, "ash-test-other")
    system.ash("force-sync", parent, *(["--keep"] if keep else []))
    assert versions(system, [asked, child], "ash-test-other") == ["1", "1" if keep else None]


@pytest.mark.parametrize("upgrades", ["sync", "force-sync"])
def test_a_package_that_the_branch_installed_is_not_displaced(system: System, old: int, upgrades: str) -> None:
    parent = system.clone(old)
    child, beside = system.branch(parent), system.branch(parent)
    system.ash("install", child, "ash-test-own")
    system.ash("install", parent, "ash-test-rival")
    said = f"snapshot {child} failed: the parent's packages conflict with ash-test-own"
    with system.nothing_changes():
        planned = system.ash("--dry-run", upgrades, parent, status=FAILED).stdout
    assert said.replace(" failed", "") in planned
    assert said in system.ash(upgrades, parent, status=FAILED).stdout
    assert versions(system, [parent, child, beside], "ash-test-own") == [None, "1", None]
    assert versions(system, [parent, child, beside], "ash-test-rival") == ["1", None, "1"]


def test_a_package_that_the_parent_replaced_is_removed(system: System, old: int) -> None:
    parent = system.clone(old)
    system.ash("install", parent, "ash-test-own")
    child = system.branch(parent)
    system.ash("install", parent, "ash-test-rival")
    system.ash("force-sync", parent)
    assert versions(system, [parent, child], "ash-test-own") == [None, None]
    assert versions(system, [parent, child], "ash-test-rival") == ["1", "1"]


def test_a_package_that_the_parent_did_not_remove_stays_even_if_unneeded(system: System, old: int) -> None:
    parent = system.clone(old)
    system.ash("install", parent, "ash-test-other", "ash-test-conf", "ash-test-needed")
    child = system.branch(parent)
    system.ash("install", child, "ash-test-needing")
    system.shell(child, "apt-mark auto ash-test-other ash-test-needing")
    system.ash("remove", parent, "ash-test-conf", "ash-test-needed")
    planned = system.ash("--json", "--dry-run", "force-sync", parent).json["would"]
    assert planned[1]["packages"]["removed"] == {"ash-test-conf": "1"}
    system.ash("force-sync", parent)
    assert versions(system, [child], "ash-test-conf") == [None]
    assert versions(system, [child], "ash-test-needed") == ["1"], "another needs it"
    assert versions(system, [child], "ash-test-needing") == ["1"]
    assert versions(system, [parent, child], "ash-test-other") == ["1", "1"]
    assert {"ash-test-other", "ash-test-needing"} <= {*system.ash("run", child, "apt-mark", "showauto").stdout.split()}
    assert system.ash("--json", "force-sync", parent).json["changed"] is False


def test_a_grandchild_gets_what_its_parent_got_in_the_same_sync(system: System, tree: list[int]) -> None:
    system.ash("install", tree[0], "ash-test-other")
    system.ash("force-sync", tree[0], "-j")
    assert versions(system, tree, "ash-test-other") == ["1"] * 5


def test_files_of_a_package_come_only_with_the_package(system: System, old: int) -> None:
    parent = system.clone(old)
    child = system.branch(parent)
    system.ash("install", "--snapshots", parent, child, "-p", "ash-test-conf")
    system.ash("remove", child, "ash-test-conf", "--purge")
    system.shell(parent, "echo edited > /etc/ash-conf/conf; ln -s ash-conf/conf /etc/to-conf; ln -s new /etc/a-link")
    system.shell(parent, "ln -s /usr/share/ash-conf /etc/to-usr; ln -s /run/nothing /etc/to-run; touch /etc/new")
    system.shell(parent, "echo /opt/ash-test > /etc/ld.so.conf.d/own.conf")
    system.shell(child, "mkdir /opt/ash-test; cp /lib/*/libc.so.6 /opt/ash-test/libown.so.1")
    system.ash("force-sync", parent)
    assert b"/opt/ash-test/" in (system.root(child) / "etc/ld.so.cache").read_bytes()
    there = {path.name for path in (system.root(child) / "etc").iterdir()}
    assert there & {"ash-conf", "to-conf", "to-usr", "to-run", "new", "a-link"} == {"to-run", "new", "a-link"}


def test_configuration_of_a_package_that_a_branch_deleted_stays_deleted(system: System, old: int) -> None:
    parent = system.clone(old)
    system.ash("install", parent, "ash-test-conf")
    child = system.branch(parent)
    system.shell(child, "rm /etc/ash-conf/conf")
    time.sleep(2)  # longer than the resolution of the history
    system.shell(parent, "echo edited > /etc/ash-conf/conf")
    system.ash("force-sync", parent)
    assert not (system.root(child) / "etc/ash-conf/conf").exists()


def test_a_foreign_package_is_synced_with_its_architecture(system: System, archive: Archive, old: int) -> None:
    native = program("dpkg", "--print-architecture").strip()
    for architecture in (native, "i386"):
        archive.add("ash-test-foreign", architecture=architecture)
    parent = system.clone(old)
    child = system.branch(parent)
    system.shell(parent, "dpkg --add-architecture i386")
    system.ash("refresh", parent)
    system.ash("install", parent, "ash-test-foreign:i386")
    system.shell(parent, "apt-mark auto ash-test-foreign:i386")
    system.ash("force-sync", parent)
    assert versions(system, [child], "ash-test-foreign:i386") == ["1"]
    assert versions(system, [child], "ash-test-foreign") == [None]
    assert "ash-test-foreign:i386" in system.ash("run", child, "apt-mark", "showauto").stdout


def test_a_copy_below_another_snapshot_gets_the_packages_it_already_had(system: System, old: int) -> None:
    parent, other = system.clone(old), system.clone(old)
    time.sleep(2)  # longer than the resolution of the history
    system.shell(parent, "echo older > /etc/older")
    system.ash("install", parent, "ash-test-other")
    system.ash("remove", other, "ash-test-tool")
    child = system.ash("--json", "ubranch", parent, other).json["snapshot"]
    system.ash("force-sync", parent)
    assert (system.root(child) / "etc/older").read_text() == "older\n"
    assert versions(system, [child], "ash-test-other") == ["1"]
    assert versions(system, [child]) == [None], "what the original took out came back"


def test_a_copy_of_a_branch_keeps_the_package_choices_of_the_branch(system: System, old: int) -> None:
    parent = system.clone(old)
    system.ash("install", parent, "ash-test-conf")
    child = system.branch(parent)
    system.ash("remove", child, "ash-test-tool")
    system.ash("install", child, "ash-test-other")
    system.ash("install", parent, "ash-test-other")
    beside = system.ash("--json", "cbranch", child).json["snapshot"]
    copies = system.ash("--json", "clone-tree", parent).json["copies"]
    above, below = copies[str(parent)], copies[str(child)]
    for number in (parent, above):
        system.ash("remove", number, "ash-test-other", "ash-test-conf")
        system.ash("force-sync", number)
    assert versions(system, [child, beside, below]) == [None] * 3
    assert versions(system, [child, beside, below], "ash-test-other") == ["1"] * 3
    assert versions(system, [child, beside, below], "ash-test-conf") == [None] * 3


def test_packages_from_no_repository_stop_only_their_branch(system: System, tree: list[int], tmp_path: Path) -> None:
    system.ash("install", tree[1], make_deb(tmp_path, "ash-test-local"))
    system.ash("install", tree[0], "ash-test-other")
    answer = system.ash("--json", "force-sync", tree[0], status=FAILED).json
    assert set(answer["failed"]) == {str(tree[3]), str(tree[4])}
    assert versions(system, tree, "ash-test-other") == ["1", "1", "1", None, None]


def test_sync_goes_by_the_order_of_changes_and_not_by_the_clock(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo old > /etc/old-of-parent")
    branch = system.branch(snapshot)
    history = system.files.state / "history"
    born = json.loads(history.read_text().splitlines()[-1])
    assert born["command"] == "branch"
    ahead = json.dumps({**born, "time": "2099-01-01T00:00:00+0000"})  # the clock was ahead
    history.write_text("\n".join([*history.read_text().splitlines()[:-1], ahead, ""]))
    system.shell(branch, "rm /etc/old-of-parent")
    system.shell(snapshot, "echo new > /etc/new-of-parent; mkdir /etc/new-of-parent.d; touch /etc/new-of-parent.d/file")
    system.ash("force-sync", snapshot)
    assert (system.root(branch) / "etc/new-of-parent").read_text() == "new\n"
    assert (system.root(branch) / "etc/new-of-parent.d/file").exists()
    assert not (system.root(branch) / "etc/old-of-parent").exists(), "it was deleted in the branch on purpose"


def test_sync_knows_what_a_killed_command_has_removed(system: System, snapshot: int, tmp_path: Path) -> None:
    package = make_deb(tmp_path, "ash-test-removed")
    system.ash("install", snapshot, str(package))
    branch = system.branch(snapshot)
    package.unlink()
    system.killed_before("write the history", "tree-rmpkg", branch, "ash-test-removed")
    assert "ash-test-removed" not in system.files.in_root(branch, "dpkg-query", "-W", "-f", "${Package} ")
    system.ash("force-sync", snapshot)
    assert "ash-test-removed" not in system.files.in_root(branch, "dpkg-query", "-W", "-f", "${Package} ")
    assert "tree-rmpkg" in [entry["command"] for entry in system.ash("--json", "log", branch).json["history"]]


def test_the_branches_of_the_base_are_changed_and_the_base_is_passed_over(system: System) -> None:
    branch, base = system.branch(0), system.id_of(0)
    for line in ("tree-run 0 touch /etc/mark", "force-sync 0"):
        answer = system.ash("--json", *line.split()).json
        assert (answer["skipped"], answer["failed"]) == ([0], {})
    assert "snapshot 0 is the base: it was passed over" in system.ash("tree-run", 0, "true").stdout
    assert (system.root(branch) / "etc/mark").exists()
    assert system.id_of(0) == base
    system.ash("-y", "del", branch)
    assert "snapshot 0 is the base" in system.ash("tree-run", 0, "true", status=FAILED).stdout
