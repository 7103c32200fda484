"""One run: quantize, train, pack, save, load, measure."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hf_bitnet as hb
from benchmarks.common import RESULTS, machine, model_and_windows
from benchmarks.study import peers
from benchmarks.study.arms import ARMS, COMMON, Arm
from benchmarks.study.plan import STUDIES, Run, Study
from benchmarks.train_step import transformers_arm

LENGTH = 256
UNREAD = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Text:
    """Windows of text: the training text, and the two halves of `valid.txt` with the pretrained model's perplexity of each."""

    train: Tensor
    halves: tuple[Tensor, Tensor]
    full: tuple[float, float]


@functools.cache
def text_of(model: str, limit: int | None = None) -> Text:
    """The text in tokens of `model`; `limit` takes no more windows of each part."""
    full, windows = model_and_windows(model, train=None, valid=limit)
    # the last 128 windows are for scripts that ask what a student has lost of what its teacher knows by heart
    train = windows["train"][:-UNREAD]
    halves = windows["valid"].tensor_split(2)
    return Text(train, halves, perplexities(full.to(DEVICE), halves))  # type: ignore[arg-type]


def perplexities(model: Any, halves: tuple[Tensor, ...]) -> tuple[float, float]:
    first, second = (hb.perplexity(model, half, progress=False) for half in halves)
    return first, second


def drawn_text(name: str, starts: Tensor) -> tuple[Tensor, float]:
    """As many windows as `starts` that the model writes, and the seconds that took; kept beside the results."""
    path = RESULTS / f"drawn-{name}-{len(starts)}.safetensors"
    if not path.exists():
        model, _ = model_and_windows(name)
        began = time.perf_counter()
        windows = hb.drawn_windows(model.to(DEVICE), starts[:, :8], LENGTH)  # type: ignore[arg-type]
        save_file({"windows": windows, "seconds": torch.tensor(time.perf_counter() - began)}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    found = load_file(path)
    return found["windows"], float(found["seconds"])


def text_for(study: Study, arm: Arm, text: Text, count: int, seed: int) -> tuple[Tensor, float]:
    """What an arm trains on in `count` windows: the text, or part of it beside what the teacher writes; and seconds."""
    if not arm.drawn:
        return text.train, 0.0
    part = min(round(arm.drawn * count), len(text.train))
    drawn, seconds = drawn_text(study.model, text.train[:: len(text.train) // part][:part])  # starts from everywhere
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    return torch.cat([text.train[order[: count - part]], drawn]), seconds


def start_of(study: Study, seed: int) -> nn.Module:
    """The model that training starts from, float32."""
    model, _ = model_and_windows(study.model)
    if not study.scratch:
        return model
    torch.manual_seed(seed)
    return tf.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)


def prepare(model: nn.Module, study: Study, arm: Arm, train: Tensor) -> None:
    """Quantizes `model` in place, as the arm says."""
    if arm.peer is not None:
        transformers_arm(model, peers.RampedBitLinear)
    elif arm.quantization is not None:
        hb.quantize_model(model, hb.BitNetQuantizationConfig(**{**study.quantization, **arm.quantization}))
        batches = [{"input_ids": part.to(DEVICE)} for part in train[: arm.fit or 16].split(8)]
        model.to(DEVICE)
        if arm.calibrate:
            hb.calibrate(model, batches)
        if arm.fit:
            hb.fit_weights(model, batches, progress=False)


def make_trainer(model: nn.Module, arm: Arm, teacher: nn.Module | None, train: Tensor, fields: dict[str, Any]) -> tf.Trainer:
    if arm.peer is None and arm.quantization is not None:
        arguments = hb.QATArguments(**fields, distillation=dict(arm.distillation or {}) or None, quant_logging=False)
        return hb.QATTrainer(model=model, args=arguments, train_dataset=hb.TokenWindows(train), teacher=teacher)
    callbacks: list[Any] = [] if arm.peer is None else [peers.Ramp()]
    plain = tf.TrainingArguments(**fields)
    return peers.PlainTrainer(
        model=model, args=plain, train_dataset=hb.TokenWindows(train), teacher=teacher, callbacks=callbacks
    )


def execute(run: Run, batch: int | None = None, limit: int | None = None, tokens: int | None = None) -> dict[str, Any]:
    """Trains and measures. `batch`, `limit` and `tokens` make it small enough for a smoke test."""
    study, arm = STUDIES[run.study], ARMS[run.arm]
    text = text_of(study.model, limit)
    model: Any = start_of(study, run.seed)
    teacher = None if arm.distillation is None else start_of(study, run.seed)
    fields = {**COMMON, **arm.arguments}
    if batch is not None:
        fields["per_device_train_batch_size"] = batch
    left = (tokens or study.tokens) - arm.fit * LENGTH
    steps = max(1, left // (fields["per_device_train_batch_size"] * LENGTH))
    train, drawing = text_for(study, arm, text, steps * fields["per_device_train_batch_size"], run.seed)
    began = time.perf_counter()
    prepare(model, study, arm, text.train)
    with tempfile.TemporaryDirectory() as folder:
        fields |= {
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": run.rate,
            "seed": run.seed,
            "logging_steps": 50,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": DEVICE == "cpu",
            "dataloader_pin_memory": False,
        }
        make_trainer(model, arm, teacher, train, fields).train()
        seconds = drawing + time.perf_counter() - began
        if arm.peer is None and arm.quantization is not None:
            hb.pack_model(model).save_pretrained(f"{folder}/packed")
            model = tf.AutoModelForCausalLM.from_pretrained(f"{folder}/packed")
            model.to(DEVICE)
        model.eval()
        found = perplexities(model, text.halves)
    here = machine()
    return {
        **vars(run),
        "tokens": steps * fields["per_device_train_batch_size"] * LENGTH + arm.fit * LENGTH,
        "perplexities": found,
        "ratios": [own / full for own, full in zip(found, text.full, strict=True)],
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else here["processor"],
        "commit": here["commit"],
    }
