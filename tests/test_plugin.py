"""from_pretrained and save_pretrained: quantizing on load, both forms restored exactly, wherever the layers lie."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_bitnet import (
    BitNetQuantizationConfig,
    calibrate,
    coverage,
    pack_model,
    quantize_model,
    set_norm_blend,
    set_strength,
    unpack_model,
)
from hf_bitnet.modules import BitConv1D, BitLinear, PackedBitLinear, SubNorm
from hf_bitnet.plugin import operations
from hf_bitnet.surgery import quantized_layers, select, trained_layers
from tests.checkpoints import DISK, assert_same_layers, edit_tensors, loaded, logits, read_config, reloaded
from tests.tiny import VOCABULARY, tiny

# every tensor a layer can have: learned scales, norms in front of some layers
RICH = {"weight": "int2_seq", "weight_scale": "learned", "granularity": "channel", "sub_norm": ["o_proj", "c_proj", "mlp"]}


def config(**fields: Any) -> BitNetQuantizationConfig:
    return BitNetQuantizationConfig(**fields)


def on_load(model: Any, folder: Path, quantization: BitNetQuantizationConfig, **kwargs: Any) -> Any:
    """The float model, saved, and quantized while it is loaded."""
    model.save_pretrained(folder / "float")
    return loaded(type(model), folder / "float", quantization_config=quantization, **kwargs)


# ---- on load == in place == restored ----


FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "t5", "vit", "whisper", "mixtral")


# each ends in the other form, so that the fast tests begin with one of the two in turn
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (i + j) % 2 else pytest.mark.slow)
        for i, name in enumerate(FAMILIES)
        for j, form in enumerate(("train", "packed"))
    ],
)
def test_families(name: str, form: str, tmp_path: Path) -> None:
    quantization = config(form=form, **RICH)
    model, batch = tiny(name)
    mine = on_load(model, tmp_path, quantization)
    in_place = quantize_model(model, quantization)
    expected = logits(in_place, batch)
    kinds = (PackedBitLinear,) if form == "packed" else (BitLinear, BitConv1D)
    assert all(isinstance(layer, kinds) for _, layer in quantized_layers(mine))
    assert_same_layers(mine, in_place)
    assert torch.equal(logits(mine, batch), expected)
    for index, made in enumerate((mine, in_place)):
        again = reloaded(made, tmp_path / str(index))
        assert_same_layers(again, in_place)
        assert torch.equal(logits(again, batch), expected)
    # and in the other form
    converted = pack_model(again) if form == "train" else unpack_model(again)
    final = reloaded(converted, tmp_path / "converted")
    assert_same_layers(final, in_place)
    assert torch.equal(logits(final, batch), logits(converted, batch))


@pytest.mark.parametrize("weight", ["binary", "ternary", "int2", "int4", "int8"])
def test_schemes(weight: str, tmp_path: Path) -> None:
    model, batch = tiny("llama", num_hidden_layers=1)
    quantization = config(
        weight=weight, group_size=16, form="packed", overrides={"down_proj": {"weight": "int4"}, "q_proj": "keep"}
    )
    mine = on_load(model, tmp_path, quantization)
    expected = logits(quantize_model(model, quantization), batch)
    assert torch.equal(logits(mine, batch), expected)
    assert torch.equal(logits(reloaded(mine, tmp_path / "again"), batch), expected)


def test_state_is_restored(tmp_path: Path) -> None:
    """Norm gains and blends, static ranges, learned temperatures come back; strength and temperature start anew."""
    model, batch = tiny("llama", num_hidden_layers=1)
    quantization = config(activation="int8_static", ste="learnable", ste_temperature=3.0, **RICH)
    model = on_load(model, tmp_path, quantization)
    calibrate(model, [batch], progress=False)
    set_norm_blend(model, 0.25)
    with torch.no_grad():
        for _, layer in trained_layers(model):
            layer.ste_temperature.mul_(1.5)
    set_strength(model, 0.3)
    again = reloaded(model, tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(float(layer.strength) == 1.0 and not layer.relaxed for _, layer in trained_layers(again))
    assert {float(m.blend) for m in again.modules() if isinstance(m, SubNorm)} == {0.25}
    set_strength(model, 1.0, hard=False)
    set_strength(model, 1.0)
    assert torch.equal(logits(again, batch), logits(model, batch))
    packed = reloaded(pack_model(again), tmp_path / "packed")
    assert torch.equal(logits(packed, batch), logits(model, batch))


def test_fresh_state_on_load(tmp_path: Path) -> None:
    """Nothing is left as transformers' empty memory."""
    model, _ = tiny("llama", num_hidden_layers=1)
    quantization = config(activation="int8_static", ste="tanh", ste_temperature=3.0, **RICH)
    mine, in_place = on_load(model, tmp_path, quantization), quantize_model(model, quantization)
    tensors = dict(in_place.named_buffers()) | dict(in_place.named_parameters())
    for name, tensor in (*mine.named_buffers(), *mine.named_parameters()):
        assert torch.equal(tensor, tensors[name]) and tensor.requires_grad == tensors[name].requires_grad, name
    assert float(mine.model.layers[0].mlp.up_proj.ste_temperature) == 3.0


