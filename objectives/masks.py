"""Sums and means over the tokens that count.

A mask is boolean, true where a token counts. What stands at a masked place, NaN included, reaches neither a result nor
a gradient.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None) -> Tensor:
    """Sum of the unmasked elements, along `dim` where it is given."""
    kept = torch.where(mask, x, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None) -> Tensor:
    """Mean of the unmasked elements, along `dim` where it is given; NaN where there is none."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count


def last_index(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, " batch"]:
    """The last unmasked place of each row: where EOS stands, or the cut. Raises ValueError where a row has none."""
    if not bool(mask.any(-1).all()):
        raise ValueError("every row needs at least one unmasked token")
    places = torch.arange(mask.shape[-1], device=mask.device)
    return (mask * places).argmax(-1)
