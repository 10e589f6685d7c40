"""What the actors of a PPO stage answer to the learner, and how long it waits for them."""

from typing import Any

import ray

from corpus.problems import RunProblem


def has_come(answer: Any, within_s: float = 0.0) -> bool:
    """Whether an actor's answer, or its failure, is there; waits up to `within_s` seconds for it."""
    done, _ = ray.wait([answer], timeout=within_s)
    return bool(done)


class Answers:
    """Fetches answers, with one deadline for an actor's silence.

    Actors have deadlines of their own, which name who owed the answer; this one is above them all.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self.evaluations = 0
        """Held-out evaluations under way. Any answer may have to wait for them, and they are sampled one after another:
        each adds the deadline once more."""

    @property
    def patience_s(self) -> float:
        """Seconds until an answer that has not come is given up."""
        return self._deadline_s * (1 + self.evaluations)

    def late(self, what: str) -> RunProblem:
        """The problem of an answer, named `what`, that has not come in time."""
        return RunProblem(f"ppo: waited {self.patience_s:.0f} s for {what}.", "run/no-answer")

    def of(self, answer: Any, what: str) -> Any:
        """What an actor answers. Raises what it raised, and RunProblem, naming `what`, where it says nothing."""
        if not has_come(answer, self.patience_s):
            raise self.late(what)
        return ray.get(answer)
