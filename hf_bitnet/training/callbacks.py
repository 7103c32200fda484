"""What happens between steps: codes are kept over micro-batches, logs are readable. Own. (The schedule: `strength.py`.)"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from accelerate.state import GradientState
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..modules import TrainedLayer
from ..surgery import kept_codes, trained_layers
from .sharding import is_sharded


def kept_where_whole(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`kept_codes`, except where weights are sharded (FSDP, ZeRO-3): codes of the whole model would undo the sharding."""
    return contextlib.nullcontext() if is_sharded(trained_layers(model)[0][1].weight) else kept_codes(model)


class KeptCodesCallback(TrainerCallback):
    """With gradient accumulation or activation checkpointing, layers make their codes once an optimizer step.

    A layer's codes (one byte a weight) go when its gradient is there for good, so that with it they never weigh more than
    the gradients do.
    """

    def __init__(self) -> None:
        self._kept = contextlib.ExitStack()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()
        model = kwargs["model"]
        checkpoints = getattr(model, "is_gradient_checkpointing", False)
        if args.gradient_accumulation_steps > 1 or checkpoints:
            self._kept.enter_context(kept_where_whole(model))
            for _, layer in trained_layers(model):
                if layer.weight.requires_grad:
                    self._kept.callback(layer.weight.register_post_accumulate_grad_hook(_dropping(layer)).remove)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops the codes; also called when training ends by an error."""
        self._kept.close()


def _dropping(layer: TrainedLayer) -> Callable[[Tensor], None]:
    def drop(_: Tensor) -> None:
        if GradientState().sync_gradients:  # the last micro-batch
            layer.drop_codes()

    return drop


_PERCENT = {"flip_rate", "zero_fraction", "latent_changed"}


def readable(logs: dict[str, Any], state: TrainerState) -> str:
    """One line: `step 20/100  epoch 0.4  loss 2.31  lr 1e-03  strength 0.5  bits 4  flip_rate 1.2%`."""
    parts = [f"step {state.global_step}/{state.max_steps}"]
    for key, value in logs.items():
        name = key.removeprefix("quant/")
        if key in ("total_flos", "step") or (key.startswith("distill/") and key.endswith("_weight")):
            continue
        if name in _PERCENT:
            parts.append(f"{name} {value:.2%}")
        else:
            short = "lr" if name == "learning_rate" else name
            parts.append(f"{short} {value:.4g}" if isinstance(value, float) else f"{short} {value}")
    return "  ".join(parts)


class ReadableProgress(ProgressCallback):
    """Trainer's progress bar, with `readable` lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(readable(logs, state))


class ReadablePrinter(PrinterCallback):
    """Where the progress bar is off: `readable` lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            print(readable(logs, state))


def make_logs_readable(trainer: Trainer) -> None:
    """Puts our progress bar or printer in the place of the stock one, where there is one."""
    for stock, ours in ((ProgressCallback, ReadableProgress), (PrinterCallback, ReadablePrinter)):
        if any(type(callback) is stock for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(stock)
            trainer.add_callback(ours)
