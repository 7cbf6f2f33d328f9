# SPDX-License-Identifier: AGPL-3.0-or-later
"""Builds a bootable system, on a disk or in an image of one: all checks first, then the build, step by step."""

import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, NamedTuple, Self

from ash import (
    BASE,
    FIRMWARE,
    MISSING,
    PRIVATE,
    REFUSED,
    USAGE,
    AshError,
    Countdown,
    Distro,
    EfiPartition,
    Layout,
    System,
    create_subvolume,
    deploy_snapshot,
    listed,
    machine_chroot,
    os_release,
    private_mounts,
    refuse_if_in_a_machine,
    run,
    sync_filesystem,
    write_file,
)
from installer import ashos, base, bootloader, disk, drives, executable, first_snapshot, host, luks, neighbours
from installer.distribution import (
    DistroInstaller,
    Identity,
    Network,
    Settings,
    Source,
    hash_of_password,
    load_installer,
)
from installer.help import FORMATS

# The smallest disk for a root, its deployment and one transaction; the space that a build takes on the host, for one
# root and the packages downloaded for it.
MINIMUM_SIZE = 3 * 2**30
HOST_SPACE = 2 * 2**30
MINIMUM_ROOM = MINIMUM_SIZE - 2**30  # beside another system
MINIMUM_EFI = 32 * 2**20  # GRUB, shim and their copies take 11 MiB
SHOWN_FILES = 3  # of those on a file system that should be empty
DISK_LOG = Path("/var/log/ash-install.log")

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
    """A finished image, root or disk, for the report."""

    path: Path
    system: str  # "Debian GNU/Linux 13 (trixie)"
    log: Path
    problem: BaseException | None = None  # why the first snapshot beside the base could not be made


class Installation:
    """A system to be installed: what it is called, where it comes from, and how it is configured."""

    def __init__(self, source: Source, settings: Settings, identity: Identity) -> None:
        self.installer = load_installer(identity.module)
        self.source = source
        self.settings = settings
        self.identity = identity
        self.hashes: dict[str, str] = {}  # of the passwords that were set, by user
        self.lacking: Sequence[str] = ()  # the packages with firmware that a tar file of the root lacks

    def room(self, minimum: int) -> int:
        """The bytes that it needs where a system without a swap file needs a minimum."""
        return minimum + self.settings.swap.size

    def needed(self, tools: host.Tools) -> host.Tools:
        """Some tools, and those for the source and for encryption."""
        encryption = luks.TOOLS if self.settings.passphrase is not None else {}
        return {**tools, **encryption, **_source_tools(self.installer, self.source)}

    def require(self, tools: host.Tools) -> None:
        """Install missing tools on this machine."""
        host.require(tools)

    def check(self, tools: host.Tools) -> None:
        """Check all but the place where it goes; this may install tools, and lists of valid settings, on this machine.

        Args:
            tools: that are needed besides those for the source.

        Raises:
            AshError: what is wrong.
        """
        self.installer.check(self.settings)
        self.require(self.needed(tools))
        if self.settings.keyring is not None:
            _check_keyring(self.settings.keyring)
        if self.source.rootfs is None:
            self.source = self.installer.resolve(self.source)
        else:
            self.lacking = _check_tar(self.source.rootfs, self)


class Left(NamedTuple):
    """What there is after an installation that failed, for the message; empty if nothing is.

    Args:
        system: if the system was not complete.
        loader: if it was, but its boot loader was not.
    """

    system: str = ""
    loader: str = ""

    @contextmanager
    def noted(self, which: Literal["system", "loader"]) -> Iterator[None]:
        """Add that to an error in the block."""
        try:
            yield
        except BaseException as error:
            if text := getattr(self, which):
                error.add_note(text)
            raise


NOTHING_LEFT = Left()


