"""What one actor tells of another's failure: a plain sentence, which may cross actors as an argument.

Ray raises an argument that is one of its own errors instead of calling the method, so none of those is ever sent on.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from corpus.deaths import cause_of_death
from corpus.problems import UNEXPECTED, RunProblem, UsageProblem, problem_in_traceback

Problem = UsageProblem | RunProblem

LONGEST_MESSAGE = 400
"""Characters of an unexpected error's own message that are told."""


class WorkerBroke(RunProblem):
    """A worker met an error that nobody foresaw, such as a GPU without memory. It may be that process's own: in PPO
    another is tried in its place. `what` are two: what the worker calls itself, and what it did, after its name."""

    def __init__(self, what: tuple[str, str], code: str) -> None:
        self.who, self.did = what
        super().__init__(f"{self.who} {self.did}.", code)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerBroke, ((self.who, self.did), self.code)


_DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError)


def expected_problem(error: BaseException, names: Mapping[str, str], who: str, aim: str) -> Problem | None:
    """The sentence for a person that `error` holds, or that says which actor died; None where `error` is a bug.

    `names` are actors by Ray's id; `who` is meant where it does not say which one died. `aim` follows "before": "it
    could load weights 0.3".
    """
    origin = _origin(error)
    if isinstance(origin, UsageProblem | RunProblem):
        return _sort(origin)(str(origin), origin.code)
    if getattr(origin, "actor_init_failed", False) is True:
        return problem_in_traceback(str(origin))
    again = "the same command continues from what was last saved"
    if isinstance(origin, _DEATHS):
        dead = names.get(getattr(origin, "actor_id", None) or "", who)
        return RunProblem(
            f"{_sentence(dead)} died before {aim}: {cause_of_death(origin)}; {again}.", "run/process-died"
        )
    if isinstance(origin, ObjectLostError):
        return RunProblem(
            f"What {who} needed was lost with the process that held it, before {aim}; {again}.", "run/process-died"
        )
    return None


def plain_problem(error: BaseException, names: Mapping[str, str], who: str, aim: str, doing: str) -> Problem:
    """As `expected_problem`; anything else becomes "`doing`: type: message." in one line."""
    problem = expected_problem(error, names, who, aim)
    return problem or RunProblem(f"{doing}: {_one_line(_origin(error))}", UNEXPECTED)


def dead_actor(error: BaseException) -> str | None:
    """Ray's id of the actor whose death `error` tells of, empty where it does not say; None where it tells of none."""
    origin = _origin(error)
    if getattr(origin, "actor_init_failed", False) is True or not isinstance(origin, _DEATHS):
        return None
    return getattr(origin, "actor_id", None) or ""


def broken_worker(error: BaseException) -> WorkerBroke | None:
    """What `error`, as Ray hands it on, tells of a worker that broke; None where it tells of none."""
    origin = _origin(error)
    return origin if isinstance(origin, WorkerBroke) else None


def worker_broke(who: str, doing: str, error: BaseException) -> WorkerBroke:
    """What is told where the worker `who` met an `error` that nobody foresaw; `doing` follows "while it"."""
    return WorkerBroke((who, f"failed while it {doing}: {_one_line(_origin(error))}"), UNEXPECTED)


def actor_names(actors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """What to call the actors that Ray's errors name by id."""
    ids = ((getattr(handle, "_actor_id", None), who) for who, handle in actors)
    return {actor_id.hex(): who for actor_id, who in ids if actor_id is not None}


def _origin(error: BaseException) -> BaseException:
    """What was raised first, under the errors that Ray has put around it at every actor on the way."""
    while isinstance(error, RayError) and isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


def _sort(problem: Problem) -> type[Problem]:
    return UsageProblem if isinstance(problem, UsageProblem) else RunProblem


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _sentence(who: str) -> str:
    return f"The {who.removeprefix('the ')}" if who.startswith("the ") else who
