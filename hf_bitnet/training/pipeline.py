"""convert: a full-precision causal language model becomes a packed low-bit one, with every figure measured on the way. Own.

    evaluate - quantize - (calibrate) - evaluate - train with a teacher - evaluate - save - pack - save - reload - evaluate

The recipe and `hf-bitnet train` are thin over it. What it leaves in `args.output_dir`: `run_folder.py`. Leaves out:
reading texts (`text_windows`), command lines.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..analysis.text import check_windows
from ..calibration import METHODS, calibrate, fit_weights
from ..config import BitNetQuantizationConfig
from ..hub import hub_id
from ..surgery import check_quantizable, coverage, full_precision_copy, quantize_model, quantized_layers
from .amounts import TokenWindows, windows_of_run
from .arguments import QATArguments
from .distillation.drawn_text import with_drawn
from .distillation.teacher import CACHED, SELF, Teacher, teacher_class
from .measured_run import MeasuredRun
from .options import number
from .presets import TRAINING_PRESETS
from .quantization_schedule import QuantizationSchedule
from .run_results import BEFORE, FULL
from .trainer import QATTrainer

# For pretrained language models. Published conversions train at 1e-4 (1.58 bit) to 1e-5 (4 bit) with a warm-up of some per
# cent; without weight decay, because the size of a float weight says how sure its code is, and decay makes codes flip to
# and fro; and the quantization fades in over the first fifth. Small models want far higher rates: 2e-3 was the best
# for one of 2.4 M parameters.
CONVERSION_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a fraction of the steps
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "quantization_schedule": QuantizationSchedule(ramp="linear", end=0.2),
    "num_train_epochs": 1.0,
    "logging_steps": 10,
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,  # a causal language model uses them all
}
# what of these has nothing to do with how the model learns
_ANY_RUN = ("num_train_epochs", "logging_steps", "save_total_limit", "ddp_find_unused_parameters")
_CALIBRATION_WINDOWS = 64
_FIT_WINDOWS = 128


def command_line_defaults(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Defaults of a parser of QATArguments: those of the preset in `--training_preset NAME`, else CONVERSION_DEFAULTS.

    `words` are the command line, by default the program's. Raises ValueError on an unknown preset.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--training_preset")
    name = parser.parse_known_args(words)[0].training_preset
    if name is None:
        return dict(CONVERSION_DEFAULTS)
    return {key: CONVERSION_DEFAULTS[key] for key in _ANY_RUN} | TRAINING_PRESETS.get(name).training()


def convert(
    model: PreTrainedModel,
    tokenizer: Any,
    config: BitNetQuantizationConfig,
    args: QATArguments,
    train: Tensor,
    valid: Tensor,
    *,
    teacher: Teacher | None = SELF,
    fit: str | None = None,
    drawn_share: float = 0.0,
    max_train_tokens: int | None = None,
    base_model: str | None = None,
    train_text: str = "training text",
    valid_text: str = "validation text",
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Quantizes, trains, packs, saves and measures `model`. It is changed in place: afterwards it is the trained one.

    In a distributed run every process calls it with the same arguments.

    Args:
        model: a full-precision causal language model; float32 weights train best.
        tokenizer: saved with the model; may be None.
        config: which layers and how; form="train".
        args: how to train, and the folder of the run. `resume_from_checkpoint` ("true" for the last one, or a path) continues
            a run that was stopped; the original model is given again.
        train, valid: token windows, int64 (count, length), for example of `text_windows`.
        teacher: "self" (a copy of the full-precision model), a model, its path or Hub name, or None.
        fit: "gptq" or "least_squares": the training starts from weights of `fit_weights`, on the first windows of `train`, in
            place of rounded ones. Needs quantization_schedule=None.
        drawn_share: of the windows to train on, so many (0..1) keep their first 8 tokens only and go on as the full-precision
            model writes them: see `drawn_windows`. In one process.
        max_train_tokens: ends the training after so many tokens, if it is not over before.
        base_model: Hub id or path of `model`, for the card. train_text, valid_text: what the texts are called there.
        overwrite: replaces what an earlier run left in the folder.
        say: gets lines that tell what happens.

    Returns:
        What results.json holds.

    Raises:
        TypeError, ValueError: arguments that do not fit, before anything is done.
        RuntimeError: the training diverged; or the reloaded packed model is not the trained one. There is no `packed` then.
    """
    _check(model, config, args, train, valid)
    if isinstance(teacher, str | os.PathLike) and teacher not in (SELF, CACHED):
        teacher_class(teacher, type(model).__name__)
    _check_fit(fit, args)
    _check_drawn(drawn_share, args)
    run = MeasuredRun(args, overwrite=overwrite, say=say)
    run.limit_tokens(train, max_train_tokens)
    model.to(args.device)  # type: ignore[arg-type]
    run.measure(FULL, model, valid)
    if drawn_share:
        with run.timed("draw"):
            most = windows_of_run(run.args, len(train))
            train = with_drawn(model, train, drawn_share, most, seed=args.seed, progress=not args.disable_tqdm)
    quantize_model(model, config)
    run.say(str(coverage(model)))
    if any(layer.activation.static or layer.sub_norm is not None for _, layer in quantized_layers(model)):
        with run.timed("calibrate"):
            calibrate(model, _batches(train[:_CALIBRATION_WINDOWS]))
    student_of = teacher
    if fit is not None:
        # the fit changes the float weights, so "self" has to be copied before
        student_of = full_precision_copy(model) if isinstance(teacher, str) and teacher == SELF else teacher
        with run.timed("fit"):
            run.say(fit_weights(model, _batches(train[:_FIT_WINDOWS]), method=fit).summary())
    run.measure(BEFORE, model, valid)
    kind = type(model)  # FSDP gives the trained one a class of its own
    datasets = {"train_dataset": TokenWindows(train), "eval_dataset": TokenWindows(valid)}
    trainer = QATTrainer(model=model, args=run.args, teacher=student_of, processing_class=tokenizer, **datasets)
    run.clear()  # not before the last argument has been looked at
    run.train(trainer)
    packed = run.pack_measured(kind, trainer, valid)
    data = _described(train, train_text, valid, valid_text)
    training = {"teacher": _called(teacher), "fit": fit or "none", "drawn_share": drawn_share}
    return run.finish(trainer, packed, config, base_model=base_model, data=data, training=training)


