# SPDX-License-Identifier: AGPL-3.0-or-later
"""Accounts: a name has the same uid or gid in all snapshots, and no two names share one but on purpose."""

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ash
from ash import ID_FILES, AccountFile, AccountIds, AshError, Renumbering, account_rows, free_id, is_misnumbered

pytestmark = pytest.mark.budget(15)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can chown")


def etc_with(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def passwd(accounts: dict[str, int]) -> str:
    return "".join(f"{name}:x:{number}:{number}::/:/bin/sh\n" for name, number in accounts.items())


def settled(
    given_before: dict[str, int], before: dict[str, int], after: dict[str, int], directory: Path
) -> tuple[AccountIds, dict[int, int]]:
    ids = AccountIds()
    ids.given["passwd"].update(given_before)
    old = etc_with(directory / "before", passwd=passwd(before))
    new = etc_with(directory / "after", passwd=passwd(after))
    return ids, dict(ids.settle(old, new).moves.get("passwd", {}))


def test_a_new_account_keeps_an_unused_id(tmp_path: Path) -> None:
    ids, moves = settled({"root": 0}, {"root": 0}, {"root": 0, "_chrony": 100}, tmp_path)
    assert moves == {}
    assert ids.given["passwd"] == {"root": 0, "_chrony": 100}


def test_a_new_account_with_a_taken_id_gets_another_of_its_kind(tmp_path: Path) -> None:
    ids, moves = settled({"_chrony": 100}, {}, {"debian-tor": 100}, tmp_path)
    assert moves == {100: ids.given["passwd"]["debian-tor"]}
    assert 100 < ids.given["passwd"]["debian-tor"] < 1000
    ids, moves = settled({"ada": 1000}, {}, {"bob": 1000}, tmp_path)
    assert ids.given["passwd"]["bob"] == 1001


def test_a_known_account_gets_its_id_back(tmp_path: Path) -> None:
    _, moves = settled({"_chrony": 100, "debian-tor": 101}, {}, {"debian-tor": 100, "_chrony": 101}, tmp_path)
    assert moves == {100: 101, 101: 100}


def test_accounts_from_before_the_transaction_are_left_alone(tmp_path: Path) -> None:
    _, moves = settled({"ada": 1000}, {"ada": 1005}, {"ada": 1005}, tmp_path)
    assert moves == {}


def test_root_keeps_uid_0(tmp_path: Path) -> None:
    """`useradd -o -u 0 toor` creates a second name for root on purpose."""
    _, moves = settled({"root": 0}, {"root": 0}, {"root": 0, "toor": 0}, tmp_path)
    assert 0 not in moves


def test_an_id_shared_on_purpose_moves_no_files(tmp_path: Path) -> None:
    _, moves = settled({"ada": 1000}, {"ada": 1000}, {"ada": 1000, "ada-too": 1000}, tmp_path)
    assert 1000 not in moves


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(100, 106), max_size=6),
    st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(100, 106), max_size=6), max_size=5),
)
def test_no_two_accounts_share_an_id_after_any_sequence(
    tmp_path_factory: pytest.TempPathFactory, first: dict[str, int], later: list[dict[str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("ids")
    ids, seen = AccountIds(), dict[str, int]()
    for step, wanted in enumerate([first, *later]):
        # No package manager allocates an id twice in one snapshot.
        accounts = {name: number for number, name in {number: name for name, number in wanted.items()}.items()}
        old, new = (
            etc_with(directory / f"{step}o", passwd=""),
            etc_with(directory / f"{step}n", passwd=passwd(accounts)),
        )
        moves = ids.settle(old, new).moves.get("passwd", {})
        for name, number in accounts.items():
            settled_id = moves.get(number, number)
            assert seen.setdefault(name, settled_id) == settled_id, f"{name} has another id than before"
    given_ids = list(ids.given["passwd"].values())
    assert len(set(given_ids)) == len(given_ids)
    shutil.rmtree(directory)


@given(st.sampled_from(ID_FILES), st.integers(1, 59999), st.sets(st.integers(1, 1200)))
def test_a_free_id_is_unused_and_of_the_same_kind(name: str, like: int, taken: set[int]) -> None:
    if len(taken & set(range(1, 1000))) == 999:
        return
    number = free_id(name, like, taken)
    assert number not in taken
    if not name.startswith("sub"):
        assert (number < 1000) == (like < 1000)
        assert number > 0


def test_subordinate_ranges_do_not_overlap() -> None:
    taken = {100000, 165536}
    assert free_id("subuid", 100000, taken) == 231072


def test_running_out_of_ids_is_an_error() -> None:
    with pytest.raises(AshError):
        free_id("passwd", 100, set(range(1, 1000)))


def test_lines_that_are_not_accounts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    text = b"# comment\n\n+::::::\nroot:x:0:0::/:\nbroken:x\nno:x:number:1::/:\nlat\xe9n:x:7:7::/:\n"
    path.write_bytes(text)
    file = AccountFile.read(path)
    assert list(file.ids.values()) == [0, 7]
    assert str(file).encode(errors="surrogateescape") == text
    assert AccountFile.read(tmp_path / "nowhere").ids == {}


def test_a_symlink_counts_as_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "host").write_text("ada:x:1000:1000::/:\n")
    (tmp_path / "passwd").symlink_to("host")
    assert AccountFile.read(tmp_path / "passwd").rows == []


def test_the_first_range_of_an_account_is_its_id() -> None:
    file = AccountFile("subuid", "ada:100000:65536\nada:300000:65536\n")
    assert file.ids == {"ada": 100000}
    assert list(account_rows(file)) == ["ada:100000:65536", "ada:300000:65536"]


def test_the_registry_survives_a_round_trip_and_damage_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    with pytest.raises(AshError, match="missing"):  # an empty one would give ids again that other snapshots have
        AccountIds.load(path)
    ids = AccountIds(deleted={"passwd": {"bob"}})
    ids.learn(etc_with(tmp_path / "etc", passwd=passwd({"ada": 1000}), subuid="ada:100000:65536\n"))
    path.write_text(ids.dump())
    assert (AccountIds.load(path).given, AccountIds.load(path).deleted) == (ids.given, ids.deleted)
    assert ids.given["subuid"] == {"ada": 100000}
    for text in ("", "{", "[]", '{"passwd": {"a": "x"}}', '{"passwd": 7}', '{"deleted": {"passwd": 7}}'):
        path.write_text(text)
        with pytest.raises(AshError, match="damaged"):
            AccountIds.load(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root in which a transaction created the user and group `new`, both with id 100."""
    root = tmp_path / "root"
    etc_with(
        root / "etc",
        passwd="root:x:0:0::/root:/bin/sh\nold:x:100:100::/:\nnew:x:100:100::/:\n",
        group="root:x:0:\nold:x:100:\nnew:x:100:ada\n",
        subuid="ada:100000:65536\nnew:100000:65536\n",
    )
    etc_with(
        tmp_path / "before/etc",
        passwd="root:x:0:0::/root:/bin/sh\nold:x:100:100::/:\n",
        group="root:x:0:\nold:x:100:\n",
        subuid="ada:100000:65536\n",
    )
    return root


IDS = {"passwd": {"new": 999}, "group": {"new": 998}, "subuid": {"new": 165536}}
NEW = Renumbering(IDS, {"passwd": {100: 999}, "group": {100: 998}, "subuid": {100000: 165536}}, {"root", "old"})


@needs_root
def test_only_rows_of_new_accounts_are_renumbered(root: Path) -> None:
    NEW.apply(root, {})
    assert (root / "etc/passwd").read_text() == "root:x:0:0::/root:/bin/sh\nold:x:100:100::/:\nnew:x:999:998::/:\n"
    assert (root / "etc/group").read_text() == "root:x:0:\nold:x:100:\nnew:x:998:ada\n"
    assert (root / "etc/subuid").read_text() == "ada:100000:65536\nnew:165536:65536\n"


@needs_root
def test_only_files_of_new_accounts_are_re_owned(root: Path) -> None:
    before = root.parent / "before"
    for name in ("usr/old", "usr/given-away"):
        for top in (root, before):
            (top / name).parent.mkdir(exist_ok=True)
            (top / name).touch()
    os.chown(root / "usr/old", 100, 100)
    os.chown(before / "usr/old", 100, 100)
    os.chown(root / "usr/given-away", 100, 0)
    (root / "usr/new").mkdir()
    (root / "usr/new/link").symlink_to("/nowhere")
    for path in (root / "usr/new", root / "usr/new/link"):
        os.chown(path, 100, 100, follow_symlinks=False)
    NEW.apply(root, {root: before})
    owners = {str(p.relative_to(root / "usr")): (p.lstat().st_uid, p.lstat().st_gid) for p in (root / "usr").rglob("*")}
    assert owners == {"old": (100, 100), "given-away": (999, 0), "new": (999, 998), "new/link": (999, 998)}


@needs_root
def test_renumbering_keeps_setuid_bits_capabilities_and_xattrs(root: Path) -> None:
    program = root / "program"
    program.write_text("x")
    os.chown(program, 100, 100)
    program.chmod(0o6755)
    # VFS_CAP_REVISION_2 with CAP_NET_RAW permitted and effective (<linux/capability.h>)
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    os.setxattr(program, "security.capability", capability)
    os.setxattr(program, "user.note", b"n")
    directory = root / "directory"
    directory.mkdir()
    os.chown(directory, 100, 100)
    directory.chmod(0o3775)
    NEW.apply(root, {root: root.parent / "before"})
    status = program.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (999, 998, 0o6755)
    assert os.getxattr(program, "security.capability") == capability
    assert os.getxattr(program, "user.note") == b"n"
    assert directory.stat().st_mode & 0o7777 == 0o3775


@needs_root
def test_a_hard_linked_file_is_re_owned_once(root: Path) -> None:
    """Ids are swapped: a file that is visited twice would get its old owner back."""
    etc_with(root / "etc", passwd="a:x:101:101::/:\nb:x:100:100::/:\n", group="", subuid="")
    (root / "one").touch()
    os.chown(root / "one", 100, 0)
    os.link(root / "one", root / "two")
    Renumbering({}, {"passwd": {100: 101, 101: 100}}).apply(root, {root: None})
    assert (root / "one").stat().st_uid == 101


@needs_root
def test_accounts_that_are_not_utf_8_are_renumbered(root: Path) -> None:
    (root / "etc/passwd").write_bytes(b"root:x:0:0:Sup\xe9r:/:/bin/sh\nnew:x:100:100::/:\n")
    NEW.apply(root, {})
    assert (root / "etc/passwd").read_bytes() == b"root:x:0:0:Sup\xe9r:/:/bin/sh\nnew:x:999:998::/:\n"


@needs_root
def test_account_files_keep_owner_and_mode(root: Path) -> None:
    (root / "etc/passwd").chmod(0o640)
    os.chown(root / "etc/passwd", 0, 42)
    NEW.apply(root, {})
    status = (root / "etc/passwd").stat()
    assert (status.st_gid, status.st_mode & 0o777) == (42, 0o640)


@needs_root
def test_the_owner_of_a_file_does_not_get_another_one_by_putting_it_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_and_open(path: Path, *arguments: Any) -> Any:
        (tmp_path / "of-root").replace(tmp_path / "own")
        return real(path, *arguments)

    (tmp_path / "own").touch()
    os.chown(tmp_path / "own", 1000, 1000)
    (tmp_path / "of-root").touch(0o600)
    real = ash.open_descriptor
    monkeypatch.setattr(ash, "open_descriptor", swap_and_open)
    ash.chown_by_map(tmp_path / "own", None, {1000: 1001}, {1000: 1001})
    status = (tmp_path / "own").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o600)


def reconciled(
    given_before: dict[str, int], there: dict[str, int], directory: Path
) -> tuple[AccountIds, dict[str, int], dict[int, int]]:
    """The registry, the ids that accounts of an /etc must get, and how files move, after reconcile()."""
    ids = AccountIds()
    ids.given["passwd"].update(given_before)
    renumbering = ids.reconcile(etc_with(directory, passwd=passwd(there)))
    return ids, dict(renumbering.accounts.get("passwd", {})), dict(renumbering.moves.get("passwd", {}))


def test_reconcile_changes_nothing_if_everything_agrees(tmp_path: Path) -> None:
    known = {"root": 0, "_chrony": 100}
    ids, wanted, moves = reconciled(known, known, tmp_path)
    assert (ids.given["passwd"], wanted, moves) == (known, {}, {})


def test_reconcile_gives_an_account_the_id_that_it_has_elsewhere_and_moves_its_files(tmp_path: Path) -> None:
    _, wanted, moves = reconciled({"_chrony": 100}, {"_chrony": 105}, tmp_path)
    assert (wanted, moves) == ({"_chrony": 100}, {105: 100})


def test_reconcile_finds_a_free_id_if_another_account_has_the_known_one(tmp_path: Path) -> None:
    _, wanted, moves = reconciled({"_chrony": 100}, {"_chrony": 105, "tor": 100}, tmp_path)
    assert wanted["_chrony"] not in {100, 105}
    assert moves == {105: wanted["_chrony"]}


@pytest.mark.parametrize(
    ("known", "there"),
    [
        ({"root": 0}, {"root": 0, "toor": 0}),
        ({"root": 0, "toor": 1005}, {"root": 0, "toor": 0}),
        ({"root": 0, "toor": 1005}, {"toor": 0, "root": 0}),
        ({"root": 0, "toor": 0}, {"root": 0, "toor": 1005}),  # nobody becomes root by a repair
        ({"root": 5}, {"root": 0}),
        ({"ada": 1000}, {"ada": 1000, "backup": 1000}),
        ({"ada": 1001, "backup": 1002}, {"ada": 1000, "backup": 1000}),
    ],
)
def test_reconcile_leaves_the_id_0_and_ids_that_are_shared_on_purpose(
    known: dict[str, int], there: dict[str, int], tmp_path: Path
) -> None:
    ids, wanted, moves = reconciled(dict(known), there, tmp_path)
    assert (ids.given["passwd"], wanted, moves) == (known, {}, {})
    assert not any(is_misnumbered(name, there, known) for name in there)


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(100, 105)),
    st.dictionaries(st.sampled_from("abcde"), st.integers(100, 105), min_size=1),
)
def test_after_reconcile_accounts_have_the_recorded_ids_and_none_share_one_that_did_not(
    tmp_path_factory: pytest.TempPathFactory, known: dict[str, int], there: dict[str, int]
) -> None:
    known = {name: number for name, number in known.items() if list(known.values()).count(number) == 1}
    ids, wanted, _ = reconciled(known, there, tmp_path_factory.mktemp("etc"))
    after = {**there, **wanted}
    alone = [name for name, number in there.items() if list(there.values()).count(number) == 1]
    assert wanted.keys() <= {*alone}
    assert all(list(after.values()).count(after[name]) == 1 for name in alone)
    assert all(ids.given["passwd"].get(name, after[name]) == after[name] for name in alone)
