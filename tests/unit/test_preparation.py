# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the installer checks of a live system before it installs, and what it makes of apt's messages."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ash import REFUSED, USAGE, AshError
from distros.debian import installer as debian
from installer import cli, host, install, preparation
from installer.distribution import Identity, Settings, Source
from installer.preparation import MIB, PreparedInstallation, Room

pytestmark = pytest.mark.budget(5)

NOW = datetime(2026, 11, 30, 20, 57, 18, tzinfo=UTC)

MEMINFO = """\
MemTotal:        2014212 kB
MemFree:          120424 kB
MemAvailable:     714836 kB
SwapTotal:       1048572 kB
SwapFree:         524288 kB
HugePages_Total:       0
"""


def test_swap_counts_as_memory() -> None:
    assert preparation.available_memory(MEMINFO) == (714836 + 524288) * 1024


def test_little_memory_is_a_warning_and_too_little_an_error() -> None:
    assert preparation.memory_problem(1024 * MIB) == ""
    assert "only 1023 MiB of memory are available: the installation is slow" in preparation.memory_problem(1023 * MIB)
    with pytest.raises(AshError, match=r"only 511 MiB .* needs 512 MiB") as caught:
        preparation.memory_problem(511 * MIB)
    assert (caught.value.status, "swapon" in caught.value.hint) == (REFUSED, True)


def test_directories_of_one_file_system_need_the_sum() -> None:
    needed = {Path("/usr"): 64 * MIB, Path("/var"): 192 * MIB, Path("/tmp"): 128 * MIB}
    root, memory = Room(1, 300 * MIB), Room(2, 200 * MIB)
    apart = {Path("/usr"): root, Path("/var"): root, Path("/tmp"): memory}
    assert preparation.room_problem(needed, apart) == ""
    problem = preparation.room_problem(needed, dict.fromkeys(needed, root))
    assert problem == "300 MiB are free in /usr and /var and /tmp, and tools and package lists need 384 MiB"
    assert "127 MiB are free in /tmp," in preparation.room_problem(needed, {**apart, Path("/tmp"): Room(2, 127 * MIB)})


def test_only_what_is_missing_needs_room() -> None:
    assert preparation._needed_room(tools=False, bootstraps=False) == {}
    assert len(preparation._needed_room(tools=False, bootstraps=True)) == 1
    assert {Path("/usr"), Path("/var")} == preparation._needed_room(tools=True, bootstraps=False).keys()


@pytest.mark.parametrize(
    ("now", "there", "problem"),
    [
        (NOW, None, ""),
        (NOW, NOW + timedelta(minutes=59), ""),
        (NOW - timedelta(hours=2), NOW, "clock says 2026-11-30 18:57 UTC, and the repository's 2026-11-30 20:57 UTC"),
        (NOW + timedelta(days=400), NOW, "clock says 2028-01-04 20:57 UTC"),
        (datetime(2012, 1, 1, tzinfo=UTC), None, "clock says 2012-01-01 00:00 UTC, but this installer is newer"),
        (datetime(2012, 1, 1, tzinfo=UTC), datetime(2012, 1, 1, tzinfo=UTC), ""),
    ],
)
def test_a_clock_is_compared_with_the_repositorys(now: datetime, there: datetime | None, problem: str) -> None:
    found = preparation.clock_problem(now, there)
    assert problem in found
    assert bool(found) == bool(problem)


def test_a_wrong_clock_is_set_by_the_machine_itself_or_else_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    ahead = datetime.now(UTC) + timedelta(days=3)
    answers = [ahead, datetime.now(UTC)]

    def synchronise() -> bool:
        asked.append("synchronise")
        return True

    monkeypatch.setattr(preparation, "_synchronise", synchronise)
    preparation._check_clock(lambda: answers.pop(0), may_set=True, signatures=True)
    assert (asked, answers) == (["synchronise"], [])
    with pytest.raises(AshError, match="signatures of packages are not valid") as caught:
        preparation._check_clock(lambda: ahead, may_set=False, signatures=True)
    assert caught.value.hint == f"set it: date --utc --set '{ahead:%Y-%m-%d %H:%M}'"
    assert len(asked) == 1, "a dry run changes nothing"
    preparation._check_clock(lambda: ahead, may_set=False, signatures=False)
    assert "date --utc --set" in capsys.readouterr().err, "without signatures to check this is a warning"


ANSWERS = """\
GET /debian/dists/bookworm/InRelease HTTP/1.1
Host: mirror.example

Answer for: http://mirror.example/debian/dists/bookworm/InRelease
HTTP/1.1 302 Found
Date: Mon, 30 Nov 2026 10:00:00 GMT
age: 7200

Answer for: http://other.example/debian/dists/bookworm/InRelease
HTTP/1.1 200 OK
content-type: text/plain
date: Mon, 30 Nov 2026 20:47:18 GMT
"""


def test_the_time_is_that_of_the_last_answer() -> None:
    assert debian._time_in_answer(ANSWERS) == NOW - timedelta(minutes=10)
    assert debian._time_in_answer(f"{ANSWERS}Age: 600\n") == NOW, "a proxy has kept it for ten minutes"
    assert debian._time_in_answer("E: Failed to fetch") is None
    assert debian._time_in_answer("date: today\n") is None


