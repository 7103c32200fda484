"""The CPU kernels against the machine's own limits and against torch: packed products, weight quantization and packing.

rows    one row times packed weights that come from memory (a ring of matrices that no cache holds): bytes per second as a
        share of what a plain streaming read reaches; times faster than torch's bfloat16 and int4 products.
matrix  32, 128 and 512 rows: operations per second as a share of the product instruction's own peak (`cpu_limits.cpp`);
        times faster than torch's bfloat16 product and its int8 product of codes (which quantizes and scales nothing).
pack    absmean ternary quantization and packing of a 1B model's linear layers, and quantize_model + pack_model on it.

Everything is called as the library's layers call it, from bfloat16 rows to bfloat16 rows, and all arms take turns. "From C"
the same products of one row are called back to back without Python, which shows what a call costs.

    python -m benchmarks.cpu_kernels                                # all of it: some minutes and 8 GB
    python -m benchmarks.cpu_kernels --only rows --levels avx2      # writes no results
    python -m benchmarks.cpu_kernels --smoke                        # small sizes, to see that it runs; writes no results
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_bitnet as hb
from benchmarks.common import interleave, table, write_results
from benchmarks.cpu_limits import STREAMS, Limits
from hf_bitnet import kernels
from hf_bitnet.kernels import Layout, RowQuantization
from hf_bitnet.kernels.cpu import library
from hf_bitnet.quantizers import WeightQuantizer

LAYOUTS = {2: Layout(2, -1), 1: Layout(1, -1, 2), 4: Layout(4, -7)}  # ternary, binary, int4
INT8_ROWS = RowQuantization(-128, 127, 1e-5)
INT4_GROUP = 128
BF16, INT4, INT8, READ = "torch bfloat16", "torch int4pack", "torch._int_mm", "read"
MIB = 1 << 20

Arms = dict[str, Callable[[], object]]
Row = dict[str, Any]


# products of many rows that an arm does in a turn, each with other weights from memory
IN_TURN = 8


class Sizes(NamedTuple):
    """Attributes: shapes: (outputs, inputs). ring, chunk: bytes of all matrices, and of those that an arm does in a turn."""

    shapes: list[tuple[int, int]]
    ring: int
    chunk: int
    rounds: int
    llama: dict[str, Any]


FULL = Sizes(
    shapes=[(2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096)],
    ring=1152 * MIB,
    chunk=32 * MIB,
    rounds=15,
    llama={"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
)
SMOKE = Sizes(
    shapes=[(128, 256)],
    ring=MIB,
    chunk=MIB // 4,
    rounds=2,
    llama={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
)


class Ring:
    """Memory larger than the caches, handed out in chunks. Whoever takes one gets what was not touched for the longest time.

    Attributes:
        chunks: the memory, a flat tensor each.
    """

    def __init__(self, data: Tensor, chunk_bytes: int) -> None:
        self.chunks = data.split(chunk_bytes // data.itemsize)
        self._turns = itertools.cycle(range(len(self.chunks)))

    def take(self) -> int:
        """The next chunk's number."""
        return next(self._turns)

    def matrices(self, rows: int, row_bytes: int, dtype: torch.dtype) -> list[list[Tensor]]:
        """Each chunk as matrices (rows, row_bytes / itemsize), as many as it holds."""
        size = rows * row_bytes // dtype.itemsize
        flat = [chunk.view(dtype) for chunk in self.chunks]
        return [[part.view(rows, -1) for part in chunk.split(size) if part.numel() == size] for chunk in flat]


