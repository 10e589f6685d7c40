"""The process that hosts the reward scorer, the frozen reference, or both.

On a small machine one process is both; on a large one each has its own. The code is the same: whoever has a handle
calls `score` on a process that was given a reward and `reference_logprobs` on one that was given a reference.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from actors.exported_metrics import SCORING_NON_FINITE
from actors.failures import worker_broke
from actors.pulse import Pulse, pulse_now
from actors.rewards import RewardSettings, make_reward
from actors.role_reports import RoleReport, report_now
from actors.settings import ScoringSettings
from actors.telemetry import worker_telemetry
from corpus import logs
from corpus.problems import FULL_DISK, RunProblem, UsageProblem
from corpus.telemetry import switch_telemetry_off
from corpus.templates import decode_responses

log = logging.getLogger(__name__)


@ray.remote(concurrency_groups={"health": 1})  # pyright: ignore[reportCallIssue]
class ScoringWorker:
    """Loads what it is told to score with; one call at a time, in the order of the calls, heartbeats beside them.

    What nobody foresaw while it scores is raised as WorkerBroke: another process may not meet it.
    """

    def __init__(self, name: str, settings: ScoringSettings) -> None:
        switch_telemetry_off()
        import torch

        logs.begin("scoring", name)
        torch.set_num_threads(settings.threads)
        self._name = name
        self._settings = settings
        self._device = "cuda" if settings.gpus else "cpu"
        self._reward: Any = None
        self._reference: Any = None
        self._tokenizer: Any = None
        self._prompts: dict[tuple[int, ...], str] = {}
        self._busy_s = 0.0
        self._tokens = 0
        self._telemetry = worker_telemetry("scoring", name)
        self._began_at: float | None = None
        """When the present scoring call began (monotonic clock); None between calls."""

    def ready(self) -> str:
        """The worker's name, once its imports are done."""
        return self._name

    def load_reward(self, reward: RewardSettings, directory: str, tokenizer: str, prompt_tables: list[str]) -> None:
        """Score with `reward` from now on.

        `directory` is our trained reward model, where the settings ask for it; `prompt_tables` are the Parquet tables
        that hold the prompts' own texts, for rewards that read text.
        """
        from models.build import load_tokenizer

        self._tokenizer = load_tokenizer(tokenizer)
        self._prompts = {} if reward.kind == "trained" else _prompt_texts(prompt_tables)
        self._reward = make_reward(
            reward, directory, self._tokenizer, self._settings.rows_per_batch, self._device, self._settings.dtype
        )

    def load_reference(self, directory: str) -> None:
        """Use the model in `directory` as the frozen reference from now on."""
        import torch

        from models.build import load_causal_lm
        from models.forward import PolicyModel

        model = load_causal_lm(directory, getattr(torch, self._settings.dtype))
        self._reference = PolicyModel(model).to(self._device).eval().requires_grad_(False)
        self._reference.pack_rows()

    def score(self, episodes: pa.RecordBatch) -> list[float]:
        """The reward of every episode. Raises RunProblem for one that is not finite, naming its prompt."""
        return self.score_pairs(
            episodes.column("prompt_tokens").to_pylist(), episodes.column("response_tokens").to_pylist()
        )

    def score_pairs(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        """The reward of each response (tokens) to its prompt (tokens)."""
        if self._reward is None:
            raise RunProblem(f"{self._name} was asked for rewards before it was given a reward model.", "fleet/order")
        with self._at_work(prompts, responses):
            texts = [self._prompts.get(tuple(prompt), "") for prompt in prompts]
            answers = decode_responses(self._tokenizer, responses)
            scores = self._reward.score(texts, answers, prompts, responses)
        self._telemetry.add(SCORING_NON_FINITE, sum(not math.isfinite(score) for score in scores))
        for row, score in enumerate(scores):
            if not math.isfinite(score):
                raise RunProblem(
                    f"{self._name}: the reward of response {row} of a batch is {score}, not a number.", "reward/scores"
                )
        return scores

    def reference_logprobs(self, episodes: pa.RecordBatch, temperature: float) -> list[list[float]]:
        """The reference's log-probabilities, at the rollouts' temperature, of every response token of every episode."""
        return self.logprobs_of(
            episodes.column("prompt_tokens").to_pylist(), episodes.column("response_tokens").to_pylist(), temperature
        )

    def logprobs_of(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """The reference's log-probabilities of each response's tokens; in fixed batches of `rows_per_batch` rows."""
        import torch

        from models.sequences import sequence_batch

        if self._reference is None:
            raise RunProblem(
                f"{self._name} was asked for log-probabilities before it was given a reference.", "fleet/order"
            )
        results: list[list[float]] = []
        rows = self._settings.rows_per_batch
        with self._at_work(prompts, responses), torch.inference_mode():
            for start in range(0, len(prompts), rows):
                batch = sequence_batch(prompts[start : start + rows], responses[start : start + rows]).to(self._device)
                logprobs, _ = self._reference(batch.tokens, batch.attention_mask, batch.response_mask, temperature)
                results += split_rows(logprobs, batch.response_mask[:, 1:])
        return results

    @ray.method(concurrency_group="health")  # answered while a call scores
    def heartbeat(self) -> Pulse:
        """A sign of life, which also says for how long the present call has been scoring."""
        began_at = self._began_at
        pulse = pulse_now(0.0 if began_at is None else time.monotonic() - began_at)
        self._telemetry.at_work(self._busy_s, self._tokens, pulse.memory_bytes, pulse.stalled_s)
        return pulse

    def report(self) -> RoleReport:
        """What this process has done since it started: its tokens are those it read, prompts included."""
        return report_now(self._busy_s, self._tokens)

    @contextmanager
    def _at_work(self, prompts: list[list[int]], responses: list[list[int]]) -> Iterator[None]:
        self._began_at = started = time.monotonic()
        try:
            yield
        except (RunProblem, UsageProblem):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise  # no other process has more
            log.exception("%s failed while it scored %d rows", self._name, len(prompts))
            raise worker_broke(self._name, f"scored {len(prompts)} responses", error) from error
        finally:
            self._began_at = None
        self._busy_s += time.monotonic() - started
        self._tokens += sum(map(len, prompts)) + sum(map(len, responses))


def _prompt_texts(tables: list[str]) -> dict[tuple[int, ...], str]:
    """The prompt's own text, before the chat template, by its tokens."""
    found: dict[tuple[int, ...], str] = {}
    for path in tables:
        table = pq.read_table(path, columns=["prompt", "prompt_tokens"])
        tokens = table["prompt_tokens"].to_pylist()
        found.update(zip(map(tuple, tokens), table["prompt"].to_pylist(), strict=True))
    return found


def split_rows(values: Any, mask: Any) -> list[list[float]]:
    """The masked entries of each row of `values` [batch, time], as Python floats."""
    return [row[keep].tolist() for row, keep in zip(values.float().cpu(), mask.bool().cpu(), strict=True)]


def pools(workers: Sequence[Any], fused: bool, scorers: int) -> tuple[list[Any], list[Any]]:
    """(reward scorers, references) among `workers`: all are both where fused, else the first `scorers` score."""
    return (list(workers), list(workers)) if fused else (list(workers[:scorers]), list(workers[scorers:]))
