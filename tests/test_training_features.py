"""QATTrainer: parameter groups, logs, what works with it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.utils import DistributedType
from torch import nn

from hf_bitnet import BitNetQuantizationConfig, DistillationConfig, QATArguments, QATTrainer, quantize_model
from hf_bitnet.surgery import trained_layers
from hf_bitnet.training.checks import LossStyle, check_parallelism, loss_style
from hf_bitnet.training.distillation.alignment import logits_of
from hf_bitnet.training.distillation.teacher import prepare_teacher
from hf_bitnet.training.optimizers import set_up
from tests.qat import arguments, assert_same, examples, losses, make_trainer, quantized, said, weights
from tests.tiny import FAMILIES, tiny

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
    # 8-bit optimizers hold rates in float32
    assert losses(trainer)[0]["learning_rate"] == (torch.tensor(1e-3).item() if "8bit" in optim else 1e-3)


def test_default_groups_do_not_decay_scales(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(weight_scale="learned"), weight_decay=0.1)
    trainer.create_optimizer()
    assert {(g["name"], g["weight_decay"], g["lr"]) for g in trainer.optimizer.param_groups} == {
        ("rest", 0.1, 1e-3),
        ("rest", 0.0, 1e-3),
        ("latent", 0.1, 1e-3),
        ("scale", 0.0, 1e-3),
    }


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_norms_with_a_rate_of_their_own(name: str, tmp_path: Path) -> None:
    """All gains and biases, and nothing else; learned scales of one dimension stay scales."""
    model = quantized(name, weight_scale="learned")
    trainer = make_trainer(tmp_path, model, norm_rate_factor=4.0)
    trainer.create_optimizer()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = {names[id(p)]: g["lr"] for g in trainer.optimizer.param_groups if g["name"] == "norm" for p in g["params"]}
    assert set(found.values()) == {4e-3}  # learning_rate is 1e-3
    wanted = {key for key, p in model.named_parameters() if p.dim() == 1 and "weight_scale" not in key}
    assert set(found) == wanted and any("norm" in key.lower() for key in wanted)
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(names)


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
    quant = {"strength", "flip_rate", "zero_fraction", "sqnr_db", "cosine", "latent_changed", "worst_sqnr_db"}
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
    assert not trainer._qat_metrics._monitor._last


@pytest.mark.parametrize("bar", [True, False])
def test_readable_line(bar: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, quantized(), max_steps=1, disable_tqdm=not bar).train()
    written = capsys.readouterr()
    line = next(line for line in written.out.splitlines() if "loss" in line)
    assert line.startswith("step 1/1  loss ")
    assert ("1/1" in written.err) is bar
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
    with pytest.raises(ValueError, match=r"every parameter of LlamaForCausalLM is frozen.*requires_grad_\(True\)"):
        make_trainer(tmp_path, quantized().requires_grad_(False)).train()
    with pytest.raises(TypeError, match=r"QATTrainer takes a model, got 'org/model'; load and quantize it first"):
        make_trainer(tmp_path, "org/model")  # type: ignore[arg-type]


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(TypeError, match=r"takes QATArguments, got TrainingArguments"):
        QATTrainer(model=model, args=tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"distillation needs a teacher.*teacher='self'"):
        make_trainer(tmp_path, model, distillation={"alpha": 0.5})
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 with a teacher"):
        make_trainer(tmp_path, model, teacher="self", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"compute_loss_func and teacher both"):
        make_trainer(tmp_path, model, teacher="self", compute_loss_func=lambda *_, **__: None)
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs.*torchrun --nproc_per_node 2"):
        QATTrainer(model=model, args=args)
    make_trainer(tmp_path, model, distillation={"alpha": 0.0})
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
    with pytest.raises(TypeError, match=r"teacher must be a model, a path, 'self' or 'cached', got int"):
        make_trainer(tmp_path, model, teacher=7)
    with pytest.raises(ValueError, match="teacher='cache' is neither a folder nor 'self' nor 'cached'; did you mean 'cached'"):
        make_trainer(tmp_path, model, teacher="cache")
    with pytest.raises(ValueError, match="single output"):
        make_trainer(tmp_path, quantized("bert", model={"num_labels": 1}), "bert", teacher="self")


def test_float_labels_with_a_teacher_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized("bert"), "bert", teacher="self")
    trainer.model.train()
    with pytest.raises(ValueError, match=r"labels are torch\.float32"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.randint(3, 96, (2, 6)), "labels": torch.rand(2, 3)})


def test_half_precision_latents_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, quantized())
    assert not said(caplog)
    make_trainer(tmp_path, quantized().bfloat16())
    (words,) = said(caplog)
    assert "14 quantized layers train bfloat16 weights" in words
    assert "dtype=torch.float32" in words


def test_a_teacher_of_unknown_kind(tmp_path: Path) -> None:
    tiny("llama")[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))
    with pytest.raises(ValueError, match=r"is a MyModel, which transformers does not have.*teacher=MyModel.from_pretrained"):
        make_trainer(tmp_path, quantized(), teacher=str(tmp_path))


def test_outputs_that_cannot_be_distilled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"returns start_logits, end_logits; leave `teacher` out"):
        logits_of({"start_logits": torch.zeros(1), "end_logits": torch.zeros(1)})
    trainer = make_trainer(tmp_path, quantized("bert"), "bert", teacher="self")
    assert trainer.model is not None
    trainer.model.train()
    batch = {"input_ids": torch.randint(3, 96, (2, 6)), "labels": torch.zeros(2, 3, dtype=torch.long)}
    assert trainer._distiller is not None
    trainer._distiller._shift = False
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3\) do not match labels of shape \(2, 3\)"):
        trainer.compute_loss(trainer.model, batch)


def test_ways_to_split_work_that_do_not_fit() -> None:
    def split(**on: Any) -> Any:
        flags = {"tp_enabled": False, "cp_enabled": False, "sp_enabled": False, "tp_size": 1}
        return SimpleNamespace(parallelism_config=SimpleNamespace(**(flags | on)))

    check_parallelism(SimpleNamespace(parallelism_config=None), True)
    check_parallelism(split(cp_enabled=True), False)
    with pytest.raises(ValueError, match=r"tp_size=2.*FSDP2, with tp_size=1"):
        check_parallelism(split(tp_enabled=True, tp_size=2), False)
    with pytest.raises(ValueError, match=r"context or sequence parallelism.*cp_size=1"):
        check_parallelism(split(cp_enabled=True), True)
    fsdp1: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match=r"FSDP version 2 only.*fsdp_config=\{'version': 2\}"):
        prepare_teacher(nn.Linear(1, 1), fsdp1, DistillationConfig())


def test_an_optimizer_that_manages_parameters_itself(tmp_path: Path) -> None:
    model = quantized()
    partial = torch.optim.SGD([next(model.parameters())], lr=0.1)
    set_up(partial, model, arguments(tmp_path))
    assert len(partial.param_groups) == 1
    with pytest.raises(
        ValueError, match=r"scale_weight_decay=0.1 cannot be used: the optimizer of optim=.*manages the parameters itself"
    ):
        set_up(partial, model, arguments(tmp_path, scale_weight_decay=0.1))
