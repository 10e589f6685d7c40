"""Jobs on a real Ray head of this machine, with its dashboard and token authentication: submitted, refused, followed,
stopped within the grace, resumed to the end."""

import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from corpus import audit_log

pytestmark = [pytest.mark.slow, pytest.mark.jobs, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
RECIPE = "tests/end_to_end/tiny.yaml"
DOCS = ROOT / "docs" / "cluster.md"
PLAIN = "python -m amenable run recipes/demo.yaml --run /mounted/runs/demo"
"""What the docs' plain `ray job submit` runs."""

START_LIMIT_S = 180
CANARY = "zq7-canary-4b1f-secret"


@dataclass(frozen=True)
class Head:
    """A Ray head: where it is, and the environment of a person who has its token."""

    gcs: str
    dashboard: str
    environment: dict[str, str]
    storage: Path

    def amenable(self, *arguments: str, code: int | None = 0, limit_s: float = 900.0, **variables: str):
        """Runs a command of ours to its end."""
        ended = subprocess.run(
            [sys.executable, "-m", "amenable", *arguments],
            cwd=ROOT,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert code is None or ended.returncode == code, (ended.returncode, ended.stdout[-3000:], ended.stderr[-3000:])
        return ended

    def submit(self, *arguments: str, code: int | None = 0, **variables: str):
        given = ["submit", RECIPE, "--storage", str(self.storage), "--address", self.dashboard, *arguments]
        return self.amenable(*given, code=code, **variables)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, client, agent, agent_rpc, metrics = free_ports(6)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "AMENABLE_OWNER": "ann",
    }
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            [
                *[sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"],
                *["--node-ip-address=127.0.0.1", "--num-cpus=4", f"--object-store-memory={256 << 20}"],
                *["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"],
                *[f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"],
                *[f"--dashboard-agent-grpc-port={agent_rpc}", f"--metrics-export-port={metrics}"],
            ],
            cwd=home,
            env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    found = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment, home / "runs")
    try:
        give_up = time.monotonic() + START_LIMIT_S
        while found.amenable("list", "--address", found.dashboard, code=None).returncode != 0:
            said = (home / "head.log").read_text()
            assert process.poll() is None, said[-3000:]
            assert time.monotonic() < give_up, f"no dashboard within {START_LIMIT_S} s: {said[-3000:]}"
            time.sleep(1)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)  # ray start --block ends what it has begun
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def wait_for(what: str, is_there, limit_s: float) -> None:
    give_up = time.monotonic() + limit_s
    while not is_there():
        assert time.monotonic() < give_up, f"{what} did not come within {limit_s:.0f} s"
        time.sleep(1)


def test_who_has_no_token_or_another_one_is_told(head: Head, tmp_path):
    other = tmp_path / "token"
    other.write_text("x" * 64)
    ended = head.amenable("list", "--address", head.dashboard, code=2, RAY_AUTH_TOKEN_PATH=str(other))
    assert "does not take this token" in ended.stderr
    ended = head.amenable("list", "--address", head.dashboard, code=2, RAY_AUTH_MODE="disabled")
    assert "does not take this token" in ended.stderr


def test_the_doctor_finds_the_head_sound_and_a_recipe_that_is_too_large_not(head: Head, tmp_path):
    place = tmp_path / "run"
    ended = head.amenable("doctor", RECIPE, "--run", str(place), "--address", head.gcs, "--json")
    findings = {each["check"]: each for each in json.loads(ended.stdout)["findings"]}
    assert {each["state"] for each in findings.values()} == {"ok"}, findings
    assert "vllm" in findings["imports"]["says"]
    assert not place.exists()
    ended = head.amenable(
        *["doctor", RECIPE, "rollouts.generators=4", "--run", str(place), "--address", head.gcs, "--json"], code=1
    )
    (failed,) = [each for each in json.loads(ended.stdout)["findings"] if each["state"] == "failed"]
    assert failed["check"] == "placement"
    assert "no room beside the other roles" in failed["says"]


def ray_job_submit(head: Head, *command: str, limit_s: float) -> "subprocess.CompletedProcess[str]":
    """Gives the docs' plain `ray job submit`, with another command of ours than theirs, as they do: from the checkout,
    the cluster named by the environment."""
    [line] = re.findall(r"^ray job submit .*$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    given, dashes, theirs = line.partition(" -- ")
    assert dashes
    assert theirs == PLAIN
    return subprocess.run(
        [*shlex.split(given), "--", *command],
        cwd=ROOT,
        env=head.environment | {"RAY_API_SERVER_ADDRESS": head.dashboard},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def test_a_plain_job_with_a_relative_run_directory_is_refused_before_any_work_with_the_command_that_is_right(
    head: Head,
):
    ended = ray_job_submit(head, "python", "-m", "amenable", "run", RECIPE, limit_s=300)
    assert ended.returncode == 1
    said = " ".join((ended.stdout + ended.stderr).split())
    assert "runs/tiny would be in the working directory of the Ray job raysubmit_" in said
    assert f"The job's command is then: python -m amenable run {RECIPE} --run /MOUNTED/tiny" in said
    assert "exit code 2" in said


def test_a_plain_job_with_a_run_directory_that_all_nodes_see_succeeds(head: Head):
    """The docs' command, of a recipe that is small, and as far as its second model."""
    run = head.storage / "plain"
    words = shlex.split(PLAIN.replace("recipes/demo.yaml", RECIPE).replace("/mounted/runs/demo", str(run)))
    words[words.index("run")] = "sft"
    ended = ray_job_submit(head, *words, limit_s=900)
    assert ended.returncode == 0, (ended.stdout[-3000:], ended.stderr[-3000:])
    assert "succeeded" in ended.stdout
    assert {path.parent.name for path in run.glob("*/stage.json")} == {"base", "data", "sft"}
    entries, _ = audit_log.read(run)
    assert [(entry.action, entry.outcome) for entry in entries] == [("began", "done"), ("ended", "done")]
    assert entries[0].asked["submission_id"].startswith("raysubmit_")


def test_a_job_is_followed_refuses_a_second_is_stopped_with_a_checkpoint_and_resumed_to_the_end(head: Head):
    answer = json.loads(head.submit("--no-wait", "--json", "--env", "HF_TOKEN", HF_TOKEN=CANARY).stdout)
    refused = head.amenable("logs", "-f", "tiny", "--address", head.dashboard, code=2)
    assert "The environment has no HF_TOKEN, which --env asks for" in refused.stdout  # the nodes do not have it
    assert head.amenable("status", "tiny", "--address", head.dashboard, "--json").returncode == 0

    first = json.loads(head.submit("--no-wait", "--json", "base.steps=3000", HF_TOKEN=CANARY).stdout)
    run, directory = first["run"], Path(first["run_directory"])
    assert run != answer["run"]
    assert directory == head.storage / run
    second = head.submit("--no-wait", "base.steps=3000", code=2)
    assert f"{run} is " in second.stderr
    assert f"amenable stop {run}" in second.stderr

    with subprocess.Popen(
        [sys.executable, "-m", "amenable", "logs", "-f", run, "--address", head.dashboard],
        cwd=ROOT,
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        wait_for("the run's lease", lambda: (directory / "run.lease").exists(), 300)
        holder = head.amenable("run", RECIPE, "base.steps=3000", "--run", str(directory), code=2)
        assert "is in use by process" in holder.stderr
        wait_for("base training", lambda: (directory / "base" / "metrics.jsonl").exists(), 600)
        stopped = json.loads(head.amenable("stop", run, "--address", head.dashboard, "--json").stdout)
        out, err = following.communicate(timeout=120)
    assert stopped["state"] == "STOPPED"
    assert stopped["last_line"].startswith("Interrupted at base, "), stopped
    assert following.returncode == 3, (out[-2000:], err[-2000:])
    assert "[2 of " in out
    assert "was stopped; amenable resume" in err

    again = head.amenable("resume", run, "--address", head.dashboard, "--json")
    done = json.loads(again.stdout)
    assert (done["run"], done["attempt"], done["state"], done["exit_code"]) == (run, 2, "SUCCEEDED", 0)
    assert (directory / "report.html").is_file()
    state = json.loads(head.amenable("status", run, "--address", head.dashboard, "--json").stdout)
    assert state["other_attempts"] == [{"attempt": 1, "state": "STOPPED"}]
    listed = json.loads(head.amenable("list", "--address", head.dashboard, "--json").stdout)["runs"]
    assert [each["run"] for each in listed] == [answer["run"], run]

    told = again.stdout + again.stderr + out + err + json.dumps([first, state, listed])
    kept = [path for path in directory.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".pt")]
    assert CANARY not in told
    assert [path for path in kept if CANARY.encode() in path.read_bytes()] == []
