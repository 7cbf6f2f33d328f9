# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the README's first command shows a newcomer: by itself, and in a terminal."""

import subprocess
import sys

import pytest

from tests.support import CHECKOUT, Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(360)]

TRY = [sys.executable, str(CHECKOUT / "init.py"), "try"]
TOUR = ["ash tree", "ash clone 0", "ash install 1 hello", "ash deploy 1", "reboot", "hello", "ash tree", "ash branch 1"]
TOUR += ["ash run 2 rm", "ash deploy 2", "reboot", "ash rollback"]


def test_the_tour_shows_each_step_and_leaves_the_image_as_it_was(disk: Disk) -> None:
    before = disk.image.stat().st_mtime_ns
    toured = subprocess.run([*TRY, disk.image, "--tour"], stdout=subprocess.PIPE, text=True, timeout=1500, check=False)
    assert toured.returncode == 0, toured.stdout
    typed = iter(line.removeprefix("    # ") for line in toured.stdout.splitlines() if line.startswith("    # "))
    missing = [command for command in TOUR if not any(line.startswith(command) for line in typed)]
    assert not missing
    assert "Hello, world!" in toured.stdout
    assert disk.image.stat().st_mtime_ns == before
