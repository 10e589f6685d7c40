"""What is said of an error that came from another actor, and that it may be sent on."""

import pickle

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError

from actors.failures import LONGEST_MESSAGE, actor_names, expected_problem, plain_problem
from corpus.problems import RunProblem, UsageProblem


def wrapped(error: Exception, times: int = 2) -> Exception:
    """As it arrives from `times` actors away."""
    for _ in range(times):
        task = RayTaskError("f", "Traceback\n  many\nlines", error, "ray::Scorer.score()", 1, "127.0.0.1")
        error = task.as_instanceof_cause()
    return error


def told(error: Exception) -> UsageProblem | RunProblem:
    return plain_problem(error, {"aa": "reward scorer scoring-0"}, "one", "it could load", "one failed")


@pytest.mark.parametrize("sort", [UsageProblem, RunProblem])
@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_problem_keeps_its_sentence_and_its_sort_and_no_more(sort, times):
    problem = told(wrapped(sort("x: it should be y.", "data/row"), times))
    assert type(problem) is sort
    assert str(problem) == "x: it should be y."
    assert problem.code == "data/row"
    assert not isinstance(pickle.loads(pickle.dumps(problem)), RayError)


def test_another_error_is_one_line_with_its_type():
    assert str(told(wrapped(ValueError("a\n  b")))) == "one failed: ValueError: a b"
    assert str(told(wrapped(StopAsyncIteration()))) == "one failed: StopAsyncIteration"
    assert len(str(told(ValueError("long " * 1000)))) < LONGEST_MESSAGE + 50
    assert expected_problem(wrapped(ValueError("a")), {}, "one", "it could load") is None


def test_a_death_names_the_actor_that_ray_means_else_the_one_that_was_asked():
    died = ActorDiedError()
    died.actor_id = "aa"
    again = "its process was killed or crashed; the same command continues from what was last saved."
    assert str(told(wrapped(died))) == f"reward scorer scoring-0 died before it could load: {again}"
    died.actor_id = "bb"
    assert str(told(died)) == f"one died before it could load: {again}"
    died.error_msg = "the node running low on memory"
    assert "its machine ran short of memory" in str(told(died))


def test_an_actor_that_a_problem_kept_from_starting_tells_it():
    cause = RayTaskError(
        "__init__", "Traceback\ncorpus.problems.UsageProblem: no such table.", UsageProblem("x", "data/row")
    )
    assert str(told(ActorDiedError(cause))) == "no such table."
    assert type(told(ActorDiedError(cause))) is UsageProblem
    bug = ActorDiedError(RayTaskError("__init__", "Traceback\nKeyError: 'x'", KeyError("x")))
    assert expected_problem(bug, {}, "one", "it could load") is None


def test_an_object_that_was_lost_with_its_owner_is_told():
    assert str(told(wrapped(ObjectLostError("0" * 56, None, "")))).startswith(
        "What one needed was lost with the process that held it, before it could load; "
    )


def test_stand_ins_without_an_id_have_no_name():
    assert actor_names([("one", object())]) == {}
