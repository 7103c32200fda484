"""Decoder layers of transformers that compute a single new token in one kernel call. Own.

For anything else (prompts, gradients, masks, hooks, other caches) a layer keeps the forward it had. That the one call computes
what the modules compute is not read off names: the first time a layer could use it, both are run on random numbers, and where
they differ the layer never uses it.

Keys and values then live in buffers with room to grow, of which the cache holds views, instead of being copied for each token.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import kernels
from .faster import Faster, epsilon
from .packed_linear import PackedBitLinear

_NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_TOKENS = 64  # a cache grows by so many at least
# of the difference between two ways of rounding, relative to the largest output
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.04}


class _Plan(NamedTuple):
    """A layer as one call, and what must still be there for it to be the layer.

    Attributes:
        modules: per module the dict of its parent, its name, and the module.
        tensors: per tensor the dict of its module, its name, and the tensor or None.
        settings: the numbers and schemes that went into it.
    """

    described: kernels.DescribedLayer
    modules: list[tuple[dict[str, Any], str, nn.Module]]
    tensors: list[tuple[dict[str, Any], str, Tensor | None]]
    settings: tuple[Any, ...]

    def holds(self, module: nn.Module) -> bool:
        same = all(parent.get(name) is part for parent, name, part in (*self.modules, *self.tensors))
        return same and self.described.is_current() and self.settings == _settings(module)


# not on the modules: addresses must not be copied or pickled with them
_PLANS: weakref.WeakKeyDictionary[nn.Module, _Plan | None] = weakref.WeakKeyDictionary()


class _Buffers(NamedTuple):
    keys: Tensor
    values: Tensor
    # what the cache holds of them; any other tensor there means that somebody else has changed the cache
    present: tuple[Tensor, Tensor]


_BUFFERS: weakref.WeakKeyDictionary[DynamicLayer, _Buffers] = weakref.WeakKeyDictionary()


class FasterLayer(Faster):
    """A decoder layer that computes one new token in one call where it may."""

    @staticmethod
    def made_for(original: type[nn.Module]) -> dict[str, Any]:
        return {}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if (
            hidden_states.shape[1] == 1
            and attention_mask is None
            and position_embeddings is not None
            and type(past_key_values) is DynamicCache
            and not kernels.is_recording()
            and not torch.is_grad_enabled()
            and not kwargs.get("output_attentions")
        ):
            y = _decode(self, hidden_states, past_key_values, position_embeddings)  # type: ignore[arg-type]
            if y is not None:
                return y
        return super().forward(  # type: ignore[misc]
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )


def forget(module: nn.Module) -> None:
    """Drops what is known of a layer: it will be looked at anew."""
    _PLANS.pop(module, None)


def is_decoder_layer(module: nn.Module) -> bool:
    """Whether a module has the parts of a layer that could be decoded in one call."""
    parts = module._modules
    if any(parts.get(name) is None for name in ("self_attn", "mlp", *_NORMS)):
        return False
    return all(type(linear) is PackedBitLinear for linear in _linears(module))


def _linears(module: Any) -> list[Any]:
    """The linear maps in the order of `_ATTENTION` and `_MLP`; None for one that is not there."""
    attention, mlp = module._modules["self_attn"]._modules, module._modules["mlp"]._modules
    return [attention.get(name) for name in _ATTENTION] + [mlp.get(name) for name in _MLP]


def _decode(module: nn.Module, x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> Tensor | None:
    plan = _plan_of(module) if x.is_cpu and not torch.is_autocast_enabled("cpu") else None
    if plan is None:
        return None
    size = plan.described.layer.head_dim
    if any(angle.dim() != 3 or angle.shape[0] not in (1, x.shape[0]) or angle.shape[-1] != size for angle in angles):
        return None
    layer = _layer_of(cache, module.self_attn.layer_idx)  # type: ignore[union-attr]
    described = plan.described
    if layer is None or not x.dtype == angles[0].dtype == angles[1].dtype == layer.dtype == described.dtype:
        return None
    assert layer.keys is not None
    if layer.keys.shape[0] != x.shape[0]:
        return None
    keys, values = _with_room(layer)
    length = layer.keys.shape[2]
    y = described.decode(x, *angles, keys, values, length)
    layer.keys, layer.values = keys[:, :, : length + 1], values[:, :, : length + 1]
    _BUFFERS[layer] = _Buffers(keys, values, (layer.keys, layer.values))
    return y


def _plan_of(module: nn.Module) -> _Plan | None:
    """The plan by which a layer may be computed now. It is made when first asked for, and again when it no longer holds."""
    plan = _PLANS.get(module)
    if plan is None and module in _PLANS:
        return None
    if plan is not None and plan.holds(module):
        return None if _is_watched(module) else plan
    # nothing is remembered of a layer that is unpacked or watched just now: the proof would call the watchers
    if not is_decoder_layer(module) or _is_watched(module):
        return None
    plan = _PLANS[module] = _make(module)
    return plan


def _is_watched(module: Any) -> bool:
    """Whether the calls of the parts have to happen: hooks see them, instances have forwards of their own, dropout is on."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    attention, mlp = module._modules["self_attn"], module._modules["mlp"]
    if attention.training and getattr(attention, "attention_dropout", 0.0):
        return True
    parts = (attention, mlp, *(module._modules[name] for name in _NORMS), *attention._modules.values(), *mlp._modules.values())
    return any(
        part is not None and (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__) for part in parts
    )


