"""convert and the recipe over it: a run from text to packed model, what it leaves, and when it refuses."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from huggingface_hub import ModelCard

import hf_bitnet as hb
from hf_bitnet.training import measured_run
from hf_bitnet.training.curve import training_curve
from hf_bitnet.training.distillation.drawn_text import with_drawn
from tests import corpus
from tests.launched import launch
from tests.tiny import tiny

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"
LENGTH = 16


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qat_causal_lm", RECIPES / "qat_causal_lm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qat_causal_lm"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with tokenizer, and two texts beside it."""
    folder = tmp_path_factory.mktemp("base")
    tiny("llama")[0].save_pretrained(folder)
    corpus.tokenizer().save_pretrained(folder)
    corpus.write(folder, 1200, seed=1, name="train.txt")
    corpus.write(folder, 400, seed=2, name="valid.txt")
    return folder


def arguments(base: Path, out: Path, **named: Any) -> list[str]:
    """The recipe's command line; `name=None` leaves an option out, a list gives several values."""
    settings = {
        "model_name_or_path": base,
        "train_file": base / "train.txt",
        "validation_file": base / "valid.txt",
        "block_size": LENGTH,
        "max_train_tokens": 4 * 8 * LENGTH,
        "learning_rate": 2e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "output_dir": out,
        **named,
    }
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def windows(base: Path, name: str = "valid.txt") -> torch.Tensor:
    return hb.text_windows(corpus.tokenizer(), base / name, LENGTH)


# ---- a whole run ----


