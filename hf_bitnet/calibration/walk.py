"""The way of `fit_weights` through a model: in which order, in which pieces, and what each layer's inputs are. Own.

A unit is a piece that is worked on at once. A block of a chain (`stream.py`) is run on its recorded inputs, with the
full-precision model's inputs of the same block beside them; layers outside of any chain are reached by running the whole model.
Within a unit, layers that read the very same tensor make a stage: one Hessian serves them all, and only one stage's is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import TrainedLayer
from ..surgery import layers_of_experts, run
from .moments import Moments
from .stream import Call, Chain, find_chains

Stage = dict[str, TrainedLayer]
FitStage = Callable[[Stage, Moments], None]


@dataclass
class Trace:
    """What a pass of the full-precision model tells about a layer.

    Attributes:
        calls: how often each batch called it. source: a number of the tensor that it read, the same for the same tensor.
        place: when it was first called, among all layers.
    """

    calls: list[int] = field(default_factory=list)
    source: int = -1
    place: int = -1

    @property
    def once(self) -> bool:
        return set(self.calls) == {1}


class Walk:
    """A model in train form, inside `probing(model, quantized=False)`, and the batches to fit it on."""

    def __init__(self, model: nn.Module, layers: Stage, batches: list[Any], activations: bool) -> None:
        self.model, self.layers, self.batches, self.activations = model, dict(layers), batches, activations
        self.unreached: Stage = {}
        self.traces = {name: Trace() for name in layers}
        self.names = {id(layer): name for name, layer in layers.items()}
        self.masks: list[tuple[Tensor | None, Tensor | None]] = [_masks(batch) for batch in batches]
        decoder = getattr(model, "get_decoder", lambda: None)() if _is_encoder_decoder(model) else None
        self.in_decoder = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
        self.chains = [Chain(blocks) for blocks in find_chains(model)]
        self.fitted_any = False

    # ---- the full-precision pass ----

    def trace(self) -> None:
        """Runs every batch in full precision: records the chains, and finds layers that fail or are never reached."""
        with _recording(self.chains):
            for number, batch in enumerate(self.batches, start=1):
                for chain in self.chains:
                    chain.new_batch()
                witnesses: list[tuple[str, Tensor]] = []
                with self._hooks(self.layers, self._tracer(witnesses)):
                    run(self.model, batch)
                _check_finite(witnesses, number)
        unseen = [name for name, trace in self.traces.items() if trace.place < 0]
        experts = layers_of_experts(self.model)  # that no token reaches is in their nature
        self.unreached = {name: self.layers.pop(name) for name in unseen if name in experts}
        for layer in self.unreached.values():
            del self.names[id(layer)]
        missed = [name for name in unseen if name not in experts]
        if missed:
            raise ValueError(
                f"fit_weights: no batch reached {', '.join(missed[:5])}{' and others' if len(missed) > 5 else ''}; pass "
                f"batches that use every layer, or keep it in full precision: keep=[r'{missed[0]}']"
            )

    def _tracer(self, witnesses: list[tuple[str, Tensor]]) -> Callable[[str, Tensor], None]:
        for trace in self.traces.values():
            trace.calls.append(0)
        numbers = count(sum(trace.place >= 0 for trace in self.traces.values()))

        def note(name: str, x: Tensor) -> None:
            trace = self.traces[name]
            trace.calls[-1] += 1
            if trace.place < 0 and x.numel():
                trace.place = next(numbers)
                # an attribute of the tensor object: an id() would be used again as soon as the tensor is gone
                trace.source = vars(x).setdefault("_hf_bitnet_source", trace.place)
            if x.numel():
                witnesses.append((name, x.abs().amax()))

        return note

    # ---- the way ----

    def fit(self, fit_stage: FitStage) -> None:
        """Calls `fit_stage` for every stage, from the inputs to the outputs. It must leave its layers quantized.

        Maps of experts that no token reaches come last, with moments of no input.
        """
        for chain in self.chains:
            chain.broken |= not self._is_sound(chain)
        where = {
            id(layer): chain for chain in self.chains if not chain.broken for block in chain.blocks for layer in block.modules()
        }
        loose: Stage = {}
        finished: list[Chain] = []
        for name in sorted(self.layers, key=lambda name: self.traces[name].place):
            chain = where.get(id(self.layers[name]))
            if chain is None:
                loose[name] = self.layers[name]
            elif chain not in finished:
                self._fit_loose(loose, fit_stage)
                loose = {}
                self._fit_chain(chain, fit_stage)
                finished.append(chain)
        self._fit_loose(loose, fit_stage)
        for name, layer in self.unreached.items():
            fit_stage({name: layer}, Moments({name: layer}, self.activations))

    def _is_sound(self, chain: Chain) -> bool:
        layers = [module for block in chain.blocks for module in block.modules() if id(module) in self.names]
        return len({id(layer) for layer in layers}) == len(layers)  # a layer of two blocks belongs to neither

    def _stages(self, names: list[str]) -> list[Stage]:
        stages: dict[Any, Stage] = {}
        for name in sorted(names, key=lambda name: self.traces[name].place):
            layer, trace = self.layers[name], self.traces[name]
            alone = layer.sub_norm is not None or layer.activation.static or not trace.once
            stages.setdefault(name if alone else (trace.source, layer.activation), {})[name] = layer
        return list(stages.values())

    def _fit_loose(self, layers: Stage, fit_stage: FitStage) -> None:
        for stage in self._stages(list(layers)):
            moments = Moments(stage, self.activations)
            for number in range(len(self.batches)):
                self._gather(stage, moments, number, partial(run, self.model, self.batches[number]), None)
            fit_stage(stage, moments)
            self.fitted_any = True

    def _fit_chain(self, chain: Chain, fit_stage: FitStage) -> None:
        reference = chain.first_calls()
        seen = chain
        if self.fitted_any:  # the inputs are no longer those of the full-precision model
            seen = Chain(chain.blocks)
            with seen.recording():
                for batch in self.batches:
                    seen.new_batch()
                    run(self.model, batch)
        calls = seen.first_calls()
        for i, block in enumerate(chain.blocks):
            stages = self._stages([self.names[id(module)] for module in block.modules() if id(module) in self.names])
            inputs, reference = self._reference(chain, i, block, reference, stages)
            for place, stage in enumerate(stages):
                moments = Moments(stage, self.activations)
                for number, call in enumerate(calls):
                    known = inputs[number].pop(place)
                    self._gather(stage, moments, number, partial(block, *call.args, **call.kwargs), known)
                fit_stage(stage, moments)
                self.fitted_any = True
            if i + 1 < len(chain.blocks):
                outputs = (block(*call.args, **call.kwargs) for call in calls)
                calls = [seen.next_call(number, i, output) for number, output in enumerate(outputs)]

    def _reference(
        self, chain: Chain, i: int, block: nn.Module, calls: list[Call], stages: list[Stage]
    ) -> tuple[list[dict[int, list[Tensor]]], list[Call]]:
        """What the stages of an unfitted block read in the full-precision model, for each batch; and the next block's calls."""
        places = {next(iter(stage)): place for place, stage in enumerate(stages)}
        firsts = {name: self.layers[name] for name in places}
        inputs: list[dict[int, list[Tensor]]] = []
        behind: list[Call] = []
        for number, call in enumerate(calls):
            read: dict[int, list[Tensor]] = {place: [] for place in places.values()}
            with self._hooks(firsts, lambda name, x, read=read: read[places[name]].append(x)):
                output = block(*call.args, **call.kwargs)
            inputs.append(read)
            if i + 1 < len(chain.blocks):
                behind.append(chain.next_call(number, i, output))
        return inputs, behind

    def _gather(
        self, stage: Stage, moments: Moments, number: int, forward: Callable[[], Any], known: list[Tensor] | None
    ) -> None:
        """Adds one batch to the moments; stops the forward pass as soon as nothing of it is needed any more.

        Args:
            known: what the stage's first layer read in the full-precision model, one tensor a call, or None.
        """
        first, once = next(iter(stage)), all(self.traces[name].once for name in stage)
        reached: list[Tensor] = []

        def take(name: str, x: Tensor) -> None:
            reached.append(x)
            if once:
                raise _Reached

        with self._hooks({first: stage[first]}, take), suppress(_Reached):
            forward()
        for i, x in enumerate(reached):
            # rows of a tensor that is not (batch, tokens, features) may have been chosen, by a router for example
            same = known is not None and len(known) == len(reached) and x.dim() > 2 and known[i].shape == x.shape
            moments.update(x, known[i] if same and known is not None else None, self._mask(first, number, x))

    def _mask(self, name: str, number: int, x: Tensor) -> Tensor | None:
        """Which rows of an input are no padding, bool over its leading sizes; None where all count or nothing is known."""
        mask = self.masks[number][id(self.layers[name]) in self.in_decoder]
        if mask is None:
            return None
        if x.shape[:-1] == mask.shape:
            return mask
        return mask.flatten() if x.dim() == 2 and len(x) == mask.numel() else None

    @contextmanager
    def _hooks(self, layers: Stage, take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, `take(name, input)` is called before each call of these layers."""

        def hook(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: take(name, args[0] if args else kwargs["input"])

        handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Reached(Exception):
    """Ends a forward pass of which nothing more is needed."""


@contextmanager
def _recording(chains: list[Chain]) -> Iterator[None]:
    with ExitStack() as stack:
        for chain in chains:
            stack.enter_context(chain.recording())
        yield


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _masks(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """The padding masks (batch, tokens) of the inputs and of a decoder's inputs, as bool."""
    found = [batch.get(key) if isinstance(batch, dict) else None for key in ("attention_mask", "decoder_attention_mask")]
    first, second = (mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None for mask in found)
    return first, second


def _check_finite(witnesses: list[tuple[str, Tensor]], number: int) -> None:
    if not witnesses:
        return
    finite = torch.isfinite(torch.stack([value.float().to(witnesses[0][1].device) for _, value in witnesses])).tolist()
    if not all(finite):
        raise ValueError(
            f"fit_weights: the input of {witnesses[finite.index(False)][0]} is NaN or infinite in batch {number}; look at that "
            "batch and at the weights before this layer (float16 overflows where bfloat16 does not: model.to(torch.bfloat16))"
        )
