"""Every body of every kernel against `reference.py`, and the reference itself by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bitnet import kernels
from hf_bitnet.kernels import cases, dispatch, eager, parity, reference
from hf_bitnet.kernels.cpu import library
from hf_bitnet.quantizers import WEIGHT_SCHEMES

OPERATIONS = tuple(dispatch._BODIES)
# those of GPUs are in test_triton.py
BODIES = [(operation, body) for operation in OPERATIONS for body in dispatch.bodies(operation) if body.name != "triton"]
each_body = pytest.mark.parametrize(("operation", "body"), BODIES, ids=[f"{o}-{b.name}" for o, b in BODIES])
# those that work in blocks of rows or are made of such
CUT = [(operation, body) for operation, body in BODIES if body.name in ("blocked", "onednn", "float32")]


def _assert_equal(found: Any, expected: Any, case: str, operation: str = "") -> None:
    """Integers equal (a few may be one off where sums are rounded); floats by the ratio of root mean squares."""
    wrong = parity.difference(found, expected, operation)
    assert wrong is None, f"{case}: {wrong}"


def _serve(body: dispatch.Body) -> Callable[..., Any]:
    reason = body.why_unavailable("cpu")
    if reason:
        pytest.skip(reason)
    return body.function


def _copies(args: Any) -> list[Any]:
    return [_copies(arg) if type(arg) is list else arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(*pair) for pair in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_cases_and_a_definition(operation: str) -> None:
    assert sum(1 for _ in cases.CASES[operation]()) > 5
    assert dispatch.bodies(operation)[-1].function is getattr(reference, operation)


@each_body
def test_body_equals_reference(operation: str, body: dispatch.Body) -> None:
    function, definition = _serve(body), getattr(reference, operation)
    for case, args in cases.CASES[operation]():
        before = _copies(args)
        _assert_equal(function(*args), definition(*args), case, operation)
        assert all(_same(a, b) for a, b in zip(before, args, strict=True)), case


@pytest.mark.parametrize(("operation", "body"), CUT, ids=[f"{o}-{b.name}" for o, b in CUT])
def test_blocks_of_any_size(operation: str, body: dispatch.Body, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocked bodies cut large inputs; with tiny blocks the small cases are cut too, with a remainder."""
    function, definition = _serve(body), getattr(reference, operation)
    for block in (1, 100):
        monkeypatch.setattr(eager, "_BLOCK", block)
        for case, args in cases.CASES[operation](seed=1):
            name = f"{case}, blocks of {block}"
            _assert_equal(function(*args), definition(*args), name, operation)


@each_body
def test_autocast_changes_nothing(operation: str, body: dispatch.Body) -> None:
    function = _serve(body)
    for case, args in cases.CASES[operation]():
        expected = function(*args)
        with torch.autocast("cpu", torch.bfloat16):
            found = function(*args)
        assert _same(found, expected), case


@each_body
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(operation: str, body: dispatch.Body, dtype: torch.dtype) -> None:
    """from_pretrained and many scripts set it."""
    function = _serve(body)
    for case, args in cases.CASES[operation]():
        expected, before = function(*args), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = function(*args)
        finally:
            torch.set_default_dtype(before)
        assert _same(found, expected), case


@each_body
def test_fresh_memory_is_never_read(operation: str, body: dispatch.Body) -> None:
    """With new tensors filled by NaN or huge integers, a kernel that reads what it did not write gives itself away."""
    function, definition = _serve(body), getattr(reference, operation)
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what makes torch fill new memory
    try:
        for case, args in cases.CASES[operation](seed=2):
            _assert_equal(function(*args), definition(*args), case, operation)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the comparison itself ----


def test_differences_are_seen() -> None:
    codes, floats = torch.arange(8), torch.linspace(1, 2, 8)
    for same in (codes, floats, torch.empty(0), (codes, floats)):
        assert parity.difference(same, same) is None
    off = codes.clone()
    off[3] += 2
    assert parity.difference(off, codes) == "1 of 8 integers differ, by 2 at most"
    assert "error" in str(parity.difference(floats * 1.00001, floats))
    assert "error" in str(parity.difference(floats.clone().fill_(float("nan")), floats))
    assert "not torch.float32 (8,)" in str(parity.difference(floats.double(), floats))
    assert "1 results, not 2" in str(parity.difference((codes,), (codes, floats)))
    assert parity.difference((floats, off), (floats, codes)) is not None


