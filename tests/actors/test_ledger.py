"""The ledger: whatever happens in whatever order, every slot is trained once and none too stale."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from actors.ledger import Lease, Ledger
from corpus.problems import RunProblem


def test_slots_are_admitted_by_the_staleness_bound():
    ledger = Ledger(batch_size=8, chunk_size=4, max_staleness=0, batches=3)
    assert ledger.admitted == 8
    assert len(ledger.lease("g", 9, now=0, seconds=10)) == 2
    ledger.advance(0, 1)
    assert ledger.admitted == 16
    stale = Ledger(batch_size=8, chunk_size=4, max_staleness=1, batches=3)
    assert stale.admitted == 16
    stale.advance(0, 2)
    assert stale.admitted == 24  # never beyond the last batch


def test_a_chunk_is_leased_to_one_holder_until_its_lease_expires():
    ledger = Ledger(8, 4, 0, 1)
    [first] = ledger.lease("a", 1, now=0, seconds=10)
    [second] = ledger.lease("b", 5, now=5, seconds=10)
    assert (first.chunk, second.chunk) == (0, 1)
    assert ledger.lease("c", 5, now=9, seconds=10) == []
    [again] = ledger.lease("c", 5, now=10, seconds=10)
    assert again.chunk == 0
    assert ledger.regenerated == 1


def test_a_late_and_a_duplicate_delivery_change_nothing():
    ledger = Ledger(4, 4, 0, 2)
    ledger.lease("a", 1, 0, 1)
    ledger.lease("b", 1, 2, 10)
    assert ledger.accept(range(4), attempt=0) == [0, 1, 2, 3]
    assert ledger.accept(range(4), attempt=0) == []
    assert ledger.duplicates == 4
    ledger.train(0)
    assert ledger.accept(range(4), attempt=0) == []
    assert ledger.duplicates == 8


def test_an_older_attempt_is_refused():
    ledger = Ledger(4, 4, 0, 2)
    state = ledger.state()
    ledger.restore(state, attempt=1)
    assert ledger.accept(range(4), attempt=0) == []
    assert ledger.refused == 4
    with pytest.raises(RunProblem, match="Attempt 0 published"):
        ledger.advance(0, 1)
    with pytest.raises(RunProblem, match="cannot follow"):
        ledger.restore(state, attempt=0)


def test_a_batch_is_trained_in_order_and_only_when_complete():
    ledger = Ledger(4, 2, 1, 3)
    with pytest.raises(RunProblem, match="without its slots"):
        ledger.train(0)
    ledger.accept(range(8), 0)
    with pytest.raises(RunProblem, match="batch 0 is next"):
        ledger.train(1)
    ledger.train(0)
    ledger.train(1)
    with pytest.raises(RunProblem, match="not admitted"):
        ledger.accept([8, 9], 0)


def test_whoever_owes_a_batch_is_named_with_the_age_of_the_lease():
    ledger = Ledger(4, 2, 0, 1)
    ledger.lease("slow", 1, now=100, seconds=60)
    assert ledger.owed_by(0, now=130) == {"slow": 30.0, "nobody": 0.0}


BATCH, CHUNK, BATCHES = 6, 2, 4


@dataclass(frozen=True)
class Writing:
    """A chunk that somebody generates: its slots, for which attempt, and the weights in the engines at the lease."""

    slots: range
    attempt: int
    version: int


@dataclass
class Truth:
    """What a checkpoint holds of the world outside the ledger, and what is true of the lineage that goes on from it."""

    published: int = 0
    trained: list[int] = field(default_factory=list)
    written_by: dict[int, int] = field(default_factory=dict)
    """For every accepted slot: the weights in the engines when the chunk was leased that delivered it."""

    def copy(self) -> "Truth":
        return Truth(self.published, list(self.trained), dict(self.written_by))


class History:
    """A run in which anything may happen at any time. Checks what the ledger promises, by what it says and does."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.now = 0.0
        self.attempt = 0
        self.truth = Truth()
        self.saved = [(ledger.state(), self.truth.copy())]
        self.writing: list[Writing] = []
        self.delivered: list[Writing] = []

    def lease(self, draw) -> None:
        for lease in self.ledger.lease(draw(st.sampled_from("ab")), draw(st.integers(1, 4)), self.now, 5):
            self.writing.append(Writing(self.ledger.slots(lease.chunk), self.attempt, self.truth.published))

    def deliver(self, draw) -> None:
        if self.writing:
            self.accept(self.writing.pop(draw(st.integers(0, len(self.writing) - 1))))

    def deliver_all(self, draw) -> None:
        """Everybody who has room leases, and all is delivered but for one chunk, which is late."""
        self.lease(draw)
        late = self.writing.pop(draw(st.integers(0, len(self.writing) - 1))) if self.writing else None
        while self.writing:
            self.accept(self.writing.pop())
        self.writing = [late] if late else []

    def duplicate(self, draw) -> None:
        if self.delivered:
            self.accept(self.delivered[draw(st.integers(0, len(self.delivered) - 1))])

    def accept(self, writing: Writing) -> None:
        self.delivered.append(writing)
        for slot in self.ledger.accept(writing.slots, writing.attempt):
            assert writing.attempt == self.attempt, "a delivery of an older attempt is refused"
            assert slot not in self.truth.written_by, "a slot is accepted once"
            self.truth.written_by[slot] = writing.version

    def expire(self, draw) -> None:
        self.now += 6

    def release(self, draw) -> None:
        self.ledger.release(draw(st.sampled_from("ab")))  # what it has written may arrive all the same

    def train(self, draw) -> None:
        batch = len(self.truth.trained) // BATCH
        if batch < BATCHES and not self.ledger.missing(batch):
            self.ledger.train(batch)
            for slot in self.ledger.batch_slots(batch):
                oldest = batch - self.ledger.max_staleness
                assert self.truth.written_by[slot] >= oldest, f"slot {slot} was written by weights older than {oldest}"
                self.truth.trained.append(slot)

    def advance(self, draw) -> None:
        """The newest weights come into the engines, or, later, some older ones of this attempt."""
        newest = len(self.truth.trained) // BATCH
        self.truth.published = draw(st.integers(self.truth.published, newest))
        self.ledger.advance(self.attempt, self.truth.published)

    def late_publication(self, draw) -> None:
        if self.attempt:
            with pytest.raises(RunProblem, match="published weights, but attempt"):
                self.ledger.advance(draw(st.integers(0, self.attempt - 1)), draw(st.integers(0, BATCHES)))

    def save(self, draw) -> None:
        self.saved.append((self.ledger.state(), self.truth.copy()))

    def restore(self, draw) -> None:
        """Back to one of the checkpoints, the last or one before; the later ones are gone."""
        del self.saved[draw(st.integers(1, len(self.saved))) :]
        state, truth = self.saved[-1]
        self.attempt += 1
        self.ledger.restore(state, self.attempt)
        self.truth = truth.copy()

    def finish(self, draw) -> None:
        """From here on everything works: the run must come to its end."""
        for _ in range(4 * BATCHES):
            for lease in self.ledger.lease("c", 99, self.now, 5):
                self.accept(Writing(self.ledger.slots(lease.chunk), self.attempt, self.truth.published))
            self.now += 6
            self.train(draw)
            self.truth.published = len(self.truth.trained) // BATCH
            self.ledger.advance(self.attempt, self.truth.published)
        assert self.truth.trained == list(range(BATCH * BATCHES)), "every slot is trained once, in order"


