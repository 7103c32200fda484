"""Changing a model in place: quantize, pack, unpack, dequantize, and moving the strength. Own.

The only code that replaces modules. Every function takes any nn.Module, changes it in place and returns it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..config import BitNetQuantizationConfig, LayerConfig
from ..modules import (
    BitConv1D,
    BitLinear,
    LayerSpec,
    NativeLayer,
    PackedBitLinear,
    QuantizedLayer,
    SubNorm,
    TrainedLayer,
)
from ..quantizers import ACTIVATION_SCHEMES
from ..relaxations import RELAXATIONS
from ..ste import ESTIMATORS
from .attached import attach, config_of, copied, detach
from .coverage import check_finite, coverage, float_dtype
from .places import Places
from .select import Choice, choose

Model = TypeVar("Model", bound=nn.Module)
# below this many layers a progress bar only flickers
_PROGRESS_FROM = 64


def make_spec(layer: LayerConfig, config: BitNetQuantizationConfig) -> LayerSpec:
    """Turns plain data into the objects a layer works with."""
    return LayerSpec(
        weight=layer.quantizer(),
        activation=ACTIVATION_SCHEMES.get(layer.activation),
        ste=ESTIMATORS.get(layer.ste),
        threshold=config.ste_threshold,
        temperature=config.ste_temperature,
        relaxation=RELAXATIONS.get(config.relaxation),
        sub_norm=layer.sub_norm,
        sub_norm_eps=config.sub_norm_eps,
    )


def quantize_model(model: Model, config: BitNetQuantizationConfig, *, progress: bool | None = None) -> Model:
    """Replaces the linear layers of `model` by quantized ones, in place, and returns it.

    Args:
        model: any nn.Module; a transformers model also gets `model.config.quantization_config`. `coverage(model)` prints
            what was quantized and what was kept and why.
        config: which layers and how. With form="packed" the weights are packed at once.
        progress: show a progress bar; None shows one on large models.

    Raises:
        TypeError: `config` is not a BitNetQuantizationConfig.
        ValueError: already quantized; no layer matches; coverage below `config.min_coverage`; a weight that is empty, all
            zero or not finite; a group size that does not divide a layer; form="packed" with static activations, which must
            be calibrated first; a model that is itself a linear layer. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model takes an nn.Module, got {type(model).__name__}; pass the loaded model itself")
    if not isinstance(config, BitNetQuantizationConfig):
        raise TypeError(
            f"quantize_model takes a BitNetQuantizationConfig, got {type(config).__name__}; "
            "for example quantize_model(model, BitNetQuantizationConfig.bitnet_b158())"
        )
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError(
            "the model is quantized already; call hf_bitnet.dequantize_model(model) first, or load the original checkpoint"
        )
    chosen = chosen_layers(model, config)
    for choice in _with_progress(chosen, "checking", progress):
        check_layer(choice, model, config)
    check_coverage(model, chosen, config)
    swap_layers(model, _with_progress(chosen, "quantizing", progress), config)
    attach(model, config)
    return model


def swap_layers(model: nn.Module, chosen: Iterable[Choice], config: BitNetQuantizationConfig) -> None:
    """Puts the quantized layer of the config's form in the place of each chosen one."""
    places = Places(model)
    for choice in chosen:
        layer = _trained_layer(choice, config)
        places.put(choice.module, PackedBitLinear.from_trained(layer) if config.form == "packed" else layer)


def chosen_layers(model: nn.Module, config: BitNetQuantizationConfig) -> list[Choice]:
    """The layers that the config quantizes. Raises ValueError when there is none."""
    found = choose(model, config)
    chosen = [choice for choice in found if choice.kept is None]
    if not chosen:
        kept = "; ".join(f"{choice.name}: {choice.kept}" for choice in found[:5]) or "it has no linear layer at all"
        raise ValueError(
            f"no layer of {type(model).__name__} would be quantized ({kept}); loosen `keep`, or name layers in "
            "`overrides`, for example overrides={r'classifier': {'weight': 'int8'}}"
        )
    return chosen


def check_layer(choice: Choice, model: nn.Module, config: BitNetQuantizationConfig) -> None:
    """Raises ValueError when a chosen layer cannot be quantized as the config says."""
    if choice.module is model:
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; wrap it: "
            "quantize_model(nn.Sequential(layer), config)"
        )
    weight = choice.module._parameters["weight"]
    assert weight is not None
    check_finite(choice.name, weight)
    if config.form == "packed" and ACTIVATION_SCHEMES.get(config.layer(choice.name).activation).static and not weight.is_meta:
        raise ValueError(
            f"{choice.name}: form='packed' needs a calibrated activation range, and there is none yet; use form='train', "
            "call hf_bitnet.calibrate(model, batches), then pack_model(model)"
        )
    out_features, in_features = reversed(weight.shape) if isinstance(choice.module, Conv1D) else weight.shape
    try:
        config.layer(choice.name).quantizer().scale_shape(out_features, in_features)
    except ValueError as error:
        raise ValueError(
            f"{choice.name}: {error}, or give this layer its own: overrides={{r'{choice.name}': {{...}}}}"
        ) from None


