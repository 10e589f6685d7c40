"""A conductor among stand-ins, all in one event loop."""

import asyncio
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
import torch

from actors.conductor import Conductor, Fellowship, HeldOut, Probe
from actors.generator import Work
from actors.pulse import Pulse
from actors.recruits import Call
from actors.role_reports import report_now
from actors.settings import FleetSettings, SamplingSettings
from actors.weight_store import WeightStore
from corpus.schemas import make_table
from models.snapshot import Snapshot, pack

PROBE = Probe(sequences=[[1, 2, 3], [4, 5]], logprobs=[[-1.0, -2.0], [-3.0]], bound_nats=1e-3)


class Handle:
    """`handle.method.remote(…)` begins the coroutine at once, as Ray does, and gives back what can be awaited."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        call = getattr(self.actor, method)

        async def begun(*arguments: Any) -> Any:
            found = call(*arguments)
            return await found if asyncio.iscoroutine(found) else found

        class Remote:
            @staticmethod
            def remote(*arguments: Any) -> asyncio.Task:
                return asyncio.ensure_future(begun(*arguments))

        return Remote


class Generator:
    """A generator with a gate before its loads and one before its samples, during which it does not load.

    It scores the last token of the probe's first sequence `off` nats from the learner.
    """

    def __init__(self, off: float = 0.0) -> None:
        self.off = off
        self.gate, self.samples_gate, self.idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for each in (self.gate, self.samples_gate, self.idle):
            each.set()
        self.loaded: list[str] = []
        self.confirmed: list[str] = []
        self.adjusted: list[tuple[int, Any]] = []
        self.worked = self.rested = self.dead = self.silent = self.broken = False
        self.stalled_s = 0.0
        self.breaks: Exception | None = None
        """What sampling raises."""

    async def load(self, snapshot: Snapshot, label: str) -> float:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        if self.broken:
            raise RuntimeError("CUDA out of memory")
        await self.gate.wait()
        await self.idle.wait()
        assert snapshot.version == tuple(int(part) for part in label.split("."))
        self.loaded.append(label)
        return 0.25

    async def probe(self, sequences: list[list[int]]) -> list[list[float]]:
        assert sequences == PROBE.sequences
        return [[-1.0, -2.0 + self.off], [-3.0]]

    async def confirm(self, label: str) -> None:
        self.confirmed.append(label)

    async def work(self, work: Work) -> None:
        self.worked = True

    async def rest(self) -> None:
        await self.gate.wait()
        self.rested = True

    async def adjust(self, share: int, pools: Any) -> None:
        self.adjusted.append((share, pools))

    async def heartbeat(self) -> Pulse:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        if self.silent:
            await asyncio.Event().wait()
        return Pulse(0, "", "", self.stalled_s, 0)

    async def report(self) -> Any:
        return report_now(0.0, 0)

    async def sample(self, prompts: pa.Table, samples: int, sampling: Any, seed: int, snapshot: list) -> pa.Table:
        assert snapshot[0].version == (0, 9)
        if self.dead:
            raise ray.exceptions.ActorDiedError
        if self.breaks is not None:
            raise self.breaks
        self.idle.clear()
        await self.samples_gate.wait()
        self.idle.set()
        rows = prompts.num_rows
        return make_table(
            "samples",
            {
                "prompt_id": prompts["prompt_id"].to_pylist(),
                "sample": [0] * rows,
                "prompt_tokens": prompts["prompt_tokens"].to_pylist(),
                "response_tokens": [[5, 6]] * rows,
                "response": ["five six"] * rows,
                "logprobs": [[-1.0, -0.5]] * rows,
                "finish_reason": ["stop", "length"],
            },
        )


class Scoring:
    """Scorer and reference of held-out samples, with a gate before its reports."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.dead = self.broken = False
        self.breaks: Exception | None = None
        """What scoring raises."""
        self.loaded: list[str] = []

    async def load_reward(self, what: str) -> None:
        self.loaded.append(what)

    async def heartbeat(self) -> Pulse:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        return Pulse(0, "", "", 0.0, 0)

    async def score_pairs(self, prompts: list, responses: list) -> list[float]:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        if self.breaks is not None:
            raise self.breaks
        return [float(prompt[0]) for prompt in prompts]

    async def logprobs_of(self, prompts: list, responses: list, temperature: float) -> list[list[float]]:
        assert temperature == 0.7
        return [[-1.5, -1.0] for _ in prompts]

    async def report(self) -> Any:
        await self.gate.wait()
        if self.broken:
            raise ray.exceptions.ActorDiedError
        return report_now(0.0, 0)


