"""What Ray is asked to run: the command line, environment, metadata and resources of one attempt of a run."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.jobs import STOP_WAIT, Labels
from cluster.run_ids import submission_id
from cluster.secrecy import check_no_secret
from cluster.working_directory import WorkingDirectory
from corpus.telemetry import TELEMETRY_OFF

GIB = 2**30


@dataclass(frozen=True)
class JobRequest:
    """The arguments of `JobSubmissionClient.submit_job`."""

    entrypoint: str
    submission_id: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    entrypoint_num_cpus: float | None
    entrypoint_memory: int | None
    entrypoint_resources: dict[str, float] | None


def command_of(labels: Labels) -> str:
    """The command line of the job. `exec`, so that a stop's SIGTERM meets the program and no shell before it."""
    words = ["python", "-m", "amenable", "run", labels.asked.recipe, *labels.asked.overrides]
    words += ["--run", labels.run_directory]
    for name in labels.asked.variables:
        words += ["--env", name]
    return "exec " + shlex.join(words)


def request_of(labels: Labels, directory: WorkingDirectory, grace_s: int, environment: Mapping[str, str]) -> JobRequest:
    """The request for one attempt. `environment` is this process's own, whose secrets must not be in it; where it says
    nothing else of telemetry, the processes of the job are told to report nothing to the makers of libraries.

    Raises UsageProblem where something in the request looks like a secret.
    """
    driver = labels.asked.driver
    telemetry = {name: environment.get(name, off) for name, off in TELEMETRY_OFF.items()}
    request = JobRequest(
        entrypoint=command_of(labels),
        submission_id=submission_id(labels.run, labels.attempt),
        runtime_env={
            "working_dir": str(directory.root),
            "excludes": list(directory.excludes),
            "env_vars": telemetry | {STOP_WAIT: str(grace_s)},
        },
        metadata=labels.metadata(),
        entrypoint_num_cpus=driver.cpus or None,
        entrypoint_memory=round(driver.memory_gib * GIB) or None,
        entrypoint_resources=dict(driver.resources) or None,
    )
    for told in (request.entrypoint, request.metadata, request.runtime_env):
        check_no_secret(told, environment, "The job")
    return request
