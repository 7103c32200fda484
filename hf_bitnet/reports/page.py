"""Reports as one HTML page that loads nothing from elsewhere and runs no script: charts, and tables below them. Own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .report import LAYER_COLUMNS, Report

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --edge: #d1d9e0; --code: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --edge: #3d444d; --code: #1b2129; } }
body { margin: 2rem auto; max-width: 1100px; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--edge); }
.left { text-align: left; }
pre { background: var(--code); padding: 0.8rem 1rem; overflow-x: auto; font-size: 13px; }
"""


def report_page(title: str, reports: Sequence[Report[Any]], notes: Sequence[tuple[str, str]] = ()) -> str:
    """The page as HTML text.

    Args:
        reports: in the order of the page; a report that ranks nothing gets no chart.
        notes: (heading, preformatted text) that follow the title.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f"<h2>{escape(heading)}</h2>\n<pre>{escape(text)}</pre>" for heading, text in notes]
    parts += [_section(report) for report in reports]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(report: Report[Any]) -> str:
    chart = report.to_svg() if report.worst() else ""
    columns = (*LAYER_COLUMNS, *report.columns)
    kinds = [' class="left"' if column.left else "" for column in columns]
    head = "".join(f"<th{kind}>{escape(column.heading)}</th>" for column, kind in zip(columns, kinds, strict=True))
    rows = [
        "".join(f"<td{kind}>{escape(column.cell(row))}</td>" for column, kind in zip(columns, kinds, strict=True))
        for row in report
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<section>\n<h2>{escape(report.title)}</h2>\n<div class="wide">{chart}</div>\n<p>{escape(report.summary())}</p>\n'
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n</section>'
    )
