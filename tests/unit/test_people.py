# SPDX-License-Identifier: AGPL-3.0-or-later
"""People follow the machine: nobody there loses name, uid, password or home, whatever is deployed."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ash import (
    ACCOUNT_FILES,
    AccountFile,
    AccountIds,
    Accounts,
    AshError,
    EtcMerge,
    PeopleMerge,
    has_password,
    later_password,
)

pytestmark = pytest.mark.budget(40)

HASH, OTHER = "$y$j9T$salt$one", "$y$j9T$salt$two"


def write(etc: Path, users: dict[str, dict[str, Any]], groups: dict[str, tuple[int, str]] | None = None) -> Path:
    """Write the account files of an /etc with root and some users, each with a group of its name."""
    etc.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {name: [] for name in ACCOUNT_FILES}
    for user, its in {"root": {"uid": 0, "home": "/root"}, **users}.items():
        uid, password = its["uid"], its.get("password", "!")
        rows["passwd"].append(f"{user}:x:{uid}:{uid}:{its.get('name', '')}:{its.get('home', f'/home/{user}')}:/bin/sh")
        rows["shadow"].append(f"{user}:{password}:{its.get('day', 20000)}:0:99999:7::{its.get('expires', '')}:")
        if its.get("group", True):
            rows["group"].append(f"{user}:x:{uid}:")
            rows["gshadow"].append(f"{user}:!::")
        if uid >= 1000:
            start = its.get("range", 100000 + 65536 * (uid - 1000))
            for name in ("subuid", "subgid"):
                rows[name].append(f"{user}:{start}:65536")
    for group, (gid, members) in (groups or {}).items():
        rows["group"].append(f"{group}:x:{gid}:{members}")
        rows["gshadow"].append(f"{group}:!::{members}")
    for name, lines in rows.items():
        (etc / name).write_text("".join(f"{line}\n" for line in lines))
    return etc


def bring(
    base: Path, running: Path, own: Path, ids: AccountIds, brought: Sequence[Path] = ()
) -> tuple[PeopleMerge, EtcMerge]:
    """Merge people, then all else, as a deploy does."""
    people = PeopleMerge(base, running, own, ids, brought=brought)
    people.write()
    merge = EtcMerge(base, running, own, own.parent / "conflicts/7-now", str)
    merge.settled = people.settled
    merge.merge()
    people.prune(merge)
    return people, merge


class Case:
    """Three states of /etc, and the merge of people between them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ids = AccountIds()

    def merge(
        self, base: dict[str, Any], running: dict[str, Any], own: dict[str, Any], groups: Sequence[dict[str, Any]] = ()
    ) -> PeopleMerge:
        """Merge people of the running system, by the states of users and groups."""
        a, b, c = groups or ({}, {}, {})
        etc = self.directory / "own"
        write(self.directory / "base", base, a)
        write(self.directory / "running", running, b)
        self.ids.learn(write(etc, own, c))
        people, merge = bring(self.directory / "base", self.directory / "running", etc, self.ids)
        assert merge.in_conflict == []
        return people

    def rows(self, name: str) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in AccountFile.read(self.directory / "own" / name).rows}

    def uids(self) -> dict[str, int]:
        return {user: int(row[1]) for user, row in self.rows("passwd").items() if user != "root"}

    def password(self, user: str) -> str:
        return self.rows("shadow")[user][0]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


ADA = {"ada": {"uid": 1000, "password": HASH}}


def test_people_of_the_running_system_are_in_every_deployment_even_without_drift(case: Case) -> None:
    people = case.merge(ADA, ADA, {})
    assert (case.uids(), case.password("ada"), people.names) == ({"ada": 1000}, HASH, ["ada"])
    assert case.rows("group")["ada"][1] == "1000"
    assert case.rows("gshadow")["ada"] == ["!", "", ""]
    assert case.rows("subuid")["ada"] == case.rows("subgid")["ada"] == ["100000", "65536"]


