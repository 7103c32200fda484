"""Recipes run on tiny random models from their command lines: what they leave, and what they say to a wrong one."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard

import hf_bitnet as hb
from hf_bitnet.training import measured_run
from tests import corpus
from tests.launched import launch
from tests.tiny import tiny

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RUNS = ("qat_classification", "pretrain_causal_lm", "distill_offline")
QUIET = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}


def load(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def words(**settings: Any) -> list[str]:
    """A command line; `name=None` leaves an option out."""
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


# ---- qat_classification ----


def write_rows(path: Path, count: int, seed: int) -> None:
    """A text whose label is told by its first word, as SST-2 has it: sentence, tab, label."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        rest = corpus.text(generator.randint(2, 8), seed=generator.randint(0, 9999))
        rows.append(f"{('do', 'ba')[number % 2]} {rest}\t{number % 2}\n")
    path.write_text("".join(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tiny("bert")[0].save_pretrained(folder)  # of three labels, and the data have two
    corpus.tokenizer().save_pretrained(folder)
    write_rows(folder / "train.tsv", 32, seed=1)
    write_rows(folder / "valid.tsv", 10, seed=2)
    return folder


def classification(encoder: Path, out: Path, **named: Any) -> list[str]:
    files = {"train_file": encoder / "train.tsv", "validation_file": encoder / "valid.tsv"}
    sizes = {"per_device_train_batch_size": 8, "full_precision_epochs": 3, "full_precision_learning_rate": 3e-3}
    run = {"model_name_or_path": encoder, "num_train_epochs": 1, "learning_rate": 2e-3, "output_dir": out}
    return words(**{**QUIET, **files, **sizes, **run, **named})


@pytest.fixture(scope="module")
def classified(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("classified") / "out"
    preset = {"training_preset": "task_bitdistill", "sub_norm": "output.dense", "base_name": "a/b"}
    return out, load("qat_classification").main(classification(encoder, out, **preset))


def test_classification(classified: tuple[Path, dict[str, Any]], encoder: Path) -> None:
    out, results = classified
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"results.json", "full_precision", "train", "packed"} <= {path.name for path in out.iterdir()}
    assert set(results["accuracy"]) == {"full_precision", "before_training", "trained", "packed"}
    assert results["accuracy"]["packed"] == results["accuracy"]["trained"]
    assert (results["training"]["teacher"], results["data"]["train_rows"], results["data"]["validation_rows"]) == (
        "self",
        32,
        10,
    )
    assert (results["training"]["training_preset"], results["base_model"]) == ("task_bitdistill", "a/b")
    assert results["training"]["distillation"]["relations"]["weight"] == 1.0
    # the figure is that of the saved model on these texts
    packed = tf.AutoModelForSequenceClassification.from_pretrained(out / "packed")
    tokenizer = tf.AutoTokenizer.from_pretrained(out / "packed")
    rows = [line.split("\t") for line in (encoder / "valid.tsv").read_text().splitlines()]
    with torch.no_grad():
        found = [packed(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text, _ in rows]
    right = sum(packed.config.id2label[number] == label for number, (_, label) in zip(found, rows, strict=True))
    assert right / len(rows) == results["accuracy"]["packed"]
    assert hb.coverage(packed).fraction > 0.9
    assert str(encoder.parent) not in json.dumps(results)
    card = ModelCard.load(out / "packed" / "README.md")
    (figure,) = card.data.eval_results
    assert (figure.task_type, figure.metric_value) == ("text-classification", results["accuracy"]["packed"])
    assert card.data.base_model == "a/b"


def test_classification_without_teacher_from_the_fine_tuned(
    classified: tuple[Path, dict[str, Any]], encoder: Path, tmp_path: Path
) -> None:
    out, results = classified
    arguments = classification(
        encoder, tmp_path / "out", model_name_or_path=None, fine_tuned=out / "full_precision", teacher="none"
    )
    alone = load("qat_classification").main(arguments)
    assert alone["accuracy"]["full_precision"] == results["accuracy"]["full_precision"]
    assert (alone["training"]["training_preset"], alone["base_model"]) == ("task_encoder", "full_precision")
    assert alone["training"]["teacher"] == "none" and "fine_tune" not in alone["seconds"]
    assert alone["training"].get("distillation") is None


def test_classification_as_it_comes(classified: tuple[Path, dict[str, Any]], encoder: Path, tmp_path: Path) -> None:
    """The preset for encoders, hidden states of every layer, no dropout."""
    out, _ = classified
    named = {"model_name_or_path": None, "fine_tuned": out / "full_precision", "learning_rate": None, "dropout": None}
    results = load("qat_classification").main(classification(encoder, tmp_path / "out", **named))
    training = results["training"]
    assert (training["training_preset"], training["teacher"], training["learning_rate"]) == ("task_encoder", "self", 5e-4)
    assert training["distillation"]["hidden"]["weight"] == 2.0 and training["dropout"] == 0.0
    rates = tf.AutoConfig.from_pretrained(tmp_path / "out" / "packed")
    assert rates.hidden_dropout_prob == rates.attention_probs_dropout_prob == 0.0
    assert tf.AutoConfig.from_pretrained(out / "full_precision").hidden_dropout_prob == 0.1
    assert load("qat_classification").dropout_rates(out / "full_precision", 0.3) == {
        "hidden_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.3,
    }
    with pytest.raises(ValueError, match="--distillation learns from a teacher, and --teacher none has none"):
        wrong = {**named, "teacher": "none", "distillation": '{"alpha": 1.0}'}
        load("qat_classification").main(classification(encoder, tmp_path / "no", **wrong))
    with pytest.raises(ValueError, match="--dropout 1 is no rate; legal: 0"):
        load("qat_classification").main(classification(encoder, tmp_path / "no", **{**named, "dropout": 1}))


def test_classification_rows(tmp_path: Path) -> None:
    recipe = load("qat_classification")
    (tmp_path / "a.csv").write_text('stars,review,id\n1,"good, I say",7\n0,bad,8\n')
    assert recipe.read_rows(str(tmp_path / "a.csv"), "review", "stars") == [("good, I say", "1"), ("bad", "0")]
    (tmp_path / "glue.tsv").write_text('sentence\tlabel\nso "good\t1\n')
    assert recipe.read_rows(str(tmp_path / "glue.tsv"), None, None) == [('so "good', "1")]
    (tmp_path / "plain.tsv").write_text("label me\tyes\n")
    assert recipe.read_rows(str(tmp_path / "plain.tsv"), None, None) == [("label me", "yes")]
    datasets.Dataset.from_dict({"text": ["x"], "label": [3]}).save_to_disk(str(tmp_path / "saved"))
    assert recipe.read_rows(str(tmp_path / "saved"), None, None) == [("x", "3")]
    assert recipe.label_names([("a", str(n % 11)) for n in range(44)], "f") == [str(n) for n in range(11)]


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (None, (None, None), r"there is no file or folder '.*rows\.tsv'"),
        ("", (None, None), "is empty"),
        ("a\tb\tc\n", (None, None), r"has 3 columns \(a, b, c\); name two of its header: --text_column"),
        ("a\tb\tc\n", ("text", "c"), "has no column 'text'; its columns: a, b, c. Name one: --text_column"),
        ("a\tb\tc\n", ("a", None), "has no column 'label'; its columns: a, b, c. Name one: --label_column"),
        ("a\t1\nb\n", (None, None), "line 2 of .* has 1 columns, the first has 2"),
    ],
)
def test_classification_refuses_files(tmp_path: Path, content: str | None, columns: tuple[Any, Any], message: str) -> None:
    file = tmp_path / "rows.tsv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load("qat_classification").read_rows(str(file), *columns)


def test_classification_refuses_other_data(tmp_path: Path) -> None:
    recipe = load("qat_classification")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no \.tsv, no \.csv and no folder"):
        recipe.read_rows(str(tmp_path / "a.json"), None, None)
    with pytest.raises(ValueError, match=r"holds no saved datasets\.Dataset"):
        recipe.read_rows(str(tmp_path), None, None)
    split = datasets.Dataset.from_dict({"text": ["x"], "label": [3]})
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"holds the splits train; give one of them: .*splits/train"):
        recipe.read_rows(str(tmp_path / "splits"), None, None)
    with pytest.raises(ValueError, match=r"has 8 different values in 8 rows .*Is it the right one\? --label_column"):
        recipe.label_names([("a", str(number)) for number in range(8)], "f")
    with pytest.raises(ValueError, match="has 1 different values in 3 rows"):
        recipe.label_names([("a", "0")] * 3, "f")
    with pytest.raises(ValueError, match="row 2 of 'f' has the label 'x'; those of the training file: 0, 1"):
        recipe.encode([("a", "0"), ("b", "x")], ["0", "1"], "f", None, 8)


