"""Decoder layers of transformers that compute a single new token, or a prompt, in one kernel call. Own.

For anything else (gradients, masks, hooks, other caches) a layer keeps the forward it had. That the one call computes what
the modules compute is not read off names: the first time a layer could use it, both are run on random numbers, and where they
differ the layer never uses it.

Leaves out: which layers share a call (`faster_ahead.py`), the call for a prompt (`faster_prompt.py`), where keys and values
are kept (`faster_cache.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import repeat
from operator import attrgetter, contains, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .. import kernels
from . import faster_ahead, faster_prompt
from .faster import Faster, epsilon, epsilon_name
from .packed_linear import PackedBitLinear
from .patience import Patience
from .sub_norm import SubNorm

_ATTENDING = (None, "sdpa", "eager")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# of the difference between two ways of rounding, relative to the largest output
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.04}
# of rows in which a rounding has moved a code of the next product
_ONE_CODE = 0.04


class _Watchers(NamedTuple):
    """Who may see the calls of a layer's parts: hooks, forwards of instances, dropout.

    Attributes:
        hooks: the dicts of all hooks on the parts. own: the dicts of the parts' attributes.
        attention: whose dropout is for training.
    """

    hooks: tuple[dict[Any, Any], ...]
    own: tuple[dict[str, Any], ...]
    attention: nn.Module

    def are_there(self) -> bool:
        """Whether the calls of the parts have to happen."""
        attention, everywhere = self.attention, nn.modules.module
        return (
            any(self.hooks)
            or any(map(contains, self.own, repeat("forward")))
            or (attention.training and bool(getattr(attention, "attention_dropout", 0.0)))
            or bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
        )


class _Plan(NamedTuple):
    """A layer as one call, and what must still be there for it to be the layer.

    Attributes:
        patience: with a layer whose parts change at every token.
        prompts: whether prompts may be computed by it, too.
        owners, names, parts: modules, tensors, numbers and schemes that went into it, each with the dict it is in.
        blends, versions: of sub-norms, whose values went into it.
    """

    patience: Patience
    described: kernels.DescribedLayer
    prompts: bool
    owners: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    parts: tuple[Any, ...]
    blends: tuple[Tensor, ...]
    versions: tuple[int, ...]
    watchers: _Watchers

    def holds(self) -> bool:
        # sixty comparisons a layer and token: loops that the interpreter does not run
        same = all(map(is_, map(dict.get, self.owners, self.names), self.parts)) and self.described.is_current()
        return same and self.versions == _versions(self.blends)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Another one for a tensor that was changed in place."""
    return tuple(map(attrgetter("_version"), tensors))


# not on the modules: addresses must not be copied or pickled with them
_PLANS: weakref.WeakKeyDictionary[nn.Module, _Plan | Patience | None] = weakref.WeakKeyDictionary()
# a token asks for a plan up to three times, and a plan costs two proofs
_WORTH = 4


class FasterLayer(Faster):
    """A decoder layer that computes one new token, or a prompt, in one call where it may."""

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
            (attention_mask is None or hidden_states.shape[1] > 1)
            and position_embeddings is not None
            and (past_key_values is None or type(past_key_values) is DynamicCache)
            and not kernels.is_recording()
            and not torch.is_grad_enabled()
        ):
            y = _computed(self, hidden_states, attention_mask, past_key_values, position_embeddings, kwargs)  # type: ignore[arg-type]
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
    faster_ahead.forget(module)


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


def _computed(
    module: nn.Module,
    x: Tensor,
    mask: Tensor | None,
    cache: DynamicCache | None,
    angles: tuple[Tensor, Tensor],
    given: dict[str, Any],
) -> Tensor | None:
    """The layer's result by a kernel call; None where its own forward has to run."""
    if not x.numel() or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    if x.shape[1] > 1:
        plain = faster_prompt.is_causal(module, given) and faster_prompt.shows_all_before(mask, *x.shape[:2])
        plan = _plan_of(module) if plain else None
        return (
            None if plan is None or not plan.prompts else faster_prompt.compute(module, plan.described, x, mask, cache, angles)
        )
    if cache is None or given.get("output_attentions"):
        return None
    y = faster_ahead.taken(module, x, cache, angles)
    return _decode(module, x, cache, angles) if y is None else y


