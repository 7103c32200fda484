"""Which linear maps of a model are quantized, and why the others are not. Own.

Nothing is guessed from parameter names ending in ".weight": a layer is kept because the model itself says so (output
embeddings, tied weights, float32 modules), because of what it is called (heads, routers) or because its parent uses the
raw weight, where a quantized forward would be bypassed in silence.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import BitNetQuantizationConfig, LayerConfig
from ..modules import PackedBitLinear, QuantizedEmbedding, TrainedLayer
from .vocabulary import check_vocabulary, head_layers, token_tables

HEADS = (
    *("lm_head", "lm_head_decoder", "embed_out", "output_projection", "proj_out", "logits_proj"),
    *("classifier", "classification_head", "score", "scores", "qa_outputs", "qa_classifier", "pooler", "cls", "summary"),
    *("mc_head", "multiple_choice_head", "v_head", "reward_head"),
)
_HEADS = re.compile(rf"(^|\.)({'|'.join(HEADS)})(\.|$)")
_ROUTERS = re.compile(r"(^|\.)(router|gate|gating|wg|shared_expert_gate|expert_gate|layer_router)(\.|$)")

# methods that read weights once, before there are quantized ones
_SETTING_UP = ("_init_weights", "tie_weights", "_tie_weights")


@dataclass(frozen=True)
class Choice:
    """One linear map, or one table of token embeddings, found in a model.

    Attributes:
        name: dotted module name (the first, where several names lead to one module).
        module: the module.
        kept: None when it is to be quantized, else the reason.
        layer: how it is quantized when it is.
    """

    name: str
    module: nn.Module
    kept: str | None
    layer: LayerConfig


def is_linear(module: nn.Module) -> bool:
    """A module that maps its last dimension by a matrix and that we could replace."""
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, TrainedLayer | PackedBitLinear)


def is_table(module: nn.Module) -> bool:
    """A table of embeddings that is not quantized."""
    return isinstance(module, nn.Embedding) and not isinstance(module, QuantizedEmbedding)


def choose(model: nn.Module, config: BitNetQuantizationConfig) -> list[Choice]:
    """Every linear map of the model with its fate, in the order of `named_modules`."""
    why, heads = _Reasons(model), head_layers(model, config)
    return [
        Choice(
            name, module, _decide(name, module, config, why, id(module) in heads), heads.get(id(module)) or config.layer(name)
        )
        for name, module in model.named_modules()
        if is_linear(module)
    ]


def idle_patterns(config: BitNetQuantizationConfig, names: Iterable[str]) -> list[str]:
    """The patterns of `keep`, `overrides` and `sub_norm` that none of the names match."""
    names = list(names)
    patterns = [*config.keep, *config.overrides, *config.sub_norm]
    return [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]


def choose_tables(model: nn.Module, config: BitNetQuantizationConfig) -> list[Choice]:
    """The tables of token embeddings that the config quantizes."""
    layer = config.vocabulary_layer("embeddings")
    if layer is None:
        return []
    return [Choice(name, table, None, layer) for name, table in token_tables(model) if is_table(table)]


def check_tables(model: nn.Module, config: BitNetQuantizationConfig) -> None:
    """Raises ValueError as `check_vocabulary` does, and when the raw weight of a chosen table or head is read."""
    check_vocabulary(model, config)
    raw = set(_raw_readers(model, is_table))
    for choice in choose_tables(model, config):
        if id(choice.module) in raw:
            raise ValueError(
                f"embeddings={config.embeddings!r}: the parent of {choice.name} reads its raw weight, which would be bytes; "
                "leave embeddings out"
            )
    heads = head_layers(model, config)
    raw = set(_raw_readers(model, is_linear)) if heads else set()
    for name, head in model.named_modules():
        if id(head) in heads and id(head) in raw:
            raise ValueError(
                f"embeddings={config.embeddings!r}, output_head={config.output_head!r}: the parent of the output head {name} "
                "reads its raw weight, which would be bytes; leave that field out (both, where the head is tied)"
            )


def _decide(name: str, module: nn.Module, config: BitNetQuantizationConfig, why: _Reasons, is_head: bool) -> str | None:
    if config.is_kept(name):
        return "kept by the config"
    if type(module) not in (nn.Linear, Conv1D):
        return f"{type(module).__name__} has a forward of its own"
    if is_head or config.is_forced(name):
        return None
    return why.of(name, module)


class _Reasons:
    """What the model says about its own layers; gathered once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        uses = Counter(
            id(parameter) for module in model.modules() for parameter in module._parameters.values() if parameter is not None
        )
        self.tied = {key for key, count in uses.items() if count > 1}
        # on the meta device nothing is tied yet, but the model lists what will be
        self.tied_names = {key for m in model.modules() for key in _tied_keys(m)}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        self.output = None if output is None else id(output)
        self.float32 = [
            pattern
            for module in model.modules()
            for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
            for pattern in (getattr(module, attribute, None) or ())
        ]
        self.raw = set(_raw_readers(model, is_linear))

    def of(self, name: str, module: nn.Module) -> str | None:
        if id(module) == self.output:
            return "output embeddings"
        if id(module._parameters["weight"]) in self.tied or f"{name}.weight" in self.tied_names:
            return "weight tied to another module"
        if _HEADS.search(name):
            return "task head"
        if _ROUTERS.search(name):
            return "router"
        if any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in self.float32 if isinstance(pattern, str)):
            return "the model keeps it in float32"
        if id(module) in self.raw:
            return "its parent reads the raw weight"
        return None


def _tied_keys(module: nn.Module) -> list[str]:
    config = getattr(module, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return []
    keys = getattr(module, "_tied_weights_keys", None) or ()
    return list(keys)


def _raw_readers(model: nn.Module, of: Callable[[nn.Module], bool]) -> Iterator[int]:
    """ids of the modules of a kind whose parent's code reads `self.<name>.weight`."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and of(child) and any(name in _weights_read(kind) for kind in type(parent).__mro__):
                yield id(child)


@functools.cache
def _weights_read(kind: type) -> frozenset[str]:
    """Every x for which a method defined in this very class says `something.x.weight`."""
    if kind in (nn.Module, object):
        return frozenset()
    members = (member for name, member in vars(kind).items() if name not in _SETTING_UP)
    return frozenset(name for member in members for name in _weights_read_by(member))


def _weights_read_by(member: Any) -> Iterator[str]:
    function = inspect.unwrap(getattr(member, "__func__", None) or getattr(member, "fget", None) or member)
    waiting = [getattr(function, "__code__", None)]
    while waiting:
        code = waiting.pop()
        if not isinstance(code, CodeType):
            continue
        waiting += code.co_consts  # functions and comprehensions inside
        if "weight" in code.co_names:  # the byte code, because reading sources takes a tenth of a second a class
            for outer, inner in pairwise(dis.get_instructions(code)):
                if inner.argval == "weight" and outer.opname == inner.opname == "LOAD_ATTR":
                    yield outer.argval
