"""The command line: exit codes, what is printed where, wrong command lines; presets, train and demo."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

import hf_bitnet as hb
from hf_bitnet.cli.options import PRESETS, quantization_fields
from hf_bitnet.cli.parsers import build_parser
from tests.command_line import Captured, run, save_base, windows

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = (
    *("quantize", "train", "eval", "analyze", "export", "push", "info", "chat", "bench", "presets", "demo", "completion"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("base"))
    (folder / "report.html").write_text("")
    return folder


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


def test_commands_that_train_nothing_load_no_trainer() -> None:
    modules = " ".join(f"hf_bitnet.cli.{name}" for name in COMMANDS if name not in ("train", "presets", "demo"))
    script = f"import importlib, sys; [importlib.import_module(name) for name in '{modules}'.split()]; "
    script += "assert not {'hf_bitnet.training', 'transformers.trainer', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_version(capsys: Captured) -> None:
    assert run(capsys, "--version")[:2] == (0, f"hf-bitnet {hb.__version__}\n")


def test_exit_codes_are_in_the_help(capsys: Captured) -> None:
    _, out, _ = run(capsys, "--help")
    assert [line.split()[0] for line in out.split("exit codes:\n")[1].splitlines()] == ["0", "1", "2", "3"]


def test_json_has_no_nan(base: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_bitnet.cli.eval.perplexity", lambda *unused, **options: float("inf"))
    code, out, _ = run(capsys, "eval", base, "--text", base / "valid.txt", "--length", 16, "--json")
    assert code == 1 and "Infinity" not in out and json.loads(out)["perplexity"] is None


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
        (["eval", "model", "--tasks", " ,"], "--tasks ' ,' names none; for example --tasks hellaswag,arc_easy"),
        (["eval", "model", "--text", "t", "--limit", "3"], "--limit without --tasks; add --tasks NAME"),
        (["quantize", "{base}"], "where to? Give a folder: hf-bitnet quantize MODEL OUT"),
        (["quantize", "{base}", "o", "--weight", "tenary"], "unknown weight scheme 'tenary'; legal: 'binary', "),
        (["quantize", "{base}", "o", "--override", "k_proj"], "'k_proj' is not REGEX=CHANGE"),
        (["quantize", "{base}", "o", "--override", "k_proj=kep"], "overrides['k_proj'] is 'kep'; legal: 'keep' or a dict"),
        (["quantize", "{base}", "o", "--dtype", "float99"], "--dtype float99 is no dtype"),
        (["quantize", "{base}", "o", "--fit", "gptq"], "--fit gptq needs text: --fit-file train.txt"),
        (["quantize", "{base}", "o", "--activation", "int8_static"], "int8_static activations are packed with ranges that are"),
        (
            ["quantize", "{base}", "o", "--override", "k_proj=activation:int8_static"],
            "found on text: --fit-file train.txt (or --fo",
        ),
        (["quantize", "{base}", "o", "--granularity", "group"], "group"),
        (["eval", "{base}", "--text", "t", "--length", "0"], "must be at least 1, got 0"),
        (["export", "{base}", "o"], "in which format? hf-bitnet export MODEL OUT --format NAME (--list shows them)"),
        (["export", "{base}", "--format", "dense"], "which model, where to, in which format?"),
        (["export", "{base}", "o", "--format", "gguff"], "unknown export format 'gguff'; legal: "),
        (["export", "{base}", "o", "--format", "dense", "--set", "dtype"], "--set dtype: write NAME=VALUE"),
        (
            ["export", "{base}", "o", "--format", "dense", "--set", "dtyp=int8"],
            "no option 'dtyp'; format 'dense' has dtype, max_",
        ),
        (
            ["export", "{base}", "o", "--format", "dense", "--set", "dtype=int8"],
            "dtype='int8'; legal: bfloat16, float16, float32",
        ),
        (
            ["export", "{base}", "o", "--format", "dense", "--set", "onnx.dtype=int8"],
            "--format does not name 'onnx'; it names dense",
        ),
        (["export", "{base}", "o", "--format", "dense", "--verify", "logits"], "invalid choice: 'logits'"),
        (["push", "{base}"], "the following arguments are required: REPO_ID"),
        (
            ["analyze", "{base}", "--out", "report.pdf"],
            "--out report.pdf: end it on .html (page), .svg (chart) or .json (data)",
        ),
        (["analyze", "{base}", "--to", "int3"], "--to: unknown weight scheme 'int3'"),
        (["analyze", "{base}", "--weight", "tenary"], "unknown weight scheme 'tenary'"),
        (["chat", "{base}", "--json"], "--json is for one answer; add --prompt TEXT"),
        (["chat", "{base}", "--system", "s", "--prompt", "ba"], "--system needs a chat template, and the tokenizer of "),
        (["chat", "{base}", "--device", "gpu", "--prompt", "ba"], "--device gpu is no device; for example cpu, cuda"),
        (["bench", "{base}", "--new-tokens", "1"], "--new-tokens must be at least 2"),
        (
            ["bench", "{base}"],
            "has positions for 64 tokens, --prompt-tokens and --new-tokens ask for 192; for example --prompt-tokens 48",
        ),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
        (["train", "{base}", "o"], "which text? Give --train-file and --validation-file, or --dataset"),
        (["train", "{base}", "o", "--set", "lerning_rate=1"], "no field 'lerning_rate'; did you mean learning_rate?"),
        (["train", "{base}", "o", "--set", "learning_rate"], "write NAME=VALUE"),
        (["train", "{base}", "o", "--set", "learning_rate=fast"], "invalid float value: 'fast'"),
        (["train", "{base}", "o", "--set", "quantization_schedule=liner"], "unknown ramp 'liner'; legal: 'none', 'linear'"),
        (["train", "{base}", "o", "--training-preset", "w4a9"], "unknown training preset 'w4a9'; legal: 'scratch_b158', "),
        (["train", "{base}", "o", "--resume", "--force"], "not allowed with argument --resume"),
        (["train", "{base}", "o", "--min-coverage", "1.5"], "must be 0 to 1, got 1.5"),
        (["chat", "{base}", "--temperature", "-1"], "must be 0 to inf, got -1"),
        (["chat", "{base}", "--top-p", "2"], "must be 0 to 1, got 2"),
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
        (["eval", "{base}", "--tasks", "a", "--task-folder", "nosuch"], "there is no folder 'nosuch' with tasks"),
        (["info", "nosuch/model"], "nosuch/model"),
        (["info", "{base}/valid.txt"], "valid.txt is no GGUF file"),
        (["export", "./nosuch", "o", "--format", "dense"], "there is no folder './nosuch'"),
        (["export", "{base}", "o", "--format", "dense"], "is not quantized; quantize it first: "),
        (["export", "{base}", "{base}/inside", "--format", "dense"], "overlap; choose another folder"),
        (["export", "{base}", "{base}", "--format", "dense"], "is not empty; choose another one, or replace it: --force"),
        (["push", "./nosuch", "me/model"], "there is no folder './nosuch'; hf-bitnet quantize, train and export make one"),
        (["analyze", "{base}", "--text", "nosuch.txt"], "cannot read the text file 'nosuch.txt'"),
        (["analyze", "{base}", "--out", "{base}/report.html"], "is there already; choose another name, or replace it: --force"),
        (["chat", "nosuch/model", "--prompt", "ba"], "nosuch/model"),
        (["chat", "{base}", "--prompt", "ba " * 70], "the prompt has 70 tokens, LlamaForCausalLM has positions for 64"),
        (["chat", "{base}", "--prompt", " "], "the prompt has no token; give some text"),
        (["bench", "./nosuch"], "there is no folder './nosuch'"),
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
    def settings() -> tuple[Any, ...]:
        bars = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
        return transformers_logging.get_verbosity(), bars, list(warnings.filters)

    before = settings()
    assert run(capsys, "info", base)[0] == 0
    assert settings() == before


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
    code, _, err = run(capsys, *words, "--force", "--teacher", str(out / "sefl"))
    assert code == 1 and (out / "packed").is_dir() and json.loads((out / "results.json").read_text()) == results
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
