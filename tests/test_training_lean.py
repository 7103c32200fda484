"""The memory-lean preset, codes that are made once, and the optimizers that Trainer offers."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_bitnet import QATArguments
from hf_bitnet.modules.functional import Latent
from hf_bitnet.surgery import trained_layers
from tests.qat import ONE_LAYER, assert_same, losses, make_trainer, quantized, said, weights

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
without_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")


# ---- codes are made once ----


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_codes_are_made_once_a_step(
    checkpointing: bool, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, the forward of activation checkpointing, backward, every micro-batch: one quantization of each weight."""
    calls: Counter[int] = Counter()
    original = Latent.codes

    def counted(self: Latent, weight: torch.Tensor, scale: torch.Tensor | None) -> Any:
        calls[id(weight)] += 1
        return original(self, weight, scale)

    model = quantized()
    fields = {"max_steps": 3, "quant_logging": False, "gradient_accumulation_steps": accumulate}
    trainer = make_trainer(tmp_path, model, activation_checkpointing=checkpointing, **fields)
    monkeypatch.setattr(Latent, "codes", counted)
    trainer.train()
    kept = checkpointing or accumulate > 1
    assert calls == {id(layer.weight): 3 * (1 if kept else 2) for _, layer in trained_layers(model)}


def test_codes_go_with_backward(tmp_path: Path) -> None:
    """After backward, when all gradients are there, no codes are kept beside them."""
    seen = []

    class Watch(tf.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([layer._kept for _, layer in trained_layers(kwargs["model"])])

    fields = {"activation_checkpointing": True, "max_steps": 1, "regularizers": {"l2_to_grid": 1e-3}}
    trainer = make_trainer(tmp_path, quantized(), **fields)
    trainer.callback_handler.callbacks.insert(0, Watch())
    trainer.train()
    assert len(seen) == 1 and seen[0] and all(kept is None for kept in seen[0])


# ---- the preset ----


@needs_torchao
@pytest.mark.slow  # torchao compiles
@pytest.mark.filterwarnings("ignore")  # torchao and the compiler that it uses have much to say
def test_lean_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = quantized(weight="int2_seq", weight_scale="learned")
    # weights of one size, so that torchao compiles few kernels; and steps far below bfloat16's resolution
    fields: dict[str, Any] = {"lean": True, "max_steps": 4, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    before = {name: layer.weight.clone() for name, layer in trained_layers(model)}
    trainer = make_trainer(tmp_path, model, teacher="self", **fields)
    assert not said(caplog)
    trainer.train()
    args = trainer.args
    assert (args.optim.value, args.bf16, args.activation_checkpointing) == ("adamw_torch_8bit", True, True)
    for name, layer in trained_layers(model):
        assert layer.weight.dtype is torch.bfloat16
        assert layer.weight_scale is not None and layer.weight_scale.dtype is torch.float32
        rounded = before[name].bfloat16()
        # rounded to the nearest, steps of 1e-6 would move next to nothing of weights around 0.02 .. 0.1
        assert 0.001 < float((layer.weight != rounded).float().mean()) < 0.5
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in losses(trainer))


@needs_torchao
@pytest.mark.slow  # torchao compiles
@pytest.mark.filterwarnings("ignore")
def test_lean_resumes(tmp_path: Path) -> None:
    class Stop(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise InterruptedError

    fields: dict[str, Any] = {"lean": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", quantized(), **fields)
    whole.train()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "half", quantized(), callbacks=[Stop()], **fields).train()
    resumed = make_trainer(tmp_path / "half", quantized(), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(whole.model))
    assert losses(resumed) == losses(whole)


@without_torchao
def test_lean_without_torchao(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"lean=True needs torchao, for 8-bit AdamW .*: pip install 'torchao>=0.15'"):
        QATArguments(output_dir=str(tmp_path), lean=True, use_cpu=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optim": "sgd"}, "lean=True with optim='sgd': only adamw_torch_8bit, adamw_torch_4bit round stochastically"),
        ({"fp16": True}, "lean=True trains bfloat16 weights, which float16 autocast cannot take; leave fp16 out"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        QATArguments(output_dir=str(tmp_path), lean=True, **fields)


# ---- Trainer's own optimizers ----


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_that_need_nothing_else(optim: str, tmp_path: Path) -> None:
    model = quantized(model=ONE_LAYER)
    trainer = make_trainer(tmp_path, model, optim=optim, max_steps=12, learning_rate=0.5 if optim == "sgd" else 3e-3)
    trainer.train()
    log = losses(trainer)
    assert sum(each["loss"] for each in log[-4:]) < sum(each["loss"] for each in log[:4])
    assert {group["name"] for group in trainer.optimizer.param_groups} == {"rest", "latent"}


# on a CPU there is nothing to page; bitsandbytes says so and goes on
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw_bnb_8bit"])
def test_optimizers_of_bitsandbytes(optim: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(tmp_path, quantized(), optim=optim, max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_muon(tmp_path: Path) -> None:
    """torch's own, for matrices only; passed in, because Trainer has no name for it."""
    muon = pytest.importorskip("torch.optim").__dict__.get("Muon")
    if muon is None:
        pytest.skip("this torch has no Muon")
    model = quantized()
    latents = {id(layer.weight) for _, layer in trained_layers(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in latents)
    optimizer = muon([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = make_trainer(tmp_path, model, optimizers=(optimizer, None), max_steps=12)
    trainer.train()
    log = losses(trainer)
    assert log[-1]["quant/latent_changed"] > 0.9
    assert sum(each["loss"] for each in log[-4:]) < sum(each["loss"] for each in log[:4])
