# SPDX-License-Identifier: AGPL-3.0-or-later
"""The installer: what it checks before it begins, and what it says."""

import os
import re
import shlex
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from ash import REFUSED, USAGE, AshError
from distros.debian import installer as debian
from distros.debian.installer import DebianInstaller
from installer import ashos, cli, drives, host, install
from installer.distribution import Password, Settings, Source, _old_timezones
from installer.swap import Swap

pytestmark = pytest.mark.budget(5)

MIRROR = "http://mirror.example/debian"
SECURITY = "http://updates.example/security"  # what stands for mmdebstrap's own default


@pytest.mark.parametrize("name", ["US/Eastern", "GB", "Asia/Calcutta"])
def test_an_old_name_of_a_timezone_is_refused_at_once(name: str) -> None:
    with pytest.raises(AshError, match="is an old name") as caught:
        DebianInstaller().check(Settings(timezone=name))
    today = {"US/Eastern": "America/New_York", "GB": "Europe/London", "Asia/Calcutta": "Asia/Kolkata"}
    assert caught.value.hint == f"use {today[name]}"


def test_a_host_without_lists_of_timezones_knows_no_old_names(tmp_path: Path) -> None:
    (tmp_path / "tzdata.zi").write_text("L America/New_York US/Eastern\nL Europe/Brussels Europe/Amsterdam\n")
    assert _old_timezones(tmp_path) == {}, "which of these are names of today is not known"
    (tmp_path / "zone.tab").write_text("#comment\nNL\t+5222+00454\tEurope/Amsterdam\n")
    assert _old_timezones(tmp_path) == {"US/Eastern": "America/New_York"}


@pytest.mark.parametrize("name", ["UTC", "Etc/UTC", "Etc/GMT+1", "Europe/Berlin", "Europe/Oslo", "America/New_York"])
def test_todays_timezones_are_accepted(name: str) -> None:
    DebianInstaller().check(Settings(timezone=name))


@pytest.mark.parametrize("name", ["C", "POSIX"])
def test_a_locale_without_utf8_is_refused_with_the_one_to_use(name: str) -> None:
    with pytest.raises(AshError) as caught:
        DebianInstaller().check(Settings(locale=name))
    assert (caught.value.hint, caught.value.status) == ("use C.UTF-8", USAGE)


@pytest.mark.parametrize(
    ("there", "security"),
    [
        ({"trixie-updates", "trixie-security"}, f"{MIRROR}-security"),
        ({"trixie-updates"}, SECURITY),
    ],
)
def test_a_mirror_has_the_suites_of_the_release(
    monkeypatch: pytest.MonkeyPatch, there: set[str], security: str
) -> None:
    monkeypatch.setattr(debian, "_debians_own", lambda _: (SECURITY,))
    monkeypatch.setattr(debian, "_has_suite", lambda url, suite: url == SECURITY or suite in there)
    source = Source("trixie", mirror=MIRROR)
    suites = [f"{MIRROR} trixie", f"{MIRROR} trixie-updates", f"{security} trixie-security"]
    lines = [f"deb [signed-by={debian.KEYRING}] {suite} main non-free-firmware" for suite in suites]
    assert debian._where(source, Path("/root")) == ["trixie", "/root", *lines]


@pytest.mark.skipif(shutil.which("mmdebstrap") is None or os.geteuid() != 0, reason="needs mmdebstrap, and root")
def test_mmdebstrap_says_where_the_security_updates_are() -> None:
    (url,) = debian._debians_own("trixie-security")
    assert re.fullmatch(r"https?://\S+-security", url)
    assert debian._debians_own("sid-security") == ()


def test_a_mirror_without_updates_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_debians_own", lambda _: ())
    monkeypatch.setattr(debian, "_has_suite", lambda *_: False)
    assert len(debian._where(Source("trixie", mirror=MIRROR), Path("/root"))) == 3
    monkeypatch.setattr(debian, "_has_suite", lambda *_: True)
    assert len(debian._where(Source("sid", mirror=MIRROR), Path("/root"))) == 3
    assert debian._where(Source("trixie"), Path("/root")) == ["trixie", "/root"]


