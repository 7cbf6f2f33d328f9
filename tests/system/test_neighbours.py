# SPDX-License-Identifier: AGPL-3.0-or-later
"""Several systems on one file system: one is added, and removed, and the others are as they were."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ash import AshError, Layout
from installer import neighbours
from tests.support import CHECKOUT, DONE, LOCKED, MISSING, REFUSED, USAGE, Disk, Outcome, init, program, wait_until

pytestmark = [pytest.mark.system, pytest.mark.budget(120)]

SECOND = "debian_2"


class Pair(Disk):
    """A disk image with one system or two."""

    def __init__(self, image: Path, rootfs: Path) -> None:
        super().__init__(image)
        self.rootfs = rootfs

    def init(self, *words: str | Path, status: int = DONE) -> Outcome:
        """Run the installer, and assert its exit status."""
        return init(*words, status=status)

    def adding(self, ident: str = SECOND) -> Sequence[str | Path]:
        """The installer's words that add a system."""
        return ["--image", self.image, "--mode", "3", "--id", ident, "--rootfs", self.rootfs]

    def add(self, ident: str = SECOND, *options: str | Path, status: int = DONE) -> Outcome:
        return self.init(*self.adding(ident), *options, status=status)

    def remove(self, ident: str, *options: str, status: int = DONE) -> Outcome:
        return self.init("remove", ident, self.image, "--yes", *options, status=status)

    def of(self, ident: str, *words: str | int, status: int = DONE) -> Outcome:
        """Run ash on one of the systems."""
        return self.ash("--distro", ident, *words, status=status)

    def volumes(self) -> dict[str, str]:
        """The subvolumes of the file system, by path, with their ids."""
        with self.files() as files:
            found = program("btrfs", "subvolume", "list", files.top)
        return {path: ident for ident, path in re.findall(r"^ID (\d+) .* path (.*)$", found, re.MULTILINE)}

    def efi(self, *command: str) -> str:
        """The output of a program of mtools on the EFI partition."""
        return program(command[0], "-i", self.drive, *command[1:])

    def efi_files(self) -> list[str]:
        """The paths of all files and directories on the EFI partition, but for its own root."""
        return sorted(line for line in self.efi("mdir", "-b", "-/", "::").splitlines() if line != "::/")

    def loaders(self) -> tuple[bytes, list[str]]:
        """GRUB for the BIOS, and the list of the boot loaders for UEFI."""
        return self.outside_of_btrfs()[: 2 << 20], sorted(self.efi("mdir", "-b", "-/", "::EFI").splitlines())

    def is_alone(self, before: dict[str, str]) -> None:
        """Assert that the first system is as it was, and there is no other one."""
        assert self.volumes() == before
        assert self.ash("fsck").stdout.strip() == "no problems found"
        assert self.ash("dist").stdout.split() == ["debian"]


@pytest.fixture
def pair(disk: Disk, rootfs: Path) -> Pair:
    """A private copy of the image, with one system."""
    return Pair(disk.image, rootfs)


def others_in_menu(pair: Pair, ident: str, directory: Path) -> list[str]:
    """The other systems that GRUB itself, as a program, finds while it reads the menu of a system."""
    with pair.files() as files:
        text = (files.top / f"@boot_{ident}/grub/grub.cfg").read_text()
        commands = text[text.index("insmod regexp") :].partition("\ndone")[0]
        shown = re.sub(r"menuentry .*?\n        \}", 'echo "<$ash_system>"', commands, flags=re.DOTALL)
        there = shown.replace("/@boot", f"{files.top}/@boot")  # the program has the root of this machine
        (directory / "grub.cfg").write_text(f"set root=host\n{there}\ndone\nexit\n")
        return re.findall("<(.*?)>", program("grub-emu", "-d", directory, "-r", "host", input=""))


