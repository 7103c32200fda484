"""Says which settings of a run are others than those of the checkpoint that it goes on from. Own.

A run that goes on with other settings is legal, and is not the run that would have gone through. Trainer compares logging,
saving, evaluation and the batch size; schedules, teachers and schemes have notes of their own (`strength.py`, `resume.py`).
"""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .add_on import AddOn
from .arguments import QATArguments
from .resume import has_optimizer, note

logger = logging.getLogger(__name__)
_FILE = "qat_arguments.json"
# what every optimizer keeps in its state, so that a loaded state has the old values
_IN_THE_STATE = (
    "learning_rate",
    "latent_learning_rate",
    "scale_learning_rate",
    "norm_rate_factor",
    "weight_decay",
    "latent_weight_decay",
    "scale_weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
_OF_TRAINER = (
    "optim",
    "optim_args",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)
# these do not change what is trained, or are compared elsewhere
_LEFT_OUT = (
    "quantization_schedule",
    "eval_at_full_strength",
    "nan_guard",
    "spike_rollback",
    "quant_logging",
    "training_preset",
)


def _compared() -> list[str]:
    stock = {each.name for each in fields(TrainingArguments)}
    own = [each.name for each in fields(QATArguments) if each.name not in stock and each.name not in _LEFT_OUT]
    return [*dict.fromkeys((*_IN_THE_STATE, *_OF_TRAINER, *own))]


class SettingsNote(AddOn):
    """Keeps the settings beside each checkpoint, and compares them when a run goes on from one."""

    def __init__(self, args: QATArguments) -> None:
        self.args = args

    def save(self, checkpoint: Path) -> None:
        (checkpoint / _FILE).write_text(json.dumps(self._settings(), indent=1) + "\n")

    def start(self, checkpoint: Path | None) -> None:
        before = None if checkpoint is None else note(checkpoint, _FILE)
        if checkpoint is None or not isinstance(before, dict):
            return
        now = json.loads(json.dumps(self._settings()))
        # a note of another version may lack some
        different = [name for name in now if name in before and before[name] != now[name]]
        kept = [name for name in different if name in _IN_THE_STATE] if has_optimizer(checkpoint) else []
        self._say(
            checkpoint, before, now, [name for name in different if name not in kept], "the run goes on with the new ones"
        )
        self._say(checkpoint, before, now, kept, "the old ones stay, they are part of the optimizer's state")

    def _settings(self) -> dict[str, Any]:
        everything = self.args.to_dict()
        return {name: everything[name] for name in _compared() if name in everything}

    @staticmethod
    def _say(checkpoint: Path, before: dict[str, Any], now: dict[str, Any], names: list[str], what: str) -> None:
        if names:
            said = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
            logger.warning("%s was trained with other settings: %s; %s", checkpoint, said, what)
