# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run several commands of ash on a disk, one after the other in one process: `run_many.py KNOWN COMMAND...`.

Each COMMAND is a command line, as a JSON list. Printed is what each of them printed, as a JSON list; the first that
fails ends it, with its status, and what it printed.

KNOWN is a file of what fsck has found in subvolumes, by their generations: what it has looked at on one disk need not
be looked at once more on each of its copies. It is written where it does not exist.
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
    """What names the content of the subvolume that a directory lies in: it has another name when it has changed."""
    ash.ask_btrfs(path, ash.BTRFS_IOC_SYNC)  # until then the generation is the old one
    generation, uuid = INFO.unpack_from(ash.ask_btrfs(path, ash.BTRFS_IOC_GET_SUBVOL_INFO, bytes(504)))
    return f"{uuid.hex()} {generation}"


def remembered(function: Callable[..., Any], known: dict[str, Any]) -> Callable[..., Any]:
    """A function of directories that is only called where its answer is not known."""

    def ask(*arguments: object) -> Any:
        directories = [argument for argument in arguments if isinstance(argument, Path)]
        question = " ".join([function.__name__, directories[-1].name, *map(state_of, directories)])
        if question not in known:
            known[question] = function(*arguments)
        return known[question]

    return ask


def answers(commands: Iterable[Sequence[str]]) -> list[str]:
    """What each command printed; the first that fails ends this process."""
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
    """Run the commands, with what is known."""
    file = Path(sys.argv[1])
    known = json.loads(file.read_text()) if file.exists() else {}
    ash.Fsck._package_problems = remembered(ash.Fsck._package_problems, known)  # type: ignore[method-assign]
    ash.first_difference = remembered(ash.first_difference, known)
    try:
        print(json.dumps(answers(map(json.loads, sys.argv[2:]))))
    finally:
        if not file.exists():
            file.write_text(json.dumps(known))


if __name__ == "__main__":
    main()
