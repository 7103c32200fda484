"""Ramps, moments and QuantizationSchedule as pure functions; third parties may add a ramp."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from typing import Any

import pytest

from hf_bitnet import QuantizationSchedule, sensitivity
from hf_bitnet.training import RAMPS
from hf_bitnet.training.moments import read_moment, step_of
from hf_bitnet.training.quantization_schedule import HARD_SHARE
from tests.qat import quantized
from tests.tiny import tiny

STEPS = 100
NAMES = ("a", "b", "c", "d", "e")


# ---- ramps ----


@pytest.mark.parametrize("name", [name for name in RAMPS if name != "none"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.3), (0.25, 0.75), (0.5, 0.9), (0.4, 0.4), (0.0, 0.0), (0.9, 0.9)])
@pytest.mark.parametrize("stairs", [1, 4])
@pytest.mark.parametrize("layers", ["together", "forward", "backward"])
def test_bounds_and_order(name: str, start: float, end: float, stairs: int, layers: str) -> None:
    plan = QuantizationSchedule(name, start, end, stairs, layers=layers).plan(STEPS, NAMES)
    runs = list(zip(*[plan.strengths(step) for step in range(STEPS + 1)], strict=True))
    for values in runs:
        assert all(value == 0.0 for step, value in enumerate(values) if step <= start * STEPS and step < end * STEPS)
        assert all(value == 1.0 for step, value in enumerate(values) if step >= end * STEPS)
        assert list(values) == sorted(values)
        if end - start >= 0.3 and stairs > 1:
            assert any(0.0 < value < 1.0 for value in values)
    if layers == "forward":
        assert all(list(now) == sorted(now, reverse=True) for now in zip(*runs, strict=True))
    if layers == "backward":
        assert all(list(now) == sorted(now) for now in zip(*runs, strict=True))


def _at(step: int, *args: Any, **fields: Any) -> float:
    return QuantizationSchedule(*args, **fields).plan(STEPS, ("a",)).strengths(step)[0]


def test_values() -> None:
    assert [_at(step, "none", 0.5, 0.8) for step in (0, 99)] == [1.0, 1.0]
    for ramp in ("linear", "cosine", "sigmoid"):
        assert _at(15, ramp, 0.0, 0.3) == pytest.approx(0.5)
    early = [_at(3, ramp, 0.0, 0.3) for ramp in ("linear", "cosine", "sigmoid")]
    assert early == sorted(early, reverse=True) and early[0] == pytest.approx(0.1)
    assert _at(15, "exponential", 0.0, 0.3) == pytest.approx((2.718281828**2.5 - 1) / (2.718281828**5 - 1))
    assert {_at(step, "step", 0.0, 0.8) for step in range(100)} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert _at(50, "linear", "20 steps", "80%") == pytest.approx(0.5)


def test_each_layer_has_its_own_window() -> None:
    plan = QuantizationSchedule("linear", 0, 80, layers=("c", "a", "e", "b", "d"), layer_window=0.5).plan(STEPS, NAMES)
    # windows of 40 steps that begin at 0, 10, 20, 30, 40 in the order given
    assert plan.strengths(40) == pytest.approx([0.75, 0.25, 1.0, 0.0, 0.5])
    assert plan.strengths(79)[3] < 1.0 == plan.strengths(80)[3]
    assert plan.to_dict()["layers"] == ["c", "a", "e", "b", "d"]


def test_stages_follow_one_another() -> None:
    schedule = QuantizationSchedule("none", stages={"int8": 0.2, "int4": "50 steps"})
    plan = schedule.plan(STEPS, NAMES)
    assert [plan.stage(step) for step in (0, 19, 20, 49, 50, 99)] == [0, 0, 1, 1, 2, 2]
    assert plan.strengths(0) == [1.0] * 5


# ---- moments ----


@pytest.mark.parametrize(
    ("written", "normal", "step"),
    [
        *[(0.3, 0.3, 3), ("30%", 0.3, 3), (1.0, 1.0, 10), (4, 4, 4), ("4 steps", 4, 4), ("1 step", "1 step", 1), (0, 0, 0)],
        *[
            ("2 epochs", "2 epochs", 8),
            ("0.5 epochs", "0.5 epochs", 2),
            ("1 epoch", "1 epoch", 4),
            ("2.0epochs", "2 epochs", 8),
        ],
    ],
)
def test_moments(written: Any, normal: Any, step: int) -> None:
    moment = read_moment("end", written)
    assert moment == normal and type(moment) is type(normal)
    assert read_moment("end", json.loads(json.dumps(moment))) == moment
    assert step_of("end", moment, 10, 4) == step


@pytest.mark.parametrize(
    ("written", "kind", "words"),
    [
        (1, ValueError, r"end=1 can be one step or the whole run; write end='1 step' or end=1.0"),
        (-3, ValueError, "end=-3 lies before the run"),
        (1.5, ValueError, "end=1.5 is no fraction from 0.0 to 1.0; legal"),
        (500.0, ValueError, "500 steps are end=500; legal"),
        (float("nan"), ValueError, "end=nan is no fraction"),
        ("soon", ValueError, "end='soon' is no point in a run; legal: a fraction of the steps"),
        ("0.5 steps", ValueError, "steps are whole numbers"),
        (True, TypeError, "got bool True"),
        (None, TypeError, "got NoneType None"),
    ],
)
def test_what_is_no_moment(written: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        QuantizationSchedule(end=written)


# ---- the object ----


@pytest.mark.parametrize(
    "schedule",
    [
        QuantizationSchedule(),
        QuantizationSchedule("sigmoid", "1 step", "2 epochs", layers=("b", "a"), log_gap=False),
        QuantizationSchedule("none", stages={"int8": 0.2, "int4": "1.5 epochs", "int2_seq": 300}),
    ],
)
def test_survives_json(schedule: QuantizationSchedule, tmp_path: Any) -> None:
    text = json.dumps(asdict(schedule))
    (tmp_path / "schedule.json").write_text(text)
    for written in (schedule, json.loads(text), text, str(tmp_path / "schedule.json")):
        assert QuantizationSchedule.read(written) == schedule
    assert hash(schedule) == hash(QuantizationSchedule.read(text))


def test_read() -> None:
    assert QuantizationSchedule.read(None) is None
    assert QuantizationSchedule.read("cosine") == QuantizationSchedule(ramp="cosine")


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"ramp": "linaer"}, ValueError, "unknown ramp 'linaer'.*Did you mean 'linear'"),
        ({"start": 0.5, "end": 0.2}, ValueError, "start=0.5 lies behind end=0.2.*start=0.2, end=0.5"),
        ({"end": 0.95}, ValueError, r"end 0.95 leaves 0.05 of the steps to the fully quantized model.*at most 0.9"),
        ({"stages": {"int8": 0.95}}, ValueError, r"stages\['int8'\] 0.95 leaves"),
        ({"stages": {"int4": 0.2, "int8": 0.4}}, ValueError, "from more bits to fewer, got 4, 8"),
        ({"stages": {"int8": 0.4, "int4": 0.2}}, ValueError, "each stage has to end after the one before"),
        ({"stages": {"int7": 0.4}}, ValueError, "unknown weight scheme 'int7'"),
        ({"stages": "int8"}, TypeError, "stages must map weight schemes to the moments they end.*stages={'int8': 0.2"),
        ({"layers": "sideways"}, ValueError, "layers='sideways'; legal: 'together', 'forward', 'backward' or the names"),
        ({"layers": 3}, TypeError, "layers must be 'together'.*got 3"),
        ({"layers": ["a", "a"]}, ValueError, "layers names 'a' twice"),
        ({"layer_window": 0}, ValueError, "layer_window=0 leaves no time.*ramp='step', stairs=1"),
        ({"layer_window": 1.5}, ValueError, "layer_window=1.5 is out of range"),
        ({"ramp": "none", "layers": "forward"}, ValueError, "ramp='none' quantizes all layers from the first step"),
        ({"log_gap": 1}, TypeError, "log_gap must be True or False"),
    ],
)
def test_wrong_fields(fields: dict, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        QuantizationSchedule(**fields)


def test_the_last_tenth_is_hard_whatever_the_unit() -> None:
    for steps in range(1, 60):
        plan = QuantizationSchedule(end=1 - HARD_SHARE).plan(steps)
        assert steps - plan.end >= HARD_SHARE * steps - 1e-9
    with pytest.raises(ValueError, match=r"end 95 is step 95 of 100; the last 10% of the steps.*at most 90 \(or 0.9\)"):
        QuantizationSchedule(end=95).plan(100)
    with pytest.raises(ValueError, match=r"stages\['int8'\] '2 epochs' is step 100 of 100"):
        QuantizationSchedule("none", stages={"int8": "2 epochs"}).plan(100, steps_per_epoch=50)
    with pytest.raises(ValueError, match=r"start='1 epoch' is step 50, behind end=0.3, which is step 30"):
        QuantizationSchedule(start="1 epoch").plan(100, steps_per_epoch=50)
    with pytest.raises(ValueError, match="the length of an epoch is not known; write a fraction"):
        QuantizationSchedule(end="2 epochs").plan(100)
    with pytest.raises(ValueError, match="stages end at steps 50, 20 of 100"):
        QuantizationSchedule("none", stages={"int8": 50, "int4": 0.2}).plan(100)


def test_order_must_name_the_layers() -> None:
    schedule = QuantizationSchedule(layers=("a", "b", "x"))
    with pytest.raises(ValueError, match=r"each of the model's 2 quantized layers, 'x' is none of them.*from_sensitivity"):
        schedule.plan(100, ("a", "b"))
    with pytest.raises(ValueError, match="'c' is missing"):
        schedule.plan(100, ("a", "b", "c", "x"))


def test_most_robust_first() -> None:
    model, batch = quantized(), tiny("llama")[1]
    report = sensitivity(model, [batch], max_batches=1, progress=False)
    schedule = QuantizationSchedule.from_sensitivity(report, end=0.5)
    assert schedule.layers == tuple(row.name for row in sorted(report, key=lambda row: row.increase))
    assert schedule.end == 0.5
    with pytest.raises(TypeError, match=r"takes what sensitivity\(model, batches\) returns, got dict"):
        QuantizationSchedule.from_sensitivity({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="does not take 'ending'; legal: ramp, start, end"):
        QuantizationSchedule.from_sensitivity(report, ending=0.5)


# ---- the drawing ----


def test_plot() -> None:
    schedule = QuantizationSchedule("cosine", 0.1, 0.6, stages={"int8": 0.2, "int4": 0.4}, layers=("<a>", "b"))
    svg = ElementTree.fromstring(schedule.plot(max_steps=500))
    texts = [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "cosine from step 50 to 300 of 500; layers in a given order" in texts
    assert [text for text in texts if text in ("int8", "int4", "the config's own")] == ["int8", "int4", "the config's own"]
    curves = list(svg.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [curve[0].text for curve in curves] == ["<a>", "b", "strength (mean)"]
    last = [float(number) for number in curves[-1].attrib["points"].split()[-1].split(",")]
    first = [float(number) for number in curves[-1].attrib["points"].split()[0].split(",")]
    assert first == [52.0, 250.0] and last == [620.0, 76.0]  # from the lower left corner to the upper right one


def test_plot_of_the_simple_ones() -> None:
    for schedule in (QuantizationSchedule(), QuantizationSchedule("none"), QuantizationSchedule(layers="forward")):
        ElementTree.fromstring(schedule.plot())
    assert "8 layers, forward" in QuantizationSchedule(layers="forward").plot()
    with pytest.raises(ValueError, match="the length of an epoch is not known"):
        QuantizationSchedule(end="1 epoch").plot()
    assert "to 250 of 1,000" in QuantizationSchedule(end="1 epoch").plot(steps_per_epoch=250)
