# SPDX-License-Identifier: AGPL-3.0-or-later
"""The way from nothing to a disk image that boots: all checks first, then the build, step by step."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ash import (
    BASE,
    REFUSED,
    USAGE,
    AshError,
    Layout,
    System,
    attach_disk,
    create_subvolume,
    deploy_snapshot,
    load_distro,
    machine_chroot,
    os_release,
    private_mounts,
    run,
    sync_filesystem,
    write_file,
)
from installer import base, bootloader, disk, executable, host
from installer.distribution import DistroInstaller, Settings, Source, load_installer
from installer.help import FORMATS

# A root, its deployment and one transaction's worth of packages fit into the one; the other is what a build of them
# takes on the host (the root once, and the package archives that are downloaded for it).
MINIMUM_SIZE = 3 * 2**30
HOST_SPACE = 2 * 2**30

TAR_OPTIONS = ("--numeric-owner", "--xattrs", "--xattrs-include=*", "--sparse")
COMPRESSIONS = {".gz": "--gzip", ".tgz": "--gzip", ".xz": "--xz", ".zst": "--zstd"}

# What ash imports beside the standard library; and what those import, in the versions that do.
LIBRARIES = ("anytree", "tabulate")
THEIR_LIBRARIES = ("six.py",)
PIP: host.Tools = {"pip3": "python3-pip"}
GPG: host.Tools = {"gpg": "gpg"}

# Where programs look for help in the formats that ash has it in.
HELP_FILES = {
    "man": "usr/share/man/man8/ash.8",
    "bash": "usr/share/bash-completion/completions/ash",
    "fish": "usr/share/fish/vendor_completions.d/ash.fish",
}


@dataclass(frozen=True)
class Made:
    """A finished image or root, for the report."""

    path: Path
    system: str  # "Debian GNU/Linux 13 (trixie)"
    log: Path


def make_image(
    image: Path, size: int, source: Source, settings: Settings, *, force: bool = False, distro: str = "debian"
) -> Made:
    """Make a disk image with a system that ash manages; it boots by BIOS and by UEFI.

    Args:
        image: the file to make.
        size: of the disk, in bytes.
        source: where the system comes from.
        settings: how it is set up.
        force: whether an existing file is replaced.
        distro: the distribution's id.

    Raises:
        AshError: one of the checks failed, and nothing was written; or the build did, and nothing of it is left but
            its log.
    """
    installer = load_installer(distro)
    host.require_root("make an image")
    host.require_new_file(image, force)
    if size < MINIMUM_SIZE:
        raise AshError(f"{host.gibibytes(size)} are too small", f"at least {host.gibibytes(MINIMUM_SIZE)}", USAGE)
    host.require_space(image.parent, HOST_SPACE)
    host.require_btrfs()
    installer.check(settings)
    host.require({**host.DISK, **_source_tools(installer, source)})
    if settings.keyring is not None:
        _check_keyring(settings.keyring)
    source = _check_source(installer, source, settings)
    log_path = image.with_name(f"{image.name}.log")
    with disk.new_file(image) as part:
        os.truncate(part, size)
        with host.Log(log_path) as log, host.watched_space(image.parent):
            system = _build(disk.Disk(part, size), installer, source, settings, log)
    return Made(image, system, log_path)


def make_rootfs(tar: Path, source: Source, settings: Settings, *, force: bool = False, distro: str = "debian") -> Made:
    """Make a tar file of a root that any number of images can be made of; arguments and errors as make_image()."""
    installer = load_installer(distro)
    host.require_root("make a root")
    host.require_new_file(tar, force)
    host.require_space(tar.parent, HOST_SPACE)
    installer.check(settings)
    host.require(_source_tools(installer, source))
    source = _check_source(installer, source, settings)
    log_path = tar.with_name(f"{tar.name}.log")
    with (
        disk.new_file(tar) as part,
        host.Log(log_path) as log,
        host.watched_space(tar.parent),
        tempfile.TemporaryDirectory(prefix=".ash-root-", dir=tar.parent) as directory,
    ):
        root = Path(directory)
        root.chmod(0o755)
        _fill_root(root, installer, source, settings, log)
        with log.step(f"Packing {tar}"):
            log.run(["tar", "--create", *TAR_OPTIONS, *_compression(tar), "--directory", root, "--file", part, "."])
        return Made(tar, os_release(root, "PRETTY_NAME"), log_path)


def _compression(tar: Path) -> list[str]:
    """tar's option for what a file name's ending says."""
    return [COMPRESSIONS[tar.suffix]] if tar.suffix in COMPRESSIONS else []


def _source_tools(installer: DistroInstaller, source: Source) -> host.Tools:
    """What it takes to get a root from a source."""
    if source.rootfs is None:
        return installer.tools
    return {"zstd": "zstd"} if source.rootfs.suffix == ".zst" else {}


def _check_source(installer: DistroInstaller, source: Source, settings: Settings) -> Source:
    """Refuse a source that lacks something."""
    if source.rootfs is None:
        return installer.resolve(source)
    if not source.rootfs.is_file():
        raise AshError(f"{source.rootfs} is no file", "--make-rootfs makes one", USAGE)
    listing = run(["tar", "--list", "--file", source.rootfs], check=False)
    if listing.returncode:
        raise AshError(f"{source.rootfs} is no tar file of a root", "--make-rootfs makes one", USAGE)
    there = {name.removeprefix("./") for name in listing.stdout.splitlines()}
    for name, package in installer.needed_files(settings).items():
        if name not in there:
            hint = f"--make-rootfs TAR --package {package} makes one with it"
            raise AshError(f"the root in {source.rootfs} has no {package}", hint, REFUSED)
    return source


def _check_keyring(keyring: Path) -> None:
    """Refuse keys that gpgv does not read; gpg would read more, but not in the place of its own keyring."""
    host.require(GPG)
    hint = "gpg --export KEY makes one (without --armor)"
    with tempfile.TemporaryDirectory(prefix="ash-keyring-") as home:
        try:
            copy = shutil.copyfile(keyring, Path(home, "keyring.gpg"))
        except OSError as error:
            raise AshError(f"the keyring {keyring} cannot be read: {error.strerror}", hint, USAGE) from error
        only_that = ("--homedir", home, "--no-default-keyring", "--keyring", str(copy))
        done = run(["gpg", "--batch", *only_that, "--with-colons", "--list-keys"], check=False)
    if done.returncode or not re.search(r"^pub:", done.stdout, re.MULTILINE):
        raise AshError(f"{keyring} is no keyring that gpgv reads", hint, USAGE)


def _build(target: disk.Disk, installer: DistroInstaller, source: Source, settings: Settings, log: host.Log) -> str:
    """Everything between the empty file and the whole image. Returns the system's name."""
    with ExitStack() as stack:
        with log.step("Making partitions and file systems"):
            target.format()
            private_mounts()
            top, device = attach_disk(stack, target.image)
            layout = _make_subvolumes(top, installer.id)
        root = layout.rootfs(BASE)
        _fill_root(root, installer, source, settings, log)
        with log.step("Setting it up"):
            installer.configure(root, settings, target.efi_uuid, log)
        with log.step("Installing the boot loaders"):
            bootloader.install(layout, root, target, device)
        with log.step("Installing ash"):
            _install_ash(layout, root, settings.keyring)
            _install_help(layout, root, installer.zsh_completions)
        with log.step("Making snapshot 0 and deploying it"), _libraries_of(layout):
            _make_base(layout, target.root_uuid)
        system = os_release(root, "PRETTY_NAME")
        with log.step("Writing it all to the disk"):
            _finish(top)
    return system


