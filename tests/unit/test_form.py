# SPDX-License-Identifier: AGPL-3.0-or-later
"""The installer's form, on a real terminal: what it asks, the way back, and what it installs then."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from installer.cli import _make_parser, main
from installer.disk import BIOS_BOOT_TYPE, EFI_TYPE, LINUX_TYPE
from installer.form import QUESTIONS
from tests.support import CHECKOUT, MISSING, PYTHON, REFUSED, USAGE, Terminal

pytestmark = pytest.mark.budget(30)

GIB = 1 << 30
SCREENS = [(24, 80), (24, 40)]
ORDINARY = SCREENS[0]


def device(path: str, size: float, kind: str = "part", **more: Any) -> dict[str, Any]:
    """A device, as `lsblk --json` prints it."""
    keys = ("model", "fstype", "fsver", "label", "uuid", "pttype", "parttype", "partuuid")
    ordinary = {**dict.fromkeys(keys), "mountpoints": [None], "ro": False}
    return {"name": Path(path).name, "path": path, "type": kind, "size": int(size * GIB), **ordinary, **more}


WINDOWS = device(
    "/dev/sda",
    465.8,
    "disk",
    model="Samsung SSD 870 EVO 500GB",
    pttype="gpt",
    children=[
        device("/dev/sda1", 0.5, fstype="vfat", fsver="FAT32", parttype=EFI_TYPE.lower(), uuid="AAAA-0001"),
        device("/dev/sda2", 200, fstype="ntfs", label="Windows"),
        device("/dev/sda3", 265, fstype="btrfs", label="ash", parttype=LINUX_TYPE.lower(), uuid="b-1"),
        device("/dev/sda4", 0.001, parttype=BIOS_BOOT_TYPE.lower()),
    ],
)
LIVE = device(
    "/dev/sdb",
    14.9,
    "disk",
    model="Cruzer Blade",
    pttype="dos",
    children=[device("/dev/sdb1", 14.9, fstype="iso9660", label="Debian live", mountpoints=["/run/live", "/"])],
)
EMPTY = device("/dev/sdc", 32, "disk", model="QEMU HARDDISK")
SWAPPING = device(
    "/dev/sdd", 8, "disk", pttype="gpt", children=[device("/dev/sdd1", 8, fstype="swap", mountpoints=["[SWAP]"])]
)
SCENE: dict[str, Any] = {"disks": [WINDOWS, LIVE, EMPTY, SWAPPING], "systems": {"/dev/sda3": ["debian"]}}
ONE_DISK: dict[str, Any] = {"disks": [EMPTY], "systems": {}}


class Person:
    """Fills in the form on a terminal; keeps all that is on it."""

    def __init__(self, terminal: Terminal, scene: Path) -> None:
        self.terminal = terminal
        self.screen = ""
        self.longest = 0  # lines that came at once
        self._installed = scene.with_suffix(".installed")

    def see(self, pattern: str) -> str:
        """Wait for something on the terminal. Returns what came until then."""
        shown = self.terminal.expect(pattern).replace("\r\n", "\n")
        self.screen += shown
        self.longest = max(self.longest, shown.count("\n"))
        return shown

    def answer(self, prompt: str, text: str) -> str:
        """Answer the question whose prompt ends so. Returns what came before."""
        shown = self.see(re.escape(prompt) + r"(?:[^\n]*:)? \Z")
        self.terminal.type(f"{text}\n")
        return shown

    def answers(self, *pairs: tuple[str, str]) -> str:
        return "".join(self.answer(prompt, text) for prompt, text in pairs)

    def turn_pages(self, prompt: str) -> None:
        """Look at all pages of a screen, until a question is asked."""
        while self.see(rf"(s: skip\)|{re.escape(prompt)}[^\n]*:) \Z").endswith("skip) "):
            self.terminal.type("\n")

    def leaves(self, status: int = REFUSED) -> str:
        """The form ends, and nothing is installed. Returns the last of what it says."""
        shown = self.see(r"init\.py: [^\n]*\n")
        assert self.terminal.wait() == status
        assert not self._installed.exists()
        return shown

    def installs(self, name: str) -> dict[str, Any]:
        """Agree to what happens to a disk. Returns what is installed."""
        self.answers((f"Type {name} to go on", name), ("File", ""))
        assert self.terminal.wait() == 0
        told: dict[str, Any] = json.loads(self._installed.read_text())
        return told


Fill = Callable[..., AbstractContextManager[Person]]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """Opens the form on a terminal of a size, on the disks of a scene."""

    @contextmanager
    def start(scene: dict[str, Any] = ONE_DISK, size: tuple[int, int] = ORDINARY, **more: Any) -> Iterator[Person]:
        path = tmp_path / "scene.json"
        path.write_text(json.dumps({**scene, **more}))
        with Terminal([*PYTHON, str(CHECKOUT / "tests/unit/run_form.py"), str(path)], size) as terminal:
            yield Person(terminal, path)

    return start


TO_USER = (("Number", "1"), ("Host name", ""))
DISK = ("Passphrase of the disk", "Size of /home", "Swap")
FIRST_SNAPSHOT = ("Profiles", "Number", "More packages")
PROMPTS = ("Password of root", "SSH key", "Time zone", "Locale", "Keyboard", *DISK, *FIRST_SNAPSHOT)
FROM_ROOT_PASSWORD = tuple((prompt, "") for prompt in PROMPTS)
ON_PARTITION = tuple(pair for pair in FROM_ROOT_PASSWORD if pair[0] != DISK[1])
BESIDE_ANOTHER = tuple(pair for pair in ON_PARTITION if pair[0] != DISK[0])  # whose disk is encrypted, or not
REVIEW = "Number [go on]"


def test_enter_takes_what_is_in_brackets_and_installs_on_the_whole_disk(fill: Fill) -> None:
    with fill() as person:
        person.answers(("Number", ""), ("Host name", ""), ("User", ""), *FROM_ROOT_PASSWORD, (REVIEW, ""))
        told = person.installs("sdc")
    assert told["disk"] == "/dev/sdc"
    assert (told["hostname"], told["user"], told["timezone"], told["locale"]) == ("ash", None, "Etc/UTC", "C.UTF-8")
    assert (told["id"], told["packages"], told["password"], told["root_password"]) == ("debian", [], None, None)


def test_every_answer_arrives(fill: Fill, tmp_path: Path) -> None:
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f ada@host\n")
    with fill() as person:
        person.answers(("Number", "/dev/sdc"), ("Host name", "one.example"), ("User", "ada"))
        person.answers(("Password of ada", "s3cret"), ("The same again", "s3cret"), ("Groups of ada", "audio video"))
        person.answers(("Password of root", "r00t"), ("The same again", "r00t"), ("SSH key", str(key)))
        person.answers(("Time zone", "Europe/Berlin"), ("Locale", "C.UTF-8"), ("Keyboard", "us"))
        person.answers(("Passphrase of the disk", "c0rrect"), ("The same again", "c0rrect"), ("Swap", "zram 2G"))
        person.answers(("Profiles", "server"), ("Number", "2"))
        shown = person.answers(("More packages", "vim  git"), (REVIEW, ""))
        told = person.installs("sdc")
    assert re.search(r"Password of ada +set\n", shown)
    wanted = {
        "hostname": "one.example",
        "user": "ada",
        "password": "s3cret",
        "groups": ["audio", "video"],
        "root_password": "r00t",
        "ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f ada@host"],
        "timezone": "Europe/Berlin",
        "packages": ["vim", "git"],
        "passphrase": "c0rrect",
        "profiles": ["server"],
        "mutable": True,
    }
    assert {name: told[name] for name in wanted} == wanted
    assert "s3cret" not in told["argv"] + person.screen
    assert "size=2147483648" in told["swap"]
    assert "c0rrect" not in told["argv"] + person.screen
    assert "r00t" not in told["argv"] + person.screen


WRONG = [
    ("Host name", "a_b", "'a_b' is not a valid host name; letters, digits, inner hyphens"),
    ("User", "root", "the user name root is reserved for the system"),
    ("Groups of ada", "adio", "there is no group adio; did you mean audio"),
    ("SSH key", "/no/such.pub", "cannot read the ssh key in /no/such.pub"),
    ("Time zone", "Europe/Berln", "there is no timezone Europe/Berln; did you mean Europe/Berlin"),
    ("Time zone", "US/Eastern", "an old name; use America/New_York"),
    ("Locale", "C", "the locale C has no UTF-8"),
    ("Keyboard", "\x1b[A", "characters which cannot be printed"),
    ("Size of /home", "31G", "32.0 GiB, and 34.0 GiB are needed"),
    ("More packages", "vim nothere", "Debian stable has no package nothere"),
]
TO = (
    "Number",
    "Host name",
    "User",
    "Password of ada",
    "The same again",
    "Groups of ada",
    *(p for p, _ in FROM_ROOT_PASSWORD),
)
GOOD = {"User": "ada", "Password of ada": "x", "The same again": "x"}


def test_a_wrong_answer_is_explained_at_once_and_asked_for_again(fill: Fill) -> None:
    with fill() as person:
        for prompt in TO:
            for _, wrong, words in (one for one in WRONG if one[0] == prompt):
                person.answer(prompt, wrong)
                person.see(re.escape(words).replace("\\ ", r"\s+") + r"[^\n]*\n")
            person.answer(prompt, GOOD.get(prompt, ""))
        person.answer(REVIEW, "")
        assert person.installs("sdc")["user"] == "ada"


def test_a_password_is_typed_twice_unseen_and_may_be_kept(fill: Fill) -> None:
    with fill() as person:
        person.answers(*TO_USER, ("User", "ada"), ("Password of ada:", ""))
        assert "it is empty" in person.answer("Password of ada:", "f1rst")
        person.answer("The same again", "0ther")
        assert "they differ" in person.answer("Password of ada:", "f1rst")
        person.answers(("The same again", "f1rst"), ("Groups of ada", "<"), ("Password of ada [as before]", ""))
        person.answers(("Groups of ada", ""), ("Password of root [none]", "g0ne"), ("The same again", "g0ne"))
        person.answers(("SSH key", "<"), ("Password of root [as before]", "-"))
        person.answers(*FROM_ROOT_PASSWORD[1:], (REVIEW, ""))
        told = person.installs("sdc")
        assert (told["password"], told["root_password"]) == ("f1rst", None)
        assert not re.search("f1rst|0ther|g0ne", person.screen)


def test_the_way_back_leads_over_all_questions_and_keeps_their_answers(fill: Fill) -> None:
    with fill(SCENE) as person:
        person.answers(("Number", "1"), ("Number", "4"), ("Number", "1"), ("Number", "3"), ("Id", "debian_4"))
        person.answers(("Name", "Work"), ("Host name", "one"), ("User", "<"), ("Host name [one]", "<"))
        person.answers(("Name [Work]", "<"), ("Id [debian_4]", "<"), ("Number [3]", "<"), ("Number [1]", "<"))
        person.answers(("Number [4]", "<"), ("Number [1]", "<"))
        assert "this is the first question" in person.answers(("Number [1]", ""), ("Number [4]", ""))
        person.answers(("Number [1]", ""), ("Number [3]", ""), ("Id [debian_4]", ""), ("Name [Work]", ""))
        person.answers(("Host name [one]", ""), ("User", ""), *BESIDE_ANOTHER)
        shown = person.answer(REVIEW, "")
        assert re.search(r"Host name +one\n", shown)
        told = person.installs("sda3")
    wanted = {"root": "/dev/sda3", "drive": "/dev/sda", "efi": "/dev/sda1", "mode": "3"}
    assert {name: told[name] for name in wanted} == wanted
    assert (told["id"], told["name"], told["hostname"]) == ("debian_4", "Work", "one")


def test_the_review_leads_to_any_question_and_asks_what_comes_with_its_answer(fill: Fill) -> None:
    with fill() as person:
        person.answers(*TO_USER, ("User", ""), *FROM_ROOT_PASSWORD, (REVIEW, "99"))
        assert "that is none of these numbers" in person.answer(REVIEW, "3")
        # With a user there are his password and groups.
        person.answers(("User [none]", "ada"), ("Password of ada", "x"), ("The same again", "x"), ("Groups", "audio"))
        shown = person.answer(REVIEW, "3")
        assert re.search(r" 5  Groups of ada +audio\n", shown)
        # Without one, they do not count.
        person.answer("User [ada]", "-")
        assert "ada" not in person.answer(REVIEW, "<").partition("All answers")[2]
        person.answers(("More packages [none]", "vim"), (REVIEW, ""))
        told = person.installs("sdc")
    assert (told["user"], told["password"], told["groups"], told["packages"]) == (None, None, [], ["vim"])


def test_another_disk_asks_for_the_place_on_it(fill: Fill) -> None:
    with fill(SCENE) as person:
        person.answers(("Number", "3"), ("Host name", "one"), ("User", ""), *FROM_ROOT_PASSWORD, (REVIEW, "1"))
        person.answers(("Number [3]", "1"), ("Number:", "3"), ("Number [1]", ""))
        shown = person.answer("Number", "2")
        assert (
            '/dev/sda2 (200.0 GiB, ntfs, "Windows"): a new btrfs file system; all\n       that is on it is lost'
            in shown
        )
        person.answer(REVIEW, "")
        told = person.installs("sda2")
    assert (told["root"], told["efi"], told["mode"], told["hostname"]) == ("/dev/sda2", "/dev/sda1", "2", "one")


def test_another_partition_asks_again_what_happens_to_it(fill: Fill) -> None:
    with fill(SCENE) as person:
        person.answers(("Number", "1"), ("Number", "4"), ("Number", ""), ("Number", "3"), ("Id", ""), ("Name", ""))
        person.answers(("Host name", "one"), ("User", ""), *BESIDE_ANOTHER, (REVIEW, "2"))
        person.answers(("Number [4]", "3"), ("Number [1]", ""))
        assert "/dev/sda2 has no system of ash" in person.answer("Number", "3")
        assert "3 cannot be chosen" in person.answer("Number", "2")
        assert "debian_2" not in person.answers((DISK[0], ""), (REVIEW, ""))
        told = person.installs("sda2")
    assert (told["root"], told["mode"], told["id"], told["hostname"]) == ("/dev/sda2", "2", "debian", "one")


def test_what_cannot_be_used_is_shown_with_the_reason_and_cannot_be_chosen(fill: Fill) -> None:
    with fill(SCENE, busy="/dev/sda2") as person:
        shown = person.answer("Number", "2")
        assert "-  /dev/sdb (14.9 GiB, Cruzer Blade)\n" in shown
        assert "not possible: the running system is on /dev/sdb" in shown
        assert "/dev/sdd1 is used for swapping" in shown
        assert "/dev/sdb cannot be chosen" in person.answer("Number", "/dev/sdd")
        assert "/dev/sdd cannot be chosen" in person.answer("Number", "1")
        shown = person.answer("Number", "3")
        assert "not possible: /dev/sda2 is in use: Device or resource busy" in shown
        assert "not possible: it is an EFI partition" in shown
        assert "/dev/sda2 cannot be chosen" in person.answer("Number", "5")
        assert "/dev/sda4 cannot be chosen" in person.answer("Number", "q")
        assert "nothing was changed" in person.leaves()


def test_with_uefi_a_partition_needs_an_efi_partition(fill: Fill) -> None:
    parts = [device("/dev/sda1", 200, fstype="ext4")]
    alone = {"disks": [device("/dev/sda", 200, "disk", pttype="gpt", children=parts)], "systems": {}}
    with fill(alone) as person:
        person.answer("Number [1]", "")
        shown = person.answer("Number [1]", "2")
        assert "started with UEFI, and has no EFI partition that can be used" in " ".join(shown.split())
        assert "/dev/sda1 cannot be chosen" in person.answer("Number [1]", "")
        person.answer("Host name", "q")
        person.leaves()


def test_only_root_can_install(fill: Fill) -> None:
    with fill(root=False) as person:
        assert "only root can install on a disk" in person.leaves()


def test_a_machine_without_disks_is_no_place_to_install(fill: Fill) -> None:
    with fill(disks=[]) as person:
        assert "this machine has no disk" in person.leaves(MISSING)


def test_a_machine_without_a_usable_disk_is_told_why(fill: Fill) -> None:
    with fill(disks=[LIVE, SWAPPING]) as person:
        shown = person.leaves()
    assert shown.count("not possible") == 2
    assert "none of these can be used" in shown


def test_with_a_bios_the_disk_that_it_starts_is_asked_for(fill: Fill) -> None:
    with fill(SCENE, uefi=False) as person:
        person.answers(("Number", "1"), ("Number", "3"))
        shown = person.answer("Number [1]", "3")
        assert "not possible: /dev/sdc has no partition table" in shown
        assert "/dev/sdc cannot be chosen" in person.answer("Number", "")
        person.answer("Number [1]", "")  # no EFI partition
        assert "GRUB for the BIOS in\n       its first sectors" in person.answer("Number [1]", "")
        person.answers(("Host name", ""), ("User", ""), *ON_PARTITION, (REVIEW, ""))
        told = person.installs("sda2")
    assert (told["root"], told["drive"], told["efi"], told["mode"]) == ("/dev/sda2", "/dev/sda", "None", "1")


@pytest.mark.parametrize("size", SCREENS)
def test_no_line_is_longer_than_the_terminal_is_wide(fill: Fill, size: tuple[int, int]) -> None:
    with fill(SCENE, size) as person:
        for text in ("1", "4", "1", "3"):
            person.turn_pages("Number")
            person.terminal.type(f"{text}\n")
        person.answers(("Id", "debian"), ("Id", ""), ("debian_2)]", ""), ("Host name", "?"), ("Host name", ""))
        person.answers(("User", "ada"), ("Password of ada", "x"), ("The same again", "x"), ("Groups of ada", "? a"))
        person.answers(("Groups of ada", "audio"), ("Password of root", ""), ("SSH key", ""), ("Time zone", "?"))
        person.see(r"more, s: skip\) ")
        person.terminal.type("s\n")
        person.answers(("Time zone", ""), ("Locale", "C"), ("Locale", ""), ("Keyboard", ""), ("Swap", ""))
        person.answers(*((prompt, "") for prompt in FIRST_SNAPSHOT))
        person.turn_pages(REVIEW)
        assert max(map(len, person.screen.splitlines())) <= size[1]
        assert person.longest <= size[0]


def test_a_terminal_of_unknown_size_has_80_columns(fill: Fill) -> None:
    with fill(SCENE, (0, 0)) as person:
        assert max(map(len, person.answer("Number", "q").splitlines())) == 79


@pytest.mark.parametrize("steps", [(), *[TO_USER], (*TO_USER, ("User", "ada"))])
@pytest.mark.parametrize(
    ("key", "status", "words"),
    [
        ("q\n", REFUSED, "nothing was changed"),
        ("\x03", 130, "interrupted by SIGINT"),
        ("\x04", REFUSED, "the input has ended; nothing was changed"),
    ],
)
def test_q_ctrl_c_and_ctrl_d_leave_and_nothing_is_changed(
    fill: Fill, steps: tuple[tuple[str, str], ...], key: str, status: int, words: str
) -> None:
    with fill() as person:
        person.answers(*steps)
        person.see(r"(Number \[1\]|User \[none\]|Password of ada): ?")
        person.terminal.type(key)
        assert words in person.leaves(status)


def test_ctrl_d_is_no_agreement(fill: Fill) -> None:
    with fill() as person:
        person.answers(*TO_USER, ("User", ""), *FROM_ROOT_PASSWORD, (REVIEW, ""))
        person.see("Type sdc to go on: ")
        person.terminal.type("\x04")
        assert "the input has ended; nothing was changed" in person.leaves()


def test_a_terminal_that_hangs_up_ends_the_form(fill: Fill) -> None:
    with fill() as person:
        person.answers(*TO_USER)
        person.see("User")
        person.terminal.hang_up()
        assert person.terminal.wait() != 0


def test_answers_are_saved_afterwards(fill: Fill, tmp_path: Path) -> None:
    saved = tmp_path / "answers.toml"
    with fill() as person:
        person.answers(
            *TO_USER, ("User", "ada"), ("Password of ada", "x"), ("The same again", "x"), ("Groups", "audio")
        )
        person.answers(*FROM_ROOT_PASSWORD, (REVIEW, ""), ("Type sdc to go on", "sdc"), ("File [none]", "/no/such"))
        assert "there is no directory /no" in person.answer("File [none]", str(saved))
        assert person.terminal.wait() == 0
    lines = saved.read_text().splitlines()[1:]
    assert sorted(lines) == ['group = ["audio"]', 'id = "debian"', 'password-hash = "$y$theirs"', 'user = "ada"']


def test_what_is_no_text_is_asked_for_again(fill: Fill) -> None:
    with fill() as person:
        person.answer("Number", "")
        person.see("Host name \\[ash\\]: ")
        person.terminal.type_bytes("é\n".encode("latin-1"))
        assert "cannot be printed" in person.answer("Host name", "one")
        person.answer("User", "q")
        person.leaves()


def test_valid_names_are_listed_in_pages_or_by_a_part(fill: Fill) -> None:
    with fill() as person:
        person.answers(*TO_USER, ("User", ""), *FROM_ROOT_PASSWORD[:2], ("Time zone", "? BERL"))
        assert "\nEurope/Berlin\n" in person.answer("Time zone", "?")
        assert "Africa/Abidjan" in person.see(r"more, s: skip\) ")
        person.terminal.type("\n")
        assert "Africa/Abidjan" not in person.see(r"more, s: skip\) ")
        person.terminal.type("s\n")
        person.answer("Time zone", "? no such")
        assert "\nnone\n" in person.answer("Time zone", "q")


def test_every_question_has_an_option_or_names_a_part_of_the_place() -> None:
    options = {option.dest for option in _make_parser()._actions}
    assert [one.key for one in QUESTIONS if one.key not in options] == ["where", "root", "drive", "efi"]
    assert len({one.key for one in QUESTIONS}) == len(QUESTIONS)


def test_another_option_is_one_more_entry_in_the_table(fill: Fill) -> None:
    with fill(asked={"size": "Size", "no_prep": "Unprepared"}) as person:
        person.answers(*TO_USER, ("User", ""), *FROM_ROOT_PASSWORD, ("Size [8G]", "<"), ("More packages", ""))
        person.answers(("Size [8G]", "9G"), ("Number [1]", "yes"))
        assert re.search(r"Size +9G\n.*Unprepared +yes\n", person.answer(REVIEW, ""))
        told = person.installs("sdc")
    assert (told["size"], told["no_prep"]) == ("9G", True)


def test_without_a_terminal_the_command_line_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == USAGE
    assert "name what to make" in capsys.readouterr().err
