"""What of a model is quantized, and what is not and why. Own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .. import kernels
from ..config import BitNetQuantizationConfig
from ..modules import PackedBitLinear, PackedEmbedding, QuantizedEmbedding, QuantizedLayer, shape_of
from ..modules.base import PROTECTED
from .experts import is_fused
from .select import choose, is_linear


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: dotted parameter name. weights: how many numbers it stands for. bits: per number when packed.
        bytes_float, bytes_packed: size in the full-precision model (its own dtype) and in the packed one.
        status: "quantized" or "kept". reason: scheme, or why it is kept.
        linear: whether it is a matrix of linear maps, fused experts included (what `min_coverage` counts).
    """

    name: str
    weights: int
    bits: float
    bytes_float: int
    bytes_packed: int
    status: str
    reason: str
    linear: bool


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model, quantized or kept. `str()` prints a table by kind."""

    rows: list[Row] = field(repr=False)

    @property
    def fraction(self) -> float:
        """Share of the weights of linear maps that is quantized, 0..1."""
        linear = sum(row.weights for row in self.rows if row.linear)
        return sum(row.weights for row in self.rows if row.linear and row.status == "quantized") / max(linear, 1)

    @property
    def bytes_float(self) -> int:
        return sum(row.bytes_float for row in self.rows)

    @property
    def bytes_packed(self) -> int:
        return sum(row.bytes_packed for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Over the whole model as packed, kept parameters included."""
        return 8 * self.bytes_packed / max(sum(row.weights for row in self.rows), 1)

    def to_dict(self) -> dict[str, object]:
        """JSON-able summary with every parameter."""
        return {
            "fraction_of_linear_weights": self.fraction,
            "bits_per_weight": self.bits_per_weight,
            "bytes_full_precision": self.bytes_float,
            "bytes_packed": self.bytes_packed,
            "parameters": [vars(row) for row in self.rows],
        }

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.status, row.reason), []).append(row)
        lines = [
            f"{'status':<10} {'what and why':<44} {'tensors':>7} {'weights':>14} {'bits':>6} {'MB before':>10} {'after':>9}"
        ]
        for (status, reason), rows in sorted(groups.items(), key=lambda item: (item[0][0] != "quantized", item[0][1])):
            weights = sum(row.weights for row in rows)
            before, after = sum(row.bytes_float for row in rows), sum(row.bytes_packed for row in rows)
            counts = f"{len(rows):>7} {weights:>14,} {8 * after / max(weights, 1):>6.2f}"
            lines.append(f"{status:<10} {reason:<44} {counts} {before / 1e6:>10.2f} {after / 1e6:>9.2f}")
        total = sum(row.weights for row in self.rows)
        lines.append(
            f"{'total':<10} {f'{self.fraction:.1%} of the linear weights quantized':<44} {len(self.rows):>7} {total:>14,} "
            f"{self.bits_per_weight:>6.2f} {self.bytes_float / 1e6:>10.2f} {self.bytes_packed / 1e6:>9.2f}"
        )
        return "\n".join(lines)


def coverage(model: nn.Module) -> Coverage:
    """The coverage of a quantized (or plain) model, from its modules as they are now."""
    config = getattr(*config_place(model), None)
    reasons = {
        choice.name: choice.kept
        for choice in choose(model, config if isinstance(config, BitNetQuantizationConfig) else BitNetQuantizationConfig())
    }
    rows: list[Row] = []
    seen: set[int] = set()
    of_heads = {id(layer._parameters["weight"]) for layer in model.modules() if isinstance(layer, QuantizedLayer)}
    packed_bytes = float_dtype(model).itemsize
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(module, QuantizedLayer | QuantizedEmbedding) and key == "weight":
                is_packed = isinstance(module, PackedBitLinear | PackedEmbedding)
                element = packed_bytes if is_packed else parameter.element_size()
                rows.append(_quantized_row(name, module, element, id(parameter) in of_heads))
                continue
            if isinstance(module, PackedEmbedding) and key == "like":
                size = parameter.element_size()
                rows.append(Row(name, 0, 8 * size, 0, size, "kept", "one number that holds the dtype of a table", False))
                continue
            if isinstance(module, QuantizedLayer | QuantizedEmbedding) and key == "weight_scale":
                rows.append(Row(name, 0, 32, 0, 0, "kept", "scale, counted with its weight", False))
                continue
            reason = (
                (reasons.get(prefix) or "not quantized yet") if is_linear(module) and key == "weight" else _kind(module, key)
            )
            size = parameter.numel() * parameter.element_size()
            # fused experts are linear maps too, so min_coverage must not look away from them
            linear = (is_linear(module) and key == "weight") or _is_fused_experts(module, parameter)
            rows.append(Row(name, parameter.numel(), 8 * parameter.element_size(), size, size, "kept", reason, linear))
    return Coverage(rows)


