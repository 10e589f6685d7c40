"""Engine against learner on the log-probabilities of a batch's tokens, before the first step: how far apart they are.

On tokens that the learner's present weights wrote a difference is rounding or a fault. On tokens of older weights it is
what the policy has moved since, too: there it bounds nothing but the sample size that is left.
"""

import torch
from torch import Tensor

from corpus.problems import RunProblem
from learners.ppo_batch import EpisodeBatch
from learners.ppo_update import PpoUpdate


def default_bound(learner_dtype: str, rollout_dtype: str, *, first_minibatch: bool = False) -> float:
    """Nats that engine and learner may differ by on any token, where the recipe does not say: rounding, and no more.

    `first_minibatch`: what is compared is the first minibatch of an update at staleness 0. In float32 its ratios to the
    old policy are 1 within 1e-4, so that the update begins as PPO says: with the gradient of −mean(advantage).
    """
    if learner_dtype != "float32" or rollout_dtype != "float32":
        return 1.0
    return 1e-4 if first_minibatch else 1e-3


def mismatch(
    learner: PpoUpdate, batch: EpisodeBatch, update: int, recomputed: Tensor | None, kv_kept: bool = False
) -> dict[str, float]:
    """Engine against learner on a batch, before its first step; `update` counts from 0, and every rank takes part.

    Where the learner's log-probs are computed for this alone, the first minibatch's rows have to do. Returns
    `staleness/effective_sample_size`, of all these tokens, and the largest and the mean difference in nats,
    `mismatch/…`, of those that the learner's present weights wrote. Where older weights wrote all, the latter are
    absent: the probe after each publication then stands alone. With `kv_kept` they leave responses out that older
    weights began: engines go on with keys and values of theirs, which is a bias and no fault.
    """
    rows = list(range(batch.rows))
    if recomputed is None:
        rows = learner.first_minibatch(batch, update)
        recomputed = learner.logprobs(batch, rows)
    compared = torch.zeros_like(batch.mask)
    compared[rows] = batch.mask[rows]
    difference = recomputed - batch.behaviour_logprobs
    found = {"staleness/effective_sample_size": effective_sample_size(difference[compared])}
    own = compared & batch.own_version
    if kv_kept:
        own &= (batch.own_version == batch.mask).all(dim=1, keepdim=True)
    if own.any():
        apart = difference[own].abs()
        found["mismatch/max_abs_log_ratio"] = apart.max().item()
        found["mismatch/mean_abs_log_ratio"] = apart.mean().item()
    return found


def effective_sample_size(log_weights: Tensor) -> float:
    """(Σw)² / (n · Σw²) of n importance weights w = learner / behaviour, given as logarithms: 1 where all are equal,
    1/n where one outweighs all others (Kong 1992, as a share of n). NaN where one is not a number."""
    weights = (log_weights.double() - log_weights.max()).exp()  # a common factor cancels out
    return (weights.sum().square() / (weights.numel() * weights.square().sum())).item()


def refuse_beyond(bound_nats: float, least_sample_size: float | None, found: dict[str, float], update: int) -> None:
    """Raises RunProblem where what `mismatch` found at `update` is beyond a bound, or not a number."""
    largest = found.get("mismatch/max_abs_log_ratio", 0.0)
    if not largest <= bound_nats:
        raise RunProblem(
            f"ppo: at update {update + 1} engine and learner disagree on the log-probability of a "
            f"token by {largest:.4g} nats, beyond the bound of {bound_nats:g}; their weights, temperature or "
            "dtype differ.",
            "ppo/mismatch",
        )
    size = found["staleness/effective_sample_size"]
    if least_sample_size is not None and not size >= least_sample_size:
        raise RunProblem(
            f"ppo: at update {update + 1} the effective sample size is {size:.3g} of the batch's tokens, below "
            f"ppo.min_effective_sample_size of {least_sample_size:g}: the weights that wrote them are too far from the "
            "learner's; lower max_staleness or the learning rate.",
            "ppo/off-policy",
        )


def refuse_straggler(bound_s: float | None, age_s: float, update: int) -> None:
    """Raises RunProblem where the slowest episode of `update` took longer than `bound_s` from lease to acceptance."""
    if bound_s is not None and not age_s <= bound_s:
        raise RunProblem(
            f"ppo: the slowest episode of update {update + 1} took {age_s:.3g} s from lease to acceptance, more than "
            f"ppo.straggler_bound_s of {bound_s:g}; look at the generator that wrote it, or raise the bound.",
            "ppo/straggler",
        )
