"""The generator's thread with a stand-in engine: what may interrupt what, and what outlives what."""

import queue
import re
import threading
import time
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayTaskError
from stand_in_engine import StandInEngine

from actors import delivery
from actors import generator as module
from actors.delivery import ScoringPools
from actors.episodes import Chunk, Slot
from actors.failures import worker_broke
from actors.generator import RolloutGenerator, Work
from actors.settings import RolloutSettings, SamplingSettings
from corpus.problems import RunProblem, UsageProblem
from corpus.schemas import make_table


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
        for name in ("lease", "accept", "failed", "broke", "scoring_pools", "score", "reference_logprobs"):
            setattr(self, name, Remote())

    def grant(self, *chunks: Chunk, call: int = 0) -> None:
        until(lambda: len(self.lease.calls) > call)
        self.lease.calls[call][1].set_result(list(chunks))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """(generator, its engine): the actor's class in this process."""
    monkeypatch.setattr(module.ray, "put", lambda content: content)
    each: Any = RolloutGenerator.__ray_metadata__.modified_class("g", RolloutSettings(max_concurrent=8))  # pyright: ignore
    engine = StandInEngine()
    each._engine = engine
    return each, engine


def work(place: Place, chunk_size: int = 2, share: int = 8) -> Work:
    sampling = SamplingSettings(max_response_tokens=4)
    return Work("r", 1, place, place, [place], [place], sampling, chunk_size=chunk_size, share=share)


def chunk(first: int = 0, slots: int = 2, attempt: int = 0) -> Chunk:
    return Chunk([Slot(index, "p", [1, 2], seed=index) for index in range(first, first + slots)], attempt, 1.0)


def prompts(*tokens: list[int]) -> pa.Table:
    rows = len(tokens)
    columns = {"prompt_id": [f"p{row}" for row in range(rows)], "user_id": ["u"] * rows, "prompt": ["?"] * rows}
    return make_table("prompts", {**columns, "prompt_tokens": list(tokens), "meta": [""] * rows})


def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def publish(generator: Any, label: str) -> None:
    """Weights that engine and learner agree on."""
    assert generator.load("weights", label) == 0.5
    generator.confirm(label)


def holding(generator: Any, engine: StandInEngine, *chunks: Chunk, share: int = 8) -> Place:
    """Work is under way, and the engine holds the requests of `chunks`, which it was granted at its first lease."""
    place = Place()
    generator.work(work(place, share=share))
    engine.held = True
    place.grant(*chunks)
    until(lambda: engine.pending == sum(len(each.slots) for each in chunks))
    return place


def test_a_leased_chunk_is_generated_scored_and_delivered_whole(made):
    generator, _ = made
    place = Place()
    publish(generator, "0.3")
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
    publish(generator, "0.1")
    assert not place.failed.calls

    following = Place()
    generator.work(work(following))
    until(lambda: following.lease.calls)
    following.lease.calls[0][1].set_result([chunk()])
    until(lambda: following.accept.calls)
    assert engine.pending == 0


def test_a_generator_that_is_to_leave_asks_for_no_more_and_finishes_what_it_holds(made):
    generator, engine = made
    place, following = Place(), Place()
    generator.work(work(place))
    engine.held = True
    place.grant(chunk())
    until(lambda: len(place.lease.calls) == 2)
    place.lease.calls[1][1].set_result(None)
    time.sleep(0.05)
    engine.held = False
    until(lambda: place.accept.calls)
    generator.rest()
    assert len(place.lease.calls) == 2
    assert not place.broke.calls
    generator.work(work(following))
    until(lambda: following.lease.calls)


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
    until(lambda: place.broke.calls)
    name, problem = place.broke.calls[0][0]
    assert name == "g"
    assert "the stream is gone" in str(problem)


def test_an_engine_that_breaks_is_told_to_the_conductor_and_to_whoever_asks_later(made):
    generator, engine = made
    place = Place()
    generator.work(work(place))
    until(lambda: place.lease.calls)
    engine.broken = True
    place.lease.calls[0][1].set_result([chunk()])
    until(lambda: place.broke.calls)
    assert "the engine broke" in str(place.broke.calls[0][0][1])
    with pytest.raises(RunProblem, match=r"^g failed while it generated: RuntimeError: the engine broke\.$"):
        generator.load("weights", "0.1")


