"""Tokens of a model as keys of the file. Own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def add_tokenizer(writer: Any, tokenizer: Any, config: PreTrainedConfig) -> list[str]:
    """Writes the tokenizer into a `gguf.GGUFWriter`.

    Args:
        tokenizer: of transformers, or None for a file that takes and gives token ids only.

    Returns what there is to say about it.
    """
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    return ["no tokenizer: the file takes and gives token ids only"]
