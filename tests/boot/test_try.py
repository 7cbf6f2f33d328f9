# SPDX-License-Identifier: AGPL-3.0-or-later
"""`init.py try`, the README's first command: the tour by itself, and in a terminal."""

import os
import subprocess
import sys

import pytest

from tests.support import CHECKOUT, Disk, Terminal

pytestmark = [pytest.mark.boot, pytest.mark.budget(450)]

TRY = [sys.executable, str(CHECKOUT / "init.py"), "try"]
TOUR = ["ash tree", "ash clone 0", "ash install 1 hello", "ash deploy 1", "reboot", "hello", "ash tree", "ash branch 1"]
TOUR += ["ash run 2 ln", "ash deploy 2", "reboot", "hello", "ash status"]


def test_the_tour_shows_each_step_and_leaves_the_image_as_it_was(disk: Disk) -> None:
    before = disk.image.stat().st_mtime_ns
    toured = subprocess.run([*TRY, disk.image, "--tour"], stdout=subprocess.PIPE, text=True, timeout=1500, check=False)
    assert toured.returncode == 0, toured.stdout
    typed = iter(line.removeprefix("    # ") for line in toured.stdout.splitlines() if line.startswith("    # "))
    missing = [command for command in TOUR if not any(line.startswith(command) for line in typed)]
    assert not missing
    assert "Hello, world!" in toured.stdout
    assert disk.image.stat().st_mtime_ns == before


def test_a_terminal_ends_logged_in_with_five_suggestions(disk: Disk) -> None:
    with Terminal([*TRY, str(disk.image)]) as terminal:
        shown = terminal.expect(r"ash rollback .*\n", seconds=300)
        assert shown.count("\n  ash ") == 5
        terminal.type("ash tree\n")
        terminal.expect(r"0\*- base snapshot")
        terminal.type("ash -q clone 0\n")
        terminal.expect(r"[\r\n]1\r")
        terminal.type("systemctl poweroff\n")
        terminal.expect("as you left it", seconds=120)
        assert terminal.wait() == os.EX_OK
    assert len(disk.ash("--json", "tree").json["tree"]) == 2
