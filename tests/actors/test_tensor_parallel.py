"""An engine whose model is divided over two processes against one that is whole, and against transformers; as an actor
of Ray, and after the death of a part."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import toy_engine
from toy_engine import reference_logprobs, snapshot_of

from actors import rollout_engine
from actors.rollout_engine import Request, RolloutEngine, probe_request
from actors.settings import RolloutSettings
from actors.snapshot_files import in_shared_memory, map_snapshot
from corpus.problems import RunProblem
from models.snapshot import Snapshot, verify
from tests.toy_llama import make_llama

CONTEXT = 64
TOLERANCE_NATS = 5e-5
"""Sums over two parts are rounded otherwise; the same as between engine and transformers."""

DIVIDED = RolloutSettings(max_concurrent=8, kv_cache_mib=32, tensor_parallel=2, threads=2)


def test_a_snapshot_in_shared_memory_is_read_by_path_and_leaves_nothing_behind():
    snapshot = snapshot_of(make_llama(0, CONTEXT), 3)
    with in_shared_memory(snapshot) as path:
        found = map_snapshot(path)
    verify(found)
    assert (found.version, found.manifest) == ((0, 3), snapshot.manifest)
    np.testing.assert_array_equal(found.buffer, snapshot.buffer)
    assert not path.exists()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_engine.save_model(tmp_path_factory.mktemp("model"), CONTEXT)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[RolloutEngine]:
    engine = RolloutEngine(str(directory), DIVIDED, CONTEXT)
    yield engine
    engine.close()


def requests(count: int) -> list[Request]:
    return [Request(f"r{i}", [5 + (7 * i + j) % 80 for j in range(3 + i)], 12, 1.0, seed=100 + i) for i in range(count)]


def error_nats(model_seed: int, prompt: Any, tokens: Any, logprobs: Any) -> float:
    """How far the log-probabilities of `tokens` are from those of transformers with the weights of `model_seed`."""
    return float(np.abs(logprobs - reference_logprobs(make_llama(model_seed, CONTEXT), prompt, tokens, 1.0)).max())


def parts(owner: int | None = None) -> list[psutil.Process]:
    """The processes below `owner`, or this one, that hold a part of a model."""
    return [each for each in psutil.Process(owner).children(recursive=True) if "Worker_TP" in " ".join(each.cmdline())]


@pytest.mark.slow
def test_a_divided_engine_draws_what_a_whole_one_draws(engine, directory):
    whole = RolloutEngine(str(directory), RolloutSettings(max_concurrent=8, kv_cache_mib=32), CONTEXT)
    try:
        for each in (engine, whole):
            each.load(snapshot_of(make_llama(0, CONTEXT), 0), "0.0")
        assert len(parts()) == 2
        for divided, single in zip(engine.run(requests(4)), whole.run(requests(4)), strict=True):
            assert divided.tokens == single.tokens
            np.testing.assert_allclose(divided.logprobs, single.logprobs, atol=TOLERANCE_NATS)
    finally:
        whole.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_new_weights_reach_every_part_in_mid_response_and_a_probe_sees_them(engine):
    engine.load(snapshot_of(make_llama(0, CONTEXT), 0), "0.0")
    engine.submit(Request("long", [5, 9, 33], 40, 1.0, seed=2))
    for _ in range(5):
        engine.step()
    engine.load(snapshot_of(make_llama(1, CONTEXT), 1), "0.1")
    [completion] = [done for _ in iter(lambda: engine.pending, 0) for done in engine.step()]
    assert [span.version for span in completion.spans] == ["0.0", "0.1"]
    cut = completion.spans[0].end
    old, new = completion.tokens[:cut], completion.tokens[cut:]
    assert error_nats(0, [5, 9, 33], old, completion.logprobs[:cut]) < TOLERANCE_NATS
    assert error_nats(1, [5, 9, 33, *old], new, completion.logprobs[cut:]) < TOLERANCE_NATS

    tokens = [5, 9, 33, 60, 61, 7]
    [probe] = engine.run([probe_request("probe", tokens)])
    assert error_nats(1, tokens[:1], tokens[1:], probe.prompt_logprobs) < TOLERANCE_NATS
    assert error_nats(0, tokens[:1], tokens[1:], probe.prompt_logprobs) > 1e-2  # the check would see the old weights


@pytest.mark.slow
def test_each_part_checks_what_it_maps(engine, monkeypatch):
    @contextmanager
    def damaged(snapshot: Snapshot) -> Iterator[Path]:
        buffer = snapshot.buffer.copy()
        buffer[7] ^= 1
        with in_shared_memory(dataclasses.replace(snapshot, buffer=buffer)) as path:
            yield path

    with monkeypatch.context() as patch:
        patch.setattr(rollout_engine, "in_shared_memory", damaged)
        with pytest.raises(RunProblem, match=r"Weights 0\.2 could not be received over object_store: .*is damaged"):
            engine.load(snapshot_of(make_llama(2, CONTEXT), 2), "0.2")


@pytest.mark.slow
def test_an_engine_that_loses_a_part_says_so_and_stops(engine):
    part = parts()[-1]
    part.kill()
    with pytest.raises(RuntimeError):
        engine.run(requests(1))


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.timeout(600)
def test_an_actor_with_a_divided_engine_takes_a_publication_and_dies_with_any_part_of_it(directory):
    import ray
    from ray.exceptions import ActorDiedError

    from actors.generator import RolloutGenerator
    from cluster.bundles import bundle_of
    from cluster.placement import OwnPlacementGroup
    from cluster.session import session

    with session(None, cpus=2):
        placement = OwnPlacementGroup(bundle_of(DIVIDED.threads))
        room = placement.reserve("generator-0")
        made: Any = RolloutGenerator
        actor = made.options(num_cpus=DIVIDED.threads, **placement.options(room)).remote("generator-0", DIVIDED)
        assert ray.get(actor.start.remote(str(directory), str(directory), CONTEXT), timeout=300) == "generator-0"
        ray.get(actor.load.remote(snapshot_of(make_llama(1, CONTEXT), 1), "0.1"), timeout=120)
        tokens = [5, 9, 33, 60, 61, 7]
        [probe] = ray.get(actor.probe.remote([tokens]), timeout=120)
        assert error_nats(1, tokens[:1], tokens[1:], np.array(probe)) < TOLERANCE_NATS
        pid = ray.get(actor.heartbeat.remote(), timeout=60).pid
        mine = parts(pid)
        assert len(mine) == 2, psutil.Process(pid).children(recursive=True)
        mine[1].kill()  # while nothing is asked of the engine
        _, alive = psutil.wait_procs(mine, timeout=60)
        assert alive == []
        with pytest.raises(ActorDiedError):
            ray.get(actor.probe.remote([tokens]), timeout=60)
        placement.release(room)
