# SPDX-License-Identifier: AGPL-3.0-or-later
"""fstab, the parser of grub-mkconfig's output, and the boot menu."""

import errno
import io
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ash
from ash import (
    GRUB_FEATURE,
    OWN_MOUNT_POINTS,
    AshError,
    BootConfig,
    Countdown,
    Deployment,
    EnvironmentBlock,
    GrubNotes,
    Layout,
    Menu,
    boot_code,
    fstab_entries,
    fstab_of_user,
    is_directory,
    make_mount_points,
    merge_fstab,
    mount_mutable_directories,
    render_fstab,
    shared_directories,
)

pytestmark = pytest.mark.budget(10)

UUID = "3eefd2c3-9db2-4392-ba3e-719c1dda63a2"
LAYOUT = Layout(Path("/.snapshots"), "debian")
# Recorded output of grub-mkconfig in a snapshot with two kernels and a custom entry.
MKCONFIG = (Path(__file__).parent / "data/grub-mkconfig.txt").read_text()


# fstab


def entries(text: str) -> dict[str, list[str]]:
    """The lines of an fstab by mount point, each of which may occur once."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len({line[1] for line in lines}) == len(lines)
    return {line[1]: line for line in lines}


def test_fstab_mounts_ashs_volumes_by_uuid() -> None:
    found = entries(render_fstab(LAYOUT, UUID, "deploy-aux", ""))
    assert list(found) == ["/", "/.snapshots", "/etc", "/var", "/home", "/root", "/tmp", "/media", "/mnt", "/srv"]
    assert all(len(line) == 6 for line in found.values())
    assert {found[point][0] for point in ("/", "/.snapshots", "/var", "/home")} == {f"UUID={UUID}"}


def test_fstab_mounts_the_slots_root_read_only_and_its_etc_over_it() -> None:
    found = entries(render_fstab(LAYOUT, UUID, "deploy-aux", ""))
    options = found["/"][3].split(",")
    assert "subvol=@.snapshots_debian/rootfs/snapshot-deploy-aux" in options
    assert "ro" in options
    assert found["/etc"][0] == "/.snapshots/rootfs/snapshot-deploy-aux/etc"
    assert "bind" in found["/etc"][3].split(",")


def test_mnt_and_srv_are_directories_of_the_shared_var(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fstab").write_text(render_fstab(LAYOUT, UUID, 3, ""))
    assert shared_directories(tmp_path) == ["mnt", "srv"]
    (tmp_path / "etc/fstab").write_text(render_fstab(LAYOUT, UUID, 3, "LABEL=data /srv ext4 defaults 0 2\n"))
    assert shared_directories(tmp_path) == ["mnt"]
    older = "".join(f"{line}\n" for line in render_fstab(LAYOUT, UUID, 3, "").splitlines() if "/var/" not in line)
    assert "/var/srv" not in render_fstab(LAYOUT, UUID, 3, older), "what is not there in an older system stays so"


def test_setuid_programs_in_snapshots_do_not_run() -> None:
    assert {"nosuid", "nodev"} <= set(entries(render_fstab(LAYOUT, UUID, 0, ""))["/.snapshots"][3].split(","))


def test_no_mount_on_the_roots_own_disk_has_a_timeout() -> None:
    found = entries(render_fstab(LAYOUT, UUID, 0, ""))
    for point in ("/", "/.snapshots", "/var", "/home"):
        assert "x-systemd.device-timeout=0" in found[point][3].split(","), point


def test_the_users_lines_of_fstab_keep_their_order() -> None:
    theirs = ["# a comment", "UUID=0DBA-1B0F /boot/efi vfat umask=0077 0 2", "", "LABEL=data /srv ext4 defaults 0 2"]
    old = "\n".join(["UUID=old / ext4 defaults 0 1", *theirs, "tmpfs /tmp tmpfs size=1g 0 0"])
    lines = render_fstab(LAYOUT, UUID, 3, old).splitlines()
    assert lines[-5:] == [*theirs, "tmpfs /tmp tmpfs size=1g 0 0"]


def test_lines_of_fstab_that_ash_wrote_once_are_the_users() -> None:
    text = render_fstab(LAYOUT, UUID, 3, "")
    others = [line for line in text.splitlines() if line.split()[1] not in ("/home", "/tmp", "/root")]
    mine = ["LABEL=homes /home ext4 defaults 0 2", "tmpfs /tmp tmpfs noexec,size=2G 0 0"]
    found = entries(render_fstab(LAYOUT, UUID, "deploy", "\n".join([*others, *mine, ""])))
    assert [" ".join(found[point]) for point in ("/home", "/tmp")] == mine
    assert "/root" not in found, "a deleted line stays deleted"
    assert "snapshot-deploy," in found["/"][3]


def test_lines_on_the_roots_file_system_follow_its_uuid() -> None:
    old = (
        render_fstab(LAYOUT, "0b1c2d3e", 3, "")
        + "UUID=0b1c2d3e /exports btrfs subvol=@exports 0 0\nUUID=77 /data ext4 x 0 0\n"
    )
    found = entries(render_fstab(LAYOUT, UUID, 3, old))
    assert {point: line[0] for point, line in found.items() if line[0].startswith("UUID=")} == {
        **dict.fromkeys(("/", "/.snapshots", "/var", "/home", "/exports"), f"UUID={UUID}"),
        "/data": "UUID=77",
    }


def test_only_ashs_own_lines_are_replaced() -> None:
    assert fstab_of_user(render_fstab(LAYOUT, UUID, 3, "x /boot ext4 y 0 0\n")) == [
        line for line in render_fstab(LAYOUT, UUID, 3, "").splitlines() if line.split()[1] not in OWN_MOUNT_POINTS
    ]


HOME, DATA, SWAP = "disk /home ext4 x 0 0", "disk /data ext4 x 0 0", "swap none swap sw 0 0"


@pytest.mark.parametrize(
    ("base", "running", "own", "merged", "clashes"),
    [
        ([HOME], [HOME], [HOME, DATA], [HOME, DATA], []),
        ([HOME], [HOME, DATA], [HOME], [HOME, DATA], []),
        ([HOME], [DATA, HOME], [HOME, SWAP], [HOME, SWAP, DATA], []),
        ([HOME], [HOME, "# mine", DATA], [HOME, SWAP], [HOME, "# mine", DATA, SWAP], []),
        ([HOME], [f"other{HOME[4:]}"], [HOME, DATA], [f"other{HOME[4:]}", DATA], []),
        ([HOME], [f"other{HOME[4:]}"], [f"own{HOME[4:]}"], [f"other{HOME[4:]}"], [f"own{HOME[4:]}"]),
        ([HOME, DATA], [HOME], [HOME, DATA], [HOME], []),
        ([HOME, DATA], [HOME], [HOME, f"own{DATA[4:]}"], [HOME, f"own{DATA[4:]}"], [f"own{DATA[4:]}"]),
        ([SWAP], [f"b{SWAP}", SWAP], [SWAP], [SWAP, f"b{SWAP}"], []),
        (["", HOME, ""], ["", HOME, "", "", DATA], ["", HOME, ""], ["", HOME, "", "", DATA], []),
    ],
)
def test_the_running_fstabs_lines_win(
    base: list[str], running: list[str], own: list[str], merged: list[str], clashes: list[str]
) -> None:
    assert merge_fstab(base, running, own) == (merged, clashes)


LINES = st.lists(st.sampled_from([HOME, f"other{HOME[4:]}", DATA, f"other{DATA[4:]}", SWAP, "# a", ""]), max_size=6)


@given(LINES, LINES, LINES)
def test_no_line_of_fstab_is_lost_silently(base: list[str], running: list[str], own: list[str]) -> None:
    merged, clashes = merge_fstab(base, running, own)
    known, there = fstab_entries(base), fstab_entries(own)
    for entry, line in fstab_entries(running).items():
        assert line in merged or known.get(entry) == line, "a line that was changed in the running system"
    for entry, line in there.items():
        if known.get(entry) != line:
            assert line in merged or line in clashes, "a line that was changed in the target"
    assert merge_fstab(base, base, own) == (own, [])
    assert sorted(merge_fstab(base, running, base)[0]) == sorted(running)


def test_a_power_cut_leaves_a_whole_fstab_when_mutable_directories_are_added(tmp_path: Path) -> None:
    """At shutdown this is the fstab of the next boot."""
    root, layout = tmp_path / "root", Layout(tmp_path, "debian")
    (root / "etc").mkdir(parents=True)
    (root / "etc/ash.conf").write_text("mutable_dirs::opt/games\n")
    (root / "etc/fstab").write_text("tmpfs /tmp tmpfs defaults 0 0\n")
    with (root / "etc/fstab").open() as old:
        mount_mutable_directories(layout, root, 3)
        assert old.read() == "tmpfs /tmp tmpfs defaults 0 0\n", "it is replaced, not edited"
    assert "/opt/games none bind" in (root / "etc/fstab").read_text()


def test_a_mutable_directory_is_mounted_in_place_of_a_shared_one(tmp_path: Path) -> None:
    root, layout = tmp_path / "root", Layout(tmp_path, "debian")
    (root / "etc").mkdir(parents=True)
    (root / "etc/ash.conf").write_text("mutable_dirs_shared::srv\n")
    (root / "etc/fstab").write_text(render_fstab(LAYOUT, UUID, 3, ""))
    mount_mutable_directories(layout, root, 3)
    found = entries((root / "etc/fstab").read_text())
    assert (found["/srv"][0], found["/mnt"][0]) == ("/.snapshots/mutable_dirs/srv", "/var/mnt")


def test_mount_points_of_the_users_lines_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "out").symlink_to("/usr")
    points = ["/data", r"/with\040blank/deep", "/file", "/file/below", "/out/in", "/home/x", "/../../up", "none", "/"]
    (tmp_path / "etc/fstab").write_text("".join(f"disk {point} ext4 x 0 0\n" for point in points))
    make_mount_points(tmp_path)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if is_directory(path)}
    assert made == {"data", "etc", "with blank", "with blank/deep", "usr", "usr/in"}


@given(st.sampled_from(["deploy", "deploy-aux", 7]), st.sampled_from(["deploy-spare", 0]))
def test_rendering_fstab_for_another_slot_keeps_nothing_of_the_first(first: str | int, second: str | int) -> None:
    theirs = "# mine\nUUID=0DBA-1B0F /boot/efi vfat umask=0077 0 2\n"
    once = render_fstab(LAYOUT, UUID, second, theirs)
    assert render_fstab(LAYOUT, UUID, second, render_fstab(LAYOUT, UUID, first, theirs)) == once


# From grub-mkconfig into the menu


def test_rootflags_of_the_user_are_kept() -> None:
    with_flag = MKCONFIG.replace("rootflags=subvol=", "rootflags=degraded,subvol=")
    config = BootConfig.parse(with_flag)
    assert (
        "degraded"
        in rendered(Menu("deploy", "", {"deploy": deployment("deploy", 1, config=config)})).split("rootflags=")[1]
    )
    assert "subvol=@.snapshots_debian/rootfs/snapshot-mk" not in config.options


def test_several_initramfs_are_loaded_in_order() -> None:
    text = MKCONFIG.replace("initrd\t/@", "initrd\t/@.snapshots_debian/rootfs/snapshot-mk/boot/intel-ucode.img /@")
    config = BootConfig.parse(text)
    assert list(config.initrds) == ["intel-ucode.img", "initrd.img-6.12.117+deb13-amd64"]
    menu = rendered(Menu("deploy", "", {"deploy": deployment("deploy", 1, config=config)}))
    boot = "/@.snapshots_debian/rootfs/snapshot-deploy/boot"
    assert f"initrd {boot}/intel-ucode.img {boot}/initrd.img-6.12.117+deb13-amd64\n" in menu


def test_a_kernel_without_initramfs_boots_too() -> None:
    text = re.sub(r"^\s*initrd\s.*\n", "", MKCONFIG, flags=re.MULTILINE)
    config = BootConfig.parse(text)
    assert list(config.initrds) == []
    assert "initrd" not in rendered(Menu("deploy", "", {"deploy": deployment("deploy", 1, config=config)}))


# The menu

CONFIG = BootConfig("vmlinuz-1", ["initrd.img-1"], "console=ttyS0", header=["set timeout=5"], foreign="")


def deployment(slot: str, snapshot: int, config: BootConfig = CONFIG, ident: str = "") -> Deployment:
    return Deployment(
        slot=slot, id=ident or f"id-{slot}", snapshot=snapshot, source=300, name="Debian", inputs="x", config=config
    )


def rendered(menu: Menu, description: str = "a web server") -> str:
    return menu.render(LAYOUT, UUID, lambda _: description, GrubNotes(LAYOUT))


def titles(grub_cfg: str) -> list[str]:
    """The titles of the menu's entries, unquoted."""
    quoted = re.findall(r"^menuentry ('.*') --id", grub_cfg, re.MULTILINE)
    return [title[1:-1].replace("'\\''", "'") for title in quoted]


