# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changes of the running /etc are carried into the next deployment and merged with those of the snapshot."""

import os
import re

import pytest

from installer.machine import Machine
from tests.boot.checks import runs_snapshot, said
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(260)]


def test_edits_of_the_running_system_are_carried(disk: Disk, boot: Boot) -> None:
    disk.ash("clone", 0)
    disk.ash("install", 1, "chrony")
    disk.ash("run", 1, "sh", "-c", "echo of the snapshot >> /etc/issue")
    with disk.files() as files:
        os.truncate(files.root("deploy") / "etc/machine-id", 0)
    with boot(disk) as machine:
        machine.login()
        ident = said(machine, "cat /etc/machine-id")
        assert re.fullmatch("[0-9a-f]{32}", ident)
        assert ident == said(machine, "systemd-id128 machine-id")
        said(machine, "test -d /run/log/journal/$(cat /etc/machine-id) -o -d /var/log/journal/$(cat /etc/machine-id)")
        edit(machine)
        report = said(machine, "ash deploy 1")
        assert "passwd" in report
        assert "issue" in report.partition("left behind")[2]
        said(machine, "echo 192.0.2.2 late >> /etc/hosts; touch /etc/late")

        machine.reboot()
        machine.login("root", "new password")
        runs_snapshot(machine, 1)
        assert said(machine, "cat /etc/machine-id") == ident
        find(machine)
        said(machine, "ash etc-update")
        assert said(machine, "ash diff") == "no difference"
        machine.poweroff()
    with disk.files() as files:
        assert "late" in (files.root(1) / "etc/hosts").read_text()
        assert "human:" in (files.root(1) / "etc/passwd").read_text()
        assert "human:" not in (files.root(0) / "etc/passwd").read_text()


def edit(machine: Machine) -> None:
    """Change a user, a password, and files that the snapshot has or has not changed too."""
    said(machine, "useradd --create-home human && echo human:secret | chpasswd")
    said(machine, "echo 'root:new password' | chpasswd")
    said(machine, "echo 192.0.2.1 early >> /etc/hosts")
    said(machine, "echo of the running system >> /etc/issue")
    drift = said(machine, "ash diff")
    assert all(f"/etc/{name}" in drift for name in ("passwd", "shadow", "hosts", "issue"))


def find(machine: Machine) -> None:
    """Assert that all changes were carried, even those after the deploy."""
    hosts = said(machine, "cat /etc/hosts")
    assert "early" in hosts
    assert "late" in hosts
    said(machine, "test -e /etc/late")
    assert "of the snapshot" in said(machine, "cat /etc/issue")
    assert "of the running system" not in said(machine, "cat /etc/issue")
    assert "of the running system" in said(machine, "cat /var/lib/ash/conflicts/1-*/etc/issue")
    assert said(machine, "stat -c %U /home/human") == "human"
    said(machine, "getent passwd _chrony && systemctl is-active chrony")
    assert said(machine, "systemctl --failed --plain --no-legend") == ""
