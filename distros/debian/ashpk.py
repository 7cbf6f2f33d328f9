# SPDX-License-Identifier: AGPL-3.0-or-later
"""Debian, and its package manager: apt and dpkg."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ash import (
    ASKED_OF_SERVICES,
    IN_ROOT_DB,
    MISSING,
    REFUSED,
    AshError,
    BootTools,
    Change,
    Distro,
    PackageError,
    PackageManager,
    RepositoryError,
    Transaction,
    TransientFile,
    console,
    in_database,
    last_words,
    one_line,
    path_inside,
    read_text,
)


def version_key(version: str) -> tuple[object, ...]:
    """A sort key for Debian versions (deb-version(7)): epoch, upstream version, revision.

    Runs of digits compare as numbers, other runs by character: `~` before the end, letters before the rest.
    """
    epoch, _, rest = version.partition(":") if ":" in version else ("0", "", version)
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "0")

    def order(letter: str) -> int:
        return -1 if letter == "~" else ord(letter) if letter.isalpha() else ord(letter) + 256

    def key(part: str) -> list[object]:
        runs = re.findall(r"([^0-9]*)([0-9]*)", part)
        return [([*map(order, letters), 0], (len(digits.lstrip("0")), digits.lstrip("0"))) for letters, digits in runs]

    return int(epoch) if re.fullmatch("[0-9]{1,9}", epoch) else 0, key(upstream), key(revision)


def paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file, with the first line of each field; none if there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): *(.*)$", paragraph, re.MULTILINE))
        if fields:
            yield fields


def database(root: Path, path: str) -> Path:
    """A path of the package database of a root; symlinks are followed, but never out of the root."""
    return path_inside(root, f"{IN_ROOT_DB}/{path}")


def is_regular_file(path: Path) -> bool:
    """Whether a path is a regular file. Symlinks do not count: dpkg makes none, and they may lead out of the root."""
    return path.is_file() and not path.is_symlink()


def foreign_architectures(root: Path) -> list[str]:
    """The architectures, besides its own, whose packages a root can install."""
    path = database(root, "dpkg/arch")  # the first line is the root's own
    return path.read_text(errors="replace").split()[1:] if path.is_file() else []


def architectures_of(packages: Iterable[str]) -> set[str]:
    """The architectures in qualified package names such as `libc6:i386`."""
    return {name.partition(":")[2] for name in packages} - {""}


def name_of(package: Mapping[str, str], foreign: Sequence[str]) -> str:
    """The name of a package as apt prints it: qualified if its architecture is foreign."""
    name, architecture = package.get("Package", ""), package.get("Architecture", "")
    return f"{name}:{architecture}" if architecture in foreign else name


def known_packages(root: Path) -> Iterator[dict[str, str]]:
    """The packages in dpkg's status file, named as apt prints them; damaged paragraphs get the status `damaged`."""
    foreign = foreign_architectures(root)
    for package in paragraphs(database(root, "dpkg/status")):
        if "Package" in package:
            yield {"Status": "unknown damaged", "Version": "", **package, "Package": name_of(package, foreign)}


def own_architecture(root: Path) -> str:
    """The architecture of a root; before dpkg has recorded it, that of the package dpkg."""
    path = database(root, "dpkg/arch")
    if path.is_file() and (noted := path.read_text(errors="replace").split()):
        return noted[0]
    return next((one.get("Architecture", "") for one in known_packages(root) if one["Package"] == "dpkg"), "")


def file_lists(root: Path, packages: Container[str]) -> dict[str, list[Path]]:
    """dpkg's file lists of packages; the name of a list may contain the architecture or not."""
    foreign, found = foreign_architectures(root), dict[str, list[Path]]()
    for path in filter(is_regular_file, sorted(database(root, "dpkg/info").glob("*.list"))):
        name, _, architecture = path.stem.partition(":")
        others = [f"{name}:{one}" for one in foreign if architecture in ("", one)]
        for one in others if architecture in foreign else [name, *others]:
            if one in packages:
                found.setdefault(one, []).append(path)
    return found


