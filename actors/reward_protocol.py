"""What a scorer is, whatever is behind it: texts and tokens in, one finite number for every response out."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from corpus.problems import RunProblem

Tokens = Sequence[Sequence[int]]


class Reward(Protocol):
    """Something that scores responses. Higher is better; the scale is the scorer's own."""

    def score(
        self, prompts: list[str], responses: list[str], prompt_tokens: Tokens, response_tokens: Tokens
    ) -> list[float]:
        """One finite number for each response, in order. Raises RunProblem, naming the scorer, where it has none.

        `prompts` are the corpus's prompt texts (plain requests or dialogues), `responses` texts without special
        tokens; the tokens are the policy's, EOS included where the response kept one. Scorers read what suits them.
        """
        ...


def check_scores(scores: Any, count: int, scorer: str) -> list[float]:
    """`scores` as `count` finite floats; RunProblem, naming the scorer, where they are not that."""
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError):  # whose sentence would repeat what came, which may be what was sent: a token
        raise RunProblem(
            f"{scorer}: it should return a list of {count} numbers, and something in it is none.", "reward/scores"
        ) from None
    if len(numbers) != count:
        raise RunProblem(f"{scorer}: it returned {len(numbers)} scores for {count} responses.", "reward/scores")
    for row, number in enumerate(numbers):
        if not math.isfinite(number):
            raise RunProblem(
                f"{scorer}: the score of response {row} of {count} is {number}; it should be finite.", "reward/scores"
            )
    return numbers
