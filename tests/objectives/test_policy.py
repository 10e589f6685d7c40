import dataclasses
import math

import pytest
import torch

from objectives.policy import PolicyTokens, importance_weights, policy_diagnostics, policy_loss

MASK = torch.tensor([[True, True, False], [True, False, False]])


def tokens_with(log_ratio: list[list[float]], advantages: list[list[float]], **others) -> PolicyTokens:
    old = torch.full((2, 3), -1.5)
    logprobs = (old + torch.tensor(log_ratio)).requires_grad_()
    return PolicyTokens(logprobs, old, torch.tensor(advantages), MASK, **others)


def test_before_the_first_step_the_loss_is_minus_the_mean_advantage_and_approx_kl_is_zero():
    advantages = [[1.0, -2.0, 50.0], [4.0, 50.0, 50.0]]
    tokens = tokens_with([[0.0] * 3] * 2, advantages)
    assert policy_loss(tokens, 0.2, global_tokens=3).item() == pytest.approx(-1.0)
    figures = policy_diagnostics(tokens, 0.2).figures()
    assert figures == {
        "approx_kl": 0.0,
        "clip_fraction": 0.0,
        "ratio_mean": 1.0,
        "ratio_variance": 0.0,
        "max_abs_log_ratio": 0.0,
        "effective_sample_size": 1.0,
    }


def test_its_gradient_is_then_the_policy_gradient():
    tokens = tokens_with([[0.0] * 3] * 2, [[1.0, -2.0, 50.0], [4.0, 50.0, 50.0]])
    policy_loss(tokens, 0.2, global_tokens=3).backward()
    expected = -torch.tensor([[1.0, -2.0, 0.0], [4.0, 0.0, 0.0]]) / 3
    torch.testing.assert_close(tokens.logprobs.grad, expected)


def test_clipping_stops_the_gradient_only_of_tokens_that_already_moved_the_way_advantage_wants():
    up, down = math.log(1.5), math.log(0.5)
    tokens = tokens_with([[up, down, 0.0], [up, 0.0, 0.0]], [[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    loss = policy_loss(tokens, 0.2, global_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 - 0.5 + 1.5)
    torch.testing.assert_close(tokens.logprobs.grad, torch.tensor([[0.0, -0.5, 0.0], [1.5, 0.0, 0.0]]))
    assert policy_diagnostics(tokens, 0.2).figures()["clip_fraction"] == pytest.approx(1 / 3)


def test_what_stands_at_masked_places_reaches_neither_loss_nor_gradient():
    nan, inf = float("nan"), float("inf")
    tokens = tokens_with([[0.1, 0.1, inf], [0.1, nan, 1e4]], [[1.0, 1.0, nan], [1.0, inf, nan]])
    loss = policy_loss(tokens, 0.2, global_tokens=3)
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1), rel=1e-5)
    assert tokens.logprobs.grad is not None
    assert tokens.logprobs.grad[~MASK].eq(0).all()
    assert tokens.logprobs.grad.isfinite().all()


def test_a_behaviour_policy_weighs_tokens_by_old_over_behaviour_up_to_the_cap():
    behaviour = torch.full((2, 3), -1.5) - torch.tensor([[math.log(4.0), 0.0, 9.0], [math.log(0.5), 9.0, 9.0]])
    tokens = tokens_with([[0.0] * 3] * 2, [[1.0] * 3] * 2, behaviour_logprobs=behaviour)
    torch.testing.assert_close(importance_weights(tokens), torch.tensor([[4.0, 1.0, 1.0], [0.5, 1.0, 1.0]]))
    assert policy_loss(tokens, 0.2, 3).item() == pytest.approx(-(4.0 + 1.0 + 0.5) / 3)
    assert policy_loss(tokens, 0.2, 3, importance_cap=2.0).item() == pytest.approx(-(2.0 + 1.0 + 0.5) / 3)


def test_where_the_behaviour_is_the_old_policy_the_decoupled_objective_is_the_plain_one():
    plain = tokens_with([[0.3, -0.4, 0.0], [0.1, 0.0, 0.0]], [[1.0, -1.0, 0.0], [2.0, 0.0, 0.0]])
    decoupled = dataclasses.replace(plain, behaviour_logprobs=plain.old_logprobs)
    assert policy_loss(decoupled, 0.2, 3, importance_cap=2.0).item() == policy_loss(plain, 0.2, 3).item()


def test_the_decoupled_objective_clips_around_the_old_policy_and_not_the_behaviour():
    behaviour = torch.full((2, 3), -1.5 - math.log(3.0))
    tokens = tokens_with([[0.0] * 3] * 2, [[1.0] * 3] * 2, behaviour_logprobs=behaviour)
    policy_loss(tokens, 0.2, 3).backward()
    assert tokens.logprobs.grad is not None
    assert tokens.logprobs.grad[MASK].ne(0).all()  # current/old is 1: unclipped, though current/behaviour is 3
    around_behaviour = PolicyTokens(tokens.logprobs.detach().requires_grad_(), behaviour, tokens.advantages, MASK)
    policy_loss(around_behaviour, 0.2, 3).backward()
    assert around_behaviour.logprobs.grad is not None
    assert around_behaviour.logprobs.grad.eq(0).all()


def test_importance_weights_carry_no_gradient_and_need_a_behaviour():
    behaviour = torch.full((2, 3), -1.0)
    old = torch.full((2, 3), -1.5, requires_grad=True)
    assert not importance_weights(PolicyTokens(old, old, old, MASK, behaviour)).requires_grad
    with pytest.raises(ValueError, match="behaviour"):
        importance_weights(PolicyTokens(old, old, old, MASK))


def test_effective_sample_size_falls_towards_one_token_that_carries_all():
    shares = []
    for extra in (0.0, 1.0, 20.0):
        behaviour = torch.full((2, 3), -1.5)
        behaviour[0, 0] -= extra
        tokens = tokens_with([[0.0] * 3] * 2, [[1.0] * 3] * 2, behaviour_logprobs=behaviour)
        shares.append(policy_diagnostics(tokens, 0.2).figures()["effective_sample_size"])
    assert shares[0] == pytest.approx(1.0)
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] == pytest.approx(1 / 3, abs=1e-6)


def test_diagnostics_of_parts_add_up_to_those_of_the_whole():
    torch.manual_seed(0)
    mask = torch.rand(6, 5) < 0.6
    whole = PolicyTokens(torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5), mask, torch.randn(6, 5))

    def part(rows: slice) -> PolicyTokens:
        tensors = {field.name: getattr(whole, field.name)[rows] for field in dataclasses.fields(whole)}
        return PolicyTokens(**tensors)

    summed = policy_diagnostics(part(slice(0, 2)), 0.2, 2.0) + policy_diagnostics(part(slice(2, 6)), 0.2, 2.0)
    assert summed.figures() == pytest.approx(policy_diagnostics(whole, 0.2, 2.0).figures())
    ratio = (whole.logprobs - whole.old_logprobs).exp()[mask].double()
    assert summed.figures()["ratio_mean"] == pytest.approx(ratio.mean().item())
    assert summed.figures()["ratio_variance"] == pytest.approx(ratio.var(unbiased=False).item(), rel=1e-5)
    assert summed.figures()["max_abs_log_ratio"] == pytest.approx(ratio.log().abs().max().item(), rel=1e-5)


def test_a_batch_without_tokens_has_no_figures_and_no_loss():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    tokens = PolicyTokens(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3), torch.ones(2, 3), nothing)
    assert policy_loss(tokens, 0.2, 10).item() == 0.0
    assert math.isnan(policy_diagnostics(tokens, 0.2).figures()["approx_kl"])
