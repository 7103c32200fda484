"""`hf-bitnet eval` and `info`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_bitnet as hb
from hf_bitnet.cli import harness
from tests import corpus
from tests.command_line import Captured, run, save_base, save_quantized, windows


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


def test_eval_against_a_reference(base: Path, tmp_path: Path, capsys: Captured) -> None:
    save_quantized(tmp_path / "packed")
    words = ["eval", tmp_path / "packed", "--text", base / "valid.txt", "--length", 16, "--against", base]
    code, printed, err = run(capsys, *words)
    assert (code, err) == (0, "")
    before, after = (hb.perplexity(hb.open_model(path), windows(base)) for path in (base, tmp_path / "packed"))
    assert f"{base}: perplexity {before:.4f}" in printed and f"{tmp_path / 'packed'}: perplexity {after:.4f}" in printed
    assert f"perplexity x {after / before:.4f} of {base}" in printed
    result = json.loads(run(capsys, *words, "--json")[1])
    assert result["perplexity_ratio"] == pytest.approx(after / before, rel=1e-6)
    assert result["against"]["perplexity"] == pytest.approx(before, rel=1e-6) and result["against"]["model"] == str(base)


def test_eval_compares_the_same_tokens(base: Path, tmp_path: Path, capsys: Captured) -> None:
    save_quantized(tmp_path)
    made = Tokenizer(models.WordLevel({"<pad>": 0, "ba": 7}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>").save_pretrained(tmp_path)
    code, _, err = run(capsys, "eval", base, "--text", base / "valid.txt", "--length", 16, "--against", tmp_path)
    assert code == 1 and "has another tokenizer than" in err and "give the model that was quantized, or --tasks alone" in err


def test_tasks_need_a_package(base: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, printed, err = run(capsys, "eval", base, "--tasks", "hellaswag")
    assert (code, printed) == (1, "") and err.count("\n") == 1
    assert err.startswith("hf-bitnet eval: error: --tasks needs the lm-evaluation-harness")
    assert err.endswith("pip install lm-eval; for perplexity alone: --text FILE\n")


def test_shares_that_were_kept() -> None:
    found = {"a": {"acc": 0.4, "acc_stderr": 0.1, "brier": 0.3}, "b": {"exact_match,strict": 0.2, "acc": 0.0}}
    before = {"a": {"acc": 0.5, "acc_stderr": 0.1, "brier": 0.2}, "b": {"exact_match,strict": 0.1, "acc": 0.0}}
    kept = harness.retention(found, before, {"a": ["acc"], "b": ["exact_match", "acc"]})
    assert kept == {"a": {"acc": 0.8}, "b": {"exact_match,strict": 2.0}}
    table = harness.task_table(found, before, kept).splitlines()
    assert table[0].split() == ["task", "figure", "value", "reference", "kept"]
    assert table[1].split() == ["a", "acc", "0.4000", "±", "0.1000", "0.5000", "80.0%"]
    assert table[2].split() == ["a", "brier", "0.3000", "0.2000", "-"]
    assert len(harness.task_table(found, None, {}).splitlines()) == 5


def test_what_the_harness_is_given(base: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a harness of paper: quantized models are right half as often."""
    calls: list[Any] = []

    class TaskManager:
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            calls.append(("tasks", include_path, include_defaults))
            self.all_tasks = ["boolq", "piqa"] if include_defaults else ["mine"]

    def simple_evaluate(model: Any, tasks: list[str], **given: Any) -> dict[str, Any]:
        calls.append((tasks, model.batch_size, model.mixed_precision_dtype, given["limit"], given["num_fewshot"]))
        print("a line of the harness")
        print("a bar of the harness", file=sys.stderr)
        right = 0.25 if hasattr(model.pretrained.config, "quantization_config") else 0.5
        values = {"alias": "x", "acc,none": right, "acc_stderr,none": "N/A", "bits,none": 2}
        high = {"acc": True, "bits": False}
        return {"results": dict.fromkeys(tasks, values), "higher_is_better": dict.fromkeys(tasks, high)}

    for name, members in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": SimpleNamespace},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    save_quantized(tmp_path)
    words = ["eval", tmp_path, "--tasks", "boolq, piqa", "--against", base, "--limit", 3, "--fewshot", 1, "--bf16"]
    code, printed, err = run(capsys, *words)
    assert (code, err) == (0, "") and "of the harness" not in printed
    assert printed.splitlines()[1].split() == ["boolq", "acc", "0.2500", "0.5000", "50.0%"]
    assert calls == [("tasks", None, True), *[(["boolq", "piqa"], 16, "bfloat16", 3, 1)] * 2]
    result = json.loads(run(capsys, *words, "--json")[1])
    assert result["retention"] == {"boolq": {"acc": 0.5}, "piqa": {"acc": 0.5}} and "perplexity" not in result
    calls.clear()
    assert run(capsys, "eval", base, "--tasks", "mine", "--task-folder", tmp_path)[0] == 0
    assert calls == [("tasks", str(tmp_path), False), (["mine"], 16, None, None, None)]
    code, _, err = run(capsys, "eval", base, "--tasks", "bolq", "--task-folder", tmp_path)
    assert code == 1 and "lm-eval has no task 'bolq'; near it: boolq" in err


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A task of the harness: which of two words follows."""
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is optional")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": "ba be", "words": ["bi", "bo"], "answer": i % 2} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "next_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "words",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "next_word.yaml").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow  # the harness imports for long
def test_tasks(base: Path, tmp_path: Path, capsys: Captured, tasks: Path) -> None:
    """The harness' own tasks would be downloaded; this one lies here. Of six questions each word is right three times."""
    save_quantized(tmp_path / "packed")
    words = ["eval", tmp_path / "packed", "--tasks", "next_word", "--task-folder", tasks, "--batch-size", 2]
    code, printed, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert printed.splitlines()[1].split()[:3] == ["next_word", "acc", "0.5000"]
    result = json.loads(run(capsys, *words, "--against", base, "--text", base / "valid.txt", "--length", 16, "--json")[1])
    assert result["tasks"]["next_word"]["acc"] == 0.5 and result["retention"] == {"next_word": {"acc": 1.0}}
    assert result["perplexity_ratio"] == pytest.approx(result["perplexity"] / result["against"]["perplexity"])
    one = json.loads(run(capsys, *words, "--limit", 1, "--fewshot", 0, "--bf16", "--json")[1])
    assert one["tasks"]["next_word"]["acc"] in (0, 1)


@pytest.mark.slow  # the harness reads the names of all its tasks
def test_tasks_that_are_not_there(base: Path, capsys: Captured, tasks: Path) -> None:
    code, _, err = run(capsys, "eval", base, "--tasks", "next_wrod", "--task-folder", tasks)
    assert code == 1 and "lm-eval has no task 'next_wrod'; near it: next_word" in err and err.count("\n") == 1


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
    hb.export_model(model, tmp_path, format="bitnet", verify="codes", progress=False)
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
