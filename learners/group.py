"""The learner group: Ray Train workers that run one job after another, so that start-up is paid once.

The driver hands jobs to a desk (a small actor); every rank fetches the job, runs it, and rank 0 reports. The desk also
carries progress to the driver and the wish to stop to the ranks. Ray Train's own checkpoints are not used: a job's
manifest on storage is the truth.
"""

import asyncio
import contextlib
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from corpus.deaths import death, is_death
from corpus.problems import RunProblem, UsageProblem
from corpus.run_epoch import RunEpoch
from learners.worker import Interrupted, Progress, Worker

POLL_S = 0.5
"""Seconds between two looks of the driver at the desk; a job's end is told at once."""

DESK_DEADLINE_S = 120.0
"""Seconds in which the desk answers a call. It only passes things on, but its process has to start among all others."""

CLOSE_DEADLINE_S = 30.0
"""Seconds that the group's end waits for its workers; the Ray session's end stops them anyway."""

IDLE_S = 20.0
"""Seconds that a rank without a job waits at the desk before it asks again."""


@dataclass(frozen=True)
class Ordered:
    """A job with its number. `payload` is a pickled (run, job): `run` is called with (job, worker) on every rank.

    Pickled, so that the desk, which only passes it on, does not import what the learners need (half a GiB of it).
    """

    number: int
    payload: bytes
    run_epoch: RunEpoch | None = None
    """The holder of the run's lease for whom the ranks write; None where there is no lease."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: one of `result` and `problem` is set, or `interrupted` says why it stopped early.

    `traceback` is the rank's, where the problem is a mistake of the program.
    """

    number: int
    result: dict[str, Any] | None = None
    problem: Exception | None = None
    interrupted: str = ""
    traceback: str = ""


@ray.remote(num_cpus=0)
class Desk:
    """Between driver and ranks. Coroutines of one event loop."""

    def __init__(self) -> None:
        self._job: Ordered | None = None
        self._closed = False
        self._stop = False
        self._progress: list[Progress] = []
        self._outcome: Outcome | None = None
        self._ready: set[int] = set()
        self._changed = asyncio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def order(self, job: Ordered) -> None:
        """The driver's next job."""
        self._job, self._outcome, self._stop = job, None, False
        self._notify()

    async def next_job(self, rank: int, after: int, wait_s: float) -> tuple[bool, Ordered | None]:
        """Whether the group is to end, and the job after number `after`, if there is one within `wait_s`."""
        self._ready.add(rank)
        deadline = time.monotonic() + wait_s
        while not self._closed and (self._job is None or self._job.number <= after):
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                return False, None
        return self._closed, self._job

    async def report(self, progress: Progress) -> bool:
        """Rank 0's progress; returns whether the job is asked to stop."""
        self._progress.append(progress)
        return self._stop

    async def asked_to_stop(self) -> bool:
        """Whether the job is asked to stop."""
        return self._stop

    async def finish(self, outcome: Outcome) -> None:
        """How the present job ended; the first outcome counts."""
        if self._outcome is None and self._job is not None and outcome.number == self._job.number:
            self._outcome = outcome
            self._notify()

    async def news(self, wait_s: float) -> tuple[list[Progress], Outcome | None, int]:
        """For the driver: progress since the last call, the outcome if there is one, and how many ranks are ready.

        Waits up to `wait_s` for the outcome.
        """
        if self._outcome is None and wait_s > 0:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), wait_s)
        progress, self._progress = self._progress, []
        return progress, self._outcome, len(self._ready)

    async def stop_job(self) -> None:
        """Ask the present job to stop after a checkpoint."""
        self._stop = True

    async def close(self) -> None:
        """Let the ranks leave once their job is done."""
        self._closed = True
        self._stop = True
        self._notify()


