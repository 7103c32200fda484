"""What the demo's trainings share: arguments, a progress bar, curves. Leaves out: models, data."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from .chart import Curve


def arguments(output_dir: Path, steps: int, learning_rate: float, *, batch: int, evaluations: int, seed: int) -> dict[str, Any]:
    """TrainingArguments that all trainings of the demo share. Nothing is saved on the way."""
    return {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": steps // 7,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 16,
        "logging_steps": max(steps // 60, 1),
        "eval_strategy": "steps",
        "eval_steps": max(steps // evaluations, 1),
        "eval_on_start": True,
        "prediction_loss_only": True,
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
        "use_cpu": True,
        "bf16": bfloat16_is_native(),
        "dataloader_pin_memory": False,
        "disable_tqdm": True,  # a bar of the demo's own stands in
    }


def train(trainer: Trainer, label: str) -> dict[str, Curve]:
    """Train, and return the logged losses as curves: "loss" (training) and "eval_loss"."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, PrinterCallback | ProgressCallback):
            trainer.remove_callback(callback)
    trainer.add_callback(_Bar(label))
    trainer.train()
    # Trainer leaves its bfloat16 autocast around the model's forward
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    history = trainer.state.log_history
    return {key: [(entry["step"], entry[key]) for entry in history if key in entry] for key in ("loss", "eval_loss")}


def later(curve: Curve, steps: int) -> Curve:
    """The curve of a training that began after `steps` steps of another one."""
    return [(step + steps, loss) for step, loss in curve]


def bfloat16_is_native() -> bool:
    """Whether the processor multiplies matrices in bfloat16 (AMX).

    Without, bfloat16 is emulated; by AVX-512's instructions for it, training took 1.5 times as long as in float32.
    """
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return check is not None and check()


class _Bar(TrainerCallback):
    """A progress bar with the loss, quiet where the output is not a terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pause = 0.2 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(total=state.max_steps, desc=f"      {self.label}", unit="step", mininterval=pause, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "eval_loss" in logs:
            self.bar.set_postfix_str(f"perplexity {math.exp(logs['eval_loss']):,.1f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
