"""Reports on what quantization did, overrides made from them, and the chart."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.reports import Report
from hf_bitnet.surgery import quantized_layers
from tests.tiny import tiny
from tests.trained import batch, trained_llama

TERNARY = hb.BitNetQuantizationConfig(weight="ternary")


def table(report: Report[Any]) -> list[str]:
    """The lines of the table, without the summary below it."""
    return str(report).split("\n\n")[0].splitlines()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a measurement must leave alone."""
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    }
    switches = {
        name: (layer.relaxed, layer.bypassed, layer.keep_codes, layer._kept)  # type: ignore[attr-defined]
        for name, layer in quantized_layers(model)
    }
    tensors = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return {"hooks": hooks, "switches": switches, "tensors": tensors, "random": torch.get_rng_state()}


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after["hooks"] == before["hooks"] and after["switches"] == before["switches"]
    assert torch.equal(after["random"], before["random"])
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


# ---- layer_report ----


@pytest.mark.parametrize("weight", ["binary", "ternary", "int2", "int2_seq", "int4", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_numbers_of_a_layer(weight: str, granularity: str) -> None:
    model = nn.Sequential(nn.Linear(32, 24))
    size = 8 if granularity == "group" else None
    config = hb.BitNetQuantizationConfig(weight=weight, weight_scale="absmean", granularity=granularity, group_size=size)
    (row,) = hb.layer_report(hb.quantize_model(model, config))
    w = model[0].weight.detach().double()
    quantized = model[0].quantized_weight()
    scale = quantized.scale.double().repeat_interleave(32 // quantized.scale.shape[1], dim=1).expand(24, 32)
    levels = quantized.codes.double() - float(quantized.zero_point)
    value = levels * scale
    error = float((w - value).square().sum() / w.square().sum())
    assert row.relative_mse == pytest.approx(error, rel=1e-4)
    assert row.sqnr == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(w.flatten(), value.flatten(), dim=0)), abs=1e-6)
    assert row.zeros == pytest.approx(float((value == 0).double().mean()))
    grid = model[0].quantizer.grid
    centre = w - w.mean(dim=None if granularity == "tensor" else 1, keepdim=True) if weight == "binary" else w
    if not (weight == "binary" and granularity == "group"):  # the mean is then that of each group
        half = grid.step / 2
        outside = (centre < (grid.values[0] - half) * scale) | (centre > (grid.values[-1] + half) * scale)
        assert row.clipped == pytest.approx(float(outside.double().mean()))
    assert row.scale == pytest.approx(float(quantized.scale.mean()), rel=1e-6)
    spread = quantized.scale.std(correction=0) / quantized.scale.mean() if quantized.scale.numel() > 1 else 0.0
    assert row.scale_spread == pytest.approx(float(spread), abs=1e-6)
    assert (row.name, row.bits, row.weights) == ("0", model[0].quantizer.bits, 768)
    assert row.scheme == f"{weight}, absmean per {granularity}" + (" of 8" if size else "") and row.activation == "int8"


def test_layer_report_of_models() -> None:
    for name in ("gpt2", "llama"):
        model, _ = tiny(name)
        report = hb.layer_report(hb.quantize_model(model, hb.BitNetQuantizationConfig.w4a8()))
        assert [row.name for row in report] == [layer for layer, _ in quantized_layers(model)]
        assert all(row.sqnr is not None and row.sqnr > 12 for row in report)
        assert report.total_sqnr == pytest.approx(sum(row.sqnr for row in report) / len(report), abs=1)  # type: ignore[misc]
        assert report[0] == report.rows[0] and report[:2] == report.rows[:2]


def test_layer_report_of_a_packed_model() -> None:
    model, _ = tiny("llama")
    before = hb.layer_report(hb.quantize_model(model, TERNARY))
    after = hb.layer_report(hb.pack_model(model))
    for a, b in zip(before, after, strict=True):
        assert b.sqnr is b.relative_mse is b.cosine is b.clipped is None
        assert (b.name, b.scheme, b.bits, b.weights, b.zeros, b.scale) == (
            a.name,
            a.scheme,
            a.bits,
            a.weights,
            a.zeros,
            a.scale,
        )
    assert " - " in table(after)[1] and "SQNR 4" not in after.summary()
    assert after.worst() == [] and "<svg" in after.to_svg()


def test_exact_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight.data = torch.eye(4) * 3
    (row,) = report = hb.layer_report(hb.quantize_model(model, hb.BitNetQuantizationConfig(weight="int8")))
    assert row.relative_mse == 0.0 and row.sqnr == math.inf and row.cosine == pytest.approx(1.0)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["layers"][0]["sqnr"] is None


@pytest.mark.parametrize(
    "make", [hb.layer_report, lambda m: hb.output_report(m, [_batch()]), lambda m: hb.sensitivity(m, [_batch()])]
)
def test_tables_are_aligned(make: Callable[[nn.Module], Report[Any]]) -> None:
    config = hb.BitNetQuantizationConfig(overrides={"mlp": {"weight": "int4", "granularity": "channel", "activation": "int4"}})
    model, _ = tiny("llama")
    report = make(hb.quantize_model(model, config))
    lines = table(report)
    assert len(lines) == 1 + 14 and len({len(line.rstrip()) for line in lines}) == 1
    assert lines[0].startswith("layer ") and "int4, absmax per channel" in str(report)
    assert all(row.name in line for row, line in zip(report, lines[1:], strict=True))
    json.dumps(report.to_dict(), allow_nan=False)


def _batch() -> dict[str, Tensor]:
    return tiny("llama")[1]


# ---- output_report ----


@pytest.mark.parametrize("activation", ["int8", "int4", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_output_error_by_hand(activation: str, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 16, bias=bias), nn.Tanh(), nn.Linear(16, 8, bias=bias))
    batches = [torch.randn(4, 5, 32), torch.randn(3, 32)]
    hb.quantize_model(model, hb.BitNetQuantizationConfig(weight="ternary", activation=activation))
    report = hb.output_report(model, batches)
    rows = {row.name: row for row in report}
    first, second = (torch.cat([x.reshape(-1, 32) for x in batches]), None)
    with torch.no_grad():
        second = model[1](model[0](first))
        for name, x in (("0", first), ("2", second)):
            layer = model.get_submodule(name)
            y = x @ layer.weight.t()
            output = layer(x) - (layer.bias if bias else 0)
            by_weight = x @ layer.quantized_weight().dequantize().t()
            assert rows[name].error == pytest.approx(float((output - y).norm() / y.norm()), rel=1e-4)
            assert rows[name].weight_error == pytest.approx(float((by_weight - y).norm() / y.norm()), rel=1e-4)
            added = float((output - by_weight).norm() / y.norm())
            assert rows[name].activation_error == pytest.approx(added, rel=1e-3, abs=1e-6)
    assert [row.error for row in report] == sorted((row.error for row in report), reverse=True)  # type: ignore[type-var]


def test_output_report_finds_the_damaged_layer() -> None:
    model = trained_llama()
    hb.quantize_model(model, hb.BitNetQuantizationConfig.w8a8(overrides={r"1\.mlp\.up_proj": {"weight": "binary"}}))
    report = hb.output_report(model, [batch()])
    assert report[0].name == "model.layers.1.mlp.up_proj" and report[0].error > 10 * report[1].error  # type: ignore[operator]


def test_output_report_counts_a_sub_norm_as_part_of_the_layer() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(32, 16)), hb.BitNetQuantizationConfig(weight="int8", sub_norm=["0"]))
    hb.set_norm_blend(model, 1.0)
    (row,) = hb.output_report(model, [10 * torch.randn(4, 32)])
    assert row.error < 0.02  # type: ignore[operator]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_is_not_reached_is_listed_last() -> None:
    model = hb.quantize_model(Branches(), TERNARY)
    report = hb.output_report(model, [torch.randn(2, 8)])
    assert [row.name for row in report] == ["used", "unused"] and report[1].error is None
    assert table(report)[2].rstrip().endswith(" -")
    assert list(hb.suggest_overrides(report, 2)) == ["^used$"]
    assert hb.sensitivity(model, [torch.randn(2, 8)])[1].increase == 0.0


