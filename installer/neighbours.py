# SPDX-License-Identifier: AGPL-3.0-or-later
"""The systems that share one btrfs file system, each with its own top-level subvolumes: adding one, removing one."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ash import (
    BASE,
    REFUSED,
    AshError,
    Layout,
    create_subvolume,
    delete_subvolume,
    snapshot_subvolume,
    sync_filesystem,
)


def require_free(layout: Layout) -> None:
    """Raise AshError (REFUSED) if a complete system has that id, or there is a subvolume that a new one would have."""
    if layout.snapshots.exists():
        if not layout.is_complete:
            return
        hint = "name another id, after the devices or with --id"
        raise AshError(f"there is a system {layout.distro} on this file system", hint, REFUSED)
    for prefix in Layout.SUBVOLUMES:
        if layout.volume(prefix).exists():
            hint = "name another id, or delete it if nobody needs it"
            raise AshError(f"there is a subvolume {layout.volume_name(prefix)}, without a system", hint, REFUSED)


@contextmanager
def new_subvolumes(layout: Layout) -> Iterator[None]:
    """Create the subvolumes of a system, which is complete when the block ends; if that fails they are deleted."""
    if layout.snapshots.exists():
        delete(layout)
    create_subvolume(layout.snapshots)
    try:
        layout.unfinished.touch()
        sync_filesystem(layout.snapshots)
        for prefix in Layout.SUBVOLUMES:
            if layout.volume(prefix) != layout.snapshots:
                create_subvolume(layout.volume(prefix))
        yield
        sync_filesystem(layout.snapshots)
        layout.unfinished.unlink()
        sync_filesystem(layout.snapshots)
    except BaseException:
        with contextlib.suppress(AshError, OSError):  # the disk may be broken; then the rest counts as unfinished
            delete(layout)
        raise


def delete(layout: Layout) -> None:
    """Delete a system's subvolumes. If it is interrupted, the system counts as not complete."""
    layout.unfinished.touch()
    sync_filesystem(layout.snapshots)
    for prefix in Layout.SUBVOLUMES:
        if layout.volume(prefix) != layout.snapshots:
            delete_subvolume(layout.volume(prefix))
    sync_filesystem(layout.snapshots)
    delete_subvolume(layout.snapshots)


@contextmanager
def writable_copy(layout: Layout) -> Iterator[Path]:
    """A writable copy of a system's snapshot 0, for the block."""
    copy = layout.snapshots / "loader"
    delete_subvolume(copy)  # of an interrupted run
    snapshot_subvolume(layout.rootfs(BASE), copy)
    try:
        yield copy
    finally:
        delete_subvolume(copy)
