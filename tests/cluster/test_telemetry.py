"""Nobody is told how this program is used: off in every process that it starts and everything that it asks others to
start, except where a person has said otherwise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cluster.git_version import git_version
from cluster.job_request import request_of
from cluster.jobs import Asked, Labels
from cluster.working_directory import travelling
from corpus.telemetry import TELEMETRY_OFF, switch_telemetry_off

ROOT = Path(__file__).parents[2]
BASE = sorted((ROOT / "cluster" / "k8s").glob("*/ray*.yaml"))

# What each library makes of its variables, asked of the library itself.
ASKS = {
    "ray": "from ray._common.usage.usage_lib import usage_stats_enabled; print(usage_stats_enabled())",
    "huggingface_hub": "from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY as off; print(not off)",
}


def said_by(code: str, **environment: str) -> str:
    """The last line that a process without any setting of its own prints."""
    plain = {name: value for name, value in os.environ.items() if name not in TELEMETRY_OFF}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=plain | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.strip().splitlines()[-1]


VLLM = """
from corpus.telemetry import switch_telemetry_off
from vllm.usage import usage_lib
before = usage_lib.is_usage_stats_enabled()
usage_lib._USAGE_STATS_ENABLED = None  # what it has found is kept
switch_telemetry_off()
print(before, usage_lib.is_usage_stats_enabled())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_reports_by_itself_and_not_once_it_is_switched_off(tmp_path):
    """In one process, because the import takes seconds; vLLM looks at the environment when it is asked first."""
    assert said_by(VLLM, HOME=str(tmp_path)) == "True False"


@pytest.mark.parametrize("library", ASKS)
def test_each_library_reports_by_itself_and_not_once_it_is_switched_off(library: str, tmp_path):
    ask = ASKS[library]
    home = {"HOME": str(tmp_path)}  # Ray also looks for a file there
    assert said_by(ask, **home) == "True"
    off = f"from corpus.telemetry import switch_telemetry_off; switch_telemetry_off(); {ask}"
    assert said_by(off, **home) == "False"


def test_what_a_person_has_set_stays():
    environment = {"VLLM_NO_USAGE_STATS": "0"}
    switch_telemetry_off(environment)
    assert environment == TELEMETRY_OFF | {"VLLM_NO_USAGE_STATS": "0"}


SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
# The first lines of each kind of process, up to the import that would read the variables.
PROCESSES = {
    "the command": "import sys; sys.argv = ['amenable', '--version']\n"
    "from amenable.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass",
    "the session": "from cluster import session\nsession._start_local = lambda *given: None\n"
    "with session.session(None, 1):\n    pass",
    "a scoring process": "import types\nfrom actors.scoring import ScoringWorker\n"
    "ScoringWorker.__ray_metadata__.modified_class('s', types.SimpleNamespace(threads=1, gpus=0))",
    "a learner": "from learners import rank\ntry:\n    rank.serve({'threads': 1})\nexcept Exception:\n    pass",
}


@pytest.mark.parametrize("process", PROCESSES)
def test_each_process_switches_it_off_before_it_imports_what_reads_it(process: str):
    found = json.loads(said_by(f"{PROCESSES[process]}\n{SHOW}"))
    assert {name: found.get(name) for name in TELEMETRY_OFF} == TELEMETRY_OFF
    found = json.loads(said_by(f"{PROCESSES[process]}\n{SHOW}", DO_NOT_TRACK="0"))
    assert found["DO_NOT_TRACK"] == "0"


def test_engines_of_training_and_of_the_service_have_it_in_their_environment():
    from actors.rollout_engine import ENVIRONMENT as of_rollouts
    from serving.engine import ENVIRONMENT as of_serving

    for environment in (of_rollouts, of_serving):
        assert environment.items() >= TELEMETRY_OFF.items()


def request(environment: dict[str, str], root: Path):
    asked = Asked("demo")
    labels = Labels("ann/x-1", 1, "ann", "0" * 64, git_version(root), "s3://bucket/x", asked)
    return request_of(labels, travelling(root, ()), 90, environment)


def test_a_job_is_told_too_and_who_submits_it_may_say_otherwise(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    told = request({}, tmp_path).runtime_env["env_vars"]
    assert told.items() >= TELEMETRY_OFF.items()
    told = request({"RAY_USAGE_STATS_ENABLED": "1"}, tmp_path).runtime_env["env_vars"]
    assert told["RAY_USAGE_STATS_ENABLED"] == "1"


def containers(document: object) -> list[SimpleNamespace]:
    """Every container of a manifest that has the program's image, with its plain variables."""
    found = []
    if isinstance(document, dict):
        for each in document.get("containers", []):
            plain = {one["name"]: one.get("value") for one in each.get("env", [])}
            found.append(SimpleNamespace(name=each["name"], environment=plain))
        for value in document.values():
            found += containers(value)
    elif isinstance(document, list):
        found = [one for value in document for one in containers(value)]
    return found


@pytest.mark.parametrize("path", BASE, ids=lambda path: path.stem)
def test_pods_that_start_ray_have_it_in_their_environment(path: Path):
    of_ray = [one for one in containers(yaml.safe_load(path.read_text())) if one.name in ("ray-head", "ray-worker")]
    assert of_ray
    for one in of_ray:
        assert one.environment.items() >= TELEMETRY_OFF.items(), one.name


def test_the_image_has_it_in_its_environment():
    [environment] = re.findall(r"^ENV ((?:.*\\\n)*.*)$", (ROOT / "cluster" / "docker" / "Dockerfile").read_text(), re.M)
    assert set(environment.replace("\\\n", " ").split()) >= {f"{name}={off}" for name, off in TELEMETRY_OFF.items()}


def test_the_service_that_is_deployed_by_itself_has_it_in_its_environment():
    deployed = yaml.safe_load((ROOT / "serving" / "deploy.yaml").read_text())
    [application] = deployed["applications"]
    assert application["runtime_env"]["env_vars"].items() >= TELEMETRY_OFF.items()
