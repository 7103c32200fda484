"""Traces a view of a model with torch.onnx.export and writes model.onnx beside its data, some rows at a time. Own.

    plain    input_ids, attention_mask -> logits
    cached   and past_key_values.0.key, ... -> logits, present.0.key, ...: the names that Optimum uses

The keys and values are those of whole texts: a layer with a sliding window masks them, and drops none.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..stream import Planned, append
from .stack import find_stack, repeat, shortened

FILE = "model.onnx"
DATA = "model.onnx.data"
_ALIGNMENT = 64
# what the traced module calls the view
_PREFIX = "model."
# of a layer's keys and values
_PAST_NAME, _PRESENT_NAME = "past_key_values", "present"
# of what the trace runs with; no two sizes are alike, and none is 0 or 1, which would be taken for constants
_BATCH, _LENGTH, _PAST = 2, 11, 6


class _Plain(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class _Cached(_Plain):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        # without a config every layer keeps all keys: where a window has dropped some, their number would be lost
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return (output.logits, *_keys_and_values(output.past_key_values))


def _keys_and_values(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]


@dataclass(frozen=True)
class _Signature:
    """Attributes:
    module: what is traced. inputs: of its forward. dims: their sizes that may change.
    names, outputs: of the graph's inputs and outputs.
    """

    module: nn.Module
    inputs: dict[str, Any]
    dims: dict[str, Any]
    names: list[str]
    outputs: list[str]


def _plain(model: Any) -> _Signature:
    model.config.get_text_config().use_cache = model.config.use_cache = False
    inputs = _tokens(_LENGTH)
    dims = {name: {0: "batch", 1: "sequence"} for name in inputs}
    return _Signature(_Plain(model), inputs, dims, list(inputs), ["logits"])


def _cached(model: Any) -> _Signature:
    shapes = [tensor.shape for tensor in _keys_and_values(model(**_tokens(2), use_cache=True).past_key_values)]
    names = [f"{_PAST_NAME}.{i}.{what}" for i in range(len(shapes) // 2) for what in ("key", "value")]
    inputs: dict[str, Any] = _tokens(_LENGTH, _PAST)
    dims: dict[str, Any] = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    inputs["past"] = [torch.zeros(_BATCH, shape[1], _PAST, shape[3], dtype=model.dtype, device="cpu") for shape in shapes]
    dims["past"] = [{0: "batch", 2: "past"}] * len(shapes)
    presents = [name.replace(_PAST_NAME, _PRESENT_NAME) for name in names]
    return _Signature(_Cached(model), inputs, dims, ["input_ids", "attention_mask", *names], ["logits", *presents])


def _tokens(length: int, past: int = 0) -> dict[str, Tensor]:
    ids = torch.zeros(_BATCH, length, dtype=torch.long, device="cpu")
    return {"input_ids": ids, "attention_mask": torch.ones(_BATCH, past + length, dtype=torch.long, device="cpu")}


def trace(model: Any, planned: Collection[str], *, kv_cache: bool, opset: int) -> Any:
    """The view of a model (`traced.py`) as an onnxscript.ir.Model, simplified, whose initializers are not filled yet.

    Args:
        planned: names of the view's parameters.

    Raises ValueError when the model's forward cannot be traced or makes no logits.
    """
    stack = find_stack(model)
    if stack is not None:
        with contextlib.suppress(ValueError), shortened(model, stack):  # a forward may count its layers
            graph = _simplified(_trace(model, kv_cache=kv_cache, opset=opset), planned)
            if repeat(graph.graph, stack, _PREFIX, (f"{_PAST_NAME}.{{}}.", f"{_PRESENT_NAME}.{{}}.")):
                return graph
    return _simplified(_trace(model, kv_cache=kv_cache, opset=opset), planned)


def _trace(model: Any, *, kv_cache: bool, opset: int) -> Any:
    try:
        with torch.no_grad(), _quiet(), _uncollected():
            # plain products: other ways to attend look at the values of masks, to choose experts at those of the router
            model.set_attn_implementation("eager")
            model.set_experts_implementation("batched_mm")
            signature = (_cached if kv_cache else _plain)(model)
            program = torch.onnx.export(
                signature.module.eval(),
                kwargs=signature.inputs,
                dynamic_shapes=signature.dims,
                input_names=signature.names,
                output_names=signature.outputs,
                opset_version=opset,
                dynamo=True,
                optimize=False,  # it would compute with the view's zeros
                verbose=False,
            )
    except Exception as error:
        hint = "kv_cache=False, or another format" if kv_cache else "another format, for example 'dense'"
        kind, cause = type(model).__name__, _first_cause(error)
        raise ValueError(f"format 'onnx': torch.onnx.export cannot follow {kind} ({cause}); choose {hint}") from error
    assert program is not None
    return program.model


def _simplified(graph: Any, planned: Collection[str]) -> Any:
    from onnxscript import optimizer  # pyright: ignore[reportMissingImports]

    values = graph.graph.initializers
    for name in {f"{_PREFIX}{name}" for name in planned} & values.keys():
        values[name].const_value = None  # or it would be computed with
    with _quiet():
        optimizer.optimize(graph)
    return graph


def write(graph: Any, planned: dict[str, Planned], folder: Path, progress: Callable[[int], object]) -> dict[str, str]:
    """Writes model.onnx and, some rows at a time, the data beside it.

    Args:
        planned: name of a parameter of the view -> what it stands for.

    Returns name of a parameter -> name of the initializer that holds it, without those that the graph does not read.
    """
    from onnxscript import ir  # pyright: ignore[reportMissingImports]
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass  # pyright: ignore[reportMissingImports]

    values, of = graph.graph.initializers, {f"{_PREFIX}{name}": each for name, each in planned.items()}
    ClearMetadataAndDocStringPass()(graph)  # where on this machine each node was traced
    held: dict[int, str] = {}
    with open(folder / DATA, "wb") as file:
        for name in [name for name in of if name in values]:
            each, held[id(of[name])] = of[name], name
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            start = file.tell()
            append(file, each)
            dtype = ir.DataType.from_numpy(torch.empty(0, dtype=each.dtype, device="cpu").numpy().dtype)
            shape = ir.Shape(each.shape)
            values[name].const_value = ir.ExternalTensor(DATA, start, each.bytes, dtype, shape=shape, name=name)
            progress(each.weights)
    ir.save(graph, folder / FILE)
    # tied parameters stand for one thing, and the graph has it once
    return {name: held[id(each)] for name, each in planned.items() if id(each) in held}


def _first_cause(error: BaseException) -> str:
    """The exporter wraps an error in several of its own, which say nothing of it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Looking for garbage among all that the exporter makes takes a tenth of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own use of deprecated functions, of optional packages, and of initializers without values."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
