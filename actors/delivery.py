"""A generated chunk's way over reward scorer and reference to the stream, by reference: the rows never come back.

Where a scoring process dies on that way, or breaks, the chunk is scored again by another, or by the one in its place.
Which of them scores makes no difference: all hold the same models, and a chunk is one batch wherever it is scored.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ObjectLostError

from actors.failures import actor_names, broken_worker, dead_actor, plain_problem
from actors.settings import SamplingSettings
from corpus.problems import RunProblem

SCORING_TRIES = 5
"""Scorings of one chunk, each of which a scorer or reference did not survive, after which the run stops: it is then the
chunk that they do not survive."""


BREAKS = 2
"""Scoring processes that broke at one chunk, after which the run stops: it is then no process's own."""


@dataclass(frozen=True)
class ScoringPools:
    """The scoring processes that serve. A score does not depend on which of them gives it."""

    scorers: list[Any]
    references: list[Any]
    names: dict[str, str] = field(default_factory=dict)
    """What to call actors, by Ray's id, where one of them failed."""


@dataclass(frozen=True)
class Work:
    """What a generator needs to take part in a PPO stage: the actors it talks to, how it samples, and its part.

    `chunk_size` is in slots; `share` is the largest number of slots that one generator may hold at once, so that the
    first to ask leaves work for the others. `scorers`, `references` and `share` are those at the beginning: the
    conductor tells of others as the fleet changes.
    """

    run: str
    round_number: int
    stream: Any
    conductor: Any
    scorers: list[Any]
    references: list[Any]
    sampling: SamplingSettings
    chunk_size: int
    share: int

    def scoring(self) -> dict[str, Any]:
        """The scoring processes by name; one that is both scorer and reference is there once."""
        return {f"scoring-{n}": each for n, each in enumerate(dict.fromkeys([*self.scorers, *self.references]))}

    def names(self) -> dict[str, str]:
        """What to call the actors of this work, by their ids, where one of them failed."""
        pools = {"reward scorer": self.scorers, "reference": self.references}
        scoring = [
            (f"{' and '.join(role for role, pool in pools.items() if each in pool)} {name}", each)
            for name, each in self.scoring().items()
        ]
        return actor_names([("the episode stream", self.stream), *scoring])


@dataclass
class Unscored:
    """A generated chunk on its way over scorer and reference to the stream, and how often it did not arrive."""

    episodes: Any
    """Reference to the rows, which this generator owns."""
    slots: list[int]
    work: Work
    tries: int = 0
    broke: int = 0
    """How often a scoring process broke at it."""


class Delivery:
    """A generator's chunks under way. Its methods run on any thread, and touch no engine."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.pools = ScoringPools([], [])
        """Who scores what is sent from now on."""
        self.work: Work | None = None
        """What is under way; chunks of any other work are nobody's concern any more."""

    def send(self, chunk: Unscored) -> None:
        """Have a chunk scored and delivered; returns at once. Whoever owes it is told of what goes wrong."""
        self._score(chunk, self.pools)

    def _score(self, chunk: Unscored, pools: ScoringPools) -> None:
        work, which = chunk.work, chunk.slots[0] // len(chunk.slots)
        scores = pools.scorers[which % len(pools.scorers)].score.remote(chunk.episodes)
        reference = pools.references[which % len(pools.references)]
        logprobs = reference.reference_logprobs.remote(chunk.episodes, work.sampling.temperature)
        accepted = work.stream.accept.remote(chunk.episodes, scores, logprobs).future()
        accepted.add_done_callback(lambda done: self._check_accepted(done, chunk))

    def _check_accepted(self, done: "Future[int]", chunk: Unscored) -> None:
        problem = done.exception()
        if problem is None:
            return
        chunk.tries += 1
        work = chunk.work
        died, broke = dead_actor(problem), broken_worker(problem)
        chunk.broke += broke is not None
        lost = isinstance(problem, ObjectLostError) or broke is not None
        lost = lost or (died is not None and died not in actor_names([("", work.stream)]))
        if not lost or work is not self.work or chunk.tries >= SCORING_TRIES or chunk.broke >= BREAKS:
            self._tell(problem, chunk)
            return
        pools = work.conductor.scoring_pools.remote(died, broke).future()
        pools.add_done_callback(lambda found: self._score_again(found, chunk))

    def _score_again(self, found: "Future[ScoringPools]", chunk: Unscored) -> None:
        """Have a chunk scored by those that are left, whom the conductor names once there are enough of them."""
        problem = found.exception()
        if problem is not None:
            self._tell(problem, chunk)
        elif chunk.work is self.work:
            self._score(chunk, found.result())

    def _tell(self, problem: BaseException, chunk: Unscored) -> None:
        slots = f"slots {chunk.slots[0]} to {chunk.slots[-1]} of {self._name}"
        aim, doing = f"{slots} were scored and accepted", f"{slots} could not be scored and accepted"
        names = chunk.work.names() | self.pools.names
        told = plain_problem(problem, names, "the episode stream", aim, doing)
        if chunk.tries >= SCORING_TRIES:
            told = RunProblem(
                f"{slots} were scored {chunk.tries} times, and no process survived that: {told}", "fleet/unscored"
            )
        chunk.work.conductor.failed.remote(self._name, told)
