# SPDX-License-Identifier: AGPL-3.0-or-later
"""Installs Debian with mmdebstrap: the packages that a machine needs to boot and ash needs to run."""

import dataclasses
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import ClassVar

from ash import MISSING, REFUSED, USAGE, AshError, last_words, path_inside, read_text, run
from installer import host
from installer.distribution import DistroInstaller, Network, Settings, Source
from installer.hardware import Hardware

BOOT = ("linux-image-amd64", "initramfs-tools", "systemd-sysv", "udev", "kmod", "zstd")
GRUB = ("grub2-common", "grub-pc-bin", "grub-efi-amd64-bin", "grub-efi-amd64-signed", "shim-signed", "efibootmgr")
SYSTEM = ("dbus", "libpam-systemd", "systemd-resolved", "systemd-timesyncd", "btrfs-progs", "dosfstools", "sudo")
TOOLS = ("apt", "ca-certificates", "iproute2", "iputils-ping", "less", "login", "nano", "passwd", "procps", "tzdata")
ASH = ("python3", "python3-tabulate", "gpgv")
ANYTREE = "python3-anytree"  # not in Debian 12: there it comes from PyPI
NETWORK_MANAGER = ("network-manager", "wpasupplicant", "wireless-regdb")
ZRAM = "systemd-zram-generator"

# By vendor of the processor; by drivers, as a pattern. Whatever else needs firmware is in firmware-misc-nonfree.
MICROCODE = {"GenuineIntel": "intel-microcode", "AuthenticAMD": "amd64-microcode"}
FIRMWARE = {
    r"amdgpu|radeon": "firmware-amd-graphics",
    r"i915|xe": "firmware-intel-graphics",
    r"nouveau": "firmware-nvidia-graphics",
    r"iwlwifi": "firmware-iwlwifi",
    r"ipw2[12]00": "firmware-ipw2x00",
    r"r81(52|69)|r8712u|rtl8\w+|rtw\w+": "firmware-realtek",
    r"ath(6kl|10k|11k|12k)\w*|wil6210": "firmware-atheros",
    r"ath9k_htc": "firmware-ath9k-htc",
    r"brcm[fs]mac": "firmware-brcm80211",
    r"mt76\w+|mt79\w+|rt2800(pci|usb)|rt61pci|rt73usb": "firmware-mediatek",
    r"mwifiex\w*|mwl8k|libertas\w*": "firmware-libertas",
    r"bnx2": "firmware-bnx2",
    r"bnx2x": "firmware-bnx2x",
    r"qla2xxx|qed\w*": "firmware-qlogic",
    r"snd_sof\w*": "firmware-sof-signed",
}
# Debian 12 has these in another package.
OLDER_FIRMWARE = dict.fromkeys(
    ["firmware-intel-graphics", "firmware-nvidia-graphics", "firmware-mediatek"], "firmware-misc-nonfree"
)

RELEASES = "use stable or a code name such as trixie"
COMPONENTS = "main,non-free-firmware"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
ROLLING = ("sid", "unstable", "experimental")  # have neither updates nor security updates of their own
FETCH = "/usr/lib/apt/apt-helper"  # apt's own way to a repository, with its proxies
SHOW_ANSWERS = {
    **{f"Debug::Acquire::{scheme}": "true" for scheme in ("http", "https")},
    **{f"Acquire::{scheme}::Timeout": "10" for scheme in ("http", "https")},  # seconds
    "Acquire::Retries": "0",
}

# The host's apt settings for reaching the repository apply to the bootstrap too, but not to the new system. (A frozen
# repository, whose Release file has expired, needs the first one.)
HOST_APT_OPTIONS = ("Acquire::Check-Valid-Until", "Acquire::http::Proxy", "Acquire::https::Proxy")

# The initramfs is generated once, at the end. systemd-tmpfiles must not create nested subvolumes: a snapshot would not
# contain them. dpkg need not sync: a crash leaves no image.
BUILD_ENVIRONMENT = {"INITRD": "No", "SYSTEMD_TMPFILES_FORCE_SUBVOL": "0", "DEBIAN_FRONTEND": "noninteractive"}
BUILD_OPTIONS = ('--aptopt=Acquire::Languages "none"', "--dpkgopt=force-unsafe-io")

