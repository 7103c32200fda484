"""What is done to the tensors of a checkpoint while they are loaded, one parameter at a time. Own."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from .. import surgery
from ..modules.native import pack_rows


class QuantizeOnLoad(ConversionOps):
    """The float weight of one layer -> every tensor of the quantized layer; the float copy is not kept.

    transformers collects what goes wrong in a conversion as text; `errors` keeps the exceptions themselves.
    """

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **unused: Any
    ) -> dict[str, Tensor]:
        """{any name: weight, alone or in a list} -> {full name: tensor}."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.rpartition(".")[0]
        try:
            state = surgery.state_from_float(name, model.get_submodule(name), weight)  # type: ignore[arg-type]
        except Exception as error:
            self.errors.append(error)
            raise
        return {f"{name}.{key}": tensor for key, tensor in state.items()}


class _AsStored(ConversionOps):
    """Leaves a tensor as it is."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, **unused: Any
    ) -> dict[str, Tensor]:
        """{any name: tensor, alone or in a list} -> {full name: tensor}."""
        (value,) = input_dict.values()
        return {full_layer_name: value[0] if isinstance(value, list) else value}


class PackNativeRows(_AsStored):
    """A native layer's weight -> the packed layout; checkpoints of the kind autobitlinear may hold it as floats -1, 0, 1."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def __deepcopy__(self, memo: dict[int, Any]) -> PackNativeRows:
        return self  # transformers copies operations for every tensor; the errors belong in one list

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, **unused: Any
    ) -> dict[str, Tensor]:
        """As `_AsStored`; uint8 passes, floats are packed."""
        weight = super().convert(input_dict, full_layer_name)[full_layer_name]
        if not weight.is_floating_point():
            return {full_layer_name: weight}
        codes = weight.to(torch.int8)
        if not torch.equal(codes.to(weight.dtype), weight) or codes.abs().amax() > 1:
            error = ValueError(
                f"{full_layer_name} should hold -1, 0 and 1 only; this is not an offline checkpoint of the method 'bitnet'. If "
                "its weights are to be quantized while it runs, its config.json needs quantization_mode='online'"
            )
            self.errors.append(error)
            raise error
        return {full_layer_name: pack_rows(codes)}


def layers_converter(patterns: list[str], base_prefix: str, operation: ConversionOps | None = None) -> WeightConverter:
    """A converter of the weights of quantized layers; without an operation it only marks them as changed.

    A layer that goes to the disk is read from the checkpoint itself later, where its weight is still float, unless a
    WeightConverter had it in hand.

    Args:
        patterns: a config's `quantized_modules`.
    """
    names = sorted({pattern.removeprefix(f"{base_prefix}.") for pattern in patterns})
    either = "|".join(re.escape(name).replace(r"\*", r"\d+") for name in names)
    return WeightConverter([rf"((?:^|\.)(?:{either})\.weight)$"], [r"\1"], [operation or _AsStored()])


def without_our_converters(conversions: list[Any]) -> list[Any]:
    """What save_pretrained has to revert: ours change nothing in the names."""
    return [each for each in conversions if not any(isinstance(op, _AsStored) for op in getattr(each, "operations", ()))]
