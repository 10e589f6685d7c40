"""Finds the sentence for a person inside the errors that Ray wraps around it. Imports nothing of Ray."""

from collections.abc import Iterator

from corpus.deaths import death, is_death
from corpus.problems import FULL_DISK, RunProblem, UsageProblem, problem_in_traceback


def problem_in(error: BaseException) -> UsageProblem | RunProblem | None:
    """The UsageProblem or RunProblem that `error` is or was caused by, as it was raised; None where there is none.

    A full disk and the death of a process are made into one.
    """
    seen: set[int] = set()
    waiting = [error]
    died: BaseException | None = None
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        wrapped = list(_wrapped(current))
        if isinstance(current, OSError) and current.errno in FULL_DISK:
            return RunProblem(
                f"The disk is full ({current}); make room, and the same command continues.", "storage/full"
            )
        # Ray makes an error that is both its own and the problem, with the traceback for its text: look inside first.
        if isinstance(current, UsageProblem | RunProblem) and not wrapped:
            return current
        waiting.extend(wrapped)
        if getattr(current, "actor_init_failed", False) is True:
            found = problem_in_traceback(str(current))
            if found is not None:
                return found
        if died is None and is_death(current):
            died = current
    return None if died is None else death(died)


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """What `error` carries: RayTaskError.cause, Ray Train's failures by worker, of its controller or of a health check,
    Python's cause."""
    failures = getattr(error, "worker_failures", None)
    inside = [
        getattr(error, "cause", None),
        *(failures.values() if isinstance(failures, dict) else ()),
        getattr(error, "controller_failure", None),
        getattr(error, "health_check_failure", None),
        getattr(error, "_base_exc", None),  # Ray Train's UserExceptionWithTraceback
    ]
    if not isinstance(error, UsageProblem | RunProblem):
        inside.append(error.__cause__)
    yield from (one for one in inside if isinstance(one, BaseException))
