import math

import pytest
import torch

from objectives.normalise import Moments
from objectives.value import ValueTokens, explained_variance, value_clip_count, value_loss

MASK = torch.tensor([[True, True, False]])


def test_the_loss_is_half_the_larger_of_the_unclipped_and_clipped_squared_errors():
    values = torch.tensor([[1.0, 0.1, 9.0]], requires_grad=True)
    tokens = ValueTokens(values, torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]), MASK)
    loss = value_loss(tokens, clip=0.2, global_tokens=2)
    loss.backward()
    # First token: 1.0 is right but may only count as 0.2, so (0.2 − 1)² and no gradient. Second: within the clip.
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.81) / 2)
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.45, 0.0]]))
    assert value_clip_count(tokens, 0.2).item() == 1.0


def test_values_are_clipped_around_old_values_and_not_around_returns():
    values, old, returns = torch.tensor([[0.5]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    around_old = value_loss(ValueTokens(values, old, returns, mask), 0.2, 1).item()
    around_returns = 0.5 * max((0.5 - 1.0) ** 2, (min(max(0.5, 0.8), 1.2) - 1.0) ** 2)
    assert around_old == pytest.approx(0.5 * 0.8**2)
    assert around_old != pytest.approx(around_returns)


def test_what_stands_at_masked_places_reaches_neither_loss_nor_gradient():
    nan = float("nan")
    values = torch.tensor([[0.1, 0.1, nan]], requires_grad=True)
    tokens = ValueTokens(values, torch.tensor([[0.0, 0.0, nan]]), torch.tensor([[1.0, 1.0, nan]]), MASK)
    value_loss(tokens, 0.2, 2).backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert values.grad[0, 2].item() == 0.0
    assert value_clip_count(tokens, 0.2).item() == 0.0


def test_explained_variance_is_one_for_perfect_values_and_zero_for_their_mean():
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)

    def explained(values: torch.Tensor) -> float:
        return explained_variance(Moments.of(returns - values, mask), Moments.of(returns, mask))

    assert explained(returns) == 1.0
    assert explained(returns + 5.0) == 1.0
    assert explained(torch.full_like(returns, 2.0)) == pytest.approx(0.0)
    assert explained(-returns) == pytest.approx(-3.0)


def test_returns_that_do_not_vary_have_no_explained_variance():
    same = Moments.of(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert math.isnan(explained_variance(same, same))
