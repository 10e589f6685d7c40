"""Gao et al.'s curve of the gold score, and what the report says of it."""

import numpy as np
import pytest

from evaluation.gold_curve import FEWEST, GoldCurve, fit_gold_curve
from evaluation.run_files import Evaluation
from evaluation.sections import frontier_section

DISTANCES = [0.3, 0.7, 1.2, 2.0, 3.5]


@pytest.mark.parametrize("curve", [GoldCurve(0.0, 1.0, 0.5), GoldCurve(0.8, 0.12, 0.04), GoldCurve(-1.0, 0.3, -0.1)])
def test_the_coefficients_of_a_curve_are_found_from_its_points(curve):
    found = fit_gold_curve(DISTANCES, [curve.at(d) for d in DISTANCES])
    assert found is not None
    np.testing.assert_allclose(
        [found.start, found.alpha, found.beta], [curve.start, curve.alpha, curve.beta], atol=1e-9
    )


def test_it_is_not_the_curve_of_best_of_n():
    """d (α − β d): the fit would not tell the two apart if it left nothing over."""
    gold = [d * (1.0 - 0.2 * d) for d in DISTANCES]
    found = fit_gold_curve(DISTANCES, gold)
    assert found is not None
    assert max(abs(found.at(d) - score) for d, score in zip(DISTANCES, gold, strict=True)) > 1e-3


def test_it_turns_where_its_gold_score_is_highest():
    curve = GoldCurve(0.8, 0.3, 0.1)
    grid = np.linspace(0.01, 20, 20_000)
    assert curve.turn == pytest.approx(grid[np.argmax([curve.at(d) for d in grid])], abs=2e-3)
    assert GoldCurve(0.8, 0.3, -0.1).turn is None
    assert GoldCurve(0.8, 0.3, 0.001).turn is None  # beyond anything that is travelled


def test_few_points_have_no_curve():
    known = [d * (1 - 0.5 * np.log(d)) for d in DISTANCES]
    assert fit_gold_curve(DISTANCES[: FEWEST - 1], known[: FEWEST - 1]) is None
    assert fit_gold_curve([0.0, *DISTANCES[: FEWEST - 1]], [0.0, *known[: FEWEST - 1]]) is None
    assert fit_gold_curve(DISTANCES, [np.nan, np.nan, *known[2:]]) is None
    assert fit_gold_curve([1.0] * 9, [0.5] * 9) is None
    assert fit_gold_curve(DISTANCES[:FEWEST], known[:FEWEST]) is not None


def test_the_report_says_where_the_gold_score_turns():
    def says(curve: GoldCurve, distances: list[float]) -> str:
        runs = [Evaluation(n, 8 * n, d * d, 0.0, curve.at(d), 9.0, 1.0) for n, d in enumerate(distances, start=1)]
        return str(frontier_section(runs))

    curve = GoldCurve(0.8, 0.3, 0.2)
    assert curve.turn == pytest.approx(np.exp(0.5))
    assert "Its maximum is at √KL 1.649, already passed." in says(curve, DISTANCES)
    assert "Its maximum is at √KL 1.649, beyond the 1.2 that were travelled." in says(curve, [0.3, 0.6, 0.9, 1.2])
    assert "nothing in these dots says" in says(GoldCurve(0.8, 0.3, -0.1), DISTANCES)
    assert "more reward was worse answers." in says(GoldCurve(0.8, -0.3, -0.1), DISTANCES)
    assert "curve through the dots" not in says(curve, DISTANCES[: FEWEST - 1])
