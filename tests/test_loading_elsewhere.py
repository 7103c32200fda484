"""Checkpoints that are loaded by another class than the one that saved them: the same layers, by other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import hf_bitnet as hb
from hf_bitnet.surgery import quantized_layers
from tests.tiny import tiny

CONFIGS: dict[str, dict[str, Any]] = {
    "weights": {"overrides": {r"^model\.layers\.0\.": {"weight": "int8"}}},
    "as many bits": {"overrides": {r"^model\.layers\.0\.": {"weight": "int2"}}},
    "activations": {"overrides": {r"^model\.layers\.1\.": {"activation": "int4"}}},
    "norms": {"sub_norm": [r"^model\.layers\.\d+\.mlp\.down_proj$"]},
    "left out": {"overrides": {r"^model\.layers\.0\.mlp\.": "keep"}},
}


def _specs(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    return {
        name.removeprefix(prefix): (layer.quantizer, layer.activation, layer.sub_norm is not None)
        for name, layer in quantized_layers(model)
    }


@pytest.mark.parametrize("form", ["train", "packed"])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_patterns_hold_for_the_class_that_saved(fields: dict[str, Any], form: str, tmp_path: Path) -> None:
    model, batch = tiny("llama")
    hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(form=form, **fields))
    for _, layer in quantized_layers(model):
        if layer.sub_norm is not None:
            layer.sub_norm.blend.fill_(1.0)
            layer.sub_norm.weight.mul_(1.5)
    expected = model.model(**batch).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    base = tf.AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert _specs(base) == _specs(model, "model.")
    torch.testing.assert_close(base(**batch).last_hidden_state, expected)
    # and on from there, to either class
    base.save_pretrained(tmp_path / "base")
    for again in (tf.AutoModel, tf.AutoModelForCausalLM):
        loaded = again.from_pretrained(tmp_path / "base").eval()
        inner = loaded.model if again is tf.AutoModelForCausalLM else loaded
        assert _specs(inner) == _specs(base)
        torch.testing.assert_close(inner(**batch).last_hidden_state, expected)
    if form == "packed":
        hb.pack_model(hb.unpack_model(base))
        assert _specs(base) == _specs(model, "model.")


@torch.no_grad()
def test_a_part_that_is_saved_by_itself(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    overrides = hb.suggest_overrides(hb.layer_report(hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig())), 3)
    hb.quantize_model(model, hb.BitNetQuantizationConfig(overrides=overrides))
    expected = model.model(**batch).last_hidden_state
    model.model.save_pretrained(tmp_path)
    torch.testing.assert_close(tf.AutoModel.from_pretrained(tmp_path)(**batch).last_hidden_state, expected)
