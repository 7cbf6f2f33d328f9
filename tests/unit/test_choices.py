# SPDX-License-Identifier: AGPL-3.0-or-later
"""The installer's choices: swap, firmware, network, profiles; which packages and commands follow from them."""

import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from ash import MISSING, REFUSED, USAGE, AshError, Layout
from distros.debian import installer as debian
from distros.debian.installer import DebianInstaller
from installer import cli, disk, drives, first_snapshot, host, install, swap
from installer.distribution import Identity, Network, Settings, Source, fstab_line_of_home
from installer.hardware import Hardware
from installer.swap import Swap

pytestmark = pytest.mark.budget(5)

DEBIAN = DebianInstaller()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], Swap()),
        (["zram"], Swap(zram=True)),
        (["2G"], Swap(size=2 << 30)),
        (["100000000"], Swap(size=95 << 20)),
        (["zram", "16M", "/dev/sdb2", "/dev/sdb2"], Swap(zram=True, size=16 << 20, devices=(Path("/dev/sdb2"),))),
    ],
)
def test_swap_is_zram_a_size_or_partitions(words: list[str], found: Swap) -> None:
    assert Swap.of(words) == found


@pytest.mark.parametrize("words", [["1G", "2G"], ["1G", "1G"], ["big"], ["-1G"], ["sdb2"], ["15M"], ["0"]])
def test_other_swap_is_refused(words: list[str]) -> None:
    with pytest.raises(AshError) as caught:
        Swap.of(words)
    assert caught.value.status == USAGE
    assert caught.value.hint


@pytest.mark.parametrize(
    ("compression", "options"),
    [("", "noatime,compress=zstd"), ("lzo", "noatime,compress=lzo"), ("none", "noatime")],
)
def test_a_partition_for_home_is_compressed_as_chosen(compression: str, options: str) -> None:
    assert fstab_line_of_home("1234", compression) == f"UUID=1234 /home btrfs {options} 0 2\n"


def test_swap_is_in_the_fstab_of_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(swap, "filesystem_uuid", lambda _: "its-uuid")
    (tmp_path / "etc/systemd").mkdir(parents=True)
    fstab = tmp_path / "etc/fstab"
    fstab.write_text("UUID=1234-ABCD /boot/efi vfat umask=0077,nofail 0 2\n")
    layout = Layout.at(tmp_path, "debian_2")
    Swap(zram=True, size=1 << 30, devices=(Path("/dev/sdb2"),)).configure(tmp_path, layout, "the-roots")
    there = {line.split()[0]: line.split()[1:] for line in fstab.read_text().splitlines()}
    assert there["UUID=1234-ABCD"][0] == "/boot/efi"
    assert there["UUID=its-uuid"][:3] == ["none", "swap", "nofail"]
    assert there["UUID=the-roots"][:2] == ["/swap", "btrfs"]
    assert "subvol=@swap_debian_2" in there["UUID=the-roots"][2].split(",")
    assert "nofail" in there["UUID=the-roots"][2].split(","), "a boot does not depend on swap"
    assert there["/swap/swapfile"][:3] == ["none", "swap", "nofail"]
    assert "zram-size = min(ram / 2, 4096)" in (tmp_path / swap.ZRAM_CONFIGURATION).read_text()


def device(path: str, filesystem: str, uuid: str = "one") -> drives.Device:
    """A partition."""
    found = {"path": path, "type": "part", "size": 1 << 30, "fstype": filesystem, "uuid": uuid, "ro": False}
    empty = dict.fromkeys(["model", "label", "fsver", "pttype", "parttype", "partuuid"])
    return drives.Device.of({**empty, **found, "mountpoints": [None]})


@pytest.fixture
def partitions(monkeypatch: pytest.MonkeyPatch) -> list[drives.Device]:
    """The partitions of this machine: the first of them swaps, and has the name of each path."""
    there = [device("/dev/sdb2", "swap")]
    monkeypatch.setattr(drives, "devices", lambda: there)
    monkeypatch.setattr(drives, "_find", lambda _: (there[0], there[0]))
    return there


