"""Mixtures of experts as whole models: through training, packing, files, adapters, calibration and export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import hf_bitnet as hb
from hf_bitnet.cli import main
from hf_bitnet.modules import BitExperts, PackedBitLinear
from hf_bitnet.surgery import full_precision_copy, quantized_layers, set_strength
from tests.checkpoints import assert_same_layers, logits, reloaded
from tests.qat import assert_same, losses, make_trainer, weights
from tests.tiny import tiny

CONFIG = hb.BitNetQuantizationConfig.bitnet_b158()


# ---- whole models ----


def moe(name: str, **overrides: Any) -> Any:
    """A tiny model: "qwen3_moe", whose files hold one expert at a time, or "gpt_oss", whose files hold them fused."""
    if name == "mixtral":
        return tiny("mixtral", **overrides)[0]
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"head_dim": 16, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes["max_position_embeddings"] = 64
    torch.manual_seed(0)
    if name == "qwen3_moe":
        kind = tf.Qwen3MoeConfig(**sizes, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **overrides)
        return tf.Qwen3MoeForCausalLM(kind).eval()
    assert name == "gpt_oss"
    return tf.GptOssForCausalLM(tf.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, **overrides)).eval()


BATCH = {"input_ids": torch.arange(3, 25).reshape(2, 11)}
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fields", [{}, {"weight": "int4", "group_size": 16}, {"weight_scale": "learned"}], ids=str)
def test_from_quantizing_to_packed_files(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = moe(name)
    plain = logits(model, BATCH)
    hb.quantize_model(model, hb.BitNetQuantizationConfig(**fields))
    report = hb.coverage(model)
    assert report.fraction > 0.9 and {row.reason for row in report.rows if "router" in row.name or "mlp.gate." in row.name} <= {
        "router",
        "bias",
    }
    trained = logits(model, BATCH)
    set_strength(model, 0.0)
    torch.testing.assert_close(logits(model, BATCH), plain, rtol=1e-4, atol=1e-5)
    set_strength(model, 1.0)
    back = reloaded(model, tmp_path / "train")
    assert_same_layers(back, model)
    assert torch.equal(logits(back, BATCH), trained)
    packed = hb.pack_model(copy.deepcopy(model))
    torch.testing.assert_close(logits(packed, BATCH), trained, rtol=1e-4, atol=1e-5)
    again = reloaded(packed, tmp_path / "packed")
    assert_same_layers(again, packed)
    assert torch.equal(logits(again, BATCH), logits(packed, BATCH))
    assert all(isinstance(layer, PackedBitLinear) for _, layer in quantized_layers(again))
    codes = {name: layer.quantized_weight().codes for name, layer in quantized_layers(model)}
    again = dict(quantized_layers(hb.unpack_model(again)))
    assert again.keys() == codes.keys() and all(torch.equal(again[n].quantized_weight().codes, codes[n]) for n in codes)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_trained_files_are_float_files_of_the_model(name: str, tmp_path: Path) -> None:
    """Under the names, and with the values, that the plain model's files have: whoever reads those reads these."""
    model = moe(name)
    model.save_pretrained(tmp_path / "plain")
    hb.quantize_model(model, CONFIG).save_pretrained(tmp_path / "train")
    plain, train = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "train"))
    assert plain.keys() == train.keys() and all(torch.equal(plain[key], train[key]) for key in plain)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("form", ["train", "packed"])
def test_float_files_are_quantized_while_they_are_loaded(name: str, form: str, tmp_path: Path) -> None:
    model = moe(name)
    model.save_pretrained(tmp_path)
    config = hb.BitNetQuantizationConfig(form=form)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    hb.quantize_model(model, config)
    assert_same_layers(loaded, model)
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))


def test_files_with_fused_experts_are_quantized_after_loading(tmp_path: Path) -> None:
    model = moe("gpt_oss")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GptOssForCausalLM hold all experts of a layer in one tensor.*quantize_model\(model"):
        type(model).from_pretrained(tmp_path, quantization_config=CONFIG)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=hb.BitNetQuantizationConfig(keep=[r"experts"]))
    assert len(list(quantized_layers(loaded))) == 8
    assert_same_layers(hb.quantize_model(type(model).from_pretrained(tmp_path), CONFIG), hb.quantize_model(model, CONFIG))


