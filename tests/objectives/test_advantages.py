import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.advantages import generalised_advantages

REWARDS, VALUES = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])


def test_the_fixture():
    advantages, returns = generalised_advantages(REWARDS, VALUES, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.46575, 0.385, 0.3]]))
    torch.testing.assert_close(returns, torch.tensor([[0.96575, 0.985, 1.0]]))


def test_garbage_at_masked_places_before_after_and_inside_changes_nothing():
    nan = float("nan")
    rewards = torch.tensor([[nan, 0.0, nan, 0.0, 1.0, nan]])
    values = torch.tensor([[nan, 0.5, nan, 0.6, 0.7, nan]])
    mask = torch.tensor([[False, True, False, True, True, False]])
    advantages, returns = generalised_advantages(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.46575, 0.0, 0.385, 0.3, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, 0.96575, 0.0, 0.985, 1.0, 0.0]]))


@st.composite
def episodes(draw):
    length = draw(st.integers(1, 8))
    numbers = st.lists(st.floats(-2, 2, width=32), min_size=length, max_size=length)
    return draw(numbers), draw(numbers), draw(st.floats(0, 1)), draw(st.floats(0, 1))


@given(episodes())
@settings(max_examples=60, deadline=None)
def test_it_is_the_discounted_sum_of_temporal_difference_errors(episode):
    rewards, values, discount, trace = episode
    errors = [r + discount * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    expected = [
        sum((discount * trace) ** (s - t) * errors[s] for s in range(t, len(errors))) for t in range(len(errors))
    ]
    mask = torch.ones(1, len(rewards), dtype=torch.bool)
    advantages, _ = generalised_advantages(torch.tensor([rewards]), torch.tensor([values]), mask, discount, trace)
    torch.testing.assert_close(advantages, torch.tensor([expected]), atol=1e-5, rtol=1e-5)


@given(episodes())
@settings(max_examples=30, deadline=None)
def test_with_lambda_one_and_no_discount_returns_are_rewards_to_go(episode):
    rewards, values, _, _ = episode
    mask = torch.ones(1, len(rewards), dtype=torch.bool)
    _, returns = generalised_advantages(torch.tensor([rewards]), torch.tensor([values]), mask, 1.0, 1.0)
    to_go = torch.tensor([[sum(rewards[t:]) for t in range(len(rewards))]])
    torch.testing.assert_close(returns, to_go, atol=1e-5, rtol=1e-5)
