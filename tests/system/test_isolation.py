# SPDX-License-Identifier: AGPL-3.0-or-later
"""Programs in a transaction are isolated: no disks, no other processes, no services."""

import contextlib
import hashlib
import os
import socket
from pathlib import Path

import pytest

from tests.support import program
from tests.system.disk_system import System, names_below

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]


@pytest.fixture(scope="module")
def inside(system: System) -> dict[str, str]:
    """What a program sees in a transaction, by aspect."""
    questions = {
        "block devices": "find / -xdev -type b; find /dev -type b",
        "devices": "ls /dev",
        "ischroot": "ischroot; echo $?",
        "virtualisation": "systemd-detect-virt; echo $?",
        "first process": "tr '\\0' '\\n' < /proc/1/environ",
        "environment": "env",
        "processes": "ls -d /proc/[0-9]* | wc -l",
        "sys": "mkdir /sys/x 2>&1; echo 1 2>&1 > /sys/kernel/profiling; grep ' /sys ' /proc/mounts",
        "proc/sys": "{ echo other > /proc/sys/kernel/hostname; } 2>&1; { echo 1 > /proc/sys/vm/drop_caches; } 2>&1",
        "policy": "policy-rc.d ssh start; echo $?; ls -l /usr/sbin/policy-rc.d",
        "namespaces": "for n in mnt pid ipc uts; do readlink /proc/self/ns/$n; done",
        "hostname": "hostname inside-of-it; hostname",
        "run": "ls -A /run; ls -A /tmp",
        "pty": "python3 -c 'import pty, os; print(os.ttyname(pty.openpty()[1]))'",
        "links": "readlink /dev/fd /dev/stdin /dev/ptmx; echo x > /dev/null; head -c 4 /dev/zero | wc -c",
        "systemctl": "systemctl daemon-reload; echo $?; systemctl start dbus 2>&1; systemctl is-active dbus",
        "directory": "pwd; umask; id -u",
        "mounts": "cut -d' ' -f2,3 /proc/mounts",
    }
    number = system.clone()
    script = "\n".join(f"echo '=== {name}'; ( {question} )" for name, question in questions.items())
    environment = {"LD_LIBRARY_PATH": "/evil", "EDITOR": "evil", "https_proxy": "http://proxy:1", "TERM": "vt220"}
    output = system.ash("run", number, "sh", "-c", f"{script}\ntrue", environment=environment).stdout
    answers = (part.partition("\n") for part in output.split("=== ")[1:])
    return {name: answer.strip() for name, _, answer in answers}


def test_there_are_no_block_devices(inside: dict[str, str]) -> None:
    assert inside["block devices"] == ""
    assert "loop" not in inside["devices"]
    assert {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm"} <= set(inside["devices"].split())


def test_the_devices_work(inside: dict[str, str]) -> None:
    assert inside["links"].split() == ["/proc/self/fd", "/proc/self/fd/0", "pts/ptmx", "4"]
    assert inside["pty"].startswith("/dev/pts/")


def test_ischroot_says_yes(inside: dict[str, str]) -> None:
    assert inside["ischroot"] == "0"


def test_systemd_detects_a_container(inside: dict[str, str]) -> None:
    assert inside["virtualisation"].split()[-1] == "0"
    assert inside["virtualisation"].split()[0] not in ("none", "kvm", "qemu")


def test_pid_1_names_the_container(inside: dict[str, str]) -> None:
    assert {"container=ash", "SYSTEMD_OFFLINE=1"} <= set(inside["first process"].splitlines())


def test_the_callers_environment_is_not_inherited(inside: dict[str, str]) -> None:
    lines = inside["environment"].splitlines()
    assert "evil" not in inside["environment"]
    assert {"https_proxy=http://proxy:1", "TERM=vt220", "HOME=/root", "USER=root"} <= set(lines)


def test_the_hosts_processes_are_invisible(inside: dict[str, str]) -> None:
    assert int(inside["processes"]) < 10


def test_namespaces_are_private(inside: dict[str, str]) -> None:
    ours = {os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "pid", "ipc", "uts")}
    assert not ours & set(inside["namespaces"].split())


