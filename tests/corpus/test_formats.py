"""Each format of rows: detected, read, refused with its place."""

import json

import pytest

from corpus.formats import read_source
from corpus.problems import UsageProblem

USER, REPLY = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}
OTHER = {"role": "assistant", "content": "Go away."}
HH = "\n\nHuman: Hello\n\nAssistant:"


@pytest.fixture
def source(tmp_path):
    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hello", "response": " Hi.\n"},
        {"prompt": [USER], "response": "Hi."},
        {"messages": [USER, REPLY]},
        {"prompt": "Hello", "chosen": "Hi.", "rejected": "Go away."},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        {"prompt": "Hello", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        {"chosen": f"{HH} Hi.", "rejected": f"{HH} Go away."},
        {"prompt": "Hello", "chosen": f"{HH} Hi.", "rejected": f"{HH} Go away."},
        {"prompt": HH, "chosen": f"{HH} Hi.", "rejected": f"{HH} Go away."},
        {"prompt": "Hello", "responses": ["Go away.", "Hi."], "ranks": [2, 1]},
    ],
)
def test_all_formats_of_one_exchange_say_the_same(source, row):
    rows = read_source(source(row))
    (demonstration,) = rows.demonstrations
    assert (demonstration.prompt, demonstration.response) == ("Hello", "Hi.")
    assert rows.documents[0].text == f"{HH} Hi."
    assert rows.prompts[0].prompt_id == read_source(source({"prompt": "Hello"})).prompts[0].prompt_id
    if "chosen" in row or "ranks" in row:
        (comparison,) = rows.comparisons
        ranked = dict(zip(comparison.ranks, comparison.responses, strict=True))
        assert ranked == {0: "Hi.", 1: "Go away."}
    else:
        assert rows.comparisons == []


def test_rankings_keep_ties_labelers_and_ids(source):
    row = {"prompt": "a", "responses": ["x", "y", "z", "w"], "ranks": [7, 3, 7, 9]}
    named = {"prompt_id": "p", "user_id": 5, "labeler_id": "anna", "meta": {"source": "desk"}}
    (comparison,) = read_source(source(row | named)).comparisons
    assert comparison.ranks == (1, 0, 1, 2)
    assert (comparison.prompt_id, comparison.user_id, comparison.labeler_id) == ("p", "5", "anna")
    assert comparison.meta == {"source": "desk"}


@pytest.mark.parametrize("column", ["prompt_id", "user_id", "labeler_id"])
def test_the_number_0_is_an_id_and_an_empty_text_is_none(source, column):
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    read = [read_source(source(row | given)).comparisons[0] for given in ({column: 0}, {column: ""}, {})]
    zero, empty, absent = (getattr(comparison, column) for comparison in read)
    assert zero == "0"
    assert empty == absent != "0"


def test_documents_of_user_0_are_his(source):
    rows = read_source(source({"text": "one", "user_id": 0}, {"text": "two", "user_id": 0}))
    assert {document.user_id for document in rows.documents} == {"0"}


