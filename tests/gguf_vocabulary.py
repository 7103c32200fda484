"""GGUF files that hold a tokenizer and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
from transformers import LlamaConfig

from hf_bitnet.export.gguf.tokenizer import add_tokenizer


def write_vocabulary(tokenizer: Any, path: Path, rows: int, **config: Any) -> list[str]:
    """A file with the tokenizer only; the notes of `add_tokenizer`."""
    writer = gguf.GGUFWriter(path, "llama")
    fields = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | config
    notes = add_tokenizer(writer, tokenizer, LlamaConfig(vocab_size=rows, **fields))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def stored(path: Path) -> dict[str, Any]:
    """The `tokenizer.ggml.*` values of a file by their last names."""
    fields = gguf.GGUFReader(path).fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items() if "tokenizer" in name}
