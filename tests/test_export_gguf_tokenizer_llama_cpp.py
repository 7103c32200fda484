"""llama.cpp makes the same tokens of the same texts as the tokenizers that were written for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from tests.tokenizers_made import SPECIAL, TEXTS, over_bytes, unigram, with_fallback

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'hf_bitnet[gguf]'")

from hf_bitnet.gguf_pre_tokenizers import PRE_TOKENIZERS  # noqa: E402
from tests.test_export_gguf_tokenizer import _GEMMA, _LLAMA2, pre_tokenizer_of  # noqa: E402


def opened(tokenizer: Any, folder: Path) -> tuple[Any, list[str]]:
    """The tokenizer in llama.cpp, and the notes."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    from tests.gguf_vocabulary import write_vocabulary
    from tests.llama_cpp_vocabulary import LlamaVocabulary

    notes = write_vocabulary(tokenizer, folder / "v.gguf", len(tokenizer) + 5)
    return LlamaVocabulary(folder / "v.gguf"), notes


EQUAL: dict[str, Callable[[], Any]] = {
    "gpt-2": over_bytes,
    "fallback, prepended space": lambda: with_fallback(_LLAMA2),
    "fallback, no space": lambda: with_fallback(_GEMMA),
    "unigram": lambda: unigram(pre_tokenizers.Metaspace("▁", "never")),
} | {
    f"{names.merging}{names.whole or ''}": lambda steps=steps, names=names: over_bytes(
        pre_tokenizer_of(steps), whole=names.merging is None
    )
    for steps, names in PRE_TOKENIZERS.items()
    if not names.differs
}


@pytest.mark.parametrize("name", EQUAL)
def test_same_tokens_as_llama_cpp(tmp_path: Path, name: str) -> None:
    """Every text gives the same tokens, and the tokens the same text."""
    tokenizer = EQUAL[name]()
    llama, notes = opened(tokenizer, tmp_path)
    backend = tokenizer.backend_tokenizer
    assert notes == []
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert llama.encode(text) == tokens, text
        assert llama.decode(tokens).removeprefix("<s>").lstrip(" ") == backend.decode(tokens, False).removeprefix("<s>").lstrip(
            " "
        ), text
    assert llama.ends() == {2}
    llama.close()


def test_notes_are_true(tmp_path: Path) -> None:
    """Texts that a note is about come out as it says, all others as from the tokenizer."""
    tokenizer = with_fallback(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    llama, notes = opened(tokenizer, tmp_path)
    assert len(notes) == 2
    for text in TEXTS:
        if not any(part in text for part in [*SPECIAL, "<tool>"]) and text[:1] not in (" ", "▁"):
            assert llama.encode(text) == tokenizer.encode(text), text
    assert llama.encode(" b") == tokenizer.encode("  b") != tokenizer.encode(" b")
    inside = tokenizer.convert_ids_to_tokens(llama.encode("a</s>b"))
    assert inside[-1] == "▁b" or inside[-2:] == ["▁", "b"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a</s>b"))[-2:] == ["</s>", "b"]
    llama.close()


def test_runs_of_spaces_that_count_as_one(tmp_path: Path) -> None:
    """Unigram as of T5: WhitespaceSplit in front."""
    tokenizer = unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]))
    llama, notes = opened(tokenizer, tmp_path)
    assert len(notes) == 1 and "tabs and line breaks" in notes[0]
    for text in (" a  b ", *TEXTS):
        if not any(character.isspace() and character != " " for character in text) and "▁" not in text:
            assert llama.encode(text) == tokenizer.encode(text), text
    llama.close()


@pytest.mark.parametrize("kind", [LlamaTokenizer, GemmaTokenizer])
def test_classes_of_transformers(tmp_path: Path, kind: Any) -> None:
    """With the decoders, special tokens and pre-tokenizers that these classes set up themselves."""
    spec = json.loads(with_fallback(_GEMMA).backend_tokenizer.to_str())["model"]
    names = {} if kind is LlamaTokenizer else {"<s>": "<bos>", "</s>": "<eos>"}
    texts = {names.get(text, text): number for text, number in spec["vocab"].items()}
    tokenizer = kind(vocab=texts, merges=[tuple(pair) for pair in spec["merges"]])
    llama, notes = opened(tokenizer, tmp_path)
    assert len(notes) == (2 if kind is LlamaTokenizer else 0)
    for text in TEXTS:
        if kind is GemmaTokenizer or ("</s>" not in text and text[:1] not in (" ", "▁")):
            assert llama.encode(text) == tokenizer.encode(text), text
    llama.close()


def test_no_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    from tests.gguf_vocabulary import stored, write_vocabulary
    from tests.llama_cpp_vocabulary import LlamaVocabulary

    notes = write_vocabulary(None, tmp_path / "v.gguf", 77)
    assert notes == ["there is no tokenizer in the file: the model takes and gives token ids"]
    assert stored(tmp_path / "v.gguf") == {"model": "no_vocab"}
    llama = LlamaVocabulary(tmp_path / "v.gguf")
    assert llama.count() == 77
    llama.close()


def test_tokenizer_of_a_trained_model(tmp_path: Path, shared_dir: Path) -> None:
    """Every line of a novel."""
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "novels-llama")
    llama, notes = opened(tokenizer, tmp_path)
    lines = (shared_dir / "data" / "novels" / "valid.txt").read_text(encoding="utf-8").split("\n")
    assert notes == [] and len(lines) > 2000
    encoded = tokenizer(lines)["input_ids"]
    assert [llama.encode(line) for line in lines] == encoded
    assert [llama.decode(tokens) for tokens in encoded[:500]] == lines[:500]
    llama.close()
