# SPDX-License-Identifier: AGPL-3.0-or-later
"""A disk without an EFI partition: GRUB 2.14 can count in the header of btrfs, once it has shown that.

GRUB itself does so in campaigns/test_grub_214.py. Faked here: that no partition is recorded, that GRUB's modules know the
feature of 2.14, and what GRUB writes into the block.
"""

import json
import re
from collections.abc import Iterator

import pytest

from ash import ENVIRONMENT_AT, GRUB_FEATURE, SECTOR, Countdown, boot_code, btrfs_partition
from tests.support import DISTRIBUTION, FAILED, REFUSED
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]

LOST = "GRUB's environment block in the header of btrfs is missing or damaged, or another GRUB is installed"


class Block:
    """The sector in the header of btrfs."""

    def __init__(self, system: System) -> None:
        self.image = system.image
        self.at = btrfs_partition(system.image)[0] + ENVIRONMENT_AT

    def read(self) -> bytes:
        with self.image.open("rb") as disk:
            disk.seek(self.at)
            return disk.read(SECTOR)

    def write(self, content: bytes) -> None:
        with self.image.open("rb+") as disk:
            disk.seek(self.at)
            disk.write(content)

    @property
    def notes(self) -> Countdown:
        found = Countdown.of_block(self.read(), SECTOR)
        assert found is not None
        return found

    def grub_shows_that_it_can_write(self) -> None:
        """Do as GRUB 2.14 does at each start."""
        self.write(self.notes._replace(seen=self.notes.ask).block[:SECTOR])

    def spend(self, left: int) -> None:
        self.write(self.notes._replace(try_n=str(left)).block[:SECTOR])


@pytest.fixture
def block(system: System, machine: Machine) -> Iterator[Block]:
    """The empty sector of a system that has no EFI partition, and whose GRUB has the modules of 2.14."""
    efi, module = system.files.state / "efi", system.files.grub_cfg.parent / "i386-pc/normal.mod"
    uuid, content = efi.read_text(), module.read_bytes()
    efi.write_text("")
    module.write_bytes(content + GRUB_FEATURE.encode())
    block = Block(system)
    block.write(bytes(SECTOR))
    yield block
    (system.files.state / "envblock").unlink(missing_ok=True)
    module.write_bytes(content)
    efi.write_text(uuid)
    system.ash("fsck", "--repair")


@pytest.fixture
def proven(machine: Machine, block: Block) -> Block:
    """GRUB has been asked by a deploy, and has shown that it can write there."""
    machine.running("deploy", machine.system.clone())
    block.grub_shows_that_it_can_write()
    return block


def starts(system: System, block: Block) -> str:
    """The slot that GRUB 2.14 starts by itself: the fallback, unless the default has a try left."""
    grub_cfg = system.files.grub_cfg.read_text()
    wanted, fallback = re.findall(r'^set (?:default|fallback)_id="(.*)"$', grub_cfg, re.MULTILINE)
    counted = re.search(r'if \[ "\$try_id" = "(.*)" \]', grub_cfg)
    has_try = counted and (block.notes.try_id, (block.notes.try_n or "0") > "0") == (counted[1], True)
    entry = wanted if has_try or not counted else fallback
    slot = re.search(r"/rootfs/snapshot-([a-z-]+)/boot/", grub_cfg[grub_cfg.index(f"--id {entry} ") :])
    assert slot
    return slot[1]


def installed(system: System) -> bytes:
    with system.image.open("rb") as disk:
        return boot_code(disk)


def test_nothing_is_promised_before_grub_has_shown_it(system: System, machine: Machine, block: Block) -> None:
    machine.running("deploy", system.clone())
    assert installed(system)
    assert (block.notes.ash, block.notes.ask != "", block.notes.seen) == (DISTRIBUTION, True, "")
    assert "save_env --file ($root)512+1 seen" in system.files.grub_cfg.read_text()
    assert "try_n" not in system.files.grub_cfg.read_text()
    assert system.ash("--json", "status").json["fallback"] is False
    assert "not automatic" in system.ash("status").stdout
    assert "--secondary" in machine.run("deploy", system.clone(), "--once", status=REFUSED).error
    assert not (system.files.state / "envblock").exists()
    system.is_sound()
    assert system.ash("fsck").stdout == "no problems found\n"


def test_a_new_deployment_has_three_tries(system: System, machine: Machine, proven: Block) -> None:
    assert system.ash("--json", "status").json["fallback"] is True
    number = system.clone()
    machine.running("deploy", number)
    new, before = system.files.default_slot(), machine.slot
    assert proven.notes.try_id in system.files.grub_cfg.read_text()
    seen = []
    for left in (2, 1, 0):
        seen.append(starts(system, proven))
        proven.spend(left)
    assert seen == [new] * 3
    assert starts(system, proven) == before
    status = system.ash("--json", "status").json
    assert (status["on_trial"], status["tries_left"], status["next"]["slot"]) == (True, 0, before)
    system.is_sound()
    assert system.ash("fsck").stdout == "no problems found\n"


