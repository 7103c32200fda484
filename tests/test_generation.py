"""Serving packed models: products without autograd, one product for several readers, faster forwards. Own."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bitnet import BitNetQuantizationConfig, kernels, optimize_for_generation, pack_model, quantize_model
from hf_bitnet.modules import PackedBitLinear
from hf_bitnet.modules.faster import Faster
from hf_bitnet.quantizers import ACTIVATION_SCHEMES, WEIGHT_SCHEMES
from tests.cpu_kernels import failures_in_threads
from tests.layers import IN, OUT, PLACES, make_layer
from tests.tiny import CAUSAL, FAMILIES, tiny

PACKED = BitNetQuantizationConfig(form="packed")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each product took, in the order of the calls."""
    counts: list[int] = []
    one, several = kernels.packed_linear, kernels.packed_linears

    def packed_linear(*args: Any) -> Tensor:
        counts.append(1)
        return one(*args)

    def packed_linears(x: Tensor, weights: Any, *args: Any) -> list[Tensor]:
        counts.append(len(weights))
        return several(x, weights, *args)

    monkeypatch.setattr(kernels, "packed_linear", packed_linear)
    monkeypatch.setattr(kernels, "packed_linears", packed_linears)
    return counts


def packed_layer(seed: int = 0, **kwargs: Any) -> PackedBitLinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PackedBitLinear.from_trained(make_layer(**kwargs))


def by_autograd(layer: PackedBitLinear, x: Tensor) -> Tensor:
    """What the layer returns when a gradient is asked for."""
    return layer(x.clone().requires_grad_()).detach()


