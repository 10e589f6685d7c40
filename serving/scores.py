"""The run's reward model as a service: a Serve deployment of its own, which scores what several requests ask at once.

Scores are calibrated as the reward model is: demonstrations average 0 (InstructGPT, section 3.5).
"""

import asyncio
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from serving.errors import REPLACED_S, ApiError
from serving.requests import Lists
from serving.served_run import ServedRun

BATCH_REQUESTS = 32
"""Requests that are scored together at most."""

BATCH_WAIT_S = 0.005
"""Seconds for which the first of a batch waits for others."""

Texts = list[tuple[str, list[tuple[str, bool]]]]


class RewardScores:
    """The reward model in `directory`, with the run's tokenizer."""

    def __init__(self, directory: str, tokenizer: str, rows_per_batch: int, device: str, dtype: str) -> None:
        """Raises UsageProblem where they do not load."""
        from actors.rewards import RewardSettings, make_reward
        from models.build import load_tokenizer

        self._tokenizer = load_tokenizer(tokenizer)
        settings = RewardSettings()
        dtypes: Any = dtype
        self._reward = make_reward(settings, directory, self._tokenizer, rows_per_batch, device, dtypes)

    def of(self, items: Texts) -> list[list[float]]:
        """The score of every response, by prompt. One that came to its own end is scored with its end-of-text."""
        from corpus.templates import encode_prompts, encode_responses

        prompts = encode_prompts(self._tokenizer, [prompt for prompt, _ in items])
        flat = [(prompts[row], text, end) for row, (_, responses) in enumerate(items) for text, end in responses]
        whole = encode_responses(self._tokenizer, [text for _, text, _ in flat])
        tokens = [each if end else each[:-1] for each, (_, _, end) in zip(whole, flat, strict=True)]
        scores = iter(self._reward.score([], [], [prompt for prompt, _, _ in flat], tokens))
        return [[next(scores) for _ in responses] for _, responses in items]


class Scores:
    """The deployment."""

    def __init__(self, run: str, rows_per_batch: int, device: str, dtype: str) -> None:
        """`run` is the run's directory or address. Raises RunProblem or UsageProblem where its reward model cannot be
        brought here or does not load."""
        served = ServedRun.of(run)
        served.look()
        tokenizer = str(served.root / "data" / "tokenizer")
        self._scores = RewardScores(str(served.names.whole_reward_model()), tokenizer, rows_per_batch, device, dtype)

    @serve.batch(max_batch_size=BATCH_REQUESTS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _together(self, requests: list[Texts]) -> list[list[list[float]]]:
        scored = iter(await asyncio.to_thread(self._scores.of, [item for texts in requests for item in texts]))
        return [[next(scored) for _ in texts] for texts in requests]

    async def score(self, items: Texts) -> list[list[float]]:
        """Scores by prompt."""
        return await self._together(items)  # pyright: ignore[reportCallIssue, reportArgumentType, reportGeneralTypeIssues]


def scorer_of(handle: Any) -> Any:
    """What a gateway scores with: calls the deployment behind `handle`. It raises ApiError (503) where the replica that
    it came to has died."""

    async def scorer(asked: Lists) -> list[list[float]]:
        try:
            return await handle.score.remote(asked.items)
        except (RayActorError, DeploymentUnavailableError) as error:
            said = "The replica that scores has died and is being replaced; ask again in a few seconds."
            raise ApiError(503, "scorer_lost", said, retry_after_s=REPLACED_S) from error

    return scorer


def has_reward_model(directory: Path | None) -> bool:
    """Whether there is one to load."""
    return directory is not None and (directory / "config.json").is_file()
