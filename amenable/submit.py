"""`amenable submit` and `resume`: a run as a job of a Ray cluster, checked here before anything is sent."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from amenable.recipe import Recipe
from amenable.recipe_loading import load_recipe, recipe_files, recipe_hash, resolved
from cluster.git_version import git_version
from cluster.job_request import JobRequest, request_of
from cluster.job_server import JobServer
from cluster.jobs import DONE, FAILED, STOPPED, Asked, Job, Labels, find_run, next_attempt, taken
from cluster.run_ids import run_hash, run_id
from cluster.secrecy import check_no_secret, check_override, check_variable
from cluster.under_job import outlives_a_job
from cluster.working_directory import (
    WorkingDirectory,
    check_fits,
    check_has,
    travelling,
    upload_limit_bytes,
)
from corpus.audit_log import actor_here
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import below, is_object_store, normalised, without_options

STORAGE = "AMENABLE_STORAGE"
"""Environment variable: below which place runs are kept, where --storage does not say."""

GRACE_MARGIN_S = 30
"""Seconds that a job has beyond learners.stop_grace_s, the longest that a checkpoint may take, before Ray kills it."""


@dataclass(frozen=True)
class Prepared:
    """A run that could be submitted: what it is, what travels, and what Ray would be asked."""

    recipe: Recipe
    labels: Labels
    directory: WorkingDirectory
    request: JobRequest

    def as_json(self) -> dict[str, Any]:
        """What `--dry-run --json` tells."""
        labels, request = self.labels, self.request
        return {
            "run": labels.run,
            "attempt": labels.attempt,
            "submission_id": request.submission_id,
            "run_directory": labels.run_directory,
            "entrypoint": request.entrypoint,
            "metadata": request.metadata,
            "runtime_env": request.runtime_env,
            "entrypoint_resources": {
                "cpus": request.entrypoint_num_cpus,
                "memory_bytes": request.entrypoint_memory,
                "resources": request.entrypoint_resources,
            },
            "package": {"files": len(self.directory.files), "size_bytes": self.directory.package_bytes},
            "recipe": resolved(self.recipe),
        }


def place_of(recipe: Recipe, storage: str | None) -> str:
    """Where the run is kept: below `storage`, or where the recipe says; one spelling for one place, since a run's id is
    of its place too. Raises UsageProblem for a place that would be gone with the job's node."""
    place = storage if storage is not None else recipe.run_directory
    if is_object_store(place):
        without_options(place)  # refuses keys in an address
    elif not outlives_a_job(place):
        key = "--storage" if storage is not None else "run_directory"
        raise UsageProblem(
            f"{key} {place} is a relative path, and a job's working directory is gone when the job ends; give "
            "--storage s3://… or --storage /mounted/…, a place that all nodes of the cluster see.",
            "job/relative-directory",
        )
    return normalised(place)


