"""Tensors under the names that checkpoints on disk have, which for some models differ from the module's. Own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .stream import Planned, planned


def saved_names(model: PreTrainedModel, tensors: Sequence[Planned]) -> list[Planned]:
    """As save_pretrained would name them.

    Renamed ones stay planned. Where transformers splits or joins tensors on the way (fused experts, say), all of the model's
    are made at once.
    """
    stands = {each.name: torch.empty(each.shape, dtype=each.dtype, device="meta") for each in tensors}
    made_of = {id(stand): each for stand, each in zip(stands.values(), tensors, strict=True)}
    reverted = revert_weight_conversion(model, stands)
    if all(id(stand) in made_of for stand in reverted.values()):
        return [made_of[id(stand)]._replace(name=name) for name, stand in reverted.items()]
    real = revert_weight_conversion(model, {each.name: each.tensor() for each in tensors})
    return [planned(name, tensor) for name, tensor in real.items()]
