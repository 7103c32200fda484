"""The products of backward, in fixed point or with AMX tiles: what they round, and how close to float64 gradients stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.kernels import dispatch, reference
from hf_bitnet.kernels.cpu import fixed, library
from hf_bitnet.modules import BitLinear
from tests.layers import Reference, double, make_layer
from tests.trained import batch, trained_llama

REASON = library.why_unavailable()
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TOKENS, IN, OUT = 256, 96, 64  # above the size from which fixed point serves
BAR = 1.2  # times the error that full precision makes in bfloat16


def _error(found: Tensor | None, exact: Tensor | None) -> float:
    """Root mean square of the difference, relative to that of `exact`."""
    assert found is not None and exact is not None and found.shape == exact.shape
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- the product ----


def _rounded(a: Tensor) -> Tensor:
    """float (M, K) -> float64, each row in steps of its largest magnitude / 32512."""
    step = a.double().abs().amax(dim=1, keepdim=True) / 32512
    return torch.where(step > 0, (a.double() / step).round() * step, 0.0)


def _operands(m: int = 70, k: int = 130, n: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """a (m, k), a_scale (k), codes (k, n)."""
    codes = torch.randint(-128, 128, (k, n), dtype=torch.int8)
    return torch.randn(m, k), torch.rand(k) + 0.5, codes


@pytest.fixture
def no_tiles() -> Iterator[None]:
    """AMX multiplies bfloat16 as it is; every other level rounds it to fixed point."""
    level = library.level()
    if level == "amx":
        library.choose_level("avx512vnni")
    yield
    library.choose_level(level)


@needs_library
@pytest.mark.usefixtures("no_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_the_rounding_to_fixed_point_separates_it_from_float64(dtype: torch.dtype) -> None:
    a, a_scale, codes = _operands()
    a = a.to(dtype)
    found = fixed.fixed_matmul(a, a_scale, codes, -0.5, torch.tensor([[0.3]]), torch.float32)
    scaled = a.float() * a_scale
    exact = reference.fixed_matmul(_rounded(scaled), None, codes, -0.5, torch.tensor(0.3), torch.float64)
    # the step is found in float32: a value in the middle of two may go to either
    assert _error(found, exact) < 6e-6
    # and the rounding is there: without it the test above would say nothing
    assert _error(found, reference.fixed_matmul(scaled, None, codes, -0.5, torch.tensor(0.3), torch.float64)) > 2e-5


@needs_library
@pytest.mark.skipif("amx" not in (() if REASON else library.legal_levels()), reason="this processor has no AMX tiles")
@pytest.mark.parametrize(("m", "k", "n"), [(64, 96, 70), (70, 130, 50), (96, 4160, 33)], ids=["in place", "copied", "in parts"])
def test_amx_rounds_bfloat16_no_further(m: int, k: int, n: int) -> None:
    a, a_scale, codes = _operands(m, k, n)
    for operand in (a.bfloat16(), a.t().contiguous().t().bfloat16()):
        found = fixed.fixed_matmul(operand, None, codes, 0.0, torch.tensor([[0.3]]), torch.float32)
        exact = reference.fixed_matmul(operand, None, codes, 0.0, torch.tensor(0.3), torch.float64)
        assert _error(found, exact) < 1e-6
        # a scale along K costs one rounding to bfloat16, of the operand or of the codes
        found = fixed.fixed_matmul(operand, a_scale, codes, 0.0, None, torch.float32)
        exact = reference.fixed_matmul(operand, a_scale, codes, 0.0, None, torch.float64)
        assert 5e-4 < _error(found, exact) < 2.5e-3
        operand[3, 5] = float("inf")
        found = fixed.fixed_matmul(operand, None, codes, 0.0, None, torch.float32)
        assert not found[3].isfinite().any() and found[:3].isfinite().all() and found[4:].isfinite().all()


@needs_library
def test_one_large_value_costs_its_own_row_only() -> None:
    a, _, codes = _operands()
    a[3, 5] = 1e6
    exact = reference.fixed_matmul(a, None, codes, 0.0, None, torch.float64)
    found = fixed.fixed_matmul(a, None, codes, 0.0, None, torch.float32)
    rest = [row for row in range(a.shape[0]) if row != 3]
    assert _error(found[rest], exact[rest]) < 1e-4
    assert (found[3] - exact[3]).abs().max() <= 1e6 / 65024 * 128 * a.shape[1]


@needs_library
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_shows_in_its_row(bad: float) -> None:
    a, _, codes = _operands()
    a[3, 5] = bad
    found = fixed.fixed_matmul(a, None, codes, 0.0, None, torch.float32)
    assert found[3].isnan().all()
    assert found[:3].isfinite().all() and found[4:].isfinite().all()


@needs_library
def test_long_sums_do_not_overflow() -> None:
    """Both operands at their extremes: 2**31 is passed after 131,072 products of -128 and 128."""
    k = 2**17 + 100
    a, codes = torch.ones(2, k), torch.full((k, 2), -128, dtype=torch.int8)
    assert fixed.fixed_matmul(a, None, codes, 0.0, None, torch.float32).tolist() == [[-128.0 * k] * 2] * 2


@needs_library
def test_parts_of_a_long_sum_use_their_own_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    a, a_scale, codes = _operands()
    scale = torch.tensor([[0.3]])
    whole = fixed.fixed_matmul(a, a_scale, codes, -0.5, scale, torch.float32)
    monkeypatch.setattr(fixed, "_SUMMED_AT_ONCE", 33)
    assert _error(fixed.fixed_matmul(a, a_scale, codes, -0.5, scale, torch.float32), whole) < 1e-4


@needs_library
def test_any_strides() -> None:
    a, a_scale, codes = _operands()
    expected = fixed.fixed_matmul(a, a_scale, codes, 0.0, None, torch.float32)
    wide = torch.randn(2 * a.shape[0], 3 * a.shape[1])
    wide[::2, ::3] = a
    for other in (a.t().contiguous().t(), wide[::2, ::3]):
        found = fixed.fixed_matmul(other, a_scale, codes.t().contiguous().t(), 0.0, None, torch.float32)
        assert torch.equal(found, expected)
    row = a[:1].expand(a.shape[0], -1)
    assert torch.equal(fixed.fixed_matmul(row, a_scale, codes, 0.0, None, torch.float32)[9], expected[0])


def test_sizes_that_do_not_fit_are_refused() -> None:
    a, a_scale, codes = _operands()
    with pytest.raises(ValueError, match=r"codes of .* fit no left operand"):
        fixed.fixed_matmul(a, a_scale, codes[1:], 0.0, None, torch.float32)
    with pytest.raises(ValueError, match=r"scales of shape .* fit no left operand"):
        fixed.fixed_matmul(a, a_scale[1:], codes, 0.0, None, torch.float32)


# ---- a layer ----


def _gradients(layer: nn.Module, x: Tensor, out: Tensor, bf16: bool) -> tuple[Tensor, Tensor]:
    """dL/dx and dL/dweight of L = sum(layer(x) * out)."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(leaf)
    y.backward(out.to(y.dtype))
    assert leaf.grad is not None and isinstance(layer.weight, Tensor) and layer.weight.grad is not None
    return leaf.grad, layer.weight.grad


