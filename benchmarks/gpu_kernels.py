"""The other kernels on the GPU against torch's products and the memory's bandwidth. Own.

products      int8 x int8 with scales (`int_linear`) against torch's bfloat16 product and its plain int8 one, which scales
              nothing; the products of backward (`fixed_matmul`) against the bfloat16 products of the same shapes.
quantization  bytes that must be read and written a second, as a share of what a device-to-device copy moves.

Each is called over several operands in a CUDA graph, more of them than the caches hold, and checked at this very shape first.

    python -m benchmarks.gpu --only kernels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_common import Arms, Row, Section, Settings, attempt, bfloat16, captured, check, copy_arm, over, say, timed
from hf_bitnet import kernels
from hf_bitnet.kernels import Layout, RowQuantization, reference

INT8_ROWS = RowQuantization(-128, 127, 1e-5)
TERNARY = Layout(2, -1)
OURS, BF16, INT8, COPY = "hf_bitnet", "torch bfloat16", "torch._int_mm", "copy"


class Sizes(NamedTuple):
    """Attributes: shapes: (outputs, inputs). sets: of operands, which take turns."""

    tokens: int
    shapes: tuple[tuple[int, int], ...]
    sets: int
    rounds: int


FULL = Sizes(8192, ((4096, 4096), (14336, 4096), (4096, 14336)), 4, 9)
SMOKE = Sizes(32, ((64, 64),), 2, 1)


class Products(NamedTuple):
    """Arms of one product: name -> call with one set of operands; and what the first one is checked with."""

    operation: str
    arms: dict[str, Callable[[Any], Tensor]]
    sets: list[Any]
    definition: Callable[[Any], Tensor]
    flops: int


class Draws:
    """Random operands on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def codes(self, *shape: int, ternary: bool = False) -> Tensor:
        low, high = (-1, 2) if ternary else (-128, 128)
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.int8)

    def scales(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator, device=self.device) + 0.1) * 1e-3


def forward_product(draws: Draws, m: int, n: int, k: int, sets: int) -> Products:
    """Activations (m, k) times a ternary weight (n, k)."""

    def operands() -> tuple[Tensor, ...]:
        codes, x_scale = draws.codes(m, k), draws.scales(m, 1)
        weight, bf16_x = draws.codes(n, k, ternary=True), bfloat16(draws.generator, m, k)
        return codes, x_scale, weight, draws.scales(1, 1), bf16_x, bfloat16(draws.generator, n, k)

    def ours(s: tuple[Tensor, ...], function: Callable[..., Tensor] = kernels.int_linear) -> Tensor:
        return function(s[0], s[1], None, s[2], s[3], 0.0, None, torch.bfloat16)

    arms: dict[str, Callable[[Any], Tensor]] = {OURS: ours, BF16: lambda s: F.linear(s[4], s[5])}
    arms[INT8] = lambda s: torch.ops.aten._int_mm(s[0], s[2].t())
    every = [operands() for _ in range(sets)]
    return Products("int_linear", arms, every, lambda s: ours(s, reference.int_linear), 2 * m * n * k)


def input_gradient(draws: Draws, m: int, n: int, k: int, sets: int) -> Products:
    """Gradient of the output (m, n) times weight codes (n, k), one scale for all."""

    def operands() -> tuple[Tensor, ...]:
        grad, codes = bfloat16(draws.generator, m, n), draws.codes(n, k, ternary=True)
        return grad, codes, draws.scales(1, 1), bfloat16(draws.generator, n, k)

    def ours(s: tuple[Tensor, ...], function: Callable[..., Tensor] = kernels.fixed_matmul) -> Tensor:
        return function(s[0], None, s[1], 0.0, s[2], torch.bfloat16)

    arms: dict[str, Callable[[Any], Tensor]] = {OURS: ours, BF16: lambda s: s[0] @ s[3]}
    every = [operands() for _ in range(sets)]
    return Products("fixed_matmul", arms, every, lambda s: ours(s, reference.fixed_matmul), 2 * m * n * k)


def weight_gradient(draws: Draws, m: int, n: int, k: int, sets: int) -> Products:
    """Gradient of the output (m, n), transposed, times activation codes (m, k) with a scale for each token."""

    def operands() -> tuple[Tensor, ...]:
        grad, codes = bfloat16(draws.generator, m, n), draws.codes(m, k)
        return grad, codes, draws.scales(m, 1), bfloat16(draws.generator, m, k)

    def ours(s: tuple[Tensor, ...], function: Callable[..., Tensor] = kernels.fixed_matmul) -> Tensor:
        return function(s[0].t(), s[2], s[1], 0.0, None, torch.bfloat16)

    arms: dict[str, Callable[[Any], Tensor]] = {OURS: ours, BF16: lambda s: s[0].t() @ s[3]}
    every = [operands() for _ in range(sets)]
    return Products("fixed_matmul", arms, every, lambda s: ours(s, reference.fixed_matmul), 2 * m * n * k)


PRODUCTS = {"forward": forward_product, "input gradient": input_gradient, "weight gradient": weight_gradient}


