"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter; and compiled for GPUs that are not there."""

from __future__ import annotations

import weakref
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bitnet.kernels import Layout, RowQuantization, cases, dispatch, parity, reference
from hf_bitnet.kernels.triton.operators import OPERATIONS
from tests.test_kernels import _assert_equal

pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPOSITORY = Path(__file__).resolve().parents[1]
INT8 = RowQuantization(-128, 127, 1e-5)
# the interpreter takes a second for some cases: of these a part in the fast suite, all in the slow one
EVERY = {
    "packed_linear": 9,
    "packed_linears": 8,
    "packed_int_linear": 4,
    "packed_experts": 5,
    "quantize_columns": 3,
    "quantize_pack": 4,
    "norm_quantize_rows": 4,
}


def _moved(value: Any, device: str = DEVICE) -> Any:
    return parity.moved(value, device)


def _check(operation: str, every: int, seed: int = 0) -> None:
    for case, args in islice(cases.CASES[operation](seed), seed % every, None, every):
        found = OPERATIONS[operation](*_moved(args))
        _assert_equal(_moved(found, "cpu"), getattr(reference, operation)(*args), case, operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_equals_reference(operation: str) -> None:
    _check(operation, EVERY.get(operation, 1))


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("seed", [1, 2])
def test_kernel_equals_reference_in_every_case(operation: str, seed: int) -> None:
    _check(operation, 1, seed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fresh_memory_is_never_read(operation: str) -> None:
    """With new tensors filled by NaN or huge integers, a kernel that reads what it did not write gives itself away."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what makes torch fill new memory
    try:
        _check(operation, 3 * EVERY.get(operation, 3), seed=1)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- what the cases do not hold ----


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 17, 300])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_product_in_each_of_its_forms(rows: int, bits: int) -> None:
    """Row-vector form, tiles, unpacked first; scales for the tensor and for groups of whole words."""
    lowest, step = (-1, 2) if bits == 1 else (-(2 ** (bits - 1)), 1)
    layout = Layout(bits, lowest, step, -0.5 if bits == 2 else 0.0)
    n, k = 21, 256
    packed = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    x, bias = torch.randn(rows, k), torch.randn(n)
    for scale in (torch.rand(1, 1), torch.rand(n, 1), torch.rand(n, 4)):
        args = x, packed, scale, bias, layout, INT8, torch.float32
        found = OPERATIONS["packed_linear"](*_moved(args))
        _assert_equal(found.cpu(), reference.packed_linear(*args), f"{rows} rows, scale {tuple(scale.shape)}")


@pytest.mark.parametrize("zero", [0.0, -0.5])
@pytest.mark.parametrize("shape", [(1, 1), (21, 1)])
def test_products_equal_the_torch_bodies_bit_for_bit(shape: tuple[int, int], zero: float) -> None:
    n, k, layout = 21, 256, Layout(2, -2, 1, zero)
    packed, scale, bias = torch.randint(0, 256, (n, k // 4), dtype=torch.uint8), torch.rand(shape), torch.randn(n)
    by_torch = next(body for body in dispatch.bodies("packed_linear") if body.name == "float32").function
    for rows in (1, 7, 300):
        args = torch.randn(rows, k), packed, scale, bias, layout, INT8, torch.float32
        assert torch.equal(OPERATIONS["packed_linear"](*_moved(args)).cpu(), by_torch(*args)), rows


@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize("groups", [1, 4])
def test_experts_in_both_forms(tokens: int, groups: int) -> None:
    """Place by place, and tiles of an expert; with biases, none for some places, an expert that nobody chose."""
    layout, n, k, experts = Layout(2, -1), 21, 256, 5
    weights = [
        (torch.randint(0, 171, (n, k // 4), dtype=torch.uint8), torch.rand(n, groups), torch.randn(n)) for _ in range(experts)
    ]
    index = torch.randint(0, experts - 1, (tokens, 2))
    index[0, 1] = experts
    args = torch.randn(tokens, k), index, [weights, weights[::-1]], layout, INT8, torch.float32
    found = OPERATIONS["packed_experts"](*_moved(args))
    _assert_equal(_moved(found, "cpu"), reference.packed_experts(*args), f"{tokens} tokens")


def test_experts_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far they are apart goes to the device with it: every such copy waits, and cannot be captured in a graph."""
    from hf_bitnet.kernels.triton import experts

    looks: list[Any] = []
    plain = experts._describe
    monkeypatch.setattr(experts, "_describe", lambda *args: looks.append(args) or plain(*args))
    for bias in (None, torch.randn(4)):
        weights = [(torch.full((4, 16), number, dtype=torch.uint8), torch.ones(1, 1), bias) for number in range(3)]
        weights, x, index = _moved(weights), _moved(torch.randn(2, 64)), _moved(torch.tensor([[0, 2], [1, 1]]))

        def product() -> Any:
            return OPERATIONS["packed_experts"](x, index, [weights], Layout(2, -1), INT8, torch.float32)  # noqa: B023

        looks.clear()
        (before,), _ = product(), product()
        assert len(looks) == 1
        weights[2][0].data = weights[2][0].data.flip(0).bitwise_not()  # elsewhere
        (after,) = product()
        assert len(looks) == 2 and not torch.equal(before[1], after[1]) and torch.equal(before[0], after[0])


def test_scales_of_another_shape_where_the_old_ones_were() -> None:
    memory = [torch.rand(4, 1) + 0.5 for _ in range(3)]
    weights = [(torch.full((4, 16), 100 + number, dtype=torch.uint8), memory[number][:1], None) for number in range(3)]
    moved = _moved(weights)
    args = torch.randn(2, 64), torch.tensor([[0, 2], [1, 1]]), [moved], Layout(2, -1), INT8, torch.float32
    OPERATIONS["packed_experts"](*_moved(args[:2]), *args[2:])
    for number, (_, scale, _) in enumerate(moved):
        scale.data = memory[number].to(scale.device)
    found = OPERATIONS["packed_experts"](*_moved(args[:2]), *args[2:])
    _assert_equal(_moved(found, "cpu"), reference.packed_experts(*args[:2], _moved([moved], "cpu"), *args[3:]), "")


def test_a_description_goes_with_the_experts() -> None:
    from hf_bitnet.kernels.triton import experts

    weights = _moved([(torch.zeros(4, 16, dtype=torch.uint8), torch.ones(1, 1), None) for _ in range(3)])
    args = _moved(torch.randn(2, 64)), _moved(torch.tensor([[0, 2], [1, 1]])), [weights], Layout(2, -1), INT8, torch.float32
    OPERATIONS["packed_experts"](*args)
    assert experts._KEPT.get(weights[0][0]) is not None
    seen = [weakref.ref(tensor) for weight in weights for tensor in weight[:2]]
    del weights, args
    assert not any(each() is not None for each in seen)


def test_biases_with_gaps() -> None:
    apart = [torch.randn(4, 2)[:, 0] for _ in range(3)]
    weights = [(torch.zeros(4, 16, dtype=torch.uint8), torch.ones(1, 1), bias) for bias in apart]
    for rows in (2, 12):
        args = torch.randn(rows, 64), torch.arange(2 * rows).view(rows, 2) % 3, [weights], Layout(2, -1), INT8, torch.float32
        found = OPERATIONS["packed_experts"](*_moved(args))
        _assert_equal(_moved(found, "cpu"), reference.packed_experts(*args), f"{rows} rows")


@pytest.mark.skipif(DEVICE != "cpu", reason="puts the interpreter's body in the place of the CPU's")
@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_experts_of_a_model(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    from tests.test_experts_together import packed, routed

    experts, args = packed(GptOssExperts), routed(tokens)
    expected = experts(*args)
    monkeypatch.setitem(dispatch._CHOSEN, ("packed_experts", "cpu"), OPERATIONS["packed_experts"])
    torch.testing.assert_close(experts(*args), expected, rtol=1e-5, atol=1e-6)


def test_rows_longer_than_a_program_keeps_are_read_in_parts() -> None:
    x = torch.randn(2, 20_001)
    x[1, 20_000] = 50.0
    for found, expected in zip(OPERATIONS["quantize_rows"](_moved(x), *INT8), reference.quantize_rows(x, *INT8), strict=True):
        assert torch.equal(found.cpu(), expected)
    weight = torch.rand(20_001)
    args = x, weight, 1e-6, *INT8
    _assert_equal(_moved(OPERATIONS["norm_quantize_rows"](*_moved(args)), "cpu"), reference.norm_quantize_rows(*args), "long")


def test_columns_quantized_where_they_lie() -> None:
    """The rows of a transposed matrix, as the backward wants them."""
    x = torch.randn(70, 45).t()
    for found, expected in zip(OPERATIONS["quantize_rows"](_moved(x), *INT8), reference.quantize_rows(x, *INT8), strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")
def test_nan_reaches_the_output() -> None:
    x = torch.ones(3, 8)
    x[1, 5] = torch.nan
    _, scale = OPERATIONS["quantize_rows"](_moved(x), *INT8)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    packed = torch.full((4, 2), 0b10101010, dtype=torch.uint8)
    y = OPERATIONS["packed_linear"](*_moved((x, packed, torch.ones(1, 1), None, Layout(2, -1), INT8, torch.float32)))
    assert y.isnan().all(dim=1).tolist() == [False, True, False] and not y[0].isnan().any()


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_no_number_gets_the_codes_of_the_definition() -> None:
    """NaN, infinities, and 0 / 0: code 0, or NaN where a float can say it."""
    x = torch.tensor([[torch.nan, 1.0, -2.0, 0.0], [torch.inf, 1.0, -2.0, 0.0], [-torch.inf, torch.nan, 5.0, 0.0]])
    scale, none = torch.tensor([[1.0], [0.5], [2.0]]), torch.zeros(3, 1)
    for args in ((x, scale, 0.0, -1, 1), (x, none, 0.0, -1, 1), (x, scale, -0.5, -2, 1)):
        assert torch.equal(OPERATIONS["quantize_weight"](*_moved(args), torch.int8).cpu(), reference.quantize_weight(*args))
        found = OPERATIONS["quantize_weight"](*_moved(args), torch.float32).cpu()
        torch.testing.assert_close(found, reference.quantize_weight(*args, torch.float32), equal_nan=True, rtol=0, atol=0)
    args = x, scale, -1, 1, Layout(2, -1)
    assert torch.equal(OPERATIONS["quantize_pack"](*_moved(args)).cpu(), reference.quantize_pack(*args))
    for found, expected in zip(OPERATIONS["quantize_rows"](_moved(x), *INT8), reference.quantize_rows(x, *INT8), strict=True):
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True, rtol=0, atol=0)


_CODES, _ONE, _FLOAT = torch.ones(3, 16, dtype=torch.int8), torch.ones(1, 1), torch.float32
_PACKED, _EACH, _TERNARY = torch.zeros(5, 4, dtype=torch.uint8), torch.ones(3, 1), Layout(2, -1)
MISFITS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "inputs": ("int_matmul", (_CODES, _CODES[:, :8]), r"int8 \(M, K\) and int8 \(N, K\)"),
    "scale of x": ("int_linear", (_CODES, _ONE, None, _CODES, _ONE, 0.0, None, _FLOAT), "with a scale"),
    "groups": ("int_linear", (_CODES, _EACH, None, _CODES, torch.ones(3, 3), 0.0, None, _FLOAT), r"scale of shape \(3, 3\)"),
    "bias": ("int_linear", (_CODES, _EACH, None, _CODES, _ONE, 0.0, torch.ones(1), _FLOAT), "bias of shape"),
    "bytes": ("packed_linear", (torch.ones(2, 32), _PACKED, _ONE, None, _TERNARY, INT8, _FLOAT), r"\(outputs, 8\)"),
    "bytes of codes": (
        "packed_int_linear",
        (_CODES, _EACH, None, _PACKED[:, :3], _ONE, None, _TERNARY, _FLOAT),
        r"\(outputs, 4\)",
    ),
    "unpacked": ("unpack", (_PACKED, 2, -1, 1, 17), "4 bytes hold no 17 codes"),
    "scales to pack": ("quantize_pack", (torch.ones(3, 8), torch.ones(2, 1), -1, 1, _TERNARY), r"scale of shape \(2, 1\)"),
    "thresholds to pack": ("sign_pack", (torch.ones(3, 8), torch.ones(3, 3)), r"scale of shape \(3, 3\)"),
    "gain": ("norm_quantize_rows", (torch.ones(2, 8), torch.ones(4), 1e-6, *INT8), r"norm of shape \(4,\)"),
    "gradient": ("fixed_matmul", (torch.ones(2, 3), torch.ones(2), _CODES, 0.0, None, _FLOAT), "fit no left operand"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_operands_that_do_not_fit_are_refused(misfit: str) -> None:
    """They would be read beyond their ends."""
    operation, args, said = MISFITS[misfit]
    with pytest.raises(ValueError, match=said):
        OPERATIONS[operation](*_moved(args))


def test_mean_of_a_long_row_is_summed_in_parts() -> None:
    x = torch.randn(1, 100_003)
    found = OPERATIONS["mean_magnitudes"](_moved(x)).cpu()
    assert torch.equal(found, reference.mean_magnitudes(x))


def test_largest_codes_do_not_overflow() -> None:
    x, w = torch.full((2, 4096), -128, dtype=torch.int8), torch.full((3, 4096), -128, dtype=torch.int8)
    assert (OPERATIONS["int_matmul"](*_moved((x, w))).cpu() == 2**14 * 4096).all()
