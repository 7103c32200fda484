"""Mixed precision under FSDP 2 without rounding the float weights that codes are made of. Own.

FSDP's own mixed precision casts the weights before the layers see them, so that codes and scales come from bfloat16 weights,
and differ from those of the saved float32 ones: the model that is deployed is then not the one that was trained. Here the
weights stay float32, as in one process, and autocast chooses the dtype of the products. Costs twice the bytes when weights
are gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

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