def test_classification_refuses_command_lines(classified: tuple[Path, dict[str, Any]], encoder: Path, tmp_path: Path) -> None:
    main = load("qat_classification").main
    with pytest.raises(ValueError, match="which model"):
        main(classification(encoder, tmp_path / "out", model_name_or_path=None))
    with pytest.raises(ValueError, match="which rows"):
        main(classification(encoder, tmp_path / "out", train_file=None))
    with pytest.raises(ValueError, match=r"holds full_precision, packed, results.json, train of an earlier run"):
        main(classification(encoder, classified[0]))
    inside = {"model_name_or_path": None, "fine_tuned": classified[0] / "full_precision", "overwrite": True}
    with pytest.raises(ValueError, match=r"full_precision lies in the folder of this run, .*; choose another --output_dir"):
        main(classification(encoder, classified[0], **inside))
    assert (classified[0] / "results.json").exists()


# ---- language models ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("llama")[0].save_pretrained(folder)
    corpus.tokenizer().save_pretrained(folder)
    corpus.write(folder, 400, seed=1, name="train.txt")
    corpus.write(folder, 200, seed=2, name="valid.txt")
    return folder


def language(base: Path, out: Path, **named: Any) -> list[str]:
    files = {"train_file": base / "train.txt", "validation_file": base / "valid.txt", "block_size": 16}
    return words(**{**QUIET, **files, "output_dir": out, "learning_rate": 2e-3, **named})


