"""The command line.

Each command imports what it needs when it runs, so that help comes at once and a wrong word in a recipe is told in a
second, not after the twenty that torch, Ray and vLLM take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.arguments import Address, AsJson, Overrides, RecipeName, Run, RunPath, Variables
from amenable.cluster_commands import add_to
from amenable.ending import RUN_PROBLEM, ending
from amenable.service_commands import add_to as add_serving_to
from amenable.watch_commands import add_to as add_watching_to
from corpus import logs
from corpus.telemetry import switch_telemetry_off

if TYPE_CHECKING:
    from amenable.progress import Progress
    from amenable.recipe import Recipe

app = typer.Typer(
    name="amenable",
    help="Train a language model to follow instructions from human feedback: SFT, a reward model, PPO-ptx.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"amenable {version('amenable')}")
        raise typer.Exit


@app.callback()
def amenable(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and end.")
    ] = False,
) -> None:
    """Train a language model to follow instructions from human feedback: SFT, a reward model, PPO-ptx."""


def _train(
    recipe: str,
    overrides: list[str] | None,
    until: str | None,
    run: str | None,
    address: str | None,
    variables: list[str] | None,
    as_json: bool,
) -> None:
    def work(settings: Recipe, progress: Progress) -> dict[str, Any]:
        from amenable.pipeline import run_pipeline
        from amenable.summary import Summary

        found = run_pipeline(settings, until=until, progress=progress, address=address, variables=variables or [])
        return Summary.model_validate(found).model_dump(mode="json")

    def tell(answer: dict[str, Any]) -> None:
        from amenable.outcome import console, tell_run
        from amenable.summary import Summary

        tell_run(console(), Summary.model_validate(answer))

    _command(recipe, overrides, run, as_json, work, tell)


def _command(
    recipe: str,
    overrides: list[str] | None,
    run: str | None,
    as_json: bool,
    work: Callable[[Recipe, Progress], dict[str, Any]],
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Loads the recipe, does `work` with it under live progress and signal handling, and answers."""
    from amenable.interruption import listening
    from amenable.progress import Progress

    progress = Progress(json=as_json)
    with ending(as_json, progress.where) as answer, listening():
        from amenable.early_checks import check_alone
        from amenable.permanent_failure import loaded
        from amenable.recipe import Recipe
        from amenable.recipe_loading import load_recipe

        elsewhere = [f"run_directory={json.dumps(run, ensure_ascii=False)}"] if run is not None else []
        logs.wanted()
        settings = loaded(lambda: load_recipe(recipe, [*(overrides or []), *elsewhere], Recipe), check_alone, run)
        logs.begin("driver", run=settings.name)
        with progress:
            found = work(settings, progress)
        answer(found)
        if not as_json:
            tell(found)


def _training_command(name: str, until: str | None, says: str) -> None:
    @app.command(name, help=says)
    def command(
        recipe: RecipeName,
        overrides: Overrides = None,
        run: RunPath = None,
        address: Address = None,
        variables: Variables = None,
        as_json: AsJson = False,
    ) -> None:
        _train(recipe, overrides, until, run, address, variables, as_json)


_training_command(
    "run",
    None,
    "Run a recipe from its data to the report. Stages done before are reused; after Ctrl-C the same command goes on.",
)
_training_command("sft", "sft", "Run a recipe as far as supervised fine-tuning (SFT).")
_training_command("collect", "collect", "Run a recipe as far as the ranked comparisons.")
_training_command("rm", "rm", "Run a recipe as far as the reward model (RM).")
_training_command("ppo", "ppo", "Run a recipe as far as PPO.")


@app.command("eval")
def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: RunPath = None,
    address: Address = None,
    variables: Variables = None,
    as_json: AsJson = False,
    comparisons: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Score this file of comparisons with the trained reward model instead."),
    ] = None,
) -> None:
    """Run a recipe as far as its evaluation. With --comparisons, score that file with its reward model."""
    if comparisons is None:
        _train(recipe, overrides, "eval", run, address, variables, as_json)
        return

    def work(settings: Recipe, progress: Progress) -> dict[str, Any]:
        from amenable.pipeline import score_comparisons

        found = score_comparisons(settings, comparisons, progress=progress, address=address)
        return {"run": settings.name, "comparisons": comparisons, **found}

    def tell(answer: dict[str, Any]) -> None:
        from amenable.outcome import console, tell_comparisons
        from evaluation.schema import RewardModelResult

        tell_comparisons(console(), comparisons, RewardModelResult.model_validate(answer["reward_model"]))

    _command(recipe, overrides, run, as_json, work, tell)


@app.command()
def report(
    run: Run,
    as_json: AsJson = False,
) -> None:
    """Write a run's report again. It may still be going: what is not there yet is said."""
    with ending(as_json, lambda: "the report") as answer:
        from amenable.run_directory import RunDirectory
        from evaluation.report import build_report

        directory = RunDirectory.find(run)
        with directory.for_reading() as readable:
            path = directory.keep_report(build_report(readable.root))
        answer({"report": path})
        if not as_json:
            from amenable.outcome import short_path

            typer.echo(f"Report: {short_path(path)}")


