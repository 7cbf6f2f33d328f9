# SPDX-License-Identifier: AGPL-3.0-or-later
"""A new deployment is on trial: what GRUB counts, what is noted when it is good, and when it did not start.

GRUB counts, as the program grub-emu, which reads the same menu and notes. On a machine it does so in tests/boot.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash import (
    AFTER_SUCCESS,
    BLOCK_SIZE,
    REQUIRED_CHECKS,
    SECTOR,
    Countdown,
    fat_uuid,
    not_programs_in,
    passes,
    programs_in,
)
from installer.disk import EFI_SIZE
from tests.support import DONE, FAILED, NOTES, REFUSED, USAGE, Started, program
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]


@pytest.fixture
def other(system: System, machine: Machine) -> int:
    """A snapshot that is deployed while another deployment, a good one, runs."""
    number = system.clone()
    machine.running("deploy", number)
    return number


def efi_partition(system: System) -> bytes:
    """What is on the EFI partition of the disk."""
    image, _, start = system.drive.partition("@@")
    with Path(image).open("rb") as disk:
        disk.seek(int(start))
        return disk.read(EFI_SIZE)


def menu(system: System) -> dict[str, str]:
    found: dict[str, str] = json.loads((system.files.state / "menu").read_text())
    return found


def deployments(system: System) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((system.files.state / "menu").read_text())["deployments"]
    return found


def starred(system: System) -> int:
    """The snapshot for the next boot, as the tree shows it."""
    (number,) = re.findall(r"(\d+)\*- ", system.ash("tree").stdout)
    return int(number)


def start_of(system: System, **options: bool) -> Started:
    """What GRUB starts by itself, if the machine is started now."""
    return system.grub(system.files.grub_cfg.read_text(), spend=True, **options)


def starts(system: System) -> str:
    """The slot that it starts."""
    return start_of(system).slot


def fell_back(system: System, *, spent: bool = True) -> str:
    """GRUB has gone back, as it tells by the kernel's command line; with `spent`, all tries are. Returns a patch."""
    ident = deployments(system)[system.files.default_slot()]["id"]
    if spent:
        system.write_notes(Countdown(try_id=f"ash-{ident}", try_n="0").block)
    return f"ash.kernel_options = lambda: {{'ash.fellback': {ident!r}}}"


def fails_to_start(machine: Machine, *, spent: bool = True) -> dict[str, object]:
    """The machine has gone back to its running deployment."""
    done = machine.run("--json", "bless", patch=fell_back(machine.system, spent=spent))
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_a_new_deployment_has_three_tries(system: System, machine: Machine, other: int) -> None:
    new = system.files.default_slot()
    entry = re.findall(r"--id (\S+)", system.files.grub_cfg.read_text())[0]
    assert system.notes() == {"try_id": entry, "try_n": "3"}
    seen = []
    for left in (2, 1, 0):
        start = start_of(system)
        seen.append(start.slot)
        assert {"ash.trial=10", "panic=10"} <= {*start.options}
        assert system.notes()["try_n"] == str(left)
    assert seen == [new] * 3
    last = start_of(system)
    assert last.slot == machine.slot
    assert f"ash.fellback={entry.removeprefix('ash-')}" in last.options
    status = system.ash("--json", "status").json
    assert (status["on_trial"], status["tries_left"], status["fallback"]) == (True, 0, True)
    assert status["next"]["slot"] == machine.slot
    assert starred(system) == status["next"]["snapshot"] != other
    assert f"snapshot {other} does not start" in system.ash("status").stdout
    assert machine.running("deploy", other)["changed"] is True, "it has its tries again"
    assert (starts(system), system.ash("--json", "status").json["tries_left"]) == (new, 2)
    assert "after 2 more tries" in system.ash("status").stdout
    assert machine.running("deploy", other)["changed"] is False
    system.is_sound()


