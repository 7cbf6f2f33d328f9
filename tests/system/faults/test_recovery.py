# SPDX-License-Identifier: AGPL-3.0-or-later
"""Commands killed at any step: all or nothing, nothing is left behind, and the next command works."""

import itertools
import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from ash import Layout, delete_subvolume, readonly_view
from tests.support import ASH, DISTRIBUTION, DONE, FAILED, REFUSED, SNAPSHOTS, program
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(180)]


def test_a_commit_killed_at_any_step_is_all_or_nothing(system: System, snapshot: int) -> None:
    outcomes = set()
    number, script = (
        snapshot,
        "echo new > /etc/mark; echo new > /usr/mark; echo new > /var/lib/mark-{0}; echo new > /var/lib/two-{0}",
    )
    before = system.id_of(number)
    for step in system.each_step_of("run", number, "sh", "-c", script.format(number), by=3):
        changed = system.id_of(number) != before
        system.ash("recover")
        marks = [system.root(number) / "etc/mark", system.root(number) / "usr/mark", system.files.etc(number) / "mark"]
        marks += [system.files.var / f"lib/mark-{number}", system.files.var / f"lib/two-{number}"]
        assert [mark.exists() for mark in marks] == [changed] * 5, f"step {step}"
        assert not system.remains(), f"step {step}"
        system.is_sound()
        outcomes.add(changed)
        if changed:
            break
    assert outcomes == {False, True}


def test_after_the_exchange_a_kill_at_any_step_loses_nothing_of_var(system: System) -> None:
    after_the_exchange = 0
    for step in range(1, 200, 2):
        number = system.clone()
        entries = [f"lib/a-{number}/x", f"lib/b-{number}", f"spool/c-{number}"]
        script = f"cd /var; mkdir lib/a-{number}; for e in {' '.join(entries)}; do echo new > $e; done; touch /etc/mark"
        script += f"; echo of {number} >> log/dpkg.log"
        ended = system.killed_at(step, "run", number, "sh", "-c", script)
        exchanged = (system.root(number) / "etc/mark").exists()
        after_the_exchange += exchanged
        system.ash("recover")
        assert not system.remains(), f"step {step}"
        if exchanged:
            merged = {entry: (system.files.var / entry).exists() for entry in entries}
            assert all(merged.values()), f"step {step}: {merged}"
            logged = (system.files.var / "log/dpkg.log").read_text().split("\n")
            assert logged.count(f"of {number}") == 1, f"step {step}"
            assert system.files.undo(number).exists(), f"step {step}"
        if ended.returncode == 0:
            break
    assert after_the_exchange > 5
    system.is_sound()


