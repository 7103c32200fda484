"""suggest_overrides: from a report to a mixed-precision config. Own."""

from __future__ import annotations

import re
from typing import Any

from ..config import KEEP, BitNetQuantizationConfig
from ..quantizers import WEIGHT_SCHEMES
from ..reports import LayerRow, Report

# what a layer in full precision is counted as
_FLOAT_BITS = 16.0
_ROUNDING = 1e-6  # of an average


def suggest_overrides(
    report: Report[Any],
    worst: int = 3,
    *,
    to: str | dict[str, Any] = "int8",
    max_average_bits: float | None = None,
) -> dict[str, str | dict[str, Any]]:
    """Turns the worst layers of a report into `overrides` for `BitNetQuantizationConfig`.

    Reload the full-precision model and quantize it with `BitNetQuantizationConfig(..., overrides=suggestion)`; to keep
    other overrides behind it, write `overrides={**suggestion, **others}` (the first match wins).

    Args:
        report: of `sensitivity` (the best guide), `output_report` or `layer_report`.
        worst: at most so many layers. Layers that are not hurt, and those that have as many bits already, are passed over.
        to: what they become: a weight scheme, "keep" for full precision, or a dict of fields.
        max_average_bits: bits per quantized weight that the whole must not exceed (a kept weight counts 16); a layer that
            does not fit is passed over.

    Raises:
        TypeError: `report` is not a report.
        ValueError: `worst` is not a positive whole number; `to` is no legal override; the report ranks no layer (that of a
            packed model); the layers have more than `max_average_bits` already.
    """
    if not isinstance(report, Report):
        raise TypeError(
            f"suggest_overrides takes a report, got {type(report).__name__}; for example "
            "suggest_overrides(sensitivity(model, batches))"
        )
    if isinstance(worst, bool) or not isinstance(worst, int) or worst < 1:
        raise ValueError(f"worst must be a positive whole number of layers, got {worst!r}; try worst=3")
    change: str | dict[str, Any] = {"weight": to} if isinstance(to, str) and to != KEEP else to
    BitNetQuantizationConfig(overrides={".": change})  # refuses what is not legal, in its own words
    ranked = report.worst()
    if not ranked:
        raise ValueError("the report ranks no layer (packed layers have no float weights); use sensitivity(model, batches)")
    bits = _bits(change)
    average, weights = report.average_bits, sum(row.weights for row in report)
    if max_average_bits is not None and average > max_average_bits + _ROUNDING:
        raise ValueError(
            f"max_average_bits={max_average_bits} is less than the {average:.4g} bits a weight that the layers have already; "
            "give more than that, or a scheme of fewer bits to the whole model"
        )
    chosen: dict[str, str | dict[str, Any]] = {}
    for row in ranked:
        if len(chosen) == worst:
            break
        if not _worth(report, row, bits):
            continue
        new = average if bits is None else average + (bits - row.bits) * row.weights / weights
        if max_average_bits is None or new <= max_average_bits + _ROUNDING:
            average = new
            chosen[f"^{re.escape(row.name)}$"] = change if isinstance(change, str) else dict(change)
    return chosen


def _bits(change: str | dict[str, Any]) -> float | None:
    """Bits per weight after the change; None where it leaves the weight's scheme as it is."""
    if isinstance(change, str):
        return _FLOAT_BITS
    return WEIGHT_SCHEMES.get(change["weight"]).bits if "weight" in change else None


def _worth(report: Report[Any], row: LayerRow, bits: float | None) -> bool:
    badness = report.badness(row)
    assert badness is not None
    # NaN, the worst of all, is not <= 0
    return not badness <= 0 and (bits is None or row.bits < bits)