def test_who_is_in_the_snapshot_alone_stays(case: Case) -> None:
    people = case.merge({}, ADA, {"bob": {"uid": 1001, "password": OTHER}})
    assert (case.uids(), case.password("bob"), people.notes) == ({"bob": 1001, "ada": 1000}, OTHER, [])


def test_roots_password_follows_even_without_drift(case: Case, tmp_path: Path) -> None:
    for side, password in (("base", HASH), ("running", HASH), ("own", "")):
        write(tmp_path / side, {})
        (tmp_path / side / "shadow").write_text(f"root:{password}:20000:0:99999:7:::\n")
    people = PeopleMerge(tmp_path / "base", tmp_path / "running", tmp_path / "own", AccountIds())
    assert people.write() == ["shadow"]
    assert case.password("root") == HASH


@pytest.mark.parametrize(
    ("was", "now", "theirs", "result"),
    [
        (None, (HASH, "20001"), (OTHER, "20000"), (HASH, "20001")),  # the one set last
        (None, (HASH, "20000"), (OTHER, "20001"), (OTHER, "20001")),
        ((HASH, "20000"), (HASH, "20000"), (OTHER, "20001"), (OTHER, "20001")),
        (None, (HASH, "20000"), (OTHER, "20000"), (HASH, "20000")),
        (None, (HASH, "0"), (OTHER, "20001"), (HASH, "0")),  # has to be changed at the next login
        (None, (HASH, ""), (OTHER, "20001"), (HASH, "")),
        ((OTHER, "20001"), (HASH, "20000"), (OTHER, "20001"), (HASH, "20000")),  # only the running system changed it
        ((OTHER, "20001"), ("", "20002"), (OTHER, "20001"), ("", "20002")),
        (None, (HASH, "20000"), ("", "20001"), (HASH, "20000")),  # never an empty one
        (None, (HASH, "20000"), ("!", "20001"), (HASH, "20000")),
        (None, (HASH, "20000"), ("*", "20001"), (HASH, "20000")),
        (None, ("", "20001"), (HASH, "20000"), (HASH, "20000")),
        (None, ("!", "20001"), (HASH, "20000"), (HASH, "20000")),
        (None, ("", "20001"), ("!", "20000"), ("!", "20000")),
        (None, (f"!{HASH}", "20000"), (HASH, "20000"), (f"!{HASH}", "20000")),  # a lock
        (None, (HASH, "20000"), (f"!{HASH}", "20000"), (f"!{HASH}", "20000")),
        (None, (f"!{HASH}", "20000"), (OTHER, "20001"), (f"!{OTHER}", "20001")),
        ((f"!{HASH}", "20000"), (HASH, "20000"), (f"!{HASH}", "20000"), (HASH, "20000")),  # unlocked
    ],
)
def test_the_password_that_was_set_last_and_any_lock_count(
    was: tuple[str, str] | None, now: tuple[str, str], theirs: tuple[str, str], result: tuple[str, str]
) -> None:
    merged = later_password(["ada", *was] if was else None, ["ada", *now], ["ada", *theirs])
    assert tuple(merged) == result


def test_an_account_that_expires_on_one_side_expires(case: Case) -> None:
    case.merge(ADA, {"ada": {**ADA["ada"], "expires": 1}}, {"ada": {**ADA["ada"], "day": 20005}})
    assert case.rows("shadow")["ada"][6] == "1"
    case.merge({}, ADA, {"ada": {**ADA["ada"], "expires": 7}})
    assert case.rows("shadow")["ada"][6] == "7"


