"""The conductor of a PPO stage: who takes part, which weights are out, and what is waited for how long.

Invariants:
- A version is admitted at the stream only after every generator that serves holds it and the probe's sequences, scored
  by engine and learner, agreed. A checksum over the buffer does not see a mapping bug; the probe does.
- What a generator writes under a version is delivered once its own probe of that version agreed.
- Before a version is admitted, nothing is leased any more to a generator that was given up or is to leave: it has not
  got it, and could write slots of it with older weights.
- Whoever joins, or comes back from the dead, loads the newest version and passes its probe before it leases.
- Every wait has a deadline, and its error names what was awaited and who owed it. An actor that died is named at once.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from actors.calls import of_each, within
from actors.exported_metrics import (
    PUBLICATION_BEGUN,
    PUBLICATION_FAILURES,
    PUBLICATION_LOSSES,
    PUBLICATION_SECONDS,
    PUBLICATION_UPDATE,
    PUBLICATIONS,
)
from actors.failures import (
    Problem,
    WorkerBroke,
    actor_names,
    broken_worker,
    dead_actor,
    plain_problem,
    worker_broke,
)
from actors.generator import ScoringPools, Work
from actors.held_out import HeldOut, held_out_means
from actors.publication import Probe, Publication, Published
from actors.role_reports import peak_bytes
from actors.roster import called
from actors.settings import FleetSettings, SamplingSettings
from actors.stage_fleet import REPORT_PATIENCE_S, Fellowship, StageFleet
from actors.telemetry import Telemetry
from corpus import logs
from corpus.problems import UNEXPECTED, RunProblem, UsageProblem

__all__ = ["Conductor", "Fellowship", "HeldOut", "Probe", "Publication"]

log = logging.getLogger(__name__)

EVALUATION_TRIES = 3
"""Actors that one held-out evaluation may lose before it is given up."""

DISAGREEMENTS = 2
"""Refits in a row, the second by a fresh process, after which a generator that disagrees with the learner, or fails in
the loading, ends the run: weights and engine do not fit together."""


class _GivenUp(Exception):
    """A generator is given up: `reason` is "late" or "dead"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@ray.remote(num_cpus=0)
