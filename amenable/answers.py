"""Answers of actors, as the driver waits for them: the deadline counts from the last answer, and who owes one is named.

An actor that died ends the wait in one sentence that names it; what a call raised is raised here.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from amenable import interruption
from corpus.deaths import death, is_death
from corpus.problems import RunProblem

IN_FLIGHT = 2
"""Calls that each actor is given at once, so that none waits for the driver."""

_LOOK_S = 1.0
"""Seconds between two looks at whether a stop is asked for."""


def answer_of_each(
    calls: Mapping[str, Any], what: str, deadline_s: float, setting: str = "deadline_s"
) -> dict[str, Any]:
    """The answers to `calls`, one for each actor, by the actors' names.

    `what` is awaited ("the generators to start"); `setting` is the recipe's key that says `deadline_s`. Raises
    RunProblem where no answer came for that long or an actor died, Interrupted where a stop is asked for.
    """
    pending = {call: name for name, call in calls.items()}
    names = dict(pending)
    found = {names[call]: answer for call, answer in _as_they_come(pending, what, deadline_s, setting)}
    return {name: found[name] for name in calls}


def answers_to_all(
    actors: Mapping[str, Any],
    calls: Sequence[Callable[[Any], Any]],
    what: str,
    deadline_s: float,
    setting: str = "deadline_s",
) -> Iterator[tuple[int, Any]]:
    """Has any of the `actors` work on each of `calls`, which begin a call of the actor they are given.

    At most IN_FLIGHT calls are with one actor. Yields the position of a call and its answer, as they come. Raises as
    `answer_of_each` does.
    """
    left = deque(enumerate(calls))
    pending: dict[Any, str] = {}
    numbers: dict[Any, int] = {}

    def hand_out() -> None:
        held = Counter(pending.values())
        while left:
            name = min(actors, key=lambda each: held[each])
            if held[name] >= IN_FLIGHT:
                return
            number, begin = left.popleft()
            call = begin(actors[name])
            pending[call], numbers[call] = name, number
            held[name] += 1

    hand_out()
    for call, answer in _as_they_come(pending, what, deadline_s, setting):
        hand_out()  # before the answer is looked at: the actor goes on meanwhile
        yield numbers.pop(call), answer


def _as_they_come(pending: dict[Any, str], what: str, deadline_s: float, setting: str) -> Iterator[tuple[Any, Any]]:
    """Calls and their answers until `pending` (calls by the name of their actor) is empty; it may grow meanwhile."""
    import ray

    last = time.monotonic()
    while pending:
        ready, _ = ray.wait(list(pending), timeout=min(_LOOK_S, deadline_s))
        for call in ready:
            yield call, _answer(ray, call, pending.pop(call))
            last = time.monotonic()
        if pending and interruption.requested():
            raise interruption.Interrupted(f"waiting for {what}")
        if not ready and time.monotonic() - last > deadline_s:
            owing = ", ".join(dict.fromkeys(pending.values()))
            raise RunProblem(
                f"Waited {deadline_s:.0f} s for {what} without an answer from {owing}; where that is only slow, raise "
                f"{setting}, and the same command continues.",
                "run/no-answer",
            )


def _answer(ray: Any, call: Any, name: str) -> Any:
    try:
        return ray.get(call)  # it is there: ray.wait has seen it
    except Exception as error:
        if is_death(error):
            raise death(error, name) from error
        raise
