# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the new system will be, and the interface of the distributions that install it.

The base class does what all distributions with systemd have in common; the rest is in `distros/<id>/installer.py`.
"""

import base64
import difflib
import importlib
import os
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import ClassVar, Self

from ash import USAGE, AshError, Distro, load_distro, path_inside, run
from installer import host
from installer.disk import NO_MORE, Sizes, Target
from installer.hardware import Hardware
from installer.luks import Luks
from installer.swap import Swap

# A line of authorized_keys without options: the type, and the key.
# Of crypt(5): yescrypt and gost-yescrypt, SHA-512, SHA-256, bcrypt, MD5; passwd(5) allows no colon.
B64 = "[./0-9A-Za-z]"
HASH = (
    rf"\$g?y\${B64}+\${B64}{{1,86}}\${B64}{{43}}|\$6\$(rounds=\d+\$)?[^$:\s]{{0,16}}\${B64}{{86}}"
    rf"|\$5\$(rounds=\d+\$)?[^$:\s]{{0,16}}\${B64}{{43}}|\$2[abxy]\$\d\d\${B64}{{53}}|\$1\$[^$:\s]{{0,8}}\${B64}{{22}}"
)
LONGEST_PASSWORD = 500  # bytes: PAM takes 511 (PAM_MAX_RESP_SIZE)
SHORTEST_KEY = 32  # bytes, of ed25519
SSH_KEY = r"(ssh|ecdsa|sk)-[\w@.-]+ [A-Za-z0-9+/]+=*( .*)?$"

NETWORK = """\
[Match]
Type=ether
Kind=!*

