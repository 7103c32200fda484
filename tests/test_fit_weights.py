"""fit_weights: the walk through models of every family, what it leaves behind, and wrong inputs."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ElementTree
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.calibration import FitRow
from hf_bitnet.calibration.fitting import _without_cache
from hf_bitnet.calibration.moments import Moments
from hf_bitnet.calibration.walk import Stage, Walk
from hf_bitnet.surgery import probing, run, trained_layers
from tests.tiny import tiny
from tests.trained import batch, trained_llama


def ternary(**fields: Any) -> hb.BitNetQuantizationConfig:
    return hb.BitNetQuantizationConfig(**{"weight": "ternary", **fields})


def quantized_llama(**fields: Any) -> Any:
    return hb.quantize_model(trained_llama(), ternary(**fields))


def is_better(row: FitRow) -> bool:
    assert row.error is not None and row.rounding_error is not None
    return row.error < row.rounding_error


def loss(model: nn.Module, seed: int = 9) -> float:
    with torch.no_grad():
        return float(model(**batch(seed=seed)).loss)


def read_by(model: nn.Module, layer: nn.Module, batches: list[Any]) -> list[Tensor]:
    """What a layer reads while the whole model runs, float32 (tokens, K), a tensor a call."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input"]).detach()), with_kwargs=True
    )
    for one in batches:
        run(model, one)
    hook.remove()
    return [x.reshape(-1, x.shape[-1]).float() for x in seen]


# ---- the walk ----


def test_moments_are_those_of_the_whole_model(family: str) -> None:
    # every stage of every block against a run of the whole model as it is at that moment, and against a float twin
    model, first = tiny(family)
    second = tiny(family)[1] if family not in ("vit", "whisper") else first
    batches = [first, second]
    # other tokens come to an expert once its router reads quantized states: these are no two readings of one place
    hb.quantize_model(model, ternary(granularity="channel", keep=["experts"]))
    twin = copy.deepcopy(model)
    stages = 0

    def check(stage: Stage, moments: Moments) -> None:
        nonlocal stages
        stages += 1
        for name, layer in stage.items():
            x_hat = read_by(model, layer, batches)
            with probing(twin, quantized=False):
                x = read_by(twin, twin.get_submodule(name), batches)
            hats = [layer.activation.quantize(each).dequantize() for each in x_hat]
            hessian = torch.stack([each.t() @ each for each in hats]).sum(0)
            cross = torch.stack([a.t() @ b for a, b in zip(x, hats, strict=True)]).sum(0)
            output = torch.stack([(a @ layer.matrix.t()).square().sum() for a in x]).sum()
            assert torch.allclose(moments.hessian, hessian, rtol=1e-3, atol=1e-3 * float(hessian.abs().max()))
            assert torch.allclose(moments.cross, cross, rtol=1e-3, atol=1e-3 * float(cross.abs().max()))
            assert torch.allclose(moments.outputs[name], output, rtol=1e-3)
        for layer in stage.values():
            layer.bypassed = False

    with probing(model, quantized=False), _without_cache(model), torch.no_grad():
        walk = Walk(model, dict(trained_layers(model)), batches, activations=True)
        walk.masks = [(None, None)] * len(batches)
        walk.trace()
        walk.fit(check)
    assert walk.chains and not any(chain.broken for chain in walk.chains)
    assert stages < len(walk.layers) or family == "gpt2", "q, k and v read one tensor"


class Odd(nn.Module):
    """Blocks between which something happens, one that is called twice, and a layer outside."""

    def __init__(self, between: bool, twice: bool) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.between, self.twice = between, twice
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(block(x)) if self.twice else block(x)
            x = x + 0.1 if self.between else x
        return self.last(x)


@pytest.mark.parametrize(("between", "twice"), [(True, False), (False, True), (False, False)])
def test_models_without_a_chain_are_run_as_a_whole(between: bool, twice: bool) -> None:
    model = Odd(between, twice)
    batches = [torch.randn(40, 12) for _ in range(4)]
    with torch.no_grad():
        wanted = [model(x) for x in batches]
    hb.quantize_model(model, ternary(granularity="channel"))
    with torch.no_grad():
        rounded = sum(float((model(x) - y).square().sum()) for x, y in zip(batches, wanted, strict=True))
    report = hb.fit_weights(model, batches)
    with torch.no_grad():
        fitted = sum(float((model(x) - y).square().sum()) for x, y in zip(batches, wanted, strict=True))
    assert {row.name for row in report} == {"first", "last", *(f"blocks.{i}.0" for i in range(3))}
    assert fitted < 0.5 * rounded
    with probing(model, quantized=False), torch.no_grad():
        walk = Walk(model, dict(trained_layers(model)), batches, True)
        walk.trace()
        assert walk.chains[0].broken == (between or twice)


# ---- what comes out ----


