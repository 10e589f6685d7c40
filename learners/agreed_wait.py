"""A wait of all learner ranks, each for an answer of its own, that ends on all of them alike."""

import time
from collections.abc import Callable

import torch.distributed as dist

from corpus.problems import RunProblem
from learners.process_group import problem_of_ranks, sum_over_ranks

LOOK_S = 1.0
"""Seconds of one look. After each, all ranks tell one another what they have found."""


def wait_together(
    has_come: Callable[[float], bool],
    should_stop: Callable[[], bool],
    still_waiting: Callable[[], None],
    patience_s: float,
    late: Callable[[], RunProblem],
) -> bool:
    """True once every rank has what it waits for, False where any rank was asked to stop before that; a collective.

    `has_come` waits up to so many seconds for this rank's answer; while it has not come `should_stop` is asked.
    `still_waiting` is called at every look: a rank that waits for the others alone lives too. Every look ends in a
    collective, also one that fails: so no rank is ever in another one than the rest, and none goes on alone. Raises on
    every rank where one fails: what its look raised, what `late` makes after `patience_s` seconds, and elsewhere the
    same sentence.
    """
    give_up = time.monotonic() + patience_s
    while True:
        problem: Exception | None = None
        is_here = is_asked = False
        try:
            is_here = has_come(LOOK_S)
            still_waiting()
            if not is_here:
                is_asked = should_stop()
                if time.monotonic() > give_up and not is_asked:
                    problem = late()
        except Exception as met:  # noqa: BLE001 - raised below, once the other ranks know
            problem = met
        here, asked, failed = sum_over_ranks(float(is_here), float(is_asked), float(problem is not None))
        if failed:
            raise problem_of_ranks(problem)
        if here == dist.get_world_size():
            return True
        if asked:
            return False
