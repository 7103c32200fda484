"""Tiny models whose rows fill the blocks of GGUF kinds, and decoders written from the layouts alone, one weight at a time."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

import hf_bitnet as hb
from tests.tiny import VOCABULARY, _randomize, tiny

_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
_MORE = {
    "llama": {"head_dim": 64},
    "mistral": {"head_dim": 64},
    "qwen3": {"head_dim": 32},
    "gemma3": {"head_dim": 64},
    "bitnet": {"hidden_act": "silu", "tie_word_embeddings": True},
}
_OTHERS: dict[str, tuple[type[tf.PreTrainedConfig], type[tf.PreTrainedModel]]] = {
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM),
}
FAMILIES = (*_MORE, *_OTHERS)


def made(family: str, quantize: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """A model of two layers, quantized by these fields (None: ternary, one scale a tensor)."""
    if family in _OTHERS:
        config, kind = _OTHERS[family]
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        sizes = {**_SIZES, **ids, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = kind(config(**{**sizes, **overrides})).float().eval()
            _randomize(model)
    else:
        model = tiny(family, **{**_SIZES, **_MORE[family], **overrides})[0]
    return hb.quantize_model(model, hb.BitNetQuantizationConfig(**(quantize or {"weight": "ternary"})))


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def q2_0(row: bytes) -> list[float]:
    found = []
    for start in range(0, len(row), 18):
        d = half(row[start : start + 2])
        found += [((row[start + 2 + j // 4] >> 2 * (j % 4) & 3) - 1) * d for j in range(64)]
    return found


def q1_0(row: bytes) -> list[float]:
    found = []
    for start in range(0, len(row), 18):
        d = half(row[start : start + 2])
        found += [d if row[start + 2 + j // 8] >> j % 8 & 1 else -d for j in range(128)]
    return found


def i2_s(row: bytes) -> list[float]:
    """Levels; the scale is behind the last row."""
    return [float((row[start + j % 32] >> 6 - 2 * (j // 32) & 3) - 1) for start in range(0, len(row), 32) for j in range(128)]


def without_rotation_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k of a LLaMA as transformers has them, from those of a file: neighbours become halves again."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """float32 tensors of a file that the package gguf reads without help."""
    import gguf

    found = {}
    for each in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(np.array(each.data), each.tensor_type)
        found[each.name] = torch.from_numpy(values.astype(np.float32))
    return found


def fields(path: Path) -> dict[str, Any]:
    """Keys of a file."""
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
