"""Decoder layers that are computed ahead: the first of a row computes the token for those behind it too. Own.

Calling sixteen layers from Python for each token costs more than a tenth of the token, more so since the weights that stream
by leave nothing of Python in the caches of the processor. So the first layer makes one kernel call for all, and each layer
behind it, when it is called, hands out what is there, if nothing has changed: what it is called with, the cache, the angles,
its own parts. Otherwise it computes for itself. Its part of the cache grows only then.

Which layer follows which is learned from the calls. A layer with hooks of its own is computed alone, because they may change
anything; a layer that has often not taken what was computed for it begins a row. In inference mode, where tensors do not tell
that they were changed, every layer is computed alone. Weights, keys or angles that are changed through `.data` between two
layers of one token are not seen; what a layer returns may be changed in any way.
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

# the layer that follows, and how often it did not take what was computed for it
_NEXT: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_MISSES: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_MOST_MISSES = 8


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
        expected, copy: what the last of these handed out, and its numbers.
        modules, keys, lengths: of the layers; the buffers of keys that the token is in behind `length` others.
        versions: of everything that went into a layer's result.
    """

    def __init__(
        self, steps: Sequence[Step], results: Sequence[Tensor], cache: DynamicCache, angles: tuple[Tensor, Tensor]
    ) -> None:
        self.results, self.angles, self.taken = results, angles, 0
        # what waits for a call that may never come keeps no model and no cache alive
        self.cache = weakref.ref(cache)
        self.modules = [weakref.ref(step.module) for step in steps]
        self.keys = [weakref.ref(step.place.keys) for step in steps]
        self.lengths = [step.length for step in steps]
        self.versions = [_versions(step.described, step.place, angles) for step in steps]
        self.expected: weakref.ref[Tensor] | None = None
        self.copy = results[0]

    def is_for(self, module: nn.Module, x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> bool:
        """Whether the next layer is called, with what it was computed for."""
        return (
            self.expected is not None
            and self.expected() is x
            and self.modules[self.taken]() is module
            and self.cache() is cache
            and all(map(is_, angles, self.angles))
            and torch.equal(x, self.copy)
        )

    def take(self, past: DynamicLayer, held: Held) -> Tensor:
        """The next layer's result; its cache grows by the token."""
        index, self.taken = self.taken, self.taken + 1
        show(past, held.place, self.lengths[index] + 1)
        y = self.results[index]
        if self.taken < len(self.results):
            self.expected, self.copy = weakref.ref(y), y.clone()
        return y


def _versions(described: kernels.DescribedLayer, place: kernels.CachePlace, angles: tuple[Tensor, Tensor]) -> list[int]:
    return [*described.versions(), *(tensor._version for tensor in (place.keys, place.values, *angles))]


class _Local(threading.local):
    """Of one thread: what waits, and the last result of a layer that nothing was waiting behind."""

    waiting: _Waiting | None = None
    last: tuple[weakref.ref[nn.Module], weakref.ref[Tensor]] | None = None


_LOCAL = _Local()


def forget(module: nn.Module) -> None:
    """Drops what is known of the layer that follows."""
    _NEXT.pop(module, None)
    _MISSES.pop(module, None)


def row_from(module: nn.Module) -> Iterator[nn.Module]:
    """The layer and those known to follow it, one after the other, or the layer alone."""
    if torch.is_inference_mode_enabled() or _is_hooked(module):
        yield module
        return
    seen: set[int] = set()
    following: nn.Module | None = module
    while following is not None and id(following) not in seen and not _is_hooked(following):
        yield following
        seen.add(id(following))
        found = _NEXT.get(following)
        following = None if found is None else found()


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
    if any(
        not angle.is_cpu or angle.dim() != 3 or angle.shape[0] not in (1, batch) or angle.shape[-1] != size for angle in angles
    ):
        return None
    past = past_of(cache, module.self_attn.layer_idx)
    if past is None or not x.dtype == angles[0].dtype == angles[1].dtype == past.dtype == dtype:
        return None
    if any(past is step.past for step in before):  # layers that share a cache see each other's token
        return None
    assert past.keys is not None
    if (past.keys.shape[0], past.keys.shape[1]) != (batch, described.layer.kv_heads) or x.shape[-1] != described.hidden:
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


def taken(
    module: Any, described: kernels.DescribedLayer | None, x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]
) -> Tensor | None:
    """The layer's result, if it has been computed ahead for this very call; `described` as it is now."""
    waiting = _LOCAL.waiting
    if waiting is None:
        _learn(module, x)
        return None
    if described is not None and waiting.is_for(module, x, cache, angles):
        past, index = past_of(cache, module.self_attn.layer_idx), waiting.taken
        held = None if past is None else held_by(past)
        if past is not None and held is not None and held.place.keys is waiting.keys[index]():
            same = waiting.versions[index] == _versions(described, held.place, angles)
            if same and held.present[0].shape[2] == waiting.lengths[index]:
                return _handed_out(waiting, past, held)
    _end_row(waiting)
    return None


def _handed_out(waiting: _Waiting, past: DynamicLayer, held: Held) -> Tensor:
    y = waiting.take(past, held)
    if waiting.taken == len(waiting.modules):
        _LOCAL.waiting = None
        _LOCAL.last = waiting.modules[-1], weakref.ref(y)
    return y


def _end_row(waiting: _Waiting) -> None:
    """The row ends with the last layer that was called, until calls show that it goes on."""
    _LOCAL.waiting = None
    last = waiting.modules[waiting.taken - 1]()
    if last is not None:
        _MISSES[last] = _MISSES.get(last, 0) + 1
        _NEXT.pop(last, None)


def _learn(module: nn.Module, x: Tensor) -> None:
    """This layer follows the one whose result it is called with."""
    last, _LOCAL.last = _LOCAL.last, None
    if last is None or last[1]() is not x:
        return
    before = last[0]()
    if before is not None and before is not module and _MISSES.get(before, 0) < _MOST_MISSES:
        _NEXT[before] = weakref.ref(module)
