# SPDX-License-Identifier: AGPL-3.0-or-later
"""The three-way merge of /etc: each side's changes are in the result, or reported as conflicts."""

import errno
import os
import shutil
import socket
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ash
from ash import ACCOUNT_FILES, EtcMerge, etc_drift, merge_accounts, merge_row

pytestmark = pytest.mark.budget(20)


# Account files


NAMES = st.sampled_from(["root", "ada", "bob", "cy", "_chrony", "dee"])
# Few ids, so that they clash.
LINES = {
    "passwd": st.tuples(
        st.just("x"), st.sampled_from(["0", "100", "101", "1000", "1001"]), st.sampled_from(["A", "B"])
    ),
    "shadow": st.tuples(st.sampled_from(["!", "$y$1", "$y$2"]), st.sampled_from(["1", "2"])),
    "group": st.tuples(
        st.just("x"),
        st.sampled_from(["0", "100", "101", "1000"]),
        st.lists(st.sampled_from(["ada", "bob", "cy"]), unique=True).map(",".join),
    ),
}
FILES = {name: st.dictionaries(NAMES, line, max_size=5) for name, line in LINES.items()}
Accounts = dict[str, tuple[str, ...]]


def text_of(accounts: Accounts) -> str:
    return "".join(":".join([name, *columns]) + "\n" for name, columns in accounts.items())


def read(text: str) -> Accounts:
    rows = [line.split(":") for line in text.splitlines()]
    assert len({row[0] for row in rows}) == len(rows), f"duplicate account: {text}"
    return {row[0]: tuple(row[1:]) for row in rows}


three_way = st.sampled_from(sorted(LINES)).flatmap(lambda name: st.tuples(st.just(name), *[FILES[name]] * 3))


@given(three_way)
def test_no_account_of_either_side_is_lost_silently(sides: tuple[str, Accounts, Accounts, Accounts]) -> None:
    name, base, running, own = sides
    merged, conflicts = merge_accounts(name, *map(text_of, (base, running, own)))
    result = read(merged)
    for account in {*base, *running, *own}:
        was, now, theirs = (side.get(account) for side in (base, running, own))
        if now == was:
            assert result.get(account) == theirs, f"{account}: only the new side changed it"
        elif account in conflicts:
            locked = theirs and (f"!{theirs[0]}", *theirs[1:])
            kept = (theirs, locked) if name == "shadow" and now and now[0] == "!" else (theirs,)
            assert result.get(account) in kept, f"{account}: a conflict must keep the target's row, or lock it"
        elif theirs in (was, now):
            assert result.get(account) == now, f"{account}: only the running side changed it, or both did the same"
        else:
            assert account in result, f"{account} was dropped without a conflict"


@given(three_way)
def test_no_account_gets_the_id_of_another(sides: tuple[str, Accounts, Accounts, Accounts]) -> None:
    name, base, running, own = sides
    merged, _ = merge_accounts(name, *map(text_of, (base, running, own)))
    if name == "shadow":
        return
    result = read(merged)
    brought = {account for account in result if account not in own}
    for account in brought - base.keys():
        number = result[account][1]
        shared = {other for other, columns in running.items() if columns[1] == number}  # on purpose
        others = {other for other, columns in result.items() if columns[1] == number and other not in brought}
        assert others <= shared


@given(three_way)
def test_a_second_merge_changes_nothing(sides: tuple[str, Accounts, Accounts, Accounts]) -> None:
    name, base, running, own = sides
    merged, conflicts = merge_accounts(name, *map(text_of, (base, running, own)))
    again, _ = merge_accounts(name, text_of(running), text_of(running), merged)
    assert again == merged
    assert conflicts or read(merge_accounts(name, text_of(base), text_of(running), merged)[0]) == read(merged)


def test_changes_to_different_fields_are_both_kept() -> None:
    base = "ada:x:1000:1000:Ada:/home/ada:/bin/sh\n"
    running, own = base.replace("Ada", "Ada L"), base.replace("/bin/sh", "/bin/bash")
    assert merge_accounts("passwd", base, running, own) == ("ada:x:1000:1000:Ada L:/home/ada:/bin/bash\n", [])