@pytest.mark.parametrize("form", ["train", "packed"])
def test_bfloat16(form: str, tmp_path: Path) -> None:
    model, batch = tiny("llama")
    quantization = config(form=form, **RICH)
    mine = on_load(model, tmp_path, quantization, dtype=torch.bfloat16)
    in_place = quantize_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16), quantization)
    assert_same_layers(mine, in_place)
    assert torch.equal(logits(mine, batch), logits(in_place, batch))
    again = reloaded(mine, tmp_path / "again")
    assert torch.equal(logits(again, batch), logits(mine, batch))
    for model in (mine, again):
        for key, parameter in model.named_parameters():
            expected = {"weight_scale": torch.float32}.get(key.rpartition(".")[2], torch.bfloat16)
            assert parameter.dtype in (expected, torch.uint8), key
    # a checkpoint in bfloat16 read as float32, and the other way round, keeps the codes
    assert_same_layers(loaded(type(mine), tmp_path / "again", dtype=torch.float32), mine)


# ---- where the layers lie ----


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("scale", [None, "learned"])
@pytest.mark.parametrize("form", ["train", "packed"])
@pytest.mark.parametrize("quantized", [False, True])
def test_device_maps(quantized: bool, form: str, scale: str | None, tmp_path: Path) -> None:
    # 8 bits: packed bytes then have the shape of the float weight, so that the one taken for the other would load
    quantization = config(weight="int8", weight_scale=scale, form=form, sub_norm=["down_proj"])
    model, batch = tiny("llama")
    expected = logits(quantize_model(copy.deepcopy(model), quantization), batch)
    (quantize_model(model, quantization) if quantized else model).save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    kwargs = {} if quantized else {"quantization_config": quantization}
    for index, device_map in enumerate(("auto", DISK)):
        mine = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / f"offload{index}", **kwargs
        )
        assert mine.model.layers[0].mlp.up_proj.weight.is_meta == (index == 1)
        assert torch.equal(logits(mine, batch), expected)
        mine.save_pretrained(tmp_path / f"again{index}")
        assert torch.equal(logits(loaded(type(model), tmp_path / f"again{index}"), batch), expected)


