"""Running a model block by block on recorded inputs, so that not the model before it is computed again and again. Own.

A chain is a list of modules (`model.layers`) of which each hands tensors to the next. While the model runs once, every block's
arguments are recorded: those that are outputs of the block before become slots, which a replay fills anew; all others (masks,
positions) are taken as they were. A model that does anything else between its blocks, calls them twice, or writes into their
inputs has no such chain, and is run as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Cache

from ..modules import TrainedLayer


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Slot(NamedTuple):
    """In recorded arguments: the n-th tensor that the block before returned."""

    number: int


@dataclass
class Chain:
    """Modules that are called one after the other, and what they were called with.

    Attributes:
        blocks: the modules. calls: for each batch, the arguments of each block.
        broken: whether they turned out to be no chain.
    """

    blocks: list[nn.Module]
    calls: list[list[Call]] = field(default_factory=list)
    broken: bool = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, each run of the model is recorded; every run begins with `new_batch`."""
        recorder = _Recorder(self)
        hooks = [block.register_forward_pre_hook(recorder.before(i), with_kwargs=True) for i, block in enumerate(self.blocks)]
        hooks += [block.register_forward_hook(recorder.after(i)) for i, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.broken |= any(len(calls) != len(self.blocks) for calls in self.calls)

    def new_batch(self) -> None:
        self.calls.append([])

    def first_calls(self) -> list[Call]:
        """The calls of the first block."""
        return [calls[0] for calls in self.calls]

    def next_call(self, batch: int, block: int, output: Any) -> Call:
        """The call of the block behind `block`, which is not the last, from what that returned."""
        made = tensors(output)
        args, kwargs = self.calls[batch][block + 1]
        return Call(*_mapped((args, kwargs), lambda value: made[value.number] if isinstance(value, _Slot) else value))


class _Recorder:
    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.handed: list[Tensor] = []  # what the block before returned
        self.inputs: list[tuple[Tensor, int]] = []

    def before(self, block: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls = self.chain.calls[-1]
            if len(calls) != block or self.chain.broken:
                self.chain.broken = True
                return
            self.inputs = [(tensor, tensor._version) for tensor in tensors((args, kwargs))]
            call = Call(*_mapped((args, kwargs), self._slotted))
            if block and not any(isinstance(value, _Slot) for value in _leaves(call)):
                self.chain.broken = True
            calls.append(call)

        return record

    def after(self, block: int) -> Callable[..., None]:
        def hand_over(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.chain.broken |= any(tensor._version != version for tensor, version in self.inputs)
            self.inputs, self.handed = [], [] if block + 1 == len(self.chain.blocks) else tensors(output)

        return hand_over

    def _slotted(self, value: Any) -> Any:
        if isinstance(value, Cache):  # replays would append to it again and again
            return None
        for number, tensor in enumerate(self.handed):
            if value is tensor:
                return _Slot(number)
        return value


def find_chains(model: nn.Module) -> list[list[nn.Module]]:
    """The outermost ModuleLists whose members hold layers in train form."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside.update(id(each) for each in module.modules())
            blocks = list(module)
            if any(isinstance(each, TrainedLayer) for each in module.modules()):
                found.append(blocks)
    return found


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list) and not isinstance(value, _Slot):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same nesting with `function` of every leaf."""
    if isinstance(value, _Slot):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_mapped(item, function) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return function(value)
