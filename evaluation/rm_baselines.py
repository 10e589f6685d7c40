"""How often scores put ranked replies in the labelers' order, and two simple scorers to hold a reward model against.

A pair is two replies to one prompt that the labeler ranked apart; ties are dropped (InstructGPT drops them too). Equal
scores count half. Intervals are those of `evaluation.win_rate`: a bootstrap that draws whole prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from corpus.problems import UsageProblem
from evaluation.schema import Accuracy
from evaluation.win_rate import win_rate

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LONGER = "longer reply wins"
BAG_OF_WORDS = "bag-of-words logistic regression"

INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""L2 penalties tried (scikit-learn's C); the best by cross-validation on the training comparisons is used."""
FOLDS = 5


def pair_accuracy(
    scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]], prompt_ids: Sequence[str], *, seed: int = 0
) -> Accuracy:
    """The share of pairs that the scores put in the ranks' order, with its 95 % interval clustered by prompt.

    One entry of each argument a comparison: the K scores (higher is better) and the K ranks (0 is best, equal ranks
    are ties) of its replies, and its prompt. Raises UsageProblem where lengths differ or all pairs are ties, and
    RunProblem where a score is not finite.
    """
    better: list[float] = []
    worse: list[float] = []
    ids: list[str] = []
    for row, (row_scores, row_ranks, prompt_id) in enumerate(zip(scores, ranks, prompt_ids, strict=True)):
        if len(row_scores) != len(row_ranks):
            raise UsageProblem(
                f"comparison {row} has {len(row_ranks)} ranks and {len(row_scores)} scores.", "evaluation/answers"
            )
        for first, second in ordered_pairs(row_ranks):
            better.append(row_scores[first])
            worse.append(row_scores[second])
            ids.append(prompt_id)
    if not ids:
        raise UsageProblem(
            "accuracy needs a pair of replies that is no tie, and the comparisons hold none.", "data/all-ties"
        )
    won = win_rate(better, worse, ids, seed=seed)
    return Accuracy(rate=won.rate, low=won.low, high=won.high, pairs=won.samples)


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Indices (better, worse) of all pairs that are no ties, C(K, 2) at most."""
    pairs = combinations(range(len(ranks)), 2)
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in pairs if ranks[i] != ranks[j]]


def baselines(train: pa.Table, valid: pa.Table, *, seed: int = 0) -> dict[str, Accuracy]:
    """The baselines' accuracies on the comparisons table `valid`, by name; `train` is what the words learn from.

    One that cannot be fitted or measured is left out: `measured_baselines` says why.
    """
    return measured_baselines(train, valid, seed=seed)[0]


def measured_baselines(
    train: pa.Table, valid: pa.Table, *, seed: int = 0
) -> tuple[dict[str, Accuracy], dict[str, str]]:
    """The baselines' accuracies on `valid` by name, and the reason, a sentence, for each that is left out.

    A baseline is a comparison beside the result: where all replies tie, or the data are too few to learn from, the
    result stands without it.
    """
    ranks, ids = valid["ranks"].to_pylist(), valid["prompt_id"].to_pylist()
    responses = valid["responses"].to_pylist()
    scorers: dict[str, Callable[[], list[list[float]]]] = {
        LONGER: lambda: longer_scores(responses),
        BAG_OF_WORDS: lambda: BagOfWords(train).scores(responses),
    }
    found: dict[str, Accuracy] = {}
    left_out: dict[str, str] = {}
    for name, scores in scorers.items():
        try:
            found[name] = pair_accuracy(scores(), ranks, ids, seed=seed)
        except UsageProblem as problem:
            left_out[name] = str(problem)
    return found, left_out


def longer_scores(responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Each reply's length in characters: the longer reply wins, whatever it says."""
    return [[float(len(text)) for text in replies] for replies in responses]


class BagOfWords:
    """A reward that is linear in a reply's word counts; it sees neither prompt nor order of words.

    A logistic regression on the difference of the two bags of a pair, without intercept, so that exchanging the
    replies exchanges the prediction: the Bradley–Terry loss of the reward model, with words for a network. Words that
    occur in fewer than two training replies are left out.
    """

    def __init__(self, train: pa.Table) -> None:
        """Fits on the comparisons table `train`.

        Raises UsageProblem where it has fewer than two prompts with a pair that is no tie, or no word occurs twice.
        """
        from scipy.sparse import csr_matrix
        from sklearn.feature_extraction.text import CountVectorizer

        responses, ranks = train["responses"].to_pylist(), train["ranks"].to_pylist()
        self._words = CountVectorizer(min_df=2, token_pattern=r"\w+")
        try:
            bags = csr_matrix(self._words.fit_transform([text for replies in responses for text in replies]))
        except ValueError as error:
            raise UsageProblem(
                f"the training comparisons hold no words to learn from ({error}).", "evaluation/answers"
            ) from error
        pairs: list[tuple[int, int]] = []
        prompts: list[str] = []
        start = 0
        for row_ranks, prompt_id in zip(ranks, train["prompt_id"].to_pylist(), strict=True):
            found = [(start + better, start + worse) for better, worse in ordered_pairs(row_ranks)]
            pairs += found
            prompts += [prompt_id] * len(found)
            start += len(row_ranks)
        if len(set(prompts)) < 2:
            raise UsageProblem(
                "the training comparisons need two prompts with replies that are ranked apart.", "data/all-ties"
            )
        better, worse = np.array(pairs).T
        try:
            self._weights = _fit(csr_matrix(bags[better] - bags[worse]), np.array(prompts))
        except ValueError as error:
            raise UsageProblem(f"the training comparisons cannot be fitted ({error}).", "evaluation/answers") from error

    def scores(self, responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """One score for each reply of each comparison."""
        bags = self._words.transform([text for replies in responses for text in replies])
        flat = iter(np.asarray(bags @ self._weights, dtype=np.float64))
        return [[float(next(flat)) for _ in replies] for replies in responses]


def _fit(differences: csr_matrix, prompts: NDArray[np.str_]) -> NDArray[np.float64]:
    """One weight a word, from the difference (better minus worse) of each pair's bags; (pairs, words) → (words,)."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    def weights(penalty: float, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        chosen = differences[rows]
        both = vstack([chosen, -chosen], format="csr")  # each pair in both directions: the fit needs both classes
        better = np.repeat([1, 0], len(rows))
        return LogisticRegression(C=penalty, fit_intercept=False, max_iter=2000).fit(both, better).coef_[0]

    folds = list(GroupKFold(min(FOLDS, len(np.unique(prompts)))).split(differences, groups=prompts))

    def right(penalty: float) -> float:
        margins = [differences[test] @ weights(penalty, train) for train, test in folds]
        return float(sum((margin > 0).sum() + 0.5 * (margin == 0).sum() for margin in margins))

    best = max(INVERSE_PENALTIES, key=right)
    return weights(best, np.arange(len(prompts)))
