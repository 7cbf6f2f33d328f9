# SPDX-License-Identifier: AGPL-3.0-or-later
"""Programs in a transaction are isolated: no disks, no other processes, no services, nothing outside of their root."""

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from ash import CAPABILITIES
from tests.support import ASH, CHECKOUT, program
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
        "root of process 1": "ls /proc/1/root /proc/1/cwd",
        "processes": "ls -d /proc/[0-9]* | wc -l",
        "sys": "mkdir /sys/x 2>&1; echo 1 2>&1 > /sys/kernel/profiling; grep ' /sys ' /proc/mounts",
        "proc/sys": "{ echo other > /proc/sys/kernel/hostname; } 2>&1; { echo 1 > /proc/sys/vm/drop_caches; } 2>&1",
        "policy": "policy-rc.d ssh start; echo $?; ls -l /usr/sbin/policy-rc.d",
        "namespaces": "for n in mnt pid ipc uts; do readlink /proc/self/ns/$n; done",
        "hostname": "hostname inside-of-it 2>&1; hostname",
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


def test_the_root_of_process_1_leads_nowhere(inside: dict[str, str]) -> None:
    """It has only the same root once more."""
    assert set(inside["root of process 1"].split()) == {"/proc/1/root:", "/proc/1/cwd:", "init", "root"}


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
    assert "inside-of-it" not in inside["hostname"].splitlines()
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


# Ways out: attempts.py tries them. docs/design.md has them in a table.


@pytest.fixture(scope="module")
def attempts(system: System) -> dict[str, str]:
    """What attempts.py got from each way out of a transaction that fails, and of the same with --privileged."""
    number = system.clone()
    script = (CHECKOUT / "tests/system/attempts.py").read_text()
    before = system.state()
    ended = system.ash("run", number, "python3", "-c", f"{script}\nraise SystemExit(3)", status=3)
    assert system.state() == before
    answers: dict[str, str] = json.loads(ended.stdout)
    return answers


REFUSED_BY_THE_KERNEL = [
    "load a module", "set the clock", "take a network interface down", "read root's keys", "add a key",
    "type into the terminal", "change the kernel log", "reboot", "set the host name", "use a swap file",
    "load a BPF program", "trace the whole machine", "open a file by its handle",
    "mount a tmpfs", "unmount /proc/sys", "make /sys writable", "enter a namespace",
    "make a user namespace",
]  # fmt: skip


@pytest.mark.parametrize("attempt", REFUSED_BY_THE_KERNEL)
def test_what_would_change_the_machine_is_refused(attempts: dict[str, str], attempt: str) -> None:
    assert attempts[attempt] in ("EPERM", "EACCES", "ENOSYS")  # ENOSYS: this kernel was built without it


@pytest.mark.parametrize("place", ["/", "/etc", "/var/lib", "/home", "/root", "/tmp", "/run", "/dev/shm"])
def test_device_nodes_do_not_work_wherever_they_are_made(attempts: dict[str, str], place: str) -> None:
    assert attempts[f"read a disk through a node in {place}"] == "EACCES"


@pytest.mark.parametrize(
    "place",
    ["/dev/new", "/proc/sys/kernel/hostname", "/proc/irq/default_smp_affinity", "/sys/kernel/profiling", "/proc/1/exe"],
)
def test_what_belongs_to_the_machine_is_read_only(attempts: dict[str, str], place: str) -> None:
    assert attempts[f"write to {place}"] in ("EROFS", "ENOENT")


def test_leaving_the_chroot_leads_to_the_same_root(attempts: dict[str, str]) -> None:
    assert attempts["leave the chroot"] == "init root"


def test_a_user_namespace_outside_of_the_chroot_gains_nothing(attempts: dict[str, str]) -> None:
    gained = json.loads(attempts["make a user namespace outside of the chroot"])
    assert gained.pop("mount a tmpfs") == "done", "of its own"
    assert set(gained.values()) <= {"EPERM", "EINVAL", "EROFS", "EACCES", "ENOENT", "ENOSYS"}, gained
    assert len(gained) > 10


def test_only_the_capabilities_that_packages_need_are_left(attempts: dict[str, str]) -> None:
    ours = re.search(r"CapPrm:\s*(\w+)", Path("/proc/self/status").read_text())
    assert ours
    kept = sum(1 << number for number in CAPABILITIES.values()) & int(ours[1], 16)
    sets = json.loads(attempts["capabilities"])
    assert sets == {"CapInh": 0, "CapPrm": kept, "CapEff": kept, "CapBnd": kept, "CapAmb": 0}


def test_what_packages_need_still_works(attempts: dict[str, str]) -> None:
    """Capabilities of files, immutable files, FIFOs, other users, servers' ports, own processes."""
    wanted = [
        "set a file capability",
        "make a file immutable",
        "mkfifo",
        "become another user",
        "bind port 1",
        "send a ping's packet",
        "trace an own process",
        "set a priority",
        "chroot",
        "connect to the network",
    ]
    assert {name: attempts[name] for name in wanted} == dict.fromkeys(wanted, "done")


def test_the_network_is_the_machines(system: System) -> None:
    """Also its abstract sockets."""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        abstract.bind("\0ash-test-isolation")
        for server in (tcp, abstract):
            server.listen()
        script = f"""import socket
socket.create_connection({tcp.getsockname()})
socket.socket(socket.AF_UNIX).connect(b"\\0ash-test-isolation")"""
        system.ash("run", system.clone(), "python3", "-c", script)


def test_directories_that_the_caller_has_open_are_not_inherited(system: System, tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    argv = [*ASH, "--image", str(system.image), "run", str(system.clone()), "sh", "-c", "ls /proc/self/fd/*/ | cat"]
    ended = subprocess.run(argv, capture_output=True, text=True, pass_fds=[inherited], check=True)
    os.close(inherited)
    assert "secret" not in ended.stdout


def test_a_privileged_program_may_do_more_and_the_history_says_so(system: System, snapshot: int) -> None:
    script = "mount -t tmpfs x /mnt && touch /mnt/x && test -e /dev/loop-control"
    assert system.ash("run", snapshot, "sh", "-c", script, status=32)
    system.ash("run", "--privileged", snapshot, "sh", "-c", script)
    line = system.ash("--json", "log", snapshot).json["history"][-1]
    assert "--privileged" in line["arguments"]
    assert line["result"] == "done"


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
