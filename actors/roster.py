"""The workers of one role: their handles, their heartbeats, and what is done where one dies.

A thin shell over `actors.fleet`, in the conductor's event loop. What a role's workers must be given before they serve
is the conductor's: `prepare` does it for every worker that has started, first ones and replacements alike.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from actors import pulse as pulses
from actors.failures import Problem, plain_problem
from actors.fleet import BudgetSpent, Fleet, State, Version
from actors.pulse import Pulse
from actors.recruits import Placement, WorkerSpec
from actors.settings import FleetSettings
from corpus.deaths import cause_of_death
from corpus.problems import RunProblem

log = logging.getLogger(__name__)

STARTS = 2
"""Starts of a worker in a row that failed for a reason which nobody foresaw, after which the run ends: it is not that
process's own, such as memory that a killed one had yet to give back."""

AGAIN = "the same command continues from what was last saved"


@dataclass
class Member:
    """One incarnation of a worker."""

    handle: Any
    incarnation: int
    own: bool = False
    """Whether the conductor made it: it then ends with the conductor."""
    pulse: Pulse | None = None
    listening: asyncio.Task | None = None


def called(name: str, incarnation: int) -> str:
    """What an incarnation of a worker calls itself: "generator-1", then "generator-1.1". No two have one name."""
    return f"{name}.{incarnation}" if incarnation else name


