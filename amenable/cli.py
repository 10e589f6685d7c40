"""The command line.

Each command imports what it needs when it runs, so that help comes at once and a wrong word in a recipe is told in a
second, not after the twenty that torch, Ray and vLLM take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.arguments import Address, AsJson, Overrides, RecipeName, RunPath, Variables
from amenable.cluster_commands import add_to
from amenable.ending import RUN_PROBLEM, ending
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
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or the name of a run in ./runs.")],
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
            typer.echo(f"Report: {_short(path)}")


@app.command()
def audit(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or the name of a run in ./runs.")],
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
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or the name of a run in ./runs.")],
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
def serve(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's directory or address, or the name of a run in ./runs.")
    ],
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Where to listen; beyond this machine only with tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="The port to listen on.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="Who may use it, from amenable tokens add.")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Serve a run's models: an OpenAI-compatible API and a page for spot checks. It follows PPO while that trains."""
    from amenable.interruption import listening
    from amenable.serve import ENDING, served_run

    with ending(as_json, lambda: "the service") as answer, listening(ENDING):
        from amenable.serve import serve as served

        def ready(found: dict[str, Any]) -> None:
            answer(found)
            if not as_json:
                who = "this machine alone, without a token" if found["open"] else "whoever has a token"
                typer.echo(f"Serving {_short(found['run'])} at {found['url']} to {who}. Ctrl-C ends it.")
                if found["no_haproxy"] is not None:
                    typer.echo(f"Requests pass Ray Serve's slower proxy in Python: {found['no_haproxy']}.")

        served(served_run(run), host, port, address, token_file, ready)


@app.command()
def pin(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's directory or address, or the name of a run in ./runs.")
    ],
    version: Annotated[
        str | None,
        typer.Argument(metavar="VERSION", help="policy@UPDATE, or newest; without, what is served is told."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which version a run's service should serve as policy. Its replicas follow within seconds."""
    with ending(as_json, lambda: "the wish for a version") as answer:
        from amenable.serve import pin as asked
        from amenable.serve import served_run, told

        found = asked(served_run(run), version)
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


tokens = typer.Typer(
    help="Who may use a service: tokens with scopes, of which the file keeps hashes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(tokens, name="tokens")
TokenFile = Annotated[Path, typer.Argument(metavar="FILE", help="The token file; made where there is none.")]


@tokens.command("add")
def add_token(
    file: TokenFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.")],
    scopes: Annotated[str, typer.Option(metavar="SCOPES", help="Some of read,score,operate.")] = "read,score",
    as_json: AsJson = False,
) -> None:
    """Make a token and show it, once."""
    with ending(as_json, lambda: "the new token") as answer:
        from amenable.serve import scopes_of
        from serving.access import new_token

        made = new_token(file, name, scopes_of(scopes))
        answer({"token": made})
        if not as_json:
            typer.echo(f"{made}\nKeep it: the file has its hash alone.")


@tokens.command("list")
def list_tokens(file: TokenFile, as_json: AsJson = False) -> None:
    """List the tokens of a file."""
    with ending(as_json, lambda: "the list of tokens") as answer:
        from serving.access import read_tokens

        found = read_tokens(file).values()
        answer(
            {"tokens": [{"id": t.id, "name": t.name, "scopes": sorted(t.scopes), "created": t.created} for t in found]}
        )
        if not as_json:
            for each in found:
                typer.echo(f"{each.id}  {','.join(sorted(each.scopes))}  {each.created}  {each.name}")


@tokens.command("revoke")
def revoke(
    file: TokenFile,
    token: Annotated[str, typer.Argument(metavar="ID", help="The token's id, as amenable tokens list has it.")],
    as_json: AsJson = False,
) -> None:
    """Take a token back. A service that runs refuses it at once, and the sessions that it opened."""
    with ending(as_json, lambda: "the token") as answer:
        from serving.access import revoke_token

        revoke_token(file, token)
        answer({"revoked": token})
        if not as_json:
            typer.echo(f"Token {token} is revoked.")


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


add_to(app)
add_watching_to(app)


def _short(path: str) -> str:
    """`path` as a person here would type it; an address as it is."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def main() -> None:
    """The command `amenable`."""
    switch_telemetry_off()  # before a command imports what reads it
    app()
