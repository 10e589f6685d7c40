"""Whether this process is the driver of a Ray job, and what follows from that.

Ray unpacks a job's working directory on one node and removes it after the job, so nothing may be kept below it; and the
job is on a cluster, which the driver joins without being told an address.
"""

import json
import os
from collections.abc import Mapping

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


def address_here(address: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The address of the cluster to join: the one that was given, else the one whose job this is; None without."""
    return "auto" if address is None and job_id(environment) is not None else address


def outlives_a_job(run_directory: str) -> bool:
    """Whether a run kept there is still there when the node that the job ran on is gone, as far as the name says."""
    return is_object_store(run_directory) or os.path.isabs(run_directory)


def check_run_directory(run_directory: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageProblem where this is a job, and the run would be kept in the working directory that ends with it."""
    job = job_id(environment)
    if job is not None and not outlives_a_job(run_directory):
        raise UsageProblem(
            f"{run_directory} would be in the working directory of the Ray job {job}, which is gone when the job ends; "
            "keep the run in an object store or on a disk that all nodes mount: --run s3://… or --run /mounted/…",
            "job/relative-directory",
        )
