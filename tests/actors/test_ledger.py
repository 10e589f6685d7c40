"""The ledger: whatever happens in whatever order, every slot is trained once and none too stale."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from actors.attempts import Attempt, committed_lineage, is_on_lineage, owner_of
from actors.ledger import Counts, Ledger
from corpus.problems import RunProblem


def test_slots_are_admitted_by_the_staleness_bound():
    ledger = Ledger(batch_size=8, chunk_size=4, max_staleness=0, batches=3)
    assert ledger.admitted == 8
    assert len(ledger.lease("g", 9, now=0, seconds=10)) == 2
    ledger.accept(range(8), 0)
    ledger.train(0, 0)
    ledger.advance(0, 1)
    assert ledger.admitted == 16
    stale = Ledger(batch_size=8, chunk_size=4, max_staleness=1, batches=3)
    assert stale.admitted == 16
    for batch in range(2):
        stale.accept(stale.batch_slots(batch), 0)
        stale.train(batch, 0)
    stale.advance(0, 2)
    assert stale.admitted == 24  # never beyond the last batch


def test_a_chunk_is_leased_to_one_holder_until_its_lease_expires():
    ledger = Ledger(8, 4, 0, 1)
    [first] = ledger.lease("a", 1, now=0, seconds=10)
    [second] = ledger.lease("b", 5, now=5, seconds=10)
    assert (first.chunk, second.chunk) == (0, 1)
    assert ledger.lease("c", 5, now=9, seconds=10) == []
    ledger.accept([1], attempt=0)
    [again] = ledger.lease("c", 5, now=10, seconds=10)
    assert again.chunk == 0
    assert (ledger.counts[0].leased, ledger.counts[0].regenerated) == (11, 3)  # slots, and only those that are open


def test_a_late_and_a_duplicate_delivery_change_nothing():
    ledger = Ledger(4, 4, 0, 2)
    ledger.lease("a", 1, 0, 1)
    ledger.lease("b", 1, 2, 10)
    assert ledger.accept(range(4), attempt=0) == [0, 1, 2, 3]
    assert ledger.accept(range(4), attempt=0) == []
    assert ledger.counts[0].duplicates == 4
    ledger.train(0, 0)
    assert ledger.accept(range(4), attempt=0) == []
    assert ledger.counts[0].duplicates == 8


def test_an_older_attempt_is_refused():
    ledger = Ledger(4, 4, 0, 2)
    state = ledger.state(0)
    ledger.restore(state, attempt=3)
    assert ledger.accept(range(4), attempt=0) == []
    assert ledger.counts[0].refused == 4
    for sentence, call in {
        "Attempt 0 published weights, but attempt 3 is the present one.": lambda: ledger.advance(0, 0),
        "Attempt 2 trained batch 0, but attempt 3 is the present one.": lambda: ledger.train(0, 2),
        "Attempt 1 wanted to save a checkpoint, but attempt 3 is the present one.": lambda: ledger.state(1),
        "Attempt 2 cannot follow attempt 3.": lambda: ledger.restore(state, attempt=2),
        "Attempt 3 cannot follow attempt 3.": lambda: ledger.restore(None, attempt=3),
    }.items():
        with pytest.raises(RunProblem, match=sentence):
            call()
    with pytest.raises(RunProblem, match=r"Attempt 0 cannot follow attempt 0\."):
        Ledger(4, 4, 0, 2).restore(state, attempt=0)


def test_after_a_restart_nothing_is_leased_until_the_engines_hold_weights_of_the_new_attempt():
    ledger = Ledger(4, 4, 0, 2)
    ledger.lease("a", 1, now=0, seconds=1e9)
    ledger.restore(None, attempt=1)
    assert ledger.lease("a", 1, now=0, seconds=1) == []
    ledger.advance(1, 0)
    assert [lease.chunk for lease in ledger.lease("a", 1, now=0, seconds=1)] == [0]


def test_a_batch_is_trained_in_order_and_only_when_complete():
    ledger = Ledger(4, 2, 1, 3)
    with pytest.raises(RunProblem, match="without its slots"):
        ledger.train(0, 0)
    ledger.accept(range(8), 0)
    with pytest.raises(RunProblem, match="batch 0 is next"):
        ledger.train(1, 0)
    ledger.train(0, 0)
    ledger.train(1, 0)
    with pytest.raises(RunProblem, match="not admitted"):
        ledger.accept([8, 9], 0)


def test_weights_of_more_updates_than_were_trained_are_refused():
    with pytest.raises(RunProblem, match=r"Version 1 was published, but 0 batches are trained\."):
        Ledger(4, 4, 0, 2).advance(0, 1)


def test_a_token_that_would_be_too_old_is_refused():
    ledger = Ledger(4, 4, 1, 4)
    for batch in range(2):
        ledger.accept(ledger.batch_slots(batch), 0, [(0, 0)] * 4)
        ledger.train(batch, 0)
    ledger.advance(0, 2)
    with pytest.raises(RunProblem, match="Slot 9 was delivered with tokens of weights 0, but trains in batch 2, where"):
        ledger.accept([8, 9], 0, [(0, 1), (0, 0)])
    assert ledger.accept([10, 11], 0, [(0, 1), (0, 2)]) == [10, 11]


def test_a_token_of_weights_that_were_rolled_back_is_refused():
    ledger = Ledger(4, 4, 1, 4)
    ledger.restore(None, 2)
    ledger.advance(2, 0)
    with pytest.raises(
        RunProblem, match="Slot 1 was delivered with tokens of weights 5 of attempt 1, but attempt 2 is"
    ):
        ledger.accept(range(4), 2, [(2, 0), (1, 5), (2, 0), (2, 0)])


def test_of_a_delivery_that_is_refused_nothing_is_accepted():
    ledger = Ledger(4, 4, 1, 4)
    before = json_of(ledger.state(0))
    for slots, written_by in ((range(6, 10), [(0, 0)] * 4), (range(4), [(0, 0), (0, 0), (0, 0), (1, 0)])):
        with pytest.raises(RunProblem):
            ledger.accept(slots, 0, written_by)
    assert json_of(ledger.state(0)) == before
    assert ledger.accept([2, 2, 3], 0) == [2, 3]
    assert (ledger.counts[0].generated, ledger.counts[0].duplicates) == (2, 1)


def test_counts_are_a_history_by_attempt_that_a_restart_does_not_roll_back():
    ledger = Ledger(4, 4, 1, 3)
    ledger.lease("a", 9, 0, 10)
    ledger.accept(range(4), 0)
    saved = ledger.state(0)
    ledger.train(0, 0)
    ledger.accept(range(4, 8), 0)
    ledger.restore(saved, 1)
    ledger.accept(range(4, 8), 0)
    ledger.advance(1, 0)
    ledger.train(0, 1)
    assert ledger.counts == {
        0: Counts(admitted=8, leased=8, generated=8, trained=4, discarded=4, refused=4),
        1: Counts(admitted=8, trained=4),
    }
    # A stream that died with its ledger: what the checkpoint saw, and what was written down elsewhere.
    other, told = Ledger(4, 4, 1, 3), Ledger(4, 4, 1, 3)
    other.restore(saved, 1)
    assert other.counts[0] == Counts(admitted=8, leased=8, generated=4)
    told.restore(saved, 1, ledger.counts)
    assert told.counts[0] == Counts(admitted=8, leased=8, generated=8, trained=4, discarded=4, refused=4)


def test_a_checkpoint_of_the_release_before_is_read():
    old = {"schema_version": 1, "attempt": 2, "version": 1, "trained": 1, "accepted": [4, 5], "counts": [1, 2, 3]}
    ledger = Ledger(4, 2, 1, 3)
    ledger.restore(old, 3)
    assert (ledger.version, ledger.trained, sorted(ledger.accepted)) == (1, 1, [4, 5])
    assert ledger.counts[2] == Counts(generated=6, regenerated=1, duplicates=2, refused=3, trained=4)
    with pytest.raises(RunProblem, match="schema version 7; this program reads 1 and 2"):
        ledger.restore(old | {"schema_version": 7}, 4)


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
    weights: tuple[int, int]


@dataclass
class Truth:
    """What a checkpoint holds of the world outside the ledger, and what is true of the lineage that goes on from it."""

    published: int = 0
    trained: list[int] = field(default_factory=list)
    written_by: dict[int, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    """For every accepted slot: its attempt, and the weights in the engines when the chunk was leased that delivered
    it."""

    def copy(self) -> "Truth":
        return Truth(self.published, list(self.trained), dict(self.written_by))


@dataclass(frozen=True)
class Saved:
    attempt: int
    state: dict[str, Any]
    truth: Truth


class History:
    """A run in which anything may happen at any time. Checks what the ledger promises, by what it says and does."""

    def __init__(self, make: Callable[[], Ledger]) -> None:
        self.make = make
        self.ledger = make()
        self.now = 0.0
        self.attempts = [Attempt(0, 0, None, "", None, "")]
        self.truth = Truth()
        self.engines = (0, 0)
        """(attempt, update) of the weights that the generators hold: a restart of the learner does not change them."""
        self.saved = [Saved(-1, json_of(self.ledger.state(0)), self.truth.copy())]
        self.writing: list[Writing] = []
        self.delivered: list[Writing] = []
        self.counted = {0: Counts()}
        """What was generated, trained, refused, and delivered twice, as seen from outside."""

    @property
    def attempt(self) -> int:
        return self.attempts[-1].number

    @property
    def newest(self) -> int:
        return len(self.truth.trained) // BATCH

    def lease(self, draw) -> None:
        for lease in self.ledger.lease(draw(st.sampled_from("ab")), draw(st.integers(1, 4)), self.now, 5):
            self.writing.append(Writing(self.ledger.slots(lease.chunk), self.attempt, self.engines))

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
        # A delivery of an older attempt is refused whatever its weights; a second one is a second one.
        fresh = self.ledger.accept(writing.slots, writing.attempt)
        for slot in fresh:
            assert writing.attempt == self.attempt, "a delivery of an older attempt is refused"
            assert slot not in self.truth.written_by, "a slot is accepted once"
            self.truth.written_by[slot] = writing.attempt, writing.weights
        counted = self.counted[writing.attempt]
        counted.generated += len(fresh)
        if writing.attempt == self.attempt:
            counted.duplicates += len(writing.slots) - len(fresh)
        else:
            counted.refused += len(writing.slots)

    def expire(self, draw) -> None:
        self.now += 6

    def release(self, draw) -> None:
        self.ledger.release(draw(st.sampled_from("ab")))  # what it has written may arrive all the same

    def train(self, draw) -> None:
        batch = self.newest
        if batch == BATCHES or self.ledger.missing(batch):
            return
        self.ledger.train(batch, self.attempt)
        segments = committed_lineage(self.attempts)
        for slot in self.ledger.batch_slots(batch):
            oldest = batch - self.ledger.max_staleness
            generated_in, weights = self.truth.written_by[slot]
            assert weights[1] >= oldest, f"slot {slot} was written by weights older than {oldest}"
            assert is_on_lineage(*weights, segments), f"slot {slot} was written by weights that were rolled back"
            assert is_on_lineage(generated_in, weights[1], segments)
            self.truth.trained.append(slot)
        self.counted[self.attempt].trained += BATCH

    def advance(self, draw) -> None:
        """The newest weights come into the engines, or, later, some older ones of this attempt; a new attempt begins
        with what its checkpoint has."""
        anew = self.engines[0] != self.attempt
        self.truth.published = draw(st.integers(self.newest if anew else self.truth.published, self.newest))
        self.ledger.advance(self.attempt, self.truth.published)
        self.engines = self.attempt, self.truth.published
        if anew:  # whoever held a lease is gone, or at work for an attempt that is over
            open_chunks = {slot // CHUNK for slot in range(self.ledger.admitted) if slot not in self.truth.written_by}
            leases = self.ledger.lease("a", 99, self.now, 5)
            assert {lease.chunk for lease in leases} == open_chunks, "no lease of an older attempt is in the way"
            self.writing += [Writing(self.ledger.slots(lease.chunk), self.attempt, self.engines) for lease in leases]

    def stale_call(self, draw) -> None:
        """An attempt that is over acts as if it were not."""
        if self.attempt == 0:
            return
        other, batch = draw(st.integers(0, self.attempt - 1)), draw(st.integers(0, BATCHES))
        calls = (
            lambda: self.ledger.advance(other, batch),
            lambda: self.ledger.train(self.newest, other),
            lambda: self.ledger.state(other),
            lambda: self.ledger.restore(self.saved[0].state, other),
        )
        with pytest.raises(RunProblem, match=rf"Attempt {other} .*attempt {self.attempt}\b"):
            draw(st.sampled_from(calls))()

    def save(self, draw) -> None:
        state = json_of(self.ledger.state(self.attempt))
        waiting = sorted(self.truth.written_by.keys() - set(self.truth.trained))
        assert [slot for slot, _ in state["accepted"]] == waiting, "a checkpoint has what waits, and nothing else"
        assert state["trained"] == self.newest
        self.saved.append(Saved(self.attempt, state, self.truth.copy()))

    def restore(self, draw) -> None:
        """A new attempt begins from one of the checkpoints, with the stream that there is or a new one."""
        saved = self.saved[draw(st.integers(0, len(self.saved) - 1))]
        number = self.attempt + draw(st.integers(1, 2))  # an attempt may end before it has done anything
        seen = dict(self.ledger.counts)
        if draw(st.booleans()):
            self.ledger = self.make()
        parent = None if saved.attempt < 0 else saved.attempt
        self.ledger.restore(None if parent is None else saved.state, number, seen)
        self.truth = saved.truth.copy()
        self.attempts.append(Attempt(number, self.newest, parent, "", None, ""))
        self.counted[number] = Counts()
        assert self.ledger.lease("a", 99, self.now + 1e9, 5) == [], "the engines hold weights that were rolled back"
        self.check_counts()

    def check_counts(self) -> None:
        kept = Counter(attempt for attempt, _ in self.truth.written_by.values())
        for number, counted in self.counted.items():
            counts = self.ledger.counts[number]
            for name in ("generated", "trained", "refused", "duplicates"):
                assert getattr(counts, name) == getattr(counted, name), f"{name} of attempt {number}"
            assert counts.generated - counts.discarded == kept[number], f"kept of attempt {number}"

    def finish(self, draw) -> None:
        """From here on everything works: the run must come to its end."""
        for _ in range(4 * BATCHES):
            self.train(draw)
            if self.engines[0] != self.attempt:
                self.advance(draw)
            else:
                self.truth.published = self.newest
                self.ledger.advance(self.attempt, self.truth.published)
                self.engines = self.attempt, self.newest
            for lease in self.ledger.lease("c", 99, self.now, 5):
                self.accept(Writing(self.ledger.slots(lease.chunk), self.attempt, self.engines))
            self.now += 6
        assert self.truth.trained == list(range(BATCH * BATCHES)), "every slot is trained once, in order"
        owners = [owner_of(update, self.attempts) for update in range(1, BATCHES + 1)]
        assert None not in owners
        assert not self.ledger.accepted
        kept = sum(counts.generated - counts.discarded for counts in self.ledger.counts.values())
        assert kept == BATCH * BATCHES, "what was generated was trained or discarded"


def json_of(state: dict[str, Any]) -> dict[str, Any]:
    """As the checkpoint gives it back."""
    return json.loads(json.dumps(state))


HAPPENINGS = (
    *[History.deliver_all, History.deliver, History.train, History.advance] * 2,  # so that runs get somewhere
    History.lease,
    *[History.duplicate, History.expire, History.release, History.stale_call, History.save, History.restore],
)


def live(draw, sort: type[Ledger]) -> None:
    staleness = draw(st.integers(0, 2))
    history = History(lambda: sort(BATCH, CHUNK, staleness, BATCHES))
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
    def accept(self, slots, attempt, written_by=None):
        return super().accept(slots, self.attempt, written_by)


class KeepsTheVersionOfALostAttempt(Ledger):
    def restore(self, state, attempt, history=None):
        version = self.version
        super().restore(state, attempt, history)
        self.version = version


class KeepsLeasesOverARestart(Ledger):
    def restore(self, state, attempt, history=None):
        leases = dict(self._leases)
        super().restore(state, attempt, history)
        self._leases = leases


class LeasesBeforeItsWeightsAreOut(Ledger):
    def restore(self, state, attempt, history=None):
        super().restore(state, attempt, history)
        self._waits_for_weights = False


class KeepsWhatWasAcceptedSince(Ledger):
    def restore(self, state, attempt, history=None):
        accepted = dict(self._accepted)
        super().restore(state, attempt, history)
        self._accepted |= {slot: number for slot, number in accepted.items() if slot >= self.trained * self.batch_size}


class RollsCountsBack(Ledger):
    def restore(self, state, attempt, history=None):
        self.counts = {}
        super().restore(state, attempt)


class ForgetsWhatWasAccepted(Ledger):
    def accept(self, slots, attempt, written_by=None):
        fresh = super().accept(slots, attempt, written_by)
        for slot in fresh[1:2]:
            del self._accepted[slot]
        return fresh


class TakesASlotTwice(Ledger):
    def accept(self, slots, attempt, written_by=None):
        again = [slot for slot in slots if attempt == self.attempt and slot in self._accepted]
        return [*super().accept(slots, attempt, written_by), *again]


class KeepsWhatIsTrained(Ledger):
    def train(self, batch, attempt):
        accepted = dict(self._accepted)
        super().train(batch, attempt)
        self._accepted = accepted


class TrainsForAnybody(Ledger):
    def train(self, batch, attempt):
        super().train(batch, self.attempt)


class NeverAsksAgain(Ledger):
    def lease(self, holder, chunks, now, seconds):
        return super().lease(holder, chunks, now, 1e9)


BROKEN = (
    AdmitsTooEarly,
    TakesWhatOlderAttemptsWrote,
    KeepsTheVersionOfALostAttempt,
    KeepsLeasesOverARestart,
    LeasesBeforeItsWeightsAreOut,
    KeepsWhatWasAcceptedSince,
    RollsCountsBack,
    ForgetsWhatWasAccepted,
    TakesASlotTwice,
    KeepsWhatIsTrained,
    TrainsForAnybody,
    NeverAsksAgain,
)


@pytest.mark.parametrize("sort", BROKEN)
def test_a_ledger_that_breaks_a_promise_is_found_out(sort):
    @settings(max_examples=500, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(st.data())
    def lives(data):
        live(data.draw, sort)

    with pytest.raises((AssertionError, RunProblem, pytest.fail.Exception)):
        lives()
