"""What all weight schemes share: granularity, scale, codes, and the position that gradients are measured at. Own.

A scheme is a subclass of `WeightScheme` in a file of its own; a `WeightQuantizer` is a scheme with its scale rule and
granularity, and the only thing that turns a float weight into codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..registry import Registry
from .quantized import Quantized
from .scales import SCALE_RULES, SMALLEST_SCALE, Grid

GRANULARITIES = ("tensor", "channel", "group")


class WeightScheme:
    """A set of codes and the rule that rounds to them.

    Attributes:
        grid: the legal codes.
        bits: information per weight, as people name it (1.58 for ternary).
        storage_bits: bits per packed code (1, 2, 4 or 8).
        default_scale, default_granularity: used where the user names none.
    """

    grid: ClassVar[Grid]
    bits: ClassVar[float]
    storage_bits: ClassVar[int]
    default_scale: ClassVar[str]
    default_granularity: ClassVar[str] = "channel"

    @classmethod
    def codes(cls, rows: Tensor, scale: Tensor) -> Tensor:
        """float32 (R, n), scale (R, 1) -> codes int8 (R, n)."""
        return kernels.quantize_weight(rows, scale, cls.grid.zero_point, cls.grid.lowest, cls.grid.highest)

    @classmethod
    def packed(cls, weight: Tensor, scale: Tensor) -> Tensor:
        """float (N, K), scale (1, 1), (N, 1) or (N, G) -> `codes` as bytes, uint8 (N, ceil(K * storage_bits / 8))."""
        grid = cls.grid
        if cls.codes.__func__ is not WeightScheme.codes.__func__:  # a scheme with codes of its own: by way of them
            codes = cls.codes(cls.rows(weight, scale), scale.reshape(-1, 1)).reshape(weight.shape)
            return kernels.pack(codes, cls.storage_bits, grid.lowest, grid.step)
        layout = kernels.Layout(cls.storage_bits, grid.lowest, grid.step, grid.zero_point)
        return kernels.quantize_pack(weight, scale, grid.lowest, grid.highest, layout)

    @staticmethod
    def rows(weight: Tensor, scale: Tensor) -> Tensor:
        """float (N, K) -> float32 (R, n): the weights that share one of the R scales side by side."""
        return weight.float().contiguous().reshape(scale.numel(), -1)

    @classmethod
    def position(cls, rows: Tensor, scale: Tensor) -> Tensor:
        """Where each weight lies among the levels: 0.0 is the lowest level, 1.0 the next. float32 (R, n)."""
        return rows * scale.reciprocal() + (cls.grid.zero_point - cls.grid.lowest)

    @classmethod
    def scale(cls, rows: Tensor, rule: str) -> Tensor:
        """float32 (R, n) -> (R, 1)."""
        return SCALE_RULES.get(rule)(rows, cls.grid)


WEIGHT_SCHEMES: Registry[type[WeightScheme]] = Registry("weight scheme")


@dataclass(frozen=True)
class WeightQuantizer:
    """A scheme, its scale rule and its granularity; pure functions of the weight.

    Attributes:
        scheme: name in `WEIGHT_SCHEMES`.
        scale_rule: name in `SCALE_RULES`. "learned" means that the caller holds the scale and passes it in.
        granularity: "tensor", "channel" (one scale an output feature) or "group" (one for `group_size` inputs of it).
        group_size: inputs per scale when the granularity is "group".
    """

    scheme: str
    scale_rule: str
    granularity: str
    group_size: int | None = None

    def __post_init__(self) -> None:
        scheme, _ = WEIGHT_SCHEMES.get(self.scheme), SCALE_RULES.get(self.scale_rule)
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {self.granularity!r}; legal: {', '.join(map(repr, GRANULARITIES))}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"granularity={self.granularity!r} with group_size={self.group_size!r}: give a group_size exactly when the "
                "granularity is 'group', for example granularity='group', group_size=128"
            )
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"group_size must be a positive whole number, got {self.group_size!r}; try group_size=128")
        if self.scale_rule == "threshold" or (self.scale_rule == "least_squares" and scheme.grid.levels > 16):
            SCALE_RULES.get(self.scale_rule)(torch.ones(1, 1, device="cpu"), scheme.grid)  # refuses a grid it does not serve

    @property
    def grid(self) -> Grid:
        return WEIGHT_SCHEMES.get(self.scheme).grid

    @property
    def bits(self) -> float:
        return WEIGHT_SCHEMES.get(self.scheme).bits

    @property
    def storage_bits(self) -> int:
        return WEIGHT_SCHEMES.get(self.scheme).storage_bits

    @property
    def learned(self) -> bool:
        return self.scale_rule == "learned"

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scale of an (out_features, in_features) weight. Raises ValueError when groups do not divide it."""
        if self.granularity == "tensor":
            return 1, 1
        if self.granularity == "channel":
            return out_features, 1
        assert self.group_size is not None
        if in_features % self.group_size:
            legal = [size for size in (16, 32, 64, 128, 256) if in_features % size == 0] or [in_features]
            raise ValueError(
                f"group_size={self.group_size} does not divide the {in_features} input features; sizes that do: "
                f"{', '.join(map(str, legal))}. Choose one, or granularity='channel'"
            )
        return out_features, in_features // self.group_size

    def _rows(self, weight: Tensor) -> Tensor:
        """(N, K) -> float32 (R, n), the weights that share a scale side by side."""
        # contiguous: a sum over strided memory runs in another order, and GPT-2's weights are stored transposed
        weight = weight.float().contiguous()
        if self.granularity == "tensor":
            return weight.reshape(1, -1)
        return weight if self.granularity == "channel" else weight.reshape(-1, self.group_size or 1)

    def compute_scale(self, weight: Tensor) -> Tensor:
        """float (N, K) -> float32 scale, shape `scale_shape(N, K)`."""
        rows = self._rows(weight.detach())
        return WEIGHT_SCHEMES.get(self.scheme).scale(rows, self.scale_rule).reshape(self.scale_shape(*weight.shape))

    @staticmethod
    def usable_scale(scale: Tensor) -> Tensor:
        """A learned scale as it is used: float32, detached, above 0."""
        return scale.detach().float().clamp(min=SMALLEST_SCALE)

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Quantized:
        """Codes and scale of a weight; no gradient.

        Args:
            weight: float (N, K). scale: float32 `scale_shape(N, K)`, given when the scale is learned.
        """
        with torch.no_grad():
            scale = self.compute_scale(weight) if scale is None else self.usable_scale(scale)
            rows = self._rows(weight.detach())
            codes = WEIGHT_SCHEMES.get(self.scheme).codes(rows, scale.reshape(-1, 1)).reshape(weight.shape)
            return Quantized(codes, scale, self.grid.zero_point)

    def pack(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`quantize` straight to bytes: uint8 (N, ceil(K * storage_bits / 8)) and the scale; no gradient.

        Args:
            weight: float (N, K). scale: float32 `scale_shape(N, K)`, given when the scale is learned.
        """
        with torch.no_grad():
            weight = weight.detach().contiguous()  # once: a transposed one would be copied for each pass
            scale = self.compute_scale(weight) if scale is None else self.usable_scale(scale)
            return WEIGHT_SCHEMES.get(self.scheme).packed(weight, scale), scale

    def position(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Position of each weight among the levels (0 the lowest), float32 (N, K); see `WeightScheme.position`."""
        rows = self._rows(weight.detach())
        position = WEIGHT_SCHEMES.get(self.scheme).position(rows, scale.detach().float().reshape(-1, 1))
        return position.reshape(weight.shape)

    def stretched(self, weight: Tensor, scale: Tensor) -> Tensor:
        """float32 `weight` (N, K) times what lets the rule find `scale` in it: all rules are homogeneous."""
        factor = scale / self.compute_scale(weight)
        return weight * factor.repeat_interleave(weight.shape[-1] // factor.shape[-1], dim=-1)

    def latent(self, quantized: Quantized) -> Tensor:
        """A float32 weight (N, K) that `quantize` maps back to these codes and, up to rounding, this scale.

        The dequantized value has the right codes but, for absmean say, another scale; the rules are homogeneous, so one
        multiplication mends it. Raises ValueError when the codes could not have come from this quantizer.
        """
        weight = quantized.dequantize()
        if not self.learned:
            for _ in range(3):  # the second and third round only remove rounding of the first
                weight = self.stretched(weight, quantized.scale)
        back = self.quantize(weight, quantized.scale if self.learned else None)
        if not torch.equal(back.codes, quantized.codes):
            raise ValueError(
                f"no latent weight gives these codes under weight={self.scheme!r}, weight_scale={self.scale_rule!r}; "
                "unpack with weight_scale='learned', which keeps the stored scale"
            )
        return weight


def make_weight_quantizer(
    scheme: str, scale_rule: str | None = None, granularity: str | None = None, group_size: int | None = None
) -> WeightQuantizer:
    """A quantizer with the scheme's defaults where None is given. Raises ValueError on an unknown name."""
    kind = WEIGHT_SCHEMES.get(scheme)
    if granularity is None:
        granularity = "group" if group_size is not None else kind.default_granularity
    return WeightQuantizer(scheme, kind.default_scale if scale_rule is None else scale_rule, granularity, group_size)
