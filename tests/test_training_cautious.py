"""Cautious updates: the formula, any optimizer, clipping and accumulation, resume, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bitnet import QATArguments
from hf_bitnet.training.cautious import make_cautious
from tests.qat import assert_same, losses, make_trainer, quantized, weights


def _steps(kind: Any, cautious: bool, gradients: list[list[float]], **options: Any) -> list[torch.Tensor]:
    """The parameter after each step."""
    parameter = torch.nn.Parameter(torch.zeros(len(gradients[0]), dtype=torch.float64))
    optimizer = kind([parameter], lr=0.1, **options)
    if cautious:
        make_cautious(optimizer)
    seen = []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        seen.append(parameter.detach().clone())
    return seen


def test_update_against_the_gradient_is_left_out() -> None:
    """SGD with momentum 0.9: after +1 the memory still goes down when the gradient is -0.5; half of the weights stay."""
    first, second = _steps(torch.optim.SGD, True, [[1.0, 1.0], [1.0, -0.5]], momentum=0.9)
    assert first.tolist() == [-0.1, -0.1]  # nothing disagrees in the first step
    # u = 0.1 (0.9 + 1) down for the first weight, doubled; 0.1 (0.9 - 0.5) down for the second, whose gradient goes up
    torch.testing.assert_close(second, torch.tensor([-0.1 - 2 * 0.19, -0.1], dtype=torch.float64))


def test_adam_against_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    ours = _steps(torch.optim.AdamW, True, gradients.tolist(), betas=(0.9, 0.95), weight_decay=0.0)[-1]
    weight, first, second = (torch.zeros(50, dtype=torch.float64) for _ in range(3))
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        mask = (update * gradient > 0).double()
        weight = weight - 0.1 * update * mask / mask.mean()
    torch.testing.assert_close(ours, weight, rtol=1e-6, atol=1e-9)


def test_weights_without_a_gradient_agree() -> None:
    """They neither move the others further nor lose what momentum gives them."""
    _, second = _steps(torch.optim.SGD, True, [[1.0, 1.0], [1.0, 0.0]], momentum=0.9)
    torch.testing.assert_close(second, torch.tensor([-0.1 - 0.19, -0.1 - 0.09], dtype=torch.float64))


def test_nothing_agrees() -> None:
    """A step that goes uphill everywhere moves nothing, and is not divided by 0."""
    _, second = _steps(torch.optim.SGD, True, [[1.0], [-0.5]], momentum=0.9)
    assert second.tolist() == [-0.1]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_trains_with(optim: str, tmp_path: Path) -> None:
    found = {}
    for cautious in (False, True):
        trainer = make_trainer(
            tmp_path / str(cautious), quantized(), cautious=cautious, optim=optim, max_steps=4, gradient_accumulation_steps=2
        )
        trainer.train()
        found[cautious] = losses(trainer)
    # without a memory nothing can disagree
    assert (found[True] == found[False]) == (optim != "adamw_torch")


def test_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole = quantized()
    make_trainer(tmp_path / "whole", whole, cautious=True, max_steps=5).train()
    parts = {"cautious": True, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "parts", quantized(), **parts).train()
    model = quantized()
    make_trainer(tmp_path / "parts", model, **parts).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_same(weights(whole), weights(model))


def test_optimizer_from_outside(tmp_path: Path) -> None:
    model = quantized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model, cautious=True, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="cautious=True cannot be used: the optimizer was made outside of the trainer"):
        trainer.train()


def test_not_with_lean(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would undo lean's stochastic rounding; leave one out"):
        QATArguments(output_dir=str(tmp_path), cautious=True, lean=True)
