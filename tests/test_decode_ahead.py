"""Layers computed ahead by the first of them: the same tokens, and what happens when a call comes otherwise than expected."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import hf_bitnet as hb
from hf_bitnet import kernels
from hf_bitnet.modules import faster_ahead, faster_stack
from tests.cpu_kernels import failures_in_threads, needs_cpu_kernels
from tests.test_decode_layer import made_layer, packed_llama

pytestmark = needs_cpu_kernels
LAYERS = 5
PROMPT = torch.tensor([[5, 90, 41, 17]])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call for a token computed."""
    counts: list[int] = []
    real = kernels.decode_layers

    def counted(steps: Any, x: Tensor, *args: Any) -> list[Tensor]:
        counts.extend([len(steps)] * (x.shape[1] == 1))
        return real(steps, x, *args)

    monkeypatch.setattr(kernels, "decode_layers", counted)
    return counts


@pytest.fixture
def model() -> LlamaForCausalLM:
    return hb.optimize_for_generation(packed_llama(num_hidden_layers=LAYERS))


def decoded(model: LlamaForCausalLM, tokens: int = 6, cache: DynamicCache | None = None) -> Tensor:
    """Logits of the tokens 1, 2, ... after the prompt, one at a time."""
    cache = DynamicCache() if cache is None else cache
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        return torch.cat([model(torch.tensor([[1 + i]]), past_key_values=cache).logits for i in range(tokens)])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def plainly(model: LlamaForCausalLM) -> Tensor:
    """What the modules compute by themselves."""
    return decoded(hb.optimize_for_generation(copy.deepcopy(model), enable=False))


def test_a_token_is_one_call(model: LlamaForCausalLM, rows: list[int]) -> None:
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(decoded(each), plainly(model))
        rows.clear()
        decoded(each)
        assert rows == [LAYERS] * 6
    rows.clear()
    hb.optimize_for_generation(model, enable=False)
    decoded(model)
    assert rows == []


def _replaced(_: Any, __: Any, y: Tensor) -> Tensor:
    return y * 1.5


def _in_place(_: Any, __: Any, y: Tensor) -> None:
    y.mul_(1.5)


def _behind_the_back(_: Any, __: Any, y: Tensor) -> None:
    y.data.mul_(1.5)


@pytest.mark.parametrize("hook", [_replaced, _in_place, _behind_the_back])
def test_a_hooked_layer_is_computed_alone(model: LlamaForCausalLM, rows: list[int], hook: Callable[..., Any]) -> None:
    decoded(model)
    handle = model.model.layers[2].register_forward_hook(hook)
    rows.clear()
    same(decoded(model), plainly(model))
    assert rows == [2, 1, 2] * 6
    handle.remove()
    decoded(model)
    rows.clear()
    same(decoded(model), plainly(model))
    assert rows == [LAYERS] * 6, "the row is whole again"


@torch.no_grad()
def by_hand(model: LlamaForCausalLM, before: Callable[[int, Any, list[Any]], None]) -> Tensor:
    """One token through the layers; `before` may change (input, cache, angles) of each of them."""
    caches = DynamicCache(), DynamicCache()
    model(PROMPT, past_key_values=caches[0])
    model(PROMPT.flip(1), past_key_values=caches[1])
    y = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    angles = [model.model.rotary_emb(y, torch.tensor([[position]])) for position in (4, 6)]
    for index, layer in enumerate(model.model.layers):
        call = [y, caches, angles]
        before(index, layer, call)
        y = layer(call[0], past_key_values=call[1][0], position_embeddings=call[2][0], use_cache=True)
    return torch.cat([y.flatten(), *(layer.keys.flatten() for cache in caches for layer in cache.layers)])


def _other_cache(_: Any, call: list[Any]) -> None:
    call[1] = call[1][::-1]


def _other_angles(_: Any, call: list[Any]) -> None:
    call[2] = call[2][::-1]


def _other_input(_: Any, call: list[Any]) -> None:
    call[0] = call[0] * 2


def _changed_input(_: Any, call: list[Any]) -> None:
    call[0].mul_(2)


def _shorter_past(layer: Any, call: list[Any]) -> None:
    call[1][0].layers[layer.self_attn.layer_idx].crop(-1)


def inside(model: LlamaForCausalLM, before: Callable[[int, Any, list[Any]], None]) -> Tensor:
    """`by_hand`, as if it were the model's own forward."""
    return faster_ahead.with_rows(model.model, lambda: by_hand(model, before))


