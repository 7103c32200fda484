"""Weight quantizers: codes, scales, granularities, the latent weight; against formulas written out here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_bitnet.quantizers import (
    GRANULARITIES,
    SCALE_RULES,
    WEIGHT_SCHEMES,
    Grid,
    Quantized,
    WeightQuantizer,
    make_weight_quantizer,
)
from hf_bitnet.quantizers.scales import SMALLEST_SCALE

N, K, GROUP = 6, 24, 8


def _every_quantizer() -> Iterator[WeightQuantizer]:
    for scheme in WEIGHT_SCHEMES:
        for rule in SCALE_RULES:
            for granularity in GRANULARITIES:
                try:
                    yield make_weight_quantizer(scheme, rule, granularity, GROUP if granularity == "group" else None)
                except ValueError:
                    continue  # a rule may refuse a grid; test_bad_input.py checks what it says


QUANTIZERS = list(_every_quantizer())
GRIDS = {name: WEIGHT_SCHEMES.get(name).grid for name in WEIGHT_SCHEMES}
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: f"{q.scheme}-{q.scale_rule}-{q.granularity}")


def _quantize(quantizer: WeightQuantizer, weight: Tensor) -> Quantized:
    return quantizer.quantize(weight, quantizer.compute_scale(weight) if quantizer.learned else None)


def _wide(scale: Tensor, columns: int) -> Tensor:
    """(1, 1), (N, 1) or (N, G) -> (N or 1, columns)."""
    return scale.repeat_interleave(columns // scale.shape[-1], dim=-1)


def _weight(rows: int = N, columns: int = K) -> Tensor:
    # rows of different size and a mean that is not zero: a scale or a mean of the wrong group cannot pass
    return torch.randn(rows, columns) * torch.linspace(0.3, 3.0, rows).unsqueeze(-1) + 0.1


# ---- codes ----


@each_quantizer
def test_value_is_code_minus_zero_point_times_scale(quantizer: WeightQuantizer) -> None:
    weight = _weight()
    quantized = _quantize(quantizer, weight)
    grid, codes = quantizer.grid, quantized.codes
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert quantized.scale.dtype == torch.float32 and quantized.zero_point == grid.zero_point
    assert set(codes.unique().tolist()) <= set(range(grid.lowest, grid.highest + 1, grid.step))
    expected = (codes.double() - grid.zero_point) * _wide(quantized.scale, K).double()
    assert torch.equal(quantized.dequantize(), expected.float())
    assert torch.equal(quantized.dequantize(torch.bfloat16), expected.float().bfloat16())


@each_quantizer
def test_scale_shapes_and_groups(quantizer: WeightQuantizer) -> None:
    weight = _weight()
    shape = {"tensor": (1, 1), "channel": (N, 1), "group": (N, K // GROUP)}[quantizer.granularity]
    assert quantizer.scale_shape(N, K) == shape
    quantized = _quantize(quantizer, weight)
    assert tuple(quantized.scale.shape) == shape
    # a part that has its own scale is quantized as if it were alone
    alone = make_weight_quantizer(quantizer.scheme, quantizer.scale_rule, "tensor")
    for row in range(shape[0]):
        for group in range(shape[1]):
            columns = slice(group * K // shape[1], (group + 1) * K // shape[1])
            part = weight[:, columns] if shape[0] == 1 else weight[row : row + 1, columns]
            single = _quantize(alone, part)
            torch.testing.assert_close(single.scale[0, 0], quantized.scale[row, group], rtol=1e-6, atol=0)
            codes = quantized.codes[:, columns] if shape[0] == 1 else quantized.codes[row : row + 1, columns]
            assert torch.equal(single.codes, codes)


@pytest.mark.parametrize("name", [name for name in WEIGHT_SCHEMES if GRIDS[name].step == 1])
def test_codes_are_the_nearest_and_ties_go_to_even(name: str) -> None:
    grid = GRIDS[name]
    quantizer = make_weight_quantizer(name, "learned", "tensor")
    # a scale of 1/4 is exact in float32, so the ties are exact too; from below the grid to above it
    position = torch.arange(8 * (grid.lowest - 2), 8 * (grid.highest + 2) + 1) / 8
    weight = ((position - grid.zero_point) / 4).unsqueeze(0)
    quantized = quantizer.quantize(weight, torch.full((1, 1), 0.25))
    expected = [min(max(round(p), grid.lowest), grid.highest) for p in position.tolist()]  # Python rounds half to even
    assert quantized.codes[0].tolist() == expected
    values = torch.tensor(grid.values) / 4
    distance = (weight[0, :, None] - values).abs()
    assert torch.equal((quantized.dequantize()[0] - weight[0]).abs(), distance.min(dim=1).values)


def test_binary_is_the_sign_around_the_mean() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 10.0], [-1.0, -2.0, -3.0, -2.0]])
    by_channel = make_weight_quantizer("binary", None, "channel").quantize(weight)
    assert by_channel.codes.tolist() == [[-1, -1, -1, 1], [1, 1, -1, 1]]  # means 4 and -2; the mean itself counts as above
    assert by_channel.scale.tolist() == [[4.0], [2.0]]
    by_tensor = make_weight_quantizer("binary", None, "tensor").quantize(weight)
    assert by_tensor.codes.tolist() == [[1, 1, 1, 1], [-1, -1, -1, -1]]  # mean 1
    assert by_tensor.scale.tolist() == [[3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 48), (1, 7), (33, 130)])
def test_ternary_equals_transformers_weight_quant(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape) * 0.02).to(dtype)
    inverse = 1.0 / weight.float().abs().mean().clamp_(min=1e-5)
    expected = (weight.float() * inverse).round().clamp(-1, 1)
    quantized = make_weight_quantizer("ternary", "absmean", "tensor").quantize(weight)
    assert torch.equal(quantized.codes.float(), expected)
    torch.testing.assert_close(quantized.dequantize(), expected / inverse, rtol=2e-7, atol=0)


@each_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_quantized_in_float32(quantizer: WeightQuantizer, dtype: torch.dtype) -> None:
    weight = _weight().to(dtype)
    half, full = _quantize(quantizer, weight), _quantize(quantizer, weight.float())
    assert torch.equal(half.codes, full.codes) and torch.equal(half.scale, full.scale)


@each_quantizer
def test_strides_and_inputs(quantizer: WeightQuantizer) -> None:
    weight = _weight()
    before = weight.clone()
    strided = weight.t().contiguous().t()
    expected, found = _quantize(quantizer, weight), _quantize(quantizer, strided)
    assert torch.equal(expected.codes, found.codes) and torch.equal(expected.scale, found.scale)
    assert torch.equal(weight, before)


@each_quantizer
def test_no_gradient_and_no_trace_of_autocast(quantizer: WeightQuantizer) -> None:
    weight = _weight().requires_grad_()
    plain = _quantize(quantizer, weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _quantize(quantizer, weight)
    assert torch.equal(plain.codes, cast.codes) and torch.equal(plain.scale, cast.scale)
    assert not plain.scale.requires_grad and cast.scale.dtype == torch.float32


@each_quantizer
def test_zero_groups_keep_a_usable_scale(quantizer: WeightQuantizer) -> None:
    weight = _weight()
    weight[2] = 0.0
    quantized = _quantize(quantizer, weight)
    assert quantized.dequantize().isfinite().all() and (quantized.scale >= SMALLEST_SCALE).all()
    if quantizer.granularity != "tensor":
        assert quantized.dequantize()[2].abs().max() <= 2 * SMALLEST_SCALE


@each_quantizer
def test_position_counts_levels(quantizer: WeightQuantizer) -> None:
    """0 is the lowest level, 1 the next: the chosen level is the nearest to the position (clipped to the grid)."""
    weight = _weight()
    quantized, grid = _quantize(quantizer, weight), quantizer.grid
    position = quantizer.position(weight, quantized.scale)
    index = (quantized.codes.float() - grid.lowest) / grid.step
    assert ((position.clamp(0, grid.levels - 1) - index).abs() <= 0.5 + 1e-4).all()
    if grid.levels > 2:  # and it is linear in the weight
        expected = weight / _wide(quantized.scale, K) + grid.zero_point - grid.lowest
        torch.testing.assert_close(position, expected, rtol=1e-5, atol=1e-4)


# ---- scales ----


@each_quantizer
@pytest.mark.parametrize("factor", [0.125, 3.0, 1e3])
def test_scale_rules_are_homogeneous(quantizer: WeightQuantizer, factor: float) -> None:
    weight = _weight()
    scale, scaled = quantizer.compute_scale(weight), quantizer.compute_scale(weight * factor)
    torch.testing.assert_close(scaled, scale * factor, rtol=1e-6, atol=0)


@each_quantizer
def test_scale_rules_do_not_look_at_the_order(quantizer: WeightQuantizer) -> None:
    quantizer = make_weight_quantizer(quantizer.scheme, quantizer.scale_rule, "channel")
    weight = _weight()
    shuffled = weight[:, torch.randperm(K)]
    torch.testing.assert_close(quantizer.compute_scale(weight), quantizer.compute_scale(shuffled), rtol=1e-6, atol=0)


def test_scale_rules_by_hand() -> None:
    row = torch.tensor([[1.0, -3.0, 0.5, 0.0]])
    ternary, int2, int4 = GRIDS["ternary"], GRIDS["int2"], GRIDS["int4"]
    assert SCALE_RULES.get("absmean")(row, ternary).item() == 1.125
    assert SCALE_RULES.get("absmean")(row, int4).item() == pytest.approx(2 * 1.125 / 7**0.5)
    assert SCALE_RULES.get("absmax")(row, ternary).item() == 3.0
    assert SCALE_RULES.get("absmax")(row, int2).item() == 1.5  # -3 is -2 scales; 1 is at most 1 scale
    assert SCALE_RULES.get("absmax")(-row, int2).item() == 3.0  # +3 is 1 scale
    assert SCALE_RULES.get("threshold")(row, ternary).item() == 2.0  # above 0.7 * 1.125: 1 and 3
    assert SCALE_RULES.get("least_squares")(row, ternary).item() == 3.0  # 9 / 1 beats 16 / 2 and 20.25 / 3


@pytest.mark.parametrize("name", [name for name in WEIGHT_SCHEMES if GRIDS[name].levels > 2])
def test_absmax_clips_nothing_and_is_tight(name: str) -> None:
    grid = GRIDS[name]
    for row in (torch.randn(1, 40), torch.rand(1, 40), -torch.rand(1, 40)):
        inside = row / SCALE_RULES.get("absmax")(row, grid)
        assert inside.min() >= grid.values[0] - 1e-5 and inside.max() <= grid.values[-1] + 1e-5
        ends = torch.minimum((inside.min() - grid.values[0]).abs(), (inside.max() - grid.values[-1]).abs())
        assert ends <= 1e-5


_SWEPT = [name for name in WEIGHT_SCHEMES if 2 < GRIDS[name].levels <= 16]
_ADVERSARIAL = [
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    [-1.0, -1.0, -1.0],
    [1.0, -1.0, 1.0, -1.0],
    [0.0, 0.0, -1.0, 0.0],
    [0.0, 0.0, 1.0, 2.0, 0.0],
    [0.1, 0.2, 0.3, 0.4],
    [-0.1, -0.2, -0.3, -0.4],
    [1.0, 2.0, 4.0, 8.0, -16.0],
    [1e3, 1e-3, 1e-3, -1e-3],
    [0.5, 1.5, 2.5, -0.5, -1.5],
    [3.0],
    [-3.0],
]


def _rows_for(levels: int) -> list[Tensor]:
    size = 12 if levels <= 4 else 9
    random = [torch.randn(size) for _ in range(12)] + [torch.randn(size) ** 3 for _ in range(6)]
    return (
        random
        + [torch.rand(size) for _ in range(3)]
        + [-torch.rand(size) for _ in range(3)]
        + list(map(torch.tensor, _ADVERSARIAL))
    )


def _error(row: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Least squared error of a row at each scale (S,), every weight at its nearest value. float64 (S,)."""
    values = torch.tensor(grid.values, dtype=torch.float64)
    distance = row.double()[None, :, None] - scale.double()[:, None, None] * values
    return distance.square().amin(dim=-1).sum(dim=-1)