def test_two_new_passwords_conflict_and_the_targets_is_kept() -> None:
    base, running, own = "ada:a:1:::::\n", "ada:b:2:::::\nbob:x:1:::::\n", "ada:c:3:::::\n"
    assert merge_accounts("shadow", base, running, own) == ("ada:c:3:::::\nbob:x:1:::::\n", ["ada"])


@pytest.mark.parametrize(
    ("base", "running", "own", "merged"),
    [
        ("$1", "!$1", "$2", "!$2"),  # usermod -L
        ("$1", "$2", "!$1", "!$2"),
        ("$1", "!", "$2", "!$2"),  # a conflict too
        ("$1", "!$1", "!$1", "!$1"),
        ("", "!", "$2", "!$2"),
        ("$1", "!*", "$2", "!$2"),
        ("!$1", "$1", "!$2", "!$2"),  # a conflict too: the running system has unlocked the old password
        ("!$1", "$1", "!$1", "$1"),
        ("$1", "*", "$1", "*"),
    ],
)
def test_a_lock_of_an_account_wins_over_a_new_password(base: str, running: str, own: str, merged: str) -> None:
    rows = [f"ada:{password}:1:0:99999:7:::\n" for password in (base, running, own)]
    assert merge_accounts("shadow", *rows)[0] == f"ada:{merged}:1:0:99999:7:::\n"
    new = "".join(rows[1:2])
    if running.startswith("!") and not own.startswith("!"):
        assert merge_accounts("shadow", "", new, rows[2])[0] == f"ada:!{own}:1:0:99999:7:::\n"


def test_nis_entries_and_comments_are_carried() -> None:
    own = "root:x:0:0::/:\nbob:x:1001:1001::/:\n+@own::::::\n"
    running = (
        "root:x:0:0::/:\n# people\n# people\n# a:b\n# a:c\nada:x:1000:1000::/:\n+@staff::::::\n-eve::::::\n+::::::\n"
    )
    added = "# people\n# people\n# a:b\n# a:c\nada:x:1000:1000::/:\n"
    merged = f"root:x:0:0::/:\nbob:x:1001:1001::/:\n{added}+@own::::::\n+@staff::::::\n-eve::::::\n+::::::\n"
    assert merge_accounts("passwd", "root:x:0:0::/:\n", running, own) == (merged, [])
    assert merge_accounts("passwd", running, running, merged) == (merged, [])
    assert merge_accounts("passwd", running, running.replace("# people\n", "", 1), merged)[0].count("# people") == 1


def test_a_second_account_with_the_same_id_on_purpose_is_carried() -> None:
    base = "root:x:0:0::/:\n"
    running = f"{base}toor:x:0:0::/:/bin/zsh\n"
    assert merge_accounts("passwd", base, running, base) == (running, [])


def test_group_members_are_merged_one_by_one() -> None:
    base, running, own = "sudo:x:27:ada,bob\n", "sudo:x:27:ada,cy\n", "sudo:x:27:ada,bob,dee\n"
    assert merge_accounts("group", base, running, own) == ("sudo:x:27:ada,dee,cy\n", [])


def test_administrators_and_members_in_gshadow_are_merged_separately() -> None:
    base, running, own = "sudo:*:ada:bob\n", "sudo:*:ada,cy:bob\n", "sudo:*:ada:bob,dee\n"
    assert merge_accounts("gshadow", base, running, own) == ("sudo:*:ada,cy:bob,dee\n", [])


def test_a_deleted_account_is_deleted_unless_the_other_side_changed_it() -> None:
    base = "ada:x:1000:\nbob:x:1001:\n"
    assert merge_accounts("group", base, "ada:x:1000:\n", base) == ("ada:x:1000:\n", [])
    changed = base.replace("1001:", "1001:ada")
    assert merge_accounts("group", base, "ada:x:1000:\n", changed) == (changed, ["bob"])


