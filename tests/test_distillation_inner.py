"""Hidden states and relations in QATTrainer: every family, accumulation, balance, exact resume, logs, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from hf_bitnet import BitNetQuantizationConfig, quantize_model, set_strength
from hf_bitnet.surgery import attention_heads, attention_projections, transformer_layers
from hf_bitnet.training import hidden_loss, relation_loss
from hf_bitnet.training.distillation.inner import layer_pairs
from tests.qat import ONE_LAYER, assert_same, examples, losses, make_trainer, plain, quantized, weights
from tests.tiny import FAMILIES, tiny

BOTH = {"hidden": {"loss": "mse"}, "relations": {}}
DESCENT = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.1}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    """At strength 0 the model is its own teacher, and both terms are 0; at strength 1 both are felt."""
    model = quantized(name)
    batch = tiny(name, labels=True)[1]
    trainer = make_trainer(tmp_path, model, name, teacher="self", distillation={"alpha": 0.5, "balance": False, **BOTH})
    assert trainer._distiller is not None
    model.train()
    set_strength(model, 0.0)
    result = trainer._distiller(model, model, dict(batch))
    # T5 sums its attention in another order than its copy does
    assert all(abs(term) <= (1e-6 if name == "t5" else 0.0) for term in result.inner)
    set_strength(model, 1.0)
    result = trainer._distiller(model, model, dict(batch))
    assert all(term > 0 for term in result.inner)
    sum(result.inner).backward()
    assert sum(parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None) > 0


def test_terms_equal_the_formula(tmp_path: Path) -> None:
    """Against states that hooks of this test's own keep."""
    model, teacher = quantized(), tiny("llama", seed=1, num_hidden_layers=4)[0]
    batch = {key: torch.stack([example[key] for example in examples()[:4]]) for key in examples()[0]}
    batch["attention_mask"][0, 7:] = 0
    batch["labels"][0, 7:] = -100
    settings = {"hidden": {"loss": "huber", "layers": {1: -1}}, "relations": {"heads": 8, "normalize": False, "chunk_rows": 3}}
    trainer = make_trainer(tmp_path, model, teacher=teacher, distillation=settings)
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Any:
        return lambda _, args, output: seen.update({key: output[0] if isinstance(output, tuple) else output})

    for whose, net, layer, late in (("s", model, 1, 1), ("t", teacher, 3, 3)):
        net.model.layers[layer].register_forward_hook(keep(f"{whose}.hidden"))
        attention = net.model.layers[late].self_attn
        for state in ("q", "k", "v"):
            getattr(attention, f"{state}_proj").register_forward_hook(keep(f"{whose}.{state}"))
    assert trainer._distiller is not None
    result = trainer._distiller(model, model, dict(batch))
    counted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).ne(-100).float()
    wanted = hidden_loss(seen["s.hidden"], seen["t.hidden"], counted, "huber")
    torch.testing.assert_close(result.inner[0], wanted)
    exists = batch["attention_mask"].bool()
    parts = [relation_loss(seen[f"s.{x}"], seen[f"t.{x}"], 8, counted, exists, normalize=False) for x in ("q", "k", "v")]
    torch.testing.assert_close(result.inner[1], torch.stack(parts).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3", "bert"))])
def test_accumulation_of_4x2_equals_8(name: str, tmp_path: Path) -> None:
    """Two steps, so that the balance that the first one measured is used."""
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = quantized(name)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 2}
        trainer = make_trainer(tmp_path, model, name, tiny(name, seed=1)[0], distillation=BOTH, **(DESCENT | sizes))
        trainer.train()
        found.append((nn.utils.parameters_to_vector(model.parameters()).detach() - before, losses(trainer)))
    (whole, logs), (parts, other) = found
    assert (parts - whole).norm() < 5e-3 * whole.norm()
    assert other[1]["distill/relations_weight"] == pytest.approx(logs[1]["distill/relations_weight"], rel=1e-3)


