"""How a train loop talks to whoever runs it (a Ray Train worker, a test), without knowing who that is."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


class Interrupted(Exception):
    """The loop was asked to stop, has written a checkpoint and can be continued from it."""


@dataclass(frozen=True)
class Progress:
    """How far a stage has come: `done` of `total` in `unit`s, with the figures worth showing beside it."""

    stage: str
    done: int
    total: int
    unit: str
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Worker:
    """One rank of a learner group.

    `report` is called on every rank at least every two seconds of training. `should_stop` is this rank's own wish;
    loops ask `agreed_to_stop`, which all ranks answer alike.
    """

    rank: int
    world_size: int
    report: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    check_lease: Callable[[], None] = lambda: None
    """Called on rank 0 before it commits anything (a checkpoint, an export). Raises RunProblem where another attempt at
    the run has taken over; without a lease it checks nothing."""
    run_epoch: int | None = None
    """The number of the run's holder for whom it writes (see `corpus.run_epoch`); None without a lease."""
    run: str = ""
    """The run's tag in exported metrics."""

    def agreed_to_stop(self) -> bool:
        """Whether any rank was asked to stop. A collective: every rank calls it at the same step boundary."""
        from learners.process_group import any_rank  # late: it imports torch, which only ranks need

        return any_rank(self.should_stop())


class Reporter:
    """Reports of one stage's progress, at most one a second but for those that are due `now`."""

    def __init__(self, worker: Worker, stage: str, total: int, unit: str) -> None:
        self._worker, self._stage, self._total, self._unit = worker, stage, total, unit
        self._last = 0.0

    def report(self, done: int, values: dict[str, float] | None = None, now: bool = False) -> None:
        """Passes on how much is done, if the last report was a second ago or this one is due `now`."""
        if now or time.monotonic() - self._last > 1.0:
            self._last = time.monotonic()
            self._worker.report(Progress(self._stage, done, self._total, self._unit, dict(values or {})))
