"""Quantized layers under the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from hf_bitnet.modules import PackedBitLinear
from tests.layers import ACTIVATIONS, IN, OUT, PLACES, SCHEMES, make_layer

# some operations of torch have no rule of their own and are looped over
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def packed_layer(*args: Any, **kwargs: Any) -> PackedBitLinear:
    return PackedBitLinear.from_trained(make_layer(*args, **kwargs))


def one_by_one(function: Callable[[Tensor], Tensor], xs: Tensor) -> Tensor:
    return torch.stack([function(x) for x in xs])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", SCHEMES)
def test_vmap_is_one_call_after_the_other(weight: str, activation: str, gradients: bool) -> None:
    for granularity, group in PLACES:
        layer = packed_layer(weight, None, granularity, group, activation)
        with torch.set_grad_enabled(gradients):
            for xs in (torch.randn(4, IN), torch.randn(4, 3, IN), torch.randn(2, 2, 3, IN)):
                torch.testing.assert_close(vmap(layer)(xs), one_by_one(layer, xs))
            swapped = torch.randn(3, 4, IN)
            torch.testing.assert_close(vmap(layer, in_dims=1)(swapped), one_by_one(layer, swapped.transpose(0, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vmap_keeps_the_dtype(dtype: torch.dtype) -> None:
    layer, xs = packed_layer(), torch.randn(4, 3, IN).to(dtype)
    found = vmap(layer)(xs)
    assert found.dtype == dtype
    torch.testing.assert_close(found, one_by_one(layer, xs))
    with torch.autocast("cpu", torch.bfloat16):
        assert vmap(layer)(xs.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_autograd(activation: str) -> None:
    layer, xs, weights = packed_layer(activation=activation, sub_norm=True), torch.randn(4, 3, IN), torch.randn(3, OUT)
    assert layer.bias is not None and layer.sub_norm is not None
    layer.sub_norm.blend.fill_(0.5)
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert set(trained) == {"bias", "sub_norm.weight"}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * weights).square().sum()

    by_parameters, by_input = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(trained, xs)  # of each sample
    for i, x in enumerate(xs):
        x = x.clone().requires_grad_()
        expected = torch.autograd.grad((layer(x) * weights).square().sum(), [x, *trained.values()])
        for a, b in zip((by_input[i], *(by_parameters[name][i] for name in trained)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_jacobian_is_the_quantized_weight() -> None:
    layer = packed_layer(bias=False)
    torch.testing.assert_close(jacrev(layer)(torch.randn(IN)), layer.quantized_weight().dequantize(torch.float32))


def test_layers_side_by_side() -> None:
    """An ensemble: stacked packed weights, one input each."""
    layers, xs = [packed_layer() for _ in range(3)], torch.randn(3, 5, IN)
    parameters, buffers = stack_module_state(layers)  # type: ignore[arg-type]
    found = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(parameters, buffers, xs)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer, x in zip(layers, xs, strict=True)]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
def test_compiled_vmap() -> None:
    layer, xs = packed_layer(), torch.randn(4, 3, IN)
    compiled = torch.compile(lambda x: vmap(layer)(x), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(xs), one_by_one(layer, xs))


def test_layers_in_train_form_say_what_to_do() -> None:
    layer = make_layer()
    words = r"BitLinear got a call under a transform of torch.func .* use loss.backward\(\), or hf_bitnet.pack_model\(model\)"
    for transform in (vmap, jacrev):
        with pytest.raises(RuntimeError, match=words):
            transform(layer)(torch.randn(4, IN))
    layer.relaxed = True
    with pytest.raises(RuntimeError, match=words):
        vmap(layer)(torch.randn(4, IN))
    layer.bypassed = True  # the full-precision layer has nothing to hide
    assert vmap(layer)(torch.randn(4, IN)).shape == (4, OUT)
