"""Comparing what was read back: both sides compute alike, and a model that nobody here can run is not called different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.export import Check, ParityError, Source, plain, running
from hf_bitnet.surgery import independent_copy
from tests.tiny import tiny

_BERT = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def quantized(model: Any) -> Any:
    return hb.quantize_model(model, hb.BitNetQuantizationConfig())


def last_check(model: Any, folder: Path, format: str = "dense", **options: Any) -> Check:
    return hb.export_model(model, folder, format=format, progress=False, **options).checks[-1]


def run_here(folder: Path, kind: str, inputs: Any, dtype: torch.dtype, with_library: bool = False, **options: Any) -> Any:
    """In place of another process."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = getattr(tf, kind).from_pretrained(folder, dtype=dtype, **options)(**inputs)
    return {name: each.float() for name, each in output.items() if isinstance(each, Tensor)}


@pytest.mark.parametrize("format", ["dense", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hf_bitnet", "bitnet"))])
def test_the_attention_of_the_model_is_not_the_readers(tmp_path: Path, format: str) -> None:
    """In bfloat16 sums in another order are another number; the model's own choice stays what it was."""
    model = quantized(tiny("llama")[0]).bfloat16()
    model.set_attn_implementation("eager")
    check = last_check(model, tmp_path / "out", format)
    assert check.passed and check.detail.startswith("relative error 0,")
    assert model.config._attn_implementation == "eager"


def test_the_experts_of_the_model_are_not_the_readers(tmp_path: Path) -> None:
    model = quantized(tiny("mixtral")[0]).bfloat16()
    model.set_experts_implementation("eager")
    check = last_check(model, tmp_path / "out")
    assert check.passed and check.detail.startswith("relative error 0,")
    assert model.config._experts_implementation == "eager"


def test_the_reader_gets_the_attention_of_the_copy() -> None:
    """A model whose config asks for the attentions has no other way to compute than "eager"."""
    for wanted, output_attentions in (("sdpa", False), ("eager", True)):
        model: Any = tiny("llama")[0]
        model.set_attn_implementation("eager")
        model.config.output_attentions = output_attentions
        assert running.reader_options(running.as_loaded(model)) == {"attn_implementation": wanted}


def test_a_copy_for_the_cpu_shares_what_is_there_already() -> None:
    """And parameters that are tied stay tied."""
    model: Any = tiny("qwen3")[0]
    shared = {id(each): each for each in model.parameters()}
    twin: Any = running.as_loaded(independent_copy(model, shared))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is model.lm_head.weight


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (tf.BertForQuestionAnswering, ["start_logits", "end_logits"]),
        (tf.BertForPreTraining, ["prediction_logits", "seq_relationship_logits"]),
        (tf.BertModel, ["last_hidden_state", "pooler_output"]),
    ],
)
def test_every_output_is_compared(tmp_path: Path, kind: Any, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(kind(tf.BertConfig(**_BERT)).eval())
    check = last_check(model, tmp_path / "out")
    assert check.passed and check.what == ", ".join(names)

    def last_is_off(*given: Any, **options: Any) -> dict[str, Tensor]:
        found = run_here(*given, **options)
        return found | {names[-1]: found[names[-1]] + 0.01}

    monkeypatch.setattr(plain, "run_plain", last_is_off)
    with pytest.raises(ParityError, match=f"relative error .* in {names[-1]}, limit"):
        last_check(model, tmp_path / "other")


class Mine(tf.LlamaForCausalLM):
    """A class that no other program has."""


class LlamaModel(tf.LlamaModel):
    """One by the name of another."""


class Broken(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("needs a kernel that is not here")


def test_what_cannot_be_run_is_not_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("llama")[0].config
    for kind in (Mine, LlamaModel):
        check = last_check(quantized(kind(config).eval()), tmp_path / kind.__name__)
        assert (check.passed, check.detail) == (None, f"{kind.__name__} is no class of transformers, which has to know it")
    model = quantized(tiny("llama")[0])
    model.model.norm = Broken()
    check = last_check(model, tmp_path / "broken")
    assert check.passed is None
    assert check.detail == "the model itself cannot be run on the CPU: RuntimeError: needs a kernel that is not here"
    model = quantized(tiny("llama")[0])
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    check = last_check(model, tmp_path / "nan", dtype="float32")
    assert (check.passed, check.detail) == (None, "the model itself computes NaN as logits in float32")


def test_a_reader_that_fails_is_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model itself runs."""

    def fails(*given: Any, **options: Any) -> Any:
        raise RuntimeError("tensors that do not fit: ['a']")

    monkeypatch.setattr(plain, "run_plain", fails)
    with pytest.raises(ParityError, match="tensors that do not fit"):
        last_check(quantized(tiny("llama")[0]), tmp_path / "out")


@pytest.mark.parametrize(("family", "overrides"), [("gpt2", {"n_positions": 16}), ("whisper", {"max_target_positions": 5})])
def test_the_probe_fits_the_positions(tmp_path: Path, family: str, overrides: dict[str, int]) -> None:
    assert last_check(quantized(tiny(family, **overrides)[0]), tmp_path / "out").passed


def test_outputs_of_another_shape_or_all_zero() -> None:
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    assert plain.compare_logits("r", zeros, zeros, 1e-4).passed
    assert plain.compare_logits("r", ones, zeros, 1e-4).passed is False
    assert plain.compare_logits("r", torch.ones(1, 1), ones, 1e-4).passed is False
    assert plain.compare_outputs("r", {"a": ones}, {"b": ones}, 1e-4).detail == "it returns a instead of b"


def test_modes_stay_as_they_were(tmp_path: Path) -> None:
    """Of every module: a part that was frozen in eval mode is not put into train mode."""
    model: Any = quantized(tiny("llama")[0]).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    for format in ("gguf", "dense"):
        last_check(model, tmp_path / format, format)
        assert {name: module.training for name, module in model.named_modules()} == before


def test_a_model_that_nobody_can_feed(tmp_path: Path) -> None:
    model: Any = quantized(tiny("llama")[0])

    def has_none() -> Any:
        raise RuntimeError("there is no table")

    model.get_input_embeddings = has_none
    assert Source(model, None, "").inputs() is None
    assert plain.plain_logits(Source(model, None, ""), tmp_path, torch.float32).passed is None