def test_a_system_is_added_and_removed(pair: Pair, tmp_path: Path) -> None:
    first = pair.volumes()
    assert others_in_menu(pair, "debian", tmp_path) == []
    (tmp_path / "password").write_text("secret\n")
    user: list[str | Path] = ["--user", "ada", "--group", "audio", "--password-file", tmp_path / "password"]
    pair.add(SECOND, *user, "--hostname", "two", "--save-answers", tmp_path / "answers")
    with pair.files() as files:
        home = files.top / f"@home_{SECOND}/ada"
        etc = files.top / f"@.snapshots_{SECOND}/rootfs/snapshot-0/etc"
        assert (home.stat().st_uid, (etc / "hostname").read_text()) == (1000, "two\n")
        assert re.search(r"^audio:.*\bada$", (etc / "group").read_text(), re.MULTILINE)
        (hashed,) = re.findall(r"^ada:([^:]+):", (etc / "shadow").read_text(), re.MULTILINE)
    assert f'password-hash = "{hashed}"' in (tmp_path / "answers").read_text()
    assert "secret" not in pair.image.with_name("disk.img.log").read_text()
    assert first.items() <= pair.volumes().items()
    for ident, other in (("debian", SECOND), (SECOND, "debian")):
        assert pair.of(ident, "fsck").stdout.strip() == "no problems found"
        assert pair.of(ident, "dist").stdout.split() == ["debian", SECOND]
        assert others_in_menu(pair, ident, tmp_path) == [other]
    assert "debian_2" in pair.efi("mtype", f"::EFI/{SECOND}/ash.cfg")
    assert "@boot_debian/" in pair.efi("mtype", "::EFI/debian/grub.cfg")
    pair.of(SECOND, "clone", 0)
    pair.of(SECOND, "deploy", 1)
    assert "there is a system debian_2" in pair.add(status=REFUSED).stderr

    pair.remove(SECOND)
    assert SECOND not in pair.efi("mdir", "-b", "-/", "::")
    pair.is_alone(first)


def test_the_first_system_may_go_too(pair: Pair) -> None:
    pair.add()
    assert "several distributions" in pair.ash("tree", status=USAGE).error
    assert pair.ash("dist").stdout.split() == ["debian", SECOND]
    second = {path: ident for path, ident in pair.volumes().items() if SECOND in path}
    pair.remove("debian")
    assert pair.volumes() == second
    stub = pair.efi("mtype", "::EFI/debian/grub.cfg")
    assert f"@boot_{SECOND}/" in stub
    assert "@boot_debian/" not in stub
    assert pair.ash("fsck").stdout.strip() == "no problems found"
    assert "the last system" in pair.remove(SECOND, status=REFUSED).stderr
    pair.remove(SECOND, "--last")
    assert not pair.volumes()
    assert pair.efi_files() == ["::/EFI/"], "also what the firmware starts without an entry, and the shared stub"


@pytest.mark.parametrize(
    ("replaced", "stays"), [("EFI/BOOT/grubx64.efi", "::/EFI/BOOT/"), ("EFI/debian/grub.cfg", "::/EFI/")]
)
def test_the_boot_loader_of_another_disk_stays(pair: Pair, tmp_path: Path, replaced: str, stays: str) -> None:
    other = tmp_path / "other"
    other.write_text("search.fs_uuid 1234 root\nset prefix=($root)'/@boot_debian/grub'\n")
    program("mcopy", "-o", "-i", pair.drive, other, f"::{replaced}")
    before = pair.efi_files()
    pair.remove("debian", "--last")
    assert pair.efi_files() == [file for file in before if file == "::/EFI/" or file.startswith(stays)]


def test_an_interrupted_removal_of_the_boot_loader_is_continued(pair: Pair) -> None:
    pair.efi("mdel", "::EFI/BOOT/grubx64.efi")
    pair.remove("debian", "--last")
    assert pair.efi_files() == ["::/EFI/"]


def test_a_wrong_request_changes_nothing(pair: Pair) -> None:
    before = pair.image.stat().st_mtime_ns
    pair.add("debian", status=REFUSED)
    pair.add("Debian 2", status=USAGE)
    pair.add("arch", status=USAGE)
    pair.remove("nobody", status=MISSING)
    pair.remove("debian", status=REFUSED)
    pair.init(*pair.adding(), "--mode", "2", status=USAGE)
    pair.init(*pair.adding(), "--dry-run", status=USAGE)
    assert "nothing was changed" in pair.init("remove", "debian", pair.image, "--last", "--dry-run").stdout.lower()
    assert pair.image.stat().st_mtime_ns == before


