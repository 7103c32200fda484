"""What mlx-lm's models read of a config.json, and what they compute whatever it says. Own; the facts are mlx-lm 0.32's.

transformers 5 keeps the rotary settings under `rope_parameters`, where most of these models do not look: they would take a
default, and compute other numbers. So they are written a second time, under the names they are looked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Architecture:
    """A model class of mlx-lm.

    Attributes:
        activation: of the feed-forward network, whatever the config says.
        biases: regular expression of the linear maps that may have a bias.
        has_window: it honours sliding windows.
        own_head_dim: it reads `head_dim`; else it is the hidden size over the number of heads.
        rounds_embedding: it rounds the factor of the embeddings to bfloat16.
        own_layers: its layers are of the layout "bitnet", and multiply by the scale.
    """

    activation: str = "silu"
    biases: str = r"(?!)"
    has_window: bool = False
    own_head_dim: bool = True
    rounds_embedding: bool = False
    own_layers: bool = False


# by model_type
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(biases=r"_proj$"),
    "mistral": Architecture(biases=r"_proj$"),
    "qwen2": Architecture(biases=r"[qkv]_proj$", own_head_dim=False),
    "qwen3": Architecture(),
    "phi3": Architecture(own_head_dim=False),
    "gemma3_text": Architecture(activation="gelu_pytorch_tanh", has_window=True, rounds_embedding=True),
    "bitnet": Architecture(activation="relu2", own_layers=True),
}


def architecture_of(model: PreTrainedModel) -> Architecture | None:
    """None for a model that mlx-lm does not have, or that nobody compared with it."""
    return ARCHITECTURES.get(model.config.model_type) if model.can_generate() else None


def model_problems(model: PreTrainedModel, architecture: Architecture) -> list[str]:
    """What mlx-lm's model of this name computes otherwise, whatever the files say."""
    config, kind, problems = model.config, model.config.model_type, []
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != architecture.activation:
        problems.append(f"mlx-lm's {kind} computes {architecture.activation}, and this model {activation}")
    named = dict(model.named_parameters())
    biases = [name[: -len(".bias")] for name in named if name.endswith(".bias")]
    wrong = [name for name in biases if not re.search(architecture.biases, name)]
    if wrong:
        problems.append(f"mlx-lm's {kind} has no bias in {wrong[0]}")
    usual = config.hidden_size // config.num_attention_heads
    if not architecture.own_head_dim and (getattr(config, "head_dim", None) or usual) != usual:
        problems.append(f"mlx-lm's {kind} has heads of {usual}, and this model heads of {config.head_dim}")
    if architecture.has_window and _pattern(config) is None:
        problems.append(
            f"mlx-lm's {kind} has full attention in every n-th layer, and this model in others: {config.layer_types}"
        )
    return problems


def window_note(config: PreTrainedConfig, architecture: Architecture) -> str | None:
    """What is said of a sliding window that mlx-lm's model does not have."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or architecture.has_window or (types is not None and SLIDING not in types):
        return None
    return f"mlx-lm attends to the whole text, where this model has a window of {window} tokens: beyond it they differ"


def reader_settings(config: PreTrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """What is added to config.json."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if architecture.has_window:
        sliding = rope.get(SLIDING) or {}
        rope = dict(rope.get(FULL) or {})
        extra = {"rope_local_base_freq": sliding.get("rope_theta"), "sliding_window_pattern": _pattern(config)}
    else:
        extra = {"partial_rotary_factor": rope.get("partial_rotary_factor")}
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type", "default")
    scaling = None if kind == "default" else {**rope, "type": kind}
    found = {"rope_theta": theta, **extra} | ({} if scaling is None else {"rope_scaling": scaling})
    return {name: value for name, value in found.items() if value is not None}


def _pattern(config: PreTrainedConfig) -> int | None:
    """n, where every n-th layer has full attention and no other; None where there is no such n."""
    types = getattr(config, "layer_types", None) or []
    if FULL not in types:
        return None
    every = types.index(FULL) + 1
    expected = [FULL if (i + 1) % every == 0 else SLIDING for i in range(len(types))]
    return every if types == expected else None
