"""The run's reward model as a service: a Serve deployment of its own, which scores what several requests ask at once.

Scores are calibrated as the reward model is: demonstrations average 0 (InstructGPT, section 3.5).
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from corpus.problems import UsageProblem
from serving.errors import REPLACED_S, ApiError, bad_request
from serving.requests import Lists
from serving.served_run import ServedRun

BATCH_REQUESTS = 32
"""Requests that are scored together at most."""

BATCH_WAIT_S = 0.005
"""Seconds for which the first of a batch waits for others."""

Texts = list[tuple[str, list[tuple[str, bool]]]]

Row = tuple[list[int], list[int]]
"""Tokens of a prompt and of one of its responses."""


class RewardScores:
    """The reward model in `directory`, with the run's tokenizer; it reads at most `context_tokens`, prompt and response
    together."""

    def __init__(
        self, directory: str, tokenizer: str, rows_per_batch: int, device: str, dtype: str, context_tokens: int
    ) -> None:
        """Raises UsageProblem where they do not load."""
        self._context_tokens = context_tokens
        from actors.rewards import RewardSettings, make_reward
        from models.build import load_tokenizer

        self._tokenizer = load_tokenizer(tokenizer)
        settings = RewardSettings()
        dtypes: Any = dtype
        self._reward = make_reward(settings, directory, self._tokenizer, rows_per_batch, device, dtypes)

    def rows(self, items: Texts) -> list[Row]:
        """The tokens of every response with its prompt, in their order. A response that came to its own end has its
        end-of-text. Raises ApiError (400) for what is longer than the model reads, UsageProblem for what the chat
        template refuses."""
        from corpus.templates import encode_prompts, encode_responses

        prompts = encode_prompts(self._tokenizer, [prompt for prompt, _ in items])
        flat = [(prompts[row], text, end) for row, (_, responses) in enumerate(items) for text, end in responses]
        whole = encode_responses(self._tokenizer, [text for _, text, _ in flat])
        rows = [(prompt, each if end else each[:-1]) for each, (prompt, _, end) in zip(whole, flat, strict=True)]
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        if longest > self._context_tokens:
            raise bad_request(
                f"A prompt with its response has {longest} tokens; the reward model reads {self._context_tokens}."
            )
        return rows

    def of(self, rows: list[Row]) -> list[float]:
        """The score of every row."""
        return self._reward.score([], [], [prompt for prompt, _ in rows], [response for _, response in rows])


class Scores:
    """The deployment."""

    def __init__(self, run: str, rows_per_batch: int, device: str, dtype: str, context_tokens: int) -> None:
        """`run` is the run's directory or address. Raises RunProblem or UsageProblem where its reward model cannot be
        brought here or does not load."""
        served = ServedRun.of(run)
        served.look()
        tokenizer = str(served.root / "data" / "tokenizer")
        directory = served.names.whole_reward_model()
        context = min(context_tokens, positions_of(directory, context_tokens))
        self._scores = RewardScores(str(directory), tokenizer, rows_per_batch, device, dtype, context)
        self._encoder = ThreadPoolExecutor(1)  # a tokenizer is one thread's, also where who asked has left meanwhile

    @serve.batch(max_batch_size=BATCH_REQUESTS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _together(self, requests: list[list[Row]]) -> list[list[float]]:
        scored = iter(await asyncio.to_thread(self._scores.of, [row for rows in requests for row in rows]))
        return [[next(scored) for _ in rows] for rows in requests]

    async def score(self, items: Texts) -> list[list[float]] | str:
        """Scores by prompt; or why there are none, where the fault is the request's: what others ask in the same batch
        has its scores all the same."""
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._encoder, self._scores.rows, items)
        except (ApiError, UsageProblem) as problem:
            return str(problem)
        scores: list[float] = await self._together(rows)  # pyright: ignore[reportCallIssue, reportArgumentType, reportGeneralTypeIssues, reportAssignmentType]
        scored = iter(scores)
        return [[next(scored) for _ in responses] for _, responses in items]


def scorer_of(handle: Any) -> Any:
    """What a gateway scores with: calls the deployment behind `handle`. It raises ApiError: 400 for what cannot be
    scored, 503 where the replica that it came to has died."""

    async def scorer(asked: Lists) -> list[list[float]]:
        try:
            found = await handle.score.remote(asked.items)
        except (RayActorError, DeploymentUnavailableError) as error:
            said = "The replica that scores has died and is being replaced; ask again in a few seconds."
            raise ApiError(503, "scorer_lost", said, retry_after_s=REPLACED_S) from error
        if isinstance(found, str):
            raise bad_request(found, "pairs" if asked.pairs else "lists")
        return found

    return scorer


def positions_of(directory: Path, otherwise: int) -> int:
    """How many tokens the model in a Hugging Face directory reads, by its configuration; `otherwise` where that does
    not say."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return int(config.get("text_config", config).get("max_position_embeddings", otherwise))


def has_reward_model(directory: Path | None) -> bool:
    """Whether there is one to load."""
    return directory is not None and (directory / "config.json").is_file()