def test_who_was_deleted_in_the_running_system_is_deleted_with_all_rows(case: Case) -> None:
    groups: dict[str, Any] = {"sudo": (27, "ada,bob")}
    both = {**ADA, "bob": {"uid": 1001}}
    changed = {**both, "ada": {"uid": 1000, "password": OTHER, "day": 20009}}
    people = case.merge(both, {"bob": {"uid": 1001}}, changed, [groups, {"sudo": (27, "bob")}, groups])
    assert people.names == ["ada"]
    for name in ACCOUNT_FILES:
        assert "ada" not in (case.directory / "own" / name).read_text(), name
    assert case.rows("group")["sudo"][2] == "bob"


def test_people_are_in_the_groups_in_which_the_running_system_has_them(case: Case) -> None:
    running: dict[str, Any] = {"sudo": (27, "ada"), "docker": (998, "ada"), "friends": (1500, "ada")}
    people = case.merge(ADA, ADA, {}, [running, running, {"sudo": (27, "")}])
    assert case.rows("group")["sudo"][2] == case.rows("gshadow")["sudo"][2] == "ada"
    assert case.rows("group")["friends"] == ["x", "1500", "ada"]
    assert "docker" not in case.rows("group")
    assert people.notes == ["the snapshot has no group docker, so ada cannot be in it"]


def test_a_membership_that_was_taken_away_is_gone_and_one_of_the_snapshot_is_named(case: Case) -> None:
    groups: list[dict[str, Any]] = [{"sudo": (27, "ada"), "audio": (29, "")}, {"sudo": (27, ""), "audio": (29, "")}]
    people = case.merge(ADA, ADA, ADA, [*groups, {"sudo": (27, "ada"), "audio": (29, "ada")}])
    assert (case.rows("group")["sudo"][2], case.rows("group")["audio"][2]) == ("", "ada")
    assert people.notes == ["ada is still in the group audio, as in the snapshot"]


def test_a_new_shell_or_name_in_the_snapshot_is_kept(case: Case) -> None:
    case.merge(ADA, ADA, {"ada": {**ADA["ada"], "name": "Ada L"}})
    assert case.rows("passwd")["ada"][3] == "Ada L"
    case.merge(ADA, {"ada": {**ADA["ada"], "name": "Ada K"}}, {"ada": {**ADA["ada"], "name": "Ada L"}})
    assert case.rows("passwd")["ada"][3] == "Ada K"


def test_of_two_with_one_uid_the_one_of_the_running_system_keeps_it(case: Case) -> None:
    people = case.merge({}, {"carol": {"uid": 1000}}, {"dave": {"uid": 1000}})
    assert case.uids() == {"dave": 1001, "carol": 1000}
    assert case.rows("passwd")["dave"][2] == case.rows("group")["dave"][1] == "1001"
    assert case.rows("subuid") == case.rows("subgid") == {"dave": ["165536", "65536"], "carol": ["100000", "65536"]}
    assert people.users == people.groups == {1000: 1001}
    (dave,) = people.belongings
    assert (dave.user, dave.home, dave.users[1000], dave.groups[1000]) == ("dave", "/home/dave", 1001, 1001)
    assert dave.user_ranges == dave.group_ranges == {100000: 165536}, "files of his containers"
    assert people.notes == ["dave of the snapshot has the uid 1001, since 1000 is taken"]
    assert case.ids.given["passwd"] == {"root": 0, "dave": 1001, "carol": 1000}


def test_a_uid_that_was_given_once_is_given_again(case: Case) -> None:
    """Also if nobody clashes any more: the files have that owner."""
    case.merge({}, {"carol": {"uid": 1000}}, {"dave": {"uid": 1000}})
    people = case.merge({}, {}, {"dave": {"uid": 1000}})
    assert case.uids() == {"dave": 1001}
    assert people.users == {1000: 1001}
    again = case.merge({}, {"carol": {"uid": 1000}, "frank": {"uid": 1001}}, {"dave": {"uid": 1000}})
    assert case.uids() == {"dave": 1002, "carol": 1000, "frank": 1001}
    assert {old: again.belongings[0].users[old] for old in (1000, 1001)} == {1000: 1002, 1001: 1002}


