"""The value network's clipped regression, and how much of the returns it explains."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from objectives.masks import masked_sum
from objectives.normalise import Moments


@dataclass(frozen=True)
class ValueTokens:
    """What the value loss reads of a micro-batch; columns are targets, values those of the states before them."""

    values: Float[Tensor, "batch time"]
    """Of the network being changed; carries the gradient."""
    old_values: Float[Tensor, "batch time"]
    """Of the network before this batch's first step: what advantages were computed with."""
    returns: Float[Tensor, "batch time"]
    """Advantages + old values, before whitening."""
    mask: Bool[Tensor, "batch time"]
    """True at response tokens."""


def value_loss(tokens: ValueTokens, clip: float, global_tokens: float) -> Float[Tensor, ""]:
    """½·Σ max((V − R)², (V_clipped − R)²) over response tokens / the response tokens of the GLOBAL minibatch.

    V_clipped stays within ± `clip` of the OLD value, not of the return (inherited from the code of Ziegler et al.).
    """
    unclipped, clipped = _squared_errors(tokens, clip)
    return 0.5 * masked_sum(torch.maximum(unclipped, clipped), tokens.mask) / global_tokens


@torch.no_grad()
def value_clip_count(tokens: ValueTokens, clip: float) -> Float[Tensor, ""]:
    """How many response tokens had the clipped error as the larger one: they give no gradient."""
    unclipped, clipped = _squared_errors(tokens, clip)
    return masked_sum((clipped > unclipped).double(), tokens.mask)


def explained_variance(errors: Moments, returns: Moments) -> float:
    """1 − var(return − value)/var(return), over the global batch; NaN where the returns do not vary.

    `errors` are the moments of return − value. 1 is perfect; 0 is no better than the mean return.
    """
    spread = returns.variance.item()
    return 1.0 - errors.variance.item() / spread if spread > 0 else float("nan")


def _squared_errors(tokens: ValueTokens, clip: float) -> tuple[Tensor, Tensor]:
    # Masked values are replaced before they are squared, so that what stands there reaches no gradient.
    values = torch.where(tokens.mask, tokens.values, tokens.old_values)
    near_old = values.clamp(tokens.old_values - clip, tokens.old_values + clip)
    return (values - tokens.returns).square(), (near_old - tokens.returns).square()