def _heavy_tailed(*shape: int) -> Tensor:
    """As gradients of a loss are: a few tokens have much larger ones than the rest."""
    return torch.randn(*shape) * torch.exp(1.5 * torch.randn(shape[0], 1))


def _exact(layer: BitLinear, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    reference_layer, x64 = Reference(layer), double(x)
    (reference_layer(x64) * out.double()).sum().backward()
    assert x64.grad is not None and reference_layer.weight.grad is not None
    return x64.grad, reference_layer.weight.grad


def _errors_in_bfloat16(x: Tensor, out: Tensor) -> tuple[float, float]:
    """Of a full-precision layer's gradients by the input and by the weight."""
    linear = nn.Linear(IN, OUT)
    exact = _gradients(copy.deepcopy(linear).double(), x.double(), out.double(), bf16=False)
    found = _gradients(linear, x, out, bf16=True)
    return _error(found[0], exact[0]), _error(found[1], exact[1])


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scheme", ["binary", "ternary", "int2_seq", "int4", "int8"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
def test_gradients_of_a_layer_are_as_exact_as_in_bfloat16(scheme: str, granularity: str, bf16: bool) -> None:
    x, out = torch.randn(TOKENS, IN), _heavy_tailed(TOKENS, OUT).bfloat16().float()
    group = 32 if granularity == "group" else None
    layer = make_layer(scheme, granularity=granularity, group_size=group, size=(IN, OUT))
    exact = _exact(layer, x, out)
    found = _gradients(layer, x, out, bf16)
    for name, mine, theirs, bar in zip(("x", "weight"), found, exact, _errors_in_bfloat16(x, out), strict=True):
        assert _error(mine, theirs) <= BAR * bar, name


@needs_library
def test_a_layer_of_this_size_uses_fixed_point() -> None:
    """Otherwise the test above would be about torch's product."""
    assert TOKENS * IN * OUT >= fixed._WORTH_IT
    assert dispatch.bodies("fixed_matmul")[0].why_unavailable("cpu") is None


# ---- a model ----


def _model_gradients(model: nn.Module, data: dict[str, Tensor], bf16: bool) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**data).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "proj" in name}


def _model_error(model: nn.Module, data: dict[str, Tensor], bf16: bool) -> float:
    """Of the gradients of all projections together."""
    exact = _model_gradients(copy.deepcopy(model).double(), data, bf16=False)
    found = _model_gradients(model, data, bf16)
    assert found.keys() == exact.keys() and found
    return _error(*(torch.cat([grads[name].flatten() for name in exact]) for grads in (found, exact)))


@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
def test_gradients_of_a_model_are_as_exact_as_in_bfloat16(bf16: bool) -> None:
    data = batch()
    bar = _model_error(trained_llama(), data, bf16=True)
    quantized = hb.quantize_model(trained_llama(), hb.BitNetQuantizationConfig.bitnet_b158())
    assert _model_error(quantized, data, bf16) <= BAR * bar
