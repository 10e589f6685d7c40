"""The workers of a PPO stage, of every role: who serves, what the others are told of it, and how many are wanted.

A part of the conductor, in its event loop. Which weights are out is not its concern.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from actors.calls import of_each, within
from actors.desired import Desired, read_desired, write_fleet
from actors.exported_metrics import FLEET_LOSSES, FLEET_WANTED, FLEET_WORKERS, PROCESS_MEMORY
from actors.failures import Problem, actor_names, plain_problem
from actors.fleet import FROZEN, LIVING, State, share_of
from actors.generator import ScoringPools, Work
from actors.pulse import resident_bytes
from actors.recruits import WorkerSpec
from actors.role_reports import RoleReport, role_figures
from actors.roster import AGAIN, Roster, called
from actors.settings import FleetSettings
from actors.telemetry import Telemetry
from actors.worker_rows import WorkerRow, rates, write_workers
from corpus.problems import RunProblem

log = logging.getLogger(__name__)

REPORT_PATIENCE_S = 2.0
"""Seconds that a publication waits for metrics of the actors; what has not come by then is left out."""


@dataclass(frozen=True)
class Fellowship:
    """How the workers of a stage are made again, the room that the first generators have, by name, and the slots that
    can be admitted at once. A spec is None where that worker cannot be made again."""

    generators: WorkerSpec | None = None
    scorers: WorkerSpec | None = None
    references: WorkerSpec | None = None
    reserved: Mapping[str, Any] | None = None
    admissible: int | None = None


SECOND_LOOK_S = 0.5
"""Seconds until those that score are looked at again where one died and Ray does not say which."""

CALLED = {"scoring process": "reward scorer and reference"}
"""What a role is called where its failure is told, if not as itself."""

TAGGED = {"reward scorer": "reward_scorer", "scoring process": "scoring"}
"""The tag `role` of a role in exported metrics, where it is not what the role is called."""

WANTED = (*LIVING, State.DEAD, State.RESTARTING)


class StageFleet:
    """Generators and scoring processes of one stage."""

    def __init__(
        self,
        settings: FleetSettings,
        fellowship: Fellowship,
        generators: Mapping[str, Any],
        work: Work,
        others: Mapping[str, str],
        directory: Path | None,
        refit: Callable[[str, int], Awaitable[None]],
        failed: Callable[[str, Problem], Coroutine[Any, Any, None]],
        rest_deadline_s: float,
        telemetry: Telemetry | None = None,
    ) -> None:
        """`others` are what to call actors that are none of these, by Ray's id. `refit` brings a generator (name,
        incarnation) that has started to where it serves; `failed` is told where the run cannot go on. The wish for more
        or fewer generators is read from `directory`. What a generator has in hand when it is retired, and the stream's
        answers, are waited for `rest_deadline_s`. `telemetry` exports for the run."""
        self._telemetry = telemetry or Telemetry("", "conductor")
        self._exports: dict[str, Telemetry] = {}
        """By role."""
        self.failure: Problem | None = None
        """Why the run cannot go on; whoever waits here is told."""
        self.leases = False
        """Whether generators have the stage's work, and are to hear of their share and of who scores."""
        self._settings, self._fellowship, self._work, self._others = settings, fellowship, work, others
        self._directory, self._failed, self._rest_deadline_s = directory, failed, rest_deadline_s
        self._changed = asyncio.Event()
        self._short_since: dict[str, float] = {}
        self._wish: Desired | None = None
        self._said: dict[str, Any] = {}
        self._told: dict[tuple[str, int], Any] = {}
        self._will_tell = False
        self._suspended: list[str] = []
        """Generators of which the stream was told last that they are suspected."""
        self._suspending: asyncio.Task | None = None
        self._reported: dict[str, dict[str, RoleReport]] = {}
        self._rates: dict[str, dict[str, Any]] = {}
        """By worker: what it did between its last two reports."""
        self._tasks: set[asyncio.Task] = set()
        self.generators = self._roster("generator", fellowship.generators, refit, self._release, self._exclude)
        for name, handle in generators.items():
            self.generators.enlist(name, handle, (fellowship.reserved or {}).get(name))
        self.scoring: dict[str, Roster] = {}
        """By role; one roster for both where they are fused."""
        self._enlist_scoring(work)
        self._begin(self._watch())
        self._begin(self._follow_wishes())

    def _roster(self, role: str, spec: WorkerSpec | None, prepare: Any, lost: Any = None, leaves: Any = None) -> Roster:
        return Roster(role, self._settings, spec, prepare, lost, leaves, self.changed, self._failed)

    def _enlist_scoring(self, work: Work) -> None:
        specs = self._fellowship
        pools = {"reward scorer": (work.scorers, specs.scorers), "reference": (work.references, specs.references)}
        if any(each in work.references for each in work.scorers):
            pools = {"scoring process": (work.scorers, specs.scorers)}
        names = {handle: name for name, handle in work.scoring().items()}
        for role, (handles, spec) in pools.items():
            roster = self.scoring[role] = self._roster(role, spec, self._serve_at_once)
            for handle in handles:
                roster.enlist(names[handle], handle)
                roster.fleet.refit(names[handle], 0, FROZEN, time.monotonic())

    async def _serve_at_once(self, name: str, incarnation: int) -> None:
        """A scoring process has loaded all that it scores with before this."""
        roster = next(each for each in self.scoring.values() if name in each.members)
        roster.refit(name, incarnation, FROZEN)

    # who there is --------------------------------------------------------------------------------------------------

    def rosters(self) -> list[Roster]:
        """Of all roles."""
        return [self.generators, *self.scoring.values()]

    def names(self) -> dict[str, str]:
        """What to call actors, by Ray's id."""
        names = dict(self._others) | actor_names([("the episode stream", self._work.stream)])
        for roster in self.rosters():
            prefix = "" if roster is self.generators else f"{CALLED.get(roster.role, roster.role)} "
            names |= actor_names([(f"{prefix}{name}", member.handle) for name, member in roster.members.items()])
        return names

    def able(self) -> dict[str, Any]:
        """Generators that can sample under weights that come with the call: before the first publication all that
        live, then those that serve."""
        return self.generators.living if self.generators.fleet.admitted is None else self.generators.serving

    def pools(self) -> ScoringPools | None:
        """The scoring processes that serve; None where a role has nobody who does."""
        serving = {role: list(roster.serving.values()) for role, roster in self.scoring.items()}
        scorers = serving.get("reward scorer", serving.get("scoring process", []))
        references = serving.get("reference", serving.get("scoring process", []))
        if not scorers or not references:
            return None
        return ScoringPools(scorers, references, self.names())

    # health and number ---------------------------------------------------------------------------------------------

    async def note_death(self, actor_id: str) -> None:
        """An actor, by Ray's id, was found dead; where the id is empty, or nobody's, time passes."""
        for roster in self.rosters():
            name = roster.name_of(actor_id)
            if name is not None:
                roster.give_up(name, roster.members[name].incarnation, "its process was killed or crashed")
                return
        await asyncio.sleep(SECOND_LOOK_S)  # whoever it was is found by its heartbeat, or has been replaced already

    async def _release(self, name: str) -> None:
        """What a generator that is gone has leased is leased to others."""
        call, what = self._work.stream.release.remote(name), f"take back the leases of {name}"
        await within(call, self.names(), "the episode stream", what, self._rest_deadline_s)

    async def _exclude(self, name: str) -> None:
        """A generator that is to leave is leased nothing more."""
        call, what = self._work.stream.exclude.remote(name), f"lease nothing more to {name}"
        await within(call, self.names(), "the episode stream", what, self._rest_deadline_s)

    def changed(self) -> None:
        """Whoever waits looks again, and generators hear of their share and of who scores.

        They hear it once, of however many changes that come together: a publication changes every generator's state.
        """
        self.notify()
        if not self._will_tell:
            self._will_tell = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._will_tell = False
        if self._suspending is None and self._suspects() != self._suspended:
            self._suspending = self._begin(self._suspend())
        work, pools = self._work, self.pools()
        if not self.leases or pools is None:
            return
        serving = self.generators.serving
        admissible = self._fellowship.admissible
        share = work.share if admissible is None else share_of(admissible, len(serving), work.chunk_size)
        told = (share, tuple(map(id, pools.scorers)), tuple(map(id, pools.references)))
        for name, handle in serving.items():
            key = (name, self.generators.members[name].incarnation)
            if self._told.get(key) != told:
                self._told[key] = told
                handle.adjust.remote(share, pools)

    def _suspects(self) -> list[str]:
        generators = self.generators
        return [called(name, generators.members[name].incarnation) for name in generators.fleet.names([State.SUSPECT])]

    async def _suspend(self) -> None:
        """The stream leases nothing to generators that are suspected. One call at a time: the last one counts."""
        while (suspects := self._suspects()) != self._suspended:
            call, what = self._work.stream.suspend.remote(suspects), "lease nothing to generators that are silent"
            await within(call, self.names(), "the episode stream", what, self._rest_deadline_s)
            self._suspended = suspects
        self._suspending = None

    def notify(self) -> None:
        """Whoever waits looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Until `holds`. Raises the first failure of the run, and RunProblem where it takes too long."""
        patience_s = self._settings.minimum_deadline_s
        give_up = time.monotonic() + patience_s
        while not holds():
            if self.failure is not None:
                raise self.failure
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), max(give_up - time.monotonic(), 0.0))
            except TimeoutError:
                raise RunProblem(
                    f"Waited {patience_s:.0f} s for {what}; {self._state_of_fleet()}; {AGAIN}.", "run/no-answer"
                ) from None

    async def _watch(self) -> None:
        """Hearts are listened to, and too small a fleet is told of."""
        listened_at = time.monotonic()
        while not self.generators.closed:
            await asyncio.sleep(self._settings.heartbeat_s)
            away_s = time.monotonic() - listened_at - self._settings.heartbeat_s
            listened_at = time.monotonic()
            for roster in self.rosters():
                roster.look(away_s if away_s > self._settings.heartbeat_s else 0.0)
            if not self.generators.closed:
                await self._check_minimum()
                self._export()

    async def _check_minimum(self) -> None:
        now, settings = time.monotonic(), self._settings
        smallest = {
            "generator": settings.min_generators,
            "reward scorer": settings.min_scorers,
            "reference": settings.min_references,
            "scoring process": max(settings.min_scorers, settings.min_references),
        }
        for roster in self.rosters():
            able = self.able() if roster is self.generators else roster.serving
            wanted = smallest[roster.role]
            if len(able) >= wanted:
                self._short_since.pop(roster.role, None)
                continue
            short_s = now - self._short_since.setdefault(roster.role, now)
            if short_s > settings.minimum_deadline_s and self.failure is None:
                await self._failed(
                    roster.role,
                    RunProblem(
                        f"Of at least {wanted} {roster.role}{'s' if wanted > 1 else ''} only {len(able)} served for "
                        f"{short_s:.0f} s; {self._state_of_fleet()}; {AGAIN}.",
                        "fleet/too-few",
                    ),
                )

    def _state_of_fleet(self) -> str:
        """Every worker and its state, for a person; why one waits for room."""
        states = [
            f"{name} is {roster.fleet[name].state}" for roster in self.rosters() for name in roster.fleet.names(State)
        ]
        return "; ".join([", ".join(states), *self.generators.waiting.values()])

    async def _follow_wishes(self) -> None:
        """Apart from `_watch`: a disk that does not answer holds up nobody's health."""
        while self._directory is not None and not self.generators.closed:
            await asyncio.sleep(self._settings.heartbeat_s)
            if not self.generators.closed:
                await self._follow_wish(self._directory)

    async def _follow_wish(self, directory: Path) -> None:
        """Start or retire generators as the stage's desired.json says, and say how far that is."""
        problem = ""
        try:
            wish = await asyncio.to_thread(read_desired, directory)
        except RunProblem as error:
            wish, problem = self._wish, str(error)
        if self.generators.closed:
            return
        self._wish = wish
        if wish is not None and self.generators.can_make:
            self._reconcile(max(wish.generators, self._settings.min_generators))
        says = {
            "counter": wish.counter if wish is not None else 0,
            "workers": {name: each.fleet[name].state for each in self.rosters() for name in each.fleet.names(WANTED)},
            "waiting": list(self.generators.waiting.values()),
            "lost": max((each.lost for each in self.rosters() if each.lost is not None), default=None),
            "problem": problem,
        }
        if says != self._said:
            try:
                await asyncio.to_thread(write_fleet, directory, says)
            except OSError as error:  # it is for watching alone; said again at the next look
                log.warning("how far the fleet is could not be written: %s", error)
            else:
                self._said = says

    def _reconcile(self, wanted: int) -> None:
        fleet = self.generators.fleet
        present = fleet.names(WANTED)
        for name in present[wanted:]:
            leave = partial(self._rest, name) if name in fleet.living else None
            self._begin(self.generators.retire(name, leave))
        ever = set(fleet.names(State))
        free = (name for number in count() if (name := f"generator-{number}") not in ever)
        for _ in range(wanted - len(present)):
            self.generators.add(next(free))

    async def _rest(self, name: str) -> None:
        """A generator that is to leave finishes what it has in hand."""
        what, rest = "finish what it has in hand", self.generators.members[name].handle.rest.remote()
        await within(rest, self.names(), name, what, self._rest_deadline_s)

    # metrics -------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """How many of each role serve, are suspected or are being made again, and restarts since the stage began."""
        figures = {"fleet/generators_serving": float(len(self.generators.serving))}
        pools = {role: len(roster.serving) for role, roster in self.scoring.items()}
        figures["fleet/scorers_serving"] = float(pools.get("reward scorer", pools.get("scoring process", 0)))
        figures["fleet/references_serving"] = float(pools.get("reference", pools.get("scoring process", 0)))
        for state in (State.SUSPECT, State.STALE, State.DEAD, State.RESTARTING):
            figures[f"fleet/{state}"] = float(sum(len(roster.fleet.names([state])) for roster in self.rosters()))
        figures["fleet/restarts"] = float(sum(roster.fleet.restarts for roster in self.rosters()))
        return figures

    def _export(self) -> None:
        """Exports how many workers of each role there are, by state, how many are wanted, and how many were lost; and
        the memory of this process."""
        self._telemetry.set(PROCESS_MEMORY, resident_bytes())
        for roster in self.rosters():
            role = self._exports.setdefault(roster.role, self._telemetry.of(TAGGED.get(roster.role, roster.role)))
            for state in State:
                role.set(FLEET_WORKERS, len(roster.fleet.names([state])), state=state)
            role.set(FLEET_WANTED, len(roster.fleet.names(WANTED)))
            role.count_to(FLEET_LOSSES, roster.losses)

    async def reports(self) -> dict[str, float]:
        """Metrics of those actors that report in time, since the report before."""
        scoring = {name: handle for roster in self.scoring.values() for name, handle in roster.living.items()}
        actors = {"generators": self.generators.living, "scoring": scoring}
        calls = {(role, name): actor.report.remote() for role, named in actors.items() for name, actor in named.items()}
        answers = await of_each(calls, REPORT_PATIENCE_S)
        reports: dict[str, dict[str, RoleReport]] = {}
        for (role, name), report in answers.found.items():
            reports.setdefault(role, {})[name] = report
        figures: dict[str, float] = {}
        for role, now in reports.items():
            before = self._reported.get(role, {})
            figures |= role_figures(role, before, now)
            self._rates |= {name: rates(before.get(name), report) for name, report in now.items()}
            self._reported[role] = before | now
        return figures

    async def tell_workers(self, attempt: int, update: int, publish_seconds: float) -> None:
        """Write down how every worker is, for people to watch, at the publication of version (attempt, update)."""
        if self._directory is None:
            return
        rows = [self._row(roster, name) for roster in self.rosters() for name in roster.fleet.names(WANTED)]
        try:
            await asyncio.to_thread(write_workers, self._directory, attempt, update, publish_seconds, rows)
        except OSError as error:  # it is for watching alone: training goes on without
            log.warning("how the workers are could not be written: %s", error)

    def _row(self, roster: Roster, name: str) -> WorkerRow:
        health = roster.fleet[name]
        holds = health.holds if roster is self.generators else None
        version = {"attempt": holds[0] if holds else None, "update": holds[1] if holds else None}
        measured = self._rates.get(name, {}) if health.state in LIVING else {}
        return WorkerRow(name, roster.role, str(health.state), health.incarnation, **version, **measured)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # else it might be collected before its end
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:  # whoever waits for the run must be told
            self._begin(
                self._failed(
                    "the conductor",
                    plain_problem(problem, self.names(), "an actor", "it was told", "the conductor failed"),
                )
            )
