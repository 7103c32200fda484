"""Codes and scales from Hessians, and the float weights behind them, against slow definitions written out here."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_bitnet.calibration import gptq
from hf_bitnet.quantizers import (
    GRANULARITIES,
    SCALE_RULES,
    WEIGHT_SCHEMES,
    Quantized,
    WeightQuantizer,
    latent_near,
    make_weight_quantizer,
    representable,
)
from hf_bitnet.quantizers.scales import weighted_least_squares

N, K, GROUP = 6, 24, 8
LOW_BIT = [name for name in WEIGHT_SCHEMES if WEIGHT_SCHEMES.get(name).grid.levels <= 16]


def _every_quantizer() -> list[WeightQuantizer]:
    found = []
    for scheme, rule, granularity in itertools.product(LOW_BIT, SCALE_RULES, GRANULARITIES):
        try:
            found.append(make_weight_quantizer(scheme, rule, granularity, GROUP if granularity == "group" else None))
        except ValueError:
            continue
    return found


each_quantizer = pytest.mark.parametrize(
    "quantizer", _every_quantizer(), ids=lambda q: f"{q.scheme}-{q.scale_rule}-{q.granularity}"
)
each_granularity = pytest.mark.parametrize("shape", [(1, 1), (N, 1), (N, K // GROUP)], ids=["tensor", "channel", "group"])
each_grid = pytest.mark.parametrize("name", LOW_BIT)


def _weight() -> Tensor:
    return torch.randn(N, K) * torch.linspace(0.3, 3.0, N).unsqueeze(-1) + 0.1


def _hessian(tokens: int = 200) -> Tensor:
    """Of inputs whose features are correlated and of different size."""
    mixed = torch.randn(tokens, K) @ torch.randn(K, K) * torch.linspace(0.2, 2.0, K)
    return gptq.damped(mixed.t() @ mixed, 0.01)


def _error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    difference = (weight - quantized.dequantize()).double()
    return float((difference @ hessian.double() * difference).sum())


def _rounded(name: str, weight: Tensor, shape: tuple[int, int]) -> Quantized:
    granularity = "tensor" if shape == (1, 1) else "channel" if shape[1] == 1 else "group"
    quantizer = make_weight_quantizer(name, "learned", granularity, GROUP if granularity == "group" else None)
    return quantizer.quantize(weight, quantizer.compute_scale(weight))


# ---- scales ----


@each_grid
def test_weighted_least_squares_equals_all_code_vectors(name: str) -> None:
    grid = WEIGHT_SCHEMES.get(name).grid
    n = 3 if grid.levels > 4 else 5
    codes = torch.tensor(list(itertools.product(grid.values, repeat=n)), dtype=torch.float64)
    for trial in range(30):
        row, importance = torch.randn(n), torch.rand(n) ** 3
        if trial % 3 == 0:
            importance[0] = 0.0  # a weight that does not count at all
        h = importance.double()
        a, b = (codes * row.double() * h).sum(-1), (codes.square() * h).sum(-1)
        best = (a.clamp(min=0) ** 2 / b.clamp(min=1e-30)).max()
        scale = weighted_least_squares(row.unsqueeze(0), grid, importance.unsqueeze(0)).double()
        nearest = (row.double() / scale[0, 0]).unsqueeze(-1) - torch.tensor(grid.values, dtype=torch.float64)
        error = float((h * (nearest.abs().amin(-1) * scale[0, 0]).square()).sum())
        total = float((h * row.double().square()).sum())
        assert error <= total - float(best) + 1e-6 * total


@each_grid
def test_equal_importance_changes_nothing(name: str) -> None:
    grid, rows = WEIGHT_SCHEMES.get(name).grid, torch.randn(5, 40)
    plain = SCALE_RULES.get("least_squares")(rows, grid)
    assert torch.allclose(weighted_least_squares(rows, grid, torch.full((5, 40), 3.0)), plain, rtol=1e-6)


@each_grid
@each_granularity
def test_refit_is_the_minimum_over_all_scales(name: str, shape: tuple[int, int]) -> None:
    weight, hessian = _weight(), _hessian()
    start = _rounded(name, weight, shape)
    found = gptq.refit(weight, start, hessian)
    assert torch.equal(found.codes, start.codes) and found.scale.shape == shape
    scale = found.scale.double().requires_grad_()
    levels = (found.codes.double() - found.zero_point).unflatten(-1, (shape[1], -1))
    difference = weight.double() - (levels * scale.unsqueeze(-1)).flatten(-2)
    error = (difference @ hessian.double() * difference).sum()
    (slope,) = torch.autograd.grad(error, scale)
    moved = found.scale != start.scale
    error = error.detach()
    assert moved.any() and float(error) < _error(weight, start, hessian)
    # the slope in units of the error: a relative change of the scale changes nothing
    assert ((slope * scale.detach()).abs()[moved] / float(error) < 1e-3).all()


# ---- codes ----


def _slow_gptq(weight: Tensor, scale: Tensor, name: str, hessian: Tensor) -> Tensor:
    """GPTQ by its definition: round a column, then move the open ones to where the error is least, by a solve."""
    values = torch.tensor(WEIGHT_SCHEMES.get(name).grid.values, dtype=torch.float64)
    w, h, scales = weight.double().clone(), hessian.double(), gptq.wide(scale, weight).double()
    open_columns = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    levels = torch.zeros_like(w)
    while open_columns:
        j = open_columns.pop(0)
        levels[:, j] = values[((w[:, j] / scales[:, j]).unsqueeze(-1) - values).abs().argmin(-1)]
        error = w[:, j] - levels[:, j] * scales[:, j]
        if open_columns:
            r = open_columns
            w[:, r] += error.unsqueeze(-1) * torch.linalg.solve(h[r][:, r], h[r, j])
    return levels


@each_grid
@each_granularity
def test_gptq_equals_its_definition(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_BLOCK", 7)  # blocks that do not divide the columns
    weight, hessian = _weight(), _hessian()
    scale, grid = _rounded(name, weight, shape).scale, WEIGHT_SCHEMES.get(name).grid
    found = gptq.gptq(weight, scale, grid, hessian)
    same = found.levels(torch.float64) == _slow_gptq(weight, scale, name, hessian)
    assert same.float().mean() > 0.99, "more than a tie was decided otherwise"
    assert _error(weight, found, hessian) < _error(weight, _rounded(name, weight, shape), hessian)


@each_grid
def test_gptq_without_correlation_is_plain_rounding(name: str) -> None:
    weight, grid = _weight(), WEIGHT_SCHEMES.get(name).grid
    plain = _rounded(name, weight, (N, 1))
    found = gptq.gptq(weight, plain.scale, grid, torch.diag(torch.rand(K) + 0.1))
    values = torch.tensor(grid.values)
    nearest = values[((weight / plain.scale).unsqueeze(-1) - values).abs().argmin(-1)]
    assert torch.equal(found.levels(torch.float32), nearest)


@each_grid
@each_granularity
def test_descent_never_goes_up_and_ends_where_no_code_alone_helps(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "_BLOCK", 7)
    weight, hessian, grid = _weight(), _hessian(), WEIGHT_SCHEMES.get(name).grid
    found = _rounded(name, weight, shape)
    before = errors = _error(weight, found, hessian)
    for _ in range(30):
        found = gptq.descend(weight, found, grid, hessian)
        now = _error(weight, found, hessian)
        assert now <= errors * (1 + 1e-5)
        errors = now
    assert errors < before
    for code in range(grid.lowest, grid.highest + 1, grid.step):
        for column in range(0, K, 5):
            codes = found.codes.clone()
            codes[2, column] = code
            assert _error(weight, found._replace(codes=codes), hessian) >= errors * (1 - 1e-5)


@pytest.mark.parametrize("kind", ["no input at all", "one token", "dead inputs"])
def test_hessians_without_full_rank(kind: str) -> None:
    x = torch.randn(1 if kind == "one token" else 50, K)
    x = x * 0 if kind == "no input at all" else x
    x[:, 5:9] = 0 if kind == "dead inputs" else x[:, 5:9]
    weight, grid = _weight(), WEIGHT_SCHEMES.get("ternary").grid
    hessian = gptq.damped(x.t() @ x, 1e-6)
    plain = _rounded("ternary", weight, (N, 1))
    found = gptq.refit(weight, gptq.gptq(weight, plain.scale, grid, hessian), hessian)
    assert torch.isfinite(found.scale).all() and (found.scale > 0).all()
    assert _error(weight, found, hessian) <= _error(weight, plain, hessian) * (1 + 1e-5)
    if kind != "one token":  # what has no input has no error to make up for: it is rounded
        silent = slice(5, 9) if kind == "dead inputs" else slice(0, K)
        assert torch.equal(gptq.gptq(weight, plain.scale, grid, hessian).codes[:, silent], plain.codes[:, silent])


# ---- latents ----


# int4's absmean puts the scale at 2 mean|w| / sqrt(7), far from where any fit puts it: no weight has both
@each_quantizer
def test_latents_give_the_codes_and_the_scale(quantizer: WeightQuantizer) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        weight = _weight()
        start = quantizer.quantize(weight, quantizer.compute_scale(weight) if quantizer.learned else None)
        wanted = gptq.gptq(weight, start.scale * 1.1, quantizer.grid, _hessian())
        wanted = representable(quantizer, wanted, weight)
        latent = latent_near(quantizer, wanted, weight)
        assert latent.shape == weight.shape and latent.dtype == torch.float32
        back = quantizer.quantize(latent, wanted.scale if quantizer.learned else None)
        apart = (back.dequantize() - wanted.dequantize()).abs().reshape(wanted.scale.numel(), -1).amax(-1)
        held = apart < 1e-4 * wanted.scale.flatten()
        if quantizer.grid.levels > 3 and quantizer.scale_rule == "absmean":
            continue
        assert held.all(), apart
        if quantizer.scale_rule != "least_squares":  # which may find other codes and another scale for the same values
            assert torch.equal(back.codes, wanted.codes)


def test_a_latent_inside_its_cell_stays_where_it_is() -> None:
    quantizer = make_weight_quantizer("ternary", "learned", "tensor")
    codes = torch.tensor([[-1, 0, 1, 1, 0, -1]], dtype=torch.int8)
    near = torch.tensor([[-2.5, 0.3, 0.7, 0.1, -0.8, 0.4]])
    latent = latent_near(quantizer, Quantized(codes, torch.ones(1, 1)), near)
    assert torch.allclose(latent, torch.tensor([[-2.5, 0.3, 0.7, 0.55, -0.45, -0.55]]))


@each_quantizer
@pytest.mark.parametrize("only", [0, -1], ids=["lowest", "highest"])
def test_codes_that_a_rule_cannot_give_are_mended_by_one_weight_of_a_group(quantizer: WeightQuantizer, only: int) -> None:
    grid, weight = quantizer.grid, _weight()
    code = 0 if grid.zero_point == 0 and grid.levels > 2 else (grid.lowest, grid.highest)[only]
    codes = torch.full((N, K), code, dtype=torch.int8)
    scale = torch.full(quantizer.scale_shape(N, K), 0.7)
    wanted = representable(quantizer, Quantized(codes, scale, grid.zero_point), weight)
    changed = (wanted.codes != codes).reshape(scale.numel(), -1).sum(-1)
    assert (changed == 0).all() if quantizer.learned and grid.levels > 2 else (changed <= 1).all()
    if quantizer.scale_rule in ("absmax", "threshold") or grid.levels <= 3:
        back = quantizer.quantize(latent_near(quantizer, wanted, weight), wanted.scale if quantizer.learned else None)
        assert torch.allclose(back.dequantize(), wanted.dequantize(), rtol=1e-4, atol=1e-6)