class Readers(nn.Module):
    """Calls each of its layers with the same tensor, in the order asked for."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, order: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
        x = x * 1.0  # a tensor of this call
        return [self.layers[i](x) for i in order]


@pytest.fixture
def readers() -> Readers:
    return Readers(*(packed_layer(seed) for seed in range(3)))


# ---- without a gradient ----


@pytest.mark.parametrize("activation", [name for name in ACTIVATION_SCHEMES if ACTIVATION_SCHEMES.get(name).quantizes])
@pytest.mark.parametrize("weight", list(WEIGHT_SCHEMES))
def test_serving_equals_training_path(weight: str, activation: str) -> None:
    for granularity, group in PLACES:
        layer = packed_layer(weight=weight, granularity=granularity, group_size=group, activation=activation)
        for x in (torch.randn(3, IN), torch.randn(2, 4, IN), torch.randn(1, 1, IN), torch.randn(IN), torch.randn(0, IN)):
            for dtype in (torch.float32, torch.bfloat16):
                with torch.no_grad():
                    served = layer(x.to(dtype))
                expected = by_autograd(layer, x.to(dtype))
                assert served.dtype == dtype and served.shape == (*x.shape[:-1], OUT)
                if group is None:
                    assert torch.equal(served, expected)
                else:  # groups are summed one after the other, in the library and in torch in different orders
                    torch.testing.assert_close(served, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_bias_that_trains_gets_its_gradient() -> None:
    layer = packed_layer()
    assert layer.bias is not None and layer.bias.requires_grad
    layer(torch.randn(3, IN)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 3.0))


def test_autocast_decides_the_dtype() -> None:
    layer = packed_layer()
    x = torch.randn(2, IN)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


# ---- one product for several readers ----


@torch.no_grad()
def test_readers_are_learned_and_share_one_product(readers: Readers, calls: list[int]) -> None:
    x = torch.randn(2, IN)
    expected = [by_autograd(layer, x) for layer in readers.layers]
    for counts in ([1, 1, 1], [3], [3]):
        calls.clear()
        assert all(map(torch.equal, readers(x), expected))
        assert calls == counts


@torch.no_grad()
def test_wrong_guess_costs_no_result(readers: Readers, calls: list[int]) -> None:
    x = torch.randn(2, IN)
    expected = [layer(x.clone()) for layer in readers.layers]
    readers(x)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        order = tuple(torch.randperm(3, generator=generator)[: 1 + int(torch.randint(3, (), generator=generator))].tolist())
        for i, y in zip(order, readers(x, order), strict=True):
            assert torch.equal(y, expected[i])
    for _ in range(5):  # those that never come are no longer computed
        calls.clear()
        readers(x, (0,))
        gc.collect()
    assert calls == [1]


@torch.no_grad()
def test_changes_between_two_readers_are_seen(readers: Readers) -> None:
    first, second, third = readers.layers
    x = torch.randn(2, IN)
    readers(x)
    y = torch.randn(2, IN)
    first(y)
    y.mul_(-2.0)
    assert torch.equal(second(y), by_autograd(second, y))
    z = torch.randn(2, IN)
    first(z)
    second.weight_scale.mul_(2.0)
    third.bias = nn.Parameter(torch.zeros(OUT))
    assert torch.equal(second(z), by_autograd(second, z))
    assert torch.equal(third(z), by_autograd(third, z))


@torch.no_grad()
def test_dtype_of_autocast_between_two_readers(readers: Readers) -> None:
    first, second, _ = readers.layers
    readers(torch.randn(2, IN))
    x = torch.randn(2, IN)
    first(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert second(x).dtype == torch.bfloat16


@torch.no_grad()
def test_layers_that_differ_are_not_grouped(calls: list[int]) -> None:
    kinds = ({}, {"weight": "int4"}, {"activation": "int4"})
    readers = Readers(*(packed_layer(i, **kind) for i, kind in enumerate(kinds)))
    for _ in range(3):
        calls.clear()
        readers(torch.randn(2, IN))
        assert calls == [1, 1, 1]


def test_inference_tensors_are_computed_alone(readers: Readers, calls: list[int]) -> None:
    with torch.no_grad():
        expected = [readers(x) for x in (torch.ones(2, IN),) * 3][-1]
    with torch.inference_mode():
        calls.clear()
        assert all(map(torch.equal, readers(torch.ones(2, IN)), expected))
        assert calls == [1, 1, 1]


@torch.no_grad()
def test_layer_without_its_weight_is_left_alone(readers: Readers) -> None:
    """Offloading moves a layer's weight to the meta device between its calls."""
    readers(torch.ones(2, IN))
    readers.layers[1].to("meta")
    first, _, third = readers.layers
    x = torch.randn(2, IN)
    assert torch.equal(first(x), by_autograd(first, x)) and torch.equal(third(x), by_autograd(third, x))


@torch.no_grad()
def test_nothing_is_kept_alive() -> None:
    readers = Readers(packed_layer(0), packed_layer(1))
    for _ in range(2):
        readers(torch.ones(2, IN), (0, 1))
    x = torch.randn(64, IN)
    readers.layers[0](x)  # the product of the other one waits
    layer = weakref.ref(readers.layers[1])
    del readers
    gc.collect()
    assert layer() is None
    alive = weakref.ref(x)
    del x
    assert alive() is None


@torch.no_grad()
def test_copies_learn_their_own_readers(readers: Readers, calls: list[int]) -> None:
    x = torch.randn(2, IN)
    expected = [*map(torch.clone, readers(x))]
    readers(x)
    for other in (copy.deepcopy(readers), pickle.loads(pickle.dumps(readers))):
        for counts in ([1, 1, 1], [3]):
            calls.clear()
            assert all(map(torch.equal, other(x), expected))
            assert calls == counts


def test_threads_do_not_share_what_waits(readers: Readers) -> None:
    inputs = [torch.randn(2, IN) for _ in range(4)]
    expected = [[by_autograd(layer, x) for layer in readers.layers] for x in inputs]

    @torch.no_grad()
    def is_right(i: int) -> bool:
        return all(map(torch.equal, readers(inputs[i]), expected[i]))

    assert not failures_in_threads(is_right, rounds=50)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_generate_shares_products(family: str, calls: list[int]) -> None:
    model, batch = tiny(family)
    quantize_model(model, PACKED)
    options = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(batch["input_ids"], **options)
    calls.clear()
    assert torch.equal(model.generate(batch["input_ids"], **options), first)
    assert family == "gpt2" or max(calls) >= 2  # GPT-2 has its q, k and v in one matrix


