"""Oscillating weights are held: which, at what code, how they stay there; resume, stages of bits, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bitnet import QATArguments
from hf_bitnet.quantizers import make_weight_quantizer
from hf_bitnet.surgery import trained_layers
from hf_bitnet.training.freezing import FreezingOptions, _Record
from tests.qat import assert_same, losses, make_trainer, quantized, weights

SCHEMES = ("ternary", "binary", "int2", "int2_seq", "int4", "int8")
EAGER = {"threshold": 0.05, "final_threshold": 0.0, "momentum": 0.3, "start": 0.0}


def test_an_oscillation_is_a_flip_back() -> None:
    """0 1 0 1: the second flip and all later ones oscillate. 0 1 1 1 and -1 0 1 1: flips, but none goes back."""
    record = _Record(make_weight_quantizer("ternary", granularity="tensor"), torch.tensor([[0, 0, -1]], dtype=torch.int8))
    for codes in ([1, 1, 0], [0, 1, 1], [1, 1, 1]):
        record.update(torch.tensor([codes], dtype=torch.int8), math.inf, 0.5)
    assert record.frequency.tolist() == [[0.75, 0.0, 0.0]]
    assert record.mean.tolist() == [[0.625, 0.875, 0.625]]
    assert not record.held.any()


def test_held_at_the_usual_code() -> None:
    record = _Record(make_weight_quantizer("ternary", granularity="tensor"), torch.tensor([[1, 1]], dtype=torch.int8))
    for codes in ([1, 1], [0, 1], [1, 1]):
        record.update(torch.tensor([codes], dtype=torch.int8), 0.2, 0.25)
    assert record.held.tolist() == [[True, False]]
    record.update(torch.tensor([[0, 0]], dtype=torch.int8), 0.2, 0.25)  # what the weights would round to now
    assert record.codes.tolist() == [[1, 0]]


def test_flips_across_the_whole_grid_do_not_overflow() -> None:
    record = _Record(make_weight_quantizer("int8"), torch.tensor([[-127]], dtype=torch.int8))
    for code in (127, -127, 127):
        record.update(torch.tensor([[code]], dtype=torch.int8), math.inf, 0.5)
    assert record.frequency.item() == 0.75


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_held_weights_return_into_their_cells(scheme: str, granularity: str) -> None:
    """Whatever a step made of them; by the scale of that moment. The others do not move."""
    quantizer = make_weight_quantizer(scheme, granularity=granularity, group_size=8 if granularity == "group" else None)
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    record = _Record(quantizer, quantizer.quantize(weight).codes)
    record.held[:, ::2] = True
    moved = weight + 0.3 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    scale = quantizer.compute_scale(moved)
    back = moved + record.displacement(moved, scale)
    assert torch.equal(back[:, 1::2], moved[:, 1::2])
    grid = quantizer.grid
    position, level = quantizer.position(moved, scale), (record.codes.float() - grid.lowest) / grid.step
    now = position + (back - moved) / (scale.repeat_interleave(16 // scale.shape[1], 1) * grid.step)
    inside = (now - level).abs() <= 0.4 + 1e-4
    beyond = ((level == 0) & (now < 0)) | ((level == grid.levels - 1) & (now > grid.levels - 1))
    assert (inside | beyond)[:, ::2].all()
    assert (back != moved)[:, ::2].any()


def test_threshold_falls_by_a_cosine() -> None:
    options = FreezingOptions(threshold=0.3, final_threshold=0.1, start=0.5)
    assert options.threshold_at(0.49) == math.inf
    assert [round(options.threshold_at(done), 6) for done in (0.5, 0.75, 1.0)] == [0.3, 0.2, 0.1]


def _run(folder: Path, **fields: Any) -> Any:
    model = quantized()
    trainer = make_trainer(
        folder, model, **{"max_steps": 8, "learning_rate": 0.05, "oscillation_freezing": EAGER, "adam_beta1": 0.0, **fields}
    )
    return model, trainer


def test_a_run_holds_weights(tmp_path: Path) -> None:
    model, trainer = _run(tmp_path)
    held: list[dict[str, torch.Tensor]] = []
    callback = trainer._add_ons[-1]
    finish = callback.finish

    def look(model: Any) -> None:
        held.append({name: (each.held, each.codes) for name, each in callback._records.items()})
        finish(model)

    callback.finish = look
    trainer.train()
    shares = [entry["quant/held"] for entry in trainer.state.log_history if "quant/held" in entry]
    assert shares == sorted(shares) and 0 < shares[-1] < 1
    for name, layer in trained_layers(model):
        mask, codes = held[0][name]
        assert mask.any()
        assert torch.equal(layer.quantized_weight().codes[mask], codes[mask])


def test_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole, trainer = _run(tmp_path / "whole")
    trainer.train()
    _, first = _run(tmp_path / "parts", save_strategy="steps", save_steps=5)
    first.train()
    second, trainer_two = _run(tmp_path / "parts", save_strategy="steps", save_steps=5)
    trainer_two.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert losses(trainer)[5:] == losses(trainer_two)[-3:]
    assert_same(weights(whole), weights(second))


def test_a_stage_of_bits_starts_new_records(tmp_path: Path) -> None:
    stages = {"ramp": "none", "stages": {"int4": 0.5}}
    _, trainer = _run(tmp_path, quantization_schedule=stages)
    trainer.train()
    shares = [entry.get("quant/held", 0.0) for entry in trainer.state.log_history if "loss" in entry]
    assert shares[4] < shares[3]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"threshold": 2}, "oscillation_freezing: threshold=2 is out of range"),
        ({"threshold": 0.1, "final_threshold": 0.2}, "threshold=0.2, final_threshold=0.1"),
        ({"momentum": 1.0}, "for example momentum=0.02"),
        ({"treshold": 0.1}, "Did you mean 'threshold'"),
    ],
)
def test_bad_options(value: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        QATArguments(output_dir=str(tmp_path), oscillation_freezing=value)


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    model, trainer = _run(tmp_path)
    layer = trained_layers(model)[0][1]
    layer.weight.full_tensor = lambda: layer.weight
    with pytest.raises(ValueError, match="are sharded; leave it out, or train without FSDP"):
        trainer.train()
