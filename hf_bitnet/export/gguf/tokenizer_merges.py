"""Scores with which llama.cpp's SentencePiece tokenizer merges as a list of merges does. Own.

A list of merges joins, again and again, the adjacent pair that stands first in it. llama.cpp's model "llama" knows no pairs: it
joins the adjacent pair whose text is the token with the highest score. With score(t) = -(rank of the merge that makes t) both
do the same if every token is only ever made of one pair. Two tokens stand side by side in some text exactly if they do so when
their joined text is encoded alone (Berglund and van der Merwe 2023, "Formalizing BPE Tokenization", for merges that only use
what earlier ones made). So it is enough to encode every token's own text:

* the result is the token itself: its last merge is the only one by which it arises, and gives the score;
* it is three tokens or more: no two neighbours ever join to it, and it keeps out of the way;
* it is two tokens: llama.cpp would join them where the merges do not. Refused.

Leaves out tokenizers without such scores; none is known that was trained by byte pair encoding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

NEVER = -1e9  # score of a token that no text contains


def merged(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[list[str], int]:
    """The tokens of one word by the rule of byte pair encoding, and the rank of the last merge (-1 for none).

    Takes O(n^2) for n characters: it is meant for the texts of tokens.
    """
    parts, last = list(text), -1
    while len(parts) > 1:
        pairs = [ranks.get(pair, -1) for pair in pairwise(parts)]
        last_here = min((rank for rank in pairs if rank >= 0), default=-1)
        if last_here < 0:
            break
        last, at = last_here, pairs.index(last_here)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts, last


def ranks_of(merges: Iterable[str | Sequence[str]]) -> dict[tuple[str, str], int]:
    """(left, right) -> place in the list, of merges written as pairs or as "left right"."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[(left, right)] = rank
    return ranks


def unmerged(vocabulary: Iterable[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Tokens of several characters that the merges do not make of their own text."""
    return [token for token in vocabulary if len(merged(token, ranks)[0]) > 1]


def scores_of(
    vocabulary: Mapping[str, int], ranks: Mapping[tuple[str, str], int], apart: Collection[str]
) -> tuple[dict[int, float], str | None]:
    """A score for every token, and why scores cannot replace the merges (None where they can).

    Args:
        vocabulary: text -> id. ranks: (left, right) -> place in the list of merges.
        apart: texts of tokens that are cut out of a text before it is merged, and need no place among the merges.

    Returns id -> score: 0 for single characters, down to minus the number of merges, `NEVER` for tokens that no merge makes.
    """
    problem = _too_early(ranks)
    scores: dict[int, float] = {}
    for token, number in vocabulary.items():
        parts, last = merged(token, ranks)
        if len(parts) == 2 and token not in apart and problem is None:
            problem = f"its merges leave the token {token!r} as {parts[0]!r} and {parts[1]!r}, which llama.cpp would join"
        scores[number] = -float(max(last, 0)) if len(parts) == 1 else NEVER
    return scores, problem


def _too_early(ranks: Mapping[tuple[str, str], int]) -> str | None:
    """A merge of what only a later merge makes: the proof above does not cover it."""
    made: dict[str, int] = {}
    for (left, right), rank in ranks.items():
        made[left + right] = min(rank, made.get(left + right, rank))
    for pair, rank in ranks.items():
        if any(made.get(part, -1) > rank for part in pair):
            return f"its merge {pair} stands before the merge that makes one of the two"
    return None
