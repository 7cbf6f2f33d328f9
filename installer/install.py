# SPDX-License-Identifier: AGPL-3.0-or-later
"""Builds a bootable disk image: all checks first, then the build, step by step."""

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
    Countdown,
    Distro,
    EfiPartition,
    Layout,
    System,
    attach_disk,
    create_subvolume,
    deploy_snapshot,
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

# The smallest disk for a root, its deployment and one transaction; the space that a build takes on the host, for one
# root and the packages downloaded for it.
MINIMUM_SIZE = 3 * 2**30
HOST_SPACE = 2 * 2**30

TAR_OPTIONS = ("--numeric-owner", "--xattrs", "--xattrs-include=*", "--sparse")
COMPRESSIONS = {".gz": "--gzip", ".tgz": "--gzip", ".xz": "--xz", ".zst": "--zstd"}

# What ash imports besides the standard library, and what some versions of these import.
LIBRARIES = ("anytree", "tabulate")
THEIR_LIBRARIES = ("six.py",)
PIP: host.Tools = {"pip3": "python3-pip"}
GPG: host.Tools = {"gpg": "gpg"}

# The files for each format of ash's help.
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
    """Make a disk image with a system that ash manages; it boots with BIOS and UEFI.

    Args:
        image: the file to make.
        size: of the disk, in bytes.
        source: where the system comes from.
        settings: how to configure it.
        force: replace an existing file.
        distro: the id of the distribution.

    Raises:
        AshError: a check failed, before anything was written; or the build failed, which leaves only its log.
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
    """Make a tar file of a root, for any number of images; arguments and errors as for make_image()."""
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
    """The option of tar for the suffix of a file name."""
    return [COMPRESSIONS[tar.suffix]] if tar.suffix in COMPRESSIONS else []


def _source_tools(installer: DistroInstaller, source: Source) -> host.Tools:
    """The tools needed on the host to get a root from a source."""
    if source.rootfs is None:
        return installer.tools
    return {"zstd": "zstd"} if source.rootfs.suffix == ".zst" else {}


def _check_source(installer: DistroInstaller, source: Source, settings: Settings) -> Source:
    """Check that a source is complete. Returns it with the code name of its release."""
    if source.rootfs is None:
        return installer.resolve(source)
    if not source.rootfs.is_file():
        raise AshError(f"{source.rootfs} is not a regular file", "--make-rootfs makes one", USAGE)
    listing = run(["tar", "--list", "--file", source.rootfs], check=False)
    if listing.returncode:
        raise AshError(f"{source.rootfs} is not a tar file of a root", "--make-rootfs makes one", USAGE)
    there = {name.removeprefix("./") for name in listing.stdout.splitlines()}
    for name, package in installer.needed_files(settings).items():
        if name not in there:
            hint = f"--make-rootfs TAR --package {package} makes one with it"
            raise AshError(f"the root in {source.rootfs} has no {package}", hint, REFUSED)
    return source


def _check_keyring(keyring: Path) -> None:
    """Check that gpgv can read a keyring; gpg accepts more formats, but not for --keyring."""
    host.require(GPG)
    hint = "make one with gpg --export KEY, without --armor"
    with tempfile.TemporaryDirectory(prefix="ash-keyring-") as home:
        try:
            copy = shutil.copyfile(keyring, Path(home, "keyring.gpg"))
        except OSError as error:
            raise AshError(f"the keyring {keyring} cannot be read: {error.strerror}", hint, USAGE) from error
        only_that = ("--homedir", home, "--no-default-keyring", "--keyring", str(copy))
        done = run(["gpg", "--batch", *only_that, "--with-colons", "--list-keys"], check=False)
    if done.returncode or not re.search(r"^pub:", done.stdout, re.MULTILINE):
        raise AshError(f"{keyring} is not a keyring that gpgv can read", hint, USAGE)


def _build(target: disk.Disk, installer: DistroInstaller, source: Source, settings: Settings, log: host.Log) -> str:
    """Build the system in the empty image. Returns its name."""
    with ExitStack() as stack:
        with log.step("Making partitions and file systems"):
            target.format()
            private_mounts()
            top, device = attach_disk(stack, target.image)
            layout = _make_subvolumes(top, installer.id)
        root = layout.rootfs(BASE)
        _fill_root(root, installer, source, settings, log)
        with log.step("Configuring the system"):
            installer.configure(root, settings, target.efi_uuid, log)
        with log.step("Installing the boot loaders"):
            bootloader.install(layout, root, target, device, installer.distro.boot_tools)
        with log.step("Installing ash"):
            _install_ash(layout, root, settings.keyring)
            _install_help(layout, root, installer.zsh_completions)
        with log.step("Making snapshot 0 and deploying it"), _libraries_of(layout):
            _make_base(layout, installer.distro, target)
        system = os_release(root, "PRETTY_NAME")
        with log.step("Syncing the image"):
            _finish(top)
    return system


def _finish(top: Path) -> None:
    """Sync and unmount the file system."""
    run(["fstrim", top], check=False)  # only shrinks the sparse file
    sync_filesystem(top)
    # Errors of background writes reach no program, but btrfs counts them.
    if run(["btrfs", "device", "stats", "--check", top], check=False).returncode:
        raise AshError("the image could not be written completely", "dmesg shows the errors of the disk")
    run(["umount", top])


def _make_subvolumes(top: Path, distro: str) -> Layout:
    """Create the top-level subvolumes, and snapshot 0 as an empty one."""
    layout = Layout.at(top, distro)
    for prefix in Layout.SUBVOLUMES:
        create_subvolume(layout.volume(prefix))
    for directory in layout.private:
        directory.mkdir(mode=0o700)
    layout.ash.mkdir()
    create_subvolume(layout.rootfs(BASE))
    return layout


def _fill_root(root: Path, installer: DistroInstaller, source: Source, settings: Settings, log: host.Log) -> None:
    """Unpack or bootstrap the distribution; nothing machine-specific yet."""
    if source.rootfs is not None:
        with log.step(f"Unpacking {source.rootfs}"):
            log.run(["tar", "--extract", *TAR_OPTIONS, "-p", "--directory", root, "--file", source.rootfs])
        return
    with log.step(f"Bootstrapping {installer.id} {source.release}"):
        installer.bootstrap(root, source, settings, log)


def _install_ash(layout: Layout, root: Path, keyring: Path | None) -> None:
    """Install the executable, its libraries, profiles and keyring; it must run with the new system's own Python."""
    if keyring is not None:
        shutil.copyfile(keyring, layout.keyring)
    _install_libraries(layout.lib, root / "usr/lib/python3/dist-packages")
    write_file(layout.executable, executable.build(layout.distro), mode=0o755)
    (layout.lib / "ash.py").symlink_to("../ash")  # the executable imports itself from here
    _install_profiles(layout)
    binds = {layout.ash: "mnt"}
    compile_all = ["python3", "-m", "compileall", "-q", "-s", "/mnt", "-p", "/.snapshots/ash", "/mnt/lib"]
    machine_chroot(root, compile_all, binds=binds)
    machine_chroot(root, ["/mnt/ash", "version"], binds=binds)


