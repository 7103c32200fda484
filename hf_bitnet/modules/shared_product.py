"""One product for the packed layers that read the same tensor (q/k/v, gate/up). Own.

Nothing is said about a model beforehand. A layer that is called with the very tensor another one was called with just before
is remembered as a reader of the same input; from the next call on, the first of them has the products of all computed at
once, with one quantization of the input and one fork of the threads, and the others take what waits for them. What waits is
given out only for the same tensor, unchanged, and for unchanged weights, so a wrong guess costs time and never a result; a
layer that does not come for what was computed is forgotten.

As `shared_activation.py`: a one-slot memory per thread, the input held weakly. Inference tensors (`torch.inference_mode`)
carry no version to check, and compiled code no weak references: there, each layer computes alone.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import kernels
from .functional import versions

Operands = tuple[Tensor, Tensor, Tensor | None]
# after so many wrong guesses a layer computes alone for good
_MOST_MISSES = 4


class Readers:
    """The layers that read what their owner reads, held weakly. A copy of it is empty: a copied layer learns anew."""

    __slots__ = ("layers", "misses")

    def __init__(self) -> None:
        self.layers: list[weakref.ref[Layer]] = []
        self.misses = 0

    def __reduce__(self) -> tuple[type[Readers], tuple[()]]:
        return Readers, ()


class Layer(Protocol):
    """What of a packed layer is known here."""

    in_features: int
    out_features: int
    activation: type
    layout: kernels.Layout
    readers: Readers

    def operands(self) -> Operands: ...


class _Run:
    """The calls with one input tensor: who came first, and the products that wait for the others."""

    __slots__ = ("leader", "source", "version", "waiting")

    def __init__(self) -> None:
        self.source: weakref.ref[Tensor] | None = None
        self.version = 0
        self.leader: weakref.ref[Layer] | None = None
        self.waiting: dict[int, tuple[Operands, tuple[int, ...], Tensor]] = {}

    def is_of(self, x: Tensor) -> bool:
        return self.source is not None and self.source() is x and self.version == x._version

    def start(self, x: Tensor, leader: Layer) -> None:
        self.close()
        self.source, self.version, self.leader = weakref.ref(x, self.close), x._version, weakref.ref(leader)

    def close(self, _: object = None) -> None:
        """Forgets the input; those that did not come for their product are no readers."""
        self.source = None  # first: the garbage collector may call this in the middle of anything
        waiting, self.waiting = self.waiting, {}
        leader = None if self.leader is None or not waiting else self.leader()
        if leader is not None:
            readers = leader.readers
            readers.layers = [each for each in readers.layers if id(each()) not in waiting]
            readers.misses += 1

    def take(self, layer: Layer, dtype: torch.dtype) -> Tensor | None:
        found = self.waiting.pop(id(layer), None)
        if found is None:
            return None
        (weight, scale, bias), version, y = found
        now = layer.operands()
        unchanged = now[0] is weight and now[1] is scale and now[2] is bias and versions(*now) == version
        return y if unchanged and y.dtype == dtype else None

    def learn(self, layer: Layer) -> None:
        leader = None if self.leader is None else self.leader()
        if leader is None or leader is layer or leader.readers.misses >= _MOST_MISSES or not _compatible(leader, layer):
            return
        readers = leader.readers
        if all(each() is not layer for each in readers.layers):
            readers.layers = [*(each for each in readers.layers if each() is not None), weakref.ref(layer)]


class _Slot(threading.local):
    def __init__(self) -> None:
        self.run = _Run()


_slot = _Slot()


def product(layer: Layer, x: Tensor, rows: kernels.RowQuantization, dtype: torch.dtype) -> Tensor:
    """`kernels.packed_linear` of one layer, together with those that will ask for the same input.

    Args:
        x: float (..., K), no inference tensor. dtype: of the result.

    Returns:
        (M, out_features), M the product of the leading sizes.
    """
    run = _slot.run
    flat = x.reshape(-1, layer.in_features)
    if run.is_of(x):
        y = run.take(layer, dtype)
        if y is None:
            y = kernels.packed_linear(flat, *layer.operands(), layer.layout, rows, dtype)
            run.learn(layer)
        return y
    run.start(x, layer)
    others = [other for each in layer.readers.layers if (other := each()) is not None and _ready(layer, other, x)]
    if not others:
        return kernels.packed_linear(flat, *layer.operands(), layer.layout, rows, dtype)
    operands = [other.operands() for other in others]
    y, *rest = kernels.packed_linears(flat, [layer.operands(), *operands], layer.layout, rows, dtype)
    run.waiting = {id(other): (of, versions(*of), z) for other, of, z in zip(others, operands, rest, strict=True)}
    return y


def _compatible(layer: Layer, other: Layer) -> bool:
    return other.layout == layer.layout and other.activation is layer.activation and other.in_features == layer.in_features


def _ready(layer: Layer, other: Layer, x: Tensor) -> bool:
    """Whether `other` could compute now: offloading and sharding leave a layer without its weight between its calls."""
    weight = other.operands()[0]
    here = type(weight) is nn.Parameter and weight.device == x.device and weight.shape[0] == other.out_features
    return here and other.activation is layer.activation and not weight.is_inference()
