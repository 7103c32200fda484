"""Named collections of interchangeable members (schemes, STEs, schedules, kernel bodies). Own.

A member registers itself where it is defined; nothing lists the members a second time. Third parties add
theirs with the same call from outside the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A name -> member mapping whose lookup errors say what is legal."""

    def __init__(self, kind: str) -> None:
        """`kind`: what a member is called in error messages, for example "weight scheme"."""
        self.kind = kind
        self._members: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a member under `name`. Raises ValueError when the name is taken."""
        if name in self._members:
            raise ValueError(f"the {self.kind} {name!r} is already registered; choose another name")

        def add(member: T) -> T:
            self._members[name] = member
            return member

        return add

    def get(self, name: object) -> T:
        """The member called `name`. Raises ValueError that lists the legal names."""
        if isinstance(name, str) and name in self._members:
            return self._members[name]
        close = get_close_matches(str(name), self._members, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {self.kind} {name!r}; legal: {', '.join(map(repr, self._members))}.{hint}")

    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)
