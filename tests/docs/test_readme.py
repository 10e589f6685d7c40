"""README.md: its first screen shows what a person needs, and its figures are there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(name: str) -> str:
    """What stands between the comments `<!-- name -->` and `<!-- /name -->`."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no block {name}"
    return found[1]


def test_the_first_screen_has_the_sentence_both_commands_and_the_picture():
    first = README.partition("How `make demo` ends")[0]
    assert len(first.splitlines()) < 20
    assert "make demo" in first
    assert "make test" in first
    assert "](docs/images/report.png)" in first


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("demo-ending", ["```", "Synthetic results", "Report: runs/demo/report.html"]),
        ("times", ["make demo", "make test", "minutes"]),
        ("speed", ["episodes/s", "bench/README.md"]),
    ],
)
def test_what_was_measured_is_filled_in(name, holds):
    assert [text for text in holds if text not in block(name)] == []


def test_the_comparison_says_of_when_it_is_and_gives_every_system_a_cell():
    section = README.partition("## Beside other systems")[2].partition("\n## ")[0]
    assert re.search(r"\b20\d\d\b.*\bOpenRLHF \d", section)
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    assert {row.count("|") for row in rows} == {7}