[Network]
DHCP=yes
"""

# Without a network the boot continues: units that need one wait 30 seconds for any interface to come up.
WAIT_ONLINE = """\
[Service]
ExecStart=
ExecStart=-/usr/lib/systemd/systemd-networkd-wait-online --any --timeout=30
"""

# The name server is systemd-resolved, as without NetworkManager.
NETWORK_MANAGER = """\
[main]
dns=systemd-resolved
"""

DEFAULT_GRUB = """\
# Read by grub-mkconfig, which ash runs when a snapshot is deployed.
GRUB_DEFAULT=0
GRUB_TIMEOUT=5
GRUB_CMDLINE_LINUX_DEFAULT=""
"""

ENCRYPTED = "GRUB_ENABLE_CRYPTODISK=y\n"

SERIAL_CONSOLE = """\
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
"""

HOSTS = """\
127.0.0.1	localhost
127.0.1.1	{names}
::1		localhost ip6-localhost ip6-loopback
ff02::1		ip6-allnodes
ff02::2		ip6-allrouters
"""


@dataclass(frozen=True)
class Source:
    """Where the new system comes from: a repository, or a tar file of a root."""

    release: str = "stable"
    mirror: str | None = None
    packages: tuple[str, ...] = ()
    rootfs: Path | None = None
    firmware: tuple[str, ...] = ()  # packages with firmware and microcode; a release may have them under other names
    needs_firmware: bool = False  # refuse a tar file that lacks them, and not only say so


class Network(Enum):
    """What configures the network of the new system."""

    DHCP = "dhcp"  # systemd-networkd, which asks for an address on each Ethernet interface
    NETWORK_MANAGER = "networkmanager"


@dataclass(frozen=True)
class Password:
    """A password, as text or as a hash for /etc/shadow."""

    text: str
    is_hash: bool = False


@dataclass(frozen=True)
class Settings:
    """The configuration of the new system. If there is neither a user nor a root password, root logs in without one."""

    DEFAULT_TIMEZONE: ClassVar[str] = "Etc/UTC"
    DEFAULT_LOCALE: ClassVar[str] = "C.UTF-8"
    DEFAULT_KEYMAP: ClassVar[str] = "us"

    hostname: str = "ash"
    user: str | None = None
    groups: tuple[str, ...] = ()  # of the user, besides that of administrators
    password: Password | None = None
    root_password: Password | None = None
    ssh_keys: tuple[str, ...] = ()  # which the user, or else root, may log in with
    timezone: str = DEFAULT_TIMEZONE
    locale: str = DEFAULT_LOCALE
    keymap: str = DEFAULT_KEYMAP
    serial: bool = True  # whether the first serial port is a console too
    keyring: Path | None = None  # the keys that sign new releases of ash
    sizes: Sizes = NO_MORE  # of partitions besides that of the root
    passphrase: str | None = field(default=None, repr=False)  # of the partition of the root, which is encrypted then
    network: Network = Network.DHCP
    swap: Swap = field(default_factory=Swap)
    compression: str = ""  # of its files, as btrfs names it; empty if that of ash's mounts is enough
    discard: bool = False  # tell the disk regularly which space is free
    profiles: tuple[str, ...] = ()  # in the first snapshot beside the base
    mutable: bool = False  # so is the first snapshot beside the base


class DistroInstaller:
    """Installs and configures the root of one distribution."""

    id: ClassVar[str]
    name: ClassVar[str]  # for people
    tools: ClassVar[host.Tools]  # needed on the host to bootstrap
    reserved_names: ClassVar[str]  # users and groups that its packages create, separated by blanks
    crypttab_options: ClassVar[str] = "luks"  # of the line for the root, which the initramfs opens
    zsh_completions: ClassVar[str] = "usr/share/zsh/site-functions"

    # Files of the host that list the valid choices: the new system's own do not exist yet.
    timezones: ClassVar[host.Tools] = {"/usr/share/zoneinfo/Europe/Berlin": "tzdata"}
    locales: ClassVar[host.Tools] = {"/usr/share/i18n/SUPPORTED": "locales"}
    keymaps: ClassVar[host.Tools] = {"/usr/share/X11/xkb/rules/base.lst": "xkb-data"}

    @property
    def distro(self) -> Distro:
        """What ash itself knows about the distribution."""
        return load_distro(self.id)

    def resolve(self, source: Source) -> Source:
        """Check that the repository has everything; return the source with the code name of its release.

        Raises:
            AshError: no such release or package, or the repository cannot be reached.
        """
        raise NotImplementedError

    def repository_time(self, source: Source) -> datetime | None:
        """What time it is for the repository of a source; None if it does not say."""
        raise NotImplementedError

    def bootstrap(self, root: Path, source: Source, settings: Settings, log: host.Log) -> None:
        """Install the distribution, a kernel and its initramfs into an empty directory; nothing machine-specific."""
        raise NotImplementedError

    def bootstrap_command(self, root: Path, source: Source, settings: Settings, scratch: str) -> list[str]:
        """The main command of bootstrap(), with a directory for its temporary files."""
        raise NotImplementedError

    def needed_files(self, settings: Settings) -> Mapping[str, str]:
        """The files that a root in a tar file must contain: {path from the root: the package that has it}."""
        raise NotImplementedError

    def firmware_for(self, hardware: Hardware) -> Sequence[str]:
        """The packages with the firmware and the microcode that some hardware needs."""
        raise NotImplementedError

    def all_firmware(self) -> Sequence[str]:
        """All of these packages, for a disk that may be put into any machine."""
        raise NotImplementedError

    def lacking(self, packages: Iterable[str], there: Collection[str]) -> list[str]:
        """Those packages that a root does not have, by the paths that are there."""
        raise NotImplementedError

    def set_locale(self, root: Path, locale: str, log: host.Log) -> None:
        """Generate a locale and make it the default."""
        raise NotImplementedError

    def set_keymap(self, root: Path, keymap: str, log: host.Log) -> None:
        """Set the keyboard of the consoles: an XKB layout, LAYOUT or LAYOUT:VARIANT."""
        raise NotImplementedError

    def make_initramfs_open(self, root: Path, log: host.Log) -> None:
        """Have the initramfs contain the key files in /etc/cryptsetup-keys.d, and only root read it."""
        raise NotImplementedError

    def check(self, settings: Settings) -> None:
        """Reject invalid settings; this may install the lists of valid ones on the host.

        Raises:
            AshError: with close matches (USAGE).
        """
        self.check_names(settings)
        if settings.timezone != Settings.DEFAULT_TIMEZONE:
            self._check_timezone(settings.timezone)
        if settings.locale in ("C", "POSIX"):
            raise AshError(f"the locale {settings.locale} has no UTF-8", f"use {Settings.DEFAULT_LOCALE}", USAGE)
        if settings.locale != Settings.DEFAULT_LOCALE:
            _require_one_of("locale", settings.locale, self.known("locale"))
        if settings.keymap != Settings.DEFAULT_KEYMAP:
            _require_one_of("keymap", settings.keymap, self.known("keymap"))

    def check_names(self, settings: Settings) -> None:
        """Reject names, keys and hashes that cannot be, as check() does; this needs no lists."""
        label = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
        if not re.fullmatch(rf"{label}(\.{label})*", settings.hostname) or len(settings.hostname) > 64:
            raise AshError(f"{settings.hostname!r} is not a valid host name", "letters, digits, inner hyphens", USAGE)
        self._check_secrets(settings)
        if settings.user is None:
            if settings.groups:
                raise AshError("there is no user who could be in a group", "--user names one", USAGE)
            return
        for group in settings.groups:
            _require_one_of("group", group, self.known("group"))
        if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", settings.user):
            raise AshError(f"{settings.user!r} is not a valid user name", "lower-case letters, digits, - and _", USAGE)
        if settings.user in self.reserved_names.split():
            raise AshError(f"the user name {settings.user} is reserved for the system", status=USAGE)

    @staticmethod
    def _check_secrets(settings: Settings) -> None:
        """Reject keys and passwords that cannot be."""
        if not all(map(is_public_key, settings.ssh_keys)):
            hint = "use the public one, such as ~/.ssh/id_ed25519.pub"
            raise AshError("the file with the ssh key has a line that is no public key", hint, USAGE)
        for password in filter(None, (settings.password, settings.root_password)):
            if password.is_hash and not re.fullmatch(HASH, password.text):
                raise AshError("a password's hash is none that crypt(5) has", "such as $6$... or $y$...", USAGE)
            if not password.is_hash and (wrong := problem_of_password(password.text)):
                raise AshError(f"the password cannot be used: {wrong}", "use another one", USAGE)

    def _check_timezone(self, timezone: str) -> None:
        known = self.known("timezone")
        old = _old_timezones(ZONES)
        if timezone in old:  # the new system may lack it
            raise AshError(f"the timezone {timezone} is an old name", f"use {old[timezone]}", USAGE)
        _require_one_of("timezone", timezone, known)

    def known(self, setting: str) -> list[str]:
        """The valid values of "timezone", "locale", "keymap" or "group"; this may install their list on the host."""
        match setting:
            case "timezone":
                return _known_timezones(self.timezones)
            case "locale":
                return _known_locales(self.locales)
            case "keymap":
                return _known_keymaps(self.keymaps)
            case _:
                return sorted(self.reserved_names.split())

    def configure(self, root: Path, settings: Settings, target: Target, log: host.Log) -> None:
        """Configure a bootstrapped root for one machine.

        Args:
            root: the root, writable.
            settings: checked.
            target: where the root is.
            log: receives the output of programs.
        """
        host.put(root, "etc/machine-id", f"{uuid.uuid4().hex}\n")
        host.put(root, "etc/hostname", f"{settings.hostname}\n")
        names = dict.fromkeys([settings.hostname, settings.hostname.partition(".")[0]])
        host.put(root, "etc/hosts", HOSTS.format(names=" ".join(names)))
        efi = f"UUID={target.efi_uuid} /boot/efi vfat umask=0077,nofail 0 2\n" if target.efi else ""
        home = fstab_line_of_home(target.home_uuid, settings.compression) if target.home else ""
        host.put(root, "etc/fstab", efi + home)
        encrypted = ENCRYPTED if target.luks else ""
        host.put(root, "etc/default/grub", DEFAULT_GRUB + encrypted + SERIAL_CONSOLE * settings.serial)
        path_inside(root, "boot/efi").mkdir()
        self._set_network(root, settings.network, log)
        self._set_timezone(root, settings.timezone)
        self.set_locale(root, settings.locale, log)
        self.set_keymap(root, settings.keymap, log)
        self._set_users(root, settings, log)
        if settings.discard:
            log.run_inside(root, ["systemctl", "enable", "fstrim.timer"])
        if target.luks:
            options = f"{self.crypttab_options}{',discard' * settings.discard}"
            self._set_luks(root, target.luks, options, log)

    def _set_luks(self, root: Path, luks: Luks, options: str, log: host.Log) -> None:
        """Have the initramfs open the partition of the root, with these options of crypttab."""
        key = Path("/etc/cryptsetup-keys.d", f"{luks.name}.key")
        inside = path_inside(root, str(key))
        inside.parent.mkdir(mode=0o700, exist_ok=True)
        luks.add_key(inside)
        host.put(root, "etc/crypttab", f"{luks.name} UUID={luks.uuid} {key} {options}\n")
        self.make_initramfs_open(root, log)

    def _set_network(self, root: Path, network: Network, log: host.Log) -> None:
        """Configure every Ethernet interface by DHCP, or leave all to NetworkManager, which does so too."""
        if network is Network.NETWORK_MANAGER:
            host.put(root, "etc/NetworkManager/conf.d/ash.conf", NETWORK_MANAGER)
            log.run_inside(root, ["systemctl", "enable", "NetworkManager.service"])
            return
        host.put(root, "etc/systemd/network/80-ash-dhcp.network", NETWORK)
        host.put(root, "etc/systemd/system/systemd-networkd-wait-online.service.d/ash.conf", WAIT_ONLINE)
        log.run_inside(root, ["systemctl", "enable", "systemd-networkd.service"])

    def _set_timezone(self, root: Path, timezone: str) -> None:
        if not path_inside(root, f"usr/share/zoneinfo/{timezone}").is_file():
            raise AshError(f"the new system has no timezone {timezone}", status=USAGE)
        local = path_inside(root, "etc") / "localtime"
        local.unlink(missing_ok=True)
        local.symlink_to(f"/usr/share/zoneinfo/{timezone}")

    def _set_users(self, root: Path, settings: Settings, log: host.Log) -> None:
        if settings.user is not None:
            groups = ",".join(dict.fromkeys([self.distro.admin_group, *settings.groups]))
            options = ["--create-home", "--shell", "/bin/bash", "--groups", groups]
            log.run_inside(root, ["useradd", *options, settings.user])
            if settings.password is not None:
                set_password(root, settings.user, settings.password)
        elif settings.root_password is None:
            log.run_inside(root, ["passwd", "--delete", "root"])
        if settings.root_password is not None:
            set_password(root, "root", settings.root_password)
        if settings.ssh_keys:
            home = path_inside(root, f"home/{settings.user}" if settings.user else "root")
            owner, directory = home.stat(), home / ".ssh"
            directory.mkdir(mode=0o700)
            keys = directory / "authorized_keys"
            keys.write_text("\n".join([*settings.ssh_keys, ""]))
            keys.chmod(0o600)
            for path in (directory, keys):
                os.chown(path, owner.st_uid, owner.st_gid)


def fstab_line_of_home(home: str, compression: str) -> str:
    """The line of fstab for a partition for /home.

    Args:
        home: the UUID of its file system.
        compression: see Settings.
    """
    compress = "" if compression == "none" else f",compress={compression or 'zstd'}"
    return f"UUID={home} /home btrfs noatime{compress} 0 2\n"


def problem_of_password(text: str) -> str:
    """Why a password cannot be set; empty if it can be."""
    if len(text.encode()) > LONGEST_PASSWORD:
        return f"it is longer than {LONGEST_PASSWORD} bytes"
    return "" if text.isprintable() else "it has a control character"


def is_public_key(line: str) -> bool:
    """Whether a line is a public key for ssh: it repeats its type in the key itself (RFC 4253, 6.6)."""
    found = re.match(SSH_KEY, line)
    if not found:
        return False
    kind, key = found[0].split()[:2]
    try:
        data = base64.b64decode(key, validate=True)
    except ValueError:
        return False
    return data.startswith(len(kind).to_bytes(4, "big") + kind.encode()) and len(data) > len(kind) + SHORTEST_KEY


def set_password(root: Path, user: str, password: Password) -> None:
    """Set a user's password in a root, hashed as the root's own PAM configuration says."""
    options = ["--encrypted"] if password.is_hash else []
    run(["chroot", root, "chpasswd", *options], input=f"{user}:{password.text}\n")


def hash_of_password(root: Path, user: str) -> str:
    """The hash of a user's password in a root; empty if there is none."""
    lines = (root / "etc/shadow").read_text().splitlines()
    found = next((line.split(":")[1] for line in lines if line.startswith(f"{user}:")), "")
    return found if found.startswith("$") else ""


