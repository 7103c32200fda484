"""Products of rows with the weights of the experts that they chose, in one call (`src/experts_call.cpp`). Own.

What describes a weight to the library is kept for its packed tensor, and serves while the weight's tensors are where they
were.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..fits import check_alike, check_places
from ..kept import KeptFor
from ..reference import Layout, PackedWeight, RowQuantization
from .common import FLOATS, as_float, as_rows, check, require_cpu
from .library import functions
from .products import GRID, INPUT, NO_RESULT, RESULT, describe, packed_grid, traits_of, usable_weight

# parts of hb_experts_block; its weights follow, each with the address and the stride of its results
_HEAD = struct.Struct("@P")  # x, before INPUT
_SIZES = struct.Struct("@qqPqqqi")  # tokens, k, index, chosen, experts, maps, out dtype

# for a packed tensor: inputs and bytes of a row, traits, description
_KEPT: KeptFor[tuple[int, int, tuple[Any, ...], bytes]] = KeptFor()


def _description(weight: PackedWeight, k: int, width: int, alive: list[PackedWeight]) -> bytes:
    """`weight` as the library reads it; what it needs beyond the weight's own tensors is added to `alive`."""
    kept = _KEPT.get(weight[0])
    if kept is not None and kept[:2] == (k, width) and kept[2] == traits_of(*weight):
        return kept[3]
    usable = usable_weight(weight, k, width)
    found = describe(usable)
    if all(a is b for a, b in zip(weight, usable, strict=True)):
        _KEPT.put(weight[0], (k, width, traits_of(*weight), found))
    alive.append(usable)
    return found


def packed_experts(
    x: Tensor,
    index: Tensor,
    maps: Sequence[Sequence[PackedWeight]],
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`reference.packed_experts`."""
    check_places(x, index)
    require_cpu(x, index)
    t, k = x.shape
    if not k:
        return reference.packed_experts(x, index, maps, layout, rows, dtype)
    computed = dtype if dtype in FLOATS else torch.float32
    grid, width = packed_grid(layout, k)
    read, index = as_rows(as_float(x)), index.contiguous()
    check_alike(maps)
    experts, alive = len(maps[0]), []
    outs = [torch.empty(index.numel(), of_one[0][0].shape[0], dtype=computed, device="cpu") for of_one in maps]
    parts = [
        _HEAD.pack(read.data_ptr()),
        INPUT.pack(read.stride(0), 0, 0, 0, FLOATS[read.dtype], 0, 0.0, *rows),
        _SIZES.pack(t, k, index.data_ptr(), index.shape[1], experts, len(maps), FLOATS[computed]),
        GRID.pack(*grid),
    ]
    for of_one, out in zip(maps, outs, strict=True):
        parts += (_description(of_one[0], k, width, alive), RESULT.pack(out.data_ptr(), out.shape[1]))
        for weight in of_one[1:]:
            parts += (_description(weight, k, width, alive), NO_RESULT)
    check(functions().hb_experts_call(b"".join(parts)))
    return outs if computed is dtype else [out.to(dtype) for out in outs]