def make_image(image: Path, size: int, new: Installation, *, force: bool = False) -> Made:
    """Make a disk image with a system that ash manages; it boots with BIOS and UEFI.

    Args:
        image: the file to make.
        size: of the disk, in bytes.
        new: the system.
        force: replace an existing file.

    Raises:
        AshError: a check failed, before anything was written; or the build failed, which leaves only its log.
    """
    host.require_root("make an image")
    host.require_new_file(image, force)
    if image.exists():
        with image.open("rb") as there:
            refuse_if_in_a_machine(there.fileno(), image)
    if size < (needed := new.room(MINIMUM_SIZE) + sum(new.settings.sizes)):
        least = f"at least {host.gibibytes(needed)}"
        raise AshError(f"{host.gibibytes(size)} are too small", least, USAGE)
    host.require_space(image.parent, HOST_SPACE)
    host.require_btrfs()
    new.check(host.DISK)
    log_path = image.with_name(f"{image.name}.log")
    with disk.new_file(image) as part, ExitStack() as stack:
        try:
            os.truncate(part, size)
        except OSError as error:
            raise AshError(f"an image of {host.gibibytes(size)} cannot be made: {error.strerror}", "", USAGE) from error
        with host.Log(log_path) as log, host.watched_space(image.parent):
            with log.step("Making partitions"):
                target = stack.enter_context(disk.target_in(part, new.settings.sizes))
            built = _build(target, new, log)
    return Made(image, built.system, log_path, built.problem)


def add_to_image(image: Path, new: Installation) -> Made:
    """Add a system to a disk image that has one; arguments and errors as for make_image()."""
    host.require_root("change an image")
    if not image.is_file():
        raise AshError(f"{image} is not a regular file", "without --mode 3 it is made", MISSING)
    host.require_btrfs()
    new.check(host.DISK)
    log_path = image.with_name(f"{image.name}.log")
    with disk.target_of(image) as target:
        _require_room_in(target, new)
        with host.Log(log_path) as log, host.watched_space(image.parent):
            built = _build(target, new, log, _left_beside_others(new.identity.id, image))
    return Made(image, built.system, log_path, built.problem)


def _left_beside_others(ident: str, where: Path) -> Left:
    beside = "the other systems are as they were; the same command begins anew"
    return Left(beside, f"{ident} is on {where}, but its boot loader is not complete; the same command goes on")


class Loss(NamedTuple):
    """What happens to a device or image, for the summary."""

    where: str
    text: str


# Shows what happens to a disk or system with that name, by which commands; raises if the user does not agree.
Agree = Callable[[str, Sequence[Loss], Sequence[str]], None]


class Mode(Enum):
    """What happens to file systems that exist."""

    NEW = "1"
    KEEP_EFI = "2"
    ADD = "3"


class Places(NamedTuple):
    """The partitions and the drive of an installation beside other partitions.

    Args:
        root: the partition of the root.
        drive: the disk that this machine starts from.
        efi: the EFI partition.
        mode: what happens to their file systems.
        keeps_root: whether that of the root, a btrfs with nothing on it, is kept as it is, but for Mode.ADD.
    """

    root: Path
    drive: Path
    efi: Path | None = None
    mode: Mode = Mode.NEW
    keeps_root: bool = False


class Checked(NamedTuple):
    """Where a system can be installed; nothing is written yet.

    Args:
        path: of the disk or partition that the user agrees to.
        losses: what happens there.
        make_target: prepares it.
        left: what a failure leaves.
        future: the target that it will make.
        first: the command that it runs for that, if any, with its input.
    """

    path: Path
    losses: Sequence[Loss]
    make_target: Callable[[], disk.Target]
    left: Left
    future: disk.Target
    first: str = ""


def install_on_disk(path: Path, new: Installation, agree: Agree) -> Made:
    """Install a system that ash manages on a whole disk of this machine; it boots with BIOS and UEFI.

    Args:
        path: of the disk.
        new: the system.
        agree: is asked after all checks; see Agree.

    Raises:
        AshError: a check failed, before anything was written; or the installation failed.
    """
    require_machine()
    sizes, device = new.settings.sizes, require_room(path, new)
    losses = [Loss(str(device), "a new partition table")]
    losses += [
        Loss(str(one), f"is deleted, with {' and '.join(_named(systems_on(one))) or 'all on it'}")
        for one in device.inside
    ]
    losses += _swap_losses(new, [one.path for one in device])
    future = _encrypted(disk.future_target(device.path, sizes), new)
    argv, script = disk.partition_command(device.path, disk.partitions_for(device.size, sizes))
    first = f"{shlex.join(map(str, argv))} <<END\n{script}END"
    losses += _encryption(future)
    for directory, node, size in (("/boot", future.boot, sizes.boot), ("/home", future.home, sizes.home)):
        losses += [Loss(str(node), f"a new btrfs file system for {directory}, {host.gibibytes(size)}")] if node else []

    def make_target() -> disk.Target:
        return _encrypted(disk.target_on(device.path, sizes), new)

    return _install(Checked(device.path, losses, make_target, _left_anew(device.path), future, first), new, agree)


