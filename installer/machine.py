# SPDX-License-Identifier: AGPL-3.0-or-later
"""Virtual machines that boot a disk image: in this terminal, or driven over their serial console."""

import codecs
import contextlib
import functools
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from ash import AshError
from installer import host

QEMU = "qemu-system-x86_64"
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
# With Secure Boot, and the keys of Microsoft, which sign the distributions' shims.
SECURE_FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd")
SECURE_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.ms.fd")
# One processor under TCG: with more, a guest's kernel that patches its own code now and then dies of a stale "int3".
# TCG executes `rep movsb` byte by byte: without ERMS and FSRM the kernel copies and clears memory in larger steps,
# which saves a fifth of a boot's time.
TCG = ("-accel", "tcg,tb-size=512", "-cpu", "max,erms=off,fsrm=off", "-smp", "1")
KVM = ("-accel", "kvm", "-cpu", "host", "-smp", "2")

# One boot takes 20 seconds on an idle machine; other work on the same cores makes it several times that.
BOOT_SECONDS = 300.0
COMMAND_SECONDS = 120.0
# How long GRUB may take to move the highlight; if it does not move, the end of the menu is reached.
MENU_SECONDS = 1.5
# QEMU holds a key for a tenth of a second, and drops keys that are pressed meanwhile.
KEY_SECONDS = 0.3
# The kernel's line discipline truncates longer lines.
LINE_BYTES = 4000
# Ctrl-], as in telnet: no shell or editor uses it.
LEAVE_KEY = b"\x1d"

ESCAPE = re.compile(
    r"\x1b(?:"
    r"\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|[]P^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC, DCS and their like: window title, queries
    r"|[ -/][0-~]"  # character sets
    r"|[0-OQ-Z\\`-~]"  # single letters
    r")"
)
HIGHLIGHTED = re.compile(r"\x1b\[\d+;\d+H\*([^\x1b\r\n]+)")
# What GRUB's menu says while it waits.
MENU_HELP = "which entry is highlighted"
COUNTDOWN = r"highlighted entry will be executed automatically"
# What the kernel says when it restarts the machine.
RESTARTS = r"reboot: Restarting system"
# Where a boot can end instead of at the login prompt.
DEAD_ENDS = r"Kernel panic - not syncing|\(initramfs\) |grub rescue> |grub> |emergency mode|No bootable device"


# After a fault of the emulator, in one boot; they are rare.
MOST_RESETS = 2


def is_fault_of_emulator(text: str) -> bool:
    """Whether a kernel has printed flags of the processor that no processor has: only 22 bits of them exist.

    Seen with QEMU 7.2: it had miscomputed flags, and the kernel took a wrong branch.
    """
    return any(int(flags, 16) >> 22 for flags in re.findall(r"EFLAGS: ([0-9a-f]{8})\b", text))


class MachineError(AshError):
    """A virtual machine did not behave as expected; the message ends with the console's last lines."""


@dataclass(frozen=True)
class CommandResult:
    """The exit status of a command in the machine, and its output and errors as one text."""

    status: int
    output: str


@dataclass(frozen=True)
class Picture:
    """A screenshot: three bytes, red, green and blue, for each pixel, row by row."""

    width: int
    height: int
    dots: bytes

    @classmethod
    def of_ppm(cls, content: bytes) -> Self:
        """Parse QEMU's format: lines with "P6", width and height, and "255", then the pixels."""
        kind, size, depth, dots = content.split(b"\n", 3)
        width, height = map(int, size.split())
        assert (kind, depth, len(dots)) == (b"P6", b"255", 3 * width * height)
        return cls(width, height, dots)

    def colours(self) -> set[bytes]:
        """The distinct colours."""
        return {self.dots[at : at + 3] for at in range(0, len(self.dots), 3)}

    def png(self) -> bytes:
        """The picture as a PNG file."""
        row = 3 * self.width
        rows = b"".join(b"\0" + self.dots[at : at + row] for at in range(0, len(self.dots), row))

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@functools.cache
def accelerator() -> tuple[str, ...]:
    """QEMU's options for executing the guest: KVM if a guest really runs under it, else TCG.

    A /dev/kvm that can be opened proves nothing: in a container or a nested machine it may not run a guest. So start
    a guest of three instructions, which makes QEMU exit with a status of its own. A KVM that does not use the
    processor's virtualization (PVM) passes that, but GRUB hangs in it.
    """
    virtualized = re.search(r"^flags\b.* (vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if not virtualized or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    # mov al, 0x31; out 0xf4, al; hlt: QEMU's exit device makes the status 2 * 0x31 + 1 of it.
    sector = b"\xb0\x31\xe6\xf4\xf4".ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile(suffix=".img") as disk:
        disk.write(sector)
        disk.flush()
        argv = [QEMU, *KVM, "-m", "16", "-display", "none", "-nodefaults", "-no-reboot"]
        argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        argv += ["-drive", f"file={disk.name},format=raw,if=ide"]
        try:
            ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=15, check=False)
        except subprocess.TimeoutExpired:
            return TCG
    return KVM if ended.returncode == 2 * 0x31 + 1 else TCG