def test_everybody_has_the_uid_of_the_running_system(case: Case) -> None:
    people = case.merge({}, {"ada": {"uid": 1000}, "bob": {"uid": 1001}}, {"ada": {"uid": 1001}, "bob": {"uid": 1000}})
    assert case.uids() == {"ada": 1000, "bob": 1001}
    assert people.users == {1001: 1000, 1000: 1001}
    assert people.belongings == [], "their homes are as the running system has them"


def test_a_second_name_for_a_uid_follows_the_first(case: Case) -> None:
    own = {"ada": {"uid": 1001}, "ada2": {"uid": 1001, "home": "/home/ada", "group": False}}
    case.merge({}, {"ada": {"uid": 1000}}, own)
    assert case.uids() == {"ada": 1000, "ada2": 1000}
    both = {"ada": {"uid": 1000}, "ada2": {"uid": 1000, "home": "/home/ada", "group": False}}
    case.merge({}, both, {})
    assert case.uids() == {"ada": 1000, "ada2": 1000}


def test_homes_that_are_not_apart_are_refused(case: Case) -> None:
    for home in ("/home/carol/dave", "/home", "/home/carol/"):
        if home == "/home":
            case.merge({}, {"carol": {"uid": 1000}}, {"dave": {"uid": 1000, "home": home}})
            assert case.uids() == {"dave": 1001, "carol": 1000}, "that is nobody's home"
            continue
        own = {"dave": {"uid": 1000, "home": home}, "carol": {"uid": 1003}}
        with pytest.raises(AshError, match=r"dave of the snapshot and carol of the running system"):
            case.merge({}, {"carol": {"uid": 1000}}, own)


def test_a_renamed_user_is_the_same_user(case: Case) -> None:
    bob = {"bob": {"uid": 1000, "home": "/home/ada", "password": HASH}}
    sudo: list[dict[str, Any]] = [
        {"sudo": (27, "bob")},
        {"sudo": (27, "bob")},
        {"sudo": (27, "ada"), "audio": (29, "ada")},
    ]
    case.merge(bob, bob, {"ada": {**ADA["ada"], "password": OTHER, "day": 20005}}, sudo)
    assert (case.uids(), case.password("bob")) == ({"bob": 1000}, OTHER)
    assert (case.rows("group")["sudo"][2], case.rows("group")["audio"][2]) == ("bob", "bob")
    assert "ada" not in case.rows("group")
    moved = {"bob": {"uid": 1000, "password": HASH}}
    case.merge(moved, moved, ADA)
    assert case.uids() == {"bob": 1000}, "the hash of the password tells"


def test_a_user_who_was_renamed_in_the_snapshot_has_the_new_name(case: Case) -> None:
    before, after = case.directory / "before", case.directory / "after"
    bob = {"bob": {"uid": 1000, "home": "/home/ada", "password": HASH}}
    assert case.ids.settle(write(before, ADA), write(after, bob)).accounts == {}
    assert (case.ids.given["passwd"], case.ids.renamed) == ({"root": 0, "bob": 1000}, {"ada": "bob"})
    people = case.merge(ADA, {"ada": {"uid": 1000, "password": OTHER, "day": 20005}}, bob)
    assert (case.uids(), case.password("bob"), people.names) == ({"bob": 1000}, OTHER, ["bob"])
    assert case.ids.settle(after, before).accounts == {}
    assert case.ids.renamed == {"bob": "ada"}


