"""Checkpoints of float weights with a learned scale a row, as ParetoQ saves them (arXiv 2502.02631).

Beside `<layer>.weight` (N, K) there is `<layer>.weight_clip_val` (N, 1), here a; config.json says how many bits (`w_bits`).
What their model computes with, in the dtype of the weights:

    1 bit      a sign(w)
    1.58 bit   a / 1.5 round(1.5 clip(w / a))           `w_bits` 0; SEQ without a shift
    2 bit      a / 2 (round(2 clip(w / a) - 0.5) + 0.5)  SEQ (StretchedElasticQuant), clip to +-0.99
    3, 4 bit   a clip(round(w / a), -2^(b-1), 2^(b-1) - 1)   LSQ (arXiv 1902.08153)

Codes come from these formulas, not from ours: at ties the two may differ. Activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .assembly import Wanted
from .codes import Found, Levels, Misfit, fit, found, same_value, with_half_levels
from .folder import Folder

SCALE = ".weight_clip_val"
# what a user may say -> bits of their formulas
_BITS = {0: 0, 1.58: 0, 1: 1, 2: 2, 3: 3, 4: 4}
_SMALLEST, _CLIP = 1e-5, 0.99


class LearnedScales:
    """`Contents` of such a folder.

    Args:
        w_bits: 1, 1.58 (or 0), 2, 3 or 4; None takes what config.json says.

    Raises ValueError when neither says it.
    """

    def __init__(self, folder: Folder, outside: str, w_bits: float | None) -> None:
        self.folder, self.outside, self.source = folder, outside, str(folder.path)
        said = folder.settings.get("w_bits") if w_bits is None else w_bits
        if isinstance(said, bool) or not isinstance(said, int | float) or said not in _BITS:
            raise ValueError(
                f"{folder.path} has learned scales ({SCALE[1:]}), and w_bits={said!r} "
                f"{'in its config.json' if w_bits is None else 'is given'}; say how many bits a weight has: import_model(path, "
                "w_bits=2), one of 1, 1.58, 2, 3, 4"
            )
        self.bits = _BITS[said]
        self.config = folder.config()
        if hasattr(self.config, "w_bits"):
            delattr(self.config, "w_bits")

    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor | Found | Misfit]]:
        scaled = {name.removesuffix(SCALE) for name in self.folder.names if name.endswith(SCALE)}
        for name, tensor in self.folder.tensors():
            layer = name.removesuffix(".weight")
            if name.endswith(SCALE):
                continue
            if layer in scaled:
                yield name, wanted.transposed(layer) or self._layer(tensor, self.folder.tensor(layer + SCALE))
            else:
                yield name, tensor

    def _layer(self, weight: Tensor, scale: Tensor) -> Found | Misfit:
        if (
            weight.dim() != 2
            or not weight.numel()
            or scale.numel() not in (1, weight.shape[0])
            or not weight.is_floating_point()
        ):
            return Misfit(
                f"it has shape {tuple(weight.shape)} and scales of shape {tuple(scale.shape)}; legal is (N, K), (N, 1)"
            )
        scale = scale.reshape(-1, 1).to(weight.dtype)
        if not bool(torch.isfinite(scale).all()) or not bool(torch.isfinite(weight).all()):
            return Misfit("it or its learned scale holds NaN or infinite values")
        scale = scale.clamp(min=_SMALLEST)
        got = _quantized(weight, scale, self.bits, self.outside)
        if (
            self.outside != "clip"
            and isinstance(got, Found)
            and not same_value(got.quantized, _value(weight, scale, self.bits))
        ):
            return Misfit("its codes and scales give other values than its formula; please report this")
        return got

    def advice(self) -> str:
        return f"no layer that could be has a learned scale ({SCALE[1:]})"


def _steps(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Level of each weight, in units of the finest step, (N, K) in the weight's dtype."""
    if bits == 1:
        return weight.sign()
    if bits >= 3:
        return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    levels, shift = (2, 0.5) if bits else (1.5, 0)
    return ((weight / scale).clamp(-_CLIP, _CLIP) * levels - shift).round() + shift


def _value(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What their layer multiplies with, (N, K) in the weight's dtype."""
    steps = _steps(weight, scale, bits)
    return (steps if bits in (1, 3, 4) else steps / (2 if bits else 1.5)) * scale


def _quantized(weight: Tensor, scale: Tensor, bits: int, outside: str) -> Found | Misfit:
    steps = _steps(weight, scale, bits)
    if bits == 2:
        return found(steps.float(), scale.float() / 2, with_half_levels(), learned=True)
    # a third of 1.5 rounded to the dtype, as they round it before they multiply
    one = weight.new_ones(())
    unit = one / 1.5 if bits == 0 else one
    return fit(Levels(steps.to(torch.int16), scale.float() * unit.float(), max(bits, 2), learned=True), outside)