def require_room(path: Path, new: Installation) -> drives.Device:
    """The disk with a path; AshError if it is in use, or too small for a system and the partitions that it has."""
    return drives.require_free_disk(path, new.room(MINIMUM_SIZE) + sum(new.settings.sizes))


def _encrypted(target: disk.Target, new: Installation) -> disk.Target:
    """The target as the settings have it: its root encrypted, or not."""
    return target.encrypted(new.settings.passphrase) if new.settings.passphrase is not None else target


def _encryption(target: disk.Target) -> list[Loss]:
    """What the summary says of an encrypted root."""
    return [Loss(str(target.luks.partition), "encrypted: each start asks for its passphrase")] if target.luks else []


def _left_anew(where: Path) -> Left:
    text = f"{where} has no complete system; the same command begins anew"
    return Left(text, text)


def install_on_partitions(places: Places, new: Installation, agree: Agree) -> Made:
    """Install a system that ash manages on partitions; arguments and errors as for install_on_disk()."""
    require_machine()
    with checked_places(places, new) as checked:
        return _install(checked, new, agree)


@contextmanager
def checked_places(places: Places, new: Installation) -> Iterator[Checked]:
    """Check whether a system can be installed on partitions; AshError if not. An encrypted one is open in the block."""
    minimum = MINIMUM_SIZE if places.mode is Mode.ADD else new.room(MINIMUM_SIZE)
    chosen = _Chosen.of(places, minimum)
    with _target_of(chosen, places, new) as target:
        losses = _losses(chosen, target, new)
        path = chosen.root.path
        left = _left_beside_others(new.identity.id, path) if places.mode is Mode.ADD else _left_anew(path)
        yield Checked(path, losses, lambda: target, left, target)


class _Chosen(NamedTuple):
    """The devices of Places.

    Args:
        root: the partition of the root.
        its_disk: on which that is.
        drive: the disk that this machine starts from.
        efi: the EFI partition.
    """

    root: drives.Device
    its_disk: drives.Device
    drive: drives.Device
    efi: drives.Device | None

    @classmethod
    def of(cls, places: Places, minimum: int) -> Self:
        """Find the devices; AshError if one cannot be used for that, such as a root of less than `minimum` bytes."""
        is_uefi = FIRMWARE.is_dir()
        its_disk, root = drives.require_free_partition(places.root, minimum)
        drive = drives.require_disk(places.drive)
        efi = None
        if places.efi is not None:
            efi = drives.require_efi_partition(places.efi, MINIMUM_EFI, as_it_is=places.mode is not Mode.NEW)
        elif is_uefi:
            hint = "name it after the drive, or start the live medium with BIOS"
            raise AshError("this machine was started with UEFI, which needs an EFI partition", hint, USAGE)
        if not is_uefi:
            drives.require_room_for_grub(drive)
        return cls(root, its_disk, drive, efi)