def test_new_notes_are_one_sector_that_is_written(system: System, machine: Machine, other: int) -> None:
    """A power cut leaves the old or the new ones: a disk writes a sector as a whole, whatever Linux knows of FAT."""
    for _ in range(3):
        start_of(system)
    before = efi_partition(system)
    machine.running("deploy", other)
    after = efi_partition(system)
    changed = [n for n in range(0, len(before), SECTOR) if before[n : n + SECTOR] != after[n : n + SECTOR]]
    assert len(changed) == 1
    assert after[changed[0] :].startswith(b"# GRUB Environment Block\n")
    assert system.notes()["try_n"] == "3"


def test_a_deployment_that_was_good_once_is_no_longer_counted(system: System, machine: Machine, other: int) -> None:
    slot = machine.boot()
    assert [starts(system) for _ in range(5)] == [slot] * 5
    assert "try_n" not in system.files.grub_cfg.read_text()
    machine.running("bless")
    assert machine.running("bless")["changed"] is False
    assert system.ash("--json", "status").json["on_trial"] is False


def test_bless_ends_the_trial(system: System, machine: Machine, other: int) -> None:
    system.files.state.joinpath("booted").write_text(
        (system.root(system.files.default_slot()) / "usr/share/ash/deployment").read_text()
    )
    running = system.files.default_slot()
    patch = f"ash.System.booted_slot = property(lambda self: {running!r})"
    answer = json.loads(machine.run("--json", "bless", patch=patch).stdout)
    assert (answer["changed"], answer["slot"], answer["snapshot"], answer["fell_back_from"]) == (
        True,
        running,
        other,
        None,
    )
    assert system.notes() == {}
    assert "try_n" not in system.files.grub_cfg.read_text()
    assert menu(system)["good"] == running
    system.is_sound()


@pytest.mark.parametrize(("lines", "tries"), [("boot_tries::1", 1), ("boot_tries::9\nboot_timeout::2", 9)])
def test_tries_and_timeout_are_configured(system: System, machine: Machine, lines: str, tries: int) -> None:
    (machine.etc / "ash.conf").write_text(f"{lines}\n")
    machine.running("deploy", system.clone())
    assert system.notes()["try_n"] == str(tries)
    assert f"ash.trial={2 if 'timeout' in lines else 10} panic=" in system.files.grub_cfg.read_text()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("rm /usr/sbin/init", "it has no /sbin/init"),
        ("rm -r /boot/vmlinuz-* /usr/lib/modules/*", "there is no kernel that GRUB can boot"),
    ],
)
def test_what_cannot_start_is_not_deployed(system: System, machine: Machine, script: str, message: str) -> None:
    number = system.clone()
    system.shell(number, script)
    for options in ([], ["--dry-run"]):
        error = machine.run(*options, "deploy", number, status=FAILED).error
        assert f"snapshot {number} cannot be booted: {message}" in error
    system.is_sound()


def test_zero_tries_are_no_trial(system: System, machine: Machine) -> None:
    (machine.etc / "ash.conf").write_text("boot_tries::0\n")
    machine.running("deploy", system.clone())
    assert "try_n" not in system.files.grub_cfg.read_text()
    assert system.ash("--json", "status").json["on_trial"] is False


def test_a_mistake_in_the_configuration_does_not_prevent_a_deploy(system: System, machine: Machine) -> None:
    (machine.etc / "ash.conf").write_text("boot_tries::many\n")
    done = machine.run("deploy", system.clone(), "--fresh-etc")
    assert "boot_tries and boot_timeout count as not set" in done.stderr
    assert system.notes()["try_n"] == "3"


def test_a_wrong_number_of_tries_is_refused_with_the_right_ones(system: System, machine: Machine) -> None:
    (machine.etc / "ash.conf").write_text("boot_tries::-1\n")
    error = machine.run("deploy", system.clone(), status=USAGE).error
    assert "'boot_tries::-1'" in error
    assert "a number from 0" in error
    assert "/etc/ash.conf of the running system" in error
    (machine.etc / "ash.conf").write_text("")


