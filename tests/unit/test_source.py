# SPDX-License-Identifier: AGPL-3.0-or-later
"""The source itself: the order inside ash.py, one executable of it, no distribution's name in the core, a true README."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import ash
from installer.executable import build
from installer.help import markdown_table

pytestmark = pytest.mark.budget(10)

CHECKOUT = Path(ash.__file__).parent
DOCUMENTS = {path.stem.upper() for path in CHECKOUT.glob("docs/*.md")}
DISTROS = sorted(path.parent.name for path in CHECKOUT.glob("distros/*/ashpk.py"))


@pytest.fixture(scope="module", params=DISTROS)
def executable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one executable of a distribution, in a directory with nothing else of ash but its libraries."""
    path = tmp_path_factory.mktemp("executable") / "ash"
    path.write_text(build(request.param))
    path.chmod(0o755)
    (path.parent / "distro").write_text(request.param)
    return path


def output(*argv: str | Path) -> str:
    ended = subprocess.run(argv, capture_output=True, text=True, cwd="/", check=False, env={"PATH": os.defpath})
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_executable_runs_by_itself(executable: Path) -> None:
    distro = (executable.parent / "distro").read_text()
    assert output(sys.executable, "-I", executable, "version") == f"ash {ash.ASH_VERSION} ({distro})\n"


def test_the_executable_is_isolated_from_its_caller(executable: Path, tmp_path: Path) -> None:
    for module in ("json", "ash", "argparse", "sitecustomize"):
        (tmp_path / f"{module}.py").write_text("print('hostile')")
    (tmp_path / "python3").write_text("#!/bin/sh\necho hostile")
    (tmp_path / "python3").chmod(0o755)
    hostile = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "json.py")}
    ended = subprocess.run(
        [executable, "version"], capture_output=True, text=True, cwd=tmp_path, check=True, env=hostile
    )
    assert ended.stdout.startswith("ash ")
    assert ended.stderr == ""


@pytest.mark.parametrize("damage", [None, b"", b"\0" * 999])
def test_the_executable_starts_whatever_its_compiled_text_is_like(executable: Path, damage: bytes | None) -> None:
    lib = executable.parent / "lib"
    lib.mkdir(exist_ok=True)
    (lib / "ash.py").unlink(missing_ok=True)
    (lib / "ash.py").symlink_to("../ash")
    first = output(executable, "version")
    (compiled,) = (lib / "__pycache__").glob("ash.*.pyc")
    if damage is not None:
        compiled.write_bytes(compiled.read_bytes()[:16] + damage)  # the header says that it is right
    assert output(executable, "version") == first
    shutil.rmtree(lib)


def test_the_executable_knows_its_distribution_without_a_checkout(executable: Path) -> None:
    script = (
        "import runpy, sys; sys.argv[0] = sys.argv[1]; g = runpy.run_path(sys.argv[1]); print(*g['Distro'].registry)"
    )
    distro = (executable.parent / "distro").read_text()
    assert output(sys.executable, "-I", "-c", script, executable).split()[-1] == distro


def test_the_executable_imports_nothing_of_the_checkout(executable: Path) -> None:
    modules = {n.module or "" for n in ast.walk(ast.parse(executable.read_text())) if isinstance(n, ast.ImportFrom)}
    assert not any(module.startswith(("distros", "installer")) for module in modules)


def test_the_executable_imports_at_its_start_only_what_every_command_needs(executable: Path) -> None:
    script = (
        "import sys, types; module = sys.modules['ash'] = types.ModuleType('ash'); module.__file__ = sys.argv[1];"
        "exec(open(sys.argv[1]).read(), vars(module)); print(*sys.modules)"
    )
    modules = set(output(sys.executable, "-I", "-S", "-c", script, executable).split())
    assert not modules & {"ctypes", "dataclasses", "inspect", "subprocess", "tabulate", "tempfile", "typing"}


def test_the_start_guard_is_the_last_statement(executable: Path) -> None:
    text = executable.read_text()
    assert text.count("\nif __name__ ==") == 1
    assert text.endswith('if __name__ == "__main__":\n    sys.exit(main())\n')


def test_the_core_is_isolated_in_a_checkout_too() -> None:
    assert output(sys.executable, "-I", CHECKOUT / "ash.py", "version").startswith("ash ")


