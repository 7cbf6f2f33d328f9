# SPDX-License-Identifier: AGPL-3.0-or-later
"""The installer's choices: an image with many of them at once, and ash on it; a system beside it whose profile fails."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash import NOCOW, Layout, create_subvolume, flags_of
from installer import neighbours
from tests.archive import Archive
from tests.support import MISSING, REFUSED, USAGE, Disk, init, program

pytestmark = [pytest.mark.system, pytest.mark.budget(60)]

SECOND = "debian_2"
UNIT = "[Service]\nExecStart=true\n[Install]\nWantedBy=multi-user.target\n"
UNITS = "usr/lib/systemd/system"
WANTED = "etc/systemd/system/multi-user.target.wants"
OF_PROFILE = {
    "openssh-server": {f"{UNITS}/ssh.service": UNIT},
    "nftables": {f"{UNITS}/nftables.service": UNIT},
    "fail2ban": {f"{UNITS}/fail2ban.service": UNIT, "etc/fail2ban/jail.d/default.conf": "\n"},
    "python3-systemd": {},
    "rsync": {},
    "curl": {},
}  # of the profile "server"
MIB = 1 << 20
CHOICES = "--size 4G --swap zram 64M --compress lzo --discard --network networkmanager --profile server --mutable"


@pytest.fixture(scope="module")
def root_with_archive(rootfs: Path, archive: Archive, url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar file of a root whose only repository is on this machine, with files that stand for further packages."""
    directory = tmp_path_factory.mktemp("root")
    tar, more = directory / "root.tar", directory / "more"
    for name, files in OF_PROFILE.items():
        archive.add(name, "9:9", files=files)  # libc6 breaks older ones of some
    texts = {
        "etc/apt/sources.list": f"deb [trusted=yes] {url} ./\n",
        "etc/apt/sources.list.d/debian.sources": "",
        "usr/lib/systemd/system-generators/zram-generator": "",
        "usr/sbin/NetworkManager": "",
        "usr/sbin/wpa_supplicant": "",
        f"{UNITS}/NetworkManager.service": UNIT,
    }
    for name, text in texts.items():
        (more / name).parent.mkdir(parents=True, exist_ok=True)
        (more / name).write_text(text)
    program("cp", "--sparse=always", "--reflink=auto", rootfs, tar)
    program(
        "tar", "--append", "--owner=0", "--group=0", "--file", tar, "--directory", more, *[f"./{one}" for one in texts]
    )
    return tar


