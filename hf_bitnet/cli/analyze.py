"""`hf-bitnet analyze`: which layers quantization hurts, worst first, and what to override. Tables, and a page or data.

Of the weights alone without text; with text also of each layer's output, and of the loss with that layer alone quantized.
Leaves out: packed models' errors, for which there are no float weights any more.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from .. import (
    BitNetQuantizationConfig,
    calibrate,
    layer_report,
    open_model,
    output_report,
    quantize_model,
    sensitivity,
    suggest_overrides,
    text_windows,
)
from ..analysis import LayerReport, Report
from ..files import write_text
from ..publish.opening import tokenizer_at
from ..reports import report_page
from ..surgery import quantized_layers
from .common import config_from, device_of, dtype_of, keep_memory, progress, quietly, say, summary, texts
from .options import UsageError, quantization_fields

_LENGTH = 256
_SUFFIXES = (".html", ".json", ".svg")
Reports = dict[str, Report[Any]]


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    _check(arguments)
    model = open_model(arguments.model, dtype=dtype_of(arguments.dtype)).to(device_of(arguments.device))
    keep_memory(arguments)
    packed = _prepared(arguments, model)
    batches = None if arguments.text is None else _batches(arguments, model)
    reports = _reports(arguments, model, batches)
    for report in reports.values():
        say(arguments, report.title, _worst_lines(report, arguments.top), "")
    overrides: dict[str, Any] = {}
    advice = _what_is_missing(arguments.model)
    if not packed:
        # the last report is the best guide there is
        guide = list(reports.values())[-1]
        overrides = suggest_overrides(guide, arguments.worst, to=arguments.to, max_average_bits=arguments.max_average_bits)
        advice = _advice(overrides, guide)
    say(arguments, advice)
    result = {
        "model": arguments.model,
        "config": summary(model.config.quantization_config),
        "reports": {name: report.to_dict() for name, report in reports.items()},
        "overrides": overrides,
    }
    if arguments.out is not None:
        _write(Path(arguments.out), reports, result, advice)
        say(arguments, f"wrote {arguments.out}")
    return result


def _check(arguments: argparse.Namespace) -> None:
    """What can be said before a model is read."""
    if arguments.out is not None:
        out = Path(arguments.out)
        if out.suffix not in _SUFFIXES:
            raise UsageError(f"--out {arguments.out}: end it on .html (page), .svg (chart) or .json (data)")
        if out.exists() and not arguments.force:
            raise ValueError(f"{arguments.out!r} is there already; choose another name, or replace it: --force")
    try:
        BitNetQuantizationConfig(overrides={".": {"weight": arguments.to} if _is_scheme(arguments.to) else arguments.to})
    except (ValueError, TypeError) as error:
        what = str(error).removeprefix("overrides['.']: ")
        raise UsageError(f"--to: {what}") from error


def _is_scheme(to: Any) -> bool:
    return isinstance(to, str) and to != "keep"


def _prepared(arguments: argparse.Namespace, model: Any) -> bool:
    """Quantizes a full-precision model in train form; whether the model is packed."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitNetQuantizationConfig):
        quantize_model(model, config_from(arguments, "train"))
        return False
    given = [*quantization_fields(arguments), *(["preset"] if arguments.preset else [])]
    if given:
        raise UsageError(
            f"{arguments.model!r} is quantized already, so {', '.join(given)} cannot be set; give the full-precision model"
        )
    packed = config.form == "packed"
    if packed and arguments.text is not None:
        raise ValueError(_what_is_missing(arguments.model))
    return packed


def _what_is_missing(name: str) -> str:
    return (
        f"{name!r} is packed and has no float weights to compare with: scales and shares of zeros are all there is to report. "
        "Give the full-precision model (with the same --preset and options), or the checkpoint in train form"
    )


def _batches(arguments: argparse.Namespace, model: Any) -> list[dict[str, torch.Tensor]]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LENGTH
    length = arguments.length or min(_LENGTH, positions)
    windows = text_windows(tokenizer_at(arguments.model), texts(arguments.text), length, max_windows=arguments.max_windows)
    batches = [{"input_ids": part} for part in windows.split(arguments.batch_size)]
    # a saved model has its ranges; one that was quantized just now may need them
    if any(layer.act_scale is not None and float(layer.act_scale) <= 0 for _, layer in quantized_layers(model)):
        calibrate(model, batches, progress=progress())
    return batches


def _reports(arguments: argparse.Namespace, model: Any, batches: list[dict[str, torch.Tensor]] | None) -> Reports:
    """The better a report tells what to override, the later it comes."""
    weights = layer_report(model)
    reports: Reports = {"weights": LayerReport(weights.worst(), weights.total_sqnr) if weights.worst() else weights}
    if batches is not None:
        reports["outputs"] = output_report(model, batches, progress=progress())
        if not arguments.skip_loss:
            reports["loss"] = sensitivity(model, batches, progress=progress())
    return reports


def _worst_lines(report: Report[Any], top: int) -> str:
    heading, *lines = str(report).splitlines()
    rows, rest = lines[: len(report)], lines[len(report) :]
    more = [f"and {len(rows) - top} more (--top N)"] if len(rows) > top else []
    return "\n".join([heading, *rows[:top], *more, *rest])


def _advice(overrides: dict[str, Any], guide: Report[Any]) -> str:
    if not overrides:
        return "no layer is worth an override"
    words = [f"--override {shlex.quote(f'{pattern}={_change(change)}')}" for pattern, change in overrides.items()]
    return "\n".join([f"suggested by {guide.title[0].lower()}{guide.title[1:]}, for quantize and train:", *words])


def _change(change: str | dict[str, Any]) -> str:
    """As `--override` reads it."""
    if isinstance(change, str):
        return change
    return ",".join(f"{name}:{value if isinstance(value, str) else json.dumps(value)}" for name, value in change.items())


def _write(out: Path, reports: Reports, result: dict[str, Any], advice: str) -> None:
    guide = list(reports.values())[-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".svg":
        if not guide.worst():
            raise ValueError(advice)
        write_text(out, guide.to_svg())
    elif out.suffix == ".json":
        write_text(out, json.dumps(result, indent=1) + "\n")
    else:
        config = json.dumps(result["config"], indent=1)
        notes = [("Quantization", config), ("Overrides", advice)]
        page = report_page(f"Analysis of {Path(result['model']).name}", list(reversed(reports.values())), notes)
        write_text(out, page)
