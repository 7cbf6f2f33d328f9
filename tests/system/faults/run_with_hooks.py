# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run ash, and act at the named steps that change the disk: `run_with_hooks.py OPTIONS ASH-ARGUMENTS`.

ash announces each step by the audit event `ash.step`. OPTIONS is a JSON object with any of
    "names": a file; the name of each step is appended to it;
    "interrupt": the name of a step; SIGINT is sent right after it;
    "interrupt at an end": true; SIGINT is sent as soon as ash has seen that a child of it has ended, once;
    "kill": the number of a step (the first is 1), or a regular expression for its name; ash is killed before it;
    "after": a prefix of a step's name; "kill" by name ignores all steps before that one;
    "copies": a directory; before each step the disk image is copied to it (by reflink) as `NUMBER.img`. A copy has what
        was written to the disk by then, as after a power cut;
    "fill": the number of a step; before it, a file system is filled;
    "filler": the file that fills it; it may be on the disk image, as ash has it mounted;
    "fail": the name of a step; it fails with EIO, once;
    "link": a prefix of a step's name, a directory, and a symlink target; at that step the symlink replaces the directory;
    "do": a regular expression for a step's name (or for "rmdir PATH"), and a program with its arguments to run before
        that step, once;
    "booted": the slot that ash takes for booted;
    "began": a file that is created when ash itself starts.
"""

import errno
import fcntl
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(CHECKOUT))
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ash has started

import ash  # noqa: E402


def copy_disk(image: Path, copy: Path) -> None:
    """Copy an image by reflink: what has been written to it so far."""
    with image.open("rb") as old, copy.open("xb") as new:
        fcntl.ioctl(new, ash.FICLONE, old.fileno())


class Hooks:
    """An audit hook that acts at ash's steps as the options say."""

    def __init__(self, options: dict[str, Any], image: Path) -> None:
        self.options = options
        self.image = image
        self.process = os.getpid()
        self.interrupts = False
        self.steps = mmap.mmap(-1, mmap.PAGESIZE)  # a counter, shared with the jobs of a tree command

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.interrupts and event in ("open", "ash.step"):
            self.interrupts = False
            os.kill(self.process, signal.SIGINT)
        if event == "os.rmdir":
            self._do(f"rmdir {arguments[0]}")
        elif event == "ash.step":
            self._step(str(arguments[0]))

    def _step(self, name: str) -> None:
        self.interrupts = name == self.options.get("interrupt")
        step = 1 + int.from_bytes(self.steps[:4], "little")
        self.steps[:4] = step.to_bytes(4, "little")
        if names := self.options.get("names"):
            with Path(names).open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{name}\n")
        if copies := self.options.get("copies"):
            copy_disk(self.image, Path(copies, f"{step}.img"))
        if step == self.options.get("fill"):
            from tests.support import fill  # importing it takes as long as the rest of a short command

            fill(Path(self.options["filler"]))
        if self.options.get("fail") == name:
            del self.options["fail"]
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._link(name)
        self._do(name)
        self._kill(step, name)

    def _link(self, name: str) -> None:
        before, directory, target = self.options.get("link", [None] * 3)
        if before and name.startswith(before):
            self.options["link"] = [None] * 3
            Path(directory).rename(f"{directory}-away")
            Path(directory).symlink_to(target)

    def _kill(self, step: int, name: str) -> None:
        if name.startswith(self.options.get("after", "")):
            self.options["after"] = ""
        kill = None if self.options.get("after") else self.options.get("kill")
        if re.match(kill, name) if isinstance(kill, str) else step == kill:
            for process in dict.fromkeys([self.process, os.getpid()]):
                os.kill(process, signal.SIGKILL)

    def _do(self, what: str) -> None:
        """Run the program of the option "do", if its time has come."""
        before, *argv = self.options.get("do", [None])
        if before and re.match(before, what):
            self.options["do"] = [None]
            subprocess.run(argv, check=True)


def interrupt_at_an_end() -> None:
    """Have SIGINT arrive right after the first time that ash waits for a child: no audit event tells that."""
    process, waits = os.getpid(), {name: getattr(os, name) for name in ("waitpid", "waitid")}

    def waiting(wait: Callable[..., object]) -> Callable[..., object]:
        def wait_then_interrupt(*arguments: int) -> object:
            ended = wait(*arguments)
            if os.getpid() == process:
                for name, original in waits.items():
                    setattr(os, name, original)
                os.kill(process, signal.SIGINT)
            return ended

        return wait_then_interrupt

    for name, wait in waits.items():
        setattr(os, name, waiting(wait))


def main() -> int:
    """Run ash with the rest of the command line."""
    options, sys.argv[1:] = json.loads(sys.argv[1]), sys.argv[2:]
    if slot := options.get("booted"):
        ash.System.booted_slot = property(lambda _: slot)  # type: ignore[method-assign,assignment]
    sys.addaudithook(Hooks(options, Path(sys.argv[sys.argv.index("--image") + 1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.get("interrupt at an end"):
        interrupt_at_an_end()
    if began := options.get("began"):
        Path(began).touch()
    return ash.main()


if __name__ == "__main__":
    sys.exit(main())