@contextmanager
def _target_of(chosen: _Chosen, places: Places, new: Installation) -> Iterator[disk.Target]:
    """The target on some devices; an encrypted partition that is kept is open in the block.

    Raises:
        AshError: a file system that is kept cannot be used.
    """
    root, efi = chosen.root, chosen.efi
    adds, keeps_efi = places.mode is Mode.ADD, places.mode is not Mode.NEW
    keeps_root = adds or places.keeps_root
    target = disk.Target(
        chosen.drive.path,
        root.path,
        efi.path if efi else None,
        root_uuid=root.uuid if keeps_root else str(uuid.uuid4()),
        efi_uuid=efi.uuid if efi and keeps_efi else disk.new_serial(),
        keeps_root=keeps_root,
        alone=not adds,
        keeps_efi=keeps_efi,
        bios=not FIRMWARE.is_dir(),
    )
    with ExitStack() as stack:
        if not keeps_root:
            target = _encrypted(target, new)
        else:
            drives.require_unique(root)
            if root.filesystem == luks.FILE_SYSTEM:
                target = stack.enter_context(disk.unlocked_target(target, new.settings.passphrase))
            elif new.settings.passphrase is not None:
                what = f"{root.path} is not encrypted, and its file system is kept"
                raise AshError(what, "--mode 1 or 2 makes a new one, without --keep-filesystem", USAGE)
            elif root.filesystem != "btrfs":
                what = f"{root.path} has no btrfs file system, but {root.filesystem or 'none'}"
                hint = "mkfs.btrfs makes one; without --keep-filesystem the installer does"
                raise AshError(what, "--mode 1 or 2 makes one" if adds else hint, REFUSED)
        if keeps_efi and efi:
            drives.require_unique(efi)
            new.require(host.DISK)
            bootloader.require_no_neighbour(disk.EfiFiles(efi.path), new.identity.id, [root.uuid, target.root_uuid])
        yield target


def _losses(chosen: _Chosen, target: disk.Target, new: Installation) -> list[Loss]:
    """What happens to some devices; AshError if a file system that is kept has no room for the system."""
    root, efi = chosen.root, chosen.efi
    if target.keeps_root and target.alone:
        _require_empty(target, new.identity.id)
        losses = [Loss(str(root), "its empty btrfs file system is used as it is")]
    elif target.keeps_root:
        there = _require_room_in(target, new)
        losses = [Loss(str(root), f"{new.identity.name} is added to {', '.join(there)}")]
    else:
        lost = ", ".join(_named(systems_on(root))) or "all that is on it"
        losses = [Loss(str(root), f"a new btrfs file system; {lost} is lost"), *_encryption(target)]
    if efi:
        anew = "" if target.keeps_efi else f"a new FAT file system; {_lost_on_efi(efi, new)} is lost"
        losses.append(Loss(str(efi), anew or "files are added to it"))
    if target.bios:
        losses.append(Loss(str(chosen.drive), "GRUB for the BIOS in its first sectors"))
    if chosen.its_disk.path != chosen.drive.path:
        here = "the boot loader" if target.bios else "nothing is written: UEFI has its boot loader on the EFI partition"
        losses.append(Loss(str(chosen.drive), f"{here}; the root is on another disk, {chosen.its_disk.path}"))
    return [*losses, *_swap_losses(new, [one.path for one in (root, efi) if one])]


def _lost_on_efi(efi: drives.Device, new: Installation) -> str:
    """What is lost with the file system of an EFI partition: all the boot loaders there."""
    if efi.filesystem != "vfat":
        return "all that is on it"
    new.require(host.DISK)
    there = disk.EfiFiles(efi.path).directories("EFI")
    names = listed(f"EFI/{name}" for name in there)
    return f"all that is on it, with {names}, from which other systems may start," if there else "all that is on it"


def systems_on(device: drives.Device) -> list[str]:
    """The ids of the systems of ash on a partition that is not in use; none if it cannot be mounted."""
    if device.filesystem != "btrfs":
        return []
    with contextlib.suppress(AshError), disk.mounted_readonly(device.path) as top:
        return [one.distro for one in ashos.all_on(top)]
    return []


def _named(idents: Sequence[str]) -> list[str]:
    return [f"the system {ident}" for ident in idents]


def _require_room_in(target: disk.Target, new: Installation) -> list[str]:
    """The systems on a target, which a new one can be added to; AshError if it cannot be."""
    where = target.image or target.root
    with disk.mounted_readonly(target.root) as top:
        there = [one.distro for one in ashos.all_on(top)]
        if not there:
            anew = "without --mode 3, --force makes it anew"
            hint = anew if target.image else "--mode 1 or 2 makes a new file system"
            raise AshError(f"{where} has no system of ash", hint, REFUSED)
        layout = Layout.at(top, new.identity.id)
        neighbours.require_free(layout, there)
        if not neighbours.lacks_loader(layout):
            host.require_space(top, new.room(MINIMUM_ROOM), str(where))
    return there


