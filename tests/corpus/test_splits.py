"""Splits by user, de-duplication, and the limit for each user."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.problems import UsageProblem
from corpus.rows import Prompt
from corpus.splits import drop_long_common_prefixes, is_held_out, limit_per_user, split_by_user


def prompts(*texts, users=None):
    users = users or texts
    return [Prompt(text, user, text) for text, user in zip(texts, users, strict=True)]


@given(st.lists(st.integers(0, 30), min_size=100, max_size=200), st.integers(0, 5))
def test_no_user_is_on_both_sides_and_no_row_is_lost(users, seed):
    rows = [Prompt(str(number), str(user), "x") for number, user in enumerate([*users, *range(30)])]
    train, held_out = split_by_user(rows, 0.4, seed)
    assert not {row.user_id for row in train} & {row.user_id for row in held_out}
    assert sorted([*train, *held_out], key=lambda row: int(row.prompt_id)) == rows


def test_the_split_depends_on_user_and_seed_alone():
    users = [str(number) for number in range(2000)]
    held_out = {user for user in users if is_held_out(user, 0.2, 0)}
    assert 0.17 < len(held_out) / 2000 < 0.23
    assert held_out == {user for user in reversed(users) if is_held_out(user, 0.2, 0)}
    assert held_out != {user for user in users if is_held_out(user, 0.2, 1)}
    assert held_out < {user for user in users if is_held_out(user, 0.3, 0)}, "more held out only adds users"


def test_an_empty_side_is_a_usage_problem():
    with pytest.raises(UsageProblem, match=r"is empty: 3 prompts of 1 user\(s\), .*; give rows of more users"):
        split_by_user(prompts("a", "b", "c", users="uuu"), 0.2, 0, "prompts")


def test_prompts_with_a_long_common_prefix_count_once():
    rows = prompts("abcd 1", "abcd 2", "abc", "abc", "abx", "abcd")
    assert [row.prompt for row in drop_long_common_prefixes(rows, 4)] == ["abcd 1", "abc", "abx"]
    assert [row.prompt for row in drop_long_common_prefixes(rows, 100)] == ["abcd 1", "abcd 2", "abc", "abx", "abcd"]


def test_a_user_gives_at_most_so_many_prompts():
    rows = prompts("a", "b", "a", "c", "d", users="uuuuv")
    assert [row.prompt for row in limit_per_user(rows, 2)] == ["a", "b", "a", "d"]
    assert limit_per_user(rows, 3) == rows
