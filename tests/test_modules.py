"""The layers: shapes, dtypes, what they share, what they save, what survives casts and copies. Gradients: test_gradients.py."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from hf_bitnet.modules import BitLinear, PackedBitLinear, SubNorm
from hf_bitnet.modules.base import PROTECTED
from tests.layers import ACTIVATIONS, FORMS, GROUP, IN, OUT, PLACES, SCHEMES, each_form, make_layer

# ---- one layer in four forms ----


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_forms_give_the_same_bits(scheme: str, activation: str) -> None:
    for rule in (None, "learned"):
        for granularity, group_size in PLACES:
            layer = make_layer(scheme, rule, granularity, group_size, activation)
            x = torch.randn(2, 3, IN)
            expected, codes = layer(x), layer.quantized_weight()
            for form, make in FORMS.items():
                other = make(layer)
                found = other.quantized_weight()
                assert torch.equal(found.codes, codes.codes) and torch.equal(found.scale, codes.scale), form
                assert torch.equal(other(x), expected), form


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_bytes(scheme: str) -> None:
    layer = make_layer(scheme, None, "group", GROUP)
    packed = PackedBitLinear.from_trained(layer)
    assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (OUT, -(-IN * packed.bits // 8))
    assert packed.weight_scale.shape == (OUT, IN // GROUP)
    assert packed.bias is layer.bias
    assert not packed.weight.requires_grad and not packed.weight_scale.requires_grad
    assert set(dict(packed.named_parameters())) == {"weight", "weight_scale", "bias"}


def test_a_master_checkpoint_is_a_float_checkpoint() -> None:
    layer = make_layer()
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert isinstance(layer, nn.Linear)
    nn.Linear(IN, OUT).load_state_dict(layer.state_dict())


@each_form
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (0, 4), (2, 1, 2, 3)])
def test_shapes_of_inputs(form: str, shape: tuple[int, ...]) -> None:
    for activation in ACTIVATIONS:
        layer = FORMS[form](make_layer(activation=activation))
        x = torch.randn(*shape, IN, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape, OUT)
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.isfinite().all()
        flat = layer(x.detach().reshape(-1, IN))
        assert torch.equal(y, flat.view(*shape, OUT))


@each_form
def test_non_contiguous_inputs(form: str) -> None:
    for activation in ACTIVATIONS:
        layer = FORMS[form](make_layer(activation=activation))
        for x in (torch.randn(IN, 6).t(), torch.randn(6, 2 * IN)[:, ::2], torch.randn(4, 6, IN).transpose(0, 1)):
            assert not x.is_contiguous()
            # the codes are equal; a float mean or a float product may sum in another order
            torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-5, atol=1e-6)
            if activation in ("int8", "int4", "int8_asymmetric", "int8_static"):
                assert torch.equal(layer(x), layer(x.contiguous()))
        row = torch.randn(1, IN).expand(3, IN)
        torch.testing.assert_close(layer(row), layer(row.contiguous()), rtol=1e-5, atol=1e-6)


@each_form
def test_inputs_and_weights_are_not_changed(form: str) -> None:
    for activation in ACTIVATIONS:
        for strength in (None, 0.5):
            layer = FORMS[form](make_layer(activation=activation, ste="learnable", rule="learned"))
            if strength is not None and isinstance(layer, BitLinear):
                layer.relaxed = True
                layer.strength.fill_(strength)
            x = torch.randn(4, IN, requires_grad=True)
            before = {name: value.clone() for name, value in layer.state_dict().items()}
            copy_of_x = x.detach().clone()
            out = torch.randn(4, OUT)
            copy_of_out = out.clone()
            layer(x).backward(out)
            assert torch.equal(x, copy_of_x) and torch.equal(out, copy_of_out)
            assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# ---- dtypes ----


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_dtype_of_the_input(form: str, dtype: torch.dtype) -> None:
    for scheme in SCHEMES:
        for activation in ACTIVATIONS:
            layer = FORMS[form](make_layer(scheme, activation=activation)).to(dtype)
            x = torch.randn(3, IN, dtype=dtype, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert y.dtype == dtype and y.isfinite().all()
            assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()


@each_form
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_autocast_output_dtype(form: str, strength: float) -> None:
    for activation in ACTIVATIONS:
        layer = FORMS[form](make_layer(activation=activation))
        if isinstance(layer, BitLinear):
            layer.relaxed = strength < 1
            layer.strength.fill_(strength)
        x = torch.randn(3, IN, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        assert x.grad is not None and x.grad.dtype == torch.float32 and x.grad.isfinite().all()
        weight = layer.weight
        assert weight.grad is None or weight.grad.dtype == weight.dtype


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_rounds_the_output_only(scheme: str) -> None:
    layer, x = make_layer(scheme), torch.randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    assert torch.equal(cast, layer(x).bfloat16())


# ---- casts and copies ----


@pytest.mark.parametrize("form", ["linear", "conv1d", "packed"])
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "deepcopy", "state_dict"])
def test_scales_stay_float32(form: str, cast: str) -> None:
    layer = FORMS[form](make_layer("int4", "learned", "channel", None, "int8_static", "learnable"))
    found = {name: getattr(layer, name).clone() for name in PROTECTED if getattr(layer, name, None) is not None}
    assert len(found) == (2 if form == "packed" else 4)
    if cast == "deepcopy":
        other = copy.deepcopy(layer)
    elif cast == "state_dict":
        other = FORMS[form](make_layer("int4", "learned", "channel", None, "int8_static", "learnable"))
        other.load_state_dict(layer.state_dict())
    else:
        other = getattr(layer, cast)()
        assert other.bias is not None and other.bias.dtype != torch.float32
    for name, value in found.items():
        after = getattr(other, name)
        assert after.dtype == torch.float32 and torch.equal(after, value), name
    x = torch.randn(3, IN)
    if cast in ("deepcopy", "state_dict"):
        assert torch.equal(other(x), layer(x))


@each_form
def test_whole_layers_can_be_saved(form: str) -> None:
    layer = FORMS[form](make_layer("int4", "learned", activation="int8_static", ste="learnable", sub_norm=True))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(3, IN)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))


def test_casting_there_and_back_does_not_wear_scales_out() -> None:
    layer = make_layer("int8", "learned")
    before = layer.weight_scale.clone()  # type: ignore[union-attr]
    layer.bfloat16().half().to(torch.float64).float()
    assert torch.equal(layer.weight_scale, before)  # type: ignore[arg-type]


def test_a_cast_packed_layer_keeps_its_bytes() -> None:
    packed = PackedBitLinear.from_trained(make_layer())
    before = packed.weight.clone()
    packed.bfloat16().half().double()
    assert torch.equal(packed.weight, before)


# ---- sub-norm ----


def test_sub_norm_is_the_identity_at_first_and_an_rms_norm_at_last() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        norm = SubNorm(IN, eps=1e-5).to(dtype)
        with torch.no_grad():
            norm.weight.copy_(torch.rand(IN) + 0.5)
        x = (3 * torch.randn(4, IN)).to(dtype)
        assert torch.equal(norm(x), x)
        norm.blend.fill_(1.0)
        expected = nn.functional.rms_norm(x.float(), (IN,), norm.weight.float(), 1e-5).to(dtype)
        torch.testing.assert_close(norm(x), expected)
    assert "blend" in norm.state_dict()


def test_sub_norm_in_front_of_a_layer() -> None:
    layer = make_layer(sub_norm=True)
    assert layer.sub_norm is not None
    plain = make_layer()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "sub_norm" not in name})
    x = torch.randn(4, IN)
    assert torch.equal(layer(x), plain(x))
    layer.sub_norm.blend.fill_(1.0)
    assert torch.equal(layer(x), plain(layer.sub_norm(x)))
    layer(x).sum().backward()
    assert layer.sub_norm.weight.grad is not None and layer.sub_norm.weight.grad.abs().sum() > 0
    packed = PackedBitLinear.from_trained(layer)
    assert packed.sub_norm is layer.sub_norm and torch.equal(packed(x), layer(x))
