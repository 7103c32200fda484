"""Logits of a few tokens at a time: the model stops at its hidden states, and its output head runs on slices of them. Own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ... import kernels


class HeadRows:
    """A slice of tokens -> their logits (n, V), on `device`.

    Args:
        values: logits (N, V), or hidden states (N, H) where `head` is given.
    """

    def __init__(self, values: Tensor, head: nn.Linear | None, device: torch.device) -> None:
        self.values, self.head, self.device = values, head, device
        self._cast: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __call__(self, rows: slice) -> Tensor:
        with torch.no_grad():
            if self.head is None:
                return self.values[rows].to(self.device)
            hidden, weight, bias = self._cast_once(self.head)
            return nn.functional.linear(hidden[rows], weight, bias).to(self.device)

    def _cast_once(self, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._cast is None:
            dtype = kernels.autocast_dtype(head.weight)
            bias = None if head.bias is None else head.bias.to(dtype)
            self._cast = self.values.to(dtype), head.weight.to(dtype), bias
        return self._cast


def identity(hidden: Tensor) -> Tensor:
    """In the place of a head's forward: the model returns its hidden states."""
    return hidden


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `forward` runs in the place of the module's own."""
    assert "forward" not in module.__dict__
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
