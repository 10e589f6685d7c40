"""Whitening over the tokens of a whole batch, wherever its parts are.

Inherited from the code of Ziegler et al. and of N+: whiten(x) = (x − mean)·rsqrt(var + 1e-8), with the population
variance over unmasked tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from objectives.masks import masked_sum

EPSILON = 1e-8
"""Added to the variance (code of Ziegler et al.)."""


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares in float64: adding those of all parts and ranks gives those of the whole."""

    count: Float[Tensor, ""]
    total: Float[Tensor, ""]
    squares: Float[Tensor, ""]

    @classmethod
    def of(cls, x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> "Moments":
        """The moments of the unmasked elements."""
        wide = x.detach().double()
        return cls(mask.sum().double(), masked_sum(wide, mask), masked_sum(wide.square(), mask))

    @classmethod
    def from_tensor(cls, sums: Float[Tensor, " 3"]) -> "Moments":
        """What `as_tensor` gave, after the ranks have added theirs."""
        return cls(*sums.double().unbind())

    def as_tensor(self) -> Float[Tensor, " 3"]:
        """Count, sum and sum of squares, to be added over ranks."""
        return torch.stack([self.count, self.total, self.squares])

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Float[Tensor, ""]:
        """NaN where nothing was counted."""
        return self.total / self.count

    @property
    def variance(self) -> Float[Tensor, ""]:
        """Population variance (divided by the count), never below 0."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0.0)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    moments: Moments | None = None,
    shift_mean: bool = True,
) -> Float[Tensor, "*shape"]:
    """`x` with unit variance over unmasked elements, and with mean 0, or its own mean where `shift_mean` is false.

    Advantages are centred; rewards keep their mean. `moments` are those of the global batch, of `x` alone where None.
    Masked elements come back as 0.
    """
    moments = Moments.of(x, mask) if moments is None else moments
    mean = moments.mean.to(x.dtype)
    whitened = (x - mean) * torch.rsqrt(moments.variance + EPSILON).to(x.dtype)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)