def test_balance_and_logs(tmp_path: Path) -> None:
    settings = {"alpha": 0.25, "temperature": 2.0, "hidden": {"weight": 2.0}, "relations": {"weight": 0.5}}
    fields = {"max_steps": 3, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, quantized(), teacher="self", distillation={**settings, "balance_decay": 0.5}, **fields)
    trainer.train()
    logs = losses(trainer)
    names = ("kl", "ce", "hidden", "relations")
    for log in logs:
        total = sum(log[f"distill/{name}_weight"] * log[f"distill/{name}"] for name in names)
        assert log["loss"] == pytest.approx(total, rel=1e-4)
        assert (log["distill/kl_weight"], log["distill/ce_weight"]) == (1.0, 0.75)
    main = [log["distill/kl"] + 0.75 * log["distill/ce"] for log in logs]
    for name, weight in (("hidden", 2.0), ("relations", 0.5)):
        terms = [log[f"distill/{name}"] for log in logs]
        # measured after each step: means of 0.5 a + 0.5 b
        wanted = [0.0, weight * main[0] / terms[0], weight * (main[0] + 2 * main[1]) / (terms[0] + 2 * terms[1])]
        assert [log[f"distill/{name}_weight"] for log in logs] == pytest.approx(wanted, rel=1e-3)


_RAMP = {"ramp": "linear", "end": 0.8, "log_gap": False}


def test_a_teacher_is_known_as_the_start_of_a_student_with_adapters(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "path")
    target = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"])
    student = peft.get_peft_model(quantized(), target)  # type: ignore[arg-type]
    teachers: dict[str, Any] = {
        "path": str(tmp_path / "path"),
        "adapted": peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])),  # type: ignore[arg-type]
        "other": plain(seed=5),
    }
    for name, teacher in teachers.items():
        trainer = make_trainer(tmp_path / name, student, teacher=teacher, distillation={"hidden": {}})
        assert trainer._balance is not None and trainer._balance.of_itself == (name != "other"), name


@pytest.mark.parametrize(("teacher", "alpha"), [("self", 0.5), ("self", 1.0), ("path", 0.5), ("other", 0.5), ("other", 1.0)])
def test_inner_terms_on_the_way_to_full_strength(teacher: str, alpha: float, tmp_path: Path) -> None:
    """They are neither nothing nor all, whether the student starts as its teacher or not; what labels say does not change."""
    model, settings = plain(), {"alpha": alpha, "balance_decay": 0.9, "hidden": {}, "relations": {}}
    model.save_pretrained(tmp_path / "path")
    teachers: dict[str, Any] = {"self": "self", "path": str(tmp_path / "path"), "other": plain(seed=5)}
    student = quantize_model(model, BitNetQuantizationConfig.bitnet_b158())
    fields = {"max_steps": 12, "learning_rate": 1e-4, "quantization_schedule": _RAMP}
    trainer = make_trainer(tmp_path / "out", student, teacher=teachers[teacher], distillation=settings, **fields)
    assert trainer._balance.of_itself == (teacher != "other")
    trainer.train()
    shares = []
    for log in losses(trainer):
        main = alpha * log["distill/kl"] + (1 - alpha) * log.get("distill/ce", 0.0)
        inner = [log[f"distill/{name}_weight"] * log[f"distill/{name}"] for name in ("hidden", "relations")]
        shares.append([term / main for term in inner] if main else [0.0, 0.0])
    assert all(share < 2.5 for each in shares for share in each)
    assert all(share > 0.3 for share in shares[-1])


def test_without_balance_the_weights_are_as_written(tmp_path: Path) -> None:
    settings = {"alpha": 0.0, "balance": False, "hidden": {"weight": 3.0, "loss": "mse"}}
    trainer = make_trainer(tmp_path, quantized(), teacher="self", distillation=settings, max_steps=1)
    trainer.train()
    (log,) = losses(trainer)
    assert not any("kl" in key for key in log)
    assert log["distill/hidden_weight"] == 3.0
    assert log["loss"] == pytest.approx(log["distill/ce"] + 3.0 * log["distill/hidden"], rel=1e-5)


def test_a_step_that_overflowed_is_not_remembered(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(), teacher="self", distillation=BOTH)
    balance: Any = trainer._balance
    for main in (1.0, float("nan"), float("inf")):
        balance.weigh(torch.tensor([main, 0.0, 0.0, 0.5, 0.0]))
        balance.on_optimizer_step(None, None, None)
        assert balance.factors.tolist() == [2.0, 0.0]


