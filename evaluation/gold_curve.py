"""How the gold score follows the distance that a policy has travelled: the curve of Gao et al. 2022, "Scaling Laws for
Reward Model Overoptimization", equation 2."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 4
"""Points that a fit of three numbers needs at least."""


@dataclass(frozen=True)
class GoldCurve:
    """Gold score = `start` + d (`alpha` − `beta` ln d) at distance d = √KL(π‖π_init), in √nats.

    Gao et al. recentre scores so that `start` is 0; here it is fitted, since the gold score has a scale of its own.
    """

    start: float
    alpha: float
    beta: float

    def at(self, distance: float) -> float:
        """The gold score at a distance; `start` at 0, where the term with the logarithm vanishes."""
        return self.start + (distance * (self.alpha - self.beta * math.log(distance)) if distance > 0 else 0.0)

    @property
    def turn(self) -> float | None:
        """The distance beyond which more of the proxy is less gold: where α − β (ln d + 1) is 0. None where the curve
        has no maximum, or none below a distance of a million."""
        if self.beta <= 0:
            return None
        exponent = self.alpha / self.beta - 1
        return math.exp(exponent) if exponent < math.log(1e6) else None


def fit_gold_curve(distances: Sequence[float], gold: Sequence[float]) -> GoldCurve | None:
    """The curve nearest to gold scores at `distances` (√nats), by least squares. None with fewer than FEWEST distances
    above 0, or where they do not determine it."""
    d, scores = np.array(distances, dtype=float), np.array(gold, dtype=float)
    known = np.isfinite(scores) & (d > 0)
    d, scores = d[known], scores[known]
    if len(np.unique(d)) < FEWEST:
        return None
    terms = np.stack([np.ones_like(d), d, -d * np.log(d)], axis=1)
    found, _, rank, _ = np.linalg.lstsq(terms, scores, rcond=None)
    return GoldCurve(*(float(each) for each in found)) if rank == terms.shape[1] else None
