# SPDX-License-Identifier: AGPL-3.0-or-later
"""Real packages of Debian in real snapshots: what one has, its siblings do not have."""

import json
import re
from pathlib import Path

import pytest

from tests.support import FAILED, MISSING, REFUSED, SNAPSHOTS, USAGE, make_deb, program
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(120)]


def packages(system: System, snapshot: int) -> dict[str, str]:
    found: dict[str, str] = system.ash("--json", "list", snapshot).json["packages"]
    return found


def is_consistent(system: System, snapshot: int) -> None:
    """Assert that apt and dpkg find no problem in a snapshot."""
    outcome = system.shell(snapshot, "apt-get check >/dev/null; dpkg --audit")
    assert outcome.stdout == ""


def automatic(system: System, snapshot: int) -> set[str]:
    return set(system.ash("run", snapshot, "apt-mark", "showauto").stdout.split())


def test_a_package_of_debian_is_installed_and_runs(system: System, snapshot: int) -> None:
    answer = system.ash("--json", "install", snapshot, "hello").json
    assert answer["changed"] is True
    assert list(answer["packages"]["added"]) == ["hello"]
    assert packages(system, snapshot)["hello"] == answer["packages"]["added"]["hello"]
    assert system.ash("run", snapshot, "hello").stdout == "Hello, world!\n"
    assert "hello" not in packages(system, 0)
    is_consistent(system, snapshot)


def test_installing_an_installed_package_changes_nothing(system: System, snapshot: int) -> None:
    system.ash("install", snapshot, "hello")
    with system.nothing_changes():
        answer = system.ash("--json", "install", snapshot, "hello").json
    assert answer["changed"] is False


def test_install_says_what_to_do_next(system: System, snapshot: int) -> None:
    out = system.ash("install", snapshot, "hello").stdout
    assert re.search(r"^  \+ hello \S+$", out, re.MULTILINE)
    assert f"ash deploy {snapshot}" in out


def test_a_dry_run_reports_apts_plan_and_changes_nothing(system: System, snapshot: int) -> None:
    system.ash("install", system.clone(), "hello")  # fetches the lists
    with system.nothing_changes():
        answer = system.ash("--json", "--dry-run", "install", snapshot, "lighttpd").json
        assert answer["changed"] is False
        assert "lighttpd" in answer["would"][0]["packages"]["added"]
        answer = system.ash("--json", "--dry-run", "remove", snapshot, "less").json
        assert "less" in answer["would"][0]["packages"]["removed"]
        assert "would change" in system.ash("--dry-run", "install", snapshot, "hello").stdout


def test_siblings_have_their_own_packages(system: System, snapshot: int) -> None:
    """One has a package with automatic dependencies, the other removes it again: each is consistent."""
    system.ash("install", snapshot, "libjs-bootstrap4", "hello")
    base_auto = automatic(system, system.clone())
    dependencies = automatic(system, snapshot) - base_auto
    assert dependencies, "the test needs a package with dependencies of its own"
    sibling = system.clone(snapshot)
    answer = system.ash("--json", "remove", sibling, "libjs-bootstrap4").json
    assert set(answer["packages"]["removed"]) == {"libjs-bootstrap4", *dependencies}
    assert automatic(system, snapshot) - base_auto == dependencies
    assert automatic(system, sibling) == base_auto
    assert {"libjs-bootstrap4", *dependencies} <= packages(system, snapshot).keys()
    assert not {"libjs-bootstrap4", *dependencies} & packages(system, sibling).keys()
    for number in (snapshot, sibling, system.clone()):
        is_consistent(system, number)


def test_a_package_leaves_no_trace_in_the_shared_var(system: System, snapshot: int) -> None:
    system.ash("install", snapshot, "libjs-bootstrap4")
    places = [system.files.var / name for name in ("lib", "log", "backups", "cache/debconf")]
    named = program(
        "find", *(p for p in places if p.exists()), "-name", "*bootstrap*", "-not", "-path", "*/apt/lists/*"
    )
    assert named == ""
    assert (system.files.var / "lib/dpkg").is_symlink()
    assert not (system.files.var / "lib/apt/extended_states").exists()


def test_installing_and_removing_in_one_transaction(system: System, snapshot: int) -> None:
    before = system.id_of(snapshot)
    answer = system.ash("--json", "install", snapshot, "hello", "--remove", "less").json
    assert (list(answer["packages"]["added"]), list(answer["packages"]["removed"])) == (["hello"], ["less"])
    assert system.subvolumes()[f"{SNAPSHOTS}/rootfs/undo-{snapshot}"] == before


