"""What several commands do: be quiet, speak, open what the options name. Imports torch and transformers."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from .. import BitNetQuantizationConfig, import_model, keep_freed_memory, open_model
from ..hub import without_bars
from ..publish.importing import holds_gguf
from .options import UsageError, quantization_fields

if TYPE_CHECKING:
    from ..training import TrainingPreset

Command = Callable[[argparse.Namespace], Any]


def quietly(run: Command) -> Command:
    """A command without the warnings and notes of libraries, which are for programmers; with --debug they are shown."""

    @functools.wraps(run)
    def quiet(arguments: argparse.Namespace) -> Any:
        with contextlib.nullcontext() if arguments.debug else _quiet():
            return run(arguments)

    return quiet


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), without_bars(), _bars_on_terminals():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Downloads and uploads show bars, but not in a file."""
    shown = not are_progress_bars_disabled()
    if shown and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def say(arguments: argparse.Namespace, *lines: object) -> None:
    """For people: on the standard output, or beside it when that is for a program."""
    print(*lines, sep="\n", file=sys.stderr if arguments.json else sys.stdout, flush=True)


def progress() -> bool | None:
    """What a function with a progress bar is given: it shows one on long work, where somebody looks."""
    return None if sys.stderr.isatty() else False


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned to the left; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def dtype_of(name: str) -> Any:
    """A torch dtype, or "auto". Raises UsageError."""
    found = "auto" if name == "auto" else getattr(torch, name, None)
    if not isinstance(found, torch.dtype | str):
        raise UsageError(f"--dtype {name} is no dtype; for example auto, float32, bfloat16 or float16")
    return found


def device_of(name: str | None) -> torch.device:
    """The device that was named, or the GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"--device {name} is no device; for example cpu, cuda or cuda:1") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        said = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--device {name} cannot be used here ({said}); for example cpu, cuda or cuda:1") from None
    return device


def open_checkpoint(arguments: argparse.Namespace, path: str) -> Any:
    """The model at `path`, in the dtype and with the activations of the options. Raises UsageError, and as `open_model`."""
    dtype = dtype_of(arguments.dtype)
    if arguments.activation is None:
        return open_model(path, dtype=dtype)
    against = getattr(arguments, "against", None) or []
    if holds_gguf(path):
        return import_model(path, activation=arguments.activation, dtype=dtype)
    if not any(holds_gguf(each) for each in (arguments.model, *([against] if isinstance(against, str) else against))):
        raise UsageError(f"--activation is for GGUF files, and {path!r} is none: its config.json says how inputs are quantized")
    return open_model(path, dtype=dtype)


def keep_memory(arguments: argparse.Namespace) -> None:
    """Before long computing, and after what is loaded: memory of tensors that are freed stays for the next ones."""
    if arguments.own_process:
        keep_freed_memory()


def texts(names: list[str]) -> list[Path]:
    """Text files, as the functions of the library take them."""
    return [Path(name) for name in names]


# ---- quantization ----


def config_from(arguments: argparse.Namespace, form: str) -> BitNetQuantizationConfig:
    """What the quantization options say. Raises UsageError."""
    try:
        preset = training_preset(arguments)
        start = BitNetQuantizationConfig if preset is None else preset.config
        if arguments.preset:
            start = getattr(BitNetQuantizationConfig, arguments.preset)
        return start(**quantization_fields(arguments), form=form)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def training_preset(arguments: argparse.Namespace) -> TrainingPreset | None:
    name = getattr(arguments, "training_preset", None)
    if name is None:
        return None
    from ..training import TRAINING_PRESETS  # a second that commands which train nothing need not wait

    return TRAINING_PRESETS.get(name)


def summary(config: BitNetQuantizationConfig) -> dict[str, Any]:
    """The fields that are set, for JSON."""
    return {name: value for name, value in config.fields().items() if value is not None}
