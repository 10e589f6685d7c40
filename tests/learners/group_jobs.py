"""Jobs for a learner group, which its ranks import by name."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from corpus.problems import RunProblem
from learners.process_group import sum_over_ranks
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
    raise RunProblem(job, "run/unexpected")


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


@dataclass(frozen=True)
class Steps:
    """Six steps, each saved below `directory`; once, in the midst of step `at`, rank `rank` gets `signal`."""

    directory: Path
    signal: int
    at: int = 4
    rank: int = 0
    once: bool = True


def makes_steps(job: Steps, worker: Worker) -> dict[str, Any]:
    """Goes on from the last saved step; returns that, and the process that did the last one."""
    saved, struck = job.directory / "saved", job.directory / "struck"
    resumed, total = int(saved.read_text()) if saved.exists() else 0, 0.0
    for step in range(resumed + 1, 7):
        if step == job.at and worker.rank == job.rank and not (job.once and struck.exists()):
            with open(struck, "a") as stream:
                stream.write("x")
            os.kill(os.getpid(), job.signal)
        total = sum_over_ranks(1.0)[0]  # where another rank has died, this fails
        if worker.rank == 0:
            worker.check_lease()
            saved.write_text(str(step))
        sum_over_ranks(0.0)
        worker.report(Progress("toy", step, 6, "steps"))
        time.sleep(0.05)
    return {"resumed": resumed, "ranks": total, "pid": os.getpid()}


def counts_its_runs_and_has_a_problem(job: Path, worker: Worker) -> dict[str, Any]:
    with open(job / f"runs-{worker.rank}", "a") as stream:
        stream.write("x")
    raise RunProblem("The loss is NaN.", "run/unexpected")


def counts_its_runs(job: Path, worker: Worker) -> dict[str, Any]:
    with open(job / f"runs-{worker.rank}", "a") as stream:
        stream.write("x")
    return {"pid": os.getpid()}


def does_not_hear_of_the_stop(job: Path, worker: Worker) -> dict[str, Any]:
    """Works on until `job` exists."""
    deadline = time.monotonic() + 60
    while not job.exists():
        assert time.monotonic() < deadline, "nobody let the job end"
        worker.report(Progress("toy", 3, 10, "steps"))
        time.sleep(0.05)
    return {}


def is_stuck_once(job: Path, worker: Worker) -> dict[str, Any]:
    """Neither reports nor asks the first time, though its process lives."""
    if not job.exists():
        job.touch()
        time.sleep(120)
    worker.report(Progress("toy", 1, 1, "steps"))
    return {"done": True}


def has_a_problem_on_the_first_rank(job: float, worker: Worker) -> dict[str, Any]:
    """The others sit in something else for `job` seconds, as a rank does that waits in vain."""
    if worker.rank == 0:
        raise RunProblem("The first rank has a problem.", "run/unexpected")
    time.sleep(job)
    return {}


def saves_before_its_machine_goes(job: Path, worker: Worker) -> dict[str, Any]:
    """Works until it is to stop, and saves in `job` where that was; returns this, and where it went on."""
    here = ray.get_runtime_context().get_node_id()
    if job.exists():
        return {"saved_on": job.read_text(), "node": here}
    deadline = time.monotonic() + 120
    while not worker.agreed_to_stop():
        assert time.monotonic() < deadline, "nobody told the job that its machine goes"
        worker.report(Progress("toy", 3, 10, "steps"))
        time.sleep(0.05)
    worker.check_lease()
    job.write_text(here)
    raise Interrupted("toy, step 3 of 10")
