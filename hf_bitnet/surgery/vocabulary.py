"""The parts of a model that are as large as its vocabulary: tables of token embeddings, and output heads. Own.

Both are asked of the model (`get_input_embeddings`, `get_output_embeddings`), never guessed from names. Which are tied is seen
from shared parameters; on the meta device, where nothing is tied yet, from what the model says will be.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import BitNetQuantizationConfig, LayerConfig
from ..modules import EmbeddingSpec, PackedBitLinear, PackedEmbedding, QuantizedEmbedding, QuantizedLayer
from ..quantizers import WeightQuantizer
from ..relaxations import RELAXATIONS
from ..ste import ESTIMATORS
from .adapters import without_adapter


def token_tables(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    """(dotted name, module) of every table of token embeddings that the model or a part of it names, each once."""
    found = {id(table) for part in model.modules() if isinstance(table := _asked(part, "get_input_embeddings"), nn.Embedding)}
    return [
        (name, module) for name, module in model.named_modules() if id(module) in found and isinstance(module, nn.Embedding)
    ]


def output_heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of every linear map to logits over a vocabulary that the model or a part of it names."""
    found = {id(_asked(part, "get_output_embeddings")) for part in model.modules()} - {id(None)}
    return [(name, module) for name, module in model.named_modules() if id(module) in found]


def _asked(part: nn.Module, method: str) -> Any:
    try:
        found = getattr(part, method, lambda: None)()
        return without_adapter(found) if isinstance(found, nn.Module) else found
    except (RuntimeError, AttributeError):  # what transformers' own methods raise where there is none
        return None


def head_layers(model: nn.Module, config: BitNetQuantizationConfig) -> dict[int, LayerConfig]:
    """id of each output head that `embeddings` or `output_head` quantizes -> how.

    Raises ValueError when the two ask for different codes for one weight.
    """
    if config.embeddings is None and config.output_head is None:
        return {}
    layers = {}
    for name, head in output_heads(model):
        layer = config.tied_head_layer() if is_tied(model, name, head) else config.vocabulary_layer("output_head")
        if layer is not None:
            layers[id(head)] = layer
    return layers


def is_tied(model: nn.Module, name: str, head: nn.Module) -> bool:
    """Whether the head shares its weight with a table of token embeddings, or will when a checkpoint is loaded."""
    weight = head._parameters.get("weight")
    if weight is None or not weight.is_meta:
        return any(table.weight is weight for _, table in token_tables(model))
    return any(_says_tied(part, name.removeprefix(f"{prefix}.")) for prefix, part in model.named_modules())


def _says_tied(part: nn.Module, name: str) -> bool:
    if not getattr(getattr(part, "config", None), "tie_word_embeddings", False):
        return False
    return any(re.fullmatch(key, f"{name}.weight") for key in getattr(part, "_tied_weights_keys", None) or ())


def check_vocabulary(model: nn.Module, config: BitNetQuantizationConfig) -> None:
    """Raises ValueError when the model lacks what `embeddings` or `output_head` names, or `keep` or `overrides` name it."""
    tables, heads = token_tables(model), output_heads(model)
    kind = type(model).__name__
    if config.embeddings is not None and not tables:
        raise ValueError(f"embeddings={config.embeddings!r}: {kind} names no table of token embeddings; leave embeddings out")
    if config.output_head is not None and not heads:
        raise ValueError(
            f"output_head={config.output_head!r}: {kind} names no output head over a vocabulary; leave output_head out. Other "
            "heads are named in overrides, for example overrides={r'classifier': {'weight': 'int8'}}"
        )
    chosen = head_layers(model, config)
    named = tables if config.embeddings is not None else []
    for name, _ in [*named, *((name, head) for name, head in heads if id(head) in chosen)]:
        if config.is_kept(name) or config.is_forced(name):
            raise ValueError(
                f"{name} is asked for by embeddings={config.embeddings!r}, output_head={config.output_head!r}, and matches a "
                "pattern in keep or overrides too; say it once: take it out of those patterns, or leave that field out"
            )
    for name, table in named:
        problem = _problem(table)
        if problem is not None:
            raise ValueError(f"embeddings={config.embeddings!r}: {name} {problem}; leave embeddings out")


def _problem(table: nn.Embedding) -> str | None:
    if table.max_norm is not None:
        return f"has max_norm={table.max_norm}, which changes its rows when they are read"
    if table.sparse:
        return "has sparse gradients"
    if type(table) is not nn.Embedding and _rounds_factor(type(table)) is None:
        return f"is a {type(table).__name__} with a forward of its own"
    return None