@pytest.mark.parametrize(
    ("raised", "told", "sort"),
    [
        (
            RunProblem("reward function f: a score is nan", "run/unexpected"),
            "^reward function f: a score is nan$",
            RunProblem,
        ),
        (UsageProblem("the key is wrong", "data/row"), "^the key is wrong$", UsageProblem),
        (
            ZeroDivisionError("division by zero"),
            "^slots 0 to 1 of g could not be scored and accepted: ZeroDivisionError: division by zero$",
            RunProblem,
        ),
    ],
)
def test_a_delivery_that_fails_is_told_to_the_conductor_in_a_form_that_ray_delivers(made, raised, told, sort):
    generator, _ = made
    place = Place()
    generator.work(work(place))
    place.grant(chunk())
    until(lambda: place.accept.calls)
    wrapped = RayTaskError("score", "Traceback\nmany\nlines", raised, "ray::Scorer.score()", 1, "127.0.0.1")
    place.accept.calls[0][1].set_exception(wrapped.as_instanceof_cause())
    until(lambda: place.failed.calls)
    name, problem = place.failed.calls[0][0]
    assert name == "g"
    assert type(problem) is sort, "an error of Ray's would be raised at the conductor before its method begins"
    assert re.search(told, str(problem))


def died() -> RayTaskError:
    """What the delivery of a chunk comes to whose scorer died."""
    error = ActorDiedError()
    error.actor_id = "ab"
    task = RayTaskError("accept", "Traceback", error, "ray::EpisodeStream.accept()", 1, "127.0.0.1")
    return task.as_instanceof_cause()


def test_a_chunk_whose_scorer_died_is_scored_again_by_those_that_are_left(made):
    generator, _ = made
    place, other = Place(), Place()
    generator.work(work(place))
    place.grant(chunk())
    until(lambda: place.accept.calls)
    place.accept.calls[0][1].set_exception(died())
    until(lambda: place.scoring_pools.calls)
    assert place.scoring_pools.calls[0][0] == ("ab", None), "the conductor is told who died"
    place.scoring_pools.calls[0][1].set_result(ScoringPools([other], [other]))
    until(lambda: len(place.accept.calls) == 2)
    assert len(place.score.calls) == len(other.score.calls) == len(other.reference_logprobs.calls) == 1
    assert other.score.calls[0][0][0] is place.accept.calls[0][0][0], "the same rows"
    assert not place.failed.calls
    place.accept.calls[1][1].set_result(2)


def test_a_chunk_whose_scorer_broke_is_scored_again_and_the_conductor_hears_who_and_why(made):
    generator, _ = made
    place = Place()
    generator.work(work(place))
    place.grant(chunk())
    until(lambda: place.accept.calls)
    problem = worker_broke("scoring-0.1", "scored 2 responses", RuntimeError("CUDA out of memory"))
    inner = RayTaskError("score", "Traceback", problem)
    place.accept.calls[0][1].set_exception(RayTaskError("accept", "Traceback", inner).as_instanceof_cause())
    until(lambda: place.scoring_pools.calls)
    died, broke = place.scoring_pools.calls[0][0]
    assert (died, broke.who) == (None, "scoring-0.1")
    assert str(broke) == "scoring-0.1 failed while it scored 2 responses: RuntimeError: CUDA out of memory."
    place.scoring_pools.calls[0][1].set_result(ScoringPools([place], [place]))
    until(lambda: len(place.accept.calls) == 2)
    assert not place.failed.calls
    place.accept.calls[1][1].set_exception(RayTaskError("accept", "Traceback", inner).as_instanceof_cause())
    until(lambda: place.failed.calls)  # a second process met it too
    told = place.failed.calls[0][0][1]
    assert str(told) == "scoring-0.1 failed while it scored 2 responses: RuntimeError: CUDA out of memory."
    assert len(place.scoring_pools.calls) == 1


