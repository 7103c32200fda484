r"""Floor 0: llama.cpp's names of pre-tokenizers, and those of tokenizer.json. Own; the regexes are those of llama-vocab.cpp.

llama.cpp stores no regex in a file but the name of one that is compiled in (`tokenizer.ggml.pre`). Its own converter finds the
name by a hash of one encoded text; here the steps of the pre-tokenizer are compared instead, each written as a regex, so that a
tokenizer that was trained anew finds its name too. A name stands for more than the regex: whether a word that is in the
vocabulary as a whole is taken without merging (`ignore_merges`).

The regexes of both sides were compared on every character, with a vocabulary that holds every pair of bytes. Where no
difference is named, they differ only for characters that entered Unicode after version 14, as the two have tables of different
versions, and for ſ after an apostrophe, which is an s to `(?i:'s)`.

Leaves out pre-tokenizers whose regex in llama.cpp is known not to be that of the tokenizer (bloom, viking, kimi-k2, afmoe).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tokenizers import Regex, pre_tokenizers

BYTES = "bytes"  # stands for the step that writes bytes as characters; later steps see those characters
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = "Punctuation(contiguous)"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_SEED = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START, _REST = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_GPT4O = rf"{_START}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_START}{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}{_REST}"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _SPACES
)

# the same language in another spelling (OpenAI's cl100k and its relatives): possessive quantifiers in front of what the class
# excludes, and `\s*[\r\n]`, which through its greedy `\s*` ends at the same newline as `\s*[\r\n]+`
_ALSO = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": _LLAMA3,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": _QWEN2,
}


class Pre(NamedTuple):
    """Names of one regex in llama.cpp.

    Attributes:
        merging: the name under which words are always merged. whole: under which a word of the vocabulary is taken as it is.
        differs: for which texts llama.cpp's regex splits otherwise; empty where none is known.
        digits: the difference lies beside digits: without a token of digits and other characters there is none.
    """

    merging: str | None
    whole: str | None
    differs: str = ""
    digits: bool = False

    def note(self, name: str, vocabulary: Iterable[str]) -> list[str]:
        """What to say of the difference, for this vocabulary."""
        mixed = (any(map(str.isnumeric, token)) and not token.isnumeric() for token in vocabulary)
        if not self.differs or (self.digits and not any(mixed)):
            return []
        return [f"llama.cpp's pre-tokenizer {name!r} cuts {self.differs} at other places than the tokenizer"]


_CASE = "words with capital letters other than A to Z after the first, and with combining marks,"
PRE_TOKENIZERS: Mapping[tuple[str, ...], Pre] = {
    (_GPT2, BYTES): Pre("gpt-2", None),
    (r"\p{N}", _GPT2, BYTES): Pre("smollm", None),
    (_LLAMA3, BYTES): Pre("smaug-bpe", "llama-bpe"),
    (_QWEN2, BYTES): Pre("qwen2", None),
    (_QWEN35, BYTES): Pre("qwen35", None),
    (_SEED, BYTES): Pre("seed-coder", None),
    (_TEKKEN, BYTES): Pre(None, "tekken", _CASE),
    (_GPT4O, BYTES): Pre("gpt-4o", None, _CASE),
    (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3, BYTES): Pre("deepseek-v3", None),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}", BYTES): Pre(
        "deepseek-coder", None, "spaces beyond ASCII"
    ),
    (_PUNCTUATION, _GPT2, BYTES, r"\p{N}+", "[0-9][0-9][0-9]"): Pre(
        "falcon", None, "digits, and characters that have a byte which is written as one of ²³¹¼½¾,", digits=True
    ),
}


# further names of llama.cpp for the same: those of models whose tokenizer is the other's
_FURTHER_NAMES = {
    "gpt-2": ("phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "smaug-bpe": ("dbrx",),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    "gpt-4o": ("llama4", "kanana2", "talkie"),
}
_FIRST_NAMES = {further: name for name, names in _FURTHER_NAMES.items() for further in names}
# under these a text begins with the bos token, where a file does not say whether it does
_BEGINNING = ("llama-bpe", "tekken")


class Cut(NamedTuple):
    """What a name stands for.

    Attributes:
        pre_tokenizer: of the package tokenizers. whole: a word of the vocabulary is taken as it is (`ignore_merges`).
        begins: a text begins with the bos token, where the file does not say whether it does.
    """

    pre_tokenizer: Any
    whole: bool
    begins: bool


def named(name: str) -> Cut | None:
    """The pre-tokenizer that llama.cpp has under a name; None for one that is not known here."""
    first = _FIRST_NAMES.get(name, name)
    for steps, pre in PRE_TOKENIZERS.items():
        if first in (pre.merging, pre.whole):
            return Cut(pre_tokenizers.Sequence([_made(step) for step in steps]), first == pre.whole, first in _BEGINNING)
    return None


def known_names() -> list[str]:
    """What `named` knows."""
    first = [name for pre in PRE_TOKENIZERS.values() for name in (pre.merging, pre.whole) if name]
    return [*first, *_FIRST_NAMES]


def _made(step: str) -> Any:
    if step == BYTES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if step == _PUNCTUATION:
        return pre_tokenizers.Punctuation("contiguous")
    return pre_tokenizers.Split(Regex(step), "isolated")


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps as regexes, in order, with `BYTES` where characters become bytes. A step without a regex is its JSON type."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in steps_of(part))
    if kind == "ByteLevel":
        prefix = ("ByteLevel(add_prefix_space=True)",) if pre_tokenizer["add_prefix_space"] else ()
        return (*prefix, *((_GPT2,) if pre_tokenizer.get("use_regex", True) else ()), BYTES)
    if kind == "Digits":
        return (r"\p{N}" if pre_tokenizer["individual_digits"] else r"\p{N}+",)
    if kind == "Split" and "Regex" in pre_tokenizer["pattern"]:
        return (_regex(pre_tokenizer),)
    if kind == "Punctuation":
        return (f"Punctuation({pre_tokenizer['behavior'].lower()})",)
    return (kind,)


def _regex(split: Mapping[str, Any]) -> str:
    regex: str = split["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
    regex = _ALSO.get(regex, regex)
    how = (split["behavior"], split["invert"])
    # to remove what lies between the matches isolates the matches where nothing lies between them
    plain = how == ("Isolated", False) or (
        how == ("Removed", True) and regex in (_GPT2, _LLAMA3, _QWEN2, _QWEN35, _TEKKEN, _GPT4O)
    )
    return regex if plain else f"{split['behavior']}({regex}, invert={split['invert']})"
