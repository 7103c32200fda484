"""QATTrainer: the loss and its accumulation, the strength."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_bitnet import BitNetQuantizationConfig, quantize_model, set_norm_blend, set_strength
from hf_bitnet.surgery import full_precision_copy, quantized_layers, trained_layers
from hf_bitnet.training import quantization_schedule
from hf_bitnet.training.distillation.alignment import labels_are_next
from tests.qat import arguments, assert_same, examples, losses, make_trainer, plain, quantized, said, weights
from tests.tiny import FAMILIES, tiny

# strength 0 in the first of two steps
SOFT_START = {"ramp": "linear", "end": 0.5}

# ---- the loss ----


def _update(name: str, folder: Path, teacher: Any, batch: int, accumulate: int, **fields: Any) -> torch.Tensor:
    """What one step of plain gradient descent adds to the weights."""
    model = quantized(name)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    descent = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.5, "max_steps": 1}
    make_trainer(folder, model, name, teacher, **(descent | sizes | fields)).train()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


# every family and every loss in the fast tests, the rest of the product in the slow ones
FAST = [("llama", None), ("llama", 0.5), ("bert", 0.5), ("t5", 0.5), ("gpt2", 1.0)]
SLOW = [pair for pair in product(("llama", "bert", "t5", "gpt2"), (None, 0.5, 1.0)) if pair not in FAST]


@pytest.mark.parametrize(("name", "alpha"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_accumulation_of_4x2_equals_8(name: str, alpha: float | None, tmp_path: Path) -> None:
    teacher = None if alpha is None else tiny(name, seed=1)[0]
    whole = _update(name, tmp_path, teacher, 8, 1, distillation=None if alpha is None else {"alpha": alpha})
    parts = _update(name, tmp_path, teacher, 2, 4, distillation=None if alpha is None else {"alpha": alpha})
    assert whole.norm() > 0
    assert (parts - whole).norm() < 1e-3 * whole.norm()


def test_distillation_equals_the_formula_in_the_trainer(tmp_path: Path) -> None:
    model, teacher = quantized(), tiny("llama", seed=1)[0]
    batch = {key: torch.stack([example[key] for example in examples()[:4]]) for key in examples()[0]}
    alpha, temperature = 0.3, 2.0
    reference = copy.deepcopy(model)
    labels = batch["labels"][:, 1:]
    s, t = (net(input_ids=batch["input_ids"]).logits[:, :-1][labels != -100] for net in (reference, teacher))
    kl = nn.functional.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="batchmean")
    loss = alpha * temperature**2 * kl + (1 - alpha) * nn.functional.cross_entropy(s, labels[labels != -100])
    loss.backward()

    for chunk in (1024, 5):
        fields = {"distillation": {"alpha": alpha, "temperature": temperature, "chunk_tokens": chunk}}
        trainer = make_trainer(tmp_path, model, teacher=teacher, **fields)
        model.train()
        model.zero_grad()
        got = trainer.compute_loss(model, batch, num_items_in_batch=(labels != -100).sum())
        got.backward()
        torch.testing.assert_close(got, loss)
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


# an own head, a tied one, labels that are not shifted
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "t5", *(pytest.param(each, marks=pytest.mark.slow) for each in ("bert", "gemma3"))]
)
def test_head_and_logits_give_the_same_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = _update(name, tmp_path, "self", 4, 1)
    monkeypatch.setattr("hf_bitnet.training.distillation.distiller.logits_are_plain", lambda *_: False)
    slow = _update(name, tmp_path, "self", 4, 1)
    assert (fast - slow).norm() < 1e-3 * slow.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_distils(name: str, tmp_path: Path) -> None:
    """At strength 0 the model is its own teacher: no divergence, and half of the model's own loss is left."""
    model = quantized(name)
    batch = tiny(name, labels=True)[1]
    trainer = make_trainer(tmp_path, model, name, teacher="self", distillation={"alpha": 0.5})
    set_strength(model, 0.0)
    own = model(**batch).loss
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    torch.testing.assert_close(loss, 0.5 * own, rtol=1e-5, atol=1e-6)
    assert trainer._distiller is not None
    assert trainer._distiller._by_hidden is (name not in ("bert", "vit", "whisper"))


