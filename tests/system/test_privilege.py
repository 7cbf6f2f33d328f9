# SPDX-License-Identifier: AGPL-3.0-or-later
"""What ash does as root leaks no secrets, follows no planted symlinks and runs no programs of its caller."""

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ash
from ash import Layout, VarMerge, copy_file, make_private_directory
from tests.support import ASH, CHECKOUT, DISTRIBUTION, FAILED, OURS_IN_RUN, SNAPSHOTS, VAR, program
from tests.system.disk_system import Machine, System, everything_below, installed_ash

DISTRO = ash.load_distro(DISTRIBUTION)

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]

SECRET = "s3cret-of-the-host"
KEY = "k3y-of-the-machine"


def copies_in(system: System, text: str = SECRET) -> list[str]:
    """The files that contain the secret, wherever ash may have written, except history and locks, which contain command lines."""
    files = system.files
    directories = [
        files.state,
        files.var / "lib",
        files.grub_cfg.parent,
        files.snapshots / "etc",
        files.snapshots / "boot",
    ]
    for name in ("etc", "boot", "usr/share/ash", "usr/lib/systemd/system"):
        directories += (files.snapshots / "rootfs").glob(f"*/{name}")
    argv = [
        "grep",
        "-rlsF",
        "--exclude=history",
        "--exclude=lock",
        "--exclude=initrd.img-*",
        "--exclude=vmlinuz-[4-8]*",
        text,
    ]
    argv += (str(directory) for directory in directories if not directory.is_symlink())
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.splitlines()


# Modes


def below(directory: Path, mode: int) -> None:
    """Assert that a directory has no permissions for others beyond a mode."""
    assert not stat.S_IMODE(directory.stat().st_mode) & ~mode, f"{directory} is {directory.stat().st_mode:o}"


def test_a_copy_is_never_more_readable_than_its_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "key"
    source.write_text(SECRET)
    source.chmod(0o600)
    modes = []

    def plainly(old: int, new: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(new).st_mode))
        os.sendfile(new, old, 0, 1 << 20)
        modes.append(stat.S_IMODE(os.fstat(new).st_mode))

    monkeypatch.setattr(ash, "copy_content", plainly)
    for mode in (0o600, 0o4755):
        source.chmod(mode)
        copy_file(source, tmp_path / f"copy-{mode}")
        assert stat.S_IMODE((tmp_path / f"copy-{mode}").stat().st_mode) == mode
    assert modes == [0o600] * 4
    os.mkfifo(tmp_path / "pipe", 0o600)
    made: list[int] = []
    mkfifo = os.mkfifo

    def noted(path: Path, mode: int = 0o666) -> None:
        made.append(mode)
        mkfifo(path, mode)

    monkeypatch.setattr(os, "mkfifo", noted)
    copy_file(tmp_path / "pipe", tmp_path / "copy-of-pipe")
    assert made == [0o600]


def test_a_copy_does_not_follow_a_symlink_planted_by_the_directorys_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of a directory in /var replaces the new file by a symlink before its mode is set."""
    victim, source, target = tmp_path / "victim", tmp_path / "source", tmp_path / "target"
    victim.write_text("")
    victim.chmod(0o600)
    source.write_text("x")
    source.chmod(0o666)
    os.setxattr(source, "user.x", b"1")
    content = ash.copy_content

    def replaced(old: int, new: int) -> None:
        content(old, new)
        target.unlink()
        target.symlink_to(victim)

    monkeypatch.setattr(ash, "copy_content", replaced)
    copy_file(source, target)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert os.listxattr(victim) == []


def test_a_file_replaced_while_it_is_copied_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory's owner replaces it by a symlink or FIFO after it was checked."""
    victim, source, target = tmp_path / "victim", tmp_path / "source", tmp_path / "target"
    victim.write_text(SECRET)
    os.setxattr(victim, "user.x", SECRET.encode())
    look = Path.lstat

    def replaced(path: Path, put: Callable[[], None]) -> os.stat_result:
        found = look(path)
        if path == source:
            source.unlink()
            put()
        return found

    for put in (lambda: source.symlink_to(victim), lambda: os.mkfifo(source), lambda: os.mknod(source, 0o140600)):
        source.write_text("x")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "lstat", lambda path, put=put: replaced(path, put))
            with pytest.raises(ash.AshError, match="not a regular file"):
                copy_file(source, target)
        assert not target.exists()
        source.unlink()
    source.write_text("x")
    os.setxattr(source, "user.x", b"own")
    with monkeypatch.context() as patched:  # when its content has been copied
        content = ash.copy_content

        def replaced_late(old: int, new: int) -> None:
            content(old, new)
            source.unlink()
            source.symlink_to(victim)

        patched.setattr(ash, "copy_content", replaced_late)
        copy_file(source, target)
    assert os.getxattr(target, "user.x") == b"own"


