# SPDX-License-Identifier: AGPL-3.0-or-later
"""Parsing the output and files of apt and dpkg."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from ash import (
    FAILED,
    IN_ROOT_DB,
    MISSING,
    REFUSED,
    Distro,
    PackageError,
    RepositoryError,
    Transaction,
    load_distro,
    lost_needs,
)
from distros.debian.ashpk import Apt, Debian, apt_error, bytes_of, only_excluded_failed, planned, usable_repositories

APT = Debian.package_manager

pytestmark = pytest.mark.budget(5)

STATUS = """\
Package: hello
Status: install ok installed
Version: 2.10-5
Description: a greeting
 Version: 9 stands in the description

Package: gone
Status: deinstall ok config-files
Version: 1

Package: broken
Status: install ok half-configured
Version: 2

Package: libc6
Status: hold ok installed
Version: 2:41-1
"""
CONFFILES = """\
Package: tool
Status: install ok installed
Version: 1
Conffiles:
 /etc/tool.conf 401b30e3b8b5d629635a5c613cdb7919
 /etc/tool.old 009520053b00386d1173f3988c55d192 obsolete
Description: a tool
"""
SIMULATION = """\
NOTE: This is only a simulation!
Remv sl [5.02-1]
Purg old-config [1.0]
Inst hello (2.10-5 Debian:13.2/stable [amd64])
Inst libc6 [2.40-1] (2.41-1 Debian:13.2/stable [amd64]) []
Conf hello (2.10-5 Debian:13.2/stable [amd64])
"""

URIS = """\
Reading package lists...
'http://archive/pool/hello_2.10-5_amd64.deb' hello_2.10-5_amd64.deb 1000 SHA256:00
'http://archive/pool/libc6_2.41-1_amd64.deb' libc6_2.41-1_amd64.deb 2000 SHA256:00
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with dpkg's status file and apt's marks."""
    database = tmp_path / "usr/share/ash/db"
    (database / "dpkg").mkdir(parents=True)
    (database / "apt").mkdir()
    (database / "dpkg/status").write_text(STATUS)
    (database / "apt/extended_states").write_text("Package: libc6\nArchitecture: amd64\nAuto-Installed: 1\n\n")
    return tmp_path


def test_only_installed_packages_are_listed(root: Path) -> None:
    assert APT.installed(root) == {"hello": "2.10-5", "libc6": "2:41-1"}


def test_names_of_foreign_packages_contain_their_architecture(root: Path) -> None:
    database = root / "usr/share/ash/db"
    (database / "dpkg/arch").write_text("amd64\ni386\n")
    names = [("one", "amd64"), ("one", "i386"), ("two", "i386"), ("three", "all")]
    status = [f"Package: {n}\nStatus: install ok installed\nArchitecture: {a}\nVersion: 1\n" for n, a in names]
    (database / "dpkg/status").write_text("\n".join(status))
    marks = [f"Package: {n}\nArchitecture: {a}\nAuto-Installed: 1\n" for n, a in names[1:3]]
    (database / "apt/extended_states").write_text("\n".join(marks))
    (database / "dpkg/info").mkdir()
    for name, path in {"one:amd64": "a", "one:i386": "b", "two": "c", "three": "d", "four": "e"}.items():
        (database / f"dpkg/info/{name}.list").write_text(f"/usr/{path}\n/var/lib/{path}\n")
    assert APT.installed(root).keys() == {"one", "one:i386", "two:i386", "three"}
    assert APT.automatic(root) == {"one:i386", "two:i386"}
    claims = {path: APT.claims(root, f"lib/{path}") for path in ("a", "b", "c", "d", "e")}
    assert claims == {"a": {"one"}, "b": {"one:i386"}, "c": {"two:i386"}, "d": {"three"}, "e": set()}
    assert APT.claims(root, "lib/two") == {"two:i386"}
    assert {line.split()[1] for line in APT.problems(root)} == {"one", "one:i386", "two:i386", "three"}
    assert APT.has_state(root, "two:i386")
    (database / "dpkg/info/one:i386.list").write_text("")
    assert not APT.has_state(root, "one:i386")


@pytest.mark.parametrize("noted", [True, False])
def test_the_native_architecture_may_be_spelled_out(root: Path, noted: bool) -> None:
    if noted:
        (root / "usr/share/ash/db/dpkg/arch").write_text("amd64\ni386\n")
    else:
        with (root / "usr/share/ash/db/dpkg/status").open("a") as status:
            status.write("\nPackage: dpkg\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\n")
    names = ["hello", "hello:amd64", "hello:i386"]
    assert [APT.canonical_name(root, name) for name in names] == ["hello", "hello", "hello:i386"]
    assert APT.has_installed(root, ["hello:amd64"])


def test_a_root_without_dpkg_has_no_packages(tmp_path: Path) -> None:
    assert APT.installed(tmp_path) == {}


def test_manually_installed_packages_need_no_installation(root: Path) -> None:
    assert APT.has_installed(root, ["hello"])
    assert not APT.has_installed(root, ["hello", "libc6"]), "apt would mark it as installed by hand"
    assert not APT.has_installed(root, ["gone"])
    assert not APT.has_installed(root, ["broken"])


def test_a_simulation_is_parsed_into_a_change() -> None:
    change = planned(7, SIMULATION)
    assert change.changed
    assert change.added == {"hello": "2.10-5"}
    assert change.removed == {"sl": "5.02-1", "old-config": "1.0"}
    assert change.upgraded == {"libc6": ("2.40-1", "2.41-1")}
    assert bytes_of(URIS) == 3000
    assert bytes_of(URIS, {"hello"}) == bytes_of(URIS, {"hello:amd64"}) == 2000


def test_an_empty_simulation_changes_nothing() -> None:
    assert not planned(7, "0 upgraded, 0 newly installed, 0 to remove and 0 not upgraded.\n").changed


@pytest.mark.parametrize(
    ("output", "status", "words"),
    [
        ("E: Unable to locate package no-such\n", MISSING, "no-such"),
        ("E: Version '9.9' for 'hello' was not found\n", MISSING, "no package hello 9.9"),
        ("E: Release 'sid' for 'hello' was not found\n", MISSING, "no package hello sid"),
        ("E: Package 'ghost' has no installation candidate\n", MISSING, "ghost"),
        ("E: ash: too little space: 9 KiB are needed, 1 KiB are free\nE: Sub-process returned (1)\n", REFUSED, "9 KiB"),
        ("E: Sub-process /usr/bin/dpkg returned an error code (1)\n", FAILED, "error code (1)"),
        ("nothing said\n", FAILED, "apt-get failed"),
        (
            "The following packages have unmet dependencies:\n dep : Depends: nothere but it is not installable\n"
            "E: Unable to correct problems, you have held broken packages.\n"
            "E: The following information from --solver 3.0 may provide additional context:\n   Unable to satisfy\n",
            FAILED,
            "you have held broken packages.; dep : Depends: nothere but it is not installable",
        ),
    ],
)
def test_apts_errors_become_one_line(output: str, status: int, words: str) -> None:
    error = apt_error(output)
    assert error.status == status
    assert words in error.message
    assert "\n" not in error.message


HAD = "Hit:1 http://a/debian trixie InRelease\n"
OTHER = "Hit:2 http://a/debian trixie-updates InRelease\n"
FLAT = "Get:3 http://b ./ Release [134 B]\n"
EXPIRED = "E: Release file for http://a/debian/dists/trixie/InRelease is expired (invalid since 1d).\n"
CHANGED = "E: Repository 'http://a/debian trixie InRelease' changed its 'Suite' value from 'testing' to 'stable'\n"
FLAT_EXPIRED = "E: Release file for http://b/./Release is expired (invalid since 1d).\n"
DEAD = "W: Failed to fetch http://c/./InRelease  Could not connect to c:80\n"


@pytest.mark.parametrize("refused", [EXPIRED, CHANGED, EXPIRED + DEAD])
def test_a_repository_that_apt_refuses_is_not_usable(refused: str) -> None:
    assert usable_repositories(HAD + OTHER + FLAT + refused) == [
        ("http://a/debian", "trixie-updates"),
        ("http://b", "./"),
    ]
    assert usable_repositories(HAD + refused) == []
    assert usable_repositories(HAD + FLAT + FLAT_EXPIRED) == [("http://a/debian", "trixie")]
    assert usable_repositories(HAD + DEAD) == [("http://a/debian", "trixie")]


class Updating:
    """A transaction in which apt-get update fails."""

    def __init__(self, output: str) -> None:
        self.output = output

    def run(self, _: Sequence[str]) -> str:
        raise PackageError(self.output)


@pytest.mark.parametrize("refused", [EXPIRED, CHANGED])
def test_other_repositories_are_refreshed_when_apt_refuses_one(refused: str) -> None:
    there = cast("Transaction", Updating(HAD + OTHER + refused))
    assert APT.refresh(there) == [refused.removeprefix("E: ").rstrip(".\n")]
    with pytest.raises(PackageError, match="no repository can be reached"):
        APT.refresh(cast("Transaction", Updating(HAD + refused)))
    with pytest.raises(PackageError, match="is malformed"):
        APT.refresh(cast("Transaction", Updating("E: Malformed entry 1 in list file x: it is malformed\n")))


# By apt 3.0 (sqv), of a repository that has old lists, and by apt 2.6 (gpgv), of one that has none.
GOT = "Get:1 http://a/debian trixie InRelease [140 kB]\nErr:1 http://a/debian trixie InRelease\n"
SQV = "Sub-process /usr/bin/sqv returned an error code (1), error message is: "
UNTRUSTED = f"""\
{GOT}  {SQV}Missing key 4CB5, which is needed to verify signature.
W: An error occurred during the signature verification. The repository is not updated and the previous index files \
will be used. OpenPGP signature verification failed: http://a/debian trixie InRelease: {SQV}Missing key 4CB5, which is \
needed to verify signature.
W: Failed to fetch http://a/debian/dists/trixie/InRelease  {SQV}Missing key 4CB5, which is needed to verify signature.
W: Some index files failed to download. They have been ignored, or old ones used instead.
"""
UNSIGNED = f"""\
{GOT}  The following signatures couldn't be verified because the public key is not available: NO_PUBKEY 4CB5
W: GPG error: http://a/debian trixie InRelease: The following signatures couldn't be verified because the public key \
is not available: NO_PUBKEY 4CB5
E: The repository 'http://a/debian trixie InRelease' is not signed.
"""
EARLY = UNTRUSTED.replace(
    "Missing key 4CB5, which is needed to verify signature.", "Not live until 2026-11-21T08:46:20Z"
)


@pytest.mark.parametrize("output", [UNTRUSTED, UNSIGNED, EARLY])
def test_a_repository_that_answers_and_is_not_trusted_could_not_be_had(output: str) -> None:
    assert usable_repositories(output) == []
    assert usable_repositories(output + OTHER) == [("http://a/debian", "trixie-updates")]
    with pytest.raises(RepositoryError, match="no repository can be trusted") as caught:
        APT.refresh(cast("Transaction", Updating(output)))
    assert ("the clock says" if output == EARLY else "fixdb") in caught.value.hint
    assert "sqv" not in caught.value.message
    assert "http://a/debian" in APT.refresh(cast("Transaction", Updating(output + OTHER)))[0]


EXCLUDED = """\
Error! The /var/lib/dkms/one/1/6.1.0-50-amd64/x86_64/dkms.conf for module one includes a BUILD_EXCLUSIVE directive which \
does not match this kernel/arch/config.
This indicates that it should not be built.
"""
UNBUILT = """\
Building module:
Cleaning build area...
make -j2 KERNELRELEASE=6.1.0-50-amd64...(bad exit status: 2)
Error! Bad return status for module build on kernel: 6.1.0-50-amd64 (x86_64)
Consult /var/lib/dkms/two/1/build/make.log for more information.
"""
DEPENDENT = "three/1 autoinstall failed due to missing dependencies: two\n"
END = """\
Error! One or more modules failed to install during autoinstall.
Refer to previous errors for more information.
"""


@pytest.mark.parametrize(
    ("said", "excluded"),
    [
        (EXCLUDED + END, True),
        (EXCLUDED + EXCLUDED + END, True),
        (EXCLUDED + UNBUILT + END, False),
        (UNBUILT + EXCLUDED + END, False),
        (EXCLUDED + DEPENDENT + END, False),
        (UNBUILT + END, False),
        (END, False),
        ("", False),
    ],
)
def test_modules_that_exclude_a_kernel_do_not_fail(said: str, excluded: bool) -> None:
    assert only_excluded_failed(said) == excluded


def test_a_derivative_changes_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distro, "registry", {})

    class Derivative(Debian):
        id = "derivative"
        package_manager = Apt("derivative-keyring")

    distro = load_distro("derivative")
    assert isinstance(distro, Derivative)
    assert isinstance(distro.package_manager, Apt)
    assert distro.package_manager.keyring == "derivative-keyring"
    assert (distro.admin_group, distro.not_live) == (Debian.admin_group, Debian.not_live)


def test_what_ash_needs_is_missed_where_it_was_before(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for root in (before, after):
        (root / "usr/bin").mkdir(parents=True)
        (root / "usr/bin/btrfs").touch()
        (root / "boot").mkdir()
    assert lost_needs(Debian(), before, after) == []
    (before / "usr/bin/python3").symlink_to("python3.13")
    (before / "boot/vmlinuz-6.12").touch()
    (after / "usr/bin/btrfs").unlink()
    assert lost_needs(Debian(), before, after) == ["python3-minimal", "btrfs-progs", "every kernel"]
    assert lost_needs(Debian(), after, after) == []


def test_a_packages_default_is_known_by_its_checksum(tmp_path: Path) -> None:
    database = tmp_path / IN_ROOT_DB
    assert not APT.is_default(tmp_path, "etc/tool.conf", b"x\n")
    (database / "dpkg").mkdir(parents=True)
    (database / "dpkg/status").write_text(CONFFILES)
    (database / "ucf").mkdir()
    (database / "ucf/hashfile").write_text("401b30e3b8b5d629635a5c613cdb7919  /etc/default/tool\n")
    found = {
        (path, content)
        for path in ("etc/tool.conf", "etc/tool.old", "etc/default/tool", "etc/other")
        for content in (b"x\n", b"y\n")
        if APT.is_default(tmp_path, path, content)
    }
    assert found == {("etc/tool.conf", b"x\n"), ("etc/tool.old", b"y\n"), ("etc/default/tool", b"x\n")}


def test_apt_itself_says_in_a_read_only_system_which_command_to_use(tmp_path: Path) -> None:
    apt = shutil.which("apt-get") or pytest.skip("needs apt")
    conf = tmp_path / "apt.conf"
    conf.write_text(Apt.READ_ONLY_CONF.replace("/usr", str(tmp_path / "missing")))
    environment = {**os.environ, "APT_CONFIG": str(conf), "LC_ALL": "C.UTF-8"}

    def said(*words: str) -> str:
        argv = [apt, "-o", "Debug::NoLocking=1", "-o", f"Dir::State::lists={tmp_path}", "-o", f"Dir::Cache={tmp_path}"]
        argv += words
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
        return done.stdout + done.stderr

    assert "ash install PACKAGE" in said("--yes", "install", "apt")
    assert "ash install PACKAGE" not in said("--simulate", "install", "apt")
    assert "ash install PACKAGE" not in said("-s", "install", "apt")
    conf.write_text(Apt.READ_ONLY_CONF.replace("/usr", str(tmp_path)))
    assert "ash install PACKAGE" not in said("--simulate", "install", "apt")