def prepare(
    asked: Asked,
    owner: str,
    jobs: list[Job],
    root: Path,
    is_fresh: bool,
    environment: Mapping[str, str],
) -> Prepared:
    """Everything that can be known to be wrong before a submission, looked at; nothing is sent.

    `jobs` are those that the cluster has, `root` (absolute) is the working directory that travels. Raises UsageProblem
    for a recipe, place, secret or directory that will not do, and where the run has a live job.
    """
    for override in asked.overrides:
        check_override(override, environment)
    for name in asked.variables:
        check_variable(name)
    files = recipe_files(_found(asked.recipe, root))
    recipe = load_recipe(_found(asked.recipe, root), list(asked.overrides), Recipe)
    check_no_secret(recipe.model_dump(mode="json"), environment, "recipe")
    place = place_of(recipe, asked.storage)
    told = recipe.model_dump(mode="json")
    fresh = secrets.token_hex(4) if is_fresh else asked.fresh or _fresh_before(jobs, owner, told, place)
    if is_fresh and asked.storage is None:
        raise UsageProblem(
            f"--fresh begins a run in a directory of its own, and the recipe says {place}; give --storage PLACE, or "
            "another run_directory.",
            "job/option",
        )
    digest = run_hash(owner, told, place, fresh)
    run = run_id(owner, recipe.name, digest)
    kept = place if asked.storage is None else below(place, run)
    recipe = load_recipe(_found(asked.recipe, root), [*asked.overrides, f"run_directory={_quoted(kept)}"], Recipe)
    attempt = next_attempt(jobs, run)
    directory = travelling(root, asked.excludes)
    check_has(directory, files)
    check_fits(directory, upload_limit_bytes())
    if files:
        asked = replace(asked, recipe=files[-1].resolve().relative_to(root.resolve()).as_posix())
    grace_s = asked.grace_s if asked.grace_s is not None else round(recipe.learners.stop_grace_s) + GRACE_MARGIN_S
    labels = Labels(
        run=run,
        attempt=attempt,
        owner=owner,
        recipe_hash=recipe_hash(recipe),
        git=git_version(root),
        run_directory=kept,
        asked=replace(asked, fresh=fresh),
        by=actor_here(),
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
    return Prepared(recipe, labels, directory, request_of(labels, directory, grace_s, environment))


def prepare_again(run: str, owner: str, jobs: list[Job], root: Path, environment: Mapping[str, str]) -> Prepared:
    """The next attempt of the run meant by `run`, asked for as its last one was. Raises as `prepare` does, and
    UsageProblem where the run is somebody else's, or the recipe here is not what the run was begun with."""
    last = find_run(jobs, run, owner).labels
    if last.owner != owner:
        raise UsageProblem(
            f"{last.run} is {last.owner}'s run; whoever goes on with it says --owner {last.owner}.", "job/owner"
        )
    again = prepare(last.asked, owner, jobs, root, False, environment)
    if again.labels.run != last.run:
        raise UsageProblem(
            f"The recipe {last.asked.recipe} in {root} is not what {last.run} was begun with: it would be "
            f"{again.labels.run}. Go back to commit {last.git}, or submit it as a run of its own.",
            "job/changed",
        )
    return again


def send(prepared: Prepared, server: JobServer) -> Job:
    """Submits what was prepared; returns the job, which records its submission when it begins. Raises UsageProblem
    where somebody else submits it at the same moment, RunProblem where the cluster refuses it."""
    labels = prepared.labels
    try:
        server.submit(prepared.request)
    except RunProblem as problem:
        second = taken(problem, labels.run, labels.attempt)
        raise (second or problem) from problem
    return server.job(prepared.request.submission_id)


def ended(job: Job) -> tuple[str, int]:
    """The sentence and exit code of a job that was waited for (amenable.ending). A job that ended with exit code 2 was
    given something wrong, one with 130 was stopped."""
    from amenable.ending import DONE as NO_PROBLEM
    from amenable.ending import INTERRUPTED, JOB_STOPPED, RUN_PROBLEM, USAGE_PROBLEM

    run = job.labels.run
    if job.state == DONE:
        return f"{run} is done; its report is in {job.labels.run_directory}.", NO_PROBLEM
    if job.state == STOPPED or (job.state == FAILED and job.exit_code == INTERRUPTED):
        return f"{run} was stopped; amenable resume {run} goes on from its last checkpoint.", JOB_STOPPED
    if job.state == FAILED and job.exit_code == USAGE_PROBLEM:
        return f"{run} was given something that is wrong (see its last lines above).", USAGE_PROBLEM
    if job.state == FAILED:
        why = f"exit code {job.exit_code}" if job.exit_code is not None else " ".join(job.message.split())[:300]
        return f"{run} failed ({why}); amenable resume {run} goes on from its last checkpoint.", RUN_PROBLEM
    raise ValueError(f"{job.submission_id} has not ended: it is {job.state}")


def told(prepared: Prepared) -> str:
    """What `--dry-run` tells a person."""
    labels, request, directory = prepared.labels, prepared.request, prepared.directory
    return "\n".join(
        [
            f"Run:        {labels.run}, attempt {labels.attempt}",
            f"Kept in:    {labels.run_directory}",
            f"Sends:      {len(directory.files)} files of {directory.root}, {directory.package_bytes / 2**20:.1f} MiB",
            f"Commit:     {labels.git}",
            f"Job:        {request.submission_id}",
            f"Entrypoint: {request.entrypoint}",
            "Nothing was submitted.",
        ]
    )


def storage_of(given: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Below which place runs are kept: `given`, else the environment's AMENABLE_STORAGE."""
    return given if given is not None else environment.get(STORAGE)


def driver_resources(given: list[str]) -> dict[str, float]:
    """The resources in ["head=1"]. Raises UsageProblem for what is none."""
    found: dict[str, float] = {}
    for text in given:
        name, equals, amount = text.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = -1.0
        if not equals or not name or not 0 < found[name] < float("inf"):
            raise UsageProblem(f"--driver-resource {text!r} should be NAME=AMOUNT, as in head=1.", "job/option")
    return found


def _fresh_before(jobs: list[Job], owner: str, recipe: dict[str, Any], place: str) -> str:
    """What the newest run of this recipe drew, so that a submission goes on with it and not with one before it."""
    for job in reversed(jobs):
        fresh = job.labels.asked.fresh
        if job.labels.run == run_id(owner, recipe["name"], run_hash(owner, recipe, place, fresh)):
            return fresh
    return ""


def _found(recipe: str, root: Path) -> str:
    """The recipe as this process finds it: `resume` names it as it lies in the working directory."""
    inside = root / recipe
    return recipe if Path(recipe).expanduser().is_file() or not inside.is_file() else str(inside)


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)
