"""What the command line understands: one function a command, which adds its parser. Imports nothing heavy."""

from __future__ import annotations

import argparse

from .looking import add_completion, add_info, add_presets
from .making import add_demo, add_export, add_push, add_quantize, add_train
from .using import add_analyze, add_bench, add_chat, add_eval

__all__ = ["build_parser"]

# in the order of the help
_COMMANDS = (
    *(add_quantize, add_train, add_eval, add_analyze, add_export, add_push),
    *(add_info, add_chat, add_bench, add_presets, add_demo, add_completion),
)
_EXIT_CODES = """exit codes:
  0  done
  1  it failed; the reason is on the standard error
  2  the command line is wrong
  3  an export was read back and is not the model that was written"""


def build_parser(name: str, version: str) -> argparse.ArgumentParser:
    """The parser of all commands; `command` of its result is None where none was given."""
    parser = argparse.ArgumentParser(
        prog=name,
        description="BitNet for Hugging Face models: quantize, train, evaluate, export, talk to them.\n"
        f"`{name} COMMAND --help` has examples.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{name} {version}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser
