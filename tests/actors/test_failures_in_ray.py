"""Failures on their way between real actors: whoever waits at the stream is told within seconds, in one sentence.

Stream, conductor, store and a scoring process are actors; the generator's class runs here, with a stand-in engine.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError
from stand_in_engine import StandInEngine

from actors.conductor import Conductor, Probe
from actors.failures import plain_problem
from actors.generator import RolloutGenerator, Work
from actors.settings import RolloutSettings, SamplingSettings
from actors.stream import EpisodeStream, StreamPlan
from actors.weight_store import WeightStore
from amenable.remote_problems import problem_in
from corpus.problems import RunProblem, UsageProblem
from corpus.schemas import make_table, write_table
from models.snapshot import pack

pytestmark = pytest.mark.slow

WAIT_S = 60.0
AGAIN = "its process was killed or crashed; the same command continues from what was last saved."


def scoring(ray: Any) -> Any:
    """A process that scores, and fails at it as it is told. Defined here, so that Ray takes it along by value."""

    @ray.remote(num_cpus=0)
    class Scoring:
        def __init__(self, failure: BaseException | str) -> None:
            self.failure = failure

        def score(self, episodes: Any) -> list[float]:
            if isinstance(self.failure, BaseException):
                raise self.failure
            os._exit(1)

        def reference_logprobs(self, episodes: Any, temperature: float) -> list[list[float]]:
            return [[-1.0]] * episodes.num_rows

    return Scoring


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    columns = {"prompt_id": ["p"], "user_id": ["u"], "prompt": ["?"], "prompt_tokens": [[1, 2]], "meta": [""]}
    write_table(make_table("prompts", columns), path, "prompts")
    return path


@pytest.fixture
def cast(ray_session, table, tmp_path):
    """(stream, conductor, store): real actors, which are killed afterwards."""
    plan = StreamPlan(
        prompts=str(table),
        directory=str(tmp_path / "episodes"),
        seed=0,
        round_number=1,
        batch_size=2,
        chunk_size=2,
        max_staleness=0,
        batches=1,
        lease_s=60,
    )
    stream: Any = EpisodeStream.remote(plan)  # pyright: ignore
    store: Any = WeightStore.remote(str(tmp_path / "weights"))  # pyright: ignore
    conductor: Any = Conductor.remote(stream, store, 30.0, 30.0)  # pyright: ignore
    yield stream, conductor, store
    for each in (conductor, store, stream):
        ray_session.kill(each)


def raised(ray: Any, call: Any) -> BaseException:
    with pytest.raises((RunProblem, UsageProblem)) as found:
        ray.get(call, timeout=WAIT_S)
    cause: Any = found.value
    while isinstance(getattr(cause, "cause", None), BaseException):
        cause = cause.cause
    return cause


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (RunProblem("reward function f: a score is nan.", "run/unexpected"), "reward function f: a score is nan."),
        pytest.param(
            UsageProblem("reward x: no such thing.", "data/row"),
            "reward x: no such thing.",
            marks=pytest.mark.extended,
        ),
        (
            ZeroDivisionError("division by zero"),
            "slots 0 to 1 of g could not be scored and accepted: ZeroDivisionError: division by zero",
        ),
        (
            "dies",
            "scoring-0 was lost (its process was killed or crashed), and nothing is known of how to make another; the "
            "same command continues from what was last saved.",
        ),
    ],
)
def test_whoever_waits_for_a_batch_hears_why_it_cannot_be_scored(ray_session, cast, failure, told):
    stream, conductor, _ = cast
    scorer = scoring(ray_session).remote(failure)
    generator: Any = RolloutGenerator.__ray_metadata__.modified_class("g", RolloutSettings(max_concurrent=8))  # pyright: ignore
    generator._engine = StandInEngine()
    work = Work("r", 1, stream, conductor, [scorer], [scorer], SamplingSettings(max_response_tokens=4), 2, 2)
    ray_session.get(conductor.begin.remote({}, work), timeout=WAIT_S)
    taking = stream.take.remote(0, 600.0, 0)
    began = time.monotonic()
    generator.load("weights", "0.0")
    generator.confirm("0.0")
    generator.work(work)
    problem = raised(ray_session, taking)
    assert time.monotonic() - began < WAIT_S / 2
    assert type(problem) is (UsageProblem if isinstance(failure, UsageProblem) else RunProblem)
    assert str(problem) == told
    generator.rest()
    ray_session.kill(scorer)


def test_a_store_and_a_stream_that_died_are_named(ray_session, cast):
    stream, conductor, store = cast
    work = Work("r", 1, stream, conductor, [], [], SamplingSettings(), 2, 2)
    ray_session.get(conductor.begin.remote({}, work), timeout=WAIT_S)
    snapshot = pack({"weight": torch.ones(3)}, (0, 0))
    assert ray_session.get(store.put.remote(snapshot), timeout=WAIT_S)
    ray_session.kill(store)
    problem = raised(ray_session, conductor.publish.remote(0, 0, snapshot, Probe([[1, 2]], [[-1.0]], 1.0)))
    assert str(problem) == f"The weight store died before it could take new weights: {AGAIN}"
    ray_session.kill(stream)
    problem = raised(ray_session, conductor.failed.remote("g", RunProblem("it broke", "run/unexpected")))
    assert str(problem) == f"The episode stream died before it could take note of a failure: {AGAIN}"


def test_a_store_that_was_killed_and_started_again_hands_out_what_it_had(ray_session, cast, tmp_path):
    _, _, store = cast
    snapshot = pack({"weight": torch.full((3,), 4.0)}, (0, 6))
    ray_session.get(store.put.remote(snapshot), timeout=WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while ray_session.get(store.state.remote(), timeout=WAIT_S).writing:
        assert time.monotonic() < deadline, "it is still being written"
    ray_session.kill(store)
    again: Any = WeightStore.remote(str(tmp_path / "weights"))  # pyright: ignore
    version, [reference] = ray_session.get(again.newest.remote(), timeout=WAIT_S)
    found = ray_session.get(reference, timeout=WAIT_S)
    assert version == found.version == (0, 6)
    assert (found.buffer == snapshot.buffer).all()
    ray_session.kill(again)


def test_a_stream_whose_prompts_cannot_be_read_tells_why_and_with_its_code(ray_session, tmp_path):
    plan = StreamPlan(
        prompts=str(tmp_path / "nowhere.parquet"),
        directory=str(tmp_path),
        seed=0,
        round_number=1,
        batch_size=2,
        chunk_size=2,
        max_staleness=0,
        batches=1,
        lease_s=60.0,
    )
    stream: Any = EpisodeStream.remote(plan)  # pyright: ignore
    with pytest.raises(RayActorError) as found:
        ray_session.get(stream.counts.remote(), timeout=WAIT_S)
    for problem in (plain_problem(found.value, {}, "the stream", "it began", "it failed"), problem_in(found.value)):
        assert isinstance(problem, UsageProblem)
        assert "there is no such file; a prompts table was expected" in str(problem)
        assert problem.code == "data/not-found"
