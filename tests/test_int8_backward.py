"""Int8 gradients in a layer's backward: the formulas in float64, what they round, where the exact products serve, the meter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from hf_bitnet.modules import QuantizedLayer
from hf_bitnet.modules.low_precision import (
    _MOST_TERMS,
    PRODUCTS,
    SMALLEST_RANGE,
    UNMEASURED,
    Int8Backward,
    Meter,
    input_gradient,
    legal_products,
    value_gradient,
)
from hf_bitnet.quantizers import ACTIVATION_SCHEMES, Quantized
from tests.layers import FORMS, IN, OUT, SCHEMES, each_form, make_layer

TOKENS = 40


def _error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of `exact`."""
    assert found.shape == exact.shape
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def _rounded(a: Tensor) -> Tensor:
    """float64, each row in steps of its largest magnitude / 127."""
    step = a.double().abs().amax(dim=1, keepdim=True) / 127
    return torch.where(step > 0, (a.double() / step).round() * step, 0.0)


def _weight(columns: int = 1, zero: float = 0.0) -> Quantized:
    """Codes (OUT, IN) of int4 and their scale (1, 1), (OUT, 1) or (OUT, columns)."""
    scale = torch.full((1, 1), 0.3) if columns == 0 else torch.rand(OUT, columns) + 0.1
    return Quantized(torch.randint(-8, 8, (OUT, IN), dtype=torch.int8), scale, zero)


def _input() -> tuple[Tensor, Tensor]:
    """Codes (TOKENS, IN) and their scale."""
    return torch.randint(-127, 128, (TOKENS, IN), dtype=torch.int8), torch.rand(TOKENS, 1) + 0.1


# ---- the two products ----


