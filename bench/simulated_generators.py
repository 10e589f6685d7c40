"""Generators without engines, many to a process, and what stands in for scoring.

A simulated generator does what a real one does with the control plane: it loads what is published, is probed, leases
chunks while it has room, and has what it has written scored and accepted. It only waits where the engine would work.
"""

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import ray
import torch

from actors.delivery import ScoringPools, Work
from actors.episodes import Chunk
from actors.failures import plain_problem
from actors.generator import LEASE_WAIT_S
from actors.open_chunks import OpenChunk, chunks_to_lease
from actors.publication import Probe
from actors.pulse import Pulse, pulse_now
from actors.role_reports import RoleReport, report_now
from actors.rollout_engine import Completion, VersionSpan
from models.snapshot import Snapshot, pack, unpack

CHUNKS_HELD = 2
"""By one generator at most: the one that it writes, and the next, so that a lease costs it no time unless it takes
longer than a chunk."""

RESPONSE_TOKENS = 32
WEIGHTS = 1 << 18
"""Floats of the network that is published: 1 MiB."""

PROBE_SEQUENCES, PROBE_TOKENS = 4, 64


def snapshot_of(update: int) -> Snapshot:
    """Weights of `update`, other ones than those before and after it."""
    return pack({"weight": torch.full((WEIGHTS,), logprob_of(update))}, (0, update))


def probe_of(update: int) -> Probe:
    """What the learner says of the probe under the weights of `update`."""
    sequences = [[row + 1] * PROBE_TOKENS for row in range(PROBE_SEQUENCES)]
    return Probe(sequences, [[logprob_of(update)] * (PROBE_TOKENS - 1) for _ in sequences], 1e-6)


def logprob_of(update: int) -> float:
    """Of any token, in nats, under the weights of `update`: a float32, so that engine and learner say the same."""
    return -1.0 - (update % 64) / 64


def chunk_seconds(mean_s: float, seed: str) -> Iterator[float]:
    """Times to write one chunk after another: uniform between half and one and a half of `mean_s`, in pairs that make
    two of it, so that a few chunks already have that mean."""
    drawn = random.Random(seed)
    while True:
        first = drawn.uniform(0.5, 1.5)
        yield first * mean_s
        yield (2.0 - first) * mean_s


@dataclass
class Observed:
    """What the generators of one process have seen between two looks at them, `seconds` apart: how long each call
    took that came back, episodes accepted, and of the chunks that were written the drawn and the real seconds."""

    seconds: float = 0.0
    lease_s: list[float] = field(default_factory=list)
    accept_s: list[float] = field(default_factory=list)
    episodes: int = 0
    drawn_s: float = 0.0
    written_s: float = 0.0

    def and_then(self, later: "Observed") -> "Observed":
        """What was seen from the look before this one to that of `later`, the next."""
        return Observed(*(getattr(self, each.name) + getattr(later, each.name) for each in fields(Observed)))


@dataclass(frozen=True)
class Seat:
    """The handle of one generator among several in a process, as the conductor uses handles of actors."""

    host: Any
    name: str

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):  # it is no actor with an id of its own
            raise AttributeError(method)
        return Bound(getattr(self.host, method), self.name)


@dataclass(frozen=True)
class Bound:
    """A method of a `Seat`."""

    method: Any
    name: str

    def remote(self, *arguments: Any) -> Any:
        """Begins the call; returns the reference to its answer."""
        return self.method.remote(self.name, *arguments)


