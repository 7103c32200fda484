"""Decoder layers that are computed ahead: the first of a row computes the token for those behind it too. Own.

Calling sixteen layers from Python for each token costs more than a tenth of the token, more so since the weights that stream
by leave nothing of Python in the caches of the processor. So, while the model that holds the layers runs its own forward, the
first of them makes one kernel call for all, and each layer behind it, when it is called with what the one before it returned,
hands out what is there. Its part of the cache grows only then.

Nobody else's code runs between these calls: a layer with hooks or a forward of its own is computed alone, and so is every layer
that is called from elsewhere, and all of them in inference mode, where tensors do not tell that they were changed. A model that
often leaves out layers, or calls them with something else, gets no rows any more.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import kernels
from .faster_cache import held_by, past_of, show, with_room

# how often a model did not take what was computed for it
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
        steps: of the layers. results: of the layers, (B, 1, hidden) each. taken: how many of them have handed theirs out.
        given: the cache and the angles.
    """

    def __init__(self, steps: Sequence[Step], results: Sequence[Tensor], given: tuple[Any, ...]) -> None:
        self.steps, self.results, self.given, self.taken = steps, results, given, 0

    def is_for(self, module: nn.Module, x: Tensor, given: tuple[Any, ...]) -> bool:
        """Whether the next layer is called, with what it was computed for."""
        step, before = self.steps[self.taken], self.results[self.taken - 1]
        # a result that nobody has changed is of version 0
        same = step.module is module and before is x and x._version == 0 and all(map(is_, given, self.given))
        held = held_by(step.past) if same else None
        return held is not None and held.place is step.place and held.present[0].shape[2] == step.length

    def take(self) -> Tensor:
        """The next layer's result; its cache grows by the token."""
        step, y = self.steps[self.taken], self.results[self.taken]
        self.taken += 1
        show(step.past, step.place, step.length + 1)
        return y


class _Local(threading.local):
    """Of one thread: the layers of the model whose forward runs, what waits for them, and whether one did not take it."""

    layers: Sequence[nn.Module] = ()
    waiting: _Waiting | None = None
    missed: bool = False


_LOCAL = _Local()


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The modules of the lists that a module holds."""
    return [layer for each in module._modules.values() if isinstance(each, nn.ModuleList) for layer in each._modules.values()]  # type: ignore[misc]


def with_rows(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of the model's forward, in which layers may be computed ahead."""
    outer = _LOCAL.layers, _LOCAL.waiting, _LOCAL.missed
    _LOCAL.layers = layers_of(module) if _MISSES.get(module, 0) < _MOST_MISSES else ()
    _LOCAL.waiting, _LOCAL.missed = None, False
    try:
        result = forward(*args, **kwargs)
        if _LOCAL.missed or _LOCAL.waiting is not None:
            _MISSES[module] = _MISSES.get(module, 0) + 1
        return result
    finally:
        _LOCAL.layers, _LOCAL.waiting, _LOCAL.missed = outer


def forget(module: nn.Module) -> None:
    """Drops what is known of a model."""
    _MISSES.pop(module, None)


def row_from(module: nn.Module) -> Iterator[nn.Module]:
    """The layer and those that follow it, or the layer alone."""
    yield module
    layers = _LOCAL.layers
    if module in layers and not is_hooked(module):
        for following in layers[layers.index(module) + 1 :]:
            if is_hooked(following):
                return
            yield following


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of a module, or has given it a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def steps_of(
    layers: Iterable[tuple[nn.Module, kernels.DescribedLayer]], x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]
) -> list[Step]:
    """The parts of layers in decoding a token, up to the first for which the call or the cache is of another kind."""
    steps: list[Step] = []
    for module, described in layers:
        step = _step_of(module, described, x, cache, angles, steps)
        if step is None:
            break
        steps.append(step)
    return steps


def _step_of(
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


def results_of(steps: Sequence[Step], x: Tensor, angles: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Every layer's result (B, 1, hidden), of one kernel call. The cache does not show the token yet."""
    return kernels.decode_layers([(step.described, step.place, step.length) for step in steps], x, *angles)


def compute(steps: Sequence[Step], x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> Tensor:
    """The first layer's result (B, 1, hidden); those of the others wait for their calls."""
    waiting = _Waiting(steps, results_of(steps, x, angles), (cache, *angles))
    y = waiting.take()
    _LOCAL.waiting = waiting if len(steps) > 1 else None
    return y


def taken(module: nn.Module, x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> Tensor | None:
    """The layer's result, if it has been computed ahead for this very call."""
    waiting = _LOCAL.waiting
    if waiting is None:
        return None
    if not waiting.is_for(module, x, (cache, *angles)):
        _LOCAL.waiting, _LOCAL.missed = None, True
        return None
    y = waiting.take()
    if waiting.taken == len(waiting.steps):
        _LOCAL.waiting = None
    return y
