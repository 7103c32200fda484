"""The config that a model carries: what it records, and what of it transformers gets to see. Own.

Leaves out: changing layers (`swap.py`), files.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from ..config import BitNetQuantizationConfig, NativeBitNetConfig
from ..modules import BitLinear, QuantizedEmbedding, QuantizedLayer
from .adapters import base_of, own_modules
from .coverage import config_place
from .experts import has_separate_experts
from .select import HEADS, is_linear, is_table
from .vocabulary import declare_ties, head_layers

# what from_pretrained leaves on a model it quantized
_LOADER_STATE = ("hf_quantizer", "quantization_method", "is_quantized")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$")


def config_of(model: nn.Module) -> BitNetQuantizationConfig:
    """The config a quantized model carries. Raises ValueError when there is none."""
    config = getattr(*config_place(model), None)
    if not isinstance(config, BitNetQuantizationConfig):
        raise ValueError("the model carries no BitNetQuantizationConfig; quantize it with hf_bitnet.quantize_model")
    return config


def copied(config: BitNetQuantizationConfig, **changes: Any) -> BitNetQuantizationConfig:
    """A config of its own with some fields changed."""
    return BitNetQuantizationConfig(**(config.fields() | changes))


def attach(model: nn.Module, config: BitNetQuantizationConfig, **changes: Any) -> None:
    """Gives the quantized model a copy of `config`, with the layers it has now written into it."""
    config = copied(config, **changes)
    config.native = _native_settings(model, config)
    _put(model, config)


def attach_native(model: nn.Module, config: NativeBitNetConfig) -> None:
    """The same for a model with native layers, whose config is saved as it was loaded."""
    _put(model, copy.copy(config))


def _put(model: nn.Module, config: BitNetQuantizationConfig) -> None:
    config.quantized_modules = _patterns(model)
    detach(model, loader=config.form != "packed")
    setattr(*config_place(model), config)
    declare_ties(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config = config
    if config.form == "packed":
        for each in _configs(model):
            # transformers then takes the compute dtype from the config, not from the (uint8) weight of some linear layer
            each._is_quantized = True


def detach(model: nn.Module, *, loader: bool = True) -> None:
    """Takes every mark of quantization off the model, the traces of from_pretrained (`loader`) included."""
    declare_ties(model)
    holder, attribute = config_place(model)
    if isinstance(getattr(holder, attribute, None), BitNetQuantizationConfig):
        delattr(holder, attribute)
    for each in _configs(model):
        each.__dict__.pop("_is_quantized", None)
        # a part of the model may have been quantized by itself before
        if isinstance(getattr(each, "quantization_config", None), BitNetQuantizationConfig):
            delattr(each, "quantization_config")
    if loader:
        for each in (model, base_of(model)):
            for name in _LOADER_STATE:
                each.__dict__.pop(name, None)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    found = {id(each): each for m in model.modules() if isinstance(each := getattr(m, "config", None), PreTrainedConfig)}
    return list(found.values())


def _patterns(model: nn.Module) -> list[str]:
    """Names of the quantized modules; numbers are written as "*" where that covers no linear map and no table that is kept."""
    quantized, kept = [], set()
    # a resized table is one module in several places, and where it is loaded again there are as many
    for name, module in own_modules(model, every_name=True):
        if isinstance(module, QuantizedLayer | QuantizedEmbedding):
            quantized.append(name)
        elif is_linear(module) or is_table(module):
            kept.add(_NUMBER.sub("*", name))
    return list(dict.fromkeys(name if (pattern := _NUMBER.sub("*", name)) in kept else pattern for name in quantized))


def listed_name(name: str, patterns: list[str], base_prefix: str) -> str | None:
    """The name by which a config's `quantized_modules` knows module `name`: its own, or with or without the model's
    `base_model_prefix`, where another class saved it. None where it is not there."""
    names = (name, f"{base_prefix}.{name}", name.removeprefix(f"{base_prefix}."))
    return next((each for each in names if each in patterns or _NUMBER.sub("*", each) in patterns), None)


def _native_settings(model: nn.Module, config: BitNetQuantizationConfig) -> dict[str, Any] | None:
    """`quantization_config` with which plain transformers computes the same from the same files; None where it cannot.

    Only for a whole model with its head: a base model may be part of another one, whose other layers nobody sees here.
    """
    base_prefix = getattr(model, "base_model_prefix", None)
    if config.form != "train" or base_prefix is None or not _has_head(model) or has_separate_experts(model):
        return None
    layers = [(name, module) for name, module in own_modules(model) if isinstance(module, QuantizedLayer)]
    if any(isinstance(module, QuantizedEmbedding) for module in model.modules()) or head_layers(model, config):
        return None
    if any(type(layer) is not BitLinear or not config.layer(name).is_native for name, layer in layers):
        return None
    kept = kept_for_native(model)
    # transformers adds these by itself
    float32 = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not _spares([name for name, _ in layers], kept + float32):
        return None
    return {
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": kept,
        "use_rms_norm": False,
        "rms_norm_eps": 1e-6,
    }


def kept_for_native(model: nn.Module) -> list[str]:
    """Patterns for transformers' `modules_to_not_convert`: every linear map that is not quantized, and usual heads.

    They match at the end of a name too; so, written without the model's prefix, they serve its base model as well.
    """
    base_prefix = getattr(model, "base_model_prefix", "")
    quantized, kept = [], set()
    for name, module in own_modules(model):
        if isinstance(module, QuantizedLayer):
            quantized.append(name)
        elif isinstance(module, nn.Linear):
            kept.add(name.removeprefix(f"{base_prefix}."))
    return sorted(kept | {head for head in HEADS if _spares(quantized, [head])})


def _spares(quantized: list[str], patterns: list[str]) -> bool:
    return all(should_convert_module(name, patterns) for name in quantized)


def _has_head(model: Any) -> bool:
    return model.base_model is not model or model.get_output_embeddings() is not None