def _require_empty(target: disk.Target, ident: str) -> None:
    """Raise AshError (REFUSED) if there is something on a target, but for what an installation that was killed left."""
    with disk.mounted_readonly(target.root) as top:
        layout = Layout.at(top, ident)
        is_left_over = layout.snapshots.exists() and not layout.is_complete
        left = {layout.volume_name(prefix) for prefix in Layout.POSSIBLE_SUBVOLUMES} if is_left_over else set()
        there = sorted(path.name for path in top.iterdir() if path.name not in left)
        systems = [one.distro for one in ashos.all_on(top) if one.distro != ident or not is_left_over]
    if there:
        what = f"the file system on {target.root} is not empty: it has {listed(there[:SHOWN_FILES])}"
        add = "--mode 3 adds a system to those there, and keeps the file system" if systems else ""
        raise AshError(what, add or "without --keep-filesystem it is replaced by a new one", REFUSED)


def _swap_losses(new: Installation, wiped: Sequence[Path]) -> list[Loss]:
    """What the new system swaps to; AshError if it cannot, as a partition is none for that, or among what is wiped."""
    swap = new.settings.swap
    found = [drives.require_swap(path, wiped) for path in swap.devices]
    losses = [Loss(str(one), "the new system swaps to it; it stays as it is") for one in found]
    losses += [Loss("swap", f"a file of {host.gibibytes(swap.size)}")] if swap.size else []
    return losses + ([Loss("swap", "a compressed device in memory")] if swap.zram else [])


def _package_losses(new: Installation) -> Iterator[Loss]:
    """What the new system has, or lacks, for the hardware of this machine."""
    if new.settings.network is Network.NETWORK_MANAGER:
        yield Loss("network", "NetworkManager configures it")
    if new.lacking:
        names = " ".join(new.lacking)
        yield Loss("firmware", f"{new.source.rootfs} lacks what this machine needs; later: ash install {names}")
    elif new.source.firmware:
        yield Loss("firmware", " ".join(new.source.firmware))


def require_machine() -> None:
    """Raise AshError unless this machine can install on its disks."""
    host.require_root("install on a disk")
    host.require_btrfs()


def check_machine(new: Installation) -> None:
    """Check all but the place of an installation on a disk; errors as for install_on_disk()."""
    require_machine()
    new.check(host.disk_tools())


def _install(place: Checked, new: Installation, agree: Agree) -> Made:
    """Install in a place of this machine, if the user agrees to what happens there."""
    is_uefi = FIRMWARE.is_dir()
    new.check(host.disk_tools())
    agree(place.path.name, [*place.losses, *_package_losses(new)], _commands(place, new))
    with host.Log(DISK_LOG) as log:
        with place.left.noted("system"), log.step(f"Preparing {place.path}"):
            target = place.make_target()
        built = _build(target, new, log, place.left)
        if is_uefi:
            with place.left.noted("loader"), log.step("Adding the system to the firmware's boot menu"):
                bootloader.add_boot_entry(target, f"{new.identity.name} (ash)", new.identity.id)
    return Made(place.path, built.system, DISK_LOG, built.problem)


def _commands(place: Checked, new: Installation) -> list[str]:
    """The commands that will write to the disks, in the shell's language; ash itself does the rest."""
    target, tools = place.future, new.installer.distro.boot_tools
    layout = Layout.at(PRIVATE / "top", new.identity.id)
    root, swap = layout.rootfs(BASE), new.settings.swap
    commands = [*target.format_commands(), *([swap.file_command(layout)] if swap.size else [])]
    commands.append(_fill_command(root, new, "/tmp"))  # noqa: S108 (only shown)
    commands += [["chroot", root, *one] for one in bootloader.bios_commands(target, tools)] if target.bios else []
    commands += [["mcopy", "-i", node, f"::EFI/{new.identity.id}/"] for node in [target.efi] if node]
    commands += [["ash", *words] for words in first_snapshot.commands(new.settings)]
    return [*filter(None, [place.first]), *(shlex.join(map(str, command)) for command in commands)]


def make_rootfs(tar: Path, new: Installation, *, force: bool = False) -> Made:
    """Make a tar file of a root, for any number of systems; arguments and errors as for make_image()."""
    host.require_root("make a root")
    host.require_new_file(tar, force)
    host.require_space(tar.parent, HOST_SPACE)
    new.check({})
    log_path = tar.with_name(f"{tar.name}.log")
    with (
        disk.new_file(tar) as part,
        host.Log(log_path) as log,
        host.watched_space(tar.parent),
        tempfile.TemporaryDirectory(prefix=".ash-root-", dir=tar.parent) as directory,
    ):
        root = Path(directory)
        root.chmod(0o755)
        _fill_root(root, new, log)
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


