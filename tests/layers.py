"""Single quantized layers for tests, and what they compute, written a second time in float64 with plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_bitnet.modules import BitConv1D, BitLinear, LayerSpec, PackedBitLinear, QuantizedLayer, TrainedLayer
from hf_bitnet.quantizers import ACTIVATION_SCHEMES, GRANULARITIES, SCALE_RULES, WEIGHT_SCHEMES, make_weight_quantizer
from hf_bitnet.ste import ESTIMATORS

IN, OUT, GROUP = 24, 10, 8
STATIC_SCALE = 0.02
# (granularity, group size)
PLACES = [(granularity, GROUP if granularity == "group" else None) for granularity in GRANULARITIES]


def scale_rules(scheme: str) -> list[str]:
    """The scale rules that serve a weight scheme."""
    served = []
    for rule in SCALE_RULES:
        try:
            make_weight_quantizer(scheme, rule)
        except ValueError:
            continue
        served.append(rule)
    return served


def make_spec(
    weight: str = "ternary",
    rule: str | None = None,
    granularity: str | None = None,
    group_size: int | None = None,
    activation: str = "int8",
    ste: str = "identity",
    **fields: Any,
) -> LayerSpec:
    quantizer = make_weight_quantizer(weight, rule, granularity, group_size)
    return LayerSpec(quantizer, ACTIVATION_SCHEMES.get(activation), ESTIMATORS.get(ste), **fields)


def make_layer(*args: Any, bias: bool = True, size: tuple[int, int] = (IN, OUT), **kwargs: Any) -> BitLinear:
    """A BitLinear whose rows have different sizes; arguments as `make_spec`. A static range is set to `STATIC_SCALE`."""
    linear = nn.Linear(*size, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.linspace(0.5, 2.0, size[1]).unsqueeze(-1)).add_(0.02)
    layer = BitLinear.from_float(linear, make_spec(*args, **kwargs))
    if layer.act_scale is not None:
        layer.act_scale.fill_(STATIC_SCALE)
    if layer.weight_scale is not None:  # at the start, absmax puts weights on the very edge of the grid, where LSQ jumps
        layer.weight_scale.data.mul_(0.83)
    return layer


def as_conv1d(layer: BitLinear) -> BitConv1D:
    """The same layer in GPT-2's layout."""
    conv = Conv1D(layer.out_features, layer.in_features)
    with torch.no_grad():
        conv.weight.copy_(layer.weight.t())
        conv.bias.copy_(layer.bias if layer.bias is not None else torch.zeros(layer.out_features))
    made = BitConv1D.from_float(conv, layer.spec)
    if made.act_scale is not None:
        made.act_scale.fill_(STATIC_SCALE)
    if made.weight_scale is not None and layer.weight_scale is not None:
        made.weight_scale.data.copy_(layer.weight_scale)
    return made


FORMS: dict[str, Callable[[BitLinear], QuantizedLayer]] = {
    "linear": lambda layer: layer,
    "conv1d": as_conv1d,
    "packed": PackedBitLinear.from_trained,
    "packed conv1d": lambda layer: PackedBitLinear.from_trained(as_conv1d(layer)),
}
each_form = pytest.mark.parametrize("form", FORMS)


def double(tensor: Tensor) -> Tensor:
    """A float64 leaf of the same values."""
    return tensor.detach().double().requires_grad_()


class Reference:
    """What a layer computes, in float64 with plain autograd.

    The value of a fake-quantized tensor is the quantized one; its gradient is the surrogate's:
    `surrogate + (quantized - surrogate).detach()`, which float64 holds to 1e-16.
    """

    def __init__(self, layer: TrainedLayer) -> None:
        self.layer = layer
        self.weight = double(layer.matrix)
        self.bias = None if layer.bias is None else double(layer.bias)
        self.scale = None if layer.weight_scale is None else double(layer.weight_scale)
        self.temperature = double(layer.ste_temperature)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.fake_input(x) @ self.fake_weight().t()
        return y if self.bias is None else y + self.bias

    def fake_input(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not layer.activation.quantizes:
            return x
        codes, scale, zero = layer.activation.quantize(x.detach().float(), layer.act_scale)
        value = (codes.double() - zero) * scale.double()
        return x + (value - x).detach()

    def fake_weight(self) -> Tensor:
        spec, grid = self.layer.spec, self.layer.quantizer.grid
        codes, scale, zero = self.layer.quantized_weight()
        scale = scale.double()
        width = self.weight.shape[1] // scale.shape[1]
        wide = scale.repeat_interleave(width, dim=1)
        quantized = (codes.double() - zero) * wide
        position = ((self.weight - self._middle()) / wide + (grid.zero_point - grid.lowest)) / grid.step
        curve = spec.ste.surrogate(position, grid.levels, spec.threshold, self.temperature)
        surrogate = wide * grid.step * curve
        value = surrogate + (quantized - surrogate).detach()
        return value if self.scale is None else value + self._by_scale(codes.double() - zero, position, width)

    def _middle(self) -> Tensor | float:
        """Where the middle of the grid lies: zero, or for a sign the mean of each group."""
        if self.layer.quantizer.grid.levels > 2:
            return 0.0
        rows, columns = self.layer.quantized_weight().scale.shape
        groups = self.weight.detach().reshape(rows, columns, -1)
        return groups.mean(dim=-1, keepdim=True).expand_as(groups).reshape(self.weight.shape)

    def _by_scale(self, levels: Tensor, position: Tensor, width: int) -> Tensor:
        """A term of value 0 whose gradient by the scale is LSQ's (arXiv 1902.08153, equations 3 and its section 2.2)."""
        assert self.scale is not None
        grid = self.layer.quantizer.grid
        inside = (position >= 0) & (position <= grid.levels - 1)
        ratio = position.detach() * grid.step + grid.lowest - grid.zero_point
        slope = levels if grid.levels == 2 else levels - torch.where(inside, ratio, torch.zeros_like(ratio))
        count = self.weight.numel() / self.scale.numel()
        wide = self.scale.repeat_interleave(width, dim=1)
        return (wide - wide.detach()) * slope / (count * grid.values[-1]) ** 0.5


SCHEMES = WEIGHT_SCHEMES.names()
ACTIVATIONS = ACTIVATION_SCHEMES.names()
STES = ESTIMATORS.names()
