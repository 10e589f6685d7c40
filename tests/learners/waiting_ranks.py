"""One of two ranks, run as `python waiting_ranks.py RANK STORE`: prints how each wait ended, a line a wait."""

import sys
from collections.abc import Callable

from ray.exceptions import ActorDiedError, RayTaskError

from corpus.problems import RunProblem
from learners.agreed_wait import wait_together
from learners.process_group import process_group, sum_over_ranks


def after(looks: float) -> Callable[[float], bool]:
    """An answer that comes at that look."""
    left = [looks]

    def has_come(within_s: float) -> bool:
        left[0] -= 1
        return left[0] <= 0

    return has_come


def failing(problem: Exception) -> Callable[[float], bool]:
    """An answer that cannot be looked for."""

    def has_come(within_s: float) -> bool:
        raise problem

    return has_come


# As ray.get raises what an actor has raised: of a class that was made in this very process.
OF_AN_ACTOR = RayTaskError("take", "its traceback", RunProblem("a batch is late", "a/b")).as_instanceof_cause()


NEVER = float("inf")
# Of each rank: what its answer does, at which look it is asked to stop; and how long they wait.
WAITS = {
    "both come, one late": ((after(1), NEVER), (after(5), NEVER), 60.0),
    "who has its answer waits for a stop of the other": ((after(1), NEVER), (after(NEVER), 4), 60.0),
    "a stop of one ends both": ((after(NEVER), 3), (after(NEVER), NEVER), 60.0),
    "one fails": (
        (after(NEVER), NEVER),
        (failing(RunProblem("its desk is gone", "run/unexpected")), NEVER),
        60.0,
    ),
    "what an actor has raised": ((failing(OF_AN_ACTOR), NEVER), (after(NEVER), NEVER), 60.0),
    "an actor has died": ((after(NEVER), NEVER), (failing(ActorDiedError()), NEVER), 60.0),
    "one is late": ((after(NEVER), NEVER), (after(1), NEVER), 0.0),
}


def main(rank: int, store: str) -> None:
    with process_group(rank, 2, store):
        for name, wait in WAITS.items():
            (has_come, stop_at), patience_s = wait[rank], wait[2]
            stop = after(stop_at)
            try:
                came = wait_together(
                    has_come, lambda stop=stop: stop(0), lambda: None, patience_s, lambda: RunProblem("late", "a/b")
                )
                ended = "came" if came else "stopped"
            except RunProblem as problem:
                ended = problem.sentence
            except ActorDiedError as problem:
                ended = type(problem).__name__
            together = sum_over_ranks(1.0)[0] == 2.0  # no rank is left in a collective of the wait
            print(f"{name}: {ended}" if together else f"{name}: apart")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
