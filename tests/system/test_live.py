# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changes of the running deployment: on a disk whose deployment counts as booted. Services start in the boot tests."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ash import load_distro
from tests.archive import Archive, use_only
from tests.support import (
    DISTRIBUTION,
    DONE,
    FAILED,
    REFUSED,
    RUN_WITH_HOOKS,
    SNAPSHOTS,
    USAGE,
    make_deb,
    program,
    wait_until,
)
from tests.system.disk_system import Machine, System, everything_below, names_below

pytestmark = [pytest.mark.system, pytest.mark.budget(150)]


def deb(directory: Path, version: str = "1", **parts: str) -> Path:
    """A package with files of all kinds."""
    files = {"usr/share/ash-test/file": f"{version}\n", "etc/ash-test.conf": f"{version}\n"}
    return make_deb(directory, "ash-test-live", version, files=files, **parts)


def test_a_package_is_installed_into_the_snapshot_and_the_running_system(machine: Machine, tmp_path: Path) -> None:
    postinst = "ln -s file /usr/share/ash-test/link; mkdir -p /var/lib/ash-test; echo data > /var/lib/ash-test/data"
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    answer = machine.running("install", number, deb(tmp_path, postinst=postinst))
    assert answer["live"]["changed"] is True
    for which in (number, machine.slot):
        root = machine.system.root(which)
        assert (root / "usr/share/ash-test/file").read_text() == "1\n"
        assert (root / "usr/share/ash-test/link").is_symlink()
        assert (root / "etc/ash-test.conf").read_text() == "1\n"
    assert (machine.files.var / "lib/ash-test/data").read_text() == "data\n"
    assert not machine.system.remains()
    assert machine.system.ash("--json", "diff").json["drift"] == {}, "what was installed counts as an edit"
    assert machine.running("install", number, tmp_path / "ash-test-live_1_all.deb")["live"]["changed"] is False
    answer = machine.running("remove", number, "ash-test-live")
    assert answer["live"]["changed"] is True
    assert not (machine.system.root(machine.slot) / "usr/share/ash-test/file").exists()


