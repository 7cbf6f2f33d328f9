# SPDX-License-Identifier: AGPL-3.0-or-later
"""The firmware's boot menu, as efibootmgr 17 and 18 print it; no machine here has one."""

import pytest

from ash import WINDOWS, Firmware, loader_of
from installer.bootloader import after_removal

pytestmark = pytest.mark.budget(5)

FIRST = "b0a7a1de-1b0c-4c9b-9a5e-0f6f1f3f2a11"
SECOND = "C55FDE2A-3322-4D29-8F0B-7A3C1B8E9F00"
HEAD = """\
BootCurrent: 0003
Timeout: 0 seconds
BootOrder: 0003,0000,0001
Boot0000* UiApp\tFvVol(7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1)/FvFile(462caa21-7ddc-4ec3-8bf1-7ac5cbb8a6b1)
"""
OLD = f"""\
Boot0001* Debian GNU/Linux (ash)\tHD(2,GPT,{FIRST},0x1000,0x80000)/File(\\EFI\\debian\\shimx64.efi)
Boot0003* Work\tHD(2,GPT,{SECOND},0x1000,0x80000)/File(\\EFI\\debian\\shimx64.efi)
Boot0004  Windows Boot Manager\tHD(1,MBR,0x1234abcd,0x800,0x32000)/File(\\EFI\\MICROSOFT\\BOOT\\BOOTMGFW.EFI)WINDOWS...
"""
NEW = (
    OLD.replace("/File(", "/").replace("shimx64.efi)", "shimx64.efi\n      dp: 04 01 2a 00 02").replace("EFI)W", "EFIW")
)


@pytest.fixture(params=[OLD, NEW])
def firmware(request: pytest.FixtureRequest) -> Firmware:
    found = Firmware.__new__(Firmware)
    found.read(HEAD + request.param)
    return found


def test_entries_are_found_by_loader_and_partition(firmware: Firmware) -> None:
    assert firmware.order == ["0003", "0000", "0001"]
    entries = [firmware.find(loader_of("debian"), partition) for partition in (FIRST, SECOND.lower(), "")]
    assert [entry and (entry.number, entry.label) for entry in entries] == [
        ("0001", "Debian GNU/Linux (ash)"),
        ("0003", "Work"),
        ("0003", "Work"),
    ], "the first in the order, if several match"
    assert firmware.find(loader_of("debian_2")) is None


def test_all_entries_for_the_directory_of_a_system_are_found(firmware: Firmware) -> None:
    assert [entry.number for entry in firmware.entries if entry.starts("debian/", FIRST)] == ["0001"]
    assert [entry.number for entry in firmware.entries if entry.starts("debian/")] == ["0001", "0003"]
    assert not any(entry.starts("deb/") for entry in firmware.entries)


def test_windows_is_found_even_if_it_is_in_no_order(firmware: Firmware) -> None:
    entry = firmware.find(WINDOWS)
    assert entry
    assert (entry.number, entry.label) == ("0004", "Windows Boot Manager")


def test_a_partition_of_an_mbr_is_known_by_disk_and_number(firmware: Firmware) -> None:
    entry = firmware.find(WINDOWS)
    assert entry
    assert entry.is_on("1234abcd-01")
    assert not entry.is_on("1234abcd-02")
    assert not entry.is_on(FIRST)


def test_a_removal_says_what_the_firmware_starts_then(firmware: Firmware) -> None:
    firmware.order = ["0003", "0001"]
    assert after_removal(firmware, "debian", SECOND) == "the firmware starts Debian GNU/Linux (ash) first from then on"
    assert after_removal(firmware, "debian", FIRST) == "the firmware starts Work first from then on"
    assert after_removal(firmware, "debian", "") == "the firmware has no entry then"
