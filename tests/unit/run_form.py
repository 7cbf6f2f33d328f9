# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs the installer without arguments, on disks that are only recorded: `run_form.py SCENE.json`.

The file has a Scene. What asks the disks themselves is replaced. What would be installed goes to SCENE.installed.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ash import MISSING, REFUSED, AshError
from distros.debian.installer import DebianInstaller
from installer import bootloader, cli, disk, drives, form, host, install
from installer.distribution import Source


@dataclass(frozen=True)
class Scene:
    """A machine.

    Args:
        disks: those that lsblk printed.
        systems: the ids of the systems on each partition.
        uefi: whether it was started with UEFI.
        root: whether root runs the installer.
        busy: a device that Linux uses in a way that lsblk does not show.
        asked: options that the form asks for besides: {name in the parser's result: text}.
    """

    disks: Sequence[dict[str, Any]]
    systems: dict[str, list[str]]
    uefi: bool = True
    root: bool = True
    busy: str = ""
    asked: dict[str, str] = field(default_factory=dict)


def play(scene: Scene) -> None:
    """Have this process find the machine of a scene."""
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)  # a caller that has loaded readline exports them
    replace = pytest.MonkeyPatch().setattr
    replace(drives, "devices", lambda: [drives.Device.of(one) for one in scene.disks])
    for name in ("exists", "is_block_device"):
        replace(Path, name, nodes_are_there(name))
    replace(os, "open", opener(scene))
    replace(Path, "read_text", reader())
    for module in (form, install):
        replace(module, "FIRMWARE", Path("/" if scene.uefi else "/no/firmware"))
    replace(os, "geteuid", lambda: 0 if scene.root else 1000)
    replace(host, "require_btrfs", lambda: None)
    replace(host, "require", lambda _: None)
    replace(disk, "EfiFiles", lambda _: SimpleNamespace(directories=lambda _: []))
    replace(bootloader, "require_no_neighbour", lambda *_: None)
    replace(install, "systems_on", lambda device: scene.systems.get(str(device.path), []))
    replace(install, "_require_room_in", lambda target, new: require_room(scene, target, new))
    replace(install, "install_on_disk", lambda path, new, agree: installed({"disk": str(path)}, path, new, agree))
    replace(install, "install_on_partitions", installed_on_partitions)
    replace(DebianInstaller, "resolve", resolve)
    more = [form.Question(key, "settings", text, "Asked by a test.") for key, text in scene.asked.items()]
    replace(form, "QUESTIONS", (*form.QUESTIONS, *more))


def is_recorded(path: object) -> bool:
    return str(path).startswith("/dev/sd")


def nodes_are_there(name: str) -> Callable[..., bool]:
    """A method of Path that is true of recorded nodes."""
    real: Callable[..., bool] = getattr(Path, name)
    return lambda path, **options: is_recorded(path) or real(path, **options)


def opener(scene: Scene) -> Callable[..., int]:
    """os.open, for which /dev/null stands for the recorded nodes."""
    real = os.open

    def open_node(path: Any, *args: Any, **options: Any) -> int:
        if scene.busy and str(path) == scene.busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return real("/dev/null" if is_recorded(path) else path, *args, **options)

    return open_node


def reader() -> Callable[..., str]:
    """Path.read_text(), for which the recorded partitions begin after the first MiB."""
    real = Path.read_text
    is_start = re.compile(r"/sys/class/block/sd\w+/start").fullmatch
    return lambda path, **options: "2048" if is_start(str(path)) else real(path, **options)


def require_room(scene: Scene, target: disk.Target, new: install.Installation) -> list[str]:
    there = scene.systems.get(str(target.root), [])
    if new.identity.id in there:
        raise AshError(f"there is a system {new.identity.id} on this file system", "name another id", REFUSED)
    return there


def resolve(_: DebianInstaller, source: Source) -> Source:
    """As if the repository had all but one package."""
    if "nothere" in source.packages:
        raise AshError("Debian stable has no package nothere", status=MISSING)
    return source


def installed_on_partitions(places: install.Places, new: install.Installation, agree: install.Agree) -> install.Made:
    devices = {name: str(getattr(places, name)) for name in ("root", "drive", "efi")}
    return installed({**devices, "mode": places.mode.value}, places.root, new, agree)


def installed(where: dict[str, str], path: Path, new: install.Installation, agree: install.Agree) -> install.Made:
    """Ask as an installation does, and write what is known then to a file beside the scene."""
    assert isinstance(agree, partial)
    args = agree.keywords["args"]
    agree(path.name, [install.Loss(str(path), "all that is on it is lost")], [])
    settings = {field.name: getattr(new.settings, field.name) for field in fields(new.settings)}
    settings |= {name: one and one.text for name, one in settings.items() if name.endswith("password")}
    told = {
        **where,
        "no_prep": args.no_prep,
        "size": args.size,
        "id": new.identity.id,
        "name": new.identity.name,
        "packages": new.source.packages,
        **settings,
    }
    new.hashes = {"ada": "$y$theirs"} if new.settings.user else {}
    Path(sys.argv[1]).with_suffix(".installed").write_text(
        json.dumps({**told, "argv": own_command_line()}, default=str)
    )
    return install.Made(path, "Debian", path)


def own_command_line() -> str:
    return Path("/proc/self/cmdline").read_text().replace("\0", " ")


if __name__ == "__main__":
    play(Scene(**json.loads(Path(sys.argv[1]).read_text())))
    sys.exit(cli.main([]))