# ---- faster forwards ----


def _forms(model: nn.Module) -> Iterator[str]:
    return (type(module).__mro__[1].__name__ for module in model.modules() if isinstance(module, Faster))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_optimized_models_compute_the_same(family: str) -> None:
    model, batch = tiny(family)
    plain, keys = model(**batch)[0], list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    assert optimize_for_generation(optimize_for_generation(model)) is model
    torch.testing.assert_close(model(**batch)[0], plain, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    optimize_for_generation(model, enable=False)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**batch)[0], plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen3", "bitnet"])
def test_decoders_are_recognised(family: str) -> None:
    model, _ = tiny(family, num_hidden_layers=1)
    found = list(_forms(optimize_for_generation(model)))
    assert found.count("FasterAttention") == 1 and found.count("FasterNorm") >= 3


def test_norm_of_another_formula_is_left() -> None:
    model, _ = tiny("gemma3")  # its gain is 1 + weight
    assert "FasterNorm" not in set(_forms(optimize_for_generation(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_optimized_generation(dtype: torch.dtype) -> None:
    model, batch = tiny("llama")
    quantize_model(model, PACKED).to(dtype)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids = batch["input_ids"]
    plain = model.generate(ids, **options)
    fast = optimize_for_generation(model).generate(ids, **options)
    first = (plain.logits[0] - fast.logits[0]).norm() / plain.logits[0].norm()
    assert first < (2e-2 if dtype == torch.bfloat16 else 1e-2)  # an ulp may move an activation to the next code
    assert dtype != torch.float32 or torch.equal(plain.sequences, fast.sequences)


@torch.no_grad()
def test_optimized_copies_stay_optimized() -> None:
    model, batch = tiny("llama")
    optimize_for_generation(model)
    expected, forms = model(**batch).logits, list(_forms(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(_forms(other)) == forms
        assert torch.equal(other(**batch).logits, expected)


def test_optimized_models_train_as_before() -> None:
    model, batch = tiny("llama", labels=True)
    other = optimize_for_generation(copy.deepcopy(model))
    for each in (model, other):
        each(**batch).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@torch.no_grad()
def test_optimized_model_compiles() -> None:
    model, batch = tiny("llama", num_hidden_layers=1)
    quantize_model(model, PACKED)
    plain = model(**batch).logits
    torch.compiler.reset()
    compiled = torch.compile(optimize_for_generation(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, plain, rtol=1e-3, atol=1e-3)


def test_train_form_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = quantize_model(tiny("llama", num_hidden_layers=1)[0], BitNetQuantizationConfig())
    optimize_for_generation(model, enable=False)
    assert not caplog.records
    optimize_for_generation(model)
    assert "is in train form" in caplog.text and "optimize_for_generation(pack_model(model))" in caplog.text
    caplog.clear()
    optimize_for_generation(pack_model(model))
    assert not caplog.records


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes a model \(torch.nn.Module\), not str; for a path"):
        optimize_for_generation("path")  # type: ignore[type-var]


@torch.no_grad()
def test_neighbours_whose_scales_have_other_groups_share_a_call(calls: list[int]) -> None:
    overrides = {r"(up|k)_proj": {"granularity": "group", "group_size": 16}}
    model, batch = tiny("llama", hidden_size=64, intermediate_size=128)[:2]
    quantize_model(model, BitNetQuantizationConfig(weight="int4", granularity="tensor", overrides=overrides))
    packed = pack_model(model.eval())
    expected = packed(**batch).logits
    for _ in range(3):
        calls.clear()
        assert torch.equal(packed(**batch).logits, expected)
    assert calls == [3, 1, 2, 1] * packed.config.num_hidden_layers