def test_a_new_user_with_a_taken_uid_is_a_conflict() -> None:
    own = "root:x:0:0::/:\nbob:x:1000:1000::/home/bob:\n"
    running = "root:x:0:0::/:\nada:x:1000:1000::/home/ada:\n"
    assert merge_accounts("passwd", "root:x:0:0::/:\n", running, own) == (own, ["ada"])


def test_all_ranges_of_a_user_are_kept() -> None:
    base = "ada:100000:65536\nada:300000:65536\n"
    merged, conflicts = merge_accounts("subuid", base, base + "bob:165536:65536\n", base)
    assert merged == base + "bob:165536:65536\n"
    assert not conflicts


def test_rows_of_different_length_are_not_merged() -> None:
    assert merge_row(["a", "b", "c"], ["a", "x", "c", "d"], ["a", "b", "y"], ()) is None


# Files


@pytest.fixture
def merge(tmp_path: Path) -> EtcMerge:
    """A merge of three directories with the same few files, for a test to change."""
    base = tmp_path / "base"
    for name in ("file", "other", "dir/one", "dir/two", "ssh/ssh_host_ed25519_key", "machine-id"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f"{name}\n")
    (base / "fstab").write_text("UUID=1 / btrfs subvol=old 0 0\nUUID=2 /boot/efi vfat x 0 0\n")
    (base / "link").symlink_to("file")
    for side in ("running", "target"):
        shutil.copytree(base, tmp_path / side, symlinks=True)
    return EtcMerge(
        base, tmp_path / "running", tmp_path / "target", tmp_path / "conflicts/7-now", lambda text: f"own\n{text}"
    )


def set_aside(merge: EtcMerge, path: str) -> str:
    return (merge.conflicts / "etc" / path).read_text()


def test_without_changes_there_is_no_drift(merge: EtcMerge) -> None:
    merge.merge()
    assert (merge.carried, merge.in_conflict) == ([], [])
    assert not merge.conflicts.exists()


def test_a_change_to_the_running_etc_is_carried_with_its_metadata(merge: EtcMerge) -> None:
    running = merge.running
    (running / "file").write_text("edited\n")
    (running / "file").chmod(0o600)
    os.chown(running / "other", 7, 8)
    (running / "link").unlink()
    (running / "link").symlink_to("other")
    (running / "new/deep").mkdir(parents=True)
    (running / "new/deep/file").write_text("n\n")
    (running / "new").chmod(0o700)
    (running / "dir/one").unlink()
    os.setxattr(running / "file", "user.note", b"n")
    merge.merge()
    target = merge.target
    assert ((target / "file").read_text(), (target / "file").stat().st_mode & 0o777) == ("edited\n", 0o600)
    assert os.getxattr(target / "file", "user.note") == b"n"
    assert ((target / "other").stat().st_uid, (target / "other").stat().st_gid) == (7, 8)
    assert os.readlink(target / "link") == "other"
    assert (target / "new/deep/file").read_text() == "n\n"
    assert (target / "new").stat().st_mode & 0o777 == 0o700
    assert sorted(os.listdir(target / "dir")) == ["two"]
    assert etc_drift(merge.running, target) == {}
    assert merge.in_conflict == []


def test_a_change_to_the_target_is_kept(merge: EtcMerge) -> None:
    (merge.target / "file").write_text("newer\n")
    (merge.target / "other").unlink()
    (merge.target / "dir/three").touch()
    merge.merge()
    assert (merge.target / "file").read_text() == "newer\n"
    assert not (merge.target / "other").exists()
    assert sorted(os.listdir(merge.target / "dir")) == ["one", "three", "two"]
    assert (merge.carried, merge.in_conflict) == ([], [])


def test_a_file_that_both_changed_is_kept_and_the_running_version_is_set_aside(merge: EtcMerge) -> None:
    (merge.running / "file").write_text("mine\n")
    (merge.running / "file").chmod(0o600)
    (merge.target / "file").write_text("theirs\n")
    merge.merge()
    assert (merge.target / "file").read_text() == "theirs\n"
    assert merge.in_conflict == ["file"]
    assert set_aside(merge, "file") == "mine\n"
    assert (merge.conflicts / "etc/file").stat().st_mode & 0o777 == 0o600
    assert merge.conflicts.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(merge.target) == os.listdir(merge.running), "no leftovers for programs to read"


