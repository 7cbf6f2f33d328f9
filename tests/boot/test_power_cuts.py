# SPDX-License-Identifier: AGPL-3.0-or-later
"""A machine survives power cuts. tests/campaigns/test_machine_cuts.py cuts the power more often."""

import random
from pathlib import Path

import pytest

from tests.boot.conftest import Boot
from tests.boot.power_cuts import cut_the_power, prepare
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(420)]


def test_a_machine_comes_up_after_power_cuts_and_has_all_that_was_synced(
    disk: Disk, boot: Boot, tmp_path: Path
) -> None:
    prepare(disk, tmp_path)
    cut_the_power(disk, boot, ["install", "deploy", "del", "etc-update", "auto-upgrade"], random.Random("cuts"))