def test_a_deployment_that_did_not_start_is_not_the_default_any_more(
    system: System, machine: Machine, other: int
) -> None:
    answer = fails_to_start(machine)
    failure = answer["fell_back_from"]
    assert isinstance(failure, dict)
    assert failure["snapshot"] == other
    assert system.files.default_slot() == machine.slot
    assert "try_n" not in system.files.grub_cfg.read_text()
    assert machine.running("status")["fell_back_from"]["snapshot"] == other
    assert machine.running("check", status=FAILED)["fell_back_from"]["snapshot"] == other
    assert any(row["bad"] for row in system.ash("--json", "tree").json["tree"] if row["snapshot"] == other)
    assert fails_to_start(machine)["changed"] is False, "it is noted once"
    system.is_sound()


def test_a_snapshot_that_did_not_start_is_deployed_again_once_it_is_changed(
    system: System, machine: Machine, other: int
) -> None:
    fails_to_start(machine)
    machine.running("deploy", other, status=REFUSED)
    machine.running("--dry-run", "deploy", other, status=REFUSED)
    system.ash("desc", other, "still the same")
    machine.running("deploy", other, status=REFUSED)
    system.shell(other, "touch /etc/mended")
    assert not any(row["bad"] for row in system.ash("--json", "tree").json["tree"] if row["snapshot"] == other)
    assert machine.running("deploy", other)["changed"] is True
    assert system.notes()["try_n"] == "3"


def test_what_did_not_start_is_not_known_to_boot_because_somebody_started_it(
    system: System, machine: Machine, other: int
) -> None:
    """It may run, but without its services."""
    good, bad = machine.slot, system.files.default_slot()
    fails_to_start(machine)
    patch = f"ash.System.booted_slot = property(lambda self: {bad!r})"
    machine.run("deploy", system.clone(), patch=patch)
    assert menu(system)["good"] == good
    assert [starts(system) for _ in range(4)][-1] == good
    assert system.files.default_slot() not in (good, bad)


def test_a_deploy_before_bless_knows_that_the_machine_went_back(system: System, machine: Machine, other: int) -> None:
    ident = deployments(system)[system.files.default_slot()]["id"]
    patch = f"ash.kernel_options = lambda: {{'ash.fellback': {ident!r}}}"
    while start_of(system).slot != machine.slot:
        pass
    assert "did not start" in machine.run("deploy", other, status=REFUSED, patch=patch).error
    assert machine.run("deploy", other, "--force", patch=patch).stdout
    assert (starts(system), system.notes()["try_n"]) == (system.files.default_slot(), "2")
    assert deployments(system)[system.files.default_slot()]["id"] != ident


def test_a_recovery_at_boot_leaves_it_to_bless_to_say_that_the_machine_went_back(
    system: System, machine: Machine, other: int
) -> None:
    patch = fell_back(system)
    machine.run("recover", patch=patch)
    assert system.files.default_slot() == machine.slot
    told = [json.loads(machine.run("--json", "bless", patch=patch).stdout)["fell_back_from"] for _ in range(2)]
    assert (told[0]["snapshot"], told[1]) == (other, None)


@pytest.mark.parametrize(
    "notes",
    [
        b"noise",
        Countdown(try_id="ash-0123456789abcdef", try_n="3").block,
        *(Countdown(try_id="ENTRY", try_n=number).block for number in ("4", "99", "abc", "-1", "03")),
    ],
)
def test_what_grub_has_not_tried_is_not_bad(system: System, machine: Machine, other: int, notes: bytes) -> None:
    entry, new = system.notes()["try_id"], system.files.default_slot()
    system.write_notes(notes.replace(b"ENTRY", entry.encode())[:BLOCK_SIZE].ljust(len(notes), b"#")[:BLOCK_SIZE])
    assert "EFI partition" in system.ash("fsck", status=FAILED).stdout
    assert starts(system) == machine.slot
    status = system.ash("--json", "status").json
    assert (status["next"]["slot"], status["on_trial"], status["tries_left"]) == (machine.slot, True, None)
    assert "notes are damaged" in system.ash("status").stdout
    assert starred(system) == status["next"]["snapshot"]
    assert fails_to_start(machine, spent=False)["fell_back_from"] is None
    assert not any(row["bad"] for row in system.ash("--json", "tree").json["tree"] if row["snapshot"] == other)
    assert system.notes() == {"try_id": entry, "try_n": "3"}
    assert starts(system) == new
    system.is_sound()


