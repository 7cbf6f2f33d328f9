# SPDX-License-Identifier: AGPL-3.0-or-later
"""The life of a system that boots by BIOS: change, reboot, edit, deploy a mistake, roll back.

The tour of `init.py try` shows how such a machine goes back by itself.
"""

import os

import pytest

from installer.machine import Machine
from tests.boot.checks import is_healthy, is_immutable, new_snapshot, online, runs_snapshot, said, starts_next
from tests.boot.conftest import Boot
from tests.support import SNAPSHOTS, Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(320)]

SERVICE = "[Service]\nType=oneshot\nExecStart=touch /run/it-ran\n[Install]\nWantedBy=multi-user.target\n"
NAMESERVER = "nameserver 192.0.2.53"


def test_the_life_of_a_system(disk: Disk, boot: Boot) -> None:
    with boot(disk) as machine:
        machine.login()
        runs_snapshot(machine, 0)
        assert said(machine, "systemctl show --value --property ConditionResult ldconfig") == "no", "caches are new"
        is_healthy(machine)
        install_from_the_archive(machine)

        restart(machine)
        runs_snapshot(machine, 1)
        assert said(machine, "systemctl show --value --property ConditionResult ash-recover") == "no"
        assert "Hello, world!" in said(machine, "hello")
        is_immutable(machine)
        write_what_persists(machine)
        go_back_from_a_mistake(machine)
        edit_the_resolver_in_a_chroot(machine)
        leave_something_unfinished(machine)

        restart(machine)
        runs_snapshot(machine, 3)
        assert "Hello, world!" in said(machine, "hello")
        find_what_persists(machine)
        find_nothing_unfinished(machine)
        assert said(machine, "systemctl --failed --plain --no-legend") == ""
        machine.poweroff()
    ash_agrees_from_outside(disk)


def restart(machine: Machine) -> None:
    """Reboot into the default entry of the menu."""
    machine.reboot()
    machine.login()


def install_from_the_archive(machine: Machine) -> None:
    """Only a clone gets a package, not the base or the running system."""
    assert new_snapshot(machine, "clone 0") == 1
    online(machine)
    said(machine, "ash install 1 hello")
    assert "hello" in said(machine, "ash list 1").split()
    assert "hello" not in said(machine, "ash list 0").split()
    machine.command("hello", ok=127)
    said(machine, "ash deploy 1")
    starts_next(machine, 1)
    runs_snapshot(machine, 0)


def write_what_persists(machine: Machine) -> None:
    """Create files that persist, one that does not, a service and a user."""
    for place in ("/etc", "/var", "/home", "/root", "/tmp"):
        said(machine, f"echo kept > {place}/kept")
    said(machine, f"printf %s '{SERVICE}' > /etc/systemd/system/mine.service && systemctl enable mine.service")
    said(machine, "useradd --create-home somebody")
    assert "snapshot 0" not in said(machine, "setpriv --reuid 65534 --clear-groups ash tree")
    machine.command("setpriv --reuid 65534 --clear-groups ash clone 0", ok=5)


def find_what_persists(machine: Machine) -> None:
    for place in ("/etc", "/var", "/home", "/root"):
        assert said(machine, f"cat {place}/kept") == "kept"
    assert NAMESERVER in said(machine, "cat /etc/resolv.conf")
    machine.command("test -e /tmp/kept", ok=1)
    said(machine, "systemctl is-active multi-user.target && test -e /run/it-ran")
    assert said(machine, "stat -c %U /home/somebody") == "somebody"


def leave_something_unfinished(machine: Machine) -> None:
    """A killed transaction, and leftovers of another after a power cut."""
    until = "until test -e /.snapshots/rootfs/snapshot-chr1; do sleep 1; done"
    said(machine, f"ash run 1 sleep 99 & {until}; kill -9 $!")
    said(machine, "mkdir -p /.snapshots/ash/work/2; btrfs subvolume create /.snapshots/ash/work/2/var")


def find_nothing_unfinished(machine: Machine) -> None:
    """Assert that everything was cleaned up at boot."""
    assert said(machine, "systemctl show --value --property ConditionResult ash-recover") == "yes"
    assert said(machine, "find /.snapshots/ash/work -mindepth 2 ! -name lock") == ""
    assert said(machine, "find /.snapshots/rootfs -maxdepth 1 -name '*chr*'") == ""


def edit_the_resolver_in_a_chroot(machine: Machine) -> None:
    """The example in the documents: a shell in the snapshot, an edit, `exit`, deploy."""
    machine.send("ash chroot 3\n")
    machine.expect(r"[#$] ")
    machine.send(f"echo '{NAMESERVER}' > /etc/resolv.conf\n")
    machine.send("exit\n")
    said(machine, "ash deploy 3")
    assert NAMESERVER not in said(machine, "cat /etc/resolv.conf")


def go_back_from_a_mistake(machine: Machine) -> None:
    """A rollback to what is running, before the mistake is booted."""
    assert new_snapshot(machine, "branch 1") == 2
    said(machine, "ash run 2 rm /usr/bin/hello && ash deploy 2")
    starts_next(machine, 2)
    assert new_snapshot(machine, "rollback") == 3
    starts_next(machine, 3)


def ash_agrees_from_outside(disk: Disk) -> None:
    """Assert that ash works on the image and that all snapshots are read-only."""
    rows = {row["snapshot"]: row for row in disk.ash("--json", "tree").json["tree"]}
    assert {number: row["deployed"] for number, row in rows.items()} == {0: False, 1: False, 2: False, 3: True}
    with disk.files() as files:
        assert not {f"{SNAPSHOTS}/rootfs/snapshot-{number}" for number in rows} & files.writable()
        assert "systemd" in os.readlink(files.root(0) / "usr/sbin/init")
        assert not (files.root(0) / "usr/bin/hello").exists()
