import pytest
import torch

from objectives.rewards import scores_with_eos_rule, token_rewards

SCORES = torch.tensor([2.0, 3.0])
ENDED = torch.tensor([True, False])


def test_a_missing_eos_replaces_the_score_and_does_not_add_to_it():
    assert scores_with_eos_rule(SCORES, ENDED).tolist() == [2.0, -1.0]
    assert scores_with_eos_rule(SCORES, ENDED).tolist() != (SCORES - (~ENDED).float()).tolist()


def test_the_other_rules_subtract_a_penalty_or_do_nothing():
    assert scores_with_eos_rule(SCORES, ENDED, "subtract", penalty=1.5).tolist() == [2.0, 1.5]
    assert scores_with_eos_rule(SCORES, ENDED, "none").tolist() == [2.0, 3.0]


def test_reward_is_minus_beta_kl_with_the_score_once_on_the_last_response_token():
    kl = torch.tensor([[7.0, 0.5, -1.0, 9.0], [7.0, 0.25, 1.0, 2.0]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    rewards = token_rewards(SCORES, kl, mask, kl_coefficient=0.1)
    expected = torch.tensor([[0.0, -0.05, 0.1 + 2.0, 0.0], [0.0, -0.025, -0.1, -0.2 + 3.0]])
    torch.testing.assert_close(rewards, expected)


def test_rewards_of_a_response_add_up_to_score_minus_beta_times_sequence_kl():
    torch.manual_seed(0)
    kl = torch.randn(2, 5)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    rewards = token_rewards(SCORES, kl, mask, kl_coefficient=0.02)
    torch.testing.assert_close(rewards.sum(-1), SCORES - 0.02 * (kl * mask).sum(-1))


def test_more_divergence_is_less_reward():
    mask = torch.ones(2, 3, dtype=torch.bool)
    near, far = (token_rewards(SCORES, torch.full((2, 3), x), mask, 0.02) for x in (0.1, 0.2))
    assert (far < near).all()


def test_a_score_without_a_token_to_stand_on_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        token_rewards(SCORES, torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]), 0.02)
