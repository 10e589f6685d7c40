"""Win rates of one policy against another, with 95 % intervals clustered by prompt.

A comparison is one answer of policy A beside one answer of policy B to the same prompt, each with a score from the same
judge. Answers are scored one at a time, so there is no order of presentation that could favour either side: exchanging
A and B gives exactly 1 − rate.

Several comparisons of one prompt are not independent evidence, so intervals come from a bootstrap that draws whole
prompts. Its pool holds two prompts more than were asked: one that A wins and one that it loses, at equal lengths (the
idea of Agresti and Coull 1998, "Approximate is better than 'exact' for interval estimation of binomial proportions").
They pull an interval towards 50 % by about one prompt, and keep it honest where resampling alone would show no spread:
a policy that won all of 20 prompts has not been shown to win always.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from corpus.problems import RunProblem, UsageProblem

RESAMPLES = 1000
"""Bootstrap resamples: an interval's ends move by less than a tenth of its width from seed to seed."""

_RIDGE = 1e-3
"""Keeps the fit finite where lengths separate wins from losses; moves a rate by less than 1e-4 elsewhere."""
_CHUNK_FLOATS = 2_000_000
_FIT_ITERATIONS = 200
_FIT_TOLERANCE = 1e-8

Floats = NDArray[np.float64]


class WinRate(BaseModel):
    """The share of comparisons that a policy wins (ties count half), with its 95 % interval; all in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rate: float = Field(ge=0, le=1, description="Share of comparisons won; a tie counts half.")
    low: float = Field(ge=0, le=1, description="Lower end of the 95 % interval.")
    high: float = Field(ge=0, le=1, description="Upper end of the 95 % interval.")
    samples: int = Field(ge=1, description="Number of comparisons.")
    prompts: int = Field(ge=1, description="Number of distinct prompts, the clusters of the interval.")


def win_rate(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    prompt_ids: Sequence[str] | Sequence[int] | NDArray,
    tie_width: float = 0.0,
    *,
    seed: int = 0,
) -> WinRate:
    """How often A's answer scores higher than B's.

    `scores_a`, `scores_b`, `prompt_ids`: one entry a comparison, (comparisons,). Scores that differ by at most
    `tie_width` are a tie. The interval is a percentile bootstrap over prompts (see the module), repeatable by `seed`.
    Raises UsageProblem where the arguments do not belong together, RunProblem where a score is not finite.
    """
    wins = _wins(scores_a, scores_b, tie_width)
    clusters, prompts = _clusters(prompt_ids, len(wins))
    won = np.bincount(clusters, weights=wins, minlength=prompts)
    asked = np.bincount(clusters, minlength=prompts).astype(np.float64)
    typical = asked.mean()
    draws = _draws(prompts, seed)
    rates = (draws @ np.append(won, [typical, 0.0])) / (draws @ np.append(asked, [typical, typical]))
    return _with_interval(float(wins.mean()), rates, samples=len(wins), prompts=prompts)


def length_controlled_win_rate(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    prompt_ids: Sequence[str] | Sequence[int] | NDArray,
    tie_width: float = 0.0,
    *,
    seed: int = 0,
) -> WinRate:
    """How often A would win if both answers were equally long.

    A logistic regression of the win on the difference in length, P(A wins) = σ(α + β·Δ/s), where Δ is A's length minus
    B's and s its root mean square; the rate is σ(α), the probability at Δ = 0. Ties enter as half a win and half a
    loss. In the manner of AlpacaEval's length-controlled win rate (Dubois et al. 2024), without its tanh and without
    terms for single instructions. The fit includes the two added prompts of the module, so it stays finite, and says
    "unknown" with a wide interval, where lengths never allow a comparison at Δ = 0.

    Arguments, interval and errors as in `win_rate`; lengths in any one unit.
    """
    wins = _wins(scores_a, scores_b, tie_width)
    clusters, prompts = _clusters(prompt_ids, len(wins))
    difference = _column(lengths_a, "lengths_a", len(wins)) - _column(lengths_b, "lengths_b", len(wins))
    scale = float(np.sqrt(np.mean(difference**2))) or 1.0
    typical = len(wins) / prompts
    # The added prompts stand last: one all won, one all lost, at no difference in length.
    x = np.append(difference / scale, [0.0, 0.0])
    y = np.append(wins, [1.0, 0.0])
    size = np.append(np.ones(len(wins)), [typical, typical])
    cluster = np.append(clusters, [prompts, prompts + 1])
    start = _fit_logistic(x, y, size[None, :], np.zeros((1, 2)))
    intercepts = []
    draws = _draws(prompts, seed)
    chunk = max(1, _CHUNK_FLOATS // len(x))
    for first in range(0, len(draws), chunk):
        weights = draws[first : first + chunk][:, cluster] * size
        intercepts.append(_fit_logistic(x, y, weights, np.repeat(start, len(weights), axis=0))[:, 0])
    rates = _sigmoid(np.concatenate(intercepts))
    return _with_interval(float(_sigmoid(start[0, 0])), rates, samples=len(wins), prompts=prompts)


def _wins(scores_a: ArrayLike, scores_b: ArrayLike, tie_width: float) -> Floats:
    """1 where A wins, 0 where B wins, 0.5 for a tie; (comparisons,)."""
    if not tie_width >= 0:
        raise UsageProblem(
            f"tie_width is {tie_width}; it is a difference of scores and cannot be negative.", "evaluation/answers"
        )
    a = _column(scores_a, "scores_a")
    b = _column(scores_b, "scores_b", len(a))
    if len(a) == 0:
        raise UsageProblem("A win rate needs at least one comparison; there are none.", "evaluation/answers")
    return np.where(np.abs(a - b) <= tie_width, 0.5, (a > b).astype(np.float64))


def _column(values: ArrayLike, name: str, length: int | None = None) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or (length is not None and len(column) != length):
        raise UsageProblem(
            f"{name} has shape {column.shape}; one number a comparison is needed ({length or 'any'}).",
            "evaluation/answers",
        )
    if not np.isfinite(column).all():
        raise RunProblem(
            f"{name} holds a value that is not a finite number at position {_first_bad(column)}.", "evaluation/answers"
        )
    return column


def _first_bad(column: Floats) -> int:
    return int(np.flatnonzero(~np.isfinite(column))[0])


def _clusters(prompt_ids: Sequence[str] | Sequence[int] | NDArray, length: int) -> tuple[NDArray[np.intp], int]:
    """The number of each comparison's prompt, (comparisons,), and how many prompts there are."""
    ids = np.asarray(prompt_ids)
    if ids.shape != (length,):
        raise UsageProblem(
            f"prompt_ids has shape {ids.shape}; one id a comparison is needed ({length}).", "evaluation/answers"
        )
    distinct, clusters = np.unique(ids, return_inverse=True)
    return clusters, len(distinct)


