"""The integer step of a layer and all its gradients against float64 fake quantization with plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn

from hf_bitnet.modules import PackedBitLinear, TrainedLayer
from tests.layers import ACTIVATIONS, IN, OUT, PLACES, SCHEMES, STES, Reference, as_conv1d, double, make_layer, scale_rules

TOLERANCE = 3e-6  # of the largest entry: float32 sums of a few dozen terms


def _assert_close(found: Tensor, expected: Tensor, what: str, factor: float = 1.0, floor: float = 1e-9) -> None:
    assert found.shape == expected.shape
    limit = TOLERANCE * factor * max(expected.abs().max().item(), floor)
    assert (found.double() - expected).abs().max().item() <= limit, what


def _check(
    layer: TrainedLayer, x: Tensor, reference: Reference | None = None, compute: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Output and every gradient of a layer, against `Reference` (or against what `compute` makes of its tensors)."""
    x = x.detach().clone().requires_grad_()
    weights = torch.randn(*x.shape[:-1], layer.out_features)
    y = layer(x)
    (y * weights).sum().backward()
    reference, x64 = reference or Reference(layer), double(x)
    expected = (compute or reference)(x64)
    (expected * weights.double()).sum().backward()
    _assert_close(y.detach(), expected.detach(), "output")
    grads = [("x", x.grad, x64.grad)]
    weight_grad = layer.weight.grad if layer.weight is layer.matrix else layer.weight.grad.t()  # type: ignore[union-attr]
    grads.append(("weight", weight_grad, reference.weight.grad))
    if layer.bias is not None:
        grads.append(("bias", layer.bias.grad, reference.bias.grad))  # type: ignore[union-attr]
    if layer.weight_scale is not None:
        grads.append(("scale", layer.weight_scale.grad, reference.scale.grad))  # type: ignore[union-attr]
    if layer.spec.ste.temperature_slope is not None:
        grads.append(("temperature", layer.ste_temperature.grad, reference.temperature.grad))
    by_levels = max(1.0, layer.quantizer.grid.levels / 8)  # a position among 255 levels has few digits after the point
    for what, found, wanted in grads:
        assert found is not None and wanted is not None, what
        factor = 1.0 if what in ("x", "bias") else by_levels
        # the temperature's gradient is a sum of terms that cancel; they are of order 0.1
        _assert_close(found, wanted, f"gradient of {what}", factor, 0.1 if what == "temperature" else 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_granularity(scheme: str, activation: str) -> None:
    for granularity, group_size in PLACES:
        for bias in (True, False):
            _check(make_layer(scheme, None, granularity, group_size, activation, bias=bias), torch.randn(7, IN))


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_estimator_and_scale_rule(scheme: str, ste: str) -> None:
    for rule in scale_rules(scheme):
        for granularity, group_size in PLACES:
            _check(make_layer(scheme, rule, granularity, group_size, ste=ste), torch.randn(7, IN))


@pytest.mark.parametrize("activation", ["int8", "int8_asymmetric", "none"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_conv1d_layout(scheme: str, activation: str) -> None:
    for rule in (None, "learned"):
        for granularity, group_size in PLACES:
            layer = as_conv1d(make_layer(scheme, rule, granularity, group_size, activation, ste="learnable"))
            _check(layer, torch.randn(2, 3, IN))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (33, 65)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    for scheme in SCHEMES:
        _check(make_layer(scheme, "learned", "channel", size=size, ste="tanh"), torch.randn(3, size[0]))


def test_many_tokens_and_few() -> None:
    """Both orders of applying the activation scale in the weight's gradient: wide inputs and wide outputs."""
    for size in ((64, 8), (8, 64)):
        for activation in ("int8", "int8_asymmetric"):
            for tokens in (1, 50):
                _check(make_layer(activation=activation, size=size), torch.randn(tokens, size[0]))


def test_gradient_of_a_shared_input_adds_up() -> None:
    layers = [make_layer(scheme) for scheme in SCHEMES]
    x = torch.randn(5, IN, requires_grad=True)
    sum(layer(x).sum() for layer in layers).backward()  # type: ignore[union-attr]
    x64 = double(x)
    sum(Reference(layer)(x64).sum() for layer in layers).backward()  # type: ignore[union-attr]
    assert x.grad is not None and x64.grad is not None
    _assert_close(x.grad, x64.grad, "x")


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("ste", STES)
def test_relaxed_step(ste: str, strength: float) -> None:
    """Below full strength: weight and input are straight mixes of the float and the quantized value."""
    for scheme, activation in zip(SCHEMES, cycle(name for name in ACTIVATIONS if name != "none"), strict=False):
        for make in (make_layer, lambda *args, **fields: as_conv1d(make_layer(*args, **fields))):
            layer = make(scheme, "learned", "channel", activation=activation, ste=ste)
            layer.relaxed = True
            layer.strength.fill_(strength)
            reference = Reference(layer)
            exact = float(layer.strength)  # 0.3 in float32

            def mixed(x: Tensor, reference: Reference = reference, exact: float = exact) -> Tensor:
                value = (1 - exact) * x + exact * reference.fake_input(x)
                weight = (1 - exact) * reference.weight + exact * reference.fake_weight()
                return value @ weight.t() + reference.bias

            _check(layer, torch.randn(7, IN), reference, mixed)


# ---- learned scales, against LSQ as its authors write it ----


def _lsq(weight: Tensor, scale: Tensor, lowest: float, highest: float, middle: float) -> Tensor:
    """LSQ (arXiv 1902.08153, appendix A): gradscale, clip, roundpass. `middle` is where the levels lie between integers."""
    size = 1 / math.sqrt(weight.numel() * highest)
    scale = (scale - scale * size).detach() + scale * size
    ratio = (weight / scale).clamp(lowest, highest) - middle
    ratio = (ratio.round() - ratio).detach() + ratio
    return (ratio + middle) * scale


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "binary"])
def test_learned_scale_is_lsq(scheme: str) -> None:
    layer = make_layer(scheme, "learned", "tensor", activation="none", ste="clipped", threshold=0.0)
    assert layer.weight_scale is not None
    with torch.no_grad():
        layer.weight_scale.mul_(0.6)  # so that weights are clipped on both sides
    values = layer.quantizer.grid.values
    weight, scale = double(layer.weight), double(layer.weight_scale)
    x, out = torch.randn(9, IN), torch.randn(9, OUT)
    value = _lsq(weight, scale, values[0], values[-1], values[0] - math.floor(values[0]))
    ((x.double() @ value.t()) * out.double()).sum().backward()
    (layer(x) * out).sum().backward()
    assert layer.weight.grad is not None and layer.weight_scale.grad is not None
    assert weight.grad is not None and scale.grad is not None
    _assert_close(layer.weight.grad, weight.grad, "weight")
    _assert_close(layer.weight_scale.grad, scale.grad, "scale")


def test_a_learned_scale_moves_downhill() -> None:
    layer = make_layer("int4", "learned", "channel", activation="none")
    assert layer.weight_scale is not None
    with torch.no_grad():
        layer.weight_scale.mul_(2.5)
    x = torch.randn(64, IN)
    expected = x @ layer.weight.detach().t()
    optimizer = torch.optim.SGD([layer.weight_scale], lr=1.0)
    losses = []
    for _ in range(30):
        loss = (layer(x) - layer.bias - expected).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- what a forward must not depend on ----


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_does_not_depend_on_the_estimator(scheme: str) -> None:
    first = make_layer(scheme)
    x = torch.randn(4, IN)
    for ste in STES:
        for temperature in (0.5, 8.0):
            layer = make_layer(scheme, ste=ste, temperature=temperature)
            layer.load_state_dict(first.state_dict(), strict=False)
            assert torch.equal(layer(x), first(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_do_not_depend_on_mode_or_kept_codes(scheme: str) -> None:
    layer, x = make_layer(scheme, ste="tanh"), torch.randn(4, IN)
    grads = []
    for training, keep in ((True, False), (False, False), (True, True)):
        layer.train(training)
        layer.keep_codes = keep
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        grads.append((leaf.grad, layer.weight.grad))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_layers_pass_the_gradient_on(scheme: str) -> None:
    for activation in ACTIVATIONS:
        layer = make_layer(scheme, activation=activation)
        packed = PackedBitLinear.from_trained(layer)
        grads, outputs = [], []
        x, out = torch.randn(4, IN), torch.randn(4, OUT)
        for form in (layer, packed):
            leaf = x.clone().requires_grad_()
            outputs.append(form(leaf))
            grads.append(torch.autograd.grad(outputs[-1], leaf, out)[0])
        assert torch.equal(*outputs) and torch.equal(*grads)


def test_only_what_is_asked_for() -> None:
    x = torch.randn(4, IN)
    for frozen in (["weight"], ["bias"], ["weight", "bias"], ["weight_scale", "ste_temperature"]):
        layer = make_layer("ternary", "learned", ste="learnable")
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        layer(x).sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is None} == set(frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_close(dtype: torch.dtype) -> None:
    for scheme in SCHEMES:
        for activation in ("int8", "none"):
            for granularity, group_size in PLACES:
                layer = make_layer(scheme, None, granularity, group_size, activation).to(dtype)
                x = torch.randn(16, IN).to(dtype).requires_grad_()
                out = torch.randn(16, OUT).to(dtype)
                y = layer(x)
                (y * out).sum().backward()
                reference, x64 = Reference(layer), double(x)
                expected = reference(x64)
                (expected * out.double()).sum().backward()
                pairs = [(y, expected), (x.grad, x64.grad), (layer.weight.grad, reference.weight.grad)]
                for found, wanted in [*pairs, (layer.bias.grad, reference.bias.grad)]:  # type: ignore[union-attr]
                    assert found is not None and wanted is not None and found.dtype == dtype
                    assert (found.double() - wanted).norm() <= 0.01 * wanted.norm()


def test_float16_sums_do_not_overflow() -> None:
    """Levels up to 127 times inputs of ordinary size would pass 65504 if the scale were applied after the sum."""
    for activation in ("none", "int8"):
        layer = make_layer("int8", None, "tensor", activation=activation, size=(4096, 4)).half()
        x = (30 * torch.randn(2, 4096)).half().requires_grad_()
        y = layer(x)
        (1000 * y.float()).sum().backward()
        expected = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())  # type: ignore[union-attr]
        assert ((y - expected).abs() <= 0.05 * expected.abs().max()).all()
        assert x.grad is not None and x.grad.isfinite().all()
