# SPDX-License-Identifier: AGPL-3.0-or-later
"""Profiles from the real repositories, installed and booted: they deliver what they promise.

Pictures of the screen are kept in the directory that ASH_TEST_SCREENSHOTS names, for people to look at.
"""

import os
import shlex
import time
from pathlib import Path

import pytest

from installer.machine import Machine
from tests.boot.checks import is_healthy, runs_snapshot, said
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(1800)]

# An empty screen has one colour, a text console a few; a desktop with text and a wallpaper has many.
COLOURS = 300
USER, PASSWORD = "somebody", "secret"
MAKE_USER = f"useradd --create-home --shell /bin/bash {USER}; echo {USER}:{PASSWORD} | chpasswd"
GREETER = "pgrep -u lightdm -f ^/usr/sbin/lightdm-gtk-greeter"


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """The directory for screenshots."""
    directory = Path(os.environ.get("ASH_TEST_SCREENSHOTS") or tmp_path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def test_i3_greets_and_lets_a_user_in(disk: Disk, boot: Boot, screenshots: Path) -> None:
    install(disk, "i3")
    disk.shell(1, MAKE_USER)
    disk.ash("deploy", 1)
    with boot(disk) as machine:
        machine.login()
        runs_snapshot(machine, 1)
        await_success(machine, "systemctl is-active graphical.target")
        is_active(machine, "dbus", "lightdm")
        await_success(machine, GREETER)
        assert "greeter" in said(machine, "loginctl list-sessions --no-legend")
        machine.press("shift")  # wakes up a blanked greeter
        shows(machine, screenshots / "i3-greeter.png")
        is_healthy(machine)

        machine.press(*USER, "ret")
        time.sleep(10)  # PAM takes its time to ask for the password
        machine.press(*PASSWORD, "ret")
        await_success(machine, f"pgrep -u {USER} -x i3bar")
        assert f"{USER} seat0" in said(machine, "loginctl list-sessions --no-legend")
        shows(machine, screenshots / "i3-first-start.png")
        machine.press("ret", "ret")  # it asks whether to write a configuration, and for which key
        await_success(machine, f"test -s ~{USER}/.config/i3/config")
        machine.press("meta_l-ret")
        await_success(machine, f"pgrep -u {USER} -x xterm")
        shows(machine, screenshots / "i3-terminal.png")
        assert said(machine, "systemctl --failed --plain --no-legend") == ""
        machine.poweroff()


def test_networkmanager_brings_the_network_up(disk: Disk, boot: Boot) -> None:
    install(disk, "networkmanager")
    disk.ash("deploy", 1)
    with boot(disk) as machine:
        machine.login()
        runs_snapshot(machine, 1)
        is_active(machine, "NetworkManager", "systemd-resolved")
        assert said(machine, "systemctl is-active systemd-networkd || true") == "inactive"
        said(machine, "nm-online --timeout=120")
        assert ":ethernet:connected" in said(machine, "nmcli --terse --fields device,type,state device")
        await_success(
            machine, "getent ahosts $(awk -F/ '/^URIs:/ { print $3; exit }' /etc/apt/sources.list.d/debian.sources)"
        )
        said(machine, "ash refresh 1")
        is_healthy(machine)
        machine.poweroff()


def test_a_server_answers_and_watches(disk: Disk, boot: Boot) -> None:
    install(disk, "server")
    disk.ash("deploy", 1)
    with boot(disk) as machine:
        machine.login()
        runs_snapshot(machine, 1)
        is_active(machine, "ssh", "nftables", "fail2ban")
        assert "ssh-ed25519" in said(machine, "ssh-keyscan 127.0.0.1")
        assert "table inet filter" in said(machine, "nft list ruleset")
        await_success(machine, "fail2ban-client status sshd")
        is_healthy(machine)
        machine.poweroff()


def install(disk: Disk, profile: str) -> None:
    """Install a profile into snapshot 1, a clone of the base."""
    assert disk.clone() == 1
    disk.ash("install", 1, "--profile", profile, seconds=1800)


def is_active(machine: Machine, *units: str) -> None:
    for unit in units:
        await_success(machine, f"systemctl is-active {unit}")


def await_success(machine: Machine, line: str) -> None:
    """Wait until a command succeeds: services may start long after the login prompt under emulation."""
    said(machine, f"timeout 270 sh -c {shlex.quote(f'until {line}; do sleep 1; done')}")


def shows(machine: Machine, file: Path) -> None:
    """Wait until the screen shows more than a console, and save a screenshot."""
    deadline = time.monotonic() + 120
    while len((picture := machine.screenshot()).colours()) < COLOURS and time.monotonic() < deadline:
        time.sleep(2)
    time.sleep(10)  # until it is drawn completely
    picture = machine.screenshot()
    file.write_bytes(picture.png())
    assert len(picture.colours()) >= COLOURS, f"{file} shows {len(picture.colours())} colours"
