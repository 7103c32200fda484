"""Changing a model in place: quantize, pack, unpack, dequantize. Own.

The only code that replaces modules. Every function takes any nn.Module, changes it in place and returns it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..config import BitNetQuantizationConfig, LayerConfig
from ..modules import (
    BitConv1D,
    BitEmbedding,
    BitExperts,
    BitLinear,
    LayerSpec,
    NativeLayer,
    PackedBitLinear,
    PackedEmbedding,
    QuantizedEmbedding,
    QuantizedLayer,
    TrainedLayer,
    plain_embedding,
)
from ..modules.faster_stack import forget
from ..modules.packed_experts import Together
from ..quantizers import ACTIVATION_SCHEMES, WeightQuantizer
from ..relaxations import RELAXATIONS
from ..ste import ESTIMATORS
from .adapters import has_adapters, own_names
from .attached import attach, config_of, copied, detach, listed_name
from .coverage import check_finite, coverage, float_dtype
from .experts import fuse_experts, layers_of_experts, separate_experts
from .places import Places, check_inside
from .select import Choice, check_tables, choose, choose_tables, idle_patterns, is_linear
from .vocabulary import head_layers, table_spec, ties_kept
from .walk import layers_of, quantized_tables

logger = logging.getLogger(__name__)
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
        ValueError: already quantized; with adapters; no layer matches; coverage below `config.min_coverage`; a weight that is
            empty, all zero or not finite; a group size that does not divide a layer; form="packed" with static activations,
            which must be calibrated first; a model that is itself a linear layer. The model is then unchanged.
    """
    check_quantizable(model, config)
    with separate_experts(model):
        chosen = chosen_layers(model, config)
        name_idle_patterns(model, config)
        for choice in _with_progress(chosen, "checking", progress):
            check_layer(choice, model, config)
        check_coverage(model, chosen, config)
        with ties_kept(model):
            swap_layers(model, _with_progress(chosen, "quantizing", progress), config)
    attach(model, config)
    return model


def check_quantizable(model: nn.Module, config: BitNetQuantizationConfig, *, layers: bool = False) -> None:
    """Raises what `quantize_model` would raise, and changes nothing.

    Args:
        layers: also of the single layers and their weights, all of which are read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model takes an nn.Module, got {type(model).__name__}; pass the loaded model itself")
    if not isinstance(config, BitNetQuantizationConfig):
        raise TypeError(
            f"quantize_model takes a BitNetQuantizationConfig, got {type(config).__name__}; "
            "for example quantize_model(model, BitNetQuantizationConfig.bitnet_b158())"
        )
    if any(isinstance(module, QuantizedLayer | QuantizedEmbedding) for module in model.modules()):
        raise ValueError(
            "the model is quantized already; call hf_bitnet.dequantize_model(model) first, or load the original checkpoint"
        )
    if has_adapters(model):
        raise ValueError(
            "the model has adapters of peft, which are not to be quantized; first quantize_model(model, config), then "
            "get_peft_model(model, ...); or merge them before (merge_and_unload of the peft model)"
        )
    if layers:
        with separate_experts(model):
            chosen = chosen_layers(model, config)
            for choice in chosen:
                check_layer(choice, model, config)
            check_coverage(model, chosen, config)


def swap_layers(model: nn.Module, chosen: Iterable[Choice], config: BitNetQuantizationConfig) -> None:
    """Puts the quantized layer of the config's form in the place of each chosen one."""
    places = Places(model)
    for choice in chosen:
        layer = _trained_layer(choice, config)
        places.put(choice.module, _packed(layer) if config.form == "packed" else layer)


def _packed(layer: TrainedLayer | BitEmbedding) -> PackedBitLinear | PackedEmbedding:
    return PackedEmbedding.from_trained(layer) if isinstance(layer, BitEmbedding) else PackedBitLinear.from_trained(layer)


def chosen_layers(model: nn.Module, config: BitNetQuantizationConfig) -> list[Choice]:
    """The layers that the config quantizes, tables of embeddings among them. Raises ValueError when there is none."""
    check_tables(model, config)
    found = choose(model, config)
    chosen = choose_tables(model, config) + [choice for choice in found if choice.kept is None]
    if not chosen:
        kept = "; ".join(f"{choice.name}: {choice.kept}" for choice in found[:5]) or "it has no linear layer at all"
        raise ValueError(
            f"no layer of {type(model).__name__} would be quantized ({kept}); loosen `keep`, or name layers in "
            "`overrides`, for example overrides={r'classifier': {'weight': 'int8'}}"
        )
    return chosen