def _finish(top: Path) -> None:
    """Have the file system whole in the image, and no longer in use."""
    run(["fstrim", top], check=False)  # only for the size of the file
    sync_filesystem(top)
    # What could not be written in the background is no error of any program, but it is counted.
    if run(["btrfs", "device", "stats", "--check", top], check=False).returncode:
        raise AshError("not all of the image could be written", "see what the kernel says of the disk: dmesg")
    run(["umount", top])


def _make_subvolumes(top: Path, distro: str) -> Layout:
    """The layout's volumes, and snapshot 0 as an empty one."""
    layout = Layout.at(top, distro)
    for prefix in Layout.SUBVOLUMES:
        create_subvolume(layout.volume(prefix))
    for directory in (layout.rootfs(BASE).parent, layout.etc(BASE).parent, layout.boot(BASE).parent, layout.ash):
        directory.mkdir()
    create_subvolume(layout.rootfs(BASE))
    return layout


def _fill_root(root: Path, installer: DistroInstaller, source: Source, settings: Settings, log: host.Log) -> None:
    """The distribution's files, not yet set up for a machine."""
    if source.rootfs is not None:
        with log.step(f"Unpacking {source.rootfs}"):
            log.run(["tar", "--extract", *TAR_OPTIONS, "-p", "--directory", root, "--file", source.rootfs])
        return
    with log.step(f"Bootstrapping {installer.id} {source.release}"):
        installer.bootstrap(root, source, settings, log)