def test_users_cannot_reach_what_a_transaction_writes_to_var(system: System, snapshot: int) -> None:
    """A world-writable directory such as /var/tmp would stay world-writable where root copies from."""
    with system.at_work(snapshot, "touch /var/tmp/x"):
        work = system.files.state / "work" / str(snapshot)
        found = [path for path in work.rglob("*") if path.name == "tmp" and not path.is_relative_to(work / "var")]
        assert found
        for path in found:
            assert path.stat().st_mode & 0o1777 == 0o1777
            closed = [parent for parent in path.parents if parent.is_relative_to(work) and parent != work]
            assert any(parent.stat().st_mode & 0o77 == 0 and parent.stat().st_uid == 0 for parent in closed)


def test_a_private_directory_in_var_is_private_before_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper, origin, live = (tmp_path / name for name in ("upper", "origin", "live"))
    for directory in (upper / "lib/new/deep", upper / "lib/old", origin / "lib", live / "lib/old"):
        directory.mkdir(parents=True)
    for name in ("new", "new/deep", "old"):
        (upper / "lib" / name / "file").write_text(SECRET)
        (upper / "lib" / name).chmod(0o700)
    original, seen = ash.copy_file, []

    def watched(source: Path, target: Path, **options: Any) -> None:
        below(target.parent, 0o700)
        seen.append(target.name)
        original(source, target, **options)

    monkeypatch.setattr(ash, "copy_file", watched)
    merge = VarMerge(upper, origin, live, DISTRO.package_manager, tmp_path / "aside", delete=())
    for entry in ("lib/new", "lib/old"):
        merge.merge(entry, "place")
    assert len(set(seen)) == 1, "one name that is its own"
    assert merge.token in seen[0], "and that nobody knows"
    assert len(seen) == 3
    assert VarMerge(upper, origin, live, DISTRO.package_manager, tmp_path, delete=()).token != merge.token


def test_secrets_stay_secret_wherever_they_are_copied(machine: Machine, snapshot: int) -> None:
    system, etc = machine.system, machine.etc
    system.shell(
        snapshot,
        f"umask 077; echo theirs > /etc/both; mkdir /var/lib/own-keys; echo {KEY} > /var/lib/own-keys/key;"
        f"echo {KEY} > /etc/from-snapshot; echo {KEY} > /boot/key",
    )
    for name in ("both", "own"):
        (etc / name).touch(mode=0o600)
        (etc / name).write_text(KEY)
    (etc / "shadow").write_text(f"{(etc / 'shadow').read_text()}ada:{KEY}:1:0:9:7:::\n")
    (etc / "ssh").mkdir(exist_ok=True)
    (etc / "ssh/ssh_host_rsa_key").touch(mode=0o600)
    (etc / "ssh/ssh_host_rsa_key").write_text(KEY)
    conflicts = system.files.var / "lib/ash/conflicts"
    conflicts.mkdir(parents=True, exist_ok=True)
    conflicts.chmod(0o777)
    os.chown(conflicts, 1000, 1000)
    answer = machine.deploy(snapshot)
    assert answer["conflicts"] == ["both"]
    assert (stat.S_IMODE(conflicts.stat().st_mode), conflicts.stat().st_uid) == (0o700, 0)
    machine.running("carry")
    copies = copies_in(system, KEY)
    assert len(copies) >= 9, copies
    for copy in map(Path, copies):
        readable = stat.S_IMODE(copy.stat().st_mode)
        assert readable == (0o640 if copy.name.startswith("shadow") else 0o600), f"{copy} is {readable:o}"