def test_a_service_account_keeps_its_ids_and_that_of_the_target_gets_others(tmp_path: Path) -> None:
    one, two = ({f"_{name}": {"uid": 990}} for name in ("one", "two"))
    base, running, own = write(tmp_path / "base", {}), write(tmp_path / "running", one), write(tmp_path / "own", two)
    people, merge = bring(base, running, own, AccountIds())
    assert merge.in_conflict == []
    for name in ("passwd", "group"):
        assert AccountFile.read(own / name).ids == {"root": 0, "_one": 990, "_two": 999}
    assert people.notes == ["_two of the snapshot has the uid 999, since 990 is taken"]
    assert [(one.user, one.users, one.groups) for one in people.belongings] == [("_two", {990: 999}, {990: 999})]
    # Who was deleted in the running system gets none.
    was, now = write(tmp_path / "was", two), write(tmp_path / "now", one)
    people, merge = bring(was, now, own := write(tmp_path / "its", two), AccountIds())
    assert (people.notes, people.belongings, merge.in_conflict) == ([], [], [])
    assert AccountFile.read(own / "passwd").ids == AccountFile.read(own / "group").ids == {"root": 0, "_one": 990}
    # Who has it everywhere, or shares it on purpose, keeps it.
    known = write(tmp_path / "known", {**two, **one})
    assert bring(known, known, write(tmp_path / "other", two), AccountIds())[0].belongings == []


@pytest.mark.parametrize("changed", [False, True], ids=["the target's passwd is as it was", "both changed theirs"])
def test_an_account_does_not_get_into_the_group_that_has_its_group_s_id_in_the_target(
    tmp_path: Path, changed: bool
) -> None:
    base, running, own = (write(tmp_path / side, {}) for side in ("base", "running", "own"))
    shadow = "_one:!:20000::::::\n"
    with (own / "subuid").open("a") as subuid:
        subuid.write("of-the-network:300000:65536\n")
    for etc, lines in (
        (running, {"passwd": "_one:x:980:990::/:/bin/sh\n_sharing:x:981:995::/:/bin/sh\n", "shadow": shadow}),
        (running, {"group": "_one:x:990:\n_new:x:995:\n"}),
        (own, {"group": "_two:x:990:\n", "passwd": "_two:x:985:990::/:/bin/sh\n" if changed else ""}),
    ):
        for name, text in lines.items():
            with (etc / name).open("a") as file:
                file.write(text)
    _, merge = bring(base, running, own, AccountIds())
    assert merge.in_conflict == ["group", "passwd"]
    assert AccountFile.read(own / "group").ids == {"root": 0, "_two": 990, "_new": 995}
    users = AccountFile.read(own / "passwd").ids
    assert users == {"root": 0, "_sharing": 981, **({"_two": 985} if changed else {})}
    assert all("_one" not in (own / name).read_text() for name in ACCOUNT_FILES), "not in shadow either"
    assert "of-the-network" in (own / "subuid").read_text()
    assert "_one" in (merge.conflicts / "etc/passwd").read_text()


@pytest.mark.parametrize("known", [False, True])
def test_nobody_gets_into_the_group_that_has_the_id_of_his_own_in_the_target(case: Case, known: bool) -> None:
    """The group gets another id there, also if the running system has just got it; back there it has its own again."""
    staff, other = {"staff": (999, "")}, {"_packages": (999, "")}
    ada = {"ada": {"uid": 1000, "group": False}}
    base, running, own = (case.directory / side for side in ("base", "running", "own"))
    for etc in (base, running):
        write(etc, ada, staff if known or etc == running else {})
        (etc / "passwd").write_text((etc / "passwd").read_text().replace(":1000:1000:", ":1000:999:"))
    people, merge = bring(base, running, write(own, {}, other), case.ids)
    groups = AccountFile.read(own / "group").ids
    assert (groups["_packages"], merge.in_conflict) == (999, [])
    assert case.rows("passwd")["ada"][1:3] == ["1000", str(groups["staff"])] != ["1000", "999"]
    assert people.notes == [f"the group staff has the gid {groups['staff']} in the snapshot, since 999 is taken"]
    bring(own, own, running, case.ids)
    assert "ada:x:1000:999:" in (running / "passwd").read_text()
    assert AccountFile.read(running / "group").ids["staff"] == 999


