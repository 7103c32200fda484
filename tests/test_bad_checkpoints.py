"""Damaged and contradictory checkpoints: a clear error, and never a model with other numbers than the checkpoint's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from hf_bitnet import BitNetQuantizationConfig, load_native, quantize_model
from tests.checkpoints import edit_config, edit_tensors
from tests.tiny import tiny

UP = "model.layers.0.mlp.up_proj"
FORMS = {
    "float": None,
    "train": BitNetQuantizationConfig(weight_scale="learned", sub_norm=["up_proj"]),
    "packed": BitNetQuantizationConfig(form="packed"),
    "packed8": BitNetQuantizationConfig(form="packed", weight="int8"),
    "native": BitNetQuantizationConfig(),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints of one tiny model, a folder for each form."""
    root = tmp_path_factory.mktemp("originals")
    for form, quantization in FORMS.items():
        model, _ = tiny("llama", num_hidden_layers=1)
        if quantization is not None:
            quantize_model(model, quantization)
        model.save_pretrained(root / form)
    return root


@pytest.fixture
def checkpoint(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a good checkpoint, to be damaged."""

    def copy(form: str) -> Path:
        return Path(shutil.copytree(originals / form, tmp_path / form))

    return copy


def load(folder: Path, **kwargs: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def ours(folder: Path, **changes: Any) -> None:
    """Changes fields of our part of config.json."""
    edit_config(folder, lambda config: config["quantization_config"]["hf_bitnet"].update(changes))


# ---- files ----


@pytest.mark.parametrize("form", ["float", "train", "packed"])
@pytest.mark.parametrize("keep", [4, 300, -100])
def test_truncated_file(form: str, keep: int, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(form)
    file = folder / "model.safetensors"
    os.truncate(file, keep if keep > 0 else file.stat().st_size + keep)
    kwargs = {"quantization_config": BitNetQuantizationConfig()} if form == "float" else {}
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete.*copy or download it again"):
        load(folder, **kwargs)


def test_pickled_weights(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("train")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file; hf_bitnet reads no pickled weights"):
        load(folder)


# ---- config.json ----


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"colour": "red"}, ValueError, r"no field 'colour'; fields: weight, "),
        ({"version": 2}, ValueError, r"version 2, this hf_bitnet reads version 1; load it with the hf_bitnet release"),
        ({"weight": "ternery"}, ValueError, r"unknown weight scheme 'ternery'; legal: .*Did you mean 'ternary'"),
        ({"form": "pakked"}, ValueError, r"form='pakked'; legal: 'train'"),
        ({"activation": 8}, TypeError, r"activation must be a string, got 8"),
        ({"quantized_modules": "all"}, TypeError, r"quantized_modules must be a list of module names"),
        ({"quantized_modules": ["nothing.like.this"]}, ValueError, r"none of the quantized layers that the checkpoint lists"),
        ({"group_size": 7}, ValueError, r"group_size=7 does not divide the 48 input features"),
    ],
)
def test_corrupted_config(
    changes: dict[str, Any], error: type[Exception], words: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint("packed")
    ours(folder, **changes)
    with pytest.raises(error, match=words):
        load(folder)


def test_our_part_is_no_dict(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("train")
    edit_config(folder, lambda config: config["quantization_config"].update(hf_bitnet="yes"))
    with pytest.raises(ValueError, match=r"must hold the settings, got 'yes'"):
        load(folder)


def test_config_without_quantization(checkpoint: Callable[[str], Path]) -> None:
    """A packed checkpoint that lost its quantization_config is not quantized a second time."""
    folder = checkpoint("packed8")
    edit_config(folder, lambda config: config.pop("quantization_config"))
    for form in ("train", "packed"):
        with pytest.raises(ValueError, match=r"holds model\.layers\.0.*packed already.*no quantization_config; restore"):
            load(folder, quantization_config=BitNetQuantizationConfig(weight="int8", form=form))


# ---- tensors ----


@pytest.mark.parametrize(
    ("form", "tensor"),
    [
        ("packed", "weight_scale"),
        ("packed", "weight"),
        ("train", "weight"),
        ("train", "weight_scale"),
        ("train", "sub_norm.weight"),
        ("train", "sub_norm.blend"),
        ("native", "weight"),
    ],
)
def test_missing_tensor(form: str, tensor: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(form)
    edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}.{tensor}"))
    for kwargs in ({}, {"ignore_mismatched_sizes": True}, {"device_map": "auto"}):
        with pytest.raises(ValueError, match=rf"the checkpoint lacks model\.layers\.0\.mlp\.up_proj\.{tensor}, which"):
            load(folder, **kwargs)


@pytest.mark.parametrize(("form", "tensor"), [("packed", "weight"), ("packed", "weight_scale"), ("train", "weight")])
def test_wrong_shape(form: str, tensor: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(form)
    name = f"{UP}.{tensor}"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.cat([tensors[name]] * 2)}))
    for kwargs in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf"up_proj\.{tensor} has shape \(\d+, \d+\) in the checkpoint, but \(\d+, \d+\)"):
            load(folder, **kwargs)


def test_float_weight_of_wrong_shape(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("float")
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight": torch.randn(48, 80)}))
    for form in ("train", "packed"):
        with pytest.raises(ValueError, match=r"up_proj has shape \(48, 80\) in the checkpoint, the model needs \(80, 48\)"):
            load(folder, quantization_config=BitNetQuantizationConfig(form=form), ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("form", "says", "holds"), [("packed8", "train", "packed bytes"), ("train", "packed", "float numbers")]
)
def test_form_against_tensors(form: str, says: str, holds: str, checkpoint: Callable[[str], Path]) -> None:
    """Eight bits: bytes and floats have one shape, so only the dtype tells."""
    folder = checkpoint(form)
    ours(folder, form=says, weight="int8", weight_scale=None)
    with pytest.raises(ValueError, match=rf"holds {holds}, but the checkpoint's config.json says form='{says}'"):
        load(folder)


# ---- weights that cannot be quantized ----


@pytest.mark.parametrize("form", ["train", "packed"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weight: weight.index_fill(0, torch.tensor([1]), float("nan")), r"holds 48 NaN or infinite values"),
        (lambda weight: weight.index_fill(1, torch.tensor([0]), float("inf")), r"holds 80 NaN or infinite values"),
        (torch.zeros_like, r"is all zero, so it has no scale"),
    ],
)
def test_weight_that_cannot_be_quantized(
    damage: Callable[[Tensor], Tensor], words: str, form: str, checkpoint: Callable[[str], Path]
) -> None:
    """The very error of quantize_model."""
    folder = checkpoint("float")
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight": damage(tensors[f"{UP}.weight"])}))
    quantization = BitNetQuantizationConfig(form=form)
    for device_map in (None, {"": "cpu"}):
        with pytest.raises(ValueError, match=rf"the weight of model\.layers\.0\.mlp\.up_proj {words}; mend") as on_load:
            load(folder, quantization_config=quantization, device_map=device_map)
    with pytest.raises(ValueError) as in_place:
        quantize_model(load(folder), quantization)
    assert str(on_load.value) == str(in_place.value)
    # the layer may be kept
    load(folder, quantization_config=BitNetQuantizationConfig(form=form, keep=["up_proj"]))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_empty_weight(tmp_path: Path) -> None:
    settings = tiny("llama", num_hidden_layers=1)[0].config
    settings.intermediate_size = 0
    tf.LlamaForCausalLM(settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.0\.mlp\.gate_proj is empty, shape \(0, 48\)"):
        load(tmp_path, quantization_config=BitNetQuantizationConfig())


# ---- what is asked for ----


@pytest.mark.parametrize(("saved", "given", "call"), [("packed", "train", "unpack_model"), ("native", "packed", "pack_model")])
def test_other_form(saved: str, given: str, call: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=rf"in form '{FORMS[saved].form}'.* form='{given}'.*hf_bitnet\.{call}\(model\)"):
        load(checkpoint(saved), quantization_config=BitNetQuantizationConfig(form=given))


def test_other_scheme(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"quantized already, with weight='ternary'.*says weight='int4'"):
        load(checkpoint("packed"), quantization_config=BitNetQuantizationConfig(form="packed", weight="int4"))


def test_foreign_methods(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("native")
    edit_config(folder, lambda config: config["quantization_config"].pop("hf_bitnet"))
    with pytest.raises(ValueError, match=r"quantized already, by 'bitnet'; load it with hf_bitnet\.load_native\(path\)"):
        load(folder, quantization_config=BitNetQuantizationConfig())
    # and what is not ours passes untouched
    with pytest.raises(ValueError, match="BitNetQuantConfig but you are passing a FineGrainedFP8Config"):
        load(folder, quantization_config=tf.FineGrainedFP8Config())


def test_options_that_do_not_fit(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("float")
    with pytest.raises(ValueError, match=r"form='packed' needs a calibrated activation range.*form='train'.*calibrate"):
        load(folder, quantization_config=BitNetQuantizationConfig(form="packed", activation="int8_static"))
    with pytest.raises(ValueError, match=r"only .* of the linear weights would be quantized, min_coverage asks"):
        load(folder, quantization_config=BitNetQuantizationConfig(min_coverage=0.99))
    with pytest.raises(ValueError, match=r"no layer of LlamaForCausalLM would be quantized"):
        load(folder, quantization_config=BitNetQuantizationConfig(keep=["."]))


# ---- native checkpoints ----


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("float", r"is not a native 'bitnet' checkpoint, its config.json has no quantization_config; load it with"),
        ("packed", r"is not a native 'bitnet' checkpoint, its config.json has a form of hf_bitnet's own"),
    ],
)
def test_load_native_of_others(form: str, words: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=words):
        load_native(checkpoint(form))


def test_load_native_takes_no_config(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(TypeError, match=r"load_native takes no quantization_config"):
        load_native(checkpoint("native"), quantization_config=BitNetQuantizationConfig())


def test_native_that_is_none(checkpoint: Callable[[str], Path]) -> None:
    """Offline checkpoints hold ternary numbers; latent weights would be truncated to them."""
    folder = checkpoint("native")
    edit_config(folder, lambda config: config["quantization_config"].update(quantization_mode="offline"))
    with pytest.raises(ValueError, match=r"should hold -1, 0 and 1 only.*quantization_mode='online'"):
        load_native(folder)
    edit_config(folder, lambda config: config["quantization_config"].update(linear_class="bitlinear"))
    with pytest.raises(ValueError, match=r"has shape \(\d+, \d+\) in the checkpoint"):
        load_native(folder)
    edit_config(folder, lambda config: config["quantization_config"].update(linear_class="colourlinear"))
    with pytest.raises(ValueError, match="linear_class must be either 'bitlinear' or 'autobitlinear'"):
        load_native(folder)


def test_broken_json(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("train")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises((OSError, json.JSONDecodeError), match=r"config\.json|JSON"):
        load(folder)
