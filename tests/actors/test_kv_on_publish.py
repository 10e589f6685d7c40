"""Keys and values across a change of weights, on real engines: recomputed or kept, never read by who begins anew."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_engine import save_model, snapshot_of

from actors.rollout_engine import Completion, Request, RolloutEngine, probe_request
from actors.settings import RolloutSettings
from tests.toy_llama import make_llama

pytestmark = pytest.mark.slow

CONTEXT = 512
PROMPT = [5 + (7 * place) % 80 for place in range(300)]
"""Longer than two blocks of the cache, which a request with the same beginning could read."""
STEPS = 5
CLOSE_NATS = 5e-5
FAR_NATS = 1e-2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), CONTEXT)


def made(directory: Path, kv_on_publish: str) -> RolloutEngine:
    settings = RolloutSettings.model_validate({"max_concurrent": 2, "kv_cache_mib": 16, "kv_on_publish": kv_on_publish})
    return RolloutEngine(str(directory), settings, CONTEXT)


@pytest.fixture(scope="module")
def engines(directory: Path) -> Iterator[dict[str, RolloutEngine]]:
    """One of either kind, and one that never holds any weights but those of seed 1."""
    engines = {"keep": made(directory, "keep"), "recompute": made(directory, "recompute")}
    engines["fresh"] = made(directory, "recompute")
    engines["fresh"].load(snapshot_of(make_llama(1, CONTEXT), 1), "0.1")
    yield engines
    for engine in engines.values():
        engine.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def request(key: str, seed: int = 3, max_tokens: int = 24) -> Request:
    return Request(key, PROMPT, max_tokens, 1.0, seed)


def drain(engine: RolloutEngine) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    while engine.pending:
        done |= {completion.key: completion for completion in engine.step()}
    return done


def published_in_mid_response(engine: RolloutEngine, *others: Request) -> tuple[dict[str, Completion], int, int]:
    """Weights of seed 1 loaded after some steps of "running", with `others` waiting; what came of all, and the cached
    tokens before and after the load."""
    engine.load(snapshot_of(make_llama(0, CONTEXT), 0), "0.0")
    engine.submit(request("running"))
    engine.submit(request("neighbour", seed=4))
    for other in others:
        engine.submit(other)
    for _ in range(STEPS):
        engine.step()
    before = engine.cached_tokens
    engine.load(snapshot_of(make_llama(1, CONTEXT), 1), "0.1")
    after = engine.cached_tokens
    return drain(engine), before, after


def under_fresh_weights(engines: dict[str, RolloutEngine], completion: Completion) -> np.ndarray:
    """Log-probabilities of a response's tokens after PROMPT, as the engine says that knows no other weights."""
    scored = engines["fresh"].run([probe_request("score", [*PROMPT, *completion.tokens])])[0].prompt_logprobs
    assert scored is not None
    return scored[len(PROMPT) - 1 :]


def start_of_rest(completion: Completion) -> int:
    assert [span.version for span in completion.spans] == ["0.0", "0.1"]
    return completion.spans[1].start


def furthest_nats(engines: dict[str, RolloutEngine], completion: Completion) -> float:
    start = start_of_rest(completion)
    return float(np.abs(completion.logprobs - under_fresh_weights(engines, completion))[start:].max())


def test_recomputed_the_rest_of_a_response_is_what_a_fresh_engine_says(engines):
    done, before, after = published_in_mid_response(engines["recompute"])
    assert before > 2 * len(PROMPT)
    assert after == 0
    for completion in done.values():
        assert furthest_nats(engines, completion) < CLOSE_NATS
        start = start_of_rest(completion)
        earlier = completion.logprobs[:start] - under_fresh_weights(engines, completion)[:start]
        assert np.abs(earlier).max() > FAR_NATS  # the fresh engine does tell the weights apart


def test_kept_the_rest_of_a_response_reads_what_the_old_weights_wrote(engines):
    done, before, after = published_in_mid_response(engines["keep"])
    assert before == after > 2 * len(PROMPT)
    for completion in done.values():
        start = start_of_rest(completion)
        tokens = torch.tensor([[*PROMPT, *completion.tokens]])
        cached = len(PROMPT) + start - 1  # the last token of the old weights is read by the new ones
        with torch.no_grad():
            old = make_llama(0, CONTEXT)(tokens[:, :cached], use_cache=True).past_key_values
            logits = make_llama(1, CONTEXT)(tokens[:, cached:-1], past_key_values=old).logits[0]
        rest = tokens[0, cached + 1 :]
        expected = torch.log_softmax(logits, -1).gather(1, rest[:, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs[start:], expected, atol=CLOSE_NATS)
        assert furthest_nats(engines, completion) > FAR_NATS  # which is not what the new weights alone would say


def test_kept_a_request_that_begins_reads_nothing_of_older_weights(engines):
    engine = engines["keep"]
    done, _, _ = published_in_mid_response(engine, request("waiting", seed=8))
    [later, probe] = engine.run([request("later", seed=8), probe_request("probe", [*PROMPT, 7, 9])])
    [expected] = engines["fresh"].run([request("x", seed=8)])
    for completion in (done["waiting"], later):
        assert completion.tokens == expected.tokens
        np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=CLOSE_NATS)
    [scored] = engines["fresh"].run([probe_request("probe", [*PROMPT, 7, 9])])
    np.testing.assert_allclose(probe.prompt_logprobs, scored.prompt_logprobs, atol=CLOSE_NATS)


@pytest.mark.parametrize("key", ["waiting", "later"])
def test_without_the_salt_a_request_that_begins_would_read_what_older_weights_wrote(engines, monkeypatch, key):
    engine = engines["keep"]
    if key == "later":
        monkeypatch.setattr(engine, "_salt", lambda: "the same for all weights")
    else:
        monkeypatch.setattr(engine, "_salt_waiting", lambda: None)
    done, _, _ = published_in_mid_response(engine, request("waiting", seed=8))
    done |= {"later": engine.run([request("later", seed=8)])[0]}
    wrong = done[key].logprobs - under_fresh_weights(engines, done[key])
    assert np.abs(wrong).max() > FAR_NATS


def test_kept_other_weights_by_the_name_of_earlier_ones_read_nothing_of_theirs(engines):
    engine = engines["keep"]
    for seed in (0, 1):  # as the weights that held-out prompts are answered under, which all have one name
        engine.load(snapshot_of(make_llama(seed, CONTEXT), seed), "sample")
        [completion] = engine.run([request("held-out", seed=8)])
    assert np.abs(completion.logprobs - under_fresh_weights(engines, completion)).max() < CLOSE_NATS
