import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from corpus.problems import RunProblem, UsageProblem
from evaluation.win_rate import WinRate, length_controlled_win_rate, win_rate


def prompts(count: int, per_prompt: int = 1) -> np.ndarray:
    return np.repeat(np.arange(count), per_prompt)


def test_a_win_counts_one_and_a_tie_half():
    found = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0], ["a", "b", "c", "d"])
    assert found.rate == (1 + 0.5 + 0 + 0.5) / 4
    assert (found.samples, found.prompts) == (4, 4)


def test_scores_within_the_tie_width_are_ties():
    assert win_rate([1.0, 1.0], [0.9, 0.5], [0, 1], tie_width=0.2).rate == 0.75
    assert win_rate([1.0, 1.0], [0.9, 0.5], [0, 1]).rate == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_identical_policies_are_not_told_apart(seed: int):
    rng = np.random.default_rng(seed)
    ids = prompts(200, 4)
    difficulty = rng.normal(size=200)[ids]
    a, b = difficulty + rng.normal(size=800), difficulty + rng.normal(size=800)
    lengths = rng.poisson(12, 800), rng.poisson(12, 800)
    raw, controlled = win_rate(a, b, ids), length_controlled_win_rate(a, b, *lengths, ids)
    assert raw.low < 0.5 < raw.high
    assert controlled.low < 0.5 < controlled.high


def test_the_same_answers_give_exactly_one_half():
    scores, ids = np.arange(40.0), prompts(20, 2)
    assert win_rate(scores, scores, ids).rate == 0.5
    assert length_controlled_win_rate(scores, scores, ids, ids, ids).rate == pytest.approx(0.5)


def test_exchanging_the_sides_gives_the_complement():
    rng = np.random.default_rng(1)
    a, b, ids = rng.normal(0.3, 1, 300), rng.normal(0, 1, 300), prompts(100, 3)
    lengths = rng.poisson(9, 300), rng.poisson(12, 300)
    assert win_rate(a, b, ids).rate == pytest.approx(1 - win_rate(b, a, ids).rate)
    there = length_controlled_win_rate(a, b, *lengths, ids).rate
    back = length_controlled_win_rate(b, a, lengths[1], lengths[0], ids).rate
    assert there == pytest.approx(1 - back, abs=1e-6)


def test_the_order_of_the_rows_does_not_matter():
    rng = np.random.default_rng(2)
    a, b, ids = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60), prompts(20, 3)
    order = rng.permutation(60)
    mixed = win_rate(a[order], b[order], ids[order])
    assert mixed.model_dump() == pytest.approx(win_rate(a, b, ids).model_dump())


