"""A PPO stage of simulated generators: the real stream, conductor and weight store; a learner that trains nothing."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.conductor import Conductor, Fellowship
from actors.delivery import Work
from actors.failures import plain_problem
from actors.fleet import share_of
from actors.publication import Publication
from actors.settings import SamplingSettings
from actors.stream import EpisodeStream, StreamPlan
from actors.weight_store import WeightStore
from bench.simulated_generators import (
    RESPONSE_TOKENS,
    GeneratorHost,
    Observed,
    ScoringStandIn,
    Seat,
    probe_of,
    snapshot_of,
)
from corpus.problems import RunProblem
from corpus.schemas import make_table, write_table

CHUNK_SIZE = 4
"""Slots: small, so that there are many leases and acceptances to an episode."""
UPDATE_S = 3.0
"""Seconds of all generators' work in a batch, so that batches grow with them, and updates are as far apart."""
STALENESS = 2
"""So that generators have batches to go on with while stragglers are waited for and weights are published."""
PROMPTS, PROMPT_TOKENS = 64, 32
CHUNKS_MEASURED = 30
"""At least, of all generators together: one chunk more or less is then some 3 %."""
PATIENCE_S = 120.0
"""Seconds for any single answer."""
LOOK_S = 0.2


class TimeUp(Exception):
    """The whole is to end now."""


@dataclass(frozen=True)
class Options:
    """One generator makes `rate` episodes/s; every level is measured for `seconds` at least, and what is waited for
    must be there by `give_up` (monotonic clock)."""

    rate: float
    seconds: float
    give_up: float

    @property
    def chunk_mean_s(self) -> float:
        """Seconds in which a generator writes a chunk."""
        return CHUNK_SIZE / self.rate

    def measured_s(self, generators: int) -> float:
        """Seconds for which so many generators are measured."""
        return max(self.seconds, CHUNKS_MEASURED * self.chunk_mean_s / generators)

    def batch_size(self, generators: int) -> int:
        """Episodes of an update of so many generators."""
        return CHUNK_SIZE * max(round(generators * self.rate * UPDATE_S / CHUNK_SIZE), 1)


@dataclass(frozen=True)
class Cast:
    """The processes that serve every stage."""

    hosts: list[Any]
    scoring: Any


class Stage:
    """A PPO stage whose learner is `learn`, on a thread of its own."""

    def __init__(self, generators: int, options: Options, cast: Cast, directory: Path) -> None:
        self._options, self._cast = options, cast
        self.stop = threading.Event()
        self.published: list[float] = []
        """Seconds of each publication, the first one included, at which generators have nothing else to do."""
        self._trained = 0
        self._batch_size = options.batch_size(generators)
        table = directory / "prompts.parquet"
        names = [f"prompt-{row}" for row in range(PROMPTS)]
        columns = {"prompt_id": names, "user_id": names, "prompt": names, "meta": [""] * PROMPTS}
        tokens = {"prompt_tokens": [[row + 1] * PROMPT_TOKENS for row in range(PROMPTS)]}
        write_table(make_table("prompts", columns | tokens), table, "prompts")
        plan = StreamPlan(
            prompts=str(table),
            directory=str(directory / "episodes"),
            seed=0,
            round_number=1,
            batch_size=self._batch_size,
            chunk_size=CHUNK_SIZE,
            max_staleness=STALENESS,
            batches=1_000_000,
            lease_s=600,
        )
        actors: tuple[Any, ...] = (EpisodeStream, WeightStore, Conductor)
        self.stream = actors[0].remote(plan)
        self.store = actors[1].remote(str(directory / "weights"))
        self.conductor = actors[2].remote(self.stream, self.store, PATIENCE_S, PATIENCE_S, None, str(directory))
        hosts = cast.hosts
        named = {f"generator-{n}": hosts[n % len(hosts)] for n in range(generators)}
        self._seats = {name: Seat(host, name) for name, host in named.items()}
        seated = [
            host.seat.remote([name for name, its in named.items() if its is host], options.chunk_mean_s)
            for host in hosts
        ]
        self._get(seated, "the generators to be seated")
        admissible = self._batch_size * (STALENESS + 1)
        work = Work(
            "control-plane",
            1,
            self.stream,
            self.conductor,
            [cast.scoring],
            [cast.scoring],
            SamplingSettings(max_response_tokens=RESPONSE_TOKENS),
            CHUNK_SIZE,
            share_of(admissible, generators, CHUNK_SIZE),
        )
        begun = self.conductor.begin.remote(self._seats, work, Fellowship(admissible=admissible))
        self._get(begun, "the conductor to begin")
        processes = {"stream": [self.stream], "conductor": [self.conductor], "store": [self.store]}
        processes |= {"generators": hosts, "scoring": [cast.scoring]}
        self._pids = {
            role: self._get([each.__ray_call__.remote(_pid) for each in actors], f"the number of the {role}'s process")
            for role, actors in processes.items()
        }
        self._publish()
        self._get(self.conductor.start_leasing.remote(), "the generators to begin")

    def learn(self) -> None:
        """Take batch after batch and publish after each, until `stop`."""
        while not self.stop.is_set():
            take = self.stream.take.remote(self._trained, PATIENCE_S, 0)
            while not ray.wait([take], timeout=LOOK_S)[0]:
                if self.stop.is_set():
                    return
            self._get(take, f"batch {self._trained}")
            self._get(self.stream.trained.remote(self._trained, 0), "the stream to drop what was trained")
            self._trained += 1
            self._publish()

    def _publish(self) -> None:
        update = self._trained
        answer = self.conductor.publish.remote(0, update, snapshot_of(update), probe_of(update))
        done: Publication = self._get(answer, f"the publication of update {update}")
        self.published.append(done.seconds)

    def observe(self) -> list[Observed]:
        """What the generators of each process have seen since the last time."""
        return self._get([host.observe.remote() for host in self._cast.hosts], "what the generators have seen")

    def cpu_seconds(self) -> dict[str, float]:
        """Of each role's processes together, since they started."""
        return {role: sum(map(_cpu_seconds, pids)) for role, pids in self._pids.items()}

    def end(self) -> None:
        """Let the generators finish what they hold. Raises RunProblem unless every episode that they delivered was
        accepted once, and none was generated again."""
        self._get(self.conductor.finish.remote(), "the generators to finish")
        accepted = sum(self._get([host.accepted.remote() for host in self._cast.hosts], "the number of episodes"))
        counts = self._get(self.stream.counts.remote(), "the counts of the stream")
        problem = problem_with(accepted, self._trained * self._batch_size, counts)
        if problem is not None:
            raise RunProblem(problem, "bench/measurement")

    def close(self) -> None:
        """End the actors of the stage."""
        for actor in (self.conductor, self.store, self.stream):
            with suppress(RayError):
                ray.kill(actor)

    def _get(self, answers: Any, what: str) -> Any:
        return _answers(answers, what, self._options)


