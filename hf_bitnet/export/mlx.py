"""Format "mlx": a checkpoint that mlx-lm loads. Own; the layouts are mlx's and mlx-lm's.

    affine   every scheme, in levels of 1, 2, 4 or 8 bits with a scale and a bias for each run of inputs (`affine.py`)
    bitnet   ternary with one scale for the tensor, in the layout of transformers' own method `bitnet`, for Apple GPUs only

In neither are activations quantized. Leaves out: models that mlx-lm's conversion rearranges; for those it reads format "dense".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..files import write_json
from ..modules import shape_of
from .affine import BITS, GROUP_SIZES, Layer
from .dense import DTYPES, config_problems, write_configs
from .format import EXPORT_FORMATS, ExportFormat, Progress, Source
from .mlx_check import exported_logits, mlx_checks
from .mlx_config import Architecture, architecture_of, model_problems, reader_settings, window_note
from .mlx_layouts import AffineLayout, Layout, RowLayout
from .options import check_choices, check_shard_size
from .plain import compare_tensors
from .report import Check, WrittenTensor
from .rounding import rounded
from .stream import Planned, planned, write_safetensors

_ROWS = "bitnet"


@EXPORT_FORMATS.register("mlx")
@dataclass(frozen=True)
class MLX(ExportFormat):
    """Args:
    layout: "affine" or "bitnet"; None takes "bitnet" where mlx-lm's model has no other (BitNet), else "affine".
    dtype: of scales and of all that stays float: "bfloat16", "float16" or "float32".
    group_size: inputs that share a scale: 128, 64 or 32, and less where that does not fit; None takes the most that fits.
    min_bits: of a weight: 1, or 2 for mlx before 0.32.
    max_shard_size: of one file.
    """

    summary: ClassVar[str] = "levels of 1, 2, 4 or 8 bits with scales for groups; weights only"
    readers: ClassVar[str] = "mlx-lm"

    layout: str | None = None
    dtype: str = "bfloat16"
    group_size: int | None = None
    min_bits: int = BITS[0]
    max_shard_size: str | int = "5GB"

    def __post_init__(self) -> None:
        layouts = (None, "affine", _ROWS)
        legal = {"layout": layouts, "dtype": tuple(DTYPES), "group_size": (None, *GROUP_SIZES), "min_bits": BITS}
        check_choices("mlx", self, legal)
        check_shard_size("mlx", self.max_shard_size)

    def refusals(self, source: Source) -> list[str]:
        architecture = architecture_of(source.model)
        if architecture is None:
            kind = source.model.config.model_type
            return [f"it is not made for {type(source.model).__name__} ({kind}); export as 'dense' and try mlx_lm.convert"]
        problems = config_problems(source) + model_problems(source.model, architecture)
        if source.normed:
            problems.append(f"{source.normed[0]} has a norm in front (sub_norm), for which mlx-lm has no place")
        if architecture.own_layers and self.layout not in (None, _ROWS):
            problems.append(f"mlx-lm's {source.model.config.model_type} has layers of layout='bitnet' only")
        return problems + self._layout(architecture).problems(source, _quantized(source))

    def notes(self, source: Source) -> list[str]:
        architecture = _architecture(source)
        notes = [f"weights only: activations stay in {self.dtype}", *self._layout(architecture).notes(_quantized(source))]
        if (note := window_note(source.model.config, architecture)) is not None:
            notes.append(note)
        if architecture.rounds_embedding and self.dtype == "float32":
            notes.append("mlx-lm rounds the factor of the embeddings to bfloat16")
        return notes

    def _layout(self, architecture: Architecture) -> Layout:
        dtype, own = DTYPES[self.dtype], architecture.own_layers
        if self.layout == _ROWS or (self.layout is None and own):
            return RowLayout(dtype, multiplies=own, everywhere=own)
        return AffineLayout(dtype, self.group_size, self.min_bits)

    def _tensors(self, source: Source) -> list[Planned]:
        layout, dtype = self._layout(_architecture(source)), DTYPES[self.dtype]
        tensors = [each for name, layer in _quantized(source).items() for each in layout.tensors(name, layer)]
        for name, layer in source.layers.items():
            if (bias := layer.plain_bias) is not None:
                tensors.append(_cast(f"{name}.bias", bias, dtype, 0))
        return tensors + [_cast(name, tensor, dtype, tensor.numel()) for name, tensor in source.others.items()]

    def write(self, source: Source, folder: Path, progress: Progress) -> list[WrittenTensor]:
        tensors, layers, architecture = self._tensors(source), _quantized(source), _architecture(source)
        layout, dtype = self._layout(architecture), DTYPES[self.dtype]
        write_safetensors(folder, tensors, max_shard_size=self.max_shard_size, progress=progress)
        write_configs(source, folder, None, dtype)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        added = reader_settings(source.model.config, architecture) | layout.settings(source.model, layers)
        write_json(folder / "config.json", config | added)
        return [self._written(each, layers.get(each.name.removesuffix(".weight")), layout) for each in tensors]

    def _written(self, each: Planned, layer: Layer | None, layout: Layout) -> WrittenTensor:
        if layer is None:
            return WrittenTensor(each.name, each.name, self.dtype, each.shape, each.bytes)
        kind, why = layout.described(layer)
        return WrittenTensor(each.name, each.name, kind, shape_of(layer), each.bytes, why)

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        architecture, layers = _architecture(source), _quantized(source)
        layout = self._layout(architecture)
        held = {name: lambda layer=layer: layout.held_by_mlx(layer) for name, layer in layers.items()}
        held = {name: make for name, make in held.items() if layout.holds(layers[name])}
        floats = {each.name: each for each in self._tensors(source) if each.dtype.is_floating_point}
        checks = [layout.check(layers, folder), compare_tensors(folder, floats, "scales, biases and what stays float")]

        def expected() -> Tensor:
            values = {name: lambda layer=layers[name]: layout.values(layer) for name in held}
            return exported_logits(source, values, DTYPES[self.dtype], architecture.rounds_embedding)

        return checks + mlx_checks(source, folder, held, expected if logits else None)


def _architecture(source: Source) -> Architecture:
    architecture = architecture_of(source.model)
    assert architecture is not None, "refused before"
    return architecture


def _quantized(source: Source) -> dict[str, Layer]:
    """Layers and tables that have tensors of their own in the file; a tied head is its table."""
    tied = {id(table.get_parameter("weight")) for table in source.tables.values()}
    layers = {name: layer for name, layer in source.layers.items() if id(layer.get_parameter("weight")) not in tied}
    return {**layers, **source.tables}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, weights: int) -> Planned:
    if not tensor.is_floating_point():
        return planned(name, tensor, weights)
    return Planned(name, dtype, tuple(tensor.shape), lambda: rounded(f"format 'mlx': {name}", tensor.detach(), dtype), weights)
