"""What peft has to know of quantized models: which names are right as they are, and what cannot be merged. Own.

For adapters that were made before transformers fused experts, peft turns targets such as "w1" into the fused weights. Where
experts are separate layers (`surgery/experts.py`) those names are right.

A merge adds floats to weights in place, one layer after the other. At the first packed one it would fail, behind layers that
are merged already; so it is refused before it begins.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from .. import surgery
from ..modules import QuantizedEmbedding, QuantizedLayer
from ..surgery.adapters import without_adapter


def leave_separate_experts(conversions: ModuleType) -> None:
    """Extends two functions of `peft.utils.transformers_weight_conversion`; other models pass through them unchanged."""
    for name, unchanged in (
        ("convert_peft_config_for_transformers", None),  # changes `peft_config` in place
        ("convert_peft_adapter_state_dict_for_transformers", "adapter_state_dict"),  # returns it with other names
    ):
        if (original := getattr(conversions, name, None)) is not None:  # else a peft from before fused experts
            setattr(conversions, name, _extended(original, unchanged))


def _extended(original: Callable[..., Any], unchanged: str | None) -> Callable[..., Any]:
    """`unchanged`: the argument that is returned for models with separate experts."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def extended(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named).arguments
        if not surgery.has_separate_experts(given["model"]):
            return original(*args, **named)
        return None if unchanged is None else given[unchanged]

    return extended


def refuse_merges_into_packed_layers(tuners: ModuleType) -> None:
    """Extends the check of `peft.tuners.tuners_utils.BaseTuner` that stands in front of every merge."""
    original = getattr(tuners.BaseTuner, "_check_merge_allowed", None)
    if original is None:
        return

    @functools.wraps(original)
    def extended(self: Any) -> None:
        _check_merge(self.model)
        original(self)

    tuners.BaseTuner._check_merge_allowed = extended


def _check_merge(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "base_layer" not in module._modules:
            continue
        layer = without_adapter(module)
        if isinstance(layer, QuantizedLayer | QuantizedEmbedding) and not layer.get_parameter("weight").is_floating_point():
            raise ValueError(
                f"{name} is packed, and adapters are merged into float weights; nothing was merged. Unpack the model before: "
                "hf_bitnet.unpack_model(model); hf_bitnet.pack_model(model.merge_and_unload())"
            )