def _decode(module: nn.Module, x: Tensor, cache: DynamicCache, angles: tuple[Tensor, Tensor]) -> Tensor | None:
    """The layer's result for a token, by a call that computes the layers behind it too."""
    steps = faster_ahead.steps_of(described_of(faster_ahead.row_from(module)), x, cache, angles)
    return faster_ahead.compute(steps, x, cache, angles) if steps else None


def described_of(layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, kernels.DescribedLayer]]:
    """The layers in the terms of the kernels, up to the first that is to be called otherwise just now."""
    for layer in layers:
        plan = _plan_of(layer) if isinstance(layer, FasterLayer) else None
        if plan is None:
            return
        yield layer, plan.described


def _plan_of(module: nn.Module) -> _Plan | None:
    """The plan by which a layer may be computed now. It is made when first asked for, and again when it no longer holds."""
    known = _PLANS.get(module)
    if known is None and module in _PLANS:
        return None
    if not _attends_to_all(module):
        return None
    if isinstance(known, _Plan):
        if known.holds():
            known.patience.served()
            return None if known.watchers.are_there() else known
        known = _PLANS[module] = known.patience  # weights that are gone from the layer must not stay for the plan
    # nothing is remembered of a layer that is unpacked or watched just now: the proof would call the watchers
    if not is_decoder_layer(module) or _watchers_of(module).are_there():
        return None
    patience = Patience(_WORTH) if known is None else known
    if not patience.begins_look():
        return None
    plan = _PLANS[module] = _make(module, patience)
    return plan


def _attends_to_all(module: Any) -> bool:
    """Whether the way to attend that the config names looks at the whole past, as the kernel does."""
    return faster_prompt.attending(module) in _ATTENDING


def _modules_of(module: Any) -> list[nn.Module]:
    """The layer's norms, attention and MLP, what is in the last two, and the sub-norms in that."""
    attention, mlp = module._modules["self_attn"], module._modules["mlp"]
    parts = (*(module._modules[name] for name in _NORMS), attention, mlp, *attention._modules.values(), *mlp._modules.values())
    inner = [part._modules.get("sub_norm") for part in parts if part is not None]
    return [part for part in (*parts, *inner) if part is not None]


def _watchers_of(module: Any) -> _Watchers:
    parts = _modules_of(module)
    hooks = tuple(hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks))
    return _Watchers(hooks, tuple(part.__dict__ for part in parts), module.self_attn)


def _make(module: Any, patience: Patience) -> _Plan | None:
    """The plan of a layer; None where its parts compute something else together. `is_decoder_layer` has to hold."""
    linears: list[PackedBitLinear] = _linears(module)
    layout, activation = linears[0].layout, linears[0].activation
    same = all(each.layout == layout and each.activation is activation for each in linears)
    described = _describe(module, linears, layout, activation.rows) if same and activation.rows is not None else None
    if described is None or not _agrees(module, described, 1, 3):
        return None
    prompts = faster_prompt.is_causal(module, {}) and _agrees(module, described, 5, 0)
    owners, names = (tuple(column) for column in zip(*_ingredients(module, linears), strict=True))
    now = tuple(map(dict.get, owners, names))
    blends = tuple(part.blend for part in _modules_of(module) if isinstance(part, SubNorm))
    return _Plan(patience, described, prompts, owners, names, now, blends, _versions(blends), _watchers_of(module))


def _ingredients(module: Any, linears: list[PackedBitLinear]) -> list[tuple[dict[str, Any], str]]:
    """The dict and the name of everything that a plan is made from."""
    attention, mlp = module.self_attn, module.mlp
    found = [(module._modules, name) for name in (*_NORMS, "self_attn", "mlp")]
    found += [(part._modules, name) for part in (attention, mlp) for name, inner in part._modules.items() if inner is not None]
    for norm in filter(_is_norm, _modules_of(module)):
        found += [(norm._parameters, "weight"), (norm.__dict__, epsilon_name(norm)), (norm._buffers, "blend")]
    found += [(attention.__dict__, name) for name in ("scaling", "head_dim")]
    for each in linears:
        found += [(each._parameters, key) for key in _OPERANDS]
        found += [(each.__dict__, key) for key in ("activation", "layout", "sub_norm")] + [(each._modules, "sub_norm")]
    return found


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and epsilon_name(module) in module.__dict__