def _best_over_all_scales(row: Tensor, grid: Grid) -> float:
    """The least error over every scale: between two neighbouring ties the codes are fixed, and the best scale for fixed
    codes is a projection. Codes are found by the nearest value, not by a sweep."""
    values = torch.tensor(grid.values, dtype=torch.float64)
    middles = (values[1:] + values[:-1]) / 2
    ties = (row.double()[:, None] / middles[middles != 0]).flatten()
    ties = ties[ties > 0].unique()
    if ties.numel() == 0:
        return float(row.double().square().sum())
    inside = torch.cat([ties[:1] / 2, (ties[1:] + ties[:-1]) / 2, ties[-1:] * 2, ties])
    nearest = (row.double()[None, :, None] - inside[:, None, None] * values).abs().argmin(dim=-1)
    levels = values[nearest]
    a, b = (levels * row.double()).sum(dim=-1), levels.square().sum(dim=-1)
    gain = torch.where((b > 0) & (a > 0), a.square() / b.clamp(min=1e-300), torch.zeros_like(a))
    return float(row.double().square().sum() - gain.max())


@pytest.mark.parametrize("name", _SWEPT)
def test_least_squares_equals_brute_force(name: str) -> None:
    grid = GRIDS[name]
    quantizer = make_weight_quantizer(name, "least_squares", "channel")
    for row in _rows_for(grid.levels):
        found = quantizer.quantize(row.unsqueeze(0))
        error = (found.dequantize().double() - row.double()).square().sum().item()
        size = row.double().square().sum().item()
        assert error <= _best_over_all_scales(row, grid) + 1e-6 * size, row
        # nothing between the ties was forgotten either
        around = found.scale.flatten().double() * torch.cat([torch.linspace(0.05, 4, 2000), torch.tensor([0.999999, 1.000001])])
        assert error <= _error(row, around, grid).min().item() + 1e-6 * size, row