def test_a_chunk_that_no_scorer_survives_ends_the_run(made):
    generator, _ = made
    place = Place()
    generator.work(work(place))
    place.grant(chunk())
    for times in range(1, delivery.SCORING_TRIES + 1):
        until(lambda: len(place.accept.calls) == times)  # noqa: B023 - called at once
        place.accept.calls[-1][1].set_exception(died())
        if times < delivery.SCORING_TRIES:
            until(lambda: len(place.scoring_pools.calls) == times)  # noqa: B023
            place.scoring_pools.calls[-1][1].set_result(ScoringPools([place], [place], {"ab": "reference scoring-3"}))
    until(lambda: place.failed.calls)
    told = str(place.failed.calls[0][0][1])
    assert told.startswith("slots 0 to 1 of g were scored 5 times, and no process survived that: ")
    assert len(place.scoring_pools.calls) == delivery.SCORING_TRIES - 1


def test_the_death_of_the_stream_is_no_scorers_death(made, monkeypatch):
    generator, _ = made
    place = Place()
    monkeypatch.setattr(delivery, "actor_names", lambda actors: {"ab": "the episode stream"})
    generator.work(work(place))
    place.grant(chunk())
    until(lambda: place.accept.calls)
    place.accept.calls[0][1].set_exception(died())
    until(lambda: place.failed.calls)
    assert re.search("^The episode stream died before slots 0 to 1", str(place.failed.calls[0][0][1]))
    assert not place.scoring_pools.calls


def test_a_share_and_scorers_that_the_conductor_tells_of_hold_from_then_on(made):
    generator, engine = made
    place, other = Place(), Place()
    generator.work(work(place, chunk_size=2, share=8))
    until(lambda: place.lease.calls)
    assert place.lease.calls[0][0][1] == 4
    generator.adjust(2, ScoringPools([other], [other]))
    engine.held = True
    place.grant(chunk())
    until(lambda: engine.pending == 2)
    time.sleep(0.05)
    assert len(place.lease.calls) == 1, "it holds its share"
    engine.held = False
    until(lambda: other.score.calls)
    assert not place.score.calls


def test_a_heartbeat_is_answered_while_the_engine_stands_still_and_says_for_how_long(made):
    generator, engine = made
    assert generator.heartbeat().stalled_s == 0.0
    place = Place()
    generator.work(work(place))
    engine.stuck = True
    place.grant(chunk())
    until(lambda: generator.heartbeat().stalled_s > 0.2)
    assert generator.heartbeat().memory_bytes > 10 << 20
    engine.stuck = False
    until(lambda: generator.heartbeat().stalled_s == 0.0)


def test_a_lease_that_is_granted_again_under_way_goes_on_with_what_is_being_generated(made):
    generator, engine = made
    publish(generator, "0.0")
    place = holding(generator, engine, chunk())
    place.grant(chunk(), chunk(2), call=1)  # the lease of slots 0 and 1 ran out meanwhile
    until(lambda: engine.pending == 4)
    engine.held = False
    until(lambda: len(place.accept.calls) == 2)
    delivered = [call[0][0].column("slot").to_pylist() for call in place.accept.calls]
    assert delivered == [[0, 1], [2, 3]]
    assert len(engine.submitted) == len(set(engine.submitted)) == 4
    assert not place.failed.calls


def test_a_chunk_of_a_later_attempt_takes_the_place_of_what_is_being_generated(made):
    generator, engine = made
    publish(generator, "0.0")
    place = holding(generator, engine, chunk(), chunk(2))
    place.grant(chunk(attempt=1), call=1)
    until(lambda: len(engine.submitted) == 6)
    assert engine.pending == 2, "what the stream would refuse is not generated to its end"
    engine.held = False
    until(lambda: place.accept.calls)
    time.sleep(0.05)
    [delivered] = [call[0][0] for call in place.accept.calls]
    assert delivered.column("attempt").to_pylist() == [1, 1]
    assert delivered.column("slot").to_pylist() == [0, 1]
    assert not place.failed.calls


def test_work_that_never_came_to_its_end_is_not_delivered_to_the_next(made):
    generator, engine = made
    place, following = holding(generator, engine, chunk()), Place()
    generator.work(work(following))
    assert engine.pending == 0
    engine.held = False
    following.grant(chunk(2))
    until(lambda: following.accept.calls)
    assert following.accept.calls[0][0][0].column("slot").to_pylist() == [2, 3]
    assert not place.accept.calls


