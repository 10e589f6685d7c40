"""Waiting for real actors: the deadline since the last answer, who owes one, who died, and how much is in flight."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from amenable import interruption
from amenable.answers import IN_FLIGHT, answer_of_each, answers_to_all
from amenable.crew import Crew
from amenable.interruption import Interrupted, listening
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.remote_problems import problem_in
from corpus.problems import RunProblem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


class Scorer:
    """An actor that takes its time; `busiest` is the most calls that were with it at once."""

    def __init__(self) -> None:
        self._with_it = self.busiest = 0
        self._lock = threading.Lock()

    def score(self, rows: list[int], seconds: float = 0.0) -> list[int]:
        with self._lock:
            self._with_it += 1
            self.busiest = max(self.busiest, self._with_it)
        time.sleep(seconds)
        with self._lock:
            self._with_it -= 1
        return [10 * row for row in rows]

    def most_at_once(self) -> int:
        return self.busiest

    def fail(self, text: str) -> None:
        raise KeyError(text)

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    from cluster.session import session

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import the tests
    with session(None, cpus=2):
        yield ray


@pytest.fixture
def start(ray) -> Iterator[Any]:
    """Starts actors by name, each ready."""
    started: list[Any] = []

    def begin(*names: str) -> dict[str, Any]:
        sort = ray.remote(num_cpus=0, max_concurrency=8)(Scorer)
        actors = {name: sort.remote() for name in names}
        started.extend(actors.values())
        ray.get([actor.most_at_once.remote() for actor in actors.values()], timeout=60)
        return actors

    yield begin
    for actor in started:
        ray.kill(actor)


def score(rows: list[int], seconds: float, actor: Any) -> Any:
    return actor.score.remote(rows, seconds)


def test_work_that_takes_longer_than_the_deadline_passes_where_answers_keep_coming(start):
    actors = start("scoring-0")
    calls = [partial(score, [number], 0.8) for number in range(6)]
    began = time.monotonic()
    found = dict(answers_to_all(actors, calls, "rewards", 2.0))
    assert found == {number: [10 * number] for number in range(6)}
    assert time.monotonic() - began > 2.0


def test_at_most_so_many_calls_are_with_each_actor_and_all_of_them_work(ray, start):
    actors = start("scoring-0", "scoring-1")
    calls = [partial(score, [number], 0.05) for number in range(16)]
    assert len(list(answers_to_all(actors, calls, "rewards", 30.0))) == 16
    assert ray.get([actor.most_at_once.remote() for actor in actors.values()], timeout=30) == [IN_FLIGHT, IN_FLIGHT]


def test_where_no_answer_comes_it_is_said_what_was_awaited_and_who_owes_it(start):
    actors = start("scoring-0", "scoring-1")
    calls = {"scoring-0": score([1], 0.0, actors["scoring-0"]), "scoring-1": score([2], 30.0, actors["scoring-1"])}
    with pytest.raises(
        RunProblem, match=r"Waited 1 s for rewards without an answer from scoring-1; .* raise deadline_s"
    ):
        answer_of_each(calls, "rewards", 1.0)


def test_answers_of_each_are_by_the_names_of_the_actors(start):
    actors = start("scoring-0", "scoring-1")
    calls = {"scoring-0": score([1], 0.4, actors["scoring-0"]), "scoring-1": score([2], 0.0, actors["scoring-1"])}
    assert answer_of_each(calls, "rewards", 30.0) == {"scoring-0": [10], "scoring-1": [20]}
    assert list(answer_of_each(calls, "rewards", 30.0)) == ["scoring-0", "scoring-1"]


def test_an_actor_that_is_killed_is_named_in_one_sentence(start):
    actors = start("scoring-0", "scoring-1")
    calls = {"scoring-0": score([1], 0.0, actors["scoring-0"]), "scoring-1": actors["scoring-1"].end.remote()}
    with pytest.raises(RunProblem) as caught:
        answer_of_each(calls, "rewards", 30.0)
    assert str(caught.value) == (
        "scoring-1 died: its process was killed or crashed; the same command continues from what was last saved."
    )


def test_a_death_that_nobody_has_named_is_a_sentence_too(ray, start):
    actors = start("scoring-0")
    with pytest.raises(ray.exceptions.RayActorError) as caught:
        ray.get(actors["scoring-0"].end.remote(), timeout=30)
    found = problem_in(caught.value)
    assert isinstance(found, RunProblem)
    assert str(found).startswith("The actor Scorer died: ")


def test_a_mistake_in_an_actor_flies_with_its_traceback(start):
    actors = start("scoring-0")
    with pytest.raises(KeyError) as caught:
        answer_of_each({"scoring-0": actors["scoring-0"].fail.remote("nothing")}, "rewards", 30.0)
    assert problem_in(caught.value) is None
    assert "in fail" in str(caught.value)


def test_a_wish_to_stop_ends_the_wait(start):
    actors = start("generator-0")
    with listening():
        calls = [partial(score, [number], 0.0 if number == 0 else 30.0) for number in range(3)]
        answers = answers_to_all(actors, calls, "samples", 60.0)
        assert next(answers) == (0, [0])
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="waiting for samples"):
            next(answers)
    assert not interruption.requested()


def test_the_crew_waits_for_work_as_long_as_the_recipe_says(tmp_path, start):
    actors = start("scoring-0")
    recipe = Recipe.model_validate({"name": "slow", "deadline_s": 1.0, "learners": {"start_deadline_s": 60}})
    crew = Crew(recipe, tmp_path, Progress(json=True), None)
    with pytest.raises(RunProblem, match="Waited 1 s for the reward model to load"):
        crew.wait_for({"scoring-0": score([1], 30.0, actors["scoring-0"])}, "the reward model to load")
    with pytest.raises(RunProblem, match="Waited 1 s for rewards"):
        list(crew.have_done(start("scoring-1"), [partial(score, [1], 30.0)], "rewards"))