@pytest.mark.parametrize("name", [name for name in _SWEPT if GRIDS[name].levels <= 4])
def test_least_squares_equals_all_code_vectors(name: str) -> None:
    grid = GRIDS[name]
    values = torch.tensor(grid.values, dtype=torch.float64)
    for row in [row[:6] for row in _rows_for(grid.levels)]:
        vectors = torch.cartesian_prod(*[values] * len(row)).reshape(-1, len(row))
        a, b = (vectors * row.double()).sum(dim=-1), vectors.square().sum(dim=-1)
        best = torch.where((a > 0) & (b > 0), a.square() / b, torch.zeros_like(a)).max()
        scale = SCALE_RULES.get("least_squares")(row.unsqueeze(0), grid)[:, 0]
        least = row.double().square().sum() - best
        assert _error(row, scale, grid).item() <= least.item() + 1e-6 * row.double().square().sum().item(), row


def test_least_squares_of_binary_is_the_projection() -> None:
    weight = _weight()
    quantized = make_weight_quantizer("binary", "least_squares", "channel").quantize(weight)
    for row, codes, scale in zip(weight, quantized.codes, quantized.scale, strict=True):
        scales = torch.linspace(0.5, 1.5, 101) * scale
        errors = (row - scales.unsqueeze(-1) * codes).square().sum(dim=-1)
        assert errors.argmin() == 50


