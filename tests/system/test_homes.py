# SPDX-License-Identifier: AGPL-3.0-or-later
"""/home and /root in a transaction: merged path by path, nothing is deleted, what others changed meanwhile stays."""

import os
import stat
from pathlib import Path

import pytest

from tests.support import DONE, OURS_IN_RUN, program, wait_until
from tests.system.container import Container
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]

HOMES = ("home", "root")


@pytest.fixture
def homes(system: System) -> dict[str, Path]:
    """The live /home and /root, each with an empty directory `t`."""
    found = {"home": system.home, "root": system.files.state / "root"}
    for live in found.values():
        program("rm", "-rf", live / "t")
        (live / "t").mkdir()
    return found


def in_both(script: str) -> str:
    """A script that runs in /home/t and in /root/t."""
    return f"for home in /home /root; do cd $home/t; {script}\ndone; cd /"


def in_conflict(system: System, *paths: str) -> None:
    """Assert which paths below t the last change has set aside."""
    aside = max((system.files.var / "lib/ash/conflicts").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    found = {str(path.relative_to(aside)) for path in aside.rglob("*") if not path.is_dir()}
    assert found == {f"{home}/t/{path}" for home in HOMES for path in paths}


def test_a_failed_transaction_leaves_nothing(system: System, snapshot: int, homes: dict[str, Path]) -> None:
    for live in homes.values():
        (live / "t/doc").write_text("old\n")
    system.shell(snapshot, "true")  # the first change of all fills the reserve
    script = in_both("rm doc; echo x > new; mkdir directory; chmod 700 .")
    with system.nothing_changes():
        system.shell(snapshot, f"{script}; exit 3", status=3)
    for live in homes.values():
        assert os.listdir(live / "t") == ["doc"]
        assert stat.S_IMODE((live / "t").stat().st_mode) == 0o755


def test_new_and_changed_paths_are_put_in_place(system: System, snapshot: int, homes: dict[str, Path]) -> None:
    for live in homes.values():
        for name in ("changed", "attributes", "link", "kind"):
            (live / "t" / name).write_text("old\n")
    (homes["home"] / "t/other-name").hardlink_to(homes["home"] / "t/attributes")  # the first is replaced before it
    new = "mkdir -p new/sub; echo new > new/sub/x; ln new/sub/x new/y; ln -s sub/x new/link; chown -R 7:8 new; chmod 750 new"
    changed = "echo new > changed; chmod 600 attributes; ln -sf changed link; rm kind; mkdir kind; touch kind/x"
    script = in_both(f"{new}; touch -d @1 new; {changed}; chmod 711 .") + "; chmod 600 /home/t/other-name"
    answer = system.ash("--json", "run", snapshot, "sh", "-ec", script).json
    assert (answer["changed"], answer["conflicts"], answer["kept"]) == (True, [], [])
    for live in homes.values():
        top = live / "t"
        assert (top / "new/sub/x").read_text() == (top / "changed").read_text() == "new\n"
        assert (top / "new/y").samefile(top / "new/sub/x")
        assert (top / "new/link").readlink() == Path("sub/x")
        status = (top / "new").stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), status.st_mtime) == (7, 8, 0o750, 1)
        assert (stat.S_IMODE((top / "attributes").stat().st_mode), (top / "attributes").read_text()) == (0o600, "old\n")
        assert (top / "link").is_symlink()
        assert (top / "kind/x").exists()
        assert stat.S_IMODE(top.stat().st_mode) == 0o711
        assert not list(live.rglob(".ash-new*"))
    assert not system.remains()
    with system.nothing_changes():
        assert (
            system.ash("--json", "run", snapshot, "sh", "-ec", in_both("cat changed; : >> changed")).json["changed"]
            is False
        )


