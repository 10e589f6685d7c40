"""The learner group: Ray Train workers that run one job after another, so that start-up is paid once.

The driver hands jobs to a desk (a small actor); every rank fetches the job, runs it, and rank 0 reports. Where a rank
dies Ray Train starts all of them anew, and they fetch the job that is under way once more: it goes on from what it has
saved. A rank that lives but says nothing is killed, so that the same happens. Ray Train's own checkpoints are not used:
a job's manifest on storage is the truth.
"""

import contextlib
import math
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import ray

from corpus.deaths import death, is_death
from corpus.problems import RunProblem
from corpus.run_epoch import RunEpoch
from learners.desk import Desk, Loss, News, Ordered, Process, at_desk
from learners.liveness import Liveness, kill_on_its_node
from learners.ranks import Ranks
from learners.worker import Interrupted, Progress, Worker

POLL_S = 0.5
"""Seconds between two looks of the driver at the desk; a job's end is told at once."""

CLOSE_DEADLINE_S = 30.0
"""Seconds that the group's end waits for its workers; the Ray session's end stops them anyway."""

LEAVE_S = 5.0
"""Seconds for ranks that may be in the midst of a job to come out of it by themselves, before they are ended. What has
ended one rank has mostly ended the others. House default."""

AGAIN = "the same command continues from what was last saved"


@dataclass(frozen=True)
class Patience:
    """How long the driver waits for its learners, in seconds, and how often it lets them start anew."""

    start_deadline_s: float
    """For all ranks to be ready, at first and after each loss."""
    silence_s: float = 60.0
    """For a rank's next sign of life; then it is killed."""
    stall_s: float = 7200.0
    """For a rank's job to come by and report or ask, then it is killed: above every deadline that jobs keep."""
    stop_grace_s: float = 300.0
    """For the checkpoint of a job that is asked to stop."""
    max_restarts: int = 3
    """Restarts after deaths; those for the sake of machines that are taken away are not counted."""

    @property
    def collective_s(self) -> int:
        """Seconds after which torch gives up a collective. Above the stall clock, which says which rank it was: the
        others wait in one while the first alone writes a checkpoint or an export. Ray Train's own 1800 at least, since
        the ranks meet within it, too."""
        return max(1800, math.ceil(self.stall_s) + 60)