def test_a_directory_that_both_changed_is_set_aside_with_its_attributes(merge: EtcMerge) -> None:
    for etc, mode in ((merge.base, 0o755), (merge.running, 0o750), (merge.target, 0o711)):
        (etc / "dir").chmod(mode)
        (etc / "dir/file").write_text(f"{mode}\n")
    merge.merge()
    assert merge.in_conflict == ["dir", "dir/file"]
    aside = merge.conflicts / "etc/dir"
    assert aside.stat().st_mode & 0o777 == 0o750
    assert (aside / "file").read_text() == f"{0o750}\n"
    assert (merge.target / "dir").stat().st_mode & 0o777 == 0o711


def test_an_edit_wins_over_a_packages_new_default(merge: EtcMerge) -> None:
    for name in ("file", "other", "dir/one", "dir/two"):
        (merge.target / name).write_text("default\n")
    (merge.target / "dir/two").write_text("changed on purpose\n")
    for name in ("file", "dir/two", "link"):
        (merge.running / name).unlink()
        (merge.running / name).write_text("mine\n")
    (merge.running / "dir/one").unlink()
    merge.is_default = lambda path, content: path.startswith("etc/") and content == b"default\n"
    merge.merge()
    assert (merge.target / "file").read_text() == "mine\n"
    assert not (merge.target / "dir/one").exists(), "a deleted one stays deleted"
    assert (merge.target / "other").read_text() == "default\n", "not edited"
    assert (merge.target / "dir/two").read_text() == "changed on purpose\n"
    assert merge.carried == ["file", "link", "dir/one"]
    assert merge.in_conflict == ["dir/two", "file.dist", "dir/one.dist"]
    aside = [set_aside(merge, path) for path in ("file.dist", "dir/one.dist", "dir/two")]
    assert aside == ["default\n", "default\n", "mine\n"]


def test_content_of_one_side_and_attributes_of_the_other_are_merged(merge: EtcMerge) -> None:
    (merge.running / "file").chmod(0o600)
    os.setxattr(merge.running / "file", "user.note", b"n")
    (merge.target / "file").write_text("theirs\n")
    (merge.running / "other").write_text("mine\n")
    (merge.target / "other").chmod(0o640)
    (merge.running / "dir/one").chmod(0o600)
    (merge.target / "dir/one").chmod(0o640)
    (merge.running / "dir").chmod(0o700)
    (merge.target / "dir").chmod(0o750)
    merge.merge()
    file, other = merge.target / "file", merge.target / "other"
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("theirs\n", 0o600)
    assert os.getxattr(file, "user.note") == b"n"
    assert (other.read_text(), other.stat().st_mode & 0o777) == ("mine\n", 0o640)
    assert (merge.carried, merge.in_conflict) == (["file", "other"], ["dir", "dir/one"])


def test_attributes_of_files_that_are_merged_line_by_line_are_carried(merge: EtcMerge) -> None:
    for side in (merge.base, merge.running, merge.target):
        (side / "passwd").write_text("root:x:0:0::/:\n")
        (side / "group").write_text("root:x:0:\n")
    (merge.target / "passwd").write_text("root:x:0:0::/:\nbob:x:1:1::/:\n")
    (merge.target / "group").write_text("root:x:0:\nbob:x:1:\n")
    (merge.target / "fstab").write_text("UUID=1 / btrfs subvol=new 0 0\nUUID=2 /boot/efi vfat x 0 0\n")
    for name in ("passwd", "group", "fstab"):
        (merge.running / name).chmod(0o600)
    (merge.target / "group").chmod(0o640)
    merge.merge()
    assert [(merge.target / name).stat().st_mode & 0o777 for name in ("passwd", "group", "fstab")] == [
        0o600,
        0o640,
        0o600,
    ]
    assert "bob" in (merge.target / "passwd").read_text()
    assert "subvol=new" in (merge.target / "fstab").read_text()
    assert (merge.carried, merge.in_conflict) == (["fstab", "passwd"], ["group"])


