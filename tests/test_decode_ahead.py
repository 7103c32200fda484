"""Layers computed ahead by the first of them: the same tokens, and what happens when a call comes otherwise than expected."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import hf_bitnet as hb
from hf_bitnet import kernels
from hf_bitnet.modules import faster_ahead
from tests.cpu_kernels import failures_in_threads, needs_cpu_kernels
from tests.test_decode_layer import packed_llama

pytestmark = needs_cpu_kernels
LAYERS = 5
PROMPT = torch.tensor([[5, 90, 41, 17]])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call computed."""
    counts: list[int] = []
    real = kernels.decode_layers

    def counted(steps: Any, *args: Any) -> list[Tensor]:
        counts.append(len(steps))
        return real(steps, *args)

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


def test_rows_are_learned_and_give_the_same(model: LlamaForCausalLM, rows: list[int]) -> None:
    same(decoded(model), plainly(model))
    assert rows == [1] * LAYERS + [LAYERS] * 5
    rows.clear()
    same(decoded(copy.deepcopy(model)), plainly(model))
    assert rows == [1] * LAYERS + [LAYERS] * 5, "a copy learns its own"


def test_every_layer_s_output_is_there(model: LlamaForCausalLM) -> None:
    decoded(model)
    cache, plain = DynamicCache(), hb.optimize_for_generation(copy.deepcopy(model), enable=False)
    with torch.no_grad():
        for each in (cache, other := DynamicCache()):
            model(PROMPT, past_key_values=each)
        token = torch.tensor([[7]])
        found = model(token, past_key_values=cache, output_hidden_states=True).hidden_states
        expected = plain(token, past_key_values=other, output_hidden_states=True).hidden_states
    assert len(found) == LAYERS + 1
    assert len({y.untyped_storage().data_ptr() for y in found}) == LAYERS + 1, "safetensors refuses tensors that share memory"
    for a, b in zip(found, expected, strict=True):
        same(a, b)


def _replaced(_: Any, __: Any, y: Tensor) -> Tensor:
    return y * 1.5


def _in_place(_: Any, __: Any, y: Tensor) -> None:
    y.mul_(1.5)


@pytest.mark.parametrize("hook", [_replaced, _in_place])
def test_changes_between_layers_are_seen(model: LlamaForCausalLM, rows: list[int], hook: Callable[..., Any]) -> None:
    decoded(model)
    model.model.layers[2].register_forward_hook(hook)
    rows.clear()
    same(decoded(model), plainly(model))
    # what was computed in vain once is not computed again
    assert rows == [LAYERS, 2] + [3, 2] * 5


def test_layers_that_are_not_called_keep_their_cache(model: LlamaForCausalLM, rows: list[int]) -> None:
    decoded(model)
    layers, cache = model.model.layers, DynamicCache()
    token = torch.tensor([[3]])
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        rows.clear()
        model.model.layers = layers[:2]
        for _ in range(3):
            model(token, past_key_values=cache)
    assert rows == [LAYERS, 2, 2]
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7, 4, 4, 4]
    model.model.layers = layers
    same(decoded(model), plainly(model))


def test_other_angles_and_another_cache_for_one_layer(model: LlamaForCausalLM) -> None:
    plain = hb.optimize_for_generation(copy.deepcopy(model), enable=False)
    decoded(model)
    x, positions = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([[4]])

    @torch.no_grad()
    def by_hand(of: LlamaForCausalLM, other_angles: bool, other_cache: bool) -> Tensor:
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            of(PROMPT, past_key_values=cache)
        angles = of.model.rotary_emb(x, positions)
        others = of.model.rotary_emb(x, positions + 2)
        y = x
        for index, layer in enumerate(of.model.layers):
            third = index == 2
            y = layer(
                y,
                past_key_values=caches[third and other_cache],
                position_embeddings=others if third and other_angles else angles,
                use_cache=True,
            )
        return torch.cat([y.flatten(), *(layer.keys.flatten() for cache in caches for layer in cache.layers)])

    for case in ((True, False), (False, True), (False, False)):
        same(by_hand(model, *case), by_hand(plain, *case))


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


def test_threads_do_not_take_each_other_s_results(model: LlamaForCausalLM) -> None:
    decoded(model)
    expected = decoded(model)
    assert not failures_in_threads(lambda _: torch.equal(decoded(model), expected), rounds=10)


def test_nothing_is_kept_alive() -> None:
    model, cache = hb.optimize_for_generation(packed_llama(num_hidden_layers=LAYERS)), DynamicCache()
    decoded(model, cache=cache)
    with torch.no_grad():
        model.model(torch.tensor([[1]]), past_key_values=cache)
        y = model.model.embed_tokens(torch.tensor([[1]]))
        first = model.model.layers[0]
        first(y, past_key_values=cache, position_embeddings=model.model.rotary_emb(y, torch.tensor([[11]])))
    assert faster_ahead._LOCAL.waiting is not None  # of the layers that were not called
    alive = [cache, cache.layers[1].keys, model, model.model.layers[1].mlp.down_proj.weight]
    alive = [weakref.ref(each) for each in alive]
    del cache, model, first
    gc.collect()
    assert [each() for each in alive] == [None] * 4
