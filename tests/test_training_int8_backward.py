"""Int8 gradients in training: the gate by measured cosines, what it works with, resume, errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hf_bitnet import QATArguments, pack_model
from hf_bitnet.modules import NativeOnlineLinear, low_precision
from hf_bitnet.modules.low_precision import Int8Backward
from hf_bitnet.surgery import quantized_layers
from hf_bitnet.training.int8_backward import Int8BackwardCallback, Int8BackwardOptions
from tests.qat import (
    BAD,
    ONE_LAYER,
    arguments,
    assert_same,
    examples,
    losses,
    make_trainer,
    quantized,
    said,
    spoil,
    weights,
)


class Watch(tf.TrainerCallback):
    """The form of each layer's backward in each step, as (input, weight, measured) or None."""

    def __init__(self) -> None:
        self.seen: list[dict[str, tuple[bool, bool, bool] | None]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({name: _shown(layer.int8_backward) for name, layer in quantized_layers(kwargs["model"])})


class StopAt(tf.TrainerCallback):
    """Raises at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def _shown(form: Int8Backward | None) -> tuple[bool, bool, bool] | None:
    return None if form is None else (form.input, form.weight, form.meter is not None)


def _callback(trainer: Any) -> Int8BackwardCallback:
    (found,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, Int8BackwardCallback)]
    return found


def _run(folder: Path, model: nn.Module | None = None, name: str = "llama", **fields: Any) -> tuple[Any, Watch]:
    watch = Watch()
    trainer = make_trainer(
        folder, quantized(name, model=ONE_LAYER) if model is None else model, name, **({"int8_backward": {}} | fields)
    )
    trainer.add_callback(watch)  # after those of the trainer
    trainer.train()
    return trainer, watch


INT8, MEASURED = (True, True, False), (True, True, True)


# ---- what is chosen ----


def test_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("int8 gradients that nobody asked for")

    monkeypatch.setattr(low_precision, "input_gradient", fail)
    monkeypatch.setattr(low_precision, "value_gradient", fail)
    trainer, watch = _run(tmp_path, int8_backward=None, max_steps=2)
    assert all(form is None for step in watch.seen for form in step.values()) and "quant/int8_cosine" not in losses(trainer)[1]
    with pytest.raises(AssertionError, match="nobody asked"):
        _run(tmp_path, max_steps=2)


def test_int8_from_the_second_step_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first step is exact, bit for bit; with a gate that nothing passes all of them are."""
    caplog.set_level(logging.INFO, "hf_bitnet")
    exact, _ = _run(tmp_path, int8_backward=None, learning_rate=3e-3, max_steps=8)
    closed, closed_watch = _run(tmp_path, int8_backward={"min_cosine": 1.0}, learning_rate=3e-3, max_steps=8)
    assert_same(weights(exact.model), weights(closed.model))
    assert all(form is None for step in closed_watch.seen[1:] for form in step.values())
    caplog.clear()
    trainer, watch = _run(tmp_path, learning_rate=3e-3, max_steps=8)
    assert [set(step.values()) for step in watch.seen] == [{MEASURED}] + 7 * [{INT8}]
    assert said(caplog) == ["int8_backward: 14 of 14 products of backward are int8 now"]
    logs, by_exact = losses(trainer), losses(exact)
    assert [log["loss"] for log in logs[:2]] == [log["loss"] for log in by_exact[:2]]
    assert logs[0]["grad_norm"] == by_exact[0]["grad_norm"] and logs[1]["grad_norm"] != by_exact[1]["grad_norm"]
    fallen = by_exact[0]["loss"] - by_exact[-1]["loss"]
    assert fallen > 0.1 and abs(logs[-1]["loss"] - by_exact[-1]["loss"]) < 0.1 * fallen
    assert logs[0]["quant/int8_products"] == 1.0 and 0.99 < logs[0]["quant/int8_cosine"] < 1.0
    assert trainer.model is not None
    assert all(layer.int8_backward is None for _, layer in quantized_layers(trainer.model))


def test_the_gate_chooses_product_by_product(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_bitnet")
    trainer, watch = _run(tmp_path, spoil(quantized(model=ONE_LAYER)), max_steps=2)
    expected: dict[str, Any] = dict.fromkeys(watch.seen[1], INT8)
    expected[BAD] = (False, True, False)
    assert watch.seen[1] == expected
    cosines = _callback(trainer).cosines
    assert cosines[BAD]["input"] < 0.9 and cosines[BAD]["weight"] > 0.99
    assert said(caplog)[:2] == [
        "int8_backward: 13 of 14 products of backward are int8 now",
        "int8_backward: 1 of 14 products stay exact, their int8 gradients have a cosine below min_cosine=0.99: "
        f"{BAD} (input) {cosines[BAD]['input']:.4f}",
    ]
    assert losses(trainer)[1]["quant/int8_products"] == pytest.approx(13 / 14)
    assert losses(trainer)[1]["quant/int8_cosine"] == cosines[BAD]["input"]


def test_the_worst_micro_batch_counts(tmp_path: Path) -> None:
    data, fields = examples()[2:4], {"max_steps": 1, "per_device_train_batch_size": 1}
    both, *alone = (
        _callback(_run(tmp_path, train_dataset=each, gradient_accumulation_steps=len(each), **fields)[0]).cosines
        for each in (data, data[:1], data[1:])
    )
    for name, found in both.items():
        for product, cosine in found.items():
            assert cosine == pytest.approx(min(each[name][product] for each in alone), abs=2e-6)
    assert len({alone[0][name]["input"] < alone[1][name]["input"] for name in both}) == 2


def test_measured_again(tmp_path: Path) -> None:
    _, watch = _run(tmp_path, int8_backward={"every": 3}, max_steps=7)
    assert [set(step.values()) for step in watch.seen] == [{MEASURED if step % 3 == 0 else INT8} for step in range(7)]


def test_measured_when_full_strength_is_reached(tmp_path: Path) -> None:
    schedule = {"ramp": "linear", "end": 0.5}
    _, watch = _run(tmp_path, quantization_schedule=schedule, max_steps=6, int8_backward={"min_cosine": 0.5})
    shown = [set(step.values()) for step in watch.seen]
    start = shown.index({MEASURED})
    assert 0 < start < 5 and shown == start * [{None}] + [{MEASURED}] + (5 - start) * [{INT8}]


@pytest.mark.parametrize(("kind", "expected"), [("gaussian", INT8), ("subset", None)])
def test_noise_on_the_grid_only(kind: str, expected: Any, tmp_path: Path) -> None:
    _, watch = _run(tmp_path, weight_noise={"kind": kind}, max_steps=2)
    assert set(watch.seen[1].values()) == {expected}


class NoStep(tf.TrainerCallback):
    """The optimizer finds no gradients."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].zero_grad()


def test_gradients_that_are_not_finite_are_measured_again(tmp_path: Path) -> None:
    """As the first steps of float16's loss scaling are."""
    model, calls = quantized(model=ONE_LAYER), []

    def spoil_some(module: nn.Module, inputs: Any, output: Tensor) -> None:
        calls.append(None)
        if len(calls) <= 2:
            output.register_hook(lambda grad: grad * torch.inf)

    model.get_submodule("lm_head").register_forward_hook(spoil_some)
    _, watch = _run(tmp_path, model, nan_guard=False, callbacks=[NoStep()])
    assert [set(step.values()) for step in watch.seen] == 3 * [{MEASURED}] + [{INT8}]


def test_layers_that_no_gradient_reaches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After eight steps they are left exact."""
    model = quantized(model=ONE_LAYER)
    model.get_submodule(BAD).register_forward_hook(lambda module, inputs, output: output.detach())
    trainer, watch = _run(tmp_path, model, max_steps=10)
    assert [step[BAD] for step in watch.seen] == 8 * [MEASURED] + 2 * [None]
    names = ", ".join(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert said(caplog)[-1] == f"int8_backward: in 8 steps no finite gradient reached {names}: exact"
    assert _callback(trainer).cosines[BAD] == {}


# ---- what it works with ----


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral"])
def test_other_models(name: str, tmp_path: Path) -> None:
    _, watch = _run(tmp_path, quantized(name), name, max_steps=2)
    assert INT8 in watch.seen[1].values()


def test_bfloat16_accumulation_and_checkpointing(tmp_path: Path) -> None:
    fields = {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 3}
    exact, _ = _run(tmp_path, int8_backward=None, **fields)
    plain, watch = _run(tmp_path, **fields)
    assert [set(step.values()) for step in watch.seen] == [{MEASURED}, {INT8}, {INT8}]
    again, _ = _run(tmp_path, activation_checkpointing=True, **fields)
    assert_same(weights(plain.model), weights(again.model))
    assert 0 < abs(losses(plain)[-1]["loss"] - losses(exact)[-1]["loss"]) < 0.01


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(tmp_path: Path) -> None:
    """Nothing is compiled while it is measured; then one graph, with the gradients of eager."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    class Graphs(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    eager, _ = _run(tmp_path, max_steps=3)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "callbacks": [Graphs()]}
    trainer, watch = _run(tmp_path, max_steps=3, **compiled)
    assert [set(step.values()) for step in watch.seen] == [{MEASURED}, {INT8}, {INT8}]
    assert graphs[0] == 0 and 0 < graphs[1] == graphs[2]
    assert losses(trainer)[-1]["loss"] == pytest.approx(losses(eager)[-1]["loss"], abs=1e-3)


def test_resume_equals_no_stop(tmp_path: Path) -> None:
    """What was decided goes on without being measured anew, which would be another step."""
    fields: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole, _ = _run(tmp_path / "whole", spoil(quantized(model=ONE_LAYER)), **fields)
    with pytest.raises(InterruptedError):
        _run(tmp_path / "half", spoil(quantized(model=ONE_LAYER)), callbacks=[StopAt(3)], **fields)
    watch = Watch()
    resumed = make_trainer(tmp_path / "half", spoil(quantized(model=ONE_LAYER)), int8_backward={}, **fields)
    resumed.add_callback(watch)
    resumed.train(resume_from_checkpoint=True)
    assert watch.seen[0][BAD] == (False, True, False) and len(watch.seen) == 3
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))
    saved = json.loads((tmp_path / "half" / "checkpoint-4" / "qat_int8_backward.json").read_text())
    assert saved == _callback(whole).cosines
    resumed.train()  # anew
    assert set(watch.seen[3].values()) == {MEASURED}


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    model = quantized(model=ONE_LAYER)
    with pytest.raises(InterruptedError):
        _run(tmp_path, model, callbacks=[StopAt(2)])
    assert all(layer.int8_backward is None for _, layer in quantized_layers(model))