class LearnerGroup:
    """A Ray Train group of `ranks` that runs the jobs it is given. Use as a context manager.

    With a `run_epoch` the ranks check, before they commit, that its holder still has the run's lease. `note` is told,
    while a job or the group's start is waited for, that the group was started anew, and why. `run_tag` is the run's tag
    in exported metrics.
    """

    def __init__(
        self,
        ranks: Ranks,
        storage: str,
        patience: Patience,
        run_epoch: RunEpoch | None = None,
        note: Callable[[str], None] = lambda text: None,
        run_tag: str = "",
    ) -> None:
        self._desk: Any = Desk.options(**ranks.beside()).remote()  # pyright: ignore[reportAttributeAccessIssue]
        self._number = 0
        self._workers = ranks.workers
        self._patience = patience
        self._run_epoch = run_epoch
        self._note = note
        self._ended: Exception | None = None
        self._is_sound = True
        self._controller: Any = None
        self._incarnation = 0
        self._restarts = 0
        self._why = ""
        self._is_counted = True
        self._given_up: dict[int, str] = {}
        self._kills: list[Any] = []
        self._thread = threading.Thread(target=self._fit, args=(ranks, storage, run_tag), name="ray-train", daemon=True)
        self._thread.start()  # at once: the workers' imports overlap with whatever the driver does next

    def _fit(self, ranks: Ranks, storage: str, run_tag: str) -> None:
        # On a thread of its own, because on the main one fit() would take SIGINT for itself.
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from learners.rank import TellLosses, serve

        try:
            TorchTrainer(
                serve,
                train_loop_config={"desk": self._desk, "threads": ranks.threads, "run": run_tag},
                torch_config=TorchConfig(
                    backend="nccl" if ranks.gpus else "gloo", timeout_s=self._patience.collective_s
                ),
                scaling_config=ranks.scaling_config(),
                run_config=RunConfig(
                    name="learners",
                    storage_path=storage,
                    failure_config=FailureConfig(max_failures=self._patience.max_restarts),
                    callbacks=[TellLosses(self._desk)],
                ),
            ).fit()
        except Exception as problem:  # noqa: BLE001 - handed to whoever waits in run()
            self._ended = problem

    def wait_until_ready(self, should_stop: Callable[[], bool]) -> None:
        """Until all ranks have imported what they need. Raises RunProblem after the start deadline, or where Ray Train
        gave up; `Interrupted` where `should_stop` became true."""
        started = time.monotonic()
        while True:
            news = at_desk(self._desk.news.remote(POLL_S), POLL_S)
            self._hear(news)
            if len(news.processes) == self._workers:
                self._controller = at_desk(self._desk.controller.remote())
                return
            self._check_alive()
            self._check_start(news, time.monotonic() - started)
            if should_stop():
                raise Interrupted("the start of the learners")

    def _check_start(self, news: News, waited_s: float) -> None:
        deadline_s = self._patience.start_deadline_s
        if waited_s <= deadline_s:
            return
        ready = len(news.processes)
        if self._why or self._given_up:
            why = self._why or _sentence(self._given_up)
            raise RunProblem(
                f"Only {ready} of {self._workers} learner workers were there again {deadline_s:.0f} s after {why}; is "
                f"there still room for them? With room, {AGAIN}.",
                "placement/no-room",
            )
        raise RunProblem(
            f"Only {ready} of {self._workers} learner workers were ready after {deadline_s:.0f} s: is there room for "
            "them (CPUs, GPUs, memory) beside the generators and scorers?",
            "placement/no-room",
        )

    def _hear(self, news: News) -> list[Loss]:
        """Takes in what has become of the ranks, and notes it; returns the losses that are new."""
        for loss in news.losses:
            causes = {rank: self._given_up.get(rank, cause) for rank, cause in loss.causes.items()}
            self._why = _sentence(causes)
            self._is_counted = loss.is_counted
            self._restarts += loss.is_counted
        for note in news.notes:
            self._note(note)
        if len(news.processes) == self._workers and news.incarnation != self._incarnation:
            if self._why:
                count = f" ({self._restarts} of {self._patience.max_restarts})" if self._is_counted else ""
                self._note(f"learners restarted{count} after: {self._why}")
            elif self._incarnation:
                self._note("learners restarted: a machine of theirs was taken away")
            self._incarnation, self._why, self._given_up = news.incarnation, "", {}
        return news.losses

    def _check_alive(self) -> None:
        """Raises what ended the group: RunProblem for a rank that died, what Ray Train raised for a mistake in it."""
        if self._thread.is_alive():
            return
        failures = getattr(self._ended, "worker_failures", None) or {}
        for rank, failure in sorted(failures.items()):
            cause = getattr(failure, "health_check_failure", failure)
            if is_death(cause) and rank in self._given_up:
                raise RunProblem(
                    f"Learner rank {rank} {self._given_up[rank]}; {AGAIN}.", "learners/lost"
                ) from self._ended
            if is_death(cause):
                raise death(cause, f"Learner rank {rank}") from self._ended
        if failures and self._ended is not None:
            raise self._ended
        reason = " ".join(str(self._ended or "without a reason").split())
        raise RunProblem(
            f"The learner group ended before its job did: {reason[:400]}.", "learners/lost"
        ) from self._ended

    def run(
        self,
        run: Callable[[Any, Worker], dict[str, Any]],
        job: Any,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """Run one job on all ranks and return rank 0's result.

        A job whose ranks die is run again from its beginning, as often as the group may restart: it finds what it had
        saved. What the job itself raises is raised here, with the rank's traceback as a note where it is no expected
        problem, and nothing is run again. Raises `Interrupted` where `should_stop` became true and the job has its
        checkpoint, and RunProblem where that does not come within the grace, where the group does not come back, and
        where it may not restart any more.
        """
        self._number += 1
        ordered = Ordered(self._number, pickle.dumps((run, job)), self._run_epoch)
        at_desk(self._desk.order.remote(ordered))
        self._is_sound = False
        liveness = Liveness(self._patience.silence_s, self._patience.stall_s)
        asked_at: float | None = None
        whole_at = time.monotonic()
        while True:
            news = at_desk(self._desk.news.remote(POLL_S), POLL_S)
            for each in news.progress:
                on_progress(each)
            losses = self._hear(news)
            if news.outcome is not None:
                break
            self._check_alive()
            now = time.monotonic()
            self._give_up(liveness.look(now, news.incarnation, news.beats), news.processes)
            self._hear_of_kills()
            if len(news.processes) == self._workers and not self._given_up:
                whole_at = now
            self._check_start(news, now - whole_at)
            if asked_at is not None:
                self._check_grace(now - asked_at, losses)
            elif should_stop():
                asked_at = now
                at_desk(self._desk.stop_job.remote())
        outcome = news.outcome
        self._is_sound = outcome.problem is None or self._workers == 1
        if outcome.problem is not None:
            if outcome.traceback:
                outcome.problem.add_note(f"In a learner:\n{outcome.traceback.rstrip()}")
            raise outcome.problem
        if outcome.interrupted:
            raise Interrupted(outcome.interrupted)
        assert outcome.result is not None
        return outcome.result

    def _give_up(self, ranks: dict[int, str], processes: dict[int, Process]) -> None:
        for rank, why in ranks.items():
            if rank in processes and rank not in self._given_up:
                self._given_up[rank] = why
                self._kills.append(kill_on_its_node(processes[rank]))

    def _hear_of_kills(self) -> None:
        """Notes a kill that failed. Where its machine is lost Ray finds that out; else the restart is waited for in
        vain, and its deadline tells."""
        for kill in list(self._kills):
            done, _ = ray.wait([kill], timeout=0)
            if done:
                self._kills.remove(kill)
                try:
                    ray.get(kill)
                except Exception as error:  # noqa: BLE001 - a lost machine has many names here
                    self._note(f"a silent learner could not be killed: {' '.join(str(error).split())[:200]}")

    def _check_grace(self, waited_s: float, losses: list[Loss]) -> None:
        if losses:
            raise RunProblem(
                f"The learners were to save and stop, and could not: {self._why}; {AGAIN}.", "learners/stop"
            )
        if waited_s > self._patience.stop_grace_s:
            raise RunProblem(
                "The learners were asked to save and stop, and no checkpoint came within "
                f"{self._patience.stop_grace_s:g} s (learners.stop_grace_s); what was saved before stands: {AGAIN}.",
                "learners/stop",
            )

    def close(self) -> None:
        """Let the workers end, and wait for it up to CLOSE_DEADLINE_S; those that are still in the midst of a job, or
        may be, are ended after LEAVE_S. A desk that is dead is no problem any more.

        It must not be left to the end of the Ray session: a process whose session ends while Ray Train's fit() waits in
        a thread of it may be ended by Ray at once, before it has said what was wrong.
        """
        with contextlib.suppress(RunProblem):
            at_desk(self._desk.close.remote(), deadline_s=CLOSE_DEADLINE_S)
        self._thread.join(CLOSE_DEADLINE_S if self._is_sound else LEAVE_S)
        if self._thread.is_alive() and self._controller is not None:
            ray.kill(self._controller)  # which owns the ranks: they die with it
            self._thread.join(CLOSE_DEADLINE_S)
        ray.kill(self._desk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _sentence(causes: dict[int, str]) -> str:
    return ", ".join(f"rank {rank} {cause}" for rank, cause in sorted(causes.items()))
