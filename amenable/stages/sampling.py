"""Sampling and scoring outside PPO: many prompts cut into slices over all generators, with progress."""

import math
from collections import deque
from typing import Any

import pyarrow as pa

from actors.rewards import RewardSettings
from amenable import interruption
from amenable.stage_reuse import SET_ASIDE
from amenable.stages.context import Context

_WITH_PROMPTS = ("prompts-", "demonstrations-", "comparisons-")

SLICES_IN_FLIGHT = 2
"""Slices given to each generator at once, so that none waits for the driver."""


def start_generators(context: Context) -> None:
    """Begin to start the generators in the background; the base model must exist."""
    context.crew.start_generators(context.base_model(), context.tokenizer, context.max_sequence_tokens())


def start_actors(context: Context) -> None:
    """Begin to start generators and scorers side by side: each spends its first seconds on imports."""
    start_generators(context)
    context.crew.scoring()


def load_into_generators(context: Context, directory: str, label: str) -> None:
    """Put the weights of `directory` into every generator, starting them where they are not yet."""
    generators = context.crew.generators(context.base_model(), context.tokenizer, context.max_sequence_tokens())
    loads = [generator.load_directory.remote(directory, label) for generator in generators.values()]
    context.crew.wait_for(loads, f"the generators to load {label}")


def sample(
    context: Context, prompts: pa.Table, samples: int, seed: int, done_before: int = 0, total: int | None = None
) -> pa.Table:
    """`samples` responses to each prompt under the weights that were loaded last; rows in the prompts' order.

    Progress counts responses, `done_before` of `total` being behind already.
    """
    recipe = context.recipe
    generators = list(
        context.crew.generators(context.base_model(), context.tokenizer, context.max_sequence_tokens()).values()
    )
    per_slice = max(1, math.ceil(4 * recipe.rollouts.max_concurrent / samples))
    slices = deque(prompts.slice(start, per_slice) for start in range(0, prompts.num_rows, per_slice))
    total = total or prompts.num_rows * samples
    waiting: deque[Any] = deque()
    tables: list[pa.Table] = []
    done, number = done_before, 0
    while slices or waiting:
        while slices and len(waiting) < SLICES_IN_FLIGHT * len(generators):
            generator = generators[number % len(generators)]
            waiting.append(generator.sample.remote(slices.popleft(), samples, recipe.sampling, seed))
            number += 1
        [table] = context.crew.wait_for([waiting.popleft()], "samples")
        tables.append(table)
        done += table.num_rows
        context.progress.update(done, total, "responses")
        interruption.stop_if_requested(f"sampling, {done} of {total} responses")
    return pa.concat_tables(tables)


def reward_scores(context: Context, samples: pa.Table) -> list[float]:
    """The reward of every row of a table with prompt_tokens and response_tokens, by the reward that is loaded."""
    scorers, _ = context.crew.scoring_pools()
    calls = [
        scorers[number % len(scorers)].score_pairs.remote(
            part["prompt_tokens"].to_pylist(), part["response_tokens"].to_pylist()
        )
        for number, part in enumerate(_parts(samples))
    ]
    return [score for scores in context.crew.wait_for(calls, "rewards") for score in scores]


def reference_logprobs(context: Context, samples: pa.Table, temperature: float) -> list[list[float]]:
    """Log-probabilities, under the reference that is loaded, of every response token of every row."""
    _, references = context.crew.scoring_pools()
    calls = [
        references[number % len(references)].logprobs_of.remote(
            part["prompt_tokens"].to_pylist(), part["response_tokens"].to_pylist(), temperature
        )
        for number, part in enumerate(_parts(samples))
    ]
    return [row for rows in context.crew.wait_for(calls, "the reference's log-probabilities") for row in rows]


def load_reward(context: Context, reward: RewardSettings | None = None) -> None:
    """Give the scorers the run's reward, or `reward`."""
    scorers, _ = context.crew.scoring_pools()
    directory = str(context.round.reward_model / "export")
    tables = [
        str(path)
        for path in sorted(context.run.root.rglob("*.parquet"))
        if path.stem.startswith(_WITH_PROMPTS) and SET_ASIDE not in path.parts
    ]
    settings = reward or context.recipe.reward
    calls = [scorer.load_reward.remote(settings, directory, context.tokenizer, tables) for scorer in scorers]
    context.crew.wait_for(calls, "the reward model to load")


def load_reference(context: Context, directory: str) -> None:
    """Give the references their model."""
    _, references = context.crew.scoring_pools()
    calls = [reference.load_reference.remote(directory) for reference in references]
    context.crew.wait_for(calls, "the reference model to load")


def _parts(table: pa.Table, rows: int = 512) -> list[pa.Table]:
    return [table.slice(start, rows) for start in range(0, table.num_rows, rows)]
