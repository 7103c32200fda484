"""Recognition of grids, the fitting of codes, and `import_model` of folders: dense, native, learned scales, torchao."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.bitnet import pack_weights

from hf_bitnet import (
    BitNetQuantizationConfig,
    coverage,
    dequantize_model,
    export_native,
    import_model,
    pack_model,
    quantize_model,
)
from hf_bitnet.importing import Found, Levels, Misfit, fit, recognise
from hf_bitnet.modules import BitLinear, PackedBitLinear
from hf_bitnet.quantizers import WEIGHT_SCHEMES
from hf_bitnet.surgery import quantized_layers
from tests.checkpoints import assert_same_layers, edit_config, edit_tensors, loaded, logits
from tests.foreign import onto_grid, paretoq, projections
from tests.tiny import tiny

SHAPES = [(48, 64), (7, 96), (1, 32), (33, 512)]
SCALES = ("tensor", "channel", 16, 32)
CASES = [
    (scheme, shape, scales)
    for scheme in WEIGHT_SCHEMES
    for shape in SHAPES
    for scales in SCALES
    if isinstance(scales, str) or (shape[1] > scales and shape[1] % scales == 0)
]


def scale_shape(scales: str | int, shape: tuple[int, int]) -> tuple[int, int]:
    if isinstance(scales, int):
        return shape[0], shape[1] // scales
    return (1, 1) if scales == "tensor" else (shape[0], 1)


def drawn(scheme: str, shape: tuple[int, int], scales: str | int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values on the grid of a scheme, and their scales, which are numbers of `dtype`."""
    values = torch.tensor(WEIGHT_SCHEMES.get(scheme).grid.values)
    scale = ((torch.rand(scale_shape(scales, shape)) + 0.1) * 0.03).to(dtype).float()
    levels = values[torch.randint(len(values), shape)]
    return (levels.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1), scale


def same(found: Found | Misfit, weight: Tensor) -> bool:
    return isinstance(found, Found) and torch.equal(found.quantized.dequantize(), weight)


# ---- recognition ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("scheme", "shape", "scales"), CASES)
def test_recognises_every_grid(scheme: str, shape: tuple[int, int], scales: str | int, dtype: torch.dtype) -> None:
    weight, scale = drawn(scheme, shape, scales, dtype)
    found = recognise(weight)
    assert isinstance(found, Found), found
    assert same(found, weight)
    kind = WEIGHT_SCHEMES.get(scheme)
    assert found.quantizer.storage_bits <= kind.storage_bits, "a wider scheme than the one it was made with"
    assert found.quantized.scale.numel() <= scale.numel()
    grid = found.quantizer.grid
    codes = found.quantized.codes
    assert codes.dtype == torch.int8 and grid.lowest <= int(codes.min()) and int(codes.max()) <= grid.highest


@pytest.mark.parametrize(
    ("weight", "scheme", "granularity"),
    [
        (torch.zeros(4, 32), "ternary", "tensor"),
        (torch.full((4, 32), 0.5), "binary", "tensor"),
        (torch.full((4, 32), -0.5), "binary", "tensor"),
        (torch.tensor([[0.5], [0.25], [-2.0]]).expand(3, 32), "binary", "channel"),
        # rows of zeros between others
        (torch.tensor([[0.5], [0.0], [0.25]]) * torch.tensor([1.0, -1.0, 0.0]).repeat(16), "ternary", "channel"),
        (torch.tensor([[0.0], [0.0], [0.25]]) * torch.tensor([1.0, -1.0, 0.0]).repeat(16), "ternary", "tensor"),
        (torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(3, 8) * 0.1, "int2", "tensor"),
        (torch.tensor([-0.5, 1.5, 0.5, -1.5]).repeat(3, 8) * 0.1, "int2_seq", "tensor"),
        (torch.tensor([3.0, 0.0, -1.0, 2.0]).repeat(3, 8) * 0.1, "int4", "tensor"),
        (torch.tensor([100.0, 0.0, -1.0, 2.0]).repeat(3, 8) * 0.1, "int8", "tensor"),
        # nine levels of a tensor, or three of a group
        (torch.arange(1.0, 9.0).repeat_interleave(16).repeat(2, 1) * torch.tensor([1.0, 0.0, -1.0, 1.0]).repeat(32), "ternary", "group"),
        (torch.rand(2, 8).repeat_interleave(16, dim=1) * torch.tensor([1.0, 0.0, -1.0, 1.0]).repeat(32), "ternary", "group"),
    ],
    ids=range(12),
)
def test_special_weights(weight: Tensor, scheme: str, granularity: str) -> None:
    found = recognise(weight)
    assert isinstance(found, Found), found
    assert same(found, weight)
    assert (found.quantizer.scheme, found.quantizer.granularity) == (scheme, granularity)
    assert bool((found.quantized.scale > 0).all())


