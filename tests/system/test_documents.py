# SPDX-License-Identifier: AGPL-3.0-or-later
"""Each command line in the documents of AshOS and astOS, typed as it is written, does what the document says.

`ash upself` has tests of its own, in test_upself.py. What needs a kernel of its own is for the boot tests: `reboot`,
choosing the last booted deployment in GRUB's menu before `ash rollback`, and services that `ash install` starts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import ash
from tests.archive import Archive, use_only
from tests.support import DONE, FAILED, OURS_IN_RUN, REFUSED, USAGE, Outcome, wait_until
from tests.system.container import Container
from tests.system.disk_system import System

pytestmark = [pytest.mark.system, pytest.mark.budget(90)]

# Tiny packages under the names that the documents have, and those of the profile for GNOME.
UNIT = "[Service]\nExecStart=true\n[Install]\nWantedBy=multi-user.target\n"
PACKAGES: dict[str, dict[str, str]] = {
    "firefox": {},
    "thunderbird": {},
    "paru": {},
    "archlinux-keyring": {},
    "gnome-core": {},
    "gdm3": {"usr/lib/systemd/system/gdm.service": UNIT},
    "network-manager": {"usr/lib/systemd/system/NetworkManager.service": UNIT},
}
FOUND = "/dev/vda@/EFI/Microsoft/Boot/bootmgfw.efi:Windows Boot Manager:Windows:efi"
FINDS_WINDOWS = {"usr/bin/os-prober": f"#!/bin/sh\necho {FOUND}\n", "usr/bin/linux-boot-prober": "#!/bin/sh\n"}
TINY = "999"  # their version: newer than any that libc6 says it breaks
OLD, NEW = "1", "2"  # the versions of gimp: the first is installed, the second is in the archive


class World:
    """The running system, and the snapshots that a command line of a document refers to."""

    def __init__(self, running: Container, prepared: int, here: int) -> None:
        self.running = running
        self.system = running.system
        self.prepared = prepared
        self.here = here  # the booted snapshot
        self.begin()

    def begin(self) -> None:
        """Forget the snapshot numbers of the previous line."""
        self.numbers = {"here": self.here}
        self.said: list[Outcome] = []

    def __getitem__(self, name: str) -> int:
        """A number by the name that a line has for it.

        N has a branch, `below`, and that another, `deep`; `other` is another tree; M is the newest of all.
        """
        if name == "M":
            return int((self.system.files.state / "last").read_text())
        if name not in self.numbers:
            above = {"below": "N", "deep": "below"}.get(name)
            made = self.running.type(f"ash -q branch {self[above]}" if above else f"ash -q clone {self.prepared}")
            self.numbers[name] = int(made.stdout)
        return self.numbers[name]

    def type(self, line: str, status: int = DONE, keys: str = "") -> Outcome:
        """Type a line with the numbers in place of the names."""
        for name in re.findall(r"\{(\w+)\}", line):
            line = line.replace(f"{{{name}}}", str(self[name]))
        self.said.append(self.running.type(line, status, keys))
        return self.said[-1]

    @property
    def text(self) -> str:
        """What the last line printed."""
        return self.said[-1].stdout

    def root(self, name: str) -> Path:
        return self.system.root(self[name])

    @property
    def running_root(self) -> Path:
        return self.system.root(self.running.slot)

    @property
    def next_root(self) -> Path:
        """That of the deployment for the next boot."""
        return self.system.root(self.system.files.default_slot())

    def version(self, name: str, package: str) -> str:
        """The version of a package that a snapshot has; empty where it does not."""
        return version_in(self.root(name), package)

    def parent(self, name: str) -> int | None:
        tree = ash.Tree.parse((self.system.files.state / "fstree").read_text())
        return tree.parent(self[name])

    def description(self, name: str) -> str:
        return (self.system.files.state / f"snapshots/{self[name]}-desc").read_text().strip()

    def starts_next(self, name: str) -> bool:
        return (self.next_root / "usr/share/ash/snap").read_text().strip() == str(self[name])


def version_in(root: Path, package: str) -> str:
    """The version of an installed package in a root; empty where it is not installed."""
    status = (root / "usr/share/ash/db/dpkg/status").read_text()
    found = re.search(
        rf"^Package: {package}\nStatus: install ok installed\n(?:.+\n)*?Version: (.+)$", status, re.MULTILINE
    )
    return found[1] if found else ""


@pytest.fixture(scope="module")
def running(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A running system whose snapshots all have a local archive, and an old gimp."""
    archive = Archive(tmp_path_factory.mktemp("archive") / "files")
    for name, files in PACKAGES.items():
        archive.add(name, TINY, files=files)
    for version in (OLD, NEW):
        archive.add("gimp", version, files={"usr/share/gimp": f"{version}\n"})
    archive.add("broken", OLD)
    archive.add("broken", NEW, postinst="exit 1")
    archive.add("os-prober", files=FINDS_WINDOWS, postinst=f"chmod +x /{' /'.join(FINDS_WINDOWS)}")
    with archive.served() as url:
        machine = Container(system)
        script = f"{use_only(url)}\napt-get update && apt-get -y install gimp={OLD} && exit 0\n"
        machine.type("ash base-update --shell", keys=script)
        prepared = int(machine.type("ash -q clone 0").stdout)
        here = int(machine.type("ash -q clone 0").stdout)
        machine.type(f"ash deploy {here}")
        machine.boot()
        yield World(machine, prepared, here)