def table_spec(table: nn.Embedding, layer: LayerConfig, config: BitNetQuantizationConfig) -> EmbeddingSpec:
    """Turns plain data into the objects a table works with."""
    plain = type(table) is nn.Embedding
    return EmbeddingSpec(
        weight=layer.quantizer(),
        ste=ESTIMATORS.get(layer.ste),
        relaxation=RELAXATIONS.get(config.relaxation),
        kind=type(table),
        factor=None if plain else float(getattr(table, "scalar_embed_scale", None) or table.embed_scale),  # type: ignore[arg-type]
        rounds_factor=not plain and bool(_rounds_factor(type(table))),
    )


@functools.cache
def _rounds_factor(kind: type[nn.Embedding]) -> bool | None:
    """Whether scaled tables of this class round their `embed_scale` to the weight's dtype before they multiply rows with it.

    None where they compute anything else. Proven on random numbers: many models of transformers have such a class of their own.
    """
    agreeing = {True, False}
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            table = kind(5, 7, None, embed_scale=1.7071)  # type: ignore[call-arg]
            ids = torch.arange(5)
            for dtype in (torch.float32, torch.bfloat16):
                weight = torch.randn(5, 7).to(dtype)
                table.weight = nn.Parameter(weight)
                for rounds in (True, False):
                    spec = EmbeddingSpec(*_ANY, factor=1.7071, rounds_factor=rounds)
                    if not torch.equal(table(ids), spec.scaled(weight)):
                        agreeing.discard(rounds)
    except Exception:  # called otherwise than we think
        return None
    return min(agreeing, default=None)


# of no matter for what a table makes of its rows
_ANY: tuple[Any, Any] = (None, None)


# ---- ties ----

_WEIGHT, _SCALE, _LIKE = ".weight", ".weight_scale", ".like"


@contextmanager
def ties_kept(model: nn.Module) -> Iterator[None]:
    """Inside, modules may be replaced; afterwards those that shared one weight and were quantized alike share one again.

    Modules of which only one is quantized go separate ways: their numbers differ.
    """
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            groups.setdefault(id(weight), []).append(name)
    alike = [names for names in groups.values() if len(names) > 1 and _are_alike([model.get_submodule(n) for n in names])]
    yield
    for first, *others in alike:
        source = model.get_submodule(first)
        for other in map(model.get_submodule, others):
            if _are_alike([source, other]):
                _share(source, other)


def _are_alike(modules: list[nn.Module]) -> bool:
    weights = [module._parameters.get("weight") for module in modules]
    if any(weight is None for weight in weights):  # it stands inside an nn.Sequential now
        return False
    quantizers = [_quantizer(module) for module in modules]
    same = (
        all(each == quantizers[0] for each in quantizers)
        and len({weight.shape for weight in weights if weight is not None}) == 1
    )
    # learned scales are parameters of each layer by itself
    return same and not (quantizers[0] is not None and quantizers[0].learned)


def _quantizer(module: nn.Module) -> WeightQuantizer | None:
    return module.quantizer if isinstance(module, QuantizedLayer | QuantizedEmbedding) else None


def _share(source: nn.Module, other: nn.Module) -> None:
    for key in ("weight", "weight_scale"):
        if other._parameters.get(key) is not None:
            other._parameters[key] = source._parameters[key]


def declare_ties(model: nn.Module) -> None:
    """Tells transformers what is tied beside packed weights, so that it neither misses nor stores it twice."""
    declared = getattr(model, "all_tied_weights_keys", None)
    if declared is None:
        return
    for key in [key for key in declared if key.endswith((_SCALE, _LIKE))]:
        del declared[key]
    for target, source in list(declared.items()):
        owners = _owner(model, target), _owner(model, source)
        beside = [_SCALE] if all(isinstance(each, PackedBitLinear | PackedEmbedding) for each in owners) else []
        beside += [_LIKE] if all(isinstance(each, PackedEmbedding) for each in owners) else []
        if target.endswith(_WEIGHT):
            declared |= {target.removesuffix(_WEIGHT) + each: source.removesuffix(_WEIGHT) + each for each in beside}


def _owner(model: nn.Module, key: str) -> nn.Module | None:
    try:
        return model.get_submodule(key.rpartition(".")[0])
    except AttributeError:
        return None
