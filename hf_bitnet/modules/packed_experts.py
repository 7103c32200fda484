"""The experts of `BitExperts` by two products in place of three for each expert, where all of them are packed. Own.

Only without gradients, and where a kernel takes all experts at once. Layers that somebody watches or has replaced (hooks,
adapters, offloading, other schemes for some of them) are called as the layers they are. What was found out about the layers
is kept beside them and holds while they are the same, with the same parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import contains, is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import kernels
from ..kernels import Layout, PackedWeight, RowQuantization
from .packed_linear import PackedBitLinear
from .patience import Patience
from .transformed import is_transforming

# so many places on the CPU are looked at one by one: experts that nobody chose need not be there
_FEW_PLACES = 16
_call_reference = weakref.ref.__call__


class Product(NamedTuple):
    """Maps that read the same rows, of all experts or of some.

    Attributes:
        maps: of each the layers' dicts of parameters, which hold the weights that are there now.
    """

    maps: list[list[dict[str, Any]]]
    layout: Layout
    rows: RowQuantization

    def __call__(self, x: Tensor, index: Tensor) -> list[Tensor]:
        """float (T, K), int64 (T, k) -> for each map (T * k, N) in the dtype that the layers would have."""
        maps = [[_operands(parameters) for parameters in experts] for experts in self.maps]
        return kernels.packed_experts(x, index, maps, self.layout, self.rows, kernels.autocast_dtype(x))

    def of(self, numbers: list[int]) -> Product:
        """With these experts alone, in this order."""
        return Product([[experts[number] for number in numbers] for experts in self.maps], self.layout, self.rows)


def _operands(parameters: dict[str, Any]) -> PackedWeight:
    return parameters["weight"], parameters["weight_scale"], parameters.get("bias")


class _Seen(NamedTuple):
    """The layers of one expert as they were looked at.

    Attributes:
        owners, names, parts: modules and schemes, each with the dict it is in.
        held_by, held_as, held: parameters, the last held weakly: offloading puts others in their place and frees them.
        hooks: the dicts of all hooks on the layers. own: the dicts of the layers' attributes.
    """

    owners: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    parts: tuple[Any, ...]
    held_by: tuple[dict[str, Any], ...]
    held_as: tuple[str, ...]
    held: tuple[weakref.ref[Tensor], ...]
    hooks: tuple[dict[Any, Any], ...]
    own: tuple[dict[str, Any], ...]

    def is_there(self) -> bool:
        # some thirty comparisons an expert and token: loops that the interpreter does not run
        if not all(map(is_, map(dict.get, self.owners, self.names), self.parts)):
            return False
        held = tuple(map(_call_reference, self.held))
        return all(map(is_, map(dict.get, self.held_by, self.held_as), held)) and all(map(is_not, held, repeat(None)))

    def is_watched(self) -> bool:
        return any(self.hooks) or any(map(contains, self.own, repeat("forward")))


class Together:
    """What is known of a module's experts; it is on the module, and a copy of it knows nothing.

    Attributes:
        products: of the first maps and of the last; None where the layers have to be called.
        seen: each expert as it was then; empty before the first look.
        patience: with layers whose parameters come and go.
    """

    __slots__ = ("patience", "products", "seen")

    def __init__(self) -> None:
        self.products: tuple[Product, Product] | None = None
        self.seen: list[_Seen] = []
        self.patience = Patience(worth=1)

    def __reduce__(self) -> tuple[type[Together], tuple[()]]:
        return Together, ()

    def for_experts(self, module: Any, numbers: Iterable[int]) -> tuple[Product, Product] | None:
        """The products, if they are those of the module's experts `numbers` now."""
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return None
        if self.seen:
            if any(self.seen[number].is_watched() for number in numbers):
                return None
            if all(self.seen[number].is_there() for number in numbers):
                self.patience.served()
                return self.products
        if not self.patience.begins_look():
            return None
        self.products, self.seen = _look_at(module)
        return None if any(self.seen[number].is_watched() for number in numbers) else self.products


