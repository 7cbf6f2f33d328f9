# SPDX-License-Identifier: AGPL-3.0-or-later
"""The next deployment is of a sibling with another kernel, services and menu; edits of the running /etc are carried."""

import os
import re

import pytest

from installer.machine import Machine
from tests.boot.checks import runs_snapshot, said
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(300)]

# The menu asks for a password to edit an entry; anybody may start one.
PASSWORD = r"""
printf '#!/bin/sh\necho "set superusers=root"; echo "password root secret"\n' > /etc/grub.d/01_password
chmod 700 /etc/grub.d/01_password
sed -i 's/^CLASS="/&--unrestricted /' /etc/grub.d/10_linux
"""


def test_the_running_system_is_carried_to_a_sibling_with_another_kernel(disk: Disk, boot: Boot) -> None:
    disk.clone()
    (generic,) = kernels(disk, 0)
    old = [package for package in disk.ash("--json", "list", 1).json["packages"] if package.startswith("linux-image-")]
    disk.ash("install", 1, "chrony", "linux-image-cloud-amd64", "--remove", *old)
    assert kernels(disk, 0) == {generic}
    (cloud,) = kernels(disk, 1)
    assert cloud != generic
    disk.shell(1, f"echo of the snapshot >> /etc/issue\n{PASSWORD}")
    with disk.files() as files:
        os.truncate(files.root("deploy") / "etc/machine-id", 0)
    with boot(disk) as machine:
        machine.login()
        runs_kernel(machine, generic)
        ident = said(machine, "cat /etc/machine-id")
        assert re.fullmatch("[0-9a-f]{32}", ident)
        assert ident == said(machine, "systemd-id128 machine-id")
        said(machine, "test -d /run/log/journal/$(cat /etc/machine-id) -o -d /var/log/journal/$(cat /etc/machine-id)")
        edit(machine)
        report = said(machine, "ash deploy 1")
        assert "passwd" in report
        assert "issue" in report.partition("left behind")[2]
        said(machine, "echo 192.0.2.2 late >> /etc/hosts; touch /etc/late")

        machine.reboot()
        machine.login("root", "new password")
        runs_snapshot(machine, 1)
        runs_kernel(machine, cloud)
        assert said(machine, "cat /etc/machine-id") == ident
        find(machine)
        said(machine, "ash etc-update")
        assert said(machine, "ash diff") == "no difference"
        machine.poweroff()
    with disk.files() as files:
        assert "late" in (files.root(1) / "etc/hosts").read_text()
        assert "human:" in (files.root(1) / "etc/passwd").read_text()
        assert "human:" not in (files.root(0) / "etc/passwd").read_text()
        assert "password root secret" in files.grub_cfg.read_text()


def kernels(disk: Disk, snapshot: int) -> set[str]:
    """The kernel versions of a snapshot; assert that each has an initramfs, modules and a copy in boot-N."""
    with disk.files() as files:
        root = files.root(snapshot)
        found = {path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*")}
        for version in found:
            assert (root / f"boot/initrd.img-{version}").stat().st_size > 1 << 20
            assert (files.boot(snapshot) / f"vmlinuz-{version}").exists()
        # A package that is removed but not purged leaves an empty modules directory.
        assert {path.parent.name for path in (root / "usr/lib/modules").glob("*/kernel")} == found
    return found


def runs_kernel(machine: Machine, version: str) -> None:
    """Assert that a kernel runs, that only its modules are there, and that one of them can be loaded."""
    assert said(machine, "uname -r") == version
    assert said(machine, "echo /lib/modules/*/kernel") == f"/lib/modules/{version}/kernel"
    said(machine, "modprobe dummy && ip link show type dummy")


def edit(machine: Machine) -> None:
    """Change a user, a password, and files that the snapshot has or has not changed too."""
    said(machine, "useradd --create-home human && echo human:secret | chpasswd")
    said(machine, "echo 'root:new password' | chpasswd")
    said(machine, "echo 192.0.2.1 early >> /etc/hosts")
    said(machine, "echo of the running system >> /etc/issue")
    drift = said(machine, "ash diff")
    assert all(f"/etc/{name}" in drift for name in ("passwd", "shadow", "hosts", "issue"))


def find(machine: Machine) -> None:
    """Assert that all changes were carried, even those after the deploy."""
    hosts = said(machine, "cat /etc/hosts")
    assert "early" in hosts
    assert "late" in hosts
    said(machine, "test -e /etc/late")
    assert "of the snapshot" in said(machine, "cat /etc/issue")
    assert "of the running system" not in said(machine, "cat /etc/issue")
    assert "of the running system" in said(machine, "cat /var/lib/ash/conflicts/1-*/etc/issue")
    assert said(machine, "stat -c %U /home/human") == "human"
    said(machine, "getent passwd _chrony && systemctl is-active chrony")
    assert said(machine, "systemctl --failed --plain --no-legend") == ""
