"""Quantizes a float checkpoint while it is loaded, one parameter at a time. Own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from .. import surgery


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
