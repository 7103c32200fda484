"""Format "hf_bitnet": this library's own packed checkpoint, loaded by from_pretrained after `import hf_bitnet`. Own.

The files are those of `pack_model(model)` and save_pretrained, but every weight is packed when its turn comes to be written, so
the packed model is never in memory. `storage="trits"` stores five ternary weights a byte (1.6 bits) instead of four; loading
lays them out for the kernels again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from .. import kernels
from ..config import STORAGES
from ..kernels.reference import TRITS_PER_BYTE
from ..modules import BitEmbedding, NativeLayer, QuantizedEmbedding, QuantizedLayer, TrainedLayer, shape_of
from ..surgery import check_calibrated, check_finite, config_of, empty_packed_copy, packed_copy
from .dense import config_problems, write_configs
from .format import EXPORT_FORMATS, ExportFormat, Progress, Source
from .names import origins, saved_names
from .options import check_choices, check_shard_size
from .packed_check import compare_codes
from .plain import compare_tensors, plain_logits
from .report import Check, WrittenTensor
from .running import as_loaded
from .scales import scale_of
from .stream import Planned, planned, write_safetensors

_WEIGHT, _SCALE, _LIKE = "weight", "weight_scale", "like"
Layer = QuantizedLayer | QuantizedEmbedding


@EXPORT_FORMATS.register("hf_bitnet")
@dataclass(frozen=True)
class Packed(ExportFormat):
    """Args:
    storage: "bits" as save_pretrained writes them: 1, 2, 4 or 8 bits a weight; "trits": ternary weights in 1.6 bits.
    max_shard_size: of one file.
    """

    summary: ClassVar[str] = "packed weights of 1, 1.58, 2, 4 or 8 bits, with everything that hf_bitnet knows"
    readers: ClassVar[str] = "hf_bitnet"

    storage: str = "bits"
    max_shard_size: str | int = "5GB"

    def __post_init__(self) -> None:
        check_choices("hf_bitnet", self, {"storage": STORAGES})
        check_shard_size("hf_bitnet", self.max_shard_size)

    def refusals(self, source: Source) -> list[str]:
        found = config_problems(source)
        for name, layer in source.layers.items():
            try:
                check_calibrated(name, layer)
            except ValueError as error:
                found.append(str(error))
        if self._in_trits and not any(is_ternary(layer) for layer in _quantized(source).values()):
            found.append("storage='trits' is for ternary weights, and this model has none; leave it out")
        return found

    @property
    def _in_trits(self) -> bool:
        return self.storage != STORAGES[0]

    def write(self, source: Source, folder: Path, progress: Progress) -> list[WrittenTensor]:
        model = empty_packed_copy(source.model)
        saved, names = self._saved(source, model)
        write_safetensors(folder, saved, max_shard_size=self.max_shard_size, progress=progress)
        config = config_of(model)
        config.storage = self.storage
        write_configs(source, folder, config.to_dict(), model.dtype)
        return [self._written(source, names[each.name], each) for each in saved]

    def _written(self, source: Source, name: str, each: Planned) -> WrittenTensor:
        owner, leaf = _split(name, _quantized(source))
        layer = _quantized(source).get(owner)
        if layer is None or leaf != _WEIGHT:
            return WrittenTensor(name, each.name, str(each.dtype).removeprefix("torch."), each.shape, each.bytes)
        why = (
            "" if not self._in_trits or is_ternary(layer) else f"it has {layer.quantizer.grid.levels} levels, a trit has three"
        )
        kind = "1.6-bit" if self._in_trits and not why else f"{layer.quantizer.storage_bits}-bit"
        return WrittenTensor(name, each.name, kind, shape_of(layer), each.bytes, why)

    def _saved(self, source: Source, model: PreTrainedModel) -> tuple[list[Planned], dict[str, str]]:
        """Every tensor of the file, and its name there -> its name in the model. `model`: the empty packed one."""
        ignored = set(model._keys_to_ignore_on_save or ())
        empty = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
        layers, state = _quantized(source), source.model.state_dict()
        makers = {name: _Making(name, layer, self._in_trits) for name, layer in layers.items()}
        tensors = []
        for name, stand in remove_tied_weights_from_state_dict(empty, model).items():
            owner, leaf = _split(name, makers)
            made = makers[owner].planned(name, leaf, stand) if owner in makers else None
            tensors.append(planned(name, state[name]) if made is None else made)
        saved = saved_names(model, tensors)
        return saved, origins(tensors, saved)

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        layers, (saved, names) = _quantized(source), self._saved(source, empty_packed_copy(source.model))
        places = {file: _split(name, layers) for file, name in names.items()}
        weights = {file: layers[owner] for file, (owner, leaf) in places.items() if owner in layers and leaf == _WEIGHT}
        others = {each.name: each for each in saved if each.name not in weights}
        checks = [
            compare_codes(weights, folder, self._in_trits),
            compare_tensors(folder, others, "scales, biases and what stays float"),
        ]
        if not logits:
            return checks
        dtype = source.model.dtype
        twin = partial(_twin, source, dtype)
        return [*checks, plain_logits(source, folder, dtype, twin, with_library=True)]


class _Making:
    """The tensors of one layer, made when they are asked for. Only the scale waits, between the two that need it."""

    def __init__(self, name: str, layer: Layer, in_trits: bool) -> None:
        self._name, self._layer, self._trits = name, layer, in_trits and is_ternary(layer)
        self._waiting: Tensor | None = None

    def planned(self, name: str, leaf: str, stand: Tensor) -> Planned | None:
        """The tensor `leaf` of the packed layer, like `stand`; None for one that the layer has already."""
        shape, (rows, columns) = tuple(stand.shape), shape_of(self._layer)
        if leaf == _WEIGHT:
            shape = (rows, -(-columns // TRITS_PER_BYTE)) if self._trits else shape
            return Planned(name, stand.dtype, shape, self._weight, rows * columns)
        if leaf == _SCALE:
            return Planned(name, stand.dtype, shape, self._scale, 0)
        if leaf == _LIKE:
            return Planned(name, stand.dtype, shape, lambda: torch.ones(shape, dtype=stand.dtype, device="cpu"), 0)
        if isinstance(layer := self._layer, NativeLayer):
            return Planned(name, stand.dtype, shape, lambda: layer.converted().state_dict()[leaf], 0)
        return None

    def _scale(self) -> Tensor:
        scale, self._waiting = self._waiting, None
        if scale is None:
            scale = self._waiting = scale_of(self._layer).detach()
        return scale

    def _weight(self) -> Tensor:
        packed = self._packed()
        if not self._trits:
            return packed
        grid, bits = self._layer.quantizer.grid, self._layer.quantizer.storage_bits
        return kernels.pack_trits(kernels.unpack(packed, bits, grid.lowest, grid.step, shape_of(self._layer)[1]))

    def _packed(self) -> Tensor:
        layer = self._layer
        if isinstance(layer, TrainedLayer | BitEmbedding):
            matrix = layer.matrix if isinstance(layer, TrainedLayer) else layer.weight
            check_finite(self._name, matrix)
            return layer.quantizer.pack(matrix, self._scale())[0]
        return (layer.converted() if isinstance(layer, NativeLayer) else layer).get_parameter(_WEIGHT)


def _quantized(source: Source) -> dict[str, Layer]:
    return {**source.layers, **source.tables}


def _split(name: str, layers: Mapping[str, object]) -> tuple[str, str]:
    """Name of a tensor -> name of the layer it belongs to, and the rest: a sub-norm's belong to the layer behind it."""
    owner, _, leaf = name.rpartition(".")
    above, _, part = owner.rpartition(".")
    return (above, f"{part}.{leaf}") if above in layers else (owner, leaf)


def is_ternary(layer: Layer) -> bool:
    """Whether its codes are -1, 0 and 1."""
    return layer.quantizer.grid.values == [-1.0, 0.0, 1.0]


def _twin(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    return as_loaded(packed_copy(source.model, dtype))