def _install_profiles(layout: Layout) -> None:
    """Copy the profiles of the distribution and of its parents."""
    for name in executable.family(layout.distro):
        for profile in (executable.CHECKOUT / "profiles").glob(f"*/{name}.conf"):
            target = layout.profiles / profile.parent.name / profile.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(profile, target)


def _install_help(layout: Layout, root: Path, zsh_completions: str) -> None:
    """Write the man page and completions to where programs look for them, and to where `ash help --format` does."""
    layout.help.mkdir()
    for kind, render in FORMATS.items():
        (layout.help / kind).write_text(f"{render()}\n", encoding="utf-8")
    for kind, name in {**HELP_FILES, "zsh": f"{zsh_completions}/_ash"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(layout.help / kind, root / name)


def _install_libraries(lib: Path, packages: Path) -> None:
    """Copy the libraries from the new system's packages; get them from PyPI if the distribution lacks some."""
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
    """Import libraries from the new system in the block: the host may not have them."""
    sys.path.insert(0, str(layout.lib))
    try:
        yield
    finally:
        sys.path.remove(str(layout.lib))


def _make_base(layout: Layout, distro: Distro, target: disk.Disk) -> None:
    """Turn the plain root into snapshot 0, and deploy it."""
    base.create_state(layout, distro, target.root_uuid)
    base.split_base(layout, distro)
    write_file(layout.efi, f"{target.efi_uuid}\n")
    EfiPartition(layout, target.image).write(Countdown())
    deploy_snapshot(System(layout, distro, image=target.image), BASE)
