"""Quantized checkpoints as other programs write them, made here from the descriptions of their formats.

Bytes are put together weight by weight or by the package gguf, not by hf_bitnet.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_bitnet.surgery import quantized_layers

from .tiny import VOCABULARY, tiny

F32, F16, Q4_0, Q8_0, Q2_K, TQ1_0, TQ2_0, I2_S, Q1_0, Q2_0 = 0, 1, 2, 8, 10, 34, 35, 36, 41, 42
# of a tensor: shape (rows first), type, bytes
Stored = tuple[tuple[int, ...], int, bytes]
# sizes that every block divides, and no two alike
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SCALE = 0.03125 * 1.25  # of float16

# ---- models ----


def wide(name: str, **overrides: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model whose layers are wide enough for blocks of 256, and a batch."""
    sizes = WIDE | ({} if name == "bitnet" else {"head_dim": 64})
    if name in ("qwen2", "phi3"):
        torch.manual_seed(0)
        shared = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64, **WIDE, **overrides}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if name == "qwen2":
            model: Any = tf.Qwen2ForCausalLM(tf.Qwen2Config(**shared, **tokens))
        else:
            model = tf.Phi3ForCausalLM(tf.Phi3Config(**shared, **tokens))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval(), tiny("llama")[1]
    return tiny(name, **(sizes | overrides))


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps inside the transformer layers."""
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and ".layers." in name}


@torch.no_grad()
def onto_grid(model: nn.Module, levels: list[float], *, scale: float = SCALE, groups: int | None = None, seed: int = 0) -> None:
    """Gives the projections random levels; one scale for a tensor, or another one for each `groups` inputs of a row."""
    generator = torch.Generator().manual_seed(seed)
    for layer in projections(model).values():
        rows, columns = layer.weight.shape
        codes = torch.tensor(levels)[torch.randint(len(levels), (rows, columns), generator=generator)]
        if groups is None:
            layer.weight.copy_(codes * scale)
        else:
            factor = torch.randint(1, 9, (rows, columns // groups, 1), generator=generator) * scale / 8
            layer.weight.copy_((codes.unflatten(1, (-1, groups)) * factor).flatten(1))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a quantized model's layers."""
    return {name: layer.quantized_weight().dequantize() for name, layer in quantized_layers(model)}


def assert_values(imported: nn.Module, model: nn.Module) -> None:
    """The projections of the plain model, and no others, are quantized to exactly their values."""
    expected = {name: layer.weight for name, layer in projections(model).items()}
    found = values_of(imported)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---- GGUF ----


def fields(codes: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Codes (B, n) in fields of bytes (B, n bits / 8), from the lowest on; those of one byte are `run` apart."""
    parts = codes.astype(np.uint8).reshape(len(codes), -1, 8 // bits, run)
    shifted = [parts[:, :, field] << (bits * field) for field in range(8 // bits)]
    return np.bitwise_or.reduce(shifted).reshape(len(codes), -1)


def blocks(weight: np.ndarray, size: int, zero: int, bits: int, run: int) -> bytes:
    """fp16 scale and codes of every block. The scale is the smallest magnitude, of which the test made all others."""
    rows = weight.reshape(-1, size)
    scale = np.where(rows == 0, np.inf, np.abs(rows)).min(axis=1, keepdims=True)
    levels = np.round(rows / scale)
    assert np.array_equal((levels * scale).astype(np.float32), rows) and np.array_equal(np.float16(scale), scale)
    codes = (levels + 1) / 2 if bits == 1 else levels + zero
    return np.concatenate([np.float16(scale).view(np.uint8), fields(codes, bits, run)], axis=1).tobytes()


def i2_s(weight: np.ndarray) -> bytes:
    """128 weights in 32 bytes, the first in the highest bits; the scale behind."""
    scale = np.abs(weight).max()
    codes = (np.round(weight / scale) + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    return packed.tobytes() + np.float32(scale).tobytes() + bytes(28)


# type -> size of a block, code of zero, bits, distance of the codes that share a byte
_BLOCKS = {Q2_0: (64, 1, 2, 1), Q1_0: (128, 0, 1, 1), Q4_0: (32, 8, 4, 16)}


def encoded(weight: Tensor, kind: int) -> bytes:
    """The bytes of a tensor."""
    array = np.ascontiguousarray(weight.detach().float().numpy())
    if kind == F32:
        return array.tobytes()
    if kind == F16:
        return array.astype(np.float16).tobytes()
    if kind == I2_S:
        return i2_s(array)
    if kind in _BLOCKS:
        return blocks(array, *_BLOCKS[kind])
    import gguf

    return gguf.quants.quantize(array, gguf.GGMLQuantizationType(kind)).tobytes()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        texts = b"".join(struct.pack("<Q", len(each)) + each.encode() for each in value)
        return struct.pack("<IIQ", 9, 8, len(value)) + texts
    return struct.pack("<II", 4, value)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Path:
    """A GGUF file of version 3. `tensors`: name -> shape (rows first), type, bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += struct.pack("<Q", len(key)) + key.encode() + _value(value)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str) -> str:
    """What llama.cpp calls a parameter."""
    module, _, leaf = name.rpartition(".")
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if module in outer:
        return f"{outer[module]}.{leaf}"
    _, _, number, inner = module.split(".", 3)
    table = _NAMES | (_GEMMA if architecture.startswith("gemma") else {})
    return f"blk.{number}.{table[inner]}.{leaf}"


