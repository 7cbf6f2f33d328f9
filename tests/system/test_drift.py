# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changes to the running /etc are never lost: deploy, carry at shutdown, etc-update."""

import json
import os
import re
import shutil
import signal
import struct
from pathlib import Path

import pytest

from tests.support import DONE, FAILED, MISSING, REFUSED, Disk, make_deb, program
from tests.system.disk_system import Machine, System, open_system

pytestmark = [pytest.mark.system, pytest.mark.budget(120)]


def add_user(etc: Path, name: str, number: int) -> None:
    """Add a user and its group, like useradd."""
    for file, line in {
        "passwd": f"{name}:x:{number}:{number}::/home/{name}:/bin/sh",
        "shadow": f"{name}:!:20000:0:99999:7:::",
        "group": f"{name}:x:{number}:",
        "gshadow": f"{name}:!::",
        "subuid": f"{name}:{100000 + 65536 * (number - 1000)}:65536",
    }.items():
        path = etc / file
        path.write_text((path.read_text() if path.exists() else "") + line + "\n")


def test_users_passwords_files_and_groups_are_merged(machine: Machine, snapshot: int) -> None:
    """The running system and the snapshot both get users, and edits of the same files."""
    system, etc = machine.system, machine.etc
    system.shell(
        snapshot,
        "useradd --system --no-create-home _daemon; groupadd --system people; echo theirs > /etc/motd; echo new > /etc/from-snapshot; "
        "echo a-conf > /etc/both",
    )
    add_user(etc, "ada", 1000)
    shadow = re.sub(r"^root:[^:]*:", "root:$y$new:", (etc / "shadow").read_text(), flags=re.MULTILINE)
    (etc / "shadow").write_text(shadow)
    (etc / "shadow").chmod(0o640)
    (etc / "issue").write_text("mine\n")
    (etc / "motd").write_text("mine\n")
    (etc / "both").write_text("mine\n")
    answer = machine.deploy(snapshot)
    new = machine.next_etc
    for name in ("passwd", "shadow", "group", "gshadow"):
        accounts = [line.split(":")[0] for line in (new / name).read_text().splitlines()]
        assert "ada" in accounts, name
        assert "_daemon" in accounts, name
        assert len(accounts) == len(set(accounts))
    assert "people" in (new / "group").read_text()
    assert re.search(r"^root:\$y\$new:", (new / "shadow").read_text(), re.MULTILINE)
    assert (new / "issue").read_text() == "mine\n"
    assert (new / "from-snapshot").read_text() == "new\n"
    assert ((new / "motd").read_text(), (new / "both").read_text()) == ("theirs\n", "a-conf\n")
    assert sorted(answer["conflicts"]) == ["both", "motd"]
    assert {"issue", "passwd", "shadow", "group", "gshadow"} <= set(answer["carried"])
    assert (machine.aside(answer) / "motd").read_text() == "mine\n"
    ids = json.loads((machine.files.state / "ids").read_text())
    assert ids["passwd"]["ada"] == 1000, "no snapshot may allocate the uid again"


