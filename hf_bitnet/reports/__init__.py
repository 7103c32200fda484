"""Floor 4: how what was found about layers is shown: as a table, as plain data, as a chart."""

from .chart import Bar, bar_chart
from .lines import Line, line_chart
from .page import report_page
from .report import Column, LayerRow, Report, described, percent

__all__ = ["Bar", "Column", "LayerRow", "Line", "Report", "bar_chart", "described", "line_chart", "percent", "report_page"]
