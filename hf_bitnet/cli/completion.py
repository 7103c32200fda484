"""`hf-bitnet completion`: what a shell needs to complete the command, made from the parser itself. Own.

Commands, options, and values where they are a choice; everything else is completed as a file, which folders, texts and models
are. The script holds these words: it is printed again after an update, and runs nothing when a key is pressed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .options import FORMATS
from .parsers import build_parser

_NAME = "hf-bitnet"
_FUNCTION = "_hf_bitnet"
# options whose legal values only a heavy import knows
_SUGGESTED = {"--format": FORMATS}
_FILES = {"FILE", "FOLDER", "MODEL", "OUT"}


def run(arguments: argparse.Namespace) -> dict[str, str]:
    script = _SHELLS[arguments.shell](_commands(build_parser(_NAME, __version__)))
    if not arguments.json:
        print(script)
    return {"shell": arguments.shell, "script": script}


@dataclass(frozen=True)
class _Option:
    """flags: as they are typed. values: to choose from; empty where there is no choice. takes: a value. files: as value."""

    flags: tuple[str, ...]
    help: str
    values: tuple[str, ...]
    takes: bool
    files: bool


@dataclass(frozen=True)
class _Command:
    name: str
    help: str
    options: tuple[_Option, ...]
    words: tuple[str, ...]  # of its arguments, where they are a choice


def _commands(parser: argparse.ArgumentParser) -> list[_Command]:
    # argparse has no public way to ask for what it was given
    choices: Any = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in choices._choices_actions}
    return [_command(name, helps[name], each) for name, each in choices.choices.items()]


def _command(name: str, help: str, parser: argparse.ArgumentParser) -> _Command:
    options, words = [], []
    for action in parser._actions:
        values = tuple(map(str, action.choices or _SUGGESTED.get((action.option_strings or [""])[-1], ())))
        if action.option_strings:
            about = "" if action.help is None or action.help == argparse.SUPPRESS else action.help.replace("%%", "%")
            options.append(_Option(tuple(action.option_strings), about, values, action.nargs != 0, action.metavar in _FILES))
        else:
            words += values
    return _Command(name, help, tuple(options), tuple(words))


# ---- shells ----


def _bash(commands: Sequence[_Command]) -> str:
    names = " ".join(command.name for command in commands)
    lines = [
        f"{_FUNCTION}() {{",
        '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        "    COMPREPLY=()",
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        COMPREPLY=($(compgen -W "{names} --help --version" -- "$current"))',
        "        return",
        "    fi",
        '    case "${COMP_WORDS[1]} $previous" in',
    ]
    for command in commands:
        for option in command.options:
            if option.takes:
                pattern = "|".join(f'"{command.name} {flag}"' for flag in option.flags)
                lines.append(f'        {pattern}) words="{" ".join(option.values)}" ;;')
    lines += ["        *)", '            case "${COMP_WORDS[1]}" in']
    for command in commands:
        flags = " ".join(flag for option in command.options for flag in option.flags)
        lines.append(f'                {command.name}) words="{" ".join(command.words)}"')
        lines.append(f'                    case "$current" in -*) words="{flags}" ;; esac ;;')
    lines += [
        "            esac ;;",
        "    esac",
        # nothing to offer leaves it to the shell, which completes files
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        f"complete -o default -F {_FUNCTION} {_NAME}",
    ]
    return "\n".join(lines)


def _zsh(commands: Sequence[_Command]) -> str:
    lines = [
        f"#compdef {_NAME}",
        f"{_FUNCTION}() {{",
        "    local curcontext=$curcontext state line",
        "    typeset -A opt_args",
        "    _arguments -C '(- *)--help[show the help]' '(- *)--version[show the version]' \\",
        "        '1:command:->command' '*::argument:->rest'",
        "    case $state in",
        "        command)",
        "            local -a commands=(",
        *(f"                {shlex.quote(_colons(command.name) + ':' + _colons(command.help))}" for command in commands),
        "            )",
        "            _describe -t commands command commands ;;",
        "        rest)",
        "            case $line[1] in",
    ]
    for command in commands:
        rest = f"*:value:({' '.join(command.words)})" if command.words else "*:file:_files"
        specs = [*(_zsh_option(option) for option in command.options), rest]
        lines += [f"                {command.name}) _arguments {' '.join(map(shlex.quote, specs))} ;;"]
    lines += [
        "            esac ;;",
        "    esac",
        "}",
        f'if [ "$funcstack[1]" = "{_FUNCTION}" ]; then {_FUNCTION} "$@"; else compdef {_FUNCTION} {_NAME}; fi',
    ]
    return "\n".join(lines)


def _zsh_option(option: _Option) -> str:
    about = _colons(option.help).replace("[", "\\[").replace("]", "\\]")
    values = f"({' '.join(option.values)})" if option.values else "_files" if option.files else " "
    return f"*{option.flags[-1]}[{about}]" + (f":value:{values}" if option.takes else "")


def _colons(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:")


def _fish(commands: Sequence[_Command]) -> str:
    lines = [f"complete -c {_NAME} -n __fish_use_subcommand -x -a {each.name} -d {_fished(each.help)}" for each in commands]
    for command in commands:
        start = f"complete -c {_NAME} -n '__fish_seen_subcommand_from {command.name}'"
        if command.words:
            lines.append(f"{start} -x -a {_fished(' '.join(command.words))}")
        for option in command.options:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            value = f" -x -a {_fished(' '.join(option.values))}" if option.values else " -r -F" if option.files else " -x"
            lines.append(f"{start} {flags}{value if option.takes else ''} -d {_fished(option.help)}")
    return "\n".join(lines)


def _fished(text: str) -> str:
    """In fish a backslash and a quote are escaped inside single quotes, too."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS: dict[str, Callable[[Sequence[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
