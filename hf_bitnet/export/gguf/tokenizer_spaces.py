"""What a SentencePiece-like tokenizer.json does to spaces, in the terms that llama.cpp has for it. Own.

llama.cpp knows three things: a space is written as U+2581; one may be put in front of a text (`add_space_prefix`: also after
every special token within it); runs of spaces may count as one (`remove_extra_whitespaces`, in the unigram model only).
Where the tokenizer does something near to it, a note says for which texts the two differ. Anything else is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SPACE = "▁"
MORE = "a text, or what follows a special token, that begins with a space gets one more from llama.cpp, not from the tokenizer"
_INSIDE = "what follows a special token inside a text gets a space from llama.cpp, not from the tokenizer"
_GRAPHEMES = "the tokenizer replaces a character together with its combining marks and joiners, llama.cpp by itself"
_UNICODE = "the tokenizer brings texts to the Unicode form {}, llama.cpp does not; other forms of a character give other tokens"


@dataclass
class Spaces:
    """Attributes:
    prefix: a space in front of a text. collapse: runs of spaces count as one.
    split: words are cut at spaces before they are merged. charsmap: SentencePiece's table of replaced characters.
    notes: for which texts llama.cpp differs. problem: what it has nothing for; None where there is nothing.
    """

    prefix: bool = False
    collapse: bool = False
    split: bool = False
    escaped: bool = False
    charsmap: bytes | None = None
    notes: list[str] = field(default_factory=list)
    problem: str | None = None


def parts_of(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, without the sequences around them."""
    if step is None:
        return
    inner = next((step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step), None)
    if inner is None:
        yield step
        return
    for part in inner:
        yield from parts_of(part)


def unicode_note(step: Mapping[str, Any]) -> str | None:
    """The note for a step that only brings characters to a Unicode normal form; None for other steps."""
    return _UNICODE.format(step["type"]) if step["type"] in ("NFC", "NFD", "NFKC", "NFKD") else None


def spaces_of(spec: Mapping[str, Any]) -> Spaces:
    """What the normalizer and the pre-tokenizer of the parsed tokenizer.json `spec` do."""
    found = Spaces()
    for step in (*parts_of(spec["normalizer"]), *parts_of(spec["pre_tokenizer"])):
        if not _take(step, found) and found.problem is None:
            found.problem = f"the step {step['type']}"
    if not found.escaped and found.problem is None:
        found.problem = f"spaces that are not written as {SPACE}"
    return found


def _take(step: Mapping[str, Any], found: Spaces) -> bool:
    """Enters one step; False for one that llama.cpp has nothing for."""
    match step:
        case {"type": "Prepend", "prepend": "▁"}:
            found.prefix = True
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            found.escaped = True
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "▁"} | {"type": "WhitespaceSplit"}:
            found.collapse = True
        case {"type": "Strip", "strip_left": False, "strip_right": True}:
            return found.collapse or found.charsmap is not None
        case {"type": "Precompiled", "precompiled_charsmap": str(charsmap)}:
            found.charsmap = base64.b64decode(charsmap)
            found.notes.append(_GRAPHEMES)
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": bool(split)}:
            found.escaped, found.split, found.prefix = True, split, scheme != "never"
            found.notes += [MORE] if found.prefix else []
            found.notes += [_INSIDE] if scheme == "first" else []
        case {"type": "Split", "pattern": {"String": " "}}:
            return found.escaped  # after the replacement there is nothing left to split at
        case _:
            note = unicode_note(step)
            found.notes += [note] if note is not None else []
            return note is not None
    return True