HAPPENINGS = (
    *[History.deliver_all, History.deliver, History.train, History.advance] * 2,  # so that runs get somewhere
    History.lease,
    *[History.duplicate, History.expire, History.release, History.late_publication, History.save, History.restore],
)


def live(draw, sort: type[Ledger]) -> None:
    history = History(sort(BATCH, CHUNK, draw(st.integers(0, 2)), BATCHES))
    length = draw(st.sampled_from([5, 30, 80]))
    for happening in draw(st.lists(st.sampled_from(HAPPENINGS), min_size=length, max_size=length)):
        happening(history, draw)
    history.finish(draw)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_slot_is_lost_trained_twice_or_trained_too_old_whatever_happens(data):
    live(data.draw, Ledger)


class AdmitsTooEarly(Ledger):
    @property
    def admitted(self) -> int:
        return min(self.version + self.max_staleness + 2, self.batches) * self.batch_size


class TakesWhatOlderAttemptsWrote(Ledger):
    def accept(self, slots: Iterable[int], attempt: int) -> list[int]:
        return super().accept(slots, self.attempt)


class KeepsTheVersionOfALostAttempt(Ledger):
    def restore(self, state: dict[str, Any], attempt: int) -> None:
        version = self.version
        super().restore(state, attempt)
        self.version = version


class ForgetsWhatWasAccepted(Ledger):
    def accept(self, slots: Iterable[int], attempt: int) -> list[int]:
        fresh = super().accept(slots, attempt)
        self._accepted.difference_update(fresh[1:2])
        return fresh


class NeverAsksAgain(Ledger):
    def lease(self, holder: str, chunks: int, now: float, seconds: float) -> list[Lease]:
        return super().lease(holder, chunks, now, 1e9)


@pytest.mark.parametrize(
    "sort",
    [
        AdmitsTooEarly,
        TakesWhatOlderAttemptsWrote,
        KeepsTheVersionOfALostAttempt,
        ForgetsWhatWasAccepted,
        NeverAsksAgain,
    ],
)
def test_a_ledger_that_breaks_a_promise_is_found_out(sort):
    @settings(max_examples=500, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(st.data())
    def lives(data):
        live(data.draw, sort)

    with pytest.raises((AssertionError, RunProblem)):
        lives()
