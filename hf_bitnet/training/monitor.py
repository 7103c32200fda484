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

    NAMES = ("quant/flip_rate", "quant/zero_fraction", "quant/sqnr_db", "quant/latent_changed")

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
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
        """float32 (4,) in the order of `NAMES`, on the device; None when there is nothing to measure.

        flip_rate: share of codes that differ from the last call. zero_fraction: share of weights whose value is 0.
        sqnr_db: 10 log10 (sum w^2 / sum (w - quantized)^2), mean over layers. latent_changed: share of a sample of the float
        weights that differ from the last call; far below 1 the steps drown in rounding.
        """
        counts, ratios, codes_total, watched_total = [], [], 0, 0
        for name, layer in self._layers(model):
            weight, quantized = _present(layer)
            new = _Snapshot(_packed(layer, quantized), _watched(weight))
            old = self._last.get(name, new)
            self._last[name] = new
            flips = torch.count_nonzero(_unpacked(layer, old.codes) != quantized.codes)
            zeros = torch.count_nonzero(quantized.codes == quantized.zero_point)
            counts.append(torch.stack((flips, zeros, torch.count_nonzero(old.latents != new.latents))))
            ratios.append(_sqnr(weight, quantized))
            codes_total += weight.numel()
            watched_total += new.latents.numel()
        if not counts:
            return None
        # integer sums: float32 stops counting at 2**24
        flips, zeros, changed = torch.stack(counts).sum(dim=0)
        sqnr = torch.stack(ratios).mean()
        return torch.stack((flips / codes_total, zeros / codes_total, sqnr, changed / watched_total))

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
    weight, scale = (_whole(tensor) for tensor in (layer.matrix, layer.weight_scale))
    assert weight is not None
    return weight.detach(), layer.source.codes(weight, scale)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[union-attr]


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


def _sqnr(weight: Tensor, quantized: Quantized) -> Tensor:
    """0-dim float32, in dB."""
    noise = quantized.dequantize().sub_(weight)
    power, noise_power = weight.float().square().sum(), noise.square_().sum()
    return 10 * torch.log10(power.clamp(min=_SMALLEST) / noise_power.clamp(min=_SMALLEST))
