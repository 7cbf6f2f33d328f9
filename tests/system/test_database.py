# SPDX-License-Identifier: AGPL-3.0-or-later
"""Package state travels with the snapshot: nothing in the shared /var names packages that only one sibling has.

ASH_TEST_PACKAGES names more packages to try, by hand: "popular" stands for those in POPULAR, which take half an hour.
"""

import os
import re
from pathlib import Path

import pytest

from ash import load_distro
from tests.support import DISTRIBUTION
from tests.system.disk_system import Facts, System, everything_below

DISTRO = load_distro(DISTRIBUTION)

pytestmark = [pytest.mark.system, pytest.mark.budget(120)]

# Packages whose scripts note things in /var: kernel headers with dkms, modules of apache2 and of pam, dictionaries,
# certificates for Java, Python programs, users of ucf, debconf and of trigger files.
PACKAGES = [
    "linux-headers-amd64", "dkms", "apache2", "libpam-pwquality", "wamerican", "hunspell-en-us", "iamerican",
    "ca-certificates-java", "openjdk-21-jre-headless", "python3-requests", "ucf", "xfonts-utils", "fontconfig",
]  # fmt: skip
# Popular packages that can all be installed at once.
POPULAR = (
    "nginx postgresql mariadb-server redis-server memcached docker.io containerd podman openssh-server ufw "
    "nftables fail2ban certbot postfix dovecot-imapd samba nfs-kernel-server cups avahi-daemon bluez "
    "network-manager wpasupplicant dnsmasq bind9 unbound chrony openvpn wireguard strongswan tor squid haproxy "
    "varnish php-fpm libapache2-mod-php python3-pip nodejs npm golang-go default-jre-headless tomcat10 git vim "
    "emacs-nox tmux screen htop curl rsync zsh build-essential cmake gdb strace tcpdump wireshark-common nmap "
    "sysstat smartmontools lm-sensors lvm2 mdadm cryptsetup-initramfs snapper xfsprogs os-prober "
    "libvirt-daemon-system qemu-system-x86 qemu-user-binfmt binfmt-support lxc snapd flatpak prometheus "
    "prometheus-node-exporter munin zabbix-agent snmpd rsyslog auditd apparmor selinux-basics aide clamav-daemon "
    "rkhunter anacron at unattended-upgrades popularity-contest console-setup locales tzdata lightdm "
    "xserver-xorg-core pipewire firefox-esr gdm3 kea-dhcp4-server isc-dhcp-server keepalived corosync pacemaker "
    "slapd krb5-kdc freeradius sssd nslcd quota autofs open-iscsi multipath-tools fwupd tlp irqbalance zram-tools "
    "needrestart etckeeper systemd-resolved dbus-broker udisks2 modemmanager kexec-tools kdump-tools plymouth "
    "ifupdown hostapd tftpd-hpa rpcbind conntrackd ethtool wordpress phpmyadmin roundcube-core spamassassin "
    "opendkim icinga2 ansible puppet-agent mailman3 xrdp "
)
# Files that no package script reads: data of users and daemons, logs.
DATA = (
    "www/html", "lib/mysql", "lib/postgresql", "lib/smartmontools/drivedb", "lib/spamassassin", "lib/tomcat10/webapps",
    "lib/rkhunter/db", "lib/systemd/catalog", "log/fontconfig.log", "log/munin",
)  # fmt: skip
APT = "export DEBIAN_FRONTEND=noninteractive; apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0"

# A minimal kernel module.
DKMS = {
    "dkms.conf": 'PACKAGE_NAME="ashtest"\\nPACKAGE_VERSION="1"\\nBUILT_MODULE_NAME[0]="ashtest"\\n'
    'DEST_MODULE_LOCATION[0]="/updates"\\nAUTOINSTALL="yes"\\n',
    "Makefile": "obj-m += ashtest.o\\n",
    "ashtest.c": '#include <linux/module.h>\\nMODULE_LICENSE("GPL");\\n',
}


class Installed:
    """Two siblings, one of which has the packages."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.with_packages, self.sibling = system.clone(), system.clone()
        self.database_before = everything_below(system.root(self.sibling) / "usr/share/ash/db")
        system.shell(self.sibling, "apt-get -qq update")
        self.before = everything_below(system.files.var)
        more = os.environ.get("ASH_TEST_PACKAGES", "").replace("popular", POPULAR).split()
        self.packages = [*dict.fromkeys([*PACKAGES, *more])]
        system.shell(self.with_packages, f"{APT} install {' '.join(self.packages)}", seconds=3600)

    def new_in_var(self) -> dict[str, Facts]:
        """The new or changed files in the shared /var, except the distribution's caches and logs."""
        after = everything_below(self.system.files.var)
        expected = (*DISTRO.package_manager.caches, *DISTRO.package_manager.logs, "log/journal")
        return {
            path: facts
            for path, facts in after.items()
            if self.before.get(path) != facts
            and not any(f"{path}/".startswith(f"{directory}/") for directory in expected)
        }


@pytest.fixture(scope="module")
def installed(system: System) -> Installed:
    return Installed(system)