class Roster:
    """Workers that one spec makes. `role` is what a person calls one: "generator"."""

    def __init__(
        self,
        role: str,
        settings: FleetSettings,
        spec: WorkerSpec | None,
        prepare: Callable[[str, int], Awaitable[None]],
        lost: Callable[[str], Coroutine[Any, Any, None]] | None,
        leaves: Callable[[str], Coroutine[Any, Any, None]] | None,
        changed: Callable[[], None],
        failed: Callable[[str, Problem], Coroutine[Any, Any, None]],
    ) -> None:
        """`prepare` is given a worker (name, incarnation) that has started; `lost` is told what one that died called
        itself, before it is replaced, and `leaves` what one is called that is to go, before it ends its work; `changed`
        is called where others may serve than before; `failed` where the run cannot go on. Without a spec nothing can be
        made again."""
        self.role, self._settings, self._spec = role, settings, spec
        self._prepare, self._lost, self._leaves = prepare, lost, leaves
        self._changed, self._failed = changed, failed
        self.fleet = Fleet(
            settings.suspect_after_s,
            settings.dead_after_s,
            settings.restarts if spec is not None else 0,
            settings.restart_window_s,
        )
        self.members: dict[str, Member] = {}
        self._rooms: dict[str, Any] = {}
        """By worker: the room that was asked for it, in which every incarnation of it lives."""
        self.losses = 0
        """Workers that died or were given up so far."""
        self.closed = False
        """Nobody is replaced any more."""
        self.waiting: dict[str, str] = {}
        """Workers for which there has been no room for long, and a clause that says so."""
        self.lost: tuple[float, str] | None = None
        """When (Unix seconds) a worker was given up last, and a sentence that says which and why."""
        self._tasks: set[asyncio.Task] = set()
        self._failed_starts: dict[str, int] = {}
        """By worker: how many in a row failed for such a reason."""
        self._departures: set[asyncio.Task] = set()
        """Of those who are told that a worker was lost or leaves."""

    # who there is --------------------------------------------------------------------------------------------------

    @property
    def serving(self) -> dict[str, Any]:
        """Handles of the workers that may be given work, by name."""
        return {name: self.members[name].handle for name in self.fleet.serving}

    @property
    def living(self) -> dict[str, Any]:
        """Handles of the workers that have started and were not given up, by name."""
        return {name: self.members[name].handle for name in self.fleet.living}

    @property
    def can_make(self) -> bool:
        """Whether it is known how to make another."""
        return self._spec is not None

    def name_of(self, actor_id: str) -> str | None:
        """The worker whose present actor Ray calls `actor_id`."""
        for name, member in self.members.items():
            own = getattr(member.handle, "_actor_id", None)
            if own is not None and own.hex() == actor_id:
                return name
        return None

    def called(self, label: str) -> str | None:
        """The worker whose present incarnation calls itself `label`."""
        return next((name for name, each in self.members.items() if called(name, each.incarnation) == label), None)

    def enlist(self, name: str, handle: Any, reserved: Any = None) -> None:
        """Take in a worker that the driver has made and started, in the room that it has `reserved`, if any."""
        self.members[name] = Member(handle, self.fleet.enrol(name, time.monotonic(), started=True))
        if reserved is not None:
            self._rooms[name] = reserved

    def add(self, name: str) -> None:
        """Make one worker more, in the background."""
        assert self._spec is not None
        incarnation = self.fleet.enrol(name, time.monotonic(), started=False)
        self._begin(self._recruit(name, incarnation))

    # health --------------------------------------------------------------------------------------------------------

    def look(self, excused_s: float = 0.0) -> None:
        """Ask every worker for a heartbeat, and give up those that have been silent for too long. `excused_s` are
        seconds for which the caller itself did not listen."""
        if excused_s > 0:
            self.fleet.excuse(excused_s)
        before = self.fleet.serving
        for name in self.fleet.silent(time.monotonic()):
            silence_s = time.monotonic() - self.fleet[name].answered_at
            self.give_up(name, self.members[name].incarnation, f"it has been silent for {silence_s:.0f} s")
        if self.fleet.serving != before:
            self._changed()
        for name in self.fleet.living:
            member = self.members[name]
            if member.listening is None or member.listening.done():
                member.listening = self._begin(self._listen(name, member))

    async def _listen(self, name: str, member: Member) -> None:
        try:
            pulse: Pulse = await member.handle.heartbeat.remote()
        except ActorUnavailableError:  # it may be back, and counts as silent until it is
            return
        except RayActorError as error:
            self.give_up(name, member.incarnation, cause_of_death(error))
            return
        except RayError as error:  # its heartbeat is a few lines of ours
            self.give_up(name, member.incarnation, f"its heartbeat failed ({type(error).__name__})")
            return
        member.pulse = pulse
        before = self.fleet[name].state
        self.fleet.answered(name, member.incarnation, time.monotonic())
        if pulse.stalled_s > self._settings.stall_after_s:
            self.give_up(name, member.incarnation, f"what it is at has stood still for {pulse.stalled_s:.0f} s")
        elif self.fleet[name].state is not before:
            self._changed()

    def refit(self, name: str, incarnation: int, version: Version) -> bool:
        """It holds `version`, checked; returns whether it serves now."""
        serves = self.fleet.refit(name, incarnation, version, time.monotonic())
        self._changed()
        return serves

    def give_up(self, name: str, incarnation: int, why: str) -> None:
        """Declare a worker dead: `why` it is follows its name, as a clause. It is killed and replaced."""
        if not self.fleet.died(name, incarnation):
            return
        self.losses += 1
        log.warning("%s is given up: %s", name, why)
        self.lost = time.time(), f"{name} was given up: {why}."
        member = self.members.get(name)
        departure: asyncio.Task | None = None
        if member is not None:  # else there has been no process of it yet
            pulses.kill(member.handle, member.pulse)
            departure = self._depart(self._lost, called(name, member.incarnation)) if not self.closed else None
        self._changed()
        if not self.closed:
            self._begin(self._replace(name, why, departure))

    def _depart(self, told: Callable[[str], Coroutine[Any, Any, None]] | None, label: str) -> asyncio.Task | None:
        """Begins to tell what a worker that serves no longer calls itself."""
        if told is None:
            return None
        departure = self._begin(told(label))
        self._departures.add(departure)
        departure.add_done_callback(self._departures.discard)
        return departure

    async def departed(self) -> None:
        """Returns once whoever must know has been told of every worker that serves no longer. Each of these calls has a
        deadline of its own, and one that fails ends the run."""
        while self._departures:  # another may have begun to leave meanwhile
            await asyncio.wait(self._departures)

    async def _replace(self, name: str, why: str, departure: asyncio.Task | None) -> None:
        if departure is not None:
            await asyncio.wait([departure])
        if self.closed or self.fleet[name].state is not State.DEAD:
            return
        try:
            incarnation = self.fleet.restart(name, time.monotonic())
        except BudgetSpent:
            await self._failed(name, RunProblem(self._spent(name, why), "fleet/restarts-spent"))
            return
        await self._recruit(name, incarnation)

    def _spent(self, name: str, why: str) -> str:
        if self._spec is None:
            return f"{name} was lost ({why}), and nothing is known of how to make another; {AGAIN}."
        budget, window_s = self._settings.restarts, self._settings.restart_window_s
        return (
            f"{name} was lost ({why}), and the {budget} restarts of a {self.role} that {window_s:g} s allow "
            f"(fleet.restarts) are spent; {AGAIN}."
        )

    async def _recruit(self, name: str, incarnation: int) -> None:
        """Make a worker and bring it to where it serves."""
        spec = self._spec
        assert spec is not None
        member: Member | None = None
        try:
            reserved = await self._room(spec.placement, name, incarnation) if spec.placement is not None else None
            if not self._wanted(name, incarnation):
                self._give_back(name)
                return
            member = Member(spec.make(called(name, incarnation), reserved), incarnation, own=True)
            self.members[name] = member
            async with asyncio.timeout(self._settings.start_deadline_s):
                for call in spec.start:
                    await call.on(member.handle)
            if self.fleet.started(name, incarnation, time.monotonic()):
                await self._prepare(name, incarnation)
            self._failed_starts.pop(name, None)
        except TimeoutError:
            self.give_up(name, incarnation, f"it was not ready after {self._settings.start_deadline_s:.0f} s")
        except RayActorError as error:
            self.give_up(name, incarnation, cause_of_death(error))
        except Exception as error:  # noqa: BLE001 - told to whoever waits for the run
            told = plain_problem(error, {}, name, "it was ready", f"{name} could not be made")
            if not isinstance(getattr(error, "cause", None) or error, RunProblem):
                self._failed_starts[name] = self._failed_starts.get(name, 0) + 1
            if self._failed_starts.get(name, 0) < STARTS:
                self.give_up(name, incarnation, str(told).rstrip("."))
            else:
                await self._failed(name, told)
        finally:
            if member is not None and not self._wanted(name, incarnation):
                pulses.kill(member.handle, member.pulse)

    def _wanted(self, name: str, incarnation: int) -> bool:
        worker = self.fleet[name]
        given_up = worker.state in (State.DEAD, State.RETIRED)
        return worker.incarnation == incarnation and not given_up and not self.closed

    async def _room(self, placement: Placement, name: str, incarnation: int) -> Any:
        """Room for a worker, which may be long in coming: others go on, and the run says what it waits for."""
        if name not in self._rooms:
            self._rooms[name] = placement.reserve(name)
        reserved = self._rooms[name]
        waited_s, patience_s = 0.0, self._settings.placement_deadline_s
        while not await asyncio.to_thread(placement.wait, reserved, min(1.0, patience_s)):
            waited_s += min(1.0, patience_s)
            if waited_s >= patience_s and name not in self.waiting:
                self.waiting[name] = f"{name} waits for a bundle of {placement.says()}, which the cluster has not free"
                log.warning("%s (after %.0f s).", self.waiting[name], waited_s)
            if not self._wanted(name, incarnation):
                break
        self.waiting.pop(name, None)
        return reserved

    def _give_back(self, name: str) -> None:
        """The room of a worker that is not wanted any more."""
        reserved = self._rooms.pop(name, None)
        if self._spec is not None and self._spec.placement is not None and reserved is not None:
            self._spec.placement.release(reserved)

    # leaving -------------------------------------------------------------------------------------------------------

    async def retire(self, name: str, leave: Callable[[], Awaitable[Any]] | None) -> None:
        """A worker that is not wanted any more: it serves no longer at once, goes once it has come to the end of
        `leave`, and gives its room back."""
        self.fleet.retire(name)
        self._changed()
        member = self.members.get(name)
        if member is None:
            return
        if leave is not None:
            departure = self._depart(self._leaves, called(name, member.incarnation))
            if departure is not None:
                await asyncio.wait([departure])
            try:
                await leave()
            except Exception as error:  # noqa: BLE001 - what it had in hand is given to others
                log.warning("%s did not finish what it had in hand: %s", name, error)
        if self._lost is not None:
            await self._lost(called(name, member.incarnation))
        pulses.kill(member.handle, member.pulse)
        self._give_back(name)

    def close(self) -> None:
        """From now on nobody is replaced; replacements that are not ready yet are ended."""
        self.closed = True
        for name in self.fleet.names([State.RESTARTING]):
            member = self.members.get(name)
            if member is not None and member.incarnation == self.fleet[name].incarnation:
                pulses.kill(member.handle, member.pulse)
            self.fleet.retire(name)

    def leave(self) -> None:
        """After `close`: ends whoever has a room here and was not made by the driver, or is dead, and gives the rooms
        back, also those that were waited for. Ray keeps the placement groups of an actor for as long as its job goes
        on, and later stages need the room."""
        driven = {name for name in self.fleet.living if not self.members[name].own}
        for name in [name for name in self._rooms if name not in driven]:
            self.fleet.retire(name)
            member = self.members.get(name)
            if member is not None:
                pulses.kill(member.handle, member.pulse)
            self._give_back(name)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # else it might be collected before its end
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:  # a mistake of ours: whoever waits for the run must be told
            told = plain_problem(problem, {}, f"a {self.role}", "it was looked after", f"the {self.role}s' health")
            self._begin(self._failed(f"a {self.role}", told))
