"""Reads model.onnx back: packed matrices by the library onnx and numpy, the whole by onnxruntime. Own.

Nothing of what wrote the file is used here: the values are unpacked as the operators' schema defines them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...modules import shape_of
from ...quantizers import Quantized
from ..format import Source
from ..plain import compare_logits
from ..report import Check
from .graph import FILE

# operator -> which of its inputs are the matrix, the scales and the zeros
_OPERATORS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
# the last tokens of the probe, which a model with a cache reads one at a time
_STEPS = 4


class _Packed:
    """The packed matrices of a file.

    Attributes:
        nodes: (operator, name of its matrix) -> the node. tensors: name -> where its numbers lie.
    """

    def __init__(self, folder: Path) -> None:
        import onnx  # pyright: ignore[reportMissingImports]

        graph = onnx.load(folder / FILE, load_external_data=False).graph
        self._folder = folder
        self._reshaped: dict[str, str] = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: dict[tuple[str, str], Any] = {}
        for node in graph.node:
            if node.op_type in _OPERATORS:
                matrix = node.input[_OPERATORS[node.op_type][0]]
                self.nodes[node.op_type, self._reshaped.get(matrix, matrix)] = node

    def array(self, node: Any, which: int) -> np.ndarray | None:
        """An input of a node; None where it has none."""
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

        place = _OPERATORS[node.op_type][which]
        if place >= len(node.input):
            return None
        name: str = node.input[place]
        return numpy_helper.to_array(self.tensors[self._reshaped.get(name, name)], base_dir=str(self._folder))

    def differs(self, node: Any, shape: tuple[int, int], parts: Iterable[Quantized], dtype: torch.dtype) -> bool:
        """Whether a node's matrix has other values than the rows in `parts`, whose scales are rounded to `dtype`."""
        (rows, columns), of = shape, {attribute.name: attribute.i for attribute in node.attribute}
        packed, scales, zeros = (self.array(node, which) for which in range(3))
        assert packed is not None and scales is not None
        bits = of["bits"]
        as_said = (of.get("N", rows), of.get("K", columns)) == shape and scales.size % rows == packed.size % rows == 0
        if not as_said or 8 * packed.size != scales.size * of["block_size"] * bits:
            return True
        packed, scales = packed.reshape(rows, -1, 1), scales.reshape(rows, -1, 1).astype(np.float32)
        zero = np.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros.reshape(scales.shape).astype(np.float32)
        end = 0
        for part in parts:
            here = slice(end, end := end + len(part.codes))
            codes = (packed[here] >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)
            blocks = codes.reshape(*scales[here].shape[:2], -1).astype(np.float32)
            found = ((blocks - zero[here]) * scales[here]).reshape(len(blocks), -1)[:, :columns]
            wanted = part._replace(scale=part.scale.detach().to(dtype).float()).dequantize()
            if not np.array_equal(found, wanted.cpu().numpy()):
                return True
        return end != rows


def compare_codes(source: Source, folder: Path, stored: Mapping[str, str], dtype: torch.dtype) -> Check:
    """Every packed matrix against the model's own codes and scales, exactly.

    Args:
        stored: dotted name of a layer or table -> name of its matrix in the file. dtype: that scales are rounded to.
    """
    reader, what, file = "onnx", "codes and scales", _Packed(folder)
    for name, matrix in stored.items():
        operator = "MatMulNBits" if name in source.layers else "GatherBlockQuantized"
        layer, node = source.layers.get(name) or source.tables[name], file.nodes.get((operator, matrix))
        if node is None:
            return Check(reader, what, False, f"there is no {operator} of {name}")
        if file.differs(node, shape_of(layer), Source.blocks(layer), dtype):
            return Check(reader, what, False, f"{name} is another")
    return Check(reader, what, True, f"{len(stored)} matrices, exactly")


def compare_runtime(
    folder: Path, ids: Tensor, expected: Tensor, limit: float, *, reader: str = "onnxruntime", accuracy_level: int | None = None
) -> Check:
    """What onnxruntime computes of `ids` against the `expected` logits; see `runtime_logits`."""
    try:
        found = runtime_logits(folder, ids, accuracy_level=accuracy_level)
    except Exception as error:  # those of its own have no class in common
        import onnxruntime  # pyright: ignore[reportMissingImports]

        return Check(reader, "logits", False, f"version {onnxruntime.__version__} cannot run it: {str(error)[:300]}")
    return compare_logits(reader, found, expected, limit)


def runtime_logits(folder: Path, ids: Tensor, *, accuracy_level: int | None = None) -> Tensor:
    """Logits float32 of model.onnx on the CPU, by onnxruntime; with a cache the last tokens come one at a time.

    Args:
        ids: int64 (B, S). accuracy_level: of all products, other than the file says.
    """
    session = _session(folder, accuracy_level)
    inputs = {each.name: each for each in session.get_inputs()}
    past = {name: _no_keys(each, len(ids)) for name, each in inputs.items() if name.startswith("past_key_values.")}
    steps, logits, end = [ids.shape[1]], [], 0
    if past:
        steps = [ids.shape[1] - _STEPS, *[1] * _STEPS]
    for step in steps:
        start, end = end, end + step
        tokens = {"input_ids": ids[:, start:end].numpy(), "attention_mask": np.ones((len(ids), end), dtype=np.int64)}
        first, *present = session.run(None, {**{k: v for k, v in tokens.items() if k in inputs}, **past})
        past = dict(zip(past, present, strict=True))
        logits.append(torch.from_numpy(first).float())
    return torch.cat(logits, dim=1) if past else logits[0]


def _no_keys(like: Any, batch: int) -> np.ndarray:
    dtype = np.float16 if like.type == "tensor(float16)" else np.float32
    return np.zeros((batch, like.shape[1], 0, like.shape[3]), dtype=dtype)


def _session(folder: Path, accuracy_level: int | None) -> Any:
    import onnx  # pyright: ignore[reportMissingImports]
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    model: Any = str(folder / FILE)
    if accuracy_level is not None:
        proto = onnx.load(model, load_external_data=False)
        for attribute in (each for node in proto.graph.node for each in node.attribute if each.name == "accuracy_level"):
            attribute.i = accuracy_level
        model = proto.SerializeToString()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
