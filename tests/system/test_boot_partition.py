# SPDX-License-Identifier: AGPL-3.0-or-later
"""A partition for /boot: GRUB's files are there, and a copy of each deployment's kernel. campaigns/test_installer boots."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from installer.disk import loop_device
from tests.support import CHECKOUT, FAILED, REFUSED, USAGE, Disk, init, program
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(120)]

SECOND = "debian_2"


@pytest.fixture(scope="module")
def image(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a partition for /boot."""
    made = tmp_path_factory.mktemp("image") / "disk.img"
    init("--image", made, "--rootfs", rootfs, "--boot-size", "512M")
    return made


class Boot:
    """What is on the partition for /boot, which is mounted."""

    def __init__(self, top: Path) -> None:
        self.kernels = top / "kernels"
        self.grub_cfg = (top / "grub/grub.cfg").read_text()

    @property
    def loaded(self) -> set[str]:
        """What GRUB loads, from the directory of the copies."""
        words = re.findall(r"^    (?:linux|initrd) (\S+)", self.grub_cfg, re.MULTILINE)
        assert all(Path(word).parent == Path("/@boot_debian/kernels") for word in words), words
        return {Path(word).name for word in words}

    @property
    def there(self) -> set[str]:
        return {path.name for path in self.kernels.iterdir()}


@contextlib.contextmanager
def boot_partition(disk: Disk) -> Iterator[Boot]:
    """Mount the fourth partition."""
    table = json.loads(program("sfdisk", "--json", disk.image))["partitiontable"]["partitions"]
    start, size = (table[3][key] * 512 for key in ("start", "size"))
    place = disk.image.with_name("boot")
    place.mkdir(exist_ok=True)
    with loop_device(disk.image, start, size) as node:
        program("mount", "-o", "subvol=@boot_debian", node, place)
        try:
            yield Boot(place)
        finally:
            program("umount", place)


def is_sound(system: System) -> None:
    """Each kernel that GRUB loads is there, as the deployment has it, and nothing else; ash finds no problem."""
    menu = json.loads((system.files.state / "menu").read_text())["deployments"]
    with boot_partition(system) as boot:
        assert boot.there == boot.loaded
        assert {name.split("-")[0] for name in boot.there} == {one["id"] for one in menu.values()}
        for name in boot.there:
            ident, _, file = name.split("-", 2)
            slot = next(slot for slot, one in menu.items() if one["id"] == ident)
            assert (boot.kernels / name).read_bytes() == (system.root(slot) / "boot" / file).read_bytes()
    system.is_sound()


def test_each_deployment_has_its_kernel_on_the_partition(system: System) -> None:
    is_sound(system)
    for _ in range(3):
        system.ash("deploy", system.clone())
        is_sound(system)
    system.ash("deploy", system.clone(), "--secondary")
    is_sound(system)


def test_a_deploy_that_is_killed_leaves_what_boots(system: System, snapshot: int) -> None:
    for step in ("copy vmlinuz", "copy initrd", "rename new-deploy", "exchange", "write grub.cfg", "remove"):
        killed = system.with_hooks({"kill": step}, "deploy", system.clone(snapshot))
        with boot_partition(system) as boot:
            assert boot.loaded <= boot.there, (step, killed)
        system.ash("recover")
        system.ash("deploy", snapshot)
        is_sound(system)


def test_a_new_initramfs_is_copied_under_another_name(machine: Machine) -> None:
    """The one that the menu names until then stays until the new menu is in place."""
    system, other = machine.system, machine.system.clone()
    tool = "#!/bin/sh\nexec > /boot/initrd.img-$3\ncat /etc/modprobe.d/* /proc/sys/kernel/random/uuid\n"
    system.shell(other, f"cat > /usr/sbin/update-initramfs <<'END'\n{tool}END")
    machine.running("deploy", other)
    with boot_partition(system) as boot:
        before = boot.loaded
    (machine.etc / "modprobe.d/new.conf").write_text("# new\n")
    killed = system.with_hooks({"kill": "write grub.cfg", "booted": machine.slot}, "carry")
    assert killed.returncode < 0
    with boot_partition(system) as boot:
        assert boot.loaded == before <= boot.there
    system.ash("recover")
    with boot_partition(system) as boot:
        assert boot.loaded != before
    is_sound(system)


