"""Format "dense": a plain checkpoint whose weights are the quantized values. Own.

Any version of transformers, and whatever reads its checkpoints, loads it; nothing of quantization is left in it but the values.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..modules import BitConv1D, PackedBitLinear, QuantizedEmbedding, QuantizedLayer, shape_of
from ..quantizers import Quantized
from ..surgery import separates_what_files_hold_fused
from .format import EXPORT_FORMATS, ExportFormat, Progress, Source
from .names import origins, saved_names
from .options import check_choices, check_shard_size
from .plain import compare_tensors, plain_logits
from .report import Check, WrittenTensor
from .rounding import rounded
from .stream import Planned, planned, write_safetensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@EXPORT_FORMATS.register("dense")
@dataclass(frozen=True)
class Dense(ExportFormat):
    """Args:
    dtype: of all tensors: "bfloat16", "float16" or "float32". Each value, code times scale, is rounded to it, once.
    max_shard_size: of one file.
    """

    summary: ClassVar[str] = "plain float weights that hold the quantized values; weights only"
    readers: ClassVar[str] = "transformers, vLLM, anything"

    dtype: str = "bfloat16"
    max_shard_size: str | int = "5GB"

    def __post_init__(self) -> None:
        check_choices("dense", self, {"dtype": DTYPES})
        check_shard_size("dense", self.max_shard_size)

    def refusals(self, source: Source) -> list[str]:
        if problems := config_problems(source):
            return problems
        if separates_what_files_hold_fused(source.model):
            return [
                "the checkpoints of its kind hold all experts of a layer in one tensor; use hf_bitnet.dequantize_model(model), "
                "then model.save_pretrained(folder)"
            ]
        normed = source.normed
        return [f"{normed[0]} has a norm in front (sub_norm), for which a plain layer has no place"] if normed else []

    def notes(self, source: Source) -> list[str]:
        return [f"weights only: activations stay in {self.dtype}, here they are quantized"]

    def write(self, source: Source, folder: Path, progress: Progress) -> list[WrittenTensor]:
        dtype = DTYPES[self.dtype]
        tensors = [_floats(name, layer, dtype) for name, layer in _matrices(source).items()]
        biases = {f"{name}.bias": layer.plain_bias for name, layer in source.layers.items()}
        tensors += [_cast(name, bias, dtype) for name, bias in biases.items() if bias is not None]
        tensors += [_cast(name, tensor, dtype) for name, tensor in source.others.items()]
        saved = saved_names(source.model, tensors)
        names = origins(tensors, saved)
        write_safetensors(folder, saved, max_shard_size=self.max_shard_size, progress=progress)
        write_configs(source, folder, None, dtype)
        return [WrittenTensor(names[each.name], each.name, self.dtype, each.shape, each.bytes) for each in saved]

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        dtype = DTYPES[self.dtype]
        stored = {each.name: each.stored for each in written}
        matrices = {stored[name]: layer for name, layer in _matrices(source).items()}
        expected = {name: _floats(name, layer, dtype) for name, layer in matrices.items()}
        checks = [compare_tensors(folder, expected, "quantized values")]
        return [*checks, plain_logits(source, folder, dtype)] if logits else checks


def config_problems(source: Source) -> list[str]:
    """Why transformers will not save the generation config, which `write_configs` writes after everything else."""
    generation: GenerationConfig | None = getattr(source.model, "generation_config", None)
    if not source.model.can_generate() or generation is None:
        return []
    with tempfile.TemporaryDirectory() as place:
        try:
            generation.save_pretrained(place)
        except ValueError as error:
            said = " ".join(str(error).partition("\n\n")[0].split())
            return [f"its generation_config cannot be saved; change model.generation_config: {said}"]
    return []


def write_configs(source: Source, folder: Path, settings: dict[str, object] | None, dtype: torch.dtype) -> None:
    """config.json with `settings` as quantization_config (None: without one), generation_config.json, tokenizer."""
    config = copy.deepcopy(source.model.config)
    for each in (config, config.get_text_config(decoder=True)):
        if hasattr(each, "quantization_config"):
            delattr(each, "quantization_config")
    if settings is not None:
        config.quantization_config = settings
    config.architectures = [type(source.model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    generation: GenerationConfig | None = getattr(source.model, "generation_config", None)
    if source.model.can_generate() and generation is not None:
        generation.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)


def _matrices(source: Source) -> dict[str, QuantizedLayer | QuantizedEmbedding]:
    """Name of the weight -> layer or table, without those that loading ties to another one, which has the same codes."""
    matrices = {f"{name}.weight": layer for name, layer in {**source.tables, **source.layers}.items()}
    tied, found = getattr(source.model, "all_tied_weights_keys", None) or {}, {}
    for name, layer in matrices.items():
        twin = matrices.get(tied.get(name, name), layer)
        if twin is layer or twin.get_parameter("weight") is not layer.get_parameter("weight"):
            found[name] = layer
    return found


def _floats(name: str, layer: QuantizedLayer | QuantizedEmbedding, dtype: torch.dtype) -> Planned:
    """The values of a layer or table, laid out as its plain one has them."""

    def values(part: Quantized) -> Tensor:
        # float16 does not hold every one of them
        return _rounded(name, part.dequantize(), dtype) if dtype == torch.float16 else part.dequantize(dtype)

    def made() -> Tensor | Iterator[Tensor]:
        if is_conv1d(layer):
            return values(layer.quantized_weight()).T
        return map(values, Source.blocks(layer))

    shape = shape_of(layer)
    return Planned(name, dtype, shape[::-1] if is_conv1d(layer) else shape, made, shape[0] * shape[1])


def is_conv1d(layer: QuantizedLayer | QuantizedEmbedding) -> bool:
    """Whether its float weight is laid out (in_features, out_features)."""
    return isinstance(layer, BitConv1D) or (isinstance(layer, PackedBitLinear) and layer.was_conv1d)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Planned:
    if not tensor.is_floating_point():
        return planned(name, tensor)
    return Planned(name, dtype, tuple(tensor.shape), lambda: _rounded(name, tensor.detach(), dtype), tensor.numel())


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return rounded(f"format 'dense': {name}", tensor, dtype)
