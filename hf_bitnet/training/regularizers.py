"""Regularizers of the float weights behind quantized ones.

A regularizer maps (weight (N, K), its codes and scale, the grid) to a 0-dim sum over the weights; codes and scale are held
fixed. Sums, not means, as weight decay: the gradient on one weight does not depend on the size of the model.

l2_to_grid           sum (w - w_hat)^2: pulls every weight to the value it stands for; zero on the grid
oscillation_damping  the same without weights beyond the outermost levels, which cannot flip back and forth
                     (equation 5 of arXiv 2203.11086)
sparsity             sum |w|: pulls weights to zero, and with them the share of zero codes up (where 0 is a code)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import TrainedLayer
from ..quantizers import Grid, Quantized
from ..registry import Registry
from ..surgery import trained_layers
from .options import number, read_mapping
from .sharding import whole_codes, whole_weight

Regularizer = Callable[[Tensor, Quantized, Grid], Tensor]
REGULARIZERS: Registry[Regularizer] = Registry("regularizer")


@REGULARIZERS.register("l2_to_grid")
def l2_to_grid(weight: Tensor, quantized: Quantized, grid: Grid) -> Tensor:
    return (weight - quantized.dequantize()).square().sum()


@REGULARIZERS.register("oscillation_damping")
def oscillation_damping(weight: Tensor, quantized: Quantized, grid: Grid) -> Tensor:
    distance = weight - quantized.dequantize()
    below = (quantized.codes == grid.lowest) & (distance < 0)
    above = (quantized.codes == grid.highest) & (distance > 0)
    return distance.masked_fill(below | above, 0.0).square().sum()


@REGULARIZERS.register("sparsity")
def sparsity(weight: Tensor, quantized: Quantized, grid: Grid) -> Tensor:
    return weight.abs().sum()


def read_regularizers(value: Any) -> dict[str, float] | None:
    """The field `regularizers` of QATArguments: name -> coefficient.

    Raises TypeError or ValueError on an unknown name or a coefficient below 0.
    """
    if value is None:
        return None
    given = read_mapping("regularizers", value)
    for name, coefficient in given.items():
        REGULARIZERS.get(name)
        number(f"regularizers[{name!r}]", coefficient, 0.0, hint='for example regularizers={"l2_to_grid": 1e-4}')
    return given


class Regularization:
    """Adds the gradients of weighted regularizers to what backward left, layer by layer.

    Not by way of the loss of a micro-batch: its graph would hold a copy of every weight until backward, and with gradient
    accumulation the term would count once for each micro-batch. Each rank adds the same, after gradients were averaged.

    Args:
        coefficients: name in `REGULARIZERS` -> weight.
        device: of the training.
    """

    def __init__(self, coefficients: dict[str, float], device: torch.device) -> None:
        self.names = [f"quant/reg_{name}" for name in coefficients]
        self._terms = [(REGULARIZERS.get(name), coefficient) for name, coefficient in coefficients.items()]
        self._sums = torch.zeros(len(coefficients), device=device)

    def add_gradients(self, model: nn.Module, scaler: Any = None) -> Tensor:
        """Once an optimizer step, between backward and clipping. Every rank has to call it.

        Args:
            scaler: GradScaler of float16 training, whose scale the gradients have to carry.

        Returns:
            0-dim float32, the weighted sum of all terms.
        """
        values = torch.zeros_like(self._sums)
        for _, layer in trained_layers(model):
            if layer.weight.requires_grad:
                values += self._of_layer(layer, scaler)
        self._sums += values
        return values.sum()

    def _of_layer(self, layer: TrainedLayer, scaler: Any) -> Tensor:
        with torch.no_grad():
            quantized = whole_codes(layer)
        with torch.enable_grad():
            weight = whole_weight(layer)[0].float()
            terms = [coefficient * term(weight, quantized, layer.quantizer.grid) for term, coefficient in self._terms]
            total = torch.stack(terms).sum()
        (gradient,) = torch.autograd.grad(total if scaler is None else scaler.scale(total), layer.weight)
        if layer.weight.grad is None:
            layer.weight.grad = gradient
        else:
            layer.weight.grad += gradient
        layer.drop_codes()  # no forward of this step is to come
        return torch.stack([term.detach() for term in terms]).to(self._sums.device)

    def take(self, steps: int) -> Tensor:
        """float32 (terms,): weighted values, mean over the `steps` since the last call."""
        means = self._sums / max(steps, 1)
        self._sums = torch.zeros_like(self._sums)
        return means
