"""Tensors under the names that checkpoints on disk have, which for some models differ from the module's. Own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .stream import Planned, planned


def saved_names(model: PreTrainedModel, tensors: Sequence[Planned]) -> list[Planned]:
    """As save_pretrained would name them.

    Renamed ones stay planned. Those that transformers splits or joins on the way (fused experts, say) are made at once.
    """
    stands = {each.name: torch.empty(each.shape, dtype=each.dtype, device="meta") for each in tensors}
    made_of = {id(stand): each for stand, each in zip(stands.values(), tensors, strict=True)}
    reverted = revert_weight_conversion(model, stands)
    untouched = {id(stand) for stand in reverted.values()} & made_of.keys()
    if len(untouched) == len(reverted):
        return [made_of[id(stand)]._replace(name=name) for name, stand in reverted.items()]
    converted = {
        each.name: each.tensor() for stand, each in zip(stands.values(), tensors, strict=True) if id(stand) not in untouched
    }
    real = revert_weight_conversion(model, converted)
    return [
        made_of[id(stand)]._replace(name=name) if id(stand) in untouched else planned(name, real[name])
        for name, stand in reverted.items()
    ]


def origins(tensors: Sequence[Planned], saved: Sequence[Planned]) -> dict[str, str]:
    """Name in the file -> name in the model, of what `saved_names` made of `tensors`; the same where tensors were joined."""
    names = {id(each.make): each.name for each in tensors}
    return {each.name: names.get(id(each.make), each.name) for each in saved}
