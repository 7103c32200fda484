"""Both products of a layer's backward with int8 on both sides, for devices that multiply int8 faster; off by default. Own.

With g = dL/dy (M, N), and q(a) the rows of a in steps of their largest magnitude / 127, rounded half to even:

    dL/dx      = q(g w_scale^T) (w_codes - w_zero)      one step for each token
    dL/dW_hat  = q((g x_scale)^T) x_codes               one step for each output, over all tokens

The other operand is the codes of forward, which are exact, so that only g is rounded, by at most half a step an element. That
is little in rows whose elements are of one size, and ruins rows in which a few stand far above the rest. (SwitchBack, arXiv
2304.13013, keeps the second product, whose sums run over all tokens, in 16 bits.) Whether a product is good enough is measured
on the gradients themselves, against the exact one (`Meter`), and who trains decides by it (`training/int8_backward.py`).

Leaves out: stochastic rounding; scales that change along K, activations with a zero point or without codes: the exact products
serve. Below full strength, and with noise that leaves the grid, a layer multiplies floats and none of this takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..quantizers import ActivationScheme, Quantized

INPUT, WEIGHT = PRODUCTS = ("input", "weight")
# The floor under a row's largest magnitude. Gradients are small, 1e-10 is nothing unusual, and the 1e-5 of activations would
# round them to zero. The least that float32 allows: the step, this / 127, is the smallest normal number, 2**-126, and its
# inverse, 2**126, is still finite.
SMALLEST_RANGE = 127 * torch.finfo(torch.float32).tiny
# so many products of two int8 stay within int32
_MOST_TERMS = 1 << 17
# a cosine that was not measured: above every cosine, so that minima pass it over
UNMEASURED = 2.0


class Meter:
    """How alike the exact and the int8 gradients are, call by call.

    Attributes:
        cosines: product -> the lowest cosine so far, 0-dim float32 on the device; `UNMEASURED` while all gradients were zero,
            NaN when one was not finite. A product that was not computed has none.
    """

    def __init__(self) -> None:
        self.cosines: dict[str, Tensor] = {}

    def add(self, product: str, exact: Tensor, rounded: Tensor) -> None:
        """Two tensors of one shape, not empty. Waits for no device."""
        found = _cosine(exact, rounded)
        last = self.cosines.get(product)
        self.cosines[product] = found if last is None else torch.minimum(last, found)


@dataclass(frozen=True)
class Int8Backward:
    """Which products of a layer's backward have int8 operands.

    Attributes:
        input, weight: dL/dx; dL/dW_hat.
        meter: while there is one, the gradients stay exact, and both forms of these products are computed and compared.
    """

    input: bool = True
    weight: bool = True
    meter: Meter | None = None


def legal_products(scale_columns: int, activation: type[ActivationScheme]) -> tuple[str, ...]:
    """The products that have an int8 form, for `scale_columns` scales in each row of the weight."""
    zero = activation.quantize(torch.zeros(1, 1), torch.ones(())).zero_point if activation.quantizes else None
    legal = {INPUT: scale_columns == 1, WEIGHT: activation.quantizes and not isinstance(zero, Tensor)}
    return tuple(product for product in PRODUCTS if legal[product])


def gradient(
    form: Int8Backward | None,
    product: str,
    exact: Callable[..., Tensor],
    rounded: Callable[..., Tensor | None],
    *operands: object,
) -> Tensor:
    """The gradient that a layer takes: `exact(*operands)`, or `rounded(*operands)` where `form` says so and there is one."""
    found = rounded(*operands) if form is not None and getattr(form, product) else None
    if form is None or found is None:
        return exact(*operands)
    if form.meter is None:
        return found
    truth = exact(*operands)
    form.meter.add(product, truth, found)
    return truth


def input_gradient(grad: Tensor, w: Quantized, dtype: torch.dtype) -> Tensor | None:
    """float (M, N), weight codes (N, K) -> (M, K) in `dtype`; None where the exact product has to serve."""
    if w.scale.shape[-1] > 1 or not _fits(grad, terms=grad.shape[1]):
        return None
    assert isinstance(w.zero_point, float)
    one = w.scale.numel() == 1
    codes, step = _rows(grad if one else grad * w.scale.t())
    scale = w.scale.reshape(1, 1) if one else _one(w.scale)
    return kernels.int_linear(codes, step, None, w.codes.t(), scale, w.zero_point, None, dtype)


def value_gradient(grad: Tensor, x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """float (M, N), int8 activation codes (M, K) -> (N, K) in `dtype`; None where the exact product has to serve."""
    if x_scale is None or x_zero is not None or not _fits(grad, terms=grad.shape[0]):
        return None
    codes, step = kernels.quantize_columns(grad, x_scale, -127, 127, SMALLEST_RANGE)
    return kernels.int_linear(codes, step, None, x.t(), _one(x_scale), 0.0, None, dtype)


def _fits(grad: Tensor, terms: int) -> bool:
    return grad.numel() > 0 and terms <= _MOST_TERMS


def _rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """float (R, C) -> int8 codes (R, C), float32 step (R, 1). NaN or infinity make the step of their row not finite."""
    return kernels.quantize_rows(grad, -127, 127, SMALLEST_RANGE)


def _one(like: Tensor) -> Tensor:
    return torch.ones(1, 1, dtype=torch.float32, device=like.device)


def _cosine(exact: Tensor, rounded: Tensor) -> Tensor:
    """0-dim float32. Both are divided by the largest magnitude first: squares of small gradients would vanish.

    By a b = (a^2 + b^2 - (a - b)^2) / 2: in float32 long sums are off by 1e-5, which here cancels where the two are alike.
    """
    size = exact.abs().amax().float().clamp(min=SMALLEST_RANGE)
    a, b = exact.float() / size, rounded.float() / size
    of_a, of_b, of_error = (torch.linalg.vector_norm(each) for each in (a, b, a - b))
    product = (of_a * of_a + of_b * of_b - of_error * of_error) / 2
    none = (a == 0).all() & (b == 0).all()
    return torch.where(none, UNMEASURED, product / (of_a * of_b).clamp(min=torch.finfo(torch.float32).tiny))