@pytest.fixture
def world(running: World) -> World:
    running.begin()
    return running


class Row(NamedTuple):
    """Command lines of a document.

    Args:
        words: the document's own, by which the line is found again.
        typed: the lines, some with what is typed into the program that they start.
        holds: what must be so then.
    """

    words: str
    typed: Sequence[str | tuple[str, str]]
    holds: Callable[[World], bool]


SETUP = """\
useradd username
passwd username
secret
secret
passwd root
secret
secret
apt-get -y install firefox
exit
"""


def has_a_password(world: World, name: str) -> bool:
    shadow = (world.root("M") / "etc/shadow").read_text()
    return re.search(rf"^{name}:\$", shadow, re.MULTILINE) is not None


ASHOS = [
    Row(
        "to install GNOME in snapshot 1",
        ["sudo ash clone 0", "sudo ash install-profile gnome {M}", "sudo ash deploy {M}"],
        lambda w: w.version("M", "gdm3") == TINY and w.parent("M") is None and w.starts_next("M"),
    ),
    Row(
        "once booted in base snapshot, run",
        ["sudo ash branch 0 # This produces node #N", "sudo ash install --profile {M} gnome", "sudo ash deploy {M}"],
        lambda w: w.version("M", "gnome-core") == TINY and w.parent("M") == 0 and w.starts_next("M"),
    ),
    Row(
        "small example setup procedure",
        ["ash clone 0", ("ash chroot {M}", SETUP), "ash deploy {M}"],
        lambda w: all(has_a_password(w, name) for name in ("username", "root")) and w.starts_next("M"),
    ),
    Row(
        "quick cheatsheet of all available commands",
        ["ash --help"],
        lambda w: all(command.usage in w.text for command in ash.COMMANDS),
    ),
    Row("only the number of the currently booted snapshot", ["ash current"], lambda w: w.text == f"{w.here}\n"),
    Row(
        "Snapshots allow you to add a description",
        ["ash desc {N} multi-user system"],
        lambda w: w.description("N") == "multi-user system",
    ),
    Row(
        "If you need to use a custom grub configuration",
        [("ash chroot {N}", "echo 'GRUB_CMDLINE_LINUX=of_a_document' >> /etc/default/grub\nexit\n"), "ash deploy {N}"],
        lambda w: "of_a_document" in w.system.files.grub_cfg.read_text(),
    ),
    Row(
        "install and remove packages using pacman or similar",
        [("ash chroot {N}", "apt-get -y install firefox\napt-get -y remove gimp\nexit\n")],
        lambda w: w.version("N", "firefox") == TINY and w.version("N", "gimp") == "",
    ),
    Row(
        "changes made to live session are not saved",
        [
            "ash deploy {here}",
            ("ash live-chroot", "touch /usr/share/unlocked\nexit\n"),
            "ls /usr/share/unlocked",
            "ash deploy {here}",
        ],
        lambda w: w.starts_next("here") and not (w.next_root / "usr/share/unlocked").exists(),
    ),
    Row("Runs a specified command inside snapshot", ["ash run {N} touch /etc/it"], lambda w: "it" in etc_of(w, "N")),
    Row(
        "inside snapshot and all it's branches",
        ["ash branch {N} && ash tree-run {N} touch /etc/it"],
        lambda w: "it" in etc_of(w, "N") and "it" in etc_of(w, "M"),
    ),
    Row("clones the snapshot as a new tree", ["ash clone {below}"], lambda w: w.parent("M") is None),
    Row(
        "clones an entire tree recursively",
        ["ash desc {deep} the deepest", "ash clone-tree {N}"],
        lambda w: w.description("M") == "the deepest" and w.parent("M") not in (w["below"], None),
    ),
    Row("Adds a new branch to specified snapshot", ["ash branch {N}"], lambda w: w.parent("M") == w["N"]),
    Row("Clone snapshot under same parent", ["ash cbranch {below}"], lambda w: w.parent("M") == w["N"]),
    Row(
        "Make sure to sync the tree afterwards",
        ["ash install {other} firefox", "ash ubranch {other} {N}", "ash sync {other}"],
        lambda w: w.parent("M") == w["other"] and w.version("M", "gimp") == NEW and bool(w.version("M", "firefox")),
    ),
    Row("Create new base tree", ["ash new"], lambda w: w.parent("M") is None),
    Row("Reboot to boot into the new snapshot after", ["ash deploy {N}"], lambda w: w.starts_next("N")),
    Row(
        "Update base which new snapshots are built from",
        ["ast base-update", "ash new"],
        lambda w: version_in(w.system.root(0), "gimp") == w.version("M", "gimp") == NEW,
    ),
    Row(
        "ash install <snapshot> <package>",
        ["ash install {N} firefox"],
        lambda w: w.version("N", "firefox") == TINY and not version_in(w.running_root, "firefox"),
    ),
    Row(
        "sync the newly installed packages to all the branches",  # which updates all, too
        ["ash branch {N}", "ast install {N} firefox", "ast sync {N}"],
        lambda w: w.version("M", "firefox") == TINY and w.version("N", "gimp") == w.version("M", "gimp") == NEW,
    ),
    Row(
        "If you wish to sync without updating",
        ["ash branch {N}", "ash install {N} firefox", "ash force-sync {N}"],
        lambda w: w.version("M", "firefox") == TINY and w.version("N", "gimp") == w.version("M", "gimp") == OLD,
    ),
    Row(
        "supports installing packages without rebooting",
        ["ash install --live {N} firefox"],
        lambda w: w.version("N", "firefox") == TINY and version_in(w.running_root, "firefox") == TINY,
    ),
    Row(
        "This is no longer needed by default",
        ["ash install thunderbird"],
        lambda w: w.version("here", "thunderbird") == TINY and version_in(w.running_root, "thunderbird") == TINY,
    ),
    Row(
        "ash remove <snapshot> <package or packages>",
        ["ash install {N} firefox paru", "ash remove {N} firefox paru"],
        lambda w: not w.version("N", "firefox") and not w.version("N", "paru") and w.version("N", "gimp") == OLD,
    ),
    Row(
        "ash tree-rmpkg <tree>",
        ["ash install {N} firefox paru", "ash branch {N}", "ash tree-rmpkg {N} firefox paru"],
        lambda w: not any(w.version(of, name) for of in ("N", "M") for name in ("firefox", "paru")),
    ),
    Row(
        "clone a snapshot before updating it",
        ["ash clone {N}", "ast upgrade {N}"],
        lambda w: w.version("N", "gimp") == NEW and w.version("M", "gimp") == OLD,
    ),
    Row(
        "To recursively update an entire tree",
        ["ash branch {N}", "ash tree-upgrade {N}"],
        lambda w: w.version("N", "gimp") == w.version("M", "gimp") == NEW,
    ),
    Row(
        "If you already have paru installed",
        ["ash install {N} paru", "ash remove {N} paru"],
        lambda w: not w.version("N", "paru"),
    ),
    Row(
        "reinstall they arch keyring",
        ["ash install {N} archlinux-keyring"],
        lambda w: w.version("N", "archlinux-keyring") == TINY,
    ),
    Row(
        "ash refresh <snapshots>",
        ["ash refresh {N} {other}"],
        lambda w: all(f"lists of snapshot {w[name]}\n" in w.said[-1].stderr for name in ("N", "other")),
    ),
    Row(
        "ash fixdb <snapshots>",
        [
            "for n in {N} {other}; do ash run $n sed -i '/^Package: gimp$/,/^$/s/ok installed/ok unpacked/'"
            " /var/lib/dpkg/status; done",
            "ash fixdb {N} {other}",
        ],
        lambda w: w.version("N", "gimp") == w.version("other", "gimp") == OLD,
    ),
    Row(
        "To do this use the following command",
        ["echo mine > /etc/issue", "ash etc-update"],
        lambda w: (w.root("here") / "etc/issue").read_text() == "mine\n",
    ),
    Row(
        "we must begin by installing the os-prober package",
        [
            "ash install {N} os-prober",
            ("ash chroot {N}", "echo 'GRUB_DISABLE_OS_PROBER=false' >> /etc/default/grub\nexit\n"),
            "ash deploy {N}",
        ],
        lambda w: (
            "Found Windows Boot Manager on " in w.said[-1].stderr
            and "Found linux" not in w.said[-1].stderr
            and "bootmgfw.efi" in w.system.files.grub_cfg.read_text()
        ),
    ),
    Row(
        "makes a node and any children",
        ["ash branch {N}", "sudo ash immen {N}", "ash branch {N}"],
        lambda w: is_mutable(w, w["N"]) and is_mutable(w, w["M"]) and not is_mutable(w, w["M"] - 1),
    ),
]

