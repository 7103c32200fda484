"""llama.cpp runs the files, and finds the logits that its own rounding of activations leaves of our codes and scales.

Where no number of an activation lies so close between two 8-bit steps that the order of a sum decides, the two agree to 1e-5;
so each test asks that of one position at least, which no wrong angle, scale, norm or row would leave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_bitnet as hb
from hf_bitnet.export import Source
from hf_bitnet.export.gguf import llama_cpp, parity, planning
from hf_bitnet.export.gguf.kinds import KINDS, PREFERENCE
from hf_bitnet.export.gguf.writing import write_file
from tests.gguf_models import made

pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
# not importorskip: the package opens files that it never closes
_without = pytest.mark.skipif(not llama_cpp.is_installed(), reason="needs llama.cpp: pip install llama-cpp-python")
pytestmark = [pytest.mark.slow, _without]
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(32)],
    "long_factor": [2.0 + 0.1 * i for i in range(32)],
    "original_max_position_embeddings": 512,
    "factor": 8.0,
}
_SUB_NORMS = {"weight": "ternary", "sub_norm": ["o_proj", "down_proj"], "sub_norm_eps": 1e-6}


def check(model: Any, path: Path, kind: str | None = None, other: str = "F32") -> planning.Plan:
    """That the file holds the model's values and llama.cpp computes its logits."""
    source = Source(model, None, "tiny")
    assert not planning.refusals(source, "llama.cpp")
    plan = planning.plan_of(source, "llama.cpp", planning.choices(source, kind, PREFERENCE), KINDS[other])
    write_file(path, source, plan, lambda weights: None)
    assert parity.compare_values(path, plan).passed
    wanted = parity.References(source, plan)
    found = llama_cpp.logits(path, wanted.ids)
    assert parity.relative_error(found, wanted.target) <= parity.LIMIT
    # numbers of half precision, GELU's among them, are rounded at many ties, those of 8 bits at few
    assert errors(found, wanted.target).min() <= (1e-3 if kind in ("F16", "F32") else 1e-5)
    return plan


def errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each position."""
    return (found - wanted).square().mean(dim=-1).sqrt() / wanted.std()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 32, "tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}}),
        ("llama", {"rope_parameters": _LINEAR}),
        ("llama", {"rope_parameters": _YARN}),
        ("llama", {"rope_parameters": {**_YARN, "attention_factor": 1.5}}),
        ("mistral", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen2", {"rope_parameters": {**_YARN, "attention_factor": 1.5}}),
        ("qwen3", {}),
        ("qwen3", {"rope_parameters": _YARN}),
        ("gemma3", {}),
        ("gemma3", {"num_hidden_layers": 7, "layer_types": None}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gemma3", {"layer_types": ["full_attention", "full_attention"], "final_logit_softcapping": 2.0}),
        ("gemma3", {"rope_parameters": _GEMMA_ROPES}),
        ("gemma3", {"query_pre_attn_scalar": 40}),
        ("phi3", {}),
        ("phi3", {"rope_parameters": _PARTIAL}),
        ("phi3", {"rope_parameters": _LONG, "max_position_embeddings": 4096, "original_max_position_embeddings": 512}),
        ("bitnet", {}),
    ],
)
def test_architectures(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    check(made(family, **overrides), tmp_path / "model.gguf")


def test_gemma_with_the_layers_of_its_27b(tmp_path: Path) -> None:
    """By which llama.cpp chooses another scale of attention; weights are floats here, so that nothing is rounded on the way."""
    sizes = {"num_hidden_layers": 62, "hidden_size": 128, "intermediate_size": 128, "layer_types": None}
    check(made("gemma3", query_pre_attn_scalar=168, **sizes), tmp_path / "model.gguf", "F32")


@pytest.mark.parametrize(
    ("scheme", "granularity", "group", "kind"),
    [
        ("ternary", "tensor", None, "TQ2_0"),
        ("ternary", "channel", None, "TQ2_0"),
        ("ternary", "group", 256, "TQ2_0"),
        ("ternary", "tensor", None, "TQ1_0"),
        ("ternary", "group", 64, "Q2_0"),
        ("ternary", "group", 32, "Q4_0"),
        ("ternary", "group", 16, "F16"),
        ("ternary", "channel", None, "Q2_K"),
        ("ternary", "channel", None, "Q8_0"),
        ("binary", "channel", None, "Q1_0"),
        ("binary", "group", 128, "Q1_0"),
        ("binary", "group", 64, "Q2_0"),
        ("int2", "channel", None, "Q2_K"),
        ("int2", "channel", None, "Q2_0"),
        ("int2", "group", 32, "Q4_0"),
        ("int2_seq", "channel", None, "Q2_K"),
        ("int2_seq", "group", 32, "Q4_0"),
        ("int2_seq", "group", 16, "F32"),
        ("int4", "tensor", None, "Q4_0"),
        ("int4", "group", 32, "Q4_0"),
        ("int8", "channel", None, "Q8_0"),
        ("int8", "group", 64, "Q8_0"),
    ],
)
def test_kinds(tmp_path: Path, scheme: str, granularity: str, group: int | None, kind: str) -> None:
    quantize: dict[str, Any] = {"weight": scheme, "granularity": granularity, "form": "packed"}
    model = made("llama", quantize if group is None else quantize | {"group_size": group})
    plan = check(model, tmp_path / "model.gguf", kind, "F16")
    assert plan.main_kind.name == kind


@pytest.mark.parametrize("embeddings", ["int8", "int4", "ternary"])
@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_heads(tmp_path: Path, embeddings: str, tied: bool) -> None:
    quantize = {"weight": "ternary", "embeddings": embeddings} | ({} if tied else {"output_head": "int8"})
    plan = check(made("qwen3", quantize, tie_word_embeddings=tied), tmp_path / "model.gguf")
    assert any(entry.stored == "output.weight" for entry in plan.entries) is not tied


def test_our_norms_make_a_bitnet(tmp_path: Path) -> None:
    model = made("llama", _SUB_NORMS, tie_word_embeddings=True)
    hb.set_norm_blend(model, 1.0)
    for name, parameter in model.named_parameters():
        if "sub_norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    assert check(model, tmp_path / "model.gguf").architecture.name == "bitnet"


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_readers_of_transformers(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reader, where llama.cpp is not installed."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    report = hb.export_model(made(family), tmp_path / "out", format="gguf", progress=False)
    assert [check.passed for check in report.checks] == [True, None, True]


def test_perplexity_of_a_trained_model(tmp_path: Path, shared_dir: Path) -> None:
    """novels-llama in ternary, as it comes out of quantization: the same perplexity within 1 %, and the same next tokens."""
    import transformers as tf

    folder = shared_dir / "models" / "novels-llama"
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hb.quantize_model(model, hb.BitNetQuantizationConfig(weight="ternary", weight_scale="threshold"), progress=False)
    report = hb.export_model(model, tmp_path / "out", format="gguf", progress=False)
    assert report.kinds()["TQ2_0"] == 42 and all(check.passed for check in report.checks)
    text = (shared_dir / "data" / "novels" / "valid.txt").read_text(encoding="utf-8")[:20000]
    ids = torch.tensor(tokenizer(text)["input_ids"][: 8 * 256]).view(8, 256)
    found = llama_cpp.logits(tmp_path / "out" / "model.gguf", ids)
    with torch.no_grad():
        ours = model(input_ids=ids).logits
    theirs, own = (perplexity(each, ids) for each in (found, ours))
    print(f"perplexity: llama.cpp {theirs:.3f}, hf_bitnet {own:.3f}; {report.checks[1].detail}")
    assert abs(theirs / own - 1) <= 0.01
    assert (found.argmax(dim=-1) == ours.argmax(dim=-1)).float().mean() >= 0.97


def perplexity(logits: Tensor, ids: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())
