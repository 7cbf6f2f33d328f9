# SPDX-License-Identifier: AGPL-3.0-or-later
"""Man page and completions: they contain the whole command table, and groff and the shells accept them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ash
from ash import COMMANDS, GLOBAL_OPTIONS, USAGE, AshError
from distros.debian.installer import DebianInstaller
from installer import help, install  # noqa: A004
from installer.help import FORMATS

pytestmark = pytest.mark.budget(20)

WORDS = {word for command in COMMANDS for word in (command.name, *command.aliases)}
FLAGS = {flag for command in COMMANDS for option in command.all_options() for flag in option.flags}
FLAGS |= {flag for option in GLOBAL_OPTIONS for flag in option.flags}


def output(*argv: str | Path, input: str = "", path: str = os.defpath) -> str:
    """The stdout of a program, which must succeed and print nothing to stderr."""
    ended = subprocess.run(
        argv,
        input=input,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": path, "LC_ALL": "C.UTF-8", "HOME": "/"},
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    return ended.stdout


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.fixture
def fake_ash(tmp_path: Path) -> str:
    """A PATH with a fake ash that lists the snapshots 0, 7 and 12."""
    (tmp_path / "ash").write_text(
        """#!/bin/sh\necho '{"tree": [{"snapshot": 0}, {"snapshot": 7}, {"snapshot": 12}]}'\n"""
    )
    (tmp_path / "ash").chmod(0o755)
    return f"{tmp_path}:{os.defpath}"


# The manual


@needs("groff")
def test_groff_formats_the_manual_without_warnings() -> None:
    page = " ".join(output("groff", "-man", "-Tutf8", "-ww", "-P-cbou", "-rLL=999n", input=help.manual()).split())
    for command in COMMANDS:
        assert f" {command.usage} " in page
        assert all(alias in page for alias in command.aliases)
    for flag in FLAGS:
        assert f" {flag}" in page


@needs("groff")
def test_the_manual_escapes_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = ".TH 'x' \\n(.s `-y` -- \\fB"
    monkeypatch.setattr(help, "FILES", {hostile: hostile})
    page = output("groff", "-man", "-Tutf8", "-ww", "-P-cbou", "-rLL=999n", input=help.manual())
    assert page.count(hostile) == 2


# The completions


@pytest.mark.parametrize("kind", FORMATS)
def test_help_prints_each_format(kind: str) -> None:
    printed = output(sys.executable, "-I", ash.__file__, "help", "--format", kind)
    assert printed == f"{FORMATS[kind]()}\n"