def in_graphs(calls: dict[str, Callable[[Any], Any]], sets: list[Any], settings: Settings) -> tuple[Arms, dict[str, str]]:
    """Each arm over all operands as a graph, and what is wrong with those that cannot be one."""
    graphs: Arms = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        whole = over(call, sets)
        graph, wrong = attempt(name, lambda whole=whole: captured(whole, settings.device), settings.device)
        if wrong is None:
            graphs[name] = graph
        else:
            failed[name] = wrong
    return graphs, failed


def measure_product(title: str, n: int, k: int, sizes: Sizes, settings: Settings) -> list[Row]:
    draws = Draws(settings.device)
    product = PRODUCTS[title](draws, sizes.tokens, n, k, sizes.sets)
    check(product.arms[OURS](product.sets[0]), product.definition(product.sets[0]), product.operation)
    graphs, failed = in_graphs(product.arms, product.sets, settings)
    seconds, late = timed(graphs, sizes.rounds, settings.device)
    failed |= late
    rows: list[Row] = []
    for name in product.arms:
        row: Row = {"product": title, "rows": sizes.tokens, "shape": f"{n}x{k}", "arm": name}
        if name in seconds:
            each = seconds[name] / len(product.sets)
            faster = seconds[BF16] / seconds[name] if BF16 in seconds else "-"
            rows.append(row | {"ms": each * 1e3, "TOPS": product.flops / each / 1e12, "x bfloat16": faster})
        else:
            rows.append(row | {"ms": failed[name], "TOPS": "-", "x bfloat16": "-"})
    return rows


# ---- quantization ----


class Pass(NamedTuple):
    """One pass over memory. Attributes: call: with the body of the operation and a matrix."""

    operation: str
    call: Callable[[Callable[..., Any], Tensor], Any]


def passes(device: torch.device, k: int) -> dict[str, Pass]:
    """Over bfloat16 (rows, k), as layers call them: weights have one scale for all."""
    gain, one = torch.ones(k, device=device, dtype=torch.bfloat16), torch.full((1, 1), 0.8, device=device)
    return {
        "quantize_rows": Pass("quantize_rows", lambda body, x: body(x, *INT8_ROWS)),
        "norm_quantize_rows": Pass("norm_quantize_rows", lambda body, x: body(x, gain, 1e-6, *INT8_ROWS)),
        "mean_magnitudes, one row": Pass("mean_magnitudes", lambda body, x: body(x.view(1, -1))),
        "mean_magnitudes, each row": Pass("mean_magnitudes", lambda body, x: body(x)),
        "quantize_weight": Pass("quantize_weight", lambda body, x: body(x.view(1, -1), one, 0.0, -1, 1, torch.int8)),
        "quantize_pack, ternary": Pass("quantize_pack", lambda body, x: body(x, one, -1, 1, TERNARY)),
    }


def measure_pass(title: str, sizes: Sizes, settings: Settings) -> Row:
    n, k = sizes.shapes[-1]
    one, draws = passes(settings.device, k)[title], Draws(settings.device)
    serving, definition = getattr(kernels, one.operation), getattr(reference, one.operation)
    sets = [bfloat16(draws.generator, n, k) for _ in range(sizes.sets)]
    result = one.call(serving, sets[0])
    check(result, one.call(definition, sets[0]), one.operation)
    moved = sets[0].nbytes + sum(part.nbytes for part in (result if isinstance(result, tuple) else (result,)))
    copy, copied = copy_arm(settings)
    graphs, failed = in_graphs({title: lambda x: one.call(serving, x)}, sets, settings)
    seconds, late = timed({COPY: copy, **graphs}, sizes.rounds, settings.device)
    row: Row = {"operation": title, "shape": f"{n}x{k}"}
    if title not in seconds:
        return row | {"us": (failed | late)[title], "GB/s": "-", "of copy": "-"}
    each = seconds[title] / len(sets)
    return row | {"us": each * 1e6, "GB/s": moved / each / 1e9, "of copy": moved / each * seconds[COPY] / copied}


# ---- the section ----


def measure(settings: Settings) -> Section:
    sizes = SMOKE if settings.smoke else FULL
    section = Section(tables={"products": [], "quantization": []})
    for title in passes(settings.device, 1):
        say(f"  {title}")
        wrong = settings.why_not(title.split(",")[0])
        row = None
        if wrong is None:
            row, wrong = attempt(title, lambda title=title: measure_pass(title, sizes, settings), settings.device)
        shape = "x".join(map(str, sizes.shapes[-1]))
        section.tables["quantization"].append(
            row or {"operation": title, "shape": shape, "us": wrong, "GB/s": "-", "of copy": "-"}
        )
    for title in PRODUCTS:
        for n, k in sizes.shapes:
            say(f"  product: {title}, {sizes.tokens} rows, {n}x{k}")
            wrong = settings.why_not("int_linear" if title == "forward" else "fixed_matmul")
            rows = None
            if wrong is None:
                call = lambda title=title, n=n, k=k: measure_product(title, n, k, sizes, settings)  # noqa: E731
                rows, wrong = attempt(title, call, settings.device)
            none = {"product": title, "rows": sizes.tokens, "shape": f"{n}x{k}", "arm": OURS}
            section.tables["products"] += rows or [none | {"ms": wrong, "TOPS": "-", "x bfloat16": "-"}]
    return section
