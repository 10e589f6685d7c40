"""Engine against learner on the log-probabilities of a batch's tokens: how far apart they are, and may be."""

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
    """Engine against learner on tokens that the learner's present weights wrote, before its first step.

    Returns the largest and the mean difference in nats. Where the learner's log-probs are computed for this alone, the
    first minibatch's rows have to do. Nothing where older weights wrote every token (staleness): the probe after each
    publication then stands alone. With `kv_kept` responses that older weights began are left out: engines go on with
    keys and values of theirs, which is a bias and no fault. `update` counts from 0; every rank takes part.
    """
    rows = list(range(batch.rows))
    if recomputed is None:
        rows = learner.first_minibatch(batch, update)
    own = torch.zeros_like(batch.own_version)
    own[rows] = batch.own_version[rows]
    if kv_kept:
        own &= (batch.own_version == batch.mask).all(dim=1, keepdim=True)
    if not own.any():
        return {}
    if recomputed is None:
        recomputed = learner.logprobs(batch, rows)
    difference = (recomputed - batch.behaviour_logprobs)[own].abs()
    return {
        "mismatch/max_abs_log_ratio": difference.max().item(),
        "mismatch/mean_abs_log_ratio": difference.mean().item(),
    }


def refuse_beyond(bound_nats: float, found: dict[str, float], update: int) -> None:
    """Raises RunProblem where what `mismatch` found at `update` is beyond the bound, or not a number."""
    largest = found.get("mismatch/max_abs_log_ratio", 0.0)
    if not largest <= bound_nats:
        raise RunProblem(
            f"ppo: at update {update + 1} engine and learner disagree on the log-probability of a "
            f"token by {largest:.4g} nats, beyond the bound of {bound_nats:g}; their weights, temperature or "
            "dtype differ.",
            "ppo/mismatch",
        )
