"""The two-stage schedule: values, weight decay, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_bitnet import QATArguments
from hf_bitnet.training.learning_rate import TwoStage
from tests.qat import ONE_LAYER, assert_same, losses, make_trainer, quantized, weights

RUN: dict[str, Any] = {
    "max_steps": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "two_stage": {},
    "save_strategy": "steps",
    "save_steps": 1,
    "scale_learning_rate": 6e-3,
}


class _Watch(tf.TrainerCallback):
    def __init__(self, stop: int = 0) -> None:
        self.seen: list[dict[str, tuple[float, float]]] = []
        self.stop = stop

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.seen.append({f"{g['name']} {i}": (float(g["lr"]), g["weight_decay"]) for i, g in enumerate(groups)})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop:
            raise InterruptedError


def _model() -> tf.PreTrainedModel:
    return quantized(model=ONE_LAYER, weight_scale="learned")


def test_values(tmp_path: Path) -> None:
    watch = _Watch()
    make_trainer(tmp_path, _model(), callbacks=[watch], **RUN).train()
    factors = [0.0, 0.5, 1.0, 5 / 6, 2 / 3 * 4 / 6, 2 / 3 * 3 / 6, 2 / 3 * 2 / 6, 2 / 3 * 1 / 6]
    names = {name.split()[0] for name in watch.seen[0]}
    assert names == {"rest", "latent", "scale"}
    for step, (factor, groups) in enumerate(zip(factors, watch.seen, strict=True)):
        for name, (rate, decay) in groups.items():
            assert rate == pytest.approx(factor * (6e-3 if "scale" in name else 3e-3))
            if name.startswith("latent"):
                assert decay == (0.1 if step < 4 else 0.0)
    assert {decay for groups in watch.seen[4:] for _, decay in groups.values()} == {0.0}


def test_flat_stages() -> None:
    flat = TwoStage(at=0.25, drop=0.5, decay="none")
    assert [flat.factor(step, 1, 8) for step in range(9)] == [0.0, 1.0, *[0.5] * 7]


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resume(stop: int, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", _model(), **RUN)
    whole.train()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "half", _model(), callbacks=[_Watch(stop)], **RUN).train()
    resumed = make_trainer(tmp_path / "half", _model(), **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))


def test_with_a_scheduler_of_the_users(tmp_path: Path) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="two_stage cannot be used: a scheduler was passed in"):
        make_trainer(tmp_path, model, two_stage={}, optimizers=(optimizer, scheduler)).train()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"two_stage": {"at": 4000}}, "two_stage: at=4000 is out of range; legal: from 0 to 1; it is a fraction"),
        ({"two_stage": {"drop": 2}}, "two_stage: drop=2 is out of range"),
        ({"two_stage": {"decay": "cosine"}}, "two_stage: unknown decay 'cosine'; legal: 'linear', 'none'"),
        ({"two_stage": {"half": 0.5}}, "two_stage has no key 'half'; legal: 'at', 'drop', 'decay'"),
        ({"two_stage": {}, "lr_scheduler_type": "cosine"}, "two_stage and lr_scheduler_type='cosine' both name a schedule"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        QATArguments(output_dir=str(tmp_path), **fields)


def test_is_saved_as_json(tmp_path: Path) -> None:
    args = QATArguments(output_dir=str(tmp_path), two_stage='{"at": 0.6}', use_cpu=True)
    assert args.two_stage == TwoStage(at=0.6)
    written = args.to_dict()
    assert written["two_stage"] == {"at": 0.6, "drop": 2 / 3, "decay": "linear"}
    assert QATArguments(output_dir=str(tmp_path), two_stage=written["two_stage"], use_cpu=True).two_stage == args.two_stage