# ---- sensitivity ----


def alone(name: str, weight: str = "ternary") -> Tensor:
    """Loss of the trained model with one layer quantized, by quantizing only that one."""
    model = trained_llama()
    hb.quantize_model(
        model, hb.BitNetQuantizationConfig(weight=weight, keep=["."], overrides={f"^{name}$": {"weight": weight}})
    )
    with torch.no_grad():
        return model(**batch()).loss


def test_sensitivity_is_the_loss_with_one_layer_quantized() -> None:
    model = trained_llama()
    with torch.no_grad():
        exact = model(**batch()).loss
        hb.quantize_model(model, TERNARY)
        quantized = model(**batch()).loss
    report = hb.sensitivity(model, [batch()])
    assert report.measure == "loss of the model"
    assert report.full_precision == pytest.approx(float(exact)) and report.quantized == pytest.approx(float(quantized))
    assert len(report) == 14 and [row.increase for row in report] == sorted((row.increase for row in report), reverse=True)
    for row in (report[0], report[5], report[-1]):
        assert row.loss == pytest.approx(float(alone(row.name.replace(".", r"\."))), rel=1e-5)
        assert row.increase == pytest.approx(row.loss - float(exact), abs=1e-5)


def test_sensitivity_without_labels_and_with_a_loss_of_ones_own() -> None:
    model = hb.quantize_model(trained_llama(), TERNARY)
    labelled = batch()
    unlabelled = {"input_ids": labelled["input_ids"]}
    divergence = hb.sensitivity(model, [unlabelled])
    assert divergence.measure == "KL divergence from full precision" and divergence.full_precision == pytest.approx(0, abs=1e-6)
    assert all(row.increase >= -1e-6 for row in divergence)
    by_loss = hb.sensitivity(model, [labelled])
    # two measures of the same damage
    assert {row.name for row in divergence[:2]} & {row.name for row in by_loss[:2]}

    def own(output: Any, one: dict[str, Tensor]) -> Tensor:
        return 2 * nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), one["input_ids"][:, 1:].flatten())

    report = hb.sensitivity(model, iter([unlabelled, unlabelled]), own, max_batches=1)
    assert report.measure == "loss"
    for a, b in zip(by_loss, report, strict=True):
        assert (a.name, 2 * a.increase) == (b.name, pytest.approx(b.increase, abs=1e-4))
    constant = hb.sensitivity(model, [unlabelled], lambda output, one: 1.5)
    assert constant.quantized == 1.5 and constant[0].increase == 0.0