@pytest.mark.parametrize("how", ["another file", "the same file", "open", "before anything was placed"])
def test_changes_of_var_since_a_kill_are_kept(system: System, snapshot: int, how: str) -> None:
    """A decision made before the kill does not overwrite a later change."""
    entry = system.files.var / f"lib/ash-test-{snapshot}"
    (entry / "deep").mkdir(parents=True)
    for name in ("db", "deep/one", "deep/two"):
        (entry / name).write_text("old\n")
    script = f"cd /var/lib/{entry.name}; for file in db deep/one deep/two; do echo new > $file; done; touch /etc/mark"
    step = "copy " if how == "before anything was placed" else r"rename \S+ to two"
    killed_in_the_merge(system, snapshot, script, step)
    later = {"another file": "more", "the same file": "db"}.get(how, "deep/two")
    with (entry / later).open("a") as file:
        if how != "open":
            file.write("later\n")
        file.flush()
        system.ash("recover")
    content = (entry / later).read_text()
    assert content.endswith("later\n") or how == "open", content
    aside = sorted((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*/lib/{entry.name}/db"))
    assert [path.read_text() for path in aside] == ([] if how == "open" else ["new\n"])
    assert not system.remains()
    system.is_sound()


def test_an_interrupted_merge_is_resumed(system: System, snapshot: int) -> None:
    entry = system.files.var / f"lib/ash-test-{snapshot}"
    (entry / "directory/deep").mkdir(parents=True)
    (entry / "goes").mkdir()
    for name in ("one", "two", "gone", "directory/deep/file", "directory/file", "goes/one", "goes/two"):
        (entry / name).write_text("old\n")
    script = (
        f"cd /var/lib/{entry.name}; rm -r directory gone goes; echo new | tee one two new > directory; touch /etc/mark"
    )
    killed_in_the_merge(system, snapshot, script, r"rename \S+ to two")
    for name in ("directory/file", "goes/two"):  # as if these had been merged before the kill
        (entry / name).unlink(missing_ok=True)
    system.ash("recover")
    assert not (entry / "goes").exists()
    assert {path.name: path.read_text() for path in entry.iterdir() if path.is_file()}.items() >= {
        "one": "new\n",
        "two": "new\n",
        "new": "new\n",
        "directory": "new\n",
    }.items()
    assert not list((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*"))
    assert not system.remains()
    system.is_sound()


def test_a_merge_that_an_older_ash_began_is_finished(system: System, snapshot: int) -> None:
    """It decided on all entries first, then noted those that were merged."""
    lib, names = system.files.var / "lib", [f"{name}-{snapshot}" for name in ("first", "second", "third")]
    for name in names:
        (lib / name).mkdir()
        (lib / name / "one").write_text("old\n")
    script = "; ".join(f"cd /var/lib/{name}; echo new | tee one two" for name in names)
    killed_in_the_merge(system, snapshot, script, rf"note that lib/{names[1]} is merged")
    work = system.files.state / f"work/{snapshot}"
    decisions = json.loads((work / "decisions").read_text())
    two = lib / names[1] / "two"
    two.rename(two.with_name(f".ash-new-{decisions['token']}"))  # as if it had been killed a little earlier
    decided = {f"lib/{name}": "place" for name in names}
    (work / "decisions").write_text(json.dumps({**decisions, "decided": decided}))
    (work / "merged").write_text(f"{json.dumps(f'lib/{names[0]}')}\n")
    (lib / names[0] / "one").write_text("later\n")  # it was merged, and is in use
    system.ash("recover")
    found = {str(path.relative_to(lib)): path.read_text() for name in names for path in (lib / name).iterdir()}
    new = {f"{name}/{file}": "new\n" for name in names for file in ("one", "two")}
    assert found == {**new, f"{names[0]}/one": "later\n"}
    assert not list((lib / "ash/conflicts").glob(f"{snapshot}-*"))
    assert not system.remains()


def killed_in_the_merge(system: System, snapshot: int, script: str, step: str) -> None:
    """Kill a transaction during its merge into /var, before a step."""
    killed = system.with_hooks({"kill": step, "after": "write decisions"}, "run", snapshot, "sh", "-ec", script)
    assert killed.returncode == -signal.SIGKILL, killed


def test_an_interrupted_recovery_is_resumed(system: System, snapshot: int) -> None:
    for killed_at in (14, 24):
        system.killed_at(
            killed_at, "run", snapshot, "sh", "-c", "echo new > /var/lib/again; touch /etc/mark /boot/mark"
        )
        for _ in system.each_step_of("recover", by=2):
            pass
        in_var, in_root = (system.files.var / "lib/again").exists(), (system.root(snapshot) / "etc/mark").exists()
        assert in_var == in_root
        assert not system.remains()
        system.is_sound()


def test_a_killed_copy_is_complete_or_does_not_exist(system: System, snapshot: int) -> None:
    known = system.files.tree()
    for step in system.each_step_of("branch", snapshot, by=3):
        system.ash("tmp")
        assert not system.remains(), f"step {step}"
        system.is_sound()
        made = system.files.tree() - known
        assert len(made) <= 1, f"step {step}"
        known |= made


def test_a_killed_copy_of_a_snapshot_being_changed_leaves_nothing(system: System, snapshot: int) -> None:
    with system.at_work(snapshot, "true"):
        for step in itertools.count(1, 2):
            if system.killed_at(step, "clone", snapshot).returncode == DONE:
                break
    assert step > 10
    system.ash("recover")
    assert not system.remains()
    system.is_sound()


def test_a_killed_deletion_is_complete_or_did_not_happen(system: System) -> None:
    outcomes = set()
    for step in range(5, 80, 4):
        top = system.clone()
        branch = system.branch(top)
        system.killed_at(step, "-y", "del", top)
        system.ash("tmp")
        assert not system.remains(), f"step {step}"
        system.is_sound()
        there = {top, branch} & system.files.tree()
        assert there in ({top, branch}, set()), f"step {step}"
        outcomes.add(bool(there))
    assert outcomes == {False, True}


def test_a_snapshot_is_mutable_or_read_only_after_a_kill_at_any_step(system: System, snapshot: int) -> None:
    outcomes = set()
    for step in system.each_step_of("immen", snapshot):
        system.ash("recover")
        mutable = (system.root(snapshot) / "usr/share/ash/mutable").exists()
        writable = f"{SNAPSHOTS}/rootfs/snapshot-{snapshot}" in system.files.writable()
        assert writable == mutable, f"step {step}"
        assert not system.remains(), f"step {step}"
        outcomes.add(mutable)
    assert outcomes == {False, True}
    system.ash("immutable", snapshot)
    system.is_sound()


def test_the_system_boots_after_a_deploy_killed_at_any_step(system: System) -> None:
    one, two = system.clone(), system.clone()
    system.shell(one, "echo one > /etc/which")
    system.shell(two, "echo two > /etc/which")
    system.ash("deploy", one)
    last_booted = system.id_of("deploy")
    target, started = two, set()
    for step in system.each_step_of("deploy", target, by=2):
        slot = system.boots()
        which = (
            (system.root(slot) / "etc/which").read_text() if (system.root(slot) / "etc/which").exists() else "base\n"
        )
        started.add(which)
        assert system.id_of("deploy") == last_booted, f"step {step} touched what was booted last"
        system.ash("recover")
        assert system.boots()
        assert not system.remains(), f"step {step}"
        if which == "two\n":
            system.ash("deploy", one)
    assert (system.root(system.boots()) / "etc/which").read_text() == "two\n"
    assert "base\n" in started or "one\n" in started


def test_a_killed_new_leaves_the_base_unchanged(system: System) -> None:
    before = system.id_of(0)
    for step in (3, 9, 15, 21):
        system.killed_at(step, "new")
    system.ash("tmp")
    assert system.id_of(0) == before
    system.is_sound()


def test_a_foreign_mount_is_reported_by_recovery(system: System, snapshot: int, tmp_path: Path) -> None:
    system.killed_before("exchange", "run", snapshot, "touch", "/etc/mark")
    (tmp_path / "there").mkdir()
    program("mount", "--bind", system.root(f"chr{snapshot}"), tmp_path / "there")
    try:
        for line in ("tmp", f"unlock {snapshot}"):
            assert f"snapshot-chr{snapshot} is mounted" in system.ash(*line.split(), status=REFUSED).error
    finally:
        program("umount", tmp_path / "there")
    assert f"tidied up: {snapshot}" in system.ash("tmp").stdout
    assert not system.remains()


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_closed_output_is_not_a_success(system: System, snapshot: int, stderr: int) -> None:
    script = "for n in 1 2 3; do echo a line; sleep 0.5; done; touch /etc/mark"
    argv = [*ASH, "--image", str(system.image), "run", str(snapshot), "sh", "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        while b"a line" not in process.stdout.readline():
            pass
        process.stdout.close()
        if process.stderr is not None:
            assert not re.search(b"Traceback|an error in ash itself", process.stderr.read())
        assert process.wait(60) != DONE
    assert not (system.root(snapshot) / "etc/mark").exists()
    assert not system.remains()


@pytest.mark.parametrize("words", ["run", "diff 0"])
def test_a_view_of_a_mutable_snapshot_is_deleted_after_a_kill(system: System, snapshot: int, words: str) -> None:
    system.ash("mutable", snapshot)
    command = ["sh", "-c", "touch /etc/mark"] if words == "run" else []
    before = system.subvolumes()
    ended = system.with_hooks({"kill": "delete view"}, *words.split(), snapshot, *command)
    assert ended.returncode == -signal.SIGKILL
    assert [path for path in system.subvolumes() if "/view" in path]
    system.ash("recover")
    assert system.subvolumes() == before
    system.ash("-y", "del", snapshot)


def test_a_view_in_use_is_left_alone(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    layout = Layout.at(system.files.top, DISTRIBUTION)
    with readonly_view(layout, system.root(snapshot)) as view, readonly_view(layout, system.root(snapshot)) as other:
        assert view != other
        delete_subvolume(other)
        system.ash("diff", 0, snapshot)
        system.ash("recover")
        assert (view / "etc/passwd").exists()
    assert not view.exists()
    system.ash("immutable", snapshot)


def test_a_killed_carry_leaves_no_second_etc(machine: Machine, snapshot: int) -> None:
    machine.running("deploy", machine.system.clone(snapshot))
    (machine.etc / "own").touch()
    ended = machine.system.with_hooks({"kill": "exchange .ash-new", "booted": machine.slot}, "carry")
    assert ended.returncode == -signal.SIGKILL
    machine.system.ash("recover")
    assert [path.name for path in machine.next_etc.parent.glob("etc*")] == ["etc"]


@pytest.mark.parametrize("name", ["live/before", "live/var", "{0}/var"])
def test_leftovers_without_an_intent_after_a_power_cut_are_deleted(system: System, snapshot: int, name: str) -> None:
    forgotten = system.files.state / "work" / name.format(snapshot)
    forgotten.parent.mkdir(exist_ok=True)
    program("btrfs", "subvolume", "create", forgotten)
    assert system.wants_recovery() == [f"ash/work/{name.format(snapshot)}"]
    assert f"{name.format(snapshot)} is left over from a" in system.ash("fsck", status=FAILED).stdout
    system.ash("recover")
    assert not forgotten.exists()
    system.is_sound()


def test_a_failed_commit_is_not_resumed(system: System, snapshot: int) -> None:
    script = f"cd /var/lib; touch first-{snapshot} second-{snapshot}"
    killed = system.with_hooks({"fail": "sync", "kill": "remove private"}, "run", snapshot, "sh", "-c", script)
    assert killed.returncode == -signal.SIGKILL
    upper = system.files.state / f"work/{snapshot}/private/upper"
    (upper / f"lib/first-{snapshot}").unlink()  # as if it had been killed a little later
    system.ash("recover")
    assert not [*(system.files.var / "lib").glob(f"*-{snapshot}")]
    assert not system.remains()


def test_what_fails_after_the_commit_stops_no_later_change(system: System, snapshot: int) -> None:
    failing = {"fail": f"exchange etc-new-{snapshot} and etc-{snapshot}"}
    ended = system.with_hooks(failing, "run", snapshot, "sh", "-c", "echo 1 > /etc/mark")
    assert "is not finished" in ended.stderr
    assert system.with_hooks(failing, "recover").returncode == FAILED, "it can still be finished"
    before = system.id_of(snapshot)
    ended = system.with_hooks(failing, "run", snapshot, "sh", "-c", "echo 2 > /usr/mark")
    assert ended.returncode == DONE, ended
    assert "ash fsck --repair repairs it" in ended.stderr
    assert system.id_of(snapshot) != before
    assert "differs" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    system.is_sound()