class SimulatedGenerator:
    """One of several in a process, all in one event loop."""

    def __init__(self, name: str, chunk_mean_s: float) -> None:
        self.name = name
        self.observed = Observed()
        self.accepted = 0
        """Episodes since it began."""
        self.busy_s = 0.0
        self.tokens = 0
        self.share = 0
        self.pools = ScoringPools([], [])
        self._seconds = chunk_seconds(chunk_mean_s, name)
        self._label = ""
        self._logprob = 0.0
        self._held = 0
        """Slots that are leased and not written."""
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._room, self._resting = asyncio.Event(), asyncio.Event()
        self._at_work: asyncio.Task[None] | None = None

    def load(self, snapshot: Snapshot, label: str) -> float:
        """Takes on weights, between two chunks; returns the seconds it took."""
        began = time.perf_counter()
        [(_, weight)] = unpack(snapshot)
        self._label, self._logprob = label, float(weight[0])
        return time.perf_counter() - began

    def probe(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probabilities, under the weights that it has, of each sequence's tokens after the first."""
        return [[self._logprob] * (len(tokens) - 1) for tokens in sequences]

    def begin(self, work: Work) -> None:
        """Take part, until `rest`."""
        self.share, self.pools = work.share, ScoringPools(work.scorers, work.references)
        self._at_work = asyncio.ensure_future(self._run(work))

    async def rest(self) -> None:
        """Returns once all that it holds is written and accepted."""
        self._resting.set()
        self._room.set()
        if self._at_work is not None:
            await self._at_work

    async def _run(self, work: Work) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lease(work))
                while (chunk := await self._chunks.get()) is not None:
                    rows = await self._write(chunk, work)
                    group.create_task(self._deliver(chunk, rows, work))
        except* Exception as problems:  # noqa: BLE001 - whoever waits for the run must be told
            aim, doing = f"{self.name} was through", f"{self.name} failed"
            told = plain_problem(problems.exceptions[0], work.names(), "an actor", aim, doing)
            await work.conductor.failed.remote(self.name, told)

    async def _lease(self, work: Work) -> None:
        rest = asyncio.ensure_future(self._resting.wait())
        while not rest.done():
            wanted = chunks_to_lease(self._held, self._held, work.chunk_size, self.share, CHUNKS_HELD * work.chunk_size)
            if wanted == 0:
                await self._room.wait()
                self._room.clear()
                continue
            began = time.perf_counter()
            lease = asyncio.ensure_future(_answer(work.stream.lease.remote(self.name, wanted, LEASE_WAIT_S)))
            await asyncio.wait({lease, rest}, return_when=asyncio.FIRST_COMPLETED)
            if not lease.done():  # the stage is over: nobody writes what it is given yet
                lease.cancel()
                break
            chunks: list[Chunk] | None = lease.result()
            if chunks is None:
                break
            if chunks:
                self.observed.lease_s.append(time.perf_counter() - began)
            for chunk in chunks:
                self._held += len(chunk.slots)
                self._chunks.put_nowait(chunk)
        self._chunks.put_nowait(None)

    async def _write(self, chunk: Chunk, work: Work) -> pa.RecordBatch:
        began, drawn_s, label, logprob = time.perf_counter(), next(self._seconds), self._label, self._logprob
        await asyncio.sleep(drawn_s)
        tokens, logprobs = [7] * RESPONSE_TOKENS, [logprob] * RESPONSE_TOKENS
        span = VersionSpan(label, 0, RESPONSE_TOKENS)
        written = OpenChunk(chunk)
        for slot, key in zip(chunk.slots, written.keys(), strict=True):
            written.done[slot.index] = Completion(key, tokens, logprobs, "length", [span])
        written.generated_at = time.time()
        rows = written.episodes(work.run, work.round_number, self.name)
        took_s = time.perf_counter() - began
        self.observed.drawn_s += drawn_s
        self.observed.written_s += took_s
        self.busy_s += took_s
        self.tokens += rows.num_rows * RESPONSE_TOKENS
        self._held -= len(chunk.slots)
        self._room.set()
        return rows

    async def _deliver(self, chunk: Chunk, rows: pa.RecordBatch, work: Work) -> None:
        episodes, which = ray.put(rows), chunk.slots[0].index // work.chunk_size
        scorers, references = self.pools.scorers, self.pools.references
        scores = scorers[which % len(scorers)].score.remote(episodes)
        reference = references[which % len(references)]
        logprobs = reference.reference_logprobs.remote(episodes, work.sampling.temperature)
        for scored in (scores, logprobs):  # so that what is timed is the stream alone
            await scored
        began = time.perf_counter()
        fresh: int = await work.stream.accept.remote(episodes, scores, logprobs)
        self.observed.accept_s.append(time.perf_counter() - began)
        self.observed.episodes += fresh
        self.accepted += fresh


async def _answer(reference: Any) -> Any:
    return await reference


@ray.remote(num_cpus=0)
class GeneratorHost:
    """Several generators in one process. What the conductor calls is given the generator's name first."""

    def __init__(self) -> None:
        self._generators: dict[str, SimulatedGenerator] = {}
        self._looked_at = time.perf_counter()

    async def seat(self, names: list[str], chunk_mean_s: float) -> None:
        """Make these generators, in place of those of the stage before."""
        self._generators = {name: SimulatedGenerator(name, chunk_mean_s) for name in names}

    async def observe(self) -> Observed:
        """What all of them have seen since they were last looked at."""
        now = time.perf_counter()
        total = Observed(seconds=now - self._looked_at)
        self._looked_at = now
        for each in self._generators.values():
            seen, each.observed = each.observed, Observed()
            total.lease_s += seen.lease_s
            total.accept_s += seen.accept_s
            total.episodes += seen.episodes
            total.drawn_s += seen.drawn_s
            total.written_s += seen.written_s
        return total

    async def accepted(self) -> int:
        """Episodes of all of them that the stream took, since they were made."""
        return sum(each.accepted for each in self._generators.values())

    async def load(self, name: str, snapshot: Snapshot, label: str) -> float:
        return self._generators[name].load(snapshot, label)

    async def probe(self, name: str, sequences: list[list[int]]) -> list[list[float]]:
        return self._generators[name].probe(sequences)

    async def confirm(self, name: str, label: str) -> None:
        pass  # it scores every probe as the learner does, and holds nothing until then

    async def work(self, name: str, work: Work) -> None:
        self._generators[name].begin(work)

    async def rest(self, name: str) -> None:
        await self._generators[name].rest()

    async def adjust(self, name: str, share: int, pools: ScoringPools) -> None:
        self._generators[name].share, self._generators[name].pools = share, pools

    async def heartbeat(self, name: str) -> Pulse:
        return pulse_now(0.0)

    async def report(self, name: str) -> RoleReport:
        return report_now(self._generators[name].busy_s, self._generators[name].tokens)


@ray.remote(num_cpus=0, concurrency_groups={"health": 1})  # pyright: ignore[reportCallIssue]
class ScoringStandIn:
    """Reward scorer and reference in one: it answers at once."""

    def __init__(self) -> None:
        self._tokens = 0

    def score(self, episodes: pa.RecordBatch) -> list[float]:
        """One score an episode: its slot."""
        self._tokens += episodes.num_rows * RESPONSE_TOKENS
        return [float(slot) for slot in episodes.column("slot").to_pylist()]

    def reference_logprobs(self, episodes: pa.RecordBatch, temperature: float) -> list[list[float]]:
        """As many as the response has tokens, of every episode."""
        return [[-1.0] * RESPONSE_TOKENS for _ in range(episodes.num_rows)]

    @ray.method(concurrency_group="health")
    def heartbeat(self) -> Pulse:
        return pulse_now(0.0)

    def report(self) -> RoleReport:
        return report_now(0.0, self._tokens)
