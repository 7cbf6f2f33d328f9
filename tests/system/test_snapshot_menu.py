# SPDX-License-Identifier: AGPL-3.0-or-later
"""GRUB's submenu with all snapshots follows the tree. tests/campaigns/test_menu.py starts them."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.support import FAILED, REFUSED, program
from tests.system.disk_system import Machine, System

pytestmark = [pytest.mark.system, pytest.mark.budget(45)]

HOSTILE = [
    "it's",
    '"quoted" ${root} $(reboot) `x`',
    "} menuentry {",
    "\\",
    "\x1b[31mred",
    "ünïcode",
    "--id ash-snapshot-0",
]


def submenu(system: System) -> Path:
    """The file that GRUB reads when the submenu is opened."""
    return system.files.grub_cfg.with_name("snapshots.cfg")


def shown(system: System) -> dict[int, str]:
    """The titles in the submenu, by number, as GRUB's own script language reads them."""
    text = submenu(system).read_text()
    titles = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("menuentry ")]
    return {int(title.split()[0]): title for title in titles}


def is_readable(system: System) -> None:
    """Assert that GRUB can parse the submenu, and that what an entry starts is there."""
    file = submenu(system)
    program("grub-script-check", file)
    paths = re.findall(r"^    (?:linux|initrd) (/\S+)", file.read_text(), re.MULTILINE)
    assert len(paths) == 2 * len(shown(system))
    for path in paths:
        assert (system.files.top / path[1:]).stat().st_size > 1 << 20
    for number in shown(system):
        init = system.root(number) / "usr/share/ash/init"
        assert init.stat().st_mode & 0o777 == 0o755


def test_all_snapshots_are_in_the_order_of_the_tree_and_indented(system: System) -> None:
    first = system.clone()
    second = system.branch(first)
    last, below = system.clone(), system.branch(second)
    titles = list(shown(system).values())
    assert titles[0] == "0 - base snapshot"
    assert [title.split(" - ")[0] for title in titles[-4:]] == [f"{first}", f"  {second}", f"    {below}", f"{last}"]
    is_readable(system)


@pytest.mark.parametrize("description", HOSTILE)
def test_descriptions_are_data(system: System, snapshot: int, description: str) -> None:
    system.ash("desc", snapshot, description)
    assert shown(system)[snapshot] == f"{snapshot} - {description}".replace("\x1b", "?")
    is_readable(system)


def test_a_long_description_is_shortened(system: System, snapshot: int) -> None:
    """GRUB gives up on a file with a word of 8 KiB: it would start nothing at all."""
    system.ash("desc", snapshot, "long'" * 2000)
    assert shown(system)[snapshot].endswith("...")
    is_readable(system)
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    assert system.starts(system.files.grub_cfg.read_text()) == slot


def test_a_snapshot_with_another_init_system_has_what_that_starts_of_ash(system: System, snapshot: int) -> None:
    assert not (system.root(snapshot) / "etc/init.d/ash-carry").exists()
    system.shell(snapshot, "touch /usr/sbin/openrc; mkdir -p /etc/init.d")
    assert (system.root(snapshot) / "etc/runlevels/default/ash-carry").readlink() == Path("/etc/init.d/ash-carry")
    system.shell(snapshot, "rm /etc/runlevels/default/ash-carry")
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    assert (system.root(slot) / "etc/runlevels/default/ash-bless").is_symlink()
    assert not (system.root(slot) / "etc/runlevels/default/ash-carry").is_symlink(), "that is the user's choice"


def test_a_snapshot_leaves_the_menu_before_it_is_deleted(system: System, snapshot: int) -> None:
    below = system.branch(snapshot)
    killed = system.with_hooks({"kill": f"delete snapshot-{snapshot}$"}, "-y", "del", snapshot)
    assert killed.returncode == -signal.SIGKILL
    assert system.root(snapshot).exists()
    assert not {snapshot, below} & shown(system).keys()
    system.ash("recover")
    assert not system.root(snapshot).exists()
    is_readable(system)


def test_a_snapshot_without_a_kernel_is_left_out(system: System, snapshot: int) -> None:
    below = system.branch(snapshot)
    title = shown(system)[below]
    assert "left out" not in system.shell(snapshot, "rm /boot/vmlinuz-*").stderr
    assert snapshot not in shown(system)
    assert shown(system)[below] == title
    system.ash("undo", snapshot)
    assert snapshot in shown(system)
    is_readable(system)


def test_a_snapshot_whose_boot_configuration_fails_is_named_and_tried_again_at_the_next_change(
    system: System, snapshot: int
) -> None:
    probe = r"printf '#!/bin/sh\ntest ! -e /usr/share/fails\n' > /etc/grub.d/99_probe; chmod 755 /etc/grub.d/99_probe"
    failed = system.shell(snapshot, f"{probe}; touch /usr/share/fails")
    assert f"snapshot {snapshot} is left out of the boot menu with all snapshots: grub-mkconfig failed" in failed.stderr
    assert snapshot not in shown(system)
    before = system.id_of(snapshot)
    assert "left out" in system.ash("run", snapshot, "true").stderr
    assert system.id_of(snapshot) == before
    assert not system.shell(snapshot, "rm /usr/share/fails").stderr
    assert snapshot in shown(system)
    is_readable(system)


