"""The other side of a PPO learner without Ray: the real stream, called directly, and a generator in plain torch.

Handles look as Ray's do, but a call is carried out at once; what it raises is raised where its answer is fetched.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from actors.conductor import Publication
from actors.episodes import GENERATED, Chunk, parse_version, version_label
from actors.stream import EpisodeStream, StreamPlan
from models.build import load_causal_lm
from models.forward import PolicyModel, response_logprobs
from models.sequences import sequence_batch
from models.snapshot import unpack

EOS = 14


class Late:
    """The value of an answer that does not come."""


@dataclass
class Answer:
    value: Any = None
    problem: BaseException | None = None


class DirectRay:
    """Stands in for the module `ray` where only `get` and `wait` are used."""

    @staticmethod
    def get(answer: Answer) -> Any:
        if answer.problem is not None:
            raise answer.problem
        return answer.value

    @staticmethod
    def wait(answers: list[Answer], timeout: float | None = None) -> tuple[list[Answer], list[Answer]]:
        late = [answer for answer in answers if isinstance(answer.value, Late)]
        return [answer for answer in answers if not isinstance(answer.value, Late)], late


class Handle:
    """`handle.method.remote(…)` for a plain object."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        call = getattr(self.actor, method)

        class Remote:
            @staticmethod
            def remote(*arguments: Any) -> Answer:
                try:
                    value = call(*arguments)
                    return Answer(asyncio.run(value) if asyncio.iscoroutine(value) else value)
                except Exception as problem:  # noqa: BLE001 - raised by `get`, as Ray does
                    return Answer(problem=problem)

        return Remote


def stream_of(plan: StreamPlan) -> Any:
    """The stream actor's own class, made here."""
    return EpisodeStream.__ray_metadata__.modified_class(plan)  # pyright: ignore


class ToyConductor:
    """Publishes to one generator, which fills every slot that the stream admits.

    `skew` is added to the log-probs it reports. `rewards` are what a held-out evaluation finds, by update.
    """

    def __init__(self, stream: Any, policy_directory: str, temperature: float, skew: float = 0.0) -> None:
        self.stream, self.temperature, self.skew = stream, temperature, skew
        self.policy = PolicyModel(load_causal_lm(policy_directory)).eval()
        self.reference = PolicyModel(load_causal_lm(policy_directory)).eval()
        self.version = (0, 0)
        self.leasing = self.finished = False
        self.chunks = 99
        """How many it fills at a publication."""
        self.rewards = {1: 1.0, 2: 3.0, 3: 2.0}
        self.probed: list[int] = []
        self.kl: dict[int, float] = {}
        self.averages: dict[int, dict[str, torch.Tensor]] = {}

    async def publish(self, attempt: int, update: int, snapshot: Any, probe: Any) -> Publication:
        assert snapshot.version == (attempt, update)
        self._load(snapshot)
        self.version = attempt, update
        assert all(
            len(tokens) == len(logprobs) + 1 for tokens, logprobs in zip(probe.sequences, probe.logprobs, strict=True)
        )
        batch = sequence_batch([tokens[:1] for tokens in probe.sequences], [tokens[1:] for tokens in probe.sequences])
        scored = self._score(self.policy, batch, 1.0)
        nats = (
            (scored[batch.response_mask[:, 1:]] - torch.tensor([each for row in probe.logprobs for each in row]))
            .abs()
            .max()
            .item()
        )
        self.probed.append(len(probe.sequences))
        await self.stream.advance(attempt, update)
        if self.leasing:
            await self._fill()
        return Publication(0.1, 0.05, nats, nats)

    async def start_leasing(self) -> None:
        self.leasing = True
        await self._fill()

    async def evaluate(self, snapshot: Any, held_out: Any, sampling: Any) -> dict[str, float]:
        update = snapshot.version[1]
        self.averages[update] = {name: tensor.clone() for name, tensor in unpack(snapshot)}
        reward = self.rewards.get(update, 0.0)
        return {"reward": reward, "gold": 0.5, "kl": self.kl.get(update, 0.0), "length": 3.0, "eos_rate": 1.0}

    async def finish(self) -> None:
        self.finished = True

    def _load(self, snapshot: Any) -> None:
        weights = {f"causal_lm.{name}": tensor for name, tensor in unpack(snapshot)}
        self.policy.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def _score(self, policy: PolicyModel, batch: Any, temperature: float) -> torch.Tensor:
        return response_logprobs(policy, batch.tokens, batch.attention_mask, batch.response_mask, temperature)

    async def _fill(self) -> None:
        for chunk in await self.stream.lease("toy", self.chunks, 0.0):
            episodes = self._generate(chunk)
            responses = episodes.column("response_tokens").to_pylist()
            batch = sequence_batch(episodes.column("prompt_tokens").to_pylist(), responses)
            logprobs = self._score(self.reference, batch, self.temperature)
            rows = [row[keep].tolist() for row, keep in zip(logprobs, batch.response_mask[:, 1:], strict=True)]
            scores = [float(response.count(3)) for response in responses]
            await self.stream.accept(episodes, scores, rows)

    @torch.no_grad()
    def _generate(self, chunk: Chunk, longest: int = 5) -> pa.RecordBatch:
        responses, logprobs = [], []
        for slot in chunk.slots:
            generator = torch.Generator().manual_seed(slot.seed)
            tokens, found = list(slot.prompt_tokens), []
            while len(found) < longest and tokens[-1] != EOS:
                logits = self.policy.causal_lm(torch.tensor([tokens])).logits[0, -1] / self.temperature
                each = logits.log_softmax(-1)
                tokens.append(int(torch.multinomial(each.exp(), 1, generator=generator)))
                found.append(each[tokens[-1]].item() + self.skew)
            responses.append(tokens[len(slot.prompt_tokens) :])
            logprobs.append(found)
        attempt, update = parse_version(version_label(*self.version))
        count = len(chunk.slots)
        return pa.RecordBatch.from_pydict(
            {
                "run": ["toy"] * count,
                "round": [1] * count,
                "slot": [slot.index for slot in chunk.slots],
                "sample": [0] * count,
                "attempt": [chunk.attempt] * count,
                "prompt_id": [slot.prompt_id for slot in chunk.slots],
                "prompt_tokens": [slot.prompt_tokens for slot in chunk.slots],
                "response_tokens": responses,
                "behaviour_logprobs": logprobs,
                "version_spans": [
                    [{"attempt": attempt, "update": update, "start": 0, "end": len(response)}] for response in responses
                ],
                "finish_reason": ["stop" if response[-1] == EOS else "length" for response in responses],
                "generator": ["toy"] * count,
                "leased_at": [chunk.leased_at] * count,
                "generated_at": [time.time()] * count,
            },
            schema=GENERATED,
        )
