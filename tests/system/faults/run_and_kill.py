# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run ash until its n-th step that changes something on the disk, and kill it there: `run_and_kill.py N ASH-ARGUMENTS`.

Steps are seen by Python's audit events: renaming, deleting and making files, running programs, system calls by
ctypes, requests to btrfs that tell it something. So this knows nothing of how ash does things, and a new step is cut like the old ones.
"""

import os
import signal
import sys
from pathlib import Path

EVENTS = {
    "ash.step",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.fork",
    "subprocess.Popen",
}
CALLS = {"renameat2"}
IOC_WRITE = 1  # <asm-generic/ioctl.h>: the direction is in a request's highest two bits


class Cutter:
    """Counts the steps of this process, and kills it before the n-th."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.process = os.getpid()

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        is_call = event == "ctypes.dlsym" and arguments[1] in CALLS
        tells = event == "fcntl.ioctl" and isinstance(arguments[1], int) and arguments[1] >> 30 == IOC_WRITE
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        compiled = sys.pycache_prefix and str(arguments[:1]).find(sys.pycache_prefix) >= 0  # Python's own doing
        if os.getpid() == self.process and not compiled and (event in EVENTS or is_call or tells or writes):
            self.left -= 1
            if self.left == 0:
                os.kill(self.process, signal.SIGKILL)


def main() -> int:
    """Run ash with what follows the number on the command line."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    import ash

    step = int(sys.argv[1])
    sys.argv[1:2] = []
    sys.addaudithook(Cutter(step))
    return ash.main()


if __name__ == "__main__":
    sys.exit(main())
