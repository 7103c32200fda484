"""Activation schemes: codes and values against formulas written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_bitnet.quantizers import ACTIVATION_SCHEMES, ActivationScheme, Quantized

QUANTIZING = [name for name in ACTIVATION_SCHEMES if ACTIVATION_SCHEMES.get(name).quantizes]
PER_TOKEN = [name for name in QUANTIZING if not ACTIVATION_SCHEMES.get(name).static]
ROUNDING = [name for name in QUANTIZING if ACTIVATION_SCHEMES.get(name).bits > 1]  # a sign has no step
each_scheme = pytest.mark.parametrize("name", QUANTIZING)
STATIC_SCALE = torch.tensor(0.03)


def _quantize(scheme: type[ActivationScheme], x: Tensor) -> Quantized:
    return scheme.quantize(x, STATIC_SCALE if scheme.static else None)


def _token_wise(*shape: int) -> Tensor:
    """Tokens of very different size and a mean that is not zero."""
    return (torch.randn(*shape) + 0.3) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))


@each_scheme
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 16), (1, 1), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_is_code_minus_zero_point_times_scale(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scheme, x = ACTIVATION_SCHEMES.get(name), _token_wise(*shape).to(dtype)
    before = x.clone()
    quantized = _quantize(scheme, x)
    assert quantized.codes.dtype == torch.int8 and quantized.codes.shape == x.shape
    assert quantized.scale.dtype == torch.float32 and quantized.scale.shape == (*shape[:-1], 1)
    zero = quantized.zero_point
    if isinstance(zero, Tensor):
        assert zero.shape == quantized.scale.shape and zero.dtype == torch.float32
        assert torch.equal(zero, zero.round()) and ((zero >= -128) & (zero <= 127)).all()
    expected = (quantized.codes.double() - zero) * quantized.scale.double()
    assert torch.equal(quantized.dequantize(), expected.float())
    assert torch.equal(x, before)
    full = _quantize(scheme, x.float())  # half precision is only the storage; the arithmetic is float32
    assert torch.equal(full.codes, quantized.codes) and torch.equal(full.scale, quantized.scale)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_tokens_do_not_see_each_other(name: str) -> None:
    scheme, x = ACTIVATION_SCHEMES.get(name), _token_wise(6, 40)
    together = scheme.quantize(x)
    for i in range(6):
        alone = scheme.quantize(x[i : i + 1])
        assert torch.equal(alone.codes[0], together.codes[i]) and torch.equal(alone.scale[0], together.scale[i])


@pytest.mark.parametrize("name", ROUNDING)
def test_error_is_within_half_a_step(name: str) -> None:
    scheme, x = ACTIVATION_SCHEMES.get(name), _token_wise(8, 64)
    quantized = _quantize(scheme, x)
    inside = (quantized.codes > -127) & (quantized.codes < 127)
    error = (quantized.dequantize() - x).abs() / quantized.scale
    assert error[inside].max() <= 0.5 + 1e-4
    if not scheme.static:  # nothing is clipped by more than the rounding of the zero point
        assert error.max() <= 1.0 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_equals_transformers_act_quant(dtype: torch.dtype) -> None:
    x = _token_wise(64, 48).to(dtype)
    x[3] = 0
    scale = 127 / x.float().abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    codes = (x.float() * scale).round().clamp(-128, 127)
    quantized = ACTIVATION_SCHEMES.get("int8").quantize(x)
    assert torch.equal(quantized.codes.float(), codes)
    torch.testing.assert_close(quantized.dequantize(), codes / scale, rtol=2e-7, atol=0)


def test_int4_by_hand() -> None:
    x = torch.tensor([[7.0, -7.0, 3.5, 2.5, 0.4, -0.6]])
    quantized = ACTIVATION_SCHEMES.get("int4").quantize(x)
    assert quantized.codes.tolist() == [[7, -7, 4, 2, 0, -1]]  # halves go to even
    assert quantized.scale.item() == 1.0


def test_sign_by_hand() -> None:
    quantized = ACTIVATION_SCHEMES.get("sign").quantize(torch.tensor([[1.0, -3.0, 0.0, 0.5]]))
    assert quantized.codes.tolist() == [[1, -1, 1, 1]]
    assert quantized.scale.item() == 1.125


def test_static_clips_and_takes_one_scale() -> None:
    x = torch.tensor([[1.0, -2.0, 100.0], [-100.0, 0.26, 0.24]])
    quantized = ACTIVATION_SCHEMES.get("int8_static").quantize(x, torch.tensor(0.5))
    assert quantized.codes.tolist() == [[2, -4, 127], [-127, 1, 0]]
    assert quantized.scale.tolist() == [[0.5], [0.5]]


def test_an_uncalibrated_static_range_is_seen_at_once() -> None:
    quantized = ACTIVATION_SCHEMES.get("int8_static").quantize(torch.randn(2, 4), torch.tensor(0.0))
    assert quantized.dequantize().isnan().all()


@pytest.mark.parametrize("shift", [-50.0, -1.0, 0.0, 1.0, 50.0])
def test_asymmetric_keeps_zero_exact(shift: float) -> None:
    x = torch.randn(16, 31) + shift
    x[:, 0] = 0.0
    quantized = ACTIVATION_SCHEMES.get("int8_asymmetric").quantize(x)
    assert (quantized.dequantize()[:, 0] == 0).all()
    spread = x.amax(dim=-1, keepdim=True).clamp(min=0) - x.amin(dim=-1, keepdim=True).clamp(max=0)
    torch.testing.assert_close(quantized.scale, spread / 255)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_zero_rows(name: str) -> None:
    x = torch.randn(3, 8)
    x[1] = 0.0
    value = ACTIVATION_SCHEMES.get(name).quantize(x).dequantize()
    assert value.isfinite().all()
    assert value[1].abs().max() <= 1e-5  # a sign has no zero; it stands for the floor of the range


@each_scheme
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_does_not_hide(name: str, bad: float) -> None:
    scheme, x = ACTIVATION_SCHEMES.get(name), torch.randn(3, 8)
    x[1, 4] = bad
    value = _quantize(scheme, x).dequantize()
    assert value[[0, 2]].isfinite().all()
    if not scheme.static:  # a static range clips, which is its purpose
        assert not value[1].isfinite().any() or scheme.bits == 1


@each_scheme
def test_autocast_changes_nothing(name: str) -> None:
    scheme, x = ACTIVATION_SCHEMES.get(name), _token_wise(4, 16)
    plain = _quantize(scheme, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _quantize(scheme, x)
    assert torch.equal(plain.codes, cast.codes) and torch.equal(plain.scale, cast.scale)
    assert cast.scale.dtype == torch.float32


def test_none_does_not_quantize() -> None:
    assert not ACTIVATION_SCHEMES.get("none").quantizes
