"""`import_model` of folders: dense values, transformers' native method, learned scales."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

from hf_bitnet import (
    BitNetQuantizationConfig,
    coverage,
    dequantize_model,
    export_model,
    import_model,
    pack_model,
    quantize_model,
)
from hf_bitnet.modules import BitLinear, PackedBitLinear
from hf_bitnet.surgery import quantized_layers
from tests.checkpoints import assert_same_layers, edit_config, edit_tensors, loaded, logits
from tests.foreign import (
    onto_grid,
    paretoq,
    projections,
    values_of,
)
from tests.tiny import tiny

# ---- dense ----


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "bitnet", "t5"])
def test_dense(family: str, tmp_path: Path) -> None:
    model, batch = tiny(family)
    fields: dict[str, Any] = {"weight": "ternary", "granularity": "channel", "activation": "none"}
    quantize_model(model, BitNetQuantizationConfig(**fields, form="packed"))
    dense = dequantize_model(copy.deepcopy(model))
    dense.save_pretrained(tmp_path / "dense")
    imported = import_model(tmp_path / "dense")
    expected = values_of(model)
    assert values_of(imported).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in values_of(imported).items())
    assert torch.allclose(logits(imported, batch), logits(model, batch), rtol=0, atol=1e-5)
    imported.save_pretrained(tmp_path / "again")
    again = loaded(type(imported), tmp_path / "again")
    assert_same_layers(again, imported)
    assert torch.equal(logits(again, batch), logits(imported, batch))


def test_mixed_layers_round_trip(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    config = BitNetQuantizationConfig(
        weight="int2_seq",
        granularity="channel",
        activation="none",
        form="packed",
        overrides={
            r"layers\.1\.mlp\.down_proj": {"weight": "int8", "group_size": 16},
            r"v_proj": {"weight": "binary"},
            r"layers\.0\.self_attn\.q_proj": "keep",
        },
    )
    quantize_model(model, config)
    dequantize_model(copy.deepcopy(model)).save_pretrained(tmp_path / "dense")
    imported = import_model(tmp_path / "dense", activation="int8")
    layers = dict(quantized_layers(imported))
    assert layers.keys() == dict(quantized_layers(model)).keys(), "a kept layer stays as it is"
    kinds = {name: (layer.quantizer.scheme, layer.quantizer.group_size) for name, layer in layers.items()}
    assert kinds["model.layers.1.mlp.down_proj"] == ("int8", 16) and kinds["model.layers.0.mlp.down_proj"] == ("int2_seq", None)
    assert kinds["model.layers.1.self_attn.v_proj"] == ("binary", None)
    assert "kept by the config" in str(coverage(imported))
    imported.save_pretrained(tmp_path / "again")
    again = loaded(type(imported), tmp_path / "again")
    assert_same_layers(again, imported)
    assert torch.equal(logits(again, batch), logits(imported, batch))
    # the model without its head knows its layers by shorter names
    assert_same_layers(tf.AutoModel.from_pretrained(tmp_path / "again"), imported.model)


@pytest.mark.parametrize("form", ["packed", "train"])
def test_forms(form: str, tmp_path: Path) -> None:
    model, batch = tiny("llama")
    onto_grid(model, [-7, -2, 0, 1, 7])
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path)
    imported = import_model(tmp_path, form=form)
    assert imported.generation_config.eos_token_id == [2, 5]
    layers = dict(quantized_layers(imported))
    assert all(isinstance(layer, PackedBitLinear if form == "packed" else BitLinear) for layer in layers.values())
    assert imported.config.quantization_config.form == form and not imported.training
    for name, layer in projections(model).items():
        assert torch.equal(layers[name].quantized_weight().dequantize(), layer.weight)
    assert torch.allclose(logits(imported, batch), logits(model, batch), rtol=0, atol=1e-5)
    if form == "train":
        assert all(layer.quantizer.learned for layer in layers.values())
        assert_same_layers(pack_model(copy.deepcopy(imported)), imported)
    imported.save_pretrained(tmp_path / "again")
    assert_same_layers(loaded(type(imported), tmp_path / "again"), imported)


def test_float_checkpoint_names_the_way_out(tmp_path: Path) -> None:
    tiny("llama")[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no quantized layer.*lie on no grid.*BitNetQuantizationConfig.bitnet_b158"):
        import_model(tmp_path)
    # that way: what was trained through absmean ternary
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitNetQuantizationConfig.bitnet_b158())
    assert dict(quantized_layers(model))


# ---- native ----


def onebitllms(model: Any, folder: Path) -> dict[str, Tensor]:
    """A checkpoint as onebitllms' quantize_to_1bit writes it, all in bfloat16; returns the values of the layers."""
    model = model.bfloat16()
    model.save_pretrained(folder)
    state, values = dict(model.state_dict()), {}
    for name, layer in projections(model).items():
        weight = layer.weight.detach()
        inverse = 1.0 / weight.abs().mean().clamp(min=1e-5)
        codes = (weight * inverse).round().clamp(-1, 1)
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = pack_weights(codes.clone()), inverse.view(1)
        values[name] = codes.float() * inverse.float().reciprocal()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    settings = {"quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"}}
    edit_config(folder, lambda config: config.update(settings | {"is_bitnet_config": True}))
    return values


