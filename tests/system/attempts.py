# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs inside a transaction: tries all ways out of it, and prints what came of each, as JSON.

What succeeds by mistake must not harm the machine of the tests: settings are set to what they are, system calls get
arguments that are invalid but are checked only after the permission.
"""

import ctypes
import errno
import fcntl
import json
import os
import platform
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
CALLS = {
    "x86_64": {
        "reboot": 169,
        "init_module": 175,
        "syslog": 103,
        "keyctl": 250,
        "add_key": 248,
        "bpf": 321,
        "perf": 298,
    },
    "aarch64": {
        "reboot": 142,
        "init_module": 105,
        "syslog": 116,
        "keyctl": 219,
        "add_key": 217,
        "bpf": 280,
        "perf": 241,
    },
}[platform.machine()]
MS_REMOUNT, MS_BIND, MS_REC, MNT_DETACH = 32, 4096, 16384, 2
NEW_USER_MOUNT_PID_NET = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000
answers: dict[str, str] = {}


def attempt(name: str, work: Callable[[], Any], into: dict[str, str] = answers) -> None:
    """Note what came of it: the name of the error, "done", or what it returned."""
    try:
        into[name] = work() or "done"
    except OSError as error:
        into[name] = errno.errorcode[error.errno or 0]


def libc(function: str, *arguments: Any) -> None:
    """Call a function of the C library; OSError if it fails."""
    converted = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    if getattr(LIBC, function)(*converted) == -1:
        raise OSError(ctypes.get_errno(), "")


def call(name: str, *arguments: Any) -> None:
    libc("syscall", CALLS[name], *arguments)


def mount(kind: str, target: str, flags: int = 0, source: str = "none") -> None:
    libc("mount", source.encode(), target.encode(), kind.encode(), flags, None)


def interface_down() -> None:
    """Set the flags of lo to what they are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = fcntl.ioctl(any_socket, 0x8913, struct.pack("16sH22x", b"lo", 0))  # SIOCGIFFLAGS
        fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS


def by_handle() -> None:
    """Open the root by its file handle, as a handle of any directory of the file system could be guessed."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    ident = ctypes.c_int()
    libc("name_to_handle_at", -100, b"/", handle, ctypes.byref(ident), 0)
    root = os.open("/", os.O_RDONLY)
    libc("open_by_handle_at", root, handle, os.O_RDONLY)


def read_disk(directory: str) -> str:
    """Read from each disk by a device node made in a directory."""
    node = Path(directory, "attempted-node")
    for line in Path("/proc/partitions").read_text().splitlines()[2:]:
        major, minor = map(int, line.split()[:2])
        os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(major, minor))
        try:
            with node.open("rb") as disk:
                disk.read(1)
            return "read"
        finally:
            node.unlink()
    raise OSError(errno.EACCES, "there is no disk at all")


def write(path: str) -> None:
    """Open a file for writing, or create it."""
    if path.endswith("/exe"):
        Path(path).chmod(stat.S_IMODE(Path(path).stat().st_mode))
    else:
        os.close(os.open(path, os.O_WRONLY | (os.O_CREAT if "/dev/" in path else 0)))


def in_child(work: Callable[[], str]) -> str:
    """What a function returns in a process of its own."""
    source, target = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(target, work().encode())
        except OSError as error:
            os.write(target, errno.errorcode[error.errno or 0].encode())
        os._exit(0)
    os.close(target)
    os.waitpid(child, 0)
    text = os.read(source, 65536).decode()
    os.close(source)
    return text


def leave_chroot() -> None:
    """The classic way: chroot into a directory below the one that is open."""
    root = os.open("/", os.O_RDONLY)
    deeper = Path("/tmp/deeper")
    deeper.mkdir(exist_ok=True)
    os.chroot(deeper)
    os.fchdir(root)
    for _ in range(50):
        os.chdir("..")
    os.chroot(".")


def names_outside() -> str:
    leave_chroot()
    return " ".join(sorted(os.listdir("/")))


def unshared() -> str:
    libc("unshare", NEW_USER_MOUNT_PID_NET)
    return "done"


def user_namespace() -> str:
    """All capabilities in a new user namespace: what they are good for."""
    leave_chroot()
    libc("unshare", NEW_USER_MOUNT_PID_NET)
    for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
        Path("/root/proc/self", name).write_text(text)
    return in_child(capable)


def capable() -> str:
    """As root of the user namespace, and process 1 of a PID namespace."""
    found: dict[str, str] = {}
    attempt("mount a tmpfs", lambda: mount("tmpfs", "/root/mnt"), found)
    attempt("make a device node", lambda: os.mknod("/root/mnt/node", 0o600 | stat.S_IFBLK, os.makedev(1, 1)), found)
    for kind in ("proc", "sysfs", "debugfs", "cgroup2", "bpf", "securityfs", "tracefs", "devtmpfs"):
        attempt(f"mount {kind}", lambda kind=kind: mount(kind, "/root/mnt"), found)  # type: ignore[misc]
    for place in ("/root", "/root/sys", "/root/proc/sys", "/root/dev", "/root/var"):
        attempt(f"change the mount {place}", lambda p=place: mount("", p, MS_REMOUNT | MS_BIND), found)  # type: ignore[misc]
        attempt(f"unmount {place}", lambda p=place: libc("umount2", p.encode(), MNT_DETACH), found)  # type: ignore[misc]
    attempt("bind what is below a mount", lambda: mount("", "/root/mnt", MS_BIND, source="/root/proc"), found)
    for place in (
        "/root/proc/sys/kernel/hostname",
        "/root/proc/irq/default_smp_affinity",
        "/root/sys/kernel/profiling",
    ):
        attempt(f"write to {place}", lambda p=place: write(p), found)  # type: ignore[misc]
    attempt("set the clock", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()), found)
    attempt("load a module", lambda: call("init_module", None, 0, b""), found)
    return json.dumps(found)


def capabilities() -> str:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap")]
    return json.dumps({name.rstrip(":"): int(value, 16) for name, value in lines})


def file_capability() -> None:
    """CAP_NET_RAW for a file, as ping has it."""
    Path("/etc/attempted").touch()
    os.setxattr("/etc/attempted", "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))


def immutable() -> None:
    """What chattr +i does, and -i."""
    with Path("/etc/attempted").open() as file:
        for flags in (0x10, 0):
            fcntl.ioctl(file, 0x40086602, struct.pack("l", flags))  # FS_IOC_SETFLAGS


def bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 1))


def trace() -> None:
    """PTRACE_SEIZE of a child, as gdb and strace do it."""
    with subprocess.Popen(["sleep", "9"]) as child:
        try:
            libc("ptrace", 0x4206, child.pid, None, None)
        finally:
            child.kill()


def connected() -> None:
    """The network is the machine's own: what listens there can be reached."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname()).close()


