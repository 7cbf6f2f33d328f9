# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the new system is to be, and what its distribution must be able to do for that.

The base class does what is the same everywhere with systemd; `distros/<id>/installer.py` has the rest.
"""

import difflib
import importlib
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ash import USAGE, AshError, run
from installer import host

NETWORK = """\
[Match]
Type=ether
Kind=!*

[Network]
DHCP=yes
"""

# A machine without a network is no failure: what wants to be online waits half a minute for any one, then goes on.
WAIT_ONLINE = """\
[Service]
ExecStart=
ExecStart=-/usr/lib/systemd/systemd-networkd-wait-online --any --timeout=30
"""

DEFAULT_GRUB = """\
# Read by grub-mkconfig, which ash runs when a snapshot is deployed.
GRUB_DEFAULT=0
GRUB_TIMEOUT=5
GRUB_CMDLINE_LINUX_DEFAULT=""
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
    """Where the new system comes from: an archive, or a ready root in a tar file."""

    release: str = "stable"
    mirror: str | None = None
    packages: tuple[str, ...] = ()
    rootfs: Path | None = None


@dataclass(frozen=True)
class Settings:
    """How the new system is set up. Passwords are plain text; without one, root's is empty unless there is a user."""

    DEFAULT_TIMEZONE: ClassVar[str] = "Etc/UTC"
    DEFAULT_LOCALE: ClassVar[str] = "C.UTF-8"
    DEFAULT_KEYMAP: ClassVar[str] = "us"

    hostname: str = "ash"
    user: str | None = None
    password: str | None = None
    root_password: str | None = None
    timezone: str = DEFAULT_TIMEZONE
    locale: str = DEFAULT_LOCALE
    keymap: str = DEFAULT_KEYMAP
    keyring: Path | None = None  # of those from whom it takes a newer ash