def test_the_first_lease_leaves_the_others_their_share(made):
    generator, engine = made
    place = Place()
    generator.work(work(place, chunk_size=2, share=4))
    until(lambda: place.lease.calls)
    assert place.lease.calls[0][0][1] == 2, "of the engine's room for 4 chunks"
    engine.held = True
    place.grant(chunk())
    until(lambda: len(place.lease.calls) == 2)
    assert place.lease.calls[1][0][1] == 1
    place.grant(chunk(2), call=1)
    until(lambda: engine.pending == 4)
    time.sleep(0.05)
    assert len(place.lease.calls) == 2, "it holds its share"
    engine.held = False
    until(lambda: len(place.lease.calls) == 3)


@pytest.mark.parametrize("tokens", [[1] * 9, "broken"])
def test_weights_that_were_sampled_under_do_not_stay_where_sampling_fails(made, monkeypatch, tokens):
    generator, engine = made
    monkeypatch.setattr(module.ray, "get", lambda reference, timeout: reference)
    publish(generator, "0.7")
    engine.broken = tokens == "broken"
    last = [1] if engine.broken else tokens
    with pytest.raises((UsageProblem, RuntimeError), match=r"does not fit|the engine broke"):
        generator.sample(prompts([1], last), 1, SamplingSettings(max_response_tokens=4), 0, ["average"])
    assert engine.sampled_under == "sample"
    assert engine.version == "0.7"
    assert engine.pending == 0
    engine.broken = False
    place = Place()
    generator.work(work(place))
    place.grant(chunk())
    until(lambda: place.accept.calls)
    assert place.accept.calls[0][0][0].column("version_spans").to_pylist()[0][0]["update"] == 7


def test_where_the_published_weights_cannot_be_put_back_nothing_is_leased_until_others_are_published(made, monkeypatch):
    generator, engine = made
    monkeypatch.setattr(module.ray, "get", lambda reference, timeout: reference)
    publish(generator, "0.7")
    engine.refuses = True
    with pytest.raises(RuntimeError, match="half of it is loaded"):
        generator.sample(prompts([1]), 1, SamplingSettings(max_response_tokens=4), 0, ["average"])
    place = Place()
    generator.work(work(place))
    time.sleep(0.1)
    assert engine.version == "0.7"  # what it calls itself, with weights of the average in it
    assert not place.lease.calls
    engine.refuses = False
    publish(generator, "0.8")
    until(lambda: place.lease.calls)


def test_weights_to_sample_under_that_do_not_come_are_told_of_with_who_owes_them(made, monkeypatch):
    def get(reference: Any, timeout: float) -> Any:
        raise {"late": GetTimeoutError(), "lost": ObjectLostError("0" * 56, None, "")}[reference]

    generator, _ = made
    monkeypatch.setattr(module.ray, "get", get)
    for reference, told in (
        ("late", "^g waited 300 s for the weights to sample under, which the weight store put into the object store"),
        ("lost", "^What g needed was lost with the process that held it, before it had the weights to sample under"),
    ):
        with pytest.raises(RunProblem, match=told):
            generator.sample(prompts([1]), 1, SamplingSettings(), 0, [reference])


def test_every_sequence_of_a_probe_is_scored(made):
    generator, _ = made
    assert generator.probe([[1, 2, 3], [4, 5], [6]]) == [[-2.0, -3.0], [-5.0], []]


def test_a_probe_that_does_not_fit_is_the_callers_and_nothing_of_it_stays(made):
    generator, engine = made
    with pytest.raises(UsageProblem, match="it does not fit"):
        generator.probe([[1, 2], [1] * 9])
    assert engine.pending == 0
    assert generator.probe([[1, 2]]) == [[-2.0]]


def test_whoever_waits_for_an_engine_that_stands_still_is_told(made, monkeypatch):
    generator, engine = made
    monkeypatch.setattr(module, "ENGINE_DEADLINE_S", 0.3)
    engine.stuck = True
    began = time.monotonic()
    with pytest.raises(RunProblem, match=r"^Waited for a probe of g, whose engine has ended no step and no command"):
        generator.probe([[1, 2]])
    with pytest.raises(RunProblem, match=r"^Waited for weights 0\.1 to be loaded of g, whose engine"):
        generator.load("weights", "0.1")
    assert time.monotonic() - began < 30
    engine.stuck = False


