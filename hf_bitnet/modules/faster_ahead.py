"""Decoder layers that are computed ahead: the first of a row computes the token for those behind it too. Own.

Calling sixteen layers from Python for each token costs more than a tenth of the token, more so since the weights that stream
by leave nothing of Python in the caches of the processor. So the first layer makes one kernel call for all, and each layer
behind it, when it is called, hands out what is there, if it is called with the very tensor that the layer before it handed
out, unchanged, the same cache and the same angles; otherwise it computes for itself. Its part of the cache grows only then.

Which layer follows which is learned from the calls. A row in which a layer once did not take what was computed for it ends
before that layer from then on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import kernels
from .faster_cache import Held, held_by, past_of, show, with_room

# the layer that follows; None where that was wrong once
_NEXT: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module] | None] = weakref.WeakKeyDictionary()


class Step(NamedTuple):
    """One layer's part: its cache holds `length` past tokens of the buffers `place`."""

    module: nn.Module
    described: kernels.DescribedLayer
    past: DynamicLayer
    place: kernels.CachePlace
    length: int


class _Waiting:
    """What one call has computed for several layers.

    Attributes:
        results: of the layers, (B, 1, hidden) each. taken: how many of them have handed theirs out.
        expected, version: what the last of these handed out, and which version of it.
        modules, keys, lengths: of the layers; the buffers of keys that the token is in behind `length` others.
    """

    def __init__(
        self, steps: Sequence[Step], results: Sequence[Tensor], cache: DynamicCache, angles: tuple[Tensor, Tensor]
    ) -> None:
        self.results, self.angles, self.taken, self.version = results, angles, 0, 0
        # what waits for a call that may never come keeps no model and no cache alive
        self.cache = weakref.ref(cache)
        self.modules = [weakref.ref(step.module) for step in steps]
        self.keys = [weakref.ref(step.place.keys) for step in steps]
        self.lengths = [step.length for step in steps]
        self.expected: weakref.ref[Tensor] | None = None

    def is_for(self, module: nn.Module, x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> bool:
        """Whether the next layer is called, with what it was computed for."""
        return (
            self.expected is not None
            and self.expected() is x
            and self.modules[self.taken]() is module
            and self.cache() is cache
            and x._version == self.version
            and all(map(is_, angles, self.angles))
        )

    def take(self, past: DynamicLayer, held: Held) -> Tensor:
        """The next layer's result; its cache grows by the token."""
        index, self.taken = self.taken, self.taken + 1
        show(past, held.place, self.lengths[index] + 1)
        y = self.results[index]
        self.expected, self.version = weakref.ref(y), y._version
        return y


class _Local(threading.local):
    """Of one thread: what waits, and the last result of a layer that nothing was waiting behind."""

    waiting: _Waiting | None = None
    last: tuple[weakref.ref[nn.Module], weakref.ref[Tensor], int] | None = None


_LOCAL = _Local()


def forget(module: nn.Module) -> None:
    """Drops what is known of the layer that follows."""
    _NEXT.pop(module, None)


def row_from(module: nn.Module) -> Iterator[nn.Module]:
    """The layer and those known to follow it, one after the other; in inference mode only the layer."""
    if torch.is_inference_mode_enabled():
        yield module
        return
    seen: set[int] = set()
    following: nn.Module | None = module
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        found = _NEXT.get(following)
        following = None if found is None else found()


def step_of(
    module: Any,
    described: kernels.DescribedLayer,
    x: Tensor,
    cache: DynamicCache,
    angles: tuple[Tensor, Tensor],
    before: Sequence[Step],
) -> Step | None:
    """The layer's part in decoding a token, after others; None where the call or the cache is of another kind."""
    size, dtype, batch = described.layer.head_dim, described.dtype, x.shape[0]
    if any(angle.dim() != 3 or angle.shape[0] not in (1, batch) or angle.shape[-1] != size for angle in angles):
        return None
    past = past_of(cache, module.self_attn.layer_idx)
    if past is None or not x.dtype == angles[0].dtype == angles[1].dtype == past.dtype == dtype:
        return None
    if any(past is step.past for step in before):  # layers that share a cache see each other's token
        return None
    assert past.keys is not None
    if past.keys.shape[0] != batch or x.shape[-1] != described.hidden:
        return None
    return Step(module, described, past, with_room(past), past.keys.shape[2])


def compute(steps: Sequence[Step], x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> Tensor:
    """The first layer's result (B, 1, hidden); those of the others wait for their calls."""
    results = kernels.decode_layers([(step.described, step.place, step.length) for step in steps], x, *angles)
    past, held = steps[0].past, held_by(steps[0].past)
    assert held is not None
    if results[0].is_inference():  # such tensors have no versions, so that a change would not be seen
        show(past, held.place, steps[0].length + 1)
        return results[0]
    _LOCAL.waiting = _Waiting(steps, results, cache, angles)
    return _handed_out(_LOCAL.waiting, past, held)


def taken(module: Any, x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> Tensor | None:
    """The layer's result, if it has been computed ahead for this very call."""
    waiting = _LOCAL.waiting
    if waiting is None:
        _learn(module, x)
        return None
    if waiting.is_for(module, x, cache, angles):
        past, index = past_of(cache, module.self_attn.layer_idx), waiting.taken
        held = None if past is None else held_by(past)
        there = held is not None and held.place.keys is waiting.keys[index]()
        if past is not None and held is not None and there and held.present[0].shape[2] == waiting.lengths[index]:
            return _handed_out(waiting, past, held)
    _end_row(waiting)
    return None


def _handed_out(waiting: _Waiting, past: DynamicLayer, held: Held) -> Tensor:
    y = waiting.take(past, held)
    if waiting.taken == len(waiting.modules):
        _LOCAL.waiting = None
        _LOCAL.last = waiting.modules[-1], weakref.ref(y), waiting.version
    return y


def _end_row(waiting: _Waiting) -> None:
    """From now on the row ends with the last layer that was called."""
    _LOCAL.waiting = None
    last = waiting.modules[waiting.taken - 1]()
    if last is not None:
        _NEXT[last] = None


def _learn(module: nn.Module, x: Tensor) -> None:
    """This layer follows the one whose result it is called with."""
    last, _LOCAL.last = _LOCAL.last, None
    if last is None or last[1]() is not x or x.is_inference() or x._version != last[2]:
        return
    before = last[0]()
    if before is not None and before is not module and before not in _NEXT:
        _NEXT[before] = weakref.ref(module)
