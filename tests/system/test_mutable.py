# SPDX-License-Identifier: AGPL-3.0-or-later
"""Mutable snapshots, mutable directories, and ash.conf."""

import os
from pathlib import Path

import pytest

from tests.support import DONE, FAILED, REFUSED, SNAPSHOTS, USAGE
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]


def mark(system: System, snapshot: int) -> str:
    """The text in a snapshot's /etc/mark."""
    path = system.root(snapshot) / "etc/mark"
    return path.read_text().strip() if path.exists() else ""


def test_a_mutable_snapshot_and_its_children(system: System, snapshot: int) -> None:
    assert system.ash("--json", "mutable", snapshot).json["mutable"] is True
    assert system.ash("--json", "mutable", snapshot).json["changed"] is False
    root = f"{SNAPSHOTS}/rootfs/snapshot-{snapshot}"
    assert root in system.files.writable()
    branch, clone = system.branch(snapshot), system.clone(snapshot)
    rows = {row["snapshot"]: row["mutable"] for row in system.ash("--json", "tree").json["tree"]}
    assert (rows[snapshot], rows[branch], rows[clone], rows[0]) == (True, True, True, False)
    assert "[mutable]" in system.ash("tree").stdout
    (system.root(snapshot) / "usr/written").write_text("by hand\n")
    (system.root(snapshot) / "etc/mark").write_text("by hand\n")
    system.shell(snapshot, "echo t > /usr/transaction")
    assert root in system.files.writable(), "a transaction leaves it mutable"
    system.ash("immutable", snapshot)
    assert root not in system.files.writable()
    assert (system.root(snapshot) / "usr/written").read_text() == "by hand\n"
    assert (system.files.etc(snapshot) / "mark").read_text() == "by hand\n"
    assert (system.root(snapshot) / "usr/transaction").exists()
    for other in (branch, clone):
        system.ash("immutable", other)
    system.is_sound()


