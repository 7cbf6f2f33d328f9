# SPDX-License-Identifier: AGPL-3.0-or-later
"""fsck: it finds each kind of problem, names the snapshot, and finds nothing on a sound system."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import FAILED, make_deb, program
from tests.system.container import Container
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(80)]


@pytest.fixture(scope="module")
def snapshot(system: System) -> int:
    """One snapshot for all tests; each repairs what it has broken, since fsck checks all snapshots."""
    return system.clone()


def finds(system: System, words: str, snapshot: int | None = None) -> None:
    """Assert that fsck finds a problem of that snapshot."""
    found = system.ash("--json", "fsck", status=FAILED).json["damage"]
    assert [one for one in found if words in one["what"] and one["snapshot"] == snapshot], found
    assert words in system.ash("fsck", status=FAILED).stdout


def finds_nothing(system: System) -> None:
    assert system.ash("--json", "fsck").json["damage"] == []


def writable(path: Path, yes: bool) -> None:
    program("btrfs", "property", "set", "-ts", path, "ro", "false" if yes else "true")


def test_fsck_of_a_sound_system_finds_nothing(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo x > /etc/x; echo x > /boot/x")
    system.ash("deploy", snapshot)
    system.ash("deploy", 0)
    with system.nothing_changes():
        finds_nothing(system)


def test_fsck_finds_a_missing_snapshot(system: System, snapshot: int) -> None:
    aside = system.root(snapshot).with_name("aside")
    system.root(snapshot).rename(aside)
    finds(system, f"snapshot-{snapshot} is missing", snapshot)
    system.root(snapshot).mkdir()  # a directory is not a snapshot
    finds(system, f"snapshot-{snapshot} is missing", snapshot)
    system.root(snapshot).rmdir()
    aside.rename(system.root(snapshot))
    finds_nothing(system)


def test_fsck_finds_a_writable_snapshot(system: System, snapshot: int) -> None:
    writable(system.root(snapshot), True)
    finds(system, "is writable", snapshot)
    writable(system.root(snapshot), False)
    finds_nothing(system)


@pytest.mark.parametrize("name", ["undo", "base for drift"])
def test_fsck_finds_other_writable_subvolumes(system: System, snapshot: int, name: str) -> None:
    system.shell(snapshot, "touch /etc/mark")
    system.ash("deploy", snapshot)
    path = system.files.undo(snapshot) if name == "undo" else system.files.etc(system.boots())
    program("btrfs", "property", "set", "-ts", path, "ro", "false")
    finds(system, f"{path.name} is writable", snapshot)
    system.ash("fsck", "--repair")
    finds_nothing(system)
    system.ash("deploy", 0)


@pytest.mark.parametrize("directory", ["etc", "boot"])
def test_fsck_finds_a_copy_that_differs_or_is_missing(system: System, snapshot: int, directory: str) -> None:
    copy = system.files.etc(snapshot) if directory == "etc" else system.files.boot(snapshot)
    writable(copy, True)
    (copy / "extra").touch()
    finds(system, f"{copy.name} differs from its /{directory}: extra", snapshot)
    (copy / "extra").unlink()
    writable(copy, False)
    copy.rename(copy.with_name("aside"))
    finds(system, f"{copy.name} is missing", snapshot)
    copy.with_name("aside").rename(copy)
    finds_nothing(system)


def test_fsck_finds_a_missing_description(system: System, snapshot: int) -> None:
    (system.files.state / f"snapshots/{snapshot}-desc").unlink()
    finds(system, "its description is missing", snapshot)
    system.ash("desc", snapshot, "again")
    finds_nothing(system)


@pytest.mark.parametrize("odd", ["empty", "link", "directory"])
def test_fsck_finds_an_invalid_description(system: System, snapshot: int, odd: str) -> None:
    path = system.files.state / f"snapshots/{snapshot}-desc"
    path.unlink()
    make: dict[str, Callable[[], None]] = {"empty": path.touch, "directory": path.mkdir}
    make.get(odd, lambda: path.symlink_to("0-desc"))()
    finds(system, "its description is empty or not a regular file", snapshot)
    path.rmdir() if odd == "directory" else path.unlink()
    system.ash("desc", snapshot, "again")
    finds_nothing(system)


@pytest.mark.parametrize("name", ["rootfs/snapshot-4711", "rootfs/undo-4711", "etc/etc-4711", "boot/boot-4711"])
def test_fsck_finds_what_belongs_to_no_snapshot(system: System, name: str) -> None:
    path = system.files.snapshots / name
    program("btrfs", "subvolume", "create", path)
    finds(system, f"{path.name} belongs to no snapshot")
    program("btrfs", "subvolume", "delete", path)
    finds_nothing(system)


@pytest.mark.parametrize("text", ["0\n", "", "many\n", None])
def test_fsck_finds_a_highest_number_that_is_too_low(system: System, snapshot: int, text: str | None) -> None:
    last = system.files.state / "last"
    good = last.read_text()
    if text is None:
        last.unlink()
    else:
        last.write_text(text)
    finds(system, "the last snapshot number used")
    last.write_text(good)
    finds_nothing(system)


@pytest.mark.parametrize("name", ["fstree", "menu", "ids"])
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_fsck_finds_damaged_state_files(system: System, name: str, text: str) -> None:
    path = system.files.state / name
    good = path.read_text()
    path.write_text(text)
    try:
        outcome = system.ash("fsck", status=FAILED)
    finally:
        path.write_text(good)
    assert not re.search("Traceback|an error in ash itself", outcome.stderr), outcome.stderr
    assert {"fstree": "tree file", "menu": "menu file", "ids": "registry of uids and gids"}[
        name
    ] in outcome.stdout + outcome.stderr
    finds_nothing(system)


def test_fsck_finds_interrupted_changes(system: System, snapshot: int) -> None:
    work = system.files.state / f"work/{snapshot}"
    (work / "intent").write_text(json.dumps({"state": "open"}))
    finds(system, "a change was interrupted", snapshot)
    (work / "intent").unlink()
    copy = system.root(f"chr{snapshot}")
    program("btrfs", "subvolume", "create", copy)
    finds(system, "is left over from a transaction", snapshot)
    system.ash("unlock", snapshot)
    finds_nothing(system)


def test_fsck_finds_a_damaged_intent_file_and_unlock_drops_it(system: System, snapshot: int) -> None:
    other = system.clone()
    (system.files.state / f"work/{other}/intent").write_text("torn")
    try:
        found = system.ash("fsck", status=FAILED)
        assert "intent" in found.stdout + found.stderr
        system.shell(snapshot, "true")
        assert f"ash unlock {other}" in system.ash("recover", status=FAILED).error
        assert system.ash("--json", "status").json["waiting"] == []
        system.ash("unlock", other)
        system.shell(other, "true")
    finally:
        (system.files.state / f"work/{other}/intent").unlink(missing_ok=True)
        system.ash("-y", "del", other)


def test_fsck_ignores_the_work_of_another_ash(system: System, snapshot: int) -> None:
    with system.at_work(snapshot, "touch /etc/x"):
        finds_nothing(system)


def test_fsck_of_a_running_read_only_system(system: System, snapshot: int) -> None:
    """As after btrfs has found an error and made the file system read-only."""
    container = Container(system)
    intent, menu = system.files.state / f"work/{snapshot}/intent", system.files.state / "menu"
    good = menu.read_text()
    intent.write_text(json.dumps({"state": "open"}))
    menu.write_text("torn")
    try:
        line = "mount -o remount,ro /.snapshots; ash fsck; found=$?; ! touch /var/written || exit 9; exit $found"
        found = container.type(line, status=FAILED).stdout
    finally:
        program("mount", "-o", "remount,rw", system.files.top)
        intent.unlink()
        menu.write_text(good)
    assert f"snapshot {snapshot}: a change was interrupted" in found
    assert "the menu file" in found
    finds_nothing(system)


def edit_in_place(system: System, snapshot: int, path: str, text: str) -> None:
    """Change a file of a read-only snapshot and of its copy, without ash."""
    for file in (system.root(snapshot) / path, system.files.etc(snapshot) / path.removeprefix("etc/")):
        if (file.parent.is_dir() and path.startswith("etc/")) or file.is_relative_to(system.root(snapshot)):
            top = system.root(snapshot) if file.is_relative_to(system.root(snapshot)) else system.files.etc(snapshot)
            writable(top, True)
            file.write_text(text)
            writable(top, False)


def test_fsck_finds_clashing_account_ids(system: System, snapshot: int) -> None:
    passwd = (system.root(snapshot) / "etc/passwd").read_text()
    system.shell(snapshot, "echo one:x:850:850::/: >> /etc/passwd")
    edit_in_place(system, snapshot, "etc/passwd", passwd + "one:x:850:850::/:\ntwo:x:850:850::/:\ntoor:x:0:0::/:\n")
    finds_nothing(system)  # on purpose
    edit_in_place(system, snapshot, "etc/passwd", passwd + "one:x:851:850::/:\n")
    finds(system, "one has the id 851 in passwd, but 850 elsewhere", snapshot)
    edit_in_place(system, snapshot, "etc/passwd", passwd)
    finds_nothing(system)


def test_fsck_finds_half_installed_packages_and_missing_files(system: System, tmp_path: Path) -> None:
    snapshot = system.clone()
    system.ash("install", snapshot, make_deb(tmp_path, "ash-test-half", files={"usr/share/ash-test-half": "x"}))
    status = "usr/share/ash/db/dpkg/status"
    good = (system.root(snapshot) / status).read_text()
    stanza = "Package: ash-test-half\nStatus: install ok "
    edit_in_place(system, snapshot, status, good.replace(f"{stanza}installed", f"{stanza}half-configured"))
    finds(system, "package ash-test-half is half-configured", snapshot)
    edit_in_place(system, snapshot, status, good)
    writable(system.root(snapshot), True)
    (system.root(snapshot) / "usr/share/ash-test-half").unlink()
    writable(system.root(snapshot), False)
    finds(system, "package ash-test-half lacks /usr/share/ash-test-half", snapshot)
    system.ash("-y", "del", snapshot)
    finds_nothing(system)


def test_fsck_finds_a_missing_package_database(system: System) -> None:
    snapshot = system.clone()
    info, status = "usr/share/ash/db/dpkg/info/less.list", "usr/share/ash/db/dpkg/status"
    good = (system.root(snapshot) / info).read_text()
    writable(system.root(snapshot), True)
    (system.root(snapshot) / info).unlink()
    finds(system, f"package less lacks /{info}", snapshot)
    (system.root(snapshot) / info).write_text(good)
    (system.root(snapshot) / status).write_text("")
    finds(system, "the package database knows no package", snapshot)
    (system.root(snapshot) / status).unlink()
    finds(system, "the package database knows no package", snapshot)
    system.ash("-y", "del", snapshot)
    finds_nothing(system)


def test_fsck_tells_copies_from_their_originals(system: System, tmp_path: Path) -> None:
    """Identical snapshots are checked once; a change to one of them concerns only that one."""
    deb = make_deb(tmp_path, "ash-test-copied", files={"usr/share/ash-test-copied": "x"})
    first = system.clone()
    system.ash("install", first, deb)
    copies = [system.clone(first), system.clone(first)]
    of_copy = system.clone(copies[0])

    def lacks_it_in(*numbers: int) -> None:
        for number in numbers:
            finds(system, "package ash-test-copied lacks /usr/share/ash-test-copied", number)
        found = system.ash("--json", "fsck", status=FAILED).json["damage"]
        assert {one["snapshot"] for one in found} == set(numbers), found

    finds_nothing(system)
    for number in (first, copies[0]):
        writable(system.root(number), True)
        (system.root(number) / "usr/share/ash-test-copied").unlink()
        writable(system.root(number), False)
    lacks_it_in(first, copies[0])
    damaged_too = system.clone(first)
    lacks_it_in(first, copies[0], damaged_too)
    writable(system.root(first), True)
    (system.root(first) / "usr/share/ash-test-copied").touch()
    writable(system.root(first), False)
    lacks_it_in(copies[0], damaged_too)
    system.ash("-y", "del", first, *copies, of_copy, damaged_too)
    finds_nothing(system)


def test_fsck_accepts_diverted_files(system: System, snapshot: int) -> None:
    system.shell(
        snapshot,
        "dpkg-divert --local --rename --add /usr/bin/nano 2>/dev/null || dpkg-divert --local --rename --add /usr/bin/less",
    )
    finds_nothing(system)


@pytest.mark.parametrize("name", ["nested", "two\nlines", "a path b"])
def test_fsck_finds_nested_subvolumes(system: System, snapshot: int, name: str) -> None:
    writable(system.root(snapshot), True)
    program("btrfs", "subvolume", "create", system.root(snapshot) / "usr" / name)
    writable(system.root(snapshot), False)
    found = system.ash("--json", "fsck", status=FAILED).json["damage"]
    assert [one["what"] for one in found] == [f"snapshot-{snapshot}/usr/{name} is a nested subvolume"]
    writable(system.root(snapshot), True)
    program("btrfs", "subvolume", "delete", system.root(snapshot) / "usr" / name)
    writable(system.root(snapshot), False)
    finds_nothing(system)


def test_fsck_finds_a_boot_menu_that_does_not_boot(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    slot = system.boots()
    good = system.files.grub_cfg.read_text()
    system.files.grub_cfg.write_text(good.replace("root=UUID", "root=UID"))
    finds(system, "grub.cfg differs from what ash wrote last")
    system.files.grub_cfg.unlink()
    finds(system, "grub.cfg differs from what ash wrote last")
    system.ash("recover")
    finds_nothing(system)
    kernel = next((system.root(slot) / "boot").glob("vmlinuz*"))
    kernel.rename(kernel.with_name("aside"))
    finds(system, f"lacks {kernel.name}", snapshot)
    kernel.with_name("aside").rename(kernel)
    menu = system.files.state / "menu"
    text = menu.read_text()
    menu.write_text(json.dumps({**json.loads(text), "default": "deploy-nowhere"}))
    finds(system, "the boot menu has no default deployment")
    menu.write_text(text)
    system.ash("deploy", 0)
    finds_nothing(system)


def test_fsck_finds_a_missing_slot(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    slot = system.root(system.boots())
    slot.rename(slot.with_name("aside"))
    finds(system, f"{slot.name} lacks", snapshot)
    slot.with_name("aside").rename(slot)
    system.ash("deploy", 0)
    finds_nothing(system)
