"""QuantizationError: how far quantized numbers are from the float ones. Own; the same figures as `layer_report`'s.

SQNR = 10 log10(sum x^2 / sum (x - q)^2)      relative error = ||x - q|| / ||x||      cosine = x·q / (||x|| ||q||)
"""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value

from .base import OfflineMetric

_DESCRIPTION = "Distance of quantized numbers from those in full precision: signal to noise, relative error, cosine."
_INPUTS = """
Args:
    predictions: quantized numbers: one dimension, or two (a row each); arrays, tensors in float32 or float64, or lists.
    references: the same numbers in full precision.
Returns:
    sqnr_db: signal to quantization noise in dB; infinite where all are equal.
    relative_error: norm of the difference over the norm of the references.
    cosine: of the angle between the two. NaN, as the others, where all references are 0.
    max_error: the largest difference.
Example:
    QuantizationError().compute(predictions=layer.quantized_weight().dequantize(), references=layer.weight.detach())
"""


class QuantizationError(OfflineMetric):
    """Sums in float64 over everything that was added; see `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "references")
        kinds = (Value("float64"), List(Value("float64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[Features(dict.fromkeys(names, kind)) for kind in kinds],
        )

    def _compute(self, *, predictions: list[Any], references: list[Any]) -> dict[str, float]:  # type: ignore[override]
        q, x = _flat(predictions), _flat(references)
        if q.shape != x.shape:
            raise ValueError(f"QuantizationError: {q.size} predictions for {x.size} references; rows of both must be as long")
        error, signal, value = (float(np.square(each).sum()) for each in (x - q, x, q))
        if not signal:
            sqnr = relative = cosine = math.nan
        else:
            sqnr = 10 * math.log10(signal / error) if error else math.inf
            relative = math.sqrt(error / signal)
            cosine = float(x @ q) / math.sqrt(signal * value) if value else math.nan
        return {"sqnr_db": sqnr, "relative_error": relative, "cosine": cosine, "max_error": float(np.abs(x - q).max())}


def _flat(rows: list[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(row, dtype=np.float64).reshape(-1) for row in rows])