def _quantized_row(name: str, module: QuantizedLayer | QuantizedEmbedding, element: int, is_head: bool) -> Row:
    """`element`: bytes a weight has in the full-precision model. `is_head`: a linear map has this weight."""
    quantizer, is_table = module.quantizer, isinstance(module, QuantizedEmbedding)
    shape = shape_of(module)
    weights = shape[0] * shape[1]
    rows, groups = quantizer.scale_shape(*shape)
    packed = shape[0] * -(-shape[1] * quantizer.storage_bits // 8) + 4 * rows * groups
    scale = f"{quantizer.granularity}{f' of {quantizer.group_size}' if quantizer.group_size else ''}"
    what = ("embedding and tied head: " if is_head else "embedding: ") if is_table else ""
    reason = f"{what}{quantizer.scheme}, {quantizer.scale_rule} per {scale}"
    return Row(name, weights, quantizer.bits, weights * element, packed, "quantized", reason, not is_table)


def _kind(module: nn.Module, key: str) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, QuantizedLayer):
        return "bias of a quantized layer" if key == "bias" else f"{key} of a quantized layer"
    if key == "bias":
        return "bias"
    kind = type(module).__name__
    if _is_fused_experts(module, module._parameters[key]):
        return "fused experts, not quantized" if is_fused(module) else f"fused experts of a make that is not known ({kind})"
    for word in ("norm", "router"):
        if word in kind.lower():
            return word
    return f"{key} of {kind}"


def _is_fused_experts(module: nn.Module, parameter: torch.Tensor | None) -> bool:
    # transformers calls all of them ...Experts; convolutions and position tables have three dimensions too
    return parameter is not None and parameter.dim() == 3 and "expert" in type(module).__name__.lower()


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's float weights. A packed layer no longer knows its own: the other parameters are witnesses."""
    others = [
        (parameter.dim() > 1, parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and name.rpartition(".")[2] not in PROTECTED
    ]
    return next((dtype for is_matrix, dtype in others if is_matrix), others[0][1] if others else torch.float32)


def config_place(model: nn.Module) -> tuple[Any, str]:
    """The object and the attribute that hold the quantization config: transformers' own place, or one on a plain module."""
    config = getattr(model, "config", None)
    return (config, "quantization_config") if isinstance(config, PreTrainedConfig) else (model, "_bitnet_config")


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raises ValueError when a weight cannot be quantized: empty, not float, NaN or infinite, or all zero."""
    advice = f"mend the checkpoint, or keep the layer: keep=[r'{name}']"
    if weight.numel() == 0:
        raise ValueError(f"the weight of {name} is empty, shape {tuple(weight.shape)}; {advice}")
    if not weight.is_floating_point():
        raise TypeError(f"the weight of {name} has dtype {weight.dtype}; a float weight is needed; {advice}")
    if weight.is_meta:
        return
    # one pass: any NaN or infinity makes the mean magnitude NaN or infinite (float64 sums: no overflow on the way). Only
    # numbers that float32 cannot hold can do the same, or vanish in the mean, so what it says is looked up in the weight
    mean = kernels.mean_magnitudes(weight.detach().reshape(1, -1))
    if not torch.isfinite(mean) and (bad := int((~torch.isfinite(weight)).sum())):
        raise ValueError(f"the weight of {name} holds {bad} NaN or infinite values; {advice}")
    if mean == 0 and not weight.any():
        raise ValueError(f"the weight of {name} is all zero, so it has no scale; {advice}")
