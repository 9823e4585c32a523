"""Bar charts as SVG. Bars and labels are placed in percent, so that text keeps its size at every width."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10
from typing import TYPE_CHECKING

from bulk.markup import element

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bulk.markup import Element

MAX_TICKS = 4
"""Of the vertical axis, without 0."""
HEIGHT_PX = 120


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar.

    Attributes:
        start, end: its sides, as shares of the width of the chart, 0 to 1.
        value: its height, in units of the vertical axis.
        text: shown where a pointer is on it.
    """

    start: float
    end: float
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Label:
    """A label of the horizontal axis, at a share of its width; at the ends it may be inside of it."""

    at: float
    text: str
    anchor: str = "middle"


def bar_chart(
    bars: Sequence[Bar],
    labels: Sequence[Label],
    *,
    description: str,
    marks: Sequence[float] = (),
    least_step: float = 0.0,
) -> Element:
    """A chart with a vertical axis from 0 to at least the highest bar.

    Args:
        bars: from left to right.
        labels: of the horizontal axis.
        description: what the chart shows, for who does not see it.
        marks: shares of the width where a vertical dashed line stands.
        least_step: of the vertical axis; 1 where values are counts.
    """
    top, ticks = _scale(max((bar.value for bar in bars), default=0), least_step)
    lines = [_horizontal(tick / top, _number(tick)) for tick in ticks]
    drawn = [_bar(bar, top) for bar in bars if bar.value]
    dashes = [_line("mark", x1=mark, x2=mark, y1=0, y2=1) for mark in marks]
    texts = [
        element("text", label.text, class_=label.anchor, x=_percent(label.at), y="100%", dy="16")
        for label in labels
    ]
    return element(
        "svg",
        *(part for line in lines for part in line),
        *drawn,
        *dashes,
        *texts,
        class_="chart",
        role="img",
        aria_label=description,
        height=str(HEIGHT_PX),
    )


def _bar(bar: Bar, top: float) -> Element:
    return element(
        "rect",
        element("title", bar.text),
        x=_percent(bar.start),
        y=_percent(1 - bar.value / top),
        width=_percent(bar.end - bar.start),
        height=_percent(bar.value / top),
    )


def _horizontal(share: float, text: str) -> tuple[Element, Element]:
    """A line of the vertical axis and its number."""
    line = _line("axis" if share == 0 else "grid", x1=0, x2=1, y1=1 - share, y2=1 - share)
    return line, element("text", text, class_="end", x="0", y=_percent(1 - share), dx="-6", dy="4")


def _line(kind: str, **places: float) -> Element:
    return element("line", class_=kind, **{name: _percent(share) for name, share in places.items()})


def _scale(highest: float, least_step: float) -> tuple[float, list[float]]:
    """The end of an axis, and its ticks: multiples of 1, 2 or 5 times a power of ten."""
    if highest <= 0:
        return 1.0, [0.0, 1.0]
    power = 10.0 ** floor(log10(highest / MAX_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * MAX_TICKS >= highest)
    step = max(step, least_step)
    count = ceil(highest / step)
    return step * count, [step * number for number in range(count + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"