@pytest.mark.parametrize("change", [_other_cache, _other_angles, _other_input, _changed_input, _shorter_past])
def test_a_forward_that_calls_a_layer_with_something_else(
    model: LlamaForCausalLM, rows: list[int], change: Callable[[Any, list[Any]], None]
) -> None:
    plain = hb.optimize_for_generation(copy.deepcopy(model), enable=False)

    def fourth(index: int, layer: Any, call: list[Any]) -> None:
        if index == 3:
            change(layer, call)

    with torch.no_grad():
        same(inside(model, fourth), by_hand(plain, fourth))
        assert rows[0] == LAYERS and sum(rows) > LAYERS
        rows.clear()
        same(by_hand(model, fourth), by_hand(plain, fourth))
    assert rows == [1] * LAYERS, "called by hand, every layer is computed alone"


def test_a_forward_that_leaves_layers_out(model: LlamaForCausalLM, rows: list[int]) -> None:
    plain = hb.optimize_for_generation(copy.deepcopy(model), enable=False)

    def some(of: LlamaForCausalLM) -> Tensor:
        cache, y = DynamicCache(), torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
        of(PROMPT, past_key_values=cache)
        angles = of.model.rotary_emb(y, torch.tensor([[4]]))
        for index in (0, 1, 3):
            y = of.model.layers[index](y, past_key_values=cache, position_embeddings=angles, use_cache=True)
        assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 4, 5, 4]
        return y

    with torch.no_grad():
        same(faster_ahead.with_rows(model.model, lambda: some(model)), some(plain))
    assert rows == [LAYERS, 2]


def test_outputs_of_all_layers(model: LlamaForCausalLM, rows: list[int]) -> None:
    found: dict[int, list[Tensor]] = {}
    plain = hb.optimize_for_generation(copy.deepcopy(model), enable=False)
    inside(model, lambda _, __, call: found.setdefault(0, []).append(call[0]))
    by_hand(plain, lambda _, __, call: found.setdefault(1, []).append(call[0]))
    assert rows == [LAYERS]
    for a, b in zip(found[0], found[1], strict=True):
        same(a, b)
    assert len({y.untyped_storage().data_ptr() for y in found[0]}) == LAYERS, "safetensors refuses tensors that share memory"


def test_many_misses_end_the_rows(model: LlamaForCausalLM, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster_stack, "_token", lambda *_: None)

    def change(index: int, layer: Any, call: list[Any]) -> None:
        if index >= 3:
            _other_angles(layer, call)

    for _ in range(faster_ahead._MOST_MISSES - 1):
        inside(model, change)
    rows.clear()
    decoded(model, tokens=2)
    assert rows == [LAYERS] * 2
    inside(model, change)
    rows.clear()
    decoded(model, tokens=2)
    assert rows == [1] * (2 * LAYERS)
    hb.optimize_for_generation(model)
    rows.clear()
    decoded(model, tokens=2)
    assert rows == [LAYERS] * 2, "asked again, it starts anew"


def test_layers_that_are_not_called_keep_their_cache(model: LlamaForCausalLM, rows: list[int]) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        model.config.num_hidden_layers = 2
        for _ in range(3):
            model(torch.tensor([[3]]), past_key_values=cache)
    assert rows == [LAYERS] * 3
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7, 4, 4, 4]
    model.config.num_hidden_layers = LAYERS
    same(decoded(model), plainly(model))


def test_a_token_that_was_interrupted(model: LlamaForCausalLM) -> None:
    decoded(model)
    cache = DynamicCache()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        handle = model.model.layers[3].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[1]]), past_key_values=cache)
        handle.remove()
        assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 5, 4, 4]
        for layer in cache.layers[:3]:
            layer.crop(-1)
        again = torch.cat([model(torch.tensor([[1 + i]]), past_key_values=cache).logits for i in range(6)])
    same(again, plainly(model))
    same(decoded(model), plainly(model))


def test_layers_that_share_a_cache(model: LlamaForCausalLM) -> None:
    plain = hb.optimize_for_generation(copy.deepcopy(model), enable=False)
    for each in (model, plain):
        each.model.layers[3].self_attn.layer_idx = 2
    for _ in range(2):
        same(decoded(model), decoded(plain))


def test_shorter_caches_are_followed(model: LlamaForCausalLM) -> None:
    decoded(model)
    cache = DynamicCache()
    decoded(model, cache=cache)
    cache.crop(-4)  # leaves the prompt and two tokens
    with torch.no_grad():
        again = torch.cat([model(torch.tensor([[3 + i]]), past_key_values=cache).logits for i in range(4)])
    same(again, plainly(model)[2:])


