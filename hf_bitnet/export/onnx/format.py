"""Format "onnx": what a user may ask for, what is refused and said, and the order of the work. Own."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ..dense import config_problems, write_configs
from ..format import EXPORT_FORMATS, ExportFormat, Progress, Source
from ..options import check_choices
from ..plain import FLOAT32_LIMIT
from ..report import Check, WrittenTensor
from ..running import dequantized_logits
from ..stream import Planned
from .blocks import BITS, Blocks
from .graph import FILE, trace, write
from .readers import compare_codes, compare_runtime
from .traced import Wanted, plans, traced_view

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_LEVELS = {0: "float", 4: "int8"}
_OPSETS = range(18, 24)
_PARTS = ("weight", "scales", "zero_points")  # of a packed matrix
# of the root mean square of the logits
_LIMITS = {"float32": FLOAT32_LIMIT, "float16": 1e-2}
# activations in blocks of int8 are off by up to 1 % in each product
_INT8_LIMIT = 0.1
_INSTALL = "pip install 'hf_bitnet[onnx]'"


@EXPORT_FORMATS.register("onnx")
@dataclass(frozen=True)
class Onnx(ExportFormat):
    """Args:
    dtype: of activations, scales and whatever is not quantized: "float32" or "float16".
    accuracy_level: of the products: 0 for float activations, 4 for int8 ones, which is faster.
    min_bits: 4 for programs without 2-bit products.
    kv_cache: the graph takes keys and values of earlier tokens, and returns them; for generation.
    opset: of the standard operators.
    """

    summary: ClassVar[str] = "a graph whose quantized layers are MatMulNBits of 2, 4 or 8 bits; weights only"
    readers: ClassVar[str] = "onnxruntime"
    library: ClassVar[str | None] = None

    dtype: str = "float32"
    accuracy_level: int = 0
    min_bits: int = 2
    kv_cache: bool = False
    opset: int = 20

    def __post_init__(self) -> None:
        legal = {"dtype": _DTYPES, "accuracy_level": _LEVELS, "min_bits": BITS, "kv_cache": (False, True), "opset": _OPSETS}
        check_choices("onnx", self, legal)

    @property
    def _wanted(self) -> Wanted:
        return Wanted(_DTYPES[self.dtype], self.accuracy_level, self.min_bits)

    def refusals(self, source: Source) -> list[str]:
        _check_packages()
        model, kind = source.model, type(source.model).__name__
        if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
            return [f"{kind} is no map from input_ids to logits, which the graph is; choose format='dense'"]
        if self.kv_cache and not model.can_generate():
            return [f"{kind} generates no text, so that it has no keys and values to keep; leave out kv_cache=True"]
        try:
            plans(source, self._wanted)
        except ValueError as error:
            return [str(error)]
        return config_problems(source)

    def notes(self, source: Source) -> list[str]:
        notes = []
        if any(layer.activation.quantizes for layer in source.layers.values()):
            what = "int8 in blocks" if self.accuracy_level else self.dtype
            notes.append(f"weights only: activations are {what} in the products, here they are quantized otherwise")
        if any(each.bits == BITS[0] for each in plans(source, self._wanted).values()):
            notes.append("2-bit operators need onnxruntime 1.27 or later; for earlier ones: min_bits=4")
            if not self.accuracy_level:
                notes.append("with float activations onnxruntime makes floats of 2-bit weights each time; see accuracy_level=4")
        if getattr(source.model.config, "type_vocab_size", 0) > 1:
            notes.append("every token_type_id is 0: the graph takes input_ids and attention_mask")
        return notes

    def use(self, source: Source, folder: Path) -> str:
        return (
            "```python\nimport onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{FILE}")\n'
            "print([each.name for each in session.get_inputs()])\n```"
        )

    def write(self, source: Source, folder: Path, progress: Progress) -> list[WrittenTensor]:
        model, planned = traced_view(source, self._wanted)
        graph = trace(model, planned, kv_cache=self.kv_cache, opset=self.opset)
        stored = write(graph, planned, folder, progress)
        write_configs(source, folder, None, _DTYPES[self.dtype])
        blocks = plans(source, self._wanted)
        matrices = [_matrix(name, how, planned, stored) for name, how in blocks.items()]
        parts = {f"{name}.{part}" for name in blocks for part in _PARTS}
        others = [name for name in planned if name not in parts]
        return matrices + [_other(planned[name], stored.get(name), self.dtype) for name in others]

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        dtype, stored = _DTYPES[self.dtype], {each.name.removesuffix(".weight"): each.stored for each in written}
        quantized = {name: stored[name] for name in (*source.layers, *source.tables)}
        checks = [compare_codes(source, folder, quantized, dtype)]
        if not logits:
            return checks
        if importlib.util.find_spec("onnxruntime") is None:
            return [*checks, Check("onnxruntime", "logits", None, _INSTALL)]
        given = folder, source.probe(), dequantized_logits(source, dtype)
        checks.append(compare_runtime(*given, _LIMITS[self.dtype], accuracy_level=0))
        if self.accuracy_level:
            checks.append(compare_runtime(*given, _INT8_LIMIT, reader="onnxruntime, int8 activations"))
        return checks


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"format 'onnx' needs the package {missing[0]}: {_INSTALL}")
    if not hasattr(torch.onnx, "ops"):
        raise ImportError(f"format 'onnx' needs torch 2.8 or later, this is {torch.__version__}: pip install -U torch")


def _matrix(name: str, how: Blocks, planned: dict[str, Planned], stored: dict[str, str]) -> WrittenTensor:
    found = stored.get(f"{name}.weight")
    if found is None:
        raise ValueError(f"format 'onnx': a forward of input_ids does not use {name}; choose format='dense'")
    size = sum(planned[key].bytes for part in _PARTS if (key := f"{name}.{part}") in planned)
    return WrittenTensor(f"{name}.weight", found, how.kind, (how.rows, how.columns), size, how.why)


def _other(each: Planned, stored: str | None, dtype: str) -> WrittenTensor:
    if stored is None:
        return WrittenTensor(each.name, "", "left out", each.shape, 0, "the graph does not read it")
    return WrittenTensor(each.name, stored, dtype, each.shape, each.bytes)
