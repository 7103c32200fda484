"""A decoder layer in one call: against its definition, inside transformers, and where it must not be used."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_bitnet as hb
from hf_bitnet import kernels
from hf_bitnet.modules import faster_layer
from tests import tiny
from tests.cpu_kernels import needs_cpu_kernels

pytestmark = needs_cpu_kernels
LAYOUT, ROWS = kernels.Layout(2, -1, 1, 0.0), kernels.RowQuantization(-128, 127, 1e-5)


def made_layer(
    hidden: int, ffn: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, bias: bool = False, norms: bool = False
) -> kernels.DecoderLayer:
    generator = torch.Generator().manual_seed(hidden + heads)

    def weight(outputs: int, inputs: int) -> kernels.PackedWeight:
        codes = torch.randint(-1, 2, (outputs, inputs), generator=generator).to(torch.int8)
        if not bias:
            return kernels.pack(codes, 2, -1, 1), torch.full((1, 1), inputs**-0.5), None
        scale = (torch.rand(outputs, 1, generator=generator) + 0.5) * inputs**-0.5  # with biases, a scale a channel
        return kernels.pack(codes, 2, -1, 1), scale, torch.randn(outputs, generator=generator).to(dtype)

    def norm(features: int, eps: float = 1e-5, once: bool = False) -> kernels.Norm:
        return kernels.Norm(torch.rand(features, generator=generator).to(dtype) + 0.5, eps, once)

    wide, narrow = heads * size, kv_heads * size
    more = {"q_norm": norm(size), "k_norm": norm(size, 1e-4), "out_norm": norm(wide, once=True), "down_norm": norm(ffn)}
    more |= {"activation": "relu2"}
    return kernels.DecoderLayer(
        *(norm(hidden), norm(hidden, 1e-6)),
        (weight(wide, hidden), weight(narrow, hidden), weight(narrow, hidden)),
        weight(hidden, wide),
        (weight(ffn, hidden), weight(ffn, hidden)),
        weight(hidden, ffn),
        *(LAYOUT, ROWS, heads, kv_heads, size, size**-0.5),
        **(more if norms else {}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "batch", "length", "tokens"),
    [
        *(((64, 96, 4, 2, 16), 1, 0, 1), ((64, 96, 4, 2, 16), 2, 5, 1)),
        *(((48, 40, 4, 4, 12), 3, 37, 1), ((128, 256, 8, 2, 16), 1, 100, 1)),
        *(((64, 96, 4, 2, 16), 1, 0, 2), ((64, 96, 4, 2, 16), 2, 5, 33), ((96, 40, 4, 2, 48), 2, 0, 20)),
        *(((48, 40, 4, 4, 12), 3, 37, 300), ((128, 64, 4, 1, 80), 1, 250, 17), ((64, 96, 4, 2, 16), 2, 3, 1030)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_one_call_is_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], batch: int, length: int, tokens: int, bias: bool, norms: bool
) -> None:
    layer = made_layer(*shape, dtype, bias=bias, norms=norms)  # type: ignore[arg-type]
    hidden, _, _, kv_heads, size = shape
    generator = torch.Generator().manual_seed(3)
    angles = (batch if tokens == 20 else 1, tokens, size)
    x, cos, sin = (torch.randn(*of, generator=generator).to(dtype) for of in ((batch, tokens, hidden), angles, angles))
    keys, values = (torch.randn(batch, kv_heads, length + tokens + 2, size, generator=generator).to(dtype) for _ in range(2))
    ours = keys.clone(), values.clone()
    expected = kernels.decode_layer(layer, x, cos, sin, keys, values, length)
    found = kernels.DescribedLayer(layer).decode(x, cos, sin, *ours, length)
    # a rounding that goes the other way may move a code of the next product: in bfloat16 often, in float32 of few tokens
    tolerance, other = {torch.float32: (1e-5, 0.002), torch.bfloat16: (0.03, 0), torch.float16: (0.004, 0.005)}[dtype]
    for a, b in ((found, expected), (ours[0], keys), (ours[1], values)):
        error = (a.float() - b.float()).abs().amax(-1) / b.float().abs().max()
        assert error.max() <= max(tolerance, 0.03 * (tokens > 1))
        assert (error > tolerance).sum() <= other * error.numel()
    assert torch.equal(ours[0][:, :, length + tokens :], keys[:, :, length + tokens :])  # nothing behind the tokens is touched


@pytest.mark.parametrize(("hidden", "ffn", "tokens"), [(2112, 40, 20), (4700, 70, 33), (16384, 8, 300)])
@pytest.mark.parametrize("bias", [False, True])
def test_wide_layers_whose_sums_or_tokens_come_in_parts(hidden: int, ffn: int, tokens: int, bias: bool) -> None:
    layer = made_layer(hidden, ffn, 2, 1, 16, torch.float32, bias=bias)
    *others, (codes, scale, some) = layer.qkv
    layer = layer._replace(qkv=(*others, (codes, 0 * scale, some)))  # what moves in one token is not seen by others
    generator = torch.Generator().manual_seed(3)
    x, cos, sin = (torch.randn(1, tokens, size, generator=generator) for size in (hidden, 16, 16))
    keys, values = torch.zeros(2, 1, 1, tokens, 16)
    expected = kernels.decode_layer(layer, x, cos, sin, keys.clone(), values.clone(), 0)
    found = kernels.DescribedLayer(layer).decode(x, cos, sin, keys, values, 0)
    error = (found - expected).abs().amax(-1) / expected.abs().max()
    assert error.max() <= 0.03
    # the more numbers a row has, the more often one of them lies where a rounding goes the other way
    assert (error > 1e-5).sum() <= 0.2 * tokens


def test_it_refuses_what_is_not_a_layer() -> None:
    layer = made_layer(64, 96, 4, 2, 16, torch.float32)
    wrong = layer._replace(down=layer.attention_out)
    with pytest.raises(ValueError, match="do not belong together"):
        kernels.DescribedLayer(wrong)
    described = kernels.DescribedLayer(layer)
    x, angle, keys = torch.randn(1, 1, 64), torch.randn(1, 1, 16), torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="need 5 places, 1 of them new"):
        described.decode(x, angle, angle, keys, keys.clone(), 4)
    with pytest.raises(ValueError, match="not of this layer"):
        described.decode(torch.randn(1, 1, 32), angle, angle, keys, keys.clone(), 3)


def packed_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(), progress=False)
    return hb.pack_model(model, progress=False)


def packed_tiny(family: str) -> Any:
    """A tiny model of a family of `tiny`, whose norms have gains that are not 1, quantized and packed."""
    model = tiny.tiny(family)[0].eval()
    hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(), progress=False)
    return hb.pack_model(model, progress=False)


def plans(model: LlamaForCausalLM) -> list[object]:
    found = [faster_layer._PLANS.get(layer) for layer in model.model.layers]
    return [plan if isinstance(plan, faster_layer._Plan) else None for plan in found]


@torch.no_grad()
def test_generation_is_the_same_and_takes_the_one_call() -> None:
    model = packed_llama()
    prompt = torch.randint(0, 160, (2, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 90, "min_new_tokens": 90, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0}
    before = model.generate(prompt, **settings)
    after = hb.optimize_for_generation(model).generate(prompt, **settings)
    assert all(plans(model)), "no layer took the one call"
    assert torch.equal(before.sequences, after.sequences)
    for a, b in zip(after.logits, before.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_other_families_generate_the_same(family: str) -> None:
    model = packed_tiny(family)
    prompt = torch.randint(5, 50, (1, 5), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **settings)
    assert torch.equal(before, hb.optimize_for_generation(model).generate(prompt, **settings))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "bitnet"])
def test_families_that_take_the_one_call(family: str) -> None:
    """Among them norms of heads, norms in front of projections and another activation, with gains that are not 1."""
    model = packed_tiny(family)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(torch.tensor([[5, 40, 21]]), **settings)
    assert torch.equal(before, hb.optimize_for_generation(model).generate(torch.tensor([[5, 40, 21]]), **settings))
    assert all(plans(model)), "no layer took the one call"


@torch.no_grad()
def test_own_sub_norms_take_the_one_call_when_they_are_whole() -> None:
    model = LlamaForCausalLM(packed_llama().config).eval()
    config = hb.BitNetQuantizationConfig.bitnet_b158(sub_norm=["o_proj", "down_proj"])
    hb.quantize_model(model, config, progress=False)
    for name, parameter in model.named_parameters():
        if "sub_norm" in name:
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
    hb.pack_model(model, progress=False)
    prompt, settings = (
        torch.tensor([[5, 90, 41]]),
        {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "do_sample": False},
    )

    def logits(of: LlamaForCausalLM) -> torch.Tensor:
        return torch.stack(of.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings).logits)

    plain = copy.deepcopy(model)
    hb.optimize_for_generation(model)
    for blend, taken in ((1.0, True), (0.5, False), (1.0, False)):
        for each in (model, plain):
            hb.set_norm_blend(each, blend)
        torch.testing.assert_close(logits(model), logits(plain), rtol=2e-4, atol=2e-4)
        assert [plan is not None for plan in plans(model)] == [taken] * 2
    hb.optimize_for_generation(model)
    logits(model)
    assert all(plans(model)), "asked again, they are looked at anew"


@torch.no_grad()
def test_two_caches_that_share_tensors_do_not_write_into_each_other() -> None:
    model = hb.optimize_for_generation(packed_llama())
    prompt = torch.randint(0, 160, (1, 6), generator=torch.Generator().manual_seed(1))
    first = DynamicCache()
    model(prompt, past_key_values=first)
    model(prompt[:, :1], past_key_values=first)  # now in a buffer with room
    second = DynamicCache()
    for index, layer in enumerate(first.layers):
        second.update(layer.keys, layer.values, index)
        second.layers[index].keys, second.layers[index].values = layer.keys, layer.values
    a = model(torch.tensor([[3]]), past_key_values=first).logits
    model(torch.tensor([[9]]), past_key_values=second)
    again = model(torch.tensor([[5]]), past_key_values=first).logits
    fresh = DynamicCache()
    model(torch.cat([prompt, prompt[:, :1]], dim=1), past_key_values=fresh)
    torch.testing.assert_close(model(torch.tensor([[3]]), past_key_values=fresh).logits, a, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(model(torch.tensor([[5]]), past_key_values=fresh).logits, again, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_changed_weights_hooks_and_copies_are_noticed() -> None:
    model = hb.optimize_for_generation(packed_llama())
    prompt = torch.randint(0, 160, (1, 4), generator=torch.Generator().manual_seed(1))
    token = torch.tensor([[7]])

    def logits(of: LlamaForCausalLM) -> torch.Tensor:
        cache = DynamicCache()
        of(prompt, past_key_values=cache)
        return of(token, past_key_values=cache).logits

    start = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(twin), start)
    down = model.model.layers[1].mlp.down_proj
    down.weight_scale.data = down.weight_scale * 2  # another tensor behind the same parameter
    changed = logits(model)
    assert not torch.allclose(changed, start)
    calls: list[int] = []
    handle = down.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(model), changed, rtol=2e-4, atol=2e-4)
    assert len(calls) == 2, "a hook on a part has to see every call"
    handle.remove()
    hb.optimize_for_generation(model, enable=False)
    torch.testing.assert_close(logits(model), changed, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_exchanged_parts_and_changed_settings_are_noticed() -> None:
    prompt = torch.tensor([[5, 90, 41, 17]])  # no padding: a mask would need the parts
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}

    def logits(model: LlamaForCausalLM) -> torch.Tensor:
        found = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings)
        return torch.stack(found.logits)

    for change in (
        lambda model: setattr(model.model.layers[0].input_layernorm.weight, "data", torch.full((64,), 3.0)),
        lambda model: setattr(model.model.layers[1].post_attention_layernorm, "variance_epsilon", 1.0),
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 5.0),
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.GELU()),
        hb.dequantize_model,
    ):
        model = hb.optimize_for_generation(packed_llama())
        logits(model)
        assert all(plans(model))
        change(model)
        found = logits(model)
        torch.testing.assert_close(found, logits(hb.optimize_for_generation(model, enable=False)), rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_hooks_see_the_calls_of_the_user_only() -> None:
    model = hb.optimize_for_generation(packed_llama())
    batches: list[int] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, given, __: batches.append(given[0].shape[0]))
    model.generate(torch.tensor([[5, 90, 41, 17]]), max_new_tokens=3, min_new_tokens=3, pad_token_id=0, do_sample=False)
    assert batches == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_transforms_and_traces_see_the_parts() -> None:
    model = hb.optimize_for_generation(packed_llama())
    layer = model.model.layers[0]
    generator = torch.Generator().manual_seed(1)
    keys, values, xs = (torch.randn(*size, generator=generator) for size in ((1, 2, 3, 16), (1, 2, 3, 16), (4, 1, 1, 64)))
    angles = model.model.rotary_emb(xs[0], torch.tensor([[3]]))

    def next_token(x: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache()
        cache.update(keys, values, 0)
        return layer(x, past_key_values=cache, position_embeddings=angles)

    expected = torch.stack([next_token(x) for x in xs])
    assert plans(model)[0], "the layer did not take the one call"
    torch.testing.assert_close(torch.func.vmap(next_token)(xs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(make_fx(next_token)(xs[0])(xs[1]), expected[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_empty_place_among_the_parts_is_no_watcher() -> None:
    model = hb.optimize_for_generation(packed_llama())
    for layer in model.model.layers:
        layer.mlp.register_module("dropout", None)
    model.generate(torch.tensor([[5, 90, 41, 17]]), max_new_tokens=3, min_new_tokens=3, pad_token_id=0, do_sample=False)
    assert all(plans(model))


@torch.no_grad()
def test_a_layer_that_is_packed_again_takes_the_one_call_again() -> None:
    model = hb.optimize_for_generation(packed_llama())
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    prompt = torch.tensor([[5, 90, 41, 17]])
    expected = model.generate(prompt, **settings)
    before = plans(model)
    hb.unpack_model(model)
    model.generate(prompt, **settings)
    hb.pack_model(model, progress=False)
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert all(plan and plan is not old for plan, old in zip(plans(model), before, strict=True))


@torch.no_grad()
def test_traces_record_the_product() -> None:
    layer = packed_llama().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    graph = make_fx(layer)(x)
    torch.testing.assert_close(graph(x * 2), layer(x * 2))
