"""The pipeline: the stages of a run in their order, each reused where nothing that it reads has changed."""

import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from amenable import interruption
from amenable.crew import Crew
from amenable.doctor import check_before_start
from amenable.early_checks import check_early, check_source, check_variables
from amenable.gpu_budget import FILE as GPU_HOURS
from amenable.gpu_budget import GpuBudget
from amenable.permanent_failure import is_automatic, recorded
from amenable.progress import Progress
from amenable.recipe import Recipe
from amenable.recipe_loading import recipe_hash
from amenable.run_directory import RunDirectory
from amenable.run_history import recorded_work
from amenable.run_lease import SUCCESSION_S, held
from amenable.stage_reuse import StageSpec, begin, complete, done, read_record
from amenable.stages import collect, data, evaluation, ppo, reward_model, supervised
from amenable.stages.context import Context, Stage
from amenable.stages.kept_samples import SAMPLES_PARTIAL
from amenable.stages.sources import reward_hashes
from amenable.summary import StageSummary, Summary
from cluster.address import cluster_place
from cluster.under_job import address_here, check_run_directory
from corpus.problems import RunProblem, UsageProblem
from learners.checkpoint_place import CHECKPOINTS, CheckpointPlace, checkpoints_of
from learners.tracking import check_wandb

HOLDER_LOOK_S = 5.0
"""Seconds between two looks at a lease whose holder may be dead. House default."""

ONLY_TO_CONTINUE = (CHECKPOINTS, ppo.WEIGHTS, SAMPLES_PARTIAL)
"""What a stage keeps in its directory to continue from: of no use once stage.json says that it is done."""

REWARD_FILES = "reward_files"
"""What stages read of a reward that the run did not train."""

NOT_READ = {
    "checkpoint_seconds",
    "checkpoint_every",
    "checkpoints_kept",
    "lease_s",
    "batch_deadline_s",
    "straggler_bound_s",
    "mismatch_bound_nats",
    "min_effective_sample_size",
    "timeout_s",
    "deadline_s",
    "token_variable",
}
"""Fields of stages' slices that decide when something is saved or given up, or who may ask a reward service, and
nothing of what is made. Nor are the number of ranks, the ZeRO stage and the size of micro-batches read: they change
what is learned by its rounding, and in supervised stages by which units dropout draws. A run goes on from its
checkpoints, and with its stages, where they are changed."""


def stages_of(recipe: Recipe, run: RunDirectory, sources: dict[str, str] | None = None) -> list[Stage]:
    """The stages of a run in their order. A stage reads its slices of the recipe and what its parents made.

    `sources` are `data.source_hashes(recipe)`, where the caller has them already: large files take their time.
    """
    first = run.round(1)
    collects = recipe.corpus is None
    base = () if recipe.model.base is not None else (run.base,)
    compared = (first.collect,) if collects else ()

    def plain(*slices: str) -> dict[str, Any]:
        dumped = recipe.model_dump(mode="json")
        found: dict[str, Any] = {"seed": recipe.seed}
        for name in slices:
            here: Any = dumped
            for part in name.split("."):
                here = here[part]
            found[name] = (
                {key: value for key, value in here.items() if key not in NOT_READ} if isinstance(here, dict) else here
            )
        return found

    def stage(name: str, directory: Path, body: Any, reads: dict[str, Any], *parents: Path) -> Stage:
        return Stage(name, StageSpec(name, directory, reads, parents), body)

    learned = ("learners.engine.dtype", "tokens", "model.base")
    found = [stage("data", run.data, data.run, data.reads(recipe, sources))]
    if recipe.model.base is None:
        found.append(stage("base", run.base, supervised.run_base, plain("base", "model.shape", *learned), run.data))
    found.append(stage("sft", run.sft, supervised.run_sft, plain("sft", *learned), run.data, *base))
    generated = ("sampling", "rollouts.dtype", "tokens.max_prompt_tokens")
    reward = {REWARD_FILES: reward_hashes(recipe.reward)}
    if collects:
        found.append(
            stage("collect", first.collect, collect.run, plain("collect", "world", *generated), run.data, run.sft)
        )
    found += [
        stage("rm", first.reward_model, reward_model.run_rm, plain("rm", *learned), run.data, run.sft, *compared),
        stage(
            "select-sft",
            first.select_sft,
            reward_model.run_select_sft,
            plain("select_sft", "reward", "scoring.dtype", *generated) | reward,
            run.data,
            run.sft,
            first.reward_model,
        ),
        stage("ppo-init", first.ppo_init, supervised.run_ppo_init, plain("ppo_init", *learned), run.data, *base),
        stage(
            "ppo",
            first.ppo,
            ppo.run,
            plain(
                "ppo",
                "reward",
                "scoring.dtype",
                "scoring.rows_per_batch",
                "rollouts.kv_on_publish",
                *learned,
                *generated,
            )
            | reward,
            run.data,
            first.reward_model,
            first.ppo_init,
        ),
        stage(
            "eval",
            first.evaluation,
            evaluation.run,
            plain("evaluation", "reward", "scoring.dtype", *generated) | reward,
            run.data,
            *base,
            *compared,
            run.sft,
            first.reward_model,
            first.select_sft,
            first.ppo_init,
            first.ppo,
        ),
    ]
    return found


