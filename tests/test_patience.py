"""Looks at what changes: soon again at what stays, seldom at what never does."""

from __future__ import annotations

from hf_bitnet.modules.patience import Patience


def looks(patience: Patience, calls: int, served: int = 0) -> int:
    """How many of the calls look, when everything changes after `served` more uses."""
    found = 0
    for _ in range(calls):
        if patience.begins_look():
            found += 1
            for _ in range(served):
                patience.served()
    return found


def test_what_never_stays_is_looked_at_less_and_less() -> None:
    patience = Patience(worth=2)
    assert [patience.begins_look() for _ in range(11)] == [True] * 5 + [False] * 2 + [True] + [False] * 3
    assert looks(patience, 10_000) < 20
    assert patience.pause <= 1024


def test_looks_that_are_worth_it_are_free() -> None:
    assert looks(Patience(worth=2), 1000, served=2) == 1000
    assert looks(Patience(worth=2), 1000, served=1) < 20


def test_what_stays_at_last_ends_the_waiting() -> None:
    patience = Patience(worth=2)
    looks(patience, 3000)
    assert patience.pause > 1
    patience.served()
    patience.served()
    assert [patience.begins_look() for _ in range(5)] == [True] * 5