def test_the_shared_var_names_no_package_of_only_one_sibling(installed: Installed) -> None:
    system, apt = installed.system, DISTRO.package_manager
    root = system.root(installed.with_packages)
    there = apt.installed(root)
    new = there.keys() - apt.installed(system.root(installed.sibling)).keys()
    assert set(installed.packages) <= there.keys()
    # What is no word of English too; versions that are no small number.
    names = {name for name in new if "-" in name} | set(installed.packages)
    versions = {there[name] for name in new if len(there[name]) > 5}
    lists = [
        path.read_text() for name in new for path in (root / "usr/share/ash/db/dpkg/info").glob(f"{name}[.:]*list")
    ]
    paths = {
        line for text in lists for line in text.splitlines() if line.count("/") > 2 and not (root / line[1:]).is_dir()
    }
    unlisted = {}
    for path in installed.new_in_var():
        file = system.files.var / path
        if f"{path}/".startswith(tuple(f"{data}/" for data in DATA)) or file.is_symlink() or not file.is_file():
            continue
        text = file.read_bytes().decode(errors="replace")
        named = set(re.findall(r"[a-z0-9][a-z0-9+.-]+", text)) & names | {
            version for version in versions if version in text
        }
        named |= set(re.findall(r"/(?:usr|etc)/[\w./+-]+", text)) & paths
        if named:
            unlisted[path] = sorted(named)[:3]
    assert not unlisted, "\n".join(f"/var/{path} names {', '.join(named)}" for path, named in unlisted.items())


def test_the_databases_symlinks_resolve_in_both_siblings(installed: Installed) -> None:
    system = installed.system
    for name in DISTRO.package_manager.database:
        link = system.files.var / name
        assert link.is_symlink(), f"a package has replaced the link /var/{name}"
        for snapshot in (installed.with_packages, installed.sibling, 0):
            assert (system.root(snapshot) / os.readlink(link).lstrip("/")).is_dir()


def test_the_sibling_is_unaffected(installed: Installed) -> None:
    system = installed.system
    assert everything_below(system.root(installed.sibling) / "usr/share/ash/db") == installed.database_before
    system.shell(
        installed.sibling, 'dpkg --audit; apt-get check; [ -z "$(dpkg --audit)" ]; ! ls /etc/apache2 2>/dev/null'
    )
    assert system.ash("--json", "fsck").json["damage"] == []


def test_the_tools_of_the_packages_know_their_own_records(installed: Installed) -> None:
    system = installed.system
    system.shell(
        installed.with_packages,
        "a2query -m mpm_event; a2enmod headers; a2query -m headers; pam-auth-update --package; grep -q pwquality /etc/pam.d/common-password; "
        "debconf-show dictionaries-common | grep -q american; ucfq /etc/default/im-config || true; "
        "update-ca-certificates --fresh >/dev/null; [ -s /etc/ssl/certs/java/cacerts ]; hunspell -v >/dev/null 2>&1 || true; apt-get check",
    )


def test_a_dkms_module_is_installed_and_registered(installed: Installed) -> None:
    """dkms compares paths in its directory with the targets of its symlinks."""
    files = "; ".join(f"printf '{text}' > {name}" for name, text in DKMS.items())
    script = f"mkdir /usr/src/ashtest-1; cd /usr/src/ashtest-1; {files}; kernel=$(ls /lib/modules | tail -n 1); "
    system = installed.system
    said = system.shell(
        installed.with_packages,
        f"{script} dkms install ashtest/1 -k $kernel 1>&2; dkms autoinstall -k $kernel 1>&2; dkms status",
        seconds=600,
    )
    assert re.search(r"^ashtest/1, .*: installed$", said.stdout, re.MULTILINE), said


def test_a_purge_in_one_sibling_does_not_affect_the_other(installed: Installed) -> None:
    system = installed.system
    few = "libpam-pwquality wamerican"
    system.shell(installed.sibling, f"{APT} install {few}")
    before = everything_below(system.files.var / "lib")
    system.shell(installed.with_packages, f"{APT} purge {few}", seconds=600)
    system.shell(
        installed.sibling,
        'pam-auth-update --package; grep -q pwquality /etc/pam.d/common-password; [ -z "$(dpkg --verify libpam-pwquality wamerican)" ]; '
        "debconf-show libpam-runtime | grep -q pwquality; [ -e /usr/share/dict/american-english ]; apt-get check",
    )
    after = everything_below(system.files.var / "lib")
    assert {path for path in before.keys() - after.keys() if not path.startswith("apt/")} == set()


def test_apt_marks_belong_to_the_snapshot(installed: Installed) -> None:
    system = installed.system
    own = "usr/share/ash/db/apt/extended_states"
    assert not os.path.lexists(system.files.var / "lib/apt/extended_states")
    marked = (system.root(installed.with_packages) / own).read_text()
    assert "Package: apache2-bin" in marked
    sibling: Path = system.root(installed.sibling) / own
    assert not sibling.exists() or "apache2-bin" not in sibling.read_text()
