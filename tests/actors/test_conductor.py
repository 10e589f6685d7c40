"""The conductor among stand-ins, all in one event loop: what it waits for, whom it names, and what it refuses."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from actors import conductor, weight_store
from actors.conductor import Conductor, HeldOut, Probe
from actors.generator import Work
from actors.role_reports import report_now
from actors.settings import SamplingSettings
from actors.weight_store import WeightStore
from corpus.problems import RunProblem, UsageProblem
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
        self.worked = self.rested = self.dead = False

    async def load(self, snapshot: Snapshot, label: str) -> float:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        await self.gate.wait()
        await self.idle.wait()
        assert snapshot.version == tuple(int(part) for part in label.split("."))
        self.loaded.append(label)
        return 0.25

    async def probe(self, sequences: list[list[int]]) -> list[list[float]]:
        assert sequences == PROBE.sequences
        return [[-1.0, -2.0 + self.off], [-3.0]]

    async def work(self, work: Work) -> None:
        self.worked = True

    async def rest(self) -> None:
        await self.gate.wait()
        self.rested = True

    async def report(self) -> Any:
        return report_now(0.0, 0)

    async def sample(self, prompts: pa.Table, samples: int, sampling: Any, seed: int, snapshot: list) -> pa.Table:
        assert snapshot[0].version == (0, 9)
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

    async def score_pairs(self, prompts: list, responses: list) -> list[float]:
        if self.dead:
            raise ray.exceptions.ActorDiedError
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
    """Remembers what was admitted and of which failure it was told."""

    def __init__(self) -> None:
        self.admitted: list[tuple[int, int]] = []
        self.failures: list[BaseException] = []
        self.silent = self.dead = False

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


class Cast:
    """A conductor with its generators, stream and store. To be made inside the event loop."""

    def __init__(self, deadline_s: float = 30.0, sampling_deadline_s: float = 30.0, **generators: float) -> None:
        self.stream = Stream()
        self.generators = {name: Generator(off) for name, off in (generators or {"one": 0.0, "two": 0.0}).items()}
        store = Handle(WeightStore.__ray_metadata__.modified_class(None))  # pyright: ignore
        made: Any = Conductor.__ray_metadata__.modified_class  # pyright: ignore
        self.conductor = made(Handle(self.stream), store, deadline_s, sampling_deadline_s)
        self.scoring = Handle(Scoring())

    async def begin(self) -> "Cast":
        work = Work("r", 1, Handle(self.stream), self.conductor, [self.scoring], [self.scoring], SAMPLING, 2, 8)
        await self.conductor.begin({name: Handle(each) for name, each in self.generators.items()}, work)
        return self

    def publish(self, update: int = 0) -> Any:
        return self.conductor.publish(0, update, snapshot(update), PROBE)


SAMPLING = SamplingSettings(temperature=0.7)


def snapshot(update: int) -> Snapshot:
    return pack({"weight": torch.ones(3)}, (0, update))


@pytest.fixture
def play(monkeypatch) -> Callable[..., Any]:
    """Runs a coroutine function of a `Cast` that is ready."""
    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)

    def run(
        scene: Callable[[Cast], Any], deadline_s: float = 30.0, sampling_deadline_s: float = 30.0, **generators: float
    ) -> Cast:
        async def whole() -> Cast:
            each = await Cast(deadline_s, sampling_deadline_s, **generators).begin()
            await asyncio.wait_for(scene(each), 60)
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
        each.generators["living"].gate.clear()  # it is not waited for
        began = time.monotonic()
        with pytest.raises(RunProblem, match=r"^dead died before it could load weights 0\.0: its process was killed"):
            await each.publish()
        assert time.monotonic() - began < 15

    assert play(scene, living=0.0, dead=0.0).stream.admitted == []


@pytest.mark.parametrize("silent", [True, False])
def test_a_stream_that_says_nothing_or_died_is_named(play, silent):
    async def scene(each: Cast) -> None:
        each.stream.silent, each.stream.dead = silent, not silent
        told = (
            r"^Waited 0 s for the episode stream to admit the slots of weights 0\.0 and gave up\.$"
            if silent
            else r"^The episode stream died before it could admit the slots of weights 0\.0: "
        )
        with pytest.raises(RunProblem, match=told):
            await each.publish()
        if silent:
            with pytest.raises(RunProblem, match=r"^Waited 0 s for the episode stream to take note of a failure"):
                await each.conductor.failed("one", RunProblem("a failure"))

    play(scene, deadline_s=0.1)


def test_reports_that_are_late_or_fail_are_left_out_and_hold_up_no_later_publication(play, monkeypatch):
    monkeypatch.setattr(conductor, "REPORT_PATIENCE_S", 0.5)

    async def scene(each: Cast) -> None:
        scoring = each.scoring.actor
        scoring.gate.clear()
        first = asyncio.ensure_future(each.publish(0))
        await turns()
        assert each.stream.admitted == [(0, 0)]
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(each.publish(1))
        await turns()
        assert each.stream.admitted == [(0, 0), (0, 1)], "the lock is not held while reports are awaited"
        for publication in (await first, await second):
            assert "memory/generators_bytes" in publication.roles
            assert not [name for name in publication.roles if "scoring" in name]
        scoring.gate.set()
        scoring.broken = True
        assert "memory/scoring_bytes" not in (await each.publish(2)).roles
        scoring.broken = False
        assert "memory/scoring_bytes" in (await each.publish(3)).roles
        assert "scoring/cores" in (await each.publish(4)).roles
        scoring.broken = True
        await each.publish(5)
        scoring.broken = False
        assert "scoring/cores" in (await each.publish(6)).roles, "since the report before the missing one"

    play(scene)


def test_a_publication_waits_for_a_generator_that_samples_and_for_no_other(play):
    async def scene(each: Cast) -> None:
        await each.publish(0)
        one, two = each.generators.values()
        one.samples_gate.clear()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        publishing = asyncio.ensure_future(each.publish(1))
        await asyncio.sleep(0.6)  # three deadlines of a publication
        assert not publishing.done()
        one.samples_gate.set()
        await publishing
        await evaluating
        assert one.loaded == two.loaded == ["0.0", "0.1"]

        one.samples_gate.clear()
        two.gate.clear()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        with pytest.raises(RunProblem, match=r"^After 0 s these generators have yet to load weights 0\.2: two\.$"):
            await each.publish(2)
        one.samples_gate.set()
        await evaluating

    play(scene, deadline_s=0.2, sampling_deadline_s=20)


def test_a_generator_that_began_to_sample_after_the_call_is_waited_for_too(play):
    async def scene(each: Cast) -> None:
        one = each.generators["one"]
        one.gate.clear()
        one.samples_gate.clear()
        publishing = asyncio.ensure_future(each.publish(0))
        await turns()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        one.gate.set()
        await asyncio.sleep(0.5)
        one.samples_gate.set()
        await publishing
        await evaluating

    assert play(scene, deadline_s=0.2, sampling_deadline_s=20).stream.admitted == [(0, 0)]


def test_held_out_samples_have_a_deadline_of_their_own_after_which_a_publication_fails_too(play):
    async def scene(each: Cast) -> None:
        each.generators["one"].samples_gate.clear()
        evaluating = asyncio.ensure_future(each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))
        await turns()
        publishing = asyncio.ensure_future(each.publish(0))
        with pytest.raises(RunProblem, match=r"^Waited 1 s for one to sample the held-out prompts and gave up"):
            await evaluating
        with pytest.raises(RunProblem, match=r"^After 1 s these generators have yet to load weights 0\.0: one\.$"):
            await publishing

    assert play(scene, deadline_s=0.2, sampling_deadline_s=1.0).stream.admitted == []


def test_what_generators_have_in_hand_is_waited_for_as_long_as_samples(play):
    async def scene(each: Cast) -> None:
        one = each.generators["one"]
        one.gate.clear()
        asyncio.get_running_loop().call_later(0.5, one.gate.set)
        await each.conductor.finish()
        assert one.rested
        one.gate.clear()
        with pytest.raises(RunProblem, match=r"^After 1 s these generators have yet to finish what they have in hand"):
            await each.conductor.finish()

    play(scene, deadline_s=0.1, sampling_deadline_s=1.0)


def test_a_scorer_that_died_during_an_evaluation_is_named(play):
    async def scene(each: Cast) -> None:
        each.scoring.actor.dead = True
        with pytest.raises(RunProblem, match=r"^The reward scorer died before it could score the held-out responses: "):
            await each.conductor.evaluate(snapshot(9), held_out(), SAMPLING)

    play(scene)


@pytest.mark.parametrize("off", [0.002, -0.5, float("nan")])
def test_a_probe_that_disagrees_is_refused_and_the_generator_named(play, off):
    async def scene(each: Cast) -> None:
        with pytest.raises(RunProblem, match=r"^wrong holds weights 0\.0 but scores the probe .* bound of 0\.001"):
            await each.publish()

    assert play(scene, right=0.0, wrong=off).stream.admitted == []


def test_a_probe_within_the_bound_is_reported(play):
    async def scene(each: Cast) -> None:
        publication = await each.publish()
        assert publication.probe_nats == pytest.approx(0.0005)
        assert publication.probe_mean_nats == pytest.approx((0.0005 + 0.0002) / 6)  # of two generators' three tokens

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
    [
        (RunProblem("reward f: nan"), "^reward f: nan$"),
        (UsageProblem("a wrong key"), "^a wrong key$"),
        (KeyError("x"), "^generator-1 could not go on: KeyError: 'x'$"),
    ],
)
def test_the_first_failure_of_an_actor_is_told_through_the_stream(play, problem, told):
    async def scene(each: Cast) -> None:
        await each.conductor.failed("generator-1", problem)
        await each.conductor.failed("generator-2", RunProblem("a later one"))

    failures = play(scene).stream.failures
    assert len(failures) == 2, "each actor that failed waits for the stream to know"
    for failure in failures:
        assert type(failure) is (UsageProblem if isinstance(problem, UsageProblem) else RunProblem)
        assert re.search(told, str(failure))


def test_generators_work_and_rest_when_they_are_told(play):
    async def scene(each: Cast) -> None:
        await each.conductor.start_leasing()
        assert all(generator.worked and not generator.rested for generator in each.generators.values())
        await each.conductor.finish()

    assert all(generator.rested for generator in play(scene).generators.values())


def held_out(judge: Any = None) -> HeldOut:
    columns = {"prompt_id": ["a", "b"], "user_id": ["u", "u"], "prompt": ["?", "!"], "prompt_tokens": [[1], [2]]}
    return HeldOut(make_table("prompts", {**columns, "meta": ["3", "5"]}), 1, 0, judge)


def test_held_out_prompts_are_sampled_scored_and_judged(play):
    judged = held_out(lambda meta, response: float(meta) if response == "five six" else 0.0)

    async def scene(each: Cast) -> None:
        found = await each.conductor.evaluate(snapshot(9), judged, SAMPLING)
        assert found == {"reward": 1.5, "gold": 4.0, "kl": 1.0, "length": 2.0, "eos_rate": 0.5}
        assert (await each.conductor.evaluate(snapshot(9), held_out(), SAMPLING))["gold"] is None

    play(scene)
