"""Train form, packed form, plain form, and the way between them; strength and other switches of a whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_bitnet import (
    BitNetQuantizationConfig,
    coverage,
    dequantize_model,
    harden,
    pack_model,
    quantize_model,
    set_norm_blend,
    set_strength,
    unpack_model,
)
from hf_bitnet.config import NativeBitNetConfig
from hf_bitnet.modules import NativeLayer, PackedBitLinear, QuantizedLayer, SubNorm
from hf_bitnet.quantizers import Quantized
from hf_bitnet.surgery import full_precision_copy, prepare_native, quantized_layers, reset_state, trained_layers
from tests.layers import SCHEMES
from tests.tiny import tiny

# several schemes, scale rules and granularities in one model
MIXED = {
    r"(q_proj|query|c_attn|\.q$)": {"weight": "binary"},
    r"(k_proj|key|c_fc|\.k$)": {"weight": "int2_seq", "weight_scale": "learned"},
    r"(v_proj|value|\.v$)": {"weight": "int4", "group_size": 8},
    r"(o_proj|out_proj|\.o$)": {"weight": "int8", "activation": "none"},
    r"(down_proj|fc2|c_proj)": {"activation": "int8_asymmetric", "weight_scale": "threshold", "granularity": "channel"},
}
# gate and up are one product in the fused form: the last digit of sums may differ from that of two (test_experts.py)
EXPERTS = ["experts"]


def _mixed(**fields: Any) -> BitNetQuantizationConfig:
    return BitNetQuantizationConfig(overrides=MIXED, **fields)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def _codes(model: nn.Module) -> dict[str, Quantized]:
    return {name: layer.quantized_weight() for name, layer in quantized_layers(model)}


def _assert_same_codes(found: dict[str, Quantized], expected: dict[str, Quantized], rtol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].codes, value.codes), name
        torch.testing.assert_close(found[name].scale, value.scale, rtol=rtol, atol=0)


# ---- strength ----


def test_strength_zero_is_the_float_model(family: str) -> None:
    model, batch = tiny(family)
    expected = _logits(model, batch)
    quantize_model(model, _mixed(keep=EXPERTS))
    quantized = _logits(model, batch)
    assert not torch.equal(quantized, expected)
    set_strength(model, 0.0)
    assert torch.equal(_logits(model, batch), expected)
    set_strength(model, 0.5)
    between = _logits(model, batch)
    assert between.isfinite().all() and not torch.equal(between, expected)
    set_strength(model, 1.0, hard=False)
    assert all(layer.relaxed for _, layer in trained_layers(model))
    soft = _logits(model, batch)
    assert (soft - quantized).abs().max() <= 3e-2 * quantized.abs().max()  # a rounding of an activation may fall otherwise
    harden(model)
    assert torch.equal(_logits(model, batch), quantized)


def test_strength_zero_trains_as_the_float_model(family: str) -> None:
    model, batch = tiny(family, labels=True)
    plain = copy.deepcopy(model)
    quantize_model(model, BitNetQuantizationConfig(ste="tanh", keep=EXPERTS))
    set_strength(model, 0.0)
    for each in (model, plain):
        each(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None and torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("ste", ["identity", "learnable"])
def test_every_layer_trains(family: str, ste: str) -> None:
    model, batch = tiny(family, labels=True)
    quantize_model(model, _mixed(ste=ste))
    model.train()
    for strength in (1.0, 0.5):
        set_strength(model, strength)
        model.zero_grad()
        model(**batch).loss.backward()
        for name, layer in trained_layers(model):
            for key, parameter in layer.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), (name, key)
            assert layer.weight.grad.abs().sum() > 0, name  # type: ignore[union-attr]


def test_switches_of_a_model() -> None:
    model, _ = tiny("llama")
    quantize_model(model, BitNetQuantizationConfig(sub_norm=["o_proj"], ste="tanh", ste_temperature=3))
    set_norm_blend(model, 0.25)
    norms = [module for module in model.modules() if isinstance(module, SubNorm)]
    assert len(norms) == 2 and all(float(norm.blend) == 0.25 for norm in norms)
    set_strength(model, 0.3)
    for _, layer in trained_layers(model):
        assert layer.relaxed and float(layer.strength) == pytest.approx(0.3) and float(layer.ste_temperature) == 3
        layer.ste_temperature.fill_(7)
    reset_state(model)
    for _, layer in trained_layers(model):
        assert not layer.relaxed and float(layer.strength) == 1 and float(layer.ste_temperature) == 3


# ---- between the forms ----


def test_round_trip_of_all_forms(family: str) -> None:
    model, batch = tiny(family)
    quantize_model(model, _mixed())
    codes, output = _codes(model), _logits(model, batch)
    packed_bytes = coverage(model).bytes_packed

    pack_model(model)
    _assert_same_codes(_codes(model), codes)
    assert torch.equal(_logits(model, batch), output)
    assert all(isinstance(layer, PackedBitLinear) for _, layer in quantized_layers(model))
    assert model.config.quantization_config.form == "packed"
    assert coverage(model).bytes_packed == packed_bytes

    unpack_model(model)
    _assert_same_codes(_codes(model), codes, rtol=1e-6)
    assert model.config.quantization_config.form == "train"
    # a scale that differs in its last bit may round an activation otherwise
    assert (_logits(model, batch) - output).abs().max() <= 3e-2 * output.abs().max()

    pack_model(model)
    _assert_same_codes(_codes(model), codes, rtol=1e-6)
    unpack_model(model, weight_scale="learned")
    _assert_same_codes(_codes(model), _codes(pack_model(copy.deepcopy(model))))
    dequantize_model(model)
    assert not hasattr(model.config, "quantization_config")
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())


def test_dequantized_weights_are_the_values(family: str) -> None:
    for pack in (False, True):
        model, batch = tiny(family)
        overrides = {pattern: {**change, "activation": "none"} for pattern, change in MIXED.items()}
        quantize_model(model, BitNetQuantizationConfig(activation="none", overrides=overrides))
        codes, output = _codes(model), _logits(model, batch)
        if pack:
            pack_model(model)
        dequantize_model(model)
        for name, quantized in codes.items():
            if ".experts." in name:  # fused again, see test_experts.py
                continue
            layer = model.get_submodule(name)
            assert type(layer) is (Conv1D if family == "gpt2" else nn.Linear)
            weight = layer.weight.t() if family == "gpt2" else layer.weight
            assert torch.equal(weight, quantized.dequantize())
            assert layer.weight.is_contiguous() and layer.weight.requires_grad
        torch.testing.assert_close(_logits(model, batch), output, rtol=1e-4, atol=1e-4)


def test_a_dequantized_model_can_be_quantized_again() -> None:
    model, _ = tiny("llama")
    quantize_model(model, BitNetQuantizationConfig(weight_scale="least_squares"))
    codes = _codes(model)
    quantize_model(dequantize_model(model), BitNetQuantizationConfig(weight_scale="least_squares"))
    _assert_same_codes(_codes(model), codes, rtol=1e-6)
    plain = nn.Sequential(nn.Linear(8, 8))
    quantize_model(dequantize_model(quantize_model(plain, BitNetQuantizationConfig())), BitNetQuantizationConfig())


def test_packing_at_once_is_packing_later(family: str) -> None:
    at_once, batch = tiny(family)
    later, _ = tiny(family)
    quantize_model(at_once, _mixed(form="packed"))
    pack_model(quantize_model(later, _mixed()))
    assert torch.equal(_logits(at_once, batch), _logits(later, batch))
    assert at_once.config.quantization_config.fields() == later.config.quantization_config.fields()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_models(scheme: str, dtype: torch.dtype) -> None:
    for fields in ({}, {"weight_scale": "learned"}, {"granularity": "group", "group_size": 8}):
        model, batch = tiny("llama", num_hidden_layers=1)
        quantize_model(model.to(dtype), BitNetQuantizationConfig(weight=scheme, **fields))
        codes, output = _codes(model), _logits(model, batch)
        assert output.dtype == dtype and output.isfinite().all()
        pack_model(model)
        assert torch.equal(_logits(model, batch), output)
        unpack_model(model)
        _assert_same_codes(_codes(model), codes, rtol=4e-3)
        assert {p.dtype for name, p in model.named_parameters() if not name.endswith("scale")} == {dtype}
        dequantize_model(model)
        assert _logits(model, batch).dtype == dtype


def test_layers_alone_know_their_dtype() -> None:
    """Nothing but packed layers is left to tell what the float dtype was: their biases do."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16()
    pack_model(quantize_model(model, BitNetQuantizationConfig(granularity="channel")))
    dequantize_model(model)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    assert model(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16


def test_unpacking_with_learned_scales_reaches_every_layer() -> None:
    model, batch = tiny("llama")
    # an int8 scale by absmean is not where a learned scale would start
    overrides = {"q_proj": {"weight": "int4"}, "k_proj": "keep", "up_proj": {"weight": "int8", "weight_scale": "absmean"}}
    pack_model(quantize_model(model, BitNetQuantizationConfig(weight_scale="absmax", overrides=overrides)))
    output, codes = _logits(model, batch), _codes(model)
    unpack_model(model, weight_scale="learned")
    assert all(layer.weight_scale is not None for _, layer in trained_layers(model))
    _assert_same_codes(_codes(model), codes)
    assert torch.equal(_logits(model, batch), output)


def test_sub_norms_stay_through_all_forms() -> None:
    model, batch = tiny("llama", num_hidden_layers=1)
    quantize_model(model, BitNetQuantizationConfig(sub_norm=["o_proj", "down_proj"], activation="none"))
    set_norm_blend(model, 1.0)
    norm = model.model.layers[0].self_attn.o_proj.sub_norm
    with torch.no_grad():
        norm.weight.mul_(1.5)
    output = _logits(model, batch)
    pack_model(model)
    assert model.model.layers[0].self_attn.o_proj.sub_norm is norm
    assert torch.equal(_logits(model, batch), output)
    unpack_model(model)
    assert model.model.layers[0].self_attn.o_proj.sub_norm is norm
    dequantize_model(model)
    assert model.model.layers[0].self_attn.o_proj[0] is norm
    torch.testing.assert_close(_logits(model, batch), output, rtol=1e-4, atol=1e-4)


def test_modes_and_static_ranges_go_along() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_model(model, BitNetQuantizationConfig(activation="int8_static"))
    for _, layer in trained_layers(model):
        layer.act_scale.fill_(0.02)  # type: ignore[union-attr]
    model.eval()
    output = model(x := torch.randn(3, 8))
    assert not pack_model(model)[0].training and torch.equal(model(x), output)
    assert not unpack_model(model)[1].training
    torch.testing.assert_close(model(x), output)
    assert not dequantize_model(model)[0].training


@pytest.mark.parametrize("form", ["train", "packed"])
def test_deepcopy_is_independent(form: str) -> None:
    model, batch = tiny("gpt2")
    quantize_model(model, _mixed(form=form))
    output = _logits(model, batch)
    other = copy.deepcopy(model)
    assert torch.equal(_logits(other, batch), output)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.config.quantization_config.keep.append("x")
    assert torch.equal(_logits(model, batch), output)
    assert model.config.quantization_config.keep == []


@pytest.mark.parametrize("form", ["train", "packed"])
def test_state_dict_round_trip(form: str) -> None:
    model, batch = tiny("llama")
    other, _ = tiny("llama", seed=1)
    for each in (model, other):
        quantize_model(each, _mixed(form=form, ste="learnable", sub_norm=["up_proj"]))
    set_norm_blend(model, 0.5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(_logits(other, batch), _logits(model, batch))


# ---- where layers hang ----


def _chain(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def test_the_model_is_not_walked_once_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    walk, walks = nn.Module.named_modules, [0]

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walks[-1] += type(self) is nn.Sequential
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    found = []
    for layers in (2, 20):
        walks.clear()
        model = _chain(layers)
        forms = (lambda m: quantize_model(m, BitNetQuantizationConfig()), full_precision_copy, pack_model, unpack_model)
        for change in (*forms, dequantize_model):
            walks.append(0)
            change(model)
            assert walks[-1] > 0
        found.append(list(walks))
    assert found[0] == found[1]


def test_a_layer_that_hangs_in_two_places_is_replaced_in_both() -> None:
    model = _chain(2)
    model.append(model[0])
    quantize_model(model, BitNetQuantizationConfig())
    assert isinstance(model[0], QuantizedLayer) and model[2] is model[0] and model[1] is not model[0]
    pack_model(model)
    assert isinstance(model[0], PackedBitLinear) and model[2] is model[0]
    dequantize_model(model)
    assert type(model[0]) is nn.Linear and model[2] is model[0]


def test_shared_native_layer_is_replaced_in_all_its_places() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleList([shared, nn.Sequential(shared, nn.Linear(8, 4))])
    prepare_native(model, NativeBitNetConfig({"linear_class": "autobitlinear", "quantization_mode": "online"}), [])
    assert isinstance(model[0], NativeLayer)
    assert model[1][0] is model[0]
