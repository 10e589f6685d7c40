"""The generator's thread with a stand-in engine: what may interrupt what, and what outlives what."""

import time
from concurrent.futures import Future
from typing import Any

import pytest

from actors import generator as module
from actors.episodes import Chunk, Slot
from actors.generator import RolloutGenerator, Work
from actors.rollout_engine import Completion, VersionSpan
from actors.settings import RolloutSettings, SamplingSettings
from corpus.problems import RunProblem


class StandInEngine:
    """Finishes the request that was submitted first at each step."""

    def __init__(self, *_: Any) -> None:
        self.requests: list[Any] = []
        self.steps = 0
        self.held = self.broken = False
        self.version = "0.0"

    @property
    def pending(self) -> int:
        return len(self.requests)

    def submit(self, request: Any) -> None:
        self.requests.append(request)

    def step(self) -> list[Completion]:
        if self.broken:
            raise RuntimeError("the engine broke")
        self.steps += 1
        time.sleep(0.002)
        if self.held or not self.requests:
            return []
        done = self.requests.pop(0)
        return [Completion(done.key, [4], [-1.0], "stop", [VersionSpan(self.version, 0, 1)])]

    def run(self, requests: Any) -> list[Completion]:
        assert not self.requests, "a batch is run with nothing else in the engine"
        for request in requests:
            self.submit(request)
        return [completion for _ in requests for completion in self.step()]

    def load(self, snapshot: Any, version: str) -> float:
        self.version = version
        return 0.5


class Remote:
    """`remote(…)` gives back an object whose `future()` the test sets."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], Future]] = []

    def remote(self, *arguments: Any) -> "Remote.Call":
        future: Future = Future()
        self.calls.append((arguments, future))
        return self.Call(future)

    class Call:
        def __init__(self, future: Future) -> None:
            self._future = future

        def future(self) -> Future:
            return self._future


class Place:
    """Stream, conductor and scorers at once: each method is a `Remote`."""

    def __init__(self) -> None:
        for name in ("lease", "accept", "failed", "score", "reference_logprobs"):
            setattr(self, name, Remote())


@pytest.fixture
def made(monkeypatch, tmp_path):
    """(generator, its engine): the actor's class in this process."""
    monkeypatch.setattr(module.ray, "put", lambda content: content)
    each: Any = RolloutGenerator.__ray_metadata__.modified_class("g", RolloutSettings(max_concurrent=8))  # pyright: ignore
    engine = StandInEngine()
    each._engine = engine
    return each, engine


def work(place: Place) -> Work:
    return Work("r", 1, place, place, [place], [place], SamplingSettings(max_response_tokens=4))


def chunk(first: int = 0, slots: int = 2) -> Chunk:
    return Chunk([Slot(index, "p", [1, 2], seed=index) for index in range(first, first + slots)], 0, 1.0)


def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def test_a_leased_chunk_is_generated_scored_and_delivered_whole(made):
    generator, _ = made
    place = Place()
    generator.load("weights", "0.3")
    generator.work(work(place))
    until(lambda: place.lease.calls)
    place.lease.calls[0][1].set_result([chunk()])
    until(lambda: place.accept.calls)
    episodes, _, _ = place.accept.calls[0][0]
    assert episodes.column("slot").to_pylist() == [0, 1]
    assert episodes.column("response_tokens").to_pylist() == [[4], [4]]
    assert episodes.column("version_spans").to_pylist()[0] == [{"attempt": 0, "update": 3, "start": 0, "end": 1}]
    assert place.score.calls[0][0][0] is episodes


def test_a_generator_outlives_the_stream_of_work_that_is_over(made):
    generator, engine = made
    place = Place()
    generator.work(work(place))
    until(lambda: place.lease.calls)
    generator.rest()
    place.lease.calls[0][1].set_exception(ConnectionError("the stream is gone"))
    time.sleep(0.05)
    assert generator.load("weights", "0.1") == 0.5
    assert not place.failed.calls

    following = Place()
    generator.work(work(following))
    until(lambda: following.lease.calls)
    following.lease.calls[0][1].set_result([chunk()])
    until(lambda: following.accept.calls)
    assert engine.pending == 0


def test_an_answer_to_a_lease_of_work_that_is_over_is_not_generated(made):
    generator, engine = made
    old, new = Place(), Place()
    generator.work(work(old))
    until(lambda: old.lease.calls)
    generator.rest()
    generator.work(work(new))
    until(lambda: new.lease.calls)
    old.lease.calls[0][1].set_result([chunk()])
    time.sleep(0.05)
    assert engine.steps == 0
    assert not old.accept.calls
    assert not new.accept.calls


def test_a_lease_that_fails_during_the_work_is_told_to_the_conductor(made):
    generator, _ = made
    place = Place()
    generator.work(work(place))
    until(lambda: place.lease.calls)
    place.lease.calls[0][1].set_exception(ConnectionError("the stream is gone"))
    until(lambda: place.failed.calls)
    name, problem = place.failed.calls[0][0]
    assert name == "g"
    assert "the stream is gone" in str(problem)


def test_an_engine_that_breaks_is_told_to_the_conductor_and_to_whoever_asks_later(made):
    generator, engine = made
    place = Place()
    generator.work(work(place))
    until(lambda: place.lease.calls)
    engine.broken = True
    place.lease.calls[0][1].set_result([chunk()])
    until(lambda: place.failed.calls)
    assert "the engine broke" in str(place.failed.calls[0][0][1])
    with pytest.raises(RunProblem, match=r"g has failed: .*the engine broke"):
        generator.load("weights", "0.1")


def test_a_delivery_that_fails_is_told_to_the_conductor_as_it_was_raised(made):
    generator, _ = made
    place = Place()
    generator.work(work(place))
    until(lambda: place.lease.calls)
    place.lease.calls[0][1].set_result([chunk()])
    until(lambda: place.accept.calls)
    problem = RunProblem("reward function f: the score of response 0 of 2 is nan")
    place.accept.calls[0][1].set_exception(problem)
    until(lambda: place.failed.calls)
    assert place.failed.calls[0][0] == ("g", problem)


def test_weights_change_between_steps_while_requests_run_and_rest_waits_for_them(made):
    generator, engine = made
    place = Place()
    generator.load("weights", "0.0")
    generator.work(work(place))
    until(lambda: place.lease.calls)
    engine.held = True
    place.lease.calls[0][1].set_result([chunk()])
    until(lambda: engine.pending == 2)
    generator.load("weights", "0.1")
    assert engine.version == "0.1"
    assert engine.pending == 2
    engine.held = False
    generator.rest()
    assert engine.pending == 0
    assert len(place.accept.calls) == 1


def test_what_a_caller_asks_wrongly_is_the_callers_and_the_generator_goes_on(made, tmp_path):
    generator, _ = made
    with pytest.raises(RunProblem, match="There are no safetensors weights"):
        generator.load_directory(str(tmp_path), "nothing")
    with pytest.raises(RunProblem, match="g has an engine already"):
        generator.start("anything", "anything", 8)
    assert generator.load("weights", "0.1") == 0.5
