# SPDX-License-Identifier: AGPL-3.0-or-later
"""Two siblings with different kernels: each boots its own, with its own modules."""

import pytest

from installer.machine import Machine
from tests.boot.checks import runs_snapshot, said
from tests.boot.conftest import Boot
from tests.support import Disk

pytestmark = [pytest.mark.boot, pytest.mark.budget(280)]


# The menu asks for a password to edit an entry; anybody may start one.
PASSWORD = r"""
printf '#!/bin/sh\necho "set superusers=root"; echo "password root secret"\n' > /etc/grub.d/01_password
chmod 700 /etc/grub.d/01_password
sed -i 's/^CLASS="/&--unrestricted /' /etc/grub.d/10_linux
"""


def test_siblings_with_different_kernels_boot_in_turn(disk: Disk, boot: Boot) -> None:
    disk.clone()
    disk.clone()
    (generic,) = kernels(disk, 1)
    old = [package for package in disk.ash("--json", "list", 2).json["packages"] if package.startswith("linux-image-")]
    disk.ash("install", 2, "linux-image-cloud-amd64", "--remove", *old)
    assert kernels(disk, 1) == {generic}
    (cloud,) = kernels(disk, 2)
    assert cloud != generic
    disk.ash("deploy", 1)
    disk.ash("run", 2, "sh", "-c", PASSWORD)
    disk.ash("deploy", 2)

    with boot(disk) as machine:
        machine.login()
        runs_snapshot(machine, 2)
        runs_kernel(machine, cloud)
        said(machine, "ash deploy 1")
        machine.reboot()
        machine.login()
        runs_snapshot(machine, 1)
        runs_kernel(machine, generic)
        assert said(machine, "systemctl --failed --plain --no-legend") == ""
        machine.poweroff()


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
