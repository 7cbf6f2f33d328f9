# SPDX-License-Identifier: AGPL-3.0-or-later
"""The installer's command line: install on a disk, make an image, boot it, try it out."""

import argparse
import getpass
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn, Self

from ash import ASH_VERSION, FAILED, MISSING, REFUSED, USAGE, AshError, os_release, require_raw
from installer import answers, disk, existing, first_snapshot, form, host, install, luks, machine, preparation, tour
from installer.distribution import DistroInstaller, Identity, Network, Password, Settings, Source, load_installer
from installer.hardware import Hardware, is_virtual
from installer.swap import Swap

EXAMPLES = """\
examples:
  python3 init.py                              ask for all that an installation on a disk needs
  python3 init.py try                          make an image, boot it, and show what ash does
  python3 init.py --disk /dev/sda              install on a disk of this machine
  python3 init.py /dev/sda2 /dev/sda /dev/sda1 --mode 2    ... on a partition, beside another system
  python3 init.py /dev/sda2 /dev/sda /dev/sda1 debian_2 "Work" --mode 3    ... on a file system that has one
  python3 init.py --image ashos.img            make an image
  python3 init.py rescue /dev/sda2             show the systems there; see its --help
  python3 init.py remove debian_2 /dev/sda2    remove one of several systems
  python3 init.py boot ashos.img --uefi        boot it in this terminal
  python3 init.py --make-rootfs root.tar       make a root once ...
  python3 init.py --image a.img --rootfs root.tar    ... for any number of images, without a network
"""
PROGRAM = "python3 init.py"
FORMS = (
    '/dev/<root> /dev/<drive> [/dev/<efi>] [id] ["name"] [options]',
    "--disk DEVICE [options]",
    "--image FILE [options]",
    "rescue DEVICE|FILE [--boot-loader ID] [--shell]",
    "remove ID DEVICE|FILE [--last] [--yes]",
    "boot FILE [--uefi] [--snapshot]",
    "try [FILE] [--tour] [--uefi]",
)
SEE_HELP = f"see `{PROGRAM} --help`"
DEFAULT_ID = "debian"
DEFAULT_IMAGE = Path("ashos.img")
DEFAULT_SIZE = "8G"
SMALLEST_HOME = 256 * disk.MIB  # what btrfs needs, and some files
SMALLEST_BOOT = 512 * disk.MIB  # three deployments, each with a kernel and an initramfs
COMPRESSIONS = ("zstd", "lzo", "zlib", "none")  # as btrfs names them
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked to stop: context managers undo everything on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Parser(argparse.ArgumentParser):
    """A parser that reports errors like ash does: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise AshError (USAGE) instead of exiting."""
        raise AshError(message, f"see `{self.prog} --help`", USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.umask(0o022)  # the caller's would be that of the new system's files
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    try:
        command = COMMANDS.get(words[0] if words else "")
        return command(words[1:]) if command else _make(words)
    except _DryRunEnds:
        return 0
    except (machine.MachineError, OSError) as error:
        print(f"init.py: {error}", file=sys.stderr)
        return FAILED
    except EOFError:
        print("init.py: the input has ended; nothing was changed", file=sys.stderr)
        return REFUSED
    except AshError as error:
        print(f"init.py: {'; '.join(filter(None, [str(error), error.hint, *notes_of(error)]))}", file=sys.stderr)
        return error.status
    except Interrupted as error:
        left = notes_of(error) or ["no incomplete files are left"]
        print(f"init.py: {'; '.join([str(error), *left])}", file=sys.stderr)
        return 128 + error.number


def notes_of(error: BaseException) -> list[str]:
    """What was added to an error on its way."""
    return getattr(error, "__notes__", [])


def _interrupt(number: int, _: FrameType | None) -> None:
    """Stop once: a second signal must not interrupt the cleanup after the first."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def _make(words: Sequence[str]) -> int:
    args = _make_args(words)
    new = _installation(args)
    if args.prep_only:
        install.check_machine(new)
        print(preparation.report())
        return 0
    if args.make_rootfs:
        made = install.make_rootfs(args.make_rootfs, new, force=args.force)
        next_command = f"--image {DEFAULT_IMAGE} --rootfs {shlex.quote(str(made.path))}"
        _report(made, f"{host.gibibytes(made.path.stat().st_size)}", [next_command])
    elif args.image:
        made = _make_image(args, new)
    else:
        agree = partial(_agree, args=args)
        if args.disk:
            made = install.install_on_disk(args.disk, new, agree)
        else:
            made = install.install_on_partitions(_places(_Words.of(args.words).devices, args), new, agree)
        print(f"{made.path}: {made.system}; log in {made.log}")
        print("Remove the live medium, and reboot.")
    if args.save_answers:
        _save_answers(args.save_answers, args, new)
    elif not words:
        form.offer_to_save(partial(_save_answers, args=args, new=new))
    if made.problem:
        raise made.problem
    return 0


def _save_answers(path: Path, args: argparse.Namespace, new: install.Installation) -> None:
    """Save the answers of an installation that is done."""
    _require_savable(path, args)
    users = {"password-hash": args.user, "root-password-hash": "root"}
    hashes = {key: new.hashes[user] for key, user in users.items() if new.hashes.get(user)}
    answers.write(path, args, _make_parser(), hashes)


def _require_savable(path: Path, args: argparse.Namespace) -> None:
    logs = [Path(f"{made}.log") for made in (args.image, args.make_rootfs) if made]
    others = filter(None, [args.image, args.make_rootfs, args.rootfs, *logs])
    if path.resolve() in [other.resolve() for other in others]:
        raise AshError(f"{path} is a file that this installation reads or makes", "--save-answers: name another", USAGE)
    if not path.parent.is_dir():
        raise AshError(f"there is no directory {path.parent}", "--save-answers needs it", USAGE)
    if path.exists() and not path.is_file():
        raise AshError(f"{path} is not a regular file", "--save-answers needs one", USAGE)
    if path.exists() and not answers.are_in(path):
        what = f"{path} exists, and has no answers of the installer"
        raise AshError(what, "--save-answers: name another file", REFUSED)


def _installation(args: argparse.Namespace) -> install.Installation:
    """What is to be installed; onto a disk, it prepares this machine first."""
    given = _given(args)
    settings = _with_secrets(args, given)
    if _is_for_elsewhere(args) or args.no_prep:
        return install.Installation(given.source, settings, given.identity)
    return preparation.PreparedInstallation(given.source, settings, given.identity, changes=not args.dry_run)


def _make_args(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of an installation, and the file with answers that it may name; or ask for all of it."""
    parser = _make_parser()
    if not words and sys.stdin.isatty() and sys.stdout.isatty():
        args = form.ask(parser, form.Checks(_check_place, _check_settings, _check_everything, _known))
    else:
        args = parser.parse_args(words)
    if args.answers:
        parser.set_defaults(**answers.read(args.answers, parser))
        args = parser.parse_args(words)
    if args.words and args.words[0] in COMMANDS:
        raise AshError(f"`{args.words[0]}` comes first, and its options after it", SEE_HELP, USAGE)
    _require_place_that_fits(args)
    if args.rootfs and (args.release or args.mirror or args.package or args.make_rootfs):
        raise AshError("--rootfs already determines release and packages", "use these with --make-rootfs", USAGE)
    if args.save_answers:
        _require_savable(args.save_answers, args)
    return args


def _require_place_that_fits(args: argparse.Namespace) -> None:
    """Raise AshError (USAGE) unless one thing to make is named, and no option that is for another one."""
    named = [bool(args.disk), bool(args.image), bool(args.make_rootfs), bool(args.words)].count(True)
    if named > 1 or not (named or args.prep_only):
        raise AshError("name what to make: partitions, or one of --disk, --image, --make-rootfs", SEE_HELP, USAGE)
    if args.image and args.mode not in (None, "3"):
        what = f"--mode {args.mode} is for partitions: an image is a new file"
        raise AshError(what, "--mode 3 adds a system to an image that exists", USAGE)
    if (args.disk or args.make_rootfs) and args.mode not in (None, install.Mode.NEW.value):
        option = "--disk" if args.disk else "--make-rootfs"
        what = f"--mode {args.mode} keeps what is on partitions, and {option} keeps nothing"
        raise AshError(what, "name the partitions instead, or an image", USAGE)
    if args.force and not (args.image or args.make_rootfs):
        raise AshError("--force replaces a file: it is for --image and --make-rootfs", "leave it out", USAGE)
    made = [path.resolve() for path in (args.image, args.make_rootfs) if path]
    if args.rootfs and args.rootfs.resolve() in made:
        raise AshError(f"--rootfs is the file that is to be made: {args.rootfs}", "name another one", USAGE)
    if args.keep_filesystem and (args.disk or _is_for_elsewhere(args)):
        raise AshError("--keep-filesystem is for partitions: all else makes a new file system", SEE_HELP, USAGE)
    if args.prep_only and (_is_for_elsewhere(args) or args.no_prep or args.dry_run):
        raise AshError("--prep-only prepares this machine for an installation on its disks", SEE_HELP, USAGE)
    if _is_encrypted(args) and _is_for_elsewhere(args):
        raise AshError("an image is not encrypted: ash would not find what is in it", "--luks is for disks", USAGE)
    if args.dry_run and _is_for_elsewhere(args):
        raise AshError("there is no dry run of an image", "--dry-run is for disks of this machine", USAGE)


def _given(args: argparse.Namespace) -> install.Installation:
    """The system as it is given; a password that is missing is not asked for."""
    identity = _identity(args, _Words.of(args.words))
    source = _source(args, load_installer(identity.module))
    return install.Installation(source, _given_settings(args, identity.module), identity)


def _check_place(args: argparse.Namespace) -> Sequence[install.Loss]:
    """Check what the system is called, and where it goes if that is a partition. Returns what happens there."""
    devices, new = _Words.of(args.words).devices, _given(args)
    if not (devices and args.mode):
        return ()
    with install.checked_places(_places(devices, args), new) as checked:
        return checked.losses


def _check_settings(args: argparse.Namespace) -> None:
    new = _given(args)
    new.installer.check(new.settings)
    if args.disk:
        install.require_room(args.disk, new)


def _check_everything(args: argparse.Namespace) -> None:
    _check_place(args)
    _given(args).check(host.disk_tools())


def _known(args: argparse.Namespace, setting: str) -> Sequence[str]:
    installer = _given(args).installer
    return sorted(first_snapshot.profiles_of(installer.id)) if setting == "profile" else installer.known(setting)


def _make_image(args: argparse.Namespace, new: install.Installation) -> install.Made:
    path = shlex.quote(str(args.image))
    next_commands = [f"boot {path}", f"try {path}"]
    if args.mode == "3":
        made = install.add_to_image(args.image, new)
        _report(made, f"added as {new.identity.id}", next_commands)
        return made
    size = disk.parse_size(args.size)
    made = install.make_image(args.image, size, new, force=args.force)
    taken = host.gibibytes(made.path.stat().st_blocks * 512)
    what = f"a disk of {host.gibibytes(size)} ({taken} in use) that boots with BIOS and UEFI"
    _report(made, what, next_commands)
    return made


def _source(args: argparse.Namespace, installer: DistroInstaller) -> Source:
    release, has_all = args.release or Source.release, args.firmware == "all"
    firmware = tuple(_firmware(args, installer))
    return Source(release, args.mirror, tuple(args.package), args.rootfs, firmware, needs_firmware=has_all)


def _firmware(args: argparse.Namespace, installer: DistroInstaller) -> Sequence[str]:
    """The packages with firmware and microcode: unless something else is asked for, those that this machine needs."""
    if args.firmware == "all":
        return installer.all_firmware()
    if args.firmware == "none" or _is_for_elsewhere(args) or is_virtual():
        return ()
    return installer.firmware_for(Hardware.here())


def _is_for_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the new system is not for this machine."""
    return bool(args.image or args.make_rootfs)


def _is_encrypted(args: argparse.Namespace) -> bool:
    """Whether the partition of the root is encrypted, or is to be."""
    return bool(args.luks or args.luks_passphrase_file)


def _network(args: argparse.Namespace, module: str) -> Network:
    """What configures the network: NetworkManager where there are wireless networks, or a desktop that shows them."""
    if args.network:
        return Network(args.network)
    is_wireless = not _is_for_elsewhere(args) and Hardware.here().wireless
    has_desktop = any(first_snapshot.is_desktop(module, name) for name in args.profile)
    return Network.NETWORK_MANAGER if is_wireless or has_desktop else Network.DHCP


def _swap(args: argparse.Namespace) -> Swap:
    swap = Swap.of(args.swap)
    if swap.devices and _is_for_elsewhere(args):
        what = f"--swap {swap.devices[0]} is for a system on a disk of this machine"
        raise AshError(what, "name a size, or zram", USAGE)
    return swap


class _Words(NamedTuple):
    """The words of the form with partitions."""

    devices: Sequence[Path] = ()
    id: str = ""
    name: str = ""

    @classmethod
    def of(cls, words: Sequence[str]) -> Self:
        """Tell devices from what follows them: they are paths. AshError (USAGE) if there are too few or too many."""
        devices = list(itertools.takewhile(lambda word: "/" in word, words))
        rest = words[len(devices) :]
        if words and not (2 <= len(devices) <= 3 and len(rest) <= 2):
            what = "name the partition of the root, its drive, with UEFI the EFI partition, and then an id and a name"
            raise AshError(what, f'{PROGRAM} /dev/<root> /dev/<drive> [/dev/<efi>] [id] ["name"]', USAGE)
        return cls([Path(word) for word in devices], *rest)


def _identity(args: argparse.Namespace, named: _Words) -> Identity:
    """What the system is called: by default as the live system, but an image can be made anywhere."""
    if args.id is not None and named.id:
        raise AshError(f"{named.id} and --id {args.id} both name the system", "leave one out", USAGE)
    default = os_release(Path("/"), "ID") if args.disk or named.devices or args.prep_only else DEFAULT_ID
    ident = named.id or (default if args.id is None else args.id)
    return Identity.of(ident, named.name or args.name)


def _places(devices: Sequence[Path], args: argparse.Namespace) -> install.Places:
    """The partitions that the command line names."""
    root, drive, *rest = devices
    efi = rest[0] if rest else None
    modes = {
        install.Mode.NEW: "make new file systems for the root and EFI; all that is on them is lost",
        install.Mode.KEEP_EFI: "make a new one for the root, and keep that of EFI",
        install.Mode.ADD: "keep both, and add the system to those on the root's",
    }
    if args.keep_filesystem:
        modes[install.Mode.NEW] = "make a new file system for EFI, all that is on it is lost; keep the root's"
        modes[install.Mode.KEEP_EFI] = "keep both: that of the root is empty"
    known = [mode.value for mode in modes]
    answer = args.mode or (None if efi else install.Mode.NEW.value)
    while answer not in known:
        if args.yes or not sys.stdin.isatty():
            raise AshError("it is not clear what happens to the EFI partition", "--mode 1, 2 or 3 says so", USAGE)
        print(*(f"  {mode.value}  {text}" for mode, text in modes.items()), sep="\n")
        answer = input("1, 2 or 3? ").strip()
    if args.keep_filesystem and answer == install.Mode.ADD.value:
        raise AshError("--mode 3 keeps the file system anyway", "leave --keep-filesystem out", USAGE)
    return install.Places(root, drive, efi, install.Mode(answer), args.keep_filesystem)


class _DryRunEnds(Exception):
    """Everything was checked and shown, and nothing is to be changed."""


def _agree(name: str, losses: Sequence[install.Loss], commands: Sequence[str], *, args: argparse.Namespace) -> None:
    """Show what happens to the disk with a name; raise AshError unless the user agrees."""
    print("This will happen:")
    for where, text in losses:
        print(f"  {where}: {text}")
    if args.dry_run:
        print(*(["These commands would run:", *commands] if commands else []), "Nothing was changed.", sep="\n")
        raise _DryRunEnds
    sys.stdout.flush()  # the steps that follow go to another stream
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise AshError("there is no terminal to ask on", "--yes goes on without asking", USAGE)
    if input(f"Type {name} to go on: ").strip() != name:
        raise AshError("nothing was changed", f"only the answer {name} goes on", REFUSED)


def _report(made: install.Made, what: str, next_commands: Sequence[str]) -> None:
    print(f"{made.path}: {made.system}, {what}; log in {made.log}")
    print("Next:", *(f"  {PROGRAM} {command}" for command in next_commands), sep="\n")


def _given_settings(args: argparse.Namespace, module: str) -> Settings:
    if args.user is None and (args.password_file or args.password_hash):
        raise AshError("there is a password, and no user", "--user names one; --root-password-file is root's", USAGE)
    first_snapshot.require_profiles(module, args.profile)
    return Settings(
        hostname=args.hostname,
        user=args.user,
        groups=tuple(args.group),
        password=_password(args.password_file, args.password_hash),
        root_password=_password(args.root_password_file, args.root_password_hash),
        ssh_keys=_ssh_keys(args.ssh_key),
        timezone=args.timezone,
        locale=args.locale,
        keymap=args.keymap,
        serial=args.image is not None or host.has_serial_console(),
        keyring=args.keyring,
        sizes=disk.Sizes(boot=_boot_size(args), home=_home_size(args)),
        passphrase=_passphrase(args.luks_passphrase_file),
        network=_network(args, module),
        swap=_swap(args),
        compression=args.compress or "",
        discard=args.discard,
        profiles=tuple(dict.fromkeys(args.profile)),
        mutable=args.mutable,
    )


def _with_secrets(args: argparse.Namespace, given: install.Installation) -> Settings:
    """The settings that are given, with the passwords that are missing: they are asked for."""
    settings = given.settings
    given.installer.check_names(settings)  # before anything is asked
    can_wait = args.make_rootfs or args.prep_only
    if args.luks and settings.passphrase is None and not can_wait:
        settings = replace(settings, passphrase=_asked_passphrase(is_new=args.mode != install.Mode.ADD.value))
    if args.user and settings.password is None and not can_wait:
        return replace(settings, password=_asked_password(args.user))
    return settings


def _password(path: Path | None, known: str | None) -> Password | None:
    """The password in the first line of a file, or else the one with a hash that is known."""
    if path is None:
        return Password(known, is_hash=True) if known else None
    lines = _lines(path, "the password")
    if not lines or not lines[0]:
        raise AshError(f"the first line of the password file {path} is empty", status=USAGE)
    return Password(lines[0])


def _asked_password(user: str) -> Password:
    """A password that is typed twice, unseen; AshError (USAGE) if there is no terminal."""
    if not sys.stdin.isatty():
        hint = "--password-file names a file; its first line is the password"
        raise AshError(f"the user {user} has no password", hint, USAGE)
    return Password(_typed_unseen(f"Password of {user}: ", lambda text: "" if text else "It is empty."))


def _typed_unseen(prompt: str, problem: Callable[[str], str], *, twice: bool = True) -> str:
    """A text that is typed until nothing is wrong with it, as `problem` says, and it is typed the same twice."""
    while True:
        text = getpass.getpass(prompt)
        if wrong := problem(text):
            print(wrong)
        elif not twice or getpass.getpass("The same again: ") == text:
            return text
        else:
            print("They differ.")


def _boot_size(args: argparse.Namespace) -> int:
    """The bytes of a partition for /boot, in whole MiB."""
    if not args.boot_size:
        return 0
    if not (args.disk or args.image) or args.mode == install.Mode.ADD.value:
        raise AshError("--boot-size is for --disk and --image, which make partitions", "leave it out", USAGE)
    if _is_encrypted(args):
        what = "a partition for /boot would not be encrypted: what starts the system could be replaced there"
        raise AshError(what, "without --boot-size, /boot is in the encrypted one", USAGE)
    return _partition_size(args.boot_size, "/boot", SMALLEST_BOOT)


def _partition_size(text: str, directory: str, least: int) -> int:
    size = disk.parse_size(text) // disk.MIB * disk.MIB
    if size < least:
        raise AshError(f"{text} is too small for {directory}", f"at least {least // disk.MIB}M", USAGE)
    return size


def _home_size(args: argparse.Namespace) -> int:
    """The bytes of a partition for /home, in whole MiB."""
    if not args.home_size:
        return 0
    if not args.disk:
        raise AshError("--home-size is for --disk, which makes partitions", "else mount one by /etc/fstab", USAGE)
    if _is_encrypted(args):
        what = "a partition for /home would not be encrypted"
        raise AshError(what, "without --home-size, /home is in the encrypted one", USAGE)
    return _partition_size(args.home_size, "/home", SMALLEST_HOME)


def _passphrase(path: Path | None) -> str | None:
    """The passphrase in the first line of a file; AshError (USAGE) if GRUB could not read it."""
    if path is None:
        return None
    lines = _lines(path, "the passphrase")
    luks.check_passphrase(lines[0] if lines else "")
    return lines[0]


def _asked_passphrase(*, is_new: bool = True) -> str:
    """A passphrase that is typed unseen, a new one twice; AshError (USAGE) if there is no terminal."""
    if not sys.stdin.isatty():
        hint = "--luks-passphrase-file names a file; its first line is the passphrase"
        raise AshError("there is no terminal to ask for the passphrase", hint, USAGE)

    def problem(text: str) -> str:
        try:
            luks.check_passphrase(text)
        except AshError as error:
            return f"{error}; {error.hint}."
        return ""

    return _typed_unseen("Passphrase of the disk: ", problem, twice=is_new)


def _ssh_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    keys = tuple(line for line in map(str.strip, _lines(path, "the ssh key")) if line and not line.startswith("#"))
    if not keys:
        raise AshError(f"{path} has no ssh key", "name a public one, such as ~/.ssh/id_ed25519.pub", USAGE)
    return keys


def _lines(path: Path, what: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AshError(f"cannot read {what} in {path}: {error}", status=USAGE) from error


def _make_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Install a Debian system that ash manages, on a disk or in a disk image; boot it, try it out.",
        usage="\n       ".join(f"{PROGRAM} {form}" for form in FORMS),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=ASH_VERSION)
    result = parser.add_argument_group("what to make")
    result.add_argument(
        "words", nargs="*", metavar="WORD", help="partition of the root, drive, EFI partition, id, name"
    )
    result.add_argument("--disk", type=Path, metavar="DEVICE", help="a whole disk of this machine, such as /dev/sda")
    result.add_argument("--image", type=Path, metavar="FILE", help="a disk image")
    result.add_argument("--make-rootfs", type=Path, metavar="TAR", help="a tar file of a root, for --rootfs")
    modes = "1: new file systems for root and EFI; 2: for the root; 3: for neither, the system is added to those there"
    parser.add_argument("--mode", choices=[mode.value for mode in install.Mode], help=modes)
    keep = "with --mode 1 or 2: use the empty btrfs on the root's partition as it is"
    parser.add_argument("--keep-filesystem", action="store_true", help=keep)
    parser.add_argument("--id", metavar="ID", help="of the system: debian, or debian_2 for a second one beside it")
    parser.add_argument("--name", default="", help="of the system, for the firmware's boot menu")
    parser.add_argument("--yes", action="store_true", help="do not ask before a disk is overwritten")
    parser.add_argument("--dry-run", action="store_true", help="check all, show what would happen, and change nothing")
    parser.add_argument(
        "--prep-only", action="store_true", help="only prepare this machine for an installation on a disk"
    )
    parser.add_argument(
        "--no-prep", action="store_true", help="do not check its clock, memory and room, nor renew its keys"
    )
    parser.add_argument("--size", default=DEFAULT_SIZE, help="of the disk; the file is sparse (default: %(default)s)")
    kernels = "of a partition for GRUB's files and the kernels, with --disk or --image (default: none)"
    parser.add_argument("--boot-size", metavar="SIZE", help=kernels)
    parser.add_argument("--home-size", metavar="SIZE", help="of a partition for /home, with --disk (default: none)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="take options from a TOML file")
    parser.add_argument("--save-answers", type=Path, metavar="FILE", help="save options there; passwords as hashes")
    parser.set_defaults(password_hash=None, root_password_hash=None)
    _add_source(parser.add_argument_group("source of the system"))
    _add_settings(parser.add_argument_group("configuration of the system"))
    _add_storage(parser.add_argument_group("storage of the system"))
    _add_first(parser.add_argument_group("the first snapshot, beside the base"))
    return parser


def _add_source(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--release", metavar="NAME", help=f"release of Debian (default: {Source.release})")
    group.add_argument("--mirror", metavar="URL", help="repository to use (default: Debian's own)")
    group.add_argument("--package", nargs="+", action="extend", default=[], metavar="NAME", help="additional packages")
    group.add_argument("--rootfs", type=Path, metavar="TAR", help="use this root; needs no network")
    kinds = "firmware and microcode: what this machine needs (default; for an image none), none, or all"
    group.add_argument("--firmware", choices=["auto", "none", "all"], default="auto", help=kinds)


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hostname", default=Settings.hostname, metavar="NAME", help="default: %(default)s")
    group.add_argument("--user", metavar="NAME", help="create a user who may use sudo; root then cannot log in")
    group.add_argument(
        "--group", nargs="+", action="extend", default=[], metavar="NAME", help="more of the user's groups"
    )
    group.add_argument("--ssh-key", type=Path, metavar="FILE", help="a public key; installs and starts an ssh server")
    group.add_argument(
        "--password-file", type=Path, metavar="FILE", help="the first line is the user's; else it is asked for"
    )
    group.add_argument("--root-password-file", type=Path, metavar="FILE", help="the first line is root's password")
    _add_luks(group, "encrypt the root with LUKS2")
    group.add_argument("--keyring", type=Path, metavar="FILE", help="keys that `ash upself` trusts")
    group.add_argument("--timezone", default=Settings.timezone, metavar="ZONE", help="default: %(default)s")
    group.add_argument("--locale", default=Settings.locale, help="such as de_DE.UTF-8 (default: %(default)s)")
    group.add_argument("--keymap", default=Settings.keymap, help="such as de or de:nodeadkeys (default: %(default)s)")
    kinds = "default: networkmanager for wireless hardware or a desktop, else DHCP on each Ethernet interface"
    group.add_argument("--network", choices=[kind.value for kind in Network], help=kinds)


def _add_storage(group: argparse._ArgumentGroup) -> None:
    swap = "zram, the size of a swap file such as 2G, or swap partitions"
    group.add_argument("--swap", nargs="+", action="extend", default=[], metavar="WHAT", help=swap)
    group.add_argument("--compress", choices=COMPRESSIONS, help="compression of files (default: zstd, by mount option)")
    group.add_argument("--discard", action="store_true", help="tell the disk every week which space is free")


def _add_first(group: argparse._ArgumentGroup) -> None:
    profiles = "install profiles, which needs a network"
    group.add_argument("--profile", nargs="+", action="extend", default=[], metavar="NAME", help=profiles)
    group.add_argument("--mutable", action="store_true", help="make it writable")


def _add_luks(group: argparse._ActionsContainer, purpose: str) -> None:
    group.add_argument("--luks", action="store_true", help=f"{purpose}; asks for a passphrase")
    group.add_argument("--luks-passphrase-file", type=Path, metavar="FILE", help="... which is its first line")


def _boot(words: Sequence[str]) -> int:
    parser = Parser(prog=f"{PROGRAM} boot", description="Boot an image in this terminal.")
    parser.add_argument("image", type=Path, metavar="FILE", help="the disk image")
    parser.add_argument("--uefi", action="store_true", help="boot with UEFI instead of BIOS")
    parser.add_argument("--snapshot", action="store_true", help="discard all changes to the image")
    args = parser.parse_args(words)
    if not args.image.is_file():
        hint = f"{PROGRAM} --image {shlex.quote(str(args.image))} makes it"
        raise AshError(f"{args.image} does not exist", hint, MISSING)
    require_raw(args.image)
    return machine.boot_interactively(args.image, uefi=args.uefi, snapshot=args.snapshot)


def _rescue(words: Sequence[str]) -> int:
    about = "Show the systems on a disk, repair a boot loader, or open a shell in which `ash` works on the disk."
    parser = Parser(prog=f"{PROGRAM} rescue", description=about)
    parser.add_argument("place", type=Path, metavar="DEVICE|FILE", help="the partition of the root, or a disk image")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--boot-loader", metavar="ID", help="install the boot loader of that system anew")
    what.add_argument("--shell", action="store_true", help="open a shell")
    _add_luks(parser, "the partition is encrypted")
    args = parser.parse_args(words)
    place = _place(args)
    if args.shell:
        return existing.open_shell(place)
    if args.boot_loader:
        existing.repair_boot_loader(place, args.boot_loader)
        print(f"the boot loader of {args.boot_loader} is installed")
    else:
        existing.rescue(place)
    return 0


def _place(args: argparse.Namespace) -> existing.Place:
    if not args.place.exists():
        raise AshError(f"{args.place} does not exist", "name the partition of the root, or a disk image", MISSING)
    passphrase = _passphrase(args.luks_passphrase_file)
    return existing.Place(args.place, passphrase or (_asked_passphrase(is_new=False) if args.luks else None))


def _remove(words: Sequence[str]) -> int:
    parser = Parser(prog=f"{PROGRAM} remove", description="Remove one of the systems that share a file system.")
    parser.add_argument("id", metavar="ID", help="of the system, as `ash dist` lists it")
    parser.add_argument("place", type=Path, metavar="DEVICE|FILE", help="the partition of its root, or a disk image")
    parser.add_argument("--last", action="store_true", help="also the last system there")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="show what would happen")
    _add_luks(parser, "the partition is encrypted")
    args = parser.parse_args(words)
    existing.remove(_place(args), args.id, partial(_agree, args=args), even_last=args.last)
    print(f"{args.id} is removed from {args.place}")
    return 0


def _try(words: Sequence[str]) -> int:
    parser = Parser(prog=f"{PROGRAM} try", description="Show what ash does, in a virtual machine.")
    parser.add_argument("image", type=Path, nargs="?", default=DEFAULT_IMAGE, metavar="FILE", help="created if missing")
    parser.add_argument("--tour", action="store_true", help="run the commands by itself, as it does without a terminal")
    parser.add_argument("--uefi", action="store_true", help="boot with UEFI instead of BIOS")
    args = parser.parse_args(words)
    if not args.image.exists():
        install.make_image(
            args.image,
            disk.parse_size(DEFAULT_SIZE),
            install.Installation(Source(), Settings(), Identity.of(DEFAULT_ID)),
        )
    require_raw(args.image)
    if args.tour or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return tour.tour(args.image, uefi=args.uefi)
    return tour.guided(args.image, uefi=args.uefi)


COMMANDS = {"boot": _boot, "try": _try, "remove": _remove, "rescue": _rescue}  # all others make something
