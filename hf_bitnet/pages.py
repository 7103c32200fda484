"""Gives back the memory of a mapped file that has been read, so that a large checkpoint passes through little of it. Own.

A checkpoint is mapped, not read: each of its pages counts as memory of the process from the moment that it is first looked at.
Linux says of every page whether it still is the file's; such a one can be dropped, and comes back from the file when it is
looked at again. Pages that were written to are kept. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

# of an entry of /proc/self/pagemap: the page is in memory, swapped out, of a file (or shared) and not this process's own
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61


def release_mapped(tensor: Tensor) -> int:
    """Drops the pages of a CPU tensor that lies in a mapped file, unless one of them was changed. Nothing may write meanwhile.

    Returns the bytes that were dropped; 0 where the tensor does not lie in a file.
    """
    if not tensor.is_cpu or not tensor.is_contiguous() or not (drop := _madvise()):
        return 0
    size = mmap.PAGESIZE
    first, end = -(-tensor.data_ptr() // size), (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // size
    if end <= first or not _are_of_file(first, end - first):
        return 0
    failed = drop(ctypes.c_void_p(first * size), ctypes.c_size_t((end - first) * size), mmap.MADV_DONTNEED)
    return 0 if failed else (end - first) * size


def _are_of_file(first: int, count: int) -> bool:
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = np.frombuffer(os.pread(file.fileno(), 8 * count, 8 * first), np.uint64)
    except OSError:  # some containers hide it
        return False
    mapped = entries & np.uint64(_PRESENT | _SWAPPED)
    clean = (mapped == 0) | ((mapped == _PRESENT) & ((entries & np.uint64(_OF_FILE)) != 0))
    return len(entries) == count and bool(mapped.any()) and bool(clean.all())


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise if sys.platform == "linux" else None
