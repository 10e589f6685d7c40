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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from corpus.problems import RunProblem
from learners.worker import Interrupted, Progress, Worker

POLL_S = 0.5
"""Seconds between two looks of the driver at the desk; a job's end is told at once."""


@dataclass(frozen=True)
class Ordered:
    """A job with its number. `payload` is a pickled (run, job): `run` is called with (job, worker) on every rank.

    Pickled, so that the desk, which only passes it on, does not import what the learners need (half a GiB of it).
    """

    number: int
    payload: bytes


@dataclass(frozen=True)
class Outcome:
    """How a job ended: one of `result` and `problem` is set, or `interrupted` says why it stopped early."""

    number: int
    result: dict[str, Any] | None = None
    problem: Exception | None = None
    interrupted: str = ""


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

    async def next_job(self, rank: int, after: int) -> Ordered | None:
        """The job after number `after`, once there is one; None when the group is to end."""
        self._ready.add(rank)
        while not self._closed:
            if self._job is not None and self._job.number > after:
                return self._job
            await self._changed.wait()
        return None

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
        ordered: Any = ray.get(desk.next_job.remote(rank, done))
        if ordered is None:
            return
        worker = _worker(desk, rank, world)
        try:
            run, job = pickle.loads(ordered.payload)
            outcome = Outcome(ordered.number, result=run(job, worker))
        except Interrupted as interruption:
            outcome = Outcome(ordered.number, interrupted=str(interruption))
        except Exception as problem:
            outcome = Outcome(ordered.number, problem=_portable(problem))
            ray.get(desk.finish.remote(outcome))
            if world > 1:
                raise  # the other ranks may be waiting in a collective: only a new group is sound
            done = ordered.number
            continue
        if rank == 0:
            ray.get(desk.finish.remote(outcome))
        done = ordered.number


def _worker(desk: Any, rank: int, world: int) -> Worker:
    asked = {"stop": False, "looked": 0.0}

    def report(progress: Progress) -> None:
        if rank == 0:
            asked["stop"] = ray.get(desk.report.remote(progress))

    def should_stop() -> bool:
        now = time.monotonic()
        if now - asked["looked"] > 0.5:
            asked["stop"], asked["looked"] = ray.get(desk.asked_to_stop.remote()), now
        return bool(asked["stop"])

    return Worker(rank, world, report, should_stop)


def _portable(problem: Exception) -> Exception:
    """The problem as it can be sent: an error that came over Ray is replaced by what caused it."""
    cause = getattr(problem, "cause", None)
    return cause if isinstance(cause, Exception) else problem


class LearnerGroup:
    """A Ray Train group of `workers` ranks that runs the jobs it is given. Use as a context manager."""

    def __init__(
        self, workers: int, threads: int, gpus_per_worker: float, storage: str, start_deadline_s: float
    ) -> None:
        self._desk: Any = Desk.remote()
        self._number = 0
        self._workers = workers
        self._deadline_s = start_deadline_s
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
            news: Any = ray.get(self._desk.news.remote(POLL_S))
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
        if not self._thread.is_alive():
            raise RunProblem(f"The learner group ended before its job did: {self._ended or 'without a reason'}.")

    def run(
        self,
        run: Callable[[Any, Worker], dict[str, Any]],
        job: Any,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """Run one job on all ranks and return rank 0's result.

        Raises what the job raised, `Interrupted` where `should_stop` became true and the job has its checkpoint, and
        RunProblem where the group ended.
        """
        self._number += 1
        ray.get(self._desk.order.remote(Ordered(self._number, pickle.dumps((run, job)))))
        asked = False
        while True:
            news: Any = ray.get(self._desk.news.remote(POLL_S))
            progress, outcome, _ = news
            for each in progress:
                on_progress(each)
            if outcome is not None:
                break
            self._check_alive()
            if should_stop() and not asked:
                asked = True
                ray.get(self._desk.stop_job.remote())
        if outcome.problem is not None:
            raise outcome.problem
        if outcome.interrupted:
            raise Interrupted(outcome.interrupted)
        assert outcome.result is not None
        return outcome.result

    def close(self) -> None:
        """Let the workers end; waits up to 30 seconds for them."""
        ray.get(self._desk.close.remote())
        self._thread.join(30)
        ray.kill(self._desk)

    def __enter__(self) -> "LearnerGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
