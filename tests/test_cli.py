"""The command line, run in this process: results, exit codes, what is printed where, what is written."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from transformers.utils import logging as transformers_logging

import hf_bitnet as hb
from hf_bitnet.cli import main
from hf_bitnet.cli.options import PRESETS, quantization_fields
from hf_bitnet.cli.parsers import build_parser
from tests import corpus
from tests.tiny import tiny

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = ("quantize", "train", "eval", "info", "presets", "demo")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with tokenizer, and two texts beside it."""
    folder = tmp_path_factory.mktemp("base")
    tiny("llama")[0].save_pretrained(folder)
    corpus.tokenizer().save_pretrained(folder)
    corpus.write(folder, 800, seed=1, name="train.txt")
    corpus.write(folder, 400, seed=2, name="valid.txt")
    return folder


def run(capsys: Captured, *words: Any) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def windows(base: Path) -> torch.Tensor:
    return hb.text_windows(corpus.tokenizer(), base / "valid.txt", 16)


# ---- the front ----


def test_help_of_everything_has_examples(capsys: Captured) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"examples:\n  hf-bitnet {name}" in out


def test_help_and_wrong_command_lines_load_nothing_heavy() -> None:
    script = "import sys; from hf_bitnet.cli import main; {}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    calls = "assert main(['--help']) == 0; assert main(['train', '--help']) == 0; assert main(['eval']) == 2"
    done = subprocess.run(
        [sys.executable, "-c", script.format(calls)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_version(capsys: Captured) -> None:
    assert run(capsys, "--version")[:2] == (0, f"hf-bitnet {hb.__version__}\n")


def test_no_command_shows_the_commands(capsys: Captured) -> None:
    code, out, _ = run(capsys)
    assert code == 2 and "commands:" in out


def test_presets_are_those_of_the_config() -> None:
    made = {name for name, value in vars(hb.BitNetQuantizationConfig).items() if isinstance(value, classmethod)}
    assert set(PRESETS) == {name for name in made if not name.startswith("_")} - {"from_dict"}


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--preset", "w4a8"], {}),
        (["--weight", "int4", "--group-size", "16"], {"weight": "int4", "group_size": 16}),
        (["--keep", "a", "--keep", "b"], {"keep": ["a", "b"]}),
        (["--sub-norm", "o_proj", "--min-coverage", "0.5"], {"sub_norm": ["o_proj"], "min_coverage": 0.5}),
        (
            ["--embeddings", "weight:int4,group_size:16", "--output-head", "int8"],
            {"embeddings": {"weight": "int4", "group_size": 16}, "output_head": "int8"},
        ),
        (
            ["--override", "k_proj=keep", "--override", "a=b=weight:int4,group_size:16,sub_norm:true"],
            {"overrides": {"k_proj": "keep", "a=b": {"weight": "int4", "group_size": 16, "sub_norm": True}}},
        ),
    ],
)
def test_quantization_options(words: list[str], fields: dict[str, Any]) -> None:
    assert quantization_fields(build_parser("x", "1").parse_args(["quantize", "m", "o", *words])) == fields


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["eval"], "the following arguments are required: MODEL"),
        (
            ["eval", "model"],
            "on what? Give --text valid.txt for perplexity, --tasks hellaswag,... for tasks of lm-eval, or both",
        ),
        (["eval", "model", "--text", "t", "--limit", "3"], "--limit without --tasks; add --tasks NAME"),
        (["quantize", "{base}"], "where to? Give a folder: hf-bitnet quantize MODEL OUT"),
        (["quantize", "{base}", "o", "--weight", "tenary"], "unknown weight scheme 'tenary'; legal: 'binary', "),
        (["quantize", "{base}", "o", "--override", "k_proj"], "'k_proj' is not REGEX=CHANGE"),
        (["quantize", "{base}", "o", "--override", "k_proj=kep"], "overrides['k_proj'] is 'kep'; legal: 'keep' or a dict"),
        (["quantize", "{base}", "o", "--dtype", "float99"], "--dtype float99 is no dtype"),
        (["quantize", "{base}", "o", "--fit", "gptq"], "--fit gptq needs text: --fit-file train.txt"),
        (["quantize", "{base}", "o", "--fit-file", "a.txt"], "--fit-file without --fit; add --fit gptq"),
        (["quantize", "{base}", "o", "--granularity", "group"], "group"),
        (["eval", "{base}", "--text", "t", "--length", "0"], "must be at least 1, got 0"),
        (["train", "{base}", "o"], "which text? Give --train-file and --validation-file, or --dataset"),
        (["train", "{base}", "o", "--set", "lerning_rate=1"], "no field 'lerning_rate'; did you mean learning_rate?"),
        (["train", "{base}", "o", "--set", "learning_rate"], "write NAME=VALUE"),
        (["train", "{base}", "o", "--set", "learning_rate=fast"], "invalid float value: 'fast'"),
        (["train", "{base}", "o", "--set", "quantization_schedule=liner"], "unknown ramp 'liner'; legal: 'none', 'linear'"),
        (["train", "{base}", "o", "--training-preset", "w4a9"], "unknown training preset 'w4a9'; legal: 'scratch_b158', "),
        (["train", "{base}", "o", "--resume", "--force"], "not allowed with argument --resume"),
    ],
)
def test_wrong_command_line_is_exit_2(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *(word.format(base=base) for word in words))
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "./nosuch", "o"], "there is no folder './nosuch'"),
        (["quantize", "{base}", "o", "--fit", "gtpq", "--fit-file", "a.txt"], "Did you mean 'gptq'"),
        (["quantize", "{base}", "o", "--fit", "gptq", "--fit-file", "nosuch.txt"], "nosuch.txt"),
        (["quantize", "{base}", "{base}"], "is not empty; choose another one, or replace it: --force"),
        (["quantize", "{base}", "o", "--min-coverage", "0.99"], "min_coverage asks for 99.0%"),
        (["quantize", "{base}", "o", "--keep", "."], "no layer of LlamaForCausalLM would be quantized"),
        (["eval", "{base}", "--text", "nosuch.txt"], "cannot read the text file 'nosuch.txt'"),
        (["eval", "{base}", "--text", "{base}/valid.txt", "--length", "300"], "LlamaForCausalLM has positions for 64"),
        (["info", "nosuch/model"], "nosuch/model"),
        (["train", "{base}", "o", "--train-file", "x", "--validation-file", "y"], "cannot read the text file 'x'"),
    ],
)
def test_failure_is_exit_1_and_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *(word.format(base=base) for word in words))
    assert (code, out) == (1, "")
    assert err.startswith(f"hf-bitnet {words[0]}: error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(capsys: Captured) -> None:
    code, _, err = run(capsys, "quantize", "./nosuch", "o", "--debug")
    assert code == 1 and "Traceback" in err and "there is no folder './nosuch'" in err


def test_unexpected_errors_name_their_kind(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_bitnet.kernels.explain", lambda device: {}["x"])
    code, _, err = run(capsys, "info", "--kernels")
    assert (code, err) == (1, "hf-bitnet info: error: KeyError: 'x' (--debug shows where)\n")


def test_interrupted(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(device: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_bitnet.kernels.explain", interrupt)
    assert run(capsys, "info", "--kernels") == (1, "", "hf-bitnet info: error: interrupted\n")


def test_settings_of_the_process_are_restored(capsys: Captured, base: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(), list(warnings.filters)
    assert run(capsys, "info", base)[0] == 0
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(), list(warnings.filters)
    assert before == after


# ---- quantize ----


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


# ---- eval and info ----


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


# ---- train and demo ----


def test_train(base: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    words = ["train", base, out, "--train-file", base / "train.txt", "--validation-file", base / "valid.txt", "--length", 16]
    words += ["--max-train-tokens", 256, "--learning-rate", 2e-3, "--set", "use_cpu=true", "--set", "logging_steps=1"]
    code, printed, err = run(capsys, *words)
    assert code == 0
    results = json.loads((out / "results.json").read_text())
    for value in results["perplexity"].values():
        assert f"perplexity {value:.2f}" in printed
    assert "step 1/2" in err and "step 1/2" not in printed and "Loading weights" not in err
    assert results["training"]["learning_rate"] == 2e-3 and results["training"]["tokens"] == 256
    saved = tf.AutoModelForCausalLM.from_pretrained(out / "packed")
    assert hb.perplexity(saved, windows(base)) == pytest.approx(results["perplexity"]["packed"], rel=1e-6)
    code, _, err = run(capsys, *words)
    assert code == 1 and "continue that run (--resume), or replace it (--force)" in err
    code, printed, _ = run(capsys, *words, "--resume", "--json")
    assert code == 0 and json.loads(printed)["perplexity"] == results["perplexity"]


def test_train_settings_are_those_of_the_recipe(base: Path) -> None:
    from hf_bitnet.cli import train

    arguments = build_parser("x", "1").parse_args(["train", str(base), "out", "--epochs", "2", "--set", "adam_beta1=0.8"])
    training = train._training(arguments)
    expected = {**hb.CONVERSION_DEFAULTS, "num_train_epochs": 2, "adam_beta1": 0.8}
    assert {name: getattr(training, name) for name in expected} == expected


def test_demo(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run_demo(output: Path, *, quick: bool) -> dict[str, int]:
        calls.append((output, quick))
        print("a table")
        return {"figure": 1}

    monkeypatch.setattr("hf_bitnet.demo.run_demo", run_demo)
    assert run(capsys, "demo")[:2] == (0, "a table\n")
    code, printed, err = run(capsys, "demo", "--quick", "--output", "there", "--json")
    assert (code, json.loads(printed), err) == (0, {"figure": 1}, "a table\n")
    assert calls == [(Path("demo-output"), False), (Path("there"), True)]