def test_commands_beyond_those_of_all_calls_are_refused(made):
    generator, engine = made
    engine.stuck = True
    place = Place()
    generator.work(work(place))
    place.grant(chunk())
    until(lambda: engine.pending == 2)
    time.sleep(0.05)
    for _ in range(module.COMMANDS):
        generator._commands.put_nowait(("between", lambda: None, Future()))
    with pytest.raises(queue.Full):
        generator.load("weights", "0.1")
    engine.stuck = False


def test_an_engine_that_steps_is_waited_for_beyond_the_deadline_of_a_standstill(made, monkeypatch):
    generator, engine = made
    monkeypatch.setattr(module, "ENGINE_DEADLINE_S", 0.3)
    holding(generator, engine, chunk())
    threading.Timer(1.0, lambda: setattr(engine, "held", False)).start()
    generator.rest()
    assert engine.pending == 0


def test_weights_change_between_steps_while_requests_run_and_rest_waits_for_them(made):
    generator, engine = made
    publish(generator, "0.0")
    place = holding(generator, engine, chunk())
    generator.load("weights", "0.1")
    assert engine.version == "0.1"
    assert engine.pending == 2
    generator.confirm("0.1")
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


def test_what_is_written_under_weights_is_delivered_once_they_are_confirmed_and_nothing_is_leased_before(made):
    generator, engine = made
    publish(generator, "0.0")
    place = holding(generator, engine, chunk(), chunk(2), share=6)
    until(lambda: len(place.lease.calls) == 2)
    place.grant(call=1)  # nothing within the call's time
    until(lambda: len(place.lease.calls) == 3)
    engine.at_most = 2  # the first chunk
    engine.held = False
    until(lambda: len(place.accept.calls) == 1)
    generator.load("weights", "0.1")
    engine.at_most = None
    place.grant(call=2)
    until(lambda: engine.pending == 0)
    assert generator.probe([[1, 2]]) == [[-2.0]]
    time.sleep(0.05)
    assert len(place.accept.calls) == 1, "of the weights before"
    assert len(place.lease.calls) == 3
    generator.confirm("0.1")
    until(lambda: len(place.accept.calls) == 2)
    episodes = place.accept.calls[1][0][0]
    assert episodes.column("slot").to_pylist() == [2, 3]
    assert episodes.column("version_spans").to_pylist()[0][0]["update"] == 1
    until(lambda: len(place.lease.calls) == 4)


def test_what_was_written_under_weights_that_are_never_confirmed_is_never_delivered(made):
    generator, engine = made
    publish(generator, "0.0")
    place = holding(generator, engine, chunk())
    generator.load("weights", "0.1")
    engine.held = False
    until(lambda: engine.pending == 0)
    publish(generator, "0.2")
    place.grant(chunk(2), call=1)
    until(lambda: place.accept.calls)
    time.sleep(0.05)
    [delivered] = [call[0][0] for call in place.accept.calls]
    assert delivered.column("slot").to_pylist() == [2, 3]


def test_a_generator_that_rests_waits_until_what_it_holds_is_confirmed(made):
    generator, engine = made
    publish(generator, "0.0")
    place = holding(generator, engine, chunk())
    generator.load("weights", "0.1")
    engine.held = False
    resting = threading.Thread(target=generator.rest)
    resting.start()
    until(lambda: engine.pending == 0)
    resting.join(0.1)
    assert resting.is_alive()
    generator.confirm("0.1")
    resting.join(30)
    assert not resting.is_alive()
    assert len(place.accept.calls) == 1


def test_after_a_load_that_failed_half_way_nothing_is_delivered_or_leased(made):
    generator, engine = made
    publish(generator, "0.0")
    place = holding(generator, engine, chunk())
    engine.refuses = True
    with pytest.raises(RuntimeError, match="half of it is loaded"):
        generator.load("weights", "0.1")
    assert engine.pending == 0
    engine.held = False
    place.grant(chunk(2), call=1)
    time.sleep(0.1)
    assert engine.pending == 0
    assert not place.accept.calls
    assert len(place.lease.calls) == 2
    engine.refuses = False
    publish(generator, "0.2")
    until(lambda: len(place.lease.calls) == 3)
    place.grant(chunk(4), call=2)
    until(lambda: place.accept.calls)
