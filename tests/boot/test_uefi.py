# SPDX-License-Identifier: AGPL-3.0-or-later
"""A system that boots by UEFI: deploy, reboot, reset in the middle of a change, boot from the menu."""

import pytest

from tests.boot.checks import is_immutable, new_snapshot, runs_snapshot, said, starts_next
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(280)]


def test_deploy_and_the_last_booted_deployment(disk: Disk, boot: Boot) -> None:
    with boot(disk, uefi=True) as machine:
        machine.login(hasten=False)
        said(machine, "test -d /sys/firmware/efi")
        runs_snapshot(machine, 0)
        assert new_snapshot(machine, "clone 0") == 1
        said(machine, "ash run 1 touch /usr/share/in-1")
        said(machine, "ash deploy 1")
        starts_next(machine, 1)
        begun = "sh -c 'touch /usr/share/half /var/lib/half; touch /begun; sleep 1000'"
        half = "/.snapshots/rootfs/snapshot-chr1/begun"
        said(machine, f"(ash run 1 {begun} > /dev/null 2>&1 &); until test -e {half}; do sleep 1; done; sync")

        machine.reset()
        machine.choose(r"snapshot 1: ")
        machine.login()
        runs_snapshot(machine, 1)
        said(machine, "test -e /usr/share/in-1")
        is_immutable(machine)
        assert said(machine, "systemctl --failed --plain --no-legend") == ""
        assert said(machine, "ls /.snapshots/rootfs | grep chr || true") == ""
        assert said(machine, "ls /.snapshots/rootfs/snapshot-1/usr/share/half /var/lib/half 2> /dev/null || true") == ""
        said(machine, "ash run 1 touch /usr/share/whole")
        assert new_snapshot(machine, "deploy 0") == 0

        machine.reboot()
        assert "snapshot 1: " in machine.choose("last booted")
        machine.login()
        runs_snapshot(machine, 1)
        starts_next(machine, 0)
        machine.poweroff()
