"""Finds, checks and opens the C++ library; which instruction set it uses and whose threads. Own.

The library is one file beside this one with a plain C ABI (`src/hf_bitnet_cpu.h`). It is opened on first use, and every
process computes with one level: the best that the machine offers, or the one that `choose_level` names. Work is split by
torch's own `torch_parallel_for`, so that there is one pool of threads and `torch.set_num_threads` holds; torch before 2.10
does not export it, and the kernels then run on the calling thread.

Leaves out: what the functions compute (`bodies.py`), reading the environment (`dispatch.py`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch

ABI_VERSION = 4
LEVELS = ("portable", "avx2", "avxvnni", "avx512vnni", "amx", "neon")

_PREFIX, _SUFFIX = {"darwin": ("lib", ".dylib"), "win32": ("", ".dll")}.get(sys.platform, ("lib", ".so"))
PATH = Path(__file__).with_name(f"{_PREFIX}hf_bitnet_cpu{_SUFFIX}")

_int, _i64, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# argument types of everything that `bodies.py` calls, as in src/hf_bitnet_cpu.h
_ROWS = [_pointer, _int, _i64, _i64]  # data, dtype, rows, columns
_SIGNATURES: dict[str, list[type]] = {
    "hb_quantize_rows": [*_ROWS, _i64, _float, _float, _float, _pointer, _pointer],
    "hb_norm_quantize_rows": [*_ROWS, _i64, _pointer, _int, _float, _float, _float, _float, _pointer, _pointer],
    "hb_scale_rows": [*_ROWS, _i64, _pointer, _pointer, _int],
    "hb_abs_sums": [*_ROWS, _pointer],
    "hb_abs_maxima": [*_ROWS, _pointer],
    "hb_quantize_weight": [*_ROWS, _pointer, _float, _float, _float, _pointer, _int],
    "hb_quantize_sign": [*_ROWS, _pointer, _pointer, _int],
    "hb_quantize_pack": [*_ROWS, _pointer, _i64, _i64, _float, _float, _float, _int, _int, _int, _pointer],
    "hb_sign_pack": [*_ROWS, _pointer, _i64, _i64, _pointer],
    "hb_pack": [_pointer, _i64, _i64, _int, _int, _int, _pointer],
    "hb_unpack": [_pointer, _i64, _i64, _int, _int, _int, _pointer],
    "hb_pack_trits": [_pointer, _i64, _i64, _pointer],
    "hb_unpack_trits": [_pointer, _i64, _i64, _pointer],
    "hb_int_matmul": [_pointer, _i64, _pointer, _i64, _i64, _i64, _i64, _pointer],
    "hb_fixed_matmul": [
        *[_pointer, _int, _i64, _i64, _pointer, _i64, _i64],  # the float operand, its strides, scale and sizes
        *[_pointer, _i64, _i64, _float, _float],  # codes, their stride and columns, zero point, scale
        *[_pointer, _int, _i64],
    ],
    "hb_rms_norm": [_pointer, _i64, _i64, _i64, _i64, _pointer, _float, _pointer],
    "hb_rotate": [_pointer, _i64, _i64, _i64, _i64, _i64, _pointer, _pointer, _i64, _i64],
    "hb_decode_layers": [_pointer, _i64, _i64, _i64, _pointer, _pointer, _pointer, _i64],
    "hb_level": [],
    "hb_level_legal": [_int],
    "hb_set_level": [_int],
    "hb_set_threads": [_pointer, _pointer],
}


class _Opened:
    """The library, or why there is none; and what the kernels' threads are."""

    def __init__(self, path: Path) -> None:
        self.library: ctypes.CDLL | None = None
        self.threads = ""
        self.reason: str | None = None
        try:
            library = ctypes.CDLL(str(path))
            found = library.hb_abi_version()
            if found != ABI_VERSION:
                self.reason = f"{path.name} has ABI version {found}, this code needs {ABI_VERSION}; install hf_bitnet again"
                return
            for name, types in _SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = types, ctypes.c_int
            library.hb_set_threads.restype = None
            # without declared types a bytes object passes as its address with no conversion: 0.2 us less a call
            library.hb_linear_call.restype = library.hb_experts_call.restype = ctypes.c_int
        except (OSError, AttributeError) as error:
            missing = f"{path.name} is not there: hf_bitnet was installed without a working C++ compiler"
            self.reason = f"{path.name} cannot be loaded: {error}" if path.is_file() else missing
            return
        self.library = library
        self.threads = _share_threads(library)


def _share_threads(library: ctypes.CDLL) -> str:
    """Gives the library torch's threads; says in words what it runs on."""
    folder = Path(torch.__file__).parent / "lib"
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    # at::get_num_threads(): its C twin, torch_get_num_threads, writes through a pointer instead of returning the count
    count_name = "?get_num_threads@at@@YAHXZ" if sys.platform == "win32" else "_ZN2at15get_num_threadsEv"
    try:
        torch_cpu = ctypes.CDLL(str(folder / name))  # in the process already: the same one, not a second
        for_range, count = torch_cpu.torch_parallel_for, getattr(torch_cpu, count_name)
    except (OSError, AttributeError):
        return f"the calling one only: torch {torch.__version__} exports no torch_parallel_for (2.10 and later do)"
    library.hb_set_threads(ctypes.cast(for_range, ctypes.c_void_p), ctypes.cast(count, ctypes.c_void_p))
    if hasattr(os, "register_at_fork"):
        # a forked child has none of its parent's threads, and torch's pool would wait for them for ever
        os.register_at_fork(after_in_child=lambda: library.hb_set_threads(None, None))
    return "torch's own (torch.set_num_threads holds); in forked children the calling one"


@lru_cache(maxsize=1)
def _opened() -> _Opened:
    return _Opened(PATH)


def why_unavailable(device: str = "cpu") -> str | None:
    """Why the kernels cannot serve tensors on `device`; None when they can."""
    return f"written for the CPU, not {device}" if device != "cpu" else _opened().reason


def functions() -> ctypes.CDLL:
    """The library, with argument types set. Raises RuntimeError with the reason where there is none."""
    library = _opened().library
    if library is None:
        raise RuntimeError(f"no CPU kernels: {_opened().reason}")
    return library


def level() -> str:
    """The instruction set in use: one of LEVELS."""
    return LEVELS[functions().hb_level()]


def legal_levels() -> tuple[str, ...]:
    """The levels that were compiled in and that this machine offers, the slowest first."""
    return tuple(name for i, name in enumerate(LEVELS) if functions().hb_level_legal(i))


def choose_level(name: str) -> None:
    """Computes with level `name` from now on; not to be called while another thread computes.

    Raises:
        ValueError: the level is unknown, or this machine or this build does not offer it.
    """
    if name not in LEVELS or not functions().hb_level_legal(LEVELS.index(name)):
        what = "is not offered by this machine or this build" if name in LEVELS else "names no level"
        raise ValueError(f"HF_BITNET_CPU_LEVEL={name!r} {what}; legal here: {', '.join(legal_levels())}, or leave it unset")
    functions().hb_set_level(LEVELS.index(name))


def describe() -> str:
    """One line for people: the level in use, the levels it was chosen from, the threads; or why there are no kernels."""
    if reason := why_unavailable():
        return f"none: {reason}"
    others = [name for name in LEVELS if name not in legal_levels()]
    return (
        f"level {level()} of {', '.join(legal_levels())} (not offered by this machine or build: {', '.join(others)}); "
        f"threads: {_opened().threads}"
    )
