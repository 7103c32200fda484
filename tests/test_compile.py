"""torch.compile of both forms: no graph break, the results of eager, and no recompilation while a schedule moves."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hf_bitnet import BitNetQuantizationConfig, harden, kept_codes, pack_model, quantize_model, set_strength
from hf_bitnet.quantizers import ACTIVATION_SCHEMES, SCALE_RULES, WEIGHT_SCHEMES
from hf_bitnet.relaxations import RELAXATIONS
from hf_bitnet.ste import ESTIMATORS
from hf_bitnet.surgery import trained_layers
from tests.layers import IN, make_layer
from tests.tiny import tiny

WIDTH = 16
# torch (2.13) itself makes an instance of autograd.Function while it traces one
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def _compiled(model: nn.Module, backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend=backend, **options)  # type: ignore[return-value]


def _graphs() -> int:
    """Graphs compiled so far, recompilations included."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def _step(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = run()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def _assert_same_step(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        limit = rtol * max(grad.abs().max().item(), 1e-6)
        assert (found[1][name] - grad).abs().max() <= limit, name


def _one_of_everything() -> nn.Sequential:
    """Every weight scheme, activation scheme, estimator and relaxation and (on ternary weights) scale rule, in few layers."""
    size, layers = (WIDTH, WIDTH), []
    for scheme, activation, ste in zip(WEIGHT_SCHEMES, cycle(ACTIVATION_SCHEMES), cycle(ESTIMATORS), strict=False):
        layers.append(make_layer(scheme, activation=activation, ste=ste, size=size))
    assert max(len(ACTIVATION_SCHEMES.names()), len(ESTIMATORS.names())) <= len(layers)
    layers += [make_layer(relaxation=RELAXATIONS.get(name), size=size) for name in RELAXATIONS]
    return nn.Sequential(*layers, make_layer(rule="learned", granularity="group", group_size=8, sub_norm=True, size=size))


def _product() -> nn.Sequential:
    """More of it than the fast tests have time for."""
    size = (WIDTH, WIDTH)
    layers = [make_layer(scheme, granularity="group", group_size=8, size=size) for scheme in WEIGHT_SCHEMES]
    layers += [make_layer("int4", "learned", activation=name, ste="learnable", size=size) for name in ACTIVATION_SCHEMES]
    layers += [make_layer("int2_seq", ste=ste, size=size) for ste in ESTIMATORS]
    layers += [make_layer(rule=rule, granularity="channel", size=size) for rule in SCALE_RULES]
    layers += [make_layer(rule="learned", relaxation=RELAXATIONS.get(name), size=size) for name in RELAXATIONS]
    return nn.Sequential(*layers)


def _check_training(model: nn.Module, strength: float, backend: str = "aot_eager") -> None:
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    set_strength(model, strength)
    expected = _step(model, lambda: model(x).square().mean())
    x_grad, x.grad = x.grad, None
    compiled = _compiled(model, backend)
    _assert_same_step(_step(model, lambda: compiled(x).square().mean()), expected)
    assert x.grad is not None and x_grad is not None
    torch.testing.assert_close(x.grad, x_grad)
    assert _graphs() == 1


# "eager" runs what was traced as it is; "aot_eager" traces the backward pass of the graph, too, which takes most of the time
@pytest.mark.parametrize(
    ("strength", "backend"),
    [(1.0, "eager"), (0.5, "eager"), *(pytest.param(each, "aot_eager", marks=pytest.mark.slow) for each in (1.0, 0.5))],
)
def test_every_member_trains_in_one_graph(strength: float, backend: str) -> None:
    _check_training(_one_of_everything(), strength, backend)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_many_combinations_train_in_one_graph(strength: float) -> None:
    _check_training(_product(), strength)


@pytest.mark.parametrize("make", [_one_of_everything, pytest.param(_product, marks=pytest.mark.slow)])
def test_packed_layers_serve_in_one_graph(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(3, 5, WIDTH)
    model._bitnet_config = BitNetQuantizationConfig()
    pack_model(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_compiled(model)(x), model(x))
    assert _graphs() == 1


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_training_a_model_while_the_strength_moves(backend: str) -> None:
    model, batch = tiny("llama", labels=True, num_hidden_layers=1)
    quantize_model(model, BitNetQuantizationConfig(ste="tanh", overrides={"down_proj": {"weight": "int4"}})).train()
    compiled = _compiled(model, backend)

    def check() -> float:
        found = _step(model, lambda: compiled(**batch).loss)
        _assert_same_step(found, _step(model, lambda: model(**batch).loss))
        return found[0].item()

    losses = []
    for strength in (0.1, 0.5, 0.9, 1.0):
        set_strength(model, strength, hard=False)
        losses.append(check())
        assert _graphs() == 1
    assert len(set(losses)) == 4  # the strength did arrive
    harden(model)
    check()
    assert _graphs() == 2  # the one recompilation that set_strength announces
    for _, layer in trained_layers(model):
        layer.ste_temperature.mul_(2)
    with kept_codes(model):  # the compiler does not see it
        check()
    set_strength(model, 0.3)
    check()
    assert _graphs() == 2


def test_packed_form_of_a_model() -> None:
    model, batch = tiny("llama", num_hidden_layers=1)
    quantize_model(model, BitNetQuantizationConfig(form="packed", overrides={"down_proj": {"weight": "int4"}}))
    with torch.no_grad():
        assert torch.equal(_compiled(model)(**batch).logits, model(**batch).logits)
    assert _graphs() == 1


def test_changing_lengths_recompile_once() -> None:
    model = make_layer("int4", activation="int8_asymmetric")
    compiled = _compiled(model)
    for length in (5, 9, 12, 31):
        x = torch.randn(2, length, IN)
        assert torch.equal(compiled(x), model(x))
    assert _graphs() == 2  # the second is for any length


@pytest.mark.slow
def test_inductor() -> None:
    """The code generator sums in another order, so a scale may differ in its last bit and a rounding fall otherwise."""
    model, batch = tiny("llama", labels=True, num_hidden_layers=1)
    overrides = {"down_proj": {"weight": "int4"}, "up_proj": {"weight": "int2_seq", "weight_scale": "learned"}}
    quantize_model(model, BitNetQuantizationConfig(overrides=overrides)).train()
    compiled = _compiled(model, "inductor")
    expected, found = _step(model, lambda: model(**batch).loss), _step(model, lambda: compiled(**batch).loss)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=0)
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 0.1 * grad.norm(), name
    pack_model(model.eval())
    with torch.no_grad():
        logits, packed = model(**batch)[1], _compiled(model, "inductor")(**batch)[1]
    assert (packed - logits).norm() <= 0.02 * logits.norm()
    assert _graphs() == 2
