"""Keys and values when newer weights of the policy go in: of responses under way, and of requests that come then."""

import asyncio
import json
import threading
import time
from collections.abc import Coroutine, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving.engine import EngineSlot
from serving.gateway import _own_scope
from serving.names import Weights
from serving.settings import ServingSettings
from tests.serving.run_on_disk import make_tokenizer
from tests.toy_llama import make_llama

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(900)]

CONTEXT = 512
PROMPT = [5 + (7 * place) % 80 for place in range(300)]
"""Longer than two blocks of the cache, which a request with the same beginning could read."""
CLOSE_NATS = 1e-4
FAR_NATS = 1e-2
SETTINGS = ServingSettings(kv_cache_mib=64, max_concurrent=1, load_deadline_s=60)
"""Of two requests the second waits for the first to end."""


class Policy:
    """An engine slot with the policy on an event loop of its own thread; weights are those of a seed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for seed in (0, 1):
            make_llama(seed, CONTEXT).save_pretrained(root / str(seed))
            make_tokenizer().save_pretrained(root / str(seed))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.slot = EngineSlot(0, SETTINGS, CONTEXT)
        self.do(self.slot.start("policy", self._weights(0), root / "0"))

    def _weights(self, seed: int) -> Weights:
        return Weights(str(seed), self._root / str(seed))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(240)

    def take(self, seed: int) -> None:
        self.do(self.slot.take("policy", self._weights(seed)))

    async def respond(self, max_tokens: int) -> "Response":
        parts: list[bytes] = []

        async def send(message: Any) -> None:
            parts.append(message.get("body", b""))

        body = {"model": "policy", "prompt": PROMPT, "max_tokens": max_tokens, "logprobs": 0, "seed": max_tokens}
        body |= {"ignore_eos": True, "return_token_ids": True}
        await self.slot.handle(_own_scope({}, "/v1/completions"), json.dumps(body).encode(), send, 1, [])
        answer = json.loads(b"".join(parts))
        [choice] = answer["choices"]
        return Response(
            choice["token_ids"], np.array(choice["logprobs"]["token_logprobs"]), answer["amenable"]["versions"]
        )

    def across_versions(self) -> tuple["Response", "Response", "Response"]:
        """A response that seed 0 began and seed 1 ended; one that waited for it in the engine when the weights changed;
        and one that was asked for after that. Whether the first spans both is a matter of moments, so it is done until
        it has."""
        for _ in range(20):
            self.take(0)
            under_way = [
                asyncio.run_coroutine_threadsafe(self.respond(max_tokens), self._loop) for max_tokens in (200, 6)
            ]
            deadline = time.monotonic() + 30
            while self.slot._engine.get_num_unfinished_requests() < 2:
                assert time.monotonic() < deadline, "no request reached the engine"
                time.sleep(0.001)
            time.sleep(0.05)
            self.take(1)
            later = self.do(self.respond(8))
            first, waiting = (each.result(120) for each in under_way)
            if [span["version"] for span in first.versions] == ["0", "1"]:
                return first, waiting, later
        raise AssertionError("the weights came too late or too early to be seen within a response, 20 times")


class Response:
    """Tokens, their log-probabilities as the engine told them, and which weights wrote which."""

    def __init__(self, tokens: list[int], logprobs: np.ndarray, versions: list[dict[str, Any]]) -> None:
        self.tokens, self.logprobs, self.versions = tokens, logprobs, versions

    def off_by(self, seed: int) -> np.ndarray:
        """How far each log-probability is from that which the weights of `seed` alone give, nats."""
        tokens = torch.tensor([[*PROMPT, *self.tokens]])
        with torch.no_grad():
            logits = make_llama(seed, CONTEXT)(tokens).logits[0, len(PROMPT) - 1 : -1]
        told = torch.log_softmax(logits, -1).gather(1, torch.tensor(self.tokens)[:, None])[:, 0].numpy()
        return np.abs(self.logprobs - told)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    policy = Policy(tmp_path_factory.mktemp("policy"))
    yield policy
    policy.slot.close()


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_what_older_weights_wrote_is_read_by_responses_that_have_begun_alone(mode, policy):
    policy.slot._settings = SETTINGS.model_copy(update={"kv_on_publish": mode})
    first, waiting, later = policy.across_versions()
    start = first.versions[1]["start"]
    assert first.off_by(0)[:start].max() < CLOSE_NATS
    rest = first.off_by(1)[start:].max()
    assert rest > FAR_NATS if mode == "keep" else rest < CLOSE_NATS
    for each in (waiting, later):
        assert [span["version"] for span in each.versions] == ["1"]
        assert each.off_by(1).max() < CLOSE_NATS
        assert each.off_by(0).max() > FAR_NATS  # the two weights can be told apart


def test_without_another_salt_all_would_read_what_older_weights_wrote(policy, monkeypatch):
    engine, turns = policy.slot._engine, count()
    begin_anew = engine.reset_prefix_cache

    async def for_seed_0_only() -> None:
        if next(turns) % 2 == 0:
            await begin_anew()

    policy.slot._settings = SETTINGS.model_copy(update={"kv_on_publish": "keep"})
    monkeypatch.setattr(engine, "reset_prefix_cache", for_seed_0_only)
    _, waiting, later = policy.across_versions()
    assert waiting.off_by(1).max() > FAR_NATS
    assert later.off_by(1).max() > FAR_NATS
