# SPDX-License-Identifier: AGPL-3.0-or-later
"""A user has one uid in all snapshots, and no two users share one, in whatever order they were created."""

import itertools
import json
import os
from pathlib import Path

import pytest

from tests.support import make_deb
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]


def ids_of(system: System, snapshot: int, file: str = "passwd") -> dict[str, int]:
    """The ids in a snapshot's passwd or group, by name."""
    rows = [line.split(":") for line in (system.root(snapshot) / "etc" / file).read_text().splitlines()]
    return {row[0]: int(row[2]) for row in rows}


def agree(system: System) -> None:
    """Assert that all snapshots agree on the ids of all users and groups."""
    for file in ("passwd", "group"):
        given: dict[str, int] = {}
        for snapshot in system.files.tree():
            for name, number in ids_of(system, snapshot, file).items():
                assert given.setdefault(name, number) == number, f"{name} of {snapshot} has another number in {file}"
        names = {number: name for name, number in given.items()}
        assert len(names) == len(given), f"two names share a number in {file}: {given}"
        assert given.items() <= json.loads((system.files.state / "ids").read_text())[file].items()


def with_user(directory: Path, name: str, user: str, *, more: str = "") -> Path:
    """A package that creates a system user, as Debian's do, with files in /usr, /etc and /var."""
    return make_deb(
        directory,
        name,
        files={f"usr/lib/{name}/x": "x\n", f"etc/{name}.conf": "c\n", f"var/lib/{name}/shipped": "s\n"},
        postinst=f"useradd --system --user-group --home-dir /var/lib/{name} {user}\n"
        f"chown -R {user}:{user} /var/lib/{name}; chown root:{user} /etc/{name}.conf; chmod 640 /etc/{name}.conf\n"
        f"echo data > /var/lib/{name}/db; chown {user} /var/lib/{name}/db\n{more}",
    )


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def test_siblings_that_install_in_opposite_order_have_the_same_ids(
    system: System, snapshot: int, tmp_path: Path
) -> None:
    one, two = with_user(tmp_path, "ash-test-one", "_one"), with_user(tmp_path, "ash-test-two", "_two")
    sibling = system.clone()
    for number, packages in ((snapshot, (one, two)), (sibling, (two, one))):
        for package in packages:
            system.ash("install", number, package)
    agree(system)
    for number in (snapshot, sibling):
        for name in ("one", "two"):
            user, group = ids_of(system, number)[f"_{name}"], ids_of(system, number, "group")[f"_{name}"]
            assert owner(system.root(number) / f"etc/ash-test-{name}.conf") == (0, group)
            assert owner(system.files.etc(number) / f"ash-test-{name}.conf") == (0, group)
            assert owner(system.files.var / f"lib/ash-test-{name}/db") == (user, group)
            assert owner(system.files.var / f"lib/ash-test-{name}") == (user, group)
    assert not list((system.files.var / "lib/ash/conflicts").glob(f"{sibling}-*")), (
        "the second must find the data of the first"
    )


def test_debian_packages_that_create_users_agree(system: System, snapshot: int) -> None:
    sibling = system.clone()
    quick = "export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; apt-get -qq -y --no-install-recommends install"
    system.shell(snapshot, f"{quick} chrony; {quick} tor")
    system.shell(sibling, f"{quick} tor")
    system.shell(sibling, f"{quick} chrony")
    agree(system)
    for name, user in (("chrony", "_chrony"), ("tor", "debian-tor")):
        assert owner(system.files.var / "lib" / name)[0] == ids_of(system, sibling)[user]