def diversions(root: Path) -> dict[str, tuple[str, str]]:
    """dpkg's diversions: {path: (where it is diverted to, the package that is exempt)}."""
    path = database(root, "dpkg/diversions")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return {path: (target, keeper) for path, target, keeper in zip(lines[::3], lines[1::3], lines[2::3], strict=False)}


def only_excluded_failed(autoinstall: str) -> bool:
    """Whether dkms failed only because modules exclude this kernel (BUILD_EXCLUSIVE), an error in dkms 3.0."""
    known = r"BUILD_EXCLUSIVE|One or more modules failed to install during autoinstall"
    errors = re.findall(r"Error! .*|^.* failed due to missing dependencies.*", autoinstall, re.MULTILINE)
    return "BUILD_EXCLUSIVE" in autoinstall and all(re.search(known, error) for error in errors)


def report_failed_builds(root: Path) -> None:
    """Print the compiler's errors for modules that dkms could not build: its log is dropped with the transaction."""
    for log in sorted(database(root, "dkms").glob("*/*/build/make.log")):
        module, version = log.parts[-4:-2]
        said = read_text(path_inside(root, str(log.relative_to(root))))
        lines = said.rstrip().splitlines()[-30:]
        console.say("\n".join([f"Building {module} {version} failed:", *(f"  {line}" for line in lines)]))


def usable_repositories(update: str) -> list[tuple[str, str]]:
    """The repositories (URL, suite) that apt-get update reached, trusted and did not refuse."""
    refused = "\n".join(re.findall(r"^E: (?:Release file for |Repository ').*", update, re.MULTILINE))
    # Also after "Get:": of a repository that answers, and whose signature cannot be verified.
    failed = re.findall(r"^Err:\d+ (\S+) +(\S+) +(?:In)?Release\b", update, re.MULTILINE)

    def is_refused(url: str, suite: str) -> bool:
        return bool(re.search(rf"{re.escape(url)}(/dists)?[/ ]{re.escape(suite.rstrip('/'))}[/ ]", refused))

    reached = re.findall(r"^(?:Hit|Get):\d+ (\S+) +(\S+)", update, re.MULTILINE)
    return [repository for repository in reached if repository not in failed and not is_refused(*repository)]


def trouble_in_words(line: str) -> str:
    """What apt says of a repository that it cannot use, without the name of the program that verifies signatures."""
    line = re.sub(r"Sub-process \S+ returned an error code \(\d+\), error message is:", "", line)
    return " ".join(line.split()).rstrip(".")


def hint_for_trouble(lines: Iterable[str]) -> str:
    """What to do about repositories that apt cannot use: the clock may be wrong, or the keyring lack their keys."""
    said = "\n".join(lines)
    if re.search(r"Not live until|is not valid yet", said):
        return f"the clock says {time.strftime('%Y-%m-%d %H:%M')}: if it is wrong, set it"
    return "ash fixdb N renews the keyring" if re.search(r"[Ss]ignature|GPG error|NO_PUBKEY|Missing key", said) else ""


def bytes_of(uris: str, without: Container[str] = ()) -> int:
    """The bytes to download, from lines of apt-get --print-uris such as `'URI' NAME_1_amd64.deb SIZE HASH`.

    Args:
        uris: the lines.
        without: packages to leave out.
    """
    files = re.findall(r"^'\S+' ([^\s_]+)_\S*_([^\s_.]+)\.\w+ (\d+) ", uris, re.MULTILINE)
    return sum(int(size) for name, of, size in files if name not in without and f"{name}:{of}" not in without)


