"""Keeps peft from renaming the experts of a quantized model. Own.

For adapters that were made before transformers fused experts, peft turns targets such as "w1" into the fused weights. Where
experts are separate layers (`surgery/experts.py`) those names are right as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import surgery


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
