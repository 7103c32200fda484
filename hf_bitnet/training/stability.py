"""What keeps a run from being lost: NaN is named, stuck weights are, early stopping waits for full strength. Own.

Nothing here waits for the device where Trainer does not: gradient norms are looked at in a step only where Trainer has just
read the loss of that step (`logging_nan_inf_filter`, its default). Loss spikes are the business of `rollback.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..surgery import trained_layers
from .sharding import on_any_rank

logger = logging.getLogger(__name__)
# below this share of changed latents, in so many logs one after the other, a warning is due
_STUCK, _STUCK_LOGS = 0.1, 3

# ---- NaN and infinity ----


def first_not_finite(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """Runs one batch again and says where NaN or infinity comes from first: a parameter, an output, or a gradient; or None.

    Args:
        run: forward and loss of the batch. The gradients of `model` are lost.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the parameter {name} is not finite"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_watch_output(name, found))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    hooks += [
        parameter.register_post_accumulate_grad_hook(_watch_gradient(name, found))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    model.zero_grad()
    try:
        loss = run()
        if not found and not _finite(loss):
            found.append("every layer's output is finite and the loss is not: look at the labels and the loss function")
        # the backward of a sharded model is one of all ranks
        if not on_any_rank(bool(found), loss.device):
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return found[0] if found else None


def _finite(tensor: Any) -> bool:
    return not isinstance(tensor, Tensor) or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _watch_output(name: str, found: list[str]) -> Any:
    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not found and not all(_finite(each) for each in (output if isinstance(output, tuple) else (output,))):
            inputs = "finite" if all(_finite(each) for each in args) else "not finite either"
            found.append(f"the output of {name} ({type(module).__name__}) is not finite; its input is {inputs}")

    return watch


def _watch_gradient(name: str, found: list[str]) -> Any:
    def watch(parameter: Tensor) -> None:
        if not found and not _finite(parameter.grad):
            found.append(f"the gradient of {name} is not finite")

    return watch


# ---- weights that do not move ----


class StuckWatch:
    """Warns once when next to no latent weight changes any more although the learning rate is above 0."""

    def __init__(self) -> None:
        self._low = 0

    def look(self, logs: dict[str, float], step: int) -> None:
        changed = logs.get("quant/latent_changed")
        if changed is None or not logs.get("learning_rate"):
            return
        self._low = self._low + 1 if changed < _STUCK else min(self._low, 0)
        if self._low == _STUCK_LOGS:
            self._low = -(10**9)
            logger.warning(
                "step %d: only %.1f %% of the float weights changed since the last log: the steps drown in rounding. Raise "
                "latent_learning_rate, train float32 weights, or round stochastically (lean=True)",
                step,
                100 * changed,
            )


# ---- early stopping ----


class PatientEarlyStopping(EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback that does not count evaluations before the model is fully quantized.

    While the strength rises the quantized model, which is what evaluation measures, may get worse for good reasons.
    QATTrainer puts it in the place of the stock one.
    """

    def on_evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        if any(layer.relaxed or layer.quantizer != layer.spec.weight for _, layer in trained_layers(kwargs["model"])):
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)


def patient(callback: Any) -> TrainerCallback | Any:
    """The stock callback as ours; any other as it is."""
    if type(callback) is not EarlyStoppingCallback:
        return PatientEarlyStopping() if callback is EarlyStoppingCallback else callback
    return PatientEarlyStopping(callback.early_stopping_patience, callback.early_stopping_threshold)
