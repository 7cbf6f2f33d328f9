# SPDX-License-Identifier: AGPL-3.0-or-later
"""Answers to the installer's questions, in a TOML file: its keys are the long options without their dashes."""

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ash import USAGE, AshError

# Options of one run, which a file for several machines must not have.
NOT_ANSWERS = {
    *("help", "version", "yes", "dry-run", "force", "answers", "save-answers"),
    *("image", "make-rootfs", "disk", "keep-filesystem", "no-prep", "prep-only"),
}
# Hashes are only in files: everybody can read the command lines of all processes.
HASHES = ("password-hash", "root-password-hash")


HEADER = "# Answers for the installer of ash: init.py --answers FILE"


def are_in(path: Path) -> bool:
    """Whether a file was written by write(), or is empty."""
    with path.open("rb") as file:
        return file.readline(len(HEADER) + 2).rstrip() in (b"", HEADER.encode())


def read(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values for the fields of a parser's result.

    Raises:
        AshError: the file cannot be read, or has a key or value that is not known (USAGE).
    """
    try:
        answers = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise AshError(f"cannot read the answers in {path}: {error}", "see --save-answers", USAGE) from error
    known = dict(_options(parser))
    found: dict[str, Any] = {}
    for key, value in answers.items():
        if key not in known and key not in HASHES:
            near = difflib.get_close_matches(key, [*known, *HASHES], 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join([*known, *HASHES])}"
            raise AshError(f"{path} has an unknown key {key}", hint, USAGE)
        option = known.get(key)
        found[option.dest if option else key.replace("-", "_")] = _converted(path, key, value, option)
    return found


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """The options that can be answered, by key."""
    for action in parser._actions:  # noqa: SLF001 (argparse has no public list of them)
        key = max(action.option_strings, key=len, default="").removeprefix("--")
        if key and key not in NOT_ANSWERS:
            yield key, action


def _converted(path: Path, key: str, value: object, option: argparse.Action | None) -> object:
    """A value as the parser would return it; AshError (USAGE) if it is of the wrong kind."""
    if option is not None and option.nargs == 0:
        if not isinstance(value, bool):
            raise AshError(f"{path}: {key} is not true or false", f"such as {key} = true", USAGE)
        return value
    takes_several = option is not None and option.nargs == "+"
    wanted = "a list of strings" if takes_several else "a string"
    if takes_several and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    if takes_several or not isinstance(value, str):
        first = next(iter(option.choices), "") if option is not None and option.choices is not None else "one"
        example = '["one", "two"]' if takes_several else json.dumps(first)
        raise AshError(f"{path}: {key} is not {wanted}", f"such as {key} = {example}", USAGE)
    if option is not None and option.choices is not None and value not in option.choices:
        raise AshError(f"{path}: {key} is not one of {', '.join(option.choices)}", "", USAGE)
    return Path(value) if option is not None and option.type is Path else value


def write(path: Path, args: argparse.Namespace, parser: argparse.ArgumentParser, hashes: Mapping[str, str]) -> None:
    """Save what was answered, for the next machine: passwords as hashes, in a file that only its owner can read.

    Args:
        path: of the file, which is replaced.
        args: a result of the parser.
        parser: the parser.
        hashes: by key, of those in HASHES.

    Raises:
        AshError: the file cannot be written.
    """
    lines = [HEADER]
    for key, option in _options(parser):
        value = getattr(args, option.dest)
        if value not in (None, option.default, []) and not key.endswith(("password-file", "passphrase-file")):
            value = [*map(str, value)] if isinstance(value, list) else value if option.nargs == 0 else str(value)
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    lines += [f"{key} = {json.dumps(value)}" for key, value in hashes.items()]
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    except OSError as error:
        raise AshError(f"cannot write the answers to {path}: {error.strerror}") from error
