"""A rank's line to the desk, with stand-ins for desk and Ray Train: preemption, stops, and what is told of failures."""

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from learners import rank as module
from learners.desk import Beat, Outcome, Superseded
from learners.rank import Line, TellLosses, _serve


class Call:
    def __init__(self, desk: "StandIn", name: str) -> None:
        self._desk, self._name = desk, name

    def remote(self, *arguments: Any) -> Any:
        self._desk.calls.append((self._name, *arguments))
        return self._desk.answers.get(self._name)


class StandIn:
    """A desk that notes what it is told."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Call:
        return Call(self, name)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    def answered(answer: Any, *_: Any, **__: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module, "at_desk", answered)
    monkeypatch.setattr(module, "PREEMPTION_LOOK_S", 0.01)
    monkeypatch.setattr(module, "BEAT_EVERY_S", 0.01)


def test_a_machine_that_is_about_to_be_taken_away_is_a_wish_to_save():
    asked: list[int] = []

    def pending() -> str | None:
        asked.append(1)
        return "preemption" if len(asked) == 3 else None

    line = Line(StandIn(asked_to_stop=False), 0, 1)
    worker = line.worker(1, None)
    assert not worker.should_stop()
    line.watch_for_preemption(pending)
    assert len(asked) == 3
    assert worker.should_stop()


def test_preemption_is_watched_for_until_the_rank_is_over_and_a_failure_to_ask_ends_only_the_watch():
    line = Line(StandIn(asked_to_stop=False), 0, 1)

    def fails() -> None:
        raise RuntimeError("Ray Train's actor is gone")

    line.watch_for_preemption(fails)
    line.is_over.set()
    line.watch_for_preemption(lambda: pytest.fail("it is over"))
    assert not line.worker(1, None).should_stop()


@pytest.mark.parametrize(("asked", "preempted"), [(True, False), (True, True), (False, True), (False, False)])
def test_an_interrupted_job_is_over_where_the_driver_asked_and_else_waits_to_go_on_elsewhere(asked, preempted):
    desk = StandIn(asked_to_stop=asked)
    line = Line(desk, 0, 4)
    if preempted:
        line.is_preempted.set()
    module._tell_interruption(line, 7, "ppo, update 3 of 9")
    if preempted and not asked:
        assert (desk.of("saved"), desk.of("finish")) == ([(4, "ppo, update 3 of 9")], [])
    else:
        assert desk.of("saved") == []
        assert desk.of("finish") == [(4, Outcome(7, interrupted="ppo, update 3 of 9"), 0.0)]


def test_signs_of_life_tell_how_often_the_job_came_by_and_end_where_they_are_refused():
    desk = StandIn(asked_to_stop=False, report=False)
    line = Line(desk, 0, 1)
    worker = line.worker(1, None)
    worker.should_stop()
    worker.check_lease()
    desk.answers["beat"] = Superseded("started anew", "learners/superseded")
    line.give_signs_of_life()
    assert desk.of("beat") == [(1, 0, Beat(1, 2))]


def test_a_superseded_rank_leaves_without_a_word():
    desk = StandIn(next_job=Superseded("started anew", "learners/superseded"))
    with pytest.raises(Superseded):
        _serve(Line(desk, 0, 1), 0, 1)
    assert desk.of("finish") == []


def died(actor: str, preempted: bool = False) -> RayActorError:
    error = ActorDiedError()
    error.actor_id = actor
    error._preempted = preempted
    return error


class HealthCheckFailed(Exception):
    def __init__(self, failure: Exception) -> None:
        super().__init__("health check failed")
        self.health_check_failure = failure


def test_a_death_is_told_once_and_hides_what_the_others_ran_into():
    desk = StandIn()
    tell = TellLosses(desk)
    found = {0: RuntimeError("connection closed"), 1: HealthCheckFailed(died("a"))}
    tell.after_exception(None, found)
    tell.after_exception(None, {1: found[1]})
    assert desk.of("lost") == [({1: "died: its process was killed or crashed"}, True, True)]
    tell.after_exception(None, {0: HealthCheckFailed(died("b"))})
    assert len(desk.of("lost")) == 2


def test_a_machine_that_was_taken_away_is_not_counted():
    desk = StandIn()
    TellLosses(desk).after_exception(None, {0: died("a", preempted=True)})
    assert desk.of("lost") == [({0: "died: its machine was taken away"}, True, False)]


def test_a_failure_that_is_no_death_is_told_with_its_kind():
    desk = StandIn()
    TellLosses(desk).after_exception(None, {0: RuntimeError("one thing\nand another")})
    assert desk.of("lost") == [({0: "failed: RuntimeError: one thing and another"}, False, True)]
