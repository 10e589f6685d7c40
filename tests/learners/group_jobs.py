"""Jobs for a learner group, which its ranks import by name."""

import os
import signal
import time
from typing import Any

from corpus.problems import RunProblem
from learners.worker import Interrupted, Progress, Worker


def adds(job: list[int], worker: Worker) -> dict[str, Any]:
    worker.report(Progress("toy", 1, 1, "steps", {"loss": 0.5}))
    return {"sum": sum(job), "rank": worker.rank, "world_size": worker.world_size}


def works_until_stopped(job: float, worker: Worker) -> dict[str, Any]:
    deadline = time.monotonic() + job
    while not worker.agreed_to_stop():
        assert time.monotonic() < deadline, "nobody asked the job to stop"
        worker.report(Progress("toy", 3, 10, "steps"))
        time.sleep(0.05)
    raise Interrupted("toy, step 3 of 10")


def has_a_problem(job: str, worker: Worker) -> dict[str, Any]:
    raise RunProblem(job)


def has_a_bug(job: dict[str, int], worker: Worker) -> dict[str, Any]:
    return {"found": job["a key that is missing"]}


class Odd(Exception):
    """An error that does not survive pickling."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def has_an_odd_bug(job: None, worker: Worker) -> dict[str, Any]:
    raise Odd("one thing", "another")


def commits(job: None, worker: Worker) -> dict[str, Any]:
    worker.check_lease()
    return {"committed": True}


def is_killed(job: None, worker: Worker) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