def products_of(module: Any, index: Tensor) -> tuple[Product, Product, Tensor] | None:
    """What computes the first maps and the last one of a `BitExperts`, and the experts' numbers among their weights.

    Args:
        index: int64 (T, k), the experts of each token.

    Returns: None where the layers have to be called.
    """
    if torch.is_grad_enabled() or is_transforming() or index.dtype != torch.int64 or not kernels.serves_experts(index):
        return None
    everyone = range(module.num_experts)
    if torch.compiler.is_compiling():  # the compiler watches what it has seen
        products, seen = _look_at(module)
        return None if products is None or any(seen[number].is_watched() for number in everyone) else (*products, index)
    if torch._C._get_tracing_state() is not None or not _may_be_packed(module):
        return None
    # numbers that are looked at would be part of a graph
    if kernels.is_recording() or not index.is_cpu or index.numel() > _FEW_PLACES:
        products = module.together.for_experts(module, everyone)
        return None if products is None else (*products, index)
    chosen = index.reshape(-1).tolist()
    numbers = [number for number in dict.fromkeys(chosen) if 0 <= number < module.num_experts] or [0]
    products = module.together.for_experts(module, numbers)
    if products is None:
        return None
    first, down = products
    among = {number: place for place, number in enumerate(numbers)}
    renamed = torch.tensor([among.get(number, len(numbers)) for number in chosen], dtype=torch.int64, device="cpu")
    return first.of(numbers), down.of(numbers), renamed.view(index.shape)


def _may_be_packed(module: Any) -> bool:
    """A look at one layer. `experts()` would ask for all of them, for every token."""
    return type(module._modules["0"]._modules[module.names[0]]) is PackedBitLinear


def _look_at(module: Any) -> tuple[tuple[Product, Product] | None, list[_Seen]]:
    experts = module.experts()
    seen = [_seen(module, number, expert) for number, expert in enumerate(experts)]
    maps = [[expert._modules[name] for expert in experts] for name in module.names]
    if not all(type(layer) is PackedBitLinear for layers in maps for layer in layers):
        return None, seen
    first, down = _product(maps[:-1]), _product(maps[-1:])
    return None if first is None or down is None else (first, down), seen


def _product(maps: Sequence[Sequence[PackedBitLinear]]) -> Product | None:
    """Of layers that read the same rows, if they quantize them and their weights in one way."""
    layer = maps[0][0]
    rows = layer.activation.rows if layer.activation.quantizes else None
    if rows is None or any(
        each.layout != layer.layout or each.activation is not layer.activation or each.sub_norm is not None
        for layers in maps
        for each in layers
    ):
        return None
    for layers in maps:
        weights = [each.operands() for each in layers]
        if any(is_traceable_wrapper_subclass(tensor) for weight in weights for tensor in weight):
            return None  # of a sharded model
        if len(kernels.kinds_of(weights)) > 1:  # kernels are told of the first alone
            return None
    return Product([[each._parameters for each in layers] for layers in maps], layer.layout, rows)


def _seen(module: nn.Module, number: int, expert: nn.Module) -> _Seen:
    layers = [layer for layer in expert._modules.values() if layer is not None]
    parts: list[tuple[dict[str, Any], str, Any]] = [(module._modules, str(number), expert)]
    parts += [(expert._modules, name, layer) for name, layer in expert._modules.items()]
    held: list[tuple[dict[str, Any], str, weakref.ref[Tensor]]] = []
    for layer in layers:
        if type(layer) is not PackedBitLinear:
            continue  # that it is there says enough
        parts += [(layer._modules, "sub_norm", layer._modules.get("sub_norm"))]
        parts += [(layer.__dict__, name, layer.__dict__[name]) for name in ("layout", "activation")]
        for name in ("weight", "weight_scale", "bias"):
            parameter = layer._parameters.get(name)
            if parameter is None:
                parts.append((layer._parameters, name, None))
            else:
                held.append((layer._parameters, name, weakref.ref(parameter)))
    hooks = [each for layer in layers for each in (layer._forward_hooks, layer._forward_pre_hooks)]
    own = tuple(layer.__dict__ for layer in layers)
    owners, names, values = zip(*parts, strict=True)
    by, as_, references = zip(*held, strict=True) if held else ((), (), ())
    return _Seen(owners, names, values, by, as_, references, tuple(hooks), own)
