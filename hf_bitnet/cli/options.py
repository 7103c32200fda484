"""What the parsers of several commands share, and the errors that carry an exit code. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

# exit code: what was read back is not what was written
DIFFERENT = 3
# for the shell's completion; the command itself asks the registry
FORMATS = ("hf_bitnet", "bitnet", "dense", "gguf", "i2_s", "onnx", "mlx")
GGUF_TOO = "folder, GGUF file, or name on the Hub (org/name, org/name/file.gguf)"
PRESETS = ("bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8")
# names of config fields that options give as they are
_FIELDS = (
    *("weight", "weight_scale", "granularity", "group_size", "activation", "ste", "sub_norm", "keep", "min_coverage"),
    *("embeddings", "output_head"),
)


class UsageError(Exception):
    """The command line is wrong, in a way that only the command itself can tell."""


class Failed(Exception):
    """A command that went to its end, and failed; with --json its result is printed all the same.

    Attributes:
        code: the exit code. result: plain data.
    """

    def __init__(self, message: str, code: int, result: Any) -> None:
        super().__init__(message)
        self.code, self.result = code, result


def command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Adds the parser of one command, with what every command has."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=name)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_model(parser: argparse.ArgumentParser, optional: bool = False, what: str = "folder, or name on the Hub") -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=what)


def add_placement(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Where a model is put, and in which dtype."""
    parser.add_argument("--device", help="(default: the GPU where there is one)")
    parser.add_argument(
        "--dtype", default=dtype, help=f"of the weights: auto (the model's own), float32, bfloat16, ... (default: {dtype})"
    )


def add_gguf_activation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activation",
        metavar="SCHEME",
        help="of a GGUF file that does not say how inputs are quantized: int8 is fast, none leaves them (default: the file's)",
    )


def add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization", "see BitNetQuantizationConfig for what each field means")
    group.add_argument("--preset", choices=PRESETS, help="where to start from (default: ternary weights, as bitnet_b158)")
    group.add_argument("--weight", metavar="SCHEME", help="binary, ternary, int2, int2_seq, int4 or int8")
    group.add_argument("--weight-scale", metavar="RULE", help="absmean, absmax, threshold, least_squares or learned")
    group.add_argument("--granularity", metavar="WHAT", help="one scale per tensor, channel or group")
    group.add_argument("--group-size", type=positive, metavar="N", help="inputs of a group")
    group.add_argument("--activation", metavar="SCHEME", help="int8, int4, sign, int8_asymmetric, int8_static or none")
    group.add_argument("--ste", metavar="NAME", help="gradient estimator: identity, clipped, tanh, sigmoid or learnable")
    group.add_argument("--sub-norm", action="append", metavar="REGEX", help="layers that get an RMS norm in front; repeatable")
    group.add_argument("--keep", action="append", metavar="REGEX", help="modules to leave in full precision; repeatable")
    group.add_argument(
        "--embeddings",
        type=vocabulary,
        metavar="SCHEME",
        help="pack the token embeddings too, and a head tied to them: int8, int4, or 'weight:int4,group_size:32' (default: no)",
    )
    group.add_argument(
        "--output-head", type=vocabulary, metavar="SCHEME", help="the same for an output head of its own (default: no)"
    )
    group.add_argument(
        "--override",
        action="append",
        type=_override,
        metavar="REGEX=CHANGE",
        help="layers that differ: 'k_proj=keep' or 'down_proj=weight:int4,granularity:channel'; first match wins; repeatable",
    )
    group.add_argument(
        "--min-coverage", type=between(0, 1), metavar="X", help="fail when less of the linear weights would be quantized"
    )


def quantization_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config fields that were given, without the preset."""
    fields = {name: getattr(arguments, name) for name in _FIELDS if getattr(arguments, name) is not None}
    if arguments.override:
        fields["overrides"] = dict(arguments.override)
    return fields


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed(text: str) -> int:
    """What numpy and torch both take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be 0 to {2**32 - 1}, got {value}")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def between(low: float, high: float) -> Callable[[str], float]:
    """Reads a number from `low` to `high`, both legal."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # a NaN is not between
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, got {text}")
        return value

    return number


def _override(text: str) -> tuple[str, str | dict[str, Any]]:
    """'regex=keep' or 'regex=field:value,field:value'; the regex may hold "=" itself."""
    pattern, found, change = text.rpartition("=")
    if not found or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=CHANGE; for example 'down_proj=weight:int4' or 'k_proj=keep'")
    if ":" not in change:
        return pattern, change
    return pattern, _pairs(change)


def vocabulary(text: str) -> str | dict[str, Any]:
    """'scheme' or 'field:value,field:value'."""
    return _pairs(text) if ":" in text else text


def _pairs(text: str) -> dict[str, Any]:
    return {name: value_of(value) for name, _, value in (part.partition(":") for part in text.split(","))}


def value_of(text: str) -> Any:
    """JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
