"""layer_report: how far the quantized weights are from the float ones. Needs no data. Own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modules import QuantizedLayer, TrainedLayer
from ..reports import Column, LayerRow, Report, described, percent
from ..surgery import quantized_layers


@dataclass(frozen=True)
class WeightRow(LayerRow):
    """Weights of one layer. What compares with float weights is None for a packed layer, which no longer has them.

    Attributes:
        sqnr: signal to quantization noise, 10 log10(sum w^2 / sum (w - value)^2), dB.
        relative_mse: sum (w - value)^2 / sum w^2. cosine: between w and value.
        zeros: share of the values that are 0. clipped: share of the weights more than half a step outside the grid.
        scale: mean of the scales. scale_spread: their standard deviation over their mean.
    """

    sqnr: float | None
    relative_mse: float | None
    cosine: float | None
    zeros: float
    clipped: float | None
    scale: float
    scale_spread: float


class LayerReport(Report[WeightRow]):
    """Rows in the order of the model. `total_sqnr` is over all weights together, None without float weights."""

    title = "Weight quantization error by layer"
    explanation = "Relative squared error, sum (w - value)² / sum w²"
    ranked_by = "relative_mse"
    columns = (
        Column("SQNR dB", "sqnr", "{:.2f}".format),
        Column("rel. MSE", "relative_mse", "{:.3g}".format),
        Column("cosine", "cosine", "{:.4f}".format),
        Column("zero", "zeros", percent),
        Column("clipped", "clipped", percent),
        Column("scale", "scale", "{:.3g}".format),
        Column("spread", "scale_spread", "{:.3f}".format),
    )

    def __init__(self, rows: list[WeightRow], total_sqnr: float | None) -> None:
        super().__init__(rows)
        self.total_sqnr = total_sqnr

    def summary(self) -> str:
        return super().summary() + (f", SQNR {self.total_sqnr:.2f} dB" if self.total_sqnr is not None else "")


def layer_report(model: nn.Module) -> LayerReport:
    """The report on every quantized layer, in train or packed form. One copy from device to host.

    Raises ValueError when the model has no quantized layer.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise ValueError(
            f"layer_report: {type(model).__name__} has no quantized layer; call quantize_model(model, config) first"
        )
    with torch.no_grad():
        on_devices = [_numbers(layer) for _, layer in layers]
        numbers = torch.stack([each.to(on_devices[0].device) for each in on_devices]).tolist()
    rows = [_row(name, layer, values) for (name, layer), values in zip(layers, numbers, strict=True)]
    latent = [values for (_, layer), values in zip(layers, numbers, strict=True) if isinstance(layer, TrainedLayer)]
    error, signal = sum(values[0] for values in latent), sum(values[1] for values in latent)
    return LayerReport(rows, _decibels(error, signal) if latent else None)


def _numbers(layer: QuantizedLayer) -> Tensor:
    """float32 (8,): error, signal, product, value^2 (sums), zeros, clipped (counts), mean and deviation of the scale."""
    quantized = layer.quantized_weight()
    scale = quantized.scale
    zeros = (quantized.levels(torch.float32) == 0).sum()
    spread = scale.std(correction=0) if scale.numel() > 1 else torch.zeros_like(scale.mean())
    if not isinstance(layer, TrainedLayer):
        nothing = torch.zeros(4, device=scale.device)
        return torch.cat([nothing, torch.stack([zeros.float(), zeros.float() * 0, scale.mean(), spread])])
    w, value = layer.matrix.float(), quantized.dequantize()
    position = layer.quantizer.position(w, scale)
    outside = ((position < -0.5) | (position > layer.quantizer.grid.levels - 0.5)).sum()
    sums = [(w - value).square().sum(), w.square().sum(), (w * value).sum(), value.square().sum()]
    return torch.stack([*sums, zeros.float(), outside.float(), scale.mean(), spread])


def _row(name: str, layer: QuantizedLayer, numbers: list[float]) -> WeightRow:
    error, signal, product, value, zeros, clipped, scale, spread = numbers
    fields = described(name, layer)
    latent = isinstance(layer, TrainedLayer)
    return WeightRow(
        **fields,
        sqnr=_decibels(error, signal) if latent else None,
        relative_mse=(error / signal if signal else math.nan) if latent else None,
        cosine=(product / math.sqrt(signal * value) if signal and value else math.nan) if latent else None,
        zeros=zeros / fields["weights"],
        clipped=clipped / fields["weights"] if latent else None,
        scale=scale,
        scale_spread=spread / scale if scale else 0.0,
    )


def _decibels(error: float, signal: float) -> float:
    if not error or not signal:
        return math.inf if not error else -math.inf
    return 10 * math.log10(signal / error)
