"""What the tests of the CPU kernels share: why there are none, their levels, checks in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_bitnet.kernels.cpu import library

REASON = library.why_unavailable()
LEVELS = library.legal_levels() if REASON is None else ()
needs_cpu_kernels = pytest.mark.skipif(REASON is not None, reason=f"no CPU kernels: {REASON}")


def failures_in_threads(check: Callable[[int], bool], rounds: int, count: int = 4) -> list[int]:
    """Calls `check(i)` so many rounds in thread i of `count`, all at once; returns i for every call that returned False."""
    together = threading.Barrier(count)

    def work(i: int) -> list[int]:
        together.wait()
        return [i for _ in range(rounds) if not check(i)]

    with ThreadPoolExecutor(count) as pool:
        return [i for failures in pool.map(work, range(count)) for i in failures]