def test_onebitllms(tmp_path: Path) -> None:
    values = onebitllms(tiny("llama")[0], tmp_path)
    imported = import_model(tmp_path)
    assert values_of(imported).keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in values_of(imported).items())
    assert imported.dtype == torch.bfloat16 and all(type(layer) is PackedBitLinear for _, layer in quantized_layers(imported))
    trained = import_model(tmp_path, form="train", dtype=torch.float32)
    assert all(torch.equal(value, values[name]) for name, value in values_of(trained).items())
    with pytest.raises(ValueError, match="quantizes inputs as 'int8'"):
        import_model(tmp_path, activation="none")


def test_falcon_e_in_bfloat16(tmp_path: Path) -> None:
    """onebitllms' convert_to_bf16, and the revision 'bfloat16' of Falcon-E: codes / (1 / scale), in bfloat16."""
    model = tiny("llama")[0].bfloat16()
    for layer in projections(model).values():
        inverse = 1.0 / layer.weight.data.abs().mean().clamp(min=1e-5)
        layer.weight.data = (layer.weight.data * inverse).round().clamp(-1, 1) / inverse
    model.save_pretrained(tmp_path)
    imported = import_model(tmp_path, activation="int8")
    for name, layer in projections(model).items():
        got = dict(quantized_layers(imported))[name]
        assert got.quantizer.scheme == "ternary" and got.quantizer.granularity == "tensor"
        assert torch.equal(got.quantized_weight().dequantize(torch.bfloat16), layer.weight)


