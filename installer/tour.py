# SPDX-License-Identifier: AGPL-3.0-or-later
"""What `try` shows: one change made, booted, broken and gone back from, in a virtual machine."""

import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

from ash import AshError
from installer.machine import DEAD_ENDS, Machine

SUGGESTIONS = """\
This is a shell of the machine in {image}. Its system is read-only; changes are made to copies of it:

  ash tree                the snapshots there are; * marks the one that starts next
  ash clone 0             a copy of snapshot 0, with a number of its own: 1, the first time
  ash install 1 hello     a package into that copy; the running system stays as it is
  ash deploy 1            start the copy from now on: then `reboot`, and try `hello`
  ash rollback            keep what is running now as it is, whatever was deployed since

`systemctl poweroff` ends it; Ctrl-] leaves it at once. What you change stays in {image}.
"""
NETWORK_SECONDS = 60
INSTALL_SECONDS = 300
# initramfs-tools' words where there is no init, and its own shell, or the kernel's words.
BOOT_FAILURES = rf"doesn't have requested /sbin/init|No working init found|{DEAD_ENDS}"


class TourError(AshError):
    """Something on the tour did not go as it must."""


def tour(image: Path, *, uefi: bool = False) -> int:
    """Go the whole way by itself, printing each step as it happens; returns 0 when all of it worked, else 1.

    The image stays as it was: the tour can be taken again.
    """
    log = image.with_name(f"{image.name}.tour.log")
    log.unlink(missing_ok=True)
    print(f"A tour of ash, in a virtual machine that starts {image} and leaves it as it is.")
    print(f"All that its console shows is in {log}.", flush=True)
    with Machine(image, uefi=uefi, snapshot=True, log=log) as machine:
        guide = _Guide(machine)
        try:
            _look(guide)
            number = _change(guide)
            _see_the_change(guide, number)
            _break(guide, number)
            _go_back(guide, number)
        except AshError as error:
            print(f"\nThis did not work: {error}", file=sys.stderr)
            return 1
    guide.explain("All of it worked. `try` in a terminal lets you go on by yourself.")
    return 0


class _Guide:
    """Types commands in the machine, and shows them with what they print as they happen."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._started = time.monotonic()

    def explain(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"\n{textwrap.fill(f'[{seconds:3.0f} s] {text}', 100)}", flush=True)

    def run(self, line: str, *, timeout: float = INSTALL_SECONDS) -> str:
        """Run a command that must succeed; returns what it printed."""
        print(f"    # {line}", flush=True)
        result = self.machine.command(line, timeout=timeout, ok=None)
        print(textwrap.indent(result.output, "    "), flush=True)
        if result.status:
            raise TourError(f"`{line}` ended with status {result.status}")
        return result.output

    def require(self, holds: bool, claim: str) -> None:
        """Stop the tour unless what it just claimed holds."""
        if not holds:
            raise TourError(f"it must be that {claim}")

    def reboot(self) -> None:
        """Restart into the menu's default."""
        print("    # reboot", flush=True)
        self.machine.reboot()
        self.machine.login()


def _look(guide: _Guide) -> None:
    guide.explain("Starting the machine; under emulation this takes a minute.")
    guide.machine.login()
    guide.explain("It is up. There is one snapshot, number 0: the system as it was installed. The star: it is next.")
    guide.run("ash tree")


def _change(guide: _Guide) -> int:
    """Install a package into a copy of the base; returns the copy's number."""
    guide.explain("The running system is never changed. So: a copy of snapshot 0,")
    number = _number_of(guide.run("ash clone 0"))
    guide.explain(f"a package in it, from Debian's archive (snapshot {number} gets it whole, or stays as it was),")
    guide.machine.command(f"/usr/lib/systemd/systemd-networkd-wait-online --any --timeout={NETWORK_SECONDS}")
    guide.run(f"ash install {number} hello")
    guide.require(guide.machine.command("hello", ok=None).status == 127, "the running system does not have it")
    guide.explain("and the copy shall start next.")
    guide.run(f"ash deploy {number}")
    guide.reboot()
    return number


def _number_of(output: str) -> int:
    """The snapshot that a command says it has made."""
    said = re.search(r"^snapshot (\d+) ", output, re.MULTILINE)
    if said is None:
        raise TourError(f"there must be a snapshot's number in {output!r}")
    return int(said[1])


def _see_the_change(guide: _Guide, number: int) -> None:
    guide.explain(f"Snapshot {number} is running, and has the program.")
    guide.require("Hello, world!" in guide.run("hello"), "hello greets the world")
    guide.require(_current(guide) == number, f"snapshot {number} is booted")
    guide.run("ash tree")


def _break(guide: _Guide, number: int) -> None:
    guide.explain("Now a mistake: a new snapshot, in which somebody deletes the program that starts everything else.")
    broken = _number_of(guide.run(f"ash branch {number}"))
    guide.run(f"ash run {broken} rm -r /usr/lib/systemd")
    guide.run(f"ash deploy {broken}")
    print("    # reboot", flush=True)
    guide.machine.reboot()
    failure = guide.machine.expect(rf"{BOOT_FAILURES}|\S login: ", 300).group()
    guide.require(not failure.endswith("login: "), f"snapshot {broken} cannot start")
    guide.explain(f"It does not come up ({failure!r}). The way back is the boot menu: reset, and the last booted one.")


def _go_back(guide: _Guide, number: int) -> None:
    guide.machine.reset()
    print(f"    > {guide.machine.choose('last booted')}", flush=True)
    guide.machine.login()
    guide.explain("The system from before the mistake runs again. Now keep it, to start from now on:")
    guide.run("hello")
    guide.require(_current(guide) == number, f"snapshot {number} is booted")
    kept = _number_of(guide.run("ash rollback"))
    tree = guide.run("ash tree")
    starred = [line for line in tree.splitlines() if "*" in line]
    guide.require(len(starred) == 1 and bool(re.search(rf"\b{kept}\b", starred[0])), f"snapshot {kept} starts next")


def _current(guide: _Guide) -> int:
    return int(guide.run("ash current").split()[0])


def guided(image: Path, *, uefi: bool = False) -> int:
    """Start an image, log in, suggest what to try, and hand the machine's console to the user's terminal.

    Returns 0 when the user has left the machine.
    """
    print(f"Starting {image}; under emulation this takes a minute.", flush=True)
    with Machine(image, uefi=uefi) as machine:
        machine.enter_shell()
        columns, rows = shutil.get_terminal_size()
        terminal = shlex.quote(os.environ.get("TERM", "linux"))
        machine.send(f"stty cols {columns} rows {rows}; export TERM={terminal}; dmesg --console-level emerg\n")
        machine.expect(r"[#$] ", 60)  # the shell has read its line: it takes the user's now
        print(SUGGESTIONS.format(image=image), flush=True)
        machine.send("\n")
        machine.hand_over()
    print(f"\nThe machine has ended; {image} is as you left it.")
    return 0