# every scheme once and every granularity in the fast tests, the rest of the product in the slow ones
GRIDS: list[tuple[str, dict[str, Any]]] = list(
    product(
        ("binary", "ternary", "int2", "int2_seq", "int4"),
        ({"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 16}),
    )
)


@pytest.mark.parametrize(
    ("weight", "fields"),
    [pytest.param(*each, marks=[] if i % 3 == i // 3 % 3 else pytest.mark.slow) for i, each in enumerate(GRIDS)],
    ids=str,
)
def test_the_fit_beats_rounding_on_unseen_text(weight: str, fields: dict[str, Any]) -> None:
    model = hb.quantize_model(trained_llama(), hb.BitNetQuantizationConfig(weight=weight, **fields))
    rounded, full = loss(model), loss(trained_llama())
    report = hb.fit_weights(model, [batch(seed=s) for s in range(2, 6)])
    assert loss(model) - full < 0.8 * (rounded - full) + 0.01
    for row in report:
        assert row.error is not None and row.rounding_error is not None
        assert row.error <= row.rounding_error and 0 <= row.changed <= 1
    assert sum(row.note == "" for row in report) >= len(report) - 2


def test_method_without_text_and_with_it() -> None:
    plain, weighted = quantized_llama(), quantized_llama()
    rounded = loss(plain)
    report = hb.fit_weights(plain, method="least_squares")
    hb.fit_weights(weighted, [batch(seed=2)], method="least_squares")
    assert loss(plain) < rounded and loss(weighted) < rounded and loss(plain) != loss(weighted)
    assert all(row.error is None and row.changed > 0 for row in report)


@pytest.mark.parametrize(
    "scale", ["least_squares", "learned", *(pytest.param(each, marks=pytest.mark.slow) for each in ("absmean", "threshold"))]
)
def test_training_starts_from_exactly_what_was_found(scale: str, tmp_path: Any) -> None:
    model = quantized_llama(weight_scale=scale)
    hb.fit_weights(model, [batch(seed=2)])
    codes = {name: layer.quantized_weight() for name, layer in trained_layers(model)}
    before = loss(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch(seed=3)["input_ids"]]
    args = hb.QATArguments(output_dir=str(tmp_path), max_steps=1, learning_rate=0.0, use_cpu=True, report_to=[])
    hb.QATTrainer(model=model, args=args, train_dataset=rows).train()
    for name, layer in trained_layers(model):
        assert torch.equal(layer.quantized_weight().codes, codes[name].codes)
        assert torch.equal(layer.quantized_weight().scale, codes[name].scale)
        assert layer.weight.requires_grad and layer.weight.grad_fn is None
    assert loss(model.cpu().eval()) == before
    packed = hb.pack_model(model)
    assert loss(packed) == pytest.approx(before, rel=1e-5)


def test_same_batches_same_result_and_nothing_else_changes() -> None:
    model, again = quantized_llama(), quantized_llama()
    model.train()
    model.config.use_cache = True
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "proj" not in name}
    random = torch.get_rng_state()
    hb.fit_weights(model, [batch(seed=2)])
    hb.fit_weights(again, [batch(seed=2)])
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
    assert model.training and model.config.use_cache is True and torch.equal(torch.get_rng_state(), random)
    assert not any(layer.bypassed or layer._forward_pre_hooks for _, layer in trained_layers(model))


def test_padding_does_not_count() -> None:
    ids = batch(8, seed=2)["input_ids"]
    padded = torch.cat([ids, torch.zeros(8, 20, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(8, 20, dtype=torch.long)], dim=1)
    one, other = quantized_llama(), quantized_llama()
    first = hb.fit_weights(one, [{"input_ids": ids}])
    second = hb.fit_weights(other, [{"input_ids": padded, "attention_mask": mask}])
    for a, b in zip(first, second, strict=True):
        assert a.error == pytest.approx(b.error, rel=0.02)
    assert loss(one) == pytest.approx(loss(other), rel=0.05)


def test_inputs_that_are_always_zero_and_one_batch_of_one_token() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    hb.quantize_model(model, ternary(granularity="channel"))
    x = torch.randn(1, 24)
    x[:, 3:9] = 0
    report = hb.fit_weights(model, [x])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(is_better(row) for row in report)
    silent = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    hb.quantize_model(silent, ternary())
    assert hb.fit_weights(silent, [torch.zeros(5, 24)])[0].error is None


def test_bfloat16_models() -> None:
    model = hb.quantize_model(trained_llama().bfloat16(), ternary())
    rounded = loss(model)
    report = hb.fit_weights(model, [batch(seed=s) for s in range(2, 6)])
    assert all(layer.weight.dtype == torch.bfloat16 for _, layer in trained_layers(model))
    assert loss(model) < rounded and all(row.note == "" for row in report)


def test_frozen_weights_below_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model = quantized_llama()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    rounded = loss(wrapped)
    hb.fit_weights(wrapped, [batch(seed=s) for s in range(2, 6)])
    assert loss(wrapped) < rounded
    assert not any(p.requires_grad for name, p in wrapped.named_parameters() if "base_layer" in name)


def test_layers_that_share_a_weight_and_wide_ones_are_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    overrides = {r"^[012]$": {"weight": "ternary"}, r"^3$": {"weight": "int8"}}
    hb.quantize_model(model, ternary(overrides=overrides))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    notes = {row.name: row.note for row in hb.fit_weights(model, [torch.randn(50, 8)])}
    assert notes == {"0": "shares its weight", "1": "shares its weight", "2": "", "3": "8 bits lose nothing"}
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == ["2.weight"]


def test_an_output_head_tied_to_the_embeddings_is_left() -> None:
    model, inputs = tiny("qwen3")
    hb.quantize_model(model, ternary(overrides={"lm_head": {"weight": "int4"}}))
    table = model.get_input_embeddings().weight.detach().clone()
    notes = {row.name: row.note for row in hb.fit_weights(model, [inputs])}
    assert notes.pop("lm_head") == "shares its weight" and set(notes.values()) == {""}
    assert torch.equal(model.get_input_embeddings().weight, table)


def test_one_layer_in_two_places_is_fitted_for_both() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    hb.quantize_model(model, ternary(granularity="channel"))
    report = hb.fit_weights(model, [torch.randn(200, 16)])
    assert [row.name for row in report] == ["0"] and is_better(report[0])


def test_static_ranges_and_sub_norms() -> None:
    model = hb.quantize_model(trained_llama(), ternary(activation="int8_static", sub_norm=[r"o_proj"]))
    with pytest.raises(ValueError, match=r"never calibrated; call hf_bitnet.calibrate"):
        hb.fit_weights(model, [batch(seed=2)])
    hb.calibrate(model, [batch(seed=2)])
    rounded = loss(model)
    hb.fit_weights(model, [batch(seed=s) for s in range(2, 6)])
    assert loss(model) < rounded


def test_report_prints_and_draws() -> None:
    report = hb.fit_weights(quantized_llama(), [batch(seed=2)])
    assert "codes changed" in str(report) and "fitted" in report.summary()
    ElementTree.fromstring(report.to_svg())
    assert report.to_dict()["layers"][0]["error"] == report[0].error


# ---- errors ----


def test_wrong_inputs() -> None:
    model = quantized_llama()
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "unknown fit method 'gtpq'.*Did you mean 'gptq'", {"batches": [batch()], "method": "gtpq"}),
        (ValueError, "method='gptq' needs inputs.*method='least_squares'", {}),
        (TypeError, r"takes a collection of batches.*fit_weights\(model, \[batch\]\)", {"batches": batch()}),
        (ValueError, "got no batch", {"batches": []}),
        (
            TypeError,
            "takes batches of tensors, and got the text 'some words'; for example fit_weights",
            {"batches": ["some words"]},
        ),
        (TypeError, "and got the text", {"batches": [["some words", "and more"]]}),
        (ValueError, "damping must be a number above 0", {"batches": [batch()], "damping": 0}),
        (ValueError, "sweeps must be a whole number", {"batches": [batch()], "sweeps": 1.5}),
        (TypeError, "activations must be True or False", {"batches": [batch()], "activations": "int8"}),
    ]
    before = loss(model)
    for kind, words, arguments in cases:
        with pytest.raises(kind, match=words):
            hb.fit_weights(model, **arguments)
    assert loss(model) == before


def test_models_that_cannot_be_fitted() -> None:
    with pytest.raises(TypeError, match=r"fit_weights takes an nn.Module, got str; pass the quantized model itself"):
        hb.fit_weights("model", batches=None, method="least_squares")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer in train form; call quantize_model"):
        hb.fit_weights(trained_llama(), [batch()])
    with pytest.raises(ValueError, match=r"packed.*fit before pack_model"):
        hb.fit_weights(hb.pack_model(quantized_llama()), [batch()])


def test_nan_in_a_batch_changes_nothing() -> None:
    model = hb.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), ternary())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the input of 0 is NaN or infinite in batch 2"):
        hb.fit_weights(model, [torch.randn(5, 8), torch.full((5, 8), torch.nan)])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_no_batch_reaches_are_named() -> None:
    model = hb.quantize_model(Unreached(), ternary())
    with pytest.raises(ValueError, match=r"no batch reached expert; pass batches.*keep=\[r'expert'\]"):
        hb.fit_weights(model, [torch.randn(5, 8)])


def test_the_teacher_has_to_be_made_before() -> None:
    model = quantized_llama()
    hb.fit_weights(model, method="least_squares")
    with pytest.raises(ValueError, match=r"fit_weights has changed the float weights.*make the teacher first"):
        hb.QATTrainer(model=model, args=hb.QATArguments(output_dir="unused", use_cpu=True), teacher="self")
