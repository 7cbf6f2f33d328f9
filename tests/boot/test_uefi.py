# SPDX-License-Identifier: AGPL-3.0-or-later
"""A system that boots by UEFI: a reset in the middle of a change; deployments that do not start."""

import re
import shlex

import pytest

from installer.machine import RESTARTS, Machine
from tests.boot.checks import is_immutable, new_snapshot, runs_snapshot, said, starts_next
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(400)]


HEALTH = "/etc/ash/health.d"
CHECK = f"{HEALTH}/always-fails"


def test_a_machine_goes_back_by_itself_if_a_deployment_does_not_start(disk: Disk, boot: Boot) -> None:
    disk.shell(disk.clone(), "touch /usr/share/in-1")
    disk.ash("deploy", 1)
    with boot(disk, uefi=True) as machine:
        machine.login(hasten=False)
        said(machine, "test -d /sys/firmware/efi && test -e /usr/share/in-1")
        runs_snapshot(machine, 1)
        said(machine, "echo boot_tries::1 >> /etc/ash.conf")
        deploy_what_fails(
            machine,
            2,
            f"mkdir -p {HEALTH}; printf '#!/bin/sh\\ntouch /var/checked; exit 1' > {CHECK}; chmod 755 {CHECK}",
        )
        change_half(machine)

        machine.reset()
        machine.choose(r"snapshot 2: ")
        machine.expect(RESTARTS, 300)
        went_back(machine, 2)
        said(machine, 'test -e /var/checked && ash --json status | grep -F \'"units": ["ash-health.service"\'')
        is_immutable(machine)
        assert said(machine, "ls /.snapshots/rootfs | grep chr || true") == ""
        assert said(machine, "ls /.snapshots/rootfs/snapshot-1/usr/share/half /var/lib/half 2> /dev/null || true") == ""
        said(machine, "ash run 1 touch /usr/share/whole")

        deploy_what_fails(machine, 3, "for kernel in /boot/vmlinuz-*; do echo damaged > $kernel; done")
        machine.reboot()
        went_back(machine, 3)
        assert said(machine, "systemctl --failed --plain --no-legend") == ""


def change_half(machine: Machine) -> None:
    """Be in the middle of a change to snapshot 1."""
    begun = "sh -c 'touch /usr/share/half /var/lib/half; touch /begun; sleep 1000'"
    half = "/.snapshots/rootfs/snapshot-chr1/begun"
    said(machine, f"(ash run 1 {begun} > /dev/null 2>&1 &); until test -e {half}; do sleep 1; done; sync")


def deploy_what_fails(machine: Machine, number: int, script: str) -> None:
    assert new_snapshot(machine, "clone 1") == number
    said(machine, f"ash run {number} sh -ec {shlex.quote(script)}")
    said(machine, f"ash deploy {number}")
    starts_next(machine, number)
    assert "on trial" in said(machine, "ash status")


def went_back(machine: Machine, failed: int) -> None:
    """Assert that the machine comes up by itself in the last good deployment, and says why."""
    machine.login(hasten=False, patient=True)
    runs_snapshot(machine, 1)
    said(machine, "until systemctl is-active ash-bless; do sleep 1; done")
    starts_next(machine, 1)
    for command in ("ash status", "cat /run/motd.d/ash", "journalctl --boot --identifier ash"):
        assert f"snapshot {failed} did not start" in said(machine, command)
    assert re.search(rf"\b{failed} - .*\[bad\]$", said(machine, "ash tree"), re.MULTILINE)
    machine.command(f"ash deploy {failed}", ok=5)
