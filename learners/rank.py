"""What every rank of a learner group runs: jobs from the desk, one after another, until it closes.

Beside the training two threads of a rank talk: one gives signs of life, one asks Ray Train whether the machine is about
to be taken away, which is a wish to save now and to go on elsewhere.
"""

import logging
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import ray.train.collective
from ray import train

from corpus import logs
from corpus.deaths import cause_of_death, is_death
from corpus.problems import RunProblem, UsageProblem
from corpus.processes import started_ticks
from corpus.run_epoch import RunEpoch
from corpus.telemetry import switch_telemetry_off
from learners.desk import DESK_DEADLINE_S, Beat, Outcome, Process, Superseded, at_desk
from learners.worker import Interrupted, Progress, Worker

IDLE_S = 20.0
"""Seconds that a rank without a job waits at the desk before it asks again."""

BEAT_EVERY_S = 2.0
"""Seconds between two signs of life of a rank."""

PREEMPTION_LOOK_S = 5.0
"""Seconds between two questions whether a machine of the group is about to be taken away; Ray Train itself looks every
five."""

COMES_OF_A_DEATH_S = 15.0
"""Seconds in which a rank's death is found, that may be why the others failed: Ray Train looks every two."""

STOP_LOOK_S = 0.5
"""Seconds between two questions of one rank whether its job is asked to stop."""

log = logging.getLogger(__name__)


class TellLosses(train.UserCallback):
    """Runs in Ray Train's controller: tells the desk which ranks failed, and why, before the group starts anew."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk
        self._told: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrives in the controller, and tells the desk who that is: TorchTrainer keeps its handle to itself."""
        self.__dict__.update(state)
        self._desk.controlled_by.remote(ray.get_runtime_context().current_actor)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this at every look that finds failures; each process is told of once."""
        causes: dict[int, str] = {}
        are_deaths, is_counted = False, True
        for rank, failure in sorted(worker_exceptions.items()):
            cause = getattr(failure, "health_check_failure", failure)
            actor = getattr(cause, "actor_id", None)
            if actor is not None and actor in self._told:
                continue
            if is_death(cause):
                self._told.add(str(actor))
                are_deaths = True
                is_taken = getattr(cause, "preempted", False)  # Ray Train counts these by themselves, without a limit
                is_counted = is_counted and not is_taken
                causes[rank] = f"died: {'its machine was taken away' if is_taken else cause_of_death(cause)}"
            else:
                causes[rank] = f"failed: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        if are_deaths:  # what the others failed with comes of it
            causes = {rank: text for rank, text in causes.items() if text.startswith("died")}
        if causes:
            self._desk.lost.remote(causes, are_deaths, is_counted)


class Line:
    """One rank's line to the desk: it knows the incarnation that the rank belongs to, and counts what goes over it."""

    def __init__(self, desk: Any, rank: int, incarnation: int) -> None:
        self._desk, self._rank, self.incarnation = desk, rank, incarnation
        self._moves = 0
        self._beats = 0
        self._stop = False
        self._looked = 0.0
        self.is_over = threading.Event()
        self.is_preempted = threading.Event()

    def enlist(self) -> None:
        """Tells the desk that this rank is ready, and where it runs."""
        ticks = started_ticks(os.getpid())
        assert ticks is not None, "this process runs"
        process = Process(ray.get_runtime_context().get_node_id(), os.getpid(), ticks)
        at_desk(self._desk.enlist.remote(self.incarnation, self._rank, process))

    def next_job(self, after: int) -> Any:
        """(whether the group is to end, the job after number `after` or None), as `Desk.next_job`."""
        self._moves += 1
        return at_desk(self._desk.next_job.remote(self.incarnation, after, IDLE_S), IDLE_S)

    def finish(self, outcome: Outcome, hold_s: float = 0.0) -> None:
        """Tells how the job ended."""
        at_desk(self._desk.finish.remote(self.incarnation, outcome, hold_s), hold_s)

    def saved(self, where: str) -> None:
        """Tells that the job waits to go on elsewhere."""
        at_desk(self._desk.saved.remote(self.incarnation, where))

    def is_asked_to_stop(self) -> bool:
        """Whether the driver wants the job to stop, asked now."""
        self._stop, self._looked = at_desk(self._desk.asked_to_stop.remote(self.incarnation)), time.monotonic()
        return self._stop

    def worker(self, world: int, run_epoch: RunEpoch | None, run: str = "") -> Worker:
        """What the job's loop is given."""

        def report(progress: Progress) -> None:
            self._moves += 1
            if self._rank == 0:
                self._stop = at_desk(self._desk.report.remote(self.incarnation, progress))

        def should_stop() -> bool:
            self._moves += 1
            if time.monotonic() - self._looked > STOP_LOOK_S:
                self.is_asked_to_stop()
            return self._stop or self.is_preempted.is_set()

        def check_lease() -> None:
            self._moves += 1
            at_desk(self._desk.check_present.remote(self.incarnation))
            if run_epoch is not None:
                run_epoch.check()

        epoch = run_epoch.number if run_epoch is not None else None
        return Worker(self._rank, world, report, should_stop, check_lease, epoch, run)

    def give_signs_of_life(self) -> None:
        """Until the rank is over, or refused. A late desk is no reason to end: the training thread tells of it."""
        while not self.is_over.wait(BEAT_EVERY_S):
            self._beats += 1
            beat = Beat(self._beats, self._moves)
            try:
                at_desk(self._desk.beat.remote(self.incarnation, self._rank, beat), deadline_s=DESK_DEADLINE_S)
            except Superseded:
                return
            except RunProblem as problem:
                log.warning("a sign of life was not heard: %s", problem)

    def watch_for_preemption(self, pending: Callable[[], Any]) -> None:
        """Asks until the rank is over, or `pending` tells of a machine that is about to be taken away.

        `pending` is `ray.train.get_preemption_info`, a collective: every rank calls it here, and here alone, so that it
        waits for nothing but the other ranks' threads.
        """
        while not self.is_over.wait(PREEMPTION_LOOK_S):
            try:
                is_pending = pending() is not None
            except Exception as error:  # noqa: BLE001 - a rank or Ray Train's own actor ended: others tell of that
                log.warning("preemption is not watched for any more: %s", error)
                return
            if is_pending:
                self.is_preempted.set()
                return


