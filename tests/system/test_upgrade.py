# SPDX-License-Identifier: AGPL-3.0-or-later
"""Upgrading one snapshot or the base, holding packages, refreshing lists, fixdb and whichsnap."""

import re
from pathlib import Path

import pytest

from tests.archive import Archive, use_only
from tests.support import DONE, FAILED, MISSING, REFUSED, make_deb
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]

OLD, NEW = "1", "2"
DOWNLOADS = "cache/apt/archives"


@pytest.fixture(scope="module")
def old(system: System, archive: Archive, url: str) -> int:
    """A snapshot with the old version of a package; the repository has a new one."""
    archive.add("ash-test-tool", OLD, files={"usr/share/tool": "one\n"})
    number = system.clone()
    system.shell(number, use_only(url))
    system.ash("refresh", number)
    system.ash("install", number, "ash-test-tool")
    archive.add("ash-test-tool", NEW, files={"usr/share/tool": "two\n"})
    archive.fetched("")
    return number


@pytest.fixture
def snapshot(system: System, old: int) -> int:
    """A clone of `old` for each test."""
    return system.clone(old)


def version(system: System, number: int) -> str | None:
    found: str | None = system.ash("--json", "list", number).json["packages"].get("ash-test-tool")
    return found


def test_upgrade_installs_newer_versions(system: System, snapshot: int) -> None:
    answer = system.ash("--json", "upgrade", snapshot).json
    assert answer["changed"] is True
    assert answer["packages"]["upgraded"] == {"ash-test-tool": [OLD, NEW]}
    assert (system.root(snapshot) / "usr/share/tool").read_text() == "two\n"
    assert system.ash("--json", "upgrade", snapshot).json["changed"] is False
    system.ash("undo", snapshot)
    assert version(system, snapshot) == OLD


def test_a_dry_run_reports_upgrades_and_download_size(system: System, snapshot: int, archive: Archive) -> None:
    archive.fetched("")
    with system.nothing_changes():
        answer = system.ash("--json", "--dry-run", "upgrade", snapshot).json
    assert answer["would"][0]["packages"]["upgraded"] == {"ash-test-tool": [OLD, NEW]}
    assert not archive.fetched("deb$")


def test_downloaded_packages_are_upgraded_without_a_network(system: System, archive: Archive, old: int) -> None:
    with archive.served() as url:
        snapshot = system.clone(old)
        system.shell(snapshot, f"{use_only(url)}; rm -f /var/cache/apt/archives/ash-test*")
        system.ash("upgrade", snapshot, "--download-only")
        assert version(system, snapshot) == OLD
    outcome = system.ash("upgrade", snapshot)
    assert "continuing with the present package lists" in outcome.stderr
    assert version(system, snapshot) == NEW
    assert "no repository" in system.ash("refresh", snapshot, status=FAILED).stderr
    assert "no repository" in system.ash("auto-upgrade", snapshot, status=FAILED).stderr


def test_an_unreachable_repository_is_a_warning_and_with_strict_an_error(
    system: System, snapshot: int, url: str
) -> None:
    # At another address: apt gives up on all repositories of a host that does not answer.
    system.shell(snapshot, use_only("http://127.0.0.2:9", url))
    with system.nothing_changes():
        error = system.ash("upgrade", snapshot, "--strict", status=FAILED).stderr.splitlines()[-1]
        assert "127.0.0.2:9" in error
        assert "--strict" in error
    outcome = system.ash("upgrade", snapshot, status=DONE)
    assert "127.0.0.2:9" in outcome.stderr
    assert version(system, snapshot) == NEW


DATE = "Thu, 01 Jan 2026 00:00:00 UTC"
REFUSED_BY_APT: dict[str, dict[str, str]] = {
    "is expired": {"Date": DATE, "Valid_Until": "Fri, 02 Jan 2026 00:00:00 UTC"},
    "is not valid yet": {"Date": "Fri, 01 Jan 2100 00:00:00 UTC"},
}


