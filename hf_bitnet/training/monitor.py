"""What quantization does during training, as numbers: flips, zeros, signal to noise, latents that move. Own.

Runs only at logging steps. It adds up 0-dim tensors on the device; the trainer copies them to the host once.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import TrainedLayer
from ..quantizers import Quantized
from ..surgery import trained_layers
from .sharding import whole_weight

logger = logging.getLogger(__name__)
# latents watched in a layer, evenly spread: all of them would need a second copy of the weights
_WATCHED = 4096
_SMALLEST = 1e-30


class _Snapshot(NamedTuple):
    """A layer at the last logging step: packed codes uint8 (N, bytes), and some latents (at most `_WATCHED`,)."""

    codes: Tensor
    latents: Tensor


class QuantMonitor:
    """Compares the layers with what they were at the previous call. Nothing is kept when `enabled` is False."""

    NAMES = (
        "quant/flip_rate",
        "quant/zero_fraction",
        "quant/sqnr_db",
        "quant/cosine",
        "quant/latent_changed",
        "quant/worst_sqnr_db",
    )
    OF_LAYERS = ("flip_rate", "zero_fraction", "sqnr_db", "cosine")

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.layers: list[str] = []
        self._last: dict[str, _Snapshot] = {}
        self._said = False

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Remembers the layers as they are; the next `measure` compares with this."""
        self._last.clear()
        for name, layer in self._layers(model):
            weight, quantized = _present(layer)
            self._last[name] = _Snapshot(_packed(layer, quantized), _watched(weight))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor | None:
        """float32 on the device; None when there is nothing to measure.

        The first are the figures of the model, in the order of `NAMES`; then, layer by layer in the order of `layers`, those of
        `OF_LAYERS`. flip_rate: share of codes that differ from the last call. zero_fraction: share of weights whose value is
        0. sqnr_db: 10 log10 (sum w^2 / sum (w - quantized)^2), mean over layers (worst_sqnr_db: the lowest). cosine: between w
        and its quantized value, mean over layers. latent_changed: share of a sample of the float weights that differ from the
        last call; far below 1 the steps drown in rounding.
        """
        counts, distances, sizes = [], [], []
        layers = self._layers(model)
        for name, layer in layers:
            weight, quantized = _present(layer)
            new = _Snapshot(_packed(layer, quantized), _watched(weight))
            old = self._last.get(name, new)
            self._last[name] = new
            flips = torch.count_nonzero(_unpacked(layer, old.codes) != quantized.codes)
            zeros = torch.count_nonzero(quantized.codes == quantized.zero_point)
            counts.append(torch.stack((flips, zeros, torch.count_nonzero(old.latents != new.latents))))
            distances.append(_distance(weight, quantized))
            sizes.append((weight.numel(), new.latents.numel()))
        if not counts:
            return None
        self.layers = [name for name, _ in layers]
        # integer sums: float32 stops counting at 2**24
        every = torch.stack(counts)
        flips, zeros, changed = every.sum(dim=0)
        sqnr, cosine = torch.stack(distances).unbind(dim=1)
        total, watched = (sum(each) for each in zip(*sizes, strict=True))
        mean = (flips / total, zeros / total, sqnr.mean(), cosine.mean(), changed / watched, sqnr.min())
        shares = every[:, :2] / torch.tensor([[size] for size, _ in sizes], device="cpu").to(every.device, non_blocking=True)
        return torch.cat((torch.stack(mean), torch.cat((shares, sqnr[:, None], cosine[:, None]), dim=1).flatten()))

    def _layers(self, model: nn.Module) -> list[tuple[str, TrainedLayer]]:
        if not self.enabled:
            return []
        layers = [(name, layer) for name, layer in trained_layers(model) if layer.weight.numel() > 0]
        if not layers and not self._said:
            logger.warning(
                "DeepSpeed ZeRO-3 holds no weight outside of forward: of the quant metrics only the strength is logged"
            )
            self._said = True
        return layers


def _present(layer: TrainedLayer) -> tuple[Tensor, Quantized]:
    """The float weight (N, K) and its codes, whole also where FSDP shards them (every rank has to call this)."""
    weight, scale = whole_weight(layer)
    return weight.detach(), layer.source.codes(weight, scale)


def _packed(layer: TrainedLayer, quantized: Quantized) -> Tensor:
    quantizer = layer.quantizer
    return kernels.pack(quantized.codes, quantizer.storage_bits, quantizer.grid.lowest, quantizer.grid.step)


def _unpacked(layer: TrainedLayer, packed: Tensor) -> Tensor:
    quantizer = layer.quantizer
    return kernels.unpack(packed, quantizer.storage_bits, quantizer.grid.lowest, quantizer.grid.step, layer.in_features)


def _watched(weight: Tensor) -> Tensor:
    """A copy of evenly spread elements."""
    flat = weight.reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _WATCHED))].clone()


def _distance(weight: Tensor, quantized: Quantized) -> Tensor:
    """float32 (2,): SQNR in dB, and cosine, of a weight and its quantized value."""
    weight = weight.reshape(-1).float()
    value = quantized.dequantize().reshape(-1)
    power, value_power = torch.dot(weight, weight), torch.dot(value, value)
    noise = value.sub_(weight)
    noise_power = torch.dot(noise, noise)
    sqnr = 10 * torch.log10(power.clamp(min=_SMALLEST) / noise_power.clamp(min=_SMALLEST))
    product = (power + value_power - noise_power) / 2
    return torch.stack((sqnr, product / (power * value_power).sqrt().clamp(min=_SMALLEST)))