def test_deletions_are_not_applied_but_reported(system: System, snapshot: int, homes: dict[str, Path]) -> None:
    for live in homes.values():
        for path in ("a", "directory/b", "again/c", "again/d", "moved/x"):
            (live / "t" / path).parent.mkdir(exist_ok=True)
            (live / "t" / path).write_text("old\n")
    script = in_both("rm -r a directory again; mkdir again; echo new > again/c; mv moved to")
    kept = [f"/{home}/t/{path}" for home in HOMES for path in ("a", "again/d", "directory", "moved")]
    answer = system.ash("--json", "run", snapshot, "sh", "-ec", script).json
    assert (sorted(answer["kept"]), answer["conflicts"]) == (kept, [])
    for live in homes.values():
        assert {(live / "t" / path).read_text() for path in ("a", "directory/b", "again/d", "moved/x", "to/x")} == {
            "old\n"
        }
        assert (live / "t/again/c").read_text() == "new\n"
    outcome = system.ash("run", snapshot, "rm", "-r", "/root/t/a")
    assert outcome.stdout.splitlines() == [
        f"snapshot {snapshot}: nothing to change", "  left in place: /root/t/a (ash deletes nothing there)"
    ]  # fmt: skip
    assert (homes["root"] / "t/a").exists()


def test_what_others_changed_meanwhile_stays(system: System, snapshot: int, homes: dict[str, Path]) -> None:
    for live in homes.values():
        for name in ("both", "replaced", "theirs", "same", "ours", "gone"):
            (live / "t" / name).write_text("old\n")
        for name in ("directory", "was"):
            (live / "t" / name).mkdir()
            (live / "t" / name / "x").write_text("old\n")
    script = in_both(
        "for name in both replaced same ours created directory/x was/x; do echo ours > $name; done; "
        "rm theirs gone; echo new > directory/new; mkdir at-once; echo ours > at-once/x"
    )
    with system.at_work(snapshot, script) as work:
        for live in homes.values():
            top = live / "t"
            (top / "both").write_text("theirs\n")
            (top / "new").write_text("theirs\n")
            (top / "new").rename(top / "replaced")
            (top / "theirs").write_text("theirs\n")
            (top / "same").write_text("ours\n")
            (top / "created").write_text("theirs\n")
            (top / "gone").unlink()
            (top / "other").write_text("theirs\n")
            (top / "at-once").write_text("theirs\n")
            program("rm", "-r", top / "was")
    conflicts = {f"/{home}/t/{name}" for home in HOMES for name in ("both", "replaced", "created", "at-once", "was")}
    for path in conflicts:
        assert path in work.ended.stdout
    for live in homes.values():
        top = live / "t"
        for name in ("both", "replaced", "theirs", "created", "other", "at-once"):
            assert (top / name).read_text() == "theirs\n", name
        for name in ("ours", "same", "directory/x"):
            assert (top / name).read_text() == "ours\n", name
        assert (top / "directory/new").read_text() == "new\n"
        assert not (top / "was").exists()
        assert not (top / "gone").exists()
    in_conflict(system, "both", "replaced", "created", "at-once/x", "was/x")


def test_a_file_that_is_open_outside_stays(system: System, snapshot: int, homes: dict[str, Path]) -> None:
    for live in homes.values():
        (live / "t/log").write_text("old\n")
    with (homes["home"] / "t/log").open("a"), (homes["root"] / "t/log").open("a"):
        answer = system.ash("--json", "run", snapshot, "sh", "-ec", in_both("echo ours >> log")).json
    assert sorted(answer["conflicts"]) == ["/home/t/log", "/root/t/log"]
    assert {(live / "t/log").read_text() for live in homes.values()} == {"old\n"}


def test_histories_of_shells_are_appended_and_are_no_change(
    system: System, snapshot: int, homes: dict[str, Path]
) -> None:
    for live in homes.values():
        (live / "t/.bash_history").write_text("one\n")
    argv = ["sh", "-ec", in_both("echo two >> .bash_history")]
    assert system.ash("--json", "run", snapshot, *argv).json["changed"] is False
    with system.at_work(snapshot, in_both("echo three >> .bash_history")) as work:
        for live in homes.values():
            with (live / "t/.bash_history").open("a") as file:
                file.write("outside\n")
    assert "meanwhile" not in work.ended.stdout
    for live in homes.values():
        assert (live / "t/.bash_history").read_text() == "one\ntwo\noutside\nthree\n"


