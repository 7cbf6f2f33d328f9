# SPDX-License-Identifier: AGPL-3.0-or-later
"""Packages in a running system: live changes, a writable shell, a tree upgraded by cron, auto-upgrade."""

import shutil
from pathlib import Path

import pytest

from installer.machine import Machine
from tests.archive import Archive, use_only
from tests.boot.checks import refused, runs_snapshot, said, starts_next
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(480)]

UNIT = """\
[Service]
ExecStart=/bin/sh -c 'echo ready > /run/ash-test/state; exec sleep infinity'
[Install]
WantedBy=multi-user.target
"""
SOCKET = "[Socket]\nListenStream=/run/ash-test/socket\n[Install]\nWantedBy=sockets.target\n"
BROKEN = "[Service]\nType=oneshot\nExecStart=false\n[Install]\nWantedBy=multi-user.target\n"
ENABLE = "systemctl enable {}.service"
# As dh_installsystemd(1) puts it into the script of a package.
RESTART = """\
if [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload
    deb-systemd-invoke restart ash-test-daemon.socket ash-test-daemon.service
fi
"""
SLOW_BLESS = Path("/etc/systemd/system/ash-bless.service.d/slow.conf")
NUMBERS = range(1, 4)


def archives(directory: Path) -> None:
    """Four states of a repository, each with a newer version of the tree's package; the last version is broken."""
    for state in ("1", "2", "3", "4"):
        archive = Archive(directory / state)
        bad = {"postinst": "exit 1"} if state == "4" else {}
        archive.add("ash-test-tool", state, files={"usr/share/tool": f"{state}\n"}, **bad)
        daemon = {
            "usr/lib/systemd/system/ash-test-daemon.service": UNIT,
            "usr/lib/systemd/system/ash-test-daemon.socket": SOCKET,
            "usr/lib/tmpfiles.d/ash-test.conf": "d /run/ash-test\n",
            "usr/bin/ash-test": "#!/bin/sh\necho here\n",
        }
        script = f"chmod 755 /usr/bin/ash-test; {ENABLE.format('ash-test-daemon')} ash-test-daemon.socket"
        archive.add("ash-test-daemon", files=daemon, postinst=script)
        newer = {
            "usr/lib/systemd/system/ash-test-daemon.service": UNIT.replace("ready", "newer"),
            "usr/lib/sysctl.d/ash-test.conf": "kernel.domainname = ash-test\n",
            "usr/lib/tmpfiles.d/ash-test.conf": "d /run/ash-test\nd /run/ash-test-newer\n",
        }
        archive.add("ash-test-daemon", "2", files={**daemon, **newer}, postinst=f"{script}\n{RESTART}")
        broken = {"usr/lib/systemd/system/ash-test-broken.service": BROKEN}
        archive.add("ash-test-broken", files=broken, postinst=ENABLE.format("ash-test-broken"))


def test_packages_of_a_running_system(disk: Disk, boot: Boot, tmp_path: Path) -> None:
    prepare(disk, tmp_path)
    with boot(disk) as machine:
        machine.login()
        runs_snapshot(machine, 1)
        installs_live(machine)
        opens_itself(machine)
        upgrades_a_tree_by_cron(machine)
        upgrades_by_night(machine)
        said(
            machine,
            f"mkdir {SLOW_BLESS.parent} && printf '[Service]\\nExecStart=\\nExecStart=sleep 900\\n' > {SLOW_BLESS}",
        )
        machine.reboot()
        machine.login()
        runs_snapshot(machine, 1)
        assert said(machine, "cat /usr/share/tool") == "3"
        said(machine, "while ! pgrep -f 'sleep 90''0'; do sleep 1; done")
        machine.poweroff()  # a check that this stops is no reason to restart


def prepare(disk: Disk, directory: Path) -> None:
    """A tree of three with the first version, and cron; the states of the repository are in /home."""
    archives(directory)
    with disk.files() as files:
        for state in ("1", "2", "3", "4"):
            shutil.copytree(directory / state, files.home / state)
        (files.home / "archive").symlink_to("1")
    disk.clone()
    disk.ash("install", 1, "cron")
    disk.shell(1, use_only("file:/home/archive"))
    disk.ash("refresh", 1)
    disk.ash("install", 1, "ash-test-tool")
    for parent in (1, 2):
        disk.branch(parent)
    disk.ash("deploy", 1)


def installs_live(machine: Machine) -> None:
    """A service is started at once and stopped at once; one that fails to start is rolled back."""
    refused(machine, "apt-get install -y ash-test-daemon", "ash install PACKAGE")
    report = said(machine, "ash install ash-test-daemon=1")
    assert "started: ash-test-daemon.socket, ash-test-daemon.service" in report
    active = "systemctl is-active ash-test-daemon.socket ash-test-daemon"
    assert said(machine, f"ash-test && {active} && cat /run/ash-test/state").split() == [
        "here",
        "active",
        "active",
        "ready",
    ]
    report = said(machine, "ash install /home/1/ash-test-daemon_2_all.deb")
    assert "restarted: ash-test-daemon.socket, ash-test-daemon.service" in report
    assert said(machine, f"{active} && cat /run/ash-test/state").split() == ["active", "active", "newer"]
    assert said(machine, "test -d /run/ash-test-newer && cat /proc/sys/kernel/domainname") == "ash-test"
    assert "ash-test-daemon" in said(machine, "ash -q list 1")
    assert said(machine, "ash diff") == "no difference"
    refused(machine, "touch /usr/bin/written", "Read-only file system")

    failed = machine.command("ash install ash-test-broken", timeout=300, ok=None)
    assert failed.status == 1
    assert "the running system is unchanged" in failed.output
    assert "ash-test-broken" in said(machine, "ash -q list 1"), "the snapshot has it"
    said(machine, "! test -e /usr/lib/systemd/system/ash-test-broken.service")
    said(machine, "ash remove 1 ash-test-broken --not-live")

    report = said(machine, "ash remove ash-test-daemon")
    assert "stopped: ash-test-daemon.service, ash-test-daemon.socket" in report
    said(machine, "! test -e /usr/bin/ash-test && ! systemctl is-active ash-test-daemon")
    assert said(machine, "systemctl --failed --plain --no-legend") == ""


