# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Debian that boots with OpenRC, from the real repositories: deployments, edits of /etc, trials and fallback."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from installer.machine import Machine
from tests.boot.checks import is_immutable, new_snapshot, runs_snapshot, said, starts_next
from tests.boot.conftest import Boot
from tests.support import Disk, make_deb, program

pytestmark = [pytest.mark.boot, pytest.mark.budget(3000)]

# The packages that a Debian needs for OpenRC; the console that the tests use; a network by DHCP, without a delay.
INSTALL = """\
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends --allow-remove-essential openrc sysvinit-core orphan-sysvinit-scripts \
    ifupdown dhcpcd-base systemd-sysv- libpam-systemd- systemd-resolved- systemd-timesyncd-
echo 'T0:23:respawn:/sbin/getty -L ttyS0 115200 vt100' >> /etc/inittab
printf 'auto lo\\niface lo inet loopback\\n' > /etc/network/interfaces
rc-update del savecache off
"""
CHECK = "/etc/ash/health.d/check"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a snapshot.

    Args:
        script: makes it so.
        timeout: how long a start may take, in minutes; a boot takes longer than one.
    """

    script: str
    timeout: int = 30


CAUSES = {
    "a health check fails": Fault(f"mkdir -p /etc/ash/health.d; printf '#!/bin/sh\\nexit 1\\n' > {CHECK}; chmod 755 {CHECK}"),
    "a shell for repairs": Fault(r"sed -i 's/^do_start () {/&\nsulogin --force/' /etc/init.d/checkfs.sh"),
    "a file system is not mounted": Fault("mkdir /usr/none; echo /dev/none /usr/none ext4 defaults 0 0 >> /etc/fstab"),
    "a script hangs": Fault("sed -i '2i sleep infinity' /etc/init.d/bootmisc.sh", timeout=1),
    "OpenRC is damaged": Fault("echo damaged > /usr/sbin/openrc", timeout=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An image whose snapshot 1 boots with OpenRC, and is deployed."""
    copy = tmp_path_factory.mktemp("openrc") / "disk.img"
    program("cp", "--sparse=always", "--reflink=auto", image, copy)
    disk = Disk(copy)
    assert disk.clone() == 1
    disk.shell(1, INSTALL, seconds=1800)
    disk.ash("deploy", 1)
    yield copy
    copy.unlink()


@pytest.fixture
def openrc(installed: Path, tmp_path: Path) -> Iterator[Disk]:
    """A private copy of that image."""
    copy = tmp_path / "disk.img"
    program("cp", "--sparse=always", "--reflink=auto", installed, copy)
    yield Disk(copy)
    copy.unlink()


# As dh_installinit(1) puts it into the script of a package.
START = """\
update-rc.d ash-test-daemon defaults
if [ "$2" ]; then action=restart; else action=start; fi
invoke-rc.d ash-test-daemon $action || exit 1
"""
SERVICE = """\
#!/bin/sh
### BEGIN INIT INFO
# Provides:          ash-test-daemon
# Required-Start:    $remote_fs
# Required-Stop:     $remote_fs
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: made by a test
### END INIT INFO
case $1 in
start) echo VERSION >> /run/ash-test ;;
stop) echo stopped >> /run/ash-test ;;
restart) $0 stop; $0 start ;;
esac
"""


def await_blessing(machine: Machine) -> None:
    said(machine, "until rc-service ash-bless status; do sleep 1; done")


def test_the_life_of_a_system_with_openrc(openrc: Disk, boot: Boot) -> None:
    with boot(openrc) as machine:
        machine.login()
        runs_snapshot(machine, 1)
        await_blessing(machine)
        assert "on trial" not in said(machine, "ash status")
        said(machine, "! ls /run/openrc/failed/*")
        is_immutable(machine)

        assert new_snapshot(machine, "clone 1") == 2
        said(machine, "touch /etc/before; ash deploy 2")
        starts_next(machine, 2)
        said(machine, "touch /etc/after; echo somebody > /etc/hostname")
        # What the next boot is to clean up.
        said(machine, "mkdir -p /.snapshots/ash/work/1; btrfs subvolume create /.snapshots/ash/work/1/var")

        machine.reboot()
        machine.login()
        runs_snapshot(machine, 2)
        said(machine, "test -e /etc/before && test -e /etc/after && test $(hostname) = somebody")
        assert said(machine, "find /.snapshots/ash/work -mindepth 2 ! -name lock") == ""
        await_blessing(machine)
        assert "on trial" not in said(machine, "ash status")
        assert said(machine, "ash fsck") == "no problems found"
        machine.poweroff()
    assert openrc.notes() == {}


def test_a_new_service_of_a_running_openrc_is_started(openrc: Disk, boot: Boot, tmp_path: Path) -> None:
    script = f"chmod 755 /etc/init.d/ash-test-daemon\n{START}"
    files_of_package = {"etc/init.d/ash-test-daemon": SERVICE.replace("VERSION", "1")}
    package = make_deb(tmp_path, "ash-test-daemon", files=files_of_package, postinst=script)
    with openrc.files() as files:
        shutil.copy(package, files.home)
    with boot(openrc) as machine:
        machine.login()
        await_blessing(machine)
        report = said(machine, "ash install /home/ash-test-daemon_1_all.deb")
        assert "started: ash-test-daemon" in report
        assert said(machine, "cat /run/ash-test") == "1"
        machine.poweroff()


@pytest.mark.parametrize("name", CAUSES)
def test_a_machine_with_openrc_goes_back_by_itself(openrc: Disk, boot: Boot, name: str) -> None:
    fault = CAUSES[name]
    with openrc.files() as files:
        root = files.root(files.default_slot())
        (files.state / "booted").write_text((root / "usr/share/ash/deployment").read_text())
        (root / "etc/ash.conf").write_text(f"boot_tries::1\nboot_timeout::{fault.timeout}\n")
    assert openrc.clone(1) == 2
    openrc.shell(2, fault.script)
    openrc.ash("deploy", 2)
    assert openrc.notes()["try_n"] == "1"
    with boot(openrc) as machine:
        machine.expect(r"Command line: .*ash\.trial=", 300)
        machine.expect(r"Command line: .*ash\.fellback=", 1800)
        machine.login()
        runs_snapshot(machine, 1)
        await_blessing(machine)
        assert "snapshot 2 did not start" in said(machine, "ash status")
        starts_next(machine, 1)
        machine.poweroff()
