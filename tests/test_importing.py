"""Recognition of the grid that float weights lie on, and the fitting of foreign codes into a scheme."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_bitnet.importing import Found, Levels, Misfit, fit, recognise
from hf_bitnet.importing.codes import _has_any, _present
from hf_bitnet.quantizers import WEIGHT_SCHEMES

SHAPES = [(48, 64), (7, 96), (1, 32), (33, 512)]
SCALES = ("tensor", "channel", 16, 32)
CASES = [
    (scheme, shape, scales)
    for scheme in WEIGHT_SCHEMES
    for shape in SHAPES
    for scales in SCALES
    if isinstance(scales, str) or (shape[1] > scales and shape[1] % scales == 0)
]


def scale_shape(scales: str | int, shape: tuple[int, int]) -> tuple[int, int]:
    if isinstance(scales, int):
        return shape[0], shape[1] // scales
    return (1, 1) if scales == "tensor" else (shape[0], 1)


def drawn(scheme: str, shape: tuple[int, int], scales: str | int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values on the grid of a scheme, and their scales, which are numbers of `dtype`."""
    values = torch.tensor(WEIGHT_SCHEMES.get(scheme).grid.values)
    scale = ((torch.rand(scale_shape(scales, shape)) + 0.1) * 0.03).to(dtype).float()
    levels = values[torch.randint(len(values), shape)]
    return (levels.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1), scale


def same(found: Found | Misfit, weight: Tensor) -> bool:
    return isinstance(found, Found) and torch.equal(found.quantized.dequantize(), weight)


# ---- recognition ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("scheme", "shape", "scales"), CASES)
def test_recognises_every_grid(scheme: str, shape: tuple[int, int], scales: str | int, dtype: torch.dtype) -> None:
    weight, scale = drawn(scheme, shape, scales, dtype)
    found = recognise(weight)
    assert isinstance(found, Found), found
    assert same(found, weight)
    kind = WEIGHT_SCHEMES.get(scheme)
    assert found.quantizer.storage_bits <= kind.storage_bits, "a wider scheme than the one it was made with"
    assert found.quantized.scale.numel() <= scale.numel()
    grid = found.quantizer.grid
    codes = found.quantized.codes
    assert codes.dtype == torch.int8 and grid.lowest <= int(codes.min()) and int(codes.max()) <= grid.highest


@pytest.mark.parametrize(
    ("weight", "scheme", "granularity"),
    [
        (torch.zeros(4, 32), "ternary", "tensor"),
        (torch.full((4, 32), 0.5), "binary", "tensor"),
        (torch.full((4, 32), -0.5), "binary", "tensor"),
        (torch.tensor([[0.5], [0.25], [-2.0]]).expand(3, 32), "binary", "channel"),
        # rows of zeros between others
        (torch.tensor([[0.5], [0.0], [0.25]]) * torch.tensor([1.0, -1.0, 0.0]).repeat(16), "ternary", "channel"),
        (torch.tensor([[0.0], [0.0], [0.25]]) * torch.tensor([1.0, -1.0, 0.0]).repeat(16), "ternary", "tensor"),
        (torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(3, 8) * 0.1, "int2", "tensor"),
        (torch.tensor([-0.5, 1.5, 0.5, -1.5]).repeat(3, 8) * 0.1, "int2_seq", "tensor"),
        (torch.tensor([3.0, 0.0, -1.0, 2.0]).repeat(3, 8) * 0.1, "int4", "tensor"),
        (torch.tensor([100.0, 0.0, -1.0, 2.0]).repeat(3, 8) * 0.1, "int8", "tensor"),
        # nine levels of a tensor, or three of a group
        (
            torch.arange(1.0, 9.0).repeat_interleave(16).repeat(2, 1) * torch.tensor([1.0, 0.0, -1.0, 1.0]).repeat(32),
            "ternary",
            "group",
        ),
        (torch.rand(2, 8).repeat_interleave(16, dim=1) * torch.tensor([1.0, 0.0, -1.0, 1.0]).repeat(32), "ternary", "group"),
    ],
    ids=range(12),
)
def test_special_weights(weight: Tensor, scheme: str, granularity: str) -> None:
    found = recognise(weight)
    assert isinstance(found, Found), found
    assert same(found, weight)
    assert (found.quantizer.scheme, found.quantizer.granularity) == (scheme, granularity)
    assert bool((found.quantized.scale > 0).all())


