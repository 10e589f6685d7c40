"""A line of numbers as a small plot of braille dots, two columns and four rows of dots a character."""

from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""By row and column of a cell: the bit of Unicode's braille patterns, U+2800 and on."""


def resampled(values: Sequence[float], columns: int) -> list[float]:
    """`values` as at most `columns` numbers, each the mean of its part of them."""
    count = min(columns, len(values))
    parts = [values[place * len(values) // count : (place + 1) * len(values) // count] for place in range(count)]
    return [sum(part) / len(part) for part in parts]


def braille_plot(values: Sequence[float], width: int, height: int) -> list[str]:
    """`height` lines of `width` characters: the values from left to right, joined by straight lines, the least at the
    bottom, the largest at the top. All blank without values; a line that does not move is drawn in the middle."""
    cells = [[0] * width for _ in range(height)]
    columns, rows = width * 2, height * 4
    points = resampled(values, columns) if values else []
    low, span = min(points, default=0.0), max(points, default=0.0) - min(points, default=0.0)
    heights = [(value - low) / span * (rows - 1) if span > 0 else rows / 2 for value in points]
    before: int | None = None
    for column in range(columns if len(heights) > 1 else len(heights)):
        place = column * (len(heights) - 1) / (columns - 1)
        left = int(place)
        right = min(left + 1, len(heights) - 1)
        row = rows - 1 - round(heights[left] + (heights[right] - heights[left]) * (place - left))
        step = 0 if before is None or before == row else (1 if before < row else -1)
        for each in range(row if step == 0 or before is None else before + step, row + (step or 1), step or 1):
            cells[each // 4][column // 2] |= _DOTS[each % 4][column % 2]
        before = row
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
