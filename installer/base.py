# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is created once, at installation: ash's state, and snapshot 0 from a plain root."""

import os
from pathlib import Path

from ash import (
    BASE,
    CONF_EXAMPLE,
    IN_ROOT_DB,
    SHARED_DIRECTORIES,
    AccountIds,
    Distro,
    Layout,
    Tree,
    in_database,
    make_bootable,
    make_startable,
    remove_tree,
    renew_copy,
    run,
    set_readonly,
    write_file,
    write_inside,
    write_packages,
)


def create_state(layout: Layout, distro: Distro, root_uuid: str) -> None:
    """Create ash's state on a new system, with snapshot 0 alone in the tree.

    Args:
        layout: the paths; the subvolumes and the directory `ash` exist.
        distro: the distribution.
        root_uuid: of the root file system.
    """
    for directory in (layout.ash / "snapshots", layout.ash / "work"):
        directory.mkdir(exist_ok=True)
    layout.home_root.mkdir(mode=0o700, exist_ok=True)
    tree = Tree()
    tree.add(BASE)
    write_file(layout.tree, tree.dump())
    write_file(layout.last, "0\n")
    write_file(layout.part, f"{root_uuid}\n")
    write_file(layout.distro_file, f"{layout.distro} {distro.id}\n")
    write_file(layout.description(BASE), "base snapshot\n")


def split_base(layout: Layout, distro: Distro) -> None:
    """Turn the plain root in `rootfs/snapshot-0` into snapshot 0: shared data moves out, the rest becomes read-only.

    Args:
        layout: the paths; the subvolumes and the state exist.
        distro: the distribution.
    """
    root = layout.rootfs(BASE)
    (root / IN_ROOT_DB).mkdir(parents=True, exist_ok=True)
    for name in distro.package_manager.database:
        own, shared = root / in_database(name), root / "var" / name
        own.parent.mkdir(parents=True, exist_ok=True)
        if shared.is_dir():
            shared.rename(own)
        else:
            own.mkdir()
            shared.parent.mkdir(parents=True, exist_ok=True)
        shared.symlink_to(f"/{in_database(name)}")
    for name in distro.package_manager.database_files:
        if (root / "var" / name).exists():
            (root / "var" / name).rename(root / in_database(name))
    distro.package_manager.prepare_base(root)
    write_inside(root, "etc/ash.conf", CONF_EXAMPLE)
    ids = AccountIds()
    ids.learn(root / "etc")
    write_file(layout.ids, ids.dump())
    for directory, shared in (("var", layout.var), ("home", layout.home), ("root", layout.home_root)):
        run(["cp", "-a", "--reflink=auto", f"{root / directory}/.", shared])
        remove_tree(root / directory)
        (root / directory).mkdir()
    for directory in SHARED_DIRECTORIES:
        (layout.var / directory).mkdir(exist_ok=True)
    note_update(root, layout.var)
    make_bootable(layout, distro, root, BASE, layout.part.read_text().strip())
    make_startable(root, layout=layout, tools=distro.boot_tools)
    for name in ("etc", "boot"):
        renew_copy(layout, BASE, name)
    write_packages(layout, BASE, distro.package_manager.installed(root))
    set_readonly(root)


def note_update(root: Path, var: Path) -> None:
    """Note that /etc and /var are as new as /usr, for systemd.

    Otherwise it would build the linker's cache and the journal's catalog again at the first start of each deployment,
    although the packages' scripts have just done so (systemd-update-done.service(8)).
    """
    if not (root / "usr/lib/systemd").is_dir():
        return
    changed = (root / "usr").stat().st_mtime_ns
    for directory in (root / "etc", var):
        file = directory / ".updated"
        file.write_text(f"TIMESTAMP_NSEC={changed}\n")
        os.utime(file, ns=(changed, changed))
