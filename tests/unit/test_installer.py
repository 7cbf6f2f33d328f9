# SPDX-License-Identifier: AGPL-3.0-or-later
"""The installer: what it checks before it begins, and what it says."""

import os
import re
import shlex
import shutil
import stat
from pathlib import Path

import pytest

from ash import USAGE, AshError
from distros.debian import installer as debian
from distros.debian.installer import DebianInstaller
from installer import cli, host, install
from installer.distribution import Settings, Source, _old_timezones

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


def test_the_log_of_a_build_is_its_owners_alone(tmp_path: Path) -> None:
    old, new = tmp_path / "old.log", tmp_path / "new.log"
    old.touch(mode=0o644)
    for path in (old, new):
        with host.Log(path) as log:
            log.write("a step")
        assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (0o600, "a step\n")


def test_an_image_in_another_format_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(b"QFI\xfb" + bytes(512))
    assert cli.main(["boot", str(image)]) == USAGE
    assert "qemu-img convert -O raw" in capsys.readouterr().err