def test_weights_changed_in_the_middle_of_a_row(model: LlamaForCausalLM, rows: list[int]) -> None:
    decoded(model)
    down = model.model.layers[3].mlp.down_proj
    down.weight_scale.data = down.weight_scale * 2
    rows.clear()
    same(decoded(model), plainly(model))
    assert rows == [LAYERS] * 6
    calls: list[int] = []
    down.register_forward_hook(lambda *_: calls.append(1))
    rows.clear()
    decoded(model, tokens=3)
    assert rows == [3, 1] * 3 and len(calls) == 4, "a watched layer is called, and ends the row before it"


def test_inference_mode(model: LlamaForCausalLM, rows: list[int]) -> None:
    decoded(model)
    rows.clear()
    cache = DynamicCache()
    with torch.inference_mode():
        model(PROMPT, past_key_values=cache)
        found = torch.cat([model(torch.tensor([[1 + i]]), past_key_values=cache).logits for i in range(6)])
    assert rows == [1] * (6 * LAYERS)  # a change between two layers could not be seen
    same(found.clone(), plainly(model))


def test_threads_do_not_take_each_other_s_results(model: LlamaForCausalLM, rows: list[int]) -> None:
    decoded(model)
    expected = decoded(model)
    rows.clear()
    assert not failures_in_threads(lambda _: torch.equal(decoded(model), expected), rounds=10)
    assert set(rows) == {LAYERS}, "no thread ends a row of another"


def test_a_kernel_call_for_two_layers_is_two_calls() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [kernels.DescribedLayer(made_layer(64, 96, 4, 2, 16, torch.float32, norms=norms)) for norms in (False, True)]
    x, cos, sin = (torch.randn(*size, generator=generator) for size in ((2, 1, 64), (1, 1, 16), (1, 1, 16)))
    buffers = [[torch.randn(2, 2, 9, 16, generator=generator) for _ in range(2)] for _ in layers]
    twins = [[buffer.clone() for buffer in pair] for pair in buffers]
    steps = [(layer, kernels.cache_place(*pair), 5) for layer, pair in zip(layers, buffers, strict=True)]
    first, second = kernels.decode_layers(steps, x, cos, sin)
    expected = layers[0].decode(x, cos, sin, *twins[0], 5)
    assert torch.equal(first, expected)
    assert torch.equal(second, layers[1].decode(expected, cos, sin, *twins[1], 5))
    assert all(torch.equal(a, b) for pair, twin in zip(buffers, twins, strict=True) for a, b in zip(pair, twin, strict=True))


def test_what_is_no_row_is_refused() -> None:
    layer, narrow = (kernels.DescribedLayer(made_layer(hidden, 96, 4, 2, 16, torch.float32)) for hidden in (64, 48))
    x, angle = torch.randn(1, 1, 64), torch.randn(1, 1, 16)
    place = kernels.cache_place(torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16))
    for steps, given, message in (
        ([(layer, place, 3), (narrow, place, 3)], (x, angle, angle), "not of this layer"),
        ([(layer, place, 4)], (x, angle, angle), "need 5 places, 1 of them new, and have 4"),
        ([(layer, place, 3)], (x, angle.to("meta"), angle), "need to be on the CPU"),
        ([(layer, place, 3)], (x, angle.double(), angle), "need one dtype"),
        ([(layer, place, 3)], (torch.randn(2, 1, 64), angle, angle), "are not of this layer"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.decode_layers(steps, *given)
    with pytest.raises(ValueError, match="equal shapes, dtypes and strides"):
        kernels.cache_place(torch.randn(1, 2, 4, 16), torch.randn(1, 2, 5, 16))
    with pytest.raises(TypeError, match="addresses of this process"):
        copy.deepcopy(layer)


def test_nothing_is_kept_alive() -> None:
    model, cache = hb.optimize_for_generation(packed_llama(num_hidden_layers=LAYERS)), DynamicCache()
    decoded(model, cache=cache)
    with torch.no_grad():
        model.config.num_hidden_layers = 2  # what is computed for the others is not taken
        model.model(torch.tensor([[1]]), past_key_values=cache)
    things = [cache, cache.layers[1].keys, model, model.model.layers[1].mlp.down_proj.weight]
    alive = [weakref.ref(each) for each in things]
    del cache, model, things
    gc.collect()
    assert [each() for each in alive] == [None] * 4
