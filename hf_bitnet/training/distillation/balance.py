"""How much each inner term counts: by running means of the losses instead of a factor set by hand. Own.

A relation loss may be a hundred thousandth of the cross entropy (BitDistill, arXiv 2510.13998, multiplies it by 1e5). Here term
i counts  w_i * mean(main) / mean(term_i),  so that w = 1 makes it as large as the main loss, whatever its unit. The means are
exponential ones over optimizer steps, all from 0, so that their bias cancels in the ratio; they hold the losses of all
micro-batches and all ranks, and those of step n change the factors from step n + 1 on. In the first step, in which nothing has
been measured, inner terms count 0.

Below full strength a student that started as its teacher differs from it in proportion to the strength s, and both divergence
and inner terms go with s^2, while labels say what they always say. Their share of mean(main) is taken times s^2, then: a term
counts what will make it as large as the main loss at full strength, and not ten thousand times as much because it is nearly 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..add_on import AddOn
from .config import DistillationConfig
from .logits import CE, KL, MAIN

# a term that is nearly 0, as at strength 0 where the student is its teacher, must not drown all others
_LARGEST = 1e6
_FILE = "qat_balance.json"


class LossBalance(AddOn):
    """Makes one loss of the terms of a step.

    Checkpoints hold the running means, so a resumed run continues exactly.

    Args:
        config: says which terms there are and what they weigh.
        accelerator: whose ranks share the means; its device holds them.

    Attributes:
        names: of the terms.
        factors: float32 (inner terms,), for the present step.
        of_itself: whether the student started as the teacher.
    """

    def __init__(self, config: DistillationConfig, accelerator: Accelerator) -> None:
        weights = config.inner_terms
        outer = {"kl": config.alpha * config.temperature**2, "ce": 1.0 - config.alpha}
        self.names = [*(name for name, weight in outer.items() if weight > 0.0), *weights]
        self._accelerator, self._decay = accelerator, config.balance_decay
        self._active = config.balance and bool(weights)
        self.of_itself, self._of_labels = False, outer["ce"]
        device = accelerator.device
        self._outer = torch.tensor([weight for weight in outer.values() if weight > 0.0], device=device)
        self._first, self._last = (KL if config.alpha > 0.0 else CE), (CE if config.alpha < 1.0 else KL)
        self._weights = torch.tensor(list(weights.values()), device=device)
        self._set(torch.zeros(1 + len(weights), device=device))

    def weigh(self, losses: Tensor, strength: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One micro-batch.

        Args:
            losses: float32 (3 + inner terms,): main loss, divergence, CE, inner terms, as they enter the means of the step.
            strength: of quantization in this step, 0 to 1; None outside of training.

        Returns:
            The loss (0-dim, with gradient); the terms called `names`, and what each of them weighs in it.
        """
        main, inner = losses[MAIN], losses[CE + 1 :]
        if self._active:
            less = 0.0 if strength is None or not self.of_itself else self._of_labels * (1.0 - strength**2)
            self._sums += torch.cat((losses[: MAIN + 1] - less * losses[CE], inner)).detach()
        loss = main + torch.dot(self.factors, inner) if inner.numel() else main
        terms = torch.cat((losses[self._first : self._last + 1], inner)).detach()
        return loss, terms, torch.cat((self._outer, self.factors))

    def start(self, checkpoint: Path | None) -> None:
        """Before a run: the means of a checkpoint (if it has any), or none."""
        means = torch.zeros_like(self._means)
        try:
            saved = None if checkpoint is None else json.loads((checkpoint / _FILE).read_text())
        except OSError:
            saved = None
        if saved is not None and len(saved["means"]) == len(means):
            means = torch.tensor(saved["means"], device=means.device)
        self._set(means)

    def save(self, checkpoint: Path) -> None:
        """Float32 survives the text exactly."""
        if self._active:
            (checkpoint / _FILE).write_text(json.dumps({"means": self._means.tolist()}) + "\n")

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._active:
            return
        several = self._accelerator.num_processes > 1
        losses = self._accelerator.reduce(self._sums, "mean") if several else self._sums
        assert isinstance(losses, Tensor)
        # a step that overflowed says nothing, and would stay in the mean for ever
        self._set(torch.where(losses.isfinite().all(), torch.lerp(losses, self._means, self._decay), self._means))

    def _set(self, means: Tensor) -> None:
        self._means = means
        self._sums = torch.zeros_like(means)
        self.factors = self._factors()

    def _factors(self) -> Tensor:
        if not self._active:
            return self._weights
        main, terms = self._means[0], self._means[1:]
        ratio = torch.where(terms > 0, main / terms, 0.0).clamp_max(_LARGEST)
        return self._weights * ratio