def test_the_menu_begins_with_the_default_then_the_last_booted_one() -> None:
    menu = Menu("deploy-aux", "deploy", {slot: deployment(slot, n) for n, slot in enumerate(["deploy", "deploy-aux"])})
    assert titles(rendered(menu)) == [
        "Debian, snapshot 1: a web server",
        "Debian, snapshot 0: a web server (last booted deployment)",
    ]


def test_a_secondary_deployment_has_the_last_entry() -> None:
    slots = ["deploy", "deploy-aux", "deploy-secondary"]
    menu = Menu("deploy-aux", "deploy", {slot: deployment(slot, n) for n, slot in enumerate(slots)})
    assert titles(rendered(menu))[2] == "Debian, snapshot 2: a web server (secondary)"


def test_other_slots_are_not_in_the_menu() -> None:
    menu = Menu(
        "deploy-aux", "deploy", {slot: deployment(slot, 1) for slot in ("deploy", "deploy-aux", "deploy-spare")}
    )
    assert "deploy-spare" not in rendered(menu)


def test_an_entry_boots_its_slot_by_uuid_and_carries_its_id() -> None:
    text = rendered(Menu("deploy-aux", "", {"deploy-aux": deployment("deploy-aux", 1, ident="c0ffee")}))
    name = "@.snapshots_debian/rootfs/snapshot-deploy-aux"
    linux = next(line.split() for line in text.splitlines() if line.strip().startswith("linux "))
    assert linux[1] == f"/{name}/boot/vmlinuz-1"
    assert {f"root=UUID={UUID}", f"rootflags=subvol={name}", "ro", "ash.deployment=c0ffee", "console=ttyS0"} <= set(
        linux
    )
    assert f"    initrd /{name}/boot/initrd.img-1\n" in text
    assert f"search --no-floppy --fs-uuid --set=root {UUID}" in text
    assert 'set default_id="ash-c0ffee"' in text


