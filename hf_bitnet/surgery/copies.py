"""Copies of a model for who writes its files: without numbers, packed, or in transformers' own arithmetic. Own.

The model itself is left as it is; parameters are shared wherever that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..modules import BitLinear, NativeLayer, NativeOnlineLinear, NativePackedLinear
from ..modules.base import PROTECTED
from .full_precision import independent_copy
from .places import Places
from .swap import Model, convert_native, pack_model
from .walk import quantized_layers, quantized_tables, trained_layers


def empty_packed_copy(model: Model) -> Model:
    """The packed form of a model, in train form or packed, on the meta device: its names, shapes, dtypes, ties and config."""
    meta: dict[int, nn.Parameter] = {
        id(each): nn.Parameter(each.detach().to("meta"), requires_grad=each.requires_grad) for each in model.parameters()
    }
    return _packed(independent_copy(model, meta))


def packed_copy(model: Model, dtype: torch.dtype) -> Model:
    """The model packed and loaded in `dtype`: what from_pretrained makes of its packed checkpoint.

    Only the packed weights of a model in train form take memory.
    """
    exact = {id(each.get_parameter("weight")) for _, each in [*quantized_layers(model), *quantized_tables(model)]}
    exact |= {id(each) for name, each in model.named_parameters() if name.rpartition(".")[2] in PROTECTED}
    shared = {id(each): each if id(each) in exact else _cast(each, dtype) for each in model.parameters()}
    return _packed(independent_copy(model, shared))


def _packed(model: Model) -> Model:
    kinds = [type(layer) for _, layer in quantized_layers(model)]
    if any(issubclass(kind, NativeLayer) for kind in kinds):
        convert_native(model)
    return pack_model(model, progress=False) if trained_layers(model) else model


def native_copy(
    model: Model,
    kind: type[NativePackedLinear] | type[NativeOnlineLinear],
    tensors: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype,
    rms_norm_eps: float | None = None,
) -> Model:
    """Copies the model and puts a native layer in the place of every quantized one.

    Args:
        kind: of the layers.
        tensors: dotted name of each quantized layer -> what a native checkpoint holds for it, under its names there.
        dtype: of every float tensor of the copy.
        rms_norm_eps: of the norms in front of the layers; None for no norms.

    Parameters that are in `dtype` already are shared with the model.
    """
    shared = {id(each): _cast(each, dtype) for each in model.parameters()}
    twin = independent_copy(model, shared)
    places = Places(twin)
    for name, layer in list(quantized_layers(twin)):
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors[name].items()}
        places.put(layer, _native(layer, kind, state, dtype, rms_norm_eps))
    return twin


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if not parameter.is_floating_point() or parameter.dtype == dtype:
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def _native(
    layer: nn.Module,
    kind: type[NativePackedLinear] | type[NativeOnlineLinear],
    state: dict[str, Tensor],
    dtype: torch.dtype,
    rms_norm_eps: float | None,
) -> NativeLayer:
    if issubclass(kind, NativeOnlineLinear):
        assert isinstance(layer, BitLinear)
        native: NativeLayer = kind.from_float(layer, replace(layer.spec, sub_norm=False), rms_norm_eps)
        native.load_state_dict(state, strict=False, assign=True)
        return native
    sizes = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    native = kind(*sizes, "bias" in state, rms_norm_eps=rms_norm_eps, device="meta", dtype=dtype)
    native.load_state_dict(state, assign=True)
    return native
