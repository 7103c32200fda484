"""The two-stage schedule of BitNet b1.58: at half of the run the learning rate drops and weight decay ends.

From the training tips of microsoft/unilm (bitnet): peak 1.5e-3 then 1e-3 (700 M parameters) or 1.2e-3 then 8e-4 (1.3 B and
more), weight decay 0.1 then 0, 375 steps of warm-up. A latent weight's magnitude is how sure its code is; decay late in the
run makes codes flip back and forth. Own reading where the tips are silent: each stage follows one line that falls from the
peak at the end of the warm-up to 0 at the end of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .options import number

DECAYS = ("linear", "none")


@dataclass(frozen=True)
class TwoStage:
    """Options of the two-stage schedule.

    Attributes:
        at: fraction of the training steps (0..1) where the second stage begins.
        drop: learning rate of the second stage over the first's, 0..1.
        decay: "linear" falls to 0 over the run; "none" keeps each stage flat.
    """

    at: float = 0.5
    drop: float = 2 / 3
    decay: str = "linear"

    def __post_init__(self) -> None:
        number("at", self.at, 0.0, 1.0, hint="it is a fraction of the training steps: at=0.5")
        number("drop", self.drop, 0.0, 1.0, hint="it is a factor: drop=0.667 goes from 1.5e-3 to 1e-3")
        if self.decay not in DECAYS:
            raise ValueError(f"unknown decay {self.decay!r}; legal: {', '.join(map(repr, DECAYS))}")

    def factor(self, step: int, warmup: int, total: int) -> float:
        """Learning rate of the step after `step` finished ones, over the first stage's peak."""
        if step < warmup:
            return step / warmup
        peak = self.drop if self.second(step, total) else 1.0
        left = max(total - step, 0) / max(total - warmup, 1) if self.decay == "linear" else 1.0
        return peak * left

    def second(self, step: int, total: int) -> bool:
        """Whether the step after `step` finished ones is of the second stage."""
        return step >= self.at * total


class TwoStageScheduler(LambdaLR):
    """`TwoStage` as torch's scheduler; it also sets weight decay, a pure function of the step.

    Args:
        optimizer: with the rates and weight decays of the first stage.
        warmup, total: optimizer steps.
    """

    def __init__(self, optimizer: Optimizer, options: TwoStage, warmup: int, total: int) -> None:
        # a second run with the same optimizer finds the decay where the first one left it, as on resume; like initial_lr
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group.setdefault("initial_weight_decay", group["weight_decay"])
        self.decays = [group.get("initial_weight_decay") for group in optimizer.param_groups]
        self._is_second = lambda step: options.second(step, total)
        super().__init__(optimizer, lambda step: options.factor(step, warmup, total))

    def step(self, *args: Any, **named: Any) -> None:
        super().step(*args, **named)
        for group, decay in zip(self.optimizer.param_groups, self.decays, strict=True):
            if decay is not None:
                group["weight_decay"] = 0.0 if self._is_second(self.last_epoch) else decay

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["_is_second"]  # a function of the arguments, and checkpoints hold plain data
        return state
