import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.problems import UsageProblem
from corpus.schemas import make_table
from learners.rows import demonstrations, documents, packed, truncated

texts = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12).map(lambda t: np.array(t, np.int32)), max_size=20)


def make_demonstrations(pairs):
    count = len(pairs)
    return make_table(
        "demonstrations",
        {
            "prompt_id": [str(i) for i in range(count)],
            "user_id": ["u"] * count,
            "prompt": ["p"] * count,
            "response": ["r"] * count,
            "prompt_tokens": [prompt for prompt, _ in pairs],
            "response_tokens": [response for _, response in pairs],
            "meta": [""] * count,
        },
    )


@given(texts, st.integers(2, 9))
def test_packing_loses_at_most_one_token_and_keeps_their_order(documents, length):
    rows = packed(documents, length)
    stream = [token for document in documents for token in document.tolist()]
    joined = [token for row in rows for token in row.tokens.tolist()]
    assert joined == stream[: len(joined)]
    assert len(stream) - len(joined) <= 1
    assert all(len(row.tokens) == length for row in rows[:-1])
    assert all(row.first_target == 1 for row in rows)


def test_the_loss_of_a_demonstration_begins_at_its_response():
    [row] = demonstrations(make_demonstrations([([1, 2, 3], [4, 5])]), 5)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5]
    assert row.first_target == 3
    assert row.targets == 2


def test_a_demonstration_longer_than_the_context_is_refused_by_number():
    with pytest.raises(UsageProblem, match="demonstration 1 has 6 tokens; the context length is 5"):
        demonstrations(make_demonstrations([([1], [2]), ([1, 2, 3], [4, 5, 6])]), 5)


def test_documents_are_cut_at_the_context_length_and_single_tokens_left_out():
    table = make_table("pretraining", {"tokens": [[1, 2, 3], [4], [5, 6]]})
    rows = truncated(documents(table), 2)
    assert [row.tokens.tolist() for row in rows] == [[1, 2], [5, 6]]


def test_a_slice_of_a_table_gives_its_own_rows():
    table = make_table("pretraining", {"tokens": [[1, 2, 3], [4], [5, 6]]})
    assert [text.tolist() for text in documents(table.slice(1))] == [[4], [5, 6]]
