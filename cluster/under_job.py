"""Whether this process is the driver of a Ray job, and what follows from that.

Ray unpacks a job's working directory on one node and removes it after the job, so nothing may be kept below it; and the
job is on a cluster, which the driver joins without being told an address.
"""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from corpus.problems import UsageProblem
from corpus.storage import is_object_store

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray sets for a job's driver, and for no other process (ray/_private/runtime_env/constants.py)."""


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The submission id of the Ray job whose driver this is; None where it is none's."""
    try:
        return json.loads(environment[JOB_CONFIG])["metadata"]["job_submission_id"]
    except (KeyError, ValueError, TypeError):
        return None


def job_metadata(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the Ray job whose driver this is was told of itself when it was submitted; {} where it is none's."""
    try:
        return {str(key): str(value) for key, value in json.loads(environment[JOB_CONFIG])["metadata"].items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def job_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that the Ray job whose driver this is was submitted with; {} where it is none's."""
    try:
        return dict(json.loads(environment[JOB_CONFIG])["runtime_env"]["env_vars"])
    except (KeyError, ValueError, TypeError):
        return {}


def address_here(address: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The address of the cluster to join: the one that was given, else the one whose job this is; None without."""
    return "auto" if address is None and job_id(environment) is not None else address


def outlives_a_job(run_directory: str) -> bool:
    """Whether a run kept there is still there when the node that the job ran on is gone, as far as the name says."""
    return is_object_store(run_directory) or os.path.isabs(run_directory)


def check_run_directory(
    run_directory: str, environment: Mapping[str, str] = os.environ, command: Sequence[str] | None = None
) -> None:
    """Raises UsageProblem where this is a job, and the run would be kept in the working directory that ends with it.
    `command` are the words of the command that was given, by default of this process."""
    job = job_id(environment)
    if job is not None and not outlives_a_job(run_directory):
        name = os.path.basename(os.path.normpath(run_directory))
        right = shlex.join(_elsewhere(command if command is not None else sys.argv[1:], f"/MOUNTED/{name}"))
        raise UsageProblem(
            f"{run_directory} would be in the working directory of the Ray job {job}, which is gone when the job ends; "
            "keep the run on a disk that all nodes mount, or in an object store (--run s3://…). The job's command is "
            f"then: python -m amenable {right}",
            "job/relative-directory",
        )


def _elsewhere(command: Sequence[str], place: str) -> list[str]:
    """The words of a command with another --run than it may have."""
    kept = [
        word
        for before, word in zip(("", *command[:-1]), command, strict=True)
        if "--run" not in (before, word) and not word.startswith("--run=")
    ]
    return [*kept, "--run", place]
