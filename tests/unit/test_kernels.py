# SPDX-License-Identifier: AGPL-3.0-or-later
"""The kernels of a root: image, modules and initramfs, as several distributions lay them out."""

import shutil
from pathlib import Path

import pytest

from ash import Kernel, kernel_faults, kernels_of, modules_of_changed_kernels, version_parts
from tests.unit.boot_layouts import make_root

pytestmark = pytest.mark.budget(5)

RESCUE = "0-rescue-5f2f9f1c3c1d4a1b9d7e8a6b5c4d3e2f"
# By listing: the kernels by name, with the paths of their modules and initramfs.
KNOWN = {
    "debian": {
        "6.1.0-13-amd64": ("usr/lib/modules/6.1.0-13-amd64", "initrd.img-6.1.0-13-amd64"),
        "6.12.117+deb13-amd64": ("usr/lib/modules/6.12.117+deb13-amd64", "initrd.img-6.12.117+deb13-amd64"),
    },
    "arch": {
        "linux": ("usr/lib/modules/6.11.5-arch1-1", "initramfs-linux.img"),
        "linux-lts": ("usr/lib/modules/6.6.58-1-lts", "initramfs-linux-lts.img"),
    },
    "fedora": {
        RESCUE: ("", f"initramfs-{RESCUE}.img"),
        "6.11.10-300.fc41.x86_64": (
            "usr/lib/modules/6.11.10-300.fc41.x86_64",
            "initramfs-6.11.10-300.fc41.x86_64.img",
        ),
        "6.11.4-301.fc41.x86_64": ("usr/lib/modules/6.11.4-301.fc41.x86_64", "initramfs-6.11.4-301.fc41.x86_64.img"),
    },
    "alpine": {
        "lts": ("lib/modules/6.6.58-0-lts", "initramfs-lts"),
        "virt": ("lib/modules/6.6.58-0-virt", "initramfs-virt"),
    },
    "opensuse": {"6.11.8-1-default": ("usr/lib/modules/6.11.8-1-default", "initrd-6.11.8-1-default")},
    "opensuse-arm64": {"6.11.8-1-default": ("usr/lib/modules/6.11.8-1-default", "initrd-6.11.8-1-default")},
}


@pytest.fixture(params=KNOWN)
def distribution(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path, distribution: str) -> Path:
    return make_root(tmp_path / "root", distribution)


def test_each_kernel_is_found_once_with_its_modules_and_initramfs(root: Path, distribution: str) -> None:
    found = {one.name: (one.modules, one.initramfs.removeprefix("boot/")) for one in kernels_of(root)}
    assert found == KNOWN[distribution]


def test_a_complete_root_has_no_faults(root: Path) -> None:
    assert kernel_faults(root) == []


def test_a_kernel_without_modules_is_a_fault(root: Path) -> None:
    for kernel in kernels_of(root):
        if kernel.modules:
            shutil.rmtree(root / kernel.modules)
    names = [one.name for one in kernels_of(root) if one.needs_modules and (root / one.images[0]).exists()]
    missing = {fault for fault in kernel_faults(root) if fault.endswith("has no modules")}
    assert {f"kernel {name} has no modules" for name in names} <= missing


def test_a_kernel_without_an_initramfs_or_with_an_empty_one_is_a_fault(root: Path) -> None:
    first, *others = kernels_of(root)
    (root / first.initramfs).write_bytes(b"")
    for other in others:
        (root / other.initramfs).unlink()
    assert set(kernel_faults(root)) == {f"kernel {one.name} has no initramfs" for one in (first, *others)}


def test_the_modules_of_a_kernel_whose_image_changed_wait_for_the_reboot(root: Path) -> None:
    for kernel in kernels_of(root):
        expected = {kernel.modules} if kernel.modules else set()
        assert modules_of_changed_kernels(set(kernel.images[:1]), root, root) == expected
    assert modules_of_changed_kernels({"usr/bin/ls", "boot/grub/grub.cfg"}, root, root) == set()


def test_an_upgrade_of_arch_keeps_back_the_modules_of_both_versions(tmp_path: Path) -> None:
    before, after = (make_root(tmp_path / name, "arch") for name in ("before", "after"))
    (after / "usr/lib/modules/6.11.5-arch1-1").rename(after / "usr/lib/modules/6.11.6-arch1-1")
    changed = {"boot/vmlinuz-linux", "boot/initramfs-linux.img", "usr/lib/modules/6.11.6-arch1-1"}
    kept_back = modules_of_changed_kernels(changed, before, after)
    assert kept_back == {"usr/lib/modules/6.11.5-arch1-1", "usr/lib/modules/6.11.6-arch1-1"}


def test_of_several_versions_of_one_flavour_the_newest_counts(tmp_path: Path) -> None:
    root = make_root(tmp_path, "alpine")
    (root / "lib/modules/6.6.9-0-lts").mkdir()
    assert {one.name: one.modules for one in kernels_of(root)}["lts"] == "lib/modules/6.6.58-0-lts"


def test_an_image_beside_its_modules_alone_is_a_kernel_too(tmp_path: Path) -> None:
    root = make_root(tmp_path, "fedora")
    version = "6.11.10-300.fc41.x86_64"
    (root / f"boot/vmlinuz-{version}").unlink()
    modules = f"usr/lib/modules/{version}"
    assert Kernel(version, [f"{modules}/vmlinuz"], modules, f"boot/initramfs-{version}.img") in kernels_of(root)


def test_a_root_without_a_kernel_says_so(tmp_path: Path) -> None:
    assert kernel_faults(tmp_path) == ["there is no kernel"]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("6.9.1", "6.11.4"),
        ("6.11.4-301.fc41", "6.11.10-300.fc41"),
        ("6.12~rc3", "6.12"),
        ("6.12-rc", "6.12.1"),
        ("a1b-0-rescue", "a1b-6.11.4"),
    ],
)
def test_versions_are_in_order(older: str, newer: str) -> None:
    assert version_parts(older) < version_parts(newer)
