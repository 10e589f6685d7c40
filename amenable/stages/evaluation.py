"""The eval stage: held-out prompts answered by every model, scored, compared, and written down."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from amenable.stage_reuse import StageSpec
from amenable.stages.context import Context, Finished
from amenable.stages.judge import gold_components
from amenable.stages.reward_model import comparisons, selected_sft
from amenable.stages.sampling import (
    load_into_generators,
    load_reference,
    load_reward,
    reference_logprobs,
    reward_scores,
    sample,
    start_actors,
)


def models(context: Context) -> dict[str, str]:
    """The models that are compared, by name: base, the selected SFT epoch, ppo-init, and PPO's EMA policy."""
    return {
        "base": context.base_model(),
        "sft": selected_sft(context),
        "ppo-init": str(context.round.ppo_init / "export"),
        "ppo": str(context.round.ppo / "ema"),
    }


def run(context: Context, spec: StageSpec) -> Finished:
    """Writes samples.parquet and results.json."""
    from corpus.schemas import read_table
    from evaluation.results import evaluate, summary
    from evaluation.schema import write_results

    recipe, settings = context.recipe, context.recipe.evaluation
    prompts = read_table(str(context.data("prompts-heldout")), "prompts").slice(0, settings.prompts)
    names = models(context)
    start_actors(context)
    load_reward(context)
    total = len(names) * prompts.num_rows * settings.samples_per_prompt
    sampled: dict[str, pa.Table] = {}
    for number, (name, directory) in enumerate(names.items()):
        load_into_generators(context, directory, name)
        count = settings.samples_per_prompt
        done = number * prompts.num_rows * count
        sampled[name] = sample(context, prompts, count, recipe.seed + 8, spec.directory, name, done, total)
    load_reference(context, names["ppo-init"])
    tables = [_scored(context, name, table, prompts) for name, table in sampled.items()]
    answers = pa.concat_tables(tables)
    context.check_lease()
    pq.write_table(answers, spec.directory / "samples.parquet")
    losses = {name: _pretraining_loss(context, directory) for name, directory in names.items()}
    results = evaluate(
        answers,
        synthetic=recipe.synthetic,
        pretraining_losses=losses,
        reward_model=reward_model_result(context),
        seed=recipe.seed,
    )
    context.check_lease()
    write_results(results, spec.directory / "results.json")
    found = summary(results, run=recipe.name)
    kept = {key: found[key] for key in ("learned", "verdict", "judge", "win_rates")}
    return Finished([spec.directory / "samples.parquet", spec.directory / "results.json"], kept)


def _scored(context: Context, name: str, samples: pa.Table, prompts: pa.Table) -> pa.Table:
    """The columns that `evaluation.results.evaluate` reads, and the gold score's components where there is one."""
    rewards = reward_scores(context, samples)
    reference = reference_logprobs(context, samples, context.recipe.sampling.temperature)
    kl = [sum(own) - sum(its) for own, its in zip(samples["logprobs"].to_pylist(), reference, strict=True)]
    by_id = {row["prompt_id"]: row for row in prompts.select(["prompt_id", "prompt", "meta"]).to_pylist()}
    rows = samples.select(["prompt_id", "sample", "response", "finish_reason"]).to_pylist()
    judged: list[tuple[float | None, dict[str, float] | None]] = [(None, None)] * len(rows)
    if context.recipe.synthetic:
        judged = [gold_components(by_id[row["prompt_id"]]["meta"], row["response"]) for row in rows]
    columns: dict[str, Any] = {
        "prompt_id": [row["prompt_id"] for row in rows],
        "prompt": [by_id[row["prompt_id"]]["prompt"] for row in rows],
        "model": [name] * len(rows),
        "sample": [row["sample"] for row in rows],
        "response": [row["response"] for row in rows],
        "length": [len(tokens) for tokens in samples["response_tokens"].to_pylist()],
        "finish_reason": [row["finish_reason"] for row in rows],
        "reward": rewards,
        "gold": pa.array([total for total, _ in judged], pa.float64()),
        "kl": pa.array(kl, pa.float64()),
    }
    if context.recipe.synthetic:
        parts = [list((components or {}).items()) for _, components in judged]
        columns["components"] = pa.array(parts, pa.map_(pa.string(), pa.float64()))
    return pa.table(columns)