def test_alignment_is_read_off_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    for name, following in (("gpt2", True), ("mixtral", True), ("t5", False), ("bert", False)):
        assert labels_are_next(*tiny(name, labels=True)) is following
    assert not said(caplog)
    model, batch = tiny("llama", labels=True)
    stock = model.loss_function
    model.loss_function = lambda *args, **kwargs: 1.2 * stock(*args, **kwargs)
    assert labels_are_next(model, batch)
    (words,) = said(caplog)
    assert "leaves out what else the model adds to its loss" in words


def test_soft_capped_logits_take_the_general_way(tmp_path: Path) -> None:
    for cap, by_hidden in ((None, True), (2.0, False)):
        model = quantized("gemma3", model={"final_logit_softcapping": cap})
        trainer = make_trainer(tmp_path, model, teacher="self", max_steps=2, quantization_schedule=SOFT_START)
        trainer.train()
        assert trainer._distiller is not None
        assert trainer._distiller._by_hidden is by_hidden
        # at strength 0 the model is its own teacher
        assert losses(trainer)[0]["distill/kl"] < 1e-9


def test_masked_tokens_do_not_count(tmp_path: Path) -> None:
    """Changing labels to -100 there and tokens behind them changes nothing of the loss."""
    model = quantized()
    trainer = make_trainer(tmp_path, model, teacher=tiny("llama", seed=1)[0], distillation={"alpha": 0.5})
    model.train()
    ids = torch.randint(3, 96, (1, 8))
    padded = torch.cat((ids, torch.randint(3, 96, (1, 4))), dim=1)
    labels = torch.cat((ids, torch.full((1, 4), -100)), dim=1)
    short = trainer.compute_loss(model, {"input_ids": ids, "labels": ids}, num_items_in_batch=7)
    long = trainer.compute_loss(model, {"input_ids": padded, "labels": labels}, num_items_in_batch=7)
    torch.testing.assert_close(short, long)


def test_batch_without_labels(tmp_path: Path) -> None:
    model = quantized()
    batch = {"input_ids": torch.randint(3, 96, (2, 6))}
    trainer = make_trainer(tmp_path, model, teacher=tiny("llama", seed=1)[0], distillation={"alpha": 1.0})
    model.train()
    assert trainer.compute_loss(model, batch) > 0
    trainer = make_trainer(tmp_path, model, teacher=tiny("llama", seed=1)[0])
    with pytest.raises(ValueError, match=r"no `labels`.*distillation=\{'alpha': 1.0\}"):
        trainer.compute_loss(model, batch)


def test_experts_keep_their_balancing_loss(tmp_path: Path) -> None:
    model = quantized("mixtral", model={"output_router_logits": True, "router_aux_loss_coef": 10.0})
    only_kl = {"distillation": {"alpha": 1.0}, "max_steps": 2}
    trainer = make_trainer(tmp_path, model, teacher="self", quantization_schedule=SOFT_START, **only_kl)
    trainer.train()
    log = losses(trainer)[0]
    assert log["distill/kl"] == 0.0
    assert log["loss"] > 10.0


# ---- the strength ----


