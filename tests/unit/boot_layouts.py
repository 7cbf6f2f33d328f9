# SPDX-License-Identifier: AGPL-3.0-or-later
"""Boot directories of several distributions, recorded as listings in data/boot."""

from pathlib import Path

LISTINGS = Path(__file__).parent / "data/boot"


def make_root(root: Path, name: str) -> Path:
    """Create the files of a listing: `PATH`, `PATH/`, `PATH -> TARGET` or `PATH = CONTENT` in each line."""
    for line in (LISTINGS / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        path, _, target = line.partition(" -> ")
        path, _, content = path.partition(" = ")
        file = root / path
        if path.endswith("/"):
            file.mkdir(parents=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if target:
            file.symlink_to(target)
        else:
            file.write_text(f"{content or path}\n")
    return root