class Conductor:
    """One a PPO stage."""

    def __init__(
        self,
        stream: Any,
        store: Any,
        deadline_s: float,
        sampling_deadline_s: float,
        settings: FleetSettings | None = None,
        directory: str | None = None,
        run: str = "",
    ) -> None:
        """`deadline_s` is for every single answer, but for those that must wait for responses: held-out samples and
        their scores, and what generators have in hand when the stage ends. Those have `sampling_deadline_s`. The wish
        for more or fewer generators is read from the stage's `directory`. `run` is the run's tag in exported
        metrics."""
        logs.begin("conductor")
        self._telemetry = Telemetry(run, "conductor")
        self._stream = stream
        self._store = store
        self._deadline_s = deadline_s
        self._sampling_deadline_s = sampling_deadline_s
        self._settings = settings or FleetSettings()
        self._directory = Path(directory) if directory is not None else None
        self._taken_in: StageFleet | None = None
        self._work: Work | None = None
        self._publishing = asyncio.Lock()
        self._refitting = asyncio.Lock()
        """Held by whoever loads weights into generators: nobody joins in the midst of a publication."""
        self._present: Published | None = None
        self._driver_memory: dict[str, float] = {}
        self._evaluating = asyncio.Lock()
        self._sampled_until: dict[str, float] = {}
        """By generator: when it last came to the end of held-out samples (monotonic clock); infinite under way."""
        self._lent: set[tuple[str, int]] = set()
        """Generators (name, incarnation) that were given the stage's work."""

    @property
    def _fleet(self) -> StageFleet:
        assert self._taken_in is not None, "the stage has begun"
        return self._taken_in

    async def begin(self, generators: Mapping[str, Any], work: Work, fellowship: Fellowship | None = None) -> None:
        """Take these generators into the stage. They lease once the first version is published."""
        self._work = work
        self._taken_in = StageFleet(
            self._settings,
            fellowship or Fellowship(),
            generators,
            work,
            actor_names([("the weight store", self._store)]),
            self._directory,
            self._refit_one,
            self.failed,
            self._sampling_deadline_s,
            self._telemetry,
        )

    async def failed(self, name: str, problem: Problem) -> None:
        """An actor reports that it cannot go on; everyone who waits for it is told through the stream.

        `problem` must not be an error of Ray's, which Ray would raise here instead of calling this.
        """
        told = plain_problem(problem, self._fleet.names(), name, "it could go on", f"{name} could not go on")
        failure = self._fleet.failure = self._fleet.failure or told
        self._fleet.notify()
        await self._within(self._stream.fail.remote(failure), "the episode stream", "take note of a failure")

    async def hear_of_driver(self, memory_bytes: int) -> None:
        """The driver says how much memory it has had at most."""
        self._driver_memory = {"memory/driver_bytes": float(memory_bytes)}

    async def broke(self, name: str, problem: Problem) -> None:
        """A worker that calls itself `name` has failed for a reason that another process may not meet: it is
        replaced."""
        why = f"it {problem.did}" if isinstance(problem, WorkerBroke) else str(problem).rstrip(".")
        for roster in self._fleet.rosters():
            own = roster.called(name)
            if own is not None:
                roster.give_up(own, roster.members[own].incarnation, why)

    # publication ---------------------------------------------------------------------------------------------------

    async def publish(
        self, attempt: int, update: int, snapshot: Any, probe: Probe, offer: dict[str, Any] | None = None
    ) -> Publication:
        """Bring version (attempt, update) into every engine, check it, then admit its slots. `snapshot` is packed
        weights, handed on by reference; `offer` is how engines receive them from the learner's GPU, where they do.

        A generator that dies or is late is given up, and the others go on; without any that holds the version, its
        replacement is waited for. Raises RunProblem where a later version is out (no engine gets this one then), where
        all disagree with the probe, or nobody serves in time. A generator that samples held-out prompts does nothing
        else until it is through: it may be later than the deadline by the deadline of that.
        """
        async with self._publishing:
            self._refuse_older(attempt, update)
            started = time.perf_counter()
            logs.note_attempt(attempt)
            with self._exported(update):
                async with self._refitting:
                    put = self._store.put.remote(snapshot)
                    [reference] = await self._within(put, "the weight store", "take new weights")
                    present = self._present = Published((attempt, update), probe)
                    await self._refit(list(self._fleet.generators.living), present, reference, offer)
                await self._fleet.until(lambda: bool(present.fits), f"a generator to hold weights {present.label}")
                await self._fleet.generators.departed()
                admission = self._stream.advance.remote(attempt, update)
                await self._within(admission, "the episode stream", f"admit the slots of weights {present.label}")
                self._fleet.generators.fleet.admit(present.version)
            seconds = time.perf_counter() - started
            self._telemetry.observe(PUBLICATION_SECONDS, seconds)
        # Outside the lock: a scoring process answers behind the scoring that it has in hand.
        roles = await self._fleet.reports()
        stored = await of_each({"weight store": self._store.figures.remote()}, REPORT_PATIENCE_S)
        await self._fleet.tell_workers(attempt, update, seconds)
        memory = self._driver_memory | {"memory/conductor_bytes": float(peak_bytes())}
        return present.outcome(seconds, roles | self._fleet.figures() | memory | stored.found.get("weight store", {}))

    def _refuse_older(self, attempt: int, update: int) -> None:
        present = self._present.version if self._present is not None else None
        if present is not None and (attempt, update) < present:
            raise RunProblem(
                f"Weights {update} of attempt {attempt} were to be published, but weights {present[1]} of attempt "
                f"{present[0]} are out.",
                "episodes/order",
            )

    @contextmanager
    def _exported(self, update: int) -> Iterator[None]:
        """Around a publication: exports that it is under way, and what came of it."""
        self._telemetry.set(PUBLICATION_BEGUN, time.time())
        try:
            yield
        except Exception:
            self._telemetry.add(PUBLICATION_FAILURES)
            raise
        else:
            self._telemetry.add(PUBLICATIONS)
            self._telemetry.set(PUBLICATION_UPDATE, update)
        finally:
            self._telemetry.set(PUBLICATION_BEGUN, 0.0)

    async def _refit(
        self, names: list[str], present: Published, reference: Any, offer: dict[str, Any] | None = None
    ) -> None:
        """Load the version into these generators and probe them; those that take it serve. `_refitting` is held.

        Raises RunProblem where weights and engines do not fit together.
        """
        weights = (reference, present.label) if offer is None else (reference, present.label, offer)
        incarnations = self._incarnations(names)
        problems = await self._of_all(incarnations, lambda name, number: self._fit(name, number, present, weights))
        self._telemetry.add(PUBLICATION_LOSSES, len(problems), reason="refused")
        for name, problem in problems.items():
            again = self._fleet.generators.fleet.strayed(name, incarnations[name])
            # What nobody foresaw, such as a GPU without memory, may be this process's own: another is tried.
            fits_nowhere = not present.fits and problem.code != UNEXPECTED
            if fits_nowhere or again >= DISAGREEMENTS:
                raise problem
            self._fleet.generators.give_up(name, incarnations[name], str(problem).rstrip("."))

    async def _fit(self, name: str, incarnation: int, present: Published, weights: tuple[Any, ...]) -> None:
        """Load the version into a generator, probe it, and let it serve where it agrees, wherever the others are: what
        it writes meanwhile is held until then. Raises RunProblem where it does not agree."""
        try:
            pause_s = await self._owed(name, incarnation, f"load weights {present.label}", "load", *weights)
            what = f"score the probe under weights {present.label}"
            scored = await self._owed(name, incarnation, what, "probe", present.probe.sequences)
            if not present.note(name, pause_s, scored):
                raise RunProblem(present.refused[name], "fleet/refused")
            what = f"deliver what weights {present.label} write"
            await self._owed(name, incarnation, what, "confirm", present.label)
        except _GivenUp as lost:
            self._telemetry.add(PUBLICATION_LOSSES, reason=lost.reason)
            return
        if self._fleet.leases:
            await self._lend(name, incarnation)
        self._fleet.generators.refit(name, incarnation, present.version)

    async def _lend(self, name: str, incarnation: int) -> None:
        """Give a generator the stage's work, unless it has got it."""
        if (name, incarnation) not in self._lent:
            await self._owed(name, incarnation, "begin to lease", "work", self._work)
            self._lent.add((name, incarnation))

    async def _refit_one(self, name: str, incarnation: int) -> None:
        """Bring a generator that has started to where it serves: with the weight store's newest version, unless there
        is none yet and the first publication will."""
        async with self._refitting:
            present = self._present
            if present is None or name not in self._fleet.generators.living:
                return
            try:
                newest = self._store.newest.remote()
                found = await self._within(newest, "the weight store", "hand out its newest weights")
                if found is None or tuple(found[0]) != present.version:
                    raise RunProblem(
                        f"The weight store no longer has weights {present.label}, which {name} is to load.",
                        "publication/lost",
                    )
                await self._refit([name], present, found[1][0])
            except RunProblem as problem:  # not this generator's alone: another one would meet it too
                await self.failed(name, problem)

    async def start_leasing(self) -> None:
        """Let the generators lease; called once, after the first publication."""
        async with self._refitting:
            self._fleet.leases = True
            for problem in (await self._of_all(self._incarnations(self._fleet.generators.living), self._lend)).values():
                raise problem
        self._fleet.changed()

    # held-out prompts ------------------------------------------------------------------------------------------------

    async def evaluate(self, snapshot: Any, held_out: HeldOut, sampling: SamplingSettings) -> dict[str, float | None]:
        """Sample the held-out prompts under `snapshot` (the EMA policy) on one generator and score them.

        Returns means over samples: reward, gold (None without a judge), length in tokens, eos_rate, and kl, the
        summed log-ratio to the reference in nats a sequence. An actor that dies under way, or breaks, has its part done
        by another.
        """
        hold = self._store.hold.remote(snapshot)
        reference = await self._within(hold, "the weight store", "take the EMA weights")
        async with self._evaluating:  # one after another: the deadline is for the samples of one
            samples = await self._survived(lambda: self._sample(held_out, sampling, reference))
        prompts, responses = samples["prompt_tokens"].to_pylist(), samples["response_tokens"].to_pylist()
        what, patience_s = "score the held-out responses", self._sampling_deadline_s

        async def rewards() -> list[float]:
            scorer = (await self.scoring_pools()).scorers[0]
            return await self._within(
                scorer.score_pairs.remote(prompts, responses), "the reward scorer", what, patience_s
            )

        async def logprobs() -> list[list[float]]:
            reference = (await self.scoring_pools()).references[0]
            call = reference.logprobs_of.remote(prompts, responses, sampling.temperature)
            return await self._within(call, "the reference", what, patience_s)

        return held_out_means(held_out, samples, await self._survived(rewards), await self._survived(logprobs))

    async def _sample(self, held_out: HeldOut, sampling: SamplingSettings, reference: list[Any]) -> pa.Table:
        await self._fleet.until(lambda: bool(self._fleet.able()), "a generator to serve")
        name, generator = next(iter(self._fleet.able().items()))
        label = called(name, self._fleet.generators.members[name].incarnation)
        with self._busy_sampling(name):
            samples = generator.sample.remote(held_out.prompts, held_out.samples, sampling, held_out.seed, reference)
            try:
                return await self._within(samples, name, "sample the held-out prompts", self._sampling_deadline_s)
            except RayError as error:  # what nobody foresaw
                raise worker_broke(label, "sampled held-out prompts", error) from error

    async def _survived(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """What `attempt` comes to, which is made again where an actor dies of it or beside it, or breaks."""
        for _ in range(EVALUATION_TRIES - 1):
            try:
                return await attempt()
            except RunProblem as problem:
                cause = problem if problem.__cause__ is None or isinstance(problem, WorkerBroke) else problem.__cause__
                died, broke = dead_actor(cause), broken_worker(cause)
                if died is None and broke is None:
                    raise
                log.warning("an evaluation is made again: %s", problem)
                if broke is not None:
                    await self.broke(broke.who, broke)
                if died is not None:
                    await self._fleet.note_death(died)
        return await attempt()

    @contextmanager
    def _busy_sampling(self, name: str) -> Iterator[None]:
        self._sampled_until[name] = math.inf
        try:
            yield
        finally:
            self._sampled_until[name] = time.monotonic()

    # scoring ---------------------------------------------------------------------------------------------------------

    async def scoring_pools(self, died: str | None = None, broke: WorkerBroke | None = None) -> ScoringPools:
        """The scoring processes that serve, once there are enough of them. `died` is Ray's id of one that the caller
        found dead, empty where it does not know which; `broke` what one told that broke. Raises RunProblem where there
        are none in time."""
        if died is not None:
            await self._fleet.note_death(died)
        if broke is not None:
            await self.broke(broke.who, broke)
        await self._fleet.until(lambda: self._fleet.pools() is not None, "a reward scorer and a reference to serve")
        pools = self._fleet.pools()
        assert pools is not None
        return pools

    # the end ---------------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """Let the generators stop leasing and run dry. Nobody is replaced any more; one that is late is given up."""
        async with self._refitting:
            self._fleet.leases = False
            for roster in self._fleet.rosters():
                roster.close()
            problems = await self._of_all(self._incarnations(self._fleet.generators.living), self._rest)
            for problem in problems.values():
                raise problem

    async def _rest(self, name: str, incarnation: int) -> None:
        what = "finish what it has in hand"
        await self._owed(name, incarnation, what, "rest", deadline_s=self._sampling_deadline_s)

    async def survivors(self) -> list[str]:
        """At the end of the stage, after `finish`: names of the workers that the driver has made and that still live.
        Whoever was made here ends, and gives its room back."""
        for roster in self._fleet.rosters():
            roster.leave()
        return [
            name for roster in self._fleet.rosters() for name in roster.fleet.living if not roster.members[name].own
        ]

    # waiting -------------------------------------------------------------------------------------------------------

    def _incarnations(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self._fleet.generators.members[name].incarnation for name in names}

    async def _of_all(
        self, generators: Mapping[str, int], one: Callable[[str, int], Awaitable[None]]
    ) -> dict[str, Problem]:
        """Has `one` done with each of these (name, incarnation) at the same time; returns the problems of those that
        have one. Who is given up has none. Raises what is a mistake of ours, once all are through."""
        found = await asyncio.gather(*(one(*each) for each in generators.items()), return_exceptions=True)
        problems: dict[str, Problem] = {}
        for name, problem in zip(generators, found, strict=True):
            if isinstance(problem, UsageProblem | RunProblem):
                problems[name] = problem
            elif problem is not None and not isinstance(problem, _GivenUp):
                raise problem
        return problems

    async def _owed(
        self, name: str, incarnation: int, what: str, method: str, *arguments: Any, deadline_s: float | None = None
    ) -> Any:
        """What a generator answers. One that has sampled held-out prompts meanwhile may be later by the deadline of
        that. Raises _GivenUp where it was late or died, and is given up; what it raised in a form that a person
        understands."""
        started, member = time.monotonic(), self._fleet.generators.members[name]
        if member.incarnation != incarnation:
            raise _GivenUp("dead")
        call = getattr(member.handle, method).remote(*arguments)
        answers = await of_each(
            {name: call},
            self._deadline_s if deadline_s is None else deadline_s,
            lambda name: self._sampled_until.get(name, 0.0) > started,
            self._sampling_deadline_s,
        )
        if name in answers.found:
            return answers.found[name]
        if name in answers.late:
            why = f"after {answers.seconds:.0f} s it had yet to {what}"
            self._fleet.generators.give_up(name, incarnation, why)
            raise _GivenUp("late")
        error = answers.raised[name]
        problem = plain_problem(error, self._fleet.names(), name, f"it could {what}", f"{name} could not {what}")
        if dead_actor(error) is None:
            raise problem from error
        self._fleet.generators.give_up(name, incarnation, str(problem).partition(";")[0])
        raise _GivenUp("dead") from error

    async def _within(self, call: Awaitable[Any], who: str, what: str, deadline_s: float | None = None) -> Any:
        """What `call` comes to, which `who` owes. Raises RunProblem at its deadline, or where `who` died."""
        return await within(
            call, self._fleet.names(), who, what, self._deadline_s if deadline_s is None else deadline_s
        )