def planned(snapshot: int, simulation: str) -> Change:
    """The change that apt-get --simulate announces: lines such as `Inst NAME [OLD] (NEW ...` and `Remv NAME [OLD]`."""
    installed = re.findall(r"^Inst (\S+) (?:\[(\S+)\] )?\((\S+)", simulation, re.MULTILINE)
    removed = dict(re.findall(r"^(?:Remv|Purg) (\S+) \[(\S+)\]", simulation, re.MULTILINE))
    return Change(
        snapshot,
        changed=bool(installed or removed),
        added={name: new for name, old, new in installed if not old},
        removed=removed,
        upgraded={name: (old, new) for name, old, new in installed if old},
    )


def apt_error(output: str) -> AshError:
    """The error for failed apt-get output, with its own words."""
    errors = [line[3:] for line in output.splitlines() if line.startswith("E: ") and not line.endswith(":")]
    # Such as " gcc : Depends: cpp but it is not going to be installed".
    unmet = re.findall(r"^ (\S+ : (?:Pre)?(?:Depends|Conflicts|Breaks): .*)", output, re.MULTILINE)
    if missing := re.search(
        r"Unable to locate package (\S+)|Package '?([^' ]+)'? has no installation candidate"
        r"|(?:Version|Release) '([^']+)' for '([^']+)' was not found",
        output,
    ):
        name = missing[1] or missing[2] or f"{missing[4]} {missing[3]}"
        return AshError(f"there is no package {name}", "ash refresh N fetches the lists", MISSING)
    if room := next((line for line in errors if "too little space" in line), ""):
        return AshError(room.removeprefix("ash: "), "ash del N frees what a snapshot holds", REFUSED)
    return PackageError("; ".join([*errors[:3], *unmet[:3]]) or "apt-get failed")


