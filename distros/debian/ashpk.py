# SPDX-License-Identifier: AGPL-3.0-or-later
"""Debian's package manager: apt and dpkg."""

import contextlib
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ash import (
    IN_ROOT_DB,
    MISSING,
    REFUSED,
    AshError,
    Change,
    Distro,
    PackageError,
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


class Debian(Distro):
    """Debian, and the distributions made from it."""

    id = "debian"

    # The package managers' own records, and those of tools that note what packages put in /usr and /etc.
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
    downloads = "cache/apt/archives/*.deb"
    audit = "dpkg --audit"
    keyring: ClassVar[str] = "debian-archive-keyring"
    not_live = "libc6|libc-bin|systemd|systemd-sysv|init|sysvinit-core|dbus|dbus-daemon|dbus-broker"
    # Without questions, and with edited configuration files as they are.
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
    # What apt says of one archive that cannot be had, or that is too old, of the future, or another release now.
    TROUBLE = r"Failed to fetch|^The repository|GPG error|^Release file for |^Repository '"
    # A power cut drops the whole transaction, so dpkg need not sync; pkgcache.bin describes one snapshot only; the
    # lists are shared with snapshots that have other archives.
    APT_CONF = """\
DPkg::Options {"--force-unsafe-io";};
DPkg::Pre-Install-Pkgs {"/run/ash/room";};
Dir::Cache::pkgcache "/run/ash/pkgcache.bin";
APT::Get::List-Cleanup "false";
"""
    # apt gives it the archives that it is about to unpack; sizes in KiB. 262144 KiB is ash's SPACE_FLOOR.
    ROOM = """\
#!/bin/sh
need=262144
while read -r archive; do
    size=$(dpkg-deb --field "$archive" Installed-Size) && need=$((need + ${size:-0}))
done
room=$(df --output=avail -k / | tail -n 1)
[ "$room" -ge "$need" ] || { echo "E: ash: too little space: $need KiB are needed, $room KiB are free" >&2; exit 1; }
"""
    transient: ClassVar[Mapping[str, TransientFile]] = {
        "usr/sbin/policy-rc.d": TransientFile("#!/bin/sh\nexit 101\n", 0o755),
        "run/ash/apt.conf": TransientFile(APT_CONF),
        "run/ash/room": TransientFile(ROOM, 0o755),
    }

    def prepare_base(self, root: Path) -> None:
        """Keep the records of apt and dkms with the snapshot, and /usr/bin/ash ours where the package ash comes.

        And have siblings that make an initramfs of the same files make the same one, so that they can share it.
        """
        marks = root / IN_ROOT_DB / "apt"
        marks.mkdir(exist_ok=True)
        old = root / "var/lib/apt/extended_states"
        if old.exists():
            old.rename(marks / "extended_states")
        conf = root / "etc/apt/apt.conf.d/05ash"
        conf.write_text(f'Dir::State::extended_states "/{IN_ROOT_DB}/apt/extended_states";\n')
        dkms = root / "etc/dkms/framework.conf.d/ash.conf"  # dkms compares this path with where links in it lead
        dkms.parent.mkdir(parents=True, exist_ok=True)
        dkms.write_text(f'dkms_tree="/{in_database("lib/dkms")}"\n')
        initramfs = root / "etc/initramfs-tools/conf.d/ash"
        initramfs.parent.mkdir(parents=True, exist_ok=True)
        initramfs.write_text("export SOURCE_DATE_EPOCH=0\n")
        if "/usr/bin/ash" not in diversions(root):
            path = root / IN_ROOT_DB / "dpkg/diversions"
            known = path.read_text() if path.exists() else ""
            path.write_text(f"{known}/usr/bin/ash\n/usr/bin/ash.debian\n:\n")  # ":" is the local administrator

    def packages(self, root: Path) -> dict[str, str]:
        """Read dpkg's status file; packages of other architectures are named as apt does, such as `libc6:i386`."""
        return {
            package["Package"]: package["Version"]
            for package in known_packages(root)
            if package["Status"].endswith(" installed")
        }

    def plain_name(self, root: Path, name: str) -> str:
        """Without the root's own architecture."""
        return name.removesuffix(f":{own_architecture(root)}") if ":" in name else name

    def has_installed(self, root: Path, packages: Sequence[str]) -> bool:
        """Whether all are there, and none only because another needs it."""
        wanted = {self.plain_name(root, name) for name in packages}
        return wanted <= self.packages(root).keys() - self.automatic(root)

    def is_older(self, version: str, other: str) -> bool:
        """Compare versions as dpkg does (deb-version(7))."""
        return version_key(version) < version_key(other)

    def has_state(self, root: Path, package: str) -> bool:
        """Whether dpkg's list of the package's files has something in /var/lib."""
        lists = file_lists(root, {package}).get(package, [])
        return any("/var/lib/" in path.read_text(errors="replace") for path in lists)

    def claims(self, root: Path, entry: str) -> set[str]:
        """By dpkg's file lists, and by the entry's name: many packages make theirs in a script."""
        installed = self.packages(root)
        named = {name for name in installed if name.partition(":")[0] == Path(entry).name}
        wanted = re.compile(rf"^/var/{re.escape(entry)}(/|$)", re.MULTILINE)
        lists = file_lists(root, installed).items()
        return named | {
            name for name, paths in lists if any(wanted.search(path.read_text(errors="replace")) for path in paths)
        }

    def config_files(self, root: Path) -> set[str]:
        """Those of dpkg's status file, and those that ucf keeps."""
        status = database(root, "dpkg/status")
        text = status.read_text(encoding="utf-8", errors="replace") if status.is_file() else ""
        blocks = re.findall(r"^Conffiles:\n((?: .*\n)*)", text, re.MULTILINE)
        own = {line.split()[0] for block in blocks for line in block.splitlines() if line.strip()}
        registry = database(root, "ucf/registry")
        lines = registry.read_text(errors="replace").splitlines() if registry.is_file() else []
        return {path.lstrip("/") for path in own | {line.split()[-1] for line in lines if line.strip()}}

    def files(self, root: Path, directory: str) -> set[str]:
        """Those of dpkg's file lists, and those that ucf keeps."""
        start = f"/{directory}/"
        lists = [
            path for path in database(root, "dpkg/info").glob("*.list") if path.is_file() and not path.is_symlink()
        ]
        lines = [line for path in lists for line in path.read_text(errors="replace").splitlines()]
        paths = {line.removeprefix(start) for line in lines if line.startswith(start)}
        return paths | {path.removeprefix(start[1:]) for path in self.config_files(root) if path.startswith(start[1:])}

    def problems(self, root: Path) -> list[str]:
        """Packages that are half there, and files that dpkg believes to be there and that are not."""
        found, known = [], list(known_packages(root))
        for package in known:
            state = package["Status"].rpartition(" ")[2]
            if state not in ("installed", "config-files", "not-installed"):
                found.append(f"package {package['Package']} is {state}")
        lacking = self._lacking(root)
        if not any(package["Status"].endswith(" installed") for package in known):
            found.append("the package database knows no package")
        return found + [f"package {name} lacks {files[0]} ({len(files)} files)" for name, files in lacking.items()]

    def _lacking(self, root: Path) -> dict[str, list[str]]:
        """The files in /usr that dpkg believes to be there and that are not, by package; also its own lists of them."""
        installed, diverted = self.packages(root), diversions(root)
        found: dict[str, list[str]] = {}

        def moved(path: str, package: str) -> str:
            target, keeper = diverted.get(path, (path, package))
            return path if package.partition(":")[0] == keeper else target

        # By directory: to ask for each path, or to follow each from the root on, would take many times as long.
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
        """Read apt's marks."""
        marks, foreign = paragraphs(database(root, "apt/extended_states")), foreign_architectures(root)
        return {name_of(mark, foreign) for mark in marks if mark.get("Auto-Installed") == "1"}

    def held(self, root: Path) -> set[str]:
        """What dpkg's status file says is to be on hold."""
        return {package["Package"] for package in known_packages(root) if package["Status"].startswith("hold ")}

    def archives(self, root: Path) -> str:
        """apt's sources, preferences and settings, such as for a proxy."""
        apt = path_inside(root, "etc/apt")
        directories = (apt / name for name in ("sources.list.d", "preferences.d", "apt.conf.d", "auth.conf.d"))
        files = [apt / name for name in ("sources.list", "preferences", "apt.conf", "auth.conf")]
        files += [path for directory in directories for path in sorted(directory.glob("*"))]
        return "\n".join(f"{path.name}\n{read_text(path)}" for path in files if path.is_file())

    def install(self, work: Transaction, packages: Sequence[str], remove: Sequence[str] = ()) -> None:
        """One run of apt-get, after fetching the package lists where there are none."""
        if not any((work.var / "lib/apt/lists").glob("*_*")):
            self._apt(work, "update", alters=False)
        self._apt(work, "install", "--", *packages, *(f"{name}-" for name in remove))

    def remove(self, work: Transaction, packages: Sequence[str], purge: bool) -> None:
        """One run of apt-get."""
        self._apt(work, "purge" if purge else "remove", "--autoremove", "--", *packages)

    def refresh(self, work: Transaction) -> list[str]:
        """One run of apt-get; an archive that is down or wrong is told of, and its old lists stay."""
        try:
            output = work.run([*self.apt_get, "update"])
        except PackageError as error:
            output = error.message
        said = re.findall(r"^[WE]: (.*)$", output, re.MULTILINE)
        trouble = [line for line in said if re.search(self.TROUBLE, line)]
        if not trouble and re.search(r"^E: ", output, re.MULTILINE):
            raise apt_error(output)
        if trouble and not archives_had(output):
            raise RepositoryError(f"no archive can be had: {trouble[0]}")
        return list(dict.fromkeys(trouble))

    def upgrade(self, work: Transaction, download_only: bool = False) -> None:
        """One run of apt-get, which removes nothing: what only a removal lets in is kept back."""
        self._apt(work, "upgrade", "--with-new-pkgs", *(["--download-only"] if download_only else []))

    def repair(self, work: Transaction) -> None:
        """dpkg's own way, then apt's; then anew what lacks files, and the keyring. What cannot be done is told of."""
        for name in ("lock", "lock-frontend"):
            (database(work.root, "dpkg") / name).unlink(missing_ok=True)
        configure = ["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--configure", "--pending", *self.force]
        steps: Mapping[str, Callable[[], object]] = {
            "finish what is half installed": lambda: work.run(configure),
            "mend dependencies": lambda: self._apt(work, "install", "--fix-broken"),
            "fetch the package lists": lambda: self.refresh(work),
            "bring back lost files": lambda: self._reinstall(work, list(self._lacking(work.root))),
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
            raise failure  # rather as it was than worse

    def _reinstall(self, work: Transaction, packages: Sequence[str]) -> None:
        if packages:
            self._apt(work, "install", "--reinstall", "--", *packages)

    def hold(self, work: Transaction, packages: Sequence[str], held: bool) -> None:
        """By apt-mark, which needs the packages to be known."""
        try:
            work.run(["apt-mark", "hold" if held else "unhold", "--", *packages])
        except PackageError as error:
            raise apt_error(error.message) from None

    def available(self, work: Transaction, packages: Sequence[str]) -> set[str]:
        """Ask apt-cache for candidates."""
        output = work.run(["apt-cache", "policy", "--", *packages]) if packages else ""
        found = re.findall(r"^(\S+):\n  Installed: .*\n  Candidate: (\S+)", output, re.MULTILINE)
        return {name for name, candidate in found if candidate != "(none)"}

    def follow(self, work: Transaction, missing: Mapping[str, bool], unwanted: Sequence[str]) -> None:
        """Install, then leave the rest to apt's marks: what is unwanted, and so automatic now, and not needed goes."""
        for architecture in sorted(architectures_of(missing)):
            work.run(["dpkg", "--add-architecture", architecture])
        if missing:
            self._apt(work, "install", "--", *missing)
        automatic = [name for name, needed_only in missing.items() if needed_only]
        known = self.automatic(work.root)  # to mark them once more would be a change
        if marks := [name for name in (*automatic, *unwanted) if name not in known]:
            work.run(["apt-mark", "auto", "--", *marks])
        if unwanted:
            self._remove_unneeded(work, unwanted)

    def _remove_unneeded(self, work: Transaction, packages: Sequence[str]) -> None:
        """Remove those of some packages that nothing needs: no others, though nothing may need these as well."""
        # Without its log of what it planned: to write that would be a change.
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

    def fetch(self, work: Transaction, packages: Sequence[str]) -> None:
        """Leave out what is of an architecture that is yet to come."""
        known = {*foreign_architectures(work.root)}
        if wanted := [name for name in packages if architectures_of([name]) <= known]:
            self._apt(work, "install", "--download-only", "--", *wanted, alters=False)

    def _apt(self, work: Transaction, *arguments: str, alters: bool = True) -> None:
        """Run apt-get without questions; edited configuration files stay."""
        simulates = work.simulate and alters
        try:
            output = work.run([*self.apt_get, *(["--simulate"] if simulates else []), *arguments])
            if simulates:
                plan = planned(work.snapshot, output)
                if plan.added or plan.upgraded:
                    uris = work.run([*self.apt_get, "--print-uris", *arguments])
                    plan = plan._replace(download=bytes_of(uris, work.change.packages_changed()))
                work.change = work.change.then(plan)  # several runs make one plan
            elif alters:
                self._build_modules(work)
        except PackageError as error:
            tell_failed_builds(work.root)
            raise apt_error(error.message) from None

    @staticmethod
    def _build_modules(work: Transaction) -> None:
        """Build what dkms has for the snapshot's own kernels: its scripts look at the running one."""
        if not (work.root / "usr/sbin/dkms").exists():
            return
        for kernel in sorted(path_inside(work.root, "usr/lib/modules").glob("*")):
            headers = path_inside(work.root, f"usr/lib/modules/{kernel.name}/build/include")
            if headers.is_dir():  # so dkms asks as well; a link to headers that went may be left
                try:
                    work.run(["dkms", "autoinstall", "-k", kernel.name])
                except PackageError as error:
                    if not only_excluded(error.message):
                        said = last_words(error.message)
                        raise PackageError(f"E: a module cannot be built for {kernel.name}: {said}") from None


def version_key(version: str) -> tuple[object, ...]:
    """A key by which Debian versions sort: epoch, upstream version, revision.

    Runs of digits count as numbers, other runs letter by letter: `~` before the end, letters before the rest.
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
    """The paragraphs of a Debian control file, by their fields' first lines; none where there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): *(.*)$", paragraph, re.MULTILINE))
        if fields:
            yield fields


def database(root: Path, path: str) -> Path:
    """What a path of the package database of a root is, wherever links lead to it, but never out of the root."""
    return path_inside(root, f"{IN_ROOT_DB}/{path}")


def file_lists(root: Path, packages: Container[str]) -> dict[str, list[Path]]:
    """dpkg's lists of the files of some packages, which have the architecture in their names or not."""
    foreign, found = foreign_architectures(root), dict[str, list[Path]]()
    for path in filter(is_plain_file, sorted(database(root, "dpkg/info").glob("*.list"))):
        name, _, architecture = path.stem.partition(":")
        others = [f"{name}:{one}" for one in foreign if architecture in ("", one)]
        for one in others if architecture in foreign else [name, *others]:
            if one in packages:
                found.setdefault(one, []).append(path)
    return found


def foreign_architectures(root: Path) -> list[str]:
    """The architectures beside its own of which a root can have packages."""
    path = database(root, "dpkg/arch")  # its first line is the root's own
    return path.read_text(errors="replace").split()[1:] if path.is_file() else []


def own_architecture(root: Path) -> str:
    """The architecture of a root; that of dpkg itself where dpkg has not noted it yet."""
    path = database(root, "dpkg/arch")
    if path.is_file() and (noted := path.read_text(errors="replace").split()):
        return noted[0]
    return next((one.get("Architecture", "") for one in known_packages(root) if one["Package"] == "dpkg"), "")


def architectures_of(packages: Iterable[str]) -> set[str]:
    """The architectures that names of packages give."""
    return {name.partition(":")[2] for name in packages} - {""}


def name_of(package: Mapping[str, str], foreign: Sequence[str]) -> str:
    """What apt calls a package, by its fields: its name, with its architecture where that is not the root's own."""
    name, architecture = package.get("Package", ""), package.get("Architecture", "")
    return f"{name}:{architecture}" if architecture in foreign else name


def is_plain_file(path: Path) -> bool:
    """Whether a path is a file and no link: dpkg makes none, and they may lead out of the root."""
    return path.is_file() and not path.is_symlink()


def known_packages(root: Path) -> Iterator[dict[str, str]]:
    """What dpkg's status file says of each package, named as apt does, where it says what and how it is."""
    foreign = foreign_architectures(root)
    for package in paragraphs(database(root, "dpkg/status")):
        if "Package" in package:
            yield {"Status": "unknown damaged", "Version": "", **package, "Package": name_of(package, foreign)}


def diversions(root: Path) -> dict[str, tuple[str, str]]:
    """By path, where dpkg puts the files of packages instead, and the package to which that does not apply."""
    path = database(root, "dpkg/diversions")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return {path: (target, keeper) for path, target, keeper in zip(lines[::3], lines[1::3], lines[2::3], strict=False)}


def only_excluded(autoinstall: str) -> bool:
    """Whether nothing failed but modules that say that they are not for the kernel, which dkms 3.0 fails over."""
    known = r"BUILD_EXCLUSIVE|One or more modules failed to install during autoinstall"
    errors = re.findall(r"Error! .*|^.* failed due to missing dependencies.*", autoinstall, re.MULTILINE)
    return "BUILD_EXCLUSIVE" in autoinstall and all(re.search(known, error) for error in errors)


def tell_failed_builds(root: Path) -> None:
    """Say what compilers said of modules that dkms could not build: it only names a log, which goes with the rest."""
    for log in sorted(database(root, "dkms").glob("*/*/build/make.log")):
        module, version = log.parts[-4:-2]
        said = read_text(path_inside(root, str(log.relative_to(root))))
        lines = said.rstrip().splitlines()[-30:]  # what tells why
        console.say("\n".join([f"Building {module} {version} failed:", *(f"  {line}" for line in lines)]))


def archives_had(update: str) -> list[tuple[str, str]]:
    """The archives (URL, suite) of which apt-get update had something, and that it did not refuse then."""
    refused = "\n".join(re.findall(r"^E: (?:Release file for |Repository ').*", update, re.MULTILINE))

    def is_refused(url: str, suite: str) -> bool:
        return bool(re.search(rf"{re.escape(url)}(/dists)?[/ ]{re.escape(suite.rstrip('/'))}[/ ]", refused))

    reached = re.findall(r"^(?:Hit|Get):\d+ (\S+) +(\S+)", update, re.MULTILINE)
    return [archive for archive in reached if not is_refused(*archive)]


def bytes_of(uris: str, without: Container[str] = ()) -> int:
    """How much is to be fetched, by what apt-get --print-uris prints: lines such as `'URI' NAME_1_amd64.deb SIZE HASH`.

    Args:
        uris: the lines.
        without: packages that do not count.
    """
    files = re.findall(r"^'\S+' ([^\s_]+)_\S*_([^\s_.]+)\.\w+ (\d+) ", uris, re.MULTILINE)
    return sum(int(size) for name, of, size in files if name not in without and f"{name}:{of}" not in without)


def planned(snapshot: int, simulation: str) -> Change:
    """What apt-get's simulation says it would do: lines such as `Inst NAME [OLD] (NEW ...` and `Remv NAME [OLD]`."""
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
    """What apt's output says went wrong."""
    errors = [line.removeprefix("E: ") for line in output.splitlines() if line.startswith("E: ")]
    if missing := re.search(
        r"Unable to locate package (\S+)|Package '?([^' ]+)'? has no installation candidate"
        r"|(?:Version|Release) '([^']+)' for '([^']+)' was not found",
        output,
    ):
        name = missing[1] or missing[2] or f"{missing[4]} {missing[3]}"
        return AshError(f"there is no package {name}", "ash refresh N fetches the lists", MISSING)
    if room := next((line for line in errors if "too little space" in line), ""):
        return AshError(room.removeprefix("ash: "), "ash del N frees what a snapshot holds", REFUSED)
    return PackageError("; ".join(errors[:3]) or "apt-get failed")
