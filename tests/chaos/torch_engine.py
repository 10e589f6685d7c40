"""The generator's engine in plain torch: real weights, real log-probabilities, one request a step, and no vLLM."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import phases
import torch

from actors.episodes import parse_version
from actors.rollout_engine import Completion, Request, VersionSpan
from models.build import load_causal_lm
from models.forward import PolicyModel
from models.snapshot import Snapshot, unpack, verify

EOS = 14


class TorchEngine:
    """Has the methods of `RolloutEngine` that the generator calls."""

    def __init__(self, directory: str) -> None:
        self._policy = PolicyModel(load_causal_lm(directory)).eval()
        self._requests: list[Request] = []
        self._version = "0.0"
        self.stepped_at = time.monotonic()

    @property
    def pending(self) -> int:
        return len(self._requests)

    def submit(self, request: Request) -> None:
        self._requests.append(request)

    def abort(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        self._requests = [request for request in self._requests if request.key not in gone]

    def step(self) -> list[Completion]:
        if self._requests and not self._requests[0].score_prompt:
            phases.linger("generator", "generating", parse_version(self._version)[1])
        self.stepped_at = time.monotonic()
        return [self._complete(self._requests.pop(0))] if self._requests else []

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    def when_a_part_is_lost(self, call: Callable[[], None]) -> None:
        """It has no parts."""

    def load(self, snapshot: Snapshot, version: str, offer: Any = None) -> float:
        verify(snapshot)
        if version != "sample":
            phases.linger("generator", "publishing", snapshot.version[1])
            self._version = version
        weights = {f"causal_lm.{name}": tensor for name, tensor in unpack(snapshot)}
        self._policy.load_state_dict(weights, strict=False)
        return 0.0

    @torch.no_grad()
    def _complete(self, request: Request) -> Completion:
        prompt = list(request.prompt_tokens)
        if request.score_prompt:
            each = self._policy.causal_lm(torch.tensor([prompt])).logits[0].log_softmax(-1)
            scored = each[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()
            return Completion(request.key, [EOS], [0.0], "length", [VersionSpan(self._version, 0, 1)], scored)
        random, tokens, logprobs = torch.Generator().manual_seed(request.seed), list(prompt), []
        while len(logprobs) < request.max_tokens and (not logprobs or tokens[-1] != EOS):
            logits = self._policy.causal_lm(torch.tensor([tokens])).logits[0, -1] / request.temperature
            each = logits.log_softmax(-1)
            tokens.append(int(torch.multinomial(each.exp(), 1, generator=random)))
            logprobs.append(each[tokens[-1]].item())
        response = tokens[len(prompt) :]
        reason = "stop" if response[-1] == EOS else "length"
        return Completion(request.key, response, logprobs, reason, [VersionSpan(self._version, 0, len(response))])
