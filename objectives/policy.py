"""The policy's clipped objective, off-policy corrections, and what is watched while it is optimised.

Three policies may be at work on a token, and each has its log-probability here:
- the current one, which is being changed;
- the old (proximal) one, from which the current one must not stray: the learner's before this batch's first step;
- the behaviour one, which wrote the token: an engine's, in its own arithmetic and perhaps of an older version.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from objectives.masks import masked_sum


@dataclass(frozen=True)
class PolicyTokens:
    """What the policy loss reads of a micro-batch; columns are targets."""

    logprobs: Float[Tensor, "batch time"]
    """Of the current policy; carries the gradient."""
    old_logprobs: Float[Tensor, "batch time"]
    """Of the proximal policy: the ratio's denominator. The behaviour's, where that one serves as the old policy."""
    advantages: Float[Tensor, "batch time"]
    """Whitened over the global batch, where that is wanted."""
    mask: Bool[Tensor, "batch time"]
    """True at response tokens."""
    behaviour_logprobs: Float[Tensor, "batch time"] | None = None
    """Of what wrote the tokens; None leaves the loss without importance weights."""

    @property
    def log_ratio(self) -> Float[Tensor, "batch time"]:
        """log(current / old), 0 at masked places before anything is exponentiated, so that no gradient is NaN."""
        return torch.where(self.mask, self.logprobs - self.old_logprobs, 0.0)


def policy_loss(
    tokens: PolicyTokens, clip: float, global_tokens: float, importance_cap: float | None = None
) -> Float[Tensor, ""]:
    """−Σ w·min(ρ·A, clip(ρ, 1 ± clip)·A) over response tokens, divided by the response tokens of the GLOBAL minibatch.

    ρ = current/old (PPO, Schulman et al. 2017; clip 0.2 in InstructGPT, appendix C.4). With behaviour log-probs it
    is the decoupled objective of Hilton et al. 2022 ("Batch size-invariance for policy optimization"), w =
    old/behaviour, truncated at `importance_cap` where given (truncated importance sampling); otherwise w = 1. Summed
    over micro-batches and ranks it is the loss of the whole, however that was split.
    """
    ratio = tokens.log_ratio.exp()
    unclipped = -tokens.advantages * ratio
    clipped = -tokens.advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    losses = torch.maximum(unclipped, clipped)
    if tokens.behaviour_logprobs is not None:
        losses = losses * importance_weights(tokens, importance_cap)
    return masked_sum(losses, tokens.mask) / global_tokens


def importance_weights(tokens: PolicyTokens, cap: float | None = None) -> Float[Tensor, "batch time"]:
    """min(old/behaviour, cap) of each response token, without gradient; 1 at masked places.

    Raises ValueError where the behaviour's log-probs are not known.
    """
    if tokens.behaviour_logprobs is None:
        raise ValueError("importance weights need the behaviour's log-probs")
    difference = tokens.old_logprobs.detach() - tokens.behaviour_logprobs.detach()
    weights = torch.where(tokens.mask, difference, 0.0).exp()
    return weights if cap is None else weights.clamp(max=cap)


@dataclass(frozen=True)
class PolicyDiagnostics:
    """Sums over response tokens in float64, to be added over micro-batches and ranks, and one maximum."""

    sums: Float[Tensor, " 7"]
    """Tokens, Σ log-ratio²/2, clipped tokens, Σ ratio, Σ ratio², Σ weight, Σ weight²."""
    max_abs_log_ratio: Float[Tensor, ""]
    """To be reduced by maximum."""

    def __add__(self, other: "PolicyDiagnostics") -> "PolicyDiagnostics":
        return PolicyDiagnostics(self.sums + other.sums, torch.maximum(self.max_abs_log_ratio, other.max_abs_log_ratio))

    def figures(self) -> dict[str, float]:
        """By name; NaN where there is no token.

        approx_kl: mean of log-ratio²/2 (nats a token; code of Ziegler et al., as in TRL); clip_fraction: share of
        tokens whose clipped loss was the larger; ratio_mean and ratio_variance (population) of current/old;
        max_abs_log_ratio; effective_sample_size: (Σw)²/(tokens·Σw²), 1 where all weights are equal, near 0 where one
        token carries all.
        """
        tokens, kl, clipped, ratio, ratio_squares, weight, weight_squares = self.sums.tolist()
        if tokens == 0:
            nan = float("nan")
            kl, clipped, ratio, ratio_squares, weight, weight_squares, tokens = (nan,) * 7
        mean = ratio / tokens
        return {
            "approx_kl": kl / tokens,
            "clip_fraction": clipped / tokens,
            "ratio_mean": mean,
            "ratio_variance": max(ratio_squares / tokens - mean * mean, 0.0),
            "max_abs_log_ratio": self.max_abs_log_ratio.item(),
            "effective_sample_size": weight * weight / (tokens * weight_squares),
        }


@torch.no_grad()
def policy_diagnostics(tokens: PolicyTokens, clip: float, importance_cap: float | None = None) -> PolicyDiagnostics:
    """What `policy_loss` with the same arguments did to this micro-batch; all weights are 1 without a behaviour."""
    log_ratio = tokens.log_ratio.double()
    ratio = log_ratio.exp()
    advantages = tokens.advantages.double()
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip) > -advantages * ratio
    if tokens.behaviour_logprobs is None:
        weights = torch.ones_like(ratio)
    else:
        weights = importance_weights(tokens, importance_cap).double()
    per_token = [
        torch.ones_like(ratio),
        0.5 * log_ratio.square(),
        clipped.double(),
        ratio,
        ratio.square(),
        weights,
        weights.square(),
    ]
    sums = torch.stack([masked_sum(x, tokens.mask) for x in per_token])
    largest = log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(())
    return PolicyDiagnostics(sums, largest)