AT = "http://mirror.example/debian trixie InRelease"
NOT_SIGNED = f"E: The repository '{AT}' is not signed."
SQV = f"W: OpenPGP signature verification failed: {AT}: Sub-process /usr/bin/sqv returned an error code (1), error message is:"
# As apt 2.6 and 3.0 print them.
SIGNATURES = [
    f"W: GPG error: {AT}: The following signatures couldn't be verified because the public key is not available: "
    f"NO_PUBKEY 7507017B46C5694C\n{NOT_SIGNED}",
    f"W: GPG error: {AT}: The following signatures were invalid: EXPKEYSIG CE888FD50B53BBBF old@localhost\n{NOT_SIGNED}",
    f"{SQV} Missing key E3CD958388C5FB7400ECC5527507017B46C5694C, which is needed to verify signature.\n{NOT_SIGNED}",
]
TOO_NEW = [
    "E: Release file for http://mirror.example/dists/trixie/InRelease is not valid yet (invalid for another 2d 23h).",
    f"{SQV} Verifying signature:            Not live until 2026-12-03T20:31:45Z\n{NOT_SIGNED}",
]


@pytest.mark.parametrize("output", SIGNATURES)
def test_a_signature_that_fails_is_known_from_the_output(output: str) -> None:
    for error in (debian._repository_error(Source(), output), host._download_error(output, "E: Unable to locate")):
        assert isinstance(error, host.SignatureError)
        assert output.splitlines()[0] in error.message


@pytest.mark.parametrize("output", TOO_NEW)
def test_a_signature_of_tomorrow_is_a_matter_of_the_clock(output: str) -> None:
    error = debian._repository_error(Source(), output)
    assert not isinstance(error, host.SignatureError)
    assert "date --utc --set" in error.hint


def test_a_missing_network_is_named_and_not_what_follows_from_it() -> None:
    line = "W: Failed to fetch http://mirror.example/debian/dists/trixie/InRelease  Could not resolve 'mirror.example'"
    error = host._download_error(
        f"{line}\nW: Some index files failed to download.", "E: Unable to locate package mtools"
    )
    assert str(error) == f"its repository cannot be reached: {line}"
    assert host._download_error("", "E: Unable to locate package x\n").message == "E: Unable to locate package x"


class Prepared:
    """An installation on a machine that is as it should be, but for its keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        self.did: list[str] = []
        self.failures = failures
        monkeypatch.setattr(preparation, "_require_memory", lambda: self.did.append("memory"))
        monkeypatch.setattr(preparation, "_require_room", lambda _: self.did.append("room"))
        monkeypatch.setattr(preparation, "_check_clock", lambda *_, **__: self.did.append("clock"))
        monkeypatch.setattr(host, "renew_keyring", lambda: self.did.append("keyring"))
        monkeypatch.setattr(host, "require", self._require)

    def _require(self, _: host.Tools) -> None:
        self.did.append("tools")
        if self.failures:
            self.failures -= 1
            raise host.SignatureError("NO_PUBKEY")


def prepared(*, changes: bool = True) -> PreparedInstallation:
    return PreparedInstallation(Source(), Settings(), Identity.of("debian"), changes=changes)


def test_the_keyring_is_renewed_once_if_a_signature_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = ["memory", "room", "clock"]
    machine = Prepared(monkeypatch, failures=0)
    new = prepared()
    new.require({})
    new.require({})
    assert machine.did == [*checks, "tools", "tools"], "the machine is checked once, and its keyring is left alone"
    machine = Prepared(monkeypatch, failures=1)
    prepared().require({})
    assert machine.did == [*checks, "tools", "keyring", "tools"]
    machine = Prepared(monkeypatch, failures=2)
    with pytest.raises(host.SignatureError):
        prepared().require({})
    assert machine.did == [*checks, "tools", "keyring", "tools"]
    machine = Prepared(monkeypatch, failures=1)
    with pytest.raises(host.SignatureError):
        prepared(changes=False).require({})
    assert machine.did == [*checks, "tools"], "a dry run changes nothing"


@pytest.mark.parametrize(
    ("words", "is_prepared"),
    [
        ("--prep-only", True),
        ("--prep-only --disk /dev/sda", True),
        ("--disk /dev/sda", True),
        ("--disk x --no-prep", False),
    ],
)
def test_installations_on_disks_are_prepared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, is_prepared: bool
) -> None:
    seen: list[install.Installation] = []

    def install_on_disk(path: Path, new: install.Installation, _: install.Agree) -> install.Made:
        seen.append(new)
        return install.Made(path, "Debian", path)

    monkeypatch.setattr(install, "install_on_disk", install_on_disk)
    monkeypatch.setattr(install, "check_machine", seen.append)
    assert cli.main([*words.split(), "--id", "debian"]) == 0
    assert [isinstance(new, PreparedInstallation) for new in seen] == [is_prepared]
    assert ("this machine is ready" in capsys.readouterr().out) == ("--prep-only" in words)


@pytest.mark.parametrize("other", ["--no-prep", "--dry-run", "--image disk.img", "--make-rootfs root.tar"])
def test_only_preparing_excludes_other_things(other: str) -> None:
    assert cli.main(["--prep-only", *other.split()]) == USAGE