@pytest.mark.parametrize("option", ["--once", "--secondary"])
def test_what_was_never_known_to_boot_is_not_what_one_goes_back_to(
    system: System, machine: Machine, option: str
) -> None:
    good = machine.slot
    unblessed = machine.running("deploy", option, system.clone())["slot"]
    assert starts(system) == (unblessed if option == "--once" else system.files.default_slot())
    patch = f"ash.System.booted_slot = property(lambda self: {unblessed!r})"
    machine.run("deploy", system.clone(), patch=patch)
    assert menu(system)["good"] == good
    assert [starts(system) for _ in range(4)][-1] == good


def test_what_is_started_once_and_known_to_boot_is_what_a_deploy_in_there_goes_back_to(
    system: System, machine: Machine
) -> None:
    before = machine.slot
    once = machine.running("deploy", "--once", system.clone())["slot"]
    assert starts(system) == once
    patch = f"ash.System.booted_slot = property(lambda self: {once!r})"
    machine.run("bless", patch=patch)
    assert menu(system)["good"] == before
    machine.run("deploy", system.clone(), patch=patch)
    assert menu(system)["good"] == once
    assert [starts(system) for _ in range(4)][-1] == once


def test_a_start_once_that_ended_before_it_was_known_to_boot_is_told_once(system: System, machine: Machine) -> None:
    number = system.clone()
    answer = json.loads(machine.run("--json", "deploy", "--once", number).stdout)
    assert answer["once"] is True
    assert json.loads(machine.run("--json", "bless").stdout)["ended_once"] is None, "it is still to come"
    assert starts(system) == answer["slot"]
    assert json.loads(machine.run("--json", "bless").stdout)["ended_once"] == {"snapshot": number, "units": []}
    assert json.loads(machine.run("--json", "bless").stdout)["ended_once"] is None
    machine.run("deploy", "--once", number)
    assert starts(system) == answer["slot"]
    patch = f"ash.System.booted_slot = property(lambda self: {answer['slot']!r})"
    machine.run("bless", patch=patch)
    assert "was started once" not in machine.run("bless").stdout, "it did come up"


def test_a_start_once_that_is_replaced_is_named(system: System, machine: Machine) -> None:
    first, second, third = system.clone(), system.clone(), system.clone()
    machine.running("deploy", "--once", first)
    machine.running("deploy", "--secondary", second)
    once = system.notes()["once"]
    assert once
    assert "is started once" in machine.run("deploy", third).stdout
    assert f"snapshot {first} is not started once any more" in machine.run("deploy", "--once", third).error
    assert system.notes()["once"] != once
    system.shell(third, "touch /usr/share/changed")
    again = machine.run("deploy", "--once", third)
    assert "is not started once" not in again.stdout + again.stderr


def test_the_failure_of_the_state_that_runs_in_another_deployment_is_told(system: System, machine: Machine) -> None:
    number = system.clone()
    machine.running("deploy", number)
    machine.boot()
    machine.running("bless")
    (machine.etc / "edited").write_text("x\n")
    machine.running("deploy", system.clone())
    assert machine.running("deploy", number)["changed"] is True, "with the edit"
    assert fails_to_start(machine)["fell_back_from"]["snapshot"] == number  # type: ignore[index]
    for _ in range(2):
        assert system.ash("--json", "status").json["fell_back_from"]["snapshot"] == number
        assert re.search(rf"\b{number}.- .*\[bad\]", system.ash("tree").stdout)
        machine.running("bless")
    machine.running("deploy", number, status=REFUSED)
    system.shell(number, "touch /usr/share/mended")
    assert not re.search(rf"\b{number}.- .*\[bad\]", system.ash("tree").stdout)