def test_fused_files_of_a_model_whose_files_are_not(tmp_path: Path) -> None:
    """What no layer would find is refused, not drawn anew."""
    model = moe("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "model.safetensors"))
    for form in ("train", "packed"):
        with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight.*quantize_model"):
            type(model).from_pretrained(tmp_path, quantization_config=hb.BitNetQuantizationConfig(form=form))


def test_some_experts_may_be_kept(tmp_path: Path) -> None:
    """All of the model's are separate then, because its files hold one form or the other."""
    model = moe("mixtral")
    hb.quantize_model(model, hb.BitNetQuantizationConfig(keep=[r"layers\.0\..*experts", r"experts\.2\.w1$"]))
    names = [name for name, _ in quantized_layers(model) if "experts" in name]
    assert len(names) == 11 and all(name.startswith("model.layers.1.") for name in names)
    assert isinstance(model.model.layers[0].mlp.experts, BitExperts)
    back = reloaded(model, tmp_path)
    assert_same_layers(back, model)
    assert torch.equal(logits(back, BATCH), logits(model, BATCH))


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"min_coverage": 0.99}, "min_coverage"), ({"group_size": 7}, "group_size"), ({"overrides": {"up": {}}}, None)],
)
def test_a_refused_model_is_left_as_it_was(fields: dict[str, Any], error: str | None) -> None:
    model = moe("qwen3_moe")
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    if error is None:
        with torch.no_grad():
            model.model.layers[1].mlp.experts.gate_up_proj[2, 3, 4] = float("nan")
        before = {name: (id(p), p._version) for name, p in model.named_parameters()}
        error, fields = r"layers\.1\.mlp\.experts\.2\.gate_proj holds 1 NaN", {}
    with pytest.raises(ValueError, match=error):
        hb.quantize_model(model, hb.BitNetQuantizationConfig(**fields))
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before


def test_experts_of_another_make_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 8))
            self.out = nn.Linear(8, 8)

    model = Experts()
    hb.quantize_model(model, CONFIG)
    reasons = {row.name: row.reason for row in hb.coverage(model).rows}
    assert reasons["weight"] == "fused experts of a make that is not known (Experts)"
    assert hb.coverage(model).fraction == pytest.approx(64 / (4 * 64 + 64))


def test_copies_and_casts() -> None:
    model = hb.quantize_model(moe("gpt_oss"), CONFIG)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, BATCH), logits(model, BATCH))
    with torch.no_grad():
        twin.model.layers[0].mlp.experts.experts()[0].down_proj.weight.zero_()
    assert not torch.equal(logits(twin, BATCH), logits(model, BATCH))
    half = logits(model.bfloat16(), BATCH)
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all())


def test_generation_with_packed_experts() -> None:
    model = hb.pack_model(hb.quantize_model(moe("qwen3_moe"), CONFIG))
    asked = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**BATCH, **asked)
    assert torch.equal(hb.optimize_for_generation(model).generate(**BATCH, **asked), expected)


# ---- with the rest of the library ----


@pytest.mark.parametrize("name", MODELS)
def test_trained(name: str, tmp_path: Path) -> None:
    """With a teacher and a schedule; routers and every expert learn, and each map is watched."""
    model = hb.quantize_model(moe(name), CONFIG)
    before = weights(model)
    fields = {"max_steps": 20, "learning_rate": 1e-2, "quantization_schedule": {"end": 0.2}}
    fields |= {"distillation": {"alpha": 0.5}}
    trainer = make_trainer(tmp_path, model, teacher="self", **fields)
    trainer.train()
    logs = losses(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["quant/strength"] == 1.0 and logs[-1]["quant/flip_rate"] > 0
    after = weights(model)
    assert all(not torch.equal(before[key], after[key]) for key in before if "experts" in key or "gate.weight" in key)
    trainer.save_model(str(tmp_path / "final"))
    assert_same(weights(type(model).from_pretrained(tmp_path / "final")), after)


def test_fitted_on_data() -> None:
    """Experts that data reach are rounded with care; one that none reaches is named."""
    model = moe("qwen3_moe")
    expected = logits(model, BATCH)
    plain = hb.quantize_model(copy.deepcopy(model), CONFIG)
    hb.quantize_model(model, CONFIG)
    batches = [{"input_ids": torch.randint(3, 96, (8, 32))} for _ in range(3)]
    hb.fit_weights(model, batches, progress=False)
    errors = [float((logits(each, BATCH) - expected).square().mean()) for each in (model, plain)]
    assert errors[0] < errors[1]
    few = hb.quantize_model(moe("qwen3_moe"), CONFIG)
    rows = hb.fit_weights(few, [{"input_ids": torch.tensor([[3]])}], progress=False).rows
    unreached = [row for row in rows if row.note.startswith("no token came here")]
    assert len(unreached) >= 2 * 2 * 3 and all(".experts." in row.name and row.error is None for row in unreached)
    assert (
        all(layer.fitted and not layer.bypassed for _, layer in quantized_layers(few))
        and torch.isfinite(logits(few, BATCH)).all()
    )


def test_full_precision_twin() -> None:
    model = moe("gpt_oss")
    expected = logits(model, BATCH)
    twin = full_precision_copy(hb.quantize_model(model, CONFIG))
    torch.testing.assert_close(logits(twin, BATCH), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("mixtral", "dense"),
        ("qwen3_moe", "hf_bitnet"),
        pytest.param("mixtral", "hf_bitnet", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "dense", marks=pytest.mark.slow),
    ],
)
def test_exported(name: str, form: str, tmp_path: Path) -> None:
    """The gate reads the files with the library, and the dense ones without it."""
    model = hb.quantize_model(moe(name), CONFIG)
    report = hb.export_model(model, tmp_path / "out", format=form, progress=False)
    assert report.checks and all(check.passed for check in report.checks), report
    if form == "dense":
        assert type(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.experts) is not BitExperts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("packed", [False, True])
