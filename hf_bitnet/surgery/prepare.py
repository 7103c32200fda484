"""Empty quantized layers for a checkpoint that is going to be loaded, and what fills them. Own.

Leaves out: files, and the loading itself (`plugin/`).
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..config import BitNetQuantizationConfig, NativeBitNetConfig
from ..modules import (
    BitConv1D,
    NativeBitLinear,
    NativeOfflineLinear,
    NativeOnlineLinear,
    PackedBitLinear,
    PackedEmbedding,
    QuantizedEmbedding,
    QuantizedLayer,
    TrainedLayer,
)
from ..quantizers import ACTIVATION_SCHEMES
from .attached import attach, attach_native, copied, listed_name
from .coverage import check_finite
from .experts import FusedExpertsError, separate_experts, separates_what_files_hold_fused
from .places import Places
from .select import Choice, choose, choose_tables, is_linear
from .swap import check_coverage, check_layer, chosen_layers, make_spec, name_idle_patterns, swap_layers
from .vocabulary import head_layers
from .walk import quantized_layers, quantized_tables


def prepare_model(model: nn.Module, config: BitNetQuantizationConfig, *, saved: bool) -> None:
    """Replaces layers of a model on the meta device by empty quantized ones, and attaches the config.

    A checkpoint of another class has other names for the same layers. What patterns of the config say of them is then spelled
    out in the config that is attached.

    Args:
        saved: the checkpoint is quantized already, by this config; its list of layers decides. Else it is a float
            checkpoint, and the config and our rules decide.

    Raises ValueError as `quantize_model` does, except for what only the weights can tell.
    """
    with separate_experts(model):
        listed = saved and config.quantized_modules is not None
        chosen = _saved_layers(model, config) if listed else chosen_layers(model, config)
        if listed:
            config = _spelled_out(model, config, chosen)
        else:
            name_idle_patterns(model, config)
        for choice in chosen:
            check_layer(choice, model, config)
            if not saved and config.form == "packed" and ACTIVATION_SCHEMES.get(choice.layer.activation).static:
                raise ValueError(
                    f"{choice.name}: form='packed' needs a calibrated activation range, which a float checkpoint has not; load "
                    "with form='train', call hf_bitnet.calibrate(model, batches), then pack_model(model)"
                )
        if not saved:
            check_coverage(model, chosen, config)
        swap_layers(model, chosen, config)
    if not saved and separates_what_files_hold_fused(model):
        raise FusedExpertsError(
            f"the checkpoints of {type(model).__name__} hold all experts of a layer in one tensor, which cannot be quantized "
            "while it is loaded; load the model without a quantization_config, then quantize_model(model, config), or keep its "
            "experts: keep=[r'experts']"
        )
    attach(model, config)


def prepare_native(model: nn.Module, config: NativeBitNetConfig, skip: list[str]) -> None:
    """As `prepare_model`, for a checkpoint of transformers' own `bitnet` method: exactly the layers it would replace.

    Args:
        skip: what transformers makes of `modules_to_not_convert`.
    """
    spec = make_spec(config.layer(""), config)
    spec = replace(spec, sub_norm=False)  # these layers bring their own
    rms_norm_eps = config.sub_norm_eps if config.sub_norm else None
    kind = NativeBitLinear if config.divides else NativeOfflineLinear
    places = Places(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or not should_convert_module(name, skip):
            continue
        if config.online:
            layer: nn.Module = NativeOnlineLinear.from_float(module, spec, rms_norm_eps)
        else:
            layer = kind(
                module.in_features,
                module.out_features,
                module.bias is not None,
                rms_norm_eps=rms_norm_eps,
                device=module.weight.device,
                dtype=module.weight.dtype,
            )
        places.put(module, layer)
    attach_native(model, config)


def _saved_layers(model: nn.Module, config: BitNetQuantizationConfig) -> list[Choice]:
    patterns, base_prefix = config.quantized_modules or [], getattr(model, "base_model_prefix", "")
    vocabulary, chosen = head_layers(model, config), []
    for choice in [*choose_tables(model, config), *choose(model, config)]:
        listed = listed_name(choice.name, patterns, base_prefix)
        if listed is not None:
            by_name = is_linear(choice.module) and id(choice.module) not in vocabulary
            chosen.append(replace(choice, layer=config.layer(listed)) if by_name else choice)
    if not chosen:
        raise ValueError(
            f"none of the quantized layers that the checkpoint lists ({', '.join(patterns[:5])}, ...) is in "
            f"{type(model).__name__}; load it with the model class that saved it"
        )
    return chosen


def _spelled_out(model: nn.Module, config: BitNetQuantizationConfig, chosen: list[Choice]) -> BitNetQuantizationConfig:
    """`config`, with an override for each layer that it would quantize otherwise under the name that it has here."""
    vocabulary = head_layers(model, config)
    own = {
        rf"^{re.escape(choice.name)}$": asdict(choice.layer)
        for choice in chosen
        if is_linear(choice.module) and id(choice.module) not in vocabulary and choice.layer != config.layer(choice.name)
    }
    return copied(config, overrides={**own, **config.overrides}) if own else config


@torch.no_grad()
def state_from_float(name: str, layer: QuantizedLayer | QuantizedEmbedding, weight: Tensor) -> dict[str, Tensor]:
    """Every tensor of a layer (or table), made from the float weight of the layer it replaces.

    Args:
        name: dotted module name, for errors.
        layer: an empty layer. weight: in the layout of the checkpoint.

    Raises ValueError or TypeError when the weight has another shape, or cannot be quantized (`check_finite`).
    """
    if isinstance(layer, QuantizedEmbedding):
        return _table_from_float(name, layer, weight)
    shape = (layer.out_features, layer.in_features)
    is_conv1d = isinstance(layer, BitConv1D) or (isinstance(layer, PackedBitLinear) and layer.was_conv1d)
    expected = shape[::-1] if is_conv1d else shape
    if weight.shape != expected:
        raise ValueError(f"the weight of {name} has shape {tuple(weight.shape)} in the checkpoint, the model needs {expected}")
    check_finite(name, weight)
    matrix = weight.t() if is_conv1d else weight
    if isinstance(layer, PackedBitLinear):
        packed, scale = layer.quantizer.pack(matrix)
        state = {"weight": packed, "weight_scale": scale}
    else:
        state = {"weight": weight}
        if layer._parameters.get("weight_scale") is not None:
            state["weight_scale"] = layer.quantizer.compute_scale(matrix)
    return state | _fresh_state(layer, weight.device)


def _table_from_float(name: str, table: QuantizedEmbedding, weight: Tensor) -> dict[str, Tensor]:
    expected = (table.num_embeddings, table.embedding_dim)
    if weight.shape != expected:
        raise ValueError(f"the weight of {name} has shape {tuple(weight.shape)} in the checkpoint, the model needs {expected}")
    check_finite(name, weight)
    if not isinstance(table, PackedEmbedding):
        return {"weight": weight}
    packed, scale = table.quantizer.pack(weight)
    return {"like": torch.ones(1, dtype=weight.dtype, device=weight.device), "weight": packed, "weight_scale": scale}


def _fresh_state(layer: QuantizedLayer, device: torch.device) -> dict[str, Tensor]:
    """What a float checkpoint does not have and no weight is needed for, as the constructors would make it."""
    state = {}
    if layer.act_scale is not None:
        state["act_scale"] = torch.zeros((), dtype=torch.float32, device=device)
    if isinstance(layer, TrainedLayer) and "ste_temperature" in layer._parameters:
        state["ste_temperature"] = torch.full((), layer.spec.temperature, dtype=torch.float32, device=device)
    if layer.sub_norm is not None:
        state["sub_norm.weight"] = torch.ones_like(layer.sub_norm.weight, device=device)
        state["sub_norm.blend"] = torch.zeros_like(layer.sub_norm.blend, device=device)
    return state


def start_from_weights(model: nn.Module, names: set[str]) -> None:
    """Starts the state of the named layers in train form, whose weights were newly made instead of loaded."""
    for name, layer in [*quantized_layers(model), *quantized_tables(model)]:
        if name in names:
            layer.load_state_dict(state_from_float(name, layer, layer.get_parameter("weight")), strict=False)