def check_coverage(model: nn.Module, chosen: list[Choice], config: BitNetQuantizationConfig) -> None:
    """Raises ValueError when the chosen layers are less than the config's `min_coverage`."""
    linear = sum(row.weights for row in coverage(model).rows if row.linear)
    share = sum(choice.module._parameters["weight"].numel() for choice in chosen) / max(linear, 1)  # type: ignore[union-attr]
    if share < config.min_coverage:
        kept = [f"{c.name} ({c.kept})" for c in choose(model, config) if c.kept is not None]
        raise ValueError(
            f"only {share:.1%} of the linear weights would be quantized, min_coverage asks for {config.min_coverage:.1%}; "
            f"kept: {', '.join(kept[:8])}. Name them in `overrides` to quantize them, or lower min_coverage"
        )


def _trained_layer(choice: Choice, config: BitNetQuantizationConfig) -> BitLinear | BitConv1D:
    spec = make_spec(config.layer(choice.name), config)
    if isinstance(choice.module, Conv1D):
        return BitConv1D.from_float(choice.module, spec)
    assert isinstance(choice.module, nn.Linear)
    return BitLinear.from_float(choice.module, spec)


def convert_native(model: Model) -> Model:
    """Turns the layers of a model from `load_native` into ordinary ones, in place, and returns it.

    Packed layers become PackedBitLinear, trainable ones BitLinear: equal codes, scales and biases. Activations are then
    quantized in float32 whatever the dtype, so logits may differ in the last digits. `pack_model`, `unpack_model` and
    `dequantize_model` do the same on their way.

    Raises ValueError when the model has no such layer.
    """
    layers, places = _layers(model, NativeLayer, "convert_native", "hf_bitnet.load_native(path)"), Places(model)
    for _, layer in layers:
        places.put(layer, layer.converted())
    attach(model, config_of(model))
    return model


def pack_model(model: Model, *, progress: bool | None = None) -> Model:
    """Packs the weights of a trained-form model to 1, 2, 4 or 8 bits, in place, and returns it.

    Raises ValueError when nothing is in train form, when a weight is not finite, or when a static activation range was
    never calibrated.
    """
    layers = _layers(model, TrainedLayer, "pack_model", "quantize_model(model, config)")
    config = config_of(model)
    for name, layer in layers:
        check_finite(name, layer.weight)
        check_calibrated(name, layer)
    places = Places(model)
    for _, layer in _with_progress(layers, "packing", progress):
        places.put(layer, PackedBitLinear.from_trained(layer))
    attach(model, config, form="packed")
    return model


def unpack_model(model: Model, *, weight_scale: str | None = None) -> Model:
    """Turns a packed model back into train form, in place, and returns it: equal codes, equal scales up to rounding.

    The float weights are the dequantized values, rescaled so that the scheme's own rule finds the stored scale again.

    Args:
        weight_scale: "learned" keeps the stored scales as parameters instead; exact for every scheme.

    Raises ValueError when the model is not packed, has no config, or when the rule cannot reproduce the codes.
    """
    layers = _layers(model, PackedBitLinear, "unpack_model", "pack_model(model)")
    config = config_of(model)
    if weight_scale is not None:
        overrides = {
            pattern: {**change, "weight_scale": weight_scale} if isinstance(change, dict) else change
            for pattern, change in config.overrides.items()
        }
        config = copied(config, weight_scale=weight_scale, overrides=overrides)
    dtype = float_dtype(model)
    made: list[tuple[PackedBitLinear, TrainedLayer]] = []
    for name, packed in layers:
        spec = make_spec(config.layer(name), config)
        spec = replace(spec, sub_norm=False)
        made.append((packed, _unpacked(name, packed, spec, dtype)))
    places = Places(model)
    for packed, layer in made:
        places.put(packed, layer)
    attach(model, config, form="train")
    return model


