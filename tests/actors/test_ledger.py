"""The ledger: whatever happens in whatever order, every slot is trained once and none too stale."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ledger import Ledger
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


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_slot_is_lost_or_trained_twice_whatever_happens(data):
    batch, chunk, batches = 6, 2, 4
    staleness = data.draw(st.integers(0, 2))
    ledger = Ledger(batch, chunk, staleness, batches)
    checkpoint, attempt, now = ledger.state(), 0, 0.0
    committed: list[int] = []  # slots on the present lineage, in training order
    committed_at_checkpoint: list[int] = []
    in_flight: list[tuple[range, int]] = []
    for _ in range(data.draw(st.integers(0, 120))):
        action = data.draw(st.sampled_from(["lease", "deliver", "duplicate", "train", "save", "crash", "wait", "die"]))
        if action == "lease":
            for lease in ledger.lease(data.draw(st.sampled_from("ab")), 2, now, 5):
                slots = ledger.slots(lease.chunk)
                assert slots.stop <= (ledger.version + staleness + 1) * batch
                in_flight.append((slots, attempt))
        elif action in ("deliver", "duplicate") and in_flight:
            index = data.draw(st.integers(0, len(in_flight) - 1))
            slots, written = in_flight[index] if action == "duplicate" else in_flight.pop(index)
            ledger.accept(slots, written)
        elif action == "train" and ledger.trained < batches and not ledger.missing(ledger.trained):
            committed += ledger.batch_slots(ledger.trained)
            ledger.train(ledger.trained)
            ledger.advance(attempt, ledger.trained)
        elif action == "save":
            checkpoint, committed_at_checkpoint = ledger.state(), list(committed)
        elif action == "crash":
            attempt += 1
            ledger.restore(checkpoint, attempt)
            committed = list(committed_at_checkpoint)
        elif action == "die":
            ledger.release("a")
        elif action == "wait":
            now += 6
    # Then everything works again: the run must come to its end, with every slot once.
    while ledger.trained < batches:
        for lease in ledger.lease("c", 99, now, 5):
            ledger.accept(ledger.slots(lease.chunk), attempt)
        now += 6
        while ledger.trained < batches and not ledger.missing(ledger.trained):
            committed += ledger.batch_slots(ledger.trained)
            ledger.train(ledger.trained)
            ledger.advance(attempt, ledger.trained)
    assert committed == list(range(batch * batches))
