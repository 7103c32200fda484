"""What packing does in one pass instead of several: the bytes are those of codes packed afterwards, no bad weight is missed."""

from __future__ import annotations

import pytest
import torch

from hf_bitnet import kernels
from hf_bitnet.kernels import reference
from hf_bitnet.modules import PackedBitLinear
from hf_bitnet.quantizers import WEIGHT_SCHEMES
from hf_bitnet.surgery.coverage import check_finite
from tests.layers import PLACES, as_conv1d, make_layer, scale_rules

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(scheme, rule, *place) for scheme in WEIGHT_SCHEMES for rule in scale_rules(scheme) for place in PLACES]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# each case once, with the next dtype and the other layout in turn; the rest of the product is for the slow tests
FORMS = [(dtype, conv1d) for dtype in DTYPES for conv1d in (False, True)]
PRODUCT = [
    pytest.param(case, *form, marks=[] if sum(divmod(index, len(PLACES))) % len(FORMS) == chosen else pytest.mark.slow)
    for index, case in enumerate(CASES)
    for chosen, form in enumerate(FORMS)
]


# ---- quantizing and packing ----


def _name(value: object) -> str:
    """Of a parameter, in the test's id."""
    if isinstance(value, bool):
        return "conv1d" if value else "linear"
    return "-".join(map(str, value[:3])) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("case", "dtype", "conv1d"), PRODUCT, ids=_name)
def test_packed_bytes_are_those_of_the_codes(
    level: str | None, case: tuple[str, str, str, int | None], dtype: torch.dtype, conv1d: bool
) -> None:
    torch.manual_seed(0)
    made = make_layer(*case, size=(136, 9))
    made.weight.data = made.weight.data.to(dtype)
    layer = as_conv1d(made).to(dtype) if conv1d else made
    quantized = layer.quantized_weight()
    packed = PackedBitLinear.from_trained(layer)
    expected = reference.pack(quantized.codes, packed.bits, packed.grid.lowest, packed.grid.step)
    assert packed.weight.dtype == torch.uint8 and torch.equal(packed.weight, expected)
    assert packed.weight_scale.dtype == torch.float32 and torch.equal(packed.weight_scale, quantized.scale)
    assert packed.weight_scale is not layer.weight_scale and not packed.weight.requires_grad


@pytest.mark.parametrize("in_features", [1, 3, 7, 130])
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES.names())
def test_padded_rows(level: str | None, scheme: str, in_features: int) -> None:
    torch.manual_seed(1)
    layer = make_layer(scheme, size=(in_features, 5))
    packed = PackedBitLinear.from_trained(layer)
    codes = layer.quantized_weight().codes
    assert torch.equal(packed.weight, reference.pack(codes, packed.bits, packed.grid.lowest, packed.grid.step))


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES.names())
def test_packing_makes_no_codes(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    layer = make_layer(scheme, "absmean")

    def refuse(*_: object) -> None:
        raise AssertionError("codes of a byte each were made")

    for operation in ("quantize_weight", "quantize_sign", "pack"):
        monkeypatch.setattr(kernels, operation, refuse)
    PackedBitLinear.from_trained(layer)


def test_a_scheme_with_codes_of_its_own_is_packed_by_way_of_them(level: str | None) -> None:
    class Upwards(WEIGHT_SCHEMES.get("int4")):
        @classmethod
        def codes(cls, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return (rows / scale).ceil().clamp(cls.grid.lowest, cls.grid.highest).to(torch.int8)

    weight, scale = torch.randn(6, 16), torch.full((6, 2), 0.3)
    codes = Upwards.codes(weight, torch.tensor(0.3))
    assert torch.equal(Upwards.packed(weight, scale), reference.pack(codes, 4, -7, 1))
    assert not torch.equal(codes, WEIGHT_SCHEMES.get("int4").codes(weight, torch.full((6, 1), 0.3)))


# ---- bad weights ----


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 16, 37, 5000])
def test_one_bad_number_anywhere_is_found(level: str | None, size: int, bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(3, size).to(dtype)
    check_finite("layer", weight)
    places = range(3 * size) if size < 100 else [0, 1, 15, 16, 4095, 4096, 4999, 5000, 14984, 14999]
    for place in places:
        changed = weight.clone()
        changed.view(-1)[place] = bad
        with pytest.raises(ValueError, match=r"the weight of layer holds 1 NaN or infinite values; mend the checkpoint"):
            check_finite("layer", changed)


@each_dtype
def test_bad_numbers_do_not_hide_each_other(level: str | None, dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 40, dtype=dtype)
    weight[0, 3], weight[1, 3], weight[2, 20] = float("inf"), -float("inf"), float("nan")
    with pytest.raises(ValueError, match="holds 3 NaN or infinite values"):
        check_finite("layer", weight)
    with pytest.raises(ValueError, match="holds 3 NaN or infinite values"):
        check_finite("layer", weight.t())  # strided


@each_dtype
def test_the_largest_and_smallest_numbers_are_legal(level: str | None, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    check_finite("layer", torch.full((300, 40), limits.max, dtype=dtype))
    lonely = torch.zeros(300, 40, dtype=dtype)
    lonely[7, 7] = limits.smallest_normal * limits.eps  # the mean is too small for float32
    check_finite("layer", lonely)
    with pytest.raises(ValueError, match="the weight of layer is all zero, so it has no scale"):
        check_finite("layer", torch.zeros(300, 40, dtype=dtype))
    with pytest.raises(ValueError, match="the weight of layer is all zero, so it has no scale"):
        check_finite("layer", -torch.zeros(300, 40, dtype=dtype))
