"""Small tokenizers of every kind, trained on a few lines. Nothing is downloaded."""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
LINES = [
    "The quick brown fox jumps over the lazy dog, and it wasn't the dog's fault; we'll see, they've said I'm DON'T WE'LL",
    "numbers 1 12 123 1234 12345 3.1415926 1,000,000 2024-10-01 0x7fff  ½ ² ٣٤ Ⅳ",
    "def foo(bar):\n    return bar[0] + 'text'  # comment\n\n\n\tif x == y:\r\n\t\tpass   \n",
    "naïve café Éclair über Ünïcode; Привет, мир! Γειά σου Κόσμε; 日本語のテキスト、中文。한국어 텍스트 हिन्दी ภาษาไทย العربية",
    "emoji 🙂👍🏽 👨‍👩‍👧 🇩🇪 and signs ©®™ €£¥ → ∞ ≠ … — – ‘quoted’ “text”",
    "====== ------ ...... !!!!!! ?????? ###### ****** ______ (((()))) {{{{}}}}",
    "aaaaaaaaaaaaaaaaaaaa bbbbbbbb abababababab abcabcabcabc                      spaces",
]
TEXTS = [
    *LINES,
    *(line[at : at + 17] for line in LINES for at in range(0, len(line), 5)),
    *(
        f"{left}{' ' * count}{right}"
        for count in (0, 1, 2, 3, 7, 20)
        for left in ("a", "1", ".", "\n")
        for right in ("b", "2", "!", "\n")
    ),
    *("-" * count for count in range(1, 20)),
    "",
    "▁",
    "a▁b",
    "\x00\x01\x7f",
    "e\u0301 n\u0303 \u200b\u00a0\u3000x",
    "\U0010ffff\ufffd",
    "<0x41>",
    "[PAD300]",
    "</s>a</s>b <s> c<s>",
    "x<tool>y <tool> z<tool><tool>",
]
LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def fast(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@lru_cache(maxsize=1)
def _bytes_model() -> dict[str, Any]:
    """Trained without cutting words, so that tokens go over every border a pre-tokenizer could set."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(LINES * 3, trainer)
    return json.loads(made.to_str())["model"]


def over_bytes(pre_tokenizer: Any = None, normalizer: Any = None, whole: bool = False) -> PreTrainedTokenizerFast:
    """BPE over bytes; GPT-2's pre-tokenizer by default."""
    model = _bytes_model()
    made = Tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], ignore_merges=whole))
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(made, bos_token="<s>", eos_token="</s>")


@lru_cache(maxsize=4)
def _fallback_model(cut: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    if cut:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=True)
    made.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=600, limit_alphabet=90, show_progress=False))
    model = json.loads(made.to_str())["model"]
    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    return {text: number for number, text in enumerate(texts)}, [tuple(pair) for pair in model["merges"]]


def with_fallback(normalizer: Any, pre_tokenizer: Any = None, cut: bool = False) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, as of Llama 2 and Gemma. cut: words are cut at spaces before they are merged."""
    vocabulary, merges = _fallback_model(cut)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.Sequence(LLAMA_DECODER)
    made.add_special_tokens(SPECIAL)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@lru_cache(maxsize=1)
def _unigram_pieces() -> list[tuple[str, float]]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=True)
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(LINES * 3, trainer)
    return [(text, score) for text, score in json.loads(made.to_str())["model"]["vocab"]]


def unigram(pre_tokenizer: Any, rounded: bool = True, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """rounded: scores are float32 numbers, as in SentencePiece's own files."""
    pieces = [(text, struct.unpack("f", struct.pack("f", score))[0] if rounded else score) for text, score in _unigram_pieces()]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.Metaspace("▁", "never")
    made.add_special_tokens(SPECIAL)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return fast(made, eos_token="</s>", unk_token="<unk>")
