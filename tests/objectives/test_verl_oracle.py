"""verl 0.9.1 as outside oracle, where it computes the same thing; where it does not, the difference is stated."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.advantages import generalised_advantages
from objectives.kl import AdaptiveKL, kl_per_token
from objectives.language_model import token_cross_entropy
from objectives.normalise import whiten
from objectives.policy import PolicyTokens, importance_weights, policy_diagnostics, policy_loss
from objectives.value import ValueTokens, value_clip_count, value_loss

# Importing verl takes most of the time.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Warning. Function:FutureWarning")]


@pytest.fixture(scope="module")
def verl():
    return importlib.import_module("verl.trainer.ppo.core_algos")


@st.composite
def batches(draw):
    """Eight random tensors and a response mask whose rows are runs of at least one token, as verl expects."""
    rows, columns = draw(st.integers(2, 5)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    lengths[0] = columns
    tensors = [torch.randn(rows, columns, generator=generator) for _ in range(8)]
    return tensors, torch.arange(columns) < lengths


examples = settings(max_examples=40, deadline=None)


@given(batch=batches(), discount=st.sampled_from([1.0, 0.9]), trace=st.sampled_from([0.95, 1.0, 0.5]))
@examples
def test_advantages_and_returns(verl, batch, discount, trace):
    (rewards, values, *_), mask = batch
    theirs, their_returns = verl.compute_gae_advantage_return(rewards, values, mask.float(), discount, trace)
    advantages, returns = generalised_advantages(rewards, values, mask, discount, trace)
    torch.testing.assert_close(returns[mask], their_returns[mask], atol=1e-5, rtol=1e-5)
    # verl whitens inside, with Bessel's correction: its values are smaller by √((n − 1)/n).
    count = mask.sum()
    ours = whiten(advantages, mask) * ((count - 1) / count).sqrt()
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-4, rtol=1e-4)


@given(batch=batches())
@examples
def test_kl_estimators(verl, batch):
    (logprobs, reference, *_), _ = batch
    for estimator in ("k1", "k2", "k3"):
        ours = kl_per_token(logprobs, reference, estimator)
        theirs = verl.kl_penalty(logprobs, reference, estimator)
        if estimator == "k3":
            ours = ours.clamp(max=10)  # verl clamps
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_k3_is_not_clamped_here_as_verl_clamps_it(verl):
    far = torch.tensor([-5.0]), torch.tensor([0.0])
    assert kl_per_token(*far, "k3").item() == pytest.approx(142.413, abs=1e-2)
    assert verl.kl_penalty(*far, "k3").item() == 10.0


@given(batch=batches())
@examples
def test_policy_loss_and_diagnostics(verl, batch):
    (logprobs, old, advantages, *_), mask = batch
    tokens = PolicyTokens(logprobs, old, advantages, mask)
    # A far bound on the ratio turns verl's dual clip off.
    theirs, clipped, kl, _ = verl.compute_policy_loss(
        old, logprobs, advantages, mask.float(), cliprange=0.2, clip_ratio_c=1e9
    )
    torch.testing.assert_close(policy_loss(tokens, 0.2, mask.sum().item()), theirs, atol=1e-5, rtol=1e-5)
    figures = policy_diagnostics(tokens, 0.2).figures()
    assert figures["clip_fraction"] == pytest.approx(clipped.item(), abs=1e-5)
    assert kl.item() == pytest.approx((old - logprobs)[mask].mean().item(), abs=1e-5)  # verl logs k1, not k2


@given(batch=batches())
@examples
def test_policy_gradient(verl, batch):
    (logprobs, old, advantages, *_), mask = batch
    ours, theirs = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    policy_loss(PolicyTokens(ours, old, advantages, mask), 0.2, mask.sum().item()).backward()
    verl.compute_policy_loss(old, theirs, advantages, mask.float(), cliprange=0.2, clip_ratio_c=1e9)[0].backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@given(batch=batches())
@examples
def test_decoupled_policy_loss_is_verl_s_with_rollout_weights(verl, batch):
    actor = importlib.import_module("verl.workers.config")
    (logprobs, old, advantages, behaviour, *_), mask = batch
    tokens = PolicyTokens(logprobs, old, advantages, mask, behaviour)
    config = actor.ActorConfig(
        strategy="fsdp", clip_ratio=0.2, clip_ratio_c=1e9, ppo_micro_batch_size_per_gpu=1, rollout_n=1
    )
    theirs, _ = verl.compute_policy_loss_vanilla(
        old,
        logprobs,
        advantages,
        mask.float(),
        config=config,
        rollout_is_weights=importance_weights(tokens, cap=2.0),
    )
    ours = policy_loss(tokens, 0.2, mask.sum().item(), importance_cap=2.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@given(batch=batches())
@examples
def test_value_loss_and_clip_fraction(verl, batch):
    (values, old, returns, *_), mask = batch
    theirs, clipped = verl.compute_value_loss(values, returns, old, mask.float(), cliprange_value=0.2)
    tokens = ValueTokens(values, old, returns, mask)
    torch.testing.assert_close(value_loss(tokens, 0.2, mask.sum().item()), theirs, atol=1e-5, rtol=1e-5)
    assert value_clip_count(tokens, 0.2).item() / mask.sum().item() == pytest.approx(clipped.item(), abs=1e-5)


@given(batch=batches())
@examples
def test_global_token_counts_aggregate_as_verl_s_token_mean(verl, batch):
    (logprobs, *_), mask = batch
    theirs = verl.agg_loss(-logprobs, mask.float(), "token-mean", dp_size=1, batch_num_tokens=100)
    torch.testing.assert_close(token_cross_entropy(logprobs, mask, 100), theirs, atol=1e-6, rtol=1e-5)


@given(kls=st.lists(st.floats(0, 30), min_size=1, max_size=5), episodes=st.integers(1, 1024))
@examples
def test_adaptive_coefficient(verl, kls, episodes):
    theirs, ours = verl.AdaptiveKLController(0.15, 6.0, 10_000), AdaptiveKL(0.15)
    for kl in kls:
        theirs.update(kl, episodes)
        ours = ours.updated(kl, episodes)
    assert ours.coefficient == pytest.approx(theirs.value, rel=1e-12)
