"""BitLinear: a linear layer that trains through quantization. BitNet b1.58 (arXiv 2402.17764) generalised; own step.

The float weight stays the parameter (`weight`, `bias`: a checkpoint of it is also a float checkpoint); forward uses its
codes. Leaves out: packed weights (`packed_linear.py`), choosing layers (`surgery/`), when to change the strength (`training/`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..noise import WeightNoise
from ..quantizers import ActivationScheme, Quantized, WeightQuantizer
from ..relaxations import LINEAR, Relaxation
from ..ste import STE
from .base import QuantizedLayer
from .functional import FakeQuantizeActivation, Latent, versions
from .noisy import noisy_forward
from .relaxed import relaxed_input, relaxed_weight
from .transformed import is_transforming


@dataclass(frozen=True)
class LayerSpec:
    """The objects that say how one layer is quantized.

    Attributes:
        weight: codes and scale of the weight.
        activation: scheme of the input.
        ste: gradient estimator, with its threshold (in levels) and starting temperature.
        relaxation: what serves while the strength is below 1.
        sub_norm: whether an RMS norm stands in front, with `sub_norm_eps`.
    """

    weight: WeightQuantizer
    activation: type[ActivationScheme]
    ste: STE
    threshold: float = 0.5
    temperature: float = 4.0
    relaxation: Relaxation = LINEAR
    sub_norm: bool = False
    sub_norm_eps: float = 1e-6


class TrainedLayer(QuantizedLayer):
    """What BitLinear and BitConv1D share.

    Attributes:
        spec: how the layer is quantized.
        source: what makes the codes of the moment; other than `spec` says only in an earlier stage (`set_stage`).
        weight_scale: float32 parameter, only when the scale is learned.
        ste_temperature: 0-dim float32; a parameter when the estimator learns it, else a buffer.
        strength: 0-dim float32 buffer, 0 full precision .. 1 quantized; read only while `relaxed`.
        relaxed: False (default) for the integer step; True while a schedule moves the strength.
        noise: on the weight, in training mode only; None (default) for none. With it there is the 0-dim int64 buffer
            `noise_key`, which whoever trains changes from step to step.
        bypassed: True for the full-precision product, without making codes: strength 0, only cheaper. For measuring.
        fitted: True once the weight was changed to quantize well, so that it is no longer the original model's.
    """

    spec: LayerSpec
    weight: Tensor  # a Parameter; torch's own layers declare it so
    weight_scale: nn.Parameter | None
    ste_temperature: Tensor
    strength: Tensor
    noise_key: Tensor

    def setup(self, spec: LayerSpec) -> None:
        """Registers the quantization state. The weight must be there already (it may be on the meta device)."""
        device = self.weight.device
        self.spec = spec
        self.source = Latent(spec.weight, spec.ste, spec.threshold)
        self.setup_activation(spec.activation, spec.sub_norm, device, self.weight.dtype, spec.sub_norm_eps)
        shape = spec.weight.scale_shape(self.out_features, self.in_features)
        scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device)) if spec.weight.learned else None
        self.register_parameter("weight_scale", scale)
        temperature = torch.full((), spec.temperature, dtype=torch.float32, device=device)
        if spec.ste.temperature_slope is not None:
            self.ste_temperature = nn.Parameter(temperature)
        else:
            self.register_buffer("ste_temperature", temperature, persistent=False)
        self.register_buffer("strength", torch.ones((), dtype=torch.float32, device=device), persistent=False)
        self.noise: WeightNoise | None = None
        self.relaxed = self.bypassed = self.fitted = False
        self.keep_codes = False
        self._kept: tuple[tuple[int, ...], Quantized] | None = None
        if device.type != "meta":
            self.reset_scale()

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Starts a learned scale from the present weight; does nothing for computed scales."""
        if self.weight_scale is not None:
            self.weight_scale.copy_(self.spec.weight.compute_scale(self.matrix))

    def set_stage(self, quantizer: WeightQuantizer | None) -> None:
        """Makes codes by `quantizer`, which computes its scales, from now on; None returns to the one of `spec`.

        The weight stays. A learned scale waits meanwhile; who returns to it says when it starts anew (`reset_scale`).
        """
        idle = quantizer is not None and self.weight_scale is not None
        source = replace(self.source, quantizer=quantizer or self.spec.weight, idle_scale=idle)
        if source != self.source:
            self.source = source
            self.drop_codes()

    def set_noise(self, noise: WeightNoise | None) -> None:
        """From now on (None: no more) `noise` is on the weight in training mode."""
        if noise is not None and self.noise is None:
            self.register_buffer("noise_key", torch.zeros((), dtype=torch.int64, device=self.weight.device), persistent=False)
        elif noise is None and self.noise is not None:
            del self.noise_key
        self.noise = noise

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features)."""
        raise AssertionError("abstract")

    def float_linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The full-precision layer's own product, with `matrix` in place of the weight."""
        raise AssertionError("abstract")

    @property
    def quantizer(self) -> WeightQuantizer:
        return self.source.quantizer

    @property
    def multiplies_codes(self) -> bool:
        """Not below full strength, and not with noise that leaves the grid: these multiply floats."""
        return not (self.relaxed or self.bypassed or (self.noise is not None and not self.noise.on_grid))

    def quantized_weight(self) -> Quantized:
        """Codes (out_features, in_features) and scale that forward uses, and that packing stores."""
        held = self._held_codes()
        return self.source.codes(self.matrix, self.weight_scale) if held is None else held

    def forward(self, input: Tensor) -> Tensor:
        """float (..., in_features) -> (..., out_features) in the autocast dtype, else the input's."""
        self.check_input(input)
        x = input if self.sub_norm is None else self.sub_norm(input)
        if self.bypassed:
            return self.float_linear(x, self.matrix)
        if is_transforming():
            raise RuntimeError(
                f"{type(self).__name__} got a call under a transform of torch.func (vmap, grad, jacrev, ...), which cannot "
                "follow its surrogate gradients; use loss.backward(), or hf_bitnet.pack_model(model): packed layers allow it"
            )
        if self.noise is not None and self.training:
            return noisy_forward(self, x, self.noise)
        if self.relaxed:
            return self._relaxed_forward(x)
        return self.apply_codes(x, self.matrix, self.weight_scale, self.ste_temperature, self.source, self._held_codes())

    def _relaxed_forward(self, x: Tensor) -> Tensor:
        state = self.weight_scale, self.ste_temperature, self.strength
        matrix = relaxed_weight(self.matrix, *state, self.source, self.spec.relaxation)
        if self.activation.quantizes:
            x = relaxed_input(x, FakeQuantizeActivation.apply(x, self.activation, self.act_scale), self.strength)
        return self.float_linear(x, matrix)

    def _held_codes(self) -> Quantized | None:
        """Codes kept for as long as the weight's version lasts; None outside `surgery.kept_codes`."""
        if torch.compiler.is_compiling() or not self.keep_codes:  # in this order: the compiler then guards no flag
            return None
        version = (id(self.weight), *versions(self.weight, self.weight_scale))
        if self._kept is None or self._kept[0] != version:
            self._kept = version, self.source.codes(self.matrix, self.weight_scale)
        return self._kept[1]

    def drop_codes(self) -> None:
        self._kept = None

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts.append(f"weight={spec.weight.scheme}/{spec.weight.scale_rule}/{spec.weight.granularity}")
        if spec.weight.group_size:
            parts.append(f"group_size={spec.weight.group_size}")
        parts.append(f"activation={spec.activation.__name__}")
        return ", ".join(parts)


class BitLinear(TrainedLayer, nn.Linear):
    """nn.Linear whose product uses the quantized weight and input; its gradient reaches the float weight.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        spec: how to quantize.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: LayerSpec,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.setup(spec)

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: LayerSpec) -> BitLinear:
        """Takes over the very parameters of `linear` (no copy)."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        layer.setup(spec)
        return layer

    @property
    def matrix(self) -> Tensor:
        return self.weight

    def float_linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        return nn.functional.linear(x, matrix, self.bias)


class BitConv1D(TrainedLayer, Conv1D):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT-2's Conv1D, quantized. The parameter keeps GPT-2's layout (in_features, out_features)."""

    @classmethod
    def from_float(cls, conv: Conv1D, spec: LayerSpec) -> BitConv1D:
        """Takes over the very parameters of `conv` (no copy)."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.nx, layer.nf = conv.nx, conv.nf
        layer.in_features, layer.out_features = conv.nx, conv.nf
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.training = conv.training
        layer.setup(spec)
        return layer

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()

    def float_linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        # addmm on the (in, out) layout, as Conv1D does, so that strength 0 equals it bit for bit
        assert self.bias is not None
        y = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), matrix.t())
        return y.view(*x.shape[:-1], self.out_features)
