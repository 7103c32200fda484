"""llama.cpp as a peer of `generate.py`: a file of random TQ2_0 weights, and its own benchmark. Own.

The file needs the package gguf, which is imported only then; the program is the user's own build.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

_SCALE = 0.02


def build_gguf(path: Path, shape: dict[str, Any]) -> None:
    """Writes the same shape with random TQ2_0 weights, unless the file is there. Needs the package gguf."""
    import gguf  # pyright: ignore[reportMissingImports]

    if path.is_file():
        return
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    kv = hidden // heads * groups
    temporary = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(temporary), "llama", use_temp_file=True)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)
    for name, (rows, columns) in _gguf_tensors(layers, hidden, inner, kv, shape["vocab_size"]).items():
        if rows == 0:
            writer.add_tensor(name, np.ones(columns, dtype=np.float32))
        elif name.startswith("blk"):
            writer.add_tensor(name, _tq2_0(rows, columns, generator), raw_dtype=gguf.GGMLQuantizationType.TQ2_0)
        else:
            writer.add_tensor(name, _q8_0(rows, columns, generator), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def _gguf_tensors(layers: int, hidden: int, inner: int, kv: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs); 0 outputs: a norm."""
    tensors = {"token_embd": (vocabulary, hidden), "output_norm": (0, hidden), "output": (vocabulary, hidden)}
    for i in range(layers):
        shapes = {"attn_norm": (0, hidden), "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
        shapes |= {"attn_output": (hidden, hidden), "ffn_norm": (0, hidden)}
        shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        tensors |= {f"blk.{i}.{name}": shape for name, shape in shapes.items()}
    return {f"{name}.weight": shape for name, shape in tensors.items()}


def _tq2_0(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 (rows, bytes): blocks of 256 weights, 64 bytes of two-bit levels and a float16 scale."""
    blocks = np.empty((rows * columns // 256, 66), dtype=np.uint8)
    levels = generator.integers(0, 3, (blocks.shape[0], 64, 4), dtype=np.uint8)
    blocks[:, :64] = levels[..., 0] | levels[..., 1] << 2 | levels[..., 2] << 4 | levels[..., 3] << 6
    blocks[:, 64:] = np.array([_SCALE], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _q8_0(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 (rows, bytes): blocks of 32 weights, a float16 scale and 32 bytes."""
    blocks = generator.integers(0, 256, (rows * columns // 32, 34), dtype=np.uint8)
    blocks[:, :2] = np.array([_SCALE / 64], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def run_llama_bench(folder: Path, model: Path, prompt: int, tokens: int, threads: int) -> dict[str, Any]:
    """Tokens per second of llama.cpp's own benchmark."""
    command = [str(folder / "llama-bench"), "-m", str(model), "-p", str(prompt), "-n", str(tokens), "-t", str(threads)]
    done = subprocess.run([*command, "-r", "1", "-o", "json"], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    return {
        "prefill_tokens_per_s": next(row["avg_ts"] for row in rows if row["n_prompt"]),
        "decode_tokens_per_s": next(row["avg_ts"] for row in rows if row["n_gen"]),
    }
