"""The commands about clusters: submit, resume, status, list, logs, stop, doctor. `cli` adds them to the program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amenable.arguments import Address, AsJson, Overrides, RecipeName, RunPath, Variables
from amenable.ending import INTERRUPTED, RUN_PROBLEM, ending

if TYPE_CHECKING:
    from amenable.submit import Prepared
    from cluster.job_server import JobServer

Dashboard = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The dashboard of a Ray cluster, such as http://HOST:8265; else RAY_API_SERVER_ADDRESS, else here.",
    ),
]
Owner = Annotated[
    str | None,
    typer.Option("--owner", metavar="NAME", help="Whose run it is; else AMENABLE_OWNER, else who is logged in."),
]
WorkingDirectory = Annotated[
    Path, typer.Option("--working-dir", metavar="DIR", help="The directory that travels with the job.")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="End once the job is submitted, without following it.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all and tell what would be asked of Ray; submit nothing.")
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run id, OWNER/NAME-HASH; its NAME or HASH where that is plain.")
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (submit, resume, status, logs, stop, doctor):
        app.command()(command)
    app.command("list")(list_runs)


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    address: Dashboard = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Keep the run in PLACE/OWNER/NAME-HASH: an address (s3://…, gs://…) or a directory that all nodes "
            "mount; else AMENABLE_STORAGE, else where the recipe says.",
        ),
    ] = None,
    owner: Owner = None,
    working_dir: WorkingDirectory = Path("."),
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Files that do not travel, as .gitignore writes them."),
    ] = None,
    variables: Variables = None,
    grace: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Time that a stopped job has to save a checkpoint; else learners.stop_grace_s and half a minute.",
        ),
    ] = None,
    driver_cpus: Annotated[
        float, typer.Option(metavar="N", min=0, help="CPUs that the job's own process reserves.")
    ] = 0.0,
    driver_memory: Annotated[
        float, typer.Option(metavar="GIB", min=0, help="Memory that the job's own process reserves.")
    ] = 0.0,
    driver_resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=AMOUNT", help="A resource that the job's own process reserves, as in head=1."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin a new run, though one of this recipe is there.")
    ] = False,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe as a job of a Ray cluster, and follow it. The same command again goes on with the same run."""
    with _asking(as_json, address) as (server, answer, environment):
        from amenable.submit import driver_resources, prepare, storage_of
        from cluster.jobs import Asked, Driver
        from cluster.run_ids import owner_of

        asked = Asked(
            recipe=recipe,
            overrides=tuple(overrides or ()),
            storage=storage_of(storage),
            variables=tuple(variables or ()),
            excludes=tuple(exclude or ()),
            grace_s=grace,
            driver=Driver(driver_cpus, driver_memory, driver_resources(driver_resource or [])),
        )
        prepared = prepare(asked, owner_of(owner), server.jobs(), working_dir.absolute(), fresh, environment)
        _submit(server, prepared, dry_run, no_wait, as_json, answer)