class DistroInstaller:
    """How one distribution's root is made and set up."""

    id: ClassVar[str]
    tools: ClassVar[host.Tools]  # on the host, to bootstrap
    admin_group: ClassVar[str]  # whose members may use sudo
    reserved_names: ClassVar[str]  # users and groups that its own packages make, separated by blanks
    zsh_completions: ClassVar[str] = "usr/share/zsh/site-functions"

    # Lists of what may be chosen, as files of the host: the new system's are not there yet.
    timezones: ClassVar[host.Tools] = {"/usr/share/zoneinfo/Europe/Berlin": "tzdata"}
    locales: ClassVar[host.Tools] = {"/usr/share/i18n/SUPPORTED": "locales"}
    keymaps: ClassVar[host.Tools] = {"/usr/share/X11/xkb/rules/base.lst": "xkb-data"}

    def resolve(self, source: Source) -> Source:
        """The source with its release's code name, once it is sure that the archive has all of it.

        Raises:
            AshError: no such release or package, or the archive cannot be reached.
        """
        raise NotImplementedError

    def bootstrap(self, root: Path, source: Source, settings: Settings, log: host.Log) -> None:
        """Fill an empty directory with the distribution, a kernel and its initramfs; the same for every machine."""
        raise NotImplementedError

    def needed_files(self, settings: Settings) -> Mapping[str, str]:
        """What a ready root must have: {file, from the root: the package that has it}."""
        raise NotImplementedError

    def set_locale(self, root: Path, locale: str, log: host.Log) -> None:
        """Make a language and character set, and the system's default."""
        raise NotImplementedError

    def set_keymap(self, root: Path, keymap: str, log: host.Log) -> None:
        """Set the consoles' keyboard: an XKB layout, with LAYOUT:VARIANT also its variant."""
        raise NotImplementedError

    def check(self, settings: Settings) -> None:
        """Refuse settings that do not exist; may install lists of what does on the host.

        Raises:
            AshError: with status USAGE, naming what comes near.
        """
        self._check_names(settings)
        if settings.timezone != Settings.DEFAULT_TIMEZONE:
            self._check_timezone(settings.timezone)
        if settings.locale != Settings.DEFAULT_LOCALE:
            _require_one_of("locale", settings.locale, _known_locales(self.locales))
        if settings.keymap != Settings.DEFAULT_KEYMAP:
            _require_one_of("keymap", settings.keymap, _known_keymaps(self.keymaps))

    def _check_names(self, settings: Settings) -> None:
        label = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
        if not re.fullmatch(rf"{label}(\.{label})*", settings.hostname) or len(settings.hostname) > 64:
            raise AshError(f"{settings.hostname!r} is no host name", "letters, digits and inner hyphens", USAGE)
        if settings.user is None:
            return
        if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", settings.user):
            raise AshError(f"{settings.user!r} is no user name", "small letters, digits, - and _", USAGE)
        if settings.user in self.reserved_names.split():
            raise AshError(f"the user name {settings.user} is the system's own", status=USAGE)

    def _check_timezone(self, timezone: str) -> None:
        host.require(self.timezones)
        directory = Path("/usr/share/zoneinfo")
        zones = (path.relative_to(directory) for path in directory.rglob("[A-Z]*") if path.is_file())
        _require_one_of("timezone", timezone, (str(z) for z in zones if z.parts[0] not in ("posix", "right")))

    def configure(self, root: Path, settings: Settings, efi_uuid: str, log: host.Log) -> None:
        """Make one machine's system of a bootstrapped root.

        Args:
            root: the root, writable.
            settings: how it is to be; checked.
            efi_uuid: the EFI partition's, for fstab.
            log: gets what the programs say.
        """
        etc = root / "etc"
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
        (etc / "hostname").write_text(f"{settings.hostname}\n")
        names = dict.fromkeys([settings.hostname, settings.hostname.partition(".")[0]])
        (etc / "hosts").write_text(HOSTS.format(names=" ".join(names)))
        (etc / "fstab").write_text(f"UUID={efi_uuid} /boot/efi vfat umask=0077,nofail 0 2\n")
        (etc / "default/grub").write_text(DEFAULT_GRUB)
        (root / "boot/efi").mkdir()
        self._set_network(root, log)
        self._set_timezone(root, settings.timezone)
        self.set_locale(root, settings.locale, log)
        self.set_keymap(root, settings.keymap, log)
        self._set_users(root, settings, log)

    def _set_network(self, root: Path, log: host.Log) -> None:
        """A cable is enough: an address by DHCP, names by systemd-resolved."""
        (root / "etc/systemd/network/80-ash-dhcp.network").write_text(NETWORK)
        drop_in = root / "etc/systemd/system/systemd-networkd-wait-online.service.d"
        drop_in.mkdir(parents=True)
        (drop_in / "ash.conf").write_text(WAIT_ONLINE)
        log.run_inside(root, ["systemctl", "enable", "systemd-networkd.service"])

    def _set_timezone(self, root: Path, timezone: str) -> None:
        if not (root / "usr/share/zoneinfo" / timezone).is_file():
            raise AshError(f"the new system does not know the timezone {timezone}", status=USAGE)
        (root / "etc/localtime").unlink(missing_ok=True)
        (root / "etc/localtime").symlink_to(f"/usr/share/zoneinfo/{timezone}")

    def _set_users(self, root: Path, settings: Settings, log: host.Log) -> None:
        if settings.user is not None:
            options = ["--create-home", "--shell", "/bin/bash", "--groups", self.admin_group]
            log.run_inside(root, ["useradd", *options, settings.user])
            set_password(root, settings.user, settings.password or "")
        elif settings.root_password is None:
            log.run_inside(root, ["passwd", "--delete", "root"])
        if settings.root_password is not None:
            set_password(root, "root", settings.root_password)


def set_password(root: Path, user: str, password: str) -> None:
    """Set a user's password in a root, with the root's own hash function."""
    run(["chroot", root, "chpasswd"], input=f"{user}:{password}\n")


def load_installer(distro: str) -> DistroInstaller:
    """The installer of a distribution: the class of `distros/<id>/installer.py` with that id."""
    module = importlib.import_module(f"distros.{distro}.installer")
    classes = [value for value in vars(module).values() if getattr(value, "id", None) == distro]
    return classes[0]()  # type: ignore[no-any-return]


def _known_locales(lists: host.Tools) -> Iterable[str]:
    host.require(lists)
    return [line.split()[0] for path in lists for line in Path(path).read_text().splitlines() if line.strip()]


def _known_keymaps(lists: host.Tools) -> Iterable[str]:
    """Layouts ("de") and their variants ("de:nodeadkeys") from XKB's list."""
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


def _require_one_of(what: str, value: str, known: Iterable[str]) -> None:
    choices = list(known)
    if value not in choices:
        near = difflib.get_close_matches(value, choices)
        raise AshError(f"there is no {what} {value}", f"near it: {', '.join(near)}" if near else "", USAGE)
