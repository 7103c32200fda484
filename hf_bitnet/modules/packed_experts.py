"""The experts of `BitExperts` by two products in place of three for each expert, where all of them are packed. Own.

Only without gradients, and where a kernel takes all experts at once. Layers that somebody watches or has replaced (hooks,
adapters, offloading, other schemes for some of them) are called as the layers they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import lru_cache
from itertools import repeat
from operator import contains, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import kernels
from ..kernels import Layout, PackedWeight, RowQuantization
from .packed_linear import PackedBitLinear
from .transformed import is_transforming

Maps = list[list[PackedWeight]]


class _Product(NamedTuple):
    """Maps that read the same rows; of each, the weights of all experts."""

    maps: Maps
    layout: Layout
    rows: RowQuantization

    def __call__(self, x: Tensor, index: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return kernels.packed_experts(x, index, self.maps, self.layout, self.rows, dtype)

    def of(self, numbers: list[int]) -> _Product:
        """With these experts alone, in this order."""
        return _Product([[experts[number] for number in numbers] for experts in self.maps], self.layout, self.rows)


class _Expert(NamedTuple):
    """What must still be there for the products to be this expert's.

    Attributes:
        owners, names, parts: modules, tensors and schemes that went into it, each with the dict it is in.
        hooks: the dicts of all hooks on the layers. own: the dicts of the layers' attributes.
    """

    owners: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    parts: tuple[Any, ...]
    hooks: tuple[dict[Any, Any], ...]
    own: tuple[dict[str, Any], ...]

    def holds(self) -> bool:
        # some thirty comparisons an expert and token: loops that the interpreter does not run
        same = all(map(is_, map(dict.get, self.owners, self.names), self.parts))
        return same and not any(self.hooks) and not any(map(contains, self.own, repeat("forward")))


class _Plan(NamedTuple):
    first: _Product
    down: _Product
    experts: list[_Expert]

    def holds(self, numbers: Iterable[int]) -> bool:
        everywhere = nn.modules.module
        watched = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
        return not watched and all(self.experts[number].holds() for number in numbers)


# not on the modules, because a copy of one has other tensors
_PLANS: weakref.WeakKeyDictionary[nn.Module, _Plan | None] = weakref.WeakKeyDictionary()


def products_of(module: Any, index: Tensor) -> tuple[_Product, _Product, Tensor] | None:
    """What computes the first maps and the last one of a `BitExperts`, and the experts' numbers among their weights.

    Args:
        index: int64 (T, k), the experts of each token.

    Returns: None where the layers have to be called.
    """
    if torch.is_grad_enabled() or is_transforming() or not kernels.serves_experts(index):
        return None
    if torch.compiler.is_compiling():
        plan = _made(module)
        return None if plan is None or not plan.holds(range(module.num_experts)) else (plan.first, plan.down, index)
    if torch._C._get_tracing_state() is not None:
        return None
    # a single token on the CPU: what it does not choose need not be looked at
    numbers = index[0].tolist() if len(index) == 1 and index.is_cpu else None
    if numbers is not None and not all(0 <= number < module.num_experts for number in numbers):
        numbers = None
    plan = _plan_of(module, range(module.num_experts) if numbers is None else numbers)
    if plan is None:
        return None
    if numbers is None:
        return plan.first, plan.down, index
    return plan.first.of(numbers), plan.down.of(numbers), _counted(len(numbers))


@lru_cache(maxsize=64)
def _counted(count: int) -> Tensor:
    """0, 1, ...; (1, count)."""
    with torch.inference_mode(False):
        return torch.arange(count, device="cpu").unsqueeze(0)


def _plan_of(module: Any, numbers: Iterable[int]) -> _Plan | None:
    plan = _PLANS.get(module)
    if plan is not None and plan.holds(numbers):
        return plan
    if plan is None and module in _PLANS and not _may_be_packed(module):
        return None
    plan = _PLANS[module] = _made(module)
    return plan if plan is not None and plan.holds(numbers) else None


def _linears(module: Any) -> list[list[Any]]:
    """For each map the layers of all experts."""
    experts = module.experts()
    return [[expert._modules[name] for expert in experts] for name in module.names]


def _may_be_packed(module: Any) -> bool:
    """A look at one layer, for modules of which there was no plan."""
    return type(module.experts()[0]._modules[module.names[0]]) is PackedBitLinear


def _made(module: Any) -> _Plan | None:
    """The plan of a module; None where its layers differ, or are no packed ones."""
    linears = _linears(module)
    if not all(type(linear) is PackedBitLinear for of_map in linears for linear in of_map):
        return None
    *first, down = linears
    products = [_product(first), _product([down])]
    if products[0] is None or products[1] is None:
        return None
    experts = [
        _expert(module, number, expert, [of_map[number] for of_map in linears])
        for number, expert in enumerate(module.experts())
    ]
    return _Plan(products[0], products[1], experts)


def _product(maps: list[list[PackedBitLinear]]) -> _Product | None:
    """Of layers that read the same rows, if they quantize them and their weights in one way."""
    linear = maps[0][0]
    rows = linear.activation.rows if linear.activation.quantizes else None
    if rows is None or any(
        each.layout != linear.layout or each.activation is not linear.activation or each.sub_norm is not None
        for of_map in maps
        for each in of_map
    ):
        return None
    found = [[each.operands() for each in of_map] for of_map in maps]
    for weights in found:
        if any(is_traceable_wrapper_subclass(tensor) for weight in weights for tensor in weight):
            return None  # of a sharded model
        # as kernels want them: they are told of the first alone
        kinds = {(w.shape, w.stride(), w.device, s.shape, s.stride(), None if b is None else b.dtype) for w, s, b in weights}
        if len(kinds) > 1:
            return None
    return _Product(found, linear.layout, rows)


def _expert(module: nn.Module, number: int, expert: nn.Module, linears: list[PackedBitLinear]) -> _Expert:
    parts: list[tuple[dict[str, Any], str, Any]] = [(module._modules, str(number), expert)]
    for name, linear in expert._modules.items():
        parts.append((expert._modules, name, linear))
    for linear in linears:
        parts += [(linear._parameters, name, linear._parameters.get(name)) for name in ("weight", "weight_scale", "bias")]
        parts += [(linear._modules, "sub_norm", linear._modules.get("sub_norm"))]
        parts += [(linear.__dict__, name, linear.__dict__[name]) for name in ("layout", "activation")]
    owners, names, values = zip(*parts, strict=True)
    hooks = [each for linear in linears for each in (linear._forward_hooks, linear._forward_pre_hooks)]
    return _Expert(owners, names, values, tuple(hooks), tuple(linear.__dict__ for linear in linears))
