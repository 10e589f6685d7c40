"""From one score a response to one reward a token."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from objectives.masks import last_index

MissingEos = Literal["replace", "subtract", "none"]


def scores_with_eos_rule(
    scores: Float[Tensor, " batch"],
    ended_with_eos: Bool[Tensor, " batch"],
    rule: MissingEos = "replace",
    replacement: float = -1.0,
    penalty: float = 1.0,
) -> Float[Tensor, " batch"]:
    """What a response that was cut before its EOS gets.

    "replace": `replacement` whatever its score was (inherited from the N+ code); "subtract": its score minus `penalty`
    (TRL); "none": its score.
    """
    match rule:
        case "replace":
            return torch.where(ended_with_eos, scores, replacement)
        case "subtract":
            return torch.where(ended_with_eos, scores, scores - penalty)
        case "none":
            return scores


def token_rewards(
    scores: Float[Tensor, " batch"],
    kl: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    kl_coefficient: float,
) -> Float[Tensor, "batch time"]:
    """−β·kl on every response token, plus the score on the last one, which is EOS where there is one; 0 elsewhere.

    InstructGPT, section 3.5: the KL penalty is per token, the reward model's score comes once, at the end.
    Raises ValueError where a response is empty, because its score would be lost.
    """
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    return rewards.scatter_add(-1, last_index(mask).unsqueeze(-1), scores.to(rewards.dtype).unsqueeze(-1))
