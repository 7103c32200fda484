"""Static activation ranges and the gains of inserted norms."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.calibration import OBSERVERS, ObserverOptions
from hf_bitnet.surgery import probing, quantized_layers
from tests.tiny import tiny
from tests.trained import batch, trained_llama

NORMS = [r"o_proj", r"down_proj"]


def static(**fields: Any) -> hb.BitNetQuantizationConfig:
    return hb.BitNetQuantizationConfig(weight="int8", activation="int8_static", **fields)


def inputs_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What every layer of a model gets as its input, by plain hooks."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in quantized_layers(model)
    ]
    with torch.no_grad():
        for one in batches:
            model(**one)
    for hook in hooks:
        hook.remove()
    return seen


def float_inputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    with probing(model, quantized=False):
        return inputs_of(model, batches)


# ---- observers ----


def observed(method: str, tensors: list[Tensor], **options: float) -> float:
    observer = OBSERVERS.get(method)(ObserverOptions(**options))
    for x in tensors:
        observer.update(x.float().abs(), x.float().abs().amax())
    return float(observer.range())


@pytest.mark.parametrize("percentile", [1.0, 50.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_percentile_is_that_of_all_values_together(percentile: float, spread: float) -> None:
    # the batches differ in range by a factor of 100, either way round
    tensors = [torch.randn(40, 250) * spread * factor for factor in (0.1, 1.0, 10.0)]
    truth = float(torch.quantile(torch.cat(tensors).abs().flatten(), percentile / 100))
    found = observed("percentile", tensors, percentile=percentile)
    assert found == pytest.approx(truth, rel=0.01)
    assert observed("percentile", tensors[::-1], percentile=percentile) == found


def test_percentile_100_is_the_maximum_and_an_outlier_does_not_move_99() -> None:
    x = torch.randn(100, 100)
    x[3, 4] = 1e6
    assert observed("percentile", [x], percentile=100.0) == 1e6
    assert observed("percentile", [x], percentile=99.0) < 3.0


def test_percentile_of_zeros_is_zero() -> None:
    assert observed("percentile", [torch.zeros(5)]) == 0.0


def test_moving_average() -> None:
    tensors = [torch.tensor([1.0, -peak]) for peak in (2.0, 4.0, 8.0)]
    assert observed("ema", tensors, momentum=0.0) == 8.0
    # by hand: weights 0.25, 0.5, 1 of the three batches, normalised
    assert observed("ema", tensors, momentum=0.5) == pytest.approx((0.25 * 2 + 0.5 * 4 + 8) / 1.75)
    assert observed("ema", tensors, momentum=0.999) == pytest.approx(14 / 3, rel=1e-3)


# ---- ranges ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "whisper"])
def test_ranges_of_every_layer(name: str) -> None:
    model, one = tiny(name)
    hb.quantize_model(model, static())
    inputs = float_inputs(model, [one])
    assert hb.calibrate(model, [one], percentile=100.0) is model
    for layer_name, layer in quantized_layers(model):
        assert layer.act_scale is not None and layer.act_scale.dtype == torch.float32 and layer.act_scale.dim() == 0
        largest = max(float(x.abs().max()) for x in inputs[layer_name])
        assert float(layer.act_scale) == pytest.approx(largest / 127, rel=1e-6), layer_name


def test_a_calibrated_model_is_close_and_packs() -> None:
    model = trained_llama()
    truth = model(**batch()).loss
    hb.quantize_model(model, static())
    with pytest.raises(ValueError, match="never calibrated"):
        hb.pack_model(model)
    hb.calibrate(model, [batch(seed=2)])
    with torch.no_grad():
        loss = model(**batch()).loss
        assert float(loss) == pytest.approx(float(truth), abs=0.02)
        assert torch.equal(hb.pack_model(model)(**batch()).loss, loss)


def test_packed_layers_are_calibrated_too() -> None:
    model, one = tiny("llama")
    hb.calibrate(hb.quantize_model(model, static()), [one])
    scales = [float(layer.act_scale) for _, layer in quantized_layers(model)]  # type: ignore[arg-type]
    hb.calibrate(hb.pack_model(model), [one, {**one, "input_ids": one["input_ids"].flip(-1)}], method="ema")
    for scale, (name, layer) in zip(scales, quantized_layers(model), strict=True):
        # another method, and int8 weights move the inputs a little
        assert float(layer.act_scale) != scale and float(layer.act_scale) == pytest.approx(scale, rel=0.4), name  # type: ignore[arg-type]
        assert layer.activation.static


def test_moving_average_over_batches_of_a_model() -> None:
    model, one = tiny("llama")
    other = {**one, "input_ids": one["input_ids"].flip(-1) + 1}
    hb.quantize_model(model, static())
    inputs = float_inputs(model, [one, other])
    hb.calibrate(model, [one, other], method="ema", momentum=0.5)
    for name, layer in quantized_layers(model):
        first, second = (float(x.abs().max()) for x in inputs[name])
        assert float(layer.act_scale) * 127 == pytest.approx((0.5 * first + second) / 1.5, rel=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}, lambda x: OrderedDict(input=x)]
)
def test_forms_of_a_batch(wrap: Callable[[Tensor], Any]) -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8)), static())
    x = torch.randn(4, 8)
    hb.calibrate(model, iter([wrap(2 * x), wrap(x)]), percentile=100.0)
    assert float(model[0].act_scale) == pytest.approx(float(x.abs().max()) * 2 / 127)


def test_max_batches() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8)), static())
    hb.calibrate(model, [torch.ones(2, 8), 9 * torch.ones(2, 8)], percentile=100.0, max_batches=1)
    assert float(model[0].act_scale) == pytest.approx(1 / 127)


def test_silent_input_gets_a_positive_scale() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8)), static())
    hb.calibrate(model, [torch.zeros(2, 8)])
    assert float(model[0].act_scale) > 0


# ---- nothing else changes ----


class Noisy(nn.Module):
    """Draws from every generator in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(()) * 0.01 + random.random() * 0.01 + float(np.random.rand()) * 0.01


