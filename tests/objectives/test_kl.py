import pytest
import torch

from objectives.kl import AdaptiveKL, FixedKL, best_of_n_kl_bound, kl_per_token, sequence_kl
from objectives.masks import masked_mean


def test_k1_and_k3_estimate_the_exact_divergence_and_k2_approximates_it():
    torch.manual_seed(0)
    policy = torch.randn(5).log_softmax(-1)
    reference = (policy + 0.3 * torch.randn(5)).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    expected = {k: (policy.exp() * kl_per_token(policy, reference, k)).sum() for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k1"], exact)
    torch.testing.assert_close(expected["k3"], exact)
    assert expected["k2"].item() == pytest.approx(exact.item(), rel=0.2)


def test_k1_is_the_policy_minus_the_reference_and_may_be_negative():
    assert kl_per_token(torch.tensor([-1.0]), torch.tensor([-0.5])).item() == -0.5
    for estimator in ("k2", "k3"):
        assert kl_per_token(torch.tensor([-1.0]), torch.tensor([-0.5]), estimator).item() > 0


def test_sequence_kl_sums_tokens_and_so_differs_from_their_mean():
    kl = torch.tensor([[0.5, 1.0, 9.0], [2.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_kl(kl, mask).tolist() == [1.5, 2.0]
    assert masked_mean(kl, mask).item() != sequence_kl(kl, mask).mean().item()


@pytest.mark.parametrize(
    ("coefficient", "episodes", "kl_nats", "expected"),
    [
        (0.15, 512, 12.0, 0.151536),
        (0.15, 512, 3.0, 0.148464),
        (0.15, 512, 6.6, 0.150768),
        (0.2, 256, 9.0, 0.201024),
        (0.15, 512, 6.0, 0.15),
    ],
)
def test_adaptive_coefficient_matches_the_fixtures(coefficient, episodes, kl_nats, expected):
    assert AdaptiveKL(coefficient).updated(kl_nats, episodes).coefficient == pytest.approx(expected, abs=1e-12)


def test_adaptive_controller_fed_a_token_mean_would_go_the_other_way():
    sequence_nats, tokens = 12.0, 24
    controller = AdaptiveKL(0.15)
    assert controller.updated(sequence_nats, 512).coefficient > 0.15
    assert controller.updated(sequence_nats / tokens, 512).coefficient < 0.15


def test_updating_leaves_the_controller_itself_unchanged():
    controller = AdaptiveKL(0.15)
    controller.updated(12.0, 512)
    assert controller.coefficient == 0.15
    assert FixedKL(0.02).updated(100.0, 512) == FixedKL(0.02)


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.1931), (4, 0.6363), (16, 1.8351), (64, 3.1745), (256, 4.5491)])
def test_best_of_n_bound_matches_the_fixtures(n, nats):
    assert best_of_n_kl_bound(n) == pytest.approx(nats, abs=5e-5)
