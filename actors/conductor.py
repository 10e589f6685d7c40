"""The conductor of a PPO stage: who takes part, which weights are out, and what is waited for how long.

Invariants:
- A version is admitted at the stream only after every generator holds it and the probe's sequences, scored by engine
  and learner, agreed. A checksum over the buffer does not see a mapping bug; the probe does.
- Every wait has a deadline, and its error names what was awaited and who owed it. An actor that died is named at once.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from actors.episodes import version_label
from actors.failures import Problem, actor_names, expected_problem, plain_problem
from actors.generator import Work
from actors.role_reports import RoleReport, role_figures
from actors.settings import SamplingSettings
from corpus.problems import RunProblem

REPORT_PATIENCE_S = 2.0
"""Seconds that a publication waits for metrics of the actors; what has not come by then is left out."""


@dataclass(frozen=True)
class Probe:
    """Sequences, and the learner's log-probabilities, at temperature 1, of each one's tokens after the first.

    No token may be further than `bound_nats` from what an engine says of it. The engine's context must hold each
    sequence and one token more.
    """

    sequences: list[list[int]]
    logprobs: list[list[float]]
    bound_nats: float


@dataclass(frozen=True)
class Publication:
    """What came of publishing one version: seconds until it was admitted, the longest standstill of a generator, and
    the largest and the mean difference between engine and learner on the probe's tokens, over all generators. `roles`
    are metrics of generators and scoring processes since the publication before, of those that reported."""

    seconds: float
    pause_s: float
    probe_nats: float
    probe_mean_nats: float
    roles: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts that the conductor samples during PPO, and who judges them beside the reward model."""

    prompts: pa.Table
    samples: int
    seed: int
    judge: Any = None
    """A function (meta of the prompt as JSON, response) -> gold score, or None."""


