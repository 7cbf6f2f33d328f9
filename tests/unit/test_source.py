# SPDX-License-Identifier: AGPL-3.0-or-later
"""The source itself: one executable of it, no distribution's name in the core, a README that is true."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ash
from installer.executable import build
from installer.help import markdown_table

pytestmark = pytest.mark.budget(10)

CHECKOUT = Path(ash.__file__).parent
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
    previous = ""
    for number, line in enumerate((CHECKOUT / "ash.py").read_text().splitlines(), start=1):
        if previous.startswith("# -----") and line.startswith("# "):
            section = line.removeprefix("# ")
        previous = line
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
