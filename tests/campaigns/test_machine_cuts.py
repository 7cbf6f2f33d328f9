# SPDX-License-Identifier: AGPL-3.0-or-later
"""The power of a machine is cut sixty times, at random moments of the commands that change its disk.

The disk has a volatile write cache. ASH_TEST_POWER_CUTS is another number of cuts.
"""

import os
import random
from pathlib import Path

import pytest

from tests.boot.conftest import Boot
from tests.boot.power_cuts import COMMANDS, cut_the_power, prepare
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(7200)]

CUTS = int(os.environ.get("ASH_TEST_POWER_CUTS", "60"))
CHAIN = 10  # cuts of one machine: a long life makes what goes wrong hard to see


@pytest.mark.parametrize("chain", range(CUTS // CHAIN))
def test_a_machine_survives_many_power_cuts(disk: Disk, boot: Boot, tmp_path: Path, chain: int) -> None:
    prepare(disk, tmp_path)
    chance = random.Random(chain)
    assert cut_the_power(disk, boot, chance.choices([*COMMANDS], k=CHAIN), chance), "no cut has lost a block"