def test_adapters_on_experts(name: str, packed: bool, tmp_path: Path) -> None:
    """peft finds them by their names, which for fused experts it would turn into others, and loads what it saved."""
    import peft

    model = hb.quantize_model(moe(name), CONFIG)
    model = hb.pack_model(model) if packed else model
    base, down = copy.deepcopy(model), "w2" if name == "mixtral" else "down_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[down, "q_proj"], r=2, init_lora_weights=False))
    found = [key for key, _ in adapted.named_parameters() if "lora_A" in key]
    assert len(found) == 10 and sum(f"experts.3.{down}" in key for key in found) == 2
    adapted(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(p.grad is not None for key, p in adapted.named_parameters() if "lora_" in key)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again, BATCH), logits(adapted.eval(), BATCH))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft's own
def test_adapters_on_fused_experts_are_as_they_were() -> None:
    import peft

    adapted = peft.get_peft_model(moe("mixtral"), peft.LoraConfig(target_modules=["w1", "w2", "w3"], r=2))
    assert adapted.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}


def test_kept_experts_stay_fused() -> None:
    model, config = moe("mixtral"), hb.BitNetQuantizationConfig(keep=[r"experts"])
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    hb.quantize_model(model, config)
    assert model.model.layers[0].mlp.experts.gate_up_proj is weight
    reasons = {row.name: row.reason for row in hb.coverage(model).rows}
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"] == "fused experts, not quantized"


def test_dense_export_of_a_model_whose_files_are_fused(tmp_path: Path) -> None:
    model = hb.quantize_model(moe("gpt_oss"), CONFIG)
    with pytest.raises(ValueError, match=r"format 'dense' cannot hold this model: .*experts of a layer in one tensor.*dequant"):
        hb.export_model(model, tmp_path / "out", format="dense", progress=False)
    hb.dequantize_model(model).save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("form", ["train", "packed", "float"])
def test_dequantized_models_are_saved_as_plain_ones(name: str, form: str, tmp_path: Path) -> None:
    """However they were loaded: programs that know nothing of fused experts find each of them under its name."""
    model = moe(name)
    model.save_pretrained(tmp_path / "plain")
    if form == "float":
        loaded = type(model).from_pretrained(tmp_path / "plain", quantization_config=CONFIG)
    else:
        hb.quantize_model(model, hb.BitNetQuantizationConfig(form=form)).save_pretrained(tmp_path / form)
        loaded = type(model).from_pretrained(tmp_path / form)
    loaded.save_pretrained(tmp_path / "again")
    hb.dequantize_model(loaded).save_pretrained(tmp_path / "dequantized")
    plain, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "dequantized"))
    assert plain.keys() == found.keys()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "dequantized"), BATCH), logits(loaded, BATCH))


def test_tied_experts_stay_tied() -> None:
    model = moe("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj = first.gate_up_proj
    hb.quantize_model(model, CONFIG)
    assert second.gate_up_proj is first.gate_up_proj and len(list(quantized_layers(model))) == 8


def test_gradients_of_functions() -> None:
    """Packed layers allow transforms, and so do packed experts."""
    model = hb.pack_model(hb.quantize_model(moe("mixtral"), CONFIG))
    x = torch.randn(1, 3, 48)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs_embeds=x).logits.square().sum(), x)
    found = torch.func.grad(lambda value: model(inputs_embeds=value).logits.square().sum())(x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_patterns_of_fused_names_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """They are what the plain model shows, and match nothing here."""
    hb.quantize_model(moe("mixtral"), hb.BitNetQuantizationConfig(keep=[r"gate_up_proj", r"q_proj"], overrides={"w9": "keep"}))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "no linear layer of MixtralForCausalLM is called by the pattern 'gate_up_proj', 'w9'; maps of experts have names like "
        "model.layers.0.mlp.experts.0.w1"
    )


def test_command_line_quantizes_files_with_fused_experts(tmp_path: Path) -> None:
    model = moe("gpt_oss")
    model.save_pretrained(tmp_path / "plain")
    assert main(["quantize", str(tmp_path / "plain"), str(tmp_path / "packed"), "--dtype", "float32"]) == 0
    packed = type(model).from_pretrained(tmp_path / "packed")
    assert_same_layers(packed, hb.quantize_model(model, hb.BitNetQuantizationConfig(form="packed")))
