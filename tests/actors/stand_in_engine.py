"""An engine without vLLM, for the generator's thread."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from actors.rollout_engine import Completion, VersionSpan
from corpus.problems import UsageProblem


class StandInEngine:
    """Finishes the request that was submitted first at each step."""

    def __init__(self, *_: Any) -> None:
        self.requests: list[Any] = []
        self.steps = 0
        self.stepped_at = 0.0
        self.held = self.broken = self.stuck = self.refuses = False
        self.at_most: int | None = None
        """Requests that it still finishes, probes aside; None for any."""
        self.version = "0.0"
        self.submitted: list[str] = []

    @property
    def pending(self) -> int:
        return len(self.requests)

    def submit(self, request: Any) -> None:
        if len(request.prompt_tokens) > 8:
            raise UsageProblem("it does not fit", "data/row")
        self.requests.append(request)
        self.submitted.append(request.key)

    def abort(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        self.requests = [request for request in self.requests if request.key not in gone]

    def step(self) -> list[Completion]:
        if self.broken:
            raise RuntimeError("the engine broke")
        while self.stuck:
            time.sleep(0.01)
        self.steps += 1
        self.stepped_at = time.monotonic()
        time.sleep(0.002)
        may_end = [each for each in self.requests if each.score_prompt or self.at_most != 0]
        if self.held or not may_end:
            return []
        done = may_end[0]
        self.requests.remove(done)
        if self.at_most is not None and not done.score_prompt:
            self.at_most -= 1
        prompt = -np.array(done.prompt_tokens[1:], np.float32) if done.score_prompt else None
        return [Completion(done.key, [4], [-1.0], "stop", [VersionSpan(self.version, 0, 1)], prompt)]

    def run(self, requests: Any) -> list[Completion]:
        assert not self.requests, "a batch is run with nothing else in the engine"
        self.sampled_under = self.version
        try:
            for request in requests:
                self.submit(request)
            return [completion for _ in requests for completion in self.step()]
        except Exception:
            self.abort(request.key for request in requests)
            raise

    def when_a_part_is_lost(self, call: Callable[[], None]) -> None:
        """It has no parts."""

    def load(self, snapshot: Any, version: str, offer: Any = None) -> float:
        if self.refuses:
            raise RuntimeError("half of it is loaded")
        self.version, self.offer = version, offer
        return 0.5
