"""A horizontal bar chart as one SVG text, without any dependency. Own.

Text and grid take `currentColor`, and the colours follow the reader's light or dark scheme, so it reads well in a README,
in a notebook and on a page of either kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_ROW, _BAR = 20, 12
_BAR_SPACE = 440
_TOP = 76
_MARGIN = 16
# of the 12 px font; an estimate is enough, since labels are cut to a number of characters
_CHARACTER = 6.7
_LONGEST_LABEL = 44

_STYLE = """
.hfb { color: #1f2328; font: 12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
.hfb text { fill: currentColor; }
.hfb .head { font-size: 14px; font-weight: 600; }
.hfb .quiet { opacity: 0.7; }
.hfb line { stroke: currentColor; stroke-opacity: 0.14; }
.hfb line.zero { stroke-opacity: 0.55; }
.hfb .bar { fill: #3b78c4; }
.hfb .broken { fill: #c4443b; }
.hfb .curve { fill: none; stroke: #3b78c4; stroke-width: 2; }
.hfb .other { stroke: #b3541e; }
.hfb .faint { stroke-opacity: 0.35; stroke-width: 1; }
.hfb line.divider { stroke-opacity: 0.55; stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) {
  .hfb { color: #e6edf3; }
  .hfb .bar { fill: #6aa5e8; }
  .hfb .broken { fill: #f0776c; }
  .hfb .curve { stroke: #6aa5e8; }
  .hfb .other { stroke: #e8965f; }
}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length (NaN and infinite ones are drawn over the whole width) and the text at its end."""

    label: str
    value: float
    text: str


def bar_chart(
    title: str,
    subtitle: str,
    bars: Sequence[Bar],
    footer: Sequence[str] = (),
    tick_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """The SVG of the bars, from top to bottom in the order given, with lines of text below them."""
    labels = [_cut(bar.label) for bar in bars]
    left = _MARGIN + max([len(label) for label in labels] or [0]) * _CHARACTER + 10
    width = left + _BAR_SPACE + _MARGIN + max([len(bar.text) for bar in bars] or [0]) * _CHARACTER + 8
    # a chart of short names must not cut its own texts
    width = max(
        [width, 2 * _MARGIN + 8.2 * len(title), *(2 * _MARGIN + _CHARACTER * len(text) for text in (subtitle, *footer))]
    )
    bottom = _TOP + _ROW * len(bars) + 6
    height = bottom + 12 + _ROW * len(footer)
    finite = [bar.value for bar in bars if math.isfinite(bar.value)]
    low = min([0.0, *finite])
    marks = ticks(low, max([0.0, *finite]))
    high = marks[-1]

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * _BAR_SPACE

    parts = [text_at(_MARGIN, 22, title, "head"), text_at(_MARGIN, 40, subtitle, "quiet")]
    for tick in marks:
        kind = ' class="zero"' if tick == 0 else ""
        parts.append(f'<line{kind} x1="{x(tick):.1f}" y1="{_TOP - 2}" x2="{x(tick):.1f}" y2="{bottom}"/>')
        parts.append(text_at(x(tick), _TOP - 8, tick_text(tick), "quiet", "middle"))
    for i, (bar, label) in enumerate(zip(bars, labels, strict=True)):
        parts += _bar(bar, label, _TOP + _ROW * i + (_ROW - _BAR) / 2 + 2, left, x)
    parts += [text_at(_MARGIN, bottom + _ROW * (i + 1), text, "quiet") for i, text in enumerate(footer)]
    return svg(title, width, height, parts)


def svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """The whole image, in pixels, with the style of every chart."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hfb" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bar(bar: Bar, label: str, y: float, left: float, x: Callable[[float], float]) -> list[str]:
    broken = not math.isfinite(bar.value)
    start, end = (left, left + _BAR_SPACE) if broken else sorted((x(0.0), x(bar.value)))
    middle = y + _BAR - 2
    return [
        text_at(left - 10, middle, label, anchor="end"),
        f'<rect class="{"broken" if broken else "bar"}" x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 0.5):.1f}" '
        f'height="{_BAR}" rx="2"><title>{escape(bar.label)}: {escape(bar.text)}</title></rect>',
        text_at(end + 6, middle, bar.text, "quiet"),
    ]


def text_at(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """A piece of text; `kind` is its class in the style."""
    attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(text)}</text>'


def _cut(label: str) -> str:
    # the end of a dotted name tells layers apart
    return label if len(label) <= _LONGEST_LABEL else "…" + label[1 - _LONGEST_LABEL :]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or above `low` (at most 0) to at or above `high` (at least 0)."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 5 >= span)
    first, last = math.ceil(low / step - 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, 1 if span > -low else 0) + 1)]


def ticks_within(low: float, high: float, count: int = 6) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that lie in [low, high], about `count` of them.

    Raises ValueError unless low < high, both finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"ticks_within({low}, {high}): needs finite low < high, for example ticks_within(0.0, 10.0)")
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]
