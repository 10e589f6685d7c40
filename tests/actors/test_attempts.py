"""Attempts: numbers that nobody had before, and which attempt's work is in the final weights."""

import json
import threading

import pytest

from actors.attempts import (
    Attempt,
    SavedProgress,
    Segment,
    begin_attempt,
    committed_lineage,
    is_on_lineage,
    owner_of,
    read_attempts,
    read_counts,
    read_trained,
    write_counts,
    write_trained,
)
from corpus.problems import RunProblem


def attempt(number: int, start: int, parent: int | None) -> Attempt:
    return Attempt(number, start, parent, "2026-01-01T00:00:00+00:00", None, "same")


def test_two_that_begin_from_one_checkpoint_have_numbers_of_their_own(tmp_path):
    made = [begin_attempt(tmp_path, 0, 7, None, "i"), *(begin_attempt(tmp_path, 4, 8, 0, "i") for _ in range(2))]
    assert [each.number for each in made] == [0, 1, 2]
    assert read_attempts(tmp_path) == made
    assert (made[2].start, made[2].parent, made[2].run_epoch, made[2].identity) == (4, 0, 8, "i")
    written = json.loads((tmp_path / "attempts" / "attempt-000002.json").read_text())
    assert (written["schema_version"], written["number"], written["start"]) == (1, 2, 4)


def test_many_that_begin_at_once_have_numbers_of_their_own(tmp_path):
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.append(begin_attempt(tmp_path, 0).number), daemon=True)
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(numbers) == list(range(16))


def test_the_number_of_an_attempt_that_died_at_its_beginning_is_not_used_again(tmp_path):
    begin_attempt(tmp_path, 0)
    whole = (tmp_path / "attempts" / "attempt-000000.json").read_text()
    for number, text in ((1, ""), (4, whole[: len(whole) // 2])):
        (tmp_path / "attempts" / f"attempt-{number:06d}.json").write_text(text)
    assert begin_attempt(tmp_path, 0).number == 5
    assert [each.number for each in read_attempts(tmp_path)] == [0, 5]


def test_a_record_that_is_not_one_is_named(tmp_path):
    begin_attempt(tmp_path, 0)
    path = tmp_path / "attempts" / "attempt-000000.json"
    record = json.loads(path.read_text())
    for changed, sentence in (
        (record | {"number": 3}, "attempt-000000.json says that it is of attempt 3"),
        (record | {"schema_version": 9}, "its schema version is 9; this program reads 1"),
        ({"schema_version": 1}, "attempt-000000.json cannot be read as the record of an attempt"),
    ):
        path.write_text(json.dumps(changed, indent=1) + "\n")
        with pytest.raises(RunProblem, match=sentence):
            read_attempts(tmp_path)


def test_where_no_record_can_be_written_it_is_said(tmp_path):
    (tmp_path / "attempts").write_text("a file")
    with pytest.raises(RunProblem, match="the beginning of an attempt could not be recorded"):
        begin_attempt(tmp_path, 0)


def test_no_stage_has_no_attempts_and_no_counts(tmp_path):
    assert (read_attempts(tmp_path), read_counts(tmp_path), committed_lineage([])) == ([], {}, [])
    assert owner_of(1, []) is None


def test_an_attempt_keeps_what_no_later_one_rolled_back():
    attempts = [attempt(0, 0, None), attempt(1, 4, 0), attempt(2, 4, 0), attempt(3, 7, 2)]
    assert committed_lineage(attempts) == [Segment(0, 0, 4), Segment(2, 4, 7), Segment(3, 7, None)]
    assert [owner_of(update, attempts) for update in (1, 4, 5, 7, 8, 99)] == [0, 0, 2, 2, 3, 3]


def test_a_checkpoint_that_was_passed_over_once_may_be_gone_on_from_later():
    """Attempt 2 found attempt 1's checkpoint unreadable and began from an older one; attempt 3 could read it again."""
    attempts = [attempt(0, 0, None), attempt(1, 8, 0), attempt(2, 4, 0), attempt(3, 12, 1)]
    assert [owner_of(update, attempts) for update in (4, 6, 8, 10, 12, 13)] == [0, 0, 0, 1, 1, 3]


def test_weights_are_on_the_lineage_until_the_next_attempt_began():
    segments = committed_lineage([attempt(0, 0, None), attempt(1, 4, 0), attempt(2, 4, 0)])
    assert [is_on_lineage(0, update, segments) for update in (0, 4, 5)] == [True, True, False]
    assert [is_on_lineage(2, update, segments) for update in (3, 4, 9)] == [False, True, True]
    assert not is_on_lineage(1, 4, segments)


@pytest.mark.parametrize(
    ("attempts", "sentence"),
    [
        ([attempt(1, 4, 0)], "Attempt 1 began from attempt 0, of which there is no record"),
        ([attempt(0, 6, None)], "Attempt 0 began with 6 updates and does not say whose"),
        (
            [attempt(0, 0, None), attempt(1, 5, 0), attempt(2, 3, 1)],
            "Attempt 2 began with 3 updates of attempt 1, which itself began with 5",
        ),
        ([attempt(0, 0, None), attempt(1, 2, 1)], "Attempt 1 began from attempt 1, which is not an earlier one"),
    ],
)
def test_records_that_do_not_fit_together_are_refused(attempts, sentence):
    with pytest.raises(RunProblem, match=sentence):
        committed_lineage(attempts)


def test_counts_are_read_as_they_are_written(tmp_path):
    counts = {0: {"generated": 3}, 2: {"generated": 1}}
    write_counts(tmp_path, counts)
    assert read_counts(tmp_path) == counts
    begin_attempt(tmp_path, 0)
    assert [each.number for each in read_attempts(tmp_path)] == [0]
    (tmp_path / "attempts" / "counts.json").write_text('{"schema_version": 1, "attempts": {"x": 1}}')
    with pytest.raises(RunProblem, match=r"counts\.json cannot be read as the counts of a stage's attempts"):
        read_counts(tmp_path)


def test_what_the_last_checkpoint_says_is_read_as_it_is_written(tmp_path):
    assert read_trained(tmp_path) is None
    ledger = {"attempt": 1, "version": 3, "trained": 4, "accepted": [[8, 0], [9, 1]]}
    data = {"attempt": 1, "steps": {"policy": 8, "value": 8}, "stopped_by": "the KL budget", "ledger": ledger}
    saved = SavedProgress.of(4, data, [8, 9])
    write_trained(tmp_path, saved)
    assert (read_trained(tmp_path), saved.accepted) == (saved, [8, 9])
    path = tmp_path / "attempts" / "trained.json"
    written = json.loads(path.read_text())
    assert written == {"schema_version": 1, "step": 4, "waiting": [8, 9], **data}
    for changed, sentence in (
        ({"schema_version": 9}, "its schema version is 9; this program reads 1"),
        (written | {"steps": 8}, r"trained\.json cannot be read as what a stage's last checkpoint says"),
        (written | {"ledger": {}}, r"trained\.json cannot be read as what a stage's last checkpoint says"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(RunProblem, match=sentence):
            read_trained(tmp_path)
