"""What the GPU benchmarks share: device, time limit, interleaved timing with events, graphs, rows that may fail. Own.

A benchmark of a machine that one has for minutes must not end at its first surprise: an arm that cannot run is a row of the
table with the first line of its error. Without a GPU the same code runs on the CPU, where its figures mean nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_bitnet.kernels import parity

Arms = dict[str, Callable[[], object]]
Row = dict[str, Any]
GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """What a section is told.

    Attributes:
        smoke: tiny sizes, to see that it runs.
        seconds: after so many, counted from here, nothing new is begun.
        refused: operations that failed their parity check: nothing that rests on them is timed.
    """

    smoke: bool = False
    seconds: float = 600.0
    refused: tuple[str, ...] = ()
    began: float = field(default_factory=time.monotonic)
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def why_not(self, *operations: str, seconds: float = 0.0) -> str | None:
        """Why what rests on these operations, and takes so long, is not timed; None if it is."""
        failed = [operation for operation in operations if operation in self.refused]
        if failed:
            return f"not timed: parity failed for {', '.join(failed)}"
        return "skipped: no time left" if self.left() < seconds else None


class NotTimedError(Exception):
    """Why an arm has no figure; its text goes into the table."""


@dataclass
class Section:
    """What a section found.

    Attributes:
        tables: title -> rows. bars: what was aimed at, what was found. failed: operations with a wrong result.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    bars: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def bar(self, name: str, found: float | None, limit: float, *, at_least: bool) -> None:
        """Notes a bar; None where nothing was measured."""
        met = "-" if found is None else "yes" if (found >= limit if at_least else found <= limit) else "no"
        shown = "not measured" if found is None else found
        self.bars.append({"bar": name, "wanted": f"{'>=' if at_least else '<='} {limit:g}", "found": shown, "met": met})


def say(text: str) -> None:
    print(text, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: BaseException) -> str:
    """An error for a cell of a table."""
    text = str(error).strip().splitlines()
    if isinstance(error, NotTimedError):
        return text[0]
    return f"{type(error).__name__}: {text[0][:100] if text else ''}"


def attempt(name: str, call: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
    """(result, None), or (None, what went wrong). What a failed call held is freed."""
    start = time.perf_counter()
    try:
        result, wrong = call(), None
        synchronize(device)
    except Exception as error:
        result, wrong = None, first_line(error)
    if wrong is not None:  # here, where the error no longer holds the frames
        say(f"    {name}: {wrong}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    elif time.perf_counter() - start > 5:
        say(f"    {name}: first call {time.perf_counter() - start:.0f} s")
    return result, wrong


def timed(arms: Arms, rounds: int, device: torch.device, warmup: int = 2) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of every arm that runs, and what is wrong with the others. All take turns, round after round."""
    failed: dict[str, str] = {}
    for name, call in arms.items():
        wrong = attempt(name, call, device)[1]
        if wrong is not None:
            failed[name] = wrong
    running = {name: call for name, call in arms.items() if name not in failed}
    times = interleave(running, rounds, device, warmup)
    return {name: median(seconds) for name, seconds in times.items()}, failed


def interleave(arms: Arms, rounds: int, device: torch.device, warmup: int) -> dict[str, list[float]]:
    """Seconds of each call: on the GPU between two events, on the CPU by its clock."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-warmup, rounds):
        ends: dict[str, Callable[[], float]] = {}
        for name, call in arms.items():
            ends[name] = _begun(device)
            call()
            ends[name] = _ended(ends[name], device)
        synchronize(device)
        for name, elapsed in ends.items():
            if turn >= 0:
                seconds[name].append(elapsed())
    return seconds


def _begun(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ended(begun: Any, device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        elapsed = time.perf_counter() - begun
        return lambda: elapsed
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    return lambda: begun.elapsed_time(end) / 1e3


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`call` as one CUDA graph, so that what is timed are its kernels and not the launches; itself on the CPU."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # tuning and first allocations cannot be captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def over(call: Callable[[Any], object], items: Iterable[Any]) -> Callable[[], object]:
    """Calls with each item in turn; the results are dropped."""
    items = list(items)

    def each() -> None:
        for item in items:
            call(item)

    return each


def check(found: Any, expected: Any, operation: str) -> None:
    """Raises NotTimedError where `found` is not what the reference returned."""
    wrong = parity.difference(found, expected, operation)
    if wrong is not None:
        raise NotTimedError(f"not timed: wrong result of {operation}: {wrong}")


def copy_arm(settings: Settings, bytes_: int = GIB) -> tuple[Callable[[], object], int]:
    """A device-to-device copy, and the bytes that it reads and writes: what memory bandwidth is taken to be."""
    size = 1 << 16 if settings.smoke else bytes_
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def ratio(seconds: dict[str, float], over_: str, under: str) -> float | None:
    """How many times as long one arm takes as the other; None where one has no figure."""
    return seconds[over_] / seconds[under] if over_ in seconds and under in seconds else None


def bfloat16(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal random numbers on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
