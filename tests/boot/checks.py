# SPDX-License-Identifier: AGPL-3.0-or-later
"""Assertions about a running system, made with its own programs."""

import json
import re
import shlex
import time

from installer.machine import Machine

READ_ONLY = "Read-only file system"
# A wrong clock is hours off; an emulated machine lags by seconds.
CLOCK_SECONDS = 120


def said(machine: Machine, line: str) -> str:
    """Run a command that must succeed; returns its output."""
    return machine.command(line, timeout=300).output.strip()


def refused(machine: Machine, line: str, words: str) -> None:
    """Assert that a command fails with a message."""
    result = machine.command(line, ok=None)
    assert result.status != 0
    assert words in result.output


def new_snapshot(machine: Machine, command: str) -> int:
    """Run an ash command that creates a snapshot; returns its number."""
    return int(said(machine, f"ash -q {command}"))


def runs_snapshot(machine: Machine, number: int) -> None:
    """Assert that a snapshot is booted, as ash and the kernel command line say."""
    current = said(machine, "ash current")
    assert current == str(number), current
    assert said(machine, "cat /usr/share/ash/snap") == str(number)
    slot = said(machine, "ash whichtmp")
    cmdline = said(machine, "cat /proc/cmdline")
    assert f"rootfs/snapshot-{slot} " in cmdline
    noted = json.loads(said(machine, "cat /.snapshots/ash/booted"))
    assert noted["slot"] == slot
    assert f"ash.deployment={noted['id']}" in cmdline
    (line,) = [line for line in said(machine, "ash tree").splitlines() if "[booted]" in line]
    assert re.search(rf"\b{number}[* ]-", line)


def starts_next(machine: Machine, number: int) -> None:
    """Assert that the tree marks this snapshot, and only this one, for the next boot."""
    (line,) = [line for line in said(machine, "ash tree").splitlines() if "*" in line]
    assert re.search(rf"\b{number}\*", line)


def is_healthy(machine: Machine) -> None:
    """Assert that no unit has failed, even after all timers have run, and that clock, hostname and logins are right."""
    assert said(machine, "systemctl is-system-running --wait || true") == "running"
    units = said(machine, "systemctl list-timers --all --plain --no-legend | grep -o '[^ ]*$'")
    for unit in units.split():
        machine.command(f"systemctl start {shlex.quote(unit)}", timeout=300)
    assert said(machine, "systemctl --failed --plain --no-legend") == ""
    assert abs(int(said(machine, "date +%s")) - time.time()) < CLOCK_SECONDS
    assert said(machine, "hostname") == said(machine, "cat /etc/hostname")
    said(machine, "getent hosts $(hostname)")
    assert "ttyS0" in said(machine, "loginctl list-sessions --no-legend")


def is_immutable(machine: Machine) -> None:
    """Assert that nothing of a snapshot is writable by any path; shared directories and the deployment's /etc are."""
    slot = said(machine, "ash whichtmp")
    for place in ("/", "/usr", "/boot", f"/.snapshots/rootfs/snapshot-{slot}/usr", "/.snapshots/rootfs/snapshot-0/usr"):
        refused(machine, f"touch {place}/written", READ_ONLY)
    for place in ("/etc", "/var", "/home", "/root", "/tmp", "/var/tmp"):
        said(machine, f"touch {place}/written && rm {place}/written")
    assert said(machine, "stat -c %a /tmp /root").split() == ["1777", "700"]


def online(machine: Machine) -> None:
    """Wait for the network, which may come up after the login prompt."""
    said(machine, "/usr/lib/systemd/systemd-networkd-wait-online --any --timeout=120")
