"""BitExperts: experts that a model of transformers keeps in 3-D weights, as linear layers that are quantized one by one. Own.

    y[t] = sum over the experts e of token t of  weight[t, e] * down_e(act(gate_e(x[t])) * up_e(x[t]))

which is what transformers' `grouped_mm_experts_forward` computes: its layouts (gate and up one after the other or in turns,
transposed or not, with biases or a norm behind), its order of sums, the model's own gate function. Every linear map then has
its own codes, scales, adapters and figures, and is called `<experts>.<number>.<name of the map in checkpoints>`.

Leaves out: which experts are separated, and making them fused again (`surgery/experts.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .packed_experts import Product, Together, products_of

# where the gate function is from that all experts have whose class defines none
_OF_TRANSFORMERS = "transformers.integrations.moe"


class Expert(nn.Module):
    """The linear maps of one expert, by the names they have in checkpoints. What goes in between is BitExperts' to know."""

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class BitExperts(nn.Module):
    """Takes the place of a module of transformers that was made by `use_experts_implementation`.

    Attributes:
        names: of an expert's maps: gate, up and down, or up and down where the model has no gate.
        fused: the module it stands for, without weights; it knows the model's gate function and its numbers.
        together: what is known of packed experts, see `packed_experts.py`.

    In training every expert is called, those without tokens on none: their gradients are then zero and not missing, which
    data-parallel training needs, and all ranks call the same layers.
    """

    def __init__(self, fused: Any, names: tuple[str, ...], experts: list[dict[str, nn.Module]]) -> None:
        """
        Args:
            fused: the module whose weights the experts hold.
            names: see above. experts: one dict each, name -> linear map, with the keys `names`.
        """
        super().__init__()
        self.names = names
        self._fused = (fused,)  # in a tuple it is no part of this module
        for number, linears in enumerate(experts):
            self.add_module(str(number), Expert({name: linears[name] for name in names}))
        self.num_experts = len(experts)
        self.post_expert_norm = fused.post_expert_norm if fused.has_post_expert_norm else None
        self.together = Together()
        self.training = fused.training

    @property
    def fused(self) -> Any:
        return self._fused[0]

    def experts(self) -> list[Expert]:
        """In their order."""
        return [getattr(self, str(number)) for number in range(self.num_experts)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states: float (T, hidden).
            top_k_index: int64 (T, k), the experts of each token; `num_experts` and above for none.
            top_k_weights: float (T, k).

        Returns: (T, hidden) in the dtype of `hidden_states`.
        """
        if torch.compiler.is_exporting():
            return self._all(hidden_states, top_k_index, top_k_weights)
        if (products := products_of(self, top_k_index)) is not None:
            return self._together(*products, hidden_states, top_k_index, top_k_weights)
        everyone = torch.is_grad_enabled() or _in_a_group()
        if len(hidden_states) == 1 and not everyone:
            return self._one(hidden_states, top_k_index, top_k_weights)
        chosen = top_k_index.shape[-1]
        index = top_k_index.reshape(-1)
        order = torch.argsort(index, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # one look at the numbers: what follows is made of products of different sizes
        counts = torch.bincount(index, minlength=self.num_experts)[: self.num_experts].tolist()
        parts = _Sorted.apply(hidden_states, order, back, chosen).split([*counts, len(order) - sum(counts)])
        results = [self._expert(number, part) for number, part in enumerate(parts[:-1]) if everyone or counts[number]]
        results.append(torch.zeros_like(parts[-1]))  # places without an expert
        y = _Sorted.apply(torch.cat(results), back, order, 1)
        return (y.view(-1, chosen, y.shape[-1]) * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)

    def _together(
        self, first: Product, down: Product, numbers: Tensor, hidden_states: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """The same by products over all experts at once, see `packed_experts.py`."""
        (y,) = down(self._between(first(hidden_states, numbers)), numbers.view(-1, 1))
        if self.post_expert_norm is not None:  # of nothing it need not be nothing
            there = (index >= 0) & (index < self.num_experts)
            y = self.post_expert_norm(y) * there.view(-1, 1)
        y = y.view(*index.shape, y.shape[-1])
        return (y * weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)

    def _one(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same for a single token, without sorting."""
        numbers = index[0].tolist()
        # a view for each, because what reads one tensor is taken for parts of one layer (`shared_product.py`)
        results = [
            self._expert(number, x.view(x.shape)) if number < self.num_experts else torch.zeros_like(x) for number in numbers
        ]
        return (torch.cat(results) * weights[0].unsqueeze(-1)).sum(dim=0, keepdim=True).to(x.dtype)

    def _all(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same for a graph of fixed shapes: every expert on every token, most of them with weight 0."""
        y = torch.zeros_like(x)
        for number in range(self.num_experts):
            weight = torch.where(index == number, weights, 0.0).sum(dim=-1, keepdim=True)
            y = y + (self._expert(number, x) * weight).to(x.dtype)
        return y

    def _expert(self, number: int, x: Tensor) -> Tensor:
        """float (M, hidden) -> (M, hidden)."""
        expert = self._modules[str(number)]
        *first, down = (getattr(expert, name) for name in self.names)
        y = down(self._between([linear(x) for linear in first]))
        return y if self.post_expert_norm is None else self.post_expert_norm(y)

    def _between(self, first: list[Tensor]) -> Tensor:
        """What the last map reads, from the results (M, inner) of the first ones."""
        return self.fused.act_fn(first[0]) if len(first) == 1 else _gated(self.fused, *first)

    def extra_repr(self) -> str:
        return f"of {type(self.fused).__name__}"


def _gated(fused: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Two of float (M, inner) -> (M, inner), by the model's own function."""
    if type(fused)._apply_gate.__module__ == _OF_TRANSFORMERS:  # the usual one, which would only take them apart again
        return fused.act_fn(gate) * up
    both = torch.cat([gate, up], dim=-1) if fused.is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
    return fused._apply_gate(both)


class _Sorted(torch.autograd.Function):
    """Row `order[i] // times` of x at place i. Backward is a lookup, too, where torch's own adds rows one by one."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor, times: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """float (T, F), a permutation of (T * times), its inverse -> (T * times, F)."""
        return x[order if times == 1 else order // times]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, back, ctx.times = inputs
        ctx.save_for_backward(back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grads[0][back]
        return (grad if ctx.times == 1 else grad.view(-1, ctx.times, grad.shape[-1]).sum(dim=1)), None, None, None


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
