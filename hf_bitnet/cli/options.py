"""What the command line understands. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from typing import Any

PRESETS = ("bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8")
# names of config fields that options give as they are
_FIELDS = (
    *("weight", "weight_scale", "granularity", "group_size", "activation", "ste", "sub_norm", "keep", "min_coverage"),
    *("embeddings", "output_head"),
)


class UsageError(Exception):
    """The command line is wrong, in a way that only the command itself can tell."""


def build_parser(name: str, version: str) -> argparse.ArgumentParser:
    """The parser of all commands; `command` of its result is None where none was given."""
    parser = argparse.ArgumentParser(
        prog=name,
        description="BitNet for Hugging Face models: quantize, train, evaluate. `hf-bitnet COMMAND --help` has examples.",
    )
    parser.add_argument("--version", action="version", version=f"{name} {version}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (_add_quantize, _add_train, _add_eval, _add_info, _add_presets, _add_demo):
        add(commands)
    return parser


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
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


def _add_quantize(commands: Any) -> None:
    parser = _command(
        commands,
        "quantize",
        "Quantize a full-precision model without training, and save it.",
        "  hf-bitnet quantize org/model out --preset w4a8\n"
        "  hf-bitnet quantize ./model out --form train            # float weights, to be trained\n"
        "  hf-bitnet quantize ./model out --weight int4 --override 'down_proj=weight:int8' --keep 'layers\\.0\\.'\n"
        "  hf-bitnet quantize org/model out --preset w2a8 --fit gptq --fit-file train.txt\n"
        "  hf-bitnet quantize org/model --dry-run                 # what would be quantized; writes nothing",
    )
    _add_model(parser)
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder for the quantized model")
    parser.add_argument("--form", choices=("packed", "train"), default="packed", help="what to write (default: packed)")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights that are not packed: auto (the model's own), float32, ..."
    )
    parser.add_argument(
        "--fit", metavar="METHOD", help="fit the weights instead of rounding them: gptq (needs --fit-file) or least_squares"
    )
    parser.add_argument("--fit-file", nargs="+", metavar="FILE", help="UTF-8 text to fit on; for language models")
    parser.add_argument("--fit-windows", type=_positive, default=128, metavar="N", help="of 256 tokens (default: 128)")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be quantized, from the model's shapes")
    parser.add_argument("--force", action="store_true", help="replace a model in OUT")
    _add_quantization(parser)


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "Quantize a causal language model and train it back to quality: OUT/packed is the result, with OUT/results.json.",
        "  hf-bitnet train org/model out --train-file train.txt --validation-file valid.txt\n"
        "  hf-bitnet train ./model out --train-file a.txt b.txt --validation-file v.txt --preset w2a8 --bf16 \\\n"
        "      --learning-rate 2e-5 --batch-size 16 --max-train-tokens 100000000 --set gradient_accumulation_steps=4\n"
        "  hf-bitnet train org/model out --dataset Salesforce/wikitext --dataset-config wikitext-103-raw-v1\n"
        "  hf-bitnet train ./model out --train-file ... --validation-file ... --resume   # continue a run that was stopped\n\n"
        "On several GPUs: accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/qat_causal_lm.py --help",
    )
    _add_model(parser)
    parser.add_argument("out", metavar="OUT", help="folder of the run")
    text = parser.add_argument_group("text")
    text.add_argument("--train-file", nargs="+", metavar="FILE", help="UTF-8 text to train on")
    text.add_argument("--validation-file", nargs="+", metavar="FILE", help="UTF-8 text to measure on")
    text.add_argument("--dataset", metavar="NAME", help="dataset on the Hub, in place of files")
    text.add_argument("--dataset-config", metavar="NAME")
    text.add_argument("--train-split", default="train", metavar="NAME", help="(default: train)")
    text.add_argument("--validation-split", default="validation", metavar="NAME", help="(default: validation)")
    text.add_argument("--text-column", default="text", metavar="NAME", help="(default: text)")
    text.add_argument("--length", type=_positive, default=256, metavar="N", help="tokens in a window (default: 256)")
    text.add_argument("--max-validation-windows", type=_positive, metavar="N", help="measure on so many windows (default: all)")
    training = parser.add_argument_group("training")
    training.add_argument("--max-train-tokens", type=_positive, metavar="N", help="end the training after so many tokens")
    training.add_argument("--epochs", type=float, metavar="X", help="(default: 1)")
    training.add_argument("--learning-rate", type=float, metavar="X", help="(default: 1e-4, for pretrained models)")
    training.add_argument("--batch-size", type=_positive, metavar="N", help="windows a step and device (default: 8)")
    training.add_argument(
        "--training-preset",
        metavar="NAME",
        help="start from a published way to train, with its quantization and teacher; `hf-bitnet presets` lists them",
    )
    training.add_argument("--teacher", help="self (the full-precision model; the default), none, or another model")
    training.add_argument(
        "--fit", metavar="METHOD", help="start from fitted weights, without a quantization schedule: gptq or least_squares"
    )
    training.add_argument(
        "--drawn-share",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the text that the full-precision model writes (0..1)",
    )
    training.add_argument("--bf16", action="store_true", help="compute in bfloat16 (weights stay float32)")
    training.add_argument("--seed", type=int, metavar="N", help="(default: 42)")
    training.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any field of QATArguments or TrainingArguments; repeatable",
    )
    again = training.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUT")
    again.add_argument("--force", action="store_true", help="replace what an earlier run left in OUT")
    _add_quantization(parser)


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        "Perplexity of a causal language model, in full precision, train form or packed, on a text.",
        "  hf-bitnet eval out/packed --text valid.txt\n  hf-bitnet eval org/model --text valid.txt --length 1024 --bf16 --json",
    )
    _add_model(parser)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="UTF-8 text file(s)")
    parser.add_argument("--length", type=_positive, default=256, metavar="N", help="tokens in a window (default: 256)")
    parser.add_argument("--max-windows", type=_positive, metavar="N", help="measure on so many windows (default: all)")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="(default: 16)")
    parser.add_argument("--device", help="(default: the GPU where there is one)")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto (the model's own), float32, bfloat16, ...")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        "What of a model is quantized, and how; or about this installation.",
        "  hf-bitnet info out/packed\n  hf-bitnet info --kernels            # which body serves which operation here, and why",
    )
    _add_model(parser, optional=True)
    parser.add_argument("--kernels", action="store_true", help="show the kernels")
    parser.add_argument("--device", default="cpu", help="of the kernels: cpu or cuda (default: cpu)")


def _add_presets(commands: Any) -> None:
    parser = _command(
        commands,
        "presets",
        "Published ways to train, with their sources: all of them as a table, or one with everything and the code to use it.",
        "  hf-bitnet presets\n  hf-bitnet presets convert_b158\n  hf-bitnet presets --json",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="show all of this one")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "Train a small model, make it ternary, train it back, pack it; ends with a table and a page. No network needed.",
        "  hf-bitnet demo\n  hf-bitnet demo --quick --output demo-quick    # seconds; its figures mean nothing",
    )
    parser.add_argument("--output", default="demo-output", metavar="FOLDER", help="(default: demo-output)")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model, to see that everything works")


def _add_model(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help="folder, or name on the Hub")


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization", "see BitNetQuantizationConfig for what each field means")
    group.add_argument("--preset", choices=PRESETS, help="where to start from (default: ternary weights, as bitnet_b158)")
    group.add_argument("--weight", metavar="SCHEME", help="binary, ternary, int2, int2_seq, int4 or int8")
    group.add_argument("--weight-scale", metavar="RULE", help="absmean, absmax, threshold, least_squares or learned")
    group.add_argument("--granularity", metavar="WHAT", help="one scale per tensor, channel or group")
    group.add_argument("--group-size", type=_positive, metavar="N", help="inputs of a group")
    group.add_argument("--activation", metavar="SCHEME", help="int8, int4, sign, int8_asymmetric, int8_static or none")
    group.add_argument("--ste", metavar="NAME", help="gradient estimator: identity, clipped, tanh, sigmoid or learnable")
    group.add_argument("--sub-norm", action="append", metavar="REGEX", help="layers that get an RMS norm in front; repeatable")
    group.add_argument("--keep", action="append", metavar="REGEX", help="modules to leave in full precision; repeatable")
    group.add_argument(
        "--embeddings",
        type=_vocabulary,
        metavar="SCHEME",
        help="pack the token embeddings too, and a head tied to them: int8, int4, or 'weight:int4,group_size:32' (default: no)",
    )
    group.add_argument(
        "--output-head", type=_vocabulary, metavar="SCHEME", help="the same for an output head of its own (default: no)"
    )
    group.add_argument(
        "--override",
        action="append",
        type=_override,
        metavar="REGEX=CHANGE",
        help="layers that differ: 'k_proj=keep' or 'down_proj=weight:int4,granularity:channel'; first match wins; repeatable",
    )
    group.add_argument(
        "--min-coverage", type=float, metavar="X", help="fail when less of the linear weights would be quantized"
    )


def quantization_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config fields that were given, without the preset."""
    fields = {name: getattr(arguments, name) for name in _FIELDS if getattr(arguments, name) is not None}
    if arguments.override:
        fields["overrides"] = dict(arguments.override)
    return fields


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _override(text: str) -> tuple[str, str | dict[str, Any]]:
    """'regex=keep' or 'regex=field:value,field:value'; the regex may hold "=" itself."""
    pattern, found, change = text.rpartition("=")
    if not found or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=CHANGE; for example 'down_proj=weight:int4' or 'k_proj=keep'")
    if ":" not in change:
        return pattern, change
    return pattern, _pairs(change)


def _vocabulary(text: str) -> str | dict[str, Any]:
    """'scheme' or 'field:value,field:value'."""
    return _pairs(text) if ":" in text else text


def _pairs(text: str) -> dict[str, Any]:
    return {name: _value(value) for name, _, value in (part.partition(":") for part in text.split(","))}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
