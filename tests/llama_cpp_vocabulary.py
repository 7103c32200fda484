"""llama.cpp's tokenizer on a GGUF file that holds nothing else, through the C interface, without a context or weights."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp  # pyright: ignore[reportMissingImports]

_MOST_TOKENS = 1 << 16
_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: llama.cpp calls it later too


class LlamaVocabulary:
    """Encodes and decodes. Special tokens in a text are taken as such, as transformers does."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, f"llama.cpp does not load {path}"
        self.handle = llama_cpp.llama_model_get_vocab(self._model)
        self._tokens = (llama_cpp.llama_token * _MOST_TOKENS)()

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        count = llama_cpp.llama_tokenize(self.handle, data, len(data), self._tokens, _MOST_TOKENS, True, True)
        assert count >= 0
        return self._tokens[:count]

    def decode(self, tokens: list[int]) -> str:
        """The pieces one after the other, as in generation."""
        pieces, buffer = [], ctypes.create_string_buffer(1024)
        for token in tokens:
            size = llama_cpp.llama_token_to_piece(self.handle, token, buffer, 1024, 0, True)
            assert size >= 0
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode(errors="replace")

    def count(self) -> int:
        return llama_cpp.llama_vocab_n_tokens(self.handle)

    def ends(self) -> set[int]:
        """Tokens at which generation ends."""
        return {token for token in range(self.count()) if llama_cpp.llama_vocab_is_eog(self.handle, token)}

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)
