"""Packed experts by one product for all of them: the same numbers as their layers, and the layers wherever those are wanted."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import hf_bitnet as hb
from hf_bitnet import kernels
from hf_bitnet.kernels import dispatch, reference
from hf_bitnet.modules import BitExperts, packed_experts
from hf_bitnet.surgery import quantized_layers
from tests.cpu_kernels import needs_cpu_kernels
from tests.test_experts import CONFIG, EXPERTS, HIDDEN, LAYOUTS, fused, routed

pytestmark = needs_cpu_kernels


def packed(kind: Any = MixtralExperts, config: hb.BitNetQuantizationConfig = CONFIG) -> BitExperts:
    model = nn.ModuleDict({"experts": fused(kind)})
    hb.pack_model(hb.quantize_model(model, config))
    found = model["experts"]
    assert isinstance(found, BitExperts)
    return found.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of weights in each call of the product over experts."""
    found: list[int] = []
    plain = kernels.packed_experts

    def counted(x: Tensor, index: Tensor, maps: Any, *rest: Any) -> list[Tensor]:
        found.append(sum(map(len, maps)))
        return plain(x, index, maps, *rest)

    monkeypatch.setattr(kernels, "packed_experts", counted)
    yield found


def by_layers(experts: BitExperts, *args: Tensor) -> Tensor:
    """The same experts, called one after another: somebody listens."""
    twin = copy.deepcopy(experts)
    for _, layer in quantized_layers(twin):
        layer.register_forward_hook(lambda *_: None)
    return twin(*args)


# ---- the same numbers ----


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@torch.no_grad()
def test_the_numbers_of_the_layers(kind: Any, tokens: int, calls: list[int]) -> None:
    experts = packed(kind)
    x, index, weights = routed(max(tokens, 1))
    x, index, weights = x[:tokens], index[:tokens], weights[:tokens]
    if tokens > 1:
        index[1, 0] = EXPERTS  # none
    assert torch.equal(experts(x, index, weights), by_layers(experts, x, index, weights))
    few = [number for number in dict.fromkeys(index.reshape(-1).tolist()) if number < EXPERTS] or [0]
    chosen = len(few) if index.numel() <= 16 else EXPERTS
    assert calls == [(len(experts.names) - 1) * chosen, chosen]


@pytest.mark.parametrize("config", [
    hb.BitNetQuantizationConfig(weight="int4", granularity="group", group_size=8),
    hb.BitNetQuantizationConfig(weight="binary", granularity="channel"),
    hb.BitNetQuantizationConfig(weight="int8", activation="int4"),
], ids=lambda config: config.weight)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 30])
@torch.no_grad()
def test_other_schemes(config: hb.BitNetQuantizationConfig, tokens: int, calls: list[int]) -> None:
    experts = packed(config=config)
    args = routed(tokens)
    torch.testing.assert_close(experts(*args), by_layers(experts, *args), rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


@torch.no_grad()
def test_down_may_have_a_scheme_of_its_own(calls: list[int]) -> None:
    config = hb.BitNetQuantizationConfig.bitnet_b158(overrides={r"down_proj": {"weight": "int4"}})
    experts = packed(config=config)
    args = routed()
    assert torch.equal(experts(*args), by_layers(experts, *args)) and len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_dtypes(dtype: torch.dtype, calls: list[int]) -> None:
    experts = packed(GptOssExperts).to(dtype)
    x, index, weights = routed()
    args = x.to(dtype), index, weights.to(dtype)
    y = experts(*args)
    assert y.dtype == dtype and torch.equal(y, by_layers(experts, *args)) and len(calls) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(experts(x, index, weights), by_layers(experts, x, index, weights))


@torch.inference_mode()
def test_inference_mode(calls: list[int]) -> None:
    experts, args = packed(), routed()
    assert torch.equal(experts(*args), by_layers(experts, *args)) and len(calls) == 2


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_graphs_do_not_hold_the_choices(tokens: int) -> None:
    experts, args = packed(), routed(tokens)
    graph = make_fx(experts)(*args)
    x, index, weights = args
    other = x, (index + 1) % EXPERTS, weights
    torch.testing.assert_close(graph(*other), experts(*other), rtol=1e-5, atol=1e-6)


def test_no_break_under_torch_compile() -> None:
    experts, args = packed(GptOssExperts), routed()
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args), experts(*args))


