"""`hf-bitnet eval` and `info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

import hf_bitnet as hb
from tests import corpus
from tests.command_line import Captured, run, save_base, windows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def test_eval(base: Path, tmp_path: Path, capsys: Captured) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    expected = hb.perplexity(model, windows(base)[:9])
    words = ["eval", base, "--text", base / "valid.txt", "--length", 16, "--max-windows", 9]
    code, printed, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert f"perplexity {expected:.4f}   (9 windows of 16 tokens of valid.txt" in printed
    hb.quantize_model(model, hb.BitNetQuantizationConfig(form="packed")).save_pretrained(tmp_path)
    corpus.tokenizer().save_pretrained(tmp_path)
    result = json.loads(run(capsys, *(tmp_path if word is base else word for word in words), "--json")[1])
    assert result["perplexity"] == pytest.approx(hb.perplexity(model, windows(base)[:9]), rel=1e-6)
    assert (result["windows"], result["tokens"], result["text"]) == (9, 144, "valid.txt")
    half = json.loads(run(capsys, *words, "--json", "--bf16")[1])
    assert half["perplexity"] != expected and half["perplexity"] == pytest.approx(expected, rel=0.05)


def test_info_of_models(base: Path, tmp_path: Path, capsys: Captured) -> None:
    code, printed, err = run(capsys, "info", base)
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM, not quantized by hf_bitnet" in printed and "not quantized yet" in printed
    model = hb.quantize_model(tf.AutoModelForCausalLM.from_pretrained(base), hb.BitNetQuantizationConfig.w8a8(form="packed"))
    model.save_pretrained(tmp_path)
    code, printed, _ = run(capsys, "info", tmp_path)
    assert "LlamaForCausalLM, packed: BitNetQuantizationConfig(weight='int8', granularity='channel', form='packed')" in printed
    assert str(hb.coverage(model)) in printed
    result = json.loads(run(capsys, "info", tmp_path, "--json")[1])
    assert (result["form"], result["class"]) == ("packed", "LlamaForCausalLM")
    assert result["coverage"] == hb.coverage(model).to_dict()


def test_native_checkpoints(base: Path, tmp_path: Path, capsys: Captured) -> None:
    model = hb.quantize_model(tf.AutoModelForCausalLM.from_pretrained(base), hb.BitNetQuantizationConfig.bitnet_b158())
    hb.export_native(model, tmp_path)
    corpus.tokenizer().save_pretrained(tmp_path)
    assert "hf_bitnet" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    words = ["eval", tmp_path, "--text", base / "valid.txt", "--length", 16, "--json"]
    result = json.loads(run(capsys, *words)[1])
    assert result["perplexity"] == pytest.approx(hb.perplexity(model, windows(base)), rel=1e-4)
    code, printed, err = run(capsys, "info", tmp_path)
    assert (code, err) == (0, "") and "90.0% of the linear weights quantized" in printed


def test_info_of_the_installation(capsys: Captured) -> None:
    code, printed, _ = run(capsys, "info")
    assert code == 0 and f"torch {torch.__version__.split('+')[0]}" in printed
    code, printed, _ = run(capsys, "info", "--kernels", "--json")
    from hf_bitnet import kernels

    assert json.loads(printed)["kernels"] == kernels.explain().splitlines()
