"""What each role of a PPO stage exports, with a meter in Ray's place."""

import asyncio
import math
import pickle
import time
from typing import Any

import pytest
import torch
from recording_meter import RecordingMeter
from stand_in_cast import QUICK, until

from actors import scoring as scoring_processes
from actors import telemetry, weight_store
from actors.attempts import write_counts
from actors.exported_metrics import (
    FLEET_LOSSES,
    FLEET_WANTED,
    FLEET_WORKERS,
    PROCESS_MEMORY,
    PUBLICATION_BEGUN,
    PUBLICATION_FAILURES,
    PUBLICATION_LOSSES,
    PUBLICATION_SECONDS,
    PUBLICATION_UPDATE,
    PUBLICATIONS,
    SCORING_NON_FINITE,
    STORE_SNAPSHOT,
    STORE_UPDATE,
    STORE_WRITE_FAILURES,
    STREAM_AWAITED,
    STREAM_SLOTS,
    STREAM_TRAINED,
    STREAM_WAITING,
    WORKER_BUSY,
    WORKER_MEMORY,
    WORKER_STALLED,
    WORKER_TOKENS,
)
from actors.failures import WorkerBroke
from actors.generator import RolloutGenerator
from actors.scoring import ScoringWorker
from actors.settings import RolloutSettings, ScoringSettings
from actors.stream import EpisodeStream, StreamPlan
from actors.weight_store import WeightStore
from corpus.problems import RunProblem
from corpus.schemas import make_table, write_table
from models.snapshot import Snapshot, pack


@pytest.fixture
def meter(monkeypatch) -> RecordingMeter:
    made = RecordingMeter()
    monkeypatch.setattr(telemetry, "_ray_meter", lambda: made)
    monkeypatch.setenv(telemetry.RUN, "demo")
    return made


def plain(actor: Any) -> Any:
    return actor.__ray_metadata__.modified_class


# conductor and fleet --------------------------------------------------------------------------------------------------


def test_a_publication_is_exported_while_it_is_under_way_and_when_it_is_over(play, meter):
    async def scene(cast) -> None:
        await cast.publish(3)

    play(scene)
    begun = [value for name, value in meter.history if name == PUBLICATION_BEGUN.name]
    assert begun[0] > 1e9
    assert begun[-1] == 0
    assert meter.of(PUBLICATIONS) == 1
    assert meter.of(PUBLICATION_FAILURES) is None
    assert meter.of(PUBLICATION_UPDATE, role="conductor") == 3
    assert len(meter.observed[PUBLICATION_SECONDS.name]) == 1
    assert meter.of(PUBLICATION_LOSSES) is None


def test_a_publication_that_fails_is_counted_and_its_generators_with_it(play, meter):
    async def scene(cast) -> None:
        with pytest.raises(RunProblem, match="do not fit together"):
            await cast.publish()

    play(scene, one=1.0, two=1.0)
    assert meter.of(PUBLICATION_FAILURES) == 1
    assert meter.of(PUBLICATIONS) is None
    assert meter.of(PUBLICATION_BEGUN) == 0
    assert meter.of(PUBLICATION_LOSSES, reason="refused") == 2


def test_the_fleet_is_exported_at_every_heartbeat_by_role_and_state(play, meter):
    async def scene(cast) -> None:
        await cast.publish()
        await until(lambda: meter.of(FLEET_WORKERS, role="generator", state="healthy") == 2)
        cast.conductor._fleet.generators.give_up("one", 0, "of a test")
        await until(lambda: meter.of(FLEET_LOSSES, role="generator") == 1)
        await until(lambda: meter.of(FLEET_WORKERS, role="generator", state="healthy") == 1)

    play(scene, settings=QUICK)
    assert meter.of(FLEET_WANTED, role="generator") == 2
    assert meter.of(FLEET_LOSSES, role="scoring") is None
    assert (meter.of(PROCESS_MEMORY, role="conductor") or 0) > 1e6


# stream ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(meter, tmp_path) -> Any:
    columns = {"prompt_id": ["p"], "user_id": ["u"], "prompt": ["?"], "prompt_tokens": [[1]], "meta": [""]}
    path = tmp_path / "prompts.parquet"
    write_table(make_table("prompts", columns), path, "prompts")
    return plain(EpisodeStream)(
        StreamPlan(
            prompts=str(path),
            directory=str(tmp_path / "episodes"),
            seed=1,
            round_number=1,
            batch_size=4,
            chunk_size=2,
            max_staleness=0,
            batches=3,
            lease_s=60.0,
            run="demo",
        )
    )


def test_the_stream_says_since_when_its_learners_wait(stream, meter):
    async def scene() -> None:
        assert meter.of(STREAM_AWAITED) == 0
        waits = [asyncio.ensure_future(stream.take(0, 60.0, 0)) for _ in range(2)]  # two ranks
        await asyncio.sleep(0)
        since = meter.of(STREAM_AWAITED, run="demo", role="stream")
        assert since is not None
        assert since > 1e9
        await stream.fail(RunProblem("of a test", "episodes/deadline"))
        await asyncio.gather(*waits, return_exceptions=True)
        assert meter.of(STREAM_AWAITED) == 0

    asyncio.run(scene())
    assert (meter.of(STREAM_TRAINED) or 0) > 1e9


