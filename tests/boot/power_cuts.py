# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cut the power of a machine whose disk has a volatile write cache, at random moments of commands."""

import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from installer.machine import Machine
from tests.archive import Archive, use_only
from tests.boot.checks import said
from tests.boot.conftest import Boot
from tests.support import Disk
from tests.write_log import VolatileCache

BRANCH = "n=$(ash -q branch 1)"
# A command line, and how many seconds it takes under emulation. Snapshot 1 runs.
COMMANDS = {
    "install": (f"{BRANCH}; ash install $n ash-test-daemon", 25),
    "upgrade": (f"{BRANCH}; ash upgrade $n", 25),
    "deploy": (f"{BRANCH}; ash deploy $n", 12),
    "bless": ("ash bless", 4),
    "del": (f"{BRANCH}; ash -y del $n", 10),
    "etc-update": ("date > /etc/edited; ash etc-update", 8),
    "auto-upgrade": ("ash auto-upgrade", 40),
}


def prepare(disk: Disk, directory: Path) -> None:
    """A running snapshot whose package can be upgraded."""
    for state in ("1", "2"):
        archive = Archive(directory / state)
        archive.add("ash-test-tool", state, files={"usr/share/tool": f"{state}\n", "var/lib/tool/x": f"{state}\n"})
        archive.add("ash-test-daemon", files={"usr/share/daemon": "x\n", "var/lib/daemon/x": "x\n"})
    with disk.files() as files:
        for state in ("1", "2"):
            shutil.copytree(directory / state, files.home / state)
        (files.home / "archive").symlink_to("1")
    disk.shell(disk.clone(), use_only("file:/home/archive"))
    disk.ash("refresh", 1)
    disk.ash("install", 1, "ash-test-tool")
    disk.ash("deploy", 1)
    with disk.files() as files:
        (files.home / "archive").unlink()
        (files.home / "archive").symlink_to("2")


def cut_the_power(disk: Disk, boot: Boot, names: Iterable[str], chance: random.Random) -> int:
    """Cut the power during each of some COMMANDS, and check the machine at its next start.

    Returns how many blocks the disk has lost.
    """
    cuts = lost = 0
    for line, seconds in map(COMMANDS.__getitem__, names):
        cache = VolatileCache(disk, chance)
        with cache.attached() as shown, boot(shown, flushes=True) as machine:
            comes_up(machine, cuts)
            said(machine, f"for place in /home /var/lib; do echo {cuts} > $place/synced-{cuts}; done; sync")
            machine.send(f"{line}\n")
            time.sleep(chance.random() * seconds)
            cache.wait_for_writes(seconds)
            machine.cut_power(cache.power_is_cut)
        cuts += 1
        lost += cache.lost
    with boot(disk) as machine:
        comes_up(machine, cuts)
    return lost


def comes_up(machine: Machine, cuts: int) -> None:
    """Assert that a machine starts, has all synced data, and that fsck finds nothing."""
    machine.login(patient=True)
    for place in ("/home", "/var/lib"):
        synced = said(machine, f"for n in $(seq 0 {cuts - 1}); do cat {place}/synced-$n; done")
        assert synced.split() == [str(number) for number in range(cuts)]
    assert said(machine, "ash fsck") == "no problems found"
    assert said(machine, "systemctl --failed --plain --no-legend") == ""
