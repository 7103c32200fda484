"""Products of rows with packed weights on the GPU: from one row, as in decoding, to the thousands of a prompt. Own.

few rows   1 to 16: all matrices of a ring that no cache holds, one after another in a CUDA graph, so that neither launches nor
           caches are timed. Packed bytes a second as a share of what a device-to-device copy moves (read and written) in the
           same rounds; times faster than torch's bfloat16 product and its int4 one.
many rows  512 to 8192: times faster than torch's bfloat16 product.

Everything is called as the library's layers call it, from bfloat16 rows to bfloat16 rows: quantizing the rows is part of it.

    python -m benchmarks.gpu --only packed
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_common import (
    GIB,
    Arms,
    Row,
    Section,
    Settings,
    attempt,
    bfloat16,
    captured,
    check,
    copy_arm,
    over,
    ratio,
    say,
    timed,
)
from hf_bitnet import kernels
from hf_bitnet.kernels import Layout, RowQuantization, reference

# ternary first: what matters most is measured first
LAYOUTS = {2: Layout(2, -1), 1: Layout(1, -1, 2), 4: Layout(4, -7), 8: Layout(8, -127)}
INT8_ROWS = RowQuantization(-128, 127, 1e-5)
INT4_GROUP, _INT4_TILES = 128, 8
OURS, BF16, INT4, COPY = "hf_bitnet", "torch bfloat16", "torch int4pack", "copy"
OPERATIONS = ("packed_linear",)
SHARE_BAR, ROW_BAR, MANY_BAR, BAR_ROWS = 0.7, 4.0, 1.3, (4096, 32)
# up to so many rows a product is a matter of bandwidth
FEW_ROWS = 16
# graphs of larger products need no more matrices than this: many rows keep the caches busy with themselves
_FEW_MATRICES = 8
_COLUMNS = ("GB/s", "of copy", "TOPS", "x bfloat16", "x int4pack")


class Sizes(NamedTuple):
    """Attributes: shapes: (outputs, inputs). rows: what has a bar first. ring: bytes of all matrices of one arm."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    ring: int
    rounds: int


FULL = Sizes(((4096, 4096), (14336, 4096)), (1, 4096, 16, 512, 2, 4, 8, 8192), GIB, 9)
SMOKE = Sizes(((128, 256),), (1, 32, 2), 1 << 16, 1)


