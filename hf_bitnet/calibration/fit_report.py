"""What `fit_weights` did to each layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..reports import Column, LayerRow, Report, percent


@dataclass(frozen=True)
class FitRow(LayerRow):
    """One layer that `fit_weights` looked at.

    Attributes:
        rounding_error: relative output error ||y_quantized - y|| / ||y|| with plainly rounded weights. error: after the fit.
            y is the full-precision model's output at this place, both on the calibration batches; None without batches.
        changed: share of the codes that differ from plain rounding.
        note: why the layer was left as it was, or "".
    """

    rounding_error: float | None
    error: float | None
    changed: float
    note: str


class FitReport(Report[FitRow]):
    """Rows in the order in which the layers were fitted."""

    title = "Output error by layer after the fit"
    explanation = "‖quantized − full precision‖ / ‖full precision‖ on the calibration batches"
    ranked_by = "error"
    columns = (
        Column("rounded", "rounding_error", percent),
        Column("fitted", "error", percent),
        Column("codes changed", "changed", percent),
        Column("", "note", left=True),
    )

    @staticmethod
    def tick_text(value: float) -> str:
        return f"{100 * value:g} %"

    def summary(self) -> str:
        measured = [row for row in self.rows if row.error is not None and row.rounding_error is not None]
        weights = sum(row.weights for row in measured)
        if not weights:
            return super().summary()
        before, after = (
            sum(getattr(row, field) * row.weights for row in measured) / weights for field in ("rounding_error", "error")
        )
        return f"{super().summary()}; mean output error {percent(before)} rounded, {percent(after)} fitted"