@app.command()
def audit(
    run: Run,
    as_json: AsJson = False,
) -> None:
    """Prove from a run's files that PPO trained every slot exactly once; exit code 1 where it did not.

    A run that is not finished is audited as far as it went.
    """
    with ending(as_json, lambda: "the audit") as answer:
        from amenable.run_directory import RunDirectory
        from evaluation.audit import audit_run

        directory = RunDirectory.find(run)
        with directory.for_reading() as readable:
            stages = audit_run(readable.root, with_weights=readable is directory)
        accepted = all(stage.accepted for stage in stages)
        answer({"run": run, "accepted": accepted, "stages": [stage.as_json() for stage in stages]})
        if not as_json:
            from amenable.outcome import console, tell_audit

            for stage in stages:
                tell_audit(console(), stage)
        if not accepted:
            raise typer.Exit(RUN_PROBLEM)


@app.command()
def scale(
    run: Run,
    wish: Annotated[
        str | None, typer.Argument(metavar="generators=N", help="How many generators; without, who there is is told.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start or retire generators of a run whose PPO is under way."""
    with ending(as_json, lambda: "the wish for generators") as answer:
        from amenable.run_directory import RunDirectory
        from amenable.scale import scale as asked
        from amenable.scale import told

        found = asked(RunDirectory.find(run), wish)
        answer(found)
        if not as_json:
            typer.echo(told(found))


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    measured: Annotated[
        str | None, typer.Option("--from", metavar="RUN", help="Calibrate by what this run measured in its PPO.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="The device: a name of cluster/hardware.yaml, or a file with one."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Plan for this model instead: a preset, a directory, or a name on the Hub.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what PPO of a recipe takes: roles, memory, generators, time, GPU-hours and cost, and why."""
    with ending(as_json, lambda: "the plan") as answer:
        from amenable.plan import answer as as_plain
        from amenable.plan import planned, told
        from amenable.recipe import Recipe
        from amenable.recipe_loading import load_recipe

        found = planned(load_recipe(recipe, list(overrides or []), Recipe), measured, hardware, model)
        answer(as_plain(found))
        if not as_json:
            typer.echo(told(found))


@app.command()
def manifests(
    recipe: RecipeName,
    overrides: Overrides = None,
    image: Annotated[str | None, typer.Option(metavar="IMAGE", help="The image of every pod, best by digest.")] = None,
    storage: Annotated[
        str, typer.Option(metavar="DIR", help="Where runs are kept: below /shared, or s3://…, gs://….")
    ] = "/shared/runs",
    claim: Annotated[
        str, typer.Option(metavar="NAME", help="The PersistentVolumeClaim that pods mount at /shared.")
    ] = "amenable-runs",
    parts: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help="Some of storage,common,train,serve,interactive: the claim, what all share, RayJob, RayService, "
            "RayCluster.",
        ),
    ] = "common,train",
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="Kueue's queue for the job.")] = None,
    spot: Annotated[bool, typer.Option(help="Let generators run on spot nodes.")] = True,
    monitoring: Annotated[
        bool, typer.Option(help="Write Prometheus alerts and a Grafana dashboard too (docs/observability.md).")
    ] = False,
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="The device that is planned with, as in amenable plan.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that is planned for, as in amenable plan.")
    ] = None,
    measured: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="Plan, and give pods time, by what this run measured in its PPO."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a recipe's Kubernetes manifests (KubeRay), made from its plan, to standard output."""
    with ending(as_json, lambda: "the manifests") as answer:
        from amenable.manifests import parts_of, rendered
        from amenable.recipe import Recipe
        from amenable.recipe_loading import load_recipe

        settings = load_recipe(recipe, list(overrides or []), Recipe)
        made = rendered(
            settings, image, storage, claim, parts_of(parts), queue, spot, hardware, model, monitoring, measured
        )
        answer({"manifests": made.text, "remarks": list(made.remarks)})
        if not as_json:
            typer.echo(made.text, nl=False)
            for remark in made.remarks:
                typer.echo(remark, err=True)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with the program."""
    with ending(as_json, lambda: "the list of recipes") as answer:
        from amenable.recipe_loading import packaged_recipes

        found = packaged_recipes()
        answer({"recipes": [{"name": one.name, "path": str(one.path), "says": one.says} for one in found]})
        if not as_json:
            width = max((len(one.name) for one in found), default=0)
            for one in found:
                typer.echo(f"{one.name:{width}}  {one.says}")


add_serving_to(app)
add_to(app)
add_watching_to(app)


def main() -> None:
    """The command `amenable`."""
    switch_telemetry_off()  # before a command imports what reads it
    app()