@pytest.mark.parametrize("form", ["packed", "train"])
def test_native_online(form: str, tmp_path: Path) -> None:
    model, batch = tiny("llama")
    model.save_pretrained(tmp_path)
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(tmp_path, lambda config: config.update(quantization_config=settings | {"modules_to_not_convert": ["lm_head"]}))
    imported = import_model(tmp_path, form=form)
    ours = quantize_model(model, BitNetQuantizationConfig.bitnet_b158())
    assert_same_layers(imported, ours)
    assert imported.config.quantization_config.form == form
    assert torch.allclose(logits(imported, batch), logits(ours, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["mlx", "onnx"])
def test_exports_that_only_others_read_say_so(format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="pip install 'hf_bitnet[onnx]'")
    model = quantize_model(tiny("llama", hidden_size=64)[0], BitNetQuantizationConfig(form="packed"))
    export_model(model, tmp_path / format, format=format, verify=False, progress=False)
    with pytest.raises(ValueError, match=f"an export in the format '{format}', which this library does not read"):
        import_model(tmp_path / format)


def test_exported_native_comes_back(tmp_path: Path) -> None:
    model = quantize_model(tiny("qwen3")[0], BitNetQuantizationConfig.bitnet_b158())
    export_model(model, tmp_path / "native", format="bitnet", verify=False, progress=False)
    back = dict(quantized_layers(import_model(tmp_path / "native")))
    for name, layer in quantized_layers(model):
        assert torch.equal(back[name].quantized_weight().codes, layer.quantized_weight().codes)


# ---- learned scales ----

LEARNED = {1: "binary", 1.58: "ternary", 2: "int2_seq", 3: "int4", 4: "int4"}


def learned(weight: Tensor, w_bits: float) -> Tensor:
    """A scale near ParetoQ's start, moved a little, as training does; not so far that -8 occurs."""
    spread = 1 + 0.05 * torch.rand(weight.shape[0], 1)
    if w_bits == 1:
        return weight.abs().mean(dim=1, keepdim=True) * spread
    largest = weight.abs().amax(dim=1, keepdim=True)
    return largest * (spread - 0.2) if w_bits < 3 else largest / (2 ** (w_bits - 1) - 1) * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("w_bits", LEARNED)
def test_learned_scales(w_bits: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = tiny("llama")
    values = paretoq(model, tmp_path, w_bits, scale=lambda weight: learned(weight, w_bits), dtype=dtype)
    imported = import_model(tmp_path)
    layers = dict(quantized_layers(imported))
    assert layers.keys() == values.keys()
    for name, value in values.items():
        quantizer = layers[name].quantizer
        assert (quantizer.scheme, quantizer.granularity, quantizer.learned) == (LEARNED[w_bits], "channel", True)
        assert torch.equal(layers[name].quantized_weight().dequantize(dtype), value), name
    assert not hasattr(imported.config, "w_bits")
    for name, layer in projections(model).items():
        layer.weight.data = values[name]
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    assert torch.allclose(logits(imported, batch).float(), logits(model, batch).float(), rtol=0, atol=tolerance)
    imported.save_pretrained(tmp_path / "again")
    assert_same_layers(loaded(type(imported), tmp_path / "again"), imported)
    trained = import_model(tmp_path, form="train", dtype=torch.float32)
    assert_same_layers(trained, imported)


def test_learned_scales_with_levels_that_we_lack(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    values = paretoq(model, tmp_path, 4, scale=lambda weight: -weight.amin(dim=1, keepdim=True) / 8, dtype=torch.float32)
    with pytest.raises(
        ValueError, match="4-bit levels go from -8 to 7, those of 4-bit schemes here from -7 to 7; outside='wider'"
    ):
        import_model(tmp_path)
    wider = dict(quantized_layers(import_model(tmp_path, outside="wider")))
    assert {layer.quantizer.scheme for layer in wider.values()} == {"int8"}
    assert all(torch.equal(wider[name].quantized_weight().dequantize(), value) for name, value in values.items())
    clipped = dict(quantized_layers(import_model(tmp_path, outside="clip")))
    assert {layer.quantizer.scheme for layer in clipped.values()} == {"int4"}


def test_zeros_of_one_bit_are_a_third_level(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[2, 5] = 0
    values = paretoq(model, tmp_path, 1, scale=lambda weight: weight.abs().mean(dim=1), dtype=torch.float32)
    layers = dict(quantized_layers(import_model(tmp_path)))
    name = "model.layers.0.mlp.up_proj"
    assert layers[name].quantizer.scheme == "ternary" and layers["model.layers.1.mlp.up_proj"].quantizer.scheme == "binary"
    assert torch.equal(layers[name].quantized_weight().dequantize(), values[name])


def test_learned_scales_refused(tmp_path: Path) -> None:
    paretoq(tiny("llama")[0], tmp_path, 2, scale=lambda weight: weight.abs().amax(dim=1), dtype=torch.float32)
    edit_config(tmp_path, lambda config: config.pop("w_bits"))
    with pytest.raises(ValueError, match=r"w_bits=None in its config.json; say how many bits"):
        import_model(tmp_path)
    with pytest.raises(ValueError, match="w_bits=5 is given"):
        import_model(tmp_path, w_bits=5)
    assert import_model(tmp_path, w_bits=2).config.quantization_config.weight == "int2_seq"
    scale = "model.layers.1.mlp.up_proj.weight_clip_val"
    edit_tensors(tmp_path, lambda tensors: tensors.update({scale: tensors[scale] * math.nan}))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: it or its learned scale holds NaN"):
        import_model(tmp_path, w_bits=2)
    edit_tensors(tmp_path, lambda tensors: tensors.update({scale: torch.ones(3, 1)}))
    with pytest.raises(ValueError, match=r"scales of shape \(3, 1\)"):
        import_model(tmp_path, w_bits=2)
    empty = {scale.removesuffix("_clip_val"): torch.ones(0, 48), scale: torch.ones(0, 1)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(empty))
    with pytest.raises(ValueError, match=r"it has shape \(0, 48\) and scales of shape \(0, 1\)"):
        import_model(tmp_path, w_bits=2)


@pytest.mark.parametrize("inner", [48, 80])
def test_learned_scales_of_transposed_weights_are_refused(inner: int, tmp_path: Path) -> None:
    """A square weight (in_features, out_features) looks like one that is not."""
    model, _ = tiny("gpt2", n_inner=inner, n_layer=1)
    model.save_pretrained(tmp_path)
    scales = torch.rand(inner, 1) + 0.1
    edit_tensors(tmp_path, lambda tensors: tensors.update({"transformer.h.0.mlp.c_proj.weight_clip_val": scales}))
    with pytest.raises(ValueError, match=r"mlp.c_proj.weight: it is stored \(in_features, out_features\), so that"):
        import_model(tmp_path, w_bits=4)
