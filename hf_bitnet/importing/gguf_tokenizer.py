"""The tokenizer in a GGUF file, as one of transformers that makes the tokens llama.cpp makes. Own; the rules are llama.cpp's.

transformers has a reader too. It splits texts as GPT-2 does where it does not know the name of a pre-tokenizer, merges words
that llama.cpp takes whole, and puts the first space of a SentencePiece vocabulary where the class of a tokenizer has it
instead of where the file says (measured on one tokenizer of each kind: other tokens for 5 of 12). Here a name that is not
known is refused, because another cut is another text to the model.

Two kinds are read: BPE over bytes ("gpt2") and SentencePiece's BPE with byte fallback ("llama").
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from ..gguf_file import GGUFFile
from ..gguf_pre_tokenizers import known_names, named

_KEYS = "tokenizer.ggml."
_SPACE = "▁"
# of gguf.TokenType: what is cut out of a text before anything else, and rows that no text has
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_APART = (_UNKNOWN, _CONTROL, _USER_DEFINED)
# name in transformers -> key
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_TEMPLATE = "tokenizer.chat_template"


class _Made(NamedTuple):
    """backend: of the package tokenizers. begins: whether a text begins with bos where the file does not say.
    defaults: ids of special tokens that the file does not name.
    """

    backend: Tokenizer
    begins: bool
    defaults: dict[str, int]


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
    types = types or [0] * len(tokens)
    # rows of the embedding that stand behind the last token
    while types and types[-1] == _UNUSED:
        types.pop()
    vocabulary = dict(zip(tokens, range(len(types)), strict=False))
    if len(vocabulary) != len(types):
        raise _refused(file, "holds two tokens with the same text")
    made = make(file, vocabulary)
    _add_apart(made.backend, tokens, types)
    return _finished(file, made, tokens)


def ends(file: GGUFFile) -> list[int]:
    """Ids of the tokens that end a text: of the text itself, of a turn, of a message; without those that the file lacks."""
    found = [file.metadata.get(f"{_KEYS}{name}_token_id") for name in ("eos", "eot", "eom")]
    return [each for each in dict.fromkeys(found) if isinstance(each, int)]


def _over_bytes(file: GGUFFile, vocabulary: dict[str, int]) -> _Made:
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
    return _Made(backend, cut.begins, {})


def _sentencepiece(file: GGUFFile, vocabulary: dict[str, int]) -> _Made:
    scores = file.values(f"{_KEYS}scores")
    if len(scores) < len(vocabulary):
        raise _refused(file, f"holds {len(vocabulary)} tokens and {len(scores)} scores of them")
    apart = {token for token, kind in zip(vocabulary, file.values(f"{_KEYS}token_type"), strict=False) if kind in _APART}
    # the pair with the highest score is merged first, of equal ones the first in the text
    merges = generate_merges(vocabulary, dict(zip(vocabulary, scores, strict=False)), skip_tokens=apart)
    unknown = _number(file, "unknown", 0)
    text = next((token for token, number in vocabulary.items() if number == unknown), None)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=text, fuse_unk=True, byte_fallback=True))
    prefix = file.metadata.get(f"{_KEYS}add_space_prefix", True)
    replace, strip = normalizers.Replace(" ", _SPACE), decoders.Strip(" ", 1, 0)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *([strip] if prefix else [])]
    backend.decoder = decoders.Sequence(back)
    return _Made(backend, True, {"unknown": 0, "bos": 1, "eos": 2})


_KINDS: dict[str, Callable[[GGUFFile, dict[str, int]], _Made]] = {"gpt2": _over_bytes, "llama": _sentencepiece}


def _add_apart(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    apart = [(text, kind != _USER_DEFINED) for text, kind in zip(tokens, types, strict=False) if kind in _APART and text]
    for special, add in ((True, backend.add_special_tokens), (False, backend.add_tokens)):
        add([AddedToken(text, special=special, normalized=False) for text, each in apart if each == special])


def _finished(file: GGUFFile, made: _Made, tokens: list[str]) -> PreTrainedTokenizerFast:
    ids = {name: _number(file, key, made.defaults.get(key)) for name, key in _SPECIAL.items()}
    beyond = next((name for name, number in ids.items() if number is not None and not 0 <= number < len(tokens)), None)
    if beyond is not None:
        raise _refused(file, f"names the token {ids[beyond]} as {beyond}, of {len(tokens)}")
    special = {f"{name}_token": tokens[number] for name, number in ids.items() if number is not None}
    begins = bool(file.metadata.get(f"{_KEYS}add_bos_token", made.begins)) and ids["bos"] is not None
    closes = bool(file.metadata.get(f"{_KEYS}add_eos_token", False)) and ids["eos"] is not None
    around = {"bos_token": begins, "eos_token": closes}
    before, after = ([special[name]] if around[name] else [] for name in around)
    made.backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(special[name], ids[name.removesuffix("_token")]) for name, put in around.items() if put],
    )
    length = file.metadata.get(f"{file.architecture}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=made.backend,
        **special,
        **({"model_max_length": length} if isinstance(length, int) else {}),
        **({"chat_template": template} if (template := _template(file)) else {}),
        clean_up_tokenization_spaces=False,
    )


def _template(file: GGUFFile) -> str | dict[str, str] | None:
    first = file.metadata.get(_TEMPLATE)
    named_ones = {name: file.metadata.get(f"{_TEMPLATE}.{name}") for name in file.values(f"{_TEMPLATE}s")}
    found = {name: text for name, text in {"default": first, **named_ones}.items() if isinstance(text, str)}
    return found["default"] if list(found) == ["default"] else found or None


def _number(file: GGUFFile, name: str, default: int | None) -> int | None:
    found = file.metadata.get(f"{_KEYS}{name}_token_id", default)
    return found if isinstance(found, int) else None


def _refused(file: GGUFFile, what: str) -> ValueError:
    return ValueError(
        f"{file.path} {what}; take the tokenizer of the model that it was made from: import_tokenizer(..., base=<folder or "
        "Hub name>)"
    )
