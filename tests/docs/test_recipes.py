"""docs/recipes.md lists every field of a recipe as it is now."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, Field

from amenable.recipe import Recipe
from amenable.recipe_loading import packaged_recipes


def test_the_page_is_current(make):
    assert make.pages()[make.RECIPES] == make.RECIPES.read_text(), "run `python docs/make.py`"


def test_a_changed_default_makes_the_page_stale(make):
    page = make.recipes_page(make.RECIPES.read_text(), Recipe(name="NAME"))
    changed = Recipe.model_validate({"name": "NAME", "ppo": {"clip": 0.3}})
    assert make.recipes_page(page, Recipe(name="NAME")) == page
    assert make.recipes_page(page, changed) != page


def test_every_field_has_a_row_with_its_default_and_says_what_it_is(make):
    found = make.groups(Recipe(name="NAME"))
    text = make.recipe_fields(Recipe(name="NAME"))
    for model, uses in found.items():
        assert (model.__doc__ or "").strip(), model
        for use in uses:
            assert use.path == "" or f"- `{use.path}`: {use.description}" in text
        for name, field in model.model_fields.items():
            assert (field.description or "").strip(), f"{model.__name__}.{name} does not say what it is"
            if make.inner_model(field.annotation) is None:
                assert f"| `{name}` |" in text
    assert {use.path for uses in found.values() for use in uses} >= {"", "ppo.policy", "corpus.prompts", "world.web"}


SOURCE = re.compile(
    r"InstructGPT|Stiennon|Ziegler|N\+ code|TRL|Hilton|PyTorch|Llama 2|OpenAI|[Hh]ouse (default|option)"
    r"|Default: (Ray Train|vLLM)'s|W&B's default"
    r"|\bOurs\b|the project's|[Pp]rototype|[Mm]easured|Chosen for this world|\bours\b"
)
"""Whose a default is: the paper, a named code, a measurement, or this project."""

COUNTED = re.compile(
    r"actors|answers|batches|characters|checkpoints|choices|demonstrations|documents|episodes|generators|GPUs|heads"
    r"|labelers|layers|models|passes|processes|prompts|rankings|ranks|replicas|requests|responses|restarts|rows|runs"
    r"|samples|scorers|references|sequences|slots|snapshots|steps|strings|times|tokens|updates|users|votes|words",
    re.IGNORECASE,
)
MEASURED = re.compile(
    r"seconds|nats|MiB|GiB|bytes|share|how often|standard deviation|rate|epsilon|coefficient|factor|decay|clip|penalty"
    r"|temperature|discount|γ|β|λ|weight|score|seed|width|vocabulary|base|logprobs|n \(|k\b|norm|betas|cap|nucleus"
    r"|replies|drawn from",
    re.IGNORECASE,
)


def untold(make: Any, model: type[BaseModel], default_of: Any) -> list[str]:
    """The fields of a group that do not say in which unit they are, or whose default they have."""
    found = []
    for name, field in model.model_fields.items():
        if make.inner_model(field.annotation) is not None:
            continue
        says = field.description or ""
        default = default_of(name)
        if default is not ... and default is not None and not SOURCE.search(says):
            found.append(f"{model.__name__}.{name}: whose default is it?")
        is_number = "number" in make.allowed(name, field)
        if is_number and not (make.unit_of(name) or COUNTED.search(says) or MEASURED.search(says)):
            found.append(f"{model.__name__}.{name}: in which unit is it?")
    return found


def test_every_field_says_its_unit_and_whose_default_it_has(make):
    wrong = []
    for model, uses in make.groups(Recipe(name="NAME")).items():
        wrong += untold(make, model, lambda name, model=model, use=uses[0]: make.default_of(model, name, use.values))
    assert [each for each in wrong if each != "Recipe.name: whose default is it?"] == []


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("How many rows. House default.", []),
        ("How large. House default.", ["Size.size: in which unit is it?"]),
        ("How many rows.", ["Size.size: whose default is it?"]),
    ],
)
def test_a_field_that_says_too_little_is_seen(make, description, problem):
    class Size(BaseModel):
        """A size."""

        size: int = Field(default=1, description=description)

    assert untold(make, Size, lambda name: make.default_of(Size, name, None)) == problem


def test_a_name_that_ends_with_a_unit_says_it(make):
    class Waits(BaseModel):
        """Waits."""

        grace_s: float | None = Field(default=1.0, gt=0, description="Grace. House default.")
        max_tokens: int = Field(default=1, ge=1, description="Most. House default.")

    fields = Waits.model_fields
    assert make.allowed("grace_s", fields["grace_s"]) == "number of seconds or null, > 0"
    assert make.allowed("max_tokens", fields["max_tokens"]) == "whole number of tokens, ≥ 1"


def test_places_with_other_defaults_have_a_column_each(make):
    class Inner(BaseModel):
        """Inner settings."""

        size: int = Field(default=1, ge=1, description="How large. House default.")

    class Outer(BaseModel):
        """Outer settings."""

        name: str = Field(description="The name.")
        left: Inner = Field(Inner(), description="On the left.")
        right: Inner | None = Field(Inner(size=2), description="On the right.")

    text = make.recipe_fields(Outer(name="NAME"))
    assert "| `name` | text | required | The name. |" in text
    assert "| field | values | `left` | `right` | what it is, and whose default |" in text
    assert "| `size` | whole number, ≥ 1 | 1 | 2 | How large. House default. |" in text


def test_every_packaged_recipe_is_introduced(make):
    text = make.RECIPES.read_text()
    introduced = set(named(text))
    assert introduced == {recipe.name for recipe in packaged_recipes()}


def named(text: str) -> Iterator[str]:
    """The recipes in the page's first table: rows that begin with a link to recipes/."""
    for line in text.splitlines():
        name, _, rest = line.removeprefix("| [").partition("](../recipes/")
        if line.startswith("| [") and rest.startswith(f"{name}.yaml"):
            yield name
