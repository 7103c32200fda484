"""Faster forwards for modules of transformers, which stay what they are. Own.

A module of class C becomes one of a subclass of C that we make: same parameters, same keys, same `isinstance`, same hooks, and
one attribute assignment back. Its forward takes the fast way where no gradient is asked for, and C's own everywhere else
(training, torch.compile, which fuses the plain form itself).

Leaves out: which modules may be changed, and the proof that they compute the same (`surgery/generation.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .. import kernels

# what the forwards of transformers' attention layers call by these names, from their own file
ROTATE, ATTENTION_FUNCTIONS = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"


class Faster:
    """Marks the subclasses made here.

    Attributes:
        original: the class the module had.
    """

    original: type[nn.Module]

    @staticmethod
    def made_for(original: type[nn.Module]) -> dict[str, Any]:
        """Attributes of the subclass for a class."""
        raise AssertionError("abstract")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class made at run time cannot be found by name: copies and pickles name the original, and make it again
        _, _, state, *rest = super().__reduce_ex__(protocol)
        return _empty, (type(self).__bases__[0], self.original), state, *rest


def _empty(form: type, original: type[nn.Module]) -> nn.Module:
    kind = _faster(form, original)
    return kind.__new__(kind)  # pyright: ignore[reportCallIssue]


@functools.cache
def _faster(form: type, original: type[nn.Module]) -> type:
    return type(
        original.__name__,
        (form, original),
        {"original": original, "__module__": original.__module__, **form.made_for(original)},
    )


def make_faster(module: nn.Module, form: type[Faster]) -> None:
    """Gives a module the fast forward `form`, in place."""
    module.__class__ = _faster(form, type(module))


def make_original(module: nn.Module) -> None:
    """Takes it off again; does nothing to other modules."""
    if isinstance(module, Faster):
        module.__class__ = module.original  # type: ignore[assignment]


def _eager_without_gradient(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors)


class FasterNorm(Faster):
    """`round(x * rsqrt(mean(x^2) + eps)) * weight`, as one kernel. Only the order of the sum differs from torch's."""

    @staticmethod
    def made_for(original: type[nn.Module]) -> dict[str, Any]:
        return {}

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self._parameters.get("weight")  # type: ignore[attr-defined]  # None in a replica of nn.DataParallel
        if weight is None or hidden_states.dtype != weight.dtype or not _eager_without_gradient(hidden_states, weight):
            return super().forward(hidden_states)  # type: ignore[misc]
        return kernels.rms_norm(hidden_states, weight, epsilon(self))


def epsilon(norm: Any) -> float:
    """What a norm of transformers adds to the mean square. Raises KeyError where there is no such attribute."""
    return norm.__dict__[epsilon_name(norm)]


def epsilon_name(norm: Any) -> str:
    """It goes by two names."""
    return "variance_epsilon" if "variance_epsilon" in norm.__dict__ else "eps"


class FasterAttention(Faster):
    """An attention layer whose rotary embedding is one kernel, and that attends from one new token without copying keys.

    The forward is the original's own code; the two functions it calls by name are ours.
    """

    @staticmethod
    def made_for(original: type[nn.Module]) -> dict[str, Any]:
        forward = original.forward
        assert isinstance(forward, FunctionType)
        names = forward.__globals__
        ours = {ROTATE: _rotate_instead_of(names[ROTATE]), ATTENTION_FUNCTIONS: _Functions(names[ATTENTION_FUNCTIONS])}
        faster = FunctionType(forward.__code__, names | ours, forward.__name__, forward.__defaults__, forward.__closure__)
        faster.__kwdefaults__ = forward.__kwdefaults__

        @functools.wraps(forward)
        def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # torch.compile looks globals up in the module that a function says it is from
            return (forward if torch.compiler.is_compiling() else faster)(self, *args, **kwargs)

        return {"forward": chosen}


def _rotate_instead_of(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """float (B, H, T, D), (B, H', T, D), cos and sin (B or 1, T, D) -> both rotated."""
        same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[-1] == cos.shape[-1]
        if unsqueeze_dim != 1 or not same or not _eager_without_gradient(q, k):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return kernels.rotate(q, k, cos, sin)

    return rotate


class _Functions:
    """transformers' table of attention functions, with ours in the place of torch's fused attention."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        found = self.table.get_interface(name, default)
        return _one_token_attention(found) if name == "sdpa" else found


@functools.cache
def _one_token_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, H, T, D) with keys and values (B, H', S, D) -> (B, T, H, D).

        Query heads that share a key head are laid side by side as its queries. torch's own grouped attention gives each of
        them a task of its own, which for one token costs more than the attention.
        """
        batch, heads, length, size = query.shape
        groups = key.shape[1]
        plain = attention_mask is None and dropout == 0.0 and not _OTHER_ARGUMENTS.intersection(kwargs)
        if length != 1 or heads == groups or not plain:
            return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        query = query.reshape(batch, groups, heads // groups, size)
        y = scaled_dot_product_attention(query, key, value, scale=scaling)
        return y.reshape(batch, 1, heads, value.shape[-1]), None

    return attention


# of transformers' attention functions, that change what is computed
_OTHER_ARGUMENTS = frozenset({"position_bias", "cache", "softcap", "s_aux", "output_attentions"})
