"""The tables between stages: checked, versioned, written whole or not at all."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import schemas
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import resolve, write_atomically

ROWS = {
    "pretraining": {"tokens": [[5, 6, 2], [7, 2]]},
    "demonstrations": {
        "prompt_id": ["a"],
        "user_id": ["u"],
        "prompt": ["hello"],
        "response": ["hi"],
        "prompt_tokens": [[1, 5]],
        "response_tokens": [[6, 2]],
        "meta": [""],
    },
    "prompts": {"prompt_id": ["a"], "user_id": ["u"], "prompt": ["hello"], "prompt_tokens": [[1, 5]], "meta": ["{}"]},
    "comparisons": {
        "prompt_id": ["a"],
        "user_id": ["u"],
        "labeler_id": ["l"],
        "prompt": ["hello"],
        "prompt_tokens": [[1, 5]],
        "responses": [["x", "y", "z"]],
        "response_tokens": [[[6, 2], [7, 2], [8]]],
        "ranks": [[1, 0, 1]],
        "meta": [""],
    },
    "samples": {
        "prompt_id": ["a"],
        "sample": [0],
        "prompt_tokens": [[1, 5]],
        "response_tokens": [[6, 2]],
        "response": ["hi"],
        "logprobs": [[-0.5, -1.0]],
        "finish_reason": ["stop"],
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_a_table_reads_back_as_it_was_written(name, tmp_path):
    table = schemas.make_table(name, ROWS[name])
    schemas.write_table(table, tmp_path / "deep" / "t.parquet", name)
    back = schemas.read_table(tmp_path / "deep" / "t.parquet", name)
    assert back.to_pydict() == table.to_pydict()
    assert back.schema.metadata[b"schema_version"] == b"1"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["t.parquet"]


def test_extra_metadata_is_kept_when_writing(tmp_path):
    table = schemas.make_table("prompts", ROWS["prompts"])
    table = table.replace_schema_metadata({**table.schema.metadata, b"dropped.long_prompt": b"3"})
    schemas.write_table(table, tmp_path / "t.parquet", "prompts")
    assert schemas.read_table(tmp_path / "t.parquet", "prompts").schema.metadata[b"dropped.long_prompt"] == b"3"


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("pretraining", "tokens", [[1], []], r"tokens .* no tokens \(row 1\)"),
        ("prompts", "prompt_id", [None], r"prompt_id .* empty \(row 0\)"),
        ("prompts", "prompt_tokens", [[1, None]], "empty value inside a list"),
        ("prompts", "prompt_tokens", [["word"]], "do not fit"),
        ("comparisons", "responses", [["only one"]], "fewer than 2"),
        ("comparisons", "ranks", [[0, 1]], "another number of ranks"),
        ("comparisons", "ranks", [[1, 2, 3]], "begin at 0"),
        ("comparisons", "response_tokens", [[[6], [], [8]]], "without tokens"),
        ("samples", "logprobs", [[-0.5]], "one log-prob per response token"),
        ("samples", "finish_reason", ["abort"], "neither"),
    ],
)
def test_a_bad_value_is_refused_with_its_place(name, column, value, message):
    with pytest.raises(UsageProblem, match=message):
        schemas.make_table(name, {**ROWS[name], column: value})


def test_missing_extra_and_mistyped_columns_are_named():
    table = schemas.make_table("prompts", ROWS["prompts"])
    with pytest.raises(UsageProblem, match=r"lacks the column.*user_id"):
        schemas.validate(table.drop_columns(["user_id"]), "prompts")
    with pytest.raises(UsageProblem, match=r"unknown column.*colour"):
        schemas.validate(table.append_column("colour", pa.array(["red"])), "prompts")
    wide = table.set_column(3, "prompt_tokens", pa.array([[1, 5]], pa.list_(pa.int64())))
    with pytest.raises(UsageProblem, match=r"prompt_tokens .* int64.* should be .*int32"):
        schemas.validate(wide, "prompts")


def test_a_file_of_another_table_or_version_or_kind_is_refused(tmp_path):
    schemas.write_table(schemas.make_table("prompts", ROWS["prompts"]), tmp_path / "p.parquet", "prompts")
    with pytest.raises(UsageProblem, match="this is a prompts table"):
        schemas.read_table(tmp_path / "p.parquet", "comparisons")
    later = schemas.make_table("prompts", ROWS["prompts"]).replace_schema_metadata({"schema_version": "99"})
    pq.write_table(later, tmp_path / "later.parquet")
    with pytest.raises(UsageProblem, match="schema version is 99"):
        schemas.read_table(tmp_path / "later.parquet", "prompts")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(UsageProblem, match="not a readable Parquet"):
        schemas.read_table(tmp_path / "text.parquet", "prompts")
    with pytest.raises(UsageProblem, match="no such file"):
        schemas.read_table(tmp_path / "absent.parquet", "prompts")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    (tmp_path / "f").write_bytes(b"old")

    def half(stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunProblem, match="No space left"):
        write_atomically(tmp_path / "f", half)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_an_unknown_kind_of_address_is_refused():
    with pytest.raises(UsageProblem, match="not known"):
        resolve("ftp://host/file")


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=6)))
def test_untied_pairs_are_those_with_different_ranks(rows):
    table = pa.table({"ranks": pa.array(rows, pa.list_(pa.int32()))})
    wanted = sum(a != b for ranks in rows for a, b in itertools.combinations(ranks, 2))
    assert schemas.untied_pairs(table) == wanted


def test_ties_only_are_no_pairs():
    assert schemas.untied_pairs(pa.table({"ranks": [[0, 0, 0], [0, 0]]})) == 0
