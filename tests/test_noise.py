"""Noise on weights: its distribution, the forward it makes, compile, resume; pulling weights to the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_bitnet import QATArguments
from hf_bitnet.noise import NOISES, make_key, mix, normal, uniform
from hf_bitnet.surgery import trained_layers
from tests.layers import IN, OUT, make_layer
from tests.qat import ONE_LAYER, assert_same, losses, make_trainer, quantized, weights


def _key(step: int = 0, layer: int = 0) -> torch.Tensor:
    return torch.tensor(make_key(0, step, layer))


# ---- numbers ----


def test_uniform_numbers() -> None:
    numbers = uniform((400, 500), _key())
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers, 100, 0, 1)
    # 200000 numbers in 100 bins: 2000 +- 45 each
    assert (counts - 2000).abs().max() < 5 * 45
    assert abs(float(torch.corrcoef(torch.stack((numbers[:, :-1].flatten(), numbers[:, 1:].flatten())))[0, 1])) < 0.01


def test_normal_numbers() -> None:
    numbers = normal((400, 500), _key()).double()
    assert abs(float(numbers.mean())) < 0.01
    assert abs(float(numbers.std()) - 1) < 0.01
    assert abs(float((numbers**4).mean()) - 3) < 0.1


def test_keys_are_numbers_of_their_own() -> None:
    keys = {make_key(seed, step, layer) for seed in range(4) for step in range(16) for layer in range(16)}
    assert len(keys) == 4 * 16 * 16
    one, other = uniform((100, 100), _key(0, 0)).flatten(), uniform((100, 100), _key(0, 1)).flatten()
    assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 0.05
    assert mix(12345) == int(mix(torch.tensor(12345)))


def test_torchs_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    normal((8, 8), _key())
    assert torch.equal(torch.get_rng_state(), before)


# ---- the forward ----


def _noisy(kind: str, **amounts: float) -> Any:
    layer = make_layer(weight="ternary", activation="none")
    layer.set_noise(NOISES.get(kind)(**amounts))
    layer.noise_key.fill_(make_key(0, 1, 2))
    return layer


@pytest.mark.parametrize("kind", NOISES.names())
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_a_layer_multiplies_with(kind: str, strength: float) -> None:
    """Read off by feeding the identity."""
    layer = _noisy(kind, rate=0.3, sigma=0.01)
    layer.strength.fill_(strength)
    layer.relaxed = strength < 1
    weight, quantized, key = layer.weight.detach(), layer.quantized_weight(), layer.noise_key
    bias = 0.0 if layer.bias is None else layer.bias.detach()
    used = (layer(torch.eye(IN)).detach() - bias).t()
    if kind == "subset":
        expected = torch.where(uniform((OUT, IN), key) < 0.3, quantized.dequantize(), weight)
        assert 0.1 < float((expected != weight).float().mean()) < 0.5
    elif kind == "uniform":
        moved = weight + (uniform((OUT, IN), key, 1) - 0.5) * quantized.scale
        expected = torch.where(uniform((OUT, IN), key) < 0.3, moved, weight)
    else:
        expected = layer.quantizer.quantize(weight + 0.01 * normal((OUT, IN), key)).dequantize()
        assert not torch.equal(expected, quantized.dequantize())
    torch.testing.assert_close(used, torch.lerp(weight, expected, strength), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NOISES.names())
def test_gradients_reach_the_weight(kind: str) -> None:
    """With the identity estimator the gradient of the noisy product is that of a plain one: dy^T x."""
    layer = _noisy(kind, rate=0.3, sigma=0.01)
    x = torch.randn(5, IN)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(layer.weight.grad, grad.t() @ x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NOISES.names())
def test_none_in_evaluation(kind: str) -> None:
    layer = _noisy(kind, rate=0.3, sigma=0.1)
    x = torch.randn(5, IN)
    noisy, quiet = layer(x), layer.eval()(x)
    assert not torch.equal(noisy, quiet)
    layer.set_noise(None)
    assert torch.equal(layer.train()(x), quiet)
    assert not hasattr(layer, "noise_key")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", NOISES.names())
def test_compiled_without_recompilation(kind: str) -> None:
    torch._dynamo.reset()
    layer, x = _noisy(kind, rate=0.3, sigma=0.01), torch.randn(5, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        layer.noise_key.fill_(make_key(0, step, 0))
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1


# ---- in training ----

NOISY: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "grid_pull": {"every": 2, "factor": 0.5},
}


class _Stop(tf.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


@pytest.mark.parametrize("kind", NOISES.names())
def test_resume_equals_no_stop(kind: str, tmp_path: Path) -> None:
    fields = {**NOISY, "weight_noise": {"kind": kind, "sigma": 0.02}}
    whole = make_trainer(tmp_path / "whole", quantized(model=ONE_LAYER), **fields)
    whole.train()
    stopped = quantized(model=ONE_LAYER)
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "half", stopped, callbacks=[_Stop()], **fields).train()
    assert all(layer.noise is None for _, layer in trained_layers(stopped))
    resumed = make_trainer(tmp_path / "half", quantized(model=ONE_LAYER), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))


def test_checkpointing_sees_the_same_noise(tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        model = quantized(model=ONE_LAYER)
        noise = {"kind": "gaussian", "sigma": 0.05}
        make_trainer(tmp_path, model, activation_checkpointing=on, weight_noise=noise).train()
        results.append(weights(model))
    assert_same(*results)


def test_noise_ends(tmp_path: Path) -> None:
    seen = []

    class Watch(tf.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(trained_layers(kwargs["model"])[0][1].noise is not None)

    fields = {"weight_noise": {"until": 0.5}, "gradient_accumulation_steps": 2}
    make_trainer(tmp_path, quantized(model=ONE_LAYER), callbacks=[Watch()], **fields).train()
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pull_to_the_grid(name: str, tmp_path: Path) -> None:
    """Without a learning rate nothing else moves: after step 2 of 3 half of the way to the grid is gone."""
    model = quantized(name, weight_scale="learned")
    before = {n: (layer.matrix.clone(), layer.quantized_weight().dequantize()) for n, layer in trained_layers(model)}
    make_trainer(tmp_path, model, name, max_steps=3, learning_rate=0.0, grid_pull={"every": 2, "factor": 0.5}).train()
    for layer_name, layer in trained_layers(model):
        weight, value = before[layer_name]
        torch.testing.assert_close(layer.matrix.detach(), torch.lerp(weight, value, 0.5).detach())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"weight_scale": "threshold", "granularity": "channel"}),
        ("llama", {"weight_scale": "learned"}),
        ("llama", {"weight": "binary", "granularity": "channel"}),
        ("llama", {"weight": "int2", "granularity": "group", "group_size": 8}),
        ("llama", {"weight": "int4", "granularity": "channel"}),
    ],
)
def test_a_pull_leaves_codes_and_scales(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Without a learning rate nothing else moves: weights come closer to the grid, their codes and scales stay."""
    model = quantized(name, **fields)
    before = {n: (layer.matrix.clone(), layer.quantized_weight()) for n, layer in trained_layers(model)}
    make_trainer(tmp_path, model, name, max_steps=5, learning_rate=0.0, grid_pull={"every": 1, "factor": 0.5}).train()
    for layer_name, layer in trained_layers(model):
        (weight, quantized_before), now = before[layer_name], layer.quantized_weight()
        assert (now.codes != quantized_before.codes).float().mean() <= (0.01 if fields.get("weight") == "binary" else 0.0)
        torch.testing.assert_close(now.scale, quantized_before.scale)
        value = layer.quantizer.latent(quantized_before)
        assert torch.dist(layer.matrix, value) < 0.1 * torch.dist(weight, value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight_noise": {"kind": "gausian"}}, "weight_noise: unknown weight noise 'gausian'.* Did you mean 'gaussian'"),
        ({"weight_noise": {"rate": 50}}, "weight_noise: rate=50 is out of range; legal: from 0 to 1; it is a share"),
        ({"weight_noise": {"sigma": -1.0}}, "weight_noise: sigma=-1.0 is out of range"),
        ({"grid_pull": {"every": 0}}, "grid_pull: every must be a whole number of at least 1, got 0"),
        ({"grid_pull": {"every": 5, "factor": 2.0}}, "grid_pull: factor=2.0 is out of range"),
        ({"online_calibration": {"every": 1.5}}, "online_calibration: every must be a whole number"),
        ({"online_calibration": {"method": "max"}}, "online_calibration: unknown calibration method 'max'"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        QATArguments(output_dir=str(tmp_path), **fields)