@pytest.mark.parametrize("known", [False, True])
def test_a_group_that_is_carried_is_not_said_to_be_missing(case: Case, known: bool) -> None:
    docker = {"docker": (998, "ada")}
    people = case.merge(ADA, ADA, ADA, groups=(docker if known else {}, docker, {}))
    assert ("docker" in case.rows("group")) is not known
    assert people.notes == (["the snapshot has no group docker, so ada cannot be in it"] if known else [])


def test_passwords_are_as_secret_as_before_where_there_were_none(tmp_path: Path) -> None:
    base, running, own = (write(tmp_path / side, ADA) for side in ("base", "running", "own"))
    for name in ("shadow", "gshadow"):
        for etc in (base, running):
            (etc / name).chmod(0o640)
        (own / name).unlink()
    bring(base, running, own, AccountIds())
    assert HASH in (own / "shadow").read_text()
    assert {(own / name).stat().st_mode & 0o777 for name in ("shadow", "gshadow")} == {0o640}


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "damage"),
    [
        ("passwd", r"(?s).*", "", "/etc/passwd has no line of root"),
        ("passwd", r"(?s)^root.*?\n", "", "/etc/passwd has no line of root"),
        ("passwd", r"ada:x:1000:.*\n", "ada:x:10", "line 2 of the running /etc/passwd is not an account"),
        ("passwd", r"ada:x:1000:.*\n", "\0" * 40, "line 2 of the running /etc/passwd is not an account"),
        ("passwd", r"ada:x:1000:", "ada:x:1OOO:", "line 2 of the running /etc/passwd is not an account"),
        ("passwd", r"(?s)\nada.*", "", "/etc/passwd ends in the middle of line 1"),
        ("group", r"(?s).*", "", "/etc/group has no line of root"),
        ("group", r"ada:x:1000:", "ada:x", "line 2 of the running /etc/group is not an account"),
        ("shadow", r"ada:.*\n", "ada:", "line 2 of the running /etc/shadow is not an account"),
        ("shadow", r"ada:.*\n", "", "/etc/shadow has no line of ada"),
        ("subuid", r"ada:.*\n", "ada:1", "line 1 of the running /etc/subuid is not an account"),
    ],
)
def test_a_damaged_file_deletes_nobody(tmp_path: Path, file: str, pattern: str, replacement: str, damage: str) -> None:
    base, running, own = (write(tmp_path / side, ADA) for side in ("base", "running", "own"))
    text, changes = re.subn(pattern, replacement, (running / file).read_text(), count=1)
    assert changes
    (running / file).write_text(text)
    before = {name: (own / name).read_text() for name in ACCOUNT_FILES}
    people = PeopleMerge(base, running, own, AccountIds())
    assert damage in people.damage
    assert people.write() == []
    assert {name: (own / name).read_text() for name in ACCOUNT_FILES} == before
    assert people.notes == [f"no accounts were brought: {people.damage}"]


def test_a_line_that_was_always_there_is_no_damage(tmp_path: Path) -> None:
    base, running, own = (write(tmp_path / side, ADA) for side in ("base", "running", "own"))
    for etc in (base, running):
        (etc / "passwd").write_text((etc / "passwd").read_text() + "odd:x\n")
    (running / "group").write_text((running / "group").read_text() + "\n# mine\n+::::\n")
    (running / "subuid").write_text("")
    assert not PeopleMerge(base, running, own, AccountIds()).damage


def test_clashes_of_a_snapshot_with_the_running_system_are_named(tmp_path: Path) -> None:
    running, own = (
        write(tmp_path / "running", ADA),
        write(tmp_path / "own", {"bob": {"uid": 1000}, "cy": {"uid": 1001}}),
    )
    people = PeopleMerge(running, running, own, AccountIds())
    clashes = {name: "100000" if name.startswith("sub") else "1000" for name in ("group", "passwd", "subgid", "subuid")}
    assert people.clashes() == [
        f"bob has the id {i} in {name}, as ada in the running system" for name, i in clashes.items()
    ]
    assert people.renumbering().accounts["passwd"] == {"bob": 1002}