def test_least_squares_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 16)
    whole = SCALE_RULES.get("least_squares")(weight, GRIDS["int2"])
    monkeypatch.setattr("hf_bitnet.quantizers.scales._SWEPT_AT_ONCE", 5 * 16 * 4)
    assert torch.equal(SCALE_RULES.get("least_squares")(weight, GRIDS["int2"]), whole)
    alone = [SCALE_RULES.get("least_squares")(row.unsqueeze(0), GRIDS["int2"]) for row in weight]
    assert torch.equal(torch.cat(alone), whole)


# Relative error of ternary weights in closed form: absmean, threshold, least squares. TWN's own codes have 0.282 on
# Laplace weights; with its scale and the nearest codes, as here, it is 0.273.
@pytest.mark.parametrize(
    ("distribution", "figures"),
    [
        (torch.distributions.Normal(0.0, 1.0), (0.263, 0.192, 0.190)),
        (torch.distributions.Laplace(0.0, 1.0), (0.393, 0.273, 0.264)),
    ],
    ids=["gaussian", "laplace"],
)
def test_error_of_a_million_weights(
    distribution: torch.distributions.Distribution, figures: tuple[float, float, float]
) -> None:
    weight = distribution.sample((1000, 1000))
    errors = []
    for rule, figure in zip(("absmean", "threshold", "least_squares"), figures, strict=True):
        value = make_weight_quantizer("ternary", rule, "tensor").quantize(weight).dequantize()
        errors.append(((value - weight).square().mean() / weight.square().mean()).item())
        assert errors[-1] == pytest.approx(figure, rel=0.01)
    assert errors == sorted(errors, reverse=True)