# ---- what has changed since the last call ----

CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda layer: layer.weight.data.bitwise_not_(),
    "other memory": lambda layer: setattr(layer.weight, "data", layer.weight.data.flip(0)),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data.flip(0), requires_grad=False)),
    "another scale": lambda layer: layer.weight_scale.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_changed_weights_are_seen(change: str, tokens: int) -> None:
    experts, (x, index, weights) = packed(), routed(tokens)
    before = experts(x, index, weights)
    CHANGES[change](experts.experts()[int(index[0, 0])].down_proj)
    after = experts(x, index, weights)
    assert not torch.equal(after, before) and torch.equal(after, by_layers(experts, x, index, weights))


@torch.no_grad()
def test_layers_that_are_watched_are_called(calls: list[int]) -> None:
    experts, args = packed(), routed()
    experts(*args)
    seen: list[int] = []
    layer = experts.experts()[2].up_proj
    handle = layer.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    experts(*args)
    assert seen == [1] and len(calls) == 2
    handle.remove()
    experts(*args)
    assert len(calls) == 4
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module is layer))
    experts(*args)
    everywhere.remove()
    assert any(seen[1:]) and len(calls) == 4
    plain = layer.forward  # type: ignore[union-attr]
    layer.forward = lambda x: seen.append(2) or plain(x)  # type: ignore[union-attr, method-assign]
    experts(*args)
    assert seen[-1] == 2 and len(calls) == 4


@torch.no_grad()
def test_another_layer_in_its_place(calls: list[int]) -> None:
    experts, args = packed(), routed()
    experts(*args)
    experts.experts()[0].gate_proj = nn.Linear(HIDDEN, experts.experts()[0].gate_proj.out_features)  # type: ignore[union-attr]
    y = experts(*args)
    assert len(calls) == 2 and torch.equal(y, by_layers(experts, *args))


