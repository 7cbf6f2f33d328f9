# SPDX-License-Identifier: AGPL-3.0-or-later
"""The first snapshot beside the base: profiles are installed into it, or it is mutable; then it is deployed."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ash import BASE, USAGE, AshError, Profile, System, carry_out, parse
from installer import executable, host
from installer.distribution import Settings


def profiles_of(module: str) -> dict[str, Path]:
    """The files of the profiles for a distribution, by name; its own override those of its parents."""
    files = [
        file
        for name in executable.family(module)
        for file in sorted((executable.CHECKOUT / "profiles").glob(f"*/{name}.conf"))
    ]
    return {file.parent.name: file for file in files}


def require_profiles(module: str, names: Sequence[str]) -> None:
    """Raise AshError (USAGE) if there is no profile with one of the names."""
    known = profiles_of(module)
    for name in names:
        if name not in known:
            raise AshError(f"there is no profile {name} for {module}", f"profiles: {', '.join(sorted(known))}", USAGE)


def is_desktop(module: str, name: str) -> bool:
    """Whether a system with that profile greets on the screen."""
    profile = Profile.parse(name, profiles_of(module)[name].read_text(encoding="utf-8"))
    return any("graphical.target" in line for line in profile.lines("commands"))


def commands(settings: Settings) -> list[list[str]]:
    """The commands of ash that make the first snapshot; none if the base alone is wanted."""
    if not (settings.profiles or settings.mutable):
        return []
    number = str(BASE + 1)
    found = [["clone", str(BASE), "-d", *settings.profiles] if settings.profiles else ["clone", str(BASE)]]
    found += [["mutable", number]] if settings.mutable else []
    found += [["install", number, "--profile", name] for name in settings.profiles]
    return [*found, ["deploy", number]]


def make(system: System, settings: Settings, log: host.Log) -> None:
    """Make the first snapshot of a system that is complete, and deploy it.

    Args:
        system: which starts snapshot 0 so far.
        settings: of the system.
        log: receives what ash says.

    Raises:
        AshError: a command failed; a note says what the system starts, and how to go on there.
    """
    # For the commands of profiles: who it is here means nothing there.
    os.environ["SUDO_USER"] = settings.user or "root"
    left = commands(settings)
    while left:
        try:
            with log.step(f"Running ash {shlex.join(left[0])}"):
                command, request = parse(left[0])
                system.caller = {"user": 0, "command": command.name, "arguments": left[0]}
                log.write(carry_out(command, system, request).text)
        except BaseException as error:
            log.write(f"failed: {error}")
            rest = "; ".join(f"ash {shlex.join(words)}" for words in left)
            error.add_note(f"the system is complete, and starts snapshot {BASE}; to go on, run there: {rest}")
            raise
        del left[0]
