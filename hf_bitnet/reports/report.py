"""What every report shares: a sequence of rows, one a layer, that prints as a table, turns into plain data and into a chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, TypeVar, overload

from ..modules import QuantizedLayer, unwrapped
from ..quantizers import ACTIVATION_SCHEMES
from .chart import Bar, bar_chart


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer.

    Attributes:
        name: dotted module name. scheme: of the weight, with its scale rule and granularity. activation: scheme of the input.
        bits: per weight, as people name them. weights: how many.
    """

    name: str
    scheme: str
    activation: str
    bits: float
    weights: int


Row = TypeVar("Row", bound=LayerRow)


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the field it shows, and how; None is shown as a dash."""

    heading: str
    field: str
    form: Callable[[Any], str] = str
    left: bool = False

    def cell(self, row: Any) -> str:
        value = getattr(row, self.field)
        return "-" if value is None else self.form(value)


LAYER_COLUMNS = (
    Column("layer", "name", left=True),
    Column("weights as", "scheme", left=True),
    Column("inputs as", "activation", left=True),
    Column("bits", "bits", "{:g}".format),
    Column("weights", "weights", "{:,}".format),
)


class Report(Sequence[Row], Generic[Row]):
    """A sequence of rows. `str()` is an aligned table.

    Class attributes:
        title: of the chart. explanation: what the ranked number is, in words. ranked_by: the field that says how much a
        layer is hurt; larger is worse. columns: of the table, after those of every layer.
    """

    title: ClassVar[str]
    explanation: ClassVar[str]
    ranked_by: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def badness(self, row: Row) -> float | None:
        """How much the layer is hurt, or None where that is not known; NaN counts as worst."""
        return getattr(row, self.ranked_by)

    def worst(self, count: int | None = None) -> list[Row]:
        """The rows whose badness is known, worst first."""

        def key(row: Row) -> float:
            badness = self.badness(row)
            assert badness is not None
            return math.inf if math.isnan(badness) else badness

        return sorted((row for row in self.rows if self.badness(row) is not None), key=key, reverse=True)[:count]

    @staticmethod
    def tick_text(value: float) -> str:
        """A number on the axis of the chart."""
        return f"{value:g}"

    @property
    def average_bits(self) -> float:
        """Bits per weight over the quantized weights."""
        return sum(row.bits * row.weights for row in self.rows) / max(sum(row.weights for row in self.rows), 1)

    def summary(self) -> str:
        """What is to be said about all layers together, in one line."""
        weights = sum(row.weights for row in self.rows)
        return f"{len(self.rows)} layers, {weights:,} weights, {self.average_bits:.2f} bits a weight"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; NaN and infinities become None, which JSON has."""
        return {"layers": [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows]}

    def to_svg(self, limit: int = 40) -> str:
        """A bar chart of the `limit` worst layers, worst first, as SVG text."""
        shape = next(column.form for column in self.columns if column.field == self.ranked_by)
        ranked = self.worst()
        bars = [Bar(row.name, self.badness(row) or 0.0, shape(self.badness(row))) for row in ranked[:limit]]
        hidden = len(ranked) - len(bars)
        footer = [f"and {hidden} more layer{'s' if hidden > 1 else ''}, less hurt than these"] if hidden else []
        return bar_chart(self.title, self.explanation, bars, [*footer, *self.summary().split("; ")], self.tick_text)

    def __str__(self) -> str:
        columns = (*LAYER_COLUMNS, *self.columns)
        table = [[column.heading for column in columns], *([column.cell(row) for column in columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if column.left else cell.rjust(width)
                for cell, width, column in zip(line, widths, columns, strict=True)
            )
            for line in table
        ]
        return "\n".join([*lines, "", self.summary()])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.rows)} layers)"


def described(name: str, layer: QuantizedLayer) -> dict[str, Any]:
    """The fields of `LayerRow`."""
    quantizer = layer.quantizer
    size = f" of {quantizer.group_size}" if quantizer.group_size else ""
    activation = next((key for key in ACTIVATION_SCHEMES if ACTIVATION_SCHEMES.get(key) is layer.activation), "other")
    return {
        "name": unwrapped(name),
        "scheme": f"{quantizer.scheme}, {quantizer.scale_rule} per {quantizer.granularity}{size}",
        "activation": activation,
        "bits": quantizer.bits,
        "weights": layer.in_features * layer.out_features,
    }


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
