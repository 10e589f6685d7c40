"""docs/paper.md: every link leads to the line that it names, every default is the recipe's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from amenable.recipe import Recipe
from corpus.files import FileCorpusSettings

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "docs" / "paper.md"
FIELD = re.compile(r"`(?P<key>[a-z_]+(?:\.[a-z_]+)+)`(?: = `(?P<value>[^`]+)`)?")
IN_SIGHT_LINES = 20
"""Code moves a little with every change; a link is good while what it names is on the screen it opens."""
RECIPE = Recipe(name="paper", corpus=FileCorpusSettings())


def default_of(key: str) -> Any:
    """The recipe's default of a field, as JSON has it. AttributeError where there is no such field."""
    found: Any = RECIPE
    for part in key.split("."):
        found = getattr(found, part)
    return list(found) if isinstance(found, tuple) else found


def spoken(text: str) -> Any:
    """The value that a page writes: a number, true, null, a list, or else a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def wrong_defaults(text: str) -> list[str]:
    """What the fields of a table say that is not so: "key: said, is"."""
    wrong = []
    for row in text.splitlines():
        cells = row.split("|")
        if not row.startswith("|") or len(cells) != 6:
            continue
        for field in FIELD.finditer(cells[3]):
            try:
                present = default_of(field["key"])
            except AttributeError:
                wrong.append(f"{field['key']}: there is no such field")
                continue
            if field["value"] and spoken(field["value"]) != present:
                wrong.append(f"{field['key']}: the page says {field['value']}, the default is {present}")
    return wrong


def dead_links(make, text: str, page: Path) -> list[str]:
    """The links to code that a reader who follows them would not find: no such name, or out of sight."""
    dead = []
    for link in make.CODE_LINK.finditer(text):
        path = (page.parent / link["path"]).resolve()
        try:
            distance = int(link["line"]) - make.line_of(path.read_text(), link["symbol"])
        except (FileNotFoundError, KeyError):
            dead.append(f"{link['path']} has no {link['symbol']}")
            continue
        if abs(distance) > IN_SIGHT_LINES:
            dead.append(f"{link['symbol']} is {-distance} lines away from {link['path']}:{link['line']}")
    return dead


def test_every_link_to_code_leads_to_the_definition_that_it_names(make):
    for page in make.PAGES:
        assert dead_links(make, page.read_text(), page) == [], f"{page.name}: run `python docs/make.py`"


def test_a_dead_link_is_seen(make):
    at = make.line_of((ROOT / "objectives" / "ranking.py").read_text(), "ranking_loss")
    link = "[`{}`](../objectives/{}.py#L{})"
    assert dead_links(make, link.format("ranking_loss", "ranking", at), PAPER) == []
    assert dead_links(make, link.format("ranking_lost", "ranking", at), PAPER)
    assert dead_links(make, link.format("ranking_loss", "rankings", at), PAPER)
    assert dead_links(make, link.format("ranking_loss", "ranking", at + 30), PAPER)
    assert make.relinked(link.format("ranking_loss", "ranking", 999), PAPER) == link.format(
        "ranking_loss", "ranking", at
    )


def test_a_link_follows_its_definition_when_it_moves(make):
    source = "import torch\n\n\nclass Loop:\n    size: int = 3\n\n    def run(self):\n        pass\n"
    assert make.line_of(source, "Loop.run") == 7
    assert make.line_of(f"# moved\n{source}", "Loop.run") == 8
    assert make.line_of(source, "Loop.size") == 5
    with pytest.raises(KeyError):
        make.line_of(source, "run")


def test_every_section_of_the_paper_that_is_built_on_has_rows(make):
    text = PAPER.read_text()
    for section in ("3.2", "3.3", "3.4", "3.5", "4", "C.1", "C.2", "C.3", "C.4", "C.5"):
        assert re.search(rf"^## .*\b{re.escape(section)}\b", text, re.MULTILINE), section
    assert len(make.CODE_LINK.findall(text)) > 60


def test_the_defaults_are_what_the_page_says():
    assert wrong_defaults(PAPER.read_text()) == []


def test_a_default_that_is_not_so_is_seen():
    row = "| a | b | `{}` = `{}` | c |"
    assert wrong_defaults(row.format("ppo.clip", "0.3"))
    assert wrong_defaults(row.format("ppo.clap", "0.2"))
    assert wrong_defaults(row.format("sft.optimizer.peak_lr", "9.65e-5"))
    assert not wrong_defaults(row.format("sft.optimizer.peak_lr", "9.65e-6"))
