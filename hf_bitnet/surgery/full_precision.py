"""A full-precision twin of a model in train form, and the map that makes its logits. Own.

Both are what distillation needs to know about the shape of a model.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..modules import TrainedLayer, plain_embedding
from .attached import detach
from .places import Places
from .swap import Model, _dense
from .vocabulary import ties_kept
from .walk import trained_layers, trained_tables

_LEFT_BY_TRAINERS = ("forward", "_original_forward", "_is_accelerate_prepared")


def full_precision_copy(model: Model, *, share_frozen: bool = False, dtype: torch.dtype | None = None) -> Model:
    """A copy of `model` whose quantized layers are plain ones that hold the float weights.

    It computes what the model computes at strength 0, bit for bit (but for `dtype`), without the cost of the mix. A sub-norm
    that is still the identity (blend 0) is left out, any other stays in front of its layer inside an nn.Sequential.

    Args:
        share_frozen: True takes frozen parameters over instead of copying them; they must then stay frozen. False
            shares no memory.
        dtype: of the float parameters of the copy; None leaves each as it is.

    Raises ValueError when the model has no layer in train form, or when its weights were fitted.
    """
    if not trained_layers(model):
        raise ValueError(
            f"full_precision_copy: {type(model).__name__} has no layer in train form; call quantize_model(model, config) first"
        )
    if any(layer.fitted for _, layer in trained_layers(model)):
        raise ValueError(
            "full_precision_copy: fit_weights has changed the float weights of this model, so a copy of them is not the "
            "full-precision model; make the teacher first: teacher = copy.deepcopy(model), then quantize_model(model, config) "
            "and fit_weights(model, batches), then QATTrainer(..., teacher=teacher)"
        )
    twin = independent_copy(model, {id(each): _copied(each, share_frozen, dtype) for each in model.parameters()})
    with ties_kept(twin):
        places = Places(twin)
        for _, layer in trained_layers(twin):
            places.put(layer, _plain(layer))
        for table in trained_tables(twin):
            places.put(table, plain_embedding(table, table.weight))
    detach(twin)
    return twin


def _copied(parameter: nn.Parameter, share_frozen: bool, dtype: torch.dtype | None) -> nn.Parameter:
    wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    if share_frozen and not parameter.requires_grad and wanted == parameter.dtype:
        return parameter
    return nn.Parameter(parameter.detach().to(wanted, copy=True), requires_grad=parameter.requires_grad)


def independent_copy(model: Model, parameters: dict[int, nn.Parameter] | None = None) -> Model:
    """copy.deepcopy of a model that may have been trained.

    accelerate and TRL leave a forward in the instance that is bound to this very model: a copy of it would run the original.

    Args:
        parameters: id of a parameter to what stands for it in the copy; the others are copied.
    """
    bound = {name: model.__dict__.pop(name) for name in _LEFT_BY_TRAINERS if name in model.__dict__}
    try:
        return copy.deepcopy(model, dict(parameters or {}))
    finally:
        model.__dict__.update(bound)


def _plain(layer: TrainedLayer) -> nn.Module:
    dense = _dense(layer, layer.matrix.detach())
    if layer.sub_norm is None or float(layer.sub_norm.blend) == 0.0:
        return dense
    return nn.Sequential(layer.sub_norm, dense)


def output_head(model: nn.Module) -> nn.Linear | None:
    """The plain linear map from the last hidden states to logits over a vocabulary, or None.

    None too where it is not an ordinary one: quantized, wrapped by an adapter, or with a forward put into the instance
    (offloading). Whether the model changes the logits afterwards (soft-capping, scaling) is not seen here.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    # sharding makes a subclass of its own, which keeps nn.Linear's forward; any other forward computes something else
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in head.__dict__
    return head if plain else None
