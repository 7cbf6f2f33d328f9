# SPDX-License-Identifier: AGPL-3.0-or-later
"""Fixtures of the tests about faults."""

from pathlib import Path

import pytest

from tests.system.faults.crash_scene import Scene


@pytest.fixture(scope="session")
def scene(reflinks: Path, image: Path) -> Scene:
    """A disk on which each command has something to do, to be copied."""
    directory = reflinks / "scene"
    directory.mkdir()
    return Scene(directory, image)