def test_float_weights_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one float weight is in memory while a packed model is made."""
    model, _ = tiny("llama")
    alive: list[weakref.ref[Tensor]] = []
    make = operations.surgery.state_from_float

    def counting(name: str, layer: Any, weight: Tensor) -> dict[str, Tensor]:
        assert not [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(weight))
        return make(name, layer, weight)

    monkeypatch.setattr(operations.surgery, "state_from_float", counting)
    mine = on_load(model, tmp_path, config(form="packed"))
    gc.collect()
    assert len(alive) == 14 and all(reference() is None for reference in alive)
    assert all(layer.weight.dtype == torch.uint8 for _, layer in quantized_layers(mine))


# ---- what a loaded model is ----


def test_train_form_is_a_plain_model(tmp_path: Path) -> None:
    """No trace of the quantizer, which else makes save_pretrained ignore the state dict that it is given."""
    model, _ = tiny("llama", num_hidden_layers=1)
    mine = on_load(model, tmp_path, config())
    again = reloaded(mine, tmp_path / "again")
    for each in (mine, again):
        assert not any(hasattr(each, name) for name in ("hf_quantizer", "quantization_method"))
        assert not getattr(each, "is_quantized", False) and not hasattr(each.config, "_is_quantized")
        assert isinstance(each.config.quantization_config, BitNetQuantizationConfig)
        assert coverage(each).fraction == coverage(mine).fraction
    state = {name: torch.zeros_like(tensor) for name, tensor in mine.state_dict().items()}
    mine.save_pretrained(tmp_path / "zeros", state_dict=state)
    assert not loaded(type(mine), tmp_path / "zeros").model.norm.weight.any()


def test_packed_form_keeps_its_quantizer(tmp_path: Path) -> None:
    model, _ = tiny("llama", num_hidden_layers=1)
    mine = on_load(model, tmp_path, config(form="packed"))
    assert mine.hf_quantizer.is_trainable and not mine.hf_quantizer.is_qat_trainable
    assert not any(parameter.requires_grad for _, layer in quantized_layers(mine) for parameter in layer.parameters())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        tf.Trainer(model=mine, args=tf.TrainingArguments(output_dir=tmp_path / "out", use_cpu=True, report_to=[]))
    assert mine.hf_quantizer.quantization_config is mine.config.quantization_config
    unpacked = unpack_model(mine)
    assert not hasattr(unpacked, "hf_quantizer") and not getattr(unpacked, "is_quantized", False)
    packed = reloaded(pack_model(unpacked), tmp_path / "again")
    plain = packed.dequantize()
    assert next(quantized_layers(plain), None) is None and not hasattr(plain.config, "quantization_config")


def test_stock_trainer(tmp_path: Path) -> None:
    """Trainer knows nothing of us: it trains, saves, and resumes what from_pretrained made."""
    model, _ = tiny("llama", num_hidden_layers=1)
    ids = torch.randint(3, VOCABULARY, (8, 6))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(steps: int, folder: str) -> tf.Trainer:
        mine = on_load(model, tmp_path, config(weight_scale="learned"))
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
            report_to=[], disable_tqdm=True, learning_rate=1e-2, dataloader_pin_memory=False,
        )  # fmt: skip
        return tf.Trainer(model=mine, args=arguments, train_dataset=data)

    whole = trainer(4, "whole")
    before = copy.deepcopy(whole.model)
    whole.train()
    resumed = trainer(4, "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = loaded(type(model), tmp_path / "whole" / "checkpoint-4")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name
    changed = before.model.layers[0].mlp.up_proj
    assert not torch.equal(changed.weight, again.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(changed.weight_scale, again.model.layers[0].mlp.up_proj.weight_scale)
    assert_same_layers(reloaded(pack_model(again), tmp_path / "packed"), whole.model)


@pytest.mark.parametrize("form", ["train", "packed"])
def test_generate(form: str, tmp_path: Path) -> None:
    model, batch = tiny("qwen3")
    mine = on_load(model, tmp_path, config(form=form))
    again = reloaded(mine, tmp_path / "again")
    first, second = (m.generate(batch["input_ids"], max_new_tokens=4, do_sample=False) for m in (mine, again))
    assert torch.equal(first, second) and first.shape[1] == batch["input_ids"].shape[1] + 4


def test_only_safetensors(tmp_path: Path) -> None:
    model, _ = tiny("llama", num_hidden_layers=1)
    quantize_model(model, config(form="packed")).save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


# ---- other classes, other configs ----


@pytest.mark.parametrize("form", ["train", "packed"])
def test_other_heads(form: str, tmp_path: Path) -> None:
    """The layers of a checkpoint are found under the names of the base model and of other heads too."""
    model, batch = tiny("llama")
    quantize_model(model, config(form=form)).save_pretrained(tmp_path / "causal")
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state
    base = tf.AutoModel.from_pretrained(tmp_path / "causal")
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=3)
    assert_same_layers(classifier.model, base)
    assert type(classifier.score) is nn.Linear
    base.save_pretrained(tmp_path / "base")
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(back.lm_head) is nn.Linear
    for each in (base, classifier.model, back.model):
        with torch.no_grad():
            assert torch.equal(each(**batch).last_hidden_state, expected)


def test_the_list_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later release may select layers by other rules; a checkpoint is restored as it was saved."""
    model, batch = tiny("llama")
    quantize_model(model, config(form="train", keep=[r"layers\.1\.mlp\.up"])).save_pretrained(tmp_path)
    saved = read_config(tmp_path)["hf_bitnet"]["quantized_modules"]
    assert "model.layers.*.self_attn.q_proj" in saved
    assert "model.layers.0.mlp.up_proj" in saved and "model.layers.1.mlp.up_proj" not in saved
    monkeypatch.setattr(select, "_ROUTERS", select.re.compile("q_proj"))
    monkeypatch.setattr(select, "_HEADS", select.re.compile("nothing"))
    again = loaded(type(model), tmp_path)
    assert_same_layers(again, model)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_config_of_another_model(tmp_path: Path) -> None:
    """A config that was on one model quantizes another: its list of layers is not taken for the other's."""
    first = quantize_model(tiny("bert")[0], config())
    quantization = first.config.quantization_config
    model, _ = tiny("llama", num_hidden_layers=1)
    mine = on_load(model, tmp_path, quantization)
    assert_same_layers(mine, quantize_model(model, quantization))
    assert quantization.quantized_modules == first.config.quantization_config.quantized_modules


