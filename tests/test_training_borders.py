"""Runs that leave the usual way: steps without labels, models made late, checkpoints between stages, runs of a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import Dataset, SequentialSampler

from hf_bitnet import BitNetQuantizationConfig, QATTrainer, quantize_model
from hf_bitnet.surgery import trained_layers
from tests.qat import arguments, assert_same, examples, losses, make_trainer, plain, quantized, weights
from tests.tiny import tiny

# ---- losses ----


@pytest.mark.parametrize("kind", [tf.LlamaForSequenceClassification, tf.LlamaForTokenClassification, tf.BartForCausalLM])
def test_accumulated_losses_of_models_that_hand_nothing_on(kind: Any, tmp_path: Path) -> None:
    """Their forward calls `self.loss_function` without the number of items, and takes it all the same."""
    data: Any = examples()
    if kind is tf.LlamaForSequenceClassification:
        data = [{**example, "labels": torch.tensor(i % 2)} for i, example in enumerate(data)]
    elif kind is tf.LlamaForTokenClassification:
        data = [{**example, "labels": example["labels"].clamp(min=0) % 2} for example in data]
    config = tiny("llama")[0].config
    if kind is tf.BartForCausalLM:
        config = tf.BartConfig(d_model=48, decoder_layers=1, decoder_ffn_dim=96, decoder_attention_heads=4, vocab_size=96)
    found, logged = {}, {}
    for batch, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = quantize_model(kind(type(config)(**{**config.to_dict(), "dropout": 0.0})).eval(), BitNetQuantizationConfig())
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 1}
        fields = {"optim": "sgd", "max_grad_norm": 0.0, "train_dataset": data, "eval_dataset": None}
        trainer = make_trainer(tmp_path, model, **fields, **sizes)
        trainer.train()
        logged[batch] = losses(trainer)[0]["loss"]
        found[batch] = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert logged[2] == pytest.approx(logged[8], rel=1e-3)
    assert (found[2] - found[8]).norm() < 5e-2 * found[8].norm()


class _InOrder(QATTrainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(range(len(self.train_dataset)))  # type: ignore[arg-type]


class _Listed(Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_label_teaches_nothing(accumulate: int, tmp_path: Path) -> None:
    data = examples(number=12 * accumulate)
    for example in data[4 * accumulate : 8 * accumulate]:
        example["labels"] = torch.full_like(example["labels"], -100)
    fields = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulate}
    trainer = _InOrder(
        model=quantized(), args=arguments(tmp_path, **fields), train_dataset=_Listed(data), teacher=plain(seed=3)
    )
    trainer.train()
    first, empty, last = losses(trainer)
    assert empty["loss"] == 0.0 and first["loss"] > 0 and last["loss"] > 0


@pytest.mark.parametrize("term", ["hidden", "relations"])
def test_a_model_made_by_train_is_the_student(term: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"teacher": plain(seed=3), "distillation": {term: {}}, "max_steps": 2}
    late = make_trainer(tmp_path / "late", None, model_init=lambda: quantized(), **fields)
    early = make_trainer(tmp_path / "early", quantized(), **fields)
    for trainer in (late, early):
        trainer.train()
    assert losses(late) == losses(early)


@pytest.mark.parametrize("reentrant", [False, True])
def test_relations_need_gradients_below_a_checkpoint(reentrant: bool, tmp_path: Path) -> None:
    fields = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(tmp_path, quantized(), teacher=plain(seed=3), distillation={"relations": {}}, max_steps=1, **fields)
    if not reentrant:
        trainer.train()
        return
    with pytest.raises(ValueError, match=r"is computed without a gradient.*kwargs=\{'use_reentrant': False\}"):
        trainer.train()


def test_the_best_of_soft_models_is_refused(tmp_path: Path) -> None:
    fields = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2}
    fields |= {"eval_steps": 2, "quantization_schedule": "linear"}
    with pytest.raises(ValueError, match="would compare evaluations at different strengths"):
        make_trainer(tmp_path, quantized(), eval_at_full_strength=False, **fields)
    make_trainer(tmp_path, quantized(), **fields)


# ---- a run goes on ----


def test_records_of_an_ended_stage_are_not_taken_for_the_next(tmp_path: Path) -> None:
    """The checkpoint at the end of a stage has its int4 codes; the next step is ternary."""
    freezing = {"threshold": 0.05, "final_threshold": 0.01, "momentum": 0.2, "start": 0.25}
    fields: dict[str, Any] = {
        "max_steps": 12,
        "quantization_schedule": {"ramp": "none", "stages": {"int4": 6}},
        "oscillation_freezing": freezing,
        "save_strategy": "steps",
        "save_steps": 6,
        "learning_rate": 3e-2,
        "train_dataset": examples(number=4),
    }
    whole, resumed = (make_trainer(tmp_path, quantized(), **fields) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert any(log.get("quant/held") for log in losses(whole)[:6])
    assert losses(resumed)[-6:] == losses(whole)[6:]
    assert_same(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_that_was_passed_over_is_not_resumed(tmp_path: Path) -> None:
    run: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, quantized(), **run).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no complete checkpoint to resume from \(checkpoint-2: no state of the optimizer\)"):
        make_trainer(tmp_path, quantized(), **run | {"max_steps": 4}).train(resume_from_checkpoint=True)


class _Decays(tf.TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(max(group["weight_decay"] for group in kwargs["optimizer"].param_groups))


def test_a_second_run_decays_as_the_first(tmp_path: Path) -> None:
    seen = _Decays()
    trainer = make_trainer(tmp_path, quantized(), max_steps=4, two_stage={}, weight_decay=0.1, callbacks=[seen])
    trainer.train()
    trainer.train()
    assert seen.seen == [0.1, 0.1, 0.0, 0.0] * 2


# ---- rollbacks ----


@pytest.mark.parametrize("logging", [True, False])
def test_quantization_that_sets_in_is_no_spike(logging: bool, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        quantized(),
        max_steps=40,
        quant_logging=logging,
        quantization_schedule={"ramp": "step", "stairs": 1, "start": 10, "end": 20},
        spike_rollback={"factor": 1.2, "window": 3},
        save_strategy="steps",
        save_steps=5,
        learning_rate=2e-2,
        train_dataset=examples(number=4),
    )
    trainer.train()
    assert trainer._rollbacks is not None and not trainer._rollbacks.done


class _Breaks(tf.TrainerCallback):
    """Before two of the steps, once each, the output head becomes thirty times as large."""

    def __init__(self) -> None:
        self.left = [9, 14]

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left and state.global_step == self.left[0]:
            self.left.pop(0)
            kwargs["model"].lm_head.weight.mul_(30)


@pytest.mark.parametrize("only_model", [True, False])
def test_each_rollback_slows_down(only_model: bool, tmp_path: Path) -> None:
    """A checkpoint without the optimizer's state brings the first rate again, and not that of its own time."""
    trainer = make_trainer(
        tmp_path,
        quantized(),
        max_steps=16,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        spike_rollback={"window": 2, "factor": 2.0},
        save_strategy="steps",
        save_steps=3,
        save_only_model=only_model,
        train_dataset=examples(number=4),
        callbacks=[_Breaks()],
    )
    trainer.train()
    assert trainer._rollbacks is not None and len(trainer._rollbacks.done) == 2
    assert losses(trainer)[-1]["learning_rate"] == pytest.approx(2.5e-4)


