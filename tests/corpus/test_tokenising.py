"""Rows of text to token tables with limits; the BPE tokenizer."""

import pytest

from corpus import schemas
from corpus.problems import UsageProblem
from corpus.rows import Comparison, Demonstration, Prompt
from corpus.tokenising import (
    TokenLimits,
    counts,
    tokenise_comparisons,
    tokenise_demonstrations,
    tokenise_pretraining,
    tokenise_prompts,
    train_bpe_tokenizer,
)

LIMITS = TokenLimits(max_prompt_tokens=40, max_response_tokens=10, context_tokens=50)
LONG = "a very long text with many words in it " * 10


def test_prompts_over_the_limit_are_left_out_and_counted(tokenizer, tmp_path):
    rows = [Prompt("1", "u", "hello"), Prompt("2", "u", LONG), Prompt("3", "v", "world", {"a": "é"})]
    table = tokenise_prompts(rows, tokenizer, LIMITS)
    assert table["prompt_id"].to_pylist() == ["1", "3"]
    assert counts(table) == {"long_prompts": 1}
    assert table["meta"].to_pylist() == ["", '{"a": "é"}']
    schemas.write_table(table, tmp_path / "t.parquet", "prompts")
    assert counts(schemas.read_table(tmp_path / "t.parquet", "prompts")) == {"long_prompts": 1}


def test_a_long_prompt_can_be_refused_instead(tokenizer):
    limits = LIMITS.model_copy(update={"long_prompts": "refuse"})
    assert tokenise_prompts([Prompt("1", "u", "hello")], tokenizer, limits).num_rows == 1
    with pytest.raises(UsageProblem, match=r"prompt 2 .* tokens; at most 40"):
        tokenise_prompts([Prompt("2", "u", LONG)], tokenizer, limits)


def test_limits_that_do_not_fit_the_context_are_refused():
    with pytest.raises(ValueError, match=r"1024.*1025.*2048\); raise that"):
        TokenLimits(max_response_tokens=1025)


def test_demonstrations_that_are_too_long_are_left_out(tokenizer):
    rows = [
        Demonstration("1", "u", "hello", "hi"),
        Demonstration("2", "u", "hello", LONG),
        Demonstration("3", "u", LONG, "hi"),
    ]
    table = tokenise_demonstrations(rows, tokenizer, LIMITS)
    assert table["prompt_id"].to_pylist() == ["1"]
    assert counts(table) == {"long_prompts": 1, "long_responses": 1}
    assert table["response_tokens"].to_pylist()[0][-1] == tokenizer.eos_token_id


def test_comparisons_keep_all_k_responses_and_cut_long_ones_without_eos(tokenizer):
    rows = [
        Comparison("1", "u", "l", "hello", ("a", LONG, "b"), (0, 1, 1)),
        Comparison("2", "u", "l", LONG, ("a", "b"), (0, 1)),
    ]
    table = tokenise_comparisons(rows, tokenizer, LIMITS)
    assert counts(table) == {"long_prompts": 1, "cut_responses": 1}
    (row,) = table.to_pylist()
    assert row["ranks"] == [0, 1, 1]
    assert row["responses"] == ["a", LONG, "b"]
    assert [len(tokens) for tokens in row["response_tokens"]][1] == 10
    assert [tokens[-1] == tokenizer.eos_token_id for tokens in row["response_tokens"]] == [True, False, True]


def test_a_document_longer_than_the_context_becomes_windows_that_join_to_it(tokenizer):
    table = tokenise_pretraining(["hello", LONG, ""], tokenizer, LIMITS)
    rows = table["tokens"].to_pylist()
    assert counts(table) == {"split_documents": 1, "empty_documents": 1}
    assert rows[0] == [tokenizer.bos_token_id, *tokenizer("hello", add_special_tokens=False)["input_ids"], 2]
    assert max(map(len, rows)) == 50
    assert [2 in row for row in rows] == [True, *[False] * (len(rows) - 2), True]
    assert tokenizer.decode([token for row in rows[1:] for token in row], skip_special_tokens=True) == LONG


def test_pad_equal_to_eos_is_refused_by_every_table(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    for tokenise in (
        lambda: tokenise_pretraining(["a"], tokenizer, LIMITS),
        lambda: tokenise_prompts([Prompt("1", "u", "a")], tokenizer, LIMITS),
        lambda: tokenise_demonstrations([Demonstration("1", "u", "a", "b")], tokenizer, LIMITS),
        lambda: tokenise_comparisons([Comparison("1", "u", "l", "a", ("b", "c"), (0, 1))], tokenizer, LIMITS),
    ):
        with pytest.raises(UsageProblem, match="PAD and EOS"):
            tokenise()


def test_a_row_of_the_built_in_world_is_tokenised_as_it_is(tokenizer):
    from corpus.world.build import Demonstration as WorldDemonstration

    row = WorldDemonstration("1", "u", "hello", "hi", {"kind": "chat"})
    assert tokenise_demonstrations([row], tokenizer, LIMITS)["meta"].to_pylist() == ['{"kind": "chat"}']


def test_no_rows_make_an_empty_table(tokenizer):
    assert tokenise_comparisons([], tokenizer, LIMITS).num_rows == 0


def test_the_bpe_tokenizer_writes_any_text_and_has_distinct_special_tokens(tokenizer):
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    text = " Grüße, 世界 🎉\n\n  tabs\tand   spaces , ok . "
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 300
    assert len(tokenizer("hello world", add_special_tokens=False)["input_ids"]) < len("hello world")


def test_the_bpe_tokenizer_is_the_same_each_time(tmp_path):
    texts = ["the quick brown fox", "the lazy dog", "the brown dog"]
    first = train_bpe_tokenizer(texts, 280, tmp_path / "a")
    second = train_bpe_tokenizer(texts, 280, tmp_path / "b")
    assert first.get_vocab() == second.get_vocab()


def test_a_vocabulary_too_small_or_without_text_is_refused(tmp_path):
    with pytest.raises(UsageProblem, match="258 is too small"):
        train_bpe_tokenizer(["a"], 258, tmp_path)
    with pytest.raises(UsageProblem, match="no text"):
        train_bpe_tokenizer(["", ""], 300, tmp_path)
