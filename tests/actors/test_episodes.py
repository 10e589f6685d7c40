"""Slots, seeds and the schema: what must be the same on every machine and in every run of one recipe."""

import pyarrow as pa
import pytest

from actors.episodes import (
    EPISODE,
    GENERATED,
    PromptOrder,
    episode_seed,
    parse_version,
    version_label,
    with_scores,
)


def test_every_pass_over_the_prompts_is_a_new_permutation_of_them():
    order = PromptOrder(7, seed=3)
    passes = [[order[slot] for slot in range(7 * number, 7 * number + 7)] for number in range(4)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({tuple(each) for each in passes}) == 4


def test_the_order_is_a_function_of_the_seed_and_not_of_who_asked_first():
    some, same, other = PromptOrder(50, 3), PromptOrder(50, 3), PromptOrder(50, 4)
    forwards = [some[slot] for slot in range(120)]
    backwards = [same[slot] for slot in reversed(range(120))]
    assert forwards == list(reversed(backwards))
    assert forwards != [other[slot] for slot in range(120)]


def test_a_seed_belongs_to_one_episode_of_one_round_of_one_run():
    seeds = {
        episode_seed(run, number, slot, sample)
        for run in (0, 1)
        for number in (1, 2)
        for slot in range(500)
        for sample in (0, 1)
    }
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert episode_seed(0, 1, 17) == 1080691585629642372  # as it was when the first runs were made


def test_versions_are_read_as_they_are_written():
    assert parse_version(version_label(3, 14)) == (3, 14)


def generated(rows: int) -> pa.RecordBatch:
    columns = {
        "run": ["r"] * rows,
        "round": [1] * rows,
        "slot": list(range(rows)),
        "sample": [0] * rows,
        "attempt": [0] * rows,
        "prompt_id": ["p"] * rows,
        "prompt_tokens": [[1, 2]] * rows,
        "response_tokens": [[3]] * rows,
        "behaviour_logprobs": [[-1.0]] * rows,
        "version_spans": [[{"attempt": 0, "update": 0, "start": 0, "end": 1}]] * rows,
        "finish_reason": ["stop"] * rows,
        "generator": ["g"] * rows,
        "leased_at": [1.0] * rows,
        "generated_at": [2.0] * rows,
    }
    return pa.RecordBatch.from_pydict(columns, schema=GENERATED)


def test_scores_join_their_episodes_in_order():
    scored = with_scores(generated(2), [0.5, -0.5], [[-1.5], [-2.5]], 4.0)
    assert scored.schema == EPISODE
    assert scored.column("slot").to_pylist() == [0, 1]
    assert scored.column("score").to_pylist() == [0.5, -0.5]
    assert scored.column("reference_logprobs").to_pylist() == [[-1.5], [-2.5]]
    assert scored.column("accepted_at").to_pylist() == [4.0, 4.0]


def test_a_missing_score_is_refused():
    with pytest.raises(ValueError, match="not all the same length"):
        with_scores(generated(2), [0.5], [[-1.5], [-2.5]], 4.0)


def test_stored_episodes_say_which_schema_they_have():
    for schema in (GENERATED, EPISODE):
        assert schema.metadata == {b"schema_version": b"1"}
