"""The vLLM engine wrapper against transformers: log-probabilities, weight changes, seeds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_engine
from toy_engine import reference_logprobs, snapshot_of

from actors.rollout_engine import Request, RolloutEngine, free_share, probe_request
from actors.settings import RolloutSettings
from corpus.problems import RunProblem, UsageProblem
from models.snapshot import Snapshot, pack
from tests import toy_llama

pytestmark = pytest.mark.slow

CONTEXT = 64


def make_model(seed: int):
    return toy_llama.make_llama(seed, CONTEXT)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_engine.save_model(tmp_path_factory.mktemp("model"), CONTEXT)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[RolloutEngine]:
    settings = RolloutSettings(max_concurrent=8, kv_cache_mib=16)
    engine = RolloutEngine(str(directory), settings, CONTEXT)
    yield engine
    engine.close()
    if torch.distributed.is_initialized():  # vLLM makes a group of its own; what is tested next makes another
        torch.distributed.destroy_process_group()


def requests(count: int, temperature: float = 1.0, max_tokens: int = 12) -> list[Request]:
    return [
        Request(f"r{i}", [5 + (7 * i + j) % 80 for j in range(3 + i)], max_tokens, temperature, seed=100 + i)
        for i in range(count)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers_at_the_same_temperature(engine, temperature):
    engine.load(snapshot_of(make_model(0), 0), "0.0")
    batch = requests(4, temperature)
    for request, completion in zip(batch, engine.run(batch), strict=True):
        expected = reference_logprobs(make_model(0), request.prompt_tokens, completion.tokens, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=5e-5)
        other = reference_logprobs(make_model(0), request.prompt_tokens, completion.tokens, temperature * 1.3)
        assert np.abs(completion.logprobs - other).max() > 1e-2  # the check would see a wrong temperature


def test_a_response_depends_on_its_seed_and_not_on_its_neighbours(engine):
    engine.load(snapshot_of(make_model(0), 0), "0.0")
    together = {c.key: c for c in engine.run(requests(6))}
    alone = engine.run(requests(6)[4:5])[0]
    assert alone.tokens == together["r4"].tokens
    assert alone.logprobs == together["r4"].logprobs
    first = requests(6)[4]
    reseeded = engine.run([Request("x", first.prompt_tokens, 12, 1.0, seed=9)])[0]
    assert reseeded.tokens != alone.tokens


def test_weights_loaded_in_mid_flight_write_the_rest_and_say_so(engine):
    before, after = make_model(0), make_model(1)
    engine.load(snapshot_of(before, 0), "0.0")
    batch = requests(3, max_tokens=20)
    for request in batch:
        engine.submit(request)
    done = []
    for _ in range(5):
        done += engine.step()
    pause_s = engine.load(snapshot_of(after, 1), "0.1")
    assert pause_s > 0
    while engine.pending:
        done += engine.step()
    mixed = 0
    for request in batch:
        completion = next(c for c in done if c.key == request.key)
        spans = completion.spans
        assert spans[0].start == 0
        assert spans[-1].end == len(completion.tokens)
        for span in spans:
            model = {"0.0": before, "0.1": after}[span.version]
            # All keys and values were recomputed: each token is scored by one model over the whole sequence so far.
            expected = reference_logprobs(model, request.prompt_tokens, completion.tokens, 1.0)
            np.testing.assert_allclose(
                completion.logprobs[span.start : span.end], expected[span.start : span.end], atol=5e-5
            )
        mixed += len(spans) > 1
    assert mixed


def test_more_prompt_tokens_than_a_step_reads_change_no_response(engine):
    engine.load(snapshot_of(make_model(0), 0), "0.0")
    alone = engine.run([Request("alone", [5 + j % 80 for j in range(50)], 4, 1.0, seed=7)])[0]
    many = [Request(f"m{i}", [5 + (i + j) % 80 for j in range(50)], 4, 1.0, seed=7 + i) for i in range(120)]
    together = engine.run(many)
    assert len(together) == 120
    assert together[0].tokens == alone.tokens


def test_the_probe_sees_what_the_weights_are(engine):
    tokens = [5, 9, 33, 60, 12, 7]
    for seed in (2, 3):
        engine.load(snapshot_of(make_model(seed), seed), f"0.{seed}")
        expected = reference_logprobs(make_model(seed), tokens[:1], tokens[1:], 1.0)
        np.testing.assert_allclose(engine.run([probe_request("p", tokens)])[0].prompt_logprobs, expected, atol=5e-5)


def test_sequences_of_a_probe_are_scored_side_by_side_while_responses_are_written(engine):
    engine.load(snapshot_of(make_model(2), 2), "0.2")
    written = requests(2, max_tokens=30)
    sequences = [[5, 9, 33, 60], [5, 9, 33, 61, 8, 7, 20], [70, 71], [5 + j % 80 for j in range(CONTEXT - 1)]]
    for request in [*written, *(probe_request(f"p{row}", tokens) for row, tokens in enumerate(sequences))]:
        engine.submit(request)
    done = {}
    while engine.pending:
        done |= {completion.key: completion for completion in engine.step()}
    assert len(done) == 6
    for row, tokens in enumerate(sequences):
        expected = reference_logprobs(make_model(2), tokens[:1], tokens[1:], 1.0)
        np.testing.assert_allclose(done[f"p{row}"].prompt_logprobs, expected, atol=5e-5)


def test_what_is_aborted_comes_to_no_end_and_the_rest_is_as_it_was(engine):
    engine.load(snapshot_of(make_model(0), 0), "0.0")
    alone = {completion.key: completion.tokens for completion in engine.run(requests(4))}
    for request in requests(4):
        engine.submit(request)
    done = engine.step()
    pending = engine.pending
    engine.abort(["r0", "r3", "unknown"])
    assert engine.pending == pending - 2
    while engine.pending:
        done += engine.step()
    assert {completion.key: completion.tokens for completion in done} == {key: alone[key] for key in ("r1", "r2")}
    assert engine.run(requests(1))[0].tokens == alone["r0"]


def test_a_batch_that_cannot_be_run_leaves_nothing_in_the_engine(engine):
    engine.load(snapshot_of(make_model(0), 0), "0.0")
    with pytest.raises(UsageProblem, match="do not fit the context"):
        engine.run([*requests(3), Request("long", [5] * 60, 5, 1.0, seed=0)])
    assert engine.pending == 0
    assert len(engine.run(requests(3))) == 3


def test_a_damaged_or_foreign_snapshot_is_refused_and_the_weights_stay(engine):
    engine.load(snapshot_of(make_model(0), 0), "0.0")
    kept = engine.run(requests(1))[0]
    good = snapshot_of(make_model(1), 1)
    bad = good.buffer.copy()
    bad[100] ^= 1
    with pytest.raises(RunProblem, match="damaged"):
        engine.load(Snapshot(good.version, bad, good.manifest, good.checksum), "0.1")
    fewer = dict(list(make_model(1).named_parameters())[:-1])
    with pytest.raises(RunProblem, match="do not name the same tensors"):
        engine.load(pack(fewer, (0, 1)), "0.1")
    again = engine.run(requests(1))[0]
    assert again.tokens == kept.tokens
    assert {span.version for span in again.spans} == {"0.0"}


def test_a_prompt_beyond_the_context_is_refused(engine):
    with pytest.raises(UsageProblem, match="do not fit the context of 64 tokens"):
        engine.submit(Request("long", [5] * 60, 5, 1.0, seed=0))


@pytest.mark.parametrize("gpus", [0.25, 0.5, 1.0])
def test_an_engine_asks_no_more_of_a_shared_gpu_than_its_share_of_it(gpus):
    from types import SimpleNamespace
    from typing import Any

    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    total = 80 << 30

    def start(free_bytes: float, share: float) -> int:
        device: Any = SimpleNamespace(total_memory=total, free_memory=int(free_bytes), device_="cuda:0")
        cache: Any = SimpleNamespace(gpu_memory_utilization=share)
        return request_memory(device, cache)

    start(0.95 * gpus * total, free_share(gpus))
    with pytest.raises(ValueError, match="Free memory on device cuda:0"):
        start(0.8 * gpus * total, free_share(gpus))
    if gpus < 1:
        with pytest.raises(ValueError, match="Free memory on device cuda:0"):
            start(0.85 * total, CacheConfig().gpu_memory_utilization)  # what vLLM asks for by itself