def test_the_same_change_on_both_sides_is_not_a_conflict(merge: EtcMerge) -> None:
    for side in (merge.running, merge.target):
        (side / "file").write_text("same\n")
        (side / "both").write_text("new\n")
        (side / "other").unlink()
    merge.merge()
    assert merge.in_conflict == []


def test_deleting_and_changing_a_file_is_a_conflict(merge: EtcMerge) -> None:
    (merge.running / "file").unlink()
    (merge.target / "file").write_text("theirs\n")
    (merge.running / "other").write_text("mine\n")
    (merge.target / "other").unlink()
    merge.merge()
    assert (merge.target / "file").read_text() == "theirs\n"
    assert not (merge.target / "other").exists()
    assert sorted(merge.in_conflict) == ["file", "other"]
    assert set_aside(merge, "other") == "mine\n"


def test_a_deleted_directory_is_kept_if_the_target_added_to_it(merge: EtcMerge) -> None:
    shutil.rmtree(merge.running / "dir")
    (merge.target / "dir/three").touch()
    merge.merge()
    assert os.listdir(merge.target / "dir") == ["three"]
    assert merge.in_conflict == ["dir"]


def test_a_file_becomes_a_directory(merge: EtcMerge) -> None:
    (merge.running / "file").unlink()
    (merge.running / "file").mkdir()
    (merge.running / "file/inside").write_text("i\n")
    merge.merge()
    assert (merge.target / "file/inside").read_text() == "i\n"
    assert sorted(merge.carried) == ["file", "file/inside"]


def test_a_directory_becomes_a_file(merge: EtcMerge) -> None:
    shutil.rmtree(merge.running / "dir")
    (merge.running / "dir").write_text("file now\n")
    merge.merge()
    assert (merge.target / "dir").read_text() == "file now\n"


def test_a_directory_that_becomes_a_symlink_hides_no_changes_of_the_target(merge: EtcMerge) -> None:
    shutil.rmtree(merge.running / "dir")
    (merge.running / "dir").symlink_to("ssh")
    (merge.target / "dir/one").write_text("theirs\n")
    (merge.target / "dir/three").write_text("theirs\n")
    merge.merge()
    assert (merge.target / "dir/one").read_text() == "theirs\n"
    assert (merge.target / "dir/three").read_text() == "theirs\n"
    assert "dir" in merge.in_conflict


def test_what_is_below_a_symlink_that_was_a_directory_is_removed(merge: EtcMerge) -> None:
    shutil.rmtree(merge.running / "dir")
    (merge.running / "dir").symlink_to("ssh")
    (merge.running / "ssh/one").write_text("of ssh\n")  # running/dir/one leads here
    (merge.target / "dir/one").write_text("theirs\n")
    merge.is_default = lambda path, _: path == "etc/dir/one"
    merge.merge()
    assert merge.drift == {"dir": "changed", "dir/one": "removed", "dir/two": "removed", "ssh/one": "added"}
    assert os.readlink(merge.conflicts / "etc/dir") == "ssh"
    assert (merge.conflicts / "etc.2/dir/one.dist").read_text() == "theirs\n"
    assert not (merge.target / "dir/one").exists()


@pytest.mark.parametrize(
    ("path", "left"),
    [
        *product(("passwd", "shadow", "group", "gshadow"), ("", "daemon:x:1:1::/:\n", None)),
        *product(("fstab",), ("", "# a comment\n", None)),
    ],
)
def test_a_damaged_file_is_not_carried(merge: EtcMerge, path: str, left: str | None) -> None:
    (merge.base / path).write_text("UUID=1 / x x 0 0\n" if path == "fstab" else "root:x:0:0::/:\ndaemon:x:1:1::/:\n")
    for side in (merge.running, merge.target):
        shutil.copyfile(merge.base / path, side / path)
    if left is None:
        (merge.running / path).unlink()
    else:
        (merge.running / path).write_text(left)
    merge.merge()
    assert (merge.target / path).read_text() == (merge.base / path).read_text()
    assert (merge.carried, merge.in_conflict) == ([], [path])
    assert (merge.conflicts / "etc" / path).exists() is (left is not None), "what is left of it is kept"