@contextmanager
def stage_of(generators: int, options: Options, cast: Cast, directory: Path) -> Iterator[Stage]:
    """A stage of so many generators, which lease already; its actors end with the block."""
    stage = Stage(generators, options, cast, directory)
    try:
        yield stage
    finally:
        stage.close()


def cast_of(processes: int, options: Options) -> Cast:
    """Processes for generators, and one that scores, once they have started."""
    actors: tuple[Any, ...] = (GeneratorHost, ScoringStandIn)
    cast = Cast([actors[0].remote() for _ in range(processes)], actors[1].remote())
    ready = [each.__ray_call__.remote(_pid) for each in (*cast.hosts, cast.scoring)]
    _answers(ready, "the processes of the generators to start", options)
    return cast


def _answers(answers: Any, what: str, options: Options) -> Any:
    """Raises TimeUp where the whole is to end before they are there, RunProblem where they are late or an actor
    failed."""
    left_s = max(options.give_up - time.monotonic(), 0.0)
    try:
        return ray.get(answers, timeout=min(PATIENCE_S, left_s))
    except GetTimeoutError as error:
        if left_s < PATIENCE_S:
            raise TimeUp(f"The time was up while {what} was waited for.") from error
        raise RunProblem(f"Waited {PATIENCE_S:.0f} s for {what} and gave up.", "bench/measurement") from error
    except RayError as error:
        raise plain_problem(error, {}, "an actor", f"{what} was there", f"waited for {what}") from error


def _pid(_: Any) -> int:
    return os.getpid()


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process. Raises RunProblem where there is none any more."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise RunProblem(f"Process {pid} of the simulation has ended before its time.", "bench/measurement") from None
    fields = status.rpartition(")")[2].split()  # proc(5), from field 3; the command's name may hold anything
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def problem_with(delivered: int, trained: int, counts: Mapping[str, float]) -> str | None:
    """What is wrong with the stream's `counts` of a stage in which generators saw so many episodes accepted and the
    learner took so many; None where each was accepted once and nothing was generated again."""
    wanted = {"generated": delivered, "trained": trained, "regenerated": 0, "duplicates": 0, "refused": 0}
    wrong = [
        f"{int(counts[f'stream/{name}'])} {name} where {number} were to be"
        for name, number in wanted.items()
        if counts[f"stream/{name}"] != number
    ]
    return f"The stream counts {', '.join(wrong)}." if wrong else None
