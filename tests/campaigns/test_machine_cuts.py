# SPDX-License-Identifier: AGPL-3.0-or-later
"""The power of a machine is cut at random moments of each command that changes its disk, sixty times.

ASH_TEST_POWER_CUTS is another number.

"""

import os
import random
from pathlib import Path

import pytest

from tests.boot.conftest import Boot
from tests.boot.test_power_cuts import cut_the_power, prepare
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(7200)]

CUTS = int(os.environ.get("ASH_TEST_POWER_CUTS", "60"))
CHAIN = 10  # cuts of one machine: a long life makes what goes wrong hard to see

BRANCH = "n=$(ash -q branch 1)"
COMMANDS = {
    "install": (f"{BRANCH}; ash install $n ash-test-daemon", 25),
    "upgrade": (f"{BRANCH}; ash upgrade $n", 25),
    "deploy": (f"{BRANCH}; ash deploy $n", 12),
    "bless": ("ash bless", 4),
    "del": (f"{BRANCH}; ash -y del $n", 10),
    "etc-update": ("date > /etc/edited; ash etc-update", 8),
    "auto-upgrade": ("ash auto-upgrade", 40),
}


@pytest.mark.parametrize("chain", range(CUTS // CHAIN))
def test_a_machine_survives_many_power_cuts(disk: Disk, boot: Boot, tmp_path: Path, chain: int) -> None:
    prepare(disk, tmp_path)
    chance = random.Random(chain)
    cut_the_power(disk, boot, chance.choices([*COMMANDS.values()], k=CHAIN), chance)
