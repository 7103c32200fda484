"""Gradients corrected by how they changed since the last step: MARS (arXiv 2411.10438, its approximate form), for any torch
optimizer with momentum.

With g the gradient of the step, p that of the step before and b the optimizer's first momentum, the optimizer gets

    c = g + gamma b / (1 - b) (g - p)        divided by its norm where that is above 1

Momentum answers late, and codes of few bits that answer late swing about their place; the difference answers early. The paper
sees variance reduction in it, which needs p at the present weights; as here, with p as it was, it works as the derivative term
of a controller does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PREVIOUS = "previous_gradient"


def correct_gradients(optimizer: torch.optim.Optimizer, gamma: float) -> None:
    """Changes what every later `step` of the optimizer sees as gradients; after the step they are again what they were.

    The last gradient is part of the optimizer's state, one more tensor a parameter, which checkpoints hold.
    Raises ValueError when a group has no momentum.
    """
    weights = [gamma * each / (1.0 - each) for each in map(_momentum, optimizer.param_groups)]
    present: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def correct(optimizer: Any, *_: Any) -> None:
        present.clear()
        for weight, group in zip(weights, optimizer.param_groups, strict=True):
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                present.append((parameter, gradient))
                # some optimizers take an empty state for a fresh one: no entry is made before they made theirs
                previous = optimizer.state[parameter].get(PREVIOUS) if parameter in optimizer.state else None
                corrected = gradient.clone() if previous is None else torch.lerp(previous, gradient, 1.0 + weight)
                parameter.grad = corrected.div_(torch.linalg.vector_norm(corrected).clamp_min(1.0))

    @torch.no_grad()
    def remember(optimizer: Any, *_: Any) -> None:
        for parameter, gradient in present:
            state = optimizer.state[parameter]
            if PREVIOUS in state:
                state[PREVIOUS].copy_(gradient)
            else:
                state[PREVIOUS] = gradient.clone()
            parameter.grad = gradient
        present.clear()

    optimizer.register_step_pre_hook(correct)
    optimizer.register_step_post_hook(remember)


def _momentum(group: dict[str, Any]) -> float:
    found = group["betas"][0] if "betas" in group else group.get("momentum") or group.get("beta1")
    if not found:
        raise ValueError(
            "mars corrects what momentum makes late, and this optimizer has none; leave mars out, or use optim='adamw_torch'"
        )
    return float(found)