def test_random_weights_lie_on_no_grid() -> None:
    for shape in SHAPES:
        found = recognise(torch.randn(shape))
        assert isinstance(found, Misfit) and "lie on no grid" in found.reason
    almost = torch.randint(-1, 2, (32, 64)) * 0.02
    almost[5, 7] = torch.nextafter(almost[5, 7], torch.tensor(1.0)) if almost[5, 7] else torch.tensor(1e-9)
    found = recognise(almost)
    assert isinstance(found, Misfit) or found.quantizer.storage_bits > 2, "one weight is beside the grid"


def test_rounded_values_are_not_on_the_grid_they_came_from() -> None:
    weight, _ = drawn("int4", (32, 64), "channel", torch.float32)
    assert isinstance(recognise(weight.bfloat16()), Misfit)
    ternary, _ = drawn("ternary", (32, 64), "channel", torch.float32)
    assert same(recognise(ternary.bfloat16()), ternary.bfloat16().float())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_numbers(number: float) -> None:
    weight, scale = torch.ones(2, 32), torch.ones(2, 1)
    weight[1, 3] = scale[1] = number
    misfit = recognise(weight)
    assert isinstance(misfit, Misfit) and "1 NaN or infinite" in misfit.reason
    misfit = fit(Levels(torch.ones(2, 32, dtype=torch.int16), scale, 2))
    assert isinstance(misfit, Misfit) and "1 of its scales are NaN or infinite" in misfit.reason


# ---- fitting ----