def test_a_partition_to_swap_to_is_checked(partitions: list[drives.Device]) -> None:
    path = Path("/dev/disk/by-id/swap")
    assert drives.require_swap(path, [Path("/dev/sda1")]) == partitions[0]
    with pytest.raises(AshError, match="it is wiped"):
        drives.require_swap(path, [Path("/dev/sdb2")])
    partitions.append(device("/dev/sdc2", "swap"))
    with pytest.raises(AshError, match="one is a copy"):
        drives.require_swap(path, [])
    partitions[0] = device("/dev/sdb2", "ext4")
    with pytest.raises(AshError, match="not a swap partition: it has ext4") as caught:
        drives.require_swap(path, [])
    assert caught.value.status == REFUSED


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """The sysfs and the procfs of a machine with devices, modules and a processor."""
    sys, proc = tmp_path / "sys", tmp_path / "proc"
    for number, driver in enumerate(["iwlwifi", "snd-sof-pci"]):
        (sys / f"devices/{number}").mkdir(parents=True)
        (sys / f"bus/pci/drivers/{driver}").mkdir(parents=True)
        (sys / f"devices/{number}/driver").symlink_to(f"../../bus/pci/drivers/{driver}")
        (sys / "bus/pci/devices").mkdir(exist_ok=True)
        (sys / f"bus/pci/devices/{number}").symlink_to(f"../../../devices/{number}")
    proc.mkdir()
    (proc / "modules").write_text("rtw89_8852ae 16384 0 - Live 0x0\nbtrfs 1 0 - Live 0x0\n")
    (proc / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n")
    return sys, proc


def test_the_hardware_of_a_machine_is_read_from_its_kernel(machine: tuple[Path, Path]) -> None:
    sys, _ = machine
    found = Hardware.here(*machine)
    assert found.drivers == {"iwlwifi", "snd_sof_pci", "rtw89_8852ae", "btrfs"}
    assert (found.processor, found.wireless) == ("GenuineIntel", False)
    (sys / "class/net/wlan0/phy80211").mkdir(parents=True)
    assert Hardware.here(*machine).wireless


@pytest.mark.parametrize(
    ("driver", "package"),
    [
        ("i915", "firmware-intel-graphics"),
        ("amdgpu", "firmware-amd-graphics"),
        ("nouveau", "firmware-nvidia-graphics"),
        ("iwlwifi", "firmware-iwlwifi"),
        ("r8169", "firmware-realtek"),
        ("rtw_8822ce", "firmware-realtek"),
        ("rtw89_8852ae", "firmware-realtek"),
        ("ath10k_pci", "firmware-atheros"),
        ("ath11k", "firmware-atheros"),
        ("ath9k_htc", "firmware-ath9k-htc"),
        ("brcmfmac", "firmware-brcm80211"),
        ("mt7921e", "firmware-mediatek"),
        ("mt76x2u", "firmware-mediatek"),
        ("bnx2", "firmware-bnx2"),
        ("bnx2x", "firmware-bnx2x"),
        ("snd_sof_pci_intel_tgl", "firmware-sof-signed"),
        ("e1000e", ""),
        ("ath9k", ""),
        ("virtio_net", ""),
    ],
)
def test_a_driver_brings_the_package_with_its_firmware(driver: str, package: str) -> None:
    hardware = Hardware(frozenset({driver, "btrfs"}), "AuthenticAMD")
    assert DEBIAN.firmware_for(hardware) == ["amd64-microcode", *([package] if package else [])]
    assert {*DEBIAN.firmware_for(hardware)} <= {*DEBIAN.all_firmware()}
    assert DEBIAN.firmware_for(Hardware(processor="Other")) == []


def test_a_release_that_names_firmware_otherwise_gets_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"less", "firmware-iwlwifi", "firmware-misc-nonfree"}

    def try_repository(source: Source) -> Source:
        for name in source.packages:
            if name not in there:
                raise AshError(f"Debian bookworm has no package {name}", status=MISSING)
        return source

    monkeypatch.setattr(debian, "_try_repository", try_repository)
    wanted = ("firmware-mediatek", "firmware-iwlwifi", "firmware-intel-graphics")
    source = Source(mirror="http://mirror.example", packages=("less",), firmware=wanted)
    found = debian._try_with(source, [debian.ANYTREE, *source.firmware])
    assert found.firmware == ("firmware-iwlwifi", "firmware-misc-nonfree")
    assert found.packages == ("less", *found.firmware)
    with pytest.raises(AshError, match="no package nosuch"):
        debian._try_with(replace(source, packages=("nosuch",)), source.firmware)


