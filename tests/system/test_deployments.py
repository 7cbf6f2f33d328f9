# SPDX-License-Identifier: AGPL-3.0-or-later
"""Deployments, from the first to the tenth."""

import json
import re
from pathlib import Path

import pytest

from tests.support import FAILED, REFUSED, program
from tests.system.disk_system import Machine, System, open_system

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]


def menu_titles(system: System) -> list[str]:
    return re.findall(r"^menuentry '(.*)' --id", system.files.grub_cfg.read_text(), re.MULTILINE)


def test_ten_deploys_in_a_row_work_like_the_first(system: System, snapshot: int) -> None:
    last_booted = system.id_of("deploy")
    ids = set()
    for time in range(10):
        number = snapshot if time % 3 else system.clone()
        system.shell(number, f"echo {time} > /etc/time; echo {time} > /usr/time")
        answer = system.ash("--json", "deploy", number).json
        ids.add(answer["id"])
        slot = system.boots()
        root = system.root(slot)
        assert slot == answer["slot"] == system.files.default_slot()
        assert (root / "etc/time").read_text() == (root / "usr/time").read_text() == f"{time}\n"
        assert (root / "usr/share/ash/snap").read_text() == f"{number}\n"
        assert (system.files.etc(slot) / "time").read_text() == f"{time}\n"
        assert f"snapshot {number}: " in menu_titles(system)[0]
        assert answer["id"] in system.files.grub_cfg.read_text()
        assert system.id_of("deploy") == last_booted
        assert not system.remains()
    assert len(ids) == 10
    system.is_sound()


def test_a_deployment_is_the_snapshot_and_what_it_needs_to_boot(system: System, snapshot: int) -> None:
    system.shell(snapshot, "rm -rf /usr/lib/systemd/system/ash-*.service /boot/efi; echo mine > /etc/mine")
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    root = system.root(slot)
    assert (root / "etc/mine").read_text() == "mine\n"
    assert (root / "usr/bin/ash").is_symlink()
    assert (root / "usr/lib/systemd/system/ash-protect.service").is_file()
    assert (root / "boot/efi").is_dir()
    assert "VARIANT_ID=ashos" in (root / "usr/lib/os-release").read_text() + (root / "etc/os-release").read_text()
    assert not (system.root(snapshot) / "usr/share/ash/snap").exists(), "it counts in a deployment only"


def test_fstab_of_the_user_is_kept(system: System, snapshot: int) -> None:
    system.shell(
        snapshot,
        "echo 'LABEL=data /data ext4 nofail 0 2 # mine' >> /etc/fstab; "
        "sed -i 's/^tmpfs .tmp .*/tmpfs \\/tmp tmpfs size=9g 0 0/' /etc/fstab",
    )
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    text = (system.root(slot) / "etc/fstab").read_text()
    assert "LABEL=data /data ext4 nofail 0 2 # mine" in text.splitlines()
    assert len(re.findall(r" /boot/efi ", text)) == 1
    assert text.count(" /tmp ") == text.count("tmpfs /tmp tmpfs size=9g 0 0") == 1
    assert len(re.findall(r" / btrfs ", text)) == 1