class Apt(PackageManager):
    """apt and dpkg, of Debian and its derivatives.

    Args:
        keyring: the package with the keys of the repositories.
    """

    # The records of dpkg and apt, and those of tools that record what packages put into /usr and /etc.
    database = (
        "lib/dpkg",
        "lib/pam",
        "lib/ucf",
        "lib/python",
        "lib/initramfs-tools",
        "lib/dkms",
        "lib/apache2",
        "lib/dictionaries-common",
        "lib/aspell",
        "lib/ispell",
        "lib/xml-core",
        "lib/sgml-base",
        "lib/emacsen-common",
        "lib/ca-certificates-java",
        "lib/ghc",
        "lib/tex-common",
        "lib/texmf",
        "lib/doc-base",
        "lib/ghostscript",
        "lib/grub",
        "lib/ieee-data",
        "lib/libreoffice",
        "lib/mecab",
        "lib/php/modules",
        "lib/shim-signed",
        "lib/vim",
        "lib/systemd/deb-systemd-helper-enabled",
        "lib/systemd/deb-systemd-helper-masked",
        "lib/systemd/deb-systemd-user-helper-enabled",
        "lib/systemd/deb-systemd-user-helper-masked",
        "cache/debconf",
        "cache/dictionaries-common",
        "cache/ldconfig",
        "cache/postgresql/dicts",
    )
    database_files = ("lib/shells.state",)
    caches = ("cache/apt", "lib/apt", "cache/man", "cache/fontconfig")
    logs = ("log/apt", "log/dpkg.log", "log/alternatives.log")
    downloads = ("cache/apt/archives/*.deb",)
    audit = "dpkg --audit"
    # No questions; edited configuration files stay.
    force: ClassVar[Sequence[str]] = ("--force-confdef", "--force-confold")
    apt_get: ClassVar[Sequence[str]] = (
        *("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", "--quiet", "-o", "Dpkg::Use-Pty=0"),
        *("-o", f"Dpkg::Options::={force[0]}", "-o", f"Dpkg::Options::={force[1]}"),
    )
    environment: ClassVar[Mapping[str, str]] = {
        "APT_CONFIG": "/run/ash/apt.conf",
        "APT_LISTCHANGES_FRONTEND": "none",
        "NEEDRESTART_SUSPEND": "1",
        "debian_chroot": "ash",
    }
    # What apt says of a repository that cannot be reached, has expired, is from the future, or has a new release.
    UNTRUSTED = r"signature verification|GPG error|is not signed"
    TROUBLE = rf"Failed to fetch|^The repository|^Release file for |^Repository '|{UNTRUSTED}"
    # A power cut drops the whole transaction, so dpkg need not sync. pkgcache.bin describes one snapshot only. The
    # lists are shared with snapshots that have other repositories.
    APT_CONF = """\
DPkg::Options {"--force-unsafe-io";};
DPkg::Pre-Install-Pkgs {"/run/ash/room";};
Dir::Cache::pkgcache "/run/ash/pkgcache.bin";
APT::Get::List-Cleanup "false";
"""
    # In the running system, whose /usr is read-only, apt would fetch everything, and then dpkg would fail.
    READ_ONLY_CONF = """\
APT::Install::Pre-Invoke {"test -w /usr || \
grep -qzxE -e '-[a-z]*[sd]|--(simulate|just-print|dry-run|no-act|print-uris|download-only)' /proc/$PPID/cmdline || \
{ echo 'ash: this system is read-only. To install: ash install PACKAGE. See: ash help' >&2; exit 1; }";};
"""
    # apt pipes it the packages that it is about to unpack. Sizes are in KiB; 262144 KiB is ash's SPACE_FLOOR.
    ROOM = """\
#!/bin/sh
need=262144
while read -r archive; do
    size=$(dpkg-deb --field "$archive" Installed-Size) && need=$((need + ${size:-0}))
done
room=$(df --output=avail -k / | tail -n 1)
[ "$room" -ge "$need" ] || { echo "E: ash: too little space: $need KiB are needed, $room KiB are free" >&2; exit 1; }
"""
    # No service starts (101). For the running system, scripts say what they would do with one. deb-systemd-invoke stops
    # asking once a unit is denied: with 104 it goes on to the tools of systemd, which do nothing in a chroot.
    POLICY = f"""\
#!/bin/sh
asked=/{ASKED_OF_SERVICES}
[ "$1" = --quiet ] && shift
[ -w $asked ] || exit 101
echo "$2 $1" >>$asked
case $1 in
*.*) exit 104 ;;
*) exit 101 ;;
esac
"""
    transient: ClassVar[Mapping[str, TransientFile]] = {
        "usr/sbin/policy-rc.d": TransientFile(POLICY, 0o755),
        "run/ash/apt.conf": TransientFile(APT_CONF),
        "run/ash/room": TransientFile(ROOM, 0o755),
    }

    def __init__(self, keyring: str) -> None:
        self.keyring = keyring

    def prepare_base(self, root: Path) -> None:
        """Move the records of apt and dkms into the snapshot, and divert /usr/bin/ash of the package ash.

        initramfs-tools is made reproducible, so that siblings with the same files share their initramfs.
        """
        marks = root / IN_ROOT_DB / "apt"
        marks.mkdir(exist_ok=True)
        old = root / "var/lib/apt/extended_states"
        if old.exists():
            old.rename(marks / "extended_states")
        conf = root / "etc/apt/apt.conf.d/05ash"
        conf.write_text(f'Dir::State::extended_states "/{IN_ROOT_DB}/apt/extended_states";\n{self.READ_ONLY_CONF}')
        dkms = root / "etc/dkms/framework.conf.d/ash.conf"  # dkms compares this path with the targets of symlinks
        dkms.parent.mkdir(parents=True, exist_ok=True)
        dkms.write_text(f'dkms_tree="/{in_database("lib/dkms")}"\n')
        initramfs = root / "etc/initramfs-tools/conf.d/ash"
        initramfs.parent.mkdir(parents=True, exist_ok=True)
        initramfs.write_text("export SOURCE_DATE_EPOCH=0\n")
        if "/usr/bin/ash" not in diversions(root):
            path = root / IN_ROOT_DB / "dpkg/diversions"
            known = path.read_text() if path.exists() else ""
            path.write_text(f"{known}/usr/bin/ash\n/usr/bin/ash.debian\n:\n")  # ":" is the local administrator

    def installed(self, root: Path) -> dict[str, str]:
        """Read dpkg's status file; packages of foreign architectures are named as apt does, such as `libc6:i386`."""
        return {
            package["Package"]: package["Version"]
            for package in known_packages(root)
            if package["Status"].endswith(" installed")
        }

    def canonical_name(self, root: Path, name: str) -> str:
        """The name without the root's own architecture."""
        return name.removesuffix(f":{own_architecture(root)}") if ":" in name else name

    def has_installed(self, root: Path, packages: Sequence[str]) -> bool:
        """Whether all are installed, and none as a dependency only."""
        wanted = {self.canonical_name(root, name) for name in packages}
        return wanted <= self.installed(root).keys() - self.automatic(root)

    def is_older(self, version: str, other: str) -> bool:
        """Compare versions as dpkg does (deb-version(7))."""
        return version_key(version) < version_key(other)

    def has_state(self, root: Path, package: str) -> bool:
        """Whether dpkg's file list of the package names something in /var/lib."""
        lists = file_lists(root, {package}).get(package, [])
        return any("/var/lib/" in path.read_text(errors="replace") for path in lists)

    def claims(self, root: Path, entry: str) -> set[str]:
        """By dpkg's file lists, and by the name of the entry: many packages create theirs in a script."""
        installed = self.installed(root)
        named = {name for name in installed if name.partition(":")[0] == Path(entry).name}
        wanted = re.compile(rf"^/var/{re.escape(entry)}(/|$)", re.MULTILINE)
        lists = file_lists(root, installed).items()
        return named | {
            name for name, paths in lists if any(wanted.search(path.read_text(errors="replace")) for path in paths)
        }

    def config_files(self, root: Path) -> set[str]:
        """The conffiles in dpkg's status file, and the files that ucf manages."""
        status = database(root, "dpkg/status")
        text = status.read_text(encoding="utf-8", errors="replace") if status.is_file() else ""
        blocks = (re.findall(r"\A(?: .*\n)*", rest)[0] for rest in text.split("\nConffiles:\n")[1:])
        own = {line.split()[0] for block in blocks for line in block.splitlines() if line.strip()}
        registry = database(root, "ucf/registry")
        lines = registry.read_text(errors="replace").splitlines() if registry.is_file() else []
        return {path.lstrip("/") for path in own | {line.split()[-1] for line in lines if line.strip()}}

    def is_default(self, root: Path, path: str, content: bytes) -> bool:
        """By the checksums that dpkg has of its conffiles, and ucf of its files."""
        import hashlib

        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        known = {f" /{path} {digest}", f" /{path} {digest} obsolete", f"{digest}  /{path}"}
        lists = database(root, "dpkg/status"), database(root, "ucf/hashfile")
        return any(not known.isdisjoint(read_text(file).split("\n")) for file in lists)

    def files(self, root: Path, directory: str) -> set[str]:
        """The paths in dpkg's file lists, and the files that ucf manages."""
        start = f"/{directory}/"
        lists = [
            path for path in database(root, "dpkg/info").glob("*.list") if path.is_file() and not path.is_symlink()
        ]
        lines = [line for path in lists for line in path.read_text(errors="replace").splitlines()]
        paths = {line.removeprefix(start) for line in lines if line.startswith(start)}
        return paths | {path.removeprefix(start[1:]) for path in self.config_files(root) if path.startswith(start[1:])}

    def problems(self, root: Path) -> list[str]:
        """Half-installed packages, and missing files of installed ones."""
        found, known = [], list(known_packages(root))
        for package in known:
            state = package["Status"].rpartition(" ")[2]
            if state not in ("installed", "config-files", "not-installed"):
                found.append(f"package {package['Package']} is {state}")
        missing = self._missing_files(root)
        if not any(package["Status"].endswith(" installed") for package in known):
            found.append("the package database knows no package")
        return found + [f"package {name} lacks {files[0]} ({len(files)} files)" for name, files in missing.items()]

    def _missing_files(self, root: Path) -> dict[str, list[str]]:
        """The missing files of each package, in /usr and among dpkg's own file lists."""
        installed, diverted = self.installed(root), diversions(root)
        found: dict[str, list[str]] = {}

        def moved(path: str, package: str) -> str:
            target, keeper = diverted.get(path, (path, package))
            return path if package.partition(":")[0] == keeper else target

        # Directory by directory: a call for each path, or resolving each from the root, takes many times as long.
        names: dict[str, set[str]] = {}
        places = {"": root}

        def place(directory: str) -> Path:
            above, _, name = directory.rpartition("/")
            here = places[above] / name if above in places and name not in ("", "..") else None
            return path_inside(root, directory) if here is None or here.is_symlink() else here

        def is_there(path: str) -> bool:
            directory, _, name = path.rpartition("/")
            if directory not in names:
                names[directory] = set()
                with contextlib.suppress(AshError, OSError, ValueError):
                    places[directory] = place(directory)
                    names[directory] = set(os.listdir(places[directory]))
            return name in names[directory]

        lists = file_lists(root, installed)
        for name in sorted(installed):
            lines = [line for path in lists.get(name, []) for line in path.read_text(errors="replace").splitlines()]
            missing = [line for line in lines if line.startswith("/usr/") and not is_there(moved(line, name))]
            missing += [] if name in lists else [f"/{IN_ROOT_DB}/dpkg/info/{name}.list"]
            found |= {name: missing} if missing else {}
        return found

    def automatic(self, root: Path) -> set[str]:
        """The packages that apt has marked as automatically installed."""
        marks, foreign = paragraphs(database(root, "apt/extended_states")), foreign_architectures(root)
        return {name_of(mark, foreign) for mark in marks if mark.get("Auto-Installed") == "1"}

    def held(self, root: Path) -> set[str]:
        """The packages that dpkg's status file has on hold."""
        return {package["Package"] for package in known_packages(root) if package["Status"].startswith("hold ")}

    def repositories(self, root: Path) -> str:
        """apt's sources, preferences and settings, such as a proxy."""
        apt = path_inside(root, "etc/apt")
        directories = (apt / name for name in ("sources.list.d", "preferences.d", "apt.conf.d", "auth.conf.d"))
        files = [apt / name for name in ("sources.list", "preferences", "apt.conf", "auth.conf")]
        files += [path for directory in directories for path in sorted(directory.glob("*"))]
        return "\n".join(f"{path.name}\n{read_text(path)}" for path in files if path.is_file())

    def install(self, work: Transaction, packages: Sequence[str], remove: Sequence[str] = ()) -> None:
        """Run apt-get once, after fetching the package lists if there are none."""
        if not any((work.var / "lib/apt/lists").glob("*_*")):
            self._apt(work, "update", alters=False)
        self._apt(work, "install", "--", *packages, *(f"{name}-" for name in remove))

    def remove(self, work: Transaction, packages: Sequence[str], purge: bool) -> None:
        """Run apt-get once. What ash needs is not removed along with the last package that depends on it."""
        kept = [f"-oAPT::NeverAutoRemove::=^{re.escape(name)}$" for name in {*work.system.distro.needs.values()}]
        self._apt(work, "purge" if purge else "remove", "--autoremove", *sorted(kept), "--", *packages)

    def refresh(self, work: Transaction) -> list[str]:
        """Run apt-get once. A repository that fails keeps its old lists."""
        try:
            output = work.run([*self.apt_get, "update"])
        except PackageError as error:
            output = error.message
        said = re.findall(r"^[WE]: (.*)$", output, re.MULTILINE)
        trouble = list(dict.fromkeys(trouble_in_words(line) for line in said if re.search(self.TROUBLE, line)))
        if not trouble and re.search(r"^E: ", output, re.MULTILINE):
            raise apt_error(output)
        hint = hint_for_trouble(trouble)
        if trouble and not usable_repositories(output):
            answered = re.search(r"^(?:Hit|Get):", output, re.MULTILINE) and re.search(self.UNTRUSTED, trouble[0])
            what = "no repository can be trusted" if answered else "no repository can be reached"
            raise RepositoryError(f"{what}: {trouble[0]}", hint)
        return [f"{line} ({hint})" if hint and line == trouble[-1] else line for line in trouble]

    def upgrade(self, work: Transaction, download_only: bool = False) -> None:
        """Run apt-get without letting it remove anything: upgrades that need a removal are kept back."""
        self._apt(work, "upgrade", "--with-new-pkgs", *(["--download-only"] if download_only else []))

    def repair(self, work: Transaction) -> None:
        """Configure, fix dependencies, reinstall; report steps that fail, and raise only if problems were added."""
        for name in ("lock", "lock-frontend"):
            (database(work.root, "dpkg") / name).unlink(missing_ok=True)
        configure = ["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--configure", "--pending", *self.force]
        steps: Mapping[str, Callable[[], object]] = {
            "configure half-installed packages": lambda: work.run(configure),
            "fix dependencies": lambda: self._apt(work, "install", "--fix-broken"),
            "fetch the package lists": lambda: self.refresh(work),
            "restore missing files": lambda: self._reinstall(work, list(self._missing_files(work.root))),
            "renew the keyring": lambda: self._reinstall(work, [self.keyring]),
        }
        before, failure = len(self.problems(work.root)), None
        for what, step in steps.items():
            try:
                step()
            except PackageError as error:
                failure = error
                console.say(one_line(f"ash: cannot {what}: {last_words(error.message)}"))
        if failure and len(self.problems(work.root)) > before:
            raise failure

    def _reinstall(self, work: Transaction, packages: Sequence[str]) -> None:
        if packages:
            self._apt(work, "install", "--reinstall", "--", *packages)

    def hold(self, work: Transaction, packages: Sequence[str], held: bool) -> None:
        """Use apt-mark, which refuses packages that it does not know."""
        try:
            work.run(["apt-mark", "hold" if held else "unhold", "--", *packages])
        except PackageError as error:
            raise apt_error(error.message) from None

    def available(self, work: Transaction, packages: Sequence[str]) -> set[str]:
        """The packages for which apt-cache has a candidate."""
        output = work.run(["apt-cache", "policy", "--", *packages]) if packages else ""
        found = re.findall(r"^(\S+):\n  Installed: .*\n  Candidate: (\S+)", output, re.MULTILINE)
        return {name for name, candidate in found if candidate != "(none)"}

    def reconcile(self, work: Transaction, missing: Mapping[str, bool], unwanted: Sequence[str]) -> None:
        """Install what is missing, mark what is unwanted as automatic, then remove that as far as nothing needs it."""
        for architecture in sorted(architectures_of(missing)):
            work.run(["dpkg", "--add-architecture", architecture])
        if missing:
            self._apt(work, "install", "--", *missing)
        automatic = [name for name, needed_only in missing.items() if needed_only]
        known = self.automatic(work.root)  # marking them again would change the snapshot
        if marks := [name for name in (*automatic, *unwanted) if name not in known]:
            work.run(["apt-mark", "auto", "--", *marks])
        if unwanted:
            self._remove_unneeded(work, unwanted)

    def _remove_unneeded(self, work: Transaction, packages: Sequence[str]) -> None:
        """Remove those of the packages that nothing needs, and no others, unlike `apt-get autoremove`."""
        # Without the planner's log: writing it would change the snapshot.
        simulate = [*self.apt_get, "--simulate", "-o", "Dir::Log::Planner=/dev/null"]

        def removed(*arguments: str) -> set[str]:
            try:
                return {*planned(work.snapshot, work.run([*simulate, *arguments])).removed}
            except PackageError as error:
                raise apt_error(error.message) from None

        gone = removed("autoremove") & {*packages}
        if gone and removed("remove", "--", *gone) - gone:  # others need some of them
            gone = {name for name in gone if removed("remove", "--", name) <= gone}
        if gone:
            self._apt(work, "remove", "--", *sorted(gone))

    def download(self, work: Transaction, packages: Sequence[str]) -> None:
        """Run apt-get, leaving out packages of architectures that the root does not have yet."""
        known = {*foreign_architectures(work.root)}
        if wanted := [name for name in packages if architectures_of([name]) <= known]:
            self._apt(work, "install", "--download-only", "--", *wanted, alters=False)

    def _apt(self, work: Transaction, *arguments: str, alters: bool = True) -> None:
        """Run apt-get without questions; unless the transaction simulates, then build dkms modules.

        Args:
            work: the transaction.
            arguments: of apt-get.
            alters: whether this changes installed packages.
        """
        simulates = work.simulate and alters
        try:
            output = work.run([*self.apt_get, *(["--simulate"] if simulates else []), *arguments])
            if simulates:
                plan = planned(work.snapshot, output)
                if plan.added or plan.upgraded:
                    uris = work.run([*self.apt_get, "--print-uris", *arguments])
                    plan = plan._replace(download=bytes_of(uris, work.change.packages_changed()))
                work.change = work.change.then(plan)
            elif alters:
                self._build_modules(work)
        except PackageError as error:
            report_failed_builds(work.root)
            raise apt_error(error.message) from None

    @staticmethod
    def _build_modules(work: Transaction) -> None:
        """Build dkms modules for the snapshot's own kernels: the scripts of dkms build for the running one."""
        if not (work.root / "usr/sbin/dkms").exists():
            return
        for kernel in sorted(path_inside(work.root, "usr/lib/modules").glob("*")):
            headers = path_inside(work.root, f"usr/lib/modules/{kernel.name}/build/include")
            if headers.is_dir():  # the test of dkms itself; removed headers may leave a dangling symlink
                try:
                    work.run(["dkms", "autoinstall", "-k", kernel.name])
                except PackageError as error:
                    if not only_excluded_failed(error.message):
                        said = last_words(error.message)
                        raise PackageError(f"E: a module cannot be built for {kernel.name}: {said}") from None