def _check_tar(tar: Path, new: Installation) -> list[str]:
    """Check that a root in a tar file is complete. Returns the wanted packages with firmware that it lacks."""
    if not tar.is_file():
        raise AshError(f"{tar} is not a regular file", "--make-rootfs makes one", USAGE)
    listing = run(["tar", "--list", "--file", tar], check=False)
    if listing.returncode:
        raise AshError(f"{tar} is not a tar file of a root", "--make-rootfs makes one", USAGE)
    there = {name.removeprefix("./") for name in listing.stdout.splitlines()}
    missing = [package for name, package in new.installer.needed_files(new.settings).items() if name not in there]
    lacking = new.installer.lacking(new.source.firmware, there)
    if names := " ".join([*missing, *(lacking if new.source.needs_firmware else [])]):
        hint = f"--make-rootfs TAR --package {names} makes one with it"
        if new.settings.network is Network.NETWORK_MANAGER:
            hint += "; --network dhcp does without NetworkManager"
        raise AshError(f"the root in {tar} has no {names}", hint, REFUSED)
    return lacking


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


class Built(NamedTuple):
    """A system that is complete: its name for people, and why its first snapshot beside the base could not be made."""

    system: str
    problem: BaseException | None


def _build(target: disk.Target, new: Installation, log: host.Log, left: Left = NOTHING_LEFT) -> Built:
    """Build the system on the partitions.

    The boot loader, which other systems may need too, is only replaced once the new one is complete.
    """
    with ExitStack() as stack:
        with left.noted("system"):
            with log.step("Making file systems"):
                if target.luks and not target.keeps_root:
                    stack.callback(target.luks.close)
                target.format()
                private_mounts()
                top, device = target.attach(stack)
            layout = Layout.at(top, new.identity.id)
            locks = ExitStack()
            others = [one for one in Layout.all_on(top) if one.distro != new.identity.id]
            stack.enter_context(locks).enter_context(neighbours.nobody_deploys(others))
            if not neighbours.lacks_loader(layout):
                with neighbours.new_subvolumes(layout):
                    _build_system(layout, target, new, log)
        with left.noted("loader"):
            tools = new.installer.distro.boot_tools
            with log.step("Installing the boot loaders"), neighbours.writable_copy(layout) as root:
                bootloader.install(layout, root, target, device, tools, name=new.identity.name)
            neighbours.finish(layout)
            built = Built(os_release(layout.rootfs(BASE), "PRETTY_NAME"), _make_first(layout, target, new, log))
            locks.close()
            with log.step("Syncing the disk"):
                _finish(top, layout.boot_volume if target.boot else None)
        return built


def _make_first(layout: Layout, target: disk.Target, new: Installation, log: host.Log) -> BaseException | None:
    """Make the first snapshot beside the base, if it is wanted. Returns the error, or signal, that prevented it.

    The rest of the installation goes on, so that the base boots.
    """
    try:
        with _libraries_of(layout):
            first_snapshot.make(System(layout, new.installer.distro, image=target.image), new.settings, log)
    except BaseException as error:
        return error
    return None


def _build_system(layout: Layout, target: disk.Target, new: Installation, log: host.Log) -> None:
    """Build all but the boot loader, in new subvolumes."""
    installer, settings = new.installer, new.settings
    _compress(map(layout.volume, Layout.SUBVOLUMES), settings.compression)
    settings.swap.make_file(layout, log)
    root = _new_root(layout)
    _use_boot_partition(layout, target)
    _compress([root], settings.compression)
    _fill_root(root, new, log)
    with log.step("Configuring the system"):
        installer.configure(root, settings, target, log)
        settings.swap.configure(root, layout, target.root_uuid)
        users = filter(None, [settings.user, "root"])
        new.hashes = {user: hash_of_password(root, user) for user in users}
    with log.step("Installing ash"):
        _install_ash(layout, root, new)
        _install_help(layout, root, installer.zsh_completions)
    with log.step("Making snapshot 0 and deploying it"), _libraries_of(layout), target.home_at(layout.home):
        _make_base(layout, installer.distro, target)