CRYPT_HOOK = "usr/share/initramfs-tools/hooks/cryptroot"

# A hook of mmdebstrap: prints the repositories that it would use, and ends it before it reaches for them.
PRINT_SOURCES = 'cat "$1/etc/apt/sources.list"; exit 1'

# Files that mmdebstrap leaves behind.
LEFT_OVER = (
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "etc/.resolv.conf.systemd-resolved.bak",
    "etc/apt/sources.list",
)

NO_RELEASE = re.compile(r"does not have a Release file|404 +Not Found|unable to find a suitable")
TOO_NEW = re.compile(r"is not valid yet|Not live until")  # in messages on a Release file, or on its signature
NO_PACKAGE = re.compile(r"Unable to locate package (\S+)|Package '?(\S+?)'? has no installation candidate")


class DebianInstaller(DistroInstaller):
    """Debian stable, or another release since 12."""

    id = "debian"
    name = "Debian GNU/Linux"
    crypttab_options = "luks,initramfs"
    tools: ClassVar[host.Tools] = {"mmdebstrap": "mmdebstrap", "gpg": "gpg", KEYRING: host.KEYRING_PACKAGE}
    zsh_completions = "usr/share/zsh/vendor-completions"
    # From passwd.master and group.master of base-passwd, and from the packages above.
    reserved_names = (
        "root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc _apt nobody adm tty disk"
        " kmem dialout fax voice cdrom floppy tape sudo audio dip operator src shadow utmp video sasl plugdev staff"
        " users nogroup systemd-journal systemd-network systemd-timesync systemd-resolve messagebus input sgx clock"
        " kvm render"
    )

    def resolve(self, source: Source) -> Source:
        """Simulate the bootstrap with the repository's package lists; no package is downloaded."""
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", source.release):
            raise AshError(f"there is no Debian release {source.release}", RELEASES, USAGE)
        for name in source.packages:
            if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
                raise AshError(f"{name!r} is not a valid package name", status=USAGE)
        found = _try_with(source, [ANYTREE, *source.firmware])
        for suite in sorted({*_further_suites(found)} - {suite for _, suite in _repositories(found)}):
            print(f"init.py: {source.mirror} has no {suite}: the system will not have it", file=sys.stderr)
        return found

    def repository_time(self, source: Source) -> datetime | None:
        """Ask the mirror, or if none is named, the first repository of this machine."""
        url = f"{source.mirror}/dists/{source.release}/InRelease" if source.mirror else _own_release_file()
        if not url or not Path(FETCH).exists():
            return None
        with tempfile.TemporaryDirectory(prefix="ash-time-") as directory:
            options = [f"-o{name}={value}" for name, value in SHOW_ANSWERS.items()]
            done = run([FETCH, *options, "download-file", url, f"{directory}/InRelease"], check=False)
        return _time_in_answer(done.stdout + done.stderr)

    def bootstrap(self, root: Path, source: Source, settings: Settings, log: host.Log) -> None:
        """Bootstrap with mmdebstrap, which starts no services, then generate the initramfs."""
        with tempfile.TemporaryDirectory(prefix="ash-bootstrap-") as scratch:
            log.run(self.bootstrap_command(root, source, settings, scratch), env=BUILD_ENVIRONMENT)
        _write_sources(root)
        for name in LEFT_OVER:
            (root / name).unlink(missing_ok=True)
        self._make_initramfs(root, log)

    def _make_initramfs(self, root: Path, log: host.Log) -> None:
        for kernel in (root / "usr/lib/modules").iterdir():
            log.run_inside(root, [*self.distro.make_initramfs, kernel.name])

    def bootstrap_command(self, root: Path, source: Source, settings: Settings, scratch: str) -> list[str]:
        """That of mmdebstrap."""
        packages = dataclasses.replace(source, packages=(*source.packages, *self._packages_for(settings)))
        return [*_mmdebstrap(packages, scratch), "--verbose", *_where(source, root)]

    def _packages_for(self, settings: Settings) -> Iterator[str]:
        if settings.locale != Settings.DEFAULT_LOCALE:
            yield "locales"
        if settings.keymap != Settings.DEFAULT_KEYMAP:
            yield "console-setup"
        if settings.ssh_keys:
            yield "openssh-server"
        if settings.passphrase is not None:
            yield "cryptsetup-initramfs"
        if settings.network is Network.NETWORK_MANAGER:
            yield from NETWORK_MANAGER
        if settings.swap.zram:
            yield ZRAM

    def needed_files(self, settings: Settings) -> Mapping[str, str]:
        """One file of each package."""
        files = {
            "usr/bin/dpkg": "dpkg",
            "usr/bin/python3": "python3",
            "usr/sbin/grub-install": "grub2-common",
            "usr/lib/grub/i386-pc/boot.img": "grub-pc-bin",
            "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed": "grub-efi-amd64-signed",
            "usr/lib/shim/shimx64.efi.signed": "shim-signed",
            "usr/sbin/update-initramfs": "initramfs-tools",
        }
        if settings.locale != Settings.DEFAULT_LOCALE:
            files["usr/sbin/locale-gen"] = "locales"
        if settings.keymap != Settings.DEFAULT_KEYMAP:
            files["usr/bin/setupcon"] = "console-setup"
        if settings.ssh_keys:
            files["usr/sbin/sshd"] = "openssh-server"
        if settings.passphrase is not None:
            files[CRYPT_HOOK] = "cryptsetup-initramfs"
        if settings.network is Network.NETWORK_MANAGER:
            files |= {"usr/sbin/NetworkManager": "network-manager", "usr/sbin/wpa_supplicant": "wpasupplicant"}
        if settings.swap.zram:
            files["usr/lib/systemd/system-generators/zram-generator"] = ZRAM
        return files

    def make_initramfs_open(self, root: Path, log: host.Log) -> None:
        """As /usr/share/doc/cryptsetup-initramfs/README.initramfs.gz has it."""
        hook = "etc/cryptsetup-initramfs/conf-hook"
        pattern = 'KEYFILE_PATTERN="/etc/cryptsetup-keys.d/*.key"\n'
        host.put(root, hook, read_text(path_inside(root, hook)) + pattern)
        host.put(root, "etc/initramfs-tools/conf.d/luks", "UMASK=0077\n")
        self._make_initramfs(root, log)

    def firmware_for(self, hardware: Hardware) -> list[str]:
        """By the tables above."""
        found = [MICROCODE[hardware.processor]] if hardware.processor in MICROCODE else []
        needed = {re.compile(pattern): package for pattern, package in FIRMWARE.items()}
        return found + [package for drivers, package in needed.items() if any(map(drivers.fullmatch, hardware.drivers))]

    def all_firmware(self) -> list[str]:
        """Those of the tables above, and the one with all that is in no other."""
        return [*MICROCODE.values(), *FIRMWARE.values(), "firmware-misc-nonfree"]

    def lacking(self, packages: Iterable[str], there: Collection[str]) -> list[str]:
        """By the lists of files that dpkg keeps."""

        def has(package: str) -> bool:
            return f"var/lib/dpkg/info/{package}.list" in there

        return [one for one in packages if not (has(one) or has(OLDER_FIRMWARE.get(one, one)))]

    def set_locale(self, root: Path, locale: str, log: host.Log) -> None:
        """Use /etc/locale.gen; C.UTF-8 always exists."""
        host.put(root, "etc/default/locale", f"LANG={locale}\n")
        if locale != Settings.DEFAULT_LOCALE:
            supported = read_text(path_inside(root, "usr/share/i18n/SUPPORTED")).splitlines()
            lines = [line for line in supported if line.split()[:1] == [locale]]
            host.put(root, "etc/locale.gen", "\n".join([*lines, ""]))
            log.run_inside(root, ["locale-gen"])

    def set_keymap(self, root: Path, keymap: str, log: host.Log) -> None:
        """Use /etc/default/keyboard, and compile the console's keymap now: it takes setupcon several seconds."""
        layout, _, variant = keymap.partition(":")
        lines = ['XKBMODEL="pc105"', f'XKBLAYOUT="{layout}"', f'XKBVARIANT="{variant}"', 'XKBOPTIONS=""', ""]
        host.put(root, "etc/default/keyboard", "\n".join(lines))
        if keymap != Settings.DEFAULT_KEYMAP:
            log.run_inside(root, ["setupcon", "--save-only"])