def resume(
    run: Run,
    address: Dashboard = None,
    owner: Owner = None,
    working_dir: WorkingDirectory = Path("."),
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run again as it was submitted last; it goes on from its newest checkpoint."""
    with _asking(as_json, address) as (server, answer, environment):
        from amenable.submit import prepare_again
        from cluster.run_ids import owner_of

        prepared = prepare_again(run, owner_of(owner), server.jobs(), working_dir.absolute(), environment)
        _submit(server, prepared, dry_run, no_wait, as_json, answer)


def status(run: Run, address: Dashboard = None, owner: Owner = None, as_json: AsJson = False) -> None:
    """Say how a run's newest attempt is."""
    with _asking(as_json, address) as (server, answer, _):
        from amenable.jobs import status as asked
        from amenable.jobs import told_status
        from cluster.run_ids import owner_of

        found = asked(server, run, owner_of(owner))
        answer(found)
        if not as_json:
            typer.echo(told_status(found))


def list_runs(
    address: Dashboard = None,
    owner: Owner = None,
    everybody: Annotated[bool, typer.Option("--all", help="The runs of everybody.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs that a cluster has jobs of."""
    with _asking(as_json, address) as (server, answer, _):
        from amenable.jobs import listed, told_list
        from cluster.run_ids import owner_of

        found = listed(server, None if everybody else owner_of(owner))
        answer({"runs": [job.as_json() for job in found]})
        if not as_json:
            typer.echo(told_list(found))


def logs(
    run: Run,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, and end with its exit code.")
    ] = False,
    address: Dashboard = None,
    owner: Owner = None,
) -> None:
    """Print what a run's newest job has written."""
    with _asking(False, address) as (server, _, _):
        from cluster.jobs import find_run
        from cluster.run_ids import owner_of

        job = find_run(server.jobs(), run, owner_of(owner))
        if not follow:
            typer.echo(server.logs(job.submission_id), nl=False)
            return
        _follow(server, job.submission_id, job.labels.run)


def stop(
    run: Run,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=1, help="Time to wait for its checkpoint; else what it was submitted with."
        ),
    ] = None,
    address: Dashboard = None,
    owner: Owner = None,
    as_json: AsJson = False,
) -> None:
    """Stop a run's job after a checkpoint; `amenable resume` goes on with it."""
    with _asking(as_json, address) as (server, answer, _):
        from amenable.jobs import stop as asked
        from amenable.jobs import told_stop
        from cluster.run_ids import owner_of

        found = asked(server, run, owner_of(owner), grace)
        answer(found)
        if not as_json:
            typer.echo(told_stop(found))


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe that is to run; without, the machines are looked at."),
    ] = None,
    overrides: Overrides = None,
    run: RunPath = None,
    address: Address = None,
    variables: Variables = None,
    as_json: AsJson = False,
) -> None:
    """Say whether this machine, or a cluster, can run a recipe: versions, devices, imports, storage, room. Exit code 1
    where it cannot."""
    from amenable.interruption import listening
    from amenable.progress import Progress

    progress = Progress(json=as_json)
    with ending(as_json, lambda: "the examination") as answer, listening("Ending the examination; once more at once."):
        from amenable.doctor import as_json as plain
        from amenable.doctor import examined, told
        from cluster.checks import failed

        with progress:
            findings = examined(recipe, overrides or [], run, address, variables or [], progress)
        answer(plain(findings))
        if not as_json:
            typer.echo(told(findings))
        if failed(findings):
            raise typer.Exit(RUN_PROBLEM)


@contextmanager
def _asking(as_json: bool, address: str | None) -> Iterator[tuple[JobServer, Any, dict[str, str]]]:
    """A command that asks the job server at `address`: the server, the function that answers, and the environment as it
    was before Ray's client changed it."""
    import os

    with ending(as_json, lambda: "the question to the cluster") as answer:
        environment = dict(os.environ)
        from cluster.job_server import JobServer, dashboard_url

        yield JobServer(dashboard_url(address)), answer, environment


def _submit(server: JobServer, prepared: Prepared, dry_run: bool, no_wait: bool, as_json: bool, answer: Any) -> None:
    from amenable.submit import send, told

    if dry_run:
        answer(prepared.as_json())
        if not as_json:
            typer.echo(told(prepared))
        return
    job = send(prepared, server)
    run = job.labels.run
    typer.echo(f"Submitted {run}, attempt {job.labels.attempt}, as {job.submission_id}.", err=as_json)
    if no_wait:
        answer(job.as_json())
        if not as_json:
            typer.echo(f"Follow it with amenable logs -f {run}")
        return
    _follow(server, job.submission_id, run, answer)


def _follow(server: JobServer, submission_id: str, run: str, answer: Any = lambda content: None) -> None:
    """Prints a job's lines until it has ended, and ends the command as the job did."""
    from amenable.submit import ended

    def write(lines: str) -> None:
        sys.stdout.write(lines)  # standard error with --json, where an answer follows
        sys.stdout.flush()

    try:
        job = server.follow(submission_id, write)
    except KeyboardInterrupt:
        typer.echo(
            f"\n{run} goes on. Follow it with amenable logs -f {run}, stop it with amenable stop {run}.", err=True
        )
        answer({"run": run, "submission_id": submission_id, "kind": "interrupted"})
        raise typer.Exit(INTERRUPTED) from None
    sentence, code = ended(job)
    typer.echo(sentence, err=True)
    answer(job.as_json())
    raise typer.Exit(code)