def pretraining(base: Path, out: Path, **named: Any) -> list[str]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_train_tokens": 512, "warmup_steps": 1}
    return language(base, out, **{"tokenizer_name_or_path": base, **sizes, **named})


def test_pretraining(base: Path, tmp_path: Path) -> None:
    recipe = load("pretrain_causal_lm")
    results = recipe.main(pretraining(base, tmp_path / "out", logging_steps=1))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    training = results["training"]
    assert (training["training_preset"], training["steps"], training["two_stage"]["at"]) == ("scratch_b158", 4, 0.5)
    rates = [row["learning_rate"] for row in results["history"] if "learning_rate" in row]
    assert max(rates) == pytest.approx(2e-3, rel=0.5) and rates[-1] < rates[1]
    packed = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "packed")
    assert isinstance(packed.model.layers[0].mlp.down_proj, hb.PackedBitLinear)
    assert float(packed.model.layers[0].mlp.down_proj.sub_norm.blend) == 1.0
    valid = hb.text_windows(corpus.tokenizer(), base / "valid.txt", 16)
    assert hb.perplexity(packed, valid, progress=False) == pytest.approx(results["perplexity"]["packed"], rel=1e-5)
    assert results["perplexity"]["packed"] == pytest.approx(results["perplexity"]["trained"], rel=1e-3)
    assert "quantization-aware training from random weights" in (tmp_path / "out" / "packed" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"holds packed, results.json, train of an earlier run"):
        recipe.main(pretraining(base, tmp_path / "out"))


