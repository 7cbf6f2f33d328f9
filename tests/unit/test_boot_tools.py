# SPDX-License-Identifier: AGPL-3.0-or-later
"""What ash takes from GRUB's tools and from entries of the Boot Loader Specification."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash import AshError, BootConfig, BootTools, boot_inputs, grub_preamble, grub_title, specified_entries
from tests.unit.boot_layouts import LISTINGS, make_root

pytestmark = pytest.mark.budget(5)

# Recorded output of grub-mkconfig in a snapshot of Debian with two kernels and a custom entry.
MKCONFIG = (LISTINGS.parent / "grub-mkconfig.txt").read_text()
FEDORA_CFG = (LISTINGS / "fedora-grub.cfg").read_text()
FEDORA_ENTRY = (LISTINGS / "fedora-6.11.10.conf").read_text()


def test_tools_and_directory_have_the_distributions_prefix() -> None:
    names = [(one.mkconfig, one.install, one.directory) for one in (BootTools(), BootTools("grub2"))]
    assert names == [
        ("grub-mkconfig", "grub-install", "boot/grub"),
        ("grub2-mkconfig", "grub2-install", "boot/grub2"),
    ]


def test_the_newest_kernel_and_its_initramfs_are_used() -> None:
    config = BootConfig.parse(MKCONFIG)
    assert config.kernel == "vmlinuz-6.12.117+deb13-amd64"
    assert list(config.initrds) == ["initrd.img-6.12.117+deb13-amd64"]


def test_options_that_ash_sets_itself_are_dropped() -> None:
    assert BootConfig.parse(MKCONFIG).options == "console=tty0 console=ttyS0,115200"


def test_terminals_and_timeout_are_kept() -> None:
    header = list(BootConfig.parse(MKCONFIG).header)
    assert "serial --unit=0 --speed=115200" in header
    assert "terminal_input console serial" in header
    assert header.index("serial --unit=0 --speed=115200") < header.index("terminal_input console serial")
    assert [line.strip() for line in header if "set timeout" in line][1:3] == [
        "set timeout_style=menu",
        "set timeout=5",
    ]


def test_what_the_scripts_print_around_the_entries_is_kept_whole() -> None:
    """Users and passwords, a theme, functions, and conditions, in their order; ash's entries take the place of Linux's."""
    users = "set superusers=root\npassword_pbkdf2 root grub.pbkdf2.sha512.10000.AA.BB\n"
    section = f"### BEGIN /etc/grub.d/01_password ###\n{users}### END /etc/grub.d/01_password ###\n\n"
    late = section.replace("01_password", "42_late").replace("=root", "=late")
    text = MKCONFIG.replace("### BEGIN /etc/grub.d/05", f"{section}### BEGIN /etc/grub.d/05") + late
    config = BootConfig.parse(text)
    header = "\n".join(config.header)
    between = text.partition("### BEGIN /etc/grub.d/00_header ###\n")[2].partition("### BEGIN /etc/grub.d/10_linux")[0]
    wanted = [line for line in between.splitlines() if line and not line.startswith("###")]
    assert [line for line in header.splitlines() if line] == wanted
    assert users in header
    assert "set superusers=late" in config.foreign
    assert "grub.pbkdf2" not in str(config.without_text()), "all can read the menu file"
    assert "terminal_output console serial" in config.without_text().header


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ("--class gnu-linux --class os", "--class gnu-linux --class os"),
        ("--class os --unrestricted", "--class os --unrestricted"),
        ("--users 'ada bob' --id x --hotkey=l", "--users 'ada bob'"),
        ('--users "" --class=os', '--users "" --class=os'),
        ("", ""),
    ],
)
def test_entries_have_the_options_of_the_linux_entries(options: str, classes: str) -> None:
    text = MKCONFIG.replace("--class gnu-linux --class gnu --class os", options)
    assert BootConfig.parse(text).classes == classes


def test_foreign_entries_are_kept_and_linux_entries_dropped() -> None:
    foreign = BootConfig.parse(MKCONFIG).foreign
    assert "menuentry 'Memory test {really}' {\n    linux16 /memtest.bin\n}" in foreign
    assert "UEFI Firmware Settings" in foreign
    assert "vmlinuz" not in foreign
    assert "custom.cfg" not in foreign
    assert "menu_color" not in foreign


def test_a_grub_cfg_without_a_kernel_is_an_error() -> None:
    with pytest.raises(AshError, match="no kernel"):
        BootConfig.parse(re.sub(r"^\s*linux\s.*\n", "", MKCONFIG, flags=re.MULTILINE))


def test_fedoras_kernel_is_taken_from_its_entry() -> None:
    config = BootConfig.parse(FEDORA_CFG, [FEDORA_ENTRY])
    assert config.kernel == "vmlinuz-6.11.10-300.fc41.x86_64"
    assert list(config.initrds) == ["initramfs-6.11.10-300.fc41.x86_64.img"]
    assert config.options == "rhgb quiet"
    assert config.rootflags == ""
    assert "  set timeout=5" in config.header
    assert "UEFI Firmware Settings" in config.foreign


def test_an_entry_may_take_its_options_from_a_variable() -> None:
    entry = FEDORA_ENTRY.replace(
        "options root=UUID=3eefd2c3-9db2-4392-ba3e-719c1dda63a2 ro", "options $kernelopts x=y #"
    )
    assert BootConfig.parse(FEDORA_CFG, [entry]).options.startswith("rhgb quiet x=y")


def test_a_boot_partition_of_its_own_has_paths_without_boot() -> None:
    config = BootConfig.parse(FEDORA_CFG, [FEDORA_ENTRY.replace(" /boot/", " /")])
    assert config.kernel == "vmlinuz-6.11.10-300.fc41.x86_64"
    assert list(config.initrds) == ["initramfs-6.11.10-300.fc41.x86_64.img"]


def test_an_unusable_entry_is_skipped() -> None:
    unusable = ["title no kernel\n", "linux /boot/a kernel with blanks\n"]
    assert BootConfig.parse(FEDORA_CFG, [*unusable, FEDORA_ENTRY]).kernel == "vmlinuz-6.11.10-300.fc41.x86_64"
    with pytest.raises(AshError, match="no kernel"):
        BootConfig.parse(FEDORA_CFG, unusable)


def test_entries_count_only_where_grub_reads_them() -> None:
    without = "".join(line for line in FEDORA_CFG.splitlines(keepends=True) if line.strip() != "blscfg")
    with pytest.raises(AshError, match="no kernel"):
        BootConfig.parse(without, [FEDORA_ENTRY])


def test_the_newest_version_comes_first_and_the_rescue_kernel_last(tmp_path: Path) -> None:
    names = [path.stem.partition("-")[2] for path in specified_entries(make_root(tmp_path, "fedora"))]
    assert names == ["6.11.10-300.fc41.x86_64", "6.11.4-301.fc41.x86_64", "0-rescue"]


@pytest.mark.parametrize("name", ["debian", "arch", "fedora", "alpine", "opensuse", "opensuse-arm64"])
def test_the_digest_of_inputs_changes_with_each_kernel_and_initramfs(tmp_path: Path, name: str) -> None:
    root = make_root(tmp_path, name)
    digest = boot_inputs(root)
    assert boot_inputs(root) == digest
    for path in [*root.glob("boot/vmlinuz-*"), *root.glob("boot/Image-*"), *root.glob("boot/init*-*")]:
        path.unlink()
        assert (digest, digest := boot_inputs(root))[0] != digest, path


def test_the_digest_of_inputs_changes_with_an_entry_and_with_the_settings(tmp_path: Path) -> None:
    root = make_root(tmp_path, "fedora")
    digests = [boot_inputs(root)]
    specified_entries(root)[0].write_text("title another\n")
    digests.append(boot_inputs(root))
    (root / "etc/default").mkdir(parents=True)
    (root / "etc/default/grub").write_text("GRUB_TIMEOUT=1\n")
    digests.append(boot_inputs(root))
    assert len(set(digests)) == 3


def test_the_preamble_finds_the_root_file_system_by_uuid() -> None:
    assert grub_preamble("c0ffee")[-1] == "search --no-floppy --fs-uuid --set=root c0ffee"


@given(st.text())
def test_any_text_is_quoted_as_one_grub_word(text: str) -> None:
    quoted = grub_title(text)
    inside = quoted[1:-1].replace("'\\''", "")
    assert quoted[0] == quoted[-1] == "'"
    assert "'" not in inside
    assert "\n" not in quoted
    assert all(c.isprintable() for c in quoted)