def test_the_stream_exports_what_became_of_slots(stream, meter):
    async def scene() -> None:
        await stream.advance(0, 0)
        await stream.lease("a", 2, 0.0)
        await stream.counts()
        await stream.counts()

    asyncio.run(scene())
    assert meter.of(STREAM_SLOTS, outcome="leased") == 4
    assert meter.of(STREAM_SLOTS, outcome="trained") is None
    assert meter.of(STREAM_WAITING) == 0
    assert (meter.of(PROCESS_MEMORY, role="stream") or 0) > 1e6


def test_a_stream_that_goes_on_from_a_checkpoint_counts_its_own_alone(stream, meter, tmp_path):
    (tmp_path / "attempts").mkdir()
    write_counts(tmp_path, {0: {"leased": 100, "generated": 90}})

    async def scene() -> None:
        await stream.restore(None, None, 1)
        await stream.advance(1, 0)
        await stream.lease("a", 1, 0.0)
        assert (await stream.counts())["stream/leased"] == 102

    asyncio.run(scene())
    assert meter.of(STREAM_SLOTS, outcome="leased") == 2


# generators, scoring, weight store ------------------------------------------------------------------------------------


def test_a_heartbeat_exports_work_tokens_and_memory(meter):
    generator = plain(RolloutGenerator)("generator-0", RolloutSettings())
    generator._busy_s, generator._response_tokens = 4.0, 50
    generator.heartbeat()
    generator._busy_s = 6.0
    generator.heartbeat()
    labels = {"run": "demo", "role": "generator", "worker": "generator-0"}
    assert meter.of(WORKER_BUSY, **labels) == 6.0
    assert meter.of(WORKER_TOKENS, **labels) == 50
    assert (meter.of(WORKER_MEMORY, **labels) or 0) > 1e6
    assert meter.of(WORKER_STALLED, **labels) == 0


class Reward:
    def __init__(self, scores: list[float]) -> None:
        self._scores = scores

    def score(self, *given: Any) -> list[float]:
        return self._scores


def test_rewards_that_are_not_finite_are_counted_before_the_run_stops(meter, monkeypatch):
    monkeypatch.setattr(scoring_processes, "decode_responses", lambda tokenizer, rows: [""] * len(rows))
    scoring = plain(ScoringWorker)("scoring-0", ScoringSettings())
    scoring._reward = Reward([1.0, 2.0])
    scoring.score_pairs([[1], [1]], [[2], [2]])
    assert meter.of(SCORING_NON_FINITE) is None
    scoring._reward = Reward([math.nan, math.inf])
    with pytest.raises(RunProblem, match="not a number"):
        scoring.score_pairs([[1], [1]], [[2], [2]])
    assert meter.of(SCORING_NON_FINITE, role="scoring", worker="scoring-0") == 2
    scoring.heartbeat()
    assert meter.of(WORKER_TOKENS, role="scoring") == 8


def test_what_nobody_foresaw_while_rewards_are_made_is_told_as_the_workers_own(meter, monkeypatch):
    monkeypatch.setattr(scoring_processes, "decode_responses", lambda tokenizer, rows: [""] * len(rows))
    scoring = plain(ScoringWorker)("scoring-0", ScoringSettings())

    class Broken:
        def __init__(self, error: Exception) -> None:
            self._error = error

        def score(self, *given: Any) -> list[float]:
            raise self._error

    scoring._reward = Broken(RuntimeError("CUDA out of memory"))
    with pytest.raises(WorkerBroke) as found:
        scoring.score_pairs([[1], [1]], [[2], [2]])
    broke = pickle.loads(pickle.dumps(found.value))
    assert str(broke) == ("scoring-0 failed while it scored 2 responses: RuntimeError: CUDA out of memory.")
    assert (broke.who, broke.code) == ("scoring-0", "run/unexpected")
    scoring._reward = Broken(RunProblem("reward function f: a score is nan.", "reward/scores"))
    with pytest.raises(RunProblem) as foreseen:
        scoring.score_pairs([[1]], [[2]])
    assert foreseen.value.code == "reward/scores", "another process would meet it too"


def test_the_weight_store_exports_its_newest_snapshot(meter, monkeypatch):
    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    store = plain(WeightStore)(None, "demo")
    snapshot = pack({"weight": torch.ones(3)}, (0, 7))
    store.put(snapshot)
    assert meter.of(STORE_SNAPSHOT, run="demo", role="weight_store") == snapshot.buffer.nbytes
    assert meter.of(STORE_UPDATE) == 7
    store.figures()
    assert (meter.of(PROCESS_MEMORY, role="weight_store") or 0) > 1e6


def test_weights_that_cannot_be_written_are_counted(meter, monkeypatch, tmp_path):
    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    store = plain(WeightStore)(str(tmp_path / "weights"), "demo")

    def full(snapshot: Snapshot) -> None:
        raise OSError("the disk is full")

    store._files.save = full
    store.put(pack({"weight": torch.ones(3)}, (0, 7)))
    deadline = time.monotonic() + 20
    while meter.of(STORE_WRITE_FAILURES, place="disk") is None:
        assert time.monotonic() < deadline, "the failure of a write was still to be counted"
        time.sleep(0.01)
    assert meter.of(STORE_WRITE_FAILURES) == 1
