"""Whether packed layers hold what packing could have written. Own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import NativeLayer, PackedBitLinear, PackedEmbedding
from ..pages import release_mapped
from ..quantizers import WeightQuantizer

_ADVICE = "the checkpoint is damaged; copy or download it again"


def check_scales(model: nn.Module) -> None:
    """Raises ValueError when the scale of a packed layer or table is not above 0 and finite."""
    for name, module in model.named_modules():
        if not isinstance(module, PackedBitLinear | PackedEmbedding):
            continue
        scale = module.get_parameter("weight_scale").detach()
        if not scale.is_meta and not bool((scale.isfinite() & (scale > 0)).all()):
            found = scale[~(scale.isfinite() & (scale > 0))].flatten()[0]
            raise ValueError(f"{name}.weight_scale holds {float(found):g}; scales are finite and above 0: {_ADVICE}")


def check_codes(model: nn.Module) -> None:
    """Raises ValueError when a packed layer or table holds a byte with a code that its scheme does not have.

    Reads every weight once, and takes about as long as copying them.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PackedBitLinear | PackedEmbedding) or module.weight.is_meta:
            continue
        # the native layout has two bits a code too; which row they belong to does not matter here
        legal = _legal_bytes(module.quantizer, 2 if isinstance(module, NativeLayer) else module.bits)
        # counting touches every page of a mapped file, and the layer may not be used for long
        present = torch.bincount(module.weight.detach().flatten(), minlength=256).cpu() > 0
        release_mapped(module.weight.detach())
        if bool((present & ~legal).any()):
            raise ValueError(f"{name}.weight holds a code that {module.quantizer.scheme} weights do not have; {_ADVICE}")


def _legal_bytes(quantizer: WeightQuantizer, bits: int) -> Tensor:
    """Bool (256,): the bytes all of whose codes are on the grid."""
    grid = quantizer.grid
    values = torch.arange(256, dtype=torch.uint8, device="cpu").reshape(256, 1)
    codes = kernels.unpack(values, bits, grid.lowest, grid.step, 8 // bits)
    return ((codes >= grid.lowest) & (codes <= grid.highest)).all(dim=-1)
