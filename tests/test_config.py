"""BitNetQuantizationConfig: every field survives being saved, what overrides mean, presets. Refusals: test_bad_input.py."""

from __future__ import annotations

import copy
import inspect
import json
import re
from typing import Any

import pytest
from transformers import LlamaConfig

from hf_bitnet import BitNetQuantizationConfig
from hf_bitnet.config import CONFIG_VERSION, LayerConfig
from hf_bitnet.quantizers import ACTIVATION_SCHEMES, SCALE_RULES, WEIGHT_SCHEMES
from hf_bitnet.ste import ESTIMATORS

# one legal value that is not the default, for every field; a new field without one fails a test below
OTHER: dict[str, dict[str, Any]] = {
    "weight": {"weight": "int4"},
    "weight_scale": {"weight_scale": "least_squares"},
    "granularity": {"granularity": "channel"},
    "group_size": {"group_size": 32},
    "activation": {"activation": "int8_static"},
    "ste": {"ste": "tanh"},
    "ste_threshold": {"ste_threshold": 0.25},
    "ste_temperature": {"ste_temperature": 2},
    "relaxation": {"relaxation": "relay"},
    "sub_norm": {"sub_norm": [r"o_proj", r"down_proj"]},
    "sub_norm_eps": {"sub_norm_eps": 1e-5},
    "keep": {"keep": [r"layers\.0\."]},
    "embeddings": {"embeddings": {"weight": "int4", "group_size": 32}},
    "output_head": {"output_head": "int8"},
    "overrides": {"overrides": {r"z\.down": {"weight": "int8"}, r"down": {"weight": "int4", "sub_norm": True}, r"a": "keep"}},
    "form": {"form": "packed"},
    "min_coverage": {"min_coverage": 0.5},
    "quantized_modules": {"quantized_modules": ["model.layers.*.mlp.down_proj"]},
    "version": {},  # another one is refused
    "quant_method": {},
}
PRESETS = ("bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8")


def _config(**fields: Any) -> BitNetQuantizationConfig:
    return BitNetQuantizationConfig(**fields)


def _through_json(config: BitNetQuantizationConfig) -> BitNetQuantizationConfig:
    """Out to a config.json and back, the way transformers writes it."""
    text = LlamaConfig(quantization_config=config).to_json_string()
    return BitNetQuantizationConfig.from_dict(json.loads(text)["quantization_config"])


def test_every_field_is_tested_here() -> None:
    parameters = inspect.signature(BitNetQuantizationConfig.__init__).parameters
    assert set(OTHER) == set(parameters) - {"self", "unknown"}


@pytest.mark.parametrize("field", OTHER)
def test_every_field_survives_being_saved(field: str) -> None:
    config = _config(**OTHER[field])
    for name, value in OTHER[field].items():
        assert getattr(config, name) == value != getattr(_config(), name)
    for other in (
        _config(**config.fields()),
        BitNetQuantizationConfig.from_dict(config.to_dict()),
        BitNetQuantizationConfig.from_dict(config.fields()),
        _through_json(config),
        copy.deepcopy(config),
    ):
        assert other.fields() == config.fields()


def test_the_order_of_overrides_survives_sorted_keys() -> None:
    config = _config(**OTHER["overrides"])
    assert list(_through_json(config).overrides) == [r"z\.down", r"down", r"a"] == list(config.overrides)


def test_saved_form_holds_plain_data_and_the_version() -> None:
    saved = _config(**OTHER["overrides"]).to_dict()
    assert json.loads(json.dumps(saved)) == saved
    assert saved["hf_bitnet"]["version"] == CONFIG_VERSION
    assert saved["hf_bitnet"]["quant_method"] == "hf_bitnet"


def test_fields_are_a_copy() -> None:
    given = {r"down": {"weight": "int4"}}
    keep = ["up"]
    config = _config(overrides=given, keep=keep)
    config.fields()["overrides"]["down"]["weight"] = "int8"
    config.fields()["keep"].append("x")
    keep.append("y")
    assert config.overrides == {"down": {"weight": "int4"}} and config.keep == ["up"]


def test_from_dict_hands_back_what_it_does_not_know() -> None:
    config, unused = BitNetQuantizationConfig.from_dict({"weight": "int4"}, return_unused_kwargs=True, colour="red")
    assert config.weight == "int4" and unused == {"colour": "red"}


def test_repr_shows_what_differs_and_can_be_typed_in() -> None:
    assert repr(_config()) == "BitNetQuantizationConfig()"
    config = _config(weight="int4", keep=["a"])
    assert repr(config) == "BitNetQuantizationConfig(weight='int4', keep=['a'])"
    assert eval(repr(config)).fields() == config.fields()


@pytest.mark.parametrize("name", WEIGHT_SCHEMES.names())
def test_any_registered_weight_scheme_is_accepted(name: str) -> None:
    config = _config(weight=name)
    kind = WEIGHT_SCHEMES.get(name)
    quantizer = config.layer("x").quantizer()
    assert (quantizer.scale_rule, quantizer.granularity) == (kind.default_scale, kind.default_granularity)
    assert config.bits == kind.bits