def _own_release_file() -> str:
    """The URL of the Release file of this machine's first repository; empty if it has none."""
    form = "$(REPO_URI)dists/$(RELEASE)/InRelease"
    found = run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], check=False)
    return next((line for line in found.stdout.splitlines() if line.startswith("http")), "")


def _time_in_answer(output: str) -> datetime | None:
    """When the last HTTP response in apt's debugging output was made; a proxy says for how long it has kept it."""
    dates = re.findall(r"^date: (.+)$", output, re.MULTILINE | re.IGNORECASE)
    ages = re.findall(r"^age: (\d+)$", output.rpartition("Answer for:")[2], re.MULTILINE | re.IGNORECASE)
    try:
        return parsedate_to_datetime(dates[-1]) + timedelta(seconds=int(ages[0]) if ages else 0)
    except (IndexError, ValueError):
        return None


def _try_with(source: Source, wanted: Sequence[str]) -> Source:
    """_try_repository() with those of the wanted packages that it has, or older ones in their place."""
    left = dict.fromkeys(wanted)
    while True:
        firmware = tuple(name for name in left if name != ANYTREE)
        try:
            tried = dataclasses.replace(source, packages=(*source.packages, *left), firmware=firmware)
            return _try_repository(tried)
        except AshError as error:
            missing = next((name for name in left if name in error.message.split()), "")
            if not missing:
                raise
            del left[missing]
            if missing in OLDER_FIRMWARE:
                left[OLDER_FIRMWARE[missing]] = None


