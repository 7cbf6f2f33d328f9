# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every command is killed at each step and at random times, and the power is cut at each step.

ASH_TEST_INSTANTS is the number of random times at which each signal is sent to a command.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.support import DONE, wait_until
from tests.system.faults.crash_scene import COMMANDS, Scene, Tried

pytestmark = [pytest.mark.system, pytest.mark.budget(2700)]

INSTANTS = int(os.environ.get("ASH_TEST_INSTANTS", "4"))
SIGNALS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
Record = Callable[[str, object], None]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_each_step(scene: Scene, name: str, record_property: Record) -> None:
    record_property("cuts", scene.check_kills(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_power_cut_at_each_step(scene: Scene, name: str, record_property: Record) -> None:
    record_property("cuts", scene.check_power_cuts(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_times(scene: Scene, name: str, record_property: Record) -> None:
    tried = scene.tried(COMMANDS[name])
    usual = seconds(scene, name)
    chance = random.Random(name)
    for kind in sorted(SIGNALS) * INSTANTS:
        kill_after(scene, tried, name, kind, chance.random() * usual)
    record_property("cuts", len(SIGNALS) * INSTANTS)


def seconds(scene: Scene, name: str) -> float:
    """How long a command takes."""
    began = time.monotonic()
    with scene.copy(COMMANDS[name]) as copy:
        scene.run_on(copy, COMMANDS[name])
        return time.monotonic() - began


def kill_after(scene: Scene, tried: Tried, name: str, kind: signal.Signals, after: float) -> None:
    """Send a signal to a command after some time; assert that it has done all or nothing, and prints no traceback."""
    where = f"{kind.name} after {after:.3f} s"
    with scene.copy(COMMANDS[name]) as copy:
        began = copy.with_name("began")
        process = subprocess.Popen(
            scene.argv(copy, COMMANDS[name], began=str(began)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(began.exists)  # before that, Python itself starts
        time.sleep(after)
        process.send_signal(kind)
        _, said = process.communicate(timeout=120)
        view = scene.look(copy, COMMANDS[name])
    tried.allows(view, where)
    if process.returncode == DONE:
        tried.is_done(view, where)
    elif kind != signal.SIGKILL:
        assert process.returncode in {-kind, 128 + kind}, f"{where}: {process.returncode}: {said}"
    assert not re.search("Traceback|an error in ash itself", said), f"{where}: {said}"
