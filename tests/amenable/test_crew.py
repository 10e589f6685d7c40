"""How the crew ends: whatever is dead by then, the Ray session ends and the first problem is the one that is told."""

import pytest

from amenable.crew import Crew
from amenable.progress import Progress
from amenable.recipe import Recipe
from corpus.problems import RunProblem


class Learners:
    """A learner group whose end goes as it is told."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem

    def close(self) -> None:
        if self.problem is not None:
            raise self.problem


class Session:
    def __init__(self) -> None:
        self.ended = False

    def __exit__(self, *_: object) -> None:
        self.ended = True


def crew_of(tmp_path, learners: Learners, is_ready: bool = True) -> tuple[Crew, Session]:
    crew = Crew(Recipe(name="small"), tmp_path, Progress(json=True), None)
    crew._learners, crew._learners_ready, crew._session = learners, is_ready, Session()
    return crew, crew._session


def test_the_session_ends_after_the_learners(tmp_path):
    crew, session = crew_of(tmp_path, Learners())
    with crew:
        pass
    assert session.ended


def test_learners_that_cannot_be_closed_neither_mask_what_went_wrong_nor_keep_the_session(tmp_path):
    crew, session = crew_of(tmp_path, Learners(RuntimeError("the desk is dead")))
    with pytest.raises(RunProblem, match="the first problem"), crew:
        raise RunProblem("the first problem", "run/unexpected")
    assert session.ended


def test_learners_that_cannot_be_closed_are_told_where_nothing_else_went_wrong(tmp_path):
    crew, session = crew_of(tmp_path, Learners(RuntimeError("the desk is dead")))
    with pytest.raises(RuntimeError, match="the desk is dead"), crew:
        pass
    assert session.ended


def test_learners_that_still_start_are_not_waited_for(tmp_path):
    crew, session = crew_of(tmp_path, Learners(AssertionError("closing waits for them")), is_ready=False)
    with pytest.raises(RunProblem, match="a row is wrong"), crew:
        raise RunProblem("a row is wrong", "run/unexpected")
    assert session.ended


def test_learners_are_ready_once_they_have_said_so(tmp_path):
    class Starting(Learners):
        asked = 0

        def wait_until_ready(self, should_stop) -> None:
            self.asked += 1

    learners = Starting(RuntimeError("closed"))
    crew, session = crew_of(tmp_path, learners, is_ready=False)
    assert [crew.ready_learners(), crew.ready_learners()] == [learners, learners]
    assert learners.asked == 1
    with pytest.raises(RuntimeError, match="closed"), crew:
        pass
    assert session.ended


def test_the_learners_are_as_patient_as_the_recipe_says(tmp_path, monkeypatch):
    from learners import group

    made: list[tuple] = []
    monkeypatch.setattr(group, "LearnerGroup", lambda *arguments: made.append(arguments))
    told = {"start_deadline_s": 1.0, "silence_s": 20.0, "stall_s": 3.0, "stop_grace_s": 4.0, "max_restarts": 5}
    crew = Crew(Recipe.model_validate({"name": "small", "learners": told}), tmp_path, Progress(json=True), None)
    monkeypatch.setattr(crew, "_ray", lambda: None)
    crew.learners()
    assert made[0][2] == group.Patience(**told)
    default = Recipe(name="small").learners
    crew = Crew(Recipe(name="small"), tmp_path, Progress(json=True), None)
    monkeypatch.setattr(crew, "_ray", lambda: None)
    crew.learners()
    assert made[1][2] == group.Patience(default.start_deadline_s), "the defaults are told once each, and are the same"