def _serve(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs: jobs from the desk until it closes."""
    import os

    import torch
    from ray import train

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config["threads"])
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    desk, done = config["desk"], 0
    while True:
        is_over, ordered = _at_desk(desk.next_job.remote(rank, done, IDLE_S), IDLE_S)
        if is_over:
            return
        if ordered is None:
            continue
        worker = _worker(desk, rank, world, ordered.run_epoch)
        try:
            run, job = pickle.loads(ordered.payload)
            outcome = Outcome(ordered.number, result=run(job, worker))
        except Interrupted as interruption:
            outcome = Outcome(ordered.number, interrupted=str(interruption))
        except Exception as error:
            problem = _portable(error)
            is_expected = isinstance(problem, UsageProblem | RunProblem)
            told = "" if is_expected else traceback.format_exc()
            _at_desk(desk.finish.remote(Outcome(ordered.number, problem=problem, traceback=told)))
            if world > 1:
                raise  # the other ranks may be waiting in a collective: only a new group is sound
            done = ordered.number
            continue
        if rank == 0:
            _at_desk(desk.finish.remote(outcome))
        done = ordered.number


def _at_desk(call: Any, wait_s: float = 0.0, deadline_s: float | None = None) -> Any:
    """What the desk answers to a call that waits there for up to `wait_s`. Raises RunProblem where it is late or dead.

    The deadline is DESK_DEADLINE_S where none is given.
    """
    deadline_s = wait_s + (DESK_DEADLINE_S if deadline_s is None else deadline_s)
    try:
        return ray.get(call, timeout=deadline_s)
    except GetTimeoutError:
        raise RunProblem(
            f"Waited {deadline_s:.0f} s for the learners' desk, the actor between command and learners, to answer; the "
            "same command continues from what was last saved."
        ) from None
    except Exception as error:
        if is_death(error):
            raise death(error, "The learners' desk") from error
        raise


def _worker(desk: Any, rank: int, world: int, run_epoch: RunEpoch | None) -> Worker:
    asked = {"stop": False, "looked": 0.0}

    def report(progress: Progress) -> None:
        if rank == 0:
            asked["stop"] = _at_desk(desk.report.remote(progress))

    def should_stop() -> bool:
        now = time.monotonic()
        if now - asked["looked"] > 0.5:
            asked["stop"], asked["looked"] = _at_desk(desk.asked_to_stop.remote()), now
        return bool(asked["stop"])

    def check_lease() -> None:
        if run_epoch is not None:
            run_epoch.check()

    return Worker(rank, world, report, should_stop, check_lease)


def _portable(problem: Exception) -> Exception:
    """The problem as it can be sent: an error that came over Ray is replaced by what caused it, and one that does not
    survive pickling by its text."""
    cause = getattr(problem, "cause", None)
    problem = cause if isinstance(cause, Exception) else problem
    try:
        pickle.loads(pickle.dumps(problem))
    except Exception:  # noqa: BLE001 - whatever is wrong with it, what it says must arrive
        return RuntimeError(f"{type(problem).__name__}: {problem}")
    return problem


class LearnerGroup:
    """A Ray Train group of `workers` ranks that runs the jobs it is given. Use as a context manager.

    With a `run_epoch` the ranks check, before they commit, that its holder still has the run's lease.
    """

    def __init__(
        self,
        workers: int,
        threads: int,
        gpus_per_worker: float,
        storage: str,
        start_deadline_s: float,
        run_epoch: RunEpoch | None = None,
    ) -> None:
        self._desk: Any = Desk.remote()
        self._number = 0
        self._workers = workers
        self._deadline_s = start_deadline_s
        self._run_epoch = run_epoch
        self._ended: Exception | None = None
        self._thread = threading.Thread(
            target=self._fit, args=(workers, threads, gpus_per_worker, storage), name="ray-train", daemon=True
        )
        self._thread.start()  # at once: the workers' imports overlap with whatever the driver does next

    def _fit(self, workers: int, threads: int, gpus_per_worker: float, storage: str) -> None:
        # On a thread of its own, because on the main one fit() would take SIGINT for itself.
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        resources = {"CPU": float(threads)} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
        try:
            TorchTrainer(
                _serve,
                train_loop_config={"desk": self._desk, "threads": threads},
                torch_config=TorchConfig(backend="nccl" if gpus_per_worker else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
                ),
                run_config=RunConfig(
                    name="learners", storage_path=storage, failure_config=FailureConfig(max_failures=0)
                ),
            ).fit()
        except Exception as problem:  # noqa: BLE001 - handed to whoever waits in run()
            self._ended = problem

    def wait_until_ready(self, should_stop: Callable[[], bool]) -> None:
        """Until all ranks have imported what they need. Raises RunProblem after the start deadline, or where Ray Train
        gave up; `Interrupted` where `should_stop` became true."""
        started = time.monotonic()
        while True:
            news = _at_desk(self._desk.news.remote(POLL_S), POLL_S)
            if news[2] == self._workers:
                return
            self._check_alive()
            if time.monotonic() - started > self._deadline_s:
                raise RunProblem(
                    f"Only {news[2]} of {self._workers} learner workers were ready after {self._deadline_s:.0f} s: is "
                    "there room for them (CPUs, GPUs, memory) beside the generators and scorers?"
                )
            if should_stop():
                raise Interrupted("the start of the learners")

    def _check_alive(self) -> None:
        """Raises what ended the group: RunProblem for a rank that died, what Ray Train raised for a mistake in it."""
        if self._thread.is_alive():
            return
        failures = getattr(self._ended, "worker_failures", None) or {}
        for rank, failure in sorted(failures.items()):
            cause = getattr(failure, "health_check_failure", failure)
            if is_death(cause):
                raise death(cause, f"Learner rank {rank}") from self._ended
        if failures and self._ended is not None:
            raise self._ended
        reason = " ".join(str(self._ended or "without a reason").split())
        raise RunProblem(f"The learner group ended before its job did: {reason[:400]}.") from self._ended

    def run(
        self,
        run: Callable[[Any, Worker], dict[str, Any]],
        job: Any,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """Run one job on all ranks and return rank 0's result.

        Raises what the job raised (with the rank's traceback as a note, where it is no expected problem), `Interrupted`
        where `should_stop` became true and the job has its checkpoint, and RunProblem where the group ended.
        """
        self._number += 1
        ordered = Ordered(self._number, pickle.dumps((run, job)), self._run_epoch)
        _at_desk(self._desk.order.remote(ordered))
        asked = False
        while True:
            progress, outcome, _ = _at_desk(self._desk.news.remote(POLL_S), POLL_S)
            for each in progress:
                on_progress(each)
            if outcome is not None:
                break
            self._check_alive()
            if should_stop() and not asked:
                asked = True
                _at_desk(self._desk.stop_job.remote())
        if outcome.problem is not None:
            if outcome.traceback:
                outcome.problem.add_note(f"In a learner:\n{outcome.traceback.rstrip()}")
            raise outcome.problem
        if outcome.interrupted:
            raise Interrupted(outcome.interrupted)
        assert outcome.result is not None
        return outcome.result

    def close(self) -> None:
        """Let the workers end; waits for them up to CLOSE_DEADLINE_S. A desk that is dead is no problem any more."""
        with contextlib.suppress(RunProblem):
            _at_desk(self._desk.close.remote(), deadline_s=CLOSE_DEADLINE_S)
        self._thread.join(CLOSE_DEADLINE_S)
        ray.kill(self._desk)

    def __enter__(self) -> "LearnerGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