def test_random_weights_lie_on_no_grid() -> None:
    for shape in SHAPES:
        found = recognise(torch.randn(shape))
        assert isinstance(found, Misfit) and "lie on no grid" in found.reason
    almost = torch.randint(-1, 2, (32, 64)) * 0.02
    almost[5, 7] = torch.nextafter(almost[5, 7], torch.tensor(1.0)) if almost[5, 7] else torch.tensor(1e-9)
    found = recognise(almost)
    assert isinstance(found, Misfit) or found.quantizer.storage_bits > 2, "one weight is beside the grid"


def test_rounded_values_are_not_on_the_grid_they_came_from() -> None:
    weight, _ = drawn("int4", (32, 64), "channel", torch.float32)
    assert isinstance(recognise(weight.bfloat16()), Misfit)
    ternary, _ = drawn("ternary", (32, 64), "channel", torch.float32)
    assert same(recognise(ternary.bfloat16()), ternary.bfloat16().float())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_numbers(number: float) -> None:
    weight, scale = torch.ones(2, 32), torch.ones(2, 1)
    weight[1, 3] = scale[1] = number
    misfit = recognise(weight)
    assert isinstance(misfit, Misfit) and "1 NaN or infinite" in misfit.reason
    misfit = fit(Levels(torch.ones(2, 32, dtype=torch.int16), scale, 2))
    assert isinstance(misfit, Misfit) and "1 of its scales are NaN or infinite" in misfit.reason


# ---- fitting ----


def levels(*numbers: int, rows: int = 2, columns: int = 32) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int16).repeat(rows, columns // len(numbers))


@pytest.mark.parametrize(
    ("numbers", "bits", "scheme"),
    [
        ((-1, 1), 2, "binary"),
        ((-1, 0), 2, "ternary"),
        ((-2, 1), 2, "int2"),
        ((-4, 3), 3, "int4"),
        ((-8, 0, 8, 8), 4, "ternary"),  # a factor that all share goes into the scale
        ((-127, 127), 8, "binary"),
        ((-64, 63), 8, "int8"),
    ],
)
def test_fits_the_narrowest(numbers: tuple[int, ...], bits: int, scheme: str) -> None:
    scale = torch.tensor([[0.5, 0.25], [0.5, 2.0]])
    found = fit(Levels(levels(*numbers), scale, bits))
    assert isinstance(found, Found), found
    assert found.quantizer.scheme == scheme and found.quantizer.group_size == 16
    assert same(found, levels(*numbers) * scale.repeat_interleave(16, dim=1))


@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], (1, 1)),
        ([[0.5, 0.5], [0.25, 0.25]], (2, 1)),
        ([[0.5, 0.25], [0.5, 0.25]], (2, 2)),
        ([[-0.5, 0.5], [0.5, -0.5]], (1, 1)),  # a negative scale turns its levels round
    ],
)
def test_fewest_scales(scale: list[list[float]], shape: tuple[int, int]) -> None:
    given = torch.tensor(scale)
    found = fit(Levels(levels(-1, 0, 1, 1), given, 2))
    assert isinstance(found, Found)
    assert found.quantized.scale.shape == shape
    assert same(found, levels(-1, 0, 1, 1) * given.repeat_interleave(16, dim=1))


def test_scale_of_zeros_is_any() -> None:
    several = levels(-1, 0, 1, 1, rows=3)
    several[1] = 0
    found = fit(Levels(several, torch.tensor([[0.5], [7.0], [0.5]]), 2))
    assert isinstance(found, Found) and found.quantized.scale.tolist() == [[0.5]]
    found = fit(Levels(several, torch.tensor([[0.5], [0.0], [0.25]]), 2))
    assert isinstance(found, Found) and found.quantized.scale.tolist() == [[0.5], [0.375], [0.25]]