def _use_boot_partition(layout: Layout, target: disk.Target) -> None:
    """Have GRUB's files and the kernels of a new system on a partition of their own, if there is one."""
    if target.boot:
        write_file(layout.boot_part, f"{target.boot_uuid}\n")
        layout.grub_cfg.parent.mkdir()
        layout.grub_cfg.write_text(bootloader.stub(layout, target))  # for the menus of other systems
        target.mount_boot(layout)


def _compress(directories: Iterable[Path], algorithm: str) -> None:
    """Have what is created below directories compressed, on btrfs, unless the algorithm is empty.

    New directories inherit this, and so do snapshots. It counts more than the option of a mount.
    """
    for directory in directories if algorithm else ():
        os.setxattr(directory, "btrfs.compression", algorithm.encode())


def _finish(top: Path, boot: Path | None) -> None:
    """Sync and unmount the file system, and that for /boot which is mounted in it."""
    for place in filter(None, (boot, top)):
        run(["fstrim", place], check=False)  # only shrinks the sparse file
        sync_filesystem(place)
        # Errors of background writes reach no program, but btrfs counts them.
        if run(["btrfs", "device", "stats", "--check", place], check=False).returncode:
            raise AshError("the disk could not be written completely", "dmesg shows the errors of the disk")
        run(["umount", place])


def _new_root(layout: Layout) -> Path:
    """Create the directories for ash's state, and snapshot 0 as an empty subvolume. Returns that."""
    for directory in layout.private:
        directory.mkdir(mode=0o700)
    layout.ash.mkdir()
    root = layout.rootfs(BASE)
    create_subvolume(root)
    return root


def _fill_root(root: Path, new: Installation, log: host.Log) -> None:
    """Unpack or bootstrap the distribution; nothing machine-specific yet."""
    source = new.source
    if source.rootfs is not None:
        with log.step(f"Unpacking {source.rootfs}"):
            log.run(_fill_command(root, new, ""))
        return
    firmware = ["with", *source.firmware] if source.firmware else []
    with log.step(" ".join(["Bootstrapping", new.installer.id, source.release, *firmware])):
        new.installer.bootstrap(root, source, new.settings, log)


def _fill_command(root: Path, new: Installation, scratch: str) -> list[str | Path]:
    """The command that unpacks or bootstraps the distribution."""
    if new.source.rootfs is not None:
        return ["tar", "--extract", *TAR_OPTIONS, "-p", "--directory", root, "--file", new.source.rootfs]
    return [*new.installer.bootstrap_command(root, new.source, new.settings, scratch)]


def _install_ash(layout: Layout, root: Path, new: Installation) -> None:
    """Install the executable, its libraries, profiles and keyring; it must run with the new system's own Python."""
    if new.settings.keyring is not None:
        shutil.copyfile(new.settings.keyring, layout.keyring)
    _install_libraries(layout.lib, root / "usr/lib/python3/dist-packages")
    write_file(layout.executable, executable.build(new.identity.module), mode=0o755)
    (layout.lib / "ash.py").symlink_to("../ash")  # the executable imports itself from here
    _install_profiles(layout, new.identity.module)
    binds = {layout.ash: "mnt"}
    compile_all = ["python3", "-m", "compileall", "-q", "-s", "/mnt", "-p", "/.snapshots/ash", "/mnt/lib"]
    machine_chroot(root, compile_all, binds=binds)
    machine_chroot(root, ["/mnt/ash", "version"], binds=binds)


def _install_profiles(layout: Layout, module: str) -> None:
    """Copy the profiles of a distribution and of its parents."""
    for name in executable.family(module):
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


def _make_base(layout: Layout, distro: Distro, target: disk.Target) -> None:
    """Turn the plain root into snapshot 0, and deploy it."""
    base.create_state(layout, distro, target.root_uuid)
    base.split_base(layout, distro)
    if target.efi:
        write_file(layout.efi, f"{target.efi_uuid}\n")
        EfiPartition(layout, target.image).write(Countdown())
    deploy_snapshot(System(layout, distro, image=target.image), BASE)