# Where both documents have the same words, `ast` is typed above.
ASTOS = [
    Row("creating a new snapshot from the base image", ["ast clone 0"], lambda w: w.parent("M") is None),
    Row(
        "Chroot inside this new snapshot",
        [("ast chroot {N}", "touch /etc/it\n exit\n")],
        lambda w: "it" in etc_of(w, "N"),
    ),
    Row("Then you can deploy it with", ["ast deploy {N}"], lambda w: w.starts_next("N")),
    Row("Show filesystem tree", ["ast tree"], lambda w: f"{w.here} - " in w.text or f"{w.here}*- " in w.text),
    Row("the currently booted snapshot with", ["ast current"], lambda w: w.text == f"{w.here}\n"),
    Row("ast desc <overlay>", ["ast desc {N} two words"], lambda w: w.description("N") == "two words"),
    Row("This removes the tree and all", ["ast branch {N}", "ast -y del {N}"], lambda w: not w.root("M").exists()),
    Row("Run ast deploy and reboot", ["ast deploy {N}", "ast deploy"], lambda w: w.starts_next("here")),
    Row("ast tree-update <overlay>", ["ast tree-update {N}"], lambda w: w.version("N", "gimp") == NEW),
    Row("This clones the snapshot as a tree", ["ast clone {N}"], lambda w: w.parent("M") is None),
    Row("Create new tree branch", ["ast branch {N}"], lambda w: w.parent("M") == w["N"]),
    Row("ast cbranch <snapshot>", ["ast cbranch {below}"], lambda w: w.parent("M") == w["N"]),
    Row("ast ubranch <parent>", ["ast ubranch {other} {N}"], lambda w: w.parent("M") == w["other"]),
    Row("ast new-tree", ["ast new-tree"], lambda w: w.parent("M") is None),
    Row("When running ast without arguments", ["ast"], lambda w: all(c.usage in w.text for c in ash.COMMANDS)),
]

