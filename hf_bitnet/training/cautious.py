"""Cautious updates (arXiv 2411.16085), around any torch optimizer.

With g the gradient of the step and u the update that the optimizer made of it and of its memory, a weight moves only where u
goes downhill by g, and the others by so much more:

    m = [u g <= 0]        w <- w + u m / max(mean(m), 1e-3)

Momentum carries latent weights over thresholds and back; here it does not where the present batch disagrees, so fewer codes
flip for nothing. Two differences from the paper: weight decay is part of u here (it masks Adam's direction alone); and weights
without a gradient, as rows of tokens that do not occur, count as agreeing, or all others would move further for them. A weight
that is held back may move by a rounding of its update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FEWEST = 1e-3


def make_cautious(optimizer: torch.optim.Optimizer) -> None:
    """Changes every later `step` of the optimizer. Steps that are skipped (float16 overflow) are not touched."""
    before: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, its value before the step, its gradient

    def remember(optimizer: Any, *_: Any) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        before[:] = [(each, each.detach().clone(), each.grad) for each in parameters]

    @torch.no_grad()
    def mask(*_: Any) -> None:
        for parameter, old, gradient in before:
            update = parameter - old
            # 1 or 0: choosing by a mask of bools takes three times as long on a CPU
            agrees = (update * gradient <= 0).to(update.dtype)
            share = agrees.mean(dtype=torch.float32).clamp_min(_FEWEST).to(update.dtype)
            # in this form nothing is rounded where all weights agree
            parameter.addcmul_(update, agrees.mul_(share.reciprocal()).sub_(1.0))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(mask)
