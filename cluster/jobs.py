"""Jobs of a Ray cluster as amenable sees them: which run each belongs to, which attempt it is, and how it ended.

What a job was asked to do travels with it as metadata, so that `resume` can ask for it again from any machine.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.run_ids import is_run_id, submission_id
from corpus.problems import RunProblem, UsageProblem

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's variable: seconds between SIGTERM and SIGKILL of a job that is stopped. Its supervisor reads it from the
runtime environment that the job was submitted with (ray/dashboard/modules/job/job_supervisor.py)."""

RAYS_STOP_WAIT_S = 3.0
"""Ray's default for it."""

LIVE = frozenset({"PENDING", "RUNNING"})
DONE, STOPPED, FAILED = "SUCCEEDED", "STOPPED", "FAILED"


@dataclass(frozen=True)
class Driver:
    """What the job's own process reserves beside the roles: where it has something, Ray may put it on any node."""

    cpus: float = 0.0
    memory_gib: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a person asks for with `amenable submit`."""

    recipe: str
    """Its path within the working directory, or the name of one that comes with the program."""
    overrides: tuple[str, ...] = ()
    storage: str | None = None
    """Below which place the run is kept; None where the recipe says where."""
    fresh: str = ""
    """Drawn for a run that was begun anew."""
    variables: tuple[str, ...] = ()
    """Names of environment variables that every node must have."""
    excludes: tuple[str, ...] = ()
    grace_s: int | None = None
    driver: Driver = Driver()


@dataclass(frozen=True)
class Labels:
    """What a job says of itself. All of it can be read by everybody who sees the cluster's dashboard."""

    run: str
    attempt: int
    owner: str
    recipe_hash: str
    git: str
    run_directory: str
    asked: Asked
    by: str = ""
    """Who submitted it, USER@HOST; empty where that is not known."""
    at: str = ""
    """When, as ISO time in UTC by the clock of whoever submitted it; empty where that is not known. A new head knows
    nothing of the jobs before, and gives their submission ids again: this tells them apart."""

    def metadata(self) -> dict[str, str]:
        """The labels as Ray keeps them: text by name. `job_name` is what the dashboard shows."""
        names = ("run", "owner", "recipe_hash", "git", "run_directory", "by", "at")
        told = {name: getattr(self, name) for name in names}
        told |= {"attempt": str(self.attempt), "asked": json.dumps(asdict(self.asked), sort_keys=True)}
        return {"job_name": self.run} | {f"amenable_{name}": text for name, text in told.items()}

    @classmethod
    def read(cls, metadata: dict[str, str] | None) -> "Labels | None":
        """The labels in a job's metadata; None where it is no job of amenable's, or one that cannot be understood."""
        told = {name.removeprefix("amenable_"): text for name, text in (metadata or {}).items()}
        try:
            asked = json.loads(told["asked"])
            asked["driver"] = Driver(**asked["driver"])
            for name in ("overrides", "variables", "excludes"):
                asked[name] = tuple(asked[name])
            plain = {name: told[name] for name in ("run", "owner", "recipe_hash", "git", "run_directory")}
            plain |= {name: told.get(name, "") for name in ("by", "at")}
            return cls(attempt=int(told["attempt"]), asked=Asked(**asked), **plain)
        except (KeyError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Job:
    """One job of the cluster that amenable submitted. Times are Unix seconds."""

    submission_id: str
    state: str
    labels: Labels
    message: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    grace_s: float = RAYS_STOP_WAIT_S

    @property
    def is_live(self) -> bool:
        """Whether it runs, or waits to."""
        return self.state in LIVE

    def as_json(self) -> dict[str, Any]:
        """What `--json` tells of it."""
        labels = self.labels
        return {
            "run": labels.run,
            "attempt": labels.attempt,
            "submission_id": self.submission_id,
            "state": self.state,
            "exit_code": self.exit_code,
            "owner": labels.owner,
            "run_directory": labels.run_directory,
            "recipe": labels.asked.recipe,
            "recipe_hash": labels.recipe_hash,
            "git": labels.git,
            "started": self.started,
            "ended": self.ended,
            "grace_s": self.grace_s,
        }


def job_of(details: Any) -> Job | None:
    """The job in Ray's JobDetails; None where amenable did not submit it."""
    labels = Labels.read(details.metadata)
    if labels is None or not details.submission_id:
        return None
    variables = (details.runtime_env or {}).get("env_vars") or {}
    try:
        grace_s = float(variables[STOP_WAIT])
    except (KeyError, ValueError):
        grace_s = RAYS_STOP_WAIT_S
    return Job(
        submission_id=details.submission_id,
        state=str(getattr(details.status, "value", details.status)),
        labels=labels,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=None if details.start_time is None else details.start_time / 1000,
        ended=None if not details.end_time else details.end_time / 1000,
        grace_s=grace_s,
    )


def attempts_of(jobs: Iterable[Job], run: str) -> list[Job]:
    """The jobs of a run, the first attempt first."""
    return sorted((job for job in jobs if job.labels.run == run), key=lambda job: job.labels.attempt)


def next_attempt(jobs: Iterable[Job], run: str) -> int:
    """The number of the attempt that a submission of `run` makes now. Raises UsageProblem where one is live."""
    attempts = attempts_of(jobs, run)
    live = next((job for job in attempts if job.is_live), None)
    if live is not None:
        raise UsageProblem(
            f"{run} is {live.state.lower()} already, as {live.submission_id}: follow it with amenable logs -f {run}, "
            f"end it with amenable stop {run}, or begin another with --fresh.",
            "job/live",
        )
    return attempts[-1].labels.attempt + 1 if attempts else 1


def find_run(jobs: Sequence[Job], wanted: str, owner: str) -> Job:
    """The newest attempt of the run meant by `wanted`: a run id, a submission id, or the end or name of one run of
    `owner`'s, or else of anybody's. Raises UsageProblem where there is none, or are several."""
    named = [job for job in jobs if wanted in (job.labels.run, job.submission_id)]
    if not named and not is_run_id(wanted):
        meant = [job for job in jobs if _means(wanted, job.labels.run)]
        named = [job for job in meant if job.labels.owner == owner] or meant
    runs = sorted({job.labels.run for job in named})
    if not runs:
        known = ", ".join(sorted({job.labels.run for job in jobs})) or "none"
        raise UsageProblem(f"The cluster knows no run {wanted!r}; its runs are: {known}.", "job/not-found")
    if len(runs) > 1:
        raise UsageProblem(f"{wanted!r} could be {' or '.join(runs)}; give one of them in full.", "job/not-found")
    exact = [job for job in named if job.submission_id == wanted]
    return exact[0] if exact else attempts_of(jobs, runs[0])[-1]


def _means(wanted: str, run: str) -> bool:
    name = run.partition("/")[2]
    return wanted in (name, name.rpartition("-")[0], name.rpartition("-")[2])


def stop_grace(job: Job, asked_s: float | None) -> float:
    """Seconds to wait for a job that is stopped. Raises UsageProblem where Ray would kill it sooner than is asked, and
    where the job has ended."""
    if not job.is_live:
        raise UsageProblem(
            f"{job.labels.run} does not run: its attempt {job.labels.attempt} is {job.state.lower()}.",
            "job/not-running",
        )
    if asked_s is None:
        return job.grace_s
    if asked_s > job.grace_s:
        raise UsageProblem(
            f"--grace {asked_s:g} is more than the {job.grace_s:g} s that this job was submitted with, after which Ray "
            "kills it; a longer grace is given with amenable submit --grace.",
            "job/grace",
        )
    return asked_s


def taken(error: RunProblem, run: str, attempt: int) -> UsageProblem | None:
    """The sentence for a submission whose id somebody else took at the same moment; None for any other problem."""
    if "already exists" not in str(error):
        return None
    return UsageProblem(
        f"{run} was submitted by somebody else at this moment, as {submission_id(run, attempt)}; see it with amenable "
        f"status {run}.",
        "job/live",
    )
