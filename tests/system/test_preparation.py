# SPDX-License-Identifier: AGPL-3.0-or-later
"""An installation from a repository that this machine cannot reach, or whose signature it cannot verify."""

import hashlib
import os
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import pytest

from ash import AshError
from distros.debian import installer as debian
from installer import host
from installer.distribution import Identity, Settings, Source
from installer.preparation import PreparedInstallation
from tests.archive import Archive
from tests.support import program

pytestmark = [pytest.mark.system, pytest.mark.budget(30)]

RELEASE = "sid"  # it has no other suites that belong to it


class SignedArchive(Archive):
    """A repository with a release of Debian that has no packages, signed with a key of its own."""

    def __init__(self, directory: Path, keys: Path) -> None:
        super().__init__(directory)
        keys.mkdir(mode=0o700)
        self._keys = keys
        self._gpg("--quick-gen-key", "nobody@localhost", "rsa2048", "sign")
        self._sign()

    def _gpg(self, *words: str | Path) -> None:
        program("gpg", "--homedir", self._keys, "--batch", "--quiet", "--passphrase", "", *words)
        program("gpgconf", "--homedir", self._keys, "--kill", "all")

    def _sign(self) -> None:
        suite = self.directory / "dists" / RELEASE
        index = "main/binary-amd64/Packages"
        (suite / index).parent.mkdir(parents=True)
        (suite / index).touch()
        date = format_datetime(datetime.now(UTC)).replace("+0000", "UTC")
        fields = {"Origin": "Debian", "Suite": RELEASE, "Codename": RELEASE, "Date": date, "Architectures": "amd64"}
        lines = [f"{name}: {value}" for name, value in {**fields, "Components": "main non-free-firmware"}.items()]
        lines += ["SHA256:", f" {hashlib.sha256(b'').hexdigest()} 0 {index}", ""]
        (suite / "Release").write_text("\n".join(lines))
        self._gpg("--clearsign", "--output", suite / "InRelease", suite / "Release")

    def export(self, keyring: Path) -> None:
        """Replace a keyring by one with the key of the repository."""
        keyring.unlink(missing_ok=True)
        self._gpg("--output", keyring, "--export")
        keyring.chmod(0o644)


def installation(mirror: str) -> PreparedInstallation:
    return PreparedInstallation(Source(RELEASE, mirror=mirror), Settings(), Identity.of("debian"), changes=True)


def test_a_repository_that_cannot_be_reached_is_named_in_a_line() -> None:
    with pytest.raises(AshError, match=r"the repository cannot be reached: .*127\.0\.0\.1") as caught:
        installation("http://127.0.0.1:9/debian").check({})
    assert caught.value.hint == "check the network connection"
    assert "\n" not in caught.value.message


def test_the_keyring_is_renewed_if_a_signature_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = SignedArchive(tmp_path / "archive", tmp_path / "keys")
    keyring = Path("/run", f"ash-test-{os.getpid()}.gpg")  # where apt's own user may read it
    renewed: list[bool] = []

    def renew_keyring() -> None:
        renewed.append(True)
        archive.export(keyring)

    monkeypatch.setattr(debian, "KEYRING", str(keyring))
    monkeypatch.setattr(host, "renew_keyring", lambda: renewed.append(True))
    try:
        keyring.write_bytes(Path("/usr/share/keyrings/debian-archive-keyring.gpg").read_bytes())
        with archive.served() as url:
            with pytest.raises(host.SignatureError, match=r"NO_PUBKEY|Missing key"):
                installation(url).check({})
            monkeypatch.setattr(host, "renew_keyring", renew_keyring)
            with pytest.raises(AshError, match="the repository cannot be used"):
                installation(url).check({})
    finally:
        keyring.unlink(missing_ok=True)
    assert renewed == [True, True]


def test_the_clock_is_compared_with_the_one_of_a_repository(tmp_path: Path) -> None:
    archive = SignedArchive(tmp_path / "archive", tmp_path / "keys")
    with archive.served() as url:
        there = debian.DebianInstaller().repository_time(Source(RELEASE, mirror=url))
    assert there
    assert abs((there - datetime.now(UTC)).total_seconds()) < 60
