"""The reward model's loss on rankings of K responses to one prompt (InstructGPT, section 3.5)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


class PairCounts(NamedTuple):
    """Counts that are added over micro-batches and ranks: accuracy is correct / pairs."""

    correct: Float[Tensor, ""]
    """Pairs whose better response scored higher, plus half of those that scored the same."""
    pairs: Float[Tensor, ""]
    """Pairs that the labeler did not tie."""


def ranking_loss(
    scores: Float[Tensor, " rows"],
    ranks: Int[Tensor, " rows"],
    prompts: Int[Tensor, " rows"],
    global_prompts: float,
    ties_count: bool = True,
) -> Float[Tensor, ""]:
    """Σ over prompts of −1/C(K,2)·Σ log σ(r_better − r_worse), divided by the prompts of the GLOBAL batch.

    A row is a response: its score, its rank (0 best, equal is a tie), and which prompt it answers. All responses to a
    prompt must be in the same call: its pairs are ONE batch element, whatever K. Tied pairs are dropped from the sum,
    and a prompt whose responses are all tied adds 0. The paper drops ties and does not say how it then normalises: with
    `ties_count` C(K,2) still counts them, so that every untied pair of K responses weighs the same whatever else was
    tied; without it the untied pairs alone are counted, so that every prompt that has one weighs the same.
    """
    better = _better(ranks, prompts)
    together = (prompts[:, None] == prompts[None, :]).to(scores.dtype)
    responses = together.sum(-1)
    pairs = responses * (responses - 1) / 2 if ties_count else together @ better.to(scores.dtype).sum(-1)
    pairs_of_prompt = pairs.clamp(min=1.0)
    losses = -F.logsigmoid(scores[:, None] - scores[None, :]) / pairs_of_prompt[:, None]
    return torch.where(better, losses, 0.0).sum() / global_prompts


@torch.no_grad()
def pair_counts(
    scores: Float[Tensor, " rows"], ranks: Int[Tensor, " rows"], prompts: Int[Tensor, " rows"]
) -> PairCounts:
    """How often the score orders an untied pair as the labeler did; rows as in `ranking_loss`."""
    better = _better(ranks, prompts)
    difference = scores[:, None] - scores[None, :]
    agreement = (difference > 0).double() + 0.5 * (difference == 0).double()
    return PairCounts((agreement * better).sum(), better.sum().double())


def _better(ranks: Int[Tensor, " rows"], prompts: Int[Tensor, " rows"]) -> Bool[Tensor, "rows rows"]:
    """[i, j] is true where i and j answer the same prompt and i was ranked above j."""
    return (prompts[:, None] == prompts[None, :]) & (ranks[:, None] < ranks[None, :])
