"""Scores with which llama.cpp's SentencePiece tokenizer merges as a list of merges does. Own.

A list of merges joins, again and again, the adjacent pair that stands first in it (`merged`). llama.cpp's model "llama" knows
no pairs: it joins the adjacent pair whose text is the token with the highest score (`joined`). score(t) = -(place of the first
merge that makes t) gives both the same order; but llama.cpp may join two tokens that are no pair of the list.

Lists made from a SentencePiece model name every pair of every token, so there is no such pair. For lists that were trained,
where each merge uses what earlier ones made, two tokens stand side by side in some text exactly if they do so when their joined
text is encoded alone (Berglund and van der Merwe 2023, "Formalizing BPE Tokenization"): it is enough to compare both rules on
the texts of the tokens that have such pairs. Runs of one character, where pairs of one token overlap, are compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

NEVER = -1e9  # score of a token that no merge makes


def ranks_of(merges: Iterable[str | Sequence[str]]) -> dict[tuple[str, str], int]:
    """(left, right) -> place in the list, of merges written as pairs or as "left right"."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[(left, right)] = rank
    return ranks


def merged(text: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The tokens of one word by the rule of byte pair encoding, in O(n^2) for n characters."""
    return _best_first(text, lambda left, right: ranks.get((left, right)))


def joined(text: str, scores: Mapping[str, float]) -> list[str]:
    """The tokens of one word as llama.cpp's model "llama" makes them. Characters without a token stay as they are."""

    def cost(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    return _best_first(text, cost)


def _best_first(text: str, cost: Callable[[str, str], float | None]) -> list[str]:
    """Joins the cheapest adjacent pair, the leftmost of equal ones, until no pair has a cost."""

    def price(at: int) -> float:
        found = cost(parts[at], parts[at + 1])
        return math.inf if found is None else found

    parts = list(text)
    prices = [price(at) for at in range(len(parts) - 1)]
    while prices and (least := min(prices)) < math.inf:
        at = prices.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del prices[at]
        for beside in (at - 1, at):
            if 0 <= beside < len(prices):
                prices[beside] = price(beside)
    return parts


def unmerged(vocabulary: Iterable[str], ranks: Mapping[tuple[str, str], int], apart: Collection[str]) -> list[str]:
    """Tokens of several characters, those of `apart` left out, that the merges do not make of their own text."""
    return [token for token in vocabulary if token not in apart and len(merged(token, ranks)) > 1]


def scores_of(
    vocabulary: Iterable[str], ranks: Mapping[tuple[str, str], int], apart: Collection[str]
) -> tuple[dict[str, float], str | None]:
    """A score for every token, and a text for which scores cannot replace the merges (None where none was found).

    Args:
        vocabulary: texts of tokens. ranks: (left, right) -> place in the list of merges.
        apart: tokens that are cut out of a text before it is merged: it does not matter how their texts would be merged.

    Returns text -> score: 0 down to minus the number of merges, `NEVER` for tokens that no merge makes.
    """
    scores = dict.fromkeys(vocabulary, NEVER)
    for (left, right), rank in ranks.items():
        scores[left + right] = max(scores[left + right], -float(rank))
    doubtful = (token for token in scores if token not in apart and _has_unlisted(token, scores, ranks))
    for text in (*doubtful, *_runs(scores)):
        if merged(text, ranks) != joined(text, scores):
            return scores, f"its merges make {merged(text, ranks)} of {text!r}, llama.cpp would make {joined(text, scores)}"
    return scores, None


def _has_unlisted(token: str, vocabulary: Collection[str], ranks: Mapping[tuple[str, str], int]) -> bool:
    """Whether the token is made of two others that are no pair of the list."""
    splits = ((token[:at], token[at:]) for at in range(1, len(token)))
    return any(left in vocabulary and right in vocabulary and (left, right) not in ranks for left, right in splits)


def _runs(vocabulary: Iterable[str]) -> Iterator[str]:
    """Repetitions of a character up to twice the longest token of it."""
    longest: dict[str, int] = {}
    for token in vocabulary:
        if len(token) > 2 and token == token[0] * len(token):
            longest[token[0]] = max(len(token), longest.get(token[0], 0))
    for character, length in longest.items():
        yield from (character * count for count in range(2, 2 * length + 2))
