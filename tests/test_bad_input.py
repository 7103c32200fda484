"""What users get wrong, and what they are told: what came, what is legal, the corrected call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bitnet import (
    BitNetQuantizationConfig,
    dequantize_model,
    harden,
    pack_model,
    quantize_model,
    set_norm_blend,
    set_strength,
    unpack_model,
)
from hf_bitnet.modules import PackedBitLinear
from hf_bitnet.quantizers import Grid, Quantized, make_weight_quantizer
from hf_bitnet.quantizers.scales import SCALE_RULES
from tests.layers import FORMS, IN, make_layer
from tests.tiny import tiny

# name: (fields of the config, error, parts of its text in order)
CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "unknown field": ({"colour": 3}, ValueError, ["no field 'colour'", "fields: weight, weight_scale"]),
    "field with a typo": ({"wieght": "int4"}, ValueError, ["no field 'wieght'", "Did you mean weight='int4'?"]),
    "unknown weight": ({"weight": "int3"}, ValueError, ["unknown weight scheme 'int3'", "'ternary'", "Did you mean 'int"]),
    "weight is a number": ({"weight": 4}, TypeError, ["weight must be a string, got 4", "weight='ternary'"]),
    "weight is None": ({"weight": None}, TypeError, ["weight must be a string, got None"]),
    "unknown rule": ({"weight_scale": "mean"}, ValueError, ["unknown weight scale rule 'mean'", "'absmean'"]),
    "rule is a number": ({"weight_scale": 0}, ValueError, ["unknown weight scale rule 0", "'absmax'"]),
    "empty rule": ({"weight_scale": ""}, ValueError, ["unknown weight scale rule ''"]),
    "unknown granularity": ({"granularity": "row"}, ValueError, ["granularity 'row'", "'tensor', 'channel', 'group'"]),
    "empty granularity": ({"granularity": ""}, ValueError, ["granularity ''", "'tensor', 'channel', 'group'"]),
    "group without size": ({"granularity": "group"}, ValueError, ["group_size=None", "granularity='group', group_size=128"]),
    "size without group": (
        {"granularity": "tensor", "group_size": 32},
        ValueError,
        ["granularity='tensor' with group_size=32", "exactly when"],
    ),
    "group of zero": ({"group_size": 0}, ValueError, ["positive whole number, got 0", "group_size=128"]),
    "negative group": ({"group_size": -4}, ValueError, ["positive whole number, got -4"]),
    "fractional group": ({"group_size": 1.5}, ValueError, ["positive whole number, got 1.5"]),
    "group is True": ({"group_size": True}, ValueError, ["positive whole number, got True"]),
    "threshold on int4": ({"weight": "int4", "weight_scale": "threshold"}, ValueError, ["is for ternary", "least_squares"]),
    "least squares on int8": (
        {"weight": "int8", "weight_scale": "least_squares"},
        ValueError,
        ["at most 16 levels, this one has 255", "weight_scale='absmax'"],
    ),
    "unknown activation": ({"activation": "int9"}, ValueError, ["unknown activation scheme 'int9'", "'int8'", "'none'"]),
    "activation is None": ({"activation": None}, TypeError, ["activation must be a string, got None"]),
    "unknown ste": ({"ste": "clip"}, ValueError, ["unknown STE 'clip'", "'identity'", "Did you mean 'clipped'?"]),
    "unknown relaxation": ({"relaxation": "cubic"}, ValueError, ["unknown relaxation 'cubic'", "'linear'"]),
    "unknown form": ({"form": "int8"}, ValueError, ["form='int8'", "'train' (float weights) or 'packed'"]),
    "negative threshold": ({"ste_threshold": -1}, ValueError, ["ste_threshold=-1", "at least 0.0"]),
    "threshold is NaN": ({"ste_threshold": float("nan")}, ValueError, ["ste_threshold=nan"]),
    "threshold is text": ({"ste_threshold": "0.5"}, TypeError, ["ste_threshold must be a number at least 0.0, got '0.5'"]),
    "temperature of zero": ({"ste_temperature": 0}, ValueError, ["ste_temperature must be above 0", "4.0"]),
    "infinite temperature": ({"ste_temperature": float("inf")}, ValueError, ["ste_temperature=inf", "legal"]),
    "negative eps": ({"sub_norm_eps": -1e-6}, ValueError, ["sub_norm_eps=-1e-06", "at least 0.0"]),
    "coverage above one": ({"min_coverage": 90}, ValueError, ["min_coverage=90", "from 0.0 to 1.0"]),
    "coverage is True": ({"min_coverage": True}, TypeError, ["min_coverage must be a number from 0.0 to 1.0, got True"]),
    "keep is a string": ({"keep": "lm_head"}, TypeError, ["keep must be a list", "write keep=['lm_head']"]),
    "keep is no pattern": ({"keep": ["(a"]}, ValueError, ["keep: '(a' is not a regular expression", r"r'layers\.0\.'"]),
    "sub_norm is True": ({"sub_norm": True}, TypeError, ["sub_norm must be a list of regular expressions, got True"]),
    "sub_norm of numbers": ({"sub_norm": [3]}, ValueError, ["sub_norm: 3 is not a regular expression"]),
    "overrides is a list": ({"overrides": ["x"]}, TypeError, ["overrides must be a dict of patterns, got list", "'int4'"]),
    "override pattern": ({"overrides": {"*": "keep"}}, ValueError, ["overrides: '*' is not a regular expression"]),
    "override value": ({"overrides": {"x": "int4"}}, TypeError, ["overrides['x'] is 'int4'", "'keep' or a dict", "'weight'"]),
    "override field": ({"overrides": {"x": {"form": "packed"}}}, ValueError, ["overrides['x'] names 'form'", "weight_scale"]),
    "override scheme": ({"overrides": {"x": {"weight": "int5"}}}, ValueError, ["overrides['x']:", "'int5'", "'int4'"]),
    "override rule": (
        {"overrides": {"x": {"weight": "int4", "weight_scale": "threshold"}}},
        ValueError,
        ["overrides['x']:", "is for ternary"],
    ),
    "override sub_norm": (
        {"overrides": {"x": {"sub_norm": "yes"}}},
        TypeError,
        ["overrides['x']:", "True or False, got 'yes'"],
    ),
    "newer version": ({"version": 99}, ValueError, ["version 99", "reads version 1", "pip install"]),
    "another method": ({"quant_method": "gptq"}, ValueError, ["quant_method is 'gptq'", "'hf_bitnet'", "load_native"]),
    "list of modules": ({"quantized_modules": "all"}, TypeError, ["quantized_modules must be a list of module names", "'all'"]),
    "the saved form": ({"hf_bitnet": {}}, ValueError, ["saved form", "BitNetQuantizationConfig.from_dict"]),
}


def _expect(error: type[Exception], parts: list[str], call: Callable[[], Any]) -> None:
    with pytest.raises(error) as raised:
        call()
    text, position = str(raised.value), 0
    for part in parts:
        assert part in text[position:], f"{part!r} is not (in this order) in: {text}"
        position = text.index(part, position)


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str) -> None:
    fields, error, parts = CONFIGS[name]
    _expect(error, parts, lambda: BitNetQuantizationConfig(**fields))
    if "hf_bitnet" not in fields:
        _expect(error, parts, lambda: BitNetQuantizationConfig.from_dict(fields))


def test_saved_config_without_settings() -> None:
    _expect(
        ValueError,
        ["'hf_bitnet'", "must hold the settings, got 3"],
        lambda: BitNetQuantizationConfig.from_dict({"hf_bitnet": 3}),
    )


# ---- models ----


def _two() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))


def _filled(value: float, count: int | None = None) -> nn.Module:
    model = _two()
    with torch.no_grad():
        weight = model[1].weight.view(-1)  # type: ignore[index, union-attr, operator]
        weight[: count or weight.numel()] = value
    return model


def _config(**fields: Any) -> BitNetQuantizationConfig:
    return BitNetQuantizationConfig(**fields)


def _quantized(**fields: Any) -> nn.Module:
    return quantize_model(_two(), _config(**fields))


def _with_weight(weight: Tensor) -> nn.Module:
    model = _two()
    model[1].weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[index]
    return model


def _without_config() -> nn.Module:
    model = _quantized(form="packed")
    del model._bitnet_config
    return model


def _unreachable_codes() -> nn.Module:
    """Packed codes that no weight has under the config's rule: absmean of 15 levels, after a change from outside."""
    model = _quantized(weight="int4", weight_scale="absmean", form="packed")
    packed = model[1]  # type: ignore[index]
    codes = torch.zeros(8, 24, dtype=torch.int8)
    codes[:, :12], codes[:, 0] = 1, 7
    packed.store(Quantized(codes, torch.ones(8, 1)))  # type: ignore[union-attr, operator]
    return model