def test_rows_of_shadow_without_an_account_are_found(tmp_path: Path) -> None:
    etc = write(tmp_path / "etc", ADA)
    assert Accounts(etc).orphans() == {"shadow": set(), "gshadow": set()}
    (etc / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    assert Accounts(etc).orphans() == {"shadow": {"ada"}, "gshadow": set()}


# Any sequence of commands


NAMES = ["ada", "bob"]


class Life(RuleBasedStateMachine):
    """A machine, its snapshots, and the owners of the homes."""

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(Life.directory) / "life"
        shutil.rmtree(self.top, ignore_errors=True)
        self.ids = AccountIds()
        self.homes: dict[str, int] = {}
        self.clock = 0
        self.snapshots = 3
        self.booted = 1
        self.deleted: set[str] = set()  # in the running system, and not made again

    directory = ""

    @initialize()
    def install(self) -> None:
        for place in ("0", "1", "2", "running", "base", "brought"):
            write(self.top / place, {})
        self.ids.learn(self.top / "0")

    def users(self, place: str = "running") -> dict[str, dict[str, Any]]:
        etc = self.top / place
        shadow = {row[0]: row for row in AccountFile.read(etc / "shadow").rows}
        starts = AccountFile.read(etc / "subuid").ids
        return {
            row[0]: {
                "uid": int(row[2]), "home": row[5], "password": shadow[row[0]][1], "day": shadow[row[0]][2],
                "range": starts[row[0]],
            }
            for row in AccountFile.read(etc / "passwd").rows
            if row[0] != "root"
        }  # fmt: skip

    def useradd(self, name: str, place: str) -> None:
        """As useradd does it, with the lowest free uid and range."""
        users = self.users(place)
        uid = next(uid for uid in range(1000, 2000) if uid not in [its["uid"] for its in users.values()])
        starts = [its["range"] for its in users.values()]
        users[name] = {"uid": uid, "home": f"/home/{name}", "password": "!", "day": 20000 + self.clock}
        users[name]["range"] = next(start for start in range(100000, 1 << 24, 65536) if start not in starts)
        write(self.top / place, users)
        self.deleted.discard(name)
        self.homes[f"/home/{name}"] = uid

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        if name not in self.users() and f"/home/{name}" not in self.homes:
            self.useradd(name, "running")

    @rule(name=st.sampled_from(NAMES), remove=st.booleans())
    def delete(self, name: str, remove: bool) -> None:
        users = self.users()
        if name in users:
            home = users.pop(name)["home"]
            write(self.top / "running", users)
            self.deleted.add(name)
            if remove:
                self.homes.pop(home, None)

    @rule(name=st.sampled_from(NAMES), days=st.integers(0, 1), locked=st.booleans())
    def passwd(self, name: str, days: int, locked: bool) -> None:
        users = self.users()
        if name in users:
            self.clock += days
            mark = "!" if locked else ""
            users[name] |= {
                "password": f"{mark}$y${len(self.top.parts)}{self.clock}{name}{locked}",
                "day": 20000 + self.clock,
            }
            write(self.top / "running", users)

    @rule(old=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def usermod(self, old: str, new: str) -> None:
        users = self.users()
        if old in users and new not in users and f"/home/{new}" not in self.homes:
            write(self.top / "running", {new if name == old else name: its for name, its in users.items()})
            self.deleted.discard(new)

    @rule()
    def clone(self) -> None:
        shutil.copytree(self.top / f"{self.booted}", self.top / f"{self.snapshots}")
        self.snapshots += 1

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def run_useradd(self, name: str, data: st.DataObject) -> None:
        place = str(data.draw(st.integers(1, self.snapshots - 1)))
        if name in self.users(place) or f"/home/{name}" in self.homes:
            return
        before = self.top / "before"
        shutil.copytree(self.top / place, before)
        self.useradd(name, place)
        self.commit(before, place)
        self.homes[f"/home/{name}"] = self.users(place)[name]["uid"]

    def commit(self, before: Path, place: str) -> None:
        self.ids.learn_machine(self.top / "running")
        renumbering = self.ids.settle(before, self.top / place)
        (self.top / "root").mkdir(exist_ok=True)
        (self.top / "root/etc").symlink_to(self.top / place)
        renumbering.apply(self.top / "root", {})
        (self.top / "root/etc").unlink()
        shutil.rmtree(before)

    def bring(self, place: str) -> None:
        brought = self.top / "brought"
        people, _ = bring(self.top / "base", self.top / "running", self.top / place, self.ids, [brought])
        for mine in people.belongings:
            if mine.home in self.homes:
                self.homes[mine.home] = mine.users.get(self.homes[mine.home], self.homes[mine.home])

    @rule()
    @precondition(lambda self: self.booted > 0)
    def etc_update(self) -> None:
        before = self.top / "before"
        shutil.copytree(self.top / f"{self.booted}", before)
        try:
            self.bring(f"{self.booted}")
        except AshError:
            shutil.rmtree(before)
            return
        self.commit(before, f"{self.booted}")
        shutil.rmtree(self.top / "base")
        shutil.copytree(self.top / "running", self.top / "base")

    @rule(data=st.data())
    def deploy(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.snapshots - 1))
        before, own = self.users(), self.users(f"{number}")
        gone = (self.users("base").keys() | self.deleted) - before.keys()
        shutil.copytree(self.top / f"{number}", self.top / "new")
        try:
            self.bring("new")
        except AshError:  # homes that are not apart
            shutil.rmtree(self.top / "new")
            return
        after = self.users("new")
        assert not gone & after.keys(), "who was deleted is there again"
        for was_called, its in before.items():
            name = was_called if was_called in after else self.ids.renamed.get(was_called, was_called)
            assert name in after, f"{name} is gone"
            assert after[name]["uid"] == its["uid"], f"{name} has another uid"
            was = own.get(name, its)["password"]
            if has_password(its["password"]):
                assert after[name]["password"].lstrip("!") == its["password"].lstrip("!"), f"{name} has another one"
            if after[name]["password"].startswith("!") and not its["password"].startswith("!"):
                assert was.startswith("!"), f"{name} is locked, and was on neither side"
        shutil.rmtree(self.top / "brought")
        (self.top / "running").rename(self.top / "brought")
        shutil.rmtree(self.top / "base")
        (self.top / "new").rename(self.top / "running")
        shutil.copytree(self.top / f"{number}", self.top / "base")
        self.booted = number

    @rule()
    def rollback(self) -> None:
        self.ids.learn_machine(self.top / "running", self.top / "base", self.top / "brought")  # by its deploy
        shutil.copytree(self.top / "running", self.top / f"{self.snapshots}")
        shutil.rmtree(self.top / "base")
        shutil.copytree(self.top / "running", self.top / "base")
        self.booted = self.snapshots
        self.snapshots += 1

    @invariant()
    def everybody_owns_the_own_home(self) -> None:
        if not (self.top / "running").exists():
            return
        users = self.users()
        for name, its in users.items():
            assert self.homes.get(its["home"], its["uid"]) == its["uid"], f"{name} does not own {its['home']}"
        uids = [its["uid"] for its in users.values()]
        assert len(uids) == len({*uids}), "two share a uid"
        for file in ("shadow", "subuid", "subgid"):
            assert {row[0] for row in AccountFile.read(self.top / "running" / file).rows} - {"root"} == users.keys()


def test_nobody_loses_name_uid_password_or_home_in_any_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # thousands of them
    Life.directory = str(tmp_path)
    run_state_machine_as_test(Life, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))
