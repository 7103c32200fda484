"""Training presets: they can be used as they are printed, overridden, and are kept with the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

import hf_bitnet as hb
from hf_bitnet.cli import common, main, train
from hf_bitnet.cli.parsers import build_parser
from tests.tiny import tiny

NAMES = hb.TRAINING_PRESETS.names()
PUBLISHED = {"scratch_b158", "convert_b158", "task_bitdistill", "pareto_w2", "w4a8", "w8a8", "falcon_sft"}
OWN = {"task_encoder"}


def test_the_ways_are_there() -> None:
    assert set(NAMES) == PUBLISHED | OWN


@pytest.mark.parametrize("name", NAMES)
def test_code_trains_a_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, batch = tiny("llama")
    rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    names: dict[str, Any] = {"model": model, "train_dataset": rows, "batches": [batch]}
    code = hb.TRAINING_PRESETS.get(name).code()
    fields = "output_dir='out', max_steps=1, warmup_steps=0, use_cpu=True, disable_tqdm=True, save_strategy='no'"
    assert "output_dir='out'" in code
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    exec(compile(code.replace("output_dir='out'", fields), name, "exec"), names)
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    assert model.config.quantization_config.weight == hb.TRAINING_PRESETS.get(name).quantization["weight"]
    for module in model.modules():
        if getattr(module, "sub_norm", None) is not None:
            assert float(module.sub_norm.blend) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_arguments_hold_what_the_preset_says(name: str, tmp_path: Path) -> None:
    args = hb.QATArguments.from_preset(name, output_dir=str(tmp_path))
    saved = json.loads(args.to_json_string())
    assert saved["training_preset"] == name
    for key, value in hb.TRAINING_PRESETS.get(name).arguments.items():
        found = saved[key]
        assert (found if not isinstance(value, dict) else _subset(found, value)) == value
    assert hb.QATArguments(**args.to_dict()).to_dict() == args.to_dict()
    assert hb.TRAINING_PRESETS.get(name).config(keep=["layers"]).keep == ["layers"]


def _subset(found: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    return {key: _subset(found[key], value) if isinstance(value, dict) else found[key] for key, value in like.items()}


def test_overriding(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"learning_rate": 1.2e-3, "two_stage": None, "lr_scheduler_type": "cosine"}
    args = hb.QATArguments.from_preset("scratch_b158", output_dir=str(tmp_path), **fields)
    assert (args.learning_rate, args.two_stage, args.weight_decay) == (1.2e-3, None, 0.1)
    assert hb.QATArguments.from_preset("scratch_b158", output_dir=str(tmp_path)).learning_rate == 1.5e-3
    assert hb.TRAINING_PRESETS.get("scratch_b158").config(sub_norm=None).sub_norm == []


def test_presets_cannot_be_changed_through_what_they_hand_out() -> None:
    preset = hb.TRAINING_PRESETS.get("task_bitdistill")
    preset.training()["distillation"]["alpha"] = 0.0
    preset.config().sub_norm.append("x")
    preset.to_dict()["arguments"].clear()
    assert preset.arguments["distillation"]["alpha"] == 2 / 7
    assert preset.config().sub_norm == ["o_proj", "down_proj"]


def test_bitdistill_weighs_its_terms_as_the_paper() -> None:
    terms = hb.TRAINING_PRESETS.get("task_bitdistill").arguments["distillation"]
    assert terms["alpha"] * terms["temperature"] ** 2 / (1 - terms["alpha"]) == pytest.approx(10.0)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown training preset 'convert_b518'; legal: 'scratch_b158'.*Did you mean 'convert_b158'"
    ):
        hb.QATArguments.from_preset("convert_b518", output_dir=str(tmp_path))
    # on the command line of a script the name alone would do nothing
    with pytest.raises(ValueError, match=r"none of learning_rate, .* is that preset's; write QATArguments.from_preset\('w4a8'"):
        HfArgumentParser(hb.QATArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--training_preset", "w4a8"]
        )


def test_defaults_of_a_command_line() -> None:
    assert hb.command_line_defaults([]) == hb.CONVERSION_DEFAULTS
    found = hb.command_line_defaults(["--x", "1", "--training_preset=scratch_b158"])
    assert found.items() >= hb.TRAINING_PRESETS.get("scratch_b158").arguments.items()
    # nothing of the conversion's way to learn is left, which two_stage would not go with
    assert not {"lr_scheduler_type", "quantization_schedule"} & set(found)
    assert found["logging_steps"] == hb.CONVERSION_DEFAULTS["logging_steps"]


def test_train_takes_arguments_quantization_and_teacher() -> None:
    words = ["train", "model", "out", "--training-preset", "task_bitdistill", "--epochs", "2", "--keep", "a"]
    arguments = build_parser("x", "1").parse_args(words)
    training = train._training(arguments)
    assert (training.training_preset, training.num_train_epochs, training.weight_decay) == ("task_bitdistill", 2, 0.01)
    config = common.config_from(arguments, "train")
    assert (config.sub_norm, config.keep, train._teacher(arguments)) == (["o_proj", "down_proj"], ["a"], "self")
    arguments = build_parser("x", "1").parse_args(["train", "model", "out", "--training-preset", "w4a8", "--preset", "w8a8"])
    assert (common.config_from(arguments, "train").weight, train._teacher(arguments)) == ("int8", None)


def test_command_line_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1 : len(NAMES) + 1]] == list(NAMES)
    assert main(["presets", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_command_line_shows_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    preset = hb.TRAINING_PRESETS.get(name)
    assert main(["presets", name]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert all(text in words for text in (preset.source, preset.url, preset.notes, preset.tokens, preset.measured))
    assert all(f"  {line}".rstrip() in out for line in preset.code().splitlines())
    assert all(f"{key} = {json.dumps(value)}" in out for key, value in preset.arguments.items())
    assert main(["presets", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps({**dataclasses.asdict(preset), "code": preset.code()}))


def test_command_line_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "w4a88"]) == 1
    assert "Did you mean 'w4a8'?" in capsys.readouterr().err
