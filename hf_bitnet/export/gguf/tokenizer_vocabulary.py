"""Texts and types of all tokens, one for each row of the embedding. Own; the types are those of gguf.TokenType.

llama.cpp takes the number of tokens for the number of rows, so rows without a token get an unused one, `[PAD{id}]`. Tokens that
are cut out of a text before anything else are CONTROL where they are special and USER_DEFINED otherwise.

llama.cpp has no flags of single tokens (`lstrip`, `rstrip`, `single_word`, `normalized`), and looks for the longest token first
where transformers takes the leftmost: notes name the tokens for which that matters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedConfig

from .tokenizer_spaces import SPACE, parts_of, unicode_note
from .tokenizer_special import TAKEN_BY_NAME

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_NOT_IN_UTF8 = frozenset(map(chr, (0xC0, 0xC1, *range(0xF5, 0x100))))  # these bytes stand for themselves there


class Vocabulary(NamedTuple):
    """Attributes:
    tokens, types: one a row. apart: texts of the tokens that are cut out of a text first.
    notes: for which of those llama.cpp differs.
    """

    tokens: list[str]
    types: list[int]
    apart: frozenset[str]
    notes: list[str]


def byte_tokens() -> list[str]:
    """The tokens of byte fallback, in the order of the bytes."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def missing_bytes(vocabulary: Collection[str]) -> int:
    """Number of bytes that UTF-8 uses and a vocabulary over bytes has no token for."""
    return len(set(ByteLevel.alphabet()) - _NOT_IN_UTF8 - set(vocabulary))


def unknown_token(tokenizer: Any, model: Mapping[str, Any]) -> int | None:
    """Id of the token for what has no token."""
    unknown = model.get("unk_id")
    return getattr(tokenizer, "unk_token_id", None) if unknown is None else unknown


def vocabulary_of(tokenizer: Any, spec: Mapping[str, Any], config: PreTrainedConfig) -> Vocabulary:
    """All tokens of the parsed tokenizer.json `spec`.

    Raises:
        ValueError: a token has no row in the embedding, or two have the same text.
    """
    rows, added = config.get_text_config().vocab_size, spec["added_tokens"]
    texts, types = _texts_and_types(spec["model"], added)
    unknown = unknown_token(tokenizer, spec["model"])
    if unknown in texts:
        types[unknown] = UNKNOWN
    last = max(texts, default=0)
    if last >= rows:
        raise ValueError(
            f"GGUF: token {last} ({texts[last]!r}) has no row in the embedding, which has {rows}; call "
            "model.resize_token_embeddings(len(tokenizer)) before quantizing, or pass the model's own tokenizer"
        )
    names = set(texts.values())
    tokens = [texts[row] if row in texts else _free(f"[PAD{row}]", names) for row in range(rows)]
    if len(set(tokens)) < rows:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise ValueError(f"GGUF: two tokens have the text {twice!r}; llama.cpp tells tokens by their texts: rename one of them")
    apart = frozenset(texts[number] for number, kind in types.items() if kind in (UNKNOWN, CONTROL, USER_DEFINED))
    taken = [
        texts[number] for number, kind in types.items() if kind in (NORMAL, USER_DEFINED) and texts[number] in TAKEN_BY_NAME
    ]
    notes = _notes(added, spec["normalizer"])
    if taken:
        notes.append(f"llama.cpp takes {_few(taken)} for special by name: they may end a text, and are not printed in it")
    return Vocabulary(tokens, [types.get(row, UNUSED) for row in range(rows)], apart, notes)


def _texts_and_types(model: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> tuple[dict[int, str], dict[int, int]]:
    if model["type"] == "Unigram":
        texts = {number: text for number, (text, _) in enumerate(model["vocab"])}
    else:
        texts = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    if model.get("byte_fallback"):
        bytes_ = set(byte_tokens())
        types |= {number: BYTE for number, text in texts.items() if text in bytes_}
    over_bytes = model["type"] == "BPE" and not model["byte_fallback"]
    for token in added:
        number, text = token["id"], token["content"]
        # SentencePiece's tokens of several spaces: cut out they would be printed as ▁, and the merges make them anyway
        made = not over_bytes and SPACE in text and not token["special"] and texts.get(number) == text
        texts[number] = text
        types[number] = NORMAL if made else CONTROL if token["special"] else USER_DEFINED
    return texts, types


def _free(text: str, taken: Collection[str]) -> str:
    while text in taken:
        text += "_"
    return text


def _notes(added: Sequence[Mapping[str, Any]], normalizer: Mapping[str, Any] | None) -> list[str]:
    changed = any(unicode_note(step) is None for step in parts_of(normalizer))
    named = {
        "takes the spaces beside {} into the token, llama.cpp does not": [t for t in added if t["lstrip"] or t["rstrip"]],
        "finds {} only as a whole word, llama.cpp everywhere": [t for t in added if t["single_word"]],
        "looks for {} after its normalizer, llama.cpp before": [t for t in added if t["normalized"] and changed],
        "takes the leftmost of {}, which overlap, llama.cpp the longest": _overlapping(added),
    }
    texts = {what: [token["content"] for token in tokens] for what, tokens in named.items() if tokens}
    return [f"the tokenizer {what.format(_few(found))}" for what, found in texts.items()]


def _few(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:4])) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def _overlapping(added: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Tokens whose end is the beginning of one of them. In runs of one character both rules cut the same pieces."""
    words = [token for token in added if len(set(token["content"])) > 1]
    beginnings = {token["content"][:length] for token in words for length in range(1, len(token["content"]))}
    return [t for t in words if any(t["content"][at:] in beginnings for at in range(1, len(t["content"])))]
