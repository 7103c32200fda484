"""How one layer is quantized, as plain data, and the checks of what a user may write. Own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..quantizers import ACTIVATION_SCHEMES, WeightQuantizer, make_weight_quantizer
from ..ste import ESTIMATORS

# what may be said about the layers that are as large as the vocabulary
VOCABULARY_FIELDS = {
    "embeddings": ("weight", "weight_scale", "granularity", "group_size"),
    "output_head": ("weight", "weight_scale", "granularity", "group_size", "activation", "ste"),
}
LAYER_FIELDS = ("weight", "weight_scale", "granularity", "group_size", "activation", "ste", "sub_norm")


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is quantized, as plain data; see `BitNetQuantizationConfig` for the fields."""

    weight: str
    weight_scale: str | None
    granularity: str | None
    group_size: int | None
    activation: str
    ste: str
    sub_norm: bool

    def quantizer(self) -> WeightQuantizer:
        return make_weight_quantizer(self.weight, self.weight_scale, self.granularity, self.group_size)

    @property
    def is_native(self) -> bool:
        """Whether transformers' own AutoBitLinear computes the same from the same float weight, and has no further state."""
        same_weight = self.quantizer() == make_weight_quantizer("ternary", "absmean", "tensor")
        stateless = not self.sub_norm and ESTIMATORS.get(self.ste).temperature_slope is None
        return same_weight and self.activation == "int8" and stateless


def vocabulary_layer(field: str, value: str | dict[str, Any], base: LayerConfig) -> LayerConfig:
    """What the value of `embeddings` or `output_head` (the `field`) says, with one scale a row by default.

    Tables have no activations, and the straight-through estimator.
    """
    given = {"weight": value} if isinstance(value, str) else value
    group_size = given.get("group_size")
    own = {"weight_scale": None, "granularity": "channel" if group_size is None else "group", "group_size": group_size}
    passive = {"activation": "none", "ste": "identity"} if field == "embeddings" else {}
    return replace(base, **(own | passive | given))


def validate_vocabulary(field: str, value: Any, base: LayerConfig) -> None:
    """Raises ValueError or TypeError on what `embeddings` or `output_head` (the `field`) cannot be."""
    legal, example = VOCABULARY_FIELDS[field], f"{field}='int8' or {field}={{'weight': 'int4', 'group_size': 32}}"
    if not isinstance(value, str | dict) or (isinstance(value, dict) and not isinstance(value.get("weight"), str)):
        raise TypeError(
            f"{field} must be a weight scheme, or a dict that names one as 'weight'; got {value!r}. Write {example}"
        )
    unknown = [name for name in value if name not in legal] if isinstance(value, dict) else []
    if unknown:
        raise ValueError(f"{field} names {unknown[0]!r}; fields: {', '.join(legal)}. For example {example}")
    layer = vocabulary_layer(field, value, base)
    try:
        validate_layer(layer)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{field}: {error}") from None
    if field == "embeddings" and layer.quantizer().learned:
        raise ValueError("embeddings: the scales of a table are computed, not learned; leave weight_scale out, or 'absmax'")
    if field == "embeddings" and layer.granularity not in ("channel", "group"):
        raise ValueError(
            f"embeddings: granularity={layer.granularity!r}; a table has one scale a row ('channel') or a group of it "
            f"('group'), for example {example}"
        )


def all_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def validate_layer(layer: LayerConfig) -> None:
    layer.quantizer()
    ACTIVATION_SCHEMES.get(layer.activation)
    ESTIMATORS.get(layer.ste)
    if not isinstance(layer.sub_norm, bool):
        raise TypeError(f"an override's sub_norm must be True or False, got {layer.sub_norm!r}")


def check_pattern(field: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{field}: {pattern!r} is not a regular expression ({error}); write for example r'layers\\.0\\.'"
        ) from None


def list_of_patterns(field: str, patterns: Any) -> list[str]:
    if isinstance(patterns, str) or not isinstance(patterns, list | tuple | None):
        raise TypeError(f"{field} must be a list of regular expressions, got {patterns!r}; write {field}=[{patterns!r}]")
    for pattern in patterns or []:
        check_pattern(field, pattern)
    return list(patterns or [])


def check_number(field: str, value: Any, lowest: float, highest: float | None = None) -> float:
    legal = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} must be a number {legal}, got {value!r}")
    if not value >= lowest or (highest is not None and value > highest) or value == float("inf"):
        raise ValueError(f"{field}={value!r} is out of range; legal: {legal}")
    return float(value)