def test_a_deleted_user_keeps_the_live_home_and_mailbox(system: System, snapshot: int) -> None:
    system.shell(
        snapshot, "useradd --create-home erin; echo x | tee /home/erin/x > /var/mail/erin; chown erin: /var/mail/erin"
    )
    sibling = system.branch(snapshot)
    outcome = system.shell(sibling, "userdel --remove erin 2> /dev/null; test ! -e /var/mail/erin")
    for path in ("/home/erin", "/var/mail/erin"):
        assert f"left in place: {path} (ash deletes nothing there)" in outcome.stdout
    assert (system.home / "erin/x").read_text() == (system.files.var / "mail/erin").read_text() == "x\n"


def test_a_change_below_a_nested_subvolume_is_refused(system: System, snapshot: int) -> None:
    program("btrfs", "subvolume", "create", system.home / "nested")
    with system.nothing_changes():
        error = system.shell(snapshot, "echo x > /home/nested/x", status=OURS_IN_RUN).error
    assert "/home/nested is a file system or subvolume of its own" in error
    program("btrfs", "subvolume", "delete", system.home / "nested")


def test_an_interrupted_merge_is_finished_at_each_step(system: System, snapshot: int, homes: dict[str, Path]) -> None:
    for live in homes.values():
        (live / "t/changed").write_text("old\n")
        (live / "t/directory").mkdir()
    script = in_both(
        "echo $0 > changed; mkdir -p $0/sub; echo new > $0/sub/x; chmod 7$0 directory; chown $0 directory; rm -f gone"
    )
    for number, step in enumerate(("put changed in place", "copy .ash-new", r"rename \S+ to changed", "put x in place",
                                   "put directory in place", "note that /home", "note that /root", "remove private")):  # fmt: skip
        name = f"{number}{number}"
        for live in homes.values():
            (live / "t/gone").write_text("old\n")
        system.killed_before(step, "run", snapshot, "sh", "-ec", script, name)
        assert system.ash("--json", "recover").json["snapshots"] == [snapshot], step
        for live in homes.values():
            assert (live / "t/changed").read_text() == f"{name}\n", step
            assert (live / "t" / name / "sub/x").read_text() == "new\n", step
            status = (live / "t/directory").stat()
            assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (int(name), int(f"7{name}", 8)), step
            assert (live / "t/gone").exists()
            assert not list(live.rglob(".ash-new*")), step
        conflicts = system.files.var / "lib/ash/conflicts"
        assert not list(conflicts.glob(f"{snapshot}-*")), step
        assert not system.remains()


def test_a_resumed_session_still_has_its_files(system: System, snapshot: int, homes: dict[str, Path]) -> None:
    with system.terminal("chroot", snapshot) as terminal:
        terminal.type("echo ready-$((6 * 7))\n")
        terminal.expect("ready-42")
        terminal.type("echo kept > /root/t/x; echo kept > /home/t/x; echo written-$((6 * 7))\n")
        terminal.expect("written-42")
    wait_until(lambda: not system.processes())
    assert not (homes["root"] / "t/x").exists()
    assert system.ash("chroot", snapshot, "--resume", input="cat /root/t/x /home/t/x\n", status=DONE).stdout.startswith(
        "kept\nkept\n"
    )
    assert {(live / "t/x").read_text() for live in homes.values()} == {"kept\n"}


# Show a directory, in the first argument, as /home, as if another file system were mounted there.
ON_ANOTHER_FILE_SYSTEM = (
    "ash.System.homes = property(lambda self: {{'home': ash.Path({!r}), 'root': self.layout.home_root}})"
)