class Debian(Distro):
    """Debian; its derivatives inherit from this class."""

    id = "debian"
    package_manager = Apt("debian-archive-keyring")
    boot_tools = BootTools(bios_setup="/usr/lib/grub/i386-pc/grub-bios-setup")
    make_initramfs = ("update-initramfs", "-c", "-k")
    initramfs_settings = (
        r"(initramfs-tools|initramfs|modprobe\.d|modules-load\.d|console-setup|dropbear/initramfs"
        r"|cryptsetup-initramfs|cryptsetup-keys\.d|lvm|mdadm|multipath|iscsi|plymouth|udev/rules\.d|dracut\.conf\.d)/.*"
        r"|modules|crypttab|default/(keyboard|console-setup)|udev/[^/]*\.conf|systemd/network/.*\.link"
        r"|multipath\.conf|dracut\.conf"
    )
    admin_group = "sudo"
    not_live = "libc6|libc-bin|systemd|systemd-sysv|init|sysvinit-core|dbus|dbus-daemon|dbus-broker"
    prompt_variables = ("debian_chroot",)
    needs: ClassVar[Mapping[str, str]] = {
        "python3": "python3-minimal",
        "usr/lib/python3.*/json/__init__.py": "libpython3-stdlib",
        "btrfs": "btrfs-progs",
        "grub-mkconfig": "grub-common",
        "init": "systemd-sysv",
    }