def test_what_is_written_to_a_mutable_snapshot_during_a_transaction_is_named(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    (system.root(snapshot) / "usr/before").touch()
    with system.at_work(snapshot, "touch /usr/transaction") as work:
        (system.root(snapshot) / "usr/mine").touch()
        (system.root(snapshot) / "usr/lib/os-release").read_text()
    assert "changed directly in the meantime: usr, usr/mine; " in work.ended.stderr
    assert (system.root(snapshot) / "usr/before").exists()
    system.ash("undo", snapshot)
    assert (system.root(snapshot) / "usr/mine").exists()
    assert "meantime" not in system.shell(snapshot, "touch /usr/transaction").stderr
    system.ash("immutable", snapshot)


def test_immen_toggles_and_reports_the_new_state(system: System, snapshot: int) -> None:
    assert "mutable" in system.ash("immen", snapshot).stdout
    assert system.ash("--json", "immen", snapshot).json["mutable"] is False
    assert f"{SNAPSHOTS}/rootfs/snapshot-{snapshot}" not in system.files.writable()


@pytest.mark.parametrize("word", ["immdis", "immdisable", "disimm", "disableimm"])
def test_all_aliases(system: System, word: str, snapshot: int) -> None:
    back = {"immdis": "immutable", "immdisable": "immenable", "disimm": "enimm", "disableimm": "enableimm"}[word]
    assert system.ash("--json", word, snapshot).json["mutable"] is True
    assert system.ash("--json", back, snapshot).json["mutable"] is False


def test_the_base_cannot_be_mutable_and_a_number_is_required(system: System) -> None:
    for word in ("mutable", "immutable", "immen"):
        system.ash(word, 0, status=REFUSED)
        system.ash(word, status=USAGE)
    assert system.files.writable() & {f"{SNAPSHOTS}/rootfs/snapshot-0"} == set()


def test_a_mutable_snapshot_is_deployed_writable(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    system.ash("deploy", snapshot)
    slot = system.boots()
    fstab = (system.root(slot) / "etc/fstab").read_text().splitlines()
    assert next(line for line in fstab if line.split()[1] == "/").split()[3].endswith(",rw")
    assert f"snapshot-{slot} rw " in system.files.grub_cfg.read_text()
    system.ash("immutable", snapshot)
    system.ash("deploy", snapshot)
    slot = system.boots()
    fstab = (system.root(slot) / "etc/fstab").read_text().splitlines()
    assert next(line for line in fstab if line.split()[1] == "/").split()[3].endswith(",ro")
    system.ash("deploy", 0)


def test_comparing_mutable_snapshots_leaves_nothing(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    (system.root(snapshot) / "usr/written").write_text("x")
    other = system.clone(snapshot)
    (system.root(other) / "usr/more").write_text("x")
    before = system.subvolumes()
    answer = system.ash("--json", "diff", 0, snapshot, "--files").json
    assert answer["files"]["usr/written"] == "added"
    assert system.ash("--json", "diff", snapshot, other, "--files").json["files"]["usr/more"] == "added"
    assert system.ash("diff", snapshot, snapshot).stdout == "no difference\n"
    assert system.subvolumes() == before
    for mutable in (snapshot, other):
        system.ash("immutable", mutable)


def test_undo_of_a_mutable_snapshot(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    system.shell(snapshot, "echo one > /etc/mark")
    system.ash("undo", snapshot)
    assert mark(system, snapshot) == ""
    assert f"{SNAPSHOTS}/rootfs/snapshot-{snapshot}" in system.files.writable()
    system.ash("immutable", snapshot)


def test_mutable_directories_are_not_in_the_transaction_but_in_fstab(system: System, snapshot: int) -> None:
    system.shell(snapshot, "printf 'mutable_dirs::opt/games\\nmutable_dirs_shared::srv\\n' > /etc/ash.conf")
    sibling = system.clone(snapshot)
    system.shell(snapshot, "echo mine > /opt/games/x; echo ours > /srv/x")
    system.shell(snapshot, "echo kept > /opt/games/failed; exit 1", status=FAILED)
    kept = system.files.snapshots / "mutable_dirs"
    assert (kept / f"snapshot-{snapshot}/opt/games/x").read_text() == "mine\n"
    assert (kept / "srv/x").read_text() == "ours\n"
    assert not (system.root(snapshot) / "opt/games/x").exists()
    system.shell(sibling, "[ ! -e /opt/games/x ]; [ -e /srv/x ]")
    system.ash("deploy", snapshot)
    slot = system.boots()
    lines = [
        line.split()[:2]
        for line in (system.root(slot) / "etc/fstab").read_text().splitlines()
        if "mutable_dirs" in line
    ]
    assert lines == [
        [f"/.snapshots/mutable_dirs/snapshot-{snapshot}/opt/games", "/opt/games"],
        ["/.snapshots/mutable_dirs/srv", "/srv"],
    ]
    assert (system.root(slot) / "opt/games").is_dir()
    system.ash("deploy", 0)


def test_it_is_said_what_a_mutable_directory_hides_and_what_is_kept_of_it(system: System, snapshot: int) -> None:
    system.shell(snapshot, "mkdir -p /opt/games/maps; echo hidden > /opt/games/chess; echo kept > /opt/games/go")
    system.shell(snapshot, "echo mutable_dirs::opt/games > /etc/ash.conf")
    place = f"/.snapshots/mutable_dirs/snapshot-{snapshot}/opt/games"
    hidden = f"{place} is mounted over /opt/games, and hides what snapshot {snapshot} has there: chess, go, maps"
    assert hidden in system.ash("deploy", snapshot).stdout
    system.ash("deploy", 0)
    system.shell(snapshot, "mkdir /opt/games/maps; echo mine > /opt/games/chess; touch /opt/games/go")
    assert "hides" not in system.ash("deploy", snapshot).stdout
    system.ash("deploy", 0)
    cloned = system.ash("clone", snapshot).stdout
    copy = snapshot + 1
    assert f"begins without what {snapshot} has in its mutable directories: opt/games" in cloned
    assert not system.ash("--json", "clone", 0).stdout.count("mutable")
    assert "kept" not in system.ash("--yes", "del", copy).stdout
    deleted = system.ash("--yes", "del", snapshot)
    kept = f"/.snapshots/mutable_dirs/snapshot-{snapshot}"
    assert f"kept, and deleted by nobody: {kept}" in deleted.stdout
    assert (system.files.snapshots / f"mutable_dirs/snapshot-{snapshot}/opt/games/chess").read_text() == "mine\n"


def test_a_mutable_directory_cannot_lead_out_of_its_place(system: System, snapshot: int) -> None:
    system.shell(snapshot, "printf 'mutable_dirs::../../x,/opt//y/\\n' > /etc/ash.conf")
    system.shell(snapshot, "echo y > /opt/y/y")
    assert os.listdir(system.files.snapshots / "mutable_dirs" / f"snapshot-{snapshot}") == ["opt"]


def test_what_a_root_needs_cannot_be_a_mutable_directory(system: System, snapshot: int) -> None:
    for value in ("/etc", "usr", "opt/a,lib", "boot", ".snapshots/x", "usr/share/ash/db", "var/lib", "proc/x"):
        system.shell(snapshot, f"echo mutable_dirs::{value} > /etc/ash.conf")
        assert "cannot be a mutable directory" in system.ash("deploy", snapshot, status=USAGE).error
        assert "cannot be a mutable directory" in system.ash("run", snapshot, "true", status=125).error
        assert f"ash edit-conf {snapshot}" in system.ash("fsck", status=FAILED).stdout
        system.ash("undo", snapshot)
    system.shell(snapshot, "echo mutable_dirs::opt/file > /etc/ash.conf; touch /opt/file")
    assert "a file is there" in system.ash("deploy", snapshot, status=USAGE).error
    assert "opt/file" in system.ash("run", snapshot, "true", status=125).error
    system.ash("undo", snapshot)
    system.shell(snapshot, "echo mutable_dirs::../x > /etc/ash.conf")
    assert "leads out of the root" in system.ash("deploy", snapshot).stderr
    system.ash("deploy", 0)


def test_it_is_said_what_nobody_sees_since_ash_conf_names_it_no_longer(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo mutable_dirs::opt/games,opt/b/c > /etc/ash.conf")
    system.shell(snapshot, "echo mine > /opt/games/chess; echo mine > /opt/b/c/x")
    assert "nobody sees" not in system.ash("deploy", snapshot).stdout
    system.ash("deploy", 0)
    system.shell(snapshot, "echo mutable_dirs::opt/b/c > /etc/ash.conf")
    said = system.ash("deploy", snapshot).stdout
    place = f"/.snapshots/mutable_dirs/snapshot-{snapshot}"
    assert f"nobody sees what is in {place}, since ash.conf does not name it: opt/games\n" in said
    assert system.ash("--json", "clone", snapshot).json["without"] == ["opt/b/c"]
    system.ash("deploy", 0)


def test_an_invalid_ash_conf_is_reported_in_one_line(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo nonsense > /etc/ash.conf")
    assert "line 1 of ash.conf" in system.ash("run", snapshot, "true", status=125).error
    assert "line 1 of ash.conf" in system.ash("deploy", snapshot, status=USAGE).error
    system.ash("undo", snapshot)
    system.shell(snapshot, "echo of_tomorrow::1 > /etc/ash.conf")  # a key of a later ash
    assert "of_tomorrow" in system.ash("run", snapshot, "true").stderr
    assert system.ash("deploy", snapshot).stderr.count("of_tomorrow") == 1


def test_edit_conf_refuses_invalid_lines(
    system: System, snapshot: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "my editor"
    editor.write_text(f'#!/bin/sh\nenv > "{tmp_path}/environment"\ncp {tmp_path}/new "$2"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv("PYTHONPATH", "/hostile")
    monkeypatch.setenv("PATH", f"/hostile:{os.environ['PATH']}")
    monkeypatch.setenv("SUDO_EDITOR", f"'{editor}' -x")
    for text, status in (("mutable_dirs::opt/a\n", DONE), ("what is this\n", USAGE), ("unknown::1\n", USAGE)):
        (tmp_path / "new").write_text(text)
        with system.terminal("edit-conf", snapshot) as terminal:
            if status != DONE:
                terminal.expect(r"edit it again\? \[Y/n\] ")
                terminal.type("n\n")
            assert terminal.wait() == status
    (tmp_path / "new").write_text("aur::True\n")
    with system.terminal("edit-conf", snapshot) as terminal:
        terminal.expect(r"no AUR\s+edit it again\? \[Y/n\] ")
        (tmp_path / "new").write_text("mutable_dirs::opt/a\n")
        terminal.type("\n")
        assert terminal.wait() == DONE
    assert (system.root(snapshot) / "etc/ash.conf").read_text() == "mutable_dirs::opt/a\n"
    assert "hostile" not in (tmp_path / "environment").read_text()
    assert system.remains() == set()
    system.ash("edit-conf", snapshot, status=USAGE)
