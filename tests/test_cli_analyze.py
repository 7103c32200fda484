"""`hf-bitnet analyze`: the reports of the library, worst first, and overrides that can be typed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest
import transformers as tf

import hf_bitnet as hb
from hf_bitnet.analysis import LayerReport
from hf_bitnet.cli.options import quantization_fields
from hf_bitnet.cli.parsers import build_parser
from hf_bitnet.reports import report_page
from tests import corpus
from tests.command_line import Captured, run, save_base, save_quantized
from tests.tiny import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def expected(base: Path, **fields: Any) -> Any:
    return hb.quantize_model(tf.AutoModelForCausalLM.from_pretrained(base), hb.BitNetQuantizationConfig(**fields))


def test_weights_alone(base: Path, capsys: Captured) -> None:
    code, printed, err = run(capsys, "analyze", base, "--weight", "int4", "--granularity", "channel", "--top", 4)
    assert (code, err) == (0, "")
    report = hb.layer_report(expected(base, weight="int4", granularity="channel"))
    worst = LayerReport(report.worst(), report.total_sqnr)
    assert str(worst).splitlines()[:5] == printed.splitlines()[1:6]
    assert "and 10 more (--top N)" in printed and report.summary() in printed
    assert "suggested by weight quantization error by layer" in printed
    result = json.loads(run(capsys, "analyze", base, "--weight", "int4", "--granularity", "channel", "--json")[1])
    assert list(result["reports"]) == ["weights"] and result["reports"]["weights"] == worst.to_dict()
    assert result["overrides"] == hb.suggest_overrides(report) and result["config"]["weight"] == "int4"


def test_with_text(base: Path, capsys: Captured) -> None:
    words = ["analyze", base, "--text", base / "train.txt", "--max-windows", 5, "--batch-size", 2, "--length", 16]
    words += ["--worst", 2, "--to", "weight:int4,granularity:channel,sub_norm:true", "--max-average-bits", 3]
    code, printed, err = run(capsys, *words)
    assert (code, err) == (0, "")
    model = expected(base)
    windows = hb.text_windows(corpus.tokenizer(), base / "train.txt", 16, max_windows=5)
    batches = [{"input_ids": part} for part in windows.split(2)]
    loss = hb.sensitivity(model, batches)
    assert str(hb.output_report(model, batches)) in printed and str(loss) in printed
    change = {"weight": "int4", "granularity": "channel", "sub_norm": True}
    overrides = hb.suggest_overrides(loss, 2, to=change, max_average_bits=3)
    assert overrides
    # what is printed can be typed
    typed = [word for line in printed.splitlines() if line.startswith("--override") for word in shlex.split(line)]
    assert quantization_fields(build_parser("x", "1").parse_args(["quantize", "m", *typed])) == {"overrides": overrides}
    result = json.loads(run(capsys, *words, "--skip-loss", "--json")[1])
    assert list(result["reports"]) == ["weights", "outputs"]
    assert result["overrides"] == hb.suggest_overrides(hb.output_report(model, batches), 2, to=change, max_average_bits=3)


def test_kept_layers_can_be_typed(base: Path, capsys: Captured) -> None:
    printed = run(capsys, "analyze", base, "--to", "keep", "--worst", 1)[1]
    (line,) = [line for line in printed.splitlines() if line.startswith("--override")]
    assert line.endswith("=keep'")
    code, printed, _ = run(capsys, "analyze", base, "--preset", "w8a8")
    assert code == 0 and "no layer is worth an override" in printed


def test_static_ranges_are_calibrated_on_the_text(base: Path, capsys: Captured) -> None:
    words = ["--activation", "int8_static", "--text", base / "train.txt", "--skip-loss", "--json"]
    result = json.loads(run(capsys, "analyze", base, *words)[1])
    errors = [row["activation_error"] for row in result["reports"]["outputs"]["layers"]]
    assert all(0 < error < 0.2 for error in errors)


def test_models_that_are_quantized_already(base: Path, tmp_path: Path, capsys: Captured) -> None:
    save_quantized(tmp_path / "train", "train", weight="int4")
    code, printed, _ = run(capsys, "analyze", tmp_path / "train", "--text", base / "train.txt", "--skip-loss")
    assert code == 0 and "Output error by layer" in printed and "int4" in printed
    code, _, err = run(capsys, "analyze", tmp_path / "train", "--weight", "int8", "--preset", "w8a8")
    assert code == 2 and "is quantized already, so weight, preset cannot be set; give the full-precision model" in err


def test_packed_models_say_what_is_missing(base: Path, tmp_path: Path, capsys: Captured) -> None:
    save_quantized(tmp_path / "packed")
    code, printed, _ = run(capsys, "analyze", tmp_path / "packed", "--out", tmp_path / "p.html")
    assert code == 0 and "is packed and has no float weights to compare with: scales and shares of zeros are all" in printed
    assert "31.71 %" in printed and "--override" not in printed
    assert "is packed and has no float weights" in (tmp_path / "p.html").read_text()
    for words in (["--text", base / "train.txt"], ["--out", tmp_path / "p.svg"]):
        code, _, err = run(capsys, "analyze", tmp_path / "packed", *words)
        assert code == 1 and "Give the full-precision model (with the same --preset and options)" in err


def test_files(base: Path, tmp_path: Path, capsys: Captured) -> None:
    for kind in ("html", "svg", "json"):
        out = tmp_path / "new" / f"report.{kind}"
        words = ["analyze", base, "--text", base / "train.txt", "--skip-loss", "--out", out]
        code, printed, _ = run(capsys, *words)
        assert code == 0 and f"wrote {out}" in printed
        text = out.read_text()
        code, _, err = run(capsys, *words)
        assert code == 1 and "replace it: --force" in err and out.read_text() == text
        assert run(capsys, *words, "--force")[0] == 0
        if kind == "svg":
            assert "Output error by layer" in text and minidom.parseString(text)
        if kind == "json":
            assert list(json.loads(text)["reports"]) == ["weights", "outputs"]
        if kind == "html":
            assert text.count("<svg") == text.count("<table>") == 2 and "=weight:int8" in text
            # the one address is the name of SVG
            assert "<script" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_page_escapes_names() -> None:
    report = hb.layer_report(hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig()))
    page = report_page("a <b>", [report], [("x & y", "<script>")])
    assert "a &lt;b&gt;" in page and "x &amp; y" in page and "<script>" not in page


def test_a_model_that_is_not_for_text(tmp_path: Path, capsys: Captured) -> None:
    tiny("vit")[0].save_pretrained(tmp_path)
    code, printed, _ = run(capsys, "analyze", tmp_path, "--preset", "w2a8")
    assert code == 0 and "vit" in printed