def _settings(module: Any) -> tuple[Any, ...]:
    attention, norms = module._modules["self_attn"], [module._modules[name] for name in _NORMS]
    schemes = tuple((each.activation, each.layout, each.sub_norm is None) for each in _linears(module))
    return (*(epsilon(norm) for norm in norms), norms[0].weight.dtype, attention.scaling, attention.head_dim, schemes)


def _layer_of(cache: DynamicCache, index: int) -> DynamicLayer | None:
    """The part of the cache that belongs to a layer, if it holds past tokens in the plain manner."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is not DynamicLayer or not layer.is_initialized or layer.keys is None or not layer.keys.numel():
        return None
    return layer if layer.keys.is_cpu else None


def _with_room(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Buffers that hold the cache's keys and values and have a place for one more."""
    now = layer.keys, layer.values
    held = _BUFFERS.get(layer)
    assert now[0] is not None and now[1] is not None
    length = now[0].shape[2]
    if held is not None and held.present[0] is now[0] and held.present[1] is now[1] and held.keys.shape[2] > length:
        return held.keys, held.values
    batch, heads, _, size = now[0].shape
    capacity = length + max(_TOKENS, length // 2)
    keys, values = (tensor.new_empty(batch, heads, capacity, size) for tensor in (now[0], now[1]))
    keys[:, :, :length], values[:, :, :length] = now[0], now[1]
    return keys, values


def _make(module: Any) -> _Plan | None:
    """The plan of a layer; None where its parts compute something else together. `is_decoder_layer` has to hold."""
    linears: list[PackedBitLinear] = _linears(module)
    layout, activation = linears[0].layout, linears[0].activation
    same = all(each.layout == layout and each.activation is activation and each.sub_norm is None for each in linears)
    if activation.rows is None or not same:
        return None
    operands = [each.operands() for each in linears]
    described = _describe(module, operands, layout, activation.rows)
    if described is None or not _agrees(module, described):
        return None
    attention, mlp = module.self_attn._modules, module.mlp._modules
    modules = [(module._modules, name, module._modules[name]) for name in (*_NORMS, "self_attn", "mlp")]
    modules += [(attention, name, attention[name]) for name in _ATTENTION]
    modules += [(mlp, name, part) for name, part in mlp.items() if part is not None]
    tensors: list[tuple[dict[str, Any], str, Tensor | None]]
    tensors = [(norm._parameters, "weight", norm.weight) for norm in (module._modules[name] for name in _NORMS)]
    for each, parts in zip(linears, operands, strict=True):
        tensors += [(each._parameters, key, part) for key, part in zip(_OPERANDS, parts, strict=True)]
    return _Plan(described, modules, tensors, _settings(module))


def _describe(
    module: Any, operands: list[kernels.PackedWeight], layout: kernels.Layout, rows: kernels.RowQuantization
) -> kernels.DescribedLayer | None:
    """A layer in the terms of the kernels; None where it lacks what they need, or where no kernel takes it."""
    attention, norms = module.self_attn, [module._modules[name] for name in _NORMS]
    q, k, v, out, gate, up, down = operands
    try:
        layer = kernels.DecoderLayer(
            *(norms[0].weight, norms[1].weight, epsilon(norms[0]), epsilon(norms[1])),
            qkv=(q, k, v),
            attention_out=out,
            gate_up=(gate, up),
            down=down,
            layout=layout,
            rows=rows,
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            scaling=float(attention.scaling),
        )
        return kernels.describe_layer(layer)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


_OPERANDS = ("weight", "weight_scale", "bias")


@torch.no_grad()
def _agrees(module: Any, described: kernels.DescribedLayer) -> bool:
    """Whether the layer's own forward and the one call return the same for a random token after random others."""
    shape, dtype = described.layer, described.dtype
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    line = torch.linspace(-6.0, 6.0, 49)
    try:
        if not torch.allclose(module.mlp.act_fn(line), torch.nn.functional.silu(line), atol=1e-6):
            return False
    except Exception:  # no activation function by that name, or another kind of one
        return False
    # small, so that the residual does not hide what the parts add to it
    x = random(2, 1, shape.input_norm.shape[0]) * 0.05
    angle = random(1, 1, shape.head_dim // 2).float().repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = random(2, shape.kv_heads, 4, shape.head_dim), random(2, shape.kv_heads, 4, shape.head_dim)
    cache, index = DynamicCache(), module.self_attn.layer_idx
    try:
        cache.update(keys[:, :, :3].clone(), values[:, :, :3].clone(), index)
        expected = module.original.forward(module, x, past_key_values=cache, position_embeddings=(cos, sin), use_cache=True)
    except Exception:  # called otherwise than we think
        return False
    found = described.decode(x, cos, sin, keys, values, 3)
    layer = cache.layers[index]
    if not isinstance(expected, Tensor) or layer.keys is None or layer.values is None or layer.keys.shape != keys.shape:
        return False
    return all(
        (ours.float() - theirs.float()).abs().max() <= _TOLERANCE[dtype] * theirs.float().abs().max()
        for ours, theirs in ((found, expected), (keys, layer.keys), (values, layer.values))
    )