@pytest.mark.parametrize("header", [[], ["menuentry 'mine' {", "    true", "}", "submenu 'more' {", "}"]])
def test_the_fallback_is_a_position_in_the_menu(header: list[str]) -> None:
    slots = {
        "deploy": deployment("deploy", 0),
        "deploy-aux": deployment("deploy-aux", 1, CONFIG._replace(header=header)),
    }
    text = rendered(Menu("deploy-aux", "deploy", slots))
    position = re.findall(r"^set fallback=\"(\d+)\"$", text, re.MULTILINE)
    there = re.findall(r"^(?:menuentry|submenu) '([^']*)'", text, re.MULTILINE)
    assert "last booted" in there[int(position[0])]


@pytest.mark.parametrize("ident", ["1d1dca0b4db0ba0e", "0b1", "2", "c0ffee"])
def test_grub_does_not_read_an_id_as_a_number(ident: str) -> None:
    """GRUB reads "1d1d" as entry 1: the second one, which is the old deployment."""
    slots = {
        "deploy": deployment("deploy", 0, ident=f"9{ident}"),
        "deploy-aux": deployment("deploy-aux", 1, ident=ident),
    }
    text = rendered(Menu("deploy-aux", "deploy", slots))
    named = re.findall(r"^set (?:default|fallback)_id=\"(.*)\"$", text, re.MULTILINE)
    assert named == re.findall(r"^menuentry '.*' --id (\S+) --unrestricted \{$", text, re.MULTILINE)
    assert not [name for name in named if name[0].isdecimal()]


