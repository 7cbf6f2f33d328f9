# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whatever prevents a new deployment from starting, the machine comes up in the last good one by itself."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ash import BLOCK_SIZE
from installer.machine import Machine
from tests.archive import Archive, use_only
from tests.boot.checks import runs_snapshot, said, starts_next
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(3600)]

TRIES = {False: 2, True: 1}  # by whether it is UEFI, which is slow, and counts as BIOS does
FIRMWARE = pytest.mark.parametrize("uefi", [False, True], ids=["BIOS", "UEFI"])
UNIT = "/etc/systemd/system/fault.service"


def unit(command: str, when: str) -> str:
    """A script that has a unit run a command at a stage of the boot."""
    text = f"[Unit]\\nDefaultDependencies=no\\nBefore={when}\\n[Service]\\nType=oneshot\\nExecStart={command}\\n"
    wants = f"/etc/systemd/system/{when}.wants"
    return f"printf '{text}' > {UNIT}; mkdir -p {wants}; ln -s {UNIT} {wants}/"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a snapshot.

    Args:
        script: makes it so.
        has_kernel: whether its kernel starts.
        devices: that the machine needs to restart.
    """

    script: str
    has_kernel: bool = True
    devices: list[str] = field(default_factory=list)


# One processor, which this has for itself: nothing else runs any more. Since 6.12 Linux keeps a share for all others.
SHARE = "/sys/kernel/debug/sched/fair_server/cpu0/runtime"
SPIN = (
    f'sh -c "mount -t debugfs debugfs /sys/kernel/debug; echo 0 > {SHARE}; echo -1 > /proc/sys/kernel/sched_rt_runtime_us; '
    'exec chrt -f 99 sh -c \\"while :; do :; done\\""'
)
CAUSES = {
    "the kernel panics": Fault(unit('sh -c "echo c > /proc/sysrq-trigger"', "sysinit.target")),
    "init exits": Fault("ln -sf /bin/false /usr/sbin/init"),
    "init is no program": Fault("rm /usr/sbin/init; echo text > /usr/sbin/init; chmod 755 /usr/sbin/init"),
    "no initramfs": Fault("rm /boot/initrd.img-*"),
    "a damaged initramfs": Fault("for image in /boot/initrd.img-*; do head -c 2000000 $image > x; cp x $image; done"),
    "a damaged kernel": Fault("for kernel in /boot/vmlinuz-*; do echo damaged > $kernel; done", has_kernel=False),
    "the root is not found": Fault(
        "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX rootflags=device=/dev/none\"' >> /etc/default/grub"
    ),
    "an emergency shell": Fault("echo /dev/none /mnt/none ext4 x-systemd.device-timeout=2 0 2 >> /etc/fstab"),
    "a rescue shell": Fault("ln -sf /usr/lib/systemd/system/rescue.target /etc/systemd/system/default.target"),
    "a unit hangs": Fault(unit("sleep infinity", "multi-user.target")),
    "a unit hangs, and systemctl is damaged": Fault(
        unit("sleep infinity", "multi-user.target") + "; echo damaged > /usr/bin/systemctl"
    ),
    "systemd crashes": Fault(unit("kill -SEGV 1", "sysinit.target")),
    "the machine hangs": Fault(
        unit(SPIN, "multi-user.target"), devices=["-device", "i6300esb", "-action", "watchdog=reset"]
    ),
    "a health check fails": Fault(
        "mkdir /etc/ash /etc/ash/health.d; printf '#!/bin/sh\\nexit 1\\n' > /etc/ash/health.d/a; chmod 755 /etc/ash/health.d/a"
    ),
    "another check fails": Fault(
        "printf '[Unit]\\nBefore=boot-complete.target\\n[Service]\\nType=oneshot\\nExecStart=false\\n' > /etc/systemd/system/f.service;"
        "mkdir /etc/systemd/system/boot-complete.target.requires;"
        "ln -s ../f.service /etc/systemd/system/boot-complete.target.requires/"
    ),
}  # fmt: skip


def on_trial(disk: Disk, script: str, minutes: int = 1, *, uefi: bool = False) -> int:
    """Deploy a changed copy of the base, as if the deployment of the base had run; returns the copy's number."""
    with disk.files() as files:
        root = files.root("deploy")
        (files.state / "booted").write_text((root / "usr/share/ash/deployment").read_text())
        (root / "etc/ash.conf").write_text(f"boot_tries::{TRIES[uefi]}\nboot_timeout::{minutes}\n")
    number = disk.clone()
    disk.shell(number, script)
    disk.ash("deploy", number)
    assert disk.notes()["try_n"] == str(TRIES[uefi])
    return number


def falls_back(machine: Machine, number: int) -> None:
    """Assert that the base runs in the end, that it is known to boot, and that the machine says what did not."""
    machine.expect(r"Command line: .*ash\.fellback=", 1800)  # what is on trial may come as far as a login prompt
    machine.login()
    runs_snapshot(machine, 0)
    said(machine, "until systemctl is-active ash-bless; do sleep 1; done")
    assert f"snapshot {number} did not start" in said(machine, "ash status")


def went_back(disk: Disk, boot: Boot, number: int, *, uefi: bool, starts: int, devices: Sequence[str] = ()) -> None:
    """Boot; assert that the machine falls back after so many starts of what is on trial."""
    with boot(disk, uefi=uefi, devices=devices) as machine:
        falls_back(machine, number)
        starts_next(machine, 0)
        assert said(machine, "ash fsck") == "no problems found"
        machine.poweroff()
    console = (disk.image.parent / "console.log").read_text(errors="replace")
    assert len(re.findall(r"Linux version", console)) == starts + 1