# ---- ranges ----


def _experts() -> Any:
    return quantized("mixtral", activation="int8_static", model={"num_local_experts": 16, "num_experts_per_tok": 1})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_experts_that_are_chosen_late_get_a_range(accumulate: int, tmp_path: Path) -> None:
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulate, "max_steps": 3}
    model = _experts()
    trainer = make_trainer(tmp_path, model, "mixtral", online_calibration={"every": 50}, **fields)
    trainer.train()
    assert all(log["loss"] > 0 for log in losses(trainer))
    assert not any(layer._forward_pre_hooks for _, layer in trained_layers(model))


def test_ranges_before_the_first_step(tmp_path: Path) -> None:
    fields = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = make_trainer(tmp_path, quantized(activation="int8_static"), online_calibration={}, **fields)
    trainer.train()
    measured = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(measured) == 2 and all(loss > 0 for loss in measured)


class _Broadcast(tf.TrainerCallback):
    """What DDP's broadcast of buffers does where the first rank was not reached."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            for _, layer in trained_layers(kwargs["model"]):
                layer.act_scale.zero_()  # type: ignore[union-attr]


def test_first_ranges_come_back(tmp_path: Path) -> None:
    model = quantized(activation="int8_static")
    trainer = make_trainer(tmp_path, model, online_calibration={}, eval_on_start=True, max_steps=2, callbacks=[_Broadcast()])
    trainer.train()
    assert all(log["loss"] > 0 for log in losses(trainer))
    assert all(float(layer.act_scale) > 0 for _, layer in trained_layers(model))  # type: ignore[arg-type]