def serve(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs: jobs from the desk until it closes."""
    switch_telemetry_off()
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config["threads"])
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    logs.begin("learner", f"rank-{rank}")
    desk = config["desk"]
    own = at_desk(desk.begin_incarnation.remote()) if rank == 0 else 0
    line = Line(desk, rank, ray.train.collective.broadcast_from_rank_zero(own))
    line.enlist()
    threading.Thread(target=line.give_signs_of_life, name="signs-of-life", daemon=True).start()
    threading.Thread(
        target=line.watch_for_preemption, args=(train.get_preemption_info,), name="preemption", daemon=True
    ).start()
    try:
        _serve(line, rank, world, config["run"])
    finally:
        line.is_over.set()


def _serve(line: Line, rank: int, world: int, run_tag: str = "") -> None:
    done, failed = 0, False
    while True:
        is_over, ordered = line.next_job(done)
        if is_over:
            return
        if ordered is None:
            continue
        if failed:
            raise RuntimeError("only a new group is sound: other ranks may still wait in a collective of the last job")
        done = ordered.number
        try:
            run, job = pickle.loads(ordered.payload)
            result = run(job, line.worker(world, ordered.run_epoch, run_tag))
        except Interrupted as interruption:
            if rank == 0:
                _tell_interruption(line, ordered.number, str(interruption))
        except Superseded:
            raise
        except Exception as error:  # noqa: BLE001 - told through the desk, never run again
            problem = _portable(error)
            is_expected = isinstance(problem, UsageProblem | RunProblem)
            told = "" if is_expected else traceback.format_exc()
            # Where a rank dies, what the others run into is a broken connection, and that is not what went wrong.
            hold_s = 0.0 if is_expected or world == 1 else COMES_OF_A_DEATH_S
            line.finish(Outcome(ordered.number, problem=problem, traceback=told), hold_s)
            failed = world > 1
        else:
            if rank == 0:
                line.finish(Outcome(ordered.number, result=result))


def _tell_interruption(line: Line, number: int, where: str) -> None:
    """Asked by the driver, the job is over; for a machine's sake, it waits until Ray Train starts the group elsewhere.

    No failure is raised for that: Ray Train would count it as one, and it starts the group anew by itself.
    """
    if not line.is_asked_to_stop() and line.is_preempted.wait(2 * PREEMPTION_LOOK_S):
        line.saved(where)
    else:
        line.finish(Outcome(number, interrupted=where))


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