@cache
def _try_repository(source: Source) -> Source:
    """The source with its code name; raises AshError if a bootstrap from it would fail."""
    with tempfile.TemporaryDirectory(prefix="ash-repository-") as directory:
        root = Path(directory, "root")
        argv = [*host.CONTAINED, *_mmdebstrap(source, directory), "--simulate", *_where(source, root)]
        done = run(argv, check=False)
        if done.returncode:
            raise _repository_error(source, done.stderr)
        release = _release_file(root, source.release)
    if release.get("Origin") != "Debian":
        raise AshError(f"{source.release} is not a release of Debian", RELEASES, USAGE)
    return dataclasses.replace(source, release=release["Codename"])


def _mmdebstrap(source: Source, scratch: str) -> list[str]:
    """The command line of mmdebstrap, without what differs between a simulation and a bootstrap.

    Its temporary files go to the scratch directory: it cannot delete them if it is killed.
    """
    packages = [*BOOT, *GRUB, *SYSTEM, *TOOLS, *ASH, *source.packages]
    argv = ["env", f"TMPDIR={scratch}", "mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase"]
    argv += [f"--components={COMPONENTS}", f"--include={','.join(packages)}", "--skip=cleanup/apt/lists"]
    return [*argv, *BUILD_OPTIONS, *_host_apt_options()]


def _where(source: Source, root: Path) -> list[str]:
    """The release, the directory, and unless it is Debian's own, the repository with its updates (mmdebstrap(1))."""
    components = COMPONENTS.replace(",", " ")
    lines = [f"deb [signed-by={KEYRING}] {url} {suite} {components}" for url, suite in _repositories(source)]
    return [source.release, str(root), *lines]


def _further_suites(source: Source) -> dict[str, Sequence[str]]:
    """The suites that belong to a release besides its own: {suite: the URLs where it may be}.

    Few mirrors have the security updates; some have them beside the release, at MIRROR-security.
    """
    if source.mirror is None or source.release in ROLLING:
        return {}
    mirror, security = source.mirror.rstrip("/"), f"{source.release}-security"
    return {f"{source.release}-updates": [mirror], security: [f"{mirror}-security", *_debians_own(security)]}


