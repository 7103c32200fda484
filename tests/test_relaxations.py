"""Relaxations: exactly the weight at strength 0, exactly the quantized value at 1, differentiable in both."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_bitnet.modules.functional import Latent
from hf_bitnet.modules.relaxed import relaxed_weight
from hf_bitnet.quantizers import WEIGHT_SCHEMES, make_weight_quantizer
from hf_bitnet.relaxations import _HOTTEST, MOST_SOFT_LEVELS, RELAXATIONS, Softened
from hf_bitnet.ste import ESTIMATORS
from tests.layers import make_layer

each_relaxation = pytest.mark.parametrize("name", RELAXATIONS.names())
SOFT = [name for name in RELAXATIONS if RELAXATIONS.get(name).soften is not None]
STRENGTHS = (0.0, 0.03, 0.1, 0.25, 0.5, 0.9, 0.999)


# ---- the mix ----


@each_relaxation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_at_both_ends(name: str, dtype: torch.dtype) -> None:
    relax = RELAXATIONS.get(name).mix
    # far apart: value + 1 * (quantized - value) would lose the small one
    value = (torch.randn(64, 33) * torch.logspace(-6, 4, 33)).to(dtype)
    quantized = torch.randn(64, 33).to(dtype)
    for strength, expected in ((0.0, value), (1.0, quantized)):
        mixed = relax(value, quantized, torch.tensor(strength))
        assert torch.equal(mixed, expected) and mixed.dtype == dtype


@each_relaxation
def test_gradients_of_the_mix(name: str) -> None:
    relax = RELAXATIONS.get(name).mix
    value, quantized = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for strength in (*STRENGTHS, 1.0):
        assert torch.autograd.gradcheck(lambda v, q: relax(v, q, torch.tensor(strength)), (value, quantized))  # noqa: B023


@each_relaxation
def test_the_target_comes_in_and_never_leaves(name: str) -> None:
    relax = RELAXATIONS.get(name).mix
    value, target = torch.zeros(100), torch.ones(100)
    mixes = torch.stack([relax(value, target, torch.tensor(strength)) for strength in (*STRENGTHS, 1.0)])
    assert (mixes.diff(dim=0) >= 0).all() and (mixes[0] == 0).all() and (mixes[-1] == 1).all()


def test_linear_is_the_straight_mix() -> None:
    value, quantized = torch.randn(2, 50, dtype=torch.float64)
    mixed = RELAXATIONS.get("linear").mix(value, quantized, torch.tensor(0.25))
    torch.testing.assert_close(mixed, 0.75 * value + 0.25 * quantized)


def test_residual_is_the_quantized_value_and_a_residual_that_falls() -> None:
    """Arenas: y = x Q + e x W with e from 1 to 0."""
    value, quantized = torch.randn(2, 50, dtype=torch.float64)
    relax = RELAXATIONS.get("residual").mix
    for strength, share in ((0.1, 1.0), (0.325, 0.5 + 0.5 * math.cos(math.pi / 4)), (0.55, 0.5)):
        torch.testing.assert_close(
            relax(value, quantized, torch.tensor(strength)), quantized + share * value, rtol=0, atol=1e-6
        )


# ---- soft levels ----


def _softened(name: str, position: Tensor, levels: int, strength: float) -> Softened:
    soften = RELAXATIONS.get(name).soften
    assert soften is not None
    return soften(position, levels, torch.tensor(strength))


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("levels", [2, 3, 4, 15, MOST_SOFT_LEVELS])
def test_slope_is_the_derivative(name: str, levels: int) -> None:
    # not at the thresholds' mirror points only: an irregular raster, and beyond the outermost levels
    position = torch.linspace(-2.5, levels + 1.5, 403, dtype=torch.float64)
    step = 1e-6
    for strength in STRENGTHS:
        soft, slope = _softened(name, position, levels, strength)
        above, below = (_softened(name, position + sign * step, levels, strength).position for sign in (1, -1))
        torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-6)
        assert (slope >= 0).all() and (soft.diff() >= 0).all()


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("levels", [2, 3, 4, 15])
def test_levels_pull_harder_as_the_strength_rises(name: str, levels: int) -> None:
    """Away from thresholds the soft value arrives at the level, where hard rounding is; a level in the middle stays."""
    position = torch.arange(levels).repeat_interleave(2) + torch.tensor([-0.3, 0.3]).repeat(levels)
    hard = position.round().clamp(0, levels - 1)
    gaps = [(_softened(name, position, levels, s).position - hard).abs().max().item() for s in (0.2, 0.5, 0.8, 0.999)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-5 < gaps[0]
    middle = torch.tensor([(levels - 1) / 2])
    assert torch.allclose(_softened(name, middle, levels, 0.4).position, middle)


@pytest.mark.parametrize("levels", [2, 3, 4, 15])
def test_relay_starts_from_the_weight(levels: int) -> None:
    position = torch.linspace(-1, levels, 50)
    torch.testing.assert_close(_softened("relay", position, levels, 1e-5).position, position, rtol=1e-3, atol=1e-3)


def test_relay_on_three_levels_is_cat_q() -> None:
    w, strength = torch.linspace(-3, 3, 101, dtype=torch.float64), 0.16
    k = 30 * strength / 0.8
    expected = (torch.tanh(k * (w - 0.5)) + torch.tanh(k * (w + 0.5))) / (2 * math.tanh(k))
    torch.testing.assert_close(_softened("relay", w + 1, 3, strength).position - 1, expected, rtol=1e-6, atol=1e-6)


def test_softmax_on_three_levels_is_hestia() -> None:
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)
    expected = torch.sinh(2 * z / _HOTTEST) / (torch.cosh(2 * z / _HOTTEST) + 0.5 * math.exp(1 / _HOTTEST))
    torch.testing.assert_close(_softened("softmax", z + 1, 3, 0.2).position - 1, expected)


def test_softmax_starts_at_the_temperature_that_changes_least() -> None:
    """Of weights that are normal with a mean magnitude of 1 (the absmean scale)."""
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / math.pi)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)

    def error(temperature: float) -> float:
        soft = torch.softmax(-(z[:, None] - levels).square() / temperature, dim=1) @ levels
        return float(((soft - z).square() * density).sum() / density.sum())

    best = min((error(t / 1000), t / 1000) for t in range(300, 401))[1]
    assert abs(best - _HOTTEST) <= 0.002


# ---- of a layer ----


@each_relaxation
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_of_a_layer_at_both_ends(name: str, scheme: str, dtype: torch.dtype) -> None:
    for rule, granularity in (("learned", "channel"), ("least_squares" if scheme == "ternary" else "absmax", "tensor")):
        quantizer = make_weight_quantizer(scheme, rule, granularity)
        source = Latent(quantizer, ESTIMATORS.get("identity"), 0.5)
        weight = torch.randn(9, 16).to(dtype)
        scale = quantizer.compute_scale(weight) if quantizer.learned else None

        def used(strength: float, weight: Tensor = weight, scale: Tensor | None = scale, source: Latent = source) -> Tensor:
            temperature = torch.tensor(4.0)
            return relaxed_weight(weight, scale, temperature, torch.tensor(strength), source, RELAXATIONS.get(name))

        quantized = quantizer.quantize(weight, scale).dequantize(dtype)
        assert torch.equal(used(0.0), weight) and torch.equal(used(1.0), quantized)
        assert not torch.equal(used(0.5), weight) and not torch.equal(used(0.5), quantized)
        if RELAXATIONS.get(name).soften is not None:
            straight = torch.lerp(weight, quantized, torch.tensor(0.5, dtype=dtype))
            assert torch.equal(used(0.5), straight) == (quantizer.grid.levels > MOST_SOFT_LEVELS)


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize(("scheme", "granularity"), [("ternary", "tensor"), ("int2_seq", "channel"), ("int4", "group")])
def test_gradients_of_a_soft_layer(name: str, scheme: str, granularity: str) -> None:
    """Against autograd through the same curve in float64; a learned scale's is weighted as LSQ weights it."""
    size = 8 if granularity == "group" else None
    quantizer = make_weight_quantizer(scheme, "learned", granularity, size)
    source, relaxation = Latent(quantizer, ESTIMATORS.get("identity"), 0.5), RELAXATIONS.get(name)
    assert relaxation.soften is not None
    weight = torch.randn(6, 16, requires_grad=True)
    scale = quantizer.compute_scale(weight).mul(1.1).requires_grad_()
    out = torch.randn(6, 16)
    strength = torch.tensor(0.4)  # softmax and relay use the soft value alone by then
    (relaxed_weight(weight, scale, torch.tensor(4.0), strength, source, relaxation) * out).sum().backward()

    w64, s64 = weight.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    spread = s64.repeat_interleave(16 // scale.shape[1], dim=1).expand(6, 16)
    grid = quantizer.grid
    position = (w64 / spread - (grid.lowest - grid.zero_point)) / grid.step
    soft = _Curve.apply(position, relaxation.soften, grid.levels, strength)
    ((soft * grid.step + grid.lowest - grid.zero_point) * spread * out.double()).sum().backward()
    assert weight.grad is not None and scale.grad is not None and w64.grad is not None and s64.grad is not None
    torch.testing.assert_close(weight.grad, w64.grad.float(), rtol=1e-4, atol=1e-4)
    factor = (weight.numel() / scale.numel() * grid.values[-1]) ** -0.5
    torch.testing.assert_close(scale.grad, s64.grad.float() * factor, rtol=1e-4, atol=1e-3)


class _Curve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, position, soften, levels, strength):  # type: ignore[no-untyped-def]
        soft, slope = soften(position, levels, strength)
        ctx.save_for_backward(slope)
        return soft

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.saved_tensors[0], None, None, None


@each_relaxation
def test_nothing_is_left_at_the_end(name: str) -> None:
    """At strength 1 forward, gradients and quantized weight are those of a layer that never had a relaxation."""
    x = torch.randn(3, 16)
    found = []
    for relaxation in (RELAXATIONS.get(name), RELAXATIONS.get("linear")):
        torch.manual_seed(0)
        layer = make_layer("ternary", "learned", "channel", ste="tanh", size=(16, 8))
        layer.spec = replace(layer.spec, relaxation=relaxation)
        layer.relaxed = True
        y = layer(x)
        y.square().sum().backward()
        assert layer.weight.grad is not None and layer.weight_scale is not None and layer.weight_scale.grad is not None
        found.append((y.detach(), layer.weight.grad, layer.weight_scale.grad, layer.quantized_weight().codes))
    assert all(torch.equal(one, other) for one, other in itertools.zip_longest(*found))
