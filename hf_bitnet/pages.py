"""Floor 0: memory of the process. Gives back that of a mapped file which was read, keeps that of tensors for the next. Own.

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

# of malloc.h: from how many bytes on the free end of the heap is given back, and a block is mapped for itself
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _NEVER = -1, -3, 2**31 - 1


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


def keep_freed_memory() -> bool:
    """Lets this process keep the memory of tensors that are freed, for the next ones. For CPUs; from now on, to its end.

    glibc gives large blocks (logits, above all) back to the system, which hands them out again page by page, each cleared: a
    fifth of a training step of a small language model in float32 (`recipes/LOG.md`). The commands and recipes of this library
    call it; in a program of yours call it once, before training or after loading a model to run. Memory that the process once
    needed stays with it, and holes between tensors may add to that.

    Returns whether there was something to do: False without glibc, and for tensors on other devices nothing changes.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return all(libc.mallopt(parameter, _NEVER) for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


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