def name_idle_patterns(model: nn.Module, config: BitNetQuantizationConfig) -> None:
    """Warns of patterns of the config that are the name of no layer."""
    if idle := idle_patterns(config, (choice.name for choice in choose(model, config))):
        experts = min(layers_of_experts(model), default=None)
        hint = "" if experts is None else f"; maps of experts have names like {experts}"
        logger.warning(
            "no linear layer of %s is called by the pattern %s%s", type(model).__name__, ", ".join(map(repr, idle)), hint
        )


def check_layer(choice: Choice, model: nn.Module, config: BitNetQuantizationConfig) -> None:
    """Raises ValueError when a chosen layer cannot be quantized as the config says."""
    check_inside(choice.module, model)
    weight = choice.module._parameters["weight"]
    assert weight is not None
    check_finite(choice.name, weight)
    if config.form == "packed" and ACTIVATION_SCHEMES.get(choice.layer.activation).static and not weight.is_meta:
        raise ValueError(
            f"{choice.name}: form='packed' needs a calibrated activation range, and there is none yet; use form='train', "
            "call hf_bitnet.calibrate(model, batches), then pack_model(model)"
        )
    out_features, in_features = reversed(weight.shape) if isinstance(choice.module, Conv1D) else weight.shape
    try:
        choice.layer.quantizer().scale_shape(out_features, in_features)
    except ValueError as error:
        own = f", or give this layer its own: overrides={{r'{choice.name}': {{...}}}}"
        raise ValueError(f"{choice.name}: {error}{own if choice.layer == config.layer(choice.name) else ''}") from None


def check_coverage(model: nn.Module, chosen: list[Choice], config: BitNetQuantizationConfig) -> None:
    """Raises ValueError when the chosen layers are less than the config's `min_coverage`."""
    linear = sum(row.weights for row in coverage(model).rows if row.linear)
    tables = {id(choice.module.weight) for choice in chosen if not is_linear(choice.module)}  # tied heads are counted there
    weights = [c.module.get_parameter("weight") for c in chosen if is_linear(c.module)]
    share = sum(weight.numel() for weight in weights if id(weight) not in tables) / max(linear, 1)
    if share < config.min_coverage:
        kept = [f"{c.name} ({c.kept})" for c in choose(model, config) if c.kept is not None]
        raise ValueError(
            f"only {share:.1%} of the linear weights would be quantized, min_coverage asks for {config.min_coverage:.1%}; "
            f"kept: {', '.join(kept[:8])}. Name them in `overrides` to quantize them, or lower min_coverage"
        )


def _trained_layer(choice: Choice, config: BitNetQuantizationConfig) -> BitLinear | BitConv1D | BitEmbedding:
    if isinstance(choice.module, nn.Embedding):
        return BitEmbedding.from_float(choice.module, table_spec(choice.module, choice.layer, config))
    spec = make_spec(choice.layer, config)
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
    layers, places = layers_of(model, NativeLayer, "convert_native", "hf_bitnet.load_native(path)"), Places(model)
    for _, layer in layers:
        places.put(layer, layer.converted())
    attach(model, config_of(model))
    return model


def pack_model(model: Model, *, progress: bool | None = None) -> Model:
    """Packs the weights of a trained-form model to 1, 2, 4 or 8 bits, in place, and returns it.

    Raises ValueError when nothing is in train form, when a weight is not finite, or when a static activation range was
    never calibrated.
    """
    layers = layers_of(model, TrainedLayer, "pack_model", "quantize_model(model, config)")
    config = config_of(model)
    for name, layer in layers:
        check_finite(name, layer.weight)
        check_calibrated(name, layer)
    tables = [(name, table) for name, table in quantized_tables(model) if isinstance(table, BitEmbedding)]
    for name, table in tables:
        check_finite(name, table.weight)
    with ties_kept(model):
        places = Places(model)
        for _, layer in _with_progress([*layers, *tables], "packing", progress):
            places.put(layer, _packed(layer))
    attach(model, config, form="packed")
    return model