def _as_converted(name: str, tensor: Tensor, model: Any, architecture: str) -> Tensor:
    """What llama.cpp's converters do to the values."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if f".{part}." in name), None)
    if architecture == "llama" and count is not None:
        return tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1).transpose(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and "norm" in name:
        return tensor + 1
    return tensor


def described(model: Any, architecture: str) -> dict[str, Any]:
    """The metadata of a file without a tokenizer."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": float((config.rope_parameters.get("full_attention") or config.rope_parameters)["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    tokens = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    if getattr(config, "sliding_window", None):
        values["attention.sliding_window"] = config.sliding_window
    named = {f"{architecture}.{key}": value for key, value in values.items()}
    ids = {f"tokenizer.ggml.{key}_token_id": value for key, value in tokens.items()}
    return {"general.architecture": architecture, **named, **ids}


def model_to_gguf(
    path: Path,
    model: Any,
    architecture: str,
    kind: int,
    *,
    table: int = F32,
    changes: Mapping[str, Stored] | None = None,
) -> Path:
    """A file of the model with its projections in one type, and its tables in another. `changes`: tensors to replace."""
    inner, tensors = projections(model), {}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        used = kind if name.removesuffix(".weight") in inner else table if tensor.dim() == 2 else F32
        data = encoded(_as_converted(name, tensor, model, architecture), used)
        tensors[gguf_name(name, architecture)] = (tuple(tensor.shape), used, data)
    return write_gguf(path, described(model, architecture), tensors | dict(changes or {}))


# ---- learned scales ----


def paretoq(
    model: Any, folder: Path, w_bits: float, *, scale: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Saves float weights with `weight_clip_val`, and returns what ParetoQ's layers multiply with, by the paper's equations.

    Value by value in Python: 1 bit and LSQ round(w / a) clipped to the range; SEQ a / k (floor(k clip(w / a)) + 1/2) for 2 bits
    (k = 2), a round(1.5 clip(w / a)) / 1.5 for 1.58.
    """
    model.to(dtype)
    model.save_pretrained(folder)
    state, values = dict(model.state_dict()), {}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, layer in projections(model).items():
        a = scale(layer.weight.detach().float()).to(dtype).reshape(-1, 1)
        state[f"{name}.weight_clip_val"] = a
        ratio = (layer.weight.detach() / a).float().double()
        if w_bits == 1:
            level = ratio.sign()
        elif w_bits == 2:
            doubled = (ratio.clamp(-0.99, 0.99).to(dtype) * 2 - 0.5).double()
            level = (doubled.round() + 0.5) / 2
        elif w_bits == 1.58:
            level = ((ratio.clamp(-0.99, 0.99).to(dtype) * 1.5).double().round() / 1.5).to(dtype).double()
        else:
            level = ratio.round().clamp(-(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1)
        values[name] = (level * a.double()).to(dtype)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"w_bits": 0 if w_bits == 1.58 else w_bits}))
    return values