# ---- before ----


def _check(model: nn.Module, config: BitNetQuantizationConfig, args: QATArguments, train: Tensor, valid: Tensor) -> None:
    if not isinstance(args, QATArguments):
        raise TypeError(f"convert takes QATArguments, got {type(args).__name__}; QATArguments(output_dir='out', ...)")
    if not isinstance(config, BitNetQuantizationConfig):
        raise TypeError(f"convert takes a BitNetQuantizationConfig, got {type(config).__name__}; see its presets")
    if config.form != "train":
        raise ValueError(f"config.form is {config.form!r}; convert trains first and packs at the end: form='train'")
    check_quantizable(model, config, layers=True)
    check_windows(model, train, "train")
    check_windows(model, valid, "valid")


def _check_fit(fit: str | None, args: QATArguments) -> None:
    if fit is None:
        return
    METHODS.get(fit)
    schedule: Any = args.quantization_schedule
    if schedule is not None and schedule.ramp != "none":
        raise ValueError(
            f"fit={fit!r} with a ramp ({schedule.ramp!r}) in quantization_schedule: a fitted model starts quantized, a ramp "
            "would begin with float weights that are no longer the original's; quantization_schedule=None"
        )


def _check_drawn(share: float, args: QATArguments) -> None:
    number("drawn_share", share, 0.0, 1.0, hint="it is a share of the windows: drawn_share=0.5")
    if share and args.world_size > 1:
        raise ValueError(
            f"drawn_share={share} in {args.world_size} processes, each of which would write all of the text; write it before, "
            "in one: train = drawn_windows(model, train[:, :8], train.shape[1])"
        )


def _batches(windows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in windows.split(8)]


# ---- after ----


def _described(train: Tensor, train_text: str, valid: Tensor, valid_text: str) -> dict[str, Any]:
    return {
        "train": train_text,
        "train_windows": len(train),
        "validation": valid_text,
        "validation_windows": len(valid),
        "window_tokens": train.shape[1],
    }


def _called(teacher: Teacher | None) -> str:
    if teacher is None:
        return "none"
    if isinstance(teacher, nn.Module):
        return type(teacher).__name__
    return hub_id(str(teacher)) or Path(teacher).name