class Stream:
    """Remembers what was admitted and of which failure it was told. It has a gate before it excludes or releases."""

    def __init__(self) -> None:
        self.admitted: list[tuple[int, int]] = []
        self.failures: list[BaseException] = []
        self.released: list[str] = []
        self.excluded: list[str] = []
        self.suspended: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.silent = self.dead = False

    async def suspend(self, holders: list[str]) -> None:
        self.suspended = holders

    async def exclude(self, holder: str) -> None:
        self.excluded.append(holder)
        await self.gate.wait()

    async def release(self, holder: str) -> int:
        self.released.append(holder)
        await self.gate.wait()
        return 1

    async def advance(self, attempt: int, update: int) -> None:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        if self.silent:
            await asyncio.Event().wait()
        self.admitted.append((attempt, update))

    async def fail(self, problem: BaseException) -> None:
        if self.silent:
            await asyncio.Event().wait()
        self.failures.append(problem)


class Spec:
    """How a stand-in is made again: `make` is called with its name. It has no placement."""

    placement = None

    def __init__(self, make: Callable[[str], Any], *start: Call) -> None:
        self.start, self._make = start, make
        self.made: dict[str, list[Any]] = {}

    def make(self, name: str, reserved: Any) -> "Handle":
        made = self.made.setdefault(name.partition(".")[0], [])
        made.append(self._make(name))
        return Handle(made[-1])


QUICK = FleetSettings(
    heartbeat_s=0.05,
    suspect_after_s=0.3,
    dead_after_s=0.8,
    stall_after_s=5,
    start_deadline_s=20,
    minimum_deadline_s=20,
    placement_deadline_s=0.2,
)


class Cast:
    """A conductor with its generators, stream and store. To be made inside the event loop."""

    def __init__(
        self,
        deadline_s: float = 30.0,
        sampling_deadline_s: float = 30.0,
        settings: FleetSettings | None = None,
        specs: dict[str, Spec] | None = None,
        directory: str | None = None,
        admissible: int | None = None,
        **generators: float,
    ) -> None:
        self.stream = Stream()
        self.generators = {name: Generator(off) for name, off in (generators or {"one": 0.0, "two": 0.0}).items()}
        store = Handle(WeightStore.__ray_metadata__.modified_class(None))  # pyright: ignore
        made: Any = Conductor.__ray_metadata__.modified_class  # pyright: ignore
        self.conductor = made(
            Handle(self.stream), store, deadline_s, sampling_deadline_s, settings or FleetSettings(), directory
        )
        self.scoring = Handle(Scoring())
        self.fellowship: Any = Fellowship(**(specs or {}), admissible=admissible)  # pyright: ignore

    async def begin(self) -> "Cast":
        work = Work("r", 1, Handle(self.stream), self.conductor, [self.scoring], [self.scoring], SAMPLING, 2, 8)
        handles = {name: Handle(each) for name, each in self.generators.items()}
        await self.conductor.begin(handles, work, self.fellowship)
        return self

    def publish(self, update: int = 0) -> Any:
        return self.conductor.publish(0, update, snapshot(update), PROBE)


SAMPLING = SamplingSettings(temperature=0.7)


def snapshot(update: int) -> Snapshot:
    return pack({"weight": torch.ones(3)}, (0, update))


def held_out(judge: Any = None) -> HeldOut:
    columns = {"prompt_id": ["a", "b"], "user_id": ["u", "u"], "prompt": ["?", "!"], "prompt_tokens": [[1], [2]]}
    return HeldOut(make_table("prompts", {**columns, "meta": ["3", "5"]}), 1, 0, judge)


async def turns(count: int = 50) -> None:
    """Lets everything that can go on go on."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits for `condition`; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
