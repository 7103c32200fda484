"""QATSFTTrainer and QATDPOTrainer with the real TRL: packing, masks, streams, references, adapters, teachers."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from hf_bitnet import BitNetQuantizationConfig, QATArguments, quantize_model
from hf_bitnet.modules import PackedBitLinear
from hf_bitnet.surgery import full_precision_copy
from tests.chats import WORDS, chats, tokenizer
from tests.qat import arguments, assert_learned, assert_same, codes, losses, plain, quantized, weights
from tests.tiny import tiny

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
from hf_bitnet.training.trl_trainers import (  # noqa: E402
    QATDPOConfig,
    QATDPOTrainer,
    QATMixin,
    QATSFTConfig,
    QATSFTTrainer,
    TRLMixin,
)

# TRL (1.16) still uses the names that transformers (5.23) has replaced
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

RISING: dict[str, Any] = {"quantization_schedule": {"ramp": "linear", "end": 0.5}}


def completions() -> list[dict[str, str]]:
    return [{"prompt": "a b", "completion": " c d e" if index % 2 else " c d"} for index in range(32)]


def pairs() -> Dataset:
    return Dataset.from_list([{"prompt": "a b", "chosen": " c d e", "rejected": " f g"} for _ in range(8)])


def fields(folder: Path, **other: Any) -> dict[str, Any]:
    base = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    machine = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2}
    return {"output_dir": str(folder)} | base | machine | other


def sft(folder: Path, model: Any, data: Any = None, *, teacher: Any = None, peft_config: Any = None, **other: Any) -> Any:
    data = chats() if data is None else data
    named = {
        "eval_dataset": other.pop("eval_dataset", None),
        "processing_class": tokenizer(),
        "peft_config": peft_config,
        "teacher": teacher,
    }
    return QATSFTTrainer(model, QATSFTConfig(**fields(folder, **other)), train_dataset=data, **named)


def dpo(folder: Path, model: Any, *, ref_model: Any = None, peft_config: Any = None, **other: Any) -> Any:
    args = QATDPOConfig(**fields(folder, **other))
    named = {"processing_class": tokenizer(), "peft_config": peft_config}
    return QATDPOTrainer(model, ref_model, args, train_dataset=pairs(), **named)


# ---- SFT ----


def test_sft_packed_chats_train_on_assistants_only(tmp_path: Path) -> None:
    packing = {"packing": True, "max_length": 32, "assistant_only_loss": True, "gradient_accumulation_steps": 2}
    trainer = sft(tmp_path, quantized(), **packing, **RISING)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["position_ids"].eq(0).sum() > 2  # several chats in a row, each with positions of its own
    said = [WORDS[i] for i in batch["input_ids"][batch["labels"] != -100]]
    assert set(said) <= {"d", "e", "f", "g", "[eos]"} and said.count("[eos]") == batch["position_ids"].eq(0).sum()
    trainer.train()
    assert_learned(trainer, tmp_path / "saved")
    logs = losses(trainer)
    assert [log["quant/strength"] for log in logs] == [0.0, 0.5, 1.0, 1.0]
    assert logs[-1]["mean_token_accuracy"] > logs[0]["mean_token_accuracy"]  # TRL's own metrics are still there


def test_sft_is_trl_s_own_at_full_strength(tmp_path: Path) -> None:
    data = {"train_dataset": chats(), "processing_class": tokenizer()}
    args = fields(tmp_path, gradient_accumulation_steps=2)
    theirs = trl.SFTTrainer(quantized(), trl.SFTConfig(**args), **data)
    ours = QATSFTTrainer(quantized(), QATSFTConfig(**args), **data)
    assert ours.args.bf16 and ours.args.gradient_checkpointing
    assert_same_runs(theirs, ours)


def assert_same_runs(theirs: Any, ours: Any) -> None:
    for trainer in (theirs, ours):
        trainer.train()
    assert [log["loss"] for log in losses(theirs)] == [log["loss"] for log in losses(ours)]
    assert_same(weights(theirs.model), weights(ours.model))


def test_sft_streams_completions_and_resumes_exactly(tmp_path: Path) -> None:
    def stream() -> IterableDataset:
        return Dataset.from_list(completions()).to_iterable_dataset()

    saved = {"save_strategy": "steps", "save_steps": 2, **RISING}
    whole = sft(tmp_path, quantized(), stream(), **saved)
    batch = next(iter(whole.get_train_dataloader()))
    assert not {WORDS[i] for i in batch["input_ids"][batch["labels"] != -100]} & {"a", "b"}
    whole.train()
    assert_learned(whole, tmp_path / "saved")
    card = ModelCard.load(tmp_path / "README.md")  # TRL writes one with each checkpoint
    assert {"hf_bitnet", "quantized", "trl", "sft"} <= set(card.data.tags) and "| max_steps |" not in card.text
    assert str(tmp_path) not in str(card) and "| save_strategy |" not in card.text
    whole.create_model_card("stories-ternary", "someone/stories", ["mine"])  # in TRL's order, not in Trainer's
    written = ModelCard.load(tmp_path / "README.md")
    assert "# stories-ternary" in written.text and "mine" in written.data.tags
    again = sft(tmp_path, quantized(seed=3), stream(), **saved)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(whole.model), weights(again.model))


def test_sft_learns_from_a_teacher(tmp_path: Path) -> None:
    trainer = sft(tmp_path, quantized(), teacher="self", packing=True, max_length=32)
    trainer.train()
    logs = losses(trainer)
    assert_learned(trainer, tmp_path / "saved")
    assert logs[0]["distill/kl"] > 0.01  # the teacher is a copy in full precision, and not the student under its name
    assert logs[0]["loss"] == pytest.approx(0.5 * (logs[0]["distill/kl"] + logs[0]["distill/ce"]), rel=1e-4)


def test_sft_evaluates_the_quantized_model(tmp_path: Path) -> None:
    rising = {"quantization_schedule": {"ramp": "step", "end": 0.9}, "eval_strategy": "steps", "eval_steps": 2}
    trainer = sft(tmp_path, quantized(), eval_dataset=chats(4), **rising)
    trainer.train()
    measured = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["eval_strength"] for log in measured] == [1.0, 1.0]
    assert all("eval_entropy" in log for log in measured)


# ---- DPO ----


def test_dpo_against_the_quantized_model(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, quantized())
    reference = weights(trainer.ref_model)
    assert isinstance(trainer.ref_model.model.layers[0].self_attn.q_proj, PackedBitLinear)
    trainer.train()
    assert_learned(trainer, tmp_path / "saved")
    logs = losses(trainer)
    # policy and reference start equal, bit for bit
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and logs[0]["rewards/margins"] == 0.0
    assert logs[-1]["rewards/margins"] > 0
    assert_same(reference, weights(trainer.ref_model))


def test_dpo_is_trl_s_own_at_full_strength(tmp_path: Path) -> None:
    data = {"train_dataset": pairs(), "processing_class": tokenizer()}
    args = fields(tmp_path, gradient_accumulation_steps=2)
    theirs = trl.DPOTrainer(quantized(), quantized(), trl.DPOConfig(**args), **data)  # a reference in train form
    assert_same_runs(theirs, QATDPOTrainer(quantized(), args=QATDPOConfig(**args), **data))


def test_dpo_reference_computed_before(tmp_path: Path) -> None:
    runs = []
    for computed in (False, True):
        trainer = dpo(tmp_path, quantized(), precompute_ref_log_probs=computed)
        assert (trainer.ref_model is None) == computed
        trainer.train()
        runs.append([log["loss"] for log in losses(trainer)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_dpo_after_sft_and_with_a_reference_that_follows(tmp_path: Path) -> None:
    model = quantized()
    sft(tmp_path, model, max_steps=1).train()
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, "max_steps": 2}
    trainer = dpo(tmp_path, model, **moving)
    before = weights(trainer.ref_model)
    assert_same(before, weights(model))
    assert trainer.ref_model.forward.__self__ is trainer.ref_model
    trainer.train()
    assert_same(weights(trainer.ref_model), weights(trainer.model))
    assert any(not torch.equal(tensor, trainer.ref_model.state_dict()[name]) for name, tensor in before.items())


def test_dpo_with_a_reference_in_full_precision(tmp_path: Path) -> None:
    model = quantized()
    trainer = dpo(tmp_path, model, ref_model=full_precision_copy(model), **RISING)
    trainer.train()
    assert losses(trainer)[0]["rewards/margins"] == pytest.approx(0.0, abs=0.02)  # strength 0 is full precision, too
    assert_learned(trainer, tmp_path / "saved")


# ---- another trainer of TRL ----


@dataclass
class _Config(trl.RewardConfig, QATArguments):
    pass


class _Rewards(TRLMixin, trl.RewardTrainer):
    arguments_class = _Config


def test_reward_trainer_with_the_mixin(tmp_path: Path) -> None:
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**tiny("llama")[0].config.to_diff_dict() | {"num_labels": 1}))
    quantize_model(model, BitNetQuantizationConfig())
    args = _Config(**fields(tmp_path, gradient_accumulation_steps=2, **RISING))
    trainer = _Rewards(model, args, train_dataset=pairs(), processing_class=tokenizer())
    trainer.train()
    assert_learned(trainer, tmp_path / "saved")


# ---- adapters ----


@pytest.mark.parametrize("make", [sft, dpo])
def test_adapters_leave_the_codes_alone(make: Any, tmp_path: Path) -> None:
    model = quantized()
    before = codes(model)
    trainer = make(tmp_path, model, peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    logs = losses(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["quant/flip_rate"] == 0.0
    after = codes(trainer.model)
    assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    if make is dpo:
        assert trainer.ref_model is None and logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# ---- refused ----


def test_quantized_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the output head is quantized.*Leave output_head out"):
        sft(tmp_path, quantized(output_head="int8"))


def test_teachers_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"QATDPOTrainer has a loss of its own.*leave `teacher` out"):
        QATDPOTrainer(quantized(), teacher="self", args=QATDPOConfig(**fields(tmp_path)), train_dataset=pairs())
    with pytest.raises(ValueError, match=r"teacher='cached': TRL cuts and packs"):
        sft(tmp_path, quantized(), teacher="cached")


def test_model_and_arguments_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"QATSFTTrainer takes QATSFTConfig, got QATArguments; it has all fields of SFTConfig"):
        QATSFTTrainer(quantized(), arguments(tmp_path), train_dataset=chats())
    with pytest.raises(ValueError, match="has no quantized layer"):
        dpo(tmp_path, plain())


def test_missing_trl_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hf_bitnet.training.trl_trainers")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install trl"):
        importlib.import_module("hf_bitnet.training.trl_trainers")


# ---- what both of them keep in the trainer ----


def test_no_attribute_of_trl_is_taken(tmp_path: Path) -> None:
    ours = set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", inspect.getsource(QATMixin))) - set(vars(tf.Trainer))
    assert "_qat_metrics" in ours
    data = {"train_dataset": chats(), "processing_class": tokenizer()}
    theirs = set(vars(trl.SFTTrainer(quantized(), trl.SFTConfig(**fields(tmp_path)), **data)))
    names = {name for name in theirs if name not in vars(tf.Trainer(quantized(), arguments(tmp_path)))}
    assert "_metrics" in names
    assert not ours & names
    methods = {name for name in vars(QATMixin) if not hasattr(tf.Trainer, name) and not name.startswith("__")}
    assert not methods & (set(dir(trl.SFTTrainer)) | set(dir(trl.DPOTrainer)))
