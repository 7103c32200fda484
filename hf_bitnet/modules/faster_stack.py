"""A model of transformers that computes one new token without its forward: embedding, all layers in one kernel call, norm. Own.

Between these, the forward makes masks and positions, looks for outputs to collect and calls layer by layer, which for one token
takes as long as some of the layers. It may be left out where none of that changes anything: one new token a sequence, no
padding, no window that the past has outgrown, nobody who listens to the parts. That a model does nothing else is not read off
its code: the first time, both are run on a short text, and where a bit differs the model keeps its forward.

Leaves out: layers one by one, for what is computed otherwise (`faster_ahead.py`, `faster_layer.py`).
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .. import kernels
from . import faster_ahead, faster_layer
from .faster import Faster
from .faster_cache import show
from .faster_layer import described_of
from .patience import Patience

# arguments of a forward that are looked at; any other has to be None
_ARGUMENTS = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"})
# of a config: lengths beyond which layers do not look at the whole past
_WINDOWS = ("sliding_window", "attention_chunk_size")
_COLLECTING = ("output_attentions", "output_hidden_states")
_Described = tuple[nn.Module, kernels.DescribedLayer]


class _Stack(NamedTuple):
    """A model's parts, in the order of their calls."""

    embedding: nn.Module
    rotary: nn.Module
    layers: tuple[nn.Module, ...]
    norm: nn.Module

    def is_hooked(self) -> bool:
        return any(map(faster_ahead.is_hooked, (self.embedding, self.rotary, *self.layers, self.norm)))


class _Proven(NamedTuple):
    """What was found for a model with these parts and settings.

    Attributes:
        kind: the class of its outputs, None where its forward does more.
        patience: with a model whose settings change at every token.
    """

    stack: _Stack
    settings: dict[str, Any]
    kind: type | None
    patience: Patience


_PROVEN: weakref.WeakKeyDictionary[nn.Module, _Proven | Patience] = weakref.WeakKeyDictionary()
# tokens; a proof costs some
_WORTH = 3


class FasterStack(Faster):
    """A model whose decoder layers may be computed ahead while its forward runs, or without it."""

    @staticmethod
    def made_for(original: type[nn.Module]) -> dict[str, Any]:
        forward = original.forward

        @functools.wraps(forward)
        def faster(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if kernels.is_recording() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return forward(self, *args, **kwargs)
            plainly = functools.partial(faster_ahead.with_rows, self, functools.partial(forward, self))
            y = None if args else _token(self, plainly, kwargs)
            return plainly(*args, **kwargs) if y is None else y

        return {"forward": faster}


def forget(module: nn.Module) -> None:
    """Drops what is known of a model."""
    _PROVEN.pop(module, None)
    faster_layer.forget(module)


def _token(model: Any, plainly: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """The model's output for one new token; None where its own forward has to run."""
    ids, cache, mask = given.get("input_ids"), given.get("past_key_values"), given.get("attention_mask")
    if type(cache) is not DynamicCache or type(ids) is not Tensor or ids.dim() != 2 or ids.shape[1] != 1 or not ids.is_cpu:
        return None
    stack, config = _stack_of(model), getattr(model, "config", None)
    if stack is None or config is None or model.training or torch.is_autocast_enabled("cpu"):
        return None
    if any(given[name] for name in _COLLECTING if name in given) or any(getattr(config, name, None) for name in _COLLECTING):
        return None
    if any(given[name] is not None for name in given.keys() - _ARGUMENTS - {*_COLLECTING}):
        return None
    asked = given.get("use_cache")
    if not (getattr(config, "use_cache", None) if asked is None else asked):
        return None
    length = cache.get_seq_length()
    if not length or any((window := getattr(config, name, None)) is not None and window <= length for name in _WINDOWS):
        return None
    if mask is not None and (type(mask) is not Tensor or mask.shape != (ids.shape[0], length + 1) or not mask.all()):
        return None
    if stack.is_hooked() or getattr(config, "num_hidden_layers", None) != len(stack.layers):
        return None
    layers = list(described_of(stack.layers))
    if len(layers) < len(stack.layers):
        return None
    proven = _known(model, stack, _settings(model), lambda: _prove(stack, layers, plainly))
    if proven is None or proven.kind is None:
        return None
    y = _compute(stack, layers, ids, cache, given.get("position_ids"), length)
    return None if y is None else proven.kind(last_hidden_state=y, past_key_values=cache)


def _known(model: nn.Module, stack: _Stack, settings: dict[str, Any], prove: Callable[[], type | None]) -> _Proven | None:
    """What is proven for a model with these parts and settings; None where it is not the time to prove it."""
    known = _PROVEN.get(model)
    if isinstance(known, _Proven):
        if known.stack == stack and known.settings == settings:
            known.patience.served()
            return known
        known = _PROVEN[model] = known.patience  # parts that are gone from the model must not stay
    patience = Patience(_WORTH) if known is None else known
    if not patience.begins_look():
        return None
    proven = _PROVEN[model] = _Proven(stack, settings, prove(), patience)
    return proven


def _settings(model: nn.Module) -> dict[str, Any]:
    """The numbers and names that a model keeps, by which its forward may go."""
    return {name: value for name, value in model.__dict__.items() if value is None or isinstance(value, int | float | str)}


def _stack_of(model: Any) -> _Stack | None:
    parts = model._modules
    layers, embedding = faster_ahead.layers_of(model), parts.get("embed_tokens")
    rotary, norm = parts.get("rotary_emb"), parts.get("norm")
    if embedding is None or rotary is None or norm is None or not layers:
        return None
    return _Stack(embedding, rotary, tuple(layers), norm)


def _compute(
    stack: _Stack,
    layers: list[_Described],
    ids: Tensor,
    cache: DynamicCache,
    positions: Tensor | None,
    length: int,
) -> Tensor | None:
    """int64 (B, 1) -> (B, 1, hidden); the cache grows by the token. None, and nothing has changed, where a layer cannot."""
    x = stack.embedding(ids)
    angles = stack.rotary(x, position_ids=torch.full((1, 1), length, device=ids.device) if positions is None else positions)
    steps = faster_ahead.steps_of(layers, x, cache, angles)
    if len(steps) < len(layers):
        return None
    *_, y = faster_ahead.results_of(steps, x, angles)
    for step in steps:
        show(step.past, step.place, step.length + 1)
    return stack.norm(y)


@torch.no_grad()
def _prove(stack: _Stack, layers: list[_Described], plainly: Callable[..., Any]) -> type | None:
    """The class of the model's outputs, if its forward computes what `_compute` does."""
    ids, past = torch.tensor([[3, 1, 2, 1]], device="cpu"), DynamicCache()
    try:
        plainly(input_ids=ids[:, :3], past_key_values=past, use_cache=True)
        twin = copy.deepcopy(past)
        expected = plainly(input_ids=ids[:, 3:], past_key_values=past, use_cache=True)
        found = _compute(stack, layers, ids[:, 3:], twin, None, 3)
        same = (
            found is not None
            and set(expected.keys()) == {"last_hidden_state", "past_key_values"}
            and torch.equal(found, expected.last_hidden_state)
            and all(map(_holds_the_same, past.layers, twin.layers))
        )
    except Exception:  # called otherwise than we think
        return None
    return type(expected) if same else None


def _holds_the_same(one: Any, other: Any) -> bool:
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