@ray.remote(num_cpus=0)
class Conductor:
    """One a PPO stage."""

    def __init__(self, stream: Any, store: Any, deadline_s: float, sampling_deadline_s: float) -> None:
        """`deadline_s` is for every single answer, but for those that must wait for responses: held-out samples and
        their scores, and what generators have in hand when the stage ends. Those have `sampling_deadline_s`."""
        self._stream = stream
        self._store = store
        self._deadline_s = deadline_s
        self._sampling_deadline_s = sampling_deadline_s
        self._generators: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._work: Work | None = None
        self._failure: Problem | None = None
        self._publishing = asyncio.Lock()
        self._evaluating = asyncio.Lock()
        self._sampled_until: dict[str, float] = {}
        """By generator: when it last came to the end of held-out samples (monotonic clock); infinite under way."""
        self._reported: dict[str, dict[str, RoleReport]] = {}

    async def begin(self, generators: Mapping[str, Any], work: Work) -> None:
        """Take these generators into the stage. They lease once the first version is published."""
        self._generators = dict(generators)
        self._names = work.names() | actor_names([("the weight store", self._store), *generators.items()])
        self._work = work

    async def failed(self, name: str, problem: Problem) -> None:
        """An actor reports that it cannot go on; everyone who waits for it is told through the stream.

        `problem` must not be an error of Ray's, which Ray would raise here instead of calling this.
        """
        told = plain_problem(problem, self._names, name, "it could go on", f"{name} could not go on")
        self._failure = self._failure or told
        await self._within(self._stream.fail.remote(self._failure), "the episode stream", "take note of a failure")

    async def publish(self, attempt: int, update: int, snapshot: Any, probe: Probe) -> Publication:
        """Bring version (attempt, update) into every engine, check it, then admit its slots. `snapshot` is packed
        weights, handed on by reference. Raises RunProblem if a generator is late or disagrees with the probe.

        A generator that samples held-out prompts does nothing else until it is through: it may be later than the
        deadline by the deadline of that.
        """
        async with self._publishing:
            started = time.perf_counter()
            put = self._store.put.remote(snapshot)
            [reference] = await self._within(put, "the weight store", "take new weights")
            label = version_label(attempt, update)
            pauses = await self._from_all("load", f"load weights {label}", reference, label)
            probes = await self._from_all("probe", f"score the probe under weights {label}", probe.sequences)
            differences = {name: _differences(scored, probe.logprobs) for name, scored in probes.items()}
            for name, nats in differences.items():
                if not nats.max() <= probe.bound_nats:
                    raise RunProblem(
                        f"{name} holds weights {label} but scores the probe {nats.max():.4g} nats away from the "
                        f"learner, beyond the bound of {probe.bound_nats:g}: weights and engine do not fit together."
                    )
            admission = self._stream.advance.remote(attempt, update)
            await self._within(admission, "the episode stream", f"admit the slots of weights {label}")
            seconds = time.perf_counter() - started
        every = np.concatenate(list(differences.values()))
        # Outside the lock: a scoring process answers behind the scoring that it has in hand.
        roles = await self._roles()
        return Publication(seconds, max(pauses.values()), float(every.max()), float(every.mean()), roles)

    async def start_leasing(self) -> None:
        """Let the generators lease; called once, after the first publication."""
        await self._from_all("work", "begin to lease", self._work)

    async def evaluate(self, snapshot: Any, held_out: HeldOut, sampling: SamplingSettings) -> dict[str, float | None]:
        """Sample the held-out prompts under `snapshot` (the EMA policy) on one generator and score them.

        Returns means over samples: reward, gold (None without a judge), length in tokens, eos_rate, and kl, the
        summed log-ratio to the reference in nats a sequence.
        """
        work, patience_s = self._work, self._sampling_deadline_s
        assert work is not None
        hold = self._store.hold.remote(snapshot)
        reference = await self._within(hold, "the weight store", "take the EMA weights")
        async with self._evaluating:  # one after another: the deadline is for the samples of one
            samples = await self._sample(held_out, sampling, reference)
        prompts, responses = samples["prompt_tokens"].to_pylist(), samples["response_tokens"].to_pylist()
        rewards = work.scorers[0].score_pairs.remote(prompts, responses)
        scores = await self._within(rewards, "the reward scorer", "score the held-out responses", patience_s)
        logprobs = await self._within(
            work.references[0].logprobs_of.remote(prompts, responses, sampling.temperature),
            "the reference",
            "score the held-out responses",
            patience_s,
        )
        kl = [sum(own) - sum(its) for own, its in zip(samples["logprobs"].to_pylist(), logprobs, strict=True)]
        gold = None
        if held_out.judge is not None:
            asked = held_out.prompts.select(["prompt_id", "meta"]).to_pylist()
            meta = {row["prompt_id"]: row["meta"] for row in asked}
            pairs = zip(samples["prompt_id"].to_pylist(), samples["response"].to_pylist(), strict=True)
            gold = float(np.mean([held_out.judge(meta[prompt], response) for prompt, response in pairs]))
        return {
            "reward": float(np.mean(scores)),
            "gold": gold,
            "kl": float(np.mean(kl)),
            "length": float(np.mean([len(response) for response in responses])),
            "eos_rate": float(np.mean([reason == "stop" for reason in samples["finish_reason"].to_pylist()])),
        }

    async def _sample(self, held_out: HeldOut, sampling: SamplingSettings, reference: list[Any]) -> pa.Table:
        name, generator = next(iter(self._generators.items()))
        with self._busy_sampling(name):
            samples = generator.sample.remote(held_out.prompts, held_out.samples, sampling, held_out.seed, reference)
            return await self._within(samples, name, "sample the held-out prompts", self._sampling_deadline_s)

    @contextmanager
    def _busy_sampling(self, name: str) -> Iterator[None]:
        self._sampled_until[name] = math.inf
        try:
            yield
        finally:
            self._sampled_until[name] = time.monotonic()

    async def finish(self) -> None:
        """Let the generators stop leasing and run dry."""
        await self._from_all("rest", "finish what they have in hand", deadline_s=self._sampling_deadline_s)

    async def _roles(self) -> dict[str, float]:
        """Metrics of those actors that report in time, since the report before."""
        scoring = self._work.scoring() if self._work is not None else {}
        actors = {"generators": self._generators, "scoring": scoring}
        tasks = {
            (role, name): asyncio.ensure_future(_await(actor.report.remote()))
            for role, named in actors.items()
            for name, actor in named.items()
        }
        done, late = await asyncio.wait(tasks.values(), timeout=REPORT_PATIENCE_S)
        for task in late:
            task.cancel()
        reports: dict[str, dict[str, RoleReport]] = {}
        for (role, name), task in tasks.items():
            if task in done and task.exception() is None:
                reports.setdefault(role, {})[name] = task.result()
        figures: dict[str, float] = {}
        for role, now in reports.items():
            before = self._reported.get(role, {})
            figures |= role_figures(role, before, now)
            self._reported[role] = before | now
        return figures

    async def _from_all(
        self, method: str, what: str, *arguments: Any, deadline_s: float | None = None
    ) -> dict[str, Any]:
        """The answers of all generators by name. Raises as soon as one fails, and RunProblem where one is late; those
        that have sampled held-out prompts meanwhile may be later by the deadline of that."""
        started = time.monotonic()
        calls = {name: getattr(actor, method).remote(*arguments) for name, actor in self._generators.items()}
        tasks = {asyncio.ensure_future(self._told(call, name, what)): name for name, call in calls.items()}
        patience_s = self._deadline_s if deadline_s is None else deadline_s
        _, late = await asyncio.wait(tasks, timeout=patience_s, return_when=asyncio.FIRST_EXCEPTION)
        sampled = {task for task in late if self._sampled_until.get(tasks[task], 0.0) > started}
        if late == sampled and late and not _problems(tasks):
            await asyncio.wait(late, timeout=self._sampling_deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        waiting = [task for task in tasks if not task.done()]
        for task in waiting:
            task.cancel()
        for problem in _problems(tasks):
            raise problem
        if waiting:
            owing = ", ".join(tasks[task] for task in waiting if task not in sampled or late == sampled)
            waited_s = time.monotonic() - started
            raise RunProblem(f"After {waited_s:.0f} s these generators have yet to {what}: {owing}.")
        return {name: task.result() for task, name in tasks.items()}

    async def _within(self, call: Awaitable[Any], who: str, what: str, deadline_s: float | None = None) -> Any:
        """What `call` comes to, which `who` owes. Raises RunProblem at its deadline, or where `who` died."""
        patience_s = self._deadline_s if deadline_s is None else deadline_s
        task = asyncio.ensure_future(self._told(call, who, what))
        await asyncio.wait([task], timeout=patience_s)
        if not task.done():
            task.cancel()
            raise RunProblem(f"Waited {patience_s:.0f} s for {who} to {what} and gave up.")
        return task.result()

    async def _told(self, call: Awaitable[Any], who: str, what: str) -> Any:
        """What `call` comes to; Ray's errors are raised as the sentence that they hold, where they hold one."""
        try:
            return await call
        except RayError as error:
            problem = expected_problem(error, self._names, who, f"it could {what}")
            if problem is None:
                raise
            raise problem from error


async def _await(call: Awaitable[Any]) -> Any:
    return await call


def _problems(tasks: Iterable[asyncio.Task]) -> list[BaseException]:
    """What those tasks that have come to their end have raised."""
    ended = [task for task in tasks if task.done() and not task.cancelled()]
    return [problem for task in ended if (problem := task.exception()) is not None]


def _differences(scored: list[list[float]], logprobs: list[list[float]]) -> np.ndarray:
    """Of every token of every sequence, in nats."""
    pairs = [pair for rows in zip(scored, logprobs, strict=True) for pair in zip(*rows, strict=True)]
    return np.abs(np.array([engine - learner for engine, learner in pairs]))