DISK_HARDWARE = "virtio-blk-pci"


def _hardware(
    image: Path,
    *,
    uefi: bool,
    snapshot: bool,
    memory: int,
    scratch: Path,
    secure: bool = False,
    disk_format: str = "raw",
    expendable: bool = False,
    hardware: str = DISK_HARDWARE,
) -> list[str]:
    """QEMU's command line without the console; `scratch` receives the UEFI variables."""
    argv = [QEMU, *accelerator(), "-m", str(memory)]
    if uefi or secure:
        variables = scratch / "uefi-variables"
        shutil.copyfile(SECURE_VARIABLES if secure else FIRMWARE_VARIABLES, variables)
        argv += ["-machine", "q35,smm=on" if secure else "q35"]
        argv += ["-global", "driver=cfi.pflash01,property=secure,value=on"] if secure else []
        firmware = SECURE_FIRMWARE if secure else FIRMWARE
        argv += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={firmware}"]
        argv += ["-drive", f"if=pflash,unit=1,format=raw,file={variables}"]
    # QEMU's option parser reads two commas in a file name as one.
    disk = f"file={str(image).replace(',', ',,')},format={disk_format},if=none,id=disk"
    # unsafe: no flushes to the host's disk. The end of QEMU loses nothing, a power cut of the host may.
    argv += ["-drive", disk + ",snapshot=on" * snapshot + ",cache=unsafe" * (snapshot or expendable)]
    argv += ["-device", f"{hardware},drive=disk"]
    argv += ["-nic", "user,model=virtio-net-pci", "-device", "virtio-rng-pci"]
    return argv


def _require_qemu() -> None:
    """Install QEMU and the UEFI firmware if they are missing."""
    host.require(host.QEMU)


def boot_interactively(image: Path, *, uefi: bool = False, snapshot: bool = False, memory: int = 2048) -> int:
    """Boot an image in this terminal, until it is powered off. Returns QEMU's exit status.

    Args:
        image: the disk.
        uefi: boot with UEFI instead of BIOS.
        snapshot: discard all changes to the image.
        memory: in MiB.
    """
    _require_qemu()
    if image.is_file():
        host.require_detached(image)
    print(f"Booting {image}. Ctrl-A X kills the machine; `poweroff` inside shuts it down.")
    with tempfile.TemporaryDirectory(prefix="ash-machine-") as scratch:
        argv = _hardware(image, uefi=uefi, snapshot=snapshot, memory=memory, scratch=Path(scratch))
        return subprocess.run([*argv, "-nographic"], check=False).returncode


