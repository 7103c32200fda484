"""How kernels choose the sizes of their tiles: measured once for a shape, kept on disk by Triton, never at import. Own.

The number of rows counts by its `support.bucket`, so that batches of another length measure nothing anew. While a CUDA graph
is captured nothing can be measured: the first configuration serves then, and a call before the capture would have chosen.
"""

from __future__ import annotations

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
    if INTERPRETED.value:
        return triton.autotune([interpreted], list(key))
    return triton.autotune(list(configs), list(key), prune_configs_by={"early_config_prune": _sensible}, cache_results=True)


def _sensible(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Without those whose tiles would be mostly empty; one alone during the capture of a graph."""
    rows = max(arguments.get("bucket", SMALLEST_ROWS), SMALLEST_ROWS)
    chosen = [each for each in configs if each.kwargs.get("BLOCK_M", 0) <= rows] or configs[-1:]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return chosen[:1]
    return chosen
