"""Generalised advantage estimation (Schulman et al. 2016) over the tokens of a response."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Advantages(NamedTuple):
    """`returns` are advantages + values BEFORE any whitening: the value network's targets. 0 at masked places."""

    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]


@torch.no_grad()
def generalised_advantages(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    discount: float,
    trace: float,
) -> Advantages:
    """A_t = δ_t + γλ·A_{t+1}, with δ_t = r_t + γ·V_{t+1} − V_t, and V = A = 0 after the last response token.

    `discount` is γ (1 in InstructGPT's bandit, section 3.5), `trace` is λ (0.95, inherited from the code of Ziegler et
    al.). Masked places are stepped over, wherever they are: the response before and after one are neighbours.
    """
    advantages = torch.zeros_like(values)
    later_advantage = torch.zeros_like(values[:, 0])
    later_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        error = rewards[:, t] + discount * later_value - values[:, t]
        here = mask[:, t]
        later_advantage = torch.where(here, error + discount * trace * later_advantage, later_advantage)
        later_value = torch.where(here, values[:, t], later_value)
        advantages[:, t] = torch.where(here, later_advantage, 0.0)
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))
