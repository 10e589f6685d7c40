import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.normalise import Moments, whiten

GRID = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
ALL = torch.ones_like(GRID, dtype=torch.bool)


def test_reward_whitening_matches_the_fixture_of_n_plus():
    expected = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]])
    torch.testing.assert_close(whiten(GRID, ALL, shift_mean=False), expected, atol=5e-5, rtol=0)


def test_unbiased_variance_would_not_match_that_fixture():
    unbiased = (GRID - GRID.mean()) * torch.rsqrt(GRID.var(unbiased=True) + 1e-8) + GRID.mean()
    assert abs(unbiased[0, 0].item() - 0.0508) > 0.05


def test_pads_count_neither_for_mean_nor_variance():
    padded = torch.cat([GRID, torch.full((3, 2), 1e4)], dim=1)
    mask = torch.cat([ALL, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    whitened = whiten(padded, mask)
    torch.testing.assert_close(whitened[:, :3], whiten(GRID, ALL))
    assert whitened[:, 3:].eq(0).all()


def test_constant_rewards_give_zeros_and_not_nan():
    assert whiten(torch.full((2, 3), 0.7), torch.ones(2, 3, dtype=torch.bool)).abs().max().item() < 1e-3


@st.composite
def masked_batches(draw):
    rows, columns = draw(st.integers(2, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    offset, scale = draw(st.floats(-50, 50)), draw(st.floats(0.1, 20))
    x = torch.randn(rows, columns, generator=generator) * scale + offset
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[0, 0] = mask[1, 0] = True
    return x, mask


@given(masked_batches())
@settings(max_examples=50, deadline=None)
def test_whitened_values_have_mean_zero_and_unit_population_variance(batch):
    x, mask = batch
    kept = whiten(x, mask)[mask].double()
    if x[mask].var(unbiased=False) < 1e-3:
        return
    assert abs(kept.mean().item()) < 1e-3
    assert kept.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-3)


@given(masked_batches())
@settings(max_examples=50, deadline=None)
def test_keeping_the_mean_keeps_the_mean_and_only_adds_it(batch):
    x, mask = batch
    if x[mask].var(unbiased=False) < 1e-3:
        return
    kept = whiten(x, mask, shift_mean=False)[mask]
    assert kept.mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-3)
    torch.testing.assert_close(kept - whiten(x, mask)[mask], torch.full_like(kept, x[mask].mean()), atol=1e-3, rtol=0)


@given(masked_batches(), st.floats(0.5, 4), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_centred_whitening_ignores_shift_and_scale(batch, scale, shift):
    x, mask = batch
    if x[mask].var(unbiased=False) < 1e-2:
        return
    torch.testing.assert_close(whiten(x * scale + shift, mask), whiten(x, mask), atol=2e-3, rtol=0)


@given(masked_batches())
@settings(max_examples=50, deadline=None)
def test_moments_added_over_ranks_whiten_every_part_as_the_whole_would_be(batch):
    x, mask = batch
    sums = Moments.of(x[:1], mask[:1]).as_tensor() + Moments.of(x[1:], mask[1:]).as_tensor()
    whole = Moments.from_tensor(sums)
    parts = torch.cat([whiten(x[:1], mask[:1], whole), whiten(x[1:], mask[1:], whole)])
    torch.testing.assert_close(parts, whiten(x, mask))
    assert (Moments.of(x[:1], mask[:1]) + Moments.of(x[1:], mask[1:])).variance.item() == whole.variance.item()


def test_whitening_each_part_by_itself_is_something_else():
    apart = torch.cat([whiten(GRID[:1], ALL[:1]), whiten(GRID[1:], ALL[1:])])
    assert (apart - whiten(GRID, ALL)).abs().max().item() > 0.1
