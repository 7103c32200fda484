"""Floor 7: the command `hf-bitnet`. Quantize, train, evaluate, export and look at models without writing Python.

Results go to the standard output (with --json as one JSON object), progress and errors to the standard error. Exit codes:
0 done, 1 it failed, 2 the command line is wrong, 3 an export is not the model that was written. Each command is the file of
its name, imported when it is called; this file, `options.py` and `parsers/` import nothing heavy: --help is there at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from .options import Failed, UsageError
from .parsers import build_parser

__all__ = ["main"]

_NAME = "hf-bitnet"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` is without the program's name. Returns the exit code."""
    parser = build_parser(_NAME, __version__)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit:  # argparse has said what is wrong, or shown the help
        return exit.code if isinstance(exit.code, int) else 2
    if arguments.command is None:
        parser.print_help()
        return 2
    arguments.own_process = argv is None  # else somebody else's, whose settings are not ours
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        # most commands import torch and transformers
        result = importlib.import_module(f".{arguments.command}", __name__).run(arguments)
        _print_json(arguments, result)
    except Failed as error:
        _print_json(arguments, error.result)
        return _failed(arguments, error, error.code)
    except UsageError as error:
        return _failed(arguments, error, 2)
    except KeyboardInterrupt as error:
        return _failed(arguments, error, 1)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        return 1
    except Exception as error:
        return _failed(arguments, error, 1)
    return 0


def _print_json(arguments: argparse.Namespace, result: Any) -> None:
    if arguments.json:
        print(json.dumps(_plain(result), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _failed(arguments: argparse.Namespace, error: BaseException, code: int) -> int:
    if arguments.debug:
        import traceback

        traceback.print_exception(error)
    else:
        print(f"{_NAME} {arguments.command}: error: {_one_line(error)}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2"):  # of huggingface_hub, by its release
        return f"the Hub cannot be reached ({text or type(error).__name__}); check the network, a proxy or HF_ENDPOINT"
    # errors made for users explain themselves; of others the kind is half of the message
    known = type(error) in (ValueError, TypeError, RuntimeError, UsageError, Failed) or isinstance(error, OSError)
    known = known or (isinstance(error, ImportError) and "pip install" in text)
    if known and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
