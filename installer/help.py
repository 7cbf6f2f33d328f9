# SPDX-License-Identifier: AGPL-3.0-or-later
"""The command reference in other formats, made from ash's command table: man page, completions, README table."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence

from ash import (
    ASH_VERSION,
    COMMANDS,
    FAILED,
    GLOBAL_OPTIONS,
    GROUPS,
    LOCKED,
    MISSING,
    OUR_FAILURE_IN_RUN,
    REFUSED,
    USAGE,
    Command,
    Option,
    commands_of,
)


def markdown_table() -> str:
    """The command reference of the README."""
    lines = ["| command | aliases | does |", "| --- | --- | --- |"]
    for c in (command for group in GROUPS for command in commands_of(group)):
        aliases = " ".join(f"`{alias}`" for alias in c.aliases)
        lines += [f"| `{c.usage}` | {aliases} | {c.help} |"]
    return "\n".join(lines)


EXIT_STATUSES = {
    0: "done",
    FAILED: "failed; nothing was changed, unless the message says otherwise",
    USAGE: "the command line or a configuration file is wrong",
    MISSING: "there is no such snapshot or package",
    LOCKED: "another ash is working on it; --wait SECONDS waits",
    REFUSED: "refused: the base, a running or deployed snapshot, not root, inside a chroot, not enough space",
    OUR_FAILURE_IN_RUN: "ash itself failed in run or a shell, which otherwise exit with the program's status",
}
FILES = {
    "/.snapshots/rootfs/snapshot-N": "snapshot N",
    "/.snapshots/ash/history": "the history; ash log shows it",
    "/.snapshots/ash/keyring.gpg": "the keys that may sign a newer ash",
    "/etc/ash.conf": "configuration: KEY::VALUE lines",
    "/var/lib/ash/conflicts": "conflicts of merges into /var and /etc",
}
MANUAL_HEAD = rf"""
.TH ASH 8 "" "ash {ASH_VERSION}" "System Administration"
.SH NAME
ash \- keeps the system as a tree of read\-only btrfs snapshots
.SH SYNOPSIS
.B ash
[\fIOPTIONS\fR] \fICOMMAND\fR [\fISNAPSHOT\fR] ...
.SH DESCRIPTION
Changes are made in a private copy of a snapshot, with the distribution\(aqs own package manager.
A change takes effect completely or not at all.
Without SNAPSHOT, a command works on the booted one.
.SH COMMANDS""".removeprefix("\n")


def roff(text: str) -> str:
    """Escape text for a man page."""
    for character, name in (("\\", "e"), ("-", "-"), ("'", "(aq"), ("`", "(ga")):
        text = text.replace(character, f"\\{name}")
    return text


def manual_entry(term: str, text: str) -> list[str]:
    """A term and its explanation in a man page."""
    return [".TP", rf"\fB{roff(term)}\fR", rf"\&{roff(text)}"]


def manual() -> str:
    """The man page, ash(8)."""
    lines = [MANUAL_HEAD]
    for group in GROUPS:
        lines.append(f".SS {roff(group)}")
        for c in commands_of(group):
            also = f" (also {', '.join(c.aliases)})" if c.aliases else ""
            lines += [*manual_entry(c.usage, c.help + also), ".RS"]
            lines += [line for option in c.all_options() for line in manual_entry(option.usage(), option.help)]
            lines.append(".RE")
    options = {option.usage(): option.help for option in GLOBAL_OPTIONS}
    statuses = {str(status): meaning for status, meaning in EXIT_STATUSES.items()}
    for title, entries in (("OPTIONS", options), ('"EXIT STATUS"', statuses), ("FILES", FILES)):
        lines += [f".SH {title}", *(line for term, text in entries.items() for line in manual_entry(term, text))]
    return "\n".join([*lines, '.SH "SEE ALSO"', ".BR btrfs (8)"])


# Shared by the completions: how to list snapshot numbers, and the options to skip before the command.
LIST_NUMBERS = """ash --json tree 2>/dev/null | grep -o '"snapshot": [0-9]*' | grep -o '[0-9]*$'"""
WITH_VALUE = "|".join(flag for option in GLOBAL_OPTIONS if option.value for flag in option.flags)


def command_words(command: Command) -> list[str]:
    """The name and aliases of a command."""
    return [command.name, *command.aliases]


def all_flags(options: Iterable[Option]) -> list[str]:
    """All spellings of options."""
    return [flag for option in options for flag in option.flags]


def bash_completion() -> str:
    """The completion for bash, which completes file names if nothing else matches."""
    first = [word for command in COMMANDS for word in command_words(command)]
    cases = [f"        '') words='{' '.join([*first, *all_flags(GLOBAL_OPTIONS)])}' ;;"]
    for command in COMMANDS:
        found = [*all_flags((*command.all_options(), *GLOBAL_OPTIONS)), *(first if command.name == "help" else ())]
        numbers = " numbers=yes" if command.numbers else ""
        cases.append(f"        {'|'.join(command_words(command))}) words='{' '.join(found)}'{numbers} ;;")
    return "\n".join(
        [
            "# Made by `ash help --format bash`.",
            "_ash() {",
            "    local word=${COMP_WORDS[COMP_CWORD]} command= words= numbers= i",
            "    COMPREPLY=()",
            f"    case ${{COMP_WORDS[COMP_CWORD - 1]}} in {WITH_VALUE}) return ;; esac",
            "    for ((i = 1; i < COMP_CWORD; i++)); do",
            "        case ${COMP_WORDS[i]} in",
            f"        {WITH_VALUE}) ((i++)) ;;",
            "        -*) ;;",
            "        *) command=${COMP_WORDS[i]}; break ;;",
            "        esac",
            "    done",
            "    case $command in",
            *cases,
            "    esac",
            "    if [[ $numbers && $word != -* ]]; then",
            f"        words=$({LIST_NUMBERS})",
            "    fi",
            '    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")',
            "}",
            "complete -o default -F _ash ash",
        ]
    )


def zsh_completion() -> str:
    """The completion for zsh, with explanations."""

    def entries(named: Iterable[tuple[Sequence[str], str]]) -> str:
        """Words with explanations, in the format of _describe."""
        pairs = [(word.replace(":", r"\:"), text) for words, text in named for word in words]
        return " ".join(shlex.quote(f"{word}:{text}") for word, text in pairs)

    first = [(command_words(command), command.help) for command in COMMANDS]
    cases = [f"    '') found=({entries([*first, *((o.flags, o.help) for o in GLOBAL_OPTIONS)])}) ;;"]
    for command in COMMANDS:
        options = [(option.flags, option.help) for option in (*command.all_options(), *GLOBAL_OPTIONS)]
        found = entries([*options, *(first if command.name == "help" else ())])
        numbers = f' numbers=(${{(f)"$({LIST_NUMBERS})"}})' if command.numbers else ""
        cases.append(f"    {'|'.join(command_words(command))}) found=({found}){numbers} ;;")
    return "\n".join(
        [
            "#compdef ash",
            "# Made by `ash help --format zsh`.",
            "local command= i",
            "local -a found numbers",
            "for ((i = 2; i < CURRENT; i++)); do",
            "    case $words[i] in",
            f"    {WITH_VALUE}) ((i++)) ;;",
            "    -*) ;;",
            "    *) command=$words[i]; break ;;",
            "    esac",
            "done",
            "case $command in",
            *cases,
            "esac",
            "compadd -- $numbers",
            "_describe -o ash found",
            "_files",
        ]
    )


def fish_option(option: Option) -> str:
    """An option for fish's `complete`: -s for `-x`, -o for `-xy`, -l for `--xy`."""
    kinds = [
        ("-l", flag[2:]) if flag.startswith("--") else ("-s" if len(flag) == 2 else "-o", flag[1:])
        for flag in option.flags
    ]
    value = " -r" if option.value else ""
    return f"{' '.join(word for kind in kinds for word in kind)}{value} -d {shlex.quote(option.help)}"


def fish_completion() -> str:
    """The completion for fish, with explanations."""
    lines = ["# Made by `ash help --format fish`.", "function __ash_snapshots", f"    {LIST_NUMBERS}", "end"]
    first = "complete -c ash -n __fish_use_subcommand -f"
    for command in COMMANDS:
        words = command_words(command)
        lines += [f"{first} -a {word} -d {shlex.quote(command.help)}" for word in words]
        here = f"complete -c ash -n '__fish_seen_subcommand_from {' '.join(words)}'"
        lines += [f"{here} {fish_option(option)}" for option in command.all_options()]
        lines += [f"{here} -k -a '(__ash_snapshots)'"] if command.numbers else []
    return "\n".join([*lines, *(f"complete -c ash {fish_option(option)}" for option in GLOBAL_OPTIONS)])


FORMATS: Mapping[str, Callable[[], str]] = {
    "markdown": markdown_table,
    "man": manual,
    "bash": bash_completion,
    "zsh": zsh_completion,
    "fish": fish_completion,
}
