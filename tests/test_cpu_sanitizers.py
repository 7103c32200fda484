"""The C ABI of the CPU kernels under sanitizers, valgrind and emulators: `cpu/fuzz.cpp` against plain arithmetic.

Also what needs no compiler: random calls of the installed library, at odd addresses and strides, between guard bytes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hf_bitnet.kernels.cpu import library
from tests.cpu_kernels import LEVELS, needs_cpu_kernels

REPOSITORY = Path(__file__).resolve().parents[1]
CROSS = "aarch64-linux-gnu-g++", "qemu-aarch64"
GUARD = 0xA5

pytestmark = needs_cpu_kernels


# ---- programs ----


def need(*programs: str) -> None:
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")


def built(folder: Path, *options: str) -> Path:
    """The fuzz program of this checkout, compiled as `cpu/CMakeLists.txt` says."""
    need("cmake")
    for command in (
        ["cmake", "-S", REPOSITORY / "tests/cpu", "-B", folder, *options],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder / "fuzz"


def run(*command: object, **numbers: int) -> None:
    """Runs a fuzz program, which says what it did; any report of a tool ends it with another status than 0."""
    words = [*map(str, command), *(f"{name}={value}" for name, value in numbers.items())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{numbers['cases']} cases equal plain arithmetic" in done.stdout


def with_emulated_amx() -> tuple[str, ...]:
    """The levels of a build with -DHB_EMULATE_AMX=ON: tile instructions in plain C++ wherever AVX-512 is."""
    return tuple(dict.fromkeys((*LEVELS, "amx"))) if "avx512vnni" in LEVELS else LEVELS


def sanitized(folder: Path, kind: str) -> Path:
    program = folder / "probe"
    compiled = subprocess.run(
        ["c++", f"-fsanitize={kind}", "-x", "c++", "-", "-o", program], input="int main() {}", capture_output=True, text=True
    )
    if compiled.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"the compiler has no working -fsanitize={kind} here: {compiled.stderr[-300:]}")
    return built(folder / "build", f"-DHB_SANITIZE={kind}", "-DHB_EMULATE_AMX=ON")


@pytest.mark.slow
def test_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    need("c++")
    program = sanitized(tmp_path, "address,undefined")
    for seed, level in enumerate(with_emulated_amx()):
        run(program, f"level={level}", seed=seed, cases=2000, threads=2)
    run(program, f"level={LEVELS[-1]}", seed=99, cases=10, threads=2, slabs=1)


@pytest.mark.slow
def test_threads_do_not_race(tmp_path: Path) -> None:
    need("c++")
    program = sanitized(tmp_path, "thread")
    for seed, level in enumerate(dict.fromkeys((LEVELS[0], LEVELS[-1]))):
        run(program, f"level={level}", seed=seed, cases=600, threads=2, callers=3)


@pytest.mark.slow
def test_every_level_is_exact_at_full_optimization(tmp_path: Path) -> None:
    program = built(tmp_path / "build", "-DHB_EMULATE_AMX=ON")
    for seed, level in enumerate(with_emulated_amx()):
        run(program, f"level={level}", seed=seed, cases=10_000, threads=2, callers=2, slabs=1)


@pytest.mark.slow
def test_valgrind_sees_no_byte_that_was_not_written(tmp_path: Path) -> None:
    """Also that a processor without AVX-512, which valgrind is, meets no instruction of it."""
    need("valgrind")
    program = built(tmp_path / "build")
    for level in ("portable", "avx2"):
        if level in LEVELS:
            run("valgrind", "--quiet", "--error-exitcode=9", program, f"level={level}", seed=11, cases=200)


@pytest.mark.slow
def test_arm_level_under_emulation(tmp_path: Path) -> None:
    need(*CROSS)
    target = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS[0]}"
    program = built(tmp_path / "build", *target)
    for level in ("portable", "neon"):
        run(CROSS[1], "-L", "/usr/aarch64-linux-gnu", program, f"level={level}", seed=12, cases=1000, threads=2)


# ---- without a compiler ----


class Guarded:
    """`size` bytes at an odd address, between bytes that a call must leave alone."""

    def __init__(self, size: int, shift: int) -> None:
        self.bytes = np.full(size + 256, GUARD, dtype=np.uint8)
        self.begin, self.size = 128 + shift, size

    @property
    def address(self) -> int:
        return self.bytes.ctypes.data + self.begin

    def view(self, dtype: type, rows: int, columns: int, stride: int | None = None) -> np.ndarray:
        width = np.dtype(dtype).itemsize
        strides = (columns if stride is None else stride) * width, width
        return np.ndarray((rows, columns), dtype, self.bytes, self.begin, strides)

    def is_kept(self) -> bool:
        return bool((self.bytes[: self.begin] == GUARD).all() and (self.bytes[self.begin + self.size :] == GUARD).all())


def extent(rows: int, columns: int, stride: int) -> int:
    return (rows - 1) * stride + columns if rows else 0


def test_random_products_at_odd_addresses(level: str) -> None:
    random = np.random.default_rng(7)
    functions = library.functions()
    for case in range(150):
        m, n, k = (int(random.integers(0, limit)) for limit in (20, 40, 300))
        a_stride, b_stride = k + int(random.integers(0, 5)), k + int(random.integers(0, 5))
        shifts = random.integers(0, 64, 3).tolist()
        a, b = Guarded(extent(m, k, a_stride), shifts[0]), Guarded(extent(n, k, b_stride), shifts[1])
        out = Guarded(m * n * 4, shifts[2])
        x, w = a.view(np.int8, m, k, a_stride), b.view(np.int8, n, k, b_stride)
        extreme = case % 3 == 0
        x[:] = random.choice([-128, 127]) if extreme else random.integers(-128, 128, (m, k))
        w[:] = random.choice([-128, 127]) if extreme else random.integers(-128, 128, (n, k))
        assert not functions.hb_int_matmul(a.address, a_stride, b.address, b_stride, m, n, k, out.address)
        expected = x.astype(np.int64) @ w.astype(np.int64).T
        assert (out.view(np.int32, m, n) == expected).all(), f"{level}, case {case}: {m}x{k}x{n}"
        assert out.is_kept(), f"{level}, case {case}: bytes beside the result were written"


def test_random_packing_at_odd_addresses(level: str) -> None:
    random = np.random.default_rng(8)
    functions = library.functions()
    for case in range(150):
        n, k, bits = int(random.integers(0, 9)), int(random.integers(0, 400)), int(random.choice([1, 2, 4, 8]))
        width, shifts = -(-k * bits // 8), random.integers(0, 64, 3).tolist()
        codes, packed, back = Guarded(n * k, shifts[0]), Guarded(n * width, shifts[1]), Guarded(n * k, shifts[2])
        lowest = -(2 ** (bits - 1))
        values = random.integers(lowest, lowest + 2**bits, (n, k))
        codes.view(np.int8, n, k)[:] = values
        assert not functions.hb_pack(codes.address, n, k, bits, lowest, 1, packed.address)
        levels = np.zeros((n, width * 8 // bits), np.int64)
        levels[:, :k] = values - lowest
        places = 2 ** (bits * np.arange(8 // bits))
        expected = (levels.reshape(n, width, 8 // bits) * places).sum(-1)
        assert (packed.view(np.uint8, n, width) == expected).all(), f"{level}, case {case}: {n}x{k}, {bits} bits"
        assert not functions.hb_unpack(packed.address, n, k, bits, lowest, 1, back.address)
        assert (back.view(np.int8, n, k) == values).all(), f"{level}, case {case}: {n}x{k}, {bits} bits"
        assert packed.is_kept() and back.is_kept(), f"{level}, case {case}: bytes beside the result were written"