@pytest.mark.parametrize("distro", DISTROS)
def test_a_module_has_only_classes_and_functions_and_no_future(distro: str) -> None:
    tree = ast.parse((CHECKOUT / "distros" / distro / "ashpk.py").read_text())
    docstring, *rest = tree.body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        assert isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef), ast.unparse(node)
        assert not (isinstance(node, ast.ImportFrom) and node.module == "__future__")


@pytest.mark.parametrize("distro", DISTROS)
def test_a_module_knows_nothing_of_btrfs_and_booting(distro: str) -> None:
    tree = ast.parse((CHECKOUT / "distros" / distro / "ashpk.py").read_text())
    taken = {
        name.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "ash" for name in n.names
    }
    assert not taken & {"snapshot_subvolume", "create_subvolume", "delete_subvolume", "set_readonly", "Slots", "Menu"}


def test_the_core_compares_with_no_distribution_name() -> None:
    known = {*DISTROS, "arch", "fedora", "ubuntu", "alpine", "opensuse", "void", "gentoo"}
    tree = ast.parse((CHECKOUT / "ash.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not constants & known, f"line {node.lineno}: {ast.unparse(node)}"


# What only some distributions have, and the sections that may name it.
TOOLS = r"systemctl|grub-mkconfig|vmlinu|ldconfig|\bldd\b|x-systemd|\bapt\b|\bdpkg\b"
ROOMS = ("Shared libraries", "The init system", "Kernels", "BootTools")


def test_distribution_tools_are_only_named_in_their_sections() -> None:
    section = ""
    for number, line in enumerate((CHECKOUT / "ash.py").read_text().splitlines(), start=1):
        if line.startswith("# --- "):
            section = line.removeprefix("# --- ")
        assert section.startswith(ROOMS) or not re.search(TOOLS, line), f"line {number}, in {section!r}: {line}"


def test_the_core_never_uses_a_shell() -> None:
    tree = ast.parse((CHECKOUT / "ash.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"line {node.lineno}"
            assert ast.unparse(node.func) not in ("os.system", "os.popen"), f"line {node.lineno}"


def test_the_readme_has_the_command_table_that_ash_prints() -> None:
    table = output(sys.executable, "-I", CHECKOUT / "ash.py", "help", "--format", "markdown")
    assert table in (CHECKOUT / "README.md").read_text()


def test_every_command_is_in_the_table() -> None:
    table = markdown_table()
    assert all(f"| `{c.usage}` |" in table and all(f"`{a}`" in table for a in c.aliases) for c in ash.COMMANDS)


# The order inside ash.py

SECTION_LIMIT = 500  # lines; a longer one has a concept in it that wants a section of its own
FRAME = "The command frame"  # the last section that commands build on
# Lines up to which a function may leave it to its name to say what it does: one that others call, and a private one.
SELF_EVIDENT, SELF_EVIDENT_PRIVATE = 5, 15


class Section(NamedTuple):
    """A part of ash.py between two banners; `start` and `end` are line numbers, `end` exclusive."""

    title: str
    start: int
    end: int


def sections(text: str) -> list[Section]:
    """The sections of ash.py, in order."""
    lines = [*text.splitlines(), ""]
    starts = [number for number, line in enumerate(lines, start=1) if line.startswith("# --- ")]
    return [Section(lines[start - 1][6:].rstrip(" -"), start, end) for start, end in pairwise([*starts, len(lines)])]


def bound_names(node: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement defines."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Assign():
            yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


def definitions(tree: ast.Module) -> dict[str, int]:
    """The line at which each top-level name is defined first."""
    lines: dict[str, int] = {}
    for node in tree.body:
        for name in bound_names(node):
            lines.setdefault(name, node.lineno)
    return lines


class Uses(ast.NodeVisitor):
    """Collects the uses of global names: (line, name), without those in annotations unless they are asked for."""

    def __init__(self, annotations: bool = False) -> None:
        self.annotations = annotations
        self.found: list[tuple[int, str]] = []
        self._local: list[set[str]] = [set()]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [one for one in (arguments.vararg, arguments.kwarg) if one]
        outside = [*node.decorator_list, *arguments.defaults, *(d for d in arguments.kw_defaults if d)]
        if self.annotations:
            outside += [a for a in (node.returns, *(one.annotation for one in every)) if a]
        for expression in outside:
            self.visit(expression)
        stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._local.append(self._local[-1] | stored | {one.arg for one in every})
        for statement in node.body:
            self.visit(statement)
        self._local.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        for expression in (node.annotation if self.annotations else None, node.value):
            if expression:
                self.visit(expression)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id not in self._local[-1]:
            self.found.append((node.lineno, node.id))


def uses(tree: ast.Module, annotations: bool = False) -> list[tuple[int, str]]:
    visitor = Uses(annotations)
    visitor.visit(tree)
    return visitor.found


def upward_uses(text: str) -> list[str]:
    """The uses of names that are defined further down."""
    tree = ast.parse(text)
    defined = definitions(tree)
    return [f"line {line}: {name} is defined below" for line, name in uses(tree) if defined.get(name, 0) > line]


def without_docstring(text: str) -> list[str]:
    """Classes and functions whose docstring is missing; a command has its help, and a short function its name."""
    found = []
    tree = ast.parse(text)
    outer: list[ast.Module | ast.ClassDef] = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
    public = {id(node) for body in outer for node in body.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is None:
            is_command = any(isinstance(d, ast.Call) and ast.unparse(d.func) == "command" for d in node.decorator_list)
            is_private = id(node) not in public or node.name.startswith("_")
            limit = 0 if isinstance(node, ast.ClassDef) else SELF_EVIDENT_PRIVATE if is_private else SELF_EVIDENT
            length = (node.end_lineno or 0) - node.body[0].lineno + 1
            if not is_command and length > limit and not node.name.startswith("__"):
                found.append(f"line {node.lineno}: {node.name}")
    return found


def files_cited(text: str) -> Iterator[str]:
    """The files of this project that comments and docstrings name."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.startswith('"""')):
            yield from re.findall(
                r"(?<![\w/<>*-])(?:docs|tests|distros|installer|profiles)/[\w./-]*\w|\b[A-Z]+\.md\b", token.string
            )
            # A document is cited by its path: a word such as DESIGN does not say where it is.
            yield from (word for word in re.findall(r"\b[A-Z]+\b", token.string) if word in DOCUMENTS)


SOURCE = (CHECKOUT / "ash.py").read_text()


@pytest.mark.parametrize("distro", DISTROS)
def test_no_top_level_name_is_defined_twice(distro: str) -> None:
    names = [name for node in ast.parse(build(distro)).body for name in bound_names(node)]
    assert not {name for name in names if names.count(name) > 1}


def test_nothing_is_used_above_its_definition() -> None:
    assert not upward_uses(SOURCE)


def test_no_section_is_too_long() -> None:
    found = sections(SOURCE)
    assert len(found) > 20
    assert not [f"{s.title}: {s.end - s.start} lines" for s in found if s.end - s.start > SECTION_LIMIT]


def test_the_core_does_not_name_what_commands_define() -> None:
    frame = next(s for s in sections(SOURCE) if s.title.startswith(FRAME))
    tree = ast.parse(SOURCE)
    of_commands = {name for name, line in definitions(tree).items() if line >= frame.end}
    found = [(line, name) for line, name in uses(tree, annotations=True) if line < frame.end and name in of_commands]
    assert not found


def test_every_class_and_function_says_what_it_does() -> None:
    assert not without_docstring(SOURCE)


def test_no_host_of_a_package_registry_is_named() -> None:
    text = "\n".join(path.read_text() for pattern in ("*.py", "*.md") for path in CHECKOUT.rglob(pattern))
    assert not re.findall(r"\b[\w-]+\.(?:debian|ubuntu)\.(?:org|com|net)\b", text)


def test_comments_cite_no_file_that_is_not_there() -> None:
    assert not [name for name in files_cited(SOURCE) if not (CHECKOUT / name).exists()]


def test_the_guards_see_what_they_forbid() -> None:
    assert upward_uses("def one():\n    return two()\n\n\ndef two():\n    return 1\n")
    assert not upward_uses("def one(x: Two) -> Two: ...\n\n\nclass Two: ...\n")
    assert not upward_uses("def one():\n    two = 1\n    return two\n\n\ndef two(): ...\n")
    assert without_docstring("def long():\n" + "    print()\n" * (SELF_EVIDENT + 1))
    assert not without_docstring("def short():\n    print()\n")
    assert [*files_cited("# as tests/no/such.py has it\n")] == ["tests/no/such.py"]
    assert [*files_cited("# step (a) of DESIGN\n")] == ["DESIGN"]