def _draws(prompts: int, seed: int) -> Floats:
    """How often each prompt (and the two added ones, last) is drawn; (RESAMPLES, prompts + 2)."""
    pool = prompts + 2
    drawn = np.random.default_rng(seed).integers(pool, size=(RESAMPLES, pool))
    drawn += pool * np.arange(RESAMPLES)[:, None]  # a counter of its own for every resample
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * pool).reshape(RESAMPLES, pool).astype(np.float64)


def _with_interval(rate: float, resampled: Floats, samples: int, prompts: int) -> WinRate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return WinRate(rate=rate, low=float(min(low, rate)), high=float(max(high, rate)), samples=samples, prompts=prompts)


def _fit_logistic(x: Floats, y: Floats, weights: Floats, start: Floats) -> Floats:
    """Weighted logistic regressions of `y` on `x`, all at once, by Newton's method with bounded steps.

    x, y: (points,); weights: (fits, points); start and the returned (intercept, slope): (fits, 2).
    """
    theta = start.copy()
    for _ in range(_FIT_ITERATIONS):
        p = _sigmoid(theta[:, :1] + theta[:, 1:] * x)
        residual = weights * (y - p)
        curvature = weights * p * (1 - p)
        gradient = np.stack([residual.sum(1), residual @ x], axis=1) - _RIDGE * theta
        cross = curvature @ x
        information = np.stack([curvature.sum(1) + _RIDGE, cross, cross, curvature @ (x * x) + _RIDGE], axis=1).reshape(
            -1, 2, 2
        )
        step = np.linalg.solve(information, gradient[:, :, None])[:, :, 0]
        size = np.abs(step).max(axis=1, keepdims=True)
        theta += step * np.minimum(1.0, 1.0 / np.maximum(size, 1e-12))  # far from the optimum a full step overshoots
        if size.max() < _FIT_TOLERANCE:
            return theta
    raise RunProblem(
        f"The length-controlled win rate did not converge in {_FIT_ITERATIONS} steps.", "evaluation/not-converged"
    )


def _sigmoid(z: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(z)))
