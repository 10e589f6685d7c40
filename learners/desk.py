"""The desk between driver and ranks: jobs, progress, outcomes, signs of life, and which incarnation counts.

Ray Train starts all ranks anew when one dies: the next incarnation. The desk numbers them, and refuses whatever an
earlier one still says: a rank that was thought dead and lives on learns it there before it commits anything.
"""

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from corpus import logs
from corpus.deaths import death, is_death
from corpus.problems import RunProblem
from corpus.run_epoch import RunEpoch
from learners.worker import Progress

DESK_DEADLINE_S = 120.0
"""Seconds in which the desk answers a call. It only passes things on, but its process has to start among all others."""


PROGRESS_KEPT = 64
"""Reports of progress, the newest, that wait for a driver which does not look."""


class Superseded(RunProblem):
    """A rank whose group was started anew meanwhile: it may not report or commit any more."""


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


@dataclass(frozen=True)
class Process:
    """Where a rank runs: its node (Ray's id) and process. `started_ticks` tells it from a later one of that number."""

    node: str
    pid: int
    started_ticks: str


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life: how many there were, and how often its job has come by to report or to ask."""

    count: int = 0
    moves: int = 0


@dataclass(frozen=True)
class Loss:
    """An incarnation that was lost: why, by rank, as the end of a sentence that begins with "rank 0"."""

    incarnation: int
    causes: dict[int, str]
    is_counted: bool = True
    """Whether it is one of the restarts that the group has; a machine that was taken away is none."""


@dataclass(frozen=True)
class News:
    """What the driver is told at each look. `progress`, `losses` and `notes` are those since the last one."""

    progress: list[Progress]
    outcome: Outcome | None
    incarnation: int
    """Number of the present incarnation, from 1; 0 before there is one."""
    processes: dict[int, Process]
    """Ranks of the present incarnation that are ready; none once it is lost."""
    beats: dict[int, Beat]
    losses: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@ray.remote(num_cpus=0)
class Desk:
    """Between driver and ranks. Coroutines of one event loop.

    Methods that take an `incarnation` raise Superseded where it is not the present one.
    """

    def __init__(self) -> None:
        logs.begin("desk")
        self._job: Ordered | None = None
        self._closed = False
        self._stop = False
        self._progress: deque[Progress] = deque(maxlen=PROGRESS_KEPT)
        self._outcome: Outcome | None = None
        self._outcome_of = 0
        self._held: Outcome | None = None
        self._saved_at = ""
        self._incarnation = 0
        self._is_lost = False
        self._processes: dict[int, Process] = {}
        self._beats: dict[int, Beat] = {}
        self._losses: list[Loss] = []
        self._notes: list[str] = []
        self._controller: Any = None
        self._changed = asyncio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # for the driver ------------------------------------------------------------------------------------------------

    async def order(self, job: Ordered) -> None:
        """The driver's next job."""
        self._job, self._outcome, self._held, self._stop, self._saved_at = job, None, None, False, ""
        self._notify()

    async def news(self, wait_s: float) -> News:
        """What is new. Waits up to `wait_s` for the outcome."""
        if self._outcome is None and wait_s > 0:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), wait_s)
        news = News(
            list(self._progress),
            self._outcome,
            self._incarnation,
            dict(self._processes),
            dict(self._beats),
            self._losses,
            self._notes,
        )
        self._progress.clear()
        self._losses, self._notes = [], []
        return news

    async def stop_job(self) -> None:
        """Ask the present job to stop after a checkpoint. Where it waits for its restart with one, it stops at once."""
        self._stop = True
        if self._saved_at and self._job is not None and self._outcome is None:
            self._decide(Outcome(self._job.number, interrupted=self._saved_at))

    async def close(self) -> None:
        """Let the ranks leave once their job is done."""
        self._closed = True
        self._stop = True
        self._notify()

    async def controller(self) -> Any:
        """The actor in which Ray Train leads the group; None before it has begun."""
        return self._controller

    # for Ray Train --------------------------------------------------------------------------------------

    async def controlled_by(self, controller: Any) -> None:
        """Ray Train has begun, in this actor."""
        self._controller = self._controller or controller

    async def lost(self, causes: dict[int, str], are_deaths: bool, is_counted: bool = True) -> None:
        """Ranks of the present incarnation failed, so that Ray Train gives it up; `causes` as in Loss.

        What its ranks have found out since one of them died comes of that death, and is no outcome of the job.
        """
        self._is_lost = True
        self._processes, self._beats = {}, {}
        self._losses.append(Loss(self._incarnation, causes, is_counted))
        if are_deaths:
            self._held = None
        self._notify()

    # for the ranks -------------------------------------------------------------------------------------------------

    def _refuse_earlier(self, incarnation: int) -> None:
        if incarnation != self._incarnation:
            raise Superseded(
                f"These learners were started anew meanwhile: incarnation {incarnation} stops here and writes nothing "
                f"more, {self._incarnation} goes on.",
                "learners/superseded",
            )

    async def begin_incarnation(self) -> int:
        """A new incarnation's number; called by its rank 0. From now on the one before is refused."""
        self._incarnation += 1
        self._is_lost = False
        self._processes, self._beats = {}, {}
        self._progress.clear()
        self._held, self._saved_at = None, ""
        self._notify()
        return self._incarnation

    async def enlist(self, incarnation: int, rank: int, process: Process) -> None:
        """A rank is ready for jobs."""
        self._refuse_earlier(incarnation)
        if not self._is_lost:
            self._processes[rank], self._beats[rank] = process, Beat()
            self._notify()

    async def beat(self, incarnation: int, rank: int, beat: Beat) -> None:
        """A rank's sign of life."""
        self._refuse_earlier(incarnation)
        if not self._is_lost:
            self._beats[rank] = beat

    async def check_present(self, incarnation: int) -> None:
        """Returns where the incarnation is the present one: asked before every commit."""
        self._refuse_earlier(incarnation)

    async def next_job(self, incarnation: int, after: int, wait_s: float) -> tuple[bool, Ordered | None]:
        """Whether the group is to end, and the job after number `after`, if there is one within `wait_s`.

        A job that ended in an earlier incarnation is not handed out again.
        """
        deadline = time.monotonic() + wait_s
        while True:
            self._refuse_earlier(incarnation)
            if self._closed or self._is_due(incarnation, after):
                return self._closed, self._job
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                return False, None

    def _is_due(self, incarnation: int, after: int) -> bool:
        is_open = self._outcome is None or self._outcome_of == incarnation
        return self._job is not None and self._job.number > after and is_open

    async def report(self, incarnation: int, progress: Progress) -> bool:
        """Rank 0's progress; returns whether the job is asked to stop."""
        self._refuse_earlier(incarnation)
        self._progress.append(progress)
        return self._stop

    async def asked_to_stop(self, incarnation: int) -> bool:
        """Whether the job is asked to stop."""
        self._refuse_earlier(incarnation)
        return self._stop

    async def finish(self, incarnation: int, outcome: Outcome, hold_s: float = 0.0) -> None:
        """How the present job ended; the first outcome counts.

        With `hold_s` it counts only if no rank is found dead within so many seconds.
        """
        self._refuse_earlier(incarnation)
        if self._outcome is not None or self._job is None or outcome.number != self._job.number:
            return
        if hold_s <= 0:
            self._decide(outcome)
        elif self._held is None and not self._is_lost:
            self._held = outcome
            await asyncio.sleep(hold_s)
            if self._held is outcome and self._outcome is None:
                self._decide(outcome)

    async def saved(self, incarnation: int, where: str) -> None:
        """The job has saved its state because its machine is about to be taken away, and waits to be started anew."""
        self._refuse_earlier(incarnation)
        self._saved_at = where
        self._notes.append(f"learners saved at {where}: their machine is about to be taken away; they go on elsewhere")
        if self._stop:
            await self.stop_job()

    def _decide(self, outcome: Outcome) -> None:
        self._outcome, self._outcome_of, self._held = outcome, self._incarnation, None
        self._notify()


def at_desk(call: Any, wait_s: float = 0.0, deadline_s: float | None = None) -> Any:
    """What the desk answers to a call that waits there for up to `wait_s`. Raises RunProblem where it is late or dead,
    Superseded where it refuses the caller.

    The deadline is DESK_DEADLINE_S where none is given.
    """
    deadline_s = wait_s + (DESK_DEADLINE_S if deadline_s is None else deadline_s)
    try:
        return ray.get(call, timeout=deadline_s)
    except GetTimeoutError:
        raise RunProblem(
            f"Waited {deadline_s:.0f} s for the learners' desk, the actor between command and learners, to answer; the "
            "same command continues from what was last saved.",
            "run/no-answer",
        ) from None
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Superseded):
            raise cause from None
        if is_death(error):
            raise death(error, "The learners' desk") from error
        raise