def test_the_menu_file_is_read_as_written(tmp_path: Path) -> None:
    config = BootConfig.parse(MKCONFIG)
    menu = Menu("deploy-aux", "deploy", {slot: deployment(slot, 1, config) for slot in ("deploy", "deploy-aux")})
    (tmp_path / "menu").write_text(menu.dump())
    again = Menu.load(tmp_path / "menu")
    assert again.dump() == menu.dump()
    assert rendered(again) == rendered(menu)


def test_nothing_is_carried_from_a_slot_that_was_taken_out_of_the_menu() -> None:
    from_deploy = deployment("deploy-aux", 1)._replace(etc_from="deploy", etc_state="x")
    menu = Menu("deploy-aux", "deploy", {"deploy": deployment("deploy", 0), "deploy-aux": from_deploy})
    assert from_deploy.has_changes_of("deploy", "x")
    assert not from_deploy._replace(fresh_etc=True).has_changes_of("deploy", "x"), "they were left behind"
    assert menu.take_out("deploy")
    assert list(menu.deployments) == ["deploy-aux"]
    assert not menu.deployments["deploy-aux"].etc_from
    assert not menu.take_out("deploy")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"default": "x", "last_booted": "", "deployments": {"x": {}}}'])
def test_a_damaged_menu_file_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "menu").write_text(text)
    with pytest.raises(AshError, match="damaged"):
        Menu.load(tmp_path / "menu")


