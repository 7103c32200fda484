"""GGUF files: every kind holds our codes exactly, under the right names, and what a program cannot compute is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.export import Source
from hf_bitnet.export.gguf import Gguf, llama_cpp, parity, planning
from hf_bitnet.export.gguf.kinds import KINDS, PREFERENCE
from hf_bitnet.export.gguf.reading import read_head, rows_of
from hf_bitnet.export.gguf.writing import write_file
from tests import corpus, gguf_models
from tests.gguf_models import fields, made, tensors, without_rotation_order
from tests.tiny import tiny

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")


# ---- files ----


def written(model: Any, path: Path, kind: str | None = None, other: str = "F32") -> planning.Plan:
    source = Source(model, None, "tiny")
    assert not planning.refusals(source, "llama.cpp")
    plan = planning.plan_of(source, "llama.cpp", planning.choices(source, kind, PREFERENCE), KINDS[other])
    write_file(path, source, plan, lambda weights: None)
    return plan


@pytest.mark.parametrize("form", ["train", "packed"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_file_of_a_llama(tmp_path: Path, form: str, granularity: str) -> None:
    """Rows of q and k, their scales and their biases move together; everything else stays."""
    group = {"group_size": 32} if granularity == "group" else {}
    quantize = {"weight": "int4", "granularity": granularity, **group, "form": form, "embeddings": "int8"}
    model = made("llama", quantize, attention_bias=True, mlp_bias=True)
    report = hb.export_model(model, tmp_path / "out", format="gguf", progress=False, verify="codes", other="f32", name="mine")
    assert report.kinds() == {"F32": 20, "Q4_0": 14, "Q8_0": 1} and not report.fallbacks
    assert "gguf.GGUFReader" in str(report.checks[0]) and report.checks[0].passed
    found = tensors(tmp_path / "out" / "model.gguf")
    layer: Any = model.model.layers[1]
    for name, module, heads in (("q", layer.self_attn.q_proj, 4), ("k", layer.self_attn.k_proj, 2)):
        weight = without_rotation_order(found[f"blk.1.attn_{name}.weight"], heads)
        assert torch.equal(weight, rounded(module.quantized_weight()))
        assert torch.equal(without_rotation_order(found[f"blk.1.attn_{name}.bias"], heads), module.bias)
    assert torch.equal(found["blk.1.attn_v.weight"], rounded(layer.self_attn.v_proj.quantized_weight()))
    assert torch.equal(found["blk.0.ffn_down.weight"], rounded(model.model.layers[0].mlp.down_proj.quantized_weight()))
    assert torch.equal(found["token_embd.weight"], rounded(model.model.embed_tokens.quantized_weight()))
    assert torch.equal(found["output.weight"], model.lm_head.weight) and torch.equal(found["blk.0.ffn_up.bias"], bias(model))
    keys = fields(tmp_path / "out" / "model.gguf")
    assert (keys["general.architecture"], keys["general.name"], keys["general.file_type"]) == ("llama", "mine", 2)
    assert (keys["llama.attention.head_count_kv"], keys["llama.vocab_size"], keys["llama.context_length"]) == (2, 96, 64)


def bias(model: Any) -> Tensor:
    return model.model.layers[0].mlp.up_proj.bias


def rounded(quantized: Any) -> Tensor:
    return quantized._replace(scale=quantized.scale.half().float()).dequantize().detach()


@pytest.mark.parametrize("family", gguf_models.FAMILIES)
def test_names_are_those_of_the_package(tmp_path: Path, family: str) -> None:
    plan = written(made(family), tmp_path / "model.gguf")
    name = plan.architecture.name
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    legal = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    for entry in plan.entries:
        block = entry.stored.split(".")[1] if entry.stored.startswith("blk.") else "-"
        pattern = entry.stored.removesuffix(".weight").removesuffix(".bias").replace(f"blk.{block}.", "blk.{bid}.")
        assert pattern in legal, entry.stored
    assert parity.compare_values(tmp_path / "model.gguf", plan).passed


def test_norms_of_gemma_and_tied_tables(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 16}
    model = made("gemma3", {"weight": "ternary", "embeddings": "int8"}, **overrides)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plan = written(model, tmp_path / "model.gguf")
    found, keys = tensors(tmp_path / "model.gguf"), fields(tmp_path / "model.gguf")
    assert "output.weight" not in found and {entry.kind.name for entry in plan.entries} == {"TQ2_0", "Q8_0", "F32"}
    assert torch.equal(found["blk.1.post_ffw_norm.weight"], model.model.layers[1].post_feedforward_layernorm.weight + 1)
    # llama.cpp divides by the root of the head's size, 64
    assert torch.equal(found["blk.0.attn_q_norm.weight"], 2 * (model.model.layers[0].self_attn.q_norm.weight + 1))
    assert (keys["gemma3.attention.sliding_window"], keys["gemma3.rope.freq_base_swa"]) == (4, 10000.0)
    assert keys["gemma3.attention.sliding_window_pattern"] == [False, True]


def test_kinds_newer_than_the_package(tmp_path: Path) -> None:
    plan = written(made("llama"), tmp_path / "model.gguf", kind="Q2_0")
    assert plan.main_kind.file_type == 41
    check = parity.compare_values(tmp_path / "model.gguf", plan)
    assert check.passed and "14 x Q2_0 decoded by own" in check.detail
    if "Q2_0" not in gguf.GGMLQuantizationType.__members__:
        assert check.reader == "own reader"
    old = written(made("llama"), tmp_path / "old.gguf")
    ours, theirs = (_heads(tmp_path / "old.gguf", own) for own in (True, False))
    assert ours == theirs and len(ours) == len(old.entries)


def _heads(path: Path, own: bool) -> dict[str, Any]:
    from hf_bitnet.gguf_file import GGUFFile

    return GGUFFile(path).tensors if own else read_head(path)[0]


def test_kept_layers_and_dtypes(tmp_path: Path) -> None:
    """A q_proj that stays float is permuted as well; matrices are rounded once, norms never."""
    model = made("llama", {"weight": "ternary", "keep": [r"layers\.0\.self_attn"]}).bfloat16()
    report = hb.export_model(model, tmp_path / "out", format="gguf", other="bf16", verify="codes", progress=False)
    assert report.kinds() == {"TQ2_0": 10, "BF16": 6, "F32": 5}
    found = tensors(tmp_path / "out" / "model.gguf")
    weight = model.model.layers[0].self_attn.q_proj.weight.float()
    assert torch.equal(without_rotation_order(found["blk.0.attn_q.weight"], 4), weight)
    with pytest.raises(ValueError, match="other='f8'; legal: f16, bf16, f32"):
        hb.export_model(model, tmp_path / "not", format="gguf", other="f8")
    with pytest.raises(ValueError, match="kind='IQ2'; legal: Q1_0, TQ2_0, TQ1_0"):
        hb.export_model(model, tmp_path / "not", format="gguf", kind="IQ2")
    with pytest.raises(ValueError, match=r"file_name='\.\./a\.gguf'; a name that ends in \.gguf, without folders"):
        hb.export_model(model, tmp_path / "not", format="gguf", file_name="../a.gguf")


def test_fallback_is_said_or_refused(tmp_path: Path) -> None:
    model = made("llama", intermediate_size=576)
    report = hb.export_model(model, tmp_path / "out", format="gguf", progress=False, verify="codes", kind="TQ1_0")
    assert report.kinds() == {"TQ1_0": 12, "F32": 5, "Q2_0": 2, "F16": 2}
    assert [each.stored for each in report.fallbacks] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert "TQ1_0 has blocks of 256, which do not divide the 576 input features" in str(report)
    assert any("no fast code" in note for note in report.notes) and any("CUDA" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"down_proj\.weight would be Q2_0: TQ2_0 has blocks of 256.*strict=True"):
        hb.export_model(model, tmp_path / "not", format="gguf", strict=True)
    with pytest.raises(
        ValueError, match=r"kind='Q1_0' can hold none.*holds the levels -1, 1 only\); choose one of TQ2_0, TQ1_0"
    ):
        hb.export_model(model, tmp_path / "not", format="gguf", kind="Q1_0")
    assert not (tmp_path / "not").exists()


def test_scales_that_half_precision_lacks(tmp_path: Path) -> None:
    model: Any = made("llama", {"weight": "ternary", "granularity": "group", "group_size": 256, "form": "packed"})
    layer = model.model.layers[1].mlp.down_proj
    layer.weight_scale.data[3, 1] = 2e-6
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: its scale 2e-06 is no number of half.*kind='F32'"):
        hb.export_model(model, tmp_path / "out", format="gguf", verify="codes", progress=False)
    assert not any(tmp_path.iterdir())
    report = hb.export_model(model, tmp_path / "out", format="gguf", verify="codes", progress=False, kind="F32")
    assert report.checks[0].passed
    found = tensors(tmp_path / "out" / "model.gguf")["blk.1.ffn_down.weight"]
    assert torch.equal(found, layer.quantized_weight().dequantize())
    quantized = layer.quantized_weight()
    quantized.codes[3, 256:] = 0  # no scale matters for zeros
    layer.store(quantized)
    assert hb.export_model(model, tmp_path / "zeros", format="gguf", verify="codes", progress=False).checks[0].passed


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("bitnet", {"hidden_act": "relu2"}, "'relu2', .*'bitnet' computes 'silu'; format='i2_s' is for bitnet.cpp"),
        ("bitnet", {"tie_word_embeddings": False}, "output head is not tied.*use format='dense'"),
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu', llama.cpp's architecture 'llama' computes 'silu'"),
        ("qwen2", {"num_attention_heads": 8, "head_dim": 64}, "8 heads of 64 are not as wide as the hidden size 256"),
        ("qwen3", {"attention_bias": True}, "no place for model.layers.0.self_attn.o_proj.bias and 1 more"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attention is capped or looks ahead"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic', .* knows"),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}, "'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 16,
                                       "original_max_position_embeddings": 16}}, "'yarn' with other values"),
    ],
)  # fmt: skip
def test_refused_architectures(tmp_path: Path, family: str, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hb.export_model(made(family, **overrides), tmp_path / "out", format="gguf")


def test_refused_models_and_norms(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is none of the models that are known here \(LlamaForCausalLM, "):
        hb.export_model(hb.quantize_model(tiny("gpt2")[0], hb.BitNetQuantizationConfig()), tmp_path / "out", format="gguf")
    everywhere = made("llama", {"weight": "ternary", "sub_norm": ["."]}, tie_word_embeddings=True)
    hb.set_norm_blend(everywhere, 1.0)
    with pytest.raises(
        ValueError, match=r"no norm in front of .*q_proj; for it quantize with sub_norm=\['o_proj', 'down_proj'\]"
    ):
        hb.export_model(everywhere, tmp_path / "out", format="gguf")
    model = made("llama", {"weight": "ternary", "sub_norm": ["o_proj", "down_proj"]}, tie_word_embeddings=True)
    source = Source(model, None, "")
    assert planning.plan_of(source, "llama.cpp", planning.choices(source, None, PREFERENCE), KINDS["F16"]).architecture.permuted
    hb.set_norm_blend(model, 0.5)
    with pytest.raises(ValueError, match=r"is blended in by 0\.5; call hf_bitnet\.set_norm_blend\(model, 1\.0\)"):
        hb.export_model(model, tmp_path / "out", format="gguf")
    hb.set_norm_blend(model, 1.0)
    plan = written(model, tmp_path / "model.gguf")
    assert plan.architecture.name == "bitnet" and not plan.architecture.permuted
    found = tensors(tmp_path / "model.gguf")
    assert torch.equal(found["blk.1.ffn_sub_norm.weight"], model.model.layers[1].mlp.down_proj.sub_norm.weight.detach())
    some = made("llama", {"weight": "ternary", "sub_norm": ["o_proj"]}, tie_word_embeddings=True)
    hb.set_norm_blend(some, 1.0)
    with pytest.raises(ValueError, match="in front of every o_proj and down_proj, this model in front of some only"):
        hb.export_model(some, tmp_path / "out", format="gguf")


def test_windows_shorten_the_context(tmp_path: Path) -> None:
    plan = written(made("mistral", sliding_window=8), tmp_path / "model.gguf")
    assert fields(tmp_path / "model.gguf")["llama.context_length"] == 8 and planning.probe_length(plan) == 8
    notes = Gguf().notes(Source(made("mistral", sliding_window=8), None, ""))
    assert any("context of 8 tokens, because llama.cpp knows no attention windows" in note for note in notes)
    assert any("for 32 or 256 of them, this library to 8 bits" in note for note in notes)


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    plan = written(made("llama"), path)
    stored = read_head(path)[0]["blk.1.ffn_up.weight"]
    with open(path, "r+b") as file:
        file.seek(stored.start + 5000)
        byte = file.read(1)[0]
        file.seek(stored.start + 5000)
        file.write(bytes([byte ^ 1]))
    assert str(parity.compare_values(path, plan)).endswith("(blk.1.ffn_up.weight is another)")
    lacking = dataclasses.replace(plan, entries=plan.entries[1:])
    assert "is no tensor of the model" in parity.compare_values(path, lacking).detail
    more = [*plan.entries, dataclasses.replace(plan.entries[0], stored="blk.9.attn_q.weight")]
    more = dataclasses.replace(plan, entries=more[::-1])
    assert "blk.9.attn_q.weight is missing" in parity.compare_values(path, more).detail


# ---- bitnet.cpp ----


def test_i2_s(tmp_path: Path) -> None:
    model = made("llama", tie_word_embeddings=True)
    report = hb.export_model(model, tmp_path / "out", format="i2_s", progress=False)
    assert report.kinds() == {"I2_S": 14, "F32": 5, "F16": 1}
    assert [check.passed for check in report.checks] == [True, None]
    assert "14 x I2_S decoded by own" in report.checks[0].detail and "hf_bitnet's own reader" in report.checks[1].detail
    path = tmp_path / "out" / "model.gguf"
    stored = read_head(path)[0]["blk.1.ffn_down.weight"]
    weight = model.model.layers[1].mlp.down_proj.quantized_weight()
    data = path.read_bytes()[stored.start : stored.start + 256 * 512 // 4 + 32]
    levels = torch.tensor([gguf_models.i2_s(data[row * 128 : row * 128 + 128]) for row in range(256)])
    assert torch.equal(levels.to(torch.int8), weight.codes)
    tail = np.frombuffer(data[-32:], np.float32)
    assert tail[0] == weight.scale.item() and not tail[1:].any()
    assert stored.kind == 36 and stored.start % 32 == 0
    assert torch.equal(rows_of(path, stored, KINDS["I2_S"])(3, 5), weight.dequantize()[3:5])
    assert b"general.file_type\x04\x00\x00\x00(\x00\x00\x00" in path.read_bytes()


def test_i2_s_of_bitnet_and_what_is_refused(tmp_path: Path) -> None:
    report = hb.export_model(made("bitnet", hidden_act="relu2"), tmp_path / "out", format="i2_s", progress=False)
    assert report.kinds()["I2_S"] == 14 and b"bitnet-b1.58.block_count" in (tmp_path / "out" / "model.gguf").read_bytes()
    mixed = hb.export_model(made("llama", intermediate_size=576), tmp_path / "mixed", format="i2_s", progress=False)
    assert mixed.kinds() == {"I2_S": 12, "F32": 5, "Q4_0": 2, "F16": 2}
    assert mixed.fallbacks[0].why == "I2_S has blocks of 128, which do not divide the 576 input features"
    with pytest.raises(ValueError, match="would be Q4_0: I2_S has blocks of 128"):
        hb.export_model(made("llama", intermediate_size=576), tmp_path / "not", format="i2_s", strict=True)
    with pytest.raises(ValueError, match="I2_S holds the levels -1, 0, 1 only; export with format='gguf'"):
        hb.export_model(made("llama", {"weight": "int4"}), tmp_path / "not", format="i2_s")
    with pytest.raises(ValueError, match="I2_S has one scale for the tensor, here are"):
        hb.export_model(made("llama", {"weight": "ternary", "granularity": "channel"}), tmp_path / "not", format="i2_s")
    with pytest.raises(ValueError, match=r"bitnet\.cpp has no architecture for a Qwen3ForCausalLM as it is; use format='gguf'"):
        hb.export_model(made("qwen3"), tmp_path / "not", format="i2_s")
    with pytest.raises(ValueError, match="other='bf16'; legal: f16, f32"):
        hb.export_model(made("llama"), tmp_path / "not", format="i2_s", other="bf16")


# ---- readers ----


def test_llama_cpp_computes_the_model(tmp_path: Path) -> None:
    """One model of what the slow tests go through."""
    if not llama_cpp.is_installed():  # not importorskip: the package opens files that it never closes
        pytest.skip("needs llama.cpp: pip install llama-cpp-python")
    report = hb.export_model(made("llama"), tmp_path / "out", format="gguf", progress=False)
    assert [(check.reader, check.passed) for check in report.checks] == [("gguf.GGUFReader", True), ("llama.cpp", True)]
    assert "of its own rounding of activations, limit 0.03" in report.checks[1].detail
    assert any("there is no tokenizer in the file" in note for note in report.notes)
    saved = json.loads((tmp_path / "out" / "export.json").read_text())
    assert saved["options"] == {"kind": None, "other": "f16", "strict": False, "file_name": "model.gguf"}


def test_without_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then transformers' own reader is asked, where it knows all of the file."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(parity, "run_plain", lambda *given, gguf_file: {"logits": torch.zeros(1, 24, 96)})
    model = made("llama")
    with pytest.raises(hb.export.ParityError, match="transformers without hf_bitnet, logits: relative error 1,") as caught:
        hb.export_model(model, tmp_path / "out", format="gguf", progress=False)
    assert str(caught.value.checks[1]) == "not run  llama.cpp: logits (pip install llama-cpp-python)"
    for quantize, overrides in (({"weight": "binary"}, {}), (None, {"attention_bias": True}), (None, {"head_dim": 32})):
        report = hb.export_model(
            made("llama", quantize, **overrides), tmp_path / "out", format="gguf", overwrite=True, progress=False
        )
        assert [check.passed for check in report.checks] == [True, None]


def test_reader_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)

    def died(*unused: Any) -> Tensor:
        raise llama_cpp.TooOldError("llama.cpp ended with code 1: invalid ggml type 42")

    monkeypatch.setattr(llama_cpp, "logits", died)
    report = hb.export_model(made("llama"), tmp_path / "out", format="gguf", progress=False)
    assert report.checks[1].passed is None and "--upgrade" in report.checks[1].detail

    def crashed(*unused: Any) -> Tensor:
        raise RuntimeError("llama.cpp ended with code -4: it said nothing")

    monkeypatch.setattr(llama_cpp, "logits", crashed)
    with pytest.raises(hb.export.ParityError, match=r"llama\.cpp ended with code -4"):
        hb.export_model(made("llama"), tmp_path / "not", format="gguf", progress=False)
    monkeypatch.setattr(llama_cpp, "logits", lambda *unused: torch.zeros(1, 24, 96))
    with pytest.raises(hb.export.ParityError, match=r"llama\.cpp, logits: relative error 1 of its own rounding"):
        hb.export_model(made("llama"), tmp_path / "not", format="gguf", progress=False)


def test_rounding_of_inputs() -> None:
    """Written again from ggml: one scale for 32 numbers, in half precision, or for 256."""
    x = torch.randn(3, 512)
    for name, length in (("Q4_0", 32), ("TQ2_0", 256)):
        found = parity.rounded_input(x, KINDS[name])
        block = x[1, length : 2 * length]
        d = block.abs().max() / 127
        q = (block / d).round()
        assert torch.allclose(found[1, length : 2 * length], q * (d.half().float() if length == 32 else d), rtol=1e-6, atol=0)
    assert torch.equal(parity.rounded_input(x, KINDS["F16"]), x.half().float())
    assert not parity.rounded_input(torch.zeros(1, 256), KINDS["Q2_K"]).any()
    assert math.isnan(parity.relative_error(torch.zeros(1, 2), torch.zeros(1, 3)))


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"need the package gguf: pip install 'hf_bitnet\[gguf\]'"):
        hb.export_model(made("llama"), tmp_path / "out", format="gguf", progress=False)
    assert not any(tmp_path.iterdir())


def test_export_leaves_the_model_alone(tmp_path: Path) -> None:
    model: nn.Module = made("llama", {"weight": "ternary", "form": "packed"}).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = written(model, tmp_path / "model.gguf")
    parity.References(Source(model, None, ""), plan)  # type: ignore[arg-type]
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_tokenizers_that_llama_cpp_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format 'gguf' cannot hold this model: .*tokenizer"):
        hb.export_model(made("llama"), tmp_path / "out", format="gguf", tokenizer=corpus.tokenizer())
    assert not any(tmp_path.iterdir())
