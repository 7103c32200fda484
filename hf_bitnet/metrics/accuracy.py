"""AccuracyRetention: the share of the full-precision model's accuracy that a quantized one keeps. Own.

retention = accuracy(predictions) / accuracy(reference_predictions)
"""

from __future__ import annotations

import math
from typing import Any

import evaluate
from datasets import Features, Value

from .base import OfflineMetric

_DESCRIPTION = "Share of the full-precision model's accuracy that a quantized model keeps, and how often the two agree."
_INPUTS = """
Args:
    predictions: labels (int or str) that the quantized model gives.
    reference_predictions: labels that the full-precision model gives, for the same examples.
    references: the true labels.
Returns:
    accuracy, full_precision_accuracy: shares of true labels, 0 to 1.
    retention: the first over the second; NaN where the full-precision model is never right.
    agreement: share of examples for which both models give the same label.
Example:
    AccuracyRetention().compute(predictions=[1, 0, 1], reference_predictions=[1, 0, 0], references=[1, 0, 0])
"""


class AccuracyRetention(OfflineMetric):
    """Compares two models' labels with the true ones; see `inputs_description`.

    `evaluate.combine` hands what `compute` is given to every metric; give it the predictions by `add_batch`.
    """

    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "references", "reference_predictions")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            # whole numbers first: everything else would be taken as text
            features=[Features({name: Value(kind) for name in names}) for kind in ("int64", "string")],
        )

    def _compute(  # type: ignore[override]
        self, *, predictions: list[Any], references: list[Any], reference_predictions: list[Any]
    ) -> dict[str, float]:
        number = len(references)
        found = _equal(predictions, references) / number
        before = _equal(reference_predictions, references) / number
        return {
            "accuracy": found,
            "full_precision_accuracy": before,
            "retention": found / before if before else math.nan,
            "agreement": _equal(predictions, reference_predictions) / number,
        }


def _equal(these: list[Any], those: list[Any]) -> int:
    return sum(this == that for this, that in zip(these, those, strict=True))
