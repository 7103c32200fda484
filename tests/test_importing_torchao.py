"""Checkpoints of torchao: written here part by part as its files are described, and by torchao itself where it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_bitnet import (
    import_model,
)
from hf_bitnet.surgery import quantized_layers
from tests.checkpoints import assert_same_layers, edit_config, loaded, logits
from tests.foreign import (
    projections,
)
from tests.tiny import tiny


def torchao_folder(
    model: Any, folder: Path, quantize: Any, note: dict[str, Any], *, drop: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """`quantize`: weight -> {part: tensor}. Returns the values."""
    model.save_pretrained(folder)
    state, notes, values = dict(model.state_dict()), {}, {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        notes[name] = json.dumps({"_type": "Tensor"})
        if layer in projections(model):
            parts = quantize(tensor.detach())
            del state[name]
            state |= {f"{layer}._weight_{part}": value for part, value in parts.items() if part not in drop}
            notes[name] = json.dumps(note | {"_tensor_data_names": list(parts)})
            groups = parts["scale"].shape[1]
            zero = parts.get("zero_point", torch.zeros(1)).float()
            spread = (parts["qdata"].float().unflatten(1, (groups, -1)) - zero.unsqueeze(-1)) * parts["scale"].unsqueeze(-1)
            values[layer] = spread.flatten(1)
    notes["tensor_names"] = json.dumps(list(model.state_dict()))
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors", notes)
    edit_config(folder, lambda config: config.update(quantization_config={"quant_method": "torchao"}))
    return values


INT8 = {"_type": "Int8Tensor", "_data": {"act_quant_kwargs": None}}
INT4 = {
    "_type": "IntxUnpackedToInt8Tensor",
    "_data": {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "activation_quantization": None},
}


def symmetric(weight: Tensor, largest: int, groups: int = 1) -> dict[str, Tensor]:
    rows = weight.unflatten(1, (groups, -1))
    scale = rows.abs().amax(dim=-1) / largest
    codes = (rows / scale.unsqueeze(-1)).round().flatten(1).to(torch.int8)
    return {"qdata": codes, "scale": scale, "zero_point": torch.zeros(scale.shape, dtype=torch.int8)}


def with_input(note: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**note, "_data": note["_data"] | settings}


PER_TOKEN = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}}}
PER_TENSOR = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": {"_type": "PerTensor", "_data": {}}}}


@pytest.mark.parametrize(
    ("note", "largest", "groups", "scheme", "activation"),
    [
        (INT8, 127, 1, "int8", "none"),
        (INT4, 7, 2, "int4", "none"),
        (with_input(INT8, act_quant_kwargs=PER_TOKEN), 127, 1, "int8", "int8"),
        (with_input(INT4, activation_quantization="int8_asym_per_token"), 7, 4, "int4", "int8_asymmetric"),
    ],
    ids=["int8", "int4", "int8 dynamic", "int4 dynamic"],
)
def test_torchao_parts(note: dict[str, Any], largest: int, groups: int, scheme: str, activation: str, tmp_path: Path) -> None:
    values = torchao_folder(tiny("llama")[0], tmp_path, lambda weight: symmetric(weight, largest, groups), note)
    imported = import_model(tmp_path)
    layers = dict(quantized_layers(imported))
    assert layers.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(layers[name].quantized_weight().dequantize(), value)
        assert layers[name].quantizer.scheme == scheme and layers[name].quantized_weight().scale.shape[1] == groups
    assert imported.config.quantization_config.activation == activation
    imported.save_pretrained(tmp_path / "again")
    assert_same_layers(loaded(type(imported), tmp_path / "again"), imported)


def test_torchao_zero_points(tmp_path: Path) -> None:
    def asymmetric(weight: Tensor) -> dict[str, Tensor]:
        parts = symmetric(weight, 3)
        return {**parts, "qdata": parts["qdata"] + 2, "zero_point": parts["zero_point"] + 2}

    values = torchao_folder(tiny("llama")[0], tmp_path, asymmetric, INT4)
    layers = dict(quantized_layers(import_model(tmp_path)))
    assert all(torch.equal(layers[name].quantized_weight().dequantize(), value) for name, value in values.items())


@pytest.mark.parametrize(
    ("note", "largest", "extra", "words"),
    [
        (INT8, 128, {}, r"8-bit levels go from -128 to \d+, those of 8-bit schemes here from -127 to 127; outside='clip'"),
        (INT4, 8, {}, r"4-bit levels go from -8 to \d, those of 4-bit schemes here from -7 to 7; outside='wider'"),
        ({"_type": "Int4Tensor", "_data": {}}, 7, {}, "it is a torchao Int4Tensor; read are Int8Tensor and Intx"),
        ({"_type": "Float8Tensor", "_data": {}}, 7, {}, "it is a torchao Float8Tensor"),
        (with_input(INT8, act_quant_kwargs=PER_TENSOR), 127, {}, "its input is quantized in a way that no scheme here"),
        (INT8, 127, {"act_pre_scale": torch.ones(1)}, "its input is changed by act_pre_scale"),
        (INT8, 127, {"scale": torch.full((1, 1), math.nan)}, "1 of its scales are NaN"),
        (INT8, 127, {"scale": torch.ones(3, 5)}, r"its scales have shape \(3, 5\)"),
        (INT8, 127, {"zero_point": torch.full((1, 1), 0.5)}, "zero points are not whole numbers"),
        (INT8, 127, {"scale": torch.ones(1, 1), "zero_point": torch.full((1, 1), 65536)}, "zero points go from 65536 to 65536"),
        (INT8, 127, {"scale": torch.ones(1, 1), "zero_point": torch.full((1, 1), -129.0)}, "legal are those of int8, -128"),
        (INT8, 127, {"qdata": torch.zeros(0, 4, dtype=torch.int8)}, r"its qdata is torch.int8 of shape \(0, 4\)"),
        (INT8, 127, {"scale": torch.ones(4, 0)}, r"its scale is torch.float32 of shape \(4, 0\)"),
        (INT8, 127, {"qdata": torch.zeros(4, 4)}, r"its qdata is torch.float32 of shape \(4, 4\)"),
    ],
    ids=range(14),
)
def test_torchao_refused(note: dict[str, Any], largest: int, extra: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    model, _ = tiny("llama")

    def parts(weight: Tensor) -> dict[str, Tensor]:
        codes = symmetric(-weight.abs(), min(largest, 127)) if largest > 127 else symmetric(weight, largest)
        if largest > 127:
            codes["qdata"][0, 0] = -128
        return codes

    torchao_folder(model, tmp_path, parts, note)
    name = "model.layers.0.self_attn.q_proj"
    if extra:
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            notes = file.metadata()
        tensors = load_file(tmp_path / "model.safetensors")
        tensors |= {f"{name}._weight_{part}": value for part, value in extra.items()}
        described = json.loads(notes[f"{name}.weight"])
        described["_tensor_data_names"] = list({*described["_tensor_data_names"], *extra})
        save_file(tensors, tmp_path / "model.safetensors", notes | {f"{name}.weight": json.dumps(described)})
    with pytest.raises(ValueError, match=words):
        import_model(tmp_path)
    if "input is quantized" in words:
        assert import_model(tmp_path, activation="int8").config.quantization_config.activation == "int8"


@pytest.mark.parametrize("change", ["no notes", "no JSON", "part missing"])
def test_torchao_damaged(change: str, tmp_path: Path) -> None:
    drop = ("scale",) if change == "part missing" else ()
    torchao_folder(tiny("llama")[0], tmp_path, lambda weight: symmetric(weight, 127), INT8, drop=drop)
    tensors = load_file(tmp_path / "model.safetensors")
    words = "lacks the tensor model.layers.0.mlp.down_proj._weight_scale"
    if not drop:
        notes = {} if change == "no notes" else {"tensor_names": "[", "a.weight": "{"}
        save_file(tensors, tmp_path / "model.safetensors", notes)
        words = "the notes of its safetensors files are not torchao's"
    with pytest.raises(ValueError, match=words):
        import_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["int8", "int8 dynamic", "7 bits dynamic", "int4 groups", "int4 groups dynamic", "int4 asymmetric"]
)
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_what_torchao_itself_saves(kind: str, shard: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="pip install 'hf_bitnet[lean]'")
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
    )

    groups = {"weight_dtype": torch.int4, "granularity": PerGroup(16)}
    dynamic = {"weight_dtype": torch.int4, "weight_granularity": PerGroup(16)}
    config = {
        "int8": lambda: Int8WeightOnlyConfig(),
        "int8 dynamic": lambda: Int8DynamicActivationInt8WeightConfig(),
        "7 bits dynamic": lambda: Int8DynamicActivationInt8WeightConfig(reduce_range=True),
        "int4 groups": lambda: IntxWeightOnlyConfig(**groups),
        "int4 groups dynamic": lambda: Int8DynamicActivationIntxWeightConfig(**dynamic),
        "int4 asymmetric": lambda: IntxWeightOnlyConfig(**groups, mapping_type=MappingType.ASYMMETRIC),
    }[kind]()
    model, batch = tiny("llama")
    for layer in projections(model).values():  # their -128 comes where a row's largest magnitude is negative
        turn = layer.weight.data.gather(1, layer.weight.data.abs().argmax(dim=1, keepdim=True)).sign()
        layer.weight.data *= turn if kind.startswith("int8") else 1
    model.save_pretrained(tmp_path / "float")
    theirs = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=tf.TorchAoConfig(config), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    if kind.startswith("7"):
        with pytest.raises(ValueError, match="its input is quantized in a way that no scheme here computes"):
            import_model(tmp_path / "theirs")
    imported = import_model(tmp_path / "theirs", outside="wider", activation="int8" if kind.startswith("7") else None)
    for name, layer in quantized_layers(imported):
        value = theirs.get_submodule(name).weight.dequantize()
        assert torch.equal(layer.quantized_weight().dequantize(), value), name
    difference = (logits(imported, batch) - logits(theirs, batch)).std() / logits(theirs, batch).std()
    # their scale of inputs is another by 0.4 %, so every rounding may differ
    assert difference < (0.1 if kind.startswith("7") else 0.05 if "dynamic" in kind else 1e-5)


def test_torchao_transposed_weights_are_refused(tmp_path: Path) -> None:
    """A square weight (in_features, out_features) looks like one that is not."""
    model, layer = tiny("gpt2", n_layer=1)[0], "transformer.h.0.attn.c_proj"
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    parts = symmetric(tensors.pop(f"{layer}.weight"), 127)
    notes = {f"{layer}.weight": json.dumps(INT8 | {"_tensor_data_names": list(parts)}), "tensor_names": json.dumps([layer])}
    tensors |= {f"{layer}._weight_{part}": value for part, value in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors", notes)
    edit_config(tmp_path, lambda config: config.update(quantization_config={"quant_method": "torchao"}))
    with pytest.raises(ValueError, match=r"attn.c_proj.weight: it is stored \(in_features, out_features\), so that"):
        import_model(tmp_path)
