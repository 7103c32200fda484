"""One layer's codes, scales and latent weights from the moments of its inputs. Own; the parts' papers are in their files.

    minimize E |W x - Q x_hat|^2  =  trace((W* - Q) H (W* - Q)^T) + rest,   W* = W (C + d I) (H + d I)^-1

with H and C of `moments.py` and a damping d that draws W* to W. W* is that of asymmetric calibration (GPTAQ, arXiv 2504.02692):
it makes up for what the layers before, and the rounding of the activations, have done to the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..modules import TrainedLayer
from ..quantizers import Quantized, latent_near, representable
from ..quantizers.scales import weighted_least_squares
from ..registry import Registry
from . import gptq
from .moments import Moments

# of the levels, by which a value may differ from what was found; bfloat16 weights are off by 0.4 %
_CLOSE = 0.02


@dataclass(frozen=True)
class FitOptions:
    """What the methods can be told; see `fit_weights`."""

    damping: float = 0.1
    sweeps: int = 6


class Found(NamedTuple):
    """Codes and scales, and the float weight W* (N, K) that they stand for."""

    quantized: Quantized
    target: Tensor


# (layer, its float weight (N, K) float32, moments of its inputs or None, options)
FitMethod = Callable[[TrainedLayer, Tensor, Moments | None, FitOptions], Found]
METHODS: Registry[FitMethod] = Registry("fit method")


@METHODS.register("least_squares")
def fit_least_squares(layer: TrainedLayer, weight: Tensor, moments: Moments | None, options: FitOptions) -> Found:
    """The nearest weights; with moments, errors count by the mean square of the input that they meet."""
    importance = None if moments is None else gptq.damped(moments.hessian, options.damping).diagonal()
    return Found(layer.quantizer.quantize(weight, _scale(layer, weight, importance)), weight)


@METHODS.register("gptq")
def fit_gptq(layer: TrainedLayer, weight: Tensor, moments: Moments | None, options: FitOptions) -> Found:
    """GPTQ on W*, then sweeps of coordinate descent over the codes, with the best scales refitted after each."""
    assert moments is not None
    grid, hessian = layer.quantizer.grid, gptq.damped(moments.hessian, options.damping)
    wanted = weight @ (moments.cross - moments.hessian)
    target = weight + torch.linalg.solve(hessian, wanted.t()).t()
    found = gptq.gptq(target, _scale(layer, target, hessian.diagonal()), grid, hessian)
    found = gptq.refit(target, found, hessian)
    for _ in range(options.sweeps):
        found = gptq.refit(target, gptq.descend(target, found, grid, hessian), hessian)
    return Found(found, target)


def _scale(layer: TrainedLayer, weight: Tensor, importance: Tensor | None) -> Tensor:
    shape = layer.quantizer.scale_shape(*weight.shape)
    rows = weight.contiguous().reshape(shape[0] * shape[1], -1)
    if importance is not None:
        importance = importance.expand_as(weight).reshape(rows.shape)
    return weighted_least_squares(rows, layer.quantizer.grid, importance).reshape(shape)


class Outcome(NamedTuple):
    """What became of one layer; see `FitRow`."""

    rounding_error: float | None
    error: float | None
    changed: float
    note: str


@torch.no_grad()
def fit_layer(name: str, layer: TrainedLayer, moments: Moments | None, method: str, options: FitOptions) -> Outcome:
    """Sets the float weight (and a learned scale) of a layer so that it quantizes to what the method finds."""
    weight, quantizer = layer.matrix.float().clone(), layer.quantizer
    before = quantizer.quantize(weight, quantizer.compute_scale(weight) if quantizer.learned else None)
    found, target = METHODS.get(method)(layer, weight, moments, options)
    found = representable(quantizer, found, target)
    _write(layer, _expressed(layer, found, latent_near(quantizer, found, target), weight), found.scale)
    after, note = layer.quantized_weight(), ""
    rounded, fitted = (relative_error(moments, name, weight, each) for each in (before, after))
    # not "greater": a NaN is no success
    if not (rounded is None or fitted is None or fitted <= rounded):
        _write(layer, weight, before.scale)
        after, fitted, note = before, rounded, "plain rounding was better"
    return Outcome(rounded, fitted, float((after.codes != before.codes).float().mean()), note)


def _write(layer: TrainedLayer, weight: Tensor, scale: Tensor) -> None:
    layer.matrix.copy_(weight)
    if layer.weight_scale is not None:
        layer.weight_scale.copy_(scale)


def _expressed(layer: TrainedLayer, found: Quantized, latent: Tensor, weight: Tensor) -> Tensor:
    """`latent` (N, K), with the original weight in groups whose values the layer's scale rule cannot give."""
    back = layer.quantizer.quantize(latent.to(layer.weight.dtype), found.scale if layer.quantizer.learned else None)
    shape = found.scale.numel(), -1
    apart = (back.dequantize() - found.dequantize()).abs().reshape(shape).amax(dim=-1, keepdim=True)
    lost = ~(apart < _CLOSE * found.scale.reshape(-1, 1))
    return torch.where(lost, weight.reshape(shape), latent.reshape(shape)).reshape(weight.shape)


def relative_error(moments: Moments | None, name: str, weight: Tensor, quantized: Quantized) -> float | None:
    """||W x - Q x_hat|| / ||W x|| over the calibration inputs; None without any, and where W x is 0."""
    if moments is None or float(moments.outputs[name]) == 0.0:
        return None
    q, signal = quantized.dequantize(), float(moments.outputs[name])
    square = signal - 2 * float(((weight @ moments.cross) * q).sum()) + float(((q @ moments.hessian) * q).sum())
    return (max(square, 0.0) / signal) ** 0.5
