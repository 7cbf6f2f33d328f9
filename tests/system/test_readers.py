# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who may read: plain users see the tree and the packages; snapshots are root's, the history root's and adm's."""

import json
import re
import stat

import pytest

from ash import in_database
from tests.support import FAILED, REFUSED
from tests.system.container import Container
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(30)]

NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"


def test_plain_users_see_the_tree_and_packages_but_not_into_snapshots(system: System) -> None:
    number = system.clone()
    system.shell(number, "chmod 600 /etc/issue")  # readable in snapshot 0, which is older
    system.ash("deploy", number)
    running = Container(system)
    for place in ("rootfs", "etc", "boot", f"rootfs/snapshot-{number}/etc/issue", f"etc/etc-{number}/issue"):
        assert "Permission denied" in running.type(f"{NOBODY} ls /.snapshots/{place}", status=2).stderr
    for line, expected in {
        "tree": "[booted]",
        "tree -l": "base snapshot",
        "current": f"{number}\n",
        "whichtmp": f"{running.slot}\n",
        "list": "dpkg",
        f"list {number}": "dpkg",
        "whichsnap dpkg": "base snapshot",
        "status": f"snapshot {number} ({running.slot})",
        f"diff 0 {number}": "no difference",
        "help": "ash keeps the system",
    }.items():
        assert expected in running.type(f"{NOBODY} ash {line}").stdout
    assert "only root can see it" in running.type(f"{NOBODY} ash status").stdout
    for user, is_unknown in ((NOBODY, True), ("", False)):
        known = json.loads(running.type(f"{user} ash --json status").stdout)
        assert {known[key] is None for key in ("waiting", "drift", "only_there")} == {is_unknown}
    assert "root alone" in running.type(f"{NOBODY} ash diff 0 {number}").stderr
    for line in ("log", "diff", f"diff 0 {number} --patch", "sub", "fsck"):
        assert re.fullmatch(r"ash: .*\(sudo ash .*\)\n", running.type(f"{NOBODY} ash {line}", status=REFUSED).stderr)


def test_members_of_adm_may_read_the_history(system: System) -> None:
    running = Container(system)
    system.clone()
    status = (system.files.state / "history").stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    group = next(line for line in (system.root(0) / "etc/group").read_text().splitlines() if line.startswith("adm:"))
    assert status.st_gid == int(group.split(":")[2])
    assert "clone" in running.type(f"setpriv --reuid=65534 --regid={status.st_gid} --clear-groups ash log").stdout


def test_fsck_and_every_change_close_what_an_older_ash_left_open(system: System, snapshot: int) -> None:
    private, history = (
        [system.files.snapshots / name for name in ("rootfs", "etc", "boot")],
        system.files.state / "history",
    )

    def open_all() -> None:
        for path in (*private, history):
            path.chmod(0o755)

    def modes() -> set[int]:
        return {stat.S_IMODE(path.stat().st_mode) for path in private}

    open_all()
    found = system.ash("--json", "fsck", status=FAILED).json["damage"]
    assert len(found) == 4
    assert modes() == {0o755}
    system.ash("--dry-run", "clone", snapshot)
    assert modes() == {0o755}
    system.ash("fsck", "--repair")
    assert (modes(), stat.S_IMODE(history.stat().st_mode)) == ({0o700}, 0o640)
    open_all()
    system.ash("desc", snapshot, "closed")
    assert (modes(), stat.S_IMODE(history.stat().st_mode)) == ({0o700}, 0o640)


def test_a_new_system_is_readable_whatever_the_umask_of_the_installer(system: System) -> None:
    """The image was made under umask 077."""
    root = system.root(0)
    readable = [
        "etc/hostname",
        "etc/hosts",
        "etc/fstab",
        "etc/ash.conf",
        "etc/apt/apt.conf.d",
        "etc/systemd/network",
        "usr/share/ash",
        "usr/share/ash/db",
        "usr/bin",
    ]
    paths = [root / name for name in readable if (root / name).exists()]
    paths += [path for path in (root / "etc/systemd/network").iterdir() if not path.is_symlink()]
    paths += [
        system.files.state / name
        for name in ("", "ash", "lib", "help", "profiles", "fstree", "menu", "packages", "packages/0")
    ]
    paths += [system.files.var, system.files.var / "lib", root / in_database("lib/dpkg") / "status"]
    assert [str(path) for path in paths if not path.stat().st_mode & 0o004] == []
    closed = [path for path in paths if path.is_dir() and not path.stat().st_mode & 0o001]
    assert closed == []