MODELS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "not a module": (
        lambda: quantize_model("gpt2", _config()),  # type: ignore[type-var]
        TypeError,
        ["takes an nn.Module, got str", "pass the loaded model"],
    ),
    "not a config": (
        lambda: quantize_model(_two(), {"weight": "int4"}),  # type: ignore[arg-type]
        TypeError,
        ["takes a BitNetQuantizationConfig, got dict", "BitNetQuantizationConfig.bitnet_b158()"],
    ),
    "the class of the config": (
        lambda: quantize_model(_two(), BitNetQuantizationConfig),  # type: ignore[arg-type]
        TypeError,
        ["takes a BitNetQuantizationConfig, got type"],
    ),
    "a bare layer": (
        lambda: quantize_model(nn.Linear(4, 4), _config()),
        ValueError,
        ["itself a Linear", "quantize_model(nn.Sequential(layer), config)"],
    ),
    "a bare layer, back": (
        lambda: dequantize_model(_quantized().get_submodule("0")),
        ValueError,
        ["itself a BitLinear", "wrap it"],
    ),
    "quantized twice": (
        lambda: quantize_model(_quantized(), _config()),
        ValueError,
        ["quantized already", "dequantize_model(model) first"],
    ),
    "packed and quantized again": (lambda: quantize_model(_quantized(form="packed"), _config()), ValueError, ["already"]),
    "no linear layer": (
        lambda: quantize_model(nn.Sequential(nn.ReLU()), _config()),
        ValueError,
        ["no layer of Sequential would be quantized", "no linear layer at all"],
    ),
    "everything kept": (
        lambda: quantize_model(_two(), _config(keep=["."])),
        ValueError,
        ["0: kept by the config; 1: kept by the config", "loosen `keep`", "overrides={r'classifier'"],
    ),
    "too little coverage": (
        lambda: quantize_model(_two(), _config(keep=["1"], min_coverage=0.8)),
        ValueError,
        ["only 66.7%", "min_coverage asks for 80.0%", "1 (kept by the config)", "`overrides`", "lower min_coverage"],
    ),
    "NaN": (
        lambda: quantize_model(_filled(float("nan"), 3), _config()),
        ValueError,
        ["of 1 holds 3 NaN or inf", "keep=[r'1']"],
    ),
    "infinity": (lambda: quantize_model(_filled(float("inf"), 2), _config()), ValueError, ["of 1 holds 2 NaN or infinite"]),
    "all zero": (lambda: quantize_model(_filled(0.0), _config()), ValueError, ["of 1 is all zero", "keep=[r'1']"]),
    "empty": (
        lambda: quantize_model(_with_weight(torch.zeros(0, 24)), _config()),
        ValueError,
        ["of 1 is empty, shape (0, 24)", "keep=[r'1']"],
    ),
    "integer weights": (
        lambda: quantize_model(_with_weight(torch.ones(8, 24, dtype=torch.int8)), _config()),
        TypeError,
        ["of 1 has dtype torch.int8", "a float weight is needed", "keep=[r'1']"],
    ),
    "group does not divide": (
        lambda: quantize_model(_two(), _config(group_size=16)),
        ValueError,
        ["1: group_size=16 does not divide the 24 input features", "granularity='channel'", "overrides={r'1': {...}}"],
    ),
    "packed before calibration": (
        lambda: quantize_model(_two(), _config(form="packed", activation="int8_static")),
        ValueError,
        ["0: form='packed' needs a calibrated", "form='train'", "hf_bitnet.calibrate(model, batches)", "pack_model(model)"],
    ),
    "pack before calibration": (
        lambda: pack_model(_quantized(activation="int8_static")),
        ValueError,
        ["0 has a static activation range that was never calibrated", "hf_bitnet.calibrate(model, batches)"],
    ),
    "pack a plain model": (
        lambda: pack_model(_two()),
        ValueError,
        ["pack_model: Sequential has no", "quantize_model(model, config)"],
    ),
    "pack twice": (lambda: pack_model(_quantized(form="packed")), ValueError, ["the model is packed", "unpack_model(model)"]),
    "pack no module": (lambda: pack_model(None), TypeError, ["pack_model takes an nn.Module, got NoneType"]),  # type: ignore[type-var]
    "pack diverged weights": (
        lambda: pack_model(_diverged()),
        ValueError,
        ["the weight of 0 holds 384 NaN or infinite values"],
    ),
    "unpack a plain model": (lambda: unpack_model(_two()), ValueError, ["has no packed layer", "pack_model(model)"]),
    "unpack a trained model": (
        lambda: unpack_model(_quantized()),
        ValueError,
        ["has no packed layer; call pack_model"],
    ),
    "unpack without a config": (
        lambda: unpack_model(_without_config()),
        ValueError,
        ["carries no BitNetQuantizationConfig", "hf_bitnet.quantize_model"],
    ),
    "unpack with an unknown rule": (
        lambda: unpack_model(_quantized(form="packed"), weight_scale="kept"),
        ValueError,
        ["unknown weight scale rule 'kept'", "'learned'"],
    ),
    "unpack codes that no weight has": (
        lambda: unpack_model(_unreachable_codes()),
        ValueError,
        ["1: no latent weight gives these codes", "weight_scale='absmean'", "weight_scale='learned'"],
    ),
    "dequantize a plain model": (lambda: dequantize_model(_two()), ValueError, ["has no quantized layer", "quantize_model"]),
    "strength above one": (lambda: set_strength(_quantized(), 1.5), ValueError, ["from 0 (full precision) to 1", "got 1.5"]),
    "negative strength": (lambda: set_strength(_quantized(), -0.1), ValueError, ["got -0.1"]),
    "strength is NaN": (lambda: set_strength(_quantized(), float("nan")), ValueError, ["got nan"]),
    "strength is text": (lambda: set_strength(_quantized(), "1"), ValueError, ["got '1'"]),  # type: ignore[arg-type]
    "strength is True": (lambda: set_strength(_quantized(), True), ValueError, ["got True"]),
    "strength of a plain model": (
        lambda: set_strength(_two(), 0.5),
        ValueError,
        ["set_strength: Sequential has no", "quantize_model"],
    ),
    "strength of a packed model": (
        lambda: set_strength(_quantized(form="packed"), 0.5),
        ValueError,
        ["set_strength: the model is packed", "hf_bitnet.unpack_model(model)"],
    ),
    "harden a plain model": (lambda: harden(_two()), ValueError, ["has no quantized layer to be trained"]),
    "blend above one": (lambda: set_norm_blend(_quantized(), 2), ValueError, ["from 0 (identity) to 1 (RMS norm), got 2"]),
    "blend is text": (lambda: set_norm_blend(_quantized(), "a"), ValueError, ["got 'a'"]),  # type: ignore[arg-type]
    "least squares on too many levels": (
        lambda: SCALE_RULES.get("least_squares")(torch.ones(1, 4), Grid(-8, 8)),
        ValueError,
        ["at most 16 levels, this one has 17", "weight_scale='absmax'"],
    ),
    "group of a layer": (
        lambda: make_weight_quantizer("int4", group_size=7).scale_shape(4, 50),
        ValueError,
        ["group_size=7 does not divide the 50 input features", "granularity='channel'"],
    ),
}


