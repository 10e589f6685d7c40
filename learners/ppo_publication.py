"""Bringing the policy's weights into the engines, with a probe of whether they arrived whole."""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from actors.conductor import Probe, Publication
from learners.answers import Answers, has_come
from learners.engine import Engine
from learners.process_group import device
from models.forward import causal_logprobs
from models.sequences import sequence_batch
from models.snapshot import Snapshot, pack

PROBE_ROWS = 4
"""Episodes of the last batch that engine and learner both score after every publication."""

ARRIVAL = "the conductor to say that new weights are published"
"""What is waited for where the conductor does not say how a publication has ended."""


class Publisher:
    """Publishes weights through the conductor, and lets the generators begin to lease once they have some.

    At staleness 0, and the first time at any, a publication is waited for until it has come to its end (`is_awaited`).
    Otherwise the engines need not hold the weights before the next batch is trained, so the learner goes on and only
    waits for the publication before this one, where that is still under way. The waits are the caller's, who hears
    meanwhile whether it is to stop; over a GPU transport, `begin` itself waits.
    """

    def __init__(
        self,
        policy: Engine,
        conductor: Any,
        answers: Answers,
        max_staleness: int,
        rollout_dtype: str,
        bound_nats: float,
        made_up: list[int],
        transport: str = "object_store",
    ) -> None:
        """`bound_nats` is how far an engine may be from the learner on any token of a probe; `made_up` a sequence to
        probe with where there is no batch yet; `transport` how weights reach the engines, "object_store" or "ipc"."""
        self._policy, self._conductor, self._answers = policy, conductor, answers
        self._max_staleness, self._rollout_dtype, self._bound_nats = max_staleness, rollout_dtype, bound_nats
        self._made_up = made_up
        self._transport = transport
        self._sender: Any = None
        """The learner's side of a GPU transport, once there was a publication."""
        self._probe_sequences: list[list[int]] = []
        self._leasing = False
        self._publication: Any = None
        """A publication whose figures are not logged yet."""

    def prepare(self) -> tuple[dict[str, Tensor], Probe]:
        """The present weights and a probe of them; every rank takes part."""
        return self._policy.weights(), self._probe()

    def begin(self, version: tuple[int, int], weights: dict[str, Tensor], probe: Probe) -> None:
        """Have what `prepare` gave brought into the engines as `version` (attempt, update), where nothing is under way;
        rank 0 alone calls this.

        Engines read the weights from this process's GPU where that is their transport. They stay there until the
        publication has come to its end, which is waited for here, at any staleness. Raises what `figures` does then.
        """
        assert self._publication is None, "the publication before this one has come to its end"
        snapshot = snapshot_of(weights, version, self._rollout_dtype)
        if self._transport != "ipc":
            self._publication = self._conductor.publish.remote(*version, snapshot, probe)
            return
        from actors.gpu_transports import GpuSender  # imports vllm

        if self._sender is None:
            # An engine takes weights one by one unless it is told otherwise, so there is nothing to connect.
            self._sender = GpuSender("ipc", device(), lambda _: None, packed=False)

        def deliver(offer: dict[str, Any]) -> None:
            self._publication = self._conductor.publish.remote(*version, snapshot, probe, offer)
            self._answers.of(self._publication, ARRIVAL)

        self._sender.send(snapshot, deliver)

    @property
    def is_awaited(self) -> bool:
        """Whether the learner may go on only once the publication that was begun has come to its end: the same on every
        rank."""
        return self._max_staleness == 0 or not self._leasing

    def has_come(self, within_s: float = 0.0) -> bool:
        """Whether no publication is under way; waits up to `within_s` seconds for its end."""
        return self._publication is None or has_come(self._publication, within_s)

    def let_lease(self, first: bool) -> None:
        """After the first publication: let the generators lease. Every rank notes that, the `first` alone asks for it.

        Raises RunProblem where they do not begin.
        """
        if not self._leasing and first:
            self._answers.of(self._conductor.start_leasing.remote(), "the generators to begin to lease")
        self._leasing = True

    def figures(self) -> dict[str, float]:
        """What is to be logged of the publication under way once it has come to its end, and nothing before or again.

        Every publication is logged once: on the line of its own update, unless it takes longer than the update. One
        that takes longer than the last update is waited for, and on no line.
        Raises RunProblem where a generator was late or disagrees with the probe.
        """
        if self._publication is None or not has_come(self._publication):
            return {}
        published: Publication = self._answers.of(self._publication, ARRIVAL)
        self._publication = None
        return {
            "sync/publish_seconds": published.seconds,
            "sync/pause_seconds": published.pause_s,
            "mismatch/probe_nats": published.probe_nats,
            "mismatch/probe_mean_nats": published.probe_mean_nats,
            **published.roles,
        }

    def probe_with(self, table: pa.Table) -> None:
        """Take the sequences of the next probe from the last batch of episodes."""
        self._probe_sequences = _some_sequences(table)

    @torch.no_grad()
    def _probe(self) -> Probe:
        """Sequences scored by the learner (every rank takes part): some of the last batch, a made-up one before it."""
        sequences = self._probe_sequences or [self._made_up]
        batch = sequence_batch([tokens[:1] for tokens in sequences], [tokens[1:] for tokens in sequences]).to(device())
        logprobs, _ = causal_logprobs(self._policy, batch.tokens, batch.attention_mask)
        scored = [
            row[: len(tokens) - 1] for row, tokens in zip(logprobs.float().cpu().tolist(), sequences, strict=True)
        ]
        return Probe(sequences, scored, self._bound_nats)


def snapshot_of(weights: dict[str, Tensor], version: tuple[int, int], rollout_dtype: str) -> Snapshot:
    """Weights packed for the engines; `version` is (attempt, update)."""
    return pack(weights, version, getattr(torch, rollout_dtype))


def made_up_sequence(tokenizer: Any, max_response_tokens: int) -> list[int]:
    """Ordinary tokens, fewer than a response may have: the engine's context must hold them and one more."""
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    count = min(16, max(2, max_response_tokens))
    return [ordinary[(7 + 31 * place) % len(ordinary)] for place in range(count)]


def _some_sequences(table: pa.Table) -> list[list[int]]:
    """The first PROBE_ROWS episodes of a batch: prompt and response, without the last token, so that one more fits."""
    prompts, responses = (table[name][:PROBE_ROWS].to_pylist() for name in ("prompt_tokens", "response_tokens"))
    sequences = [[*prompt, *response][:-1] for prompt, response in zip(prompts, responses, strict=True)]
    return [tokens for tokens in sequences if len(tokens) > 1]