def tar_of(directory: Path, *names: str) -> Path:
    """A tar file of a root for the default settings, with some other files."""
    path = directory / "root.tar"
    with tarfile.open(path, "w") as tar:
        for name in (*DEBIAN.needed_files(Settings()), *names):
            tar.addfile(tarfile.TarInfo(f"./{name}"))
    return path


def checked(tar: Path, settings: Settings, *firmware: str, needs: bool = False) -> install.Installation:
    """An installation from a tar file, whose tar file was checked."""
    source = Source(rootfs=tar, firmware=firmware, needs_firmware=needs)
    new = install.Installation(source, settings, Identity.of("debian"))
    new.lacking = install._check_tar(tar, new)
    return new


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(network=Network.NETWORK_MANAGER), "has no network-manager wpasupplicant"),
        (Settings(swap=Swap(zram=True)), "has no systemd-zram-generator"),
    ],
)
def test_a_tar_file_that_lacks_packages_is_refused(tmp_path: Path, settings: Settings, message: str) -> None:
    with pytest.raises(AshError, match=message) as caught:
        checked(tar_of(tmp_path), settings)
    (named,) = re.findall("has no (.*)", message)
    assert (caught.value.status, f"--package {named} makes" in caught.value.hint) == (REFUSED, True)
    checked(tar_of(tmp_path, *DEBIAN.needed_files(settings)), settings)


def test_the_summary_names_what_a_machine_needs_and_does_not_get(tmp_path: Path) -> None:
    tar = tar_of(tmp_path, "var/lib/dpkg/info/firmware-misc-nonfree.list")
    wanted = ("intel-microcode", "firmware-mediatek")
    new = checked(tar, Settings(), *wanted)
    (loss,) = install._package_losses(new)
    assert (loss.where, loss.text.endswith("ash install intel-microcode")) == ("firmware", True)
    with pytest.raises(AshError, match="has no intel-microcode"):
        checked(tar, Settings(), *wanted, needs=True)
    new = checked(tar, Settings(), "firmware-mediatek")
    assert list(install._package_losses(new)) == [("firmware", "firmware-mediatek")]
    assert list(install._package_losses(checked(tar, Settings()))) == []


def test_a_choice_adds_its_packages_to_the_bootstrap() -> None:
    def packages(settings: Settings) -> set[str]:
        (included,) = [
            word for word in DEBIAN.bootstrap_command(Path("/root"), Source(), settings, "/tmp") if "--include" in word
        ]
        return {*included.removeprefix("--include=").split(",")}

    plain = packages(Settings())
    assert packages(Settings(swap=Swap(zram=True))) - plain == {"systemd-zram-generator"}
    wireless = packages(Settings(network=Network.NETWORK_MANAGER)) - plain
    assert wireless == {"network-manager", "wpasupplicant", "wireless-regdb"}


def test_the_profiles_are_known() -> None:
    desktops = {name for name in first_snapshot.profiles_of("debian") if first_snapshot.is_desktop("debian", name)}
    assert desktops >= {"gnome", "i3", "xfce"}
    assert first_snapshot.profiles_of("debian").keys() - desktops >= {"networkmanager", "server"}


@pytest.mark.parametrize(
    ("settings", "commands"),
    [
        (Settings(), []),
        (Settings(mutable=True), ["clone 0", "mutable 1", "deploy 1"]),
        (Settings(profiles=("server",)), ["clone 0 -d server", "install 1 --profile server", "deploy 1"]),
        (
            Settings(profiles=("i3", "server"), mutable=True),
            ["clone 0 -d i3 server", "mutable 1", "install 1 --profile i3", "install 1 --profile server", "deploy 1"],
        ),
    ],
)
def test_the_first_snapshot_is_made_by_commands_of_ash(settings: Settings, commands: list[str]) -> None:
    assert [" ".join(words) for words in first_snapshot.commands(settings)] == commands