def test_a_missing_menu_file_is_an_empty_menu(tmp_path: Path) -> None:
    assert vars(Menu.load(tmp_path / "menu")) == vars(Menu())


HOSTILE = [
    "it's a 'quoted' thing",
    "'; reboot; '",
    'say "hello"',
    "$root ${root} $(reboot) `reboot`",
    "} menuentry 'x' { linux /evil",
    "a\nmenuentry 'x' {\n linux /evil\n}\nb",
    "back\\slash\\",
    "ends with a quote'",
    "\x1b[31mred\x00\r",
    "# no comment",
    "Umlaut ä, 日本語",
    "",
]


def lines_of_entries(text: str) -> list[str]:
    """The menu without its titles."""
    return re.sub(r"^menuentry '.*' --id", "menuentry TITLE --id", text, flags=re.MULTILINE).splitlines()


@pytest.mark.parametrize("description", HOSTILE)
def test_a_description_is_data_in_the_menu(description: str) -> None:
    menu = Menu("deploy", "", {"deploy": deployment("deploy", 1)})
    text = rendered(menu, description)
    assert lines_of_entries(text) == lines_of_entries(rendered(menu, "plain"))
    assert "/evil" not in re.sub(r"^menuentry '.*' --id", "", text, flags=re.MULTILINE)
    if description.isprintable():
        assert titles(text) == [f"Debian, snapshot 1: {description}"]


