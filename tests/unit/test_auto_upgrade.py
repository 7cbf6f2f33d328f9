# SPDX-License-Identifier: AGPL-3.0-or-later
"""The time window for reboots of the automatic upgrade."""

import time

import pytest

from ash import Configuration, is_in_window

pytestmark = pytest.mark.budget(5)


@pytest.mark.parametrize(
    ("window", "now", "within"),
    [
        ("02:00-05:00", "02:00", True),
        ("02:00-05:00", "04:59", True),
        ("02:00-05:00", "05:00", False),
        ("02:00-05:00", "01:59", False),
        ("23:00-01:30", "23:30", True),
        ("23:00-01:30", "00:10", True),
        ("23:00-01:30", "12:00", False),
    ],
)
def test_a_window_may_span_midnight(monkeypatch: pytest.MonkeyPatch, window: str, now: str, within: bool) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: now)
    assert is_in_window(Configuration.parse(f"auto_upgrade_window::{window}\n").values["auto_upgrade_window"]) is within