@pytest.mark.parametrize("fails", [False, True])
def test_state_is_restored(fails: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Noisy(), nn.Dropout(0.5), nn.Linear(8, 8))
    hb.quantize_model(model, static())
    model.train()
    model[3].eval()
    hb.set_strength(model, 0.25)
    before = [(m.training, dict(m.__dict__.get("_forward_pre_hooks", {}))) for m in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers() if not name.endswith("act_scale")}
    wrong = [torch.ones(2, 8), torch.ones(2, 5)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    if fails:
        with pytest.raises(ValueError, match="in_features=8"):
            hb.calibrate(model, wrong)
        assert not model[0].act_scale.any()
    else:
        hb.calibrate(model, [torch.ones(2, 8)])
    assert before == [(m.training, dict(m.__dict__.get("_forward_pre_hooks", {}))) for m in model.modules()]
    for layer in (model[0], model[3]):
        assert layer.relaxed and not layer.bypassed and float(layer.strength) == 0.25
    assert all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in buffers.items())
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


# ---- sub-norms ----


def float_logits(model: nn.Module, one: dict[str, Tensor], blend: float) -> Tensor:
    """Logits at strength 0: what the norms alone do."""
    model = copy.deepcopy(model)
    hb.set_strength(model, 0.0)
    hb.set_norm_blend(model, blend)
    with torch.no_grad():
        return model(**one).logits


def test_gain_is_the_least_squares_one() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(6, 4)), hb.BitNetQuantizationConfig(sub_norm=["0"]))
    batches = [torch.randn(3, 5, 6) * torch.rand(3, 5, 1) * 4 for _ in range(3)]
    hb.calibrate(model, batches)
    x = torch.cat(batches).reshape(-1, 6).double()
    n = x / (x.square().mean(-1, keepdim=True) + model[0].sub_norm.eps).sqrt()
    torch.testing.assert_close(model[0].sub_norm.weight.double(), (x * n).mean(0) / (n * n).mean(0), rtol=1e-5, atol=0)
    assert not model[0].sub_norm.blend.any() and model[0].sub_norm.weight.requires_grad
    # the minimum: any other gain is worse
    gain = model[0].sub_norm.weight.detach().double()
    for other in (gain * 1.01, gain * 0.99, gain + 0.01 * torch.randn(6)):
        assert (x - other * n).square().sum() > (x - gain * n).square().sum()


