"""Who of a role may serve: a pure state machine of each worker's health, with a budget of restarts for all of them.

Invariants, whatever comes in whatever order:
- A worker serves only if this incarnation of it was refit, to weights no older than the version that is admitted.
- Nothing that an older incarnation says changes anything.
- In no window of time are there more restarts than the budget.
- A retired worker stays retired.

Times are seconds of one monotonic clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

Version = tuple[int, int]
"""(attempt, update); whatever is loaded once and never changes has FROZEN."""

FROZEN: Version = (0, 0)


class State(StrEnum):
    """Of one worker."""

    HEALTHY = "healthy"
    """It answers and holds the weights that it should: it serves, and no other state does."""
    SUSPECT = "suspect"
    """It has been silent for a while."""
    STALE = "stale"
    """It answers, but its weights are not those it should hold."""
    DEAD = "dead"
    RESTARTING = "restarting"
    RETIRED = "retired"


LIVING = frozenset({State.HEALTHY, State.SUSPECT, State.STALE})
"""A process that has started and was not given up."""


class BudgetSpent(Exception):
    """A worker may not be restarted: there were as many restarts within the window as there may be."""


@dataclass(frozen=True)
class Health:
    """What is known of one worker. `incarnation` grows with every restart; `disagreements` are refits in a row, over
    incarnations, after which its weights were found wrong."""

    state: State
    incarnation: int
    answered_at: float
    holds: Version | None = None
    disagreements: int = 0


class Fleet:
    """The workers of one role, by name."""

    def __init__(self, suspect_after_s: float, dead_after_s: float, restarts: int, window_s: float) -> None:
        """Silence makes a worker suspect after `suspect_after_s` and dead after `dead_after_s`; `restarts` are allowed
        in any `window_s`."""
        self._suspect_after_s, self._dead_after_s = suspect_after_s, dead_after_s
        self._budget, self._window_s = restarts, window_s
        self._workers: dict[str, Health] = {}
        self._restarted_at: list[float] = []
        self.admitted: Version | None = None
        """The oldest version with which a worker may serve; None until there is one."""

    def __getitem__(self, name: str) -> Health:
        return self._workers[name]

    def names(self, states: Iterable[State]) -> list[str]:
        """Workers in one of `states`, in the order in which they were enrolled."""
        wanted = frozenset(states)
        return [name for name, each in self._workers.items() if each.state in wanted]

    @property
    def serving(self) -> list[str]:
        """Workers that may be given work."""
        return self.names([State.HEALTHY])

    @property
    def living(self) -> list[str]:
        """Workers that have started and were not given up."""
        return self.names(LIVING)

    @property
    def restarts(self) -> int:
        """Restarts so far, of all workers."""
        return len(self._restarted_at)

    # events --------------------------------------------------------------------------------------------------------

    def enrol(self, name: str, now: float, started: bool) -> int:
        """A new worker, which has `started` or is to; returns its incarnation. A name is never used again."""
        if name in self._workers:
            raise ValueError(f"{name} is enrolled already")
        self._workers[name] = Health(State.STALE if started else State.RESTARTING, 0, now)
        return 0

    def answered(self, name: str, incarnation: int, now: float) -> None:
        """It said something."""
        worker = self._of(name, incarnation)
        if worker is None or worker.state not in LIVING:
            return
        state = worker.state
        if state is State.SUSPECT:
            state = State.HEALTHY if self._is_current(worker.holds) else State.STALE
        self._workers[name] = replace(worker, state=state, answered_at=now)

    def silent(self, now: float) -> list[str]:
        """The time is `now`: makes suspect who has been silent for long, and returns who has been for too long and is
        to be declared dead."""
        overdue = []
        for name in self.living:
            worker = self._workers[name]
            silence_s = now - worker.answered_at
            if silence_s > self._dead_after_s:
                overdue.append(name)
            elif silence_s > self._suspect_after_s:
                self._workers[name] = replace(worker, state=State.SUSPECT)
        return overdue

    def excuse(self, seconds: float) -> None:
        """Whoever listens was away for `seconds`: nobody's silence counts for that long."""
        for name in self.living:
            worker = self._workers[name]
            self._workers[name] = replace(worker, answered_at=worker.answered_at + seconds)

    def died(self, name: str, incarnation: int) -> bool:
        """It died or was given up; returns whether that is news."""
        worker = self._of(name, incarnation)
        if worker is None or worker.state in (State.DEAD, State.RETIRED):
            return False
        self._workers[name] = replace(worker, state=State.DEAD, holds=None)
        return True

    def may_restart(self, now: float) -> bool:
        """Whether the budget allows one more restart."""
        return sum(at > now - self._window_s for at in self._restarted_at) < self._budget

    def restart(self, name: str, now: float) -> int:
        """A dead worker is made again; returns its new incarnation. Raises BudgetSpent."""
        worker = self._workers[name]
        if worker.state is not State.DEAD:
            raise ValueError(f"{name} is {worker.state}, and only what is dead is restarted")
        if not self.may_restart(now):
            raise BudgetSpent
        self._restarted_at.append(now)
        fresh = Health(State.RESTARTING, worker.incarnation + 1, now, None, worker.disagreements)
        self._workers[name] = fresh
        return fresh.incarnation

    def started(self, name: str, incarnation: int, now: float) -> bool:
        """It is ready to be refit; returns whether it is still wanted."""
        worker = self._of(name, incarnation)
        if worker is None or worker.state is not State.RESTARTING:
            return False
        self._workers[name] = replace(worker, state=State.STALE, answered_at=now)
        return True

    def refit(self, name: str, incarnation: int, version: Version, now: float) -> bool:
        """It holds `version`, checked; returns whether it serves now."""
        worker = self._of(name, incarnation)
        if worker is None or worker.state not in LIVING:
            return False
        state = State.HEALTHY if self._is_current(version) else State.STALE
        self._workers[name] = replace(worker, state=state, holds=version, answered_at=now, disagreements=0)
        return state is State.HEALTHY

    def strayed(self, name: str, incarnation: int) -> int:
        """What it holds was found wrong; returns how many times in a row."""
        worker = self._of(name, incarnation)
        if worker is None or worker.state not in LIVING:
            return 0
        worker = replace(worker, state=State.STALE, holds=None, disagreements=worker.disagreements + 1)
        self._workers[name] = worker
        return worker.disagreements

    def admit(self, version: Version) -> None:
        """Work for `version` is given out from now on: whoever holds an older one does not serve."""
        self.admitted = version
        for name in self.names([State.HEALTHY, State.SUSPECT]):
            worker = self._workers[name]
            if not self._is_current(worker.holds):
                self._workers[name] = replace(worker, state=State.STALE)

    def retire(self, name: str) -> None:
        """It is not wanted any more."""
        self._workers[name] = replace(self._workers[name], state=State.RETIRED, holds=None)

    def _of(self, name: str, incarnation: int) -> Health | None:
        worker = self._workers.get(name)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def _is_current(self, version: Version | None) -> bool:
        return version is not None and (self.admitted is None or version >= self.admitted)


def share_of(admissible: int, generators: int, chunk_size: int) -> int:
    """Slots that one of `generators` may hold at once: its part of all that can be admitted, in whole chunks."""
    part = -(-admissible // max(generators, 1))
    return -(-part // chunk_size) * chunk_size