@pytest.mark.parametrize(
    "script",
    [
        "echo 'menuentry x {' >> /etc/grub.d/40_custom",
        r"printf '#!/bin/sh\necho if\n' > /etc/grub.d/05_x; chmod 755 /etc/grub.d/05_x",
        r"""echo "GRUB_CMDLINE_LINUX='\"one'" >> /etc/default/grub""",
    ],
)
def test_what_grub_cannot_read_gets_into_no_menu(system: System, snapshot: int, script: str) -> None:
    said = system.shell(snapshot, script).stderr
    assert "left out of the boot menu with all snapshots: grub-script-check failed" in said
    is_readable(system)
    before = system.files.grub_cfg.read_text()
    assert "cannot be booted: grub-script-check failed" in system.ash("deploy", snapshot, status=FAILED).error
    assert system.files.grub_cfg.read_text() == before


@pytest.mark.parametrize(
    "script",
    [
        "for f in /boot/vmlinuz-*; do : > $f; done",
        "for f in /boot/initrd.img-*; do : > $f; done",
        "for f in /boot/vmlinuz-*; do mv $f /usr/share/kernel; ln -s /usr/share/kernel $f; done",
    ],
)
def test_what_grub_cannot_load_is_not_deployed(system: System, snapshot: int, script: str) -> None:
    assert "left out of the boot menu" in system.shell(snapshot, script).stderr
    assert "GRUB cannot load" in system.ash("deploy", snapshot, status=FAILED).error
    assert snapshot not in shown(system)


def test_a_deployment_whose_kernel_became_empty_is_repaired(system: System, snapshot: int) -> None:
    slot = system.ash("--json", "deploy", snapshot).json["slot"]
    (kernel,) = (system.root(slot) / "boot").glob("vmlinuz-*")
    program("btrfs", "property", "set", "-ts", system.root(slot), "ro", "false")
    kernel.write_bytes(b"")
    assert "which the boot menu uses" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    assert kernel.stat().st_size > 1 << 20
    system.is_sound()


def test_how_a_kernel_is_started_is_found_out_when_it_has_changed(system: System, snapshot: int) -> None:
    system.shell(snapshot, "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&of_this_snapshot /' /etc/default/grub")
    text = submenu(system).read_text()
    (line,) = [line for line in text.splitlines() if "of_this_snapshot" in line]
    assert f"subvol=@.snapshots_debian/rootfs/snapshot-{snapshot} ro " in line
    assert line.endswith("init=/usr/share/ash/init")
    before = system.id_of(snapshot)
    assert system.ash("--json", "run", snapshot, "true").json["changed"] is False
    assert system.id_of(snapshot) == before


def test_what_is_changed_in_memory_is_named(system: System, machine: Machine, tmp_path: Path) -> None:
    """Faked: that a snapshot runs as it is."""
    number, etc = system.clone(), tmp_path / "etc"
    (machine.etc / "of-the-deployment").write_text("x\n")
    program("cp", "-a", system.root(number) / "etc", etc)
    (etc / "fstab").write_text("without the lines of a deployment\n")
    (etc / "motd").write_text("edited\n")
    (etc / "written").write_text("x\n")
    patch = f"ash.OWN_ETC = ash.Path({str(etc)!r}); ash.System.booted = property(lambda self: {number})"
    drift = json.loads(machine.run("--json", "status", patch=patch).stdout)["drift"]
    assert drift == {"motd": "changed", "written": "added"}
    assert "edited" in machine.run("diff", "--patch", patch=patch).stdout
    said = machine.run("deploy", number, patch=patch).stdout
    assert "carried over from the /etc of the deployment that ran last: of-the-deployment" in said
    assert "not carried over, since the running /etc is in memory: motd, written" in said
    assert "ash etc-update" not in machine.run("etc-update", patch=patch, status=REFUSED).error


def test_fsck_writes_a_lost_menu_again(system: System, snapshot: int) -> None:
    file = submenu(system)
    before = file.read_text()
    for write in (file.unlink, lambda: file.write_text("torn")):
        write()
        assert "the boot menu with all snapshots" in system.ash("fsck", status=FAILED).stdout
        system.ash("fsck", "--repair")
        assert file.read_text() == before
    assert file.stat().st_mode & 0o777 == 0o600


def test_with_a_password_only_the_default_and_the_last_good_deployment_start_without(
    system: System, snapshot: int
) -> None:
    script = r"printf '#!/bin/sh\necho set superusers=root\necho password root secret\n' > /etc/grub.d/01_password"
    system.shell(snapshot, f"{script}; chmod 700 /etc/grub.d/01_password")
    system.ash("deploy", snapshot)
    system.ash("deploy", snapshot, "--secondary")
    text = system.files.grub_cfg.read_text()
    assert "set superusers=root" in text
    entries = {line.split("'")[1]: line for line in text.splitlines() if line.startswith(("menuentry '", "submenu '"))}
    free = [title for title, line in entries.items() if "--unrestricted" in line]
    assert len(free) == 2, entries
    assert not any("secondary" in title for title in free)
    assert "--unrestricted" not in submenu(system).read_text()
