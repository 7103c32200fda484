"""Weights that are spread over processes: which are, how they come back whole, and in which precision. Own.

Under FSDP 2 a weight is a DTensor, which `full_tensor` gathers: every rank has to call it. DeepSpeed ZeRO-3 leaves a weight
without elements outside of forward, and there is nothing to gather then.

Mixed precision: FSDP's own casts the weights before the layers see them, so that codes and scales come from bfloat16
weights, and differ from those of the saved float32 ones: the model that is deployed is then not the one that was trained.
Here the weights stay float32, as in one process, and autocast chooses the dtype of the products. Costs twice the bytes when
weights are gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ..modules import TrainedLayer
from ..quantizers import Quantized

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def keep_weights_float32(accelerator: Accelerator) -> torch.dtype | None:
    """Takes the casts out of the policy of FSDP 2, before the model is sharded.

    Returns the dtype for autocast in their place; None where nothing was to be done.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    dtype = _AUTOCAST.get(accelerator.mixed_precision)
    if plugin is None or plugin.fsdp_version != 2 or dtype is None:
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return dtype


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is true in any process; every rank has to ask. Where models are sharded, ranks run forwards together or not at
    all, so what they decide by their own batches has to be decided together."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    found = torch.tensor(float(flag), dtype=torch.float32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def is_sharded(weight: Tensor) -> bool:
    """Whether this process holds only a part of `weight` (FSDP), or none of it (ZeRO-3)."""
    return _is_spread(weight) or weight.numel() == 0


def whole_weight(layer: TrainedLayer) -> tuple[Tensor, Tensor | None]:
    """Weight (N, K) and learned scale, gathered where FSDP spreads them; the gradient finds its way back."""
    scale = layer.weight_scale
    return _gathered(layer.matrix), None if scale is None else _gathered(scale)


def whole_codes(layer: TrainedLayer) -> Quantized:
    """`layer.quantized_weight()`, of the gathered weight where FSDP spreads it."""
    return layer.source.codes(*whole_weight(layer)) if _is_spread(layer.weight) else layer.quantized_weight()


def spread_like(whole: Tensor, weight: Tensor) -> Tensor:
    """`whole`, which is the same in every process, placed as `weight` is; no process sends anything."""
    if not _is_spread(weight):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim).redistribute(placements=weight.placements)


def _is_spread(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _is_spread(tensor) else tensor  # type: ignore[operator]
