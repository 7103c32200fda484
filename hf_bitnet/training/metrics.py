"""The metrics that QATTrainer adds to Trainer's logs, with one copy from the device for all of them. Own."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .layer_history import LayerHistory
from .monitor import QuantMonitor
from .regularizers import Regularization


class TrainMetrics(TrainerCallback):
    """Collects between logging steps.

    Args:
        monitor: of the quantized layers.
        terms: names of the losses of the distillation; none without a teacher.
        device: of the training.
        regularization: whose terms are logged, if there is one.
        always: log the schedule also where the monitor is off, for what compares losses of one stage.
    """

    def __init__(
        self,
        monitor: QuantMonitor,
        terms: list[str],
        device: torch.device,
        regularization: Regularization | None = None,
        always: bool = False,
    ) -> None:
        self._regularization, self._always = regularization, always
        self.history = LayerHistory()
        self._monitor = monitor
        self._names = [f"distill/{name}" for name in terms]
        self._sums = torch.zeros(len(terms), device=device)
        self._weights = torch.zeros_like(self._sums)
        self._since = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since = state.global_step
        self._sums.zero_()
        self._monitor.start(kwargs["model"])
        if self._monitor.enabled:
            self.history.start(str(args.output_dir), state.global_step, args.should_save)

    def add(self, losses: Tensor, weights: Tensor) -> None:
        """float32 (terms,) losses of one micro-batch, as they enter the mean of their step, and what they count."""
        self._sums += losses
        self._weights = weights

    def collect(self, model: nn.Module, step: int, schedule: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
        """Everything since the last call, after what `schedule` says. Every rank has to call it."""
        names, parts = [*self._names, *(f"{name}_weight" for name in self._names)], []
        if self._names:
            means = self._sums / max(step - self._since, 1)
            parts += [means if accelerator.num_processes == 1 else accelerator.reduce(means, "mean"), self._weights]
            self._sums.zero_()
        if self._regularization is not None:  # the same on every rank
            names += self._regularization.names
            parts.append(self._regularization.take(step - self._since))
        self._since = step
        measured = self._monitor.measure(model)
        if measured is not None:
            names += self._monitor.NAMES
            parts.append(measured)
        logs = dict(schedule) if self._monitor.enabled or self._always else {}
        if parts:
            values = torch.cat(parts).tolist()
            logs |= dict(zip(names, values, strict=False))  # type: ignore[arg-type]
            if measured is not None:
                kinds = len(self._monitor.OF_LAYERS)
                rows = {name: values[len(names) + index :: kinds] for index, name in enumerate(self._monitor.OF_LAYERS)}
                self.history.add(step, self._monitor.layers, rows)
        return logs