@pytest.fixture(scope="module")
def chosen(root_with_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """An image that was made with many choices."""
    image = tmp_path_factory.mktemp("chosen") / "disk.img"
    init("--image", image, "--rootfs", root_with_archive, *CHOICES.split())
    disk = Disk(image)
    yield disk
    left = disk.attached()
    image.unlink()
    assert not left, f"still attached: {left}"


def is_sound(disk: Disk, ident: str = "debian") -> None:
    assert disk.ash("--distro", ident, "fsck").stdout.strip() == "no problems found"


def test_the_first_snapshot_has_the_profile_and_is_mutable(chosen: Disk) -> None:
    is_sound(chosen)
    rows = {row["snapshot"]: row for row in chosen.ash("--json", "tree").json["tree"]}
    assert rows.keys() == {0, 1}
    assert (rows[1]["deployed"], rows[1]["mutable"], rows[1]["description"]) == (True, True, "server")
    assert (rows[0]["deployed"], rows[0]["mutable"]) == (False, False)
    assert OF_PROFILE.keys() <= chosen.ash("--json", "list", 1).json["packages"].keys()
    assert not OF_PROFILE.keys() & chosen.ash("--json", "list", 0).json["packages"].keys()
    history = [entry["arguments"] for entry in chosen.ash("--json", "log").json["history"]]
    assert history == [["clone", "0", "-d", "server"], ["mutable", "1"], ["install", "1", "--profile", "server"]]
    with chosen.files() as files:
        deployed = files.root(files.default_slot())
        assert (deployed / WANTED / "ssh.service").is_symlink()
        assert not (files.root(0) / WANTED / "ssh.service").is_symlink()


def test_the_swap_file_is_in_a_subvolume_of_its_own(chosen: Disk) -> None:
    with chosen.files() as files:
        file = files.top / "@swap_debian/swapfile"
        status = file.stat()
        assert (status.st_size, status.st_mode & 0o777, status.st_blocks * 512) == (64 * MIB, 0o600, 64 * MIB)
        assert flags_of(file) & NOCOW
        assert program("blkid", "--probe", "--match-tag", "TYPE", "--output", "value", file).strip() == "swap"
        for which in (0, 1, files.default_slot()):
            fstab = (files.root(which) / "etc/fstab").read_text()
            assert fstab.count(" /swap btrfs subvol=@swap_debian,") == fstab.count("\n/swap/swapfile none swap ") == 1
        assert not [*(files.root(files.default_slot()) / "swap").iterdir()]
        assert "zram-size" in (files.root(0) / "etc/systemd/zram-generator.conf").read_text()
    assert "@swap_debian" in chosen.ash("sub").stdout


def test_network_manager_and_trim_are_enabled(chosen: Disk) -> None:
    with chosen.files() as files:
        etc = files.root(0) / "etc"
        assert (etc / "systemd/system/multi-user.target.wants/NetworkManager.service").is_symlink()
        assert (etc / "systemd/system/timers.target.wants/fstrim.timer").is_symlink()
        assert not [*etc.glob("systemd/system/**/systemd-networkd.service")]
        assert not [*(etc / "systemd/network").iterdir()]


def is_compressed(file: Path) -> bool:
    """Whether btrfs has compressed a file, or a part of it."""
    return "encoded" in program("filefrag", "-v", file)


def test_files_are_compressed_and_so_are_those_of_later_snapshots(chosen: Disk) -> None:
    number = chosen.clone(1)
    script = "yes | head -c 1000000 | tee /usr/local/text > /var/local/text"
    chosen.shell(number, script)
    with chosen.files() as files:
        root = files.root(number)
        for path in (root, root / "usr/bin/bash", root / "usr/local/text", files.top / "@var_debian/local/text"):
            assert program("btrfs", "property", "get", path, "compression").strip() == "compression=lzo"
            assert path == root or is_compressed(path)
        assert program("btrfs", "property", "get", files.top / "@swap_debian", "compression") == ""
        assert is_compressed(files.root(0) / "usr/share/common-licenses/GPL-3")
    assert not chosen.ash("--json", "run", number, "true").json["changed"]
    is_sound(chosen)


def test_grub_reads_compressed_files(chosen: Disk, tmp_path: Path) -> None:
    with chosen.files() as files:
        slot = files.default_slot()
        program("cp", files.root(slot) / "usr/bin/bash", tmp_path / "bash")
        boot = [path for path in (files.root(slot) / "boot").iterdir() if path.name.startswith(("vmlinuz", "initrd"))]
        program("cp", *boot, tmp_path)
    for name in ["usr/bin/bash", *(f"boot/{path.name}" for path in boot)]:
        inside = f"(loop0,gpt3)/@.snapshots_debian/rootfs/snapshot-{slot}/{name}"
        program("grub-fstest", chosen.image, "cmp", inside, tmp_path / Path(name).name)


def test_what_cannot_be_is_refused_before_anything_is_written(chosen: Disk, rootfs: Path, tmp_path: Path) -> None:
    before = chosen.image.stat().st_mtime_ns
    adding: list[str | Path] = ["--image", chosen.image, "--mode", "3", "--id", SECOND, "--rootfs", rootfs]
    assert "are needed" in init(*adding, "--swap", "3G", status=REFUSED).stderr
    assert "profiles: gnome, i3" in init(*adding, "--profile", "gnom", status=USAGE).stderr
    assert "has no network-manager wpasupplicant" in init(*adding, "--profile", "i3", status=REFUSED).stderr
    assert "has no systemd-zram-generator" in init(*adding, "--swap", "zram", status=REFUSED).stderr
    assert "intel-microcode" in init(*adding, "--firmware", "all", status=REFUSED).stderr
    new = tmp_path / "new.img"
    init("--image", new, "--rootfs", rootfs, "--swap", "6G", status=USAGE)
    assert chosen.image.stat().st_mtime_ns == before
    assert not [*tmp_path.iterdir()]


def test_a_profile_that_fails_leaves_a_system_that_boots_the_base(chosen: Disk, root_with_archive: Path) -> None:
    adding: list[str | Path] = ["--image", chosen.image, "--mode", "3", "--id", SECOND, "--rootfs", root_with_archive]
    said = init(*adding, "--swap", "16M", "--profile", "xfce", "--network", "dhcp", status=MISSING)
    assert f"added as {SECOND}" in said.stdout
    last = said.stderr.splitlines()[-1]
    assert "the system is complete, and starts snapshot 0" in last
    assert last.endswith("run there: ash install 1 --profile xfce; ash deploy 1")
    for ident in ("debian", SECOND):
        is_sound(chosen, ident)
    rows = {row["snapshot"]: row for row in chosen.ash("--distro", SECOND, "--json", "tree").json["tree"]}
    assert rows[0]["deployed"]
    init("remove", SECOND, chosen.image, "--yes")
    with chosen.files() as files:
        assert not [*files.top.glob(f"*_{SECOND}")]
    is_sound(chosen)


def test_an_installation_that_fails_deletes_the_swap_file_too(disk: Disk) -> None:
    with disk.files() as files:
        layout = Layout.at(files.top, SECOND)
        with contextlib.suppress(ZeroDivisionError), neighbours.new_subvolumes(layout):
            create_subvolume(layout.volume(Layout.SWAP))
            raise ZeroDivisionError
        assert not [*files.top.glob(f"*_{SECOND}")]
        create_subvolume(layout.snapshots)  # of one that was killed
        create_subvolume(layout.volume(Layout.SWAP))
        with neighbours.new_subvolumes(layout):
            assert not layout.volume(Layout.SWAP).exists()
        neighbours.delete(layout)
        assert not (files.top / "@swap_debian").exists(), "the first system has none"
