"""A token without the model's forward: taken where nothing else happens there, and never where something does."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

import hf_bitnet as hb
from hf_bitnet.modules import faster_layer, faster_stack
from hf_bitnet.surgery import quantized_layers
from tests.cpu_kernels import failures_in_threads, needs_cpu_kernels
from tests.test_decode_layer import packed_llama
from tests.tiny import tiny

pytestmark = needs_cpu_kernels
PROMPT = torch.tensor([[5, 90, 41, 17], [8, 3, 60, 2]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    return hb.optimize_for_generation(packed_llama(num_hidden_layers=3))


def plain(model: Any) -> Any:
    return hb.optimize_for_generation(copy.deepcopy(model), enable=False)


@torch.no_grad()
def decoded(model: Any, tokens: int = 5, prompt: Tensor = PROMPT[:1], **given: Any) -> Tensor:
    cache = DynamicCache()
    model(prompt, past_key_values=cache)
    ids = [torch.full((len(prompt), 1), 1 + i) for i in range(tokens)]
    return torch.cat([model(each, past_key_values=cache, **given).logits for each in ids])


def forwards(model: Any) -> list[int]:
    """The lengths of the inputs that the first layer is called with from now on."""
    kind, lengths = type(model.model.layers[0]), []

    class Counting(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            lengths.append(hidden_states.shape[1])
            return super().forward(hidden_states, *args, **kwargs)

    model.model.layers[0].__class__ = Counting
    return lengths


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT], ids=["one text", "two texts"])
def test_layers_are_called_for_the_prompt_only(model: LlamaForCausalLM, prompt: Tensor) -> None:
    expected = decoded(plain(model), prompt=prompt)
    same(decoded(model, prompt=prompt), expected)
    called = forwards(model)
    same(decoded(model, prompt=prompt), expected)
    assert called == [4]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "bitnet"])
def test_generated_texts(family: str) -> None:
    model = hb.pack_model(hb.quantize_model(tiny(family)[0], hb.BitNetQuantizationConfig.bitnet_b158()))
    asked: dict[str, Any] = {"max_new_tokens": 90, "min_new_tokens": 90, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(PROMPT[:1], **asked)
    hb.optimize_for_generation(model)
    assert torch.equal(model.generate(PROMPT[:1], **asked), expected)
    called = forwards(model)
    assert torch.equal(model.generate(PROMPT[:1], **asked), expected)
    assert called == [4]


def test_beams_and_padding(model: LlamaForCausalLM) -> None:
    """Beams exchange the cache; padded texts need their masks."""
    asked: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for given in ({"num_beams": 3}, {"attention_mask": mask}, {"attention_mask": torch.ones_like(mask)}):
        assert torch.equal(model.generate(PROMPT, **asked, **given), plain(model).generate(PROMPT, **asked, **given))


def _forward(
    self: Any, input_ids: Tensor, attention_mask: Any, position_ids: Any, past_key_values: Any, **others: Any
) -> BaseModelOutputWithPast:
    y = LlamaModel.forward(
        self,
        inputs_embeds=2.0 * self.embed_tokens(input_ids),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
    )
    return BaseModelOutputWithPast(last_hidden_state=y.last_hidden_state, past_key_values=past_key_values)


def test_a_forward_that_does_something_else_keeps_running() -> None:
    model = packed_llama(num_hidden_layers=3)
    model.model.__class__ = type("Scaled", (LlamaModel,), {"forward": _forward})
    expected = decoded(model)
    hb.optimize_for_generation(model)
    same(decoded(model), expected)
    called = forwards(model)
    same(decoded(model), expected)
    assert called == [4] + [1] * 5


@pytest.mark.parametrize(
    "part", ["embed_tokens", "rotary_emb", "norm", "layers.1", "layers.2.mlp", "layers.0.self_attn.q_proj"]
)
def test_hooks_hear_the_calls_they_would_hear(model: LlamaForCausalLM, part: str) -> None:
    expected = decoded(plain(model))
    decoded(model)
    heard: list[int] = []
    handle = model.model.get_submodule(part).register_forward_hook(lambda *_: heard.append(1))
    same(decoded(model), expected)
    assert len(heard) == 6
    handle.remove()
    called = forwards(model)
    decoded(model)
    assert called == [4]


@torch.no_grad()
def test_what_is_asked_for_is_collected(model: LlamaForCausalLM) -> None:
    decoded(model)
    cache = DynamicCache()
    model(PROMPT, past_key_values=cache)
    one = torch.tensor([[1], [1]])
    assert len(model(one, past_key_values=cache, output_hidden_states=True).hidden_states) == 4
    model.config.output_hidden_states = True
    assert len(model(one, past_key_values=cache).hidden_states) == 4
    model.config.output_hidden_states = False
    assert isinstance(model(one, past_key_values=cache, return_dict=False), tuple)

    assert model.model(inputs_embeds=torch.zeros(2, 1, 64), past_key_values=cache).last_hidden_state.shape == (2, 1, 64)


def _fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 2


def _another_norm(model: Any) -> None:
    norm = copy.deepcopy(model.model.norm)
    norm.weight.data = norm.weight.data * 2
    model.model.norm = norm


def _a_norm_of_another_kind(model: Any) -> None:
    model.model.norm = nn.LayerNorm(model.config.hidden_size)


def _other_weights(model: Any) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1.5)
        model.model.layers[1].mlp.down_proj.weight_scale.mul_(3)


def _a_window(model: Any) -> None:
    model.config.sliding_window = 5
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 5


@pytest.mark.parametrize("change", [_fewer_layers, _another_norm, _a_norm_of_another_kind, _other_weights, _a_window])
def test_changes_are_seen(model: LlamaForCausalLM, change: Callable[[Any], None]) -> None:
    decoded(model)
    change(model)
    same(decoded(model), decoded(plain(model)))


def test_positions_of_the_caller(model: LlamaForCausalLM) -> None:
    given = {"position_ids": torch.tensor([[40]])}
    same(decoded(model, **given), decoded(plain(model), **given))
    assert not torch.allclose(decoded(model, **given), decoded(model), atol=1e-3)


def test_other_threads(model: LlamaForCausalLM) -> None:
    expected = decoded(plain(model))
    assert not failures_in_threads(lambda _: torch.allclose(decoded(model), expected, rtol=2e-4, atol=2e-4), rounds=5)


def test_autocast_and_gradients(model: LlamaForCausalLM) -> None:
    decoded(model)
    with torch.autocast("cpu", torch.bfloat16):
        same(decoded(model).float(), decoded(plain(model)).float())
    cache = DynamicCache()
    model(PROMPT, past_key_values=cache)
    assert model(torch.tensor([[1], [2]]), past_key_values=cache).logits.requires_grad


@torch.no_grad()
def test_what_the_caller_of_the_inner_model_gets(model: LlamaForCausalLM) -> None:
    decoded(model)
    cache, one = DynamicCache(), torch.tensor([[1], [1]])
    model(PROMPT, past_key_values=cache)
    assert isinstance(model.model(input_ids=one, past_key_values=cache, return_dict=False), tuple)
    called = forwards(model)
    model(one, past_key_values=cache)
    assert called == []
    model(one, past_key_values=cache, use_cache=False)
    model.config.use_cache = False
    model(one, past_key_values=cache)
    assert called == [1, 1]


def _scaled(self: Any, **given: Any) -> BaseModelOutputWithPast:
    y = LlamaModel.forward(self, **given)
    return BaseModelOutputWithPast(last_hidden_state=y.last_hidden_state * self.gain, past_key_values=y.past_key_values)


def test_settings_of_the_model_that_change() -> None:
    model = packed_llama(num_hidden_layers=3)
    model.model.__class__ = type("Gaining", (LlamaModel,), {"forward": _scaled, "gain": 1.0})
    model.model.gain = 1.0
    hb.optimize_for_generation(model)
    first = decoded(model)
    model.model.gain = 3.0
    assert not torch.allclose(decoded(model), first, atol=1e-3)
    same(decoded(model), decoded(plain(model)))


@torch.no_grad()
def test_modules_without_a_config(model: LlamaForCausalLM) -> None:
    class Mini(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model.model.layers

        def forward(self, input_ids: Tensor, past_key_values: DynamicCache) -> Tensor:
            return input_ids + 1

    mini = hb.optimize_for_generation(Mini())
    assert mini(input_ids=torch.tensor([[1]]), past_key_values=DynamicCache()).item() == 2


def _last_two(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> tuple[Tensor, None]:
    return AttentionInterface()["sdpa"](module, query, key[:, :, -2:], value[:, :, -2:], None, **others | {"is_causal": False})


def test_other_ways_to_attend_are_not_exchanged(model: LlamaForCausalLM) -> None:
    AttentionInterface.register("last_two", _last_two)
    AttentionMaskInterface.register("last_two", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    decoded(model)
    model.set_attn_implementation("last_two")
    same(decoded(model), decoded(plain(model)))


@torch.no_grad()
def test_another_default_device(model: LlamaForCausalLM) -> None:
    expected = decoded(model)
    plainly = plain(model)
    cache = DynamicCache()
    for each in (model, plainly):
        cache = DynamicCache()
        each(PROMPT[:1], past_key_values=cache)
        ids, positions = torch.tensor([[1]]), torch.tensor([[4]])
        with torch.device("meta"):
            y = each(ids, past_key_values=cache, position_ids=positions).logits
        same(y, expected[:1])


@pytest.mark.parametrize("change", [hb.unpack_model, hb.dequantize_model])
def test_packed_weights_go_with_their_layers(model: Any, change: Callable[[Any], Any]) -> None:
    decoded(model)
    old = [weakref.ref(layer.weight) for _, layer in quantized_layers(model)]
    assert old
    change(model)
    gc.collect()
    assert all(weight() is None for weight in old)


@pytest.mark.parametrize("where", ["model", "layers"])
@torch.no_grad()
def test_what_changes_at_every_token_is_not_proven_for_ever(
    where: str, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proofs cost more than the model's own forward."""
    proofs: list[str] = []
    for each, name in ((faster_stack, "_prove"), (faster_layer, "_agrees")):
        proof = getattr(each, name)
        monkeypatch.setattr(each, name, lambda *args, name=name, proof=proof: proofs.append(name) or proof(*args))
    expected, cache, layers = decoded(plain(model), 30), DynamicCache(), model.model.layers
    model(PROMPT[:1], past_key_values=cache)
    for token in range(30):
        if where == "model":
            model.model.count = token
        else:
            for layer in layers:
                layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.data.clone(), requires_grad=False)
        same(model(torch.tensor([[1 + token]]), past_key_values=cache).logits, expected[token : token + 1])
    assert proofs.count("_prove") < 10 and proofs.count("_agrees") < 2 * 10 * len(layers)  # of a token and of a prompt
    decoded(model, 40)  # nothing changes any more
    called = forwards(model)
    decoded(model)
    assert called == [4]


@torch.no_grad()
def test_weights_that_are_replaced_do_not_stay_for_the_layers_plan(model: LlamaForCausalLM) -> None:
    decoded(model)
    layer, cache, gone = model.model.layers[1].mlp.up_proj, DynamicCache(), []
    model(PROMPT[:1], past_key_values=cache)
    for token in range(20):
        gone.append(weakref.ref(layer.weight))
        layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
        model(torch.tensor([[1 + token]]), past_key_values=cache)
        assert not any(each() is not None for each in gone)