def test_meta_that_json_cannot_hold_is_named(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"], "meta": [{"on": datetime.date(2026, 1, 1)}]}), tmp_path / "a.parquet")
    with pytest.raises(UsageProblem, match=r"a\.parquet, row 1: meta holds what JSON cannot"):
        read_source(str(tmp_path / "a.parquet"))


def test_meta_may_be_json_text_as_in_our_own_tables(source):
    assert read_source(source({"prompt": "a", "meta": '{"k": 1}'})).prompts[0].meta == {"k": 1}
    assert read_source(source({"prompt": "a", "meta": ""})).prompts[0].meta == {}


def test_rows_without_a_user_belong_to_their_opening_prompt(source):
    longer = "\n\nHuman:  HELLO \n\nAssistant: Hi.\n\nHuman: And now?\n\nAssistant:"
    rows = read_source(source({"prompt": "Hello"}, {"prompt": longer}, {"prompt": "Bye"})).prompts
    assert rows[0].user_id == rows[1].user_id != rows[2].user_id
    assert len({row.prompt_id for row in rows}) == 3


def test_a_conversation_that_ends_with_the_user_is_a_prompt(source):
    rows = read_source(source({"messages": [USER]}))
    assert [row.prompt for row in rows.prompts] == ["Hello"]
    assert rows.demonstrations == []


def test_a_preferred_silence_is_compared_and_not_imitated(source):
    rows = read_source(source({"prompt": "Hello", "chosen": "", "rejected": "Go away."}))
    assert rows.comparisons[0].responses == ("", "Go away.")
    assert rows.demonstrations == []
    assert len(rows.prompts) == 1


def test_plain_text_is_documents_only(source):
    rows = read_source(source({"text": "once"}, {"text": "upon"}))
    assert [document.text for document in rows.documents] == ["once", "upon"]
    assert not rows.prompts


def test_a_format_given_wins_over_the_columns(source):
    path = source({"prompt": "Hello", "response": "Hi.", "text": "whole"})
    assert read_source(path).demonstrations
    assert [document.text for document in read_source(path, "text").documents] == ["whole"]
    with pytest.raises(UsageProblem, match=r"rows\.jsonl:1: the column chosen is missing"):
        read_source(path, "pairs")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"columns \(question\) fit none of the formats \(rankings: prompt, responses, ranks;"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "text or a list of messages, not int"),
        ({"prompt": "a", "response": 3}, "response should be text, not int"),
        ({"prompt": "a", "response": " "}, "the response is empty"),
        ({"prompt": "a", "meta": "{"}, "meta is text but not JSON"),
        ({"prompt": "a", "meta": [1]}, "meta should be an object"),
        ({"messages": []}, "messages should be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "text content"),
        ({"messages": [REPLY]}, "no user turn"),
        ({"chosen": "a", "rejected": "b"}, "share no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same reply"),
        ({"chosen": [USER, REPLY], "rejected": [OTHER, REPLY]}, "last assistant turn and in nothing else"),
        ({"chosen": [USER, REPLY], "rejected": "b"}, "messages should be a list"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, "texts or lists of messages, not int"),
        ({"prompt": "a", "chosen": "b", "rejected": True}, "texts or lists of messages, not bool"),
        ({"chosen": {"a": 1}, "rejected": "b"}, "texts or lists of messages, not dict"),
        ({"prompt": "a", "chosen": f"{HH} b", "rejected": f"{HH} c"}, "do not begin with the prompt"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"role \['user'\]"),
        ({"messages": [{"content": "x"}]}, "role None"),
        ({"prompt": "a", "responses": ["b"], "ranks": [0]}, "at least 2 responses, not 1"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [0]}, "2 responses and 1 ranks"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [0.5, 1]}, "whole numbers"),
        ({"prompt": "a", "responses": "bc", "ranks": [0, 1]}, "list of texts"),
    ],
)
def test_a_malformed_row_names_file_and_line(source, row, message):
    with pytest.raises(UsageProblem, match=r"rows\.jsonl:1: .*" + message):
        read_source(source(row))


def test_a_later_row_of_another_format_is_named(source):
    with pytest.raises(UsageProblem, match=r"rows\.jsonl:2: the column response is missing or empty"):
        read_source(source({"prompt": "a", "response": "b"}, {"prompt": "a"}))


def test_a_later_row_with_more_columns_is_named_and_not_cut(source):
    rows = ({"prompt": "a"}, {"prompt": "b", "response": "c"})
    with pytest.raises(
        UsageProblem, match=r"rows\.jsonl:2: this row has the columns of prompt_response .* are prompt:"
    ):
        read_source(source(*rows))
    assert len(read_source(source(*rows), "prompt").prompts) == 2, "a format given says what is wanted"


def test_a_pair_of_dialogues_that_go_on_after_the_prompt_parts_where_they_do(source):
    start = f"{HH} Hi.\n\nHuman: And?\n\nAssistant:"
    row = {"prompt": "Hello ", "chosen": f"{start} Yes", "rejected": f"{start} No"}
    (comparison,) = read_source(source(row)).comparisons
    assert (comparison.prompt, comparison.responses) == (start, ("Yes", "No"))


def test_no_rows_is_a_usage_problem(source):
    with pytest.raises(UsageProblem, match="there are no rows"):
        read_source(source())
