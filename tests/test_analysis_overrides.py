"""Overrides made from reports, and the chart of a report."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch

import hf_bitnet as hb
from hf_bitnet.reports import Bar, LayerRow, Report, bar_chart
from tests.tiny import tiny
from tests.trained import batch, trained_llama

TERNARY = hb.BitNetQuantizationConfig(weight="ternary")


# ---- suggest_overrides ----


@pytest.mark.parametrize("to", ["int8", "int4", "keep", {"weight": "int4", "granularity": "group", "group_size": 16}])
def test_a_suggestion_lowers_the_loss(to: Any) -> None:
    def loss(overrides: dict[str, Any]) -> float:
        model = hb.quantize_model(trained_llama(), hb.BitNetQuantizationConfig(overrides=overrides))
        with torch.no_grad():
            return float(model(**batch(seed=5)).loss)

    report = hb.sensitivity(hb.quantize_model(trained_llama(), TERNARY), [batch()])
    suggestion = hb.suggest_overrides(report, worst=3, to=to)
    assert len(suggestion) == 3
    before, after = loss({}), loss(suggestion)
    assert after < 0.8 * before
    # the worst three help more than the best three
    mild = {f"^{row.name}$": next(iter(suggestion.values())) for row in report[-3:]}
    assert after < loss(mild)


def test_a_suggestion_names_exactly_its_layer_and_survives_json() -> None:
    model, one = tiny("llama", labels=True)
    report = hb.sensitivity(hb.quantize_model(model, TERNARY), [one])
    suggestion = json.loads(json.dumps(hb.suggest_overrides(report, 14)))
    config = hb.BitNetQuantizationConfig(overrides=suggestion)
    positive = [row.name for row in report if row.increase > 0]
    assert 0 < len(positive) <= 14 and len(suggestion) == len(positive)
    for row in report:
        assert config.layer(row.name).weight == ("int8" if row.name in positive else "ternary")
        assert config.layer(f"x.{row.name}").weight == config.layer(f"{row.name}.x").weight == "ternary"


class Fixed(Report[LayerRow]):
    ranked_by = "weights"


def fixed(*sizes: tuple[float, int]) -> Fixed:
    return Fixed(LayerRow(f"l{i}", "s", "a", bits, weights) for i, (bits, weights) in enumerate(sizes))


def test_suggestion_passes_over_layers_with_as_many_bits() -> None:
    report = fixed((8, 30), (4, 20), (2, 10), (2, 0))
    assert list(hb.suggest_overrides(report, 4)) == ["^l1$", "^l2$"]
    assert list(hb.suggest_overrides(report, 4, to="int4")) == ["^l2$"]
    assert list(hb.suggest_overrides(report, 4, to="keep")) == ["^l0$", "^l1$", "^l2$"]
    assert list(hb.suggest_overrides(report, 4, to={"activation": "none"})) == ["^l0$", "^l1$", "^l2$"]
    assert list(hb.suggest_overrides(report)) == ["^l1$", "^l2$"]
    dotted = Fixed([LayerRow("a.b", "s", "a", 2, 1)])
    assert hb.suggest_overrides(dotted) == {r"^a\.b$": {"weight": "int8"}}


def test_suggestion_within_a_budget_of_bits() -> None:
    # 2 bits on average; the first to 4 bits: 3.0 on average, the second: +0.6, the third: +0.4
    report = fixed((2, 50), (2, 30), (2, 20))
    assert list(hb.suggest_overrides(report, to="int4", max_average_bits=3.0)) == ["^l0$"]
    assert list(hb.suggest_overrides(report, to="int4", max_average_bits=2.7)) == ["^l1$"]
    assert list(hb.suggest_overrides(report, to="int4", max_average_bits=3.4)) == ["^l0$", "^l2$"]
    assert hb.suggest_overrides(report, to="keep", max_average_bits=4.0) == {}
    with pytest.raises(
        ValueError, match=r"max_average_bits=1\.5 is less than the .* bits a weight that the layers have already"
    ):
        hb.suggest_overrides(report, to="int4", max_average_bits=1.5)
    assert report.average_bits == 2.0
    ternary = fixed((1.58, 184), (1.58, 304), (1.58, 112))
    assert ternary.average_bits > 1.58, "by rounding"
    assert hb.suggest_overrides(ternary, to="int4", max_average_bits=1.58) == {}


def test_errors_of_a_suggestion() -> None:
    report = fixed((2, 10))
    with pytest.raises(TypeError, match=r"takes a report, got list; for example suggest_overrides\(sensitivity\("):
        hb.suggest_overrides([])  # type: ignore[arg-type]
    for worst in (0, True, 1.5):
        with pytest.raises(ValueError, match="worst must be a positive whole number"):
            hb.suggest_overrides(report, worst)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown weight scheme 'int3'; legal: .*'int4'"):
        hb.suggest_overrides(report, to="int3")
    with pytest.raises(ValueError, match="names 'bits'; fields of a layer: weight"):
        hb.suggest_overrides(report, to={"bits": 4})
    packed = hb.pack_model(hb.quantize_model(tiny("llama")[0], TERNARY))
    with pytest.raises(ValueError, match=r"ranks no layer .*use sensitivity\(model, batches\)"):
        hb.suggest_overrides(hb.layer_report(packed))


# ---- the chart ----

SVG = "{http://www.w3.org/2000/svg}"


def widths(svg: str) -> list[float]:
    return [float(rect.attrib["width"]) for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect")]


def test_bars_are_proportional() -> None:
    svg = bar_chart("Title", "", [Bar("a", 1.0, "1"), Bar("b", 0.5, "0.5"), Bar("c", 0.0, "0"), Bar("d", -0.25, "")])
    a, b, c, d = widths(svg)
    assert a == pytest.approx(2 * b, rel=0.01) == pytest.approx(4 * d, rel=0.01) and c <= 0.5
    assert "currentColor" in svg and "prefers-color-scheme: dark" in svg


@pytest.mark.parametrize(
    "values", [[], [0.0], [1e-9, 2e-9], [3e12], [-1.0, -2.0], [-5.0, 1.0], [math.nan, 1.0], [math.inf], [0.3] * 3]
)
def test_every_bar_lies_inside_the_picture(values: list[float]) -> None:
    svg = bar_chart("Title & <tag>", "sub", [Bar(f"<{i}>", value, "x") for i, value in enumerate(values)], ["a & b"])
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    rects = list(root.iter(f"{SVG}rect"))
    assert len(rects) == len(values)
    for rect in rects:
        x, y = float(rect.attrib["x"]), float(rect.attrib["y"])
        assert x > 0 and x + float(rect.attrib["width"]) < width and 0 < y < height
    ticks = [float(text.text or "") for text in root.iter(f"{SVG}text") if text.attrib.get("text-anchor") == "middle"]
    assert 0.0 in ticks and 2 <= len(ticks) <= 8 and len(set(ticks)) == len(ticks)
    lines = [float(line.attrib["x1"]) for line in root.iter(f"{SVG}line")]
    assert min(lines) > 0 and max(lines) < width


def test_chart_of_a_report() -> None:
    model, one = tiny("llama", labels=True)
    report = hb.sensitivity(hb.quantize_model(model, TERNARY), [one])
    svg = report.to_svg(limit=5)
    assert len(widths(svg)) == 5 and "and 9 more layers" in svg and report[0].name in svg and report[5].name not in svg
    assert len(widths(report.to_svg())) == 14
    assert "20 %" in hb.output_report(model, [one]).to_svg()
