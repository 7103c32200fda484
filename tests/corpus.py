"""A text, and a tokenizer for it that fits the vocabulary of the tiny models. Nothing is downloaded."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCABULARY

_WORDS = [first + second for first in "bdfglmnrst" for second in ("a", "e", "i", "o", "u", "ai", "ou", "en")]
assert len(_WORDS) <= VOCABULARY - 3


def text(words: int = 2000, seed: int = 0) -> str:
    """Words in which the next one depends on the last, so that there is something to learn; one token a word."""
    generator = random.Random(seed)
    current, found = 0, []
    for _ in range(words):
        current = (5 * current + generator.choice((1, 1, 1, 2, 7))) % len(_WORDS)
        found.append(_WORDS[current])
    return " ".join(found)


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: number for number, word in enumerate(_WORDS, start=3)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write(folder: Path, words: int = 2000, seed: int = 0, name: str = "text.txt") -> Path:
    """The text as a file."""
    path = folder / name
    path.write_text(text(words, seed), encoding="utf-8")
    return path
