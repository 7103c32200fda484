"""`hf-bitnet train`: a causal language model quantized and trained back to quality."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import sys
from typing import Any

import torch
import transformers

from .. import QATArguments, command_line_defaults, convert, read_windows
from ..publish.opening import model_class, tokenizer_at
from ..training.resume import last_complete_checkpoint
from ..training.run_folder import earlier_run
from .common import config_from, keep_memory, quietly, training_preset
from .options import UsageError


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    config, training = config_from(arguments, "train"), _training(arguments)
    found = earlier_run(arguments.out)
    if found and not (arguments.resume or arguments.force):
        raise ValueError(
            f"{arguments.out!r} holds {', '.join(found)} of an earlier run; choose another folder, continue that run "
            "(--resume), or replace it (--force)"
        )
    if arguments.resume and last_complete_checkpoint(arguments.out, training.world_size) is None:
        way = "replace what is there (--force)" if found else "leave --resume out to begin a run there"
        raise ValueError(f"--resume: {arguments.out!r} holds no complete checkpoint; {way}")
    kind, _ = model_class(arguments.model)
    tokenizer = tokenizer_at(arguments.model)
    most = None if arguments.max_train_tokens is None else -(-arguments.max_train_tokens // arguments.length)
    train, train_text = _windows(arguments, tokenizer, arguments.train_file, arguments.train_split, most)
    valid, valid_text = _windows(
        arguments, tokenizer, arguments.validation_file, arguments.validation_split, arguments.max_validation_windows
    )
    keep_memory(arguments)
    model = kind.from_pretrained(arguments.model, dtype=torch.float32, trust_remote_code=False)
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
    preset = training_preset(arguments)
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
        # else Trainer refuses bfloat16 where there is no other device
        "use_cpu": "true" if arguments.bf16 and not torch.accelerator.is_available() else None,
        "resume_from_checkpoint": "true" if arguments.resume else None,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    known = [field.name for field in dataclasses.fields(QATArguments)]
    for setting in arguments.set:
        name, found, value = setting.partition("=")
        if not found:
            raise UsageError(f"--set {setting}: write NAME=VALUE, for example --set warmup_steps=0.1")
        if name.strip() in ("output_dir", "resume_from_checkpoint"):
            raise UsageError(f"--set {setting}: {name.strip()} has a place of its own on this command line; see --help")
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
