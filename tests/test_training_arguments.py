"""QATArguments: defaults, command line, errors that say what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_bitnet import QATArguments, QuantizationSchedule
from hf_bitnet.training import arguments


def test_command_line(tmp_path: Path) -> None:
    line = [
        "--output_dir",
        str(tmp_path),
        "--quantization_schedule",
        '{"ramp": "cosine", "end": "2 epochs"}',
        "--distillation",
        '{"alpha": 1}',
    ]
    (args,) = HfArgumentParser(QATArguments).parse_args_into_dataclasses(
        [*line, "--latent_learning_rate", "1e-4", "--no_quant_logging", "--learning_rate", "2e-4"]
    )
    assert args.quantization_schedule == QuantizationSchedule(ramp="cosine", end="2 epochs")
    assert args.distillation.alpha == 1.0
    assert (args.latent_learning_rate, args.learning_rate, args.quant_logging) == (1e-4, 2e-4, False)


def test_every_field_has_a_help_text() -> None:
    own = set(QATArguments.__dataclass_fields__) - set(QATArguments.__bases__[0].__dataclass_fields__)
    assert own
    assert not [name for name in own if not QATArguments.__dataclass_fields__[name].metadata.get("help")]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"quantization_schedule": "cosin"},
            "unknown ramp 'cosin'; legal: .*Did you mean 'cosine'.*Or write a dict, JSON text",
        ),
        ({"quantization_schedule": "gone.json"}, "quantization_schedule='gone.json' is no file that can be read"),
        ({"quantization_schedule": {"ende": 0.2}}, "quantization_schedule has no key 'ende'.*Did you mean 'end'"),
        ({"quantization_schedule": {"stairs": 0}}, "quantization_schedule: stairs must be a whole number"),
        ({"distillation": {"alpha": 1.5}}, "distillation: alpha=1.5 is out of range; legal: from 0 to 1; 1 learns from the"),
        ({"distillation": {"chunk_token": 1}}, "distillation has no key 'chunk_token'; .*Did you mean 'chunk_tokens'"),
        ({"latent_learning_rate": -1.0}, "latent_learning_rate=-1.0 is out of range"),
        ({"scale_weight_decay": float("nan")}, "scale_weight_decay=nan is out of range"),
    ],
)
def test_values_out_of_range(fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        QATArguments(output_dir=str(tmp_path), **fields)


def test_every_switch_is_checked() -> None:
    own = QATArguments.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    assert {name for name in own if QATArguments.__dataclass_fields__[name].type is bool} == set(arguments._SWITCHES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization_schedule": 3}, "quantization_schedule must be a QuantizationSchedule, a dict, JSON text"),
        ({"strength_schedule": "linear"}, "unexpected keyword argument 'strength_schedule'"),
        ({"distillation": {"alpha": True}}, "distillation: alpha must be a number"),
        ({"cautious": "no"}, "cautious must be True or False, got 'no'"),
        ({"distilation": {}}, "unexpected keyword argument 'distilation'"),
    ],
)
def test_wrong_types_and_names(fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=words):
        QATArguments(output_dir=str(tmp_path), **fields)
