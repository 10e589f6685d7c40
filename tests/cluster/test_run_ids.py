"""Run ids: the same for the same run, never shared by two people, and safe in a URL."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.run_ids import OWNER, is_run_id, owner_of, run_hash, run_id, submission_id
from corpus.problems import UsageProblem

RECIPE = {"name": "demo", "seed": 0, "run_directory": "runs/demo", "ppo": {"updates": 4}}


def test_the_same_recipe_of_the_same_owner_in_the_same_place_is_the_same_run():
    reordered = dict(reversed(list(RECIPE.items())))
    assert run_hash("ann", RECIPE, "/data") == run_hash("ann", reordered, "/data")


@pytest.mark.parametrize(
    ("owner", "recipe", "place", "fresh"),
    [
        ("bob", RECIPE, "/data", ""),
        ("ann", {**RECIPE, "seed": 1}, "/data", ""),
        ("ann", {**RECIPE, "ppo": {"updates": 5}}, "/data", ""),
        ("ann", RECIPE, "s3://bucket/runs", ""),
        ("ann", RECIPE, "/data", "3f2a"),
    ],
)
def test_whatever_differs_makes_another_run(owner, recipe, place, fresh):
    assert run_hash(owner, recipe, place, fresh) != run_hash("ann", RECIPE, "/data")


def test_where_a_recipe_says_the_run_lies_counts_by_the_place_alone():
    assert run_hash("ann", {**RECIPE, "run_directory": "x"}, "/data") == run_hash("ann", RECIPE, "/data")


def test_an_id_is_one_and_parts_of_it_are_not():
    run = run_id("ann", "demo-2", run_hash("ann", RECIPE, "/data"))
    assert is_run_id(run)
    for other in (run.partition("/")[2], run[:-1], run.replace("ann/", "Ann/"), f"{run}.1", "", "ann/demo"):
        assert not is_run_id(other)
    assert submission_id(run, 2) == f"{run.replace('/', '.')}.2"


@given(st.from_regex(r"\A[a-z0-9]{1,10}\Z"), st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"), st.integers(1, 99))
def test_a_submission_id_is_one_component_of_a_url(owner, name, attempt):
    found = submission_id(run_id(owner, name, "0123456789"), attempt)
    assert not set(found) & set("/?#% ")


def test_the_owner_is_who_is_given_then_who_the_environment_says_then_who_is_logged_in(monkeypatch):
    assert owner_of("ann", {OWNER: "bob"}) == "ann"
    assert owner_of(None, {OWNER: "bob"}) == "bob"
    monkeypatch.setattr("getpass.getuser", lambda: "Carol")
    assert owner_of(None, {}) == "carol"

    def nobody():
        raise OSError("no such user")

    monkeypatch.setattr("getpass.getuser", nobody)
    with pytest.raises(UsageProblem, match=r"Nobody is logged in here by name.*--owner"):
        owner_of(None, {})


@pytest.mark.parametrize("owner", ["", "a/b", "..", "Ann", "-a", "a b", "x" * 41])
def test_an_owner_that_is_no_plain_name_is_refused(owner):
    with pytest.raises(UsageProblem, match="cannot own a run; give --owner"):
        owner_of(owner)
