"""Operands that kernels cannot read, or would read as something else: an error or the right result, never foreign memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hf_bitnet as hb
from hf_bitnet import kernels
from hf_bitnet.kernels import Layout, RowQuantization, dispatch, eager, graph, reference
from hf_bitnet.kernels.cpu import library
from tests.tiny import tiny

LAYOUT, ROWS = Layout(2, -1), RowQuantization(-128, 127, 1e-5)
needs_library = pytest.mark.skipif(library.why_unavailable() is not None, reason="the C++ library is not built")


def _packed(n: int = 3, k: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 160, (n, k // 4), dtype=torch.uint8), torch.rand(1, 1)


@needs_library
@pytest.mark.parametrize("which", ["packed", "scale", "bias"])
def test_weights_without_memory(which: str) -> None:
    """A sharded weight says that it is on the CPU, and has the address 0."""
    packed, scale = _packed()
    weight = {"packed": packed, "scale": scale, "bias": torch.randn(3)}
    with FakeTensorMode() as fake:
        weight[which] = fake.from_tensor(weight[which])
    with pytest.raises(ValueError, match="FakeTensor has no memory that a CPU kernel could read"):
        dispatch.packed_linear(torch.randn(1, 16), *weight.values(), LAYOUT, ROWS, torch.float32)


def test_weights_of_another_dtype() -> None:
    """A float weight of 8 bits has the shape of a packed one."""
    layout = Layout(8, -128)
    with pytest.raises(ValueError, match=r"a weight of torch\.float32; packed ones are torch\.uint8"):
        dispatch.packed_linear(torch.randn(1, 8), torch.randn(3, 8), torch.ones(1, 1), None, layout, ROWS, torch.float32)


@pytest.mark.parametrize("change", [lambda w: w.t(), lambda w: w.view(8, 2)], ids=["turned", "cut otherwise"])
def test_a_weight_that_lies_otherwise_at_the_same_address(change: Callable[[Tensor], Tensor]) -> None:
    packed, scale = _packed(4, 16)
    weight, x = torch.nn.Parameter(packed, requires_grad=False), torch.randn(1, 16)
    dispatch.packed_linear(x, weight, scale, None, LAYOUT, ROWS, torch.float32)  # is kept
    weight.data = change(weight.data)
    x = x[:, : 4 * weight.shape[1]].contiguous()
    expected = reference.packed_linear(x, weight.data.clone(), scale, None, LAYOUT, ROWS, torch.float32)
    for _ in range(2):
        found = dispatch.packed_linear(x, weight, scale, None, LAYOUT, ROWS, torch.float32)
        torch.testing.assert_close(found, expected)


def test_sums_that_int32_cannot_hold() -> None:
    a, scale = torch.full((1, (1 << 17) + 1), 127, dtype=torch.int8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="sums 131,072 terms at most, not 131,073"):
        dispatch.int_matmul(a, a)
    with pytest.raises(ValueError, match="sums 131,072 terms at most, not 131,073"):
        dispatch.int_linear(a, scale, None, a, scale, 0.0, None, torch.float32)


def test_many_terms_in_fixed_point() -> None:
    k = 70_000
    a, codes, scales = torch.randn(8, k) * 100, torch.randint(-1, 2, (k, 16), dtype=torch.int8), torch.rand(200, 350).t()
    expected = a.double() * scales.reshape(-1).double() @ codes.double()
    torch.set_default_dtype(torch.float16)
    try:
        found = dispatch.fixed_matmul(a, scales, codes, 0.0, None, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("product", [eager.int_matmul_float32, eager.int_matmul_onednn])
def test_zero_points_of_weights_under_another_default_dtype(product: Callable[..., Tensor]) -> None:
    packed, x = torch.randint(0, 256, (8, 512), dtype=torch.uint8), torch.rand(4, 2048)
    args = (x, packed, torch.ones(8, 1), None, Layout(2, -1, 1, -0.5), ROWS, torch.float32)
    torch.set_default_dtype(torch.float16)
    try:
        found = eager.make_packed_linear(eager.make_int_linear(product))(*args)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, reference.packed_linear(*args), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["quantize_rows", "norm_quantize_rows", "scale_rows", "quantize_weight", "quantize_sign"])
def test_operators_give_what_their_fakes_promise(name: str, dtype: torch.dtype) -> None:
    """A compiled graph reads results by the strides that were promised."""
    columns, images = torch.randn(6, 8, dtype=dtype).t(), torch.randn(6, 8, 5, dtype=dtype).transpose(0, 1)
    args: dict[str, tuple[Any, ...]] = {
        "quantize_rows": (columns, -128, 127, 1e-5),
        "norm_quantize_rows": (columns, torch.rand(6), 1e-5, -128, 127, 1e-5),
        "scale_rows": (columns, torch.rand(8, 1), dtype),
        "quantize_weight": (images, torch.rand(8, 6, 1), 0.0, -1, 1, torch.int8),
        "quantize_sign": (images, torch.rand(8, 6, 1), torch.int8),
    }
    operator = graph.OPERATORS[name].call
    found = operator(*args[name])
    with FakeTensorMode() as fake:
        promised = operator(*(fake.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args[name]))
    for real, said in zip(*((each,) if isinstance(each, Tensor) else each for each in (found, promised)), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (said.shape, said.stride(), said.dtype)


@needs_library
@pytest.mark.parametrize("which", ["cos", "x"])
def test_angles_without_a_batch(which: str) -> None:
    """As many sequences as tokens make two dimensions look like three; the rest would be read behind the end."""
    tensors: dict[str, Any] = {"x": torch.randn(2, 2, 8), "cos": torch.randn(1, 2, 8)}
    tensors[which] = tensors[which][0]
    with pytest.raises(ValueError, match=r"x and cos are \(batch, tokens, hidden\) and"):
        kernels.decode_layers([], tensors["x"], tensors["cos"], tensors["cos"])


def test_shapes_on_the_meta_device() -> None:
    packed, scale = _packed()
    x, weight, scales = torch.randn(2, 16, device="meta"), packed.to("meta"), scale.to("meta")
    assert dispatch.packed_linear(x, weight, scales, None, LAYOUT, ROWS, torch.float32).shape == (2, 3)
    model, batch = tiny("llama")
    hb.pack_model(hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158()))
    assert model.to("meta")(batch["input_ids"].to("meta")).logits.is_meta
