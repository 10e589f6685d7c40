"""Reward-model training, and with it the choice of the SFT baseline."""

import json

import numpy as np

from amenable.json_files import write_json
from amenable.stage_reuse import StageSpec
from amenable.stages.context import Context, Finished
from amenable.stages.sampling import load_into_generators, load_reward, reward_scores, sample, start_actors
from amenable.stages.supervised import LOGS, sft_epoch


def comparisons(context: Context, name: str) -> str:
    """The comparisons table `name` ("train", "valid", "heldout-labelers"): collected, or given with the corpus."""
    where = context.round.collect if context.recipe.corpus is None else context.run.data
    return str(where / f"comparisons-{name}.parquet")


def run_rm(context: Context, spec: StageSpec) -> Finished:
    """Trains the reward model, all pairs of a prompt as one batch element, from the SFT model."""
    from pathlib import Path

    from learners.reward_model import RewardModelJob, train_reward_model

    recipe = context.recipe
    context.crew.scoring()  # their imports run beside the training
    job = RewardModelJob(
        stage="rm",
        identity=context.identity(spec),
        settings=recipe.rm,
        engine=recipe.learners.engine,
        seed=recipe.seed + 4,
        directory=spec.directory,
        stored=context.run.stored,
        tracked=context.tracked(),
        start=sft_epoch(context, recipe.rm.start_epoch),
        tokenizer=context.tokenizer,
        comparisons=Path(comparisons(context, "train")),
        comparisons_valid=Path(comparisons(context, "valid")),
        demonstrations=context.data("demonstrations-train"),
    )
    result = context.learn(train_reward_model, job)
    return Finished([spec.directory / "export", *(spec.directory / name for name in LOGS)], result)


def run_select_sft(context: Context, spec: StageSpec) -> Finished:
    """Samples validation prompts from every SFT epoch and selects the one with the best mean reward."""
    from corpus.schemas import read_table

    recipe = context.recipe
    start_actors(context)
    load_reward(context)
    prompts = read_table(str(context.data("demonstrations-valid")), "demonstrations")
    prompts = prompts.slice(0, recipe.select_sft.prompts)
    exports = context.values(context.run.sft)["exports"]
    total = len(exports) * prompts.num_rows
    found = []
    for number, export in enumerate(exports):
        name, done = export["directory"], number * prompts.num_rows
        load_into_generators(context, str(context.run.sft / name), f"sft epoch {number + 1}")
        samples = sample(context, prompts, 1, recipe.seed + 5, spec.directory, name, done, total)
        reward = float(np.mean(reward_scores(context, samples)))
        found.append({"directory": name, "valid_loss": export.get("valid_loss"), "reward": reward})
    best = max(found, key=lambda each: each["reward"])
    selection = {"schema_version": 1, "selected": best["directory"], "reward": best["reward"], "epochs": found}
    context.check_lease()
    write_json(spec.directory / "selection.json", selection)
    return Finished([spec.directory / "selection.json"], {"selected": best["directory"], "reward": best["reward"]})


def selected_sft(context: Context) -> str:
    """The SFT baseline: what win rates are measured against."""
    selection = json.loads((context.round.select_sft / "selection.json").read_text())
    return str(context.run.sft / selection["selected"])