def killed(pair: Pair, step: str, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to the installer at a step. Returns its status, and what it has said."""
    argv = [sys.executable, str(CHECKOUT / "init.py"), *map(str, pair.adding())]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        log = pair.image.with_name("disk.img.log")
        wait_until(lambda: log.is_file() and f"== {step}" in log.read_text())
        process.send_signal(number)
        said = process.stdout.read().decode()
    wait_until(lambda: not pair.attached())
    return process.returncode, said


def test_an_image_that_another_ash_works_on_is_refused(pair: Pair) -> None:
    number = pair.clone()
    process = pair.start("run", number, "sleep", "4731")
    try:
        wait_until(pair.attached)
        assert "another program works on" in pair.add(status=LOCKED).stderr
        pair.remove("debian", "--last", status=LOCKED)
        pair.init("rescue", pair.image, "--boot-loader", "debian", status=LOCKED)
        assert "another program works on" in pair.init("boot", pair.image, status=LOCKED).stderr
    finally:
        process.terminate()
        process.wait()
    assert pair.ash("fsck").stdout.strip() == "no problems found"


def test_a_killed_installation_of_the_boot_loader_is_continued(pair: Pair) -> None:
    killed(pair, "Installing the boot loaders", signal.SIGKILL)
    assert pair.ash("dist").stdout.splitlines() == ["debian", "debian_2  not complete"]
    assert pair.ash("fsck").stdout.strip() == "no problems found"
    pair.add()
    assert "Unpacking" not in pair.image.with_name("disk.img.log").read_text(), "only the boot loader was missing"
    assert pair.of(SECOND, "fsck").stdout.strip() == "no problems found"
    assert f"@boot_{SECOND}/" in pair.efi("mtype", f"::EFI/{SECOND}/ash.cfg")


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, "Making snapshot 0"), (signal.SIGKILL, "Unpacking")])
def test_a_second_installation_that_fails_leaves_the_first_one(pair: Pair, number: signal.Signals, step: str) -> None:
    first, loaders = pair.volumes(), pair.loaders()
    status, said = killed(pair, step, number)
    if number == signal.SIGINT:
        assert status == 128 + number
        assert "the other systems are as they were" in said
        pair.is_alone(first)
    assert pair.ash("fsck").stdout.strip() == "no problems found"
    assert pair.loaders() == loaders
    pair.add()
    assert pair.of(SECOND, "fsck").stdout.strip() == "no problems found"
    assert pair.of("debian", "fsck").stdout.strip() == "no problems found"


def test_an_incomplete_system_gets_no_boot_loader(pair: Pair) -> None:
    killed(pair, "Configuring", signal.SIGKILL)
    loaders = pair.loaders()
    error = pair.init("rescue", pair.image, "--boot-loader", SECOND, status=REFUSED).stderr
    assert "debian_2 is not complete: it could not be started" in error
    assert pair.loaders() == loaders
    pair.remove(SECOND)


def test_a_removal_that_has_begun_is_noted(pair: Pair) -> None:
    with pair.files() as files:
        layout = Layout.at(files.top, "debian")
        with pytest.raises(AshError), neighbours.begun_to_remove(layout):
            raise AshError("the EFI partition is full")
        assert layout.is_complete
        with pytest.raises(KeyboardInterrupt), neighbours.begun_to_remove(layout):
            raise KeyboardInterrupt
        assert not layout.is_complete
    assert "not complete" in pair.init("rescue", pair.image).stdout
    pair.remove("debian", "--last")
    assert not pair.volumes()


def test_symlinks_of_a_given_root_do_not_lead_out_of_it(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "new/etc/default").mkdir(parents=True)
    names = [f"./etc/{name}" for name in ("hostname", "hosts", "fstab", "machine-id", "default/grub")]
    for name in names:
        (tmp_path / "new" / name).symlink_to(tmp_path / Path(name).name)
    tar = tmp_path / "root.tar"
    program("cp", "--sparse=always", "--reflink=auto", pair.rootfs, tar)
    program("tar", "--append", "--file", tar, "--directory", tmp_path / "new", *names)
    Pair(pair.image, tar).add(SECOND, "--hostname", "two")
    assert {path.name for path in tmp_path.iterdir()} == {"disk.img", "disk.img.log", "new", "root.tar"}
    with pair.files() as files:
        etc = files.top / f"@.snapshots_{SECOND}/rootfs/snapshot-0/etc"
        assert os.readlink(etc / "default/locale") == "../locale.conf", "Debian's own ones are followed"
        assert (etc / "locale.conf").read_text() == "LANG=C.UTF-8\n"


def test_a_boot_loader_is_repaired(pair: Pair) -> None:
    before = pair.loaders()
    pair.efi("mdeltree", "::EFI/debian", "::EFI/BOOT")
    with pair.image.open("rb+") as image:
        image.write(bytes(440))  # the code in the boot sector
        image.seek(1 << 20)
        image.write(bytes(1 << 20))  # GRUB's core image
    shown = pair.init("rescue", pair.image).stdout
    assert "debian: Debian GNU/Linux" in shown
    assert "0*- base snapshot" in shown
    pair.init("rescue", pair.image, "--boot-loader", "nobody", status=MISSING)
    pair.init("rescue", pair.image, "--boot-loader", "debian")
    assert pair.loaders() == before
    assert pair.ash("fsck").stdout.strip() == "no problems found"


def test_a_rescue_shell_works_on_the_disk(pair: Pair) -> None:
    argv = [sys.executable, str(CHECKOUT / "init.py"), "rescue", str(pair.image), "--shell"]
    typed = "ash -q clone 0\nash desc 1 by hand\nexit 7\n"
    ended = subprocess.run(argv, input=typed, capture_output=True, text=True, check=False)
    assert ended.returncode == 7, ended
    assert "by hand" in pair.ash("tree").stdout
    assert not pair.attached()
