"""Checkpoints of transformers' own method `bitnet`, and what transformers without us makes of our checkpoints.

One process that never imports hf_bitnet loads every folder and writes its outputs; the tests compare with them. The native
checkpoints are written here by transformers' own functions, not by our exporter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

from hf_bitnet import (
    BitNetQuantizationConfig,
    convert_native,
    coverage,
    dequantize_model,
    load_native,
    pack_model,
    unpack_model,
)
from hf_bitnet.modules import BitLinear, NativeLayer, PackedBitLinear
from hf_bitnet.modules.native import pack_rows, unpack_rows
from hf_bitnet.surgery import full_precision_copy, quantized_layers, set_strength
from tests.checkpoints import (
    DISK,
    assert_same_layers,
    loaded,
    logits,
    read_config,
    reloaded,
    run_plain_transformers,
)
from tests.native import KINDS, NAMES, TRAINED, VARIANTS, batch_of, close, quantized, write_native
from tests.tiny import tiny

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("llama", {"weight": "int8"}),
    "channel": ("llama", {"granularity": "channel"}),
    "learned": ("llama", {"weight_scale": "learned"}),
    "activation": ("llama", {"activation": "none"}),
    "sub_norm": ("llama", {"sub_norm": ["o_proj"]}),
    "override": ("llama", {"overrides": {"o_proj": {"weight": "int4"}}}),
    "float32 module": ("t5", {"overrides": {"wo": {"weight": "ternary"}}}),
    "conv1d": ("gpt2", {}),
    # by our bytes alone transformers could not see that these are no float weights
    "packed int8": ("llama", {"weight": "int8", "form": "packed"}),
    "packed ternary": ("llama", {"form": "packed"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def plain(folders: Path) -> dict[str, tuple[list[str] | str, Tensor | None]]:
    """{name of a folder: (class names or error, output)} of transformers without us."""
    jobs: dict[Path, dict[str, Tensor]] = {}
    for name in NAMES:
        kind, index = name.split("-")
        family, overrides, norms, dtype = VARIANTS[int(index)]
        model, batch = tiny(family, **overrides)
        write_native(model.to(dtype), folders / name, kind, norms)
        jobs[folders / name] = batch
    for family in TRAINED:
        model, batch = quantized(family)
        model.save_pretrained(folders / f"train-{family}")
        jobs[folders / f"train-{family}"] = batch
    for name, (family, fields) in REFUSED.items():
        model, batch = quantized(family, **fields)
        model.save_pretrained(folders / name)
        jobs[folders / name] = batch
    model, batch = quantized("llama", keep=[r"layers\.0\.mlp\.gate"])
    model.model.save_pretrained(folders / "base")  # under names without the prefix
    jobs[folders / "base"] = batch
    return {folder.name: result for folder, result in run_plain_transformers(jobs).items()}


# ---- native checkpoints in our layers ----


@pytest.mark.parametrize("name", NAMES)
def test_bit_identical(name: str, plain: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    classes, expected = plain[name]
    model = load_native(folders / name)
    count = sum(kind in ("BitLinear", "AutoBitLinear") for kind in classes)
    assert sum(isinstance(module, NativeLayer) for module in model.modules()) == count == 14
    assert torch.equal(logits(model, batch_of(folders / name)), expected)
    assert isinstance(model.config.quantization_config, BitNetQuantizationConfig)
    report = coverage(model)
    assert report.fraction > 0.8 and "output embeddings" in str(report)
    # saved as the native checkpoint it was
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path) == read_config(folders / name)
    again, before = load_file(tmp_path / "model.safetensors"), load_file(folders / name / "model.safetensors")
    assert again.keys() == before.keys()
    if not name.startswith("unpacked"):
        assert all(torch.equal(again[key], before[key]) for key in before)
    assert torch.equal(logits(load_native(tmp_path), batch_of(folders / name)), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("2")])
def test_conversions(name: str, plain: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    """Into ordinary layers of either form, and into plain linear layers. In bfloat16 the arithmetic differs by its ulps."""
    _, expected = plain[name]
    batch = batch_of(folders / name)
    model = load_native(folders / name)
    online = name.startswith("online")
    converted = convert_native(load_native(folders / name))
    kind = BitLinear if online else PackedBitLinear
    assert {type(layer) for _, layer in quantized_layers(converted)} == {kind}
    assert_same_layers(converted, model)
    assert close(logits(converted, batch), expected, 1e-3)
    assert torch.equal(logits(reloaded(converted, tmp_path / "again"), batch), logits(converted, batch))
    other = (pack_model if online else unpack_model)(load_native(folders / name))
    assert close(logits(other, batch), logits(converted, batch), 1e-5)
    assert torch.equal(logits(reloaded(other, tmp_path / "other"), batch), logits(other, batch))
    dense = dequantize_model(load_native(folders / name))
    assert not hasattr(dense.config, "quantization_config")
    assert close(logits(dense, batch), expected, 0.2)  # only the activations' int8 is missing
    with pytest.raises(
        ValueError, match=r"convert_native: .* has no layer of transformers' own bitnet formats; call hf_bitnet.load_native"
    ):
        convert_native(dense)


def test_norms_survive_conversion(folders: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    for kind in KINDS:
        model = load_native(folders / f"{kind}-2", dtype=torch.float32)
        batch = batch_of(folders / f"{kind}-2")
        expected = logits(model, batch)
        converted = convert_native(model)
        assert close(logits(converted, batch), expected, 1e-3)
        again = reloaded(converted, tmp_path / kind)
        assert {layer.sub_norm.eps for _, layer in quantized_layers(again) if layer.sub_norm is not None} == {1e-5}
        assert torch.equal(logits(again, batch), logits(converted, batch))


def test_online_trains(folders: Path, plain: dict[str, Any]) -> None:
    """Gradients straight through, as transformers' own; strength 0 is the float model."""
    model = load_native(folders / "online-1")
    batch = batch_of(folders / "online-1")
    assert not hasattr(model, "hf_quantizer")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    mine = {name: parameter.grad for name, parameter in model.named_parameters()}
    stock = tf.AutoModelForCausalLM.from_pretrained(folders / "online-1")
    assert any(type(module).__name__ == "AutoBitLinear" for module in stock.modules())
    with torch.compiler.set_stance("force_eager"):
        stock(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in stock.named_parameters():
        assert mine[name] is not None and close(mine[name], parameter.grad, 1e-5), name
    expected = logits(full_precision_copy(model), batch)
    set_strength(model, 0.0)
    assert torch.equal(logits(model, batch), expected)
    set_strength(model, 1.0, hard=False)
    relaxed = logits(model, batch)
    set_strength(model, 1.0)
    assert torch.equal(logits(model, batch), relaxed)


@pytest.mark.parametrize("kind", ["bitlinear", "packed"])
def test_gradient_passes_packed_layers(kind: str, folders: Path, plain: dict[str, Any]) -> None:
    """Close to the ordinary packed layer's; transformers' bitlinear gives none."""
    batch = batch_of(folders / f"{kind}-1")
    gradients = []
    for model in (load_native(folders / f"{kind}-1"), convert_native(load_native(folders / f"{kind}-1"))):
        embedding = model.get_input_embeddings().weight.requires_grad_()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(embedding.grad)
        assert all(layer.weight.grad is None for _, layer in quantized_layers(model))
    assert close(gradients[0], gradients[1], 1e-3)


def test_load_native_options(folders: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    batch = batch_of(folders / "packed-1")
    mapped = load_native(folders / "packed-1", device_map=DISK, offload_folder=tmp_path)
    assert mapped.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(mapped, batch), plain["packed-1"][1])
    base = load_native(folders / "packed-1", model_class=tf.AutoModel)
    assert type(base) is tf.LlamaModel and sum(isinstance(module, NativeLayer) for module in base.modules()) == 14
    half = load_native(folders / "bitlinear-0", dtype=torch.bfloat16)
    assert logits(half, batch_of(folders / "bitlinear-0")).dtype == torch.bfloat16
    # outside of load_native nothing has changed
    stock = tf.AutoModelForCausalLM.from_pretrained(folders / "packed-1")
    assert not any(isinstance(module, NativeLayer) for module in stock.modules())
    with pytest.raises(ValueError, match=r"is not a native"):
        load_native(folders / "int8")


@pytest.mark.parametrize("rows", [1, 3, 4, 10])
def test_row_packing(rows: int) -> None:
    codes = torch.randint(-1, 2, (rows, 5), dtype=torch.int8)
    packed = pack_rows(codes)
    assert packed.shape == (-(-rows // 4), 5) and packed.dtype == torch.uint8
    assert torch.equal(unpack_rows(packed, rows), codes)
    if rows % 4 == 0:
        assert torch.equal(packed, pack_weights(codes.clone()))


# ---- our checkpoints in transformers without us ----


@pytest.mark.parametrize("family", TRAINED)
def test_train_form_is_native(family: str, plain: dict[str, Any], folders: Path) -> None:
    folder = folders / f"train-{family}"
    model, batch = quantized(family)
    classes, output = plain[folder.name]
    layers = dict(quantized_layers(model))
    assert classes.count("AutoBitLinear") == len(layers)
    # an activation that is an ulp off may round to another int8 code
    assert close(logits(model, batch), output, 1e-4)
    settings = read_config(folder)
    assert (settings["quant_method"], settings["linear_class"], settings["quantization_mode"]) == (
        "bitnet",
        "autobitlinear",
        "online",
    )
    assert "lm_head" in settings["modules_to_not_convert"]
    # and with us it is ours again
    again = loaded(type(model), folder)
    assert {type(layer) for _, layer in quantized_layers(again)} == {BitLinear}
    assert_same_layers(again, model)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.config.quantization_config.fields() == model.config.quantization_config.fields()


def test_base_model_of_a_native_checkpoint(plain: dict[str, Any], folders: Path) -> None:
    model, batch = quantized("llama", keep=[r"layers\.0\.mlp\.gate"])
    classes, output = plain["base"]
    assert classes.count("AutoBitLinear") == 13
    with torch.no_grad():
        assert close(model.model(**batch).last_hidden_state, output, 1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_stop_plain_transformers(name: str, plain: dict[str, Any], folders: Path) -> None:
    """It only warns about a method it does not know, and would load train form as a dense model."""
    error, output = plain[name]
    assert output is None
    assert "ValueError: linear_class must be" in error and "`import hf_bitnet` before from_pretrained" in error
    family, fields = REFUSED[name]
    model, batch = quantized(family, **fields)
    assert torch.equal(logits(loaded(type(model), folders / name), batch), logits(model, batch))
