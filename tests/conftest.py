# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures of all tests, and the report of what each module was allowed to take and what it took."""

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import CHECKOUT, Disk

BUDGETS: dict[str, float] = {}
TIMES: defaultdict[str, float] = defaultdict(float)
CUTS: defaultdict[str, int] = defaultdict(int)

# A shell that starts the tests in the background has Ctrl-C ignored, and nohup hang-ups: and so it would be in all that
# they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says more of the machine than of ash.
settings.register_profile("ash", deadline=None)
settings.load_profile("ash")


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk image as the installer makes it; no test changes it. tests/run makes one for all processes."""
    if ready := os.environ.get("ASH_TEST_IMAGE"):
        return Path(ready)
    made = tmp_path_factory.mktemp("image") / "debian.img"
    rootfs = os.environ.get("ASH_TEST_ROOTFS")
    source = ["--rootfs", rootfs] if rootfs else []
    subprocess.run([sys.executable, CHECKOUT / "init.py", "--image", made, *source], check=True)
    return made


@pytest.fixture
def disk(image: Path, tmp_path: Path) -> Iterator[Disk]:
    """A disk of the test's own, with snapshot 0 deployed; nothing of it may stay mounted."""
    copy = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", image, copy], check=True)
    disk = Disk(copy)
    yield disk
    left = disk.attached()
    copy.unlink()
    assert not left, f"still attached: {left}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the process that prints the report, which may be another, of the module's budget."""
    report = yield
    budget = item.get_closest_marker("budget")
    if budget:
        report.user_properties.append(("budget", budget.args[0]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what each module takes, with its fixtures."""
    module = report.nodeid.split("::")[0]
    TIMES[module] += report.duration
    for name, value in report.user_properties:
        if name == "budget":
            BUDGETS[module] = float(str(value))
        if name == "cuts" and report.when == "call":
            CUTS[module] += int(str(value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the budgets beside the times."""
    terminalreporter.section("seconds: budget, taken")
    for module in sorted(TIMES):
        budget, taken = BUDGETS.get(module, 0.0), TIMES[module]
        over = "  over its budget" if taken > budget else ""
        cuts = f"  {CUTS[module]} cuts" if CUTS[module] else ""
        terminalreporter.write_line(f"{budget:7.0f} {taken:7.1f}  {module}{cuts}{over}")
