"""The report's pictures: SVG that follows the page's colours (light and dark) and needs nothing outside the file.

Curves are drawn in a small fixed frame, so that their text stays readable where a page is as narrow as a telephone;
dot-interval strips and bars use percentages of the width, so that they stretch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from evaluation.markup import Markup, element

POINTS = 150
"""Points of a drawn curve; longer ones are shown as means of neighbouring steps."""

_HOVER_POINTS = 50
_TOO_LARGE = 1e300  # beyond it, differences and sums overflow
_WIDTH, _HEIGHT = 360, 190
_TOP, _RIGHT, _BOTTOM = 10, 12, 36
_CHARACTER = 6.3  # width of a digit of the tick labels, in the frame's units


@dataclass(frozen=True)
class Series:
    """One curve: `x` and `y` of one length, NaN where nothing is known; `colour` names a class of the page's style."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Interval:
    """One row of a dot-interval picture, in the picture's units; `under` the row above, its dot a ring."""

    label: str
    rate: float
    low: float
    high: float
    text: str
    colour: str
    under: bool = False


def line_chart(
    series: Sequence[Series], x_label: str, *, dots: bool = False, origin: bool = False, reference: float | None = None
) -> Markup | None:
    """Curves over a common x; None where there is no finite point. `dots` marks the points, `origin` begins x at 0,
    `reference` draws a dashed level."""
    drawn = [thin(one) for one in series]
    drawn = [one for one in drawn if len(one.x)]
    if not drawn:
        return None
    xs = np.concatenate([np.asarray(one.x, dtype=float) for one in drawn])
    ys = np.concatenate([np.asarray(one.y, dtype=float) for one in drawn])
    if reference is not None:
        ys = np.append(ys, reference)
    x_low, x_high = _some_width(min(0.0, xs.min()) if origin else xs.min(), xs.max())
    x_ticks, y_ticks = ticks(x_low, x_high, 5), ticks(ys.min(), ys.max(), 4)
    y_low, y_high = min(y_ticks[0], ys.min()), max(y_ticks[-1], ys.max())
    y_labels = tick_labels(y_ticks)
    left = 10 + _CHARACTER * max(len(label) for label in y_labels)

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (_WIDTH - _RIGHT - left)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _BOTTOM - _TOP)

    parts: list[Markup] = []
    for value, label in zip(y_ticks, y_labels, strict=True):
        height = up(value)
        parts.append(element("line", class_="grid", x1=left, x2=_WIDTH - _RIGHT, y1=height, y2=height))
        parts.append(element("text", label, x=left - 6, y=height + 4, text_anchor="end"))
    inside = [value for value in x_ticks if x_low <= value <= x_high]
    for value, label in zip(inside, tick_labels(inside), strict=True):
        parts.append(element("text", label, x=across(value), y=_HEIGHT - _BOTTOM + 15, text_anchor="middle"))
    middle = (left + _WIDTH - _RIGHT) / 2
    parts.append(element("text", x_label, class_="axis", x=middle, y=_HEIGHT - 4, text_anchor="middle"))
    if reference is not None:
        height = up(reference)
        parts.append(element("line", class_="reference", x1=left, x2=_WIDTH - _RIGHT, y1=height, y2=height))
    for one in drawn:
        points = [(across(x), up(y)) for x, y in zip(one.x, one.y, strict=True)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(element("path", class_=f"curve {one.colour}", d=path))
        if dots or len(points) == 1:
            parts.extend(element("circle", class_=f"mark {one.colour}", cx=x, cy=y, r=3.0) for x, y in points)
        every = max(1, math.ceil(len(points) / _HOVER_POINTS))
        for (x, y), x_value, y_value in list(zip(points, one.x, one.y, strict=True))[::every]:
            title = element("title", f"{x_label} {number(x_value)}: {one.name} {number(y_value)}")
            parts.append(element("circle", title, class_=f"hit {one.colour}", cx=x, cy=y, r=5.0))
    names = ", ".join(one.name for one in drawn)
    return element(
        "svg", parts, class_="chart", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{names} by {x_label}"
    )


def thin(series: Series, limit: int = POINTS) -> Series:
    """The finite points of `series`; where more than `limit`, means of neighbours."""
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    finite = (np.abs(x) < _TOO_LARGE) & (np.abs(y) < _TOO_LARGE)  # False for NaN too
    x, y = x[finite], y[finite]
    if len(x) > limit:
        x = np.array([part.mean() for part in np.array_split(x, limit)])
        y = np.array([part.mean() for part in np.array_split(y, limit)])
    return Series(series.name, x.tolist(), y.tolist(), series.colour)


def interval_chart(
    rows: Sequence[Interval], *, reference: float, span: tuple[float, float] | None = None, unit: str = "%"
) -> Markup:
    """Dots with their intervals, one row each, over a common scale that holds `reference` (a dashed level) and `span`.

    HTML rows with an SVG strip each: label, strip, figure. On a narrow page the strip goes below its label.
    """
    low = min([reference, *(span or ()), *(row.low for row in rows)])
    high = max([reference, *(span or ()), *(row.high for row in rows)])
    margin = 0.06 * max(high - low, 1e-9)
    low, high = low - margin, high + margin
    shown = [value for value in ticks(low, high, 6) if low <= value <= high]

    def across(value: float) -> str:
        return f"{2 + 96 * (value - low) / (high - low):.2f}%"

    def strip(*marks: Markup) -> Markup:
        grid = [element("line", class_="grid", x1=across(v), x2=across(v), y1="0", y2="100%") for v in shown]
        level = element("line", class_="reference", x1=across(reference), x2=across(reference), y1="0", y2="100%")
        return element("svg", grid, level, marks, class_="strip", aria_hidden="true")

    def row_of(row: Interval) -> Markup:
        whisker = element(
            "line", class_=f"whisker {row.colour}", x1=across(row.low), x2=across(row.high), y1="50%", y2="50%"
        )
        kind = "ring" if row.under else "dot"
        dot = element("circle", class_=f"{kind} {row.colour}", cx=across(row.rate), cy="50%", r=6)
        return element(
            "div",
            element("span", row.label, class_="interval-label"),
            strip(whisker, dot),
            element("span", row.text, class_="interval-text"),
            class_="interval under" if row.under else "interval",
        )

    labels = [
        element("text", f"{label} {unit}".strip(), x=across(value), y="14", text_anchor="middle")
        for value, label in zip(shown, tick_labels(shown), strict=True)
    ]
    axis = element(
        "div",
        element("span", class_="interval-label"),
        element("svg", labels, class_="strip ticks", aria_hidden="true"),
        element("span", class_="interval-text"),
        class_="interval interval-axis",
    )
    return element("div", [row_of(row) for row in rows], axis, class_="intervals")


def bar_chart(rows: Sequence[tuple[str, float, str]]) -> Markup:
    """Horizontal bars: (label, value ≥ 0, the value in words)."""
    largest = max((value for _, value, _ in rows), default=0.0) or 1.0
    return element(
        "div",
        [
            element(
                "div",
                element("span", label, class_="interval-label"),
                element(
                    "svg",
                    element("rect", class_="bar", x="2%", y="25%", height="50%", width=f"{96 * value / largest:.2f}%"),
                    class_="strip",
                    aria_hidden="true",
                ),
                element("span", text, class_="interval-text"),
                class_="interval",
            )
            for label, value, text in rows
        ],
        class_="intervals",
    )


def histogram(values: Sequence[float], edges: Sequence[float], tallest: float, colour: str, x_label: str) -> Markup:
    """Shares of `values` between `edges`, drawn to `tallest` (a share), with a tick at their mean."""
    frame, height, bottom = 250, 92, 30
    counts, _ = np.histogram(values, bins=np.asarray(edges))
    shares = counts / max(1, len(values))
    low, high = float(edges[0]), float(edges[-1])

    def across(value: float) -> float:
        return 8 + (value - low) / (high - low) * (frame - 16)

    parts = []
    for share, start, end in zip(shares, edges[:-1], edges[1:], strict=True):
        tall = share / tallest * (height - bottom - 8)
        span = f"{start:g}" if end - start == 1 else f"{start:g}–{end - 1:g}"
        title = element("title", f"{span} {x_label}: {100 * share:.1f} %")
        width = max(0.5, across(end) - across(start) - 1)
        place = {"x": across(start), "y": height - bottom - tall, "width": width, "height": tall}
        parts.append(element("rect", title, class_=f"fill {colour}", **place))
    parts.append(element("line", class_="base", x1=8, x2=frame - 8, y1=height - bottom, y2=height - bottom))
    mean = float(np.mean(values))
    parts.append(
        element("line", class_="mean", x1=across(mean), x2=across(mean), y1=height - bottom - 58, y2=height - bottom)
    )
    shown = [value for value in ticks(low, high, 5) if low <= value <= high]
    for value, label in zip(shown, tick_labels(shown), strict=True):
        parts.append(element("text", label, x=across(value), y=height - bottom + 15, text_anchor="middle"))
    parts.append(element("text", x_label, class_="axis", x=frame - 8, y=height - 2, text_anchor="end"))
    return element(
        "svg", parts, class_="chart", viewBox=f"0 0 {frame} {height}", role="img", aria_label=f"mean {number(mean)}"
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` round values that cover [low, high]: the first is at most `low`, the last at least `high`."""
    low, high = _some_width(low, high)
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The values written with as many places as their distance needs."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest and (largest >= 1e5 or largest < 1e-3):
        written = ["0" if value == 0 else _scientific(value, 1) for value in values]
        if len(set(written)) < len(written):
            return ["0" if value == 0 else _scientific(value, 3) for value in values]
        return written
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    places = max(0, min(6, 1 - math.floor(math.log10(step) + 1e-9)))
    written = [f"{value:.{places}f}" for value in values]
    while places and all(label.endswith("0") for label in written):
        places -= 1
        written = [f"{value:.{places}f}" for value in values]
    return [label.replace("-", "−") if float(label) else "0" for label in written]


def number(value: float) -> str:
    """A figure for a person: four significant digits, thousands apart, powers of ten where it is tiny or huge."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    if isinstance(value, int) and abs(value) < 1e7:
        return f"{value:,}".replace("-", "−")
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return _scientific(value, 1)
    places = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _scientific(value: float, places: int) -> str:
    mantissa, exponent = f"{value:.{places}e}".split("e")
    superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa.rstrip('0').rstrip('.')}·10{superscript}".replace("-", "−")


def _some_width(low: float, high: float) -> tuple[float, float]:
    """[low, high], widened where it has no width."""
    if high - low <= 1e-12 * max(1e-12, abs(low), abs(high)):
        half = abs(low) * 0.1
        return (low - half, high + half) if half else (0.0, 1.0)
    return low, high