def test_a_free_slot_is_taken_before_a_secondary_entry_is_replaced(system: System, machine: Machine) -> None:
    numbers = [system.clone() for _ in range(3)]
    for one in system.ash("--json", "status").json["secondary"]:
        machine.running("deploy", one["snapshot"], "--no-secondary")
    for number in numbers[:2]:
        assert "which it replaces" not in machine.run("deploy", number, "--secondary").stdout
    assert {one["snapshot"] for one in system.ash("--json", "status").json["secondary"]} >= {*numbers[:2]}
    assert f"snapshot {numbers[0]}, which it replaces" in machine.run("deploy", numbers[2], "--secondary").stdout


def test_a_mutable_deployment_can_be_started_after_a_fallback(system: System, machine: Machine) -> None:
    number = system.clone()
    system.ash("mutable", number)
    slot = machine.running("deploy", number)["slot"]
    fails_to_start(machine)
    machine.running("deploy", system.clone())
    text = system.files.grub_cfg.read_text()
    assert f"/snapshot-{slot}/" in text
    entries = re.findall(r"^menuentry .* --id (\S+)", text, re.MULTILINE)
    assert len(entries) == len({*entries})
    system.ash("immutable", number)


def test_what_somebody_chose_in_the_menu_after_a_fallback_is_not_the_default(
    system: System, machine: Machine, other: int
) -> None:
    slot = machine.running("deploy", "--secondary", system.clone())["slot"]
    patch = fell_back(system)
    patch += f"; ash.System.booted_slot = property(lambda self: {slot!r})"
    good = machine.slot
    machine.run("recover", patch=patch)
    assert system.files.default_slot() == menu(system)["good"] == good


def test_force_deploys_a_snapshot_that_did_not_start(system: System, machine: Machine, other: int) -> None:
    fails_to_start(machine)
    assert machine.running("deploy", other, "--force")["changed"] is True
    assert system.notes()["try_n"] == "3"
    assert starts(system) == system.files.default_slot() != machine.slot


def test_a_deployment_that_did_not_start_and_runs_later_is_not_bad_any_more(
    system: System, machine: Machine, other: int
) -> None:
    bad = system.files.default_slot()
    fails_to_start(machine)
    patch = f"ash.System.booted_slot = property(lambda self: {bad!r})"
    answers = [json.loads(machine.run("--json", "bless", patch=patch).stdout) for _ in range(2)]
    assert [answer["changed"] for answer in answers] == [True, False]
    assert not any(row["bad"] for row in system.ash("--json", "tree").json["tree"] if row["snapshot"] == other)
    machine.running("deploy", other)
    system.is_sound()


def test_after_a_fallback_all_commands_go_by_what_runs(system: System, machine: Machine, other: int) -> None:
    (machine.etc / "edited").touch()
    fails_to_start(machine)
    assert "edited" in machine.running("status")["drift"]
    kept = machine.running("rollback")
    assert kept["from"] != other
    assert (system.root(kept["snapshot"]) / "etc/edited").exists()


def test_a_second_deploy_falls_back_to_the_good_one_too(system: System, machine: Machine, other: int) -> None:
    running = machine.slot
    machine.running("deploy", system.clone())
    assert system.files.default_slot() != running
    used_up = [starts(system) for _ in range(4)]
    assert used_up[-1] == running


def test_once_starts_a_snapshot_once(system: System, machine: Machine) -> None:
    number, before = system.clone(), system.files.default_slot()
    machine.running("deploy", "--once", number)
    assert system.files.default_slot() == before
    text = system.files.grub_cfg.read_text()
    entry = system.notes()["once"]
    assert f'if [ "$once" = "{entry}" ]' in text
    assert f"snapshot {number}:" in next(line for line in text.splitlines() if f"--id {entry} " in line)
    system.is_sound()


def once(system: System, machine: Machine) -> tuple[int, str]:
    """Have a new snapshot started once; returns its number and slot."""
    number = system.clone()
    answer = machine.running("deploy", "--once", number)
    return number, str(answer["slot"])