@pytest.mark.parametrize(("numbers", "bits"), [((-8, 7), 4), ((-1, 2), 2), ((-128, 5), 8), ((-255, 255, 1), 8)])
def test_levels_outside(numbers: tuple[int, ...], bits: int) -> None:
    foreign = Levels(levels(*numbers, columns=len(numbers) * 8), torch.ones(1, 1), bits)
    misfit = fit(foreign)
    assert isinstance(misfit, Misfit)
    assert f"its {bits}-bit levels go from {min(numbers)} to {max(numbers)}" in misfit.reason and "outside='clip'" in misfit.reason
    wider = fit(foreign, "wider")
    if bits == 8:
        assert isinstance(wider, Misfit) and "outside='wider'" not in wider.reason
    else:
        assert same(wider, foreign.levels.float()) and "outside='wider'" in misfit.reason
    clipped = fit(foreign, "clip")
    assert isinstance(clipped, Found)
    grid = clipped.quantizer.grid
    assert clipped.quantizer.storage_bits == bits
    assert torch.equal(clipped.quantized.codes, foreign.levels.clamp(grid.lowest, grid.highest).to(torch.int8))


# ---- dense ----


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.quantized_weight().dequantize() for name, layer in quantized_layers(model)}


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
    model.save_pretrained(tmp_path)
    imported = import_model(tmp_path, form=form)
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
    with pytest.raises(ValueError, match="holds no quantized layer.*lie on no grid.*BitNetQuantizationConfig.bitnet_b158"):
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
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
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


def test_exported_native_comes_back(tmp_path: Path) -> None:
    model = quantize_model(tiny("qwen3")[0], BitNetQuantizationConfig.bitnet_b158())
    export_native(model, tmp_path / "native")
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
    with pytest.raises(ValueError, match="4-bit levels go from -8 to 7, those of 4-bit schemes here from -7 to 7; outside='wider'"):
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
    with pytest.raises(ValueError, match="w_bits=None in its config.json; say how many bits"):
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


# ---- torchao, written byte by byte as its files are described ----


def torchao_folder(model: Any, folder: Path, quantize: Any, note: dict[str, Any], *, drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
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
def test_torchao_parts(
    note: dict[str, Any], largest: int, groups: int, scheme: str, activation: str, tmp_path: Path
) -> None:
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
        (INT8, 127, {"qdata": torch.zeros(4, 4)}, r"its qdata is torch.float32 of shape \(4, 4\)"),
    ],
    ids=range(10),
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
@pytest.mark.parametrize("kind", ["int8", "int8 dynamic", "7 bits dynamic", "int4 groups", "int4 groups dynamic", "int4 asymmetric"])
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
    # where inputs are quantized their symmetric scale is another by 0.4 %
    assert difference < (0.1 if kind.startswith("7") else 0.02 if "dynamic" in kind else 1e-5)


# ---- what is refused ----


def test_options(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    onto_grid(model, [-1, 0, 1])
    model.save_pretrained(tmp_path)
    for options, error, words in (
        ({"form": "float"}, ValueError, "form='float'; legal: 'packed', 'train'"),
        ({"outside": "round"}, ValueError, "outside='round'; legal: 'refuse', 'wider', 'clip'"),
        ({"dtype": "half4"}, ValueError, "dtype='half4' is no dtype of torch"),
        ({"activation": "int3"}, ValueError, "unknown activation scheme 'int3'"),
        ({"trust_remote_code": True}, TypeError, "takes no trust_remote_code"),
        ({"quantization_config": {}}, TypeError, "takes no quantization_config"),
        ({"file": "model.gguf"}, ValueError, "holds no file 'model.gguf'; it has: no GGUF file"),
        ({"file": "../x"}, ValueError, "holds no file"),
        ({"base": str(tmp_path / "nothing")}, ValueError, "cannot make a model of the config"),
    ):
        with pytest.raises(error, match=words):
            import_model(tmp_path, **options)
    assert import_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "~/no/such", "nothing.gguf", "a/b/c"])
def test_nothing_there(path: str) -> None:
    with pytest.raises(ValueError, match=f"there is no folder or file '{path}'"):
        import_model(path)


