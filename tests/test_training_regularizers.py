"""Regularizers: zero where they should be, gradients, and how they enter a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bitnet import QATArguments
from hf_bitnet.quantizers import WEIGHT_SCHEMES, Quantized, make_weight_quantizer
from hf_bitnet.surgery import trained_layers
from hf_bitnet.training.regularizers import REGULARIZERS
from tests.qat import ONE_LAYER, arguments, losses, make_trainer, quantized
from tests.tiny import tiny

DESCENT: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.5}


def _quantized(scheme: str, weight: Tensor, group_size: int | None = None) -> tuple[Quantized, Any]:
    quantizer = make_weight_quantizer(scheme, group_size=group_size)
    return quantizer.quantize(weight), quantizer.grid


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


# ---- each by itself ----


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES.names())
@pytest.mark.parametrize("name", REGULARIZERS.names())
def test_gradient_by_finite_differences(name: str, scheme: str, group_size: int | None) -> None:
    weight = _weight()
    codes, grid = _quantized(scheme, weight, group_size)
    value = REGULARIZERS.get(name)(weight, codes, grid)
    assert value.shape == () and value > 0
    double = weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: REGULARIZERS.get(name)(w, codes, grid), double, eps=1e-5)


@pytest.mark.parametrize("name", REGULARIZERS.names())
def test_zero_exactly_where_it_should_be(name: str) -> None:
    codes, grid = _quantized("ternary", _weight())
    on_grid, zero, beyond = codes.dequantize(), torch.zeros(6, 8), 3.0 * codes.dequantize()
    values = [float(REGULARIZERS.get(name)(weight, codes, grid)) for weight in (on_grid, zero, beyond)]
    expected = {
        "l2_to_grid": [0.0, float(on_grid.square().sum()), float((2 * on_grid).square().sum())],
        "oscillation_damping": [0.0, float(on_grid.square().sum()), 0.0],
        "sparsity": [float(on_grid.abs().sum()), 0.0, float(3 * on_grid.abs().sum())],
    }
    assert values == pytest.approx(expected[name])


# ---- in a step ----


def _update(folder: Path, batch: int, accumulate: int, teacher: Any, name: str = "llama", **fields: Any) -> Tensor:
    model = quantized(name)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 1}
    make_trainer(folder, model, name, teacher, **DESCENT, **sizes, **fields).train()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.parametrize(
    ("name", "distilled"),
    [
        ("llama", True),
        ("gpt2", False),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
    ],
)
def test_counts_once_an_optimizer_step(name: str, distilled: bool, tmp_path: Path) -> None:
    """A step with the term differs from one without by -lr times its gradient, however many micro-batches there are."""
    coefficient = 0.01
    model = quantized(name)
    expected = {}
    for layer_name, layer in trained_layers(model):
        difference = layer.matrix - layer.quantized_weight().dequantize()
        gradient = 2 * coefficient * difference.detach()
        expected[f"{layer_name}.weight"] = gradient if layer.matrix.is_contiguous() else gradient.t()
    by_hand = [-0.5 * expected.get(key, torch.zeros_like(p)) for key, p in model.named_parameters()]
    for batch, accumulate in ((8, 1), (2, 4)):
        teacher = tiny(name, seed=1)[0] if distilled else None
        without = _update(tmp_path, batch, accumulate, teacher, name)
        with_term = _update(tmp_path, batch, accumulate, teacher, name, regularizers={"l2_to_grid": coefficient})
        torch.testing.assert_close(with_term - without, nn.utils.parameters_to_vector(by_hand), rtol=1e-4, atol=1e-7)


def test_is_logged_and_part_of_the_loss(tmp_path: Path) -> None:
    fields = {"max_steps": 2, "logging_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    plain = make_trainer(tmp_path, quantized(model=ONE_LAYER), **fields)
    plain.train()
    coefficients = {"l2_to_grid": 0.01, "sparsity": 0.001}
    model = quantized(model=ONE_LAYER)
    trainer = make_trainer(tmp_path, model, regularizers=coefficients, quant_logging=False, **fields)
    trainer.train()
    (log,) = losses(trainer)
    for name, coefficient in coefficients.items():
        terms = [
            REGULARIZERS.get(name)(layer.matrix.detach(), layer.quantized_weight(), layer.quantizer.grid)
            for _, layer in trained_layers(model)
        ]
        assert log[f"quant/reg_{name}"] == pytest.approx(coefficient * float(torch.stack(terms).sum()), rel=1e-5)
    added = log["quant/reg_l2_to_grid"] + log["quant/reg_sparsity"]
    assert log["loss"] == pytest.approx(losses(plain)[0]["loss"] + added, rel=1e-5)


def test_what_they_are_for(tmp_path: Path) -> None:
    """Measured against the same run without: nearer to the grid, fewer flips, more zeros."""
    runs = {}
    for name, coefficient in ((None, 0.0), ("l2_to_grid", 1.0), ("oscillation_damping", 1.0), ("sparsity", 0.1)):
        fields = {"regularizers": {name: coefficient}} if name else {}
        trainer = make_trainer(tmp_path, quantized(model=ONE_LAYER), max_steps=16, learning_rate=3e-3, **fields)
        trainer.train()
        runs[name] = losses(trainer)[-1]
    assert runs["l2_to_grid"]["quant/sqnr_db"] > runs[None]["quant/sqnr_db"] + 0.5
    assert runs["oscillation_damping"]["quant/flip_rate"] < 0.5 * runs[None]["quant/flip_rate"]
    assert runs["sparsity"]["quant/zero_fraction"] > runs[None]["quant/zero_fraction"] + 0.02


def test_frozen_weights_are_left_alone(tmp_path: Path) -> None:
    model = quantized(model=ONE_LAYER)
    frozen = trained_layers(model)[0][1]
    frozen.weight.requires_grad = False
    before = frozen.weight.clone()
    make_trainer(tmp_path, model, max_steps=1, regularizers={"l2_to_grid": 1.0}).train()
    assert torch.equal(frozen.weight, before)


# ---- how it is written ----


def test_is_saved_as_json(tmp_path: Path) -> None:
    args = arguments(tmp_path, regularizers='{"l2_to_grid": 1e-4}')
    assert args.regularizers == {"l2_to_grid": 1e-4}
    assert '"l2_to_grid": 0.0001' in args.to_json_string()


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ({"l2_grid": 1e-4}, ValueError, "unknown regularizer 'l2_grid'; legal: .* Did you mean 'l2_to_grid'"),
        ({"sparsity": -1.0}, ValueError, r"regularizers\['sparsity'\]=-1.0 is out of range; legal: at least 0; for example"),
        ({"sparsity": "a"}, TypeError, r"regularizers\['sparsity'\] must be a number"),
        (1e-4, TypeError, "regularizers must be a dict, JSON text"),
    ],
)
def test_what_is_refused(value: Any, kind: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        QATArguments(output_dir=str(tmp_path), regularizers=value)
