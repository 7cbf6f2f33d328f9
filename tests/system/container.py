# SPDX-License-Identifier: AGPL-3.0-or-later
"""A deployment as a container: its root is `/`, mounted as its fstab says, but no kernel is booted."""

import shlex
import subprocess
import tempfile
from pathlib import Path

from installer.executable import build
from tests.support import DISTRIBUTION, DONE, SECONDS, Outcome, Terminal
from tests.system.disk_system import System

# pivot_root, because ash must not find itself in a chroot. The disk gets the name of a real one: GRUB ignores a root on
# a file-backed loop device. It keeps its own name too: the kernel goes back to that if anybody scans for devices.
DISK = "/dev/vda"
START = """\
mount -t tmpfs tmpfs {root}
for name in null zero full random urandom tty ptmx fd stdin stdout stderr; do cp -a /dev/$name {root}/; done
mkdir {root}/pts {root}/shm
mount --rbind /dev/pts {root}/pts
cp -a {device} {root}/
cp -a {device} {root}/vda
mount --move {root} /dev
{mounts}
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev
mount --rbind /sys {root}/sys
mount -t tmpfs tmpfs {root}/run
mount --bind {root}/.snapshots/rootfs {root}/.snapshots/rootfs
mount -o remount,bind,ro {root}/.snapshots/rootfs
cd {root}
pivot_root . .
umount -l .
cd /root
exec env -i PATH=/usr/sbin:/usr/bin HOME=/root TERM=xterm LANG=C.UTF-8 sh -c "$1"
"""


class Container:
    """A system with a running deployment, in which command lines are typed as users type them.

    Args:
        system: the system; the ash of this checkout is installed in it.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        (system.files.state / "ash").write_text(build(DISTRIBUTION))
        (system.files.state / "efi").write_text("")  # its disk has no EFI partition
        self.boot()

    def boot(self) -> None:
        """Switch to the deployment for the next boot, and run the recovery that runs at boot."""
        self.slot = self.system.files.default_slot()
        self.type("ash recover")

    def type(self, line: str, status: int = DONE, keys: str = "") -> Outcome:
        """Run a command line without a terminal, and assert its exit status.

        Args:
            line: a line of shell.
            status: its exit status.
            keys: its standard input.
        """
        with tempfile.TemporaryDirectory(prefix="ash-test-") as directory:
            argv = self._argv(line, Path(directory))
            done = subprocess.run(argv, input=keys, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == status, f"{line} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return Outcome(done.returncode, done.stdout, done.stderr)

    def terminal(self, line: str, directory: Path) -> Terminal:
        """Start a command line on a terminal; the directory is a private mount point for its root."""
        return Terminal(self._argv(line, directory))

    def _argv(self, line: str, directory: Path) -> list[str]:
        device = self.system.attached().split()[0]
        script = START.format(root=directory, device=device, mounts=self._mounts(directory))
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script, "sh", line]

    def _mounts(self, directory: Path) -> str:
        """mount commands for the lines of the deployment's fstab that ash wrote."""
        uuid = (self.system.files.state / "part").read_text().strip()
        commands = []
        for line in (self.system.root(self.slot) / "etc/fstab").read_text().splitlines():
            source, target, kind, options = line.split()[:4]
            if source.startswith("UUID=") and source != f"UUID={uuid}":
                continue  # the EFI partition
            known = {f"UUID={uuid}": DISK, "tmpfs": "tmpfs"}
            how = ["--bind"] if kind == "none" else ["-t", kind, "-o", options]
            commands.append(
                shlex.join(["mount", *how, known.get(source, f"{directory}{source}"), f"{directory}{target}"])
            )
        return "\n".join(commands)
