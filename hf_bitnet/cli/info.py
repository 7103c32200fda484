"""`hf-bitnet info`: what of a model is quantized, and how; or about this installation."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import BitNetQuantizationConfig, coverage, kernels, open_model
from ..hub import library_versions
from .common import quietly, say, summary


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"versions": library_versions()}
    if arguments.model is not None:
        # only the headers of the files are read
        model = open_model(arguments.model, device_map="meta")
        config = getattr(model.config, "quantization_config", None)
        if isinstance(config, BitNetQuantizationConfig):
            form = "in train form" if config.form == "train" else config.form
            settings = BitNetQuantizationConfig(**{**config.fields(), "quantized_modules": None})
            say(arguments, f"{type(model).__name__}, {form}: {settings!r}")
            result |= {"form": config.form, "config": summary(config)}
        else:
            say(arguments, f"{type(model).__name__}, not quantized by hf_bitnet")
        say(arguments, coverage(model))
        result |= {"model": arguments.model, "class": type(model).__name__, "coverage": coverage(model).to_dict()}
    if arguments.kernels:
        say(arguments, kernels.explain(arguments.device))
        result["kernels"] = kernels.explain(arguments.device).splitlines()
    if arguments.model is None:
        packages = "  ".join(f"{name} {version}" for name, version in result["versions"].items())
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        say(arguments, packages, f"threads {torch.get_num_threads()}  GPU {gpu}")
    return result
