"""Cosines between int8 and exact gradients of layers: over all ranks, and in words. Own; `int8_backward.py` decides by them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ..modules import QuantizedLayer
from ..modules.low_precision import PRODUCTS, UNMEASURED

logger = logging.getLogger(__name__)
# below every cosine, for a gradient that was not finite
NOT_FINITE = -2.0
_SHOWN = 8


def lowest_cosines(layers: Sequence[QuantizedLayer], device: torch.device) -> list[list[float]]:
    """Per layer and product the lowest cosine of all ranks; every rank has to call it, with the same layers.

    `UNMEASURED` where no rank had a gradient other than zero, `NOT_FINITE` where any had one that is not finite. Waits for the
    device, once.
    """
    unmeasured, cosines = torch.full((), UNMEASURED, device=device), []
    for layer in layers:
        assert layer.int8_backward is not None and layer.int8_backward.meter is not None
        found = layer.int8_backward.meter.cosines
        cosines += [found[product].to(device) if product in found else unmeasured for product in PRODUCTS]
    lowest = torch.stack(cosines).nan_to_num(nan=NOT_FINITE)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return lowest.view(-1, len(PRODUCTS)).tolist()


def say(decided: Mapping[str, Mapping[str, float]], min_cosine: float, steps: int) -> None:
    """Logs what was decided: how many products are int8, and which stay exact with what cosine.

    Args:
        decided: name of each layer -> product -> cosine; of none for a layer that no finite gradient reached in `steps` steps.
    """
    found = [(cosine, name, product) for name, each in decided.items() for product, cosine in each.items()]
    low = sorted(each for each in found if each[0] < min_cosine)
    if found:
        logger.info("int8_backward: %d of %d products of backward are int8 now", len(found) - len(low), len(found))
    if low:
        logger.warning(
            "int8_backward: %d of %d products stay exact, their int8 gradients have a cosine below min_cosine=%g: %s",
            *(len(low), len(found), min_cosine),
            _listed([f"{name} ({product}) {cosine:.4f}" for cosine, name, product in low]),
        )
    never = [name for name, each in decided.items() if not each]
    if never:
        logger.warning("int8_backward: in %d steps no finite gradient reached %s: exact", steps, _listed(never))


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
