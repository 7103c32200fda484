"""Where the layers of a transformer are, and where in a layer queries, keys and values are made. Own.

Distillation looks there. Found by structure and by the names that transformers' models use; what is not found is an error.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

_NAMES = {
    "query": ("q_proj", "query", "q", "q_lin", "query_proj", "wq"),
    "key": ("k_proj", "key", "k", "k_lin", "key_proj", "wk"),
    "value": ("v_proj", "value", "v", "v_lin", "value_proj", "wv"),
}
# one projection makes all three, one after the other
_THIRDS = ("c_attn", "Wqkv", "qkv", "in_proj")
_WITH_FEWER_KEYS = ("qkv_proj",)


class Projection(NamedTuple):
    """module: whose output holds the state. part: (which, heads of queries, heads of keys) of a fused one; else None."""

    module: nn.Module
    part: tuple[int, int, int] | None = None

    def take(self, output: Tensor) -> Tensor:
        """The state (..., F) in the module's output."""
        if self.part is None:
            return output
        which, queries, keys = self.part
        unit = output.shape[-1] // (queries + 2 * keys)
        start = (0, queries, queries + keys)[which] * unit
        return output[..., start : start + (queries if which == 0 else keys) * unit]


def transformer_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of the layers that follow each other; of an encoder-decoder the decoder's.

    Raises ValueError where there is no list of layers.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [(name, each) for name, each in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    decoders = [(name, each) for name, each in outer if "decoder" in name.split(".")]
    if not outer:
        raise ValueError(
            f"{type(model).__name__} holds no list of layers (nn.ModuleList), so its inner states cannot be distilled; leave "
            "`hidden` and `relations` out"
        )
    # the last of the longest
    name, found = max(reversed(decoders or outer), key=lambda pair: len(pair[1]))
    return [(f"{name}.{index}", layer) for index, layer in enumerate(found)]


def attention_projections(name: str, layer: nn.Module, heads: tuple[int, int]) -> dict[str, Projection]:
    """Where "query", "key" and "value" of the layer's first attention are made.

    Args:
        name: of the layer, for errors. heads: of queries and of keys, which tells the parts of a fused projection apart.

    Raises ValueError where none is found, or where a fused one mixes them.
    """
    for module in layer.modules():
        children = dict(module.named_children())
        found = {
            state: Projection(children[leaf]) for state, legal in _NAMES.items() for leaf in legal[::-1] if leaf in children
        }
        if len(found) == len(_NAMES):
            return found
        for leaf, child in children.items():
            if leaf in _THIRDS or leaf in _WITH_FEWER_KEYS:
                queries, keys = (1, 1) if leaf in _THIRDS else heads
                return {state: Projection(child, (which, queries, keys)) for which, state in enumerate(_NAMES)}
    raise ValueError(
        f"layer {name} ({type(layer).__name__}) has no projections of queries, keys and values that are known (such as q_proj, "
        "k_proj, v_proj), so relations cannot be distilled; leave `relations` out, or use `hidden`"
    )


def attention_heads(model: nn.Module) -> tuple[int, int]:
    """Number of attention heads of queries and of keys."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    queries = int(getattr(text, "num_attention_heads", None) or 1)
    return queries, int(getattr(text, "num_key_value_heads", None) or queries)