def test_config_argument(tmp_path: Path) -> None:
    """from_pretrained(config=model.config) hands our object to transformers; an equal config given again is no conflict."""
    model, batch = tiny("llama", num_hidden_layers=1)
    quantize_model(model, config(form="packed")).save_pretrained(tmp_path)
    again = loaded(type(model), tmp_path, config=model.config)
    third = loaded(type(model), tmp_path, quantization_config=config(form="packed"))
    fourth = loaded(type(model), tmp_path, quantization_config=config(form="packed").to_dict())
    for each in (again, third, fourth):
        assert torch.equal(logits(each, batch), logits(model, batch))


def test_new_layers_of_a_head(tmp_path: Path) -> None:
    """Layers that the float checkpoint does not have are initialised, and their scales start from those weights."""
    model, batch = tiny("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    mine = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(**RICH))
    layer = mine.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight_scale, layer.spec.weight.compute_scale(layer.weight))
    assert torch.equal(layer.sub_norm.weight, torch.ones(48)) and float(layer.sub_norm.blend) == 0.0
    assert logits(mine, batch).isfinite().all()
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.up_proj\..*form='train'"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(form="packed"))


@pytest.mark.parametrize("form", ["train", "packed"])
def test_language_model_of_a_composite_model(form: str, tmp_path: Path) -> None:
    """Quantized by itself, inside a model whose other linear layers have names like its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = tf.CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    settings = tf.LlavaConfig(text_config=tf.LlamaConfig(vocab_size=99, **sizes), vision_config=vision, image_token_index=98)
    model: Any = tf.LlavaForConditionalGeneration(settings).eval()
    batch = {"input_ids": torch.tensor([[5, 98, 98, 98, 98, 7]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    quantize_model(model.model.language_model, config(form=form))
    expected = logits(model, batch)
    for index in range(2):
        model = reloaded(model, tmp_path / str(index))
        assert torch.equal(logits(model, batch), expected)
        assert {name.split(".")[1] for name, _ in quantized_layers(model)} == {"language_model"}
    (pack_model if form == "train" else unpack_model)(model)
    assert torch.equal(logits(reloaded(model, tmp_path / "other"), batch), logits(model, batch))


def test_in_place_model_has_no_stale_marks() -> None:
    model, _ = tiny("llama", num_hidden_layers=1)
    quantize_model(model, config(form="packed"))
    assert model.config._is_quantized  # transformers' flash attention else takes its dtype from a uint8 weight
    unpack_model(model)
    assert not hasattr(model.config, "_is_quantized")