class _StopAt(tf.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


def test_resume_continues_the_balance_bit_for_bit(tmp_path: Path) -> None:
    run = {"teacher": "self", "distillation": BOTH, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", quantized(model=ONE_LAYER), **run)
    whole.train()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "half", quantized(model=ONE_LAYER), callbacks=[_StopAt()], **run).train()
    assert json.loads((tmp_path / "half" / "checkpoint-2" / "qat_balance.json").read_text())["means"][0] > 0
    resumed = make_trainer(tmp_path / "half", quantized(model=ONE_LAYER), **run)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))
    resumed.train()  # from the beginning again, not from what is left
    assert losses(resumed)[0]["distill/hidden_weight"] == 0.0


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        model = quantized(model=ONE_LAYER)
        make_trainer(tmp_path, model, teacher="self", distillation=BOTH, activation_checkpointing=on).train()
        results.append(weights(model))
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_and_bfloat16(tmp_path: Path) -> None:
    fields = {"teacher": "self", "distillation": BOTH, "bf16": True, "max_steps": 3}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "eval_strategy": "steps", "eval_steps": 1}
    logs = []
    for more in ({}, compiled):
        trainer = make_trainer(tmp_path, quantized(model={"num_hidden_layers": 1}), **fields, **more)
        trainer.train()
        logs.append(losses(trainer))
    for mine, theirs in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert mine["distill/relations"] == pytest.approx(theirs["distill/relations"], rel=0.1)


# ---- where states are found ----


def test_layers_and_projections_of_each_family() -> None:
    for name in FAMILIES:
        model = tiny(name)[0]
        layers = transformer_layers(model)
        assert len(layers) == 2, name
        assert ("decoder" in layers[0][0]) is (name in ("t5", "whisper"))
        found = attention_projections(*layers[0], attention_heads(model))
        assert list(found) == ["query", "key", "value"]
        assert len({(id(place.module), place.part) for place in found.values()}) == 3


def test_parts_of_fused_projections() -> None:
    layer = tiny("gpt2")[0].transformer.h[0]
    x = torch.randn(1, 3, 48)
    fused = layer.attn.c_attn(x)
    found = attention_projections("h.0", layer, (4, 4))
    for place, wanted in zip(found.values(), fused.split(48, dim=-1), strict=True):
        assert torch.equal(place.take(place.module(x)), wanted)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "vocab_size": 96, "pad_token_id": 0}
    phi = tf.Phi3ForCausalLM(tf.Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    found = attention_projections("layers.0", phi.model.layers[0], attention_heads(phi))
    output = phi.model.layers[0].self_attn.qkv_proj(x)
    assert [place.take(output).shape[-1] for place in found.values()] == [48, 24, 24]
    assert torch.equal(torch.cat([place.take(output) for place in found.values()], dim=-1), output)


def test_which_layers_are_compared() -> None:
    assert layer_pairs(None, 2, 2) == [(0, 0), (1, 1)]
    assert layer_pairs(None, 2, 6) == [(0, 2), (1, 5)]
    assert layer_pairs(None, 3, 2) == [(0, 0), (1, 1), (2, 1)]
    assert layer_pairs({-1: -2}, 3, 4) == [(2, 2)]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": {"layers": {2: 0}}}, r"hidden: the student has no layer 2; it has 2: legal are -2 to 1"),
        ({"relations": {"teacher_layer": 5}}, r"relations: the teacher has no layer 5"),
        ({"relations": {"heads": 5}}, r"state is 64 wide, which 5 heads do not divide"),
    ],
)
def test_layers_that_do_not_exist(settings: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, quantized(), teacher="self", distillation=settings).train()


def test_models_without_known_parts() -> None:
    with pytest.raises(ValueError, match="Linear holds no list of layers"):
        transformer_layers(nn.Linear(1, 1))
    neox = tf.GPTNeoXConfig(vocab_size=96, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=80)
    layers = transformer_layers(tf.GPTNeoXForCausalLM(neox))
    with pytest.raises(ValueError, match="no projections of queries, keys and values that are known"):
        attention_projections(*layers[0], (4, 4))


def test_a_wider_teacher_needs_relations(tmp_path: Path) -> None:
    wide = tiny("llama", seed=1, hidden_size=96, num_hidden_layers=3)[0]
    trainer = make_trainer(tmp_path, quantized(), teacher=copy.deepcopy(wide), distillation={"relations": {}}, max_steps=2)
    trainer.train()
    assert losses(trainer)[1]["distill/relations"] > 0
    with pytest.raises(ValueError, match="hidden states are 48 wide, the teacher's 96"):
        make_trainer(tmp_path, quantized(), teacher=wide, distillation={"hidden": {}}).train()
