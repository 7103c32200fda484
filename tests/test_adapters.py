"""Models with adapters of peft: what their configs say holds for the model that is left without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_bitnet as hb
from hf_bitnet.surgery import quantized_layers
from hf_bitnet.surgery.adapters import own_modules
from tests.qat import make_trainer
from tests.tiny import tiny

CONFIG = hb.BitNetQuantizationConfig.bitnet_b158(overrides={r"v_proj$": {"weight": "int4"}})


def adapted(model: nn.Module, **fields: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **fields}))


def _of_the_base(model: Any, wrapped: Any) -> Any:
    hb.unpack_model(model)
    return wrapped.merge_and_unload()


def _of_the_whole(model: Any, wrapped: Any) -> Any:
    hb.unpack_model(wrapped)
    return wrapped.merge_and_unload()


def _taken_off(model: Any, wrapped: Any) -> Any:
    hb.unpack_model(wrapped)
    hb.pack_model(wrapped)
    return wrapped.unload()


@pytest.mark.parametrize("way", [_of_the_base, _of_the_whole, _taken_off])
@pytest.mark.parametrize("target", [["q_proj", "v_proj"], "all-linear"])
@torch.no_grad()
def test_merged_models_come_back(way: Callable[[Any, Any], Any], target: Any, tmp_path: Path) -> None:
    model, batch = tiny("llama")
    hb.pack_model(hb.quantize_model(model, CONFIG))
    wrapped = adapted(model, target_modules=target, init_lora_weights=False)
    merged = way(model, wrapped).eval()
    expected, layers = merged(**batch).logits, dict(quantized_layers(merged))
    merged.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert dict(quantized_layers(loaded)).keys() == layers.keys() and len(layers) == 14
    assert {layer.quantizer.scheme for name, layer in layers.items() if "v_proj" in name} == {"int4"}
    torch.testing.assert_close(loaded(**batch).logits, expected)
    assert not any("base_layer" in name or "lora" in name for name in loaded.config.quantization_config.quantized_modules)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
@torch.no_grad()
def test_merges_into_packed_layers_are_refused_before_they_begin(merge: str) -> None:
    model, batch = tiny("llama")
    packed = hb.BitNetQuantizationConfig.bitnet_b158(keep=["lm_head", r"self_attn"], form="packed", min_coverage=0.0)
    wrapped = adapted(hb.quantize_model(model, packed), target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    expected, floats = wrapped(**batch).logits, model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj is packed.*nothing was merged.*hf_bitnet\.unpack_model"):
        getattr(wrapped, merge)()
    assert floats.equal(model.model.layers[0].self_attn.q_proj.base_layer.weight)
    torch.testing.assert_close(wrapped(**batch).logits, expected)
    adapted(tiny("llama")[0]).merge_and_unload()


def test_config_of_an_adapted_model_is_that_of_the_plain_one() -> None:
    model, _ = tiny("llama")
    hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158())
    before = model.config.quantization_config.to_dict()
    wrapped = adapted(model, modules_to_save=["lm_head"])
    hb.unpack_model(hb.pack_model(wrapped))
    assert model.config.quantization_config.to_dict() == before


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_are_not_quantized(whole: bool) -> None:
    model, _ = tiny("llama")
    wrapped = adapted(model)
    with pytest.raises(ValueError, match=r"has adapters of peft.*first quantize_model\(model, config\), then get_peft_model"):
        hb.quantize_model(wrapped if whole else model, CONFIG)
    merged = wrapped.merge_and_unload()
    assert len([*quantized_layers(hb.quantize_model(merged, CONFIG))]) == 14


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (CONFIG, {"modules_to_save": ["v_proj"], "target_modules": ["q_proj"]}),
        (hb.BitNetQuantizationConfig.bitnet_b158(output_head="int8"), {"target_modules": ["q_proj", "lm_head"]}),
        (hb.BitNetQuantizationConfig.bitnet_b158(output_head="int8"), {"modules_to_save": ["lm_head"]}),
    ],
    ids=["a copy of a layer", "a head", "a copy of the head"],
)
@torch.no_grad()
def test_layers_keep_their_own_schemes(config: hb.BitNetQuantizationConfig, fields: dict[str, Any]) -> None:
    model, batch = tiny("llama")
    wrapped = adapted(hb.quantize_model(model, config), **fields)
    expected = wrapped.eval()(**batch).logits
    found = hb.unpack_model(hb.pack_model(wrapped))
    torch.testing.assert_close(found.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_tables_with_trained_tokens_have_their_name() -> None:
    model, _ = tiny("llama")
    hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(embeddings="int8"))
    wrapped = adapted(model, trainable_token_indices=[1, 2])
    names = [name for name, _ in own_modules(wrapped)]
    assert "model.embed_tokens" in names and not any("token_adapter" in name or "lora" in name for name in names)


def test_a_loaded_model_trains_after_the_merge(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    hb.pack_model(hb.quantize_model(model, CONFIG)).save_pretrained(tmp_path / "packed")
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    hb.unpack_model(wrapped)
    make_trainer(tmp_path / "run", wrapped.merge_and_unload(), max_steps=1).train()
