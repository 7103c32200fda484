"""Sizes, positions and windows of a model as keys of the file. Own; the keys are llama.cpp's.

Angles of positions are asked of transformers' own functions, not derived again: llama3's become a tensor of divisors, as the
kept converter of llama.cpp writes them, and the factor of attention is what theirs differs by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .architectures import Architecture, head_size, heads_of_keys

_FULL, _SLIDING = "full_attention", "sliding_attention"
# llama.cpp scales attention of Gemma 3 with this many layers by hidden size / heads (its 27B), of others by the head's size
_GEMMA_27B_LAYERS = 62
# where no pattern is given: every sixth layer sees everything
_GEMMA_PATTERN = 6
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass
class Metadata:
    """Keys of the file without the architecture's name in front, and tensors that the model has no parameter for.

    Attributes:
        integers, floats, words: scalars. flags: arrays of booleans. notes: what a reader does otherwise.
    """

    integers: dict[str, int] = field(default_factory=dict)
    floats: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    flags: dict[str, list[bool]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Into a `gguf.GGUFWriter`."""
        for key, number in self.integers.items():
            writer.add_uint32(f"{writer.arch}.{key}", number)
        for key, value in self.floats.items():
            writer.add_float32(f"{writer.arch}.{key}", value)
        for key, word in self.words.items():
            writer.add_string(f"{writer.arch}.{key}", word)
        for key, flags in self.flags.items():
            writer.add_array(f"{writer.arch}.{key}", flags)


def problems(config: Any, architecture: Architecture) -> list[str]:
    """What of the positions the architecture does not know."""
    where = f"{architecture.program}'s architecture {architecture.name!r}"
    found = []
    for layers, rope in _ropes(config).items():
        kind = rope.get("rope_type", "default")
        if kind not in architecture.ropes or (layers == _SLIDING and kind != "default"):
            found.append(f"rope_type={kind!r}, {where} knows {', '.join(architecture.ropes)}")
        elif rope.get("partial_rotary_factor", 1.0) != 1.0 and "longrope" not in architecture.ropes:
            found.append(f"positions rotate a part of each head only, {where} rotates all of it")
        elif kind == "yarn" and any(rope.get(key) not in (None, usual) for key, usual in _YARN.items()):
            found.append(f"rope_type='yarn' with other values than {_YARN}, which are fixed in {where}")
    return found


def query_factor(config: Any) -> float:
    """What queries are multiplied with, because the architecture of Gemma 3 scales attention by itself."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    large = config.num_hidden_layers == _GEMMA_27B_LAYERS
    known = config.hidden_size // config.num_attention_heads if large else head_size(config)
    return 1.0 if scalar is None else math.sqrt(known / scalar)


def metadata_of(config: Any, architecture: Architecture) -> Metadata:
    """Of a config that has no `problems`."""
    size, heads = head_size(config), config.num_attention_heads
    made = Metadata(
        integers={
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": heads,
            "attention.head_count_kv": heads_of_keys(config),
            "attention.key_length": size,
            "attention.value_length": size,
        },
        floats={"attention.layer_norm_rms_epsilon": config.rms_norm_eps},
    )
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        made.floats["final_logit_softcapping"] = float(cap)
    _add_windows(made, config, architecture)
    ropes = _ropes(config)
    rope = ropes.get(_FULL, ropes.get("", {}))
    made.floats["rope.freq_base"] = float(rope["rope_theta"])
    made.integers["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
    if _SLIDING in ropes:
        made.floats["rope.freq_base_swa"] = float(ropes[_SLIDING]["rope_theta"])
    _add_scaling(made, config, rope)
    return made


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Parameters of positions for each kind of layers; under "" where there is one kind."""
    found = config.rope_parameters
    return found if _FULL in found or _SLIDING in found else {"": found}


def _add_windows(made: Metadata, config: Any, architecture: Architecture) -> None:
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (kinds is not None and _SLIDING not in kinds):
        return
    if not architecture.windows:
        # within one window both see the same tokens
        if window < config.max_position_embeddings:
            made.integers["context_length"] = window
            made.notes.append(f"context of {window} tokens, because {architecture.program} knows no attention windows here")
        return
    made.integers["attention.sliding_window"] = window
    flags = [kind == _SLIDING for kind in kinds or ()]
    if flags != [bool((index + 1) % _GEMMA_PATTERN) for index in range(len(flags))]:
        made.flags["attention.sliding_window_pattern"] = flags


def _add_scaling(made: Metadata, config: Any, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    layers = _FULL if _FULL in config.rope_parameters else None
    scaled, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layers)
    if kind == "llama3":
        size = head_size(config)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
        made.tensors["rope_freqs.weight"] = plain / scaled
        return
    if kind == "longrope":
        original = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        made.integers["rope.scaling.original_context_length"] = original
        made.floats["rope.scaling.attn_factor"] = float(attention)
        for which in ("long", "short"):
            made.tensors[f"rope_factors_{which}.weight"] = torch.tensor(
                rope[f"{which}_factor"], dtype=torch.float32, device="cpu"
            )
        made.notes.append(
            f"llama.cpp takes the angles for long texts where its context is longer than {original}, transformers where the "
            "text is"
        )
        return
    factor = float(rope.get("factor") or config.max_position_embeddings / rope["original_max_position_embeddings"])
    made.words["rope.scaling.type"] = kind
    made.floats["rope.scaling.factor"] = factor
    if kind == "yarn":
        made.integers["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        usual = 0.1 * math.log(factor) + 1.0
        if not math.isclose(attention, usual, rel_tol=1e-6):
            made.floats["rope.scaling.attn_factor"] = attention / usual
