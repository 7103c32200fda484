"""QATTrainer: the loss and its accumulation, the strength, parameter groups, logs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_bitnet import BitNetQuantizationConfig, QATArguments, quantize_model, set_norm_blend, set_strength
from hf_bitnet.surgery import full_precision_copy, quantized_layers, trained_layers
from hf_bitnet.training.alignment import labels_are_next
from hf_bitnet.training.checks import LossStyle, loss_style
from tests.qat import arguments, assert_same, examples, losses, make_trainer, plain, quantized, weights
from tests.tiny import FAMILIES, tiny

# ---- the loss ----


def _update(name: str, folder: Path, teacher: Any, batch: int, accumulate: int, **fields: Any) -> torch.Tensor:
    """What one step of plain gradient descent adds to the weights."""
    model = quantized(name)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    descent = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.5, "max_steps": 1}
    make_trainer(folder, model, name, teacher, **(descent | sizes | fields)).train()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.parametrize("alpha", [None, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_accumulation_of_4x2_equals_8(name: str, alpha: float | None, tmp_path: Path) -> None:
    teacher = None if alpha is None else tiny(name, seed=1)[0]
    whole = _update(name, tmp_path, teacher, 8, 1, distill_alpha=alpha)
    parts = _update(name, tmp_path, teacher, 2, 4, distill_alpha=alpha)
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
        fields = {"distill_alpha": alpha, "distill_temperature": temperature, "distill_chunk_tokens": chunk}
        trainer = make_trainer(tmp_path, model, teacher=teacher, **fields)
        model.train()
        model.zero_grad()
        got = trainer.compute_loss(model, batch, num_items_in_batch=(labels != -100).sum())
        got.backward()
        torch.testing.assert_close(got, loss)
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "bert", "gemma3"])
def test_head_and_logits_give_the_same_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = _update(name, tmp_path, "self", 4, 1)
    monkeypatch.setattr("hf_bitnet.training.distiller.logits_are_plain", lambda *_: False)
    slow = _update(name, tmp_path, "self", 4, 1)
    assert (fast - slow).norm() < 1e-3 * slow.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_distils(name: str, tmp_path: Path) -> None:
    """At strength 0 the model is its own teacher: no divergence, and half of the model's own loss is left."""
    model = quantized(name)
    batch = tiny(name, labels=True)[1]
    trainer = make_trainer(tmp_path, model, name, teacher="self", distill_alpha=0.5)
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
    assert not _said(caplog)
    model, batch = tiny("llama", labels=True)
    stock = model.loss_function
    model.loss_function = lambda *args, **kwargs: 1.2 * stock(*args, **kwargs)
    assert labels_are_next(model, batch)
    (said,) = _said(caplog)
    assert "leaves out what else the model adds to its loss" in said


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package logged; transformers has warnings of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_bitnet")]


def test_soft_capped_logits_take_the_general_way(tmp_path: Path) -> None:
    for cap, by_hidden in ((None, True), (2.0, False)):
        model = quantized("gemma3", model={"final_logit_softcapping": cap})
        trainer = make_trainer(tmp_path, model, teacher="self", max_steps=1, strength_schedule="linear")
        trainer.train()
        assert trainer._distiller is not None
        assert trainer._distiller._by_hidden is by_hidden
        # at strength 0 the model is its own teacher
        assert losses(trainer)[0]["distill/kl"] < 1e-9


def test_masked_tokens_do_not_count(tmp_path: Path) -> None:
    """Changing labels to -100 there and tokens behind them changes nothing of the loss."""
    model = quantized()
    trainer = make_trainer(tmp_path, model, teacher=tiny("llama", seed=1)[0], distill_alpha=0.5)
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
    trainer = make_trainer(tmp_path, model, teacher=tiny("llama", seed=1)[0], distill_alpha=1.0)
    model.train()
    assert trainer.compute_loss(model, batch) > 0
    trainer = make_trainer(tmp_path, model, teacher=tiny("llama", seed=1)[0])
    with pytest.raises(ValueError, match=r"no `labels`.*distill_alpha=1.0"):
        trainer.compute_loss(model, batch)


