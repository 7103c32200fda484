"""NaN is named, loss spikes are rolled back, early stopping waits, stuck weights are said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from hf_bitnet import QATArguments
from hf_bitnet.surgery import trained_layers
from hf_bitnet.training.checks import warn_without_labels
from hf_bitnet.training.rollback import RollbackOptions, find_spike
from hf_bitnet.training.stability import PatientEarlyStopping, StuckWatch
from tests.qat import ONE_LAYER, assert_same, losses, make_trainer, quantized, said, weights

# ---- NaN ----


class _Poison(tf.TrainerCallback):
    """Before step 3 something in the model breaks."""

    def __init__(self, do: Any) -> None:
        self.do = do

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.do(kwargs["model"])


def _break_output(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: output * float("inf"))


def _break_weight(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")


def _break_gradient(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight.register_hook(lambda grad: grad * float("nan"))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("do", "words"),
    [
        (_break_output, r"the output of model.layers.1.mlp.up_proj \(BitLinear\) is not finite; its input is finite"),
        (_break_weight, "the parameter model.layers.0.mlp.down_proj.weight is not finite"),
        (_break_gradient, "the gradient of model.layers.1.self_attn.v_proj.weight is not finite"),
    ],
)
def test_nan_is_named(do: Any, words: str, accumulate: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(), callbacks=[_Poison(do)], gradient_accumulation_steps=accumulate)
    with pytest.raises(RuntimeError, match=rf"step 3: the training diverged: the gradient norm is (nan|inf): {words}"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_without_the_guard(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(model=ONE_LAYER), callbacks=[_Poison(_break_weight)], nan_guard=False)
    trainer.train()
    assert math.isnan(losses(trainer)[-1]["grad_norm"])


def test_the_guard_changes_nothing(tmp_path: Path) -> None:
    results = []
    for guard in (False, True):
        model = quantized(model=ONE_LAYER)
        make_trainer(tmp_path, model, nan_guard=guard).train()
        results.append(weights(model))
    assert_same(*results)


# ---- spikes ----

RUN: dict[str, Any] = {
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "latent_learning_rate": 2e-3,
    "spike_rollback": {"window": 3, "factor": 3.0, "retries": 2},
}


def _spiky(folder: Path, above: float, step: int = 6, **fields: Any) -> Any:
    """A run whose loss is 100 times too large in step `step + 1` while the learning rate is above `above`."""
    trainer = make_trainer(folder, quantized(model=ONE_LAYER), **{**RUN, **fields})
    original = trainer.compute_loss

    def compute_loss(*args: Any, **named: Any) -> Any:
        loss = original(*args, **named)
        spikes = trainer.state.global_step == step and trainer.optimizer.param_groups[0]["lr"] > above
        return loss * 100 if spikes and trainer.model.training else loss

    trainer.compute_loss = compute_loss
    return trainer


def _rates(trainer: Any) -> dict[int, float]:
    return {log["step"]: log["learning_rate"] for log in losses(trainer)}


class _Stop(tf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and kwargs["optimizer"].param_groups[0]["lr"] < 1e-3:
            raise InterruptedError


def test_a_spike_is_rolled_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = _spiky(tmp_path, above=6e-4)
    trainer.train()
    assert trainer.state.global_step == 10
    assert max(log["loss"] for log in losses(trainer)) < 50
    assert _rates(trainer) == {step: 1e-3 if step <= 6 else 5e-4 for step in range(1, 11)}
    assert [group["lr"] for group in trainer.optimizer.param_groups if group["name"] == "latent"] == [1e-3]
    (words,) = [line for line in said(caplog) if "back to" in line]
    assert (
        "more than 3 times the median" in words and "back to step 6 with 0.5 times the learning rate (rollback 1 of 2)" in words
    )
    notes = json.loads((tmp_path / "qat_rollbacks.json").read_text())
    assert [(note["step"], note["back_to"]) for note in notes] == [(7, 6)]


@pytest.mark.parametrize("stop", [7, 9])
def test_a_killed_run_with_a_rollback_resumes(stop: int, tmp_path: Path) -> None:
    """Killed before (7) and after (9) a checkpoint that knows of the rollback."""
    whole = _spiky(tmp_path / "whole", above=6e-4)
    whole.train()
    with pytest.raises(InterruptedError):
        _spiky(tmp_path / "half", above=6e-4, callbacks=[_Stop(stop)]).train()
    resumed = _spiky(tmp_path / "half", above=6e-4)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))


def test_retries_are_bounded(tmp_path: Path) -> None:
    trainer = _spiky(tmp_path, above=0.0)
    with pytest.raises(RuntimeError, match=r"step 7: the loss .* after 2 rollbacks already \(retries=2\); lower learning_rate"):
        trainer.train()
    fresh = _spiky(tmp_path, above=1.0)
    fresh.train()  # a new run in the same folder knows nothing of them
    assert set(_rates(fresh).values()) == {1e-3}


def test_no_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no checkpoint up to step 6 to go back to; write save_strategy='steps'"):
        _spiky(tmp_path, above=0.0, save_strategy="no").train()


def test_nan_is_rolled_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = []

    def once(model: Any) -> None:
        if not broken:
            broken.append(True)
            _break_weight(model)

    trainer = make_trainer(tmp_path, quantized(model=ONE_LAYER), callbacks=[_Poison(once)], **RUN)
    trainer.train()
    assert trainer.state.global_step == 10
    assert any(
        "the parameter model.layers.0.mlp.down_proj.weight is not finite; back to step 2" in line for line in said(caplog)
    )


def test_the_decision_is_a_function_of_the_log() -> None:
    options = RollbackOptions(factor=2.0, window=3)
    log: list[dict[str, Any]] = [{"step": step, "loss": 1.0, "quant/strength": 1.0} for step in range(1, 5)]
    assert find_spike(log, options) is None
    assert find_spike([*log, {"step": 5, "loss": 1.9, "quant/strength": 1.0}], options) is None
    spike = find_spike([*log, {"step": 5, "loss": 2.1, "quant/strength": 1.0}], options)
    assert spike is not None and (spike.step, spike.last_good) == (5, 4)
    # another strength is another loss
    assert find_spike([*log, {"step": 5, "loss": 9.0, "quant/strength": 0.5}], options) is None
    assert find_spike([*log[:2], {"step": 3, "loss": 9.0, "quant/strength": 1.0}], options) is None
    spike = find_spike([*log, {"step": 5, "loss": float("nan"), "quant/strength": 0.5}], options)
    assert spike is not None and "the loss is nan" in str(spike)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"factor": 0.5}, "spike_rollback: factor=0.5 is out of range; legal: at least 1; a loss of so many times"),
        ({"slowdown": 2.0}, "spike_rollback: slowdown=2.0 is out of range; legal: from 0 to 1"),
        ({"retries": 0}, "spike_rollback: retries must be a whole number of at least 1"),
        ({"windows": 3}, "spike_rollback has no key 'windows'; .* Did you mean 'window'"),
    ],
)
def test_what_is_refused(value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        QATArguments(output_dir=str(tmp_path), spike_rollback=value)


# ---- early stopping ----


@pytest.mark.parametrize("added", ["constructor", "add_callback", "class"])
def test_early_stopping_waits_for_full_strength(added: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "max_steps": 12,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "quantization_schedule": {"ramp": "linear", "end": 0.5},
        "learning_rate": 0.0,  # nothing ever gets better
        "save_strategy": "no",
    }
    stock: Any = tf.EarlyStoppingCallback if added == "class" else tf.EarlyStoppingCallback(early_stopping_patience=2)
    model = quantized(model=ONE_LAYER)
    trainer = make_trainer(tmp_path, model, **fields, **({} if added == "add_callback" else {"callbacks": [stock]}))
    if added == "add_callback":
        trainer.add_callback(stock)
    assert any(isinstance(each, PatientEarlyStopping) for each in trainer.callback_handler.callbacks)
    trainer.state.best_metric = 0.0
    trainer.train()
    # full strength is used from step 7 on; its evaluation is the first that counts
    assert trainer.state.global_step >= 7
    assert trainer.state.global_step < 12


# ---- weights that do not move ----


def test_stuck_weights_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = quantized(model=ONE_LAYER)
    for _, layer in trained_layers(model):
        layer.weight.data.mul_(1000.0)
    fields = {"learning_rate": 1e-9, "lr_scheduler_type": "constant", "max_steps": 6}
    make_trainer(tmp_path, model, **fields).train()
    words = [line for line in said(caplog) if "of the float weights changed" in line]
    assert len(words) == 1
    assert "step 3: only 0.0 %" in words[0] and "Raise latent_learning_rate" in words[0]


def test_weights_that_adapters_stand_for_are_not_stuck(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = peft.get_peft_model(quantized(model=ONE_LAYER), peft.LoraConfig(target_modules=["q_proj"]))
    make_trainer(tmp_path, model, learning_rate=1e-3, max_steps=6).train()
    assert not [line for line in said(caplog) if "of the float weights changed" in line]


@pytest.mark.parametrize(
    ("name", "value"),
    [("grid_pull", {"every": 1}), ("oscillation_freezing", {}), ("regularizers", {"l2_to_grid": 1e-4})],
)
def test_what_changes_weights_wants_some_that_are_trained(name: str, value: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(quantized(model=ONE_LAYER), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=f"{name} changes quantized weights, and all of them are frozen.* leave it out"):
        make_trainer(tmp_path, model, max_steps=1, **{name: value}).train()
    make_trainer(tmp_path, quantized(model=ONE_LAYER), max_steps=1, **{name: value}).train()


@pytest.mark.parametrize("masked", [True, False])
def test_batches_without_a_label_are_said(masked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
        labels = torch.full_like(ids, -100)
        labels[:, -1 if not masked else ids.shape[1] :] = 3
        return {"input_ids": ids, "labels": labels}

    make_trainer(tmp_path, quantized(model=ONE_LAYER), max_steps=2, data_collator=collate).train()
    assert bool([line for line in said(caplog) if "every label of the first batch is -100" in line]) == masked


def test_batches_that_are_lists_have_no_labels() -> None:
    """Of trainers that make their inputs themselves (GRPO)."""
    warn_without_labels([{"prompt": "a"}])


def test_moving_weights_are_not() -> None:
    watch = StuckWatch()
    for step in range(20):
        watch.look({"quant/latent_changed": 0.0, "learning_rate": 0.0}, step)
        watch.look({"quant/latent_changed": 0.9 if step % 2 else 0.01, "learning_rate": 1e-3}, step)
    assert watch._low >= 0
