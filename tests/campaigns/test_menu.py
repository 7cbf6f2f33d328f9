# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every snapshot can be started from GRUB's menu as it is, however many there are."""

import time

import pytest

from installer.machine import Machine
from tests.boot.checks import refused, said
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(1800)]

HOSTILE = "it's \"${root}\" $(reboot) `x` } menuentry {' \\"


def starts_as_it_is(machine: Machine, number: int) -> None:
    """Choose a snapshot in the submenu, and assert that it runs read-only, with an /etc that is thrown away."""
    machine.choose("All snapshots")
    machine.choose(rf"^ *{number} - ")
    machine.login()
    assert said(machine, "ash current") == str(number)
    assert said(machine, "systemctl is-system-running --wait || true") == "running"
    assert "as it is" in said(machine, "ash status")
    assert said(machine, "cat /usr/share/number") == str(number)
    for path in ("/usr", "/boot", "/usr/share/ash"):
        refused(machine, f"touch {path}/written", "Read-only file system")
    said(machine, "touch /etc/written /var/lib/of-$(ash current) /home/of-$(ash current)")
    refused(machine, "ash etc-update", f"ash deploy {number}")


def test_three_depths_of_a_tree_are_started_from_the_menu(disk: Disk, boot: Boot) -> None:
    numbers = tree_of_twelve(disk)
    with boot(disk) as machine:
        for number in numbers:
            starts_as_it_is(machine, number)
            machine.reboot()
        machine.login()
        assert said(machine, "ash current") == "0"
        said(machine, "ls " + " ".join(f"{place}/of-{n}" for place in ("/var/lib", "/home") for n in numbers))
        said(machine, "! test -e /etc/written")
        said(machine, f"ash deploy {numbers[-1]}")

        machine.reboot()
        machine.login()
        assert said(machine, "ash current") == str(numbers[-1])
        said(machine, "! test -e /etc/written && touch /etc/written")
        said(machine, "until systemctl is-active ash-bless; do sleep 1; done")

        machine.reboot()
        machine.choose("Rescue")
        machine.choose("before the last 2 changes")  # of which the second was that it is known to boot
        machine.login()
        assert said(machine, "ash current") == "0"
        machine.poweroff()


def tree_of_twelve(disk: Disk) -> list[int]:
    """Make a tree; returns one snapshot of each of three depths."""
    first = disk.clone()
    for _ in range(4):
        disk.clone()
    second = disk.branch(first)
    for _ in range(3):
        disk.branch(first)
    third = disk.branch(second)
    disk.branch(third)
    disk.ash("desc", third, HOSTILE)
    for number in (first, second, third):
        disk.shell(number, f"echo {number} > /usr/share/number")
    assert len(disk.ash("--json", "tree").json["tree"]) == 12
    return [first, second, third]


@pytest.mark.parametrize("uefi", [False, True], ids=["BIOS", "UEFI"])
@pytest.mark.parametrize("count", [200, 1000])
def test_a_menu_of_many_snapshots_opens_at_once(disk: Disk, boot: Boot, count: int, uefi: bool) -> None:
    number = disk.clone()
    seconds = {}
    for many in (2, count):
        with disk.files() as files:
            text = (files.grub_cfg.parent / "snapshots.cfg").read_text()
            entry = text[text.index("menuentry", text.index("ash-snapshot-0")) :]
            entries = "".join(
                entry.replace(f"'{number} - ", f"'{n} - ").replace("-1 ", f"-{n} ", 1) for n in range(many)
            )
            (files.grub_cfg.parent / "snapshots.cfg").write_text(entries)
        with boot(disk, uefi=uefi) as machine:
            machine.choose("All snapshots")
            began = time.monotonic()
            machine.expect("which entry is highlighted", 300)
            seconds[many] = time.monotonic() - began
    print(f"{count}: {seconds}")
    assert seconds[count] < seconds[2] + 60, "under emulation, which is some 30 times slower than a machine"