def test_without_room_nothing_is_deployed(system: System, snapshot: int) -> None:
    with boot_partition(system) as boot:
        filler = boot.kernels.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\1" * (1 << 20))
    with system.nothing_changes():
        error = system.ash("deploy", snapshot, status=REFUSED).error
    assert "the partition for /boot has no room for the kernel" in error
    with boot_partition(system) as boot:
        assert boot.loaded <= boot.there
        filler.unlink()
    system.ash("deploy", snapshot)
    is_sound(system)


def test_without_the_partition_nothing_is_changed_but_shown(system: System, snapshot: int) -> None:
    part = system.files.state / "bootpart"
    uuid = part.read_text()
    part.write_text("00000000-1111-2222-3333-444444444444\n")
    try:
        with system.nothing_changes():
            assert "for /boot, is missing (attach its disk)" in system.ash("deploy", snapshot, status=REFUSED).error
            system.ash("tree")
    finally:
        part.write_text(uuid)


def test_damaged_copies_are_found_and_made_again(system: System) -> None:
    with boot_partition(system) as boot:
        kernel, initrd, *_ = sorted(boot.loaded, key=lambda name: "initrd" in name)
        (boot.kernels / kernel).unlink()
        (boot.kernels / initrd).write_text("x")
    assert "lacks a copy" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    is_sound(system)


@pytest.fixture(scope="module")
def pair(image: Path, rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """A copy of the image with a second system, which has no partition for /boot."""
    copy = tmp_path_factory.mktemp("pair") / "disk.img"
    program("cp", "--sparse=always", "--reflink=auto", image, copy)
    init("--image", copy, "--mode", "3", "--id", SECOND, "--rootfs", rootfs)
    return Disk(copy)


def test_rescue_works_on_the_partition(pair: Disk) -> None:
    assert "0*- base snapshot" in init("rescue", pair.image).stdout
    with boot_partition(pair) as boot:
        (boot.kernels.parent / "grub/i386-pc/normal.mod").unlink()
    init("rescue", pair.image, "--boot-loader", "debian")
    with boot_partition(pair) as boot:
        assert (boot.kernels.parent / "grub/i386-pc/normal.mod").exists()
    assert pair.ash("--distro", "debian", "fsck").stdout == "no problems found\n"


def test_each_menu_leads_to_the_other_system(pair: Disk) -> None:
    """The file system of the root has a menu that opens the one on the partition."""
    with pair.files() as files:
        assert "/@boot*/grub*/grub.cfg" in (files.top / f"@boot_{SECOND}/grub/grub.cfg").read_text()
        start = (files.top / "@boot_debian/grub/grub.cfg").read_text()
    with boot_partition(pair) as boot:
        assert "menuentry" in boot.grub_cfg
    assert "configfile $prefix/grub.cfg" in start
    assert "search.fs_uuid" in start


def test_a_system_is_removed_with_its_files_on_the_partition(pair: Disk) -> None:
    init("remove", "debian", pair.image, "--yes")
    place = pair.image.with_name("boot")
    with pytest.raises(FileNotFoundError, match=r"grub\.cfg"), boot_partition(pair):
        pass
    assert pair.ash("fsck").stdout == "no problems found\n"
    with pair.files() as files:
        assert not (files.top / "@boot_debian").exists()
    assert not [*place.iterdir()]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--image", "x.img", "--boot-size", "100M"], "100M is too small for /boot"),
        (["--image", "x.img", "--boot-size", "512M", "--size", "3G"], "are too small"),
        (["/dev/vda1", "/dev/vda", "--boot-size", "512M"], "--boot-size is for --disk and --image"),
        (["--disk", "/dev/vda", "--boot-size", "1G", "--luks-passphrase-file", "/etc/hostname"], "not be encrypted"),
    ],
)
def test_wrong_sizes(rootfs: Path, words: list[str], error: str) -> None:
    ended = subprocess.run(
        [sys.executable, CHECKOUT / "init.py", *words, "--rootfs", rootfs],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, error in ended.stderr) == (USAGE, True), ended
