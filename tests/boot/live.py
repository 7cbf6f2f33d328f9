# SPDX-License-Identifier: AGPL-3.0-or-later
"""A machine that runs a live system with the installer, and what it installs onto other disks."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ash import Chroot, remove_tree
from installer.machine import Machine
from tests.boot.checks import said
from tests.support import CHECKOUT, Disk, program

INSTALLER = ("ash.py", "init.py", "distros", "installer", "profiles")
TOOLS = ("fdisk", "mtools", "efibootmgr", "cryptsetup-bin", "lvm2", "mdadm", "parted")
INIT = "python3 /home/checkout/init.py"
ROOT = "/home/root.tar"
SIZE = 4 << 30  # of an empty disk


# Runs the installer several times, each time in a process of its own but with the program read once, and prints what each
# one said: emulated machines are slow at that.
SEVERAL = """\
import json, os, shlex, sys
sys.path.insert(0, "/home/checkout")
from installer.cli import main
said = []
for line in json.load(open("/home/several.json")):
    if not (pid := os.fork()):
        os.dup2(os.open("/run/one", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        status = main(shlex.split(line))
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said.append([status, open("/run/one").read()])
print(json.dumps(said))
"""


def make_live(disk: Disk, rootfs: Path, several: Sequence[str] = ()) -> None:
    """Make a disk the live system, with the installer and a root in /home, and the tools that it would install.

    Args:
        disk: a copy of the image.
        rootfs: the root.
        several: the command lines that run_several() runs.
    """
    number = disk.clone()
    disk.ash("install", number, *TOOLS, seconds=600)
    disk.ash("deploy", number)
    with disk.files() as files:
        for name in INSTALLER:
            copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copyfile
            (files.home / "checkout").mkdir(exist_ok=True)
            copy(CHECKOUT / name, files.home / "checkout" / name)
        shutil.copyfile(rootfs, files.home / Path(ROOT).name)
        (files.home / "several.py").write_text(SEVERAL)
        (files.home / "several.json").write_text(json.dumps(several))


def run_several(machine: Machine) -> list[tuple[int, str]]:
    """Run the installer with the command lines of make_live(). Returns the exit status and output of each."""
    found = json.loads(said(machine, "python3 /home/several.py"))
    return [(status, output) for status, output in found]


# Of a root, what no emulated machine needs: an installer unpacks the rest in half the time.
DRIVERS = ("gpu", "iio", "infiniband", "media", "net/ethernet", "net/wireless", "staging")
SPARE = (
    *(f"usr/share/{name}" for name in ("doc", "locale", "man")),
    *(f"usr/lib/modules/*/kernel/{name}" for name in ("sound", *(f"drivers/{name}" for name in DRIVERS))),
    "var/lib/apt/lists/*_dists_*",
)


def small_root(rootfs: Path, made: Path, *packages: str) -> None:
    """Make a tar file of a root without what an emulated machine does not need, but with these packages."""
    with tempfile.TemporaryDirectory(prefix="ash-root-", dir=made.parent) as name:
        program("tar", "--extract", "--numeric-owner", "-p", "--directory", name, "--file", rootfs)
        chroot, root = Chroot(Path(name), {"DEBIAN_FRONTEND": "noninteractive", "INITRD": "No"}), Path(name)
        if packages:
            for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
                assert chroot.run(["apt-get", "--quiet", *words]) == 0
        for spare in (path for pattern in SPARE for path in root.glob(pattern)):
            remove_tree(spare)
        for names in (root / "var/lib/dpkg/info").glob("*.list"):  # else ash misses those files
            there = [name for name in names.read_text().splitlines() if os.path.lexists(f"{root}/{name}")]
            names.write_text("".join(f"{name}\n" for name in there))
        for kernel in (root / "usr/lib/modules").iterdir():
            assert chroot.run(["depmod", kernel.name]) == 0
        (root / "etc/initramfs-tools/conf.d/quick").write_text("COMPRESSLEVEL=1\n")
        program("tar", "--create", "--numeric-owner", "--directory", name, "--file", made, ".")


def empty_disk(directory: Path, name: str, size: int = SIZE) -> Disk:
    """A disk of zeros."""
    image = directory / f"{name}.img"
    with image.open("wb") as file:
        os.truncate(file.fileno(), size)
    return Disk(image)


def attached(*disks: Disk) -> list[str]:
    """The options of QEMU for more disks, from /dev/vdb on."""
    drives = [f"file={disk.image},format=raw,if=virtio,cache=unsafe" for disk in disks]
    return [word for drive in drives for word in ("-drive", drive)]


def content(disk: Disk) -> str:
    """A hash of a sparse disk: of what is there, and where."""
    digest, place = hashlib.sha256(), 0
    with disk.image.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while place < size:
            try:
                begin = os.lseek(file.fileno(), place, os.SEEK_DATA)
            except OSError:
                break
            place = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            file.seek(begin)
            data = file.read(place - begin)
            if data.strip(b"\0"):
                digest.update(f"{begin} ".encode() + data)
    return digest.hexdigest()


def installs(machine: Machine, options: str) -> str:
    """Run the installer with a ready root; returns what it says."""
    return machine.command(f"{INIT} {options} --rootfs {ROOT}", timeout=1800).output


def is_well(machine: Machine, ident: str) -> None:
    """Assert that a system runs, and that nothing is wrong with it."""
    assert said(machine, "cat /.snapshots/ash/distro") == f"{ident} debian"
    assert said(machine, "systemctl is-system-running --wait || true") == "running"
    assert said(machine, "ash fsck") == "no problems found"


def unlock(machine: Machine, *passphrases: str) -> None:
    """Answer GRUB's questions for the passphrase of a disk."""
    for passphrase in passphrases:
        machine.expect("Enter passphrase", 300)
        machine.send(f"{passphrase}\n")
