"""Accuracy on ranked replies, and the two baselines beside a reward model."""

import math
import random
from pathlib import Path

import pytest

from corpus.files import FileCorpusSettings, load_files
from corpus.problems import RunProblem, UsageProblem
from corpus.schemas import make_table
from evaluation.rm_baselines import (
    BAG_OF_WORDS,
    LONGER,
    BagOfWords,
    baselines,
    measured_baselines,
    ordered_pairs,
    pair_accuracy,
)

HH = Path(__file__).parents[2].parent / "shared" / "data" / "hh-rlhf"


def table(rows):
    """A comparisons table from (prompt id, replies, ranks)."""
    return make_table(
        "comparisons",
        {
            "prompt_id": [prompt for prompt, _, _ in rows],
            "user_id": [prompt for prompt, _, _ in rows],
            "labeler_id": [""] * len(rows),
            "prompt": [prompt for prompt, _, _ in rows],
            "prompt_tokens": [[1]] * len(rows),
            "responses": [list(replies) for _, replies, _ in rows],
            "response_tokens": [[[1]] * len(replies) for _, replies, _ in rows],
            "ranks": [list(ranks) for _, _, ranks in rows],
            "meta": [""] * len(rows),
        },
    )


def test_pairs_are_better_first_and_ties_are_dropped():
    assert ordered_pairs([1, 0, 1]) == [(1, 0), (1, 2)]
    assert ordered_pairs([0, 0]) == []
    assert len(ordered_pairs(list(range(9)))) == 36


def test_accuracy_counts_pairs_in_the_right_order_and_equal_scores_as_half():
    found = pair_accuracy([[3.0, 2.0, 1.0], [0.0, 1.0], [5.0, 5.0]], [[0, 1, 1], [0, 1], [1, 0]], ["a", "b", "c"])
    assert (found.rate, found.pairs) == (pytest.approx((2 + 0 + 0.5) / 4), 4)
    assert found.low < found.rate < found.high


def test_the_scale_of_the_scores_does_not_matter():
    scores, ranks, ids = [[3.0, 2.0], [0.0, 1.0]], [[0, 1], [0, 1]], ["a", "b"]
    assert pair_accuracy(scores, ranks, ids) == pair_accuracy([[9.0, -8.0], [-1.0, 90.0]], ranks, ids)


def test_the_interval_is_clustered_by_prompt():
    generator = random.Random(0)
    scores = [[1.0, 0.0] if generator.random() < 0.7 else [0.0, 1.0] for _ in range(100)]
    ranks = [[0, 1]] * 100
    apart = pair_accuracy(scores, ranks, [str(number) for number in range(100)])
    copied = pair_accuracy(scores * 9, ranks * 9, [str(number % 100) for number in range(900)])
    assert copied.rate == apart.rate
    assert copied.high - copied.low == pytest.approx(apart.high - apart.low, rel=0.15), "copies are no evidence"
    taken_apart = pair_accuracy(scores * 9, ranks * 9, [str(number) for number in range(900)])
    assert taken_apart.high - taken_apart.low < 0.5 * (apart.high - apart.low), "negative control"
    normal = 1.96 * math.sqrt(apart.rate * (1 - apart.rate) / 100)
    assert (apart.high - apart.low) / 2 == pytest.approx(normal, rel=0.2)


def test_what_cannot_be_measured_is_said():
    with pytest.raises(UsageProblem, match="no tie"):
        pair_accuracy([[1.0, 2.0]], [[0, 0]], ["a"])
    with pytest.raises(UsageProblem, match="comparison 0 has 2 ranks and 3 scores"):
        pair_accuracy([[1.0, 2.0, 3.0]], [[0, 1]], ["a"])
    with pytest.raises(RunProblem, match="finite"):
        pair_accuracy([[1.0, math.nan]], [[0, 1]], ["a"])


def made_up(count, seed, signal=True):
    """Replies of common words; the better one has "kind" in it, and the longer one is always the worse."""
    generator = random.Random(seed)
    words = ["the", "a", "red", "blue", "house", "tree", "runs", "sleeps"]
    rows = []
    for number in range(count):
        good = [*generator.choices(words, k=4), "kind" if signal else "the"]
        bad = generator.choices(words, k=9)
        rows.append((str(number), [" ".join(bad), " ".join(good)], [1, 0]))
    return rows


def test_words_that_people_like_are_found_and_length_is_not_mistaken_for_them():
    found = baselines(table(made_up(60, 0)), table(made_up(40, 1)))
    assert found[BAG_OF_WORDS].rate == 1
    assert found[LONGER].rate == 0
    assert found[BAG_OF_WORDS].pairs == 40


def test_a_bag_of_words_learns_nothing_from_labels_that_are_noise():
    def noise(seed):
        generator = random.Random(seed)
        words = ["the", "a", "red", "blue", "house", "tree"]
        return [(str(n), [" ".join(generator.choices(words, k=6)) for _ in "ab"], [0, 1]) for n in range(200)]

    found = baselines(table(noise(0)), table(noise(1)))[BAG_OF_WORDS]
    assert found.low < 0.5 < found.high


def test_exchanging_the_replies_changes_nothing():
    rows = made_up(30, 0)
    turned = [(prompt, replies[::-1], ranks[::-1]) for prompt, replies, ranks in rows]
    first, second = (BagOfWords(table(each)).scores([["kind tree", "red tree"]])[0] for each in (rows, turned))
    assert first == pytest.approx(second, abs=1e-3)
    assert first[0] > first[1]


def test_two_prompts_and_two_uses_of_a_word_are_enough_and_less_is_refused():
    small = [("a", ["good dog", "bad dog"], [0, 1]), ("b", ["good cat", "bad cat"], [0, 1])]
    ((good, bad),) = BagOfWords(table(small)).scores([["good", "bad"]])
    assert good > bad
    with pytest.raises(UsageProblem, match="two prompts"):
        BagOfWords(table([small[0], ("b", ["good cat", "bad cat"], [0, 0])]))
    with pytest.raises(UsageProblem, match="no words to learn from"):
        BagOfWords(table([("a", ["one", "two"], [0, 1]), ("b", ["three", "four"], [0, 1])]))


def test_a_baseline_that_cannot_be_fitted_is_left_out_with_its_reason():
    valid = table(made_up(40, 1))
    ties = table([(prompt, replies, [0, 0]) for prompt, replies, _ in made_up(20, 0)])
    few, none = table(made_up(1, 0)), valid.slice(0, 0)
    for train, reason in ((ties, "two prompts"), (few, "two prompts"), (none, "no words")):
        found, left_out = measured_baselines(train, valid)
        assert found.keys() == baselines(train, valid).keys() == {LONGER}
        assert reason in left_out[BAG_OF_WORDS]
    found, left_out = measured_baselines(valid, ties)
    assert found == {}
    assert all("no tie" in reason for reason in left_out.values())
    assert measured_baselines(valid, valid)[1] == {}, "negative control"


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="the HH data is not beside this checkout (../shared/data/hh-rlhf)")
def test_on_the_hh_comparisons_words_help_and_length_does_not():
    corpus = load_files(FileCorpusSettings(path=str(HH)))
    assert corpus.comparisons_train is not None
    assert corpus.comparisons_valid is not None
    train, valid = (
        table([(row.prompt_id, row.responses, row.ranks) for row in rows])
        for rows in (corpus.comparisons_train, corpus.comparisons_valid)
    )
    found = baselines(train, valid)
    assert found[BAG_OF_WORDS].low > 0.5
    assert found[LONGER].rate < 0.5, "in the harmlessness data the shorter reply is preferred"
