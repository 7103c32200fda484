"""Experts that transformers keeps in 3-D weights, as layers of their own: what they compute, and how they learn."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import hf_bitnet as hb
from hf_bitnet.modules import BitExperts
from hf_bitnet.surgery import quantized_layers, separate_experts, set_strength

EXPERTS, HIDDEN, INNER = 5, 24, 40
# every layout: plain, transposed, in turns with biases, without a gate, with a norm behind
LAYOUTS = (MixtralExperts, AriaExperts, GptOssExperts, NemotronHExperts, MuseSparkExperts)
CONFIG = hb.BitNetQuantizationConfig.bitnet_b158()


def fused(kind: Any, implementation: str = "eager") -> Any:
    names = ("num_local_experts", "moe_num_experts", "n_routed_experts")
    config = SimpleNamespace(
        **dict.fromkeys(names, EXPERTS),
        hidden_size=HIDDEN,
        moe_hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        post_norm_eps=1e-6,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation=implementation,
    )
    torch.manual_seed(0)
    module = kind(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def routed(tokens: int = 13, chosen: int = 2, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, experts and their weights, which need gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)
    index = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=generator, requires_grad=True)
    return x, index, weights


# ---- the layer ----


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_separate_experts_compute_what_fused_ones_do(kind: Any, implementation: str) -> None:
    """Values, and gradients by inputs, routing and every weight."""
    model = nn.ModuleDict({"experts": fused(kind, implementation)})
    whole: Any = model["experts"]
    x, index, weights = routed()
    expected = whole(x, index, weights)
    toward = torch.randn_like(expected)
    inputs = torch.autograd.grad(expected, [x, weights, *whole.parameters()], toward)
    with separate_experts(model):
        separate = model["experts"]
        assert isinstance(separate, BitExperts) and separate.training is whole.training
        y = separate(x, index, weights)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        parameters = list(separate.parameters())
        assert {p.untyped_storage().data_ptr() for p in parameters} <= {
            p.untyped_storage().data_ptr() for p in whole.parameters()
        }
        found = torch.autograd.grad(y, [x, weights, *parameters], toward)
        for mine, other in zip(found[:2], inputs[:2], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        sums = [sum(float(each.double().square().sum()) for each in grads[2:]) for grads in (found, inputs)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert model["experts"] is whole  # nothing was quantized
    assert torch.equal(whole(x, index, weights), expected)


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)
def test_quantized_and_fused_again(kind: Any) -> None:
    """At strength 0 the fused module's values; dequantized, a fused module again, with the quantized values in its layout."""
    model = nn.ModuleDict({"experts": fused(kind)})
    whole = copy.deepcopy(model["experts"])
    x, index, weights = routed()
    hb.quantize_model(model, CONFIG)
    layers = dict(quantized_layers(model))
    assert len(layers) == EXPERTS * (2 if kind is NemotronHExperts else 3) and hb.coverage(model).fraction == 1.0
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(owned) == len(list(model.parameters()))  # each has memory of its own, of its own size
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() and p.is_contiguous() for p in model.parameters())
    set_strength(model, 0.0)
    torch.testing.assert_close(model["experts"](x, index, weights), whole(x, index, weights), rtol=1e-5, atol=1e-6)
    set_strength(model, 1.0)
    values = {name: layer.quantized_weight().dequantize() for name, layer in layers.items()}
    hb.dequantize_model(model)
    back: Any = model["experts"]
    assert type(back) is kind and {n: p.shape for n, p in back.named_parameters()} == {
        n: p.shape for n, p in whole.named_parameters()
    }
    with separate_experts(model):
        found = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
        assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in found)