def coverage(per_prompt: int, cluster_by_prompt: bool, runs: int = 120) -> float:
    """How often the interval holds the true rate, 0.6, where the prompt decides most of the outcome."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(runs):
        chance = np.repeat(rng.beta(0.6, 0.4, 60), per_prompt)
        wins = (rng.random(len(chance)) < chance).astype(float)
        ids = prompts(60, per_prompt) if cluster_by_prompt else np.arange(len(wins))
        found = win_rate(wins, np.full(len(wins), 0.5), ids)
        held += found.low <= 0.6 <= found.high
    return held / runs


def test_the_interval_holds_the_truth_about_95_times_in_100():
    assert coverage(4, cluster_by_prompt=True) >= 0.92


def test_an_interval_that_ignores_prompts_holds_it_too_rarely():
    assert coverage(4, cluster_by_prompt=False) < 0.85


@pytest.mark.parametrize("count", [1, 5, 50])
def test_winning_every_prompt_does_not_prove_certainty(count: int):
    found = win_rate(np.ones(count), np.zeros(count), prompts(count))
    assert found.rate == found.high == 1.0
    assert found.low <= 0.025 ** (1 / count) + 0.12  # near the exact bound for `count` of `count`
    assert found.low < 1.0


def test_the_interval_is_repeatable_by_seed():
    rng = np.random.default_rng(4)
    a, b, ids = rng.normal(size=50), rng.normal(size=50), prompts(50)
    lengths = rng.poisson(9, 50), rng.poisson(9, 50)
    found = [length_controlled_win_rate(a, b, *lengths, ids, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].low != found[2].low


def brevity_case(advantage: float, seed: int, count: int = 300) -> tuple[WinRate, WinRate]:
    """A is shorter, and the judge likes short answers; `advantage` is what A is better by beside that."""
    rng = np.random.default_rng(seed)
    ids = prompts(count, 2)
    length_a, length_b = rng.poisson(9, 2 * count), rng.poisson(12, 2 * count)
    a = advantage + rng.normal(0, 1, 2 * count) - 0.2 * length_a
    b = rng.normal(0, 1, 2 * count) - 0.2 * length_b
    return win_rate(a, b, ids), length_controlled_win_rate(a, b, length_a, length_b, ids)


def test_a_policy_that_wins_only_by_brevity_wins_nothing_at_equal_length():
    raw, controlled = brevity_case(0.0, seed=0, count=1500)
    assert raw.low > 0.6
    assert controlled.low < 0.5 < controlled.high
    assert abs(controlled.rate - 0.5) < 0.03


def test_a_policy_that_is_better_and_shorter_keeps_what_is_not_brevity():
    raw, controlled = brevity_case(0.7, seed=0)
    assert controlled.low > 0.5
    assert controlled.rate < raw.rate


def test_under_a_null_of_length_alone_false_alarms_are_rare():
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(40):
        length_a, length_b = rng.poisson(9, 120), rng.poisson(11, 120)
        taste = np.repeat(rng.normal(0, 1, 60), 2)  # some prompts suit A, others B
        a, b = taste + rng.logistic(0, 1, 120) - 0.3 * length_a, -0.3 * length_b
        found = length_controlled_win_rate(a, b, length_a, length_b, prompts(60, 2))
        alarms += not found.low <= 0.5 <= found.high
    assert alarms <= 6  # 5 % of 40 is 2


def test_the_fit_is_that_of_an_unpenalised_logistic_regression():
    rng = np.random.default_rng(6)
    length_a, length_b = rng.poisson(9, 1000), rng.poisson(12, 1000)
    a, b = 0.4 + rng.logistic(0, 1, 1000) - 0.1 * length_a, -0.1 * length_b
    outside = LogisticRegression(C=1e9).fit((length_a - length_b)[:, None], a > b)
    expected = 1 / (1 + np.exp(-outside.intercept_[0]))
    assert length_controlled_win_rate(a, b, length_a, length_b, prompts(1000)).rate == pytest.approx(expected, abs=3e-3)


def test_equal_lengths_leave_the_raw_rate():
    rng = np.random.default_rng(7)
    a, b, ids, lengths = rng.normal(0.5, 1, 400), rng.normal(0, 1, 400), prompts(400), np.full(400, 7)
    assert length_controlled_win_rate(a, b, lengths, lengths, ids).rate == pytest.approx(
        win_rate(a, b, ids).rate, abs=1 / 400
    )


def test_where_length_decides_every_win_the_rest_is_even():
    rng = np.random.default_rng(8)
    length_a, length_b = rng.integers(4, 12, 300), rng.integers(4, 16, 300)
    found = length_controlled_win_rate(-length_a, -length_b, length_a, length_b, prompts(300))
    assert win_rate(-length_a, -length_b, prompts(300)).low > 0.55
    assert found.low < 0.5 < found.high
    assert found.rate == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("length_b", [9, np.arange(6, 26)])
def test_where_lengths_never_meet_the_answer_is_unknown(length_b: int | np.ndarray):
    ones = np.ones(200)
    found = length_controlled_win_rate(ones, 0 * ones, 5 * ones, np.resize(length_b, 200), prompts(200))
    assert found.low < 0.3
    assert found.high > 0.8


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(RunProblem, match=r"scores_b .* position 1"):
        win_rate([0.0, 1.0], [0.0, float("nan")], [0, 1])


@pytest.mark.parametrize(
    ("a", "b", "ids", "tie_width", "words"),
    [
        ([1.0], [1.0, 2.0], [0], 0.0, "scores_b has shape"),
        ([1.0], [1.0], [0, 1], 0.0, "prompt_ids has shape"),
        ([], [], [], 0.0, "at least one comparison"),
        ([1.0], [1.0], [0], -1.0, "tie_width"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(a, b, ids, tie_width, words):
    with pytest.raises(UsageProblem, match=words):
        win_rate(a, b, ids, tie_width)