def test_setuid_bits_and_capabilities_survive_a_renumbering(system: System, snapshot: int) -> None:
    sibling = system.clone()
    system.shell(snapshot, "groupadd --system _first")
    system.shell(
        sibling,
        "groupadd --system _second; useradd --system --gid _second _second; cd /usr/lib; "
        "cp /bin/true ash-test-suid; chown _second:_second ash-test-suid; chmod 6755 ash-test-suid; "
        "cp /bin/true ash-test-cap; chown root:_second ash-test-cap; chmod 750 ash-test-cap; "
        "python3 -c \"import os, struct; os.setxattr('ash-test-cap', 'security.capability', struct.pack('<IIIII', 0x2000001, 8192, 0, 0, 0))\"; "
        "mkdir -p /var/lib/ash-test-setgid; chgrp _second /var/lib/ash-test-setgid; chmod 2775 /var/lib/ash-test-setgid",
    )
    agree(system)
    user, group = ids_of(system, sibling)["_second"], ids_of(system, sibling, "group")["_second"]
    assert group != ids_of(system, snapshot, "group")["_first"]
    suid, capable = system.root(sibling) / "usr/lib/ash-test-suid", system.root(sibling) / "usr/lib/ash-test-cap"
    assert (owner(suid), suid.stat().st_mode & 0o7777) == ((user, group), 0o6755)
    assert (owner(capable), capable.stat().st_mode & 0o7777) == ((0, group), 0o750)
    assert os.getxattr(capable, "security.capability")[:4] == (0x2000001).to_bytes(4, "little")
    setgid = system.files.var / "lib/ash-test-setgid"
    assert (setgid.stat().st_gid, setgid.stat().st_mode & 0o7777) == (group, 0o2775)


def test_human_users_have_one_uid_and_own_their_homes(system: System, snapshot: int) -> None:
    sibling = system.clone()
    system.shell(snapshot, "useradd --create-home ada")
    system.shell(
        sibling,
        "useradd --create-home bob; echo mine > /home/bob/file; chown bob: /home/bob/file; useradd --no-create-home ada",
    )
    agree(system)
    for name in ("ada", "bob"):
        user = ids_of(system, sibling)[name]
        assert user >= 1000
        assert owner(system.home / name) == (user, ids_of(system, sibling, "group")[name])
    assert owner(system.home / "bob/file")[0] == ids_of(system, sibling)["bob"]
    ranges: dict[str, tuple[int, int]] = {}
    for number in (snapshot, sibling):
        for line in (system.root(number) / "etc/subuid").read_text().splitlines():
            name, first, size = line.split(":")
            assert ranges.setdefault(name, (int(first), int(size))) == (int(first), int(size))
    by_start = sorted(ranges.values())
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(by_start)), "ranges overlap"


def test_a_user_that_is_created_again_gets_its_old_uid(system: System, snapshot: int) -> None:
    system.shell(snapshot, "useradd --system _comes")
    first = ids_of(system, snapshot)["_comes"]
    system.shell(snapshot, "userdel _comes; useradd --system _other")
    assert ids_of(system, snapshot)["_other"] != first, "it may still have files in /var"
    system.shell(snapshot, "useradd --system _comes")
    assert ids_of(system, snapshot)["_comes"] == first
    agree(system)


def test_a_failed_transaction_allocates_no_uid(system: System, snapshot: int) -> None:
    before = (system.files.state / "ids").read_text()
    system.shell(snapshot, "useradd --system _failed; exit 1", status=1)
    assert (system.files.state / "ids").read_text() == before


def test_fsck_finds_no_clash(system: System) -> None:
    agree(system)
    assert system.ash("--json", "fsck").json["damage"] == []


def test_concurrent_transactions_allocate_different_uids(system: System, snapshot: int) -> None:
    sibling = system.clone()
    with system.at_work(snapshot, "useradd --system _left"):
        system.shell(sibling, "useradd --system _right")
    agree(system)


def test_a_second_name_for_root_takes_no_files_from_root(system: System, snapshot: int) -> None:
    system.shell(
        snapshot,
        "useradd --non-unique --uid 0 --no-create-home toor; mkdir -p /usr/lib/ash-test-root; touch /usr/lib/ash-test-root/x /var/lib/ash-test-root",
    )
    assert owner(system.root(snapshot) / "usr/lib/ash-test-root/x") == (0, 0)
    assert owner(system.files.var / "lib/ash-test-root") == (0, 0)
    assert ids_of(system, snapshot)["root"] == 0
