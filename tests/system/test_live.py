# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changes of the running deployment: on a disk whose deployment counts as booted. Services start in the boot tests."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.archive import Archive, use_only
from tests.support import CHECKOUT, DONE, FAILED, REFUSED, USAGE, make_deb, program
from tests.system.lab import Machine, System, everything_below

pytestmark = [pytest.mark.system, pytest.mark.budget(110)]


def deb(folder: Path, version: str = "1", **parts: str) -> Path:
    """A package with files of all kinds."""
    files = {"usr/share/ash-test/file": f"{version}\n", "etc/ash-test.conf": f"{version}\n"}
    return make_deb(folder, "ash-test-live", version, files=files, **parts)


def test_a_package_is_in_the_snapshot_and_in_the_running_system(machine: Machine, tmp_path: Path) -> None:
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


def test_edits_of_the_running_etc_stay(machine: Machine, tmp_path: Path) -> None:
    (machine.etc / "issue").write_text("mine\n")
    answer = machine.running("install", machine.system.clone(), deb(tmp_path, postinst="useradd fresh"), "--live")
    assert (machine.etc / "issue").read_text() == "mine\n"
    assert "fresh:" in (machine.etc / "passwd").read_text()
    assert answer["live"]["error"] == ""
    drift = machine.system.ash("--json", "diff").json["drift"]
    assert set(drift) == {"issue"}


def test_another_snapshot_and_the_running_one_if_that_is_said(machine: Machine, tmp_path: Path) -> None:
    other = machine.system.clone()
    package = deb(tmp_path)
    assert "live" not in machine.running("install", other, package)
    assert not (machine.system.root(machine.slot) / "usr/share/ash-test").exists()
    assert machine.running("install", other, package, "--live")["live"]["changed"] is True
    assert (machine.system.root(machine.slot) / "usr/share/ash-test/file").exists()


def test_not_live_is_for_the_next_boot(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    assert "live" not in machine.running("install", number, deb(tmp_path), "-nl")
    assert not (machine.system.root(machine.slot) / "usr/share/ash-test").exists()
    machine.running("install", number, "hello", "-l", "-nl", status=USAGE)


def test_where_nothing_runs_nothing_can_be_live(system: System, snapshot: int, tmp_path: Path) -> None:
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


def test_what_fails_in_the_running_system_is_put_back(machine: Machine, tmp_path: Path) -> None:
    slot, number = machine.system.root(machine.slot), machine.system.clone()
    before = everything_below(slot / "usr")
    script = "[ -e /usr/share/ash/snap ] && exit 1 || exit 0"  # it is there in deployments alone
    answer = machine.running("install", number, deb(tmp_path, postinst=script), "--live", status=FAILED)
    assert answer["live"]["error"]
    assert answer["packages"]["added"], "the snapshot has it"
    assert everything_below(slot / "usr") == before
    assert not machine.system.remains()


def test_libc_waits_for_the_reboot(machine: Machine, tmp_path: Path) -> None:
    program = make_deb(tmp_path, "systemd-sysv", "999", files={"usr/share/ash-test/init": "x"})
    answer = machine.running("install", machine.system.clone(), program, "--live")
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


def test_killed_anywhere_the_running_system_is_as_it_was_or_has_it_all(machine: Machine, tmp_path: Path) -> None:
    number = machine.system.clone()
    machine.running("install", number, deb(tmp_path))
    slot, stepper = machine.system.root(machine.slot), CHECKOUT / "tests/system/stepper.py"
    words = [
        "--image",
        str(machine.system.image),
        "install",
        str(number),
        str(tmp_path / "ash-test-live_1_all.deb"),
        "--live",
    ]
    names = tmp_path / "names"

    def run(**options: object) -> int:
        argv = [sys.executable, "-I", str(stepper), json.dumps({"booted": machine.slot, **options})]
        return subprocess.run([*argv, *words], capture_output=True, timeout=120, check=False).returncode

    def state() -> tuple[bool, ...]:
        paths = (
            slot / "usr/share/ash-test/file",
            slot / "etc/ash-test.conf",
            machine.files.etc(machine.slot) / "ash-test.conf",
        )
        return tuple(path.exists() for path in paths)

    before = {path: facts[:4] for path, facts in everything_below(slot / "usr").items()}
    with_copy = machine.system.image.with_name("names.img")
    program("cp", "--sparse=always", machine.system.image, with_copy)
    words[1] = str(with_copy)
    assert run(names=str(names)) == DONE
    with_copy.unlink()
    words[1] = str(machine.system.image)
    steps = names.read_text().splitlines()
    for step in range(1, len(steps), 1 if os.environ.get("ASH_TEST_CUTS") == "all" else 6):
        assert run(kill=step) == -signal.SIGKILL
        said = machine.system.ash("recover").stderr
        assert not machine.system.remains(), (steps[step - 1], said)
        assert state() in ((False,) * 3, (True,) * 3), steps[step - 1]
        if state()[0]:
            break  # it was done already
        assert {path: facts[:4] for path, facts in everything_below(slot / "usr").items()} == before, steps[step - 1]
    assert step > 30
