"""The conductor of a PPO stage: who takes part, which weights are out, and what is waited for how long.

Invariants:
- A version is admitted at the stream only after every generator holds it and one probe sequence, scored by engine and
  learner, agreed. A checksum over the buffer does not see a mapping bug; the probe does.
- Every wait has a deadline, and its error names what was awaited and who owed it.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayActorError

from actors.episodes import version_label
from actors.generator import Work
from actors.role_reports import RoleReport, role_figures
from actors.settings import SamplingSettings
from corpus.problems import RunProblem


@dataclass(frozen=True)
class Probe:
    """A sequence and the learner's log-probabilities, at temperature 1, of its tokens after the first."""

    tokens: list[int]
    logprobs: list[float]
    bound_nats: float


@dataclass(frozen=True)
class Publication:
    """What came of publishing one version: seconds until all generators held it, the longest standstill of one, and
    the largest difference between engine and learner on the probe. `roles` are metrics of generators and scoring
    processes since the publication before."""

    seconds: float
    pause_s: float
    probe_nats: float
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

    def __init__(self, stream: Any, store: Any, deadline_s: float) -> None:
        self._stream = stream
        self._store = store
        self._deadline_s = deadline_s
        self._generators: dict[str, Any] = {}
        self._work: Work | None = None
        self._failure: RunProblem | None = None
        self._publishing = asyncio.Lock()
        self._reported: dict[str, dict[str, RoleReport]] = {}

    async def begin(self, generators: Mapping[str, Any], work: Work) -> None:
        """Take these generators into the stage. They lease once the first version is published."""
        self._generators = dict(generators)
        self._work = work

    async def failed(self, name: str, problem: BaseException) -> None:
        """An actor reports that it cannot go on; everyone who waits for it is told through the stream."""
        told = problem if isinstance(problem, RunProblem) else RunProblem(f"{name} could not go on: {problem}")
        self._failure = self._failure or told
        await self._stream.fail.remote(self._failure)

    async def publish(self, attempt: int, update: int, snapshot: Any, probe: Probe) -> Publication:
        """Bring version (attempt, update) into every engine, check it, then admit its slots. `snapshot` is packed
        weights, handed on by reference. Raises RunProblem if a generator is late or disagrees with the probe."""
        async with self._publishing:
            started = time.perf_counter()
            [reference] = await self._within(self._store.put.remote(snapshot), "the weight store to take new weights")
            label = version_label(attempt, update)
            pauses = await self._from_all("load", f"load weights {label}", reference, label)
            probes = await self._from_all("probe", f"score the probe under weights {label}", probe.tokens)
            differences = {
                name: float(np.abs(np.subtract(scored, probe.logprobs)).max()) for name, scored in probes.items()
            }
            for name, nats in differences.items():
                if not nats <= probe.bound_nats:
                    raise RunProblem(
                        f"{name} holds weights {label} but scores the probe {nats:.4g} nats away from the learner, "
                        f"beyond the bound of {probe.bound_nats:g}: weights and engine do not fit together."
                    )
            await self._stream.advance.remote(attempt, update)
            seconds = time.perf_counter() - started
            return Publication(seconds, max(pauses.values()), max(differences.values()), await self._roles())

    async def start_leasing(self) -> None:
        """Let the generators lease; called once, after the first publication."""
        await self._from_all("work", "begin to lease", self._work)

    async def evaluate(self, snapshot: Any, held_out: HeldOut, sampling: SamplingSettings) -> dict[str, float | None]:
        """Sample the held-out prompts under `snapshot` (the EMA policy) on one generator and score them.

        Returns means over samples: reward, gold (None without a judge), length in tokens, eos_rate, and kl, the
        summed log-ratio to the reference in nats a sequence.
        """
        work = self._work
        assert work is not None
        name, generator = next(iter(self._generators.items()))
        reference = await self._within(self._store.hold.remote(snapshot), "the weight store to take the EMA weights")
        samples: pa.Table = await self._within(
            generator.sample.remote(held_out.prompts, held_out.samples, sampling, held_out.seed, reference),
            f"{name} to sample the held-out prompts",
        )
        prompts, responses = samples["prompt_tokens"].to_pylist(), samples["response_tokens"].to_pylist()
        scores = await self._within(work.scorers[0].score_pairs.remote(prompts, responses), "the held-out rewards")
        logprobs = await self._within(
            work.references[0].logprobs_of.remote(prompts, responses, sampling.temperature), "the held-out reference"
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

    async def finish(self) -> None:
        """Let the generators stop leasing and run dry."""
        await self._from_all("rest", "finish what they have in hand")

    async def _roles(self) -> dict[str, float]:
        work = self._work
        assert work is not None
        processes = dict.fromkeys([*work.scorers, *work.references])  # fused ones are in both lists
        answers = await self._within(asyncio.gather(*(each.report.remote() for each in processes)), "scoring reports")
        reports = {
            "generators": await self._from_all("report", "report"),
            "scoring": {f"scoring-{number}": report for number, report in enumerate(answers)},
        }
        before, self._reported = self._reported, reports
        figures: dict[str, float] = {}
        for role, now in reports.items():
            figures |= role_figures(role, before.get(role, {}), now)
        return figures

    async def _from_all(self, method: str, what: str, *arguments: Any) -> dict[str, Any]:
        calls = {name: getattr(actor, method).remote(*arguments) for name, actor in self._generators.items()}
        tasks = {name: asyncio.ensure_future(_await(call)) for name, call in calls.items()}
        _, late = await asyncio.wait(tasks.values(), timeout=self._deadline_s)
        if late:
            owing = ", ".join(name for name, task in tasks.items() if task in late)
            raise RunProblem(f"After {self._deadline_s:.0f} s these generators have yet to {what}: {owing}.")
        for name, task in tasks.items():
            if isinstance(task.exception(), RayActorError):
                raise RunProblem(f"{name} died before it could {what}.") from task.exception()
        return {name: task.result() for name, task in tasks.items()}

    async def _within(self, call: Awaitable[Any], what: str) -> Any:
        try:
            return await asyncio.wait_for(_await(call), self._deadline_s)
        except TimeoutError as error:
            raise RunProblem(f"Waited {self._deadline_s:.0f} s for {what} and gave up.") from error


async def _await(call: Awaitable[Any]) -> Any:
    return await call
