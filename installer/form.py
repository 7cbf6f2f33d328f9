# SPDX-License-Identifier: AGPL-3.0-or-later
"""The form: asks on a terminal for all that an installation on a disk needs.

The questions are a table, and the answers become what the parser of the command line would return. All output is plain
lines, so that the form works on a serial console.
"""

import argparse
import contextlib
import getpass
import itertools
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ash import FIRMWARE, MISSING, REFUSED, AshError, one_line, os_release, reason
from installer import drives, install
from installer.disk import BIOS_BOOT_TYPE
from installer.distribution import Identity, installable

BACK, LEAVE, NONE, LIST = "<", "q", "-", "?"
NO_YES = ("no", "yes")
NARROWEST, SHORTEST = 20, 8  # columns and lines that a screen has at least
ITEM, DETAIL = " " * 5, " " * 7  # indentations: of the text after a number, and of what is said about it


class _Back(Exception):
    """The user wants to go back to the question before."""


class _Leave(Exception):
    """The user wants to leave."""


def _width() -> int:
    """Columns of a line: one less than the terminal has, as some add an empty line after a full one."""
    return max(shutil.get_terminal_size().columns, NARROWEST) - 1


def _wrapped(text: str, first: str = "", indent: str = "") -> list[str]:
    """Wrap a text, with an indentation for its first line and one for the others."""
    wrapper = textwrap.TextWrapper(_width(), initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    return wrapper.wrap(one_line(text)) or [first.rstrip()]


def _rule(title: str) -> str:
    return f"-- {title} ".ljust(_width(), "-")[: _width()]


def _columns(names: Sequence[str]) -> list[str]:
    """Arrange names in columns, to be read downwards."""
    column = max(map(len, names), default=0) + 2
    count = max(1, (_width() + 2) // column)
    height = -(-len(names) // count)
    return ["".join(name.ljust(column) for name in names[row::height]).rstrip() for row in range(height)]


def _show(lines: Sequence[str]) -> None:
    """Print lines, and wait after each page of them; the last page has room for what is asked then."""
    page = max(shutil.get_terminal_size().lines, SHORTEST) - 2
    for start in range(0, len(lines), page):
        print(*lines[start : start + page], sep="\n")
        if start + page < len(lines) and _line("(Enter: more, s: skip)"):
            return


def _say(text: str) -> None:
    print(*_wrapped(text), sep="\n", flush=True)


def _line(prompt: str) -> str:
    """A line that the user types. Raises _Back, _Leave, or EOFError at the end of the input."""

    def read() -> str:
        print(_prompt(prompt), end="", flush=True)
        return input().strip()

    return _typed(read)


def _prompt(text: str) -> str:
    return "\n".join(_wrapped(text)) + " "


def _hidden_line(prompt: str) -> str:
    """The same, unseen."""
    return _typed(lambda: getpass.getpass(_prompt(prompt)))


def _typed(read: Callable[[], str]) -> str:
    """What is typed, once that is text: the arrow keys of a plain terminal, for one, are not."""
    while True:
        try:
            text = read()
        except UnicodeDecodeError:
            text = "\0"  # not in the encoding of this machine
        except EOFError:
            print()
            raise
        if text == BACK:
            raise _Back
        if text == LEAVE:
            raise _Leave
        if text.isprintable():
            return text
        _say("that has characters which cannot be printed")


def _reason(error: AshError | OSError) -> str:
    return "; ".join(filter(None, [reason(error), getattr(error, "hint", "")]))


def _obstacle(check: Callable[..., object], *args: object) -> str:
    """Why a check fails; empty if it does not."""
    try:
        check(*args)
    except (AshError, OSError) as error:
        return _reason(error)
    return ""


class Checks(NamedTuple):
    """The installer's own checks of answers, which are given as the command line's parser would return them.

    Each raises AshError if they are wrong.

    Args:
        place: of where the system goes; returns what happens there.
        settings: of the new system's configuration.
        everything: of all, with the repository too.
        known: the valid values of a setting, by its key.
    """

    place: Callable[[argparse.Namespace], Sequence[install.Loss]]
    settings: Callable[[argparse.Namespace], None]
    everything: Callable[[argparse.Namespace], None]
    known: Callable[[argparse.Namespace, str], Sequence[str]]


class Situation:
    """What a question may depend on.

    Args:
        parser: of the command line.
        checks: the installer's own.

    Attributes:
        options: of the command line, by the name that they have in the parser's result.
        disks: those of this machine.
        given: the answers to the questions before, by their keys.
    """

    def __init__(self, parser: argparse.ArgumentParser, checks: Checks) -> None:
        self.checks = checks
        self.options = {option.dest: option for option in parser._actions}  # noqa: SLF001 (there is no public list)
        self.disks = drives.disks()
        self.given: dict[str, Any] = {}
        self._defaults = parser.parse_args([])

    def args(self, **more: object) -> argparse.Namespace:
        """The answers before, and more, as the parser would return them."""
        given = {**self.given, **more}
        args = argparse.Namespace(**vars(self._defaults))
        for key in given.keys() & self.options.keys():
            setattr(args, key, given[key])
        if not args.id:
            args.id = self.free_id() if args.mode == install.Mode.ADD.value else _base_id()
        where = given.get("where")
        root, efi = given.get("root", where), given.get("efi")
        if root != where:
            drive = given.get("drive") or (self._disk_of(efi) if efi else where)
            args.words = [root, drive, *filter(None, [efi])]
        elif where:
            args.disk = Path(where)
        return args

    def _disk_of(self, path: str) -> str:
        return next(str(disk.path) for disk in self.disks for one in disk if str(one.path) == path)

    def device(self, key: str) -> drives.Device:
        """The device that was answered."""
        return next(one for disk in self.disks for one in disk if str(one.path) == self.given[key])

    @property
    def on_partition(self) -> bool:
        """Whether the system goes on a partition, not on a whole disk."""
        return "root" in self.given and self.given["root"] != self.given["where"]

    def efi_partitions(self) -> Iterator[drives.Device]:
        """Those of all disks."""
        for disk in self.disks:
            yield from (one for one in disk if one.purpose in drives.EFI_TYPES)

    @property
    def is_added(self) -> bool:
        """Whether the system is added to others."""
        return bool(self.given.get("mode") == install.Mode.ADD.value)

    def free_id(self) -> str:
        """An id that no system on the partition of the root has."""
        there = install.systems_on(self.device("root"))
        return next(one for one in itertools.chain([_base_id()], _numbered(_base_id())) if one not in there)


def _base_id() -> str:
    """The id of the live system, or of another one if that cannot be installed."""
    live = os_release(Path("/"), "ID")
    return installable()[0] if _obstacle(Identity.of, live) else live


def _numbered(base: str) -> Iterator[str]:
    return (f"{base}_{number}" for number in itertools.count(2))


class Choice(NamedTuple):
    """One of the answers that a question has.

    Args:
        value: what is answered.
        text: what it is.
        details: more about it, in lines.
        obstacle: why it cannot be chosen; empty if it can.
    """

    value: str
    text: str
    details: Sequence[str] = ()
    obstacle: str = ""


def _disks(situation: Situation) -> list[Choice]:
    situation.disks = drives.disks()  # one may have been plugged in
    return [_disk(disk, situation) for disk in situation.disks]


def _disk(disk: drives.Device, situation: Situation) -> Choice:
    details = [_described(one) for one in disk if one is not disk]
    obstacles = [_obstacle_to_whole(disk), *(_obstacle_to_root(one, situation) for one in _partitions(disk))]
    obstacle = obstacles[0] if all(obstacles) else ""
    return Choice(str(disk.path), _described(disk), details or ["it has no partitions"], obstacle)


PURPOSES = {**dict.fromkeys(drives.EFI_TYPES, "EFI partition"), BIOS_BOOT_TYPE.lower(): "for GRUB"}


def _described(device: drives.Device) -> str:
    """A device, and what it is used for."""
    return ", ".join(filter(None, [str(device), PURPOSES.get(device.purpose, ""), device.use()]))


def _obstacle_to_whole(disk: drives.Device) -> str:
    return _obstacle(drives.require_free, disk.path, disk, install.MINIMUM_SIZE)


def _obstacle_to_root(part: drives.Device, situation: Situation) -> str:
    if part.purpose in drives.EFI_TYPES:
        return "it is an EFI partition"
    if FIRMWARE.is_dir() and all(one.obstacle for one in _efi_partitions(situation)):
        return "this machine was started with UEFI, and has no EFI partition that can be used"
    return _obstacle(drives.require_free, part.path, part, install.MINIMUM_SIZE)


def _partitions(disk: drives.Device) -> list[drives.Device]:
    return [one for one in disk.inside if one.kind == "part"]


def _roots(situation: Situation) -> list[Choice]:
    disk = situation.device("where")
    lost = "a new partition table; all that is on the disk is lost; it boots with BIOS and with UEFI then"
    whole = Choice(str(disk.path), f"the whole disk {disk.path}", [lost], _obstacle_to_whole(disk))
    return [whole, *(_root(one, situation) for one in _partitions(disk))]


def _root(part: drives.Device, situation: Situation) -> Choice:
    obstacle = _obstacle_to_root(part, situation)
    there = [] if obstacle else [f"with the system {one}, which ash manages" for one in install.systems_on(part)]
    return Choice(str(part.path), _described(part), there, obstacle)


def _drives(situation: Situation) -> list[Choice]:
    return [
        Choice(str(disk.path), str(disk), obstacle=_obstacle(drives.require_room_for_grub, disk))
        for disk in situation.disks
    ]


def _efi_partitions(situation: Situation) -> list[Choice]:
    choices = [
        Choice(str(one.path), str(one), obstacle=_obstacle(drives.require_free, one.path, one, install.MINIMUM_EFI))
        for one in situation.efi_partitions()
    ]
    if FIRMWARE.is_dir():
        return choices
    text = "then a new deployment that does not start heals itself only with GRUB 2.14"
    return [Choice("", "none", [text]), *choices]


MODES = {
    install.Mode.NEW: "new file systems",
    install.Mode.KEEP_EFI: "a new one for the root, and that of EFI is kept",
    install.Mode.ADD: "both are kept, and the system is added",
}


def _modes(situation: Situation) -> list[Choice]:
    return [_mode(mode, text, situation) for mode, text in MODES.items()]


def _mode(mode: install.Mode, text: str, situation: Situation) -> Choice:
    if mode is install.Mode.KEEP_EFI and not situation.given.get("efi"):
        return Choice(mode.value, text, obstacle="there is no EFI partition")
    if mode is install.Mode.ADD and not install.systems_on(situation.device("root")):
        return Choice(mode.value, text, obstacle=f"{situation.given['root']} has no system of ash")
    try:
        losses = situation.checks.place(situation.args(mode=mode.value))
    except (AshError, OSError) as error:
        return Choice(mode.value, text, obstacle=_reason(error))
    return Choice(mode.value, text, [f"{where}: {what}" for where, what in losses])


def _default_efi(situation: Situation) -> str:
    if not FIRMWARE.is_dir():
        return ""
    nearest = [str(one.path) for one in situation.device("where") if one.purpose in drives.EFI_TYPES]
    return nearest[0] if nearest else ""


Part = Literal["place", "settings", "source"]


@dataclass(frozen=True)
class Question:
    """A question of the form.

    Args:
        key: that of its option in the parser's result; the option says of which kind an answer is.
        part: which check an answer must pass.
        text: what is asked for, in a few words; {KEY} is the answer to another question.
        about: what a user should know to answer it.
        applies: whether it is asked.
        choices: the possible answers, if the option does not list them.
        default: what an empty answer stands for, if it is not the default of the option.
        optional: whether there may be no answer.
        secret: whether the answer is typed twice, unseen; the option takes a file with it in the first line.
        is_listed: whether the installer knows all valid answers.
    """

    key: str
    part: Part
    text: str
    about: str
    applies: Callable[[Situation], bool] = lambda _: True
    choices: Callable[[Situation], Sequence[Choice]] | None = None
    default: Callable[[Situation], str] | None = None
    optional: bool = False
    secret: bool = False
    is_listed: bool = False


# In the order in which they are asked; each may depend on those before. The keys of those without an option are known
# to Situation.args().
QUESTIONS = (
    Question(
        "where",
        "place",
        "Disk",
        "This installs a system that ash manages, on a disk of this machine. Nothing is written to a disk before all"
        " was shown once more, and you have typed the name of the disk or partition. Which disk is it?",
        choices=_disks,
    ),
    Question(
        "root",
        "place",
        "Place",
        "Where on {where} does the system go?",
        applies=lambda situation: bool(_partitions(situation.device("where"))),
        choices=_roots,
    ),
    Question(
        "drive",
        "place",
        "Boot disk",
        "From which disk does the BIOS start this machine? GRUB goes into its first sectors.",
        applies=lambda situation: situation.on_partition and not FIRMWARE.is_dir() and len(situation.disks) > 1,
        choices=_drives,
        default=lambda situation: str(situation.given["where"]),
    ),
    Question(
        "efi",
        "place",
        "EFI partition",
        "On which EFI partition are the boot loader for UEFI, and the notes about new deployments?",
        applies=lambda situation: situation.on_partition and any(situation.efi_partitions()),
        choices=_efi_partitions,
        default=_default_efi,
    ),
    Question(
        "mode",
        "place",
        "Mode",
        "What happens to the file systems that are there?",
        applies=lambda situation: situation.on_partition,
        choices=_modes,
    ),
    Question(
        "id",
        "place",
        "Id",
        "Tells the systems on one file system apart: the name of the distribution, such as debian, or debian_2.",
        applies=lambda situation: situation.is_added,
        default=Situation.free_id,
    ),
    Question(
        "name",
        "place",
        "Name",
        "What people see in the boot menus.",
        applies=lambda situation: situation.is_added,
        default=lambda situation: Identity.of(situation.given["id"]).name,
    ),
    Question("hostname", "settings", "Host name", "The name of the machine in its network."),
    Question(
        "user",
        "settings",
        "User",
        "The login name of one who may use sudo. Without a user, root logs in.",
        optional=True,
    ),
    Question(
        "password_file",
        "settings",
        "Password of {user}",
        "It is not shown while you type it.",
        applies=lambda situation: bool(situation.given["user"]),
        secret=True,
    ),
    Question(
        "group",
        "settings",
        "Groups of {user}",
        "More groups, separated by blanks. That of administrators is one anyway.",
        applies=lambda situation: bool(situation.given["user"]),
        optional=True,
        is_listed=True,
    ),
    Question(
        "root_password_file",
        "settings",
        "Password of root",
        "Without one, root cannot log in if there is a user; else root logs in on the console without a password.",
        optional=True,
        secret=True,
    ),
    Question(
        "ssh_key",
        "settings",
        "SSH key",
        "A file with public keys, such as /root/.ssh/id_ed25519.pub: the user, or else root, may log in with them. An"
        " ssh server is installed and started then.",
        optional=True,
    ),
    Question(
        "timezone",
        "settings",
        "Time zone",
        "Such as Europe/Berlin. If this machine has no list of them, it is installed on it.",
        is_listed=True,
    ),
    Question(
        "locale",
        "settings",
        "Locale",
        "Language and formats, such as de_DE.UTF-8. If this machine has no list of them, it is installed on it.",
        is_listed=True,
    ),
    Question(
        "keymap",
        "settings",
        "Keyboard",
        "A layout such as de, or with a variant de:nodeadkeys. If this machine has no list of them, it is installed on"
        " it.",
        is_listed=True,
    ),
    Question(
        "luks_passphrase_file",
        "settings",
        "Passphrase of the disk",
        "With one the disk is encrypted, and it is asked for at each start, on a US keyboard. Nobody can read the disk"
        " without it: not you either.",
        applies=lambda situation: not situation.is_added,
        optional=True,
        secret=True,
    ),
    Question(
        "home_size",
        "settings",
        "Size of /home",
        "Of a partition for /home, such as 100G. Without one, /home is a subvolume, and has all the free room.",
        applies=lambda situation: not situation.on_partition and not situation.given.get("luks_passphrase_file"),
        optional=True,
    ),
    Question(
        "swap",
        "settings",
        "Swap",
        "What the system swaps to: zram (compressed memory), the size of a file such as 2G, or a swap partition that is"
        " there; several are separated by blanks.",
        optional=True,
    ),
    Question(
        "profile",
        "settings",
        "Profiles",
        "Such as xfce: they are installed into snapshot 1, which the system starts. Several are separated by blanks.",
        optional=True,
        is_listed=True,
    ),
    Question("mutable", "settings", "Mutable", "Is snapshot 1 writable, so that the system is not immutable?"),
    Question(
        "package",
        "source",
        "More packages",
        "Separated by blanks. They are looked up in the repository at once, with tools that may have to be installed"
        " on this machine.",
        optional=True,
    ),
)


class Form:
    """Asks the questions, in any order that the user wants.

    Args:
        situation: at the beginning.
    """

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        self._answers: dict[str, Any] = {}  # also to questions that are asked again, or do not apply any more
        self._settled: set[str] = set()  # the keys of those that need not be asked
        self._descriptions: dict[str, str] = {}  # of what was chosen

    def fill(self) -> argparse.Namespace:
        """Ask all questions until the user is content. Returns the answers as the parser would."""
        while True:
            question = self._next()
            try:
                if question is not None:
                    self._settle(question, self._ask(question))
                elif again := self._review():
                    self._settled.discard(again)
                else:
                    return self._situation.args()
            except _Back:
                if self._situation.given:
                    self._settled.discard([*self._situation.given][-1])
                else:
                    _say("this is the first question")

    def _next(self) -> Question | None:
        """The first question that has to be asked; the answers before it become those that are given."""
        self._situation.given = {}
        for question in QUESTIONS:
            if question.applies(self._situation):
                if question.key not in self._settled:
                    return question
                self._situation.given[question.key] = self._answers[question.key]
        return None

    def _settle(self, question: Question, answer: object) -> None:
        """Keep an answer. Those about the place build on each other: the ones after it are asked for once more."""
        if question.part == "place":
            self._settled -= {one.key for one in QUESTIONS if one.part == "place"} - self._situation.given.keys()
        self._answers[question.key] = answer
        self._settled.add(question.key)

    def _ask(self, question: Question) -> object:
        """Ask one question, until the answer passes its check."""
        choices = self._choices(question)
        default = self._default(question, choices)
        about = question.about.format_map(self._situation.given)
        stuck = choices is not None and all(one.obstacle for one in choices)
        keys = "" if stuck else _keys(question, has_default=default is not None)
        _show(["", _rule(self._text(question)), *_wrapped(about), *_choice_lines(choices), *_wrapped(keys)])
        if stuck:
            if not self._situation.given:
                raise AshError("none of these can be used", "", REFUSED)
            _say("None of these can be chosen: the question before comes again.")
            raise _Back
        while True:
            try:
                if choices is not None:
                    answer = self._ask_choice(question, choices, default)
                elif question.secret:
                    answer = self._ask_secret(question, default)
                else:
                    answer = self._ask_text(question, default)
            except AshError as error:
                _say(_reason(error))
                continue
            if answer and (obstacle := _obstacle(self._check, question, answer)):
                _say(obstacle)
            else:
                return answer

    def _text(self, question: Question) -> str:
        return question.text.format_map(self._situation.given)

    def _check(self, question: Question, answer: object) -> None:
        """Raise AshError if an answer is wrong, given those before."""
        checks = self._situation.checks
        check = {"place": checks.place, "settings": checks.settings, "source": checks.everything}[question.part]
        check(self._situation.args(**{question.key: answer}))

    def _choices(self, question: Question) -> Sequence[Choice] | None:
        """The possible answers; None if any text may be one."""
        if question.choices is not None:
            return question.choices(self._situation)
        option = self._situation.options[question.key]
        values = NO_YES if option.nargs == 0 else option.choices
        return None if values is None else [Choice(value, value) for value in values]

    def _default(self, question: Question, choices: Sequence[Choice] | None) -> str | None:
        """What an empty answer stands for: what was answered before, if that is still possible."""
        usable = [choice.value for choice in choices or () if not choice.obstacle]
        if question.secret:
            return "as before" if self._answers.get(question.key) else "none" if question.optional else None
        if question.key in self._answers:
            before = _text_of(self._answers[question.key])
            if choices is None or before in usable:
                return before
        if question.default is not None:
            default = question.default(self._situation)
        else:
            option = self._situation.options.get(question.key)
            default = _text_of(option.default) if option else ""
        if choices is not None and default not in usable:
            return usable[0] if len(usable) == 1 else None
        return default

    def _ask_choice(self, question: Question, choices: Sequence[Choice], default: str | None) -> object:
        """An answer by its number, or as it is. AshError if it is none."""
        number = next((f" [{number}]" for number, one in enumerate(choices, 1) if one.value == default), "")
        text = _line(f"Number{number}:")
        by_number = {str(number): choice.value for number, choice in enumerate(choices, 1)}
        value = default if default is not None and not text else by_number.get(text, text)
        choice = next((one for one in choices if one.value == value), None)
        if choice is None:
            raise AshError("that is none of these numbers")
        if choice.obstacle:
            raise AshError(f"{choice.value} cannot be chosen: {choice.obstacle}")
        self._descriptions[question.key] = choice.text
        return self._converted(question, choice.value)

    def _ask_text(self, question: Question, default: str | None) -> object:
        """An answer in words. AshError if there is none, and has to be one."""
        while True:
            text = _line(f"{self._text(question)} [{default or 'none'}]:")
            if not question.is_listed or not text.startswith(LIST):
                break
            part = text.removeprefix(LIST).strip().lower()
            known = self._situation.checks.known(self._situation.args(), question.key)
            _show(_columns([name for name in known if part in name.lower()]) or ["none"])
        text = "" if question.optional and text == NONE else text or default or ""
        if not text and not question.optional:
            raise AshError("this needs an answer")
        return self._converted(question, text)

    def _converted(self, question: Question, text: str) -> object:
        """An answer as the parser would return it."""
        option = self._situation.options.get(question.key)
        if option is None:
            return text
        if option.nargs == "+":
            return text.split()
        if option.nargs == 0:
            return text == NO_YES[True]
        if not text:
            return None
        return _path(text) if option.type is Path else text

    def _ask_secret(self, question: Question, default: str | None) -> Path | None:
        """A file with a secret that was typed twice; the one of before if nothing is typed. AshError if it is wrong."""
        text = _hidden_line(f"{self._text(question)}{f' [{default}]' if default else ''}:")
        if question.optional and text == NONE:
            return None
        if not text and default:
            before: Path | None = self._answers.get(question.key)
            return before
        if not text:
            raise AshError("it is empty")
        if _hidden_line("The same again:") != text:
            raise AshError("they differ")
        return _in_memory(text)

    def _review(self) -> str:
        """Show all answers. Returns the key of the question that shall be asked again; empty if all are right."""
        keys = [*self._situation.given]
        texts = {question.key: self._text(question) for question in QUESTIONS if question.key in keys}
        column = max(map(len, texts.values())) + 2
        lines = ["", _rule("All answers")]
        for number, (key, text) in enumerate(texts.items(), 1):
            lines += _wrapped(self._shown(key), f"{number:3}  {text.ljust(column)}", ITEM + " " * column)
        _show([*lines, *_wrapped(f"(Enter goes on, a number changes that answer, {BACK} goes back, {LEAVE} leaves)")])
        while True:
            text = _line("Number [go on]:")
            if text in map(str, range(1, len(keys) + 1)):
                return keys[int(text) - 1]
            if text:
                _say("that is none of these numbers")
                continue
            _say("This is checked, with the repository too. It may take a minute.")
            obstacle = _obstacle(self._situation.checks.everything, self._situation.args())
            if not obstacle:
                return ""
            _say(obstacle)

    def _shown(self, key: str) -> str:
        """An answer, for people."""
        answer = self._situation.given[key]
        if answer and any(question.key == key and question.secret for question in QUESTIONS):
            return "set"
        return self._descriptions.get(key) or _text_of(answer) or "none"


def _keys(question: Question, *, has_default: bool) -> str:
    """What can be typed besides an answer."""
    words = ["Enter takes what is in brackets"] if has_default else []
    words += [f"{LIST} lists all, {LIST} and a part of a name those with it"] if question.is_listed else []
    words += [f"{NONE} is none"] if question.optional else []
    return f"({', '.join([*words, f'{BACK} goes back', f'{LEAVE} leaves'])})"


def _choice_lines(choices: Sequence[Choice] | None) -> list[str]:
    lines = []
    for number, choice in enumerate(choices or (), 1):
        lines += _wrapped(choice.text, f"{NONE if choice.obstacle else number:>3}  ", ITEM)
        for text in [*choice.details, *([f"not possible: {choice.obstacle}"] if choice.obstacle else [])]:
            lines += _wrapped(text, DETAIL, DETAIL)
    return lines


def _text_of(answer: object) -> str:
    """An answer as it would be typed."""
    if isinstance(answer, bool):
        return NO_YES[answer]
    return " ".join(map(str, answer)) if isinstance(answer, list) else str(answer or "")


def _path(text: str) -> Path:
    """A path, in which ~ is a home if there is such a user."""
    with contextlib.suppress(RuntimeError):
        return Path(text).expanduser()
    return Path(text)


def _in_memory(text: str) -> Path:
    """A file with a secret, as its option takes one; it is in no file system, and vanishes with this process."""
    file = os.memfd_create("secret")
    os.write(file, f"{text}\n".encode())
    return Path(f"/proc/{os.getpid()}/fd/{file}")


def ask(parser: argparse.ArgumentParser, checks: Checks) -> argparse.Namespace:
    """Ask for all that an installation on a disk needs. Returns what the parser would; nothing is changed.

    Args:
        parser: of the command line.
        checks: the installer's own.

    Raises:
        AshError: this machine cannot install (REFUSED), has no disk (MISSING), or the user leaves (REFUSED).
        EOFError: the input ended.
    """
    install.require_machine()
    situation = Situation(parser, checks)
    if not situation.disks:
        raise AshError("this machine has no disk", "an image needs none: see --help", MISSING)
    try:
        return Form(situation).fill()
    except _Leave:
        raise AshError("nothing was changed", "", REFUSED) from None


def offer_to_save(save: Callable[[Path], None]) -> None:
    """Ask for a file, and save the answers there, unless the user wants none.

    Args:
        save: writes a file; raises AshError if it cannot.
    """
    print("", _rule("Save the answers"), sep="\n")
    _say("Another machine takes them with --answers FILE. Passwords are saved as hashes.")
    with contextlib.suppress(_Back, _Leave, EOFError):
        while text := _line("File [none]:"):
            try:
                save(_path(text))
            except AshError as error:
                _say(_reason(error))
            else:
                return
