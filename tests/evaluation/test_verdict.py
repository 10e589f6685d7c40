import pytest

from evaluation.schema import Comparison, Judge, Results
from evaluation.verdict import verdict
from evaluation.win_rate import WinRate


def rate(low: float, high: float) -> WinRate:
    return WinRate(rate=(low + high) / 2, low=low, high=high, samples=600, prompts=600)


def results(raw: WinRate, controlled: WinRate, judge: Judge = "gold") -> Results:
    found = Comparison(model="ppo", against="sft", judge=judge, raw=raw, length_controlled=controlled)
    return Results(synthetic=True, samples_per_prompt=1, prompts=600, models={}, comparisons=[found], side_by_side=[])


@pytest.mark.parametrize(
    ("raw", "controlled", "learned", "words"),
    [
        ((0.58, 0.64), (0.52, 0.58), True, "Yes"),
        ((0.58, 0.64), (0.47, 0.53), False, "may win by the length"),
        ((0.58, 0.64), (0.40, 0.46), False, "wins by the length of its answers alone"),
        ((0.48, 0.54), (0.52, 0.58), False, "No gain shown"),
        ((0.50, 0.54), (0.52, 0.58), False, "No gain shown"),
        ((0.40, 0.46), (0.40, 0.46), False, "got worse"),
    ],
)
def test_the_headline_claims_no_more_than_the_intervals(raw, controlled, learned, words):
    found = verdict(results(rate(*raw), rate(*controlled)))
    assert found.learned is learned
    assert words in found.headline
    assert f"{100 * raw[0]:.1f}–{100 * raw[1]:.1f}" in found.sentence
    assert f"{100 * controlled[0]:.1f}–{100 * controlled[1]:.1f}" in found.sentence


def test_the_favour_of_the_reward_model_is_not_learning():
    found = verdict(results(rate(0.8, 0.9), rate(0.8, 0.9), "reward"))
    assert found.learned is None
    assert "please the reward model" in found.headline


def test_losing_by_the_reward_model_is_not_learning_either():
    assert verdict(results(rate(0.4, 0.45), rate(0.4, 0.45), "reward")).learned is False


def test_without_a_comparison_nothing_is_claimed():
    empty = Results(synthetic=True, samples_per_prompt=1, prompts=1, models={}, comparisons=[], side_by_side=[])
    found = verdict(empty)
    assert found.learned is None
    assert found.headline == "Not measured"