def test_a_home_on_another_file_system(machine: Machine, snapshot: int, tmp_path: Path) -> None:
    for name in ("changed", "both", "deleted"):
        (tmp_path / name).write_text("old\n")
    patch = ON_ANOTHER_FILE_SYSTEM.format(str(tmp_path))
    script = "echo ours | tee /home/new /home/changed /home/both; echo theirs > {{}}; rm /home/deleted"
    before = set(machine.system.home.iterdir())
    changes = f"{patch}\nmerge = ash.HomeMerge.merge\n"
    meanwhile = (
        f"ash.HomeMerge.merge = lambda self: (ash.Path({str(tmp_path / 'both')!r}).write_text('theirs'), merge(self))"
    )
    outcome = machine.run("run", snapshot, "sh", "-ec", script, patch=changes + meanwhile)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert found == {"new": "ours\n", "changed": "ours\n", "both": "theirs", "deleted": "old\n"}
    assert "left as they changed it: /home/both" in outcome.stdout
    assert "left in place: /home/deleted" in outcome.stdout
    assert set(machine.system.home.iterdir()) == before


def test_a_home_that_is_not_mounted_when_the_merge_is_finished(machine: Machine, snapshot: int, tmp_path: Path) -> None:
    """As early at boot. What is below the mount point is another directory, where nothing of it belongs."""
    patch = f"{ON_ANOTHER_FILE_SYSTEM.format(str(tmp_path))}\nash.HomeMerge.merge = lambda self: ash.os._exit(9)"
    system, before = machine.system, set(machine.system.home.iterdir())
    machine.run("run", snapshot, "sh", "-ec", "echo ours > /home/new; mkdir /home/directory", patch=patch, status=9)
    outcome = system.ash("recover")
    assert f"could not be put in place: /home/new: {tmp_path} is not mounted" in outcome.stderr
    aside = next((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*"))
    assert (aside / "home/new").read_text() == "ours\n"
    assert (aside / "home/directory").is_dir()
    assert set(system.home.iterdir()) == before
    assert not system.remains()


def test_a_home_that_a_transaction_cannot_see_is_not_changed(system: System, snapshot: int) -> None:
    """A tmpfs stands for the kinds that overlayfs refuses: this ash knows it as one of them."""
    system.ash("deploy", snapshot)
    running, kinds = Container(system), 'NEVER_LOWER = ("autofs", '
    program = system.files.state / "ash"
    program.write_text(program.read_text().replace(kinds, f'{kinds}"tmpfs", '))
    mounted, before = "mount -t tmpfs tmpfs /home; echo x > /home/x;", set(system.home.rglob("*"))
    refused = running.type(
        f"{mounted} ash run {snapshot} sh -c 'mkdir /home/d; echo ours > /home/d/y'", status=OURS_IN_RUN
    )
    assert "/home is on tmpfs, which a transaction cannot see or change: it wrote to /home/d/y" in refused.stderr
    running.type(f"{mounted} ash run {snapshot} sh -c 'echo ls > /home/.sh_history; echo ours > /root/other'")
    assert (system.files.state / "root/other").read_text() == "ours\n"
    assert set(system.home.rglob("*")) == before
    assert not system.remains()


def test_a_change_of_the_live_directory_itself_is_no_conflict(
    system: System, snapshot: int, homes: dict[str, Path]
) -> None:
    for live in homes.values():
        live.chmod(0o755)
    for script in ("echo ours > {}/new", "chmod 700 {}; chmod 755 {}"):
        with system.at_work(snapshot, "; ".join(script.replace("{}", f"/{name}") for name in HOMES)) as work:
            for live in homes.values():
                live.chmod(0o711)
        assert "left as they changed it" not in work.ended.stdout
        assert {stat.S_IMODE(live.stat().st_mode) for live in homes.values()} == {0o711}
        assert (homes["root"] / "new").read_text() == "ours\n"
        for live in homes.values():
            live.chmod(0o755)
    with system.at_work(snapshot, "chmod 750 /root /home"):
        for live in homes.values():
            (live / "written").touch()  # which changes the ctime of the directory, and no attribute
    assert {stat.S_IMODE(live.stat().st_mode) for live in homes.values()} == {0o750}
    with system.at_work(snapshot, "chmod 770 /root /home") as work:
        for live in homes.values():
            live.chmod(0o711)
    assert "left as they changed it: /home, /root" in work.ended.stdout