def test_experts_keep_their_balancing_loss(tmp_path: Path) -> None:
    model = quantized("mixtral", model={"output_router_logits": True, "router_aux_loss_coef": 10.0})
    trainer = make_trainer(tmp_path, model, teacher="self", max_steps=1, distill_alpha=1.0, strength_schedule="linear")
    trainer.train()
    (log,) = losses(trainer)
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
    fields = {"strength_schedule": "linear", "strength_start": 0.25, "strength_end": 0.75, "gradient_accumulation_steps": 2}
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
    fields = {"strength_schedule": "linear", "strength_end": 1.0, "max_steps": 3}
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
    assert [log["eval_strength"] for log in trainer.state.log_history if "eval_loss" in log] == [0.0, 1 / 3, 2 / 3]


def test_an_error_leaves_a_quantized_model(tmp_path: Path) -> None:
    model = quantized()

    class Stop(tf.TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    fields = {"strength_schedule": "linear", "strength_end": 1.0, "gradient_accumulation_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, model, callbacks=[Stop()], **fields).train()
    layers = [layer for _, layer in trained_layers(model)]
    assert all(float(x.strength) == 1.0 and not x.relaxed and not x.keep_codes for x in layers)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_strength_0_trains_bit_for_bit_as_the_float_model(name: str, tmp_path: Path) -> None:
    held = {"strength_schedule": "linear", "strength_start": 1.0, "strength_end": 1.0}
    model = quantized(name)
    make_trainer(tmp_path, model, name, **held).train()

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


# ---- parameter groups ----


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adamw_torch_8bit"])
def test_parameter_groups(optim: str, tmp_path: Path) -> None:
    model = quantized(weight="int2_seq", weight_scale="learned", ste="learnable", overrides={r"o_proj": "keep"})
    if "8bit" in optim:
        pytest.importorskip("torchao")
    rates = {"learning_rate": 1e-3, "latent_learning_rate": 2e-3, "scale_learning_rate": 3e-3}
    decays = {"weight_decay": 0.1, "latent_weight_decay": 0.2}
    trainer = make_trainer(tmp_path, model, optim=optim, max_steps=2, lr_scheduler_type="constant", **rates, **decays)
    trainer.train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.optimizer.optimizer.param_groups
    members = {(g["name"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert {(g["name"], round(float(g["lr"]), 6)) for g in groups} == {("rest", 1e-3), ("latent", 2e-3), ("scale", 3e-3)}
    assert sum(len(each) for each in members.values()) == len(names)
    latent = {f"{name}.weight" for name, _ in trained_layers(model)}
    assert members["latent", 0.2] == latent
    scales = {f"{name}.{key}" for name, _ in trained_layers(model) for key in ("weight_scale", "ste_temperature")}
    assert members["scale", 0.0] == scales
    assert "model.norm.weight" in members["rest", 0.0]
    assert "model.layers.0.self_attn.o_proj.weight" in members["rest", 0.1]
    assert losses(trainer)[0]["learning_rate"] == 1e-3


def test_default_groups_do_not_decay_scales(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(weight_scale="learned"), weight_decay=0.1)
    trainer.create_optimizer()
    assert {(g["name"], g["weight_decay"], g["lr"]) for g in trainer.optimizer.param_groups} == {
        ("rest", 0.1, 1e-3),
        ("rest", 0.0, 1e-3),
        ("latent", 0.1, 1e-3),
        ("scale", 0.0, 1e-3),
    }


def test_rates_with_a_foreign_optimizer_are_refused(tmp_path: Path) -> None:
    model = quantized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model, optimizers=(optimizer, None), latent_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"latent_learning_rate=0.001 cannot be used: the optimizer was made outside"):
        trainer.train()
    trainer = make_trainer(tmp_path, model, latent_learning_rate=1e-3)
    trainer.train()
    trainer.train()  # the second time the optimizer is the trainer's own


# ---- logs ----


def test_log_keys_and_values(tmp_path: Path) -> None:
    model = quantized()
    trainer = make_trainer(tmp_path, model, teacher="self", max_steps=4, logging_steps=2, learning_rate=1e-2)
    before = {name: layer.quantized_weight().codes.clone() for name, layer in trained_layers(model)}
    trainer.train()
    first, second = losses(trainer)
    quant = {"strength", "flip_rate", "zero_fraction", "sqnr_db", "latent_changed"}
    assert {key.removeprefix("quant/") for key in first if key.startswith("quant/")} == quant
    assert {"distill/kl", "distill/ce"} <= first.keys()
    assert first["loss"] == pytest.approx(0.5 * first["distill/kl"] + 0.5 * first["distill/ce"], rel=1e-5)
    now = {name: layer.quantized_weight() for name, layer in trained_layers(model)}
    total = sum(codes.numel() for codes in before.values())
    zeros = sum(int((q.codes == 0).sum()) for q in now.values()) / total
    assert second["quant/zero_fraction"] == pytest.approx(zeros)
    flips = sum(int((now[name].codes != before[name]).sum()) for name in before) / total
    assert 0 < flips <= first["quant/flip_rate"] + second["quant/flip_rate"] + 1e-9
    assert 5.0 < second["quant/sqnr_db"] < 7.0  # ternary absmean of a normal weight: 5.8 dB
    assert second["quant/latent_changed"] > 0.9


def test_without_quant_logging(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(), quant_logging=False, max_steps=1)
    trainer.train()
    assert not any(key.startswith(("quant/", "distill/")) for key in losses(trainer)[0])
    assert not trainer._metrics._monitor._last


def test_readable_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, quantized(), max_steps=1).train()
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("step 1/1  loss ")
    assert "  strength 1  flip_rate " in line
    assert "%" in line


# ---- what works with it ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # both are torch.compile's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_bf16_checkpointing_compile_and_metrics(tmp_path: Path) -> None:
    """All at once, with a teacher; compiled by the eager backend of ahead-of-time autograd."""
    seen = []

    def accuracy(prediction: tf.EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"accuracy": 0.5}

    fields = {"bf16": True, "activation_checkpointing": True, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    model = quantized(model={"num_hidden_layers": 1})
    trainer = make_trainer(tmp_path, model, teacher="self", compute_metrics=accuracy, max_steps=3, **fields)
    trainer.train()
    assert trainer._distiller is not None and trainer._distiller._by_hidden
    assert trainer.evaluate()["eval_accuracy"] == 0.5
    assert seen == [(8, 10, 96)]
    eager = make_trainer(tmp_path, quantized(model={"num_hidden_layers": 1}), teacher="self", bf16=True, max_steps=3)
    eager.train()
    for mine, theirs in zip(losses(trainer), losses(eager), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        model = quantized()
        make_trainer(tmp_path, model, activation_checkpointing=on, gradient_accumulation_steps=2).train()
        results.append(weights(model))
    assert_same(*results)


def test_loaded_model(tmp_path: Path) -> None:
    """A model in train form that from_pretrained made; and a teacher given as a path."""
    folder = str(tmp_path / "plain")
    tiny("llama")[0].save_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitNetQuantizationConfig())
    trainer = make_trainer(tmp_path, model, teacher=folder)
    trainer.train()
    by_hand = quantized()
    other = make_trainer(tmp_path, by_hand, teacher="self")
    other.train()
    assert_same(weights(model), weights(by_hand))
    assert losses(trainer) == losses(other)


def test_model_init(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None, model_init=lambda: quantized(), teacher="self")
    trainer.train()
    other = make_trainer(tmp_path, quantized(), teacher="self")
    other.train()
    assert losses(trainer) == losses(other)


class _Wrapped(tf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class _Own(tf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return None


def test_how_a_model_divides_its_loss() -> None:
    style = {name: loss_style(tiny(name)[0]) for name in FAMILIES}
    mean = {name for name, each in style.items() if each is LossStyle.MEAN}
    assert mean == {"bert", "t5", "whisper"}
    assert set(style.values()) == {LossStyle.SUM, LossStyle.MEAN}
    config = tiny("llama")[0].config
    assert loss_style(_Wrapped(config)) is LossStyle.SUM
    assert loss_style(_Own(config)) is LossStyle.OTHER


def test_regression_accumulates_too(tmp_path: Path) -> None:
    """Float labels: transformers' own loss is a mean, whatever number of items it is told."""
    data = [{**example, "labels": torch.randn(())} for example in examples("bert")]
    found = {}
    for batch, accumulate in ((8, 1), (2, 4)):
        config = tf.LlamaConfig(**{**tiny("llama")[0].config.to_dict(), "num_labels": 1})
        torch.manual_seed(0)
        model = quantize_model(tf.LlamaForSequenceClassification(config), BitNetQuantizationConfig())
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 1}
        make_trainer(tmp_path, model, optim="sgd", max_grad_norm=0.0, train_dataset=data, eval_dataset=None, **sizes).train()
        found[batch] = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert (found[2] - found[8]).norm() < 1e-3 * found[8].norm()


# ---- what is refused ----


def test_models_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no quantized layer.*quantize_model\(model, BitNetQuantizationConfig"):
        make_trainer(tmp_path, tiny("llama")[0])
    with pytest.raises(ValueError, match=r"is packed.*unpack_model\(model\)"):
        make_trainer(tmp_path, quantized(form="packed"))
    with pytest.raises(ValueError, match=r"never calibrated.*calibrate\(model, batches\)"):
        make_trainer(tmp_path, quantized(activation="int8_static")).train()


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(TypeError, match=r"takes QATArguments, got TrainingArguments"):
        from hf_bitnet import QATTrainer

        QATTrainer(model=model, args=tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"distill_alpha=0.5 needs a teacher.*teacher='self'"):
        make_trainer(tmp_path, model, distill_alpha=0.5)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 with a teacher"):
        make_trainer(tmp_path, model, teacher="self", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"compute_loss_func and teacher both"):
        make_trainer(tmp_path, model, teacher="self", compute_loss_func=lambda *_, **__: None)
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs.*torchrun --nproc_per_node 2"):
        from hf_bitnet import QATTrainer

        QATTrainer(model=model, args=args)
    make_trainer(tmp_path, model, distill_alpha=0.0)
    assert isinstance(make_trainer(tmp_path, model).args, QATArguments)


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(ValueError, match=r"the teacher is the model that is trained.*teacher='self'"):
        make_trainer(tmp_path, model, teacher=model)
    part = tiny("llama")[0]
    part.model.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shares parameters with it"):
        make_trainer(tmp_path, model, teacher=part)
    with pytest.raises(ValueError, match=r"tells 128 classes \(tokens\) apart, the student 96.*resize_token_embeddings\(128\)"):
        make_trainer(tmp_path, model, teacher=tiny("llama", vocab_size=128)[0])
    with pytest.raises(TypeError, match=r"teacher must be a model, a path or 'self', got int"):
        make_trainer(tmp_path, model, teacher=7)
    with pytest.raises(ValueError, match="single output"):
        make_trainer(tmp_path, quantized("bert", model={"num_labels": 1}), "bert", teacher="self")


def test_float_labels_with_a_teacher_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized("bert"), "bert", teacher="self")
    trainer.model.train()
    with pytest.raises(ValueError, match=r"labels are torch\.float32"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.randint(3, 96, (2, 6)), "labels": torch.rand(2, 3)})


def test_half_precision_latents_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, quantized())
    assert not _said(caplog)
    make_trainer(tmp_path, quantized().bfloat16())
    (said,) = _said(caplog)
    assert "14 quantized layers train bfloat16 weights" in said
    assert "dtype=torch.float32" in said