def _unpacked(name: str, packed: PackedBitLinear, spec: LayerSpec, dtype: torch.dtype) -> TrainedLayer:
    quantized = packed.quantized_weight()
    try:
        weight = spec.weight.latent(quantized).to(dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not torch.equal(spec.weight.quantize(weight, quantized.scale if spec.weight.learned else None).codes, quantized.codes):
        raise ValueError(f"{name}: {dtype} is too coarse for weights that give these codes; call model.float() first")
    dense = _dense(packed, weight)
    layer = BitConv1D.from_float(dense, spec) if isinstance(dense, Conv1D) else BitLinear.from_float(dense, spec)
    layer.act_scale, layer.sub_norm = packed.act_scale, packed.sub_norm
    if layer.weight_scale is not None:
        layer.weight_scale.data.copy_(quantized.scale)
    return layer


def dequantize_model(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Turns quantized layers into plain nn.Linear (or Conv1D) that hold the quantized values, in place, and returns it.

    Activations are no longer quantized; sub-norms stay where they were, inside an nn.Sequential.

    Args:
        dtype: of the new weights; None takes the model's own.
    """
    layers = _layers(model, QuantizedLayer, "dequantize_model", "quantize_model(model, config)")
    dtype, places = dtype or float_dtype(model), Places(model)
    for _, layer in layers:
        dense = _dense(layer, layer.quantized_weight().dequantize(dtype))
        places.put(layer, dense if layer.sub_norm is None else nn.Sequential(layer.sub_norm, dense))
    detach(model)
    return model


def _dense(layer: QuantizedLayer, value: torch.Tensor) -> nn.Linear | Conv1D:
    """The plain layer that `layer` stands for, holding `value` (out_features, in_features) as its weight."""
    if isinstance(layer, BitConv1D) or (isinstance(layer, PackedBitLinear) and layer.was_conv1d):
        with torch.device("meta"):
            dense = Conv1D(layer.out_features, layer.in_features)
        dense.weight = nn.Parameter(value.t().contiguous())
        assert isinstance(layer.plain_bias, nn.Parameter)
        dense.bias = layer.plain_bias
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(value)
        bias = layer.plain_bias
        assert bias is None or isinstance(bias, nn.Parameter)
        dense.register_parameter("bias", bias)
    dense.train(layer.training)
    return dense


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(dotted name, layer) of every quantized layer, each once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def trained_layers(model: nn.Module) -> list[tuple[str, TrainedLayer]]:
    """(dotted name, layer) of every layer in train form."""
    return [(name, layer) for name, layer in quantized_layers(model) if isinstance(layer, TrainedLayer)]


def set_strength(model: nn.Module, strength: float, *, hard: bool = True) -> None:
    """Sets how far the layers are quantized: 0 is the full-precision model, bit for bit; 1 the quantized one.

    Below 1 the layers work on float mixes. At 1 they return to the integer step, which under torch.compile is one
    recompilation; `hard=False` stays on the float path (same values) and never recompiles.

    Raises ValueError when the strength is outside 0..1 or the model has no layer in train form.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be a number from 0 (full precision) to 1 (quantized), got {strength!r}")
    for _, layer in _layers(model, TrainedLayer, "set_strength", "quantize_model(model, config)"):
        layer.strength.fill_(strength)
        layer.relaxed = strength < 1.0 or (layer.relaxed and not hard)


def harden(model: nn.Module) -> None:
    """Back to the integer step at full strength; the same as `set_strength(model, 1.0)`."""
    set_strength(model, 1.0)


def set_norm_blend(model: nn.Module, blend: float) -> None:
    """Moves every sub-norm from the identity (0) to a plain RMS norm (1)."""
    if isinstance(blend, bool) or not isinstance(blend, int | float) or not 0.0 <= blend <= 1.0:
        raise ValueError(f"blend must be a number from 0 (identity) to 1 (RMS norm), got {blend!r}")
    for module in model.modules():
        if isinstance(module, SubNorm):
            module.blend.fill_(blend)


@contextlib.contextmanager
def kept_codes(model: nn.Module) -> Iterator[None]:
    """Inside, each layer makes its codes once and keeps them (one byte a weight) while its weight's version lasts.

    For several forwards with unchanged weights: gradient accumulation, activation checkpointing, evaluation. The codes are
    dropped at every step of any torch optimizer (the fused ones change weights without raising their version). Weights
    must not be changed inside in other ways that autograd does not count (`parameter.data.copy_`).
    """
    # layers of an outer kept_codes are left to it
    layers = [layer for _, layer in trained_layers(model) if not layer.keep_codes]

    def drop(*_: Any) -> None:
        for layer in layers:
            layer.drop_codes()

    for layer in layers:
        layer.keep_codes = True
    hook = register_optimizer_step_post_hook(drop)
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            layer.keep_codes = False
        drop()


def reset_state(model: nn.Module) -> None:
    """Puts the unsaved buffers (strength, fixed temperatures) of all layers to their starting values."""
    for _, layer in trained_layers(model):
        layer.strength.fill_(1.0)
        if not isinstance(layer.ste_temperature, nn.Parameter):
            layer.ste_temperature.fill_(layer.spec.temperature)
        layer.relaxed = False


def _layers(model: nn.Module, kind: type[Any], caller: str, advice: str) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes an nn.Module, got {type(model).__name__}; pass the quantized model itself")
    layers = [(name, layer) for name, layer in quantized_layers(model) if isinstance(layer, kind)]
    if not layers and kind is TrainedLayer and next(quantized_layers(model), None) is not None:
        raise ValueError(f"{caller}: the model is packed; call hf_bitnet.unpack_model(model) first")
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no {kind.__name__} layer; call {advice} first")
    return layers


def check_calibrated(name: str, layer: QuantizedLayer) -> None:
    """Raises ValueError when the layer has a static activation range that is not known yet."""
    if layer.act_scale is not None and not layer.act_scale.is_meta and float(layer.act_scale) <= 0:
        raise ValueError(
            f"{name} has a static activation range that was never calibrated; call "
            "hf_bitnet.calibrate(model, batches) before training or packing"
        )


def _with_progress(items: list[Any], what: str, progress: bool | None) -> Iterable[Any]:
    show = len(items) >= _PROGRESS_FROM if progress is None else progress
    return tqdm(items, desc=what, unit="layer", disable=not show, leave=False)
