# SPDX-License-Identifier: AGPL-3.0-or-later
"""Concatenates the executable: the core, the modules of the distribution and its parents, the start guard."""

import ast
from pathlib import Path

from ash import AshError

CHECKOUT = Path(__file__).resolve().parent.parent
# The shell starts Python, which imports this same file from `lib`: Python caches the compiled form of what it imports,
# so a command does not have to compile 10,000 lines first. A file of another name or place, such as ash.old, is run
# itself. Other imports come from the standard library: hence -S.
# What is imported lives until the end: keeping it out of garbage collection saves a short command a fifth of its time,
# and _exit() instead of tearing the interpreter down another twentieth. To Python, all of this starts a string.
LAUNCH = """\
#!/bin/sh
# SPDX-License-Identifier: AGPL-3.0-or-later
''':'
exec /usr/bin/python3 -I -S -c '
import gc, os, sys
gc.disable()
sys.argv = sys.argv[1:]
lib = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "lib")
sys.path.insert(0, lib)
try:
    if not os.path.samefile(os.path.join(lib, "ash.py"), sys.argv[0]):
        raise ImportError("another version of ash")
    from ash import main
except KeyboardInterrupt:
    sys.exit(130)
except Exception:  # the compiled copy is damaged, missing, or of another version
    import runpy
    gc.enable()
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    gc.freeze()
    gc.enable()
    status = main()
    try:
        sys.stderr.flush()
        sys.stdout.flush()
    except OSError:  # main() has reported it, or nobody reads it
        pass
    os._exit(status)
' "$0" "$@"
'''"""
START = ['if __name__ == "__main__":', "    sys.exit(main())"]


def build(distro: str) -> str:
    """The text of the executable for a distribution.

    Args:
        distro: its id, a directory in `distros/`.

    Raises:
        AshError: a part is missing or does not end with the start guard, or the result does not compile.
    """
    core = _lines(CHECKOUT / "ash.py")
    if core[-2:] != START:
        raise AshError("ash.py does not end with the start guard", hint="`if __name__` must be its last two lines")
    modules = [line for name in family(distro) for line in ["", "", *_module(name)]]
    docstring = next(number for number, line in enumerate(core) if line.startswith('"""'))
    text = LAUNCH + "\n".join([*core[docstring:-2], *modules, "", "", *START, ""])
    try:
        compile(text, "ash", "exec")
    except SyntaxError as error:
        raise AshError(f"the executable for {distro} does not compile: {error}") from error
    return text


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise AshError(f"{path} is missing", hint="use a complete checkout of ash")
    return path.read_text(encoding="utf-8").rstrip().splitlines()


def _path(distro: str) -> Path:
    return CHECKOUT / "distros" / distro / "ashpk.py"


def _imports_from(lines: list[str], package: str) -> list[ast.ImportFrom]:
    """A module's imports from a package."""
    nodes = ast.parse("\n".join(lines)).body
    return [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == package]


def family(distro: str) -> list[str]:
    """The ids of a distribution and of those that its module imports from, parents first."""
    parents = [str(node.module).split(".")[1] for node in _imports_from(_lines(_path(distro)), "distros")]
    names = [name for parent in parents for name in family(parent)]
    return [*dict.fromkeys(names), distro]


def _module(distro: str) -> list[str]:
    """A module's lines, without imports of its parents, which stand above it, and of types, which nothing evaluates."""
    lines = _lines(_path(distro))
    unwanted = [node for package in ("distros", "typing") for node in _imports_from(lines, package)]
    for node in sorted(unwanted, key=lambda node: node.lineno, reverse=True):
        del lines[node.lineno - 1 : node.end_lineno]
    return lines