class _Watch(tf.TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layer = trained_layers(kwargs["model"])[0][1]
        self.seen.append((float(layer.strength), layer.relaxed))
        assert layer.keep_codes

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert not any(layer.keep_codes or layer._kept for _, layer in trained_layers(kwargs["model"]))


def test_strength_follows_the_schedule_and_ends_hard(tmp_path: Path) -> None:
    model, watch = quantized(sub_norm=["o_proj"]), _Watch()
    schedule = {"ramp": "linear", "start": 0.25, "end": 0.75}
    fields = {"quantization_schedule": schedule, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, model, callbacks=[watch], max_steps=8, eval_strategy="steps", eval_steps=1, **fields)
    trainer.train()
    assert watch.seen == [(s, s < 1) for s in (0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0)]
    assert [log["quant/strength"] for log in losses(trainer)] == [strength for strength, _ in watch.seen]
    assert all(log["eval_strength"] == 1.0 for log in trainer.state.log_history if "eval_loss" in log)
    assert all(float(layer.strength) == 1.0 and not layer.relaxed for _, layer in trained_layers(model))
    norms = [layer.sub_norm for _, layer in quantized_layers(model) if layer.sub_norm is not None]
    assert norms and all(float(norm.blend) == 1.0 for norm in norms)


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    """Neither the strength nor the random state; the loss is that of the quantized model, or of the present one."""
    fields = {"quantization_schedule": {"ramp": "linear", "end": 3}, "max_steps": 4}
    dropout = {"attention_dropout": 0.5}
    runs = {}
    for every in (0, 1):
        model = quantized(model=dropout)
        strategy = {"eval_strategy": "steps", "eval_steps": 1} if every else {}
        trainer = make_trainer(tmp_path, model, **fields, **strategy)
        trainer.train()
        runs[every] = weights(model)
    assert_same(runs[0], runs[1])

    model = quantized()
    trainer = make_trainer(tmp_path, model, eval_at_full_strength=False, eval_strategy="steps", eval_steps=1, **fields)
    trainer.train()
    assert [log["eval_strength"] for log in trainer.state.log_history if "eval_loss" in log] == [0.0, 1 / 3, 2 / 3, 1.0]


def test_an_error_leaves_a_quantized_model(tmp_path: Path) -> None:
    model = quantized()

    class Stop(tf.TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    fields = {"quantization_schedule": "linear", "gradient_accumulation_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, model, callbacks=[Stop()], **fields).train()
    layers = [layer for _, layer in trained_layers(model)]
    assert all(float(x.strength) == 1.0 and not x.relaxed and not x.keep_codes for x in layers)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_strength_0_trains_bit_for_bit_as_the_float_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_schedule, "HARD_SHARE", 0.0)
    model = quantized(name)
    make_trainer(tmp_path, model, name, quantization_schedule={"start": 1.0, "end": 1.0}).train()

    same = plain(name)
    stock = {key: value for key, value in arguments(tmp_path).to_dict().items() if key in _STOCK}
    tf.Trainer(model=same, args=tf.TrainingArguments(**stock), train_dataset=examples(name)).train()
    assert_same(weights(model), weights(same))


_STOCK = (
    *("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "save_strategy"),
    *("report_to", "use_cpu", "disable_tqdm", "dataloader_pin_memory"),
)


def test_self_is_the_model_at_strength_0() -> None:
    for name in ("llama", "gpt2", "t5"):
        original, batch = tiny(name)
        twin = full_precision_copy(
            quantize_model(copy.deepcopy(original), BitNetQuantizationConfig(sub_norm=["o_proj", "c_proj"]))
        )
        assert not any(True for _ in quantized_layers(twin))
        assert getattr(twin.config, "quantization_config", None) is None
        assert torch.equal(twin(**batch).logits, original(**batch).logits)


def test_self_keeps_a_norm_that_works() -> None:
    model, batch = quantized(sub_norm=["o_proj"]), tiny("llama")[1]
    set_norm_blend(model, 1.0)
    twin = full_precision_copy(model)
    set_strength(model, 0.0)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    with pytest.raises(ValueError, match="no layer in train form"):
        full_precision_copy(tiny("llama")[0])


def test_self_stays_as_it_was(tmp_path: Path) -> None:
    """Also after accelerate wrapped the model: its autocast wrapper is bound to the student."""
    model = quantized()
    for _ in range(2):
        wanted = weights(full_precision_copy(model))
        trainer = make_trainer(tmp_path, model, teacher="self", bf16=True)
        trainer.train()
        assert trainer._distiller is not None
        assert_same(weights(trainer._distiller.teacher), wanted)
        assert losses(trainer)[0]["distill/kl"] > 0.01