def test_the_last_lines_can_be_pasted_into_a_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my disk.img"
    path.touch()
    monkeypatch.setattr(install, "make_image", lambda *_, **__: install.Made(path, "Debian", path))
    assert cli.main(["--image", str(path)]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [words[2:] for words in commands] == [["boot", str(path)], ["try", str(path)]]


THEIRS = f"$y$j9T$salt${'b' * 43}"


class Answered:
    """Runs the installer's command line, and keeps what it would install."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.file = directory / "install.toml"
        self.saved = directory / "saved.toml"
        self.image = directory / "disk.img"
        self.image.touch()
        self.new: list[install.Installation] = []

        def make_image(path: Path, _: int, new: install.Installation, **__: object) -> install.Made:
            new.hashes = {"ada": THEIRS, "root": ""}
            self.new.append(new)
            return install.Made(path, "Debian", path)

        monkeypatch.setattr(install, "make_image", make_image)

    def run(self, text: str, *words: str | Path) -> int:
        self.file.write_text(text)
        return cli.main(["--image", str(self.image), "--answers", str(self.file), *map(str, words)])


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answered:
    return Answered(monkeypatch, tmp_path)


HASH = f"$6$salt${'a' * 86}"
ANSWERS = """\
id = "debian_2"
user = "ada"
group = ["audio", "video"]
password-hash = "HASH"
hostname = "one"
timezone = "Europe/Berlin"
swap = ["zram", "2G"]
compress = "lzo"
profile = ["server"]
mutable = true
discard = false
""".replace("HASH", HASH)


def test_answers_come_from_a_file_and_options_override_them(answered: Answered) -> None:
    assert answered.run(ANSWERS, "--hostname", "two", "--save-answers", answered.saved) == 0
    (new,) = answered.new
    assert (new.identity.id, new.identity.module, new.identity.name) == (
        "debian_2",
        "debian",
        "Debian GNU/Linux (debian_2)",
    )
    settings = new.settings
    assert (settings.user, settings.groups, settings.hostname) == ("ada", ("audio", "video"), "two")
    assert settings.password == Password(HASH, is_hash=True)
    assert (settings.swap, settings.compression) == (Swap(zram=True, size=2 << 30), "lzo")
    assert (settings.profiles, settings.mutable, settings.discard) == (("server",), True, False)
    assert stat.S_IMODE(answered.saved.stat().st_mode) == 0o600
    saved = answered.saved.read_text()
    assert f'password-hash = "{THEIRS}"' in saved, "as the new system has it"
    assert "root-password-hash" not in saved
    assert "mutable = true\n" in saved
    assert "discard" not in saved, "that is the default"
    assert answered.run(saved) == 0
    again = answered.new[1]
    assert again.settings == replace(settings, password=Password(THEIRS, is_hash=True))
    assert again.identity == new.identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('host-name = "x"', "did you mean hostname?"),
        ("hostname = 1", "hostname is not a string"),
        ('group = "audio"', "group is not a list of strings"),
        ('mode = "4"', "mode is not one of 1, 2, 3"),
        ("hostname =", "cannot read the answers"),
        ('yes = "x"', "unknown key yes"),
        ('user = "ada"', "has no password"),
        ('user = "root"', "reserved"),
        ("mode = 3", 'such as mode = "1"'),
        ('id = ""', "not a valid id"),
        ('password-hash = "$6$x$y"', "no user"),
        ('id = "Debian"', "not a valid id"),
        ('id = "arch"', "ash cannot install arch"),
        ('name = "a\\nb"', "not a valid name"),
        ('mutable = "yes"', "such as mutable = true"),
        ("discard = 1", "discard is not true or false"),
        ('compress = "lz4"', "compress is not one of zstd, lzo, zlib, none"),
        ('network = "wicked"', "network is not one of dhcp, networkmanager"),
        ('swap = "zram"', "swap is not a list of strings"),
        ('swap = ["big"]', "big is neither zram, a size, nor a device"),
        ('swap = ["/dev/sdb2"]', "for a system on a disk of this machine"),
        ('profile = ["gnom"]', "profiles: gnome, i3"),
    ],
)
def test_wrong_answers_are_refused_with_a_line(
    answered: Answered, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert answered.run(text) == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not answered.new


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--disk /dev/sda --keep-filesystem", "is for partitions"),
        ("--image disk.img --keep-filesystem", "is for partitions"),
        ("/dev/sda2 /dev/sda --mode 3 --keep-filesystem", "keeps the file system anyway"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert cli.main(words.split()) == USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(ssh_keys=("-----BEGIN OPENSSH PRIVATE KEY-----",)), "no public key"),
        (Settings(groups=("audio",)), "no user"),
        (Settings(user="ada", groups=("adio",)), "no group adio"),
        (Settings(ssh_keys=("ssh-rsa AAAA",)), "no public key"),
        (Settings(user="ada", password=Password("secret", is_hash=True)), "hash"),
        (Settings(user="ada", password=Password("$6$abc$def", is_hash=True)), "hash"),
        (Settings(user="ada", password=Password("x" * 600)), "longer than 500 bytes"),
        (Settings(root_password=Password("a\0b")), "control character"),
    ],
)
def test_wrong_settings_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(AshError, match=message) as caught:
        DebianInstaller().check(settings)
    assert caught.value.status == USAGE
    assert caught.value.hint


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--disk", "/dev/vda", "--mode", "3"], "--mode 3 keeps what is on partitions, and --disk keeps nothing"),
        (["--disk", "/dev/vda", "--mode", "2"], "--mode 2 keeps"),
        (["remove", "debian_2", "/dev/vda2"], "`remove` comes first"),
        (["--disk", "/dev/vda", "--force"], "--force replaces a file"),
        (["--image", "same.tar", "--rootfs", "./same.tar"], "--rootfs is the file that is to be made"),
        (["--image", "a.img", "--save-answers", "./a.img"], "is a file that this installation reads or makes"),
        (["--image", "a.img", "--rootfs", "r.tar", "--save-answers", "r.tar"], "reads or makes"),
        (["--image", "a.img", "--ssh-key", "/dev/null"], "has no ssh key"),
        (["--image", "a.img", "--size", "99999999T"], "99999999T are too many"),
    ],
)
def test_what_would_replace_something_else_or_has_no_effect_is_refused(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--yes", *words]) == USAGE
    assert error in capsys.readouterr().err


def test_saved_answers_replace_only_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes"
    notes.write_text("mine\n")
    assert cli.main(["--image", str(tmp_path / "a.img"), "--save-answers", str(notes)]) == REFUSED
    assert "has no answers of the installer" in capsys.readouterr().err
    assert notes.read_text() == "mine\n"


@pytest.mark.parametrize(
    "text",
    [
        f"$y$j9T$saltsaltsaltsalt${'a' * 43}",
        f"$gy$j9T$salt${'a' * 43}",
        f"$6$rounds=5000$salt${'a' * 86}",
        f"$5$salt${'a' * 43}",
        f"$2b$05${'a' * 53}",
        f"$1$salt${'a' * 22}",
    ],
)
def test_hashes_of_crypt_are_accepted(text: str) -> None:
    DebianInstaller().check(Settings(user="ada", password=Password(text, is_hash=True)))


def test_an_encrypted_partition_that_is_open_is_named_with_the_way_to_close_it() -> None:
    found = dict.fromkeys(("model", "fstype", "fsver", "label", "uuid", "parttype", "partuuid", "pttype"))
    plain = {**found, "size": 1 << 33, "mountpoints": [None], "ro": False}
    opened = {**plain, "path": "/dev/mapper/luks-1", "type": "crypt"}
    part = drives.Device.of({**plain, "path": "/dev/null", "type": "part", "children": [opened]})
    with pytest.raises(AshError) as caught:
        drives.require_free(Path("/dev/null"), part, 0)
    assert caught.value.hint == "cryptsetup close luks-1 stops that"


def test_usual_public_keys_are_accepted() -> None:
    keys = (
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f ada@host",
        "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAoAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJw==",
        "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f x y",
    )
    DebianInstaller().check(Settings(ssh_keys=keys))


def test_the_log_of_a_build_is_its_owners_alone(tmp_path: Path) -> None:
    old, new = tmp_path / "old.log", tmp_path / "new.log"
    old.touch(mode=0o644)
    for path in (old, new):
        with host.Log(path) as log:
            log.write("a step")
        assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o600, "a step\n")


def test_grub_has_room_before_a_first_partition_that_is_not_there_yet() -> None:
    found = dict.fromkeys(("model", "fstype", "fsver", "label", "uuid", "parttype", "partuuid"))
    plain = {"path": "/dev/sda", "type": "disk", "size": 1 << 32, "mountpoints": [None], "ro": False}
    drives.require_room_for_grub(drives.Device.of({**found, **plain, "pttype": "dos"}))
    with pytest.raises(AshError, match="has no partition table"):
        drives.require_room_for_grub(drives.Device.of({**found, **plain, "pttype": None}))


def test_the_valid_values_of_a_setting_are_those_that_pass_its_check() -> None:
    installer = DebianInstaller()
    assert {"Europe/Berlin", "UTC"} <= set(installer.known("timezone"))
    assert not {"US/Eastern", "posix/UTC"} & set(installer.known("timezone"))
    assert "de_DE.UTF-8" in installer.known("locale")
    assert {"de", "de:nodeadkeys"} <= set(installer.known("keymap"))
    assert "audio" in installer.known("group")


def test_an_image_in_another_format_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(b"QFI\xfb" + bytes(512))
    assert cli.main(["boot", str(image)]) == USAGE
    assert "qemu-img convert -O raw" in capsys.readouterr().err


def test_a_system_of_ashos_is_taken_out_of_its_list_of_boot_numbers() -> None:
    text = "DISTRO,BootOrder\narch,0002\n0005\nfedora,0003\n"
    assert ashos.without(text, "arch") == "DISTRO,BootOrder\nfedora,0003\n"
    assert ashos.without(text, "fedora") == "DISTRO,BootOrder\narch,0002\n0005\n"
    assert ashos.without(text, "arc") == text
