"""What happens between steps: the strength follows its schedule, codes are kept over micro-batches, logs are readable. Own."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..surgery import kept_codes, set_norm_blend, set_strength, trained_layers
from .arguments import QATArguments
from .schedules import strength_at


class StrengthCallback(TrainerCallback):
    """Sets strength and sub-norm blend before each step, a pure function of the step; so a resumed run continues exactly.

    Attributes:
        strength: as set last; None before training.
    """

    def __init__(self) -> None:
        self.strength: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.strength = None  # the model may have been changed since
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert isinstance(args, QATArguments)
        self.set(
            kwargs["model"],
            strength_at(
                args.strength_schedule,
                state.global_step,
                state.max_steps,
                args.strength_start,
                args.strength_end,
                args.strength_steps,
            ),
        )

    def set(self, model: nn.Module, strength: float) -> None:
        """Touches the model only when the strength changes."""
        if strength != self.strength:
            set_strength(model, strength)
            set_norm_blend(model, strength)
            self.strength = strength

    def finish(self, model: nn.Module) -> None:
        """However the run ended, what it leaves is the quantized model."""
        if self.strength is not None:
            self.set(model, 1.0)
            self.strength = None

    @contextlib.contextmanager
    def at_full_strength(self, model: nn.Module) -> Any:
        """The quantized model inside, the strength of before afterwards."""
        before = self.strength
        if before is None:  # not in training: the model stays as the user left it
            yield
            return
        self.set(model, 1.0)
        try:
            yield
        finally:
            self.set(model, before)


def kept_where_whole(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`kept_codes`, except where weights are sharded (FSDP, ZeRO-3): codes of the whole model would undo the sharding."""
    weight = trained_layers(model)[0][1].weight
    sharded = hasattr(weight, "full_tensor") or weight.numel() == 0
    return contextlib.nullcontext() if sharded else kept_codes(model)


class KeptCodesCallback(TrainerCallback):
    """With gradient accumulation, layers make their codes once for all micro-batches of an optimizer step."""

    def __init__(self) -> None:
        self._kept = contextlib.ExitStack()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()
        if args.gradient_accumulation_steps > 1:
            self._kept.enter_context(kept_where_whole(kwargs["model"]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops the codes; also called when training ends by an error."""
        self._kept.close()


_PERCENT = {"flip_rate", "zero_fraction", "latent_changed"}


def readable(logs: dict[str, Any], state: TrainerState) -> str:
    """One line: `step 20/100  epoch 0.4  loss 2.31  lr 1e-03  strength 0.5  flip_rate 1.2%`."""
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
