# SPDX-License-Identifier: AGPL-3.0-or-later
"""The systems that share one btrfs file system, each with its own top-level subvolumes: adding one, removing one."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ash import (
    BASE,
    REFUSED,
    AshError,
    Layout,
    Lock,
    create_subvolume,
    delete_subvolume,
    read_text,
    snapshot_subvolume,
    sync_filesystem,
    write_file,
)
from installer import ashos

SECONDS = 60  # to wait until another ash has deployed


# What the mark of a system says that is complete but for its boot loader.
LACKS_LOADER = "boot loader\n"


def lacks_loader(layout: Layout) -> bool:
    """Whether a system is complete, but nobody knows whether its boot loader is."""
    return read_text(layout.unfinished) == LACKS_LOADER


def require_free(layout: Layout, there: Sequence[str]) -> None:
    """Raise AshError (REFUSED) if a complete system has that id, or there is a subvolume that a new one would have.

    Args:
        layout: of the new system.
        there: the ids of all systems.
    """
    is_unfinished = layout.snapshots.exists() and not layout.is_complete
    if layout.distro in there and not is_unfinished:
        hint = "name another id, after the devices or with --id"
        raise AshError(f"there is a system {layout.distro} on this file system", hint, REFUSED)
    for prefix in () if is_unfinished else Layout.POSSIBLE_SUBVOLUMES:
        if layout.volume(prefix).exists():
            hint = "name another id, or delete it if nobody needs it"
            raise AshError(f"there is a subvolume {layout.volume_name(prefix)}, without a system", hint, REFUSED)


@contextmanager
def new_subvolumes(layout: Layout) -> Iterator[None]:
    """Create the subvolumes of a system, which only lacks its boot loader when the block ends.

    If the block fails they are deleted.
    """
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
        write_file(layout.unfinished, LACKS_LOADER)
        sync_filesystem(layout.snapshots)
    except BaseException:
        with contextlib.suppress(AshError, OSError):  # the disk may be broken; then the rest counts as unfinished
            delete(layout)
        raise


def finish(layout: Layout) -> None:
    """Note that a system is complete, with its boot loader."""
    sync_filesystem(layout.snapshots)
    layout.unfinished.unlink(missing_ok=True)
    sync_filesystem(layout.snapshots)


@contextmanager
def nobody_deploys(layouts: Iterable[Layout]) -> Iterator[None]:
    """Keep each ash on these systems from deploying in the block: it would write to the EFI partition too.

    Raises:
        AshError: one is deploying (LOCKED).
    """
    with ExitStack() as stack:
        for layout in layouts:
            directory = layout.work("deploy")
            if directory.parent.is_dir():  # else it is a system of AshOS
                directory.mkdir(exist_ok=True)
                stack.enter_context(Lock(directory / "lock", f"deploy of {layout.distro}", SECONDS))
        yield


@contextmanager
def begun_to_remove(layout: Layout) -> Iterator[None]:
    """Note before the block that a system is not complete any more; if the block fails, it is again."""
    was_complete = layout.is_complete
    write_file(layout.unfinished, "")
    sync_filesystem(layout.snapshots)
    try:
        yield
    except (AshError, OSError):
        if was_complete:
            layout.unfinished.unlink(missing_ok=True)
        raise


def delete(layout: Layout) -> None:
    """Delete a system's subvolumes. If it is interrupted, the system counts as not complete."""
    write_file(layout.unfinished, "")
    sync_filesystem(layout.snapshots)
    *others, last = ashos.subvolumes(layout)
    for subvolume in others:
        delete_subvolume(subvolume)
    sync_filesystem(layout.snapshots)
    delete_subvolume(last)


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