def unpack_model(model: Model, *, weight_scale: str | None = None) -> Model:
    """Turns a packed model back into train form, in place, and returns it: equal codes, equal scales up to rounding.

    The float weights are the dequantized values, rescaled so that the scheme's own rule finds the stored scale again.

    Args:
        weight_scale: "learned" keeps the stored scales as parameters instead; exact for every scheme.

    Raises ValueError when the model is not packed, has no config, or when the rule cannot reproduce the codes.
    """
    layers = layers_of(model, PackedBitLinear, "unpack_model", "pack_model(model)")
    config = config_of(model)
    if weight_scale is not None:
        overrides = {
            pattern: {**change, "weight_scale": weight_scale} if isinstance(change, dict) else change
            for pattern, change in config.overrides.items()
        }
        config = copied(config, weight_scale=weight_scale, overrides=overrides)
    dtype = float_dtype(model)
    names = own_names(model)
    heads = {names[head]: layer for head, layer in head_layers(model, config).items() if head in names}
    made: list[tuple[nn.Module, nn.Module]] = []
    for name, packed in layers:
        own = names.get(id(packed), name)
        known = listed_name(own, config.quantized_modules or [], getattr(model, "base_model_prefix", "")) or own
        spec = replace(make_spec(heads.get(own) or config.layer(known), config), sub_norm=False)
        made.append((packed, _unpacked(name, packed, spec, dtype)))
    for name, table in quantized_tables(model):
        plain = plain_embedding(table, nn.Parameter(_latent(name, table, table.quantizer, dtype)))
        made.append((table, BitEmbedding.from_float(plain, table.spec)))
    with ties_kept(model):
        places = Places(model)
        for old, new in made:
            places.put(old, new)
    _forget_packed(model)
    attach(model, config, form="train")
    return model


def _forget_packed(model: nn.Module) -> None:
    """What generation knows of packed layers would keep their weights alive."""
    for module in model.modules():
        forget(module)
        if isinstance(module, BitExperts):
            module.together = Together()


def _latent(
    name: str, packed: PackedBitLinear | QuantizedEmbedding, quantizer: WeightQuantizer, dtype: torch.dtype
) -> torch.Tensor:
    quantized = packed.quantized_weight()
    try:
        weight = quantizer.latent(quantized).to(dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not torch.equal(quantizer.quantize(weight, quantized.scale if quantizer.learned else None).codes, quantized.codes):
        raise ValueError(f"{name}: {dtype} is too coarse for weights that give these codes; call model.float() first")
    return weight


def _unpacked(name: str, packed: PackedBitLinear, spec: LayerSpec, dtype: torch.dtype) -> TrainedLayer:
    dense = _dense(packed, _latent(name, packed, spec.weight, dtype))
    layer = BitConv1D.from_float(dense, spec) if isinstance(dense, Conv1D) else BitLinear.from_float(dense, spec)
    layer.act_scale, layer.sub_norm = packed.act_scale, packed.sub_norm
    if layer.weight_scale is not None:
        layer.weight_scale.data.copy_(packed.weight_scale)
    return layer


def dequantize_model(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Turns quantized layers into plain nn.Linear (or Conv1D) that hold the quantized values, in place, and returns it.

    Activations are no longer quantized; sub-norms stay where they were, inside an nn.Sequential.

    Args:
        dtype: of the new weights; None takes the model's own.

    Raises ValueError when the model has no quantized layer, or is itself one.
    """
    layers = layers_of(model, QuantizedLayer, "dequantize_model", "quantize_model(model, config)")
    dtype = dtype or float_dtype(model)
    with ties_kept(model):
        places = Places(model)
        for _, layer in layers:
            dense = _dense(layer, layer.quantized_weight().dequantize(dtype))
            places.put(layer, dense if layer.sub_norm is None else nn.Sequential(layer.sub_norm, dense))
        for _, table in quantized_tables(model):
            value = nn.Parameter(table.quantized_weight().dequantize(dtype))
            places.put(table, plain_embedding(table, value))
    _forget_packed(model)
    fuse_experts(model)
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