# Symlinks


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host, which must not change."""
    directory = tmp_path / "outside"
    (directory / "dpkg/info").mkdir(parents=True)
    package = f"Package: {SECRET}\nStatus: install ok installed\nVersion: {SECRET}\n"
    (directory / "dpkg/status").write_text(package)
    (directory / "dpkg/info" / f"{SECRET}.list").write_text(f"/usr/{SECRET}\n")
    (directory / "dpkg/lock").touch()
    (directory / "dpkg/diversions").write_text(f"/usr/bin/less\n/{SECRET}\n:\n")
    (directory / "dkms/build").mkdir(parents=True)
    (directory / "dkms/build/make.log").write_text(SECRET)
    (directory / "apt").mkdir()
    (directory / "apt/extended_states").write_text(f"Package: {SECRET}\nAuto-Installed: 1\n")
    (directory / "ucf").mkdir()
    (directory / "ucf/registry").write_text(f"0  {SECRET}\n")
    for name in ("secret", "resolv.conf", "fstab", "passwd", "ash-carry.service", "shells.state", "ash.conf"):
        (directory / name).write_text(f"{SECRET}:x:0:0:{SECRET}\nNAME={SECRET}\n")
    before = everything_below(directory)
    yield directory
    assert everything_below(directory) == before


def tried(system: System, *words: str | int) -> int:
    """Run ash with any result; assert that it prints no traceback and nothing from outside. Returns its exit status."""
    argv = [*ASH, "--image", str(system.image), *map(str, words)]
    ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert not re.search("Traceback|an error in ash itself", ended.stderr), ended.stderr
    assert SECRET not in ended.stdout + ended.stderr, f"{words}: {ended}"
    return ended.returncode


def every_command(system: System, machine: Machine, snapshot: int) -> dict[str, int]:
    """Run all commands that read or write in a snapshot; returns their exit statuses."""
    lines = [
        f"diff 0 {snapshot} --patch --files",
        f"diff {snapshot} 0 --patch",
        f"list {snapshot}",
        "tree -l",
        "fsck",
        f"run {snapshot} true",
        f"mutable {snapshot}",
        f"immutable {snapshot}",
        f"undo {snapshot}",
        f"undo {snapshot}",
        f"clone {snapshot}",
        f"deploy {snapshot}",
        "diff --patch",
        "etc-update",
        "recover",
    ]
    statuses = {}
    for line in lines:
        statuses[line.split()[0]] = tried(system, *line.split())
    return statuses


FILES = [
    "etc/fstab",
    "etc/os-release",
    "etc/motd",
    "etc/resolv.conf",
    "etc/default/grub",
    "usr/share/ash/snap",
    "usr/lib/systemd/system/ash-carry.service",
    "usr/lib/systemd/system/local-fs.target.wants/ash-recover.service",
]
KERNEL = "boot/vmlinuz-99"


DATABASE = ["dpkg/status", "dpkg/info", "dpkg/diversions", "dpkg/lock", "ucf", "apt/extended_states"]


def link(system: System, snapshot: int, links: dict[str, Path | str]) -> None:
    """Create symlinks in a snapshot."""
    lines = [f"rm -rf '/{path}'; ln -s '{target}' '/{path}'" for path, target in links.items()]
    system.shell(snapshot, "\n".join(lines))


@pytest.mark.parametrize("with_kernel", [False, True])
def test_symlinks_in_place_of_a_snapshots_files_do_not_lead_out_of_it(
    machine: Machine, outside: Path, with_kernel: bool
) -> None:
    """GRUB cannot load a kernel that is such a symlink: it is not deployed."""
    system = machine.system
    number, before = system.clone(), system.files.default_slot()
    up = "../" * 20
    link(system, number, dict.fromkeys([*FILES, KERNEL] if with_kernel else FILES, f"{up}{outside}/secret"))
    statuses = every_command(system, machine, number)
    failed = {name for name, status in statuses.items() if status}
    assert failed - {"fsck", "undo"} == ({"deploy"} if with_kernel else set()), statuses
    assert (system.files.default_slot() == before) is with_kernel
    assert copies_in(system) == []


@pytest.mark.parametrize(
    "links",
    [
        {"etc/passwd": "passwd", "etc/ash.conf": "ash.conf", "usr/share/ash/db/shells.state": "shells.state"},
        {"usr/share/ash/db": ""},
        {"usr/share/ash/db/dpkg": "dpkg"},
        {f"usr/share/ash/db/{name}": name for name in DATABASE},
        {"usr/share/ash/db/dkms/x/1/build/make.log": "secret", "usr/share/ash/db/dkms/x/2": "dkms"},
        {"usr/share/ash": "", "usr/lib/systemd/system": ""},
        {"boot": ""},
    ],
    ids=" ".join,
)
def test_symlinks_in_place_of_a_snapshots_directories_do_not_lead_out_of_it(
    system: System, snapshot: int, outside: Path, links: dict[str, str]
) -> None:
    """A mutable snapshot can be changed without ash."""
    system.ash("mutable", snapshot)
    for path, target in links.items():
        place = system.root(snapshot) / path
        ash.remove_tree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(outside / target)
    for line in (
        f"diff 0 {snapshot} --patch",
        f"list {snapshot}",
        "fsck",
        f"run {snapshot} touch /etc/x",
        f"deploy {snapshot}",
    ):
        tried(system, *line.split())
    tried(system, "install", snapshot, "nothing")
    tried(system, "immutable", snapshot)
    assert copies_in(system) == []


def test_paths_in_a_package_list_are_resolved_inside_the_snapshot(system: System, snapshot: int, outside: Path) -> None:
    """Nobody learns which files exist in a directory of the host."""
    system.ash("mutable", snapshot)
    root = system.root(snapshot)
    (root / "usr/led").symlink_to(outside)
    listing = root / "usr/share/ash/db/dpkg/info/less.list"
    up = "../" * 20
    listing.write_text(f"/usr/led\n/usr/led/secret\n/usr/{up}{outside}/secret\n{listing.read_text()}")
    assert DISTRO.package_manager.problems(root) == ["package less lacks /usr/led/secret (2 files)"]


def test_symlinks_in_place_of_mount_points_do_not_lead_out_of_the_snapshot(system: System, snapshot: int) -> None:
    system.ash("mutable", snapshot)
    root = system.root(snapshot)
    for name in ("dev", "proc", "run", "sys", "tmp", "var"):
        ash.remove_tree(root / name)
        (root / "opt" / name).mkdir()
        (root / name).symlink_to(f"/opt/{name}")
    system.shell(
        snapshot,
        "test -c /dev/null; test -f /proc/self/status; test -d /run/lock; test -d /sys/kernel; test -d /var/lib;"
        "for name in dev proc run sys tmp var; do mountpoint -q /opt/$name; done",
    )
    tried(system, "deploy", snapshot)


@pytest.mark.parametrize("name", ash.ID_FILES)
def test_only_accounts_of_the_snapshot_are_renumbered(tmp_path: Path, name: str) -> None:
    line = "ada:1000:65536\n" if name.startswith("sub") else "ada:x:1000:1000:::\n"
    (tmp_path / "host").write_text(line)
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc" / name).symlink_to(tmp_path / "host")
    ash.Renumbering({name: {"ada": 1001}}, {}).apply(tmp_path / "root", {})
    assert (tmp_path / "host").read_text() == line


@pytest.mark.parametrize("directory", ["etc", "boot"])
def test_a_symlink_in_place_of_a_configuration_directory_is_refused(
    system: System, snapshot: int, outside: Path, directory: str
) -> None:
    with system.nothing_changes():
        refused = system.shell(snapshot, f"mv /{directory} /x; ln -s {outside} /{directory}", status=125)
    assert f"/{directory} of snapshot" in refused.stderr


def test_symlinks_in_mutable_directories_do_not_lead_out_of_them(system: System, snapshot: int, outside: Path) -> None:
    system.shell(snapshot, "echo mutable_dirs_shared::srv > /etc/ash.conf")
    system.shell(snapshot, f"ln -s {outside} /srv/x; echo mutable_dirs_shared::srv/x > /etc/ash.conf")
    assert tried(system, "run", snapshot, "touch", "/srv/x/new") != 0
    assert tried(system, "deploy", snapshot) != 0


def test_a_symlink_planted_in_var_is_not_followed(system: System, snapshot: int, outside: Path) -> None:
    """Neither in an entry, a cache or a log, nor in place of the directory of entries."""
    var = system.files.var
    places = ["lib/led", "cache/man/led", "log/apt/led", "www/led/deep", "spool/led"]
    for place in places:
        (var / place).mkdir(parents=True)
    script = " ".join(f"echo x > /var/{place}/secret; echo y > /var/{place}/new;" for place in places)
    with system.at_work(snapshot, script):
        for place in [*places[:-2], "www", "spool"]:
            ash.remove_tree(var / place)
            (var / place).symlink_to(outside)
    assert not (var / "cache/man/led").is_symlink() or not (outside / "new").exists()
    for place in ("www", "spool", "lib/led"):
        ash.remove_tree(var / place)


@pytest.mark.parametrize("place", ["lib/ash", "lib/ash/conflicts"])
def test_the_conflicts_directory_cannot_be_redirected(
    machine: Machine, snapshot: int, outside: Path, place: str
) -> None:
    system = machine.system
    system.shell(snapshot, "echo theirs > /etc/motd")
    (machine.etc / "motd").write_text("mine\n")
    ash.remove_tree(system.files.var / place)
    (system.files.var / place).symlink_to(outside)
    answer = machine.deploy(snapshot)
    assert (machine.aside(answer) / "motd").read_text() == "mine\n"
    assert not (system.files.var / place).is_symlink()


def test_a_private_directory_is_never_an_existing_one(tmp_path: Path) -> None:
    """Two created within one second are not the same."""
    directory = tmp_path / "var/lib/ash/conflicts/5-now"
    (tmp_path / "var/lib").mkdir(parents=True)
    make_private_directory(directory)
    below(directory.parent, 0o700)
    (directory.parent / "planted").symlink_to(tmp_path)
    make_private_directory(directory)
    (tmp_path / "other/lib").parent.mkdir()
    (tmp_path / "other/lib").symlink_to(tmp_path)
    with pytest.raises(ash.AshError, match="is a symlink"):
        make_private_directory(tmp_path / "other/lib/ash/conflicts/1")


def test_directories_of_var_do_not_become_symlinks(system: System, snapshot: int, outside: Path) -> None:
    with system.nothing_changes():
        script = f"rm -rf /var/lib 2>/dev/null || true; ln -sfn {outside} /var/lib"
        assert "/var/lib" in system.shell(snapshot, script, status=125).error


# Programs and the environment


def fakes(directory: Path, *names: str) -> Path:
    """A directory with programs that record that they were run."""
    directory.mkdir()
    for name in names:
        (directory / name).write_text(f"#!/bin/bash\ntouch '{directory}/ran-{name}'\nexit 0\n")
        (directory / name).chmod(0o755)
    return directory


def ran(directory: Path) -> list[str]:
    """The programs that were run."""
    return sorted(path.name for path in directory.glob("ran-*"))


PROGRAMS = ["btrfs", "cp", "sh", "mount", "chroot", "unshare", "grub-mkconfig", "env", "apt-get", "losetup", "python3"]


@pytest.mark.parametrize("built", [False, True], ids=["ash.py", "executable"])
def test_the_callers_environment_does_not_reach_programs_run_as_root(
    system: System, tmp_path: Path, built: bool
) -> None:
    hostile = fakes(tmp_path / "bin", *PROGRAMS)
    for module in ("json", "argparse", "anytree", "sitecustomize", "startup"):
        (hostile / f"{module}.py").write_text(f"open('{hostile}/ran-{module}', 'w')\nraise SystemExit(9)\n")
    environment = {
        "PATH": f"{hostile}:{os.environ['PATH']}",
        "LD_PRELOAD": f"{hostile}/nothing.so",
        "PYTHONPATH": str(hostile),
        "PYTHONSTARTUP": f"{hostile}/startup.py",
        "PYTHONHOME": str(hostile),
        "TMPDIR": str(hostile),
        "BASH_ENV": f"{hostile}/btrfs",
        "ENV": f"{hostile}/btrfs",
        "IFS": "/",
    }
    argv = list(ASH)
    if built:
        argv = [str(installed_ash(system.files, tmp_path))]
    number = system.clone()
    for line in (f"clone {number}", f"run {number} env", "diff 0 1", f"deploy {number}"):
        words = [*argv, "--image", str(system.image), *line.split()]
        ended = subprocess.run(words, cwd=hostile, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended
        assert str(hostile) not in ended.stdout
        assert ended.stderr.count("cannot be preloaded") <= 1 + built, "only ash itself was started so"
    assert ran(hostile) == []


def test_programs_of_a_snapshot_only_run_inside_it(system: System, snapshot: int, tmp_path: Path) -> None:
    """Inside the snapshot, they cannot touch the host's files."""
    text = f'#!/bin/bash\\ntouch {tmp_path}/ran-$(basename $0)\\nexec /bin/bash --posix \\"$@\\"\\n'
    script = f"""
        for name in btrfs cp mount chroot sh; do
            rm -f /usr/local/bin/$name; printf "{text}" > /usr/local/bin/$name; chmod 755 /usr/local/bin/$name
            [ $name = sh ] || cp --remove-destination /usr/local/bin/$name /usr/bin/$name 2>/dev/null || true
        done"""
    system.shell(snapshot, script)
    for line in ("diff 0 {0} --files", "run {0} /bin/true", "deploy {0}", "undo {0}", "clone {0}", "fsck"):
        tried(system, *line.format(snapshot).split())
    assert ran(tmp_path) == []


