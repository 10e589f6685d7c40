"""Processes that died, as a person is told of them. Ray's errors are known by name: nothing of Ray is imported."""

import re

from corpus.problems import RunProblem

_DEATHS = {
    "RayActorError",
    "WorkerCrashedError",
    "OutOfMemoryError",
    "NodeDiedError",
    "LocalRayletDiedError",
    "OwnerDiedError",
}
_CLASS = re.compile(r"^\s*class_name: (?:.*\.)?(\w+)", re.MULTILINE)
_ROLES = {
    "RolloutGenerator": "A generator",
    "ScoringWorker": "A scoring process",
    "EpisodeStream": "The episode stream",
    "Conductor": "The conductor",
    "WeightStore": "The weight store",
    "Desk": "The learners' desk",
}


def is_death(error: BaseException) -> bool:
    """Whether `error` says that a process of the run died; False where it only failed to be made, which is a bug."""
    names = {sort.__name__ for sort in type(error).__mro__ if sort.__module__.partition(".")[0] == "ray"}
    return bool(names & _DEATHS) and getattr(error, "actor_init_failed", False) is not True


def death(error: BaseException, who: str | None = None) -> RunProblem:
    """The sentence about `error`, for which `is_death` holds. Without `who` the role is read from what Ray says."""
    if who is None:
        found = _CLASS.search(str(error))
        who = _ROLES.get(found[1], f"The actor {found[1]}") if found else "A process of the run"
    return RunProblem(
        f"{who} died: {cause_of_death(error)}; the same command continues from what was last saved.", "run/process-died"
    )


def cause_of_death(error: BaseException) -> str:
    """Why it died, as far as Ray's error tells: the middle of a sentence."""
    sort, text = type(error).__name__, str(error)
    if sort == "OutOfMemoryError" or "running low on memory" in text:
        return "its machine ran short of memory"
    if sort in ("NodeDiedError", "LocalRayletDiedError") or "node has died" in text or "node was terminated" in text:
        return "its machine, or Ray on it, was lost"
    return "its process was killed or crashed"
