"""What kernels keep for a tensor from one call to the next. Own."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class KeptFor(Generic[Value]):
    """What is kept for a tensor: found by the tensor's identity, and gone when it dies."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        found = self._found.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def put(self, tensor: Tensor, value: Value) -> None:
        key, all_of_them = id(tensor), self._found

        def forget(owner: weakref.ref[Tensor]) -> None:
            found = all_of_them.get(key)
            if found is not None and found[0] is owner:  # another tensor may live at the same id by now
                del all_of_them[key]

        all_of_them[key] = weakref.ref(tensor, forget), value