def test_what_a_script_generates_is_the_same_in_both(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    key, check = "/etc/ash-test-keys/own/key", "/var/lib/ash-test-keys/check"
    postinst = f"""umask 077
mkdir -p {Path(key).parent} {Path(check).parent}
[ -e {key} ] || head -c 9 /dev/urandom | od -An -tx1 > {key}
[ -e {check} ] || cp {key} {check}
echo 1 > /etc/ash-test-keys/each-time
"""
    files = {"etc/ash-test-keys/conf": "default\n"}
    machine.running("install", number, make_deb(tmp_path, "ash-test-keys", files=files, postinst=postinst))
    roots = [machine.system.root(which) for which in (number, machine.slot)]
    made = [root / key.lstrip("/") for root in roots]
    assert made[0].read_text() == made[1].read_text() == (machine.files.var / "lib/ash-test-keys/check").read_text()
    assert [(path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) for path in made] == [(0o600, 0o700)] * 2
    assert (roots[1] / "etc/ash-test-keys/conf").read_text() == "default\n"
    assert machine.system.ash("--json", "diff").json["drift"] == {}
    machine.running("remove", number, "--purge", "ash-test-keys")


def test_undo_takes_a_live_change_out_of_the_running_system(machine: Machine, tmp_path: Path) -> None:
    number, root = machine.system.ash("--json", "status").json["next"]["snapshot"], machine.system.root
    machine.running("install", number, deb(tmp_path))
    machine.running("install", number, deb(tmp_path, "2", postinst="mkdir /usr/share/ash-test/two"))

    def text(which: int | str) -> tuple[str, str, bool]:
        there = root(which) / "usr/share/ash-test"
        return (there / "file").read_text(), (root(which) / "etc/ash-test.conf").read_text(), (there / "two").exists()

    (machine.etc / "edited").write_text("an edit\n")
    for expected in (("1\n", "1\n", False), ("2\n", "2\n", True)):  # undo, redo
        answer = machine.running("undo", number)
        assert answer["live"]["changed"] is True
        assert [text(number), text(machine.slot)] == [expected, expected]
        packages = load_distro(DISTRIBUTION).package_manager.installed(root(machine.slot))
        assert packages == machine.system.ash("--json", "list", number).json["packages"]
    assert machine.system.ash("--json", "diff").json["drift"] == {"edited": "added"}
    assert "its deployment stays as it is" in machine.run("undo", number, "--not-live").stdout
    assert [text(number)[0], text(machine.slot)[0]] == ["1\n", "2\n"]
    assert not machine.system.remains()
    machine.running("install", number, tmp_path / "ash-test-live_2_all.deb", "--not-live")
    (machine.etc / "edited").unlink()
    machine.running("remove", number, "ash-test-live")


def shapes(directory: Path, version: str, after: str = "") -> Path:
    """A package whose second version makes directories of links, links of directories, and gives directories other names.

    Args:
        directory: where it is made.
        version: "1" or "2".
        after: what its script does in the end.
    """
    one = {"linked/sub/a": "1\n", "linked/b": "1\n", "moved/sub/a": "1\n", "moved/b": "1\n", "gone/sub/a": "1\n"}
    two = {"elsewhere/sub/a": "2\n", "anew/own": "2\n", "replaced": "2\n", "new/sub/a": "2\n"}
    both = {"kept": "the same\n"}
    files = {**both, **({**one, "anew/stale": "1\n", "replaced": "1\n"} if version == "1" else two)}
    there = "/usr/share/ash-test"
    helper = f'dpkg-maintscript-helper dir_to_symlink {there}/linked elsewhere 2~ ash-test-shapes -- "$@"'
    scripts = {
        "1": {"postinst": f"cd {there}; ln -s kept link; mkdir -p made/sub; echo 1 > made/sub/x; ln -s made to"},
        "2": {
            "preinst": helper,
            "postrm": helper,
            "postinst": f"{helper}\ncd {there}; rm to; mv made to; echo 2 > to/sub/y; rm link; mkdir link; touch link/z\n{after}",
        },
    }[version]
    files = {f"usr/share/ash-test/{path}": text for path, text in files.items()}
    return make_deb(directory, "ash-test-shapes", version, files=files, **scripts)


# In the script of a package: wait in the running system, not in the snapshot, until install_while() goes on.
WAITS = "if [ -e /usr/share/ash/snap ]; then touch /waits; while [ ! -e /go ]; do sleep 0.1; done; rm /waits /go; fi"


def install_while(
    machine: Machine, number: int, package: Path, happens: Callable[[], object], status: int = DONE
) -> dict[str, Any]:
    """Install a package whose script has WAITS, and let something happen meanwhile; returns the answer."""
    waits, go = (machine.system.root("chrlive") / name for name in ("waits", "go"))
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(machine.running, "install", number, package, "--live", status=status)
        try:
            wait_until(lambda: waits.exists() or answer.done(), 100)
            happens()
        finally:
            if waits.exists():
                go.touch()
    return answer.result()


def usr(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything in the /usr of a root except ash's own files, with the content of the tests' files."""
    found: dict[str, tuple[object, ...]] = {}
    for path, facts in names_below(root / "usr").items():
        file = root / "usr" / path
        if path != "share" and not path.startswith("share/ash/"):
            text = file.read_text() if "ash-test" in path and file.is_file() else ""
            found[path] = (facts, text, file.is_symlink() and os.readlink(file))
    return found


def test_whole_directories_appear_vanish_and_move(machine: Machine, tmp_path: Path) -> None:
    number, root = machine.system.ash("--json", "status").json["next"]["snapshot"], machine.system.root
    machine.running("install", number, shapes(tmp_path, "1"))
    assert usr(root(machine.slot)) == usr(root(number))
    machine.running("install", number, shapes(tmp_path, "2"))
    assert (root(machine.slot) / "usr/share/ash-test/linked").is_symlink()
    assert (root(machine.slot) / "usr/share/ash-test/to/sub/y").read_text() == "2\n"
    assert usr(root(machine.slot)) == usr(root(number))
    machine.running("remove", number, "ash-test-shapes")
    assert usr(root(machine.slot)) == usr(root(number))
    assert not (root(machine.slot) / "usr/share/ash-test/elsewhere").exists()


def test_a_failed_change_is_rolled_back(machine: Machine, tmp_path: Path) -> None:
    number, slot = machine.system.clone(), machine.system.root(machine.slot)
    machine.running("install", number, shapes(tmp_path, "1"), "--live")
    before, etc = usr(slot), names_below(slot / "etc")
    package = shapes(tmp_path, "2", after=f"{WAITS}\n[ ! -e /usr/share/ash/snap ] || mkdir /var/lib/ash-test-late")
    lib = machine.files.var / "lib"
    try:  # fail after /usr
        answer = install_while(machine, number, package, lambda: program("chattr", "+i", lib), status=FAILED)
    finally:
        program("chattr", "-i", lib)
    assert "not permitted" in answer["live"]["error"]
    assert (usr(slot), names_below(slot / "etc")) == (before, etc)
    assert not machine.system.remains()


def test_files_changed_meanwhile_are_reported(machine: Machine, tmp_path: Path) -> None:
    edit = "echo package > /etc/issue; mkdir -p /var/lib/ash-test-told; echo package >> /var/lib/ash-test-told/data"
    edited = (machine.etc / "issue", machine.files.var / "lib/ash-test-told/data")

    def others() -> None:
        for path in edited:
            path.write_text("mine\n")

    answer = install_while(machine, machine.system.clone(), deb(tmp_path, postinst=f"{edit}\n{WAITS}"), others)
    assert answer["live"]["conflicts"] == ["/etc/issue", "/var/lib/ash-test-told"]
    assert [path.read_text() for path in edited] == ["mine\n", "mine\n"]
    directories = [
        machine.files.var / directory.removeprefix("/var/") for directory in answer["live"]["conflicts_folders"]
    ]
    aside = {str(path.relative_to(f)): path.read_text() for f in directories for path in f.rglob("*") if path.is_file()}
    assert aside == {"etc/issue": "package\n", "lib/ash-test-told/data": "package\n" * 2}


def test_edits_of_the_running_etc_are_kept(machine: Machine, tmp_path: Path) -> None:
    (machine.etc / "issue").write_text("mine\n")
    answer = machine.running("install", machine.system.clone(), deb(tmp_path, postinst="useradd fresh"), "--live")
    assert (machine.etc / "issue").read_text() == "mine\n"
    assert "fresh:" in (machine.etc / "passwd").read_text()
    assert answer["live"]["error"] == ""
    drift = machine.system.ash("--json", "diff").json["drift"]
    assert set(drift) == {"issue"}


def test_what_scripts_make_of_edits_of_the_running_etc_is_an_edit(machine: Machine, tmp_path: Path) -> None:
    """A script that renames an edited file, and one that puts a copy of it aside."""
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    name, old, new, aside = "ash-test-renames", "ash-test-old", "ash-test-new", "ash-test-old.bak"
    makes = f"[ -e /etc/{old} ] || echo default > /etc/{old}"
    moves = f"grep -q edited /etc/{old} && cp /etc/{old} /etc/{aside}\nmv /etc/{old} /etc/{new}"
    machine.running("install", number, make_deb(tmp_path, name, "1", postinst=makes))
    (machine.etc / old).write_text("default\nedited\n")
    machine.running("install", number, make_deb(tmp_path, name, "2", postinst=f"{moves}\ntrue"))
    assert (machine.etc / new).read_text() == "default\nedited\n"
    assert machine.system.ash("--json", "diff").json["drift"] == {new: "changed", aside: "added"}
    machine.running("deploy", number)
    etc = machine.next_etc
    assert [(etc / one).read_text() for one in (new, aside)] == ["default\nedited\n"] * 2
    assert not (etc / old).exists()


def test_a_failed_change_of_edits_leaves_the_drift_as_it_was(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    name, old, new = "ash-test-fails", "ash-test-old", "ash-test-new"
    machine.running("install", number, make_deb(tmp_path, name, "1", postinst=f"echo default > /etc/{old}"))
    (machine.etc / old).write_text("default\nedited\n")
    before = machine.system.ash("--json", "diff").json["drift"]
    unit = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
    package = make_deb(
        tmp_path, name, "2", files={f"lib/systemd/system/{name}.service": unit}, postinst=f"mv /etc/{old} /etc/{new}"
    )
    patch = "def fail(*args): raise ash.AshError('started by a test')\nash.Services.start = fail"
    machine.run("install", number, package, "--live", patch=patch, status=FAILED)
    assert (machine.etc / old).read_text() == "default\nedited\n"
    assert not (machine.etc / new).exists()
    drift = machine.system.ash("--json", "diff").json["drift"]
    assert drift == before == {old: "changed"}


def test_live_changes_another_snapshot_and_the_running_system(machine: Machine, tmp_path: Path) -> None:
    other = machine.system.clone()
    package = deb(tmp_path)
    assert "live" not in machine.running("install", other, package)
    assert not (machine.system.root(machine.slot) / "usr/share/ash-test").exists()
    assert machine.running("install", other, package, "--live")["live"]["changed"] is True
    assert (machine.system.root(machine.slot) / "usr/share/ash-test/file").exists()


def test_the_next_deployment_has_only_what_its_snapshot_has(machine: Machine, tmp_path: Path) -> None:
    number, other = machine.system.ash("--json", "status").json["next"]["snapshot"], machine.system.clone()
    package = deb(tmp_path)
    assert machine.running("deploy", number)["changed"] is False
    machine.running("install", other, package, "--live")
    assert machine.system.ash("--json", "diff").json["drift"] == {}
    assert machine.running("deploy", number)["changed"] is True
    new = machine.system.root(machine.files.default_slot())
    assert not (new / "usr/share/ash-test").exists()
    assert not (new / "etc/ash-test.conf").exists()
    assert machine.running("deploy", number)["changed"] is False
    machine.running("install", number, package)
    assert machine.running("deploy", number)["changed"] is True
    assert (machine.system.root(machine.files.default_slot()) / "usr/share/ash-test").exists()
    assert machine.running("deploy", number)["changed"] is False
    kept = machine.running("rollback")["snapshot"]
    assert (machine.system.root(kept) / "usr/share/ash-test/file").exists()
    assert not (machine.system.root(kept) / "usr/share/ash/live").exists()
    assert machine.running("deploy", kept)["changed"] is False


def test_a_failed_live_change_needs_no_new_deployment(machine: Machine, tmp_path: Path) -> None:
    number, other = machine.system.ash("--json", "status").json["next"]["snapshot"], machine.system.clone()
    script = "[ -e /usr/share/ash/snap ] && exit 1 || exit 0"
    machine.running("install", other, deb(tmp_path, postinst=script), "--live", status=FAILED)
    assert machine.running("deploy", number)["changed"] is False


def test_without_live_a_change_waits_for_the_next_boot(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    assert "live" not in machine.running("install", number, deb(tmp_path), "-nl")
    assert not (machine.system.root(machine.slot) / "usr/share/ash-test").exists()
    machine.running("install", number, "hello", "-l", "-nl", status=USAGE)


def test_live_needs_a_running_system(system: System, snapshot: int, tmp_path: Path) -> None:
    with system.nothing_changes():
        assert "--live" in system.ash("install", snapshot, deb(tmp_path), "--live", status=REFUSED).error


def test_a_branch_that_runs_follows_its_parent_at_once(machine: Machine, tmp_path: Path) -> None:
    parent = machine.system.clone()
    archive = Archive(tmp_path / "archive")
    archive.add("ash-test-new", files={"usr/share/ash-test/new": "new"})
    with archive.served() as url:
        machine.system.shell(parent, use_only(url))
        branch = machine.system.branch(parent)
        machine.deploy(branch, "--fresh-etc")
        machine.boot()
        machine.system.ash("refresh", parent)
        machine.system.ash("install", parent, "ash-test-new")
        answer = machine.running("force-sync", parent)
    assert answer["live"]["changed"] is True
    assert (machine.system.root(machine.slot) / "usr/share/ash-test/new").exists()
    assert (machine.system.root(branch) / "usr/share/ash-test/new").exists()


def test_the_running_system_does_not_change_if_its_snapshot_did_not(machine: Machine, tmp_path: Path) -> None:
    parent = machine.system.clone()
    branch = machine.system.branch(parent)
    machine.system.shell(parent, "touch /usr/share/is-parent")
    archive = Archive(tmp_path / "archive")
    not_in_branch = (
        "[ -e /usr/share/is-parent ] || [ -e /usr/share/ash/snap ] || exit 1"  # except in the running system
    )
    archive.add("ash-test-odd", files={"usr/share/ash-test/odd": "new"}, postinst=not_in_branch)
    with archive.served() as url:
        for number in (parent, branch):
            machine.system.shell(number, use_only(url))
        machine.deploy(branch, "--fresh-etc")
        machine.boot()
        machine.system.ash("refresh", parent)
        machine.system.ash("install", parent, "ash-test-odd")
        answer = machine.running("force-sync", parent, status=FAILED)
    assert [*answer["failed"]] == [str(branch)]
    assert not (machine.system.root(branch) / "usr/share/ash-test/odd").exists()
    assert not (machine.system.root(machine.slot) / "usr/share/ash-test/odd").exists()


def test_a_script_that_fails_in_the_running_system_is_rolled_back(machine: Machine, tmp_path: Path) -> None:
    slot, number = machine.system.root(machine.slot), machine.system.clone()
    before = everything_below(slot / "usr")
    script = "[ -e /usr/share/ash/snap ] && exit 1 || exit 0"  # exists only in deployments
    answer = machine.running("install", number, deb(tmp_path, postinst=script), "--live", status=FAILED)
    assert answer["live"]["error"]
    assert answer["packages"]["added"], "the snapshot has it"
    assert everything_below(slot / "usr") == before
    assert not machine.system.remains()


@pytest.mark.parametrize("then", [["deploy"], ["rollback"], ["etc-update"], ["carry"]])
def test_a_half_applied_change_is_not_drift(machine: Machine, tmp_path: Path, then: list[str]) -> None:
    system, slot, number = machine.system, machine.slot, machine.system.clone()
    if then == ["carry"]:
        system.ash("deploy", number)
    other = system.clone()
    half_put(machine, other, deb(tmp_path))
    assert (system.root(slot) / "etc/ash-test.conf").exists(), "it has begun"
    known = set(system.files.tree())
    machine.running(*then, *([number] if then == ["deploy"] else []))
    assert not (system.root(slot) / "etc/ash-test.conf").exists()
    new: list[int | str] = [system.files.default_slot(), *(system.files.tree() - known)]
    assert not any((system.root(one) / "etc/ash-test.conf").exists() for one in new)
    assert not system.remains()


def test_a_live_change_after_a_deploy_is_not_carried_at_shutdown(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    machine.running("deploy", machine.system.clone())
    assert machine.running("install", number, deb(tmp_path))["live"]["changed"] is True
    (machine.etc / "edited").touch()
    assert machine.running("carry")["carried"] == ["edited"]
    assert not (machine.system.root(machine.system.files.default_slot()) / "etc/ash-test.conf").exists()


def test_recover_reports_that_the_running_system_was_rolled_back(machine: Machine, tmp_path: Path) -> None:
    half_put(machine, machine.system.clone(), deb(tmp_path))
    answer = machine.running("recover")
    assert (answer["snapshots"], answer["changed"]) == ([], True)
    assert machine.system.ash("--json", "log").json["history"][-1]["command"] == "recover"


def test_no_temporary_file_is_left_in_var(machine: Machine, tmp_path: Path) -> None:
    files = {"usr/share/ash-test-var": "x", "var/lib/ash-test-var/deep/file": "x"}
    package = make_deb(
        tmp_path,
        "ash-test-var",
        files=files,
        postinst="[ ! -e /usr/share/ash/snap ] || echo live > /var/lib/ash-test-var/deep/live",
    )
    half_put(machine, machine.system.clone(), package, r"rename \S+ to live")
    lib = machine.files.var / "lib/ash-test-var/deep"
    assert [path.name for path in lib.iterdir() if path.name.startswith(".ash-new-")], "it was being written"
    machine.running("recover")
    assert not [path.name for path in lib.iterdir() if path.name.startswith(".ash-new-")]
    assert not machine.system.remains()


def half_put(machine: Machine, number: int, package: Path, step: str = "") -> None:
    """Kill a change of the running system when part of it is applied."""
    options = {"booted": machine.slot, "kill": step or f"exchange etc-new-{machine.slot}"}
    killed = machine.system.with_hooks(options, "install", number, str(package), "--live")
    assert killed.returncode == -signal.SIGKILL, killed


# Replaces the start of services, which must not happen on this machine.
STARTS = """
def start(self, paths, asked=""):
    self.live.started.append("ash-test.service")
    raise {}
ash.Services.start = start
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("KeyboardInterrupt", 130), ("SystemExit(143)", 143), ("OSError(5, 'broken')", FAILED)],
)
def test_services_started_before_an_interruption_are_reported(
    machine: Machine, tmp_path: Path, end: str, status: int
) -> None:
    before = usr(machine.system.root(machine.slot))
    words = ("install", machine.system.clone(), deb(tmp_path), "--live")
    said = machine.run(*words, status=status, patch=STARTS.format(end)).stderr
    assert "ash: the effects of starting ash-test.service are not undone\n" in said
    assert usr(machine.system.root(machine.slot)) == before
    assert not machine.system.remains()


