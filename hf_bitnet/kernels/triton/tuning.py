"""How kernels choose the sizes of their tiles: measured once for a shape, kept on disk by Triton, never at import. Own.

The number of rows counts by its `support.bucket`, so that batches of another length measure nothing anew. While a CUDA graph
is captured nothing can be measured: the first sensible configuration serves in that graph, and a call before the capture would
have chosen. Triton's tuner keeps the arguments of the call it is in; threads therefore launch tuned kernels one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from .language import INTERPRETED

# below this dot products have no instruction
SMALLEST_ROWS = 16


def sizes(rows: int, columns: int, depth: int, warps: int, stages: int) -> triton.Config:
    """Tiles of a product: (rows, depth) x (columns, depth)."""
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}, num_warps=warps, num_stages=stages)


def tuned(interpreted: triton.Config, configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """`triton.autotune` over `configs` by `key`, its choices on disk; `interpreted` alone in the interpreter."""
    choices = [interpreted] if INTERPRETED.value else list(configs)
    prune = {"early_config_prune": _sensible}

    def decorate(kernel: Any) -> Any:
        return _guarded(triton.autotune(choices, list(key), prune_configs_by=prune, cache_results=True)(kernel))

    return decorate


def _sensible(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Without those whose tiles would be mostly empty."""
    rows = max(arguments.get("bucket", SMALLEST_ROWS), SMALLEST_ROWS)
    return [each for each in configs if each.kwargs.get("BLOCK_M", 0) <= rows] or configs[-1:]


def _guarded(tuner: Any) -> Any:
    """`tuner`, for several threads and for the capture of graphs."""
    lock = threading.RLock()

    def run(*args: Any, **options: Any) -> Any:
        with lock:
            launch = type(tuner).run
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                return launch(tuner, *args, **options)
            known, kept = set(tuner.cache), (tuner._bench, tuner.cache_results)
            tuner._bench, tuner.cache_results = _unmeasured, False
            try:
                return launch(tuner, *args, **options)
            finally:
                tuner._bench, tuner.cache_results = kept
                for key in set(tuner.cache) - known:  # to be measured at a call outside
                    del tuner.cache[key]

    tuner.run = run
    return tuner


def _unmeasured(*_: Any, **__: Any) -> float:
    return 0.0
