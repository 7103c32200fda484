"""`hf-bitnet quantize`: what it writes, and what it leaves when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard

import hf_bitnet as hb
from tests import corpus
from tests.command_line import Captured, run, save_base
from tests.tiny import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("form", ["packed", "train"])
def test_quantize(base: Path, tmp_path: Path, capsys: Captured, form: str) -> None:
    out = tmp_path / "out"
    code, printed, err = run(capsys, "quantize", base, out, "--preset", "w4a8", "--keep", "k_proj", "--form", form)
    assert (code, err) == (0, "")
    fields = {"keep": ["k_proj"], "form": form}
    expected = hb.quantize_model(tf.AutoModelForCausalLM.from_pretrained(base), hb.BitNetQuantizationConfig.w4a8(**fields))
    assert str(hb.coverage(expected)) in printed and f"saved {out}" in printed
    saved = tf.AutoModelForCausalLM.from_pretrained(out)
    for (name, ours), (other, theirs) in zip(saved.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs), name
    assert tf.AutoTokenizer.from_pretrained(out)("ba be")["input_ids"] == corpus.tokenizer()("ba be")["input_ids"]
    assert "without any training" in ModelCard.load(out / "README.md").text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["gptq", "least_squares"])
def test_quantize_with_fitted_weights(base: Path, tmp_path: Path, capsys: Captured, method: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ba be bi " * 400)
    words = ["--fit", method, *(["--fit-file", text] if method == "gptq" else []), "--fit-windows", "2"]
    code, printed, err = run(capsys, "quantize", base, tmp_path / "out", *words)
    assert ((code, err) == (0, "") and "mean output error" in printed) or method == "least_squares"
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    length = min(256, tf.AutoConfig.from_pretrained(base).max_position_embeddings)
    batches = [{"input_ids": hb.text_windows(tokenizer, [text], length, max_windows=2)}] if method == "gptq" else None
    expected = hb.quantize_model(tf.AutoModelForCausalLM.from_pretrained(base).float(), hb.BitNetQuantizationConfig())
    hb.fit_weights(expected, batches, method=method)
    saved, expected = tf.AutoModelForCausalLM.from_pretrained(out := tmp_path / "out"), hb.pack_model(expected)
    assert saved.config.quantization_config.form == "packed" and out.is_dir()
    for (name, ours), (other, theirs) in zip(saved.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs.to(ours.dtype)), name


@pytest.mark.parametrize("fit", [None, "gptq"])
@pytest.mark.parametrize("form", ["packed", "train"])
def test_quantize_calibrates(base: Path, tmp_path: Path, capsys: Captured, form: str, fit: str | None) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ba be bi " * 400)
    fields = {"activation": "int8_static", "sub_norm": ["down_proj"]}
    words = ["--activation", "int8_static", "--sub-norm", "down_proj", "--form", form, "--fit-file", text, "--fit-windows", "2"]
    code, _, err = run(capsys, "quantize", base, tmp_path / "out", *words, *([] if fit is None else ["--fit", fit]))
    assert (code, err) == (0, "")
    model = tf.AutoModelForCausalLM.from_pretrained(base).float()
    length = min(256, model.config.max_position_embeddings)
    batches = [{"input_ids": hb.text_windows(tf.AutoTokenizer.from_pretrained(base), [text], length, max_windows=2)}]
    hb.calibrate(hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(**fields)), batches)
    if fit is not None:
        hb.fit_weights(model, batches)
    if form == "packed":
        hb.pack_model(model)
    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert any("act_scale" in name for name in saved) and any("sub_norm" in name for name in saved)
    for name, theirs in model.state_dict().items():
        assert torch.equal(saved[name], theirs.to(saved[name].dtype)), name


def test_quantize_refuses_text_for_nothing(base: Path, tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ba be bi " * 400)
    code, _, err = run(capsys, "quantize", base, tmp_path / "out", "--fit-file", text)
    assert code == 2 and "--fit-file without --fit; add --fit gptq" in err
    assert not (tmp_path / "out").exists()


def test_quantize_json_is_all_of_the_output(base: Path, tmp_path: Path, capsys: Captured) -> None:
    code, printed, _ = run(capsys, "quantize", base, tmp_path / "out", "--json")
    result = json.loads(printed)
    assert code == 0
    assert result["config"]["weight"] == "ternary" and result["config"]["form"] == "packed"
    assert result["coverage"]["fraction_of_linear_weights"] == pytest.approx(0.9)
    assert result["weights_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_quantize_replaces_only_when_told(base: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert run(capsys, "quantize", base, out)[0] == 0
    assert run(capsys, "quantize", base, out, "--weight", "int8")[0] == 1
    assert json.loads(run(capsys, "info", out, "--json")[1])["config"]["weight"] == "ternary"
    assert run(capsys, "quantize", base, out, "--weight", "int8", "--force")[0] == 0
    assert json.loads(run(capsys, "info", out, "--json")[1])["config"]["weight"] == "int8"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("")
    code, _, err = run(capsys, "quantize", base, tmp_path / "precious", "--force")
    assert code == 1 and "holds no model" in err
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_quantize_that_fails_leaves_nothing(
    base: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, card: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_bitnet.cli.quantize.write_card", fail)
    code, _, err = run(capsys, "quantize", base, tmp_path / "out")
    assert code == 1 and "No space left on device" in err
    assert not list(tmp_path.iterdir())


def test_quantize_dry_run_writes_nothing(base: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run(capsys, "quantize", base, "--dry-run", "--activation", "int8_static")
    model = hb.quantize_model(tf.AutoModelForCausalLM.from_pretrained(base), hb.BitNetQuantizationConfig())
    assert (code, printed) == (0, f"{hb.coverage(model)}\n")
    assert not list(tmp_path.iterdir())


def test_quantize_a_model_that_is_not_for_text(tmp_path: Path, capsys: Captured) -> None:
    tiny("vit")[0].save_pretrained(tmp_path / "vit")
    code, _, err = run(capsys, "quantize", tmp_path / "vit", tmp_path / "out", "--preset", "w8a8")
    assert code == 0 and "no tokenizer or processor" in err
    assert type(tf.AutoModelForImageClassification.from_pretrained(tmp_path / "out")).__name__ == "ViTForImageClassification"
