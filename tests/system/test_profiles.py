# SPDX-License-Identifier: AGPL-3.0-or-later
"""Profiles are installed in one transaction, and Debian has the packages of each."""

from pathlib import Path

import pytest

from tests.archive import Archive, use_only
from tests.support import CHECKOUT, DISTRIBUTION, FAILED, MISSING, USAGE
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(70)]

PROFILE = """\
# of a test
[packages]
ash-test-one ash-test-two
[packages::optional]
ash-test-extra
no-such-package
[services::systemd]
ash-test.service
[services::openrc]
never
[commands]
echo "$USER of $(pwd)" > /etc/by
echo 'a = b' >> /etc/by
[notes]
reboot, and be happy
"""
UNIT = "[Service]\nExecStart=true\n[Install]\nWantedBy=multi-user.target\n"


@pytest.fixture(scope="module")
def filled(archive: Archive) -> None:
    archive.add("ash-test-one", files={"usr/lib/systemd/system/ash-test.service": UNIT})
    archive.add("ash-test-two")
    archive.add("ash-test-extra")


@pytest.fixture
def snapshot(system: System, filled: None, url: str) -> int:
    number = system.clone()
    system.shell(number, use_only(url))
    return number


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "test.conf"
    path.write_text(PROFILE)
    return path


def test_a_profile_is_installed_completely(system: System, snapshot: int, profile: Path) -> None:
    outcome = system.ash("install", snapshot, "--profile", profile, environment={"SUDO_USER": "human"})
    root = system.root(snapshot)
    packages = system.ash("--json", "list", snapshot).json["packages"]
    assert {"ash-test-one", "ash-test-two", "ash-test-extra"} <= packages.keys()
    assert (root / "etc/by").read_text() == "human of /\na = b\n"
    assert (root / "etc/systemd/system/multi-user.target.wants/ash-test.service").is_symlink()
    assert outcome.stdout.endswith("reboot, and be happy\n")
    system.ash("remove", "--profile", snapshot, profile)
    assert "ash-test-one" not in system.ash("--json", "list", snapshot).json["packages"]


@pytest.mark.parametrize(
    "words",
    [
        ["install", "N", "-P", "FILE"],
        ["install", "--profile", "N", "FILE"],
        ["install", "-s", "N", "--prof", "FILE"],
        ["install-profile", "FILE", "N"],
        ["install-profile", "FILE", "--snap", "N"],
        ["install", "--force", "-P", "FILE", "-s", "N"],
    ],
)
def test_every_spelling_of_the_command_works(system: System, snapshot: int, profile: Path, words: list[str]) -> None:
    given = [{"N": str(snapshot), "FILE": str(profile)}.get(word, word) for word in words]
    answer = system.ash("--json", "--dry-run", *given, "--no-upgrade").json
    assert set(answer["would"][0]["packages"]["added"]) == {"ash-test-one", "ash-test-two", "ash-test-extra"}


def test_packages_beside_a_profile_are_an_error(system: System, snapshot: int, profile: Path) -> None:
    with system.nothing_changes():
        outcome = system.ash("install", snapshot, "--profile", profile, "-p", "ash-test-extra", status=USAGE)
    assert "ash-test-extra" in outcome.error


def test_packages_are_installed_into_several_snapshots(system: System, snapshot: int) -> None:
    other = system.clone(snapshot)
    system.ash("refresh", snapshot, other)
    system.ash("install", "--snapshots", snapshot, other, "-p", "ash-test-two", "-p", "ash-test-one")
    for number in (snapshot, other):
        assert {"ash-test-one", "ash-test-two"} <= system.ash("--json", "list", number).json["packages"].keys()


def test_a_command_that_fails_leaves_nothing(system: System, snapshot: int, profile: Path) -> None:
    profile.write_text(PROFILE + "[commands]\nfalse\n")
    with system.nothing_changes():
        assert "false" in system.ash("install", snapshot, "--profile", profile, status=FAILED).stderr.splitlines()[-1]


@pytest.mark.parametrize("text", ["hello\n", "[pakages]\nhello\n", "[packages\nhello\n"])
def test_a_wrong_profile_is_reported_with_its_line(system: System, snapshot: int, profile: Path, text: str) -> None:
    profile.write_text(text)
    with system.nothing_changes():
        assert "line 1" in system.ash("install", snapshot, "--profile", profile, status=USAGE).error


def test_a_missing_profile_is_reported(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        system.ash("install", snapshot, "--profile", "no-such", status=MISSING)
        system.ash("install", snapshot, "--profile", "./no-such", status=MISSING)
        system.ash("install-profile", status=USAGE)
        assert "snapshot" in system.ash("install-profile", "i3", status=USAGE).error


NAMES = sorted(path.parent.name for path in (CHECKOUT / "profiles").glob(f"*/{DISTRIBUTION}.conf"))


def test_profiles_are_listed(system: System) -> None:
    listed = system.ash("--json", "profiles").json["profiles"]
    assert sorted(listed) == NAMES
    assert {"gnome", "xfce", "i3", "networkmanager", "server"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_debian_has_the_packages_of_each_profile(system: System, name: str) -> None:
    snapshot = system.clone()
    answer = system.ash("--json", "--dry-run", "install", snapshot, "--profile", name, "--no-upgrade").json
    wanted = system.ash("--json", "profiles").json["profiles"][name]["packages"]
    there = system.ash("--json", "list", snapshot).json["packages"]
    assert set(wanted) <= answer["would"][0]["packages"]["added"].keys() | there.keys()
