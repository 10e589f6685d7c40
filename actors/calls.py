"""Answers of actors as the conductor waits for them: each has a deadline, and whoever is late or died is named."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ray.exceptions import RayError

from actors.failures import expected_problem
from corpus.problems import RunProblem

Key = TypeVar("Key")


@dataclass(frozen=True)
class Answers(Generic[Key]):
    """What came of asking several: their answers, what they raised (Ray's errors as they came), and who was late."""

    found: dict[Key, Any] = field(default_factory=dict)
    raised: dict[Key, Exception] = field(default_factory=dict)
    late: list[Key] = field(default_factory=list)
    seconds: float = 0.0


async def within(call: Awaitable[Any], names: Mapping[str, str], who: str, what: str, deadline_s: float) -> Any:
    """What `call` comes to, which `who` owes. Raises RunProblem at its deadline, or where `who` died. `names` are what
    to call actors, by Ray's id."""
    task = asyncio.ensure_future(_awaited(call))
    await asyncio.wait([task], timeout=deadline_s)
    if not task.done():
        task.cancel()
        raise RunProblem(f"Waited {deadline_s:.0f} s for {who} to {what} and gave up.", "run/no-answer")
    try:
        return task.result()
    except RayError as error:
        problem = expected_problem(error, names, who, f"it could {what}")
        if problem is None:
            raise
        raise problem from error


async def of_each(
    calls: Mapping[Key, Awaitable[Any]],
    deadline_s: float,
    may_be_later: Callable[[Key], bool] = lambda name: False,
    later_by_s: float = 0.0,
) -> Answers[Key]:
    """What each of `calls`, by name, comes to within `deadline_s`; those that `may_be_later` have `later_by_s` more."""
    if not calls:
        return Answers()
    began = time.monotonic()
    tasks = {asyncio.ensure_future(_awaited(call)): name for name, call in calls.items()}
    _, pending = await asyncio.wait(tasks, timeout=deadline_s)
    excused = {task for task in pending if may_be_later(tasks[task])}
    if excused:
        await asyncio.wait(excused, timeout=later_by_s)
    found, raised, late = {}, {}, []
    for task, name in tasks.items():
        if not task.done():
            task.cancel()
            late.append(name)
        elif (problem := task.exception()) is None:
            found[name] = task.result()
        elif isinstance(problem, Exception):
            raised[name] = problem
        else:
            raise problem
    return Answers(found, raised, late, time.monotonic() - began)


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call