def test_a_dry_run_shows_the_commands_of_the_choices() -> None:
    settings = Settings(swap=Swap(size=1 << 30), profiles=("server",))
    new = install.Installation(Source(rootfs=Path("/root.tar")), settings, Identity.of("debian"))
    target = disk.future_target(Path("/dev/sdz"), disk.Sizes())
    place = install.Checked(target.drive, [], lambda: target, install.NOTHING_LEFT, target)
    shown = "\n".join(install._commands(place, new))
    assert "btrfs filesystem mkswapfile --size 1073741824" in shown
    assert shown.endswith("ash clone 0 -d server\nash install 1 --profile server\nash deploy 1")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[install.Installation]:
    """What the command line would install on a disk, of a machine with Wi-Fi and a disk controller."""
    made: list[install.Installation] = []

    def install_on_disk(path: Path, new: install.Installation, _: install.Agree) -> install.Made:
        made.append(new)
        return install.Made(path, "Debian", path)

    monkeypatch.setattr(install, "install_on_disk", install_on_disk)
    monkeypatch.setattr(install, "make_rootfs", lambda path, new, **_: install_on_disk(path, new, lambda *_: None))
    monkeypatch.setattr(cli, "is_virtual", lambda: False)
    hardware = Hardware(frozenset({"iwlwifi", "ahci"}), "GenuineIntel", wireless=True)
    monkeypatch.setattr(Hardware, "here", lambda: hardware)
    return made


@pytest.mark.parametrize(
    ("words", "firmware", "network"),
    [
        ("--disk /dev/sdz", ("intel-microcode", "firmware-iwlwifi"), "networkmanager"),
        ("--disk /dev/sdz --firmware none --network dhcp", (), "dhcp"),
        ("--disk /dev/sdz --firmware all", tuple(DEBIAN.all_firmware()), "networkmanager"),
        ("--make-rootfs FILE", (), "dhcp"),
        ("--make-rootfs FILE --firmware all --network networkmanager", tuple(DEBIAN.all_firmware()), "networkmanager"),
        ("--make-rootfs FILE --profile server i3", (), "networkmanager"),
        ("--make-rootfs FILE --profile server", (), "dhcp"),
    ],
)
def test_firmware_and_network_follow_from_the_machine(
    chosen: list[install.Installation], tmp_path: Path, words: str, firmware: tuple[str, ...], network: str
) -> None:
    (tmp_path / "root.tar").touch()
    argv = [str(tmp_path / "root.tar") if word == "FILE" else word for word in words.split()]
    assert cli.main(argv) == 0
    (new,) = chosen
    assert (new.source.firmware, new.settings.network.value) == (firmware, network)


def test_a_virtual_machine_needs_no_firmware(
    chosen: list[install.Installation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "is_virtual", lambda: True)
    assert cli.main(["--disk", "/dev/sdz"]) == 0
    assert chosen[0].source.firmware == ()


def test_a_swap_file_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "require_root", lambda _: None)
    new = install.Installation(Source(), Settings(swap=Swap(size=6 << 30)), Identity.of("debian"))
    with pytest.raises(AshError, match=r"8.0 GiB are too small") as caught:
        install.make_image(tmp_path / "disk.img", disk.parse_size("8G"), new)
    assert caught.value.hint == "at least 9.0 GiB"
    assert not [*tmp_path.iterdir()]


def test_a_problem_with_the_first_snapshot_is_the_exit_status_and_the_last_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.img"
    path.touch()
    problem = AshError("no such package", status=MISSING)
    problem.add_note("the system is complete")
    monkeypatch.setattr(install, "make_image", lambda *_, **__: install.Made(path, "Debian", path, problem))
    assert cli.main(["--image", str(path), "--save-answers", str(tmp_path / "saved")]) == MISSING
    said = capsys.readouterr()
    assert said.err == "init.py: no such package; the system is complete\n"
    assert "boot" in said.out
    assert (tmp_path / "saved").is_file()
