"""Whether this is a Ray job's driver, and what follows: where it runs, and where its run may be kept."""

import json
import shlex

import pytest

from cluster.under_job import JOB_CONFIG, address_here, check_run_directory, job_id
from corpus.problems import UsageProblem

JOB = {JOB_CONFIG: json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "ann.x.1"}})}


def test_a_job_is_known_by_what_ray_sets_for_its_driver():
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY

    assert (RAY_JOB_CONFIG_JSON_ENV_VAR, JOB_ID_METADATA_KEY) == (JOB_CONFIG, "job_submission_id")
    assert job_id(JOB) == "ann.x.1"
    for other in ({}, {JOB_CONFIG: "{}"}, {JOB_CONFIG: "not JSON"}, {JOB_CONFIG: "[]"}):
        assert job_id(other) is None


def test_a_job_runs_on_its_own_cluster_and_any_other_command_where_it_is_told():
    assert address_here(None, JOB) == "auto"
    assert address_here("head:6379", JOB) == "head:6379"
    assert address_here(None, {}) is None


@pytest.mark.parametrize("place", ["runs/x", "./x", "~/runs/x", "x"])
def test_a_place_in_the_working_directory_of_a_job_is_refused_and_fine_elsewhere(place):
    with pytest.raises(
        UsageProblem, match=r"would be in the working directory of the Ray job ann\.x\.1, which is gone"
    ):
        check_run_directory(place, JOB)
    check_run_directory(place, {})


@pytest.mark.parametrize(
    ("place", "given", "right"),
    [
        ("runs/demo", "run recipes/demo.yaml", "run recipes/demo.yaml --run /MOUNTED/demo"),
        (
            "runs/demo",
            "run recipes/demo.yaml 'a.b=c d' --json",
            "run recipes/demo.yaml 'a.b=c d' --json --run /MOUNTED/demo",
        ),
        ("mine/", "sft --run mine/ recipes/demo.yaml", "sft recipes/demo.yaml --run /MOUNTED/mine"),
        ("mine", "sft recipes/demo.yaml --run=mine", "sft recipes/demo.yaml --run /MOUNTED/mine"),
    ],
)
def test_the_refusal_says_the_command_that_is_right(place, given, right):
    with pytest.raises(UsageProblem) as refused:
        check_run_directory(place, JOB, shlex.split(given))
    command = str(refused.value).partition("The job's command is then: python -m amenable ")[2]
    assert command == right
    check_run_directory(shlex.split(command)[-1], JOB)


@pytest.mark.parametrize("place", ["/mnt/runs/x", "s3://bucket/runs/x", "gs://bucket/x"])
def test_a_place_that_outlives_a_job_passes(place):
    check_run_directory(place, JOB)
