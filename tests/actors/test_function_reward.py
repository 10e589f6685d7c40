"""A Python function that scores: where it is found, and what ends the run."""

import pytest

from actors.function_reward import FunctionReward
from corpus.problems import RunProblem, UsageProblem


def test_a_function_in_the_working_directory_is_called_with_the_texts(scorer_module):
    name = scorer_module(
        "def count(prompts, responses):\n    return [len(p) - len(r) for p, r in zip(prompts, responses)]\n"
    )
    assert FunctionReward(f"{name}:count").score(["abc", "d"], ["x", "yz"], [], []) == [2.0, -1.0]


def test_a_function_that_is_not_there_is_a_usage_problem(scorer_module):
    with pytest.raises(UsageProblem, match="cannot be imported"):
        FunctionReward("no_such_module:f")
    with pytest.raises(UsageProblem, match="has no function f"):
        FunctionReward(scorer_module("g = 1\n") + ":f")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def f(:\n", "SyntaxError: "),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('bye')\n", "SystemExit: bye"),
        ("raise ImportError('no library\\nof that kind')\n", "ImportError: no library of that kind"),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_module_that_fails_as_it_is_imported_is_a_usage_problem(scorer_module, code, says):
    with pytest.raises(UsageProblem, match=rf"reward function .*:f: the module cannot be imported \({says}"):
        FunctionReward(scorer_module(code) + ":f")


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        ("return [1 / 0 for _ in responses]", "ZeroDivisionError: division by zero"),
        ("raise ValueError('first\\nsecond')", "ValueError: first second"),
    ],
)
def test_a_function_that_raises_ends_the_run_with_what_and_where(scorer_module, code, raised):
    name = scorer_module(f"def f(prompts, responses):\n    {code}\n")
    says = rf"^reward function {name}:f: it raised {raised} \(.*{name}\.py:2\)\.$"
    with pytest.raises(RunProblem, match=says):
        FunctionReward(f"{name}:f").score(["a"], ["b"], [], [])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[0.0]", "returned 1 scores for 2 responses"),
        ("[0.0, float('nan')]", "response 1 of 2 is nan"),
        ("[float('-inf'), 0]", "response 0 of 2 is -inf"),
        ("['good', 'bad']", "should return a list of 2 numbers"),
        ("None", "should return a list of 2 numbers"),
    ],
)
def test_scores_that_are_no_finite_numbers_end_the_run_naming_the_scorer(scorer_module, returned, message):
    reward = FunctionReward(scorer_module(f"def f(prompts, responses):\n    return {returned}\n") + ":f")
    with pytest.raises(RunProblem, match=rf"reward function .*:f: .*{message}"):
        reward.score(["a", "b"], ["c", "d"], [], [])