def test_a_name_that_the_hub_does_not_give() -> None:
    with pytest.raises(OSError, match="there is no folder 'someone/nothing', and the Hub does not give it"):
        import_model("someone/nothing")
    with pytest.raises(OSError, match="there is no folder 'someone/nothing'"):
        import_model("someone/nothing", file="model.gguf")


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model, _ = tiny("llama")
    onto_grid(model, [-1, 0, 1])
    model.save_pretrained(tmp_path / "there")
    asked: dict[str, Any] = {}

    def fetched(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    import_model("someone/model", revision="v1", token="t")
    assert asked == {"name": "someone/model", "revision": "v1", "token": "t", "allow_patterns": ["*.json", "*.safetensors"]}


def written(folder: Path, *, settings: Any = None) -> Path:
    model, _ = tiny("llama")
    onto_grid(model, [-1, 0, 1])
    model.save_pretrained(folder)
    if settings is not None:
        edit_config(folder, lambda config: config.update(quantization_config=settings))
    return folder


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _index_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


def _index_of_what(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))


def _twice(folder: Path) -> None:
    for number in "12":
        (folder / f"{number}.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def _deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def _unknown_model(folder: Path) -> None:
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, lambda config: config.update(model_type="mobilellm", auto_map=code))
    (folder / "evil.py").write_text(f"open({str(folder / 'run')!r}, 'w')")


def _missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def _missing_layer(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _extra(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))


def _shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))


def _layer_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(5, 5)}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickled, r"holds pickled weights \(pytorch_model.bin\).*nothing is unpickled"),
        (_truncated, "model.safetensors is damaged or incomplete"),
        (_huge_header, "model.safetensors is damaged or incomplete"),
        (_index_outside, "names the file '../other.safetensors', which is not in that folder"),
        (_index_of_what, "has no weight_map of file names"),
        (_twice, "two files hold the tensor"),
        (_no_config, "holds no config.json; give the folder of a checkpoint, or base="),
        (_broken_config, "config.json cannot be read"),
        (_list_config, "config.json should hold a JSON object"),
        (_deep_config, "config.json cannot be read"),
        (_unknown_model, "transformers cannot make a model of the config.*Code of a checkpoint is not run.*base="),
        (_missing, "lacks model.norm.weight"),
        (_missing_layer, "lacks model.layers.1.mlp.up_proj.weight"),
        (_extra, "has no place in the model for model.layers.7.mlp.up_proj.weight"),
        (_shape, "does not fit into LlamaForCausalLM"),
        (_layer_shape, r"the weight of model.layers.0.mlp.up_proj has shape \(5, 5\), the model needs \(80, 48\)"),
    ],
)
def test_damaged(damage: Any, words: str, tmp_path: Path) -> None:
    damage(written(tmp_path))
    with pytest.raises(ValueError, match=words):
        import_model(tmp_path)
    assert not (tmp_path / "run").exists()


def test_base_describes_what_transformers_does_not_know(tmp_path: Path) -> None:
    _unknown_model(written(tmp_path / "one"))
    written(tmp_path / "base")
    assert dict(quantized_layers(import_model(tmp_path / "one", base=str(tmp_path / "base"))))
    assert not (tmp_path / "one" / "run").exists()
    _no_config(tmp_path / "one")
    assert dict(quantized_layers(import_model(tmp_path / "one", base=str(tmp_path / "base"))))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "whatever"])
def test_other_methods(method: str, tmp_path: Path) -> None:
    written(tmp_path, settings={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=f"is quantized by the method '{method}'; read are 'bitnet', 'torchao', GGUF"):
        import_model(tmp_path)


def test_settings_that_are_no_settings(tmp_path: Path) -> None:
    written(tmp_path, settings=[4])
    with pytest.raises(ValueError, match=r"is quantized by the method '\[4\]'"):
        import_model(tmp_path)


@pytest.mark.parametrize("form", ["packed", "train"])
def test_our_own(form: str, tmp_path: Path) -> None:
    quantize_model(tiny("llama")[0], BitNetQuantizationConfig(form=form)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a checkpoint of this library already"):
        import_model(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        import_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor model.safetensors.index.json nor one .gguf file"):
        import_model(tmp_path)