def _install_ash(layout: Layout, root: Path, keyring: Path | None) -> None:
    """The executable, what it imports and whom it trusts; it must start with the new system's own Python."""
    if keyring is not None:
        shutil.copyfile(keyring, layout.keyring)
    _install_libraries(layout.lib, root / "usr/lib/python3/dist-packages")
    write_file(layout.executable, executable.build(layout.distro), mode=0o755)
    (layout.lib / "ash.py").symlink_to("../ash")  # what the executable imports of itself
    _install_profiles(layout)
    binds = {layout.ash: "mnt"}
    compile_all = ["python3", "-m", "compileall", "-q", "-s", "/mnt", "-p", "/.snapshots/ash", "/mnt/lib"]
    machine_chroot(root, compile_all, binds=binds)
    machine_chroot(root, ["/mnt/ash", "version"], binds=binds)


def _install_profiles(layout: Layout) -> None:
    """The profiles for the distribution, and for those that it is made from."""
    for name in executable.family(layout.distro):
        for profile in (executable.CHECKOUT / "profiles").glob(f"*/{name}.conf"):
            target = layout.profiles / profile.parent.name / profile.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(profile, target)


def _install_help(layout: Layout, root: Path, zsh_completions: str) -> None:
    """The man page and the shells' completions: where programs look for them, and where `ash help --format` does."""
    layout.help.mkdir()
    for kind, render in FORMATS.items():
        (layout.help / kind).write_text(f"{render()}\n", encoding="utf-8")
    for kind, name in {**HELP_FILES, "zsh": f"{zsh_completions}/_ash"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(layout.help / kind, root / name)


def _install_libraries(lib: Path, packages: Path) -> None:
    """Copy the libraries out of the new system's packages; from PyPI where its distribution has none."""
    lib.mkdir()
    if not all((packages / name).exists() for name in LIBRARIES):
        host.require(PIP)
        run(["pip3", "install", "--quiet", "--no-compile", "--target", lib, *LIBRARIES])
        return
    for name in (*LIBRARIES, *THEIR_LIBRARIES):
        if (packages / name).exists():
            _copy_library(packages / name, lib / name)


def _copy_library(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


@contextmanager
def _libraries_of(layout: Layout) -> Iterator[None]:
    """Let ash's own functions, which run in this process, use the new system's libraries: the host may have none."""
    sys.path.insert(0, str(layout.lib))
    try:
        yield
    finally:
        sys.path.remove(str(layout.lib))


def _make_base(layout: Layout, root_uuid: str) -> None:
    """Turn the plain root into snapshot 0, and deploy it."""
    distro = load_distro(layout.distro)
    base.create_state(layout, distro, root_uuid)
    base.split_base(layout, distro)
    deploy_snapshot(System(layout, distro), BASE)
