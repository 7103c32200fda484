"""`hf-bitnet quantize`: a full-precision model quantized without training."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import BitNetQuantizationConfig, calibrate, coverage, fit_weights, open_model, pack_model, quantize_model, text_windows
from ..calibration import METHODS, FitReport
from ..files import new_folder, refuse_existing, refuse_overlap
from ..hub import library_versions, model_card, write_card
from ..publish.opening import model_class, tokenizer_at
from ..quantizers import ACTIVATION_SCHEMES
from ..surgery import FusedExpertsError, quantized_layers
from .common import config_from, dtype_of, quietly, say, summary, texts
from .options import UsageError

_FIT_LENGTH, _FIT_BATCH = 256, 8
# left open, transformers would ask on the terminal whether to run a checkpoint's code, and take piped text for the answer
_HUB: dict[str, Any] = {"trust_remote_code": False}


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_from(arguments, arguments.form)
    if arguments.dry_run:
        model = open_model(arguments.model, device_map="meta")
        # the packed form may need calibration, which a look at the shapes does not
        quantize_model(model, BitNetQuantizationConfig(**{**config.fields(), "form": "train"}))
        say(arguments, coverage(model))
        return {"config": summary(config), "coverage": coverage(model).to_dict()}
    if arguments.out is None:
        raise UsageError("where to? Give a folder: hf-bitnet quantize MODEL OUT (or --dry-run)")
    refuse_existing(arguments.out, overwrite=arguments.force, advice="--force")
    refuse_overlap(arguments.model, arguments.out)
    kind, _ = model_class(arguments.model)
    start = time.perf_counter()
    model, report = _quantized(arguments, kind, config)
    say(arguments, coverage(model), *([] if report is None else [report.summary()]))
    with new_folder(arguments.out, overwrite=arguments.force, advice="--force") as folder:
        model.save_pretrained(folder)
        _copy_processor(arguments, folder)
        name = Path(arguments.out).resolve().name
        write_card(folder, model_card(model, name=name, base_model=arguments.model, training={}, versions=library_versions()))
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    seconds = time.perf_counter() - start
    say(arguments, f"saved {arguments.out}: {size / 1e6:.2f} MB of weights, {seconds:.1f} s")
    return {
        "model": arguments.model,
        "out": str(arguments.out),
        "config": summary(model.config.quantization_config),
        "coverage": coverage(model).to_dict(),
        "fit": None if report is None else report.to_dict(),
        "weights_bytes": size,
        "seconds": round(seconds, 3),
    }


def _quantized(arguments: argparse.Namespace, kind: Any, config: BitNetQuantizationConfig) -> tuple[Any, FitReport | None]:
    """The loaded model in the config's form, and what the fit did, where there was one."""
    if arguments.fit is not None:
        METHODS.get(arguments.fit)  # a misspelt one is told before anything is read
    if arguments.fit not in (None, "least_squares") and arguments.fit_file is None:
        raise UsageError(f"--fit {arguments.fit} needs text: --fit-file train.txt (or --fit least_squares, which does without)")
    static = _static_activations(config)
    if static and arguments.fit_file is None and config.form == "packed":
        raise UsageError(
            f"{static} activations are packed with ranges that are found on text: --fit-file train.txt (or --form train, and "
            "the ranges when it is trained)"
        )
    if arguments.fit is None and arguments.fit_file is None:
        return _rounded(arguments, kind, config), None
    stored = kind.from_pretrained(arguments.model, dtype=dtype_of(arguments.dtype), device_map="meta", **_HUB).dtype
    # float32, so that the weights behind the codes are exact; what stays float goes back to its dtype in the end
    model = kind.from_pretrained(arguments.model, dtype=torch.float32, **_HUB)
    batches = None if arguments.fit_file is None else _batches(arguments, model)
    quantize_model(model, BitNetQuantizationConfig(**{**config.fields(), "form": "train"}))
    if any(layer.activation.static or layer.sub_norm is not None for _, layer in quantized_layers(model)):
        if batches is not None:
            calibrate(model, batches)
    elif arguments.fit is None:
        raise UsageError("--fit-file without --fit; add --fit gptq")
    report = None if arguments.fit is None else fit_weights(model, batches, method=arguments.fit)
    if config.form == "packed":
        pack_model(model)
    return model.to(stored), report


def _static_activations(config: BitNetQuantizationConfig) -> str | None:
    """The first scheme of the config whose ranges have to be calibrated."""
    named = [config.activation, *(change.get("activation") for change in config.overrides.values() if isinstance(change, dict))]
    return next((name for name in named if name is not None and ACTIVATION_SCHEMES.get(name).static), None)


def _rounded(arguments: argparse.Namespace, kind: Any, config: BitNetQuantizationConfig) -> Any:
    dtype = dtype_of(arguments.dtype)
    try:
        return kind.from_pretrained(arguments.model, dtype=dtype, quantization_config=config, **_HUB)
    except FusedExpertsError:  # which takes the memory of the float model
        return quantize_model(kind.from_pretrained(arguments.model, dtype=dtype, **_HUB), config)


def _batches(arguments: argparse.Namespace, model: Any) -> list[dict[str, torch.Tensor]]:
    length = min(_FIT_LENGTH, getattr(model.config, "max_position_embeddings", None) or _FIT_LENGTH)
    tokenizer, files = tokenizer_at(arguments.model), texts(arguments.fit_file)
    windows = text_windows(tokenizer, files, length, max_windows=arguments.fit_windows)
    return [{"input_ids": part} for part in windows.split(_FIT_BATCH)]


def _copy_processor(arguments: argparse.Namespace, folder: Path) -> None:
    try:
        # finds the tokenizer, image processor or feature extractor, too
        transformers.AutoProcessor.from_pretrained(arguments.model, **_HUB).save_pretrained(folder)
    except Exception:
        print("note: no tokenizer or processor found beside the model; none is saved", file=sys.stderr)
