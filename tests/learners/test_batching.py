import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.batching import PADDED_LIMIT, WIDTH_STEP, microbatches, pad, pad_tokens, padded_width

lengths_lists = st.lists(st.integers(1, 60), max_size=50)


@given(lengths_lists, st.integers(1, 200), st.integers(1, 5))
def test_every_row_is_in_exactly_one_microbatch_of_one_rank(lengths, budget, world_size):
    ranks = [microbatches(lengths, budget, rank, world_size) for rank in range(world_size)]
    assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(len(lengths)))


@given(lengths_lists, st.integers(1, 200), st.integers(1, 5))
def test_padded_tokens_fit_the_budget_unless_one_row_alone_exceeds_it(lengths, budget, world_size):
    for rank in range(world_size):
        for batch in microbatches(lengths, budget, rank, world_size):
            if len(batch) > 1:
                assert len(batch) * max(lengths[row] for row in batch) <= budget


@given(lengths_lists, st.integers(1, 200), st.integers(1, 5))
def test_every_rank_gets_the_same_number_of_microbatches_and_the_same_answer_twice(lengths, budget, world_size):
    first = [microbatches(lengths, budget, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in first}) == 1
    assert first == [microbatches(lengths, budget, rank, world_size) for rank in range(world_size)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=50), st.integers(1, 5))
def test_ranks_get_rows_that_differ_by_one_and_tokens_that_differ_by_about_the_longest_row(lengths, world_size):
    ranks = [microbatches(lengths, 100, rank, world_size) for rank in range(world_size)]
    rows = [sum(len(batch) for batch in rank) for rank in ranks]
    tokens = [sum(lengths[row] for batch in rank for row in batch) for rank in ranks]
    assert max(rows) - min(rows) <= 1
    assert max(tokens) - min(tokens) <= 2 * max(lengths)


def test_short_rows_share_a_microbatch_and_long_ones_do_not():
    assert microbatches([10, 2, 2, 10, 2], 12, 0, 1) == [[0], [3], [1, 2, 4]]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(2, 9)), max_size=30), st.integers(1, 500))
def test_rows_of_one_example_stay_together_within_the_budget(examples, budget):
    lengths, rows = [length for length, _ in examples], [count for _, count in examples]
    batches = microbatches(lengths, budget, 0, 1, rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    for batch in batches:
        if len(batch) > 1:
            assert sum(rows[i] for i in batch) * max(lengths[i] for i in batch) <= budget


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), max_size=30), st.integers(1, 300))
def test_where_padding_is_left_out_the_budget_is_for_real_tokens(examples, budget):
    """And padded rows, which attention still works on, take a stated multiple of it."""
    lengths, rows = [length for length, _ in examples], [count for _, count in examples]
    tokens = [length + (count - 1) * (1 + length // 2) for length, count in examples]
    batches = microbatches(lengths, budget, 0, 1, rows, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    for batch in batches:
        if len(batch) > 1:
            assert sum(tokens[i] for i in batch) <= budget
            assert sum(rows[i] for i in batch) * max(lengths[i] for i in batch) <= PADDED_LIMIT * budget
    padded = microbatches(lengths, budget, 0, 1, rows)
    assert len(batches) <= len(padded)


def test_one_long_row_does_not_widen_short_ones_without_bound():
    assert microbatches([100, *[1] * 20], 120, 0, 1, tokens=[100, *[1] * 20]) == [[0, 1, 2, 3], [*range(4, 21)]]


def test_widths_recur_and_stay_within_the_limit():
    assert [padded_width(length, 3 * WIDTH_STEP - 1) for length in (1, 8, 9, 16, 17, 23)] == [8, 8, 16, 16, 23, 23]


def test_a_rank_without_rows_gets_empty_microbatches():
    assert microbatches([5], 5, 1, 2) == [[]]


def test_padding_is_on_the_right_and_masked():
    tokens, mask = pad_tokens([np.array([3, 4], np.int32), [5]], pad_id=9)
    assert tokens.tolist() == [[3, 4], [5, 9]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert pad([[0.5], [1.0, 2.0]], 0.0, torch.float32).tolist() == [[0.5, 0.0], [1.0, 2.0]]
