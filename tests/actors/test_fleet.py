"""The health of workers, whatever is heard of them in whatever order; and that the check sees what would break it."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.fleet import FROZEN, BudgetSpent, Fleet, State, share_of

NAMES = ("a", "b", "c")
SUSPECT_S, DEAD_S, BUDGET, WINDOW_S = 3.0, 8.0, 2, 50.0
KINDS = ("answered", "silent", "died", "restart", "started", "refit", "strayed", "admit", "retire", "excuse")

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(NAMES),
        st.integers(0, 2),  # how many incarnations ago
        st.integers(0, 6),  # seconds since the last event, and how old a version is
    ),
    max_size=60,
)


def play_events(fleet: Fleet, events: list[tuple[str, str, int, int]]) -> None:
    """Plays events and, beside the fleet, remembers what happened; fails where the two do not agree."""
    now, newest, admitted = 0.0, 0, None
    refits: dict[str, tuple[int, int] | None] = dict.fromkeys(NAMES)  # of the present process, the last good one
    incarnations, restarts, retired = dict.fromkeys(NAMES, 0), [], set()
    for name in NAMES:
        fleet.enrol(name, now, started=name != "c")
    for kind, name, ago, number in events:
        now += number
        incarnation = fleet[name].incarnation - ago
        is_present = ago == 0
        state = fleet[name].state
        if kind == "answered":
            fleet.answered(name, incarnation, now)
        elif kind == "silent":
            for overdue in fleet.silent(now):
                assert now - fleet[overdue].answered_at > DEAD_S
                fleet.died(overdue, fleet[overdue].incarnation)
                refits[overdue] = None
        elif kind == "excuse":
            fleet.excuse(float(number))
        elif kind == "died":
            if fleet.died(name, incarnation):
                assert is_present, "an older incarnation's death is no news"
            if is_present:
                refits[name] = None
        elif kind == "restart" and state is State.DEAD:
            try:
                incarnations[name] += 1
                assert fleet.restart(name, now) == incarnations[name]
                restarts.append(now)
            except BudgetSpent:
                incarnations[name] -= 1
                assert sum(at > now - WINDOW_S for at in restarts) >= BUDGET, "the budget was not spent"
        elif kind == "started":
            fleet.started(name, incarnation, now)
        elif kind == "refit":
            newest = max(newest, number)
            fleet.refit(name, incarnation, (0, number), now)
            if is_present and state not in (State.DEAD, State.RESTARTING, State.RETIRED):
                refits[name] = (0, number)
        elif kind == "strayed":
            fleet.strayed(name, incarnation)
            if is_present:
                refits[name] = None
        elif kind == "admit" and newest >= (admitted or (0, 0))[1]:
            admitted = (0, newest)
            fleet.admit(admitted)
        elif kind == "retire":
            fleet.retire(name)
            retired.add(name)
        check(fleet, refits, admitted, restarts, retired)


def check(fleet: Fleet, refits: dict[str, Any], admitted: Any, restarts: list[float], retired: set[str]) -> None:
    for name in fleet.serving:
        assert refits[name] is not None, "who serves was refit after it last started"
        assert admitted is None or refits[name] >= admitted, "who serves holds what is admitted"
    for first in restarts:
        assert sum(first <= at < first + WINDOW_S for at in restarts) <= BUDGET, "no more restarts than the budget"
    assert retired <= set(fleet.names([State.RETIRED])), "who is retired stays so"


def new(sort: type[Fleet] = Fleet) -> Fleet:
    return sort(SUSPECT_S, DEAD_S, BUDGET, WINDOW_S)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EVENTS)
def test_whatever_is_heard_of_workers_who_serves_was_refit_and_restarts_are_within_the_budget(events):
    play_events(new(), events)


class ServesWithoutARefit(Fleet):
    def started(self, name: str, incarnation: int, now: float) -> bool:
        if not super().started(name, incarnation, now):
            return False
        self._workers[name] = replace(self._workers[name], state=State.HEALTHY)
        return True


class DeathForgotten(Fleet):
    def answered(self, name: str, incarnation: int, now: float) -> None:
        worker = self._workers[name]
        if worker.state is State.DEAD:
            self._workers[name] = replace(worker, state=State.HEALTHY, answered_at=now)
            return
        super().answered(name, incarnation, now)


class OldIncarnationsHeard(Fleet):
    def _of(self, name: str, incarnation: int) -> Any:
        return self._workers.get(name)


class NoBudget(Fleet):
    def may_restart(self, now: float) -> bool:
        return True


class BudgetForever(Fleet):
    def may_restart(self, now: float) -> bool:
        return len(self._restarted_at) < self._budget


class OldWeightsServe(Fleet):
    def admit(self, version: Any) -> None:
        self.admitted = version


class SuspectsServeWhateverTheyHold(Fleet):
    def answered(self, name: str, incarnation: int, now: float) -> None:
        super().answered(name, incarnation, now)
        if self._workers[name].state is State.STALE:
            self._workers[name] = replace(self._workers[name], state=State.HEALTHY)


class RetiredComeBack(Fleet):
    def died(self, name: str, incarnation: int) -> bool:
        if self._workers[name].state is State.RETIRED:
            self._workers[name] = replace(self._workers[name], state=State.DEAD)
            return True
        return super().died(name, incarnation)


class WeightsOutliveTheProcess(Fleet):
    def restart(self, name: str, now: float) -> int:
        before = self._workers[name]
        incarnation = super().restart(name, now)
        self._workers[name] = replace(self._workers[name], state=State.SUSPECT, holds=before.holds or FROZEN)
        return incarnation


@pytest.mark.parametrize(
    "broken",
    [
        ServesWithoutARefit,
        DeathForgotten,
        OldIncarnationsHeard,
        NoBudget,
        BudgetForever,
        OldWeightsServe,
        SuspectsServeWhateverTheyHold,
        RetiredComeBack,
        WeightsOutliveTheProcess,
    ],
)
def test_the_check_finds_a_rule_that_is_broken(broken):
    assert is_found(broken)


def test_the_check_finds_nothing_where_no_rule_is_broken():
    assert not is_found(Fleet)


def is_found(sort: type[Fleet]) -> bool:
    draw = random.Random(5)
    for _ in range(1500):
        events = [
            (draw.choice(KINDS), draw.choice(NAMES), draw.choice((0, 0, 0, 1)), draw.randrange(7)) for _ in range(60)
        ]
        try:
            play_events(new(sort), events)
        except AssertionError:
            return True
    return False


def test_silence_makes_suspect_then_dead_and_an_answer_in_time_makes_healthy_again():
    fleet = new()
    fleet.enrol("a", 0.0, started=True)
    assert fleet.refit("a", 0, (0, 1), 0.0)
    assert fleet.silent(SUSPECT_S + 0.1) == []
    assert (fleet["a"].state, fleet.serving) == (State.SUSPECT, [])
    fleet.answered("a", 0, 4.0)
    assert fleet.serving == ["a"]
    assert fleet.silent(4.0 + DEAD_S) == []
    assert fleet.silent(4.1 + DEAD_S) == ["a"]


def test_a_suspect_that_missed_a_version_is_stale_when_it_answers():
    fleet = new()
    fleet.enrol("a", 0.0, started=True)
    fleet.refit("a", 0, (0, 1), 0.0)
    fleet.silent(4.0)
    fleet.admit((0, 2))
    fleet.answered("a", 0, 5.0)
    assert fleet["a"].state is State.STALE
    assert fleet.refit("a", 0, (0, 2), 6.0)


def test_time_for_which_nobody_listened_is_no_silence():
    fleet = new()
    fleet.enrol("a", 0.0, started=True)
    fleet.excuse(100.0)
    assert fleet.silent(100.0) == []
    assert fleet.silent(100.1 + DEAD_S) == ["a"]


def test_a_window_that_has_passed_gives_the_budget_back():
    fleet = new()
    fleet.enrol("a", 0.0, started=True)
    for now in (0.0, 1.0):
        fleet.died("a", fleet["a"].incarnation)
        fleet.restart("a", now)
    fleet.died("a", 2)
    with pytest.raises(BudgetSpent):
        fleet.restart("a", WINDOW_S - 0.1)
    assert fleet.restart("a", WINDOW_S) == 3
    assert fleet.restarts == 3


def test_disagreements_are_counted_over_incarnations_until_a_refit_agrees():
    fleet = new()
    fleet.enrol("a", 0.0, started=True)
    assert fleet.strayed("a", 0) == 1
    fleet.died("a", 0)
    fleet.restart("a", 1.0)
    fleet.started("a", 1, 2.0)
    assert fleet.strayed("a", 1) == 2
    fleet.refit("a", 1, (0, 0), 3.0)
    assert fleet.strayed("a", 1) == 1


def test_a_share_never_falls_below_a_chunk_and_all_shares_hold_what_is_admitted():
    assert [share_of(64, generators, 8) for generators in (1, 2, 3, 8, 100)] == [64, 32, 24, 8, 8]
    assert share_of(64, 0, 8) == 64