# Replaces the start of services by one that fails after another process has changed an entry of /var.
FAILS = """
def start(self, paths, asked=""):
    ash.Path("{}/lib/ash-test-used/by-others").touch()
    print("merging is locked:", ash.is_held(ash.Path("{}/work/merge/lock")), file=sys.stderr)
    raise OSError(5, "broken")
ash.Services.start = start
"""


def test_a_rollback_takes_back_what_nobody_else_changed_in_var(machine: Machine, tmp_path: Path) -> None:
    var, number = machine.files.var, machine.system.clone()
    for name in ("ash-test-old/gone.d/deep", "ash-test-old/kept", "ash-test-old/sub/edited"):
        (var / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (var / "lib" / name).write_text("before\n")
    script = """
        [ -e /usr/share/ash/snap ] || exit 0
        mkdir -p /var/lib/ash-test-new/deep /var/lib/ash-test-used
        touch /var/lib/ash-test-new/deep/file /var/lib/ash-test-used/file /home/ash-test-live
        cd /var/lib/ash-test-old
        rm -r gone.d; echo after > gone.d; echo after > sub/edited; touch sub/added; chmod 700 sub
    """
    before = names_below(var / "lib/ash-test-old")
    words = ("install", number, deb(tmp_path, postinst=script), "--live")
    patch = FAILS.format(var, machine.files.state)

    def is_back() -> None:
        assert names_below(var / "lib/ash-test-old") == before
        assert (var / "lib/ash-test-old/gone.d/deep").read_text() == "before\n"
        assert not (var / "lib/ash-test-new").exists()
        assert not machine.system.remains()

    done = machine.run("--json", *words, status=FAILED, patch=patch)
    assert done.json["live"]["kept"] == ["/var/lib/ash-test-used", "/home/ash-test-live"]
    assert "merging is locked: False" in done.stderr
    assert (var / "lib/ash-test-used/by-others").exists()
    is_back()
    shutil.rmtree(var / "lib/ash-test-used")
    (machine.files.home / "ash-test-live").unlink()
    merged = {"kill": "write live$", "after": "note that lib/ash-test-used", "booted": machine.slot}
    for options, argv in ((merged, words), ({"kill": "rename .* to edited"}, ("recover",))):
        assert machine.system.with_hooks(options, *argv).returncode == -signal.SIGKILL
        assert (var / "lib/ash-test-new").exists() is (argv == words)
    said = machine.system.ash("recover").stderr
    assert "an interrupted change of the running system is undone, except for /home/ash-test-live" in said
    assert not (var / "lib/ash-test-used").exists()
    is_back()
    half_put(machine, number, tmp_path / "ash-test-live_1_all.deb", "write live$")
    machine.system.shell(number, "mkdir /var/lib/ash-test-other")  # this change may need what is in place
    said = machine.system.ash("recover").stderr
    assert "except for /var/lib/ash-test-new, /var/lib/ash-test-old, /var/lib/ash-test-used\n" in said
    assert (var / "lib/ash-test-new/deep/file").exists()
    assert not machine.system.remains()


# An init system whose services are all active, and which prints what it is to do. Programs find it running.
ACTIVE = """\
class Fake(ash.Init):
    marker = "run/systemd/system"
    is_active = lambda self, service: True
    restart = lambda self, services, how="restart", check=True: print(how, *services, file=sys.stderr)
began = ash.LiveTransaction.__init__
def begin(self, system):
    began(self, system)
    self.services.init = Fake()
ash.LiveTransaction.__init__ = begin
"""
# By dh_installsystemd(1), of one package that is stopped before its files are replaced, and of one that is not.
SCRIPTS = {
    "prerm": "[ ! -d /run/systemd/system ] || deb-systemd-invoke stop ash-test.service",
    "postinst": """\
if [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload
    deb-systemd-invoke start ash-test.service
    deb-systemd-invoke restart other.socket other.service
fi""",
}


def test_services_are_restarted_as_the_scripts_of_packages_ask(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.clone()
    machine.running("install", number, deb(tmp_path, "1", **SCRIPTS), "--live")
    done = machine.run("--json", "install", number, deb(tmp_path, "2", **SCRIPTS), "--live", patch=ACTIVE)
    asked = ["ash-test.service", "other.socket", "other.service"]
    assert done.json["live"]["restarted"] == asked
    assert f"restart {' '.join(asked)}" in done.stderr
    assert not machine.system.remains()
    machine.running("remove", number, "ash-test-live", "--live")


def test_waiting_for_a_deploy_can_be_interrupted(machine: Machine, tmp_path: Path) -> None:
    number, package = machine.system.clone(), deb(tmp_path)
    machine.system.ash("install", number, package)
    lock, before = machine.files.state / "work/deploy/lock", usr(machine.system.root(machine.slot))
    argv = [*RUN_WITH_HOOKS, json.dumps({"booted": machine.slot})]
    words = ["--image", str(machine.system.image), "install", str(number), str(package), "--live"]
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(f"pid {os.getpid()} (a test)\n".encode())
        held.flush()
        process = subprocess.Popen([*argv, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        made = f"{SNAPSHOTS}/rootfs/snapshot-chrlive"
        wait_until(lambda: made in machine.system.subvolumes().keys() - machine.files.writable())
        time.sleep(1)  # waiting shows no sign
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            output = process.communicate(timeout=30)[0]
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT, output
    assert usr(machine.system.root(machine.slot)) == before
    assert not machine.system.remains()


def test_libc_waits_for_the_reboot(machine: Machine, tmp_path: Path) -> None:
    program = make_deb(tmp_path, "systemd-sysv", "999", files={"usr/share/ash-test/init": "x"})
    # It has no /sbin/init, which ash needs.
    answer = machine.running("install", machine.system.clone(), program, "--live", "--force")
    assert answer["live"]["waiting"] == ["systemd-sysv"]
    assert not (machine.system.root(machine.slot) / "usr/share/ash-test/init").exists()


def test_a_kernel_waits_for_the_reboot(machine: Machine, tmp_path: Path) -> None:
    files = {"boot/vmlinuz-9": "x", "usr/lib/modules/9/x.ko": "x", "usr/share/ash-test/beside": "x"}
    kernel = make_deb(tmp_path, "ash-test-kernel", files=files)
    answer = machine.running("install", machine.system.clone(), kernel, "--live")
    root = machine.system.root(machine.slot)
    assert answer["live"]["waiting"] == ["boot/vmlinuz-9"]
    assert (root / "usr/share/ash-test/beside").exists()
    assert not (root / "boot/vmlinuz-9").exists()
    assert not (root / "usr/lib/modules/9/x.ko").exists()


def test_a_kill_at_any_step_leaves_the_running_system_unchanged_or_complete(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.clone()
    machine.running("install", number, shapes(tmp_path, "1"), "--live")
    packages = [deb(tmp_path), shapes(tmp_path, "2")]
    machine.system.ash("install", number, *packages)
    slot = machine.system.root(machine.slot)
    words = ["--image", str(machine.system.image), "install", str(number), *map(str, packages), "--live"]
    names = tmp_path / "names"

    def run(**options: object) -> int:
        argv = [*RUN_WITH_HOOKS, json.dumps({"booted": machine.slot, **options})]
        return subprocess.run([*argv, *words], capture_output=True, timeout=120, check=False).returncode

    def state() -> tuple[bool, ...]:
        paths = (
            slot / "usr/share/ash-test/file",
            slot / "etc/ash-test.conf",
            machine.files.etc(machine.slot) / "ash-test.conf",
        )
        return tuple(path.exists() for path in paths)

    before = usr(slot)
    with_copy = machine.system.image.with_name("names.img")
    program("cp", "--sparse=always", machine.system.image, with_copy)
    words[1] = str(with_copy)
    assert run(names=str(names)) == DONE
    with_copy.unlink()
    words[1] = str(machine.system.image)
    steps = names.read_text().splitlines()
    for step in range(1, len(steps), 1 if os.environ.get("ASH_TEST_CUTS") == "all" else 17):
        ended = run(kill=step)
        if ended == DONE:  # a retry may have fewer steps
            assert state() == (True,) * 3
            break
        assert ended == -signal.SIGKILL
        said = machine.system.ash("recover").stderr
        assert not machine.system.remains(), (steps[step - 1], said)
        assert state() in ((False,) * 3, (True,) * 3), steps[step - 1]
        if state()[0]:
            break  # the change was complete
        assert usr(slot) == before, steps[step - 1]
    assert step > 60