def _diverged() -> nn.Module:
    model = _quantized()
    with torch.no_grad():
        model[0].weight.mul_(float("inf"))  # type: ignore[index, union-attr, operator]
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    call, error, parts = MODELS[name]
    _expect(error, parts, call)


def test_suggested_group_sizes_divide() -> None:
    with pytest.raises(ValueError) as raised:
        make_weight_quantizer("int4", group_size=100).scale_shape(4, 96)
    assert "sizes that do: 16, 32." in str(raised.value)


# ---- inputs ----

INPUTS: dict[str, tuple[Tensor, type[Exception], list[str]]] = {
    "integers": (
        torch.zeros(2, IN, dtype=torch.long),
        TypeError,
        ["dtype torch.int64", "float32, bfloat16 or float16", "keep=["],
    ),
    "bytes": (torch.zeros(2, IN, dtype=torch.uint8), TypeError, ["dtype torch.uint8", "layer.weight.dtype"]),
    "booleans": (torch.zeros(2, IN, dtype=torch.bool), TypeError, ["dtype torch.bool"]),
    "wrong last size": (torch.zeros(2, IN + 1), ValueError, [f"shape (2, {IN + 1})", f"in_features={IN}"]),
    "transposed": (torch.zeros(IN, 2), ValueError, [f"shape ({IN}, 2)", f"in_features={IN}"]),
    "a number": (torch.tensor(1.0), ValueError, ["shape ()", f"in_features={IN}"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str, form: str) -> None:
    x, error, parts = INPUTS[name]
    layer = FORMS[form](make_layer())
    _expect(error, [type(layer).__name__, *parts], lambda: layer(x))


def test_a_model_that_casts_to_the_dtype_of_a_packed_weight() -> None:
    """T5 casts to `wo.weight.dtype`; forcing its `wo` into packed form must be loud, not wrong."""
    model, batch = tiny("t5")
    quantize_model(model, _config(form="packed", overrides={"wo": {"weight": "int8"}}))
    _expect(TypeError, ["PackedBitLinear", "torch.uint8", "keep this layer"], lambda: model(**batch))


def test_packed_weights_do_not_train() -> None:
    layer = PackedBitLinear.from_trained(make_layer())
    with pytest.raises(RuntimeError, match="floating point"):
        layer.weight.requires_grad_()