@pytest.mark.parametrize("words", REFUSED_BY_APT)
def test_a_repository_that_apt_refuses_counts_as_unreachable(
    system: System, snapshot: int, url: str, tmp_path: Path, words: str
) -> None:
    odd = Archive(tmp_path / "odd")
    odd.release(Date=DATE, Suite="one")
    with odd.served() as odd_url:
        system.shell(snapshot, use_only(odd_url, url))
        system.ash("refresh", snapshot, "--strict")
        odd.release(**REFUSED_BY_APT[words])
        with system.nothing_changes():
            error = system.ash("upgrade", snapshot, "--strict", status=FAILED).stderr.splitlines()[-1]
            assert words in error
            assert "--strict" in error
        outcome = system.ash("upgrade", snapshot)
        assert words in next(line for line in outcome.stderr.splitlines() if line.startswith("ash: "))
        assert version(system, snapshot) == NEW
        system.shell(snapshot, use_only(odd_url))
        with system.nothing_changes():
            assert "no repository can be reached" in system.ash("refresh", snapshot, status=FAILED).error


# To generate a locale takes a package of the real archive. A copy of C.UTF-8 under another name does as well: it is by
# the name that programs find their translations, which the snapshot has.
GERMAN = "cp -r /usr/lib/locale/C.utf8 /usr/lib/locale/de_DE.utf8"
IN_GERMAN = {"LANG": "de_DE.UTF-8", "LC_MESSAGES": "de_DE.UTF-8", "LC_ALL": "de_DE.UTF-8"}


def test_apt_is_parsed_in_any_language_of_the_user(system: System, snapshot: int) -> None:
    system.shell(snapshot, f"{GERMAN}; {use_only('http://127.0.0.2:9')}")
    said = system.shell(snapshot, "apt-get install no-such || true", environment=IN_GERMAN)
    assert "kann nicht gefunden werden" in said.stderr, "what the user runs speaks German"
    with system.nothing_changes():
        assert "no-such" in system.ash("install", snapshot, "no-such", status=MISSING, environment=IN_GERMAN).error
        assert "no repository" in system.ash("refresh", snapshot, status=FAILED, environment=IN_GERMAN).error
    assert "no repository" in system.ash("auto-upgrade", snapshot, status=FAILED, environment=IN_GERMAN).error


def test_an_unsigned_repository_is_not_used(system: System, snapshot: int, url: str) -> None:
    system.ash("refresh", snapshot)  # while the repository is trusted, so that there is an upgrade
    system.shell(snapshot, use_only(url).replace("[trusted=yes] ", ""))
    assert "unauthenticated" in system.ash("upgrade", snapshot, status=FAILED).stderr.splitlines()[-1]
    assert version(system, snapshot) == OLD
    assert "does not have a Release file" in system.ash("upgrade", snapshot, "--strict", status=FAILED).error


def test_a_failed_upgrade_changes_nothing(system: System, archive: Archive, tmp_path: Path, snapshot: int) -> None:
    broken = Archive(tmp_path / "broken")
    broken.add("ash-test-tool", "3", postinst="exit 1")
    with broken.served() as url:
        system.shell(snapshot, use_only(url))
        system.ash("refresh", snapshot)
        with system.nothing_changes(but=DOWNLOADS):
            system.ash("upgrade", snapshot, status=FAILED)
    assert version(system, snapshot) == OLD


def test_a_held_package_is_not_upgraded(system: System, snapshot: int) -> None:
    assert system.ash("--json", "hold", snapshot, "ash-test-tool").json["changed"] is True
    assert system.ash("--json", "hold", snapshot, "ash-test-tool").json["changed"] is False
    system.ash("upgrade", snapshot)
    assert version(system, snapshot) == OLD
    system.ash("unhold", snapshot, "ash-test-tool")
    system.ash("upgrade", snapshot)
    assert version(system, snapshot) == NEW