def _pretraining_loss(context: Context, directory: str) -> float:
    """Nats a token on held-out pretraining documents: what alignment costs elsewhere."""
    from corpus.schemas import read_table

    table = read_table(str(context.data("pretraining-valid")), "pretraining")
    documents = table["tokens"].slice(0, context.recipe.evaluation.pretraining_documents).to_pylist()
    room = context.recipe.tokens.context_tokens
    documents = [document[:room] for document in documents if len(document) > 1]
    load_reference(context, directory)
    rows = pa.table({"prompt_tokens": [d[:1] for d in documents], "response_tokens": [d[1:] for d in documents]})
    logprobs = reference_logprobs(context, rows, 1.0)
    return -float(np.sum([sum(row) for row in logprobs])) / sum(len(row) for row in logprobs)


def reward_model_result(context: Context) -> Any:
    """Accuracy of the run's reward model, whatever rewards PPO, on held-out comparisons, by training and held-out
    labelers, beside baselines. The scorers have that model loaded afterwards."""
    from pathlib import Path

    from actors.rewards import RewardSettings
    from corpus.schemas import read_table

    if context.recipe.reward.kind != "trained":
        load_reward(context, RewardSettings())
    valid = read_table(comparisons(context, "valid"), "comparisons")
    train = read_table(comparisons(context, "train"), "comparisons")
    unseen = None
    if Path(comparisons(context, "heldout-labelers")).exists():
        unseen = read_table(comparisons(context, "heldout-labelers"), "comparisons")
    return comparison_result(context, valid, train, unseen, is_judged=context.recipe.synthetic)


def comparison_result(
    context: Context, valid: pa.Table, train: pa.Table, unseen: pa.Table | None = None, *, is_judged: bool
) -> Any:
    """How often the loaded reward puts the pairs of `valid` in the labelers' order, beside baselines fit on `train`.

    `is_judged`: `valid` is a table of the built-in world, whose gold judge knows its prompts, and is asked too.
    """
    from evaluation.rm_baselines import measured_baselines, pair_accuracy
    from evaluation.schema import RewardModelResult

    scores = _ranking_scores(context, valid)
    ids = valid["prompt_id"].to_pylist()
    gold_accuracy = None
    if is_judged:
        gold_ranks = [
            _ranks([gold_components(row["meta"], text)[0] for text in row["responses"]]) for row in valid.to_pylist()
        ]
        gold_accuracy = pair_accuracy(scores, gold_ranks, ids)
    found, left_out = measured_baselines(train, valid, seed=context.recipe.seed)
    return RewardModelResult(
        accuracy=pair_accuracy(scores, valid["ranks"].to_pylist(), ids),
        heldout_labelers=None
        if unseen is None
        else pair_accuracy(
            _ranking_scores(context, unseen), unseen["ranks"].to_pylist(), unseen["prompt_id"].to_pylist()
        ),
        gold_accuracy=gold_accuracy,
        baselines=found,
        baselines_left_out=left_out,
    )


def _ranking_scores(context: Context, table: pa.Table) -> list[list[float]]:
    rows = table.to_pylist()
    flat = pa.table(
        {
            "prompt_tokens": [row["prompt_tokens"] for row in rows for _ in row["responses"]],
            "response_tokens": [tokens for row in rows for tokens in row["response_tokens"]],
        }
    )
    scores = iter(reward_scores(context, flat))
    return [[next(scores) for _ in row["responses"]] for row in rows]


def _ranks(scores: list[float]) -> list[int]:
    """Rank 0 for the highest score; equal scores share one."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]
