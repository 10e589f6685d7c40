"""docs/recipes.md lists every field of a recipe as it is now."""

from collections.abc import Iterator

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