def test_a_start_once_spends_no_try_of_the_deployment_on_trial(system: System, machine: Machine, other: int) -> None:
    _, slot = once(system, machine)
    first = start_of(system)
    assert first.slot == slot
    assert not [word for word in first.options if word.startswith("ash.fellback")]
    assert system.notes()["try_n"] == "3"
    assert [starts(system) for _ in range(4)] == [system.files.default_slot()] * 3 + [machine.slot]


def test_a_start_once_waits_for_nobody(system: System, machine: Machine) -> None:
    once(system, machine)
    assert {"ash.trial=10", "panic=10", "systemd.crash_reboot=1"} <= {*start_of(system).options}
    assert not [word for word in start_of(system).options if word.startswith("ash.trial")]


def test_what_is_started_once_has_the_edits_that_were_made_after_its_deploy(system: System, machine: Machine) -> None:
    _, slot = once(system, machine)
    (machine.etc / "edited").write_text("late\n")
    assert machine.running("carry")["carried"] == ["edited"]
    assert (system.root(slot) / "etc/edited").read_text() == "late\n"
    assert machine.running("carry")["changed"] is False
    for other in ("--no-secondary", "--secondary"):
        assert "contradict" in machine.run("deploy", "--once", other, 0, status=USAGE).error


def test_status_names_what_is_started_once(system: System, machine: Machine) -> None:
    start_of(system)
    before = system.ash("--json", "status").json["next"]
    number, slot = once(system, machine)
    status = system.ash("--json", "status").json
    assert (status["next"]["snapshot"], status["next"]["slot"], status["once"]) == (number, slot, True)
    assert f"snapshot {number} ({slot}), once; then snapshot {before['snapshot']}" in system.ash("status").stdout
    assert starred(system) == number
    start_of(system)
    status = system.ash("--json", "status").json
    assert (status["next"], status["once"]) == (before, False)
    machine.running("bless")
    assert "ash_once" not in system.files.grub_cfg.read_text()


def test_a_deployment_that_is_withdrawn_is_not_started_once(system: System, machine: Machine) -> None:
    number, _ = once(system, machine)
    machine.running("deploy", "--no-secondary", number)
    assert "once" not in system.notes()
    assert system.ash("--json", "status").json["once"] is False
    system.is_sound()


def test_a_deployment_without_tries_leaves_no_notes_of_the_one_before(
    system: System, machine: Machine, other: int
) -> None:
    (machine.etc / "ash.conf").write_text("boot_tries::0\n")
    for _ in range(3):
        machine.running("deploy", system.clone())
    assert system.notes() == {}
    system.is_sound()


def test_the_rescue_menu_counts_nothing(system: System, machine: Machine, other: int) -> None:
    new, text = system.files.default_slot(), system.files.grub_cfg.read_text()
    opened = system.grub(text, spend=True, rescue=True)
    assert opened.slot == new
    assert not [word for word in opened.options if word.startswith(("ash.trial", "ash.fellback"))]
    assert system.notes()["try_n"] == "3"


def test_a_deployment_that_is_known_to_boot_is_not_bad_because_of_an_old_menu(system: System, machine: Machine) -> None:
    """An older grub.cfg, from the rescue menu, may say that this deployment did not start."""
    (one,) = [one for slot, one in deployments(system).items() if slot == machine.slot]
    number = system.clone()
    machine.running("deploy", number, "--secondary")
    patch = f"ash.kernel_options = lambda: {{'ash.fellback': {one['id']!r}}}"
    patch += "; ash.System.booted_slot = property(lambda self: 'deploy-secondary')"
    answer = json.loads(machine.run("--json", "bless", patch=patch).stdout)
    assert answer["fell_back_from"] is None
    assert system.files.default_slot() == machine.slot
    assert "did not start" not in system.ash("status").stdout