def test_sensitivity_is_the_mean_over_batches() -> None:
    model = hb.quantize_model(trained_llama(), TERNARY)
    one, other = batch(8, seed=1), batch(8, seed=2)
    first, second, both = (hb.sensitivity(model, batches) for batches in ([one], [other], [one, other]))
    assert both.quantized == pytest.approx((first.quantized + second.quantized) / 2, rel=1e-5)
    increases = [{row.name: row.increase for row in report} for report in (first, second)]
    for row in both:
        assert row.increase == pytest.approx((increases[0][row.name] + increases[1][row.name]) / 2, abs=1e-5)


def test_divergence_ignores_padding() -> None:
    model = hb.quantize_model(trained_llama(), TERNARY)
    ids = batch(4)["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids)], 1),
        "attention_mask": torch.cat([ids > 0, ids < 0], 1).long(),
    }
    plain = hb.sensitivity(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert hb.sensitivity(model, [padded]).quantized == pytest.approx(plain.quantized, rel=1e-4)


def test_sensitivity_of_a_module_without_logits() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)), TERNARY)
    x = torch.randn(6, 16)
    report = hb.sensitivity(model, [x])
    assert report.measure == "relative squared error of the output"
    exact = copy.deepcopy(model)
    hb.set_strength(exact, 0.0)
    with torch.no_grad():
        truth, y = exact(x), model(x)
    assert report.quantized == pytest.approx(float((y - truth).square().sum() / truth.square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit"])
def test_reports_of_other_families(name: str) -> None:
    model, one = tiny(name, labels=True)
    hb.quantize_model(model, TERNARY)
    layers = len(list(quantized_layers(model)))
    assert len(hb.sensitivity(model, [one])) == len(hb.output_report(model, [one])) == layers
    assert all(row.error is not None and 0 < row.error < 1.5 for row in hb.output_report(model, [one]))


# ---- nothing changes ----


def broken_loss(output: Any, one: Any) -> Tensor:
    raise RuntimeError("broken")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_state_is_restored(fails: bool, strength: float) -> None:
    model, one = tiny("llama", labels=True)
    hb.quantize_model(model, TERNARY).train()
    model.model.layers[0].eval()
    reference = hb.sensitivity(model, [one])
    hb.set_strength(model, strength)
    before = state(model)
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            hb.sensitivity(model, [one], broken_loss)
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            hb.output_report(model, [one, {}])
    else:
        # the strength of the moment does not matter
        assert hb.sensitivity(model, [one]).to_dict() == reference.to_dict()
        hb.output_report(model, [one])
        hb.layer_report(model)
    assert_same_state(model, before)


def test_inside_kept_codes() -> None:
    model, one = tiny("llama", labels=True)
    hb.quantize_model(model, TERNARY)
    with hb.kept_codes(model):
        hb.sensitivity(model, [one])
        assert all(layer.keep_codes for _, layer in quantized_layers(model))  # type: ignore[attr-defined]
    assert not any(layer.keep_codes or layer._kept for _, layer in quantized_layers(model))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_a_compiled_model_is_measured_without_compiling_and_under_its_plain_names() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), TERNARY)
    x = torch.randn(3, 8)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    assert hb.sensitivity(compiled, [x]).to_dict() == hb.sensitivity(model, [x]).to_dict()
    assert hb.output_report(compiled, [x]).to_dict() == hb.output_report(model, [x]).to_dict()
    assert not graphs
    with torch.no_grad():
        compiled(x)
    assert graphs


