"""What `gptq.py` has to know of a layer's inputs: second moments, summed over batches. Own.

H = sum x_hat x_hat^T     x_hat: the input as the quantized model sees it, after its own activation quantizer
C = sum x x_hat^T         x: the input of the full-precision model at the same place
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules import TrainedLayer


class Moments:
    """The moments of one input that one or several layers read. float32 (K, K) each, on the layer's device.

    Attributes:
        hessian, cross: H and C of the top of the file. outputs: {name of a layer: sum of the squares of its full-precision
            output}. tokens: how many rows were summed.
    """

    def __init__(self, layers: dict[str, TrainedLayer], activations: bool) -> None:
        self.layers, self.activations = layers, activations
        self.first = next(iter(layers.values()))
        size, device = self.first.in_features, self.first.weight.device
        self.hessian = torch.zeros(size, size, device=device)
        self.cross = torch.zeros(size, size, device=device)
        self.outputs = {name: torch.zeros((), device=device) for name in layers}
        self.tokens = 0

    def update(self, seen: Tensor, reference: Tensor | None, mask: Tensor | None) -> None:
        """Takes in one input.

        Args:
            seen: float (..., K), what reaches the layer in the partly quantized model. reference: the same place in the
                full-precision model, or None for no other than `seen`. mask: which rows count, bool over the leading sizes.
        """
        x_hat = _rows(self._before(seen), mask)
        if not len(x_hat):
            return
        x = x_hat if reference is None else _rows(self._before(reference), mask)
        if self.activations and self.first.activation.quantizes:
            x_hat = self.first.activation.quantize(x_hat, self.first.act_scale).dequantize()
        self.hessian.addmm_(x_hat.t(), x_hat)
        self.cross.addmm_(x.t(), x_hat)
        for name, layer in self.layers.items():
            self.outputs[name] += (x @ layer.matrix.float().t()).square().sum()
        self.tokens += len(x_hat)

    def _before(self, x: Tensor) -> Tensor:
        return x if self.first.sub_norm is None else self.first.sub_norm(x)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x.float()
    return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