def test_a_link_to_the_same_file_by_another_name_is_no_change_of_the_target(merge: EtcMerge) -> None:
    root = merge.target.parent
    (root / "usr/lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    for side in (merge.base, merge.running, merge.target):
        (side / "wants").mkdir()
    for name in ("disabled", "masked", "edited"):
        (root / "usr/lib" / name).touch()
        for side in (merge.base, merge.running):
            (side / "wants" / name).symlink_to(f"/lib/{name}")
        (merge.target / "wants" / name).symlink_to(f"/usr/lib/{name}")
    (merge.target / "wants/edited").unlink()
    (merge.target / "wants/edited").symlink_to("/usr/lib/masked")
    (root / "usr/lib/relative").touch()
    for side, target in ((merge.base, "../../lib"), (merge.running, "../../lib"), (merge.target, "../../usr/lib")):
        (side / "wants/relative").symlink_to(f"{target}/relative")
    for name in ("disabled", "masked", "edited", "relative"):
        (merge.running / "wants" / name).unlink()
    (merge.running / "wants/masked").symlink_to("/dev/null")
    merge.merge()
    assert sorted(os.listdir(merge.target / "wants")) == ["edited", "masked"]
    assert os.readlink(merge.target / "wants/masked") == "/dev/null"
    assert os.readlink(merge.target / "wants/edited") == "/usr/lib/masked"
    assert merge.in_conflict == ["wants/edited"]


def test_a_link_to_a_program_that_the_target_lacks_is_set_aside(merge: EtcMerge, tmp_path: Path) -> None:
    running = tmp_path / "root-running/etc"
    running.parent.mkdir()
    merge.running.rename(running)
    merge.running = running
    for root, programs in ((running.parent, ("a", "b", "c")), (merge.target.parent, ("a", "c"))):
        (root / "usr/bin").mkdir(parents=True)
        for program in programs:
            (root / "usr/bin" / program).touch()
    changes = {"one": "/usr/bin/b", "two": "/usr/bin/c", "off": "/dev/null", "resolv": "/run/x", "wrong": "/usr/bin/d"}
    for name, target in changes.items():
        for side in (merge.base, merge.target):
            (side / name).symlink_to("/usr/bin/a")
        (running / name).symlink_to(target)
    merge.merge()
    assert os.readlink(merge.target / "one") == "/usr/bin/a"
    assert os.readlink(merge.conflicts / "etc/one") == "/usr/bin/b"
    assert merge.in_conflict == ["one"]
    for name, target in changes.items():
        assert name == "one" or os.readlink(merge.target / name) == target


@pytest.mark.parametrize("depth", ["new", "sub/new"])
def test_nothing_is_written_through_a_symlink_out_of_the_target(merge: EtcMerge, tmp_path: Path, depth: str) -> None:
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    for side in (merge.base, merge.running, merge.target):
        (side / "dir/sub").mkdir()
    (merge.running / "dir" / depth).write_text("secret\n")
    shutil.rmtree(merge.target / "dir")
    (merge.target / "dir").symlink_to(outside)
    merge.merge()
    assert not (outside / depth).exists()
    assert set_aside(merge, f"dir/{depth}") == "secret\n"


def test_a_symlink_is_carried_as_such_and_never_followed(merge: EtcMerge, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("outside\n")
    for side in (merge.base, merge.target):
        (side / "link").unlink()
        (side / "link").symlink_to(outside)
    (merge.running / "link").unlink()
    (merge.running / "link").write_text("file now\n")
    merge.merge()
    assert not (merge.target / "link").is_symlink()
    assert outside.read_text() == "outside\n"


def test_fifos_and_sockets_do_not_block(merge: EtcMerge) -> None:
    os.mkfifo(merge.running / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(merge.running / "socket"))
        (merge.running / "file").write_text("edited\n")
        merge.merge()
    assert (merge.target / "file").read_text() == "edited\n"
    assert (merge.target / "pipe").is_fifo()


@pytest.mark.parametrize("name", sorted(ACCOUNT_FILES))
def test_account_files_that_are_not_utf_8_are_merged(merge: EtcMerge, name: str) -> None:
    (merge.base / name).write_bytes(b"root:x:0:0\n")
    (merge.running / name).write_bytes(b"root:x:0:0\nada:x:1:Ad\xe9\n")
    (merge.target / name).write_bytes(b"root:x:0:0\nbob:x:2:B\xf6b\n")
    merge.merge()
    assert (merge.target / name).read_bytes() == b"root:x:0:0\nbob:x:2:B\xf6b\nada:x:1:Ad\xe9\n"


def test_an_fstab_that_is_not_utf_8_is_merged(merge: EtcMerge) -> None:
    (merge.running / "fstab").write_bytes(b"UUID=3 /srv ext4 x 0 0 # M\xfcll\n")
    merge.merge()
    assert b"/srv" in (merge.target / "fstab").read_bytes()


def test_only_the_users_lines_of_fstab_are_compared(merge: EtcMerge) -> None:
    (merge.running / "fstab").write_text("UUID=1 / btrfs subvol=other 0 0\nUUID=2 /boot/efi vfat x 0 0\n")
    merge.merge()
    assert merge.carried == []
    assert "subvol=old" in (merge.target / "fstab").read_text()
    assert merge.without_effect == ["fstab, the lines of /: they are ash's own"]


def test_the_users_lines_of_fstab_are_carried(merge: EtcMerge) -> None:
    with (merge.running / "fstab").open("a") as fstab:
        fstab.write("UUID=3 /srv ext4 defaults 0 2\n")
    merge.merge()
    assert merge.carried == ["fstab"]
    assert (merge.target / "fstab").read_text().endswith("UUID=3 /srv ext4 defaults 0 2\n")
    assert merge.without_effect == []


def test_lines_that_both_fstabs_added_are_merged(merge: EtcMerge) -> None:
    for side, place in ((merge.running, "/mine"), (merge.target, "/theirs")):
        with (side / "fstab").open("a") as fstab:
            fstab.write(f"disk {place} ext4 defaults 0 2\n")
    merge.merge()
    text = (merge.target / "fstab").read_text()
    assert (" /mine " in text, " /theirs " in text, merge.in_conflict) == (True, True, [])


def test_the_running_line_of_an_fstab_that_both_changed_wins(merge: EtcMerge) -> None:
    for side, device in ((merge.running, "mine"), (merge.target, "theirs")):
        with (side / "fstab").open("a") as fstab:
            fstab.write(f"{device} /srv ext4 defaults 0 2\n")
    merge.merge()
    text = (merge.target / "fstab").read_text()
    assert ("mine /srv" in text, "theirs" in text) == (True, False)
    assert (merge.carried, merge.in_conflict) == (["fstab"], ["fstab"])
    assert "theirs" in set_aside(merge, "fstab")


def test_the_machines_identity_replaces_the_targets(merge: EtcMerge) -> None:
    (merge.running / "machine-id").write_text("mine\n")
    (merge.target / "machine-id").write_text("theirs\n")
    (merge.target / "ssh/ssh_host_ed25519_key").write_text("theirs\n")
    (merge.running / "ssh/ssh_host_rsa_key.pub").write_text("mine\n")
    merge.merge()
    assert (merge.target / "machine-id").read_text() == "mine\n"
    assert (merge.target / "ssh/ssh_host_ed25519_key").read_text() == "ssh/ssh_host_ed25519_key\n"
    assert (merge.target / "ssh/ssh_host_rsa_key.pub").read_text() == "mine\n"
    assert merge.in_conflict == []


def test_the_identity_is_not_saved_to_a_snapshot(merge: EtcMerge) -> None:
    (merge.running / "machine-id").write_text("mine\n")
    (merge.running / "ssh/ssh_host_rsa_key").write_text("mine\n")
    merge.identity = False
    merge.merge()
    assert (merge.target / "machine-id").read_text() == "machine-id\n"
    assert not (merge.target / "ssh/ssh_host_rsa_key").exists()


def test_a_fresh_etc_sets_all_drift_aside(merge: EtcMerge) -> None:
    (merge.running / "file").write_text("mine\n")
    (merge.running / "new").mkdir()
    (merge.running / "new/file").write_text("n\n")
    (merge.running / "other").unlink()
    (merge.running / "machine-id").write_text("mine\n")
    merge.merge(fresh=True)
    assert (merge.target / "file").read_text() == "file\n"
    assert (merge.target / "other").exists()
    assert not (merge.target / "new").exists()
    assert (merge.target / "machine-id").read_text() == "mine\n"
    assert (set_aside(merge, "file"), set_aside(merge, "new/file")) == ("mine\n", "n\n")
    assert merge.carried == []


# Any three directories


PATHS = ["a", "b", "a/x", "a/y", "a/z/deep"]
FOLDERS = st.dictionaries(st.sampled_from(PATHS), st.sampled_from(["1", "2"]), max_size=5)
EDITS = st.dictionaries(st.sampled_from(PATHS), st.sampled_from(["3", "4", "-> b", "-> /c", None]), max_size=3)


Edits = dict[str, str | None]  # the new text by path, or the target of a symlink; None deletes it


def fill(directory: Path, files: Mapping[str, str | None]) -> None:
    """Create a directory with files; a path below a symlink is none, one that is a parent of another a directory."""
    directory.mkdir()
    links = {path for path, text in files.items() if text and text.startswith("->")}
    hidden = {path for path in files for link in links if path.startswith(f"{link}/")}
    for path in sorted((path for path, text in files.items() if text is not None and path not in hidden), reverse=True):
        text, place = files[path] or "", directory / path
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            if path in links:
                place.symlink_to(text.removeprefix("-> "))
            else:
                place.write_text(text)


def contents(directory: Path) -> dict[str, str]:
    """The text of each file below a directory, and the target of each symlink."""
    found = {}
    for place, directories, names in os.walk(directory):
        for path in (Path(place, name) for name in (*directories, *names)):
            if path.is_symlink():
                found[str(path.relative_to(directory))] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[str(path.relative_to(directory))] = path.read_text()
    return found


@settings(max_examples=500)
@given(FOLDERS, EDITS, EDITS)
def test_no_file_of_either_side_is_lost_silently(
    tmp_path_factory: pytest.TempPathFactory, base: Edits, running: Edits, own: Edits
) -> None:
    top = tmp_path_factory.mktemp("etc")
    for name, edits in (("base", {}), ("running", running), ("target", own)):
        fill(top / name, {**base, **edits})
    before, live, new = (contents(top / name) for name in ("base", "running", "target"))
    merge = EtcMerge(top / "base", top / "running", top / "target", top / "conflicts/7-now", str)
    merge.merge()
    result = contents(top / "target")
    aside = {
        path.partition("/")[2]: text
        for path, text in sorted(contents(merge.conflicts).items())
        if merge.conflicts.exists()
    }
    for path in {*before, *live, *new}:
        was, now, theirs = before.get(path), live.get(path), new.get(path)
        if now not in (was, None) and result.get(path) != now:
            assert aside.get(path) == now, f"the running {path} is neither carried nor set aside"
        if theirs not in (was, now, None):
            assert result.get(path) == theirs, f"the target's {path} was lost"
        if now == was and theirs == was:
            assert result.get(path) == was, f"{path} was changed by neither side"
    shutil.rmtree(top)


def test_an_interrupted_rewrite_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwd = tmp_path / "passwd"
    passwd.write_text("root:x:0:0::/root:/bin/sh\n")
    passwd.chmod(0o604)

    def torn(path: Path, text: str) -> None:
        path.write_text(text[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ash, "write_text", torn)
        with pytest.raises(OSError, match="No space"):
            ash.rewrite(passwd, "new\n")
    assert passwd.read_text() == "root:x:0:0::/root:/bin/sh\n"
    ash.rewrite(passwd, "new\n")
    assert (passwd.read_text(), passwd.stat().st_mode & 0o777) == ("new\n", 0o604)
    assert [path.name for path in tmp_path.iterdir()] == ["passwd"]
