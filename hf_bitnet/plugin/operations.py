"""What is done to the tensors of a checkpoint while they are loaded, one parameter at a time. Own."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from .. import kernels, surgery
from ..kernels.reference import TRITS_PER_BYTE
from ..modules import shape_of
from ..modules.native import pack_rows
from .checks import check_stored_dtype


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


class UnpackTrits(_AsStored):
    """A ternary weight of five codes a byte -> the layout of its layer, four a byte; other weights pass."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def __deepcopy__(self, memo: dict[int, Any]) -> UnpackTrits:
        return self  # as PackNativeRows

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **unused: Any
    ) -> dict[str, Tensor]:
        """As `_AsStored`; uint8 (N, ceil(K / 5)) -> uint8 (N, ceil(K / 4))."""
        stored = super().convert(input_dict, full_layer_name)[full_layer_name]
        layer: Any = model.get_submodule(full_layer_name.rpartition(".")[0])
        try:
            check_stored_dtype(full_layer_name, stored.is_floating_point(), expects_packed=True)
            if layer.quantizer.grid.values != [-1.0, 0.0, 1.0]:
                return {full_layer_name: stored}
            codes = _trits(full_layer_name, stored, *shape_of(layer))
        except ValueError as error:
            self.errors.append(error)
            raise
        grid = layer.quantizer.grid
        return {full_layer_name: kernels.pack(codes, layer.bits, grid.lowest, grid.step)}


def _trits(name: str, stored: Tensor, rows: int, columns: int) -> Tensor:
    expected, problem = (rows, -(-columns // TRITS_PER_BYTE)), None
    if tuple(stored.shape) != expected:
        problem = f"has shape {tuple(stored.shape)} in the checkpoint, but {expected} by storage='trits' of its config.json"
    elif stored.numel() and int(stored.max()) >= 3**TRITS_PER_BYTE:
        problem = f"holds the byte {int(stored.max())}, and five ternary weights make {3**TRITS_PER_BYTE - 1} at most"
    if problem is not None:
        raise ValueError(
            f"{name} {problem}; config.json and weights are not of the same checkpoint, or one is damaged; copy them again"
        )
    return kernels.unpack_trits(stored, columns)


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
