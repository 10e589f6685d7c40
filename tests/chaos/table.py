"""The table of docs/reliability.md: what came of every cell of the chaos matrix when it was played last."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cells import ALL, Cell

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- Written by make chaos: from here -->", "<!-- to here -->"
COLUMNS = ("role", "phase", "how", "landed", "ended", "seconds", "audit", "result", "played")
HEADINGS = ("role", "phase", "what", "landed", "ended", "s", "audit", "result", "played")
NOT_RUN = ("", "", "", "", "not run", "")


def key_of(row: Sequence[str]) -> tuple[str, ...]:
    """Role, phase and what was done."""
    return tuple(row[:3])


def rows_in(page: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The rows of the table in a page, by role, phase and what was done."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip().strip("|") for line in inside.splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.split("|")) for line in lines[1:]]
    return {key_of(row): row for row in rows if not set(row[0]) <= {"-"}}


def with_rows(page: str, played: Sequence[Mapping[str, str]], where: str, when: str) -> str:
    """`page` with the rows of the cells that were `played`, those that it had of others, and "not run" for the rest.

    `where` says on which machine, `when` on which day and commit: other rows keep theirs. Raises ValueError where the
    page has no place for a table.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no place for the table: it should be between {BEGIN} and {END}")
    rows = rows_in(page)
    rows |= {key_of(row): row for row in (tuple({**each, "played": when}[c] for c in COLUMNS) for each in played)}
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
    lines += [_line(rows.get(_key(cell), (*_key(cell), *NOT_RUN))) for cell in ALL]
    return f"{before}{BEGIN}\n\n{where}\n\n" + "\n".join(lines) + f"\n\n{END}{after}"


def here() -> str:
    """The machine."""
    return f"Played on {os.cpu_count()} cores ({platform.machine()}) that did other work too."


def now() -> str:
    """The day, and the commit whose code this is."""
    commit, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "--", "*.py")
    return f"{datetime.now(UTC):%Y-%m-%d}, {commit}{' and changes' if changed else ''}"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=PAGE.parents[1], capture_output=True, text=True, check=True
    ).stdout.strip()


def _key(cell: Cell) -> tuple[str, ...]:
    return cell.role, cell.phase, cell.what


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