def load_installer(module: str) -> DistroInstaller:
    """The installer in a module: the class of `distros/<module>/installer.py` with that id."""
    found = importlib.import_module(f"distros.{module}.installer")
    classes = [value for value in vars(found).values() if getattr(value, "id", None) == module]
    return classes[0]()  # type: ignore[no-any-return]


ZONES = Path("/usr/share/zoneinfo")
DISTROS = Path(__file__).resolve().parent.parent / "distros"
LONGEST_ID, LONGEST_NAME = 32, 48  # characters; firmware shows some 50 of an entry


@dataclass(frozen=True)
class Identity:
    """What a new system is called.

    Args:
        id: in the names of its subvolumes and of its directory on the EFI partition.
        module: the directory of `distros/` that serves it.
        name: for people.
    """

    id: str
    module: str
    name: str

    @classmethod
    def of(cls, ident: str, name: str = "") -> Self:
        """The identity for an id, such as "debian" or, for a second system with the same module, "debian_work".

        Raises:
            AshError: no module serves it, or it or the name is not valid (USAGE).
        """
        if not re.fullmatch(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*", ident) or len(ident) > LONGEST_ID:
            hint = f"at most {LONGEST_ID} lower-case letters and digits, with - _ . inside"
            raise AshError(f"{ident!r} is not a valid id of a distribution", hint, USAGE)
        if len(name) > LONGEST_NAME or not name.isprintable():
            what = f"{name!r} is not a valid name of a distribution"
            raise AshError(what, f"at most {LONGEST_NAME} printable characters", USAGE)
        known = installable()
        module = next((one for one in known if re.fullmatch(rf"{re.escape(one)}([._-].+)?", ident)), None)
        if module is None:
            hint = f"it can install {', '.join(known)}; a second one is called such as {known[0]}_2"
            raise AshError(f"ash cannot install {ident}", hint, USAGE)
        default = load_installer(module).name
        return cls(ident, module, name or (default if ident == module else f"{default} ({ident})"))


def installable() -> list[str]:
    """The ids of the distributions that can be installed."""
    return sorted(path.parent.name for path in DISTROS.glob("*/installer.py"))


def _known_timezones(lists: host.Tools) -> list[str]:
    """The names of today."""
    host.require(lists)
    zones = (path.relative_to(ZONES) for path in ZONES.rglob("[A-Z]*") if path.is_file())
    old = _old_timezones(ZONES)
    return sorted(str(zone) for zone in zones if zone.parts[0] not in ("posix", "right") and str(zone) not in old)


def _known_locales(lists: host.Tools) -> list[str]:
    host.require(lists)
    return [line.split()[0] for path in lists for line in Path(path).read_text().splitlines() if line.strip()]


def _known_keymaps(lists: host.Tools) -> list[str]:
    """The layouts ("de") and variants ("de:nodeadkeys") in XKB's list."""
    host.require(lists)
    known, section = [], ""
    for line in (line for path in lists for line in Path(path).read_text().splitlines() if line.strip()):
        words = line.split()
        if words[0] == "!":
            section = words[1]
        elif section == "layout":
            known.append(words[0])
        elif section == "variant":
            known.append(f"{words[1].rstrip(':')}:{words[0]}")
    return known


def _old_timezones(directory: Path) -> dict[str, str]:
    """The names that a timezone had before, such as US/Eastern, with today's; new systems need not have these.

    Args:
        directory: the time zone database, with the lists tzdata.zi and zone.tab.
    """
    data, table = directory / "tzdata.zi", directory / "zone.tab"
    if not (data.is_file() and table.is_file()):  # a host may lack them
        return {}
    today = {line.split("\t")[2] for line in table.read_text().splitlines() if line.count("\t") > 1}
    links = [line.split() for line in data.read_text().splitlines() if line.startswith("L ")]
    return {new: of for _, of, new in links if new not in today and not new.startswith("Etc/") and new != "UTC"}


def _require_one_of(what: str, value: str, known: Iterable[str]) -> None:
    choices = list(known)
    if value not in choices:
        near = difflib.get_close_matches(value, choices)
        raise AshError(f"there is no {what} {value}", f"did you mean {' or '.join(near)}?" if near else "", USAGE)
