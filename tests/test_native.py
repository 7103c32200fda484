"""Checkpoints of transformers' own method `bitnet`, and what transformers without us makes of our checkpoints.

One process that never imports hf_bitnet loads every folder and writes its outputs; the tests compare with them. The native
checkpoints are written here by transformers' own functions, not by our exporter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.bitnet import pack_weights

import hf_bitnet.export.native as exporter
from hf_bitnet import (
    BitNetQuantizationConfig,
    convert_native,
    coverage,
    dequantize_model,
    export_native,
    load_native,
    pack_model,
    quantize_model,
    set_norm_blend,
    unpack_model,
)
from hf_bitnet.modules import BitLinear, NativeLayer, PackedBitLinear
from hf_bitnet.modules.native import pack_rows, unpack_rows
from hf_bitnet.surgery import full_precision_copy, quantized_layers, set_strength
from tests.checkpoints import (
    DISK,
    assert_same_layers,
    edit_config,
    edit_tensors,
    loaded,
    logits,
    read_config,
    reloaded,
    run_plain_transformers,
)
from tests.tiny import tiny

KINDS = ("bitlinear", "packed", "unpacked", "online")
# (family, overrides, norms, dtype): BitNet itself; biases; norms with an eps of their own; both dtypes
VARIANTS = [
    ("bitnet", {}, False, torch.float32),
    ("llama", {"attention_bias": True, "mlp_bias": True}, False, torch.float32),
    ("llama", {"attention_bias": True}, True, torch.bfloat16),
]
NAMES = [f"{kind}-{index}" for kind in KINDS for index in range(len(VARIANTS))]
TRAINED = ("llama", "qwen3", "gemma3", "bert", "t5", "vit", "whisper", "mixtral", "bitnet")
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
        sub_norm = {"sub_norm": ["."], "sub_norm_eps": 1e-5} if family == "bitnet" else {}
        model, batch = quantized(family, form="packed" if family == "qwen3" else "train", **sub_norm)
        set_norm_blend(model, 1.0)
        export_native(model, folders / f"export-{family}")
        jobs[folders / f"export-{family}"] = batch
    for name, (family, fields) in REFUSED.items():
        model, batch = quantized(family, **fields)
        model.save_pretrained(folders / name)
        jobs[folders / name] = batch
    model, batch = quantized("llama", keep=[r"layers\.0\.mlp\.gate"])
    model.model.save_pretrained(folders / "base")  # under names without the prefix
    jobs[folders / "base"] = batch
    return {folder.name: result for folder, result in run_plain_transformers(jobs).items()}


def quantized(family: str, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    model, batch = tiny(family)
    return quantize_model(model, BitNetQuantizationConfig(**fields)), batch


def write_native(model: Any, folder: Path, kind: str, norms: bool) -> None:
    """A native checkpoint of the float model."""
    model.save_pretrained(folder)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]

    def edit(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in names:
            weight = tensors[f"{name}.weight"]
            scale = weight.float().abs().mean()
            codes = (weight.float() / scale).round().clamp(-1, 1)
            if kind != "online":
                tensors[f"{name}.weight"] = codes.to(weight.dtype) if kind == "unpacked" else pack_weights(codes)
                stored = 1 / scale if kind == "bitlinear" else scale
                tensors[f"{name}.weight_scale"] = stored.reshape(1).to(weight.dtype)
            if norms:
                gain = 1 + 0.1 * torch.randn(weight.shape[1], generator=generator)
                tensors[f"{name}.rms_norm.weight"] = gain.to(weight.dtype)

    edit_tensors(folder, edit)
    settings = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear" if kind == "bitlinear" else "autobitlinear",
        "quantization_mode": "online" if kind == "online" else "offline",
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": norms,
        "rms_norm_eps": 1e-5,
    }
    edit_config(folder, lambda config: config.update(quantization_config=settings))


def batch_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "batch.safetensors")


def close(a: Tensor, b: Tensor | None, limit: float) -> bool:
    """RMS of the difference against RMS."""
    assert b is not None
    return float((a - b).square().mean().sqrt()) <= limit * float(b.square().mean().sqrt())


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
    with pytest.raises(ValueError, match=r"convert_native: .* has no NativeLayer layer; call hf_bitnet.load_native"):
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


# ---- the exporter ----


@pytest.mark.parametrize("family", TRAINED)
def test_export(family: str, plain: dict[str, Any], folders: Path) -> None:
    name = f"export-{family}"
    classes, output = plain[name]
    sub_norm = {"sub_norm": ["."], "sub_norm_eps": 1e-5} if family == "bitnet" else {}
    model, batch = quantized(family, **sub_norm)
    set_norm_blend(model, 1.0)
    assert classes.count("BitLinear") == len(dict(quantized_layers(model)))
    assert close(logits(model, batch), output, 1e-4)
    back = load_native(folders / name)
    for mine, theirs in zip(quantized_layers(model), quantized_layers(back), strict=True):
        a, b = mine[1].quantized_weight(), theirs[1].quantized_weight()
        assert mine[0] == theirs[0] and torch.equal(a.codes, b.codes) and torch.allclose(a.scale, b.scale, rtol=1e-6)
    assert torch.equal(logits(back, batch), output)


def test_export_of_a_loaded_native_model(plain: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    """The stored bias of autobitlinear is not the bias of bitlinear."""
    batch = batch_of(folders / "packed-1")
    back = load_native(export_native(load_native(folders / "packed-1"), tmp_path / "out"))
    assert close(logits(back, batch), plain["packed-1"][1], 1e-3)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"weight": "int4"}, r"q_proj cannot be written.*it is int4 with one scale a channel"),
        ("llama", {"granularity": "channel"}, r"it is ternary with one scale a channel"),
        ("llama", {"activation": "none"}, r"its activations are NoActivation"),
        ("gpt2", {}, r"it is a Conv1D"),
        ("llama", {"sub_norm": ["o_proj"]}, r"a norm in front of every quantized layer or of none"),
        ("t5", {"overrides": {"wo": {"weight": "ternary"}}}, r"wo cannot be written.*by its name"),
    ],
)
def test_export_refuses(family: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, _ = quantized(family, **fields)
    set_norm_blend(model, 1.0)
    with pytest.raises(ValueError, match=words):
        export_native(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_refuses_odd_rows_and_plain_models(tmp_path: Path) -> None:
    model, _ = tiny("llama", intermediate_size=78)
    with pytest.raises(ValueError, match=r"has no quantized layer; call quantize_model"):
        export_native(model, tmp_path / "out")
    with pytest.raises(TypeError, match=r"takes a transformers model, got Linear"):
        export_native(nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"its 78 output features are not a multiple of 4"):
        export_native(quantize_model(model, BitNetQuantizationConfig()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quantized("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = export_native(model, tmp_path / "deep" / "out", max_shard_size="30KB")
    assert len(list(target.glob("*.safetensors"))) > 1
    assert os.stat(target).st_mode == os.stat(target.parent).st_mode  # not private, as temporary folders are
    with pytest.raises(FileExistsError, match=r"exists already; choose another folder, or .*overwrite=True"):
        export_native(model, target)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "save_torch_state_dict", fails)
        with pytest.raises(OSError, match="disk full"):
            export_native(model, target, overwrite=True)
        with pytest.raises(OSError, match="disk full"):
            export_native(model, tmp_path / "deep" / "other")
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]
    assert close(logits(load_native(target), batch), logits(model, batch), 1e-4)
    export_native(model, target, overwrite=True)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"] and (target / "model.safetensors").exists()
    # the model is as it was
    assert model.config.quantization_config.form == "train"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
