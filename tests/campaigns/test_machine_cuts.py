# SPDX-License-Identifier: AGPL-3.0-or-later
"""The power of a machine is cut sixty times, at random moments of the commands that change its disk.

The disk has a volatile write cache. ASH_TEST_POWER_CUTS is another number of cuts.
"""

import os
import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from installer.machine import Machine
from tests.archive import Archive, use_only
from tests.boot.checks import said
from tests.boot.conftest import Boot
from tests.support import Disk
from tests.write_log import volatile_cache

pytestmark = [pytest.mark.boot, pytest.mark.budget(7200)]

CUTS = int(os.environ.get("ASH_TEST_POWER_CUTS", "60"))
CHAIN = 10  # cuts of one machine: a long life makes what goes wrong hard to see

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


def cut_the_power(disk: Disk, boot: Boot, commands: Iterable[tuple[str, float]], chance: random.Random) -> None:
    """Cut the power during each of some commands, and check the machine at its next start."""
    cuts = 0
    lost: list[int] = []
    for line, seconds in commands:
        with volatile_cache(disk, chance, lost) as shown, boot(shown, flushes=True) as machine:
            comes_up(machine, cuts)
            said(machine, f"for place in /home /var/lib; do echo {cuts} > $place/synced-{cuts}; done; sync")
            machine.send(f"{line}\n")
            time.sleep(chance.random() * seconds)
            machine.cut_power()
        cuts += 1
    with boot(disk) as machine:
        comes_up(machine, cuts)
    assert any(lost), "no cut lost a block: nothing was tried"


def comes_up(machine: Machine, cuts: int) -> None:
    """Assert that a machine starts, has all synced data, and that fsck finds nothing."""
    machine.login(patient=True)
    for place in ("/home", "/var/lib"):
        synced = said(machine, f"for n in $(seq 0 {cuts - 1}); do cat {place}/synced-$n; done")
        assert synced.split() == [str(number) for number in range(cuts)]
    assert said(machine, "ash fsck") == "no problems found"
    assert said(machine, "systemctl --failed --plain --no-legend") == ""


@pytest.mark.parametrize("chain", range(CUTS // CHAIN))
def test_a_machine_survives_many_power_cuts(disk: Disk, boot: Boot, tmp_path: Path, chain: int) -> None:
    prepare(disk, tmp_path)
    chance = random.Random(chain)
    cut_the_power(disk, boot, chance.choices([*COMMANDS.values()], k=CHAIN), chance)
