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
            features=[Features({name: Value(kind) for name in names}) for kind in ("int64", "string")],
        )

    # by the values: the features convert what they get, and would make one label of "01", "1" and 1.5
    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> Any:
        super()._infer_feature_from_batch(batch)  # refuses empty columns
        return self._features_of([label for column in batch.values() for label in _labels(column)])

    def _infer_feature_from_example(self, example: dict[str, Any]) -> Any:
        return self._features_of([label for value in example.values() for label in _labels([value])])

    def _features_of(self, labels: list[Any]) -> Features:
        numbers, words = self.info.features  # type: ignore[misc]
        if all(isinstance(label, str) for label in labels):
            return words
        if all(isinstance(label, int) for label in labels):
            return numbers
        kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
        raise ValueError(f"AccuracyRetention: labels are all int or all str, these are {kinds}; of logits give argmax(-1)")

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


def _labels(column: Any) -> list[Any]:
    """Python's own numbers and texts, of a list, an array or a tensor."""
    listed = column.tolist() if hasattr(column, "tolist") else list(column)
    return [label.item() if hasattr(label, "item") else label for label in listed]


def _equal(these: list[Any], those: list[Any]) -> int:
    return sum(this == that for this, that in zip(these, those, strict=True))