@pytest.mark.parametrize("name", ACTIVATION_SCHEMES.names())
def test_any_registered_activation_is_accepted(name: str) -> None:
    assert _config(activation=name).layer("x").activation == name


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_any_registered_estimator_is_accepted(name: str) -> None:
    assert _config(ste=name).layer("x").ste == name


# ---- presets ----


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_changes(preset: str) -> None:
    make = getattr(BitNetQuantizationConfig, preset)
    config = make()
    assert config.activation == "int8" and config.form == "train"
    changed = make(activation="none", keep=["x"], granularity="group", group_size=64)
    assert (changed.activation, changed.keep, changed.group_size) == ("none", ["x"], 64)
    assert changed.weight == config.weight
    assert _through_json(config).fields() == config.fields()


def test_presets_by_hand() -> None:
    found = {
        preset: (c.weight, c.layer("x").quantizer().scale_rule, c.granularity, c.bits)
        for preset in PRESETS
        for c in [getattr(BitNetQuantizationConfig, preset)()]
    }
    assert found == {
        "bitnet_b158": ("ternary", "absmean", "tensor", 1.58),
        "w1a8": ("binary", "absmean", "channel", 1),
        "w2a8": ("int2_seq", "learned", "channel", 2),
        "w4a8": ("int4", "absmax", "channel", 4),
        "w8a8": ("int8", "absmax", "channel", 8),
    }


# ---- overrides, keep, sub-norms ----


def test_the_first_matching_override_wins() -> None:
    config = _config(overrides={r"layers\.0\.": "keep", r"down_proj": {"weight": "int4"}, r"layers": {"weight": "int8"}})
    assert config.is_kept("layers.0.down_proj") and not config.is_forced("layers.0.down_proj")
    assert config.layer("layers.1.down_proj").weight == "int4"
    assert config.layer("layers.1.up_proj").weight == "int8"
    assert config.layer("head").weight == "ternary" and not config.is_forced("head")
    assert config.is_forced("layers.1.up_proj")


def test_an_override_beats_keep() -> None:
    config = _config(keep=[r"layers\.1", r"head"], overrides={r"layers\.1\.up": {"activation": "int4"}})
    assert config.is_kept("layers.1.down") and config.is_kept("head")
    assert not config.is_kept("layers.1.up") and config.is_forced("layers.1.up")


def test_patterns_are_searched_in_the_whole_name() -> None:
    config = _config(keep=[r"^lm_head$", r"\.7\."])
    assert config.is_kept("lm_head") and not config.is_kept("model.lm_head")
    assert config.is_kept("model.layers.7.q") and not config.is_kept("model.layers.17.q")


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        # another scheme brings its own rule and granularity
        ({"weight_scale": "absmean", "granularity": "tensor"}, {"weight": "int4"}, ("int4", "absmax", "channel", None)),
        ({"granularity": "group", "group_size": 64}, {"weight": "int4"}, ("int4", "absmax", "channel", None)),
        ({"granularity": "group", "group_size": 64}, {"weight": "int4", "group_size": 32}, ("int4", "absmax", "group", 32)),
        # the same scheme keeps what the base says
        ({"granularity": "group", "group_size": 64}, {"weight": "ternary"}, ("ternary", "absmean", "group", 64)),
        ({"granularity": "group", "group_size": 64}, {"granularity": "tensor"}, ("ternary", "absmean", "tensor", None)),
        ({"granularity": "group", "group_size": 64}, {"group_size": 16}, ("ternary", "absmean", "group", 16)),
        ({"granularity": "channel"}, {"weight_scale": "learned"}, ("ternary", "learned", "channel", None)),
    ],
)
def test_what_an_override_leaves_as_it_was(base: dict[str, Any], change: dict[str, Any], expected: tuple) -> None:
    quantizer = _config(**base, overrides={r"x": change}).layer("x").quantizer()
    assert (quantizer.scheme, quantizer.scale_rule, quantizer.granularity, quantizer.group_size) == expected


def test_sub_norm_patterns_and_overrides() -> None:
    config = _config(sub_norm=[r"o_proj"], overrides={r"0\.o_proj": {"sub_norm": False}, r"up": {"sub_norm": True}})
    assert config.layer("1.o_proj").sub_norm and config.layer("up").sub_norm
    assert not config.layer("0.o_proj").sub_norm and not config.layer("q_proj").sub_norm
    assert _config(sub_norm=["o"], overrides={"o": {"weight": "int8"}}).layer("o").sub_norm


def test_an_override_may_name_every_field_of_a_layer() -> None:
    fields = list(LayerConfig.__dataclass_fields__)
    change = {"weight": "int2", "weight_scale": "absmax", "granularity": "group", "group_size": 8, "activation": "sign"}
    change |= {"ste": "clipped", "sub_norm": True}
    assert set(fields) == set(change)
    assert _config(overrides={"x": change}).layer("x") == LayerConfig(**change)


def test_every_scale_rule_is_described() -> None:
    text = inspect.getdoc(BitNetQuantizationConfig) or ""
    named = set(re.findall(r'"(\w+)"', text))
    assert set(SCALE_RULES) | set(WEIGHT_SCHEMES) | set(ACTIVATION_SCHEMES) | set(ESTIMATORS) <= named