def test_the_hosts_hostname_does_not_change(inside: dict[str, str]) -> None:
    assert inside["hostname"] == "inside-of-it"
    assert socket.gethostname() != "inside-of-it"


def test_sys_and_the_kernels_settings_are_read_only(inside: dict[str, str]) -> None:
    assert inside["sys"].count("Read-only file system") == 2
    assert inside["proc/sys"].count("Read-only file system") == 2


def test_services_are_not_started(inside: dict[str, str]) -> None:
    assert inside["policy"].splitlines()[0] == "101"
    answers = inside["systemctl"].splitlines()
    assert answers[0] == "0", "systemctl daemon-reload must not fail a package's script"
    assert answers[-1] not in ("active", "activating")


def test_run_and_tmp_are_empty(inside: dict[str, str]) -> None:
    assert set(inside["run"].split()) <= {"ash", "lock", "systemd"}


def test_it_runs_as_root_in_the_root_directory(inside: dict[str, str]) -> None:
    assert inside["directory"].split() == ["/", "0022", "0"]


@pytest.mark.usefixtures("inside")
def test_none_of_this_ends_up_in_the_snapshot(system: System) -> None:
    number = max(system.files.tree())
    root = system.root(number)
    assert not (root / "usr/sbin/policy-rc.d").exists()
    for name in ("dev", "proc", "sys", "run", "tmp"):
        assert names_below(root / name) == names_below(system.root(0) / name)
    assert not system.files.undo(number).exists(), "nothing was to be committed"


def test_the_snapshots_own_policy_is_kept(system: System, snapshot: int) -> None:
    system.shell(snapshot, "printf '#!/bin/sh\\nexit 104\\n' > /usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d")
    system.shell(snapshot, "touch /etc/mark; policy-rc.d && exit 1; test $? = 104")
    assert "104" in (system.root(snapshot) / "usr/sbin/policy-rc.d").read_text()


def test_one_transaction_does_not_see_anothers_processes(system: System, snapshot: int) -> None:
    other = system.clone()
    with system.at_work(snapshot, "sleep 4714 &"):
        assert "4714" not in system.ash(
            "run", other, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
        ).stdout.replace("4714 &", "")


# Scripts that write to a disk on real hardware


def disks() -> dict[str, str]:
    """A digest of the first MiB of each disk of this machine."""
    found = {}
    for block in sorted(Path("/sys/block").iterdir()):
        node = Path("/dev", block.name)
        if block.name.startswith(("loop", "ram", "zram")) or not node.is_block_device():
            continue
        with contextlib.suppress(PermissionError), node.open("rb") as disk:  # in a container
            found[block.name] = hashlib.sha256(disk.read(1 << 20)).hexdigest()
    return found


def test_scripts_of_the_kernel_and_of_grub_touch_no_disk(system: System, snapshot: int) -> None:
    system.shell(
        snapshot,
        "mv /usr/bin/systemd-detect-virt /usr/bin/systemd-detect-virt.real; "
        "printf '#!/bin/sh\\necho none\\nexit 1\\n' > /usr/bin/systemd-detect-virt; "
        "chmod +x /usr/bin/systemd-detect-virt; "
        "for disk in /dev/vda /dev/sda /dev/loop0; do echo grub-pc grub-pc/install_devices multiselect $disk; done "
        "| debconf-set-selections",
    )
    before = (
        system.outside_of_btrfs(),
        disks(),
        program("find", system.files.grub_cfg.parent, "-type", "f", "-exec", "sha256sum", "{}", "+"),
    )
    system.ash("install", snapshot, "grub-pc")
    kernel = next((system.root(snapshot) / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
    system.ash("run", snapshot, "env", "DEBIAN_FRONTEND=noninteractive", "dpkg-reconfigure", f"linux-image-{kernel}")
    system.shell(snapshot, f"test -s /boot/initrd.img-{kernel}; dpkg --audit")
    after = (
        system.outside_of_btrfs(),
        disks(),
        program("find", system.files.grub_cfg.parent, "-type", "f", "-exec", "sha256sum", "{}", "+"),
    )
    assert after == before
    system.ash("deploy", snapshot)
    system.boots()
