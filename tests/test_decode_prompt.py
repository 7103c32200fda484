"""A prompt in one kernel call a layer: where it is taken, what it leaves in the cache, and where it must not be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

import hf_bitnet as hb
from hf_bitnet.modules import faster_layer, faster_prompt
from hf_bitnet.modules.faster_cache import held_by
from tests import tiny
from tests.cpu_kernels import needs_cpu_kernels
from tests.test_decode_layer import packed_llama, packed_tiny

pytestmark = needs_cpu_kernels
IDS = torch.randint(0, 160, (2, 45), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every prompt that a layer has computed in one call."""
    counted: list[int] = []
    real = faster_prompt.compute

    def compute(module: Any, described: Any, x: Tensor, *rest: Any) -> Tensor | None:
        y = real(module, described, x, *rest)
        counted.extend([x.shape[1]] * (y is not None))
        return y

    monkeypatch.setattr(faster_prompt, "compute", compute)
    return counted


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"past_key_values": None}], ids=str)
def test_a_prompt_takes_one_call_a_layer(taken: list[int], settings: dict[str, Any]) -> None:
    model = packed_llama()
    expected = model(IDS, **settings)
    found = hb.optimize_for_generation(model)(IDS, **settings)
    assert taken == [45, 45]
    near(found.logits, expected.logits)
    if found.past_key_values is not None:
        for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
            near(ours.keys, theirs.keys), near(ours.values, theirs.values)


@torch.no_grad()
def test_the_cache_has_room_for_the_next_token_and_keeps_its_place(taken: list[int]) -> None:
    model, plain = hb.optimize_for_generation(packed_llama()), packed_llama()
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(IDS, past_key_values=cache), plain(IDS, past_key_values=other)
    places = [held_by(layer) for layer in cache.layers]
    assert taken == [45, 45] and all(places)
    for token in (7, 9):
        ids = torch.full((2, 1), token)
        near(model(ids, past_key_values=cache).logits, plain(ids, past_key_values=other).logits)
    assert cache.get_seq_length() == 47
    for layer, place in zip(cache.layers, places, strict=True):
        held = held_by(layer)
        assert held is not None and place is not None and held.place is place.place, "the token was copied to other buffers"


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_other_families_compute_the_same(family: str) -> None:
    model = packed_tiny(family)
    ids = torch.randint(5, 50, (9, 11), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    found = hb.optimize_for_generation(model)(ids).logits
    off = ((found - expected).abs() > 2e-4 * expected.abs().max()).any(-1).any(-1)
    assert off.sum() <= 2  # a rounding that goes the other way moves a code, and all tokens behind it see that
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "bitnet"])
def test_families_that_take_the_one_call(family: str, taken: list[int]) -> None:
    model = packed_tiny(family)
    hb.optimize_for_generation(model)(torch.tensor([[5, 40, 21, 9]]))
    assert taken == [4] * model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 90])
def test_what_is_added_to_a_prompt_takes_it_too(taken: list[int], tokens: int) -> None:
    """As the next turn of a chat is, or guessed tokens that are looked at together."""
    model, plain = hb.optimize_for_generation(packed_llama()), packed_llama()
    more = torch.randint(0, 160, (2, tokens), generator=torch.Generator().manual_seed(2))
    logits = []
    for each in (model, plain):
        cache = DynamicCache()
        each(IDS, past_key_values=cache), each(IDS[:, :1], past_key_values=cache)
        cache.crop(-6)  # 40 are left
        logits += [each(more, past_key_values=cache).logits, each(IDS[:, :1], past_key_values=cache).logits]
        assert cache.get_seq_length() == 41 + tokens
    assert taken[:2] == [45, 45] and taken[-2:] == [tokens, tokens]  # between them, the proof of the model's forward
    near(logits[0], logits[2]), near(logits[1], logits[3])


@torch.no_grad()
def test_a_cache_of_other_tensors_is_not_written_into(taken: list[int]) -> None:
    model, plain = hb.optimize_for_generation(packed_llama()), packed_llama()
    given = [torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    before = [tensor.clone() for tensor in given]
    logits = []
    for each in (model, plain):
        cache = DynamicCache()
        for index in range(2):
            cache.update(given[2 * index], given[2 * index + 1], index)
            cache.layers[index].keys, cache.layers[index].values = given[2 * index : 2 * index + 2]
        logits.append(each(IDS, past_key_values=cache).logits)
    assert taken == [45, 45] and all(map(torch.equal, given, before))
    near(*logits)


def masked_otherwise(model: LlamaForCausalLM) -> Tensor:
    mask = torch.ones(1, 1, 45, 45, dtype=torch.bool).tril()
    mask[..., 44, 3] = False
    first = model(IDS, attention_mask=mask, use_cache=False).logits
    mask[..., 44, 3] = True  # the same tensor with other numbers
    mask[..., 30, 7] = False
    return torch.cat([first, model(IDS, attention_mask=mask, use_cache=False).logits])


def padded(model: LlamaForCausalLM) -> Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    return model(IDS, attention_mask=mask).logits[mask.bool()]


def both_ways(model: LlamaForCausalLM) -> Tensor:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model(IDS).logits


def eager(model: LlamaForCausalLM) -> Tensor:
    model.set_attn_implementation("eager")
    return model(IDS).logits


def packed_texts(model: LlamaForCausalLM) -> Tensor:
    positions = torch.cat([torch.arange(20), torch.arange(25)]).expand(2, -1)
    return model(IDS, position_ids=positions, use_cache=False).logits


def static(model: LlamaForCausalLM) -> Tensor:
    return model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=64)).logits


def autocast(model: LlamaForCausalLM) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(IDS).logits


def watched(model: LlamaForCausalLM) -> Tensor:
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: None)
    return model(IDS).logits


def with_gradients(model: LlamaForCausalLM) -> Tensor:
    with torch.enable_grad():
        return model(IDS).logits.detach()


@torch.no_grad()
@pytest.mark.parametrize(
    "way", [padded, masked_otherwise, both_ways, eager, packed_texts, static, autocast, watched, with_gradients]
)
def test_what_is_no_plain_prompt_takes_the_layers_own_forward(way: Callable[[Any], Tensor], taken: list[int]) -> None:
    model = packed_llama()
    hb.optimize_for_generation(model)(IDS)
    assert taken == [45, 45]
    found = way(model)
    assert taken == [45, 45]
    near(found, way(packed_llama()))


@torch.no_grad()
def test_a_layer_that_is_proven_under_eager_attention_keeps_its_forward_for_prompts(taken: list[int]) -> None:
    model = packed_llama()
    model.set_attn_implementation("eager")
    cache = DynamicCache()
    expected = model(IDS, past_key_values=cache).logits
    near(hb.optimize_for_generation(model)(IDS).logits, expected)
    near(model(IDS[:, :1], past_key_values=cache).logits, packed_llama()(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1:])
    assert not taken and all(isinstance(faster_layer._PLANS[layer], faster_layer._Plan) for layer in model.model.layers)
    model.set_attn_implementation("sdpa")
    near(model(IDS).logits, expected)
    assert not taken


def test_inference_mode_takes_it_too(taken: list[int]) -> None:
    model = packed_llama()
    with torch.inference_mode():
        expected = model(IDS).logits
        near(hb.optimize_for_generation(model)(IDS).logits, expected)
    assert taken == [45, 45]
