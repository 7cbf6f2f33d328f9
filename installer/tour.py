# SPDX-License-Identifier: AGPL-3.0-or-later
"""What `try` shows in a virtual machine: a change, its boot, a broken system and the way back."""

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
This is a shell of the machine in {image}. Its system is read-only; you change copies of it:

  ash tree                list the snapshots; * marks the one that boots next
  ash clone 0             copy snapshot 0; the first copy is snapshot 1
  ash install 1 hello     install a package into that copy; the running system does not change
  ash deploy 1            boot the copy from now on: then `reboot`, and run `hello`
  ash rollback            boot what is running now, whatever was deployed since

`systemctl poweroff` shuts it down; Ctrl-] leaves it at once. Your changes stay in {image}.
"""
NETWORK_SECONDS = 60
INSTALL_SECONDS = 300
# Messages of initramfs-tools and of the kernel when there is no init.
BOOT_FAILURES = rf"doesn't have requested /sbin/init|No working init found|{DEAD_ENDS}"


class TourError(AshError):
    """A step of the tour failed."""


def tour(image: Path, *, uefi: bool = False) -> int:
    """Run the whole tour, printing each step. Returns 0 if all of it worked, else 1; the image does not change."""
    log = image.with_name(f"{image.name}.tour.log")
    log.unlink(missing_ok=True)
    print(f"A tour of ash in a virtual machine that boots {image} and does not change it.")
    print(f"The output of its console is in {log}.", flush=True)
    with Machine(image, uefi=uefi, snapshot=True, log=log) as machine:
        guide = _Guide(machine)
        try:
            _look(guide)
            number = _change(guide)
            _see_the_change(guide, number)
            _break(guide, number)
            _go_back(guide, number)
        except AshError as error:
            print(f"\nThe tour failed: {error}", file=sys.stderr)
            return 1
    guide.explain("All of it worked. Run `try` in a terminal to continue by yourself.")
    return 0


class _Guide:
    """Types commands in the machine, and prints them with their output."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._started = time.monotonic()

    def explain(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"\n{textwrap.fill(f'[{seconds:3.0f} s] {text}', 100)}", flush=True)

    def run(self, line: str, *, timeout: float = INSTALL_SECONDS) -> str:
        """Run a command that must succeed. Returns its output."""
        print(f"    # {line}", flush=True)
        result = self.machine.command(line, timeout=timeout, ok=None)
        print(textwrap.indent(result.output, "    "), flush=True)
        if result.status:
            raise TourError(f"`{line}` ended with status {result.status}")
        return result.output

    def require(self, holds: bool, claim: str) -> None:
        """Raise TourError unless a claim holds."""
        if not holds:
            raise TourError(f"this is not true: {claim}")

    def reboot(self) -> None:
        """Reboot into the menu's default."""
        print("    # reboot", flush=True)
        self.machine.reboot()
        self.machine.login()


def _look(guide: _Guide) -> None:
    guide.explain("Booting the machine; under emulation this takes a minute.")
    guide.machine.login()
    guide.explain("It is up. There is one snapshot, 0: the system as it was installed. The star marks what boots next.")
    guide.run("ash tree")


def _change(guide: _Guide) -> int:
    """Install a package into a copy of the base. Returns the copy's number."""
    guide.explain("The running system is read-only. So copy snapshot 0,")
    number = _number_of(guide.run("ash clone 0"))
    guide.explain(f"install a package from Debian into the copy (completely, or snapshot {number} does not change),")
    guide.machine.command(f"/usr/lib/systemd/systemd-networkd-wait-online --any --timeout={NETWORK_SECONDS}")
    guide.run(f"ash install {number} hello")
    guide.require(guide.machine.command("hello", ok=None).status == 127, "the running system does not have it")
    guide.explain("and deploy the copy, to boot it next.")
    guide.run(f"ash deploy {number}")
    guide.reboot()
    return number


def _number_of(output: str) -> int:
    """The number of the snapshot that a command reports as created."""
    said = re.search(r"^snapshot (\d+) ", output, re.MULTILINE)
    if said is None:
        raise TourError(f"there is no snapshot number in {output!r}")
    return int(said[1])


def _see_the_change(guide: _Guide, number: int) -> None:
    guide.explain(f"Snapshot {number} is running, with the program.")
    guide.require("Hello, world!" in guide.run("hello"), "hello greets the world")
    guide.require(_current(guide) == number, f"snapshot {number} is booted")
    guide.run("ash tree")


def _break(guide: _Guide, number: int) -> None:
    guide.explain("Now a mistake: in a new snapshot, somebody replaces the program that starts all others.")
    broken = _number_of(guide.run(f"ash branch {number}"))
    guide.run(f"ash run {broken} ln -sf /bin/false /usr/sbin/init")
    guide.explain("A new deployment has three tries to start. One is enough here:")
    guide.run("echo boot_tries::1 >> /etc/ash.conf")
    guide.run(f"ash deploy {broken}")
    print("    # reboot", flush=True)
    guide.machine.reboot()
    failure = guide.machine.expect(rf"{BOOT_FAILURES}|\S login: ", 300).group()
    guide.require(not failure.endswith("login: "), f"snapshot {broken} cannot start")
    guide.explain(f"It does not boot ({failure!r}). Nobody has to do anything: the machine restarts by itself,")


def _go_back(guide: _Guide, number: int) -> None:
    guide.machine.expect("Rebooting", 120)
    guide.machine.login()
    guide.explain("and boots the last deployment that was good: the system from before the mistake.")
    guide.run("hello")
    guide.require(_current(guide) == number, f"snapshot {number} is booted")
    guide.machine.command("until systemctl is-active ash-bless; do sleep 1; done")
    guide.require("did not start" in guide.run("ash status"), "the machine says what happened")
    tree = guide.run("ash tree")
    starred = [line for line in tree.splitlines() if "*" in line]
    guide.require(len(starred) == 1 and bool(re.search(rf"\b{number}\b", starred[0])), f"snapshot {number} boots next")


def _current(guide: _Guide) -> int:
    return int(guide.run("ash current").split()[0])


def guided(image: Path, *, uefi: bool = False) -> int:
    """Boot an image, log in, suggest commands, and connect the console to the user's terminal. Returns 0."""
    print(f"Booting {image}; under emulation this takes a minute.", flush=True)
    with Machine(image, uefi=uefi) as machine:
        machine.enter_shell()
        columns, rows = shutil.get_terminal_size()
        terminal = shlex.quote(os.environ.get("TERM", "linux"))
        machine.send(f"stty cols {columns} rows {rows}; export TERM={terminal}; dmesg --console-level emerg\n")
        machine.expect(r"[#$] ", 60)  # the shell waits for input
        print(SUGGESTIONS.format(image=image), flush=True)
        machine.send("\n")
        machine.hand_over()
    print(f"\nThe machine is off; {image} is as you left it.")
    return 0
