"""Token noise of a distillation: which tokens are replaced, by what; the same for teacher and student; resume, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bitnet import DistillationConfig
from hf_bitnet.training.distillation.token_noise import SOURCES, TokenNoise, noisy_tokens
from tests.qat import assert_same, losses, make_trainer, quantized, weights


def _batch(rows: int = 64, length: int = 50) -> dict[str, Any]:
    ids = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _noisy(batch: dict[str, Any], rate: float, seed: int = 0, step: int = 0, logits: Tensor | None = None) -> Tensor:
    """Tokens after the noise; from the teacher where its `logits` (places, V) are given."""
    noise = TokenNoise(rate, "batch" if logits is None else "teacher")

    def logits_of(rows: Tensor) -> Any:
        assert logits is not None
        return lambda part: logits[rows[part]]

    return noisy_tokens(batch, noise, seed, step, logits_of)["input_ids"]


def _changed(batch: dict[str, Any], rate: float, seed: int = 0, step: int = 0) -> Tensor:
    return _noisy(batch, rate, seed, step) != batch["input_ids"]


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5])
def test_share_of_the_tokens(rate: float) -> None:
    """3200 tokens; one in a thousand is replaced by itself. Five standard deviations."""
    share = float(_changed(_batch(), rate).float().mean())
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / 3200) ** 0.5 + 0.002 * rate


def test_replaced_by_tokens_of_the_batch() -> None:
    batch = _batch(4, 10)
    found = _noisy(batch, 1.0)
    assert set(found.flatten().tolist()) <= set(batch["input_ids"].flatten().tolist())
    assert found.unique().numel() > 10  # not one token everywhere


def test_labels_and_the_batch_stay() -> None:
    batch = _batch()
    before = batch["input_ids"].clone()
    made = noisy_tokens(batch, TokenNoise(0.5, "batch"), 0, 0, lambda rows: lambda part: rows)
    assert torch.equal(batch["input_ids"], before) and made["labels"] is batch["labels"]


def test_padding_neither_goes_nor_comes() -> None:
    batch = _batch(8, 20)
    batch["attention_mask"][:, :12] = 0
    batch["input_ids"][:, :12] = 5000
    made = _noisy(batch, 1.0)
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
    _noisy(_batch(), 0.5)
    _noisy(_batch(), 0.5, logits=torch.zeros(3200, 7))
    assert torch.equal(torch.get_rng_state(), before)


def test_teacher_and_student_read_the_same(tmp_path: Path) -> None:
    """At strength 0 the student is its teacher: on different tokens they would differ."""
    model = quantized()
    noise = {"alpha": 1.0, "token_noise": {"rate": 0.5}}
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
    for noise in (None, {"rate": 0.5}):
        trainer = make_trainer(
            tmp_path / str(len(found)),
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


@pytest.mark.parametrize("source", SOURCES)
def test_resumed_run_is_the_same(source: str, tmp_path: Path) -> None:
    fields = {"teacher": "self", "distillation": {"alpha": 1.0, "token_noise": {"rate": 0.3, "source": source}}, "max_steps": 5}
    whole = quantized()
    make_trainer(tmp_path / "whole", whole, **fields).train()
    parts = {**fields, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "parts", quantized(), **parts).train()
    model = quantized()
    make_trainer(tmp_path / "parts", model, **parts).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_same(weights(whole), weights(model))


def test_no_token_ids() -> None:
    with pytest.raises(ValueError, match="token_noise replaces tokens of `input_ids`, and the batch has pixel_values"):
        _noisy({"pixel_values": torch.zeros(1)}, 0.1)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"rate": 1.5}, r"token_noise: rate=1\.5 is out of range; legal: from 0 to 1; it is a share of the tokens"),
        ({"source": "student"}, "token_noise: source='student'; legal: 'teacher', 'batch'"),
        ({"share": 0.1}, "token_noise has no key 'share'"),
    ],
)
def test_bad_options(noise: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillationConfig(token_noise=noise)


# ---- drawn by the teacher ----


def test_drawn_by_what_the_teacher_says_in_front() -> None:
    """A teacher that is sure that t is followed by t + 1: replaced tokens become that, whatever stood there."""
    batch = _batch(8, 20)
    ids = batch["input_ids"]
    logits = torch.full((160, 1001), -50.0)
    logits[torch.arange(160), ids.reshape(-1) + 1] = 50.0
    made = _noisy(batch, 1.0, logits=logits)
    assert torch.equal(made[:, 0], ids[:, 0]) and torch.equal(made[:, 1:], ids[:, :-1] + 1)


def test_drawn_as_often_as_it_says() -> None:
    """Tokens 0, 1, 2 of probability 0.5, 0.3, 0.2 at 3136 places; five standard deviations."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(3200, 3)
    made = _noisy({"input_ids": torch.full((64, 50), 9)}, 1.0, logits=logits)[:, 1:]
    shares = torch.bincount(made.flatten(), minlength=3) / made.numel()
    assert (shares - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 5 * (0.25 / 3136) ** 0.5


def test_nothing_is_drawn_behind_padding() -> None:
    batch = _batch(8, 20)
    batch["attention_mask"][:, :12] = 0
    made = _noisy(batch, 1.0, logits=torch.zeros(160, 1000))
    assert torch.equal(made[:, :13], batch["input_ids"][:, :13]) and (made[:, 13:] != batch["input_ids"][:, 13:]).any()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_teacher_that_draws_no_tokens(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(name), name, teacher="self", distillation={"token_noise": {}})
    with pytest.raises(
        ValueError, match=r"the teacher is a (Bert|T5)\w+; write token_noise=\{'rate': 0.15, 'source': 'batch'\}"
    ):
        trainer.train()


def test_an_encoder_takes_tokens_of_the_batch(tmp_path: Path) -> None:
    noise = {"token_noise": {"rate": 0.5, "source": "batch"}}
    trainer = make_trainer(tmp_path, quantized("bert"), "bert", teacher="self", distillation=noise, max_steps=1)
    trainer.train()
    assert losses(trainer)