@pytest.mark.parametrize("zero", [0.0, 0.5])
@pytest.mark.parametrize("columns", [0, 1], ids=["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_the_input_by_hand(columns: int, zero: float, dtype: torch.dtype) -> None:
    w, grad = _weight(columns, zero), torch.randn(TOKENS, OUT).to(dtype)
    found = input_gradient(grad, w, torch.float32)
    assert found is not None and found.dtype == torch.float32
    scale, levels = w.scale.double().t(), w.codes.double() - zero
    on_grid = _rounded(grad.double()) @ levels * scale if columns == 0 else _rounded(grad.double() * scale) @ levels
    # a value in the middle of two steps may go to either
    assert _error(found, on_grid) < 1e-3
    exact = (grad.double() * scale) @ levels
    assert 1e-3 < _error(found, exact) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_the_weight_by_hand(dtype: torch.dtype) -> None:
    (codes, scale), grad = _input(), torch.randn(TOKENS, OUT).to(dtype)
    found = value_gradient(grad, codes, scale, None, torch.float32)
    assert found is not None
    scaled = (grad.double() * scale.double()).t()
    assert _error(found, _rounded(scaled) @ codes.double()) < 1e-3
    assert 1e-3 < _error(found, scaled @ codes.double()) < 0.02


def test_the_error_is_that_of_half_a_step() -> None:
    """Elements are off by an even spread over a step: sqrt(1/12) of it, whatever they are multiplied with."""
    codes, grad = torch.randint(-127, 128, (2048, 64), dtype=torch.int8), torch.rand(2048, 256) * 2 - 1
    found = value_gradient(grad, codes, torch.ones(2048, 1), None, torch.float32)
    assert found is not None
    expected = (1 / 127) / 12**0.5 / (1 / 3) ** 0.5  # of the root mean square of grad
    assert _error(found, grad.t() @ codes.float()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("size", [1.0, 2.0**-60, 2.0**-110])
def test_gradients_on_the_grid_are_exact(size: float) -> None:
    """Also tiny ones: a floor of 1e-5 under a row's largest magnitude would make them zero."""
    steps = torch.randint(-127, 128, (TOKENS, OUT)).float()
    steps[:, 0] = 127
    w = Quantized(torch.randint(-8, 8, (OUT, IN), dtype=torch.int8), torch.ones(1, 1))
    found = input_gradient(steps * size, w, torch.float32)
    assert found is not None and torch.equal(found.double(), (steps.double() * size) @ w.codes.double())
    steps[0] = 127
    x, _ = _input()
    found = value_gradient(steps * size, x, torch.ones(TOKENS, 1), None, torch.float32)
    assert found is not None and torch.equal(found.double(), (steps.double() * size).t() @ x.double())


def test_the_floor_is_where_float32_ends() -> None:
    step = torch.tensor(SMALLEST_RANGE) / 127
    assert step == torch.finfo(torch.float32).tiny and (127 / torch.tensor(SMALLEST_RANGE)).isfinite()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(bad: float) -> None:
    """Otherwise a guard against NaN would see nothing."""
    grad, (codes, scale) = torch.randn(TOKENS, OUT), _input()
    grad[3, 5] = bad
    by_input, by_weight = (
        input_gradient(grad, _weight(), torch.float32),
        value_gradient(grad, codes, scale, None, torch.float32),
    )
    assert by_input is not None and by_weight is not None
    assert not by_input[3].isfinite().any() and not by_weight[5].isfinite().any()
    assert by_input[4:].isfinite().all() and by_weight[:5].isfinite().all()


def test_zeros_stay_zeros() -> None:
    codes, scale = _input()
    by_input = input_gradient(torch.zeros(TOKENS, OUT), _weight(), torch.float32)
    by_weight = value_gradient(torch.zeros(TOKENS, OUT), codes, scale, None, torch.float32)
    assert by_input is not None and by_weight is not None and not by_input.any() and not by_weight.any()


def test_where_the_exact_products_serve() -> None:
    (codes, scale), grad = _input(), torch.randn(TOKENS, OUT)
    assert input_gradient(grad, _weight(4), torch.float32) is None
    assert value_gradient(grad, grad, None, None, torch.float32) is None
    assert value_gradient(grad, codes, scale, torch.ones(TOKENS, 1), torch.float32) is None
    assert input_gradient(grad[:0], _weight(), torch.float32) is None
    assert value_gradient(grad[:0], codes[:0], scale[:0], None, torch.float32) is None
    long = torch.zeros(1, 1).expand(_MOST_TERMS + 1, 1)
    one = torch.zeros(_MOST_TERMS + 1, 1, dtype=torch.int8)
    assert value_gradient(long, one, long, None, torch.float32) is None
    assert input_gradient(long.t(), Quantized(one, torch.ones(1, 1)), torch.float32) is None


def test_the_longest_sum_stays_within_int32() -> None:
    grad, codes = torch.ones(_MOST_TERMS, 1), torch.full((_MOST_TERMS, 2), -128, dtype=torch.int8)
    found = value_gradient(grad, codes, torch.ones(_MOST_TERMS, 1), None, torch.float32)
    assert found is not None
    torch.testing.assert_close(found, torch.full((1, 2), -128.0 * _MOST_TERMS))


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("name", ACTIVATION_SCHEMES.names())
def test_what_is_called_legal_is_what_is_computed(name: str, columns: int) -> None:
    scheme, grad = ACTIVATION_SCHEMES.get(name), torch.randn(TOKENS, OUT)
    codes, scale, zero = torch.randn(TOKENS, IN), None, None
    if scheme.quantizes:
        codes, scale, zero = scheme.quantize(codes, torch.tensor(0.02))
    found = {
        "input": input_gradient(grad, _weight(columns), torch.float32),
        "weight": value_gradient(grad, codes, scale, zero if isinstance(zero, Tensor) else None, torch.float32),
    }
    assert legal_products(columns, scheme) == tuple(product for product in PRODUCTS if found[product] is not None)


# ---- a layer ----


def _gradients(
    layer: QuantizedLayer, form: Int8Backward | None, x: Tensor, out: Tensor, bf16: bool = False
) -> dict[str, Tensor]:
    """Of every parameter, and of x as "x", with L = sum(layer(x) * out)."""
    layer.zero_grad()
    layer.int8_backward = form
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(leaf)
    y.backward(out.to(y.dtype))
    assert leaf.grad is not None
    found = {name: each.grad.clone() for name, each in layer.named_parameters() if each.grad is not None}
    return {"x": leaf.grad, **found}


def _data(size: tuple[int, int] = (IN, OUT)) -> tuple[Tensor, Tensor]:
    return torch.randn(4, TOKENS // 4, size[0]), torch.randn(4, TOKENS // 4, size[1])


@each_form
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_each_product_by_itself(form: str, bf16: bool) -> None:
    """dL/dx and dL/dweight of every kind of layer, in and out of autocast; packed weights have no gradient."""
    layer = FORMS[form](make_layer(granularity="channel"))
    x, out = _data()
    exact = _gradients(layer, None, x, out, bf16)
    both = _gradients(layer, Int8Backward(), x, out, bf16)
    assert exact.keys() == both.keys() and ("weight" in exact) == (not form.startswith("packed"))
    for name in {"x", "weight"} & exact.keys():
        assert both[name].dtype == exact[name].dtype
        assert 1e-3 < _error(both[name], exact[name]) < 0.03, name
    assert torch.equal(both["bias"], exact["bias"])
    half = _gradients(layer, Int8Backward(weight=False), x, out, bf16)
    assert torch.equal(half["x"], both["x"]) and all(torch.equal(half[name], exact[name]) for name in exact if name != "x")
    half = _gradients(layer, Int8Backward(input=False), x, out, bf16)
    assert all(torch.equal(half[name], (exact if name == "x" else both)[name]) for name in exact)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_scheme(scheme: str, granularity: str) -> None:
    layer = make_layer(scheme, granularity=granularity, group_size=8 if granularity == "group" else None)
    x, out = _data()
    exact, found = _gradients(layer, None, x, out), _gradients(layer, Int8Backward(), x, out)
    assert torch.equal(found["x"], exact["x"]) == (granularity == "group")
    assert _error(found["x"], exact["x"]) < 0.03 and 1e-3 < _error(found["weight"], exact["weight"]) < 0.03


def test_learned_scales_and_temperatures_get_theirs() -> None:
    layer = make_layer("int4", "learned", "channel", ste="learnable")
    x, out = _data()
    exact, found = _gradients(layer, None, x, out), _gradients(layer, Int8Backward(), x, out)
    for name in ("weight_scale", "ste_temperature"):
        assert 1e-5 < _error(found[name], exact[name]) < 0.05, name


def test_a_frozen_weight_has_no_second_product() -> None:
    layer = make_layer()
    layer.weight.requires_grad_(False)
    meter = Meter()
    assert "weight" not in _gradients(layer, Int8Backward(meter=meter), *_data())
    assert meter.cosines.keys() == {"input"}


def test_float_products_are_left_alone() -> None:
    """Below full strength a layer multiplies floats."""
    layer = make_layer()
    layer.relaxed = True
    layer.strength.fill_(0.5)
    x, out = _data()
    exact, found = _gradients(layer, None, x, out), _gradients(layer, Int8Backward(), x, out)
    assert not layer.multiplies_codes and all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    layer = make_layer()
    x, out = _data()
    expected = _gradients(layer, Int8Backward(), x, out)
    meter, leaf = Meter(), x.clone().requires_grad_()
    for form in (Int8Backward(meter=meter), Int8Backward()):
        layer.zero_grad()
        leaf.grad = None
        layer.int8_backward = form
        checkpoint(layer, leaf, use_reentrant=reentrant).backward(out)
    assert leaf.grad is not None and torch.equal(leaf.grad, expected["x"])
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad, expected["weight"])
    assert set(meter.cosines) == set(PRODUCTS)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    """The results of eager, and a recompilation when another form is chosen; while there is a meter gradients are exact."""
    torch._dynamo.reset()
    counters.clear()
    layer, (x, out) = make_layer(granularity="channel"), _data()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    assert isinstance(compiled, nn.Module)
    inner: Any = compiled._orig_mod
    for number, form in enumerate((None, Int8Backward(), Int8Backward(weight=False)), start=1):
        expected = _gradients(layer, form, x, out)
        for _ in range(2):
            inner.int8_backward, inner.weight.grad, leaf = form, None, x.clone().requires_grad_()
            compiled(leaf).backward(out)
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, expected["x"])
            torch.testing.assert_close(inner.weight.grad, expected["weight"])
        assert counters["stats"]["unique_graphs"] == number
    meter = Meter()
    inner.int8_backward, inner.weight.grad = Int8Backward(meter=meter), None
    compiled(x).backward(out)
    torch.testing.assert_close(inner.weight.grad, _gradients(layer, None, x, out)["weight"])
    assert not meter.cosines and not counters["graph_break"]


# ---- the meter ----


def _cosine(a: Tensor, b: Tensor) -> float:
    return (torch.dot(a.double().flatten(), b.double().flatten()) / (a.double().norm() * b.double().norm())).item()


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_cosines_by_hand(size: float) -> None:
    """Whatever the size of the gradients, whose squares float32 may not hold."""
    layer, meter = make_layer(), Meter()
    x, out = _data()
    exact, int8 = (_gradients(layer, form, x, out * size) for form in (None, Int8Backward()))
    measured = _gradients(layer, Int8Backward(meter=meter), x, out * size)
    assert all(torch.equal(measured[name], exact[name]) for name in exact)
    for product, name in (("input", "x"), ("weight", "weight")):
        assert float(meter.cosines[product]) == pytest.approx(_cosine(exact[name], int8[name]), abs=2e-6)
        assert meter.cosines[product].shape == () and float(meter.cosines[product]) > 0.999


def test_cosines_of_many_numbers() -> None:
    """Sums of squares in float32 alone would put it above 1."""
    a, meter = torch.randn(3_000_000), Meter()
    b = a + 1e-3 * torch.randn_like(a)
    meter.add("input", a, b)
    assert 1.0 - float(meter.cosines["input"]) == pytest.approx(1.0 - _cosine(a, b), abs=2e-7)


def test_an_outlier_in_each_row_shows() -> None:
    """It leaves nothing of the others, which are all that counts where the outlier's own weights are zero."""
    layer, meter, (x, out) = make_layer(), Meter(), _data()
    with torch.no_grad():
        layer.weight[0] *= 1e-3
    out[..., 0] *= 1e4
    _gradients(layer, Int8Backward(meter=meter), x, out)
    assert float(meter.cosines["input"]) < 0.5 and float(meter.cosines["weight"]) > 0.999


def test_an_outlier_over_the_tokens_shows() -> None:
    """Two tokens that are alike and have large gradients of opposite signs: what is left is that of the others."""
    layer, meter, (x, out) = make_layer(), Meter(), _data()
    x[0, 1], out[0, 0], out[0, 1] = x[0, 0], 1e4, -1e4
    _gradients(layer, Int8Backward(meter=meter), x, out)
    assert float(meter.cosines["input"]) > 0.999 and float(meter.cosines["weight"]) < 0.5


def test_the_lowest_of_several_calls_counts() -> None:
    a, b, meter = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), Meter()
    for rounded in (a, b, a):
        meter.add("input", a, rounded)
    assert float(meter.cosines["input"]) == pytest.approx(0.5**0.5)


def test_zeros_are_no_measurement_and_nan_is_seen() -> None:
    meter, zeros, ones = Meter(), torch.zeros(3), torch.ones(3)
    meter.add("input", zeros, zeros)
    assert float(meter.cosines["input"]) == UNMEASURED
    meter.add("input", ones, ones)
    assert float(meter.cosines["input"]) == pytest.approx(1.0)
    meter.add("input", ones, zeros)
    assert float(meter.cosines["input"]) == 0.0
    meter.add("input", torch.full((3,), torch.nan), ones)
    meter.add("input", ones, ones)
    assert meter.cosines["input"].isnan()