def models_read(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, dict[str, str]]:
    """What `stages` read of models and functions that are given, by what the recipe calls them: sha256 by file, or the
    commit on the Hub."""
    given = ((recipe.model.base, data.BASE_FILES), (recipe.reward.model or recipe.reward.function, REWARD_FILES))
    return {
        name: stage.spec.reads[read] for name, read in given for stage in stages if name and read in stage.spec.reads
    }


def run_pipeline(
    recipe: Recipe, until: str | None, progress: Progress, address: str | None, variables: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the stages up to `until` (all where None) and the report; returns `Summary` as a dict. Every node must have
    the environment `variables`. Under a Ray job it runs on the cluster whose job it is.

    Raises UsageProblem for bad input, RunProblem where the run cannot go on, Interrupted after a checkpoint.
    """
    started = time.monotonic()
    check_run_directory(recipe.run_directory)
    address = address_here(address)
    run = RunDirectory(recipe.run_directory)
    check_early(recipe, address)
    check_variables(variables)
    if address is None and recipe.tracking.wandb is not None:  # elsewhere it is the learners' nodes that count
        check_wandb(recipe.tracking.wandb)
    sources = data.source_hashes(recipe)
    stages = stages_of(recipe, run, sources)
    models = models_read(recipe, stages)
    names = [stage.name for stage in stages]
    if until is not None:
        if until not in names:
            raise UsageProblem(
                f"This recipe has no stage {until!r}; its stages are {', '.join(names)}.", "recipe/stage"
            )
        stages = stages[: names.index(until) + 1]
    progress.plan([stage.name for stage in stages])
    run.create()
    budget = GpuBudget(run.root / GPU_HOURS, recipe.limits.gpu_hours)
    asked = {"recipe": recipe.name, "recipe_hash": recipe_hash(recipe), "until": until, "address": address}
    with (
        # After the loss of a head its successor may come before the lease shows that its holder is dead.
        held(run.lease, SUCCESSION_S if is_automatic() else 0.0, partial(_wait_for_holder, progress)) as lease,
        recorded_work(run.place, {**asked, "holder": lease.epoch}),
        Crew(recipe, run.root / "ray-train", progress, address, lease.run_epoch, budget.hold) as crew,
    ):
        context = Context(recipe, run, progress, crew, lease.check)
        if address is not None:
            crew.join()
            with recorded(recipe, "the doctor"):
                check_before_start(recipe, variables, progress)
        with _kept(context), budget.counting(lease.check):
            run.write_recipe(recipe)
            summaries: dict[str, StageSummary] = {}
            for stage in stages:
                lease.check()
                interruption.stop_if_requested(f"the beginning of {stage.name}")
                summaries[run.relative(stage.spec.directory)] = _run_stage(context, stage)
                lease.check()
                run.write_lineage(recipe.name, sources, _data_sets(context), models)
            return _finish(context, summaries, until, time.monotonic() - started)


def _wait_for_holder(progress: Progress, held: UsageProblem) -> None:
    with progress.waiting(f"a sign of life of whoever holds the run's lease ({held})"):
        interruption.wait(HOLDER_LOOK_S)
    interruption.stop_if_requested("the wait for the run's last holder")


def _data_sets(context: Context) -> dict[str, dict[str, str]]:
    made = read_record(context.run.data)
    return data.data_sets(context.recipe, made.values.get(data.HUB_CARDS, {}) if made is not None else {})


@contextmanager
def _kept(context: Context) -> Iterator[None]:
    """Around the work on a run that an object store keeps: its working copy is made as the store is, and at the end,
    also of a run that was interrupted or failed, the store as the copy is. Around any other run: nothing."""
    stored = context.run.stored
    if stored is None:
        yield
        return
    with context.progress.waiting(f"what {context.run.name} holds"):
        stored.pull()
    try:
        yield
    except Exception:
        try:
            stored.push(context.check_lease)
        except (RunProblem, OSError) as second:  # what went wrong first is what a person must hear of
            context.progress.note(f"What was done since the last checkpoint was not stored: {second}")
        raise
    stored.push(context.check_lease)


def _run_stage(context: Context, stage: Stage) -> StageSummary:
    progress = context.progress
    state = done(stage.spec)
    if state.record is not None:
        _remove_what_only_continues(context, stage.spec)  # a command that was killed after its commit left it
        progress.reuse_stage(stage.name)
        return StageSummary(reused=True, seconds=state.record.seconds, values=_shown(state.record.values))
    progress.stage(stage.name)
    began = time.monotonic()
    context.check_lease()  # what is stale is moved aside now; to look at large files has taken its time
    beginning = begin(stage.spec)
    if beginning.resumes or beginning.set_aside:
        progress.note(beginning.why)
    context.store()
    with recorded(context.recipe, stage.name), context.crew.at(stage.name):
        finished = stage.body(context, stage.spec)
    context.check_lease()  # and once more just before the commit: hashes of large files take minutes
    record = complete(
        stage.spec, finished.files, time.monotonic() - began, finished.values, may_commit=context.check_lease
    )
    context.store()
    _remove_what_only_continues(context, stage.spec)
    progress.finish_stage(_figures(record.values))
    return StageSummary(reused=False, seconds=record.seconds, values=_shown(record.values))


def _remove_what_only_continues(context: Context, spec: StageSpec) -> None:
    """What resists takes room, and harms nothing. Checkpoints that a person pinned stay, and those of another version
    of the program."""
    for name in ONLY_TO_CONTINUE:
        if name != CHECKPOINTS:
            shutil.rmtree(spec.directory / name, ignore_errors=True)
    try:
        CheckpointPlace(checkpoints_of(spec.directory, context.run.stored)).remove_all()
    except RunProblem as problem:
        context.progress.note(str(problem))


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a stage: what fits a table's cell."""
    return {name: value for name, value in values.items() if isinstance(value, int | float | str | bool)}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    wanted = ("loss", "valid_loss", "valid_accuracy", "tokens_per_s", "episodes_per_second", "responses", "reward")
    return {name: float(values[name]) for name in wanted if isinstance(values.get(name), int | float)}


def _finish(context: Context, stages: dict[str, StageSummary], until: str | None, seconds: float) -> dict[str, Any]:
    from evaluation.report import build_report
    from evaluation.results import summary
    from evaluation.schema import read_results

    run, recipe = context.run, context.recipe
    times = {name: stage.seconds for name, stage in stages.items()} | {"command": round(seconds, 1)}
    found: dict[str, Any] = {}
    results = context.round.evaluation / "results.json"
    if "round-01/eval" in stages:
        whole = summary(read_results(results), run=recipe.name)
        keys = Summary.model_fields.keys() - {"schema_version", "run", "synthetic", "seconds"}
        found = {key: value for key, value in whole.items() if key in keys}
    answer = Summary(
        run=recipe.name,
        run_directory=recipe.run_directory,
        synthetic=recipe.synthetic,
        until=until,
        stages=stages,
        seconds=times,
        report="report.html",
        **found,
    )
    context.check_lease()
    run.write_summary(answer)
    context.check_lease()
    build_report(run.root)
    return answer.model_dump(mode="json")


def score_comparisons(recipe: Recipe, comparisons: str, progress: Progress, address: str | None) -> dict[str, Any]:
    """Scores a file of comparisons with the run's trained reward model.

    Returns `reward_model`, a RewardModelResult as a dict, and `rows`: how many were `scored`, how many left out because
    of `long_prompts`, and how many of their responses cut (`cut_responses`).
    Raises UsageProblem where the reward model is not trained yet, or the file holds no comparisons to score.
    """
    check_run_directory(recipe.run_directory)
    address = address_here(address)
    run = RunDirectory(recipe.run_directory)
    with _at_hand(run):
        return _score_comparisons(recipe, run, comparisons, progress, address)


@contextmanager
def _at_hand(run: RunDirectory) -> Iterator[None]:
    """Within it, a run that an object store keeps is in its working copy, and no other command changes either."""
    if run.stored is None or not run.is_stored():
        yield
        return
    run.create()
    with run.lease():
        run.stored.pull()
        yield


def _score_comparisons(
    recipe: Recipe, run: RunDirectory, comparisons: str, progress: Progress, address: str | None
) -> dict[str, Any]:
    from actors.rewards import RewardSettings
    from corpus.schemas import read_table
    from corpus.tokenising import counts

    if read_record(run.round(1).reward_model) is None:
        directory = recipe.run_directory
        elsewhere = "" if Path(directory) == Path("runs") / recipe.name else f" --run {shlex.quote(directory)}"
        raise UsageProblem(
            f"There is no trained reward model in {directory}; run `amenable rm RECIPE{elsewhere}`, with this recipe, "
            "first.",
            "reward/missing",
        )
    if address is not None:
        cluster_place(address)
    check_source(comparisons)
    progress.plan(["comparisons"])
    progress.stage("comparisons")
    table = data.file_comparisons(comparisons, str(run.data / "tokenizer"), recipe.tokens)
    for sentence in data.told({comparisons: table}, recipe.tokens):
        progress.note(sentence)
    with Crew(recipe, run.root / "ray-train", progress, address) as crew:
        context = Context(recipe, run, progress, crew)
        from amenable.stages.sampling import load_reward

        load_reward(context, RewardSettings())
        train = read_table(reward_model.comparisons(context, "train"), "comparisons")
        result = evaluation.comparison_result(context, table, train, is_judged=False)
    progress.finish_stage(f"{result.accuracy.pairs} pairs")
    rows = {"scored": table.num_rows, **counts(table)}
    return {"rows": rows, "reward_model": result.model_dump(mode="json")}
