"""convert: a full-precision causal language model becomes a packed low-bit one, with every figure measured on the way. Own.

    evaluate - quantize - (calibrate) - evaluate - train with a teacher - evaluate - save - pack - save - reload - evaluate

The recipe and `hf-bitnet train` are thin over it. It leaves in `args.output_dir`:

    train/            the trained float weights (BitLinear), to train on or to convert to other formats
    packed/           the packed model with tokenizer and card: what is deployed
    results.json      all figures, settings, tokens, seconds and versions
    checkpoint-*/     of Trainer

The first three are complete or not there. Leaves out: reading texts (`text_windows`), command lines.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..analysis.text import check_windows
from ..calibration import METHODS, calibrate, fit_weights
from ..config import BitNetQuantizationConfig
from ..hub import hub_id, library_versions, without_bars
from ..surgery import coverage, full_precision_copy, quantize_model, quantized_layers
from .arguments import QATArguments
from .distillation.teacher import SELF, Teacher
from .measured_run import BEFORE, FULL, PACKED_FOLDER, RESULTS_FILE, TRAIN_FOLDER, MeasuredRun
from .options import plain
from .presets import TRAINING_PRESETS
from .quantization_schedule import QuantizationSchedule
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
# what a reader of a card or of results.json wants to see even where it is Trainer's default
_ALWAYS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    *("quantization_schedule",),
)
# where things are, who may write there, and what is only looked at
_NEVER = ("output_dir", "run_name", "deepspeed", "fsdp", "push_to_hub", "resume_from_checkpoint", "report_to", "disable_tqdm")
_NEVER += (
    "max_steps",
    "bf16",
    "fp16",
    "project",
    "do_train",
    "do_eval",
    "do_predict",
    "use_cpu",
    "restore_callback_states_from_checkpoint",
)
_NEVER_PREFIXES = ("hub_", "log", "save_", "eval_", "dataloader_", "per_device_eval", "ddp_", "trackio", "accelerator_config")


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


class Windows(Dataset[dict[str, Tensor]]):
    """Token windows (count, length) as Trainer wants them; each predicts its own next tokens."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


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
    _check_fit(fit, args)
    args = _limited(args, len(train), train.shape[1], max_train_tokens)
    run = MeasuredRun(args, say)
    _check_folder(run, overwrite)
    model.to(args.device)  # type: ignore[arg-type]
    run.measure(FULL, model, valid)
    if overwrite and run.is_main:
        _clear(run.folder)
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
    datasets = {"train_dataset": Windows(train), "eval_dataset": Windows(valid)}
    trainer = QATTrainer(model=model, args=args, teacher=student_of, processing_class=tokenizer, **datasets)
    with run.timed("train"), without_bars():
        trainer.train(resume_from_checkpoint=_resume(args))
    run.measure_trained(trainer, valid)
    run.save_trained(trainer)
    packed = run.pack(type(model), trainer, valid)
    amounts = _amounts(trainer, train)
    results = {
        "base_model": None if base_model is None else hub_id(base_model) or Path(base_model).name,
        "class": type(model).__name__,
        "quantization": {key: value for key, value in config.fields().items() if value is not None},
        "coverage": {key: value for key, value in coverage(packed).to_dict().items() if key != "parameters"},
        "data": _described(train, train_text, valid, valid_text),
        "training": {
            **amounts,
            "teacher": _called(teacher),
            "fit": fit or "none",
            **_settings(args),
            "distillation": plain(trainer.distillation),
        },
        # the seconds of a resumed run are those of its last part
        **run.figures(amounts["tokens"] if _resume(args) is None else None),
        "versions": library_versions(),
        "history": trainer.state.log_history,
    }
    run.finish(packed, results, base_model)
    return results


# ---- before ----


def _check(model: nn.Module, config: BitNetQuantizationConfig, args: QATArguments, train: Tensor, valid: Tensor) -> None:
    if not isinstance(args, QATArguments):
        raise TypeError(f"convert takes QATArguments, got {type(args).__name__}; QATArguments(output_dir='out', ...)")
    if not isinstance(config, BitNetQuantizationConfig):
        raise TypeError(f"convert takes a BitNetQuantizationConfig, got {type(config).__name__}; see its presets")
    if config.form != "train":
        raise ValueError(f"config.form is {config.form!r}; convert trains first and packs at the end: form='train'")
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


def _batches(windows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in windows.split(8)]


def _check_folder(run: MeasuredRun, overwrite: bool) -> None:
    found = earlier_run(run.folder)
    if found and not overwrite and _resume(run.args) is None:
        raise ValueError(
            f"{str(run.folder)!r} holds {', '.join(found)} of an earlier run; choose another output_dir, continue that run "
            "(resume_from_checkpoint='true'), or replace it (overwrite=True)"
        )
    if overwrite and _resume(run.args) is not None:
        raise ValueError("overwrite=True would delete the checkpoint that resume_from_checkpoint asks for; give one of them")


def earlier_run(folder: str | os.PathLike[str]) -> list[str]:
    """Names of what a run left in a folder."""
    return sorted(path.name for path in _leavings(Path(folder)))


def _leavings(folder: Path) -> Iterator[Path]:
    for name in (TRAIN_FOLDER, PACKED_FOLDER, RESULTS_FILE, "checkpoint-*"):
        yield from folder.glob(name)


def _clear(folder: Path) -> None:
    """Removes what a run writes, and nothing else."""
    for path in list(_leavings(folder)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _resume(args: QATArguments) -> str | bool | None:
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    return True if str(wanted).lower() == "true" else str(wanted)


def _windows_per_step(args: QATArguments) -> int:
    return args.train_batch_size * args.world_size * args.gradient_accumulation_steps


def _limited(args: QATArguments, windows: int, length: int, max_tokens: int | None) -> QATArguments:
    """A copy whose `max_steps` ends the run at `max_tokens`."""
    args = copy.copy(args)
    if max_tokens is None:
        return args
    per_step = _windows_per_step(args) * length
    if max_tokens < per_step:
        raise ValueError(
            f"max_train_tokens={max_tokens:,} is less than one step, which takes {per_step:,} tokens "
            f"({_windows_per_step(args)} windows of {length}); give at least that, or a smaller per_device_train_batch_size"
        )
    planned = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * _steps_per_epoch(args, windows))
    args.max_steps = min(planned, max_tokens // per_step)
    return args


def _steps_per_epoch(args: QATArguments, windows: int) -> int:
    batches = math.ceil(windows / (args.train_batch_size * args.world_size))
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


# ---- after ----


def _amounts(trainer: QATTrainer, train: Tensor) -> dict[str, int]:
    """Steps, tokens and processes of the training."""
    steps, per_epoch = trainer.state.global_step, _steps_per_epoch(trainer.args, len(train))
    epochs, rest = divmod(steps, per_epoch)
    windows = epochs * len(train) + min(rest * _windows_per_step(trainer.args), len(train))
    return {"tokens": windows * train.shape[1], "steps": steps, "processes": trainer.args.world_size}


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


def _settings(args: QATArguments) -> dict[str, Any]:
    """The training settings that are not the defaults, and the most important ones; no paths, no tokens."""
    defaults = {each.name: each.default for each in fields(QATArguments)}
    found: dict[str, Any] = {"mixed_precision": args.mixed_precision}
    for name, value in args.to_dict().items():
        changed = value != defaults[name] and (bool(value) or defaults[name] is True)
        if name in _ALWAYS or (changed and name not in _NEVER and not name.startswith(_NEVER_PREFIXES)):
            found[name] = value
    return found
