"""The C++ bodies: every level that this machine offers, bit for bit with torch's, in graphs, in threads, after a fork."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bitnet import kernels
from hf_bitnet.kernels import Layout, RowQuantization, cases, dispatch, eager, graph, reference
from hf_bitnet.kernels.cpu import library, products
from tests.cpu_kernels import LEVELS, failures_in_threads, needs_cpu_kernels
from tests.test_kernels import _assert_equal

REPOSITORY = Path(__file__).resolve().parents[1]
OPERATIONS = tuple(dispatch._BODIES)
INT8 = RowQuantization(-128, 127, 1e-5)
TERNARY = Layout(2, -1)

pytestmark = needs_cpu_kernels


def ternary_layer(k: int = 64, n: int = 24, m: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (m, k), packed, scale (n, 1), bias."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randint(0, 3, (n, k), generator=generator) - 1).to(torch.int8)
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    return x, reference.pack(codes, 2, -1, 1), torch.rand(n, 1, generator=generator) + 0.1, bias


def cpu_body(operation: str) -> Callable[..., Any]:
    return next(body.function for body in dispatch.bodies(operation) if body.name == "cpu")


# ---- what they compute ----


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_level_equals_the_definition(level: str, operation: str) -> None:
    assert library.level() == level
    function, definition = cpu_body(operation), getattr(reference, operation)
    for case, args in cases.CASES[operation](seed=3):
        _assert_equal(function(*args), definition(*args), f"{level}: {case}", operation)


# of each operation the torch body whose bits are the contract, and the argument whose second dimension are groups
TORCH_BODIES = {
    "int_linear": (eager.make_int_linear(eager.int_matmul_float32), 4),
    "packed_linear": (eager.make_packed_linear(eager.make_int_linear(eager.int_matmul_float32)), 2),
    "packed_int_linear": (eager.make_packed_int_linear(eager.make_int_linear(eager.int_matmul_float32)), 4),
    "scale_rows": (eager.scale_rows, None),
    "quantize_rows": (eager.quantize_rows, None),
}


@pytest.mark.parametrize("operation", TORCH_BODIES)
def test_bits_are_those_of_the_torch_body(level: str, operation: str) -> None:
    """But for scales of groups, where the torch body sums floats."""
    function, (torch_body, scale) = cpu_body(operation), TORCH_BODIES[operation]
    compared = 0
    for case, args in cases.CASES[operation](seed=4):
        if scale is not None and args[scale].shape[-1] > 1:
            continue
        found, expected = function(*args), torch_body(*args)
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        assert all(torch.equal(a, b) for a, b in pairs), f"{level}: {case}"
        compared += 1
    assert compared > 10


@pytest.mark.slow
def test_ten_thousand_random_products_are_exact(level: str) -> None:
    """Integer sums against int64, one in four at the extreme codes that overflow narrow accumulators."""
    generator = torch.Generator().manual_seed(5)
    for i in range(10_000):
        m, n = (int(torch.randint(0, 20, (), generator=generator)) for _ in range(2))
        k = int(torch.randint(1, 700, (), generator=generator))
        bits, lowest, highest, step = cases.LAYOUTS[i % len(cases.LAYOUTS)]
        x = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
        w = (torch.randint(0, (highest - lowest) // step + 1, (n, k), generator=generator) * step + lowest).to(torch.int8)
        if i % 4 == 0:
            x, w = x.fill_((-128, 127)[i // 4 % 2]), w.fill_((lowest, highest)[i // 8 % 2])
        exact = x.long() @ w.long().t()
        name = f"{level}, case {i}: {m}x{k}x{n}, {bits} bits"
        assert torch.equal(products.int_matmul(x, w).long(), exact), name
        packed, ones = reference.pack(w, bits, lowest, step), torch.ones(m, 1)
        y = products.packed_int_linear(x, ones, None, packed, torch.ones(1, 1), None, Layout(bits, lowest, step), torch.float32)
        assert torch.equal(y, exact.float()), name


def test_float64_goes_in_and_out() -> None:
    x, packed, scale, bias = ternary_layer(m=3)
    found = products.packed_linear(x.double(), packed, scale, bias, TERNARY, INT8, torch.float64)
    expected = reference.packed_linear(x.double(), packed, scale, bias, TERNARY, INT8, torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operation", ["packed_linear", "quantize_rows"])
def test_rows_of_nothing_are_refused_as_by_the_definition(operation: str) -> None:
    empty, scale = torch.empty(2, 0), torch.ones(1, 1)
    rest: tuple[Any, ...] = (torch.empty(3, 0, dtype=torch.uint8), scale, None, TERNARY, INT8, torch.float32)
    for function in (cpu_body(operation), getattr(reference, operation)):
        with pytest.raises((IndexError, RuntimeError)):
            function(empty, *(rest if operation == "packed_linear" else INT8))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"packed": torch.zeros(24, 15, dtype=torch.uint8)}, r"weight of shape \(24, 15\); 64 inputs need \(outputs, 16\)"),
        ({"scale": torch.ones(23, 1)}, r"scale of shape \(23, 1\) fits no weight of 24 outputs"),
        ({"scale": torch.ones(24, 5)}, r"scale of shape \(24, 5\) fits no weight of 24 outputs and 64 inputs"),
        ({"bias": torch.ones(23)}, r"bias of shape \(23,\)"),
        ({"bias": torch.ones(24, device="meta")}, "one is on meta"),
        ({"layout": Layout(3, 0)}, "1, 2, 4 or 8 bits, not 3"),
        ({"x": torch.ones(64)}, r"x has shape \(64,\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, Any], words: str) -> None:
    x, packed, scale, bias = ternary_layer()
    arguments = {
        "x": x,
        "packed": packed,
        "scale": scale,
        "bias": bias,
        "layout": TERNARY,
        "rows": INT8,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=words):
        products.packed_linear(**{**arguments, **changed})


# ---- blocks kept between calls ----


def decode(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    found = products.packed_linear(x, packed, scale, bias, TERNARY, INT8, torch.float32)
    assert torch.equal(found, TORCH_BODIES["packed_linear"][0](x, packed, scale, bias, TERNARY, INT8, torch.float32))
    return found


def test_a_kept_block_notices_every_change() -> None:
    x, packed, scale, bias = ternary_layer()
    other_x, other_packed, other_scale, other_bias = ternary_layer(seed=1)
    decode(x, packed, scale, bias)
    assert products._KEPT.get(packed) is not None
    decode(other_x, packed, scale, bias)
    packed[0] = other_packed[0]  # in place: the same address
    decode(x, packed, scale, bias)
    decode(x, packed, other_scale, bias)
    decode(x, packed, other_scale, other_bias)
    decode(x, packed, other_scale)
    decode(x, packed, torch.ones(1, 1))
    packed.data = other_packed.clone()  # the same tensor, another address
    decode(x, packed, scale)
    packed.data = other_packed[:5].clone()
    decode(x, packed, scale[:5])
    decode(x.bfloat16(), packed, scale[:5])
    decode(x.expand(3, -1), packed, scale[:5])
    wide = torch.randn(1, 128)
    decode(wide[:, ::2], packed, scale[:5])


def test_a_kept_block_dies_with_its_weight() -> None:
    x, packed, scale, _ = ternary_layer()
    decode(x, packed, scale)
    key = id(packed)
    assert key in products._KEPT._found
    del packed
    gc.collect()
    assert key not in products._KEPT._found


AT_EXIT = """
from tests.test_cpu_kernels import decode, products, ternary_layer
x, packed, scale, bias = ternary_layer()
decode(x, packed, scale, bias)
block = products._KEPT.get(packed)  # as if another thread were in the middle of a call
hold = lambda: packed  # the interpreter empties `products` while it exists, and this script's tensors die after that
"""


def test_a_weight_that_outlives_the_modules_dies_in_silence() -> None:
    done = run_python(AT_EXIT)
    assert done.returncode == 0 and not done.stderr, done.stderr


# ---- graphs ----

ONE = ternary_layer()
CODES = torch.randint(-128, 128, (3, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
SCALES = torch.rand(3, 1) + 0.1
OPERATORS: dict[str, tuple[Any, ...]] = {
    "int_matmul": (CODES, CODES),
    "int_linear": (CODES, SCALES, None, CODES, SCALES, 0.0, None, torch.bfloat16),
    "packed_linears": (ONE[0], [ONE[1]] * 2, [ONE[2]] * 2, [ONE[3], None], *TERNARY, *INT8, torch.float32),
    "packed_experts": (
        *(ONE[0], torch.tensor([[1, 0, 2]]), [ONE[1]] * 4, [ONE[2]] * 4, [ONE[3], ONE[3], None, None], 2),
        *(*TERNARY, *INT8, torch.float32),
    ),
    "packed_int_linear": (CODES, SCALES, SCALES, *ONE[1:], *TERNARY, torch.float32),
    "fixed_matmul": (ONE[0].repeat(2, 1), None, CODES.t(), 0.0, None, torch.float32),
    "quantize_rows": (ONE[0], *INT8),
    "quantize_columns": (ONE[0], None, *INT8),
    "norm_quantize_rows": (ONE[0], torch.ones(64), 1e-6, *INT8),
    "mean_magnitudes": (ONE[0],),
    "quantize_weight": (ONE[0], SCALES[:1], -0.5, -2, 1, torch.int8),
    "quantize_sign": (ONE[0], torch.zeros(1, 1), torch.int8),
    "scale_rows": (CODES, SCALES, torch.bfloat16),
    "quantize_pack": (ONE[0], torch.ones(1, 1), -1, 1, *TERNARY),
    "sign_pack": (ONE[0], torch.zeros(1, 1)),
    "pack": (CODES.clamp(-1, 1), 2, -1, 1),
    "unpack": (ONE[1], 2, -1, 1, 63),
    "pack_trits": (CODES.clamp(-1, 1),),
    "unpack_trits": (torch.zeros(2, 4, dtype=torch.uint8), 17),
}


def test_every_operator_is_checked() -> None:
    assert {name.split("::")[1] for name in graph.LIBRARY._op_defs} == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_passes_opcheck(name: str) -> None:
    overload = getattr(torch.ops.hf_bitnet, name).default
    torch.library.opcheck(overload, OPERATORS[name])


class Layer(torch.nn.Module):
    """A packed product between two steps that a compiler would fuse."""

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        first = kernels.packed_linear(x * 2, self.packed, self.scale, self.bias, TERNARY, INT8, x.dtype)  # pyright: ignore
        weights = [(self.packed, self.scale, None), (self.packed, self.scale, self.bias)]
        second, third = kernels.packed_linears(x, weights, TERNARY, INT8, x.dtype)  # pyright: ignore
        return first + second - third


@pytest.mark.parametrize("rows", [1, 5])
def test_torch_compile_makes_one_graph(rows: int) -> None:
    x, *weights = ternary_layer(m=rows)
    layer = Layer(*weights)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


def test_torch_export_with_a_free_number_of_rows() -> None:
    x, *weights = ternary_layer(m=4)
    layer = Layer(*weights)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert "hf_bitnet.packed_linears" in program.graph_module.code
    longer = ternary_layer(m=9, seed=2)[0]
    assert torch.equal(program.module()(longer), layer(longer))


# ---- threads and processes ----


@pytest.mark.parametrize("rows", [1, 40])
def test_several_python_threads_at_once(rows: int) -> None:
    layers = [ternary_layer(k=512, n=300, m=rows, seed=seed) for seed in range(4)]
    expected = [products.packed_linear(*layer, TERNARY, INT8, torch.float32) for layer in layers]

    def is_right(i: int) -> bool:
        return torch.equal(products.packed_linear(*layers[i], TERNARY, INT8, torch.float32), expected[i])

    assert not failures_in_threads(is_right, rounds=100)


def run_python(script: str, folder: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "2", **environment}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


FORK = """
import os, torch
from tests.test_cpu_kernels import INT8, TERNARY, products, ternary_layer
torch.set_num_threads(2)
x, *weights = ternary_layer(k=2048, n=4096, m=40)
expected = products.packed_linear(x, *weights, TERNARY, INT8, torch.float32)  # the parent's threads are running now
child = os.fork()
if child == 0:
    # compared by numpy: torch's own threads would hang here
    found = products.packed_linear(x, *weights, TERNARY, INT8, torch.float32)
    os._exit(0 if (found.numpy() == expected.numpy()).all() else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_alone() -> None:
    done = run_python(FORK)
    assert done.returncode == 0, done.stderr


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, *weights = ternary_layer(k=1024, n=1500, m=33)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(products.packed_linear(x, *weights, TERNARY, INT8, torch.float32))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ---- which library, which level ----


def _dispatch_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports the dispatch module again, as a fresh process with this environment would."""
    monkeypatch.setenv("HF_BITNET_CPU_LEVEL", name)
    spec = importlib.util.find_spec("hf_bitnet.kernels.dispatch")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_environment_variable_chooses_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    before = library.level()
    try:
        _dispatch_at("portable", monkeypatch)
        assert library.level() == "portable"
    finally:
        library.choose_level(before)


@pytest.mark.slow
def test_environment_variable_chooses_the_level_of_a_process() -> None:
    done = run_python("from hf_bitnet.kernels import dispatch; print(dispatch.library.level())", HF_BITNET_CPU_LEVEL="portable")
    assert done.stdout.strip() == "portable", done.stderr


@pytest.mark.parametrize(("name", "words"), [("avx3", "names no level"), (None, "is not offered by this machine")])
def test_wrong_levels_name_the_legal_ones(name: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = name or next(level for level in library.LEVELS if level not in LEVELS)
    before = library.level()
    with pytest.raises(ValueError) as error:
        _dispatch_at(name, monkeypatch)
    assert f"HF_BITNET_CPU_LEVEL={name!r} {words}" in str(error.value)
    assert f"legal here: {', '.join(LEVELS)}, or leave it unset" in str(error.value)
    assert library.level() == before


WITHOUT = """
import sys
# an editable installation finds hf_bitnet before the current folder is searched
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
import json, torch
from hf_bitnet import kernels
x = torch.arange(6.0).reshape(2, 3)
packed = kernels.pack(torch.ones(4, 3, dtype=torch.int8), 2, -1, 1)
layout, rows = kernels.Layout(2, -1), kernels.RowQuantization(-128, 127, 1e-5)
y = kernels.packed_linear(x, packed, torch.ones(1, 1), None, layout, rows, torch.float32)
names = [kernels.bodies(operation)[0].why_unavailable("cpu") for operation in ("pack", "packed_linear")]
print(json.dumps([names, y[:, 0].tolist(), kernels.explain()]))
"""


def test_without_the_library_torch_serves_and_the_reason_is_told(tmp_path: Path) -> None:
    skipped = shutil.ignore_patterns(library.PATH.name, "src", "__pycache__")
    shutil.copytree(REPOSITORY / "hf_bitnet", tmp_path / "hf_bitnet", ignore=skipped)
    done = run_python(WITHOUT, tmp_path, HF_BITNET_CPU_LEVEL="portable")
    assert done.returncode == 0, done.stderr
    names, y, table = json.loads(done.stdout)
    assert all("is not there: hf_bitnet was installed without a working C++ compiler" in name for name in names)
    assert y == pytest.approx([3.0, 12.0], rel=0.01)
    assert "CPU kernels: none" in table and "onednn" in table


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"ABI version {library.ABI_VERSION}, this code needs 99; install hf_bitnet again"
    monkeypatch.setattr(library, "ABI_VERSION", 99)
    assert words in str(library._Opened(library.PATH).reason)


def test_a_broken_library_is_told_apart_from_a_missing_one(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    assert "broken.so cannot be loaded" in str(library._Opened(broken).reason)
