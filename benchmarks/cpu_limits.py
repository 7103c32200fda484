"""What this machine can do at most: `cpu_limits.cpp`, compiled for the processor it runs on and opened by ctypes. Own.

Also the packed products called from C, to tell what the kernel costs from what calling it from Python costs. All of it
runs on torch's threads, as the kernels do, so that a fork and a join cost both the same.

Leaves out: timing (common.py); which limit a kernel is held against (cpu_kernels.py).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hf_bitnet.kernels import Layout
from hf_bitnet.kernels.cpu import library

STREAMS = (1, 2, 4, 8)
# of the loop that measures an instruction's peak: one to two milliseconds with vectors, some ten with tiles
_ROUNDS = 500_000
_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADERS = Path(library.__file__).with_name("src")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", f"-I{_HEADERS}")


class Limits:
    """The compiled loops, on `torch.get_num_threads()` threads."""

    def __init__(self) -> None:
        """Compiles in a temporary folder. Raises RuntimeError where there is no compiler or it cannot."""
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if compiler is None:
            raise RuntimeError("no C++ compiler here")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "cpu_limits.so"
            command = [*compiler.split(), *_FLAGS, "-o", str(path), str(_SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{compiler} cannot compile {_SOURCE.name}: {done.stderr.strip().splitlines()[-1]}")
            loops = ctypes.CDLL(str(path))
        self._read, self._peak, self._rows = loops.limits_read, loops.limits_peak, loops.limits_rows
        i64, pointer = ctypes.c_int64, ctypes.c_void_p
        self._rows.argtypes, self._rows.restype = [pointer, pointer, *[i64] * 6, *[pointer] * 3], i64
        self._read.argtypes, self._read.restype = [pointer, i64, i64, pointer, i64], i64
        self._peak.argtypes, self._peak.restype = [i64, i64, pointer, i64], i64
        self._for_range = _torch_parallel_for()

    def _threads(self) -> int:
        return torch.get_num_threads() if self._for_range else 1

    def read(self, data: Tensor, streams: int) -> None:
        """Reads all of `data` (contiguous, any dtype), each thread a part of it, in `streams` places at once."""
        given = data.data_ptr(), data.nbytes, streams, self._for_range, self._threads()
        if self._read(*given) < 0:
            raise ValueError(f"a read has {', '.join(map(str, STREAMS))} streams and at most 64 threads, not {given[2:]}")

    def peak(self, level: str) -> int:
        """Runs the product instruction of a legal level alone; how many operations that was. 0: it has none of its own."""
        return self._peak(library.LEVELS.index(level), _ROUNDS, self._for_range, self._threads())

    def packed_rows(self, x: Tensor, weights: list[Tensor], scale: Tensor, layout: Layout) -> Tensor:
        """`kernels.packed_linear` of x bfloat16 (1, K) with weights (N, B) that lie one after another -> the last result."""
        n, k = weights[0].shape[0], x.shape[1]
        out = torch.empty(1, n, dtype=torch.bfloat16)
        linear = ctypes.cast(library.functions().hb_linear, ctypes.c_void_p)
        stored = layout.bits, layout.lowest, layout.step
        addresses = x.data_ptr(), scale.data_ptr(), out.data_ptr()
        if error := self._rows(linear, weights[0].data_ptr(), len(weights), n, k, *stored, *addresses):
            raise RuntimeError(f"hb_linear returned {error}")
        return out


def _torch_parallel_for() -> int | None:
    """Its address; None where torch (before 2.10) does not export it: the kernels then have one thread too."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value
