"""The integer-native linear step and its gradients. Own; the estimators are in `ste.py`.

Forward multiplies integer codes exactly and applies scales outside. For backward it keeps the int8 activation codes and
their scale, and nothing of the weight: codes, scales and STE slopes are derived again from the master weight.

    y      = (x_codes - x_zero) x_scale (w_codes - w_zero)^T w_scale + bias
    dL/dx  = dL/dy  W_hat                            straight through the activation quantizer
    dL/dw  = (dL/dy^T x_hat) * slope(position)       slope of the chosen estimator
    dL/ds  = sum (dL/dy^T x_hat) * (level - w / s)   LSQ (arXiv 1902.08153), times 1 / sqrt(n Qp)

Both products of backward have integer codes on one side. On the CPU the gradient on the other side is rounded to 15-bit fixed
point for them, with one scale for each of its rows (`kernels.fixed_matmul`): an error of about 1e-4 of the result's root mean
square, a tenth to a hundredth of what bfloat16 makes, in float32 training too. With AMX a bfloat16 gradient stays what it is.
HF_BITNET_KERNELS=float keeps float products.
`low_precision.py` has both products with the gradient in int8, for layers that are told to take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..quantizers import ActivationScheme, Grid, Quantized, WeightQuantizer
from ..ste import STE
from . import low_precision
from .low_precision import Int8Backward


class WeightSource(Protocol):
    """Where a layer's codes come from, and what the gradient of its weight value turns into."""

    def codes(self, weight: Tensor, scale: Tensor | None) -> Quantized:
        """Codes and scale that forward uses; with the scale that it returned, the same codes again."""
        ...

    def gradients(
        self, value_grad: Tensor, weight: Tensor, scale: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


@dataclass(frozen=True)
class Latent:
    """Codes are made from a float master weight (N, K), which is trained through an estimator.

    Attributes:
        idle_scale: a learned scale is there but waits: the quantizer of the moment computes its own. It gets a gradient of 0,
            because DDP wants one from every parameter.
    """

    quantizer: WeightQuantizer
    ste: STE
    threshold: float
    idle_scale: bool = False

    def codes(self, weight: Tensor, scale: Tensor | None) -> Quantized:
        return self.quantizer.quantize(weight, None if self.idle_scale else scale)

    def gradients(
        self, value_grad: Tensor, weight: Tensor, scale: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(dL/dvalue (N, K)) -> dL/dweight (N, K), dL/dscale or None, dL/dtemperature or None."""
        if self.idle_scale and scale is not None:
            weight_grad, _, temperature_grad = self.gradients(value_grad, weight, None, temperature)
            return weight_grad, torch.zeros_like(scale), temperature_grad
        slope = self.ste.slope
        if slope is None and scale is None:
            return value_grad, None, None
        grid = self.quantizer.grid
        quantized = self.codes(weight, scale)
        position = self.quantizer.position(weight, quantized.scale)
        scale_grad = None if scale is None else self._scale_gradient(value_grad, quantized, position)
        if slope is None:
            return value_grad, scale_grad, None
        assert temperature is not None
        value_grad = value_grad.float()
        temperature_grad = None
        if self.ste.temperature_slope is not None:
            by_temperature = self.ste.temperature_slope(position, grid.levels, self.threshold, temperature)
            spread = _over_groups(value_grad * by_temperature, quantized.scale).sum(dim=-1, keepdim=True)
            temperature_grad = (spread.reshape(quantized.scale.shape) * quantized.scale).sum() * grid.step
        return value_grad * slope(position, grid.levels, self.threshold, temperature), scale_grad, temperature_grad

    def _scale_gradient(self, value_grad: Tensor, quantized: Quantized, position: Tensor) -> Tensor:
        grid = self.quantizer.grid
        by_scale = quantized.levels(torch.float32)
        if grid.levels > 2:  # the sign of a weight does not move with the scale
            inside = (position >= 0) & (position <= grid.levels - 1)
            by_scale = by_scale - (position * grid.step + (grid.lowest - grid.zero_point)) * inside
        return self.scale_gradient(value_grad, by_scale, quantized.scale)

    def scale_gradient(self, value_grad: Tensor, by_scale: Tensor, scale: Tensor) -> Tensor:
        """Sums dL/dvalue * dvalue/dscale, both (N, K), over the weights of each scale, weighted as LSQ does."""
        total = _over_groups(value_grad.float() * by_scale, scale).sum(dim=-1)
        per_scale = value_grad.numel() / scale.numel()
        return total.reshape(scale.shape) / (per_scale * self.quantizer.grid.values[-1]) ** 0.5


@dataclass(frozen=True)
class Packed:
    """Codes are unpacked from a frozen uint8 weight (N, ceil(K * bits / 8)); it has no gradient."""

    bits: int
    grid: Grid
    in_features: int

    def codes(self, weight: Tensor, scale: Tensor | None) -> Quantized:
        assert scale is not None
        codes = kernels.unpack(weight, self.bits, self.grid.lowest, self.grid.step, self.in_features)
        return Quantized(codes, scale, self.grid.zero_point)

    def gradients(
        self, value_grad: Tensor, weight: Tensor, scale: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raise AssertionError("packed weights are frozen")


def _over_groups(values: Tensor, scale: Tensor) -> Tensor:
    """(N, K) -> (number of scales, weights per scale)."""
    return values.reshape(scale.numel(), -1)


def _product(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, w: Quantized, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(M, K) -> (M, N) in `dtype`."""
    if x_scale is not None:
        assert isinstance(w.zero_point, float)
        return kernels.int_linear(x, x_scale, x_zero, w.codes, w.scale, w.zero_point, bias, dtype)
    # activations as they are; their products with exact levels are scaled outside where one scale serves a whole row
    if w.scale.shape[-1] > 1 or x.dtype == torch.float16:  # sums of 8-bit levels overflow float16
        y = x @ w.dequantize(x.dtype).t()
    else:
        y = (x @ w.levels(x.dtype).t()) * w.scale.t()
    return (y if bias is None else y + bias).to(dtype)


def _input_gradient(grad: Tensor, w: Quantized, dtype: torch.dtype) -> Tensor:
    """(M, N), weight (N, K) -> (M, K) in `dtype`."""
    if w.scale.shape[-1] > 1:  # a scale that changes along K stays with the weight
        return (grad @ w.dequantize(grad.dtype)).to(dtype)
    assert isinstance(w.zero_point, float)
    if w.scale.numel() == 1:
        return kernels.fixed_matmul(grad, None, w.codes, w.zero_point, w.scale, dtype)
    return kernels.fixed_matmul(grad, w.scale, w.codes, w.zero_point, None, dtype)


def _value_gradient(grad: Tensor, x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(M, N), saved activations (M, K) -> dL/dW_hat (N, K) in `dtype`."""
    if x_scale is None:
        return (grad.t() @ x.to(grad.dtype)).to(dtype)
    if x_zero is None:
        return kernels.fixed_matmul(grad.t(), x_scale, x, 0.0, None, dtype)
    levels = x.float() - x_zero  # a zero point for every token stays with the activations
    if x.shape[1] <= grad.shape[1]:  # the scale is applied to the smaller operand
        return (grad.t() @ kernels.scale_rows(levels, x_scale, grad.dtype)).to(dtype)
    return (kernels.scale_rows(grad, x_scale, grad.dtype).t() @ levels.to(grad.dtype)).to(dtype)


class BitLinearFunction(torch.autograd.Function):
    """See the formulas at the top of the file. `forward`'s arguments:

    x: float (..., K), only the path of its gradient. weight: master (N, K) or packed. scale: learned or packed scale,
    else None. temperature: 0-dim or None. bias: (N,) or None. x_codes: int8 (M, K), or x itself in the output's dtype
    when activations are not quantized. x_scale, x_zero: float32 (M, 1) or None. source: where codes come from.
    held: codes that a caller keeps for several calls, else None. int8: the products of backward that take int8 gradients, None
    for none. Returns (M, N) in `dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        temperature: Tensor | None,
        bias: Tensor | None,
        x_codes: Tensor,
        x_scale: Tensor | None,
        x_zero: Tensor | None,
        source: WeightSource,
        held: Quantized | None,
        int8: Int8Backward | None,
        dtype: torch.dtype,
    ) -> Tensor:
        w = source.codes(weight, scale) if held is None else held
        y = _product(x_codes, x_scale, x_zero, w, bias, dtype)
        ctx.source, ctx.held, ctx.int8, ctx.x_shape, ctx.x_dtype = source, held, int8, x.shape, x.dtype
        ctx.compiling = torch.compiler.is_compiling()
        needs_weight = any(ctx.needs_input_grad[1:4])
        kept = (x_codes, x_scale, x_zero) if needs_weight else (None, None, None)
        if ctx.compiling:
            ctx.save_for_backward(*kept, weight, scale, temperature)
        else:
            # the weight is a parameter: a plain reference costs no memory, and saved-tensor hooks (offloading,
            # compression) have no business with it. The version check autograd would do is done in backward.
            ctx.save_for_backward(*kept)
            ctx.weights, ctx.versions = (weight, scale, temperature), versions(weight, scale, temperature)
            # found again in backward it would cost two more passes over the weight; group scales are too large to keep
            ctx.w_scale = w.scale if w.scale.shape[-1] == 1 else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.compiling:
            x_codes, x_scale, x_zero, weight, scale, temperature = ctx.saved_tensors
            w_scale = None
        else:
            x_codes, x_scale, x_zero = ctx.saved_tensors
            (weight, scale, temperature), w_scale = ctx.weights, ctx.w_scale
            if versions(weight, scale, temperature) != ctx.versions:
                raise RuntimeError(
                    "a BitLinear weight (or its scale) was changed in place between forward and backward, so its codes are "
                    "gone; call backward() before optimizer.step()"
                )
        needs = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        x_grad = weight_grad = scale_grad = temperature_grad = None
        if needs[0]:
            w = ctx.held
            if w is None:
                w = ctx.source.codes(weight, scale if w_scale is None else w_scale)
            forms = _input_gradient, low_precision.input_gradient
            x_grad = low_precision.gradient(ctx.int8, "input", *forms, grad, w, ctx.x_dtype).reshape(ctx.x_shape)
        if any(needs[1:4]):
            dtype = torch.promote_types(grad.dtype, weight.dtype)
            forms = _value_gradient, low_precision.value_gradient
            value_grad = low_precision.gradient(ctx.int8, "weight", *forms, grad, x_codes, x_scale, x_zero, dtype)
            weight_grad, scale_grad, temperature_grad = ctx.source.gradients(value_grad, weight, scale, temperature)
            weight_grad = weight_grad.to(weight.dtype) if needs[1] else None
        bias_grad = grad.sum(dim=0) if needs[4] else None
        return x_grad, weight_grad, scale_grad, temperature_grad, bias_grad, *([None] * 7)


class FakeQuantizeWeight(torch.autograd.Function):
    """weight (N, K) -> its quantized value (N, K) in the weight's dtype, with the gradients of `Latent.gradients`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor | None, temperature: Tensor | None, source: Latent) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(weight, scale, temperature)
        return source.codes(weight, scale).dequantize(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight_grad, scale_grad, temperature_grad = ctx.source.gradients(grads[0], *ctx.saved_tensors)
        return weight_grad.to(grads[0].dtype), scale_grad, temperature_grad, None


class FakeQuantizeActivation(torch.autograd.Function):
    """x (..., K) -> its quantized value in x's dtype; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: type[ActivationScheme], scale: Tensor | None) -> Tensor:
        return scheme.quantize(x, scale).dequantize(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], None, None


def versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """How often each was changed in place. Inference tensors keep no count; outside inference mode nothing may change them."""
    return tuple(tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference())