@pytest.mark.parametrize("words", [[], *([command.name] for command in COMMANDS)])
def test_help_fits_a_console(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ash.main(["help", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert any(line.startswith("  --image FILE ") for line in lines)


def test_an_installed_ash_prints_the_rendered_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ash, "HERE", tmp_path)
    (tmp_path / "help").mkdir()
    (tmp_path / "help/man").write_text(".TH ASH 8\n")
    assert ash.rendered_help("man") == ".TH ASH 8"


def test_an_ash_without_rendered_files_and_installer_has_no_manual(tmp_path: Path) -> None:
    shutil.copyfile(ash.__file__, tmp_path / "ash")
    argv = [sys.executable, "-I", str(tmp_path / "ash"), "help", "--format", "man"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (ash.MISSING, "")
    assert "this ash has no help in the format man" in ended.stderr


def bash(line: str, path: str = os.defpath) -> set[str]:
    """The completions of bash for the last word of a line."""
    words = line.split(" ")
    script = f'{help.bash_completion()}\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ash; printf \'%s\\n\' "${{COMPREPLY[@]}}"'
    return set(output("bash", "-euc", script, "bash", *words, path=path).split())


def test_bash_completes_commands_and_options() -> None:
    assert bash("ash ") == WORDS | {flag for option in GLOBAL_OPTIONS for flag in option.flags}
    assert bash("ash clone-") == {"clone-tree", "clone-branch", "clone-under"}
    assert bash("ash --image x.img --json tre") == {word for word in WORDS if word.startswith("tre")}
    assert bash("ash help upse") == {"upself"}
    assert "--download-only" in bash("ash upme --")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_bash_completes_the_options_of_each_command(command: ash.Command, fake_ash: str) -> None:
    own = {flag for option in command.all_options() for flag in option.flags}
    for word in (command.name, *command.aliases):
        assert own <= bash(f"ash {word} -", fake_ash)


def test_bash_completes_snapshot_numbers(fake_ash: str) -> None:
    assert bash("ash deploy ", fake_ash) == {"0", "7", "12"}
    assert bash("ash deploy 1", fake_ash) == {"12"}
    assert "7" not in bash("ash status ", fake_ash)


def test_bash_falls_back_to_file_names() -> None:
    assert bash("ash --image ") == set()
    assert "complete -o default -F _ash ash" in help.bash_completion()


ZSH = """
_describe() { local entry; for entry in ${(P)3}; do print -r -- ${entry%%:*}; done }
compadd() { shift; (( $# )) && print -rl -- "$@"; true }
_files() { true }
words=("$@"); CURRENT=$#
"""


def zsh(line: str, path: str) -> set[str]:
    """The completions of zsh, collected by stubs of its functions."""
    script = f"{ZSH}\n_ash() {{\n{help.zsh_completion()}\n}}\n_ash"
    return set(output("zsh", "-fc", script, "zsh", *line.split(" "), path=path).split())


@needs("zsh")
def test_zsh_completes(fake_ash: str) -> None:
    assert zsh("ash ", fake_ash) == WORDS | {flag for option in GLOBAL_OPTIONS for flag in option.flags}
    assert {"0", "7", "12", "--secondary"} <= zsh("ash -v dep ", fake_ash)
    assert "7" not in zsh("ash status ", fake_ash)
    for command in COMMANDS:
        own = {flag for option in command.all_options() for flag in option.flags}
        assert own <= zsh(f"ash --image x {command.name} ", fake_ash)


def fish(line: str, path: str) -> set[str]:
    """The completions of fish for the end of a line."""
    script = f"{help.fish_completion()}\ncomplete -C $argv[1]"
    offered = output("fish", "--no-config", "-c", script, line, path=path)
    return {entry.split("\t")[0] for entry in offered.splitlines()}


@needs("fish")
def test_fish_completes(fake_ash: str) -> None:
    assert fish("ash ", fake_ash) >= WORDS
    assert {"0", "7", "12"} <= fish("ash dep ", fake_ash)
    assert "7" not in fish("ash status ", fake_ash)
    for command in COMMANDS:
        own = {flag for option in command.all_options() for flag in option.flags}
        assert own <= fish(f"ash {command.name} -", fake_ash) | fish(f"ash {command.name} --", fake_ash)


# The installer


def test_the_installer_puts_help_where_programs_look(tmp_path: Path) -> None:
    layout, root = ash.Layout(tmp_path, "debian"), tmp_path / "root"
    layout.ash.mkdir()
    install._install_help(layout, root, DebianInstaller.zsh_completions)
    assert {path.name: path.read_text() for path in layout.help.iterdir()} == {
        kind: f"{render()}\n" for kind, render in FORMATS.items()
    }
    made = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
    assert made == {
        "usr/share/man/man8/ash.8": f"{help.manual()}\n",
        "usr/share/bash-completion/completions/ash": f"{help.bash_completion()}\n",
        "usr/share/fish/vendor_completions.d/ash.fish": f"{help.fish_completion()}\n",
        "usr/share/zsh/vendor-completions/_ash": f"{help.zsh_completion()}\n",
    }


@needs("gpg")
def test_the_installer_takes_only_a_keyring_that_gpgv_reads(tmp_path: Path) -> None:
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--batch", "--quiet", "--homedir", str(home)]
    output(*gpg, "--passphrase", "", "--quick-gen-key", "nobody@localhost", "ed25519", "sign", "never")
    keyring, armoured, secret, empty = (tmp_path / name for name in ("keyring", "armoured", "secret", "empty"))
    output(*gpg, "--output", keyring, "--export")
    output(*gpg, "--output", armoured, "--armor", "--export")
    output(*gpg, "--output", secret, "--export-secret-keys")
    output("gpgconf", "--homedir", home, "--kill", "gpg-agent")
    empty.touch()
    before = keyring.read_bytes()
    install._check_keyring(keyring)
    assert keyring.read_bytes() == before
    for path in (armoured, secret, empty, tmp_path / "missing", tmp_path, Path(__file__)):
        with pytest.raises(AshError) as caught:
            install._check_keyring(path)
        assert caught.value.status == USAGE
        assert str(path) in caught.value.message
