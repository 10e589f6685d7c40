"""The conductor among stand-ins, all in one event loop: what it waits for, whom it names, and what it refuses."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from actors import weight_store
from actors.conductor import Conductor, HeldOut, Probe
from actors.generator import Work
from actors.role_reports import report_now
from actors.settings import SamplingSettings
from actors.weight_store import WeightStore
from corpus.problems import RunProblem
from corpus.schemas import make_table
from models.snapshot import Snapshot, pack

PROBE = Probe(tokens=[1, 2, 3], logprobs=[-1.0, -2.0], bound_nats=1e-3)


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
    """A generator with a gate before its loads; it scores the probe `off` nats from the learner."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off
        self.gate = asyncio.Event()
        self.gate.set()
        self.loaded: list[str] = []
        self.worked = self.rested = self.dead = False

    async def load(self, snapshot: Snapshot, label: str) -> float:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        await self.gate.wait()
        assert snapshot.version == tuple(int(part) for part in label.split("."))
        self.loaded.append(label)
        return 0.25

    async def probe(self, tokens: list[int]) -> list[float]:
        assert tokens == PROBE.tokens
        return [logprob + self.off for logprob in PROBE.logprobs]

    async def work(self, work: Work) -> None:
        self.worked = True

    async def rest(self) -> None:
        self.rested = True

    async def report(self) -> Any:
        return report_now(0.0, 0)

    async def sample(self, prompts: pa.Table, samples: int, sampling: Any, seed: int, snapshot: list) -> pa.Table:
        assert snapshot[0].version == (0, 9)
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
    """Scorer and reference of held-out samples."""

    async def score_pairs(self, prompts: list, responses: list) -> list[float]:
        return [float(prompt[0]) for prompt in prompts]

    async def logprobs_of(self, prompts: list, responses: list, temperature: float) -> list[list[float]]:
        assert temperature == 0.7
        return [[-1.5, -1.0] for _ in prompts]

    async def report(self) -> Any:
        return report_now(0.0, 0)


class Stream:
    """Remembers what was admitted and of which failure it was told."""

    def __init__(self) -> None:
        self.admitted: list[tuple[int, int]] = []
        self.failures: list[BaseException] = []

    async def advance(self, attempt: int, update: int) -> None:
        self.admitted.append((attempt, update))

    async def fail(self, problem: BaseException) -> None:
        self.failures.append(problem)


class Cast:
    """A conductor with its generators, stream and store. To be made inside the event loop."""

    def __init__(self, deadline_s: float = 30.0, **generators: float) -> None:
        self.stream = Stream()
        self.generators = {name: Generator(off) for name, off in (generators or {"one": 0.0, "two": 0.0}).items()}
        store = Handle(WeightStore.__ray_metadata__.modified_class())  # pyright: ignore
        self.conductor = Conductor.__ray_metadata__.modified_class(Handle(self.stream), store, deadline_s)  # pyright: ignore
        self.scoring = Handle(Scoring())

    async def begin(self) -> "Cast":
        sampling = SamplingSettings(temperature=0.7)
        work = Work("r", 1, Handle(self.stream), self.conductor, [self.scoring], [self.scoring], sampling)
        await self.conductor.begin({name: Handle(each) for name, each in self.generators.items()}, work)
        return self

    def publish(self, update: int = 0) -> Any:
        return self.conductor.publish(0, update, snapshot(update), PROBE)


def snapshot(update: int) -> Snapshot:
    return pack({"weight": torch.ones(3)}, (0, update))


@pytest.fixture
def play(monkeypatch) -> Callable[..., Any]:
    """Runs a coroutine function of a `Cast` that is ready."""
    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)

    def run(scene: Callable[[Cast], Any], deadline_s: float = 30.0, **generators: float) -> Cast:
        async def whole() -> Cast:
            each = await Cast(deadline_s, **generators).begin()
            await scene(each)
            return each

        return asyncio.run(whole())

    return run


