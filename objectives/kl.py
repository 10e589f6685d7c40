"""Divergence of the policy from its frozen reference: estimators on sampled tokens, and the penalty's coefficient."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from objectives.masks import masked_sum

Estimator = Literal["k1", "k2", "k3"]


def kl_per_token(
    logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"], estimator: Estimator = "k1"
) -> Float[Tensor, "*shape"]:
    """An estimate in nats of KL(policy ‖ reference) on each token, which the policy has sampled.

    k1 = d, with d = logprob − reference: unbiased, and what InstructGPT's objective has (also the code of Ziegler et
    al. and of N+). k2 = d²/2: biased, never negative. k3 = exp(−d) − 1 + d: unbiased and never negative
    (Schulman 2020, "Approximating KL divergence"). None of them is clamped.
    """
    difference = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return (-difference).expm1() + difference


def sequence_kl(kl: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Nats of a whole response: the SUM over its tokens, which is what is logged and what the target speaks of."""
    return masked_sum(kl, mask, dim=-1)


def best_of_n_kl_bound(n: int) -> float:
    """ln n − (n − 1)/n nats: an upper bound of KL(best of n ‖ policy), loose at low entropy (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class FixedKL:
    """The KL coefficient β of InstructGPT, which stays as it is (0.02 in the paper)."""

    coefficient: float

    def updated(self, kl_nats: float, episodes: int) -> "FixedKL":
        """Itself."""
        return self


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL coefficient that is steered to a target (inherited from the code of Ziegler et al.)."""

    coefficient: float
    target_nats: float = 6.0
    horizon_episodes: int = 10_000

    def updated(self, kl_nats: float, episodes: int) -> "AdaptiveKL":
        """β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon), to be taken after a batch of `episodes` was trained on.

        `kl_nats` is the mean over the batch of the SEQUENCE sum.
        """
        error = min(max(kl_nats / self.target_nats - 1.0, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1.0 + error * episodes / self.horizon_episodes))
