# SPDX-License-Identifier: AGPL-3.0-or-later
"""A user has one uid in all snapshots, and no two users share one, in whatever order they were created."""

import itertools
import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support import DONE, FAILED, REFUSED, make_deb, program
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]


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


def test_fsck_finds_rows_of_accounts_that_are_gone(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo gone:!:20000:0:99999:7::: >> /etc/shadow")
    problems = system.ash("--json", "fsck", status=FAILED).json["damage"]
    assert "shadow has rows of accounts that do not exist: gone" in [problem["what"] for problem in problems]
    system.ash("fsck", "--repair")
    assert "gone" not in (system.root(snapshot) / "etc/shadow").read_text()


# People of the running system


def useradd(machine: Machine, *words: str, home: str = "") -> None:
    """Add a person to the running system, with a home and a file in it."""
    name = words[-1]
    home = home or f"home/{name}"
    program("useradd", "--root", machine.etc.parent, "--home-dir", f"/{home}", *words)
    directory = machine.system.home / home.removeprefix("home/")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "file").write_text(f"{name}\n")
    for path in (directory, directory / "file"):
        os.chown(path, *owner_in(machine.etc, name))


def owner_in(etc: Path, name: str) -> tuple[int, int]:
    """The uid and gid of a person in an /etc."""
    row = next(line.split(":") for line in (etc / "passwd").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(row[2]), int(row[3])


def chpasswd(etc: Path, name: str, field: str, day: int) -> None:
    """Set the password field of an account, and the day of the change."""
    shadow = etc / "shadow"
    lines = [line.split(":") for line in shadow.read_text().splitlines()]
    changed = [[name, field, str(day), *row[3:]] if row[0] == name else row for row in lines]
    shadow.write_text("".join(f"{':'.join(row)}\n" for row in changed))


def password(etc: Path, name: str) -> str:
    return next(line.split(":")[1] for line in (etc / "shadow").read_text().splitlines() if line.startswith(f"{name}:"))


def test_a_deploy_has_everybody_whatever_was_saved_in_between(machine: Machine) -> None:
    system = machine.system
    other = system.clone()
    useradd(machine, "pat")
    chpasswd(machine.etc, "root", "$y$new", 20500)
    assert "passwd" in machine.running("etc-update")["carried"]
    assert not {"passwd", "shadow"} & system.ash("--json", "diff").json["drift"].keys()
    answer = machine.deploy(other)
    assert (answer["people"], answer["notes"]) == (["pat"], [])
    assert {"passwd", "shadow", "group", "gshadow", "subuid", "subgid"} <= set(answer["carried"])
    new = machine.next_etc
    assert (owner_in(new, "pat"), password(new, "root")) == (owner(system.home / "pat"), "$y$new")
    assert "accounts as in the running system: pat" in system.ash("deploy", system.clone()).stdout
    fresh = machine.deploy(other, "--fresh-etc")
    assert (fresh["people"], owner_in(machine.next_etc, "pat")) == (["pat"], owner(system.home / "pat"))
    number = machine.running("rollback")["snapshot"]
    chpasswd(machine.etc, "pat", "$y$pat", 20501)
    program("userdel", "--root", machine.etc.parent, "pat")
    machine.running("carry")
    assert "pat" not in (machine.next_etc / "passwd").read_text(), "who is deleted is deleted"
    assert "pat" in (system.root(number) / "etc/passwd").read_text()


def test_who_was_deleted_stays_deleted_wherever_the_account_was_saved(machine: Machine) -> None:
    system = machine.system
    saved = system.ash("--json", "status").json["next"]["snapshot"]
    others = [system.clone() for _ in range(2)]
    useradd(machine, "wil")
    machine.running("etc-update")
    machine.deploy(others[0])
    machine.boot()
    program("userdel", "--root", machine.etc.parent, "wil")  # the account came with the deploy, and is no drift
    assert machine.deploy(saved)["people"] == ["wil"], "who does not come back is named"
    for number in (others[1], saved):  # other deployments run in between, which never had it
        machine.deploy(number)
        machine.boot()
        for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid"):
            assert not re.search("^wil:", (machine.etc / name).read_text(), re.MULTILINE), (
                f"wil is in {name} of {number}"
            )
    useradd(machine, "wil")
    machine.deploy(others[1])
    assert "\nwil:" in (machine.next_etc / "passwd").read_text(), "who is made again is there again"


def test_of_two_with_one_uid_the_one_of_the_snapshot_gets_another_with_all_that_is_his(
    machine: Machine, snapshot: int
) -> None:
    system, other = machine.system, machine.system.clone()
    spools = "/var/mail /var/spool/cron/crontabs /var/spool/cron/atjobs"
    system.shell(
        other,
        f"useradd -m --uid 2000 dave; mkdir -p {spools} /usr/lib/of-dave /home/staff; "
        "useradd -m -d /home/staff/erin --uid 2001 erin; "
        "cd /var/spool/cron; touch /var/mail/dave crontabs/dave /home/dave/file /usr/lib/of-dave/x; chown dave: "
        "/var/mail/dave crontabs/dave /home/dave/file /usr/lib/of-dave/x; mkdir -p /usr/lib/of-erin; chown erin: /usr/lib/of-erin; "
        "printf '#!/bin/sh\\n# atrun uid=%s gid=%s\\n# mail dave 0\\n' $(id -u dave) $(id -g dave) > atjobs/a1; "
        "sed s/dave/carol/ atjobs/a1 > atjobs/a2; chown dave: atjobs/a1 atjobs/a2; chmod 700 atjobs/a*",
    )
    old = ids_of(system, other)
    first, second = 2000, 2001
    assert {owner(system.home / "staff/erin"), owner(system.root(other) / "usr/lib/of-erin")} == {(second, second)}
    for name, uid in (("carol", first), ("frank", second)):
        useradd(machine, "--uid", f"{uid}", "--user-group", name)
    carol = owner_in(machine.etc, "carol")
    assert carol[0] == first
    problems = [problem["what"] for problem in system.ash("--json", "fsck", status=FAILED).json["damage"]]
    assert f"dave has the id {first} in passwd, as carol in the running system" in problems
    answer = machine.deploy(other)
    new, root = machine.next_etc, machine.next_etc.parent
    dave, erin = owner_in(new, "dave"), owner_in(new, "erin")
    assert owner_in(new, "carol") == carol
    assert not {dave[0], erin[0]} & {*old.values(), *ids_of(system, 0).values(), first, second}
    assert answer["people"] == ["carol", "dave", "erin", "frank"]
    assert f"dave of the snapshot has the uid {dave[0]}, since {first} is taken" in answer["notes"]
    spool = system.files.var / "spool/cron"
    his = [system.home / "dave", system.home / "dave/file", system.files.var / "mail/dave", spool / "crontabs/dave"]
    assert {owner(path) for path in (*his, spool / "atjobs/a1", root / "usr/lib/of-dave/x")} == {dave}
    assert f"# atrun uid={dave[0]} gid={dave[1]}\n" in (spool / "atjobs/a1").read_text()
    assert owner(spool / "atjobs/a2")[0] == first, "it is another's"
    assert {owner(path) for path in (system.home / "carol", system.home / "carol/file")} == {carol}
    assert {owner(path) for path in (system.home / "staff/erin", root / "usr/lib/of-erin")} == {erin}
    system.ash("fsck", "--repair")
    assert ids_of(system, other)["dave"] == dave[0]
    assert owner(system.root(other) / "usr/lib/of-dave/x") == dave
    machine.deploy(other)
    machine.boot()
    assert owner_in(machine.etc, "carol") == carol
    assert machine.running("etc-update")["conflicts"] == []
    assert owner_in(system.root(other) / "etc", "carol") == carol, "she keeps the uid that her home has"
    program("userdel", "--root", machine.etc.parent, "carol")
    useradd(machine, "--uid", f"{first}", "--user-group", "gail")
    machine.running("etc-update")
    assert owner_in(system.root(other) / "etc", "gail") == owner(system.home / "gail") == carol


def test_a_service_account_of_the_running_system_keeps_its_uid_and_is_brought(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    data, own = "/var/lib/ash-test-own", "/usr/lib/of-own"
    make = f"useradd --system --create-home --home-dir {data} own; touch {own}; chown own: {own}"
    system.shell(other, make)
    uid = owner(system.root(other) / own.lstrip("/"))[0]
    words = ["--system", "--uid", str(uid), "--user-group", "--home-dir", "/var/lib/ash-test-mine", "mine"]
    program("useradd", "--root", machine.etc.parent, *words)
    answer = machine.deploy(other)
    assert answer["conflicts"] == []
    new = machine.next_etc
    assert owner_in(new, "mine") == owner_in(machine.etc, "mine")
    assert owner_in(new, "mine")[0] == uid
    its = owner_in(new, "own")
    assert its[0] not in (uid, *ids_of(system, 0).values())
    assert {owner(new.parent / own.lstrip("/")), owner(system.files.var / data.removeprefix("/var/"))} == {its}
    assert f"own of the snapshot has the uid {its[0]}, since {uid} is taken" in answer["notes"]
    again = machine.deploy(other, "--fresh")
    assert (owner_in(machine.next_etc, "own"), again["conflicts"]) == (its, [])
    system.ash("fsck", "--repair")
    assert owner_in(system.root(other) / "etc", "own") == its


def test_files_get_new_owners_only_once_the_accounts_have_the_new_ids(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    system.shell(other, "useradd -m --uid 2300 olga; mkdir /usr/lib/of-olga; chown olga: /usr/lib/of-olga")
    useradd(machine, "--uid", "2300", "--user-group", "otto")
    home = system.home / "olga"
    system.killed_before("(exchange|rename) snapshot-new-", "deploy", other)
    assert owner(home)[0] == 2300, "the deployment that has her with another uid is not there yet"
    system.ash("recover")
    assert owner(home)[0] == 2300
    assert not system.remains()
    system.killed_before("re-own olga", "deploy", other)
    assert "a deploy was interrupted" in system.ash("fsck", status=FAILED).stdout
    # As if her home were on another disk, which is mounted later than recovery runs.
    waiting = system.files.state / "work/deploy/owners"
    text = waiting.read_text()
    waiting.write_text(json.dumps({**json.loads(text), "foreign": ["home"]}))
    assert "/home is not mounted, and files of olga there" in system.ash("recover").stderr
    assert owner(home)[0] == 2300
    system.ash("run", other, "touch", "/usr/share/again")
    assert "rm /.snapshots/ash/work/deploy/owners" in system.ash("deploy", other, status=REFUSED).stderr
    waiting.write_text(text)
    system.ash("recover")
    new = machine.next_etc
    assert owner_in(new, "olga")[0] != 2300
    assert {owner(home), owner(new.parent / "usr/lib/of-olga")} == {owner_in(new, "olga")}
    assert not system.remains()


def test_a_carry_that_swaps_two_uids_swaps_the_owners_with_them(machine: Machine, snapshot: int) -> None:
    system, names = machine.system, ("anna", "bert")
    for name, uid in zip(names, (2401, 2402), strict=True):
        useradd(machine, "--uid", f"{uid}", "--user-group", name)
    system.shell(snapshot, "cd /usr/lib; mkdir of-anna of-bert; chown 2401:2401 of-anna; chown 2402:2402 of-bert")
    machine.deploy(snapshot)
    for step in ("exchange .ash-new and etc", "re-own usr/lib/of-bert", "nothing"):
        new = machine.next_etc
        uids = {name: owner_in(new, other)[0] for name, other in zip(names, reversed(names), strict=True)}
        passwd = (machine.etc / "passwd").read_text()
        for name, uid in uids.items():
            passwd = re.sub(rf"^{name}:x:\d+", f"{name}:x:{uid}", passwd, flags=re.MULTILINE)
        (machine.etc / "passwd").write_text(passwd)
        killed = system.with_hooks({"booted": machine.slot, "kill": step}, "carry")
        assert killed.returncode == (DONE if step == "nothing" else -signal.SIGKILL), (step, killed.stderr)
        system.ash("recover")
        for name in names:
            assert owner(new.parent / f"usr/lib/of-{name}")[0] == owner_in(new, name)[0], (step, name)
        assert not system.remains(), step
    assert {name: owner_in(new, name)[0] for name in names} == uids


def test_a_damaged_passwd_is_not_carried(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    useradd(machine, "zoe")
    machine.deploy(other)
    passwd, whole = machine.etc / "passwd", (machine.etc / "passwd").read_text()
    passwd.write_text(whole[: whole.index("zoe:") + 8])
    line = whole[: whole.index("zoe:")].count("\n") + 1
    (machine.etc / "issue").write_text("mine\n")
    for command in (["deploy", other], ["etc-update"]):
        with system.nothing_changes():
            error = machine.run(*command, status=REFUSED).error
        assert f"line {line} of the running /etc/passwd is not an account (accounts would be lost: correct it" in error
    answer = machine.running("carry")
    assert (answer["carried"], answer["conflicts"]) == (["issue"], ["passwd"])
    assert "zoe:x:" in (machine.next_etc / "passwd").read_text()
    answer = machine.deploy(other, "--fresh-etc")
    assert f"no accounts were brought: line {line} of the running /etc/passwd is not an account" in answer["notes"]
    passwd.write_text(whole)
    machine.deploy(other)
    assert "zoe:x:" in (machine.next_etc / "passwd").read_text()


def test_homes_that_are_not_apart_are_refused(machine: Machine) -> None:
    other = machine.system.clone()
    machine.system.shell(other, "useradd --no-create-home --uid 3000 --home-dir /home/shared/of-one one")
    useradd(machine, "--uid", "3000", "two", home="home/shared")
    with machine.system.nothing_changes():
        error = machine.system.ash("deploy", other, status=REFUSED).error
    assert ("one" in error, "two" in error) == (True, True)
    machine.system.ash("del", other, "-y")


def test_usermod_renames_a_user(system: System, snapshot: int) -> None:
    system.shell(snapshot, "useradd --create-home --password '$y$j9T$salt$hash' rick")
    uid, gid = ids_of(system, snapshot)["rick"], ids_of(system, snapshot, "group")["rick"]
    system.shell(snapshot, "usermod --login dick rick; groupmod --new-name dick rick")
    assert (ids_of(system, snapshot)["dick"], ids_of(system, snapshot, "group")["dick"]) == (uid, gid)
    assert owner(system.home / "rick")[0] == uid
    system.shell(snapshot, "usermod --login nick --home /home/nick --move-home dick; useradd rick")
    assert ids_of(system, snapshot)["nick"] == uid != ids_of(system, snapshot)["rick"]