# ---- errors ----


@pytest.mark.parametrize("analyse", [hb.output_report, hb.sensitivity])
def test_errors_of_the_reports_on_batches(analyse: Callable[..., Any]) -> None:
    name = analyse.__name__
    plain, one = tiny("llama")
    with pytest.raises(ValueError, match=rf"{name} compares with float weights.*call quantize_model\(model, config\) first"):
        analyse(plain, [one])
    model = hb.quantize_model(plain, TERNARY)
    with pytest.raises(ValueError, match=f"{name} got no batch"):
        analyse(model, [])
    with pytest.raises(TypeError, match=rf"got dict; for one batch write {name}\(model, \[batch\]\)"):
        analyse(model, one)
    with pytest.raises(ValueError, match=r"positive whole number or None, got 1\.5"):
        analyse(model, [one], max_batches=1.5)
    with pytest.raises(ValueError, match=r"unpack_model\(model\) on a packed model"):
        analyse(hb.pack_model(model), [one])
    static = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(activation="int8_static"))
    with pytest.raises(ValueError, match="never calibrated"):
        analyse(static, [one])


def test_layer_report_needs_a_quantized_model() -> None:
    with pytest.raises(ValueError, match=r"Linear has no quantized layer; call quantize_model\(model, config\) first"):
        hb.layer_report(nn.Linear(2, 2))
