"""Sampling and scoring outside PPO: many prompts cut into slices over all generators, with progress."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.rewards import RewardSettings
from amenable import interruption
from amenable.stage_reuse import SET_ASIDE
from amenable.stages.context import Context
from amenable.stages.kept_samples import KeptSamples
from amenable.stages.sources import whereabouts

_WITH_PROMPTS = ("prompts-", "demonstrations-", "comparisons-")

ROWS_PER_CALL = 128
"""Rows given to a scoring process in one call, cut to whole batches of its own: few enough that progress is seen."""


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
    loads = {name: generator.load_directory.remote(directory, label) for name, generator in generators.items()}
    context.crew.wait_for(loads, f"the generators to load {label}")


def sample(
    context: Context,
    prompts: pa.Table,
    samples: int,
    seed: int,
    directory: Path,
    label: str,
    done_before: int = 0,
    total: int | None = None,
) -> pa.Table:
    """`samples` responses to each prompt under the weights that were loaded last; rows in the prompts' order.

    Finished slices are kept in the stage's `directory` under `label`, which tells them from the stage's other samples,
    and are not made again by a command that continues the stage. Progress counts responses, `done_before` of `total`
    being behind already.
    """
    recipe = context.recipe
    per_slice = max(1, math.ceil(4 * recipe.rollouts.max_concurrent / samples))
    slices = [prompts.slice(start, per_slice) for start in range(0, prompts.num_rows, per_slice)]
    kept = KeptSamples(directory, label)
    found = {number: kept.read(number, part, samples) for number, part in enumerate(slices)}
    tables = {number: table for number, table in found.items() if table is not None}
    missing = [number for number in range(len(slices)) if number not in tables]
    total = total or prompts.num_rows * samples
    done = done_before + sum(table.num_rows for table in tables.values())
    context.progress.update(done, total, "responses")

    def begin(part: pa.Table, generator: Any) -> Any:
        return generator.sample.remote(part, samples, recipe.sampling, seed)

    if missing:
        generators = context.crew.generators(context.base_model(), context.tokenizer, context.max_sequence_tokens())
        calls = [partial(begin, slices[number]) for number in missing]
        for position, table in context.crew.have_done(generators, calls, f"samples ({label})"):
            context.check_lease()
            kept.keep(missing[position], table)
            tables[missing[position]] = table
            done += table.num_rows
            context.progress.update(done, total, "responses")
            interruption.stop_if_requested(f"sampling, {done:,} of {total:,} responses")
    return pa.concat_tables([tables[number] for number in range(len(slices))])


def reward_scores(context: Context, samples: pa.Table) -> list[float]:
    """The reward of every row of a table with prompt_tokens and response_tokens, by the reward that is loaded."""
    scorers, _ = context.crew.scoring_pools()

    def begin(part: pa.Table, scorer: Any) -> Any:
        return scorer.score_pairs.remote(part["prompt_tokens"].to_pylist(), part["response_tokens"].to_pylist())

    return _by_row(context, samples, scorers, begin, "rewards", "scores")


def reference_logprobs(context: Context, samples: pa.Table, temperature: float) -> list[list[float]]:
    """Log-probabilities, under the reference that is loaded, of every response token of every row."""
    _, references = context.crew.scoring_pools()

    def begin(part: pa.Table, reference: Any) -> Any:
        prompts, responses = part["prompt_tokens"].to_pylist(), part["response_tokens"].to_pylist()
        return reference.logprobs_of.remote(prompts, responses, temperature)

    return _by_row(context, samples, references, begin, "the reference's log-probabilities", "reference scores")


def _by_row(
    context: Context,
    table: pa.Table,
    actors: dict[str, Any],
    begin: Callable[[pa.Table, Any], Any],
    what: str,
    unit: str,
) -> list[Any]:
    """What the actors answer for each row of `table`, in its order. `begin` gives an actor some of the rows; progress
    counts them in `unit`."""
    own = context.recipe.scoring.rows_per_batch
    rows = max(ROWS_PER_CALL // own, 1) * own
    parts = [table.slice(start, rows) for start in range(0, table.num_rows, rows)]
    found: dict[int, list[Any]] = {}
    done = 0
    for number, answers in context.crew.have_done(actors, [partial(begin, part) for part in parts], what):
        found[number] = answers
        done += len(answers)
        context.progress.update(done, table.num_rows, unit)
    return [answer for number in range(len(parts)) for answer in found[number]]


def reward_call(context: Context, reward: RewardSettings | None = None) -> Any:
    """What gives a scoring process the run's reward, or `reward`: an `actors.recruits.Call`."""
    from actors.recruits import Call

    tables = [
        str(path)
        for path in sorted(context.run.root.rglob("*.parquet"))
        if path.stem.startswith(_WITH_PROMPTS) and SET_ASIDE not in path.parts
    ]
    settings = reward or context.recipe.reward
    if settings.model is not None:
        settings = settings.model_copy(update={"model": whereabouts(settings.model)})
    directory = str(context.round.reward_model / "export")
    return Call("load_reward", (settings, directory, context.tokenizer, tables))


def load_reward(context: Context, reward: RewardSettings | None = None) -> None:
    """Give the scorers the run's reward, or `reward`."""
    scorers, _ = context.crew.scoring_pools()
    call = reward_call(context, reward)
    calls = {name: call.on(scorer) for name, scorer in scorers.items()}
    context.crew.wait_for(calls, "the reward model to load")


def load_reference(context: Context, directory: str) -> None:
    """Give the references their model."""
    _, references = context.crew.scoring_pools()
    calls = {name: reference.load_reference.remote(directory) for name, reference in references.items()}
    context.crew.wait_for(calls, "the reference model to load")