def test_several_snapshots_one_after_the_other(system: System, snapshot: int) -> None:
    other = system.clone()
    answer = system.ash("--json", "install", "--snapshots", snapshot, other, "hello").json
    assert [change["snapshot"] for change in answer["snapshots"]] == [snapshot, other]
    assert "hello" in packages(system, snapshot).keys() & packages(system, other).keys()
    system.ash("remove", "--snapshots", snapshot, other, "-p", "hello")
    assert "hello" not in packages(system, snapshot).keys() | packages(system, other).keys()


def test_a_package_file_on_disk_is_installed_with_its_dependencies(
    system: System, snapshot: int, tmp_path: Path
) -> None:
    package = make_deb(tmp_path, "ash-test", depends="hello", files={"usr/share/ash-test/x": "x\n"})
    answer = system.ash("--json", "install", snapshot, package).json
    assert set(answer["packages"]["added"]) == {"ash-test", "hello"}
    assert (system.root(snapshot) / "usr/share/ash-test/x").read_text() == "x\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["install", "N", "no-such-package-at-all"], MISSING),
        (["install", "N", "hello", "no-such-package-at-all"], MISSING),
        (["install", "N", "/nowhere/x.deb"], MISSING),
        (["remove", "N", "no-such-package-at-all"], MISSING),
        (["install", "N"], USAGE),
        (["remove", "N"], USAGE),
        (["install", "N", "hello", "--live"], REFUSED),
    ],
)
def test_a_failed_installation_changes_nothing(system: System, snapshot: int, words: list[str], status: int) -> None:
    with system.nothing_changes():
        system.ash(*(str(snapshot) if word == "N" else word for word in words), status=status)
    assert not system.remains()


@pytest.mark.parametrize("script", ["preinst", "postinst"])
def test_a_package_whose_script_fails_changes_nothing(
    system: System, snapshot: int, script: str, tmp_path: Path
) -> None:
    text = "mkdir -p /var/lib/ash-broken; echo x > /var/lib/ash-broken/x; echo x > /etc/ash-broken; exit 1"
    package = make_deb(tmp_path, "ash-broken", files={"usr/share/ash-broken/x": "x\n"}, **{script: text})
    with system.nothing_changes():
        error = system.ash("install", snapshot, package, status=FAILED).error
    assert "dpkg" in error
    assert not system.remains()
    system.ash("install", snapshot, "hello")
    is_consistent(system, snapshot)


def test_a_package_whose_removal_fails_stays(system: System, snapshot: int, tmp_path: Path) -> None:
    system.ash("install", snapshot, make_deb(tmp_path, "ash-stays", prerm="exit 1"))
    with system.nothing_changes():
        system.ash("remove", snapshot, "ash-stays", status=FAILED)
    assert "ash-stays" in packages(system, snapshot)


def test_a_foreign_package_has_its_architecture_in_its_name(system: System, snapshot: int, tmp_path: Path) -> None:
    name = "ash-foreign:i386"
    system.shell(snapshot, "dpkg --add-architecture i386")
    package = make_deb(tmp_path, "ash-foreign", architecture="i386", files={"usr/share/foreign": "x\n"})
    assert system.ash("--json", "install", snapshot, package).json["packages"]["added"] == {name: "1"}
    assert packages(system, snapshot)[name] == "1"
    assert system.ash("--json", "--dry-run", "remove", snapshot, name).json["would"][0]["packages"]["removed"] == {
        name: "1"
    }
    system.ash("hold", snapshot, name)
    assert system.ash("run", snapshot, "apt-mark", "showhold").stdout == f"{name}\n"
    system.ash("unhold", snapshot, name)
    system.shell(snapshot, "rm /usr/share/foreign")
    assert name in system.ash("fsck", status=FAILED).stdout
    assert system.ash("--json", "remove", snapshot, name).json["packages"]["removed"] == {name: "1"}


def test_files_below_a_mount_of_fstab_are_named(system: System, snapshot: int, tmp_path: Path) -> None:
    script = r"printf '/dev/x1 /opt ext4 nofail 0 2\n/dev/x2 /usr/two\\040words ext4 noauto 0 2\n' >> /etc/fstab; mkdir -p /opt/old"
    assert "hides" not in system.shell(snapshot, script).stderr
    files = {"opt/ash-test/program": "x\n", "usr/two words/x": "x\n", "srv/ash-test": "x\n"}
    package = make_deb(tmp_path, "ash-test-hidden", files=files)
    said = system.ash("install", snapshot, package).stderr
    assert "/opt is a mount point in fstab, and hides what the snapshot has there: opt/ash-test/program\n" in said
    assert said.count("hides") == 1, "what is not mounted at boot hides nothing, nor does what a transaction sees"
    system.shell(snapshot, "sed -i s/noauto/nofail/ /etc/fstab")
    said = system.shell(snapshot, "echo y > '/usr/two words/x'; echo y > /boot/efi/x; touch /usr/z").stderr
    assert re.findall("ash: /(.*) is a mount point", said) == ["boot/efi", "usr/two words"]
    assert "hides" not in system.shell(snapshot, "rm -r /opt/ash-test /boot/efi/x; touch /usr/zz").stderr