def test_pretraining_takes_the_sizes_of_a_model(base: Path) -> None:
    recipe = load("pretrain_causal_lm")
    sizes = recipe.ModelArguments(tokenizer_name_or_path=str(base), config_name_or_path=str(base))
    made = recipe.new_model(sizes, corpus.tokenizer(), 16)
    assert made.config.hidden_size == tiny("llama")[0].config.hidden_size
    assert not torch.equal(made.lm_head.weight, tiny("llama")[0].lm_head.weight)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"train_file": None}, "which text"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "--hidden_size 30 must be a multiple of twice --num_attention_heads 4"),
        ({"max_train_tokens": 100}, "max_train_tokens=100 is less than one step, which takes 128 tokens"),
        ({"training_preset": "scratch"}, r"unknown training preset 'scratch'.*Did you mean 'scratch_b158'"),
    ],
)
def test_pretraining_refuses(base: Path, tmp_path: Path, named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("pretrain_causal_lm").main(pretraining(base, tmp_path / "out", **named))
    assert not (tmp_path / "out").exists()


def test_offline_distillation(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = load("distill_offline"), tmp_path / "out"
    arguments = language(base, out, model_name_or_path=base, max_train_windows=16, k=8, logging_steps=1)
    with pytest.raises(ValueError, match=r"there is no cache '.*teacher'; make it first: --step cache"):
        recipe.main([*arguments, "--step", "train"])
    made = recipe.main([*arguments, "--step", "cache"])
    assert made["cache"] == str(out / "teacher")
    cached = datasets.load_from_disk(str(out / "teacher"))
    assert len(cached) == 16 and len(cached[0]["teacher_ids"]) == 16 * 8
    monkeypatch.setattr(recipe, "make_cache", None)  # the training needs no teacher
    results = recipe.main([*arguments, "--step", "train"])
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results["perplexity"]) == {"full_precision", "before_training", "trained", "packed"}
    assert results["perplexity"]["packed"] == pytest.approx(results["perplexity"]["trained"], rel=1e-3)
    assert (results["training"]["steps"], results["training"]["teacher"]) == (2, f"cached: {base.name}")
    assert any(key.startswith("distill/") for row in results["history"] for key in row)
    with pytest.raises(ValueError, match=r"holds packed, results.json, train of an earlier run"):
        recipe.main([*arguments, "--step", "train"])


def test_a_packed_model_that_differs_is_no_success(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(model: Any) -> Any:
        hb.pack_model(model).model.norm.weight.data *= 1.5
        return model

    monkeypatch.setattr(measured_run, "pack_model", spoilt)
    with pytest.raises(RuntimeError, match="the packed model, reloaded, has perplexity"):
        load("pretrain_causal_lm").main(pretraining(base, tmp_path / "out", max_train_tokens=128))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".packed.incomplete", "train"]


# ---- all of them ----


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_the_shipped_configs(name: str, config: str, base: Path, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    many = {"per_device_train_batch_size": 4}
    if name == "qat_classification":
        arguments = classification(encoder, out, **many)
    elif name == "pretrain_causal_lm":
        arguments = pretraining(base, out, **many)
    else:
        arguments = language(base, out, model_name_or_path=base, max_train_windows=16, k=8)
        load(name).main([*arguments, "--step", "cache"])
        arguments = [*language(base, out, model_name_or_path=base, k=8, **many), "--step", "train"]
    fsdp_of_bert = ("--fsdp_transformer_layer_cls_to_wrap", "BertLayer")
    options = fsdp_of_bert if (name, config) == ("qat_classification", "fsdp2") else ()
    results = launch(name, config, arguments, tmp_path, *options)
    assert results["training"]["mixed_precision"] == "bf16"
    metric = "accuracy" if name == "qat_classification" else "perplexity"
    assert results[metric]["packed"] == pytest.approx(results[metric]["trained"], rel=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(name).main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python recipes/{name}.py" in out and "accelerate launch --config_file recipes/accelerate/" in out
    for line in out.splitlines():
        for word in line.split():
            if word.startswith("recipes/accelerate/"):
                assert (RECIPES.parent / word).exists()


@pytest.mark.parametrize("name", RUNS)
def test_recipes_use_public_names_only(name: str) -> None:
    lines = (RECIPES / f"{name}.py").read_text().splitlines()
    assert [line for line in lines if "hf_bitnet" in line and "import" in line] == ["from hf_bitnet import ("]


# ---- the table ----


def test_results_table_is_that_of_the_files() -> None:
    assert load("table").main(["--check"]) == 0, "run: python recipes/table.py"


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load("table")
    (tmp_path / "results").mkdir()
    result = {
        "recipe": "qat_classification",
        "base_model": "encoder",
        "data": {"train": "train.tsv", "train_rows": 1000, "validation": "dev.tsv"},
        "quantization": {"weight": "ternary", "granularity": "tensor"},
        "training": {
            "teacher": "self",
            "learning_rate": 5e-4,
            "num_train_epochs": 2.0,
            "dropout": 0.0,
            "distillation": {"hidden": {"weight": 2.0}, "relations": None},
        },
    }
    for seed, accuracy in ((1, 0.5), (2, 0.75)):
        made = {**result, "training": {**result["training"], "seed": seed}, "accuracy": {"packed": accuracy}}
        (tmp_path / "results" / f"{seed}.json").write_text(json.dumps(made))
    assert table.main(["--check"], tmp_path) == 1 and "run: python recipes/table.py" in capsys.readouterr().err
    assert table.main([], tmp_path) == 0 and table.main(["--check"], tmp_path) == 0
    setting = "qat_classification | encoder | train.tsv, 1,000 rows | dev.tsv | ternary, tensor | self, hidden 2 | 0"
    setting += " | 0.0005 | 2 epochs"
    row = f"| {setting} | 1, 2 |  |  |  | 62.50 |"
    assert row in (tmp_path / "RESULTS.md").read_text()
