# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run ash, and kill it before the N-th thing that may change the disk: `run_and_kill.py N ASH-ARGUMENTS`.

Python's audit events report them: renaming, deleting and creating files, running programs, system calls by ctypes, ioctls
that write. This does not depend on the names of ash's steps, so that no new code can be forgotten.
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
IOC_WRITE = 1  # <asm-generic/ioctl.h>: the direction is in the two highest bits of a request


class Cutter:
    """Counts the changes of this process, and kills it before the N-th."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.process = os.getpid()

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        is_call = event == "ctypes.dlsym" and arguments[1] in CALLS
        tells = event == "fcntl.ioctl" and isinstance(arguments[1], int) and arguments[1] >> 30 == IOC_WRITE
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        compiled = (
            sys.pycache_prefix and str(arguments[:1]).find(sys.pycache_prefix) >= 0
        )  # bytecode, which Python writes
        if os.getpid() == self.process and not compiled and (event in EVENTS or is_call or tells or writes):
            self.left -= 1
            if self.left == 0:
                os.kill(self.process, signal.SIGKILL)


def main() -> int:
    """Run ash with the rest of the command line."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    import ash

    step = int(sys.argv[1])
    sys.argv[1:2] = []
    sys.addaudithook(Cutter(step))
    return ash.main()


if __name__ == "__main__":
    sys.exit(main())