def test_an_upgrade_keeps_edited_configuration(system: System, snapshot: int, tmp_path: Path) -> None:
    for version in ("1", "2"):
        package = make_deb(
            tmp_path,
            "ash-conf",
            version,
            files={"etc/ash-test.conf": f"{version}\n", "DEBIAN/conffiles": "/etc/ash-test.conf\n"},
        )
        answer = system.ash("--json", "install", snapshot, package).json
        if version == "1":
            system.shell(snapshot, "echo mine > /etc/ash-test.conf")
    assert answer["packages"]["upgraded"] == {"ash-conf": ["1", "2"]}
    assert (system.root(snapshot) / "etc/ash-test.conf").read_text() == "mine\n"


def test_remove_keeps_configuration_and_purge_does_not(system: System, snapshot: int, tmp_path: Path) -> None:
    package = make_deb(
        tmp_path, "ash-conf", files={"etc/ash-test.conf": "x\n", "DEBIAN/conffiles": "/etc/ash-test.conf\n"}
    )
    system.ash("install", snapshot, package)
    system.ash("remove", snapshot, "ash-conf")
    assert (system.root(snapshot) / "etc/ash-test.conf").exists()
    system.ash("remove", snapshot, "ash-conf", "--purge")
    assert not (system.root(snapshot) / "etc/ash-test.conf").exists()


def test_a_service_of_a_package_is_enabled_and_not_started(system: System, snapshot: int, tmp_path: Path) -> None:
    unit = "[Service]\nExecStart=/bin/sleep 4740\n[Install]\nWantedBy=multi-user.target\n"
    start = "deb-systemd-helper enable ash-test.service; deb-systemd-invoke start ash-test.service; "
    start += "invoke-rc.d ash-test start || true"
    package = make_deb(tmp_path, "ash-service", files={"usr/lib/systemd/system/ash-test.service": unit}, postinst=start)
    system.ash("install", snapshot, package)
    assert (system.root(snapshot) / "etc/systemd/system/multi-user.target.wants/ash-test.service").is_symlink()
    assert not system.processes()
    assert "ash-test" not in program("find", system.files.var / "lib/systemd", "-name", "*ash-test*")


def test_an_unreachable_repository_is_an_error_that_changes_nothing(system: System, snapshot: int) -> None:
    with system.nothing_changes():
        nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        system.ash("install", snapshot, "lighttpd", status=FAILED, environment=nowhere)


def test_the_history_names_the_packages(system: System, snapshot: int) -> None:
    system.ash("install", snapshot, "hello")
    line = json.loads((system.files.state / "history").read_text().splitlines()[-1])
    assert line["command"] == "install"
    assert "hello" in line["packages"]["added"]


def test_the_package_ash_does_not_replace_our_executable(system: System, snapshot: int, tmp_path: Path) -> None:
    system.ash("install", snapshot, make_deb(tmp_path, "ash", files={"usr/bin/ash": "another\n"}))
    assert (system.root(snapshot) / "usr/bin/ash").readlink() == Path("/.snapshots/ash/ash")
    is_consistent(system, snapshot)


def test_what_ash_needs_is_removed_only_by_force(system: System, snapshot: int, tmp_path: Path) -> None:
    system.shell(snapshot, "touch /etc/mark")  # the first change of a system makes its reserve
    with system.nothing_changes():
        outcome = system.ash("remove", snapshot, "btrfs-progs", status=REFUSED)
        assert "btrfs-progs, which ash needs" in outcome.error
        assert "--force" in outcome.error
        assert "libpython3-stdlib" in system.ash("remove", snapshot, "libpython3-stdlib", status=REFUSED).error
    assert "  - python3 " in system.ash("remove", snapshot, "python3").stdout, "ash does not need all that it brings"
    system.shell(snapshot, "python3 -c 'import ctypes, difflib, json, http.client'")
    system.ash("undo", snapshot)
    greedy = make_deb(tmp_path, "ash-test-greedy", postinst="rm /usr/bin/btrfs")
    with system.nothing_changes():
        assert "remove btrfs-progs" in system.ash("install", snapshot, greedy, status=REFUSED).error
    assert "no longer has btrfs-progs" in system.shell(snapshot, "rm /usr/bin/btrfs").stderr
    system.ash("undo", snapshot)
    system.ash("install", snapshot, greedy, "--force")
    system.ash("remove", snapshot, "ash-test-greedy")