def test_a_missing_package_cannot_be_held(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        assert "no-such" in system.ash("hold", snapshot, "no-such", status=MISSING).error


def test_several_snapshots_fetch_the_lists_once(system: System, archive: Archive, old: int) -> None:
    two = [system.clone(old), system.clone(old)]
    archive.fetched("")
    system.ash("upgrade", "--snapshots", *two)
    assert [version(system, number) for number in two] == [NEW, NEW]
    asked = archive.fetched("")
    assert len([path for path in asked if path.endswith("InRelease")]) == 1
    assert len([path for path in asked if path.endswith(".deb")]) <= 1


def test_refresh_fetches_the_lists_and_changes_no_snapshot(system: System, snapshot: int, archive: Archive) -> None:
    before = system.id_of(snapshot)
    archive.fetched("")
    system.ash("refresh", snapshot)
    assert archive.fetched("Packages")
    assert system.id_of(snapshot) == before


def test_fixdb_finishes_half_installed_packages(system: System, snapshot: int) -> None:
    broken = "sed -i '/^Package: ash-test-tool$/,/^$/s/install ok installed/install ok unpacked/' /var/lib/dpkg/status"
    system.shell(snapshot, broken)
    assert system.ash("--json", "fsck", status=FAILED).json["damage"]
    assert system.ash("--json", "fixdb", snapshot, status=DONE).json["changed"] is True
    assert system.ash("--json", "fsck").json["damage"] == []


def test_fixdb_repairs_what_it_can_without_a_network(system: System, snapshot: int) -> None:
    system.shell(snapshot, use_only("http://127.0.0.2:9"))
    system.shell(snapshot, "sed -i '/^Package: ash-test-tool$/,/^$/s/ok installed/ok unpacked/' /var/lib/dpkg/status")
    outcome = system.ash("fixdb", snapshot)
    assert "ash: cannot fetch the package lists: no repository can be reached" in outcome.stderr
    assert f"snapshot {snapshot} changed" in outcome.stdout
    assert system.ash("--json", "fsck").json["damage"] == []
    system.shell(snapshot, "rm /usr/share/tool /var/cache/apt/archives/ash-test*")
    outcome = system.ash("fixdb", snapshot, status=FAILED)
    assert "still wrong: package ash-test-tool lacks /usr/share/tool" in outcome.stdout
    assert not re.search("Traceback|an error in ash itself", outcome.stderr), outcome.stderr


def test_fixdb_changes_nothing_if_that_would_make_it_worse(
    system: System, archive: Archive, snapshot: int, tmp_path: Path
) -> None:
    archive.add("ash-test-dependency", postinst="exit 1")
    system.ash("refresh", snapshot)
    system.ash("install", snapshot, make_deb(tmp_path, "ash-test-local"))
    system.shell(snapshot, "sed -i '/^Package: ash-test-local$/a Depends: ash-test-dependency' /var/lib/dpkg/status")
    with system.nothing_changes(but=DOWNLOADS):
        assert "dpkg" in system.ash("fixdb", snapshot, status=FAILED).stderr.splitlines()[-1]


def test_only_base_update_changes_the_base(system: System, url: str) -> None:
    system.ash("upgrade", 0, status=REFUSED)
    with system.terminal("base-update", "--shell") as terminal:
        terminal.expect(r"# ")
        terminal.type(f"{use_only(url)}\n")
        terminal.type("apt-get update && apt-get -y install ash-test-tool=1 && exit 0\n")
        terminal.expect(r"Setting up ash-test-tool")
        assert terminal.wait() == DONE
    answer = system.ash("--json", "base-update").json
    assert answer["packages"]["upgraded"] == {"ash-test-tool": [OLD, NEW]}
    assert answer["snapshot"] == 0
    system.is_sound()
    system.ash("undo", 0, status=REFUSED)


def test_whichsnap_searches_all_snapshots(system: System, snapshot: int, old: int) -> None:
    found = system.ash("--json", "whichsnap", "ash-test-tool").json["snapshots"]
    assert found[str(snapshot)] == {"ash-test-tool": OLD}
    assert str(old) in found
    assert system.ash("ws", "ash-test-tool").stdout.count("\n") == len(found) + 1
    assert "no-such" in system.ash("whichsnap", "no-such", status=MISSING).error
