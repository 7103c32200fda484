"""What the commands do: a few calls of public functions each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from .. import (
    TRAINING_PRESETS,
    BitNetQuantizationConfig,
    QATArguments,
    command_line_defaults,
    convert,
    coverage,
    fit_weights,
    kernels,
    open_model,
    pack_model,
    perplexity,
    quantize_model,
    read_windows,
    text_windows,
)
from ..calibration import METHODS, FitReport
from ..files import new_folder, refuse_existing
from ..hub import library_versions, model_card, without_bars, write_card
from ..publish.opening import model_class, naming
from ..training import TrainingPreset
from ..training.run_folder import earlier_run
from .options import UsageError, quantization_fields
from .presets import presets

_FIT_LENGTH, _FIT_BATCH = 256, 8


def run(arguments: argparse.Namespace) -> None:
    """Runs the command that `arguments` name. Raises UsageError, or whatever went wrong."""
    commands = {"quantize": _quantize, "train": _train, "eval": _eval, "info": _info, "presets": presets, "demo": _demo}
    with contextlib.nullcontext() if arguments.debug else _quiet():
        result = commands[arguments.command](arguments)
    if arguments.json:
        print(json.dumps(result, indent=1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and notes of libraries, which are for programmers."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _say(arguments: argparse.Namespace, *lines: object) -> None:
    """For people: on the standard output, or beside it when that is for a program."""
    print(*lines, sep="\n", file=sys.stderr if arguments.json else sys.stdout, flush=True)


# ---- models ----


def _dtype(name: str) -> Any:
    found = "auto" if name == "auto" else getattr(torch, name, None)
    if not isinstance(found, torch.dtype | str):
        raise UsageError(f"--dtype {name} is no dtype; for example auto, float32, bfloat16 or float16")
    return found


def _config(arguments: argparse.Namespace, form: str) -> BitNetQuantizationConfig:
    try:
        preset = _training_preset(arguments)
        start = BitNetQuantizationConfig if preset is None else preset.config
        if arguments.preset:
            start = getattr(BitNetQuantizationConfig, arguments.preset)
        return start(**quantization_fields(arguments), form=form)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _training_preset(arguments: argparse.Namespace) -> TrainingPreset | None:
    name = getattr(arguments, "training_preset", None)
    return None if name is None else TRAINING_PRESETS.get(name)


def _summary(config: BitNetQuantizationConfig) -> dict[str, Any]:
    return {name: value for name, value in config.fields().items() if value is not None}


# ---- commands ----


def _quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    config = _config(arguments, arguments.form)
    if arguments.dry_run:
        model = open_model(arguments.model, device_map="meta")
        # the packed form may need calibration, which a look at the shapes does not
        quantize_model(model, BitNetQuantizationConfig(**{**config.fields(), "form": "train"}))
        _say(arguments, coverage(model))
        return {"config": _summary(config), "coverage": coverage(model).to_dict()}
    if arguments.out is None:
        raise UsageError("where to? Give a folder: hf-bitnet quantize MODEL OUT (or --dry-run)")
    refuse_existing(arguments.out, overwrite=arguments.force, advice="--force")
    kind, _ = model_class(arguments.model)
    start = time.perf_counter()
    model, report = _quantized(arguments, kind, config)
    _say(arguments, coverage(model), *([] if report is None else [report.summary()]))
    with new_folder(arguments.out, overwrite=arguments.force, advice="--force") as folder:
        model.save_pretrained(folder)
        _copy_processor(arguments, folder)
        name = Path(arguments.out).resolve().name
        write_card(folder, model_card(model, name=name, base_model=arguments.model, versions=library_versions()))
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    seconds = time.perf_counter() - start
    _say(arguments, f"saved {arguments.out}: {size / 1e6:.2f} MB of weights, {seconds:.1f} s")
    return {
        "model": arguments.model,
        "out": str(arguments.out),
        "config": _summary(model.config.quantization_config),
        "coverage": coverage(model).to_dict(),
        "fit": None if report is None else report.to_dict(),
        "weights_bytes": size,
        "seconds": round(seconds, 3),
    }


def _quantized(arguments: argparse.Namespace, kind: Any, config: BitNetQuantizationConfig) -> tuple[Any, FitReport | None]:
    """The loaded model in the config's form, and what the fit did, where there was one."""
    dtype = _dtype(arguments.dtype)
    if arguments.fit is None:
        if arguments.fit_file is not None:
            raise UsageError("--fit-file without --fit; add --fit gptq")
        return kind.from_pretrained(arguments.model, dtype=dtype, quantization_config=config), None
    METHODS.get(arguments.fit)  # a misspelt one is told before anything is read
    if arguments.fit != "least_squares" and arguments.fit_file is None:
        raise UsageError(f"--fit {arguments.fit} needs text: --fit-file train.txt (or --fit least_squares, which does without)")
    stored = kind.from_pretrained(arguments.model, dtype=dtype, device_map="meta").dtype
    # float32, so that the weights behind the codes are exact; what stays float goes back to its dtype in the end
    model = kind.from_pretrained(arguments.model, dtype=torch.float32)
    batches = None
    if arguments.fit_file is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
        files = [Path(file) for file in arguments.fit_file]
        length = min(_FIT_LENGTH, getattr(model.config, "max_position_embeddings", None) or _FIT_LENGTH)
        windows = text_windows(tokenizer, files, length, max_windows=arguments.fit_windows)
        batches = [{"input_ids": part} for part in windows.split(_FIT_BATCH)]
    quantize_model(model, BitNetQuantizationConfig(**{**config.fields(), "form": "train"}))
    report = fit_weights(model, batches, method=arguments.fit)
    if config.form == "packed":
        pack_model(model)
    return model.to(stored), report


