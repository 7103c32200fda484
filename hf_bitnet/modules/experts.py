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
        chosen = top_k_index.shape[-1]
        # one look at the numbers: what follows is made of products of different sizes
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts)[: self.num_experts].tolist()
        rows = hidden_states[order // chosen]
        parts = rows.split([*counts, len(rows) - sum(counts)])
        everyone = torch.is_grad_enabled() or _in_a_group()
        results = [self._expert(number, part) for number, part in enumerate(parts[:-1]) if everyone or counts[number]]
        results.append(torch.zeros_like(parts[-1]))  # places without an expert
        weighted = torch.cat(results) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        sorted_back = torch.empty_like(order)
        sorted_back[order] = torch.arange(len(order), device=order.device)
        y = weighted[sorted_back].view(-1, chosen, weighted.shape[-1]).sum(dim=1)
        return y.to(hidden_states.dtype)

    def _all(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same for a graph of fixed shapes: every expert on every token, most of them with weight 0."""
        y = torch.zeros_like(x)
        for number in range(self.num_experts):
            weight = torch.where(index == number, weights, 0.0).sum(dim=-1, keepdim=True)
            y = y + (self._expert(number, x) * weight).to(x.dtype)
        return y

    def _expert(self, number: int, x: Tensor) -> Tensor:
        """float (M, hidden) -> (M, hidden)."""
        fused, maps = self.fused, self._modules[str(number)]
        *first, down = (getattr(maps, name) for name in self.names)
        if len(first) == 1:
            inner = fused.act_fn(first[0](x))
        else:
            gate, up = first[0](x), first[1](x)
            both = torch.cat([gate, up], dim=-1) if fused.is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
            inner = fused._apply_gate(both)
        y = down(inner)
        return y if self.post_expert_norm is None else self.post_expert_norm(y)

    def extra_repr(self) -> str:
        return f"of {type(self.fused).__name__}"


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
