"""`hf-bitnet info`: what of a model is quantized, and how; what an export or a GGUF file holds; or about this installation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .. import BitNetQuantizationConfig, coverage, kernels, open_model
from ..export import Check, ExportReport, WrittenTensor
from ..hub import library_versions
from .common import quietly, say, summary
from .gguf_shown import read_gguf_header

_REPORT = "export.json"


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"versions": library_versions()}
    if arguments.model is not None:
        result |= {"model": arguments.model, **_about(arguments, Path(arguments.model))}
    if arguments.kernels:
        say(arguments, kernels.explain(arguments.device))
        result["kernels"] = kernels.explain(arguments.device).splitlines()
    if arguments.model is None:
        packages = "  ".join(f"{name} {version}" for name, version in result["versions"].items())
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        say(arguments, packages, f"threads {torch.get_num_threads()}  GPU {gpu}")
    return result


def _about(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    if path.is_file():
        return _gguf(arguments, [path])
    result: dict[str, Any] = {}
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if (path / _REPORT).is_file():
        report = _report(path / _REPORT)
        say(arguments, report, *([] if report.checks else ["parity: was not checked"]))
        result["export"] = report.to_dict()
    if files:
        result |= _gguf(arguments, files)
    # an export that is no checkpoint of transformers' has been told about already
    if not result or _is_quantized_checkpoint(path):
        result |= _model(arguments)
    return result


def _gguf(arguments: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    headers = [read_gguf_header(file) for file in files]
    say(arguments, *headers)
    return {"gguf": [header.to_dict() for header in headers]}


def _report(path: Path) -> ExportReport:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("bytes", None)  # the sum of `files`
        tensors = [WrittenTensor(**{**each, "shape": tuple(each["shape"])}) for each in values.pop("tensors")]
        checks = [Check(**each) for each in values.pop("checks")]
        # where it lies now, which need not be where it was written
        report = ExportReport(**{**values, "path": str(path.parent)}, tensors=tensors, checks=checks)
        str(report)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not what export_model writes: {type(error).__name__}: {error}") from error
    return report


def _is_quantized_checkpoint(path: Path) -> bool:
    """Whether transformers' config.json of the folder names a way of quantization."""
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(settings, dict) and "quant_method" in settings


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    # only the headers of the files are read
    model = open_model(arguments.model, device_map="meta")
    result: dict[str, Any] = {}
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, BitNetQuantizationConfig):
        form = "in train form" if config.form == "train" else config.form
        settings = BitNetQuantizationConfig(**{**config.fields(), "quantized_modules": None})
        say(arguments, f"{type(model).__name__}, {form}: {settings!r}")
        result |= {"form": config.form, "config": summary(config)}
    else:
        say(arguments, f"{type(model).__name__}, not quantized by hf_bitnet")
    say(arguments, coverage(model))
    return result | {"class": type(model).__name__, "coverage": coverage(model).to_dict()}