def test_insertion_changes_nothing_at_blend_0() -> None:
    plain, one = trained_llama(), batch()
    normed = copy.deepcopy(plain)
    with torch.no_grad():
        original = plain(**one).logits
        quantized = hb.quantize_model(plain, hb.BitNetQuantizationConfig())(**one).logits
        hb.quantize_model(normed, hb.BitNetQuantizationConfig(sub_norm=NORMS))
        hb.calibrate(normed, [batch(seed=2)])
        assert torch.equal(normed(**one).logits, quantized)
    assert torch.equal(float_logits(normed, one, blend=0.0), original)


@torch.no_grad()
def shrunken(model: nn.Module) -> nn.Module:
    """The same function with inner activations far from rms 1, as a large pretrained model has them."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        for before, after, factor in (("self_attn.v_proj", "self_attn.o_proj", 0.1), ("mlp.up_proj", "mlp.down_proj", 50.0)):
            layer.get_submodule(before).weight.div_(factor)
            layer.get_submodule(after).weight.mul_(factor)
    return model


def test_calibrated_gain_keeps_the_function_at_blend_1() -> None:
    model, one = shrunken(trained_llama()), batch()
    with torch.no_grad():
        original = model(**one).logits  # type: ignore[operator]
    hb.quantize_model(model, hb.BitNetQuantizationConfig(sub_norm=NORMS))
    plain = float_logits(model, one, blend=1.0)
    hb.calibrate(model, [batch(seed=2), batch(seed=3)])
    calibrated = float_logits(model, one, blend=1.0)

    def error(logits: Tensor) -> float:
        return float((logits - original).square().sum() / original.square().sum())

    def agreement(logits: Tensor) -> float:
        return float((logits.argmax(-1) == original.argmax(-1)).float().mean())

    assert error(calibrated) < 0.2 * error(plain)
    assert agreement(calibrated) > agreement(plain) + 0.3


def test_a_silent_channel_takes_the_common_gain() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(6, 4)), hb.BitNetQuantizationConfig(sub_norm=["0"]))
    x = 3 * torch.randn(50, 6)
    x[:, 2] = 0
    hb.calibrate(model, [x])
    gain = model[0].sub_norm.weight
    assert gain.isfinite().all() and gain.min() <= gain[2] <= gain.max() and gain[2] > 1
    silent = hb.quantize_model(nn.Sequential(nn.Linear(6, 4)), hb.BitNetQuantizationConfig(sub_norm=["0"]))
    hb.calibrate(silent, [torch.zeros(3, 6)])
    assert torch.equal(silent[0].sub_norm.weight, torch.ones(6))


def test_a_norm_in_use_keeps_its_gain() -> None:
    model, one = tiny("llama")
    hb.quantize_model(model, hb.BitNetQuantizationConfig(sub_norm=NORMS))
    hb.calibrate(model, [one])
    hb.set_norm_blend(model, 0.5)
    with pytest.raises(ValueError, match="whose blend is still 0"):
        hb.calibrate(model, [one])


# a norm makes loud tokens of quiet ones: in the first the input has the larger range, in the second the norm's output
LOUD = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 20)[:, None]
QUIET = torch.cat([torch.ones(30, 6), 0.1 * torch.eye(6)])


@pytest.mark.parametrize("x", [LOUD, QUIET])
def test_range_behind_a_norm_covers_both_ends_of_the_blend(x: Tensor) -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(6, 4)), static(sub_norm=["0"]))
    hb.calibrate(model, iter([x, -x]), percentile=100.0)  # an iterator is read once, though two passes are needed
    norm = model[0].sub_norm
    normed = (norm.normalized(x) * norm.weight).detach()
    ends = float(x.abs().max()), float(normed.abs().max())
    assert (ends[0] > ends[1]) == (x is LOUD)
    assert float(model[0].act_scale) == pytest.approx(max(ends) / 127, rel=1e-6)
    hb.set_norm_blend(model, 1.0)
    hb.calibrate(model, [x], percentile=100.0)
    assert float(model[0].act_scale) == pytest.approx(ends[1] / 127, rel=1e-6)


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "batches", "words"),
    [
        ({"method": "minmax"}, [torch.ones(2, 8)], "unknown calibration method 'minmax'; legal: 'percentile', 'ema'"),
        ({"percentile": 0}, [torch.ones(2, 8)], "percentile must be above 0 and at most 100, got 0; try percentile=99.9"),
        ({"percentile": True}, [torch.ones(2, 8)], "got True"),
        ({"momentum": 1.0}, [torch.ones(2, 8)], "momentum must be at least 0 and below 1, got 1.0; try momentum=0.99"),
        ({"max_batches": 0}, [torch.ones(2, 8)], "max_batches must be a positive whole number or None, got 0"),
        ({"max_batches": -1}, iter([torch.ones(2, 8)]), "max_batches must be a positive whole number or None, got -1"),
        ({}, [], r"calibrate got no batch .*pass a list or a DataLoader"),
        ({}, iter([]), "calibrate got no batch"),
        ({}, [torch.full((2, 8), torch.nan)], "the input of 0 is NaN or infinite in batch 1"),
        ({}, [torch.ones(2, 8), torch.full((2, 8), torch.inf)], "the input of 0 is NaN or infinite in batch 2"),
        ({"method": "ema"}, [torch.full((2, 8), -torch.inf)], "the input of 0 is NaN or infinite in batch 1"),
    ],
)
def test_errors(fields: dict[str, Any], batches: Any, words: str) -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), static())
    with pytest.raises(ValueError, match=words):
        hb.calibrate(model, batches, **fields)
    assert not model[0].act_scale.any() and not model[1].act_scale.any()


@pytest.mark.parametrize("batches", [torch.ones(2, 8), {"input": torch.ones(2, 8)}, "text", 3])
def test_one_batch_is_not_a_collection(batches: Any) -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8)), static())
    with pytest.raises(TypeError, match=rf"got {type(batches).__name__}; for one batch write calibrate\(model, \[batch\]\)"):
        hb.calibrate(model, batches)


def test_nan_names_the_layer_where_it_starts() -> None:
    model, one = tiny("llama")
    hb.quantize_model(model, static())
    model.get_submodule("model.layers.1.self_attn.v_proj").weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"the input of model.layers.1.self_attn.o_proj is NaN or infinite"):
        hb.calibrate(model, [one])


def test_nan_under_a_norm() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(6, 4)), hb.BitNetQuantizationConfig(sub_norm=["0"]))
    with pytest.raises(ValueError, match="the input of 0 is NaN or infinite in batch 1"):
        hb.calibrate(model, [torch.full((2, 6), torch.nan)])
    assert torch.equal(model[0].sub_norm.weight, torch.ones(6))


def test_nothing_to_calibrate() -> None:
    with pytest.raises(ValueError, match=r"Linear has no quantized layer; call quantize_model\(model, config\) first"):
        hb.calibrate(nn.Linear(4, 4), [torch.ones(1, 4)])
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8)), hb.BitNetQuantizationConfig())
    with pytest.raises(ValueError, match=r"nothing to calibrate; ask for them with .*int8_static.*sub_norm="):
        hb.calibrate(model, [torch.ones(1, 8)])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        # an empty input, as an expert without tokens gets it, is no visit
        return self.used(x) + self.unused(x[:0]).sum()


def test_a_layer_that_no_batch_reaches() -> None:
    model = hb.quantize_model(Branches(), static())
    with pytest.raises(ValueError, match=r"no batch reached unused; .*keep=\[r'unused'\]"):
        hb.calibrate(model, [torch.ones(1, 8)])
    assert not model.used.act_scale.any()
