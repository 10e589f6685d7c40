"""docs/coming-from.md: what it names of a recipe is there, and defaults "here" are the recipe's."""

import re
from pathlib import Path
from typing import Any

import pytest

from amenable.recipe import Recipe
from corpus.files import FileCorpusSettings

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
RECIPE = Recipe(name="shown", corpus=FileCorpusSettings())
KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)(?:=([^`]+))?`")
HERE = re.compile(r"(−?\d+(?:\.\d+)?|off|k1|float32) here")


def value_of(key: str) -> Any:
    """What the recipe has at `key` by default. AttributeError where it has no such key."""
    found: Any = RECIPE
    for part in key.split("."):
        found = getattr(found, part)
    return found


def shown(value: Any) -> str:
    """A default as the page writes it."""
    return "off" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def wrong_rows(text: str) -> list[str]:
    """The rows of tables that name a key which a recipe has not, a value which it does not take, or another default."""
    wrong = []
    for row in text.splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if not row.startswith("| ") or len(cells) != 3 or cells[1] == "here":
            continue
        defaults = []
        for key, given in KEY.findall(cells[1]):
            try:
                defaults.append(shown(value_of(key)))
                group, _, name = key.rpartition(".")
                if given:
                    annotation = type(value_of(group)).model_fields[name].annotation
                    assert given in getattr(annotation, "__args__", ()), f"{key} is never {given}"
            except (AttributeError, AssertionError) as error:
                wrong.append(f"{cells[0]}: {error}")
        said = HERE.search(cells[2])
        if said and said[1] not in defaults:
            wrong.append(f"{cells[0]}: the page says {said[1]}, the recipe {', '.join(defaults)}")
    return wrong


def test_every_key_is_one_of_a_recipe_and_every_default_its_own():
    assert len(KEY.findall(PAGE)) > 150
    assert wrong_rows(PAGE) == []


@pytest.mark.parametrize(
    ("here", "mind"),
    [
        ("`ppo.klip`", ""),
        ("`reward.kind=oracle`", ""),
        ("`ppo.clip`", "0.1 there, 0.3 here"),
        ("`ppo.policy.gradient_clip`", "1.0 there, 1 here"),
    ],
)
def test_a_wrong_row_is_seen(here, mind):
    assert wrong_rows(f"| `x` | {here} | {mind} |") != []


def test_right_rows_pass():
    assert wrong_rows("| `x` | `ppo.clip`, `ppo.value_clip` | values at 0.5 there, 0.2 here |") == []
    assert wrong_rows("| `x` | `reward.model` with `reward.kind=huggingface` | |") == []


def test_every_system_is_named_with_its_version():
    for system in ("OpenRLHF", "verl", "TRL"):
        assert re.search(rf"\*\*{system} \d+\.\d+\.\d+\*\*", PAGE)
