"""The tokenizer in a GGUF file, as one of transformers that makes the tokens llama.cpp makes. Own; the rules are llama.cpp's.

transformers has a reader too. It splits texts as GPT-2 does where it does not know the name of a pre-tokenizer, merges words
that llama.cpp takes whole, and puts the first space of a SentencePiece vocabulary where the class of a tokenizer has it
instead of where the file says (measured on one tokenizer of each kind: other tokens for 5 of 12). Here a name that is not
known is refused, because another cut is another text to the model.

Two kinds are read: BPE over bytes ("gpt2") and SentencePiece's BPE with byte fallback ("llama"). Where llama.cpp's own
pre-tokenizer is known to cut otherwise than the tokenizer it is named for (`Pre.differs`), the tokenizer's cut is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from ..gguf_file import GGUFFile, Length
from ..gguf_pre_tokenizers import known_names, named

_KEYS = "tokenizer.ggml."
_SPACE = "▁"
# of gguf.TokenType: what is cut out of a text before anything else, and rows that no text has
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_APART = (_UNKNOWN, _CONTROL, _USER_DEFINED)
# name in transformers -> key
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_TEMPLATE = "tokenizer.chat_template"
# texts of tokens at which llama.cpp ends, whatever the file says of them
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>"),
    *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>"),
)
# a score that stands for no merge at all, in files of this library; and "no token" as an unsigned number
_NO_MERGE, _NO_TOKEN = -1e9, 2**32 - 1
# llama.cpp takes spaces behind special tokens into them where a model's name has one of these parts, but for some tokens
_RIGHT_STRIPPED, _NOT_STRIPPED = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")


class _Made(NamedTuple):
    """backend: of the package tokenizers. begins: whether a text begins with bos where the file does not say."""

    backend: Tokenizer
    begins: bool


class _Words(NamedTuple):
    """vocabulary: text -> id. kinds: text -> gguf's kind of token. special: name in transformers -> id."""

    vocabulary: dict[str, int]
    kinds: dict[str, int]
    special: dict[str, int]


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a file.

    Raises ValueError where there is none, or one that would be another here than in llama.cpp, or it contradicts itself.
    """
    file = GGUFFile(path)
    kind = file.metadata.get(f"{_KEYS}model")
    if kind in (None, "no_vocab", "none"):
        raise _refused(file, "holds no tokenizer")
    make = _KINDS.get(str(kind))
    if make is None:
        raise _refused(file, f"holds a tokenizer of the kind {kind!r}, read are {', '.join(map(repr, _KINDS))}")
    tokens, types = file.values(f"{_KEYS}tokens"), file.values(f"{_KEYS}token_type")
    if not tokens or not all(isinstance(token, str) for token in tokens) or len(types) not in (0, len(tokens)):
        raise _refused(file, f"holds {len(tokens)} tokens and {len(types)} types of them")
    types, special = types or [0] * len(tokens), _special(file, tokens, str(kind))
    # rows of the embedding that stand behind the last token
    while types and types[-1] == _UNUSED and len(types) - 1 not in special.values():
        types.pop()
    vocabulary = dict(zip(tokens, range(len(types)), strict=False))
    if len(vocabulary) != len(types):
        raise _refused(file, "holds two tokens with the same text")
    words = _Words(vocabulary, dict(zip(tokens, types, strict=False)), special)
    made = make(file, words)
    _add_apart(file, made.backend, words)
    return _finished(file, made, {name: (tokens[number], number) for name, number in special.items()})


def ends(file: GGUFFile) -> list[int]:
    """Ids of the tokens that end a text, a turn or a message: those that the file names, then those llama.cpp knows by text."""
    tokens = file.values(f"{_KEYS}tokens")
    named_ones = [_number(file, name) for name in ("eos", "eot", "eom")]
    known = [number for number, text in enumerate(tokens) if text in _ENDS]
    return list(dict.fromkeys(number for number in (*named_ones, *known) if number is not None and number < len(tokens)))


def _special(file: GGUFFile, tokens: list[str], kind: str) -> dict[str, int]:
    """Name in transformers -> id. Raises ValueError where the file names a token that there is not."""
    found = {}
    for name, key in _SPECIAL.items():
        number = _number(file, key)
        if number is not None and number >= len(tokens):
            raise _refused(file, f"names the token {number} as {name}, of {len(tokens)}")
        if f"{_KEYS}{key}_token_id" not in file.metadata:
            number = _DEFAULTS.get(kind, {}).get(name)
        if number is not None and number < len(tokens):
            found[name] = number
    return found


def _over_bytes(file: GGUFFile, words: _Words) -> _Made:
    vocabulary = words.vocabulary
    name = file.metadata.get(f"{_KEYS}pre")
    cut = named(str(name))
    if cut is None:
        raise _refused(file, f"cuts texts by the pre-tokenizer {name!r}, known are {', '.join(known_names())}")
    merges = []
    for merge in file.values(f"{_KEYS}merges"):
        left, _, right = str(merge).partition(" ")  # a token holds no space: it is written as another character
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise _refused(file, f"merges {merge!r}, which makes no token of two of its tokens")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.whole))
    backend.pre_tokenizer = cut.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return _Made(backend, cut.begins)


def _sentencepiece(file: GGUFFile, words: _Words) -> _Made:
    vocabulary, scores = words.vocabulary, file.values(f"{_KEYS}scores")
    if len(scores) < len(vocabulary):
        raise _refused(file, f"holds {len(vocabulary)} tokens and {len(scores)} scores of them")
    score_of = dict(zip(vocabulary, scores, strict=False))
    # what is cut out of a text is never there to be merged, but for spaces, which are written as another character later
    out = {token for token, kind in words.kinds.items() if kind in _APART and _SPACE not in token}
    merges = generate_merges(vocabulary, score_of, skip_tokens=out)
    # the highest score is merged first; of equal ones llama.cpp takes the first in the text, which a list of merges cannot
    merged = [score for token in {left + right for left, right in merges} if (score := score_of[token]) > _NO_MERGE]
    if len(set(merged)) < len(merged):
        raise _refused(file, "gives several tokens the same score, so that it says no order of merges")
    text = next((token for token, number in vocabulary.items() if number == words.special.get("unk")), None)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=text, fuse_unk=True, byte_fallback=True))
    prefix = file.metadata.get(f"{_KEYS}add_space_prefix", True)
    replace, strip = normalizers.Replace(" ", _SPACE), decoders.Strip(" ", 1, 0)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *([strip] if prefix else [])]
    backend.decoder = decoders.Sequence(back)
    return _Made(backend, True)


_KINDS: dict[str, Callable[[GGUFFile, _Words], _Made]] = {"gpt2": _over_bytes, "llama": _sentencepiece}
# ids of special tokens that such a file does not name
_DEFAULTS = {"llama": {"unk": 0, "bos": 1, "eos": 2}}


def _add_apart(file: GGUFFile, backend: Tokenizer, words: _Words) -> None:
    name = str(file.metadata.get("general.name", "")).lower()
    stripped = any(part in name for part in _RIGHT_STRIPPED)
    apart = [(text, kind != _USER_DEFINED) for text, kind in words.kinds.items() if kind in _APART and text]
    for special, add in ((True, backend.add_special_tokens), (False, backend.add_tokens)):
        texts = [text for text, each in apart if each == special]
        right = [stripped and text not in _NOT_STRIPPED for text in texts]
        add([AddedToken(t, special=special, normalized=False, rstrip=r) for t, r in zip(texts, right, strict=True)])


def _finished(file: GGUFFile, made: _Made, special: dict[str, tuple[str, int]]) -> PreTrainedTokenizerFast:
    """special: name in transformers -> text and id."""
    begins = "bos" in special and bool(file.metadata.get(f"{_KEYS}add_bos_token", made.begins))
    closes = "eos" in special and bool(file.metadata.get(f"{_KEYS}add_eos_token", False))
    before, after = ([special[name][0]] if put else [] for name, put in (("bos", begins), ("eos", closes)))
    made.backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[special[name] for name, put in (("bos", begins), ("eos", closes)) if put],
    )
    length = file.metadata.get(f"{file.architecture}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=made.backend,
        **{f"{name}_token": text for name, (text, _) in special.items()},
        **({"model_max_length": length} if isinstance(length, int) else {}),
        **({"chat_template": template} if (template := _template(file)) else {}),
        clean_up_tokenization_spaces=False,
    )


def _template(file: GGUFFile) -> str | dict[str, str] | None:
    first = file.metadata.get(_TEMPLATE)
    named_ones = {name: file.metadata.get(f"{_TEMPLATE}.{name}") for name in file.values(f"{_TEMPLATE}s")}
    found = {name: text for name, text in {"default": first, **named_ones}.items() if isinstance(text, str)}
    return found["default"] if list(found) == ["default"] else found or None


def _number(file: GGUFFile, name: str) -> int | None:
    """The id that the file gives; None where it gives none."""
    found = file.metadata.get(f"{_KEYS}{name}_token_id")
    whole = isinstance(found, int) and not isinstance(found, bool | Length)
    return found if whole and found not in (-1, _NO_TOKEN) else None


def _refused(file: GGUFFile, what: str) -> ValueError:
    return ValueError(
        f"{file.path} {what}; take the tokenizer of the model that it was made from: import_tokenizer(..., base=<folder or "
        "Hub name>)"
    )