def test_a_sum_in_another_order_may_move_one_code() -> None:
    codes = torch.zeros(8, dtype=torch.int8)
    one, two = codes.clone(), codes.clone()
    one[0], two[:2] = 1, 1
    assert parity.difference(one, codes, "norm_quantize_rows") is None
    assert parity.difference(two, codes, "norm_quantize_rows") is not None
    assert parity.difference(one, codes, "quantize_rows") is not None
    assert parity.difference(codes + 255, codes.to(torch.uint8), "pack") is not None


def test_moving_keeps_strides() -> None:
    whole = torch.randn(6, 8)
    for view in (whole[::2, 1:5], whole.t(), whole[:1].expand(4, 8), whole[:0], torch.randn(3, 1)[:, :1]):
        moved = parity.moved([(view,), "name", None], "meta")
        assert moved[1:] == ["name", None] and moved[0][0].device.type == "meta"
        assert moved[0][0].shape == view.shape and (not view.numel() or moved[0][0].stride() == view.stride())


# ---- what stock torch does on other devices; on `meta` nothing is computed ----


class _Recorder(TorchDispatchMode):
    """Gathers (operation, dtype of its first operand)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            self.seen.append((func.overloadpacket.__name__, args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operation", ["quantize_rows", "norm_quantize_rows", "scale_rows", "sign_pack", "int_linear"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_serve_the_cpu_only(operation: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[tuple[int, int]] = []
    row_blocks = eager._row_blocks
    monkeypatch.setattr(eager, "_BLOCK", 8)
    monkeypatch.setattr(eager, "_row_blocks", lambda rows, columns: cut.append((rows, columns)) or row_blocks(rows, columns))
    body = eager.make_int_linear(reference.int_matmul) if operation == "int_linear" else getattr(eager, operation)
    _, args = next(case for case in cases.CASES[operation]() if max(case[1][0].shape) > 8)
    body(*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
    assert len(cut) == (device == "cpu")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_factor_for_all_is_multiplied_in_float32(device: str) -> None:
    with _Recorder() as recorder:
        y = eager._scale_all(
            torch.empty(4, 3, dtype=torch.bfloat16, device=device), torch.ones(1, 1, device=device), torch.bfloat16
        )
    assert y.dtype == torch.bfloat16 and y.device.type == device
    # the CPU multiplies by a 0-dim float32 factor in float32 whatever the dtype of the other operand
    assert ("mul_", torch.bfloat16 if device == "cpu" else torch.float32) in recorder.seen


def test_one_factor_for_all_is_rounded_once() -> None:
    a, codes, scale = torch.randn(5, 7), torch.randint(-1, 2, (7, 3)).to(torch.int8), torch.tensor([[0.0371]])
    exact = (a @ codes.float()) * scale
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(eager.fixed_matmul(a, None, codes, 0.0, scale, dtype), exact.to(dtype))
    y = torch.randn(64, 64).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(eager._scale_all(y.clone(), scale, dtype), (y.float() * scale).to(dtype))


# ---- the definitions, by hand ----


def test_int_matmul_by_hand() -> None:
    a, b = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.tensor([[4, 5, 6], [-128, 0, 127]], dtype=torch.int8)
    assert reference.int_matmul(a, b).tolist() == [[12, 253]]


def test_quantize_rows_by_hand() -> None:
    codes, scale = reference.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]]), -128, 127, 1e-5)
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([[1.0], [1e-5 / 127]]))


def test_int_linear_by_hand() -> None:
    x, w = torch.tensor([[2, 3]], dtype=torch.int8), torch.tensor([[1, -1], [0, 2]], dtype=torch.int8)
    x_scale, w_scale = torch.tensor([[0.5]]), torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    y = reference.int_linear(x, x_scale, torch.tensor([[1.0]]), w, w_scale, -0.5, torch.tensor([1.0, 2.0]), torch.float32)
    # row 0: (1 * 1.5 * 1 + 2 * -0.5 * 10) / 2 + 1; row 1: (1 * 0.5 * 100 + 2 * 2.5 * 1000) / 2 + 2
    assert y.tolist() == [[-3.25, 2527.0]]


def test_packed_layout_by_hand() -> None:
    """Neighbours along the input share a byte, the first in the lowest bits; level = (code - lowest) / step; rows padded."""
    ternary = torch.tensor([[1, 0, -1, 1, -1], [-1, -1, -1, -1, 1]], dtype=torch.int8)
    packed = kernels.pack(ternary, 2, -1, 1)
    assert packed.tolist() == [[2 + (1 << 2) + (0 << 4) + (2 << 6), 0], [0, 2]]
    binary = torch.tensor([[1, -1, -1, 1, 1, 1, -1, -1, 1]], dtype=torch.int8)
    assert kernels.pack(binary, 1, -1, 2).tolist() == [[0b00111001, 1]]
    assert kernels.pack(torch.tensor([[-7, 7, 0]], dtype=torch.int8), 4, -7, 1).tolist() == [[0 + (14 << 4), 7]]
    assert kernels.pack(torch.tensor([[-127, 127]], dtype=torch.int8), 8, -127, 1).tolist() == [[0, 254]]
    assert packed.dtype == torch.uint8


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES.names())
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 64, 131])
def test_pack_and_unpack_round_trip(scheme: str, columns: int) -> None:
    kind = WEIGHT_SCHEMES.get(scheme)
    grid, bits = kind.grid, kind.storage_bits
    assert 2**bits >= grid.levels
    codes = (torch.randint(0, grid.levels, (5, columns)) * grid.step + grid.lowest).to(torch.int8)
    codes[0] = grid.lowest
    codes[1] = grid.highest
    packed = kernels.pack(codes, bits, grid.lowest, grid.step)
    assert packed.shape == (5, -(-columns * bits // 8))
    assert torch.equal(kernels.unpack(packed, bits, grid.lowest, grid.step, columns), codes)


# ---- dispatch ----


def test_explain_names_every_operation_and_reason() -> None:
    lines = kernels.explain("cpu").splitlines()
    assert [line.split()[0] for line in lines] == ["operation", *OPERATIONS, "CPU"]
    assert lines[-1] == f"CPU kernels: {library.describe()}"
    assert "onednn: torch._int_mm has shape limits on cuda" in kernels.explain("cuda")


@pytest.mark.parametrize(
    ("x", "enabled", "expected"),
    [
        (torch.zeros(1), False, torch.float32),
        (torch.zeros(1), True, torch.bfloat16),
        (torch.zeros(1, dtype=torch.float16), False, torch.float16),
        (torch.zeros(1, dtype=torch.float64), True, torch.float64),
    ],
)
def test_output_dtype_is_that_of_a_linear_layer(x: Tensor, enabled: bool, expected: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert kernels.autocast_dtype(x) == expected
        assert torch.nn.functional.linear(x, torch.zeros(2, 1, dtype=x.dtype)).dtype == expected


def _dispatch_under(monkeypatch: pytest.MonkeyPatch, forced: str) -> ModuleType:
    """The dispatch module as a fresh process with this environment would import it."""
    monkeypatch.setenv("HF_BITNET_KERNELS", forced)
    spec = importlib.util.find_spec("hf_bitnet.kernels.dispatch")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("forced", ["reference", "float32"])
def test_environment_variable_forces_a_body(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    fresh = _dispatch_under(monkeypatch, forced)
    body = next(body for body in fresh.bodies("int_matmul") if body.name == forced)
    assert fresh._CHOSEN["int_matmul", "cpu"] is body.function
    assert ("pack", "cpu") in fresh._CHOSEN  # operations without such a body keep theirs


def test_environment_variable_with_an_unknown_body(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"HF_BITNET_KERNELS='refrence' names no kernel body; legal: .*reference.* unset"):
        _dispatch_under(monkeypatch, "refrence")


# ---- sizes that oneDNN compiles anew ----


def test_products_of_bfloat16_take_few_sizes() -> None:
    sizes = [eager._few_sizes(size) for size in range(1, 5000)]
    assert all(size <= padded <= max(size * 1.125, size + 15) for size, padded in enumerate(sizes, 1))
    assert len(set(sizes)) < 60 and all(eager._few_sizes(size) == size for size in (16, 32, 256, 512, 2048, 4096))


def test_padding_changes_no_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(21, 37, generator=generator).bfloat16(), torch.randn(37, 9, generator=generator).bfloat16()
    a[3, 5], a[20, 36] = torch.inf, torch.nan
    for left, right in ((a, b), (a.t(), torch.randn(21, 4, generator=generator).bfloat16()), (a[:0], b), (a[:, :0], b[:0])):
        found, expected = eager._product(left, right), left.float() @ right.float()
        assert found.shape == expected.shape and found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.1, equal_nan=True)
