"""What the trained and the packed layer share. Own."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..quantizers import ActivationScheme, Quantized, WeightQuantizer
from .functional import BitLinearFunction, WeightSource
from .low_precision import Int8Backward
from .shared_activation import quantize_shared
from .sub_norm import SubNorm

# float32 whatever dtype the model is cast to: a bfloat16 scale is off by up to 0.4 %, which every output inherits
PROTECTED = ("weight_scale", "act_scale", "ste_temperature", "strength")
_WRAPPERS = re.compile(r"(^module\.|_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.)")


def unwrapped(name: str) -> str:
    """A dotted name as the model has it, however it is compiled, checkpointed or spread over processes just now."""
    return _WRAPPERS.sub("", name)


def other_form(layer: nn.Module, state_dict: dict[str, Any], prefix: str) -> str | None:
    """What is wrong where a state dict has packed bytes for a float weight, or floats for a packed one: they would be cast."""
    given, own = state_dict.get(f"{prefix}weight"), layer._parameters.get("weight")
    if not isinstance(given, Tensor) or own is None or given.is_floating_point() == own.is_floating_point():
        return None
    form, way = ("in train form", "unpack_model") if given.is_floating_point() else ("packed", "pack_model")
    return f"{prefix}weight holds {given.dtype}, so it is {form}, and the model is not; call hf_bitnet.{way}(model) first"


class QuantizedLayer(nn.Module):
    """A linear map y = x W^T + b whose W is a set of codes and a scale.

    Attributes:
        in_features, out_features: sizes of W (out_features, in_features).
        activation: scheme of the input.
        act_scale: 0-dim float32 buffer, only for static schemes; 0 until calibrated.
        sub_norm: optional RMS norm in front.
        int8_backward: the products of backward that take int8 gradients; None (default) for exact ones.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    activation: type[ActivationScheme]
    act_scale: Tensor | None
    sub_norm: SubNorm | None
    int8_backward: Int8Backward | None = None

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        state_dict, prefix, *_, errors = args  # torch calls it by position
        problem = other_form(self, state_dict, prefix)
        if problem is not None:
            errors.append(problem)  # which load_state_dict raises; nothing is copied
        else:
            super()._load_from_state_dict(*args, **named)

    @property
    def quantizer(self) -> WeightQuantizer:
        """What makes the codes of this layer."""
        raise AssertionError("abstract")

    def quantized_weight(self) -> Quantized:
        """Codes int8 (out_features, in_features) and scale that forward uses."""
        raise AssertionError("abstract")

    @property
    def multiplies_codes(self) -> bool:
        """Whether its present forward multiplies integer codes."""
        return True

    @property
    def plain_bias(self) -> Tensor | None:
        """b of y = x W^T + b, for the layer that replaces this one."""
        return self.bias

    def setup_activation(
        self,
        activation: type[ActivationScheme],
        sub_norm: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
        sub_norm_eps: float = 1e-6,
    ) -> None:
        """Registers what belongs to the input side. Called once, by the constructors."""
        self.activation = activation
        scale = torch.zeros((), dtype=torch.float32, device=device) if activation.static else None
        self.register_buffer("act_scale", scale)
        self.sub_norm = SubNorm(self.in_features, sub_norm_eps, device, dtype) if sub_norm else None

    def check_input(self, x: Tensor) -> None:
        """Raises TypeError or ValueError on an input that no linear layer could mean."""
        name = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(
                f"{name} got an input of dtype {x.dtype}; it takes float32, bfloat16 or float16 and quantizes them itself. "
                "If the model casts to `layer.weight.dtype`, keep this layer: keep=['<its name>']"
            )
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{name} got an input of shape {tuple(x.shape)}; the last size must be in_features={self.in_features}"
            )

    def apply_codes(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        temperature: Tensor | None,
        source: WeightSource,
        held: Quantized | None = None,
    ) -> Tensor:
        """The integer-native product of `functional.py`: (..., in_features) -> (..., out_features)."""
        dtype = kernels.autocast_dtype(x)
        if self.activation.quantizes:
            codes, x_scale, x_zero = quantize_shared(x, self.activation, self.act_scale)
            zero = x_zero if isinstance(x_zero, Tensor) else None
        else:
            codes, x_scale, zero = x.detach().reshape(-1, x.shape[-1]).to(dtype), None, None
        int8 = self.int8_backward
        if int8 is not None and int8.meter is not None and torch.compiler.is_compiling():
            int8 = None  # a compiled graph keeps no figures: gradients are exact, as while they are measured
        coded = codes, x_scale, zero
        y = BitLinearFunction.apply(x, weight, scale, temperature, self.bias, *coded, source, held, int8, dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As nn.Module's (`.to`, `.bfloat16`, ...), but the tensors in `PROTECTED` stay float32."""
        with keep_float32(self):
            return super()._apply(fn, recurse)


@contextlib.contextmanager
def keep_float32(module: nn.Module) -> Iterator[None]:
    """Inside, `module._apply` may cast what it wants; afterwards the module's tensors in `PROTECTED` are float32 again."""
    before = {
        name: tensor.data
        for name in PROTECTED
        if (tensor := module._parameters.get(name, module._buffers.get(name))) is not None
    }
    yield
    for name, original in before.items():
        after = module._parameters.get(name, module._buffers.get(name))
        assert after is not None
        if after.dtype != original.dtype:
            after.data = original.to(after.device)
