"""When to look again at what changes all the time. Own."""

from __future__ import annotations

# looks in vain until the first pause; the pauses double from 2 calls to the longest
_FREE, _LONGEST = 4, 1 << 10
# calls that a look has to serve, beside the one that it was made for: one token makes several
_WORTH = 8


class Patience:
    """Something costs a look, and serves until it changes. What never stays is looked at after longer and longer pauses.

    Attributes:
        vain: looks since one was worth it. pause: calls until the next look. uses: of the last look.
    """

    __slots__ = ("pause", "uses", "vain")

    def __init__(self) -> None:
        self.vain = self.pause = self.uses = 0

    def served(self) -> None:
        """What the last look found is still there."""
        self.uses += 1
        if self.uses >= _WORTH:
            self.vain = 0

    def may_look(self) -> bool:
        """Whether this call is to look; it is then expected to."""
        if self.pause:
            self.pause -= 1
            return False
        self.vain, self.uses = self.vain + 1, 0
        if self.vain > _FREE:
            self.pause = min(1 << (self.vain - _FREE), _LONGEST)
        return True