def _copy_processor(arguments: argparse.Namespace, folder: Path) -> None:
    try:
        # finds the tokenizer, image processor or feature extractor, too
        transformers.AutoProcessor.from_pretrained(arguments.model).save_pretrained(folder)
    except Exception:
        print("note: no tokenizer or processor found beside the model; none is saved", file=sys.stderr)


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    config, training = _config(arguments, "train"), _training(arguments)
    found = earlier_run(arguments.out)
    if found and not (arguments.resume or arguments.force):
        raise ValueError(
            f"{arguments.out!r} holds {', '.join(found)} of an earlier run; choose another folder, continue that run "
            "(--resume), or replace it (--force)"
        )
    with naming(arguments.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    most = None if arguments.max_train_tokens is None else -(-arguments.max_train_tokens // arguments.length)
    train, train_text = _windows(arguments, tokenizer, arguments.train_file, arguments.train_split, most)
    valid, valid_text = _windows(
        arguments, tokenizer, arguments.validation_file, arguments.validation_split, arguments.max_validation_windows
    )
    kind, _ = model_class(arguments.model)
    model = kind.from_pretrained(arguments.model, dtype=torch.float32)
    out = sys.stderr if arguments.json else sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # Trainer's log lines
        results = convert(
            model,
            tokenizer,
            config,
            training,
            train,
            valid[: arguments.max_validation_windows],
            teacher=_teacher(arguments),
            fit=arguments.fit,
            drawn_share=arguments.drawn_share,
            max_train_tokens=arguments.max_train_tokens,
            base_model=arguments.model,
            train_text=train_text,
            valid_text=valid_text,
            overwrite=arguments.force,
            say=functools.partial(print, file=out, flush=True),
        )
    return {name: value for name, value in results.items() if name != "history"}


def _teacher(arguments: argparse.Namespace) -> str | None:
    if arguments.teacher is not None:
        return None if arguments.teacher == "none" else arguments.teacher
    preset = _training_preset(arguments)
    return "self" if preset is None else preset.teacher


def _training(arguments: argparse.Namespace) -> QATArguments:
    given = {
        "output_dir": arguments.out,
        "training_preset": arguments.training_preset,
        "num_train_epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "per_device_train_batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "bf16": arguments.bf16 or None,
        "resume_from_checkpoint": "true" if arguments.resume else None,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    known = [field.name for field in dataclasses.fields(QATArguments)]
    for setting in arguments.set:
        name, found, value = setting.partition("=")
        if not found:
            raise UsageError(f"--set {setting}: write NAME=VALUE, for example --set warmup_steps=0.1")
        if name.strip() not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"--set {setting}: QATArguments has no field {name!r}{hint}")
        words.append(f"--{name.strip()}={value.strip()}")
    parser = _Fields(QATArguments, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**command_line_defaults(words))
    if arguments.fit is not None:  # a fitted model starts quantized
        parser.set_defaults(quantization_schedule=None)
    try:
        (training,) = parser.parse_args_into_dataclasses(args=words)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    return training


class _Fields(transformers.HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def _windows(
    arguments: argparse.Namespace, tokenizer: Any, files: list[str] | None, split: str, most: int | None
) -> tuple[torch.Tensor, str]:
    if files is None and arguments.dataset is None:
        raise UsageError("which text? Give --train-file and --validation-file, or --dataset")
    where = {"split": split, "column": arguments.text_column, "length": arguments.length, "max_windows": most}
    return read_windows(tokenizer, files, arguments.dataset, arguments.dataset_config, **where)


def _eval(arguments: argparse.Namespace) -> dict[str, Any]:
    files = [Path(file) for file in arguments.text]
    with naming(arguments.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    windows = text_windows(tokenizer, files, arguments.length, max_windows=arguments.max_windows)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = open_model(arguments.model, dtype=_dtype(arguments.dtype)).to(device)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        value = perplexity(model, windows, arguments.batch_size, progress=None if sys.stderr.isatty() else False)
    seconds = time.perf_counter() - start
    tokens, text = windows.numel(), ", ".join(file.name for file in files)
    _say(
        arguments,
        f"perplexity {value:.4f}   ({len(windows)} windows of {arguments.length} tokens of {text}, "
        f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s)",
    )
    return {
        "model": arguments.model,
        "text": text,
        "perplexity": value,
        "windows": len(windows),
        "window_tokens": arguments.length,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "device": str(device),
    }


def _info(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"versions": library_versions()}
    if arguments.model is not None:
        # only the headers of the files are read
        model = open_model(arguments.model, device_map="meta")
        config = getattr(model.config, "quantization_config", None)
        if isinstance(config, BitNetQuantizationConfig):
            form = "in train form" if config.form == "train" else config.form
            settings = BitNetQuantizationConfig(**{**config.fields(), "quantized_modules": None})
            _say(arguments, f"{type(model).__name__}, {form}: {settings!r}")
            result |= {"form": config.form, "config": _summary(config)}
        else:
            _say(arguments, f"{type(model).__name__}, not quantized by hf_bitnet")
        _say(arguments, coverage(model))
        result |= {"model": arguments.model, "class": type(model).__name__, "coverage": coverage(model).to_dict()}
    if arguments.kernels:
        _say(arguments, kernels.explain(arguments.device))
        result["kernels"] = kernels.explain(arguments.device).splitlines()
    if arguments.model is None:
        packages = "  ".join(f"{name} {version}" for name, version in result["versions"].items())
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        _say(arguments, packages, f"threads {torch.get_num_threads()}  GPU {gpu}")
    return result


def _demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..demo import run_demo

    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        return dict(run_demo(Path(arguments.output), quick=arguments.quick))
