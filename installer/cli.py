# SPDX-License-Identifier: AGPL-3.0-or-later
"""The installer's command line: install on a disk, make an image, boot it, try it out."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ash import ASH_VERSION, FAILED, MISSING, REFUSED, USAGE, AshError, require_raw
from installer import disk, host, install, machine, tour
from installer.distribution import Settings, Source

EXAMPLES = """\
examples:
  python3 init.py try                          make an image, boot it, and show what ash does
  python3 init.py --disk /dev/sda              install on a disk of this machine
  python3 init.py /dev/sda2 /dev/sda /dev/sda1 --mode 2    ... on a partition, beside another system
  python3 init.py --image ashos.img            make an image
  python3 init.py boot ashos.img --uefi        boot it in this terminal
  python3 init.py --make-rootfs root.tar       make a root once ...
  python3 init.py --image a.img --rootfs root.tar    ... for any number of images, without a network
"""
PROGRAM = "python3 init.py"
FORMS = (
    "/dev/<root> /dev/<drive> [/dev/<efi>] [options]",
    "--disk DEVICE [options]",
    "--image FILE [options]",
    "boot FILE [--uefi] [--snapshot]",
    "try [FILE] [--tour] [--uefi]",
)
SEE_HELP = f"see `{PROGRAM} --help`"
DEFAULT_IMAGE = Path("ashos.img")
DEFAULT_SIZE = "8G"
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
        command = {"boot": _boot, "try": _try}.get(words[0] if words else "")
        return command(words[1:]) if command else _make(words)
    except (machine.MachineError, OSError) as error:
        print(f"init.py: {error}", file=sys.stderr)
        return FAILED
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
    args = _make_parser().parse_args(words)
    if [bool(args.disk), bool(args.image), bool(args.make_rootfs), bool(args.places)].count(True) != 1:
        raise AshError("name what to make: partitions, or one of --disk, --image, --make-rootfs", SEE_HELP, USAGE)
    if args.places and not 2 <= len(args.places) <= 3:
        hint = f"{PROGRAM} /dev/<root> /dev/<drive> [/dev/<efi>]"
        raise AshError("name the partition of the root, its drive, and with UEFI the EFI partition", hint, USAGE)
    if args.rootfs and (args.release or args.mirror or args.package or args.make_rootfs):
        raise AshError("--rootfs already determines release and packages", "use these with --make-rootfs", USAGE)
    source = Source(args.release or Source.release, args.mirror, tuple(args.package), args.rootfs)
    new = install.Installation(source, _settings(args))
    if args.make_rootfs:
        made = install.make_rootfs(args.make_rootfs, new, force=args.force)
        next_command = f"--image {DEFAULT_IMAGE} --rootfs {shlex.quote(str(made.path))}"
        _report(made, f"{host.gibibytes(made.path.stat().st_size)}", [next_command])
    elif args.disk or args.places:
        agree = partial(_agree, yes=args.yes)
        if args.disk:
            made = install.install_on_disk(args.disk, new, agree)
        else:
            made = install.install_on_partitions(_places(args), new, agree)
        print(f"{made.path}: {made.system}; log in {made.log}")
        print("Remove the live medium, and reboot.")
    else:
        size = disk.parse_size(args.size)
        made = install.make_image(args.image, size, new, force=args.force)
        taken = host.gibibytes(made.path.stat().st_blocks * 512)
        what = f"a disk of {host.gibibytes(size)} ({taken} in use) that boots with BIOS and UEFI"
        path = shlex.quote(str(made.path))
        _report(made, what, [f"boot {path}", f"try {path}"])
    return 0


def _places(args: argparse.Namespace) -> install.Places:
    """The partitions that the command line names."""
    root, drive, *rest = [Path(word) for word in args.places]
    efi = rest[0] if rest else None
    modes = {
        "1": "make new file systems for the root and EFI",
        "2": "make a new one for the root, and keep that of EFI",
    }
    mode = args.mode or (None if efi else "1")
    while mode not in modes:
        if args.yes or not sys.stdin.isatty():
            raise AshError("it is not clear what happens to the EFI partition", "--mode 1 or --mode 2 says so", USAGE)
        print(*(f"  {key}  {text}" for key, text in modes.items()), sep="\n")
        mode = input("1 or 2? ").strip()
    return install.Places(root, drive, efi, keep_efi=mode == "2")


def _agree(name: str, losses: Sequence[install.Loss], *, yes: bool) -> None:
    """Show what happens to the disk with a name; raise AshError unless the user agrees."""
    print("This will happen:")
    for device, text in losses:
        print(f"  {device.path} ({device.what()}): {text}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise AshError("there is no terminal to ask on", "--yes installs without asking", USAGE)
    if input(f"Type {name} to go on: ").strip() != name:
        raise AshError("nothing was changed", f"only the answer {name} goes on", REFUSED)


def _report(made: install.Made, what: str, next_commands: Sequence[str]) -> None:
    print(f"{made.path}: {made.system}, {what}; log in {made.log}")
    print("Next:", *(f"  {PROGRAM} {command}" for command in next_commands), sep="\n")


def _settings(args: argparse.Namespace) -> Settings:
    if (args.user is None) != (args.password_file is None):
        raise AshError("--user and --password-file go together", "the first line of the file is the password", USAGE)
    return Settings(
        hostname=args.hostname,
        user=args.user,
        password=_password(args.password_file),
        root_password=_password(args.root_password_file),
        timezone=args.timezone,
        locale=args.locale,
        keymap=args.keymap,
        serial=args.image is not None or host.has_serial_console(),
        keyring=args.keyring,
    )


def _password(path: Path | None) -> str | None:
    """The first line of a file; None without a file."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AshError(f"cannot read the password file {path}: {error}", status=USAGE) from error
    if not lines or not lines[0]:
        raise AshError(f"the first line of the password file {path} is empty", status=USAGE)
    return lines[0]


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
    result.add_argument("places", nargs="*", metavar="DEVICE", help="partition of the root, drive, EFI partition")
    result.add_argument("--disk", type=Path, metavar="DEVICE", help="a whole disk of this machine, such as /dev/sda")
    result.add_argument("--image", type=Path, metavar="FILE", help="a disk image")
    result.add_argument("--make-rootfs", type=Path, metavar="TAR", help="a tar file of a root, for --rootfs")
    parser.add_argument("--mode", choices=["1", "2"], help="1: a new file system for EFI too; 2: keep that")
    parser.add_argument("--yes", action="store_true", help="do not ask before a disk is overwritten")
    parser.add_argument("--size", default=DEFAULT_SIZE, help="of the disk; the file is sparse (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    _add_source(parser.add_argument_group("source of the system"))
    _add_settings(parser.add_argument_group("configuration of the system"))
    return parser


def _add_source(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--release", metavar="NAME", help=f"release of Debian (default: {Source.release})")
    group.add_argument("--mirror", metavar="URL", help="repository to use (default: Debian's own)")
    group.add_argument("--package", nargs="+", action="extend", default=[], metavar="NAME", help="additional packages")
    group.add_argument("--rootfs", type=Path, metavar="TAR", help="use this root; needs no network")


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hostname", default=Settings.hostname, metavar="NAME", help="default: %(default)s")
    group.add_argument("--user", metavar="NAME", help="create a user who may use sudo; root then cannot log in")
    group.add_argument("--password-file", type=Path, metavar="FILE", help="the first line is the user's password")
    group.add_argument("--root-password-file", type=Path, metavar="FILE", help="the first line is root's password")
    group.add_argument("--keyring", type=Path, metavar="FILE", help="keys that `ash upself` trusts")
    group.add_argument("--timezone", default=Settings.timezone, metavar="ZONE", help="default: %(default)s")
    group.add_argument("--locale", default=Settings.locale, help="such as de_DE.UTF-8 (default: %(default)s)")
    group.add_argument("--keymap", default=Settings.keymap, help="such as de or de:nodeadkeys (default: %(default)s)")


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


def _try(words: Sequence[str]) -> int:
    parser = Parser(prog=f"{PROGRAM} try", description="Show what ash does, in a virtual machine.")
    parser.add_argument("image", type=Path, nargs="?", default=DEFAULT_IMAGE, metavar="FILE", help="created if missing")
    parser.add_argument("--tour", action="store_true", help="run the commands by itself, as it does without a terminal")
    parser.add_argument("--uefi", action="store_true", help="boot with UEFI instead of BIOS")
    args = parser.parse_args(words)
    if not args.image.exists():
        install.make_image(args.image, disk.parse_size(DEFAULT_SIZE), install.Installation(Source(), Settings()))
    require_raw(args.image)
    if args.tour or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return tour.tour(args.image, uefi=args.uefi)
    return tour.guided(args.image, uefi=args.uefi)