def test_a_symlink_planted_during_the_merge_of_var_is_not_followed(
    system: System, snapshot: int, tmp_path: Path
) -> None:
    victim = system.files.var / "lib/victim/inner"
    victim.mkdir(parents=True)
    options = {"link": ["copy .ash-new", f"/run/ash/top/{VAR}/lib/victim/inner", str(tmp_path)]}
    ended = system.with_hooks(options, "run", snapshot, "sh", "-c", "echo x > /var/lib/victim/inner/file")
    assert "/var/lib/victim: Too many levels of symbolic links" in ended.stderr
    assert victim.is_symlink()
    assert not list(tmp_path.iterdir())
    aside = (system.files.var / "lib/ash/conflicts").glob(f"{snapshot}-*/lib/victim/inner/file")
    assert [path.read_text() for path in aside] == ["x\n"]


def test_a_file_replaced_during_renumbering_is_not_chowned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new owner replaces it by a symlink at once."""
    victim, own = tmp_path / "victim", tmp_path / "own"
    for path, mode in ((victim, 0o600), (own, 0o4755)):
        path.write_text("")
        path.chmod(mode)
    os.setxattr(own, "security.capability", (0x2000001).to_bytes(4, "little") + bytes(16))
    os.chown(own, 5, 5)
    for name in ("chown", "fchown"):
        give = getattr(os, name)

        def replaced(*words: Any, give: Any = give, **named: Any) -> None:
            give(*words, **named)
            own.unlink()
            own.symlink_to(victim)

        monkeypatch.setattr(os, name, replaced)
    ash.chown_by_map(own, tmp_path / "nothing", {5: 6}, {5: 6})
    assert own.is_symlink()
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert os.listxattr(victim) == []


# FIFOs


@pytest.mark.parametrize("pipe", ["etc/resolv.conf", "etc/os-release", "etc/fstab", ash.IN_ROOT_SNAP])
def test_a_fifo_in_place_of_a_file_does_not_block(system: System, snapshot: int, pipe: str) -> None:
    system.ash("mutable", snapshot)
    place = system.root(snapshot) / pipe
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    statuses = []
    for words in (["run", snapshot, "touch", "/etc/x"], ["deploy", snapshot], ["diff", 0, snapshot, "--patch"]):
        argv = [*ASH, "--image", str(system.image), *map(str, words)]
        ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        assert not re.search("Traceback|an error in ash itself", ended.stderr), ended.stderr
        statuses.append(ended.returncode)
        if ended.returncode:
            assert re.fullmatch(r"(\[.*\n)*ash: .* is not a regular file.*\n", ended.stderr), ended.stderr
    assert statuses[1:] == ([0, 0] if pipe == "etc/resolv.conf" else [statuses[1], 0])
    assert statuses[0] == (OURS_IN_RUN if pipe == "etc/os-release" else 0)
    assert place.is_fifo()
    system.ash("deploy", 0)
    for words in (["run", snapshot, "sh", "-c", f"rm /{pipe}; mkfifo /{pipe}"],):
        argv = [*ASH, "--image", str(system.image), *map(str, words)]
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert not system.remains()


@pytest.mark.parametrize("compares", [ash.is_same, ash.is_merged])
def test_a_fifo_planted_during_a_comparison_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compares: Callable[[Path, Path], bool]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_text("x")
    look = Path.lstat

    def replaced(path: Path) -> os.stat_result:
        found = look(path)
        if path == theirs and path.is_file():
            path.unlink()
            os.mkfifo(path)
        return found

    theirs.write_text("x")
    os.utime(theirs, (1, 1))
    assert compares(ours, theirs)
    monkeypatch.setattr(Path, "lstat", replaced)
    monkeypatch.setattr(os.path, "lexists", lambda _: True)

    def too_late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(10)
    try:
        assert not compares(ours, theirs)
    finally:
        signal.alarm(0)


# Directories that are too deep


def make_deep(directory: Path, levels: int) -> None:
    """Create nested directories whose paths are too long to use."""
    script = 'import os, sys\nos.chdir(sys.argv[1])\nfor _ in range(int(sys.argv[2])):\n os.mkdir("d")\n os.chdir("d")'
    program(sys.executable, "-c", script, str(directory), str(levels))


@pytest.mark.parametrize("levels", [1100, 5000])
def test_directories_of_users_may_have_any_depth(system: System, snapshot: int, levels: int) -> None:
    """Anybody can create them in /var/tmp; they must not block changes."""
    deep = system.files.var / "tmp" / f"deep-{levels}"
    deep.mkdir()
    try:
        make_deep(deep, levels)
        system.shell(snapshot, f"echo x > /var/tmp/mark-{snapshot}; echo x > /etc/mark")
        assert (system.root(snapshot) / "etc/mark").exists()
        assert not system.remains()
        with system.at_work(snapshot, f"echo x > /var/tmp/other-{snapshot}"):
            make_deep(deep / "d", 0)
            (deep / "d/new").touch()
        assert (deep / "d/new").exists()
        assert not system.remains()
    finally:
        program("rm", "-rf", str(deep))


def test_a_transaction_may_create_deep_directories(system: System, snapshot: int) -> None:
    deep = "d/" * 1100
    entry = system.files.var / f"lib/deep-{snapshot}"
    system.shell(snapshot, f"mkdir -p /var/lib/deep-{snapshot}/{deep}; touch /var/lib/deep-{snapshot}/{deep}/file")
    assert (entry / deep / "file").exists()
    system.shell(snapshot, f"mkdir -p /var/lib/dropped-{snapshot}/{deep}; exit 1", status=1)
    assert not system.remains()
    system.shell(snapshot, f"mkdir -p /var/log/apt/{deep}; echo x > /var/log/apt/{deep}/file")
    system.shell(snapshot, f"mkdir -p /var/log/apt/{deep}; echo y >> /var/log/apt/{deep}/file")
    assert (system.files.var / "log/apt" / deep / "file").read_text() == "x\ny\n"
    for path in (entry, system.files.var / "log/apt/d"):
        program("rm", "-rf", str(path))


def test_a_transaction_that_creates_too_deep_directories_is_refused(system: System, snapshot: int) -> None:
    system.shell(snapshot, "true")  # the first change creates the reserve
    script = 'import os; os.chdir("/var/lib"); [(os.mkdir("x"), os.chdir("x")) for _ in range(5000)]'
    with system.nothing_changes():
        refused = system.shell(snapshot, f"echo x > /etc/x; python3 -c '{script}'", status=OURS_IN_RUN)
        assert "/var/lib/x are nested too deeply" in refused.error
        assert len(refused.error) < 200
        script = script.replace("/var/lib", "/usr").replace('"x"', '"x" * 200').replace("5000", "50")
        assert system.shell(snapshot, f"python3 -c '{script}'", status=OURS_IN_RUN).error


def test_an_unrecoverable_work_directory_does_not_block_others(
    system: System, snapshot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = system.clone()
    for number in (snapshot, other):
        system.killed_before("exchange ", "run", number, "touch", "/etc/x")
    layout = Layout.at(system.files.top, DISTRIBUTION)
    recover = ash.WorkDir.recover

    def failing(place: ash.WorkDir, tree: ash.Tree, drop_kept: bool = False, *, strict: bool = False) -> None:
        if place.name == snapshot:
            raise RecursionError("too deep")
        recover(place, tree, drop_kept, strict=strict)

    monkeypatch.setattr(ash.WorkDir, "recover", failing)
    with pytest.raises(RecursionError):
        ash.recover_all(ash.System(layout, DISTRO), drop_kept=False)
    monkeypatch.undo()
    assert system.remains()
    assert not list((system.files.state / f"work/{other}").glob("intent"))
    system.ash("recover")
    assert not system.remains()


@pytest.mark.parametrize("words", ["deploy", "carry", "etc-update"])
def test_a_symlink_planted_during_the_carry_of_etc_is_not_followed(
    machine: Machine, snapshot: int, tmp_path: Path, words: str
) -> None:
    """The owner of a directory in the running /etc replaces it by a symlink while root copies its content."""
    system, own = machine.system, machine.etc / "own"
    if words == "carry":
        machine.deploy(system.clone(snapshot))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text(SECRET)
    own.mkdir()
    (own / "file").write_text("mine\n")
    top = f"/run/ash/top/{SNAPSHOTS}/rootfs"
    options = {
        "link": ["copy .ash-new", f"{top}/snapshot-{machine.slot}/etc/own", str(tmp_path / "outside")],
        "booted": machine.slot,
    }
    ended = system.with_hooks(options, words, *([system.clone(snapshot)] if words == "deploy" else []))
    assert ended.returncode == 0, ended.stderr
    assert own.is_symlink()
    saved = system.files.etc(snapshot) if words == "etc-update" else machine.next_etc
    assert (saved / "own/file").read_text() == "mine\n"
    assert copies_in(system) == []


def test_directories_too_deep_to_carry_stay_in_the_running_etc(machine: Machine, snapshot: int) -> None:
    make_deep(machine.etc, 5000)
    try:
        (machine.etc / "mark").touch()
        answer = machine.deploy(machine.system.clone(snapshot))
        assert "mark" in answer["carried"]
        assert len(answer["conflicts"]) == 1, "the first that is too deep"
        machine.running("carry")
    finally:
        program("rm", "-rf", str(machine.etc / "d"))


def test_ash_never_imports_libraries_from_the_disk_it_inspects(system: System) -> None:
    """ash of the host runs as root, but anybody may have made the disk."""
    argv = [
        sys.executable,
        "-I",
        "-S",
        str(CHECKOUT / "ash.py"),
        "--image",
        str(system.image),
        "tree",
    ]  # -S: without site-packages
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (system.files.state / "lib/anytree").is_dir()
    assert (ended.returncode, ended.stdout) == (FAILED, "")
    assert re.fullmatch(r"ash: Python has no module anytree \(install python3-anytree, or .*\)\n", ended.stderr)