class Machine:
    """A virtual machine whose serial console this process reads and types on.

    The context manager starts QEMU, and ends it on exit. The output of the console is kept and logged.

    Args:
        image: the disk.
        uefi: boot with UEFI instead of BIOS.
        snapshot: discard all changes to the image.
        memory: in MiB.
        log: a file to which the output of the console is appended.
        disk_format: of the image: raw or qcow2.
        expendable: the image need not survive a power cut of the host. The machine is faster then.
        secure: boot with UEFI and Secure Boot.
        devices: more options of QEMU.
        hardware: what the disk is, as QEMU's option -device has it.
    """

    def __init__(
        self,
        image: Path,
        *,
        uefi: bool = False,
        snapshot: bool = False,
        memory: int = 2048,
        log: Path | None = None,
        disk_format: str = "raw",
        expendable: bool = False,
        secure: bool = False,
        devices: Sequence[str] = (),
        hardware: str = DISK_HARDWARE,
    ) -> None:
        self._image = image
        self._secure = secure
        self._devices = devices
        self._disk_hardware = hardware
        self._uefi = uefi
        self._snapshot = snapshot
        self._memory = memory
        self._log = log
        self._disk_format = disk_format
        self._expendable = expendable
        self._arrived = threading.Condition()
        self._raw = ""
        self._text = ""
        self._read = 0
        self._ended = False
        self._mirror: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Start the machine."""
        _require_qemu()
        with contextlib.ExitStack() as stack:
            self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ash-machine-")))
            self._process = self._start()
            stack.callback(self._stop)
            self._reader = threading.Thread(target=self._keep_reading, daemon=True)
            self._reader.start()
            self._leave = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the machine if it still runs, like a power cut."""
        self._leave.close()

    def _start(self) -> subprocess.Popen[bytes]:
        argv = _hardware(
            self._image,
            uefi=self._uefi,
            secure=self._secure,
            snapshot=self._snapshot,
            memory=self._memory,
            scratch=self._scratch,
            disk_format=self._disk_format,
            expendable=self._expendable,
            hardware=self._disk_hardware,
        )
        argv += [*self._devices, "-display", "none", "-monitor", "none"]
        argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        argv += ["-qmp", f"unix:{self._monitor_path()},server=on,wait=off"]
        # The kernel kills QEMU if this process dies.
        argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _keep_reading(self) -> None:
        """Read the console until QEMU ends: a full pipe would stop the machine."""
        assert self._process.stdout
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        cut = ""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._log.open("ab", buffering=0)) if self._log else None
            while data := os.read(self._process.stdout.fileno(), 65536):
                if log:
                    log.write(data)
                if self._mirror:
                    self._mirror.write(data)
                    self._mirror.flush()
                text = cut + decoder.decode(data)
                whole = _without_cut_escape(text)
                cut = text[len(whole) :]
                with self._arrived:
                    self._raw += whole
                    self._text += ESCAPE.sub("", whole).replace("\r", "")
                    self._arrived.notify_all()
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()

    def _error(self, message: str) -> MachineError:
        tail = "\n".join(f"  | {line}" for line in self._text.rstrip().splitlines()[-25:])
        where = f" (full log: {self._log})" if self._log else ""
        return MachineError(f"{message}; the console's last lines{where}:\n{tail}")

    def expect(self, pattern: str, timeout: float = COMMAND_SECONDS) -> re.Match[str]:
        """Wait until the console has printed text that matches.

        Args:
            pattern: a regular expression; ^ and $ match at each line. It is matched against the output since the last
                match, without escape sequences and carriage returns.
            timeout: in seconds.

        Raises:
            MachineError: the timeout expired, or QEMU ended.
        """
        regex = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout
        with self._arrived:
            while not (match := regex.search(self._text, self._read)):
                if self._ended:
                    raise self._error(f"the machine ended before it printed {pattern!r}")
                if time.monotonic() >= deadline:
                    raise self._error(f"nothing matched {pattern!r} within {timeout:.0f} s")
                self._arrived.wait(max(0.0, deadline - time.monotonic()))
            self._read = match.end()
        return match

    def send(self, text: str) -> None:
        """Type text on the console; a newline is the Enter key."""
        assert self._process.stdin
        try:
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("the machine has ended") from None

    def login(self, user: str = "root", password: str = "", timeout: float = BOOT_SECONDS, **how: bool) -> None:
        """Wait for the login prompt, log in, and prepare the shell for command().

        Args:
            user, password: of the account.
            timeout: in seconds.
            how: how to wait; see await_login().

        Raises:
            MachineError: there was no prompt.
        """
        self.enter_shell(user, password, timeout, **how)
        token = secrets.token_hex(4)
        shell = "env PS1= PS2= TERM=dumb PAGER=cat SYSTEMD_PAGER=cat bash --noediting --norc --noprofile"
        self.send(f"stty -echo cols 500 rows 100; printf '<%s>\\n' {token}; exec {shell}\n")
        self.expect(f"<{token}>", 60)
        # Keep messages of the kernel and of systemd (by its signal for that) out of the output of commands.
        self.command("dmesg --console-level emerg 2>/dev/null; kill -s RTMIN+21 1 2>/dev/null || true")

    def enter_shell(self, user: str = "root", password: str = "", timeout: float = BOOT_SECONDS, **how: bool) -> None:
        """Wait for the login prompt as login() does, and log in to the user's own shell."""
        self.await_login(timeout, **how)
        self.send(f"{user}\n")
        if self.expect(r"Password: |[#$] ", 60).group() == "Password: ":
            self.send(f"{password}\n")
            self.expect(r"[#$] ", 60)

    def await_login(self, timeout: float = BOOT_SECONDS, *, hasten: bool = True, patient: bool = False) -> None:
        """Wait for the login prompt.

        Args:
            timeout: in seconds.
            hasten: start the default entry when GRUB's menu appears, instead of waiting until GRUB does.
            patient: the machine restarts by itself after a panic and the like; wait until it comes up.

        Raises:
            MachineError: there was no prompt; at once, unless `patient`, if the boot ended in a panic or rescue shell.
        """
        ends, resets = r"\S login: " if patient else rf"\S login: |{DEAD_ENDS}", 0
        while True:
            start = self._read
            match = self.expect(rf"{ends}|{COUNTDOWN}", timeout)
            if re.fullmatch(COUNTDOWN, match.group()):
                if hasten:
                    self.send("\r")
                match = self.expect(ends, timeout)
            if match.group().endswith(" login: "):
                return
            if resets == MOST_RESETS or not is_fault_of_emulator(self._text[start:]):
                raise self._error(f"the boot ended at {match.group().strip()!r}")
            self.reset()
            resets += 1

    def command(self, line: str, *, timeout: float = COMMAND_SECONDS, ok: int | None = 0) -> CommandResult:
        """Run a line of shell after login() and wait for it.

        Args:
            line: the command.
            timeout: in seconds.
            ok: the expected exit status; None for any.

        Raises:
            MachineError: the exit status was another one, or the timeout expired.
        """
        token = secrets.token_hex(4)
        typed = f"printf '<%s>\\n' {token}; eval {shlex.quote(line)}; printf '\\n<%s %s>\\n' {token} $?\n"
        if any(len(part.encode()) > LINE_BYTES for part in typed.splitlines()):
            raise MachineError(f"cannot type a line of more than {LINE_BYTES} bytes: {line[:60]}...")
        self.send(typed)
        begin = self.expect(f"<{token}>\n").end()
        end = self.expect(rf"\n<{token} (\d+)>\n", timeout)
        result = CommandResult(int(end[1]), end.string[begin : end.start()].removesuffix("\n"))
        if ok is not None and result.status != ok:
            raise MachineError(f"`{line}` ended with status {result.status}, not {ok}:\n{result.output}")
        return result

    def choose(self, title: str | int, timeout: float = BOOT_SECONDS) -> str:
        """Wait for GRUB's menu and choose an entry or submenu. Returns its title.

        Args:
            title: a regular expression for the title, or the number of the entry, from 0.
            timeout: in seconds.

        Raises:
            MachineError: no entry matches; the message lists the titles.
        """
        self.expect(MENU_HELP, timeout)
        # A key pressed before GRUB has drawn this menu would be judged by the one before, and move on after the choice.
        self._await_change("", 10 * MENU_SECONDS)
        seen = [self._press("\x01")]
        while not _is_chosen(seen, title):
            below = self._press("\x0e", 10 * MENU_SECONDS)  # the machine may be slow; this also tells the last entry
            if below == seen[-1]:
                raise self._error(f"no entry {title!r} in the boot menu, only {seen}")
            seen.append(below)
        self._skip_output()
        self.send("\r")
        return seen[-1]

    def _press(self, key: str, seconds: float = MENU_SECONDS) -> str:
        """Press a key in GRUB's menu, and wait for its effect. Returns the title that is highlighted afterwards.

        Keys are single bytes, Ctrl-A and Ctrl-N instead of Home and Down: if the firmware reads the serial line too,
        the two readers would split an escape sequence between them.
        """
        before = self._highlighted()
        self.send(key)
        return self._await_change(before, seconds)

    def _await_change(self, before: str, seconds: float) -> str:
        """Wait until GRUB highlights another title than `before`, at most so long. Returns what it highlights."""
        deadline = time.monotonic() + seconds
        while self._highlighted() == before and time.monotonic() < deadline:
            time.sleep(MENU_SECONDS / 10)
        return self._highlighted()

    def _highlighted(self) -> str:
        """The title that GRUB highlighted last in the menu on the screen, by the star in front of it.

        GRUB prints the help before the entries.
        """
        with self._arrived:
            titles = HIGHLIGHTED.findall(self._raw, max(self._raw.rfind(MENU_HELP), 0))
        return titles[-1].rstrip() if titles else ""

    def _skip_output(self) -> None:
        """Have expect() ignore the output so far."""
        with self._arrived:
            self._read = len(self._text)

    def reboot(self) -> None:
        """Reboot the machine from its shell, and wait until its kernel restarts."""
        self.send("reboot\n")
        self.expect(RESTARTS, 180)

    def reset(self) -> None:
        """Press the reset button."""
        self._skip_output()
        self._monitor("system_reset")

    def cut_power(self, then: Callable[[], None] = lambda: None) -> None:
        """Cut the power: QEMU is stopped, `then` is called, and QEMU is killed."""
        self._process.send_signal(signal.SIGSTOP)
        then()
        self._process.kill()
        self._process.wait()

    def poweroff(self) -> None:
        """Power the machine off from its shell, and wait until QEMU ends."""
        self.send("poweroff\n")
        deadline = time.monotonic() + 180
        with self._arrived:
            while not self._ended:
                if re.search(f"{RESTARTS}|{COUNTDOWN}", self._text[self._read :]):
                    raise self._error("the machine restarted instead of powering off")
                if time.monotonic() >= deadline:
                    raise self._error("the machine did not power off within 180 s")
                self._arrived.wait(1)
        self._process.wait()

    def _monitor_path(self) -> Path:
        return self._scratch / "monitor"

    def press(self, *keys: str) -> None:
        """Press keys of the machine's keyboard, one after the other.

        Args:
            keys: QEMU's names, such as "a", "spc", "ret"; "meta_l-ret" is two at once.
        """
        for key in keys:
            self._monitor("send-key", keys=[{"type": "qcode", "data": name} for name in key.split("-")])
            time.sleep(KEY_SECONDS)

    def screenshot(self) -> Picture:
        """Take a screenshot."""
        path = self._scratch / "screen.ppm"
        self._monitor("screendump", filename=str(path))
        return Picture.of_ppm(path.read_bytes())

    def _monitor(self, command: str, **arguments: object) -> None:
        """Run a command of QEMU's machine protocol."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self._monitor_path()))
            answers = connection.makefile("r", encoding="utf-8")
            answers.readline()  # the greeting
            for name, given in (("qmp_capabilities", {}), (command, arguments)):
                connection.sendall(json.dumps({"execute": name, "arguments": given}).encode() + b"\n")
                for answer in self._replies(answers):
                    if "error" in answer:
                        raise self._error(f"QEMU refuses {name}: {answer['error']}")
                    if "return" in answer:
                        break

    @staticmethod
    def _replies(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        for line in lines:
            yield json.loads(line)

    def hand_over(self) -> None:
        """Connect the console to this process's terminal, until the machine ends or Ctrl-] is typed."""
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
        self._mirror = sys.stdout.buffer
        try:
            tty.setraw(keyboard, termios.TCSADRAIN)  # keep what was typed meanwhile
            while not self._ended:
                if keyboard in select.select([keyboard], [], [], 0.2)[0]:
                    typed = os.read(keyboard, 1024)
                    if LEAVE_KEY in typed or not typed:
                        break
                    self.send(typed.decode(errors="replace"))
        finally:
            self._mirror = None
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _without_cut_escape(text: str) -> str:
    """The text without an incomplete escape sequence at its end."""
    start = text.rfind("\x1b", max(0, len(text) - 64))
    return text if start < 0 or ESCAPE.match(text, start) else text[:start]


def _is_chosen(seen: list[str], title: str | int) -> bool:
    if isinstance(title, int):
        return len(seen) == title + 1
    return re.search(title, seen[-1]) is not None
