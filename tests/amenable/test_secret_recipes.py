"""A recipe with a secret in it is refused before anything of it is written; the sentence does not repeat it."""

import pytest

from amenable.early_checks import check_alone
from amenable.recipe import Recipe
from corpus.problems import UsageProblem

CANARY = "zq7-canary-4b1f-secret"


def recipe(**settings: object) -> Recipe:
    return Recipe.model_validate({"name": "x", **settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reward": {"kind": "http", "url": f"https://ann:{CANARY}@host/score"}}, "a password in an address"),
        ({"reward": {"kind": "http", "url": f"https://host/score?api_key={CANARY}"}}, "a key in an option"),
        ({"model": {"base": "hf_" + "aB3" * 8}}, "a Hugging Face token"),
        ({"corpus": {"path": f"/data/{CANARY}.jsonl"}}, "the value of REWARD_TOKEN"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(monkeypatch, settings, says):
    monkeypatch.setenv("REWARD_TOKEN", CANARY)
    with pytest.raises(UsageProblem, match=f"sees the run's directory.*{says} in it; leave it out") as caught:
        check_alone(recipe(**settings))
    assert str(caught.value).startswith("recipe.")
    assert CANARY not in str(caught.value)
    assert "aB3aB3" not in str(caught.value)


def test_a_recipe_that_names_the_variable_passes(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", CANARY)
    check_alone(recipe(reward={"kind": "http", "url": "https://host/score", "token_variable": "REWARD_TOKEN"}))
