"""The training step: activations that layers share, what is saved for backward, codes that are kept."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_bitnet.modules import BitLinear, PackedBitLinear
from hf_bitnet.quantizers import Quantized, WeightQuantizer
from hf_bitnet.quantizers.activation import Int8PerToken, Int8Static
from hf_bitnet.surgery import kept_codes
from tests.layers import FORMS, IN, OUT, each_form, make_layer

# ---- one activation for several layers ----


def _counting(scheme: type) -> tuple[type, list[Tensor]]:
    calls: list[Tensor] = []

    class Counting(scheme):  # type: ignore[misc, valid-type]
        @classmethod
        def quantize(cls, x: Tensor, scale: Tensor | None = None) -> Quantized:
            calls.append(x)
            return super().quantize(x, scale)

    return Counting, calls


def _readers(scheme: type, number: int = 3) -> list[BitLinear]:
    layers = [make_layer() for _ in range(number)]
    for layer in layers:
        layer.activation = scheme
    return layers


def _alone(layer: BitLinear, x: Tensor) -> Tensor:
    """What a layer computes from a tensor of its own, with which nothing is shared."""
    fresh = copy.deepcopy(layer)
    fresh.activation = Int8PerToken
    return fresh(x.clone())


def test_layers_that_read_one_tensor_quantize_it_once() -> None:
    scheme, calls = _counting(Int8PerToken)
    layers = _readers(scheme)
    x = torch.randn(4, IN)
    found = [layer(x) for layer in (*layers, *layers)]
    assert len(calls) == 1
    assert all(torch.equal(y, _alone(layer, x)) for y, layer in zip(found, (*layers, *layers), strict=True))
    layers[0](torch.randn(4, IN))
    assert len(calls) == 2


def test_a_changed_tensor_is_quantized_again() -> None:
    scheme, calls = _counting(Int8PerToken)
    (layer,) = _readers(scheme, 1)
    x = torch.randn(4, IN)
    layer(x)
    for number, change in enumerate((lambda: x.mul_(-2), lambda: x[0].fill_(5.0), lambda: x.view(-1)[:3].zero_()), start=2):
        change()
        found = layer(x)
        assert len(calls) == number
        assert torch.equal(found, _alone(layer, x))


def test_another_tensor_at_the_same_address_is_quantized_again() -> None:
    scheme, calls = _counting(Int8PerToken)
    (layer,) = _readers(scheme, 1)
    memory = torch.randn(2, 4, IN)
    for i in range(2):
        view = memory[0]
        if i:
            memory.data[0].copy_(torch.randn(4, IN))  # not counted as a change; but the view is a new tensor
        assert torch.equal(layer(view), _alone(layer, view))
        del view
    assert len(calls) == 2


def test_another_scheme_or_range_is_quantized_again() -> None:
    x = torch.randn(4, IN)
    first, second = make_layer(), make_layer(activation="int4")
    assert not torch.equal(first(x), second(x))
    static, calls = _counting(Int8Static)
    a, b = make_layer(activation="int8_static"), make_layer(activation="int8_static")
    for layer in (a, b):
        layer.activation = static
    a(x), b(x)
    assert len(calls) == 2  # each has a range of its own
    assert b.act_scale is not None
    b.act_scale.mul_(2)
    b(x)
    assert len(calls) == 3


def test_the_shared_activation_keeps_nothing_alive() -> None:
    layer = make_layer()
    x = torch.randn(4, IN)
    layer(x)
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None


# ---- memory of the training step ----


@contextmanager
def _saved() -> Iterator[list[Tensor]]:
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


def _bytes(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_nothing_of_the_weight_is_saved_and_codes_are_saved_once() -> None:
    tokens = 40
    layers = [make_layer(ste="tanh"), make_layer("binary"), make_layer("int4", rule="learned")]
    x = torch.randn(tokens, IN, requires_grad=True)
    with _saved() as tensors:
        outputs = [layer(x) for layer in layers]
    sizes = _bytes(tensors)
    own = {p.untyped_storage().data_ptr() for layer in layers for p in (*layer.parameters(), *layer.buffers())}
    assert not own & set(sizes)
    assert sorted(sizes.values()) == [4 * tokens, tokens * IN]  # scales and int8 codes, for all three layers
    sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]


def test_frozen_weights_save_no_activations() -> None:
    for form in ("linear", "packed"):
        layer = FORMS[form](make_layer())
        layer.weight.requires_grad_(False)
        x = torch.randn(40, IN, requires_grad=True)
        with _saved() as tensors:
            y = layer(x)
        assert not tensors
        y.sum().backward()


@each_form
def test_a_weight_changed_before_backward_is_noticed(form: str) -> None:
    layer = FORMS[form](make_layer(rule="learned"))
    names = [name for name in ("weight", "weight_scale") if name in dict(layer.named_parameters())]
    for name in names:
        y = layer(torch.randn(4, IN, requires_grad=True))
        with torch.no_grad():
            layer.get_parameter(name).add_(1)
        with pytest.raises(RuntimeError, match=r"changed in place between forward and backward.*call backward\(\) before"):
            y.sum().backward()


def test_backward_twice_and_accumulation() -> None:
    layer, x = make_layer(ste="tanh"), torch.randn(4, IN)
    y = layer(x).sum()
    y.backward(retain_graph=True)
    first = layer.weight.grad.clone()  # type: ignore[union-attr]
    y.backward()
    assert torch.equal(layer.weight.grad, 2 * first)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_activation_checkpointing(reentrant: bool, keep: bool) -> None:
    model = nn.Sequential(make_layer(ste="tanh"), nn.GELU(), make_layer("int4", "learned", size=(OUT, IN)))
    x = torch.randn(4, IN, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad for p in (x, *model.parameters())]
    x.grad = None
    model.zero_grad()
    with kept_codes(model) if keep else contextlib.nullcontext():
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip((x, *model.parameters()), expected, strict=True))


# ---- kept codes ----


@pytest.fixture
def quantize_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    original = WeightQuantizer.quantize

    def counting(self: WeightQuantizer, weight: Tensor, scale: Tensor | None = None) -> Quantized:
        calls.append(None)
        return original(self, weight, scale)

    monkeypatch.setattr(WeightQuantizer, "quantize", counting)
    return calls


def test_kept_codes_are_made_once_and_follow_the_weight(quantize_calls: list[None]) -> None:
    model = nn.Sequential(make_layer(), make_layer(size=(OUT, IN)))
    fresh = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(4, IN)
    with kept_codes(model):
        for _ in range(3):
            model(x).sum().backward()
        assert len(quantize_calls) == 2
        optimizer.step()
        found = model(x)
        assert len(quantize_calls) == 4
        model(x)
        assert len(quantize_calls) == 4
        with kept_codes(model):
            model(x)
        model(x)
        assert len(quantize_calls) == 4  # an inner scope does not end the outer one
        model[0].weight = nn.Parameter(model[0].weight.detach().flip(0))
        model(x)
        assert len(quantize_calls) == 5
        model[0].weight = nn.Parameter(model[0].weight.detach().flip(0))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), found)
    for layer in model:
        assert isinstance(layer, BitLinear) and not layer.keep_codes and layer._kept is None


def test_kept_codes_follow_a_learned_scale() -> None:
    model, x = nn.Sequential(make_layer(rule="learned")), torch.randn(4, IN)
    with kept_codes(model):
        first = model(x)
        with torch.no_grad():
            model[0].weight_scale.mul_(2)
        inside = model(x)
    assert torch.equal(inside, model(x)) and not torch.equal(inside, first)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_kept_codes_notice_every_kind_of_optimizer(options: dict[str, bool]) -> None:
    model = nn.Sequential(make_layer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, **options)
    x = torch.randn(4, IN)
    with kept_codes(model):
        model(x).sum().backward()
        optimizer.step()
        assert torch.equal(model(x), copy.deepcopy(model[0]).forward(x.clone()))
        held = model[0].quantized_weight()
    assert torch.equal(held.codes, model[0].quantized_weight().codes)


def test_kept_codes_end_with_an_error() -> None:
    model = nn.Sequential(make_layer())
    with pytest.raises(KeyError), kept_codes(model):
        model(torch.randn(2, IN))
        raise KeyError
    assert model[0]._kept is None and not model[0].keep_codes


def test_inference_mode() -> None:
    with torch.inference_mode():
        layer = make_layer("ternary", "learned", activation="int8_static")
        x = torch.randn(4, IN)
        with kept_codes(nn.Sequential(layer)):
            y = layer(x)
        assert torch.equal(layer(x), y) and torch.equal(PackedBitLinear.from_trained(layer)(x), y)
