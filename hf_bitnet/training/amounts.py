"""Token windows as a data set, and what a run over them amounts to: windows of a step, steps of an epoch, tokens. Own."""

from __future__ import annotations

import copy
import math

from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .arguments import QATArguments


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Token windows, int64 (count, length), as Trainer wants them; each predicts its own next tokens."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def steps_per_epoch(batches: int, accumulate: int) -> int:
    """Optimizer steps of so many batches of one process, as Trainer counts them."""
    return max(1, math.ceil(batches / accumulate))


def limited(args: QATArguments, windows: Tensor, max_tokens: int | None, *, repeat: bool) -> QATArguments:
    """A copy whose `max_steps` ends the run at `max_tokens`; None changes nothing.

    Args:
        windows: (count, length) to train on.
        repeat: goes over the windows until the tokens are reached; otherwise a run that would end earlier still does.

    Raises ValueError when the tokens are less than one step's.
    """
    args = copy.copy(args)
    if max_tokens is None:
        return args
    count, length = windows.shape
    per_step = _windows_per_step(args) * length
    if max_tokens < per_step:
        raise ValueError(
            f"max_train_tokens={max_tokens:,} is less than one step, which takes {per_step:,} tokens "
            f"({_windows_per_step(args)} windows of {length}); give at least that, or a smaller per_device_train_batch_size"
        )
    planned = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * _steps_per_epoch(args, count))
    args.max_steps = max_tokens // per_step if repeat else min(planned, max_tokens // per_step)
    return args


def windows_of_run(args: TrainingArguments, count: int) -> int:
    """How many of `count` windows a run passes over: all, or those of `max_steps`."""
    return min(count, args.max_steps * _windows_per_step(args)) if args.max_steps > 0 else count


def amounts(trainer: Trainer, count: int, length: int) -> dict[str, int]:
    """Steps, tokens and processes of a training over `count` windows of `length` tokens."""
    args = trainer.args
    epochs, rest = divmod(trainer.state.global_step, _steps_per_epoch(args, count))
    windows = epochs * count + min(rest * _windows_per_step(args), count)
    return {"tokens": windows * length, "steps": trainer.state.global_step, "processes": args.world_size}


def _windows_per_step(args: TrainingArguments) -> int:
    return args.train_batch_size * args.world_size * args.gradient_accumulation_steps


def _steps_per_epoch(args: TrainingArguments, windows: int) -> int:
    return steps_per_epoch(math.ceil(windows / (args.train_batch_size * args.world_size)), args.gradient_accumulation_steps)
