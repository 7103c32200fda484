"""Layers that compute what transformers' own `bitnet` layers compute, in their order of operations, bit for bit.

transformers (integrations/bitnet.py) has three kinds, and two directions of the scale:

    bitlinear              y = (codes_x W^T) / (s x_scale) + b      s = 1 / scale, codes_x in the dtype of the model
    autobitlinear offline  y = (x_hat W^T + b) s                    s = scale: the stored bias is b / s
    autobitlinear online   y = x_hat W_hat^T + b                    W_hat from the float weight, in every forward

with x_hat, W_hat the fake-quantized values, rounded to the model's dtype. An activation that is one ulp off may round to
another code, so these orders are kept here and `weight_scale` stays as it is stored. They are for fidelity, not for speed:
`converted()` gives the ordinary layer. Gradients are straight through; transformers' bitlinear has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantizers import ACTIVATION_SCHEMES, Quantized, make_weight_quantizer
from .base import QuantizedLayer
from .bit_linear import BitLinear, LayerSpec
from .packed_linear import PackedBitLinear
from .relaxed import mixed_weight, relaxed_input
from .sub_norm import SubNorm

_ROWS_PER_BYTE = 4


def pack_rows(codes: Tensor) -> Tensor:
    """Ternary codes (N, K) -> uint8 (ceil(N / 4), K): the rows' four quarters lie over each other, code + 1 in two bits.

    Where 4 does not divide N, the last quarter is padded; transformers itself cannot load that.
    """
    quarter = -(-codes.shape[0] // _ROWS_PER_BYTE)
    levels = F.pad(codes + 1, (0, 0, 0, quarter * _ROWS_PER_BYTE - codes.shape[0])).to(torch.uint8)
    packed = torch.zeros(quarter, codes.shape[1], dtype=torch.uint8, device=codes.device)
    for i, rows in enumerate(levels.split(quarter)):
        packed |= rows << (2 * i)
    return packed


def unpack_rows(packed: Tensor, out_features: int) -> Tensor:
    """The inverse: uint8 (ceil(N / 4), K) -> int8 (N, K)."""
    levels = torch.cat([(packed >> (2 * i)) & 3 for i in range(_ROWS_PER_BYTE)])
    return levels[:out_features].to(torch.int8) - 1


class NativeRMSNorm(nn.Module):
    """`weight * (x / rms(x))`, normalized in float32 and rounded before the gain, as LlamaRMSNorm does."""

    def __init__(self, features: int, eps: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalized = x.float()
        normalized = normalized * torch.rsqrt(normalized.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(x.dtype)


class _QuantizedWeight(torch.autograd.Function):
    """Float weight (N, K) -> its ternary value in its dtype; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        value = weight.float()
        scale = 1.0 / value.abs().mean().clamp_(min=1e-5)
        return ((value * scale).round().clamp(-1, 1) / scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]


class _QuantizedActivation(torch.autograd.Function):
    """x (..., K) -> its int8 value in its dtype, computed in float32; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value = x.float()
        scale = 127 / value.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
        return ((value * scale).round().clamp(-128, 127) / scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]


class _ActivationCodes(torch.autograd.Function):
    """x (..., K) -> int8 codes as floats (..., K), and their inverse scale (..., 1), both computed in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(scale)
        return (x * scale).round().clamp(-128, 127), scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = ctx.saved_tensors
        return grads[0] * scale


@dataclass(frozen=True)
class NativeRows:
    """Codes are unpacked from the native layout; `divides` tells the direction of the stored scale."""

    out_features: int
    divides: bool

    def codes(self, weight: Tensor, scale: Tensor | None) -> Quantized:
        assert scale is not None
        stored = scale.detach().float().reshape(1, 1)
        return Quantized(unpack_rows(weight, self.out_features), stored.reciprocal() if self.divides else stored)


