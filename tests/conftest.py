# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures for all tests, and a report of the time that each module took and was allowed to take."""

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import settings

from tests.support import CHECKOUT, Disk

BUDGETS: dict[str, float] = {}
TIMES: defaultdict[str, float] = defaultdict(float)
CUTS: defaultdict[str, int] = defaultdict(int)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _interrupt(number: int, _: FrameType | None) -> None:
    """Let pytest tear down its fixtures. Later signals do nothing: the cleanup must not be interrupted."""
    for other in SIGNALS:
        signal.signal(other, lambda *_: None)
    raise KeyboardInterrupt


# A shell that starts the tests in the background ignores Ctrl-C, and nohup ignores hang-ups: all processes started by
# the tests would inherit that.
for stopped_by in SIGNALS:
    signal.signal(stopped_by, _interrupt)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says more of the machine than of ash.
settings.register_profile("ash", deadline=None)
settings.load_profile("ash")


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar file of a root. tests/run makes one for all processes."""
    if ready := os.environ.get("ASH_TEST_ROOTFS"):
        return Path(ready)
    made = tmp_path_factory.mktemp("rootfs") / "root.tar"
    subprocess.run([sys.executable, CHECKOUT / "init.py", "--make-rootfs", made], check=True)
    return made


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk image as the installer makes it under umask 077; tests change only copies of it. tests/run makes one for all processes."""
    if ready := os.environ.get("ASH_TEST_IMAGE"):
        return Path(ready)
    made = tmp_path_factory.mktemp("image") / "disk.img"
    rootfs = os.environ.get("ASH_TEST_ROOTFS")
    source = ["--rootfs", rootfs] if rootfs else []
    subprocess.run([sys.executable, CHECKOUT / "init.py", "--image", made, *source], check=True, umask=0o077)
    return made


@pytest.fixture
def disk(image: Path, tmp_path: Path) -> Iterator[Disk]:
    """A private copy of the image, with snapshot 0 deployed. It must not stay mounted."""
    copy = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", image, copy], check=True)
    disk = Disk(copy)
    yield disk
    left = disk.attached()
    copy.unlink()
    assert not left, f"still attached: {left}"


def _budget(item: pytest.Item) -> float:
    """The seconds that the tests of an item's module may take."""
    budget = item.get_closest_marker("budget")
    return float(budget.args[0]) if budget else 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest modules, so that all processes end at about the same time."""
    items.sort(key=_budget, reverse=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Pass the module's budget to the process that prints the report."""
    report = yield
    report.user_properties.append(("budget", _budget(item)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the time of each module, including its fixtures."""
    module = report.nodeid.split("::")[0]
    TIMES[module] += report.duration
    for name, value in report.user_properties:
        if name == "budget":
            BUDGETS[module] = float(str(value))
        if name == "cuts" and report.when == "call":
            CUTS[module] += int(str(value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each module's budget and time."""
    terminalreporter.section("seconds: budget, taken")
    for module in sorted(TIMES):
        budget, taken = BUDGETS.get(module, 0.0), TIMES[module]
        over = "  over its budget" if taken > budget else ""
        cuts = f"  {CUTS[module]} cuts" if CUTS[module] else ""
        terminalreporter.write_line(f"{budget:7.0f} {taken:7.1f}  {module}{cuts}{over}")