class Ring:
    """Random bytes, and bfloat16 numbers of as many bytes, cut into matrices; more than the caches hold."""

    def __init__(self, settings: Settings, size: int) -> None:
        self.generator = torch.Generator(settings.device).manual_seed(0)
        self.bytes = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=self.generator, device=settings.device)
        self.floats = bfloat16(self.generator, size // 2)

    def packed(self, n: int, k: int, bits: int) -> list[Tensor]:
        """Weights (n, k * bits / 8); bytes are below 255, and a level that no code has is a number like others."""
        return _cut(self.bytes, n, k * bits // 8)

    def int4(self, n: int, k: int) -> list[Tensor]:
        """Weights in the layout of `_weight_int4pack_mm` (n / 8, k / 128, 32, 4)."""
        shape = (n // 8, k // (16 * _INT4_TILES), 32, _INT4_TILES // 2)
        return [part.view(torch.int32).view(shape) for part in _cut(self.bytes, n, k // 2)]

    def bfloat16(self, n: int, k: int) -> list[Tensor]:
        return _cut(self.floats, n, k)


def _cut(memory: Tensor, rows: int, columns: int) -> list[Tensor]:
    return [part.view(rows, columns) for part in memory.split(rows * columns) if part.numel() == rows * columns]


def ours(x: Tensor, layout: Layout) -> Callable[[Tensor], Tensor]:
    """The library's product with a packed weight."""
    scale = torch.full((1, 1), 0.02, device=x.device)
    return lambda packed: kernels.packed_linear(x, packed, scale, None, layout, INT8_ROWS, x.dtype)


def check_product(x: Tensor, packed: Tensor, layout: Layout) -> None:
    """The product with tuned tiles at this very shape, against the definition on the same device."""
    scale = torch.full((1, 1), 0.02, device=x.device)
    expected = reference.packed_linear(x, packed, scale, None, layout, INT8_ROWS, x.dtype)
    check(ours(x, layout)(packed), expected, "packed_linear")


class Arm(NamedTuple):
    """Attributes: call: with one of the weights."""

    call: Callable[[Tensor], Any]
    weights: list[Tensor]


def arms(ring: Ring, m: int, n: int, k: int, bits: int, settings: Settings) -> dict[str, Arm]:
    x = bfloat16(ring.generator, m, k)
    found = {BF16: Arm(lambda weight: F.linear(x, weight), ring.bfloat16(n, k))}
    if settings.cuda and k % (16 * _INT4_TILES) == 0:
        scales = torch.ones(k // INT4_GROUP, n, 2, dtype=torch.bfloat16, device=x.device)
        call = lambda weight: torch.ops.aten._weight_int4pack_mm(x, weight, INT4_GROUP, scales)  # noqa: E731
        found[INT4] = Arm(call, ring.int4(n, k))
    check_product(x, ring.packed(n, k, bits)[0], LAYOUTS[bits])
    return {OURS: Arm(ours(x, LAYOUTS[bits]), ring.packed(n, k, bits)), **found}


def measure_cell(ring: Ring, m: int, n: int, k: int, bits: int, sizes: Sizes, settings: Settings) -> list[Row]:
    """All arms of one shape, in turn: a row each."""
    copy, moved = copy_arm(settings, sizes.ring)
    graphs: Arms = {COPY: copy}
    failed: dict[str, str] = {}
    used, most = arms(ring, m, n, k, bits, settings), _FEW_MATRICES if m > FEW_ROWS else None
    for name, (call, weights) in used.items():
        chosen = over(call, weights[:most])
        graph, wrong = attempt(name, lambda chosen=chosen: captured(chosen, settings.device), settings.device)
        if wrong is None:
            graphs[name] = graph
        else:
            failed[name] = wrong
    seconds, late = timed(graphs, sizes.rounds, settings.device)
    failed |= late
    each = {name: seconds[name] / len(used[name].weights[:most]) for name in used if name in seconds}
    rows: list[Row] = []
    for name, (_, weights) in used.items():
        row: Row = {"rows": m, "shape": f"{n}x{k}", "bits": bits, "arm": name, "us": failed.get(name, "-")}
        if name in each:
            bandwidth = weights[0].nbytes / each[name]
            row |= {"us": each[name] * 1e6, "GB/s": bandwidth / 1e9, "of copy": bandwidth * seconds[COPY] / moved}
            row |= {"TOPS": 2 * m * n * k / each[name] / 1e12}
            row |= {"x bfloat16": ratio(each, BF16, name) or "-", "x int4pack": ratio(each, INT4, name) or "-"}
        rows.append(dict.fromkeys((*row, *_COLUMNS), "-") | row)
    return rows


def measure_cells(ring: Ring, sizes: Sizes, settings: Settings) -> list[Row]:
    """Every cell; one that fails is one row."""
    found: list[Row] = []
    for m, bits, (n, k) in itertools.product(sizes.rows, LAYOUTS, sizes.shapes):
        cell, wrong = None, settings.why_not(*OPERATIONS)
        say(f"  packed product: {m} rows, {bits} bits, {n}x{k}" + (f": {wrong}" if wrong else ""))
        if wrong is None:
            call = lambda m=m, n=n, k=k, bits=bits: measure_cell(ring, m, n, k, bits, sizes, settings)  # noqa: E731
            cell, wrong = attempt("all arms", call, settings.device)
        row: Row = {"rows": m, "shape": f"{n}x{k}", "bits": bits, "arm": OURS, "us": wrong}
        found += cell or [row | dict.fromkeys(_COLUMNS, "-")]
    return found


def measure(settings: Settings) -> Section:
    sizes = SMOKE if settings.smoke else FULL
    section = Section()
    rows = measure_cells(Ring(settings, sizes.ring), sizes, settings)
    section.tables["packed products, few rows"] = [row for row in rows if row["rows"] <= FEW_ROWS]
    section.tables["packed products, many rows"] = [row for row in rows if row["rows"] > FEW_ROWS]
    for row in rows:
        name = f"{row['bits']} bits, {row['shape']}"
        if row["arm"] != OURS or row["bits"] == 8:
            continue
        if row["rows"] == 1:
            section.bar(f"one row, {name}: of copy", _figure(row, "of copy"), SHARE_BAR, at_least=True)
            section.bar(f"one row, {name}: x bfloat16", _figure(row, "x bfloat16"), ROW_BAR, at_least=True)
        elif row["rows"] in BAR_ROWS:
            section.bar(f"{row['rows']} rows, {name}: x bfloat16", _figure(row, "x bfloat16"), MANY_BAR, at_least=True)
    return section


def _figure(row: Row, column: str) -> float | None:
    return row[column] if isinstance(row[column], float) else None
