"""Online calibration: what a range becomes, when it stays, resume, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_bitnet import pack_model
from hf_bitnet.surgery import trained_layers
from tests.qat import assert_same, examples, losses, make_trainer, quantized, weights

ONE: dict[str, Any] = {"every": 1, "momentum": 0.0, "percentile": 100.0, "until": 1.0}


def _static(name: str = "llama") -> tf.PreTrainedModel:
    return quantized(name, activation="int8_static")


def _ranges(model: Any) -> dict[str, float]:
    return {name: float(layer.act_scale) for name, layer in trained_layers(model)}


class _Peaks(tf.TrainerCallback):
    """Largest magnitude that each layer of a model saw in each micro-batch, by hooks of its own."""

    def __init__(self, model: Any, stop: int = 0) -> None:
        self.seen: dict[str, list[float]] = {name: [] for name, _ in trained_layers(model)}
        self.ranges: list[dict[str, float]] = []
        self.stop = stop
        for name, layer in trained_layers(model):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: self.seen[name].append(float(args[0].detach().abs().max()))
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ranges.append(_ranges(kwargs["model"]))
        if state.global_step == self.stop:
            raise InterruptedError


def test_a_range_is_what_was_seen(tmp_path: Path) -> None:
    model = _static()
    peaks = _Peaks(model)
    fields = {"gradient_accumulation_steps": 2, "max_steps": 1, "per_device_train_batch_size": 2}
    make_trainer(tmp_path, model, callbacks=[peaks], online_calibration={**ONE, "samples": 1}, **fields).train()
    for name, scale in _ranges(model).items():
        assert len(peaks.seen[name]) == 2
        assert scale == pytest.approx(peaks.seen[name][0] / 127, rel=1e-5)  # of two micro-batches one is watched


def test_a_range_moves_by_the_momentum(tmp_path: Path) -> None:
    model = _static()
    for _, layer in trained_layers(model):
        layer.act_scale.fill_(1.0)
    peaks = _Peaks(model)
    make_trainer(tmp_path, model, callbacks=[peaks], max_steps=1, online_calibration={**ONE, "momentum": 0.75}).train()
    for name, scale in _ranges(model).items():
        assert scale == pytest.approx(0.75 + 0.25 * peaks.seen[name][0] / 127, rel=1e-5)


def test_ranges_stay_at_the_end_and_between(tmp_path: Path) -> None:
    model = _static()
    peaks = _Peaks(model)
    fields = {"max_steps": 8, "learning_rate": 1e-2, "online_calibration": {**ONE, "every": 2, "until": 0.5}}
    make_trainer(tmp_path, model, callbacks=[peaks], **fields).train()
    first, *others = peaks.ranges
    assert others[0] == first  # step 2 of "every 2" is not watched
    assert others[1] != first
    assert all(each == others[2] for each in others[3:])
    assert not any(layer._forward_pre_hooks for _, layer in trained_layers(quantized()))


def test_resume_equals_no_stop(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "online_calibration": {"every": 2}}
    whole = make_trainer(tmp_path / "whole", _static(), **fields)
    whole.train()
    stopped = _static()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "half", stopped, callbacks=[_Peaks(stopped, stop=3)], **fields).train()
    resumed = make_trainer(tmp_path / "half", _static(), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))


def test_what_was_trained_is_packed(tmp_path: Path) -> None:
    model = _static()
    make_trainer(tmp_path, model, online_calibration={"every": 2}, activation_checkpointing=True).train()
    ids = examples()[0]["input_ids"][None]
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        packed = pack_model(model)(input_ids=ids).logits
    torch.testing.assert_close(packed, trained, rtol=1e-4, atol=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layer has a static activation range; quantize with .*int8_static"):
        make_trainer(tmp_path, quantized(), online_calibration={}).train()
    with pytest.raises(ValueError, match="hooks, which a compiled model does not call; leave torch_compile out"):
        make_trainer(tmp_path, _static(), online_calibration={}, torch_compile=True).train()
    with pytest.raises(ValueError, match="static activation range that was never calibrated"):
        make_trainer(tmp_path, _static()).train()
