"""QATArguments: defaults, command line, errors that say what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import HfArgumentParser

from hf_bitnet import QATArguments


def test_command_line(tmp_path: Path) -> None:
    line = [
        "--output_dir",
        str(tmp_path),
        "--strength_schedule",
        "cosine",
        "--strength_end",
        "0.5",
        "--distillation",
        '{"alpha": 1}',
    ]
    (args,) = HfArgumentParser(QATArguments).parse_args_into_dataclasses(
        [*line, "--latent_learning_rate", "1e-4", "--no_quant_logging", "--learning_rate", "2e-4"]
    )
    assert (args.strength_schedule, args.strength_end, args.distillation.alpha) == ("cosine", 0.5, 1.0)
    assert (args.latent_learning_rate, args.learning_rate, args.quant_logging) == (1e-4, 2e-4, False)


def test_every_field_has_a_help_text() -> None:
    own = set(QATArguments.__dataclass_fields__) - set(QATArguments.__bases__[0].__dataclass_fields__)
    assert own
    assert not [name for name in own if not QATArguments.__dataclass_fields__[name].metadata.get("help")]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strength_schedule": "cosin"}, "unknown strength schedule 'cosin'; legal: .*Did you mean 'cosine'"),
        ({"strength_end": 300}, "strength_end=300 is out of range; legal: from 0 to 1; it is a fraction"),
        ({"strength_start": -0.1}, "strength_start=-0.1 is out of range"),
        ({"strength_start": 0.5, "strength_end": 0.2}, "strength_start=0.2, strength_end=0.5"),
        ({"strength_steps": 0}, "strength_steps must be a whole number of at least 1, got 0"),
        ({"distillation": {"alpha": 1.5}}, "distillation: alpha=1.5 is out of range; legal: from 0 to 1; 1 learns from the"),
        ({"distillation": {"chunk_token": 1}}, "distillation has no key 'chunk_token'; .*Did you mean 'chunk_tokens'"),
        ({"latent_learning_rate": -1.0}, "latent_learning_rate=-1.0 is out of range"),
        ({"scale_weight_decay": float("nan")}, "scale_weight_decay=nan is out of range"),
    ],
)
def test_values_out_of_range(fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        QATArguments(output_dir=str(tmp_path), **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strength_end": "0.3"}, "strength_end must be a number from 0 to 1, got '0.3'"),
        ({"distillation": {"alpha": True}}, "distillation: alpha must be a number"),
        ({"distilation": {}}, "unexpected keyword argument 'distilation'"),
    ],
)
def test_wrong_types_and_names(fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=words):
        QATArguments(output_dir=str(tmp_path), **fields)
