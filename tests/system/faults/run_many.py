# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run several ash commands in one process: `run_many.py KNOWN COMMAND...`.

Each COMMAND is a command line as a JSON list. The outputs are printed as a JSON list; a command that fails ends the
process with its exit status and its output.

KNOWN is a file that caches what fsck found in each subvolume, by uuid and generation: what was checked on one disk need not
be checked again on its copies. It is written if it does not exist.
"""

import contextlib
import io
import json
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(CHECKOUT))

import ash  # noqa: E402

INFO = struct.Struct("=280xQ8x16s")  # btrfs_ioctl_get_subvol_info_args: generation, uuid


def state_of(path: Path) -> str:
    """A key for the content of a directory's subvolume, which changes with the content."""
    ash.ask_btrfs(path, ash.BTRFS_IOC_SYNC)  # the generation changes when the transaction is committed
    generation, uuid = INFO.unpack_from(ash.ask_btrfs(path, ash.BTRFS_IOC_GET_SUBVOL_INFO, bytes(504)))
    return f"{uuid.hex()} {generation}"


def cached(function: Callable[..., Any], known: dict[str, Any]) -> Callable[..., Any]:
    """Wrap a function of directories so that it is only called for content that is not in the cache."""

    def ask(*arguments: object) -> Any:
        directories = [argument for argument in arguments if isinstance(argument, Path)]
        question = " ".join([function.__name__, directories[-1].name, *map(state_of, directories)])
        if question not in known:
            known[question] = function(*arguments)
        return known[question]

    return ask


def answers(commands: Iterable[Sequence[str]]) -> list[str]:
    """The output of each command; the first one that fails ends this process."""
    said = []
    for words in commands:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = ash.main(words)
        said.append(output.getvalue())
        if status:
            print(said[-1])
            sys.exit(status)
    return said


def main() -> None:
    """Run the commands with the cache."""
    file = Path(sys.argv[1])
    known = json.loads(file.read_text()) if file.exists() else {}
    ash.Fsck._package_problems = cached(ash.Fsck._package_problems, known)  # type: ignore[method-assign]
    ash.first_difference = cached(ash.first_difference, known)
    try:
        print(json.dumps(answers(map(json.loads, sys.argv[2:]))))
    finally:
        if not file.exists():
            file.write_text(json.dumps(known))


if __name__ == "__main__":
    main()
