"""Straight-through estimators: the closed forms against autograd of their own surrogates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_bitnet.ste import ESTIMATORS, STE

LEVELS = (2, 3, 4, 15, 255)
each_ste = pytest.mark.parametrize("name", ESTIMATORS.names())


def _positions(levels: int) -> Tensor:
    """Inside and outside the grid, away from the kinks, where an autograd derivative is a matter of convention."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(400, generator=generator, dtype=torch.float64) * (levels + 3) - 2
    return positions[((positions * 2).round() / 2 - positions).abs() > 1e-6]


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@each_ste
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("temperature", [0.7, 4.0, 9.0])
def test_slope_is_the_derivative_of_the_surrogate(name: str, levels: int, temperature: float) -> None:
    ste, threshold = ESTIMATORS.get(name), 0.5
    position = _positions(levels).requires_grad_()
    steepness = _double(temperature).requires_grad_()
    curve = ste.surrogate(position, levels, threshold, steepness)
    # the identity does not hold the temperature in its graph
    by_position, by_temperature = torch.autograd.grad(curve.sum(), (position, steepness), allow_unused=True)
    slope = torch.ones_like(position) if ste.slope is None else ste.slope(position, levels, threshold, steepness)
    torch.testing.assert_close(slope, by_position, rtol=1e-10, atol=1e-12)
    if ste.temperature_slope is not None:
        assert by_temperature is not None
        total = ste.temperature_slope(position, levels, threshold, steepness).sum()
        torch.testing.assert_close(total, by_temperature, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if ESTIMATORS.get(name).temperature_slope is not None])
def test_temperature_slope_pointwise(name: str) -> None:
    ste = ESTIMATORS.get(name)
    assert ste.temperature_slope is not None
    position, step = _positions(4), 1e-5
    up = ste.surrogate(position, 4, 0.5, _double(3.0 + step))
    down = ste.surrogate(position, 4, 0.5, _double(3.0 - step))
    expected = (up - down) / (2 * step)
    torch.testing.assert_close(ste.temperature_slope(position, 4, 0.5, _double(3.0)), expected, rtol=1e-6, atol=1e-8)


def _soft_members() -> list[str]:
    return [name for name in ESTIMATORS if ESTIMATORS.get(name).slope is not None and name != "clipped"]


@pytest.mark.parametrize("name", _soft_members())
@pytest.mark.parametrize("levels", LEVELS)
def test_soft_surrogates_meet_the_levels(name: str, levels: int) -> None:
    """A step runs from one level to the next, so the steps join; steep ones become the staircase."""
    ste = ESTIMATORS.get(name)
    on_levels = torch.arange(levels, dtype=torch.float64)
    torch.testing.assert_close(ste.surrogate(on_levels, levels, 0.5, _double(5.0)), on_levels)
    position = _positions(levels).clamp(0, levels - 1)
    torch.testing.assert_close(ste.surrogate(position, levels, 0.5, _double(1e9)), position.round())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_clipped_passes_up_to_the_threshold(threshold: float) -> None:
    slope = ESTIMATORS.get("clipped").slope
    assert slope is not None
    position = torch.tensor([-threshold - 0.01, -threshold, 0.0, 1.3, 2.0 + threshold, 2.01 + threshold])
    assert slope(position, 3, threshold, torch.tensor(1.0)).tolist() == [0, 1, 1, 1, 1, 0]


def test_sigmoid_is_tanh_at_half_the_temperature() -> None:
    sigmoid, tanh = ESTIMATORS.get("sigmoid"), ESTIMATORS.get("tanh")
    position = _positions(3)
    assert sigmoid.slope is not None and tanh.slope is not None
    expected = tanh.slope(position, 3, 0.5, _double(2.0))
    assert torch.equal(sigmoid.slope(position, 3, 0.5, _double(4.0)), expected)
    # the logistic curve, written out: each step is logistic(T z), shifted and scaled to run from 0 to 1
    step, temperature = position.floor().clamp(0, 1), 4.0
    z = position - step - 0.5
    ends = torch.sigmoid(_double(temperature / 2)), torch.sigmoid(_double(-temperature / 2))
    curve = step + (torch.sigmoid(temperature * z) - ends[1]) / (ends[0] - ends[1])
    torch.testing.assert_close(sigmoid.surrogate(position, 3, 0.5, _double(temperature)), curve)


@each_ste
def test_slopes_keep_shape_and_dtype_and_stay_finite(name: str) -> None:
    ste: STE = ESTIMATORS.get(name)
    position = torch.linspace(-1e4, 1e4, 36).view(4, 9)
    for curve in (ste.slope, ste.temperature_slope):
        if curve is not None:
            value = curve(position, 3, 0.5, torch.tensor(4.0))
            assert value.shape == position.shape and value.dtype == torch.float32 and value.isfinite().all()
