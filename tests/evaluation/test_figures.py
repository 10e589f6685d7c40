import math
from xml.etree import ElementTree

import pytest

from evaluation.figures import (
    POINTS,
    Interval,
    Series,
    bar_chart,
    histogram,
    interval_chart,
    line_chart,
    number,
    thin,
    tick_labels,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 17), (1e-7, 4e-5), (5, 5), (0, 0), (-2, -2), (1e9, 1.1e9), (0.999, 1.001)]
)
def test_ticks_cover_the_range_and_have_labels_of_their_own(low: float, high: float):
    found = ticks(low, high, 4)
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(found) <= 8
    assert len(set(tick_labels(found))) == len(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.5, "−0.5"),
        (0.123456, "0.1235"),
        (1234.5678, "1,235"),
        (2.6e-5, "2.6·10⁻⁵"),
        (1.9e9, "1.9·10⁹"),
        (48, "48"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str):
    assert number(value) == text


def test_long_curves_become_means_and_short_ones_stay():
    long = thin(Series("loss", range(3000), [float(x % 2) for x in range(3000)], "is-c1"))
    assert len(long.x) == POINTS
    assert all(value == 0.5 for value in long.y)
    short = Series("loss", [1.0, 2.0], [3.0, 4.0], "is-c1")
    assert thin(short) == short


def test_what_is_not_finite_is_left_out_of_a_curve():
    found = thin(Series("loss", [1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0], "is-c1"))
    assert (found.x, found.y) == ([1, 4], [1.0, 2.0])


def test_without_a_finite_point_there_is_no_chart():
    assert line_chart([Series("loss", [1, 2], [math.nan, math.inf], "is-c1")], "step") is None
    assert line_chart([], "step") is None


@pytest.mark.parametrize("y", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-6, 3e-5, math.nan], [-1.0, 1e6]])
def test_charts_are_well_formed_and_stay_in_their_frame(y: list[float]):
    chart = line_chart([Series("a <b>", range(len(y)), y, "is-c1")], "step", dots=True, origin=True, reference=0.5)
    assert chart is not None
    root = ElementTree.fromstring(chart)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    marks = list(root.iter("circle"))
    assert marks
    for mark in marks:
        assert 0 <= float(mark.attrib["cx"]) <= width
        assert 0 <= float(mark.attrib["cy"]) <= height


def test_a_curve_runs_from_its_first_to_its_last_value():
    chart = line_chart([Series("loss", [0, 10], [2.0, 1.0], "is-c1")], "step")
    assert chart is not None
    curve = next(node for node in ElementTree.fromstring(chart).iter("path"))
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in curve.attrib["d"].lstrip("M").split("L"))
    assert x0 < x1
    assert y0 < y1  # up is towards 0 in SVG


def test_intervals_are_drawn_in_their_order_on_a_scale_with_the_reference():
    rows = [Interval("worse", 40, 35, 45, "40 %", "is-c1"), Interval("better", 70, 60, 80, "70 %", "is-c2", under=True)]
    root = ElementTree.fromstring(interval_chart(rows, reference=50.0))
    worse, better = (float(node.attrib["cx"].rstrip("%")) for node in root.iter("circle"))
    levels = {node.attrib["x1"] for node in root.iter("line") if node.attrib["class"] == "reference"}
    [level] = (float(text.rstrip("%")) for text in levels)
    assert 0 < worse < level < better < 100
    for node in root.iter("line"):
        assert 0 <= float(node.attrib["x1"].rstrip("%")) <= float(node.attrib["x2"].rstrip("%")) <= 100


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(bar_chart([("a", 10.0, "10 s"), ("b", 5.0, "5 s"), ("c", 0.0, "0 s")]))
    widths = [float(node.attrib["width"].rstrip("%")) for node in root.iter("rect")]
    assert widths == pytest.approx([96, 48, 0])


def test_histogram_bars_are_as_tall_as_their_shares():
    root = ElementTree.fromstring(histogram([1, 1, 1, 2], [0, 1, 2, 3], 0.75, "is-c1", "tokens"))
    heights = [float(node.attrib["height"]) for node in root.iter("rect")]
    assert heights[0] == 0
    assert heights[1] == pytest.approx(3 * heights[2])


def test_figures_too_large_to_subtract_are_left_out_of_a_curve():
    series = Series("a", [1.0, 2.0, 3.0], [1e308, 1.0, -1e308], "is-c1")
    assert thin(series).y == [1.0]
    assert line_chart([series], "step") is not None
