"""Simulated labelers: people who want about what gold wants, weigh it differently, and do not always look closely."""

from dataclasses import dataclass
from random import Random

from pydantic import BaseModel, ConfigDict, Field

from corpus.world.gold import WEIGHTS, gold


class LabelerSettings(BaseModel):
    """How the labelers differ from gold and from each other."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    training: int = Field(
        default=5, ge=1, description="Labelers whose rankings the reward model is trained on. Chosen for this world."
    )
    heldout: int = Field(
        default=3, ge=0, description="Labelers whose rankings training never sees. Chosen for this world."
    )
    weight_spread: float = Field(
        default=0.3,
        ge=0,
        description="Standard deviation of each labeler's weights, relative to gold's. Chosen for this world.",
    )
    noise: float = Field(
        default=0.11,
        ge=0,
        description="Standard deviation of a labeler's error at one response, in gold units, set so that two "
        "labelers agree on about 73 % of pairs, as InstructGPT's do (72.6 ± 1.5 %, section 3.4).",
    )
    tie_width: float = Field(
        default=0.04,
        ge=0,
        description="Responses whose perceived worth differs by less are ranked as ties. Chosen for this world.",
    )


@dataclass(frozen=True)
class Labeler:
    """One simulated person: `weights` are what this person adds for each component of gold."""

    labeler_id: str
    weights: dict[str, float]
    noise: float
    tie_width: float

    def rank(self, meta: dict, responses: list[str], seed: int) -> list[int]:
        """Returns the rank of each response: 0 is best, equal ranks are ties, no rank is left out.

        The same labeler, seed and number of responses make the same errors again.
        """
        rng = Random(f"{self.labeler_id}/{seed}")
        worth = []
        for response in responses:
            components = gold(meta, response).components
            wanted = sum(self.weights[name] * value for name, value in components.items())
            worth.append(wanted + rng.gauss(0.0, self.noise))
        ranks = [0] * len(responses)
        rank, best_of_rank = -1, float("inf")
        for i in sorted(range(len(responses)), key=lambda i: -worth[i]):
            if best_of_rank - worth[i] >= self.tie_width:
                rank, best_of_rank = rank + 1, worth[i]
            ranks[i] = max(rank, 0)
        return ranks


def draw_labelers(rng: Random, settings: LabelerSettings) -> tuple[list[Labeler], list[Labeler]]:
    """Returns the labelers of the training set and the held-out ones."""
    people = [
        Labeler(
            labeler_id=f"labeler-{number:02d}",
            weights={n: max(0.0, w * rng.gauss(1.0, settings.weight_spread)) for n, w in WEIGHTS.items()},
            noise=settings.noise,
            tie_width=settings.tie_width,
        )
        for number in range(settings.training + settings.heldout)
    ]
    return people[: settings.training], people[settings.training :]


def pairwise_agreement(rankings: list[list[int]], others: list[list[int]]) -> float:
    """Returns the share of pairs that two labelers put in the same order, among the pairs that neither of them ties.

    `rankings` and `others` hold two labelers' ranks of the same responses. Raises ValueError where every pair is a tie.
    """
    same = told_apart = 0
    for mine, theirs in zip(rankings, others, strict=True):
        for i in range(len(mine)):
            for j in range(i):
                product = (mine[i] - mine[j]) * (theirs[i] - theirs[j])
                same += product > 0
                told_apart += product != 0
    if not told_apart:
        raise ValueError("no pair of responses was told apart by both labelers")
    return same / told_apart