class NativeLayer(QuantizedLayer):
    """What the native kinds share: a norm in front under transformers' name, and the way to the ordinary layer.

    Attributes:
        rms_norm: the norm that forward uses, or None.
    """

    rms_norm: NativeRMSNorm | None

    @property
    def sub_norm(self) -> SubNorm | None:
        """The same norm as the ordinary layers have it; shares the gain."""
        if self.rms_norm is None:
            return None
        norm = SubNorm(self.in_features, self.rms_norm.eps, device=self.rms_norm.weight.device)
        norm.weight = self.rms_norm.weight
        norm.blend.fill_(1.0)
        return norm

    @sub_norm.setter
    def sub_norm(self, value: SubNorm | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        assert value is None, "the norm of a native layer is its rms_norm"

    def converted(self) -> BitLinear | PackedBitLinear:
        """The ordinary layer with equal codes, scale, bias and norm; its activations are quantized in float32."""
        raise AssertionError("abstract")

    def _normed(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return x if self.rms_norm is None else self.rms_norm(x)

    def _set_norm(self, eps: float | None, device: Any, dtype: torch.dtype | None) -> None:
        self.rms_norm = None if eps is None else NativeRMSNorm(self.in_features, eps, device, dtype)


class NativeOnlineLinear(NativeLayer, BitLinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """autobitlinear, online: a float weight that trains. Keys: weight, bias, rms_norm.weight."""

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: LayerSpec, rms_norm_eps: float | None = None) -> NativeOnlineLinear:
        """Takes over the parameters of `linear`. `rms_norm_eps`: None for no norm."""
        layer = super().from_float(linear, spec)
        assert isinstance(layer, NativeOnlineLinear)
        layer._set_norm(rms_norm_eps, linear.weight.device, linear.weight.dtype)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        x = self._normed(input)
        if self.bypassed:
            return self.float_linear(x, self.weight)
        weight, value = _QuantizedWeight.apply(self.weight), _QuantizedActivation.apply(x)
        if self.relaxed:
            relaxation, strength = self.spec.relaxation, self.strength
            weight = mixed_weight(self.weight, weight, None, strength, self.source, relaxation)
            value = relaxed_input(x, value, strength)
        return F.linear(value, weight, self.bias)

    def converted(self) -> BitLinear:
        layer = BitLinear.from_float(self, self.spec)
        layer.sub_norm = self.sub_norm
        return layer


class NativePackedLinear(NativeLayer, PackedBitLinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What the two packed kinds share. Keys: weight, weight_scale, bias, rms_norm.weight.

    Attributes:
        weight: uint8 (ceil(out_features / 4), in_features), see `pack_rows`.
        weight_scale: (1,) in the dtype of the model, as stored.
        divides: whether the product is divided by it.
    """

    divides: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rms_norm_eps: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            quantizer=make_weight_quantizer("ternary", "absmean", "tensor"),
            activation=ACTIVATION_SCHEMES.get("int8"),
            device=device,
            dtype=dtype,
        )
        rows = -(-out_features // _ROWS_PER_BYTE)
        self.weight = nn.Parameter(torch.zeros(rows, in_features, dtype=torch.uint8, device=device), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1, dtype=dtype, device=device), requires_grad=False)
        self.source = NativeRows(out_features, self.divides)  # type: ignore[assignment]
        self._set_norm(rms_norm_eps, device, dtype)
        self.requires_grad_(False)

    @torch.no_grad()
    def store(self, quantized: Quantized) -> None:
        scale = quantized.scale.reshape(1).to(self.weight_scale.dtype)
        self.weight = nn.Parameter(pack_rows(quantized.codes), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.reciprocal() if self.divides else scale.clone(), requires_grad=False)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        return unpack_rows(self.weight, self.out_features).to(dtype)

    def converted(self) -> PackedBitLinear:
        packed = PackedBitLinear(
            self.in_features, self.out_features, False, quantizer=self.packed_by, activation=self.activation, device="meta"
        )
        packed.store(self.quantized_weight())
        packed.bias = self.plain_bias  # type: ignore[assignment]
        packed.sub_norm = self.sub_norm
        packed.training = self.training
        return packed


class NativeBitLinear(NativePackedLinear):
    """bitlinear."""

    divides = True

    def forward(self, input: Tensor) -> Tensor:
        x = self._normed(input)
        if self.activation.quantizes:
            codes, scale = _ActivationCodes.apply(x)
            y = F.linear(codes, self._matrix(x.dtype)) / (self.weight_scale * scale)
        else:
            y = F.linear(x, self._matrix(x.dtype)) / self.weight_scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class NativeOfflineLinear(NativePackedLinear):
    """autobitlinear, offline."""

    divides = False

    @property
    def plain_bias(self) -> Tensor | None:
        if self.bias is None:
            return None
        return nn.Parameter((self.bias.detach().float() * self.weight_scale.float()).to(self.bias.dtype))

    def forward(self, input: Tensor) -> Tensor:
        x = self._normed(input)
        value = _QuantizedActivation.apply(x) if self.activation.quantizes else x
        return (F.linear(value, self._matrix(x.dtype), self.bias) * self.weight_scale).to(x.dtype)
