"""Token noise of a distillation: which tokens are replaced, by what; the same for teacher and student; resume, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bitnet import DistillationConfig
from hf_bitnet.training.distillation.token_noise import noisy_tokens
from tests.qat import assert_same, losses, make_trainer, quantized, weights


def _batch(rows: int = 64, length: int = 50) -> dict[str, Any]:
    ids = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _changed(batch: dict[str, Any], rate: float, seed: int = 0, step: int = 0) -> Tensor:
    return noisy_tokens(batch, rate, seed, step)["input_ids"] != batch["input_ids"]


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5])
def test_share_of_the_tokens(rate: float) -> None:
    """3200 tokens; one in a thousand is replaced by itself. Five standard deviations."""
    share = float(_changed(_batch(), rate).float().mean())
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / 3200) ** 0.5 + 0.002 * rate


def test_replaced_by_tokens_of_the_batch() -> None:
    batch = _batch(4, 10)
    found = noisy_tokens(batch, 1.0, 0, 0)["input_ids"]
    assert set(found.flatten().tolist()) <= set(batch["input_ids"].flatten().tolist())
    assert found.unique().numel() > 10  # not one token everywhere


def test_labels_and_the_batch_stay() -> None:
    batch = _batch()
    before = batch["input_ids"].clone()
    made = noisy_tokens(batch, 0.5, 0, 0)
    assert torch.equal(batch["input_ids"], before) and made["labels"] is batch["labels"]


def test_padding_neither_goes_nor_comes() -> None:
    batch = _batch(8, 20)
    batch["attention_mask"][:, :12] = 0
    batch["input_ids"][:, :12] = 5000
    made = noisy_tokens(batch, 1.0, 0, 0)["input_ids"]
    assert (made[:, :12] == 5000).all() and (made[:, 12:] != 5000).all()


def test_a_function_of_seed_step_and_tokens() -> None:
    batch = _batch()
    first = _changed(batch, 0.5)
    assert torch.equal(first, _changed(batch, 0.5))
    others = [
        _changed(batch, 0.5, seed=1),
        _changed(batch, 0.5, step=1),
        _changed({"input_ids": batch["input_ids"].flip(0)}, 0.5),
    ]
    for other in others:  # independent: they agree on half of the places
        assert abs(float((first == other).float().mean()) - 0.5) < 0.05


def test_torchs_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    noisy_tokens(_batch(), 0.5, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_teacher_and_student_read_the_same(tmp_path: Path) -> None:
    """At strength 0 the student is its teacher: on different tokens they would differ."""
    model = quantized()
    noise = {"alpha": 1.0, "token_noise": 0.5}
    trainer = make_trainer(
        tmp_path,
        model,
        teacher="self",
        distillation=noise,
        max_steps=2,
        quantization_schedule={"ramp": "step", "start": 0.5, "end": 0.8},
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0


def test_only_training_is_noisy(tmp_path: Path) -> None:
    """Evaluation is that of the run without noise, and the training loss is not."""
    found = []
    for noise in (0.0, 0.5):
        trainer = make_trainer(
            tmp_path / str(noise),
            quantized(),
            teacher="self",
            distillation={"token_noise": noise},
            learning_rate=0.0,
            max_steps=1,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        logs = trainer.state.log_history
        found.append((losses(trainer), [entry["eval_loss"] for entry in logs if "eval_loss" in entry]))
    assert found[0][1] == found[1][1] and found[0][0] != found[1][0]


def test_resumed_run_is_the_same(tmp_path: Path) -> None:
    fields = {"teacher": "self", "distillation": {"alpha": 1.0, "token_noise": 0.3}, "max_steps": 5}
    whole = quantized()
    make_trainer(tmp_path / "whole", whole, **fields).train()
    parts = {**fields, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "parts", quantized(), **parts).train()
    model = quantized()
    make_trainer(tmp_path / "parts", model, **parts).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_same(weights(whole), weights(model))


def test_no_token_ids() -> None:
    with pytest.raises(ValueError, match="token_noise replaces tokens of `input_ids`, and the batch has pixel_values"):
        noisy_tokens({"pixel_values": torch.zeros(1)}, 0.1, 0, 0)


def test_share_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"token_noise=1\.5 is out of range; legal: from 0 to 1; it is a share of the tokens"):
        DistillationConfig(token_noise=1.5)