@pytest.fixture(scope="module")
def run(recipe: ModuleType, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, recipe.main(arguments(base, out, preset="bitnet_b158", keep=[r"layers\.0\.mlp"], logging_steps=2))


def test_run_measures_every_step(run: tuple[Path, dict[str, Any]], base: Path) -> None:
    out, results = run
    measured = results["perplexity"]
    full = tf.AutoModelForCausalLM.from_pretrained(base)
    assert measured["full_precision"] == pytest.approx(hb.perplexity(full, windows(base)), rel=1e-6)
    config = hb.BitNetQuantizationConfig.bitnet_b158(keep=[r"layers\.0\.mlp"])
    assert measured["before_training"] == pytest.approx(hb.perplexity(hb.quantize_model(full, config), windows(base)), rel=1e-6)
    assert measured["trained"] < 0.9 * measured["before_training"]
    for name in ("train", "packed"):
        saved = tf.AutoModelForCausalLM.from_pretrained(out / name)
        assert hb.perplexity(saved, windows(base)) == pytest.approx(measured["trained"], rel=1e-5)
    assert results["perplexity_ratio"]["packed"] == measured["packed"] / measured["full_precision"]


def test_run_leaves_complete_results(run: tuple[Path, dict[str, Any]]) -> None:
    out, results = run
    assert json.loads((out / "results.json").read_text()) == results
    assert sorted(path.name for path in out.iterdir()) == ["packed", "quant_layers.jsonl", "results.json", "train"]
    training = results["training"]
    assert (training["steps"], training["tokens"], training["teacher"], training["distillation"]["alpha"]) == (
        4,
        512,
        "self",
        0.5,
    )
    assert (training["learning_rate"], training["adam_beta2"]) == (2e-3, 0.95)
    assert (training["quantization_schedule"]["ramp"], training["quantization_schedule"]["end"]) == ("linear", 0.2)
    assert results["data"] == {
        "train": "train.txt",
        "train_windows": 75,
        "validation": "valid.txt",
        "validation_windows": 25,
        "window_tokens": LENGTH,
    }
    assert results["quantization"]["keep"] == [r"layers\.0\.mlp"]
    assert (
        results["coverage"]["fraction_of_linear_weights"]
        == hb.coverage(tf.AutoModelForCausalLM.from_pretrained(out / "packed")).fraction
    )
    assert {"evaluate", "train", "save"} <= set(results["seconds"]) and results["train_tokens_per_second"] > 0
    assert {"torch", "transformers"} <= set(results["versions"])
    assert results["history"][-1]["step"] == 4
    assert str(out.parent) not in json.dumps(results)


def test_run_writes_a_card(run: tuple[Path, dict[str, Any]]) -> None:
    out, results = run
    card = ModelCard.load(out / "packed" / "README.md")
    assert [each.metric_value for each in card.data.eval_results] == [results["perplexity"]["packed"]]
    assert "| tokens | 512 |" in card.text and "| text | train.txt |" in card.text
    assert "| learning_rate | 0.002 |" in card.text
    assert "](training_curve.svg)" in card.text
    assert (out / "packed" / "training_curve.svg").read_text() == training_curve(results["history"])
    assert str(out.parent) not in str(card)
    assert tf.AutoTokenizer.from_pretrained(out / "packed")("ba be")["input_ids"] == corpus.tokenizer()("ba be")["input_ids"]


def test_run_does_not_replace_an_earlier_one(recipe: ModuleType, base: Path, run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run
    with pytest.raises(ValueError, match=r"holds packed, results.json, train of an earlier run; choose another output_dir"):
        recipe.main(arguments(base, out))
    with pytest.raises(ValueError, match="would delete the checkpoint"):
        recipe.main(arguments(base, out, overwrite=True, resume_from_checkpoint="true"))
    assert (out / "results.json").exists()


def test_stopped_run_resumes_exactly(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    whole = recipe.main(arguments(base, tmp_path / "whole", teacher="none"))
    stopping = arguments(base, tmp_path / "out", teacher="none", save_strategy="steps", save_steps=2)
    original = hb.QATTrainer._save_checkpoint

    def stop(self: Any, *args: Any) -> None:
        original(self, *args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hb.QATTrainer, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(stopping)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    resumed = recipe.main([*stopping, "--resume_from_checkpoint", "true"])
    assert resumed["perplexity"] == whole["perplexity"]
    assert resumed["train_tokens_per_second"] is None  # the seconds are of the last part only
    assert resumed["training"]["tokens"] == 512


def test_static_ranges_and_norms_are_calibrated(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    fields = {"activation": "int8_static", "sub_norm": ["o_proj"], "weight": "int4", "overrides": '{"k_proj": "keep"}'}
    results = recipe.main(arguments(base, tmp_path / "out", teacher=str(base), max_train_tokens=128, **fields))
    assert "calibrate" in results["seconds"]
    assert results["training"]["teacher"] == base.name
    assert results["quantization"]["overrides"] == {"k_proj": "keep"}
    assert results["perplexity"]["packed"] == pytest.approx(results["perplexity"]["trained"], rel=1e-5)


def test_texts_of_a_dataset(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text("\n".join(corpus.text(40, seed) for seed in range(20)))
    where = {"train_file": None, "validation_file": None, "dataset_name": folder, "max_validation_windows": 5}
    results = recipe.main(arguments(base, tmp_path / "out", max_train_tokens=256, **where))
    assert (results["data"]["train_windows"], results["data"]["validation_windows"]) == (16, 5)
    with pytest.raises(ValueError, match="has no column 'document'; its columns: text"):
        recipe.main(arguments(base, tmp_path / "other", **{**where, "text_column": "document"}))


# ---- when it refuses ----


def _convert(tmp_path: Path, **named: Any) -> dict[str, Any]:
    fields = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "max_steps": 2, "disable_tqdm": True, "save_strategy": "no"}
    texts = {name: hb.text_windows(corpus.tokenizer(), [corpus.text(300, seed)], LENGTH) for seed, name in enumerate("ab")}
    given = {
        "model": tiny("llama")[0],
        "tokenizer": None,
        "config": hb.BitNetQuantizationConfig(),
        "args": hb.QATArguments(**{**fields, **named.pop("fields", {})}),
        "train": texts["a"],
        "valid": texts["b"],
        "say": lambda line: None,
        **named,
    }
    return hb.convert(**given)


def test_packed_model_that_differs_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(model: Any) -> Any:
        hb.pack_model(model).model.norm.weight.data *= 1.5
        return model

    monkeypatch.setattr(measured_run, "pack_model", spoilt)
    with pytest.raises(RuntimeError, match=r"the packed model, reloaded, has perplexity .* they should agree to 0.001"):
        _convert(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".packed.incomplete", "train"]


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        (True, "step 2: the training diverged: the gradient norm is nan: the gradient of model.layers"),
        (False, r"the training diverged: .* Try a lower learning rate than learning_rate=1e\+30"),
    ],
)
def test_diverged_training_is_no_success(guard: bool, words: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=words):
        _convert(tmp_path, fields={"learning_rate": 1e30, "max_grad_norm": 0.0, "nan_guard": guard}, teacher=None)
    assert not (tmp_path / "out" / "packed").exists()


@pytest.mark.parametrize(
    ("named", "error", "words"),
    [
        (
            {"config": hb.BitNetQuantizationConfig(form="packed")},
            ValueError,
            "convert trains first and packs at the end: form='train'",
        ),
        ({"config": "ternary"}, TypeError, "takes a BitNetQuantizationConfig, got str"),
        ({"args": tf.TrainingArguments(output_dir="x", use_cpu=True)}, TypeError, "takes QATArguments, got TrainingArguments"),
        ({"drawn_share": 50}, ValueError, "drawn_share=50 is out of range.*drawn_share=0.5"),
        ({"fit": "gtpq"}, ValueError, "unknown fit method 'gtpq'.*Did you mean 'gptq'"),
        (
            {"fit": "gptq", "fields": {"quantization_schedule": "linear"}},
            ValueError,
            "a fitted model starts quantized.*quantization_schedule=None",
        ),
        ({"train": [1, 2]}, TypeError, r"train must be token windows, int64 \(count, length\), got list"),
        (
            {"valid": torch.zeros(2, 100, dtype=torch.long)},
            ValueError,
            "valid have 100 tokens, LlamaForCausalLM has positions for 64",
        ),
        (
            {"max_train_tokens": 100},
            ValueError,
            r"max_train_tokens=100 is less than one step, which takes 128 tokens \(8 windows",
        ),
    ],
)
def test_what_does_not_fit_is_told_at_once(tmp_path: Path, named: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _convert(tmp_path, **named)
    assert not (tmp_path / "out").exists()


def test_a_fitted_start(tmp_path: Path) -> None:
    model = tiny("llama")[0]
    original = copy.deepcopy(model)
    results = _convert(tmp_path, model=model, fit="gptq", fields={"learning_rate": 1e-6})
    rounded = _convert(tmp_path / "rounded", model=original, fields={"learning_rate": 1e-6})
    assert results["training"]["fit"] == "gptq" and rounded["training"]["fit"] == "none"
    assert results["training"]["teacher"] == "self"
    # the teacher is the full-precision model, not the fitted one: the distance to it is what the fit makes smaller
    kl = [next(row["train_loss"] for row in run["history"] if "train_loss" in row) for run in (results, rounded)]
    assert kl[0] < kl[1]


def test_text_that_the_model_writes(tmp_path: Path) -> None:
    """Half of the windows of the run, no more, and by the model in full precision."""
    results = _convert(tmp_path, drawn_share=0.5, max_train_tokens=8 * LENGTH)
    assert results["training"]["drawn_share"] == 0.5 and results["training"]["steps"] == 1
    assert results["data"]["train_windows"] == 8 and results["seconds"]["draw"] > 0
    model, windows = tiny("llama")[0], torch.arange(4 * LENGTH).reshape(4, LENGTH) % 50
    mixed = with_drawn(model, windows, 0.5, 4, seed=0, progress=False)
    kept = [any(torch.equal(row, other) for other in windows) for row in mixed]
    assert kept == [False, False, True, True]
    assert all(any(torch.equal(row[:8], other[:8]) for other in windows) for row in mixed)
    assert torch.equal(with_drawn(model, windows, 0.0, 4, seed=0, progress=False).sort(0).values, windows.sort(0).values)


def test_max_train_tokens_does_not_prolong_a_run(tmp_path: Path) -> None:
    args = hb.QATArguments(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=1, disable_tqdm=True, save_strategy="no")
    results = _convert(tmp_path, args=args, max_train_tokens=10**9)
    assert results["training"]["steps"] == 3  # 18 windows, 8 a step
    assert results["training"]["tokens"] == 18 * LENGTH
    assert args.max_steps == -1  # the caller's are as they were


def test_a_measured_run_knows_its_metrics_and_steps(tmp_path: Path) -> None:
    args = hb.QATArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"unknown metric 'f1'; legal: perplexity, accuracy; MeasuredRun\(args, metric="):
        hb.MeasuredRun(args, metric="f1")
    with pytest.raises(TypeError, match=r"takes QATArguments, got 'out'; MeasuredRun\(QATArguments\(output_dir='out'\)\)"):
        hb.MeasuredRun("out")  # type: ignore[arg-type]
    lines: list[str] = []
    run = hb.MeasuredRun(args, metric="accuracy", say=lines.append)
    with pytest.raises(
        ValueError, match="unknown step 'tuned' of a run; legal: full_precision, before_training, trained, packed"
    ):
        run.note("tuned", 0.5)
    run.note("trained", 0.5)
    assert run.measured == {"trained": 0.5} and lines == ["trained, before packing:     accuracy 50.00%"]


def test_recipe_needs_a_text(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which text"):
        recipe.main(arguments(base, tmp_path, train_file=None))


# ---- the files around it ----


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs(path: Path) -> None:
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    launch, config, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "recipe.py"]))
    # keys that accelerate does not know inside a block would be dropped in silence
    for block in (config.fsdp_config, config.deepspeed_config):
        assert set(block or ()) <= known
    expected = {"ddp": "multi_gpu", "fsdp2": "use_fsdp", "deepspeed_zero2": "use_deepspeed"}
    for kind, option in expected.items():
        assert getattr(launch, option) == (path.stem == kind)
    assert launch.use_cpu == (path.stem == "cpu")
    if path.stem == "fsdp2":
        assert (launch.fsdp_version, launch.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")


def test_recipe_uses_public_names_only() -> None:
    lines = (RECIPES / "qat_causal_lm.py").read_text().splitlines()
    assert [line for line in lines if "hf_bitnet" in line and "import" in line] == ["from hf_bitnet import ("]


def test_help(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "--quantization_schedule" in out and "--train_file" in out and "(default: 0.0001)" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_with_the_shipped_configs(base: Path, tmp_path: Path, name: str) -> None:
    """bfloat16, as in the configs: the model that is packed is the one that was trained, also where it was in shards."""
    words = arguments(base, tmp_path / "out", per_device_train_batch_size=4)
    results = launch("qat_causal_lm", name, words, tmp_path)
    assert (results["training"]["processes"], results["training"]["mixed_precision"]) == (2, "bf16")
    assert results["perplexity"]["packed"] == pytest.approx(results["perplexity"]["trained"], rel=1e-3)
