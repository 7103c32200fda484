"""The Triton bodies as the dispatch table lists them. A kernel's file is imported when its first tensor comes. Own.

In graphs they are the operators of `graph.py`, elementwise ones too: what a compiler would make of those divides and rounds
by other rules, and codes have to be the same in every graph and outside.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .. import reference
from ..graph import implement, served, served_experts, served_linears

_FILES = {
    "products": ("int_matmul", "int_linear"),
    "experts": ("packed_experts",),
    "packed": ("packed_int_linear", "packed_linears", "packed_linear"),
    "gradients": ("fixed_matmul",),
    "columns": ("quantize_columns",),
    "rows": ("quantize_rows", "norm_quantize_rows", "scale_rows"),
    "weights": ("mean_magnitudes", "quantize_weight", "quantize_sign", "quantize_pack", "sign_pack", "pack", "unpack"),
}
_KEYS = ("CUDA", "XPU")


@lru_cache
def _found(file: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f".{file}", __package__), name)


def _late(file: str, name: str) -> Callable[..., Any]:
    return lambda *args: _found(file, name)(*args)


_LATE = {name: _late(file, name) for file, names in _FILES.items() for name in names}
_LISTS = ("packed_linears", "packed_linear", "packed_experts")
_SERVED = [name for name in _LATE if name not in _LISTS]
for _key in _KEYS:
    implement(_key, {name: _LATE[name] for name in (*_SERVED, "packed_linears", "packed_experts")})

# operation -> body with the signature of `reference.py`
OPERATIONS: dict[str, Callable[..., Any]] = {name: served(name, _LATE[name]) for name in _SERVED}
OPERATIONS["packed_linears"], OPERATIONS["packed_linear"] = served_linears(
    _LATE["packed_linears"], _LATE["packed_linear"], reference
)
OPERATIONS["packed_experts"] = served_experts(_LATE["packed_experts"])
