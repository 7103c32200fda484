"""QATTrainer under schedules with stages and with layers that follow one another: what each step uses, logs and leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch._dynamo.utils import counters

from hf_bitnet import BitNetQuantizationConfig, QuantizationSchedule, quantize_model
from hf_bitnet.modules import TrainedLayer
from hf_bitnet.relaxations import RELAXATIONS
from hf_bitnet.surgery import trained_layers
from hf_bitnet.training.strength import StrengthCallback
from tests.qat import ONE_LAYER, arguments, assert_same, examples, losses, make_trainer, quantized, weights
from tests.tiny import tiny

PROGRESSIVE = {"ramp": "none", "stages": {"int8": 2, "int4": 4}}


class _Watch(tf.TrainerCallback):
    """What each layer is during each step."""

    def __init__(self) -> None:
        self.schemes: list[list[str]] = []
        self.strengths: list[list[float]] = []
        self.relaxed: list[list[bool]] = []
        self.scales: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = [layer for _, layer in trained_layers(kwargs["model"])]
        self.schemes.append([layer.quantizer.scheme for layer in layers])
        self.strengths.append([float(layer.strength) for layer in layers])
        self.relaxed.append([layer.relaxed for layer in layers])
        if layers[0].weight_scale is not None:
            assert layers[0].weight_scale.grad is not None
            self.scales.append(layers[0].weight_scale.grad.clone())


def _layers(model: Any) -> list[TrainedLayer]:
    return [layer for _, layer in trained_layers(model)]


# ---- stages ----


def test_bits_fall_and_weights_and_optimizer_stay(tmp_path: Path) -> None:
    model, watch = quantized(overrides={r"o_proj": {"weight": "int4"}}), _Watch()
    parameters = {id(p) for p in model.parameters()}
    run = {"max_steps": 6, "callbacks": [watch], "gradient_accumulation_steps": 2, "teacher": "self"}
    trainer = make_trainer(tmp_path, model, quantization_schedule=PROGRESSIVE, **run)
    trainer.train()
    names = [name for name, _ in trained_layers(model)]
    fixed = [i for i, name in enumerate(names) if "o_proj" in name]
    assert fixed
    for step, (scheme, own) in enumerate([("int8", "int8")] * 2 + [("int4", "int4")] * 2 + [("ternary", "int4")] * 2):
        # a layer whose own scheme has as many bits keeps it
        assert watch.schemes[step] == [own if i in fixed else scheme for i in range(len(names))]
    assert {id(p) for p in model.parameters()} == parameters
    assert all(state["step"] == 6 for state in trainer.optimizer.state.values())  # Adam's moments were never dropped
    shares = [log["quant/bits"] for log in losses(trainer)]
    assert shares[0] == 8.0 and shares[2] == 4.0 and 1.58 < shares[4] < 4.0
    flips = [log["quant/flip_rate"] for log in losses(trainer)]
    assert max(flips[2:]) < 0.2 < flips[0]  # counted on the grid of the stage; codes of different grids are never compared
    assert not any(layer.source.idle_scale or layer.relaxed for layer in _layers(model))


def test_a_stage_trains_what_that_scheme_would(tmp_path: Path) -> None:
    """Two steps of the int8 stage are two steps of an int8 model."""
    run = {"max_steps": 6, "lr_scheduler_type": "constant"}
    staged = make_trainer(tmp_path, quantized(), quantization_schedule=PROGRESSIVE, **run)
    plain = make_trainer(tmp_path, quantized(weight="int8"), **run)
    staged.train()
    plain.train()
    for own, other in zip(losses(staged)[:2], losses(plain)[:2], strict=True):
        assert own["loss"] == other["loss"] and own["grad_norm"] == other["grad_norm"]
    assert losses(staged)[4]["loss"] != losses(plain)[4]["loss"]


def test_learned_scales_wait_and_start_from_the_weights(tmp_path: Path) -> None:
    class AtStart(tf.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layer = _layers(kwargs["model"])[0]
            seen.append((layer.weight_scale.detach().clone(), layer.spec.weight.compute_scale(layer.matrix)))  # type: ignore[union-attr]

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    watch, model = _Watch(), quantized(weight="int2_seq", weight_scale="learned")
    run = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "callbacks": [watch, AtStart()]}
    make_trainer(tmp_path, model, quantization_schedule={**PROGRESSIVE, "log_gap": False}, **run).train()
    assert [bool(grad.any()) for grad in watch.scales] == [False] * 4 + [True] * 2
    first = seen[0][0]
    assert all(torch.equal(scale, first) for scale, _ in seen[:4])  # untouched while they wait
    assert torch.equal(*seen[4]) and not torch.equal(seen[4][0], first)
    assert not torch.equal(*seen[5])  # and trained from there


@pytest.mark.parametrize("fields", [{}, {"weight": "int2_seq", "weight_scale": "learned"}])
def test_evaluation_is_of_the_final_scheme_and_changes_nothing(fields: dict, tmp_path: Path) -> None:
    schedule = {"ramp": "linear", "end": 5, "stages": {"int8": 2, "int4": 4}, "layers": "forward"}
    runs = {}
    for every in (False, True):
        model = quantized(model=ONE_LAYER, **fields)
        strategy = {"eval_strategy": "steps", "eval_steps": 1} if every else {}
        trainer = make_trainer(tmp_path, model, quantization_schedule=schedule, max_steps=6, **strategy)
        trainer.train()
        runs[every] = weights(model), losses(trainer)
    assert_same(runs[False][0], runs[True][0])
    assert runs[False][1] == runs[True][1]
    found = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == found[-1]

    class Evaluate(tf.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # a twin that has these weights, and its scales from them, measures the same
            if state.global_step == 1:
                twin = quantized(model=ONE_LAYER, **fields)
                twin.load_state_dict(weights(kwargs["model"]))
                for layer in _layers(twin):
                    layer.reset_scale()
                same.append(make_trainer(tmp_path / "twin", twin).evaluate()["eval_loss"])

    same: list[float] = []
    strategy = {"eval_strategy": "steps", "eval_steps": 1, "callbacks": [Evaluate()]}
    model = quantized(model=ONE_LAYER, **fields)
    make_trainer(tmp_path, model, quantization_schedule=schedule, max_steps=6, **strategy).train()
    assert same == [found[0]]


def test_stages_that_serve_nobody(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'int4' has 4 bits, and every layer of the model has as many or more.*leave that"):
        make_trainer(tmp_path, quantized(weight="int4"), quantization_schedule={"stages": {"int8": 0.2, "int4": 0.3}}).train()


# ---- layer after layer ----


def test_layers_follow_one_another(tmp_path: Path) -> None:
    model, watch = quantized(sub_norm=["o_proj"]), _Watch()
    names = [name for name, _ in trained_layers(model)]
    order = sorted(names, key=lambda name: name[::-1])
    schedule = QuantizationSchedule("linear", 0.0, 8, layers=tuple(order), layer_window=0.25)
    trainer = make_trainer(tmp_path, model, quantization_schedule=schedule, max_steps=10, callbacks=[watch])
    trainer.train()
    plan = schedule.plan(10, names)
    for step, strengths in enumerate(watch.strengths):
        assert strengths == pytest.approx(plan.strengths(step))
        assert watch.relaxed[step] == [strength < 1.0 for strength in strengths]
    done = [log["quant/layers_done"] for log in losses(trainer)]
    assert done == sorted(done) and done[0] == 0 and done[-1] == len(names) and 0 < done[5] < len(names)
    means = [log["quant/strength"] for log in losses(trainer)]
    assert means == pytest.approx([sum(plan.strengths(step)) / len(names) for step in range(10)])
    assert all(float(layer.sub_norm.blend) == 1.0 for layer in _layers(model) if layer.sub_norm is not None)


def test_names_that_are_not_of_the_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(), quantization_schedule={"layers": ["lm_head"]})
    with pytest.raises(ValueError, match="'lm_head' is none of them"):
        trainer.train()
    assert all(float(layer.strength) == 1.0 for layer in _layers(trainer.model))


def test_epochs_are_those_of_the_data(tmp_path: Path) -> None:
    """32 examples, 4 at a time, 2 accumulated: 4 steps an epoch."""
    watch = _Watch()
    fields = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "callbacks": [watch]}
    make_trainer(
        tmp_path, quantized(), quantization_schedule={"ramp": "step", "stairs": 1, "end": "2 epochs"}, **fields
    ).train()
    assert [each[0] for each in watch.strengths] == [0.0] * 8 + [1.0] * 4


def test_data_without_length(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(examples() * 8)

    for end, fails in (("2 epochs", True), (0.5, False)):
        trainer = make_trainer(tmp_path, quantized(), train_dataset=Stream(), quantization_schedule={"end": end})
        if fails:
            with pytest.raises(ValueError, match="'2 epochs' cannot be told in steps"):
                trainer.train()
        else:
            trainer.train()


# ---- together with the rest ----


@pytest.mark.parametrize("name", RELAXATIONS.names())
def test_every_relaxation_ends_hard(name: str, tmp_path: Path) -> None:
    """With distillation and accumulation; 4 micro-batches of 2 are 2 of 4, and the end is the integer step."""
    found = []
    for batch, accumulate in ((4, 2), (2, 4)):
        model = quantized(model=ONE_LAYER, relaxation=name, weight="int2_seq", weight_scale="learned")
        schedule = {"ramp": "linear", "end": 3, "layers": "forward", "layer_window": 0.5}
        run = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "optim": "sgd"}
        trainer = make_trainer(tmp_path, model, quantization_schedule=schedule, teacher="self", max_steps=4, **run)
        trainer.train()
        assert all(not layer.relaxed and float(layer.strength) == 1.0 for layer in _layers(model))
        found.append([log["loss"] for log in losses(trainer)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_gap_between_soft_and_hard(tmp_path: Path) -> None:
    """What the log says is what an evaluation of both models on that micro-batch says."""

    class Measure(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model, losses = kwargs["model"].eval(), []
            with torch.no_grad():
                losses.append(model(**trainer._last_inputs).loss if trainer._last_inputs else None)
                with trainer._strength.at_full_strength():
                    losses.append(model(**trainer._last_inputs).loss if trainer._last_inputs else None)
            model.train()
            expected.append(None if losses[0] is None else float(losses[1] - losses[0]))

    expected: list[float | None] = []
    schedule = {"ramp": "linear", "end": 3, "stages": {"int8": 2}}
    trainer = make_trainer(tmp_path, quantized(), quantization_schedule=schedule, max_steps=5, callbacks=[Measure()])
    trainer.train()
    gaps = [log.get("quant/hard_gap") for log in losses(trainer)]
    assert gaps == [pytest.approx(gap, abs=1e-6) if gap is not None else None for gap in expected]
    assert all(gap is not None for gap in gaps[:3]) and gaps[3:] == [None, None] and abs(gaps[0] or 0) > 1e-4
    runs = {}
    for on in (True, False):
        model = quantized(model={"attention_dropout": 0.3})
        trainer = make_trainer(tmp_path, model, quantization_schedule={**schedule, "log_gap": on}, max_steps=5)
        trainer.train()
        runs[on] = weights(model)
        assert any("quant/hard_gap" in log for log in losses(trainer)) is on
    assert_same(runs[True], runs[False])  # measuring changes nothing, nor the random state


# torch (2.13) itself makes an instance of autograd.Function while it traces one
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["linear layers", "llama"])
def test_one_graph_while_the_strengths_move(whole: bool) -> None:
    """Under torch.compile layers go over to integers together, and each stage is one recompilation."""
    torch._dynamo.reset()
    counters.clear()
    model: Any
    if whole:
        model, batch = tiny("llama", labels=True, num_hidden_layers=1)
    else:
        model, batch = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), {"input": torch.randn(5, 16)}

    def loss(run: Any) -> float:
        return (run(**batch).loss if whole else run(**batch).square().mean()).item()

    quantize_model(model, BitNetQuantizationConfig()).train()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    schedule = {"ramp": "linear", "end": 6, "stages": {"int4": 3}, "layers": "forward", "layer_window": 0.5}
    args = arguments(".", max_steps=8, quantization_schedule=schedule)
    args.torch_compile = True
    callback, state, control = StrengthCallback(), tf.TrainerState(max_steps=8), tf.TrainerControl()
    graphs, found = [], []
    for step in range(8):
        state.global_step = step
        (callback.on_train_begin if step == 0 else callback.on_step_begin)(args, state, control, model=model)
        found.append(loss(compiled))
        with torch.compiler.set_stance("force_eager"):
            assert found[-1] == pytest.approx(loss(model), rel=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs == [1, 1, 1, 2, 2, 2, 3, 3]
    assert len({round(loss, 6) for loss in found[:6]}) == 6  # the strengths did arrive
    callback.finish()


@pytest.mark.parametrize("schedule", [None, "linear", PROGRESSIVE, {"layers": "forward"}])
def test_arguments_are_plain_data(schedule: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, quantization_schedule=schedule)
    written = json.loads(args.to_json_string())["quantization_schedule"]
    assert QuantizationSchedule.read(written) == args.quantization_schedule
