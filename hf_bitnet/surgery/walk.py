"""The quantized parts of a model, found. Own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..modules import (
    BitEmbedding,
    NativeLayer,
    PackedBitLinear,
    QuantizedEmbedding,
    QuantizedLayer,
    TrainedLayer,
)

_IN_WORDS: dict[type[Any], str] = {
    QuantizedLayer: "quantized layer",
    TrainedLayer: "quantized layer to be trained",
    PackedBitLinear: "packed layer",
    NativeLayer: "layer of transformers' own bitnet formats",
}


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(dotted name, layer) of every quantized layer, each once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def quantized_tables(model: nn.Module) -> list[tuple[str, QuantizedEmbedding]]:
    """(dotted name, table) of every quantized table of embeddings, in train form or packed, each once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedEmbedding)]


def trained_tables(model: nn.Module) -> list[BitEmbedding]:
    """Every table of embeddings in train form."""
    return [table for _, table in quantized_tables(model) if isinstance(table, BitEmbedding)]


def trained_layers(model: nn.Module) -> list[tuple[str, TrainedLayer]]:
    """(dotted name, layer) of every layer in train form."""
    return [(name, layer) for name, layer in quantized_layers(model) if isinstance(layer, TrainedLayer)]


def layers_of(model: nn.Module, kind: type[Any], caller: str, advice: str) -> list[tuple[str, Any]]:
    """(dotted name, layer) of every quantized layer of a kind. Raises what the caller's user has to read when there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes an nn.Module, got {type(model).__name__}; pass the quantized model itself")
    layers = [(name, layer) for name, layer in quantized_layers(model) if isinstance(layer, kind)]
    if not layers and kind is TrainedLayer and next(quantized_layers(model), None) is not None:
        raise ValueError(f"{caller}: the model is packed; call hf_bitnet.unpack_model(model) first")
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no {_IN_WORDS[kind]}; call {advice} first")
    return layers
