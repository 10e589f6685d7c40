"""However a minibatch is cut into micro-batches, its losses and gradients are those of the whole."""

import dataclasses
import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from objectives.language_model import token_cross_entropy
from objectives.masks import masked_mean
from objectives.policy import PolicyTokens, policy_loss
from objectives.value import ValueTokens, value_loss


@st.composite
def splits(draw):
    rows = draw(st.integers(1, 7))
    cuts = sorted(draw(st.sets(st.integers(1, rows), max_size=3)) - {rows})
    bounds = [0, *cuts, rows]
    slices = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return rows, slices, draw(st.integers(0, 2**31))


def policy_and_value(rows: int, seed: int) -> tuple[PolicyTokens, ValueTokens]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(rows, 5, generator=generator, dtype=torch.float64) for _ in range(7)]
    mask = torch.rand(rows, 5, generator=generator) < 0.6
    policy = PolicyTokens(draws[0].requires_grad_(), draws[1], draws[2], mask, draws[3])
    return policy, ValueTokens(draws[4].requires_grad_(), draws[5], draws[6], mask)


@given(splits())
@settings(max_examples=60, deadline=None)
def test_policy_value_and_language_model_losses_do_not_depend_on_the_split(split):
    rows, slices, seed = split

    def losses(policy: PolicyTokens, value: ValueTokens, tokens: float) -> Tensor:
        ppo = policy_loss(policy, 0.2, tokens, importance_cap=2.0)
        return torch.stack(
            [ppo, value_loss(value, 0.2, tokens), token_cross_entropy(policy.logprobs, policy.mask, tokens)]
        )

    whole_policy, whole_value = policy_and_value(rows, seed)
    tokens = max(int(whole_policy.mask.sum()), 1)
    whole = losses(whole_policy, whole_value, tokens)
    whole.sum().backward()

    split_policy, split_value = policy_and_value(rows, seed)
    parts = torch.zeros_like(whole)
    for piece in slices:
        loss = losses(rows_of(split_policy, piece), rows_of(split_value, piece), tokens)
        loss.sum().backward()
        parts += loss.detach()
    torch.testing.assert_close(parts, whole.detach())
    torch.testing.assert_close(split_policy.logprobs.grad, whole_policy.logprobs.grad)
    torch.testing.assert_close(split_value.values.grad, whole_value.values.grad)


def test_averaging_the_means_of_micro_batches_does_depend_on_it():
    x, mask = torch.tensor([[1.0, 1.0], [4.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    mean_of_means = (masked_mean(x[:1], mask[:1]) + masked_mean(x[1:], mask[1:])) / 2
    assert mean_of_means.item() == 2.5
    assert masked_mean(x, mask).item() == 2.0


def rows_of(bundle, rows: slice):
    """The same bundle of only these rows, still connected to the whole one's tensors."""
    tensors = {field.name: getattr(bundle, field.name)[rows] for field in dataclasses.fields(bundle)}
    return type(bundle)(**tensors)