def _norm(module: Any) -> kernels.Norm | None:
    """An RMS norm in the terms of the kernels; None for none. Raises ValueError for one that is half the identity."""
    if isinstance(module, SubNorm) and float(module.blend) != 1.0:
        raise ValueError("the kernel knows whole norms only")
    return None if module is None else kernels.Norm(module.weight, epsilon(module), isinstance(module, SubNorm))


def _in_front(linear: PackedBitLinear, other: nn.Module | None) -> kernels.Norm | None:
    """The norm in front of a linear map: one of ours, or one that the model has there. Raises ValueError for both."""
    if linear.sub_norm is not None and other is not None:
        raise ValueError("the kernel knows one norm in front of a linear map")
    return _norm(other if linear.sub_norm is None else linear.sub_norm)


def _describe(
    module: Any, linears: list[PackedBitLinear], layout: kernels.Layout, rows: kernels.RowQuantization
) -> kernels.DescribedLayer | None:
    """A layer in the terms of the kernels; None where it lacks what they need, or where no kernel takes it.

    Whether its norms by these names stand where the kernel has them, and compute what it computes, the proof shows.
    """
    attention, mlp = module.self_attn, module.mlp
    q, k, v, out, gate, up, down = (each.operands() for each in linears)
    if any(each.sub_norm is not None for each in (*linears[:3], *linears[4:6])):
        return None
    try:
        input_norm, post_norm = (_norm(module._modules[name]) for name in _NORMS)
        if input_norm is None or post_norm is None:
            return None
        layer = kernels.DecoderLayer(
            *(input_norm, post_norm),
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
            activation=_activation(mlp.act_fn),
            q_norm=_norm(attention._modules.get("q_norm")),
            k_norm=_norm(attention._modules.get("k_norm")),
            out_norm=_in_front(linears[3], attention._modules.get("attn_sub_norm")),
            down_norm=_in_front(linears[6], mlp._modules.get("ffn_sub_norm")),
        )
        return kernels.describe_layer(layer)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _activation(function: Any) -> str:
    """The name by which the kernel knows an activation function. Raises ValueError for others."""
    line = torch.linspace(-6.0, 6.0, 49, device="cpu")
    found = function(line)
    for name, known in kernels.ACTIVATIONS.items():
        if torch.allclose(found, known(line), atol=1e-6):
            return name
    raise ValueError("the kernel does not know this activation function")


_OPERANDS = ("weight", "weight_scale", "bias")


@torch.no_grad()
def _agrees(module: Any, described: kernels.DescribedLayer, tokens: int, past: int) -> bool:
    """Whether the layer's own forward and the one call return the same for random tokens after random others."""
    shape, dtype = described.layer, described.dtype
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu").to(dtype)

    # small, so that the residual does not hide what the parts add to it
    x = random(2, tokens, described.hidden) * 0.05
    angle = random(1, tokens, shape.head_dim // 2).float().repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = (random(2, shape.kv_heads, past + tokens, shape.head_dim) for _ in range(2))
    cache, index = DynamicCache(), module.self_attn.layer_idx
    try:
        if past:
            cache.update(keys[:, :, :past].clone(), values[:, :, :past].clone(), index)
        expected = module.original.forward(module, x, past_key_values=cache, position_embeddings=(cos, sin), use_cache=True)
    except Exception:  # called otherwise than we think
        return False
    found = described.decode(x, cos, sin, keys, values, past)
    layer = cache.layers[index]
    if not isinstance(expected, Tensor) or layer.keys is None or layer.values is None or layer.keys.shape != keys.shape:
        return False
    return all(_is_near(*pair) for pair in ((found, expected), (keys, layer.keys), (values, layer.values)))


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """float (..., N) -> whether most rows differ by roundings only, and none by more than a code that was rounded otherwise."""
    error = (found.float() - expected.float()).abs().amax(-1) / expected.float().abs().max()
    return bool(error.median() <= _TOLERANCE[found.dtype] and error.max() <= _ONE_CODE)
