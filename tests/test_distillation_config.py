"""DistillationConfig: the four ways of writing one in QATArguments, JSON, the command line, what is refused."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from hf_bitnet import DistillationConfig, QATArguments
from hf_bitnet.training import HiddenStates, Relations
from tests.qat import arguments, make_trainer, quantized

WRITTEN = {"alpha": 0.25, "divergence": "jsd", "hidden": {"layers": {0: 1}}, "relations": {"states": ["value"], "heads": 4}}
MEANT = DistillationConfig(
    alpha=0.25, divergence="jsd", hidden=HiddenStates(layers={0: 1}), relations=Relations(states=("value",), heads=4)
)


def test_all_ways_to_write_one(tmp_path: Path) -> None:
    file = tmp_path / "distillation.json"
    file.write_text(json.dumps(WRITTEN))
    for given in (MEANT, WRITTEN, json.dumps(WRITTEN), str(file)):
        assert arguments(tmp_path, distillation=given).distillation == MEANT
    line = ["--output_dir", str(tmp_path), "--distillation", json.dumps(WRITTEN)]
    assert HfArgumentParser(QATArguments).parse_args_into_dataclasses(line)[0].distillation == MEANT


def test_arguments_stay_json_and_come_back(tmp_path: Path) -> None:
    """As dict, as JSON text (whose keys are text), and as Trainer's training_args.bin."""
    args = arguments(tmp_path, distillation=WRITTEN)
    text = json.loads(args.to_json_string())
    for plain in (args.to_dict()["distillation"], text["distillation"]):
        assert arguments(tmp_path, distillation=plain).distillation == MEANT
    trainer = make_trainer(tmp_path, quantized(), teacher="self", distillation={"alpha": 1.0})
    trainer.save_model(str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert saved.distillation == DistillationConfig(alpha=1.0)


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        MEANT.alpha = 1.0  # type: ignore[misc]
    assert replace(MEANT, hidden=None).inner_terms == {"relations": 1.0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is out of range; legal: from 0 to 1; 1 learns from the teacher alone"),
        ({"divergence": "revers"}, "unknown divergence 'revers'; legal: 'forward', 'reverse', 'jsd'. Did you mean 'reverse'?"),
        ({"divergence": "jsd", "beta": 0}, "beta=0: it must lie between 0 and 1; the ends are divergence='forward'"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a whole number"),
        ({"balance_decay": 1}, "balance_decay=1 would never measure anything"),
        ({"teacher_dtype": "bf16"}, "teacher_dtype='bf16'; legal: 'float32', 'bfloat16', 'float16' or None"),
        ({"teacher_device": "gpu"}, "teacher_device='gpu' is no device"),
        ({"hidden": {"los": "mse"}}, "hidden has no key 'los'; legal: .*Did you mean 'loss'"),
        ({"hidden": {"loss": "l1"}}, "hidden: unknown hidden-state loss 'l1'; legal: 'cosine', 'mse', 'huber'"),
        ({"hidden": {"weight": 0}}, "hidden: weight must be above 0"),
        ({"hidden": {"layers": {"a": 1}}}, "has a key that is no whole number; write {layer of the student"),
        ({"relations": {"states": ["q"]}}, r"relations: states=\['q'\]; legal: some of 'query', 'key', 'value'"),
        ({"relations": {"heads": 0}}, "relations: heads must be a whole number of at least 1"),
    ],
)
def test_values_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillationConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alpha": "0.5"}, "alpha must be a number from 0 to 1, got '0.5'"),
        ({"balance": "yes"}, "balance must be True or False, got 'yes'"),
        ({"hidden": True}, "hidden must be a HiddenStates, a dict"),
        ({"hidden": {"layers": [0, 1]}}, r"hidden: layers must be a dict, got \[0, 1\]; write {layer of the student"),
        ({"relations": {"layer": 0.8}}, "relations: layer must be a whole number, got 0.8; for example layer=-1"),
        ({"relations": {"normalize": 1}}, "relations: normalize must be True or False, got 1"),
    ],
)
def test_types_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        DistillationConfig(**fields)