def test_bless_ends_the_trial_and_keeps_what_grub_has_shown(system: System, machine: Machine, proven: Block) -> None:
    machine.running("deploy", system.clone())
    shown, new = proven.notes.seen, system.files.default_slot()
    patch = f"ash.System.booted_slot = property(lambda self: {new!r})"
    assert json.loads(machine.run("--json", "bless", patch=patch).stdout)["changed"] is True
    assert proven.notes == Countdown(ash=DISTRIBUTION, ask=shown, seen=shown)
    assert "try_n" not in system.files.grub_cfg.read_text()
    assert system.ash("--json", "status").json["fallback"] is True


def test_a_deployment_that_did_not_start_is_noted(system: System, machine: Machine, proven: Block) -> None:
    number = system.clone()
    machine.running("deploy", number)
    proven.spend(0)
    ident = json.loads((system.files.state / "menu").read_text())["deployments"][system.files.default_slot()]["id"]
    patch = f"ash.kernel_options = lambda: {{'ash.fellback': {ident!r}}}"
    answer = json.loads(machine.run("--json", "bless", patch=patch).stdout)
    assert answer["fell_back_from"]["snapshot"] == number
    assert system.files.default_slot() == machine.slot
    system.is_sound()


def test_once_starts_a_snapshot_once(system: System, machine: Machine, proven: Block) -> None:
    number, before = system.clone(), system.files.default_slot()
    machine.running("deploy", "--once", number)
    assert system.files.default_slot() == before
    assert f'if [ "$once" = "{proven.notes.once}" ]' in system.files.grub_cfg.read_text()
    assert system.ash("fsck").stdout == "no problems found\n"


@pytest.mark.parametrize("content", [bytes(SECTOR), bytes(range(256)) * 2], ids=["empty", "noise"])
def test_a_lost_block_is_found_and_nothing_is_promised_any_more(
    system: System, machine: Machine, proven: Block, content: bytes
) -> None:
    machine.running("deploy", system.clone())
    assert (system.files.state / "envblock").read_text() == f"{proven.notes.seen}\n"
    proven.write(content)
    assert system.ash("--json", "status").json["fallback"] is False
    assert LOST in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    assert "try_n" not in system.files.grub_cfg.read_text()
    if any(content):
        assert proven.read() == content, "it may be another's"
    else:
        assert proven.notes.seen == ""
    assert system.ash("fsck").stdout == "no problems found\n"
    machine.running("deploy", system.clone())
    system.is_sound()


def test_lost_tries_are_written_again(system: System, machine: Machine, proven: Block) -> None:
    machine.running("deploy", system.clone())
    proven.write(proven.notes._replace(try_id="", try_n="").block[:SECTOR])
    assert starts(system, proven) == machine.slot, "GRUB starts what is known to boot"
    assert "does not count the starts" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    assert proven.notes.try_n == "3"
    assert proven.notes.seen
    assert starts(system, proven) == system.files.default_slot()


def test_another_grub_in_the_boot_sector_must_show_it_again(system: System, machine: Machine, proven: Block) -> None:
    machine.running("deploy", system.clone())
    shown = proven.notes.seen
    with system.image.open("rb+") as disk:
        core = int.from_bytes(disk.read(SECTOR)[0x5C:0x64], "little") * SECTOR
        disk.seek(core + 5 * SECTOR)
        before = disk.read(SECTOR)
        disk.seek(core + 5 * SECTOR)
        disk.write(bytes(reversed(before)))
    try:
        assert system.ash("--json", "status").json["fallback"] is False
        assert LOST in system.ash("fsck", status=FAILED).stdout
        machine.running("deploy", system.clone())
        assert "try_n" not in system.files.grub_cfg.read_text()
        assert (proven.notes.seen, proven.notes.ask != shown) == ("", True)
        proven.grub_shows_that_it_can_write()
        machine.running("deploy", system.clone())
        assert proven.notes.try_n == "3"
    finally:
        with system.image.open("rb+") as disk:
            disk.seek(core + 5 * SECTOR)
            disk.write(before)


@pytest.mark.parametrize(
    "content",
    [
        Countdown(ash="other", ask="1").block[:SECTOR],
        b"# GRUB Environment Block\nnext_entry=2\n".ljust(SECTOR, b"#"),
        b"core image".ljust(SECTOR, b"\1"),
    ],
    ids=["another distribution's", "another system's", "unknown"],
)
def test_a_sector_that_somebody_else_uses_stays_as_it_is(
    system: System, machine: Machine, block: Block, content: bytes
) -> None:
    block.write(content)
    machine.running("deploy", system.clone())
    assert block.read() == content
    assert "512+1" not in system.files.grub_cfg.read_text()
    assert system.ash("--json", "status").json["fallback"] is False


def test_an_older_grub_is_not_asked(system: System, machine: Machine, block: Block) -> None:
    module = system.files.grub_cfg.parent / "i386-pc/normal.mod"
    module.write_bytes(module.read_bytes().replace(GRUB_FEATURE.encode(), b""))
    machine.running("deploy", system.clone())
    assert block.read() == bytes(SECTOR)
    assert "512+1" not in system.files.grub_cfg.read_text()


def test_an_efi_partition_is_preferred(system: System, machine: Machine, proven: Block) -> None:
    shown = proven.notes
    efi = system.files.state / "efi"
    efi.unlink()
    assert "does not count" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    machine.running("deploy", system.clone())
    assert proven.notes == shown
    assert "insmod fat" in system.files.grub_cfg.read_text()
    system.is_sound()