def repeated(tile: Tensor, bytes_: int) -> Tensor:
    """A flat tensor of that many bytes: `tile` again and again. Timings do not depend on the numbers, and this is fast."""
    out = torch.empty(bytes_ // tile.itemsize, dtype=tile.dtype)
    for part in out.split(tile.numel()):
        part.copy_(tile[: part.numel()])
    return out


def make_rings(sizes: Sizes) -> tuple[Ring, Ring]:
    """Packed codes (bytes of four ternary codes) and bfloat16 weights."""
    levels = torch.randint(0, 3, (min(16 * MIB, sizes.ring), 4), dtype=torch.uint8)
    codes = levels[:, 0] | levels[:, 1] << 2 | levels[:, 2] << 4 | levels[:, 3] << 6
    floats = torch.randn(len(codes) // 2).bfloat16()
    return Ring(repeated(codes, sizes.ring), sizes.chunk), Ring(repeated(floats, sizes.ring), sizes.chunk)


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Sets torch's threads; afterwards puts them and the kernels' level back."""
    before = torch.get_num_threads(), library.level()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        library.choose_level(before[1])


def packed_arm(
    level: str, ring: Ring, weights: list[list[Tensor]], x: Tensor, layout: Layout, most: int
) -> Callable[[], object]:
    """The library's product of float rows with the next `most` packed weights of the ring, at one level."""
    scale = torch.full((1, 1), 0.02)

    def turn() -> None:
        library.choose_level(level)
        for weight in weights[ring.take()][:most]:
            kernels.packed_linear(x, weight, scale, None, layout, INT8_ROWS, x.dtype)

    return turn


def arm_from_c(
    limits: Limits, level: str, ring: Ring, weights: list[list[Tensor]], x: Tensor, layout: Layout
) -> Callable[[], object]:
    """The same of all weights of a chunk, called back to back from C."""
    scale = torch.full((1, 1), 0.02)

    def turn() -> None:
        library.choose_level(level)
        limits.packed_rows(x, weights[ring.take()], scale, layout)

    return turn


def torch_arm(ring: Ring, weights: list[list[Tensor]], call: Callable[[Tensor], object], most: int) -> Callable[[], object]:
    """`call` of the next `most` weights of the ring."""

    def turn() -> None:
        for weight in weights[ring.take()][:most]:
            call(weight)

    return turn


def repeat(call: Callable[[], object], times: int) -> Callable[[], object]:
    def turn() -> None:
        for _ in range(times):
            call()

    return turn


# ---- limits ----


def read_arm(limits: Limits, ring: Ring, streams: int) -> Callable[[], object]:
    return lambda: limits.read(ring.chunks[ring.take()], streams)


def peak_arm(limits: Limits, level: str) -> Callable[[], object]:
    return lambda: limits.peak(level)


def measure_limits(limits: Limits | None, ring: Ring, sizes: Sizes, levels: list[str]) -> tuple[list[Row], int]:
    """Streaming reads and peaks; and with how many streams a core reads fastest."""
    if limits is None:
        return [], 0
    operations = {level: limits.peak(level) for level in levels}
    reads = {streams: f"read, streams a thread: {streams}" for streams in STREAMS}
    peaks = {level: f"peak {level}" for level in levels if operations[level]}
    arms: Arms = {name: read_arm(limits, ring, streams) for streams, name in reads.items()}
    arms |= {name: peak_arm(limits, level) for level, name in peaks.items()}
    seconds = {name: median(times) for name, times in interleave(arms, sizes.rounds).items()}
    rows: list[Row] = [{"limit": name, "GB/s": sizes.chunk / seconds[name] / 1e9, "TOPS": "-"} for name in reads.values()]
    for level, name in peaks.items():
        rows.append({"limit": name, "GB/s": "-", "TOPS": operations[level] / seconds[name] / 1e12})
    return rows, min(STREAMS, key=lambda streams: seconds[reads[streams]])


# ---- one row ----


def measure_rows(rings: tuple[Ring, Ring], limits: Limits | None, streams: int, sizes: Sizes, levels: list[str]) -> list[Row]:
    """Packed products of one row, every arm a chunk of the ring in a turn."""
    rows = []
    for (bits, layout), (n, k) in itertools.product(LAYOUTS.items(), sizes.shapes):
        ring, floats = rings
        x = torch.randn(1, k, dtype=torch.bfloat16)
        packed = ring.matrices(n, k * bits // 8, torch.uint8)
        int4, bf16 = ring.matrices(n, k // 2, torch.uint8), floats.matrices(n, k * 2, torch.bfloat16)
        group_scales = torch.ones(k // INT4_GROUP, n, 2, dtype=torch.bfloat16)
        arms: Arms = {} if limits is None else {READ: read_arm(limits, ring, streams)}
        arms |= {level: packed_arm(level, ring, packed, x, layout, len(packed[0])) for level in levels}
        if limits is not None:
            arms |= {f"{level}, from C": arm_from_c(limits, level, ring, packed, x, layout) for level in levels}
        used = {**dict.fromkeys([name for name in arms if name != READ], packed), BF16: bf16, INT4: int4}
        arms[BF16] = torch_arm(floats, bf16, lambda weight, x=x: F.linear(x, weight), len(bf16[0]))
        arms[INT4] = torch_arm(ring, int4, lambda weight, x=x, scales=group_scales: _int4pack(x, weight, scales), len(int4[0]))
        for _ in ring.chunks:  # the first call of each weight is not the one that decoding repeats
            arms[levels[-1]]()
        seconds = {name: median(times) for name, times in interleave(arms, 2 * sizes.rounds).items()}
        rows += row_results(f"{n}x{k}", bits, seconds, used, sizes.chunk)
        print(table(rows[-len(used) :]), flush=True)
    return rows


def _int4pack(x: Tensor, weight: Tensor, group_scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, INT4_GROUP, group_scales)


def row_results(shape: str, bits: int, seconds: dict[str, float], used: dict[str, list[list[Tensor]]], chunk: int) -> list[Row]:
    """One row of the table for each product; `seconds` of a turn."""
    each = {name: seconds[name] / len(weights[0]) for name, weights in used.items()}
    rows = []
    for name, weights in used.items():
        speed = weights[0][0].nbytes / each[name] / 1e9
        share = speed * 1e9 * seconds[READ] / chunk if READ in seconds else math.nan
        row = {"bits": bits, "shape": shape, "arm": name, "us": each[name] * 1e6, "GB/s": speed, "of read": share}
        rows.append(row | {"x bfloat16": each[BF16] / each[name], "x int4pack": each[INT4] / each[name]})
    return rows


# ---- many rows ----


def measure_matrix(rings: tuple[Ring, Ring], limits: Limits | None, sizes: Sizes, levels: list[str]) -> list[Row]:
    """Products of 32, 128 and 512 rows with ternary weights, every arm some products in a turn, as layers follow each other."""
    rows = []
    for (n, k), m in itertools.product(sizes.shapes, (32, 128, 512)):
        ring, floats = rings
        x = torch.randn(m, k, dtype=torch.bfloat16)
        codes, _ = kernels.quantize_rows(x, *INT8_ROWS)
        packed, int8 = ring.matrices(n, k // 4, torch.uint8), ring.matrices(n, k, torch.int8)
        bf16 = floats.matrices(n, k * 2, torch.bfloat16)
        operations = {f"peak {level}": limits.peak(level) for level in levels} if limits else {}
        arms: Arms = {level: packed_arm(level, ring, packed, x, LAYOUTS[2], 1) for level in levels}
        arms[BF16] = torch_arm(floats, bf16, lambda weight, x=x: F.linear(x, weight), 1)
        arms[INT8] = torch_arm(ring, int8, lambda weight, codes=codes: torch.ops.aten._int_mm(codes, weight.t()), 1)
        products = list(arms)
        # what other arms leave behind (threads asleep, matrix units without power, caches) is not each product's
        in_turn = {name: 1 if name == "portable" else IN_TURN for name in products}
        arms = {name: repeat(arm, in_turn[name]) for name, arm in arms.items()}
        if limits is not None:
            arms |= {f"peak {level}": peak_arm(limits, level) for level in levels if operations[f"peak {level}"]}
        medians = {name: median(times) for name, times in interleave(arms, sizes.rounds if m < 512 else 7, 1).items()}
        seconds = {name: time / in_turn.get(name, 1) for name, time in medians.items()}
        for name in products:
            speed = 2 * m * n * k / seconds[name]
            peak = f"peak {name}"
            share = speed * seconds[peak] / operations[peak] if peak in seconds else math.nan
            row = {"rows": m, "shape": f"{n}x{k}", "arm": name, "ms": seconds[name] * 1e3, "TOPS": speed / 1e12}
            faster = {f"x {peer}": seconds[peer] / seconds[name] for peer in (BF16, INT8)}
            rows.append(row | {"of peak": share} | faster)
        print(table(rows[-len(products) :]), flush=True)
    return rows


# ---- quantization and packing ----


def random_llama(shape: dict[str, Any]) -> LlamaForCausalLM:
    """A float32 Llama with normal weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    model = model.to_empty(device="cpu")
    tile = torch.randn(4 * MIB) * 0.02
    for parameter in model.parameters():
        parameter.data = repeated(tile, parameter.nbytes).view(parameter.shape)
    return model


def quantize_and_pack(weights: list[Tensor], quantizer: WeightQuantizer, spent: dict[str, float]) -> None:
    """What packing one layer after another costs when nothing is kept but bytes and scale; adds seconds to `spent`."""
    grid = quantizer.grid
    layout = Layout(quantizer.storage_bits, grid.lowest, grid.step, grid.zero_point)
    for weight in weights:
        start = time.perf_counter()
        scale = quantizer.compute_scale(weight)
        scaled = time.perf_counter()
        kernels.quantize_pack(weight, scale, grid.lowest, grid.highest, layout)
        spent["scale"] = spent.get("scale", 0.0) + scaled - start
        spent["quantize_pack"] = spent.get("quantize_pack", 0.0) + time.perf_counter() - scaled


def measure_pack(limits: Limits | None, streams: int, sizes: Sizes) -> list[Row]:
    """Three times in turn: a plain read of the weights, their quantization and packing, and the two calls on the model."""
    model = random_llama(sizes.llama)
    config = hb.BitNetQuantizationConfig.bitnet_b158()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    weights, quantizer = [layer.weight.detach() for layer in layers.values()], config.layer(next(iter(layers))).quantizer()
    steps: dict[str, list[float]] = {}
    for _ in range(3):
        spent: dict[str, float] = {}
        start = time.perf_counter()
        if limits is not None:
            for weight in weights:
                limits.read(weight, streams)
            spent["plain read"] = time.perf_counter() - start
        quantize_and_pack(weights, quantizer, spent)
        spent["scale + quantize_pack"] = spent["scale"] + spent["quantize_pack"]
        # another model of the same parameters, which are not copied
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        start = time.perf_counter()
        twin = hb.quantize_model(twin, config, progress=False)
        quantized = time.perf_counter()
        hb.pack_model(twin, progress=False)
        spent["quantize_model"], spent["pack_model"] = quantized - start, time.perf_counter() - quantized
        spent["quantize_model + pack_model"] = spent["quantize_model"] + spent["pack_model"]
        for step, seconds in spent.items():
            steps.setdefault(step, []).append(seconds)
    size = sum(weight.nbytes for weight in weights) / 1e9
    rows = [{"step": step, "s": median(times), "GB/s of float32": size / median(times)} for step, times in steps.items()]
    print(table(rows), flush=True)
    return rows


# ---- the command ----

PARTS = ["rows", "matrix", "pack"]


def measure(parts: list[str], sizes: Sizes, levels: list[str]) -> dict[str, Any]:
    """The tables of these parts, printed as they come."""
    limits = None
    try:
        limits = Limits()
    except RuntimeError as reason:
        print(f"no limits of the machine, so no shares of them: {reason}")
    rings = make_rings(sizes)
    limit_rows, streams = measure_limits(limits, rings[0], sizes, levels)
    results: dict[str, Any] = {"limits": limit_rows}
    if limit_rows:
        print(table(limit_rows), flush=True)
    if "rows" in parts:
        results["rows"] = measure_rows(rings, limits, streams, sizes, levels)
    if "matrix" in parts:
        results["matrix"] = measure_matrix(rings, limits, sizes, levels)
    del rings
    if "pack" in parts:
        results["pack"] = measure_pack(limits, streams, sizes)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--levels", nargs="+", choices=library.LEVELS, help="default: all that are legal here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing written")
    args = parser.parse_args(argv)
    if reason := library.why_unavailable():
        parser.error(f"there are no CPU kernels to measure: {reason}")
    levels = args.levels or list(library.legal_levels())
    if illegal := [level for level in levels if level not in library.legal_levels()]:
        parser.error(f"--levels {' '.join(illegal)}: legal here: {', '.join(library.legal_levels())}")
    # results lie in memory that earlier ones used, for every arm: what the system takes for fresh pages is not a product's
    hb.keep_freed_memory()
    with threads_set(args.threads):
        results = measure(args.only, SMOKE if args.smoke else FULL, levels)
        if not args.smoke and args.only == PARTS and not args.levels:
            print(write_results("cpu_kernels", results))


if __name__ == "__main__":
    main()
