# SPDX-License-Identifier: AGPL-3.0-or-later
"""What ash takes from GRUB's tools and from entries of the Boot Loader Specification."""

from pathlib import Path

import pytest

from ash import AshError, BootConfig, BootTools, boot_inputs, grub_preamble, specified_entries
from tests.unit.boot_layouts import LISTINGS, make_root

pytestmark = pytest.mark.budget(5)

FEDORA_CFG = (LISTINGS / "fedora-grub.cfg").read_text()
FEDORA_ENTRY = (LISTINGS / "fedora-6.11.10.conf").read_text()


def test_tools_and_directory_have_the_distributions_prefix() -> None:
    names = [(one.mkconfig, one.install, one.directory) for one in (BootTools(), BootTools("grub2"))]
    assert names == [
        ("grub-mkconfig", "grub-install", "boot/grub"),
        ("grub2-mkconfig", "grub2-install", "boot/grub2"),
    ]


def test_fedoras_kernel_is_taken_from_its_entry() -> None:
    config = BootConfig.parse(FEDORA_CFG, [FEDORA_ENTRY])
    assert config.kernel == "vmlinuz-6.11.10-300.fc41.x86_64"
    assert list(config.initrds) == ["initramfs-6.11.10-300.fc41.x86_64.img"]
    assert config.options == "rhgb quiet"
    assert config.rootflags == ""
    assert "set timeout=5" in config.header
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


def test_an_entry_that_cannot_be_used_is_passed_over() -> None:
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