async def turns(count: int = 50) -> None:
    """Lets everything that can go on go on."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_version_is_admitted_once_every_generator_holds_it(play):
    async def scene(each: Cast) -> None:
        each.generators["two"].gate.clear()
        publishing = asyncio.ensure_future(each.publish())
        await turns()
        assert each.generators["one"].loaded == ["0.0"]
        assert each.stream.admitted == []
        each.generators["two"].gate.set()
        publication = await publishing
        assert each.stream.admitted == [(0, 0)]
        assert publication.pause_s == 0.25
        assert publication.probe_nats == 0.0

    play(scene)


def test_publications_do_not_overtake_each_other(play):
    async def scene(each: Cast) -> None:
        each.generators["one"].gate.clear()
        publishing = [asyncio.ensure_future(each.publish(update)) for update in (0, 1)]
        await turns()
        assert each.generators["two"].loaded == ["0.0"]
        each.generators["one"].gate.set()
        await asyncio.gather(*publishing)

    each = play(scene)
    assert [generator.loaded for generator in each.generators.values()] == [["0.0", "0.1"], ["0.0", "0.1"]]
    assert each.stream.admitted == [(0, 0), (0, 1)]


def test_a_generator_that_is_late_is_named(play):
    async def scene(each: Cast) -> None:
        each.generators["slow"].gate.clear()
        with pytest.raises(RunProblem) as late:
            await each.publish()
        assert str(late.value) == "After 0 s these generators have yet to load weights 0.0: slow."

    assert play(scene, deadline_s=0.1, quick=0.0, slow=0.0).stream.admitted == []


def test_a_generator_that_died_is_named(play):
    async def scene(each: Cast) -> None:
        each.generators["dead"].dead = True
        with pytest.raises(RunProblem, match=r"^dead died before it could load weights 0\.0\.$"):
            await each.publish()

    assert play(scene, living=0.0, dead=0.0).stream.admitted == []


@pytest.mark.parametrize("off", [0.002, -0.5, float("nan")])
def test_a_probe_that_disagrees_is_refused_and_the_generator_named(play, off):
    async def scene(each: Cast) -> None:
        with pytest.raises(RunProblem, match=r"^wrong holds weights 0\.0 but scores the probe .* bound of 0\.001"):
            await each.publish()

    assert play(scene, right=0.0, wrong=off).stream.admitted == []


def test_a_probe_within_the_bound_is_reported(play):
    async def scene(each: Cast) -> None:
        assert (await each.publish()).probe_nats == pytest.approx(0.0005)

    assert play(scene, one=0.0005, two=-0.0002).stream.admitted == [(0, 0)]


def test_a_damaged_snapshot_reaches_no_generator(play):
    async def scene(each: Cast) -> None:
        whole = snapshot(0)
        buffer = np.array(whole.buffer)
        buffer[0] ^= 1
        damaged = Snapshot(whole.version, buffer, whole.manifest, whole.checksum)
        with pytest.raises(RunProblem, match="is damaged: its checksum does not match"):
            await each.conductor.publish(0, 0, damaged, PROBE)

    assert play(scene).generators["one"].loaded == []


@pytest.mark.parametrize(
    ("problem", "told"),
    [(RunProblem("reward f: nan"), "^reward f: nan$"), (KeyError("x"), "^generator-1 could not go on: .*x")],
)
def test_the_first_failure_of_an_actor_is_told_through_the_stream(play, problem, told):
    async def scene(each: Cast) -> None:
        await each.conductor.failed("generator-1", problem)
        await each.conductor.failed("generator-2", RunProblem("a later one"))

    for failure in play(scene).stream.failures:
        assert isinstance(failure, RunProblem)
        assert re.search(told, str(failure))


def test_generators_work_and_rest_when_they_are_told(play):
    async def scene(each: Cast) -> None:
        await each.conductor.start_leasing()
        assert all(generator.worked and not generator.rested for generator in each.generators.values())
        await each.conductor.finish()

    assert all(generator.rested for generator in play(scene).generators.values())


def test_held_out_prompts_are_sampled_scored_and_judged(play):
    columns = {"prompt_id": ["a", "b"], "user_id": ["u", "u"], "prompt": ["?", "!"], "prompt_tokens": [[1], [2]]}
    prompts = make_table("prompts", {**columns, "meta": ["3", "5"]})
    judged = HeldOut(prompts, 1, 0, judge=lambda meta, response: float(meta) if response == "five six" else 0.0)

    async def scene(each: Cast) -> None:
        sampling = SamplingSettings(temperature=0.7)
        found = await each.conductor.evaluate(snapshot(9), judged, sampling)
        assert found == {"reward": 1.5, "gold": 4.0, "kl": 1.0, "length": 2.0, "eos_rate": 0.5}
        assert (await each.conductor.evaluate(snapshot(9), HeldOut(prompts, 1, 0), sampling))["gold"] is None

    play(scene)


def test_the_store_keeps_the_last_two_versions(monkeypatch):
    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    store = WeightStore.__ray_metadata__.modified_class()  # pyright: ignore
    assert store.newest() is None
    for update in range(3):
        [reference] = store.put(snapshot(update))
        assert reference.version == (0, update)
    version, [reference] = store.newest()
    assert (version, reference.version) == ((0, 2), (0, 2))
    assert sorted(store._references) == [(0, 1), (0, 2)]