def test_quantized_experts_are_the_sum_of_quantized_maps() -> None:
    """Against the formula, token by token."""
    model = nn.ModuleDict({"experts": fused(MixtralExperts)})
    hb.quantize_model(model, CONFIG)
    x, index, weights = routed()
    maps: Any = model["experts"]
    expected = []
    for token in range(len(x)):
        parts = []
        for place in range(index.shape[1]):
            expert = maps.experts()[int(index[token, place])]
            inner = F.silu(expert.gate_proj(x[token : token + 1])) * expert.up_proj(x[token : token + 1])
            parts.append(weights[token, place] * expert.down_proj(inner))
        expected.append(sum(parts))
    torch.testing.assert_close(maps(x, index, weights), torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_every_expert_gets_a_gradient() -> None:
    """Zero for those without tokens, and no token at all is no error."""
    model = nn.ModuleDict({"experts": fused(MixtralExperts)})
    hb.quantize_model(model, CONFIG)
    x, index, weights = routed(chosen=2, experts=2)
    model["experts"](x, index, weights).sum().backward()
    used = {name: bool(p.grad.any()) for name, p in model.named_parameters() if p.grad is not None}
    assert len(used) == 3 * EXPERTS and {name for name, any_ in used.items() if any_} == {
        name for name in used if name.split(".")[1] in ("0", "1")
    }
    assert model["experts"](x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


def test_experts_without_tokens_are_not_called_to_serve() -> None:
    model = nn.ModuleDict({"experts": fused(MixtralExperts)})
    hb.quantize_model(model, CONFIG)
    hb.pack_model(model)
    x, _, weights = routed()
    called: list[str] = []
    for name, layer in quantized_layers(model):
        layer.register_forward_hook(lambda *_, name=name: called.append(name.split(".")[1]))
    with torch.no_grad():
        model["experts"](x[:1], torch.tensor([[3, 1]]), weights[:1])
    assert sorted(set(called)) == ["1", "3"] and len(called) == 6


def test_places_without_an_expert_count_nothing() -> None:
    """transformers marks them by the number after the last expert."""
    model = nn.ModuleDict({"experts": fused(MixtralExperts)})
    x, index, weights = routed()
    index[2, 1] = EXPERTS
    expected = model["experts"](x, index, weights)
    with separate_experts(model):
        torch.testing.assert_close(model["experts"](x, index, weights), expected, rtol=1e-5, atol=1e-6)


def test_one_token_is_a_token_of_many() -> None:
    model = nn.ModuleDict({"experts": fused(MixtralExperts)})
    hb.pack_model(hb.quantize_model(model, CONFIG))
    x, index, weights = routed()
    with torch.no_grad():
        many = model["experts"](x, index, weights)
        for token in range(len(x)):
            one = slice(token, token + 1)
            torch.testing.assert_close(model["experts"](x[one], index[one], weights[one]), many[one], rtol=1e-5, atol=1e-6)


def test_weights_of_several_processes_are_left_alone() -> None:
    """With expert parallelism a module holds a part of the experts."""
    model = nn.ModuleDict({"experts": fused(MixtralExperts), "linear": nn.Linear(8, 8)})
    model["experts"]._is_expert_parallel = True
    hb.quantize_model(model, CONFIG)
    assert [name for name, _ in quantized_layers(model)] == ["linear"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiled() -> None:
    """With breaks where the numbers of tokens are looked at, as the model itself has them."""
    model = nn.ModuleDict({"experts": fused(MixtralExperts)})
    hb.quantize_model(model, CONFIG)
    x, index, weights = routed()
    expected = model["experts"](x, index, weights)
    compiled = torch.compile(model["experts"], backend="aot_eager")
    y = compiled(x, index, weights)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exported_graphs_have_fixed_shapes() -> None:
    model = nn.ModuleDict({"experts": fused(GptOssExperts)})
    x, index, weights = (each.detach() for each in routed())
    hb.quantize_model(model, hb.BitNetQuantizationConfig(activation="none"))
    hb.dequantize_model(model)
    with separate_experts(model):
        program = torch.export.export(model["experts"], (x, index, weights))
        torch.testing.assert_close(program.module()(x, index, weights), model["experts"](x, index, weights))