@pytest.mark.skipif(not shutil.which("grub-script-check"), reason="grub-script-check is not installed")
@pytest.mark.parametrize("description", HOSTILE)
def test_grub_itself_reads_the_menu(description: str) -> None:
    config = BootConfig.parse(MKCONFIG)
    slots = ("deploy", "deploy-aux", "deploy-secondary")
    menu = Menu("deploy-aux", "deploy", {slot: deployment(slot, 1, config) for slot in slots})
    checked = subprocess.run(
        ["grub-script-check"], input=rendered(menu, description), text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


# GRUB's notes in the header of btrfs


def in_btrfs(monkeypatch: pytest.MonkeyPatch, once: str) -> str:
    """The menu of a disk without an EFI partition, whose GRUB has shown what it can, with a deployment on trial."""
    for name in ("counts", "is_asked_for"):
        monkeypatch.setattr(EnvironmentBlock, name, property(lambda _: True))
    new = deployment("deploy-aux", 1)._replace(tries=3, minutes=10)
    menu = Menu("deploy-aux", "deploy", {"deploy": deployment("deploy", 0), "deploy-aux": new}, good="deploy")
    menu.once = once
    return rendered(menu)


@pytest.mark.parametrize("once", ["", "deploy"])
def test_without_an_efi_partition_grub_counts_in_btrfs(monkeypatch: pytest.MonkeyPatch, once: str) -> None:
    text = in_btrfs(monkeypatch, once)
    assert "insmod fat" not in text
    assert set(re.findall(r"(?:load|save)_env --file (\S+) ", text)) == {"($root)512+1"}
    assert re.findall(r"save_env \S+ \S+ (.*); then", text) == ["seen", *(["once"] if once else []), "try_id try_n"]
    before = text[: text.index("load_env")]
    assert before.rindex("search --no-floppy --fs-uuid --set=root") < before.rindex(f'if [ "${GRUB_FEATURE}" = "y" ]')


@pytest.mark.skipif(not shutil.which("grub-script-check"), reason="grub-script-check is not installed")
def test_grub_itself_reads_the_menu_that_counts_in_btrfs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = in_btrfs(monkeypatch, "deploy")
    checked = subprocess.run(["grub-script-check"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_without_an_efi_partition_and_proof_grub_does_not_count() -> None:
    new = deployment("deploy-aux", 1)._replace(tries=3, minutes=10)
    menu = Menu("deploy-aux", "deploy", {"deploy": deployment("deploy", 0), "deploy-aux": new}, good="deploy")
    assert "_env" not in rendered(menu)


def test_a_block_in_btrfs_is_a_sector() -> None:
    notes = Countdown("ash-0123456789abcdef", "3", "ash-fedcba9876543210", "debian", "0123456789abcdef", "f" * 16)
    assert Countdown.of_block(notes.block[:512], 512) == notes
    assert Countdown.of_block(notes.block[:512]) is None
    assert Countdown.of_block(bytes(512), 512) is None


BOOT_SECTOR = bytearray(440)
BOOT_SECTOR[0x5C:0x64], BOOT_SECTOR[0x180:0x184] = (7).to_bytes(8, "little"), b"GRUB"


def disk_with_grub() -> bytearray:
    """A disk whose core.img begins in sector 7 and goes on in 9 and 10, and in 20."""
    disk = bytearray().join(bytes([n]) * 512 for n in range(32))
    disk[:440] = BOOT_SECTOR
    disk[7 * 512 : 8 * 512] = bytes(512 - 24) + struct.pack("<QHHQHH", 20, 1, 0, 9, 2, 0)
    return disk


def test_the_installed_grub_is_its_boot_sector_and_all_of_its_core_image() -> None:
    disk = disk_with_grub()
    code = boot_code(io.BytesIO(disk))
    assert len(code) == 440 + 4 * 512
    for sector in range(32):
        changed = bytearray(disk)
        changed[sector * 512 + 439] ^= 1
        assert (boot_code(io.BytesIO(changed)) != code) == (sector in (0, 7, 9, 10, 20)), sector
    table = bytearray(disk)
    table[440:512] = bytes(72)
    assert boot_code(io.BytesIO(table)) == code, "the partition table is not of GRUB"


@pytest.mark.parametrize("disk", [b"", bytes(4096), b"GRUB"])
def test_a_disk_of_another_boot_loader_has_no_grub(disk: bytes) -> None:
    assert boot_code(io.BytesIO(disk)) == b""


def test_the_graphical_terminal_gets_its_font_first() -> None:
    config = BootConfig("vmlinuz-1", [], "", header=["terminal_output gfxterm"], foreign="")
    text = rendered(Menu("deploy", "", {"deploy": deployment("deploy", 1, config)}))
    assert "\nterminal_output gfxterm" not in text
    assert text.index("loadfont unicode") < text.index("terminal_output gfxterm")


# Mounting


@pytest.mark.parametrize(("refusals", "mounted"), [(3, True), (10**6, False)])
def test_mounting_waits_for_a_copy_of_the_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusals: int, mounted: bool
) -> None:
    # The kernel refuses only sometimes: simulate it.
    answers = iter(range(refusals))

    def refuse(*_: object) -> None:
        if next(answers, None) is not None:
            raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(ash, "PRIVATE", tmp_path)
    monkeypatch.setattr(ash, "libc", refuse)
    if mounted:
        assert ash.mount_top(Path("/dev/no")) == tmp_path / "top"
    else:
        with pytest.raises(AshError, match="File exists") as error:
            ash.mount_top(Path("/dev/no"))
        assert "copy" in error.value.hint