@FIRMWARE
@pytest.mark.parametrize("name", CAUSES)
def test_the_last_good_deployment_runs_again(disk: Disk, boot: Boot, name: str, uefi: bool) -> None:
    fault = CAUSES[name]
    number = on_trial(disk, fault.script, uefi=uefi)
    went_back(disk, boot, number, uefi=uefi, starts=TRIES[uefi] * fault.has_kernel, devices=fault.devices)


@FIRMWARE
@pytest.mark.parametrize("block", [None, b"", bytes(range(256)) * (BLOCK_SIZE // 256)], ids=["none", "empty", "noise"])
def test_with_damaged_notes_the_last_good_deployment_runs_until_the_next_start(
    disk: Disk, boot: Boot, block: bytes | None, uefi: bool
) -> None:
    number = on_trial(disk, "true", uefi=uefi)
    disk.write_notes(block)
    with boot(disk, uefi=uefi) as machine:
        machine.expect(r"Command line: .*ash\.fellback=", 1800)
        machine.login()
        runs_snapshot(machine, 0)
        assert "did not start" not in said(machine, "ash status"), "it was not tried"
        starts_next(machine, number)
        assert said(machine, "ash fsck") == "no problems found"
        machine.reboot()
        machine.login()
        runs_snapshot(machine, number)
        machine.poweroff()


def test_without_its_partition_a_machine_starts_the_last_good_deployment(disk: Disk, boot: Boot) -> None:
    on_trial(disk, "true")
    with disk.image.open("rb+") as image:
        image.seek(2 << 20)
        image.write(bytes(1 << 20))
    with boot(disk) as machine:
        machine.login(patient=True, hasten=False)
        runs_snapshot(machine, 0)
        assert "EFI partition" in machine.command("ash fsck", ok=1).output
        said(machine, "ash fsck --repair")
        assert "not automatic" in said(machine, "ash status")
        machine.poweroff()


def test_a_machine_with_secure_boot_goes_back_too(disk: Disk, boot: Boot) -> None:
    number = on_trial(disk, CAUSES["init exits"].script, uefi=True)
    with boot(disk, secure=True) as machine:
        falls_back(machine, number)
        assert "Secure boot enabled" in said(machine, "journalctl --boot --dmesg --no-pager | grep -i 'secure boot'")
        machine.poweroff()


@FIRMWARE
def test_a_good_deployment_is_blessed_at_its_first_start(disk: Disk, boot: Boot, uefi: bool) -> None:
    number = on_trial(disk, "true", minutes=10, uefi=uefi)
    with boot(disk, uefi=uefi) as machine:
        machine.login()
        runs_snapshot(machine, number)
        said(machine, "until systemctl is-active ash-bless; do sleep 1; done")
        assert "on trial" not in said(machine, "ash status")
        machine.poweroff()
    assert disk.notes() == {}


@FIRMWARE
@pytest.mark.parametrize("moment", ["GRUB loads", "Linux version", "systemd\\[1\\]: Detected", "login: "])
def test_a_power_cut_during_each_try(disk: Disk, boot: Boot, tmp_path: Path, moment: str, uefi: bool) -> None:
    # At the login prompt it may be known to be good already.
    script = "true" if moment != "login: " else "ln -s /dev/null /etc/systemd/system/ash-bless.service"
    number = on_trial(disk, script, uefi=uefi)
    pattern = r"highlighted entry will be executed|Booting" if moment == "GRUB loads" else moment
    for _ in range(TRIES[uefi]):
        with boot(disk, uefi=uefi) as machine:
            machine.expect(pattern, 600)
            if moment == "GRUB loads":
                time.sleep(6)
    went_back(disk, boot, number, uefi=uefi, starts=TRIES[uefi] if moment != "GRUB loads" else 0)


def test_the_night_after_an_upgrade_that_does_not_start(disk: Disk, boot: Boot, tmp_path: Path) -> None:
    for state in ("1", "2"):
        breaks = {"postinst": "ln -sf /bin/false /usr/sbin/init"} if state == "2" else {}
        Archive(tmp_path / state).add("ash-test-tool", state, files={"usr/share/tool": f"{state}\n"}, **breaks)
    with disk.files() as files:
        for state in ("1", "2"):
            shutil.copytree(tmp_path / state, files.home / f"archive-{state}")
        (files.home / "archive").symlink_to("archive-1")
    disk.clone()
    disk.shell(1, f"{use_only('file:/home/archive')}; apt-get update; apt-get -y install ash-test-tool")
    disk.ash("deploy", 1)
    with boot(disk) as machine:
        machine.login()
        runs_snapshot(machine, 1)
        said(machine, "echo boot_tries::1 > /etc/ash.conf; ln -sfn archive-2 /home/archive")
        said(machine, "systemctl start ash-upgrade.service")
        machine.reboot()
        machine.login(patient=True, hasten=False, timeout=900)
        assert said(machine, "cat /usr/share/tool") == "1"
        said(machine, "until systemctl is-active ash-bless; do sleep 1; done")
        assert "did not start" in machine.command("ash check", ok=1).output
        said(machine, "systemctl start ash-upgrade.service")
        assert "not deployed again until it changes" in said(machine, "journalctl --no-pager -u ash-upgrade")
        machine.reboot()
        machine.login()
        assert said(machine, "cat /usr/share/tool") == "1"
        machine.poweroff()