@cache
def _debians_own(suite: str) -> tuple[str, ...]:
    """The URLs from which mmdebstrap takes a suite that belongs to a release, if no mirror is named."""
    with tempfile.TemporaryDirectory(prefix="ash-sources-") as scratch:
        argv = ["env", f"TMPDIR={scratch}", "mmdebstrap", "--mode=root", "--format=directory", "--variant=custom"]
        hook = f"--setup-hook={PRINT_SOURCES}"
        done = run([*host.CONTAINED, *argv, hook, suite.partition("-")[0], f"{scratch}/root"], check=False)
    sources = re.findall(r"^deb (?:\[[^]]*\] )?(\S+) (\S+) ", done.stderr, re.MULTILINE)
    return tuple(url for url, its in sources if its == suite)


def _repositories(source: Source) -> list[tuple[str, str]]:
    """The URLs and suites of a mirror, with the updates that it or (security updates) mmdebstrap's default has."""
    if source.mirror is None:
        return []
    found = [(source.mirror, source.release)]
    for suite, urls in _further_suites(source).items():
        found += [(url, suite) for url in urls if _has_suite(url, suite)][:1]
    return found


def _has_suite(url: str, suite: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="ash-suite-") as directory:
        fetch = [FETCH, "download-file", f"{url}/dists/{suite}/InRelease", f"{directory}/InRelease"]
        return run(fetch, check=False).returncode == 0


def _host_apt_options() -> list[str]:
    """The host's apt settings for reaching the repository, as options of mmdebstrap."""
    found = []
    for name in HOST_APT_OPTIONS:
        value = run(["apt-config", "shell", "VALUE", name]).stdout.strip().removeprefix("VALUE=").strip("'")
        if value:
            found.append(f'--aptopt={name} "{value}"')
    return found


def _repository_error(source: Source, output: str) -> AshError:
    """The error for failed output of mmdebstrap and apt."""
    detail = last_words("\n".join(line for line in output.splitlines() if line.startswith("E: ")) or output, 1)
    if line := host.first_line(TOO_NEW, output):
        hint = "this machine's clock is behind: date --utc --set 'YYYY-MM-DD hh:mm' sets it"
        return AshError(f"the repository was signed in the future: {line}", hint, REFUSED)
    if error := host.SignatureError.of(output):
        return error
    if found := NO_PACKAGE.search(output):
        return AshError(f"Debian {source.release} has no package {found[1] or found[2]}", status=MISSING)
    if NO_RELEASE.search(output):
        at = f" at {source.mirror}" if source.mirror else ""
        return AshError(f"there is no Debian release {source.release}{at}", RELEASES, USAGE)
    if line := host.first_line(host.UNREACHABLE, output):
        return AshError(f"the repository cannot be reached: {line}", "check the network connection")
    return AshError(f"the repository cannot be used: {detail}")


def _release_file(root: Path, suite: str) -> dict[str, str]:
    """The fields of the Release file of a suite, from apt's lists in a root."""
    file = next((root / "var/lib/apt/lists").glob(f"*_dists_{suite}_*Release"))
    return dict(re.findall(r"^(\w+): (.*)$", file.read_text(), re.MULTILINE))


def _write_sources(root: Path) -> None:
    """Convert mmdebstrap's one-line sources to deb822 format, with Signed-By."""
    lines = [line.split() for line in (root / "etc/apt/sources.list").read_text().splitlines()]
    suites: dict[str, list[str]] = {}
    for line in lines:
        words = [word for word in line if "=" not in word and word not in ("[", "]")]
        suites.setdefault(words[1], []).append(words[2])
    stanzas = [
        f"Types: deb\nURIs: {uri}\nSuites: {' '.join(names)}\n"
        f"Components: {COMPONENTS.replace(',', ' ')}\nSigned-By: {KEYRING}\n"
        for uri, names in suites.items()
    ]
    (root / "etc/apt/sources.list.d/debian.sources").write_text("\n".join(stanzas))