def test_adapters_on_trained_layers(tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(quantized(model=ONE_LAYER), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    trainer, _ = _run(tmp_path, model, max_steps=10)
    found = {name.split(".")[-2]: set(each) for name, each in _callback(trainer).cosines.items() if name.endswith("base_layer")}
    # below the queries nothing is trained; the weights are frozen
    assert found == {"q_proj": set(), "down_proj": {"input"}}


def test_adapters_on_packed_layers(tmp_path: Path) -> None:
    """With transformers' own Trainer, to which the callback is given."""
    import peft

    model = peft.get_peft_model(pack_model(quantized()), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    callback, watch = Int8BackwardCallback(Int8BackwardOptions()), Watch()
    args = arguments(tmp_path, max_steps=2)
    trainer = tf.Trainer(model=model, args=args, train_dataset=examples(), callbacks=[callback, watch])  # type: ignore[arg-type]
    trainer.train()
    second = {name: form for name, form in watch.seen[1].items() if ".layers.1." in name}
    assert len(second) == 7 and set(second.values()) == {(True, False, False)}
    assert all(layer.int8_backward is None for _, layer in quantized_layers(model))


# ---- errors ----


@pytest.mark.parametrize(
    ("written", "kind", "words"),
    [
        ({"min_cosine": 99}, ValueError, "int8_backward: min_cosine=99 is out of range; legal: from -1 to 1; it is a cosine"),
        ({"min_cosine": "high"}, TypeError, "int8_backward: min_cosine must be a number from -1 to 1, got 'high'"),
        ({"every": -1}, ValueError, "int8_backward: every must be a whole number of at least 0, got -1"),
        ({"min_cos": 0.9}, ValueError, "int8_backward has no key 'min_cos'; legal: 'min_cosine', 'every'. Did you mean"),
        (True, TypeError, "int8_backward must be a Int8BackwardOptions, a dict, JSON text"),
    ],
)
def test_what_is_refused(written: Any, kind: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        QATArguments(output_dir=str(tmp_path), int8_backward=written)


def test_models_without_any_such_product_are_refused(tmp_path: Path) -> None:
    model = quantized(model=ONE_LAYER, weight="int4", group_size=16, activation="int8_asymmetric")
    with pytest.raises(ValueError, match=r"no layer has a product that int8 gradients serve: .*granularity='channel'"):
        make_trainer(tmp_path, model, int8_backward={}).train()
    # one product is enough
    _, watch = _run(tmp_path, quantized(model=ONE_LAYER, weight="int4", group_size=16), max_steps=2)
    assert set(watch.seen[1].values()) == {(False, True, False)}


def test_native_layers_are_refused(tmp_path: Path) -> None:
    model = quantized(model=ONE_LAYER)
    layer: Any = model.get_submodule(BAD)
    model.set_submodule(BAD, NativeOnlineLinear.from_float(layer, layer.spec))
    with pytest.raises(ValueError, match=rf"{BAD} is of transformers' native kind.*hf_bitnet.convert_native\(model\) first"):
        make_trainer(tmp_path, model, int8_backward={}).train()
