"""MARS: the formula, with cautious updates, resume, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bitnet import QATArguments
from hf_bitnet.training.cautious import make_cautious
from hf_bitnet.training.mars import PREVIOUS, correct_gradients
from tests.qat import assert_same, losses, make_trainer, quantized, weights


def _steps(kind: Any, gradients: torch.Tensor, cautious: bool = False, gamma: float = 0.025, **options: Any) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = kind([parameter], lr=0.1, **options)
    if cautious:
        make_cautious(optimizer)
    correct_gradients(optimizer, gamma)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)  # who logs its norm sees what backward made
        assert torch.equal(optimizer.state[parameter][PREVIOUS], gradient)
    return parameter.detach()


def _by_hand(gradients: torch.Tensor, cautious: bool, gamma: float = 0.025) -> torch.Tensor:
    weight, first, second = (torch.zeros_like(gradients[0]) for _ in range(3))
    previous = gradients[0]
    for step, gradient in enumerate(gradients, 1):
        corrected = gradient + gamma * 0.9 / 0.1 * (gradient - previous)
        corrected = corrected / max(1.0, float(corrected.norm()))
        first, second = 0.9 * first + 0.1 * corrected, 0.95 * second + 0.05 * corrected**2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        mask = (update * gradient > 0).double() if cautious else torch.ones_like(update)
        weight, previous = weight - 0.1 * update * mask / mask.mean(), gradient
    return weight


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_adam_against_the_papers_formula(size: float, cautious: bool) -> None:
    """With gradients whose norm is below 1 and above it; the mask of cautious updates looks at the gradient itself."""
    gradients = size * torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _steps(torch.optim.AdamW, gradients, cautious, betas=(0.9, 0.95), weight_decay=0.0)
    torch.testing.assert_close(found, _by_hand(gradients, cautious), rtol=1e-5, atol=1e-8)


def test_sgd_answers_early() -> None:
    """k = gamma 0.5 / (1 - 0.5) = 0.5; gradients 0.2, then -0.2: corrected -0.2 + 0.5 (-0.4) = -0.4."""
    gradients = torch.tensor([[0.2], [-0.2]], dtype=torch.float64)
    found = _steps(torch.optim.SGD, gradients, gamma=0.5, momentum=0.5)
    torch.testing.assert_close(found, torch.tensor([-0.1 * 0.2 - 0.1 * (0.5 * 0.2 - 0.4)], dtype=torch.float64))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_trains_with(optim: str, tmp_path: Path) -> None:
    found = {}
    for mars in (0.0, 0.05):
        fields = {"mars": mars, "optim": optim, "max_steps": 4, "gradient_accumulation_steps": 2}
        trainer = make_trainer(tmp_path / str(mars), quantized(), **fields)
        trainer.train()
        found[mars] = losses(trainer)
    assert found[0.0][:1] == found[0.05][:1]
    assert found[0.0] != found[0.05]


@pytest.mark.parametrize("more", [{}, {"cautious": True}, {"lean": True}])
def test_resumed_run_is_the_same(more: dict[str, Any], tmp_path: Path) -> None:
    """The last gradient is in the checkpoint."""
    if "lean" in more:
        pytest.importorskip("torchao")
    whole = quantized()
    make_trainer(tmp_path / "whole", whole, mars=0.05, max_steps=5, **more).train()
    parts = {"mars": 0.05, "max_steps": 5, "save_strategy": "steps", "save_steps": 3, **more}
    make_trainer(tmp_path / "parts", quantized(), **parts).train()
    model = quantized()
    make_trainer(tmp_path / "parts", model, **parts).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_same(weights(whole), weights(model))


def test_optimizer_without_momentum(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(), mars=0.025, optim="sgd")
    with pytest.raises(ValueError, match="this optimizer has none; leave mars out, or use optim='adamw_torch'"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mars": "yes"}, "mars"),
        ({"mars": -0.1}, "mars"),
        ({"mars": 0.025, "fp16": True}, "fp16=True scales them"),
    ],
)
def test_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        QATArguments(output_dir=str(tmp_path), **fields)