@pytest.mark.parametrize(
    "block",
    [None, b"", b"x", bytes(range(256)) * (BLOCK_SIZE // 256), Countdown("ash-0123456789abcdef", "3").block],
    ids=["none", "empty", "short", "noise", "of another disk"],
)
def test_damaged_notes_are_found_and_written_again(
    system: System, machine: Machine, other: int, block: bytes | None
) -> None:
    system.write_notes(block)
    if block is not None and len(block) == BLOCK_SIZE and block.startswith(b"#"):
        assert starts(system) == machine.slot, "GRUB starts what is known to boot"
    assert "EFI partition" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    assert system.notes()["try_n"] == "3"
    assert starts(system) == system.files.default_slot()
    system.is_sound()


def test_a_deploy_that_cannot_have_grub_count_changes_nothing(system: System, machine: Machine, tmp_path: Path) -> None:
    number, before = system.clone(), system.files.grub_cfg.read_bytes()
    (machine.etc / "issue").write_text("edited\n")
    system.shell(number, "echo changed > /etc/issue")
    system.write_notes(None)
    (free,) = re.findall(r"([\d ]+) bytes free", program("mdir", "-i", system.drive, "::"))
    (tmp_path / "filler").write_bytes(bytes(int(free.replace(" ", ""))))
    program("mcopy", "-i", system.drive, tmp_path / "filler", "::filler")
    try:
        conflicts = set(system.files.var.glob("lib/ash/conflicts/*"))
        assert "GRUB's notes" in machine.run("deploy", number, status=FAILED).error
        assert system.files.grub_cfg.read_bytes() == before
        assert set(system.files.var.glob("lib/ash/conflicts/*")) == conflicts
        assert not system.remains()
    finally:
        program("mdel", "-i", system.drive, "::filler")
    machine.running("deploy", number)
    assert system.notes()["try_n"] == "3"
    system.is_sound()


@pytest.mark.parametrize("kind", ["text", "directory", "link"])
def test_a_damaged_note_on_what_did_not_start_is_found_and_prevents_nothing(
    system: System, machine: Machine, other: int, kind: str
) -> None:
    bad, new = system.files.state / "bad", system.files.default_slot()
    bad.unlink(missing_ok=True)
    if kind == "text":
        bad.write_text("[{}]\n")
    elif kind == "directory":
        bad.mkdir()
    else:
        bad.symlink_to("/etc/passwd")
    assert "what did not start, is damaged" in system.ash("fsck", status=FAILED).stdout
    fails_to_start(machine)
    assert system.files.default_slot() == machine.slot != new
    system.ash("fsck", "--repair")
    system.is_sound()


def test_a_directory_in_the_place_of_the_notes_is_replaced(system: System, machine: Machine) -> None:
    system.write_notes(None)
    program("mmd", "-i", system.drive, NOTES)
    program("mcopy", "-i", system.drive, "-", f"{NOTES}/inside", input="x")
    assert "EFI partition" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    machine.running("deploy", system.clone())
    assert system.notes()["try_n"] == "3"
    assert starts(system) == system.files.default_slot()


def test_a_file_in_the_place_of_the_directory_of_the_notes_is_named(system: System, machine: Machine) -> None:
    program("mdeltree", "-i", system.drive, "::/ash")
    program("mcopy", "-i", system.drive, "-", "::/ash", input="x")
    try:
        said = machine.run("deploy", system.clone(), status=FAILED).error
        assert re.search(r"GRUB's notes.*: \S.*\(have it writable, with room for ash/", said), said
    finally:
        program("mdel", "-i", system.drive, "::/ash")
        system.ash("fsck", "--repair")
    system.is_sound()


def test_without_fat_and_mtools_the_message_names_what_to_install(system: System, machine: Machine) -> None:
    patch = "import shutil; shutil.which = lambda *_, **__: None"
    assert "(install mtools)" in machine.run("deploy", system.clone(), status=REFUSED, patch=patch).error


def test_a_partition_that_is_mounted_read_only_is_named(system: System, machine: Machine, tmp_path: Path) -> None:
    """A tmpfs stands for the FAT file system, which not every kernel has."""
    program("mount", "-t", "tmpfs", "-o", "ro", "ash-test", tmp_path)
    fake = f"""
ash.EfiPartition._is_node_of = staticmethod(lambda one, _: one.target == {str(tmp_path)!r})
ours = ash.mounts
ash.mounts = lambda: [one._replace(kind="vfat") if one.source == "ash-test" else one for one in ours()]
"""
    try:
        assert "Read-only file system" in machine.run("deploy", system.clone(), status=FAILED, patch=fake).error
        assert f"{tmp_path} is mounted read-only" in machine.run("fsck", status=FAILED, patch=fake).stdout
    finally:
        program("umount", tmp_path)
    assert machine.run("fsck").stdout == "no problems found\n"


@pytest.fixture
def without_partition(system: System, machine: Machine) -> Iterator[Machine]:
    """A system that does not find its EFI partition."""
    efi = system.files.state / "efi"
    before = efi.read_text()
    efi.write_text("0000-0000\n")
    yield machine
    efi.write_text(before)
    system.ash("fsck", "--repair")


def test_a_missing_partition_stops_a_deploy_and_fsck_goes_on_without(
    system: System, without_partition: Machine
) -> None:
    machine = without_partition
    system.ash("recover")
    number, before = system.clone(), system.files.grub_cfg.read_bytes()
    assert "EFI partition 0000-0000" in machine.run("deploy", number, status=REFUSED).error
    assert system.files.grub_cfg.read_bytes() == before
    assert "0000-0000, where GRUB counts, is missing" in system.ash("fsck", status=FAILED).stdout
    (system.files.state / "efi").unlink()
    assert "not automatic" in system.ash("status").stdout
    machine.running("deploy", number)
    assert "try_n" not in system.files.grub_cfg.read_text()
    assert "--secondary" in machine.run("deploy", number, "--once", status=REFUSED).error


@pytest.mark.parametrize("record", ["missing", "damaged"])
def test_fsck_has_grub_count_where_the_partition_is_not_recorded(
    system: System, without_partition: Machine, record: str
) -> None:
    (system.files.state / "efi").unlink()
    if record == "damaged":
        (system.files.state / "efi/inside").mkdir(parents=True)
    system.write_notes(None)
    assert "does not count" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    without_partition.running("deploy", system.clone())
    assert system.notes()["try_n"] == "3"
    system.is_sound()


def test_health_checks_are_programs_in_known_directories(tmp_path: Path) -> None:
    for directory in (*REQUIRED_CHECKS, *AFTER_SUCCESS):
        (tmp_path / directory).mkdir(parents=True)
    ours, theirs = tmp_path / REQUIRED_CHECKS[0], tmp_path / REQUIRED_CHECKS[1]
    (ours / "10-good").write_text("#!/bin/sh\nexit 0\n")
    (ours / "10-good").chmod(0o755)
    (ours / "README").write_text("not a program\n")
    (theirs / "20-bad.sh").write_text("exit 1\n")
    found = {path.name: passes(path) for path in programs_in(tmp_path, REQUIRED_CHECKS)}
    assert found == {"10-good": True, "20-bad.sh": False}


def test_a_required_check_that_is_not_there_fails_and_what_is_no_program_is_named(tmp_path: Path) -> None:
    directory = tmp_path / REQUIRED_CHECKS[0]
    directory.mkdir(parents=True)
    (directory / "gone").symlink_to("nothing")
    (directory / "README").write_text("x")
    (found,) = programs_in(tmp_path, REQUIRED_CHECKS)
    assert (found.name, passes(found)) == ("gone", False)
    assert [path.name for path in not_programs_in(tmp_path, REQUIRED_CHECKS)] == ["README"]


def test_health_is_for_the_running_system(system: System) -> None:
    system.ash("health", status=USAGE)


def test_the_uuid_of_a_fat_file_system_is_read_as_fstab_spells_it() -> None:
    sector = bytearray(512)
    assert fat_uuid(bytes(sector)) == ""
    sector[82:90], sector[67:71] = b"FAT32   ", bytes([0x0F, 0x1B, 0xBA, 0x0D])
    assert fat_uuid(bytes(sector)) == "0DBA-1B0F"


def test_boots_are_only_for_deployments(system: System) -> None:
    assert "no deployment" in system.ash("bless", status=REFUSED).error
    assert system.ash("status", status=DONE)