LWN = [
    Row(
        "command can be used to branch from snapshot N",
        [
            "ash branch --snap {N}",
            ("ash chroot {M}", "apt-get -y install firefox\necho nameserver 192.0.2.1 > /etc/resolv.conf\nexit\n"),
        ],
        lambda w: (
            str(w["M"]) in w.said[0].stdout
            and w.parent("M") == w["N"]
            and w.version("M", "firefox") == TINY
            and (w.root("M") / "etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"
        ),
    ),
    Row(
        "running snapshot mounted as writable",
        [("ash live-chroot", "echo messed > /usr/share/messed\nexit\n"), "cat /usr/share/messed"],
        lambda w: w.text == "messed\n",
    ),
    Row(
        "package manager's update command on all",
        ["ash branch {N}", "ash tree-run {N} apt-get -y dist-upgrade"],
        lambda w: w.version("N", "gimp") == w.version("M", "gimp") == NEW,
    ),
    Row(
        "which packages were added and which configuration",
        ["ash branch {N}", "ash install {M} firefox", "ash run {M} sh -c 'echo x >> /etc/issue'", "ash diff {N} {M}"],
        lambda w: re.search(rf"\+ firefox {TINY}", w.text) is not None and "etc/issue" in w.text,
    ),
    Row(
        "remove the most recent snapshot and return",
        ["ash branch {N}", "ash run {M} rm -r /usr/share/doc", "ash deploy {M}", "ash deploy {N}", "ash -y del {M}"],
        lambda w: w.starts_next("N") and not w.root("M").exists() and (w.root("N") / "usr/share/doc").exists(),
    ),
    Row(
        "both of which show up in the boot menu",
        ["ash desc {N} mail server", "ash deploy {N}"],
        lambda w: f"snapshot {w['N']}: mail server" in w.system.files.grub_cfg.read_text(),
    ),
    Row(
        "try out an upgrade or modification", ["ash clone", "ash upgrade {M}"], lambda w: w.version("M", "gimp") == NEW
    ),
]


# Statements about the booted snapshot and about all snapshots, rather than about one command.
WITHOUT_A_NUMBER = [
    Row("ash chroot", [("ash chroot", "touch /etc/chrooted\nexit\n")], lambda w: "chrooted" in etc_of(w, "here")),
    Row("ash branch", ["ash branch"], lambda w: w.parent("M") == w.here),
    Row("ash list", ["ash list"], lambda w: re.search(rf"^gimp +{OLD}$", w.text, re.MULTILINE) is not None),
    Row("ash whichtmp", ["ash whichtmp"], lambda w: w.text == f"{w.running.slot}\n"),
    Row("ash status", ["ash status"], lambda w: f"snapshot {w.here} ({w.running.slot})" in w.text),
    Row(
        "ash diff, of the running /etc",
        ["touch /etc/drifted", "ash diff"],
        lambda w: "/etc/drifted" in w.text,
    ),
    Row(
        "ash hollow",
        [("ash hollow {N}", "cp /run/ash/running/usr/share/ash/snap /etc/runs\nexit\n")],
        lambda w: (w.root("N") / "etc/runs").read_text().strip() == str(w.here) and w.starts_next("N"),
    ),
    Row(
        "ash whichsnap, of more than seven",
        ["ash install {N} firefox", "for n in 1 2 3 4 5 6 7; do ash clone {N}; done", "ash -q whichsnap firefox"],
        lambda w: {str(w["N"]), str(w["M"])} <= set(w.text.split()) and w["M"] > 7,
    ),
]


def etc_of(world: World, name: str) -> set[str]:
    return {path.name for path in (world.root(name) / "etc").iterdir()}


def is_mutable(world: World, number: int) -> bool:
    return (world.system.root(number) / "usr/share/ash/mutable").exists()


@pytest.mark.parametrize("row", [*ASHOS, *ASTOS, *LWN, *WITHOUT_A_NUMBER], ids=lambda row: row.words)
def test_a_command_line_does_what_its_document_says(world: World, row: Row) -> None:
    for line in row.typed:
        typed, keys = (line, "") if isinstance(line, str) else line
        world.type(typed, keys=keys)
    assert row.holds(world), world.said


# Beyond the table: terminals, refusals, longer sequences


def test_tree_prints_the_picture_of_the_documents(world: World, system: System) -> None:
    """The numbers differ; branches, descriptions and the asterisk are those of the picture."""
    lines = (
        "ash desc {N} multi-user system",
        "ash desc {below} applications",
        "ash branch {below} -d MATE full desktop",
        "ash desc {deep} Plasma full desktop",
        "ash deploy {deep}",
        "ash tree",
    )
    for line in lines:
        world.type(line)
    drawn = world.text.splitlines()
    numbers = {name: world[name] for name in ("N", "below", "deep")}
    at = next(number for number, line in enumerate(drawn) if line[1:] == f"── {numbers['N']} - multi-user system")
    bar = "│" if drawn[at].startswith("├") else " "
    assert drawn[0] == "root - root"
    assert drawn[1] == "├── 0 - base snapshot"
    assert drawn[at + 1] == f"{bar}   └── {numbers['below']} - applications"
    assert {line[len(f"{bar}       ├── ") :] for line in drawn[at + 2 : at + 4]} == {
        f"{numbers['deep']}*- Plasma full desktop",
        f"{numbers['deep'] - 1} - MATE full desktop",
    }
    assert sum("*- " in line for line in drawn) == 1


def test_a_tree_is_deleted_with_its_branches_after_a_question(world: World, tmp_path: Path) -> None:
    numbers = [world[name] for name in ("N", "below", "deep")]
    with world.running.terminal(f"ash del {world['N']}", tmp_path) as terminal:
        terminal.expect(r"\[y/N\]")
        terminal.type("y\n")
        assert terminal.wait() == DONE
    assert not any(world.system.root(number).exists() for number in numbers)
    kept = {path.name for path in (world.system.files.state / "snapshots").iterdir()}
    assert not kept & {f"{number}-desc" for number in numbers}


WANT_A_NUMBER = ["run true", "tree-run true", "-y del", "undo", "mutable", "immutable", "ubranch"]


@pytest.mark.parametrize("line", WANT_A_NUMBER)
def test_commands_that_could_harm_the_booted_snapshot_need_a_number(world: World, line: str) -> None:
    error = world.type(f"ash {line}", status=OURS_IN_RUN if line.startswith("run") else USAGE).error
    assert re.search(r"number|which snapshot", error)


def test_without_a_clean_exit_nothing_is_saved_and_tmp_clears_it(world: World, tmp_path: Path) -> None:
    before = world.system.id_of(world["N"])
    with world.running.terminal(f"ash chroot {world['N']}", tmp_path) as terminal:
        terminal.type("touch /etc/it; echo is-$((6 * 7))\n")
        terminal.expect("is-42")
        terminal.process.kill()
        terminal.process.wait()
    wait_until(lambda: not world.system.processes())
    assert world.system.root(f"chr{world['N']}").exists()
    world.type("ash tmp")
    assert world.system.id_of(world["N"]) == before
    assert not world.system.remains()


def test_ash_refuses_to_run_in_a_chroot(world: World) -> None:
    place = (
        "cd /tmp; mkdir it; mount --bind /.snapshots/rootfs/snapshot-{N} it; mount -t proc proc it/proc;"
        "mount --rbind /.snapshots it/.snapshots; chroot it ash"
    )
    error = world.type(f"{place} clone 0", status=REFUSED).error
    assert "--chroot" in error
    assert "base snapshot" in world.type(f"{place} --chroot tree").stdout


def test_the_last_working_deployment_is_made_permanent(world: World) -> None:
    world.type("echo kept > /etc/kept")
    world.type("ash run {N} touch /etc/bad")
    world.type("ash deploy {N}")
    world.type("ash rollback")  # what runs is still the one before, as if it had been chosen in the menu
    assert world["M"] != world["N"]
    assert world.starts_next("M")
    assert "bad" not in etc_of(world, "M")
    assert (world.root("M") / "etc/kept").read_text() == "kept\n"


def test_the_configuration_of_a_snapshot_is_edited_with_nano(world: World, tmp_path: Path) -> None:
    with world.running.terminal(f"EDITOR=nano ash edit-conf {world['N']}", tmp_path) as terminal:
        terminal.expect("GNU nano")
        terminal.type("auto_upgrade::deploy\r\x0f")  # ^O
        terminal.expect("Write")
        terminal.type("\r")
        terminal.expect("Wrote")
        terminal.type("\x18")  # ^X
        assert terminal.wait() == DONE
    assert (world.root("N") / "etc/ash.conf").read_text().startswith("auto_upgrade::deploy\n")
    world.type("ash install {N} firefox")
    world.type("ash upgrade {N}")


READ_WRITE = {
    "/usr": False,
    "/usr/lib/x86_64-linux-gnu": False,
    "/": False,
    "/.snapshots/rootfs/snapshot-{N}/usr": False,
    "/.snapshots/etc/etc-{N}": False,
    "/etc": True,
    "/var": True,
}


@pytest.mark.parametrize(("directory", "writable"), READ_WRITE.items())
def test_even_root_cannot_write_to_read_only_directories(world: World, directory: str, writable: bool) -> None:
    outcome = world.type(f"touch {directory}/it", status=DONE if writable else FAILED)
    assert writable or "Read-only file system" in outcome.stderr


def test_without_root_errors_are_short(world: World) -> None:
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    assert "base snapshot" in world.type(f"{nobody} ast tree").stdout
    assert world.type(f"{nobody} ast current").stdout == f"{world.here}\n"
    assert "root" in world.type(f"{nobody} ast clone 0", status=REFUSED).error


def test_a_script_upgrades_and_deploys_unless_the_upgrade_fails(world: World) -> None:
    """As from cron. Must be the last test: it changes the booted snapshot."""
    assert world.version("here", "gimp") == OLD
    world.type("ast auto-upgrade")
    assert world.version("here", "gimp") == NEW
    assert world.version("M", "gimp") == OLD, "what it was is kept"
    assert world.starts_next("here")
    assert re.search(r"20\d\d-\d\d-\d\d.* succeeded", world.type("ast check").stdout)

    world.type(f"ash run {{here}} apt-get -y install broken={OLD}")
    deployed = world.system.files.default_slot()
    before = world.system.id_of(world.here)
    world.type("ast auto-upgrade", status=FAILED)
    assert world.system.id_of(world.here) == before
    assert world.system.files.default_slot() == deployed
    assert "failed" in world.type("ast check", status=FAILED).stdout
    assert not world.system.remains()
