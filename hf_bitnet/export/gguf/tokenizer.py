"""Writes a transformers tokenizer into a GGUF file, so that llama.cpp makes the same tokens of a text. Own.

Read from the tokenizer.json inside a fast tokenizer, never from its class name. Three kinds:

* BPE over bytes -> model "gpt2": tokens, merges, and the name of the pre-tokenizer (`gguf_pre_tokenizers.py`);
* BPE with byte fallback (Llama 2, Mistral, Gemma) -> model "llama": scores in place of merges (`tokenizer_merges.py`);
* unigram -> model "t5": scores.

What llama.cpp's tokenizers cannot do at all is refused; where they differ for some texts only, a note says for which.
Leaves out WordPiece and word-level vocabularies, and llama.cpp's clean-up of spaces (`llama_detokenize` drops the space in
front of a full stop for some pre-tokenizers; generated tokens come out one by one, without it).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ...gguf_pre_tokenizers import PRE_TOKENIZERS, steps_of
from .tokenizer_merges import NEVER, ranks_of, scores_of, unmerged
from .tokenizer_spaces import MORE, SPACE, parts_of, spaces_of, unicode_note
from .tokenizer_special import SpecialTokens, special_tokens
from .tokenizer_vocabulary import Vocabulary, byte_tokens, missing_bytes, unknown_token, vocabulary_of

if TYPE_CHECKING:
    from gguf import GGUFWriter  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class TokenizerMetadata:
    """What is stored of a tokenizer.

    Attributes:
        model: llama.cpp's kind of tokenizer. pre: its name for the pre-tokenizer.
        vocabulary: texts and types of all tokens. special: ids, flags and chat template.
        scores: one a token. merges: "left right", the first merged first.
        flags: further flags, by the name of the writer's method. charsmap: SentencePiece's normalization.
        notes: for which texts llama.cpp differs from the tokenizer.
    """

    model: str
    pre: str
    vocabulary: Vocabulary
    special: SpecialTokens
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    charsmap: bytes | None = None
    notes: list[str] = field(default_factory=list)


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, config: PreTrainedConfig) -> list[str]:
    """Writes all `tokenizer.*` keys.

    Args:
        writer: a `gguf.GGUFWriter`, before its header is written.
        tokenizer: a fast tokenizer of transformers; None writes "no_vocab" and the number of tokens.
        config: of the model; its vocab_size is the number of rows of the embedding, and so of the tokens that are written.

    Returns sentences for the report: for which texts llama.cpp differs. No sentence means that no such text is known.

    Raises:
        ValueError: what llama.cpp has no tokenizer for, as `read_tokenizer` says.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.get_text_config().vocab_size)
        return ["there is no tokenizer in the file: the model takes and gives token ids"]
    found = read_tokenizer(tokenizer, config)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.vocabulary.tokens)
    writer.add_token_types(found.vocabulary.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.charsmap is not None:
        writer.add_precompiled_charsmap(found.charsmap)
    for name, value in found.flags.items():
        getattr(writer, f"add_{name}")(value)
    found.special.write(writer)
    return found.notes


def read_tokenizer(tokenizer: Any, config: PreTrainedConfig) -> TokenizerMetadata:
    """What `add_tokenizer` would write.

    Raises:
        ValueError: not a fast tokenizer; a model or step that llama.cpp does not have; more tokens than the embedding has
            rows; tokens around a text that are neither the first nor the last one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"GGUF: {type(tokenizer).__name__} has no tokenizer.json inside; pass a fast tokenizer, "
            "AutoTokenizer.from_pretrained(folder), or tokenizer=None for a file without one"
        )
    spec = json.loads(backend.to_str())
    model = spec["model"]
    kind = {"BPE": _sentencepiece if model.get("byte_fallback") else _bytes, "Unigram": _unigram}.get(model["type"])
    if kind is None:
        raise _refused(f"a {model['type']} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"a model with {key}={model[key]!r}")
    special = special_tokens(tokenizer, config, unknown_token(tokenizer, model))
    return kind(spec, vocabulary_of(tokenizer, spec, config), special)


def _refused(what: str, known: str = "") -> ValueError:
    """The error for what llama.cpp's tokenizers cannot do."""
    return ValueError(
        f"GGUF: the tokenizer has {what}, for which llama.cpp has nothing equal; it has BPE over bytes, BPE with byte fallback "
        f"and unigram models{known}. tokenizer=None writes a file without a tokenizer"
    )


def _bytes(spec: Mapping[str, Any], vocabulary: Vocabulary, special: SpecialTokens) -> TokenizerMetadata:
    model, steps = spec["model"], steps_of(spec["pre_tokenizer"])
    known = PRE_TOKENIZERS.get(steps)
    if known is None:
        names = ", ".join(name for pre in PRE_TOKENIZERS.values() for name in (pre.merging, pre.whole) if name)
        raise _refused(f"the pre-tokenizer {list(steps)}", f"; known pre-tokenizers are those of {names}")
    ranks = ranks_of(model["merges"])
    pre, other = (known.whole, known.merging) if model["ignore_merges"] else (known.merging, known.whole)
    if pre is None and unmerged(model["vocab"], ranks, vocabulary.apart):
        raise _refused(f"ignore_merges={model['ignore_merges']} together with the pre-tokenizer of {other}")
    notes = known.note(pre or other or "", model["vocab"])
    for step in parts_of(spec["normalizer"]):
        note = unicode_note(step)
        if note is None:
            raise _refused(f"the normalizer {step['type']} in front of a BPE model over bytes")
        notes.append(note)
    missing = missing_bytes(model["vocab"])
    if missing:
        notes.append(f"{missing} of the bytes of UTF-8 have no token: texts that contain them may give other tokens")
    return TokenizerMetadata(
        model="gpt2",
        pre=pre or other or "",
        vocabulary=vocabulary,
        special=special,
        merges=[f"{left} {right}" for left, right in ranks],
        flags={"add_space_prefix": False},
        notes=[*notes, *vocabulary.notes, *special.notes, *_decoder_note(spec, {"ByteLevel"})],
    )


def _sentencepiece(spec: Mapping[str, Any], vocabulary: Vocabulary, special: SpecialTokens) -> TokenizerMetadata:
    model, spaces = spec["model"], spaces_of(spec)
    if spaces.problem is None and (spaces.collapse or spaces.charsmap is not None):
        spaces.problem = "a replacement of characters or of runs of spaces in front of a BPE model"
    if spaces.problem is not None:
        raise _refused(spaces.problem)
    vocab = model["vocab"]
    if any(byte not in vocab for byte in byte_tokens()):
        raise _refused("byte fallback without a token for every byte (<0x00> to <0xFF>)")
    _check_split(spaces.split, vocab)
    ranks = ranks_of(model["merges"])
    scores, problem = scores_of(vocab, ranks, vocabulary.apart)
    if model["ignore_merges"] and unmerged(vocab, ranks, {*vocabulary.apart, *byte_tokens()}):
        problem = "it has ignore_merges=True and tokens that no merge makes"
    if problem is not None:
        raise _refused(f"merges that llama.cpp's scores cannot stand for: {problem}")
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    return TokenizerMetadata(
        model="llama",
        pre="default",
        vocabulary=vocabulary,
        special=special,
        scores=[scores.get(token, NEVER) for token in vocabulary.tokens],
        flags={"add_space_prefix": spaces.prefix},
        notes=[*spaces.notes, *vocabulary.notes, *special.notes, *_decoder_note(spec, known)],
    )


def _unigram(spec: Mapping[str, Any], vocabulary: Vocabulary, special: SpecialTokens) -> TokenizerMetadata:
    model, spaces = spec["model"], spaces_of(spec)
    notes = spaces.notes
    if spaces.problem is None and spaces.collapse and not spaces.prefix:
        spaces.problem = "words without a space in front of them, where runs of spaces count as one"
    if spaces.problem is not None:
        raise _refused(spaces.problem)
    if model["unk_id"] is None or model["byte_fallback"]:
        raise _refused(f"a unigram model with unk_id={model['unk_id']} and byte_fallback={model['byte_fallback']}")
    _check_split(spaces.split, [text for text, _ in model["vocab"]])
    if spaces.collapse:
        # there is no first space that could be one too many, but line breaks count as spaces in the tokenizer
        notes = [note for note in notes if note != MORE]
        notes += [] if spaces.charsmap else ["the tokenizer takes tabs and line breaks for spaces, llama.cpp as characters"]
    scores = {number: score for number, (_, score) in enumerate(model["vocab"])}
    if any(abs(score - _float32(score)) > 1e-12 * abs(score) for score in scores.values()):  # JSON costs a last digit
        notes.append("scores are rounded to float32: where two ways to cut a word are that near, llama.cpp may take the other")
    return TokenizerMetadata(
        model="t5",
        pre="default",
        vocabulary=vocabulary,
        special=special,
        scores=[scores.get(number, NEVER) for number in range(len(vocabulary.tokens))],
        flags={"add_space_prefix": spaces.prefix, "remove_extra_whitespaces": spaces.collapse},
        charsmap=spaces.charsmap,
        notes=[*notes, *vocabulary.notes, *special.notes, *_decoder_note(spec, {"Replace", "Fuse", "Strip", "Metaspace"})],
    )


def _check_split(split: bool, vocabulary: Iterable[str]) -> None:
    """Where words are cut at spaces first, llama.cpp, which does not cut, finds the same if no token goes over a space."""
    over = next((token for token in vocabulary if SPACE in token[1:]), None) if split else None
    if over is not None:
        raise _refused(f"Metaspace(split=True) and tokens with a space inside, such as {over!r}")


def _decoder_note(spec: Mapping[str, Any], known: Container[str]) -> list[str]:
    kinds = [step["type"] for step in parts_of(spec["decoder"])]
    if kinds and all(kind in known for kind in kinds):
        return []
    return [f"the tokenizer's decoder is {kinds or None}: llama.cpp may write the same tokens otherwise"]


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