# ---- back to float weights ----


@each_quantizer
def test_latent_gives_the_codes_back(quantizer: WeightQuantizer) -> None:
    weight = _weight(16, 64)
    quantized = _quantize(quantizer, weight)
    try:
        latent = quantizer.latent(quantized)
    except ValueError as error:
        assert "weight_scale='learned'" in str(error) and not quantizer.learned
        return
    back = quantizer.quantize(latent, quantized.scale if quantizer.learned else None)
    assert latent.dtype == torch.float32
    assert torch.equal(back.codes, quantized.codes)
    torch.testing.assert_close(back.scale, quantized.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WEIGHT_SCHEMES.names())
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_default_rules_never_refuse_their_own_codes(name: str, granularity: str) -> None:
    quantizer = make_weight_quantizer(name, None, granularity)
    for spread in (1.0, 3.0):
        quantized = quantizer.quantize(torch.randn(24, 96).abs().pow(spread) * torch.randn(24, 96).sign())
        quantizer.latent(quantized)


@pytest.mark.parametrize("name", WEIGHT_SCHEMES.names())
def test_learned_latent_works_for_any_codes(name: str) -> None:
    """Codes of another origin (GPTQ, a foreign checkpoint): with a learned scale nothing is refused."""
    grid = GRIDS[name]
    quantizer = make_weight_quantizer(name, "learned", "channel")
    codes = (torch.randint(0, grid.levels, (8, 40)) * grid.step + grid.lowest).to(torch.int8)
    quantized = Quantized(codes, torch.rand(8, 1) + 0.01, grid.zero_point)
    assert torch.equal(quantizer.quantize(quantizer.latent(quantized), quantized.scale).codes, codes)


@pytest.mark.parametrize("name", WEIGHT_SCHEMES.names())
def test_a_learned_scale_that_fell_below_zero_is_held_at_the_floor(name: str) -> None:
    quantizer = make_weight_quantizer(name, "learned", "channel")
    quantized = quantizer.quantize(_weight(3), torch.tensor([[0.0], [-1.0], [0.5]]))
    torch.testing.assert_close(quantized.scale, torch.tensor([[SMALLEST_SCALE], [SMALLEST_SCALE], [0.5]]))
    assert quantized.dequantize().isfinite().all()