def opens_itself(machine: Machine) -> None:
    """One writable shell at a time in the running system; a killed one leaves nothing. The same for a snapshot."""
    said(machine, "printf 'echo live > /usr/share/live\\n' | ash live-chroot")
    assert said(machine, "cat /usr/share/live") == "live"
    refused(machine, "touch /usr/share/written", "Read-only file system")
    said(machine, "(sleep 600 | ash live-chroot) > /dev/null 2>&1 & sleep 3")
    refused(machine, "ash live-chroot < /dev/null", "locked by pid")
    said(
        machine,
        "pkill -9 -f 'sys.argv.*live-chroot'; pkill sleep; sleep 1; printf 'rm /usr/share/live\\n' | ash live-chroot",
    )
    said(machine, "! test -e /usr/share/live && ! grep unlocked /proc/*/mountinfo")
    said(machine, "printf 'setsid sleep 611 >/dev/null 2>&1 &\n' | ash live-chroot && ! pgrep -f 'sleep 61''1'")

    said(machine, "mount -t tmpfs foreign /.snapshots/rootfs/snapshot-2/mnt")
    refused(machine, "ash fsck", "is mounted inside it")
    said(machine, "ash fsck --repair && ! findmnt /.snapshots/rootfs/snapshot-2/mnt")

    menu = said(machine, "cat /.snapshots/ash/menu")
    refused(machine, "printf 'touch /etc/dropped\\nexit 3\\n' | ash hollow 3", "snapshot 3 is unchanged")
    said(machine, "(sleep 600 | ash hollow 3) > /dev/null 2>&1 & sleep 3")
    refused(machine, "ash hollow 3 < /dev/null", "locked by pid")
    said(machine, "pkill -9 -f 'sys.argv.*hollow'; pkill sleep; sleep 1; ash tmp")
    said(machine, "! test -e /.snapshots/rootfs/snapshot-3/etc/dropped && ! ls /.snapshots/rootfs | grep chr")
    assert said(machine, "cat /.snapshots/ash/menu") == menu, "nothing is deployed"
    said(machine, "printf 'cp /run/ash/running/etc/hostname /etc/from-running\\n' | ash hollow 3")
    starts_next(machine, 3)
    assert said(machine, "cat /.snapshots/rootfs/snapshot-3/etc/from-running") == said(machine, "hostname")
    said(machine, "ash deploy 1")


def upgrades_a_tree_by_cron(machine: Machine) -> None:
    """Cron upgrades the whole tree."""
    said(machine, "ln -sfn 2 /home/archive")
    # Only once: it may take more than a minute.
    line = "* * * * * root rm /etc/cron.d/ash; ash tree-upgrade 1 > /var/log/part 2>&1; mv /var/log/part /var/log/night"
    said(machine, f"echo '{line}' > /etc/cron.d/ash")
    machine.command("while ! test -e /var/log/night; do sleep 1; done", timeout=400)
    report = said(machine, "cat /var/log/night")
    assert report.startswith("upgrading 3 snapshots: 3 changed"), report
    assert "\x1b" not in report
    for number in NUMBERS:
        assert said(machine, f"cat /.snapshots/rootfs/snapshot-{number}/usr/share/tool") == "2"


def upgrades_by_night(machine: Machine) -> None:
    """A broken package changes nothing; otherwise auto-upgrade keeps a copy, upgrades, deploys and schedules a reboot."""
    said(machine, "ln -sfn 4 /home/archive")
    assert machine.command("systemctl start ash-upgrade.service", timeout=300, ok=None).status != 0
    refused(machine, "ash check", "failed")
    assert "failed" in said(machine, "ash status")
    assert said(machine, "cat /.snapshots/rootfs/snapshot-1/usr/share/tool") == "2"
    said(machine, "printf 'auto_upgrade::reboot\\nauto_upgrade_window::00:00-23:59\\n' > /etc/ash.conf")
    said(machine, "ln -sfn 3 /home/archive && systemctl start ash-upgrade.service")
    scheduled = said(machine, "cat /run/systemd/shutdown/scheduled; shutdown -c")  # not to wait for it
    assert "MODE=reboot" in scheduled
    assert "succeeded" in said(machine, "ash check")
    starts_next(machine, 1)
    assert "1 before 20" in said(machine, "ash tree")
    journal = said(machine, "journalctl --no-pager -u ash-upgrade")
    assert "snapshot 1 changed" in journal
    assert "rebooting in one minute" in journal