def acl(user: int) -> bytes:
    """An ACL that lets one more user read a file of mode 0640: version, then tag, permissions, id of each entry."""
    nobody = 2**32 - 1
    entries = [(0x01, 6, nobody), (0x02, 4, user), (0x04, 4, nobody), (0x10, 4, nobody), (0x20, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def flags_of(*paths: Path) -> list[str]:
    """The flags that chattr has set on each path."""
    return [
        "".join(letter for letter in "aiSC" if letter in program("lsattr", "-d", path).split()[0]) for path in paths
    ]


def test_content_and_every_attribute_are_drift_whatever_size_and_mtime_say(machine: Machine, snapshot: int) -> None:
    etc, capability = machine.etc, struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
    for name in ("acl", "attribute", "capability", "flag"):
        machine.system.shell(snapshot, f"echo x > /etc/{name}; chmod 640 /etc/{name}; mkdir -p /etc/nocow")
    machine.deploy(snapshot)
    machine.boot()
    etc, issue = machine.etc, (machine.etc / "issue").stat()
    (etc / "issue").write_bytes((etc / "issue").read_bytes()[::-1])
    os.utime(etc / "issue", ns=(issue.st_atime_ns, issue.st_mtime_ns))
    os.setxattr(etc / "acl", "system.posix_acl_access", acl(7))
    os.setxattr(etc / "attribute", "user.note", b"n")
    os.setxattr(etc / "capability", "security.capability", capability)
    program("chattr", "+S", etc / "flag")
    program("chattr", "+C", etc / "nocow")
    (etc / "nocow/file").write_text("x" * 10000)
    changed = ["acl", "attribute", "capability", "flag", "issue", "nocow", "nocow/file"]
    drift = machine.system.ash("--json", "diff").json["drift"]
    assert sorted(path for path in drift if path != "machine-id") == changed
    assert sorted(machine.deploy(machine.system.clone(snapshot))["carried"]) == changed
    new = machine.next_etc
    assert (new / "issue").read_bytes() == (etc / "issue").read_bytes()
    assert os.getxattr(new / "acl", "system.posix_acl_access") == acl(7)
    assert os.getxattr(new / "attribute", "user.note") == b"n"
    assert os.getxattr(new / "capability", "security.capability") == capability
    assert flags_of(new / "flag", new / "nocow", new / "nocow/file") == ["S", "C", "C"]
    saved = machine.system.ash("--json", "etc-update").json["carried"]
    assert sorted(saved) == changed
    assert set(machine.system.ash("--json", "diff").json["drift"]) <= {"machine-id"}


def test_immutable_files_are_carried_and_stop_no_command(machine: Machine, snapshot: int) -> None:
    system, etc = machine.system, machine.etc
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").write_text("nameserver 127.0.0.9\n")
    (etc / "ash-test.d").mkdir()
    (etc / "ash-test.d/own").write_text("1\n")
    (etc / "issue").chmod(0o600)
    for flag, name in {"+i": "resolv.conf", "+a": "issue"}.items():
        program("chattr", flag, etc / name)
    program("chattr", "-R", "+i", etc / "ash-test.d", etc / "fstab")
    kept = system.ash("--json", "rollback").json["snapshot"]
    flagged = "resolv.conf", "issue", "ash-test.d", "ash-test.d/own", "fstab"
    assert flags_of(*(system.root(kept) / "etc" / name for name in flagged)) == ["i", "a", "i", "i", "i"]
    program("chattr", "-R", "-i", etc / "ash-test.d")
    (etc / "ash-test.d/own").write_text("22\n")
    (etc / "pinned").touch()
    program("chattr", "+i", etc / "pinned")
    assert machine.running("carry")["changed"] is True
    assert flags_of(*(machine.next_etc / name for name in ("pinned", "resolv.conf"))) == ["i", "i"]
    assert not [name for name in os.listdir(machine.next_etc.parent) if "ash-new" in name]
    system.shell(kept, "echo edited > /etc/hostname")
    assert (system.root(kept) / "etc/resolv.conf").read_text() == "nameserver 127.0.0.9\n"
    assert flags_of(system.root(kept) / "etc/resolv.conf") == ["i"]
    for command in (["deploy", kept], ["boot", kept], ["recover"], ["tmp"], ["deploy", snapshot, "--fresh-etc"]):
        system.ash(*command)
    assert system.ash("--json", "fsck").json["damage"] == []


def test_fsck_deletes_what_an_interrupted_carry_left(machine: Machine) -> None:
    left = machine.etc.with_name(".ash-new")
    left.mkdir()
    (left / "file").touch()
    program("chattr", "+i", left / "file")
    assert "is left over from a deploy" in machine.system.ash("fsck", status=FAILED).stdout
    machine.system.ash("fsck", "--repair")
    assert not left.exists()


def test_deploy_reports_what_it_carried_and_what_not(machine: Machine, snapshot: int) -> None:
    machine.system.shell(snapshot, "echo theirs > /etc/motd")
    (machine.etc / "motd").write_text("mine\n")
    (machine.etc / "own").touch()
    text = machine.system.ash("deploy", snapshot).stdout
    assert "own" in text.split("carried over")[1].splitlines()[0]
    assert re.search(r"left behind because of conflicts \(copies are in /var/lib/ash/conflicts/\S+\): motd\n", text)
    other = machine.system.clone()
    machine.system.shell(other, "echo theirs > /etc/issue")
    (machine.etc / "issue").unlink()
    text = machine.system.ash("deploy", other).stdout
    assert "left behind because of conflicts: issue\n" in text, "there is no copy of what was deleted"
    for number in range(50):
        (machine.etc / f"many{number}").touch()
    text = machine.system.ash("deploy", other).stdout
    assert re.search(r"carried over from the running /etc: .* and \d+ more\n", text)


def test_drift_is_carried_from_deployment_to_deployment(machine: Machine, snapshot: int) -> None:
    (machine.etc / "own").write_text("1\n")
    machine.deploy(snapshot)
    machine.boot()
    (machine.etc / "own").write_text("2\n")
    other = machine.system.clone(snapshot)
    machine.deploy(other)
    assert (machine.next_etc / "own").read_text() == "2\n"
    machine.boot()
    (machine.etc / "own").unlink()
    machine.deploy(snapshot)
    assert not (machine.next_etc / "own").exists()


def test_a_snapshot_is_deployed_again_only_after_an_edit(machine: Machine, snapshot: int) -> None:
    assert machine.deploy(snapshot)["changed"] is False, "it is booted"
    other = machine.system.clone(snapshot)
    assert machine.deploy(other)["changed"] is True
    assert machine.deploy(other)["changed"] is False
    (machine.etc / "later").touch()
    answer = machine.deploy(other)
    assert (answer["changed"], answer["carried"]) == (True, ["later"])


def test_a_fresh_etc_has_the_snapshots_files_and_the_machines_identity(machine: Machine, snapshot: int) -> None:
    etc = machine.etc
    (etc / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (etc / "ssh").mkdir(exist_ok=True)
    (etc / "ssh/ssh_host_ed25519_key").write_text("key\n")
    (etc / "own").write_text("mine\n")
    (etc / "motd").write_text("mine\n")
    with (etc / "fstab").open("a") as fstab:
        fstab.write("UUID=1234-ABCD /stick vfat nofail 0 0\n")
    answer = machine.deploy(snapshot, "--fresh-etc")
    new = machine.next_etc
    assert (new / "machine-id").read_text().startswith("0123456789abcdef")
    assert (new / "ssh/ssh_host_ed25519_key").read_text() == "key\n"
    assert not (new / "own").exists()
    assert (new / "motd").read_bytes() == (machine.system.root(snapshot) / "etc/motd").read_bytes()
    assert "/stick" not in (new / "fstab").read_text()
    assert answer["carried"] == []
    aside = machine.aside(answer)
    assert ((aside / "own").read_text(), (aside / "motd").read_text()) == ("mine\n", "mine\n")
    assert "/stick" in (aside / "fstab").read_text()


def test_every_deployment_gets_the_machines_identity(machine: Machine, snapshot: int) -> None:
    (machine.etc / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    other = machine.system.clone()
    machine.system.shell(other, "echo ffffffffffffffffffffffffffffffff > /etc/machine-id")
    machine.deploy(other)
    assert (machine.next_etc / "machine-id").read_text().startswith("0123456789abcdef")


def test_an_edit_wins_over_a_new_default_of_its_package(machine: Machine, snapshot: int, tmp_path: Path) -> None:
    system, names = machine.system, ("edited", "same", "both")
    conf = [f"etc/ash-test/{name}.conf" for name in names]

    def install(version: str) -> None:
        files = {**dict.fromkeys(conf, f"{version}\n"), "DEBIAN/conffiles": "".join(f"/{path}\n" for path in conf)}
        system.ash("install", "--not-live", snapshot, make_deb(tmp_path, "ash-test-conf", version, files=files))

    install("1")
    machine.deploy(snapshot)
    machine.boot()
    for name in ("edited", "both"):
        (machine.etc / f"ash-test/{name}.conf").write_text("mine\n")
    system.shell(snapshot, "echo theirs > /etc/ash-test/both.conf")
    install("2")
    answer = machine.deploy(snapshot)
    found = {name: (machine.next_etc / f"ash-test/{name}.conf").read_text() for name in names}
    assert found == {"edited": "mine\n", "same": "2\n", "both": "theirs\n"}
    assert (answer["carried"], answer["conflicts"]) == (
        ["ash-test/edited.conf"],
        ["ash-test/both.conf", "ash-test/edited.conf.dist"],
    )
    aside = machine.aside(answer) / "ash-test"
    assert ((aside / "edited.conf.dist").read_text(), (aside / "both.conf").read_text()) == ("2\n", "mine\n")
    machine.boot()
    assert machine.deploy(system.clone(snapshot))["conflicts"] == []


def test_the_users_lines_of_fstab_are_carried_and_ashs_are_rendered(machine: Machine, snapshot: int) -> None:
    with (machine.etc / "fstab").open("a") as fstab:
        fstab.write("UUID=1234-ABCD /stick vfat nofail 0 0\n")
    answer = machine.deploy(machine.system.clone(snapshot))
    assert answer["carried"] == ["fstab"]
    slot = machine.system.boots()
    lines = (machine.next_etc / "fstab").read_text().splitlines()
    assert lines.count("UUID=1234-ABCD /stick vfat nofail 0 0") == 1
    assert [line for line in lines if line.split()[1:2] == ["/boot/efi"]]
    assert len([line for line in lines if line.split()[1:2] == ["/"]]) == 1
    assert all(f"snapshot-{slot}" in line for line in lines if "/rootfs/snapshot-" in line)


def test_lines_of_fstab_win_over_those_of_the_snapshot_and_get_their_mount_points(machine: Machine) -> None:
    """Lines that ash wrote once, too; those for ash's own mounts have no effect, which is said."""
    system, fstab = machine.system, machine.etc / "fstab"
    other = system.clone()
    system.shell(other, "echo 'LABEL=theirs /srv/theirs ext4 nofail 0 2' >> /etc/fstab")
    text = re.sub(r".* /home .*", "LABEL=homes /home ext4 noexec 0 2", fstab.read_text())
    text = re.sub(r".* /tmp .*", "tmpfs /tmp tmpfs noexec,size=2G 0 0", text).replace("ro 0 0", "rw 0 0", 1)
    fstab.write_text(text + "LABEL=data /data/deep ext4 nofail 0 2\n")
    answer = machine.running("deploy", other)
    assert (answer["carried"], answer["conflicts"]) == (["fstab"], [])
    assert answer["without_effect"] == ["fstab, the lines of /: they are ash's own"]
    assert system.boots()
    lines = {line.split()[1]: line for line in (machine.next_etc / "fstab").read_text().splitlines() if line}
    assert lines["/home"] == "LABEL=homes /home ext4 noexec 0 2"
    assert lines["/tmp"] == "tmpfs /tmp tmpfs noexec,size=2G 0 0"
    assert lines["/"].split()[3].endswith(",ro")
    assert {"/srv/theirs", "/data/deep"} <= set(lines)
    root = machine.next_etc.parent
    assert ((root / "data/deep").is_dir(), (root / "srv/theirs").is_dir()) == (True, True)
    fstab.write_text(fstab.read_text() + "LABEL=late /late ext4 nofail 0 2\n")
    assert machine.running("carry")["carried"] == ["fstab"]
    assert (" /late " in (root / "etc/fstab").read_text(), (root / "late").is_dir()) == (True, True)


def test_a_mutable_directory_does_not_conflict_with_the_users_lines(machine: Machine, snapshot: int) -> None:
    system = machine.system
    system.shell(snapshot, "echo mutable_dirs::opt/games > /etc/ash.conf")
    machine.deploy(snapshot)
    machine.boot()
    with (machine.etc / "fstab").open("a") as fstab:
        fstab.write("UUID=1234-ABCD /stick vfat nofail 0 0\n")
    other = system.clone(snapshot)
    answer = machine.deploy(other)
    text = (machine.next_etc / "fstab").read_text()
    assert answer["conflicts"] == []
    assert text.count("/stick") == 1
    assert [line.split()[0] for line in text.splitlines() if "/opt/games" in line.split()[1:2]] == [
        f"/.snapshots/mutable_dirs/snapshot-{other}/opt/games"
    ]


def test_a_mutable_directory_is_not_saved_as_a_users_line(machine: Machine, snapshot: int) -> None:
    system = machine.system
    system.shell(snapshot, "echo mutable_dirs::opt/games > /etc/ash.conf")
    machine.deploy(snapshot)
    machine.boot()
    with (machine.etc / "fstab").open("a") as fstab:
        fstab.write("UUID=1234-ABCD /stick vfat nofail 0 0\n")
    assert system.ash("--json", "etc-update").json["carried"] == ["fstab"]
    saved = (system.root(snapshot) / "etc/fstab").read_text()
    assert ("mutable_dirs" in saved, " /stick " in saved) == (False, True)
    machine.deploy(snapshot)
    assert (machine.next_etc / "fstab").read_text().count(" /opt/games ") == 1


def test_hard_links_stay_hard_links(machine: Machine, snapshot: int) -> None:
    for name in ("one", "other", "apart"):
        (machine.etc / name).write_text("text\n")
    (machine.etc / "link").hardlink_to(machine.etc / "one")
    (machine.etc / "name").hardlink_to(machine.etc / "hostname")
    (machine.etc / "changed").hardlink_to(machine.etc / "other")
    machine.running("deploy", snapshot)
    inodes = {path: (machine.next_etc / path).stat().st_ino for path in ("one", "link", "hostname", "name", "apart")}
    assert inodes["one"] == inodes["link"] != inodes["apart"]
    assert inodes["name"] == inodes["hostname"]
    saved = machine.system.root(machine.running("etc-update")["snapshot"]) / "etc"
    assert (saved / "one").stat().st_ino == (saved / "link").stat().st_ino


def test_a_deleted_file_stays_deleted(machine: Machine, snapshot: int) -> None:
    (machine.etc / "motd").unlink()
    answer = machine.deploy(machine.system.clone(snapshot))
    assert "motd" in answer["carried"]
    assert not (machine.next_etc / "motd").exists()


def test_diff_without_arguments_shows_the_drift(machine: Machine, snapshot: int) -> None:
    system = machine.system
    identity = system.ash("--json", "diff").json["drift"]
    assert not [path for path in identity if path != "machine-id" and "ssh_host" not in path]
    (machine.etc / "own").write_text("mine\n")
    (machine.etc / "issue").write_text("mine\n")
    (machine.etc / "motd").unlink()
    answer = system.ash("--json", "diff").json
    assert answer["slot"] == machine.slot
    assert answer["drift"] == {**identity, "own": "added", "issue": "changed", "motd": "removed"}
    text = system.ash("diff").stdout
    assert ("+ /etc/own" in text, "^ /etc/issue" in text, "- /etc/motd" in text) == (True, True, True)
    assert "+mine" in system.ash("diff", "--patch").stdout


def test_etc_update_saves_the_drift_to_the_booted_snapshot(machine: Machine, snapshot: int) -> None:
    system, etc = machine.system, machine.etc
    (etc / "own").write_text("mine\n")
    (etc / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (etc / "ssh").mkdir(exist_ok=True)
    (etc / "ssh/ssh_host_rsa_key").write_text("key\n")
    with (etc / "fstab").open("a") as fstab:
        fstab.write("UUID=1234-ABCD /stick vfat nofail 0 0\n")
    add_user(etc, "bea", 1003)
    answer = system.ash("--json", "etc-update").json
    assert (answer["changed"], answer["snapshot"]) == (True, snapshot)
    assert {"own", "passwd", "fstab"} <= set(answer["carried"])
    saved = system.root(snapshot) / "etc"
    assert (saved / "own").read_text() == "mine\n"
    assert "bea:x:1003:" in (saved / "passwd").read_text()
    assert not (saved / "ssh/ssh_host_rsa_key").exists()
    assert "0123456789abcdef" not in (saved / "machine-id").read_text()
    fstab_lines = (saved / "fstab").read_text().splitlines()
    assert "UUID=1234-ABCD /stick vfat nofail 0 0" in fstab_lines
    assert all(f"snapshot-{snapshot}" in line for line in fstab_lines if "/rootfs/snapshot-" in line)
    assert set(system.ash("--json", "diff").json["drift"]) <= {"machine-id", "ssh/ssh_host_rsa_key"}
    assert (system.files.etc(snapshot) / "own").exists()
    again = system.ash("--json", "etc-update").json
    assert (again["changed"], again["carried"]) == (False, [])
    machine.deploy(snapshot)
    assert (machine.next_etc / "ssh/ssh_host_rsa_key").read_text() == "key\n"
    assert (machine.next_etc / "machine-id").read_text().startswith("0123456789abcdef")


def test_etc_update_is_three_way(machine: Machine, snapshot: int) -> None:
    system = machine.system
    system.shell(snapshot, "echo theirs > /etc/motd; echo new > /etc/from-snapshot")
    (machine.etc / "motd").write_text("mine\n")
    (machine.etc / "own").touch()
    answer = system.ash("--json", "etc-update").json
    assert (answer["carried"], answer["conflicts"]) == (["own"], ["motd"])
    saved = system.root(snapshot) / "etc"
    assert ((saved / "motd").read_text(), (saved / "from-snapshot").exists()) == ("theirs\n", True)
    assert "motd" in system.ash("--json", "diff").json["drift"], "what was not saved must still be drift"
    directory = max((system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*"))
    assert (directory / "etc/motd").read_text() == "mine\n"


def test_an_edit_during_etc_update_is_still_drift(machine: Machine, snapshot: int) -> None:
    (machine.etc / "saved").write_text("one\n")
    edits = f"echo two > {machine.etc}/saved; echo late > {machine.etc}/late"
    step = f"exchange snapshot-{snapshot} and"
    ended = machine.system.with_hooks({"do": [step, "sh", "-c", edits], "booted": machine.slot}, "etc-update")
    assert ended.returncode == DONE, ended
    assert (machine.system.root(snapshot) / "etc/saved").read_text() == "one\n"
    assert machine.system.ash("--json", "diff").json["drift"] == {"saved": "changed", "late": "added"}


def test_an_edit_during_a_deploy_is_carried_at_shutdown(machine: Machine) -> None:
    other = machine.system.clone()
    (machine.etc / "early").write_text("early\n")
    edit = ["sh", "-c", f"echo late > {machine.etc}/late"]
    ended = machine.system.with_hooks({"do": ["copy .ash-new", *edit], "booted": machine.slot}, "deploy", other)
    assert ended.returncode == DONE, ended
    machine.running("carry")
    assert [(machine.next_etc / name).read_text() for name in ("early", "late")] == ["early\n", "late\n"]


def test_nothing_is_deployed_without_the_drift_base(machine: Machine) -> None:
    other = machine.system.clone()
    (machine.etc / "mine").write_text("mine\n")
    base = machine.files.etc(machine.slot)
    program("btrfs", "subvolume", "delete", base)
    assert "ash fsck --repair" in machine.system.ash("deploy", other, status=REFUSED).error
    assert f"{base.name} is missing" in machine.system.ash("fsck", status=FAILED).stdout
    machine.system.ash("fsck", "--repair")
    machine.system.ash("fsck")
    machine.deploy(other)
    assert (machine.next_etc / "mine").read_text() == "mine\n"


def test_etc_update_is_refused_if_the_base_snapshot_is_booted(system: System) -> None:
    system.ash("deploy", 0)
    Machine(system).boot()
    (Machine(system).etc / "own").touch()
    with system.nothing_changes():
        assert "base" in system.ash("etc-update", status=REFUSED).error
    (Machine(system).etc / "own").unlink()


def test_an_edit_after_the_deploy_is_carried_at_shutdown(machine: Machine, snapshot: int) -> None:
    (machine.etc / "before").write_text("1\n")
    answer = machine.running("deploy", machine.system.clone(snapshot))
    assert answer["carried"] == ["before"]
    assert machine.running("carry") == {
        "version": 1,
        "command": "carry",
        "changed": False,
        "carried": [],
        "conflicts": [],
    }
    (machine.etc / "before").write_text("2\n")
    (machine.etc / "after").write_text("a\n")
    (machine.etc / "issue").unlink()
    add_user(machine.etc, "cyd", 1004)
    carried = machine.running("carry")
    assert carried["changed"] is True
    assert {"before", "after", "issue", "passwd"} <= set(carried["carried"])
    new = machine.next_etc
    assert ((new / "before").read_text(), (new / "after").read_text(), (new / "issue").exists()) == (
        "2\n",
        "a\n",
        False,
    )
    assert "cyd:" in (new / "passwd").read_text()
    slot = machine.system.boots()
    assert f"snapshot-{slot}/etc /etc none bind" in (new / "fstab").read_text()
    assert machine.running("carry")["changed"] is False
    assert not [name for name in os.listdir(new.parent) if "ash-new" in name]
    (machine.etc / "after").unlink()
    machine.running("carry")
    assert not (new / "after").exists(), "a carried file that was deleted must be deleted in the target"


def test_what_a_deploy_carried_stays_carried_after_etc_update(machine: Machine) -> None:
    other = machine.system.clone()
    add_user(machine.etc, "eve", 1005)
    (machine.etc / "precious").write_text("x\n")
    assert {"precious", "passwd"} <= set(machine.running("deploy", other)["carried"])
    machine.running("etc-update")
    (machine.etc / "later").touch()
    assert machine.running("carry")["carried"] == ["later"]
    new = machine.next_etc
    assert ((new / "precious").read_text(), (new / "later").exists()) == ("x\n", True)
    assert "eve:" in (new / "passwd").read_text()
    (machine.etc / "precious").unlink()
    assert machine.running("carry")["carried"] == ["precious"]
    assert not (new / "precious").exists()


def test_a_second_deploy_keeps_what_the_first_carried(machine: Machine) -> None:
    other = machine.system.clone()
    (machine.etc / "precious").write_text("x\n")
    machine.running("deploy", other)
    machine.running("etc-update")
    (machine.etc / "later").touch()
    answer = machine.running("deploy", other)
    assert (sorted(answer["carried"]), answer["only_saved"]) == (["later", "precious"], [])
    assert (machine.next_etc / "precious").read_text() == "x\n"


def test_what_was_saved_into_one_snapshot_is_named_by_a_deploy_of_another(machine: Machine, snapshot: int) -> None:
    system, etc = machine.system, machine.etc
    other = system.clone()
    immutable = "import fcntl; [fcntl.ioctl(open(f'/etc/{name}'), 0x40086602, b'\\x10' + bytes(7)) for name in ('motd', 'issue')]"
    system.ash("run", other, "python3", "-c", immutable)
    (etc / "new").mkdir()
    (etc / "new/precious").write_text("x\n")
    (etc / "motd").write_text("mine\n")
    (etc / "issue").unlink()
    with (etc / "fstab").open("a") as fstab:
        fstab.write("LABEL=data /data ext4 nofail 0 2\n")
    saved = ["fstab", "issue", "motd", "new", "new/precious"]
    assert sorted(machine.running("etc-update")["carried"]) == saved
    answer = machine.running("deploy", other)
    assert (answer["carried"], answer["only_saved"]) == ([], saved)
    assert machine.running("deploy", system.clone(snapshot))["only_saved"] == [], "a copy of it has them"
    done = machine.run("deploy", other).stdout
    assert "--with-saved" in done
    assert "new/precious" in done
    assert machine.running("deploy", other)["changed"] is False
    answer = machine.running("deploy", other, "--with-saved")
    assert (sorted(answer["carried"]), answer["only_saved"]) == (saved, [])
    new = machine.next_etc
    assert ((new / "new/precious").read_text(), (new / "motd").read_text()) == ("x\n", "mine\n")
    assert not (new / "issue").exists()
    assert (new / "fstab").read_text().count(" /data ") == 1
    assert (new.parent / "data").is_dir()
    system.boots()
    system.ash("undo", snapshot)
    assert "new/precious" in machine.running("deploy", snapshot)["only_saved"], "the snapshot has them no longer"


def test_what_was_saved_and_then_undone_stays_known(image: Path, tmp_path: Path) -> None:
    """A deployment that ran before is the only one that has it, and is no longer the base of any comparison."""
    with open_system(image, tmp_path) as system:  # whose other slots are free
        machine, snapshot = Machine(system), system.clone()
        machine.deploy(snapshot)
        first = machine.boot()
        (machine.etc / "precious").write_text("x\n")
        with (machine.etc / "fstab").open("a") as fstab:
            fstab.write("LABEL=mine /mine ext4 nofail 0 2\n")
        machine.running("etc-update")
        system.ash("undo", snapshot)
        assert machine.running("deploy", system.clone(snapshot))["only_saved"] == ["fstab", "precious"]
        assert (machine.boot() != first, (machine.etc / "precious").exists()) == (True, False)
        only_there = [{"slot": first, "snapshot": snapshot, "paths": ["fstab", "precious"]}]
        assert machine.running("status")["only_there"] == only_there
        system.ash("undo", snapshot)
        assert machine.running("status")["only_there"] == [], "redo: the snapshot has it"
        system.ash("undo", snapshot)
        assert machine.deploy(system.clone())["slot"] != first
        (machine.next_etc / "changed").touch()
        assert "of /etc: fstab, precious; see" in machine.run("deploy", system.clone()).stderr
        kept = (system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*/etc/*")
        assert {path.name for path in kept} == {"fstab", "precious"}


def test_what_was_saved_and_then_undone_is_named_while_it_runs(image: Path, tmp_path: Path) -> None:
    with open_system(image, tmp_path) as system:
        machine, snapshot = Machine(system), system.clone()
        machine.deploy(snapshot)
        slot = machine.boot()
        (machine.etc / "precious").write_text("x\n")
        machine.running("etc-update")
        assert machine.running("status")["only_there"] == []
        before = machine.run("--dry-run", "undo", snapshot).stdout
        undone = machine.run("undo", snapshot).stdout
        assert " etc-update, of " in before
        assert " etc-update, of " in undone
        assert "no snapshot; a new deployment only with --with-saved: precious\n" in undone
        only_there = [{"slot": slot, "snapshot": snapshot, "paths": ["precious"]}]
        assert machine.running("status")["only_there"] == only_there
        assert machine.running("etc-update")["in_no_snapshot"] == ["precious"]
        answer = machine.running("undo", snapshot)
        assert answer["in_no_snapshot"] == [], "redo: the snapshot has it"
        assert f" undo {snapshot}, of " in answer["undone"]
        machine.running("undo", snapshot)
        assert not machine.running("deploy", snapshot, "--with-saved")["changed"], "what runs has it"
        other = system.clone(snapshot)
        assert machine.running("deploy", other, "--with-saved")["carried"] == ["precious"]


def test_what_was_saved_and_edited_again_is_brought_too(machine: Machine) -> None:
    """The base of the drift is what was saved: to a snapshot that never had it, each later edit is a conflict."""
    other = machine.system.clone()
    (machine.etc / "two").write_text("one\n")
    with (machine.etc / "motd").open("a") as motd:
        motd.write("one\n")
    machine.running("etc-update")
    (machine.etc / "two").write_text("two\n")
    with (machine.etc / "motd").open("a") as motd:
        motd.write("two\n")
    answer = machine.running("deploy", other)
    assert (sorted(answer["conflicts"]), answer["only_saved"]) == (["motd", "two"], ["motd", "two"])
    answer = machine.running("deploy", other, "--with-saved")
    assert (sorted(answer["carried"]), answer["conflicts"]) == (["motd", "two"], [])
    assert (machine.next_etc / "two").read_text() == "two\n"
    assert (machine.next_etc / "motd").read_text().endswith("one\ntwo\n")


def test_what_a_rollback_saved_is_named_by_a_deploy_of_another_snapshot(machine: Machine) -> None:
    other = machine.system.clone()
    (machine.etc / "own").write_text("mine\n")
    machine.running("rollback")
    machine.boot()
    assert (machine.etc / "own").read_text() == "mine\n"
    answer = machine.running("deploy", other)
    assert (answer["carried"], answer["only_saved"]) == ([], ["own"])
    assert machine.running("deploy", other, "--with-saved")["carried"] == ["own"]


def test_a_rollback_says_what_mutable_directories_it_begins_without(machine: Machine) -> None:
    other = machine.system.clone()
    machine.system.shell(other, "echo mutable_dirs::opt/b > /etc/ash.conf")
    machine.system.shell(other, "echo mine > /opt/b/x")
    machine.deploy(other)
    machine.boot()
    assert f"begins without what {other} has in its mutable directories: opt/b\n" in machine.run("rollback").stdout
    machine.boot()
    assert machine.running("rollback")["without"] == [], "the snapshot of the first rollback has nothing there"


def test_a_carry_keeps_edits_that_were_made_while_the_target_ran(machine: Machine) -> None:
    """The new deployment runs, then the old one again, from the menu: its later edits are merged into the new one."""
    machine.running("deploy", machine.system.clone())
    slot, new = machine.slot, machine.next_etc
    (new / "of-new").write_text("new\n")
    (new / "both").write_text("new\n")
    (machine.etc / "of-old").write_text("old\n")
    (machine.etc / "both").write_text("old\n")
    assert machine.running("carry")["carried"] == ["of-old"]
    assert [(new / name).read_text() for name in ("of-new", "of-old", "both")] == ["new\n", "old\n", "new\n"]
    menu = json.loads((machine.files.state / "menu").read_text())
    (waiting,) = [one for name, one in menu["deployments"].items() if name == menu["default"] != slot]
    assert waiting["conflicts"] == ["both"]
    assert (machine.aside(waiting) / "both").read_text() == "old\n"


def test_a_carry_that_was_cut_off_is_repeated(machine: Machine) -> None:
    machine.running("deploy", machine.system.clone())
    conflicts = set((machine.files.var / "lib/ash/conflicts").glob("*/etc/later"))
    for step in ("rename .ash-new to later", "exchange .ash-new and etc", "exchange etc-carried-new-", "write menu"):
        (machine.etc / "later").write_text(f"{step}\n")
        killed = machine.system.with_hooks({"kill": step, "booted": machine.slot}, "carry")
        assert killed.returncode == -signal.SIGKILL, (step, killed)
        machine.system.ash("recover")
        assert not machine.system.remains()
        (machine.etc / "later").write_text(f"after {step}\n")
        assert machine.running("carry")["carried"] == ["later"]
        assert (machine.next_etc / "later").read_text() == f"after {step}\n"
        assert set((machine.files.var / "lib/ash/conflicts").glob("*/etc/later")) == conflicts


def kernel_options(machine: Machine) -> str:
    return str(re.findall(r"^ *linux .*", machine.files.grub_cfg.read_text(), re.MULTILINE)[0])


def test_boot_settings_of_the_running_etc_are_in_the_menu(machine: Machine) -> None:
    system, settings, other = machine.system, machine.etc / "default/grub", machine.system.clone()
    before = settings.read_text()
    settings.write_text(f'{before}\nGRUB_CMDLINE_LINUX="panic=30"\n')
    machine.running("deploy", other)
    assert "panic=30" in kernel_options(machine)
    system.ash("boot", other)
    system.shell(other, "touch /etc/mark")
    machine.running("deploy", other)
    assert "panic=30" in kernel_options(machine)
    settings.write_text(f'{before}\nGRUB_CMDLINE_LINUX="panic=40"\n')
    machine.running("carry")
    assert "panic=40" in kernel_options(machine)
    system.boots()


def test_boot_settings_that_are_wrong_stop_a_deploy_but_not_the_carry_of_the_rest(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    machine.running("deploy", other)
    right = (machine.etc / "default/grub").read_text()
    with (machine.etc / "default/grub").open("a") as settings:
        settings.write("exit 7\n")
    (machine.etc / "later").touch()
    assert "correct /etc/default/grub of the running system" in machine.run("carry", status=FAILED).error
    assert (machine.next_etc / "later").exists()
    system.boots()
    assert not system.remains()
    assert "are not made from default/grub in /etc" in system.ash("fsck", "--repair", status=FAILED).stdout
    system.shell(other, "touch /etc/mark")
    with system.nothing_changes():
        assert "correct /etc/default/grub of the running system" in machine.run("deploy", other, status=FAILED).error
    (machine.etc / "default/grub").write_text(right)
    machine.running("carry")
    assert system.ash("--json", "fsck").json["damage"] == []


def test_a_mutable_directory_that_the_running_ash_conf_names_is_mounted(machine: Machine) -> None:
    (machine.etc / "ash.conf").write_text("mutable_dirs::opt/games\n")
    machine.running("deploy", machine.system.clone())
    assert " /opt/games none bind" in (machine.next_etc / "fstab").read_text()
    assert (machine.next_etc.parent / "opt/games").is_dir()


# Instead of 30 MB and many seconds: the settings, and something that no other call prints.
INITRAMFS_TOOL = """\
#!/bin/sh
[ "$1" = -c ] || exit 1
exec > /boot/initrd.img-$3.new
cat /etc/modprobe.d/* /etc/crypttab
ls -ld /var/lib/dpkg/status && cat /proc/sys/kernel/random/uuid
head -c 2000000 /dev/zero
mv /boot/initrd.img-$3.new /boot/initrd.img-$3
"""


def initramfs(root: Path) -> str:
    (path,) = root.glob("boot/initrd.img-*")
    return path.read_text()


def with_initramfs_tool(system: System) -> int:
    """A snapshot with INITRAMFS_TOOL; returns its number."""
    number = system.clone()
    tool = f"cat > /usr/sbin/update-initramfs <<'END'\n{INITRAMFS_TOOL}END"
    system.shell(number, f"{tool}\necho '# none' > /etc/crypttab")
    return number


def test_what_is_made_from_a_carried_etc_is_made_by_recovery(machine: Machine) -> None:
    """The power fails, or the shutdown takes too long, when /etc is in place, but not yet initramfs and fstab."""
    system = machine.system
    machine.running("deploy", with_initramfs_tool(system))
    for step in (
        "exchange etc-carried-new-",
        "write menu",
        "run update-initramfs",
        "rename .ash-new to initrd",
        "sync",
    ):
        (machine.etc / "modprobe.d/cut.conf").write_text(f"# {step}\n")
        (machine.etc / "ash.conf").write_text(f"mutable_dirs::opt/{len(step)}\n")
        after = "" if step != "sync" else "rename .ash-new to initrd"
        killed = system.with_hooks({"kill": step, "after": after, "booted": machine.slot}, "carry")
        assert killed.returncode == -signal.SIGKILL, (step, killed)
        said = system.ash("recover").stderr
        assert f"an interrupted carry of /etc into {system.files.default_slot()} is finished" in said
        assert f"# {step}\n" in initramfs(machine.next_etc.parent), step
        assert f" /opt/{len(step)} none bind" in (machine.next_etc / "fstab").read_text()
        assert not system.remains()
    assert machine.running("carry")["changed"] is False
    assert system.ash("--json", "fsck").json["damage"] == []


def test_an_initramfs_is_on_the_disk_before_it_replaces_the_one_that_boots(machine: Machine, tmp_path: Path) -> None:
    system, copy = machine.system, tmp_path / "cut.img"
    machine.running("deploy", with_initramfs_tool(system))
    root = machine.next_etc.parent
    (machine.etc / "modprobe.d/cut.conf").write_text("# later\n")
    options = {"do": ["rename .ash-new to initrd", "cp", "--sparse=always", str(system.image), str(copy)]}
    assert system.with_hooks({**options, "booted": machine.slot}, "carry").returncode == DONE
    assert "# later" in initramfs(root)
    with Disk(copy).files() as files:
        (new,) = (files.root(root.name.removeprefix("snapshot-")) / "boot").glob(".ash-new*")
        assert new.read_text() == initramfs(root)
    copy.unlink()


def test_the_initramfs_is_made_again_where_its_settings_changed(machine: Machine) -> None:
    system = machine.system
    other = with_initramfs_tool(system)
    (machine.etc / "modprobe.d/early.conf").write_text("blacklist early\n")
    assert "making the initramfs again, for modprobe.d/early.conf" in machine.run("deploy", other).stderr
    assert (system.files.state / "work/deploy").stat().st_mode & 0o777 == 0o755, "status looks into it for everybody"
    made = initramfs(machine.next_etc.parent)
    assert ("blacklist early" in made, "# none" in made) == (True, True)
    system.shell(other, "touch /etc/mark")
    assert "initramfs" not in machine.run("deploy", other).stderr
    assert initramfs(machine.next_etc.parent) == made, "it is not made twice for the same settings"
    (machine.etc / "modprobe.d/late.conf").write_text("blacklist late\n")
    machine.running("carry")
    assert "blacklist late" in initramfs(machine.next_etc.parent)
    assert machine.system.boots()
    assert not system.remains()
    machine.boot()
    (machine.etc / "crypttab").write_text("data /dev/x none\n")
    machine.running("etc-update")
    saved = initramfs(system.root(other))
    assert [line in saved for line in ("blacklist early", "blacklist late", "data /dev/x none")] == [True] * 3


def test_libraries_are_found_where_the_running_etc_names_directories(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    library = "cp /lib/*/libc.so.6 /opt/LIB/libash-test.so.1"
    system.shell(other, "".join(f"mkdir -p /opt/{name}; {library.replace('LIB', name)}\n" for name in ("one", "two")))

    def found(etc: Path) -> list[bool]:
        return [f"/opt/{name}/".encode() in (etc / "ld.so.cache").read_bytes() for name in ("one", "two")]

    (machine.etc / "ld.so.conf.d/one.conf").write_text("/opt/one\n")
    machine.deploy(other)
    assert found(machine.next_etc) == [True, False]
    (machine.etc / "ld.so.conf.d/two.conf").write_text("/opt/two\n")
    machine.running("carry")
    assert found(machine.next_etc) == [True, True]
    machine.boot()
    assert found(system.root(other) / "etc") == [False, False]
    machine.running("etc-update")
    assert found(system.root(other) / "etc") == [True, True]


def test_what_the_running_etc_needs_and_a_snapshot_lacks_does_not_lock_out(machine: Machine) -> None:
    system, other = machine.system, machine.system.clone()
    (module,) = system.root(machine.slot).glob("usr/lib/*/security/pam_permit.so")
    shutil.copyfile(module, module.with_name("pam_ash.so"))
    helper = system.root(machine.slot) / "usr/sbin/mount.ashfs"
    helper.touch()
    before = (machine.etc / "pam.d/common-auth").read_text()
    for name, line in {
        "pam.d/common-auth": "auth [success=1 default=ignore] pam_ash.so\n",
        "pam.d/common-session": "session optional pam_permit.so\n-session optional pam_ash.so\nauth required pam_gone.so\n",
        "fstab": "x /data ashfs nofail 0 0\n",
    }.items():
        with (machine.etc / name).open("a") as file:
            file.write(line)
    answer = machine.deploy(other)
    assert (machine.next_etc / "pam.d/common-auth").read_text() == before
    assert "pam_ash" in (machine.aside(answer) / "pam.d/common-auth").read_text()
    assert answer["conflicts"] == ["pam.d/common-auth"]
    assert answer["without_effect"] == ["pam.d/common-auth: the snapshot has no pam_ash.so"]
    assert sorted(answer["carried"]) == ["fstab", "pam.d/common-session"]
    assert answer["notes"] == ["the snapshot has no mount.ashfs, for a line of fstab"]
    for path in (module.with_name("pam_ash.so"), helper):
        path.unlink()


def test_a_subvolume_in_the_running_etc_is_kept_and_named(image: Path, tmp_path: Path) -> None:
    with open_system(image, tmp_path) as system:  # whose other slots are free
        machine, number = Machine(system), system.clone()
        first = machine.boot()
        program("btrfs", "subvolume", "create", machine.etc / "data")
        (machine.etc / "data/precious").write_text("x\n")
        (machine.etc / "data-2").write_text("an edit\n")
        assert machine.running("diff")["drift"] == {"data-2": "added"}
        answer = machine.running("deploy", number)
        assert answer["notes"] == [
            "/etc/data is a subvolume: it is not carried over, and stays in the running deployment"
        ]
        assert answer["carried"] == ["data-2"]
        assert not (machine.next_etc / "data").exists()
        machine.running("carry")
        machine.boot()
        for _ in range(3):
            system.shell(number, "date +%N > /etc/mark")
            assert machine.running("deploy", number)["slot"] != first
            machine.boot()
        machine.running("fsck", "--repair")
        assert (system.root(first) / "etc/data/precious").read_text() == "x\n"
        # With the third slot the same: nothing is deleted unasked, and nothing is carried into it.
        program("btrfs", "subvolume", "create", machine.etc / "more")
        (machine.etc / "more/precious").touch()
        system.shell(number, "date +%N > /etc/mark")
        machine.running("deploy", number)
        machine.boot()
        system.shell(number, "date +%N > /etc/mark")
        said = machine.run("deploy", number, status=REFUSED).stderr
        assert re.search(r"has a subvolume that no other one has: /etc/(data|more) \(start it", said)
        machine.running("deploy", number, "--fresh")
        assert not system.remains()


def test_the_distributions_own_tool_makes_an_initramfs_for_a_deployment(machine: Machine) -> None:
    (machine.etc / "modprobe.d/mine.conf").write_text("blacklist mine\n")
    machine.running("deploy", machine.system.clone())
    root = machine.next_etc.parent
    (path,) = root.glob("boot/initrd.img-*")
    assert "etc/modprobe.d/mine.conf" in program("chroot", root, "lsinitramfs", f"/boot/{path.name}").splitlines()
    assert not [name for name in os.listdir(root / "var") if name != "tmp"]


def test_at_shutdown_later_edits_are_kept_beside_a_fresh_etc(machine: Machine) -> None:
    other = machine.system.clone()
    machine.running("deploy", other, "--fresh-etc")
    (machine.etc / "own").write_text("later\n")
    said = machine.run("carry").stdout
    assert re.search(r"left behind \(copies are in /var/lib/ash/conflicts/\S+\): own", said)
    assert not (machine.next_etc / "own").exists()
    (kept,) = (machine.files.var / "lib/ash/conflicts").glob(f"{other}-*/etc/own")
    assert kept.read_text() == "later\n"
    assert machine.running("carry") == {**machine.running("carry"), "changed": False, "conflicts": []}
    assert "own" in machine.running("deploy", other)["carried"], "without the option it is not up to date"


def test_fsck_finds_that_the_base_of_the_carry_is_lost(machine: Machine) -> None:
    system = machine.system
    (machine.etc / "before").write_text("1\n")
    slot = machine.running("deploy", system.clone())["slot"]
    program("btrfs", "subvolume", "delete", system.files.etc(f"carried-{slot}"))
    assert f"etc-carried-{slot} is missing" in system.ash("fsck", status=FAILED).stdout
    system.ash("fsck", "--repair")
    system.is_sound()
    (machine.etc / "after").write_text("2\n")
    assert machine.running("carry")["carried"] == ["after"]
    assert [(machine.next_etc / name).read_text() for name in ("before", "after")] == ["1\n", "2\n"]


def test_at_shutdown_without_a_new_deployment_nothing_happens(machine: Machine) -> None:
    (machine.etc / "own").touch()
    assert machine.running("carry")["changed"] is False
    assert (machine.etc / "own").exists()


def test_rollback_keeps_the_running_system_with_its_etc(machine: Machine) -> None:
    (machine.etc / "own").write_text("mine\n")
    answer = machine.system.ash("--json", "rollback").json
    assert (machine.system.root(answer["snapshot"]) / "etc/own").read_text() == "mine\n"
    assert (machine.next_etc / "own").read_text() == "mine\n"


def test_fsck_finds_nothing_afterwards(system: System) -> None:
    """The last test of this module."""
    assert system.ash("--json", "fsck").json["damage"] == []


def test_install_says_that_the_running_etc_has_other_repositories(machine: Machine) -> None:
    number = machine.system.ash("--json", "status").json["next"]["snapshot"]
    (machine.etc / "apt/sources.list.d/acme.list").write_text("deb [trusted=yes] file:/nowhere ./\n")
    hint = f"are not those of snapshot {number}: ash etc-update"
    assert hint in machine.run("install", number, "ash-test-acme", status=MISSING).stderr
    other = machine.system.clone()
    hint = f"are not those of snapshot {other}: ash deploy {other}, reboot, ash etc-update"
    assert hint in machine.run("install", other, "ash-test-acme", status=MISSING).stderr
    machine.run("etc-update")
    assert "are not those" not in machine.run("install", number, "ash-test-acme", status=MISSING).stderr


def test_etc_update_names_what_it_does_not_save(machine: Machine) -> None:
    before = (machine.etc / "machine-id").read_text()
    (machine.etc / "machine-id").write_text(f"{'0' * 31}1\n")
    assert (
        "not saved, since every snapshot runs with those of the machine: machine-id" in machine.run("etc-update").stdout
    )
    (machine.etc / "machine-id").write_text(before)
