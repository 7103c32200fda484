"""When to look again at what changes all the time. Own."""

from __future__ import annotations

# looks in vain until the first pause; the pauses double from 2 calls to the longest
_FREE, _LONGEST = 4, 1 << 10


class Patience:
    """Something costs a look, and serves until it changes. What never stays is looked at after longer and longer pauses.

    Attributes:
        worth: calls that a look has to serve, beside the one that began it, to have been worth its while.
        uses: of the last look. vain: looks in a row that were not worth it. pause: calls until the next one.
    """

    __slots__ = ("pause", "uses", "vain", "worth")

    def __init__(self, worth: int) -> None:
        self.worth = worth
        self.uses = self.vain = self.pause = 0

    def served(self) -> None:
        """What the last look found is still there."""
        self.uses += 1
        if self.uses >= self.worth:
            self.vain = self.pause = 0

    def begins_look(self) -> bool:
        """Whether this call looks. Every call that asks shortens the pause."""
        if self.pause:
            self.pause -= 1
            return False
        self.vain, self.uses = self.vain + 1, 0
        if self.vain > _FREE:
            self.pause = min(1 << (self.vain - _FREE), _LONGEST)
        return True
