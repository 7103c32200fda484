"""The figures of each layer over a run: values, file, resume, plot; and what watching a weight says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_bitnet.surgery import trained_layers
from hf_bitnet.training.layer_history import FILE
from hf_bitnet.training.monitor import QuantMonitor
from tests.qat import ONE_LAYER, losses, make_trainer, quantized


def test_figures_of_each_layer(tmp_path: Path) -> None:
    model = quantized(overrides={r"q_proj": {"weight": "int8"}})
    before = {name: layer.quantized_weight().codes.clone() for name, layer in trained_layers(model)}
    trainer = make_trainer(tmp_path, model, max_steps=2, logging_steps=2, learning_rate=1e-2)
    trainer.train()
    (entry,) = trainer.quant_history.entries
    (log,) = losses(trainer)
    assert entry["step"] == 2
    assert entry["layers"] == list(before)
    for index, (name, layer) in enumerate(trained_layers(model)):
        quantized_weight, weight = layer.quantized_weight(), layer.weight.detach()
        value = quantized_weight.dequantize()
        sqnr = 10 * torch.log10(weight.square().sum() / (weight - value).square().sum())
        cosine = torch.cosine_similarity(weight.flatten(), value.flatten(), dim=0)
        expected = {
            "flip_rate": (quantized_weight.codes != before[name]).float().mean(),
            "zero_fraction": (quantized_weight.codes == 0).float().mean(),
            "sqnr_db": sqnr,
            "cosine": cosine,
        }
        for key, number in expected.items():
            assert entry[key][index] == pytest.approx(float(number), rel=1e-3), (name, key)
    count = len(before)
    assert log["quant/sqnr_db"] == pytest.approx(sum(entry["sqnr_db"]) / count, rel=1e-3)
    assert log["quant/cosine"] == pytest.approx(sum(entry["cosine"]) / count, rel=1e-3)
    worst = trainer.quant_history.worst()
    assert log["quant/worst_sqnr_db"] == pytest.approx(worst[0][1], rel=1e-3)
    assert {name for name, _ in worst[-2:]} == {name for name in before if "q_proj" in name}


def test_of_a_weight_on_the_grid_and_of_an_empty_one() -> None:
    model = quantized(model=ONE_LAYER)
    for _, layer in trained_layers(model):
        layer.weight.data = layer.quantized_weight().dequantize()
    trained_layers(model)[0][1].weight.data.zero_()
    figures = QuantMonitor(True).measure(model)
    assert figures is not None and torch.isfinite(figures).all()


class _Stop(tf.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise InterruptedError


def test_file_and_resume(tmp_path: Path) -> None:
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", quantized(model=ONE_LAYER), **fields)
    whole.train()
    lines = [json.loads(line) for line in (tmp_path / "whole" / FILE).read_text().splitlines()]
    assert lines == whole.quant_history.entries
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "half", quantized(model=ONE_LAYER), callbacks=[_Stop()], **fields).train()
    with (tmp_path / "half" / FILE).open("a") as file:
        file.write('{"step": 4, "lay')  # killed while it was written
    resumed = make_trainer(tmp_path / "half", quantized(model=ONE_LAYER), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.quant_history.entries] == [1, 2, 3, 4, 5, 6]
    assert resumed.quant_history.entries[-2:] == whole.quant_history.entries[-2:]
    assert (tmp_path / "half" / FILE).read_text().splitlines()[-1] == json.dumps(whole.quant_history.entries[-1])


def test_nothing_without_quant_logging(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(model=ONE_LAYER), quant_logging=False, max_steps=1)
    trainer.train()
    assert not trainer.quant_history.entries
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ValueError, match="nothing was logged yet; train with quant_logging=True"):
        trainer.quant_history.worst()


def test_plot(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(model=ONE_LAYER), max_steps=3)
    trainer.train()
    with pytest.raises(ValueError, match="unknown figure 'sqnr'; legal: 'flip_rate', 'zero_fraction', 'sqnr_db', 'cosine'"):
        trainer.quant_history.worst("sqnr")
    pytest.importorskip("matplotlib")
    trainer.quant_history.plot(tmp_path / "layers.png", "flip_rate")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