def levels(*numbers: int, rows: int = 2, columns: int = 32) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int16).repeat(rows, columns // len(numbers))


@pytest.mark.parametrize(
    ("numbers", "bits", "scheme"),
    [
        ((-1, 1), 2, "binary"),
        ((-1, 0), 2, "ternary"),
        ((-2, 1), 2, "int2"),
        ((-3, -1, 1, 3), 4, "int2_seq"),  # -1.5 to 1.5 at twice the scale
        ((-2, -3, 1, 3), 4, "int4"),
        ((-4, 3), 3, "int4"),
        ((-8, 0, 8, 8), 4, "ternary"),  # a factor that all share goes into the scale
        ((-127, 127), 8, "binary"),
        ((-64, 63), 8, "int8"),
    ],
)
def test_fits_the_narrowest(numbers: tuple[int, ...], bits: int, scheme: str) -> None:
    scale = torch.tensor([[0.5, 0.25], [0.5, 2.0]])
    found = fit(Levels(levels(*numbers), scale, bits))
    assert isinstance(found, Found), found
    assert found.quantizer.scheme == scheme and found.quantizer.group_size == 16
    assert same(found, levels(*numbers) * scale.repeat_interleave(16, dim=1))


@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], (1, 1)),
        ([[0.5, 0.5], [0.25, 0.25]], (2, 1)),
        ([[0.5, 0.25], [0.5, 0.25]], (2, 2)),
        ([[0.5, 0.5, 0.25, 0.25], [2.0, 2.0, 1.0, 1.0]], (2, 2)),
        ([[0.5, 0.5, 0.25, 0.25], [2.0, 2.0, 1.0, 0.5]], (2, 4)),
        ([[-0.5, 0.5], [0.5, -0.5]], (1, 1)),  # a negative scale turns its levels round
    ],
)
def test_fewest_scales(scale: list[list[float]], shape: tuple[int, int]) -> None:
    given = torch.tensor(scale)
    found = fit(Levels(levels(-1, 0, 1, 1), given, 2))
    assert isinstance(found, Found)
    assert found.quantized.scale.shape == shape
    assert same(found, levels(-1, 0, 1, 1) * given.repeat_interleave(32 // given.shape[1], dim=1))


def test_scale_of_zeros_is_any() -> None:
    several = levels(-1, 0, 1, 1, rows=3)
    several[1] = 0
    found = fit(Levels(several, torch.tensor([[0.5], [7.0], [0.5]]), 2))
    assert isinstance(found, Found) and found.quantized.scale.tolist() == [[0.5]]
    found = fit(Levels(several, torch.tensor([[0.5], [0.0], [0.25]]), 2))
    assert isinstance(found, Found) and found.quantized.scale.tolist() == [[0.5], [0.375], [0.25]]


def test_levels_far_apart() -> None:
    """Further than int16 counts."""
    misfit = fit(Levels(torch.tensor([[-20000, 20000, 1, 0]], dtype=torch.int16), torch.ones(1, 1), 8))
    assert isinstance(misfit, Misfit) and "8-bit levels go from -20000 to 20000" in misfit.reason


@pytest.mark.parametrize(("numbers", "bits"), [((-8, 7), 4), ((-1, 2), 2), ((-128, 5), 8), ((-255, 255, 1), 8)])
def test_levels_outside(numbers: tuple[int, ...], bits: int) -> None:
    foreign = Levels(levels(*numbers, columns=len(numbers) * 8), torch.ones(1, 1), bits)
    misfit = fit(foreign)
    assert isinstance(misfit, Misfit)
    assert (
        f"its {bits}-bit levels go from {min(numbers)} to {max(numbers)}" in misfit.reason and "outside='clip'" in misfit.reason
    )
    wider = fit(foreign, "wider")
    if bits == 8:
        assert isinstance(wider, Misfit) and "outside='wider'" not in wider.reason
    else:
        assert same(wider, foreign.levels.float()) and "outside='wider'" in misfit.reason
    clipped = fit(foreign, "clip")
    assert isinstance(clipped, Found)
    grid = clipped.quantizer.grid
    assert clipped.quantizer.storage_bits == bits
    assert torch.equal(clipped.quantized.codes, foreign.levels.clamp(grid.lowest, grid.highest).to(torch.int8))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_weights_without_rows_or_columns(shape: tuple[int, int]) -> None:
    misfit = recognise(torch.zeros(shape))
    assert isinstance(misfit, Misfit) and misfit.reason == f"it has shape {shape}, which holds no weights"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float32])
@pytest.mark.parametrize("columns", [1, 3, 4, 8, 24, 33])
def test_rows_that_are_not_all_zero(dtype: torch.dtype, columns: int) -> None:
    """Whatever their length, dtype and place in memory; a negative zero is a zero."""
    torch.manual_seed(columns)
    storage = (torch.rand(50 * columns + 5) > 1 - 1 / columns).to(dtype) * -1
    for offset in range(5):
        rows = storage[offset : offset + 50 * columns].view(50, columns)
        expected = torch.tensor([any(value != 0 for value in row) for row in rows.tolist()])
        assert torch.equal(_has_any(rows), expected) and torch.equal(_has_any(rows[::2]), expected[::2])
    assert not _has_any(torch.full((2, 8), -0.0)).any()


def test_levels_that_begin_alike() -> None:
    """Counting ends when all levels between the ends were seen, and not before."""
    levels = torch.zeros(3000, 1024, dtype=torch.int8)
    levels[-1, -3:] = torch.tensor([-7, 3, 7])
    assert _present(levels) == [-7, 0, 3, 7] and _present(levels[:2]) == [0]
    assert _present(torch.tensor([[-32768, 32767]], dtype=torch.int16)) == [-32768, 32767]


def test_a_factor_that_a_byte_does_not_hold() -> None:
    """-128 and 0 alone become -1 and 0, and no weight changes its sign."""
    levels = torch.tensor([[-128, 0, 0, -128] * 8], dtype=torch.int8)
    got = fit(Levels(levels, torch.full((1, 1), 0.5), 8))
    assert isinstance(got, Found)
    assert torch.equal(got.quantized.dequantize(), levels.float() * 0.5)
