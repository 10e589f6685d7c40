"""Plots of braille dots show which way a line goes."""

import pytest

from amenable.braille import braille_plot, resampled

BLANK = chr(0x2800)


def dots(plot: list[str]) -> list[tuple[int, int]]:
    """(column, row from the bottom) of every dot."""
    places = {0x01: (0, 0), 0x02: (0, 1), 0x04: (0, 2), 0x40: (0, 3), 0x08: (1, 0), 0x10: (1, 1), 0x20: (1, 2)}
    places[0x80] = (1, 3)
    top = len(plot) * 4 - 1
    return [
        (2 * cell + x, top - (4 * line + y))
        for line, text in enumerate(plot)
        for cell, character in enumerate(text)
        for bit, (x, y) in places.items()
        if (ord(character) - 0x2800) & bit
    ]


def highest(plot: list[str], column: int) -> int:
    return max(row for at, row in dots(plot) if at == column)


def test_a_line_that_rises_ends_higher_than_it_begins_and_one_that_falls_lower():
    rising, falling = braille_plot([1, 2, 3, 4], 10, 2), braille_plot([4, 3, 2, 1], 10, 2)
    assert (highest(rising, 0), highest(rising, 19)) == (0, 7)
    assert (highest(falling, 0), highest(falling, 19)) == (7, 0)


def test_a_line_has_no_gaps():
    filled = dots(braille_plot([0, 100, 0, 50, 50, 3], 12, 3))
    for column in range(23):
        here = [row for at, row in filled if at == column]
        there = [row for at, row in filled if at == column + 1]
        assert min(abs(one - other) for one in here for other in there) <= 1


@pytest.mark.parametrize(("values", "lit"), [([], 0), ([3.0], 1), ([2.0, 2.0, 2.0], 20)])
def test_few_values_and_equal_ones_are_drawn_too(values, lit):
    plot = braille_plot(values, 10, 2)
    assert [len(line) for line in plot] == [10, 10]
    assert len(dots(plot)) == lit
    assert values or set("".join(plot)) == {BLANK}


def test_many_values_become_means_of_equal_parts():
    assert resampled([1, 3, 5, 7], 2) == [2, 6]
    assert resampled([1, 3], 10) == [1, 3]
    assert len(resampled(range(1000), 7)) == 7