def other_user() -> str:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    return "done"


def changed_root() -> str:
    os.chroot("/usr")
    return "done"


attempt("load a module", lambda: call("init_module", None, 0, b""))
attempt("set the clock", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))
attempt("take a network interface down", interface_down)
attempt("read root's keys", lambda: call("keyctl", 0, -4, 0))
attempt("add a key", lambda: call("add_key", b"user", b"ash-test", b"x", 1, -4))
attempt("type into the terminal", lambda: fcntl.ioctl(0, 0x5412, b"x"))
attempt("change the kernel log", lambda: call("syslog", 8, None, 0))
attempt("reboot", lambda: call("reboot", 0, 0, 0, 0))
attempt("set the host name", lambda: socket.sethostname(socket.gethostname()))
attempt("use a swap file", lambda: libc("swapon", b"/etc/hostname", 0))
attempt("load a BPF program", lambda: call("bpf", 5, None, 0))
attempt("trace the whole machine", lambda: call("perf", struct.pack("II", 1, 112) + bytes(104), -1, 0, -1, 0))
attempt("open a file by its handle", by_handle)
attempt("mount a tmpfs", lambda: mount("tmpfs", "/mnt"))
attempt("unmount /proc/sys", lambda: libc("umount2", b"/proc/sys", MNT_DETACH))
attempt("make /sys writable", lambda: mount("", "/sys", MS_REMOUNT | MS_BIND))
attempt("enter a namespace", lambda: libc("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), 0))
attempt("make a user namespace", lambda: in_child(unshared))
for place in ("/", "/etc", "/var/lib", "/home", "/root", "/tmp", "/run", "/dev/shm"):
    attempt(f"read a disk through a node in {place}", lambda: read_disk(place))  # noqa: B023 (called at once)
for place in (
    "/dev/new",
    "/proc/sys/kernel/hostname",
    "/proc/irq/default_smp_affinity",
    "/proc/sysrq-trigger",
    "/sys/kernel/profiling",
    "/proc/1/exe",
):
    attempt(f"write to {place}", lambda: write(place))  # noqa: B023
attempt("leave the chroot", lambda: in_child(names_outside))
attempt("make a user namespace outside of the chroot", lambda: in_child(user_namespace))
attempt("capabilities", capabilities)
attempt("set a file capability", file_capability)
attempt("make a file immutable", immutable)
attempt("mkfifo", lambda: os.mkfifo("/etc/attempted-fifo"))
attempt("become another user", lambda: in_child(other_user))
attempt("bind port 1", bound)
attempt("send a ping's packet", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close())
attempt("trace an own process", trace)
attempt("set a priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, -1))
attempt("chroot", lambda: in_child(changed_root))
attempt("connect to the network", connected)
json.dump(answers, sys.stdout)
sys.stdout.flush()
