"""Activation schemes. A scheme maps x (..., K) to a `Quantized`; gradients pass straight through (arXiv 1308.3432).

int8             per token, by the largest magnitude (BitNet b1.58); the default
int4             per token (BitNet a4.8, arXiv 2411.04965)
sign             per token, +-1 times the mean magnitude (XNOR-Net, arXiv 1603.05279)
int8_asymmetric  per token, from the smallest to the largest value, with a zero point
int8_static      one scale for the tensor, found by calibration before
none             activations stay as they are (weight-only quantization)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..registry import Registry
from .quantized import Quantized

# the floor under a token's largest magnitude, as in transformers' bitnet layers
SMALLEST_RANGE = 1e-5
_INT8 = kernels.RowQuantization(-128, 127, SMALLEST_RANGE)
_INT4 = kernels.RowQuantization(-8, 7, SMALLEST_RANGE)


class ActivationScheme:
    """A stateless activation quantizer.

    Attributes:
        bits: bits per activation code.
        quantizes: False only for "none".
        static: True when it needs a calibrated range.
        rows: the range of `kernels.quantize_rows`, for schemes that are nothing else; a product can then quantize its input
            on the way.
    """

    bits: ClassVar[int] = 8
    quantizes: ClassVar[bool] = True
    static: ClassVar[bool] = False
    rows: ClassVar[kernels.RowQuantization | None] = None

    @classmethod
    def quantize(cls, x: Tensor, scale: Tensor | None = None) -> Quantized:
        """float (..., K) -> codes int8 (..., K), scale float32 (..., 1). `scale` (0-dim) is read by static schemes."""
        raise AssertionError("abstract")


ACTIVATION_SCHEMES: Registry[type[ActivationScheme]] = Registry("activation scheme")


@ACTIVATION_SCHEMES.register("int8")
class Int8PerToken(ActivationScheme):
    """`codes = round(x * 127 / max|x|)`."""

    rows = _INT8

    @classmethod
    def quantize(cls, x: Tensor, scale: Tensor | None = None) -> Quantized:
        return Quantized(*kernels.quantize_rows(x, *_INT8))


@ACTIVATION_SCHEMES.register("int4")
class Int4PerToken(ActivationScheme):
    """`codes = round(x * 7 / max|x|)`."""

    bits = 4
    rows = _INT4

    @classmethod
    def quantize(cls, x: Tensor, scale: Tensor | None = None) -> Quantized:
        return Quantized(*kernels.quantize_rows(x, *_INT4))


@ACTIVATION_SCHEMES.register("sign")
class SignPerToken(ActivationScheme):
    """Codes -1 and +1, scale mean|x| of the token."""

    bits = 1

    @classmethod
    def quantize(cls, x: Tensor, scale: Tensor | None = None) -> Quantized:
        x = x.float()
        codes = kernels.quantize_sign(x, x.new_zeros(()))
        return Quantized(codes, x.abs().mean(dim=-1, keepdim=True).clamp(min=SMALLEST_RANGE))


@ACTIVATION_SCHEMES.register("int8_asymmetric")
class Int8Asymmetric(ActivationScheme):
    """256 levels from min(x, 0) to max(x, 0): zero stays exactly representable."""

    @classmethod
    def quantize(cls, x: Tensor, scale: Tensor | None = None) -> Quantized:
        x = x.float()
        low = x.amin(dim=-1, keepdim=True).clamp(max=0)
        high = x.amax(dim=-1, keepdim=True).clamp(min=0)
        scale = (high - low).clamp(min=SMALLEST_RANGE) / 255
        zero_point = (-128 - low / scale).round()
        codes = (x / scale + zero_point).round_().clamp_(-128, 127).to(torch.int8)
        return Quantized(codes, scale, zero_point)


@ACTIVATION_SCHEMES.register("int8_static")
class Int8Static(ActivationScheme):
    """`codes = clamp(round(x / scale))` with one calibrated scale; values outside the range are clipped."""

    static = True

    @classmethod
    def quantize(cls, x: Tensor, scale: Tensor | None = None) -> Quantized:
        assert scale is not None, "a static scheme needs its calibrated scale"
        # an uncalibrated scale is 0. NaN is seen at once where silent zeros are not, and raising would wait for the device
        scale = torch.where(scale > 0, scale, torch.nan)
        x = x.float()
        codes = (x * scale.reciprocal()).round_().clamp_(-127, 127).to(torch.int8)
        return Quantized(codes, scale.float().expand(*x.shape[:-1], 1))


@ACTIVATION_SCHEMES.register("none")
class NoActivation(ActivationScheme):
    """Activations are not quantized."""

    bits = 32
    quantizes = False
