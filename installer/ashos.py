# SPDX-License-Identifier: AGPL-3.0-or-later
"""Systems of AshOS on the file systems of ours: their names, trees and boot loaders, as far as they can be read.

Their subvolumes are named as ours. While AshOS could install only one system on a file system, they had no suffix.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ash import BASE, Layout, one_line, os_release, path_inside, read_text

ALONE = Layout.SUBVOLUMES[0]  # what `@.snapshots_D` was called then; others use that name too
DISTRO_SUFFIX = "_ashos"  # of ID in os-release
MAP = "EFI/map.txt"  # on the EFI partition: a line for each system, with the number of its entry in the firmware


class LayoutAlone(Layout):
    """The layout of a system whose subvolumes have no suffix."""

    def volume_name(self, prefix: str) -> str:
        """A top-level subvolume's name, such as `@var`."""
        return prefix


def all_on(top: Path) -> list[Layout]:
    """The layouts of all systems on a file system whose top level is mounted, with those of AshOS."""
    alone = LayoutAlone(top / ALONE, "", top)
    if alone.is_of_ashos:
        alone.distro = _release(alone, "ID").removesuffix(DISTRO_SUFFIX) or "linux"
    return [*Layout.all_on(top), *([alone] if alone.is_of_ashos else [])]


def subvolumes(layout: Layout) -> list[Path]:
    """The top-level subvolumes of a system; some may be missing. `@.snapshots_D` is the last one."""
    prefixes = Layout.SUBVOLUMES if layout.is_of_ashos else Layout.POSSIBLE_SUBVOLUMES
    found = [layout.volume(prefix) for prefix in prefixes]
    if layout.is_of_ashos and not isinstance(layout, LayoutAlone):
        found.append(layout.volume("@"))  # the root while it is being installed
    return [path for path in found if path != layout.snapshots] + [layout.snapshots]


def name(layout: Layout) -> str:
    """What a system of AshOS is called, for people."""
    return _release(layout, "PRETTY_NAME") or layout.distro


def _release(layout: Layout, key: str) -> str:
    """A value of os-release: snapshot 0 has an empty /etc in AshOS, but deployments have theirs."""
    roots = [*sorted(layout.rootfs(BASE).parent.glob("snapshot-deploy*")), layout.rootfs(BASE)]
    return next((found for root in roots if root.is_dir() and (found := os_release(root, key))), "")


def efi_uuid(layout: Layout) -> str:
    """The UUID of the EFI partition of a system; empty if it has none. AshOS notes it only in fstab."""
    if not layout.is_of_ashos:
        return read_text(layout.efi).strip()
    tables = [path_inside(root, "etc/fstab") for root in sorted(layout.rootfs(BASE).parent.glob("snapshot-deploy*"))]
    text = "\n".join(map(read_text, tables))
    found = re.search(r'^UUID="?([^\s"]+)"?\s+/boot/efi\s', text, re.MULTILINE)
    return found[1] if found else ""


def draw(layout: Layout) -> str:
    """The tree of a system of AshOS with the descriptions, a line for each snapshot; why not, if it cannot be read."""
    try:
        rows = [*_walk(ast.literal_eval(read_text(layout.tree).strip()))]
    except (ValueError, SyntaxError, TypeError, LookupError, RecursionError, MemoryError) as error:
        return f"its tree file cannot be read: {one_line(str(error))}"
    texts = {number: read_text(layout.description(number)).strip() for number, _ in rows}
    texts[BASE] = "base snapshot"
    return "\n".join(f"{'  ' * depth}{number} - {one_line(texts[number])}" for number, depth in rows)


def _walk(node: Any, depth: int = 0) -> Iterator[tuple[int, int]]:
    """The snapshots below a node of the tree file, with their depth: it is a dict with a name and perhaps children."""
    for child in node.get("children", []) if isinstance(node, dict) else []:
        yield int(child["name"]), depth
        yield from _walk(child, depth + 1)


def without(boot_numbers: str, ident: str) -> str:
    """The text of MAP without the lines of a system."""
    kept = []
    is_its = False
    for line in boot_numbers.splitlines():
        is_its = line.startswith(f"{ident},") or (
            is_its and "," not in line
        )  # further numbers are on lines of their own
        kept += [] if is_its else [line]
    return "".join(f"{line}\n" for line in kept)