@pytest.mark.parametrize("fields", [
    {"overrides": {r"experts\.1\.down_proj": {"weight": "int8"}}},
    {"overrides": {r"experts\.\d\.up_proj": {"weight": "int4"}}},
    {"activation": "none"},
    {"sub_norm": ["down_proj"]},
    {"keep": [r"experts\.3\.up_proj"]},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_layers_that_differ_are_called_as_they_are(fields: dict[str, Any], calls: list[int]) -> None:
    experts = packed(config=hb.BitNetQuantizationConfig.bitnet_b158(**fields))
    args = routed()
    assert torch.equal(experts(*args), by_layers(experts, *args)) and not calls


def test_with_gradients_the_layers_are_called(calls: list[int]) -> None:
    experts, (x, index, weights) = packed(), routed()
    experts(x, index, weights).sum().backward()
    assert x.grad is not None and not calls


@torch.no_grad()
def test_without_a_kernel_the_layers_are_called(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    experts, args = packed(), routed()
    expected = experts(*args)
    monkeypatch.setitem(dispatch._CHOSEN, ("packed_experts", "cpu"), reference.packed_experts)
    assert torch.equal(experts(*args), expected) and len(calls) == 2


# ---- what is known of the layers ----


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that all layers are looked at."""
    found: list[int] = []
    plain = packed_experts._look_at
    monkeypatch.setattr(packed_experts, "_look_at", lambda module: found.append(1) or plain(module))
    return found


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", ["packed", "watched", "with sub-norms", "offloaded"])
@torch.no_grad()
def test_layers_are_looked_at_once(kind: str, tokens: int, looks: list[int]) -> None:
    norms = ["down_proj"] if kind == "with sub-norms" else []
    experts, args = packed(config=hb.BitNetQuantizationConfig.bitnet_b158(sub_norm=norms)), routed(tokens)
    for _, layer in quantized_layers(experts):
        if kind == "watched":
            layer.register_forward_hook(lambda *_: None)
        elif kind == "offloaded":
            layer.forward = layer.forward
    for _ in range(5):
        experts(*args)
    assert len(looks) == 1


@torch.no_grad()
def test_parameters_that_come_and_go_are_not_kept(looks: list[int]) -> None:
    """Offloading of whole modules puts other parameters in for each forward; that is given up on."""
    experts, args = packed(), routed()
    expected, seen = experts(*args), []
    for _ in range(20):
        for _, layer in quantized_layers(experts):
            layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
            seen.append(weakref.ref(layer.weight))
        assert torch.equal(experts(*args), expected)
        for _, layer in quantized_layers(experts):
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        assert not any(reference() is not None for reference in seen)
    assert len(looks) < 8


@torch.no_grad()
def test_changes_now_and_then_are_looked_at(calls: list[int], looks: list[int]) -> None:
    """However many there were: only those that never end are waited for, longer and longer."""
    experts, args = packed(), routed()

    def change() -> None:
        layer = experts.experts()[0].up_proj
        layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)  # type: ignore[union-attr]

    for _ in range(12):
        change()
        for _ in range(10):
            experts(*args)
    assert len(calls) == 12 * 10 * 2 and len(looks) == 12
    looks.clear()
    for _ in range(100):
        change()
        experts(*args)
    assert len(looks) < 12
    for _ in range(100):
        experts(*args)
    for _ in range(2):  # the pauses of then are over
        change()
        calls.clear()
        experts(*args)
        assert len(calls) == 2


@torch.no_grad()
def test_a_bias_that_has_gone_is_seen() -> None:
    experts, args = packed(GptOssExperts), routed()
    experts(*args)
    for layer in experts.experts():
        layer.down_proj.bias = None  # type: ignore[union-attr]
    assert torch.equal(experts(*args), by_layers(experts, *args))
    experts.experts()[0]._modules[experts.names[0]].bias = None  # type: ignore[union-attr]
    assert torch.equal(experts(*args), by_layers(experts, *args))


@torch.no_grad()
def test_a_model_that_its_layers_know_can_die() -> None:
    experts = packed()
    experts(*routed())
    layer = experts.experts()[0].up_proj
    layer.register_forward_hook(lambda *_, model=experts: None)  # type: ignore[union-attr, call-arg]
    experts(*routed())
    gone = weakref.ref(experts)
    del experts, layer
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_copies_and_pickles_know_nothing() -> None:
    experts, args = packed(), routed()
    expected = experts(*args)
    for twin in (copy.deepcopy(experts), copy.copy(experts)):
        assert torch.equal(twin(*args), expected)
    assert not copy.deepcopy(experts).together.seen


# ---- the roundings of the layers ----


@pytest.mark.parametrize("tokens", [1, 3, 40])
@torch.no_grad()
def test_gates_and_ups_may_have_other_groups(tokens: int, calls: list[int]) -> None:
    config = hb.BitNetQuantizationConfig(
        weight="int4", granularity="tensor", overrides={r"up_proj": {"granularity": "group", "group_size": 8}}
    )
    experts, args = packed(config=config), routed(tokens)
    for _ in range(3):
        torch.testing.assert_close(experts(*args), by_layers(experts, *args), rtol=1e-5, atol=1e-6)
    assert len(calls) == 6


@torch.no_grad()
def test_dtypes_are_those_of_the_layers() -> None:
    """A gate function in float32 makes the last map one in float32."""
    experts = packed().bfloat16()

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(x.float())

    experts.fused.act_fn = Wide()
    x, index, weights = routed()
    args = x.bfloat16(), index, weights.bfloat16()
    assert torch.equal(experts(*args), by_layers(experts, *args))


@torch.no_grad()
def test_numbers_of_experts_in_int32(calls: list[int]) -> None:
    experts, (x, index, weights) = packed(), routed()
    assert torch.equal(experts(x, index.int(), weights), experts(x, index, weights)) and len(calls) == 2


@torch.no_grad()
def test_packed_weights_go_with_their_layers() -> None:
    model = nn.ModuleDict({"experts": fused(MixtralExperts)})
    hb.pack_model(hb.quantize_model(model, CONFIG))
    model.eval()["experts"](*routed(3))
    old = [weakref.ref(layer.weight) for _, layer in quantized_layers(model)]
    assert old
    hb.unpack_model(model)
    gc.collect()
    assert all(weight() is None for weight in old)