def test_deploying_an_unchanged_snapshot_again_changes_nothing(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    with system.nothing_changes():
        answer = system.ash("--json", "deploy", snapshot).json
    assert answer["changed"] is False
    system.shell(snapshot, "touch /etc/mark")
    assert system.ash("--json", "deploy", snapshot).json["changed"] is True


def test_deploy_asks_for_a_reboot_and_prints_the_number_with_q(system: System, snapshot: int) -> None:
    assert "reboot" in system.ash("deploy", snapshot).stdout
    assert system.ash("-q", "deploy", 0).stdout == "0\n"


def test_a_secondary_deployment_adds_an_entry(system: System, snapshot: int) -> None:
    system.ash("deploy", 0)
    first = menu_titles(system)[0]
    system.shell(snapshot, "echo second > /etc/which")
    answer = system.ash("--json", "deploy", snapshot, "--secondary").json
    assert answer["slot"].endswith("-secondary")
    assert menu_titles(system)[0] == first
    assert any(f"snapshot {snapshot}: " in title and "secondary" in title for title in menu_titles(system)[1:])
    assert (system.root(answer["slot"]) / "etc/which").read_text() == "second\n"
    system.boots()
    assert f"snapshot {snapshot} is deployed" in system.ash("-y", "del", snapshot, status=5).error


def test_a_secondary_deployment_is_shown_and_can_be_taken_back(system: System, snapshot: int) -> None:
    slot = system.ash("--json", "deploy", snapshot, "--secondary").json["slot"]
    rows = {row["snapshot"]: row["secondary"] for row in system.ash("--json", "tree").json["tree"]}
    assert {"snapshot": snapshot, "slot": slot} in system.ash("--json", "status").json["secondary"]
    assert (rows[snapshot], rows[0]) == (True, False)
    assert any(f" {snapshot} - " in line and "[secondary]" in line for line in system.ash("tree").stdout.splitlines())
    assert f"secondary:    snapshot {snapshot} ({slot})\n" in system.ash("status").stdout
    with system.nothing_changes():
        system.ash("--dry-run", "deploy", snapshot, "--no-secondary")
    assert f"ash deploy {snapshot} --no-secondary" in system.ash("-y", "del", snapshot, status=REFUSED).error
    (system.root(slot) / "etc/only-there").write_text("x\n")
    killed = system.with_hooks({"kill": f"delete snapshot-{slot}"}, "deploy", snapshot, "--no-secondary")
    assert "/etc: only-there" in killed.stderr
    assert not any(f"snapshot {snapshot}: " in title for title in menu_titles(system))
    system.ash("recover")
    assert not [path for path in system.subvolumes() if path.endswith(slot)]
    assert list((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*/etc/only-there"))
    assert not system.remains()
    answer = system.ash("--json", "deploy", snapshot, "--no-secondary").json
    assert (answer["changed"], answer["slot"]) == (False, "")
    assert "would change nothing" in system.ash("--dry-run", "deploy", snapshot, "--no-secondary").stdout
    system.ash("deploy", snapshot, "--secondary")
    answer = system.ash("--json", "deploy", snapshot, "--no-secondary").json
    assert (answer["changed"], answer["slot"]) == (True, slot)
    system.ash("-y", "del", snapshot)


def test_a_secondary_deployment_that_is_mounted_is_taken_back_and_deleted_later(
    system: System, snapshot: int, tmp_path: Path
) -> None:
    slot = system.ash("--json", "deploy", snapshot, "--secondary").json["slot"]
    program("mount", "--bind", system.root(slot), tmp_path)
    try:
        system.ash("deploy", snapshot, "--no-secondary")
        assert not [title for title in menu_titles(system) if f"snapshot {snapshot}: " in title]
        system.ash("deploy", snapshot)
        assert (tmp_path / "etc/passwd").exists()
    finally:
        program("umount", tmp_path)
    system.ash("recover")
    assert not system.remains()


def test_a_secondary_deployment_that_was_booted_stays(system: System, snapshot: int) -> None:
    slot = system.ash("--json", "deploy", snapshot, "--secondary").json["slot"]
    menu = json.loads((system.files.state / "menu").read_text())
    (system.files.state / "menu").write_text(json.dumps({**menu, "last_booted": slot}))
    before = system.id_of(slot)
    assert system.ash("--json", "deploy", system.clone(), "--secondary").json["slot"] != slot
    assert system.id_of(slot) == before
    now = json.loads((system.files.state / "menu").read_text())
    (system.files.state / "menu").write_text(json.dumps({**now, "last_booted": menu["last_booted"]}))
    system.ash("recover")


def test_a_snapshot_without_a_kernel_cannot_be_deployed(system: System, snapshot: int) -> None:
    system.shell(snapshot, "rm -f /boot/vmlinuz* /boot/initrd*")
    with system.nothing_changes():
        assert "no kernel" in system.ash("deploy", snapshot, status=FAILED).error


def test_a_snapshot_with_broken_grub_settings_cannot_be_deployed(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo 'exit 7' >> /etc/default/grub")
    with system.nothing_changes():
        assert f"snapshot {snapshot} cannot be booted" in system.ash("deploy", snapshot, status=FAILED).error
    system.boots()


def test_kernel_options_of_the_snapshot_are_used(system: System, snapshot: int) -> None:
    system.shell(
        snapshot,
        "cd /etc/default; echo 'GRUB_CMDLINE_LINUX=\"quiet console=ttyS0\"' >> grub; echo GRUB_TIMEOUT=77 >> grub",
    )
    system.ash("deploy", snapshot)
    text = system.files.grub_cfg.read_text()
    assert re.search(r"^ *linux .* quiet ", text, re.MULTILINE)
    assert "set timeout=77" in text


def test_the_users_own_entries_are_in_the_menu(system: System, snapshot: int) -> None:
    system.shell(
        snapshot, "printf '%s\\n' \"menuentry 'Memory {test}' {\" '    linux16 /memtest' '}' >> /etc/grub.d/40_custom"
    )
    system.ash("deploy", snapshot)
    assert "menuentry 'Memory {test}' {" in system.files.grub_cfg.read_text()
    program("grub-script-check", system.files.grub_cfg)


@pytest.mark.parametrize("text", ["it's $HOME; reboot", "} menuentry 'x' {", 'a "b" \\'])
def test_hostile_descriptions_do_not_break_the_menu(system: System, snapshot: int, text: str) -> None:
    system.ash("desc", snapshot, "--", text)
    system.ash("deploy", snapshot)
    program("grub-script-check", system.files.grub_cfg)
    system.boots()


def test_nested_subvolumes_in_a_slot_do_not_break_a_deploy(system: System, snapshot: int) -> None:
    for time in range(4):
        for slot in ("deploy-aux", "deploy-spare"):
            if system.root(slot).exists():
                program("btrfs", "subvolume", "create", system.root(slot) / f"usr/nested-{time}")
                program("btrfs", "subvolume", "create", system.root(slot) / f"usr/nested-{time}/deep")
        system.shell(snapshot, f"echo {time} > /etc/time")
        slot = system.ash("--json", "deploy", snapshot).json["slot"]
        assert (system.root(slot) / "etc/time").read_text() == f"{time}\n"
        assert not list((system.root(slot) / "usr").glob("nested-*"))
        assert not system.remains()
    assert not any(f"snapshot-{slot}/usr/nested" in path for path in system.subvolumes())


def test_a_snapshot_with_a_nested_subvolume_is_deployed_and_copied(system: System, snapshot: int) -> None:
    system.shell(snapshot, "btrfs subvolume create /opt/nested; echo x > /opt/nested/x; touch /etc/mark")
    copy = system.clone(snapshot)
    slot = system.ash("--json", "deploy", copy).json["slot"]
    assert (system.root(slot) / "etc/mark").exists()
    system.shell(snapshot, "echo y > /etc/mark")
    system.shell(snapshot, "echo z > /etc/mark")
    system.ash("deploy", 0)
    assert not system.remains()
    system.is_sound()


def test_foreign_files_in_a_slot_vanish_with_the_next_deploy(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    (system.root("deploy-aux") / "usr/foreign").touch()
    system.shell(snapshot, "touch /etc/mark")
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    assert not (system.root(slot) / "usr/foreign").exists()


def test_the_last_menus_are_kept(system: System, snapshot: int) -> None:
    for time in range(3):
        system.shell(snapshot, f"echo {time} > /etc/time")
        system.ash("deploy", snapshot)
    kept = sorted(path.name for path in system.files.grub_cfg.parent.glob("grub.cfg.*"))
    assert "grub.cfg.1" in kept
    assert len(kept) <= 5


def test_a_password_in_the_menu_is_kept_and_only_root_can_read_it(system: System, snapshot: int) -> None:
    users = "set superusers=root\npassword_pbkdf2 root grub.pbkdf2.sha512.10000.AA.BB\n"
    script = f"#!/bin/sh\ncat <<END\n{users}END\n"
    system.shell(
        snapshot,
        f"printf %s '{script}' > /etc/grub.d/01_password; chmod 700 /etc/grub.d/01_password; "
        "sed -i 's/^CLASS=\"/&--unrestricted /' /etc/grub.d/10_linux; echo GRUB_TIMEOUT_STYLE=hidden >> /etc/default/grub",
    )
    for number in (snapshot, system.clone(snapshot)):  # mkconfig runs for the first one only
        slot = system.ash("--json", "deploy", number).json["slot"]
        text = system.files.grub_cfg.read_text()
        program("grub-script-check", system.files.grub_cfg)
        assert text.index(users) < text.index("menuentry '")
        assert "set timeout_style=hidden\n    set timeout=5\n" in text
        for entry in re.findall(r"^menuentry .* --id .*", text, re.MULTILINE):
            assert "--unrestricted" in entry, entry
        assert "grub.pbkdf2" not in (system.files.state / "menu").read_text(), "all can read it"
        assert (system.root(slot) / "usr/share/ash/menu").stat().st_mode & 0o077 == 0
    (system.root(slot) / "usr/share/ash/menu").unlink()
    system.ash("recover")
    assert "set timeout=" in system.files.grub_cfg.read_text()
    system.ash("boot", number)
    assert users in system.files.grub_cfg.read_text()


def test_a_broken_grub_cfg_is_rewritten(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    system.files.grub_cfg.write_text("broken")
    system.ash("recover")
    system.boots()


def test_rollback_on_an_image_keeps_the_last_booted_deployment(system: System, snapshot: int) -> None:
    system.shell(snapshot, "echo broken > /etc/which")
    system.ash("deploy", snapshot)
    (system.root("deploy") / "etc/edited").write_text("in the running system\n")
    answer = system.ash("--json", "rollback").json
    kept = answer["snapshot"]
    assert kept in system.files.tree()
    assert (system.root(kept) / "etc/edited").read_text() == "in the running system\n"
    assert not (system.root(kept) / "etc/which").exists()
    assert not (system.root(kept) / "usr/share/ash/snap").exists()
    slot = system.boots()
    assert slot == answer["slot"] != "deploy"
    assert (system.root(slot) / "etc/edited").exists()
    (system.root("deploy") / "etc/edited").unlink()
    system.is_sound()


def test_the_menu_file_and_grub_cfg_agree(system: System, snapshot: int) -> None:
    system.ash("deploy", snapshot)
    menu = json.loads((system.files.state / "menu").read_text())
    assert menu["default"] == system.boots()
    assert menu["last_booted"] == "deploy"
    assert Path(system.files.grub_cfg).stat().st_mode & 0o077 == 0


def test_a_slot_as_default_subvolume_does_not_break_a_deploy(system: System, snapshot: int) -> None:
    for time in range(3):
        program("btrfs", "subvolume", "set-default", str(system.id_of("deploy-aux")), system.files.top)
        system.shell(snapshot, f"echo {time} > /etc/time")
        slot = system.ash("--json", "deploy", snapshot).json["slot"]
        assert (system.root(slot) / "etc/time").read_text() == f"{time}\n"
        assert not system.remains()
    assert "ID 5 " in program("btrfs", "subvolume", "get-default", system.files.top)


def run_again(system: System, slot: str) -> Machine:
    """The machine with another deployment booted, as chosen in the menu."""
    path = system.files.state / "menu"
    path.write_text(json.dumps({**json.loads(path.read_text()), "last_booted": slot}))
    return Machine(system)


def test_a_slot_with_changes_that_no_other_has_is_taken_last(machine: Machine) -> None:
    system, first = machine.system, machine.slot
    (machine.etc / "carried").touch()
    second = machine.running("deploy", system.clone())["slot"]
    (system.root(second) / "etc/only-in-second").write_text("x\n")  # it ran
    run_again(system, first)
    third = machine.running("deploy", system.clone())["slot"]
    assert len({first, second, third}) == 3
    assert machine.running("deploy", system.clone())["slot"] == third, "all changes of the third are the first's"
    (system.root(third) / "etc/only-in-third").touch()
    done = machine.run("deploy", system.clone())
    assert "only-in-second" in done.stderr
    assert "carried" not in done.stderr.partition("changes of /etc")[2]
    (kept,) = (system.files.var / "lib/ash/conflicts").glob("*/etc/only-in-second")
    assert kept.read_text() == "x\n"
    assert (system.root(third) / "etc/only-in-third").exists()
    # What is carried elsewhere, or is the same elsewhere, is not the only one.
    (system.root(third) / "etc/only-in-third").unlink()
    (machine.etc / "carried").write_text("2\n")
    (system.root(third) / "etc/carried").write_text("2\n")
    assert machine.running("deploy", system.clone())["slot"] in (second, third)
    assert not system.remains()


def test_a_subvolume_in_the_waiting_deployment_survives_the_carry(machine: Machine) -> None:
    system, first = machine.system, machine.slot
    second = machine.running("deploy", system.clone())["slot"]
    inside = system.root(second) / "etc/data"
    program("btrfs", "subvolume", "create", inside)  # it ran
    (inside / "precious").write_text("x\n")
    run_again(system, first)
    (machine.etc / "edit").touch()
    said = machine.run("carry", status=REFUSED).stderr
    assert f"/etc/data of snapshot-{second} is a subvolume: nothing is carried over" in said
    assert (inside / "precious").read_text() == "x\n"
    (inside / "precious").unlink()
    machine.running("carry")
    assert (machine.next_etc / "edit").exists()


def test_a_deployment_that_is_kept_for_its_changes_alone_can_be_deleted(image: Path, tmp_path: Path) -> None:
    with open_system(image, tmp_path) as system:  # whose other slots are free
        machine, other = Machine(system), system.clone()
        first = machine.boot()
        second = machine.running("deploy", other)["slot"]
        (system.root(second) / "etc/only-in-second").write_text("x\n")  # it ran
        run_again(system, first)
        machine.running("deploy", system.clone())
        assert f"ash deploy {other} --no-secondary" in system.ash("-y", "del", other, status=REFUSED).error
        done = machine.run("deploy", other, "--no-secondary")
        assert "only-in-second" in done.stderr
        assert list((system.files.var / "lib/ash/conflicts").glob(f"{other}-*/etc/only-in-second"))
        system.ash("-y", "del", other)
        assert not system.remains()
        assert not [path for path in system.subvolumes() if path.endswith(f"snapshot-{second}")]


def test_what_a_deployment_has_of_its_own_stays_known_after_a_carry_into_it(machine: Machine) -> None:
    """It ran and was edited, then the machine was started into the former one again, where /etc was edited too."""
    system, first, other = machine.system, machine.slot, machine.system.clone()
    system.ash("mutable", other)
    second = machine.running("deploy", other)["slot"]
    (system.root(second) / "etc/only-in-second").write_text("x\n")
    (system.root(second) / "opt/file").touch()
    run_again(system, first)
    only_there = {"slot": second, "snapshot": other, "paths": ["only-in-second"]}
    assert only_there in machine.running("status")["only_there"]
    line = f"only there:   changes of /etc in {second} (snapshot {other}): only-in-second\n"
    assert line in machine.run("status").stdout
    (machine.etc / "later").touch()
    assert machine.running("carry")["carried"] == ["later"]
    assert only_there in machine.running("status")["only_there"]
    third = machine.running("deploy", system.clone())["slot"]
    assert third not in (first, second)
    (system.root(third) / "etc/only-in-second").write_text("x\n")
    there = machine.running("status")["only_there"]
    assert "only-in-second" not in {path for one in there for path in one["paths"]}, "two have it"
    (system.root(third) / "etc/only-in-second").unlink()
    (system.root(third) / "etc/only-in-third").touch()
    assert machine.running("deploy", system.clone())["slot"] == third, "changes outside of /etc are not kept aside"
    for path in ("etc/only-in-second", "opt/file"):
        (system.root(second) / path).unlink()
    system.ash("immutable", other)


def test_changes_stay_known_when_the_deployment_that_they_were_made_in_is_replaced(image: Path, tmp_path: Path) -> None:
    """The deployment into which they were carried never ran, and is then the only one that has them."""
    with open_system(image, tmp_path) as system:  # whose other slots are free
        machine = Machine(system)
        first = machine.boot()
        second = machine.running("deploy", system.clone())["slot"]
        (machine.etc / "only-in-first").touch()
        run_again(system, second)
        (machine.etc / "precious").write_text("x\n")
        third = machine.running("deploy", system.clone())["slot"]
        run_again(system, first)
        replaced = machine.running("deploy", system.clone())["slot"]
        assert first not in (second, third, replaced)
        (left,) = {second, third} - {replaced}
        only_there = machine.running("status")["only_there"]
        assert [one["paths"] for one in only_there if one["slot"] == left] == [["precious"]]
        (system.root(replaced) / "etc/only-in-this").touch()
        said = "".join(machine.run("deploy", system.clone()).stderr for _ in range(2))
        assert ("precious" in said) == (not (system.root(left) / "etc/precious").exists())
        kept = list((system.files.var / "lib/ash/conflicts").glob("*/etc/precious"))
        assert [path.read_text() for path in kept] == ["x\n"] * ("precious" in said)


def test_all_free_slots_have_changed_mutable_deployments(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    system.ash("mutable", other)
    slots = set()
    for _ in range(2):
        slot = machine.running("deploy", other, "--secondary")["slot"]
        (system.root(slot) / "opt/file").touch()
        slots.add(slot)
        (system.root(slot) / "usr/local/file").touch()
    assert len(slots) == 2
    with system.nothing_changes():
        for words in (("deploy",), ("--dry-run", "deploy")):
            error = machine.run(*words, other, "--secondary", status=REFUSED).error
            assert " and 1 more" in error
            assert "/opt/file" in error or "/usr/local/file" in error
        assert "/opt/file" in machine.run("deploy", other, "--no-secondary", status=REFUSED).error
    said = machine.run("deploy", other, "--secondary", "--fresh").stdout
    assert "/opt/file" in said
    assert "/usr/local/file" in said
    assert "/opt/file" in machine.run("deploy", other, "--no-secondary", "--fresh").stderr
    system.ash("immutable", other)


def test_nothing_is_carried_from_another_deployment_in_the_same_slot(machine: Machine) -> None:
    system = machine.system
    second = machine.running("deploy", system.clone(), "--secondary")["slot"]
    run_again(system, second)
    default = machine.running("deploy", system.clone())["slot"]
    machine.boot()
    machine.running("deploy", system.clone(), "--secondary")
    machine.running("deploy", system.clone(), "--secondary")
    run_again(system, second)
    (machine.etc / "later").touch()
    assert machine.running("carry")["changed"] is False
    assert not (system.root(default) / "etc/later").exists()
    for number in {one["snapshot"] for one in machine.running("status")["secondary"]}:
        run_again(system, default)
        machine.running("deploy", number, "--no-secondary")


def test_passwords_of_the_menu_that_are_lost_are_made_again(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    system.shell(
        other,
        "printf 'set superusers=me\\npassword me secret\\n' > /etc/grub.d/01_users.txt; "
        "printf '#!/bin/sh\\ncat /etc/grub.d/01_users.txt\\n' > /etc/grub.d/01_users; chmod 755 /etc/grub.d/01_users",
    )
    root = system.root(machine.running("deploy", other)["slot"])
    for command in ("recover", "fsck"):
        (root / "usr/share/ash/menu").unlink()
        if command == "fsck":
            assert "usr/share/ash/menu of" in system.ash("fsck", status=FAILED).stdout
        system.ash(command, *["--repair"] * (command == "fsck"))
        assert "password me secret" in system.files.grub_cfg.read_text()
        assert (root / "usr/share/ash/menu").stat().st_mode & 0o777 == 0o600
    system.is_sound()


# The system of the tests is not that of this machine, where alone ash notes what runs.
NOTING = """\
note_boot = ash.System.note_boot
def as_running(system):
    system.running = True
    note_boot(system)
    system.running = False
ash.System.note_boot = as_running
"""


def test_a_changed_mutable_deployment_is_not_replaced_unasked(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    system.ash("deploy", snapshot, "--fresh-etc")
    machine = Machine(system)
    machine.boot()
    root = system.root(machine.slot)
    (machine.etc / "edited").touch()
    assert machine.running("deploy", snapshot)["changed"] is True, "/etc is carried"
    (root / "opt/file").touch()
    note = system.files.state / "booted"
    machine.run("recover", patch=NOTING)  # the boot could not, such as on a full disk
    assert json.loads(note.read_text())["slot"] == machine.slot
    note.unlink()
    with system.nothing_changes():
        error = machine.run("deploy", snapshot, status=REFUSED).error
    assert "/opt/file" in error
    assert "ash rollback" in error
    machine.running("deploy", snapshot, "--fresh")
    kept = machine.running("rollback")["snapshot"]
    assert (system.root(kept) / "opt/file").exists()
    (root / "opt/file").unlink()
    (root / "usr/bin/env").unlink()
    assert "/usr/bin/env" in machine.run("deploy", snapshot, status=REFUSED).error
    system.shell(snapshot, "touch /usr/bin/before-env")  # which the deployment never had
    assert "/usr/bin/env" in machine.run("deploy", snapshot, status=REFUSED).error
    system.shell(snapshot, "rm /usr/bin/before-env")  # now no snapshot is what the deployment was made from
    assert "/usr/bin/env" in machine.run("deploy", snapshot, status=REFUSED).error
    machine.running("deploy", system.clone())  # another one
    for number in (snapshot, kept):
        system.ash("immutable", number)


def test_a_deploy_without_the_menu_file_is_refused_until_it_is_rebuilt(machine: Machine) -> None:
    system, running = machine.system, machine.slot
    other = system.clone()
    (system.files.state / "menu").unlink()
    assert "ash fsck --repair" in system.ash("deploy", other, status=REFUSED).error
    system.ash("fsck", "--repair")
    machine.deploy(other)
    assert f"/snapshot-{running}/boot/" in system.files.grub_cfg.read_text(), "there is no way back"
